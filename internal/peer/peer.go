// Package peer is the door between two KMEs and the client that knocks on it:
// the messages of the key handover (package handover) as POSTs of strict JSON
// over mutual TLS, and the classical channel of a QKD link as one framed TLS
// stream (Stream).
//
// What it promises: a message reaches the Backend only from a caller whose
// certificate makes it a KME, whole, and within the bounds of its Check; a Client
// sends a message at most once per call and says exactly what is known of its
// fate (ErrNotSent, *Refused, or any other error: unknown); an end that has gone
// without a word is noticed.
//
// What it must never do: carry key bytes, repeat a message on its own once a byte
// of it has left, or decide anything about keys. Whether the caller is the other
// end of the link that a message names is for the Backend to judge.
package peer

import (
	"context"
	"errors"
	"fmt"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// Backend is what a KME does with the messages of its peers. from is who the
// certificate says.
//
// An error of a kind that the door answers with 4xx (problem.Invalid,
// Unauthorized, Forbidden, NotFound, Gone, TooLarge) promises that nothing of this
// message has happened or will; any other error leaves the peer in doubt, and it
// comes again. ctx ends when the peer gives up waiting, which must not undo a
// commit that has begun.
type Backend interface {
	// Hello answers with our own side's figures.
	Hello(ctx context.Context, from identity.KME, h handover.Hello) (handover.Hello, error)
	// Held is told of a block that the peer holds.
	Held(ctx context.Context, from identity.KME, h handover.Held) (handover.HeldAnswer, error)
	// Announce assigns, or refuses to, and answers the same however often it is asked.
	Announce(ctx context.Context, from identity.KME, a handover.Announce) (handover.AnnounceAnswer, error)
	// Void takes assigned keys back. It is idempotent.
	Void(ctx context.Context, from identity.KME, v handover.Void) error
	// Burned drops what was shared with a site that was recovered. It is idempotent.
	Burned(ctx context.Context, from identity.KME, b handover.Burned) (handover.BurnedAnswer, error)
	// Compromise burns keys of a link that somebody may know. It is idempotent.
	Compromise(ctx context.Context, from identity.KME, c handover.Compromise) error
	// Sample burns an atom that the peer owns and answers with a MAC keyed by its bytes.
	Sample(ctx context.Context, from identity.KME, s handover.Sample) (handover.SampleAnswer, error)
	// Grant makes chunks this end's, and acknowledges all of them. It is idempotent.
	Grant(ctx context.Context, from identity.KME, g handover.Grant) (handover.GrantAnswer, error)
	// Run hears of a node's new run and lists what lower runs were assigned.
	Run(ctx context.Context, from identity.KME, r handover.RunStarted) (handover.RunAnswer, error)
	// Checkpoint cosigns a checkpoint of the peer's audit log that follows what was seen
	// of it. problem.Forbidden says that it does not.
	Checkpoint(ctx context.Context, from identity.KME, s audit.Submission) (audit.Cosigned, error)
	// Witnessed tells what was last seen here of the peer's audit logs.
	Witnessed(ctx context.Context, from identity.KME) (audit.Witnessed, error)
	// Refused is told of each message and stream that the door itself turned away
	// after TLS. It records exactly one event.
	Refused(ctx context.Context, c identity.Caller, r Refusal)
}

// Refusal is why the door turned a caller away.
type Refusal struct {
	Route string // method and path pattern, or "classical"
	Err   error  // for the audit and the log, never for the caller
}

// ErrNotSent says that not one byte of the message left this process (dialling or
// TLS failed, or the time was over before): the peer cannot act on it.
var ErrNotSent = errors.New("not sent")

// ErrTooMany is why a door turns away what a peer says beyond maxAtOnce, and its streams
// beyond maxStreams.
var ErrTooMany = errors.New("too many messages or streams at a time")

// Refused is the peer's answer that it did not act on this copy of the message
// and will not: a 4xx, or a TLS alert that turned our certificate away before the
// message was read. It says nothing of copies sent before.
type Refused struct {
	Status  int    // HTTP status; 0 for a TLS alert
	Kind    string // the peer's problem kind, "" if it named none
	Message string // a sentence for the log
}

// Error is the operator's view.
func (r *Refused) Error() string {
	if r.Status == 0 {
		return "peer refused our certificate: " + r.Message
	}
	return fmt.Sprintf("peer refused: %d %s: %s", r.Status, r.Kind, r.Message)
}

// statuses is the one table from a kind to what the peer reads.
var statuses = map[problem.Kind]int{
	problem.Invalid:      400,
	problem.Unauthorized: 401,
	problem.Forbidden:    403,
	problem.NotFound:     404,
	problem.Gone:         410,
	problem.TooLarge:     413,
	problem.Unavailable:  503,
	problem.Internal:     500,
}
