package peer

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// MaxFrame is the longest frame of a Stream, kind and body, in bytes.
const MaxFrame = 32 << 20

// A beat is sent where nothing else was for beatEvery; an end that has sent
// nothing for silence, or taken nothing for stall, is given up. Whether the other end
// is still let in is looked at every lookEvery, a part of beatEvery.
const (
	lookEvery = time.Second
	beatEvery = 5 * lookEvery
	silence   = 3 * beatEvery
	stall     = 60 * time.Second
)

// ErrSilent says that the other end of a Stream has not been heard for 15 s, or
// has taken nothing for 60 s, although the connection was not closed.
var ErrSilent = errors.New("the other end has gone silent")

// Stream is a sequence of frames over one TLS connection: the classical channel
// of a link. A frame is its length in four bytes, big-endian, then a byte of kind
// and the body; the length counts kind and body. A frame of length 0 has neither:
// it is a beat, which says that the sender is alive, and Recv passes over it.
//
// One goroutine may Send while another is in Recv. After an error of Send or Recv
// the Stream is of no more use and is to be closed.
type Stream struct {
	conn  net.Conn
	in    *bufio.Reader
	close func() error

	mu   sync.Mutex // guards what follows, and is held for the whole of a write
	out  *bufio.Writer
	sent bool // since the last tick

	deadline struct {
		sync.Mutex
		at time.Time
	}
	still  func() error          // whether the other end is still let in; nil: somebody else looks
	lapsed atomic.Pointer[error] // why it is not
	stop   chan struct{}
	done   chan struct{} // closed when the beating goroutine has ended
}

// NewStream takes conn over and begins to beat. still says whether the other end is still let
// in; nil: somebody else looks.
func NewStream(conn net.Conn, still func() error) *Stream {
	s := &Stream{conn: conn, still: still, stop: make(chan struct{}), done: make(chan struct{})}
	s.in, s.out = bufio.NewReaderSize(heard{s}, piece), bufio.NewWriterSize(moved{s}, piece)
	s.close = sync.OnceValue(func() error {
		close(s.stop)
		err := conn.Close()
		<-s.done
		return err
	})
	go s.beat()
	return s
}

// Close ends the stream at both ends. It may be called more than once and while
// Send or Recv are under way, which then fail.
func (s *Stream) Close() error { return s.close() }

// SetDeadline bounds every Send and Recv from now on, and those under way; the
// zero time removes the bound. What it ends fails with os.ErrDeadlineExceeded.
func (s *Stream) SetDeadline(t time.Time) error {
	s.deadline.Lock()
	s.deadline.at = t
	s.deadline.Unlock()
	return errors.Join(s.conn.SetReadDeadline(s.until(silence)), s.conn.SetWriteDeadline(s.until(stall)))
}

// until is the time in d from now, or the deadline if that is earlier.
func (s *Stream) until(d time.Duration) time.Time {
	s.deadline.Lock()
	defer s.deadline.Unlock()
	t := time.Now().Add(d)
	if at := s.deadline.at; !at.IsZero() && at.Before(t) {
		return at
	}
	return t
}

// overdue tells a deadline of the caller's from one of ours, and what broke from what we
// have broken off.
func (s *Stream) overdue(err error) error {
	if lapsed := s.lapsed.Load(); lapsed != nil {
		return *lapsed
	}
	s.deadline.Lock()
	defer s.deadline.Unlock()
	at := s.deadline.at
	if errors.Is(err, os.ErrDeadlineExceeded) && (at.IsZero() || time.Now().Before(at)) {
		return fmt.Errorf("%w: %w", ErrSilent, err)
	}
	return err
}

// Send writes one frame, whose body may come in parts. They are not kept.
func (s *Stream) Send(kind byte, body ...[]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = true
	if err := writeFrame(s.out, kind, body); err != nil {
		return fmt.Errorf("sending frame %d: %w", kind, err)
	}
	return nil
}

// piece is how many bytes are read at a time, and written at most.
const piece = 64 << 10

// moved writes to the connection in pieces, and gives a slow other end stall for each of them.
type moved struct{ s *Stream }

func (m moved) Write(b []byte) (n int, err error) {
	for n < len(b) {
		if err := m.s.conn.SetWriteDeadline(m.s.until(stall)); err != nil {
			return n, err
		}
		more, err := m.s.conn.Write(b[n:min(len(b), n+piece)])
		n += more
		if err != nil {
			return n, m.s.overdue(err)
		}
	}
	return n, nil
}

// beat says that this end is alive, even while its owner computes for long, and breaks off
// when the other end is not let in any more.
func (s *Stream) beat() {
	defer close(s.done)
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for looks := time.Duration(1); ; looks++ {
		select {
		case <-s.stop:
			return
		case <-t.C:
		}
		if s.still != nil {
			if err := s.still(); err != nil {
				s.lapsed.Store(&err)
				_ = s.conn.Close() // whoever sends or receives sees why
				return
			}
		}
		if looks*lookEvery%beatEvery != 0 {
			continue
		}
		if !s.mu.TryLock() {
			continue // a frame is on its way: that is a sign of life
		}
		if !s.sent {
			_, _ = moved{s}.Write(make([]byte, 4)) // whoever sends or receives next sees the error
		}
		s.sent = false
		s.mu.Unlock()
	}
}

// Recv reads the next frame. The body is the caller's.
func (s *Stream) Recv() (kind byte, body []byte, err error) {
	return s.RecvShort(MaxFrame)
}

// RecvShort is Recv of a frame of which no more than most bytes are wanted.
func (s *Stream) RecvShort(most int) (kind byte, body []byte, err error) {
	kind, body, err = readFrame(s.in, most)
	if err != nil {
		return 0, nil, fmt.Errorf("receiving a frame: %w", s.overdue(err))
	}
	return kind, body, nil
}

// heard reads from the connection, and gives the other end silence to say
// something each time.
type heard struct{ s *Stream }

func (h heard) Read(b []byte) (int, error) {
	if err := h.s.conn.SetReadDeadline(h.s.until(silence)); err != nil {
		return 0, err
	}
	return h.s.conn.Read(b)
}

// writeFrame writes a frame: what is short goes out in one piece, what is long is not copied.
func writeFrame(w *bufio.Writer, kind byte, body [][]byte) error {
	size := 1
	for _, part := range body {
		size += len(part)
	}
	if size > MaxFrame {
		return fmt.Errorf("%d bytes are more than %d", size, MaxFrame)
	}
	head := append(binary.BigEndian.AppendUint32(make([]byte, 0, 5), uint32(size)), kind)
	for _, part := range append([][]byte{head}, body...) {
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	return w.Flush()
}

// readFrame reads the next frame that is not a beat. Memory grows with what has
// arrived, not with what the length promises. The error is io.EOF only at the end
// of a frame.
func readFrame(r io.Reader, most int) (kind byte, body []byte, err error) {
	var head [5]byte
	for {
		if _, err := io.ReadFull(r, head[:4]); err != nil {
			return 0, nil, err
		}
		if binary.BigEndian.Uint32(head[:]) != 0 {
			break
		}
	}
	n := int(binary.BigEndian.Uint32(head[:]))
	if n > most {
		return 0, nil, fmt.Errorf("frame of %d bytes is longer than %d", n, most)
	}
	if _, err := io.ReadFull(r, head[4:]); err != nil {
		return 0, nil, unexpected(err)
	}
	n-- // the kind
	body = make([]byte, 0, min(n, piece))
	for len(body) < n {
		start := len(body)
		more := min(n-start, max(piece, 3*start))
		body = slices.Grow(body, more)[:start+more]
		if _, err := io.ReadFull(r, body[start:]); err != nil {
			return 0, nil, unexpected(err)
		}
	}
	return head[4], body, nil
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
