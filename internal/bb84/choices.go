package bb84

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
)

// SeedSize is the size in bytes of the seed that each end gives its device.
const SeedSize = 32

// Choices are the secret choices of one end in one block, addressed by gate: the
// basis, and a bit. Alice's bit is the one that she sends; Bob's stands in for the
// outcome of a double click.
//
// They are the key stream of AES-256 in counter mode, 16 bits a gate: the low bit
// is the bit, the other 15 decide the basis. The AES key is derived from the seed
// by HKDF-SHA-256 for one end, session and block, so that no two streams are
// alike. A Choices is for one goroutine.
type Choices struct {
	block     cipher.Block
	threshold uint16 // of 2^15; below it the basis is X

	window [windowGates * gateBytes]byte // key stream from the gate first on
	first  int64
	filled int64 // gates in the window
}

const (
	gateBytes   = 2
	blockGates  = aes.BlockSize / gateBytes // gates in one AES block
	windowGates = 2048
	near        = 4 * blockGates // a gap for which it pays to fill the whole window
)

// AliceChoices are the choices of the sending end. It keeps no reference to seed.
func AliceChoices(seed *[SeedSize]byte, session, block int64, px float64) (*Choices, error) {
	return newChoices(seed, "alice", session, block, px)
}

// BobChoices are the choices of the receiving end. It keeps no reference to seed.
func BobChoices(seed *[SeedSize]byte, session, block int64, px float64) (*Choices, error) {
	return newChoices(seed, "bob", session, block, px)
}

func newChoices(seed *[SeedSize]byte, end string, session, block int64, px float64) (*Choices, error) {
	info := fmt.Sprintf("kme/bb84/choices/1 %s %d %d", end, session, block)
	k, err := hkdf.Key(sha256.New, seed[:], nil, info, 32)
	if err != nil {
		return nil, fmt.Errorf("deriving the key of %s's choices: %w", end, err)
	}
	defer clear(k)
	b, err := aes.NewCipher(k)
	if err != nil {
		return nil, fmt.Errorf("making %s's choices: %w", end, err)
	}
	return &Choices{block: b, threshold: uint16(math.Round(px * (1 << 15)))}, nil
}

// At gives the choices of a gate, counted from 0. Gates may be asked in any order;
// ascending is fastest.
func (c *Choices) At(gate int64) (Basis, byte) {
	i := gate - c.first
	if uint64(i) >= uint64(c.filled) {
		c.fill(gate, i)
		i = gate - c.first
	}
	w := binary.LittleEndian.Uint16(c.window[i*gateBytes:])
	basis := Z
	if w>>1 < c.threshold {
		basis = X
	}
	return basis, byte(w & 1)
}

// fill brings the key stream of gate into the window: all of the window when the
// gates asked for lie close together, one AES block when most are skipped.
func (c *Choices) fill(gate, ahead int64) {
	c.first = gate - gate%blockGates
	var counter [aes.BlockSize]byte
	binary.BigEndian.PutUint64(counter[8:], uint64(gate/blockGates))
	if ahead < c.filled || ahead > c.filled+near {
		c.block.Encrypt(c.window[:aes.BlockSize], counter[:])
		c.filled = blockGates
		return
	}
	clear(c.window[:])
	cipher.NewCTR(c.block, counter[:]).XORKeyStream(c.window[:], c.window[:])
	c.filled = windowGates
}

// Wipe overwrites the key stream held in memory. The Choices stays usable.
func (c *Choices) Wipe() {
	clear(c.window[:])
	c.filled = 0
}
