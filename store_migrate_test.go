// Tests of migrations that are interrupted: after any statement, the next start finishes what was begun, or refuses
// the database and says what to do.
package main

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A schemaStatement is one statement of a schema file.
type schemaStatement struct {
	file string
	text string
}

// schemaStatements returns the statements of the schema files after version from, each file's followed by the one
// that sets the version.
func schemaStatements(t *testing.T, from int) (out []schemaStatement) {
	t.Helper()
	names, err := filepath.Glob("schema/*.sql")
	if err != nil || len(names) <= from {
		t.Fatal(names, err)
	}
	for i, name := range names[from:] {
		var text strings.Builder
		for line := range strings.Lines(mustReadFile(t, name)) {
			code, _, _ := strings.Cut(line, "--")
			text.WriteString(strings.TrimRight(code, " \n") + "\n")
			code = strings.TrimSpace(code)
			inTrigger := strings.Contains(text.String(), "CREATE TRIGGER") && code != "END;"
			if strings.HasSuffix(code, ";") && !inTrigger {
				out = append(out, schemaStatement{name, text.String()})
				text.Reset()
			}
		}
		if strings.TrimSpace(text.String()) != "" {
			t.Fatalf("%s ends with %q", name, text.String())
		}
		out = append(out, schemaStatement{name, fmt.Sprintf("PRAGMA user_version = %d", from+i+1)})
	}
	return out
}

// runStatements runs statements in one transaction on the database in file.
func runStatements(t *testing.T, file string, statements []schemaStatement) {
	t.Helper()
	db, err := openSQLite(file, 1, "")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	tx, err := db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range statements {
		if _, err := tx.Exec(s.text); err != nil {
			t.Fatalf("%s: %v in %s", s.file, err, s.text)
		}
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
}

// dumpDatabase returns every row of every table, and the schema without comments.
func dumpDatabase(t *testing.T, file string) (out []string) {
	t.Helper()
	db, err := openSQLite(file, 1, "&_pragma=query_only(1)")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	objects, err := listSchema(t.Context(), db)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		out = append(out, o.kind+" "+o.name+": "+normalizeDefinition(o.definition))
		if o.kind != "table" {
			continue
		}
		rows, err := db.QueryContext(t.Context(), "SELECT * FROM "+o.name)
		if err != nil {
			t.Fatal(err)
		}
		columns, err := rows.Columns()
		if err != nil {
			t.Fatal(err)
		}
		for rows.Next() {
			values, targets := make([]any, len(columns)), make([]any, len(columns))
			for i := range values {
				targets[i] = &values[i]
			}
			if err := rows.Scan(targets...); err != nil {
				t.Fatal(err)
			}
			out = append(out, fmt.Sprint(o.name, values))
		}
		if err := rows.Err(); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(out)
	return out
}

// firstDatabase makes a database of the first version with rows in every table, as a running program left it.
func firstDatabase(t *testing.T, sl *sealer) string {
	t.Helper()
	key := fmt.Sprintf("x'%x'", sl.seal(newSecret("sk-first-0123456789"),
		sealContext("up_1", "proj_1", "https://api.example.com")))
	statements := []string{
		`INSERT INTO settings VALUES ('key_check', '` + sealKeyCheck(sl, false) + `'), ('ledger_open_from', '1')`,
		`INSERT INTO projects (id, name, policy, created_at, updated_at)
			VALUES ('proj_1', 'one', '{"models":["a"]}', 1, 1)`,
		`INSERT INTO upstreams (id, project, name, provider, base_url, sealed_key, key_hint, created_at, updated_at)
			VALUES ('up_1', 1, 'u', 'openai', 'https://api.example.com/v1', ` + key + `, '6789', 1, 1)`,
		`INSERT INTO management_keys (id, name, hash, role, created_at, updated_at)
			VALUES ('key_1', 'k', zeroblob(32), 'admin', 1, 1)`,
		`INSERT INTO prices (id, match, input, updated_at) VALUES ('price_1', 'a', 5, 1)`,
		`WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40)
			INSERT INTO tokens (id, project, name, hash, revoked_at, request_count, created_at, updated_at)
			SELECT 'tok_' || i, 1, 'token ' || i, CAST(printf('%032d', i) AS BLOB), iif(i % 3 = 0, 5, NULL), i, 1, 1
			FROM n`,
		`WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40)
			INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, outcome, usage_source,
				input_tokens, output_tokens, cost)
			SELECT i << 21, 1, i, 1, 'POST /v1/chat/completions', 'a', 0, '192.0.2.1', iif(i > 35, 'open', 'ok'),
				'exact', 10, 5, 7 FROM n`,
		`INSERT INTO usage_sums
			SELECT 'hour', 1, 0, 3600000 * (id >> 27), model, endpoint, outcome, count(*), 10, 0, 5, 0, 7, 0, 0, 9
			FROM requests WHERE outcome = 'ok' GROUP BY 4`,
		`INSERT INTO usage_sums
			SELECT 'day', project, token, at / 86400000, model, endpoint, outcome, sum(calls), 10, 0, 5, 0, 7, 0, 0, 9
			FROM usage_sums GROUP BY at / 86400000`,
	}
	return oldDatabase(t, "schema/002_audit.sql", statements...)
}

// copyAsKilled copies a database and its log as they are at this moment, which is what a killed program leaves.
func copyAsKilled(t *testing.T, from, to string) {
	t.Helper()
	for _, suffix := range []string{"", "-wal"} {
		text, err := os.ReadFile(from + suffix)
		if err != nil && suffix == "" {
			t.Fatal(err)
		}
		if err := os.WriteFile(to+suffix, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestMigrationKilled (UP2): a program that is killed after any statement of a migration leaves the old database,
// which the next start migrates. A migration that was carried out in part, by other means than this program, is
// refused with a remedy.
func TestMigrationKilled(t *testing.T) {
	t.Parallel()
	sl := mustSealer(t)
	first := firstDatabase(t, sl)
	migrate := func(file string) error {
		st, err := openStore(context.Background(), file)
		if err != nil {
			return err
		}
		return st.close()
	}
	dir := t.TempDir()
	reference := filepath.Join(dir, "reference.db")
	copyAsKilled(t, first, reference)
	if err := migrate(reference); err != nil {
		t.Fatal(err)
	}
	want := dumpDatabase(t, reference)
	statements := schemaStatements(t, 1)
	if len(statements) < 60 {
		t.Errorf("only %d statements", len(statements))
	}
	before, start := first, 0 // the database before the last statement's file, and where in statements that begins
	old := dumpDatabase(t, before)
	for n, last := range statements {
		if last.file != statements[start].file {
			next := filepath.Join(dir, "before "+filepath.Base(last.file))
			copyAsKilled(t, before, next)
			runStatements(t, next, statements[start:n])
			before, start, old = next, n, dumpDatabase(t, next)
		}
		work := filepath.Join(dir, fmt.Sprintf("work-%d.db", n))
		copyAsKilled(t, before, work)
		// A cache of a few pages makes SQLite write to the log before the end of the transaction.
		db, err := openSQLite(work, 1, "&_pragma=cache_size(4)")
		if err != nil {
			t.Fatal(err)
		}
		tx, err := db.BeginTx(t.Context(), &sql.TxOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range statements[start : n+1] {
			if _, err := tx.Exec(s.text); err != nil {
				t.Fatalf("%s: %v in %s", s.file, err, s.text)
			}
		}
		killed := filepath.Join(dir, fmt.Sprintf("killed-%d.db", n))
		copyAsKilled(t, work, killed)
		if n+1 == len(statements) || statements[n+1].file != last.file { // the log has the whole file
			if err := migrate(killed); err != nil {
				t.Errorf("killed after %s: %v", last.text, err)
			} else if got := dumpDatabase(t, killed); !slices.Equal(got, want) {
				t.Errorf("killed after %s of %s: the database differs", last.text, last.file)
			}
		} else if !slices.Equal(dumpDatabase(t, killed), old) { // the one that the next start migrates
			t.Errorf("killed after %s of %s: it leaves another database", last.text, last.file)
		}
		// Not in one transaction, and the version not set for the last file.
		if err := tx.Commit(); err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		if err := migrate(work); err != nil {
			if n%20 == 0 { // the message does not depend on the statement
				env := serveEnv(t)
				env["DATABASE_URL"] = "sqlite:" + work
				_, err = runProgram(t, env, "serve")
			}
			if !strings.Contains(err.Error(), "restore a backup") && !strings.Contains(err.Error(), "running schema/") {
				t.Errorf("cut after %s: %v", last.text, err)
			}
		} else if got := dumpDatabase(t, work); !slices.Equal(got, want) {
			t.Errorf("cut after %s of %s: accepted, but the database differs", last.text, last.file)
		}
		for _, file := range []string{work, killed} {
			if err := removeDatabase(file); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestMigrationKilledAnywhere (UP2): what a program leaves that is killed at any moment of its own migration, which is
// one transaction, is an old database or a new one.
func TestMigrationKilledAnywhere(t *testing.T) {
	t.Parallel()
	first, dir := firstDatabase(t, mustSealer(t)), t.TempDir()
	work := filepath.Join(dir, "work.db")
	copyAsKilled(t, first, work)
	opened := make(chan *store)
	go func() {
		st, err := openStore(context.Background(), work)
		if err != nil {
			t.Error(err)
		}
		opened <- st
	}()
	var killed []string
	var st *store
	for st == nil { // until the end of the migration, all that it writes is in the log, at its end
		select {
		case st = <-opened:
			if st == nil {
				return
			}
		default:
		}
		killed = append(killed, filepath.Join(dir, fmt.Sprintf("killed-%d.db", len(killed))))
		copyAsKilled(t, work, killed[len(killed)-1])
	}
	if err := st.close(); err != nil {
		t.Fatal(err)
	}
	want := dumpDatabase(t, work)
	step := max(1, len(killed)/20)
	for i := 0; i < len(killed); i += step {
		version, err := openReadOnly(killed[i], false)
		if err != nil {
			t.Fatal(err)
		}
		n, supported, err := version.schemaVersion(t.Context())
		if version.close(); err != nil || n != 1 && n != supported {
			t.Errorf("moment %d of %d leaves schema %d: %v", i, len(killed), n, err)
		}
		st := mustOpenStore(t, killed[i])
		if err := st.close(); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(dumpDatabase(t, killed[i]), want) {
			t.Errorf("moment %d of %d: the database differs", i, len(killed))
		}
	}
}

// TestFirstStartKilled (UP2): a program that is killed between the steps of its first start on an older database
// leaves one with which the next start goes on: rows are bound, once.
func TestFirstStartKilled(t *testing.T) {
	t.Parallel()
	for _, steps := range []int{0, 1, 2, 3} {
		env := serveEnv(t)
		env["ENCRYPTION_KEY"] = goodKey
		if err := os.MkdirAll(env["DATA_DIR"], 0o700); err != nil {
			t.Fatal(err)
		}
		sl := mustSealer(t)
		file := filepath.Join(env["DATA_DIR"], "llm-proxy.db")
		copyAsKilled(t, firstDatabase(t, sl), file)
		if steps > 0 { // the migration
			st := mustOpenStore(t, file)
			if steps == 2 { // and the beginning of the trail, as a version without bindings leaves it
				if err := st.beginAudit(t.Context(), sl, systemOrigin(time.Now()), false); err != nil {
					t.Fatal(err)
				}
			}
			if steps == 3 { // and the binding
				if err := st.openAudit(t.Context(), sl, systemOrigin(time.Now())); err != nil {
					t.Fatal(err)
				}
			}
			if err := st.close(); err != nil {
				t.Fatal(err)
			}
		}
		out, err := runProgram(t, env, "doctor")
		if err != nil && steps != 1 || !strings.Contains(out, "before the database is migrated") && steps < 3 {
			t.Errorf("doctor after %d steps: %v %s", steps, err, out)
		}
		for range 2 {
			s := serveProgram(t, env)
			if err := s.stop(); err != nil {
				t.Error(err)
			}
			out, err := runProgram(t, env, "audit", "verify")
			if err != nil || !strings.Contains(out, "2 entries") {
				t.Errorf("killed after %d steps: %v %s", steps, err, out)
			}
		}
	}
}

func mustSealer(t *testing.T) *sealer {
	t.Helper()
	sl, err := sealerFromKey(newSecret(goodKey))
	if err != nil {
		t.Fatal(err)
	}
	return sl
}
