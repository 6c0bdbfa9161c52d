// Package handover decides, and only decides, how keys pass from a pool that two
// sites share to the SAEs of both: which block may be used, who may assign which
// key, what a repeated announce is answered, what is burned when an outcome is in
// doubt. There is no coordinator and no clock in it, no socket and no database:
// facts and messages go in, decisions come out, and the same functions run in
// production (internal/store, internal/kme) and in the random histories of the
// tests.
//
// What it promises: whatever is lost, repeated, delayed or killed, no key is
// assigned twice (first commit at the slave's site wins), none is used from a
// block that one end does not hold, and every key leaves the pool by exactly one
// of: served, assigned, burned, expired, lost.
package handover

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// BlockRef names a block: the number that Alice's end gave it in a session of a link.
type BlockRef struct {
	Link    string `json:"link"`
	Session int64  `json:"session"`
	Block   int64  `json:"block"`
}

// String is the form used in logs and errors.
func (r BlockRef) String() string { return fmt.Sprintf("%s/%d/%d", r.Link, r.Session, r.Block) }

// End is an end of a link.
type End byte

// The ends. Alice's sends the light and leads the session.
const (
	Alice End = 'a'
	Bob   End = 'b'
)

// Other is the opposite end.
func (e End) Other() End { return Alice + Bob - e }

// String is "alice" or "bob".
func (e End) String() string {
	if e == Alice {
		return "alice"
	}
	return "bob"
}

// Owners says which end owns each chunk of a block: one character a chunk, 'a' or 'b'.
type Owners string

// Valid says whether o names an owner for each of the chunks that atoms make.
func (o Owners) Valid(atoms int) bool {
	return len(o) == Chunks(atoms) && strings.Trim(string(o), "ab") == ""
}

// Of is the owner of the chunk that the atom at index belongs to.
func (o Owners) Of(index int) End { return End(o[index/key.ChunkAtoms]) }

// Chunks is how many chunks atoms make; the last may be short.
func Chunks(atoms int) int { return (atoms + key.ChunkAtoms - 1) / key.ChunkAtoms }

// Share gives the chunks of a new block to the ends: each goes to the end that
// has fewer atoms left, Alice's first when they are equal.
func Share(atoms, aliceLeft, bobLeft int) Owners {
	o := make([]byte, Chunks(atoms))
	for i := range o {
		n := min(key.ChunkAtoms, atoms-i*key.ChunkAtoms)
		if aliceLeft <= bobLeft {
			o[i], aliceLeft = byte(Alice), aliceLeft+n
		} else {
			o[i], bobLeft = byte(Bob), bobLeft+n
		}
	}
	return Owners(o)
}

// Digest is what two ends compare to know that they hold the same block: SHA-256
// over the ordered key_IDs and the owners. The bits themselves were verified in
// distillation; a digest of them would leak.
type Digest [sha256.Size]byte

// DigestOf is the digest of a block with these atoms, in order, and owners.
func DigestOf(ids []key.ID, owners Owners) Digest {
	h := sha256.New()
	for _, id := range ids {
		h.Write(id[:])
	}
	h.Write([]byte(owners))
	return Digest(h.Sum(nil))
}

// MarshalText writes d as hex.
func (d Digest) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, d[:]), nil }

// UnmarshalText reads hex.
func (d *Digest) UnmarshalText(text []byte) error {
	if len(text) != 2*len(d) {
		return fmt.Errorf("digest of %d characters, want %d", len(text), 2*len(d))
	}
	_, err := hex.Decode(d[:], text)
	return err
}

// Hello is said by both sides when they meet and once a minute.
type Hello struct {
	KME   identity.KME `json:"kme"`
	Node  string       `json:"node"`
	Run   int64        `json:"run"`
	Clock int64        `json:"clock_ms"` // Unix milliseconds
	Links []HelloLink  `json:"links"`

	Site      Figures `json:"site,omitzero"` // how far the whole site of the side that says Hello has come, durably
	Suspended bool    `json:"suspended,omitzero"`
	Yours     Figures `json:"yours,omitzero"` // the highest figures that it was told of the other side
	Acked     []Acked `json:"acked,omitzero"` // what the other side, in the origin of Yours, has answered
}

// Acked is the last batch of a run that a receiver has answered: 0 if it has only
// been told of the run. A receiver that knows less has forgotten it.
type Acked struct {
	Node  string `json:"node"`
	Run   int64  `json:"run"`
	Batch int64  `json:"batch"`
}

// HelloLink is the state of one link at the end that says Hello.
type HelloLink struct {
	Link    string `json:"link"`
	Session int64  `json:"session"`
	TTL     int64  `json:"default_ttl_ms"`
	Pool    int    `json:"pool_limit_atoms"`
}

// Held says that a block is committed as HELD at the end that says it.
type Held struct {
	BlockRef
	Epoch  key.Epoch `json:"epoch"`
	Atoms  int       `json:"atoms"`
	Owners Owners    `json:"owners"`
	Digest Digest    `json:"digest"`
}

// HeldAnswer is what the other end says to Held.
type HeldAnswer string

// The answers to Held.
const (
	Equal     HeldAnswer = "equal"     // I hold it too
	Different HeldAnswer = "different" // I hold, or held, another under this name
	NotYet    HeldAnswer = "not_yet"   // I do not hold it, and may yet
	Never     HeldAnswer = "never"     // I do not hold it and never shall: its session is closed
)

// Announce asks the peer to assign keys to SAEs that are homed there. A batch
// number of a run never carries two contents.
type Announce struct {
	Node     string    `json:"node"`
	Run      int64     `json:"run"`
	Batch    int64     `json:"batch"` // from 1 in each run, without gaps
	Requests []Request `json:"requests"`
}

// Request is one SAE's request within an Announce: all of its keys or none.
type Request struct {
	ID     string         `json:"request_id"`
	Link   string         `json:"link"`
	Master identity.SAE   `json:"master"`
	Slaves []identity.SAE `json:"slaves"` // those homed at the receiver
	Bits   int            `json:"bits"`   // size of each key
	TTL    int64          `json:"ttl_ms"` // remaining lifetime, counted by each end from its own commit
	Reread bool           `json:"reread,omitempty"`
	Keys   []Key          `json:"keys"`
}

// Lifetime is the remaining lifetime of the request's keys.
func (r Request) Lifetime() time.Duration { return time.Duration(r.TTL) * time.Millisecond }

// AtomCount is how many atoms the request's keys have together.
func (r Request) AtomCount() int {
	n := 0
	for _, k := range r.Keys {
		n += len(k.Atoms)
	}
	return n
}

// Atoms are the IDs of all atoms of the request's keys, in order.
func (r Request) Atoms() iter.Seq[key.ID] {
	return func(yield func(key.ID) bool) {
		for _, k := range r.Keys {
			for _, id := range k.Atoms {
				if !yield(id) {
					return
				}
			}
		}
	}
}

// Key is one key: consecutive atoms of one chunk. Its key_ID is the first atom's.
type Key struct {
	Session int64    `json:"session"`
	Block   int64    `json:"block"`
	First   int      `json:"first"` // index of the first atom in its block
	Atoms   []key.ID `json:"atoms"` // IDs of its atoms, in order; Atoms[0] is the key_ID
}

// ID is the key_ID. A Key without atoms, which Announce.Check refuses, has none.
func (k Key) ID() key.ID { return k.Atoms[0] }

// Standing is what a receiver thinks of a batch as a whole.
type Standing string

// The standings.
const (
	Fresh  Standing = "fresh"  // the next one: it is to be decided and committed
	Repeat Standing = "repeat" // committed before: it is answered again from the rows
	Ahead  Standing = "ahead"  // an earlier batch is missing, or its run was not told: come again
	Stale  Standing = "stale"  // of a run that has been taken over

	// Declined: this copy was not looked at, and never will be, since the receiver's
	// HSM or database is away.
	Declined Standing = "declined"
)

// AnnounceAnswer answers an Announce. Results are there when Standing is Fresh or
// Repeat: one for each request, in order.
type AnnounceAnswer struct {
	Standing Standing `json:"standing"`
	Results  []Result `json:"results,omitempty"`
}

// Result is the answer to one request of a batch, the same however often asked.
type Result struct {
	ID       string   `json:"request_id"`
	Accepted bool     `json:"accepted"`
	Why      string   `json:"why,omitempty"`
	Full     bool     `json:"full,omitempty"`    // refused, and no disagreement: the slaves have too much to take
	Lacking  []key.ID `json:"lacking,omitempty"` // atoms that the receiver does not have in its pool
}

// Burned says that a site was recovered from the past: nothing that was shared with
// it before this origin of its account is left at its end, and none of it may be
// used. Until it is answered the site opens no session with the peer. What was
// assigned at the peer before stays there: the initiator may have served it.
type Burned struct {
	Origin int64 `json:"origin"`
}

// BurnedAnswer says that nothing is left at this end either.
type BurnedAnswer struct {
	Links []LinkSession `json:"links"`
}

// Compromise says that somebody may know the keys of a link whose IDs are of some
// epochs, those of blocks up to one: neither end may hand them out any more. What the
// sender has assigned of them is taken back.
type Compromise struct {
	Act     int64  `json:"act"` // its number at the sender
	Link    string `json:"link"`
	First   int64  `json:"first_epoch"`
	Last    int64  `json:"last_epoch"`
	Session int64  `json:"session"` // of the last block that is meant
	Block   int64  `json:"block"`
}

// LinkSession is the highest session that an end has opened on a link.
type LinkSession struct {
	Link    string `json:"link"`
	Session int64  `json:"session"`
}

// Void takes assigned keys back: the initiator could not, or may not have, served them.
type Void struct {
	Node  string   `json:"node"`
	Run   int64    `json:"run"`
	Batch int64    `json:"batch"`
	Keys  []key.ID `json:"key_ids"`
}

// RunStarted says that a node has begun, or has been given, a new run. Batches of
// lower runs are refused by whoever has heard it.
type RunStarted struct {
	Node  string `json:"node"`
	Run   int64  `json:"run"`
	After key.ID `json:"after,omitzero"` // UpTo of the answer before; none in the first question
}

// RunAnswer is the answer to RunStarted: what was assigned, of the keys with IDs above After
// and up to UpTo, in their order. Whoever asks goes on after UpTo until there is none: there
// may be as many keys as in an hour or a day, nearly all of them taken, and an answer that is
// of any length, or for which all of them are looked through, would at some number not come
// in time any more.
type RunAnswer struct {
	Assigned []Assigned `json:"assigned"`       // MaxAssigned at most
	UpTo     key.ID     `json:"up_to,omitzero"` // none: all were looked through
}

// Assigned is one key that the peer has assigned for a lower run of a node.
type Assigned struct {
	Run   int64    `json:"run"`
	Batch int64    `json:"batch"`
	Key   key.ID   `json:"key_id"`
	Atoms []key.ID `json:"atoms"`
}
