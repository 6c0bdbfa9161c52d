package legacy

import (
	"errors"
	"net/url"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"

	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

var wide = Limits{KeySize: 256, MinSize: 8, MaxSize: 4096, TTL: time.Hour, MaxTTL: 24 * time.Hour}

// checkRefusal holds every refusal of a parser to what the door tells callers.
func checkRefusal(t *testing.T, err error) {
	t.Helper()
	p, ok := errors.AsType[*problem.Error](err)
	if !ok || p.Kind == problem.Internal || p.Kind == problem.Unavailable {
		t.Fatalf("got %v, want a problem of the request", err)
	}
	_, body, _ := wireError(err, "")
	var o errorObject
	if err := json.Unmarshal(body, &o); err != nil || o.Status != "error" || o.Error == "" || len(o.Error) > 200 || !utf8.ValidString(o.Error) {
		t.Errorf("the answer is %.400q, %v", body, err)
	}
}

// only is the speaker of an SAE that speaks for itself.
func only(self string) speaker {
	return func(said string) error {
		if said != self {
			return notTheirs(said, "not you")
		}
		return nil
	}
}

func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		`{"requester_sae":"alice","recipient_sae":"bob"}`, `{"requester_sae":"alice","recipient_sae":"b@c","key_size":128,"ttl":60}`,
		`{"requester_sae":"eve","recipient_sae":"bob"}`, `{"requester_sae":"alice","recipient_sae":"bob","key_size":null,"x":{}}`, `{}`, ``, `null`,
	} {
		f.Add([]byte(s))
	}
	alice := only("alice")
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := parseRequest("application/json", body, alice, wide)
		if err != nil {
			checkRefusal(t, err)
			return
		}
		if r.bits < wide.MinSize || r.bits > wide.MaxSize || r.bits%8 != 0 || r.ttl < time.Second || r.ttl > wide.MaxTTL {
			t.Errorf("accepted %+v", r)
		}
		from, to, ttl := "alice", r.recipient.String(), int(r.ttl/time.Second)
		again, err := json.Marshal(requestObject{Requester: &from, Recipient: &to, KeySize: &r.bits, TTL: &ttl})
		if err != nil {
			t.Fatal(err)
		}
		if back, err := parseRequest("application/json", again, alice, wide); err != nil || back != r {
			t.Errorf("%+v came back as %+v, %v", r, back, err)
		}
	})
}

func FuzzRetrieve(f *testing.F) {
	const id = "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11"
	f.Add(id+"-bob", "requester_sae=alice")
	f.Add(id+"-alice", "requester_sae=%61lice&x=1")
	f.Add(id, "requester_sae=eve")
	f.Add(id+"-bob-bob", "requester_sae=alice&requester_sae=alice")
	f.Add("", "a;b")
	alice := only("alice")
	f.Fuzz(func(t *testing.T, keyID, query string) {
		id, err := parseRetrieve(keyID, query, alice)
		if err != nil {
			checkRefusal(t, err)
			return
		}
		if v, err := url.ParseQuery(query); err != nil || v.Get("requester_sae") != "alice" {
			t.Errorf("accepted %q", query)
		}
		for _, end := range []string{"", aliceEnd, bobEnd} {
			if again, err := parseKeyID(id.String() + end); err != nil || again != id {
				t.Errorf("%s%s came back as %s, %v", id, end, again, err)
			}
		}
	})
}

func FuzzAnswer(f *testing.F) {
	var id key.ID
	f.Add(appendRetrieved(nil, Retrieved{ID: id, Material: key.NewMaterial([]byte("0123456789abcdef")), Bits: 128, Algorithm: "BB84"}))
	f.Add([]byte(`{"status":"success"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		o, err := parseKey(body)
		if err != nil {
			return
		}
		again, err := parseKey(appendRetrieved(nil, Retrieved{ID: o.id, Material: key.NewMaterial(o.Key), Bits: o.Size, Algorithm: o.Algorithm}))
		if err != nil || again.id != o.id || string(again.Key) != string(o.Key) || again.Algorithm != o.Algorithm {
			t.Errorf("%+v came back as %+v, %v", o, again, err)
		}
	})
}

func TestAnswersFit(t *testing.T) {
	t.Parallel()
	for bytes := range 513 {
		m := key.NewMaterial(make([]byte, bytes))
		k := Issued{Material: m, Bits: 8 * bytes, Algorithm: "simulated", Source: "qkd_orchestrator", ExpiresAt: time.Unix(0, 0)}
		if n := len(appendIssued(nil, k)); n > answerSize(m) {
			t.Errorf("a key of %d bytes: %d bytes do not fit into %d", bytes, n, answerSize(m))
		}
	}
}
