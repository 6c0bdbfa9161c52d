package etsi014_test

import (
	"context"
	"crypto/rand"
	"errors"
	"sync"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// double stands in for the cores of KM1 and KM2 in tests of the door alone. It
// keeps keys in memory and knows who may have one; it has no HSM, database, policy
// or link, and shows nothing of how the core handles them.
type double struct {
	mu     sync.Mutex
	pool   int // keys of 256 bits left
	keys   map[key.ID]*held
	events map[string]int // outcome events, by request ID
	lost   []error
	fault  error // what every call ends with, if set
}

type held struct {
	master, slave identity.SAE
	secret        []byte
	taken         bool
}

// at is the double as one of its KMEs.
type at struct {
	*double
	kme string
}

// homes are the SAEs that the double knows, in the order of their homes.
var homes = map[string][]string{
	"alice": {"km1"}, "bob": {"km2"}, "carol": {"km2"},
	"alice@qutemail.example": {"km1", "km2"}, "bob@qutemail.example": {"km1", "km2"},
}

func newDouble() *double {
	return &double{pool: 100_000, keys: make(map[key.ID]*held), events: make(map[string]int)}
}

var errForbidden = problem.Because(problem.Unauthorized, errors.New("the double knows no such pair"))

// begin counts the outcome event that the core would record, and judges the pair.
func (d at) begin(rid string, other identity.SAE) error {
	d.events[rid]++
	if d.fault != nil {
		return d.fault
	}
	if homes[other.String()] == nil {
		return errForbidden
	}
	return nil
}

func (d at) Limits() etsi014.Limits {
	return etsi014.Limits{KeySize: 256, MinSize: 64, MaxSize: 4096, MaxPerRequest: 128}
}

func (d at) Status(_ context.Context, c identity.Caller, rid string, slave identity.SAE) (etsi014.Status, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(rid, slave); err != nil {
		return etsi014.Status{}, err
	}
	target := homes[slave.String()][0]
	for _, home := range homes[slave.String()] {
		if home != d.kme {
			target = home
		}
	}
	l := d.Limits()
	return etsi014.Status{
		SourceKME: d.kme, TargetKME: target, Master: c.ID(), Slave: slave.String(), Stored: d.pool, Max: 1_000_000,
		KeySize: l.KeySize, MinSize: l.MinSize, MaxSize: l.MaxSize, MaxPerRequest: l.MaxPerRequest, MaxSAEs: l.MaxSAEs,
	}, nil
}

func (d at) EncKeys(_ context.Context, c identity.Caller, rid string, slave identity.SAE, r etsi014.KeyRequest) (etsi014.Container, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(rid, slave); err != nil {
		return etsi014.Container{}, err
	}
	atoms := r.Number * ((r.Bits + 255) / 256)
	if d.pool < atoms {
		return etsi014.Container{}, problem.New(problem.Unavailable, "not enough keys")
	}
	d.pool -= atoms
	master, _ := c.SAE()
	var got etsi014.Container
	for range r.Number {
		var id key.ID
		secret := make([]byte, r.Bits/8)
		_, _ = rand.Read(id[:])
		_, _ = rand.Read(secret)
		d.keys[id] = &held{master: master, slave: slave, secret: secret}
		got.Keys = append(got.Keys, etsi014.Key{ID: id, Material: key.NewMaterial(append([]byte{}, secret...)), Provenance: key.Simulated})
	}
	return got, nil
}

func (d at) DecKeys(_ context.Context, c identity.Caller, rid string, master identity.SAE, ids []key.ID) (etsi014.Container, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	self, _ := c.SAE()
	if err := d.begin(rid, self); err != nil { // a master that is unknown has no keys
		return etsi014.Container{}, err
	}
	missing := false
	for _, id := range ids {
		k := d.keys[id]
		switch {
		case k == nil:
			missing = true
		case k.slave != self:
			return etsi014.Container{}, problem.Because(problem.Unauthorized, errors.New("the key is for somebody else"))
		case k.master != master, k.taken:
			missing = true
		}
	}
	if missing {
		return etsi014.Container{}, problem.New(problem.NotFound, "")
	}
	var got etsi014.Container
	for _, id := range ids {
		d.keys[id].taken = true
		got.Keys = append(got.Keys, etsi014.Key{ID: id, Material: key.NewMaterial(append([]byte{}, d.keys[id].secret...))})
	}
	return got, nil
}

func (d at) Refused(_ context.Context, _ identity.Caller, rid, route string, err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events[rid]++
	if rid == "" || route == "" || err == nil {
		return errors.New("a refusal without a request, a route or a reason")
	}
	return err
}

func (d at) AnswerLost(_ context.Context, _ identity.Caller, rid string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lost = append(d.lost, errors.Join(errors.New("request "+rid), err))
}
