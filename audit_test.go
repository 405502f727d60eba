// Tests of the audit trail: each change leaves exactly one entry, in the same transaction or not at all, and
// tampering with the trail itself is detected.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// auditEntries returns the entries after a seq, oldest first.
func (p *testProxy) auditEntries(after int64) []auditEntry {
	p.t.Helper()
	entries, err := p.instance.store.auditPage(p.t.Context(), after, 1<<62)
	if err != nil {
		p.t.Fatal(err)
	}
	return entries
}

// lastAuditSeq returns the seq of the newest entry.
func (p *testProxy) lastAuditSeq() int64 {
	p.t.Helper()
	_, _, newest, err := p.instance.store.loadAuditHead(p.t.Context(), p.instance.store.chain)
	if err != nil {
		p.t.Fatal(err)
	}
	return newest
}

// verifyAudit checks the whole trail.
func (p *testProxy) verifyAudit() *auditCheck {
	p.t.Helper()
	k, err := p.instance.store.verifyAudit(p.t.Context(), p.instance.store.chain, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	return k
}

// A mutation is a call that changes something, and what its entry must say.
type mutation struct {
	body, action string
	detail       string // part of the entry's detail
}

// mutations has every route of manageTable that is not a GET. A new route must be added here, and its change
// must go through store.withAuditedTx; what it does outside the database, through store.recordAuditEvent
// before it does it.
func mutations(ids map[string]string) map[string]mutation {
	return map[string]mutation{
		"POST /manage/projects": {`{"name":"new one","openai_api_key":"sk-canary-0123456789abcdefWXYZ"}`,
			"project.create", `"upstream.api_key":[null,{"hint":"WXYZ"`},
		"PATCH /manage/projects/{id}": {
			`{"is_active":false,"policy":{"models":["` + strings.Repeat("x", 200) + `"]}}`,
			"project.change", `{"is_active":[true,false],"policy":[{},{"models":["xxx`},
		"DELETE /manage/projects/{id}": {``, "project.delete",
			`{"name":"audited","tokens":1,"upstreams":1}`},
		"POST /manage/projects/{id}/tokens/revoke": {``, "project.revoke_tokens", `{"tokens":1}`},
		"POST /manage/projects/{id}/upstreams": {`{"name":"u","api_key":"sk-0123456789abcdef0123"}`,
			"upstream.create", `{"project_id":"` + ids["project"] + `","name":[null,"u"]`},
		"PATCH /manage/projects/{id}/upstreams/{upstream}": {
			`{"api_key":"sk-other-0123456789abcdefWXYZ","weight":7}`, "upstream.change", `"weight":[1,7]`},
		"DELETE /manage/projects/{id}/upstreams/{upstream}": {``, "upstream.delete", `"is_active":[true,false]`},
		"POST /manage/projects/{id}/upstreams/{upstream}/test": {``, "upstream.test",
			`{"project_id":"` + ids["project"] + `"}`},
		"POST /manage/tokens": {`{"project_id":"` + ids["project"] + `","name":"t2","max_requests":5}`,
			"token.create", `"name":[null,"t2"]`},
		"PATCH /manage/tokens/{id}": {`{"max_requests":9,"expires_at":null}`,
			"token.change", `"max_requests":[null,9]`},
		"DELETE /manage/tokens/{id}":             {``, "token.revoke", `"revoked_at":[null,"`},
		"POST /manage/tokens/{id}/rotate":        {``, "token.rotate", `"overlap_until":[null,"`},
		"DELETE /manage/projects/{id}/content":   {``, "content.erase", `{}`},
		"DELETE /manage/projects/{id}/cache":     {``, "cache.empty", `{}`},
		"DELETE /manage/projects/{id}/end-users": {``, "end_user.erase", `{}`},
		"DELETE /manage/streams/{id}":            {``, "stream.cut", `"token_id":"tok_`},
		"POST /manage/prices": {`{"match":"m1","input":"2.5","output":8}`,
			"price.set", `{"input":[1,2.5],"output":[null,8]}`},
		"DELETE /manage/prices/{id}": {``, "price.delete", `{"match":["m1",null],"input":[1,null]}`},
		"POST /manage/keys": {`{"name":"k2","role":"viewer"}`,
			"key.create", `{"name":[null,"k2"],"role":[null,"viewer"]}`},
		"PATCH /manage/keys/{id}":  {`{"role":"admin"}`, "key.change", `{"role":["operator","admin"]}`},
		"DELETE /manage/keys/{id}": {``, "key.revoke", `{"revoked_at":[null,"`},
		"POST /manage/webhooks": {`{"name":"w2","format":"slack","url":"` + deadURL + `"}`,
			"webhook.create", `{"name":[null,"w2"],"format":[null,"slack"],"events":[null,[]]`},
		"PATCH /manage/webhooks/{id}": {`{"url":"` + deadURL + `2","events":["token.expiring"]}`,
			"webhook.change", `{"events":[[],["token.expiring"]],"url":"replaced"}`},
		"DELETE /manage/webhooks/{id}":      {``, "webhook.delete", `{"name":["w",null],`},
		"POST /manage/webhooks/{id}/rotate": {``, "webhook.rotate", `{"old_secret_until":[null,"`},
		"POST /manage/webhooks/{id}/test":   {``, "webhook.test", `{"delivery":"del_`},
		"POST /manage/webhooks/{id}/deliveries/{delivery}/redeliver": {``, "webhook.redeliver",
			`{"delivery":"` + ids["delivery"] + `"}`},
	}
}

// createObjects creates one object of each kind, and returns their ids.
func (p *testProxy) createObjects() map[string]string {
	p.t.Helper()
	var project struct {
		ID        string
		Upstreams []struct{ ID string }
	}
	p.manage("POST", "/manage/projects", fmt.Sprintf(`{"name":"audited","api_key":%q}`, p.provider.key), 201, &project)
	var token, key, price, webhook, delivery struct{ ID, Token, Key string }
	p.manage("POST", "/manage/tokens", `{"project_id":"`+project.ID+`"}`, 201, &token)
	p.manage("POST", "/manage/keys", `{"name":"k","role":"operator"}`, 201, &key)
	p.manage("POST", "/manage/prices", `{"match":"m1","input":1}`, 201, &price)
	p.manage("POST", "/manage/webhooks", `{"name":"w","format":"standard","url":"`+deadURL+`"}`, 201, &webhook)
	p.manage("POST", "/manage/webhooks/"+webhook.ID+"/test", ``, 200, &delivery)
	p.provider.setScript(endlessScript)
	if _, err := p.stream(p.token).read(1); err != nil {
		p.t.Fatal(err)
	}
	var streams struct{ Data []struct{ ID string } }
	p.manage("GET", "/manage/streams", "", 200, &streams)
	return map[string]string{"project": project.ID, "upstream": project.Upstreams[0].ID, "token": token.ID,
		"key": key.ID, "price": price.ID, "stream": streams.Data[len(streams.Data)-1].ID,
		"webhook": webhook.ID, "delivery": delivery.ID}
}

// deadURL is a webhook's URL where nothing listens.
const deadURL = "http://127.0.0.1:1/hook"

// expandObjectPattern replaces the placeholders of a pattern by the ids of objects. It returns the path, and
// the id of the object that a call to it changes.
func expandObjectPattern(ids map[string]string, pattern string) (path, object string) {
	_, path, _ = strings.Cut(pattern, " ")
	kind, _, _ := strings.Cut(strings.TrimPrefix(path, "/manage/"), "s/")
	object = ids[kind]
	path = strings.NewReplacer("{id}", object, "{upstream}", ids["upstream"], "{delivery}", ids["delivery"]).
		Replace(path)
	if strings.Contains(pattern, "{upstream}") {
		object = ids["upstream"]
	}
	if strings.HasSuffix(pattern, "/end-users") {
		path += "?end_user=a"
	}
	return path, object
}

// managedRows returns everything that administrators manage, as text.
func (p *testProxy) managedRows() string {
	p.t.Helper()
	var out strings.Builder
	for _, table := range []string{"projects", "upstreams", "tokens", "management_keys", "prices", "webhooks",
		"deliveries"} {
		rows, err := p.instance.store.readDB.QueryContext(p.t.Context(), `SELECT * FROM `+table+` ORDER BY seq`)
		if err != nil {
			p.t.Fatal(err)
		}
		columns, err := rows.Columns()
		if err != nil {
			p.t.Fatal(err)
		}
		values := make([]any, len(columns))
		for i := range values {
			values[i] = new(any)
		}
		for rows.Next() {
			if err := rows.Scan(values...); err != nil {
				p.t.Fatal(err)
			}
			for i := range values {
				out.WriteString(fmt.Sprintf("%s.%s=%v ", table, columns[i], *values[i].(*any)))
			}
		}
		rows.Close()
	}
	return out.String()
}

// TestAuditEveryChange (AD17): each route that changes something leaves exactly one entry, which says who did
// what, from where, and in which request.
func TestAuditEveryChange(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.secrets = append(p.secrets, "sk-canary-0123456789abcdefWXYZ", "sk-other-0123456789abcdefWXYZ")
	var keys struct{ Data []struct{ ID string } }
	p.manage("GET", "/manage/keys", "", 200, &keys)
	for _, route := range p.instance.manage.manageTable() {
		if !strings.HasPrefix(route.pattern, "GET ") && !strings.HasSuffix(route.pattern, "/simulate") {
			p.checkMutation(route.pattern, keys.Data[0].ID)
		}
	}
	if k := p.verifyAudit(); len(k.problems) > 0 || k.lastHead.seq < 60 {
		t.Errorf("the trail of %d entries has problems: %v", k.lastHead.seq, k.problems)
	}
}

// checkMutation makes the change of a route with the key of id actor, and checks the entry that it leaves.
func (p *testProxy) checkMutation(pattern, actor string) {
	t := p.t
	t.Helper()
	before := p.lastAuditSeq()
	ids := p.createObjects()
	if got := len(p.auditEntries(before)); got != 6 {
		t.Errorf("creating six objects left %d entries", got)
	}
	m, ok := mutations(ids)[pattern]
	if !ok {
		t.Errorf("%s is not in this test: its change must be in the audit trail", pattern)
		return
	}
	before = p.lastAuditSeq()
	method, _, _ := strings.Cut(pattern, " ")
	path, object := expandObjectPattern(ids, pattern)
	res := p.manageAs(p.adminKey, method, path, m.body)
	entries := p.auditEntries(before)
	if res.status >= 300 || len(entries) != 1 {
		t.Errorf("%s: got %d %s and %d entries", pattern, res.status, res.body, len(entries))
		return
	}
	if object == "" || strings.HasSuffix(path, "/upstreams") {
		object = between(res.body, `"id":"`, `"`)
	}
	e := entries[0]
	if e.actorID != actor || e.role != roleAdmin || e.address != "127.0.0.1" ||
		e.requestID != res.header.Get("X-Request-Id") || e.action != m.action || e.object != object ||
		time.Since(time.UnixMilli(e.at)) > time.Minute {
		t.Errorf("%s: the entry is %+v; want %s of %s", pattern, e, m.action, object)
	}
	if !strings.Contains(e.detail, m.detail) || !json.Valid([]byte(e.detail)) {
		t.Errorf("%s: the detail is %s; want %s in it", pattern, e.detail, m.detail)
	}
	// A refused change leaves no entry.
	if method != "DELETE" {
		refused := p.manageAs(p.adminKey, method, path, `{"no_such":1}`)
		if n := len(p.auditEntries(before)); refused.status != 400 || n != 1 {
			t.Errorf("%s refused: got %d and %d entries", pattern, refused.status, n)
		}
	}
	// The next route needs the same names.
	p.manageAs(p.adminKey, "DELETE", "/manage/projects/"+ids["project"], "")
	p.manageAs(p.adminKey, "DELETE", "/manage/prices/"+ids["price"], "")
	p.manageAs(p.adminKey, "DELETE", "/manage/webhooks/"+ids["webhook"], "")
	p.manageAs(p.adminKey, "DELETE", "/manage/prices/"+between(res.body, `"id":"`, `"`), "")
	if pattern == "POST /manage/projects" {
		p.manageAs(p.adminKey, "DELETE", "/manage/projects/"+object, "")
	}
}

// TestAuditReportsEveryColumn: entries have every column that an administrator can change, including columns
// that a later version adds.
func TestAuditReportsEveryColumn(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it lists columns with a pragma")
	p := newTest(t, nil)
	for table, c := range map[string]struct {
		fields []auditField
		other  string // columns that an entry has in another form, or that no administrator changes
	}{
		"projects":  {(&projectRow{}).auditFields(), "deleted_at"},
		"upstreams": {(&upstreamRow{}).auditFields(), "project deleted_at sealed_key key_hint"},
		"tokens": {(&tokenRow{}).auditFields(),
			"project hash old_hash old_hash_until idle_expiry request_count last_used_at"},
		"management_keys": {(&managementKeyRow{}).auditFields(), "hash"},
		"prices":          {(&priceRow{}).auditFields(), "price"},
		"webhooks":        {(&webhookRow{}).auditFields(), "sealed_url sealed_secret old_secret"},
	} {
		expected := strings.Fields(c.other + " seq id version created_at updated_at bound_by mac")
		for _, f := range c.fields {
			expected = append(expected, f.name)
		}
		columns, err := collect(t.Context(), p.instance.store.readDB, "listing columns",
			func(name *string) []any { return []any{name} },
			`SELECT name FROM pragma_table_info(?)`, table) // without generated columns
		if err != nil || len(columns) < 5 {
			t.Errorf("%s has %d columns: %v", table, len(columns), err)
		}
		for _, column := range columns {
			if !slices.Contains(expected, column) {
				t.Errorf("no entry has a change of %s.%s: add it to auditFields", table, column)
			}
		}
	}
}

// TestNoAuditNoChange (AD17): where the entry cannot be written, nothing is changed, and the administrator
// gets an error.
func TestNoAuditNoChange(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true // a trail that cannot be written is logged as one
	ids := p.createObjects()
	p.execSQL(`CREATE TRIGGER test_full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'disk full'); END`)
	before, lastSeq := p.managedRows(), p.lastAuditSeq()
	for pattern, m := range mutations(ids) {
		method, _, _ := strings.Cut(pattern, " ")
		path, _ := expandObjectPattern(ids, pattern)
		res := p.manageAs(p.adminKey, method, path, m.body)
		if res.status != 500 || strings.Contains(res.body, "disk full") {
			t.Errorf("%s: got %d %s", pattern, res.status, res.body)
		}
		if p.managedRows() != before {
			t.Fatalf("%s: something was changed", pattern)
		}
	}
	p.execSQL(`DROP TRIGGER test_full`)
	if p.lastAuditSeq() != lastSeq || len(p.verifyAudit().problems) > 0 {
		t.Errorf("the trail: %v", p.verifyAudit().problems)
	}
}

// execSQL changes the database without the program's knowledge.
func (p *testProxy) execSQL(statements ...string) {
	p.t.Helper()
	for _, text := range statements {
		if strings.Contains(text, "RAISE(") {
			requireSQLite(p.t, "its trigger is written for SQLite")
		}
		if usesTestDatabase() {
			if strings.HasPrefix(text, "DROP TRIGGER") { // one trigger there refuses what two refuse here
				text = strings.ReplaceAll(text, "never_removed", "never_changed")
				dropped := regexp.MustCompile(`DROP TRIGGER (\w+)`)
				text = dropped.ReplaceAllString(text, "DROP TRIGGER IF EXISTS $1 ON audit")
			}
			text = strings.NewReplacer("AS BLOB", "AS BYTEA", "x'00'", `'\x00'::bytea`, "x''", "''::bytea").
				Replace(text)
		}
		if _, err := p.instance.store.writeDB.ExecContext(p.t.Context(), text); err != nil {
			p.t.Fatalf("%v: %s", err, text)
		}
	}
}

// execSQLBound is execSQL for rows that grant something: they are bound afterwards, as if the program had written
// them.
func (p *testProxy) execSQLBound(statements ...string) {
	p.t.Helper()
	ctx := p.t.Context()
	err := p.instance.store.withAuditedTx(ctx, systemOrigin(time.Now()), func(tx *auditedTx) (auditEvent, error) {
		for _, text := range statements { // in one transaction: a row whose binding is not right yet would be refused
			if _, err := tx.ExecContext(ctx, text); err != nil {
				return auditEvent{}, err
			}
		}
		return auditEvent{action: "test"}, eachGrantingRow(ctx, tx, func(row grantingRow) error {
			tx.bind(row)
			return saveBinding(ctx, tx, row)
		})
	})
	if err != nil {
		p.t.Fatal(err)
	}
}

// TestAuditAppendOnly: the database itself refuses to change the trail.
func TestAuditAppendOnly(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "TestPostgresAuditAppendOnly has PostgreSQL's statements")
	p := newTest(t, nil)
	const row = `SELECT 2, at, 'me', role, address, request_id, action, object, detail, prev, mac
		FROM audit WHERE seq = 1`
	for _, text := range []string{
		`UPDATE audit SET actor = 'me' WHERE seq = 1`,
		`UPDATE audit SET seq = 100 WHERE seq = 1`,
		`DELETE FROM audit`,
		`DELETE FROM audit WHERE seq = 1`,
		`INSERT INTO audit ` + row,
		`INSERT OR REPLACE INTO audit ` + row,
		`REPLACE INTO audit ` + row,
		`INSERT OR IGNORE INTO audit ` + row,
		`UPDATE OR REPLACE audit SET seq = 2 WHERE seq = 1`,
		`INSERT INTO audit ` + row + ` ON CONFLICT DO UPDATE SET actor = 'me'`,
	} {
		_, err := p.instance.store.writeDB.ExecContext(t.Context(), text)
		if err == nil || !strings.Contains(err.Error(), "audit trail") {
			t.Errorf("%s: %v", text, err)
		}
	}
	if k := p.verifyAudit(); len(k.problems) > 0 {
		t.Errorf("the trail: %v", k.problems)
	}
}

// TestAuditTampering (AD18): a change that somebody without the key makes to the database is detected at the
// first entry that is not as it was written, even after the program has appended further entries.
func TestAuditTampering(t *testing.T) {
	t.Parallel()
	noMAC := strings.Repeat("00", 32)
	const dropTriggers = `DROP TRIGGER audit_never_changed; DROP TRIGGER audit_never_removed;
		DROP TRIGGER audit_at_the_end;`
	const columns = `at, actor, role, address, request_id, action, object, detail, prev, mac`
	const removeLast = `DELETE FROM audit WHERE seq = 8`
	for name, c := range map[string]struct {
		tamper  string
		first   int64 // the lowest seq with a problem
		problem string
	}{
		"actor":  {`UPDATE audit SET actor = 'key_other' WHERE seq = 5`, 5, "entry 5 was changed"},
		"time":   {`UPDATE audit SET at = at + 1 WHERE seq = 5`, 5, "entry 5 was changed"},
		"detail": {`UPDATE audit SET detail = '{}' WHERE seq = 5`, 5, "entry 5 was changed"},
		"between fields": {`
			UPDATE audit SET action = action || substr(object, 1, 1), object = substr(object, 2) WHERE seq = 5`,
			5, "entry 5 was changed"},
		"its mac": {`UPDATE audit SET mac = zeroblob(32) WHERE seq = 5`, 5, "entry 5 was changed"},
		"every mac": {`UPDATE audit SET mac = zeroblob(32), prev = zeroblob(32)`,
			1, "entry 1 was changed"},
		"removed":           {`DELETE FROM audit WHERE seq = 5`, 5, "entry 5 is missing"},
		"three removed":     {`DELETE FROM audit WHERE seq IN (4, 5, 6)`, 4, "entries 4 to 6 are missing"},
		"the first removed": {`DELETE FROM audit WHERE seq = 1`, 1, "entry 1 is missing"},
		"the last removed": {`DELETE FROM audit WHERE seq = (SELECT max(seq) FROM audit)`,
			8, "entry 8 is missing"},
		"all removed": {`DELETE FROM audit`, 1, "entries 1 to 8 are missing"},
		"swapped": {`UPDATE audit SET seq = -1 WHERE seq = 5; UPDATE audit SET seq = 5 WHERE seq = 6;
			UPDATE audit SET seq = 6 WHERE seq = -1`, 5, "entry 5 was changed"},
		"gap closed": {`DELETE FROM audit WHERE seq = 7; UPDATE audit SET seq = 7 WHERE seq = 8`,
			7, "entry 7 was changed"},
		"added": {`INSERT INTO audit SELECT 9, ` + columns + ` FROM audit WHERE seq = 8`,
			9, "there are entries after 8"},
		"added below": {`INSERT INTO audit SELECT 0, ` + columns + ` FROM audit WHERE seq = 8`,
			0, "entry 0 was not written"},
		"head removed": {`DELETE FROM settings WHERE name = 'audit_head'`, 9, "the record of the last entry"},
		"head moved back": {`
			UPDATE settings SET value = '7' || substr(value, 2) WHERE name = 'audit_head'; ` + removeLast,
			8, "the record of the last entry"},
		"head made up": {`
			UPDATE settings SET value = '7:` + noMAC + `:` + noMAC + `'
			WHERE name = 'audit_head'; ` + removeLast, 8, "the record of the last entry"},
		"nothing": {`SELECT 1`, 0, ""},
		"removed with the head": {`
			DELETE FROM audit WHERE seq > 3; DELETE FROM settings WHERE name = 'audit_head'`,
			4, "the record of the last entry"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			checkTampering(t, dropTriggers+c.tamper, c.first, c.problem)
		})
	}
}

// checkTampering runs statements on a trail of eight entries. The check must then report a problem, "" for none,
// whose lowest seq is first.
func checkTampering(t *testing.T, statements string, first int64, problem string) {
	p := newTest(t, nil)
	for i := p.lastAuditSeq(); i < 8; i++ {
		p.newToken(`"name":"x"`)
	}
	p.execSQL(statements)
	k := p.verifyAudit()
	if k.firstProblemSeq != first || !strings.Contains(strings.Join(k.problems, "\n"), problem) {
		t.Errorf("the first problem is at %d: %q; want %d, %q", k.firstProblemSeq, k.problems, first, problem)
	}
	p.newToken(`"name":"after"`) // changes are possible all the same
	k = p.verifyAudit()
	if (len(k.problems) > 0) != (problem != "") {
		t.Errorf("after another entry, the first problem is at %d: %q", k.firstProblemSeq, k.problems)
	}
}

// TestAuditHeadRollback: somebody removes the last entries and puts an earlier head back. Both a head that was
// noted elsewhere and the next entry of the server that wrote the removed entries show that.
func TestAuditHeadRollback(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	before := p.lastAuditSeq()
	old, err := p.instance.store.setting(t.Context(), "audit_head")
	if err != nil {
		t.Fatal(err)
	}
	p.newToken(`"name":"hidden"`)
	p.newToken(`"name":"hidden too"`)
	noted, _, _, err := p.instance.store.loadAuditHead(t.Context(), p.instance.store.chain)
	if err != nil {
		t.Fatal(err)
	}
	p.execSQL(`DROP TRIGGER audit_never_removed`, fmt.Sprintf(`DELETE FROM audit WHERE seq > %d`, before),
		`UPDATE settings SET value = '`+old+`' WHERE name = 'audit_head'`)
	k, err := p.instance.store.verifyAudit(t.Context(), p.instance.store.chain, &noted)
	if err != nil || k.intact() || k.firstProblemSeq != noted.seq {
		t.Errorf("compared with a noted head: %v %v", k.problems, err)
	}
	p.newToken(`"name":"after"`)
	k = p.verifyAudit()
	if k.intact() || k.firstProblemSeq != before+1 || !strings.Contains(k.problems[0], "are missing") {
		t.Errorf("after another entry: %v", k.problems)
	}
}

// TestAuditKey: the trail's key is sealed in the database, survives a restart, and cannot be removed without
// an error.
func TestAuditKey(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	p.newToken(`"name":"after the restart"`)
	if k := p.verifyAudit(); len(k.problems) > 0 {
		t.Errorf("after a restart: %v", k.problems)
	}
	sealed, err := p.instance.store.setting(t.Context(), "audit_key")
	if err != nil {
		t.Fatal(err)
	}
	p.execSQL(`DELETE FROM settings WHERE name = 'audit_key'`)
	err = p.instance.store.openAudit(context.Background(), p.instance.sealer, systemOrigin(time.Now()))
	if err == nil || !strings.Contains(err.Error(), "its key was removed") {
		t.Errorf("opening a trail without its key: %v", err)
	}
	other, err := newSealer([]byte("0123456789abcdef0123456789abcdef"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openAuditChain(other, sealed); err == nil {
		t.Error("another encryption key opens the sealed key")
	}
	if _, err := p.instance.sealer.open([]byte(sealed), keyCheckContext); err == nil {
		t.Error("the sealed key opens as another kind of secret")
	}
}

type auditList struct {
	Data []struct {
		Seq                  int64
		At                   time.Time
		Actor, Role, Address string
		ActorName            string `json:"actor_name"`
		RequestID            string `json:"request_id"`
		Action, Object       string
		Detail               map[string]any
		Prev, MAC            any // not part of the answer
	}
	Next string
}

// auditActions returns "seq action" of each entry on all pages of a query, newest first.
func (p *testProxy) auditActions(query string) (out []string) {
	p.t.Helper()
	for after := ""; ; {
		var l auditList
		p.manage("GET", "/manage/audit?limit=3"+query+after, "", 200, &l)
		for _, e := range l.Data {
			out = append(out, fmt.Sprint(e.Seq, " ", e.Action))
		}
		if l.Next == "" {
			return out
		}
		after = "&after=" + l.Next
	}
}

// TestAuditList: admins alone can list entries, newest first, page by page, by actor, action, object and time.
func TestAuditList(t *testing.T) {
	t.Parallel()
	const environment = "environment-key-Jx81LmQp04TzVb67wYcN"
	p := newTest(t, map[string]string{"MANAGEMENT_TOKEN": environment})
	p.secrets = append(p.secrets, environment)
	id, _ := p.newToken(`"name":"watched"`)
	if res := p.manageAs(environment, "PATCH", "/manage/tokens/"+id, `{"name":"renamed"}`); res.status != 200 {
		t.Fatal(res.body)
	}
	p.manage("DELETE", "/manage/tokens/"+id, "", 200, nil)
	_, operator := p.newKey("o", "operator")
	all := p.auditActions("")
	descending := func(a, b string) int { return strings.Compare(b, a) }
	if len(all) != 8 || all[0] != "8 key.create" || all[7] != "1 audit.begin" || !slices.IsSortedFunc(all, descending) {
		t.Errorf("all: %q", all)
	}
	var l auditList
	p.manage("GET", "/manage/audit?limit=1&action=token.change", "", 200, &l)
	e := l.Data[0]
	if e.Actor != "env" || e.ActorName != "" || e.Role != "admin" || e.Address != "127.0.0.1" || e.Object != id ||
		parseRequestID(e.RequestID) == 0 || fmt.Sprint(e.Detail["name"]) != "[watched renamed]" ||
		e.Detail["project_id"] != p.project || len(e.Detail) != 2 || e.Prev != nil || e.MAC != nil {
		t.Errorf("the entry: %+v", e)
	}
	p.manage("GET", "/manage/audit?limit=1&action=token.revoke", "", 200, &l)
	me, at := l.Data[0].Actor, l.Data[0].At
	if l.Data[0].ActorName != "first key" {
		t.Errorf("the actor's name: %+v", l.Data[0])
	}
	p.checkAuditFilters(t, id, me, at)
	if res := p.manageAs(operator, "GET", "/manage/audit", ""); res.status != 403 {
		t.Errorf("an operator: got %d", res.status)
	}
	// A damaged entry does not hide the others.
	p.execSQL(`UPDATE audit SET detail = 'x"' WHERE seq = 8`)
	p.manage("GET", "/manage/audit", "", 200, &l)
	if l.Data[0].Detail["unreadable"] != `x"` {
		t.Errorf("the damaged entry: %+v", l.Data[0])
	}
}

// checkAuditFilters lists the trail of TestAuditList with filters. id is the token that it changes, me the key of
// the administrator, and at the time of the entry 7. The triggers are dropped.
func (p *testProxy) checkAuditFilters(t *testing.T, id, me string, at time.Time) {
	t.Helper()
	// The entries become a second apart, however quickly they were written.
	p.execSQL(`DROP TRIGGER audit_never_changed`,
		fmt.Sprintf(`UPDATE audit SET at = %d + (seq - 7) * 1000`, at.UnixMilli()))
	stamp := func(d time.Duration) string { return at.Add(d).UTC().Format(time.RFC3339Nano) }
	for query, want := range map[string][]string{
		"&object=" + id:                         {"7 token.revoke", "6 token.change", "5 token.create"},
		"&object=none":                          nil,
		"&actor=env":                            {"6 token.change"},
		"&actor=system":                         {"2 key.create", "1 audit.begin"},
		"&actor=" + me + "&object=" + id:        {"7 token.revoke", "5 token.create"},
		"&actor=" + me + "&action=token.create": {"5 token.create", "4 token.create"},
		"&action=key.create":                    {"8 key.create", "2 key.create"},
		"&actor=env&object=" + id + "&action=token.change": {"6 token.change"},
		"&actor=env&object=" + id + "&action=token.create": nil,
		"&from=" + stamp(0):                                          {"8 key.create", "7 token.revoke"},
		"&to=" + stamp(0) + "&object=" + id:                          {"6 token.change", "5 token.create"},
		"&from=" + stamp(-2100*time.Millisecond) + "&to=" + stamp(0): {"6 token.change", "5 token.create"},
		"&action=token.create&from=" + stamp(-2100*time.Millisecond): {"5 token.create"},
	} {
		if got := p.auditActions(query); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", query, got, want)
		}
	}
	for query, param := range map[string]string{"from=x": "from", "to=2026-01-01": "to", "after=5.x": "after",
		"after=x": "after", "actor=": "actor", "seq=1": "seq"} {
		expectParamError(t, query, p.manageAs(p.adminKey, "GET", "/manage/audit?"+query, ""), 400, param)
	}
}

// TestAuditLongValue: a value of any length leaves an entry of bounded length.
func TestAuditLongValue(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	models := `"` + strings.Repeat("m", 200) + `"` + strings.Repeat(`,"`+strings.Repeat("n", 200)+`"`, 300)
	p.manage("PATCH", "/manage/tokens/"+p.tokenID, `{"policy":{"models":[`+models+`]}}`, 200, nil)
	e := p.auditEntries(p.lastAuditSeq() - 1)[0]
	if len(e.detail) > 500 || !strings.Contains(e.detail, `"policy":[{},{"bytes":6`) ||
		!strings.Contains(e.detail, `"sha256":"`) {
		t.Errorf("the detail has %d bytes: %.500s", len(e.detail), e.detail)
	}
}

// TestAuditFailedSignIns: a wrong key leaves an entry, which names the key if it was valid once. Nobody can
// fill the disk with such entries, and the trail says how many were left out.
func TestAuditFailedSignIns(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"TRUSTED_PROXIES": "127.0.0.1"})
	revokedID, revoked := p.newKey("r", "operator")
	p.manage("DELETE", "/manage/keys/"+revokedID, "", 200, nil)
	before := p.lastAuditSeq()
	minute := time.Now().Unix() / 60
	res := p.manageAs("sk-guess-canary-8812", "PATCH", "/manage/projects/"+promptCanary, "{}",
		"X-Forwarded-For", "192.0.2.1")
	p.manageAs(revoked, "GET", "/manage/projects", "", "X-Forwarded-For", "192.0.2.2")
	p.do("GET", "/manage/projects", "") // without a key
	entries := p.auditEntries(before)
	if len(entries) != 2 {
		t.Fatalf("%d entries", len(entries))
	}
	e := entries[0]
	if e.action != "sign_in_failed" || e.actorID != "" || e.role != "" || e.address != "192.0.2.1" ||
		e.object != "PATCH /manage/projects/{id}" || e.requestID != res.header.Get("X-Request-Id") || e.detail != "{}" {
		t.Errorf("a guessed key: %+v", e)
	}
	if e = entries[1]; e.actorID != revokedID || e.address != "192.0.2.2" {
		t.Errorf("a revoked key: %+v", e)
	}
	for i := range 60 {
		p.manageAs("guess", "GET", "/manage/projects", "", "X-Forwarded-For", fmt.Sprintf("198.51.100.%d", i))
	}
	p.secrets = append(p.secrets, "sk-guess-canary-8812")
	if err := p.stop(); err != nil { // which records how many were left out
		t.Fatal(err)
	}
	p.start()
	var recorded, omitted int
	for _, e := range p.auditEntries(before) {
		if e.action != "sign_in_failed" {
			t.Errorf("an unexpected entry: %+v", e)
		}
		n := 0
		_, _ = fmt.Sscanf(e.detail, `{"left_out":%d}`, &n)
		omitted += n
		if e.address != "" {
			recorded++
		}
	}
	limit := maxFailuresAuditedPerMinute
	if time.Now().Unix()/60 != minute {
		limit *= 2
	}
	if recorded > limit || recorded+omitted != 62 {
		t.Errorf("%d have an entry, %d are reported as left out", recorded, omitted)
	}
	if k := p.verifyAudit(); len(k.problems) > 0 {
		t.Errorf("the trail: %v", k.problems)
	}
}

// TestAuditVerify: `audit verify` distinguishes an intact trail from one that is not, beside a server, without
// one, and where nothing can be written. It says what to do.
func TestAuditVerify(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	verify := func(args ...string) (string, error) {
		t.Helper()
		return runProgram(t, p.env, append([]string{"audit", "verify"}, args...)...)
	}
	out, err := verify()
	if err != nil || !strings.Contains(out, "is intact: 4 entries, from 20") || strings.Contains(out, "already had") {
		t.Fatalf("beside a server: %v: %s", err, out)
	}
	noted := between(out, "Its end is ", "\n")
	p.newToken(`"name":"more"`)
	other := noted[:len(noted)-2] + "00"
	if strings.HasSuffix(noted, "00") {
		other = noted[:len(noted)-2] + "11"
	}
	for head, want := range map[string]string{
		noted:               "",
		other:               "entry 4 is not the one that was noted",
		"6" + noted[1:]:     "entry 6 is not the one that was noted",
		"4":                 "looks like",
		"x:y":               "looks like",
		"0" + noted[1:]:     "looks like",
		noted + ":" + noted: "looks like",
	} {
		out, err := verify(head)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(out+err.Error(), want) {
			t.Errorf("%s: %v: %s", head, err, out)
		}
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if out, err = verify(noted); err != nil || !strings.Contains(out, "5 entries") {
		t.Errorf("with the server stopped: %v: %s", err, out)
	}
	if os.Getuid() != 0 { // root may write everywhere
		if err := os.Chmod(p.env["DATA_DIR"], 0o500); err != nil {
			t.Fatal(err)
		}
		out, err = verify(noted)
		if e := os.Chmod(p.env["DATA_DIR"], 0o700); e != nil || err != nil {
			t.Errorf("where nothing can be written: %v: %s", err, out)
		}
	}
	requireSQLite(t, "it changes copies of the file") // from here on
	p.checkTamperedCopies()
	out, err = runProgram(t, p.env, "doctor")
	if err != nil || !strings.Contains(out, "ok    audit trail: intact, 5 entries") {
		t.Errorf("doctor: %v: %s", err, out)
	}
}

// TestAuditVerifyMisused: `audit verify` with wrong arguments, or without a database, says so and creates nothing.
func TestAuditVerifyMisused(t *testing.T) {
	t.Parallel()
	empty := serveEnv(t)
	for _, args := range [][]string{{"audit"}, {"audit", "check"}, {"audit", "verify", "1:ab", "1:ab"}} {
		if _, err := runProgram(t, empty, args...); err == nil || !strings.Contains(err.Error(), "usage: ") {
			t.Errorf("%v: %v", args, err)
		}
	}
	_, err := runProgram(t, empty, "audit", "verify")
	if err == nil || !strings.Contains(err.Error(), "there is no database") {
		t.Errorf("no database: %v", err)
	}
	if _, err := os.Stat(empty["DATA_DIR"]); err == nil {
		t.Error("the command created a data directory")
	}
}

// checkTamperedCopies runs `audit verify` and `doctor` on copies of the stopped server's data that were
// tampered with.
func (p *testProxy) checkTamperedCopies() {
	t := p.t
	t.Helper()
	for name, c := range map[string]struct{ tamper, want string }{
		"changed":     {`UPDATE audit SET actor = 'nobody' WHERE seq = 3`, "the first bad event is 3"},
		"cut":         {`DELETE FROM audit WHERE seq > 2`, "the first bad event is 3"},
		"key removed": {`DELETE FROM settings WHERE name = 'audit_key'`, "key of the audit trail was removed"},
		"key changed": {`UPDATE settings SET value = 'AAAA' WHERE name = 'audit_key'`,
			"key of the audit trail: a stored secret cannot be decrypted"},
		"many":  {`UPDATE audit SET at = 0`, "the first bad event is 1"},
		"older": {`PRAGMA user_version = 1`, "from a version without an audit trail"},
		"newer": {`PRAGMA user_version = 99`, "newer llm-proxy"},
	} {
		env := p.tamperedCopy(c.tamper)
		out, err := runProgram(t, env, "audit", "verify")
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v: %s", name, err, out)
		}
		out, err = runProgram(t, env, "doctor")
		if err == nil || name != "newer" && !strings.Contains(out, "audit trail: ") {
			t.Errorf("%s: doctor: %v: %s", name, err, out)
		}
	}
}

// tamperedCopy returns an environment with a copy of the stopped server's data, changed by a statement
// without the program's knowledge.
func (p *testProxy) tamperedCopy(statement string) map[string]string {
	p.t.Helper()
	env := maps.Clone(p.env)
	env["DATA_DIR"] = filepath.Join(p.t.TempDir(), "data")
	if err := os.CopyFS(env["DATA_DIR"], os.DirFS(p.env["DATA_DIR"])); err != nil {
		p.t.Fatal(err)
	}
	// CopyFS makes files that everybody can read.
	for name, mode := range map[string]os.FileMode{"": 0o700, keyFileName: 0o600, lockFileName: 0o600,
		"llm-proxy.db": 0o600} {
		if err := os.Chmod(filepath.Join(env["DATA_DIR"], name), mode); err != nil {
			p.t.Fatal(err)
		}
	}
	db, err := openSQLite(filepath.Join(env["DATA_DIR"], "llm-proxy.db"), 1, "")
	if err != nil {
		p.t.Fatal(err)
	}
	defer db.Close()
	for _, text := range []string{
		`DROP TRIGGER audit_never_changed`, `DROP TRIGGER audit_never_removed`, statement} {
		if _, err := db.ExecContext(p.t.Context(), text); err != nil {
			p.t.Fatalf("%v: %s", err, text)
		}
	}
	return env
}

// TestAuditUpgrade: a database from a version without a trail gets one, whose first entry says what the database
// already contained.
func TestAuditUpgrade(t *testing.T) {
	t.Parallel()
	env := serveEnv(t)
	if err := os.MkdirAll(env["DATA_DIR"], 0o700); err != nil {
		t.Fatal(err)
	}
	schema, err := schemaFiles.ReadFile("schema/001_init.sql")
	if err != nil {
		t.Fatal(err)
	}
	db, err := openSQLite(filepath.Join(env["DATA_DIR"], "llm-proxy.db"), 1, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{string(schema), `PRAGMA user_version = 1`,
		`INSERT INTO projects (id, name, created_at, updated_at) VALUES ('proj_old', 'old', 1, 1)`} {
		if _, err := db.ExecContext(t.Context(), text); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	env["ENCRYPTION_KEY"] = goodKey
	if out, err := runProgram(t, env, "doctor"); err == nil || !strings.Contains(out, "the next start migrates it") ||
		strings.Contains(out, "FAIL  database") {
		t.Errorf("doctor: %v %s", err, out) // it fails, because the database has no key yet
	}
	s := serveProgram(t, env)
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	out, err := runProgram(t, env, "audit", "verify")
	if err != nil || !strings.Contains(out, "already had 1 projects, 0 tokens and 0 management keys") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestAuditRestore: a backup has its own trail, which a restore continues with an entry that says what was
// replaced.
func TestAuditRestore(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	file := filepath.Join(p.dir, "backup.db")
	if out, err := runProgram(t, p.env, "backup", file); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.newToken(`"name":"since"`)
	head, ok, _, err := p.instance.store.loadAuditHead(t.Context(), p.instance.store.chain)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	for i, choice := range []string{"none", "since", "all"} {
		env := p.tamperedCopy(`SELECT 1`)
		out, err := runProgram(t, env, "restore", file, "--revoke="+choice)
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		out, err = runProgram(t, env, "audit", "verify")
		if err != nil || !strings.Contains(out, fmt.Sprintf("intact: %d entries", 5+i/2)) {
			t.Errorf("%s: %v: %s", choice, err, out)
		}
		st, err := openReadOnly(filepath.Join(env["DATA_DIR"], "llm-proxy.db"), true)
		if err != nil {
			t.Fatal(err)
		}
		entries, err := st.auditPage(t.Context(), 4, 5)
		detail := fmt.Sprintf(`{"revoke":%q,"audit_head_before":%q}`, choice, head)
		if err != nil || len(entries) != 1 || entries[0].action != "database.restore" ||
			entries[0].actorID != "system" || entries[0].detail != detail {
			t.Errorf("%s: %+v %v", choice, entries, err)
		}
		if err := st.close(); err != nil {
			t.Error(err)
		}
	}
}

// TestAuditVerifyBesideWriter: entries that are appended while the trail is read are no problem.
func TestAuditVerifyBesideWriter(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	stop := make(chan struct{})
	var writers sync.WaitGroup
	for range 3 {
		writers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					p.newToken(`"name":"x"`)
				}
			}
		})
	}
	for i := 0; i < 10 || p.lastAuditSeq() < 30; i++ {
		if out, err := runProgram(t, p.env, "audit", "verify"); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	close(stop)
	writers.Wait()
	if k := p.verifyAudit(); !k.intact() || k.lastHead.seq < 5 {
		t.Errorf("%d entries: %v", k.lastHead.seq, k.problems)
	}
}

// TestAuditPages (AD17): signing in to the pages, failing to, and signing out are in the trail. A sign-in that
// cannot be recorded is refused.
func TestAuditPages(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true // a trail that cannot be written is logged as one
	post := func(path, form string, headers ...string) testResponse {
		return p.do("POST", path, form, append([]string{"Content-Type", "application/x-www-form-urlencoded",
			"Sec-Fetch-Site", "same-origin"}, headers...)...)
	}
	before := p.lastAuditSeq()
	want := func(action, object, detail string, res testResponse) {
		t.Helper()
		entries := p.auditEntries(before)
		if len(entries) != 1 {
			t.Fatalf("%d entries for %s, which got %d %s", len(entries), action, res.status, res.body)
		}
		if e := entries[0]; e.action != action || e.object != object || e.address != "127.0.0.1" ||
			e.detail != detail || e.requestID != res.header.Get("X-Request-Id") {
			t.Errorf("%s: %+v", action, e)
		}
		before = p.lastAuditSeq()
	}
	p.execSQL(`CREATE TRIGGER test_full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'disk full'); END`)
	if res := post("/admin/sign-in", "key="+p.adminKey); res.status != 500 || res.header.Get("Set-Cookie") != "" {
		t.Errorf("without a trail: got %d %v", res.status, res.header)
	}
	p.execSQL(`DROP TRIGGER test_full`)
	want("sign_in_failed", "POST /admin/sign-in", `{}`, post("/admin/sign-in", "key=wrong"))
	for _, path := range []string{"/admin/sign-out", "/admin/sign-out-everywhere"} {
		res := post("/admin/sign-in", "key="+p.adminKey)
		cookie, _, _ := strings.Cut(res.header.Get("Set-Cookie"), ";")
		key := p.auditEntries(before)[0].actorID
		want("sign_in", key, `{}`, res)
		detail := `{}`
		if path != "/admin/sign-out" {
			detail = `{"everywhere":true,"sessions":1}`
		}
		want("sign_out", key, detail, post(path, "", "Cookie", cookie))
	}
}
