package kme

import (
	"errors"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/key"
)

// TestDoctor: each thing that a node depends on is found well when it is, and each way
// in which it is not is found, with what to do about it.
func TestDoctor(t *testing.T) {
	t.Parallel()
	away, km2 := errors.New("connection refused"), kmeID(t, "km2")
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	open := LinkState{ID: "a", State: admin.LinkOpen}
	down, paused, eve := open, open, open
	down.State, down.Why = admin.LinkDown, "no light"
	paused.State, paused.Why = admin.LinkPaused, "the HSM is away"
	eve.LastWhy = "QBER 25 %"
	for _, tt := range []struct {
		name string
		got  admin.Finding
		says string // of one that is not well; "" if it is
	}{
		{"hsm", judgeHSM(time.Millisecond, nil), ""},
		{"hsm gone", judgeHSM(0, away), "the token does not answer: connection refused"},
		{"hsm slow", judgeHSM(time.Second, nil), "the token answers, after 1s"},
		{"database", judgeDatabase(time.Millisecond, nil), ""},
		{"database gone", judgeDatabase(0, away), "connection refused"},
		{"database slow", judgeDatabase(2*time.Second, nil), "it answers, after 2s"},
		{"migrations", judgeSchema(20, 20, nil), ""},
		{"migrations behind", judgeSchema(19, 20, nil), "the schema is version 19, and this program needs 20"},
		{"migrations ahead", judgeSchema(21, 20, nil), "the schema is version 21, and this program knows 20"},
		{"migrations unknown", judgeSchema(0, 20, away), "not known"},
		{"standing", judgeSuspended(""), ""},
		{"suspended", judgeSuspended("restored"), "suspended: restored"},
		{"disk", judgeDisk("/data", 1<<30, 10<<30, nil), ""},
		{"disk small and full", judgeDisk("/data", 1<<20, 1<<30, nil), "1 MiB are free where /data lies"},
		{"disk large and full", judgeDisk("/data", 100<<20, 100<<30, nil), "100 MiB are free where /data lies"},
		{"no disk", judgeDisk("/data", 0, 0, errors.New("no such file")), "looking at /data: no such file"},
		{"data", judgeWitness(nil), ""},
		{"data read-only", judgeWitness(errors.New("read-only file system")), "it takes no writes: read-only file system"},
		{"takeover", judgeTakeover(kmeID(t, "km2")), "it has not said yet what it assigned for this node's earlier runs: none of its links' keys is handed out here"},
		{"audit", judgeTrail(3, time.Second, "", nil, nil), ""},
		{"audit unknown", judgeTrail(0, 0, "", nil, away), "not known"},
		{"audit forged", judgeTrail(3, time.Second, "leaf 7", nil, nil), "the log is not what was signed: leaf 7"},
		{"audit not folded", judgeTrail(3, time.Second, "", []string{"audit-sequencer: no role", "audit-x: y"}, nil), "audit-sequencer: no role; audit-x: y"},
		{"audit late", judgeTrail(3, time.Minute, "", nil, nil), "3 events wait, and for 1m0s there was no checkpoint"},
		{"CRL", JudgeCRL("sae", ""), ""},
		{"CRL old", JudgeCRL("sae", "it is a day old"), "it is a day old"},
		{"peer", judgePeer(km2, time.Millisecond, nil), ""},
		{"peer gone", judgePeer(km2, 0, away), "it does not answer: connection refused"},
		{"peer slow", judgePeer(km2, time.Second, nil), "it answers, after 1s"},
		{"clock", judgeOffset(km2, -900*time.Millisecond), ""},
		{"clock behind", judgeOffset(km2, -2*time.Second), "its clock is -2s ahead of ours"},
		{"link", judgeLink(open, 5, nil), ""},
		{"link down", judgeLink(down, 5, nil), "down: no light; 5 keys are left to assign here"},
		{"link paused", judgeLink(paused, 5, nil), "paused: the HSM is away; 5 keys are left to assign here"},
		{"eve", judgeLink(eve, 5, nil), "the last block was given up: QBER 25 %"},
		{"pool empty", judgeLink(open, 0, nil), "open, and no keys are left to assign here"},
		{"pool unknown", judgeLink(open, 0, away), "its pool cannot be counted"},
		{"sample", judgeSample("a", key.ID{}, false, true, nil), ""},
		{"sample of other bytes", judgeSample("a", key.ID{1}, false, false, nil), "key " + key.ID{1}.String() + " has OTHER BYTES at the peer"},
		{"sample lacking", judgeSample("a", key.ID{1}, true, false, nil), "the peer does not have key " + key.ID{1}.String() + ", or cannot open it"},
		{"no sample", judgeSample("a", key.ID{}, false, false, away), "not compared with the peer's: connection refused"},
		{"node", judgeNode("b", true, false), ""},
		{"node gone", judgeNode("b", false, true), "it is not alive"},
		{"node being taken over", judgeNode("b", false, false), "it is not alive"},
		{"alarms", judgeAlarms(nil), ""},
		{"some alarms", judgeAlarms([]Alarm{{Name: "hsm"}, {Name: "data"}}), "2: [data hsm]"},
		{"certificate", JudgeCertificate("certificate", now.Add(24*time.Hour), now), ""},
		{"certificate ends", JudgeCertificate("certificate", now.Add(time.Hour), now), "it ends in 1h0m0s"},
		{"certificate ended", JudgeCertificate("certificate", now.Add(-time.Hour), now), "it ended at 2026-03-01T11:00:00Z"},
	} {
		switch {
		case tt.got.OK != (tt.says == ""):
			t.Errorf("%s: %+v", tt.name, tt.got)
		case tt.got.About == "" || tt.got.Says == "" || tt.got.OK != (tt.got.Do == ""):
			t.Errorf("%s: it must say about what, how it stands, and, when that is bad, what to do: %+v", tt.name, tt.got)
		case !tt.got.OK && tt.got.Says != tt.says:
			t.Errorf("%s: %q, want %q", tt.name, tt.got.Says, tt.says)
		}
	}
}
