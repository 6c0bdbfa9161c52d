package lab

import (
	"bytes"
	"errors"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
)

// What must hold whatever is asked for at once: see also TestKilledAtEveryFailpoint.
func TestOnceOnly(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.PoolLimit = 4096, 8192 })
	keysStored(t, l, 2048)
	t.Run("50 takes of one key", func(t *testing.T) { takesOfOneKey(t, l) })
	t.Run("2 masters x 500 keys of one KME", func(t *testing.T) {
		twoMasters(t, l, [2][2]string{{"alice", "bob"}, {"alice@qutemail.example", "bob@qutemail.example"}})
	})
	t.Run("2 masters x 500 keys of two KMEs", func(t *testing.T) {
		twoMasters(t, l, [2][2]string{{"alice", "bob"}, {"bob", "alice"}})
	})
}

// takesOfOneKey has one key taken over 50 connections at the same time.
func takesOfOneKey(t *testing.T, l *Lab) {
	const takers = 50
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	got := get(t, alice, bob, 1)
	var won, refused atomic.Int64
	var ready, all sync.WaitGroup
	ready.Add(takers)
	for range takers {
		taker := sae(t, l, "bob") // a connection of its own
		if _, err := taker.Client.Status(t.Context(), alice.ID); err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			ready.Done()
			ready.Wait()
			taken, err := taker.Client.DecKeys(t.Context(), alice.ID, got.ids())
			answer := (*etsi014.APIError)(nil)
			switch {
			case err == nil:
				won.Add(1)
				if !bytes.Equal(taken.Keys[0].Material.Reveal(), got[taken.Keys[0].ID]) {
					t.Error("the winner has other bytes than the master")
				}
			case errors.As(err, &answer) && answer.Status == http.StatusBadRequest:
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	all.Wait()
	if won.Load() != 1 || refused.Load() != takers-1 {
		t.Errorf("of %d takes of one key %d were answered 200 and %d 400, want 1 and %d", takers, won.Load(), refused.Load(), takers-1)
	}
}

// twoMasters has two pairs of SAEs ask for 500 keys each, some at a time and all at
// once. No ID and no bytes are handed out twice, and the slaves can take them all.
func twoMasters(t *testing.T, l *Lab, pairs [2][2]string) {
	const keys, number, clients = 500, 5, 10
	type pair struct{ master, slave string }
	var mu sync.Mutex
	secrets := make(map[key.ID][]byte)
	ids := make(map[string]key.ID)
	of := make(map[pair][]key.ID)
	g, ctx := errgroup.WithContext(t.Context())
	for _, p := range pairs {
		for range clients {
			master, slave := sae(t, l, p[0]), &Person{ID: SAEID(p[1])}
			g.Go(func() error {
				for n := 0; n < keys/clients; n += number {
					got, err := patiently(ctx, master, slave, number)
					if err != nil {
						return err
					}
					mu.Lock()
					for _, k := range got.Keys {
						secrets[k.ID] = k.Material.Reveal()
						ids[string(k.Material.Reveal())] = k.ID
						of[pair{p[0], p[1]}] = append(of[pair{p[0], p[1]}], k.ID)
					}
					mu.Unlock()
				}
				return nil
			})
		}
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if want := len(pairs) * keys; len(secrets) != want || len(ids) != want {
		t.Errorf("%d keys have %d different IDs and %d different values", want, len(secrets), len(ids))
	}
	for p, left := range of {
		slave := sae(t, l, p.slave)
		for some := range slices.Chunk(left, 128) {
			taken, err := slave.Client.DecKeys(t.Context(), SAEID(p.master), some)
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range taken.Keys {
				if !bytes.Equal(k.Material.Reveal(), secrets[k.ID]) {
					t.Errorf("key %s has other bytes for its slave", k.ID)
				}
			}
		}
	}
}
