package main

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestWithClobberFree: GODEBUG gets what it lacks, and what an operator says of it stays.
func TestWithClobberFree(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ environ, want []string }{
		{[]string{"A=1"}, []string{"A=1", "GODEBUG=clobberfree=1"}},
		{[]string{"GODEBUG=", "A=1"}, []string{"GODEBUG=clobberfree=1", "A=1"}},
		{[]string{"GODEBUG=gctrace=1"}, []string{"GODEBUG=gctrace=1,clobberfree=1"}},
		{[]string{"GODEBUG=gctrace=1,clobberfree=0"}, nil},
		{[]string{"GODEBUG=clobberfree=1"}, nil},
	} {
		was := slices.Clone(tt.environ)
		if diff := cmp.Diff(tt.want, withClobberFree(tt.environ)); diff != "" {
			t.Errorf("%v (-want +got):\n%s", tt.environ, diff)
		}
		if diff := cmp.Diff(was, tt.environ); diff != "" {
			t.Errorf("%v was changed: %s", was, diff)
		}
	}
}
