package kme

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/qlink"
)

// distilled is a KME with a link "fibre" to km2, which nobody distils, whose pool holds a
// block of two chunks: its own, and the peer's. secret is the bytes of the block.
func (s *site) distilled(atoms int) (k *KME, l *link, secret []byte) {
	t := s.t.(*testing.T)
	running := s.withToken(tokenDir(t))
	run(t, running)
	k = &KME{metrics: newMetrics(), Config: running.Config, keks: running.keks}
	k.hsmDown.Store("")
	km2 := kmeID(t, "km2")
	if err := k.Store.EnsureLink(t.Context(), "fibre", km2, handover.Alice); err != nil {
		t.Fatal(err)
	}
	if err := k.Store.OpenSession(t.Context(), "fibre", 1, k.own(audit.LinkOpen)); err != nil {
		t.Fatal(err)
	}
	l = newLink(k, LinkConfig{ID: "fibre", Peer: km2, End: handover.Alice, Provenance: key.Simulated})
	l.pool.nodes = one
	k.links = map[string]*link{l.ID: l}
	secret = make([]byte, atoms*key.AtomBytes)
	_, _ = rand.Read(secret)
	terms := distill.Terms{Epoch: int64(key.EpochAt(s.now(), time.Hour)), Owners: "ab"}
	block := qlink.Block{Outcome: distill.Outcome{Session: 1, Terms: terms, Bits: bytes.Clone(secret), Length: atoms * key.AtomBits}, Provenance: key.Simulated}
	if err := l.intake(t.Context(), block); err != nil {
		t.Fatal(err)
	}
	s.change("UPDATE block SET state = 'ready'")
	return k, l, secret
}

// TestSample: a key that both ends compare is gone at each before anybody learns how it
// compared, whatever comes of it; one that the asker does not own is not touched.
func TestSample(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k, l, secret := s.distilled(2 * key.ChunkAtoms)
	km2 := l.Peer
	bytesOf := func(q handover.Sample) []byte { return secret[q.Key.First*key.AtomBytes:][:key.AtomBytes] }
	pooled := func(id key.ID) bool { return s.ask("SELECT count(*) FROM kme.key WHERE id = '"+id.String()+"'") == 1 }
	burned := func() (n int) {
		for _, ev := range s.audit() {
			if ev.Action == string(audit.Burn) {
				n += ev.Count
			}
		}
		return n
	}

	away := errors.New("the network is cut")
	for name, tt := range map[string]struct {
		answer func(handover.Sample) (handover.SampleAnswer, error)
		alarm  string // "": all is well
		says   string
	}{
		"equal": {func(q handover.Sample) (handover.SampleAnswer, error) {
			return handover.SampleAnswer{MAC: q.MAC(bytesOf(q))}, nil
		}, "", "had the same bytes"},
		"other bytes": {func(q handover.Sample) (handover.SampleAnswer, error) {
			other := bytes.Clone(bytesOf(q))
			other[31] ^= 1
			return handover.SampleAnswer{MAC: q.MAC(other)}, nil
		}, "key-mismatch-fibre", "OTHER BYTES"},
		"of another question": {func(q handover.Sample) (handover.SampleAnswer, error) {
			q.Nonce[0] ^= 1
			return handover.SampleAnswer{MAC: q.MAC(bytesOf(q))}, nil
		}, "key-mismatch-fibre", "OTHER BYTES"},
		"lacking": {func(handover.Sample) (handover.SampleAnswer, error) {
			return handover.SampleAnswer{Lacking: true}, nil
		}, "burned-fibre", "does not have"},
		"no answer": {func(handover.Sample) (handover.SampleAnswer, error) {
			return handover.SampleAnswer{}, away
		}, "-", away.Error()},
	} {
		before := burned()
		k.alarms.standing = nil
		var asked handover.Sample
		got := l.sample(t.Context(), identity.Caller{}, "r-1", func(_ context.Context, q handover.Sample) (handover.SampleAnswer, error) {
			if asked = q; pooled(q.Key.ID()) {
				t.Errorf("%s: the peer is asked about a key that can still be handed out", name)
			}
			return tt.answer(q)
		})
		if got.OK != (tt.alarm == "") || !strings.Contains(got.Says, tt.says) {
			t.Errorf("%s: %+v", name, got)
		}
		if err := asked.Check(); err != nil || burned() != before+1 {
			t.Errorf("%s: asked %+v (%v), %d burned", name, asked, err, burned()-before)
		}
		if _, raised := k.alarms.standing[tt.alarm]; raised != strings.Contains(tt.alarm, "fibre") || len(k.alarms.standing) > 1 {
			t.Errorf("%s: alarms %v", name, k.alarms.standing)
		}
	}

	// The other way: the peer asks about the second chunk, which is its own.
	conn, err := pgx.Connect(t.Context(), s.cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	question := func(index int) handover.Sample {
		var id [16]byte
		if err := conn.QueryRow(t.Context(), "SELECT id FROM kme.key WHERE index = $1", index).Scan(&id); err != nil {
			t.Fatal(err)
		}
		return handover.Sample{Link: "fibre", Key: handover.Key{Session: 1, First: index, Atoms: []key.ID{id}}, Nonce: handover.Digest{7}}
	}
	q := question(key.ChunkAtoms)
	before := burned()
	got, err := k.PeerDoor().Sample(t.Context(), km2, q)
	if err != nil || !got.MAC.Equal(q.MAC(bytesOf(q))) || got.Check() != nil || pooled(q.Key.ID()) || burned() != before+1 {
		t.Errorf("the peer's own key: %+v, %v; %d burned", got, err, burned()-before)
	}
	if got, err := k.PeerDoor().Sample(t.Context(), km2, q); err != nil || !got.Lacking || got.Check() != nil || burned() != before+1 {
		t.Errorf("again: %+v, %v, want it lacking", got, err)
	}
	for name, change := range map[string]func(*handover.Sample){
		"a key that is ours": func(q *handover.Sample) { *q = question(key.ChunkAtoms - 1) },
		"another place":      func(q *handover.Sample) { q.Key.First-- },
		"another block":      func(q *handover.Sample) { q.Key.Block++ },
		"no link":            func(q *handover.Sample) { q.Link = "other" },
	} {
		q := question(key.ChunkAtoms + 1)
		change(&q)
		if got, err := k.PeerDoor().Sample(t.Context(), km2, q); problem.KindOf(err) != problem.Unauthorized || got != (handover.SampleAnswer{}) || !pooled(q.Key.ID()) {
			t.Errorf("%s: %+v, %v, want it refused and nothing burned", name, got, err)
		}
	}
	if _, err := k.PeerDoor().Sample(t.Context(), kmeID(t, "km3"), question(key.ChunkAtoms+1)); problem.KindOf(err) != problem.Unauthorized {
		t.Errorf("a third KME: %v, want it refused", err)
	}
	s.change("UPDATE key SET ct = set_bit(ct, 9, 1 - get_bit(ct, 9)) WHERE index = $1", key.ChunkAtoms+1)
	if got, err := k.PeerDoor().Sample(t.Context(), km2, question(key.ChunkAtoms+1)); err != nil || !got.Lacking {
		t.Errorf("a blob that was changed: %+v, %v, want it lacking", got, err)
	}
}

// TestCompareIsBounded: an operator has so many keys burned for a look at them, one more
// after each pause, and is refused in between; another one is not. Each is in the audit.
func TestCompareIsBounded(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	_, l, secret := s.distilled(2 * key.ChunkAtoms)
	root, olga := asSAE(t, "alice", s.now()), asSAE(t, "bob", s.now()) // whose IDs count, not their roles
	answer := func(_ context.Context, q handover.Sample) (handover.SampleAnswer, error) {
		return handover.SampleAnswer{MAC: q.MAC(secret[q.Key.First*key.AtomBytes:][:key.AtomBytes])}, nil
	}
	count := func() (n map[string]int) {
		n = make(map[string]int)
		for _, ev := range s.audit() {
			switch ev.Action {
			case string(audit.Burn):
				n["burned"] += ev.Count
			case string(audit.Compare):
				n[ev.Outcome]++
			}
		}
		return n
	}
	compare := func(c identity.Caller, refused bool) {
		t.Helper()
		before := count()
		got := l.compare(t.Context(), c, "r", answer)
		if !got.OK || strings.HasPrefix(got.Says, "not compared: ") != refused {
			t.Errorf("%+v", got)
		}
		outcome, burned := "done", 1
		if refused {
			outcome, burned = "refused", 0
		}
		if now := count(); now["burned"] != before["burned"]+burned || now[outcome] != before[outcome]+1 {
			t.Errorf("%v before, %v after, want one more %s", before, now, outcome)
		}
	}
	for range sampleBurst {
		compare(root, false)
	}
	compare(root, true)
	compare(olga, false)
	s.step(samplePause)
	compare(root, false)
	compare(root, true)
}
