// Package etsi014 is the key delivery API of ETSI GS QKD 014 V1.1.1: its words on
// the wire, the door that serves it and the client that calls it.
//
// The door (Door) knows HTTP, JSON and the standard; it knows no rule of key
// delivery. It promises that a Backend sees only requests that are well formed and
// within its Limits, made by an SAE that a certificate names; that whatever the
// door refuses itself is told to Backend.Refused once; and that key bytes stand
// in one buffer on their way out, which is wiped. (What net/http and TLS copy from
// it is beyond our reach.)
//
// It must never read who is calling from a header, a path or a body, keep key
// material beyond an answer, or tell a caller why a 401 is one.
package etsi014

import (
	"context"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// Key is one key of a Container.
type Key struct {
	ID       key.ID
	Material key.Material
	// Provenance goes out as qkm_provenance in the key_extension (clause 6.3);
	// nothing goes out when it is empty.
	Provenance key.Provenance
}

// Container is a Key container (clause 6.3). Whoever receives one owns its material
// and wipes it.
type Container struct{ Keys []Key }

// Wipe overwrites the material of every key.
func (c Container) Wipe() {
	for _, k := range c.Keys {
		k.Material.Wipe()
	}
}

// KeyRequest is a Key request (clause 6.2). From the door to a Backend, every
// default is filled in and every limit kept. From a Client, a zero field is left
// out, so that the KME's default holds.
type KeyRequest struct {
	Number           int            // how many keys
	Bits             int            // size of each key
	AdditionalSlaves []identity.SAE // besides the slave of the path; no two alike
	// Provenance is what the keys must be of, "" if it does not matter: our own member
	// of extension_mandatory, qkm_provenance. What cannot be met is Unmet.
	Provenance key.Provenance
	// TTL is how long the slaves may take the keys, in whole seconds; 0 for the KME's
	// default. It is our own member of both extensions, qkm_ttl_s: what is out of bounds
	// is Unmet in extension_mandatory, and not heeded in extension_optional.
	TTL time.Duration
}

// Status is a Status (clause 6.1). Sizes are in bits. What the standard gives as
// integers fits into 32 bits.
type Status struct {
	SourceKME     string `json:"source_KME_ID"`
	TargetKME     string `json:"target_KME_ID"`
	Master        string `json:"master_SAE_ID"`
	Slave         string `json:"slave_SAE_ID"`
	KeySize       int    `json:"key_size"`         // of a key when the request names no size
	Stored        int    `json:"stored_key_count"` // keys that can be had now
	Max           int    `json:"max_key_count"`
	MaxPerRequest int    `json:"max_key_per_request"`
	MaxSize       int    `json:"max_key_size"`
	MinSize       int    `json:"min_key_size"`
	MaxSAEs       int    `json:"max_SAE_ID_count"` // additional slaves; 0 is no multicast
}

// Limits is what the door holds requests to, in the words of Status.
type Limits struct {
	KeySize       int           // bits; default of a request without a size
	MinSize       int           // bits
	MaxSize       int           // bits
	MaxPerRequest int           // keys
	MaxSAEs       int           // additional slaves; 0 is no multicast
	MaxTTL        time.Duration // the longest that a request may name

	// Strict refuses what the standard's data model leaves to goodwill: null for a
	// member that may be left out, and an additional_slave_SAE_IDs that names nobody.
	Strict bool
}

// Backend is what stands behind the door. An error that is, or wraps, a
// *problem.Error is answered by its Kind; any other as a fault of ours. Every
// method but Limits and Admit records its own outcome, before it returns.
//
// rid is the request's ID, a UUIDv7, which the caller sees as X-Request-Id. ctx
// ends when the client goes away.
type Backend interface {
	// Status is Get status (clause 5.2). It consumes nothing.
	Status(ctx context.Context, c identity.Caller, rid string, slave identity.SAE) (Status, error)
	// EncKeys is Get key (clause 5.3): exactly r.Number new keys of r.Bits bits for
	// the caller, who is their master, and slave; or an error, and none.
	EncKeys(ctx context.Context, c identity.Caller, rid string, slave identity.SAE, r KeyRequest) (Container, error)
	// DecKeys is Get key with key IDs (clause 5.4): all keys of ids in that order, or
	// an error, and none. No two ids are alike.
	DecKeys(ctx context.Context, c identity.Caller, rid string, master identity.SAE, ids []key.ID) (Container, error)
	// Admit says, before a request's body is read, why its caller is not listened to: it
	// has spent its share. nil if it has not.
	Admit(c identity.Caller) error
	// Refused records what the door refused before it called any of the above, and
	// returns what to answer: err, or another problem if err cannot be recorded.
	// route is the method and the pattern of the path. c may be a stranger. ctx does
	// not end with the request.
	Refused(ctx context.Context, c identity.Caller, rid, route string, err error) error
	// AnswerLost records that the keys handed out for request rid may not have
	// reached the caller. ctx does not end with the request.
	AnswerLost(ctx context.Context, c identity.Caller, rid string, err error)
	// Limits is asked for on every request.
	Limits() Limits
}
