package distill

import (
	"crypto/subtle"
	"encoding/binary"
	"fmt"
)

// PadBytes is the size of a pad in bytes.
const PadBytes = 48

// PadName names a pad: the block whose secret it was part of, and its place there. Pads
// are spent in the order of their names, so that the highest one spent says which are.
type PadName struct {
	Session, Block int64
	Index          int // from 0, below 2^16
}

// String is "session/block/index".
func (n PadName) String() string { return fmt.Sprintf("%d/%d/%d", n.Session, n.Block, n.Index) }

// Compare orders names.
func (n PadName) Compare(m PadName) int {
	for _, d := range [...]int64{n.Session - m.Session, n.Block - m.Block, int64(n.Index - m.Index)} {
		if d < 0 {
			return -1
		}
		if d > 0 {
			return 1
		}
	}
	return 0
}

// Pad is the secret that authenticates one block: 16 bytes each of the point at which the
// hash is taken, Alice's mask and Bob's. No part of it may be used for anything else.
type Pad struct {
	Name PadName
	Bits [PadBytes]byte
}

// authenticator is the running polynomial hash of a transcript. Each message is a head
// of 16 bytes that says who sent it, its kind and its length, and its body, filled up with
// zeros to a multiple of 16; so two transcripts that differ are two different polynomials.
type authenticator struct {
	pad Pad
	polynomial
}

// arm begins with the pad of the block. The copy of it is wiped by disarm.
func (a *authenticator) arm(pad Pad) {
	a.pad = pad
	a.polynomial = newPolynomial([16]byte(pad.Bits[:16]))
}

func (a *authenticator) disarm() {
	clear(a.pad.Bits[:])
	a.polynomial = polynomial{}
}

func (a *authenticator) record(from, kind byte, body []byte) {
	a.add(element{lo: uint64(from)<<8 | uint64(kind), hi: uint64(len(body))})
	at := func(i int) element {
		return element{binary.LittleEndian.Uint64(body[16*i:]), binary.LittleEndian.Uint64(body[16*i+8:])}
	}
	if fours := len(body) / 64; fours > 0 && hasFours {
		addFoursAsm(&a.sum, &a.powers, &body[0], fours)
		body = body[64*fours:]
	}
	for ; len(body) >= 64; body = body[64:] {
		a.add4(at(0), at(1), at(2), at(3))
	}
	for ; len(body) >= 16; body = body[16:] {
		a.add(at(0))
	}
	if len(body) > 0 {
		var last [16]byte
		copy(last[:], body)
		a.add(elementFrom(last))
	}
}

// tag is that of an end over all that was recorded.
func (a *authenticator) tag(end byte) [16]byte {
	mask := a.pad.Bits[16:32]
	if end == bob {
		mask = a.pad.Bits[32:48]
	}
	t := a.sum.bytes()
	subtle.XORBytes(t[:], t[:], mask)
	return t
}
