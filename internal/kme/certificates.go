package kme

import (
	"cmp"
	"context"
	"crypto/x509"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/pki"
)

// RecordRefusals records handshakes that the doors ended before anything could be
// asked for, one event for those that are alike. Whoever summed them up offers them
// again if that fails.
func (k *KME) RecordRefusals(ctx context.Context, rs []pki.Refusal) error {
	evs := make([]audit.Event, len(rs))
	for i, r := range rs {
		reason := r.Reason
		if more := cmp.Or(r.Detail, r.Network); more != "" {
			reason += ": " + more
		}
		evs[i] = audit.Event{
			Action: audit.Handshake, Outcome: audit.Refused, Reason: reason, Route: r.Door, Count: r.Count,
			Actor: audit.Actor{
				Remote: r.Remote, Serial: r.Certificate.Serial, Issuer: r.Certificate.Issuer, Fingerprint: r.Certificate.Fingerprint,
				Subject: r.Certificate.Subject,
			},
		}
	}
	return k.Store.Record(ctx, evs...)
}

// RecordRenewal records that this node's own certificate was renewed, or why it could
// not be. leaf is the one in use now.
func (k *KME) RecordRenewal(ctx context.Context, leaf *x509.Certificate, err error) {
	ev := k.own(audit.Certificate)
	ev.Reason = "serial " + leaf.SerialNumber.String() + " until " + leaf.NotAfter.UTC().Format(time.RFC3339)
	if err != nil {
		ev.Outcome, ev.Reason = audit.Failed, err.Error()
	}
	k.note(ctx, ev)
}
