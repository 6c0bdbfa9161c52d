package siem

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/qutemail/kme/internal/audit"
)

// Source is where leaves are read from, and where it is kept what a sink has got.
type Source interface {
	// Leaves calls do for up to limit leaves of the log of an origin from first on. An
	// origin of 0 is that of the first log.
	Leaves(ctx context.Context, origin, first int64, limit int, do func(audit.Row) error) (Log, error)
	// Cursor is where a sink has got to: 0 and 0 if nowhere.
	Cursor(ctx context.Context, sink string) (origin, next int64, err error)
	MoveCursor(ctx context.Context, sink string, origin, next int64) error
}

// Log is a log that leaves are read from.
type Log struct {
	Name      string
	Origin    int64 // 0: there is no log yet
	Size      int64
	Following int64 // the origin of the log after it; 0: it is the present one
}

// Config is one sink. Everything but TLS must be set.
type Config struct {
	Name   string        // of the sink, and of its cursor
	Format Format        //
	To     string        // "file:PATH", which is appended to, or "tcp:HOST:PORT", or "tls:HOST:PORT"
	Framed bool          // each message is preceded by its length (RFC 5425, 4.3), as on a connection; otherwise it ends with a line feed
	TLS    *tls.Config   // of tls:
	Every  time.Duration // how often it is looked for new leaves
	Log    *slog.Logger
}

// Forwarder sends the log to one sink. The cursor that it keeps in its Source is where it
// begins after whatever may happen, to the sink, to a connection or to this process: what
// is before it has been read.
type Forwarder struct {
	c         Config
	conn      writer
	at        *place        // the leaf to be sent next; nil: where the cursor is
	unsettled []mark        // where it was after what a connection has taken lately and may not have been read, oldest first
	broken    chan struct{} // of a connection: closed when its other end has gone; a goroutine of its own closes it

	lag   atomic.Int64 // leaves that are in the log and not sent yet
	sent  atomic.Int64
	wrong atomic.Value // why the sink takes nothing, as text
}

// place is a leaf of the log of an origin.
type place struct{ origin, next int64 }

// mark is the place that was got to at a moment.
type mark struct {
	at time.Time
	place
}

// writer is a sink that is open.
type writer interface {
	Write([]byte) (int, error)
	Close() error
}

const (
	batchSize = 512 // leaves sent at a time
	sinkTime  = 10 * time.Second
	deadTime  = 30 * time.Second
)

// ResendTime is how long a connection must have lasted after it has taken a leaf until the
// leaf counts as read: nobody says that it was. It is longer than a connection can be dead
// without being known to be. What was sent later is sent again if the connection breaks or
// this process ends; whoever reads knows the leaves by number.
const ResendTime = time.Minute

// New returns a forwarder that has opened nothing yet.
func New(c Config) *Forwarder {
	f := &Forwarder{c: c}
	f.wrong.Store("")
	return f
}

// Name is the sink's.
func (f *Forwarder) Name() string { return f.c.Name }

// Lag is how many leaves of the present log were not sent yet, when it was last looked.
func (f *Forwarder) Lag() int64 { return f.lag.Load() }

// Sent is how many leaves were sent since the start.
func (f *Forwarder) Sent() int64 { return f.sent.Load() }

// Trouble is why the sink takes nothing, "" while it does.
func (f *Forwarder) Trouble() string { return f.wrong.Load().(string) }

// Run sends what there is, and what comes, until ctx ends.
func (f *Forwarder) Run(ctx context.Context, src Source) error {
	f.hangUp() // another may have sent since it was run last
	defer f.hangUp()
	t := time.NewTicker(f.c.Every)
	defer t.Stop()
	for {
		more, err := f.step(ctx, src)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			f.hangUp()
			if f.wrong.Swap(err.Error()) == "" {
				f.c.Log.Warn("audit sink", "sink", f.c.Name, "err", err)
			}
		default:
			f.wrong.Store("")
		}
		if more && err == nil {
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

// step sends the next leaves, and moves the cursor over what has been read.
func (f *Forwarder) step(ctx context.Context, src Source) (more bool, err error) {
	if f.conn != nil && f.broken != nil {
		select {
		case <-f.broken:
			return false, errors.New("the sink has closed the connection")
		default:
		}
	}
	if err := f.settle(ctx, src, time.Now()); err != nil {
		return false, err
	}
	if f.at == nil {
		origin, next, err := src.Cursor(ctx, f.c.Name)
		if err != nil {
			return false, err
		}
		f.at = &place{origin, next}
	}
	if f.conn == nil { // a sink that is away costs no reading
		log, err := src.Leaves(ctx, f.at.origin, f.at.next, 0, nil)
		if err == nil && f.at.next < log.Size {
			f.lag.Store(log.Size - f.at.next)
			err = f.open(ctx)
		}
		if err != nil {
			return false, err
		}
	}
	var rows []audit.Row
	log, err := src.Leaves(ctx, f.at.origin, f.at.next, batchSize, func(r audit.Row) error {
		rows = append(rows, r)
		return nil
	})
	if err != nil || log.Origin == 0 {
		return false, err
	}
	f.lag.Store(log.Size - f.at.next)
	if len(rows) == 0 {
		if log.Following > 0 && f.at.next >= log.Size { // the log of this origin has ended
			return true, f.reached(ctx, src, place{log.Following, 0})
		}
		return false, nil
	}
	text, err := f.write(log, rows)
	if err == nil {
		err = f.send(ctx, text)
	}
	if err == nil {
		err = f.reached(ctx, src, place{log.Origin, rows[len(rows)-1].Leaf + 1})
	}
	if err != nil {
		return false, err
	}
	f.sent.Add(int64(len(rows)))
	f.lag.Store(log.Size - f.at.next)
	return true, nil
}

// reached goes on to a place. A file has what is before it; a connection has only taken it.
func (f *Forwarder) reached(ctx context.Context, src Source, p place) error {
	f.at = &p
	if _, connected := f.conn.(net.Conn); connected {
		f.unsettled = append(f.unsettled, mark{time.Now(), p})
		return nil
	}
	return src.MoveCursor(ctx, f.c.Name, p.origin, p.next)
}

// settle moves the cursor over what the connection has taken so long ago that it has been read.
func (f *Forwarder) settle(ctx context.Context, src Source, now time.Time) error {
	old := 0
	for old < len(f.unsettled) && now.Sub(f.unsettled[old].at) >= ResendTime {
		old++
	}
	if old == 0 {
		return nil
	}
	last := f.unsettled[old-1]
	f.unsettled = f.unsettled[old:]
	return src.MoveCursor(ctx, f.c.Name, last.origin, last.next)
}

// write puts rows into the sink's format.
func (f *Forwarder) write(log Log, rows []audit.Row) ([]byte, error) {
	var out, text []byte
	for _, r := range rows {
		e, err := audit.ParseEvent(r.Body)
		if err != nil {
			return nil, err
		}
		if text, err = f.c.Format(text[:0], Record{Log: log.Name, Leaf: r.Leaf, Text: r.Body, Event: e}); err != nil {
			return nil, err
		}
		if f.c.Framed {
			out = append(strconv.AppendInt(out, int64(len(text)), 10), ' ')
			out = append(out, text...)
		} else {
			out = append(append(out, text...), '\n')
		}
	}
	return out, nil
}

// hangUp closes the sink. It is begun again where the cursor is: what a connection has
// taken lately is sent again.
func (f *Forwarder) hangUp() {
	f.close()
	f.at, f.unsettled = nil, nil
}

func (f *Forwarder) send(ctx context.Context, text []byte) error {
	if f.conn == nil {
		if err := f.open(ctx); err != nil {
			return err
		}
	}
	if conn, ok := f.conn.(net.Conn); ok {
		if err := conn.SetWriteDeadline(time.Now().Add(sinkTime)); err != nil {
			return err
		}
	}
	w := bufio.NewWriterSize(f.conn, 64<<10)
	if _, err := w.Write(text); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if file, ok := f.conn.(*os.File); ok {
		return file.Sync()
	}
	return nil
}

func (f *Forwarder) open(ctx context.Context) (err error) {
	dialer := &net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: deadTime / 3, Interval: deadTime / 6, Count: 4}, Control: limitUnacknowledged,
	}
	kind, place, _ := strings.Cut(f.c.To, ":")
	ctx, cancel := context.WithTimeout(ctx, sinkTime)
	defer cancel()
	switch kind {
	case "file":
		f.conn, err = openFile(place)
	case "tcp":
		err = f.watch(dialer.DialContext(ctx, "tcp", place))
	case "tls":
		d := tls.Dialer{NetDialer: dialer, Config: f.c.TLS}
		err = f.watch(d.DialContext(ctx, "tcp", place))
	default:
		return fmt.Errorf("%q is nowhere to send to", f.c.To)
	}
	return err
}

// openFile opens a file to be appended to; what a crash has left of a last line is
// ended, so that it spoils no other.
func openFile(name string) (writer, error) {
	file, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && info.Size() > 0 {
		last := make([]byte, 1)
		if _, err = file.ReadAt(last, info.Size()-1); err == nil && last[0] != '\n' {
			_, err = file.Write([]byte{'\n'})
		}
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// watch takes a connection that was made, and notices when its other end goes, also
// while there is nothing to send: a sink says nothing else.
func (f *Forwarder) watch(conn net.Conn, err error) error {
	if err != nil {
		return err
	}
	f.conn, f.broken = conn, make(chan struct{})
	go func(gone chan struct{}) {
		defer close(gone)
		_, _ = io.Copy(io.Discard, conn) // until it ends, or close ends it
	}(f.broken)
	return nil
}

func (f *Forwarder) close() {
	if f.conn != nil {
		_ = f.conn.Close() // what it has taken was counted
		if f.broken != nil {
			<-f.broken
		}
		f.conn, f.broken = nil, nil
	}
}
