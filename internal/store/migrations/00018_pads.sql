-- +goose Up

-- The reserve: secret bits that authenticate the distillation of blocks to come, each pad
-- for one block, spent in the order of its name. It is sealed as an atom is.
CREATE TABLE pad (
    link    text   NOT NULL,
    session bigint NOT NULL,
    block   bigint NOT NULL,
    index   int    NOT NULL,
    kek     bigint NOT NULL,
    iv      bytea  NOT NULL,
    ct      bytea  NOT NULL,
    PRIMARY KEY (link, session, block, index),
    FOREIGN KEY (link, session, block) REFERENCES block
);

-- What is spent of it: the highest name that is, and how many tags of the peer have been
-- wrong since the last block.
CREATE TABLE link_auth (
    link     text   PRIMARY KEY REFERENCES link,
    session  bigint NOT NULL DEFAULT 0,
    block    bigint NOT NULL DEFAULT 0,
    index    int    NOT NULL DEFAULT 0,
    failures int    NOT NULL DEFAULT 0
);

GRANT SELECT, INSERT, DELETE ON pad TO kme_app;
GRANT SELECT, INSERT, UPDATE ON link_auth TO kme_app;
GRANT SELECT (link, session, block, index, kek) ON pad TO kme_auditor;
GRANT SELECT ON link_auth TO kme_auditor;
