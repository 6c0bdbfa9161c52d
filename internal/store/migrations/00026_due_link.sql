-- +goose Up

-- The link that the atoms of an assigned key came over, '' if it was made here: several may
-- lead to one peer. Of keys that wait and were assigned before this, it is the peer's only
-- link; otherwise it stays unknown.
ALTER TABLE due ADD COLUMN link text NOT NULL DEFAULT '';
UPDATE due SET link = (SELECT CASE count(*) WHEN 1 THEN min(id) ELSE '' END FROM link WHERE peer_kme = due.peer)
    WHERE ct IS NOT NULL AND peer <> '';
GRANT SELECT (link) ON due TO kme_auditor;
