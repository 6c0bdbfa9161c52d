package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"math/big"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

var now = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func testRules() []Rule {
	return []Rule{
		{ID: "sae-uri", Pool: "sae", Role: RoleSAE, URI: "qkd://sae.lab.test/{id}", Principal: Placeholder},
		{ID: "sae-mail", Pool: "sae", Role: RoleSAE, Email: "alice@qutemail.example", Principal: "alice@qutemail.example"},
		{ID: "sae-dn", Pool: "sae", Role: RoleSAE, DN: `CN=Alice\, Ltd,OU=SAE+O=Foreign,C=AT`, Principal: "Firma Älice"},
		{ID: "kme-uri", Pool: "kme", Role: RoleKME, URI: "qkd://kme.lab.test/{id}", Principal: Placeholder},
		{ID: "op-root", Pool: "operator", Role: RoleOperator, URI: "qkd://operator.lab.test/root", Principal: "root"},
	}
}

func testRequirements() Requirements {
	return Requirements{Keys: []KeyKind{ECDSAP256, ECDSAP384, Ed25519}, MaxLifetime: 169 * time.Hour}
}

func testMap(t testing.TB) *Map {
	t.Helper()
	principals := map[string]Principal{
		"sae/alice": {Enabled: true}, "sae/alice@qutemail.example": {Enabled: true}, "sae/Firma Älice": {Enabled: true},
		"sae/bob": {Reason: "ticket 41"}, "kme/km1": {Enabled: true}, "operator/root": {Enabled: true},
	}
	m, err := NewMap(testRules(), testRequirements(), principals)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// recipe says how a certificate differs from alice's good one.
type recipe struct {
	uris, emails []string
	dns          []string
	names        []altName // further raw GeneralNames
	subject      pkix.RDNSequence
	edit         func(*x509.Certificate)
	key          crypto.Signer
}

type altName struct {
	tag   int
	value string
}

func rdnOf(kind asn1.ObjectIdentifier, value any) pkix.RelativeDistinguishedNameSET {
	return pkix.RelativeDistinguishedNameSET{{Type: kind, Value: value}}
}

var (
	oidCN = asn1.ObjectIdentifier{2, 5, 4, 3}
	oidOU = asn1.ObjectIdentifier{2, 5, 4, 11}
	oidO  = asn1.ObjectIdentifier{2, 5, 4, 10}
	oidC  = asn1.ObjectIdentifier{2, 5, 4, 6}
)

func cn(values ...string) pkix.RDNSequence {
	seq := pkix.RDNSequence{rdnOf(oidOU, "SAE")}
	for _, v := range values {
		seq = append(seq, rdnOf(oidCN, v))
	}
	return seq
}

// make signs the certificate. The SANs are written by hand: x509.CreateCertificate
// would tidy up the very spellings under test.
func (r recipe) make(t testing.TB) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(4711), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		AuthorityKeyId: []byte{0xab, 0xcd},
	}
	subject, err := asn1.Marshal(r.subject)
	if err != nil {
		t.Fatal(err)
	}
	template.RawSubject = subject
	if ext, ok := r.sans(t); ok {
		template.ExtraExtensions = append(template.ExtraExtensions, ext)
	}
	if r.edit != nil {
		r.edit(template)
	}
	if r.key == nil {
		r.key = p256
	}
	parent := &x509.Certificate{Subject: pkix.Name{CommonName: "CA"}, SubjectKeyId: []byte{0xab, 0xcd}}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, r.key.Public(), p256)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func (r recipe) sans(t testing.TB) (pkix.Extension, bool) {
	t.Helper()
	names := r.names
	for _, v := range r.uris {
		names = append(names, altName{tagURI, v})
	}
	for _, v := range r.emails {
		names = append(names, altName{tagEmail, v})
	}
	for _, v := range r.dns {
		names = append(names, altName{2, v})
	}
	if len(names) == 0 {
		return pkix.Extension{}, false
	}
	var list []asn1.RawValue
	for _, n := range names {
		list = append(list, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: n.tag, Bytes: []byte(n.value)})
	}
	value, err := asn1.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: oidSubjectAltName, Value: value}, true
}

var p256 = func() *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return k
}()

func newKey[K crypto.Signer](k K, err error) crypto.Signer {
	if err != nil {
		panic(err)
	}
	return k
}

func ed25519Key() crypto.Signer {
	_, k, err := ed25519.GenerateKey(rand.Reader)
	return newKey(k, err)
}

const alice = "qkd://sae.lab.test/alice"

func TestJudge(t *testing.T) {
	good := recipe{uris: []string{alice}, subject: cn("alice")}
	with := func(edit func(*recipe)) recipe {
		r := good
		edit(&r)
		return r
	}
	uri := func(s string) recipe { return recipe{uris: []string{s}, subject: cn("alice")} }
	kme := func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	foreign := pkix.RDNSequence{
		rdnOf(oidC, "AT"),
		{{Type: oidOU, Value: "SAE"}, {Type: oidO, Value: "Foreign"}},
		rdnOf(oidCN, "Alice, Ltd"),
	}
	tests := []struct {
		name string
		pool string // "sae" if empty
		cert recipe
		want string // role/id by rule, or the reason of the denial
	}{
		{"good", "", good, "sae/alice by sae-uri"},
		{"DNS SANs beside", "", with(func(r *recipe) { r.dns = []string{"host.lab.test"} }), "sae/alice by sae-uri"},
		{"e-mail rule", "", recipe{emails: []string{"alice@qutemail.example"}, subject: cn("whoever")}, "sae/alice@qutemail.example by sae-mail"},
		{"DN rule", "", recipe{subject: foreign}, "sae/Firma Älice by sae-dn"},
		{"KME", "kme", recipe{uris: []string{"qkd://kme.lab.test/km1"}, subject: cn("km1"), edit: kme}, "kme/km1 by kme-uri"},
		{"fixed URI", "operator", recipe{uris: []string{"qkd://operator.lab.test/root"}, subject: cn("root")}, "operator/root by op-root"},
		{"P-384", "", with(func(r *recipe) { r.key = newKey(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)) }), "sae/alice by sae-uri"},
		{"Ed25519", "", with(func(r *recipe) { r.key = ed25519Key() }), "sae/alice by sae-uri"},

		// The role extension: right, if it is there; testRequirements do not ask for it.
		{"role", "", with(func(r *recipe) { r.edit = says(RoleExtension(RoleSAE)) }), "sae/alice by sae-uri"},
		{"another role", "", with(func(r *recipe) { r.edit = says(RoleExtension(RoleKME)) }), BadRole},
		{"role and more", "", with(func(r *recipe) { r.edit = saysDER(append(RoleExtension(RoleSAE).Value, 0)) }), BadRole},
		{"two roles", "", with(func(r *recipe) {
			r.edit = saysDER(attributes(t, directoryAttribute{oidRole, roles(RoleSAE, RoleOperator)}))
		}), BadRole},
		{"two role attributes", "", with(func(r *recipe) {
			r.edit = saysDER(attributes(t, directoryAttribute{oidRole, roles(RoleSAE)}, directoryAttribute{oidRole, roles(RoleSAE)}))
		}), BadRole},
		{"role of no syntax", "", with(func(r *recipe) {
			r.edit = saysDER(attributes(t, directoryAttribute{oidRole, []asn1.RawValue{{FullBytes: []byte("\x0c\x03sae")}}}))
		}), BadRole},
		{"role and a birthplace", "", with(func(r *recipe) {
			r.edit = saysDER(attributes(t, directoryAttribute{oidO, roles(RoleKME)}, directoryAttribute{oidRole, roles(RoleSAE)}))
		}), "sae/alice by sae-uri"},
		{"no role attribute", "", with(func(r *recipe) { r.edit = saysDER(attributes(t, directoryAttribute{oidO, roles(RoleKME)})) }), "sae/alice by sae-uri"},
		{"no attributes", "", with(func(r *recipe) { r.edit = saysDER(nil) }), BadRole},

		// Rules.
		{"no names", "", recipe{subject: cn("alice")}, NoRule},
		{"no such pool", "nobody", good, NoRule},
		{"another role's door", "operator", good, NoRule},
		{"operator's URI at the SAE door", "", recipe{uris: []string{"qkd://operator.lab.test/alice"}, subject: cn("alice")}, NoRule},
		{"another domain", "", uri("qkd://sae.evil.test/alice"), NoRule},
		{"two rules", "", with(func(r *recipe) { r.emails = []string{"alice@qutemail.example"} }), Ambiguous},
		{"two URIs", "", with(func(r *recipe) { r.uris = append(r.uris, "qkd://sae.lab.test/bob") }), Ambiguous},
		{"the same URI twice", "", with(func(r *recipe) { r.uris = append(r.uris, alice) }), Ambiguous},
		{"two e-mails", "", recipe{emails: []string{"x@y", "alice@qutemail.example"}, subject: cn("a")}, Ambiguous},
		{"unknown principal", "", recipe{uris: []string{"qkd://sae.lab.test/dave"}, subject: cn("dave")}, UnknownPrincipal},
		{"disabled principal", "", recipe{uris: []string{"qkd://sae.lab.test/bob"}, subject: cn("bob")}, Disabled},

		// Spellings of the URI that crypto/x509 would let pass as alice.
		{"escape", "", uri("qkd://sae.lab.test/%61lice"), BadID},
		{"scheme in capitals", "", uri("QKD://sae.lab.test/alice"), NoRule},
		{"host in capitals", "", uri("qkd://sae.LAB.test/alice"), NoRule},
		{"user", "", uri("qkd://u@sae.lab.test/alice"), NoRule},
		{"port", "", uri("qkd://sae.lab.test:99/alice"), NoRule},
		{"empty port", "", uri("qkd://sae.lab.test:/alice"), NoRule},
		{"query", "", uri(alice + "?x"), BadID},
		{"fragment", "", uri(alice + "#x"), BadID},
		{"trailing slash", "", uri(alice + "/"), BadID},
		{"two slashes", "", uri("qkd://sae.lab.test//alice"), BadID},
		{"dots", "", uri("qkd://sae.lab.test/x/../alice"), BadID},
		{"only dots", "", recipe{uris: []string{"qkd://sae.lab.test/.."}, subject: cn("..")}, BadID},
		{"empty ID", "", uri("qkd://sae.lab.test/"), BadID},
		{"ID in capitals", "", recipe{uris: []string{"qkd://sae.lab.test/Alice"}, subject: cn("Alice")}, BadID},
		{"long ID", "", uri("qkd://sae.lab.test/" + strings.Repeat("a", 65)), BadID},
		{"opaque", "", uri("qkd:sae/alice"), NoRule},
		{"urn", "", uri("urn:qkd:sae:alice"), NoRule},
		{"e-mail in another case", "", recipe{emails: []string{"Alice@qutemail.example"}, subject: cn("a")}, NoRule},

		// The CN beside a URI.
		{"another CN", "", with(func(r *recipe) { r.subject = cn("bob") }), CNMismatch},
		{"no CN", "", with(func(r *recipe) { r.subject = cn() }), CNMismatch},
		{"two CNs, the last is right", "", with(func(r *recipe) { r.subject = cn("bob", "alice") }), CNMismatch},
		{"CN with NUL", "", with(func(r *recipe) { r.subject = cn("alice\x00") }), CNMismatch},
		{"CN with trailing blank", "", with(func(r *recipe) { r.subject = cn("alice ") }), CNMismatch},
		{"CN with Cyrillic a", "", with(func(r *recipe) { r.subject = cn("аlice") }), CNMismatch},
		{"CN that looks like two RDNs", "", with(func(r *recipe) { r.subject = cn("alice,OU=KME") }), CNMismatch},
		{"CN in a Teletex string", "", with(func(r *recipe) {
			r.subject = pkix.RDNSequence{rdnOf(oidCN, asn1.RawValue{Tag: asn1.TagT61String, Bytes: []byte("alice")})}
		}), BadNames},

		// The whole subject.
		{"DN in another order", "", recipe{subject: pkix.RDNSequence{foreign[2], foreign[1], foreign[0]}}, NoRule},
		{"DN with more", "", recipe{subject: append(pkix.RDNSequence{rdnOf(oidO, "x")}, foreign...)}, NoRule},
		{"DN with less", "", recipe{subject: foreign[:2]}, NoRule},
		{"DN split otherwise", "", recipe{subject: pkix.RDNSequence{foreign[0], rdnOf(oidOU, "SAE"), rdnOf(oidO, "Foreign"), foreign[2]}}, NoRule},

		// What Go's verifier lets pass in a client's leaf.
		{"CA", "", with(func(r *recipe) {
			r.edit = func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }
		}), NotLeaf},
		{"certSign", "", with(func(r *recipe) {
			r.edit = func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }
		}), NotLeaf},
		{"no key usage", "", with(func(r *recipe) { r.edit = func(c *x509.Certificate) { c.KeyUsage = 0 } }), BadKeyUsage},
		{"more key usage", "", with(func(r *recipe) {
			r.edit = func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyEncipherment }
		}), BadKeyUsage},
		{"no EKU", "", with(func(r *recipe) { r.edit = func(c *x509.Certificate) { c.ExtKeyUsage = nil } }), BadEKU},
		{"any EKU", "", with(func(r *recipe) {
			r.edit = func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }
		}), BadEKU},
		{"a server's EKU", "", with(func(r *recipe) { r.edit = kme }), BadEKU},
		{"unknown EKU beside", "", with(func(r *recipe) {
			r.edit = func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} }
		}), BadEKU},
		{"KME without serverAuth", "kme", recipe{uris: []string{"qkd://kme.lab.test/km1"}, subject: cn("km1")}, BadEKU},
		{"RSA", "", with(func(r *recipe) { r.key = newKey(rsa.GenerateKey(rand.Reader, 2048)) }), BadKeyType},
		{"P-521", "", with(func(r *recipe) { r.key = newKey(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)) }), BadKeyType},
		{"a year long", "", with(func(r *recipe) {
			r.edit = func(c *x509.Certificate) { c.NotAfter = now.AddDate(1, 0, 0) }
		}), BadLifetime},
		{"ended", "", with(func(r *recipe) {
			r.edit = func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now.Add(-time.Hour), now.Add(-time.Second) }
		}), Expired},
		{"not begun", "", with(func(r *recipe) {
			r.edit = func(c *x509.Certificate) { c.NotBefore = now.Add(time.Second) }
		}), NotYetValid},
	}
	m := testMap(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.pool == "" {
				tt.pool = "sae"
			}
			leaf := tt.cert.make(t)
			for _, again := range []string{"fresh", "remembered"} {
				c, err := m.Judge(tt.pool, leaf, now)
				got := string(c.Role()) + "/" + c.ID() + " by " + c.Rule()
				if err != nil {
					if got != "/ by " {
						t.Errorf("%s: refused caller is %q, want nobody", again, got)
					}
					var d *Denial
					if !errors.As(err, &d) {
						t.Fatalf("%s: error %v is no Denial", again, err)
					}
					got = d.Reason
				}
				if got != tt.want {
					t.Errorf("%s: Judge: got %q (%v), want %q", again, got, err, tt.want)
				}
				subject := "" // of whom a rule has named it says nothing that the ID does not
				if err != nil {
					subject = named(leaf)
				}
				want := Certificate{Subject: subject, Serial: "4711", Issuer: "abcd", Fingerprint: c.Certificate().Fingerprint, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}
				if diff := cmp.Diff(want, c.Certificate()); diff != "" || len(want.Fingerprint) != 64 {
					t.Errorf("%s: facts of the certificate (-want +got):\n%s", again, diff)
				}
			}
		})
	}
}

// directoryAttribute is one of the subjectDirectoryAttributes.
type directoryAttribute struct {
	Type   asn1.ObjectIdentifier
	Values []asn1.RawValue `asn1:"set"`
}

func attributes(t *testing.T, list ...directoryAttribute) []byte {
	t.Helper()
	der, err := asn1.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// roles are values of the attribute role.
func roles(rs ...Role) (values []asn1.RawValue) {
	for _, r := range rs {
		values = append(values, asn1.RawValue{FullBytes: roleSyntax(r)})
	}
	return values
}

func saysDER(value []byte) func(*x509.Certificate) {
	return says(pkix.Extension{Id: oidSubjectDirectoryAttributes, Value: value})
}

// says gives a certificate an extension.
func says(x pkix.Extension) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.ExtraExtensions = append(c.ExtraExtensions, x) }
}

// TestRoleRequired: where the role extension is required, a certificate without it names
// nobody, whatever rule would name it.
func TestRoleRequired(t *testing.T) {
	req := testRequirements()
	req.Role = true
	m, err := NewMap(testRules(), req, map[string]Principal{"sae/alice": {Enabled: true}, "sae/alice@qutemail.example": {Enabled: true}})
	if err != nil {
		t.Fatal(err)
	}
	byURI := recipe{uris: []string{alice}, subject: cn("alice")}
	byMail := recipe{emails: []string{"alice@qutemail.example"}, subject: cn("whoever")}
	for _, r := range []recipe{byURI, byMail} {
		_, err := m.Judge("sae", r.make(t), now)
		if d := (*Denial)(nil); !errors.As(err, &d) || d.Reason != BadRole {
			t.Errorf("without the extension: %v, want %s", err, BadRole)
		}
		r.edit = says(RoleExtension(RoleSAE))
		if c, err := m.Judge("sae", r.make(t), now); err != nil || c.Role() != RoleSAE {
			t.Errorf("with it: %v, %v", c, err)
		}
	}
}

// A verdict is remembered, its end is not: a connection outlives its certificate.
func TestJudgeAgain(t *testing.T) {
	m := testMap(t)
	leaf := recipe{uris: []string{alice}, subject: cn("alice")}.make(t)
	if _, err := m.Judge("sae", leaf, leaf.NotAfter); err != nil {
		t.Errorf("Judge at NotAfter: %v", err)
	}
	if _, err := m.Judge("sae", leaf, leaf.NotAfter.Add(time.Second)); err == nil {
		t.Error("Judge after NotAfter: no error")
	}
	if c, err := m.Judge("sae", nil, now); err == nil || c != (Caller{}) {
		t.Errorf("Judge without a certificate: got %v, %v", c, err)
	}
}

// What a stranger calls itself is kept, as far as that is not made to fill the log.
func TestStrangerIsNamed(t *testing.T) {
	t.Parallel()
	leaf := recipe{uris: []string{alice, "spiffe://x/y"}, subject: cn("mallory")}.make(t)
	c := Stranger(leaf)
	if got := c.Certificate().Subject; got != "CN=mallory,OU=SAE, URI:"+alice+", URI:spiffe://x/y" {
		t.Errorf("a stranger is called %q", got)
	}
	leaf.DNSNames = []string{strings.Repeat("\u00e9", longestSubject)}
	if got := Stranger(leaf).Certificate().Subject; len(got) > longestSubject || !utf8.ValidString(got) {
		t.Errorf("a stranger is called %d bytes: %q", len(got), got)
	}
	if c = c.OnRoute("GET /x"); c.Route() != "GET /x" || c.WithRemote("r").Route() != "GET /x" {
		t.Errorf("its route is %q", c.Route())
	}
}

func TestCallerRoles(t *testing.T) {
	m := testMap(t)
	c, err := m.Judge("sae", recipe{uris: []string{alice}, subject: cn("alice")}.make(t), now)
	if err != nil {
		t.Fatal(err)
	}
	c = c.WithRemote("192.0.2.1:1")
	if sae, ok := c.SAE(); !ok || sae.String() != "alice" || c.Remote() != "192.0.2.1:1" {
		t.Errorf("SAE: got %v, %v", sae, ok)
	}
	if _, ok := c.KME(); ok {
		t.Error("an SAE is a KME")
	}
	if _, ok := c.Operator(); ok {
		t.Error("an SAE is an operator")
	}
	if _, ok := Stranger(nil).SAE(); ok {
		t.Error("a stranger is an SAE")
	}
}

func TestVerdictsAreBounded(t *testing.T) {
	m := testMap(t)
	leaf := recipe{uris: []string{alice}, subject: cn("alice")}.make(t)
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			other := *leaf
			for i := range maxVerdicts {
				other.Raw = append([]byte{byte(worker), byte(i), byte(i >> 8)}, leaf.Raw...)
				if _, err := m.Judge("sae", &other, now); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := len(m.pools["sae"].verdicts); n > maxVerdicts {
		t.Errorf("%d verdicts are kept, want at most %d", n, maxVerdicts)
	}
}

func BenchmarkJudge(b *testing.B) {
	m := testMap(b)
	leaf := recipe{uris: []string{alice}, subject: cn("alice")}.make(b)
	b.Run("remembered", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := m.Judge("sae", leaf, now); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("fresh", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, d := m.pools["sae"].judge(leaf, m); d != nil {
				b.Fatal(d)
			}
		}
	})
}

// TestGateway: a gateway is no SAE; it becomes one of those that its row lists, and
// the record keeps both names.
func TestGateway(t *testing.T) {
	t.Parallel()
	bob, carol := SAE{"bob"}, SAE{"carol"}
	m, err := NewMap(testRules(), testRequirements(), map[string]Principal{
		"sae/alice": {Enabled: true, GatewayFor: []SAE{bob}}, "operator/root": {Enabled: true, Duties: []Duty{Auditor}},
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := m.Judge("sae", recipe{uris: []string{alice}, subject: cn("alice")}.make(t), now)
	if _, isSAE := c.SAE(); err != nil || isSAE || c.Role() != RoleGateway || c.Gateway() != "" {
		t.Errorf("a gateway: got %+v, %v", c, err)
	}
	acting, ok := c.For(bob)
	if got, isSAE := acting.SAE(); !ok || !isSAE || got != bob || acting.Gateway() != "alice" || acting.Certificate() != c.Certificate() {
		t.Errorf("for bob: got %+v, %t", acting, ok)
	}
	if got, ok := c.For(carol); ok || got.Role() != RoleNone {
		t.Errorf("for carol: got %+v, %t", got, ok)
	}
	if got, ok := acting.For(bob); ok || got.Role() != RoleNone {
		t.Errorf("bob for himself: got %+v, %t", got, ok)
	}
	if got, ok := (Caller{}).For(bob); ok || got.Role() != RoleNone {
		t.Errorf("nobody for bob: got %+v, %t", got, ok)
	}
	root, err := m.Judge("operator", recipe{uris: []string{"qkd://operator.lab.test/root"}, subject: cn("root")}.make(t), now)
	if err != nil || !root.Has(Viewer) || !root.Has(Auditor) || root.Has(Operating) || root.Has(SecurityOfficer) {
		t.Errorf("root: got %+v, %v", root, err)
	}
	if c.Has(Viewer) || (Caller{}).Has(Viewer) {
		t.Error("who is no operator has no duty")
	}
}

// TestRoleExtension: the bytes that our CAs write are those of the standards' syntax.
func TestRoleExtension(t *testing.T) {
	got := RoleExtension(RoleSAE)
	want := attributes(t, directoryAttribute{oidRole, roles(RoleSAE)})
	if got.Id.String() != "2.5.29.9" || got.Critical || !bytes.Equal(got.Value, want) {
		t.Errorf("%v %v %x, want 2.5.29.9 false %x", got.Id, got.Critical, got.Value, want)
	}
	if got, want := hex.EncodeToString(roleSyntax(RoleSAE)), "300ba1098607"+hex.EncodeToString([]byte("qkd:sae")); got != want {
		t.Errorf("the value: %s, want %s", got, want)
	}
}
