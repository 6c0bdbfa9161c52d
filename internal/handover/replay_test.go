package handover_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/store"
)

// TestReplay plays histories of the model to real databases, one a site: every verb that
// the model commits is done by the store too, must come to the same, and after each
// transaction the tables must hold what the model holds. Each process of a history
// is a DB in its own run; one whose run is over must be fenced.
func TestReplay(t *testing.T) {
	dir, err := os.MkdirTemp("", "kme-replay-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cluster, err := pgdev.Start(t.Context(), pgdev.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(cluster.Kill(), cluster.Remove()); err != nil {
			t.Error(err)
		}
	})
	sites := [3]*tables{
		newTables(t, cluster, "a", handover.Alice, map[string]string{"l1": "b", "l2": "c"}),
		newTables(t, cluster, "b", handover.Bob, map[string]string{"l1": "a"}),
		newTables(t, cluster, "c", handover.Bob, map[string]string{"l2": "a"}),
	}
	histories, steps := 0, 0
	for start := time.Now(); time.Since(start) < handover.Effort(12*time.Second); histories++ {
		var played [3]handover.Tables
		for i, s := range sites {
			s.clear()
			played[i] = s
		}
		n, bad, diary := handover.Replay(uint64(histories)*37, played)
		for _, s := range sites {
			if s.bad != "" {
				bad += fmt.Sprintf("\nat site %s: %s", s.name, s.bad)
			}
		}
		if bad != "" {
			t.Fatalf("history %d: %s\n%s", histories, bad, strings.Join(diary, "\n"))
		}
		steps += n
	}
	t.Logf("%d histories, %d steps", histories, steps)
	for _, s := range sites {
		t.Logf("at site %s: %v", s.name, s.verbs)
	}
}

// The histories lie in the first hours of 1970, as the model's keys do.
const hour = time.Hour

func now() time.Time { return time.UnixMilli(0).Add(10 * time.Minute) }

// tables are one site's database. What is found wrong first is kept in bad.
type tables struct {
	t      *testing.T
	name   string // that the names of its nodes begin with
	cfg    store.Config
	end    handover.End
	links  map[string]string // name of the site at the other end
	tool   *store.DB         // for what needs no run
	super  *pgx.Conn
	runs   map[string]*store.DB // by node: that of its current run, or of the one before
	chunks map[key.ID]int64     // by atom, of those that were leased
	verbs  map[string]int
	bad    string
}

func newTables(t *testing.T, c *pgdev.Cluster, name string, end handover.End, links map[string]string) *tables {
	t.Helper()
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(c.EnsureDatabase(ctx, name))
	must(store.Migrate(ctx, c.DSN(pgdev.Superuser, name), hour, nil))
	s := &tables{t: t, name: name, end: end, links: links, runs: make(map[string]*store.DB), chunks: make(map[key.ID]int64), verbs: make(map[string]int)}
	var err error
	s.cfg = store.Config{DSN: c.DSN(store.AppRole, name), Node: "tool", EpochLength: hour, Now: now}
	s.cfg.Site = s.site(name)
	s.tool, err = store.Open(ctx, s.cfg)
	must(err)
	t.Cleanup(s.tool.Close)
	for e := range key.Epoch(2) {
		_, err := s.tool.EnsureEpoch(ctx, e)
		must(err)
	}
	s.super, err = pgx.Connect(ctx, c.DSN(pgdev.Superuser, name)+" search_path=kme")
	must(err)
	t.Cleanup(func() { _ = s.super.Close(context.Background()) })
	for _, sql := range []string{"ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()"} { // the cluster dies with the test
		_, err := s.super.Exec(ctx, sql)
		must(err)
	}
	t.Cleanup(s.clear)
	return s
}

// site is the KME of a site of that name.
func (s *tables) site(name string) identity.KME {
	id, err := identity.ParseKME("km-" + name)
	if err != nil {
		s.t.Fatal(err)
	}
	return id
}

// over is the KME at the other end of a link, and of is that of a node.
func (s *tables) over(link string) identity.KME { return s.site(s.links[link]) }
func (s *tables) of(node string) identity.KME   { return s.site(node[:1]) }

// clear ends the processes of the last history and empties the tables.
func (s *tables) clear() {
	for node, db := range s.runs {
		db.Close()
		delete(s.runs, node)
	}
	for _, table := range []string{"grant_out", "void_out", "parked", "due", "untaken", "key", "chunk", "block", "session", "link", "node_run", "peer_run", "audit"} {
		if _, err := s.super.Exec(context.Background(), "DELETE FROM "+table); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *tables) wrong(format string, args ...any) {
	if s.bad == "" {
		s.bad = fmt.Sprintf(format, args...)
	}
}

// must notes an error of a verb that has to succeed.
func (s *tables) must(err error) {
	if err != nil {
		s.wrong("%v", err)
	}
}

// may notes an error other than the one with which a verb is refused, or that it
// was, or was not, unlike in the model.
func (s *tables) may(err, refused error, done bool) {
	if done && err != nil || !done && !errors.Is(err, refused) {
		s.wrong("%v, and in the model it is done: %v", err, done)
	}
}

func (s *tables) same(what string, model, real any) {
	if diff := cmp.Diff(model, real, cmpopts.EquateEmpty(), cmp.AllowUnexported(identity.SAE{})); diff != "" {
		s.wrong("%s (-model +real):\n%s", what, diff)
	}
}

func (s *tables) Bump(node string, run int64) {
	got, err := s.tool.BumpRun(context.Background(), node, 0)
	s.must(err)
	s.same("run of "+node, run, got)
	if db := s.runs[node]; db != nil {
		if err := db.Record(context.Background(), audit.Event{Action: audit.Status}); !errors.Is(err, store.ErrFenced) {
			s.wrong("a commit of %s in a run before %d: %v", node, run, err)
		}
		db.Close()
		delete(s.runs, node)
	}
}

func (s *tables) Begin(node string, run int64) {
	ctx, cfg := context.Background(), s.cfg
	cfg.Node = node
	db, err := store.Open(ctx, cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	s.runs[node] = db
	s.must(db.Begin(ctx, run))
	for link := range s.links {
		s.must(db.EnsureLink(ctx, link, s.over(link), s.end))
		if err := db.OpenSession(ctx, link, 1, event(audit.LinkOpen)); err != nil && !errors.Is(err, store.ErrClosedSession) {
			s.must(err)
		}
	}
}

func event(a audit.Action) audit.Event { return audit.Event{Action: a, Outcome: audit.Done} }

func noEvents(handover.BlockState, handover.BlockState, int) []audit.Event { return nil }

// Do has the store do what the model has done, by the same run.
func (s *tables) Do(node string, run int64, verb any) {
	if s.bad != "" {
		return
	}
	s.verbs[strings.TrimPrefix(fmt.Sprintf("%T", verb), "handover.Do")]++
	ctx, db := context.Background(), s.runs[node]
	switch v := verb.(type) {
	case handover.DoOpenSession:
		if err := db.OpenSession(ctx, v.Link, v.Session, event(audit.LinkOpen)); !errors.Is(err, store.ErrClosedSession) {
			s.must(err) // an old one is none
		}
	case handover.DoHold:
		s.may(db.HoldBlock(ctx, s.block(v), event(audit.Hold)), store.ErrClosedSession, v.Done)
	case handover.DoHeardHeld:
		answer, err := db.HeardHeld(ctx, v.Held, s.over(v.Link), noEvents)
		s.must(err)
		s.same("answer to held", v.Answer, answer)
	case handover.DoHeardHeldAnswer:
		s.must(db.HeardHeldAnswer(ctx, v.BlockRef, v.Answer, noEvents))
	case handover.DoLease:
		leases, err := db.Lease(ctx, v.Link, 1)
		s.must(err)
		var ids []key.ID
		for _, l := range leases {
			for _, a := range l.Atoms {
				s.chunks[a.ID] = l.Chunk
				ids = append(ids, a.ID)
			}
		}
		s.same("atoms leased", v.IDs, ids)
	case handover.DoGiveBack:
		freed, err := db.GiveBack(ctx, []store.Leased{{Chunk: s.chunks[v.IDs[0]], Atoms: len(v.IDs)}})
		s.must(err)
		s.same("chunk given back", v.Done, len(freed) == 1)
	case handover.DoServe:
		s.may(db.Serve(ctx, store.ServeJob{Atoms: slices.Collect(v.Atoms()), Events: []audit.Event{event(audit.EncKeys)}}), store.ErrShort, v.Done)
	case handover.DoBurn:
		s.must(db.Burn(ctx, store.BurnJob{Atoms: v.IDs, Void: v.Void, Peer: s.over(v.Link), Event: func([]key.ID) audit.Event { return event(audit.Burn) }}))
	case handover.DoPark:
		s.must(db.Park(ctx, v.IDs, 1))
	case handover.DoUnpark:
		s.must(db.Unpark(ctx, v.IDs))
	case handover.DoAssign:
		s.assign(db, v)
	case handover.DoVoid:
		s.must(db.Void(ctx, s.of(v.Node), v.Void, func([]key.ID) audit.Event { return event(audit.VoidKeys) }))
	case handover.DoAckVoid:
		s.ackVoid(v.Void)
	case handover.DoTake:
		rows := []store.DueRef{{Key: v.Key, ExpiryEpoch: key.EpochAt(now().Add(hour), hour)}}
		s.may(db.Take(ctx, store.TakeJob{SAE: v.SAE, Rows: rows, How: store.GoneTaken, Events: []audit.Event{event(audit.DecKeys)}}), store.ErrShort, v.Done)
	case handover.DoHearRun:
		answer, ok, err := db.HearRun(ctx, s.of(v.Node), v.RunStarted)
		s.must(err)
		s.same("whether the run is heard", v.OK, ok)
		s.same("what lower runs were assigned", v.Rows, answer.Assigned)
	case handover.DoEndTakeover:
		s.may(db.EndTakeover(ctx, store.NodeRun{Node: v.Node, Run: v.Run}, []string{v.Link}, event(audit.Takeover)), store.ErrOvertaken, v.Done)
	case handover.DoGive:
		b, err := db.GiveChunks(ctx, store.GiveJob{
			Link: v.Link, Most: 1, Decide: func(int, int) int { return 1 }, Event: func([]audit.Atoms) audit.Event { return event(audit.GiveChunks) },
		})
		s.must(err)
		s.same("chunks given", v.Given, b.Given)
	case handover.DoTakeGrant:
		g := handover.Grant{Chunks: []handover.Granted{v.Granted}}
		answer, err := db.TakeGrant(ctx, s.over(v.Link), g, func(string, []audit.Atoms) audit.Event { return event(audit.TakeChunks) })
		s.must(err)
		s.same("grants acknowledged", g.Chunks, answer.Chunks)
	case handover.DoAckGrant:
		s.must(db.AckGrants(ctx, []handover.Granted{v.Granted}))
	default:
		s.t.Fatalf("a verb that nobody replays: %T", verb)
	}
	if s.bad != "" {
		s.bad = fmt.Sprintf("%s/%d: %T: %s", node, run, verb, s.bad)
	}
}

func (s *tables) block(v handover.DoHold) store.Block {
	b := store.Block{
		BlockRef: v.BlockRef, Epoch: v.Epoch, Owners: v.Owners, Mine: s.end, Provenance: key.Simulated, Digest: v.Digest,
	}
	for i, id := range v.IDs {
		b.Atoms = append(b.Atoms, store.Atom{ID: id, Index: i, KEK: 1, CT: make([]byte, 48)})
	}
	return b
}

func (s *tables) assign(db *store.DB, v handover.DoAssign) {
	job := store.AssignJob{
		Peer: s.of(v.Node), Announce: v.Announce, Due: make(map[string][]store.Due),
		Admit: func(handover.Request) string { return "" },
		Event: func(handover.Request, handover.Result) audit.Event { return event(audit.Assign) },
	}
	for _, r := range v.Requests {
		for _, k := range r.Keys {
			for _, slave := range r.Slaves {
				job.Due[r.ID] = append(job.Due[r.ID], store.Due{
					ExpiryEpoch: key.EpochAt(now().Add(hour), hour), Key: k.ID(), SAE: slave, Master: r.Master, Bits: r.Bits,
					Provenance: key.Simulated, KEK: 1, CT: make([]byte, 48), ExpiresAt: now().Add(hour),
				})
			}
		}
	}
	answer, err := db.Assign(context.Background(), job)
	s.must(err)
	for _, a := range []handover.AnnounceAnswer{answer, v.Answer} {
		for i := range a.Results {
			a.Results[i].Why = "" // words
		}
	}
	s.same("answer to announce", v.Answer, answer)
}

func (s *tables) ackVoid(v handover.Void) {
	voids, err := s.tool.Voids(context.Background())
	s.must(err)
	for _, p := range voids {
		if cmp.Equal(p.Void, v) {
			s.must(s.tool.AckVoid(context.Background(), p))
			return
		}
	}
	s.wrong("no void %+v is to be acknowledged", v)
}

// dump is the tables as the model writes its own.
const dump = `
	SELECT format('block %s/%s %s', session, id, state) FROM block
	UNION ALL SELECT format('chunk %s/%s+%s %s %s left %s%s', session, block, first, owner, grants, remaining,
		CASE WHEN node IS NOT NULL AND remaining > 0 THEN format(' leased %s/%s', node, run) END) FROM chunk
	UNION ALL SELECT format('key %s', id) FROM key
	UNION ALL SELECT format('due %s %s of %s by %s/%s/%s %s', key_id, sae, master, node, run, batch, gone_how) FROM due
	UNION ALL SELECT format('parked %s %s/%s', key_id, node, run) FROM parked
	UNION ALL SELECT format('void %s/%s/%s %s... acked %s', node, run, batch, replace(key_ids[1]::text, '-', ''), (acked_at IS NOT NULL)::text) FROM void_out
	UNION ALL SELECT format('grant %s/%s+%s %s acked %s', session, block, first, o.grants, (acked_at IS NOT NULL)::text) FROM grant_out o JOIN chunk c ON c.id = o.chunk
	UNION ALL SELECT format('run %s %s', node, run) FROM node_run
	UNION ALL SELECT format('peer %s %s %s', node, run, last) FROM peer_run`

func (s *tables) Compare(model []string) {
	if s.bad != "" {
		return
	}
	rows, _ := s.super.Query(context.Background(), dump)
	real, err := pgx.CollectRows(rows, pgx.RowTo[string])
	s.must(err)
	slices.Sort(real)
	s.same("the tables", model, real)
}
