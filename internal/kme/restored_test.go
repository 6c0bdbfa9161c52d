package kme

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// Each witness by itself gives a restored database away, and none of them an
// honest one, nor one that was recovered since.
func TestRestored(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node() // run 1
	k.Store.Witness().Start(1)
	k.note(t.Context(), k.own(audit.Alarm))
	for name, test := range map[string]struct {
		sql             string
		inToken, inFile int64
		want            string // part of it; "" for not restored
	}{
		"honest":                    {"SELECT", 1, 1, ""},
		"honest, and died at start": {"SELECT", 0, 0, ""},
		"behind the token":          {"SELECT", 2, 1, "behind the token: node a is in run 1, and was in run 2"},
		"behind the run file":       {"SELECT", 1, 2, "behind the run file"},
		"behind the witness":        {"UPDATE kme.node_run SET seq = 0, head = decode(repeat('00', 32), 'hex')", 1, 1, "0 events, and had 1"},
		"new":                       {"DELETE FROM kme.node_run", 0, 0, "behind the witness file: node a is in run 0"},
		"forked":                    {"UPDATE kme.node_run SET seq = 1, head = decode(repeat('77', 32), 'hex')", 1, 1, "another event 1"},
		"recovered since":           {"UPDATE kme.settings SET origin = 2; UPDATE kme.node_run SET seq = 0", 1, 1, ""},
	} {
		s.exec(s.name, test.sql)
		now, err := k.Store.Standing(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := k.restored(now, test.inToken, test.inFile); (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
		s.exec(s.name, `UPDATE kme.settings SET origin = 1; DELETE FROM kme.node_run; INSERT INTO kme.node_run
			SELECT node, 1, 1, seq, sha256('kme/audit/1\000'::bytea || prev || convert_to(body, 'UTF8')) FROM kme.audit`)
	}
}

// One node that finds the database restored suspends them all, and each says why.
func TestSuspended(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, other := s.node(), s.node()
	other.Node = "b"
	other.watchPast(t.Context())
	if err := other.serving(); err != nil {
		t.Fatalf("before: %v", err)
	}
	if err := k.suspend(t.Context(), "evidence"); err != nil {
		t.Fatal(err)
	}
	if err := k.suspend(t.Context(), "later evidence"); err != nil {
		t.Fatal(err)
	}
	other.watchPast(t.Context())
	for _, k := range []*KME{k, other} {
		if err := k.able(); err == nil || err.Kind != problem.Unavailable || !strings.Contains(err.Error(), "suspended: evidence") {
			t.Errorf("node %s serves: %v", k.Node, err)
		}
	}
	if alarms := other.Alarms(); len(alarms) != 1 || alarms[0].Name != "restored" || !strings.Contains(alarms[0].Text, "evidence. Nothing is served") {
		t.Errorf("alarms: %v", alarms)
	}
}

// A database that loses what this process has seen in it is found out within a beat.
func TestSetBackBetweenBeats(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	s.exec(s.name, "INSERT INTO kme.node_run VALUES ('b', 4, 9, 20, decode(repeat('11', 32), 'hex'))") // another node, busy
	k.watchPast(t.Context())
	s.exec(s.name, "UPDATE kme.node_run SET seq = 19 WHERE node = 'b'")
	if why := k.suspended(); why != "" {
		t.Fatalf("suspended too early: %s", why)
	}
	k.watchPast(t.Context())
	if why := k.suspended(); !strings.Contains(why, "node b has 19 events, and had 20") {
		t.Errorf("suspended: %q", why)
	}
}

// What a peer remembers of us gives us away, unless it speaks of a time before our
// last recovery.
func TestPeerRemembers(t *testing.T) {
	t.Parallel()
	peer := kmeID(t, "km2")
	head := handover.Digest{1}
	yours := func(origin, run, seq int64) handover.Figures {
		return handover.Figures{Origin: origin, Nodes: []handover.NodeFigures{{Node: "a", Run: run, Seq: seq, Head: head}}}
	}
	for name, test := range map[string]struct {
		hello handover.Hello
		want  string // part of why we are suspended; "" if we are not
	}{
		"nothing":                   {handover.Hello{}, ""},
		"less":                      {handover.Hello{Yours: yours(2, 3, 5)}, ""},
		"as much":                   {handover.Hello{Yours: yours(2, 4, 5)}, ""},
		"a higher run":              {handover.Hello{Yours: yours(2, 7, 5)}, "behind what km2 knows: node a is in run 6, and was in run 7"},
		"more events":               {handover.Hello{Yours: yours(2, 4, 11)}, "10 events, and had 11"},
		"a later recovery":          {handover.Hello{Yours: yours(3, 1, 1)}, "origin"},
		"more, before our recovery": {handover.Hello{Yours: yours(1, 9, 999)}, ""},
		"a batch that we know":      {handover.Hello{Yours: yours(2, 1, 1), Acked: []handover.Acked{{Node: "b", Run: 3, Batch: 8}}}, ""},
		"a batch that we forgot":    {handover.Hello{Yours: yours(2, 1, 1), Acked: []handover.Acked{{Node: "b", Run: 3, Batch: 9}}}, "batch 9 of run 3 of node b was answered"},
		"a run that we forgot":      {handover.Hello{Yours: yours(2, 1, 1), Acked: []handover.Acked{{Node: "c", Run: 1}}}, "run 1 of node c"},
		"one before our recovery":   {handover.Hello{Yours: yours(1, 1, 1), Acked: []handover.Acked{{Node: "b", Run: 3, Batch: 9}}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			k := s.node()
			s.exec(s.name, `UPDATE kme.settings SET origin = 2; UPDATE kme.node_run SET run = 6, seq = 10;
				INSERT INTO kme.peer_run (peer, node, run, last) VALUES ('km2', 'b', 3, 8)`)
			eventually(t, "a look at the database", func() bool { // which is given up soon on a machine that is busy
				k.judgeSelf(t.Context(), peer, test.hello, k.standing(t.Context()))
				return test.want == "" || k.suspended() != ""
			})
			if why := k.suspended(); (why == "") != (test.want == "") || !strings.Contains(why, test.want) {
				t.Errorf("suspended: %q, want %q", why, test.want)
			}
		})
	}
}

// A peer whose answer falls short of what it had told is left alone until it has
// been recovered, and its evidence against itself is kept.
func TestPeerInThePast(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	judge, _ := core(t)
	k.Policies = judge.Policies
	peer := kmeID(t, "km2")
	figures := func(origin, run, seq int64) handover.Figures {
		return handover.Figures{Origin: origin, Nodes: []handover.NodeFigures{{Node: "km2-a", Run: run, Seq: seq}}}
	}
	for i, step := range []struct {
		answer handover.Hello
		behind string
		known  handover.Figures // afterwards
	}{
		{handover.Hello{Site: figures(1, 2, 50)}, "", figures(1, 2, 50)},
		{handover.Hello{Site: figures(1, 2, 60)}, "", figures(1, 2, 60)},
		{handover.Hello{Site: figures(1, 3, 40)}, "40 events, and had 60", figures(1, 2, 60)},
		{handover.Hello{}, "40 events, and had 60", figures(1, 2, 60)}, // its database is away: nothing is disproved
		{handover.Hello{Site: figures(1, 4, 70), Suspended: true}, "says so itself", figures(1, 2, 60)},
		{handover.Hello{Site: figures(2, 5, 45)}, "", figures(2, 5, 45)},
	} {
		k.judgePeer(t.Context(), peer, step.answer, toldBy(t, k, peer), true)
		if err := k.servingPeer(peer); (err == nil) != (step.behind == "") || err != nil && !strings.Contains(err.Error(), step.behind) {
			t.Errorf("step %d: %v, want %q", i, err, step.behind)
		}
		if diff := cmp.Diff(step.known, toldBy(t, k, peer)); diff != "" {
			t.Errorf("step %d (-want +got):\n%s", i, diff)
		}
	}
	if n := len(k.Alarms()); n != 0 {
		t.Errorf("%d alarms stand after the recovery", n)
	}

	// Of nodes that it does not have nothing is kept.
	many := figures(2, 5, 46)
	for i := range handover.MaxNodes - 1 {
		many.Nodes = append(many.Nodes, handover.NodeFigures{Node: fmt.Sprint("invented-", i), Run: 1})
	}
	k.learn(t.Context(), peer, handover.Hello{Site: many})
	if diff := cmp.Diff(figures(2, 5, 46), toldBy(t, k, peer)); diff != "" {
		t.Errorf("after it has invented nodes (-want +got):\n%s", diff)
	}
}

// A peer that is in the past stays so while it cannot be looked up what it had told: its
// answer by itself looks as good as any.
func TestPeerInThePastWithoutDatabase(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	judge, _ := core(t)
	k.Policies = judge.Policies
	peer := kmeID(t, "km2")
	site := func(events int64) handover.Hello {
		return handover.Hello{Site: handover.Figures{Origin: 1, Nodes: []handover.NodeFigures{{Node: "km2-a", Run: 2, Seq: events}}}}
	}
	answers := func(events int64) { k.judgePeer(t.Context(), peer, site(events), toldBy(t, k, peer), true) }
	answersUnseen := func(events int64) {
		known, ok := k.figures(t.Context(), peer)
		if ok {
			t.Errorf("what it had told was looked up: %v", known)
		}
		k.judgePeer(t.Context(), peer, site(events), known, ok)
	}
	behind := func(when string, want bool) {
		t.Helper()
		if is := k.servingPeer(peer) != nil; is != want || k.stands("restored-km2") != want {
			t.Errorf("%s: in the past: %t, alarm: %t; want %t", when, is, k.stands("restored-km2"), want)
		}
	}
	answers(50)
	answers(40)
	behind("restored", true)
	s.exec(s.name, "REVOKE SELECT ON kme.peer_node FROM kme_app")
	answersUnseen(40)
	behind("and not looked up", true)
	s.exec(s.name, "GRANT SELECT ON kme.peer_node TO kme_app")
	answers(60)
	behind("caught up", false)
	s.exec(s.name, "REVOKE SELECT ON kme.peer_node FROM kme_app")
	answersUnseen(40)
	behind("not looked up", false)
}

// toldBy is what a peer has told of itself.
func toldBy(t *testing.T, k *KME, peer identity.KME) (known handover.Figures) {
	t.Helper()
	eventually(t, "a look at the database", func() (ok bool) {
		known, ok = k.figures(t.Context(), peer)
		return ok
	})
	return known
}

// What a peer remembers of us suspends the site only if it is sure that we have forgotten
// it: a connection that still leads to an old primary, after a failover, shows less than
// there is. Such a one reads, and cannot end a transaction that writes.
func TestOldPrimaryAccusesNobody(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	hello := handover.Hello{Yours: handover.Figures{Origin: 1}, Acked: []handover.Acked{{Node: "b", Run: 3, Batch: 9}}}
	s.exec(s.name, "INSERT INTO kme.peer_run (peer, node, run, last) VALUES ('km2', 'b', 3, 8)")
	now, err := k.Store.Standing(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.exec(s.name, provable("REVOKE", "FROM"))
	k.judgeSelf(t.Context(), kmeID(t, "km2"), hello, now)
	if why := k.suspended(); why != "" {
		t.Errorf("suspended by what is not sure: %s", why)
	}
	s.exec(s.name, provable("GRANT", "TO"))
	eventually(t, "a look at the database", func() bool {
		k.judgeSelf(t.Context(), kmeID(t, "km2"), hello, now)
		return k.suspended() != ""
	})
	if why := k.suspended(); !strings.Contains(why, "batch 9 of run 3 of node b was answered") {
		t.Errorf("suspended: %q", why)
	}
}

// provable grants, or revokes, what transactions need that are to prove what they read: see
// store.DB.
func provable(verb, who string) string {
	return `DO $$ DECLARE f text; BEGIN
		FOR f IN SELECT oid::regprocedure FROM pg_proc WHERE proname = 'pg_logical_emit_message' LOOP
			EXECUTE format('` + verb + ` EXECUTE ON FUNCTION %s ` + who + ` PUBLIC', f);
		END LOOP; END $$`
}

// An answer that was under way while the peer was recovered does not count for what
// it is now.
func TestLateAnswerAccusesNobody(t *testing.T) {
	t.Parallel()
	var p past
	peer := kmeID(t, "km2")
	p.answered(peer, 1, 7, 100)
	p.answered(peer, 1, 7, 99)
	if got := p.answeredBy(peer, "a", 1); len(got) != 1 || got[0] != (handover.Acked{Node: "a", Run: 7, Batch: 100}) {
		t.Errorf("in origin 1: %v", got)
	}
	if got := p.answeredBy(peer, "a", 2); got != nil {
		t.Errorf("after its recovery: %v", got)
	}
	p.answered(peer, 2, 7, 0)
	p.answered(peer, 1, 7, 101) // late
	if got := p.answeredBy(peer, "a", 2); len(got) != 1 || got[0].Batch != 0 {
		t.Errorf("in origin 2: %v", got)
	}
}
