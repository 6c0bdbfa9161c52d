package hsm

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"
)

// TestGate: whatever enters, leaves and gives up, in any order: nobody is in beside one
// who is alone, never more than the width, the last turn is never intake's, nobody
// waits who could go, and at the end the gate is as it was.
func TestGate(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		width := rapid.IntRange(1, 5).Draw(rt, "width")
		steps := rapid.SliceOfN(rapid.IntRange(0, 99), 1, 60).Draw(rt, "steps")
		var problem string
		synctest.Test(t, func(*testing.T) {
			g := newGate(width)
			type call struct {
				class  class
				cancel context.CancelFunc
				in     chan error
				inside bool
			}
			var calls []*call
			look := func() {
				synctest.Wait()
				count := map[class]int{}
				waits := map[class]bool{}
				for _, c := range calls {
					if !c.inside {
						select {
						case err := <-c.in:
							c.inside = err == nil
						default:
							waits[c.class] = true
						}
					}
					if c.inside {
						count[c.class]++
					}
				}
				others := count[beat] + count[urgent] + count[background]
				switch {
				case count[alone] > 1 || count[alone] == 1 && others > 0:
					problem = "somebody is in beside one who is alone"
				case others > width:
					problem = "more are in than there are turns"
				case width > 1 && count[background] == width:
					problem = "intake has every turn"
				case waits[alone] && others+count[alone] == 0:
					problem = "one waits to be alone, and nobody is in"
				case !waits[alone] && count[alone] == 0 && others < width && (waits[beat] || waits[urgent]):
					problem = "one waits, and there is a turn"
				}
			}
			for _, s := range steps {
				if op := s % 3; op == 0 || len(calls) == 0 {
					ctx, cancel := context.WithCancel(context.Background())
					c := &call{class: class(s / 3 % int(classes)), cancel: cancel, in: make(chan error, 1)}
					calls = append(calls, c)
					go func() { c.in <- g.enter(ctx, c.class) }()
				} else {
					i := s / 3 % len(calls)
					c := calls[i]
					calls = append(calls[:i], calls[i+1:]...)
					if c.inside {
						g.leave(c.class)
					} else {
						c.cancel()
						synctest.Wait()
						if err := <-c.in; !errors.Is(err, context.Canceled) {
							problem = "whoever gave up was let in"
						}
					}
					defer c.cancel()
				}
				look()
			}
			for len(calls) > 0 {
				for i := 0; i < len(calls); i++ {
					if calls[i].inside {
						g.leave(calls[i].class)
						calls[i].cancel()
						calls = append(calls[:i], calls[i+1:]...)
						i--
					}
				}
				look()
				if problem != "" {
					for _, c := range calls {
						c.cancel()
					}
					return
				}
			}
			if g.inside != 0 || g.behind != 0 || g.waiting() != 0 {
				problem = "turns are lost"
			}
		})
		if problem != "" {
			rt.Fatal(problem)
		}
	})
}
