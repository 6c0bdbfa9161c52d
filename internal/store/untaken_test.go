package store

import (
	"testing"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// TestUntaken: however a key comes to wait for an SAE and however it ends, and
// whichever node does it, each node knows how many wait: at once of its own acts,
// after a look of the others', and after a restart.
func TestUntaken(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	one, two := s.open("n1"), s.open("n2")
	ctx := t.Context()
	want := func(what string, n int) {
		t.Helper()
		if got := one.Untaken(sae("bob"), sae("alice")); got != n {
			t.Errorf("n1, %s: %d keys wait, want %d", what, got, n)
		}
		if err := two.LookAtUntaken(ctx); err != nil {
			t.Fatal(err)
		}
		if got := two.Untaken(sae("bob"), sae("alice")); got != n {
			t.Errorf("n2, %s: %d keys wait, want %d", what, got, n)
		}
		s.check()
	}
	b := s.fill(one, 128, func(i int) handover.End { return []handover.End{handover.Alice, handover.Bob}[i] })
	theirs := b.Atoms[64:]
	hear(t, one, 1)
	job := s.assignJob(1, 1, request("r1", b.BlockRef, theirs[0]), request("r2", b.BlockRef, theirs[1]), request("r3", b.BlockRef, theirs[2:6]...))
	mustAssign(t, one, job, handover.Fresh, "", "", "")
	want("after an announce of three keys", 3)
	mustAssign(t, one, job, handover.Repeat, "", "", "")
	want("after its repeat", 3)

	lease, err := one.Lease(ctx, linkName, 1)
	if err != nil {
		t.Fatal(err)
	}
	mine := lease[0].Atoms
	due := []Due{s.due(mine[0].ID, "bob", "alice"), s.due(mine[1].ID, "bob", "alice"), s.due(mine[1].ID, "bert", "alice")}
	if err := one.Serve(ctx, ServeJob{Atoms: ids(mine[:2]), Due: due, Events: []audit.Event{served("s", b.BlockRef, mine[:2]...)}}); err != nil {
		t.Fatal(err)
	}
	want("after two keys made here", 5)

	taken := TakeJob{SAE: sae("bob"), How: GoneTaken, Rows: []DueRef{job.Due["r1"][0].ref(), due[0].ref()}}
	if err := one.Take(ctx, TakeJob{SAE: sae("bob"), How: GoneTaken, Rows: append(taken.Rows[:1:1], DueRef{mine[9].ID, due[0].ExpiryEpoch})}); err == nil {
		t.Error("took a key that is not due")
	}
	want("after a take that was refused", 5)
	if err := two.Take(ctx, taken); err != nil { // keys of n1's counting: n2's own count is below 0
		t.Fatal(err)
	}
	if err := one.LookAtUntaken(ctx); err != nil {
		t.Fatal(err)
	}
	want("after two were taken at the other node", 3)
	if got := one.Untaken(sae("bert"), sae("alice")); got != 1 {
		t.Errorf("%d keys wait for bert, want 1", got)
	}

	void := handover.Void{Node: "p1", Run: 1, Batch: 1, Keys: []key.ID{theirs[0].ID, theirs[1].ID}}
	if err := one.Void(ctx, kme("KM2"), void, func([]key.ID) audit.Event { return audit.Event{Action: audit.VoidKeys} }); err != nil {
		t.Fatal(err)
	}
	want("after a void of one of them", 2)

	s.step(2 * hour)
	if _, err := one.ExpireDue(ctx, s.now(), 100, func([]DueRef) audit.Event { return audit.Event{Action: audit.Expire} }); err != nil {
		t.Fatal(err)
	}
	want("after their time", 0)

	one.Close()
	one = s.open("n1")
	if err := one.LookAtUntaken(ctx); err != nil {
		t.Fatal(err)
	}
	want("after a restart", 0)
	mustAssign(t, one, s.assignJob(1, 2, request("r4", b.BlockRef, theirs[8])), handover.Fresh, "")
	want("of a key after a restart", 1)
}
