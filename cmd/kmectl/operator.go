package main

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/qutemail/kme/internal/admin"
)

// operator returns a client of the operator API for the operator that calls.
func (s *session) operator() (party, *admin.Client, error) {
	p, hc, err := s.client(operatorProfiles)
	if err != nil {
		return p, nil, err
	}
	return p, admin.NewClient(p.kme, hc), nil
}

// unlisted is the advice for a 401 to an operator.
func (p party) unlisted() string {
	return fmt.Sprintf("%s may be unknown here or switched off: principals.yaml lists the operators", p.name)
}

type nodeCommand struct{}

// Run prints how the node stands.
func (nodeCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	n, err := client.Node(ctx)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	if s.JSON {
		return s.printJSON(n)
	}
	alarms, err := client.Alarms(ctx)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s node %s, version %s, run %d, up %v\n", n.KME, n.Node, n.Version, n.Run, seconds(n.Uptime).Round(time.Second))
	fmt.Fprintf(&b, "  HSM       %s\n", health(n.HSM))
	fmt.Fprintf(&b, "  database  %s\n", health(n.Database))
	if n.Suspended != "" {
		fmt.Fprintf(&b, "  SUSPENDED %s\n", printable(n.Suspended))
	}
	for _, peer := range n.Peers {
		fmt.Fprintf(&b, "  peer %-4s %s, its clock %+.3f s from ours\n", peer.KME, health(peer.Health), peer.ClockOffset)
	}
	for _, o := range n.Others {
		fmt.Fprintf(&b, "  node %-4s %s, run %d\n", o.Node, standing(o), o.Run)
	}
	if !n.Production {
		fmt.Fprintf(&b, "  not for production: simulated keys are handed out\n")
	}
	printAlarms(&b, alarms)
	_, err = s.stdout.Write(b.Bytes())
	return err
}

// standing is a word about another node of the KME.
func standing(o admin.Other) string {
	switch {
	case o.Alive:
		return "ok"
	case o.Settled:
		return "NOT ALIVE, nothing of it is left"
	}
	return "NOT ALIVE, and not taken over from yet"
}

func health(h admin.Health) string {
	s := "NOT OK"
	if h.OK {
		s = "ok"
	}
	if h.Detail != "" {
		s += ", " + printable(h.Detail)
	}
	return s
}

type alarmsCommand struct{}

// Run prints the alarms that stand.
func (alarmsCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	alarms, err := client.Alarms(ctx)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	if s.JSON {
		return s.printJSON(struct {
			Alarms []admin.Alarm `json:"alarms"`
		}{alarms})
	}
	var b bytes.Buffer
	printAlarms(&b, alarms)
	_, err = s.stdout.Write(b.Bytes())
	return err
}

func printAlarms(b *bytes.Buffer, alarms []admin.Alarm) {
	if len(alarms) == 0 {
		b.WriteString("  no alarms\n")
	}
	for _, a := range alarms {
		fmt.Fprintf(b, "  ALARM %s since %s: %s\n", a.Name, clock(a.Since), printable(a.Text))
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func clock(t time.Time) string { return t.Local().Format(time.DateTime) }
