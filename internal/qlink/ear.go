package qlink

import (
	"errors"

	"github.com/qutemail/kme/internal/distill"
)

// ear receives from a channel before anybody asks, so that its end is noticed while the link
// is at rest, too. It is for one goroutine at a time, and for protocols in which the other
// end is at most two messages ahead: the last one of a block, and the first of the next.
type ear struct {
	distill.Channel
	in   chan heard
	gone chan struct{} // closed when nothing more comes
	why  error         // set before it is closed
}

type heard struct {
	kind byte
	body []byte
}

// newEar takes over what the channel receives from now on, until it is closed.
func newEar(ch distill.Channel) *ear {
	e := &ear{Channel: ch, in: make(chan heard, 2), gone: make(chan struct{})}
	go func() {
		defer close(e.gone)
		e.why = e.receive()
	}()
	return e
}

func (e *ear) receive() error {
	for {
		kind, body, err := e.Channel.Recv()
		if err != nil {
			return err
		}
		select {
		case e.in <- heard{kind, body}:
		default:
			return errors.New("the other end speaks out of turn")
		}
	}
}

// Recv returns what came before the channel ended, then why it did.
func (e *ear) Recv() (kind byte, body []byte, err error) {
	select {
	case m := <-e.in:
		return m.kind, m.body, nil
	case <-e.gone:
	}
	select { // it may have come with the last word
	case m := <-e.in:
		return m.kind, m.body, nil
	default:
		return 0, nil, e.why
	}
}

// wait returns when the channel is closed and has been read to its end.
func (e *ear) wait() { <-e.gone }
