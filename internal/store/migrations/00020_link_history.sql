-- +goose Up

-- How each link did, minute by minute, for the operators' pictures: a month of it.
-- It decides nothing. Every node of the site adds what it has seen.
CREATE TABLE link_history (
    link    text             NOT NULL REFERENCES link (id),
    minute  timestamptz      NOT NULL,
    blocks  int              NOT NULL,  -- distilled
    aborts  int              NOT NULL,  -- given up
    qber    double precision NOT NULL,  -- the sum over both
    bits    bigint           NOT NULL,  -- of secret
    here    int              NOT NULL,  -- 256-bit keys that this end may assign, as last seen
    there   int              NOT NULL,  -- those that the other end may
    PRIMARY KEY (link, minute)
);

GRANT SELECT, INSERT, UPDATE, DELETE ON link_history TO kme_app;
GRANT SELECT ON link_history TO kme_auditor;
