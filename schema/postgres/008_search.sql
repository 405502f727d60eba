-- Search by any part of a name or an id; see schema/023_search.sql. pg_trgm is an extension that a server may lack, so
-- this is an index of the texts' parts of three characters. Letters are folded as the database's locale does.
CREATE FUNCTION search_text(name text, id text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
	AS 'SELECT lower((name || chr(10) || id) COLLATE "default")';
CREATE FUNCTION search_parts(value text) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE
	AS 'SELECT coalesce(array_agg(DISTINCT substr(value, i, 3)), ''{}'') FROM generate_series(1, length(value) - 2) i';
-- The term in a query as SQLite has it: in quotes, with those in it doubled.
CREATE FUNCTION search_term(query text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
	AS 'SELECT lower(replace(substr(query, 2, length(query) - 2), ''""'', ''"'') COLLATE "default")';
CREATE FUNCTION instr(value text, part text) RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE
	AS 'SELECT strpos(value, part)';

CREATE INDEX tokens_search ON tokens USING gin (search_parts(search_text(name, id)));
CREATE FUNCTION token_search(query text) RETURNS TABLE (rowid bigint) LANGUAGE sql STABLE PARALLEL SAFE
	AS 'SELECT seq FROM tokens WHERE search_parts(search_text(name, id)) @> search_parts(search_term(query))
		AND strpos(search_text(name, id), search_term(query)) > 0';
CREATE FUNCTION project_search(query text) RETURNS TABLE (rowid bigint) LANGUAGE sql STABLE PARALLEL SAFE
	AS 'SELECT seq FROM projects WHERE strpos(search_text(name, id), search_term(query)) > 0';
