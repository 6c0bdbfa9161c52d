// Package admin is the operator API of a KME node: what it says on the wire, the
// door that serves it and the client that calls it. It shows how the node, its
// links, its epochs, its alarms and its callers stand; whoever has the duty may shut
// callers out, let them in again, have policies read anew, and end keys: those that are
// overdue, and those that somebody may know.
//
// The door promises that a Backend sees only requests of an operator whom a
// certificate names, and acts only of one who has the duty that they take, and that
// whatever the door refuses itself is told to Backend.Refused once. /healthz and
// /readyz alone ask for no name: any certificate of the operators' CA may ask whether
// the node lives and serves.
//
// It must never show key material, wrapped or plain; nor who shares keys with whom, but
// to an auditor who asks for one key, which is recorded.
package admin

import (
	"context"
	"time"

	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// Node is how a node of a KME stands.
type Node struct {
	KME        string    `json:"kme"`
	Node       string    `json:"node"`
	Version    string    `json:"version"`
	Run        int64     `json:"run"`
	Started    time.Time `json:"started"`
	Uptime     float64   `json:"uptime_s"`
	Production bool      `json:"production"`         // refuses simulated keys
	Policies   string    `json:"policies_digest"`    // SHA-256 of the policies in force, hex
	Suspended  string    `json:"suspended,omitzero"` // why nothing is served at this site until it is recovered
	HSM        Health    `json:"hsm"`
	Database   Health    `json:"database"`
	Peers      []Peer    `json:"peers"`
	Others     []Other   `json:"others,omitzero"` // nodes of this KME
}

// Other is how another node of the same KME looks from here.
type Other struct {
	Node    string  `json:"node"`
	Run     int64   `json:"run"`
	Alive   bool    `json:"alive"`
	Since   float64 `json:"since_s"` // its last sign of life, seconds ago
	Settled bool    `json:"settled"` // it is not alive, and nothing of it is left: it may be taken out of network.yaml
}

// OK says whether everything that the node needs to hand out keys is well.
func (n Node) OK() bool {
	for _, p := range n.Peers {
		if !p.OK {
			return false
		}
	}
	return n.HSM.OK && n.Database.OK && n.Suspended == ""
}

// Health is how one part stands.
type Health struct {
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitzero"` // what it is, or what is wrong
}

// Peer is how another KME looks from here.
type Peer struct {
	KME string `json:"kme"`
	Health
	ClockOffset float64 `json:"clock_offset_s"` // its clock ahead of ours
}

// The states of a Link.
const (
	LinkDown   = "down"   // no session
	LinkOpen   = "open"   // blocks are made
	LinkFull   = "full"   // the pool holds what it may
	LinkPaused = "paused" // something else has to come back first; Why says what

	LinkStandby = "standby" // another node of the KME runs the link
)

// Link is how a QKD link stands at this end.
type Link struct {
	ID         string `json:"id"`
	Peer       string `json:"peer"` // the KME at the other end
	End        string `json:"end"`  // "alice" or "bob"
	Provenance string `json:"provenance"`
	State      string `json:"state"`
	Why        string `json:"why,omitzero"` // what is in the way, if anything is
	Session    int64  `json:"session"`
	Blocks     int    `json:"blocks"`      // distilled since the node started
	Aborts     int    `json:"aborts"`      // given up since the node started
	Stored     int    `json:"stored"`      // 256-bit keys in the pool that this end may assign
	StoredPeer int    `json:"stored_peer"` // that the other end may, once both hold their block

	Pads       int     `json:"pads"`        // in the reserve: each authenticates a block
	EpsSecrecy float64 `json:"eps_secrecy"` // this year's chance that a key is not secret
	EpsCorrect float64 `json:"eps_correct"` // that keys differ or a forgery went unseen
	EpsLimit   float64 `json:"eps_limit"`   // of both together: then the link rests until the year ends

	Current *Progress `json:"current,omitzero"` // nil between blocks
	Last    *Block    `json:"last,omitzero"`    // nil before the first
}

// Progress is how far the block under way has come.
type Progress struct {
	Stage string  `json:"stage"`
	Step  int     `json:"step"`  // number of the stage, from 1
	Steps int     `json:"steps"` // how many stages there are
	Done  float64 `json:"done"`  // of the stage, 0 to 1
}

// Block is how much of the whole block is done, 0 to 1, all stages counting alike.
func (p Progress) Block() float64 {
	if p.Steps <= 0 {
		return 0
	}
	return min(1, max(0, (float64(p.Step-1)+p.Done)/float64(p.Steps)))
}

// Block is the last block of a link, distilled or given up.
type Block struct {
	Session    int64     `json:"session"`
	Block      int64     `json:"block"`
	At         time.Time `json:"at"`
	Took       float64   `json:"took_s"`
	QBER       float64   `json:"qber"`       // error rate of the test bits, 0 to 1
	Efficiency float64   `json:"efficiency"` // f of the reconciliation; 0 if there was none
	Length     int       `json:"length"`     // of the secret, in bits; 0 if it was given up
	Gates      int64     `json:"gates"`      // pulses sent
	Detected   int       `json:"detected"`   // of them
	Aborted    string    `json:"aborted,omitzero"`

	KeyQBER    float64   `json:"key_qber"`        // error rate of the key bits; 0 if it was not found
	Doubles    int       `json:"doubles"`         // double clicks; only Bob's end sees them
	SiftedKey  int       `json:"sifted_key"`      // detected, and both ends in the key basis
	SiftedTest int       `json:"sifted_test"`     // in the test basis
	Gains      []float64 `json:"gains,omitempty"` // chance that a pulse was detected, by intensity, the brightest first
	Leak       int       `json:"leak"`            // bits revealed by reconciliation
	LeakLimit  int       `json:"leak_limit"`      // as many might be: the length of the secret has paid for them
	Rounds     int       `json:"rounds"`          // journeys there and back that it took
}

// Alarm is something an operator should know of, for as long as its cause stands.
type Alarm struct {
	Name  string    `json:"name"` // what it is about
	Text  string    `json:"text"`
	Since time.Time `json:"since"`
}

// Epochs is how the epochs of a site stand that are not over and gone, oldest first.
type Epochs struct {
	Length float64 `json:"length_s"` // of an epoch
	// WorstCase is the longest that it takes, while the site's parts are well, from the
	// moment a key is handed out until nothing in the world opens what is stored of it:
	// its blobs may lie in backups of the database, and the KEKs that open them are gone.
	WorstCase float64 `json:"worst_case_s"`
	Epochs    []Epoch `json:"epochs"`
}

// Epoch is a stretch of time whose keys end together.
type Epoch struct {
	Epoch   int64     `json:"epoch"` // number of whole epochs since 1970
	Starts  time.Time `json:"starts"`
	Ends    time.Time `json:"ends"`
	State   string    `json:"state"`   // open, sealed, draining or destroyed
	Stored  int       `json:"stored"`  // 256-bit keys in the pool that were made in it
	Waiting int       `json:"waiting"` // keys that wait to be taken and expire in it
	KEKs    []KEK     `json:"keks,omitzero"`
}

// KEK is a key-encryption key in the HSM.
type KEK struct {
	ID         int64    `json:"id"` // as the audit names it
	Label      string   `json:"label"`
	CheckValue string   `json:"check_value"`     // hex
	State      string   `json:"state"`           // open, sealed or destroyed
	Wraps      int64    `json:"wraps"`           // how many blobs it has sealed
	Copies     []string `json:"copies,omitzero"` // nodes that have it in a session
}

// Span is how a link did in a span of time.
type Span struct {
	At         time.Time // its beginning
	Blocks     int       // distilled
	Aborts     int       // given up
	QBER       float64   // mean over both, as far as it was found; 0 if for none
	Bits       int64     // of secret
	Stored     int       // the least number of 256-bit keys that this end could assign
	StoredPeer int       // likewise, of the other end
}

// KeyStory is what a site knows of one key, without its bytes.
type KeyStory struct {
	ID     string    `json:"key_id"`
	Epoch  int64     `json:"epoch"` // in which it was made
	Made   time.Time `json:"made"`  // the start of that epoch: its ID tells no more
	State  string    `json:"state"` // STORED, CACHED, SERVED, CONSUMED, EXPIRED or VOID here; "" if nothing is known of it
	Pool   *KeyPlace `json:"pool,omitzero"`
	Due    []KeyDue  `json:"due,omitzero"`    // while the tables of its expiry are there
	Events []Event   `json:"events,omitzero"` // that name it, oldest first
}

// KeyPlace is where a key lies in the pool of its link.
type KeyPlace struct {
	Link       string    `json:"link"`
	Session    int64     `json:"session"`
	Block      int64     `json:"block"`
	Index      int       `json:"index"` // in the block, from 0
	Held       time.Time `json:"held"`  // when the block was stored here
	BlockState string    `json:"block_state"`
	Owner      string    `json:"owner"` // here or peer: who may assign it
	Leased     string    `json:"leased,omitzero"`
	KEK        int64     `json:"kek"`
	Provenance string    `json:"provenance"`
	Upstream   string    `json:"upstream,omitzero"` // the name that the device has for it which handed it out
}

// KeyDue is a key's assignment to one SAE.
type KeyDue struct {
	SAE        string    `json:"sae"`
	Master     string    `json:"master"`
	Bits       int       `json:"bits"`
	Provenance string    `json:"provenance"`
	KEK        int64     `json:"kek"`
	Expires    time.Time `json:"expires"`
	Gone       string    `json:"gone,omitzero"` // taken, consumed, expired or void; "" while it waits
}

// Event is an event of the audit, as far as a story needs it.
type Event struct {
	At      time.Time `json:"at"`
	Node    string    `json:"node"`
	Seq     int64     `json:"seq"`
	Action  string    `json:"action"`
	Outcome string    `json:"outcome"`
	Actor   string    `json:"actor,omitzero"`
	Master  string    `json:"master,omitzero"`
	Slaves  []string  `json:"slaves,omitzero"`
	Reason  string    `json:"reason,omitzero"`
	Request string    `json:"request,omitzero"`
}

// Suspicion is which keys somebody may know.
type Suspicion struct {
	Since time.Time `json:"since"`          // widened to whole epochs, as is Until: an ID tells no more
	Until time.Time `json:"until,omitzero"` // zero: now
	Link  string    `json:"link,omitzero"`  // "" for all links, and the pairs that are both served here
}

// ActCompromise is what two officers sign for who suspect keys.
const ActCompromise = "compromise-keys"

// Act is what they sign, where an epoch is so long: from when, in whole epochs, until when,
// which is now or likewise in whole epochs, and the link if it is one. An approval is older
// than the act.
func (s Suspicion) Act(epoch time.Duration) (name string, on []string) {
	on = []string{key.EpochAt(s.Since, epoch).Start(epoch).UTC().Format(time.RFC3339), "now"}
	if !s.Until.IsZero() {
		on[1] = key.EpochAt(s.Until, epoch).End(epoch).UTC().Format(time.RFC3339)
	}
	if s.Link != "" {
		on = append(on, s.Link)
	}
	return ActCompromise, on
}

// suspicionObject is the body of a compromise.
type suspicionObject struct {
	Suspicion
	approved
}

// Compromised is what became of them.
type Compromised struct {
	From   time.Time `json:"from"` // the epochs, to their end
	To     time.Time `json:"to"`
	Burned int       `json:"burned"` // 256-bit keys of the pool here
	Voided int       `json:"voided"` // keys that waited to be taken here
	Untold []string  `json:"untold"` // KMEs that have not answered yet that theirs are gone too: they are told until they do
}

// cleanupObject is the answer to a cleanup, in the QuteMail API's words.
type cleanupObject struct {
	Status  string `json:"status"`
	Removed int    `json:"removed_count"`
	Message string `json:"message"`
}

// linksObject and alarmsObject are the bodies of the lists.
type linksObject struct {
	Links []Link `json:"links"`
}

type alarmsObject struct {
	Alarms []Alarm `json:"alarms"`
}

// Backend is what stands behind the door. An error that is, or wraps, a
// *problem.Error is answered by its Kind; any other as a fault of ours.
//
// rid is the request's ID, a UUIDv7, which the caller sees as X-Request-Id. ctx
// ends when the client goes away.
type Backend interface {
	Node(ctx context.Context, c identity.Caller, rid string) (Node, error)
	Links(ctx context.Context, c identity.Caller, rid string) ([]Link, error)
	Alarms(ctx context.Context, c identity.Caller, rid string) ([]Alarm, error)
	Epochs(ctx context.Context, c identity.Caller, rid string) (Epochs, error)
	// KeyStory tells what is known of a key, to an auditor. It records its outcome.
	KeyStory(ctx context.Context, c identity.Caller, rid string, id key.ID) (KeyStory, error)
	// Compromise has keys burned at both ends, for two security officers. It records its outcome.
	Compromise(ctx context.Context, c identity.Caller, rid string, given []approval.Approval, s Suspicion) (Compromised, error)
	// Cleanup ends what is overdue, and says how many keys. It records its outcome.
	Cleanup(ctx context.Context, c identity.Caller, rid string, given []approval.Approval) (removed int, err error)
	// TrustLink lets a link go on that rests because tags of its peer were wrong. It records
	// its outcome.
	TrustLink(ctx context.Context, c identity.Caller, rid, link string) error
	// History is how a link did from a time on, in spans of that length, oldest first.
	// Spans of which nothing is known are left out.
	History(ctx context.Context, c identity.Caller, rid, link string, from time.Time, each time.Duration) ([]Span, error)
	// Doctor looks at everything that the node depends on. If c may act, a key of each
	// link is compared with the other end's, burned, and the comparison recorded; how many
	// in a time is bounded.
	Doctor(ctx context.Context, c identity.Caller, rid string) ([]Finding, error)
	Callers
	Approvals
	// Healthy is nil if the process does its work, whatever may be away that it needs:
	// if not, it is to be started again. Nobody's name is known here.
	Healthy(ctx context.Context) error
	// Ready is nil if the node can hand out keys. Likewise.
	Ready(ctx context.Context) error
	// Refused records what the door refused before it called any of the above, and
	// returns what to answer: err, or another problem if err cannot be recorded.
	// route is the method and the pattern of the path. c may be a stranger. ctx does
	// not end with the request.
	Refused(ctx context.Context, c identity.Caller, rid, route string, err error) error
}
