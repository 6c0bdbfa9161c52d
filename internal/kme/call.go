package kme

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

// requestTime bounds a request from the moment it is judged, whatever its client does.
const requestTime = 5 * time.Second

// call is one request of an SAE on its way to exactly one outcome event.
type call struct {
	k       *KME
	sae     identity.SAE
	session identity.Session
	ev      audit.Event
	pending bool          // its outcome event is part of a commit under way: see late
	missed  chan struct{} // closed when that was counted
}

// begin starts the record of a request.
func (k *KME) begin(c identity.Caller, rid string, a audit.Action, other identity.SAE) *call {
	sae, _ := c.SAE()
	cert := c.Certificate()
	return &call{k: k, sae: sae, session: c.Session(), missed: make(chan struct{}), ev: audit.Event{
		Action: a, Request: rid, Route: c.Route(), Peer: other.String(),
		Actor: audit.Actor{
			Role: string(c.Role()), ID: c.ID(), Gateway: c.Gateway(), Rule: c.Rule(), Remote: c.Remote(),
			Serial: cert.Serial, Issuer: cert.Issuer, Fingerprint: cert.Fingerprint, Subject: cert.Subject, TLS: c.Session().TLS,
		},
	}}
}

// spender is whose bucket the call takes from.
func (c *call) spender() any {
	if c.sae == (identity.SAE{}) {
		return c.ev.Actor.ID // a gateway that speaks for none of its SAEs
	}
	return c.sae
}

// atHome is nil if the caller is an SAE that is served here.
func (c *call) atHome() error {
	why, off := c.k.Policies().Disabled(c.sae)
	switch {
	case c.sae == identity.SAE{}:
		return problem.Because(problem.Unauthorized, errors.New("the certificate names no SAE"))
	case !c.k.Policies().Homed(c.sae, c.k.Self):
		return problem.Because(problem.Unauthorized, fmt.Errorf("SAE %s is not homed at %s", c.sae, c.k.Self))
	case off: // its own certificate would have ended at the door: a gateway's has not
		return problem.Because(problem.Unauthorized, fmt.Errorf("SAE %s is disabled: %s", c.sae, why))
	}
	return nil
}

// judge decides whether the caller may do this with each of the others, here, and
// finds the ways to them, the best first. An unknown SAE and a forbidden one look alike;
// only who may ask is told that there is no way.
func (c *call) judge(others []identity.SAE, number, bits int) ([]way, error) {
	defer since(c.k.metrics.policy, time.Now())
	if err := c.atHome(); err != nil {
		return nil, err
	}
	ways, none := c.k.route(others...)
	if none == nil {
		return c.allowed(ways, others, number, bits)
	}
	for _, other := range others { // each is judged as if it were alone
		alone, err := c.k.route(other)
		if err != nil {
			alone = []way{{}}
		}
		if _, err := c.allowed(alone, []identity.SAE{other}, number, bits); err != nil {
			return nil, err
		}
	}
	return nil, none
}

// allowed are those of ways on which policy lets the caller do this with each of the
// others: it may ask about the link. The error is why it does not on the best of them.
func (c *call) allowed(ways []way, others []identity.SAE, number, bits int) ([]way, error) {
	set := c.k.Policies()
	allowed := make([]way, 0, len(ways))
	var denied error
	var by []string // policies that deny it
	for _, w := range ways {
		if err := c.decide(set, &w, others, number, bits, w.provenance()); err != nil {
			denied, by = cmp.Or(denied, err), union(by, w.policies)
			continue
		}
		allowed = append(allowed, w)
	}
	if len(allowed) == 0 {
		c.ev.Policy = union(c.ev.Policy, by)
		return nil, denied
	}
	c.ev.Policy = union(c.ev.Policy, allowed[0].policies)
	return allowed, nil
}

// decide asks the policies about keys of a provenance on a way, for each of the others.
func (c *call) decide(set *policies.Set, w *way, others []identity.SAE, number, bits int, p key.Provenance) error {
	for _, other := range others {
		if err := c.decideOne(set, w, other, number, bits, p); err != nil {
			return err
		}
	}
	return nil
}

func (c *call) decideOne(set *policies.Set, w *way, other identity.SAE, number, bits int, p key.Provenance) error {
	q := policies.Question{
		Action: string(c.ev.Action), Caller: c.sae, Other: other, Number: number, Bits: bits,
		Provenance: p, SameKME: slices.Contains(w.here, other),
	}
	if w.link != nil && !q.SameKME {
		q.Link = w.link.ID
	}
	d := set.Decide(c.asked(q))
	w.policies = union(w.policies, d.Policies)
	if !d.Allow {
		return problem.Because(problem.Unauthorized, fmt.Errorf("policy (%s) does not let %s do %s with %s", d.Reason, c.sae, c.ev.Action, other))
	}
	return nil
}

// fit is nil if an order may have atoms that are lent for it. The pool may hold what came
// before the link was another's: then policy, which was asked about the link's keys, is
// asked about these.
func (c *call) fit(lends []lent, o order, w *way) error {
	judged := w.provenance()
	for _, a := range lends {
		p := a.from.Provenance
		if err := o.met(p); err != nil {
			return err
		}
		if p == judged {
			continue
		}
		if err := c.decide(c.k.Policies(), w, o.slaves, o.number, o.bits, p); err != nil {
			return err
		}
		judged = p
	}
	return nil
}

// asked is q as this call asks it: now, over its connection.
func (c *call) asked(q policies.Question) policies.Question {
	q.Time, q.Group = c.k.Now(), c.session.Group
	if !c.session.Since.IsZero() {
		q.Age = max(0, q.Time.Sub(c.session.Since))
	}
	return q
}

// union is the policies of two decisions, sorted, each once.
func union(a, b []string) []string {
	if len(a) == 0 {
		return b
	}
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

// refuse records that the request ended badly and returns what the door answers.
// A refusal that cannot be recorded is counted for the summary that follows when
// it can be again, and answered as unavailable: no answer without its record.
func (c *call) refuse(ctx context.Context, err error) error {
	if c.pending {
		c.miss(store.ErrDoubt)
		return c.k.classify(err)
	}
	var p *problem.Error
	if !errors.As(err, &p) {
		p = c.k.classify(err)
	}
	if errors.Is(p, errExcess) {
		c.k.tire(ctx, c.spender())
	}
	c.ev.Outcome, c.ev.Reason = audit.Refused, problem.Brief(p)
	if p.Kind == problem.Unavailable || p.Kind == problem.Internal {
		c.ev.Outcome = audit.Failed
	}
	return c.k.recordOrCount(ctx, p, c.ev)
}

// recordTime is how long the record of a 503 may take, before it is counted instead.
const recordTime = 2 * time.Second

// recordOrCount writes the outcome event of a refused request and returns p, or
// the 503 that stands for it while the database is away or too many events wait.
func (k *KME) recordOrCount(ctx context.Context, p *problem.Error, ev audit.Event) error {
	patience := requestTime
	if p.Kind == problem.Unavailable { // it may have waited for long already, and learns nothing by waiting on
		patience = recordTime
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	counted := make(chan struct{})
	defer close(counted)
	err := k.Store.RecordLate(ctx, func(committed bool) {
		<-counted
		k.outage.learn(committed)
	}, ev)
	if err == nil {
		return p
	}
	k.miss(err)
	return &problem.Error{Kind: problem.Unavailable, RetryAfter: time.Second, Err: fmt.Errorf("recording a refusal (%w): %w", p, err)}
}

// miss counts a call whose outcome event could not be recorded, or is in doubt.
func (c *call) miss(err error) {
	c.k.miss(err)
	close(c.missed)
}

// late records what became of a commit that the caller was told 503 about, because
// it took too long: if it went through, its event says that the keys were handed
// out, and this one that the answer was lost. Until then the call is counted, for the
// summary of the next process if this one dies.
func (c *call) late(committed bool) {
	<-c.missed
	ev := c.ev
	ev.Outcome = audit.Failed
	told := true
	if committed {
		ev.Action, ev.Reason = audit.Lost, "committed after the caller was told 503"
		told = c.k.note(context.Background(), ev)
	} else {
		ev.Reason = "not committed in time"
		_ = c.k.recordOrCount(context.Background(), problem.New(problem.Unavailable, "not committed in time"), ev) // nobody waits any more
	}
	c.k.outage.learn(told)
}

// classify says what a failure of an organ means to a caller.
func (k *KME) classify(err error) *problem.Error {
	switch {
	case errors.Is(err, hsm.ErrTampered):
		return problem.Because(problem.Unavailable, err)
	case errors.Is(err, store.ErrShort), errors.Is(err, store.ErrExpired), errors.Is(err, hsm.ErrNoKEK): // burned, or of an epoch that ended, while the request was under way
		return &problem.Error{Kind: problem.Unavailable, RetryAfter: time.Second, Err: err}
	case errors.Is(err, hsm.ErrUnavailable), errors.Is(err, store.ErrUnavailable), errors.Is(err, store.ErrDropped),
		errors.Is(err, store.ErrDoubt), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return &problem.Error{Kind: problem.Unavailable, RetryAfter: time.Second, Err: err}
	}
	return problem.Because(problem.Internal, err)
}

// unavailable is a 503 with a sentence for the caller and the cause for the operator.
func unavailable(retry time.Duration, detail string, cause error) *problem.Error {
	return &problem.Error{Kind: problem.Unavailable, Detail: detail, RetryAfter: retry, Err: cause}
}

// able is nil when this node can hand out keys at all.
func (k *KME) able() *problem.Error {
	if err := k.serving(); err != nil {
		return err
	}
	if err := k.trailWell(); err != nil {
		return err
	}
	if err := k.hsmWell(); err != nil {
		return unavailable(time.Second, "the key store is not available", fmt.Errorf("HSM: %w", err))
	}
	if err := k.Store.Healthy(); err != nil {
		return unavailable(time.Second, "the key store is not available", fmt.Errorf("database: %w", err))
	}
	return nil
}
