// This room opens the database, brings its schema up to date, and runs
// transactions. With its neighbours store_*.go it is the only place with SQL:
// every statement is constant text, and values go in by ? alone.
package main

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

//go:embed schema/*.sql
var schemaFiles embed.FS

// A store is the database: one connection that writes, so that writers queue in
// this process and never meet a lock, and a few that read.
type store struct {
	writeDB      *sql.DB
	readDB       *sql.DB
	chain        *auditChain  // nil until openAudit; without it nothing that is managed can be changed
	lastAuditSeq atomic.Int64 // seq of the newest entry of the trail that this process has committed
}

const readPoolSize = 4

// openStore opens or makes the database in file and migrates it. The file must
// exist (empty is fine): its owner decides on its permissions.
func openStore(ctx context.Context, file string) (*store, error) {
	s := &store{}
	var err error
	if s.writeDB, err = openSQLite(file, 1, "&_pragma=wal_autocheckpoint(2000)"); err != nil {
		return nil, err
	}
	if s.readDB, err = openSQLite(file, readPoolSize, "&_pragma=query_only(1)"); err != nil {
		return nil, err
	}
	if err := s.migrate(ctx); err != nil {
		s.close()
		return nil, fmt.Errorf("database %s: %w", file, err)
	}
	return s, nil
}

// openSQLite makes a pool of n connections. The DSN is code, not data, for
// modernc.org/sqlite runs pragmas from it: only the path varies, escaped.
func openSQLite(file string, n int, extra string) (*sql.DB, error) {
	dsn := "file:" + (&url.URL{Path: file}).EscapedPath() +
		"?_pragma=busy_timeout(2000)&_pragma=journal_mode(wal)&_pragma=synchronous(normal)" +
		"&_pragma=foreign_keys(1)&_txlock=immediate" + extra
	db, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, fmt.Errorf("opening database %s: %w", file, err)
	}
	db.SetMaxOpenConns(n)
	db.SetMaxIdleConns(n)
	return db, nil
}

func (s *store) close() error {
	return errors.Join(s.readDB.Close(), s.writeDB.Close())
}

// migrate runs the schema files that the database has not seen, in order and
// all in one transaction: after a crash it is at the old version or at the new.
func (s *store) migrate(ctx context.Context) error {
	files, err := fs.Glob(schemaFiles, "schema/*.sql")
	if err != nil {
		return fmt.Errorf("listing the schema: %w", err)
	}
	return s.withTx(ctx, func(tx *sql.Tx) error {
		var at int
		if err := tx.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&at); err != nil {
			return fmt.Errorf("reading its version: %w", err)
		}
		if at > len(files) {
			return fmt.Errorf("was made by a newer llm-proxy (schema %d, this binary knows %d); use that one, or restore a backup", at, len(files))
		}
		for i, name := range files[at:] {
			text, err := schemaFiles.ReadFile(name)
			if err != nil {
				return fmt.Errorf("reading %s: %w", name, err)
			}
			if _, err := tx.ExecContext(ctx, string(text)); err != nil {
				return fmt.Errorf("running %s: %w", name, err)
			}
			// A pragma takes no parameter; the value is a counter of ours.
			if _, err := tx.ExecContext(ctx, "PRAGMA user_version = "+strconv.Itoa(at+i+1)); err != nil {
				return fmt.Errorf("setting the version: %w", err)
			}
		}
		return nil
	})
}

// withTx runs do in one write transaction: all of it happens, or nothing.
func (s *store) withTx(ctx context.Context, do func(*sql.Tx) error) error {
	tx, err := s.writeDB.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("beginning a transaction: %w", err)
	}
	defer tx.Rollback() // without effect after Commit
	if err := do(tx); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	return nil
}

var (
	errNotFound = errors.New("no such row")
	errStale    = errors.New("row has changed since it was read")
	errTaken    = errors.New("name is taken")
)

// mapNoRows turns sql.ErrNoRows into errNotFound.
func mapNoRows(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return errNotFound
	}
	return err
}

// mapUniqueViolation turns a violated UNIQUE constraint into errTaken.
func mapUniqueViolation(err error) error {
	if e, ok := errors.AsType[*sqlite.Error](err); ok && e.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE {
		return errTaken
	}
	return err
}

// checkWritable reports whether the database takes a write now.
func (s *store) checkWritable(ctx context.Context) error {
	_, err := s.writeDB.ExecContext(ctx, `
		INSERT INTO settings (name, value) VALUES ('write_check', ?)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value`, strconv.FormatInt(time.Now().UnixMilli(), 10))
	return err
}

// size returns the bytes of the database's pages, and of those that are free.
func (s *store) size(ctx context.Context) (all, free int64, err error) {
	err = s.readDB.QueryRowContext(ctx, `
		SELECT c.page_count * s.page_size, f.freelist_count * s.page_size
		FROM pragma_page_count c, pragma_page_size s, pragma_freelist_count f`).Scan(&all, &free)
	if err != nil {
		return 0, 0, fmt.Errorf("asking for the database's size: %w", err)
	}
	return all, free, nil
}

// setting returns a row of settings, or errNotFound.
func (s *store) setting(ctx context.Context, name string) (string, error) {
	var v string
	err := s.readDB.QueryRowContext(ctx, `SELECT value FROM settings WHERE name = ?`, name).Scan(&v)
	return v, mapNoRows(err)
}

// setSetting writes a row of settings.
func (s *store) setSetting(ctx context.Context, name, value string) error {
	_, err := s.writeDB.ExecContext(ctx, `
		INSERT INTO settings (name, value) VALUES (?, ?)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value`, name, value)
	return err
}

// prefixEnd returns a string above all names that begin with s, so that a search
// by prefix is a range of an index: no UTF-8 has the byte 0xff, and SQLite
// compares bytes.
func prefixEnd(s string) string { return s + "\xff" }

// isDatabaseFailure reports whether err is the database's trouble (locked, full, not
// writable, broken) and not the caller's mistake. It may pass by itself.
func isDatabaseFailure(err error) bool {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		switch e.Code() & 0xff {
		case sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISUSE:
			return false
		}
		return true
	}
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, sql.ErrConnDone)
}

// isRejectedRow reports whether err is the database's verdict on a row, which
// trying again cannot change.
func isRejectedRow(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return false
	}
	code := e.Code() & 0xff
	return code == sqlite3.SQLITE_CONSTRAINT || code == sqlite3.SQLITE_MISMATCH || code == sqlite3.SQLITE_TOOBIG
}

// A sessionRow is a session as stored. name and role are its key's as they are
// now; alive says that the key is neither revoked nor expired. For the key in
// the environment the three are empty: that one is judged elsewhere.
type sessionRow struct {
	hash, proof       []byte
	key, address      string
	createdAt, seenAt int64

	name, role string
	keyValid   bool
}

// maxSessions bounds the sessions of one key: more end the oldest.
const maxSessions = 50

// addSession stores a new session, and drops those that began before old, the
// key's beyond maxSessions, and the one with the hash replaced (nil: none).
func (s *store) addSession(ctx context.Context, by auditOrigin, row *sessionRow, old int64, replaced []byte) error {
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		if _, err := tx.ExecContext(ctx, `DELETE FROM sessions WHERE created_at < ? OR hash = ?`, old, replaced); err != nil {
			return auditEvent{}, fmt.Errorf("ending old sessions: %w", err)
		}
		if _, err := tx.ExecContext(ctx, `
			DELETE FROM sessions WHERE hash IN (SELECT hash FROM sessions WHERE key = ? ORDER BY created_at DESC LIMIT -1 OFFSET ?)`,
			row.key, maxSessions-1); err != nil {
			return auditEvent{}, fmt.Errorf("ending the key's oldest sessions: %w", err)
		}
		_, err := tx.ExecContext(ctx, `
			INSERT INTO sessions (hash, key, proof, address, created_at, seen_at) VALUES (?, ?, ?, ?, ?, ?)`,
			row.hash, row.key, row.proof, row.address, row.createdAt, row.seenAt)
		return auditEvent{action: actionSignIn, object: row.key}, err
	})
}

const sessionColumns = `s.hash, s.key, s.proof, s.address, s.created_at, s.seen_at, coalesce(k.name, ''), coalesce(k.role, ''),
	k.id IS NOT NULL AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > ?1)`

func (s *sessionRow) scan(row interface{ Scan(...any) error }) error {
	return mapNoRows(row.Scan(&s.hash, &s.key, &s.proof, &s.address, &s.createdAt, &s.seenAt, &s.name, &s.role, &s.keyValid))
}

// sessionByHash does not judge whether the session has run out.
func (s *store) sessionByHash(ctx context.Context, hash [32]byte, now int64) (row sessionRow, err error) {
	err = row.scan(s.readDB.QueryRowContext(ctx, `
		SELECT `+sessionColumns+` FROM sessions s LEFT JOIN management_keys k ON k.id = s.key WHERE s.hash = ?2`, now, hash[:]))
	return row, err
}

// sessionsByKey lists a key's sessions that were seen since a time, newest first.
func (s *store) sessionsByKey(ctx context.Context, key string, now, since int64) ([]sessionRow, error) {
	rows, err := s.readDB.QueryContext(ctx, `
		SELECT `+sessionColumns+` FROM sessions s LEFT JOIN management_keys k ON k.id = s.key
		WHERE s.key = ?2 AND s.seen_at >= ?3 ORDER BY s.created_at DESC LIMIT ?4`, now, key, since, maxSessions)
	if err != nil {
		return nil, fmt.Errorf("listing sessions: %w", err)
	}
	defer rows.Close()
	var out []sessionRow
	for rows.Next() {
		var row sessionRow
		if err := row.scan(rows); err != nil {
			return nil, fmt.Errorf("listing sessions: %w", err)
		}
		out = append(out, row)
	}
	return out, rows.Err()
}

// touchSession notes that a session was in use.
func (s *store) touchSession(ctx context.Context, hash []byte, now int64) error {
	_, err := s.writeDB.ExecContext(ctx, `UPDATE sessions SET seen_at = ? WHERE hash = ?`, now, hash)
	return err
}

// endSession ends one session of by's.
func (s *store) endSession(ctx context.Context, by auditOrigin, hash []byte) error {
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		_, err := tx.ExecContext(ctx, `DELETE FROM sessions WHERE hash = ?`, hash)
		return auditEvent{action: actionSignOut, object: by.actorID}, err
	})
}

// endKeySessions ends all sessions of a key.
func (s *store) endKeySessions(ctx context.Context, by auditOrigin, key string) error {
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		res, err := tx.ExecContext(ctx, `DELETE FROM sessions WHERE key = ?`, key)
		if err != nil {
			return auditEvent{}, err
		}
		n, err := res.RowsAffected()
		return auditEvent{actionSignOut, key, []auditField{{"everywhere", true}, {"sessions", n}}}, err
	})
}

// endAllSessions is for a restored database: who signed out since it was made
// must stay so.
func (s *store) endAllSessions(ctx context.Context) error {
	if _, err := s.writeDB.ExecContext(ctx, `DELETE FROM sessions`); err != nil {
		return fmt.Errorf("ending all sessions: %w", err)
	}
	return nil
}
