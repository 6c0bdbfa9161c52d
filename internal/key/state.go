package key

import "slices"

// State is a moment in the life of a key at one site. The words are those of the
// QuteMail service that this one replaces.
type State string

// The states of a key.
const (
	Stored   State = "STORED"   // wrapped in the pool of its link
	Cached   State = "CACHED"   // assigned to a pair of SAEs, waiting for the slave
	Served   State = "SERVED"   // handed to the master
	Consumed State = "CONSUMED" // handed to the slave, or erased at its word
	Expired  State = "EXPIRED"  // its lifetime ended before it was taken
	Void     State = "VOID"     // burned: assigned or in doubt, and never to be handed out
)

// lawful is the one table of moves. A state that leads nowhere is an end.
var lawful = map[State][]State{
	"":     {Stored, Cached}, // Cached: a key made at request time for two SAEs of one KME
	Stored: {Cached, Served, Expired, Void},
	Cached: {Consumed, Expired, Void},
}

// Lawful says whether a key may move from one state to another. The empty state
// is that of a key that does not exist yet.
func Lawful(from, to State) bool { return slices.Contains(lawful[from], to) }

// Provenance says where the bits of a key came from. It stands in the blob's AAD,
// the audit log, metrics, policy context and key_extension.
type Provenance string

// The provenances of a key.
const (
	QKD       Provenance = "qkd"       // a quantum link
	Simulated Provenance = "simulated" // the simulated link: for labs, never for production
	LocalRNG  Provenance = "local-rng" // the HSM's generator, for two SAEs of one KME
	Upstream  Provenance = "upstream"  // another KME
)
