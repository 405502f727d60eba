//go:build postgres

// This file has the schema of a PostgreSQL database: the migrations, and the comparison with what the schema files
// make. A migration suits the version before, which may be serving meanwhile.
package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net/url"
	"strings"
	"time"
)

//go:embed schema/postgres/*.sql
var postgresSchemaFiles embed.FS

// version is schemaVersion.
func (p *postgres) version(ctx context.Context) (version, supported int, err error) {
	return postgresSchemaVersion(ctx, p.store.readDB)
}

func postgresSchemaVersion(ctx context.Context, db querier) (version, supported int, err error) {
	files, err := fs.Glob(postgresSchemaFiles, "schema/postgres/*.sql")
	if err != nil {
		return 0, 0, fmt.Errorf("listing the schema: %w", err)
	}
	exists, err := queryValue[bool](ctx, db, "reading the schema version",
		`SELECT to_regclass('schema_version') IS NOT NULL`)
	if err == nil && exists {
		version, err = queryValue[int](ctx, db, "reading the schema version", `SELECT version FROM schema_version`)
	}
	return version, len(files), err
}

// migrate runs the schema files that the database has not seen, in one transaction. The caller has locked other
// processes out that start. Some of the version before may be serving: if a migration and what they write wait for each
// other, it is tried again. A statement may take as long as it needs: u is where to connect for that.
func (p *postgres) migrate(ctx context.Context, u *url.URL) error {
	connector, err := newPostgresConnector(p.config, u, map[string]string{statementTimeout: "0"})
	if err != nil {
		return err
	}
	db := openPool(connector, 1)
	defer db.Close()
	for attempts := 5; ; attempts-- {
		err := p.migrateOnce(ctx, db)
		if sqlState(err) != "40P01" || attempts == 0 {
			return err
		}
	}
}

func (p *postgres) migrateOnce(ctx context.Context, db *sql.DB) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("beginning a transaction: %w", err)
	}
	defer tx.Rollback() // without effect after Commit
	version, supported, err := postgresSchemaVersion(ctx, tx)
	if err != nil {
		return err
	}
	if version > supported {
		return fmt.Errorf("was made by a newer llm-proxy (schema %d, this binary supports %d); use that one, or "+
			"restore a backup", version, supported)
	}
	checked, err := isCheckedSchema(ctx, tx, version)
	if err != nil || checked && version == supported {
		return err
	}
	if !checked {
		problems, err := postgresDifferences(ctx, tx, version)
		if err != nil {
			return err
		}
		if len(problems) > 0 {
			return describePostgresProblems(problems, version)
		}
	}
	began := time.Now()
	if version < supported {
		p.inform("migrating the database; that may take long, and must not be interrupted", "from", version,
			"to", supported)
		if err := runPostgresSchema(ctx, tx, version, supported); err != nil {
			return err
		}
	}
	if err := setCheckedSchema(ctx, tx, supported); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	if version < supported {
		p.inform("the database is migrated", "seconds", int64(time.Since(began).Seconds()))
	}
	return nil
}

// inform writes to the log.
func (p *postgres) inform(msg string, args ...any) {
	if p.config.inform != nil {
		p.config.inform(msg, args...)
	}
}

// isCheckedSchema reports whether the schema is one that was found to be what the schema files make. The comparison is
// much work, so the database remembers a hash of what was compared. The doctor always compares.
func isCheckedSchema(ctx context.Context, tx *sql.Tx, version int) (bool, error) {
	if version == 0 {
		return false, nil
	}
	known, err := queryValue[string](ctx, tx, "reading which schema was checked",
		`SELECT coalesce(obj_description(to_regclass('schema_version'), 'pg_class'), '')`)
	if err != nil || known == "" {
		return false, err
	}
	sum, err := hashPostgresSchema(ctx, tx, version)
	return sum == known, err
}

// setCheckedSchema remembers that the schema is what the schema files make.
func setCheckedSchema(ctx context.Context, tx *sql.Tx, version int) error {
	sum, err := hashPostgresSchema(ctx, tx, version)
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `SELECT set_config('llm_proxy.checked', ?, true)`, sum)
	if err == nil {
		_, err = tx.ExecContext(ctx, `DO $$ BEGIN
			EXECUTE format('COMMENT ON TABLE schema_version IS %L', current_setting('llm_proxy.checked'));
		END $$`)
	}
	if err != nil {
		return fmt.Errorf("noting which schema was checked: %w", err)
	}
	return nil
}

// hashPostgresSchema returns a hash of the schema files up to a version, the version of the server, and what the
// current schema contains.
func hashPostgresSchema(ctx context.Context, tx *sql.Tx, version int) (string, error) {
	h := sha256.New()
	files, err := fs.Glob(postgresSchemaFiles, "schema/postgres/*.sql")
	if err != nil {
		return "", fmt.Errorf("listing the schema: %w", err)
	}
	for _, name := range files[:min(version, len(files))] {
		text, err := postgresSchemaFiles.ReadFile(name)
		if err != nil {
			return "", fmt.Errorf("reading %s: %w", name, err)
		}
		fmt.Fprintf(h, "%d %s", len(text), text)
	}
	server, err := queryValue[string](ctx, tx, "reading the server's version", `SHOW server_version_num`)
	if err != nil {
		return "", err
	}
	found, err := listPostgresSchema(ctx, tx)
	fmt.Fprintf(h, "%s %q", server, found)
	return "schema checked " + hex.EncodeToString(h.Sum(nil)), err
}

// runPostgresSchema migrates the current schema from one version to another.
func runPostgresSchema(ctx context.Context, tx *sql.Tx, from, to int) error {
	files, err := fs.Glob(postgresSchemaFiles, "schema/postgres/*.sql")
	if err != nil {
		return fmt.Errorf("listing the schema: %w", err)
	}
	if from == 0 {
		if _, err := tx.ExecContext(ctx, `
			CREATE TABLE schema_version (version bigint NOT NULL);
			INSERT INTO schema_version (version) VALUES (0)`); err != nil {
			return fmt.Errorf("creating the schema: %w", err)
		}
	}
	for i := from; i < to; i++ {
		text, err := postgresSchemaFiles.ReadFile(files[i])
		if err != nil {
			return fmt.Errorf("reading %s: %w", files[i], err)
		}
		if _, err := tx.ExecContext(ctx, string(text)); err != nil {
			return fmt.Errorf("running %s: %w", files[i], err)
		}
	}
	if _, err := tx.ExecContext(ctx, `UPDATE schema_version SET version = ?`, to); err != nil {
		return fmt.Errorf("setting the version: %w", err)
	}
	return nil
}

// differences compares the schema with what the schema files make. It changes nothing.
func (p *postgres) differences(ctx context.Context) ([]string, error) {
	tx, err := p.store.writeDB.BeginTx(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("beginning a transaction: %w", err)
	}
	defer tx.Rollback() // which removes the schema to compare with
	version, _, err := postgresSchemaVersion(ctx, tx)
	if err != nil {
		return nil, err
	}
	return postgresDifferences(ctx, tx, version)
}

// describePostgresProblems says what differs, and what to do about it.
func describePostgresProblems(problems []string, version int) error {
	text := clip(strings.Join(problems, ", "), 300)
	if version == 0 {
		return fmt.Errorf("is not a database of this program: %s; name another database, or with search_path=NAME "+
			"another schema", text)
	}
	return fmt.Errorf("its schema is not the schema %d of this program (%s): it was changed by hand, or made by a "+
		"development version. Undo a change by hand; otherwise restore a backup", version, text)
}

// postgresDifferences is checkSchema. It makes the schema to compare with in tx, and removes it again.
func postgresDifferences(ctx context.Context, tx *sql.Tx, version int) (problems []string, err error) {
	found, err := listPostgresSchema(ctx, tx)
	if err != nil {
		return nil, err
	}
	if version == 0 {
		for _, o := range found {
			if o.kind == "table" {
				problems = append(problems, "it has the table "+o.name)
			}
		}
		return problems, nil
	}
	if _, err := tx.ExecContext(ctx, `
		SAVEPOINT compare; CREATE SCHEMA llm_proxy_model; SET LOCAL search_path = llm_proxy_model`); err != nil {
		return nil, fmt.Errorf("making a schema to compare with (GRANT CREATE ON DATABASE to the user): %w", err)
	}
	if err := runPostgresSchema(ctx, tx, 0, version); err != nil {
		return nil, err
	}
	expected, err := listPostgresSchema(ctx, tx)
	if err != nil {
		return nil, err
	}
	if _, err := tx.ExecContext(ctx, `ROLLBACK TO SAVEPOINT compare; RELEASE SAVEPOINT compare`); err != nil {
		return nil, fmt.Errorf("removing the schema to compare with: %w", err)
	}
	actual, tables := map[string]schemaObject{}, map[string]bool{}
	for _, o := range found {
		actual[o.kind+o.name] = o
	}
	for _, o := range expected {
		tables[o.table] = true
		have, ok := actual[o.kind+o.name]
		if delete(actual, o.kind+o.name); !ok {
			problems = append(problems, fmt.Sprintf("the %s %s is missing", o.kind, o.name))
		} else if have.definition != o.definition {
			problems = append(problems, fmt.Sprintf("the %s %s is different", o.kind, o.name))
		}
	}
	for _, o := range found { // other tables, views, functions and plain indexes change nothing for this program
		_, added := actual[o.kind+o.name]
		harmless := o.kind == "index" && !strings.HasPrefix(o.definition, "CREATE UNIQUE") || o.kind == "function"
		if added && tables[o.table] && !harmless {
			problems = append(problems, fmt.Sprintf("the %s %s on %s was added", o.kind, o.name, o.table))
		}
	}
	return problems, nil
}

// listPostgresSchema lists what the current schema contains. Definitions are without its name.
func listPostgresSchema(ctx context.Context, db querier) ([]schemaObject, error) {
	return collect(ctx, db, "reading the schema", func(o *schemaObject) []any {
		return []any{&o.kind, &o.name, &o.table, &o.definition}
	}, `
		WITH here AS (SELECT oid, quote_ident(nspname) || '.' AS prefix FROM pg_namespace
				WHERE nspname = current_schema()),
			tables AS (SELECT c.oid, c.relname::text AS name, c.relkind, prefix FROM pg_class c
				JOIN here ON here.oid = c.relnamespace WHERE c.relkind IN ('r', 'v', 'p', 'm', 'f'))
		SELECT 'table' AS kind, name, name AS "table", relkind::text AS definition FROM tables WHERE relkind <> 'v'
		UNION ALL
		SELECT 'view', name, name, replace(pg_get_viewdef(oid), prefix, '') FROM tables WHERE relkind = 'v'
		UNION ALL
		SELECT 'column', name || '.' || attname, name, concat_ws(' ', format_type(atttypid, atttypmod), attnotnull,
				attidentity, attgenerated, replace(pg_get_expr(adbin, adrelid), prefix, ''), collname)
			FROM tables JOIN pg_attribute a ON attrelid = tables.oid AND attnum > 0 AND NOT attisdropped
				LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
				LEFT JOIN pg_collation l ON l.oid = attcollation
			WHERE relkind <> 'v'
		UNION ALL
		SELECT 'constraint', conname::text, name, replace(pg_get_constraintdef(k.oid), prefix, '')
			FROM tables JOIN pg_constraint k ON conrelid = tables.oid WHERE contype <> 't'
		UNION ALL
		SELECT 'index', i.relname::text, name, replace(pg_get_indexdef(indexrelid), prefix, '')
			FROM tables JOIN pg_index ON indrelid = tables.oid JOIN pg_class i ON i.oid = indexrelid
		UNION ALL
		SELECT 'trigger', tgname::text, name, tgenabled::text || replace(pg_get_triggerdef(t.oid), prefix, '')
			FROM tables JOIN pg_trigger t ON tgrelid = tables.oid WHERE NOT tgisinternal
		UNION ALL
		SELECT 'rule', rulename::text, name, replace(pg_get_ruledef(r.oid), prefix, '')
			FROM tables JOIN pg_rewrite r ON ev_class = tables.oid WHERE rulename <> '_RETURN'
		UNION ALL
		SELECT 'function', proname::text || '(' || pg_get_function_identity_arguments(f.oid) || ')', '',
				concat_ws(' ', prosrc, prorettype::regtype, provolatile)
			FROM pg_proc f JOIN here ON here.oid = pronamespace
		ORDER BY 1, 2`)
}
