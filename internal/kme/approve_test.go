package kme

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/problem"
)

// officer is an operator with the key of its certificate.
type officer struct {
	identity.Caller
	leaf *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (o officer) sign(t *testing.T, act, node string, until time.Time) approval.Approval {
	t.Helper()
	a, err := approval.Sign(approval.Act(act), node, until, o.leaf, o.key)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// officers has k know ada and olga, who are security officers, and vera, who is none.
func (k *KME) officers(t *testing.T) map[string]officer {
	t.Helper()
	rows := make(map[string]identity.Principal)
	for _, name := range []string{"ada", "olga", "vera"} {
		rows["operator/"+name] = identity.Principal{Enabled: true}
	}
	rows["operator/ada"] = identity.Principal{Enabled: true, Duties: []identity.Duty{identity.SecurityOfficer, identity.Operating}}
	rows["operator/olga"] = identity.Principal{Enabled: true, Duties: []identity.Duty{identity.SecurityOfficer}}
	m, err := identity.NewMap(
		[]identity.Rule{{ID: "operator", Pool: "operator", Role: identity.RoleOperator, URI: "qkd://operator.lab.test/{id}", Principal: "{id}"}},
		identity.Requirements{Keys: []identity.KeyKind{identity.ECDSAP256}, MaxLifetime: 3 * time.Hour}, rows)
	if err != nil {
		t.Fatal(err)
	}
	k.Officer = func(leaf *x509.Certificate, now time.Time) (identity.Caller, error) {
		return m.Judge("operator", leaf, now)
	}
	all := make(map[string]officer)
	for _, name := range []string{"ada", "olga", "vera", "mallory"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), NotBefore: k.Now().Add(-time.Hour), NotAfter: k.Now().Add(time.Hour), Subject: pkix.Name{CommonName: name},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
			URIs: []*url.URL{{Scheme: "qkd", Host: "operator.lab.test", Path: "/" + name}},
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		c, _ := k.Officer(leaf, k.Now()) // nobody's, of mallory
		all[name] = officer{c, leaf, key}
	}
	return all
}

// TestByTwo: an act that takes two officers is done for one who calls and has signed,
// and another who has signed for it, once; and for nobody else. What they signed
// stands in the audit and can be checked there again.
func TestByTwo(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.guarded()
	who := k.officers(t)
	soon := s.now().Add(10 * time.Minute)
	const act, node = "erase alice", "km1/a"
	byTwo := func(caller string, given ...approval.Approval) (*call, error) {
		c := k.begin(who[caller].Caller, "r", audit.Cleanup, identity.SAE{})
		return c, c.byTwo(t.Context(), who[caller].Caller, given, "erase", "alice")
	}
	ada, olga := who["ada"].sign(t, act, node, soon), who["olga"].sign(t, act, node, soon)
	for why, given := range map[string][]approval.Approval{
		"takes two officers: let another one say kmectl approve --node km1/a 'erase alice'": nil,
		"1 were given":                    {olga},
		"3 were given":                    {olga, ada, ada},
		"both are of ada":                 {ada, who["ada"].sign(t, act, node, soon)},
		"both are of olga":                {olga, who["olga"].sign(t, act, node, soon)},
		"vera is no security officer":     {ada, who["vera"].sign(t, act, node, soon)},
		"names nobody: unknown-principal": {ada, who["mallory"].sign(t, act, node, soon)},
		`it approves "erase bob"`:         {ada, who["olga"].sign(t, "erase bob", node, soon)},
		`it is for the node "km2/a"`:      {ada, who["olga"].sign(t, act, "km2/a", soon)},
		"it ended at":                     {ada, who["olga"].sign(t, act, node, s.now())},
		"it is good for longer than":      {ada, who["olga"].sign(t, act, node, s.now().Add(2*time.Hour))},
	} {
		if _, err := byTwo("ada", given...); problem.KindOf(err) != problem.Forbidden || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: got %v", why, err)
		}
	}
	if _, err := byTwo("vera", ada, olga); problem.KindOf(err) != problem.Forbidden || !strings.Contains(err.Error(), "neither is of the caller, vera") {
		t.Errorf("vera calls with two officers' approvals: %v", err)
	}
	c, err := byTwo("ada", olga, ada)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := byTwo("ada", olga, who["ada"].sign(t, act, node, soon)); problem.KindOf(err) != problem.Forbidden || !strings.Contains(err.Error(), "used before") {
		t.Errorf("an approval is used again: %v", err)
	}
	s.step(2 * time.Hour) // the nonces are forgotten only when the approvals have ended
	if err := k.Store.UseApprovals(t.Context(), [][]byte{[]byte("another")}, s.now()); err != nil {
		t.Fatal(err)
	}
	if _, err := byTwo("ada", olga, ada); problem.KindOf(err) != problem.Forbidden || !strings.Contains(err.Error(), "ended") {
		t.Errorf("two hours later: %v", err)
	}

	c.ev.Outcome = audit.Done
	if err := k.Store.Record(t.Context(), c.ev); err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), s.cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var texts []string
	if err := conn.QueryRow(t.Context(), "SELECT array(SELECT json_array_elements_text(body::json->'approvals')) FROM kme.audit ORDER BY seq DESC LIMIT 1").Scan(&texts); err != nil || len(texts) != 2 {
		t.Fatalf("recorded %q, %v", texts, err)
	}
	for i, want := range []string{"olga", "ada"} {
		var a approval.Approval
		if err := json.Unmarshal([]byte(texts[i]), &a); err != nil {
			t.Fatal(err)
		}
		if leaf, err := a.Verify(act, node, soon.Add(-time.Minute)); err != nil || leaf.Subject.CommonName != want {
			t.Errorf("%s, out of the audit: %v", want, err)
		}
	}
}
