#!/bin/sh
# Puts promtool into bin/: that of the Debian package prometheus, of which nothing is
# installed, since it would start a server. Does nothing where there is one.
set -eu
cd "$(dirname "$0")/../.."
command -v promtool >/dev/null 2>&1 || [ -x bin/promtool ] && exit 0
echo "kme: fetching promtool (of the Debian package prometheus)" >&2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
(cd "$work" && apt-get -qq download prometheus >&2 && dpkg-deb -x prometheus_*.deb .)
mkdir -p bin
cp "$work/usr/bin/promtool" bin/
