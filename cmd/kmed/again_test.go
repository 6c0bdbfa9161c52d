package main

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestWithSettings: the environment gets what it lacks, and what an operator says stays.
func TestWithSettings(t *testing.T) {
	t.Parallel()
	const collector, allocator = "GODEBUG=clobberfree=1", "GLIBC_TUNABLES=glibc.malloc.tcache_count=200"
	for _, tt := range []struct{ environ, want []string }{
		{[]string{"A=1"}, []string{"A=1", collector, allocator}},
		{[]string{"GODEBUG=", allocator, "A=1"}, []string{collector, allocator, "A=1"}},
		{[]string{"GODEBUG=gctrace=1", allocator}, []string{"GODEBUG=gctrace=1,clobberfree=1", allocator}},
		{[]string{"GODEBUG=gctrace=1,clobberfree=0", allocator}, nil},
		{[]string{"GLIBC_TUNABLES=glibc.malloc.check=1"}, []string{"GLIBC_TUNABLES=glibc.malloc.check=1:glibc.malloc.tcache_count=200", collector}},
		{[]string{"GLIBC_TUNABLES=glibc.malloc.tcache_count=7"}, []string{"GLIBC_TUNABLES=glibc.malloc.tcache_count=7", collector}},
		{[]string{collector}, nil}, // the C library has erased the other
		{[]string{collector, allocator}, nil},
	} {
		was := slices.Clone(tt.environ)
		if diff := cmp.Diff(tt.want, withSettings(tt.environ)); diff != "" {
			t.Errorf("%v (-want +got):\n%s", tt.environ, diff)
		}
		if diff := cmp.Diff(was, tt.environ); diff != "" {
			t.Errorf("%v was changed: %s", was, diff)
		}
	}
}
