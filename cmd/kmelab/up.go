package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/lab"
)

// up starts the lab, shows a key's whole path, and stays until ctx ends.
func up(ctx context.Context, cfg lab.Config, s *screen) error {
	began := time.Now()
	cfg.Step = s.step
	l, err := lab.Up(ctx, cfg)
	if err != nil {
		return err
	}
	s.row("lab", "%s  (Ctrl-C stops everything; your keys and certificates stay)", cfg.Dir)
	s.row("CAs", "sae https://localhost:%d · kme :%d · operator :%d        keys in SoftHSM: for labs only", l.Ports.SAECA, l.Ports.KMECA, l.Ports.OperatorCA)
	err = show(ctx, l, s)
	if err == nil {
		s.row("started", "in %v", time.Since(began).Round(100*time.Millisecond))
		err = watch(ctx, l, s)
	}
	s.clear()
	fmt.Fprintln(s.out, "stopping")
	if derr := l.Down(); err == nil || errors.Is(err, context.Canceled) {
		err = derr
	}
	return err
}

// show walks through the product as its users would.
func show(ctx context.Context, l *lab.Lab, s *screen) error {
	for _, site := range []*lab.Site{l.KM1, l.KM2} {
		if err := showNode(ctx, l, site, s); err != nil {
			return err
		}
	}
	links, err := firstBlocks(ctx, l, s)
	if err != nil {
		return err
	}
	for _, link := range links {
		which := "10 km"
		if len(links) > 1 {
			which = link.ID + " · " + which
		}
		if link.Last == nil {
			s.row("link", "%s · resting: %s", which, link.Why)
		} else {
			s.row("link", "%s · QBER %.1f %% · f %.2f · %d keys of 256 bits from %.1f million gates", which, 100*link.Last.QBER, link.Last.Efficiency, link.Last.Length/key.AtomBits, float64(link.Last.Gates)/1e6)
		}
	}
	if err := showKey(ctx, l, s); err != nil {
		return fmt.Errorf("showing the first key: %w", err)
	}
	if err := showMail(ctx, l, s); err != nil {
		return fmt.Errorf("showing the mail round trip: %w", err)
	}
	showNext(l, s)
	return nil
}

func showNode(ctx context.Context, l *lab.Lab, site *lab.Site, s *screen) error {
	op, err := l.Operator("root", site.Name)
	if err != nil {
		return err
	}
	n, err := op.Node(ctx)
	if err != nil {
		return fmt.Errorf("asking %s how it is: %w", site.Name, err)
	}
	ok := func(h admin.Health) string {
		if h.OK {
			return "ok"
		}
		return h.Detail
	}
	nodes := "1 node"
	if len(site.Nodes) > 1 {
		nodes = fmt.Sprintf("%d nodes", len(site.Nodes))
	}
	s.row(map[string]string{"km1": "KM1", "km2": "KM2"}[site.Name], "%s   HSM %s · database %s · %s", site.URL(), ok(n.HSM), ok(n.Database), nodes)
	for _, other := range site.Nodes[1:] {
		s.row("", "%s   %s", other.URL(), other.Name)
	}
	return nil
}

// linksOf are the links as the nodes of KM1 see them, each by the one that runs it.
func linksOf(ctx context.Context, l *lab.Lab) (links []admin.Link, err error) {
	for _, n := range l.KM1.Nodes {
		op, err := l.Operator("root", n.Name)
		if err != nil {
			return nil, err
		}
		seen, err := op.Links(ctx)
		if err != nil {
			return nil, fmt.Errorf("asking %s for its links: %w", n.Name, err)
		}
		switch {
		case len(seen) == 0 || links != nil && len(seen) != len(links):
			return nil, fmt.Errorf("%s has %d links", n.Name, len(seen))
		case links == nil:
			links = seen
		}
		for i, link := range seen { // every node has them in the same order
			if link.State != admin.LinkStandby {
				links[i] = link
			}
		}
	}
	return links, nil
}

// firstBlocks waits until both ends have keys of each link, and shows how the blocks come
// along.
func firstBlocks(ctx context.Context, l *lab.Lab, s *screen) ([]admin.Link, error) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	for {
		links, err := linksOf(ctx, l)
		if err != nil {
			return nil, err
		}
		late := slices.IndexFunc(links, func(link admin.Link) bool { return !hasKeys(link) })
		if late < 0 && ready(ctx, l) == nil {
			return links, nil
		}
		link := links[max(0, late)]
		s.step(coming(link))
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-deadline.C:
			return nil, fmt.Errorf("no block within a minute: link %s is %s (%s); see %s", link.ID, link.State, link.Why, l.KM1.LogFile())
		case <-tick.C:
		}
	}
}

// hasKeys says whether both ends of a link have keys of it to hand out.
func hasKeys(link admin.Link) bool {
	made := link.Last != nil && link.Last.Aborted == ""
	return (made || link.State == admin.LinkFull) && link.Stored > 0 && link.StoredPeer > 0
}

// ready is nil if each node of KM1 hands out keys.
func ready(ctx context.Context, l *lab.Lab) error {
	for _, n := range l.KM1.Nodes {
		op, err := l.Operator("root", n.Name)
		if err != nil {
			return err
		}
		if err := lab.Ready(ctx, op); err != nil {
			return err
		}
	}
	return nil
}

// coming says how far the first block of a link is.
func coming(link admin.Link) string {
	switch {
	case link.Last != nil && link.Last.Aborted != "" && link.Last.QBER == 0: // before it was known
		return "link  block given up: " + link.Last.Aborted
	case link.Last != nil && link.Last.Aborted != "":
		return fmt.Sprintf("link  QBER %.1f %%: %s", 100*link.Last.QBER, link.Last.Aborted)
	case link.Current != nil:
		return "link  first block " + bar(link.Current.Block()) + " " + link.Current.Stage
	}
	return "link  " + link.State
}

// showKey has alice get a key at KM1 and bob take it at KM2, and carol refused.
func showKey(ctx context.Context, l *lab.Lab, s *screen) error {
	alice, bob, carol, err := three(l)
	if err != nil {
		return err
	}
	got, err := alice.Client.EncKeys(ctx, bob.ID, etsi014.KeyRequest{})
	if err != nil {
		return err
	}
	defer got.Wipe()
	id := got.Keys[0].ID
	_, refused := carol.Client.DecKeys(ctx, alice.ID, []key.ID{id})
	taken, err := bob.Client.DecKeys(ctx, alice.ID, []key.ID{id})
	if err != nil {
		return err
	}
	defer taken.Wipe()
	if !bytes.Equal(got.Keys[0].Material.Reveal(), taken.Keys[0].Material.Reveal()) {
		return errors.New("alice and bob have different bytes")
	}
	var answer *etsi014.APIError
	if !errors.As(refused, &answer) || answer.Status != http.StatusUnauthorized {
		return fmt.Errorf("carol was not refused: %w", refused)
	}
	s.row("first key", "%s   %d bits", id, got.Keys[0].Material.Bits())
	s.row("", "alice got it at KM1, bob took the same bytes at KM2, carol was refused (401)")
	return nil
}

func three(l *lab.Lab) (alice, bob, carol *lab.Person, err error) {
	var errs [3]error
	alice, errs[0] = l.SAE("alice")
	bob, errs[1] = l.SAE("bob")
	carol, errs[2] = l.SAE("carol")
	return alice, bob, carol, errors.Join(errs[:]...)
}

// showMail is QuteMail's round trip: send through KM1, read through KM2.
func showMail(ctx context.Context, l *lab.Lab, s *screen) error {
	const from, to = "alice@qutemail.example", "bob@qutemail.example"
	sender, err := l.SAEAt(from, "km1")
	if err != nil {
		return err
	}
	reader, err := l.SAEAt(to, "km2")
	if err != nil {
		return err
	}
	sent, err := sender.Legacy.RequestKey(ctx, sender.ID, reader.ID, 0, 0)
	if err != nil {
		return err
	}
	defer sent.Material.Wipe()
	opened, err := reader.Legacy.RetrieveKey(ctx, reader.ID, sent.ID)
	if err != nil {
		return err
	}
	defer opened.Material.Wipe()
	if !bytes.Equal(sent.Material.Reveal(), opened.Material.Reveal()) {
		return errors.New("sender and reader have different bytes")
	}
	if err := reader.Legacy.ConsumeKey(ctx, reader.ID, sent.ID); err != nil {
		return err
	}
	s.row("mail", "%s -> %s   sent, opened, consumed", from, to)
	return nil
}

func showNext(l *lab.Lab, s *screen) {
	dir := l.Dir
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, dir); err == nil {
			dir = rel
		}
	}
	s.row("try", "bin/kmectl --as alice get --slave bob")
	s.row("", "bin/kmectl --as root link --watch")
	s.row("", "curl --cert %[1]s/saes/alice/cert.pem --key %[1]s/saes/alice/key.pem --cacert %[1]s/root.pem %[2]s/api/v1/keys/bob/status", dir, l.KM1.URL())
	s.row("", "bin/qlink tell --control %s eve 0.5      (then: eve 0)", l.Fibres[0].ControlSocket())
	s.row("", "make tools, then: bin/step ca certificate dave dave.crt dave.key --ca-url https://localhost:%d --root %s/root.pem --token \"$(bin/kme-ca token --dir %s/ca sae dave)\"", l.Ports.SAECA, dir, dir)
	s.row("check", "bin/kmelab check")
}

// watch shows the link's figures on a terminal until ctx ends, or until a daemon does.
func watch(ctx context.Context, l *lab.Lab, s *screen) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if links, err := linksOf(ctx, l); err == nil { // a node may be starting again
			s.step(figures(links))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		for _, n := range slices.Concat(l.KM1.Nodes, l.KM2.Nodes) {
			switch {
			case n.Running():
			case n.Fenced():
				s.row("restarted", "%s, which had been taken over", n.Name)
				if err := n.Restart(ctx); err != nil {
					return err
				}
			default:
				return fmt.Errorf("%s has ended; see %s", n.Name, n.LogFile())
			}
		}
	}
}

// figures is the live line of the links.
func figures(links []admin.Link) string {
	if len(links) > 1 {
		words := make([]string, len(links))
		for i, l := range links {
			words[i] = fmt.Sprintf("%s %s, %d and %d keys", l.ID, l.State, l.Stored, l.StoredPeer)
		}
		return strings.Join(words, " · ")
	}
	l := links[0]
	line := fmt.Sprintf("link %s · %d keys at KM1, %d at KM2", l.State, l.Stored, l.StoredPeer)
	if l.Last != nil {
		line += fmt.Sprintf(" · block %d · QBER %.1f %%", l.Last.Block, 100*l.Last.QBER)
		if l.Last.Aborted != "" {
			line += " · ABORTED: " + l.Last.Aborted
		}
	}
	if l.Why != "" {
		line += " · " + l.Why
	}
	return line
}
