// Package hsm keeps the key-encryption keys (KEKs) of a KME inside a PKCS#11
// token and seals and opens keys with them: AES-256-GCM by C_Encrypt, a random
// 12-byte IV and a 16-byte tag, both pinned here and not left to the module.
//
// It promises that a KEK is born in the token and cannot leave it; that a blob
// that was tampered with (ErrTampered) is told apart from a token that does not
// answer (ErrUnavailable); that a session which saw a fault is never used again;
// and that Heartbeat brings a token that went away back into use without a
// restart, with every *KEK in a caller's hands still good.
//
// It must never be one of two owners of a module in a process, never try a login
// again whose PIN was refused, never write a key or PIN to a log, and never keep
// a copy of a plain key: what goes in belongs to the caller, what comes out does.
//
// A call that has entered the module cannot be cancelled. When its context ends the
// caller is answered, and the call is left to itself: it keeps its turn until the module
// returns, so that MaxConcurrent bounds how many threads a slow token can hold.
//
// SoftHSM is files: whoever copies its directory and the PIN opens everything.
// It is for tests and labs; Info says when it is in use.
package hsm

import (
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// Sizes in bytes of what Wrap adds to a key (NIST SP 800-38D, 5.2.1).
const (
	IVBytes  = 12
	TagBytes = 16
)

// What callers branch on. Test with errors.Is.
var (
	// ErrTampered: the blob, its IV or its AAD is not what Wrap made under this
	// KEK. The token itself was seen to work just after.
	ErrTampered = errors.New("blob or its associated data was changed")
	// ErrUnavailable: the token did not do as asked, or the caller's context ended
	// while waiting for a turn. Nothing is known about the blob.
	ErrUnavailable = errors.New("hsm unavailable")
	// ErrNoKEK: the token works but this KEK is not in it (destroyed), is not what
	// it was, or was closed here.
	ErrNoKEK = errors.New("no such KEK")
	// ErrPINRefused: the token did not take the PIN, now or earlier, here or at another
	// node, or a wrong one more would lock it. Trying again cannot help: somebody has to
	// see to the PIN.
	ErrPINRefused = errors.New("PIN refused")
	// ErrNoAuthSecret: the token has no authentication secret for this link.
	ErrNoAuthSecret = errors.New("no authentication secret")
)

// AuthSecretBytes is the size of a link's authentication secret: 64 kbit.
const AuthSecretBytes = 8192

// Config says which token to use and how hard. Module, TokenLabel and one of PINFile
// and PINCredential must be set.
type Config struct {
	Module     string // absolute path of the PKCS#11 library
	ModuleArgs string // what C_Initialize is given, for modules that want it (NSS: "configdir=...")
	// WeakAttributes accepts a module that does not know CKA_ALLOWED_MECHANISMS and
	// CKA_CHECK_VALUE, or does not keep a key that is not extractable from being wrapped
	// out: whoever has the PIN can then do more with a KEK than seal and open (NSS).
	WeakAttributes bool
	TokenLabel     string // with Serial: exactly one token must have both. Slot numbers are never stored
	Serial         string // "" takes any serial number

	PINFile       string // the user PIN; only its owner may have access to the file
	PINCredential string // instead: the name of a systemd credential (LoadCredential=)
	RefusalFile   string // where a note of a refused PIN is kept, beside the one in the token; "" for nowhere
	RetryPIN      bool   // try, once, a PIN that was refused before: for an operator who has seen to the token

	// Grace is how long, when the token is away but the session copies of its KEKs still
	// work, they are used on. 0, the default, is not at all: a token that somebody has
	// pulled out on purpose opens nothing more. KEKs are neither made nor destroyed meanwhile.
	Grace time.Duration
	// StartPatience is how long Open tries again when the module fails. 0 is not at all.
	StartPatience time.Duration

	MaxConcurrent int          // calls in the module at one time, and sessions kept; 0 means 4
	Log           *slog.Logger // nil discards
}

// Stage is how a token stands.
type Stage string

// The stages of a token.
const (
	Well  Stage = "well"
	Grace Stage = "grace" // the token is away; its session copies are used until Config.Grace is over
	Down  Stage = "down"  // nothing is let into the module but the heartbeat
)

// Health is the stage, since when, and why it is not Well.
type Health struct {
	Stage Stage
	Since time.Time
	Cause error
}

// Info is what the token says of itself.
type Info struct {
	Manufacturer string
	Model        string
	Serial       string
	Software     bool // SoftHSM: for tests and labs only
}

// Sealed is what Wrap makes of a plain text.
type Sealed struct {
	IV  [IVBytes]byte
	CT  []byte // the ciphertext, as long as the plain text, then the tag
	AAD []byte // what it is bound to
}

// KEKInfo names one KEK for ever: the label for people, the ID against labels
// used twice, the check value against another key in the same place.
type KEKInfo struct {
	Label      string
	ID         []byte  // CKA_ID, 16 random bytes
	CheckValue [3]byte // CKA_CHECK_VALUE: AES-ECB of a zero block, first 3 bytes (PKCS#11 v2.40 base, 4.10.2)
}

// String names the KEK in errors and logs.
func (i KEKInfo) String() string {
	return fmt.Sprintf("%q (id %s, check value %x)", i.Label, hex.EncodeToString(i.ID), i.CheckValue)
}

// KeyStatus is a secret key of the token, ours or not, as far as it can be read.
type KeyStatus struct {
	KEKInfo
	Err error // what cannot be read of it; of Keys also what keeps it from being a KEK
}

// Check is one thing that a module must do, and why it does not.
type Check struct {
	Name string
	Err  error // nil: it does
	Weak bool  // it does not, and Config.WeakAttributes accepts that
}
