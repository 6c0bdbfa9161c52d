// Package release says which release of the product a program is.
package release

import "runtime/debug"

// version is put in by the linker: VERSION of the Makefile.
var version string

// Version is what `make build` and the package have stamped: the day and the commit of
// the source, as in the package's own version. Of a program that was built otherwise it
// is what the go command knows of the source, which may be no more than "(devel)".
func Version() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
