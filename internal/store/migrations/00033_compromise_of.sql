-- +goose Up

-- A compromise that a peer has told of is known by all that it says: one act there may mean
-- several links to here, and acts are numbered anew when the peer's database was set back.
-- Of those that were heard before this the block is not known: heard again, they are burned
-- again.
ALTER TABLE compromise
    ADD COLUMN session bigint, -- the last block that the peer meant; null if it was decided here
    ADD COLUMN block   bigint,
    DROP CONSTRAINT compromise_peer_act_key,
    ADD UNIQUE (peer, act, link, first_epoch, last_epoch, session, block);
CREATE INDEX compromise_pending ON compromise (id) WHERE done_at IS NULL;
