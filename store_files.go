// SQL about a database as a whole, for the commands that look at one beside a
// running server, copy it, or bring a copy back. Nothing here changes the
// database that a server has open.
package main

import (
	"context"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"strings"
)

// openReadOnly opens a database that another process may be writing to. Every
// write through the returned store fails. still says that nobody writes to the
// file: then no lock is taken on it and no file is made beside it.
func openReadOnly(file string, still bool) (*store, error) {
	dsn := readOnlyURI(file) + "&_pragma=busy_timeout(5000)"
	if still {
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

// schemaVersion returns the version that a database is at, and the one that
// this program knows.
func (s *store) schemaVersion(ctx context.Context) (at, known int, err error) {
	files, err := fs.Glob(schemaFiles, "schema/*.sql")
	if err != nil {
		return 0, 0, fmt.Errorf("listing the schema: %w", err)
	}
	if err := s.readDB.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&at); err != nil {
		return 0, 0, fmt.Errorf("reading the schema version: %w", err)
	}
	return at, len(files), nil
}

// checkIntegrity runs SQLite's own integrity check and returns what it complains about.
func (s *store) checkIntegrity(ctx context.Context) ([]string, error) {
	rows, err := s.readDB.QueryContext(ctx, `PRAGMA integrity_check(20)`)
	if err != nil {
		return nil, fmt.Errorf("checking integrity: %w", err)
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		var line string
		if err := rows.Scan(&line); err != nil {
			return nil, fmt.Errorf("checking integrity: %w", err)
		}
		if line != "ok" {
			out = append(out, line)
		}
	}
	return out, rows.Err()
}

// copyTo writes a consistent copy of the database, as of one moment, to a file
// that is empty. The store must be one from openReadOnly: VACUUM INTO is a
// write in the eyes of query_only, though it leaves the source alone.
func (s *store) copyTo(ctx context.Context, file string) error {
	if _, err := s.readDB.ExecContext(ctx, `VACUUM INTO ?`, file); err != nil {
		return fmt.Errorf("copying the database: %w", err)
	}
	return nil
}

// A rowCounts says how much is in a database.
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
		return c, fmt.Errorf("counting: %w", err)
	}
	return c, nil
}

// countRunning counts the calls with an id below before that have not ended.
func (s *store) countRunning(ctx context.Context, before int64) (n int64, err error) {
	if err = s.readDB.QueryRowContext(ctx, `SELECT count(*) FROM running WHERE batch < ?1 AND id < ?1`, before).Scan(&n); err != nil {
		return 0, fmt.Errorf("counting running calls: %w", err)
	}
	return n, nil
}

// A restoreImpact is what a backup would bring back to life, beside the database that
// it is to replace.
type restoreImpact struct {
	revoked             int64 // tokens revoked since
	rotated             int64 // tokens whose value was replaced since: the old one works again
	expiryShortened     int64 // tokens whose end was brought forward since
	requestCountLowered int64 // tokens whose count of requests goes back
	managementKeys      int64 // management keys revoked or cut in role or time since
	deactivated         int64 // projects deactivated or deleted since
	createdSince        int64 // tokens made since, which it does not know
}

// attachCurrent puts a database beside s, on its one writing connection, under
// the name now. It may not be changed through it. What tokens have done since s
// was current is worked out into made_since: calls that ended, and those that run
// in one of the two, which is where a program may have died.
func (s *store) attachCurrent(ctx context.Context, file string) error {
	if _, err := s.writeDB.ExecContext(ctx, `ATTACH ? AS now`, readOnlyURI(file)); err != nil {
		return fmt.Errorf("opening the current database: %w", err)
	}
	var notes int // before there were any, tokens counted a call when it began
	if err := s.writeDB.QueryRowContext(ctx, `SELECT count(*) FROM now.sqlite_schema WHERE name = 'running'`).Scan(&notes); err != nil {
		return fmt.Errorf("reading the current database: %w", err)
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
	if notes > 0 {
		query = head + `SELECT token, count(*) AS n FROM now.running GROUP BY token` + tail
	}
	if _, err := s.writeDB.ExecContext(ctx, query); err != nil {
		return fmt.Errorf("comparing with the current database: %w", err)
	}
	return nil
}

// restoreImpact compares s with the database that attachCurrent put beside it.
func (s *store) restoreImpact(ctx context.Context) (r restoreImpact, err error) {
	err = s.writeDB.QueryRowContext(ctx, `
		WITH alive AS (SELECT b.id, b.hash, b.expires_at, c.revoked_at AS gone, c.hash AS hash_now, c.expires_at AS expires_now
			FROM main.tokens b JOIN now.tokens c ON c.id = b.id WHERE b.revoked_at IS NULL)
		SELECT (SELECT count(*) FROM alive WHERE gone IS NOT NULL),
			(SELECT count(*) FROM alive WHERE gone IS NULL AND hash <> hash_now),
			(SELECT count(*) FROM alive WHERE gone IS NULL AND hash = hash_now AND (expires_at IS NULL OR expires_now < expires_at)
				AND expires_now IS NOT NULL),
			(SELECT count(*) FROM alive WHERE gone IS NULL AND id IN (SELECT id FROM temp.made_since)),
			(SELECT count(*) FROM main.management_keys b JOIN now.management_keys c ON c.id = b.id
				WHERE b.revoked_at IS NULL AND (c.revoked_at IS NOT NULL OR c.role <> b.role OR c.expires_at IS NOT b.expires_at)),
			(SELECT count(*) FROM main.projects b JOIN now.projects c ON c.id = b.id WHERE b.is_active AND NOT c.is_active),
			(SELECT count(*) FROM now.tokens c WHERE c.revoked_at IS NULL AND c.id NOT IN (SELECT id FROM main.tokens))`).
		Scan(&r.revoked, &r.rotated, &r.expiryShortened, &r.requestCountLowered, &r.managementKeys, &r.deactivated, &r.createdSince)
	if err != nil {
		return r, fmt.Errorf("comparing with the current database: %w", err)
	}
	return r, nil
}

// reapplyRevocations makes tokens, management keys and projects of s no more alive
// than they are in the database that attachCurrent put beside it.
func (s *store) reapplyRevocations(ctx context.Context, by auditOrigin, a auditEvent) error {
	return s.execAudited(ctx, by, a, []string{`
		UPDATE main.tokens SET revoked_at = coalesce(c.revoked_at, ?1), version = main.tokens.version + 1, updated_at = ?1
		FROM now.tokens c
		WHERE c.id = main.tokens.id AND main.tokens.revoked_at IS NULL AND (c.revoked_at IS NOT NULL OR c.hash <> main.tokens.hash)`, `
		UPDATE main.tokens SET expires_at = c.expires_at, version = main.tokens.version + 1, updated_at = ?1
		FROM now.tokens c
		WHERE c.id = main.tokens.id AND c.expires_at IS NOT NULL
			AND (main.tokens.expires_at IS NULL OR c.expires_at < main.tokens.expires_at)`, `
		UPDATE main.tokens SET request_count = main.tokens.request_count + m.n FROM temp.made_since m WHERE m.id = main.tokens.id`, `
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
func (s *store) revokeAll(ctx context.Context, by auditOrigin, a auditEvent) error {
	return s.execAudited(ctx, by, a, []string{
		`UPDATE tokens SET revoked_at = ?1, version = version + 1, updated_at = ?1 WHERE revoked_at IS NULL`,
		`UPDATE management_keys SET revoked_at = ?1, version = version + 1, updated_at = ?1 WHERE revoked_at IS NULL`,
	})
}

// execAudited runs statements that take the time as ?1 in one transaction.
func (s *store) execAudited(ctx context.Context, by auditOrigin, a auditEvent, statements []string) error {
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		for _, text := range statements {
			if _, err := tx.ExecContext(ctx, text, by.at); err != nil {
				return auditEvent{}, fmt.Errorf("revoking: %w", err)
			}
		}
		return a, nil
	})
}

// attachedAuditHead returns where the audit trail ends in the database that
// attachCurrent put beside s, "" if that cannot be told.
func (s *store) attachedAuditHead(ctx context.Context) string {
	var stored string
	if err := s.writeDB.QueryRowContext(ctx, `SELECT value FROM now.settings WHERE name = 'audit_head'`).Scan(&stored); err != nil {
		return "" // there is no such database, or it is from before the trail
	}
	return stored[:max(strings.LastIndexByte(stored, ':'), 0)]
}

const actionRekey = "database.rekey"

// sealedSettings are the settings that hold something sealed, with what each is
// bound to.
func sealedSettings() map[string]string {
	return map[string]string{"key_check": keyCheckContext, "audit_key": auditKeyContext, contentKeySetting: contentKeyContext}
}

// countSealedKeys counts the provider keys.
func (s *store) countSealedKeys(ctx context.Context) (n int64, err error) {
	if err = s.readDB.QueryRowContext(ctx, `SELECT count(*) FROM upstreams WHERE length(sealed_key) > 0`).Scan(&n); err != nil {
		return 0, fmt.Errorf("counting provider keys: %w", err)
	}
	return n, nil
}

// reseal seals with to what from has sealed: all of it, or nothing. It returns
// the number of provider keys. What the old key sealed is overwritten in the
// file, for who gets hold of that key later.
func (s *store) reseal(ctx context.Context, by auditOrigin, from, to *sealer, originOf func(baseURL string) (string, error)) (n int64, err error) {
	if _, err := s.writeDB.ExecContext(ctx, `PRAGMA secure_delete = 1`); err != nil {
		return 0, fmt.Errorf("asking for deleted data to be overwritten: %w", err)
	}
	err = s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		for name, bound := range sealedSettings() {
			if err := resealSetting(ctx, tx, name, bound, from, to); err != nil {
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

func resealSetting(ctx context.Context, tx *sql.Tx, name, bound string, from, to *sealer) error {
	var text string
	err := tx.QueryRowContext(ctx, `SELECT value FROM settings WHERE name = ?`, name).Scan(&text)
	if errors.Is(err, sql.ErrNoRows) {
		return nil // not made yet
	}
	if err != nil {
		return err
	}
	sealed, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return errUnseal
	}
	plain, err := from.open(sealed, bound)
	if err != nil {
		return err
	}
	return setSettingTx(ctx, tx, name, base64.StdEncoding.EncodeToString(to.seal(plain, bound)))
}

func resealUpstreams(ctx context.Context, tx *sql.Tx, from, to *sealer, originOf func(string) (string, error)) (int64, error) {
	rows, err := tx.QueryContext(ctx, `
		SELECT `+upstreamColumns+` FROM upstreams u JOIN projects p ON p.seq = u.project WHERE length(u.sealed_key) > 0 ORDER BY u.seq`)
	if err != nil {
		return 0, fmt.Errorf("reading provider keys: %w", err)
	}
	defer rows.Close()
	var all []upstreamRow
	for rows.Next() {
		var u upstreamRow
		if err := u.scan(rows); err != nil {
			return 0, fmt.Errorf("reading provider keys: %w", err)
		}
		all = append(all, u)
	}
	if err := rows.Err(); err != nil {
		return 0, fmt.Errorf("reading provider keys: %w", err)
	}
	for i := range all {
		u := &all[i]
		origin, err := originOf(u.baseURL)
		if err != nil {
			return 0, fmt.Errorf("upstream %s of project %s: base URL %w", u.id, u.projectID, err)
		}
		bound := sealContext(u.id, u.projectID, origin)
		plain, err := from.open(u.sealedKey, bound)
		if err != nil {
			return 0, fmt.Errorf("upstream %s of project %s: %w; nothing was changed. Give it its provider key anew, or delete it, then repeat", u.id, u.projectID, err)
		}
		if _, err := tx.ExecContext(ctx, `UPDATE upstreams SET sealed_key = ? WHERE seq = ?`, to.seal(plain, bound), u.seq); err != nil {
			return 0, fmt.Errorf("writing upstream %s: %w", u.id, err)
		}
	}
	return int64(len(all)), nil
}
