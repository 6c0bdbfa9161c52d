-- +goose Up

REVOKE ALL ON FUNCTION epoch_floor(bigint), open_epoch(bigint), drop_epoch(bigint), open_audit_day(date),
    advance_run(text, bigint, bigint, bigint, bytea, bigint, bytea) FROM PUBLIC;
GRANT USAGE ON SCHEMA kme TO kme_app, kme_auditor;

-- The daemon: no DDL but through the functions, and of the audit nothing but INSERT.
GRANT EXECUTE ON FUNCTION open_epoch(bigint), drop_epoch(bigint), open_audit_day(date),
    advance_run(text, bigint, bigint, bigint, bytea, bigint, bytea) TO kme_app;
GRANT SELECT ON goose_db_version, settings, epoch TO kme_app;
GRANT UPDATE (site) ON settings TO kme_app;
GRANT SELECT, INSERT, UPDATE ON link, session, kek, block, chunk, due, void_out, node_run, peer_run TO kme_app;
GRANT SELECT, INSERT, DELETE ON key, parked TO kme_app;
GRANT INSERT ON audit TO kme_app;

-- The auditor: everything but blobs.
GRANT SELECT ON goose_db_version, settings, link, session, epoch, kek, block, chunk, parked, void_out, node_run, peer_run, audit
    TO kme_auditor;
GRANT SELECT (id, chunk, index, kek) ON key TO kme_auditor;
GRANT SELECT (key_id, sae, expiry_epoch, master, bits, provenance, kek, peer, node, run, batch, atoms, expires_at, reread,
    gone_at, gone_how) ON due TO kme_auditor;
