// Package audit holds the record of what a KME did and refused: the Event, its
// one canonical text, the hash chain that ties each node's events together, the
// signature of each node over the head of its chain, and the Merkle tree of all of a
// site's events with its signed checkpoints (C2SP tlog-tiles, tlog-checkpoint and
// tlog-cosignature, over x/mod's tlog and note).
//
// A stranger needs one public key to verify a site's log, that of the log, and those
// of the witnesses that he trusts. The log's key vouches for the keys of the nodes.
//
// An event's text is written once and stored as it is; the leaf that is hashed is
// that text. No event has a field that could hold key material, wrapped or plain.
// Fields are added and never changed: an old text stays what it is, and one without a
// field is read as if that were empty.
//
// Some of what auditors ask for is no field or action of its own, on purpose:
//
//   - the status of an answer: the event is committed before the answer is written. It
//     follows from the outcome, from the kind of problem that the reason of what was
//     refused or failed begins with, and from the route (deploy/AUDIT.md has the table);
//   - names in a certificate that a rule has named: they are the ID, or the rule says
//     how they lead to it, and the fingerprint says which certificate it was;
//   - slot and session of the HSM: a site has one token, and any session does any
//     operation. What the module has returned (CKR_...) stands in the reason;
//   - an operator's login: there is none. Each act has the certificate that made it;
//     looking at how things stand, which changes nothing and shows no event, is not one;
//   - a refused PIN at the start of a node, which has no key then to sign with and ends
//     with a status of its own, which the service manager keeps. One that is refused
//     later is an alarm, and that is an event;
//   - each checkpoint and each cosignature: an event would make another checkpoint. They
//     are kept beside the tree; those that fail are alarms, and so events.
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
	Disable   Action = "disable"   // an operator shut the SAE in Peer out, for the Reason
	Enable    Action = "enable"    // or let it in again
	Policies  Action = "policies"  // the files of policies were read anew; Reason has their digest, or what is wrong with them
	Malformed Action = "malformed" // a request that did not get as far as an action
	Lost      Action = "answer-lost"

	Hold      Action = "block-held"   // a block came from the link and is stored
	Ready     Action = "block-ready"  // both ends hold it
	DropBlock Action = "block-lost"   // the other end does not, or holds another
	LinkAbort Action = "link-abort"   // distillation refused a block; Reason says why
	LinkOpen  Action = "link-session" // a session of the link opened
	TrustLink Action = "link-trusted" // an officer lets a link go on whose tags were wrong

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

	Approve    Action = "approval-left" // an officer left word for another one, for the act that Reason says
	KeyShown   Action = "key-shown"     // an operator was told the story of Keys, without their bytes
	Compare    Action = "compared"      // an operator had a key of Link compared with the other end's; Reason says how that ended
	Compromise Action = "compromise"    // keys that somebody may know are burned at both ends: Reason says which

	EpochSealed   Action = "epoch-sealed"    // no key comes into it any more
	EpochDraining Action = "epoch-draining"  // no key in it lives: copies of its KEKs are given up
	CopyClosed    Action = "kek-copy-closed" // this node has no copy of the KEK in its session any more
	EpochDropped  Action = "epoch-dropped"   // its tables are gone, and Count rows of assigned keys with them

	Recover     Action = "recover" // the account begins anew, in the origin that Count says
	Alarm       Action = "alarm"
	Handshake   Action = "handshake"      // refused ones that are alike; Count says how many
	Certificate Action = "certificate"    // this node's own was renewed, or could not be
	Outage      Action = "outage-summary" // refusals that could not be recorded while the database was away

	FactsChanged Action = "facts-changed"   // what Facts says is other than at the start
	ClockStep    Action = "clock-step"      // the clock was set; Reason says by how much
	Migrated     Action = "schema-migrated" // the database's schema is another than when this was recorded last; Reason says which and since when

	AuditStart    Action = "audit-start"       // this node folds the site's events into the tree from now on
	AuditStop     Action = "audit-stop"        // and no more: another sequencer does, or, as the last event of a run, the node ends in order
	AuditFailure  Action = "audit-failure"     // the log, its tree or a way out does not do as it must; recorded with the alarm that says so
	AuditOverflow Action = "audit-overflow"    // requests that were refused, and events that were lost, because too many waited; Count says how many
	AuditRead     Action = "audit-read"        // somebody read the log; Reason says what of it
	AuditDropped  Action = "audit-day-dropped" // a day's events left the database, after they were written to a bundle
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
	Role        string `json:"role"` // sae, kme, operator, node, or "" if no rule named the caller
	ID          string `json:"id"`
	Gateway     string `json:"gateway"`     // who spoke for it; "" if it spoke for itself
	Rule        string `json:"rule"`        // the principals rule that matched
	Serial      string `json:"serial"`      // certificate serial, decimal
	Issuer      string `json:"issuer"`      // authority key identifier of the certificate, hex
	Fingerprint string `json:"fingerprint"` // SHA-256 of the certificate, hex
	Subject     string `json:"subject"`     // of a certificate that no rule named: its subject and alternative names; "" of others, whose ID it is
	Remote      string `json:"remote"`      // address and port
	TLS         string `json:"tls"`         // of the connection: version, cipher suite and key exchange
}

// Facts are what holds for all events of a node from the one that has them on, until
// another one of its chain says otherwise. So they are said once, and hold for each.
type Facts struct {
	Build    string `json:"build"`    // version and source revision of the daemon
	Config   string `json:"config"`   // SHA-256 of its configuration file, hex
	Policies string `json:"policies"` // SHA-256 of the policies in force, hex
	Clock    string `json:"clock"`    // what keeps the clock right, and how well
	Key      string `json:"key"`      // the node's audit key, vouched for by the log's: a note (SignNodeKey)
}

// Atoms names a run of consecutive atoms of a block.
type Atoms struct {
	Link    string `json:"link"`
	Session int64  `json:"session"`
	Block   int64  `json:"block"`
	First   int    `json:"first"` // index of the first atom, from 0
	Count   int    `json:"count"`
}

// Event is one act or refusal.
//
// Site, Node, Run, Seq and At are filled in by the committer; everything else by
// whoever acts.
type Event struct {
	Site string    `json:"site"`
	Node string    `json:"node"`
	Run  int64     `json:"run"`
	Seq  int64     `json:"seq"` // gap-free per node, from 1
	At   time.Time `json:"at"`

	Action  Action   `json:"action"`
	Outcome Outcome  `json:"outcome"`
	Reason  string   `json:"reason"`  // why it was refused or failed; never seen by the caller
	Request string   `json:"request"` // request ID, "" for a node's own acts
	Route   string   `json:"route"`   // method and route pattern of the request; of refused handshakes the door
	Actor   Actor    `json:"actor"`   //
	Policy  []string `json:"policy"`  // IDs of the policies that decided

	Approvals []string `json:"approvals"` // of an act that takes two officers: their approvals as they came (package approval)

	Link       string         `json:"link"`
	Peer       string         `json:"peer"`   // the other KME, or the SAE that a request named
	Master     string         `json:"master"` //
	Slaves     []string       `json:"slaves"` //
	Keys       []key.ID       `json:"keys"`
	Atoms      []Atoms        `json:"atoms"` // what left the pool of its block, or entered it
	Bits       int            `json:"bits"`  // size of each key
	Count      int            `json:"count"` // of what the action says: refusals summed up, rows expired
	Provenance key.Provenance `json:"provenance"`
	Reread     bool           `json:"reread"`    // the keys were read and stay where they are
	PeerNode   string         `json:"peer_node"` // with announces and voids: the initiating node, its run and batch
	PeerRun    int64          `json:"peer_run"`
	Batch      int64          `json:"batch"`
	Follows    []string       `json:"follows"` // of a recovery: the last checkpoints of the logs before that the peers have seen, as they were signed
	Facts      Facts          `json:"facts"`   // of starts and changes alone
}
