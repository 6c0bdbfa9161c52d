package lab

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/internal/audit"
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
	refused := refusedHandshakes(t, l.KM1)
	mixedRequests(t, l, &told)
	told.compare(t, l)
	openingsAddUp(t, l)
	handshakesAddUp(t, l.KM1, refused)

	keys, witness := make(map[string]string), "" // by site; of KM2
	for _, s := range []*Site{l.KM1, l.KM2} {
		eventually(t, "a cosigned checkpoint of "+s.Name, func(ctx context.Context) error {
			trail, err := operator(t, s).Trail(ctx)
			if err != nil {
				return err
			}
			if len(trail.Logs) != 1 || !strings.Contains(trail.Logs[0].Checkpoint, "/witness ") {
				return errors.New("no checkpoint is cosigned")
			}
			keys[s.Name], witness = trail.Logs[0].Key, trail.Witness
			return nil
		})
	}
	bundle := filepath.Join(t.TempDir(), "km1.bundle")
	proof := filepath.Join(t.TempDir(), "leaf7.proof")
	for _, c := range []struct {
		args string
		want string
	}{
		{"audit verify --vkey " + keys["km1"] + " --witness " + witness, ", signed by "},
		{"audit verify --vkey " + keys["km1"] + " --also " + l.KM2.Nodes[0].OperatorURL(), "verified: leaves 0 to "},
		{"--kme " + l.KM2.Nodes[0].OperatorURL() + " audit verify --vkey " + keys["km2"], "verified: leaves 0 to "},
		{"audit export " + bundle, ""},
		{"audit verify --offline " + bundle + " --vkey " + keys["km1"] + " --witness " + witness, "verified: leaves 0 to "},
		{"audit prove 7 --out " + proof, ""},
		{"audit check " + proof + " --vkey " + keys["km1"] + " --witness " + witness, `"node":"km1-a"`},
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

// metric are the values of a metric of a node, by its labels as they are written.
func metric(ctx context.Context, s *Site, name string) (map[string]int, error) {
	text, err := metricsOf(ctx, s.lab, s.Node)
	if err != nil {
		return nil, err
	}
	values := make(map[string]int)
	for _, m := range regexp.MustCompile(`(?m)^`+name+`\{(.*)\} ([0-9.e+]+)$`).FindAllStringSubmatch(text, -1) {
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return nil, err
		}
		values[m[1]] = int(v)
	}
	return values, nil
}

// sinceStart are the events of a site's first node in the run that it is in.
func sinceStart(ctx context.Context, s *Site) (list []audit.Event, err error) {
	conn, err := pgx.Connect(ctx, s.DSN(pgdev.Superuser))
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	rows, _ := conn.Query(ctx, "SELECT body FROM kme.audit JOIN kme.node_run r USING (node) WHERE node = $1 AND (body::json->>'run')::bigint = r.run", s.Node.Name)
	bodies, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	for _, body := range bodies {
		e, err := audit.ParseEvent([]byte(body))
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	return list, nil
}

// openingsAddUp: the HSM of each site has opened a blob for each key that the events say
// was handed out, assigned or taken, and hardly any other.
func openingsAddUp(t *testing.T, l *Lab) {
	t.Helper()
	const fruitless = 64 // for a request that came to nothing
	for _, s := range []*Site{l.KM1, l.KM2} {
		events, err := sinceStart(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		a := audit.NewAccount()
		for _, e := range events {
			a.Add(e)
		}
		calls, err := metric(t.Context(), s, "kme_hsm_calls_total")
		if err != nil {
			t.Fatal(err)
		}
		opened := calls[`call="unwrap",outcome="done"`]
		t.Logf("the HSM of %s has opened %d blobs, and the log tells of %d", s.Name, opened, a.Opened())
		if opened < a.Opened() || opened > a.Opened()+fruitless || a.Opened() == 0 {
			t.Errorf("the HSM of %s has opened %d blobs, and the log tells of %d", s.Name, opened, a.Opened())
		}
	}
}

// refusedHandshakes has a site's SAE door refuse handshakes, and says how many.
func refusedHandshakes(t *testing.T, s *Site) int {
	t.Helper()
	none := tlsOf(t, s.lab, "sae", "alice")
	none.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return new(tls.Certificate), nil }
	operator := tlsOf(t, s.lab, "operator", "root")
	n := 0
	for _, cfg := range []*tls.Config{none, none, operator, none, none} {
		if err := getStatus(s, cfg); err == nil {
			t.Error("a client without a certificate of an SAE was let in")
		}
		n++
	}
	return n
}

// handshakesAddUp: the summaries of refused handshakes, which are events like others, add
// up to what the doors of the node have counted since it started, by door and reason.
func handshakesAddUp(t *testing.T, s *Site, atLeast int) {
	t.Helper()
	eventually(t, "summaries of the refused handshakes", func(ctx context.Context) error {
		counted, err := metric(ctx, s, "kme_handshakes_refused_total")
		if err != nil {
			return err
		}
		events, err := sinceStart(ctx, s)
		if err != nil {
			return err
		}
		told, n := make(map[string]int), 0
		for _, e := range events {
			if e.Action == audit.Handshake {
				reason, _, _ := strings.Cut(e.Reason, ":")
				told[fmt.Sprintf("door=%q,reason=%q", e.Route, reason)] += e.Count
				n += e.Count
			}
		}
		if n < atLeast || !maps.Equal(told, counted) {
			return fmt.Errorf("%d were refused; the doors have counted %v, the events tell of %v", atLeast, counted, told)
		}
		return nil
	})
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
				got, err := patiently(ctx, alice, bob, 2)
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
