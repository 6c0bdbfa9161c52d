package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/qutemail/kme/policies"
)

// principalCommand looks at principals.yaml. It asks no KME.
type principalCommand struct {
	Explain principalExplainCommand `cmd:"" help:"Say whom a certificate names, and what each rule makes of it."`
	Lint    principalLintCommand    `cmd:"" help:"List what is lawful in the files and yet most often a mistake."`
	Test    principalTestCommand    `cmd:"" help:"Try certificates that are written down with the verdict that is wanted."`
	Diff    principalDiffCommand    `cmd:"" help:"List of whom two folders make different callers."`
}

type principalExplainCommand struct {
	File string `arg:"" type:"existingfile" help:"The certificate (PEM; the first of a chain)."`
	Pool string `default:"sae" enum:"sae,kme,operator" help:"The door: sae (default), kme or operator."`
	Dir  string `name:"policies" default:"policies" help:"The folder of policies (${default})."`
}

// Run explains a certificate. Its chain is not looked at: that is TLS's.
func (c principalExplainCommand) Run(s *session) error {
	set, err := policies.Load(c.Dir)
	if err != nil {
		return err
	}
	leaf, err := readCertificate(c.File)
	if err != nil {
		return err
	}
	steps, caller, denial := set.Principals.Explain(c.Pool, leaf, time.Now())
	if s.JSON {
		type step struct {
			Rule string `json:"rule"`
			ID   string `json:"id,omitzero"`
			Why  string `json:"why,omitzero"`
		}
		o := struct {
			Role    string `json:"role,omitzero"`
			ID      string `json:"id,omitzero"`
			Rule    string `json:"rule,omitzero"`
			Refused string `json:"refused,omitzero"`
			Steps   []step `json:"steps"`
		}{Role: string(caller.Role()), ID: caller.ID(), Rule: caller.Rule(), Steps: []step{}}
		if denial != nil {
			o.Refused = denial.Error()
		}
		for _, st := range steps {
			o.Steps = append(o.Steps, step{st.Rule, st.ID, st.Why})
		}
		return s.printJSON(o)
	}
	var b bytes.Buffer
	if denial != nil {
		fmt.Fprintf(&b, "REFUSED at the door for %s: %s\n", c.Pool, printable(denial.Error()))
	} else {
		fmt.Fprintf(&b, "%s %s, by rule %s, until %s\n", caller.Role(), caller.ID(), caller.Rule(), clock(leaf.NotAfter))
	}
	for _, st := range steps {
		if st.Why == "" {
			fmt.Fprintf(&b, "  %-16s matches: %s\n", st.Rule, st.ID)
		} else {
			fmt.Fprintf(&b, "  %-16s %s\n", st.Rule, printable(st.Why))
		}
	}
	fmt.Fprintf(&b, "  whether a CA of this door issued it, and whether it is revoked, is seen by a KME alone\n")
	_, err = s.stdout.Write(b.Bytes())
	return err
}

func readCertificate(file string) (*x509.Certificate, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s holds no certificate", file)
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	return leaf, nil
}

type principalLintCommand struct {
	Dir string `arg:"" default:"policies" help:"The folder (${default})."`
}

// Run lists what was found.
func (c principalLintCommand) Run(s *session) error {
	set, err := policies.Load(c.Dir)
	if err != nil {
		return err
	}
	found := set.Lint()
	if s.JSON {
		return s.printJSON(found)
	}
	for _, text := range found {
		if _, err := fmt.Fprintln(s.stdout, printable(text)); err != nil {
			return err
		}
	}
	return nil
}

type principalTestCommand struct {
	File string `arg:"" type:"existingfile" help:"The cases, such as policies/principals_test.yaml."`
	Dir  string `name:"policies" default:"policies" help:"The folder of policies (${default})."`
}

// Run tries every case.
func (c principalTestCommand) Run(s *session) error {
	set, err := policies.Load(c.Dir)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(c.File)
	if err != nil {
		return err
	}
	cases, err := policies.ParseCases(filepath.Base(c.File), text)
	if err != nil {
		return err
	}
	var failed []error
	for _, one := range cases {
		if err := one.Check(set, time.Now()); err != nil {
			failed = append(failed, err)
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("%d of %d cases are not so:\n%w", len(failed), len(cases), errors.Join(failed...))
	}
	_, err = fmt.Fprintf(s.stdout, "%d cases, all as wanted\n", len(cases))
	return err
}

type principalDiffCommand struct {
	Before string `arg:"" help:"A folder of policies."`
	After  string `arg:"" help:"Another one."`
}

// Run compares two folders.
func (c principalDiffCommand) Run(s *session) error {
	before, after, err := loadTwo(c.Before, c.After)
	if err != nil {
		return err
	}
	changes, err := policies.CompareVerdicts(before, after, time.Now())
	if err != nil {
		return err
	}
	if s.JSON {
		return s.printJSON(changes)
	}
	for _, d := range changes {
		if _, err := fmt.Fprintf(s.stdout, "%s %s: %s -> %s\n", d.Pool, printable(d.Name), d.Before, d.After); err != nil {
			return err
		}
	}
	return nil
}
