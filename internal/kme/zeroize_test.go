package kme

import (
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

// TestZeroizedAgain: a site that was zeroized after it was recovered is suspended, though
// the clock is behind that of the first time.
func TestZeroizedAgain(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	stand(t, k)
	for range 3 {
		if err := Zeroize(t.Context(), k.Token, k.DataDir, s.now(), io.Discard); err != nil {
			t.Fatal(err)
		}
		m, err := readMarks(t.Context(), k.Token, k.DataDir)
		if err != nil || m.file <= m.recovered || m.zeroized != m.file {
			t.Errorf("marks: %+v, %v", m, err)
		}
		if why, err := k.zeroized(t.Context()); err != nil || why == "" {
			t.Errorf("the site is not suspended: %v", err)
		}
		if err := k.endZeroized(t.Context(), m.last()-1); !errors.Is(err, errZeroizedAgain) {
			t.Errorf("recovered from an earlier mark: %v", err)
		}
		if err := k.endZeroized(t.Context(), m.last()); err != nil {
			t.Fatal(err)
		}
		if why, err := k.zeroized(t.Context()); err != nil || why != "" {
			t.Errorf("the site is suspended after it was recovered: %s, %v", why, err)
		}
		if m, err := readMarks(t.Context(), k.Token, k.DataDir); err != nil || m.recovered != m.file || m.recoveredFile != m.file {
			t.Errorf("marks of a site that was recovered: %+v, %v; want it in the token and in the file", m, err)
		}
		s.step(-time.Hour)
	}
}

// hook calls do once, when something is written that contains text.
type hook struct {
	text string
	do   func()
}

func (h *hook) Write(b []byte) (int, error) {
	if h.do != nil && strings.Contains(string(b), h.text) {
		h.do()
		h.do = nil
	}
	return len(b), nil
}

// TestZeroizedMeanwhile: whoever zeroizes a site that is being recovered stops it: it has
// not been recovered from that. Recovered once more it has.
func TestZeroizedMeanwhile(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	first := s.withToken(tokenDir(t))
	stand(t, first)
	first.Store.Close()
	zeroize := func() {
		if err := Zeroize(t.Context(), first.Token, first.DataDir, s.now(), io.Discard); err != nil {
			t.Fatal(err)
		}
	}
	zeroize()
	again := func() *KME {
		c := first.Config
		c.Store = s.connect()
		k, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	for _, when := range []string{"run numbers", "keys: "} { // as Recover says how far it has come
		k := again()
		if err := k.Recover(t.Context(), true, &hook{when, zeroize}); !errors.Is(err, errZeroizedAgain) {
			t.Errorf("zeroized after %q: %v", when, err)
		}
		k.Store.Close()
		if now, err := again().Store.Standing(t.Context()); err != nil || now.Suspended == "" {
			t.Errorf("zeroized after %q: the site serves, %v", when, err)
		}
	}
	k := again()
	if err := k.Recover(t.Context(), true, &hook{"account", zeroize}); err != nil { // too late for it to see
		t.Fatal(err)
	}
	k.Store.Close()
	k = again()
	if why, err := k.zeroized(t.Context()); err != nil || why == "" {
		t.Errorf("zeroized when the recovery had ended: %q, %v", why, err)
	}
	if err := k.Recover(t.Context(), true, io.Discard); err != nil {
		t.Fatal(err)
	}
	if why, err := k.zeroized(t.Context()); err != nil || why != "" {
		t.Errorf("recovered, and %q, %v", why, err)
	}
}

// TestRecoveredBeforeTheLastKey: a recovery that ends while keys are still being destroyed has
// not brought back a site without those: it is zeroized once more.
func TestRecoveredBeforeTheLastKey(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	stand(t, k)
	recovered := false
	recover := func() {
		m, err := readMarks(t.Context(), k.Token, k.DataDir)
		if err == nil {
			err = k.endZeroized(t.Context(), m.last())
		}
		if err != nil {
			t.Error(err)
		}
		recovered = true
	}
	if err := Zeroize(t.Context(), k.Token, k.DataDir, s.now(), &hook{"destroyed ", recover}); err != nil {
		t.Fatal(err)
	}
	if why, err := k.zeroized(t.Context()); err != nil || why == "" || !recovered {
		t.Errorf("the site is not suspended: %q, %v; recovered meanwhile: %t", why, err, recovered)
	}
}

// TestMarks: which mark stands, by the token and by a node's files.
func TestMarks(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		marks
		stands int64
	}{
		"never":                              {marks{}, 0},
		"zeroized":                           {marks{zeroized: 5, file: 5}, 5},
		"elsewhere":                          {marks{zeroized: 5}, 5},
		"recovered":                          {marks{5, 5, 5, 5}, 0},
		"recovered at another node":          {marks{zeroized: 5, recovered: 5, file: 5}, 0},
		"recovered, with another token now":  {marks{file: 5, recoveredFile: 5}, 0},
		"another token, not recovered":       {marks{file: 5}, 5},
		"another token, zeroized elsewhere":  {marks{zeroized: 4, file: 5, recoveredFile: 5}, 4},
		"again":                              {marks{7, 5, 7, 5}, 7},
		"again, which the token did not get": {marks{5, 5, 7, 5}, 7},
	} {
		if got := tt.marks.stands(); got != tt.stands {
			t.Errorf("%s: %d stands, want %d", name, got, tt.stands)
		}
	}
}
