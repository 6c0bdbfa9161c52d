-- +goose Up

-- When a sign of life was shown, by the clock of the server: whoever shows it cannot say.
ALTER TABLE node_beat ADD COLUMN at timestamptz NOT NULL DEFAULT clock_timestamp();
-- +goose StatementBegin
CREATE FUNCTION stamp_beat() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    NEW.at := clock_timestamp();
    RETURN NEW;
END $$;
-- +goose StatementEnd
REVOKE ALL ON FUNCTION stamp_beat() FROM PUBLIC;
CREATE TRIGGER stamp BEFORE INSERT OR UPDATE ON node_beat FOR EACH ROW EXECUTE FUNCTION stamp_beat();

-- disconnect ends the sessions that a node has left which has shown no sign of life for
-- dead_ms, and no less than 3 s; of one that has, none. Sessions that are younger than
-- dead_ms are those of the node's next process. It returns how many older ones are there:
-- those that it ends now too, which are gone when it is called again.
--
-- A session that is at work stays: it might be committing, and a commit that waits for a
-- standby must not be cut short. One of a role of which the owner of this function is no
-- member shows neither whether it is at work nor since when it is there: it stays too.
-- +goose StatementBegin
CREATE FUNCTION disconnect(dead_node text, dead_ms bigint) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp AS $$
DECLARE
    silence interval := greatest(dead_ms, 3000) * interval '1 millisecond';
    silent boolean := NOT EXISTS (SELECT FROM node_beat WHERE node = dead_node AND at > clock_timestamp() - silence);
    s record;
    remaining int := 0;
BEGIN
    FOR s IN SELECT pid, state FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = left('kmed ' || dead_node, 63) AND usename IN ('kme_app', 'kme_node_' || dead_node)
            AND (backend_start IS NULL OR backend_start <= clock_timestamp() - dead_ms * interval '1 millisecond')
    LOOP
        remaining := remaining + 1;
        IF silent AND s.state LIKE 'idle%' THEN
            BEGIN
                PERFORM pg_terminate_backend(s.pid);
            EXCEPTION WHEN insufficient_privilege THEN
                NULL; -- pg_read_all_stats shows what it does not let end
            END;
        END IF;
    END LOOP;
    RETURN remaining;
END $$;
-- +goose StatementEnd
REVOKE ALL ON FUNCTION disconnect(text, bigint) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION disconnect(text, bigint) TO kme_app;
