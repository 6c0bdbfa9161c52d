// Package audit holds the record of what a KME did and refused: the Event, its
// one canonical text, and the hash chain that ties each node's events together.
//
// An event's text is written once and stored as it is; the leaf that is hashed is
// that text. No event has a field that could hold key material, wrapped or plain.
package audit

import (
	"time"

	"github.com/qutemail/kme/internal/key"
)

// Action is what was done or asked for.
type Action string

// The actions.
const (
	Status    Action = "status"    // Get status (014, 5.2)
	EncKeys   Action = "enc_keys"  // Get key (014, 5.3); outcome done = SERVED
	DecKeys   Action = "dec_keys"  // Get key with key IDs (014, 5.4); outcome done = CONSUMED, unless Reread
	Consume   Action = "consume"   // erased at the word of its taker
	Cleanup   Action = "cleanup"   // an operator had overdue keys ended, now; Count says how many
	Malformed Action = "malformed" // a request that did not get as far as an action
	Lost      Action = "answer-lost"

	Hold      Action = "block-held"   // a block came from the link and is stored
	Ready     Action = "block-ready"  // both ends hold it
	DropBlock Action = "block-lost"   // the other end does not, or holds another
	LinkAbort Action = "link-abort"   // distillation refused a block; Reason says why
	LinkOpen  Action = "link-session" // a session of the link opened

	Assign   Action = "assign"   // the peer's announce committed here: CACHED
	Burn     Action = "burn"     // atoms deleted for ever without being handed out
	VoidKeys Action = "void"     // assigned keys that the peer took back
	Expire   Action = "expire"   // lifetime over
	Takeover Action = "takeover" // a run was bumped or a takeover ended

	GiveChunks Action = "chunks-given" // by this end of a link to the other: it assigns their atoms from now on
	TakeChunks Action = "chunks-taken" // from the other end

	Start   Action = "start"
	Stop    Action = "stop"
	KEKMade Action = "kek-created"
	KEKGone Action = "kek-destroyed"

	EpochSealed   Action = "epoch-sealed"    // no key comes into it any more
	EpochDraining Action = "epoch-draining"  // no key in it lives: copies of its KEKs are given up
	CopyClosed    Action = "kek-copy-closed" // this node has no copy of the KEK in its session any more
	EpochDropped  Action = "epoch-dropped"   // its tables are gone, and Count rows of assigned keys with them

	Recover     Action = "recover" // the account begins anew, in the origin that Count says
	Alarm       Action = "alarm"
	Handshake   Action = "handshake"      // refused ones that are alike; Count says how many
	Certificate Action = "certificate"    // this node's own was renewed, or could not be
	Outage      Action = "outage-summary" // refusals that could not be recorded while the database was away
)

// Outcome is how it ended.
type Outcome string

// The outcomes.
const (
	Done    Outcome = "done"
	Refused Outcome = "refused"
	Failed  Outcome = "failed"
)

// Actor is who asked, with the facts of the certificate. A node's own acts have
// the role "node".
type Actor struct {
	Role        string // sae, kme, operator, node, or "" if no rule named the caller
	ID          string
	Gateway     string // who spoke for it; "" if it spoke for itself
	Rule        string // the principals rule that matched
	Serial      string // certificate serial, decimal
	Issuer      string // authority key identifier of the certificate, hex
	Fingerprint string // SHA-256 of the certificate, hex
	Remote      string // address and port
}

// Atoms names a run of consecutive atoms of a block.
type Atoms struct {
	Link    string
	Session int64
	Block   int64
	First   int // index of the first atom, from 0
	Count   int
}

// Event is one act or refusal.
//
// Site, Node, Run, Seq and At are filled in by the committer; everything else by
// whoever acts.
type Event struct {
	Site string
	Node string
	Run  int64
	Seq  int64 // gap-free per node, from 1
	At   time.Time

	Action  Action
	Outcome Outcome
	Reason  string   // why it was refused or failed; never seen by the caller
	Request string   // request ID, "" for a node's own acts
	Route   string   // method and route pattern of the request
	Actor   Actor    //
	Policy  []string // IDs of the policies that decided

	Link       string
	Peer       string   // the other KME, or the SAE that a request named
	Master     string   //
	Slaves     []string //
	Keys       []key.ID
	Atoms      []Atoms // what left the pool of its block, or entered it
	Bits       int     // size of each key
	Count      int     // of what the action says: refusals summed up, rows expired
	Provenance key.Provenance
	Reread     bool   // the keys were read and stay where they are
	PeerNode   string // with announces and voids: the initiating node, its run and batch
	PeerRun    int64
	Batch      int64
}
