package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/legacy"
)

// most is how many keys a request may name.
const most = 128

// keySet is what a master got: bytes by key_ID.
type keySet map[key.ID][]byte

func (s keySet) add(c etsi014.Container) {
	for _, k := range c.Keys {
		s[k.ID] = k.Material.Reveal()
	}
}

func (s keySet) ids() []key.ID {
	ids := make([]key.ID, 0, len(s))
	for id := range s {
		ids = append(ids, id)
	}
	return ids
}

// get has master get n keys to share with slave. It waits while there are too few.
func get(t testing.TB, master, slave *Person, n int) keySet {
	t.Helper()
	got := make(keySet)
	for len(got) < n {
		eventually(t, fmt.Sprintf("keys of %s for %s", master.ID, slave.ID), func(ctx context.Context) error {
			c, err := master.Client.EncKeys(ctx, slave.ID, etsi014.KeyRequest{Number: min(most, n-len(got))})
			if err != nil && away(err) == nil {
				t.Fatalf("%s gets keys for %s: %v", master.ID, slave.ID, err)
			}
			got.add(c)
			return err
		})
	}
	return got
}

// patiently has master ask for n keys, again and again while it is told to come later.
func patiently(ctx context.Context, master, slave *Person, n int) (etsi014.Container, error) {
	for {
		c, err := master.Client.EncKeys(ctx, slave.ID, etsi014.KeyRequest{Number: n})
		if away(err) == nil || ctx.Err() != nil {
			return c, err
		}
	}
}

// request has sender get a key to share with reader by QuteMail's routes. It tries again
// if it is told to come later.
func request(t testing.TB, sender, reader *Person, ttl time.Duration) (sent legacy.Issued) {
	t.Helper()
	eventually(t, fmt.Sprintf("a key of %s for %s", sender.ID, reader.ID), func(ctx context.Context) (err error) {
		sent, err = sender.Legacy.RequestKey(ctx, sender.ID, reader.ID, 0, ttl)
		if err != nil && legacyStatus(err) != http.StatusServiceUnavailable {
			t.Fatalf("%s gets a key for %s: %v", sender.ID, reader.ID, err)
		}
		return err
	})
	return sent
}

// take has slave take all of what master got, and compares the bytes.
func take(t testing.TB, slave, master *Person, keys keySet) {
	t.Helper()
	for ids := range slices.Chunk(keys.ids(), most) {
		c, err := slave.Client.DecKeys(t.Context(), master.ID, ids)
		if err != nil {
			t.Fatalf("%s takes %d keys of %s: %v", slave.ID, len(ids), master.ID, err)
		}
		for _, k := range c.Keys {
			if !bytes.Equal(k.Material.Reveal(), keys[k.ID]) {
				t.Errorf("%s has other bytes under %s than %s", slave.ID, k.ID, master.ID)
			}
		}
	}
}

// enc has master ask for one key for slave, which it throws away.
func enc(ctx context.Context, master, slave *Person) error {
	c, err := master.Client.EncKeys(ctx, slave.ID, etsi014.KeyRequest{})
	c.Wipe()
	return err
}

// away is err as a 503 that says so in an Error object and when to come again; nil if it is
// anything else.
func away(err error) *etsi014.APIError {
	answer, ok := errors.AsType[*etsi014.APIError](err)
	if !ok || answer.Status != http.StatusServiceUnavailable || answer.Message == "" || answer.RetryAfter <= 0 {
		return nil
	}
	return answer
}

// wantAway fails the test unless err is a 503 with an Error object and a Retry-After.
func wantAway(t testing.TB, what string, err error) {
	t.Helper()
	if away(err) == nil {
		t.Errorf("%s: %v, want a 503 with an Error object and a Retry-After", what, err)
	}
}

// untilAway returns when one of master's requests was answered 503.
func untilAway(t testing.TB, master, slave *Person) {
	t.Helper()
	eventually(t, "503", func(ctx context.Context) error {
		err := enc(ctx, master, slave)
		if err != nil && away(err) != nil {
			return nil
		}
		return fmt.Errorf("the answer was: %w", err)
	})
}

// untilServed returns when master gets keys again.
func untilServed(t testing.TB, master, slave *Person) {
	t.Helper()
	eventually(t, "service back", func(ctx context.Context) error { return enc(ctx, master, slave) })
}

// stored is the stored_key_count of Get status.
func stored(t testing.TB, master, slave *Person) int {
	t.Helper()
	s, err := master.Client.Status(t.Context(), slave.ID)
	if err != nil {
		t.Fatalf("Get status: %v", err)
	}
	return s.Stored
}

// operator is the lab's operator at a site.
func operator(t testing.TB, s *Site) *admin.Client {
	t.Helper()
	c, err := s.lab.Operator("root", s.Name)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// node is how the site's node says it stands.
func node(t testing.TB, s *Site) admin.Node {
	t.Helper()
	n, err := operator(t, s).Node(t.Context())
	if err != nil {
		t.Fatalf("asking %s how it is: %v", s.Name, err)
	}
	return n
}

// link is how the site says that its one link stands.
func link(ctx context.Context, c *admin.Client) (admin.Link, error) {
	links, err := c.Links(ctx)
	if err == nil && len(links) != 1 {
		err = fmt.Errorf("%d links", len(links))
	}
	if err != nil {
		return admin.Link{}, err
	}
	return links[0], nil
}

// untilAlarm returns when the site has an alarm of that name, or, if standing is
// false, none.
func untilAlarm(t testing.TB, s *Site, name string, standing bool) {
	t.Helper()
	c := operator(t, s)
	eventually(t, fmt.Sprintf("alarm %s at %s: %t", name, s.Name, standing), func(ctx context.Context) error {
		alarms, err := c.Alarms(ctx)
		if err != nil {
			return err
		}
		if standing != slices.ContainsFunc(alarms, func(a admin.Alarm) bool { return a.Name == name }) {
			return fmt.Errorf("alarms: %v", alarms)
		}
		return nil
	})
}

// recorded counts the events in the site's audit for which a condition on the JSON
// value e holds.
func recorded(t testing.TB, s *Site, where string, args ...any) int {
	t.Helper()
	conn, done, err := s.super(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	var n int
	query := "SELECT count(*) FROM (SELECT body::jsonb AS e FROM kme.audit) a WHERE " + where
	if err := conn.QueryRow(t.Context(), query, args...).Scan(&n); err != nil {
		t.Fatalf("reading the audit of %s: %v", s.Name, err)
	}
	return n
}
