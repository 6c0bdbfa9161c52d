package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/policies"
)

// policyCommand looks at folders of policies. All but reload ask no KME.
type policyCommand struct {
	Check   policyCheckCommand   `cmd:"" help:"Read a folder of policies as a KME does, and say what is wrong with it."`
	Explain policyExplainCommand `cmd:"" help:"Say whether an SAE may do something with another, and which policies say so."`
	Matrix  policyMatrixCommand  `cmd:"" help:"List with whom each SAE may share keys."`
	Diff    policyDiffCommand    `cmd:"" help:"List what two folders decide differently."`
	Reload  policyReloadCommand  `cmd:"" help:"Have a KME node read its folder again (operators)."`
}

// asking is a question about policies, but for who asks.
type asking struct {
	Bits       int           `default:"256" help:"Size of each key (${default})."`
	Number     int           `default:"1" help:"How many keys (${default})."`
	Provenance string        `default:"qkd" enum:"qkd,simulated,upstream" help:"Of what comes over links: qkd, simulated or upstream (${default})."`
	Group      string        `name:"tls-group" default:"X25519MLKEM768" help:"Key exchange of the caller's TLS (${default})."`
	Age        time.Duration `help:"Time since the caller's handshake."`
	At         time.Time     `help:"When, as 2006-01-02T15:04:05Z; default now."`
}

func (a asking) question() policies.Question {
	if a.At.IsZero() {
		a.At = time.Now()
	}
	return policies.Question{Bits: a.Bits, Number: a.Number, Group: a.Group, Age: a.Age, Time: a.At}
}

type policyCheckCommand struct {
	Dir string `arg:"" default:"policies" help:"The folder (${default})."`
}

// Run reads the folder.
func (c policyCheckCommand) Run(s *session) error {
	set, err := policies.Load(c.Dir)
	if err != nil {
		return err
	}
	found := set.Lint()
	if s.JSON {
		return s.printJSON(struct {
			Digest string   `json:"policies_digest"`
			Lint   []string `json:"lint"`
		}{set.Digest, found})
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s is right: %d KMEs, %d links, %d SAEs, %d principals; digest %s\n",
		c.Dir, len(set.KMEs), len(set.Links), len(set.SAEs), len(set.Principals.Principals()), set.Digest)
	_, err = s.stdout.Write(b.Bytes())
	return err
}

type policyExplainCommand struct {
	Caller string `arg:"" help:"The SAE that asks."`
	Action string `arg:"" enum:"enc_keys,dec_keys,status" help:"enc_keys, dec_keys or status."`
	Other  string `arg:"" help:"The SAE that it would share keys with."`
	Dir    string `name:"policies" default:"policies" help:"The folder (${default})."`
	asking `embed:""`
}

// Run asks one question.
func (c policyExplainCommand) Run(s *session) error {
	set, err := policies.Load(c.Dir)
	if err != nil {
		return err
	}
	q := c.question()
	q.Action = c.Action
	if q.Caller, err = identity.ParseSAE(c.Caller); err != nil {
		return err
	}
	if q.Other, err = identity.ParseSAE(c.Other); err != nil {
		return err
	}
	q, way := set.Where(q, key.Provenance(c.Provenance))
	d := set.Decide(q)
	if s.JSON {
		return s.printJSON(struct {
			Allow    bool     `json:"allow"`
			Reason   string   `json:"reason"`
			Policies []string `json:"policies"`
		}{d.Allow, string(d.Reason), d.Policies})
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s  %s %s %s: %s", word(d), q.Caller, q.Action, q.Other, d.Reason)
	if len(d.Policies) > 0 {
		fmt.Fprintf(&b, " by %s", strings.Join(d.Policies, ", "))
	}
	fmt.Fprintf(&b, "\n  %d keys of %d bits, %s, %s\n", q.Number, q.Bits, q.Provenance, via(q, way))
	_, err = s.stdout.Write(b.Bytes())
	return err
}

func word(d policies.Decision) string {
	if d.Allow {
		return "ALLOW"
	}
	return "DENY"
}

func via(q policies.Question, way bool) string {
	switch {
	case !way:
		return "and no way leads there"
	case q.SameKME:
		return "both at one KME"
	}
	return "over link " + q.Link
}

type policyMatrixCommand struct {
	Dir    string `arg:"" default:"policies" help:"The folder (${default})."`
	Action string `default:"enc_keys" enum:"enc_keys,dec_keys,status" help:"enc_keys (default), dec_keys or status."`
	asking `embed:""`
}

// Run prints a line for each SAE: a file of them can be kept, and compared.
func (c policyMatrixCommand) Run(s *session) error {
	set, err := policies.Load(c.Dir)
	if err != nil {
		return err
	}
	matrix := make(map[string][]string)
	var b bytes.Buffer
	for _, caller := range set.Everybody() {
		with := []string{}
		for _, other := range set.Everybody() {
			q := c.question()
			q.Action, q.Caller, q.Other = c.Action, caller, other
			if q, way := set.Where(q, key.Provenance(c.Provenance)); way && set.Decide(q).Allow {
				with = append(with, other.String())
			}
		}
		matrix[caller.String()] = with
		fmt.Fprintf(&b, "%s: %s\n", caller, cmp.Or(strings.Join(with, " "), "-"))
	}
	if s.JSON {
		return s.printJSON(matrix)
	}
	_, err = s.stdout.Write(b.Bytes())
	return err
}

type policyDiffCommand struct {
	Before string `arg:"" help:"A folder of policies."`
	After  string `arg:"" help:"Another one."`
	asking `embed:""`
}

// Run compares two folders.
func (c policyDiffCommand) Run(s *session) error {
	before, after, err := loadTwo(c.Before, c.After)
	if err != nil {
		return err
	}
	changes := policies.CompareDecisions(before, after, c.question(), key.Provenance(c.Provenance))
	if s.JSON {
		type change struct {
			Caller, Action, Other string
			Allow                 bool
			Policies              []string
		}
		list := []change{}
		for _, d := range changes {
			list = append(list, change{d.Caller.String(), d.Action, d.Other.String(), d.After.Allow, slices.Concat(d.Before.Policies, d.After.Policies)})
		}
		return s.printJSON(list)
	}
	var b bytes.Buffer
	for _, d := range changes {
		sign := "-"
		if d.After.Allow {
			sign = "+"
		}
		fmt.Fprintf(&b, "%s %s %s %s: %s -> %s\n", sign, d.Caller, d.Action, d.Other, outcome(d.Before), outcome(d.After))
	}
	_, err = s.stdout.Write(b.Bytes())
	return err
}

func outcome(d policies.Decision) string {
	return strings.Join(append([]string{string(d.Reason)}, d.Policies...), " ")
}

func loadTwo(before, after string) (*policies.Set, *policies.Set, error) {
	b, err := policies.Load(before)
	a, err2 := policies.Load(after)
	return b, a, errors.Join(err, err2)
}
