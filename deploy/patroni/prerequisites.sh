#!/bin/sh
# Installs what a database node needs: Debian's Postgres, Patroni and etcd, without
# a cluster of Debian's making. Does nothing, and asks for nothing, when it is there.
set -eu

missing=
for program in patroni etcd envsubst setpriv; do
	command -v "$program" >/dev/null 2>&1 || missing="$missing $program"
done
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$missing postgres"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
	echo "kme: not installed:$missing; please run once as root: $(cd "$(dirname "$0")" && pwd)/prerequisites.sh" >&2
	exit 1
fi
echo "kme: installing Postgres, Patroni and etcd (Debian packages)" >&2
export DEBIAN_FRONTEND=noninteractive
install="apt-get -qq -oDPkg::Lock::Timeout=300 install -y --no-install-recommends"
apt-get -qq update
$install postgresql-common >/dev/null
mkdir -p /etc/postgresql-common/createcluster.d
echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.d/kme.conf
$install postgresql patroni python3-etcd etcd-server etcd-client gettext-base util-linux >/dev/null
