-- +goose Up

-- end_audit_checkpoints deletes up to n checkpoints of the site's logs that nobody needs
-- any more, and returns how many it has deleted. A busy log makes one a second, which is
-- 31 million a year. What stays of each log are those of the 24 hours before its newest,
-- and of each hour before that the last one, and the last one that each witness has
-- signed. The newest stays whatever the clock says: the rule asks the table alone. Who may
-- call it can delete nothing else.
--
-- One that goes has a later one in its hour, and the last of an hour never goes; so two
-- callers at a time do each other no harm.
-- +goose StatementBegin
CREATE FUNCTION end_audit_checkpoints(n int) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp AS $$
DECLARE
    l record;
    ended int := 0;
    more int;
BEGIN
    FOR l IN SELECT origin, at - interval '24 hours' AS before FROM audit_log JOIN audit_checkpoint USING (origin, size) LOOP
        DELETE FROM audit_checkpoint WHERE (origin, size) IN (
            SELECT c.origin, c.size FROM audit_checkpoint c
            WHERE c.origin = l.origin AND c.at < l.before
                AND date_bin('1 hour', c.at, 'epoch') = (
                    SELECT date_bin('1 hour', d.at, 'epoch') FROM audit_checkpoint d
                    WHERE d.origin = c.origin AND d.size > c.size ORDER BY d.size LIMIT 1)
                AND NOT EXISTS (
                    SELECT FROM audit_cosignature s WHERE s.origin = c.origin AND s.size = c.size
                    AND date_bin('1 hour', c.at, 'epoch') IS DISTINCT FROM (
                        SELECT date_bin('1 hour', d.at, 'epoch') FROM audit_cosignature t JOIN audit_checkpoint d USING (origin, size)
                        WHERE t.origin = s.origin AND t.witness = s.witness AND t.size > s.size ORDER BY t.size LIMIT 1))
            ORDER BY c.size LIMIT n - ended FOR UPDATE OF c SKIP LOCKED);
        GET DIAGNOSTICS more = ROW_COUNT;
        ended := ended + more;
    END LOOP;
    RETURN ended;
END $$;
-- +goose StatementEnd
REVOKE ALL ON FUNCTION end_audit_checkpoints(int) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION end_audit_checkpoints(int) TO kme_app;

CREATE INDEX audit_cosignature_witness ON audit_cosignature (origin, witness, size);
