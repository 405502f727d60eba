// Tests of what a provider's numbers and a database that refuses rows can do to the ledger: one project's provider
// never stops the ledger of another, and no limit forgets a call.
package main

import (
	"fmt"
	"math"
	"net/url"
	"strings"
	"testing"
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
	lie(50)
	p.waitSettled()
	lie(50) // 100 × 10^17 nano-dollars are more than an int64
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
		if v < 0 {
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
			"estimated_calls would_refuse total_us cache_hits saved saved_us",
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
			SELECT grain, project, token, %s, model || %d, endpoint, outcome, asked, calls,
			input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls, estimated_calls,
			would_refuse, total_us, cache_hits, saved, saved_us
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
