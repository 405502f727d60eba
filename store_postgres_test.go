//go:build postgres

// Tests of what only PostgreSQL does, and the databases in which the other tests run when LLM_PROXY_TEST_DATABASE_URL
// names a server: each has one of its own, a copy of a template with the schema.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"
)

// testDatabaseURL names the variable with the URL of a PostgreSQL server, on which each
// test has a database of its own.
const testDatabaseURL = "LLM_PROXY_TEST_DATABASE_URL"

func usesTestDatabase() bool { return os.Getenv(testDatabaseURL) != "" }

// testDatabases makes databases on the server of the tests. One that a test has left is emptied for the next, because a
// new one costs the server a tenth of a second.
type testDatabases struct {
	once  sync.Once
	err   error
	count atomic.Int64

	mu   sync.Mutex
	free []*testDatabase
	used map[string]*testDatabase // by their URLs
}

// A testDatabase is a database on the server. Its connection is kept: a new one costs the server ten milliseconds.
type testDatabase struct {
	name   string
	db     *sql.DB
	schema string // what readTestSchema returned when it was new
}

var databases = testDatabases{used: map[string]*testDatabase{}}

// testDatabaseName returns the URL of a database on the server.
func testDatabaseName(name string) string {
	u, err := url.Parse(os.Getenv(testDatabaseURL))
	if err != nil {
		panic(err)
	}
	u.Path = "/" + name
	return u.String()
}

func testPostgresConfig(text string) *postgresConfig {
	return &postgresConfig{url: newSecret(text), connections: 5, timeout: 20 * time.Second, version: "test",
		staleLimit: 5 * time.Second, replicaTimeout: 10 * time.Second}
}

// openTestDatabase connects to a database without opening a store.
func openTestDatabase(address string) (*sql.DB, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	connector, err := newPostgresConnector(testPostgresConfig(u.String()), u, nil)
	if err != nil {
		return nil, err
	}
	return sql.OpenDB(connector), nil
}

// execTestServer runs statements outside of any test's database.
func execTestServer(statements ...string) error {
	db, err := openTestDatabase(os.Getenv(testDatabaseURL))
	if err != nil {
		return err
	}
	defer db.Close()
	for _, text := range statements {
		if _, err := db.Exec(text); err != nil {
			return fmt.Errorf("%s: %w", text, err)
		}
	}
	return nil
}

// newTestDatabase returns the URL of an empty database with the schema, which is dropped after the test; "" if there is
// no server.
func newTestDatabase(t testing.TB) string {
	t.Helper()
	if !usesTestDatabase() {
		return ""
	}
	prefix := fmt.Sprintf("llmp_%d_", os.Getpid())
	databases.once.Do(func() {
		if databases.err = execTestServer(`CREATE DATABASE ` + prefix + `template`); databases.err != nil {
			return
		}
		st, err := openPostgres(context.Background(), testPostgresConfig(testDatabaseName(prefix+"template")), true)
		if databases.err = err; err == nil {
			databases.err = st.close()
		}
	})
	if databases.err != nil {
		t.Fatal(databases.err)
	}
	databases.mu.Lock()
	var d *testDatabase
	if n := len(databases.free); n > 0 {
		d, databases.free = databases.free[n-1], databases.free[:n-1]
	}
	databases.mu.Unlock()
	if d == nil {
		var err error
		name := fmt.Sprintf("%s%d", prefix, databases.count.Add(1))
		if d, err = createTestDatabase(name, prefix+"template"); err != nil {
			t.Fatal(err)
		}
	}
	address := testDatabaseName(d.name)
	databases.mu.Lock()
	defer databases.mu.Unlock()
	databases.used[address] = d
	t.Cleanup(func() {
		reusable := d.empty() == nil
		databases.mu.Lock()
		defer databases.mu.Unlock()
		delete(databases.used, address)
		if reusable {
			databases.free = append(databases.free, d)
			return
		}
		d.db.Close()
		if err := execTestServer(`DROP DATABASE ` + d.name + ` WITH (FORCE)`); err != nil {
			t.Error(err)
		}
	})
	return address
}

func createTestDatabase(name, template string) (*testDatabase, error) {
	if err := execTestServer(`CREATE DATABASE ` + name + ` TEMPLATE ` + template); err != nil {
		return nil, err
	}
	db, err := openTestDatabase(testDatabaseName(name))
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	d := &testDatabase{name: name, db: db}
	d.schema, err = readTestSchema(db)
	return d, err
}

// readTestSchema returns a text that is another one after any change of the schema of a database, or of its settings.
func readTestSchema(db querier) (string, error) {
	return queryValue[string](context.Background(), db, "reading what the catalog has", `
		SELECT concat_ws(' ',
			(SELECT sum(xmin::text::bigint) FROM pg_class),
			(SELECT sum(xmin::text::bigint) FROM pg_attribute),
			(SELECT sum(xmin::text::bigint) FROM pg_trigger),
			(SELECT sum(xmin::text::bigint) FROM pg_constraint),
			(SELECT sum(xmin::text::bigint) FROM pg_proc),
			(SELECT sum(xmin::text::bigint) FROM pg_rewrite),
			(SELECT sum(xmin::text::bigint) FROM pg_index),
			(SELECT sum(xmin::text::bigint) FROM pg_description),
			(SELECT version FROM schema_version),
			(SELECT count(*) FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
				WHERE d.datname = current_database()))`)
}

// empty removes all rows from a database that no test uses any more. It returns an error if that cannot be used again:
// its schema was changed.
func (d *testDatabase) empty() error {
	tx, err := d.db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	// The sessions of a process that a test has killed go on for a moment.
	if _, err := tx.Exec(`SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid()`); err != nil {
		return err
	}
	schema, err := readTestSchema(tx)
	if err != nil || schema != d.schema {
		return errors.Join(err, errors.New("its schema was changed"))
	}
	if _, err := tx.Exec(`SET LOCAL session_replication_role = replica; -- without triggers
		DO $$
		DECLARE name text;
		BEGIN
			FOR name IN SELECT quote_ident(tablename) FROM pg_tables
				WHERE schemaname = 'public' AND tablename <> 'schema_version' LOOP
				EXECUTE 'DELETE FROM ' || name;
			END LOOP;
			PERFORM setval(oid, 1, false) FROM pg_class WHERE relkind = 'S' AND relnamespace = 'public'::regnamespace;
		END $$`); err != nil {
		return err
	}
	return tx.Commit()
}

// dumpTestDatabase returns everything in a database, as text.
func dumpTestDatabase(t testing.TB, address string) []byte {
	t.Helper()
	databases.mu.Lock()
	d := databases.used[address]
	databases.mu.Unlock()
	if d == nil {
		db, err := openTestDatabase(address)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		d = &testDatabase{db: db}
	}
	var dump strings.Builder
	for _, table := range []string{"settings", "projects", "upstreams", "upstream_shares", "upstream_health", "tokens",
		"management_keys", "sessions", "audit", "requests", "begun", "usage_sums", "contents", "cache", "background"} {
		rows, err := collect(context.Background(), d.db, "dumping "+table,
			func(row *string) []any { return []any{row} }, `SELECT t::text FROM `+table+` t`)
		if err != nil {
			t.Fatal(err)
		}
		dump.WriteString(strings.Join(rows, "\n"))
	}
	return []byte(dump.String())
}

// requirePostgres skips a test when there is no server.
func requirePostgres(t *testing.T) {
	t.Helper()
	t.Parallel()
	if !usesTestDatabase() {
		t.Skip(testDatabaseURL + " names no server")
	}
}

// TestPostgresConnectionsLost: when the server ends all connections, calls get 503 or 200 but nothing else, the program
// comes back by itself, and each answered call has one row, counted once.
func TestPostgresConnectionsLost(t *testing.T) {
	requirePostgres(t)
	p := newTest(t, nil)
	p.allowErrors = true
	address, err := url.Parse(p.env["DATABASE_URL"])
	if err != nil {
		t.Fatal(err)
	}
	database := strings.TrimPrefix(address.Path, "/")
	answered := 0
	for range 5 {
		if err := execTestServer(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '` + database +
			`'`); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "an answer", func() bool {
			res := p.chat()
			if res.status != 200 && (res.status != 503 || res.header.Get("Retry-After") == "") {
				t.Errorf("got %d %s", res.status, res.body)
			}
			if res.status == 200 {
				answered++
			}
			return res.status == 200
		})
	}
	waitFor(t, "the list of calls", func() bool { // connections that only read were lost, too
		return p.manageAs(p.adminKey, "GET", "/manage/requests?limit=500", "").status == 200
	})
	ok, rows := 0, 0
	for _, row := range p.ledger() {
		if row.Outcome == "ok" {
			ok++
		}
		if row.Outcome != "refused" { // not each of those has a row
			rows++
		}
	}
	var summed int
	if err := p.instance.store.readDB.QueryRow(`SELECT coalesce(sum(calls), 0) FROM usage_sums
		WHERE grain = 'hour' AND token > 0 AND outcome <> 'refused'`).Scan(&summed); err != nil {
		t.Fatal(err)
	}
	if ok != answered || summed != rows {
		t.Errorf("%d calls were answered, %d have a row, %d of %d are in the sums", answered, ok, summed, rows)
	}
}

// TestPostgresTakenOver: a command that needs the database alone is refused while a server has it open. A server that
// lost the database to another process can commit nothing, and ends.
func TestPostgresTakenOver(t *testing.T) {
	requirePostgres(t)
	p := newTest(t, nil)
	p.allowErrors = true
	env := maps.Clone(p.env)
	env["DATA_DIR"] = t.TempDir()
	if _, err := runProgram(t, env, "rekey"); err == nil || !strings.Contains(err.Error(), "another llm-proxy") {
		t.Errorf("a change of the encryption key: %v", err)
	}
	if res := p.chat(); res.status != 200 {
		t.Fatalf("got %d", res.status)
	}
	p.waitSettled()
	p.execSQL(`UPDATE replicas SET epoch = epoch + 1, closed_at = 1`) // as the other's start does
	if res := p.chat(); res.err == nil && (res.status != 503 || res.header.Get("Retry-After") == "") {
		t.Errorf("a call after the database was taken over: %d %s", res.status, res.body)
	}
	res := p.manageAs(p.adminKey, "POST", "/manage/tokens", `{"project_id":"`+p.project+`","name":"x"}`)
	if res.err == nil && res.status != 503 {
		t.Errorf("a change after the database was taken over: %d %s", res.status, res.body)
	}
	if n := len(p.provider.received()); n > 2 {
		t.Errorf("the provider got %d calls", n)
	}
	waitFor(t, "its end", func() bool { return p.chat().err != nil })
	if err := p.stop(); !errors.Is(err, errFenced) {
		t.Errorf("it ended with %v", err)
	}
}

// TestPostgresEditedSchema: a start refuses a schema that was changed by hand, and names what.
func TestPostgresEditedSchema(t *testing.T) {
	requirePostgres(t)
	for statement, want := range map[string]string{
		`CREATE RULE lost AS ON INSERT TO requests DO INSTEAD NOTHING`: "rule lost",
		`ALTER TABLE tokens DROP COLUMN idle_expiry`:                   "column tokens.idle_expiry is missing",
		`DROP INDEX requests_token`:                                    "index requests_token is missing",
		`DROP TRIGGER audit_never_changed ON audit`:                    "trigger audit_never_changed is missing",
		`UPDATE schema_version SET version = 99`:                       "newer llm-proxy",
	} {
		text := newTestDatabase(t)
		st, err := openPostgres(t.Context(), testPostgresConfig(text), true)
		if err != nil {
			t.Fatal(err)
		}
		_, err = st.writeDB.Exec(statement)
		if err = errors.Join(err, st.close()); err != nil {
			t.Fatal(err)
		}
		if _, err = openPostgres(t.Context(), testPostgresConfig(text), true); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", statement, err)
		}
	}
}

// TestPostgresMigratedMeanwhile: a statement that was prepared before a migration works after it, at the latest the
// second time.
func TestPostgresMigratedMeanwhile(t *testing.T) {
	requirePostgres(t)
	text := newTestDatabase(t)
	st, err := openPostgres(t.Context(), testPostgresConfig(text), true)
	if err != nil {
		t.Fatal(err)
	}
	defer st.close()
	read := func() error {
		_, err := collect(t.Context(), st.readDB, "reading", func(name *string) []any { return []any{name, new(any)} },
			`SELECT * FROM settings WHERE name <> ?`, "x")
		return err
	}
	for range 2 { // with each connection of the pool
		if err := read(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := st.writeDB.Exec(`ALTER TABLE settings ALTER COLUMN value TYPE varchar(1000)`); err != nil {
		t.Fatal(err)
	}
	_ = read()
	if err := read(); err != nil {
		t.Error(err)
	}
}

// TestPostgresLongMigration: a migration may take longer than any other statement, and the log says that it runs. A
// start that waits for it waits as for a database that is away.
func TestPostgresLongMigration(t *testing.T) {
	requirePostgres(t)
	text := newTestDatabase(t)
	db, err := openTestDatabase(text)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	old, err := db.BeginTx(t.Context(), nil)
	if err == nil {
		_, err = old.Exec(`DROP SCHEMA public CASCADE; CREATE SCHEMA public`)
		err = errors.Join(err, runPostgresSchema(t.Context(), old, 0, 10), old.Commit())
	}
	if err != nil {
		t.Fatal(err)
	}
	tx, err := db.BeginTx(t.Context(), nil)
	if err == nil {
		_, err = tx.Exec(`LOCK TABLE ledger_commits IN ACCESS SHARE MODE`)
	}
	if err != nil {
		t.Fatal(err)
	}
	var log []string
	config := testPostgresConfig(text)
	config.timeout = time.Second
	config.inform = func(msg string, args ...any) { log = append(log, fmt.Sprint(append([]any{msg}, args...)...)) }
	var migrating sync.WaitGroup
	migrating.Go(func() {
		st, err := openPostgres(t.Context(), config, true)
		if err == nil {
			err = st.close()
		}
		if err != nil {
			t.Errorf("the migration: %v", err)
		}
	})
	waitFor(t, "a statement that waits for longer than any other may", func() bool {
		waiting, err := queryValue[bool](t.Context(), db, "looking for it", `SELECT EXISTS (
			SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
				AND now() - query_start > '6.5 s')`)
		return waiting && err == nil
	})
	if err := tx.Commit(); err != nil {
		t.Error(err)
	}
	migrating.Wait()
	if len(log) != 2 || !strings.Contains(log[0], "migrating the database") ||
		!strings.Contains(log[1], "is migrated") {
		t.Errorf("the log has %q", log)
	}
	if !isDatabaseAway(fmt.Errorf("starting: %w", errLockedOut)) {
		t.Error("a start that waits for another one ends")
	}
}

// TestPostgresCommitUnknown: a transaction whose connection was lost at its commit counts as committed if the server is
// still committing it. A start that fails leaves no connection with a lock.
func TestPostgresCommitUnknown(t *testing.T) {
	requirePostgres(t)
	p := openReplicas(t, newTestDatabase(t), 1)[0]
	row := &requestRow{}
	p.writer.uncertain, p.writer.seq = []*requestRow{row}, 7
	lost, err := p.leases.db.BeginTx(t.Context(), nil)
	if err == nil {
		_, err = lost.Exec(`UPDATE ledger_commits SET seq = 7 WHERE replica = ?1`, p.replica)
	}
	if err != nil {
		t.Fatal(err)
	}
	var asking sync.WaitGroup
	asking.Go(func() {
		if err := p.writer.settleUncertain(t.Context()); err != nil || !p.writer.committed[row] {
			t.Errorf("a transaction that was being committed: %v, %v", p.writer.committed[row], err)
		}
	})
	p.awaitBlocked(t)
	if err := lost.Commit(); err != nil {
		t.Error(err)
	}
	asking.Wait()

	sessions := func() int {
		n, err := queryValue[int](t.Context(), p.store.readDB, "counting locks", `SELECT count(*) FROM pg_locks
			WHERE locktype = 'advisory'
				AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := sessions()
	if _, err := p.store.writeDB.Exec(`UPDATE schema_version SET version = version + 1`); err != nil {
		t.Fatal(err)
	}
	config := *p.config
	if _, err := newPostgres(t.Context(), &config, true); err == nil {
		t.Error("a newer schema was opened")
	}
	waitFor(t, "the locks of a failed start to go", func() bool { return sessions() == before })
}

// awaitBlocked waits until a statement in the database waits for a lock.
func (p *postgres) awaitBlocked(t *testing.T) {
	t.Helper()
	waitFor(t, "a statement to wait", func() bool {
		n, err := queryValue[int](t.Context(), p.store.readDB, "counting waits", `
			SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`)
		return n > 0 && err == nil
	})
}

// TestPostgresAuditAppendOnly: the database itself refuses to change the trail.
func TestPostgresAuditAppendOnly(t *testing.T) {
	requirePostgres(t)
	p := newTest(t, nil)
	for _, text := range []string{
		`UPDATE audit SET actor = 'me' WHERE seq = 1`, `DELETE FROM audit`, `TRUNCATE audit`,
		`INSERT INTO audit SELECT * FROM audit WHERE seq = 1`,
		`INSERT INTO audit SELECT * FROM audit WHERE seq = 1 ON CONFLICT (seq) DO UPDATE SET actor = 'me'`,
	} {
		_, err := p.instance.store.writeDB.ExecContext(t.Context(), text)
		if err == nil || !strings.Contains(err.Error(), "audit trail") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestPostgresColumns: both schemas have the same tables and columns, but for what only one of them needs.
func TestPostgresColumns(t *testing.T) {
	requirePostgres(t)
	file := filepath.Join(t.TempDir(), "x.db")
	mustOverwrite(t, file, "")
	lite, err := openStore(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	defer lite.close()
	st, err := openPostgres(t.Context(), testPostgresConfig(newTestDatabase(t)), false)
	if err != nil {
		t.Fatal(err)
	}
	defer st.close()
	list := func(st *store, query string) []string {
		names, err := collect(t.Context(), st.readDB, "listing columns",
			func(s *string) []any { return []any{s} }, query)
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(names)
		return names
	}
	want := list(lite, `SELECT m.name || '.' || c.name FROM sqlite_schema m JOIN pragma_table_xinfo(m.name) c
		WHERE m.type IN ('table', 'view') AND m.name NOT LIKE 'sqlite_%' AND m.name NOT LIKE '%\_search%' ESCAPE '\'`)
	got := list(st, `SELECT table_name || '.' || column_name FROM information_schema.columns
		WHERE table_schema = current_schema() AND table_name NOT IN ('replicas', 'replica_beats',
			'replica_answers', 'ledger_commits', 'schema_version', 'limit_accounts', 'limit_leases',
			'lease_exchanges') AND column_name NOT IN ('replica', 'slot')`)
	tables := list(lite, `SELECT name FROM sqlite_schema
		WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name NOT LIKE '%\_search%' ESCAPE '\'`)
	for _, table := range copiedTables {
		tables = slices.DeleteFunc(tables, func(name string) bool { return name == table.name })
		words := strings.FieldsFunc(table.read, func(r rune) bool { return !unicode.IsLetter(r) && r != '_' })
		for _, name := range got {
			column, ok := strings.CutPrefix(name, table.name+".")
			if ok && !slices.Contains(words, column) && column != "started_at" && column != "ends_at" { // generated
				t.Errorf("migrate-database does not copy %s", name)
			}
		}
	}
	if len(tables) > 0 {
		t.Errorf("migrate-database does not copy the tables %v", tables)
	}
	if !slices.Equal(got, want) {
		for _, name := range want {
			if !slices.Contains(got, name) {
				t.Errorf("schema/postgres lacks %s", name)
			}
		}
		for _, name := range got {
			if !slices.Contains(want, name) {
				t.Errorf("schema/ lacks %s", name)
			}
		}
	}
}

// TestMigrateDatabase: everything is copied and verified, a copy that was interrupted continues, and no server opens
// it before it is complete.
func TestMigrateDatabase(t *testing.T) {
	requirePostgres(t)
	target := newTestDatabase(t)
	file := filepath.Join(t.TempDir(), "source.db")
	p := newTest(t, map[string]string{"DATABASE_URL": "sqlite:" + file})
	for range 3 {
		if res := p.chat(`"user":"\u0000"`); res.status != 200 {
			t.Fatalf("got %d", res.status)
		}
	}
	_, once := p.newToken(`"name":"once","policy":{"limits":[
		{"count":"requests","max":1,"per":"lifetime","for_each":"end_user"}]}`)
	if _, status := p.sendChat(t.Context(), once, `"n":1`); status != 200 {
		t.Fatalf("got %d", status)
	}
	args := []string{"migrate-database", "--from", "sqlite:" + file, "--to", target}
	if _, err := runProgram(t, p.env, args...); err == nil || !strings.Contains(err.Error(), "another llm-proxy") {
		t.Errorf("with the server running: %v", err)
	}
	rows := len(p.ledger())
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	was := mustReadFile(t, file)
	source, err := openReadOnly(file, false)
	if err != nil {
		t.Fatal(err)
	}
	half, err := openPostgres(t.Context(), testPostgresConfig(target), true)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = copyToPostgres(ctx, source, half, func(table string, _ int64) {
		if table == "audit" {
			cancel()
		}
	})
	if err == nil {
		t.Error("the copy was not interrupted")
	}
	if err := errors.Join(source.close(), half.close()); err != nil {
		t.Fatal(err)
	}
	env := maps.Clone(p.env)
	env["DATABASE_URL"] = target
	if _, err := runProgram(t, env, "serve"); err == nil || !strings.Contains(err.Error(), "unfinished copy") {
		t.Errorf("a start on half a copy: %v", err)
	}
	out, err := runProgram(t, p.env, args...)
	if err != nil || !strings.Contains(out, fmt.Sprintf("requests: %d rows", rows)) {
		t.Fatalf("%v %s", err, out)
	}
	if mustReadFile(t, file) != was {
		t.Error("the source has changed")
	}
	if _, err := runProgram(t, p.env, args...); err == nil || !strings.Contains(err.Error(), "has data already") {
		t.Errorf("a second copy: %v", err)
	}
	p.env["DATABASE_URL"] = target
	p.start()
	if res := p.chat(); res.status != 200 || len(p.ledger()) != rows+1 {
		t.Errorf("after the move: %d, %d rows", res.status, len(p.ledger()))
	}
	if _, status := p.sendChat(t.Context(), once, `"n":1`); status != 429 {
		t.Errorf("what a value had used of a limit is forgotten: got %d", status)
	}
	if p.newToken(`"name":"new"`); len(p.verifyAudit().problems) > 0 {
		t.Errorf("the trail: %v", p.verifyAudit().problems)
	}
}

// TestPostgresStatements: parameters are numbered as SQLite numbers them, and arguments that a statement does not use
// are not sent.
func TestPostgresStatements(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]struct {
		query string
		args  []int
	}{
		`SELECT a FROM b WHERE c = ? AND d = ?`: {`SELECT a FROM b WHERE c = $1 AND d = $2`, []int{0, 1}},
		`SELECT ?2, ?5, ?2`:                     {`SELECT $1, $2, $1`, []int{1, 4}},
		`SELECT '?', "a" -- what?` + "\n, ?":    {`SELECT '?', "a" -- what?` + "\n, $1", []int{0}},
		`SELECT 'it''s ?' || ?3, ?`:             {`SELECT 'it''s ?' || $1, $2`, []int{2, 3}},
		`SELECT 1 -- is that all?`:              {`SELECT 1 -- is that all?`, nil},
	} {
		if q := translateToPostgres(text); q.query != want.query || !slices.Equal(q.args, want.args) {
			t.Errorf("%s: %s %v", text, q.query, q.args)
		}
	}
	for text, want := range map[string]string{
		`["a\u0000b"]`: "[\"a\ufffdb\"]", `["a\\u0000b"]`: `["a\\u0000b"]`, `["\ud800x"]`: "[\"\ufffdx\"]",
		"[\"\xff\"]": "[\"\ufffd\"]", `["\u2028\n"]`: `["\u2028\n"]`, `\u`: "\ufffd",
	} {
		if got := postgresJSON([]byte(text)); got != want {
			t.Errorf("%s: %s", text, got)
		}
	}
}

// TestPostgresURL: a certificate is verified unless the server is this machine's or the URL says otherwise, and no
// message has the password.
func TestPostgresURL(t *testing.T) {
	t.Parallel()
	const password = "pw-canary-9"
	for text, want := range map[string]string{
		"postgres://u:" + password + "@db.example.com/x":                           "verify-full",
		"postgres://u:" + password + "@127.0.0.1/x":                                "disable",
		"postgres://u@localhost/x?host=/run/postgresql":                            "disable",
		"postgres://u:" + password + "@db.example.com/x?sslmode=require":           "warning",
		"postgres://u:" + password + "@db.example.com/x?sslmode=disable":           "warning",
		"postgres://u:" + password + "@db.example.com/x?sslmode=prefer":            "error",
		"postgres://u:" + password + "@db.example.com/x?options=-cfsync=off":       "error",
		"postgres://u:" + password + "@db.example.com":                             "error",
		"postgres://u:" + password + "@db.example.com:x/y":                         "error",
		"postgres://u:" + password + "@db.example.com/x?sslmode=verify-ca&port=no": "error",
	} {
		name, warnings, err := checkPostgresURL(text)
		got := "error"
		if err == nil {
			u, _ := url.Parse(text)
			changed, _ := url.Parse(postgresDSN(u))
			if got = changed.Query().Get("sslmode"); len(warnings) > 0 {
				got = "warning"
			}
		}
		if got != want {
			t.Errorf("%s: %s %v", text, got, err)
		}
		if strings.Contains(fmt.Sprint(name, warnings, err), password) {
			t.Errorf("%s: the password is shown: %s %v %v", text, name, warnings, err)
		}
	}
}
