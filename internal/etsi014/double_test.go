package etsi014_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"sync"
	"time"

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
	spent  error // what Admit says
}

type held struct {
	master identity.SAE
	secret []byte
	due    map[place]bool // where it waits for whom; false once it is taken
}

// place is where an SAE takes a key.
type place struct {
	kme string
	sae identity.SAE
}

// at is the double as one of its KMEs.
type at struct {
	*double
	kme string
}

// homes are the SAEs that the double knows, and friends those of whom each two may
// share keys: as in the policies that the lab runs the vectors with.
var (
	homes = map[string][]string{
		"alice": {"km1"}, "dave": {"km1"}, "bob": {"km2"}, "erin": {"km2"}, "carol": {"km2"},
		"alice@qutemail.example": {"km1", "km2"}, "bob@qutemail.example": {"km1", "km2"},
	}
	friends = [][]string{
		{"alice", "bob", "dave", "erin"}, {"alice", "carol"}, {"bob", "carol"}, {"alice@qutemail.example", "bob@qutemail.example"},
	}
)

// home is where d's keys for an SAE wait.
func (d at) home(sae identity.SAE) string {
	for _, home := range homes[sae.String()] {
		if home != d.kme {
			return home
		}
	}
	return d.kme
}

func newDouble() *double {
	return &double{pool: 100_000, keys: make(map[key.ID]*held), events: make(map[string]int)}
}

var errForbidden = problem.Because(problem.Unauthorized, errors.New("the double knows no such pair"))

// begin counts the outcome event that the core would record, and judges the caller
// and whom it shares keys with.
func (d at) begin(rid string, c identity.Caller, others ...identity.SAE) error {
	d.events[rid]++
	if c.Route() == "" {
		return errors.New("a caller without a route")
	}
	if d.fault != nil {
		return d.fault
	}
	if !slices.Contains(homes[c.ID()], d.kme) {
		return errForbidden
	}
	for _, other := range others {
		if !slices.ContainsFunc(friends, func(all []string) bool { return slices.Contains(all, c.ID()) && slices.Contains(all, other.String()) }) {
			return errForbidden
		}
	}
	return nil
}

func (d at) Limits() etsi014.Limits {
	return etsi014.Limits{KeySize: 256, MinSize: 64, MaxSize: 4096, MaxPerRequest: 128, MaxSAEs: 32, MaxTTL: 24 * time.Hour, Strict: d.kme == "km2"}
}

func (d at) Admit(identity.Caller) error { return d.spent }

func (d at) Status(_ context.Context, c identity.Caller, rid string, slave identity.SAE) (etsi014.Status, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(rid, c, slave); err != nil {
		return etsi014.Status{}, err
	}
	target := d.home(slave)
	l := d.Limits()
	return etsi014.Status{
		SourceKME: d.kme, TargetKME: target, Master: c.ID(), Slave: slave.String(), Stored: d.pool, Max: 1_000_000,
		KeySize: l.KeySize, MinSize: l.MinSize, MaxSize: l.MaxSize, MaxPerRequest: l.MaxPerRequest, MaxSAEs: l.MaxSAEs,
	}, nil
}

func (d at) EncKeys(_ context.Context, c identity.Caller, rid string, slave identity.SAE, r etsi014.KeyRequest) (etsi014.Container, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	slaves := append([]identity.SAE{slave}, r.AdditionalSlaves...)
	if err := d.begin(rid, c, slaves...); err != nil {
		return etsi014.Container{}, err
	}
	provenance, atoms := key.LocalRNG, 0
	if slices.ContainsFunc(slaves, func(s identity.SAE) bool { return d.home(s) != d.kme }) {
		provenance, atoms = key.Simulated, r.Number*((r.Bits+255)/256)
	}
	if r.Provenance != "" && r.Provenance != provenance {
		return etsi014.Container{}, etsi014.Unmet(errors.New("the double has none"))
	}
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
		d.keys[id] = &held{master: master, secret: secret, due: make(map[place]bool)}
		for _, s := range slaves {
			d.keys[id].due[place{d.home(s), s}] = true
		}
		got.Keys = append(got.Keys, etsi014.Key{ID: id, Material: key.NewMaterial(bytes.Clone(secret)), Provenance: provenance})
	}
	return got, nil
}

func (d at) DecKeys(_ context.Context, c identity.Caller, rid string, master identity.SAE, ids []key.ID) (etsi014.Container, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(rid, c); err != nil { // a master that is unknown has no keys
		return etsi014.Container{}, err
	}
	self, _ := c.SAE()
	missing := false
	for _, id := range ids {
		var waits, named, here bool
		if k := d.keys[id]; k != nil {
			waits, named = k.due[place{d.kme, self}]
			waits = waits && k.master == master
			for p := range k.due {
				here = here || p.kme == d.kme
			}
		}
		if here && !named {
			return etsi014.Container{}, problem.Because(problem.Unauthorized, errors.New("the key is for somebody else"))
		}
		missing = missing || !waits
	}
	if missing {
		return etsi014.Container{}, problem.New(problem.NotFound, "")
	}
	var got etsi014.Container
	for _, id := range ids {
		d.keys[id].due[place{d.kme, self}] = false
		got.Keys = append(got.Keys, etsi014.Key{ID: id, Material: key.NewMaterial(bytes.Clone(d.keys[id].secret))})
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
