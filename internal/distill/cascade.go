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
	begun  int                                          // passes whose blocks are known
	halved [allPasses]frame                             // nodes whose halves are known; nil: none
	odd    [allPasses]frame                             // open nodes that differ from Alice's; nil: none
	found  [allPasses][]uint32                          // every odd node, and some that no longer are

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
		first := uint32(1) << (s.log - s.top[pass])
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
// is looked for twice.
func (s *search) settle() error {
	for {
		best, smallest := -1, uint32(0)
		for pass := range s.begun {
			nodes := s.current(pass)
			if len(nodes) > 0 && bits.Len32(nodes[len(nodes)-1]) > bits.Len32(smallest) {
				best, smallest = pass, nodes[len(nodes)-1]
			}
		}
		if best < 0 {
			return nil
		}
		nodes := slices.Clone(s.found[best])
		s.found[best] = s.found[best][:0]
		if err := s.descend(best, nodes); err != nil {
			return err
		}
	}
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

// ahead is how many times so many odd nodes are halved by one question. Halving twice
// leaks three bits where two would have done. But many of the questions of a frame are about
// its last few errors, one after the other, and each of them costs a journey. (Measured at
// n = 2^18 and 1.5 %: 212 rounds instead of 258, the longest of six frames 334 instead of
// 477, and f 1.034 instead of 1.031.)
func ahead(nodes int) int {
	if nodes <= 4 {
		return 2
	}
	return 1
}

// descend halves odd nodes of a pass, ascending, until each has led to a wrong bit,
// and puts the bits right.
func (s *search) descend(pass int, nodes []uint32) error {
	for len(nodes) > 0 {
		levels := ahead(len(nodes))
		q := question{pass: pass, nodes: make([]uint32, 0, len(nodes))}
		for _, node := range nodes {
			for l := range min(levels, s.depth(node)) {
				for left := node << (l + 1); left>>(l+1) == node; left += 2 {
					q.nodes = append(q.nodes, left)
				}
			}
		}
		if levels > 1 {
			slices.Sort(q.nodes)
		}
		answers, err := s.put([]question{q})
		if err != nil {
			return err
		}
		differ := make([]byte, len(q.nodes))
		for i, node := range q.nodes {
			differ[i] = bitAt(answers, i) ^ s.parity(pass, node)
		}
		var rest, wrong []uint32
		asked := 0
		var halve func(node uint32, levels int, odd byte)
		halve = func(node uint32, left int, odd byte) {
			if left == 0 || node>>s.log != 0 {
				if odd == 1 {
					s.odd[pass].flip(int(node))
					if node>>s.log != 0 {
						wrong = append(wrong, node)
					} else {
						rest = append(rest, node)
					}
				}
				return
			}
			s.halved[pass].flip(int(node))
			if levels > 1 {
				asked, _ = slices.BinarySearch(q.nodes, 2*node)
			}
			differs := differ[asked]
			asked++
			halve(2*node, left-1, differs)
			halve(2*node+1, left-1, odd^differs)
		}
		for _, node := range nodes {
			halve(node, levels, 1)
		}
		for _, node := range wrong { // once nothing is compared with the key as it was
			at := int(node - 1<<s.log)
			if pass == shufflePass {
				at = s.index(at)
			}
			if err := s.correct(at); err != nil {
				return err
			}
		}
		if levels > 1 {
			slices.Sort(rest)
		}
		nodes = rest
	}
	return nil
}

// depth is how many times a node can be halved.
func (s *search) depth(node uint32) int { return s.log + 1 - bits.Len32(node) }

// reconcile makes Bob's frames equal to Alice's, all at once: each question has those of
// every frame that has some, so that a block takes as many journeys as its slowest frame.
// ask gets them and returns as many bits as they have nodes. The searches are returned,
// and the first error.
func reconcile(p *passes, frames []frame, ask func([]frameQuestions) (answers []byte, err error)) ([]*search, error) {
	searches := make([]*search, len(frames))
	type turn struct {
		next func() ([]question, bool) // what a search asks, until it is done
		stop func()
		err  error
	}
	turns := make([]turn, len(frames))
	answers := make([][]byte, len(frames))
	for i, f := range frames {
		s := &search{view: newView(p, f)}
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
		size := s.top[pass]
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
