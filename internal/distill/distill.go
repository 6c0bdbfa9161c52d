// Package distill turns what a quantum channel left at its two ends into one
// string of secret bits that both ends hold: sift, estimate, reconcile, verify,
// amplify, and agree on the terms under which the bits enter the pools. It holds
// both machines, Alice's and Bob's, as functions over a message channel. There is
// no clock in it, no socket and no physics: what Alice sent and what Bob's
// detectors saw come in through callbacks, and the length of the secret comes in
// as a number.
//
// What it promises. Either both ends end with the same bits, or at least one ends
// with an error. A block whose figures leave the profile (error rate, counts,
// leak, verification, terms) ends as an Abort at both ends, and the channel stays
// in step for the next block. Any other error means that the channel must not be
// used again. A peer that lies, truncates, reorders or repeats gets an error,
// never a key. Every buffer that held secret bits is overwritten, but for the bits
// in the Outcome, which belong to the caller.
//
// What it must never do: say anything about a gate before Bob's list is complete;
// choose a length after looking at the data; reveal a bit that it does not count.
//
// Authentication is the channel's. The two hashes at the end compare what was
// said, so nothing that a middle changed goes unseen as long as that middle cannot
// change the last two messages; it is the channel that must keep it from those.
//
// Secrecy (textbook profile: single photons, bases X for key and Z for test).
// Tomamichel, Lim, Gisin, Renner (Nat. Commun. 3, 634, 2012): n key bits, k test
// bits, abort above a fixed error rate, one fixed length l for every block that
// passes, computed for the worst block that may pass. A block is a fixed number
// of gates; all its sifted events are used, or a uniformly random choice of n and
// of k of them.
//
// The leak is every parity bit that Alice reveals. Bob's side of the dialogue is
// not counted, and this is why it need not be. Which parities Bob asks for follows
// from the public seed and from the error pattern W = (Alice's key bits) XOR (Bob's)
// alone, so it is enough to let Eve have all of W. Bob measures qubits, so W is the
// outcome of measuring X on both qubits of a pair and multiplying: X(x)X, which
// commutes with Z(x)Z, whose outcomes are the phase errors that the test basis
// bounds. W may thus be measured first and handed to Eve without changing the
// statistics of the phase errors, and the uncertainty relation bounds her knowledge
// of Alice's bits given W by the same figure. (That the question
// must be asked: Tupkary and Luetkenhaus, arXiv 2307.00576.) The argument is one about
// qubits; a profile with multi-photon pulses needs its own, or must count both
// directions.
package distill

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math"
)

// The bases of a gate. Key is made from gates that both ends measured in KeyBasis;
// gates of TestBasis at both ends bound what Eve may know.
const (
	KeyBasis  byte = 0 // X
	TestBasis byte = 1 // Z
)

// The stages told to Progress, in this order.
const (
	StageSift      = "sift"
	StageEstimate  = "estimate"
	StageReconcile = "reconcile"
	StageVerify    = "verify"
	StageAmplify   = "amplify"
)

// TagBits is what verification reveals of the key, in bits, beyond Params.LeakLimit.
// Whoever computes Params.SecretBits subtracts it: it is the term log2(1/eps_cor).
const TagBits = 128

// maxLink is the longest name of a link, in bytes.
const maxLink = 255

// Channel carries messages to the other end and back, in order and whole. It must
// be authenticated. A body that was received belongs to the receiver; a body that
// was sent is not kept. Recv returns an error once the channel is closed, which
// is the way to stop a machine that waits.
type Channel interface {
	Send(kind byte, body []byte) error
	Recv() (kind byte, body []byte, err error)
}

// Params is the profile of a link. Both ends must have the same; the first message
// of a block says so by a hash over all of it.
type Params struct {
	Gates    int64   // gates of a block, fixed before the first one is fired
	KeyBits  int     // n: sifted bits of the key basis that a block uses; a power of two
	TestBits int     // k: sifted bits of the test basis that a block uses
	QTol     float64 // highest error rate of the test basis that passes
	PX       float64 // probability of the key basis, at both ends

	// LeakLimit is the highest number of bits that reconciliation may reveal.
	LeakLimit int
	// EpsSec is the secrecy parameter that SecretBits was computed for.
	EpsSec float64
	// SecretBits is the length l in bits of the secret of every block that passes,
	// computed by the caller at the worst corner: n, k, QTol, LeakLimit and TagBits.
	SecretBits int
}

// Validate says what is wrong with p, if anything is.
func (p Params) Validate() error {
	switch {
	case p.KeyBits < 1<<10 || p.KeyBits > 1<<22 || p.KeyBits&(p.KeyBits-1) != 0:
		return fmt.Errorf("%d key bits a block: must be a power of two from 2^10 to 2^22", p.KeyBits)
	case p.TestBits < 1 || p.TestBits > 1<<24:
		return fmt.Errorf("%d test bits a block: must be 1 to 2^24", p.TestBits)
	case p.Gates < int64(p.KeyBits)+int64(p.TestBits) || p.Gates > 1<<48:
		return fmt.Errorf("%d gates a block: must be at least the key and test bits and at most 2^48", p.Gates)
	case !(p.QTol > 0 && p.QTol <= 0.11):
		return fmt.Errorf("tolerated error rate %v: must be above 0 and at most 0.11", p.QTol)
	case !(p.PX > 0 && p.PX < 1):
		return fmt.Errorf("probability %v of the key basis: must be between 0 and 1", p.PX)
	case !(p.EpsSec > 0 && p.EpsSec < 1):
		return fmt.Errorf("secrecy parameter %v: must be between 0 and 1", p.EpsSec)
	case p.LeakLimit < 1:
		return fmt.Errorf("leak limit of %d bits: must be positive", p.LeakLimit)
	case p.SecretBits < 1:
		return fmt.Errorf("%d secret bits a block: this profile makes no key", p.SecretBits)
	case p.LeakLimit > p.KeyBits || p.SecretBits+p.LeakLimit+TagBits > p.KeyBits:
		return fmt.Errorf("%d secret bits, a leak of %d and a tag of %d do not fit into %d key bits",
			p.SecretBits, p.LeakLimit, TagBits, p.KeyBits)
	}
	return nil
}

// digest names the profile in the first message of a block.
func (p Params) digest() [sha256.Size]byte {
	b := []byte("kme/distill/profile/1\x00")
	for _, v := range []uint64{
		uint64(p.Gates), uint64(p.KeyBits), uint64(p.TestBits),
		math.Float64bits(p.QTol), math.Float64bits(p.PX),
		uint64(p.LeakLimit), math.Float64bits(p.EpsSec), uint64(p.SecretBits),
	} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return sha256.Sum256(b)
}

// Terms is how a block enters the pools. It is opaque here: Alice's callback makes
// it, Bob's judges it, and it is part of the transcript that both ends compare.
type Terms struct {
	Epoch  int64  // start of the block's epoch, in the callers' unit
	Owners string // which end owns which part; at most MaxOwners bytes
}

// MaxOwners is the longest Terms.Owners in bytes.
const MaxOwners = 1 << 14

// Detection is a gate at which Bob's detectors clicked.
type Detection struct {
	Gate  int64 // counted from 0 within the block
	Basis byte  // KeyBasis or TestBasis: Bob's choice
	Bit   byte  // 0 or 1; of a double click, Bob's random bit
}

// AliceConfig is what Alice's machine needs for one block.
type AliceConfig struct {
	Params
	Link    string // name of the link, at most 255 bytes; equal at both ends
	Session int64  // not negative
	Block   int64  // not negative; Alice numbers the blocks of a session upwards

	// Sent answers the basis and the bit that were sent at each of the gates, which
	// ascend strictly. Both answers are packed, least significant bit first: that of
	// gates[i] is bit i%8 of byte i/8. A set bit among bases is TestBasis. It is
	// called once a block; the machine owns and wipes what it returns.
	Sent func(ctx context.Context, gates []int64) (bases, bits []byte, err error)

	// Random yields the public seeds, the point of the verification hash and the
	// seed of amplification: uniform, fresh, unpredictable before it is sent.
	Random io.Reader

	// Terms makes the terms for a block of so many atoms, knowing how many atoms
	// Bob's end said that it has stored.
	Terms func(atoms, bobStored int) Terms

	// Progress, if not nil, is told how much of a stage is done, from 0 to 1.
	Progress func(stage string, done float64)
}

// BobConfig is what Bob's machine needs for one block.
type BobConfig struct {
	Params
	Link    string // name of the link, at most 255 bytes; equal at both ends
	Session int64  // a block of another session is an error

	// MinBlock is the lowest block number that Bob takes: one more than that of the
	// last block begun in this session. A lower one is a repeat, and an error.
	MinBlock int64

	// Detections answers what the detectors saw in the block, gates ascending
	// strictly. It is called once a block; the machine owns and wipes the answer.
	Detections func(ctx context.Context, session, block int64) ([]Detection, error)

	// Stored answers how many atoms Bob's end has stored.
	Stored func() int

	// Accept judges Alice's terms for a block of so many atoms. An error aborts the
	// block; it is kept in Abort.Err here and not told to Alice.
	Accept func(terms Terms, atoms int) error

	// Progress, if not nil, is told how much of a stage is done, from 0 to 1.
	Progress func(stage string, done float64)
}

// Reasons of an Abort.
const (
	ReasonCounts = "counts too low"             // sifted bits below n or k
	ReasonQBER   = "error rate above tolerance" // in the test basis
	ReasonLeak   = "leak above limit"           // reconciliation would have to reveal more
	ReasonVerify = "verification failed"        // the keys still differ
	ReasonTerms  = "terms refused"              // Bob does not take the block under Alice's terms
)

// Abort is the error of a block that was given up by the rules. Both ends get it,
// and the channel is in step for the next block.
type Abort struct {
	Reason string  // one of the Reason constants
	QBER   float64 // error rate of the test bits; 0 if it was not yet known
	Peer   bool    // the other end decided it
	Err    error   // more about it, at the end that decided; may be nil
}

// Error says why, with the error rate.
func (a *Abort) Error() string {
	s := fmt.Sprintf("block aborted: %s (error rate %.2f %%)", a.Reason, 100*a.QBER)
	if a.Err != nil {
		s += ": " + a.Err.Error()
	}
	return s
}

// Unwrap is Err.
func (a *Abort) Unwrap() error { return a.Err }
