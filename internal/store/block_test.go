package store

import (
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

func openSession(t *testing.T, db *DB, session int64) {
	t.Helper()
	if err := db.OpenSession(t.Context(), linkName, session, audit.Event{Action: audit.LinkOpen, Outcome: audit.Done}); err != nil {
		t.Fatal(err)
	}
}

// TestHoldBlock: a block is held once, and only in the session that is open.
func TestHoldBlock(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	b := s.block(2, 70, mine)
	hold := func(b Block) error { return db.HoldBlock(ctx, b, holdEvent(b)) }
	if err := hold(b); !errors.Is(err, ErrClosedSession) {
		t.Errorf("before its session: %v, want ErrClosedSession", err)
	}
	openSession(t, db, 2)
	if err := hold(b); err != nil {
		t.Fatal(err)
	}
	if err := hold(b); err != nil {
		t.Errorf("the same block again: %v, want success", err)
	}
	other := s.block(2, 70, mine)
	other.Block = b.Block
	if err := hold(other); !errors.Is(err, ErrOtherBlock) {
		t.Errorf("another block of that name: %v, want ErrOtherBlock", err)
	}
	for name, bad := range map[string]func(*Block){
		"owners":  func(b *Block) { b.Owners = b.Owners[1:] },
		"indices": func(b *Block) { b.Atoms[3].Index = 4 },
		"epochs":  func(b *Block) { b.Epoch++ },
		"names":   func(b *Block) { b.Upstream = []key.ID{{1}} },
	} {
		broken := s.block(2, 70, mine)
		bad(&broken)
		if err := hold(broken); err == nil {
			t.Errorf("a block with wrong %s was stored", name)
		}
	}
	if err := hold(s.blockOf(s.epoch()+100, 2, 64, mine)); !errors.Is(err, ErrExpired) {
		t.Errorf("a block of an epoch that is not open: %v, want ErrExpired", err)
	}

	held, err := db.HeldBlocks(ctx, linkName)
	want := []handover.Held{{BlockRef: b.BlockRef, Epoch: b.Epoch, Atoms: 70, Owners: b.Owners, Digest: b.Digest}}
	if diff := cmp.Diff(want, held); diff != "" || err != nil {
		t.Errorf("HeldBlocks: %v (-want +got):\n%s", err, diff)
	}
	if leases, err := db.Lease(ctx, linkName, 10); len(leases) != 0 || err != nil {
		t.Errorf("leased %d chunks of a HELD block, %v", len(leases), err)
	}
	if n, err := db.Stored(ctx, linkName); n != 0 || err != nil {
		t.Errorf("Stored, with a HELD block: %d, %v", n, err)
	}
	if here, there, err := db.Pool(ctx, linkName); here != 70 || there != 0 || err != nil {
		t.Errorf("Pool: %d, %d, %v; want 70, 0", here, there, err)
	}

	late := s.block(2, 64, mine)
	openSession(t, db, 5)
	if err := hold(late); !errors.Is(err, ErrClosedSession) {
		t.Errorf("after its session: %v, want ErrClosedSession", err)
	}
	for _, session := range []int64{4, 5} {
		if err := db.OpenSession(ctx, linkName, session, audit.Event{}); !errors.Is(err, ErrClosedSession) {
			t.Errorf("opening session %d after 5: %v, want ErrClosedSession", session, err)
		}
	}
	if n, err := db.Session(ctx, linkName); n != 5 || err != nil {
		t.Errorf("Session: %d, %v; want 5", n, err)
	}
	if n := countOf(s.check(), audit.Hold); n != 1 {
		t.Errorf("%d events of blocks held, want 1", n)
	}
}

// TestUpstreamNames: a key that a device had handed out is found with the name that the
// device has for it, at its index.
func TestUpstreamNames(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	openSession(t, db, 1)
	plain, named := s.block(1, 3, mine), s.block(1, 3, mine)
	named.Upstream = []key.ID{{1}, {2}, {3}}
	for _, b := range []Block{plain, named} {
		if err := db.HoldBlock(t.Context(), b, holdEvent(b)); err != nil {
			t.Fatal(err)
		}
		for i, a := range b.Atoms {
			story, err := db.Story(t.Context(), a.ID)
			if err != nil || story.Pool == nil {
				t.Fatalf("atom %d: %+v, %v", i, story, err)
			}
			var want key.ID
			if b.Upstream != nil {
				want = b.Upstream[i]
			}
			if got := story.Pool.Upstream; got != want {
				t.Errorf("atom %d: named %v, want %v", i, got, want)
			}
		}
	}
}

// TestHeardHeld is what the peer's word does to each state of a block.
func TestHeardHeld(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	openSession(t, db, 3)
	say := func(b Block) handover.HeldAnswer {
		t.Helper()
		held := handover.Held{BlockRef: b.BlockRef, Epoch: b.Epoch, Atoms: len(b.Atoms), Owners: b.Owners, Digest: b.Digest}
		answer, err := db.HeardHeld(ctx, held, kme("KM2"), blockEvents(b.BlockRef))
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}
	hold := func(b Block) Block {
		t.Helper()
		if err := db.HoldBlock(ctx, b, holdEvent(b)); err != nil {
			t.Fatal(err)
		}
		return b
	}
	left := func(b Block) int {
		return ask[int](s, "SELECT sum(remaining)::int FROM chunk WHERE block = $1", b.Block)
	}
	same := hold(s.block(3, 100, mine))
	for what, want := range map[string]handover.HeldAnswer{"first": handover.Equal, "again": handover.Equal} {
		if got := say(same); got != want {
			t.Errorf("the same block, %s: %s, want %s", what, got, want)
		}
	}
	if got := say(s.block(3, 64, mine)); got != handover.NotYet {
		t.Errorf("unknown, session open: %s, want not_yet", got)
	}
	if got := say(s.block(2, 64, mine)); got != handover.Never {
		t.Errorf("unknown, session closed: %s, want never", got)
	}
	if got := say(s.block(9, 64, mine)); got != handover.NotYet {
		t.Errorf("unknown, session to come: %s, want not_yet", got)
	}
	held := hold(s.block(3, 100, mine))
	other := held
	other.Digest[0] ^= 1
	if got := say(other); got != handover.Different || left(held) != 0 {
		t.Errorf("another digest: %s and %d atoms left, want different and none", got, left(held))
	}
	if got := say(held); got != handover.Different {
		t.Errorf("a lost block: %s, want different", got)
	}
	other = same
	other.Digest[0] ^= 1
	if got := say(other); got != handover.Different || left(same) != 0 {
		t.Errorf("another digest of a READY block: %s and %d atoms left, want different and none", got, left(same))
	}
	for answer, want := range map[handover.HeldAnswer]int{handover.Equal: 80, handover.NotYet: 80, handover.Never: 0, handover.Different: 0} {
		b := hold(s.block(3, 80, mine))
		for range 2 {
			if err := db.HeardHeldAnswer(ctx, b.BlockRef, answer, blockEvents(b.BlockRef)); err != nil {
				t.Fatal(err)
			}
		}
		if n := left(b); n != want {
			t.Errorf("answered %s: %d atoms left, want %d", answer, n, want)
		}
	}
	if _, err := db.HeardHeld(ctx, handover.Held{BlockRef: same.BlockRef}, kme("KM3"), blockEvents(same.BlockRef)); err == nil {
		t.Error("a KME that is not the link's other end was heard")
	}
	s.check()
}

func TestLeases(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	one, two := s.open("n1"), s.open("n2")
	ctx := t.Context()
	young := s.fill(one, 64, mine)
	s.step(-hour)
	if _, err := one.EnsureEpoch(ctx, s.epoch()); err != nil {
		t.Fatal(err)
	}
	old := s.fill(one, 192, func(i int) handover.End { return []handover.End{handover.Alice, handover.Bob, handover.Alice}[i] })
	leased := func(db *DB, most int) (firsts []int, blocks []int64) {
		t.Helper()
		leases, err := db.Lease(ctx, linkName, most)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range leases {
			firsts, blocks = append(firsts, l.First), append(blocks, l.Block)
		}
		return firsts, blocks
	}
	firsts, blocks := leased(one, 1)
	if !cmp.Equal(firsts, []int{0}) || !cmp.Equal(blocks, []int64{old.Block}) {
		t.Errorf("the first lease: %v of %v; want the oldest epoch's first chunk", firsts, blocks)
	}
	firsts, blocks = leased(two, 5)
	if !cmp.Equal(firsts, []int{128, 0}) || !cmp.Equal(blocks, []int64{old.Block, young.Block}) {
		t.Errorf("another node's lease: %v of %v; want what is left, without the peer's chunk", firsts, blocks)
	}
	if firsts, _ := leased(one, 5); len(firsts) != 0 {
		t.Errorf("leased %v when nothing was free", firsts)
	}
}

func TestEpochs(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ctx := t.Context()
	e := s.epoch() + 7
	made := make(chan bool)
	for range 8 {
		go func() {
			created, err := db.EnsureEpoch(ctx, e)
			if err != nil {
				t.Error(err)
			}
			made <- created
		}()
	}
	n := 0
	for range 8 {
		if <-made {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d of 8 calls made the epoch, want 1", n)
	}
	first, last := key.MinID(e.Start(hour)), key.MinID(e.End(hour))
	bounds := ask[string](s, "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = $1", keyTable(e))
	if want := "FOR VALUES FROM ('" + first.String() + "') TO ('" + last.String() + "')"; bounds != want {
		t.Errorf("the partition is %s, want %s", bounds, want)
	}

	b := s.fill(db, 64, mine)
	if s.end(db, b.Epoch) {
		t.Error("an epoch with keys was dropped")
	}
	if err := db.Burn(ctx, BurnJob{Atoms: ids(b.Atoms), Event: func(burned []key.ID) audit.Event {
		return audit.Event{Action: audit.Burn, Outcome: audit.Done, Atoms: rangeOf(b.BlockRef, 0, len(burned))}
	}}); err != nil {
		t.Fatal(err)
	}
	s.check()
	if !s.end(db, b.Epoch) {
		t.Fatal("an epoch without keys was not dropped")
	}
	if s.end(db, b.Epoch) {
		t.Error("it was dropped again")
	}
	if created, err := db.EnsureEpoch(ctx, b.Epoch); created || err != nil {
		t.Errorf("a dropped epoch was opened again: %v, %v", created, err)
	}
	if err := db.Serve(ctx, ServeJob{Atoms: ids(b.Atoms[:1])}); !errors.Is(err, ErrExpired) {
		t.Errorf("serving from it: %v, want ErrExpired", err)
	}
	due := s.due(key.NewLocalID(s.now()), "bob", "alice")
	due.ExpiryEpoch = b.Epoch
	if err := db.Serve(ctx, ServeJob{Due: []Due{due}}); !errors.Is(err, ErrExpired) {
		t.Errorf("assigning into it: %v, want ErrExpired", err)
	}
	if err := db.Take(ctx, TakeJob{SAE: sae("bob"), Rows: []DueRef{due.ref()}, How: GoneTaken}); !errors.Is(err, ErrExpired) {
		t.Errorf("taking from it: %v, want ErrExpired", err)
	}
}

// TestMissingPartition drops an epoch under a node that does not know it yet: the
// one request that names it is refused, and the others of its batch are done.
func TestMissingPartition(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db, other := s.open("n1"), s.open("n2")
	ctx := t.Context()
	b := s.fill(db, 64, mine)
	gone := b.Epoch + 2
	if !s.end(other, gone) {
		t.Fatal("the epoch was not dropped")
	}
	if !db.epochs.has(gone) {
		t.Fatal("the node knows already")
	}
	release := s.holdUp(db) // so that the jobs below share a batch
	bad := s.due(key.NewLocalID(s.now()), "bob", "alice")
	bad.ExpiryEpoch = gone
	failed, done := make(chan error, 1), make(chan error, 3)
	go func() { failed <- db.Serve(ctx, ServeJob{Due: []Due{bad}}) }()
	for _, a := range b.Atoms[:3] {
		go func() {
			done <- db.Serve(ctx, ServeJob{Atoms: []key.ID{a.ID}, Events: []audit.Event{served("r", b.BlockRef, a)}})
		}()
	}
	s.await("four jobs to wait", func() bool { return len(db.committer.queue) == 4 })
	release()
	if err := <-failed; !errors.Is(err, ErrExpired) {
		t.Errorf("the request that names the missing partition: %v, want ErrExpired", err)
	}
	for range 3 {
		if err := <-done; err != nil {
			t.Errorf("a request beside it: %v", err)
		}
	}
	s.check()
}

func TestKEKs(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db, other := s.open("n1"), s.open("n2")
	ctx := t.Context()
	kek := func(db *DB) KEK {
		id, err := db.PlanKEK(ctx, s.epoch(), db.cfg.Node)
		if err != nil {
			t.Error(err)
		}
		return KEK{ID: id, Epoch: s.epoch(), Label: db.cfg.Node, PKCS11ID: []byte(db.cfg.Node), CheckValue: []byte{1, 2, 3}}
	}
	got := make(chan KEK)
	for _, node := range []*DB{db, other} {
		go func() {
			k, err := node.OpenKEK(ctx, kek(node), 0, audit.Event{Action: audit.KEKMade, Outcome: audit.Done})
			if err != nil {
				t.Error(err)
			}
			got <- k
		}()
	}
	a, b := <-got, <-got
	if diff := cmp.Diff(a, b); diff != "" || a.ID == 0 {
		t.Errorf("two nodes got different KEKs of one epoch:\n%s", diff)
	}
	if err := db.AddWraps(ctx, map[int64]int64{a.ID: 40}); err != nil {
		t.Fatal(err)
	}
	if err := other.AddWraps(ctx, map[int64]int64{a.ID: 2}); err != nil {
		t.Fatal(err)
	}
	a.Wraps = 42
	all, err := db.KEKs(ctx)
	all = slices.DeleteFunc(all, func(k KEK) bool { return k.State == KEKPlanned }) // the slower node's
	if diff := cmp.Diff([]KEK{a}, all); diff != "" || err != nil {
		t.Errorf("KEKs: %v (-want +got):\n%s", err, diff)
	}
	if n := countOf(s.check(), audit.KEKMade); n != 1 {
		t.Errorf("%d events of KEKs made, want 1", n)
	}
	if dead, err := db.DestroyedKEKs(ctx, [][]byte{a.CheckValue}); err != nil || len(dead) != 0 {
		t.Errorf("destroyed KEKs: %v, %v", dead, err)
	}
	if _, err := db.pool.Exec(ctx, "UPDATE kek SET state = 'destroyed' WHERE id = $1", a.ID); err != nil {
		t.Fatal(err)
	}
	if all, err := db.KEKs(ctx); err != nil || slices.ContainsFunc(all, func(k KEK) bool { return k.ID == a.ID }) {
		t.Errorf("a destroyed KEK is still listed: %v, %v", all, err)
	}
	a.State = KEKDestroyed
	dead, err := db.DestroyedKEKs(ctx, [][]byte{{9, 9, 9}, a.CheckValue})
	if diff := cmp.Diff([]KEK{a}, dead); diff != "" || err != nil {
		t.Errorf("destroyed KEKs of its check value: %v (-want +got):\n%s", err, diff)
	}
	if dead, err := db.DestroyedKEKs(ctx, [][]byte{{9, 9, 9}}); err != nil || len(dead) != 0 {
		t.Errorf("destroyed KEKs of another check value: %v, %v", dead, err)
	}
}

func TestLinkIsForEver(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	if err := db.EnsureLink(t.Context(), linkName, kme("KM2"), handover.Alice); err != nil {
		t.Errorf("again: %v", err)
	}
	if err := db.EnsureLink(t.Context(), linkName, kme("KM3"), handover.Alice); err == nil {
		t.Error("another peer was accepted")
	}
	if err := db.EnsureLink(t.Context(), linkName, kme("KM2"), handover.Bob); err == nil {
		t.Error("another end was accepted")
	}
}
