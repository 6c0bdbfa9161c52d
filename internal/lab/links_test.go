package lab

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/qutemail/kme/internal/admin"
)

// TestTwoLinks: two quantum channels between the same sites make keys side by side, and
// what is asked for comes of both. When no light passes one, callers notice nothing: keys
// come over the other. Each of qlink, KM1 and KM2 may die: both links go on afterwards.
func TestTwoLinks(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Links = 2 })
	first, second := l.Fibres[0].Link, l.Fibres[1].Link
	op := operator(t, l.KM1)
	made := func(atLeast map[string]int64) {
		t.Helper()
		for _, s := range []*Site{l.KM1, l.KM2} {
			eventually(t, "keys of both links at "+s.Name, func(ctx context.Context) error {
				links, err := linksOf(ctx, operator(t, s))
				for id, session := range atLeast {
					if n := links[id]; err == nil && (n.Last == nil || n.Last.Session < session || n.Last.Aborted != "" || n.Stored < 128) {
						err = fmt.Errorf("link %s in session %d is %s (%s), with %d keys", id, n.Session, n.State, n.Why, n.Stored)
					}
				}
				return err
			})
		}
	}
	made(map[string]int64{first: 1, second: 1})
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	of := func(link string) int {
		t.Helper()
		return recorded(t, l.KM1, "e->>'action' = 'enc_keys' AND e->>'outcome' = 'done' AND e->>'link' = $1", link)
	}
	links, err := linksOf(t.Context(), op)
	if err != nil {
		t.Fatal(err)
	}
	if b := links[first].Last; b.Aborted == "" && (b.Leak < 1 || b.Leak > b.LeakLimit) {
		t.Errorf("block %d leaked %d bits of at most %d", b.Block, b.Leak, b.LeakLimit)
	}
	if n := stored(t, alice, bob); n < max(links[first].Stored, links[second].Stored)+128 {
		t.Errorf("%d keys are stored, and %d and %d were of each link", n, links[first].Stored, links[second].Stored)
	}
	eventually(t, "keys of each link are handed out", func(context.Context) error {
		take(t, bob, alice, get(t, alice, bob, most))
		if a, b := of(first), of(second); a == 0 || b == 0 {
			return fmt.Errorf("%d and %d requests", a, b)
		}
		return nil
	})
	take(t, alice, bob, get(t, bob, alice, 10)) // and from the other end

	if _, err := l.Fibres[1].Tell(t.Context(), "cut"); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Site{l.KM1, l.KM2} {
		untilAlarm(t, s, "link-"+second, true)
		untilAlarm(t, s, "link-"+first, false)
	}
	before := of(second)
	for range 20 {
		take(t, bob, alice, get(t, alice, bob, 5))
	}
	if n := of(second); n != before {
		t.Errorf("%d requests were answered with keys of the link that is cut, though the other has some", n-before)
	}
	if n := recorded(t, l.KM1, "e->>'action' = 'enc_keys' AND e->>'reason' LIKE '%has fewer than%'"); n != 0 {
		t.Errorf("%d callers were told that there are too few keys", n)
	}
	if _, err := l.Fibres[1].Tell(t.Context(), "mend"); err != nil {
		t.Fatal(err)
	}
	untilAlarm(t, l.KM1, "link-"+second, false)

	for what, die := range map[string]func() error{
		"qlink": func() error {
			l.Fibres[1].Kill()
			return l.Fibres[1].Start(t.Context())
		},
		"KM1": func() error { l.KM1.Kill(); return l.KM1.Restart(t.Context()) },
		"KM2": func() error { l.KM2.Kill(); return l.KM2.Restart(t.Context()) },
	} {
		links, err := linksOf(t.Context(), op)
		if err != nil {
			t.Fatal(err)
		}
		next := map[string]int64{first: links[first].Session + 1, second: links[second].Session + 1}
		if what == "qlink" {
			next[first]-- // the other link has nothing to do with it
		}
		if err := die(); err != nil {
			t.Fatalf("%s again: %v", what, err)
		}
		made(next)
		untilServed(t, alice, bob)
		take(t, bob, alice, get(t, alice, bob, 5))
	}
}

// linksOf is how a site says that its links stand, by their IDs.
func linksOf(ctx context.Context, c *admin.Client) (map[string]admin.Link, error) {
	list, err := c.Links(ctx)
	links := make(map[string]admin.Link)
	for _, l := range list {
		links[l.ID] = l
	}
	if err == nil && len(links) != 2 {
		err = errors.New("it does not have two links")
	}
	return links, err
}
