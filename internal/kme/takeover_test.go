package kme

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/store"
)

// farSite is the KME at the other end of a link of km1: its database, its node, which
// stands, and its door for peers, which may be shut, or slow.
type farSite struct {
	*site
	link   string
	slave  string // an SAE at home there
	k      *KME
	shut   atomic.Bool
	delay  atomic.Int64                       // of each answer, in nanoseconds
	ahead  atomic.Int64                       // its clock, likewise
	lies   atomic.Bool                        // it lists keys without end that it never assigned
	meet   chan struct{}                      // if there is one: before it lists any, it waits until another one is asked that has it
	met    atomic.Bool                        // that it was not the first of these
	says   atomic.Pointer[handover.RunAnswer] // what it lists, whatever is asked
	asked  chan handover.RunStarted           // the questions that are answered with lies, as far as they find a place
	lost   chan loss                          // what becomes of the next announces, while there are any
	client *peer.Client                       // km1's way there
}

// far is a KME that shares clock and token with km1, and lies at Bob's end of a link.
func (s *site) far(km1 *KME, self, link, slave string) *farSite {
	s.t.Helper()
	f := &farSite{site: newSite(s.t), link: link, slave: slave, asked: make(chan handover.RunStarted, 2), lost: make(chan loss, 2)}
	f.self, f.clock = self, s.clock
	c := km1.Config
	c.Self, c.Node, c.DataDir = kmeID(s.t, self), self+"-a", f.data
	c.Store = f.connectAs(c.Node, f.data)
	c.Now = func() time.Time { return f.now().Add(time.Duration(f.ahead.Load())) }
	back, err := peer.NewClient(peer.ClientConfig{Addresses: []string{"localhost:1"}, TLS: new(tls.Config), Still: letIn, Log: c.Log}) // it says nothing by itself
	if err != nil {
		s.t.Fatal(err)
	}
	c.Peers = map[identity.KME]*peer.Client{km1.Self: back}
	c.Links = []LinkConfig{{ID: link, Peer: km1.Self, End: handover.Bob, Provenance: key.Simulated}}
	if f.k, err = New(c); err != nil {
		s.t.Fatal(err)
	}

	asKM1 := func(*http.Request) (identity.Caller, error) {
		return asOne(s.t, identity.RoleKME, km1.Self.String(), s.now()), nil
	}
	door := peer.Handler(farDoor{f.k.PeerDoor(), f}, asKM1, c.Log)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f.shut.Load() {
			panic(http.ErrAbortHandler)
		}
		time.Sleep(time.Duration(f.delay.Load())) // the delay that is played
		if strings.HasSuffix(r.URL.Path, "/announce") {
			select {
			case l := <-f.lost:
				l(w, r, door)
				return
			default:
			}
		}
		door.ServeHTTP(w, r)
	}))
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	srv.StartTLS()
	s.t.Cleanup(srv.Close)
	trust := srv.Client().Transport.(*http.Transport).TLSClientConfig
	if f.client, err = peer.NewClient(peer.ClientConfig{Addresses: []string{srv.Listener.Addr().String()}, TLS: trust, Still: letIn, Log: c.Log}); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(f.client.Close)
	return f
}

// loss is what becomes of an announce instead of reaching the far site and being answered.
type loss func(http.ResponseWriter, *http.Request, http.Handler)

func lostBefore(http.ResponseWriter, *http.Request, http.Handler) { panic(http.ErrAbortHandler) }

func lostAfter(_ http.ResponseWriter, r *http.Request, door http.Handler) {
	door.ServeHTTP(httptest.NewRecorder(), r)
	panic(http.ErrAbortHandler)
}

func declined(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
	_, _ = io.WriteString(w, `{"standing":"declined"}`)
}

func refused(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
	w.WriteHeader(http.StatusForbidden)
}

// farDoor is the door for peers of a far site, which may lie.
type farDoor struct {
	PeerDoor
	f *farSite
}

// Run answers, if it is to lie, with as many keys as there may be in an answer.
func (d farDoor) Run(ctx context.Context, from identity.KME, r handover.RunStarted) (handover.RunAnswer, error) {
	if d.f.meet != nil {
		select {
		case d.f.meet <- struct{}{}:
		case <-d.f.meet:
			d.f.met.Store(true)
		case <-ctx.Done():
			return handover.RunAnswer{}, ctx.Err()
		}
	}
	if says := d.f.says.Load(); says != nil {
		return *says, nil
	}
	if !d.f.lies.Load() {
		return d.PeerDoor.Run(ctx, from, r)
	}
	select {
	case d.f.asked <- r:
	default:
	}
	rows := make([]handover.Assigned, handover.MaxAssigned)
	last := binary.BigEndian.Uint64(r.After[:8])
	for i := range rows {
		var id key.ID
		binary.BigEndian.PutUint64(id[:8], last+uint64(i)+1)
		rows[i] = handover.Assigned{Run: 1, Batch: 1, Key: id, Atoms: []key.ID{id}}
	}
	return handover.RunAnswer{Assigned: rows, UpTo: rows[len(rows)-1].Key}, nil
}

// linked gives km1 links without light in its configuration.
func (c *Config) linked(fars ...*farSite) {
	c.Peers = make(map[identity.KME]*peer.Client)
	for _, f := range fars {
		c.Peers[f.k.Self] = f.client
		c.Links = append(c.Links, LinkConfig{
			ID: f.link, Peer: f.k.Self, End: handover.Alice, Provenance: key.Simulated,
			Dial: func(context.Context) (*peer.Stream, error) { return nil, errors.New("there is no light") },
		})
	}
}

// distilled has both ends hold a block of 64 keys, which km1 assigns.
func (f *farSite) distilled(t *testing.T, s *site, km1 *KME) {
	t.Helper()
	for _, end := range []struct {
		*site
		k *KME
	}{{s, km1}, {f.site, f.k}} {
		l := end.k.links[f.link]
		if err := end.k.Store.OpenSession(t.Context(), l.ID, 1, end.k.own(audit.LinkOpen)); err != nil {
			t.Fatal(err)
		}
		const bits = key.ChunkAtoms * key.AtomBits
		terms := distill.Terms{Epoch: int64(key.EpochAt(s.now(), end.k.EpochLength)), Owners: "a"}
		if err := l.intake(t.Context(), qlink.Block{Provenance: key.Simulated, Outcome: distill.Outcome{
			Session: 1, Block: 1, Terms: terms, Bits: bytes.Repeat([]byte(f.self), bits)[:bits/8], Length: bits,
		}}); err != nil {
			t.Fatal(err)
		}
		end.change("UPDATE block SET state = 'ready' WHERE link = $1", l.ID)
	}
}

// abandoned has a node announce two keys to the peer, which assigns them, and hear no
// answer; and park a third one.
func (f *farSite) abandoned(t *testing.T, km1 *KME) {
	t.Helper()
	l := km1.links[f.link]
	lends, err := l.pool.take(t.Context(), 3, 1)
	if err != nil || len(lends) != 3 {
		t.Fatalf("%d keys in hand, %v", len(lends), err)
	}
	if _, err := km1.assignedAt(t.Context(), l.Peer, handover.RunStarted{Node: km1.Node, Run: km1.run.Load()}); err != nil {
		t.Fatal(err)
	}
	o := order{number: 2, bits: key.AtomBits, ttl: time.Hour}
	batch := handover.Announce{Node: km1.Node, Run: km1.run.Load(), Batch: 1, Requests: []handover.Request{
		l.request("unheard", saeID(t, "alice"), names2(t, f.slave), o, lends[:2], 1),
	}}
	answer, err := l.client.Announce(t.Context(), batch)
	if err != nil || answer.Standing != handover.Fresh || !answer.Results[0].Accepted {
		t.Fatalf("announced: %+v, %v", answer, err)
	}
	if err := km1.Store.Park(t.Context(), atomIDs(lends), 1); err != nil {
		t.Fatal(err)
	}
}

// deliver has alice get keys for an SAE at the far site, who takes them, and counts for
// each key how often it was delivered.
func (f *farSite) deliver(t *testing.T, km1 *KME, number int, delivered map[key.ID]int) error {
	t.Helper()
	o := order{slaves: names2(t, f.slave), number: number, bits: key.AtomBits, ttl: time.Hour}
	asked := km1.callOf(t, "alice", audit.EncKeys)
	asked.ev.Request = fmt.Sprintf("%s-%d", f.link, len(delivered))
	got, err := km1.initiate(t.Context(), asked, o)
	if err != nil {
		return err
	}
	defer wipe(got.keys)
	c := f.k.callOf(t, f.slave, audit.DecKeys)
	c.ev.Keys = keyIDs(got.keys)
	there, err := f.k.take(t.Context(), c, saeID(t, "alice"), c.ev.Keys, false)
	if err != nil {
		return c.refuse(t.Context(), err)
	}
	for i, k := range got.keys {
		delivered[k.ID]++
		if !bytes.Equal(k.Material.Reveal(), there[i].material.Reveal()) {
			t.Errorf("key %s has other bytes at %s", k.ID, f.self)
		}
	}
	return nil
}

// untilDelivered delivers a key as soon as that can be done.
func (f *farSite) untilDelivered(t *testing.T, km1 *KME, delivered map[key.ID]int) {
	t.Helper()
	var last atomic.Value
	defer func() {
		if t.Failed() {
			t.Logf("over link %s: %v", f.link, last.Load())
		}
	}()
	eventually(t, "keys over link "+f.link, func() bool {
		err := f.deliver(t, km1, 1, delivered)
		if err != nil {
			last.Store(err.Error())
		}
		return err == nil
	})
}

// TestPeerAwayAtStart: a node starts anew while one of its two peers is away. It takes
// over from its earlier run at the other one, over whose link it delivers; keys of its own
// site need nobody; and what the earlier run had announced to the peer that is away stays
// untouched until that has said what it assigned. No key is delivered twice, none is lost.
func TestPeerAwayAtStart(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	plain, data := s.withToken(dir), t.TempDir()
	km2, km3 := s.far(plain, "km2", "fibre", "bob"), s.far(plain, "km3", "long", "far")
	again := func() *KME {
		c := plain.Config
		c.Node, c.DataDir, c.Store = "km1-a", data, s.connectAs("km1-a", data)
		c.linked(km2, km3)
		k, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	first := again()
	for _, k := range []*KME{first, km2.k, km3.k} {
		stand(t, k)
	}
	delivered := make(map[key.ID]int)
	for _, f := range []*farSite{km2, km3} {
		f.distilled(t, s, first)
		f.abandoned(t, first)
	}
	first.Store.Close() // it dies

	km2.shut.Store(true)
	k := again()
	run(t, k)
	km3.untilDelivered(t, k, delivered)
	if _, err := get(t, k, 1, time.Hour); err != nil {
		t.Errorf("keys of the site itself: %v", err)
	}
	refused := func() {
		t.Helper()
		err := km2.deliver(t, k, 1, delivered)
		if problem.KindOf(err) != problem.Unavailable || !strings.Contains(err.Error(), "km2 has not said yet what it assigned") {
			t.Errorf("keys over the link of the peer that is away: %v", err)
		}
	}
	refused()
	const fibres, longs = "kme.chunk WHERE run = 1 AND link = 'fibre'", "kme.chunk WHERE run = 1 AND link = 'long'"
	if n := s.ask("SELECT count(*) FROM " + fibres); n != 1 {
		t.Errorf("%d chunks of the earlier run wait for the peer that is away, want 1", n)
	}
	if n := s.ask("SELECT count(*) FROM " + longs); n != 0 {
		t.Errorf("%d chunks of the earlier run wait for the peer that has answered", n)
	}
	if n := s.ask("SELECT count(*) FROM kme.parked"); n != 3 {
		t.Errorf("%d keys are parked, want the 3 that were announced to the peer that is away", n)
	}

	// An operator is told, and from then on there is no more to wait for.
	const alarm = "takeover-km1-a-km2"
	if err := k.OperatorDoor().Ready(t.Context()); err == nil || k.stands(alarm) {
		t.Errorf("ready (%v) before it is known that a peer is away", err)
	}
	s.step(patience)
	eventually(t, "the alarm", func() bool { return k.stands(alarm) })
	if err := k.OperatorDoor().Ready(t.Context()); err != nil {
		t.Errorf("not ready: %v", err)
	}
	refused()

	km2.shut.Store(false)
	km2.untilDelivered(t, k, delivered)
	eventually(t, "the alarm to be over", func() bool { return !k.stands(alarm) })
	for _, f := range []*farSite{km2, km3} {
		eventually(t, "what nobody got to be voided at "+f.self, func() bool { return f.ask("SELECT count(*) FROM kme.due WHERE run = 1 AND gone_how = 'void'") == 2 })
		eventually(t, "all that is left over link "+f.link, func() bool {
			left := s.ask("SELECT coalesce(sum(remaining), 0) FROM kme.chunk WHERE link = '" + f.link + "'")
			if left > 0 {
				_ = f.deliver(t, k, int(min(20, left)), delivered) // on a machine that is busy, an announce may be in doubt
			}
			return left == 0 && f.ask("SELECT count(*) FROM kme.key") == 0
		})
	}
	for id, n := range delivered {
		if n != 1 {
			t.Errorf("key %s was delivered %d times", id, n)
		}
	}
	eventually(t, "nothing to be parked", func() bool { return s.ask("SELECT count(*) FROM kme.parked") == 0 })
	count := func(action string) int64 {
		return s.ask("SELECT coalesce(sum(json_array_length(body::json->'keys')), 0) FROM kme.audit WHERE body::json->>'outcome' = 'done' AND body::json->>'link' <> '' AND body::json->>'action' = '" + action + "'")
	}
	served, burned := count("enc_keys"), count("burn")
	if burned < 4 || served+burned != 2*key.ChunkAtoms || int64(len(delivered)) > served {
		t.Errorf("%d keys were served and %d burned, of %d of which 4 were announced in vain; %d were delivered", served, burned, 2*key.ChunkAtoms, len(delivered))
	}
	took := 0
	for _, ev := range s.audit() {
		if ev.Action == string(audit.Takeover) {
			took++
		}
	}
	if took != 2 {
		t.Errorf("%d takeovers are recorded, want one at each peer", took)
	}
}

// bereaved is the node km1-b of a site with two peers, each of which has a key of a link that
// the node km1-a has leased and will never serve.
func (s *site) bereaved() (km2, km3 *farSite, dead, heir *KME) {
	t := s.t.(*testing.T)
	t.Helper()
	plain := s.withToken(tokenDir(t))
	km2, km3 = s.far(plain, "km2", "fibre", "bob"), s.far(plain, "km3", "long", "far")
	node := func(name string) *KME {
		c := plain.Config
		c.Node, c.DataDir = name, t.TempDir()
		c.Store = s.connectAs(name, c.DataDir)
		c.linked(km2, km3)
		k, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	dead, heir = node("km1-a"), node("km1-b")
	for _, k := range []*KME{dead, heir, km2.k, km3.k} {
		stand(t, k)
	}
	for _, f := range []*farSite{km2, km3} {
		f.distilled(t, s, dead)
		if lends, err := dead.links[f.link].pool.take(t.Context(), 1, 1); err != nil || len(lends) != 1 {
			t.Fatal(lends, err)
		}
	}
	return km2, km3, dead, heir
}

// TestPeersAreAskedAtOnce: a takeover asks no peer after the other: each answers here when
// the other is asked, too.
func TestPeersAreAskedAtOnce(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	km2, km3, dead, heir := s.bereaved()
	km2.meet = make(chan struct{})
	km3.meet = km2.meet
	run, err := heir.depose(t.Context(), store.NodeRun{Node: "km1-a", Run: dead.run.Load()}, "it has leased keys")
	if err != nil {
		t.Fatal(err)
	}
	for range 3 { // on a machine that is busy, one may be asked when the other waits no more
		if err = heir.inherit(t.Context(), run); err == nil {
			break
		}
	}
	if err != nil || !km2.met.Load() && !km3.met.Load() {
		t.Errorf("they were not asked at once: %v", err)
	}
	if n := s.ask("SELECT count(*) FROM kme.chunk WHERE node IS NOT NULL"); n != 0 {
		t.Errorf("%d chunks are not free", n)
	}
}

// TestUselessAnswers: what a peer lists or has looked through that was not asked for is not
// believed: going on from there might have no end.
func TestUselessAnswers(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	km2, _, _, heir := s.bereaved()
	id := func(b byte) key.ID { return key.ID{b} }
	listed := func(ids ...key.ID) (a handover.RunAnswer) {
		for _, id := range ids {
			a.Assigned = append(a.Assigned, handover.Assigned{Run: 1, Batch: 1, Key: id, Atoms: []key.ID{id}})
		}
		return a
	}
	upTo := func(a handover.RunAnswer, id key.ID) handover.RunAnswer { a.UpTo = id; return a }
	for _, test := range []struct {
		name   string
		answer handover.RunAnswer
		ok     bool
	}{
		{"nothing", listed(), true},
		{"what is after it", upTo(listed(id(6), id(7)), id(7)), true},
		{"nothing in what is after it", upTo(listed(), id(6)), true},
		{"what was dealt with", listed(id(5), id(6)), false},
		{"no order", listed(id(7), id(6)), false},
		{"looked through nothing", upTo(listed(), id(5)), false},
		{"looked through less than it lists", upTo(listed(id(6), id(8)), id(7)), false},
	} {
		km2.says.Store(&test.answer)
		got, err := heir.assignedAt(t.Context(), km2.k.Self, handover.RunStarted{Node: "km1-b", Run: heir.run.Load(), After: id(5)})
		if (err == nil) != test.ok || test.ok && len(got.Assigned) != len(test.answer.Assigned) {
			t.Errorf("%s: %+v, %v", test.name, got, err)
		}
	}
}

// TestPeerWithoutEnd: a peer that lists keys without end holds up the takeover of its own
// links alone, and what it is asked next goes on where the last question ended.
func TestPeerWithoutEnd(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	km2, _, dead, heir := s.bereaved()
	run, err := heir.depose(t.Context(), store.NodeRun{Node: "km1-a", Run: dead.run.Load()}, "it has leased keys")
	if err != nil {
		t.Fatal(err)
	}
	leased := func(link string) int64 {
		return s.ask("SELECT count(*) FROM kme.chunk WHERE node = 'km1-a' AND link = '" + link + "'")
	}
	km2.lies.Store(true)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- heir.inherit(ctx, run) }()
	first, second := <-km2.asked, <-km2.asked
	if second.After == first.After || first.After != (key.ID{}) {
		t.Errorf("asked for what comes after %s, and then after %s", first.After, second.After)
	}
	eventually(t, "the other peer's link to be free", func() bool { return leased("long") == 0 })
	if n := leased("fibre"); n != 1 {
		t.Errorf("%d chunks wait for the peer that does not come to an end", n)
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("the takeover at the peer that does not come to an end is done")
	}
	for len(km2.asked) > 0 {
		<-km2.asked
	}
	again, stop := context.WithCancel(t.Context())
	defer stop()
	go func() { ended <- heir.inherit(again, run) }()
	if on := <-km2.asked; bytes.Compare(on.After[:], second.After[:]) < 0 {
		t.Errorf("asked again for what comes after %s, and that was dealt with up to %s", on.After, second.After)
	}
	stop()
	<-ended
	heir.reclaimFor = time.Millisecond
	patient, impatient := context.WithTimeout(t.Context(), time.Minute)
	defer impatient()
	if err := heir.inherit(patient, run); err == nil || patient.Err() != nil {
		t.Errorf("a takeover at it does not end by itself: %v", err)
	}
	heir.reclaimFor = reclaimTime
	km2.lies.Store(false)
	if err := heir.inherit(t.Context(), run); err != nil || leased("fibre") != 0 {
		t.Errorf("when it lies no more: %v, %d chunks are not free", err, leased("fibre"))
	}
}

// letIn is for whoever passed TLS.
func letIn(*x509.Certificate) error { return nil }
