package handover

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// The bounds of a message. What lies beyond them no KME of ours says: the door
// refuses the whole message. What one request may not have is not a matter of
// bounds but of the receiver's admission, and is refused alone.
const (
	MaxRequests   = 256  // requests in a batch
	MaxAtoms      = 4096 // atoms in a batch, and keys in a Void
	MaxAssigned   = 4096 // keys in an answer to RunStarted
	MaxSlaves     = 64   // slaves of one request
	MaxBits       = 4096 // size of one key, in bits
	MinBits       = 64
	MaxBlockAtoms = 1 << 20 // atoms in a block: 2^28 bits
	MaxLinks      = 1024    // links in a Hello
	MaxGranted    = 128     // chunks in a Grant
	MaxGrants     = 1 << 30 // times that a chunk changes hands
	MaxNodes      = 1024    // nodes of a site
	MaxNameBytes  = 64      // node names and link IDs, in bytes
	MaxRequestID  = 128     // in bytes
	MaxTTL        = 366 * 24 * time.Hour

	// MaxNumber bounds runs and sessions, each of which is one above another that the
	// peer may have named: at one a millisecond it is 8,900 years away. See CheckReached.
	MaxNumber = 1 << 48
)

// Check says what is wrong with h, nil if nothing is.
func (h Hello) Check() error {
	if h.KME == (identity.KME{}) {
		return errors.New("hello of no KME")
	}
	if err := checkRun(h.Node, h.Run); err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	if len(h.Links) > MaxLinks {
		return fmt.Errorf("hello names %d links, more than %d", len(h.Links), MaxLinks)
	}
	seen := make(map[string]bool, len(h.Links))
	for _, l := range h.Links {
		if err := checkName("link", l.Link); err != nil {
			return fmt.Errorf("hello: %w", err)
		}
		if seen[l.Link] {
			return fmt.Errorf("hello names link %s twice", l.Link)
		}
		seen[l.Link] = true
		if l.TTL < 0 || l.Pool < 0 {
			return fmt.Errorf("hello: a figure of link %s is negative", l.Link)
		}
		if err := CheckSession(l.Session); err != nil {
			return fmt.Errorf("hello: link %s: %w", l.Link, err)
		}
	}
	if len(h.Acked) > MaxNodes {
		return fmt.Errorf("hello acknowledges batches of %d nodes, more than %d", len(h.Acked), MaxNodes)
	}
	for _, a := range h.Acked {
		if err := checkRun(a.Node, a.Run); err != nil {
			return fmt.Errorf("hello: %w", err)
		}
		if a.Batch < 0 {
			return fmt.Errorf("hello: batch %d", a.Batch)
		}
	}
	return errors.Join(h.Site.check(), h.Yours.check())
}

func (f Figures) check() error {
	if f.Origin < 0 || len(f.Nodes) > MaxNodes {
		return fmt.Errorf("figures of %d nodes, origin %d", len(f.Nodes), f.Origin)
	}
	seen := make(map[string]bool, len(f.Nodes))
	for _, n := range f.Nodes {
		if err := checkRun(n.Node, n.Run); err != nil {
			return fmt.Errorf("figures: %w", err)
		}
		if seen[n.Node] || n.Seq < 0 {
			return fmt.Errorf("figures: node %s is there twice, or at event %d", n.Node, n.Seq)
		}
		seen[n.Node] = true
	}
	return nil
}

// Check says what is wrong with r, nil if nothing is.
func (r BlockRef) Check() error {
	if err := checkName("link", r.Link); err != nil {
		return err
	}
	if r.Session < 1 || r.Block < 0 {
		return fmt.Errorf("session %d, block %d of link %s: sessions start at 1, blocks at 0", r.Session, r.Block, r.Link)
	}
	return CheckSession(r.Session)
}

// Check says what is wrong with h, nil if nothing is.
func (h Held) Check() error {
	if err := h.BlockRef.Check(); err != nil {
		return fmt.Errorf("held: %w", err)
	}
	if h.Atoms < 1 || h.Atoms > MaxBlockAtoms {
		return fmt.Errorf("held: block %s of %d atoms, want 1 to %d", h.BlockRef, h.Atoms, MaxBlockAtoms)
	}
	if !h.Owners.Valid(h.Atoms) {
		return fmt.Errorf("held: block %s: owners do not fit its %d atoms", h.BlockRef, h.Atoms)
	}
	return nil
}

// Check says what is wrong with a, nil if nothing is.
func (a HeldAnswer) Check() error {
	switch a {
	case Equal, Different, NotYet, Never:
		return nil
	}
	return fmt.Errorf("answer to held is %.20q", string(a))
}

// Check says what is wrong with a, nil if nothing is. After it every Key has an
// ID and lies in one chunk. Whether a request repeats an atom of its own or of
// another is left to DecideFresh, which refuses that request alone.
func (a Announce) Check() error {
	if err := checkBatch(a.Node, a.Run, a.Batch); err != nil {
		return fmt.Errorf("announce: %w", err)
	}
	if n := len(a.Requests); n < 1 || n > MaxRequests {
		return fmt.Errorf("announce of %d requests, want 1 to %d", n, MaxRequests)
	}
	atoms := 0
	seen := make(map[string]bool, len(a.Requests))
	for _, r := range a.Requests {
		if err := r.check(); err != nil {
			return fmt.Errorf("announce: request %.40q: %w", r.ID, err)
		}
		if seen[r.ID] {
			return fmt.Errorf("announce: request %.40q is there twice", r.ID)
		}
		seen[r.ID] = true
		atoms += r.AtomCount()
	}
	if atoms > MaxAtoms {
		return fmt.Errorf("announce of %d atoms, more than %d", atoms, MaxAtoms)
	}
	return nil
}

func (r Request) check() error {
	if r.ID == "" || len(r.ID) > MaxRequestID {
		return fmt.Errorf("request ID of %d bytes, want 1 to %d", len(r.ID), MaxRequestID)
	}
	if err := checkName("link", r.Link); err != nil {
		return err
	}
	if r.Master == (identity.SAE{}) {
		return errors.New("no master")
	}
	if n := len(r.Slaves); n < 1 || n > MaxSlaves {
		return fmt.Errorf("%d slaves, want 1 to %d", n, MaxSlaves)
	}
	slaves := make(map[identity.SAE]bool, len(r.Slaves))
	for _, s := range r.Slaves {
		if s == (identity.SAE{}) || slaves[s] {
			return errors.New("a slave is nobody, or there twice")
		}
		slaves[s] = true
	}
	if r.Bits < MinBits || r.Bits > MaxBits || r.Bits%8 != 0 {
		return fmt.Errorf("keys of %d bits, want %d to %d in multiples of 8", r.Bits, MinBits, MaxBits)
	}
	if r.TTL < 1 || r.TTL > MaxTTL.Milliseconds() {
		return fmt.Errorf("lifetime of %d ms", r.TTL)
	}
	if len(r.Keys) == 0 {
		return errors.New("no keys")
	}
	for _, k := range r.Keys {
		if err := k.check(r.Bits); err != nil {
			return err
		}
	}
	return nil
}

func (k Key) check(bits int) error {
	if want := (bits + key.AtomBits - 1) / key.AtomBits; len(k.Atoms) != want {
		return fmt.Errorf("a key of %d bits has %d atoms, want %d", bits, len(k.Atoms), want)
	}
	if k.Session < 1 || k.Block < 0 || k.First < 0 || k.First >= MaxBlockAtoms {
		return fmt.Errorf("key %s: session %d, block %d, first atom %d", k.ID(), k.Session, k.Block, k.First)
	}
	if k.First%key.ChunkAtoms+len(k.Atoms) > key.ChunkAtoms {
		return fmt.Errorf("key %s reaches beyond its chunk", k.ID())
	}
	return nil
}

// Check says what is wrong with a, nil if nothing is.
func (a AnnounceAnswer) Check() error {
	switch a.Standing {
	case Fresh, Repeat:
	case Ahead, Stale, Declined:
		if len(a.Results) > 0 {
			return fmt.Errorf("answer to announce: %d results to a batch that is %s", len(a.Results), a.Standing)
		}
	default:
		return fmt.Errorf("answer to announce: standing %.20q", string(a.Standing))
	}
	if len(a.Results) > MaxRequests {
		return fmt.Errorf("answer to announce: %d results", len(a.Results))
	}
	lacking := 0
	for _, r := range a.Results {
		if r.Accepted && len(r.Lacking) > 0 {
			return fmt.Errorf("answer to announce: request %.40q is accepted and lacks atoms", r.ID)
		}
		if r.Accepted && r.Full {
			return fmt.Errorf("answer to announce: request %.40q is accepted and refused", r.ID)
		}
		lacking += len(r.Lacking)
	}
	if lacking > MaxAtoms {
		return fmt.Errorf("answer to announce: %d atoms lacking", lacking)
	}
	return nil
}

// Check says what is wrong with v, nil if nothing is.
func (v Void) Check() error {
	if err := checkBatch(v.Node, v.Run, v.Batch); err != nil {
		return fmt.Errorf("void: %w", err)
	}
	if n := len(v.Keys); n < 1 || n > MaxAtoms {
		return fmt.Errorf("void of %d keys, want 1 to %d", n, MaxAtoms)
	}
	return nil
}

// Check says what is wrong with b, nil if nothing is.
func (b Burned) Check() error {
	if b.Origin < 2 {
		return fmt.Errorf("burned before origin %d: the first recovery begins origin 2", b.Origin)
	}
	return nil
}

// Check says what is wrong with c, nil if nothing is.
func (c Compromise) Check() error {
	if err := checkName("link", c.Link); err != nil {
		return fmt.Errorf("compromise: %w", err)
	}
	if c.Act < 1 || c.First < 0 || c.Last < c.First || c.Session < 0 || c.Block < 0 {
		return fmt.Errorf("compromise %d of epochs %d to %d, up to block %d of session %d", c.Act, c.First, c.Last, c.Block, c.Session)
	}
	return nil
}

// Check says what is wrong with a, nil if nothing is.
func (a BurnedAnswer) Check() error {
	if len(a.Links) > MaxLinks {
		return fmt.Errorf("answer to burned: %d links, more than %d", len(a.Links), MaxLinks)
	}
	for _, l := range a.Links {
		if err := checkName("link", l.Link); err != nil {
			return fmt.Errorf("answer to burned: %w", err)
		}
		if err := CheckSession(l.Session); err != nil {
			return fmt.Errorf("answer to burned: link %s: %w", l.Link, err)
		}
	}
	return nil
}

// Check says what is wrong with r, nil if nothing is.
func (r RunStarted) Check() error {
	if err := checkRun(r.Node, r.Run); err != nil {
		return fmt.Errorf("run: %w", err)
	}
	return nil
}

// Check says what is wrong with a, nil if nothing is.
func (a RunAnswer) Check() error {
	if len(a.Assigned) > MaxAssigned {
		return fmt.Errorf("answer to run: %d keys, more than %d", len(a.Assigned), MaxAssigned)
	}
	var last key.ID
	for _, k := range a.Assigned {
		if err := k.Check(); err != nil {
			return fmt.Errorf("answer to run: %w", err)
		}
		if bytes.Compare(k.Key[:], last[:]) <= 0 {
			return fmt.Errorf("answer to run: key %s after %s", k.Key, last)
		}
		last = k.Key
	}
	if a.UpTo != (key.ID{}) && bytes.Compare(a.UpTo[:], last[:]) < 0 {
		return fmt.Errorf("answer to run: up to %s, and with key %s", a.UpTo, last)
	}
	return nil
}

// Check says what is wrong with a, nil if nothing is.
func (a Assigned) Check() error {
	if a.Run < 1 || a.Batch < 1 {
		return fmt.Errorf("assigned: run %d, batch %d", a.Run, a.Batch)
	}
	if len(a.Atoms) == 0 || a.Atoms[0] != a.Key {
		return fmt.Errorf("assigned: key %s is not its own first atom", a.Key)
	}
	return nil
}

// CheckSession says what is wrong with the number of the last session that an end has
// opened, 0 if it has opened none.
func CheckSession(session int64) error {
	if session < 0 || session > MaxNumber {
		return fmt.Errorf("session %d: sessions start at 1, and no link comes to %d", session, int64(MaxNumber))
	}
	return nil
}

// CheckReached says what is wrong with a number of a session, a run or an origin, which is
// what, that a peer names at a time. Each is one above another, and there is none in a
// millisecond; so none is above the milliseconds since 1970. Whoever names one that is too
// high uses up no more than that, and an hour later 3.6 million more are free.
func CheckReached(what string, n int64, now time.Time) error {
	if n > now.UnixMilli() {
		return fmt.Errorf("%s %d: there cannot have been so many", what, n)
	}
	return nil
}

// CheckReached is that of all numbers in h.
func (h Hello) CheckReached(now time.Time) error {
	err := errors.Join(CheckReached("run", h.Run, now), h.Site.CheckReached(now), h.Yours.CheckReached(now))
	for _, l := range h.Links {
		err = errors.Join(err, CheckReached("session", l.Session, now))
	}
	for _, a := range h.Acked {
		err = errors.Join(err, CheckReached("run", a.Run, now))
	}
	if err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	return nil
}

// CheckReached is that of the origin and the runs.
func (f Figures) CheckReached(now time.Time) error {
	err := CheckReached("origin", f.Origin, now)
	for _, n := range f.Nodes {
		err = errors.Join(err, CheckReached("run", n.Run, now))
	}
	return err
}

func checkBatch(node string, run, batch int64) error {
	if batch < 1 {
		return fmt.Errorf("batch %d: batches start at 1", batch)
	}
	return checkRun(node, run)
}

func checkRun(node string, run int64) error {
	if run < 1 || run > MaxNumber {
		return fmt.Errorf("run %d: runs start at 1, and no site comes to %d", run, int64(MaxNumber))
	}
	return checkName("node", node)
}

// checkName allows what node names and link IDs are made of.
func checkName(what, name string) error {
	if name == "" || len(name) > MaxNameBytes {
		return fmt.Errorf("%s name of %d bytes, want 1 to %d", what, len(name), MaxNameBytes)
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c > '~' {
			return fmt.Errorf("%s name %q has a character that cannot be printed", what, name)
		}
	}
	return nil
}
