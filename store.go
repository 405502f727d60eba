// This file opens the database, brings its schema up to date, runs transactions, and holds the helpers with
// which store_*.go reads rows. The statements are for SQLite and PostgreSQL alike; store_postgres.go has the rest
// of what PostgreSQL needs. It also has the tables of the program itself: settings, sessions and the
// health of upstreams. Only store*.go has SQL: every statement is constant text, and values are passed by ?.
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
	"sync"
	"sync/atomic"
	"time"

	"modernc.org/sqlite"
)

//go:embed schema/*.sql
var schemaFiles embed.FS

// A store is the database: one connection that writes, so that writers queue in this process and never find
// the database locked, and a few that read.
type store struct {
	writeDB      *sql.DB
	readDB       *sql.DB
	chain        *auditChain  // nil until openAudit; without it, nothing that administrators manage can be changed
	lastAuditSeq atomic.Int64 // seq of the newest audit entry that this process has committed
	// reportForeignRow is called with each row that is refused, because this program did not write it; may be nil
	reportForeignRow func(*foreignRowError)
	backend          *backend      // nil: SQLite
	reports          chan struct{} // has an entry for each report on attributes that runs; nil: they are not bounded
}

const readPoolSize = 4

// openDatabase opens the database of a server: PostgreSQL if pg is not nil, or a file for openStore.
func openDatabase(ctx context.Context, file string, pg *postgresConfig) (*store, error) {
	if pg == nil {
		return openStore(ctx, file)
	}
	s, err := openPostgres(ctx, pg, true)
	if err != nil {
		return nil, err
	}
	if _, err = s.setting(ctx, copySourceSetting); errors.Is(err, errNotFound) {
		return s, nil
	}
	if err == nil {
		err = errors.New("the database is an unfinished copy; finish it with llm-proxy migrate-database")
	}
	return nil, errors.Join(err, s.close())
}

// copySourceSetting is in a database that llm-proxy migrate-database is copying another into. It identifies that one.
const copySourceSetting = "copy_source"

// openStore opens or creates the database in file and migrates it. The file must exist (it may be empty): the
// caller decides on its permissions.
func openStore(ctx context.Context, file string) (*store, error) {
	s := &store{reports: make(chan struct{}, maxReports)}
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

// openSQLite makes a pool of n connections. The DSN is code, not data, because modernc.org/sqlite runs
// pragmas from it: only the path varies, and it is escaped.
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
	var err error
	if s.backend != nil {
		err = s.backend.close()
	}
	return errors.Join(err, s.readDB.Close(), s.writeDB.Close())
}

// migrate runs the schema files that the database has not seen yet, in order and in one transaction: after a
// crash it is at the old version or at the new one.
func (s *store) migrate(ctx context.Context) error {
	return s.withTx(ctx, func(tx *sql.Tx) error {
		version, supported, err := schemaVersion(ctx, tx)
		if err != nil {
			return err
		}
		if version > supported {
			return fmt.Errorf("was made by a newer llm-proxy (schema %d, this binary supports %d); "+
				"use that one, or restore a backup", version, supported)
		}
		// The check before is enough: schema files make a correct schema of a correct one.
		problems, err := checkSchema(ctx, tx, version)
		if err != nil {
			return err
		}
		if len(problems) > 0 {
			return describeSchemaProblems(problems, version)
		}
		return runSchemaFiles(ctx, tx, version, supported)
	})
}

// schemaVersion returns the version of a database, and the one that this program supports.
func schemaVersion(ctx context.Context, db querier) (version, supported int, err error) {
	files, err := fs.Glob(schemaFiles, "schema/*.sql")
	if err != nil {
		return 0, 0, fmt.Errorf("listing the schema: %w", err)
	}
	version, err = queryValue[int](ctx, db, "reading the schema version", `PRAGMA user_version`)
	return version, len(files), err
}

func (s *store) schemaVersion(ctx context.Context) (version, supported int, err error) {
	if s.backend != nil {
		return s.backend.version(ctx)
	}
	return schemaVersion(ctx, s.readDB)
}

// runSchemaFiles migrates from one version to another.
func runSchemaFiles(ctx context.Context, db querier, from, to int) error {
	files, err := fs.Glob(schemaFiles, "schema/*.sql")
	if err != nil {
		return fmt.Errorf("listing the schema: %w", err)
	}
	for i := from; i < to; i++ {
		text, err := schemaFiles.ReadFile(files[i])
		if err != nil {
			return fmt.Errorf("reading %s: %w", files[i], err)
		}
		if _, err := db.ExecContext(ctx, string(text)); err != nil {
			return fmt.Errorf("running %s: %w", files[i], err)
		}
		// A pragma takes no parameter; the value is our own counter.
		if _, err := db.ExecContext(ctx, "PRAGMA user_version = "+strconv.Itoa(i+1)); err != nil {
			return fmt.Errorf("setting the version: %w", err)
		}
	}
	return nil
}

// currentSchema is what schemaOf returns for the version of this program. It is made once: the schema files take longer
// than all else at a start.
var currentSchema = sync.OnceValues(func() ([]schemaObject, error) {
	files, err := fs.Glob(schemaFiles, "schema/*.sql")
	if err != nil {
		return nil, fmt.Errorf("listing the schema: %w", err)
	}
	return schemaOf(context.Background(), len(files))
})

// schemaOf returns what the schema files of a version make.
func schemaOf(ctx context.Context, version int) ([]schemaObject, error) {
	model, err := sql.Open("sqlite", "file::memory:")
	if err != nil {
		return nil, fmt.Errorf("making a database to compare with: %w", err)
	}
	defer model.Close()
	model.SetMaxOpenConns(1) // each connection has its own memory
	if err := runSchemaFiles(ctx, model, 0, version); err != nil {
		return nil, err
	}
	return listSchema(ctx, model)
}

// withTx runs fn in one write transaction: all of it takes effect, or nothing.
func (s *store) withTx(ctx context.Context, fn func(*sql.Tx) error) error {
	return s.withWriteTx(ctx, false, fn)
}

// withWriteTx is withTx; one that is audited runs alone.
func (s *store) withWriteTx(ctx context.Context, audited bool, fn func(*sql.Tx) error) error {
	tx, err := s.writeDB.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("beginning a transaction: %w", err)
	}
	defer tx.Rollback() // without effect after Commit
	if s.backend != nil {
		if err := s.backend.startTx(ctx, tx, audited); err != nil {
			return err
		}
	}
	if err := fn(tx); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	return nil
}

// A querier runs statements: a pool or a transaction.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

// collect returns the rows of a query. columns returns pointers to the fields of a T that take a row's
// columns, in their order. doing describes the operation in an error.
func collect[T any](ctx context.Context, db querier, doing string, columns func(*T) []any,
	query string, args ...any) (out []T, err error) {
	rows, err := db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	defer rows.Close()
	for rows.Next() {
		var row T
		if err := rows.Scan(columns(&row)...); err != nil {
			return nil, fmt.Errorf("%s: %w", doing, err)
		}
		out = append(out, row)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	return out, nil
}

// collectMap returns the rows of a query with two columns by the first of these.
func collectMap[K comparable, V any](ctx context.Context, db querier, doing, query string, args ...any,
) (map[K]V, error) {
	type entry struct {
		key   K
		value V
	}
	rows, err := collect(ctx, db, doing, func(e *entry) []any { return []any{&e.key, &e.value} }, query, args...)
	out := make(map[K]V, len(rows))
	for _, e := range rows {
		out[e.key] = e.value
	}
	return out, err
}

// single is the columns of a row of one column.
func single[T any](value *T) []any { return []any{value} }

// queryRow returns the first row of a query, or errNotFound. columns is as for collect.
func queryRow[T any](ctx context.Context, db querier, columns func(*T) []any,
	query string, args ...any) (row T, err error) {
	err = db.QueryRowContext(ctx, query, args...).Scan(columns(&row)...)
	return row, mapNoRows(err)
}

// queryValue returns the only column of the first row of a query, or an error that wraps errNotFound.
func queryValue[T any](ctx context.Context, db querier, doing, query string, args ...any) (value T, err error) {
	if err := db.QueryRowContext(ctx, query, args...).Scan(&value); err != nil {
		return value, fmt.Errorf("%s: %w", doing, mapNoRows(err))
	}
	return value, nil
}

// scanRow reads the columns of the first row of a query into pointers, or returns an error that wraps errNotFound.
func scanRow(ctx context.Context, db querier, doing string, into []any, query string, args ...any) error {
	if err := db.QueryRowContext(ctx, query, args...).Scan(into...); err != nil {
		return fmt.Errorf("%s: %w", doing, mapNoRows(err))
	}
	return nil
}

// execute runs a statement.
func execute(ctx context.Context, db querier, doing, query string, args ...any) error {
	_, err := execCount(ctx, db, doing, query, args...)
	return err
}

// execEach runs statements, each with the same arguments, and returns how many rows they changed together.
func execEach(ctx context.Context, db querier, doing string, statements []string, args ...any) (n int64, err error) {
	for _, statement := range statements {
		changed, err := execCount(ctx, db, doing, statement, args...)
		if n += changed; err != nil {
			return n, err
		}
	}
	return n, nil
}

// execCount runs a statement and returns how many rows it changed.
func execCount(ctx context.Context, db querier, doing, query string, args ...any) (int64, error) {
	res, err := db.ExecContext(ctx, query, args...)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", doing, err)
	}
	return res.RowsAffected()
}

var (
	errNotFound = errors.New("no such row")
	errStale    = errors.New("row has changed since it was read")
	errTaken    = errors.New("name is taken")
	// errFenced means that another process has closed this one's row, because it did not answer or has to be alone.
	errFenced = errors.New("another llm-proxy has closed this one, which may not write any more; start it again")
	// errRowIgnored means that a statement succeeded without writing its rows, as a trigger can bring about.
	errRowIgnored = errors.New("the database ignored a row")
)

// mapNoRows turns sql.ErrNoRows into errNotFound.
func mapNoRows(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return errNotFound
	}
	return err
}

// sqliteCode returns the extended result code of the SQLite error in err, 0 if there is none.
func sqliteCode(err error) int {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code()
	}
	return 0
}

// size returns the bytes of the database's pages, and of those that are free.
func (s *store) size(ctx context.Context) (all, free int64, err error) {
	if s.backend != nil {
		all, err = s.backend.size(ctx)
		return all, 0, err
	}
	err = scanRow(ctx, s.readDB, "reading the database's size", []any{&all, &free}, `
		SELECT c.page_count * s.page_size, f.freelist_count * s.page_size
		FROM pragma_page_count c, pragma_page_size s, pragma_freelist_count f`)
	return all, free, err
}

// setting returns a setting, or errNotFound.
func (s *store) setting(ctx context.Context, name string) (value string, err error) {
	err = s.readDB.QueryRowContext(ctx, `SELECT value FROM settings WHERE name = ?`, name).Scan(&value)
	return value, mapNoRows(err)
}

func (s *store) setSetting(ctx context.Context, name, value string) error {
	return saveSetting(ctx, s.writeDB, name, value)
}

const upsertSetting = `INSERT INTO settings (name, value) VALUES (?, ?)
	ON CONFLICT (name) DO UPDATE SET value = excluded.value`

func saveSetting(ctx context.Context, db querier, name, value string) error {
	if _, err := db.ExecContext(ctx, upsertSetting, name, value); err != nil {
		return fmt.Errorf("writing the setting %s: %w", name, err)
	}
	return nil
}

func (s *store) deleteSetting(ctx context.Context, name string) error {
	return execute(ctx, s.writeDB, "deleting the setting "+name, `DELETE FROM settings WHERE name = ?`, name)
}

// checkWritable returns an error if the database cannot be written now.
func (s *store) checkWritable(ctx context.Context) error {
	return s.setSetting(ctx, "write_check", strconv.FormatInt(time.Now().UnixMilli(), 10))
}

// prefixEnd returns a string above all names that begin with s, so that a search by prefix is a range of an
// index: databases compare bytes, and no character has larger ones.
func prefixEnd(s string) string { return s + "\U0010ffff" }

// touchSession records that a session was used.
func (s *store) touchSession(ctx context.Context, hash []byte, now int64) error {
	_, err := s.writeDB.ExecContext(ctx, `UPDATE sessions SET seen_at = ? WHERE hash = ?`, now, hash)
	return err
}

// endAllSessions is for a restored database: a session that was ended after the backup must not come back.
func (s *store) endAllSessions(ctx context.Context) error {
	return execute(ctx, s.writeDB, "ending all sessions", `DELETE FROM sessions`)
}

// setHealth stores an upstream's health; a row that is ready is deleted. A state that needs attention, or no
// longer does, is put into the audit trail in the same transaction. reported is the state that the trail has.
func (s *store) setHealth(ctx context.Context, now int64, r *healthRow, reported keyState) error {
	stored := *r
	stored.until, stored.changedAt = r.until+s.clockOffset(), r.changedAt+s.clockOffset()
	if !r.state.needsAttention() && !reported.needsAttention() || r.state == reported {
		return s.withTx(ctx, func(tx *sql.Tx) error { return saveHealth(ctx, tx, &stored) })
	}
	detail := []auditField{{"state", [2]string{reported.String(), r.state.String()}}, {"reason", r.reason}}
	return s.withAuditedTx(ctx, auditOrigin{actorID: actorSystem, at: now}, func(tx *auditedTx) (auditEvent, error) {
		return auditEvent{"upstream.health", r.id, detail}, saveHealth(ctx, tx, &stored)
	})
}

func saveHealth(ctx context.Context, tx querier, r *healthRow) error {
	if r.state == keyReady {
		_, err := tx.ExecContext(ctx, `DELETE FROM upstream_health WHERE upstream = ?`, r.upstream)
		return err
	}
	_, err := tx.ExecContext(ctx, `
		INSERT INTO upstream_health (upstream, state, until, strikes, reason, changed_at) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT (upstream) DO UPDATE SET state = excluded.state, until = excluded.until,
			strikes = excluded.strikes, reason = excluded.reason, changed_at = excluded.changed_at`,
		r.upstream, r.state.String(), r.until, r.strikes, r.reason, r.changedAt)
	return err
}
