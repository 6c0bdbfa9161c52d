-- +goose Up

-- How many keys of a pair wait to be taken: the sum of n over the nodes. Each node
-- changes its own rows alone, in the transaction that makes or ends rows of due, so
-- that nodes never wait for each other; an n may be below 0, a sum never.
CREATE TABLE untaken (
    slave  text   NOT NULL,
    master text   NOT NULL,
    node   text   NOT NULL,
    n      bigint NOT NULL,
    PRIMARY KEY (slave, master, node)
) WITH (fillfactor = 20);

INSERT INTO untaken (slave, master, node, n)
    SELECT sae, master, '', count(*) FROM due WHERE ct IS NOT NULL GROUP BY sae, master;

GRANT SELECT, INSERT, UPDATE ON untaken TO kme_app;
GRANT SELECT ON untaken TO kme_auditor;
