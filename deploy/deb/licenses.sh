#!/bin/sh
# licenses.sh DIR PROGRAM...: the licenses of every Go module that the programs are made of, in DIR.
set -eu
out=$1
shift
go version -m "$@" | awk '$1 == "dep" { print $2 }' | LC_ALL=C sort -u | xargs go list -m -f '{{.Path}} {{.Dir}}' | while read -r module dir; do
	found=
	for file in "$dir"/LICENSE* "$dir"/LICENCE* "$dir"/COPYING* "$dir"/NOTICE*; do
		[ -f "$file" ] || continue
		found=yes
		install -D -m 644 "$file" "$out/$module/${file##*/}"
	done
	if [ -z "$found" ]; then
		echo "kme: no license found of $module in $dir" >&2
		exit 1
	fi
done
install -D -m 644 "$(go env GOROOT)/LICENSE" "$out/go/LICENSE"
