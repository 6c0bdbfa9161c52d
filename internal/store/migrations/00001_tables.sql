-- +goose Up

CREATE TABLE settings (
    one      boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch_ms bigint NOT NULL CHECK (epoch_ms > 0), -- length of an epoch: fixed for the life of the database
    site     text                                  -- the KME whose database this is; set by the first daemon
);

CREATE TABLE link (
    id       text PRIMARY KEY,
    peer_kme text   NOT NULL,
    my_end   text   NOT NULL CHECK (my_end IN ('alice', 'bob')),
    session  bigint NOT NULL DEFAULT 0             -- the highest ever opened; all lower ones are closed for ever
);

CREATE TABLE session (
    link      text        NOT NULL REFERENCES link,
    id        bigint      NOT NULL,
    opened_at timestamptz NOT NULL,
    closed_at timestamptz,
    PRIMARY KEY (link, id)
);

CREATE TABLE epoch (
    epoch       bigint PRIMARY KEY,
    starts_at   timestamptz NOT NULL,
    ends_at     timestamptz NOT NULL,
    state       text        NOT NULL DEFAULT 'open'
                CHECK (state IN ('open', 'sealed', 'draining', 'destroyed', 'dropped')),
    dropped_due bigint      NOT NULL DEFAULT 0     -- rows of due that went with its partition
);

CREATE TABLE kek (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    epoch       bigint NOT NULL REFERENCES epoch,
    label       text   NOT NULL,
    pkcs11_id   bytea  NOT NULL,
    check_value bytea  NOT NULL,
    state       text   NOT NULL,
    wraps       bigint NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX kek_open ON kek (epoch) WHERE state = 'open';

-- A block's row stays for ever: it answers for the block when its keys are gone.
CREATE TABLE block (
    link       text   NOT NULL REFERENCES link,
    session    bigint NOT NULL,
    id         bigint NOT NULL,
    epoch      bigint NOT NULL REFERENCES epoch,
    atoms      int    NOT NULL CHECK (atoms > 0),
    owners     text   NOT NULL,
    digest     bytea  NOT NULL CHECK (length(digest) = 32),
    provenance text   NOT NULL,
    state      text   NOT NULL CHECK (state IN ('held', 'ready', 'lost')),
    held_at    timestamptz NOT NULL,
    PRIMARY KEY (link, session, id)
);
CREATE INDEX block_held ON block (link) WHERE state = 'held';

-- remaining is at every commit the number of the chunk's rows in key.
CREATE TABLE chunk (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    link      text   NOT NULL,
    session   bigint NOT NULL,
    block     bigint NOT NULL,
    first     int    NOT NULL,
    atoms     int    NOT NULL CHECK (atoms > 0),
    owner     text   NOT NULL CHECK (owner IN ('here', 'peer')),
    remaining int    NOT NULL CHECK (remaining BETWEEN 0 AND atoms),
    epoch     bigint NOT NULL,
    node      text,                                -- who leases it, and in which run
    run       bigint,
    UNIQUE (link, session, block, first),
    FOREIGN KEY (link, session, block) REFERENCES block,
    CHECK ((node IS NULL) = (run IS NULL))
) WITH (fillfactor = 50);
-- No index names remaining: so that counting down stays a heap-only update.
CREATE INDEX chunk_free ON chunk (link, epoch, id) WHERE owner = 'here' AND node IS NULL;

CREATE TABLE key (
    id    uuid   NOT NULL,
    chunk bigint NOT NULL,
    index int    NOT NULL,                         -- of the atom in its block, from 0
    kek   bigint NOT NULL,
    iv    bytea  NOT NULL,
    ct    bytea  NOT NULL,
    PRIMARY KEY (id)
) PARTITION BY RANGE (id);
CREATE INDEX ON key (chunk);

-- One row for each key and SAE, from the assignment until the end of its epoch.
CREATE TABLE due (
    key_id       uuid    NOT NULL,
    sae          text    NOT NULL,
    expiry_epoch bigint  NOT NULL,
    master       text    NOT NULL,
    bits         int     NOT NULL,
    provenance   text    NOT NULL,
    kek          bigint  NOT NULL,
    iv           bytea,
    ct           bytea,                            -- null once it is gone
    peer         text    NOT NULL,                 -- the KME that announced it, '' if made here
    node         text    NOT NULL,                 -- the initiating node, its run and batch
    run          bigint  NOT NULL,
    batch        bigint  NOT NULL,
    atoms        uuid[],                           -- of a key of several atoms
    expires_at   timestamptz NOT NULL,
    reread       boolean NOT NULL,
    gone_at      timestamptz,
    gone_how     text CHECK (gone_how IN ('taken', 'consumed', 'expired', 'void')),
    PRIMARY KEY (key_id, sae, expiry_epoch),
    CHECK ((ct IS NULL) = (gone_at IS NOT NULL) AND (ct IS NULL) = (gone_how IS NOT NULL) AND (ct IS NULL) = (iv IS NULL))
) PARTITION BY LIST (expiry_epoch);

CREATE TABLE parked (
    key_id uuid   PRIMARY KEY,
    node   text   NOT NULL,
    run    bigint NOT NULL,
    batch  bigint NOT NULL,
    since  timestamptz NOT NULL
);

CREATE TABLE void_out (
    id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    peer     text   NOT NULL,
    node     text   NOT NULL,
    run      bigint NOT NULL,
    batch    bigint NOT NULL,
    key_ids  uuid[] NOT NULL,
    acked_at timestamptz
);
CREATE INDEX void_out_pending ON void_out (id) WHERE acked_at IS NULL;

-- The fence of a node's run, the head of its audit chain, and the answer to "did
-- my commit happen?": mark names the last transaction that did.
CREATE TABLE node_run (
    node text   PRIMARY KEY,
    run  bigint NOT NULL,
    mark bigint NOT NULL,
    seq  bigint NOT NULL,
    head bytea  NOT NULL CHECK (length(head) = 32)
) WITH (fillfactor = 10);

CREATE TABLE peer_run (
    peer text   NOT NULL,
    node text   NOT NULL,
    run  bigint NOT NULL,
    last bigint NOT NULL,
    PRIMARY KEY (peer, node)
) WITH (fillfactor = 10);

CREATE TABLE audit (
    day  date   NOT NULL,
    node text   NOT NULL,
    seq  bigint NOT NULL,
    prev bytea  NOT NULL CHECK (length(prev) = 32),
    body text   NOT NULL,
    at   timestamptz NOT NULL,
    PRIMARY KEY (day, node, seq)
) PARTITION BY RANGE (day);
