package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
)

// I9: a site whose database is restored to the past serves nothing, and says why,
// whichever witness is left to tell; the other site leaves it alone; and after
// kmed recover --burn both serve again, and nothing that any client was ever
// given is given to anybody a second time.
func TestRestored(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.Interval, c.PoolLimit = 512, 200*time.Millisecond, 4096 })
	keysStored(t, l, 1000)
	f := begin(t, l)
	for _, test := range []struct {
		name     string
		site     *Site
		peer     *Site
		forget   []string // files of the node that are lost too
		alone    bool     // the peer is not there to tell
		evidence string   // part of why
	}{
		{"km1, by its files", l.KM1, l.KM2, nil, true, "behind the witness file"},
		{"km2, by its token", l.KM2, l.KM1, []string{"witness", "run"}, true, "behind the token"},
		{"km1, by its peer", l.KM1, l.KM2, []string{"witness", "run", "token"}, false, "behind what km2 knows"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := test.site
			f.flows(t)
			f.pause(t, func() { s.backUp(t) })
			if err := s.Node.Stop(); err != nil { // so that the token has seen a run that the copy has not
				t.Fatal(err)
			}
			if err := s.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			f.flows(t)
			f.pause(t, func() {
				s.Kill()
				f.forgets(s)
				s.restore(t, test.forget)
			})
			if test.alone {
				if err := test.peer.Stop(); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			suspended(t, s, test.evidence)
			if test.alone {
				if err := test.peer.Restart(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			untilAlarm(t, test.peer, "restored-"+s.Name, true)
			has := s.holdings(t)
			f.refused(t)
			if now := s.holdings(t); now != has {
				t.Errorf("while it was suspended %s went from %s to %s", s.Name, has, now)
			}

			if said, err := s.Recover(t.Context(), "--burn"); err == nil || !strings.Contains(said, "another kmed runs") {
				t.Errorf("a recovery beside the node: %v\n%s", err, said)
			}
			if err := s.Node.Stop(); err != nil {
				t.Fatal(err)
			}
			if said, err := s.Recover(t.Context()); err == nil || !strings.Contains(said, "--burn") || s.holdings(t) != has {
				t.Errorf("a recovery that is not to burn: %v\n%s", err, said)
			}
			said, err := s.Recover(t.Context(), "--burn")
			if err != nil {
				t.Fatalf("recovering: %v\n%s", err, said)
			}
			t.Log(said)
			if now := s.holdings(t); now != "0 atoms, 0 keys waiting" {
				t.Errorf("after the recovery %s has %s", s.Name, now)
			}
			if err := s.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, site := range []*Site{s, test.peer} {
				untilAlarm(t, site, "restored", false)
				untilAlarm(t, site, "restored-"+s.Name, false)
			}
			wantFollows(t, s, test.peer)
			f.agree(t)
			well(t, f)
			f.again(t, s)
		})
		if t.Failed() {
			break
		}
	}
	f.close(t)
}

// A database that is set back under running nodes ends them, or has them suspended if
// they have nothing to commit; the next ones are suspended. The recovery is for when
// all of them have ended; it may be killed anywhere, and run again.
func TestRestoredInUse(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Nodes, c.Filler, c.Interval, c.PoolLimit = 2, 512, 200*time.Millisecond, 4096 })
	keysStored(t, l, 1000)
	f := begin(t, l)
	s := l.KM1
	idle := s.Nodes[1]
	f.flows(t)
	var had int64
	f.pause(t, func() {
		s.backUp(t)
		had = s.Node.commits(t)
	})
	eventually(t, s.Node.Name+" to have something to lose", func(context.Context) error {
		f.flows(t)
		if has := s.Node.commits(t); has <= had {
			return fmt.Errorf("it stands at commit %d, as in the backup", has)
		}
		return nil
	})
	s.withoutDatabase(t, func(data string) {
		f.pause(t, func() { f.forgets(s) })
		copyFolder(t, data+".copy", data)
	}) // and the clients ask on
	select {
	case <-s.Exited():
	case <-time.After(time.Minute):
		t.Fatalf("%s still runs on a database that was set back", s.Name)
	}
	if words := s.kmed.lastWords(); !strings.Contains(words, "the database was set back while it was in use") {
		t.Errorf("its last words:\n%s", words)
	}
	op, err := l.Operator("root", idle.Name)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, idle.Name+" to serve no more", func(ctx context.Context) error {
		if !idle.Running() {
			return nil
		}
		n, err := op.Node(ctx)
		if err == nil && n.Suspended == "" {
			err = errors.New("it is not suspended")
		}
		return err
	})
	// What was only suspended may end yet, when it meets the database: the next process stays.
	if err := errors.Join(idle.Stop(), idle.Restart(t.Context())); err != nil {
		t.Fatal(err)
	}
	if said, err := s.Recover(t.Context(), "--burn"); err == nil || !strings.Contains(said, idle.Name+" is connected to the database: stop all nodes") {
		t.Errorf("a recovery beside the other node: %v\n%s", err, said)
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	suspended(t, s, "the database ") // was set back, or is behind what the peer knows: whoever was first
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	var said string
	for patience := 300 * time.Millisecond; ; patience += 200 * time.Millisecond { // each attempt comes a little further
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		var err error
		said, err = s.Recover(ctx, "--burn")
		cancel()
		if err == nil {
			break
		}
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.Exited() {
			t.Fatalf("recovering: %v\n%s", err, said)
		}
		t.Logf("killed after %v", patience)
	}
	t.Log(said)
	for _, n := range s.Nodes {
		if err := n.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	f.agree(t)
	well(t, f)
	f.again(t, s)
	f.close(t)
}

// agree returns when keys flow on every route and neither site is asked any more for
// atoms that it has forgotten: what the other one's nodes had leased has to go first.
func (f *traffic) agree(t *testing.T) {
	t.Helper()
	eventually(t, "the sites to agree again", func(context.Context) error {
		f.recovered = time.Now()
		f.flows(t)
		for _, s := range []*Site{f.lab.KM1, f.lab.KM2} {
			if n := recorded(t, s, `e->>'action' = 'assign' AND e->>'outcome' = 'refused' AND (e->>'at')::timestamptz >= $1`, f.recovered); n > 0 {
				return fmt.Errorf("%s has refused %d announces", s.Name, n)
			}
		}
		return nil
	})
}

// again has the slaves of a site that was recovered ask once more for every key that
// they were ever to take there before, taken or not: none may be handed out.
func (f *traffic) again(t *testing.T, s *Site) {
	t.Helper()
	asked := 0
	f.mu.Lock()
	routes := make(map[key.ID]*route)
	for id := range f.since[s] {
		if len(routes) < 300 && f.keys[id].route.from == s {
			routes[id] = f.keys[id].route
		}
	}
	f.mu.Unlock()
	for id, r := range routes {
		asked++
		got, err := r.slave.Client.DecKeys(t.Context(), r.master.ID, []key.ID{id})
		if answer := (*etsi014.APIError)(nil); !errors.As(err, &answer) || answer.Status != http.StatusBadRequest {
			t.Errorf("%v: key %s is handed out after the recovery: %d keys, %v", r, id, len(got.Keys), err)
		}
		got.Wipe()
	}
	if asked == 0 {
		t.Error("there was nothing to ask for again")
	}
}

// pause has the clients rest while do is done.
func (f *traffic) pause(t *testing.T, do func()) {
	t.Helper()
	f.rest.Lock()
	defer f.rest.Unlock()
	do()
}

// forgets enters that the site is restored: of what it has done so far it may have
// forgotten anything, and the keys that wait at it will never be taken.
func (f *traffic) forgets(s *Site) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.since == nil {
		f.since = make(map[*Site]map[key.ID]bool)
	}
	f.since[s] = make(map[key.ID]bool)
	f.notes.forget(s)
	for id, a := range f.keys {
		f.since[s][id] = true
		a.burned = a.burned || a.route.from == s && !a.taken
	}
}

// refused returns when requests on every route were answered otherwise than with
// keys since it was called, and none with keys.
func (f *traffic) refused(t *testing.T) {
	t.Helper()
	type count struct{ served, taken, unserved int64 }
	before := make(map[*route]count)
	for _, r := range f.routes {
		before[r] = count{r.served.Load(), r.taken.Load(), r.unserved.Load()}
	}
	eventually(t, "refusals on every route", func(context.Context) error {
		for _, r := range f.routes {
			if r.unserved.Load() < before[r].unserved+10 {
				return fmt.Errorf("%v: %d", r, r.unserved.Load()-before[r].unserved)
			}
		}
		return nil
	})
	for _, r := range f.routes {
		if n := r.served.Load() - before[r].served; n > 0 {
			t.Errorf("%v: %d requests were served while one site was suspended", r, n)
		}
	}
}

// suspended sees that the site says why it serves nothing, and that it does not.
func suspended(t *testing.T, s *Site, evidence string) {
	t.Helper()
	untilAlarm(t, s, "restored", true)
	n := node(t, s)
	if !strings.Contains(n.Suspended, evidence) {
		t.Errorf("%s is suspended because %q, want %q", s.Name, n.Suspended, evidence)
	}
	if n.OK() || operator(t, s).Ready(t.Context()) == nil {
		t.Errorf("%s is suspended, and says that it is well", s.Name)
	}
	me, other := sae(t, s.lab, "alice"), sae(t, s.lab, "bob")
	if s == s.lab.KM2 {
		me, other = other, me
	}
	wantAway(t, "enc_keys at a suspended site", enc(t.Context(), me, other))
	_, err := me.Client.DecKeys(t.Context(), other.ID, []key.ID{key.NewLocalID(time.Now())})
	wantAway(t, "dec_keys at a suspended site", err)
}

// wantFollows sees that the site's new log names what the peer had last seen of those
// before it.
func wantFollows(t *testing.T, s, peer *Site) {
	t.Helper()
	one := func(s *Site, sql string, args ...any) (found []string) {
		conn, done, err := s.super(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		rows, _ := conn.Query(t.Context(), sql, args...)
		if found, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			t.Fatal(err)
		}
		return found
	}
	follows := one(s, "SELECT json_array_elements_text(body::json->'follows') FROM kme.audit WHERE body::json->>'action' = 'recover' AND (body::json->>'count')::bigint = (SELECT origin FROM kme.settings)")
	seen := one(peer, "SELECT note FROM kme.audit_witnessed WHERE kme = $1 AND log NOT LIKE '%/' || $2", s.Name,
		one(s, "SELECT origin::text FROM kme.settings")[0])
	slices.Sort(follows)
	slices.Sort(seen)
	if len(seen) == 0 || !slices.Equal(follows, seen) {
		t.Errorf("the log that %s has begun follows %q, and %s had seen %q", s.Name, follows, peer.Name, seen)
	}
	// An auditor is told so by what is signed alone.
	eventually(t, "kmectl audit verify of the log that "+s.Name+" has begun", func(context.Context) error {
		out, err := kmectl(t, s.lab, "--kme "+s.OperatorURL()+" audit verify --also "+peer.OperatorURL())
		if err != nil || !strings.Contains(out, "verified: leaves 0 to ") || strings.Contains(out, "does not name") ||
			strings.Count(out, "it follows "+trustDomain+"/"+s.Name+"/audit/") != len(seen) {
			return fmt.Errorf("%w\n%s", cmp.Or(err, errors.New("it says")), out)
		}
		return nil
	})
}

// holdings is what the site's database holds.
func (s *Site) holdings(t *testing.T) string {
	t.Helper()
	conn, done, err := s.super(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	var atoms, due int
	err = conn.QueryRow(t.Context(), "SELECT (SELECT count(*) FROM kme.key), (SELECT count(*) FROM kme.due WHERE ct IS NOT NULL)").Scan(&atoms, &due)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d atoms, %d keys waiting", atoms, due)
}

// commits counts the node's commits, as its database does.
func (n *Node) commits(t *testing.T) (mark int64) {
	t.Helper()
	conn, done, err := n.site.super(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if err := conn.QueryRow(t.Context(), "SELECT mark FROM kme.node_run WHERE node = $1", n.Name).Scan(&mark); err != nil {
		t.Fatal(err)
	}
	return mark
}

// backUp copies the site's database, stopped for that, and its token.
func (s *Site) backUp(t *testing.T) {
	t.Helper()
	s.withoutDatabase(t, func(data string) {
		copyFolder(t, data, data+".copy")
		copyFolder(t, s.TokenDir(), s.TokenDir()+".copy")
	})
}

// restore puts the copy of the database back, and has the node lose files besides,
// or the token its memory of the run: it is as old as the database then.
func (s *Site) restore(t *testing.T, forget []string) {
	t.Helper()
	s.withoutDatabase(t, func(data string) { copyFolder(t, data+".copy", data) })
	for _, name := range forget {
		if name == "token" {
			copyFolder(t, s.TokenDir()+".copy", s.TokenDir())
		} else if err := os.Remove(s.Node.path("data", name)); err != nil {
			t.Fatal(err)
		}
	}
}

func (s *Site) withoutDatabase(t *testing.T, do func(data string)) {
	t.Helper()
	home, err := filepath.EvalSymlinks(s.path("postgres", "cluster"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.StopDatabase(); err != nil {
		t.Fatal(err)
	}
	do(filepath.Join(home, "data"))
	if err := s.StartDatabase(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func copyFolder(t *testing.T, from, to string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copying %s: %v: %s", from, err, out)
	}
}
