package legacy_test

import (
	"context"
	"crypto/rand"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/legacy"
	"github.com/qutemail/kme/internal/problem"
)

// double stands in for the cores of both KMEs in tests of the door alone, with as
// much of 014 as it takes to see one key through both doors. It keeps keys in
// memory; it has no HSM, database, policy or link, and shows nothing of how the
// core handles keys.
type double struct {
	mu      sync.Mutex
	keys    map[key.ID]*held
	events  map[string]int // outcome events, by request ID
	lost    []error
	fault   error // what every call ends with, if set
	spent   error // what Admit says
	service legacy.Service
}

type held struct {
	master, slave identity.SAE
	secret        []byte
	reread, taken bool
}

func newDouble() *double {
	return &double{
		keys: make(map[key.ID]*held), events: make(map[string]int),
		service: legacy.Service{Sessions: 2, ErrorRate: 0.0125, Stored: 640, Database: legacy.Connected, HSM: legacy.Connected},
	}
}

var expires = time.Date(2025, 12, 8, 12, 0, 0, 999_000_000, time.UTC)

// begin counts the outcome event that the core would record.
func (d *double) begin(rid string) error {
	d.events[rid]++
	return d.fault
}

func (d *double) make(master, slave identity.SAE, bits int, reread bool) (key.ID, key.Material) {
	var id key.ID
	secret := make([]byte, bits/8)
	_, _ = rand.Read(id[:])
	_, _ = rand.Read(secret)
	d.keys[id] = &held{master: master, slave: slave, secret: secret, reread: reread}
	return id, key.NewMaterial(append([]byte{}, secret...))
}

func (d *double) Service(_ context.Context, _ identity.Caller, rid string) (legacy.Service, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.service, d.begin(rid)
}

func (d *double) RequestKey(_ context.Context, c identity.Caller, rid string, recipient identity.SAE, bits int, ttl time.Duration) (legacy.Issued, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(rid); err != nil {
		return legacy.Issued{}, err
	}
	if strings.HasPrefix(recipient.String(), "nobody") {
		return legacy.Issued{}, problem.New(problem.Unauthorized, "")
	}
	self, _ := c.SAE()
	id, m := d.make(self, recipient, bits, true)
	return legacy.Issued{ID: id, Material: m, Bits: bits, Algorithm: "simulated", Source: "pool", ExpiresAt: expires.Add(ttl)}, nil
}

func (d *double) RetrieveKey(_ context.Context, c identity.Caller, rid string, id key.ID) (legacy.Retrieved, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(rid); err != nil {
		return legacy.Retrieved{}, err
	}
	self, _ := c.SAE()
	k := d.keys[id]
	switch {
	case k == nil:
		return legacy.Retrieved{}, problem.New(problem.NotFound, "")
	case k.slave != self:
		return legacy.Retrieved{}, problem.New(problem.Forbidden, "")
	case k.taken:
		return legacy.Retrieved{}, problem.New(problem.Gone, "")
	}
	k.taken = !k.reread
	return legacy.Retrieved{ID: id, Material: key.NewMaterial(append([]byte{}, k.secret...)), Bits: 8 * len(k.secret), Algorithm: "simulated"}, nil
}

func (d *double) ConsumeKey(_ context.Context, c identity.Caller, rid string, id key.ID) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(rid); err != nil {
		return err
	}
	self, _ := c.SAE()
	k := d.keys[id]
	switch {
	case k == nil:
		return problem.New(problem.NotFound, "")
	case k.slave != self:
		return problem.New(problem.Forbidden, "")
	}
	k.taken = true
	return nil
}

func (d *double) Refused(_ context.Context, _ identity.Caller, rid, route string, err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events[rid]++
	if rid == "" || route == "" || err == nil {
		return errors.New("a refusal without a request, a route or a reason")
	}
	return err
}

func (d *double) AnswerLost(_ context.Context, _ identity.Caller, rid string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lost = append(d.lost, errors.Join(errors.New("request "+rid), err))
}

func (d *double) Admit(identity.Caller) error { return d.spent }

// The rest makes it a Backend of 014's door.

func (d *double) Limits() etsi014.Limits {
	return etsi014.Limits{KeySize: 256, MinSize: 64, MaxSize: 4096, MaxPerRequest: 128}
}

func (d *double) Status(_ context.Context, _ identity.Caller, rid string, _ identity.SAE) (etsi014.Status, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return etsi014.Status{}, d.begin(rid)
}

func (d *double) EncKeys(_ context.Context, c identity.Caller, rid string, slave identity.SAE, r etsi014.KeyRequest) (etsi014.Container, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	self, _ := c.SAE()
	id, m := d.make(self, slave, r.Bits, false)
	return etsi014.Container{Keys: []etsi014.Key{{ID: id, Material: m}}}, d.begin(rid)
}

func (d *double) DecKeys(_ context.Context, _ identity.Caller, rid string, _ identity.SAE, ids []key.ID) (etsi014.Container, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(rid); err != nil {
		return etsi014.Container{}, err
	}
	k := d.keys[ids[0]]
	if k == nil || k.taken {
		return etsi014.Container{}, problem.New(problem.NotFound, "")
	}
	k.taken = true
	return etsi014.Container{Keys: []etsi014.Key{{ID: ids[0], Material: key.NewMaterial(append([]byte{}, k.secret...))}}}, nil
}
