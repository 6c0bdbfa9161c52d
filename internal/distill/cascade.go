package distill

import (
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"slices"
)

// question names nodes of one pass whose parities Bob asks Alice for.
type question struct {
	pass  int
	nodes []uint32 // at least one, ascending strictly
}

// frameQuestions are those about one frame.
type frameQuestions struct {
	frame     int
	questions []question
}

// answer is what Alice's machine has to do in reconciliation: it remembers nothing
// from one question to the next. The bits go to answers, packed, from bit first on, in the
// order of the nodes.
func (v *view) answer(questions []question, answers []byte, first int) (next int) {
	for _, q := range questions {
		for _, node := range q.nodes {
			setBit(answers, first, v.parity(q.pass, node))
			first++
		}
	}
	return first
}

// count is how many bits answer the questions, and so leak.
func count(questions []question) int {
	n := 0
	for _, q := range questions {
		n += len(q.nodes)
	}
	return n
}

// search is Bob's side of Cascade (Brassard and Salvail, 1993), all blocks of a pass
// at once. What he knows of Alice's key are the parities of some nodes of each pass.
// Where a node's halves are known they give the node's parity, so only the smallest
// known nodes matter, the open ones. One whose parity differs from his own, an odd
// one, holds an error: he asks for its left half, infers the right, goes on with the
// odd half, and ends at a wrong bit. Putting that right makes even nodes odd in other
// passes, which are searched in turn, until no odd node is left.
//
// Nothing here is secret but the view: the rest follows from the error pattern.
type search struct {
	*view
	ask    func([]question) (answers []byte, err error) // as many bits as count
	haste  haste
	size   [allPasses]int      // log of the length of each pass's blocks: top, or less in haste
	begun  int                 // passes whose blocks are known
	halved [allPasses]frame    // nodes whose halves are known; nil: none
	odd    [allPasses]frame    // open nodes that differ from Alice's; nil: none
	found  [allPasses][]uint32 // every odd node, and some that no longer are

	corrected int
	leak      int // answers got, in bits
	rounds    int // questions asked
}

// tree makes room for the nodes of a pass. Most of the masks never need it.
func (s *search) tree(pass int) {
	if s.odd[pass] == nil {
		s.halved[pass] = newFrame(1 << s.log)
		s.odd[pass] = newFrame(2 << s.log)
	}
}

// run makes the key equal to Alice's, but for a pattern that every pass misses.
func (s *search) run() error {
	for _, last := range []int{1, firstMask, allPasses} {
		if err := s.begin(last); err != nil {
			return err
		}
		if err := s.settle(); err != nil {
			return err
		}
	}
	return nil
}

// begin asks for the blocks of the passes up to last, last excluded. The last block
// of the second pass is not asked for: all nodes of the first are even, so the blocks
// of the second differ from Alice's in an even number.
func (s *search) begin(last int) error {
	var questions []question
	for pass := s.begun; pass < last; pass++ {
		first := uint32(1) << (s.log - s.size[pass])
		q := question{pass: pass}
		for node := first; node < 2*first; node++ {
			q.nodes = append(q.nodes, node)
		}
		if pass == shufflePass {
			q.nodes = q.nodes[:len(q.nodes)-1]
		}
		questions = append(questions, q)
	}
	answers, err := s.put(questions)
	if err != nil {
		return err
	}
	s.begun = last
	i := 0
	for _, q := range questions {
		var sum byte
		for _, node := range q.nodes {
			differs := bitAt(answers, i) ^ s.parity(q.pass, node)
			s.mark(q.pass, node, differs)
			sum ^= differs
			i++
		}
		if q.pass == shufflePass {
			s.mark(q.pass, q.nodes[len(q.nodes)-1]+1, sum)
		}
	}
	return nil
}

// put asks, and counts.
func (s *search) put(questions []question) ([]byte, error) {
	s.rounds++
	s.leak += count(questions)
	return s.ask(questions)
}

// mark changes an open node from even to odd or back, if differs is 1.
func (s *search) mark(pass int, node uint32, differs byte) {
	if differs == 0 {
		return
	}
	s.tree(pass)
	s.odd[pass].flip(int(node))
	if s.odd[pass].get(int(node)) == 1 {
		s.found[pass] = append(s.found[pass], node)
	}
}

// settle searches until no node of the passes begun is odd. It takes the pass with
// the smallest odd node, where an error is cheapest to find, and searches all odd
// nodes of that pass at once: being of one pass they share no bit, so that no error
// is looked for twice. With bits to spare it searches others at the same time.
func (s *search) settle() error {
	for {
		var odd []hunt
		for pass := range s.begun {
			if nodes := s.current(pass); len(nodes) > 0 {
				odd = append(odd, hunt{pass, nodes})
			}
		}
		if len(odd) == 0 {
			return nil
		}
		slices.SortStableFunc(odd, func(a, b hunt) int { return bits.Len32(b.smallest()) - bits.Len32(a.smallest()) })
		odd = s.afford(odd)
		for i, h := range odd {
			odd[i].nodes = slices.Clone(h.nodes)
			s.found[h.pass] = s.found[h.pass][:0]
		}
		if err := s.descend(odd); err != nil {
			return err
		}
	}
}

// hunt is odd nodes of a pass, ascending, each of which is to lead to a wrong bit.
type hunt struct {
	pass  int
	nodes []uint32
}

// smallest is one that has the fewest bits.
func (h hunt) smallest() uint32 { return h.nodes[len(h.nodes)-1] }

// haste is how many bits a frame may leak so as to be reconciled with fewer questions, each
// of which is a journey. The zero value is none.
type haste struct {
	must int // bits that it leaks without haste, at most, as far as that is known before
	may  int // bits that it may leak
}

// hurry makes the blocks of the first two passes shorter, if there are bits for that. Where
// fewer errors share a block, fewer are left for the other pass, and the two send each other
// back and forth less often. A parity that is asked for besides saves questions of the
// search, so that it costs some .6 bits. (Measured at n = 2^18 and 1.5 %, where such a frame
// of the lab may leak 40 900 bits and leaks 30 500 without haste: 138 rounds without, 51 with
// the blocks as they were, and 23 with half and a quarter of their length and 35 300 bits.)
func (s *search) hurry(h haste) {
	const cost, of = 7, 10
	s.haste = h
	for _, pass := range []int{shufflePass, shufflePass, 0} {
		blocks := 1 << (s.log - s.size[pass]) // as many more
		if s.size[pass] < 3 || s.haste.must+blocks*cost/of > s.haste.may {
			return
		}
		s.haste.must += blocks * cost / of
		s.size[pass]--
	}
}

// allowance is how many bits a search for so many odd nodes may leak beyond what it must: a
// part of what is left, so that something is for those that follow. Once both passes have
// begun the nodes that are odd say better than the error rate what must leak: each error
// that is found makes less than one node of the other pass odd.
func (s *search) allowance(odd int) int {
	const perOdd, last, part = 24, 500, 4
	must := s.haste.must - s.leak
	if s.begun > shufflePass {
		must = perOdd*odd + last
	}
	return (s.haste.may - s.leak - must) / part
}

// countNodes is how many nodes are to be searched.
func countNodes(hunts []hunt) (n int) {
	for _, h := range hunts {
		n += len(h.nodes)
	}
	return n
}

// afford is the first of some hunts, and those of the others that may be in vain: they may
// lead to the same errors, and then have leaked as many bits as it took.
func (s *search) afford(odd []hunt) []hunt {
	allowed, afforded := s.allowance(countNodes(odd)), odd[:1]
	for _, h := range odd[1:] {
		cost := 0
		for _, node := range h.nodes {
			cost += s.depth(node)
		}
		if cost > allowed {
			continue
		}
		allowed -= cost
		afforded = append(afforded, h)
	}
	return afforded
}

// current drops from found[pass] what is no longer open and odd, and sorts the rest:
// the largest number is that of a smallest node.
func (s *search) current(pass int) []uint32 {
	if len(s.found[pass]) == 0 {
		return nil
	}
	nodes := slices.DeleteFunc(s.found[pass], func(node uint32) bool {
		return s.odd[pass].get(int(node)) == 0 || s.halved[pass].get(int(node)) == 1
	})
	slices.Sort(nodes)
	s.found[pass] = slices.Compact(nodes)
	return s.found[pass]
}

// ahead is how many times odd nodes are halved by one question. Halving twice leaks three
// bits where two would have done. But many of the questions of a frame are about its last few
// errors, one after the other, and each of them costs a journey. (Measured at n = 2^18 and
// 1.5 %: 212 rounds instead of 258, the longest of six frames 334 instead of 477, and f 1.034
// instead of 1.031.) In haste they are halved so often that all of them are found with as few
// questions as there are bits for.
func (s *search) ahead(odd []hunt) int {
	nodes, depth := countNodes(odd), 0
	for _, h := range odd {
		depth = max(depth, s.depth(h.nodes[0]))
	}
	usual := 1
	if nodes <= 4 {
		usual = 2
	}
	questions := func(levels int) int { return (depth + levels - 1) / levels }
	vain := func(levels int) int { return nodes * questions(levels) * inVain(levels) }
	levels, allowed := usual, s.allowance(nodes)
	for l := usual + 1; l <= min(depth, maxAhead); l++ {
		if questions(l) < questions(levels) && vain(l)-vain(usual) <= allowed {
			levels = l
		}
	}
	return levels
}

// maxAhead is how many times a node is halved by one question at most.
const maxAhead = 10

// inVain is how many bits are leaked beyond what is needed when a node is halved so often by
// one question.
func inVain(levels int) int { return 1<<levels - 1 - levels }

// descend halves odd nodes until each has led to a wrong bit, and puts the bits right.
func (s *search) descend(odd []hunt) error {
	for {
		var questions []question
		for i, h := range odd {
			// What was put right for another pass may have made some even.
			odd[i].nodes = slices.DeleteFunc(h.nodes, func(node uint32) bool { return s.odd[h.pass].get(int(node)) == 0 })
		}
		odd = slices.DeleteFunc(odd, func(h hunt) bool { return len(h.nodes) == 0 })
		if len(odd) == 0 {
			return nil
		}
		levels := s.ahead(odd)
		slices.SortFunc(odd, func(a, b hunt) int { return a.pass - b.pass })
		for _, h := range odd {
			questions = append(questions, s.halves(h, levels))
		}
		answers, err := s.put(questions)
		if err != nil {
			return err
		}
		var wrong []int
		first := 0
		for i, q := range questions {
			differ := make([]byte, len(q.nodes))
			for j, node := range q.nodes {
				differ[j] = bitAt(answers, first) ^ s.parity(q.pass, node)
				first++
			}
			rest, found := s.halve(odd[i], levels, q.nodes, differ)
			odd[i].nodes = rest
			wrong = append(wrong, found...)
		}
		slices.Sort(wrong)
		for _, at := range slices.Compact(wrong) { // once nothing is compared with the key as it was
			if err := s.correct(at); err != nil {
				return err
			}
		}
	}
}

// halves asks for what it takes to halve the nodes so often.
func (s *search) halves(h hunt, levels int) question {
	q := question{pass: h.pass, nodes: make([]uint32, 0, len(h.nodes))}
	for _, node := range h.nodes {
		for l := range min(levels, s.depth(node)) {
			for left := node << (l + 1); left>>(l+1) == node; left += 2 {
				q.nodes = append(q.nodes, left)
			}
		}
	}
	if levels > 1 {
		slices.Sort(q.nodes)
	}
	return q
}

// halve takes note of which halves differ, and returns the odd nodes that remain, and the
// wrong bits that were found.
func (s *search) halve(h hunt, levels int, asked []uint32, differ []byte) (rest []uint32, wrong []int) {
	next := 0
	var halve func(node uint32, left int, odd byte)
	halve = func(node uint32, left int, odd byte) {
		switch leaf := node>>s.log != 0; {
		case left > 0 && !leaf:
			s.halved[h.pass].flip(int(node))
			if levels > 1 {
				next, _ = slices.BinarySearch(asked, 2*node)
			}
			differs := differ[next]
			next++
			halve(2*node, left-1, differs)
			halve(2*node+1, left-1, odd^differs)
		case odd == 0:
		case leaf:
			s.odd[h.pass].flip(int(node))
			wrong = append(wrong, s.bit(h.pass, node))
		default:
			s.odd[h.pass].flip(int(node))
			rest = append(rest, node)
		}
	}
	for _, node := range h.nodes {
		halve(node, levels, 1)
	}
	if levels > 1 {
		slices.Sort(rest)
	}
	return rest, wrong
}

// bit is the key bit that a node is, which has no halves.
func (s *search) bit(pass int, node uint32) int {
	at := int(node - 1<<s.log)
	if pass == shufflePass {
		at = s.index(at)
	}
	return at
}

// depth is how many times a node can be halved.
func (s *search) depth(node uint32) int { return s.log + 1 - bits.Len32(node) }

// reconcile makes Bob's frames equal to Alice's, all at once: each question has those of
// every frame that has some, so that a block takes as many journeys as its slowest frame.
// ask gets them and returns as many bits as they have nodes. With haste, which is that of each
// frame, there are fewer journeys. The searches are returned, and the first error.
func reconcile(p *passes, frames []frame, h haste, ask func([]frameQuestions) (answers []byte, err error)) ([]*search, error) {
	searches := make([]*search, len(frames))
	type turn struct {
		next func() ([]question, bool) // what a search asks, until it is done
		stop func()
		err  error
	}
	turns := make([]turn, len(frames))
	answers := make([][]byte, len(frames))
	for i, f := range frames {
		s := &search{view: newView(p, f), size: p.top}
		s.hurry(h)
		searches[i] = s
		turns[i].next, turns[i].stop = iter.Pull(func(yield func([]question) bool) {
			s.ask = func(q []question) ([]byte, error) {
				if !yield(q) {
					return nil, errStopped
				}
				return answers[i], nil
			}
			turns[i].err = s.run()
		})
	}
	defer func() {
		for _, t := range turns {
			t.stop()
		}
	}()
	for {
		var round []frameQuestions
		for i := range turns {
			q, asks := turns[i].next()
			if asks {
				round = append(round, frameQuestions{i, q})
			} else if turns[i].err != nil {
				return searches, fmt.Errorf("frame %d: %w", i, turns[i].err)
			}
		}
		if len(round) == 0 {
			return searches, nil
		}
		got, err := ask(round)
		if err != nil {
			return searches, err
		}
		first := 0
		for _, f := range round {
			n := count(f.questions)
			answers[f.frame] = make([]byte, packedBytes(n))
			copyBits(answers[f.frame], got, first, n)
			first += n
		}
	}
}

// countAll is how many bits answer the questions of a round.
func countAll(round []frameQuestions) int {
	n := 0
	for _, f := range round {
		n += count(f.questions)
	}
	return n
}

// errStopped ends a search that nobody answers any more.
var errStopped = errors.New("reconciliation was stopped")

// errContradiction is what answers lead to that are not the parities of any one key.
var errContradiction = errors.New("the answers contradict each other")

// correct flips key bit i and marks the open node that holds it in each pass. A bit
// that Alice's answers showed to be right is never wrong again: with parities of one
// key the open nodes always tell the truth about the errors that are left.
func (s *search) correct(i int) error {
	s.corrected++
	s.flip(i)
	for pass := range s.begun {
		at := i
		switch {
		case pass == shufflePass:
			at = s.place(i)
		case pass >= firstMask && s.masks[pass-firstMask].get(i) == 0:
			continue
		}
		size := s.size[pass]
		node := uint32(1)<<(s.log-size) + uint32(at>>size)
		for size > 0 && s.halved[pass] != nil && s.halved[pass].get(int(node)) == 1 {
			size--
			node = node<<1 | uint32(at>>size&1)
		}
		if size == 0 && s.odd[pass].get(int(node)) == 0 {
			return errContradiction
		}
		s.mark(pass, node, 1)
	}
	return nil
}
