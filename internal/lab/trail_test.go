package lab

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
)

// TestTrail is the audit log as its readers have it: of requests that went well and
// such as did not, over a kill of each daemon and of a database, every answer has one
// event; an auditor verifies all of it with kmectl and public keys, each site has
// witnessed the other, and what a superuser changes is found and named.
func TestTrail(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.PoolLimit = 4096, 8192 })
	keysStored(t, l, 2048)
	var told answers
	for range 2 {
		mixedRequests(t, l, &told)
		l.KM1.Nodes[0].Kill()
		l.KM2.Nodes[0].Kill()
		if err := l.KM2.KillDatabase(); err != nil {
			t.Fatal(err)
		}
		<-l.KM1.Nodes[0].Exited()
		<-l.KM2.Nodes[0].Exited()
		if err := l.KM2.StartDatabase(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, n := range []*Node{l.KM1.Nodes[0], l.KM2.Nodes[0]} {
			if err := n.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		keysStored(t, l, 512)
	}
	mixedRequests(t, l, &told)
	told.compare(t, l)

	keys := make(map[string]string) // by site
	for _, s := range []*Site{l.KM1, l.KM2} {
		eventually(t, "a cosigned checkpoint of "+s.Name, func(ctx context.Context) error {
			trail, err := operator(t, s).Trail(ctx)
			if err != nil {
				return err
			}
			if len(trail.Logs) != 1 || !strings.Contains(trail.Logs[0].Checkpoint, "/witness ") {
				return errors.New("no checkpoint is cosigned")
			}
			keys[s.Name] = trail.Logs[0].Key
			return nil
		})
	}
	bundle := filepath.Join(t.TempDir(), "km1.bundle")
	proof := filepath.Join(t.TempDir(), "leaf7.proof")
	for _, c := range []struct {
		args string
		want string
	}{
		{"audit verify --vkey " + keys["km1"] + " --also " + l.KM2.Nodes[0].OperatorURL(), "verified: leaves 0 to "},
		{"--kme " + l.KM2.Nodes[0].OperatorURL() + " audit verify --vkey " + keys["km2"], "verified: leaves 0 to "},
		{"audit export " + bundle, ""},
		{"audit verify --offline " + bundle + " --vkey " + keys["km1"], "verified: leaves 0 to "},
		{"audit prove 7 --out " + proof, ""},
		{"audit check " + proof + " --vkey " + keys["km1"], `"node":"km1-a"`},
		{"audit show 0 --vkey " + keys["km1"], `"action":"start"`},
		{"audit search --action enc_keys --sae bob --limit 3", "enc_keys by sae alice with bob"},
		{"audit log", keys["km1"]},
		{"audit reconcile " + l.KM1.Nodes[0].OperatorURL() + " " + l.KM2.Nodes[0].OperatorURL(), "agree"},
	} {
		if out, err := kmectl(t, l, c.args); err != nil || !strings.Contains(out, c.want) {
			t.Errorf("kmectl %s: %v\n%s", c.args, err, out)
		}
	}
	if out, err := kmectl(t, l, "audit check "+proof+" --vkey "+keys["km2"]); err == nil {
		t.Errorf("a proof holds with the key of another log:\n%s", out)
	}
	if out, err := kmectl(t, l, "--as olga audit log"); err == nil {
		t.Errorf("an operator without the duty reads the audit log:\n%s", out)
	}

	conn, err := pgx.Connect(t.Context(), l.KM1.DSN(pgdev.Superuser))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	swap := func(from, to string) {
		if _, err := conn.Exec(t.Context(), "UPDATE kme.audit SET body = replace(body, $1, $2) WHERE node = 'km1-a' AND seq = 7", from, to); err != nil {
			t.Fatal(err)
		}
	}
	swap(`"node":"km1-a"`, `"node":"km1-b"`)
	out, err := kmectl(t, l, "audit verify --vkey "+keys["km1"])
	if err == nil || !strings.Contains(out, "event 7 of node km1-a") {
		t.Errorf("an event was changed, and kmectl audit verify says: %v\n%s", err, out)
	}
	swap(`"node":"km1-b"`, `"node":"km1-a"`)
}

// kmectl runs the binary as the operator root of KM1.
func kmectl(t *testing.T, l *Lab, args string) (string, error) {
	t.Helper()
	all := []string{"--profiles", l.Dir}
	if !strings.HasPrefix(args, "--as ") {
		all = append(all, "--as", "root")
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(l.Bin, "kmectl"), append(all, strings.Fields(args)...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// answers are what clients were told.
type answers struct {
	served, taken map[key.ID]bool
	refused       int // 400 and 401, each told to somebody
}

// mixedRequests are asks and takes of several clients at once, of which some are refused.
func mixedRequests(t *testing.T, l *Lab, told *answers) {
	t.Helper()
	const clients, rounds = 4, 25
	if told.served == nil {
		told.served, told.taken = make(map[key.ID]bool), make(map[key.ID]bool)
	}
	results := make(chan func(*answers), clients*rounds*4)
	g, ctx := errgroup.WithContext(t.Context())
	for range clients {
		alice, bob, carol := sae(t, l, "alice"), sae(t, l, "bob"), sae(t, l, "carol")
		g.Go(func() error {
			for range rounds {
				got, err := alice.Client.EncKeys(ctx, bob.ID, etsi014.KeyRequest{Number: 2})
				if err != nil {
					return err
				}
				a, b := got.Keys[0].ID, got.Keys[1].ID
				results <- func(r *answers) { r.served[a], r.served[b] = true, true }
				if _, err := carol.Client.DecKeys(ctx, alice.ID, []key.ID{a}); err != nil {
					results <- func(r *answers) { r.refused++ }
				}
				if _, err := bob.Client.DecKeys(ctx, alice.ID, []key.ID{a}); err != nil {
					return err
				}
				results <- func(r *answers) { r.taken[a] = true }
				if _, err := bob.Client.DecKeys(ctx, alice.ID, []key.ID{a}); err != nil {
					results <- func(r *answers) { r.refused++ }
				}
			}
			return nil
		})
	}
	err := g.Wait()
	close(results)
	for add := range results {
		add(told)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// compare holds what clients were told against the events.
func (r *answers) compare(t *testing.T, l *Lab) {
	t.Helper()
	served, taken := make(map[key.ID]int), make(map[key.ID]int)
	requests := make(map[string]int)
	refused := 0
	for _, s := range []*Site{l.KM1, l.KM2} {
		e, err := s.gather(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, ev := range e.events {
			outcome := audit.Event{Action: audit.Action(ev.Action), Request: ev.Request}
			if outcome.IsOutcome() {
				requests[ev.Request]++
			}
			switch {
			case ev.Action == encKeys && ev.Outcome == "done":
				for _, id := range ev.Keys {
					served[id]++
				}
			case ev.Action == decKeys && ev.Outcome == "done":
				for _, id := range ev.Keys {
					taken[id]++
				}
			case ev.Action == decKeys && ev.Outcome == "refused":
				refused++
			}
		}
	}
	for id := range r.served {
		if served[id] != 1 {
			t.Errorf("key %s was given to its master and has %d events", id, served[id])
		}
	}
	for id := range r.taken {
		if taken[id] != 1 {
			t.Errorf("key %s was taken and has %d events", id, taken[id])
		}
	}
	if len(served) != len(r.served) || len(taken) != len(r.taken) || refused != r.refused {
		t.Errorf("clients were told of %d keys given, %d taken, %d refusals; the events are of %d, %d and %d",
			len(r.served), len(r.taken), r.refused, len(served), len(taken), refused)
	}
	for request, n := range requests {
		if n != 1 {
			t.Errorf("request %s has %d outcomes", request, n)
		}
	}
}
