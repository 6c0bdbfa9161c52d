-- +goose Up

-- Callers that are shut out besides what principals.yaml says. A row only takes away:
-- without it the files decide.
CREATE TABLE switched_off (
    principal text        PRIMARY KEY,             -- role/id
    reason    text        NOT NULL CHECK (reason <> ''),
    by_whom   text        NOT NULL,                -- the operator
    since     timestamptz NOT NULL
);

GRANT SELECT, INSERT, DELETE ON switched_off TO kme_app;
GRANT SELECT ON switched_off TO kme_auditor;
