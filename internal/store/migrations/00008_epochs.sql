-- +goose Up

-- How an epoch ends: open -> sealed -> draining -> destroyed -> dropped. Each step is
-- a function that the daemon calls in the transaction that records it.

-- A KEK is written down before the token is asked for it: if the daemon dies in
-- between, the row tells whose the object in the token is.
ALTER TABLE kek ADD CHECK (state IN ('planned', 'open', 'sealed', 'destroyed'));

-- Which run of which node has, or may have, a copy of a KEK in its session. Destroying
-- the token's object does nothing to copies: they go first. A run that has been taken
-- over has none that could be of use.
CREATE TABLE kek_copy (
    kek  bigint NOT NULL REFERENCES kek,
    node text   NOT NULL,
    run  bigint NOT NULL,
    PRIMARY KEY (kek, node)
);
GRANT SELECT, INSERT, UPDATE, DELETE ON kek_copy TO kme_app;
GRANT SELECT ON kek_copy TO kme_auditor;

-- The steps that wait for a table do not wait for long, since they hold up a node's
-- commits: they say false, and are tried again.

-- seal_epoch lets nothing more into epoch e. When it is committed, every row of e that
-- will ever be is there: whoever was about to add one gets 42501. It says whether it did.
-- +goose StatementBegin
CREATE FUNCTION seal_epoch(e bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp SET lock_timeout = '100ms' AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('kme kek of an epoch', e)); -- as whoever opens a KEK
    PERFORM FROM epoch WHERE epoch = e AND state = 'open' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    EXECUTE format('LOCK TABLE key_e%1$s, due_e%1$s IN SHARE MODE', e);
    EXECUTE format('REVOKE INSERT ON key_e%1$s, due_e%1$s FROM kme_app', e);
    UPDATE epoch SET state = 'sealed' WHERE epoch = e;
    UPDATE kek SET state = 'sealed' WHERE epoch = e AND state = 'open';
    RETURN true;
EXCEPTION WHEN lock_not_available THEN
    RETURN false;
END $$;
-- +goose StatementEnd

-- drain_epoch has the nodes give up their copies of the KEKs of epoch e, if it is
-- sealed and no key in it is alive: since it is sealed none will be. From then on no
-- node may copy one.
-- +goose StatementBegin
CREATE FUNCTION drain_epoch(e bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp SET enable_seqscan = on AS $$
DECLARE
    alive boolean;
BEGIN
    PERFORM FROM epoch WHERE epoch = e AND state = 'sealed' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    EXECUTE format('SELECT EXISTS (SELECT FROM key_e%1$s) OR EXISTS (SELECT FROM due_e%1$s WHERE ct IS NOT NULL)', e) INTO alive;
    IF alive THEN
        RETURN false;
    END IF;
    UPDATE epoch SET state = 'draining' WHERE epoch = e;
    RETURN true;
END $$;
-- +goose StatementEnd

-- hold_kek notes that a node is about to copy a KEK, and says whether it may.
-- +goose StatementBegin
CREATE FUNCTION hold_kek(id bigint, my_node text, my_run bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp AS $$
BEGIN
    -- The lock keeps the epoch from draining until this is committed, and is seen then.
    PERFORM FROM epoch e JOIN kek k ON k.epoch = e.epoch
        WHERE k.id = hold_kek.id AND k.state IN ('open', 'sealed') AND e.state IN ('open', 'sealed') FOR SHARE OF e;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO kek_copy (kek, node, run) VALUES (hold_kek.id, my_node, my_run)
        ON CONFLICT (kek, node) DO UPDATE SET run = excluded.run;
    RETURN true;
END $$;
-- +goose StatementEnd

-- destroy_epoch notes that the KEKs of epoch e are destroyed in the token. It refuses
-- while a run that has not been taken over has a copy.
-- +goose StatementBegin
CREATE FUNCTION destroy_epoch(e bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp AS $$
BEGIN
    PERFORM FROM epoch WHERE epoch = e AND state = 'draining' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF EXISTS (SELECT FROM kek_copy c JOIN kek k ON k.id = c.kek JOIN node_run r ON r.node = c.node WHERE k.epoch = e AND c.run >= r.run) THEN
        RAISE EXCEPTION 'epoch % still has copies of its KEKs', e;
    END IF;
    DELETE FROM kek_copy c USING kek k WHERE k.id = c.kek AND k.epoch = e;
    UPDATE kek SET state = 'destroyed' WHERE epoch = e;
    UPDATE epoch SET state = 'destroyed' WHERE epoch = e;
    RETURN true;
END $$;
-- +goose StatementEnd

-- drop_epoch drops the partitions of epoch e, which is destroyed. due_rows is how many
-- rows go with that of due: counted before, since it takes long and they are all there.
DROP FUNCTION drop_epoch(bigint);
-- +goose StatementBegin
CREATE FUNCTION drop_epoch(e bigint, due_rows bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp SET lock_timeout = '100ms' AS $$
BEGIN
    PERFORM FROM epoch WHERE epoch = e AND state = 'destroyed' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    LOCK TABLE ONLY key, ONLY due; -- as statements through them do, before their partitions
    EXECUTE format('DROP TABLE key_e%1$s, due_e%1$s', e);
    DELETE FROM chunk WHERE epoch = e;
    UPDATE epoch SET state = 'dropped', dropped_due = due_rows WHERE epoch = e;
    RETURN true;
EXCEPTION WHEN lock_not_available THEN
    RETURN false;
END $$;
-- +goose StatementEnd

REVOKE ALL ON FUNCTION seal_epoch(bigint), drain_epoch(bigint), hold_kek(bigint, text, bigint), destroy_epoch(bigint),
    drop_epoch(bigint, bigint) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION seal_epoch(bigint), drain_epoch(bigint), hold_kek(bigint, text, bigint), destroy_epoch(bigint),
    drop_epoch(bigint, bigint) TO kme_app;
