package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/pgdev"
)

// noPlaintext has some hundred keys delivered and looks for them, and for those in
// the pools, in every file of the lab: tables, WAL, audit, tokens, logs.
func noPlaintext(t *testing.T, l *Lab) {
	var s search
	deliver(t, l, &s)
	there, err := l.KM2.gather(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	pooled, err := there.open(t.Context(), slices.Collect(maps.Keys(there.keys)))
	if err != nil {
		t.Fatal(err)
	}
	if len(pooled) == 0 {
		t.Error("the pool is empty")
	}
	for _, secret := range pooled {
		s.add("an atom of the pool", secret)
	}
	marker := make([]byte, key.AtomBytes)
	_, _ = rand.Read(marker)
	s.add("marker", marker)
	for _, site := range []*Site{l.KM1, l.KM2} {
		plant(t, site, marker)
	}
	found, bytesRead, err := s.in(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d delivered keys and %d atoms sought in %d MB", len(s.secrets)-len(pooled)-1, len(pooled), bytesRead>>20)
	for _, site := range []*Site{l.KM1, l.KM2} {
		data := filepath.Join(site.Name, "postgres", "cluster")
		for _, place := range []string{
			filepath.Join(data, "data", "base"), filepath.Join(data, "data", "pg_wal"),
			filepath.Join(data, "postgres.log"), filepath.Join(site.Name, site.Node.Name, "log"),
		} {
			for _, form := range []string{"bytes", "hex", "base64"} {
				if !slices.ContainsFunc(found, func(f finding) bool {
					return f.what == "marker" && f.form == form && strings.HasPrefix(f.file, place)
				}) {
					if form != "bytes" || !strings.Contains(place, "log") { // a log holds text
						t.Errorf("the search does not find the marker as %s in %s", form, place)
					}
				}
			}
		}
	}
	for _, f := range found {
		if f.what != "marker" {
			t.Errorf("%s as %s in %s at %d", f.what, f.form, f.file, f.offset)
		}
	}
}

// deliver has keys delivered in every way there is, taken and not taken, and adds
// what the clients got to the search. No connection is left of it.
func deliver(t *testing.T, l *Lab, s *search) {
	alice, bob, dave := sae(t, l, "alice"), sae(t, l, "bob"), &Person{ID: SAEID("dave")}
	defer alice.HTTP.CloseIdleConnections()
	defer bob.HTTP.CloseIdleConnections()
	taken := get(t, alice, bob, 150)
	take(t, bob, alice, taken)
	back := get(t, bob, alice, 100)
	take(t, alice, bob, back)
	for _, keys := range []keySet{taken, back, get(t, alice, bob, 50), get(t, alice, dave, 20)} {
		for _, secret := range keys {
			s.add("a delivered key", secret)
		}
	}
	sender, reader := sae(t, l, "alice@qutemail.example"), sae(t, l, "bob@qutemail.example")
	defer sender.HTTP.CloseIdleConnections()
	at2, err := l.SAEAt(reader.ID.String(), "km2")
	if err != nil {
		t.Fatal(err)
	}
	defer at2.HTTP.CloseIdleConnections()
	for range 5 {
		sent := request(t, sender, reader, 0)
		if _, err := at2.Legacy.RetrieveKey(t.Context(), reader.ID, sent.ID); err != nil {
			t.Fatal(err)
		}
		s.add("a key of the QuteMail routes", sent.Material.Reveal())
	}
}

// plant puts the marker where key material could have got: into a table, and with
// it into the WAL, and into the logs; and has Postgres write its pages.
func plant(t *testing.T, s *Site, marker []byte) {
	t.Helper()
	ctx := t.Context()
	conn, err := pgx.Connect(ctx, s.DSN(pgdev.Superuser))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	asHex, asBase64 := hex.EncodeToString(marker), base64.StdEncoding.EncodeToString(marker)
	for _, sql := range []string{
		"CREATE TABLE public.marker (raw bytea, text text)",
		fmt.Sprintf("INSERT INTO public.marker VALUES ('\\x%s', '%s %s')", asHex, asHex, asBase64),
		fmt.Sprintf("DO $$ BEGIN RAISE LOG '%s %s'; END $$", asHex, asBase64),
		"CHECKPOINT",
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatalf("planting the marker: %v", err)
		}
	}
	log, err := os.OpenFile(s.LogFile(), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fprintf(log, "level=INFO msg=planted hex=%s base64=%s\n", asHex, asBase64)
	if err := errors.Join(err, log.Close()); err != nil {
		t.Fatal(err)
	}
}

// search looks for many secrets at once, in all the forms in which they might have
// been written.
type search struct {
	secrets [][]byte
	index   map[uint64][]pattern // by the first bytes of the pattern
	likely  [1 << 21]byte        // one bit for each value of three bytes that a pattern begins with
}

// pattern is a part of a secret as it would be written.
type pattern struct {
	what, form string
	text       []byte
}

type finding struct {
	what, form, file string
	offset           int
}

// add adds a secret. Half of it found is as bad as all of it.
func (s *search) add(what string, secret []byte) {
	s.secrets = append(s.secrets, secret)
	for half := range slices.Chunk(secret, 16) {
		if len(half) < 16 {
			continue
		}
		s.pattern(what, "bytes", half)
		s.pattern(what, "hex", []byte(hex.EncodeToString(half)))
		s.pattern(what, "hex", bytes.ToUpper([]byte(hex.EncodeToString(half))))
		s.pattern(what, "decimal numbers", []byte(strings.Trim(fmt.Sprint(half), "[]")))
		for shift := range 3 { // wherever the secret begins in what was encoded
			s.pattern(what, "base64", []byte(base64.StdEncoding.EncodeToString(half[shift:shift+12])))
			s.pattern(what, "base64", []byte(base64.URLEncoding.EncodeToString(half[shift:shift+12])))
		}
	}
}

func (s *search) pattern(what, form string, text []byte) {
	if s.index == nil {
		s.index = make(map[uint64][]pattern)
	}
	h := binary.LittleEndian.Uint64(text)
	s.index[h] = append(s.index[h], pattern{what, form, bytes.Clone(text)})
	s.likely[h&0xffffff>>3] |= 1 << (h & 7)
}

// in searches all files below dir, and says how many bytes it has read.
func (s *search) in(dir string) (found []finding, size int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it was there a moment ago: a temporary file of Postgres
		}
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 { // the database lies elsewhere if its user cannot get here
			target, err := filepath.EvalSymlinks(path)
			if err != nil {
				return err
			}
			more, n, err := s.in(target)
			for _, f := range more {
				f.file = filepath.Join(name, f.file)
				found = append(found, f)
			}
			size += n
			return err
		}
		if !d.Type().IsRegular() {
			return nil // a socket
		}
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		size += int64(len(text))
		found = append(found, s.text(name, text)...)
		return err
	})
	return found, size, err
}

func (s *search) text(file string, text []byte) (found []finding) {
	for at := 0; at+8 <= len(text); at++ {
		h := binary.LittleEndian.Uint64(text[at:])
		if s.likely[h&0xffffff>>3]&(1<<(h&7)) == 0 {
			continue
		}
		for _, p := range s.index[h] {
			if bytes.HasPrefix(text[at:], p.text) {
				found = append(found, finding{p.what, p.form, file, at})
			}
		}
	}
	return found
}

// The search finds a secret in each of its forms, wherever it begins, and half of it too.
func TestSearch(t *testing.T) {
	t.Parallel()
	secret := make([]byte, key.AtomBytes)
	_, _ = rand.Read(secret)
	var s search
	s.add("secret", secret)
	for form, written := range map[string][]byte{
		"bytes":           secret[:16],
		"hex":             []byte(`"` + strings.ToUpper(hex.EncodeToString(secret[16:])) + `"`),
		"decimal numbers": fmt.Append(nil, secret),
	} {
		if f := s.text("file", slices.Concat([]byte("abc"), written, []byte("def"))); len(f) == 0 || f[0].form != form {
			t.Errorf("%s: found %v", form, f)
		}
	}
	for n := range 5 {
		for _, encoding := range []*base64.Encoding{base64.StdEncoding, base64.RawURLEncoding} {
			text := encoding.EncodeToString(slices.Concat(make([]byte, n), secret, make([]byte, 7)))
			if f := s.text("file", []byte(text)); len(f) == 0 || f[0].form != "base64" {
				t.Errorf("base64 from byte %d: found %v", n, f)
			}
		}
	}
	if f := s.text("file", bytes.Repeat([]byte("nothing of it"), 1000)); len(f) > 0 {
		t.Errorf("found %v in a file without it", f)
	}
}
