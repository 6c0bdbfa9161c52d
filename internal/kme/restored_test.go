package kme

import (
	"strings"
	"testing"

	"github.com/qutemail/kme/internal/audit"
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
