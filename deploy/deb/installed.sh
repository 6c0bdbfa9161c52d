# What test.sh does inside the Debian: the package alone, where nothing is booted, and the
# services, under systemd. Run by bash -eu.

say() { printf -- '- %s\n' "$*"; }
die() { printf 'FAILED: %s\n' "$*"; exit 1; }
same() { [ "$1" = "$2" ] || die "$3: $1, want $2"; } # got, want, of what
modes() { stat -c '%a %U %G' "$1"; }
property() { systemctl show --value -p "$1" "${2-kmed.service}"; }
# until SECONDS COMMAND...: waits for it.
until_() {
	local end=$((SECONDS + $1))
	shift
	until "$@"; do
		[ $SECONDS -lt $end ] || die "never: $*"
		sleep 0.2
	done
}

# folders that the package makes.
folders() {
	same "$(modes /etc/kmed)" '750 root kmed' /etc/kmed
	same "$(modes /etc/kmed/kmed.yaml)" '640 root kmed' /etc/kmed/kmed.yaml
	same "$(modes /etc/kmed/qlink.yaml)" '640 root kmed' /etc/kmed/qlink.yaml
	same "$(modes /etc/kmed/policies)" '750 root kmed' /etc/kmed/policies
	same "$(modes /etc/kmed/ca)" '755 root root' /etc/kmed/ca
	same "$(modes /etc/kmed/credentials)" '700 root root' /etc/kmed/credentials
	same "$(modes /var/lib/kmed)" '700 kmed kmed' /var/lib/kmed
	same "$(modes /var/lib/kme-ca)" '755 root root' /var/lib/kme-ca
	for user in kmed kme-seq kme-ca-sae kme-ca-kme kme-ca-operator; do
		same "$(getent passwd $user | cut -d: -f 7)" /usr/sbin/nologin "the shell of $user"
	done
}

# everything that is installed, but what is nobody's package and changes by itself.
inventory() {
	find / -xdev \( -path /proc -o -path /sys -o -path /run -o -path /tmp -o -path /root -o -path /var/lib/dpkg -o -path /var/log -o -path /var/cache -o -path /var/lib/apt \) -prune \
		-o -type d -printf '%p/ %m %u %g\n' -o -printf '%p %m %u %g\n' | sort
}

package() {
	apt-get -qq update
	apt-get -qq install --yes --no-install-recommends libc6 systemd >/dev/null
	# Users stay, as everywhere in Debian: their numbers are not to be given to others.
	inventory >/tmp/before
	apt-get -qq install --yes --no-install-recommends /root/kme_*.deb
	folders
	say 'installed: users, folders, modes'
	for program in kmed kme-ca qlink kmectl; do
		$program --help >/dev/null
		same "$($program --version)" "$program $(dpkg-query -W -f '${Version}' kme)" 'the version'
	done
	echo '# mine' >>/etc/kmed/kmed.yaml
	echo secret >/etc/kmed/credentials/hsm.pin
	chmod 640 /etc/kmed/kmed.yaml
	dpkg -i /root/kme_*.deb
	folders
	tail -n 1 /etc/kmed/kmed.yaml | grep -q mine || die 'an upgrade changed kmed.yaml'
	dpkg --verify kme
	say 'upgraded over itself: kmed.yaml stays'
	apt-get -qq remove --yes kme
	[ ! -e /usr/bin/kmed ] && [ ! -e /usr/share/kme ] && [ ! -e /lib/systemd/system/kmed.service ] || die 'remove left programs'
	tail -n 1 /etc/kmed/kmed.yaml | grep -q mine || die 'remove took kmed.yaml'
	say 'removed: the configuration stays'
	apt-get -qq purge --yes kme 2>&1 | tee /tmp/purge
	grep -q 'kme: left, since they may hold keys and PINs: /etc/kmed/credentials /etc/kmed$' /tmp/purge || die 'purge does not say what it leaves'
	[ -e /etc/kmed/credentials/hsm.pin ] || die 'purge took a PIN away'
	rm -r /etc/kmed
	apt-get -qq install --yes --no-install-recommends /root/kme_*.deb
	apt-get -qq purge --yes kme
	inventory >/tmp/after
	diff <(grep -v '^/etc/\(passwd\|group\|shadow\|gshadow\|subuid\|subgid\|.pwd.lock\)' /tmp/before) <(grep -v '^/etc/\(passwd\|group\|shadow\|gshadow\|subuid\|subgid\|.pwd.lock\)' /tmp/after) ||
		die 'purge left something'
	say 'purged: nothing is left but the users; no PIN is lost'
}

get() { kmectl --as alice get --slave dave >/root/got 2>/root/got.err; }

systemd() {
	trap 'journalctl -o cat -n 30 -u kmed -u kmed-sequencer -u qlink -u "kme-ca@*"' EXIT
	say "systemd $(systemctl --version | sed -n 's/^systemd //;1p') is PID $(cat /proc/1/comm >/dev/null && echo 1)"
	. /root/INSTALL.sh
	say 'INSTALL.md does what it says'
	folders

	for unit in kmed.service kmed-sequencer.service qlink.service kme-ca@sae.service kme-ca@kme.service kme-ca@operator.service; do
		systemd-analyze verify --recursive-errors=no $unit
		say "$unit: exposure $(systemd-analyze security --no-pager --threshold=20 $unit | sed -n 's/.*exposure level for [^:]*: *//p')"
	done

	same "$(property ActiveState)$(property Type)$(property NRestarts)" activenotify0 'kmed.service'
	same "$(modes /etc/kmed/credentials/hsm.pin)" '600 root root' hsm.pin
	runuser -u kmed -- test -r /run/credentials/kmed.service/hsm.pin || die 'kmed cannot read its PIN'
	! runuser -u kme-ca-sae -- test -r /run/credentials/kmed.service/hsm.pin || die 'another user can read the PIN'
	as-kmed hsm status --config /etc/kmed/kmed.yaml | grep -q 'nothing is wrong with them' || die 'as-kmed hsm status'
	mkfifo -m 644 /tmp/never
	setsid as-kmed config check --config /tmp/never & # which waits for somebody to write there
	until_ 20 sh -c 'ls /run/as-kmed.*/hsm.pin >/dev/null 2>&1'
	kill -HUP -- -$!
	until_ 20 sh -c '! ls -d /run/as-kmed.* >/dev/null 2>&1'
	rm /tmp/never
	for role in sae kme operator; do
		runuser -u kme-ca-$role -- kme-ca config check --config /var/lib/kme-ca/$role/ca.yaml
	done
	runuser -u kmed -- qlink config check --config /etc/kmed/qlink.yaml
	same "$(stat -c '%a %U' /var/lib/kme-ca/sae)" '700 kme-ca-sae' 'the folder of the CA of SAEs'
	! runuser -u kme-ca-sae -- ls /var/lib/kme-ca/kme >/dev/null 2>&1 || die 'one CA can look into the folder of another'
	say 'credentials reach the daemon, and nobody else; as-kmed takes its copy away, also when the line drops'

	mkdir -p /etc/systemd/system/kmed.service.d
	printf '[Service]\nWatchdogSec=3\n' >/etc/systemd/system/kmed.service.d/test.conf
	systemctl daemon-reload
	systemctl restart kmed
	local pid fed
	pid=$(property MainPID) fed=$(property WatchdogTimestampMonotonic)
	until_ 60 fed_since "$((fed + 6000000))"
	same "$(property MainPID)" "$pid" 'the process, whose watchdog is fed'
	kill -STOP "$pid"
	until_ 40 sh -c '[ "$(systemctl show --value -p NRestarts kmed)" = 1 ] && systemctl -q is-active kmed'
	until_ 20 get
	rm -r /etc/systemd/system/kmed.service.d
	systemctl daemon-reload
	systemctl restart kmed
	say 'the watchdog is fed; a node that is stuck is started again'

	systemctl stop kmed
	same "$(property Result)$(property ExecMainStatus)" success0 'a stop'
	systemctl start kmed
	until_ 20 get
	systemctl reload kmed
	until_ 20 get
	say 'stop, start, reload'

	mv /etc/kmed/credentials/hsm.pin /root/pin
	echo 000000 | install -m 600 /dev/stdin /etc/kmed/credentials/hsm.pin
	! systemctl restart kmed || die 'kmed starts with a wrong PIN'
	sleep 5
	same "$(property ExecMainStatus)$(property ActiveState)$(property NRestarts)" 78failed0 'after a wrong PIN'
	mv /root/pin /etc/kmed/credentials/hsm.pin
	systemctl start kmed
	until_ 20 get
	say 'a wrong PIN is tried once (exit status 78), and not again'

	systemctl stop postgresql
	systemctl restart --no-block kmed
	until_ 120 sh -c '[ "$(systemctl show --value -p NRestarts kmed)" -ge 12 ]'
	systemctl start postgresql
	until_ 60 systemctl -q is-active kmed
	until_ 20 get
	say "a node whose database came back after $(property NRestarts) starts serves by itself"

	pid=$(property MainPID kme-ca@sae.service)
	kill -KILL "$pid"
	until_ 20 curl -sf --cacert $KMECTL_PROFILES/root.pem -o /dev/null https://localhost:7443/health
	pid=$(property MainPID qlink.service)
	kill -KILL "$pid"
	until_ 20 sh -c 'runuser -u kmed -- qlink tell --control /run/qlink/control.sock status >/dev/null 2>&1'
	say 'kme-ca and qlink are started again'

	sequencer
	kmectl --as root audit verify

	systemctl restart kmed
	until_ 20 get
	# Fully: nothing that a unit forbids is wanted by its program.
	! journalctl -b -o cat -u kmed -u kmed-sequencer -u qlink -u 'kme-ca@*' | grep -i 'operation not permitted\|permission denied\|read-only file system' || die 'a unit forbids what its program wants'

	apt-get -qq remove --yes kme
	for unit in kmed qlink kmed-sequencer kme-ca@sae; do
		! systemctl -q is-active $unit || die "$unit runs after remove"
	done
	apt-get -qq purge --yes kme
	[ -z "$(find /etc/systemd/system -name 'km*' -o -name 'qlink*')" ] || die "purge left $(find /etc/systemd/system -name 'km*' -o -name 'qlink*')"
	say 'removed and purged: the services are gone'
	trap - EXIT
	echo 'the package works'
}

fed_since() { [ "$(property WatchdogTimestampMonotonic)" -gt "$1" ]; } # microseconds

# sequencer runs the audit sequencer apart. SoftHSM's token is files of one user, so here it
# runs as the node's; with an HSM it is a user of its own.
sequencer() {
	sed -i '/sequencer:/d' /etc/kmed/kmed.yaml
	sed 's|^data:.*|data: /var/lib/kme-seq|; s|^database:.*|database: unused|; s|^  reader:.*|  sequencer: "host=/run/postgresql user=kme_seq dbname=kme"|' /etc/kmed/kmed.yaml |
		install -m 640 -g kmed /dev/stdin /etc/kmed/sequencer.yaml
	cp /etc/default/kmed /etc/default/kmed-sequencer
	mkdir -p /etc/systemd/system/kmed-sequencer.service.d
	printf '[Service]\nUser=kmed\nReadWritePaths=/var/lib/kmed\n' >/etc/systemd/system/kmed-sequencer.service.d/softhsm.conf
	systemctl daemon-reload
	systemctl restart kmed
	systemctl start kmed-sequencer
	local before
	before=$(leaves)
	until_ 20 get
	until_ 30 more_leaves "$before"
	same "$(property ActiveState kmed-sequencer.service)$(property NRestarts kmed-sequencer.service)" active0 kmed-sequencer.service
	say 'the audit sequencer folds as a service of its own'
	rm -r /etc/systemd/system/kmed-sequencer.service.d
}
leaves() { runuser -u postgres -- psql -qAt -d kme -c 'SELECT size FROM kme.audit_log'; }
more_leaves() { [ "$(leaves)" -gt "$1" ]; }

"$1"
