package key

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// The layout is an agreement between two sites: a change breaks every link in service.
func TestNameIDVector(t *testing.T) {
	t.Parallel()
	n := Name{Link: "km1-km2", Session: 3, Block: 7, Transcript: [32]byte{0: 1, 31: 2}}
	epoch := time.Date(2026, 11, 23, 21, 0, 0, 0, time.UTC)
	for index, want := range map[int]string{
		0:   "01a20a35-6080-7d42-a9b0-32f7aade4f11",
		607: "01a20a35-6080-7a5d-9d6a-3b7bea24eace",
	} {
		got := n.ID(epoch, index)
		if got.String() != want {
			t.Errorf("ID(%d) = %s, want %s", index, got, want)
		}
		if !got.EpochStart().Equal(epoch) {
			t.Errorf("ID(%d) is of epoch %v, want %v", index, got.EpochStart(), epoch)
		}
	}
}

func TestNameIDDependsOnEverything(t *testing.T) {
	t.Parallel()
	epoch := time.Date(2026, 11, 23, 21, 0, 0, 0, time.UTC)
	base := Name{Link: "a", Session: 1, Block: 2}
	ids := map[ID]string{}
	add := func(what string, id ID) {
		if other, ok := ids[id]; ok {
			t.Errorf("%s and %s have the same ID", what, other)
		}
		ids[id] = what
		if id[6]>>4 != 7 || id[8]>>6 != 2 {
			t.Errorf("%s: %s is not laid out as UUIDv7", what, id)
		}
	}
	add("base", base.ID(epoch, 0))
	add("index", base.ID(epoch, 1))
	add("epoch", base.ID(epoch.Add(time.Hour), 0))
	for what, n := range map[string]Name{
		"link": {Link: "b", Session: 1, Block: 2}, "session": {Link: "a", Session: 2, Block: 2},
		"block": {Link: "a", Session: 1, Block: 3}, "transcript": {Link: "a", Session: 1, Block: 2, Transcript: [32]byte{1}},
	} {
		add(what, n.ID(epoch, 0))
	}
	add("local", NewLocalID(epoch))
	add("local again", NewLocalID(epoch))
	add("smallest", MinID(epoch).withLayout())
}

func (id ID) withLayout() ID { id[6], id[8] = 0x70, 0x80; return id }

func TestParseID(t *testing.T) {
	t.Parallel()
	const text = "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11"
	for in, ok := range map[string]bool{
		text: true, strings.ToUpper(text): true, "00000000-0000-0000-0000-000000000000": true,
		"": false, "{" + text + "}": false, "urn:uuid:" + text: false, strings.ReplaceAll(text, "-", ""): false,
		text[:35]: false, text + "0": false, "0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e1g": false, "0193e6c0x1a00-7c41-9f6e-0d2f6a4b8e11": false,
	} {
		id, err := ParseID(in)
		if (err == nil) != ok {
			t.Errorf("ParseID(%q): %v", in, err)
		}
		if ok && id.String() != strings.ToLower(in) {
			t.Errorf("ParseID(%q).String() = %q", in, id)
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("0193e6c0-1a00-7c41-9f6e-0d2f6a4b8e11")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err == nil && id.String() != strings.ToLower(s) {
			t.Errorf("ParseID(%q) reads %s", s, id)
		}
	})
}

// No verb, logger or encoder gets at the bytes, however a Material is held.
func TestMaterialCannotBePrinted(t *testing.T) {
	t.Parallel()
	type outer struct {
		Public  Material
		private Material
		pointer *Material
		list    []Material
	}
	rapid.Check(t, func(t *rapid.T) {
		secret := rapid.SliceOfN(rapid.Byte(), 16, 64).Draw(t, "secret")
		m := NewMaterial(bytes.Clone(secret))
		held := outer{m, m, &m, []Material{m}}
		var out bytes.Buffer
		for _, v := range []any{m, &m, held, &held, []Material{m}, map[string]Material{"k": m}} {
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%b", "%c", "%T", "%U", "%p"} {
				fmt.Fprintf(&out, verb, v)
			}
			for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
				slog.New(h).Info("m", "v", v)
			}
			if text, err := json.Marshal(v); err == nil {
				out.Write(text)
			}
			_ = gob.NewEncoder(&out).Encode(v)
		}
		for name, form := range map[string]string{
			"raw": string(secret), "hex": hex.EncodeToString(secret), "HEX": strings.ToUpper(hex.EncodeToString(secret)),
			"base64": base64.StdEncoding.EncodeToString(secret), "decimal": strings.Trim(fmt.Sprint(secret), "[]"),
		} {
			if strings.Contains(out.String(), form) {
				t.Fatalf("the %s form of the secret came out", name)
			}
		}
	})
}

func TestMaterialWipe(t *testing.T) {
	t.Parallel()
	b := []byte{1, 2, 3, 4}
	m := NewMaterial(b)
	copied := m
	if m.Bits() != 32 {
		t.Errorf("Bits() = %d, want 32", m.Bits())
	}
	copied.Wipe()
	if !bytes.Equal(b, make([]byte, 4)) || !bytes.Equal(m.Reveal(), make([]byte, 4)) {
		t.Errorf("after Wipe the buffer holds %v", b)
	}
	if (Material{}).Reveal() != nil {
		t.Error("the zero Material reveals something")
	}
}

func TestLawful(t *testing.T) {
	t.Parallel()
	all := []State{"", Stored, Cached, Served, Consumed, Expired, Void}
	want := map[[2]State]bool{
		{"", Stored}: true, {"", Cached}: true,
		{Stored, Cached}: true, {Stored, Served}: true, {Stored, Expired}: true, {Stored, Void}: true,
		{Cached, Consumed}: true, {Cached, Expired}: true, {Cached, Void}: true,
	}
	for _, from := range all {
		for _, to := range all {
			if got := Lawful(from, to); got != want[[2]State{from, to}] {
				t.Errorf("Lawful(%q, %q) = %v", from, to, got)
			}
		}
	}
}

func TestEpoch(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 23, 21, 59, 59, 999e6, time.UTC)
	e := EpochAt(at, time.Hour)
	if !e.Start(time.Hour).Equal(time.Date(2026, 11, 23, 21, 0, 0, 0, time.UTC)) || !e.End(time.Hour).Equal(at.Add(time.Millisecond)) {
		t.Errorf("epoch of %v is %v to %v", at, e.Start(time.Hour), e.End(time.Hour))
	}
	if EpochAt(at.Add(time.Millisecond), time.Hour) != e+1 {
		t.Error("the next epoch does not begin where this one ends")
	}
}
