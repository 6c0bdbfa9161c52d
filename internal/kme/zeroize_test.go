package kme

import (
	"io"
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
		inFile, err := readZeroized(k.DataDir)
		recovered, e := k.Token.Counter(t.Context(), recoveredCounter)
		if err != nil || e != nil || inFile <= recovered {
			t.Errorf("the file says %d, and it was recovered from %d: %v", inFile, recovered, err)
		}
		if why, err := k.zeroized(t.Context()); err != nil || why == "" {
			t.Errorf("the site is not suspended: %v", err)
		}
		if err := k.endZeroized(t.Context()); err != nil {
			t.Fatal(err)
		}
		if why, err := k.zeroized(t.Context()); err != nil || why != "" {
			t.Errorf("the site is suspended after it was recovered: %s, %v", why, err)
		}
		s.step(-time.Hour)
	}
}
