package peer

import (
	"fmt"

	"github.com/go-json-experiment/json"

	"github.com/qutemail/kme/internal/handover"
)

// maxBody is the longest message that either side reads, in bytes. The largest
// announce that passes its Check takes a third of it, the longest answer to a
// RunStarted, of keys of 16 atoms, three quarters.
const maxBody = 4 << 20

// The routes. All are POST.
const (
	pathHello    = "/peer/v1/hello"
	pathHeld     = "/peer/v1/held"
	pathAnnounce = "/peer/v1/announce"
	pathVoid     = "/peer/v1/void"
	pathRun      = "/peer/v1/run"
	pathGrant    = "/peer/v1/grant"
	pathBurned   = "/peer/v1/burned"

	pathCheckpoint = "/peer/v1/checkpoint"
	pathWitnessed  = "/peer/v1/witnessed"
	pathCompromise = "/peer/v1/compromise"
	pathSample     = "/peer/v1/sample"
)

// heldAnswer wraps an answer that is not a JSON object by itself.
type heldAnswer struct {
	Answer handover.HeldAnswer `json:"answer"`
}

// Check says what is wrong with a, nil if nothing is.
func (a heldAnswer) Check() error { return a.Answer.Check() }

// done is an empty object: the answer to a Void, and the question what was witnessed.
type done struct{}

// Check finds nothing wrong.
func (done) Check() error { return nil }

// failure is the body of every answer that is not 200.
type failure struct {
	Kind    string `json:"kind"`
	Message string `json:"message"`
}

// message is anything that travels: its Check bounds every field, so that what
// passed it can be handed to the functions of package handover.
type message interface{ Check() error }

// parse reads one message: exactly one JSON value, member names exact and each at
// most once, no member that we do not know, UTF-8 only; then its Check.
func parse[M message](body []byte) (M, error) {
	var m, none M
	if err := json.Unmarshal(body, &m, json.RejectUnknownMembers(true)); err != nil {
		return none, fmt.Errorf("parsing: %w", err)
	}
	if err := m.Check(); err != nil {
		return none, err
	}
	return m, nil
}

// format writes a message that parse reads. A message that its own Check refuses
// is a fault of ours and is not written.
func format[M message](m M) ([]byte, error) {
	if err := m.Check(); err != nil {
		return nil, err
	}
	return json.Marshal(m)
}
