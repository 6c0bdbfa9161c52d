-- +goose Up

-- Nonces of approvals that were used, until the approvals would have ended anyway.
CREATE TABLE approval_used (
    nonce   bytea       PRIMARY KEY,
    expires timestamptz NOT NULL
);

GRANT SELECT, INSERT, DELETE ON approval_used TO kme_app;
GRANT SELECT ON approval_used TO kme_auditor;
