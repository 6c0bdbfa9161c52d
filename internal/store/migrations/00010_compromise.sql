-- +goose Up

-- Keys that somebody may know: all whose IDs are of some epochs, of one link or of all.
-- They are burned when done_at is set; whoever finds it missing goes on with it.
CREATE TABLE compromise (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    peer        text   NOT NULL,                   -- the KME that has told of it, '' if an operator here
    act         bigint,                            -- its number there; null if it was decided here
    link        text   NOT NULL,                   -- '' for all
    first_epoch bigint NOT NULL,
    last_epoch  bigint NOT NULL CHECK (last_epoch >= first_epoch),
    chunks      bigint NOT NULL,                   -- the last chunk that there was; those that came later are not meant
    why         text   NOT NULL,
    done_at     timestamptz,
    UNIQUE (peer, act)
);

-- To be told to the other end of each link until it is acknowledged.
CREATE TABLE compromise_out (
    act      bigint NOT NULL REFERENCES compromise,
    link     text   NOT NULL REFERENCES link,
    session  bigint NOT NULL,                      -- the last block that there was: later ones are not meant
    block    bigint NOT NULL,
    acked_at timestamptz,
    PRIMARY KEY (act, link)
);

GRANT SELECT, INSERT, UPDATE ON compromise, compromise_out TO kme_app;
GRANT SELECT ON compromise, compromise_out TO kme_auditor;
