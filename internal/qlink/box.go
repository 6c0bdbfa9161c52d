package qlink

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
)

// Box is a KME's hold on its own end of the quantum channel. Its calls may come
// from several goroutines and are carried out one after the other.
//
// Errors are ErrCut, ErrLost or a *Refusal, after which the Box is as usable as
// before, or say that the connection is broken, after which every call fails. A
// context that ends during a call breaks the connection, and so does a channel that
// does not answer in time.
type Box struct {
	end      handover.End
	patience time.Duration // 0, which is callTime, but in tests
	mu       sync.Mutex
	conn     net.Conn
}

const (
	callTime = 30 * time.Second // for an answer
	fireTime = 5 * time.Minute  // for one to Fire: the light itself takes time, and more if it is simulated
)

// OpenBox connects to the local socket of an end and shows the secret in
// secretFile. Whoever had the end open is put out, and the end forgets what it
// knew: Seed comes next.
func OpenBox(ctx context.Context, path, secretFile string, end handover.End) (*Box, error) {
	secret, err := readSecret(secretFile)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connecting to the quantum channel: %w", err)
	}
	b := &Box{end: end, conn: conn}
	if _, err := b.call(ctx, kindHello, hello{end: end, secret: secret}.encode(), kindDone); err != nil {
		return nil, errors.Join(fmt.Errorf("opening %s's end: %w", end, err), b.Close())
	}
	return b, nil
}

// Close gives the end up. It is not an error to close a Box twice.
func (b *Box) Close() error {
	if err := b.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("closing the quantum channel: %w", err)
	}
	return nil
}

// Seed gives the end the seed of its secret choices and the number of the session
// (not negative), and drops what it had of an earlier one. A seed is used once.
func (b *Box) Seed(ctx context.Context, seed [bb84.SeedSize]byte, session int64) error {
	_, err := b.call(ctx, kindSeed, encodeSeed(session, &seed), kindDone)
	clear(seed[:])
	if err != nil {
		return fmt.Errorf("seeding %s's end for session %d: %w", b.end, session, err)
	}
	return nil
}

// Fire sends a block of gates from Alice's end and returns when the last is
// measured. Block numbers of a session rise; a block that failed has used its
// number up. That nobody was there to receive is not an error.
func (b *Box) Fire(ctx context.Context, session, block, gates int64) error {
	if _, err := b.call(ctx, kindFire, encodeFire(blockName{session, block}, gates), kindDone); err != nil {
		return fmt.Errorf("firing block %d of session %d: %w", block, session, err)
	}
	return nil
}

// Sent asks Alice's end for what it sent at gates of one of the blocks fired last, which
// must lie above those asked before, in this block and in all of the session: the
// transmitter's buffer is read in order and once. The answer is secret and belongs to the
// caller.
func (b *Box) Sent(ctx context.Context, session, block int64, gates distill.Gates) (distill.Sent, error) {
	body, err := b.call(ctx, kindSent, nil, kindChoices, encodeSent(blockName{session, block}, gates)...)
	if err != nil {
		return distill.Sent{}, fmt.Errorf("asking what was sent in block %d of session %d: %w", block, session, err)
	}
	sent, err := parseChoices(body, gates.Len())
	if err != nil {
		clear(body)
		return distill.Sent{}, fmt.Errorf("reading what was sent in block %d of session %d: %w", block, session, err)
	}
	return sent, nil
}

// Detections asks Bob's end for what it saw in a block, once. The answer is secret and
// belongs to the caller.
func (b *Box) Detections(ctx context.Context, session, block int64) (distill.Detections, error) {
	body, err := b.call(ctx, kindDetections, encodeName(blockName{session, block}), kindDetectedAt)
	if err != nil {
		return distill.Detections{}, fmt.Errorf("asking what was seen in block %d of session %d: %w", block, session, err)
	}
	list, err := parseDetections(body)
	if err != nil {
		clear(body)
		return distill.Detections{}, fmt.Errorf("reading what was seen in block %d of session %d: %w", block, session, err)
	}
	return list, nil
}

// call sends one request, wipes it but for what is open in it and comes first, and returns
// the body of the answer wanted.
func (b *Box) call(ctx context.Context, kind byte, body []byte, want byte, open ...[]byte) (_ []byte, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	patience := cmp.Or(b.patience, callTime)
	if kind == kindFire {
		patience = max(patience, fireTime)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("the quantum channel has not answered for %v: %w", patience, context.DeadlineExceeded))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = b.conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() { // the deadline is set, or about to be: what comes is not known to be whole
			_ = b.conn.Close()
			err = context.Cause(ctx)
		}
	}()
	answer, got, err := b.exchange(kind, body, open)
	if err != nil {
		_ = b.conn.Close() // out of step: no later call may take this one's answer
		return nil, err
	}
	switch got {
	case want:
		return answer, nil
	case kindCut:
		return nil, ErrCut
	case kindLost:
		return nil, ErrLost
	case kindRefused:
		return nil, &Refusal{Reason: string(answer)}
	}
	_ = b.conn.Close()
	return nil, fmt.Errorf("%w: answer of kind %#x", errMalformed, got)
}

func (b *Box) exchange(kind byte, body []byte, open [][]byte) (answer []byte, got byte, err error) {
	if err := writeFrame(b.conn, kind, body, open...); err != nil {
		return nil, 0, err
	}
	got, answer, err = readFrame(b.conn, maxFrame)
	return answer, got, err
}
