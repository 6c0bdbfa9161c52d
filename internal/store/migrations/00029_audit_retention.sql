-- +goose Up

-- Up to which migration the audit log tells of the schema's.
ALTER TABLE settings ADD COLUMN schema_told bigint NOT NULL DEFAULT 0;
GRANT UPDATE (schema_told) ON settings TO kme_app;

-- drop_audit_days drops the events of days that are in bundles, all or none, and says
-- where: a bundle for each day and each log that has leaves of it, which are two for a
-- day in which a recovery began another. It refuses a day that is not over for a week, an
-- event that is in no tree, and leaves that no bundle has.
DROP FUNCTION drop_audit_day(bigint, date, bigint, bigint, text, bytea);
-- +goose StatementBegin
CREATE FUNCTION drop_audit_days(days date[], origins bigint[], firsts bigint[], lasts bigint[], files text[], sums bytea[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp SET lock_timeout = '2s' AS $$
DECLARE
    d date;
    name text;
    there bigint;
    leaves bigint;
BEGIN
    INSERT INTO audit_archive (day, origin, first, last, file, sha256) SELECT * FROM unnest(days, origins, firsts, lasts, files, sums);
    FOR d IN SELECT DISTINCT u FROM unnest(days) AS u ORDER BY u LOOP
        name := 'audit_d' || to_char(d, 'YYYYMMDD');
        IF d > current_date - 7 THEN
            RAISE EXCEPTION 'day % is not over for a week', d;
        END IF;
        EXECUTE format('LOCK TABLE %I', name);
        EXECUTE format('SELECT count(*) FROM %I', name) INTO there;
        SELECT coalesce(sum(r.n), 0) INTO leaves FROM audit_range r JOIN audit_archive a ON a.origin = r.origin AND a.day = r.day
            WHERE r.day = d AND r.first >= a.first AND r.first + r.n - 1 <= a.last;
        IF there <> leaves THEN
            RAISE EXCEPTION 'day % has % events, and the bundles % leaves of it', d, there, leaves;
        END IF;
        EXECUTE format('DROP TABLE %I', name);
    END LOOP;
END $$;
-- +goose StatementEnd
REVOKE ALL ON FUNCTION drop_audit_days(date[], bigint[], bigint[], bigint[], text[], bytea[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION drop_audit_days(date[], bigint[], bigint[], bigint[], text[], bytea[]) TO kme_app;

CREATE INDEX audit_range_days ON audit_range (day);
