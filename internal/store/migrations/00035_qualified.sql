-- +goose Up

-- audit_writer and stamp_beat run with the caller's search_path, in which a role that may
-- create objects somewhere could put an operator or a function of its own. (SET search_path
-- would keep audit_writer from being inlined into the policy of every row.)
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION audit_writer(node text) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT session_user OPERATOR(pg_catalog.=) 'kme_app'::pg_catalog.text
        OR session_user OPERATOR(pg_catalog.=) ('kme_node_'::pg_catalog.text OPERATOR(pg_catalog.||) node)
$$;
CREATE OR REPLACE FUNCTION stamp_beat() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    NEW.at := pg_catalog.clock_timestamp();
    RETURN NEW;
END $$;
-- +goose StatementEnd
