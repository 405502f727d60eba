// Tests of what a provider's numbers and a database that refuses rows can do to the ledger: one project's provider
// never stops the ledger of another, and no limit forgets a call.
package main

import (
	"errors"
	"fmt"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// addProject adds a project with the test's provider and returns a token of it. fields are JSON members of the token.
func (p *testProxy) addProject(name, fields string) (projectID, token string) {
	p.t.Helper()
	var v struct{ ID string }
	p.manage("POST", "/manage/projects", fmt.Sprintf(`{"name":%q,"openai_api_key":%q}`, name, p.provider.key), 201, &v)
	before := p.project
	p.project = v.ID
	_, token = p.newToken(fields)
	p.project = before
	return v.ID, token
}

// TestSumsSaturate: a provider reports the largest usage that is believed, of a model with the highest price, until
// its project's sums have reached the largest int64. They stay there. The ledger of another project goes on, all
// reports work, and limits refuse.
func TestSumsSaturate(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.manage("POST", "/manage/prices", `{"match":"gold","input":1000000,"output":1000000}`, 201, nil)
	_, other := p.addProject("other", `"name":"other","max_requests":3`)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.Contains(r.body, `"model":"gold"`) {
			return c.reply(200, fmt.Sprintf(`{"model":"gold","choices":[{"message":{"content":"x"}}],
				"usage":{"prompt_tokens":%d,"completion_tokens":%d}}`, maxBilledTokens/2, maxBilledTokens/2))
		}
		return chatScript(c, r)
	})
	lie := func(calls int) {
		t.Helper()
		for range calls {
			res := p.postAs(p.token, "/v1/chat/completions", `{"model":"gold","messages":[]}`)
			if res.status != 200 {
				t.Fatalf("got %d %s", res.status, res.body)
			}
		}
	}
	for enough := false; !enough; { // again if an hour, a day or a month ends meanwhile
		hour := time.Now().Truncate(time.Hour)
		lie(50)
		p.waitSettled()
		lie(50) // 100 × 10^17 nano-dollars are more than an int64
		enough = time.Now().Truncate(time.Hour).Equal(hour)
	}
	for range 2 {
		if res := p.chatAs(other); res.status != 200 {
			t.Errorf("another project's call: got %d %s", res.status, res.body)
		}
	}
	p.checkSaturated()
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	if a, b := p.chatAs(other), p.chatAs(other); a.status != 200 || b.status != 429 {
		t.Errorf("the other project's third and fourth calls after a restart: got %d and %d", a.status, b.status)
	}
	lie(1)
	p.checkSaturated()
	for _, per := range []string{"hour", "month", "lifetime"} {
		p.manage("PATCH", "/manage/tokens/"+p.tokenID,
			`{"policy":{"limits":[{"count":"dollars","max":100000000,"per":"`+per+`"}]}}`, 200, nil)
		if res := p.postAs(p.token, "/v1/chat/completions", `{"model":"gold","messages":[]}`); res.status != 429 {
			t.Errorf("with a limit per %s: got %d %s", per, res.status, res.body)
		}
	}
}

// checkSaturated checks that every report works and has a sum at the largest int64.
func (p *testProxy) checkSaturated() {
	t := p.t
	t.Helper()
	p.waitSettled()
	p.checkSums()
	for _, q := range []string{"interval=total", "interval=day", "interval=month", "interval=hour",
		"interval=total&group_by=project", "interval=total&group_by=token", "interval=day&group_by=model",
		"interval=total&group_by=model", "interval=total&group_by=endpoint,outcome", "interval=day&group_by=outcome"} {
		answer := p.manageAs(p.adminKey, "GET", "/manage/usage?"+q, "")
		if answer.status != 200 || !strings.Contains(answer.body, `"cost":`+formatNanos(math.MaxInt64)) ||
			strings.Contains(answer.body, `:-`) {
			t.Errorf("%s: got %d %s", q, answer.status, answer.body)
		}
	}
	b := p.signIn(p.adminKey)
	for _, path := range []string{"/admin/dashboard", "/admin/dashboard?period=24h&measure=cost",
		"/admin/dashboard?period=90d&measure=cost&by=model", "/admin/projects/" + p.project,
		"/admin/dashboard?" + url.Values{"project": {p.project}}.Encode()} {
		if res := b.get(path); res.status != 200 || strings.Contains(res.body, "-$") {
			t.Errorf("%s: got %d %s", path, res.status, between(res.body, "-$", "\n"))
		}
	}
	for name, v := range p.metrics() {
		if v < 0 && name != "llm_proxy_replica_clock_offset_milliseconds" {
			t.Errorf("the metric %s is %v", name, v)
		}
	}
}

// TestSumsAtTheEdge: whatever column of the sums is at its end already, calls are recorded and reports work.
func TestSumsAtTheEdge(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.chat()
	p.waitSettled()
	for table, columns := range map[string]string{
		"usage_sums": "calls input_tokens cached_tokens output_tokens reasoning_tokens cost unpriced_calls " +
			"estimated_calls would_refuse total_us cache_hits saved saved_us prompt_saved client_retries",
		"project_hours": "calls input_tokens output_tokens cost unpriced_calls caller_errors policy_errors " +
			"provider_errors proxy_errors",
		"project_latency": "first_bytes answers",
		"tokens":          "request_count",
	} {
		for column := range strings.FieldsSeq(columns) {
			p.execSQL(fmt.Sprintf(`UPDATE %s SET %s = %d`, table, column, int64(math.MaxInt64)))
		}
	}
	// A second row for each, so that reports would overflow, too.
	for i, at := range []string{"at + 1", "at - 3600000", "at - 86400000"} {
		p.execSQL(fmt.Sprintf(`INSERT INTO usage_sums
			SELECT grain, project, token, %s, model || %d, endpoint, outcome, asked, service_tier, calls,
			input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls, estimated_calls,
			would_refuse, total_us, cache_hits, saved, saved_us, prompt_saved, client_retries
			FROM usage_sums WHERE at %% 3600000 = 0 AND model NOT LIKE '%%_0'`, at, i))
	}
	p.execSQL(`INSERT INTO project_hours SELECT project, at - 3600000, calls, input_tokens, output_tokens, cost,
		unpriced_calls, caller_errors, policy_errors, provider_errors, proxy_errors FROM project_hours`)
	_, token := p.newToken(`"name":"new","policy":{"limits":[{"count":"tokens","max":1000,"per":"day"}]}`)
	for range 2 {
		if res := p.chatAs(token); res.status != 200 {
			t.Errorf("got %d %s", res.status, res.body)
		}
	}
	p.waitSettled()
	if rows := p.allRequests(); len(rows) != 3 {
		t.Errorf("%d rows", len(rows))
	}
	var project struct {
		Limits []struct{ Left float64 }
	}
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"limits":[{"count":"tokens","max":1000,"per":"month"},
		{"count":"requests","max":1000,"per":"day"},{"count":"dollars","max":1000,"per":"lifetime"}]}}`, 200, nil)
	p.manage("GET", "/manage/projects/"+p.project, "", 200, &project)
	for i, l := range project.Limits {
		if l.Left != 0 {
			t.Errorf("%v is left of limit %d", l.Left, i)
		}
	}
	if res := p.chatAs(token); res.status != 429 || len(project.Limits) != 3 {
		t.Errorf("with limits that are used up: got %d; %+v", res.status, project)
	}
	b := p.signIn(p.adminKey)
	for _, path := range []string{"/manage/usage?interval=total", "/manage/usage?interval=month&group_by=model",
		"/manage/usage?interval=hour&group_by=token,endpoint", "/manage/usage?group_by=project"} {
		p.manage("GET", path, "", 200, nil)
	}
	for _, path := range []string{"/admin/dashboard", "/admin/dashboard?period=24h",
		"/admin/dashboard?period=90d&measure=tokens&by=model", "/admin/projects/" + p.project} {
		if res := b.get(path); res.status != 200 {
			t.Errorf("%s: got %d %s", path, res.status, between(res.body, "-$", "\n"))
		}
	}
}

// TestRowsRefused: a database that refuses rows while the program runs is a failure of the ledger. Calls are refused,
// readyz and a metric say so, and so does the doctor. No limit forgets a call, and once the database takes rows
// again, every call that was answered has one.
func TestRowsRefused(t *testing.T) {
	t.Parallel()
	for name, trigger := range map[string]string{
		"rows":                "BEFORE INSERT ON requests BEGIN SELECT RAISE(ABORT, 'no')",
		"rows, silently":      "BEFORE INSERT ON requests BEGIN SELECT RAISE(IGNORE)",
		"rows of one token":   "BEFORE INSERT ON requests WHEN NEW.token > 1 BEGIN SELECT RAISE(FAIL, 'no')",
		"rows, with rollback": "BEFORE INSERT ON requests BEGIN SELECT RAISE(ROLLBACK, 'no')",
		"pending records":     "BEFORE INSERT ON begun BEGIN SELECT RAISE(ABORT, 'no')",
		"sums":                "BEFORE INSERT ON usage_sums BEGIN SELECT RAISE(ABORT, 'no')",
		"changes of sums":     "BEFORE UPDATE ON usage_sums BEGIN SELECT RAISE(ABORT, 'no')",
		"hours":               "BEFORE INSERT ON project_hours BEGIN SELECT RAISE(ABORT, 'no')",
		"counts of tokens":    "BEFORE UPDATE ON tokens BEGIN SELECT RAISE(ABORT, 'no')",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "info"})
			p.allowErrors = true
			_, token := p.newToken(`"name":"limited","max_requests":6`)
			if res := p.chatAs(token); res.status != 200 {
				t.Fatalf("got %d", res.status)
			}
			p.waitSettled()
			p.execSQL(`CREATE TRIGGER refusal ` + trigger + `; END`)
			answered := 1
			waitFor(t, "the ledger to fail", func() bool {
				if p.chatAs(token).status == 200 {
					answered++
				}
				return !p.instance.ledger.healthy()
			})
			waitFor(t, "the refusal to be stored for the doctor", func() bool {
				text, err := p.instance.store.setting(t.Context(), ledgerRefusal)
				return err == nil && text != ""
			})
			if name == "pending records" { // the rows of calls that have ended are written, which is no recovery
				waitFor(t, "the rows", func() bool { _, settles := p.instance.ledger.backlog(); return settles == 0 })
			}
			p.checkRefusals()
			if n := p.metrics()["llm_proxy_ledger_rows_refused_total"]; n == 0 {
				t.Error("no refused row is counted")
			}
			if lines, err := p.runDoctor(nil); err == nil || !hasFinding(lines, "FAIL", "ledger", "refuses the rows") {
				t.Errorf("the doctor says %v %q", err, lines)
			}
			p.execSQL(`DROP TRIGGER refusal`)
			waitFor(t, "recovery", p.instance.ledger.healthy)
			for answered < 6 {
				if res := p.chatAs(token); res.status != 200 {
					t.Fatalf("after recovery: got %d %s", res.status, res.body)
				}
				answered++
			}
			if res := p.chatAs(token); res.status != 429 {
				t.Errorf("call 7 of 6: got %d", res.status)
			}
			p.checkRecorded(6)
			waitFor(t, "the file of kept calls to go", func() bool {
				_, err := os.Stat(p.instance.cfg.unwrittenFile())
				return err != nil
			})
			if lines, err := p.runDoctor(nil); err != nil || !hasFinding(lines, "ok", "ledger", "") {
				t.Errorf("after recovery the doctor says %v %q", err, lines)
			}
		})
	}
}

// checkRecorded checks that a number of calls have a row with outcome ok, and that the sums equal the rows.
func (p *testProxy) checkRecorded(want int) {
	p.t.Helper()
	p.waitSettled()
	n := 0
	for _, v := range p.allRequests() {
		if v.outcome == outcomeOK {
			n++
		}
	}
	if n != want {
		p.t.Errorf("%d rows are ok, want %d", n, want)
	}
	p.checkSums()
	p.checkCounts()
}

// TestRefusedRowReduced: a row that the database refuses because of its texts is recorded without them. It blocks no
// other, and limits count it.
func TestRefusedRowReduced(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "info"})
	p.allowErrors = true
	p.execSQL(`CREATE TRIGGER refusal BEFORE INSERT ON requests WHEN NEW.model LIKE 'bad%'
		BEGIN SELECT RAISE(ABORT, 'no'); END`)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		body := chatResponseBody
		if strings.Contains(r.body, `"seed":7`) {
			body = strings.ReplaceAll(body, "gpt-4o-mini-2024-07-18", "bad model")
		}
		return c.reply(200, body)
	})
	_, token := p.newToken(`"name":"limited","max_requests":8,"policy":{"limits":[{"count":"requests","max":4,` +
		`"per":"day","model":"gpt-4o*"}]}`)
	for i := range 4 {
		if res := p.chatAs(token, fmt.Sprintf(`"seed":%d`, 5+i)); res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
	}
	if p.checkRecorded(4); !p.instance.ledger.healthy() {
		t.Error("one row makes the ledger fail")
	}
	reduced := 0
	for _, v := range p.allRequests() {
		if v.model == "" && v.address == "" && v.counts.input > 0 {
			reduced++
		}
	}
	if reduced != 1 || !strings.Contains(string(p.log.bytes()), "refuses a row") {
		t.Errorf("%d rows are reduced", reduced)
	}
	p.execSQL(`DROP TRIGGER refusal`) // a start does not accept it
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	if res := p.chatAs(token); res.status != 429 {
		t.Errorf("call 5 of 4, after a restart: got %d", res.status)
	}
}

// TestRefusedRowsAcrossRestart: rows that the database refuses until the program stops are kept in a file, beside
// those that are in it already. The next start records them, and limits count them.
func TestRefusedRowsAcrossRestart(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"DRAIN_TIMEOUT": "1s"})
	p.allowErrors = true
	_, token := p.newToken(`"name":"limited","max_requests":4`)
	p.chatAs(token)
	p.waitSettled()
	kept := p.instance.cfg.unwrittenFile()
	id := p.instance.proxy.ids.next(time.Now())
	earlier := strings.TrimSuffix(unwrittenLine(t, p.instance.store, &requestRow{id: id, started: id >> idTimeShift,
		project: 1, token: 2, endpoint: "POST /v1/chat/completions", outcome: outcomeOK, status: 200, source: usageNone,
		firstByteUS: -1, attempts: 1}), "\n")
	mustOverwrite(t, kept, earlier) // as if a file had stayed, without its last line break
	p.execSQL(`CREATE TRIGGER refusal BEFORE INSERT ON requests BEGIN SELECT RAISE(ABORT, 'no'); END`)
	p.chatAs(token)
	waitFor(t, "the ledger to fail", func() bool { return !p.instance.ledger.healthy() })
	if err := p.stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
	if text := mustReadFile(t, kept); strings.Count(text, "\n") != 2 || !strings.HasPrefix(text, earlier) {
		t.Errorf("kept are %q", text)
	}
	if lines, _ := p.runDoctor(nil); !hasFinding(lines, "warn", "ledger", kept+" has 2 calls") {
		t.Errorf("the doctor says %q", lines)
	}
	db, err := openSQLite(p.instance.cfg.databaseFile, 1, "")
	if err == nil {
		_, err = db.Exec(`DROP TRIGGER refusal`)
	}
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	p.start()
	if a, b := p.chatAs(token), p.chatAs(token); a.status != 200 || b.status != 429 {
		t.Errorf("calls 4 and 5 of 4, after the restart: got %d and %d", a.status, b.status)
	}
	p.checkRecorded(4)
	if _, err := os.Stat(kept); err == nil {
		t.Error("the file is still there")
	}
}

// unwrittenLine returns a line of the file of unwritten rows.
func unwrittenLine(t *testing.T, st *store, r *requestRow) string {
	t.Helper()
	line, err := newOutbox("", st.chain, nil).appendLine(nil, r, 1, false)
	if err != nil {
		t.Fatal(err)
	}
	return string(line)
}

// TestDurableFields: what is kept of a row that could not be written is everything but stored content, and the price
// of which its cost was made.
func TestDurableFields(t *testing.T) {
	t.Parallel()
	row := &requestRow{}
	durable := map[uintptr]bool{}
	for _, field := range row.durableFields() {
		durable[reflect.ValueOf(field).Pointer()] = true
	}
	var check func(name string, v reflect.Value)
	check = func(name string, v reflect.Value) {
		if v.Kind() == reflect.Struct {
			for i := range v.NumField() {
				check(name+"."+v.Type().Field(i).Name, v.Field(i))
			}
			return
		}
		if durable[v.Addr().Pointer()] == (name == "row.content" || name == "row.price") {
			t.Errorf("durableFields and %s: listed %v", name, durable[v.Addr().Pointer()])
		}
	}
	check("row", reflect.ValueOf(row).Elem())
}

// TestRestoreMovesUnwritten: a restore moves the calls that the replaced database did not take aside with it. They
// are not recorded in the restored one.
func TestRestoreMovesUnwritten(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.chat()
	p.waitSettled()
	backup := filepath.Join(p.dir, "backup.db")
	if out, err := runProgram(t, p.env, "backup", backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	file := p.instance.cfg.databaseFile
	line := unwrittenLine(t, p.instance.store, &requestRow{id: minIDAt(time.Now()),
		started: time.Now().UnixMilli(), project: 1, token: 1, outcome: outcomeOK, source: usageNone})
	mustOverwrite(t, unwrittenFileName(file), line)
	if out, err := runProgram(t, p.env, "restore", "--revoke=none", backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	aside, err := filepath.Glob(file + ".before-restore-*Z")
	if err != nil || len(aside) != 1 || mustReadFile(t, unwrittenFileName(aside[0])) != line {
		t.Errorf("aside are %v, %v", aside, err)
	}
	p.start()
	if rows := p.allRequests(); len(rows) != 1 {
		t.Errorf("%d rows after the restore", len(rows))
	}
}

// TestUnrecordedAnswer: a call that reaches the provider while the database is locked gets 503. The provider bills it,
// so it counts in sums and limits with what was reserved. A call whose limit is exact does not reach the provider.
func TestUnrecordedAnswer(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		status       int
		fields, body string
		reaches      bool
		output       int64
	}{
		"success":        {200, `"name":"l"`, chatBody(`"max_tokens":700`), true, 700},
		"stream":         {200, `"name":"l"`, chatBody(`"max_tokens":700`, `"stream":true`), true, 700},
		"without a max":  {200, `"name":"l"`, chatBody(), true, assumedOutput},
		"error":          {400, `"name":"l"`, chatBody(`"max_tokens":700`), true, 0},
		"an exact limit": {200, `"name":"l","max_requests":5`, chatBody(), false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "info"})
			p.allowErrors = true
			p.setPragma(`PRAGMA busy_timeout = 20`)
			id, token := p.newToken(tt.fields)
			if res := p.do("GET", "/v1/models", "", "Authorization", "Bearer "+token); res.status != 200 {
				t.Fatalf("got %d", res.status) // the token is in memory now
			}
			p.waitSettled()
			p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
				if tt.status == 400 {
					return c.reply(400, `{"error":{"message":"no","code":"x"}}`)
				}
				return chatScript(c, r)
			})
			sent := len(p.provider.received())
			unlock := p.lockDatabase()
			if res := p.postAs(token, "/v1/chat/completions", tt.body); res.status != 503 ||
				res.header.Get("Retry-After") == "" {
				t.Errorf("got %d %s", res.status, res.body)
			}
			unlock()
			waitFor(t, "recovery", p.instance.ledger.healthy)
			if reached := len(p.provider.received()) > sent; reached != tt.reaches {
				t.Errorf("the call reached the provider: %v", reached)
			}
			rows := p.ledger()
			row := rows[len(rows)-1]
			if tt.reaches != (row.Outcome == "truncated") || row.ErrorCode != "ledger_unavailable" ||
				row.Status != 503 || row.OutputTokens != tt.output {
				t.Errorf("the ledger has %+v", row)
			}
			want := int64(1)
			if tt.reaches {
				want++
			}
			if n := p.requestCount(id); n != want {
				t.Errorf("the token has %d calls, want %d", n, want)
			}
			p.checkSums()
			p.checkCounts()
		})
	}
}
