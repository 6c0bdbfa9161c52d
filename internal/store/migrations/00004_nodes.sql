-- +goose Up

-- A sign of life of each node of the site: beat rises by one a second while its run
-- lives, and is 0 once the run has stopped in order. Not in node_run, whose rows the
-- committers lock.
CREATE TABLE node_beat (
    node text   PRIMARY KEY,
    run  bigint NOT NULL,
    beat bigint NOT NULL
) WITH (fillfactor = 10);
GRANT SELECT, INSERT, UPDATE ON node_beat TO kme_app;
GRANT SELECT ON node_beat TO kme_auditor;

-- What a dead node has leased. It names no column that changes while a chunk is used up.
CREATE INDEX chunk_leased ON chunk (node, run) WHERE node IS NOT NULL;
