"""Encrypts e-mails with keys of a KME: one key a mail, used once, named in the mail.

    body = encrypt_email("alice@qutemail.example", "bob@qutemail.example", "hello")
    text = decrypt_email("bob@qutemail.example", body)

A mail is AES-256-GCM. Its tag says that whoever sealed it had the key, and wrote this text and
these names. The KME gives the key to the recipient and to whoever asked for it: nobody else can
read the mail or change it.

It does not say that the sender is who the mail names. QuteMail's routes do not tell a recipient
who asked for a key, so everybody who may share keys with the recipient can seal a mail in another's
name, under a key of their own. Hold "from" against what the mail server knows of who submitted the
mail; or, between SAEs with certificates of their own, take the key with Etsi014.dec_keys(sender, ...),
which the KME answers only if that sender asked for it.
"""

import base64
import json
import os
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from django.conf import settings

from kme import QuteMail

FORMAT = "qutemail-kme-1"


class NotAuthentic(Exception):
    """The mail is not what was sealed, or not for this recipient."""


@lru_cache(maxsize=1)
def keys() -> QuteMail:
    """The mail server's client. It holds connections, so there is one."""
    return QuteMail(settings.KME_SEND_URLS, settings.KME_READ_URLS, cert=settings.KME_CERT, key=settings.KME_KEY, ca=settings.KME_CA)


def _context(sender: str, recipient: str, key_id: str) -> bytes:
    return json.dumps([FORMAT, sender, recipient, key_id]).encode()


def encrypt_email(sender: str, recipient: str, plaintext: str) -> str:
    """The body of a mail that only recipient can read."""
    key = keys().request_key(sender, recipient, key_size=256)
    nonce = os.urandom(12)
    sealed = AESGCM(key.material).encrypt(nonce, plaintext.encode(), _context(sender, recipient, key.key_id))
    return json.dumps({
        "format": FORMAT, "from": sender, "to": recipient, "key_ID": key.key_id,
        "nonce": base64.b64encode(nonce).decode(), "ciphertext": base64.b64encode(sealed).decode(),
    })


def decrypt_email(recipient: str, body: str, *, last: bool = False) -> str:
    """What was sealed for recipient, by whoever asked for the key (see above). With last it is read for
    the last time: its key is erased."""
    mail = json.loads(body)
    if mail.get("format") != FORMAT or mail["to"] != recipient:
        raise NotAuthentic("not a mail to this recipient")
    key = keys().retrieve_key(recipient, mail["key_ID"])
    try:
        text = AESGCM(key.material).decrypt(
            base64.b64decode(mail["nonce"]), base64.b64decode(mail["ciphertext"]), _context(mail["from"], recipient, mail["key_ID"]))
    except InvalidTag as e:
        raise NotAuthentic("the mail was changed on its way") from e
    if last:
        keys().consume_key(recipient, mail["key_ID"])
    return text.decode()
