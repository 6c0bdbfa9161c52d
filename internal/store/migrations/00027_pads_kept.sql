-- +goose Up

-- A pad lives as long as it is not spent: before an epoch ends, those that are sealed under
-- its KEKs are sealed under the present one. Those of which nothing can come go.
DELETE FROM pad p USING block b WHERE b.link = p.link AND b.session = p.session AND b.id = p.block AND b.state = 'lost';
DELETE FROM pad p USING kek k WHERE k.id = p.kek AND k.state = 'destroyed';
GRANT UPDATE (kek, iv, ct) ON pad TO kme_app;

-- drain_epoch has the nodes give up their copies of the KEKs of epoch e, if it is
-- sealed and no key in it is alive, nor a pad under them: since it is sealed none will be.
-- From then on no node may copy one.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION drain_epoch(e bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = kme, pg_temp SET enable_seqscan = on AS $$
DECLARE
    alive boolean;
BEGIN
    PERFORM FROM epoch WHERE epoch = e AND state = 'sealed' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    EXECUTE format('SELECT EXISTS (SELECT FROM key_e%1$s) OR EXISTS (SELECT FROM due_e%1$s WHERE ct IS NOT NULL)', e) INTO alive;
    IF alive OR EXISTS (SELECT FROM pad p JOIN kek k ON k.id = p.kek WHERE k.epoch = e) THEN
        RETURN false;
    END IF;
    UPDATE epoch SET state = 'draining' WHERE epoch = e;
    RETURN true;
END $$;
-- +goose StatementEnd

-- Blocks of a minute whose error rate was not found.
ALTER TABLE link_history ADD COLUMN unrated int NOT NULL DEFAULT 0;
