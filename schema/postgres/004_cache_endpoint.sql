-- The same as ../022_cache_endpoint.sql.
ALTER TABLE cache ADD COLUMN endpoint text COLLATE "C" NOT NULL DEFAULT '';
