package handover

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// The model: two sites of two nodes each, and in some histories a third one, to which
// the first has another link; their databases as maps (site), their processes (process),
// and a network between them that loses, repeats, delays and reorders. The decisions are those of this package, the same that production
// calls. A history is a sequence of random steps: anything may happen between any
// two of them, such as the death of a process, the takeover of one that lives, or
// a commit that is not heard of. After every step the safety of keys is checked;
// at the end a fair network settles, and nothing may be left over.

const (
	link   = "l1" // from the first site to the second
	second = "l2" // from the first site to the third
)

// world is one history.
type world struct {
	pick      func(n int) int // from 0 to n-1: every choice of the history
	broken    broken
	declining bool // processes decline announces now and then
	lying     bool // at the second site: only the first is checked
	sites     []*site
	net       []*packet
	place     map[key.ID]placed
	handed    map[key.ID]*handing
	busy      map[string]int // weight of each step
	expiry    map[BlockRef]bool
	blocks    int64
	session   int64 // that both ends of each link are to come to when settling
	asks      int
	steps     map[string]int
	bad       string
	noting    bool
	diary     []string // what happened, for whoever reads a history that failed
}

// broken leaves out rules, one at a time, to show that the checks notice.
type broken struct {
	settleByLast, repeatFromLast, restartInSameRun, voidByCurrentRun, keepParked,
	runAnsweredOnce, firstAtomOnly, freeAnyRun, holdInAnySession bool // handover.md, section 7

	freeAllLinks bool

	staleAccepted, noFence, unknownIsFailed, freeUnanswered, voidInDoubt, reclaimUnvoided,
	runLowered, leaseHeld, leaseAnyOwner, neverTooEarly, takenBackTwice bool

	grantUncounted, grantLeased, grantUncommitted, grantUsedEarly, grantAckUnnamed, grantToldOnce, sharedLent bool
}

type placed struct {
	BlockRef
	index int
}

// packet is a message on its way: a request to any process of a site, or an answer
// to the process that asked.
type packet struct {
	what   string
	to     *site
	proc   *process
	arrive func(r *process)
	again  func() // told if the network repeats it
}

// handing is what SAEs have been given of one key.
type handing struct {
	master identity.SAE
	slaves []identity.SAE
	atoms  []key.ID
	to     map[identity.SAE]int
}

func newWorld(pick func(int) int, b broken) *world { return newWorldOn(pick, b, [3]Tables{}) }

// newWorldOn has the tables of the sites, if they are not nil, do what the model's do.
func newWorldOn(pick func(int) int, b broken, tables [3]Tables) *world {
	sites := 2
	if pick(3) == 0 {
		sites = 3
	}
	return newWorldOf(sites, pick, b, tables)
}

func newWorldOf(sites int, pick func(int) int, b broken, tables [3]Tables) *world {
	w := &world{
		pick: pick, broken: b, place: make(map[key.ID]placed), handed: make(map[key.ID]*handing),
		busy: make(map[string]int), expiry: make(map[BlockRef]bool), steps: make(map[string]int),
	}
	for i := range sites {
		s := &site{
			w: w, end: []End{Alice, Bob, Bob}[i], links: [][]string{{link}, {link}, {second}}[i], session: make(map[string]int64),
			names: [][]string{{"a1", "a2"}, {"b1", "b2"}, {"c1", "c2"}}[i], block: make(map[BlockRef]*blockRow), key: make(map[key.ID]bool),
			due: make(map[key.ID][]*dueRow), parked: make(map[key.ID]parkedRow), node: make(map[string]*nodeRow),
			peer: make(map[string]PeerRun), served: make(map[key.ID]bool), tables: tables[i],
		}
		if i == 0 && sites == 3 {
			s.links = []string{link, second}
		}
		for _, l := range s.links {
			s.session[l] = 1
		}
		for _, sae := range [][]string{{"alice", "anna"}, {"bob", "bert"}, {"carol", "carl"}}[i] {
			s.saes = append(s.saes, anSAE(sae))
		}
		for _, n := range s.names {
			s.node[n] = &nodeRow{}
		}
		w.sites = append(w.sites, s)
	}
	for _, s := range w.sites {
		for _, n := range s.names {
			s.start(n)
		}
	}
	for _, st := range steps {
		w.busy[st.name] = st.weight * []int{1, 1, 1, 3}[pick(4)]
		if st.fault {
			w.busy[st.name] = st.weight * []int{0, 0, 1, 4}[pick(4)]
		}
	}
	w.declining = pick(2) == 0
	return w
}

func anSAE(s string) identity.SAE {
	id, err := identity.ParseSAE(s)
	if err != nil {
		panic(err)
	}
	return id
}

func (w *world) fail(format string, args ...any) {
	if w.bad == "" {
		w.bad = fmt.Sprintf(format, args...)
	}
}

// note writes what happened into the diary.
func (w *world) note(format string, args ...any) {
	if w.noting {
		w.diary = append(w.diary, fmt.Sprintf(format, args...))
	}
}

func (w *world) serial() int { w.asks++; return w.asks }

// play runs one history of n steps, and settles.
func (w *world) play(n int) {
	if w.pick(8) > 0 {
		w.warmUp()
	}
	for i := 0; i < n && w.bad == ""; i++ {
		w.step()
		w.checkStep()
	}
	if w.bad == "" && !w.lying {
		w.settle()
	}
}

// random is the picker of histories that are numbered.
func random(seed uint64) func(int) int {
	r := rand.New(rand.NewPCG(seed, 19))
	return func(n int) int { return r.IntN(n) }
}

// length is how many steps a numbered history has before it settles.
func length(seed uint64) int { return 40 + int(seed%200) }

// again plays a numbered history once more and returns its diary.
func again(seed uint64, b broken) string {
	w := newWorld(random(seed), b)
	w.noting = true
	w.play(length(seed))
	return strings.Join(w.diary, "\n")
}

// total adds up what histories did.
type total struct {
	histories, steps int
	of               map[string]int
	served, taken    int
}

func (t *total) add(w *world) {
	t.histories++
	for name, n := range w.steps {
		if t.of == nil {
			t.of = make(map[string]int)
		}
		t.of[name] += n
		t.steps += n
	}
	for _, s := range w.sites {
		t.served += len(s.served)
		for _, d := range s.dues {
			if d.taken {
				t.taken++
			}
		}
	}
}

// effort is how long to play: d, and longer in proportion with -rapid.checks.
func effort(d time.Duration) time.Duration {
	checks := flag.Lookup("rapid.checks").Value.(flag.Getter).Get().(int)
	return d * time.Duration(checks) / 100
}

// TestHistories plays numbered histories for a few seconds. A failing one is
// played again by its number.
func TestHistories(t *testing.T) {
	var sum total
	start := time.Now()
	for seed := uint64(0); time.Since(start) < effort(5*time.Second); seed++ {
		w := newWorld(random(seed), broken{})
		w.play(length(seed))
		sum.add(w)
		if w.bad != "" {
			t.Fatalf("history %d: %s\n%s", seed, w.bad, again(seed, broken{}))
		}
	}
	t.Logf("%d histories, %d steps, %d keys served, %d taken: %v", sum.histories, sum.steps, sum.served, sum.taken, sum.of)
	for _, st := range steps {
		if sum.of[st.name] == 0 {
			t.Errorf("step %q never happened", st.name)
		}
	}
	if sum.served == 0 || sum.taken == 0 {
		t.Error("no key was used")
	}
}

// TestHistoriesShrunk plays histories chosen by rapid, which reports the shortest
// one that fails. More of them with -rapid.checks.
func TestHistoriesShrunk(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "") }, broken{})
		w.noting = true
		w.play(rapid.IntRange(1, 150).Draw(t, "steps"))
		if w.bad != "" {
			t.Fatalf("%s\n%s", w.bad, strings.Join(w.diary, "\n"))
		}
	})
}

// hand notes that an SAE got a key, and checks I2 and I1: one pair, once each, the
// same atoms.
func (w *world) hand(s *site, id key.ID, atoms []key.ID, master identity.SAE, slaves []identity.SAE, to identity.SAE) {
	if w.lying && s != w.sites[0] {
		return // what a liar does to his own SAEs is not ours to promise
	}
	h := w.handed[id]
	if h == nil {
		h = &handing{master: master, slaves: slaves, atoms: atoms, to: make(map[identity.SAE]int)}
		w.handed[id] = h
	}
	if h.master != master || !slices.Equal(h.slaves, slaves) {
		w.fail("I2: key %s handed to %v for %v, and to %v for %v", short(id), h.master, h.slaves, master, slaves)
	}
	if !slices.Equal(h.atoms, atoms) {
		w.fail("I1: key %s has two sets of atoms", short(id))
	}
	if h.to[to]++; h.to[to] > 1 {
		w.fail("I2: key %s handed to %v twice", short(id), to)
	}
	for _, atom := range atoms {
		if other := w.handed[atom]; atom != id && other != nil {
			w.fail("I2: atom %s is of two keys", short(atom))
		}
	}
}

// disagree: what an honest peer was announced and does not have, the ends disagree
// about. Only expiry, which each end does in its own time, may do that.
func (w *world) disagree(s Settlement) {
	for _, id := range s.Burn {
		if !w.expiry[w.place[id].BlockRef] && !w.lying {
			w.fail("the ends disagree: atom %s of batch %d was announced, and the peer lacks it", short(id), s.Batch)
		}
	}
}
