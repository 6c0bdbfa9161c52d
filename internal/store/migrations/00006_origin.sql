-- +goose Up

-- A database that was set back to the past serves nothing until it has been recovered.
ALTER TABLE settings
    ADD COLUMN origin    bigint NOT NULL DEFAULT 1 CHECK (origin > 0), -- of the site's account: raised by each recovery
    ADD COLUMN suspended text;                                         -- why nothing may be served; null while it may
GRANT UPDATE (origin, suspended) ON settings TO kme_app;

-- What each peer has said of how far its nodes have come: the highest of it.
CREATE TABLE peer_node (
    peer   text   NOT NULL,
    node   text   NOT NULL,
    origin bigint NOT NULL,
    run    bigint NOT NULL,
    seq    bigint NOT NULL,
    head   bytea  NOT NULL CHECK (length(head) = 32),
    PRIMARY KEY (peer, node)
) WITH (fillfactor = 20);

-- What a recovery here leaves to be told to each peer: that all shared keys are gone.
CREATE TABLE burned_out (
    peer     text   NOT NULL,
    origin   bigint NOT NULL,
    acked_at timestamptz,
    PRIMARY KEY (peer, origin)
);

-- Up to which of a peer's recoveries the keys shared with it are gone here too.
CREATE TABLE peer_burned (
    peer   text   PRIMARY KEY,
    origin bigint NOT NULL
);

-- After a recovery the last batch of a run that goes on at a peer is not known.
ALTER TABLE peer_run ADD COLUMN anew boolean NOT NULL DEFAULT false;

GRANT SELECT, INSERT, UPDATE ON peer_node, burned_out, peer_burned TO kme_app;
GRANT SELECT ON peer_node, burned_out, peer_burned TO kme_auditor;
