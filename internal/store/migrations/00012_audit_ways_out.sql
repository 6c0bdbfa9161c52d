-- +goose Up

-- How far each sink has got that the log is sent to.
CREATE TABLE audit_cursor (
    sink   text   PRIMARY KEY,
    origin bigint NOT NULL,
    next   bigint NOT NULL                         -- the first leaf that it has not been sent
);
GRANT SELECT, INSERT, UPDATE ON audit_cursor TO kme_app;
GRANT SELECT ON audit_cursor TO kme_auditor;

-- The days whose events are no more in the database, and the bundles that they are in.
CREATE TABLE audit_archive (
    origin bigint NOT NULL REFERENCES audit_log,
    day    date   NOT NULL,
    first  bigint NOT NULL,                        -- leaves first .. last+1 of the bundle
    last   bigint NOT NULL,
    file   text   NOT NULL,
    sha256 bytea  NOT NULL CHECK (length(sha256) = 32),
    PRIMARY KEY (origin, day)
);
GRANT SELECT ON audit_archive TO kme_app, kme_auditor;

-- drop_audit_day drops the events of a day that are in a bundle, and says where. It
-- refuses a day that is not over for a week, an event that is not in the tree, and
-- leaves that the bundle does not have.
-- +goose StatementBegin
CREATE FUNCTION drop_audit_day(o bigint, d date, f bigint, l bigint, bundle text, sum bytea) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp SET lock_timeout = '2s' AS $$
DECLARE
    name text := 'audit_d' || to_char(d, 'YYYYMMDD');
    there bigint;
    leaves bigint;
BEGIN
    IF d > current_date - 7 THEN
        RAISE EXCEPTION 'day % is not over for a week', d;
    END IF;
    IF to_regclass(name) IS NULL THEN
        RETURN;
    END IF;
    EXECUTE format('LOCK TABLE %I', name);
    EXECUTE format('SELECT count(*) FROM %I', name) INTO there;
    SELECT coalesce(sum(r.n), 0) INTO leaves FROM audit_range r WHERE r.origin = o AND r.day = d AND r.first >= f AND r.first + r.n - 1 <= l;
    IF there <> leaves THEN
        RAISE EXCEPTION 'day % has % events, and the bundle % leaves of it', d, there, leaves;
    END IF;
    INSERT INTO audit_archive (origin, day, first, last, file, sha256) VALUES (o, d, f, l, bundle, sum);
    EXECUTE format('DROP TABLE %I', name);
END $$;
-- +goose StatementEnd
REVOKE ALL ON FUNCTION drop_audit_day(bigint, date, bigint, bigint, text, bytea) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION drop_audit_day(bigint, date, bigint, bigint, text, bytea) TO kme_app;
