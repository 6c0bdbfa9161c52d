-- +goose Up

-- How often the chunk has changed hands.
ALTER TABLE chunk ADD COLUMN grants int NOT NULL DEFAULT 0;

-- Grants of ours, to be told until they are acknowledged. They go with their chunk:
-- of one that has expired nobody needs to know whose it was.
CREATE TABLE grant_out (
    chunk    bigint NOT NULL REFERENCES chunk ON DELETE CASCADE,
    grants   int    NOT NULL,                      -- the chunk's counter, this grant included
    acked_at timestamptz,
    PRIMARY KEY (chunk, grants)
);
CREATE INDEX grant_out_pending ON grant_out (chunk, grants) WHERE acked_at IS NULL;

GRANT SELECT, INSERT, UPDATE ON grant_out TO kme_app;
GRANT SELECT ON grant_out TO kme_auditor;
