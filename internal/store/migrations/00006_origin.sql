-- +goose Up

-- A database that was set back to the past serves nothing until it has been recovered.
ALTER TABLE settings
    ADD COLUMN origin    bigint NOT NULL DEFAULT 1 CHECK (origin > 0), -- of the site's account: raised by each recovery
    ADD COLUMN suspended text;                                         -- why nothing may be served; null while it may
GRANT UPDATE (origin, suspended) ON settings TO kme_app;
