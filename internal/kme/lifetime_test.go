package kme

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/legacy"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/qlink"
)

// stand begins the node's run and opens its epochs. Nothing runs beside the test: what a
// node does every so often, the test does.
func stand(t *testing.T, k *KME) {
	t.Helper()
	if err := k.beginRun(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := k.keks.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, over := range k.takenOver {
		close(over)
	}
}

// counter is the SAE door of a node, where one's name stands for one's certificate.
type counter struct {
	t *testing.T
	http.Handler
}

func newCounter(t *testing.T, k *KME) counter {
	t.Helper()
	who := func(r *http.Request) (identity.Caller, error) { return asSAE(t, r.Header.Get("As"), k.Now()), nil }
	door, err := etsi014.New(etsi014.Config{KME: k.Self, Backend: k, Identify: who, Log: k.Log})
	if err != nil {
		t.Fatal(err)
	}
	old, err := legacy.New(legacy.Config{KME: k.Self, Backend: k, Identify: who, Limits: k.LegacyLimits(), Now: k.Now, Log: k.Log})
	if err != nil {
		t.Fatal(err)
	}
	return counter{t, door.Handler(func(r chi.Router) { old.Mount(r) })}
}

func (c counter) call(as, method, path, body string) (status int, answer string) {
	c.t.Helper()
	r := httptest.NewRequestWithContext(c.t.Context(), method, "https://localhost"+path, strings.NewReader(body))
	r.Header.Set("As", as)
	r.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	c.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

// take has an SAE take a key of a master.
func (c counter) take(as, master string, id key.ID) (status int, answer string) {
	c.t.Helper()
	return c.call(as, http.MethodPost, "/api/v1/keys/"+master+"/dec_keys", fmt.Sprintf(`{"key_IDs":[{"key_ID":%q}]}`, id))
}

// TestLifetime: a key can be taken until its lifetime is over, and not at that moment or
// later, whoever has set the lifetime and whether or not somebody has ended the key yet;
// then it is ended, and no place of its pair's is taken any more.
func TestLifetime(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	k := s.withToken(dir)
	stand(t, k)
	door := newCounter(t, k)

	// Of two keys anna takes the first one in time, and the second one late.
	by014 := func(body string) func(*testing.T) [2]key.ID {
		return func(t *testing.T) (ids [2]key.ID) {
			status, answer := door.call("alice", http.MethodPost, "/api/v1/keys/anna/enc_keys", body)
			var got struct {
				Keys []struct {
					ID key.ID `json:"key_ID"`
				} `json:"keys"`
			}
			if err := json.Unmarshal([]byte(answer), &got); err != nil || status != http.StatusOK || len(got.Keys) != 2 {
				t.Fatalf("alice asks: %d, %d keys, %v", status, len(got.Keys), err)
			}
			return [2]key.ID{got.Keys[0].ID, got.Keys[1].ID}
		}
	}
	byMail := func(t *testing.T) (ids [2]key.ID) {
		for i := range ids {
			status, answer := door.call("alice", http.MethodPost, "/api/v1/keys/request", `{"requester_sae":"alice","recipient_sae":"anna","ttl":90}`)
			var got struct {
				ID string `json:"key_id"` // with the end that it is for, for people
			}
			err := json.Unmarshal([]byte(answer), &got)
			if err == nil && status == http.StatusOK {
				ids[i], err = key.ParseID(got.ID[:36])
			}
			if err != nil || status != http.StatusOK {
				t.Fatalf("alice asks: %d, %v", status, err)
			}
		}
		return ids
	}
	takeBy014 := func(id key.ID) (int, string) { return door.take("anna", "alice", id) }
	takeByMail := func(id key.ID) (int, string) {
		return door.call("anna", http.MethodGet, "/api/v1/keys/"+id.String()+"?requester_sae=anna", "")
	}
	for _, tt := range []struct {
		name  string
		ask   func(*testing.T) [2]key.ID
		take  func(key.ID) (int, string)
		lives time.Duration
		late  int // HTTP status
		says  string
	}{
		{"the node's", by014(`{"number":2}`), takeBy014, time.Hour, http.StatusBadRequest, notFound},
		{"the request's", by014(`{"number":2,"extension_mandatory":[{"qkm_ttl_s":90}]}`), takeBy014, 90 * time.Second, http.StatusBadRequest, notFound},
		{"the request's, longer", by014(`{"number":2,"extension_optional":[{"qkm_ttl_s":7200}]}`), takeBy014, 2 * time.Hour, http.StatusBadRequest, notFound},
		{"QuteMail's", byMail, takeByMail, 90 * time.Second, http.StatusGone, "expired"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ids := tt.ask(t)
			s.step(tt.lives - time.Millisecond)
			if status, _ := tt.take(ids[0]); status != http.StatusOK {
				t.Errorf("a millisecond before the end: %d", status)
			}
			s.step(time.Millisecond)
			late := func() {
				t.Helper()
				if status, answer := tt.take(ids[1]); status != tt.late || !strings.Contains(answer, tt.says) {
					t.Errorf("at the end: %d %s, want %d and %q", status, answer, tt.late, tt.says)
				}
				events := s.audit()
				want := told{string(audit.DecKeys), string(audit.Refused), fmt.Sprintf("key %s is gone: expired", ids[1]), 0}
				if last := events[len(events)-1]; last.Action != want.Action || last.Outcome != want.Outcome || !strings.Contains(last.Reason, want.Reason) {
					t.Errorf("recorded: %+v, want %+v", last, want)
				}
			}
			late()
			row := func(is string) int64 {
				return s.ask(fmt.Sprintf("SELECT count(*) FROM kme.due WHERE key_id = '%s' AND %s", ids[1], is))
			}
			if row("ct IS NOT NULL") != 1 {
				t.Error("the key was ended before anybody has looked")
			}
			s.step(time.Hour) // the first key's, if it may be read again
			k.expire(t.Context())
			if row("ct IS NULL AND gone_how = 'expired'") != 1 {
				t.Error("the key was not ended")
			}
			if n := s.ask(fmt.Sprintf(`SELECT count(*) FROM kme.audit WHERE body::json->>'action' = 'expire' AND body::json->>'reason' = 'not taken in time'
				AND '%s' IN (SELECT json_array_elements_text(body::json->'keys'))`, ids[1])); n != 1 {
				t.Errorf("%d events of its end", n)
			}
			if n := k.Store.Untaken(saeID(t, "anna"), saeID(t, "alice")); n != 0 {
				t.Errorf("%d keys still take a place", n)
			}
			late()
		})
	}
}

// litLink is a simulated link to km2, "fibre", in its first session, at a node that stands.
func litLink(t *testing.T, k *KME) *link {
	t.Helper()
	l := newLink(k, LinkConfig{ID: "fibre", Peer: kmeID(t, "km2"), End: handover.Alice, Provenance: key.Simulated})
	k.links[l.ID], k.takenOver[l.Peer] = l, make(chan struct{})
	stand(t, k)
	if err := k.Store.OpenSession(t.Context(), l.ID, 1, k.own(audit.LinkOpen)); err != nil {
		t.Fatal(err)
	}
	return l
}

// TestPoolLifetime: an atom that nobody has asked for while it was useful is assigned to
// nobody any more, here or at the word of the peer, whether or not somebody has ended it
// yet; what the peer has had assigned before lives as long as the peer has said.
func TestPoolLifetime(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir := tokenDir(t)
	k := s.withToken(dir)
	km2 := kmeID(t, "km2")
	l := litLink(t, k)
	const owners = "aab" // two chunks are ours, the third the peer's
	const atoms = len(owners) * key.ChunkAtoms
	made := key.EpochAt(s.now(), k.EpochLength)
	block := qlink.Block{Provenance: key.Simulated, Outcome: distill.Outcome{
		Session: 1, Block: 1, Terms: distill.Terms{Epoch: int64(made), Owners: owners}, Bits: make([]byte, atoms*key.AtomBytes), Length: atoms * key.AtomBits,
	}}
	if err := l.intake(t.Context(), block); err != nil {
		t.Fatal(err)
	}
	s.change("UPDATE block SET state = 'ready'")
	door := newCounter(t, k)

	// Ours.
	lend := func(number int) int {
		t.Helper()
		got, err := l.pool.take(t.Context(), number, 1)
		if err != nil {
			t.Fatal(err)
		}
		l.pool.give(got)
		return len(got)
	}
	tooOld := made.End(k.EpochLength).Add(k.PoolTTL)
	usable := tooOld.Add(-epochSlack - requestTime)
	s.ms.Store(usable.Add(-time.Millisecond).UnixMilli())
	if n := lend(1); n != 1 {
		t.Fatalf("%d keys are lent a millisecond before the end", n)
	}
	s.ms.Store(usable.UnixMilli())
	if in, out := lend(1), lend(key.ChunkAtoms); in != 0 || out != 0 { // from the chunk in hand, and from the one that is still free
		t.Errorf("%d and %d keys are lent that are too old", in, out)
	}
	if status, answer := door.call("alice", http.MethodGet, "/api/v1/keys/bob/enc_keys", ""); status != http.StatusServiceUnavailable || !strings.Contains(answer, "not enough keys are stored") {
		t.Errorf("alice asks for keys with bob: %d %s", status, answer)
	}

	// The peer's.
	if _, err := k.PeerDoor().Run(t.Context(), km2, handover.RunStarted{Node: "km2-a", Run: 1}); err != nil {
		t.Fatal(err)
	}
	batch, next := int64(0), 2*key.ChunkAtoms
	announce := func() (key.ID, handover.Result) {
		t.Helper()
		id := s.atom(next)
		batch++
		answer, err := k.PeerDoor().Announce(t.Context(), km2, handover.Announce{Node: "km2-a", Run: 1, Batch: batch, Requests: []handover.Request{{
			ID: fmt.Sprint("request ", batch), Link: l.ID, Master: saeID(t, "bob"), Slaves: names2(t, "alice"), Bits: key.AtomBits, TTL: time.Minute.Milliseconds(),
			Keys: []handover.Key{{Session: 1, Block: 1, First: next, Atoms: []key.ID{id}}},
		}}})
		if err != nil || answer.Standing != handover.Fresh || len(answer.Results) != 1 {
			t.Fatalf("batch %d: %+v, %v", batch, answer, err)
		}
		next++
		return id, answer.Results[0]
	}
	s.ms.Store(tooOld.Add(-time.Millisecond).UnixMilli())
	first, res := announce()
	second, again := announce()
	if !res.Accepted || !again.Accepted {
		t.Fatalf("a millisecond before the end: %+v, %+v", res, again)
	}
	s.step(time.Millisecond)
	if id, res := announce(); res.Accepted || res.Why != "atoms that are too old" || !slices.Equal(res.Lacking, []key.ID{id}) {
		t.Errorf("an atom that is too old: %+v, want it refused for good", res)
	}
	s.step(time.Minute - 2*time.Millisecond)
	if status, _ := door.take("alice", "bob", first); status != http.StatusOK {
		t.Errorf("alice takes what was assigned to her in time: %d", status)
	}
	s.step(time.Millisecond)
	if status, answer := door.take("alice", "bob", second); status != http.StatusBadRequest || !strings.Contains(answer, notFound) {
		t.Errorf("a minute after it was assigned, for a minute: %d %s", status, answer)
	}

	k.expire(t.Context())
	if n := s.ask("SELECT count(*) FROM kme.key"); n != 0 {
		t.Errorf("%d atoms are left", n)
	}
	if n, err := k.Store.Stored(t.Context(), l.ID); n != 0 || err != nil {
		t.Errorf("%d keys are stored, %v", n, err)
	}
	want := told{string(audit.Expire), string(audit.Done), "not asked for in time", atoms - 2}
	if !slices.Contains(s.audit(), want) {
		t.Errorf("no event %+v", want)
	}
}

// atom is the key_ID of an atom of the only block in the pool.
func (s *site) atom(index int) (id key.ID) {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(s.t.Context(), "SELECT id FROM kme.key WHERE index = $1", index).Scan((*[16]byte)(&id)); err != nil {
		s.t.Fatal(err)
	}
	return id
}
