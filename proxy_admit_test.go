// Tests of admission: what a call reserves before it is forwarded.
package main

import (
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
