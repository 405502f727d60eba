// Tests of what clients see of limits (LI12): the wait they are told is the true
// one, quotas send nobody into retrying, headers are the token's own, and a
// token that asks about itself learns nothing else's.
package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestRetryAfterHolds (LI12): who comes back after Retry-After, or to the
// millisecond after retry-after-ms, gets in.
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
				p.provider.answer(always(200, usageAnswer(26, 1)))
				_, token := p.policyToken(test.limit)
				var res answer
				for range 300 {
					if res = p.chatAs(token, tinyBody); res.status != 200 {
						break
					}
				}
				refused := time.Now()
				if res.status != 429 || res.code() != "rate_limit_exceeded" || !strings.Contains(res.body, `"type":"`+test.kind+`"`) || res.header.Get("X-Should-Retry") != "" {
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

// TestRefusals (LI12): each kind of refusal has its own words, and tells to try
// again only where that can help soon.
func TestRefusals(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	const day = `"per":"day"`
	calm(5 * time.Second)
	for _, test := range []struct {
		limit, members string
		code, kind     string
		retry          string // yes, no, or hour: at a time that may be too far for SDKs to sleep
		message        string
	}{
		{`{"count":"requests","max":1,"per":"minute"}`, `"n":1`, "rate_limit_exceeded", "requests", "yes", "of 1 requests per minute is used up. Try again in"},
		{`{"count":"requests","max":1,"per":"hour"}`, `"n":1`, "rate_limit_exceeded", "requests", "hour", "of 1 requests per hour is used up"},
		{`{"count":"requests","max":1,"per":"day"}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "of 1 requests per day is used up. It begins anew in"},
		{`{"count":"requests","max":1,"per":"week"}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "It begins anew in"},
		{`{"count":"requests","max":1,"per":"month"}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "It begins anew in"},
		{`{"count":"requests","max":1,"per":"lifetime"}`, `"n":1`, "project_spend_limit_exceeded", "insufficient_quota", "no", "of 1 requests in all is used up."},
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
				own, its, whose = its, own, "The limit of this token's project"
			}
			_, tokens, _ := p.newProject(where+test.limit+test.members, its, own, 1)
			var res answer
			for range 3 {
				if res = p.chatAs(tokens[0], test.members); res.status == 429 {
					break
				}
				p.settle()
			}
			var e struct {
				Error struct{ Message, Type string }
			}
			_ = json.Unmarshal([]byte(res.body), &e)
			code := res.code()
			if strings.Contains(test.message, "never allows") {
				code, e.Error.Type = test.code, test.kind // a mistake of the caller, not of a quota
			}
			if res.status != 429 || code != test.code || e.Error.Type != test.kind || !strings.HasPrefix(e.Error.Message, whose) || !strings.Contains(e.Error.Message, test.message) {
				t.Errorf("%s, %s: got %d %s", where, test.limit, res.status, res.body)
			}
			after, no := res.header.Get("Retry-After") != "", res.header.Get("X-Should-Retry") == "false"
			hour := time.Until(time.Now().Truncate(time.Hour).Add(time.Hour)) > noLongSleep
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

// TestRateHeaders: x-ratelimit-* are those of the token's tightest limits, on
// answers, streams and errors alike, and never the provider's or the project's.
func TestRateHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.answer(func(c *providerConn, r recorded) bool {
		const its = "X-RateLimit-Limit-Requests: 77777\r\nx-ratelimit-remaining-requests: 77777\r\nx-ratelimit-limit-tokens: 77777\r\nx-ratelimit-reset-tokens: 77777s\r\nX-Ratelimit-Limit-Project-Tokens: 77777"
		switch {
		case strings.Contains(r.body, `"seed":4`):
			return c.reply(400, `{"error":{}}`, its)
		case strings.Contains(r.body, `"stream":true`):
			c.sse(its)
			for _, e := range chatEvents(true) {
				_ = c.chunk(e)
			}
			return c.chunk("") == nil
		}
		return c.reply(200, chatAnswer, its)
	})
	_, tokens, _ := p.newProject("headers", `{"limits":[{"count":"requests","max":3333,"per":"day"},{"count":"tokens","max":33333,"per":"minute"}]}`,
		`{"limits":[{"count":"requests","max":60,"per":"minute"},{"count":"requests","max":4,"per":"month"},{"count":"tokens","max":100000,"per":"day"},
		{"count":"tokens","max":6000,"per":"minute"},{"count":"requests","max":1,"per":"day","shadow":true},{"count":"concurrent","max":1}]}`, 1)
	_, none := p.newToken(`"name":"none"`)
	for i, members := range []string{`"max_tokens":10`, `"stream":true,"max_tokens":10`, `"seed":4`, `"max_tokens":7000`, `"n":1`, `"n":1`} {
		res := p.chatAs(tokens[0], members)
		p.settle()
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

// TestShadow: a limit in shadow refuses nothing, and says on the call, in the
// sums and in the limit itself what it would have refused. Made real, it has the
// true count.
func TestShadow(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	calm(5 * time.Second)
	const shadow = `{"count":"requests","max":2,"per":"day","shadow":true}`
	project, tokens, ids := p.newProject("shadow", `{}`, `{"limits":[`+shadow+`,{"count":"concurrent","max":0,"shadow":true,"model":"gpt-5*"}]}`, 1)
	path := "/manage/tokens/" + ids[0]
	for range 5 {
		if res := p.chatAs(tokens[0]); res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
	}
	l := p.limits(path)
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
	p.settle()
	p.manage("GET", "/manage/requests?outcome=refused&token_id="+ids[0], "", 200, &refused)
	if len(refused.Data) != 1 || refused.Data[0].LimitHit != "6 requests per day" {
		t.Errorf("the refused call is on record as %+v", refused)
	}
}

// TestOwnToken: a token may ask about itself, takes nothing by asking, and is
// told nothing of its project, of the provider or of other tokens.
func TestOwnToken(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	calm(5 * time.Second)
	project, tokens, ids := p.newProject("secret-project", `{"endpoints":["/v1/chat/*"],"models":["gpt-4o*","secret-model"],"limits":[{"count":"requests","max":4711,"per":"day"},{"count":"concurrent","max":4712}]}`,
		`{"models":["gpt-4o*"],"limits":[{"count":"requests","max":3,"per":"day"},{"count":"dollars","max":0.5,"per":"month"}]}`, 2)
	p.manage("PATCH", "/manage/tokens/"+ids[0], `{"name":"mine","max_requests":9}`, 200, nil)
	ask := func(method, token string) answer {
		return p.do(method, ownTokenPath, "", "Authorization", "Bearer "+token)
	}
	p.chatAs(tokens[0])
	p.chatAs(tokens[1])
	p.settle()
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

// TestAddresses: a token can be held to networks, of IPv4 and IPv6, by the
// client's own address and not by one that it claims; nobody learns which.
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
			if res.status != test.want || test.want == 403 && res.code() != "address_not_allowed" {
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
