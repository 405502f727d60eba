// This file has the SQL of the response cache. Answers come sealed and go sealed: nothing here can read one. cache.go
// decides which are stored, and keeps transactions short, because the ledger shares the writing connection.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
)

// A cacheRow is a cached answer as stored.
type cacheRow struct {
	id             int64 // the first bytes of the cache key
	project, token int64 // token is 0 if the tokens of the project share the answer
	model          string
	storedAt       int64 // unix milliseconds, like the next
	expiresAt      int64
	size           int64 // bytes that count in MAX_CACHE_BYTES
	answer         []byte
}

// anyToken in a cacheFilter stands for the answers that belong to a single token, whichever it is.
const anyToken = -1

// A cacheFilter describes cached answers of one project. Zero values let all answers through.
type cacheFilter struct {
	project      int64
	token        int64 // anyToken: every answer that belongs to a single token
	model        string
	storedBefore int64
}

// cachedAnswer returns the token and the sealed answer of a row that has not expired, or errNotFound.
func (s *store) cachedAnswer(ctx context.Context, id, project, now int64) (token int64, answer []byte, err error) {
	err = s.readDB.QueryRowContext(ctx, `
		SELECT token, answer FROM cache WHERE id = ? AND project = ? AND expires_at > ?`, id, project, now).
		Scan(&token, &answer)
	return token, answer, mapNoRows(err)
}

// addCached stores answers, each in place of an earlier one with the same id.
func (s *store) addCached(ctx context.Context, rows []cacheRow) error {
	return s.withTx(ctx, func(tx *sql.Tx) error {
		insert, err := tx.PrepareContext(ctx, `
			REPLACE INTO cache (id, project, token, model, stored_at, expires_at, used_at, size, answer)
			VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?5, ?7, ?8)`)
		if err != nil {
			return fmt.Errorf("caching answers: %w", err)
		}
		defer insert.Close()
		for i := range rows {
			r := &rows[i]
			if _, err := insert.ExecContext(ctx, r.id, r.project, r.token, r.model, r.storedAt, r.expiresAt, r.size,
				r.answer); err != nil {
				return fmt.Errorf("caching answers: %w", err)
			}
		}
		return nil
	})
}

// touchCached records when answers were used.
func (s *store) touchCached(ctx context.Context, uses map[int64]int64) error {
	return s.withTx(ctx, func(tx *sql.Tx) error {
		for id, at := range uses {
			if _, err := tx.ExecContext(ctx, `UPDATE cache SET used_at = ? WHERE id = ?`, at, id); err != nil {
				return fmt.Errorf("recording the use of cached answers: %w", err)
			}
		}
		return nil
	})
}

// cachedIDs returns up to limit ids of cached answers, and the bytes of all of them.
func (s *store) cachedIDs(ctx context.Context, limit int) (ids []int64, bytes int64, err error) {
	ids, err = collect(ctx, s.readDB, "reading which answers are cached", func(id *int64) []any { return []any{id} },
		`SELECT id FROM cache WHERE project > 0 LIMIT ?`, limit)
	if err != nil {
		return nil, 0, err
	}
	_, bytes, err = s.cacheSize(ctx, 0)
	return ids, bytes, err
}

// cacheSize returns how many answers of a project are stored, and their bytes; 0 stands for all projects.
func (s *store) cacheSize(ctx context.Context, project int64) (entries, bytes int64, err error) {
	query := `SELECT count(*), coalesce(sum(size), 0) FROM cache WHERE project = ?`
	if project == 0 {
		query = `SELECT count(*), coalesce(sum(size), 0) FROM cache WHERE project > ?`
	}
	if err = s.readDB.QueryRowContext(ctx, query, project).Scan(&entries, &bytes); err != nil {
		return 0, 0, fmt.Errorf("reading the size of the cache: %w", err)
	}
	return entries, bytes, nil
}

// A cacheUsage is how much is cached of one project and model.
type cacheUsage struct {
	model          string
	entries, bytes int64
	oldestStoredAt int64
}

const maxCacheModels = 1000

// cacheUsage returns what is cached of a project, by model, the largest share first, up to maxCacheModels.
func (s *store) cacheUsage(ctx context.Context, project, now int64) ([]cacheUsage, error) {
	return collect(ctx, s.readDB, "reading what is cached", func(u *cacheUsage) []any {
		return []any{&u.model, &u.entries, &u.bytes, &u.oldestStoredAt}
	}, `SELECT model, count(*), sum(size), min(stored_at) FROM cache WHERE project = ? AND expires_at > ?
		GROUP BY model ORDER BY 3 DESC LIMIT ?`, project, now, maxCacheModels)
}

// deleteCached deletes up to limit of the answers that f describes, and returns their ids and bytes.
func (s *store) deleteCached(ctx context.Context, f cacheFilter, limit int) (ids []int64, bytes int64, err error) {
	return s.deleteCacheRows(ctx, `
		DELETE FROM cache WHERE id IN (SELECT id FROM cache WHERE project = ?1
			AND (?2 = 0 OR token = ?2 OR ?2 = -1 AND token > 0) AND (?3 = '' OR model = ?3)
			AND (?4 = 0 OR stored_at < ?4) LIMIT ?5)
		RETURNING id, size`, f.project, f.token, f.model, f.storedBefore, limit)
}

// deleteExpiredCached deletes up to limit answers that expire at now or earlier.
func (s *store) deleteExpiredCached(ctx context.Context, now int64, limit int) (ids []int64, bytes int64, err error) {
	return s.deleteCacheRows(ctx, `
		DELETE FROM cache WHERE id IN (SELECT id FROM cache WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)
		RETURNING id, size`, now, limit)
}

// deleteOldestCached deletes the answers that were used longest ago, up to limit.
func (s *store) deleteOldestCached(ctx context.Context, limit int) (ids []int64, bytes int64, err error) {
	return s.deleteCacheRows(ctx, `
		DELETE FROM cache WHERE id IN (SELECT id FROM cache WHERE used_at > 0 ORDER BY used_at LIMIT ?)
		RETURNING id, size`, limit)
}

func (s *store) deleteCacheRows(ctx context.Context, query string, args ...any) (ids []int64, bytes int64, err error) {
	type deleted struct{ id, size int64 }
	rows, err := collect(ctx, s.writeDB, "deleting cached answers", func(d *deleted) []any {
		return []any{&d.id, &d.size}
	}, query, args...)
	for _, r := range rows {
		ids = append(ids, r.id)
		bytes += r.size
	}
	return ids, bytes, err
}

// dropCacheFrom deletes the cached answers from a new backup, which no program has open: they are large, and nobody
// misses them.
func dropCacheFrom(ctx context.Context, file string) error {
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: file}).EscapedPath()+"?_pragma=journal_mode(delete)")
	if err != nil {
		return fmt.Errorf("opening the backup: %w", err)
	}
	db.SetMaxOpenConns(1)
	st := &store{writeDB: db, readDB: db}
	tables, err := queryValue[int](ctx, db, "looking for the cache",
		`SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'cache'`)
	if err == nil && tables > 0 { // otherwise the server is of an earlier version
		err = st.clearCache(ctx)
	}
	return errors.Join(err, db.Close())
}

// clearCache deletes every cached answer of a database that no server has open, and leaves nothing of them in its
// file: a backup has no cache, and a restored database starts with an empty one.
func (s *store) clearCache(ctx context.Context) error {
	if _, err := queryValue[int64](ctx, s.writeDB, "looking for cached answers",
		`SELECT id FROM cache WHERE project > 0 LIMIT 1`); errors.Is(err, errNotFound) {
		return nil
	}
	if _, err := execCount(ctx, s.writeDB, "deleting the cache", `DELETE FROM cache`); err != nil {
		return err
	}
	_, err := execCount(ctx, s.writeDB, "compacting the database", `VACUUM`)
	return err
}
