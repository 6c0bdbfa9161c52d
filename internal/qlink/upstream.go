package qlink

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
)

// Device hands out keys of 256 bits that its like at the other end of the link has too:
// QKD hardware, or another KME, asked by ETSI GS QKD 014.
type Device interface {
	// Draw hands out n new keys, at Alice's end: their bytes one after another, which the
	// caller wipes, the names that the device has for them, and where they are from:
	// key.Simulated if the device says so of any, otherwise key.Upstream.
	Draw(ctx context.Context, n int) (names []key.ID, bits []byte, from key.Provenance, err error)
	// Find hands out, at Bob's end, the keys that a Draw at the other end has named.
	Find(ctx context.Context, names []key.ID) (bits []byte, from key.Provenance, err error)
}

// Upstream is a source of blocks without light of our own: a Device at each end has the
// keys already, and what is left to do is to pair them. Alice's end draws as many as make a
// block and says how they are named; Bob's finds them at his device; each shows the other
// that it has the same bytes, by a hash keyed with all of them. Our names of the atoms come
// from the transcript of that, and so from the device's names, which are kept beside.
//
// Its keys are as secret as the devices and the ways to them are, and no more; if either
// device says that they are simulated, the block is. A key that
// was drawn for a block which came to nothing is gone.
type Upstream struct {
	UpstreamConfig
	ear  *ear // of the Channel
	next int64
}

// UpstreamConfig is what an Upstream needs. All must be set, but Keys and Terms at Alice's
// end only, and Accept at Bob's.
type UpstreamConfig struct {
	End     handover.End
	Link    string
	Session int64
	Channel distill.Channel
	Device  Device
	Keys    int // in a block, at most MaxUpstream
	Terms   func(atoms, bobStored int) distill.Terms
	Accept  func(terms distill.Terms, atoms int) error
}

// MaxUpstream is how many keys a block has at most: what devices hand out to one request.
const MaxUpstream = 128

// ErrDevice says that the device of this end hands out nothing now. The next block may be
// asked for at any time.
var ErrDevice = errors.New("the device hands out no keys")

// Reasons of an Abort of an Upstream's block.
const (
	ReasonFind   = "the other end's device does not find the keys"
	ReasonDiffer = "the devices have handed out different keys"
)

// NewUpstream returns an Upstream, which takes over what the channel receives. Whoever has
// it closes the channel and then the Upstream.
func NewUpstream(c UpstreamConfig) (*Upstream, error) {
	alice := c.End == handover.Alice
	if c.Channel == nil || c.Device == nil || alice && (c.Terms == nil || c.Keys < 1 || c.Keys > MaxUpstream) || !alice && c.Accept == nil {
		return nil, errors.New("configuring an upstream: a part is missing")
	}
	return &Upstream{UpstreamConfig: c, ear: newEar(c.Channel), next: 1}, nil
}

// Kinds of the messages about a block: Alice's, Bob's, and Alice's again.
const (
	kindDrawn  = 0x7a
	kindFound  = 0x7b
	kindPaired = 0x7c
)

// drawn is what Alice says of a block.
type drawn struct {
	Block  int64    `json:"block"`
	Names  []key.ID `json:"names"` // the device's
	Epoch  int64    `json:"epoch"`
	Owners string   `json:"owners"`

	From key.Provenance `json:"from"` // as her device has it
}

// shown is what either end says of the bytes that it has: the keyed hash, or why not.
type shown struct {
	MAC     []byte `json:"mac,omitempty"`
	Refused string `json:"refused,omitempty"` // a Reason

	From key.Provenance `json:"from,omitempty"` // in Bob's: as his device has it
}

// worst is where a block is from whose ends have keys from there.
func worst(hers, his key.Provenance) (key.Provenance, error) {
	known := func(p key.Provenance) bool { return p == key.Upstream || p == key.Simulated }
	switch {
	case !known(hers) || !known(his):
		return "", fmt.Errorf("%w: keys from %.20q and %.20q", errMalformed, hers, his)
	case hers == key.Simulated || his == key.Simulated:
		return key.Simulated, nil
	}
	return key.Upstream, nil
}

// Next makes one block. Any error but ErrDevice and a *distill.Abort ends the session.
func (u *Upstream) Next(ctx context.Context) (Block, error) {
	if err := ctx.Err(); err != nil {
		return Block{}, err
	}
	if u.End == handover.Alice {
		return u.lead(ctx)
	}
	return u.follow(ctx)
}

// Rest is not called: nothing of an Upstream is ever under way between two calls.
func (u *Upstream) Rest() (Block, error) {
	return Block{}, errors.New("an upstream has no block under way")
}

// Pending is 0.
func (u *Upstream) Pending() int { return 0 }

// Gone is closed when the channel has ended.
func (u *Upstream) Gone() <-chan struct{} { return u.ear.gone }

// Close returns when the channel, which must have been closed, has been read to its end.
func (u *Upstream) Close() { u.ear.wait() }

func (u *Upstream) lead(ctx context.Context) (Block, error) {
	begun := time.Now()
	names, bits, from, err := u.Device.Draw(ctx, u.Keys)
	if err != nil {
		return Block{}, fmt.Errorf("%w: %w", ErrDevice, err)
	}
	if len(names) != u.Keys || len(bits) != u.Keys*key.AtomBytes || twice(names) {
		clear(bits)
		return Block{}, fmt.Errorf("%w: %d keys of %d bytes, or one of them twice, and %d were asked for", ErrDevice, len(names), len(bits), u.Keys)
	}
	terms := u.Terms(u.Keys, 0)
	m := drawn{Block: u.next, Names: names, Epoch: terms.Epoch, Owners: terms.Owners, From: from}
	u.next++
	b, err := u.pair(m, bits)
	if err != nil {
		clear(bits)
	}
	b.Took = time.Since(begun)
	return b, err
}

// pair has Bob find what was drawn, and compares.
func (u *Upstream) pair(m drawn, bits []byte) (Block, error) {
	body, err := json.Marshal(m)
	if err != nil {
		return Block{}, err
	}
	if err := u.Channel.Send(kindDrawn, body); err != nil {
		return Block{}, err
	}
	transcript := sha256.Sum256(body)
	var theirs shown
	if err := u.hear(kindFound, &theirs); err != nil {
		return Block{}, err
	}
	if theirs.Refused != "" {
		return u.failed(m), &distill.Abort{Reason: ReasonFind, Peer: true}
	}
	if !hmac.Equal(theirs.MAC, u.mac(handover.Bob, transcript, bits)) {
		if err := u.say(kindPaired, shown{Refused: ReasonDiffer}); err != nil {
			return Block{}, err
		}
		return u.failed(m), &distill.Abort{Reason: ReasonDiffer}
	}
	from, err := worst(m.From, theirs.From)
	if err != nil {
		return Block{}, err
	}
	if err := u.say(kindPaired, shown{MAC: u.mac(handover.Alice, transcript, bits)}); err != nil {
		return Block{}, err
	}
	return u.block(m, bits, from, transcript), nil
}

func (u *Upstream) follow(ctx context.Context) (Block, error) {
	kind, body, err := u.ear.Recv()
	if err != nil {
		return Block{}, err
	}
	begun := time.Now()
	var m drawn
	if kind != kindDrawn || json.Unmarshal(body, &m) != nil || m.Block < u.next || len(m.Names) < 1 || len(m.Names) > MaxUpstream || twice(m.Names) {
		return Block{}, fmt.Errorf("%w: kind %#x of %d bytes", errMalformed, kind, len(body))
	}
	u.next = m.Block + 1
	if err := u.Accept(distill.Terms{Epoch: m.Epoch, Owners: m.Owners}, len(m.Names)); err != nil {
		return Block{}, err
	}
	bits, from, err := u.Device.Find(ctx, m.Names)
	if err == nil && len(bits) != len(m.Names)*key.AtomBytes {
		err = fmt.Errorf("%d bytes for %d keys", len(bits), len(m.Names))
	}
	if err != nil {
		clear(bits)
		if err := u.say(kindFound, shown{Refused: ReasonFind}); err != nil {
			return Block{}, err
		}
		return u.failed(m), &distill.Abort{Reason: ReasonFind, Err: err}
	}
	b, err := u.confirm(m, bits, from, sha256.Sum256(body))
	if err != nil {
		clear(bits)
	}
	b.Took = time.Since(begun)
	return b, err
}

// confirm shows Alice what was found, and compares it with hers.
func (u *Upstream) confirm(m drawn, bits []byte, his key.Provenance, transcript [32]byte) (Block, error) {
	from, err := worst(m.From, his)
	if err != nil {
		return Block{}, err
	}
	if err := u.say(kindFound, shown{MAC: u.mac(handover.Bob, transcript, bits), From: his}); err != nil {
		return Block{}, err
	}
	var hers shown
	if err := u.hear(kindPaired, &hers); err != nil {
		return Block{}, err
	}
	switch {
	case hers.Refused != "":
		return u.failed(m), &distill.Abort{Reason: ReasonDiffer, Peer: true}
	case !hmac.Equal(hers.MAC, u.mac(handover.Alice, transcript, bits)):
		return Block{}, errors.New("the other end says that its keys are these, and does not have them")
	}
	return u.block(m, bits, from, transcript), nil
}

// twice says whether a name is there more than once: two atoms would be one.
func twice(names []key.ID) bool {
	seen := make(map[key.ID]bool, len(names))
	for _, n := range names {
		seen[n] = true
	}
	return len(seen) < len(names)
}

// mac shows that an end has the bytes of a block. Nobody learns anything from it who does
// not have them.
func (u *Upstream) mac(end handover.End, transcript [32]byte, bits []byte) []byte {
	h := hmac.New(sha256.New, bits)
	fmt.Fprintf(h, "kme/upstream/1 %s %d %q ", end, u.Session, u.Link)
	h.Write(transcript[:])
	return h.Sum(nil)
}

func (u *Upstream) say(kind byte, m shown) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return u.Channel.Send(kind, body)
}

func (u *Upstream) hear(kind byte, m *shown) error {
	got, body, err := u.ear.Recv()
	if err == nil && (got != kind || json.Unmarshal(body, m) != nil) {
		err = fmt.Errorf("%w: kind %#x of %d bytes", errMalformed, got, len(body))
	}
	return err
}

func (u *Upstream) block(m drawn, bits []byte, from key.Provenance, transcript [32]byte) Block {
	return Block{Provenance: from, Upstream: m.Names, Outcome: distill.Outcome{
		Session: u.Session, Block: m.Block, Bits: bits, Length: 8 * len(bits),
		Terms: distill.Terms{Epoch: m.Epoch, Owners: m.Owners}, Transcript: transcript,
	}}
}

// failed is a block that came to nothing.
func (u *Upstream) failed(m drawn) Block {
	return Block{Provenance: key.Upstream, Outcome: distill.Outcome{Session: u.Session, Block: m.Block}}
}
