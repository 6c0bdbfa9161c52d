package kme

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// TestEntitled: which of the keys that were asked for the caller may take.
func TestEntitled(t *testing.T) {
	t.Parallel()
	k, _ := core(t)
	alice, anna, bob, both := saeID(t, "alice"), saeID(t, "anna"), saeID(t, "bob"), saeID(t, "both")
	row := func(master identity.SAE, gone string, left time.Duration) store.Taken {
		return store.Taken{Gone: gone, Due: store.Due{
			SAE: alice, Master: master, Bits: 256, Provenance: key.Simulated, Peer: kmeID(t, "km2"), ExpiresAt: k.Now().Add(left),
		}}
	}
	local := row(anna, "", time.Hour)
	local.Peer, local.Provenance = identity.KME{}, key.LocalRNG
	rows := map[string]store.Taken{
		"live": row(bob, "", time.Hour), "late": row(bob, "", time.Millisecond), "other master": row(both, "", time.Hour),
		"taken": row(bob, "taken", time.Hour), "over": row(bob, "", 0), "stranger's": row(saeID(t, "stranger"), "", time.Hour),
		"local": local,
	}
	none := identity.SAE{}
	for _, tt := range []struct {
		name   string
		caller string
		master identity.SAE
		keys   []string
		kind   problem.Kind
		why    string // "" if they may be taken
		gone   bool
	}{
		{"one", "alice", bob, []string{"live"}, 0, "", false},
		{"two, in the order asked for", "alice", bob, []string{"late", "live"}, 0, "", false},
		{"whoever the master is", "alice", none, []string{"other master"}, 0, "", false},
		{"of another master", "alice", bob, []string{"live", "other master"}, problem.Invalid, "was asked for by both, not bob", false},
		{"unknown", "alice", bob, []string{"live", "unknown"}, problem.Invalid, "is unknown here", false},
		{"another's", "alice", bob, []string{"live", "another's"}, problem.Unauthorized, "alice is not named for key", false},
		{"another's outweighs unknown", "alice", bob, []string{"unknown", "taken", "another's"}, problem.Unauthorized, "alice is not named for key", false},
		{"taken", "alice", bob, []string{"live", "taken"}, problem.Invalid, "is gone: taken", true},
		{"over", "alice", bob, []string{"over"}, problem.Invalid, "is gone: expired", true},
		{"policy has changed", "alice", saeID(t, "stranger"), []string{"stranger's"}, problem.Unauthorized, "policy (no-policy) does not let alice take keys of stranger", false},
		{"made here", "alice", anna, []string{"local"}, 0, "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := k.callOf(t, tt.caller, audit.DecKeys)
			mine, named := make(map[key.ID]store.Taken), map[key.ID]bool{}
			var ids []key.ID
			for i, name := range tt.keys {
				id := key.ID{byte(i + 1)}
				ids = append(ids, id)
				if r, ok := rows[name]; ok {
					r.Key = id
					mine[id] = r
				}
				named[id] = name != "unknown"
			}
			due, err := k.entitled(c, tt.master, ids, mine, named)
			if tt.why == "" {
				got := make([]key.ID, len(due))
				for i, d := range due {
					got[i] = d.Key
				}
				if err != nil || !slices.Equal(got, ids) || c.ev.Master != due[0].Master.String() || c.ev.Bits != 256 || len(c.ev.Policy) == 0 {
					t.Errorf("got %v, %v, recorded as %+v", got, err, c.ev)
				}
				return
			}
			var p *problem.Error
			var gone goneError
			if !errors.As(err, &p) || p.Kind != tt.kind || !strings.Contains(err.Error(), tt.why) || errors.As(err, &gone) != tt.gone {
				t.Fatalf("got %v, want %s because %q", err, tt.kind, tt.why)
			}
			if said := map[problem.Kind]string{problem.Invalid: notFound}[tt.kind]; p.Detail != said {
				t.Errorf("the caller is told %q, want %q", p.Detail, said)
			}
		})
	}
}

// TestPoliciesOfKeys: the record of a request for keys of several masters names the
// policies that decided about each.
func TestPoliciesOfKeys(t *testing.T) {
	t.Parallel()
	k, _ := coreOf(t, `@id("of-bob") permit (principal is SAE, action, resource == SAE::"bob");
@id("of-both") permit (principal is SAE, action, resource == SAE::"both");`)
	c, rows := k.callOf(t, "alice", audit.DecKeys), make(map[key.ID]store.Taken)
	ids := []key.ID{{1}, {2}}
	for i, master := range []string{"bob", "both"} {
		rows[ids[i]] = store.Taken{Due: store.Due{
			Key: ids[i], SAE: c.sae, Master: saeID(t, master), Bits: 256, Provenance: key.Simulated, Peer: kmeID(t, "km2"), ExpiresAt: k.Now().Add(time.Hour),
		}}
	}
	if _, err := k.entitled(c, identity.SAE{}, ids, rows, map[key.ID]bool{{1}: true, {2}: true}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"of-bob", "of-both"}; !slices.Equal(c.ev.Policy, want) {
		t.Errorf("recorded policies %q, want %q", c.ev.Policy, want)
	}
}

// TestLegacyKind: the legacy door tells apart what 014 answers alike.
func TestLegacyKind(t *testing.T) {
	t.Parallel()
	away := errors.New("away")
	for _, tt := range []struct {
		err  error
		want problem.Kind
	}{
		{&problem.Error{Kind: problem.Invalid, Detail: notFound, Err: goneError{key.ID{1}, "taken"}}, problem.Gone},
		{&problem.Error{Kind: problem.Invalid, Detail: notFound, Err: away}, problem.NotFound},
		{problem.Because(problem.Unauthorized, away), problem.Forbidden},
		{problem.Because(problem.Unavailable, away), problem.Unavailable},
		{away, problem.Internal},
	} {
		if got := legacyKind(tt.err); problem.KindOf(got) != tt.want || !errors.Is(got, tt.err) {
			t.Errorf("%v: %s, want %s", tt.err, problem.KindOf(got), tt.want)
		}
	}
}
