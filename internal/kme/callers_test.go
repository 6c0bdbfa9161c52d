package kme

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

// guarded is a node with a database and the policies of core.
func (s *site) guarded() *KME {
	s.t.Helper()
	c, _ := core(s.t)
	k := s.node()
	k.Live = policies.NewCurrent(c.Policies())
	k.Policies = k.Live.Set
	return k
}

// TestSwitch: an SAE that an operator shuts out is shut out when that is answered, at
// every node that has looked since, as a caller and as the other of a pair, and until
// an operator lets it in again; both are in the audit.
func TestSwitch(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.guarded()
	alice, bob := saeID(t, "alice"), saeID(t, "bob")
	var root identity.Caller
	door := k.OperatorDoor()
	allowed := func(k *KME, caller, other identity.SAE) policies.Reason {
		return k.Policies().Decide(policies.Question{Action: policies.EncKeys, Caller: caller, Other: other, Number: 1, Bits: 256}).Reason
	}
	changed := k.Live.Changed()
	if err := door.DisableSAE(t.Context(), root, "r1", alice, "lost laptop"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody is told of the change")
	}
	if got := allowed(k, alice, bob); got != policies.DisabledSAE {
		t.Errorf("alice for bob: %s", got)
	}
	if got := allowed(k, saeID(t, "anna"), alice); got != policies.DisabledSAE {
		t.Errorf("anna for alice: %s", got)
	}
	c := k.callOf(t, "alice", audit.EncKeys)
	if err := c.atHome(); problem.KindOf(err) != problem.Unauthorized || !strings.Contains(err.Error(), "lost laptop") {
		t.Errorf("alice: %v", err)
	}

	fresh, _ := core(t)
	other := &KME{Config: Config{Store: k.Store, Now: s.now, Log: slog.New(slog.DiscardHandler)}} // a node whose memory is its own
	other.Live = policies.NewCurrent(fresh.Policies())
	other.Policies = other.Live.Set
	if got := allowed(other, alice, bob); got != policies.Permitted {
		t.Errorf("at a node that has not looked: %s", got)
	}
	if err := other.lookAtSwitches(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := allowed(other, alice, bob); got != policies.DisabledSAE {
		t.Errorf("at a node that has looked: %s", got)
	}

	saes, err := door.SAEs(t.Context(), root, "r2")
	at := slices.IndexFunc(saes, func(s admin.SAE) bool { return s.ID == "alice" })
	if err != nil || len(saes) != len(k.Policies().SAEs) || saes[at].Enabled || saes[at].Reason != "lost laptop" || !saes[at].Since.Equal(s.now()) {
		t.Errorf("SAEs: got %+v, %v", saes, err)
	}
	if err := door.DisableSAE(t.Context(), root, "r3", alice, "another reason"); err != nil { // it is off: it stays off for its first reason
		t.Fatal(err)
	}
	if why, _ := k.Policies().Disabled(alice); why != "lost laptop" {
		t.Errorf("alice is disabled for %q", why)
	}
	if err := door.DisableSAE(t.Context(), root, "r4", saeID(t, "nobody"), "x"); problem.KindOf(err) != problem.Invalid {
		t.Errorf("nobody: %v", err)
	}
	if err := door.EnableSAE(t.Context(), root, "r5", nil, alice); err != nil {
		t.Fatal(err)
	}
	if got := allowed(k, alice, bob); got != policies.Permitted {
		t.Errorf("alice for bob, let in again: %s", got)
	}
	want := []told{
		{"disable", "done", "lost laptop", 0}, {"disable", "done", "another reason", 0}, {"disable", "refused", `invalid: network.yaml has no SAE "nobody"`, 0}, {"enable", "done", "", 0},
	}
	if got := s.audit(); !slices.Equal(got, want) {
		t.Errorf("recorded %+v, want %+v", got, want)
	}
}

// TestStaleSwitches: a database that says of itself no more than that somebody is not
// switched off, as an old primary does, lets nobody in who was.
func TestStaleSwitches(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.guarded()
	look := func(proven, off bool) {
		t.Helper()
		if err := k.lookAtSwitches(t.Context()); (err == nil) != proven {
			t.Errorf("looking: %v", err)
		}
		if _, is := k.Policies().Disabled(saeID(t, "alice")); is != off {
			t.Errorf("alice is disabled: %t, want %t", is, off)
		}
	}
	look(true, false)
	if err := k.Store.SwitchOff(t.Context(), store.Switch{Principal: "sae/alice", Reason: "x", By: "root", Since: s.now()}, nil, k.own(audit.Disable)); err != nil {
		t.Fatal(err)
	}
	look(true, true)
	s.change("DELETE FROM switched_off")
	s.exec(s.name, "REVOKE EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, text) FROM PUBLIC") // by which it would show that it is no old one
	look(false, true)
	s.exec(s.name, "GRANT EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, text) TO PUBLIC")
	look(true, false)
}

// TestFileWins: what a file shuts out no switch lets in.
func TestFileWins(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.guarded()
	alice := saeID(t, "alice")
	k.Live.Replace(k.Policies().Without(map[string]string{"sae/alice": "ticket 41"})) // as if the file said so
	if err := k.OperatorDoor().EnableSAE(t.Context(), identity.Caller{}, "r1", nil, alice); err != nil {
		t.Fatal(err)
	}
	if why, off := k.Policies().Disabled(alice); !off || why != "ticket 41" {
		t.Errorf("alice: %q, %t", why, off)
	}
}

// TestReload: files that are not right change nothing and are an alarm, until some are;
// who is switched off stays so.
func TestReload(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.guarded()
	alice := saeID(t, "alice")
	if err := k.Store.SwitchOff(t.Context(), store.Switch{Principal: "sae/alice", Reason: "x", By: "root", Since: s.now()}, nil, k.own(audit.Disable)); err != nil {
		t.Fatal(err)
	}
	if err := k.lookAtSwitches(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := k.Policies()
	var next *policies.Set
	bad := errors.New("default.cedar:7:9: no")
	k.LoadPolicies = func() (*policies.Set, error) { return next, bad }
	if err := k.Reload(t.Context()); problem.KindOf(err) != problem.Invalid || !strings.Contains(err.Error(), "default.cedar:7:9") {
		t.Errorf("bad files: %v", err)
	}
	if alarms := k.Alarms(); k.Policies() != before || len(alarms) != 1 || alarms[0].Name != "policies" || !strings.Contains(alarms[0].Text, "default.cedar:7:9") {
		t.Errorf("bad files: alarms %+v", alarms)
	}
	fresh, _ := core(t)
	next, bad = fresh.Policies(), nil
	if err := k.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, off := k.Policies().Disabled(alice); k.Policies() == before || !off || len(k.Alarms()) != 0 {
		t.Errorf("good files: alice is off: %t, alarms %+v", off, k.Alarms())
	}
	var kinds []string
	for _, ev := range s.audit() {
		kinds = append(kinds, ev.Action+" "+ev.Outcome)
	}
	if want := []string{"disable done", "policies refused", "alarm failed", "policies done", "alarm done"}; !slices.Equal(kinds, want) {
		t.Errorf("recorded %q, want %q", kinds, want)
	}
}

// TestReloadOfTwo: where policies take two officers to change, those are put in force that
// both have signed for, whatever is written to the folder in between.
func TestReloadOfTwo(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.guarded()
	who, door := k.officers(t), k.OperatorDoor()
	dir := policyFiles(t, network, rules, policies.ActReload)
	k.LoadPolicies = func() (*policies.Set, error) { return policies.Load(dir) }
	if err := k.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	const node = "km1/a"
	soon := s.now().Add(10 * time.Minute)
	two := func(digest string) []approval.Approval {
		act := policies.ActReload
		if digest != "" {
			act += " " + digest
		}
		return []approval.Approval{who["olga"].sign(t, act, node, soon), who["ada"].sign(t, act, node, soon)}
	}
	rewrite := func(more string) (digest string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "default.cedar"), []byte(rules+more), 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := door.PolicyFiles(t.Context(), who["vera"].Caller, "r")
		if err != nil {
			t.Fatal(err)
		}
		return p.Digest
	}
	looked := rewrite("// what both look at\n")
	given, was := two(looked), k.Policies().Digest
	now := rewrite("// what somebody writes when one of them has signed\n")
	for why, tt := range map[string]struct {
		given  []approval.Approval
		looked string
		kind   problem.Kind
	}{
		"it approves \"reload-policies " + looked:                   {given, "", problem.Forbidden},
		"their digest is " + now + " now":                           {given, looked, problem.Invalid},
		"it approves \"reload-policies\", not":                      {two(""), "", problem.Forbidden},
		"kmectl approve --node km1/a 'reload-policies " + now + "'": {nil, "", problem.Forbidden},
	} {
		_, err := door.ReloadPolicies(t.Context(), who["ada"].Caller, "r", tt.given, admin.Policies{Digest: tt.looked})
		if problem.KindOf(err) != tt.kind || !strings.Contains(err.Error(), why) || k.Policies().Digest != was {
			t.Errorf("%s: got %v; in force is %s", why, err, k.Policies().Digest)
		}
	}
	if again := rewrite("// what both look at\n"); again != looked {
		t.Fatalf("digest %s, and then %s", looked, again)
	}
	got, err := door.ReloadPolicies(t.Context(), who["ada"].Caller, "r", given, admin.Policies{Digest: looked})
	if err != nil || got.Digest != looked || k.Policies().Digest != looked {
		t.Errorf("signed for by both: %v, %v; in force is %s", got, err, k.Policies().Digest)
	}
	if _, err := door.ReloadPolicies(t.Context(), who["ada"].Caller, "r", given, admin.Policies{}); problem.KindOf(err) != problem.Forbidden || !strings.Contains(err.Error(), "used before") {
		t.Errorf("and once more: %v", err)
	}
	if n := s.ask("SELECT count(*) FROM kme.audit WHERE body::json->>'action' = 'policies' AND body::json->>'outcome' = 'done' AND json_array_length(body::json->'approvals') = 2"); n != 1 {
		t.Errorf("%d changes of policies by two officers are recorded, want 1", n)
	}
}
