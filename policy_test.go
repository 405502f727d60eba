// These tests check whole calls against policies and limits: limits hold exactly, for new and for live
// tokens, under any parallelism, and across restarts, evictions and administrators' changes.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// An outcomeCase is a call, and what it counts in the limits of its token.
type outcomeCase struct {
	name             string
	script           func(*providerConn, recordedRequest) bool
	method           string // "" for POST
	path, body       string // "" for a chat call
	leaves           bool   // the client disconnects during the call
	requests, tokens int    // tokens is -1 if the provider's bill is unknown: the estimate counts
}

// postAs makes a POST with a token.
func (p *testProxy) postAs(token, path, body string, headers ...string) testResponse {
	p.t.Helper()
	return p.do("POST", path, body,
		append([]string{"Authorization", "Bearer " + token, "Content-Type", "application/json"}, headers...)...)
}

// burst makes n calls at the same moment and returns the number of answers with each status.
func (p *testProxy) burst(token string, n int) map[int]int {
	return callAtOnce(n, func(int) int {
		_, status := p.sendChat(context.Background(), token, `"n":1`)
		return status
	})
}

// requestCount returns a token's request_count.
func (p *testProxy) requestCount(id string) int64 {
	p.t.Helper()
	p.waitSettled()
	var v struct {
		RequestCount int64 `json:"request_count"`
	}
	p.manage("GET", "/manage/tokens/"+id, "", 200, &v)
	return v.RequestCount
}

// TestLimitAcrossRestart: what was used before a restart stays used.
func TestLimitAcrossRestart(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	id, token := p.newToken(`"name":"l","max_requests":20`)
	total := 0
	for _, n := range []int{5, 6, 100, 30} {
		total += p.burst(token, n)[200]
		if err := p.stop(); err != nil {
			t.Fatal(err)
		}
		p.start()
	}
	if n := len(p.provider.received()); total != 20 || n != 20 || p.requestCount(id) != 20 {
		t.Errorf("of 20 calls %d were answered, %d forwarded, %d counted", total, n, p.requestCount(id))
	}
}

// TestLimitWhileChanged: continuous changes by administrators and evictions of idle tokens neither reset nor
// lose a count.
func TestLimitWhileChanged(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	for round := range 5 {
		id, token := p.newToken(`"name":"l","max_requests":50`)
		hits := len(p.provider.received())
		ctx, stop := context.WithCancel(t.Context())
		var others sync.WaitGroup
		others.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				res := p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+id, fmt.Sprintf(`{"name":"n%d"}`, i))
				if res.status != 200 {
					t.Errorf("PATCH: got %d %s", res.status, res.body)
				}
			}
		})
		others.Go(func() {
			pace := time.NewTicker(100 * time.Microsecond) // without it, tokens could hardly be loaded
			defer pace.Stop()
			for ctx.Err() == nil {
				settled := p.instance.ledger.flush(t.Context()) == nil
				p.instance.registry.evict(time.Now().Add(time.Hour).UnixMilli(), settled)
				<-pace.C
			}
		})
		last := int64(0)
		for range 4 {
			p.burst(token, 40)
			n := p.requestCount(id)
			if n < last {
				t.Errorf("round %d: the count went from %d to %d", round, last, n)
			}
			last = n
		}
		stop()
		others.Wait()
		if n := len(p.provider.received()) - hits; n != 50 || last != 50 {
			t.Errorf("round %d: of 50 calls %d were forwarded and %d counted", round, n, last)
		}
	}
}

// TestEvictedTokenIsNotUsed: a call that finds a token at the moment of its eviction looks it up again.
// Otherwise the next call would use another counter.
func TestEvictedTokenIsNotUsed(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	g, hash := p.instance.registry, tokenHash(p.token)
	lookup := func() *liveToken {
		token, _, err := g.lookup(t.Context(), hash, time.Now().UnixMilli())
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	later := time.Now().Add(time.Hour).UnixMilli()
	evicted := lookup()
	g.evict(later, false)
	if lookup() != evicted {
		t.Error("a token was evicted although the ledger had not settled")
	}
	g.evict(later, true)
	if evicted.acquire() {
		t.Error("an evicted token can be used")
	}
	running := lookup()
	if running == evicted || !running.acquire() {
		t.Fatal("the token cannot be used again")
	}
	g.evict(later, true)
	if lookup() != running {
		t.Error("a token was evicted during a call")
	}
	running.release(time.Now())
}

func tokenHash(token string) [32]byte {
	hash, _ := hashCredential(tokenPrefix, token)
	return hash
}

// TestLimitValues: 0 allows nothing, null means no limit, and any other value but a whole number is refused.
func TestLimitValues(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for value, want := range map[string]int{"0": 429, "null": 200, "1": 200} {
		_, token := p.newToken(`"name":"v","max_requests":` + value)
		if res := p.chatAs(token); res.status != want {
			t.Errorf("max_requests %s: got %d, want %d", value, res.status, want)
		}
	}
	for value := range strings.FieldsSeq(`-1 9223372036854775807 9223372036854775808 "5" 1.5 1e400 true [1] {} NaN`) {
		res := p.manageAs(p.adminKey, "POST", "/manage/tokens",
			`{"project_id":"`+p.project+`","name":"v","max_requests":`+value+`}`)
		if res.status != 400 {
			t.Errorf("max_requests %s: got %d %s", value, res.status, res.body)
		}
	}
}

// TestWhatCounts: a forwarded call counts, whatever its outcome; a refused call does not.
func TestWhatCounts(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true // a provider that refuses its key is logged as an error
	id, token := p.newToken(`"name":"c","max_requests":6,"policy":{"models":["gpt-4o-mini"]}`)
	hangUp := func(*providerConn, recordedRequest) bool { return false }
	cutBody := func(c *providerConn, _ recordedRequest) bool {
		_, _ = c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1"))
		return false
	}
	const chat = "/v1/chat/completions"
	otherModel := strings.Replace(chatBody(), "mini", "maxi", 1)
	for _, c := range []struct {
		name       string
		script     func(*providerConn, recordedRequest) bool
		path, body string
		status     int
		counts     int64
	}{
		{name: "answered", script: chatScript, path: chat, body: chatBody(), status: 200, counts: 1},
		{name: "model not allowed", script: chatScript, path: chat, body: otherModel, status: 403},
		{name: "no such endpoint", script: chatScript, path: "/v1/nothing", body: chatBody(), status: 404},
		{name: "invalid JSON", script: chatScript, path: chat, body: "{", status: 400},
		{name: "provider 500", script: errorScript(500), path: chat, body: chatBody(), status: 500, counts: 1},
		{name: "provider 429", script: errorScript(429), path: chat, body: chatBody(), status: 429, counts: 1},
		{name: "provider 401", script: errorScript(401), path: chat, body: chatBody(), status: 502, counts: 1},
		{name: "connection closed", script: hangUp, path: chat, body: chatBody(), status: 502, counts: 1},
		{name: "response cut off", script: cutBody, path: chat, body: chatBody(), status: 0, counts: 1},
		{name: "limit used up", script: chatScript, path: chat, body: chatBody(), status: 429},
	} {
		p.provider.setScript(c.script)
		before := p.requestCount(id)
		res := p.postAs(token, c.path, c.body)
		if res.status != c.status && (c.status != 0 || res.err == nil) {
			t.Errorf("%s: got %d %s", c.name, res.status, res.body)
		}
		if n := p.requestCount(id) - before; n != c.counts {
			t.Errorf("%s: counts %d, want %d", c.name, n, c.counts)
		}
	}
	p.checkCounts()
}

// errorScript answers with a status and an empty error.
func errorScript(status int) func(*providerConn, recordedRequest) bool {
	return replyScript(status, `{"error":{}}`)
}

// TestUsedUp: the refusal does not invite retries that cannot succeed. A raised limit applies from the next
// call on and keeps the count.
func TestUsedUp(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	id, token := p.newToken(`"name":"u","max_requests":1`)
	p.chatAs(token)
	res := p.chatAs(token)
	if res.status != 429 || res.errorCode() != "project_spend_limit_exceeded" ||
		!strings.Contains(res.body, `"insufficient_quota"`) ||
		res.header.Get("X-Should-Retry") != "false" || res.header.Get("Retry-After") != "" {
		t.Errorf("got %d %v %s", res.status, res.header, res.body)
	}
	p.manage("PATCH", "/manage/tokens/"+id, `{"max_requests":2}`, 200, nil)
	if a, b := p.chatAs(token), p.chatAs(token); a.status != 200 || b.status != 429 {
		t.Errorf("after one more was allowed: got %d, %d", a.status, b.status)
	}
	p.manage("PATCH", "/manage/tokens/"+id, `{"max_requests":1}`, 200, nil)
	if res := p.chatAs(token); res.status != 429 || p.requestCount(id) != 2 {
		t.Errorf("after the limit was lowered: got %d, count %d", res.status, p.requestCount(id))
	}
}

// TestDeletedWhileRunning: calls that run while their project is deleted are recorded under its name.
func TestDeletedWhileRunning(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.provider.setScript(streamScript(chatEvents(true)[1:2], 1, stallStream))
	const n = 50
	for range n {
		if _, err := p.stream(p.token).read(1); err != nil {
			t.Fatal(err)
		}
	}
	p.manage("DELETE", "/manage/projects/"+p.project, "", http.StatusOK, nil)
	rows := p.allRequests()
	if len(rows) != n {
		t.Errorf("%d rows for %d calls", len(rows), n)
	}
	for _, v := range rows {
		if v.projectID != p.project || v.tokenID != p.tokenID || v.outcome != outcomeTruncated ||
			v.source != usageEstimated || v.counts.output == 0 {
			t.Errorf("the ledger has %+v", v.requestRow)
		}
	}
	p.checkSums()
	p.checkCounts()
}

// TestRetryAfterHolds (LI12): a client that retries after Retry-After, or after exactly retry-after-ms, is
// admitted.
func TestRetryAfterHolds(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ limit, kind string }{
		"requests":            {`{"count":"requests","max":3,"per":"second"}`, "requests"},
		"one request":         {`{"count":"requests","max":1,"per":"second"}`, "requests"},
		"requests per minute": {`{"count":"requests","max":120,"per":"minute"}`, "requests"},
		"tokens":              {`{"count":"tokens","max":60,"per":"second"}`, "tokens"},
		"tokens of a model":   {`{"count":"tokens","max":45,"per":"second","model":"gpt-4o*"}`, "tokens"},
		"the longer of two": {`{"count":"requests","max":2,"per":"second"},` +
			`{"count":"tokens","max":40,"per":"second"}`, "tokens"},
	} {
		for _, header := range []string{"Retry-After", "Retry-After-Ms"} {
			t.Run(name+" "+header, func(t *testing.T) {
				t.Parallel()
				checkRetryAfter(t, c.limit, c.kind, header)
			})
		}
	}
}

// checkRetryAfter uses up a limit, waits for as long as the header says, and expects that the next call is
// admitted.
func checkRetryAfter(t *testing.T, limit, kind, header string) {
	t.Helper()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.provider.setScript(replyScript(200, usageResponse(26, 1)))
	_, token := p.newLimitedToken(limit)
	var res testResponse
	for range 300 {
		if res = p.chatAs(token, tinyBody); res.status != 200 {
			break
		}
	}
	refused := time.Now()
	if res.status != 429 || res.errorCode() != "rate_limit_exceeded" ||
		!strings.Contains(res.body, `"type":"`+kind+`"`) || res.header.Get("X-Should-Retry") != "" {
		t.Fatalf("got %d %v %s", res.status, res.header, res.body)
	}
	seconds, err := strconv.Atoi(res.header.Get("Retry-After"))
	ms, err2 := strconv.Atoi(res.header.Get("Retry-After-Ms"))
	if err != nil || err2 != nil || seconds < 1 || ms < 1 || ms > 1000*seconds || ms <= 1000*(seconds-1) {
		t.Fatalf("the waits are %q and %q", res.header.Get("Retry-After"), res.header.Get("Retry-After-Ms"))
	}
	wait := time.Duration(ms) * time.Millisecond
	if header == "Retry-After" {
		wait = time.Duration(seconds) * time.Second
	}
	time.Sleep(time.Until(refused.Add(wait))) // the elapsed time is what this test is about
	if res := p.chatAs(token, tinyBody); res.status != 200 {
		t.Errorf("after the wait of %v: got %d %s", wait, res.status, res.body)
	}
}

// TestAmountsAreAlike: the amounts of a limit have one form wherever somebody reads them: in the error, in the record
// of the call, in the log and on the pages.
func TestAmountsAreAlike(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(200, strings.Replace(chatResponseBody,
			`"prompt_tokens":9,"completion_tokens":3,"total_tokens":12`,
			`"prompt_tokens":2000,"completion_tokens":4000,"total_tokens":6000`, 1))
	})
	admin := p.signIn(p.adminKey)
	for _, c := range []struct{ limit, name, message, used string }{
		{`{"count":"tokens","max":10000,"per":"day"}`, "10,000 tokens per day",
			" tokens, and only 4,000 tokens are left. It resets in ", "6,000"},
		{`{"count":"dollars","max":0.0042,"per":"month","model":"gpt-4o*"}`, "$0.0042 per month for models gpt-4o*",
			"may need $0.003, and only $0.0015 is left. It resets in ", "$0.0027"},
		{`{"count":"dollars","max":0.0031,"per":"lifetime"}`, "$0.0031 in total",
			"may need $0.003, and only $0.0004 is left.", "$0.0027"},
		{`{"count":"tokens","max":6001,"per":"hour"}`, "6,001 tokens per hour",
			" tokens, and only 1 token is left. Try again in ", "6,000"},
		{`{"count":"requests","max":1,"per":"week"}`, "1 request per week", "is used up. It resets in ", "1"},
	} {
		id, token := p.newToken(`"name":"amounts","policy":{"limits":[` + c.limit + `]}`)
		if a := p.chatAs(token, `"max_tokens":1`); a.status != 200 {
			t.Fatalf("%s: got %d %s", c.name, a.status, a.body)
		}
		p.waitSettled()
		a := p.chatAs(token, `"max_tokens":5000`)
		if a.status != 429 || !strings.Contains(a.body, c.name) || !strings.Contains(a.body, c.message) ||
			regexp.MustCompile(`\d[hms]\d|\d{5,}|[^$]0\.0`).MatchString(a.body) {
			t.Errorf("%s: got %d %s, want %s", c.name, a.status, a.body, c.message)
		}
		row := p.lastCall()
		most, _, _ := strings.Cut(c.name, " ")
		for what, text := range map[string]string{"record": row.LimitHit, "log": string(p.log.bytes()),
			"page of the call": admin.get("/admin/requests/" + row.ID).body} {
			if !strings.Contains(text, c.name) {
				t.Errorf("%s is not in the %s", c.name, what)
			}
		}
		page := admin.get("/admin/tokens/" + id).body
		if !strings.Contains(page, c.used) || !strings.Contains(page, most) {
			t.Errorf("%s: %s and %s are not on the token's page", c.name, c.used, most)
		}
	}
}

// A refusalCase is a limit that a call exceeds, and the error it gets.
type refusalCase struct {
	limit   string
	members string // of the request; "" for any
	code    string // "" for project_spend_limit_exceeded
	kind    string // "" for insufficient_quota
	retry   string // "" for no, yes, or hour: at a time that may be too far for SDKs to sleep
	message string
}

func refusalCases() []refusalCase {
	return []refusalCase{
		{limit: `{"count":"requests","max":1,"per":"minute"}`, code: "rate_limit_exceeded", kind: "requests",
			retry: "yes", message: "of 1 request per minute is used up. Try again in"},
		{limit: `{"count":"requests","max":1,"per":"hour"}`, code: "rate_limit_exceeded", kind: "requests",
			retry: "hour", message: "of 1 request per hour is used up"},
		{limit: `{"count":"requests","max":1,"per":"day"}`,
			message: "of 1 request per day is used up. It resets in"},
		{limit: `{"count":"requests","max":1,"per":"week"}`, message: "It resets in"},
		{limit: `{"count":"requests","max":1,"per":"month"}`, message: "It resets in"},
		{limit: `{"count":"requests","max":1,"per":"lifetime"}`, message: "of 1 request in total is used up."},
		{limit: `{"count":"requests","max":0,"per":"second"}`, message: "of 0 requests per second is used up."},
		{limit: `{"count":"concurrent","max":0}`, message: "of 0 calls at one time is used up."},
		{limit: `{"count":"tokens","max":40,"per":"day"}`,
			message: "40 tokens per day has no room for this call: it may need 33 tokens, and only 28 tokens are left"},
		{limit: `{"count":"tokens","max":40,"per":"day"}`, members: `"max_tokens":41`,
			message: "never allows as much output as this call asks for"},
		{limit: `{"count":"dollars","max":0.000005,"per":"day","endpoint":"/v1/chat/*"}`, members: `"max_tokens":1`,
			message: "$0.000005 per day on /v1/chat/* has no room for this call: it may need $0.00000"},
		{limit: `{"count":"requests","max":1,"per":"day","model":"gpt*"}`,
			message: "1 request per day for models gpt* is used up"},
	}
}

// TestRefusals (LI12): each kind of refusal has its own message, and suggests a retry only if that can help
// soon.
func TestRefusals(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	awaitClearOfHour(5 * time.Second)
	for _, c := range refusalCases() {
		c.members = cmp.Or(c.members, `"n":1`)
		c.code = cmp.Or(c.code, "project_spend_limit_exceeded")
		c.kind = cmp.Or(c.kind, "insufficient_quota")
		for scope, subject := range map[string]string{"token": "This token's limit", "project": "The project's limit"} {
			tokens, _ := p.newLimitedProject(scope+c.limit+c.members, scope, c.limit, 1)
			var res testResponse
			for range 3 {
				if res = p.chatAs(tokens[0], c.members); res.status == 429 {
					break
				}
				p.waitSettled()
			}
			c.check(t, scope, subject, res)
		}
	}
	for _, row := range p.ledger() {
		if row.Outcome == "refused" && row.Status != 429 {
			t.Errorf("the ledger has %+v", row)
		}
	}
}

func (c *refusalCase) check(t *testing.T, scope, subject string, res testResponse) {
	t.Helper()
	var e struct {
		Error struct{ Code, Message, Type string }
	}
	_ = json.Unmarshal([]byte(res.body), &e)
	got := e.Error
	if strings.Contains(c.message, "never allows") { // the caller's mistake, so its code is not checked
		got.Code, got.Type = c.code, c.kind
	}
	if res.status != 429 || got.Code != c.code || got.Type != c.kind ||
		!strings.HasPrefix(got.Message, subject) || !strings.Contains(got.Message, c.message) {
		t.Errorf("%s, %s: got %d %s", scope, c.limit, res.status, res.body)
	}
	retryAfter := c.retry != ""
	noRetry := c.retry == ""
	if c.retry == "hour" {
		noRetry = time.Until(time.Now().Truncate(time.Hour).Add(time.Hour)) > maxRetryWait
	}
	if (res.header.Get("Retry-After") != "") != retryAfter || (res.header.Get("X-Should-Retry") == "false") != noRetry {
		t.Errorf("%s, %s: the headers are %v", scope, c.limit, res.header)
	}
}

// TestRateHeaders: x-ratelimit-* describe the token's tightest limits on answers, streams and errors alike,
// and never those of the provider or the project.
func TestRateHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		const headers = "X-RateLimit-Limit-Requests: 77777\r\nx-ratelimit-remaining-requests: 77777\r\n" +
			"x-ratelimit-limit-tokens: 77777\r\nx-ratelimit-reset-tokens: 77777s\r\n" +
			"X-Ratelimit-Limit-Project-Tokens: 77777"
		switch {
		case strings.Contains(r.body, `"seed":4`):
			return c.reply(400, `{"error":{}}`, headers)
		case strings.Contains(r.body, `"stream":true`):
			c.beginSSE(headers)
			for _, e := range chatEvents(true) {
				_ = c.chunk(e)
			}
			return endStream(c)
		}
		return c.reply(200, usageResponse(2_000_000, 3_000_000), headers) // they take 50 s to refill
	})
	_, tokens, _ := p.newProject("headers",
		`{"limits":[{"count":"requests","max":3333,"per":"day"},{"count":"tokens","max":33333000,"per":"minute"}]}`,
		`{"limits":[{"count":"requests","max":60,"per":"minute"},{"count":"requests","max":4,"per":"month"},
			{"count":"tokens","max":100000000,"per":"day"},{"count":"tokens","max":6000000,"per":"minute"},
			{"count":"requests","max":1,"per":"day","shadow":true},{"count":"concurrent","max":1}]}`, 1)
	for i, c := range []struct{ members, remaining string }{
		{`"max_tokens":10`, "3"},
		{`"stream":true,"max_tokens":10`, "2"},
		{`"seed":4`, "1"},
		{`"max_tokens":7000000`, "1"},
		{`"n":1`, "0"},
		{`"n":1`, "0"},
	} {
		res := p.chatAs(tokens[0], c.members)
		p.waitSettled()
		checkRateHeaders(t, fmt.Sprint("call ", i), res, c.remaining)
	}
	_, unlimited := p.newToken(`"name":"unlimited"`)
	for name := range p.chatAs(unlimited, `"n":1`).header {
		if strings.HasPrefix(name, "X-Ratelimit") {
			t.Errorf("a token without limits got %s", name)
		}
	}
	_, counted := p.newToken(`"name":"max","max_requests":2`)
	h := p.chatAs(counted).header
	if h.Get("X-Ratelimit-Limit-Requests") != "2" || h.Get("X-Ratelimit-Remaining-Requests") != "1" ||
		h.Get("X-Ratelimit-Reset-Requests") != "" {
		t.Errorf("max_requests: %v", h)
	}
}

// checkRateHeaders checks the headers for the limits of TestRateHeaders.
func checkRateHeaders(t *testing.T, what string, res testResponse, remaining string) {
	t.Helper()
	h := res.header
	if h.Get("X-Ratelimit-Limit-Requests") != "4" || h.Get("X-Ratelimit-Remaining-Requests") != remaining ||
		h.Get("X-Ratelimit-Limit-Tokens") != "6000000" {
		t.Errorf("%s: got %d %v", what, res.status, h)
	}
	if n, err := strconv.Atoi(h.Get("X-Ratelimit-Remaining-Tokens")); err != nil || n < 0 || n >= 6_000_000 {
		t.Errorf("%s: %v tokens remain, %v", what, n, err)
	}
	for _, name := range []string{"X-Ratelimit-Reset-Requests", "X-Ratelimit-Reset-Tokens"} {
		if d, err := time.ParseDuration(h.Get(name)); err != nil || d <= 0 {
			t.Errorf("%s: %s is %q", what, name, h.Get(name))
		}
	}
	for _, foreign := range []string{"77777", "33333", "3333 "} {
		if strings.Contains(fmt.Sprint(h)+res.body, foreign) {
			t.Errorf("%s reveals the provider's or the project's limits: %v %s", what, h, res.body)
		}
	}
}

// A limitHitRow is a call in the answer of GET /manage/requests, with the limit that refused it or would have.
type limitHitRow struct {
	LimitHit string `json:"limit_hit"`
	Outcome  string
}

func (p *testProxy) limitHits(query string) []limitHitRow {
	p.t.Helper()
	p.waitSettled()
	var rows struct{ Data []limitHitRow }
	p.manage("GET", "/manage/requests?"+query, "", 200, &rows)
	return rows.Data
}

// TestMonitorOnly: a shadow limit refuses nothing, but shows what it would have refused on the call, in the
// sums and in the limit itself. When it is enforced, its count is correct.
func TestMonitorOnly(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	awaitClearOfHour(5 * time.Second)
	project, tokens, ids := p.newProject("shadow", `{}`,
		`{"limits":[{"count":"requests","max":2,"per":"day","shadow":true},
			{"count":"concurrent","max":0,"shadow":true,"model":"gpt-5*"}]}`, 1)
	path := "/manage/tokens/" + ids[0]
	for range 5 {
		if res := p.chatAs(tokens[0]); res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
	}
	l := p.settledLimits(path)
	if l[0].Used != 2 || l[0].WouldRefuse != 3 || l[0].Left != 0 || !l[0].Shadow || l[1].WouldRefuse != 0 {
		t.Errorf("the limits are %+v", l)
	}
	hits := 0
	for _, r := range p.limitHits("token_id=" + ids[0]) {
		if r.Outcome != "ok" || r.LimitHit != "" && r.LimitHit != "2 requests per day" {
			t.Errorf("the ledger has %+v", r)
		}
		hits += min(1, len(r.LimitHit))
	}
	var usage struct {
		Data []struct {
			Calls       int
			WouldRefuse int `json:"would_refuse"`
		}
	}
	p.manage("GET", "/manage/usage?interval=total&project_id="+project, "", 200, &usage)
	if hits != 3 || len(usage.Data) != 1 || usage.Data[0].Calls != 5 || usage.Data[0].WouldRefuse != 3 {
		t.Errorf("%d rows have the limit, and usage is %+v", hits, usage)
	}
	if n := strings.Count(string(p.log.bytes()), `"shadow_limit":"2 requests per day"`); n != 3 {
		t.Errorf("the log has the limit %d times", n)
	}
	p.manage("PATCH", path, `{"policy":{"limits":[{"count":"requests","max":6,"per":"day"}]}}`, 200, nil)
	if a, b := p.chatAs(tokens[0]), p.chatAs(tokens[0]); a.status != 200 || b.status != 429 {
		t.Errorf("when it is enforced, after 5 of 6 calls: got %d, %d", a.status, b.status)
	}
	refused := p.limitHits("outcome=refused&token_id=" + ids[0])
	if len(refused) != 1 || refused[0].LimitHit != "6 requests per day" {
		t.Errorf("the refused call is on record as %+v", refused)
	}
}

// TestOwnToken: a token may read its own state without using anything. It learns nothing about its project,
// the provider or other tokens.
func TestOwnToken(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	awaitClearOfHour(5 * time.Second)
	project, tokens, ids := p.newProject("secret-project",
		`{"endpoints":["/v1/chat/*"],"models":["gpt-4o*","secret-model"],
			"limits":[{"count":"requests","max":4711,"per":"day"},{"count":"concurrent","max":4712}]}`,
		`{"models":["gpt-4o*"],
			"limits":[{"count":"requests","max":3,"per":"day"},{"count":"dollars","max":0.5,"per":"month"}]}`, 2)
	p.manage("PATCH", "/manage/tokens/"+ids[0], `{"name":"mine","max_requests":9}`, 200, nil)
	p.chatAs(tokens[0])
	p.chatAs(tokens[1])
	p.waitSettled()
	var v ownTokenStatus
	for range 10 { // more often than any limit allows
		res := p.readOwnToken("GET", tokens[0])
		v = ownTokenStatus{}
		if err := json.Unmarshal([]byte(res.body), &v); err != nil || res.status != 200 ||
			res.header.Get("Cache-Control") != "no-store" ||
			res.header.Get("X-Ratelimit-Remaining-Requests") != "2" {
			t.Fatalf("got %d %v %s", res.status, res.header, res.body)
		}
		foreign := []string{"secret", project, ids[1], "4711", "4712", p.provider.key, p.provider.url, p.upstream}
		for _, s := range foreign {
			if strings.Contains(res.body+fmt.Sprint(res.header), s) {
				t.Errorf("the answer reveals %s: %s", s, res.body)
			}
		}
	}
	if v.ID != ids[0] || v.Name != "mine" || v.MaxRequests != 9 || v.RequestCount != 1 || v.RequestsLeft != 8 ||
		!slices.Equal(v.Models, []string{"gpt-4o*"}) || v.Endpoints != nil {
		t.Errorf("got %+v", v)
	}
	if l := v.Limits; len(l) != 2 || l[0].Used != 1 || l[0].Left != 2 || l[1].Used != 0.00000315 {
		t.Errorf("the limits are %+v", l)
	}
	if rows := p.ledger(); len(rows) != 2 {
		t.Errorf("%d calls are on record", len(rows))
	}
}

// An ownTokenStatus is the answer to GET ownTokenPath.
type ownTokenStatus struct {
	ID, Name          string
	MaxRequests       int64 `json:"max_requests"`
	RequestCount      int64 `json:"request_count"`
	RequestsLeft      int64 `json:"requests_left"`
	Models, Endpoints []string
	Limits            []limitStatus
}

func (p *testProxy) readOwnToken(method, token string) testResponse {
	p.t.Helper()
	return p.do(method, ownTokenPath, "", "Authorization", "Bearer "+token)
}

// TestOwnTokenRefused: only GET and HEAD read a token's state, and only a valid token may, from an allowed address.
func TestOwnTokenRefused(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, tokens, ids := p.newProject("secret-project", `{}`, `{}`, 2)
	for _, method := range []string{"POST", "DELETE", "OPTIONS", "PUT"} {
		if res := p.readOwnToken(method, tokens[0]); res.status != 405 {
			t.Errorf("%s: got %d %s", method, res.status, res.body)
		}
	}
	for name, token := range map[string]string{
		"no token": "", "a malformed token": tokenPrefix + strings.Repeat("x", 58), "a management key": p.adminKey,
	} {
		if res := p.readOwnToken("GET", token); res.status != 401 || strings.Contains(res.body, "secret") {
			t.Errorf("with %s: got %d %s", name, res.status, res.body)
		}
	}
	p.manage("DELETE", "/manage/tokens/"+ids[0], "", 200, nil)
	if res := p.readOwnToken("GET", tokens[0]); res.status != 401 {
		t.Errorf("when it is revoked: got %d %s", res.status, res.body)
	}
	p.manage("PATCH", "/manage/tokens/"+ids[1], `{"policy":{"addresses":["192.0.2.0/24"]}}`, 200, nil)
	if res := p.readOwnToken("GET", tokens[1]); res.status != 403 || strings.Contains(res.body, "192.0.2") {
		t.Errorf("from an address that is not allowed: got %d %s", res.status, res.body)
	}
}

// TestAddresses: a token can be restricted to IPv4 and IPv6 networks. The client's real address counts, not
// one that it claims, and no answer reveals the networks.
func TestAddresses(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"TRUSTED_PROXIES": "127.0.0.1"})
	for _, c := range []struct {
		networks, from string
		want           int
	}{
		{`"10.0.0.0/8"`, "10.1.2.3", 200},
		{`"10.0.0.0/8"`, "11.1.2.3", 403},
		{`"10.0.0.0/8"`, "::ffff:10.1.2.3", 200},
		{`"::ffff:10.0.0.0/104"`, "10.1.2.3", 200},
		{`"::ffff:10.0.0.0/104"`, "::ffff:11.1.2.3", 403},
		{`"2001:db8::/32"`, "2001:db8:1::7", 200},
		{`"2001:db8::/32"`, "2001:db9::7", 403},
		{`"2001:db8::/32"`, "10.1.2.3", 403},
		{`"fe80::/10"`, "fe80::1%eth0", 200},
		{`"192.0.2.1","198.51.100.7"`, "198.51.100.7", 200},
		{`"192.0.2.1"`, "192.0.2.2", 403},
		{`"192.0.2.0/24"`, "198.51.100.1, 192.0.2.9", 200}, // the address that the nearest proxy saw counts,
		{`"192.0.2.0/24"`, "192.0.2.9, 198.51.100.1", 403}, // not the one that the client sent
		{`"192.0.2.0/24"`, "garbage", 403},
		{`"0.0.0.0/0"`, "2001:db8::1", 403},
		{`"::/0"`, "10.1.2.3", 403},
		{`"::/0","0.0.0.0/0"`, "10.1.2.3", 200},
		{``, "10.1.2.3", 403},
		{`"127.0.0.1"`, "", 200},
	} {
		policy := `{"addresses":[` + c.networks + `]}`
		_, ofProject, _ := p.newProject("p"+c.networks+c.from, policy, `{}`, 1)
		_, own := p.newToken(`"name":"a","policy":` + policy)
		var headers []string
		if c.from != "" {
			headers = []string{"X-Forwarded-For", c.from}
		}
		for scope, token := range map[string]string{"project": ofProject[0], "token": own} {
			res := p.postAs(token, "/v1/chat/completions", chatBody(), headers...)
			if res.status != c.want || c.want == 403 && res.errorCode() != "address_not_allowed" {
				t.Errorf("%s of a %s, from %q: got %d %s", c.networks, scope, c.from, res.status, res.body)
			}
			if c.want == 403 && strings.Contains(res.body, "unknown address") != (c.from == "garbage") {
				t.Errorf("from %q: the refusal says %s", c.from, res.body)
			}
			first := strings.Trim(strings.Split(c.networks, ",")[0], `"`)
			if c.want == 403 && first != "" && strings.Contains(res.body, first) {
				t.Errorf("%s: the refusal names the network: %s", c.networks, res.body)
			}
		}
	}
}

// TestAddressClaims: without trusted proxies, no header changes the client's address.
func TestAddressClaims(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, token := p.newToken(`"name":"a","policy":{"addresses":["10.0.0.0/8"]}`)
	for _, name := range []string{"X-Forwarded-For", "X-Real-Ip", "Forwarded", "True-Client-Ip"} {
		if res := p.postAs(token, "/v1/chat/completions", chatBody(), name, "10.0.0.1"); res.status != 403 {
			t.Errorf("an address in %s: got %d %s", name, res.status, res.body)
		}
	}
}

// TestInvalidAddresses: a policy's addresses are networks or single addresses, without host bits and zones.
func TestInvalidAddresses(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, list := range []string{
		`["10.0.0.1/8"]`, `["10.0.0.0/33"]`, `["x"]`, `["fe80::1%eth0"]`, `"10.0.0.0/8"`, `[7]`, `["10.0.0.0/8",""]`,
	} {
		res := p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+p.tokenID, `{"policy":{"addresses":`+list+`}}`)
		if res.status != http.StatusBadRequest || !strings.Contains(res.body, "policy.addresses") {
			t.Errorf("addresses %s: got %d %s", list, res.status, res.body)
		}
	}
}

func outcomeCases() []outcomeCase {
	startStream := func(then func(*providerConn) bool) func(*providerConn, recordedRequest) bool {
		return streamScript([]string{strings.Join(chatEvents(true)[:2], "")}, 1, then)
	}
	withModel := func(model string) string { return strings.Replace(chatBody(), "gpt-4o-mini", model, 1) }
	stream, large := chatBody(`"stream":true`), chatBody(`"user":"`+strings.Repeat("x", 65<<10)+`"`)
	return []outcomeCase{
		{name: "answered", script: chatScript, requests: 1, tokens: 12},
		{name: "streamed", script: chatScript, body: stream, requests: 1, tokens: 12},
		{name: "answered without usage", script: replyScript(200, `{"choices":[]}`), requests: 1, tokens: -1},
		{name: "provider 400", script: errorScript(400), requests: 1},
		{name: "provider 429", script: errorScript(429), requests: 1},
		{name: "provider 500", script: errorScript(500), requests: 1},
		{name: "provider 401", script: errorScript(401), requests: 1},
		{name: "provider hangs up", script: resetScript, requests: 1},
		{name: "provider is silent", script: stallScript, requests: 1, tokens: -1},
		{name: "stream is cut off", script: startStream(resetStream), body: stream, requests: 1, tokens: -1},
		{name: "stream has no end", script: startStream(endStream), body: stream, requests: 1, tokens: -1},
		{name: "client leaves the stream", script: startStream(stallStream), body: stream, leaves: true,
			requests: 1, tokens: -1},
		{name: "client leaves before the answer", script: stallScript, leaves: true, requests: 1, tokens: -1},
		{name: "list of models", script: replyScript(200, `{"object":"list","data":[]}`), method: "GET",
			path: "/v1/models", requests: 1},
		{name: "count of tokens", script: replyScript(200, `{"input_tokens":9}`),
			path: "/v1/messages/count_tokens", body: withModel("claude-sonnet-4")},
		{name: "no such endpoint", script: chatScript, path: "/v1/nothing"},
		{name: "invalid JSON", script: chatScript, body: `{`},
		{name: "too large", script: chatScript, body: large},
		{name: "model that is not allowed", script: chatScript, body: withModel("gpt-4o-maxi")},
		{name: "refused by another limit", script: chatScript, body: chatBody(`"max_tokens":900000`)},
		{name: "question about the token itself", script: chatScript, method: "GET", path: ownTokenPath},
	}
}

// TestUsageByOutcome (LI9): what each outcome of a call costs.
func TestUsageByOutcome(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error", "MAX_BODY_BYTES": "64KiB"})
	p.allowErrors = true // a provider that refuses its key is logged as an error
	p.instance.running.mu.Lock()
	p.instance.running.limits.upstreamTimeout = 300 * time.Millisecond
	p.instance.running.mu.Unlock()
	awaitClearOfHour(20 * time.Second)
	for _, c := range outcomeCases() {
		id, token := p.newToken(`"name":"c","max_requests":100,"policy":{"models":["gpt-4o-mini"],"limits":[
			{"count":"requests","max":100,"per":"day"},{"count":"tokens","max":800000,"per":"month"},
			{"count":"dollars","max":90,"per":"lifetime"},{"count":"concurrent","max":2},
			{"count":"requests","max":3,"per":"minute"}]}`)
		p.provider.setScript(c.script)
		body := c.body
		if body == "" && c.method == "" {
			body = chatBody()
		}
		if c.leaves {
			p.abandonCall(token, body)
		} else {
			p.do(cmp.Or(c.method, "POST"), cmp.Or(c.path, "/v1/chat/completions"), body,
				"Authorization", "Bearer "+token, "Content-Type", "application/json")
		}
		p.checkUsage(c, id)
	}
	p.checkSums()
	p.checkCounts()
}

// checkUsage compares the limits of a token that made one call with what its outcome counts, and with what a new
// process would load.
func (p *testProxy) checkUsage(c outcomeCase, id string) {
	p.t.Helper()
	l := p.settledLimits("/manage/tokens/" + id)
	requests, tokens, dollars, running, perMinute := l[0], l[1], l[2], l[3], l[4]
	count := p.requestCount(id)
	if count != int64(c.requests) || int(requests.Used) != c.requests || int(perMinute.Used) != c.requests ||
		c.tokens >= 0 && int(tokens.Used) != c.tokens || c.tokens < 0 && tokens.Used == 0 ||
		(dollars.Used > 0) != (c.tokens != 0) || running.Used != 0 || tokens.Reserved+dollars.Reserved != 0 {
		p.t.Errorf("%s: count %d, limits %+v", c.name, count, l)
	}
	stored := p.storedUsage(id)[:3]
	if !slices.Equal(stored, []float64{requests.Used, tokens.Used, dollars.Used}) {
		p.t.Errorf("%s: after a restart %v would be used, not %+v", c.name, stored, l)
	}
}

// abandonCall makes a call and disconnects when it has reached the provider or, for a stream, when the answer
// has started.
func (p *testProxy) abandonCall(token, body string) {
	p.t.Helper()
	hits := len(p.provider.received())
	conn := p.dial()
	defer conn.Close()
	_, _ = fmt.Fprintf(conn, "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"+
		"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", token, len(body), body)
	waitFor(p.t, "the provider", func() bool { return len(p.provider.received()) > hits })
	if strings.Contains(body, `"stream":true`) {
		_, _ = io.ReadFull(conn, make([]byte, 100))
	}
}

// storedUsage returns the use of a token's limits as a new process would load it.
func (p *testProxy) storedUsage(id string) (out []float64) {
	p.t.Helper()
	ctx, limits := context.Background(), p.instance.operations.limits
	row, err := p.instance.store.tokenByID(ctx, id)
	if err != nil {
		p.t.Fatal(err)
	}
	now := time.Now().UnixMilli()
	views, err := limits.storedLimits(ctx, row.policy, false, row.project, row.seq, valueQuery{}, now)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, v := range views {
		used, err := strconv.ParseFloat(string(v.Used), 64)
		if err != nil {
			p.t.Fatal(err)
		}
		out = append(out, used)
	}
	return out
}

// TestConcurrencyNeverLeaks (LI7): with a limit of three running calls, none of the three slots is lost and
// no fourth call runs, while a thousand calls end in all possible ways.
func TestConcurrencyNeverLeaks(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.allowErrors = true
	path, token := p.newLimitedToken(`{"count":"concurrent","max":3},{"count":"tokens","max":400000,"per":"day"}`)
	var running, most, calls atomic.Int64
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		n := running.Add(1)
		defer running.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		calls.Add(1)
		return seededScript(c, r)
	})
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 150 {
				ctx, cancel := context.WithCancel(context.Background())
				if j%4 == 0 { // the client leaves
					time.AfterFunc(time.Duration(j*i%17)*100*time.Microsecond, cancel)
				}
				p.sendChat(ctx, token, fmt.Sprintf(`"stream":%v,"max_tokens":10,"seed":%d`, j%2 == 0, i*1000+j))
				cancel()
			}
		})
	}
	all.Wait()
	p.waitDisconnected()
	if most.Load() > 3 || calls.Load() < 200 {
		t.Errorf("%d calls were with the provider at one time, %d in all", most.Load(), calls.Load())
	}
	hits, statuses := p.runConcurrently(30, func(int) int {
		_, status := p.sendChat(context.Background(), token, tinyBody)
		return status
	})
	if l := p.settledLimits(path); hits != 3 || statuses[429] != 27 || l[0].Used != 0 || l[1].Reserved != 0 {
		t.Errorf("after %d calls %d run at once, clients got %v, the limits are %+v", calls.Load(), hits, statuses, l)
	}
	p.checkSums()
	p.checkCounts()
}

// TestConcurrencyAfterPanic (LI7): a panic in the middle of a call releases its slot, too.
func TestConcurrencyAfterPanic(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.allowErrors = true
	id, token := p.newToken(`"name":"p","max_requests":100,
		"policy":{"limits":[{"count":"concurrent","max":1},{"count":"tokens","max":5000,"per":"day"}]}`)
	p.instance.transport.Proxy = func(*http.Request) (*url.URL, error) { panic("broken") }
	for range 5 {
		if res := p.chatAs(token, tinyBody); res.err == nil {
			t.Errorf("got %d %s", res.status, res.body)
		}
		p.waitSettled()
	}
	p.instance.transport.Proxy = nil
	if res := p.chatAs(token, tinyBody); res.status != 200 {
		t.Errorf("got %d %s", res.status, res.body)
	}
	if l := p.settledLimits("/manage/tokens/" + id); l[0].Used != 0 || l[1].Reserved != 0 {
		t.Errorf("the limits are %+v", l)
	}
}

// usageResponse is an answer that used this many tokens.
func usageResponse(input, output int) string {
	return strings.NewReplacer(
		`"prompt_tokens":9`, fmt.Sprintf(`"prompt_tokens":%d`, input),
		`"completion_tokens":3`, fmt.Sprintf(`"completion_tokens":%d`, output)).Replace(chatResponseBody)
}

// TestBudgetHolds (LI5): calls of unknown cost together spend no more than the budget, however many run in
// parallel.
func TestBudgetHolds(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	// A call may cost 26*150 + 5000*600 nano-dollars, and costs a tenth of it.
	path, token := p.newLimitedToken(`{"count":"dollars","max":0.01,"per":"lifetime"}`)
	call := func(int) int {
		status, _ := p.send(nil, token, chatBody(`"max_tokens":5000`))
		return status
	}
	total := 0
	for round := 0; ; round++ {
		hits, statuses := p.runConcurrently(50, call)
		if hits > 3 || statuses[429] != 50-hits {
			t.Fatalf("round %d: %d calls ran at once, clients got %v", round, hits, statuses)
		}
		if total += hits; hits == 0 || total > 1000 {
			break
		}
		p.provider.setScript(replyScript(200, usageResponse(9, 500)))
		for i := range 5 { // one after the other, too
			if call(i) == 200 {
				total++
			}
		}
	}
	l := p.settledLimits(path)[0]
	spent := 0.0
	for _, row := range p.ledger() {
		if row.Cost != nil {
			spent += *row.Cost
		}
	}
	if spent > 0.01 || !sameAmount(spent, l.Used) || l.Reserved != 0 {
		t.Errorf("of $0.01 %v was spent by %d calls; the limit is %+v", spent, total, l)
	}
	if l.Left >= 0.003+26*150e-9 {
		t.Errorf("calls are refused with %v remaining", l.Left)
	}
}

// TestReservationsComeBack (LI5): whatever the outcome of a call, what it reserved and did not use is
// available to the next one.
func TestReservationsComeBack(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.allowErrors = true
	path, token := p.newLimitedToken(`{"count":"tokens","max":1000,"per":"day"},` +
		`{"count":"dollars","max":0.001,"per":"lifetime"},` +
		`{"count":"concurrent","max":1},{"count":"tokens","max":1000,"per":"minute"}`)
	for name, script := range map[string]func(*providerConn, recordedRequest) bool{
		"500":      errorScript(500),
		"429":      errorScript(429),
		"400":      errorScript(400),
		"401":      errorScript(401),
		"redirect": replyScript(302, ``, "Location: http://127.0.0.1:1/"),
		"hangs up": resetScript,
		"not HTTP": func(c *providerConn, _ recordedRequest) bool {
			_, _ = c.Write([]byte("220 smtp\r\n"))
			return false
		},
	} {
		p.provider.setScript(script)
		for range 5 { // each asks for nearly the whole limit
			res := p.chatAs(token, `"max_tokens":900`)
			if res.status == 429 && name != "429" || strings.Contains(res.body, "limit of") {
				t.Fatalf("provider %s: got %d %s", name, res.status, res.body)
			}
			p.waitSettled()
		}
		for _, l := range p.settledLimits(path) {
			most := 0.0
			if usesTestDatabase() && l.Per == "minute" { // what may have refilled meanwhile is not returned
				most = 100
			}
			if l.Reserved != 0 || l.Used > most {
				t.Errorf("provider %s: %+v", name, l)
			}
		}
	}
	p.provider.setScript(chatScript)
	if res := p.chatAs(token, `"max_tokens":900`); res.status != 200 {
		t.Errorf("then: got %d %s", res.status, res.body)
	}
	if res := p.chatAs(token, `"max_tokens":980`); res.status != 429 || res.header.Get("X-Should-Retry") != "false" {
		t.Errorf("a call for more than remains: got %d %v %s", res.status, res.header, res.body)
	}
}

// TestBucketSavesNothingUp: calls that reserve the whole bucket minute after minute, and all end unused at
// one moment, return at most one bucket and what remained in it.
func TestBucketSavesNothingUp(t *testing.T) {
	t.Parallel()
	l, s := newTestLimiter(t, ``, `{"count":"tokens","max":1000,"per":"minute"}`, noon)
	var running []*reservation
	now := int64(noon)
	for range 20 {
		r, v := l.tryReserve(s, chatEstimate(10, 990), now)
		if v != nil {
			t.Fatalf("after %d minutes: %+v", (now-noon)/60_000, v)
		}
		running, now = append(running, r), now+60_000
	}
	used := 0
	for {
		if r, v := l.tryReserve(s, chatEstimate(10, 990), now); v == nil {
			r.settleForwarded(now, 1000)
			used += 1000
		} else if len(running) > 0 {
			running[0].settleForwarded(now, 0)
			running = running[1:]
		} else {
			break
		}
	}
	if used > 1000 {
		t.Errorf("in one moment %d tokens of 1000 per minute were used", used)
	}
}

// A spentStreamCase is a stream that uses more than a limit of 1000 tokens, or their price.
type spentStreamCase struct {
	limit    string
	members  string
	scope    string // "" for token
	survives bool   // the limit does not end the stream
}

// TestSpentStreams (LI5): a stream that exceeds a budget by more than a tenth is ended within a second, and
// its client sees that it is incomplete.
func TestSpentStreams(t *testing.T) {
	t.Parallel()
	const day = `{"count":"tokens","max":1000,"per":"day"`
	for name, c := range map[string]spentStreamCase{
		"tokens of a token":    {limit: day + `}`},
		"tokens of a project":  {limit: `{"count":"tokens","max":1000,"per":"month"}`, scope: "project"},
		"dollars of a token":   {limit: `{"count":"dollars","max":0.0006,"per":"lifetime"}`},
		"dollars of a project": {limit: `{"count":"dollars","max":0.0006,"per":"week"}`, scope: "project"},
		"a shadow limit":       {limit: day + `,"shadow":true}`, survives: true},
		"another model":        {limit: day + `,"model":"gpt-5*"}`, survives: true},
		// A provider may ignore a limit of the output: what it sends counts.
		"limited output":            {limit: day + `}`, members: `,"max_tokens":900`},
		"limit of another endpoint": {limit: day + `}`, members: `,"max_output_tokens":10`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c.scope = cmp.Or(c.scope, "token")
			c.run(t)
		})
	}
}

func (c spentStreamCase) run(t *testing.T) {
	t.Helper()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	awaitClearOfHour(10 * time.Second)
	tokens, path := p.newLimitedProject("b", c.scope, c.limit, 2)
	event, proceed, cut := chatEvents(true)[1], make(chan struct{}), make(chan time.Time, 1)
	p.provider.setScript(func(conn *providerConn, _ recordedRequest) bool {
		conn.beginSSE()
		_ = conn.chunk(strings.Repeat(event, 500))
		<-proceed
		_ = conn.chunk(strings.Repeat(event, 1000))
		if !c.survives {
			conn.waitClosed(hangTimeout)
			cut <- time.Now()
			return false
		}
		time.Sleep(3 * watchInterval) // the time in which the proxy would end the stream
		for _, e := range chatEvents(true) {
			_ = conn.chunk(e)
		}
		return endStream(conn)
	})
	s, err := p.openStream(t.Context(), tokens[0], `"n":1`+c.members)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.read(500 * len(event)); err != nil {
		t.Fatalf("the stream was ended within its budget: %v", err)
	}
	exceeded := time.Now()
	close(proceed)
	rest, err := s.readAll()
	if c.survives {
		if err != nil || !strings.HasSuffix(rest, "[DONE]\n\n") {
			t.Errorf("the stream ended with %q, %v", rest[max(0, len(rest)-200):], err)
		}
		return
	}
	if err == nil || strings.Contains(rest, "[DONE]") {
		t.Errorf("the stream ended as if it were complete: %q", rest[max(0, len(rest)-200):])
	}
	if d := (<-cut).Sub(exceeded); d > time.Second {
		t.Errorf("the provider's call was ended after %v", d)
	}
	if l := p.settledLimits(path)[0]; l.Left != 0 || l.Used <= l.Max || l.Reserved != 0 {
		t.Errorf("the limit is %+v", l)
	}
	c.checkAfterwards(p, tokens)
}

// checkAfterwards checks the stream's row, and that the limit refuses further calls in its scope only.
func (c spentStreamCase) checkAfterwards(p *testProxy, tokens []string) {
	p.t.Helper()
	row := p.lastCall()
	if row.Outcome != "truncated" || row.LimitHit == "" || row.ErrorCode != "project_spend_limit_exceeded" ||
		row.UsageSource != "estimated" || row.OutputTokens < 1000 {
		p.t.Errorf("the ledger has %+v", row)
	}
	p.provider.setScript(chatScript)
	for i, token := range tokens {
		res := p.chatAs(token)
		if i == 1 && c.scope == "token" { // it has a limit for itself
			if res.status != 200 {
				p.t.Errorf("the other token: got %d %s", res.status, res.body)
			}
		} else if res.status != 429 || res.errorCode() != "project_spend_limit_exceeded" ||
			res.header.Get("Retry-After") != "" {
			p.t.Errorf("then token %d: got %d %s", i, res.status, res.body)
		}
	}
}

// TestSpentBufferedStream: a buffered stream is ended in the same way. Because the client has received
// nothing yet, it gets an error with the reason.
func TestSpentBufferedStream(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	call := func(events int, then func(*providerConn) bool) testResponse {
		_, token := p.newLimitedToken(`{"count":"tokens","max":1000,"per":"day"}`)
		p.provider.setScript(streamScript([]string{strings.Repeat(chatEvents(true)[1], events)}, 1, then))
		return p.postAs(token, "/v1/chat/completions", chatBody(`"stream":true`), "X-LLM-Proxy-Stream", "verified")
	}
	res := call(1500, stallStream)
	if res.status != 429 || res.errorCode() != "project_spend_limit_exceeded" ||
		res.header.Get("X-Should-Retry") != "false" {
		t.Errorf("got %d %v %s", res.status, res.header, clip(res.body, 300))
	}
	if row := p.lastCall(); row.Outcome != "truncated" || row.UsageSource != "estimated" || row.OutputTokens < 1000 {
		t.Errorf("the ledger has %+v", row)
	}
	call(900, func(*providerConn) bool { return false })
	row := p.lastCall()
	if row.Outcome != "upstream_error" || row.UsageSource != "estimated" || row.OutputTokens < 800 {
		t.Errorf("cut off by the provider: the ledger has %+v", row)
	}
}

// TestPriceUnknown: a call of unknown cost cannot be held to a budget, so it is refused where a budget
// applies, and only there.
func TestPriceUnknown(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.HasSuffix(r.target, "/speech") {
			return c.reply(200, `x`, "Content-Type: audio/mpeg")
		}
		return chatScript(c, r)
	})
	const day, lifetime = `{"count":"dollars","max":1,"per":"day"`, `{"count":"dollars","max":1,"per":"lifetime"`
	type call struct{ path, body string }
	priced := call{"/v1/chat/completions", chatBody()}
	unpriced := call{"/v1/chat/completions", strings.Replace(chatBody(), "gpt-4o-mini", "unheard-of", 1)}
	speech := call{"/v1/audio/speech", `{"model":"gpt-4o-mini-tts","input":"x","voice":"alloy"}`}
	for _, c := range []struct {
		limit string
		call  call
		want  int
	}{
		{day + `}`, priced, 200},
		{day + `}`, unpriced, 403},
		{lifetime + `}`, unpriced, 403},
		{day + `,"model":"gpt-4o*"}`, unpriced, 200},
		{day + `,"model":"unheard*"}`, unpriced, 403},
		{day + `,"endpoint":"/v1/embeddings"}`, unpriced, 200},
		{day + `,"shadow":true}`, unpriced, 200},
		{day + `}`, speech, 403},
		{day + `,"endpoint":"/v1/chat/*"}`, speech, 200},
		{`{"count":"requests","max":1,"per":"day"}`, unpriced, 200},
	} {
		_, token := p.newLimitedToken(c.limit)
		before := len(p.provider.received())
		res := p.postAs(token, c.call.path, c.call.body)
		if res.status != c.want || c.want == 403 &&
			(res.errorCode() != "price_unknown" || len(p.provider.received()) != before) {
			t.Errorf("%s, %s: got %d %s", c.limit, c.call.body, res.status, res.body)
		}
	}
	path, token := p.newLimitedToken(day + `}`)
	p.manage("POST", "/manage/prices", `{"match":"unheard-of","input":1000,"output":2000}`, 201, nil)
	if res := p.postAs(token, unpriced.path, unpriced.body); res.status != http.StatusOK {
		t.Errorf("with a price: got %d %s", res.status, res.body)
	}
	if l := p.settledLimits(path)[0]; l.Used == 0 {
		t.Errorf("with a price: %+v", l)
	}
}

// TestDebtIsCarried (LI13): what a call uses beyond its estimate delays later calls, but by at most one more
// period.
func TestDebtIsCarried(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	path, token := p.newLimitedToken(`{"count":"tokens","max":1000,"per":"minute"}`)
	p.provider.setScript(replyScript(200, usageResponse(9, 5_000_000)))
	start := time.Now()
	if res := p.chatAs(token, `"max_tokens":10`); res.status != 200 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	p.waitSettled()
	res := p.chatAs(token, `"max_tokens":10`)
	wait, err := time.ParseDuration(res.header.Get("Retry-After-Ms") + "ms")
	if res.status != 429 || err != nil || wait < time.Minute-time.Since(start) || wait > 2*time.Minute {
		t.Errorf("got %d, Retry-After-Ms %v, %s", res.status, wait, res.body)
	}
	l := p.settledLimits(path)[0]
	refilled := 1000 * time.Since(start).Minutes()
	if l.Used > 2000 || float64(l.Used) < 2000-1-refilled || l.Left != 0 && refilled < 1000 {
		t.Errorf("the limit is %+v", l)
	}
}
