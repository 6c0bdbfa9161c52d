#!/bin/sh
# test.sh DEB STEP: installs the package on a fresh Debian 12, boots that Debian's systemd in
# namespaces of its own (no network but loopback), and does there what INSTALL.md says, and
# installed.sh. As root; needs debootstrap. Takes some minutes, at most TEST_TIME (30m), and
# leaves nothing behind. KME_DEBIAN may name a root that debootstrap has made before.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ "${1-}" = --contained ]; then # in mount, PID, network and cgroup namespaces of its own
	root=$2
	mount --make-rprivate /
	mount --bind "$root" "$root"
	mount -t proc proc "$root/proc"
	mount --bind "$root/proc/sys" "$root/proc/sys"
	mount -o remount,bind,ro "$root/proc/sys" # this machine's
	mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
	mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"
	mount -t tmpfs -o mode=755 tmpfs "$root/run"
	mount -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
	for device in null:3 zero:5 full:7 random:8 urandom:9; do
		mknod -m 666 "$root/dev/${device%:*}" c 1 "${device#*:}"
	done
	mkdir "$root/dev/pts" "$root/dev/shm"
	mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
	ln -s pts/ptmx "$root/dev/ptmx"
	mount -t tmpfs tmpfs "$root/dev/shm"
	cd "$root"
	pivot_root . mnt
	# Nothing that this machine has only one of: its clock, its modules, its log.
	# Mounts are shared, as systemd has them outside of a container: credentials are mounts.
	exec chroot . /bin/sh -c 'umount -l /mnt && mount --make-rshared / && exec setpriv --bounding-set=-sys_time,-sys_module,-sys_rawio,-syslog --inh-caps=-sys_time \
		env -i container=kme PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system' </dev/null >/dev/null 2>&1
fi

deb=$1 step=$2
work=$(mktemp -d "${TMPDIR:-/tmp}/kme-deb-XXXXXX")
root=$work/root
cgroup=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)/kme-deb-$$
cleanup() {
	if [ -d "$cgroup" ]; then
		echo 1 >"$cgroup/cgroup.kill"
		find "$cgroup" -depth -type d -exec sh -c 'for i in $(seq 50); do rmdir "$1" 2>/dev/null && exit; sleep 0.1; done' sh {} \;
	fi
	rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

echo "a fresh Debian in $root"
if [ -n "${KME_DEBIAN-}" ]; then
	cp -a "$KME_DEBIAN" "$root"
else
	debootstrap --variant=minbase --include=systemd-sysv,netbase bookworm "$root" >"$work/debootstrap.log" || { tail "$work/debootstrap.log"; exit 1; }
fi
install -m 644 "$deb" "$root/root/"
install -m 755 "$step" "$root/usr/local/bin/step"
cp "$here/installed.sh" "$root/root/"
sed -n '/^```sh$/,/^```$/{/^```/d;p}' "$here/../INSTALL.md" >"$root/root/INSTALL.sh"

in_root() { # in a PID namespace, so that nothing outlives it
	unshare --mount --pid --fork --kill-child sh -c 'mount --bind "$0" "$0"; mount -t proc proc "$0/proc"; exec chroot "$0" "$@"' "$root" \
		env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 "$@"
}
printf 'exit 101\n' >"$root/usr/sbin/policy-rc.d" # nothing is started
chmod 755 "$root/usr/sbin/policy-rc.d"
cp /etc/resolv.conf "$root/etc/resolv.conf"
echo 'APT::Install-Recommends "false";' >"$root/etc/apt/apt.conf.d/90test" # they take minutes
echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/test"
in_root bash -eu /root/installed.sh package
# What INSTALL.md installs, fetched while there is a network.
in_root apt-get -qq install --yes --download-only "/root/${deb##*/}" postgresql softhsm2 curl >/dev/null
rm "$root/usr/sbin/policy-rc.d"

echo "booting its systemd"
cat >"$root/etc/systemd/system/installed.service" <<END
[Unit]
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
Environment=DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 HOME=/root
WorkingDirectory=/root
ExecStart=/bin/bash -eu /root/installed.sh systemd
StandardOutput=append:/root/installed.log
StandardError=append:/root/installed.log
TimeoutStartSec=${TEST_TIME:-30m}
[Install]
WantedBy=multi-user.target
END
ln -s /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
ln -s /etc/systemd/system/installed.service "$root/etc/systemd/system/multi-user.target.wants/"
: >"$root/root/installed.log"
mkdir "$cgroup"
tail --pid=$$ -f "$root/root/installed.log" | grep --line-buffered '^- \|^FAILED' &
status=0
timeout -s KILL "${TEST_TIME:-30m}" sh -c 'echo $$ >"$1/cgroup.procs"; shift; exec unshare --mount --pid --fork --kill-child --net --ipc --uts --cgroup "$@"' \
	sh "$cgroup" "$here/test.sh" --contained "$root" || status=$?
if [ "$status" != 0 ] || ! grep -q '^the package works$' "$root/root/installed.log"; then
	tail -n 40 "$root/root/installed.log" | grep -v '^- '
	exit 1
fi
echo "the package works"
