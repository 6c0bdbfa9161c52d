package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/key"
)

// keyCommands are about keys, for operators.
type keyCommands struct {
	Show       storyCommand      `cmd:"" help:"See the story of a key, without its bytes (auditors)."`
	Compromise compromiseCommand `cmd:"" help:"Have all keys burned, at both ends, that were made at some time and that somebody may know (two security officers)."`
}

type storyCommand struct {
	ID string `arg:"" help:"The key_ID."`
}

// Run prints a key's story.
func (c storyCommand) Run(ctx context.Context, s *session) error {
	id, err := key.ParseID(c.ID)
	if err != nil {
		return advise(err, badKeyID)
	}
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	k, err := client.KeyStory(ctx, id)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	if s.JSON {
		return s.printJSON(k)
	}
	var b bytes.Buffer
	state := k.State
	if state == "" {
		state = "not known here: never, or it went with its pool"
	}
	fmt.Fprintf(&b, "key %s  %s\n", k.ID, printable(state))
	fmt.Fprintf(&b, "  made     in epoch %d, from %s\n", k.Epoch, clock(k.Made))
	if at := k.Pool; at != nil {
		fmt.Fprintf(&b, "  stored   block %d of session %d of link %s (%s, since %s), index %d, %s; sealed under KEK %d; to be assigned by %s\n",
			at.Block, at.Session, printable(at.Link), printable(at.BlockState), clock(at.Held), at.Index, printable(at.Provenance), at.KEK, printable(at.Owner))
		if at.Upstream != "" {
			fmt.Fprintf(&b, "           the device that made it calls it %s\n", printable(at.Upstream))
		}
	}
	for _, d := range k.Due {
		how := "waits, expires " + clock(d.Expires)
		if d.Gone != "" {
			how = "gone: " + printable(d.Gone)
		}
		fmt.Fprintf(&b, "  assigned to %s, by %s, %d bits, %s; sealed under KEK %d; %s\n", printable(d.SAE), printable(d.Master), d.Bits, printable(d.Provenance), d.KEK, how)
	}
	for _, e := range k.Events {
		fmt.Fprintf(&b, "  %s  %s %s", clock(e.At), printable(e.Action), printable(e.Outcome))
		if e.Actor != "" {
			fmt.Fprintf(&b, " by %s", printable(e.Actor))
		}
		if e.Master != "" {
			fmt.Fprintf(&b, ", %s for %s", printable(e.Master), printable(strings.Join(e.Slaves, " ")))
		}
		if e.Reason != "" {
			fmt.Fprintf(&b, ": %s", printable(e.Reason))
		}
		fmt.Fprintf(&b, "  (event %d of %s)\n", e.Seq, printable(e.Node))
	}
	_, err = s.stdout.Write(b.Bytes())
	return err
}

type compromiseCommand struct {
	Since string `required:"" placeholder:"TIME" help:"From when on (RFC 3339, or how long ago: 90m; what two officers sign for is a time, not how long ago it is). It is widened to whole epochs, as is --until: an ID tells no more."`
	Until string `placeholder:"TIME" help:"Until when (likewise; now)."`
	Link  string `placeholder:"ID" help:"Of one link alone. Otherwise those of all links, and of pairs that are both served here."`
	Yes   bool   `help:"Do it. The keys are gone for good, and so is what masters have been given of them and their slaves have not taken."`

	approving `embed:""`
}

// Run has keys burned.
func (c compromiseCommand) Run(ctx context.Context, s *session) error {
	suspicion := admin.Suspicion{Link: c.Link}
	var err error
	if suspicion.Since, err = moment(c.Since); err == nil && c.Until != "" {
		suspicion.Until, err = moment(c.Until)
	}
	if err != nil {
		return err
	}
	if !c.Yes {
		return advise(errors.New("nothing was done: keys would be gone for good"), "say --yes to burn the keys made since %s", clock(suspicion.Since))
	}
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	given, err := c.approvals(ctx, s, client, suspicion)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	done, err := client.Compromise(ctx, suspicion, given...)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	if s.JSON {
		return s.printJSON(done)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "keys made from %s to %s: %d burned in the pool, %d that waited to be taken are void\n", clock(done.From), clock(done.To), done.Burned, done.Voided)
	for _, kme := range done.Untold {
		fmt.Fprintf(&b, "%s HAS NOT ANSWERED: its part of them is burned when it does, and can be taken there until then\n", printable(kme))
	}
	b.WriteString("What both its SAEs had been handed before is theirs to forget: kmectl key show tells of each key who has it.\n")
	b.WriteString("If the secret that both ends of a link share may be known too, renew it at both: kmed hsm auth-secret, or auth_file.\n")
	_, err = s.stdout.Write(b.Bytes())
	return err
}

// approvals are those of a suspicion, whose act is said in whole epochs.
func (c compromiseCommand) approvals(ctx context.Context, s *session, client *admin.Client, suspicion admin.Suspicion) ([]approval.Approval, error) {
	if c.Approval == "" {
		return nil, nil
	}
	epochs, err := client.Epochs(ctx)
	if err != nil {
		return nil, err
	}
	name, on := suspicion.Act(time.Duration(epochs.Length * float64(time.Second)))
	return c.approving.approvals(ctx, s, client, name, on...)
}

// moment reads a time, or how long ago it was.
func moment(text string) (time.Time, error) {
	if ago, err := time.ParseDuration(text); err == nil && ago >= 0 {
		return time.Now().Add(-ago), nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return t, fmt.Errorf("%q is no time such as 2026-03-01T12:00:00Z or 90m", text)
	}
	return t, nil
}
