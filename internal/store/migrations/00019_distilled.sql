-- +goose Up

-- What was seen of each block that was distilled or given up: no secret, for operators.
-- Arrays are by intensity, the brightest first.
CREATE TABLE distilled (
    link        text        NOT NULL REFERENCES link,
    session     bigint      NOT NULL,
    block       bigint      NOT NULL,
    at          timestamptz NOT NULL,
    took_ms     bigint      NOT NULL,
    aborted     text        NOT NULL, -- why it was given up; '' if it was not
    gates       bigint      NOT NULL,
    detected    int         NOT NULL,
    doubles     int         NOT NULL, -- Bob's end alone sees them
    sifted_key  int         NOT NULL,
    sifted_test int         NOT NULL,
    key_bits    int[]       NOT NULL,
    test_bits   int[]       NOT NULL,
    test_errors int[]       NOT NULL,
    key_errors  int[]       NOT NULL,
    qber_test   float8      NOT NULL,
    qber_key    float8      NOT NULL,
    leak        int         NOT NULL,
    efficiency  float8      NOT NULL,
    rounds      int         NOT NULL,
    secret_bits int         NOT NULL,
    PRIMARY KEY (link, session, block)
);
CREATE INDEX ON distilled (link, at);

-- What the blocks of a link add up to in a year (UTC): the chance that any key of it is not
-- secret, and that keys differ or a forgery went unseen.
CREATE TABLE epsilon (
    link    text   NOT NULL REFERENCES link,
    year    int    NOT NULL,
    blocks  bigint NOT NULL,
    secrecy float8 NOT NULL,
    correct float8 NOT NULL,
    PRIMARY KEY (link, year)
) WITH (fillfactor = 20);

GRANT SELECT, INSERT, DELETE ON distilled TO kme_app;
GRANT SELECT, INSERT, UPDATE ON epsilon TO kme_app;
GRANT SELECT ON distilled, epsilon TO kme_auditor;
