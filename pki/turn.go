package pki

import "errors"

// maxHandshake is how many bytes a client may say in its handshake: a long chain of large
// certificates is half of that. Each certificate more is another signature to verify.
const maxHandshake = 16 << 10

var errLong = errors.New("the handshake is too long")

// turn is a handshake's leave to compute. It has one from when the other side has been
// heard until it waits for it again, and gets it in the order of asking: however many
// handshakes are under way, they leave processors to the requests of open connections.
// It belongs to the goroutine that shakes hands.
type turn struct {
	places chan struct{}   // one for each that has its turn
	over   <-chan struct{} // closed when the handshake has taken too long
	taken  bool
	heard  int   // bytes
	err    error // why there is none
}

// begin waits for the turn, after n bytes were heard.
func (t *turn) begin(n int) error {
	if t.heard += n; t.heard > maxHandshake {
		t.err = errLong
		return t.err
	}
	select {
	case t.places <- struct{}{}:
		t.taken = true
	case <-t.over:
		t.err = errBusy // it was not the other side that was slow
	}
	return t.err
}

// end gives the turn back, if it has begun.
func (t *turn) end() {
	if t.taken {
		t.taken = false
		<-t.places
	}
}
