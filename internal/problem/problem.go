// Package problem names the few ways in which a request can end badly. Every
// door has one table from Kind to its own status and body: the operator sees the
// cause (Err) in the log and the audit, the caller only Detail.
package problem

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Kind is a way to end badly.
type Kind uint8

// The kinds.
const (
	Internal     Kind = iota // a fault of ours: the caller learns nothing but that
	Invalid                  // the request is malformed or cannot be met as it stands; Detail says why
	Unauthorized             // unknown caller, unknown peer, not entitled: all alike from outside
	Forbidden                // a caller who names somebody else (legacy door only)
	NotFound                 // no such key for this caller
	Gone                     // the key was there and has ended (legacy door tells)
	TooLarge                 // the request is larger than we read
	Unavailable              // HSM, database, peer or pool: come again after RetryAfter
)

var names = [...]string{"internal", "invalid", "unauthorized", "forbidden", "not-found", "gone", "too-large", "unavailable"}

// String returns the kind's name as it stands in the audit log.
func (k Kind) String() string { return names[k] }

// Error is a request's bad end.
type Error struct {
	Kind       Kind
	Detail     string        // a sentence for the caller; "" leaves it to the door
	RetryAfter time.Duration // with Unavailable; 0 leaves it to the door
	Err        error         // the cause, for the operator; may be nil
}

// New returns an error of kind k with a sentence for the caller.
func New(k Kind, format string, args ...any) *Error {
	return &Error{Kind: k, Detail: fmt.Sprintf(format, args...)}
}

// Because returns an error of kind k whose cause only the operator sees.
func Because(k Kind, err error) *Error { return &Error{Kind: k, Err: err} }

// Error is the operator's view.
func (e *Error) Error() string {
	switch {
	case e.Err != nil && e.Detail != "":
		return fmt.Sprintf("%s: %s: %v", e.Kind, e.Detail, e.Err)
	case e.Err != nil:
		return fmt.Sprintf("%s: %v", e.Kind, e.Err)
	case e.Detail != "":
		return fmt.Sprintf("%s: %s", e.Kind, e.Detail)
	}
	return e.Kind.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// KindOf is the kind of err: Internal if it is not, and does not wrap, an Error.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Internal
}

// maxBrief bounds the text of Brief, in bytes.
const maxBrief = 1 << 10

// Brief is the text of an error of which a stranger may have chosen a part, as the name
// of a member that he made up: no more of it than is worth keeping.
func Brief(err error) string {
	text := err.Error()
	if len(text) <= maxBrief {
		return text
	}
	return strings.ToValidUTF8(text[:maxBrief], "") + " ..."
}
