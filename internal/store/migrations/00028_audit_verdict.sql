-- +goose Up

-- What the sequencer found forged in a log, the first of it; '' while nothing is. Every node
-- of the site reads it, wherever the sequencer runs.
ALTER TABLE audit_log ADD COLUMN forged text NOT NULL DEFAULT '';
GRANT UPDATE (forged) ON audit_log TO kme_seq;
