#!/bin/sh
# build.sh BIN VERSION OUT [COMPRESSION]: packs the programs in BIN, and what an installation needs
# beside them, into OUT/kme_VERSION_ARCH.deb; with the SBOMs in OUT (make sbom), if they are
# there. COMPRESSION is what dpkg-deb takes as -Z.
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
	strip --remove-section=.comment --remove-section=.note "$root/usr/bin/$program"
done
install -D -m 755 deploy/deb/as-kmed "$root/usr/sbin/as-kmed"
for unit in kmed.service kmed-sequencer.service kme-ca@.service qlink.service; do
	install -D -m 644 "deploy/systemd/$unit" "$root/lib/systemd/system/$unit"
done
install -D -m 644 deploy/systemd/sysusers.conf "$root/usr/lib/sysusers.d/kme.conf"
install -D -m 644 deploy/systemd/tmpfiles.conf "$root/usr/lib/tmpfiles.d/kme.conf"
for page in deploy/man/*.[18]; do
	section=${page##*.}
	install -d "$root/usr/share/man/man$section"
	gzip -9nc "$page" >"$root/usr/share/man/man$section/${page##*/}.gz"
done

share=$root/usr/share/kme
mkdir -p "$share/policies"
cp -R deploy/alerts deploy/dashboards deploy/runbooks deploy/clients deploy/patroni deploy/postgres "$share/"
find "$share" -name __pycache__ -prune -exec rm -rf {} +
rm "$share"/runbooks/*.go # which hold a page against its tests
cp deploy/INSTALL.md deploy/AUDIT.md deploy/DEGRADED.md deploy/RECOVERY.md deploy/THREATMODEL.md deploy/kmed.yaml deploy/kme-ca.yaml deploy/qlink.yaml internal/etsi014/openapi.json "$share/"
for part in hsm pki; do # which the runbooks name
	install -D -m 644 "$part/README.md" "$share/$part/README.md"
done
cp policies/*.yaml policies/*.cedar policies/*.cedarschema policies/README.md "$share/policies/"

doc=$root/usr/share/doc/kme
install -D -m 644 README.md "$doc/README.md"
install -m 644 CHANGELOG.md "$doc/CHANGELOG.md"
cat >"$doc/copyright" <<END
QuteMail KME, https://github.com/qutemail/kme
Copyright: 2026, the authors of QuteMail KME
License: Apache-2.0, which is in /usr/share/common-licenses/Apache-2.0. The licenses of the
 Go modules that the programs are made of are in licenses/.
END
deploy/deb/licenses.sh "$doc/licenses" "$root"/usr/bin/*
for sbom in "$out"/*.cdx.json; do
	[ ! -e "$sbom" ] || install -D -m 644 "$sbom" "$doc/sbom/${sbom##*/}"
done
gzip -9n >"$doc/changelog.gz" <<END
kme ($version) unstable; urgency=medium

  * See CHANGELOG.md.

 -- QuteMail <kme@qutemail.example>  $(LC_ALL=C date -u -R -d "@${SOURCE_DATE_EPOCH:-$(date +%s)}")
END

mkdir -p "$root/DEBIAN"
libc=$(objdump -T "$root"/usr/bin/* | grep -o 'GLIBC_[0-9.]*' | sed s/GLIBC_// | sort -V | tail -n 1)
cat >"$root/DEBIAN/control" <<END
Package: kme
Version: $version
Architecture: $arch
Maintainer: QuteMail <kme@qutemail.example>
Section: net
Priority: optional
Depends: libc6 (>= $libc), systemd | systemd-standalone-sysusers, systemd | systemd-standalone-tmpfiles
Recommends: chrony | time-daemon
Suggests: postgresql, softhsm2, prometheus
Installed-Size: $(du -sk "$root" | cut -f1)
Homepage: https://github.com/qutemail/kme
Description: Key Management Entity for quantum key distribution
 Takes secret bits from a QKD link, seals each key in an HSM, and hands each to
 the applications entitled to it exactly once, over ETSI GS QKD 014.
 .
 Installed, it starts nothing: /usr/share/kme/INSTALL.md says what comes next.
END
(cd "$root" && find usr lib -type f -exec md5sum {} + | LC_ALL=C sort -k 2) >"$root/DEBIAN/md5sums"
cp deploy/deb/postinst deploy/deb/prerm deploy/deb/postrm "$root/DEBIAN/"
chmod 755 "$root/DEBIAN/postinst" "$root/DEBIAN/prerm" "$root/DEBIAN/postrm"
mkdir -p "$out"
dpkg-deb --root-owner-group "-Z$compression" --build "$root" "$out/kme_${version}_$arch.deb"
