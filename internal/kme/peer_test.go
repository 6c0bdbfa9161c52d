package kme

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// TestAdmit: what a peer's announce may ask for, whatever the pool holds.
func TestAdmit(t *testing.T) {
	t.Parallel()
	_, l := core(t)
	limits := l.k.Limits()
	good := func() handover.Request {
		return handover.Request{
			ID: "r", Link: "fibre", Master: saeID(t, "bob"), Slaves: []identity.SAE{saeID(t, "alice")}, Bits: key.AtomBits, TTL: time.Hour.Milliseconds(),
			Keys: []handover.Key{{Session: 1, Atoms: []key.ID{{1}}}},
		}
	}
	for name, tt := range map[string]struct {
		change func(*handover.Request)
		want   string
	}{
		"good":                  {func(*handover.Request) {}, ""},
		"all that one may have": {func(r *handover.Request) { r.Keys = slices.Repeat(r.Keys, 100); r.TTL = l.k.MaxTTL.Milliseconds() }, ""},
		"a master of two homes": {func(r *handover.Request) { r.Master = saeID(t, "both") }, ""},
		"too small":             {func(r *handover.Request) { r.Bits = limits.MinSize - 8 }, "size of"},
		"too large":             {func(r *handover.Request) { r.Bits = limits.MaxSize + 8 }, "size of"},
		"not whole bytes":       {func(r *handover.Request) { r.Bits = limits.MaxSize - 1 }, "size of"},
		"no keys":               {func(r *handover.Request) { r.Keys = nil }, "0 keys"},
		"too many keys":         {func(r *handover.Request) { r.Keys = slices.Repeat(r.Keys, limits.MaxPerRequest+1) }, "keys"},
		"over already":          {func(r *handover.Request) { r.TTL = 0 }, "lifetime of 0s"},
		"a negative lifetime":   {func(r *handover.Request) { r.TTL = -1 }, "lifetime"},
		"too long a lifetime":   {func(r *handover.Request) { r.TTL = l.k.MaxTTL.Milliseconds() + 1 }, "lifetime of 24h0m0.001s"},
		"nobody":                {func(r *handover.Request) { r.Slaves = nil }, "0 slaves"},
		"too many slaves":       {func(r *handover.Request) { r.Slaves = slices.Repeat(r.Slaves, limits.MaxSAEs+2) }, "slaves"},
		"our SAE as the master": {func(r *handover.Request) { r.Master = saeID(t, "anna") }, "master anna is not homed at km2"},
		"a third KME's master":  {func(r *handover.Request) { r.Master = saeID(t, "far") }, "master far is not homed at km2"},
		"their SAE as a slave":  {func(r *handover.Request) { r.Slaves[0] = saeID(t, "stranger") }, "slave stranger is not homed at km1"},
		"our policy forbids":    {func(r *handover.Request) { r.Master = saeID(t, "stranger") }, "policy here does not let stranger share keys with alice"},
		"our policy's number":   {func(r *handover.Request) { r.Keys = slices.Repeat(r.Keys, 101) }, "policy here does not let bob"},
		"too many atoms":        {func(r *handover.Request) { r.Keys[0].Atoms = make([]key.ID, 2) }, "2 atoms for 256 bits"},
		"no atoms":              {func(r *handover.Request) { r.Keys[0].Atoms = nil }, "0 atoms for 256 bits"},
	} {
		r := good()
		tt.change(&r)
		if got := l.admit(r); (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
	l.k.Production = true
	if got := l.admit(good()); !strings.Contains(got, "production") {
		t.Errorf("simulated keys at a production node: %q", got)
	}
}

// TestStrangeNode: what comes in the name of a node that the peer does not have is
// refused and recorded, and leaves nothing else.
func TestStrangeNode(t *testing.T) {
	t.Parallel()
	judge, _ := core(t)
	s := newSite(t)
	k := s.node()
	k.Policies, k.links = judge.Policies, judge.links
	km2 := kmeID(t, "km2")
	for _, name := range []string{"km2-b", "km1-a", "a", ""} {
		_, hello := k.PeerDoor().Hello(t.Context(), km2, handover.Hello{KME: km2, Node: name, Run: 1})
		_, run := k.PeerDoor().Run(t.Context(), km2, handover.RunStarted{Node: name, Run: 1})
		_, announce := k.PeerDoor().Announce(t.Context(), km2, handover.Announce{Node: name, Run: 1, Batch: 1})
		for what, err := range map[string]error{"hello": hello, "run": run, "announce": announce} {
			if problem.KindOf(err) != problem.Unauthorized {
				t.Errorf("%s of node %q: %v, want it refused", what, name, err)
			}
		}
		if known, err := k.Store.PeerRun(t.Context(), km2, name); err != nil || known.Run != 0 {
			t.Errorf("node %q is known: %+v, %v", name, known, err)
		}
	}
	events := s.audit()
	if len(events) != 12 || events[0] != (told{"malformed", "refused", `km2 has no node "km2-b"`, 0}) {
		t.Errorf("%d events, the first %+v", len(events), events[0])
	}
	if _, err := k.PeerDoor().Run(t.Context(), km2, handover.RunStarted{Node: "km2-a", Run: 1}); err != nil {
		t.Errorf("run of a node that there is: %v", err)
	}
	if _, err := k.PeerDoor().Run(t.Context(), km2, handover.RunStarted{Node: "km2-a", Run: 2}); err != nil {
		t.Error(err)
	}
	_, err := k.PeerDoor().Run(t.Context(), km2, handover.RunStarted{Node: "km2-a", Run: 1})
	if events = s.audit(); problem.KindOf(err) != problem.Invalid || events[len(events)-1] != (told{"malformed", "refused", "invalid: a higher run of node km2-a is known", 0}) {
		t.Errorf("a run that is over: %v, and the event %+v", err, events[len(events)-1])
	}
}

// TestOneSearchAtATime: what a peer asks that takes a search waits for what it has asked
// before, no longer than it would itself, and for nobody else's.
func TestOneSearchAtATime(t *testing.T) {
	t.Parallel()
	d := PeerDoor{new(KME)}
	leave, err := d.turn(t.Context(), kmeID(t, "km2"))
	if err != nil {
		t.Fatal(err)
	}
	other, err := d.turn(t.Context(), kmeID(t, "km3"))
	if err != nil {
		t.Fatalf("another peer: %v", err)
	}
	other()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.turn(gone, kmeID(t, "km2")); problem.KindOf(err) != problem.Unavailable {
		t.Errorf("the same peer: %v, want that it comes again", err)
	}
	leave()
	if _, err := d.turn(t.Context(), kmeID(t, "km2")); err != nil {
		t.Errorf("when the first is answered: %v", err)
	}
}

// TestAccept: Bob's end takes his own clock's epoch, and the neighbour close to the
// border, and an owner for each chunk.
func TestAccept(t *testing.T) {
	t.Parallel()
	_, l := core(t)
	c := newClock() // half past
	l.k.Now = c.now
	this := key.EpochAt(c.now(), time.Hour)
	border := this.End(time.Hour)
	for _, tt := range []struct {
		at    time.Time
		epoch key.Epoch
		want  bool
	}{
		{c.now(), this, true},
		{c.now(), this + 1, false},
		{c.now(), this - 1, false},
		{border.Add(-epochSlack), this + 1, true},
		{border.Add(-epochSlack - time.Millisecond), this + 1, false},
		{border.Add(epochSlack), this, true},
		{border.Add(epochSlack + time.Millisecond), this, false},
		{border, this + 2, false},
	} {
		c.ms.Store(tt.at.UnixMilli())
		if err := l.accept(terms(tt.epoch, "ab"), 65); (err == nil) != tt.want {
			t.Errorf("at %v, epoch %d: %v, want it taken: %t", tt.at.Sub(border), tt.epoch-this, err, tt.want)
		}
	}
	for _, owners := range []string{"", "a", "abb", "ac", "AB"} {
		if err := l.accept(terms(key.EpochAt(c.now(), time.Hour), owners), 65); err == nil {
			t.Errorf("owners %q of 65 atoms were taken", owners)
		}
	}
}

// TestSessionFrame: a session that no next one could be above is not heard of.
func TestSessionFrame(t *testing.T) {
	t.Parallel()
	for body, ok := range map[string]bool{
		`{"link":"fibre","session":0}`:                   true,
		`{"link":"fibre","session":281474976710656}`:     true,
		`{"link":"fibre","session":281474976710657}`:     false,
		`{"link":"fibre","session":9223372036854775807}`: false,
		`{"link":"fibre","session":9223372036854775808}`: false,
		`{"link":"fibre","session":-1}`:                  false,
		`{"link":"fibre","session":"1"}`:                 false,
		`{`:                                              false,
	} {
		if f, err := parseSession([]byte(body)); (err == nil) != ok {
			t.Errorf("%s: %+v, %v; want it taken: %t", body, f, err, ok)
		}
	}
}

func terms(e key.Epoch, owners string) distill.Terms {
	return distill.Terms{Epoch: int64(e), Owners: owners}
}

// TestJudgeBatch: what a batch is to a process that remembers the node's last one, or
// remembers it wrongly because another node of the site has had those since.
func TestJudgeBatch(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	k.hsmDown.Store("")
	from := kmeID(t, "km2")
	s.exec(s.name, "INSERT INTO kme.peer_run (peer, node, run, last) VALUES ('km2', 'b', 3, 40)")
	for name, tt := range map[string]struct {
		remembered handover.PeerRun
		run, batch int64
		want       handover.Standing
	}{
		"the next":                        {handover.PeerRun{Run: 3, Last: 40}, 3, 41, handover.Fresh},
		"some before it are on their way": {handover.PeerRun{Run: 3, Last: 40}, 3, 40 + announceWindow, handover.Fresh},
		"too many are missing":            {handover.PeerRun{Run: 3, Last: 40}, 3, 41 + announceWindow, handover.Ahead},
		"committed before":                {handover.PeerRun{Run: 3, Last: 40}, 3, 40, handover.Repeat},
		"another node had those before":   {handover.PeerRun{Run: 3, Last: 2}, 3, 41, handover.Fresh},
		"another node had it":             {handover.PeerRun{Run: 3, Last: 2}, 3, 39, handover.Repeat},
		"another node was told the run":   {handover.PeerRun{Run: 2, Last: 90}, 3, 41, handover.Fresh},
		"nothing remembered":              {handover.PeerRun{}, 3, 41, handover.Fresh},
		"a run taken over":                {handover.PeerRun{Run: 3, Last: 40}, 2, 41, handover.Stale},
		"a run not told yet":              {handover.PeerRun{Run: 3, Last: 40}, 4, 1, handover.Ahead},
	} {
		ts := newTurnstile()
		ts.learn(tt.remembered)
		got, err := PeerDoor{k}.judge(t.Context(), from, handover.Announce{Node: "b", Run: tt.run, Batch: tt.batch}, ts)
		if err != nil || got != tt.want {
			t.Errorf("%s: %s, %v, want %s", name, got, err, tt.want)
		}
	}
}
