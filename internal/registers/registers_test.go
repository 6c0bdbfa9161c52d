//go:build amd64 || arm64

package registers

import (
	"bytes"
	"crypto/rand"
	"testing"
)

// TestClear: what was copied stands in the registers, and does not when they are cleared.
func TestClear(t *testing.T) {
	t.Parallel()
	from, to := make([]byte, 200), make([]byte, 200)
	_, _ = rand.Read(from)
	var all File
	seen := func() (n int) {
		all.Peek()
		for i := range len(from) - 15 {
			if bytes.Contains(all[:], from[i:i+16]) {
				n++
			}
		}
		return n
	}
	left, cleared := 0, 0
	for range 100 { // another goroutine may run on the thread in between
		move(to, from)
		left += seen()
		move(to, from)
		Clear()
		cleared += seen()
	}
	if left == 0 {
		t.Error("what was copied is never in the registers: the test does not see it")
	}
	if cleared > 0 {
		t.Errorf("%d pieces of what was copied are in registers that were cleared", cleared)
	}
}

// move is a copy of a length that the compiler does not know, as most are.
//
//go:noinline
func move(to, from []byte) { copy(to, from) }
