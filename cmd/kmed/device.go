package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"path/filepath"
	"time"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/pki"
)

// device is what stands beside this end of a link and hands out keys by ETSI GS QKD 014. To
// it this KME is an SAE. It implements qlink.Device.
type device struct {
	client *etsi014.Client
	other  identity.SAE // that the other end of the link is to its device
}

// deviceTime is how long a device may take to answer.
const deviceTime = 10 * time.Second

func (n *node) device(c UpstreamConfig) (*device, error) {
	other, err := identity.ParseSAE(c.Peer)
	if err != nil {
		return nil, err
	}
	credential, err := pki.LoadCredential(c.TLS)
	if err != nil {
		return nil, err
	}
	roots, err := pki.LoadPool(filepath.Join(c.TLS, "root.pem"))
	if err != nil {
		return nil, err
	}
	n.devices = append(n.devices, credential)
	config := pki.ClientTLS(credential, roots, nil)
	config.MinVersion = tls.VersionTLS12 // many devices speak nothing later
	hc := &http.Client{Timeout: deviceTime, Transport: &http.Transport{TLSClientConfig: config, IdleConnTimeout: time.Minute}}
	return &device{etsi014.NewClient(c.URL[0], hc, c.URL[1:]...), other}, nil
}

// Draw has the device hand out new keys.
func (d *device) Draw(ctx context.Context, n int) (names []key.ID, bits []byte, from key.Provenance, err error) {
	got, err := d.client.EncKeys(ctx, d.other, etsi014.KeyRequest{Number: n, Bits: key.AtomBits})
	if err != nil {
		return nil, nil, "", err
	}
	for _, k := range got.Keys {
		names = append(names, k.ID)
	}
	bits, from, err = d.open(got)
	return names, bits, from, err
}

// Find has the device hand out the keys of those names.
func (d *device) Find(ctx context.Context, names []key.ID) ([]byte, key.Provenance, error) {
	got, err := d.client.DecKeys(ctx, d.other, names)
	if err != nil {
		return nil, "", err
	}
	return d.open(got)
}

// open returns the bytes of the keys, one after another, and wipes the container. If the
// device is another KME it says where its keys are from: those that no link has made are
// refused, and those of a simulated one are simulated here too.
func (d *device) open(got etsi014.Container) ([]byte, key.Provenance, error) {
	defer got.Wipe()
	bits, from := make([]byte, 0, len(got.Keys)*key.AtomBytes), key.Upstream
	for _, k := range got.Keys {
		var err error
		switch {
		case k.Material.Bits() != key.AtomBits:
			err = fmt.Errorf("the device has handed out a key of %d bits, and %d were asked for", k.Material.Bits(), key.AtomBits)
		case k.Provenance == key.LocalRNG:
			err = fmt.Errorf("the device says that it has made key %s by itself: it is of no link", k.ID)
		case k.Provenance == key.Simulated:
			from = key.Simulated
		}
		if err != nil {
			clear(bits)
			return nil, "", err
		}
		bits = append(bits, k.Material.Reveal()...)
	}
	return bits, from, nil
}
