-- +goose Up

-- What the blob of an assigned key is bound to: 1, of those that were assigned before this,
-- without its link and peer; 2, with them. A node of an earlier release does not open a blob
-- of version 2: all nodes of a site have this release before SAEs come again.
ALTER TABLE due ADD COLUMN version smallint NOT NULL DEFAULT 1;
GRANT SELECT (version) ON due TO kme_auditor;

-- The error rate of a block that was given up before it was found, or is not of light, is
-- not known.
ALTER TABLE distilled ALTER COLUMN qber_test DROP NOT NULL;
UPDATE distilled SET qber_test = NULL WHERE qber_test = 0 AND (aborted <> '' OR gates = 0);
