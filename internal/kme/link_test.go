package kme

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/store"
)

// testLink is an end of a link of a node that runs, and the other end of each classical
// channel is the test.
type testLink struct {
	t *testing.T
	*site
	*link
}

func newTestLink(t *testing.T, end handover.End) *testLink {
	t.Helper()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	t.Cleanup(run(t, k))
	l := newLink(k, LinkConfig{ID: "km1-km2", Peer: kmeID(t, "km2"), End: end, Provenance: key.Simulated, Interval: time.Millisecond, Filler: 64, Random: rand.Reader})
	if err := k.Store.EnsureLink(t.Context(), l.ID, l.Peer, l.End); err != nil {
		t.Fatal(err)
	}
	return &testLink{t, s, l}
}

// streams are the two ends of a classical channel: the link's, and the test's.
func (l *testLink) streams() (ours, theirs *peer.Stream) {
	a, b := net.Pipe()
	ours, theirs = peer.NewStream(a, nil), peer.NewStream(b, nil)
	l.t.Cleanup(func() { ours.Close(); theirs.Close() })
	return ours, theirs
}

// says sends a frame of the test's, whose end has drawn a nonce.
func (l *testLink) says(s *peer.Stream, kind byte, session int64) {
	l.t.Helper()
	if err := say(s, kind, sessionFrame{Link: l.ID, Session: session, Nonce: make([]byte, nonceSize)}); err != nil {
		l.t.Errorf("the other end's frame %d: %v", kind, err)
	}
}

func (l *testLink) hears(s *peer.Stream, kind byte) {
	l.t.Helper()
	if _, err := hear(s, kind); err != nil {
		l.t.Errorf("waiting for frame %d: %v", kind, err)
	}
}

func (l *testLink) now() LinkState {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.link.state
}

// A higher session at Bob's end is another node's, opened since ours was read; one that the
// database does not know even then was lost by it.
func TestHigherSession(t *testing.T) {
	t.Parallel()
	l := newTestLink(t, handover.Alice)
	for _, c := range []struct {
		opened, known int64 // meanwhile, by another node; and as Bob says
		suspends      bool
	}{{5, 5, false}, {8, 7, false}, {9, 10, true}} {
		ours, theirs := l.streams()
		l.Dial = func(context.Context) (*peer.Stream, error) { return ours, nil }
		done := make(chan error, 1)
		go func() { done <- l.alice(t.Context()) }()
		l.hears(theirs, frameOffer)
		if err := l.k.Store.OpenSession(t.Context(), l.ID, c.opened, l.k.own("link-open")); err != nil {
			t.Fatal(err)
		}
		l.says(theirs, frameKnown, c.known)
		if err := <-done; err == nil {
			t.Error("a session was opened")
		}
		if why := l.k.suspended(); (why != "") != c.suspends {
			t.Errorf("session %d is open there, %d here: suspended %q", c.known, c.opened, why)
		}
	}
}

// A call that opens no session leaves the one that is open as it is, and the end of one that
// was replaced says nothing of the one in its place.
func TestReplacedSession(t *testing.T) {
	t.Parallel()
	l := newTestLink(t, handover.Bob)
	call := func() (theirs *peer.Stream, ended chan struct{}) {
		ours, theirs := l.streams()
		ended = make(chan struct{})
		go func() {
			defer close(ended)
			offer, err := hear(ours, frameOffer)
			if err != nil {
				t.Error(err)
			}
			l.follow(t.Context(), ours, offer)
		}()
		return theirs, ended
	}
	open := func(session int64) (theirs *peer.Stream, ended chan struct{}) {
		theirs, ended = call()
		l.says(theirs, frameOffer, session-1)
		l.hears(theirs, frameKnown)
		l.says(theirs, frameOpen, session)
		l.hears(theirs, frameOpen)
		eventually(t, "the session to be open", func() bool { s := l.now(); return s.State == admin.LinkOpen && s.Session == session })
		return theirs, ended
	}
	_, first := open(1)
	for name, say := range map[string]func(*peer.Stream){
		"no higher session": func(s *peer.Stream) {
			l.says(s, frameOffer, 1)
			l.hears(s, frameKnown)
			l.says(s, frameOpen, 1)
		},
		"nothing after the offer": func(s *peer.Stream) {
			l.says(s, frameOffer, 1)
			l.hears(s, frameKnown)
			s.Close()
		},
	} {
		theirs, ended := call()
		say(theirs)
		<-ended
		if s := l.now(); s.State != admin.LinkOpen || s.Session != 1 {
			t.Errorf("%s: the link is %s (%s), session %d", name, s.State, s.Why, s.Session)
		}
	}
	select {
	case <-first:
		t.Fatal("a call that has opened nothing ended the session")
	default:
	}
	theirs, second := open(2)
	<-first
	if s := l.now(); s.State != admin.LinkOpen || s.Session != 2 {
		t.Errorf("since the end of the first session the link is %s (%s), session %d", s.State, s.Why, s.Session)
	}
	theirs.Close()
	<-second
	if s := l.now(); s.State != admin.LinkDown {
		t.Errorf("since the end of the second session the link is %s", s.State)
	}
}

// A block that the other end never ends ends the session, so that another one is opened.
func TestHungBlock(t *testing.T) {
	t.Parallel()
	l := newTestLink(t, handover.Alice)
	l.patience = 100 * time.Millisecond
	ours, theirs := l.streams()
	l.Dial = func(context.Context) (*peer.Stream, error) { return ours, nil }
	done := make(chan error, 1)
	go func() { done <- l.alice(t.Context()) }()
	l.hears(theirs, frameOffer)
	l.says(theirs, frameKnown, 0)
	l.hears(theirs, frameOpen)
	l.says(theirs, frameOpen, 1)
	if _, _, err := theirs.Recv(); err != nil { // the block, which is not answered
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the session ended with %v", err)
	}
}

// No block for long is an alarm at either end, also while one is under way.
func TestNoBlockIsAnAlarm(t *testing.T) {
	t.Parallel()
	for end, watch := range map[handover.End]func(*link, context.Context){handover.Alice: (*link).watchOpen, handover.Bob: (*link).watch} {
		t.Run(end.String(), func(t *testing.T) {
			l := newTestLink(t, end)
			l.update(func(s *LinkState) {
				s.State, s.Session, s.OpenedAt, s.Stage, s.Done = admin.LinkOpen, 1, l.k.Now(), distill.StageReconcile, .5
			})
			after := func(d time.Duration) bool {
				l.step(d)
				watch(l.link, t.Context())
				return alarmed(l.k, "link-"+l.ID)
			}
			if after(blockSlow-2*patience) || after(patience) {
				t.Error("an alarm while a block may still end")
			}
			if after(patience); !after(patience) {
				t.Errorf("no alarm when no block has come for %v", blockSlow)
			}
		})
	}
}

func alarmed(k *KME, name string) bool {
	for _, a := range k.Alarms() {
		if a.Name == name {
			return true
		}
	}
	return false
}

// resting is a source with nothing under way.
type resting struct{ gone chan struct{} }

func (resting) Next(context.Context) (qlink.Block, error) {
	return qlink.Block{}, errors.ErrUnsupported
}

func (resting) Rest() (qlink.Block, error) { return qlink.Block{}, errors.ErrUnsupported }
func (resting) Pending() int               { return 0 }
func (r resting) Gone() <-chan struct{}    { return r.gone }

// A link that rests looks whether it must still, and whether the other end is there.
func TestRest(t *testing.T) {
	t.Parallel()
	l := newTestLink(t, handover.Alice)
	spend := func(s *LinkState) { s.EpsSecrecy = 2 * yearlyEpsilon }
	l.update(spend) // of last year: the database knows of none in this one
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if room, err := l.room(ctx, resting{}); !room || err != nil {
		t.Errorf("in a new year: %v, %v", room, err)
	}
	err := l.k.Store.NoteDistilled(t.Context(), l.ID, store.Distilled{
		Session: 1, Block: 1, At: l.k.Now(), Key: []int{}, Test: []int{}, TestErrors: []int{}, KeyErrors: []int{}, EpsSecrecy: 2 * yearlyEpsilon,
	})
	if err != nil {
		t.Fatal(err)
	}
	l.update(spend)
	r := resting{make(chan struct{})}
	var resting sync.WaitGroup
	resting.Go(func() {
		if room, err := l.room(t.Context(), r); room || err == nil {
			t.Errorf("on a channel that has ended: %v, %v", room, err)
		}
	})
	eventually(t, "the link to rest", func() bool { return l.now().State == admin.LinkPaused })
	close(r.gone)
	resting.Wait()
}

// What is expanded from the secret of both sites is each session's own, whatever its number.
func TestPadsOfTheSecret(t *testing.T) {
	t.Parallel()
	l := &link{LinkConfig: LinkConfig{ID: "l", Secret: func(context.Context) ([]byte, error) { return make([]byte, minAuthSecret), nil }}}
	name := distill.PadName{Session: 1, Index: 1}
	pads := make(map[distill.Pad]bool)
	for _, nonce := range []string{"alice 1 bob 1", "alice 2 bob 1", "alice 1 bob 2"} {
		for range 2 {
			pad, err := (&reserve{l: l, session: 1, nonce: []byte(nonce)}).expand(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			pads[pad] = true
		}
	}
	if len(pads) != 3 {
		t.Errorf("%d pads of three sessions", len(pads))
	}
	a, b := net.Pipe()
	ours, theirs := peer.NewStream(a, nil), peer.NewStream(b, nil)
	defer ours.Close()
	defer theirs.Close()
	go func() { _ = say(theirs, frameOffer, sessionFrame{Link: "l"}) }()
	if _, err := hear(ours, frameOffer); err == nil {
		t.Error("an end that has drawn nothing was heard")
	}
}

// A peer that lies about how many sessions there have been uses up none of those to come: at
// Bob's end no session is opened that there cannot have been, and the highest that is has
// successors as time goes; at Alice's the site is not taken for one that was restored.
func TestNumbersAreNotUsedUp(t *testing.T) {
	t.Parallel()
	bob := newTestLink(t, handover.Bob)
	open := func(session int64) error {
		ours, theirs := bob.streams()
		done := make(chan error, 1)
		go func() {
			offer, err := hear(ours, frameOffer)
			if err == nil {
				err = bob.bob(t.Context(), ours, offer)
			}
			ours.Close()
			done <- err
		}()
		bob.says(theirs, frameOffer, 0)
		bob.hears(theirs, frameKnown)
		bob.says(theirs, frameOpen, session)
		if _, err := hear(theirs, frameOpen); err != nil { // it was refused
			return <-done
		}
		theirs.Close()
		<-done
		return nil
	}
	most := bob.site.now().UnixMilli()
	for _, session := range []int64{handover.MaxNumber, 1 << 42, most + 1} {
		if err := open(session); err == nil || !strings.Contains(err.Error(), "there cannot have been so many") {
			t.Errorf("session %d: %v", session, err)
		}
	}
	if is, err := bob.k.Store.Session(t.Context(), bob.ID); err != nil || is != 0 {
		t.Errorf("session %d was opened, %v", is, err)
	}
	if err := open(most); err != nil {
		t.Errorf("the highest that there can have been: %v", err)
	}
	bob.site.step(time.Second)
	if err := open(most + 1); err != nil {
		t.Errorf("the next one, a second later: %v", err)
	}
}

// TestAbsurdClaims: what a peer says of us that cannot be suspends nobody, and is not begun
// above; what it says of itself is not kept.
func TestAbsurdClaims(t *testing.T) {
	t.Parallel()
	alice := newTestLink(t, handover.Alice)
	ours, theirs := alice.streams()
	alice.Dial = func(context.Context) (*peer.Stream, error) { return ours, nil }
	done := make(chan error, 1)
	go func() { done <- alice.alice(t.Context()) }()
	alice.hears(theirs, frameOffer)
	alice.says(theirs, frameKnown, 1<<47)
	if err := <-done; err == nil || !strings.Contains(err.Error(), "there cannot have been so many") {
		t.Errorf("a session was opened: %v", err)
	}
	judge, _ := core(t)
	k, km2 := alice.k, kmeID(t, "km2")
	k.Policies = judge.Policies
	figures := func(origin, run int64) handover.Figures {
		return handover.Figures{Origin: origin, Nodes: []handover.NodeFigures{{Node: "a", Run: run}}}
	}
	for what, h := range map[string]handover.Hello{
		"our run":     {Run: 1, Yours: figures(1, handover.MaxNumber)},
		"our origin":  {Run: 1, Yours: figures(1<<62, 1)},
		"its run":     {Run: handover.MaxNumber},
		"its site's":  {Run: 1, Site: figures(1, 1<<47)},
		"its origin":  {Run: 1, Site: figures(1<<62, 1)},
		"a session":   {Run: 1, Links: []handover.HelloLink{{Link: "fibre", Session: 1 << 47}}},
		"our batches": {Run: 1, Acked: []handover.Acked{{Node: "a", Run: 1 << 47}}},
	} {
		h.KME, h.Node = km2, "km2-a"
		if _, err := k.PeerDoor().Hello(t.Context(), km2, h); problem.KindOf(err) != problem.Unauthorized {
			t.Errorf("hello with %s: %v, want it refused", what, err)
		}
	}
	if _, err := k.PeerDoor().Run(t.Context(), km2, handover.RunStarted{Node: "km2-a", Run: 1 << 47}); problem.KindOf(err) != problem.Unauthorized {
		t.Errorf("a run: %v, want it refused", err)
	}
	if _, err := k.PeerDoor().Burned(t.Context(), km2, handover.Burned{Origin: 1 << 47}); problem.KindOf(err) != problem.Unauthorized {
		t.Errorf("a recovery: %v, want it refused", err)
	}
	if n := alice.site.ask("SELECT (SELECT count(*) FROM kme.peer_node) + (SELECT count(*) FROM kme.peer_run) + (SELECT count(*) FROM kme.peer_burned)"); n != 0 || k.suspended() != "" {
		t.Errorf("%d rows of it are kept; suspended: %q", n, k.suspended())
	}
}

// TestAbsurdAnswers: nor is it believed, or begun above, when a peer answers so: to a hello, to
// a site that is being recovered, and when it is told of that.
func TestAbsurdAnswers(t *testing.T) {
	t.Parallel()
	const absurd = int64(1) << 47
	s := newSite(t)
	plain := s.withToken(tokenDir(t))
	km2 := s.far(plain, "km2", "fibre", "bob")
	stand(t, km2.k)
	node := func() *KME {
		c := plain.Config
		c.Node = "km1-a"
		c.Store = s.connectAs(c.Node, s.data)
		c.linked(km2)
		k, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	k := node()
	stand(t, k)
	knows := func(s *site) bool { return s.ask("SELECT count(*) FROM kme.peer_node") > 0 }
	run := km2.k.run.Swap(absurd)
	eventually(t, "the peer to be greeted", func() bool { k.greet(t.Context()); return knows(km2.site) })
	if knows(s) {
		t.Error("what it says of itself with a run that there cannot have been is kept")
	}
	km2.k.run.Store(run)
	eventually(t, "the peer to be known", func() bool { k.greet(t.Context()); return knows(s) })
	k.Store.Close()
	if !k.keks.close() {
		t.Fatal("it keeps its copies of KEKs")
	}
	plain.Store.Close() // a recovery wants to be alone
	km2.change(fmt.Sprintf("UPDATE peer_node SET run = %d", absurd))
	k = node()
	var said strings.Builder
	if err := k.Recover(t.Context(), true, &said); err != nil {
		t.Fatal(err)
	}
	if n := s.ask("SELECT max(run) FROM kme.node_run"); n >= absurd || !strings.Contains(said.String(), "km2 does not answer, and cannot say what it remembers") {
		t.Errorf("recovered in run %d:\n%s", n, &said)
	}
	k.Store.Close()

	k = node()
	if err := k.beginRun(t.Context()); err != nil {
		t.Fatal(err)
	}
	told := func() bool {
		t.Helper()
		k.tellBurned(t.Context())
		pending, err := k.Store.BurnedOut(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return len(pending) == 0
	}
	km2.change(fmt.Sprintf("INSERT INTO session (link, id, opened_at) VALUES ('fibre', %d, now())", absurd))
	km2.change(fmt.Sprintf("UPDATE link SET session = %d", absurd))
	if told() {
		t.Error("an answer with a session that there cannot have been is taken")
	}
	km2.change("UPDATE link SET session = 1")
	if !told() {
		t.Error("it is not told")
	}
}
