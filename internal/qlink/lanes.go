package qlink

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/distill"
)

// MaxInFlight is how many blocks of a session may be under way at a time, and so how many
// lanes its channel has.
const MaxInFlight = 31

// maxWaiting is how many bytes of messages may wait on all lanes together. Whose turn it is
// listens, so that hardly any do; the lists of some long blocks may come all at once.
const maxWaiting = 128 << 20

// lanes carry the messages of several blocks over one channel. Before the body of a
// message stands the number of its lane. On each lane the ends speak by turns.
type lanes struct {
	ch   distill.Channel
	send sync.Mutex
	in   [MaxInFlight]chan laneMessage
	gone chan struct{} // closed when nothing more comes
	why  error         // set before it is closed

	waiting atomic.Int64 // bytes of messages that nobody has read
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
		if len(body) == 0 || int(body[0]) >= len(l.in) {
			return fmt.Errorf("%w: kind %#x on no lane", errMalformed, kind)
		}
		if l.waiting.Add(int64(len(body)-1)) > maxWaiting {
			return fmt.Errorf("more than %d bytes of the other end's wait", maxWaiting)
		}
		select {
		case l.in[body[0]] <- laneMessage{kind, body[1:]}:
		default:
			return errors.New("the other end speaks out of turn")
		}
	}
}

// wait returns when the channel is closed and has been read to its end.
func (l *lanes) wait() { <-l.gone }

// lane is the channel of one block.
func (l *lanes) lane(n int) *lane { return &lane{lanes: l, n: n} }

type lane struct {
	*lanes
	n      int
	begun  time.Time       // when the block was; at Bob's end with its first message
	sent   time.Time       // when the last message was; zero once there was an answer
	waits  []time.Duration // for the answers
	held   time.Duration   // for other blocks
	queued time.Duration   // of that, for those that had more to ask
}

// hold waits until another block has come so far that this one may go on.
func (l *lane) hold(until <-chan struct{}) {
	begun := time.Now()
	<-until
	l.held += time.Since(begun)
}

// queue is hold, by a block that has nothing more to ask and waits for the one before it.
func (l *lane) queue(until <-chan struct{}) {
	before := l.held
	l.hold(until)
	l.queued += l.held - before
}

// took is how long the block has taken, without what it waited for others.
func (l *lane) took() time.Duration {
	if l.begun.IsZero() {
		return 0
	}
	return time.Since(l.begun) - l.held
}

// away is how long messages of this block were on their way, there and back: of most
// questions the answer takes no time worth mentioning, so that the median of the waits is
// that of a journey.
func (l *lane) away() time.Duration {
	if len(l.waits) == 0 {
		return 0
	}
	slices.Sort(l.waits)
	return time.Duration(len(l.waits)) * l.waits[len(l.waits)/2]
}

func (l *lane) Send(kind byte, body ...[]byte) error {
	l.sent = time.Now()
	l.send.Lock()
	defer l.send.Unlock()
	return l.ch.Send(kind, append([][]byte{{byte(l.n)}}, body...)...)
}

func (l *lane) Recv() (kind byte, body []byte, err error) {
	m, err := l.recv()
	l.waiting.Add(-int64(len(m.body)))
	if err == nil && l.begun.IsZero() {
		l.begun = time.Now()
	}
	if err == nil && !l.sent.IsZero() {
		l.waits, l.sent = append(l.waits, time.Since(l.sent)), time.Time{}
	}
	return m.kind, m.body, err
}

// recv returns what came before the channel ended, then why it did.
func (l *lane) recv() (laneMessage, error) {
	select {
	case m := <-l.in[l.n]:
		return m, nil
	default:
	}
	select {
	case m := <-l.in[l.n]:
		return m, nil
	case <-l.gone:
		select { // it may have come with the last word
		case m := <-l.in[l.n]:
			return m, nil
		default:
		}
		return laneMessage{}, l.why
	}
}
