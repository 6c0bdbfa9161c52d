package lab

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/key"
)

// asides are requests that hand out no key, and how each is answered: most are refused.
// id is a key of the route that its master has.
var asides = []struct {
	what   string
	status int
	ask    func(ctx context.Context, r *route, master, stranger *Person, id key.ID) error
}{
	{"how many keys there are", http.StatusOK, func(ctx context.Context, r *route, master, _ *Person, _ key.ID) error {
		_, err := master.Client.Status(ctx, r.slave.ID)
		return err
	}},
	{"a key for nobody", http.StatusUnauthorized, func(ctx context.Context, _ *route, master, _ *Person, _ key.ID) error {
		return discard(master.Client.EncKeys(ctx, SAEID("nobody"), etsi014.KeyRequest{}))
	}},
	{"a key of a size that none has", http.StatusBadRequest, func(ctx context.Context, r *route, master, _ *Person, _ key.ID) error {
		return discard(master.Client.EncKeys(ctx, r.slave.ID, etsi014.KeyRequest{Bits: 100}))
	}},
	{"a key that policy forbids", http.StatusUnauthorized, func(ctx context.Context, r *route, _, stranger *Person, _ key.ID) error {
		return discard(stranger.Client.EncKeys(ctx, r.slave.ID, etsi014.KeyRequest{}))
	}},
	{"a key of others", http.StatusUnauthorized, func(ctx context.Context, r *route, _, stranger *Person, id key.ID) error {
		return discard(stranger.Client.DecKeys(ctx, r.master.ID, []key.ID{id}))
	}},
	{"in another's name", http.StatusForbidden, func(ctx context.Context, r *route, master, _ *Person, _ key.ID) error {
		k, err := master.Legacy.RequestKey(ctx, r.slave.ID, r.master.ID, 0, 0)
		k.Material.Wipe()
		return err
	}},
	{"a key that never was", http.StatusNotFound, func(ctx context.Context, _ *route, master, _ *Person, _ key.ID) error {
		k, err := master.Legacy.RetrieveKey(ctx, master.ID, key.NewLocalID(time.Now()))
		k.Material.Wipe()
		return err
	}},
	{"that a key be erased that never was", http.StatusNotFound, func(ctx context.Context, _ *route, master, _ *Person, _ key.ID) error {
		return master.Legacy.ConsumeKey(ctx, master.ID, key.NewLocalID(time.Now()))
	}},
	{"how the service is", http.StatusOK, func(ctx context.Context, _ *route, master, _ *Person, _ key.ID) error {
		_, err := master.Legacy.Status(ctx)
		return err
	}},
}

// askAside makes one of them.
func (f *traffic) askAside(r *route, master *Person, id key.ID) {
	f.rest.RLock()
	defer f.rest.RUnlock()
	a := asides[rand.IntN(len(asides))]
	err := legacyError(a.ask(context.Background(), r, master, r.strangers[rand.IntN(len(r.strangers))], id))
	status := http.StatusOK
	if err != nil {
		answer := (*etsi014.APIError)(nil)
		if !errors.As(err, &answer) {
			return // it was not answered
		}
		status = answer.Status
	}
	if status != a.status && status != http.StatusServiceUnavailable {
		f.violation("%v: who asked for %s was answered %d (%v), want %d", r, a.what, status, err, a.status)
	}
}
