package main

import (
	"slices"
	"strings"
)

// What the environment has to say when a process begins, since it is read but once: main
// begins again with it. What an operator says of a setting stays.
var (
	// clobberFree has Go's runtime overwrite memory that the garbage collector frees.
	clobberFree = setting{"GODEBUG", ",", "clobberfree=", "1"}
	// keepPieces has a thread of the C library keep as many freed pieces of each size for its
	// next allocations, instead of 7: SoftHSM allocates more than that for each call.
	keepPieces = setting{"GLIBC_TUNABLES", ":", "glibc.malloc.tcache_count=", "200"}
)

// setting is a part of an environment variable.
type setting struct{ variable, between, name, value string }

// in is environ with the setting, and whether it was lacking.
func (s setting) in(environ []string) (with []string, lacking bool) {
	with, variable := slices.Clone(environ), s.variable+"="
	at := slices.IndexFunc(with, func(e string) bool { return strings.HasPrefix(e, variable) })
	if at < 0 {
		at, with = len(with), append(with, variable)
	}
	said := with[at][len(variable):]
	if strings.Contains(said, s.name) {
		return with, false
	}
	with[at] = variable + strings.Trim(said+s.between+s.name+s.value, s.between)
	return with, true
}

// withSettings is the environment to begin again with; nil if there is no need to. For
// keepPieces alone there is none: the C library erases it from the environment of a program
// with capabilities of its own, which would begin again for ever.
func withSettings(environ []string) []string {
	with, lacking := clobberFree.in(environ)
	if !lacking {
		return nil
	}
	with, _ = keepPieces.in(with)
	return with
}
