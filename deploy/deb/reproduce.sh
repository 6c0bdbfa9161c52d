#!/bin/sh
# reproduce.sh VERSION BIN DIST: clones this commit into another folder, makes the programs and
# the package there, and compares them with those in BIN and DIST, byte by byte.
set -eu
version=$1 bin=$2 dist=$3
cd "$(dirname "$0")/../.."
case $version in
*+modified) echo "commit first: what is in the working folder alone, another clone does not have" >&2; exit 1 ;;
esac
clone=$(mktemp -d "${TMPDIR:-/tmp}/kme-again-XXXXXX")
trap 'rm -rf "$clone"' EXIT
trap 'exit 1' INT TERM
git clone -q . "$clone"
git -C "$clone" checkout -q "$(git rev-parse HEAD)"
make -C "$clone" --no-print-directory build deb
for file in "$bin"/kmed "$bin"/kmectl "$bin"/kme-ca "$bin"/qlink "$bin"/kmelab "$dist"/*.cdx.json "$dist"/kme_"$version"_*.deb; do
	cmp "$file" "$clone/${file#"$PWD"/}"
	echo "the same: $file"
done
