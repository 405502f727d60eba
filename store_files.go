// This file has the SQL about a database as a whole, for the commands that read one beside a running server,
// copy it, restore a backup, or seal its secrets with another key. It never changes the database that a
// server has open.
package main

import (
	"context"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// openReadOnly opens a database that another process may be writing to. Every write through the returned
// store fails. immutable promises that nobody writes to the file: then it is not locked, and no file is
// created beside it.
func openReadOnly(file string, immutable bool) (*store, error) {
	dsn := readOnlyURI(file) + "&_pragma=busy_timeout(5000)"
	if immutable {
		dsn += "&immutable=1"
	}
	db, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, fmt.Errorf("opening database %s: %w", file, err)
	}
	db.SetMaxOpenConns(2)
	return &store{writeDB: db, readDB: db}, nil
}

func readOnlyURI(file string) string {
	return "file:" + (&url.URL{Path: file}).EscapedPath() + "?mode=ro"
}

// A schemaObject is a table, index, view or trigger, as SQLite describes it.
type schemaObject struct{ kind, name, table, definition string }

func listSchema(ctx context.Context, db querier) ([]schemaObject, error) {
	return collect(ctx, db, "reading the schema", func(o *schemaObject) []any {
		return []any{&o.kind, &o.name, &o.table, &o.definition}
	}, `SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_schema WHERE name NOT GLOB 'sqlite_*' ORDER BY name`)
}

// checkSchema compares the schema of the database with the one that the schema files of its version make, and
// returns the differences. With another schema, statements fail that must succeed: the database would reject
// the rows of calls, and limits would not count those.
func checkSchema(ctx context.Context, db querier, version int) (problems []string, err error) {
	model, err := sql.Open("sqlite", "file::memory:")
	if err != nil {
		return nil, fmt.Errorf("making a database to compare with: %w", err)
	}
	defer model.Close()
	model.SetMaxOpenConns(1) // each connection has its own memory
	if err := runSchemaFiles(ctx, model, 0, version); err != nil {
		return nil, err
	}
	expected, err := listSchema(ctx, model)
	if err != nil {
		return nil, err
	}
	found, err := listSchema(ctx, db)
	if err != nil {
		return nil, err
	}
	actual, tables := map[string]schemaObject{}, map[string]bool{}
	for _, o := range found {
		actual[o.name] = o
	}
	for _, o := range expected {
		tables[o.table] = true
		have, ok := actual[o.name]
		if delete(actual, o.name); !ok {
			problems = append(problems, fmt.Sprintf("the %s %s is missing", o.kind, o.name))
		} else if normalizeDefinition(have.definition) != normalizeDefinition(o.definition) {
			problems = append(problems, fmt.Sprintf("the %s %s is different", o.kind, o.name))
		}
	}
	for _, o := range found { // other tables, views and plain indexes change nothing
		_, added := actual[o.name]
		unique := strings.HasPrefix(normalizeDefinition(o.definition), "CREATEUNIQUE")
		if added && tables[o.table] && (o.kind == "trigger" || unique) {
			problems = append(problems, fmt.Sprintf("the %s %s on %s was added", o.kind, o.name, o.table))
		}
	}
	return problems, nil
}

// normalizeDefinition returns a definition without what has no meaning: comments, white space, quotes.
func normalizeDefinition(text string) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		code, _, _ := strings.Cut(line, "--")
		out.WriteString(strings.Join(strings.Fields(strings.ReplaceAll(code, `"`, "")), ""))
	}
	return out.String()
}

// describeSchemaProblems says what differs, and what to do about it.
func describeSchemaProblems(problems []string, version int) error {
	return fmt.Errorf("its schema is not the schema %d of this program (%s): it was changed by hand, or made by a "+
		"development version. Undo a change by hand; otherwise restore a backup, or move the file away to start "+
		"with an empty database", version, clip(strings.Join(problems, ", "), 300))
}

// checkIntegrity runs SQLite's own integrity check and returns the problems that it reports.
func (s *store) checkIntegrity(ctx context.Context) ([]string, error) {
	lines, err := collect(ctx, s.readDB, "checking integrity", func(line *string) []any { return []any{line} },
		`PRAGMA integrity_check(20)`)
	return slices.DeleteFunc(lines, func(line string) bool { return line == "ok" }), err
}

// copyTo writes a consistent copy of the database, as of one moment, to a file that is empty. The store must
// be one from openReadOnly: query_only does not allow VACUUM INTO, although that leaves the source alone.
func (s *store) copyTo(ctx context.Context, file string) error {
	_, err := execCount(ctx, s.readDB, "copying the database", `VACUUM INTO ?`, file)
	return err
}

// rowCounts is how much a database contains.
type rowCounts struct {
	projects, tokens, calls int64
	newestCall              int64 // id of the newest call; 0: none
}

func (s *store) countRows(ctx context.Context) (c rowCounts, err error) {
	err = s.readDB.QueryRowContext(ctx, `
		SELECT (SELECT count(*) FROM projects WHERE deleted_at IS NULL), (SELECT count(*) FROM tokens),
			(SELECT count(*) FROM requests), (SELECT coalesce(max(id), 0) FROM requests)`).
		Scan(&c.projects, &c.tokens, &c.calls, &c.newestCall)
	if err != nil {
		return c, fmt.Errorf("counting rows: %w", err)
	}
	return c, nil
}

// countRunning counts the calls with an id below before that have not ended.
func (s *store) countRunning(ctx context.Context, before int64) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "counting running calls",
		`SELECT count(*) FROM running WHERE batch < ?1 AND id < ?1`, before)
}

// A restoreImpact is what a backup would undo in the database that it is to replace.
type restoreImpact struct {
	revoked             int64 // tokens revoked since
	rotated             int64 // tokens whose value was replaced since: the old one would be valid again
	expiryShortened     int64 // tokens whose expiry was brought forward since
	requestCountLowered int64 // tokens whose request count would become lower
	managementKeys      int64 // management keys revoked, or limited in role or time, since
	deactivated         int64 // projects deactivated or deleted since
	createdSince        int64 // tokens created since, which the backup does not have
}

// attachCurrent attaches the current database, read-only, to the one writing connection of the backup s,
// under the name now. It computes into made_since how many requests each token has made since the backup:
// calls that ended, and those that run in either database, which is where a program may have died.
func (s *store) attachCurrent(ctx context.Context, file string) error {
	_, err := execCount(ctx, s.writeDB, "opening the current database", `ATTACH ? AS now`, readOnlyURI(file))
	if err != nil {
		return err
	}
	// Versions before this view counted a call in its token when it began.
	views, err := queryValue[int](ctx, s.writeDB, "reading the current database",
		`SELECT count(*) FROM now.sqlite_schema WHERE name = 'running'`)
	if err != nil {
		return err
	}
	const head = `
		CREATE TEMP TABLE made_since AS
		SELECT b.id AS id, c.request_count + coalesce(theirs.n, 0) - b.request_count - coalesce(ours.n, 0) AS n
		FROM main.tokens b JOIN now.tokens c ON c.id = b.id
		LEFT JOIN (SELECT token, count(*) AS n FROM main.running GROUP BY token) ours ON ours.token = b.seq
		LEFT JOIN (`
	const tail = `) theirs ON theirs.token = c.seq
		WHERE c.request_count + coalesce(theirs.n, 0) > b.request_count + coalesce(ours.n, 0)`
	query := head + `SELECT NULL AS token, 0 AS n` + tail
	if views > 0 {
		query = head + `SELECT token, count(*) AS n FROM now.running GROUP BY token` + tail
	}
	_, err = execCount(ctx, s.writeDB, "comparing with the current database", query)
	return err
}

// restoreImpact compares the backup s with the current database, after attachCurrent.
func (s *store) restoreImpact(ctx context.Context) (r restoreImpact, err error) {
	err = s.writeDB.QueryRowContext(ctx, `
		WITH alive AS (SELECT b.id, b.hash, b.expires_at, c.revoked_at AS revoked_now, c.hash AS hash_now,
				c.expires_at AS expires_now
			FROM main.tokens b JOIN now.tokens c ON c.id = b.id WHERE b.revoked_at IS NULL)
		SELECT (SELECT count(*) FROM alive WHERE revoked_now IS NOT NULL),
			(SELECT count(*) FROM alive WHERE revoked_now IS NULL AND hash <> hash_now),
			(SELECT count(*) FROM alive WHERE revoked_now IS NULL AND hash = hash_now AND expires_now IS NOT NULL
				AND (expires_at IS NULL OR expires_now < expires_at)),
			(SELECT count(*) FROM alive WHERE revoked_now IS NULL AND id IN (SELECT id FROM temp.made_since)),
			(SELECT count(*) FROM main.management_keys b JOIN now.management_keys c ON c.id = b.id
				WHERE b.revoked_at IS NULL
					AND (c.revoked_at IS NOT NULL OR c.role <> b.role OR c.expires_at IS NOT b.expires_at)),
			(SELECT count(*) FROM main.projects b JOIN now.projects c ON c.id = b.id
				WHERE b.is_active AND NOT c.is_active),
			(SELECT count(*) FROM now.tokens c
				WHERE c.revoked_at IS NULL AND c.id NOT IN (SELECT id FROM main.tokens))`).
		Scan(&r.revoked, &r.rotated, &r.expiryShortened, &r.requestCountLowered, &r.managementKeys, &r.deactivated,
			&r.createdSince)
	if err != nil {
		return r, fmt.Errorf("comparing with the current database: %w", err)
	}
	return r, nil
}

// reapplyRevocations makes the tokens, management keys and projects of the backup s no more valid than they
// are in the current database, after attachCurrent.
func (s *store) reapplyRevocations(ctx context.Context, origin auditOrigin, event auditEvent) error {
	return s.execAudited(ctx, origin, event, []string{`
		UPDATE main.tokens
		SET revoked_at = coalesce(c.revoked_at, ?1), version = main.tokens.version + 1, updated_at = ?1
		FROM now.tokens c
		WHERE c.id = main.tokens.id AND main.tokens.revoked_at IS NULL
			AND (c.revoked_at IS NOT NULL OR c.hash <> main.tokens.hash)`, `
		UPDATE main.tokens SET expires_at = c.expires_at, version = main.tokens.version + 1, updated_at = ?1
		FROM now.tokens c
		WHERE c.id = main.tokens.id AND c.expires_at IS NOT NULL
			AND (main.tokens.expires_at IS NULL OR c.expires_at < main.tokens.expires_at)`, `
		UPDATE main.tokens SET request_count = main.tokens.request_count + m.n FROM temp.made_since m
		WHERE m.id = main.tokens.id`, `
		UPDATE main.management_keys SET revoked_at = c.revoked_at, role = c.role,
			expires_at = c.expires_at, version = main.management_keys.version + 1, updated_at = ?1
		FROM now.management_keys c
		WHERE c.id = main.management_keys.id AND main.management_keys.revoked_at IS NULL AND (c.revoked_at IS NOT NULL
			OR c.role <> main.management_keys.role OR c.expires_at IS NOT main.management_keys.expires_at)`, `
		UPDATE main.projects SET is_active = 0, version = main.projects.version + 1, updated_at = ?1
		FROM now.projects c WHERE c.id = main.projects.id AND main.projects.is_active AND NOT c.is_active`,
	})
}

// revokeAll revokes every token and every management key.
func (s *store) revokeAll(ctx context.Context, origin auditOrigin, event auditEvent) error {
	return s.execAudited(ctx, origin, event, []string{
		`UPDATE tokens SET revoked_at = ?1, version = version + 1, updated_at = ?1 WHERE revoked_at IS NULL`,
		`UPDATE management_keys SET revoked_at = ?1, version = version + 1, updated_at = ?1 WHERE revoked_at IS NULL`,
	})
}

// execAudited runs statements that use the time as ?1, in one audited transaction.
func (s *store) execAudited(ctx context.Context, origin auditOrigin, event auditEvent, statements []string) error {
	return s.withAuditedTx(ctx, origin, func(tx *sql.Tx) (auditEvent, error) {
		for _, statement := range statements {
			if _, err := execCount(ctx, tx, "revoking", statement, origin.at); err != nil {
				return auditEvent{}, err
			}
		}
		return event, nil
	})
}

// attachedAuditHead returns where the audit trail of the current database ends, after attachCurrent; "" if
// that cannot be read.
func (s *store) attachedAuditHead(ctx context.Context) string {
	stored, err := queryValue[string](ctx, s.writeDB, "reading the audit head",
		`SELECT value FROM now.settings WHERE name = 'audit_head'`)
	if err != nil {
		return "" // no database is attached, or it is older than the trail
	}
	return stored[:max(strings.LastIndexByte(stored, ':'), 0)]
}

const actionRekey = "database.rekey"

// sealedSettings are the settings with a sealed value, and what each value is bound to.
func sealedSettings() map[string]string {
	return map[string]string{
		"key_check": keyCheckContext, "audit_key": auditKeyContext, contentKeySetting: contentKeyContext}
}

// countSealedKeys counts the provider keys.
func (s *store) countSealedKeys(ctx context.Context) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "counting provider keys",
		`SELECT count(*) FROM upstreams WHERE length(sealed_key) > 0`)
}

// reseal seals with to what from has sealed: all of it, or nothing. It returns the number of provider keys.
// What the old key sealed is overwritten in the file, because that key may leak later.
func (s *store) reseal(ctx context.Context, origin auditOrigin, from, to *sealer,
	originOf func(baseURL string) (string, error)) (n int64, err error) {
	const doing = "asking for deleted data to be overwritten"
	if _, err := execCount(ctx, s.writeDB, doing, `PRAGMA secure_delete = 1`); err != nil {
		return 0, err
	}
	err = s.withAuditedTx(ctx, origin, func(tx *sql.Tx) (auditEvent, error) {
		for name, aad := range sealedSettings() {
			if err := resealSetting(ctx, tx, name, aad, from, to); err != nil {
				return auditEvent{}, fmt.Errorf("the setting %s: %w", name, err)
			}
		}
		if n, err = resealUpstreams(ctx, tx, from, to, originOf); err != nil {
			return auditEvent{}, err
		}
		return auditEvent{actionRekey, "", []auditField{{"key", [2]string{from.id(), to.id()}}, {"upstreams", n}}}, nil
	})
	return n, err
}

func resealSetting(ctx context.Context, tx *sql.Tx, name, aad string, from, to *sealer) error {
	text, err := queryValue[string](ctx, tx, "reading it", `SELECT value FROM settings WHERE name = ?`, name)
	if errors.Is(err, errNotFound) {
		return nil // not set yet
	}
	if err != nil {
		return err
	}
	sealed, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return errUnseal
	}
	plain, err := from.open(sealed, aad)
	if err != nil {
		return err
	}
	return saveSetting(ctx, tx, name, base64.StdEncoding.EncodeToString(to.seal(plain, aad)))
}

func resealUpstreams(ctx context.Context, tx *sql.Tx, from, to *sealer,
	originOf func(string) (string, error)) (int64, error) {
	all, err := collect(ctx, tx, "reading provider keys", (*upstreamRow).columns,
		selectUpstreams+`WHERE length(sealed_key) > 0 ORDER BY seq`)
	if err != nil {
		return 0, err
	}
	for i := range all {
		u := &all[i]
		origin, err := originOf(u.baseURL)
		if err != nil {
			return 0, fmt.Errorf("upstream %s of project %s: base URL %w", u.id, u.projectID, err)
		}
		aad := sealContext(u.id, u.projectID, origin)
		plain, err := from.open(u.sealedKey, aad)
		if err != nil {
			return 0, fmt.Errorf("upstream %s of project %s: %w; nothing was changed. "+
				"Enter its provider key again, or delete it, then repeat", u.id, u.projectID, err)
		}
		if _, err := execCount(ctx, tx, "writing upstream "+u.id, `
			UPDATE upstreams SET sealed_key = ? WHERE seq = ?`, to.seal(plain, aad), u.seq); err != nil {
			return 0, err
		}
	}
	return int64(len(all)), nil
}
