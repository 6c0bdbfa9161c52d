//go:build console

package lab

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/policies"
)

// TestConsole: the console in a browser, with a month of history behind it: each view
// and act, light and dark, by the keyboard, judged by axe-core. Screenshots go to
// KME_SCREENSHOTS.
func TestConsole(t *testing.T) {
	l := start(t, func(c *Config) {
		c.PoolLimit = 1_000_000 // a link that rests shows nothing new
		wantTwo(t, c.Dir, policies.ActEnableSAE)
	})
	keysStored(t, l, 100)
	conn, err := pgx.Connect(t.Context(), l.KM1.DSN("kme_app"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), `INSERT INTO kme.link_history SELECT $1, at, 60, (random() < 0.02)::int, 0.6 + 0.3 * random(), 9000000 + 1000000 * sin(extract(epoch FROM at) / 40000),
		10000 + 8000 * sin(extract(epoch FROM at) / 30000), 9000 + 5000 * sin(extract(epoch FROM at) / 20000)
		FROM generate_series(date_trunc('minute', now()) - interval '30 days', now() - interval '2 minutes', interval '1 minute') at ON CONFLICT DO NOTHING`, linkID); err != nil {
		t.Fatal(err)
	}
	shots := os.Getenv("KME_SCREENSHOTS")
	if shots == "" {
		shots = t.TempDir()
	}
	act, err := approval.NewAct(policies.ActEnableSAE, "carol")
	if err != nil {
		t.Fatal(err)
	}
	olga, err := l.Operator("olga", "km1")
	if err != nil {
		t.Fatal(err)
	}
	if err := olga.LeaveApproval(t.Context(), approved(t, l, "olga", act)); err != nil {
		t.Fatal(err)
	}
	own, err := json.Marshal(approved(t, l, "root", act))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "node", "console.mjs", l.KM1.Nodes[0].OperatorURL(), l.profileDir("operator", "root"), l.profileDir("sae", "alice"), shots, string(own))
	cmd.Dir = "testdata/console"
	out, err := cmd.CombinedOutput()
	if t.Logf("%s", out); err != nil {
		t.Fatal(err)
	}
}

// wantTwo puts policies into the folder of a lab to be that want two officers for an act.
func wantTwo(t *testing.T, dir, act string) {
	t.Helper()
	text, err := policies.Shipped.ReadFile("principals.yaml")
	if err == nil {
		err = os.MkdirAll(filepath.Join(dir, "policies"), 0o755)
	}
	if err == nil {
		text = bytes.Replace(text, []byte("two_officers: []"), []byte("two_officers: ["+act+"]"), 1)
		err = os.WriteFile(filepath.Join(dir, "policies", "principals.yaml"), text, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// approved is the word of an operator for an act at KM1, as kmectl approve prints it.
func approved(t *testing.T, l *Lab, operator string, act approval.Act) approval.Approval {
	t.Helper()
	dir := l.profileDir("operator", operator)
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	a, err := approval.Sign(act, "km1/"+l.KM1.Nodes[0].Name, time.Now().Add(30*time.Minute), pair.Leaf, pair.PrivateKey.(crypto.Signer))
	if err != nil {
		t.Fatal(err)
	}
	return a
}
