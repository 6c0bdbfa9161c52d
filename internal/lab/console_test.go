//go:build console

package lab

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// TestConsole: the console in a browser, with a month of history behind it: each view
// and act, light and dark, by the keyboard, judged by axe-core. Screenshots go to
// KME_SCREENSHOTS.
func TestConsole(t *testing.T) {
	l := start(t, func(c *Config) { c.PoolLimit = 1_000_000 }) // a link that rests shows nothing new
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
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "node", "console.mjs", l.KM1.Nodes[0].OperatorURL(), l.profileDir("operator", "root"), shots)
	cmd.Dir = "testdata/console"
	out, err := cmd.CombinedOutput()
	if t.Logf("%s", out); err != nil {
		t.Fatal(err)
	}
}
