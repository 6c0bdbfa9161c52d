//go:build failpoint

package saedoor

import (
	"net/http/httptest"
	"testing"
)

// halves is an answer that remembers how much of it had left at each flush.
type halves struct {
	*httptest.ResponseRecorder
	flushed []int
}

func (h *halves) Flush() { h.flushed = append(h.flushed, h.Body.Len()) }

func TestHalfAnAnswerLeavesFirst(t *testing.T) {
	t.Parallel()
	for point, want := range map[string]int{"enc-half-answered": 1, "": 0} {
		h := &halves{ResponseRecorder: httptest.NewRecorder()}
		if err := writeBody(h, []byte("0123456789"), point); err != nil {
			t.Fatal(err)
		}
		if h.Body.String() != "0123456789" || len(h.flushed) != want || want == 1 && h.flushed[0] != 5 {
			t.Errorf("point %q: wrote %s, flushed after %v bytes", point, h.Body, h.flushed)
		}
	}
}
