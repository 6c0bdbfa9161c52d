package store

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// request asks for one key of the atoms given, for alice there and bob here.
func request(id string, b handover.BlockRef, atoms ...Atom) handover.Request {
	return handover.Request{
		ID: id, Link: b.Link, Master: sae("alice"), Slaves: []identity.SAE{sae("bob")}, Bits: 256 * len(atoms), TTL: hour.Milliseconds(),
		Keys: []handover.Key{{Session: b.Session, Block: b.Block, First: atoms[0].Index, Atoms: ids(atoms)}},
	}
}

// assignJob is the receiver's commit of the requests, everything sealed.
func (s *site) assignJob(run, batch int64, requests ...handover.Request) AssignJob {
	j := AssignJob{
		Peer: kme("KM2"), Announce: handover.Announce{Node: "p1", Run: run, Batch: batch, Requests: requests},
		Admit: func(handover.Request) string { return "" },
		Due:   make(map[string][]Due),
		Event: func(r handover.Request, res handover.Result) audit.Event {
			ev := audit.Event{Action: audit.Assign, Outcome: audit.Done, Request: r.ID}
			if !res.Accepted {
				ev.Outcome, ev.Reason = audit.Refused, res.Why
				return ev
			}
			for _, k := range r.Keys {
				ev.Keys = append(ev.Keys, k.ID())
				ev.Atoms = append(ev.Atoms, audit.Atoms{Link: r.Link, Session: k.Session, Block: k.Block, First: k.First, Count: len(k.Atoms)})
			}
			return ev
		},
		Ready: func(ref handover.BlockRef) audit.Event {
			return audit.Event{Action: audit.Ready, Outcome: audit.Done, Link: ref.Link}
		},
	}
	for _, r := range requests {
		for _, k := range r.Keys {
			for _, slave := range r.Slaves {
				j.Due[r.ID] = append(j.Due[r.ID], s.due(k.ID(), slave.String(), r.Master.String()))
			}
		}
	}
	return j
}

// mustAssign assigns and checks what each request is answered: "" for accepted.
func mustAssign(t *testing.T, db *DB, j AssignJob, standing handover.Standing, whys ...string) handover.AnnounceAnswer {
	t.Helper()
	answer, err := db.Assign(t.Context(), j)
	if err != nil {
		t.Fatal(err)
	}
	if answer.Standing != standing {
		t.Fatalf("batch %d of run %d is %s, want %s", j.Announce.Batch, j.Announce.Run, answer.Standing, standing)
	}
	var got []string
	for _, r := range answer.Results {
		if r.Accepted != (r.Why == "") {
			t.Errorf("result %+v", r)
		}
		got = append(got, r.Why)
	}
	if diff := cmp.Diff(whys, got); diff != "" {
		t.Errorf("batch %d: answers (-want +got):\n%s", j.Announce.Batch, diff)
	}
	return answer
}

func hear(t *testing.T, db *DB, run int64) []handover.Assigned {
	t.Helper()
	answer, ok, err := db.HearRun(t.Context(), kme("KM2"), handover.RunStarted{Node: "p1", Run: run})
	if err != nil || !ok {
		t.Fatalf("HearRun %d: %v, %v", run, ok, err)
	}
	return answer.Assigned
}

func TestAssignMovesKeys(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 128, theirs)
	job := s.assignJob(1, 1, request("r1", b.BlockRef, b.Atoms[0]), request("r2", b.BlockRef, b.Atoms[1:4]...))
	mustAssign(t, db, job, handover.Ahead) // the run was not told
	hear(t, db, 1)
	mustAssign(t, db, s.assignJob(1, 2), handover.Ahead)
	mustAssign(t, db, job, handover.Fresh, "", "")
	mustAssign(t, db, s.assignJob(0, 1), handover.Stale)

	rows, _, err := db.FindDue(t.Context(), sae("bob"), []key.ID{b.Atoms[0].ID, b.Atoms[1].ID})
	if err != nil || len(rows) != 2 {
		t.Fatalf("FindDue: %d rows, %v", len(rows), err)
	}
	if d := rows[b.Atoms[1].ID]; d.Peer != kme("KM2") || d.Node != "p1" || d.Run != 1 || d.Batch != 1 || d.Bits != 256 {
		t.Errorf("the due row: %+v", d)
	}
	if here, there, err := db.Pool(t.Context(), linkName); here != 0 || there != 124 || err != nil {
		t.Errorf("Pool: %d here, %d there, %v; want 0, 124", here, there, err)
	}
	p, err := db.PeerRun(t.Context(), kme("KM2"), "p1")
	if err != nil || p != (handover.PeerRun{Run: 1, Last: 1}) {
		t.Errorf("PeerRun: %+v, %v", p, err)
	}
	s.check()
}

// TestAssignAnswersAlike sends a batch again and again: it is answered the same
// from the rows, also after its keys were taken, until a void.
func TestAssignAnswersAlike(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 64, theirs)
	hear(t, db, 1)
	unknown := s.block(1, 1, theirs)
	job := s.assignJob(1, 1,
		request("r1", b.BlockRef, b.Atoms[0]), request("lacking", unknown.BlockRef, unknown.Atoms[0]), request("r3", b.BlockRef, b.Atoms[2]))
	const lacking, notBy = "atoms not in the pool", "not assigned by this batch"
	first := mustAssign(t, db, job, handover.Fresh, "", lacking, "")
	if diff := cmp.Diff([]key.ID{unknown.Atoms[0].ID}, first.Results[1].Lacking); diff != "" {
		t.Errorf("lacking (-want +got):\n%s", diff)
	}
	again := mustAssign(t, db, job, handover.Repeat, "", notBy, "")
	if diff := cmp.Diff(first.Results[1].Lacking, again.Results[1].Lacking); diff != "" {
		t.Errorf("lacking, repeated (-first +again):\n%s", diff)
	}
	take := TakeJob{SAE: sae("bob"), Rows: []DueRef{job.Due["r1"][0].ref()}, How: GoneTaken}
	if err := db.Take(t.Context(), take); err != nil {
		t.Fatal(err)
	}
	mustAssign(t, db, job, handover.Repeat, "", notBy, "")

	void := handover.Void{Node: "p1", Run: 1, Batch: 1, Keys: ids(b.Atoms[:3])}
	var voided []key.ID
	event := func(ids []key.ID) audit.Event {
		voided = ids
		return audit.Event{Action: audit.VoidKeys, Outcome: audit.Done, Keys: ids}
	}
	for _, wrong := range []handover.Void{
		{Node: "p2", Run: 1, Batch: 1, Keys: void.Keys}, {Node: "p1", Run: 2, Batch: 1, Keys: void.Keys}, {Node: "p1", Run: 1, Batch: 2, Keys: void.Keys},
	} {
		if err := db.Void(t.Context(), kme("KM2"), wrong, event); err != nil || voided != nil {
			t.Errorf("void %+v: %v, voided %v", wrong, err, voided)
		}
	}
	if err := db.Void(t.Context(), kme("KM3"), void, event); err != nil || voided != nil {
		t.Errorf("void by another KME: %v, voided %v", err, voided)
	}
	if err := db.Void(t.Context(), kme("KM2"), void, event); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]key.ID{b.Atoms[2].ID}, voided); diff != "" {
		t.Errorf("voided, when the first was taken (-want +got):\n%s", diff)
	}
	mustAssign(t, db, job, handover.Repeat, "", notBy, notBy)
	voided = nil
	if err := db.Void(t.Context(), kme("KM2"), void, event); err != nil || voided != nil {
		t.Errorf("the void again: %v, voided %v", err, voided)
	}
	if err := db.Take(t.Context(), TakeJob{SAE: sae("bob"), Rows: []DueRef{job.Due["r3"][0].ref()}, How: GoneTaken}); !errors.Is(err, ErrShort) {
		t.Errorf("taking a voided key: %v, want ErrShort", err)
	}
	events := s.check()
	if n := countOf(events, audit.VoidKeys); n != 1 {
		t.Errorf("%d void events, want 1", n)
	}
	if n := countOf(events, audit.Assign); n != 3 {
		t.Errorf("%d assign events, want one for each request", n)
	}
}

// TestConflictsTogether: announces of many nodes come in one batch, and of each the pool has
// changed since it was looked at. Each is answered, and the database is not unwell for that.
func TestConflictsTogether(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 64, theirs)
	var jobs []AssignJob
	for i := range 2 * maxTries {
		node := fmt.Sprint("p", i)
		if _, ok, err := db.HearRun(t.Context(), kme("KM2"), handover.RunStarted{Node: node, Run: 1}); err != nil || !ok {
			t.Fatal(ok, err)
		}
		r := request(node, b.BlockRef, b.Atoms[i])
		j := s.assignJob(1, 1, r)
		j.Announce.Node = node
		var err error
		if j.Seen, err = db.PoolAtoms(t.Context(), r.Keys, linkName); err != nil || len(j.Seen) != 1 {
			t.Fatal(j.Seen, err)
		}
		jobs = append(jobs, j)
	}
	burn := BurnJob{Atoms: ids(b.Atoms[:len(jobs)]), Event: func([]key.ID) audit.Event {
		return audit.Event{Action: audit.Burn, Outcome: audit.Done, Atoms: rangeOf(b.BlockRef, 0, len(jobs))}
	}}
	if err := db.Burn(t.Context(), burn); err != nil {
		t.Fatal(err)
	}
	release := s.holdUp(db)
	mark := func() int64 { return ask[int64](s, "SELECT mark FROM node_run WHERE node = 'n1'") }
	before := mark()
	answers := make(chan error)
	for _, j := range jobs {
		go func() {
			answer, err := db.Assign(t.Context(), j)
			if err == nil && (answer.Standing != handover.Fresh || len(answer.Results[0].Lacking) != 1) {
				err = fmt.Errorf("answered %+v", answer)
			}
			answers <- err
		}()
	}
	s.await("all announces to wait", func() bool { return len(db.committer.queue) == len(jobs) })
	release()
	for range jobs {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	if err := db.Healthy(); err != nil {
		t.Error(err)
	}
	if n := mark() - before; n > 4 { // what held them up; all of them believed, with the places of their rows and without; and none
		t.Errorf("it took %d attempts", n)
	}
	s.check()
}

// TestAssignTrustsNothing sends requests that no honest peer sends.
func TestAssignTrustsNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	ours := s.fill(db, 64, mine)
	b := s.fill(db, 64, theirs)
	hear(t, db, 1)
	displaced := request("r2", b.BlockRef, b.Atoms[1])
	displaced.Keys[0].First = 7
	otherLink := request("r3", b.BlockRef, b.Atoms[2])
	otherLink.Link = "another"
	otherBlock := request("r4", ours.BlockRef, b.Atoms[3])
	strange := request("r7", b.BlockRef, b.Atoms[6])
	strange.Keys[0].Atoms = []key.ID{{1, 2, 3}} // of an epoch that never was
	job := s.assignJob(1, 1,
		request("r1", ours.BlockRef, ours.Atoms[0]), displaced, otherLink, otherBlock,
		request("r5", b.BlockRef, b.Atoms[4]), request("r6", b.BlockRef, b.Atoms[5]), strange,
		request("r8", b.BlockRef, b.Atoms[8]), request("r9", b.BlockRef, b.Atoms[8]))
	delete(job.Due, "r5")
	job.Due["r6"][0].Master = sae("mallory")
	mustAssign(t, db, job, handover.Fresh,
		"a chunk that is owned here", "atoms that lie elsewhere", "atoms that lie elsewhere", "atoms that lie elsewhere",
		"not sealed in time", "not sealed in time", "atoms not in the pool", "", "atoms not in the pool")
	empty := s.assignJob(1, 2)
	empty.Announce.Requests = []handover.Request{{ID: "none", Keys: []handover.Key{{}}}}
	if _, err := db.Assign(t.Context(), empty); err == nil {
		t.Error("a key of no atoms was not refused")
	}
	if n := ask[int](s, "SELECT count(*) FROM due"); n != 1 {
		t.Errorf("%d due rows, want 1", n)
	}
	s.check()
}

// TestAnnounceMakesReady: an announce from a HELD block says that the peer holds it.
func TestAnnounceMakesReady(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	hear(t, db, 1)
	if err := db.OpenSession(t.Context(), linkName, 1, audit.Event{Action: audit.LinkOpen}); err != nil {
		t.Fatal(err)
	}
	b := s.block(1, 64, theirs)
	if err := db.HoldBlock(t.Context(), b, holdEvent(b)); err != nil {
		t.Fatal(err)
	}
	mustAssign(t, db, s.assignJob(1, 1, request("r1", b.BlockRef, b.Atoms[0])), handover.Fresh, "")
	mustAssign(t, db, s.assignJob(1, 2, request("r2", b.BlockRef, b.Atoms[1])), handover.Fresh, "")
	if held, err := db.HeldBlocks(t.Context(), linkName); len(held) != 0 || err != nil {
		t.Errorf("still held: %v, %v", held, err)
	}
	if n := countOf(s.check(), audit.Ready); n != 1 {
		t.Errorf("%d ready events, want 1", n)
	}
}

// TestHearRun lists what was assigned for lower runs and not voided, all atoms of
// large keys, whenever it is asked, and refuses batches of lower runs from then on.
func TestHearRun(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 64, theirs)
	if rows := hear(t, db, 3); len(rows) != 0 {
		t.Errorf("nothing was assigned, and got %v", rows)
	}
	multicast := request("r2", b.BlockRef, b.Atoms[1:4]...)
	multicast.Slaves = append(multicast.Slaves, sae("carol"))
	mustAssign(t, db, s.assignJob(3, 1, request("r1", b.BlockRef, b.Atoms[0])), handover.Fresh, "")
	mustAssign(t, db, s.assignJob(3, 2, multicast), handover.Fresh, "")
	if rows := hear(t, db, 3); len(rows) != 0 {
		t.Errorf("of lower runs than 3 nothing was assigned, and got %v", rows)
	}
	voided := b.Atoms[0].ID
	want := []handover.Assigned{
		{Run: 3, Batch: 1, Key: voided, Atoms: ids(b.Atoms[:1])},
		{Run: 3, Batch: 2, Key: b.Atoms[1].ID, Atoms: ids(b.Atoms[1:4])},
	}
	slices.SortFunc(want, func(x, y handover.Assigned) int { return bytes.Compare(x.Key[:], y.Key[:]) })
	for i := range 3 {
		if i == 2 { // it had been burned there
			want = slices.DeleteFunc(want, func(a handover.Assigned) bool { return a.Key == voided })
		}
		if diff := cmp.Diff(want, hear(t, db, 4)); diff != "" {
			t.Errorf("assigned (-want +got):\n%s", diff)
		}
		if i == 0 {
			continue
		}
		void := handover.Void{Node: "p1", Run: 3, Batch: 1, Keys: ids(b.Atoms[:1])}
		if err := db.Void(t.Context(), kme("KM2"), void, func([]key.ID) audit.Event { return audit.Event{Action: audit.VoidKeys} }); err != nil {
			t.Fatal(err)
		}
	}
	mustAssign(t, db, s.assignJob(3, 3, request("r3", b.BlockRef, b.Atoms[5])), handover.Stale)
	if _, ok, err := db.HearRun(t.Context(), kme("KM2"), handover.RunStarted{Node: "p1", Run: 3}); ok || err != nil {
		t.Errorf("hearing a lower run: %v, %v; want it refused", ok, err)
	}
	if answer, ok, err := db.HearRun(t.Context(), kme("KM3"), handover.RunStarted{Node: "p1", Run: 9}); len(answer.Assigned) != 0 || !ok || err != nil {
		t.Errorf("another KME's node of the same name: %+v, %v, %v", answer, ok, err)
	}
	mustAssign(t, db, s.assignJob(4, 1, request("r4", b.BlockRef, b.Atoms[5])), handover.Fresh, "")
	s.check()
}

// TestAssignBelieving gives Assign what was seen of the pool before: as long as that
// is still so it is decided by it, and otherwise as if nothing had been seen.
func TestAssignBelieving(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 192, theirs)
	hear(t, db, 1)
	job := func(batch int64, requests ...handover.Request) AssignJob {
		j := s.assignJob(1, batch, requests...)
		var refs []handover.Key
		for _, r := range requests {
			refs = append(refs, r.Keys...)
		}
		var err error
		if j.Seen, err = db.PoolAtoms(t.Context(), refs, linkName); err != nil {
			t.Fatal(err)
		}
		return j
	}
	first := job(1, request("r1", b.BlockRef, b.Atoms[0]), request("r2", b.BlockRef, b.Atoms[1:4]...))
	mustAssign(t, db, first, handover.Fresh, "", "")
	mustAssign(t, db, first, handover.Repeat, "", "")

	before := job(2, request("r3", b.BlockRef, b.Atoms[3]), request("r4", b.BlockRef, b.Atoms[4])) // one is gone, and was not seen
	mustAssign(t, db, before, handover.Fresh, "atoms not in the pool", "")
	gone := job(4, request("r6", b.BlockRef, b.Atoms[5]), request("r7", b.BlockRef, b.Atoms[6])) // one goes after it was seen
	mustAssign(t, db, job(3, request("r5", b.BlockRef, b.Atoms[5])), handover.Fresh, "")
	mustAssign(t, db, gone, handover.Fresh, "atoms not in the pool", "")

	given := job(5, request("r8", b.BlockRef, b.Atoms[64]), request("r9", b.BlockRef, b.Atoms[7])) // the chunk of one becomes ours
	s.super(func(conn *pgx.Conn) error {
		_, err := conn.Exec(t.Context(), "UPDATE chunk SET owner = 'here' WHERE first = 64")
		return err
	})
	mustAssign(t, db, given, handover.Fresh, "a chunk that is owned here", "")
	refused := job(6, request("ra", b.BlockRef, b.Atoms[8]), request("rb", b.BlockRef, b.Atoms[9]))
	refused.Admit = func(r handover.Request) string { return map[string]string{"ra": "not you"}[r.ID] }
	mustAssign(t, db, refused, handover.Fresh, "not you", "")
	early := job(8, request("rc", b.BlockRef, b.Atoms[10]))
	mustAssign(t, db, early, handover.Ahead)
	if here, there, err := db.Pool(t.Context(), linkName); here != 64 || there != 128-9 || err != nil {
		t.Errorf("the pool holds %d and %d, %v", here, there, err)
	}
	s.check()
}

// TestHearRunOfMany has more keys assigned than one answer holds, and many more that were
// taken: asked on, all of them are listed, each once, in the order of IDs, and no answer
// looks through more of the others than it may.
func TestHearRunOfMany(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 64, theirs)
	hear(t, db, 1)
	mustAssign(t, db, s.assignJob(1, 1, request("r1", b.BlockRef, b.Atoms[0])), handover.Fresh, "")
	const more, taken = 2*handover.MaxAssigned + 7, maxLooked
	s.super(func(conn *pgx.Conn) error {
		_, err := conn.Exec(t.Context(), `INSERT INTO due (key_id, sae, expiry_epoch, master, bits, provenance, kek, peer, node, run, batch, expires_at, reread, iv, ct, gone_at, gone_how)
			SELECT encode(set_byte(uuid_send(gen_random_uuid()), 0, CASE WHEN n > $1 THEN 100 ELSE 200 END), 'hex')::uuid, sae, expiry_epoch, master, bits, provenance, kek, peer, node, run, batch,
				expires_at, reread, CASE WHEN n <= $1 THEN iv END, CASE WHEN n <= $1 THEN ct END, CASE WHEN n > $1 THEN expires_at END, CASE WHEN n > $1 THEN 'taken' END
			FROM (SELECT * FROM due LIMIT 1) AS one, generate_series(1, $1::int + $2::int) n`, more, taken)
		return err
	})
	started := handover.RunStarted{Node: "p1", Run: 2}
	listed, questions := 0, 0
	for {
		answer, ok, err := db.HearRun(t.Context(), kme("KM2"), started)
		if err == nil {
			err = answer.Check()
		}
		if err != nil || !ok {
			t.Fatalf("HearRun: %v, %v", ok, err)
		}
		const looked = "SELECT count(*) FROM due WHERE key_id > $1::text::uuid AND ($2::text = '00000000-0000-0000-0000-000000000000' OR key_id <= $2::text::uuid)"
		if n := ask[int](s, looked, started.After.String(), answer.UpTo.String()); n > maxLooked {
			t.Errorf("%d keys were looked through for an answer", n)
		}
		for _, r := range answer.Assigned {
			if bytes.Compare(r.Key[:], started.After[:]) <= 0 {
				t.Fatalf("key %s is listed after %s", r.Key, started.After)
			}
		}
		listed += len(answer.Assigned)
		if questions++; answer.UpTo == (key.ID{}) {
			break
		}
		started.After = answer.UpTo
	}
	if listed != more+1 || questions != 4 {
		t.Errorf("%d keys were listed in %d answers, want %d in 4", listed, questions, more+1)
	}
}

// TestAssignInOrder has the batches of a run come all at once and in any order:
// each is committed after the one before it, or told to come again.
func TestAssignInOrder(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 64, theirs)
	hear(t, db, 1)
	const batches = 12
	type result struct {
		batch    int
		standing handover.Standing
		err      error
	}
	results := make(chan result)
	send := func(batch int) {
		job := s.assignJob(1, int64(batch), request(fmt.Sprint("r", batch), b.BlockRef, b.Atoms[batch]))
		go func() {
			answer, err := db.Assign(t.Context(), job)
			if err == nil && answer.Standing != handover.Ahead && !answer.Results[0].Accepted {
				err = errors.New(answer.Results[0].Why)
			}
			results <- result{batch, answer.Standing, err}
		}()
	}
	for i := batches; i > 0; i-- {
		send(i)
		send(i) // and again, as if the answer had been lost
	}
	for done := 0; done < 2*batches; {
		r := <-results
		switch {
		case r.err != nil:
			t.Fatalf("batch %d: %v", r.batch, r.err)
		case r.standing == handover.Ahead:
			send(r.batch)
		default:
			done++
		}
	}
	if n := countOf(s.check(), audit.Assign); n != batches {
		t.Errorf("%d assign events, want %d", n, batches)
	}
}
