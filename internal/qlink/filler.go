package qlink

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// Filler is a source of blocks without light: Alice's end draws a seed and sends
// it over the classical channel, and both ends expand it. Its keys are as secret
// as that channel and no more. It serves load tests and benchmarks, which need
// more keys than the simulated light makes; what it yields is key.Simulated, which
// a production node refuses.
type Filler struct {
	FillerConfig
	ear  *ear // of the Channel
	next int64
}

// FillerConfig is what a Filler needs. All must be set, but Terms and Accept only
// at Alice's and Bob's end.
type FillerConfig struct {
	End     handover.End
	Link    string
	Session int64
	Channel distill.Channel
	Atoms   int // in a block; equal at both ends
	Random  io.Reader
	Terms   func(atoms, bobStored int) distill.Terms
	Accept  func(terms distill.Terms, atoms int) error
}

// NewFiller returns a Filler, which takes over what the channel receives. Whoever has it
// closes the channel and then the Filler.
func NewFiller(c FillerConfig) (*Filler, error) {
	if c.Channel == nil || c.Random == nil || c.Atoms < 1 || c.End == handover.Alice && c.Terms == nil || c.End == handover.Bob && c.Accept == nil {
		return nil, errors.New("configuring a filler: a part is missing")
	}
	return &Filler{FillerConfig: c, ear: newEar(c.Channel), next: 1}, nil
}

// kindFill is Alice's block and Bob's acknowledgement.
const kindFill = 0x7d

// fill is what Alice says of a block.
type fill struct {
	Block  int64  `json:"block"`
	Seed   []byte `json:"seed"`
	Epoch  int64  `json:"epoch"`
	Owners string `json:"owners"`
}

// Next makes one block. Any error ends the session.
func (f *Filler) Next(ctx context.Context) (Block, error) {
	if err := ctx.Err(); err != nil {
		return Block{}, err
	}
	if f.End == handover.Alice {
		return f.lead()
	}
	return f.follow()
}

// Rest is not called: nothing of a Filler is ever under way between two calls.
func (f *Filler) Rest() (Block, error) { return Block{}, errors.New("a filler has no block under way") }

// Pending is 0.
func (f *Filler) Pending() int { return 0 }

// Gone is closed when the channel has ended.
func (f *Filler) Gone() <-chan struct{} { return f.ear.gone }

// Close returns when the channel, which must have been closed, has been read to its end.
func (f *Filler) Close() { f.ear.wait() }

func (f *Filler) lead() (Block, error) {
	begun, terms := time.Now(), f.Terms(f.Atoms, 0)
	m := fill{Block: f.next, Seed: make([]byte, 32), Epoch: terms.Epoch, Owners: terms.Owners}
	f.next++
	if _, err := io.ReadFull(f.Random, m.Seed); err != nil {
		return Block{}, fmt.Errorf("drawing a seed: %w", err)
	}
	body, err := json.Marshal(m)
	if err != nil {
		return Block{}, err
	}
	if err := f.Channel.Send(kindFill, body); err != nil {
		return Block{}, err
	}
	kind, answer, err := f.ear.Recv()
	if err != nil {
		return Block{}, err
	}
	if kind != kindFill || len(answer) != 0 {
		return Block{}, fmt.Errorf("%w: kind %#x of %d bytes", errMalformed, kind, len(answer))
	}
	return f.block(m, sha256.Sum256(body), begun)
}

func (f *Filler) follow() (Block, error) {
	kind, body, err := f.ear.Recv()
	if err != nil {
		return Block{}, err
	}
	begun := time.Now()
	var m fill
	if kind != kindFill || json.Unmarshal(body, &m) != nil || len(m.Seed) != 32 || m.Block < f.next {
		return Block{}, fmt.Errorf("%w: kind %#x of %d bytes", errMalformed, kind, len(body))
	}
	f.next = m.Block + 1
	if err := f.Accept(distill.Terms{Epoch: m.Epoch, Owners: m.Owners}, f.Atoms); err != nil {
		return Block{}, err
	}
	if err := f.Channel.Send(kindFill, nil); err != nil {
		return Block{}, err
	}
	return f.block(m, sha256.Sum256(body), begun)
}

// block expands the seed.
func (f *Filler) block(m fill, transcript [32]byte, begun time.Time) (Block, error) {
	defer clear(m.Seed)
	c, err := aes.NewCipher(m.Seed)
	if err != nil {
		return Block{}, err
	}
	bits := make([]byte, f.Atoms*key.AtomBytes)
	cipher.NewCTR(c, make([]byte, aes.BlockSize)).XORKeyStream(bits, bits)
	return Block{Provenance: key.Simulated, Took: time.Since(begun), Outcome: distill.Outcome{
		Session: f.Session, Block: m.Block, Bits: bits, Length: 8 * len(bits),
		Terms: distill.Terms{Epoch: m.Epoch, Owners: m.Owners}, Transcript: transcript,
	}}, nil
}
