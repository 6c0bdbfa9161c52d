-- +goose Up

-- key_story is what the audit says of one key: the events that name it, since a day.
-- The daemon, which may not read the audit, tells it to an operator who asks for that
-- key.
-- +goose StatementBegin
CREATE FUNCTION key_story(id uuid, since date) RETURNS TABLE (node text, seq bigint, at timestamptz, body text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = kme, pg_temp SET enable_seqscan = on AS $$
    SELECT a.node, a.seq, a.at, a.body FROM audit a WHERE a.day >= since AND strpos(a.body, key_story.id::text) > 0
        ORDER BY a.at, a.node, a.seq LIMIT 1000
$$;
-- +goose StatementEnd
REVOKE ALL ON FUNCTION key_story(uuid, date) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION key_story(uuid, date) TO kme_app, kme_auditor;
