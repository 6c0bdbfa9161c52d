package kme

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/store"
)

// sealed is what an AAD binds a blob to: the fields of one of the formats.
type sealed struct {
	format     string
	site       identity.KME
	kek        int64
	ref        handover.BlockRef // of an atom
	index      int               // of an atom
	id         key.ID
	master     identity.SAE // of an assigned key, and so on
	taker      identity.SAE
	bits       int
	provenance key.Provenance
	expires    int64 // Unix milliseconds
	reread     bool
	peer       identity.KME // of dueFormat, with ref.Link; zero if it was made here
}

func (s sealed) aad() []byte {
	if s.format == atomFormat {
		return AtomAAD(nil, s.site, s.kek, s.ref, s.index, s.id, s.provenance)
	}
	d := store.Due{
		KEK: s.kek, Key: s.id, Master: s.master, SAE: s.taker, Bits: s.bits, Provenance: s.provenance, ExpiresAt: time.UnixMilli(s.expires), Reread: s.reread,
		Link: s.ref.Link, Peer: s.peer, Version: dueVersion,
	}
	if s.format == dueFormat1 {
		d.Version = 1
	}
	return DueAAD(nil, s.site, d)
}

// TestAADVectors: what blobs are bound to must never change, or nothing that is
// stored opens any more. The vectors were not made by this code.
func TestAADVectors(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/seal/*.txt")
	if err != nil || len(files) < 6 {
		t.Fatalf("%d vectors, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			s, want, err := parseVector(string(text))
			if err != nil {
				t.Fatal(err)
			}
			if got := s.aad(); !bytes.Equal(got, want) {
				t.Errorf("AAD:\ngot  %x\nwant %x", got, want)
			}
		})
	}
}

// parseVector reads "field: value" lines, then the AAD in hex. Lines that begin
// with # are for people.
func parseVector(text string) (s sealed, aad []byte, err error) {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		name, value, isField := strings.Cut(line, ":")
		switch {
		case line == "" || line[0] == '#':
		case isField:
			err = s.set(name, strings.TrimSpace(value))
		default:
			var field []byte
			field, err = hex.DecodeString(line)
			aad = append(aad, field...)
		}
		if err != nil {
			return s, nil, fmt.Errorf("%q: %w", line, err)
		}
	}
	return s, aad, nil
}

func (s *sealed) set(name, value string) (err error) {
	number := func() (n int64) {
		n, err = strconv.ParseInt(value, 10, 64)
		return n
	}
	switch name {
	case "format":
		s.format = value
	case "site":
		s.site, err = identity.ParseKME(value)
	case "kek":
		s.kek = number()
	case "link":
		s.ref.Link = value
	case "session":
		s.ref.Session = number()
	case "block":
		s.ref.Block = number()
	case "index":
		s.index = int(number())
	case "key_ID":
		s.id, err = key.ParseID(value)
	case "master":
		s.master, err = identity.ParseSAE(value)
	case "taker":
		s.taker, err = identity.ParseSAE(value)
	case "bits":
		s.bits = int(number())
	case "provenance":
		s.provenance = key.Provenance(value)
	case "expires":
		var at time.Time
		at, err = time.Parse(time.RFC3339, value)
		s.expires = at.UnixMilli()
	case "peer":
		if value != "" {
			s.peer, err = identity.ParseKME(value)
		}
	case "reread":
		s.reread = value == "reread"
	default:
		err = fmt.Errorf("no field is called %q", name)
	}
	return err
}

// TestAADIsInjective: two rows that differ in any field have different AADs, so a
// blob that is moved from one to the other does not open.
func TestAADIsInjective(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		a := drawSealed(t)
		b := a
		if rapid.Bool().Draw(t, "one field") {
			rapid.SampledFrom(fields[a.format]).Draw(t, "field")(t, &b)
		} else {
			b = drawSealed(t)
		}
		if same := bytes.Equal(a.aad(), b.aad()); same != (a == b) {
			t.Fatalf("the AADs are equal: %t\n%+v\n%+v", same, a, b)
		}
	})
}

func drawSealed(t *rapid.T) sealed {
	s := sealed{format: rapid.SampledFrom([]string{atomFormat, dueFormat1, dueFormat}).Draw(t, "format")}
	for _, draw := range fields[s.format] {
		draw(t, &s)
	}
	return s
}

// Few and short values, which run into each other if anything can.
var (
	name   = rapid.StringMatching(`[ab0]{1,3}`)
	number = rapid.OneOf(rapid.Int64Range(0, 2), rapid.Int64())
	ids    = rapid.Custom(func(t *rapid.T) key.ID { return key.ID(rapid.SliceOfN(rapid.ByteRange(0, 1), 16, 16).Draw(t, "id")) })
	origin = rapid.SampledFrom([]key.Provenance{key.QKD, key.Simulated, key.LocalRNG, key.Upstream})
)

// dueFields are those of both formats of a key that waits.
var dueFields = []func(*rapid.T, *sealed){
	func(t *rapid.T, s *sealed) { s.site = drawKME(t) },
	func(t *rapid.T, s *sealed) { s.kek = number.Draw(t, "kek") },
	func(t *rapid.T, s *sealed) { s.id = ids.Draw(t, "id") },
	func(t *rapid.T, s *sealed) { s.master = drawSAE(t, "master") },
	func(t *rapid.T, s *sealed) { s.taker = drawSAE(t, "taker") },
	func(t *rapid.T, s *sealed) { s.bits = int(number.Draw(t, "bits")) },
	func(t *rapid.T, s *sealed) { s.provenance = origin.Draw(t, "provenance") },
	func(t *rapid.T, s *sealed) { s.expires = rapid.Int64Range(-2, 1<<43).Draw(t, "expires") },
	func(t *rapid.T, s *sealed) { s.reread = rapid.Bool().Draw(t, "reread") },
}

// fields draw each field of a format anew.
var fields = map[string][]func(*rapid.T, *sealed){
	atomFormat: {
		func(t *rapid.T, s *sealed) { s.site = drawKME(t) },
		func(t *rapid.T, s *sealed) { s.kek = number.Draw(t, "kek") },
		func(t *rapid.T, s *sealed) { s.ref.Link = name.Draw(t, "link") },
		func(t *rapid.T, s *sealed) { s.ref.Session = number.Draw(t, "session") },
		func(t *rapid.T, s *sealed) { s.ref.Block = number.Draw(t, "block") },
		func(t *rapid.T, s *sealed) { s.index = int(number.Draw(t, "index")) },
		func(t *rapid.T, s *sealed) { s.id = ids.Draw(t, "id") },
		func(t *rapid.T, s *sealed) { s.provenance = origin.Draw(t, "provenance") },
	},
	dueFormat1: dueFields,
	dueFormat: append(slices.Clone(dueFields),
		func(t *rapid.T, s *sealed) { s.ref.Link = name.Draw(t, "link") },
		func(t *rapid.T, s *sealed) {
			if s.peer = (identity.KME{}); rapid.Bool().Draw(t, "of a peer") {
				s.peer = drawKME(t)
			}
		}),
}

func drawKME(t *rapid.T) identity.KME {
	id, err := identity.ParseKME(name.Draw(t, "site"))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func drawSAE(t *rapid.T, who string) identity.SAE {
	id, err := identity.ParseSAE(name.Draw(t, who))
	if err != nil {
		t.Fatal(err)
	}
	return id
}
