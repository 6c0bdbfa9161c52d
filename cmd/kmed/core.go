package main

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/kme"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/release"
	"github.com/qutemail/kme/internal/secretfile"
	"github.com/qutemail/kme/internal/siem"
	"github.com/qutemail/kme/pki"
	"github.com/qutemail/kme/policies"
)

// core makes the KME with its peers and links.
func (n *node) core() (*kme.KME, error) {
	trail, err := n.trail()
	if err != nil {
		return nil, err
	}
	cfg := kme.Config{
		Self: n.self, Node: n.cfg.Node, Store: n.db, Token: n.token, Log: n.log, Now: failpoint.Now,
		Live: n.live, LoadPolicies: n.reload, Officer: n.officer,
		Peers:       make(map[identity.KME]*peer.Client),
		DataDir:     n.cfg.Data,
		Examine:     func() []admin.Finding { return n.examine(failpoint.Now()) },
		EpochLength: n.cfg.Epoch, MaxWraps: int64(n.cfg.MaxWraps), DefaultTTL: n.cfg.TTL, MaxTTL: n.cfg.MaxTTL, PoolTTL: n.cfg.PoolTTL,
		PoolLimit: n.cfg.PoolLimit, Production: n.cfg.Production, Strict: n.cfg.Strict, ReadOnce: n.cfg.Legacy.Reread == once,
		Trail: trail,
		Quota: kme.Quota{Rate: float64(n.cfg.Limits.AtomsPerSecond), Burst: n.cfg.Limits.Burst, Untaken: n.cfg.Limits.Untaken},
	}
	cfg.Watched = append(cfg.Watched, kme.Watched{Alarm: "certificate", Trouble: n.renewal.Trouble})
	for _, role := range roles {
		cfg.Watched = append(cfg.Watched, kme.Watched{Alarm: "crl-" + string(role), Trouble: n.revoked[string(role)].Trouble})
	}
	for _, lc := range n.cfg.Links {
		link, err := n.link(lc)
		if err != nil {
			return nil, err
		}
		cfg.Links = append(cfg.Links, link)
		if cfg.Peers[link.Peer] != nil {
			continue // another link leads there too
		}
		tls, still := n.towards(link.Peer)
		cfg.Peers[link.Peer], err = peer.NewClient(peer.ClientConfig{Addresses: n.doorsOf(link.Peer, assignDoor), TLS: tls, Still: still, Log: n.log})
		if err != nil {
			return nil, fmt.Errorf("link %s: %w", lc.ID, err)
		}
	}
	return kme.New(cfg)
}

// trail is how the audit log is kept. What stands in the configuration was checked.
func (n *node) trail() (kme.Trail, error) {
	c := n.cfg.Audit
	t := kme.Trail{
		Reader: n.reader, Keep: c.Keep, Archive: c.Archive, TrustDomain: n.set.TrustDomain, Sequencer: c.Sequencer, ForkAlarmOnly: c.Fork == forkAlarm,
		Facts:    audit.Facts{Build: release.Version() + " " + runtime.Version(), Config: hex.EncodeToString(n.cfg.digest[:])},
		PeerKeys: make(map[identity.KME]string),
	}
	for id, key := range c.PeerKeys {
		if kme, err := identity.ParseKME(id); err == nil {
			t.PeerKeys[kme] = key
		}
	}
	for _, w := range c.Witnesses {
		if key, err := audit.NewWitness(w.Key); err == nil {
			t.Witnesses = append(t.Witnesses, kme.OtherWitness{URL: w.URL, Key: key})
		}
	}
	for _, s := range c.Sinks {
		framed := s.Format == "syslog" && !strings.HasPrefix(s.To, "file:")
		sink := siem.Config{Name: s.Name, Format: siem.Formats[s.Format], To: s.To, Framed: framed, Every: time.Second, Log: n.log}
		if s.CA != "" {
			roots, err := pki.LoadPool(s.CA)
			if err != nil {
				return t, fmt.Errorf("audit sink %s: %w", s.Name, err)
			}
			sink.TLS = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
		}
		t.Sinks = append(t.Sinks, sink)
	}
	return t, nil
}

func assignDoor(n policies.NodeEntry) string    { return n.Assign }
func classicalDoor(n policies.NodeEntry) string { return n.Classical }

// doorsOf are the addresses of a door at the nodes of another KME. Our first node
// turns to their first, our second to their second, and so on, so that the work is
// shared; the others follow in order.
func (n *node) doorsOf(other identity.KME, door func(policies.NodeEntry) string) []string {
	mine := slices.Index(n.set.KMEs[n.self].Nodes, n.entry)
	theirs := n.set.KMEs[other].Nodes
	addresses := make([]string, len(theirs))
	for i := range theirs {
		addresses[i] = door(theirs[(mine+i)%len(theirs)])
	}
	return addresses
}

// link joins what network.yaml says of a link with what lies at this end of it.
func (n *node) link(lc LinkConfig) (kme.LinkConfig, error) {
	for _, l := range n.set.Links {
		if l.ID != lc.ID {
			continue
		}
		plan := qlink.StandardPlan()
		plan.KeyBits = lc.KeyBits
		profile, err := plan.Profile(bb84.Standard())
		if err != nil {
			return kme.LinkConfig{}, fmt.Errorf("link %s: %w", lc.ID, err)
		}
		c := kme.LinkConfig{
			ID: lc.ID, TTL: l.TTL, PoolTTL: l.PoolTTL, Profile: profile, Provenance: key.Simulated, Interval: lc.Interval, InFlight: lc.InFlight, Random: mixed{n.token}, Filler: lc.Filler, Secret: n.linkSecret(lc),
		}
		switch n.self {
		case l.Alice:
			c.End, c.Peer = handover.Alice, l.Bob
			c.Dial = func(ctx context.Context) (*peer.Stream, error) {
				tls, still := n.towards(l.Bob)
				return peer.DialClassical(ctx, n.doorsOf(l.Bob, classicalDoor), tls, still)
			}
		case l.Bob:
			c.End, c.Peer = handover.Bob, l.Alice
		default:
			return c, fmt.Errorf("link %s of %s joins %s and %s, not %s", lc.ID, n.network(), l.Alice, l.Bob, n.self)
		}
		if len(lc.Upstream.URL) > 0 {
			d, err := n.device(lc.Upstream)
			if err != nil {
				return c, fmt.Errorf("link %s: upstream: %w", lc.ID, err)
			}
			c.Device, c.DeviceKeys, c.Provenance = d, lc.Upstream.Keys, key.Upstream
			return c, nil
		}
		c.Box = func(ctx context.Context) (*qlink.Box, error) {
			return qlink.OpenBox(ctx, lc.Socket, lc.SecretFile, c.End)
		}
		return c, nil
	}
	return kme.LinkConfig{}, fmt.Errorf("link %s is not among the links of %s", lc.ID, n.network())
}

// maxLinkSecret is far above what a link's secret may want to have, in bytes.
const maxLinkSecret = 1 << 16

// linkSecret is how the secret of a link is read: from its file, or from the token. Either
// way only when the link needs it.
func (n *node) linkSecret(lc LinkConfig) func(context.Context) ([]byte, error) {
	if !lc.AuthInHSM {
		return func(context.Context) ([]byte, error) {
			secret, err := secretfile.Source{File: lc.AuthFile}.Read(maxLinkSecret)
			if err != nil {
				return nil, fmt.Errorf("reading the link's secret: %w", err)
			}
			return secret, nil
		}
	}
	return func(ctx context.Context) ([]byte, error) {
		secret, err := n.token.AuthSecret(ctx, lc.ID)
		if errors.Is(err, hsm.ErrNoAuthSecret) {
			err = fmt.Errorf("%w: kmed hsm auth-secret makes one, or imports that of the other end", err)
		}
		return secret, err
	}
}

// reload reads the policies anew. What a node builds on when it starts can only be
// changed by a restart.
func (n *node) reload() (*policies.Set, error) {
	set, err := policies.Load(n.cfg.Policies)
	if err != nil {
		return nil, err
	}
	entry, ok := set.KMEs[n.self].Node(n.cfg.Node)
	switch {
	case !ok || entry != n.entry:
		return nil, fmt.Errorf("%s: node %s of KME %s is not what it was: that takes a restart", n.network(), n.cfg.Node, n.self)
	case set.TrustDomain != n.set.TrustDomain:
		return nil, fmt.Errorf("%s: another trust_domain takes a restart", n.network())
	}
	for _, l := range n.set.Links {
		if (l.Alice == n.self || l.Bob == n.self) && !slices.Contains(set.Links, l) {
			return nil, fmt.Errorf("%s: link %s is not what it was: that takes a restart", n.network(), l.ID)
		}
	}
	for _, lc := range n.cfg.Links {
		for _, l := range n.set.Links {
			peer := l.Alice
			if peer == n.self {
				peer = l.Bob
			}
			if l.ID == lc.ID && !slices.Equal(set.KMEs[peer].Nodes, n.set.KMEs[peer].Nodes) {
				return nil, fmt.Errorf("%s: other nodes of KME %s take a restart", n.network(), peer)
			}
		}
	}
	return set, nil
}

// mixed is the source of seeds and public choices: the machine's generator XOR the
// HSM's, so that neither alone decides. It fails when the HSM does.
type mixed struct{ token *hsm.Token }

func (m mixed) Read(b []byte) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := m.token.Random(ctx, b); err != nil {
		return 0, err
	}
	own := make([]byte, len(b))
	_, _ = rand.Read(own) // never fails: it ends the process instead
	subtle.XORBytes(b, b, own)
	clear(own)
	return len(b), nil
}
