package distill

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"
	"slices"
)

// The two ends, as the transcript names them.
const (
	alice byte = 'a'
	bob   byte = 'b'
)

// talk is one end of the dialogue about a block. The ends speak by turns, so whoever
// gives the block up says so in place of the message that the other end waits for, and
// nothing is left in the channel.
type talk struct {
	ctx        context.Context // looked at between messages
	ch         Channel
	me         byte
	testBits   int
	transcript hash.Hash     // names the block
	auth       authenticator // proves it to the other end
	said       int64         // bytes of it, in blocks of 16
}

func newTalk(ctx context.Context, ch Channel, me byte, testBits int) *talk {
	t := &talk{ctx: ctx, ch: ch, me: me, testBits: testBits, transcript: sha256.New()}
	t.transcript.Write([]byte("kme/distill/transcript/2\x00"))
	return t
}

func (t *talk) peer() byte { return alice + bob - t.me }

// record adds a message to the transcript.
func (t *talk) record(from, kind byte, body []byte) {
	head := binary.BigEndian.AppendUint64([]byte{from, kind}, uint64(len(body)))
	t.transcript.Write(head)
	t.transcript.Write(body)
	t.auth.record(from, kind, body)
	t.said += 16 + int64(len(body)+15)&^15
}

func (t *talk) send(kind byte, body []byte) error {
	if err := t.ctx.Err(); err != nil {
		return err
	}
	t.record(t.me, kind, body)
	if err := t.ch.Send(kind, body); err != nil {
		return fmt.Errorf("sending message %d: %w", kind, err)
	}
	return nil
}

// receive waits for a message of one of the kinds. An abort of the other end is an
// *Abort.
func (t *talk) receive(kinds ...byte) (kind byte, body []byte, err error) {
	if err := t.ctx.Err(); err != nil {
		return 0, nil, err
	}
	kind, body, err = t.ch.Recv()
	switch {
	case err != nil:
		return 0, nil, fmt.Errorf("waiting for message %d: %w", kinds[0], err)
	case kind == kindAbort && kinds[0] != kindBegin:
		m, err := parseAbort(body, t.testBits)
		if err != nil {
			return 0, nil, fmt.Errorf("reading an abort: %w", err)
		}
		return 0, nil, t.aborted(m, true, nil)
	case !slices.Contains(kinds, kind):
		return 0, nil, fmt.Errorf("message %d in the place of %d", kind, kinds[0])
	}
	t.record(t.peer(), kind, body)
	return kind, body, nil
}

// abort tells the other end that the block is given up, and is the error to end with.
// It must be called when it is this end's turn to speak.
func (t *talk) abort(reason string, errors int, cause error) error {
	m := abortMessage{reason: slices.Index(abortReasons[:], reason), errors: errors}
	if err := t.send(kindAbort, m.encode()); err != nil {
		return err
	}
	return t.aborted(m, false, cause)
}

func (t *talk) aborted(m abortMessage, peer bool, cause error) *Abort {
	return &Abort{
		Reason: abortReasons[m.reason],
		QBER:   float64(m.errors) / float64(t.testBits),
		Peer:   peer,
		Err:    cause,
	}
}

// sum is the transcript so far.
func (t *talk) sum() [32]byte { return [32]byte(t.transcript.Sum(nil)) }

// arm begins authentication. The message that names the pad has been recorded with
// nothing to hash it by, and is recorded again.
func (t *talk) arm(pad Pad, from byte, begin []byte) {
	t.auth.disarm()
	t.auth.arm(pad)
	t.auth.record(from, kindBegin, begin)
}

// confirm sends this end's tag. The pad must be committed as spent.
func (t *talk) confirm() error {
	tag := t.auth.tag(t.me)
	return t.send(kindConfirm, tag[:])
}

// confirmed receives the other end's tag and compares it with what it should be.
func (t *talk) confirmed() error {
	want := t.auth.tag(t.peer())
	_, body, err := t.receive(kindConfirm)
	if err != nil {
		return err
	}
	theirs, err := parseConfirm(body)
	if err != nil {
		return fmt.Errorf("reading the tag: %w", err)
	}
	if subtle.ConstantTimeCompare(theirs[:], want[:]) != 1 {
		return ErrTag
	}
	return nil
}
