package bb84

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
)

// SeedSize is the size in bytes of the seed that each end gives its device.
const SeedSize = 32

// Sent is what Alice's transmitter did in a gate.
type Sent struct {
	Basis     Basis
	Bit       byte
	Intensity byte // index into Params.Intensities
}

// Choices are the secret choices of one end in one block. Alice's are the basis, the
// bit and the intensity of a pulse; Bob's a basis, and the bit that stands in for the
// outcome of a double click.
//
// They are the key stream of AES-256 in counter mode, 8 bytes a draw, under a key that
// HKDF-SHA-256 derives from the seed for one end, session and block, so that no two
// streams are alike. A draw is made only for a gate that somebody will ask about: the
// choices of gates being independent, it makes no difference when each is drawn, and
// those of dark gates are never known to anybody. A Choices is for one goroutine.
type Choices struct {
	stream      cipher.Stream
	basis       uint32 // of 2^31; below it the basis is X
	intensities spread

	window [windowBytes]byte // key stream; what is before at is used up
	at     int
}

const windowBytes = 4096

// spread turns 32 random bits into the index of an intensity: as many as there are
// bounds at or below them. It takes 2^-32 for granted as precision.
type spread [MaxIntensities - 1]uint64

// newSpread makes a spread of weights, which need not add up to 1.
func newSpread(weights []float64) spread {
	sum := 0.
	for _, w := range weights {
		sum += w
	}
	s := spread{1 << 32, 1 << 32}
	below := 0.
	for i := range s {
		if i >= len(weights)-1 || !(sum > 0) {
			break
		}
		below += weights[i]
		s[i] = uint64(math.Round(below / sum * (1 << 32)))
	}
	return s
}

// pick goes without branches, like all that is done for each click: which way they would
// go is random, and a wrong guess of the processor costs as much as a draw.
func (s *spread) pick(u uint32) byte {
	_, below0 := bits.Sub64(uint64(u), s[0], 0)
	_, below1 := bits.Sub64(uint64(u), s[1], 0)
	return byte(2 - below0 - below1)
}

// AliceChoices are the choices of the sending end. It keeps no reference to seed.
func AliceChoices(seed *[SeedSize]byte, session, block int64, p Params) (*Choices, error) {
	return newChoices(seed, "alice", session, block, p)
}

// BobChoices are the choices of the receiving end. It keeps no reference to seed.
func BobChoices(seed *[SeedSize]byte, session, block int64, p Params) (*Choices, error) {
	return newChoices(seed, "bob", session, block, p)
}

func newChoices(seed *[SeedSize]byte, end string, session, block int64, p Params) (*Choices, error) {
	info := fmt.Sprintf("kme/bb84/choices/2 %s %d %d", end, session, block)
	k, err := hkdf.Key(sha256.New, seed[:], nil, info, 32)
	if err != nil {
		return nil, fmt.Errorf("deriving the key of %s's choices: %w", end, err)
	}
	defer clear(k)
	b, err := aes.NewCipher(k)
	if err != nil {
		return nil, fmt.Errorf("making %s's choices: %w", end, err)
	}
	weights := make([]float64, len(p.Intensities))
	for i, in := range p.Intensities {
		weights[i] = in.P
	}
	return &Choices{
		stream: cipher.NewCTR(b, make([]byte, aes.BlockSize)), at: windowBytes,
		basis: uint32(math.Round(p.PX * (1 << 31))), intensities: newSpread(weights),
	}, nil
}

// drawBytes is what a draw takes of the key stream.
const drawBytes = 8

// draw takes the next bytes of the stream and overwrites them.
func (c *Choices) draw() uint64 {
	v := binary.LittleEndian.Uint64(c.coming(1))
	c.drop(1)
	return v
}

// coming is the key stream of the draws to come: of most at most, and of one at least.
func (c *Choices) coming(most int) []byte {
	if c.at == windowBytes {
		clear(c.window[:])
		c.stream.XORKeyStream(c.window[:], c.window[:])
		c.at = 0
	}
	return c.window[c.at:min(windowBytes, c.at+drawBytes*most)]
}

// drop overwrites the next draws.
func (c *Choices) drop(draws int) {
	clear(c.window[c.at : c.at+drawBytes*draws])
	c.at += drawBytes * draws
}

// choose is the basis and the bit of a draw: bit 0, and bits 1 to 31.
func (c *Choices) choose(v uint64) (Basis, byte) {
	_, below := bits.Sub32(uint32(v)>>1, c.basis, 0)
	return Z ^ Basis(below), byte(v & 1)
}

// Sent draws what Alice sent in a gate in which Bob's detectors did nothing.
func (c *Choices) Sent() Sent { return c.sent(&c.intensities) }

// sent draws what she sent, with the intensities as likely as s says.
func (c *Choices) sent(s *spread) Sent { return c.sentBy(c.draw(), s) }

func (c *Choices) sentBy(v uint64, s *spread) Sent {
	basis, bit := c.choose(v)
	return Sent{Basis: basis, Bit: bit, Intensity: s.pick(uint32(v >> 32))}
}

// Wipe overwrites the key stream held in memory. The Choices must not be used again.
func (c *Choices) Wipe() {
	clear(c.window[:])
	c.stream = nil
	c.at = windowBytes
}
