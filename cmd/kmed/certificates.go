package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/qutemail/kme/internal/failpoint"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/kme"
	"github.com/qutemail/kme/pki"
)

func (n *node) openCertificates(ctx context.Context) (err error) {
	c := n.cfg.Certificates
	enrolment := pki.Enrolment{
		CA: c.CA, RootFingerprint: c.RootFingerprint, TokenFile: c.TokenFile, Dir: c.Dir, ID: n.cfg.KME, Names: c.Names, Log: n.log,
	}
	if err := pki.Enrol(ctx, enrolment); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w (certificates.token_file names the file; kme-ca token kme %s prints what belongs into it)", err, n.cfg.KME)
	} else if err != nil {
		return err
	}
	if n.credential, err = pki.LoadCredential(c.Dir); err != nil {
		return err
	}
	n.renewal = &pki.Renewal{Enrolment: enrolment, Credential: n.credential, Now: failpoint.Now}
	if n.roots, err = pki.LoadPool(filepath.Join(c.Dir, "root.pem")); err != nil {
		return err
	}
	n.issuers, n.revoked = make(map[string]*pki.Issuers), make(map[string]*pki.Revocations)
	for _, role := range roles {
		role := string(role)
		if n.issuers[role], err = pki.LoadIssuers(c.Issuers[role]); err != nil {
			return fmt.Errorf("the issuing CA of role %s: %w", role, err)
		}
		if n.revoked[role], err = pki.OpenRevocations(ctx, pki.RevocationsConfig{
			Role: identity.Role(role), Issuers: n.issuers[role], URLs: c.CRLs[role],
			Dir: filepath.Join(n.cfg.Data, "crl"), Alarm: c.CRLAlarm, Now: failpoint.Now, Log: n.log,
		}); err != nil {
			return err
		}
	}
	return nil
}

// reloadAtHUP reads the policies again at each SIGHUP until ctx ends, and the
// certificates: this node's, those of the issuing CAs, and, for half a minute every
// second, the CRLs.
func (n *node) reloadAtHUP(ctx context.Context, core *kme.KME) error {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangups:
		}
		n.log.Info("SIGHUP: reading the policies, the certificates and the CRLs again")
		_ = core.Reload(ctx) // what is wrong is in the alarm
		if err := n.reloadCertificates(); err != nil {
			n.log.Error("what was not read again stays as it was", "err", err)
		}
	}
}

func (n *node) reloadCertificates() error {
	err := n.credential.Reload()
	for _, c := range n.devices {
		err = errors.Join(err, c.Reload())
	}
	cfg, cfgErr := LoadConfig(n.path, n.env)
	for role, revoked := range n.revoked {
		err = errors.Join(err, n.issuers[role].Reload())
		if cfgErr == nil {
			revoked.From(cfg.Certificates.CRLs[role])
		}
		revoked.Reissued()
	}
	return errors.Join(err, cfgErr)
}

// towards is the TLS configuration with which this node speaks to another KME,
// and to no other: one that could come to our doors. still says of a certificate that
// passed it once whether it would now.
func (n *node) towards(other identity.KME) (config *tls.Config, still func(leaf *x509.Certificate) error) {
	still = func(leaf *x509.Certificate) error { return n.judgePeer(other, leaf, failpoint.Now()) }
	named := pki.PeerURI(fmt.Sprintf("qkd://kme.%s/%s", n.set.TrustDomain, other))
	return pki.ClientTLS(n.credential, n.roots, func(leaf *x509.Certificate) error {
		return cmp.Or(named(leaf), n.issued("kme", leaf, failpoint.Now()), still(leaf))
	}), still
}

// judgePeer is nil if a certificate is that of another KME, which we let in.
func (n *node) judgePeer(other identity.KME, leaf *x509.Certificate, now time.Time) error {
	who, err := n.judge("kme", leaf, now)
	if err != nil {
		return fmt.Errorf("%s is not let in: %w", other, err)
	}
	if kme, _ := who.KME(); kme != other {
		return fmt.Errorf("the server is %s, not %s", who.ID(), other)
	}
	return nil
}

// officer says whose certificate it is: one that could call at the operator door now.
func (n *node) officer(leaf *x509.Certificate, now time.Time) (identity.Caller, error) {
	if err := n.issued("operator", leaf, now); err != nil {
		return identity.Caller{}, err
	}
	return n.judge("operator", leaf, now)
}

// issued is nil if the CA of a role made the certificate.
func (n *node) issued(role string, leaf *x509.Certificate, now time.Time) error {
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: n.issuers[role].Pool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return err
}

// judge says whose certificate, made by the CA of a role, it is for a door now.
func (n *node) judge(role string, leaf *x509.Certificate, now time.Time) (identity.Caller, error) {
	if err := n.revoked[role].Check(leaf, now); err != nil {
		return identity.Caller{}, err
	}
	return n.live.Set().Principals.Judge(role, leaf, now)
}
