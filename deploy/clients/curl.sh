#!/bin/sh
# A KME by curl alone: a recipe, and a check that a certificate and a URL are right.
#
#   export KME_SEND=https://km1.example:8443 KME_READ=https://km2.example:8443
#   export KME_CERT=cert.pem KME_KEY=key.pem KME_CA=root.pem
#
#   curl.sh status                       how the service is (QuteMail's routes)
#   curl.sh request SENDER RECIPIENT     a new key
#   curl.sh retrieve RECIPIENT KEY_ID    the same key, at its recipient's
#   curl.sh consume RECIPIENT KEY_ID     erase it
#   curl.sh enc SLAVE [NUMBER]           ETSI GS QKD 014: new keys to share with SLAVE
#   curl.sh dec MASTER KEY_ID...         the keys that MASTER got
#
# Prints the KME's answer. Exit status 22 is an answer other than 200. Keys are on your screen then:
# for programs there are kmectl and kme.py.
set -eu
call() { # base URL, path, curl's further arguments
	url=$1$2
	shift 2
	curl --silent --show-error --fail-with-body --max-time 15 --cert "$KME_CERT" --key "$KME_KEY" --cacert "$KME_CA" "$@" "$url"
	echo
}
json() { # path's base URL, path, body
	call "$1" "$2" --header 'Content-Type: application/json' --data "$3"
}
case "${1-} $#" in
"status 1") call "$KME_SEND" /api/v1/status ;;
"request 3") json "$KME_SEND" /api/v1/keys/request "{\"requester_sae\":\"$2\",\"recipient_sae\":\"$3\"}" ;;
"retrieve 3") call "$KME_READ" "/api/v1/keys/$3" --get --data-urlencode "requester_sae=$2" ;;
"consume 3") json "$KME_READ" /api/v1/keys/consume "{\"key_id\":\"$3\",\"requester_sae\":\"$2\"}" ;;
"enc 2" | "enc 3") json "$KME_SEND" "/api/v1/keys/$2/enc_keys" "{\"number\":${3-1}}" ;;
"dec "[3-9])
	master=$2
	shift 2
	ids=$(printf ',{"key_ID":"%s"}' "$@")
	json "$KME_READ" "/api/v1/keys/$master/dec_keys" "{\"key_IDs\":[${ids#,}]}"
	;;
*)
	sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
	exit 2
	;;
esac
