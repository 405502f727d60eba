// SQL for the sessions of /admin. A session whose key was revoked is over
// whether or not its row is still there: sessionByHash reads the key too.
package main

import (
	"context"
	"database/sql"
	"fmt"
)

// A sessionRow is a session as stored. name and role are its key's as they are
// now; alive says that the key is neither revoked nor expired. For the key in
// the environment the three are empty: that one is judged elsewhere.
type sessionRow struct {
	hash, proof       []byte
	key, address      string
	createdAt, seenAt int64

	name, role string
	alive      bool
}

// maxSessions bounds the sessions of one key: more end the oldest.
const maxSessions = 50

// addSession stores a new session, and drops those that began before old, the
// key's beyond maxSessions, and the one with the hash replaced (nil: none).
func (s *store) addSession(ctx context.Context, by origin, row *sessionRow, old int64, replaced []byte) error {
	return s.change(ctx, by, func(tx *sql.Tx) (act, error) {
		if _, err := tx.ExecContext(ctx, `DELETE FROM sessions WHERE created_at < ? OR hash = ?`, old, replaced); err != nil {
			return act{}, fmt.Errorf("ending old sessions: %w", err)
		}
		if _, err := tx.ExecContext(ctx, `
			DELETE FROM sessions WHERE hash IN (SELECT hash FROM sessions WHERE key = ? ORDER BY created_at DESC LIMIT -1 OFFSET ?)`,
			row.key, maxSessions-1); err != nil {
			return act{}, fmt.Errorf("ending the key's oldest sessions: %w", err)
		}
		_, err := tx.ExecContext(ctx, `
			INSERT INTO sessions (hash, key, proof, address, created_at, seen_at) VALUES (?, ?, ?, ?, ?, ?)`,
			row.hash, row.key, row.proof, row.address, row.createdAt, row.seenAt)
		return act{action: actionSignIn, object: row.key}, err
	})
}

const sessionColumns = `s.hash, s.key, s.proof, s.address, s.created_at, s.seen_at, coalesce(k.name, ''), coalesce(k.role, ''),
	k.id IS NOT NULL AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > ?1)`

func (s *sessionRow) scan(row interface{ Scan(...any) error }) error {
	return found(row.Scan(&s.hash, &s.key, &s.proof, &s.address, &s.createdAt, &s.seenAt, &s.name, &s.role, &s.alive))
}

// sessionByHash does not judge whether the session has run out.
func (s *store) sessionByHash(ctx context.Context, hash [32]byte, now int64) (row sessionRow, err error) {
	err = row.scan(s.read.QueryRowContext(ctx, `
		SELECT `+sessionColumns+` FROM sessions s LEFT JOIN management_keys k ON k.id = s.key WHERE s.hash = ?2`, now, hash[:]))
	return row, err
}

// sessionsOf lists a key's sessions that were seen since a time, newest first.
func (s *store) sessionsOf(ctx context.Context, key string, now, since int64) ([]sessionRow, error) {
	rows, err := s.read.QueryContext(ctx, `
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
	_, err := s.write.ExecContext(ctx, `UPDATE sessions SET seen_at = ? WHERE hash = ?`, now, hash)
	return err
}

// endSession ends one session of by's.
func (s *store) endSession(ctx context.Context, by origin, hash []byte) error {
	return s.change(ctx, by, func(tx *sql.Tx) (act, error) {
		_, err := tx.ExecContext(ctx, `DELETE FROM sessions WHERE hash = ?`, hash)
		return act{action: actionSignOut, object: by.actor}, err
	})
}

// endSessions ends all sessions of a key.
func (s *store) endSessions(ctx context.Context, by origin, key string) error {
	return s.change(ctx, by, func(tx *sql.Tx) (act, error) {
		res, err := tx.ExecContext(ctx, `DELETE FROM sessions WHERE key = ?`, key)
		if err != nil {
			return act{}, err
		}
		n, err := res.RowsAffected()
		return act{actionSignOut, key, []fact{{"everywhere", true}, {"sessions", n}}}, err
	})
}

// endAllSessions is for a restored database: who signed out since it was made
// must stay so.
func (s *store) endAllSessions(ctx context.Context) error {
	if _, err := s.write.ExecContext(ctx, `DELETE FROM sessions`); err != nil {
		return fmt.Errorf("ending all sessions: %w", err)
	}
	return nil
}
