// These tests check whole calls against policies and limits: limits hold exactly, for new and for live
// tokens, under any parallelism, and across restarts, evictions and administrators' changes.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

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
		t.Errorf("of 20 calls %d were answered, %d made, %d counted", total, n, p.requestCount(id))
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
		stop := make(chan struct{})
		var others sync.WaitGroup
		for _, do := range []func(i int){
			func(i int) {
				if res := p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+id, fmt.Sprintf(`{"name":"n%d"}`, i)); res.status != 200 {
					t.Errorf("PATCH: got %d %s", res.status, res.body)
				}
			},
			func(int) {
				p.instance.registry.evict(time.Now().Add(time.Hour).UnixMilli(), p.instance.ledger.flush(t.Context()) == nil)
				time.Sleep(100 * time.Microsecond)
			},
		} {
			others.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
						do(i)
					}
				}
			})
		}
		last := int64(0)
		for range 4 {
			p.burst(token, 40)
			n := p.requestCount(id)
			if n < last {
				t.Errorf("round %d: the count went from %d to %d", round, last, n)
			}
			last = n
		}
		close(stop)
		others.Wait()
		if n := len(p.provider.received()) - hits; n != 50 || last != 50 {
			t.Errorf("round %d: of 50 calls %d were made and %d counted", round, n, last)
		}
	}
}

// TestEvictedTokenIsNotUsed: a call that finds a token at the moment of its eviction looks it up again.
// Otherwise the next call would use another counter.
func TestEvictedTokenIsNotUsed(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	g, hash := p.instance.registry, tokenHash(p.token)
	find := func() *liveToken {
		token, _, err := g.lookup(t.Context(), hash, time.Now().UnixMilli())
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	later := time.Now().Add(time.Hour).UnixMilli()
	evicted := find()
	g.evict(later, false)
	if find() != evicted {
		t.Error("a token was evicted although the ledger had not settled")
	}
	g.evict(later, true)
	if evicted.acquire() {
		t.Error("an evicted token can be used")
	}
	held := find()
	if held == evicted || !held.acquire() {
		t.Fatal("the token cannot be used again")
	}
	g.evict(later, true)
	if find() != held {
		t.Error("a token was evicted amid a call")
	}
	held.release(time.Now())
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
		if _, token := p.newToken(`"name":"v","max_requests":` + value); p.chatAs(token).status != want {
			t.Errorf("max_requests %s: the first call is not answered with %d", value, want)
		}
	}
	for _, value := range []string{"-1", "9223372036854775807", "9223372036854775808", `"5"`, "1.5", "1e400", "true", "[1]", "{}", "NaN"} {
		res := p.manageAs(p.adminKey, "POST", "/manage/tokens", `{"project_id":"`+p.project+`","name":"v","max_requests":`+value+`}`)
		if res.status != 400 {
			t.Errorf("max_requests %s: got %d %s", value, res.status, res.body)
		}
	}
}

// TestWhatCounts: a forwarded call counts, whatever its outcome; a refused call does not.
func TestWhatCounts(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true // a provider that refuses its key is one
	id, token := p.newToken(`"name":"c","max_requests":6,"policy":{"models":["gpt-4o-mini"]}`)
	auth := []string{"Authorization", "Bearer " + token, "Content-Type", "application/json"}
	reply := func(status int) func(*providerConn, recordedRequest) bool {
		return func(c *providerConn, _ recordedRequest) bool { return c.reply(status, `{"error":{}}`) }
	}
	for i, test := range []struct {
		name   string
		script func(*providerConn, recordedRequest) bool
		path   string
		body   string
		status int
		counts int64
	}{
		{"answered", chatScript, "/v1/chat/completions", chatBody(), 200, 1},
		{"model not allowed", chatScript, "/v1/chat/completions", strings.Replace(chatBody(), "mini", "maxi", 1), 403, 0},
		{"no such endpoint", chatScript, "/v1/nothing", chatBody(), 404, 0},
		{"no JSON", chatScript, "/v1/chat/completions", "{", 400, 0},
		{"the provider fails", reply(500), "/v1/chat/completions", chatBody(), 500, 1},
		{"the provider is busy", reply(429), "/v1/chat/completions", chatBody(), 429, 1},
		{"the provider refuses the key", reply(401), "/v1/chat/completions", chatBody(), 502, 1},
		{"the provider breaks off", func(c *providerConn, _ recordedRequest) bool { return false }, "/v1/chat/completions", chatBody(), 502, 1},
		{"the answer breaks off", func(c *providerConn, _ recordedRequest) bool {
			_, _ = c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1"))
			return false
		}, "/v1/chat/completions", chatBody(), 0, 1},
		{"used up", chatScript, "/v1/chat/completions", chatBody(), 429, 0},
	} {
		p.provider.setScript(test.script)
		before := p.requestCount(id)
		if res := p.do("POST", test.path, test.body, auth...); res.status != test.status && (test.status != 0 || res.err == nil) {
			t.Errorf("%d %s: got %d %s", i, test.name, res.status, res.body)
		}
		if n := p.requestCount(id) - before; n != test.counts {
			t.Errorf("%d %s: counts %d, want %d", i, test.name, n, test.counts)
		}
	}
	p.checkCounts()
}

// TestUsedUp: the refusal does not invite retries that cannot succeed. A raised limit applies from the next
// call on and keeps the count.
func TestUsedUp(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	id, token := p.newToken(`"name":"u","max_requests":1`)
	p.chatAs(token)
	res := p.chatAs(token)
	if res.status != 429 || res.errorCode() != "project_spend_limit_exceeded" || !strings.Contains(res.body, `"insufficient_quota"`) ||
		res.header.Get("X-Should-Retry") != "false" || res.header.Get("Retry-After") != "" {
		t.Errorf("got %d %v %s", res.status, res.header, res.body)
	}
	p.manage("PATCH", "/manage/tokens/"+id, `{"max_requests":2}`, 200, nil)
	if a, b := p.chatAs(token), p.chatAs(token); a.status != 200 || b.status != 429 {
		t.Errorf("after one more was allowed: got %d, %d", a.status, b.status)
	}
	p.manage("PATCH", "/manage/tokens/"+id, `{"max_requests":1}`, 200, nil)
	if res := p.chatAs(token); res.status != 429 || p.requestCount(id) != 2 {
		t.Errorf("after it was lowered: got %d, count %d", res.status, p.requestCount(id))
	}
}

// TestDeletedWhileRunning: calls that run while their project is deleted are recorded under its name.
func TestDeletedWhileRunning(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(true)[1])
		c.waitClosed(10 * time.Second)
		return false
	})
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
		if v.projectID != p.project || v.tokenID != p.tokenID || v.outcome != outcomeTruncated || v.source != usageEstimated || v.counts.output == 0 {
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
	for name, test := range map[string]struct{ limit, kind string }{
		"requests":               {`{"count":"requests","max":3,"per":"second"}`, "requests"},
		"one request":            {`{"count":"requests","max":1,"per":"second"}`, "requests"},
		"requests of a minute":   {`{"count":"requests","max":120,"per":"minute"}`, "requests"},
		"tokens":                 {`{"count":"tokens","max":60,"per":"second"}`, "tokens"},
		"the longer of two":      {`{"count":"requests","max":2,"per":"second"},{"count":"tokens","max":40,"per":"second"}`, "tokens"},
		"tokens, by their model": {`{"count":"tokens","max":45,"per":"second","model":"gpt-4o*"}`, "tokens"},
	} {
		for _, field := range []string{"Retry-After", "Retry-After-Ms"} {
			t.Run(name+" "+field, func(t *testing.T) {
				t.Parallel()
				p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
				p.provider.setScript(replyScript(200, usageResponse(26, 1)))
				_, token := p.newLimitedToken(test.limit)
				var res testResponse
				for range 300 {
					if res = p.chatAs(token, tinyBody); res.status != 200 {
						break
					}
				}
				refused := time.Now()
				if res.status != 429 || res.errorCode() != "rate_limit_exceeded" || !strings.Contains(res.body, `"type":"`+test.kind+`"`) || res.header.Get("X-Should-Retry") != "" {
					t.Fatalf("got %d %v %s", res.status, res.header, res.body)
				}
				whole, err := strconv.Atoi(res.header.Get("Retry-After"))
				ms, err2 := strconv.Atoi(res.header.Get("Retry-After-Ms"))
				if err != nil || err2 != nil || whole < 1 || ms < 1 || ms > 1000*whole || ms <= 1000*(whole-1) {
					t.Fatalf("the waits are %q and %q", res.header.Get("Retry-After"), res.header.Get("Retry-After-Ms"))
				}
				wait := time.Duration(ms) * time.Millisecond
				if field == "Retry-After" {
					wait = time.Duration(whole) * time.Second
				}
				time.Sleep(time.Until(refused.Add(wait)))
				if res := p.chatAs(token, tinyBody); res.status != 200 {
					t.Errorf("after the %v it was told to wait: got %d %s", wait, res.status, res.body)
				}
			})
		}
	}
}

// TestRefusals (LI12): each kind of refusal has its own message, and suggests a retry only if that can help
// soon.
func TestRefusals(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	const day = `"per":"day"`
	awaitClearOfHour(5 * time.Second)
	for _, test := range []struct {
		limit, members string
		code, kind     string
		retry          string // yes, no, or hour: at a time that may be too far for SDKs to sleep
		message        string
	}{
		{`{"count":"requests","max":1,"per":"minute"}`, `"n":1`, "rate_limit_exceeded", "requests", "yes", "of 1 requests per minute is used up. Try again in"},
		{`{"count":"requests","max":1,"per":"hour"}`, `"n":1`, "rate_limit_exceeded", "requests", "hour", "of 1 requests per hour is used up"},
		{`{"count":"requests","max":1,"per":"day"}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "of 1 requests per day is used up. It resets in"},
		{`{"count":"requests","max":1,"per":"week"}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "It resets in"},
		{`{"count":"requests","max":1,"per":"month"}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "It resets in"},
		{`{"count":"requests","max":1,"per":"lifetime"}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "of 1 requests in total is used up."},
		{`{"count":"requests","max":0,"per":"second"}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "of 0 requests per second is used up."},
		{`{"count":"concurrent","max":0}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "of 0 calls at one time is used up."},
		{`{"count":"tokens","max":40,` + day + `}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "40 tokens per day has no room for this call: it may need 33, and 28 is left"},
		{`{"count":"tokens","max":40,` + day + `}`, `"max_tokens":41`, "project_spend_limit_exceeded", "insufficient_quota", "no", "never allows as much output as this call asks for"},
		{`{"count":"dollars","max":0.000005,` + day + `,"endpoint":"/v1/chat/*"}`, `"max_tokens":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "$0.000005 per day on /v1/chat/* has no room for this call: it may need 0.00000"},
		{`{"count":"requests","max":1,` + day + `,"model":"gpt*"}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "1 requests per day for models gpt* is used up"},
	} {
		for _, where := range []string{"token", "project"} {
			own, its, whose := `{"limits":[`+test.limit+`]}`, `{}`, "This token's limit"
			if where == "project" {
				own, its, whose = its, own, "The project's limit"
			}
			_, tokens, _ := p.newProject(where+test.limit+test.members, its, own, 1)
			var res testResponse
			for range 3 {
				if res = p.chatAs(tokens[0], test.members); res.status == 429 {
					break
				}
				p.waitSettled()
			}
			var e struct {
				Error struct{ Message, Type string }
			}
			_ = json.Unmarshal([]byte(res.body), &e)
			code := res.errorCode()
			if strings.Contains(test.message, "never allows") {
				code, e.Error.Type = test.code, test.kind // a mistake of the caller, not of a quota
			}
			if res.status != 429 || code != test.code || e.Error.Type != test.kind || !strings.HasPrefix(e.Error.Message, whose) || !strings.Contains(e.Error.Message, test.message) {
				t.Errorf("%s, %s: got %d %s", where, test.limit, res.status, res.body)
			}
			after, no := res.header.Get("Retry-After") != "", res.header.Get("X-Should-Retry") == "false"
			hour := time.Until(time.Now().Truncate(time.Hour).Add(time.Hour)) > maxRetryWait
			if want := map[string][2]bool{"yes": {true, false}, "hour": {true, hour}, "no": {false, true}}[test.retry]; after != want[0] || no != want[1] {
				t.Errorf("%s, %s: the headers are %v", where, test.limit, res.header)
			}
		}
	}
	for _, row := range p.ledger() {
		if row.Outcome == "refused" && row.Status != 429 {
			t.Errorf("the ledger has %+v", row)
		}
	}
}

// TestRateHeaders: x-ratelimit-* describe the token's tightest limits on answers, streams and errors alike,
// and never those of the provider or the project.
func TestRateHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		const its = "X-RateLimit-Limit-Requests: 77777\r\nx-ratelimit-remaining-requests: 77777\r\nx-ratelimit-limit-tokens: 77777\r\nx-ratelimit-reset-tokens: 77777s\r\nX-Ratelimit-Limit-Project-Tokens: 77777"
		switch {
		case strings.Contains(r.body, `"seed":4`):
			return c.reply(400, `{"error":{}}`, its)
		case strings.Contains(r.body, `"stream":true`):
			c.beginSSE(its)
			for _, e := range chatEvents(true) {
				_ = c.chunk(e)
			}
			return c.chunk("") == nil
		}
		return c.reply(200, chatResponseBody, its)
	})
	_, tokens, _ := p.newProject("headers", `{"limits":[{"count":"requests","max":3333,"per":"day"},{"count":"tokens","max":33333,"per":"minute"}]}`,
		`{"limits":[{"count":"requests","max":60,"per":"minute"},{"count":"requests","max":4,"per":"month"},{"count":"tokens","max":100000,"per":"day"},
		{"count":"tokens","max":6000,"per":"minute"},{"count":"requests","max":1,"per":"day","shadow":true},{"count":"concurrent","max":1}]}`, 1)
	_, none := p.newToken(`"name":"none"`)
	for i, members := range []string{`"max_tokens":10`, `"stream":true,"max_tokens":10`, `"seed":4`, `"max_tokens":7000`, `"n":1`, `"n":1`} {
		res := p.chatAs(tokens[0], members)
		p.waitSettled()
		left := []string{"3", "2", "1", "1", "0", "0"}[i]
		h := res.header
		if h.Get("X-Ratelimit-Limit-Requests") != "4" || h.Get("X-Ratelimit-Remaining-Requests") != left || h.Get("X-Ratelimit-Limit-Tokens") != "6000" {
			t.Errorf("call %d: got %d %v", i, res.status, h)
		}
		if n, err := strconv.Atoi(h.Get("X-Ratelimit-Remaining-Tokens")); err != nil || n < 0 || n >= 6000 {
			t.Errorf("call %d: %v tokens remain, %v", i, n, err)
		}
		for _, name := range []string{"X-Ratelimit-Reset-Requests", "X-Ratelimit-Reset-Tokens"} {
			if d, err := time.ParseDuration(h.Get(name)); err != nil || d <= 0 {
				t.Errorf("call %d: %s is %q", i, name, h.Get(name))
			}
		}
		if text := fmt.Sprint(h) + res.body; strings.Contains(text, "77777") || strings.Contains(text, "33333") || strings.Contains(text, "3333 ") {
			t.Errorf("call %d tells of the provider's or the project's limits: %v %s", i, h, res.body)
		}
	}
	for name := range p.chatAs(none, `"n":1`).header {
		if strings.HasPrefix(name, "X-Ratelimit") {
			t.Errorf("a token without limits got %s", name)
		}
	}
	_, counted := p.newToken(`"name":"max","max_requests":2`)
	if h := p.chatAs(counted).header; h.Get("X-Ratelimit-Limit-Requests") != "2" || h.Get("X-Ratelimit-Remaining-Requests") != "1" || h.Get("X-Ratelimit-Reset-Requests") != "" {
		t.Errorf("max_requests: %v", h)
	}
}

// TestMonitorOnly: a shadow limit refuses nothing, but shows what it would have refused on the call, in the
// sums and in the limit itself. When it is enforced, its count is correct.
func TestMonitorOnly(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	awaitClearOfHour(5 * time.Second)
	const shadow = `{"count":"requests","max":2,"per":"day","shadow":true}`
	project, tokens, ids := p.newProject("shadow", `{}`, `{"limits":[`+shadow+`,{"count":"concurrent","max":0,"shadow":true,"model":"gpt-5*"}]}`, 1)
	path := "/manage/tokens/" + ids[0]
	for range 5 {
		if res := p.chatAs(tokens[0]); res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
	}
	l := p.settledLimits(path)
	if l[0].Used != 2 || l[0].WouldRefuse != 3 || l[0].Left != 0 || !l[0].Shadow || l[1].WouldRefuse != 0 {
		t.Errorf("the limits say %+v", l)
	}
	var rows struct {
		Data []struct {
			LimitHit string `json:"limit_hit"`
			Outcome  string
		}
	}
	p.manage("GET", "/manage/requests?token_id="+ids[0], "", 200, &rows)
	hits := 0
	for _, r := range rows.Data {
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
		t.Errorf("%d rows have the limit, and usage says %+v", hits, usage)
	}
	if n := strings.Count(string(p.log.bytes()), `"shadow_limit":"2 requests per day"`); n != 3 {
		t.Errorf("the log has the limit %d times", n)
	}
	p.manage("PATCH", path, `{"policy":{"limits":[{"count":"requests","max":6,"per":"day"}]}}`, 200, nil)
	if a, b := p.chatAs(tokens[0]), p.chatAs(tokens[0]); a.status != 200 || b.status != 429 {
		t.Errorf("made real, with one left of 6: got %d, %d", a.status, b.status)
	}
	var refused struct {
		Data []struct {
			LimitHit string `json:"limit_hit"`
		}
	}
	p.waitSettled()
	p.manage("GET", "/manage/requests?outcome=refused&token_id="+ids[0], "", 200, &refused)
	if len(refused.Data) != 1 || refused.Data[0].LimitHit != "6 requests per day" {
		t.Errorf("the refused call is on record as %+v", refused)
	}
}

// TestOwnToken: a token may read its own state without using anything. It learns nothing about its project,
// the provider or other tokens.
func TestOwnToken(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	awaitClearOfHour(5 * time.Second)
	project, tokens, ids := p.newProject("secret-project", `{"endpoints":["/v1/chat/*"],"models":["gpt-4o*","secret-model"],"limits":[{"count":"requests","max":4711,"per":"day"},{"count":"concurrent","max":4712}]}`,
		`{"models":["gpt-4o*"],"limits":[{"count":"requests","max":3,"per":"day"},{"count":"dollars","max":0.5,"per":"month"}]}`, 2)
	p.manage("PATCH", "/manage/tokens/"+ids[0], `{"name":"mine","max_requests":9}`, 200, nil)
	ask := func(method, token string) testResponse {
		return p.do(method, ownTokenPath, "", "Authorization", "Bearer "+token)
	}
	p.chatAs(tokens[0])
	p.chatAs(tokens[1])
	p.waitSettled()
	var v map[string]any
	for range 10 { // more often than any limit allows
		res := ask("GET", tokens[0])
		if err := json.Unmarshal([]byte(res.body), &v); err != nil || res.status != 200 || res.header.Get("Cache-Control") != "no-store" || res.header.Get("X-Ratelimit-Remaining-Requests") != "2" {
			t.Fatalf("got %d %v %s", res.status, res.header, res.body)
		}
		for _, foreign := range []string{"secret", project, ids[1], "4711", "4712", p.provider.key, p.provider.url, p.upstream} {
			if strings.Contains(res.body+fmt.Sprint(res.header), foreign) {
				t.Errorf("it tells of %s: %s", foreign, res.body)
			}
		}
	}
	if v["id"] != ids[0] || v["name"] != "mine" || v["max_requests"] != 9.0 || v["request_count"] != 1.0 || v["requests_left"] != 8.0 || fmt.Sprint(v["models"]) != "[gpt-4o*]" || v["endpoints"] != nil {
		t.Errorf("got %v", v)
	}
	if l := v["limits"].([]any); len(l) != 2 || l[0].(map[string]any)["used"] != 1.0 || l[0].(map[string]any)["left"] != 2.0 || l[1].(map[string]any)["used"] != 0.00000315 {
		t.Errorf("the limits are %v", l)
	}
	if rows := p.ledger(); len(rows) != 2 {
		t.Errorf("%d calls are on record", len(rows))
	}
	for method, want := range map[string]int{"POST": 405, "DELETE": 405, "HEAD": 405, "PUT": 405} {
		if res := ask(method, tokens[0]); res.status != want {
			t.Errorf("%s: got %d %s", method, res.status, res.body)
		}
	}
	for name, token := range map[string]string{"none": "", "a made-up one": tokenPrefix + strings.Repeat("x", 58), "a management key": p.adminKey} {
		if res := ask("GET", token); res.status != 401 || strings.Contains(res.body, "secret") {
			t.Errorf("with %s: got %d %s", name, res.status, res.body)
		}
	}
	p.manage("DELETE", "/manage/tokens/"+ids[0], "", 200, nil)
	if res := ask("GET", tokens[0]); res.status != 401 {
		t.Errorf("when it is revoked: got %d %s", res.status, res.body)
	}
	p.manage("PATCH", "/manage/tokens/"+ids[1], `{"policy":{"addresses":["192.0.2.0/24"]}}`, 200, nil)
	if res := ask("GET", tokens[1]); res.status != 403 || strings.Contains(res.body, "192.0.2") {
		t.Errorf("from elsewhere: got %d %s", res.status, res.body)
	}
}

// TestAddresses: a token can be restricted to IPv4 and IPv6 networks. The client's real address counts, not
// one that it claims, and no answer reveals the networks.
func TestAddresses(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"TRUSTED_PROXIES": "127.0.0.1"})
	untrusting := newTest(t, nil)
	for _, test := range []struct {
		addresses, from string
		want            int
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
		{`"192.0.2.0/24"`, "198.51.100.1, 192.0.2.9", 200}, // the nearest proxy's word counts
		{`"192.0.2.0/24"`, "192.0.2.9, 198.51.100.1", 403}, // and not what the client made up
		{`"192.0.2.0/24"`, "garbage", 403},
		{`"0.0.0.0/0"`, "2001:db8::1", 403},
		{`"::/0"`, "10.1.2.3", 403},
		{`"::/0","0.0.0.0/0"`, "10.1.2.3", 200},
		{``, "10.1.2.3", 403},
		{`"127.0.0.1"`, "", 200},
	} {
		_, of, _ := p.newProject("p"+test.addresses+test.from, `{"addresses":[`+test.addresses+`]}`, `{}`, 1)
		_, own := p.newToken(`"name":"a","policy":{"addresses":[` + test.addresses + `]}`)
		for where, token := range map[string]string{"project": of[0], "token": own} {
			h := []string{"Authorization", "Bearer " + token, "Content-Type", "application/json"}
			if test.from != "" {
				h = append(h, "X-Forwarded-For", test.from)
			}
			res := p.do("POST", "/v1/chat/completions", chatBody(), h...)
			if res.status != test.want || test.want == 403 && res.errorCode() != "address_not_allowed" {
				t.Errorf("%s of %s, from %q: got %d %s", test.addresses, where, test.from, res.status, res.body)
			}
			if first := strings.Trim(strings.Split(test.addresses, ",")[0], `"`); test.want == 403 && first != "" && strings.Contains(res.body, first) {
				t.Errorf("%s: the refusal names the network: %s", test.addresses, res.body)
			}
		}
	}
	_, token := untrusting.newToken(`"name":"a","policy":{"addresses":["10.0.0.0/8"]}`)
	for _, name := range []string{"X-Forwarded-For", "X-Real-Ip", "Forwarded", "True-Client-Ip"} {
		if res := untrusting.do("POST", "/v1/chat/completions", chatBody(), "Authorization", "Bearer "+token, "Content-Type", "application/json", name, "10.0.0.1"); res.status != 403 {
			t.Errorf("an address that is claimed in %s: got %d %s", name, res.status, res.body)
		}
	}
	bad := map[string]bool{}
	for _, list := range []string{`["10.0.0.1/8"]`, `["10.0.0.0/33"]`, `["x"]`, `["fe80::1%eth0"]`, `"10.0.0.0/8"`, `[7]`, `["10.0.0.0/8",""]`} {
		res := p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+p.tokenID, `{"policy":{"addresses":`+list+`}}`)
		bad[fmt.Sprint(list, res.status)] = res.status != http.StatusBadRequest || !strings.Contains(res.body, "policy.addresses")
	}
	for _, what := range slices.Sorted(maps.Keys(bad)) {
		if bad[what] {
			t.Errorf("addresses %s", what)
		}
	}
}

// TestUsageByOutcome (LI9): what each outcome of a call costs. Tokens and dollars are -1 if the provider's
// bill is unknown; then the estimate counts.
func TestUsageByOutcome(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error", "MAX_BODY_BYTES": "64KiB"})
	p.allowErrors = true // a provider that refuses its key is one
	p.instance.running.mu.Lock()
	p.instance.running.limits.upstreamTimeout = 300 * time.Millisecond
	p.instance.running.mu.Unlock()
	awaitClearOfHour(20 * time.Second)
	begun := func(then func(*providerConn) bool) func(*providerConn, recordedRequest) bool {
		return func(c *providerConn, _ recordedRequest) bool {
			c.beginSSE()
			_ = c.chunk(strings.Join(chatEvents(true)[:2], ""))
			return then(c)
		}
	}
	const path = "/v1/chat/completions"
	for _, test := range []struct {
		name             string
		script           func(*providerConn, recordedRequest) bool
		path, body       string
		leave            bool // the client does, after the first event or half a second
		requests, tokens int
	}{
		{"answered", chatScript, path, chatBody(), false, 1, 12},
		{"streamed", chatScript, path, chatBody(`"stream":true`), false, 1, 12},
		{"answered without usage", replyScript(200, `{"choices":[]}`), path, chatBody(), false, 1, -1},
		{"the provider does not like it", replyScript(400, `{"error":{}}`), path, chatBody(), false, 1, 0},
		{"the provider is busy", replyScript(429, `{"error":{}}`), path, chatBody(), false, 1, 0},
		{"the provider fails", replyScript(500, `{"error":{}}`), path, chatBody(), false, 1, 0},
		{"the provider refuses the key", replyScript(401, `{"error":{}}`), path, chatBody(), false, 1, 0},
		{"the provider hangs up", func(c *providerConn, _ recordedRequest) bool { return c.reset() }, path, chatBody(), false, 1, 0},
		{"the provider is silent", silentScript, path, chatBody(), false, 1, -1},
		{"the stream breaks off", begun((*providerConn).reset), path, chatBody(`"stream":true`), false, 1, -1},
		{"the stream has no end", begun(endStream), path, chatBody(`"stream":true`), false, 1, -1},
		{"the client leaves the stream", begun(stallStream), path, chatBody(`"stream":true`), true, 1, -1},
		{"the client leaves before the answer", silentScript, path, chatBody(), true, 1, -1},
		{"a list of models", replyScript(200, `{"object":"list","data":[]}`), "GET /v1/models", ``, false, 1, 0},
		{"a count of tokens", replyScript(200, `{"input_tokens":9}`), "/v1/messages/count_tokens", strings.Replace(chatBody(), "gpt-4o-mini", "claude-sonnet-4", 1), false, 0, 0},
		{"no such endpoint", chatScript, "/v1/nothing", chatBody(), false, 0, 0},
		{"no JSON", chatScript, path, `{`, false, 0, 0},
		{"too large", chatScript, path, chatBody(`"user":"` + strings.Repeat("x", 65<<10) + `"`), false, 0, 0},
		{"a model that is not allowed", chatScript, path, strings.Replace(chatBody(), "mini", "maxi", 1), false, 0, 0},
		{"another limit refuses it", chatScript, path, chatBody(`"max_tokens":900000`), false, 0, 0},
		{"it asks about itself", chatScript, "GET " + ownTokenPath, ``, false, 0, 0},
	} {
		id, token := p.newToken(`"name":"c","max_requests":100,"policy":{"models":["gpt-4o-mini"],"limits":[{"count":"requests","max":100,"per":"day"},
			{"count":"tokens","max":800000,"per":"month"},{"count":"dollars","max":90,"per":"lifetime"},{"count":"concurrent","max":2},{"count":"requests","max":3,"per":"minute"}]}`)
		p.provider.setScript(test.script)
		method, target := "POST", test.path
		if m, rest, ok := strings.Cut(target, " "); ok {
			method, target = m, rest
		}
		if test.leave {
			p.abandonCall(token, test.body)
		} else {
			p.do(method, target, test.body, "Authorization", "Bearer "+token, "Content-Type", "application/json")
		}
		l := p.settledLimits("/manage/tokens/" + id)
		if int(l[0].Used) != test.requests || p.requestCount(id) != int64(test.requests) || int(l[1].Used) != test.tokens && (test.tokens >= 0 || l[1].Used == 0) ||
			(l[2].Used > 0) != (test.tokens != 0) || l[3].Used != 0 || l[1].Reserved+l[2].Reserved != 0 || int(l[4].Used) != test.requests {
			t.Errorf("%s: count %d, limits %+v", test.name, p.requestCount(id), l)
		}
		if again := p.storedUsage(id)[:3]; !slices.Equal(again, []float64{l[0].Used, l[1].Used, l[2].Used}) {
			t.Errorf("%s: after a restart %v would be used, instead of %+v", test.name, again, l)
		}
	}
	p.checkSums()
	p.checkCounts()
}

// silentScript never answers.
func silentScript(c *providerConn, _ recordedRequest) bool {
	c.waitClosed(20 * time.Second)
	return false
}

// abandonCall makes a call and disconnects in the middle of it.
func (p *testProxy) abandonCall(token, body string) {
	p.t.Helper()
	hits := len(p.provider.received())
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close()
	_, _ = fmt.Fprintf(conn, "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", token, len(body), body)
	waitFor(p.t, "the provider", func() bool { return len(p.provider.received()) > hits })
	if strings.Contains(body, `"stream":true`) {
		_, _ = io.ReadFull(conn, make([]byte, 100))
	}
}

// storedUsage returns the use of a token's limits as a new process would load it.
func (p *testProxy) storedUsage(id string) (out []float64) {
	p.t.Helper()
	row, err := p.instance.store.tokenByID(context.Background(), id)
	if err != nil {
		p.t.Fatal(err)
	}
	views, err := p.instance.operations.limits.storedLimits(context.Background(), row.policy, false, row.project, row.seq, time.Now().UnixMilli())
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
	id, token := p.newToken(`"name":"p","policy":{"limits":[{"count":"concurrent","max":3},{"count":"tokens","max":400000,"per":"day"}]}`)
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
				if j%4 == 0 { // the client goes away
					time.AfterFunc(time.Duration(j*i%17)*100*time.Microsecond, cancel)
				}
				p.sendChat(ctx, token, fmt.Sprintf(`"stream":%v,"max_tokens":10,"seed":%d`, j%2 == 0, i*1000+j))
				cancel()
			}
		})
	}
	all.Wait()
	p.waitSettled()
	if most.Load() > 3 || calls.Load() < 200 {
		t.Errorf("%d calls were with the provider at one time, %d in all", most.Load(), calls.Load())
	}
	hits, statuses := p.runConcurrently(30, func(int) int {
		_, status := p.sendChat(context.Background(), token, tinyBody)
		return status
	})
	if l := p.settledLimits("/manage/tokens/" + id); hits != 3 || statuses[429] != 27 || l[0].Used != 0 || l[1].Reserved != 0 {
		t.Errorf("after %d calls %d run at once, clients got %v, the limits say %+v", calls.Load(), hits, statuses, l)
	}
	p.checkSums()
	p.checkCounts()
}

// TestConcurrencyAfterPanic (LI7): a panic in the middle of a call releases its slot, too.
func TestConcurrencyAfterPanic(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.allowErrors = true
	id, token := p.newToken(`"name":"p","max_requests":100,"policy":{"limits":[{"count":"concurrent","max":1},{"count":"tokens","max":5000,"per":"day"}]}`)
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
		t.Errorf("the limits say %+v", l)
	}
}

// usageResponse is an answer that used this many tokens.
func usageResponse(input, output int) string {
	return strings.Replace(strings.Replace(chatResponseBody, `"prompt_tokens":9`, fmt.Sprintf(`"prompt_tokens":%d`, input), 1),
		`"completion_tokens":3`, fmt.Sprintf(`"completion_tokens":%d`, output), 1)
}

// TestBudgetHolds (LI5): calls of unknown cost together spend no more than the budget, however many run in
// parallel.
func TestBudgetHolds(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	// A call may cost 26*150 + 5000*600 nano-dollars, and costs a tenth of it.
	path, token := p.newLimitedToken(`{"count":"dollars","max":0.01,"per":"lifetime"}`)
	total := 0
	for round := 0; ; round++ {
		hits, statuses := p.runConcurrently(50, func(i int) int {
			status, _ := p.send(nil, token, chatBody(`"max_tokens":5000`))
			return status
		})
		if hits > 3 || statuses[429] != 50-hits {
			t.Fatalf("round %d: %d calls ran at once, clients got %v", round, hits, statuses)
		}
		if total += hits; hits == 0 || total > 1000 {
			break
		}
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(200, usageResponse(9, 500)) })
		for range 5 { // and one after the other
			if status, _ := p.send(nil, token, chatBody(`"max_tokens":5000`)); status == 200 {
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
	if spent > 0.01 || fmt.Sprintf("%.9f", spent) != fmt.Sprintf("%.9f", l.Used) || l.Reserved != 0 {
		t.Errorf("of $0.01 %v was spent by %d calls; the limit says %+v", spent, total, l)
	}
	if l.Left >= 0.003+26*150e-9 {
		t.Errorf("calls are refused with %v left", l.Left)
	}
}

// TestReservationsComeBack (LI5): whatever the outcome of a call, what it reserved and did not use is
// available to the next one.
func TestReservationsComeBack(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.allowErrors = true
	path, token := p.newLimitedToken(`{"count":"tokens","max":1000,"per":"day"},{"count":"dollars","max":0.001,"per":"lifetime"},` +
		`{"count":"concurrent","max":1},{"count":"tokens","max":1000,"per":"minute"}`)
	for name, script := range map[string]func(*providerConn, recordedRequest) bool{
		"fails":            replyScript(500, `{"error":{}}`),
		"is busy":          replyScript(429, `{"error":{}}`),
		"does not like it": replyScript(400, `{"error":{}}`),
		"refuses the key":  replyScript(401, `{"error":{}}`),
		"sends elsewhere":  replyScript(302, ``, "Location: http://127.0.0.1:1/"),
		"breaks off":       func(c *providerConn, _ recordedRequest) bool { return c.reset() },
		"speaks no HTTP":   func(c *providerConn, _ recordedRequest) bool { _, _ = c.Write([]byte("220 smtp\r\n")); return false },
	} {
		t.Log(name)
		p.provider.setScript(script)
		for range 5 { // each asks for nearly all there is
			if res := p.chatAs(token, `"max_tokens":900`); res.status == 429 && name != "is busy" || strings.Contains(res.body, "limit of") {
				t.Fatalf("the provider %s: got %d %s", name, res.status, res.body)
			}
			p.waitSettled()
		}
		for _, l := range p.settledLimits(path) {
			if l.Reserved != 0 || l.Used != 0 {
				t.Errorf("the provider %s: %+v", name, l)
			}
		}
	}
	p.provider.setScript(chatScript)
	if res := p.chatAs(token, `"max_tokens":900`); res.status != 200 {
		t.Errorf("then: got %d %s", res.status, res.body)
	}
	if res := p.chatAs(token, `"max_tokens":980`); res.status != 429 || res.header.Get("X-Should-Retry") != "false" {
		t.Errorf("a call for more than is left: got %d %v %s", res.status, res.header, res.body)
	}
}

// TestBucketSavesNothingUp: calls that reserve the whole bucket minute after minute, and all end unused at
// one moment, return at most one bucket and what it still held.
func TestBucketSavesNothingUp(t *testing.T) {
	t.Parallel()
	l, s := newTestLimiter(t, ``, `{"count":"tokens","max":1000,"per":"minute"}`, noon)
	var kept []*reservation
	now := int64(noon)
	for range 20 {
		h, refused := l.tryReserve(s, chatEstimate(10, 990), now)
		if refused != nil {
			t.Fatalf("after %d minutes: %+v", (now-noon)/60_000, refused)
		}
		kept, now = append(kept, h), now+60_000
	}
	taken := 0
	for {
		if h, _ := l.tryReserve(s, chatEstimate(10, 990), now); h.limiter != nil {
			h.settle(now, finalUsage{forwarded: true, tokens: 1000}, func() {})
			taken += 1000
		} else if len(kept) > 0 {
			kept[0].settle(now, finalUsage{forwarded: true, tokens: 0}, func() {})
			kept = kept[1:]
		} else {
			break
		}
	}
	if taken > 1000 {
		t.Errorf("in one moment %d tokens were taken of 1000 per minute", taken)
	}
}

// TestSpentStreams (LI5): a stream that exceeds a budget by more than a tenth is ended within a second, and
// its client sees that it is incomplete.
func TestSpentStreams(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		limit   string
		members string
		project bool
		ended   bool
	}{
		"tokens of a token":         {`{"count":"tokens","max":1000,"per":"day"}`, ``, false, true},
		"tokens of a project":       {`{"count":"tokens","max":1000,"per":"month"}`, ``, true, true},
		"dollars of a token":        {`{"count":"dollars","max":0.0006,"per":"lifetime"}`, ``, false, true},
		"dollars of a project":      {`{"count":"dollars","max":0.0006,"per":"week"}`, ``, true, true},
		"in shadow":                 {`{"count":"tokens","max":1000,"per":"day","shadow":true}`, ``, false, false},
		"of another model":          {`{"count":"tokens","max":1000,"per":"day","model":"gpt-5*"}`, ``, false, false},
		"a call that named its end": {`{"count":"tokens","max":1000,"per":"day"}`, `,"max_tokens":900`, false, false},
		// A provider that does not know a name may take no notice of it.
		"one in another endpoint's words": {`{"count":"tokens","max":1000,"per":"day"}`, `,"max_output_tokens":10`, false, true},
		"one that is no number":           {`{"count":"tokens","max":1000,"per":"day"}`, `,"max_tokens":"900"`, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
			awaitClearOfHour(10 * time.Second)
			own, its := `{"limits":[`+test.limit+`]}`, `{}`
			if test.project {
				own, its = its, own
			}
			project, tokens, ids := p.newProject("b", its, own, 2)
			enough, cut := make(chan struct{}), make(chan time.Time, 1)
			p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
				c.beginSSE()
				_ = c.chunk(strings.Repeat(chatEvents(true)[1], 500))
				<-enough
				_ = c.chunk(strings.Repeat(chatEvents(true)[1], 1000))
				if test.ended {
					c.waitClosed(10 * time.Second)
					cut <- time.Now()
					return false
				}
				time.Sleep(3 * watchInterval) // in which it would be seen
				for _, e := range chatEvents(true) {
					_ = c.chunk(e)
				}
				return c.chunk("") == nil
			})
			s, err := p.openStream(t.Context(), tokens[0], `"n":1`+test.members)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.read(500 * len(chatEvents(true)[1])); err != nil {
				t.Fatalf("it was ended within its budget: %v", err)
			}
			passed := time.Now()
			close(enough)
			rest, err := s.readAll()
			if !test.ended {
				if err != nil || !strings.HasSuffix(rest, "[DONE]\n\n") {
					t.Errorf("the stream ended with %q, %v", rest[max(0, len(rest)-200):], err)
				}
				return
			}
			if err == nil || strings.Contains(rest, "[DONE]") {
				t.Errorf("the stream ended as if it were complete: %q", rest[max(0, len(rest)-200):])
			}
			if d := (<-cut).Sub(passed); d > time.Second {
				t.Errorf("the provider's call was ended after %v", d)
			}
			row := p.lastCall()
			if row.Outcome != "truncated" || row.LimitHit == "" || row.ErrorCode != "project_spend_limit_exceeded" || row.UsageSource != "estimated" || row.OutputTokens < 1000 {
				t.Errorf("the ledger has %+v", row)
			}
			path := "/manage/tokens/" + ids[0]
			if test.project {
				path = "/manage/projects/" + project
			}
			if l := p.settledLimits(path)[0]; l.Left != 0 || l.Used <= l.Max || l.Reserved != 0 {
				t.Errorf("the limit says %+v", l)
			}
			for i, token := range tokens {
				want := 429
				if i == 1 && !test.project {
					want = 200 // it is another token's budget
				}
				p.provider.setScript(chatScript)
				if res := p.chatAs(token); res.status != want || want == 429 && (res.errorCode() != "project_spend_limit_exceeded" || res.header.Get("Retry-After") != "") {
					t.Errorf("then token %d: got %d %s", i, res.status, res.body)
				}
			}
		})
	}
}

// TestSpentBufferedStream: a buffered stream is ended in the same way. Because the client has received
// nothing yet, it gets an error with the reason.
func TestSpentBufferedStream(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	_, token := p.newLimitedToken(`{"count":"tokens","max":1000,"per":"day"}`)
	p.provider.setScript(streamScript([]string{strings.Repeat(chatEvents(true)[1], 1500)}, 1, stallStream))
	res := p.do("POST", "/v1/chat/completions", chatBody(`"stream":true`), "Authorization", "Bearer "+token, "Content-Type", "application/json", "X-LLM-Proxy-Stream", "verified")
	if res.status != 429 || res.errorCode() != "project_spend_limit_exceeded" || res.header.Get("X-Should-Retry") != "false" {
		t.Errorf("got %d %v %s", res.status, res.header, clip(res.body, 300))
	}
	if row := p.lastCall(); row.Outcome != "truncated" || row.UsageSource != "estimated" || row.OutputTokens < 1000 {
		t.Errorf("the ledger has %+v", row)
	}
	_, token = p.newLimitedToken(`{"count":"tokens","max":1000,"per":"day"}`)
	p.provider.setScript(streamScript([]string{strings.Repeat(chatEvents(true)[1], 900)}, 1, func(*providerConn) bool { return false }))
	p.do("POST", "/v1/chat/completions", chatBody(`"stream":true`), "Authorization", "Bearer "+token, "Content-Type", "application/json", "X-LLM-Proxy-Stream", "verified")
	if row := p.lastCall(); row.Outcome != "upstream_error" || row.UsageSource != "estimated" || row.OutputTokens < 800 {
		t.Errorf("cut by the provider: the ledger has %+v", row)
	}
}

// TestPriceUnknown: a call of unknown cost cannot be held to a budget, so it is refused where a budget
// applies, and only there.
func TestPriceUnknown(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.HasSuffix(r.target, "/speech") || strings.HasSuffix(r.target, "/generations") {
			return c.reply(200, `x`, "Content-Type: audio/mpeg")
		}
		return chatScript(c, r)
	})
	const day, lifetime = `{"count":"dollars","max":1,"per":"day"`, `{"count":"dollars","max":1,"per":"lifetime"`
	chat := func(model string) [2]string {
		return [2]string{"/v1/chat/completions", strings.Replace(chatBody(), "gpt-4o-mini", model, 1)}
	}
	speech := [2]string{"/v1/audio/speech", `{"model":"gpt-4o-mini-tts","input":"x","voice":"alloy"}`}
	for _, test := range []struct {
		limit string
		call  [2]string
		want  int
	}{
		{day + `}`, chat("gpt-4o-mini"), 200},
		{day + `}`, chat("unheard-of"), 403},
		{lifetime + `}`, chat("unheard-of"), 403},
		{day + `,"model":"gpt-4o*"}`, chat("unheard-of"), 200},
		{day + `,"model":"unheard*"}`, chat("unheard-of"), 403},
		{day + `,"endpoint":"/v1/embeddings"}`, chat("unheard-of"), 200},
		{day + `,"shadow":true}`, chat("unheard-of"), 200},
		{day + `}`, speech, 403},
		{day + `,"endpoint":"/v1/chat/*"}`, speech, 200},
		{`{"count":"requests","max":1,"per":"day"}`, chat("unheard-of"), 200},
	} {
		_, token := p.newLimitedToken(test.limit)
		before := len(p.provider.received())
		res := p.do("POST", test.call[0], test.call[1], "Authorization", "Bearer "+token, "Content-Type", "application/json")
		if res.status != test.want || test.want == 403 && (res.errorCode() != "price_unknown" || len(p.provider.received()) != before) {
			t.Errorf("%s, %s: got %d %s", test.limit, test.call[1], res.status, res.body)
		}
	}
	path, token := p.newLimitedToken(day + `}`)
	p.manage("POST", "/manage/prices", `{"match":"unheard-of","input":1000,"output":2000}`, 201, nil)
	if res := p.do("POST", "/v1/chat/completions", chat("unheard-of")[1], "Authorization", "Bearer "+token, "Content-Type", "application/json"); res.status != http.StatusOK {
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
	if res := p.chatAs(token, `"max_tokens":10`); res.status != 200 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	p.waitSettled()
	res := p.chatAs(token, `"max_tokens":10`)
	wait, err := time.ParseDuration(res.header.Get("Retry-After-Ms") + "ms")
	if res.status != 429 || err != nil || wait < time.Minute || wait > 2*time.Minute {
		t.Errorf("got %d, Retry-After-Ms %v, %s", res.status, wait, res.body)
	}
	if l := p.settledLimits(path)[0]; l.Used != 2000 || l.Left != 0 {
		t.Errorf("the limit says %+v", l)
	}
}
