"""What the clients promise, against two KMEs: see internal/lab/programs_test.go, which runs it.

Environment: KM1, KM2 (base URLs of the SAE doors), PROFILES (a folder with saes/NAME/{cert,key}.pem
and root.pem, in which there are alice, bob, carol and the gateway qutemail)."""

import json
import os
import ssl
import subprocess
import sys
import unittest
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
KM1, KM2, PROFILES = os.environ["KM1"], os.environ["KM2"], os.environ["PROFILES"]
CA = os.path.join(PROFILES, "root.pem")
ALICE, BOB = "alice@qutemail.example", "bob@qutemail.example"
NOBODY = "https://localhost:1"


def party(name):
    folder = os.path.join(PROFILES, "saes", name)
    return {"cert": os.path.join(folder, "cert.pem"), "key": os.path.join(folder, "key.pem"), "ca": CA}


gateway = party("qutemail")
os.environ.update({
    "DJANGO_SETTINGS_MODULE": "settings", "DJANGO_SECRET_KEY": "of a test", "EMAIL_BACKEND": "django.core.mail.backends.locmem.EmailBackend",
    "KME_SEND_URLS": f"{NOBODY},{KM1}", "KME_READ_URLS": KM2, "KME_CERT": gateway["cert"], "KME_KEY": gateway["key"], "KME_CA": CA,
})
sys.path[:0] = [HERE, os.path.join(HERE, "django")]

import django  # noqa: E402
import requests  # noqa: E402
from urllib3 import exceptions  # noqa: E402
from urllib3.exceptions import MaxRetryError  # noqa: E402

django.setup()

from django.core import mail  # noqa: E402

import mail_crypto  # noqa: E402
from kme import AnswerLost, Etsi014, QuteMail, Refused, Unavailable, _unheard  # noqa: E402


class Mail(unittest.TestCase):
    """The mail server, by the certificate of a gateway."""

    def test_a_mail_is_read_by_its_recipient(self):
        text = "Dear Bob,\nsecret: ½ ∑ ✉\n"
        mail.outbox = []
        mail.EmailMessage("hello", mail_crypto.encrypt_email(ALICE, BOB, text), ALICE, [BOB]).send()
        body = mail.outbox[0].body
        self.assertNotIn("secret", body)
        self.assertEqual(mail_crypto.decrypt_email(BOB, body), text)
        self.assertEqual(mail_crypto.decrypt_email(BOB, body, last=True), text)
        with self.assertRaises(Refused) as gone:
            mail_crypto.decrypt_email(BOB, body)
        self.assertEqual(gone.exception.status, 410)

    def test_each_mail_has_a_key_of_its_own(self):
        one, two = (json.loads(mail_crypto.encrypt_email(ALICE, BOB, "same")) for _ in range(2))
        self.assertNotEqual(one["key_ID"], two["key_ID"])
        self.assertNotEqual(one["ciphertext"], two["ciphertext"])

    def test_a_mail_that_was_changed_is_refused(self):
        body = json.loads(mail_crypto.encrypt_email(ALICE, BOB, "pay 10"))
        for member, value in [("from", "eve@qutemail.example"), ("ciphertext", "AAAA" + body["ciphertext"][4:]), ("nonce", "AAAAAAAAAAAAAAAA")]:
            with self.assertRaises(mail_crypto.NotAuthentic):
                mail_crypto.decrypt_email(BOB, json.dumps({**body, member: value}))
        with self.assertRaises(mail_crypto.NotAuthentic):
            mail_crypto.decrypt_email(ALICE, json.dumps(body))

    def test_only_its_own_users(self):
        with self.assertRaises(Refused) as refused:
            mail_crypto.encrypt_email("carol", BOB, "as somebody else")
        self.assertEqual(refused.exception.status, 403)


class Users(unittest.TestCase):
    """Users with certificates of their own."""

    def setUp(self):
        self.alice = QuteMail(KM1, KM2, **party(ALICE))
        self.bob = QuteMail(KM2, KM2, **party(BOB))

    def test_round_trip(self):
        self.assertEqual(self.alice.status()["status"], "OK")
        sent = self.alice.request_key(ALICE, BOB, key_size=512, ttl=600)
        self.assertEqual(len(sent.material), 64)
        self.assertNotIn(sent.material.hex()[:8], repr(sent))
        self.assertIsNotNone(sent.expires_at)
        read = self.bob.retrieve_key(BOB, sent.key_id)
        self.assertEqual(read.material, sent.material)
        self.bob.consume_key(BOB, sent.key_id)
        self.bob.consume_key(BOB, sent.key_id)

    def test_refusals(self):
        sent = self.alice.request_key(ALICE, BOB)
        for status, call in [
            (403, lambda: self.alice.request_key(BOB, ALICE)),
            (404, lambda: self.bob.retrieve_key(BOB, "01a20aa3-3d80-77cf-85b2-527a89af7a78-bob")),
            (403, lambda: self.alice.retrieve_key(BOB, sent.key_id)),
            (400, lambda: self.alice.request_key(ALICE, BOB, key_size=7)),
        ]:
            with self.assertRaises(Refused) as refused:
                call()
            self.assertEqual(refused.exception.status, status)
            self.assertTrue(refused.exception.message and refused.exception.request_id)


class Sae(unittest.TestCase):
    """ETSI GS QKD 014."""

    def setUp(self):
        self.alice = Etsi014([NOBODY, KM1], **party("alice"))
        self.bob = Etsi014(KM2, **party("bob"))

    def test_round_trip(self):
        self.assertGreater(self.alice.status("bob")["stored_key_count"], 0)
        sent = self.alice.enc_keys("bob", number=3, size=512)
        taken = self.bob.dec_keys("alice", [k.key_id for k in reversed(sent)])
        self.assertEqual([k.material for k in reversed(taken)], [k.material for k in sent])
        self.assertEqual(len(sent[0].material), 64)
        loud, = self.alice.enc_keys("bob")
        self.assertEqual(self.bob.dec_keys("alice", [loud.key_id.upper()])[0].material, loud.material)
        with self.assertRaises(Refused) as once:
            self.bob.dec_keys("alice", [sent[0].key_id])
        self.assertEqual(once.exception.status, 400)

    def test_multicast(self):
        key, = self.alice.enc_keys("bob", additional_slaves=["erin"])
        for slave in ("bob", "erin"):
            self.assertEqual(Etsi014(KM2, **party(slave)).dec_keys("alice", [key.key_id])[0].material, key.material)

    def test_nobody_is_there(self):
        with self.assertRaises(requests.ConnectionError):
            Etsi014([NOBODY, NOBODY], patience=0.5, **party("alice")).enc_keys("bob")

    def test_plain_http_is_refused(self):
        with self.assertRaises(ValueError):
            Etsi014("http://localhost:1", **party("alice"))

    def lost_once(self, client):
        """An answer that is lost on its way, after the KME has done what was asked."""
        really, calls = client._site._http.request, []

        def request(*args, **kwargs):
            calls.append(args)
            answer = really(*args, **kwargs)
            if len(calls) == 1:
                raise requests.exceptions.ReadTimeout("lost")
            return answer

        return mock.patch.object(client._site._http, "request", request), calls

    def test_a_lost_answer_of_new_keys_is_asked_for_again_and_gets_others(self):
        alice = Etsi014(KM1, **party("alice"))
        patch, calls = self.lost_once(alice)
        with patch:
            key, = alice.enc_keys("bob")
        self.assertEqual(len(calls), 2)
        self.assertEqual(self.bob.dec_keys("alice", [key.key_id])[0].material, key.material)

    def test_a_lost_answer_of_taken_keys_is_never_asked_for_again(self):
        key, = self.alice.enc_keys("bob")
        patch, calls = self.lost_once(self.bob)
        with patch, self.assertRaises(AnswerLost):
            self.bob.dec_keys("alice", [key.key_id])
        self.assertEqual(len(calls), 1)
        with self.assertRaises(Refused):
            self.bob.dec_keys("alice", [key.key_id])

    def test_what_is_certain_to_be_unheard(self):
        def tls(kind, reason):
            e = kind(1, f"[SSL: {reason}]")
            e.reason = reason
            return requests.exceptions.SSLError(MaxRetryError(None, "/", exceptions.SSLError(e)))

        class NoSuchName(exceptions.NewConnectionError):  # as NameResolutionError of urllib3 2
            pass

        connection = requests.exceptions.ConnectionError
        for e, want in [
            (requests.exceptions.ConnectTimeout("late"), True),
            (connection(MaxRetryError(None, "/", exceptions.NewConnectionError(None, "refused"))), True),
            (connection(MaxRetryError(None, "/", NoSuchName(None, "nowhere.example"))), True),
            (tls(ssl.SSLCertVerificationError, "CERTIFICATE_VERIFY_FAILED"), True),
            (tls(ssl.SSLError, "TLSV13_ALERT_CERTIFICATE_REQUIRED"), True),
            (tls(ssl.SSLError, "SSLV3_ALERT_CERTIFICATE_REVOKED"), True),
            (tls(ssl.SSLError, "TLSV1_ALERT_UNKNOWN_CA"), True),
            (tls(ssl.SSLError, "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"), False),
            (tls(ssl.SSLError, "SSLV3_ALERT_BAD_RECORD_MAC"), False),
            (connection(exceptions.ProtocolError("Connection aborted.", ConnectionResetError(104, "reset"))), False),
            (requests.exceptions.ReadTimeout("lost"), False),
        ]:
            self.assertEqual(_unheard(e), want, repr(e))

    def test_a_damaged_answer_of_taken_keys_is_never_asked_for_again(self):
        damaged = ssl.SSLError(1, "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC] decryption failed or bad record mac")
        damaged.reason = "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"
        with mock.patch.object(self.bob._site._http, "request", side_effect=requests.exceptions.SSLError(damaged)) as asked, self.assertRaises(AnswerLost):
            self.bob.dec_keys("alice", ["01a20aa3-3d80-77cf-85b2-527a89af7a78"])
        self.assertEqual(asked.call_count, 1)

    def test_a_503_is_asked_again_until_patience_ends(self):
        alice, calls = Etsi014(KM1, patience=1.0, **party("alice")), []

        def unavailable(*args, **kwargs):
            calls.append(args)
            answer = requests.Response()
            answer.status_code, answer._content = 503, b'{"message":"not now"}'
            answer.headers["Retry-After"] = "0.3"
            return answer

        with mock.patch.object(alice._site._http, "request", unavailable), self.assertRaises(Unavailable) as refused:
            alice.enc_keys("bob")
        self.assertEqual(refused.exception.message, "not now")
        self.assertGreater(len(calls), 1)


class Curl(unittest.TestCase):
    """The recipe."""

    def run_as(self, name, *args):
        p = party(name)
        env = {**os.environ, "KME_SEND": KM1, "KME_READ": KM2, "KME_CERT": p["cert"], "KME_KEY": p["key"], "KME_CA": p["ca"]}
        done = subprocess.run([os.path.join(HERE, "curl.sh"), *args], env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    def ok(self, name, *args):
        status, text = self.run_as(name, *args)
        self.assertEqual(status, 0, text)
        return json.loads(text)

    def test_the_recipe(self):
        self.assertEqual(self.ok("qutemail", "status")["status"], "OK")
        sent = self.ok("qutemail", "request", ALICE, BOB)
        self.assertEqual(self.ok("qutemail", "retrieve", BOB, sent["key_id"])["key"], sent["key"])
        self.ok("qutemail", "consume", BOB, sent["key_id"])
        self.assertEqual(self.run_as("qutemail", "retrieve", BOB, sent["key_id"])[0], 22)
        keys = self.ok("alice", "enc", "bob", "2")["keys"]
        taken = self.ok("bob", "dec", "alice", *[k["key_ID"] for k in keys])["keys"]
        self.assertEqual([k["key"] for k in taken], [k["key"] for k in keys])
        self.assertEqual(self.run_as("alice", "what")[0], 2)


class SeedReadme(unittest.TestCase):
    """The examples of the old service's README, with nothing changed but URL and certificate."""

    def curl(self, *args):
        out = subprocess.run(["curl", "-s", "--cert", gateway["cert"], "--key", gateway["key"], "--cacert", CA, *args], capture_output=True, text=True, check=True)
        return json.loads(out.stdout)

    def test_curl(self):
        status = self.curl(f"{KM1}/api/v1/status")
        self.assertEqual((status["status"], status["service"], status["version"], status["database"]), ("OK", "QuteMail-KM", "2.0.0-ETSI", "connected"))
        self.assertLessEqual({"total_sessions", "error_rate", "keys_in_store"}, set(status["qkd_orchestrator"]))
        sent = self.curl(
            "-X", "POST", f"{KM1}/api/v1/keys/request", "-H", "Content-Type: application/json",
            "-d", '{\n    "requester_sae": "alice@qutemail.example",\n    "recipient_sae": "bob@qutemail.example"\n  }')
        self.assertEqual((sent["status"], sent["size"]), ("success", 256))
        self.assertLessEqual({"key_id", "key", "algorithm", "expires_at", "message", "source"}, set(sent))
        self.assertTrue(sent["key_id"].endswith("-alice"))
        read = self.curl(f"{KM2}/api/v1/keys/{sent['key_id'].replace('-alice', '-bob')}?requester_sae=bob@qutemail.example")
        self.assertEqual((read["status"], read["key"], read["size"], read["algorithm"]), ("success", sent["key"], 256, sent["algorithm"]))

    def test_python(self):
        cert, verify = (gateway["cert"], gateway["key"]), CA
        # Request key
        response = requests.post(f"{KM1}/api/v1/keys/request", json={
            "requester_sae": "alice@qutemail.example",
            "recipient_sae": "bob@qutemail.example"
        }, cert=cert, verify=verify)
        key_id = response.json()['key_id']

        # Retrieve key
        read = requests.get(f"{KM2}/api/v1/keys/{key_id}", params={
            "requester_sae": "bob@qutemail.example"
        }, cert=cert, verify=verify)
        self.assertEqual(read.json()["key"], response.json()["key"])

        # Get status
        stats = requests.get(f"{KM1}/api/v1/status", cert=cert, verify=verify).json()['qkd_orchestrator']
        self.assertIsInstance(stats['total_sessions'], int)
        self.assertIsInstance(stats['keys_in_store'], int)


if __name__ == "__main__":
    unittest.main()
