//go:build postgres

// Tests of what only PostgreSQL does, and the databases in which the other tests run when LLM_PROXY_TEST_DATABASE_URL
// names a server: each has one of its own, a copy of a template with the schema.
package main

import (
	"context"
	"database/sql"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// testDatabaseURL names the variable with the URL of a PostgreSQL server, on which each
// test has a database of its own.
const testDatabaseURL = "LLM_PROXY_TEST_DATABASE_URL"

func usesTestDatabase() bool { return os.Getenv(testDatabaseURL) != "" }

// testDatabases makes databases on the server of the tests.
type testDatabases struct {
	once  sync.Once
	err   error
	count atomic.Int64
}

var databases testDatabases

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
	return &postgresConfig{url: newSecret(text), connections: 5, timeout: 20 * time.Second, version: "test"}
}

// execTestServer runs statements outside of any test's database.
func execTestServer(statements ...string) error {
	u, err := url.Parse(os.Getenv(testDatabaseURL))
	if err != nil {
		return err
	}
	connector, err := newPostgresConnector(testPostgresConfig(u.String()), u, nil)
	if err != nil {
		return err
	}
	db := sql.OpenDB(connector)
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
	name := fmt.Sprintf("%s%d", prefix, databases.count.Add(1))
	if err := execTestServer(`CREATE DATABASE ` + name + ` TEMPLATE ` + prefix + `template`); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := execTestServer(`DROP DATABASE ` + name + ` WITH (FORCE)`); err != nil {
			t.Error(err)
		}
	})
	return testDatabaseName(name)
}

// dumpTestDatabase returns everything in a database, as text.
func dumpTestDatabase(t testing.TB, text string) []byte {
	t.Helper()
	st, err := openPostgres(context.Background(), testPostgresConfig(text), false)
	if err != nil {
		t.Fatal(err)
	}
	defer st.close()
	var dump strings.Builder
	for _, table := range []string{"settings", "projects", "upstreams", "upstream_shares", "upstream_health", "tokens",
		"management_keys", "sessions", "audit", "requests", "begun", "usage_sums", "contents", "cache", "background"} {
		rows, err := collect(context.Background(), st.readDB, "dumping "+table,
			func(row *string) []any { return []any{row} }, `SELECT t::text FROM `+table+` t`)
		if err != nil {
			t.Fatal(err)
		}
		dump.WriteString(strings.Join(rows, "\n"))
	}
	return []byte(dump.String())
}
