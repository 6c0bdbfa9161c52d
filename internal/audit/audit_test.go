package audit

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/key"
)

var update = flag.Bool("update", false, "rewrite the vectors in testdata/audit")

func mustID(s string) key.ID {
	id, err := key.ParseID(s)
	if err != nil {
		panic(err)
	}
	return id
}

// examples are events of every shape; their texts are vectors: an auditor's own
// tools read them for years.
func examples() []*Event {
	at := time.Date(2026, 11, 23, 21, 9, 8, 7e6, time.UTC)
	return []*Event{
		{Site: "km1", Node: "km1-a", Run: 4, At: at, Action: Start, Outcome: Done, Actor: Actor{Role: "node", ID: "km1-a"}, Reason: "run 4"},
		{
			Site: "km1", Node: "km1-a", Run: 4, At: at.Add(time.Millisecond), Action: EncKeys, Outcome: Done,
			Request: "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11",
			Actor: Actor{
				Role: "sae", ID: "alice", Rule: "sae-uri", Serial: "1234", Issuer: "00ff", Fingerprint: "abcd", Remote: "127.0.0.1:40000",
			},
			Policy: []string{"same-group"}, Link: "km1-km2", Peer: "bob", Master: "alice", Slaves: []string{"bob"},
			Keys:  []key.ID{mustID("01a20a35-6080-7d42-a9b0-32f7aade4f11"), mustID("01a20a35-6080-7a5d-9d6a-3b7bea24eace")},
			Atoms: []Atoms{{Link: "km1-km2", Session: 3, Block: 7, First: 0, Count: 1}, {Link: "km1-km2", Session: 3, Block: 7, First: 607, Count: 1}},
			Bits:  256, Provenance: key.Simulated, Batch: 9,
		},
		{
			Site: "km2", Node: "km2-a", Run: 1, At: at.Add(time.Second), Action: DecKeys, Outcome: Refused,
			Reason: "unauthorized: \"carol\" \\ is\nnot named \x7f \u00e9 \u2028", Actor: Actor{Role: "sae", ID: "carol"},
		},
		{
			Site: "km2", Node: "km2-a", Run: 1, At: at.Add(2 * time.Second), Action: DecKeys, Outcome: Done,
			Actor: Actor{Role: "sae", ID: "bob"}, Keys: []key.ID{mustID("01a20a35-6080-7d42-a9b0-32f7aade4f11")}, Bits: 256, Reread: true,
		},
		{
			Site: "km2", Node: "km2-a", Run: 2, At: at.Add(3 * time.Second), Action: Recover, Outcome: Done, Reason: "origin 2 begins",
			Actor: Actor{Role: "node", ID: "km2-a"}, Count: 2, Follows: []string{"qutemail.example/km2/audit/1\n5\nroot=\n\n— qutemail.example/km2/audit/1 sig=\n"},
		},
		{
			Site: "km2", Node: "km2-a", Run: 2, At: at.Add(4 * time.Second), Action: Malformed, Outcome: Refused, Reason: "unauthorized: no rule",
			Request: "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e12", Route: "POST /api/v1/keys/{sae}/enc_keys",
			Actor: Actor{Serial: "99", Fingerprint: "ef", Subject: "CN=mallory, URI:spiffe://x/y", Remote: "127.0.0.1:40001", TLS: "TLS 1.3 TLS_AES_128_GCM_SHA256 X25519MLKEM768"},
		},
	}
}

func TestVectors(t *testing.T) {
	t.Parallel()
	var got strings.Builder
	var head Head
	for _, e := range examples() {
		prev := head
		var body []byte
		body, head = prev.Append(nil, e)
		got.WriteString(string(body) + "\n" + hex.EncodeToString(head.Hash[:]) + "\n")
		if again, err := prev.Next(e.Seq, prev.Hash[:], body); err != nil || again != head {
			t.Errorf("event %d does not verify: %v", e.Seq, err)
		}
	}
	path := filepath.Join("..", "..", "testdata", "audit", "chain.txt")
	if *update {
		if err := os.WriteFile(path, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("the canonical texts have changed:\n got %s\nwant %s", got.String(), want)
	}
}

// Whatever stands in an event, its text is one line of valid JSON that says it.
func TestTextIsJSON(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := Event{
			Site: rapid.String().Draw(t, "site"), Reason: rapid.String().Draw(t, "reason"), At: time.UnixMilli(rapid.Int64Range(0, 1<<41).Draw(t, "at")),
			Slaves: rapid.SliceOf(rapid.StringN(1, 8, -1)).Draw(t, "slaves"), Actor: Actor{ID: rapid.String().Draw(t, "actor")},
			Count: rapid.IntRange(0, 1e9).Draw(t, "count"), Seq: rapid.Int64Range(1, 1e15).Draw(t, "seq"),
		}
		text := e.AppendText(nil)
		if bytes.ContainsAny(text, "\n\r\x00") {
			t.Fatalf("more than a line: %q", text)
		}
		var back struct {
			Site, Reason string
			Slaves       []string
			Count        int
			Seq          int64
			Actor        struct{ ID string }
		}
		if err := json.Unmarshal(text, &back); err != nil {
			t.Fatalf("%v in %s", err, text)
		}
		if back.Site != e.Site || back.Reason != e.Reason || back.Actor.ID != e.Actor.ID || back.Count != e.Count || back.Seq != e.Seq || len(back.Slaves) != len(e.Slaves) {
			t.Fatalf("%s does not say %+v", text, e)
		}
	})
}

// Every field of an event is written, and read back: whoever adds one is told here
// what is missing.
func TestEveryFieldIsWritten(t *testing.T) {
	t.Parallel()
	var e Event
	fill(t, reflect.ValueOf(&e).Elem())
	text := e.AppendText(nil)
	got, err := ParseEvent(text)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(e, got); diff != "" {
		t.Errorf("read back from %s (-want +got):\n%s", text, diff)
	}
	if again := got.AppendText(nil); !bytes.Equal(again, text) {
		t.Errorf("%s is written again as %s", text, again)
	}
}

// fill gives every field a value of its own.
func fill(t *testing.T, v reflect.Value) {
	t.Helper()
	switch {
	case v.Type() == reflect.TypeFor[time.Time]():
		v.Set(reflect.ValueOf(time.UnixMilli(1234567890123).UTC()))
	case v.Type() == reflect.TypeFor[key.ID]():
		v.Set(reflect.ValueOf(mustID("01a20a35-6080-7d42-a9b0-32f7aade4f11")))
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i))
		}
	case v.Kind() == reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(t, v.Index(0))
		fill(t, v.Index(1))
	case v.Kind() == reflect.String:
		v.SetString("a text of type " + v.Type().Name())
	case v.CanInt():
		v.SetInt(77)
	case v.Kind() == reflect.Bool:
		v.SetBool(true)
	default:
		t.Fatalf("an event has a field of type %s", v.Type())
	}
}

func TestChainShowsEveryChange(t *testing.T) {
	t.Parallel()
	var head Head
	type stored struct {
		seq  int64
		prev []byte
		body []byte
	}
	var rows []stored
	for _, e := range examples() {
		prev := head
		var body []byte
		body, head = prev.Append(nil, e)
		rows = append(rows, stored{e.Seq, prev.Hash[:], body})
	}
	verify := func(rows []stored) bool {
		var h Head
		for _, r := range rows {
			var err error
			if h, err = h.Next(r.seq, r.prev, r.body); err != nil {
				return false
			}
		}
		return h == head
	}
	if !verify(rows) {
		t.Fatal("the untouched chain does not verify")
	}
	changes := map[string]func([]stored) []stored{
		"edited": func(rs []stored) []stored {
			rs[1].body = bytes.Replace(rs[1].body, []byte("bob"), []byte("eve"), 1)
			return rs
		},
		"deleted":   func(rs []stored) []stored { return append(rs[:1:1], rs[2]) },
		"reordered": func(rs []stored) []stored { rs[1], rs[2] = rs[2], rs[1]; return rs },
		"cut off":   func(rs []stored) []stored { return rs[:2] },
		"repeated":  func(rs []stored) []stored { return append(rs, rs[2]) },
	}
	for what, change := range changes {
		copied := append([]stored(nil), rows...)
		if verify(change(copied)) {
			t.Errorf("a chain with an event %s verifies", what)
		}
	}
}

// FuzzText: whatever strings stand in an event, its text is one line of JSON that
// says them, up to bytes that are not UTF-8, and writes itself again.
func FuzzText(f *testing.F) {
	f.Add("km1", "unauthorized: \"carol\" \\ is\nnot named \x7f \u00e9 \u2028", "alice", int64(7))
	f.Add("\xff\x00", "</script>", "\ufffd", int64(-1))
	f.Fuzz(func(t *testing.T, site, reason, who string, n int64) {
		type text struct {
			Site, Reason, Peer string
			Actor              struct{ ID string }
			Slaves             []string
			Batch              int64
		}
		write := func(site, reason, who string) []byte {
			e := Event{Site: site, Reason: reason, Peer: who, Actor: Actor{ID: who}, Slaves: []string{who, reason}, Batch: n}
			return e.AppendText(nil)
		}
		body := write(site, reason, who)
		var back text
		if err := json.Unmarshal(body, &back); err != nil || bytes.ContainsAny(body, "\n\r\x00\x7f") {
			t.Fatalf("%v in %q", err, body)
		}
		valid := func(s string) string { return string([]rune(s)) }
		if back.Site != valid(site) || back.Reason != valid(reason) || back.Peer != valid(who) || back.Actor.ID != valid(who) ||
			len(back.Slaves) != 2 || back.Slaves[1] != valid(reason) || back.Batch != n {
			t.Fatalf("%s says %+v", body, back)
		}
		if again := write(back.Site, back.Reason, back.Actor.ID); !bytes.Equal(again, body) {
			t.Fatalf("%s was written again as %s", body, again)
		}
	})
}
