package kme

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

// switchEvery is how often a node looks at who was switched off at another: within a
// second it counts everywhere.
const switchEvery = 400 * time.Millisecond

// lookAtSwitches puts in force what the database says of who is switched off. While
// it does not answer, what was read last counts. A cheap look may see the past, after a
// failover: whoever would be let in by it is asked about again, for sure.
func (k *KME) lookAtSwitches(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	k.switches.Lock() // of two answers, the later one counts
	defer k.switches.Unlock()
	list, err := k.Store.SwitchedOff(ctx)
	if err != nil {
		return err
	}
	off := reasons(list)
	lets := k.off == nil // at the first look: everybody
	for principal, why := range k.off {
		if _, still := off[principal]; !still {
			lets, off[principal] = true, why
		}
	}
	if lets {
		if list, err = k.Store.SurelySwitchedOff(ctx); err == nil {
			off = reasons(list)
		} else if k.off == nil {
			return err
		}
	}
	k.off = off
	k.Live.SwitchOff(off)
	return err
}

// reasons are why callers are switched off, by principal.
func reasons(list []store.Switch) map[string]string {
	off := make(map[string]string, len(list))
	for _, s := range list {
		off[s.Principal] = s.Reason
	}
	return off
}

// Reload puts the files of policies in force as they are now. If anything is wrong with
// them the old ones stay, and an alarm says so until files are loaded that are right.
func (k *KME) Reload(ctx context.Context) error {
	ev := k.own(audit.Policies)
	_, err := k.reload(ctx, &ev, func(*policies.Set) error { return nil })
	return err
}

// reload reads the files once, and puts in force what may was shown of them. What may
// refuses it has recorded; ev is the event of everything else.
func (k *KME) reload(ctx context.Context, ev *audit.Event, may func(*policies.Set) error) (*policies.Set, error) {
	k.reloading.Lock()
	defer k.reloading.Unlock()
	set, err := k.LoadPolicies()
	if err != nil {
		ev.Outcome, ev.Reason = audit.Refused, err.Error()
		k.note(ctx, *ev)
		k.raise(ctx, "policies", fmt.Sprintf("the files of policies are not right, and what was in force stays so: %v", err))
		return nil, &problem.Error{Kind: problem.Invalid, Detail: fmt.Sprintf("the policies stay what they were: %v", err), Err: err}
	}
	if err := may(set); err != nil {
		return nil, err
	}
	ev.Reason = "digest " + set.Digest + ", before " + k.Policies().Digest
	ev.Outcome = audit.Done
	if err := k.Store.Record(ctx, *ev); err != nil { // no change without its record
		return nil, fmt.Errorf("recording that policies change: %w", err)
	}
	k.Live.Replace(set)
	k.clear(ctx, "policies")
	k.Log.Info("policies loaded", "digest", set.Digest)
	return set, nil
}

// SAEs lists the SAEs of the network.
func (d OperatorDoor) SAEs(ctx context.Context, _ identity.Caller, _ string) ([]admin.SAE, error) {
	off, err := d.k.Store.SwitchedOff(ctx)
	if err != nil {
		return nil, problem.Because(problem.Unavailable, err)
	}
	set := d.k.Policies()
	list := make([]admin.SAE, 0, len(set.SAEs))
	for sae, entry := range set.SAEs {
		why, disabled := set.Disabled(sae)
		s := admin.SAE{ID: sae.String(), Enabled: !disabled, Reason: why}
		for _, home := range entry.Homes {
			s.Homes = append(s.Homes, home.String())
		}
		for _, o := range off {
			if o.Principal == identity.PrincipalKey(identity.RoleSAE, s.ID) {
				s.By, s.Since = o.By, o.Since
			}
		}
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b admin.SAE) int { return strings.Compare(a.ID, b.ID) })
	return list, nil
}

// DisableSAE shuts an SAE out.
func (d OperatorDoor) DisableSAE(ctx context.Context, c identity.Caller, rid string, sae identity.SAE, reason string) error {
	return d.turn(ctx, c, rid, nil, audit.Disable, sae, reason, func(ctx context.Context, call *call, ev audit.Event) error {
		return d.k.Store.SwitchOff(ctx, store.Switch{
			Principal: identity.PrincipalKey(identity.RoleSAE, sae.String()), Reason: reason, By: c.ID(), Since: d.k.Now(),
		}, call.late, ev)
	})
}

// EnableSAE takes that back.
func (d OperatorDoor) EnableSAE(ctx context.Context, c identity.Caller, rid string, given []approval.Approval, sae identity.SAE) error {
	return d.turn(ctx, c, rid, given, audit.Enable, sae, "", func(ctx context.Context, call *call, ev audit.Event) error {
		return d.k.Store.SwitchOn(ctx, identity.PrincipalKey(identity.RoleSAE, sae.String()), call.late, ev)
	})
}

// turn switches an SAE, and puts that in force here before it returns.
func (d OperatorDoor) turn(
	ctx context.Context, c identity.Caller, rid string, given []approval.Approval, a audit.Action, sae identity.SAE, reason string,
	act func(context.Context, *call, audit.Event) error,
) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	call := d.k.begin(c, rid, a, sae)
	call.ev.Reason = reason
	if _, known := d.k.Policies().SAEs[sae]; !known {
		return call.refuse(ctx, problem.New(problem.Invalid, "network.yaml has no SAE %q", sae))
	}
	if a == audit.Enable {
		if err := call.asSiteWants(ctx, c, given, policies.ActEnableSAE, sae.String()); err != nil {
			return call.refuse(ctx, err)
		}
	}
	done := call.ev
	done.Outcome = audit.Done
	if err := act(ctx, call, done); err != nil {
		call.pending = errors.Is(err, store.ErrDoubt)
		return call.refuse(ctx, err)
	}
	if err := d.k.lookAtSwitches(ctx); err != nil {
		d.k.Log.Warn("looking at who is switched off", "err", err) // soon again
	}
	return nil
}

// PolicyFiles reads the files of policies, and puts none in force.
func (d OperatorDoor) PolicyFiles(context.Context, identity.Caller, string) (admin.Policies, error) {
	set, err := d.k.LoadPolicies()
	if err != nil {
		return admin.Policies{}, &problem.Error{Kind: problem.Invalid, Detail: fmt.Sprintf("the files of policies are not right: %v", err), Err: err}
	}
	return admin.Policies{Digest: set.Digest}, nil
}

// ReloadPolicies puts the files of policies in force. Officers sign for files by their
// digest: what is put in force is what both have looked at, whoever writes to the folder
// between the one's word and the other's.
func (d OperatorDoor) ReloadPolicies(ctx context.Context, c identity.Caller, rid string, given []approval.Approval, looked admin.Policies) (admin.Policies, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	call := d.k.begin(c, rid, audit.Policies, identity.SAE{})
	set, err := d.k.reload(ctx, &call.ev, func(set *policies.Set) error {
		if looked.Digest != "" && looked.Digest != set.Digest {
			return call.refuse(ctx, problem.New(problem.Invalid, "the files of policies have changed since they were looked at: their digest is %s now", set.Digest))
		}
		if err := call.asSiteWants(ctx, c, given, policies.ActReload, set.Digest); err != nil {
			return call.refuse(ctx, err)
		}
		return nil
	})
	if err != nil {
		return admin.Policies{}, err
	}
	return admin.Policies{Digest: set.Digest}, nil
}
