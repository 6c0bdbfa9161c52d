#!/bin/sh
# Patroni runs this once, on the first primary of a new cluster: the database, and
# the roles that `kmed migrate` finds there when it runs as kme_owner.
set -eu
psql -v ON_ERROR_STOP=1 -q "$1" <<'SQL'
CREATE ROLE kme_owner LOGIN;
CREATE ROLE kme_app LOGIN;
GRANT kme_app TO kme_owner;
CREATE ROLE kme_seq LOGIN;
CREATE ROLE kme_auditor LOGIN;
CREATE DATABASE kme;
REVOKE TEMPORARY ON DATABASE kme FROM PUBLIC;
\connect kme
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
CREATE SCHEMA kme AUTHORIZATION kme_owner;
SQL
