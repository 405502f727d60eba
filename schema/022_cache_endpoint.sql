-- The endpoint's pattern; '': an earlier version stored the answer.
ALTER TABLE cache ADD COLUMN endpoint TEXT NOT NULL DEFAULT '';
