package store

import (
	"testing"
	"time"

	"github.com/qutemail/kme/internal/key"
)

// TestProbed: a key is looked for first in every epoch in which most keys expire, and
// never in so many that it would be slower than looking in all.
func TestProbed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		ttl, epoch time.Duration
		want       key.Epoch
	}{
		{time.Hour, time.Hour, 3},
		{90 * time.Minute, time.Hour, 3},
		{24 * time.Hour, time.Hour, 26},
		{time.Minute, time.Second, 62},
		{time.Second, time.Hour, 2},
		{366 * 24 * time.Hour, time.Hour, maxProbed},
	} {
		if got := (Config{TTL: tt.ttl, EpochLength: tt.epoch}).probed(); got != tt.want {
			t.Errorf("keys of %v, epochs of %v: %d are asked, want %d", tt.ttl, tt.epoch, got, tt.want)
		}
	}
}
