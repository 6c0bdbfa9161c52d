package audit

import (
	"fmt"

	"golang.org/x/mod/sumdb/tlog"
)

// Submission asks a witness to cosign a checkpoint (C2SP tlog-witness, add-checkpoint).
type Submission struct {
	Key   string      `json:"key"`             // the log's verifier key, for a witness that knows none yet
	Old   int64       `json:"old"`             // the size that the witness has last seen, as far as the log knows
	Proof []tlog.Hash `json:"proof,omitempty"` // that the checkpoint's tree begins with that of Old
	Note  string      `json:"note"`            // the signed checkpoint
}

// Bounds of what a submission holds.
const (
	maxProof = 63
	maxNote  = 16 << 10 // bytes
)

// Check says what is wrong with s, nil if nothing is.
func (s Submission) Check() error {
	switch {
	case s.Old < 0:
		return fmt.Errorf("submission: an old size of %d", s.Old)
	case len(s.Proof) > maxProof:
		return fmt.Errorf("submission: a proof of %d hashes", len(s.Proof))
	case len(s.Note) == 0 || len(s.Note) > maxNote:
		return fmt.Errorf("submission: a note of %d bytes", len(s.Note))
	case len(s.Key) == 0 || len(s.Key) > 512:
		return fmt.Errorf("submission: a key of %d bytes", len(s.Key))
	}
	return nil
}

// Witnessed is what a witness tells a KME of its logs: the last checkpoint that it has
// seen of each, as the log had signed it.
type Witnessed struct {
	Notes []string `json:"notes"`
}

// MaxWitnessed is of how many logs of one KME a witness tells: the last ones.
const MaxWitnessed = 64

// Check says what is wrong with w, nil if nothing is.
func (w Witnessed) Check() error {
	if len(w.Notes) > MaxWitnessed {
		return fmt.Errorf("witnessed: %d checkpoints", len(w.Notes))
	}
	for _, n := range w.Notes {
		if len(n) == 0 || len(n) > maxNote {
			return fmt.Errorf("witnessed: a note of %d bytes", len(n))
		}
	}
	return nil
}

// Cosigned is a witness's answer: its signature, or the size that it has last seen if
// that is not the submission's Old.
type Cosigned struct {
	Size    int64  `json:"size"`           // that it has seen now
	Line    string `json:"line,omitempty"` // "" if nothing was signed
	Witness string `json:"witness"`        // its verifier key; what counts is the one that others were given
}

// Check says what is wrong with c, nil if nothing is.
func (c Cosigned) Check() error {
	if c.Size < 0 || len(c.Line) > 1024 || len(c.Witness) > 512 {
		return fmt.Errorf("cosignature: size %d, line of %d bytes, key of %d", c.Size, len(c.Line), len(c.Witness))
	}
	return nil
}
