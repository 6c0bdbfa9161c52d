// Package qlink is the quantum channel of a link and what a KME sees of it.
//
// The channel runs as a process of its own (Server), the only one that knows the
// physics: laser, fibre, detectors, and Eve if asked. It stands where hardware
// would. Each end has a local socket that opens with that end's secret, and a Box
// is the client of one: Alice's KME seeds her transmitter, fires blocks of gates
// and reads back what was sent at the gates that Bob names; Bob's KME seeds his
// receiver and reads what it saw. A Source puts a Box and the classical channel
// together and yields blocks of secret bits.
//
// What it promises. A block is a number of gates fixed before the first of them,
// and Bob's end learns nothing of a block before the last one is measured. The
// transmitter answers for each gate of a session once, in ascending order, and only for
// the blocks fired last, a few. What either end keeps secret comes from the seed of its own
// KME. Light that meets no seeded receiver is lost and fails nobody. Either KME
// may be killed and come back at any moment: its end is as dark as if new, and
// nothing of a block begun before reaches it.
//
// What it must never do: hand one end the seed, the bits or the choices of the
// other; keep a block for longer than until the next few are fired; log a bit of either.
package qlink

import (
	"errors"
	"log/slog"

	"github.com/qutemail/kme/internal/bb84"
)

var (
	// ErrCut says that the fibre is cut. A block that was under way is gone; the
	// next may be fired as soon as the fibre is mended.
	ErrCut = errors.New("the fibre is cut")

	// ErrLost says that the receiver has nothing of the block: it was not seeded
	// for the session when the block was fired, was asked before, or a later block
	// has replaced it.
	ErrLost = errors.New("the receiver holds no such block")
)

// Refusal is the error of a request that breaks the rules of a device: a gate
// asked twice, a block number used again, a wrong secret. The Box stays usable
// unless it was refused at OpenBox.
type Refusal struct {
	Reason string
}

// Error gives the reason.
func (r *Refusal) Error() string { return "the quantum channel refused: " + r.Reason }

// Config is what a Server needs. All paths of sockets must stay under 108 bytes.
type Config struct {
	AliceSocket, BobSocket string // local sockets of the two ends, made with mode 0600

	// AliceSecretFile and BobSecretFile hold the secret that opens each socket: 16
	// to 1024 bytes, not counting line ends at the end of the file, which nobody
	// but the owner may read.
	AliceSecretFile, BobSecretFile string

	// ControlSocket takes the commands of Command. Its mode, 0600, is its only
	// guard: who may open it may listen in as Eve. Empty: there is none.
	ControlSocket string

	Params bb84.Params
	Eve    bb84.Eve // at the start

	// PhysicsSeed fixes what fibre and detectors do, so that a test can be played
	// again. 0: a fresh random seed for each block.
	PhysicsSeed uint64

	Log *slog.Logger
}
