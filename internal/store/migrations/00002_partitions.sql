-- +goose Up

-- Partitions are made by themselves and then attached: unlike PARTITION OF, that
-- does not wait for readers of the parent.

-- epoch_floor is the smallest key_ID of epoch e (key.MinID).
-- +goose StatementBegin
CREATE FUNCTION epoch_floor(e bigint) RETURNS uuid
LANGUAGE sql STABLE SET search_path = kme, pg_temp AS $$
    SELECT (lpad(to_hex(e * epoch_ms), 12, '0') || repeat('0', 20))::uuid FROM settings
$$;
-- +goose StatementEnd

-- open_epoch makes the partitions of epoch e, and says whether it did.
-- +goose StatementBegin
CREATE FUNCTION open_epoch(e bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp AS $$
BEGIN
    IF e < 0 THEN
        RAISE EXCEPTION 'no epoch %', e;
    END IF;
    INSERT INTO epoch (epoch, starts_at, ends_at)
        SELECT e, to_timestamp(e * epoch_ms / 1000.0), to_timestamp((e + 1) * epoch_ms / 1000.0) FROM settings
        ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE key_e%s (LIKE key INCLUDING ALL)', e);
    EXECUTE format('ALTER TABLE key ATTACH PARTITION key_e%s FOR VALUES FROM (%L) TO (%L)',
        e, epoch_floor(e), epoch_floor(e + 1));
    EXECUTE format('GRANT SELECT, INSERT, DELETE ON key_e%s TO kme_app', e);
    -- The room is for the version that a take leaves in place of the row.
    EXECUTE format('CREATE TABLE due_e%s (LIKE due INCLUDING ALL) WITH (fillfactor = 80)', e);
    EXECUTE format('ALTER TABLE due ATTACH PARTITION due_e%s FOR VALUES IN (%s)', e, e);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON due_e%s TO kme_app', e);
    RETURN true;
END $$;
-- +goose StatementEnd

-- drop_epoch drops the partitions of epoch e. It refuses while a key is in the
-- pool or an assigned one is waiting.
-- +goose StatementBegin
CREATE FUNCTION drop_epoch(e bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp SET lock_timeout = '2s' AS $$
DECLARE
    alive boolean;
BEGIN
    PERFORM FROM epoch WHERE epoch = e AND state <> 'dropped' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    EXECUTE format('LOCK TABLE key_e%s, due_e%s', e, e);
    EXECUTE format('SELECT EXISTS (SELECT FROM key_e%s) OR EXISTS (SELECT FROM due_e%s WHERE ct IS NOT NULL)', e, e)
        INTO alive;
    IF alive THEN
        RAISE EXCEPTION 'epoch % still has keys', e;
    END IF;
    EXECUTE format('UPDATE epoch SET state = ''dropped'', dropped_due = (SELECT count(*) FROM due_e%s) WHERE epoch = %s', e, e);
    EXECUTE format('DROP TABLE key_e%s, due_e%s', e, e);
    DELETE FROM chunk WHERE epoch = e;
END $$;
-- +goose StatementEnd

-- open_audit_day makes the partition of the audit log for day d, if it is missing.
-- +goose StatementBegin
CREATE FUNCTION open_audit_day(d date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp AS $$
DECLARE
    name text := 'audit_d' || to_char(d, 'YYYYMMDD');
BEGIN
    IF to_regclass(name) IS NOT NULL THEN
        RETURN;
    END IF;
    LOCK TABLE audit IN SHARE UPDATE EXCLUSIVE MODE; -- one at a time, as ATTACH would
    IF to_regclass(name) IS NOT NULL THEN
        RETURN;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE audit INCLUDING ALL)', name);
    EXECUTE format('ALTER TABLE audit ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name, d, d + 1);
    EXECUTE format('GRANT INSERT ON %I TO kme_app', name);
    EXECUTE format('GRANT SELECT ON %I TO kme_auditor', name);
END $$;
-- +goose StatementEnd

-- advance_run moves a node's row from one commit to the next. It fails if the run
-- is not the node's any more or if another commit came between, and with it the
-- whole transaction: every transaction of a committer ends with it.
-- +goose StatementBegin
CREATE FUNCTION advance_run(my_node text, my_run bigint, was bigint, is_now bigint, old_head bytea, new_seq bigint, new_head bytea)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE kme.node_run SET mark = is_now, seq = new_seq, head = new_head
        WHERE node = my_node AND run = my_run AND mark = was AND head = old_head;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'node % is fenced: run % at commit % is not its state', my_node, my_run, was USING ERRCODE = 'KME01';
    END IF;
END $$;
-- +goose StatementEnd
