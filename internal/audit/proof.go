package audit

import (
	"errors"
	"fmt"

	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"
)

// Proof shows to somebody who has the log's public key, and nothing else, that an
// event is in the log.
type Proof struct {
	Leaf       int64       `json:"leaf"`
	Text       string      `json:"text"`  // the canonical text of the event, which is the leaf
	Proof      []tlog.Hash `json:"proof"` // RFC 6962, 2.1.1
	Checkpoint string      `json:"checkpoint"`
}

// ParseProof reads the file of a proof.
func ParseProof(text []byte) (p Proof, err error) {
	if err := json.Unmarshal(text, &p, json.RejectUnknownMembers(true)); err != nil {
		return Proof{}, fmt.Errorf("reading a proof: %w", err)
	}
	if p.Leaf < 0 || len(p.Proof) > maxProof || p.Text == "" || p.Checkpoint == "" {
		return Proof{}, errors.New("reading a proof: a part is missing")
	}
	return p, nil
}

// Verify says whether the proof holds, and what of: the event, and the checkpoint with
// the names of the witnesses that have signed it.
func (p Proof) Verify(key LogKey, witnesses ...Witness) (e Event, c Checkpoint, cosigned []string, err error) {
	if c, cosigned, err = OpenCheckpoint([]byte(p.Checkpoint), key, witnesses...); err != nil {
		return e, c, nil, err
	}
	if err := tlog.CheckRecord(p.Proof, c.Size, c.Root, p.Leaf, tlog.RecordHash([]byte(p.Text))); err != nil {
		return e, c, nil, fmt.Errorf("the log does not have this event at leaf %d: %w", p.Leaf, err)
	}
	e, err = ParseEvent([]byte(p.Text))
	return e, c, cosigned, err
}
