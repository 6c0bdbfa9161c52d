-- +goose Up

-- Of a block whose keys a device handed out (ETSI GS QKD 014): the names that it has for
-- them, by index.
ALTER TABLE block ADD COLUMN upstream uuid[] CHECK (array_length(upstream, 1) = atoms);
