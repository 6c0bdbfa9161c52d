#!/bin/sh
# build.sh BIN VERSION OUT [COMPRESSION]: packs the programs in BIN, and what an installation needs
# beside them, into OUT/kme_VERSION_ARCH.deb. COMPRESSION is what dpkg-deb takes as -Z.
set -eu
bin=$1 version=$2 out=$3 compression=${4-xz}
cd "$(dirname "$0")/../.."
arch=$(dpkg --print-architecture)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
umask 022

for program in kmed kmectl kme-ca qlink; do
	install -D -m 755 "$bin/$program" "$root/usr/bin/$program"
done
for unit in kmed.service kmed-sequencer.service kme-ca@.service; do
	install -D -m 644 "deploy/systemd/$unit" "$root/lib/systemd/system/$unit"
done
install -D -m 644 deploy/systemd/sysusers.conf "$root/usr/lib/sysusers.d/kme.conf"
install -D -m 644 deploy/systemd/tmpfiles.conf "$root/usr/lib/tmpfiles.d/kme.conf"

share=$root/usr/share/kme
mkdir -p "$share/policies"
cp -R deploy/alerts deploy/dashboards deploy/runbooks deploy/clients deploy/patroni deploy/postgres "$share/"
find "$share" -name __pycache__ -prune -exec rm -rf {} +
cp deploy/AUDIT.md deploy/DEGRADED.md deploy/RECOVERY.md deploy/THREATMODEL.md deploy/kmed.yaml internal/etsi014/openapi.json "$share/"
for part in hsm pki; do # which the runbooks name
	install -D -m 644 "$part/README.md" "$share/$part/README.md"
done
cp policies/*.yaml policies/*.cedar policies/*.cedarschema policies/README.md "$share/policies/"
doc=$root/usr/share/doc/kme
install -D -m 644 README.md "$doc/README.md"
install -m 644 CHANGELOG.md "$doc/CHANGELOG.md"
install -m 644 LICENSE "$doc/copyright"

mkdir -p "$root/DEBIAN"
cat >"$root/DEBIAN/control" <<END
Package: kme
Version: $version
Architecture: $arch
Maintainer: QuteMail <kme@qutemail.example>
Section: net
Priority: optional
Depends: libc6, adduser | systemd
Recommends: chrony | time-daemon
Suggests: postgresql, softhsm2, prometheus
Installed-Size: $(du -sk "$root" | cut -f1)
Homepage: https://github.com/qutemail/kme
Description: Key Management Entity for quantum key distribution
 Takes secret bits from a QKD link, seals each key in an HSM, and hands each to
 the applications entitled to it exactly once, over ETSI GS QKD 014.
END
cp deploy/deb/postinst deploy/deb/prerm deploy/deb/postrm "$root/DEBIAN/"
chmod 755 "$root/DEBIAN/postinst" "$root/DEBIAN/prerm" "$root/DEBIAN/postrm"
mkdir -p "$out"
dpkg-deb --root-owner-group "-Z$compression" --build "$root" "$out/kme_${version}_$arch.deb"
