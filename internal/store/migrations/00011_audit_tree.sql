-- +goose Up

-- The node's signature over the head of its chain, with the last event of each commit.
ALTER TABLE audit ADD COLUMN sig bytea CHECK (length(sig) = 64);

-- The Merkle tree over the events of all nodes: one for each origin of the account.
CREATE TABLE audit_log (
    origin   bigint PRIMARY KEY,
    name     text   NOT NULL UNIQUE,               -- what checkpoints call it
    vkey     text   NOT NULL,                      -- its public key; what counts is the one that others know
    size     bigint NOT NULL DEFAULT 0,
    begun_at timestamptz NOT NULL
);

-- How far the chain of each node is in the tree, whichever origin's.
CREATE TABLE audit_node (
    node text   PRIMARY KEY,
    day  date   NOT NULL,                          -- of event seq
    seq  bigint NOT NULL,
    head bytea  NOT NULL CHECK (length(head) = 32),
    key  text   NOT NULL                           -- the note in which the log's key vouches for the node's; '' if none yet
);

-- Leaves first .. first+n-1 are the events seq .. seq+n-1 of a node.
CREATE TABLE audit_range (
    origin bigint NOT NULL REFERENCES audit_log,
    first  bigint NOT NULL,
    node   text   NOT NULL,
    day    date   NOT NULL,
    seq    bigint NOT NULL,
    n      bigint NOT NULL CHECK (n > 0),
    PRIMARY KEY (origin, first)
);
CREATE INDEX audit_range_events ON audit_range (node, seq);

-- Tiles of 256 hashes (C2SP tlog-tiles). One that is not full grows.
CREATE TABLE audit_tile (
    origin bigint   NOT NULL REFERENCES audit_log,
    level  smallint NOT NULL,
    n      bigint   NOT NULL,
    data   bytea    NOT NULL CHECK (length(data) BETWEEN 32 AND 8192 AND length(data) % 32 = 0),
    PRIMARY KEY (origin, level, n)
);

CREATE TABLE audit_checkpoint (
    origin bigint NOT NULL REFERENCES audit_log,
    size   bigint NOT NULL,
    note   text   NOT NULL,
    at     timestamptz NOT NULL,
    PRIMARY KEY (origin, size)
);

-- The signature lines of witnesses under a checkpoint.
CREATE TABLE audit_cosignature (
    origin  bigint NOT NULL,
    size    bigint NOT NULL,
    witness text   NOT NULL,
    line    text   NOT NULL,
    PRIMARY KEY (origin, size, witness),
    FOREIGN KEY (origin, size) REFERENCES audit_checkpoint ON DELETE CASCADE
);

-- What this site has witnessed of the logs of others.
CREATE TABLE audit_witnessed (
    log  text   PRIMARY KEY,
    kme  text   NOT NULL,
    vkey text   NOT NULL,
    size bigint NOT NULL,
    note text   NOT NULL,                          -- the checkpoint, as the log had signed it
    at   timestamptz NOT NULL
);

GRANT USAGE ON SCHEMA kme TO kme_seq;
GRANT SELECT ON settings, node_run, audit, goose_db_version TO kme_seq;
GRANT SELECT, INSERT ON audit_log, audit_node, audit_range, audit_tile, audit_checkpoint TO kme_seq;
GRANT UPDATE (size) ON audit_log TO kme_seq;
GRANT UPDATE ON audit_node TO kme_seq;
GRANT UPDATE (data) ON audit_tile TO kme_seq;
GRANT SELECT ON audit_log, audit_node, audit_range, audit_tile, audit_checkpoint, audit_cosignature TO kme_app;
GRANT INSERT ON audit_cosignature TO kme_app;
GRANT SELECT, INSERT, UPDATE ON audit_witnessed TO kme_app;
GRANT SELECT ON audit_log, audit_node, audit_range, audit_tile, audit_checkpoint, audit_cosignature, audit_witnessed TO kme_auditor;

-- open_audit_day makes the partition of the audit log for day d, if it is missing.
-- Whoever inserts through a role of one node inserts that node's events.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION open_audit_day(d date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp AS $$
DECLARE
    name text := 'audit_d' || to_char(d, 'YYYYMMDD');
BEGIN
    IF to_regclass(name) IS NOT NULL THEN
        RETURN;
    END IF;
    LOCK TABLE audit IN SHARE UPDATE EXCLUSIVE MODE; -- one at a time, as ATTACH would
    IF to_regclass(name) IS NOT NULL THEN
        RETURN;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE audit INCLUDING ALL)', name);
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
    EXECUTE format('CREATE POLICY own_events ON %I FOR INSERT TO kme_app WITH CHECK (audit_writer(node))', name);
    EXECUTE format('CREATE POLICY readers ON %I FOR SELECT TO kme_auditor, kme_seq USING (true)', name);
    EXECUTE format('ALTER TABLE audit ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name, d, d + 1);
    EXECUTE format('GRANT INSERT ON %I TO kme_app', name);
    EXECUTE format('GRANT SELECT ON %I TO kme_auditor, kme_seq', name);
END $$;
-- +goose StatementEnd

-- audit_writer says whether this session may write the events of a node: the role
-- kme_node_NAME those of node NAME; kme_app itself, which a site of one node or a
-- laboratory may use, those of any.
-- +goose StatementBegin
CREATE FUNCTION audit_writer(node text) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT session_user = 'kme_app' OR session_user = 'kme_node_' || node
$$;
-- +goose StatementEnd
REVOKE ALL ON FUNCTION audit_writer(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION audit_writer(text) TO kme_app;

ALTER TABLE audit ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_events ON audit FOR INSERT TO kme_app WITH CHECK (audit_writer(node));
CREATE POLICY readers ON audit FOR SELECT TO kme_auditor, kme_seq USING (true);
