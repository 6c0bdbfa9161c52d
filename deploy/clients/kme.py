"""Clients of a KME, for Python 3.9 and later with requests.

    QuteMail   the routes of QuteMail's key service: send through one site, read through the other
    Etsi014    ETSI GS QKD 014: get keys to share with another SAE, take what others share

Both speak mutual TLS: the certificate says who is calling. Each side may have several base
URLs, the nodes of its KME: the next one is tried when one cannot be connected to.

What is repeated, and what is not. A request that certainly was not heard (no connection), or
that was answered 503, may be made again: nothing was handed out, or what was is burned. A
request for a *new* key may also be made again when its answer was lost, for it gets another key.
A request that *takes* keys is never repeated once it may have been heard: AnswerLost says that
they are burned, and the sender is to be asked for new ones. No key is ever given out twice by
these classes, and none is kept by them.
"""

from __future__ import annotations

import base64
import re
import ssl
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Optional, Sequence, Union
from urllib.parse import quote

import requests
from urllib3.exceptions import NewConnectionError

__all__ = ["AnswerLost", "Etsi014", "Key", "QuteMail", "Refused", "Unavailable"]


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, request_id: str):
        super().__init__(f"the KME answered {status}: {message} (request {request_id})")
        self.status, self.message, self.request_id = status, message, request_id


class Unavailable(Refused):
    """A 503 that stayed one, however often it was asked again."""


class AnswerLost(Exception):
    """Keys may have been taken, and their answer did not arrive: they are burned. Ask for new ones."""


@dataclass(frozen=True)
class Key:
    """A key and the name under which its other holder finds it. Use it for one thing, once."""

    key_id: str
    material: bytes = field(repr=False)  # never in a log
    expires_at: Optional[datetime] = None
    algorithm: str = ""
    source: str = ""


class _Site:
    """The nodes of one KME, as one party sees them."""

    def __init__(self, urls: Union[str, Sequence[str]], cert: str, key: str, ca: str, timeout: float, patience: float):
        self._urls = [urls] if isinstance(urls, str) else list(urls)
        if not self._urls or not all(u.startswith("https://") for u in self._urls):
            raise ValueError("base URLs must be https: keys travel over mutual TLS only")
        self._urls = [u.rstrip("/") for u in self._urls]
        self._http = requests.Session()
        self._http.cert, self._http.verify = (cert, key), ca
        self._http.trust_env = False  # no proxy, no other authorities
        self._timeout, self._patience = timeout, patience

    def call(self, method: str, path: str, *, repeatable: bool, **kwargs: Any) -> dict:
        """The body of a 200. repeatable says that the request does no harm when it is heard twice."""
        end = time.monotonic() + self._patience
        while True:
            wait = 0.2
            try:
                answer = self._send(method, path, repeatable, **kwargs)
                if answer.status_code == 200:
                    return answer.json()
                refused = self._refused(answer)
                if answer.status_code != 503:
                    raise refused
                wait = float(answer.headers.get("Retry-After", 1))
                last: Exception = refused
            except requests.RequestException as e:
                if not repeatable and not _unheard(e):
                    raise AnswerLost(str(e)) from e
                last = e
            if time.monotonic() + wait > end:
                raise last
            time.sleep(wait)

    def _send(self, method: str, path: str, repeatable: bool, **kwargs: Any) -> requests.Response:
        """The answer of the first node that can be connected to."""
        for i, url in enumerate(self._urls):
            try:
                return self._http.request(method, url + path, timeout=self._timeout, **kwargs)
            except requests.RequestException as e:
                if i + 1 == len(self._urls) or not (_unheard(e) or repeatable):
                    raise
        raise AssertionError("there is a URL")

    @staticmethod
    def _refused(answer: requests.Response) -> Refused:
        try:
            body = answer.json()
            message = body.get("error") or body.get("message") or ""
        except (ValueError, AttributeError):
            message = answer.reason
        kind = Unavailable if answer.status_code == 503 else Refused
        return kind(answer.status_code, message, answer.headers.get("X-Request-Id", ""))


def _unheard(e: requests.RequestException) -> bool:
    """Whether it is certain that nobody has heard the request: there was no connection, or the
    handshake failed. An error of TLS may also be one of reading the answer."""
    if isinstance(e, requests.exceptions.ConnectTimeout):
        return True
    cause: Optional[BaseException] = e
    while cause is not None:
        if isinstance(cause, NewConnectionError):  # or that there is no such name
            return True
        if isinstance(cause, ssl.SSLError):
            return isinstance(cause, ssl.SSLCertVerificationError) or bool(_HANDSHAKE.search(cause.reason or ""))
        inner = [cause.__cause__, getattr(cause, "reason", None), *cause.args[:1]]
        cause = next((i for i in inner if isinstance(i, BaseException)), None)
    return False


# Alerts with which the KME ends a handshake: it may not like our certificate, or cannot speak with us.
_HANDSHAKE = re.compile("ALERT.*(CERTIFICATE|UNKNOWN_CA|HANDSHAKE_FAILURE|PROTOCOL_VERSION)")


class QuteMail:
    """The routes of QuteMail's key service, of which this is the successor.

    send_urls are the nodes of the KME through which users send, read_urls those of the one
    through which they read: the same, if all are at one site. The certificate is that of one user,
    or of a gateway that acts for the users that principals.yaml lists for it.
    """

    def __init__(self, send_urls: Union[str, Sequence[str]], read_urls: Union[str, Sequence[str]], *,
                 cert: str, key: str, ca: str, timeout: float = 10, patience: float = 15):
        self._send = _Site(send_urls, cert, key, ca, timeout, patience)
        self._read = _Site(read_urls, cert, key, ca, timeout, patience)

    def status(self) -> dict:
        """How the KME through which users send is. Unavailable if its database or HSM is away."""
        return self._send.call("GET", "/api/v1/status", repeatable=True)

    def request_key(self, requester: str, recipient: str, *, key_size: Optional[int] = None, ttl: Optional[int] = None) -> Key:
        """A new key of key_size bits for requester, who writes, and recipient, that lives for ttl seconds."""
        order: dict = {"requester_sae": requester, "recipient_sae": recipient}
        if key_size is not None:
            order["key_size"] = key_size
        if ttl is not None:
            order["ttl"] = ttl
        got = self._send.call("POST", "/api/v1/keys/request", repeatable=True, json=order)
        expires = datetime.fromisoformat(got["expires_at"]).replace(tzinfo=timezone.utc)
        return Key(got["key_id"], base64.b64decode(got["key"], validate=True), expires, got["algorithm"], got["source"])

    def retrieve_key(self, requester: str, key_id: str) -> Key:
        """The key that was made for requester, who reads. Refused: 404 unknown, 403 another's, 410 gone.

        It may be read again until it is consumed or expires, unless the KME lets keys be read once.
        """
        got = self._read.call("GET", f"/api/v1/keys/{quote(key_id, safe='')}", repeatable=True, params={"requester_sae": requester})
        return Key(got["key_id"], base64.b64decode(got["key"], validate=True), None, got["algorithm"])

    def consume_key(self, requester: str, key_id: str) -> None:
        """Have a key erased that was made for requester."""
        self._read.call("POST", "/api/v1/keys/consume", repeatable=True, json={"key_id": key_id, "requester_sae": requester})


class Etsi014:
    """ETSI GS QKD 014 V1.1.1, for the SAE that the certificate names."""

    def __init__(self, urls: Union[str, Sequence[str]], *, cert: str, key: str, ca: str, timeout: float = 10, patience: float = 15):
        self._site = _Site(urls, cert, key, ca, timeout, patience)

    def status(self, slave: str) -> dict:
        """What could be had to share with slave."""
        return self._site.call("GET", f"/api/v1/keys/{quote(slave, safe='')}/status", repeatable=True)

    def enc_keys(self, slave: str, *, number: int = 1, size: Optional[int] = None, additional_slaves: Sequence[str] = ()) -> list[Key]:
        """number new keys of size bits to share with slave, and with each of additional_slaves."""
        order: dict = {"number": number}
        if size is not None:
            order["size"] = size
        if additional_slaves:
            order["additional_slave_SAE_IDs"] = list(additional_slaves)
        return self._keys(slave, "enc_keys", order, True)

    def dec_keys(self, master: str, key_ids: Sequence[str]) -> list[Key]:
        """The keys that master got under these IDs: all of them or none, and each only once."""
        keys = self._keys(master, "dec_keys", {"key_IDs": [{"key_ID": k} for k in key_ids]}, False)
        if [k.key_id.lower() for k in keys] != [i.lower() for i in key_ids]:  # a UUID may be written either way
            raise AnswerLost("the KME answered with other keys than were asked for")
        return keys

    def _keys(self, sae: str, what: str, body: dict, repeatable: bool) -> list[Key]:
        got = self._site.call("POST", f"/api/v1/keys/{quote(sae, safe='')}/{what}", repeatable=repeatable, json=body)
        return [Key(k["key_ID"], base64.b64decode(k["key"], validate=True), source=k.get("key_extension", {}).get("qkm_provenance", ""))
                for k in got["keys"]]
