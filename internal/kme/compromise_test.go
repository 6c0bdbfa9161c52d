package kme

import (
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/problem"
)

// TestCompromiseTakesTwo: keys are burned at the word of two security officers for just
// these keys, and of nobody else; until then nothing has changed. The audit has what both
// of them signed.
func TestCompromiseTakesTwo(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.guarded()
	k.EpochLength = time.Hour
	who := k.officers(t)
	now := s.now() // half past twelve
	soon := now.Add(10 * time.Minute)
	two := func(act string) []approval.Approval {
		return []approval.Approval{who["olga"].sign(t, act, "km1/a", soon), who["ada"].sign(t, act, "km1/a", soon)}
	}
	burn := func(caller string, of admin.Suspicion, given []approval.Approval) (admin.Compromised, error) {
		return k.OperatorDoor().Compromise(t.Context(), who[caller].Caller, "r", given, of)
	}
	const since, until = "2026-03-01T10:00:00Z", "2026-03-01T12:00:00Z"
	yet := admin.Suspicion{Since: now.Add(-125 * time.Minute)} // 10:25
	past := admin.Suspicion{Since: yet.Since, Until: now.Add(-time.Hour)}

	for name, tt := range map[string]struct {
		caller string
		of     admin.Suspicion
		given  []approval.Approval
		why    string
	}{
		"one officer":          {"ada", yet, nil, "let another one say kmectl approve --node km1/a 'compromise-keys " + since + " now'"},
		"one officer, of then": {"ada", past, nil, "'compromise-keys " + since + " " + until + "'"},
		"one officer, twice":   {"ada", yet, []approval.Approval{two("compromise-keys " + since + " now")[1], two("compromise-keys " + since + " now")[1]}, "both are of ada"},
		"no officer":           {"vera", yet, two("compromise-keys " + since + " now"), "has not the duty security-officer"},
		"signed for less":      {"ada", yet, two("compromise-keys " + since + " " + until), "it approves"},
		"signed for later":     {"ada", yet, two("compromise-keys 2026-03-01T11:00:00Z now"), "it approves"},
		"signed for one link":  {"ada", yet, two("compromise-keys " + since + " now fibre"), "it approves"},
		"signed for cleanup":   {"ada", yet, two("cleanup"), "it approves"},
	} {
		if _, err := burn(tt.caller, tt.of, tt.given); problem.KindOf(err) != problem.Forbidden || !strings.Contains(err.Error(), tt.why) {
			t.Errorf("%s: %v, want it refused: %s", name, err, tt.why)
		}
	}
	if all, err := k.Store.Compromises(t.Context(), 0); err != nil || len(all) != 0 {
		t.Fatalf("%d compromises were begun, %v", len(all), err)
	}

	given := two("compromise-keys " + since + " now")
	done, err := burn("ada", yet, given)
	if err != nil || done.From.Format(time.RFC3339) != since || done.To.Format(time.RFC3339) != "2026-03-01T13:00:00Z" {
		t.Errorf("two officers: %+v, %v", done, err)
	}
	if _, err := burn("ada", yet, given); problem.KindOf(err) != problem.Forbidden || !strings.Contains(err.Error(), "used before") {
		t.Errorf("the same approvals again: %v", err)
	}
	if _, err := burn("olga", past, two("compromise-keys "+since+" "+until)); err != nil {
		t.Errorf("two officers, of a time that is past: %v", err)
	}
	if n := s.ask(`SELECT count(*) FROM kme.audit WHERE body::json->>'action' = '` + string(audit.Compromise) + `' AND body::json->>'outcome' = 'done'
		AND json_array_length(body::json->'approvals') = 2`); n != 2 {
		t.Errorf("%d events with two approvals, want 2", n)
	}
}
