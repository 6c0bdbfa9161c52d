package qlink

import (
	"errors"
	"fmt"
	"sync"

	"github.com/qutemail/kme/internal/distill"
)

// MaxInFlight is how many blocks of a session may be under way at a time, and so how many
// lanes its channel has.
const MaxInFlight = 15

// lanes carry the messages of several blocks over one channel. The upper half of a
// message's kind is the number of its lane; distillation's own kinds fill less than the
// lower. On each lane the ends speak by turns.
type lanes struct {
	ch   distill.Channel
	send sync.Mutex
	in   [MaxInFlight]chan laneMessage
	gone chan struct{} // closed when nothing more comes
	why  error         // set before it is closed
}

type laneMessage struct {
	kind byte
	body []byte
}

// newLanes takes over what the channel receives from now on, until it is closed.
func newLanes(ch distill.Channel) *lanes {
	l := &lanes{ch: ch, gone: make(chan struct{})}
	for i := range l.in {
		l.in[i] = make(chan laneMessage, 2) // the last message of a block, and the first of the next
	}
	go func() {
		defer close(l.gone)
		l.why = l.receive()
	}()
	return l
}

func (l *lanes) receive() error {
	for {
		kind, body, err := l.ch.Recv()
		if err != nil {
			return err
		}
		n := int(kind >> 4)
		if n >= len(l.in) {
			return fmt.Errorf("%w: kind %#x", errMalformed, kind)
		}
		select {
		case l.in[n] <- laneMessage{kind & 0xf, body}:
		default:
			return errors.New("the other end speaks out of turn")
		}
	}
}

// wait returns when the channel is closed and has been read to its end.
func (l *lanes) wait() { <-l.gone }

// lane is the channel of one block after another.
func (l *lanes) lane(n int) distill.Channel { return &lane{l, n} }

type lane struct {
	*lanes
	n int
}

func (l *lane) Send(kind byte, body []byte) error {
	if kind > 0xf {
		return fmt.Errorf("%w: kind %#x", errMalformed, kind)
	}
	l.send.Lock()
	defer l.send.Unlock()
	return l.ch.Send(kind|byte(l.n)<<4, body)
}

// Recv returns what came before the channel ended, then why it did.
func (l *lane) Recv() (kind byte, body []byte, err error) {
	select {
	case m := <-l.in[l.n]:
		return m.kind, m.body, nil
	default:
	}
	select {
	case m := <-l.in[l.n]:
		return m.kind, m.body, nil
	case <-l.gone:
		select { // it may have come with the last word
		case m := <-l.in[l.n]:
			return m.kind, m.body, nil
		default:
		}
		return 0, nil, l.why
	}
}
