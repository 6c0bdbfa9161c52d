// Package key holds the words every other package uses for one quantum key:
// its ID, its secret Material, its Provenance and the states of its life.
//
// It promises that a Material cannot be printed, logged or encoded by accident
// and that no state is entered other than by a lawful move. It knows nothing of
// storage, transport or who may have a key.
package key

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"time"
)

// AtomBits is the size in bits of the unit that a block of secret bits is cut
// into, wrapped and stored as.
const AtomBits = 256

// AtomBytes is AtomBits in bytes.
const AtomBytes = AtomBits / 8

// ChunkAtoms is how many consecutive atoms of a block make a chunk, the unit of
// ownership between the two ends of a link and of leasing between nodes.
const ChunkAtoms = 64

// ID is a key_ID of ETSI GS QKD 014 (Table 11): 128 bits laid out as a UUIDv7
// (RFC 9562, 5.7) whose time is the start of the key's epoch.
type ID [16]byte

// Name is what an ID is derived from. Both ends of a link know all of it, and
// none of it is key material, so both derive the same ID without telling it.
type Name struct {
	Link       string
	Session    int64
	Block      int64
	Transcript [32]byte // SHA-256 over what both ends said while distilling the block
}

// ID returns the ID of the atom at index (counted from 0 within the block) when
// the block belongs to the epoch that starts at epochStart.
func (n Name) ID(epochStart time.Time, index int) ID {
	h := sha256.New()
	var b [8]byte
	put := func(v uint64) { binary.BigEndian.PutUint64(b[:], v); h.Write(b[:]) }
	put(uint64(len(n.Link)))
	h.Write([]byte(n.Link))
	put(uint64(n.Session))
	put(uint64(n.Block))
	put(uint64(index))
	h.Write(n.Transcript[:])
	var sum [sha256.Size]byte
	return layout(epochStart, h.Sum(sum[:0]))
}

// NewLocalID returns an ID for a key that no link made (a pair of SAEs at one
// KME). Its 74 free bits are random.
func NewLocalID(epochStart time.Time) ID {
	var r [16]byte
	_, _ = rand.Read(r[:]) // crypto/rand.Read never fails: it ends the process instead
	return layout(epochStart, r[:])
}

// MinID is the smallest ID of the epoch that starts at epochStart: the border of
// its partition.
func MinID(epochStart time.Time) ID {
	var id ID
	putTime(&id, epochStart)
	return id
}

func layout(t time.Time, random []byte) ID {
	var id ID
	copy(id[6:], random)
	putTime(&id, t)
	id[6] = id[6]&0x0f | 0x70 // version 7
	id[8] = id[8]&0x3f | 0x80 // variant 10
	return id
}

func putTime(id *ID, t time.Time) {
	ms := uint64(t.UnixMilli())
	id[0], id[1], id[2] = byte(ms>>40), byte(ms>>32), byte(ms>>24)
	id[3], id[4], id[5] = byte(ms>>16), byte(ms>>8), byte(ms)
}

// ParseID reads the 36-character form with hyphens, in either case, and no other
// (no braces, no urn:, no bare hex). Any version nibble is accepted.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return ID{}, fmt.Errorf("key_ID %.40q is not a UUID of 36 characters", s)
	}
	var digits [32]byte
	n := copy(digits[:], s[:8])
	n += copy(digits[n:], s[9:13])
	n += copy(digits[n:], s[14:18])
	n += copy(digits[n:], s[19:23])
	copy(digits[n:], s[24:])
	if _, err := hex.Decode(id[:], digits[:]); err != nil {
		return ID{}, fmt.Errorf("key_ID %.40q is not a UUID of 36 characters", s)
	}
	return id, nil
}

// String returns the lower-case 36-character form.
func (id ID) String() string {
	b, _ := id.AppendText(make([]byte, 0, 36)) // never fails
	return string(b)
}

// AppendText appends the lower-case 36-character form (encoding.TextAppender).
func (id ID) AppendText(b []byte) ([]byte, error) {
	for i, part := range [...][]byte{id[:4], id[4:6], id[6:8], id[8:10], id[10:]} {
		if i > 0 {
			b = append(b, '-')
		}
		b = hex.AppendEncode(b, part)
	}
	return b, nil
}

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return id.AppendText(make([]byte, 0, 36)) }

// UnmarshalText implements encoding.TextUnmarshaler with the rules of ParseID.
func (id *ID) UnmarshalText(text []byte) error {
	v, err := ParseID(string(text))
	if err != nil {
		return err
	}
	*id = v
	return nil
}

// EpochStart is the time in the ID: the start of the epoch of the key.
func (id ID) EpochStart() time.Time {
	ms := uint64(id[0])<<40 | uint64(id[1])<<32 | uint64(id[2])<<24 | uint64(id[3])<<16 | uint64(id[4])<<8 | uint64(id[5])
	return time.UnixMilli(int64(ms))
}

// Epoch is a stretch of time that shares a partition of the tables and, at each
// site, a KEK: the number of whole epoch lengths since the Unix epoch.
type Epoch int64

// EpochAt is the epoch that t falls into when epochs are length long.
func EpochAt(t time.Time, length time.Duration) Epoch {
	return Epoch(t.UnixMilli() / length.Milliseconds())
}

// Start is the moment e begins.
func (e Epoch) Start(length time.Duration) time.Time {
	return time.UnixMilli(int64(e) * length.Milliseconds())
}

// End is the moment e ends: the start of the next one.
func (e Epoch) End(length time.Duration) time.Time { return (e + 1).Start(length) }
