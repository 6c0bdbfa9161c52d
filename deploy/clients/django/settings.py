"""Settings of QuteMail's Django project that have to do with keys. Where the old service had one
URL there are two, one for each site, and a certificate: that of the mail server, which is a
gateway for its users (policies/README.md)."""

import os

SECRET_KEY = os.environ["DJANGO_SECRET_KEY"]
EMAIL_BACKEND = os.environ.get("EMAIL_BACKEND", "django.core.mail.backends.smtp.EmailBackend")

KME_SEND_URLS = os.environ["KME_SEND_URLS"].split(",")  # where users send through: https://km1.example:8443
KME_READ_URLS = os.environ["KME_READ_URLS"].split(",")  # where users read through: https://km2.example:8443
KME_CERT = os.environ["KME_CERT"]  # the gateway's certificate, its key and the root of the KMEs
KME_KEY = os.environ["KME_KEY"]
KME_CA = os.environ["KME_CA"]
