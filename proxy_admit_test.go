// Tests of admission: what a call reserves before it is forwarded.
package main

import (
	"encoding/json"
	"strings"
	"testing"
)

// TestReservationCoversBody (LI5): what a call reserves covers all that its body asks for: each prompt of a list gets n
// answers of the maximum, and a maximum that the provider may ignore is none.
func TestReservationCoversBody(t *testing.T) {
	t.Parallel()
	completion := func(members string) string { return `{"model":"gpt-3.5-turbo-instruct",` + members + `}` }
	prompts := func(n int) string { return `"prompt":[` + strings.TrimSuffix(strings.Repeat(`"a",`, n), ",") + `]` }
	const max10 = `"max_completion_tokens":10`
	for name, test := range map[string]struct {
		path, body string
		compatible bool
		reserved   int64 // output tokens; of an assumed maximum, a quarter of the limit
		refused    bool
	}{
		"one prompt": {path: "completions", body: completion(`"prompt":"a","max_tokens":100`), reserved: 100},
		"prompts":    {path: "completions", body: completion(prompts(3) + `,"max_tokens":100`), reserved: 300},
		"tokens":     {path: "completions", body: completion(`"prompt":[1,2,3],"max_tokens":100`), reserved: 100},
		"n and best_of": {path: "completions",
			body: completion(prompts(2) + `,"max_tokens":100,"n":2,"best_of":3`), reserved: 600},
		"too many prompts": {path: "completions",
			body: completion(prompts(500) + `,"max_tokens":4000`), refused: true},
		"hidden prompts": {path: "completions",
			body: completion(prompts(500) + `,"prompt":"a","max_tokens":4000`), refused: true},
		"no maximum": {path: "completions", body: completion(prompts(500)), reserved: 2500},
		"a chat":     {path: "chat/completions", body: chatBody(max10), reserved: 10},
		"a chat with a server that may ignore the field": {path: "chat/completions",
			body: chatBody(max10), compatible: true, reserved: 2500},
		"a chat with the field that all know": {path: "chat/completions",
			body: chatBody(`"max_tokens":10,"max_completion_tokens":20`), compatible: true, reserved: 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			provider := p.provider
			if test.compatible {
				first := "/manage/projects/" + p.project + "/upstreams/" + p.upstream
				p.manage("PATCH", first, `{"is_active":false}`, 200, nil)
				provider, _ = p.addUpstream(`"priority":0`)
			}
			id, token := p.newToken(`"name":"x","policy":{"limits":[{"count":"tokens","max":10000,"per":"day"}]}`)
			seen := make(chan int64, 1)
			provider.setScript(func(c *providerConn, r recordedRequest) bool {
				l := p.currentLimits("/manage/tokens/" + id)[0]
				seen <- int64(l.Used + l.Reserved) // the watchdog may have counted the input as used
				return c.reply(200, chatResponseBody)
			})
			res := p.do("POST", "/v1/"+test.path, test.body,
				"Authorization", "Bearer "+token, "Content-Type", "application/json")
			if test.refused {
				if res.status != 429 || !strings.Contains(res.body, "never allows") {
					t.Errorf("got %d %s", res.status, res.body)
				}
				return
			}
			if res.status != 200 {
				t.Fatalf("got %d %s", res.status, res.body)
			}
			if got := <-seen - estimateTokens(int64(len(test.body))); got != test.reserved {
				t.Errorf("%d output tokens are reserved, want %d", got, test.reserved)
			}
		})
	}
}

// TestGeminiErrors: what the proxy itself answers to Gemini's API is a google.rpc.Status with the proxy's own code as
// its reason, and with the time to wait where the client may try again.
func TestGeminiErrors(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_BODY_BYTES": "1KiB", "BODY_MEMORY": "1MiB"})
	p.allowErrors = true
	p.addUpstreamAt(newFakeProvider(t), "google", `"weight":1`)
	const small = `{"contents":[{"parts":[{"text":"Hello"}]}]}`
	large := strings.Replace(small, "Hello", strings.Repeat("x", 2000), 1)
	ok := func() func() { return func() {} }
	for _, c := range []struct {
		name   string
		begin  func() (end func())
		method string
		body   string
		status int
		google string
		reason string
		delay  string
	}{
		{"a body that is too large", ok, "POST", large, 413, "INVALID_ARGUMENT", "REQUEST_TOO_LARGE", ""},
		{"no memory for bodies", func() func() {
			p.instance.proxy.bodies.reserve(1 << 20)
			return func() { p.instance.proxy.bodies.release(1 << 20) }
		}, "POST", small, 503, "UNAVAILABLE", "BODY_MEMORY_FULL", "1s"},
		{"a locked ledger", func() func() {
			p.setPragma(`PRAGMA busy_timeout = 20`)
			return p.lockDatabase()
		}, "POST", small, 503, "UNAVAILABLE", "LEDGER_UNAVAILABLE", "1s"},
		{"a wrong method", ok, "PUT", small, 405, "INVALID_ARGUMENT", "METHOD_NOT_ALLOWED", ""},
	} {
		end := c.begin()
		res := p.do(c.method, "/v1beta/models/gemini-2.5-flash:generateContent", c.body,
			"Content-Type", "application/json", "X-Goog-Api-Key", p.token)
		end()
		var e struct {
			Error struct {
				Code            int
				Message, Status string
				Details         []struct{ Reason, RetryDelay string }
			}
		}
		if err := json.Unmarshal([]byte(res.body), &e); err != nil || len(e.Error.Details) == 0 {
			t.Errorf("%s: %v in %s", c.name, err, res.body)
			continue
		}
		got := e.Error
		if res.status != c.status || got.Code != c.status || got.Status != c.google || got.Message == "" ||
			got.Details[0].Reason != c.reason || got.Details[len(got.Details)-1].RetryDelay != c.delay {
			t.Errorf("%s: got %d %s", c.name, res.status, res.body)
		}
	}
}
