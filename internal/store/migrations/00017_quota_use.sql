-- +goose Up

-- How much of a quota the site's nodes have leased in the newest window of that length.
-- What a node has leased and not used is lost with the window.
CREATE TABLE quota_use (
    subject text   NOT NULL,                       -- an SAE, or a pair of them
    seconds bigint NOT NULL CHECK (seconds > 0),   -- length of a window
    start   bigint NOT NULL,                       -- of the newest, in Unix time
    used    bigint NOT NULL,                       -- leased in it
    granted bigint NOT NULL,                       -- by the last lease
    PRIMARY KEY (subject, seconds)
) WITH (fillfactor = 20);

GRANT SELECT, INSERT, UPDATE ON quota_use TO kme_app;
GRANT SELECT ON quota_use TO kme_auditor;
