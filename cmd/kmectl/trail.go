package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
)

// trailCommand is kmectl audit. What it verifies it verifies itself: the KME is only
// asked for the text.
type trailCommand struct {
	Log       trailLogCommand  `cmd:"" help:"See how the audit log stands, and the keys that it is verified with."`
	Search    searchCommand    `cmd:"" help:"Look for events."`
	Show      showCommand      `cmd:"" help:"Print one event and prove that it is in the log."`
	Prove     proveCommand     `cmd:"" help:"Write the proof that an event is in the log, for somebody who has only the log's key."`
	Check     checkCommand     `cmd:"" help:"Verify such a proof. Needs no KME."`
	Verify    verifyCommand    `cmd:"" help:"Verify the whole log, or a bundle of it without a KME."`
	Export    exportCommand    `cmd:"" help:"Write the log, or a part of it, into a bundle."`
	Approvals approvalsCommand `cmd:"" help:"Verify again what two officers have signed for each act that takes two."`
	Reconcile reconcileCommand `cmd:"" help:"Compare the logs of two KMEs."`
	Watch     watchCommand     `cmd:"" help:"Print events as they come."`
}

type trailLogCommand struct{}

// Run prints how the log stands.
func (trailLogCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	t, err := client.Trail(ctx)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	if s.JSON {
		return s.printJSON(t)
	}
	var b bytes.Buffer
	for _, l := range t.Logs {
		fmt.Fprintf(&b, "log %s, %d events, since %s\n  key     %s\n", l.Name, l.Size, clock(l.Begun), l.Key)
	}
	if n := len(t.Logs); n > 0 {
		for _, line := range strings.Split(strings.TrimSpace(t.Logs[n-1].Checkpoint), "\n") {
			fmt.Fprintf(&b, "          %s\n", printable(line))
		}
	}
	fmt.Fprintf(&b, "  waiting %d events are not in it yet\n  witness %s\n", t.Waiting, t.Witness)
	for _, w := range t.Witnessed {
		fmt.Fprintf(&b, "witnessed %s of %s, %d events\n  key     %s\n", w.Log, w.KME, w.Size, w.Key)
	}
	if t.Distrust != "" {
		fmt.Fprintf(&b, "NOT TO BE TRUSTED: %s\n", printable(t.Distrust))
	}
	_, err = s.stdout.Write(b.Bytes())
	return err
}

// query are the flags of a search.
type query struct {
	From    time.Time `help:"Not before this time (RFC 3339)." format:"2006-01-02T15:04:05Z07:00"`
	To      time.Time `help:"Before this time." format:"2006-01-02T15:04:05Z07:00"`
	SAE     string    `name:"sae" help:"An SAE that asked or was named."`
	KeyID   string    `name:"key-id" help:"A key."`
	Request string    `help:"A request's ID."`
	Action  string    `help:"enc_keys, dec_keys, alarm ..."`
	Outcome string    `help:"done, refused or failed."`
	Serial  string    `help:"Serial number of the certificate that asked, decimal."`
	Who     string    `name:"operator" help:"An operator that asked."`
}

func (q query) query() admin.Query {
	return admin.Query{
		From: q.From, To: q.To, SAE: q.SAE, Key: q.KeyID, Request: q.Request, Action: q.Action, Outcome: q.Outcome, Serial: q.Serial, Operator: q.Who,
	}
}

type searchCommand struct {
	query
	Limit int `default:"100" help:"At most so many (${default})."`
}

// Run prints what was found: one event a line.
func (c searchCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	q := c.query.query()
	q.Limit = c.Limit
	found, err := client.Search(ctx, q)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	for _, f := range found.Events {
		if err := s.printFound(f); err != nil {
			return err
		}
	}
	if found.More {
		fmt.Fprintln(s.stderr, "kmectl: there may be more: a higher --limit, or a shorter time with --from and --to")
	}
	return nil
}

// printFound prints an event: its text as it is with --json, and for people else.
func (s *session) printFound(f admin.Found) error {
	if s.JSON {
		_, err := fmt.Fprintln(s.stdout, f.Text)
		return err
	}
	e, err := audit.ParseEvent([]byte(f.Text))
	if err != nil {
		return err
	}
	place := "-"
	if f.Leaf >= 0 {
		place = fmt.Sprint(f.Leaf)
	}
	_, err = fmt.Fprintf(s.stdout, "%8s %s %-7s %-8s %s\n", place, e.At.Format("2006-01-02T15:04:05.000Z"), e.Node, e.Outcome, printable(sentence(e)))
	return err
}

// sentence is an event for people.
func sentence(e audit.Event) string {
	parts := []string{string(e.Action)}
	if e.Actor.ID != "" && e.Actor.Role != "node" {
		parts = append(parts, "by "+e.Actor.Role+" "+e.Actor.ID)
	}
	if e.Peer != "" {
		parts = append(parts, "with "+e.Peer)
	}
	switch {
	case len(e.Keys) == 1:
		parts = append(parts, "key "+e.Keys[0].String())
	case len(e.Keys) > 1:
		parts = append(parts, fmt.Sprintf("%d keys from %s on", len(e.Keys), e.Keys[0]))
	}
	if e.Request != "" {
		parts = append(parts, "request "+e.Request)
	}
	if e.Reason != "" {
		parts = append(parts, ": "+e.Reason)
	}
	return strings.Join(parts, " ")
}

type showCommand struct {
	trusted
	Leaf   int64 `arg:"" help:"The event's number in the log."`
	Origin int64 `help:"Of the log of this origin (the present one)."`
}

// Run prints an event that was proved.
func (c showCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	proof, err := client.Proof(ctx, c.Origin, c.Leaf)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	named, err := namedKey(ctx, client, c.trusted, c.Origin)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	return c.print(s, proof, named)
}

type watchCommand struct {
	query
	Interval time.Duration `default:"1s" help:"How often to ask (${default})."`
}

// Run prints events as they come into the log, until it is interrupted. It goes on where
// it was when the KME has been away, and in the log that a recovery has begun from its
// start: no event is left out, and none told twice.
func (c watchCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	q := c.query.query()
	q.Limit, q.Watch = 1000, true
	t, err := client.Trail(ctx)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	if n := len(t.Logs); n > 0 {
		q.Origin, q.First = t.Logs[n-1].Origin, t.Logs[n-1].Size
	}
	tick := time.NewTicker(max(c.Interval, 100*time.Millisecond))
	defer tick.Stop()
	lost := false // the KME does not answer, as was said
	for {
		found, err := client.Search(ctx, q)
		if answer, ok := errors.AsType[*admin.APIError](err); ok && answer.Status == http.StatusGone {
			err = nextLog(ctx, client, &q)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !passes(err):
			return p.explain(err, p.unlisted())
		case err != nil && !lost:
			fmt.Fprintf(s.stderr, "kmectl: %v\nkmectl: going on with event %d as soon as it answers\n", p.explain(err, p.unlisted()), q.First)
		}
		lost = err != nil
		for _, f := range found.Events {
			if err := s.printFound(f); err != nil {
				return err
			}
			q.First = f.Leaf + 1
		}
		if found.More {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// nextLog has a watch go on with the log after the one that it has seen the end of.
func nextLog(ctx context.Context, client *admin.Client, q *admin.Query) error {
	t, err := client.Trail(ctx)
	if err != nil {
		return err
	}
	for _, l := range t.Logs {
		if l.Origin > q.Origin {
			q.Origin, q.First = l.Origin, 0
			break
		}
	}
	return nil
}

// passes says whether what is in the way may be over by itself: whatever is not the
// KME's own word that it will not answer this.
func passes(err error) bool {
	answer, ok := errors.AsType[*admin.APIError](err)
	return !ok || answer.Status >= http.StatusInternalServerError
}
