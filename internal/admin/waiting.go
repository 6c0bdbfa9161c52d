package admin

import (
	"context"
	"encoding/hex"
	"errors"
	"io"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// Waiting is the word of one officer, left at a node for another one to find.
type Waiting struct {
	Officer  string            `json:"officer"`
	Approval approval.Approval `json:"approval"`
}

// Approvals is the part of a Backend that keeps words of officers.
type Approvals interface {
	// LeaveApproval keeps the caller's own approval. It records its outcome.
	LeaveApproval(ctx context.Context, c identity.Caller, rid string, a approval.Approval) error
	// Waiting lists what was left and has not ended or been used, oldest first.
	Waiting(ctx context.Context, c identity.Caller, rid string) ([]Waiting, error)
}

// The paths of approvals.
const (
	pathWaiting = "/api/v1/approvals"
	pathLeave   = "/api/v1/approvals/leave"
)

type waitingObject struct {
	Waiting []Waiting `json:"waiting"`
}

func (c Config) waiting(ctx context.Context, caller identity.Caller, rid string) (waitingObject, error) {
	list, err := c.Backend.Waiting(ctx, caller, rid)
	return waitingObject{list}, err
}

func (c Config) leave(ctx context.Context, caller identity.Caller, rid string, a approval.Approval) (doneObject, error) {
	return doneObject{"waiting"}, c.Backend.LeaveApproval(ctx, caller, rid, a)
}

// LeaveApproval leaves an officer's own approval at the node, for another one to find.
func (c *Client) LeaveApproval(ctx context.Context, a approval.Approval) error {
	return c.post(ctx, pathLeave, a, new(doneObject))
}

// Waiting lists the approvals that wait at the node.
func (c *Client) Waiting(ctx context.Context) ([]Waiting, error) {
	var o waitingObject
	err := c.get(ctx, pathWaiting, &o)
	return o.Waiting, err
}

// waitingRow is an approval on the console's page, and where it can be made use of.
type waitingRow struct {
	Waiting
	Path string // "" if the console does not have this act
	Own  bool   // it is the reader's
}

// approvalsPage lists what waits for a second officer.
func (c Config) approvalsPage(x *exchange) (content, error) {
	list, err := c.Backend.Waiting(x.r.Context(), x.caller, x.rid)
	if err != nil {
		return content{}, err
	}
	rows := make([]waitingRow, len(list))
	for i, w := range list {
		rows[i] = waitingRow{Waiting: w, Own: w.Officer == x.caller.ID()}
		words := w.Approval.Act.Words() // quoted in the act's text, if there is a blank in one
		for _, a := range c.acts() {
			switch {
			case len(words) == 1 && !a.isOf() && a.act == words[0]:
				rows[i].Path = a.path("")
			case len(words) == 2 && a.isOf() && a.act == words[0]:
				rows[i].Path = a.path(words[1])
			}
		}
	}
	return content{title: "Approvals", name: "approvals", data: rows}, nil
}

// secondOfficer is what the form of an act says of two officers.
type secondOfficer struct {
	Act   approval.Act
	Node  string // KME/node, as kmectl approve wants it
	Other string // who has approved already; "": nobody whose word waits here
	Nonce string // of that one's approval, hex
}

// second says whose word waits for an act, other than the caller's.
func (x *exchange) second(act approval.Act) (secondOfficer, error) {
	list, err := x.c.Backend.Waiting(x.r.Context(), x.caller, x.rid)
	if err != nil {
		return secondOfficer{}, err
	}
	s := secondOfficer{Act: act, Node: x.c.KME.String() + "/" + x.c.Node}
	for _, w := range list {
		if w.Approval.Act == act && w.Officer != x.caller.ID() {
			s.Other, s.Nonce = w.Officer, hex.EncodeToString(w.Approval.Nonce)
		}
	}
	return s, nil
}

// given are the approvals that a form brings: one that waits here, by its nonce, and
// those that were pasted, as kmectl approve has printed them.
func (x *exchange) given() (given []approval.Approval, err error) {
	if nonce := x.r.PostFormValue("other"); nonce != "" {
		list, err := x.c.Backend.Waiting(x.r.Context(), x.caller, x.rid)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(list, func(w Waiting) bool { return hex.EncodeToString(w.Approval.Nonce) == nonce })
		if i < 0 {
			return nil, refusal{problem.New(problem.Gone, "the other officer's approval has ended, or was used")}
		}
		given = append(given, list[i].Approval)
	}
	pasted := jsontext.NewDecoder(strings.NewReader(x.r.PostFormValue("approvals")))
	for {
		var a approval.Approval
		err := json.UnmarshalDecode(pasted, &a)
		if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return nil, refusal{&problem.Error{Kind: problem.Invalid, Detail: "what was pasted is not what kmectl approve prints", Err: err}}
		}
		given = append(given, a)
	}
	if len(given) == 1 && x.r.PostFormValue("other") != "" {
		return nil, nil // nothing was added to the word that waits: if two are wanted, the answer says how to
	}
	return given, nil
}
