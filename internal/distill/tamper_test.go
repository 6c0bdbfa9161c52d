package distill

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// judge fails the test if a block that somebody meddled with ended with unequal keys,
// with bits beside an error, or as if nothing had happened.
func judge(t interface {
	Helper()
	Errorf(string, ...any)
}, what string, a, b Outcome, aliceErr, bobErr error,
) {
	t.Helper()
	switch {
	case aliceErr == nil && bobErr == nil && !bytes.Equal(a.Bits, b.Bits):
		t.Errorf("%s: unequal keys", what)
	case aliceErr == nil && bobErr == nil:
		t.Errorf("%s: nobody noticed", what)
	case aliceErr != nil && a.Bits != nil, bobErr != nil && b.Bits != nil:
		t.Errorf("%s: bits beside an error: Alice %v, Bob %v", what, aliceErr, bobErr)
	}
}

// lengths runs a block untouched and returns the sizes of the messages that each end
// sent.
func lengths(t *testing.T, e *ends) (alice, bob []int) {
	t.Helper()
	a, b, closeBoth := newPipe()
	a.meddle = func(m message) []message { alice = append(alice, len(m.body)); return []message{m} }
	b.meddle = func(m message) []message { bob = append(bob, len(m.body)); return []message{m} }
	if _, _, aliceErr, bobErr := e.run(a, b, closeBoth); aliceErr != nil || bobErr != nil {
		t.Fatalf("untouched: Alice %v, Bob %v", aliceErr, bobErr)
	}
	return alice, bob
}

// TestEveryByteCounts changes a byte of a message, each in turn: all bytes of the
// short messages, some of the long ones.
func TestEveryByteCounts(t *testing.T) {
	l := shine(rand.New(rand.NewPCG(7, 7)), small, 0.9, 0.03)
	alice, bob := lengths(t, newEnds(small, l, 1))
	for fromAlice, sizes := range map[bool][]int{true: alice, false: bob} {
		for number, size := range sizes {
			step := max(1, size/40)
			for at := -1; at < size; at += step { // -1 is the kind
				change := byte(1) << (at & 7)
				if at < 0 {
					change = 1
				}
				sent := 0
				meddle := func(m message) []message {
					if sent == number && at < 0 {
						m.kind ^= change
					} else if sent == number {
						m.body[at] ^= change
					}
					sent++
					return []message{m}
				}
				a, b, closeBoth := newPipe()
				if fromAlice {
					a.meddle = meddle
				} else {
					b.meddle = meddle
				}
				atAlice, atBob, aliceErr, bobErr := newEnds(small, l, 1).run(a, b, closeBoth)
				what := "Bob's"
				if fromAlice {
					what = "Alice's"
				}
				judge(t, what, atAlice, atBob, aliceErr, bobErr)
				if t.Failed() {
					t.Fatalf("message %d, byte %d", number, at)
				}
			}
		}
	}
}

// TestMeddling lets a middle truncate, lengthen, rewrite, drop and repeat a message, say
// an earlier one in its place, or say that the other end aborts. Where it drops one it
// closes the pipe, as a deadline would.
func TestMeddling(t *testing.T) {
	l := shine(rand.New(rand.NewPCG(8, 8)), small, 0.9, 0.03)
	alice, bob := lengths(t, newEnds(small, l, 1))
	rapid.Check(t, func(t *rapid.T) {
		a, b, closeBoth := newPipe()
		victim, messages := a, len(alice)
		if rapid.Bool().Draw(t, "bob") {
			victim, messages = b, len(bob)
		}
		number := rapid.IntRange(0, messages-1).Draw(t, "message")
		act := rapid.SampledFrom([]string{"truncate", "lengthen", "rewrite", "drop", "repeat", "replay", "abort"}).Draw(t, "act")
		noise := rapid.SliceOfN(rapid.Byte(), 1, 64).Draw(t, "noise")
		var before []message
		changed := false
		victim.meddle = func(m message) []message {
			before = append(before, message{m.kind, bytes.Clone(m.body)})
			if len(before) != number+1 {
				return []message{m}
			}
			changed = true
			switch act {
			case "truncate":
				m.body = m.body[:len(m.body)-min(len(m.body), len(noise))]
			case "lengthen":
				m.body = append(m.body, noise...)
			case "rewrite":
				copy(m.body, noise)
			case "drop":
				closeBoth()
				return nil
			case "repeat":
				return []message{m, m}
			case "replay":
				m = before[len(noise)%len(before)]
			case "abort":
				m = message{kindAbort, abortMessage{reason: 1 + len(noise)%5}.encode()}
			}
			changed = m.kind != before[number].kind || !bytes.Equal(m.body, before[number].body)
			return []message{m}
		}
		atAlice, atBob, aliceErr, bobErr := newEnds(small, l, 1).run(a, b, closeBoth)
		last := number == messages-1 && act == "repeat" // nobody reads it in this block
		if changed && !last {
			judge(t, act, atAlice, atBob, aliceErr, bobErr)
		}
	})
}

// TestReordered lets each message change places with the next one of the same end, which
// a middle can have that guesses it: the other end is never the wiser for a message, and
// ends without a key.
func TestReordered(t *testing.T) {
	l := shine(rand.New(rand.NewPCG(8, 9)), small, 0.9, 0.03)
	var said [2][]message // by Alice and by Bob, the same in every run of the same seeds
	record := func(end int) func(message) []message {
		return func(m message) []message {
			said[end] = append(said[end], message{m.kind, bytes.Clone(m.body)})
			return []message{m}
		}
	}
	a, b, closeBoth := newPipe()
	a.meddle, b.meddle = record(0), record(1)
	if _, _, aliceErr, bobErr := newEnds(small, l, 1).run(a, b, closeBoth); aliceErr != nil || bobErr != nil {
		t.Fatalf("untouched: Alice %v, Bob %v", aliceErr, bobErr)
	}
	for end, list := range said {
		for at := range len(list) - 1 {
			if list[at].kind == list[at+1].kind && bytes.Equal(list[at].body, list[at+1].body) {
				continue
			}
			sent := 0
			a, b, closeBoth := newPipe()
			[]*pipe{a, b}[end].meddle = func(m message) []message {
				switch sent++; sent - 1 {
				case at:
					m = list[at+1]
				case at + 1:
					m = list[at]
				}
				return []message{{m.kind, bytes.Clone(m.body)}}
			}
			atAlice, atBob, aliceErr, bobErr := newEnds(small, l, 1).run(a, b, closeBoth)
			judge(t, "reordered", atAlice, atBob, aliceErr, bobErr)
			if bobErr == nil {
				t.Errorf("Bob has a key")
			}
			if t.Failed() {
				t.Fatalf("message %d of end %d", at, end)
			}
		}
	}
}

// TestBlocksReordered lets the first message of a block pass the last one of the block
// before.
func TestBlocksReordered(t *testing.T) {
	l := shine(rand.New(rand.NewPCG(8, 10)), small, 0.9, 0.03)
	e := newEnds(small, l, 1)
	a, b, closeBoth := newPipe()
	var held []message
	a.meddle = func(m message) []message {
		if m.kind == kindConfirm {
			held = []message{m}
			return nil
		}
		list := append([]message{m}, held...)
		held = nil
		return list
	}
	done := make(chan error, 1)
	go func() {
		out, err := Bob(context.Background(), b, e.bob)
		if err == nil || out.Bits != nil {
			err = errors.Join(err, errors.New("Bob has a key"))
		} else {
			err = nil
		}
		closeBoth()
		done <- err
	}()
	if _, err := Alice(context.Background(), a, e.alice); err != nil {
		t.Fatal(err) // that Bob has none is for the handover to find out
	}
	e.alice.Block++
	if out, err := Alice(context.Background(), a, e.alice); err == nil || out.Bits != nil {
		t.Errorf("the next block: %v", err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestLyingAlice answers Bob's questions with noise: he must stop, and have no key.
func TestLyingAlice(t *testing.T) {
	l := shine(rand.New(rand.NewPCG(9, 9)), small, 0.9, 0.03)
	for i := range 200 {
		random := rand.New(rand.NewPCG(10, uint64(i)))
		a, b, closeBoth := newPipe()
		answers := 0
		a.meddle = func(m message) []message {
			if m.kind == kindAnswer {
				answers++
				if answers > i%6 {
					size := len(m.body)
					for at := range size - 1 { // the last byte may have unused bits
						m.body[at] = byte(random.Uint32())
					}
					m.body[size-1] ^= 1
				}
			}
			return []message{m}
		}
		atAlice, atBob, aliceErr, bobErr := newEnds(small, l, 1).run(a, b, closeBoth)
		if aliceErr == nil || bobErr == nil {
			t.Fatalf("run %d: Alice %v, Bob %v", i, aliceErr, bobErr)
		}
		judge(t, "lies", atAlice, atBob, aliceErr, bobErr)
	}
}
