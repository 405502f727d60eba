// Tests of the binding of rows that grant something: whoever writes to the database without the encryption key can
// neither add such a row, nor change one, nor put an old one back.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A forgery is what somebody writes to the database while the program is stopped. Texts in braces stand for the
// fields of a forgeryTest.
type forgery struct {
	sql    string
	caller string // who must be refused afterwards: token, key or session; "": the start itself is refused
	status int    // of the refused call
}

// A forgeryTest is a proxy with credentials, some of which are not valid any more.
type forgeryTest struct {
	*testProxy
	ids     map[string]string // by name, for the statements
	tokens  map[string]string
	keys    map[string]string
	session string // a planted session's id
}

func newForgeryTest(t *testing.T) *forgeryTest {
	p := &forgeryTest{testProxy: newTest(t, nil), ids: map[string]string{}, tokens: map[string]string{},
		keys: map[string]string{}, session: randomBase62(sessionIDLen)}
	p.allowErrors = true
	hash := func(credential string) string {
		sum := sha256.Sum256([]byte(credential))
		return "x'" + hex.EncodeToString(sum[:]) + "'"
	}
	for _, name := range []string{"token", "revoked", "limited"} {
		p.ids[name], p.tokens[name] = p.newToken(`"name":"` + name + `","max_requests":0`)
	}
	p.manage("PATCH", "/manage/tokens/"+p.ids["token"], `{"max_requests":null}`, 200, nil)
	p.ids["key"], p.keys["key"] = p.newKey("key", "viewer")
	p.ids["revoked key"], p.keys["revoked key"] = p.newKey("revoked key", "admin")
	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"other","is_active":true,"policy":{"models":[]}}`, 201, &other)
	p.ids["project"], p.ids["other"], p.ids["upstream"] = p.project, other.ID, p.upstream
	var v struct{ ID, Token string }
	p.manage("POST", "/manage/tokens", `{"project_id":"`+other.ID+`"}`, 201, &v)
	p.ids["guest"], p.tokens["guest"] = v.ID, v.Token
	p.manage("POST", "/manage/projects", `{"name":"empty"}`, 201, &other)
	p.manage("POST", "/manage/tokens", `{"project_id":"`+other.ID+`"}`, 201, &v)
	p.ids["empty"], p.tokens["empty"] = other.ID, v.Token
	planted, _ := mintCredential(tokenPrefix, "")
	plantedKey, _ := mintCredential(manageKeyPrefix, "")
	p.tokens["planted"], p.keys["planted"] = planted(), plantedKey()
	p.ids["planted hash"], p.ids["planted key hash"] = hash(planted()), hash(plantedKey())
	p.ids["session hash"] = hash(p.session)
	p.ids["now"] = fmt.Sprint(time.Now().UnixMilli())
	// Whoever can read the file now can put these rows back later.
	p.execSQL(`CREATE TABLE stolen_tokens AS SELECT * FROM tokens`,
		`CREATE TABLE stolen_keys AS SELECT * FROM management_keys`,
		`CREATE TABLE stolen_projects AS SELECT * FROM projects`)
	p.manage("DELETE", "/manage/tokens/"+p.ids["revoked"], "", 200, nil)
	p.manage("DELETE", "/manage/keys/"+p.ids["revoked key"], "", 200, nil)
	return p
}

// forge stops the program, runs a forgery's statements and starts it again, with a fresh log.
func (p *forgeryTest) forge(sql string) error {
	p.t.Helper()
	if err := p.stop(); err != nil {
		p.t.Fatal(err)
	}
	requireSQLite(p.t, "it changes the file")
	for name, id := range p.ids {
		sql = strings.ReplaceAll(sql, "{"+name+"}", id)
	}
	db, err := openSQLite(p.instance.cfg.databaseFile, 1, "")
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err = db.ExecContext(p.t.Context(), sql); err != nil {
		p.t.Fatalf("%v: %s", err, sql)
	}
	return db.Close()
}

// status makes a call as a caller: "token NAME", "key NAME" or "session".
func (p *forgeryTest) status(caller string) int {
	p.t.Helper()
	kind, name, _ := strings.Cut(caller, " ")
	switch kind {
	case "token":
		return p.chatAs(p.tokens[name]).status
	case "key":
		return p.manageAs(p.keys[name], "POST", "/manage/keys", `{"name":"n","role":"viewer"}`).status
	}
	return p.do("GET", "/admin/keys", "", "Cookie", sessionCookieName(false)+"="+p.session).status
}

func forgeries() map[string]forgery {
	const columns = `(id, project, name, hash, created_at, updated_at, bound_by, mac)`
	const putBack = `DELETE FROM tokens WHERE id = '{%[1]s}';
		INSERT INTO tokens (` + `seq, id, project, created_at, request_count, last_used_at, ` + tokenEditable + `)
		SELECT seq, id, project, created_at, request_count, last_used_at, ` + tokenEditable + `
		FROM stolen_tokens WHERE id = '{%[1]s}'`
	return map[string]forgery{
		"token planted": {`INSERT INTO tokens (id, project, name, hash, created_at, updated_at)
			SELECT 'tok_planted1', seq, 'x', {planted hash}, {now}, {now} FROM projects WHERE id = '{project}'`,
			"token planted", 401},
		"token planted with another's MAC": {`INSERT INTO tokens ` + columns + ` SELECT 'tok_planted1', project, name,
			{planted hash}, created_at, updated_at, bound_by, mac FROM tokens WHERE id = '{token}'`,
			"token planted", 401},
		"hash replaced": {`UPDATE tokens SET hash = {planted hash} WHERE id = '{token}'`,
			"token planted", 401},
		"old hash planted": {`UPDATE tokens SET old_hash = {planted hash}, old_hash_until = {now} + 999999
			WHERE id = '{token}'`,
			"token planted", 401},
		"token revived": {`UPDATE tokens SET revoked_at = NULL WHERE id = '{revoked}'`,
			"token revoked", 401},
		"token put back": {fmt.Sprintf(putBack, "revoked"), "token revoked", 401},
		"MAC put back": {`UPDATE tokens SET revoked_at = NULL, (bound_by, mac) = (SELECT bound_by, mac FROM
			stolen_tokens s WHERE s.id = tokens.id) WHERE id = '{revoked}'`,
			"token revoked", 401},
		"requests given": {`UPDATE tokens SET max_requests = NULL WHERE id = '{limited}'`,
			"token limited", 401},
		"expiry changed": {`UPDATE tokens SET expires_at = {now} + 999999 WHERE id = '{token}'`,
			"token token", 401},
		"project changed": {`UPDATE tokens SET project = (SELECT seq FROM projects WHERE id = '{project}')
			WHERE id = '{guest}'`,
			"token guest", 401},
		"token policy": {`UPDATE tokens SET policy = '{"models":["*"]}' WHERE id = '{token}'`,
			"token token", 401},
		"project policy": {`UPDATE projects SET policy = '{}' WHERE id = '{other}'`, "token guest", 401},
		"project ids swapped": {`UPDATE projects SET id = 'x' WHERE id = '{project}'; UPDATE projects SET id =
			'{project}' WHERE id = '{other}'; UPDATE projects SET id = '{other}' WHERE id = 'x'`,
			"token guest", 401},
		"upstream shared": {`INSERT INTO upstream_shares (upstream, project) SELECT u.seq, p.seq FROM upstreams
			u, projects p WHERE u.id = '{upstream}' AND p.id = '{empty}'`,
			"token empty", 503},
		"upstream path": {`UPDATE upstreams SET base_url = replace(base_url, '/v1', '') || '/other' WHERE id =
			'{upstream}'`,
			"token token", 503},
		"upstream rewrite": {`UPDATE upstreams SET rewrite = '{"*":"gpt-5-pro"}' WHERE id = '{upstream}'`,
			"token token", 503},
		"key planted": {`INSERT INTO management_keys (id, name, hash, role, created_at, updated_at) VALUES
			('key_planted1', 'x', {planted key hash}, 'admin', {now}, {now})`,
			"key planted", 401},
		"key hash replaced": {`UPDATE management_keys SET hash = {planted key hash} WHERE id = '{key}'`,
			"key planted", 401},
		"role raised": {`UPDATE management_keys SET role = 'admin' WHERE id = '{key}'`, "key key", 401},
		"key revived": {`UPDATE management_keys SET revoked_at = NULL WHERE id = '{revoked key}'`,
			"key revoked key", 401},
		"key put back": {`DELETE FROM management_keys WHERE id = '{revoked key}'; INSERT INTO management_keys
			SELECT * FROM stolen_keys WHERE id = '{revoked key}'`,
			"key revoked key", 401},
		"session planted": {`INSERT INTO sessions (hash, key, proof, address, created_at, seen_at) SELECT
			{session hash}, id, x'', '', {now}, {now} FROM management_keys WHERE role = 'admin' AND revoked_at
			IS NULL LIMIT 1`,
			"session", 303},
		"key check removed": {`DELETE FROM settings WHERE name = 'key_check'`, "", 0},
		"trail removed": {`DROP TABLE audit; DELETE FROM settings WHERE name IN ('audit_key', 'audit_head')`,
			"", 0},
		"audit key removed": {`DELETE FROM settings WHERE name = 'audit_key'`, "", 0},
		"trail emptied": {`DROP TRIGGER audit_never_removed; DELETE FROM audit; CREATE TRIGGER
			audit_never_removed BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'nothing is removed from the
			audit trail'); END; DELETE FROM settings WHERE name IN ('audit_key', 'audit_head')`,
			"", 0},
		"bindings all cleared": {`UPDATE tokens SET bound_by = 0, mac = x''; UPDATE projects SET bound_by = 0,
			mac = x''`,
			"token token", 401},
	}
}

// TestForgedRows (KC12): a row that somebody else wrote grants nothing; the log, audit verify and doctor name it.
func TestForgedRows(t *testing.T) {
	t.Parallel()
	for name, f := range forgeries() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newForgeryTest(t)
			p.provider.setScript(chatScript)
			if err := p.forge(f.sql); err != nil {
				t.Fatal(err)
			}
			for _, command := range [][]string{{"audit", "verify"}, {"doctor"}} {
				out, err := runProgram(t, p.env, command...)
				if err == nil {
					t.Errorf("%v finds nothing: %s", command, out)
				}
			}
			if f.caller == "" {
				if err := p.tryOpen(); err == nil || !strings.Contains(err.Error(), "restore") {
					t.Errorf("the start: %v", err)
				}
				return
			}
			p.start()
			if got := p.status(f.caller); got != f.status {
				t.Errorf("%s: %d, want %d", f.caller, got, f.status)
			}
			if !strings.Contains(string(p.log.bytes()), "a row of the database is refused") {
				t.Error("the log does not say so")
			}
		})
	}
}

// tryOpen starts the program and stops it at once.
func (p *testProxy) tryOpen() error {
	s := &syncBuffer{}
	r := &program{getenv: func(name string) string { return p.env[name] }, stdout: s, stderr: s}
	cfg, err := r.config()
	if err != nil {
		return err
	}
	in, err := openInstance(p.t.Context(), cfg, newLogger(s, cfg.logLevel, cfg.logText), nil)
	if err != nil {
		return err
	}
	return in.close()
}

// TestForgedRowEnds: a forged row can be ended, but no other change makes it valid, and nor does a new encryption key
// or a restore.
func TestForgedRowEnds(t *testing.T) {
	t.Parallel()
	p := newForgeryTest(t)
	if err := p.forge(`UPDATE tokens SET revoked_at = NULL WHERE id = '{revoked}';
		UPDATE management_keys SET role = 'admin' WHERE id = '{key}';
		UPDATE projects SET policy = '{}' WHERE id = '{other}'`); err != nil {
		t.Fatal(err)
	}
	if _, err := runProgram(t, p.env, "rekey"); err != nil {
		t.Fatal(err)
	}
	backup := filepath.Join(p.dir, "backup.db")
	if out, err := runProgram(t, p.env, "backup", backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := runProgram(t, p.env, "restore", "--revoke=since", backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.start()
	urls := map[string]string{"token revoked": "/manage/tokens/" + p.ids["revoked"],
		"key key": "/manage/keys/" + p.ids["key"], "token guest": "/manage/projects/" + p.ids["other"]}
	for caller, url := range urls {
		res := p.manageAs(p.adminKey, "PATCH", url, `{"name":"renamed"}`)
		if res.status != 400 || !strings.Contains(res.body, "changed outside this program") {
			t.Errorf("PATCH %s: %d %s", url, res.status, res.body)
		}
		if got := p.status(caller); got != 401 {
			t.Errorf("%s: %d", caller, got)
		}
		p.manage("DELETE", url, "", 200, nil)
	}
	if out, err := runProgram(t, p.env, "audit", "verify"); err != nil {
		t.Errorf("afterwards: %v %s", err, out)
	}
	if got := p.status("token token"); got != 200 {
		t.Errorf("another token: %d", got)
	}
}

// TestRowPutBack: a row from before a change is refused, whatever the change was.
func TestRowPutBack(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*forgeryTest){
		"change": func(p *forgeryTest) {
			p.manage("PATCH", "/manage/tokens/"+p.ids["token"], `{"max_requests":1}`, 200, nil)
		},
		"rotate": func(p *forgeryTest) {
			var v struct{ Token string }
			p.manage("POST", "/manage/tokens/"+p.ids["token"]+"/rotate", `{"overlap_minutes":0}`, 200, &v)
		},
		"revoke all": func(p *forgeryTest) {
			p.manage("POST", "/manage/projects/"+p.project+"/tokens/revoke", "", 200, nil)
		},
		"delete project": func(p *forgeryTest) { p.manage("DELETE", "/manage/projects/"+p.project, "", 200, nil) },
		"restore all": func(p *forgeryTest) {
			backup := filepath.Join(p.dir, "backup.db")
			if out, err := runProgram(p.t, p.env, "backup", backup); err != nil {
				t.Errorf("%v: %s", err, out)
			}
			if err := p.stop(); err != nil {
				t.Error(err)
			}
			if out, err := runProgram(p.t, p.env, "restore", "--revoke=all", backup); err != nil {
				t.Errorf("%v: %s", err, out)
			}
			p.start()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newForgeryTest(t)
			change(p)
			if err := p.forge(`PRAGMA foreign_keys = 0;
				DELETE FROM tokens; DELETE FROM projects WHERE deleted_at IS NOT NULL;
				INSERT OR IGNORE INTO projects SELECT * FROM stolen_projects;
				INSERT INTO tokens (seq, id, project, created_at, ` + tokenEditable + `)
				SELECT seq, id, project, created_at, ` + tokenEditable + ` FROM stolen_tokens`); err != nil {
				t.Fatal(err)
			}
			p.start()
			if got := p.status("token token"); got != 401 {
				t.Errorf("got %d", got)
			}
			if out, err := runProgram(t, p.env, "audit", "verify"); err == nil {
				t.Errorf("audit verify finds nothing: %s", out)
			}
		})
	}
}

// TestBoundAtFirstStart: the rows of an older database are bound once, at the first start of this version or by the
// first command that changes it, and not again when somebody asks for that.
func TestBoundAtFirstStart(t *testing.T) {
	t.Parallel()
	p := newForgeryTest(t)
	if out, err := runProgram(t, p.env, "doctor"); err != nil || !strings.Contains(out, "ok    rows") {
		t.Errorf("doctor, before anything is forged: %v %s", err, out)
	}
	if err := p.unbind(); err != nil {
		t.Fatal(err)
	}
	legacy := filepath.Join(t.TempDir(), "data")
	if err := os.CopyFS(legacy, os.DirFS(p.env["DATA_DIR"])); err != nil {
		t.Fatal(err)
	}
	if out, err := runProgram(t, p.env, "audit", "verify"); err != nil {
		t.Errorf("before the first start: %v %s", err, out)
	}
	for range 2 {
		p.start()
		if got := p.status("token token"); got != 200 {
			t.Errorf("the token: %d", got)
		}
		if got := p.status("key key"); got != 403 {
			t.Errorf("the key: %d", got)
		}
		if out, err := runProgram(t, p.env, "audit", "verify"); err != nil {
			t.Errorf("%v %s", err, out)
		}
		if err := p.stop(); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	for _, action := range p.storedActions() {
		if action == actionBind {
			n++
		}
	}
	if n != 1 {
		t.Errorf("bound %d times", n)
	}
	// The record from before, put back, does not bind what was planted.
	if err := p.forge(`UPDATE settings SET value = (SELECT value FROM unbound) WHERE name = 'key_check';
		INSERT INTO management_keys (id, name, hash, role, created_at, updated_at)
		VALUES ('key_planted1', 'x', {planted key hash}, 'admin', {now}, {now})`); err != nil {
		t.Fatal(err)
	}
	if err := p.tryOpen(); err == nil || !strings.Contains(err.Error(), "was put back") {
		t.Errorf("a second first start: %v", err)
	}
	env := maps.Clone(p.env)
	env["DATA_DIR"] = legacy
	if err := os.Chmod(filepath.Join(legacy, keyFileName), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := runProgram(t, env, "rekey"); err != nil {
		t.Errorf("rekey of an older database: %v %s", err, out)
	}
	if out, err := runProgram(t, env, "audit", "verify"); err != nil {
		t.Errorf("after rekey: %v %s", err, out)
	}
}

// unbind stops the program and makes its database one from before rows were bound, after the migration.
func (p *forgeryTest) unbind() error {
	check := sealKeyCheck(p.instance.sealer, false)
	var statements strings.Builder
	statements.WriteString(`CREATE TABLE unbound AS SELECT '` + check + `' AS value;
		UPDATE settings SET value = '` + check + `' WHERE name = 'key_check'; DELETE FROM sessions;`)
	for table := range strings.FieldsSeq("tokens management_keys projects upstreams upstream_shares") {
		statements.WriteString(`UPDATE ` + table + ` SET bound_by = 0, mac = x'';`)
	}
	return p.forge(statements.String())
}

// storedActions returns the actions of the audit trail of a stopped program.
func (p *forgeryTest) storedActions() []string {
	p.t.Helper()
	st, err := openReadOnly(p.instance.cfg.databaseFile, false)
	if err != nil {
		p.t.Fatal(err)
	}
	defer st.close()
	out, err := collect(p.t.Context(), st.readDB, "reading actions", func(s *string) []any { return []any{s} },
		`SELECT action FROM audit ORDER BY seq`)
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

// BenchmarkBindings has 100,000 tokens: binding all of them, which the first start does once; checking all, as audit
// verify does; and loading each with its first call.
func BenchmarkBindings(b *testing.B) {
	const tokens = 100_000
	s := newScaleTest(b)
	defer s.close()
	s.seedProjects()
	s.seed(fmt.Sprintf(`
		WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
		INSERT INTO tokens (id, project, name, hash, expires_at, created_at, updated_at)
		SELECT 'tok_' || hex(randomblob(8)), 1 + i %% 50, 'seeded ' || i, randomblob(32), NULL, i, i FROM n`, tokens))
	st := s.instance.store
	perRow := func(b *testing.B, what string, fn func() error) {
		start := time.Now()
		if err := fn(); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(time.Since(start).Microseconds())/tokens, what)
		b.ReportMetric(0, "ns/op")
	}
	b.Run("bind", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			if i > 0 { // a database is bound once
				continue
			}
			perRow(b, "µs/row", func() error {
				return st.bindAll(b.Context(), s.instance.sealer, systemOrigin(time.Now()))
			})
		}
	})
	b.Run("verify", func(b *testing.B) {
		for b.Loop() {
			perRow(b, "µs/row", func() error {
				_, n, err := st.foreignRows(b.Context(), 1)
				if n > 0 {
					b.Errorf("%d rows are foreign", n)
				}
				return err
			})
		}
	})
	hashes, err := collect(b.Context(), st.readDB, "reading hashes", func(h *[]byte) []any { return []any{h} },
		`SELECT hash FROM tokens`)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("load", func(b *testing.B) {
		for b.Loop() {
			g := newRegistry(st, s.instance.ledger, s.instance.sealer, s.instance.health, true)
			perRow(b, "µs/row", func() error {
				for _, h := range hashes {
					if _, _, err := g.lookup(b.Context(), [32]byte(h), 1); err != nil {
						return err
					}
				}
				return nil
			})
		}
	})
}
