package pki

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net/http"
	"path/filepath"
	"sync"
	"time"
)

// Renewal keeps a certificate from ending: at two thirds of its life, give or take a
// twentieth, it makes a new key and asks the CA for a certificate for it, with the old
// one. The new pair is on the disk before it is used, and used for all handshakes that
// begin after that. While the CA is away it asks again every minute, for as long as the
// certificate lasts; once that has ended, only a new token helps.
//
// The fields are set before Run and not changed after.
type Renewal struct {
	Enrolment  Enrolment // the certificate's
	Credential *Credential
	// Record, if set, is told of each renewal, and of the first failure after one.
	Record func(ctx context.Context, leaf *x509.Certificate, err error)
	Now    func() time.Time // default time.Now

	mu                sync.Mutex
	failure           error // of the last attempt; nil if it was none
	renewed, failures int64
}

const (
	renewPause   = time.Minute // between two looks at the clock, and two attempts
	renewAlarmAt = 4           // the last quarter of the life, without success
)

// Run renews the certificate whenever it is time until ctx ends.
func (r *Renewal) Run(ctx context.Context) error {
	var leaf *x509.Certificate
	var due time.Time
	for {
		if now := r.Credential.Leaf(); now != leaf { // ours, or one that Reload has found
			leaf, due = now, renewAt(now)
		}
		wait := due.Sub(r.now())
		if wait <= 0 {
			err := r.renew(ctx)
			if ctx.Err() != nil {
				return nil
			}
			r.outcome(ctx, err)
			if err == nil {
				continue
			}
			wait = retryIn(leaf.NotAfter.Sub(r.now()))
		}
		timer := time.NewTimer(min(wait, renewPause))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-r.Credential.reloaded: // it may be due already
			timer.Stop()
		}
	}
}

func (r *Renewal) now() time.Time {
	if r.Now == nil {
		return time.Now()
	}
	return r.Now()
}

// renewAt is when a certificate is to be renewed. The nodes of a site, which were
// started together, do not all ask at once.
func renewAt(leaf *x509.Certificate) time.Time {
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	jitter := time.Duration((mathrand.Float64()*2 - 1) * float64(life) / 20)
	return leaf.NotBefore.Add(life*2/3 + jitter)
}

// retryIn is the pause after a failure: what is left allows some twenty of them.
func retryIn(left time.Duration) time.Duration {
	pause := min(max(left/20, time.Second), renewPause)
	return pause*3/4 + mathrand.N(pause/2)
}

// renew makes one attempt.
func (r *Renewal) renew(ctx context.Context) error {
	e := r.Enrolment
	old := r.Credential.Leaf()
	if !r.now().Before(old.NotAfter) {
		if err := Enrol(ctx, e); err != nil {
			return err
		}
		return r.Credential.Reload()
	}
	roots, err := readCertificates(filepath.Join(e.Dir, rootFile))
	if err != nil {
		return fmt.Errorf("reading the root: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("making a key: %w", err)
	}
	chain, err := e.client().rekey(ctx, ClientTLS(r.Credential, poolOf(roots...), nil), e.ID, key)
	if err != nil {
		return fmt.Errorf("asking %s for a new certificate: %w", e.CA, err)
	}
	if err := e.check(chain, roots[0], key); err != nil {
		return fmt.Errorf("checking the new certificate: %w", err)
	}
	if got, want := chain[0].URIs[0].String(), old.URIs[0].String(); got != want {
		return fmt.Errorf("checking the new certificate: it names %s, not %s", got, want)
	}
	if err := storeCredential(e.Dir, chain, key); err != nil {
		return fmt.Errorf("storing the new certificate: %w", err)
	}
	return r.Credential.Reload()
}

// outcome notes how an attempt went.
func (r *Renewal) outcome(ctx context.Context, err error) {
	r.mu.Lock()
	before := r.failure
	r.failure = err
	if err == nil {
		r.renewed++
	} else {
		r.failures++
	}
	r.mu.Unlock()
	leaf := r.Credential.Leaf()
	log := cmp.Or(r.Enrolment.Log, slog.Default()).With("id", r.Enrolment.ID, "until", leaf.NotAfter)
	switch {
	case err == nil:
		log.Info("the certificate was renewed", "serial", leaf.SerialNumber.String())
	case before == nil || before.Error() != err.Error():
		log.Warn("the certificate could not be renewed", "err", err)
	}
	if r.Record != nil && (err == nil || before == nil) {
		r.Record(ctx, leaf, err)
	}
}

// Trouble is what an operator should know of now; "" if all is well. That the CA is
// away is, when a quarter of the certificate's life is left; that it refuses, at once:
// that heals by no waiting.
func (r *Renewal) Trouble(now time.Time) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	leaf := r.Credential.Leaf()
	end := leaf.NotAfter.UTC().Format(time.RFC3339)
	left := leaf.NotAfter.Sub(now)
	refused, _ := errors.AsType[*refusedError](r.failure)
	switch {
	case left <= 0:
		return fmt.Sprintf("this node's certificate ended at %s: it needs a new token (%v)", end, r.failure)
	case refused != nil && refused.status < http.StatusInternalServerError:
		return fmt.Sprintf("this node's certificate ends at %s, and the CA does not renew it: %v", end, r.failure)
	case r.failure != nil && left < leaf.NotAfter.Sub(leaf.NotBefore)/renewAlarmAt:
		return fmt.Sprintf("this node's certificate ends at %s and is not renewed: %v", end, r.failure)
	}
	return ""
}

// Retire has clients open new connections, with their new certificates, before the one
// that they have shown here ends: answers of its last minute close the connection when
// they are through. Without it a client that never pauses would find its certificate
// ended in the middle of a request.
func Retire(h http.Handler, now func() time.Time) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			leaf := r.TLS.PeerCertificates[0]
			last := min(time.Minute, leaf.NotAfter.Sub(leaf.NotBefore)/10)
			if leaf.NotAfter.Sub(now()) < last {
				w.Header().Set("Connection", "close") // of HTTP/2: a GOAWAY
			}
		}
		h.ServeHTTP(w, r)
	})
}
