package kme

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/audit/audittest"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// An alarm about the audit log is in it as its failure too, once for each time that it
// is raised; other alarms are not.
func TestTrailAlarmIsAFailure(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	k.raise(t.Context(), "audit-lag", "5 events wait")
	k.raise(t.Context(), "audit-lag", "6 events wait") // it stands
	k.raise(t.Context(), "hsm", "away")
	k.clear(t.Context(), "audit-lag")
	k.raise(t.Context(), "audit-witness-km2", "refuses")
	want := []told{
		{"alarm", "failed", "audit-lag: 5 events wait", 0},
		{"audit-failure", "failed", "audit-lag: 5 events wait", 0},
		{"alarm", "failed", "hsm: away", 0},
		{"alarm", "done", "audit-lag is over", 0},
		{"alarm", "failed", "audit-witness-km2: refuses", 0},
		{"audit-failure", "failed", "audit-witness-km2: refuses", 0},
	}
	if diff := cmp.Diff(want, s.audit()); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
}

// The last event of a run says that it ended in order; one that ends otherwise has none.
func TestRecordEnds(t *testing.T) {
	t.Parallel()
	s, dir := newSite(t), tokenDir(t)
	last := func(n int) (actions []string) {
		for _, e := range s.audit() {
			actions = append(actions, e.Action)
		}
		return actions[len(actions)-n:]
	}
	k := s.withToken(dir)
	run(t, k)()
	if got := last(2); !slices.Equal(got, []string{"stop", "audit-stop"}) {
		t.Errorf("a node that was told to stop ends with %q", got)
	}
	k.Store.Close()
	if err := k.Token.Close(); err != nil {
		t.Fatal(err)
	}
	k = s.withToken(dir)
	refused := errors.New("the PIN is refused")
	k.noPIN <- refused
	if err := k.Run(t.Context(), func() {}); !errors.Is(err, refused) {
		t.Fatalf("the node ended with %v", err)
	}
	if got := last(1); got[0] != "stop" {
		t.Errorf("a node that the HSM has refused ends with %q", got)
	}
}

// What is refused while too many events wait is counted, and one event says how much it
// was: each request is in the log by itself or in that number.
func TestOverflow(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	conn, err := pgx.Connect(t.Context(), s.cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), "BEGIN; SELECT FROM kme.node_run FOR UPDATE"); err != nil { // no commit gets through
		t.Fatal(err)
	}
	const requests = 1200 // more than may wait
	var asked sync.WaitGroup
	for range requests {
		asked.Go(func() {
			_ = k.recordOrCount(context.Background(), problem.New(problem.Unauthorized, "no"), audit.Event{Action: audit.EncKeys, Outcome: audit.Refused})
		})
	}
	eventually(t, "the queue to be full", func() bool { return k.overflow.counted() > 0 })
	if k.note(t.Context(), k.own(audit.KeyShown)) {
		t.Error("an event of the node's own found room")
	}
	if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	asked.Wait()
	outage, overflow := int(k.outage.counted()), int(k.overflow.counted())
	k.Store.Close()
	k = s.node() // another process: the numbers are in files
	k.summarise(t.Context())
	k.summarise(t.Context())
	var recorded int
	summed := make(map[string][]int)
	for _, e := range s.audit() {
		if e.Action == "enc_keys" {
			recorded++
		} else {
			summed[e.Action] = append(summed[e.Action], e.Count)
		}
	}
	if recorded+outage+overflow != requests+1 {
		t.Errorf("%d recorded, %d and %d counted, of %d requests and an event", recorded, outage, overflow, requests)
	}
	if got := summed["audit-overflow"]; !slices.Equal(got, []int{overflow}) {
		t.Errorf("audit-overflow says %d, counted were %d", got, overflow)
	}
}

// A node records that it folds the log, and that it does so no more when another
// sequencer is first to take the lead that it has lost.
func TestSequencerLosesTheLead(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, other := s.trailed()
	k.Trail.Sequencer = s.cluster.DSN(store.SequencerRole, s.name)
	ctx, cancel := context.WithCancel(t.Context())
	var folding sync.WaitGroup
	folding.Go(func() { _ = k.sequence(ctx) })
	defer folding.Wait()
	defer cancel()
	count := func(action, reason string) (n int) {
		for _, e := range s.audit() {
			if e.Action == action && strings.Contains(e.Reason, reason) {
				n++
			}
		}
		return n
	}
	eventually(t, "the node to fold", func() bool { return count("audit-start", "goes on at leaf") == 1 })
	eventually(t, "the other sequencer to lead", func() bool {
		s.exec(s.name, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '`+store.SequencerRole+`'
			AND datname = current_database() AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')`)
		f, err := other.Step(t.Context())
		return err == nil && f.Leads
	})
	eventually(t, "the node to say that it folds no more", func() bool { return count("audit-stop", "another sequencer") == 1 })
	other.Close()
	eventually(t, "the node to fold again", func() bool { return count("audit-start", "goes on at leaf") == 2 })
}

// What a peer has witnessed of a site's logs is what the log of a recovery follows: the
// last checkpoint of each, which the site's own key has signed.
func TestRecoveryFollows(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	peer := s.node() // km1, who witnesses the logs of km2
	peer.Trail.TrustDomain, peer.trail.witnessKey = "qutemail.example", audittest.NewKey(t)
	km2, key := kmeID(t, "km2"), audittest.NewKey(t)
	first, second := newOtherLog(t, key, 1).add("a", "b", "c"), newOtherLog(t, key, 2).add("x")
	older := first.submission(0).Note
	for _, sub := range []audit.Submission{first.submission(0), first.add("d").submission(3), second.submission(0)} {
		if _, err := peer.PeerDoor().Checkpoint(t.Context(), km2, sub); err != nil {
			t.Fatal(err)
		}
	}
	seen, err := peer.PeerDoor().Witnessed(t.Context(), km2)
	if err != nil || len(seen.Notes) != 2 || seen.Check() != nil {
		t.Fatalf("witnessed: %q, %v", seen.Notes, err)
	}
	if none, err := peer.PeerDoor().Witnessed(t.Context(), kmeID(t, "km3")); err != nil || len(none.Notes) != 0 {
		t.Errorf("witnessed of another: %q, %v", none.Notes, err)
	}
	k := &KME{Config: Config{Self: km2, Trail: Trail{TrustDomain: "qutemail.example"}}}
	k.trail.logKey = key
	foreign := newOtherLog(t, audittest.NewKey(t), 1).add("a", "b", "c", "d", "e").submission(0).Note
	var said []string
	follows, err := k.lastOfEach(3, append(seen.Notes, older, foreign, "?"), func(format string, args ...any) { said = append(said, fmt.Sprintf(format, args...)) })
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{first.submission(0).Note, second.submission(0).Note}, follows); diff != "" {
		t.Errorf("it follows (-want +got):\n%s", diff)
	}
	if len(said) != 4 || !strings.Contains(said[2], "follows qutemail.example/km2/audit/1 of 4 leaves") || !strings.Contains(said[3], "audit/2 of 1 leaves") {
		t.Errorf("said: %q", said)
	}
}
