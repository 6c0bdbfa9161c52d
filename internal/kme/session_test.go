package kme

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/qlink"
)

// TestSession: two sites open a session and distil blocks of light, which are authenticated
// with pads that are expanded from the secret that both have.
func TestSession(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "qlink") // a name that leaves room for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	params, profile := qlink.Standard()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"alice", "bob"} {
		if err := os.WriteFile(at(name+".secret"), []byte("the secret of the end of "+name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fibre, err := qlink.Listen(t.Context(), qlink.Config{
		AliceSocket: at("alice"), BobSocket: at("bob"), AliceSecretFile: at("alice.secret"), BobSecretFile: at("bob.secret"),
		Params: params, PhysicsSeed: 1, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var under sync.WaitGroup
	under.Go(func() {
		if err := fibre.Serve(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); under.Wait() })

	alices, bobs := newSite(t), newSite(t)
	k := alices.withToken(tokenDir(t))
	other := k.Config // of the other site, which has this one's token, and its name
	other.Node, other.DataDir, other.Store = "b", bobs.data, bobs.connectAs("b", bobs.data)
	k2, err := New(other)
	if err != nil {
		t.Fatal(err)
	}
	end := func(k *KME, e handover.End) *link {
		run(t, k)
		l := newLink(k, LinkConfig{
			ID: "km1-km2", Peer: kmeID(t, "km2"), End: e, Profile: profile, Provenance: key.Simulated, Random: rand.Reader, InFlight: 2,
			Secret: func(context.Context) ([]byte, error) { return make([]byte, minAuthSecret), nil },
			Box: func(ctx context.Context) (*qlink.Box, error) {
				return qlink.OpenBox(ctx, at(e.String()), at(e.String()+".secret"), e)
			},
		})
		if err := k.Store.EnsureLink(t.Context(), l.ID, l.Peer, l.End); err != nil {
			t.Fatal(err)
		}
		return l
	}
	alice, bob := end(k, handover.Alice), end(k2, handover.Bob)
	a, b := net.Pipe()
	hers, his := peer.NewStream(a, nil), peer.NewStream(b, nil)
	alice.Dial = func(context.Context) (*peer.Stream, error) { return hers, nil }
	session, over := context.WithCancel(t.Context())
	var ends sync.WaitGroup
	ends.Go(func() {
		if err := alice.alice(session); !errors.Is(err, context.Canceled) && session.Err() == nil {
			t.Errorf("Alice's end: %v", err)
		}
	})
	ends.Go(func() {
		offer, err := hear(his, frameOffer)
		if err != nil {
			t.Error(err)
		}
		bob.follow(session, his, offer)
	})
	defer ends.Wait()
	defer his.Close()
	defer hers.Close()
	defer over()
	eventually(t, "a block at both ends", func() bool {
		blocks := func(l *link) int { l.mu.Lock(); defer l.mu.Unlock(); return l.state.Blocks }
		return blocks(alice) >= 1 && blocks(bob) >= 1
	})
}
