// Package legacy is the REST API of the QuteMail-KM service that this KME
// replaces: its words on the wire, a thin door that serves them, and the client
// that calls it. Its users keep their routes, shapes and status codes; what they
// get in exchange for a client certificate is that somebody checks it.
//
// The door (Door) knows HTTP, JSON and the old names (<uuid>-alice, <uuid>-bob);
// it knows no rule of key delivery. Where it differs from the seed on purpose:
// requester_sae must be the certificate's SAE (403), a malformed request is a 400
// and not a 500, status tells the truth (503), cleanup is for operators, at their own
// door (403 here), and there is no CORS. A gateway, which is one server for all its
// users, may name any SAE that its row in principals.yaml lists; the Caller that a
// Backend sees is then that SAE, and knows its gateway.
//
// It must never believe requester_sae, keep key material beyond an answer, or list
// keys.
package legacy

import (
	"context"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// Issued is a key made for its requester (the seed's Alice).
type Issued struct {
	ID        key.ID
	Material  key.Material
	Bits      int
	Algorithm string // "BB84" for keys of a link only
	Source    string // "pool", or where else the key is from
	ExpiresAt time.Time
}

// Retrieved is a key as its recipient (the seed's Bob) gets it.
type Retrieved struct {
	ID        key.ID
	Material  key.Material
	Bits      int
	Algorithm string
}

// Connected is what Service says of a part that is well; anything else is the
// trouble, in a sentence fit for callers.
const Connected = "connected"

// Service is what GET /api/v1/status tells about the KME.
type Service struct {
	Sessions  int     // sessions that its links have opened
	ErrorRate float64 // QBER of the last block, 0 to 1
	Stored    int     // keys in the pool
	Database  string  // Connected, or "error: ..."
	HSM       string  // likewise
}

// Backend is what stands behind the door. An error that is, or wraps, a
// *problem.Error is answered by its Kind; any other as a fault of ours. Every
// method records its own outcome, before it returns.
//
// rid is the request's ID, a UUIDv7, which the caller sees as X-Request-Id. ctx
// ends when the client goes away.
type Backend interface {
	// Service is GET /api/v1/status. It consumes nothing.
	Service(ctx context.Context, c identity.Caller, rid string) (Service, error)
	// RequestKey makes one key of bits bits for the caller and recipient, which the
	// recipient can read until ttl has passed.
	RequestKey(ctx context.Context, c identity.Caller, rid string, recipient identity.SAE, bits int, ttl time.Duration) (Issued, error)
	// RetrieveKey reads a key made for the caller. One that was asked for by RequestKey
	// can be read again until it is consumed or its lifetime is over: problem.NotFound if there is none,
	// problem.Gone if it has ended, problem.Forbidden if it is for somebody else.
	RetrieveKey(ctx context.Context, c identity.Caller, rid string, id key.ID) (Retrieved, error)
	// ConsumeKey erases a key made for the caller, for whom it can be read no more.
	// One that has ended already is as good as erased. problem.NotFound if there is
	// none, problem.Forbidden if it is for somebody else.
	ConsumeKey(ctx context.Context, c identity.Caller, rid string, id key.ID) error
	// Admit says, before a request's body is read, why its caller is not listened to: it
	// has spent its share. nil if it has not.
	Admit(c identity.Caller) error
	// Refused records what the door refused before it called any of the above, and
	// returns what to answer: err, or another problem if err cannot be recorded.
	// route is the method and the pattern of the path. c may be a stranger. ctx does
	// not end with the request.
	Refused(ctx context.Context, c identity.Caller, rid, route string, err error) error
	// AnswerLost records that the key handed out for request rid may not have
	// reached the caller. ctx does not end with the request.
	AnswerLost(ctx context.Context, c identity.Caller, rid string, err error)
}
