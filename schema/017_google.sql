-- The provider google: Gemini's own API. A CHECK cannot be changed, and a table that others refer to is better not
-- rebuilt, so the column moves: its values, keys and MACs stay what they were.
ALTER TABLE upstreams RENAME COLUMN provider TO provider_before;
ALTER TABLE upstreams ADD COLUMN provider TEXT NOT NULL DEFAULT 'openai'
	CHECK (provider IN ('openai', 'anthropic', 'azure', 'compatible', 'google'));
UPDATE upstreams SET provider = provider_before;
ALTER TABLE upstreams DROP COLUMN provider_before;
