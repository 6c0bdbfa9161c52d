#!/bin/sh
# Installs what the lab and the tests need besides git, make, gcc and Go: the
# Debian packages softhsm2, libnss3, postgresql, curl and
# python3-{django,requests,cryptography}, without a system-wide cluster.
# Does nothing, and asks for nothing, when they are there.
set -eu

missing=
ls /usr/lib/softhsm/libsofthsm2.so /usr/lib/*/softhsm/libsofthsm2.so >/dev/null 2>&1 || missing="$missing softhsm2"
ls /usr/lib/*/libsoftokn3.so >/dev/null 2>&1 || missing="$missing libnss3" # the tests' second PKCS#11 module
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null 2>&1 || missing="$missing postgresql"
command -v curl >/dev/null 2>&1 || missing="$missing curl" # the client of people without one; the tests ask with it too
/usr/bin/python3 -c 'import django, requests, cryptography' 2>/dev/null || missing="$missing python3-django python3-requests python3-cryptography" # clients of others, and a test's
command -v systemd-analyze >/dev/null 2>&1 || missing="$missing systemd" # which judges the units; it is not started
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
	echo "kme: please install:$missing (this machine has no apt-get, so it cannot be done for you)" >&2
	exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
	as_root=
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
	as_root=sudo
else
	# Not plain apt-get: that would create and start a system cluster.
	echo "kme: not installed:$missing; please run once as root: $(cd "$(dirname "$0")" && pwd)/prerequisites.sh" >&2
	exit 1
fi

echo "kme: installing$missing (Debian packages)" >&2
log=$(mktemp)
run() {
	$as_root env DEBIAN_FRONTEND=noninteractive "$@" >>"$log" 2>&1 && return
	tail -n 20 "$log" >&2
	echo "kme: '$*' failed; the whole log is $log" >&2
	exit 1
}
wait=-oDPkg::Lock::Timeout=300 # a machine that has just booted may be updating itself
run apt-get update
case $missing in
*postgresql*)
	# postgresql's installation would create and start a cluster of its own.
	run apt-get "$wait" install -y --no-install-recommends postgresql-common
	run mkdir -p /etc/postgresql-common/createcluster.d
	run sh -c 'echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.d/kme.conf'
	;;
esac
# shellcheck disable=SC2086 # a list of package names
run apt-get "$wait" install -y --no-install-recommends $missing
rm -f "$log"
