// Tests of the response cache: what it answers, for whom and how, what it never stores, one flight for identical calls,
// what is on disk, and what a purge leaves.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// enableCache gives the test's project a cache. members are added to its policy.
func (p *testProxy) enableCache(members ...string) {
	p.t.Helper()
	cache := strings.Join(append([]string{`"ttl_seconds":3600`}, members...), ",")
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"cache":{`+cache+`}}}`, 200, nil)
}

// cachedChat makes a chat call that may be cached. headers are pairs of name and value.
func (p *testProxy) cachedChat(token, members string, headers ...string) testResponse {
	p.t.Helper()
	body := chatBody(`"temperature":0`)
	if members != "" {
		body = chatBody(`"temperature":0`, members)
	}
	return p.do("POST", "/v1/chat/completions", body,
		append([]string{"Authorization", "Bearer " + token, "Content-Type", "application/json"}, headers...)...)
}

// lastRow returns the row of the newest call as stored.
func (p *testProxy) lastRow() requestView {
	p.t.Helper()
	all := p.allRequests()
	if len(all) == 0 {
		p.t.Fatal("the ledger has no row")
	}
	newest := all[0]
	for _, r := range all {
		if r.id > newest.id {
			newest = r
		}
	}
	return newest
}

// cacheSettled waits until everything that is to be cached is on disk.
func (p *testProxy) cacheSettled() {
	p.t.Helper()
	p.waitSettled()
	c := p.instance.cache
	c.writeAll(context.Background())
	c.writing.Lock() // until the last batch is committed
	defer c.writing.Unlock()
}

// TestCacheHit: the second identical call is answered with the same bytes, without the provider, from memory and after
// a restart from the disk. It has a row of its own, with zero tokens and cost and what it saved.
func TestCacheHit(t *testing.T) {
	t.Parallel()
	for _, members := range []string{"", `"stream":true`, `"stream":true,"stream_options":{"include_usage":true}`} {
		p := newTest(t, nil)
		p.enableCache()
		first := p.cachedChat(p.token, members)
		if got := first.header.Get("Cache-Status"); first.status != 200 || got != "llm-proxy; fwd=miss; stored" {
			t.Fatalf("%s: got %d %q %s", members, first.status, got, first.body)
		}
		miss := p.lastCall()
		p.cacheSettled()
		for _, from := range []string{"memory", "disk", "memory again"} {
			if from == "disk" {
				if err := p.stop(); err != nil {
					t.Fatal(err)
				}
				p.start()
			}
			hit := p.cachedChat(p.token, members)
			status := hit.header.Get("Cache-Status")
			if hit.status != 200 || hit.body != first.body || !strings.HasPrefix(status, "llm-proxy; hit; ttl=3") ||
				!strings.Contains(status, `; key="`) || hit.header.Get("Age") == "" ||
				hit.header.Get("Content-Type") != first.header.Get("Content-Type") ||
				hit.header.Get("Cache-Control") != first.header.Get("Cache-Control") ||
				hit.header.Get("X-Request-Id") == first.header.Get("X-Request-Id") ||
				hit.header.Get("X-Request-Id") != hit.header.Get("X-Llm-Proxy-Request-Id") {
				t.Fatalf("%s from %s: got %d %v\n%q, want\n%q",
					members, from, hit.status, hit.header, hit.body, first.body)
			}
			row := p.lastCall()
			if row.Outcome != "ok" || row.InputTokens+row.OutputTokens != 0 || row.Cost == nil || *row.Cost != 0 ||
				row.Attempts != 0 || row.UsageSource != "none" || row.Model != miss.Model ||
				row.Stream != (members != "") {
				t.Errorf("%s from %s: the row is %+v", members, from, row)
			}
			if v := p.lastRow(); v.cache != "hit" || v.saved == 0 || v.saved != int64(*miss.Cost*1e9+0.5) {
				t.Errorf("%s from %s: the row has cache %q and saved %d; the miss cost %v",
					members, from, v.cache, v.saved, *miss.Cost)
			}
		}
		if n := len(p.provider.received()); n != 1 {
			t.Errorf("%s: the provider got %d calls", members, n)
		}
		p.checkSums()
	}
}

// calls returns how many calls the provider got.
func (p *testProxy) calls() int { return len(p.provider.received()) }

// expectFrom makes a call and expects its answer from the provider or from the cache.
func (p *testProxy) expectFrom(what, from string, call func() testResponse) testResponse {
	p.t.Helper()
	before := p.calls()
	res := call()
	forwarded := p.calls() - before
	hit := strings.HasPrefix(res.header.Get("Cache-Status"), "llm-proxy; hit; ")
	if res.status != 200 || hit != (from == "cache") || forwarded != map[string]int{"cache": 0, "provider": 1}[from] {
		p.t.Errorf("%s: got %d, Cache-Status %q and %d calls to the provider; want an answer from the %s: %s",
			what, res.status, res.header.Get("Cache-Status"), forwarded, from, clip(res.body, 300))
	}
	return res
}

// answerAny answers every endpoint with something complete, and a stream with events.
func answerAny(c *providerConn, r recordedRequest) bool {
	switch {
	case strings.Contains(r.body, `"stream":true`):
		return chatScript(c, r)
	case strings.HasPrefix(r.target, "/v1/messages"):
		return c.reply(200, `{"id":"msg_1","type":"message","role":"assistant","model":"claude-sonnet-4-5","content":`+
			`[{"type":"text","text":"Hi"}],"stop_reason":"end_turn","usage":{"input_tokens":9,"output_tokens":3}}`)
	case strings.HasPrefix(r.target, "/v1/responses"):
		return c.reply(200, `{"id":"resp_1","object":"response","status":"completed","model":"gpt-4o-mini",`+
			`"output":[],`+
			`"usage":{"input_tokens":9,"output_tokens":3,"total_tokens":12}}`)
	}
	return c.reply(200, chatResponseBody)
}

// TestCacheIsolation: a call is answered by the answer to an identical call of the same scope and by no other. Each
// ingredient of the key is changed by itself, and gives an entry of its own.
func TestCacheIsolation(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(answerAny)
	p.enableCache(`"when":"always"`)
	type variant struct{ what, path, body, token, header string }
	base := variant{"base", "/v1/chat/completions", chatBody(`"temperature":0`), p.token, ""}
	send := func(v variant) func() testResponse {
		headers := []string{"Authorization", "Bearer " + v.token, "Content-Type", "application/json"}
		if name, value, ok := strings.Cut(v.header, ": "); ok {
			headers = append(headers, name, value)
		}
		return func() testResponse { return p.do("POST", v.path, v.body, headers...) }
	}
	with := func(what string, change func(*variant)) variant {
		v := base
		v.what = what
		change(&v)
		return v
	}
	variants := []variant{base,
		with("a blank", func(v *variant) { v.body = " " + v.body }),
		with("another order", func(v *variant) {
			v.body = `{"temperature":0,` + strings.TrimSuffix(v.body[1:], `,"temperature":0}`) + "}"
		}),
		with("another number", func(v *variant) { v.body = chatBody(`"temperature":0.0`) }),
		with("another model", func(v *variant) { v.body = strings.Replace(v.body, "gpt-4o-mini", "gpt-4o", 1) }),
		with("a stream", func(v *variant) { v.body = chatBody(`"temperature":0`, `"stream":true`) }),
		with("a stream with usage", func(v *variant) {
			v.body = chatBody(`"temperature":0`, `"stream":true`, `"stream_options":{"include_usage":true}`)
		}),
		// The proxy adds include_usage in this place.
		with("the body that goes up", func(v *variant) {
			v.body = `{"stream_options":{"include_usage":true},` + chatBody(`"temperature":0`, `"stream":true`)[1:]
		}),
		with("another endpoint", func(v *variant) { v.path = "/v1/completions" }),
		with("a query", func(v *variant) { v.path += "?beta=true" }),
		with("another query", func(v *variant) { v.path += "?beta=false" }),
		with("a beta", func(v *variant) { v.header = "OpenAI-Beta: x=1" }),
		with("another beta", func(v *variant) { v.header = "OpenAI-Beta: x=2" }),
		with("a version", func(v *variant) { v.header = "Anthropic-Version: 2023-06-01" }),
		with("another version", func(v *variant) { v.header = "Anthropic-Version: 2023-01-01" }),
		with("Anthropic's beta", func(v *variant) { v.header = "Anthropic-Beta: tools" }),
		with("another type", func(v *variant) { v.header = "Accept: application/json" }),
		with("a verified stream", func(v *variant) {
			v.body, v.header = chatBody(`"temperature":0`, `"stream":true`), "X-LLM-Proxy-Stream: verified"
		}),
	}
	for _, v := range variants {
		p.expectFrom(v.what, "provider", send(v))
	}
	for _, v := range variants {
		p.expectFrom(v.what+" again", "cache", send(v))
	}
	for _, header := range []string{"User-Agent: x", "X-Stainless-Retry-Count: 1", "X-Client-Request-Id: 1",
		"Idempotency-Key: 1", "OpenAI-Organization: o", "X-Other: 1"} {
		v := base
		v.header = header
		p.expectFrom(header, "cache", send(v))
	}

	_, second := p.newToken(`"name":"second"`)
	v := with("another token of the project", func(v *variant) { v.token = second })
	p.expectFrom(v.what, "cache", send(v))

	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"other","openai_api_key":"`+p.provider.key+`"}`, 201, &other)
	first := p.project
	p.project = other.ID
	p.enableCache(`"when":"always"`) // the version of its settings is the same now
	_, foreign := p.newToken(`"name":"foreign"`)
	p.project = first
	v = with("another project with the same key and settings", func(v *variant) { v.token = foreign })
	p.expectFrom(v.what, "provider", send(v))
	p.expectFrom(v.what+" again", "cache", send(v))

	upstream := "/manage/projects/" + p.project + "/upstreams/" + p.upstream
	for _, c := range []struct{ what, path, body string }{
		{"a changed policy", "/manage/projects/" + p.project,
			`{"policy":{"cache":{"ttl_seconds":3600,"when":"always"},` +
				`"limits":[{"count":"requests","max":1000,"per":"day"}]}}`},
		{"an alias", upstream, `{"rewrite":{"gpt-4o-mini":"mine"}}`},
		{"another alias", upstream, `{"rewrite":{"gpt-4o-mini":"yours"}}`},
		{"another base URL", upstream, `{"base_url":"` + p.provider.url + `/v1/x","api_key":"` + p.provider.key + `"}`},
		{"an organization", upstream, `{"organization":"org-1"}`},
		{"token scope", "/manage/projects/" + p.project, `{"policy":{"cache":{"ttl_seconds":3600,"scope":"token"}}}`},
	} {
		p.manage("PATCH", c.path, c.body, 200, nil)
		p.expectFrom(c.what, "provider", send(base))
		p.expectFrom(c.what+" again", "cache", send(base))
	}
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"compatible","provider":"compatible",`+
		`"base_url":"`+p.provider.url+`/v1/x","api_key":"`+p.provider.key+`","organization":"org-1",`+
		`"rewrite":{"gpt-4o-mini":"yours"}}`, 201, nil)
	p.manage("PATCH", upstream, `{"is_active":false}`, 200, nil)
	p.expectFrom("another provider", "provider", send(base))
	p.expectFrom("another provider again", "cache", send(base))
	v = with("another token", func(v *variant) { v.token = second })
	p.expectFrom("with token scope, "+v.what, "provider", send(v))
	p.expectFrom("with token scope, "+v.what+" again", "cache", send(v))
	p.expectFrom("with token scope, the first", "cache", send(base))
}

// TestCacheKeyUnambiguous: no other parts give the same key.
func TestCacheKeyUnambiguous(t *testing.T) {
	t.Parallel()
	salt, seen := make([]byte, 32), map[cacheKey]string{}
	for _, c := range []struct {
		parts []string
		body  string
	}{
		{nil, ""}, {[]string{""}, ""}, {[]string{"", ""}, ""}, {[]string{"ab", "c"}, ""}, {[]string{"a", "bc"}, ""},
		{[]string{"abc"}, ""}, {[]string{"ab"}, "c"}, {nil, "abc"}, {[]string{"a", "b", "c"}, ""},
		{[]string{"a\x00\x00\x00\x00\x00\x00\x00\x01b"}, ""}, {[]string{"a", "b"}, ""},
		{[]string{"a\x01b"}, ""}, {[]string{"a"}, "\x01b"}, {[]string{strings.Repeat("a", 300)}, ""},
	} {
		key := newCacheKey(salt, c.parts, []byte(c.body))
		if other, exists := seen[key]; exists {
			t.Errorf("%q has the key of %s", c, other)
		}
		seen[key] = fmt.Sprintf("%q", c)
	}
	salt[0] = 1
	if other, exists := seen[newCacheKey(salt, nil, nil)]; exists {
		t.Errorf("another salt gives the key of %s", other)
	}
}

// TestCacheKeyParts: each property of a call that its answer depends on changes the key, by itself.
func TestCacheKeyParts(t *testing.T) {
	t.Parallel()
	header := http.Header{"Accept": {"a"}, "Content-Type": {"application/json"}, "Connection": {"keep-alive"}}
	key := func(change func(*call, *upstream, http.Header)) cacheKey {
		u := &upstream{provider: "openai", scheme: "https", host: "h", basePath: "/v1", organization: "o",
			openaiProject: "p", rewrite: map[string]string{"m": "n"}}
		c := &call{project: &projectState{id: "proj_1", version: 3, policy: policy{Cache: &cachePolicy{}}},
			tokenState: &tokenState{id: "tok_1"}, upstream: u}
		c.endpoint, c.fields.model, c.query, c.body = &endpoint{label: "POST /v1/x"}, "m", "q=1", []byte("{}")
		h := header.Clone()
		change(c, u, h)
		return newCacheKey([]byte("salt"), c.appendCacheKeyParts(nil, h), c.body)
	}
	base := key(func(*call, *upstream, http.Header) {})
	seen := map[cacheKey]string{base: "the base"}
	for what, change := range map[string]func(*call, *upstream, http.Header){
		"project":        func(c *call, _ *upstream, _ http.Header) { c.project.id = "proj_2" },
		"version":        func(c *call, _ *upstream, _ http.Header) { c.project.version++ },
		"scope":          func(c *call, _ *upstream, _ http.Header) { c.project.policy.Cache.Scope = "token" },
		"endpoint":       func(c *call, _ *upstream, _ http.Header) { c.endpoint = &endpoint{label: "POST /v1/y"} },
		"query":          func(c *call, _ *upstream, _ http.Header) { c.query = "q=2" },
		"body":           func(c *call, _ *upstream, _ http.Header) { c.body = []byte("{ }") },
		"usage added":    func(c *call, _ *upstream, _ http.Header) { c.usageAdded = true },
		"verified":       func(c *call, _ *upstream, _ http.Header) { c.bufferStream = true },
		"provider":       func(_ *call, u *upstream, _ http.Header) { u.provider = "compatible" },
		"scheme":         func(_ *call, u *upstream, _ http.Header) { u.scheme = "http" },
		"host":           func(_ *call, u *upstream, _ http.Header) { u.host = "i" },
		"path":           func(_ *call, u *upstream, _ http.Header) { u.basePath = "/v2" },
		"organization":   func(_ *call, u *upstream, _ http.Header) { u.organization = "" },
		"openai project": func(_ *call, u *upstream, _ http.Header) { u.openaiProject = "" },
		"alias":          func(_ *call, u *upstream, _ http.Header) { u.rewrite = nil },
		"accept":         func(_ *call, _ *upstream, h http.Header) { h["Accept"] = []string{"b"} },
		"two accepts":    func(_ *call, _ *upstream, h http.Header) { h["Accept"] = []string{"a", "a"} },
		"no accept":      func(_ *call, _ *upstream, h http.Header) { delete(h, "Accept") },
		"type":           func(_ *call, _ *upstream, h http.Header) { h["Content-Type"] = []string{"a"} },
		"connection":     func(_ *call, _ *upstream, h http.Header) { h["Connection"] = []string{"openai-beta"} },
		"beta":           func(_ *call, _ *upstream, h http.Header) { h["Openai-Beta"] = []string{"a"} },
		"anthropic":      func(_ *call, _ *upstream, h http.Header) { h["Anthropic-Beta"] = []string{"a"} },
		"anthropic's version": func(_ *call, _ *upstream, h http.Header) {
			h["Anthropic-Version"] = []string{"a"}
		},
	} {
		k := key(change)
		if other, exists := seen[k]; exists {
			t.Errorf("another %s has the key of %s", what, other)
		}
		seen[k] = what
	}
	if again := key(func(*call, *upstream, http.Header) {}); again != base {
		t.Error("the same call has another key")
	}
}

// TestCacheBypass: which calls the cache covers, and why not.
func TestCacheBypass(t *testing.T) {
	t.Parallel()
	const deterministic, always = `"when":"deterministic"`, `"when":"always"`
	p := newTest(t, nil)
	p.provider.setScript(answerAny)
	policy := ""
	for _, c := range []struct{ policy, path, members, reason string }{
		{deterministic, "/v1/chat/completions", `"temperature":0`, ""},
		{deterministic, "/v1/chat/completions", `"temperature":0e3`, ""},
		{deterministic, "/v1/chat/completions", `"temperature":-0.0`, ""},
		{deterministic, "/v1/chat/completions", `"seed":7`, ""},
		{deterministic, "/v1/chat/completions", `"seed":7,"temperature":0.9`, ""},
		{deterministic, "/v1/chat/completions", `"store":false,"seed":7`, ""},
		{deterministic, "/v1/chat/completions", `"seed":7,"tools":[{"type":"function","function":{"name":"f"}}]`, ""},
		{deterministic, "/v1/chat/completions", `"seed":7,"tools":[{"type":"custom"}],"mcp_servers":[]`, ""},
		{deterministic, "/v1/embeddings", `"input":"x"`, ""},
		{deterministic, "/v1/moderations", `"input":"x"`, ""},
		{deterministic, "/v1/responses", `"store":false,"temperature":0`, ""},
		{deterministic, "/v1/messages/count_tokens", `"temperature":0`, ""},
		{deterministic, "/v1/chat/completions", `"user":"x"`, "not-deterministic"},
		{deterministic, "/v1/chat/completions", `"temperature":0.1`, "not-deterministic"},
		{deterministic, "/v1/chat/completions", `"temperature":null,"seed":null`, "not-deterministic"},
		{deterministic, "/v1/chat/completions", `"temperature":"0"`, "not-deterministic"},
		{deterministic, "/v1/chat/completions", `"Temperature":0`, "not-deterministic"},
		{deterministic, "/v1/chat/completions", `"temperature":0,"temperature":1`, "not-deterministic"},
		{deterministic, "/v1/chat/completions", `"temperature":1,"temperature":0`, "not-deterministic"},
		{deterministic, "/v1/chat/completions", `"metadata":{"temperature":0,"seed":1}`, "not-deterministic"},
		{always, "/v1/chat/completions", `"user":"x"`, ""},
		{always, "/v1/chat/completions", `"metadata":{"store":true}`, ""},
		{always, "/v1/completions", `"prompt":"x"`, ""},
		{always, "/v1/chat/completions", `"store":true`, "stateful"},
		{always, "/v1/chat/completions", `"CONTAINER":"cntr_1"`, "stateful"},
		{always, "/v1/chat/completions", `"st\u006fre":true`, "stateful"},
		{always, "/v1/chat/completions", `"container":"cntr_1"`, "stateful"},
		{always, "/v1/responses", `"user":"x"`, "stateful"},
		{always, "/v1/responses", `"store":null`, "stateful"},
		{always, "/v1/responses", `"store":false,"previous_response_id":"resp_1"`, "stateful"},
		{always, "/v1/responses", `"store":false,"conversation":"conv_1"`, "stateful"},
		{always, "/v1/responses", `"store":false,"background":true`, "stateful"},
		{always, "/v1/responses", `"store":false,"prompt":{"id":"pmpt_1"}`, "stateful"},
		{always, "/v1/responses", `"store":false,"user":"x"`, ""},
		{always, "/v1/responses", `"store":false,"tools":[{"type":"web_search"}]`, "tools"},
		{always, "/v1/responses", `"store":false,"tools":[{"type":"function"},{"type":"mcp"}]`, "tools"},
		{always, "/v1/responses", `"store":false,"tools":[{"type":"function","type":"file_search"}]`, "tools"},
		{always, "/v1/responses", `"store":false,"tools":[{"Type":"code_interpreter"}]`, "tools"},
		{always, "/v1/responses", `"store":false,"tools":[{"ty\u0070e":"image_generation"}]`, "tools"},
		{always, "/v1/responses", `"store":false,"tools":["web_search"]`, "tools"},
		{always, "/v1/responses", `"store":false,"tools":{"type":"function"}`, "tools"},
		{always, "/v1/chat/completions", `"web_search_options":{}`, "tools"},
		{always, "/v1/chat/completions", `"tools":[],"mcp_servers":[{"url":"https://x"}]`, "tools"},
		{always, "/v1/chat/completions", `"plugins":[{"id":"web"}]`, "tools"},
		{always, "/v1/chat/completions", `"data_sources":[{}]`, "tools"},
		{always, "/v1/images/generations", `"prompt":"x"`, "endpoint"},
		{always, "/v1/responses/compact", `"store":false`, "endpoint"},
		{always + `,"endpoints":["/v1/embeddings"]`, "/v1/chat/completions", `"seed":1`, "endpoint"},
		{always + `,"endpoints":["POST /v1/emb*"]`, "/v1/embeddings", `"input":"y"`, ""},
		{always + `,"endpoints":[]`, "/v1/embeddings", `"input":"y"`, "endpoint"},
	} {
		if c.policy != policy {
			policy = c.policy
			p.manage("PATCH", "/manage/projects/"+p.project,
				`{"policy":{"stateful":true,"cache":{"ttl_seconds":60,`+policy+`}}}`, 200, nil)
		}
		send := func() testResponse {
			return p.do("POST", c.path, chatBody(c.members), "Authorization", "Bearer "+p.token,
				"Content-Type", "application/json")
		}
		if strings.HasPrefix(c.path, "/v1/messages") {
			continue // of another provider: see TestCachePolicy
		}
		first := p.expectFrom(c.members, "provider", send)
		if c.reason == "" {
			if got := first.header.Get("Cache-Status"); got != "llm-proxy; fwd=miss; stored" {
				t.Errorf("%s %s: Cache-Status is %q", c.path, c.members, got)
			}
			p.expectFrom(c.members, "cache", send)
			continue
		}
		if got := first.header.Get("Cache-Status"); got != "llm-proxy; fwd=bypass; detail="+c.reason {
			t.Errorf("%s %s: Cache-Status is %q, want the reason %s", c.path, c.members, got, c.reason)
		}
		p.expectFrom(c.members, "provider", send)
	}
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{}}`, 200, nil)
	for range 2 {
		res := p.expectFrom("without a cache", "provider", func() testResponse {
			return p.cachedChat(p.token, "", "Cache-Control", "only-if-cached")
		})
		if res.header["Cache-Status"] != nil || res.header["Age"] != nil {
			t.Errorf("without a cache: got %v", res.header)
		}
	}
}

// TestCacheNever: only complete answers without an error are stored.
func TestCacheNever(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache(`"max_entry_bytes":2000`)
	events := chatEvents(true)
	stream := func(events ...string) func(*providerConn) bool {
		return func(c *providerConn) bool {
			c.beginSSE()
			for _, e := range events {
				_ = c.chunk(e)
			}
			return c.chunk("") == nil
		}
	}
	answer := func(status int, body string, headers ...string) func(*providerConn) bool {
		return func(c *providerConn) bool { return c.reply(status, body, headers...) }
	}
	large := strings.Replace(chatResponseBody, `"Hi"`, `"`+strings.Repeat("x", 2000)+`"`, 1)
	raw := func(head, body string) func(*providerConn) bool {
		return func(c *providerConn) bool {
			if !strings.Contains(head, "X-No-Type") {
				head += "Content-Type: application/json\r\n"
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nConnection: close\r\n"+head+"\r\n"+body)
			return false
		}
	}
	chunked := fmt.Sprintf("%x\r\n%s\r\n0\r\n", len(chatResponseBody), chatResponseBody)
	for _, c := range []struct {
		what, status, members string
		script                func(*providerConn) bool
		stored                bool
	}{
		{"a complete answer", "fwd=miss; stored", "", answer(200, chatResponseBody), true},
		{"a complete stream", "fwd=miss; stored", `"stream":true`, stream(events...), true},
		{"without a type", "fwd=miss; stored", "", raw(
			fmt.Sprintf("X-No-Type: 1\r\nContent-Length: %d\r\n", len(chatResponseBody)), chatResponseBody), true},
		{"no-cache, as streams have", "fwd=miss; stored", "",
			answer(200, chatResponseBody, "Cache-Control: no-cache"), true},
		{"an error", "fwd=miss", "", answer(400, `{"error":{"message":"no"}}`), false},
		{"a server error", "fwd=miss", "", answer(500, `{"error":{"message":"no"}}`), false},
		{"another success", "fwd=miss", "", answer(202, chatResponseBody), false},
		{"no-store", "fwd=miss", "", answer(200, chatResponseBody, "Cache-Control: max-age=9, NO-STORE"), false},
		{"private", "fwd=miss", "", answer(200, chatResponseBody, `Cache-Control: private="x"`), false},
		{"varies", "fwd=miss", "", answer(200, chatResponseBody, "Vary: *"), false},
		{"encoded", "fwd=miss", "", answer(200, chatResponseBody, "Content-Encoding: gzip"), false},
		{"too long", "fwd=miss", "", answer(200, large), false},
		{"too long, without a length", "fwd=miss; stored", "",
			raw("Transfer-Encoding: chunked\r\n", fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(large), large)), false},
		{"a trailer", "fwd=miss", "",
			raw("Trailer: X\r\nTransfer-Encoding: chunked\r\n", chunked+"X: 1\r\n\r\n"), false},
		{"a trailer that was not announced", "fwd=miss; stored", "",
			raw("Transfer-Encoding: chunked\r\n", chunked+"X: 1\r\n\r\n"), false},
		{"an error with status 200", "fwd=miss; stored", "", answer(200, `{"error":{"message":"no"}}`), false},
		{"JSON without its end", "fwd=miss; stored", "", answer(200, chatResponseBody[:40]), false},
		{"not JSON", "fwd=miss; stored", "", answer(200, "hello"), false},
		{"empty", "fwd=miss; stored", "", answer(200, ""), false},
		{"two documents", "fwd=miss; stored", "", answer(200, chatResponseBody+chatResponseBody), false},
		{"a stream without its end", "fwd=miss; stored", `"stream":true`, stream(events[:3]...), false},
		{"a stream with an error", "fwd=miss; stored", `"stream":true`,
			stream(events[0], "data: {\"error\":{\"message\":\"no\"}}\n\n", "data: [DONE]\n\n"), false},
		{"the provider's key", "fwd=miss; stored", "",
			answer(200, strings.Replace(chatResponseBody, `"Hi"`, `"`+p.provider.key+`"`, 1)), false},
		{"cut", "fwd=miss; stored", "", raw("Content-Length: 1000\r\n", chatResponseBody), false},
	} {
		p.allowErrors = true // a masked key is one
		p.provider.setScript(func(pc *providerConn, _ recordedRequest) bool { return c.script(pc) })
		members := `"user":"` + c.what + `"`
		if c.members != "" {
			members += "," + c.members
		}
		before := p.calls()
		first := p.cachedChat(p.token, members)
		if got := first.header.Get("Cache-Status"); got != "llm-proxy; "+c.status {
			t.Errorf("%s: Cache-Status is %q", c.what, got)
		}
		second := p.cachedChat(p.token, members)
		if c.stored && (second.body != first.body || !slices.Equal(second.header["Content-Type"],
			first.header["Content-Type"])) {
			t.Errorf("%s: got %v %q, then %v %q", c.what, first.header, first.body, second.header, second.body)
		}
		if stored := p.calls()-before == 1; stored != c.stored {
			t.Errorf("%s: stored is %v, %d %q, then %d %q",
				c.what, stored, first.status, first.body, second.status, second.body)
		}
	}
}

// TestCacheDirectives: what a client says with Cache-Control (RFC 9111, 5.2.1), for an entry of a known age.
func TestCacheDirectives(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	const miss, request = "llm-proxy; fwd=miss; stored", "llm-proxy; fwd=request; stored"
	for i, c := range []struct{ header, fresh, stale, empty string }{ // Cache-Status with an entry, one of 100 s, none
		{"", "hit", "hit", miss},
		{"max-age=101", "hit", "hit", miss},
		{"max-age=99", "hit", request, miss},
		{"Max-Age=\"99\"", "hit", request, miss},
		{"max-age=x", request, request, miss},
		{"max-age=-1", request, request, miss},
		{"max-age=99999999999999999999", "hit", "hit", miss},
		{"max-age=500, max-age=50", "hit", request, miss},
		{"min-fresh=3000", "hit", "hit", miss},
		{"min-fresh=3550", "hit", request, miss},
		{"min-fresh=x", request, request, miss},
		{"max-stale=60", "hit", "hit", miss},
		{"x=\"no-store, no-cache\"", "hit", "hit", miss},
		{"no-cache", request, request, miss},
		{"NO-CACHE,", request, request, miss},
		{"no-transform,no-cache", request, request, miss},
		{"no-store", "bypass", "bypass", "bypass"},
		{"only-if-cached", "hit", "hit", "504"},
		{"only-if-cached, max-age=99", "hit", "504", "504"},
		{"only-if-cached, no-cache", "504", "504", "504"},
		{"only-if-cached, no-store", "504", "504", "504"},
		{"pragma", request, request, miss},
	} {
		members := fmt.Sprintf(`"user":"%d"`, i)
		send := func() testResponse {
			switch c.header {
			case "":
				return p.cachedChat(p.token, members)
			case "pragma":
				return p.cachedChat(p.token, members, "Pragma", "no-cache")
			}
			return p.cachedChat(p.token, members, "Cache-Control", c.header)
		}
		expect := func(state, want string) {
			t.Helper()
			res := send()
			got := res.header.Get("Cache-Status")
			switch want {
			case "hit":
				if !strings.HasPrefix(got, "llm-proxy; hit; ") || res.status != 200 {
					t.Errorf("%q with %s entry: got %d %q", c.header, state, res.status, got)
				}
			case "504":
				if res.status != 504 || res.errorCode() != "not_cached" || res.header.Get("X-Should-Retry") != "false" {
					t.Errorf("%q with %s entry: got %d %s", c.header, state, res.status, res.body)
				}
			case "bypass":
				want = "llm-proxy; fwd=bypass; detail=no-store"
				fallthrough
			default:
				if got != want {
					t.Errorf("%q with %s entry: got %q, want %q", c.header, state, got, want)
				}
			}
		}
		expect("no", c.empty)
		p.cachedChat(p.token, members) // there is an entry now
		expect("a new", c.fresh)
		p.ageEntries(100 * time.Second)
		expect("an older", c.stale)
		p.purgeCache(cacheFilter{})
	}
	row := p.lastCall()
	if res := p.cachedChat(p.token, "", "Cache-Control", "only-if-cached"); res.status != 504 {
		t.Errorf("got %d", res.status)
	}
	if row = p.lastCall(); row.Outcome != "refused" || row.ErrorCode != "not_cached" || row.Status != 504 {
		t.Errorf("the row is %+v", row)
	}
}

// ageEntries makes everything in memory older. What is on disk is deleted.
func (p *testProxy) ageEntries(by time.Duration) {
	p.t.Helper()
	p.cacheSettled()
	p.execSQL(`DELETE FROM cache`)
	c := p.instance.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.allInMemory() {
		e.StoredAt -= by.Milliseconds()
		e.ExpiresAt -= by.Milliseconds()
	}
}

// purgeCache purges what f describes of the test's project.
func (p *testProxy) purgeCache(f cacheFilter) int64 {
	p.t.Helper()
	row, err := p.instance.store.projectByID(context.Background(), p.project)
	if err != nil {
		p.t.Fatal(err)
	}
	f.project = row.seq
	n, err := p.instance.cache.purge(context.Background(), f)
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}

// TestCacheExpires: an entry is used until its time is over, in memory and on disk, and then deleted.
func TestCacheExpires(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	first := p.expectFrom("the first", "provider", func() testResponse { return p.cachedChat(p.token, "") })
	hit := p.expectFrom("the second", "cache", func() testResponse { return p.cachedChat(p.token, "") })
	if hit.header.Get("Age") != "0" || hit.body != first.body {
		t.Errorf("got %v", hit.header)
	}
	p.ageEntries(3500 * time.Second)
	hit = p.expectFrom("after a while", "cache", func() testResponse { return p.cachedChat(p.token, "") })
	if age, status := hit.header.Get("Age"), hit.header.Get("Cache-Status"); age != "3500" && age != "3501" ||
		!strings.HasPrefix(status, "llm-proxy; hit; ttl=99;") && !strings.HasPrefix(status, "llm-proxy; hit; ttl=98;") {
		t.Errorf("got Age %q, Cache-Status %q", age, status)
	}
	p.ageEntries(200 * time.Second)
	p.expectFrom("after its time", "provider", func() testResponse { return p.cachedChat(p.token, "") })
	p.cacheSettled()
	now := time.Now().UnixMilli()
	p.instance.cache.sweep(context.Background(), now)
	if n := p.cachedRows(); n != 1 {
		t.Errorf("%d entries are on disk", n)
	}
	p.instance.cache.sweep(context.Background(), now+3_700_000)
	if n := p.cachedRows(); n != 0 {
		t.Errorf("%d entries are on disk after their time", n)
	}
}

// cachedRows returns how many entries are on disk.
func (p *testProxy) cachedRows() int64 {
	p.t.Helper()
	n, _, err := p.instance.store.cacheSize(context.Background(), 0)
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}

// manyChats makes n identical calls at the same time, the first one with ctx, once the provider has it.
func (p *testProxy) manyChats(ctx context.Context, n int, token, members string) (statuses []int, wait func()) {
	statuses = make([]int, n)
	var calls sync.WaitGroup
	before := p.calls()
	calls.Go(func() { _, statuses[0] = p.sendChat(ctx, token, members) })
	waitFor(p.t, "the first call", func() bool { return p.calls() > before })
	for i := 1; i < n; i++ {
		calls.Go(func() { _, statuses[i] = p.sendChat(context.Background(), token, members) })
	}
	return statuses, calls.Wait
}

// waiting returns how many calls wait for a flight.
func (p *testProxy) waiting() int { return int(p.instance.cache.waiting.Load()) }

// TestCacheOneFlight: a hundred identical calls at one time make one call to the provider, unary or streamed, also
// if the first client leaves. Then the first call goes on for the others, and is paid for.
func TestCacheOneFlight(t *testing.T) {
	t.Parallel()
	for _, members := range []string{`"temperature":0`, `"temperature":0,"stream":true`} {
		for _, leaves := range []string{"", "before the answer", "in the answer"} {
			p := newTest(t, nil)
			p.enableCache()
			release, begun := make(chan struct{}), make(chan struct{})
			p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
				if leaves == "in the answer" {
					c.beginSSE()
					_ = c.chunk(chatEvents(true)[0])
					close(begun)
					<-release
					for range 200 { // a client that has left takes none of them
						_ = c.chunk(": " + strings.Repeat("x", 1000) + "\n\n")
					}
					for _, e := range chatEvents(true)[1:] {
						_ = c.chunk(e)
					}
					return c.chunk("") == nil
				}
				<-release
				return chatScript(c, r)
			})
			if leaves == "in the answer" && !strings.Contains(members, "stream") {
				continue
			}
			ctx, leave := context.WithCancel(context.Background())
			statuses, wait := p.manyChats(ctx, 100, p.token, members)
			waitFor(t, "the others to wait", func() bool { return p.waiting() == 99 })
			if leaves == "in the answer" {
				<-begun
			}
			if leaves != "" {
				leave()
				waitFor(t, "the first client to leave", func() bool {
					fs := &p.instance.proxy.flights
					fs.mu.Lock()
					defer fs.mu.Unlock()
					for _, f := range fs.byKey {
						return f.abandon != nil
					}
					return false
				})
			}
			close(release)
			wait()
			leave()
			what := members + ", the first client leaves " + leaves
			if n := p.calls(); n != 1 {
				t.Errorf("%s: the provider got %d calls", what, n)
			}
			for i, status := range statuses[1:] {
				if status != 200 {
					t.Errorf("%s: call %d got %d", what, i, status)
				}
			}
			hits := 0
			for _, v := range p.settledRequests() {
				if v.cache == "hit" {
					hits++
					continue
				}
				if v.source != usageExact || v.counts.output != 3 || deref(v.nullCost) == 0 {
					t.Errorf("%s: the call to the provider has the row %+v", what, v.requestRow)
				}
			}
			if hits != 99 || p.instance.cache.collapsed.Load() != 99 {
				t.Errorf("%s: %d hits, %d collapsed", what, hits, p.instance.cache.collapsed.Load())
			}
			c := p.instance.cache
			c.mu.Lock()
			if c.countWaiting(writeOnce) != 0 {
				t.Errorf("%s: the answer counts as one that was asked for once", what)
			}
			c.mu.Unlock()
			p.expectFrom(what+", afterwards", "cache", func() testResponse {
				return p.do("POST", "/v1/chat/completions", chatBody(members), "Authorization", "Bearer "+p.token,
					"Content-Type", "application/json")
			})
			p.checkSums()
		}
	}
}

func (p *testProxy) settledRequests() []requestView {
	p.t.Helper()
	p.waitSettled()
	return p.allRequests()
}

// TestCacheFlightFails: if the call to the provider fails or is ended, those who wait go to the provider themselves;
// if all leave, it ends.
func TestCacheFlightFails(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what  string
		first func(*testProxy, *providerConn, recordedRequest) bool
	}{
		{"an error", func(_ *testProxy, pc *providerConn, _ recordedRequest) bool {
			return pc.reply(400, `{"error":{"message":"no"}}`)
		}},
		{"a broken connection", func(_ *testProxy, pc *providerConn, _ recordedRequest) bool { return false }},
		{"no-store", func(_ *testProxy, pc *providerConn, r recordedRequest) bool {
			return pc.reply(200, chatResponseBody, "Cache-Control: no-store")
		}},
		{"an error in the answer", func(_ *testProxy, pc *providerConn, r recordedRequest) bool {
			return pc.reply(200, `{"error":{"message":"no"}}`)
		}},
		{"an administrator", func(p *testProxy, pc *providerConn, r recordedRequest) bool {
			var list struct{ Data []struct{ ID string } }
			p.manage("GET", "/manage/streams", "", 200, &list)
			slices.SortFunc(list.Data, func(a, b struct{ ID string }) int { return strings.Compare(a.ID, b.ID) })
			p.manage("DELETE", "/manage/streams/"+list.Data[0].ID, "", 200, nil)
			return pc.waitClosed(hangTimeout) && false
		}},
	} {
		p := newTest(t, nil)
		p.enableCache()
		var mu sync.Mutex
		first, release := true, make(chan struct{})
		p.provider.setScript(func(pc *providerConn, r recordedRequest) bool {
			mu.Lock()
			isFirst := first
			first = false
			mu.Unlock()
			if isFirst {
				<-release
				return c.first(p, pc, r)
			}
			return chatScript(pc, r)
		})
		statuses, wait := p.manyChats(context.Background(), 5, p.token, `"temperature":0`)
		waitFor(t, "the others to wait", func() bool { return p.waiting() == 4 })
		close(release)
		wait()
		if n := p.calls(); n != 5 {
			t.Errorf("%s: the provider got %d calls", c.what, n)
		}
		for i, status := range statuses[1:] {
			if status != 200 {
				t.Errorf("%s: call %d got %d", c.what, i, status)
			}
		}
	}

	p := newTest(t, nil)
	p.enableCache()
	ended := make(chan bool, 1)
	p.provider.setScript(func(pc *providerConn, r recordedRequest) bool {
		ended <- pc.waitClosed(hangTimeout)
		return false
	})
	ctx, leave := context.WithCancel(context.Background())
	var calls sync.WaitGroup
	calls.Go(func() { p.sendChat(ctx, p.token, `"temperature":0`) })
	waitFor(t, "the first call", func() bool { return p.calls() == 1 })
	second, leaveSecond := context.WithCancel(context.Background())
	calls.Go(func() { p.sendChat(second, p.token, `"temperature":0`) })
	waitFor(t, "the second call", func() bool { return p.waiting() == 1 })
	leave()
	leaveSecond()
	calls.Wait()
	if !<-ended {
		t.Error("the call to the provider goes on although nobody waits for it")
	}
	for _, row := range p.ledger() {
		if row.Outcome != "client_gone" {
			t.Errorf("the row is %+v", row)
		}
	}
}

// TestCacheFlightRevoked: revocation ends the call to the provider and the call that waits, each by its own token.
func TestCacheFlightRevoked(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	secondID, second := p.newToken(`"name":"second"`)
	release := make(chan struct{})
	p.provider.setScript(func(pc *providerConn, r recordedRequest) bool { <-release; return chatScript(pc, r) })
	var calls sync.WaitGroup
	var first, revoked int
	calls.Go(func() { _, first = p.sendChat(context.Background(), p.token, `"temperature":0`) })
	waitFor(t, "the first call", func() bool { return p.calls() == 1 })
	calls.Go(func() { _, revoked = p.sendChat(context.Background(), second, `"temperature":0`) })
	waitFor(t, "the second call", func() bool { return p.waiting() == 1 })
	p.manage("DELETE", "/manage/tokens/"+secondID, "", 200, nil)
	waitFor(t, "the second call to end", func() bool { return p.waiting() == 0 })
	close(release)
	calls.Wait()
	if first != 200 || revoked != 401 {
		t.Errorf("the first call got %d, the revoked one %d", first, revoked)
	}
}

// TestCachePolicy: a policy is read strictly, comes back as it was sent, and belongs to projects only.
func TestCachePolicy(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	const path = "policy.cache"
	for _, c := range []struct{ cache, param string }{
		{`{}`, path + ".ttl_seconds"},
		{`{"ttl_seconds":0}`, path + ".ttl_seconds"},
		{`{"ttl_seconds":-1}`, path + ".ttl_seconds"},
		{`{"ttl_seconds":2592001}`, path + ".ttl_seconds"},
		{`{"ttl_seconds":1.5}`, path + ".ttl_seconds"},
		{`{"ttl_seconds":"60"}`, path + ".ttl_seconds"},
		{`{"ttl_seconds":null}`, path + ".ttl_seconds"},
		{`{"ttl_seconds":60,"ttl_seconds":60}`, path + ".ttl_seconds"},
		{`{"TTL_seconds":60}`, path + ".TTL_seconds"},
		{`{"ttl_seconds":60,"ttl":60}`, path + ".ttl"},
		{`{"ttl_seconds":60,"scope":"all"}`, path + ".scope"},
		{`{"ttl_seconds":60,"scope":""}`, path + ".scope"},
		{`{"ttl_seconds":60,"when":"never"}`, path + ".when"},
		{`{"ttl_seconds":60,"endpoints":"/v1/embeddings"}`, path + ".endpoints"},
		{`{"ttl_seconds":60,"endpoints":["/v1/files"]}`, path + ".endpoints"},
		{`{"ttl_seconds":60,"endpoints":["GET /v1/chat/completions"]}`, path + ".endpoints"},
		{`{"ttl_seconds":60,"endpoints":[""]}`, path + ".endpoints"},
		{`{"ttl_seconds":60,"max_entry_bytes":1023}`, path + ".max_entry_bytes"},
		{`{"ttl_seconds":60,"max_entry_bytes":0}`, path + ".max_entry_bytes"},
		{`{"ttl_seconds":60,"max_entry_bytes":16777217}`, path + ".max_entry_bytes"},
		{`[]`, path}, {`60`, path}, {`true`, path}, {`null`, path},
	} {
		body := `{"policy":{"cache":` + c.cache + `}}`
		res := p.manageAs(p.adminKey, "PATCH", "/manage/projects/"+p.project, body)
		expectParamError(t, c.cache, res, 400, c.param)
	}
	for _, cache := range []string{
		`{"ttl_seconds":1}`,
		`{"ttl_seconds":2592000,"scope":"project","when":"deterministic"}`,
		`{"ttl_seconds":60,"scope":"token","endpoints":["/v1/embeddings","POST /v1/chat/*"],"when":"always",` +
			`"max_entry_bytes":1024}`,
		`{"ttl_seconds":60,"endpoints":[]}`,
	} {
		var got struct {
			Policy struct{ Cache json.RawMessage }
		}
		p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"cache":`+cache+`}}`, 200, &got)
		if string(got.Policy.Cache) != cache {
			t.Errorf("%s: got %s", cache, got.Policy.Cache)
		}
	}
	expectParamError(t, "a token", p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+p.tokenID,
		`{"policy":{"cache":{"ttl_seconds":60}}}`), 400, "policy.cache")
}

// TestCacheAnthropic: Anthropic's API is cached, streams included. Its tools without a type are the client's.
func TestCacheAnthropic(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project,
		`{"policy":{"stateful":true,"cache":{"ttl_seconds":60}}}`, 200, nil)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if !strings.Contains(r.body, `"stream":true`) {
			return answerAny(c, r)
		}
		c.beginSSE("Request-Id: req_1", "Anthropic-Ratelimit-Requests-Remaining: 5")
		for _, e := range []string{
			`{"type":"message_start","message":{"model":"claude-sonnet-4-5","usage":{"input_tokens":9,` +
				`"output_tokens":1}}}`,
			`{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}`,
			`{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":3}}`,
			`{"type":"message_stop"}`,
		} {
			_ = c.chunk("event: " + between(e, `"type":"`, `"`) + "\ndata: " + e + "\n\n")
		}
		return c.chunk("") == nil
	})
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"a","provider":"anthropic","base_url":"`+
		p.provider.url+`","api_key":"`+p.provider.key+`"}`, 201, nil)
	for _, c := range []struct{ path, members, detail string }{
		{"/v1/messages", `"temperature":0`, ""},
		{"/v1/messages", `"temperature":0,"stream":true`, ""},
		{"/v1/messages", `"temperature":0,"tools":[{"name":"f","input_schema":{"type":"object"}}]`, ""},
		{"/v1/messages/count_tokens", `"temperature":0`, ""},
		{"/v1/messages", `"temperature":1`, "not-deterministic"},
		{"/v1/messages", `"temperature":0,"tools":[{"type":"web_search_20250305","name":"web_search"}]`, "tools"},
		{"/v1/messages", `"temperature":0,"mcp_servers":[{"type":"url"}]`, "tools"},
		{"/v1/messages", `"temperature":0,"container":"c"`, "stateful"},
	} {
		body := strings.Replace(chatBody(`"max_tokens":9`, c.members), "gpt-4o-mini", "claude-sonnet-4-5", 1)
		send := func() testResponse {
			return p.do("POST", c.path, body, "X-Api-Key", p.token, "Content-Type", "application/json",
				"Anthropic-Version", "2023-06-01")
		}
		first := p.expectFrom(c.members, "provider", send)
		if c.detail != "" {
			if got := first.header.Get("Cache-Status"); got != "llm-proxy; fwd=bypass; detail="+c.detail {
				t.Errorf("%s: Cache-Status is %q", c.members, got)
			}
			continue
		}
		hit := p.expectFrom(c.members, "cache", send)
		if hit.body != first.body || hit.header.Get("Request-Id") != hit.header.Get("X-Llm-Proxy-Request-Id") {
			t.Errorf("%s: got %v %s, want %s", c.members, hit.header, hit.body, first.body)
		}
	}
	body := strings.Replace(chatBody(`"max_tokens":9`), "gpt-4o-mini", "claude-sonnet-4-5", 1)
	res := p.do("POST", "/v1/messages", body, "X-Api-Key", p.token, "Content-Type", "application/json",
		"Cache-Control", "only-if-cached")
	if res.status != 504 || !strings.HasPrefix(res.body, `{"type":"error","error":{`) {
		t.Errorf("only-if-cached: got %d %s", res.status, res.body)
	}
}

// TestCacheGemini: Gemini's own API is cached where the project lists it: answers in one piece, streams of events, and
// streams that are lists. Nothing that broke off is, nor any call whose tools act at the provider.
func TestCacheGemini(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"g","provider":"google","base_url":"`+
		p.provider.url+`","api_key":"`+p.provider.key+`"}`, 201, nil)
	const part = `{"candidates":[{"content":{"role":"model","parts":[{"text":"Hi"}]},"index":0%s}],` +
		`"usageMetadata":{"promptTokenCount":9,"candidatesTokenCount":3,"totalTokenCount":12},` +
		`"modelVersion":"gemini-2.5-flash"}`
	first, last := fmt.Sprintf(part, ""), fmt.Sprintf(part, `,"finishReason":"STOP"`)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		cut := strings.Contains(r.body, "cut")
		switch {
		case strings.Contains(r.target, ":embedContent"):
			return c.reply(200, `{"embedding":{"values":[0.1,0.2]}}`)
		case strings.Contains(r.target, ":batchEmbedContents"):
			return c.reply(200, `{"embeddings":[{"values":[0.1,0.2]}]}`)
		case strings.Contains(r.target, "alt=sse"):
			c.beginSSE()
			_ = c.chunk("data: " + first + "\r\n\r\n")
			if !cut {
				_ = c.chunk("data: " + last + "\r\n\r\n")
			}
			return c.chunk("") == nil
		case strings.Contains(r.target, ":streamGenerateContent"):
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"+
				"Transfer-Encoding: chunked\r\n\r\n")
			_ = c.chunk("[" + first)
			if !cut {
				_ = c.chunk(",\r\n" + last)
				_ = c.chunk("]")
			}
			return c.chunk("") == nil
		}
		return c.reply(200, last)
	})
	policy := func(cache string) {
		t.Helper()
		p.manage("PATCH", "/manage/projects/"+p.project,
			`{"policy":{"stateful":true,"cache":{"ttl_seconds":60`+cache+`}}}`, 200, nil)
	}
	const generate, stream, events = ":generateContent", ":streamGenerateContent", ":streamGenerateContent?alt=sse"
	const zero, listed = `"generationConfig":{"temperature":0}`, `,"endpoints":["/v1beta/*"]`
	const always = listed + `,"when":"always"`
	n := 0
	send := func(verb, members string) testResponse {
		text := fmt.Sprint(n)
		if strings.Contains(members, "cut") {
			text, members = text+" cut", strings.ReplaceAll(members, "cut", "")
		}
		contents := `"contents":[{"role":"user","parts":[{"text":"` + text + `"}]}]`
		switch verb {
		case ":embedContent":
			contents = `"content":{"parts":[{"text":"` + text + `"}]}`
		case ":batchEmbedContents":
			contents = `"requests":[{"model":"models/gemini-2.5-flash","content":{"parts":[{"text":"` + text + `"}]}}]`
		}
		if members != "" {
			members = "," + members
		}
		return p.do("POST", "/v1beta/models/gemini-2.5-flash"+verb, "{"+contents+members+"}",
			"X-Goog-Api-Key", p.token, "Content-Type", "application/json")
	}
	current := "none"
	for _, c := range []struct{ policy, verb, members, detail string }{ // detail "-": not stored
		{"", generate, zero, "endpoint"},
		{`,"endpoints":["/v1/*"]`, generate, zero, "endpoint"},
		{`,"endpoints":["/v1beta/models/{model}:embedContent"]`, generate, zero, "endpoint"},
		{`,"endpoints":["/v1beta/models/{model}:embedContent"]`, ":embedContent", "", ""},
		{listed, ":embedContent", `"taskType":"RETRIEVAL_QUERY"`, ""},
		{listed, ":batchEmbedContents", "", ""},
		{listed, generate, zero, ""},
		{listed, generate, `"generation_config":{"seed":7}`, ""},
		{listed, generate, `"generationConfig":{"temperature":0.0,"topK":1}`, ""},
		{listed, stream, zero, ""},
		{listed, events, zero, ""},
		{listed, stream, zero + "cut", "-"},
		{listed, events, zero + "cut", "-"},
		{listed, generate, `"generationConfig":{"temperature":1}`, "not-deterministic"},
		{listed, generate, `"generationConfig":{"temperature":0,"temperature":1}`, "not-deterministic"},
		{listed, generate, `"generationConfig":{"Temperature":0}`, "not-deterministic"},
		{listed, generate, `"generationConfig":{"nested":{"temperature":0}}`, "not-deterministic"},
		{listed, generate, `"generationConfig":null`, "not-deterministic"},
		{listed, generate, `"temperature":0,"seed":1`, "not-deterministic"},
		{listed, generate, "", "not-deterministic"},
		{always, generate, "", ""},
		{always, generate, `"tools":[{"functionDeclarations":[{"name":"f"}]}]`, ""},
		{always, generate, `"tools":[{"function_declarations":[{"name":"f"}]}],"toolConfig":{}`, ""},
		{always, generate, `"tools":[{"googleSearch":{}}]`, "tools"},
		{always, generate, `"tools":[{"google_search":{}}]`, "tools"},
		{always, generate, `"tools":[{"functionDeclarations":[]},{"codeExecution":{}}]`, "tools"},
		{always, generate, `"tools":[{"functionDeclarations":[],"urlContext":{}}]`, "tools"},
		{always, generate, `"tools":[{"type":"function","url_context":{}}]`, "tools"},
		{always, stream, `"tools":[{"googleMaps":{}}]`, "tools"},
		{always, generate, `"tools":{"codeExecution":{}}`, "tools"},
		{always, generate, `"to\u006fls":[{"codeExecution":{}}]`, "tools"},
		{always, generate, `"cachedContent":"cachedContents/x"`, "stateful"},
		{always, generate, `"store":true`, "stateful"},
		{always, ":countTokens", "", "endpoint"},
	} {
		if n++; c.policy != current {
			current = c.policy
			policy(c.policy)
		}
		what := c.policy + " " + c.verb + " " + c.members
		call := func() testResponse { return send(c.verb, c.members) }
		res := p.expectFrom(what, "provider", call)
		want := "llm-proxy; fwd=miss; stored"
		if c.detail != "" && c.detail != "-" {
			want = "llm-proxy; fwd=bypass; detail=" + c.detail
		}
		if got := res.header.Get("Cache-Status"); got != want {
			t.Errorf("%s: Cache-Status is %q, want %q", what, got, want)
		}
		if c.detail != "" {
			p.expectFrom(what+" again", "provider", call)
			continue
		}
		hit := p.expectFrom(what+" again", "cache", call)
		if hit.body != res.body || hit.header.Get("Content-Type") != res.header.Get("Content-Type") {
			t.Errorf("%s: got %v %q, want %v %q", what, hit.header, hit.body, res.header, res.body)
		}
	}
	policy(always)
	n++
	one := p.expectFrom("a list", "provider", func() testResponse { return send(stream, "") })
	other := p.expectFrom("events", "provider", func() testResponse { return send(events, "") })
	p.expectFrom("alt=json", "provider", func() testResponse { return send(stream+"?alt=json", "") })
	if again := send(stream, ""); again.body != one.body || one.body == other.body {
		t.Errorf("got %q, %q and %q", one.body, other.body, again.body)
	}
	_, second := p.newToken(`"name":"second"`)
	p.expectFrom("the token in the query", "cache", func() testResponse {
		return p.do("POST", "/v1beta/models/gemini-2.5-flash"+events+"&key="+second,
			fmt.Sprintf(`{"contents":[{"role":"user","parts":[{"text":"%d"}]}]}`, n),
			"Content-Type", "application/json")
	})
}

// TestCacheLimits: a hit counts in limits on requests and in max_requests, and uses no tokens and no money. It has
// the rate limit headers of its own call, and does not use up what an upstream may get.
func TestCacheLimits(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream,
		`{"requests_per_minute":3,"tokens_per_minute":100000}`, 200, nil)
	_, token := p.newToken(`"name":"limited","max_requests":6,"policy":{"limits":[` +
		`{"count":"requests","max":5,"per":"day"},{"count":"tokens","max":9000,"per":"day"},` +
		`{"count":"dollars","max":1,"per":"day"},{"count":"concurrent","max":2}]}`)
	const most = `"max_tokens":100`
	p.expectFrom("the first", "provider", func() testResponse { return p.cachedChat(token, most) })
	for i := range 4 {
		res := p.expectFrom("a hit", "cache", func() testResponse { return p.cachedChat(token, most) })
		if got, want := res.header.Get("X-Ratelimit-Remaining-Requests"), fmt.Sprint(3-i); got != want {
			t.Errorf("%s requests remain, want %s", got, want)
		}
	}
	res := p.cachedChat(token, most)
	if res.status != 429 || res.errorCode() != "project_spend_limit_exceeded" {
		t.Errorf("a hit too many: got %d %s", res.status, res.body)
	}
	p.waitSettled()
	var state struct {
		RequestCount int64 `json:"request_count"`
		Limits       []struct {
			Count string
			Used  float64
		}
	}
	res = p.do("GET", "/v1/llm-proxy/token", "", "Authorization", "Bearer "+token)
	if err := json.Unmarshal([]byte(res.body), &state); err != nil {
		t.Fatal(err, res.body)
	}
	used := map[string]float64{}
	for _, l := range state.Limits {
		used[l.Count] = l.Used
	}
	if used["requests"] != 5 || used["tokens"] != 12 || used["dollars"] == 0 || used["dollars"] > 0.00001 ||
		used["concurrent"] != 0 {
		t.Errorf("the limits have used %v: %s", used, res.body)
	}
	for i := range 2 { // two of three remain to the upstream
		p.expectFrom("another call", "provider", func() testResponse {
			return p.cachedChat(p.token, fmt.Sprintf(`"user":"%d"`, i))
		})
	}
	p.checkSums()
	p.checkCounts()
}

// TestCacheNeedsNoUpstream: a hit is answered while every upstream is at its own limit, and neither it nor a call that
// waits for an identical one counts there. A call that the cache does not answer is refused.
func TestCacheNeedsNoUpstream(t *testing.T) {
	t.Parallel()
	for again := true; again; {
		p := newTest(t, nil)
		p.enableCache()
		p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"requests_per_minute":3}`, 200, nil)
		again = p.fillUpstream()
		p.checkSums()
		p.checkCounts()
	}
}

// fillUpstream uses up what the upstream may get in a minute, and reports whether another minute began meanwhile.
func (p *testProxy) fillUpstream() (again bool) {
	p.t.Helper()
	minute := time.Now().UnixMilli() / 60_000
	again = true
	release := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool { <-release; return chatScript(c, r) })
	body := fmt.Sprintf(`"temperature":0,"user":"%d"`, minute)
	statuses, wait := p.manyChats(context.Background(), 6, p.token, body)
	waitFor(p.t, "the others to wait", func() bool { return p.waiting() == 5 })
	close(release)
	wait()
	call := func(i int) testResponse {
		return p.cachedChat(p.token, fmt.Sprintf(`"user":"%d","seed":%d`, minute, i))
	}
	results := []testResponse{call(1), call(1), call(1), call(1), call(2), call(2), call(1), call(3)}
	if time.Now().UnixMilli()/60_000 != minute {
		return again
	}
	for i, status := range statuses {
		if status != 200 {
			p.t.Errorf("the identical call %d got %d", i, status)
		}
	}
	for i, res := range results[:7] {
		hit := strings.HasPrefix(res.header.Get("Cache-Status"), "llm-proxy; hit")
		if res.status != 200 || hit != (i != 0 && i != 4) {
			p.t.Errorf("call %d got %d %q %s", i, res.status, res.header.Get("Cache-Status"), res.body)
		}
	}
	res := results[7]
	if res.status != 429 || res.errorCode() != "rate_limit_exceeded" || res.header.Get("Retry-After") == "" {
		p.t.Errorf("a call too many got %d %s", res.status, res.body)
	}
	if row := p.lastCall(); row.Outcome != "refused" || row.ErrorCode != "rate_limit_exceeded" || row.Attempts != 0 {
		p.t.Errorf("its row is %+v", row)
	}
	return !again
}

// TestCacheAlias: the row of a hit says what the client calls the model, and what the model is, like that of a miss.
func TestCacheAlias(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(replyAs)
	p.manage("PATCH", "/manage/projects/"+p.project,
		`{"policy":{"cache":{"ttl_seconds":60}},"routing":{"aliases":{"fast":"gpt-4o-mini"}}}`, 200, nil)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream,
		`{"rewrite":{"gpt-4o-mini":"deployed"}}`, 200, nil)
	b := p.signIn(p.adminKey)
	for _, c := range []struct{ from, upstream string }{{"provider", p.upstream}, {"cache", ""}} {
		p.expectFrom("an alias", c.from, func() testResponse { return p.cachedModel(p.token, "fast", "a") })
		row := p.lastCall()
		if len(row.AttemptLog) != 1 || row.Model != "deployed" {
			t.Fatalf("from the %s: the row is %+v", c.from, row)
		}
		if l := row.AttemptLog[0]; l.Alias != "fast" || l.Model != "deployed" || l.Upstream != c.upstream ||
			l.Status != 200 || l.Error != "" {
			t.Errorf("from the %s: the log has %+v", c.from, l)
		}
		if body := b.get("/admin/requests/" + row.ID).body; !strings.Contains(body, "fast → deployed") {
			t.Errorf("from the %s: the page does not show the alias", c.from)
		}
	}
}

// TestCacheContent: the content of a hit is stored like that of any call.
func TestCacheContent(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project,
		`{"policy":{"keep_content_days":1,"cache":{"ttl_seconds":60}}}`, 200, nil)
	first := p.expectFrom("the first", "provider", func() testResponse { return p.cachedChat(p.token, "") })
	p.expectFrom("the second", "cache", func() testResponse { return p.cachedChat(p.token, "") })
	content := p.getContent(p.lastCall().ID)
	if content.Answer.Text == nil || *content.Answer.Text != first.body || content.Request.Text == nil ||
		!strings.Contains(*content.Request.Text, promptCanary) {
		t.Errorf("got %+v", content)
	}
}

// FuzzCache: whatever a provider answers, in whatever pieces, the second answer has the bytes of the first, and a hit
// had a complete answer.
func FuzzCache(f *testing.F) {
	stream := strings.Join(chatEvents(true), "")
	f.Add([]byte(stream), true, true, []byte{3, 100, 7})
	f.Add([]byte(stream), true, false, []byte{1})
	f.Add([]byte(strings.ReplaceAll(stream, "\n", "\r\n")), true, true, []byte{200, 1, 1, 1})
	f.Add([]byte(strings.Replace(stream, "[DONE]", "{", 1)), true, true, []byte{9})
	f.Add([]byte(chatResponseBody), false, false, []byte{5, 5})
	f.Add([]byte(chatResponseBody[:60]), false, false, []byte{})
	f.Add([]byte(" \n"+chatResponseBody+"\n"), true, false, []byte{80})
	f.Add([]byte("\xef\xbb\xbf"+stream), true, true, []byte{1, 1, 1, 1})
	f.Add([]byte(`{"error":{}}`), true, true, []byte{2})
	f.Add([]byte(`{"":{""}}`), false, false, []byte("0"))
	p := newTest(f, nil)
	f.Cleanup(func() { p.t = f }) // before the harness looks for secrets
	p.enableCache()
	var mu sync.Mutex
	var payload, cuts []byte
	var sse bool
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		mu.Lock()
		defer mu.Unlock()
		kind := "application/json"
		if sse {
			kind = "text/event-stream"
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: "+kind+"\r\nTransfer-Encoding: chunked\r\n\r\n")
		rest := payload
		for _, cut := range cuts {
			if n := min(int(cut), len(rest)); n > 0 {
				_ = c.chunk(string(rest[:n]))
				rest = rest[n:]
			}
		}
		if len(rest) > 0 {
			_ = c.chunk(string(rest))
		}
		return c.chunk("") == nil
	})
	count := 0
	f.Fuzz(func(t *testing.T, body []byte, asksStream, isSSE bool, pieces []byte) {
		if len(body) > 64<<10 || len(pieces) > 100 || bytes.Contains(body, []byte(p.provider.key)) {
			return
		}
		mu.Lock()
		payload, cuts, sse = body, pieces, isSSE
		mu.Unlock()
		count++
		p.t = t
		p.clientOutput.Reset()
		members := fmt.Sprintf(`"user":"%d","stream":%v`, count, asksStream)
		first := p.cachedChat(p.token, members)
		second := p.cachedChat(p.token, members)
		if first.status != second.status || first.body != second.body ||
			first.header.Get("Content-Type") != second.header.Get("Content-Type") {
			t.Fatalf("the first got %d %q, the second %d %q with %q",
				first.status, first.body, second.status, second.body, second.header.Get("Cache-Status"))
		}
		hit := strings.HasPrefix(second.header.Get("Cache-Status"), "llm-proxy; hit")
		// An answer that was cut is never stored. What is wrong in the middle of one is the provider's, and passes.
		text := bytes.TrimLeft(body, "\xef\xbb\xbf \t\r\n")
		if err := json.Unmarshal(text, new(any)); hit && !isSSE && (len(text) == 0 || isUnexpectedEnd(err, text)) {
			t.Fatalf("an incomplete answer was stored: %q", body)
		}
		if hit && isSSE && !bytes.Contains(body, []byte("[DONE]")) {
			t.Fatalf("a stream without its end was stored: %q", body)
		}
	})
}

// isUnexpectedEnd reports whether err says that text ended too early.
func isUnexpectedEnd(err error, text []byte) bool {
	e, ok := errors.AsType[*json.SyntaxError](err)
	return ok && e.Offset >= int64(len(text)) && strings.Contains(e.Error(), "unexpected end")
}

// TestCacheScanSkipsStrings: where a string ends is found although the body is not checked a second time.
func TestCacheScanSkipsStrings(t *testing.T) {
	t.Parallel()
	for _, text := range []string{``, `a`, `a\"b`, `a\\`, `\\\\\"`, `\"`, `\\\"\\`, `é\u0022,\"seed\":1`} {
		body := `{"user":"` + text + `","temperature":0,"stop":"` + text + `","tools":[{"type":"` + text + `"}]}`
		if _, err := scanJSON([]byte(body)); err != nil {
			t.Fatalf("%s: %v", body, err)
		}
		got := scanForCache([]byte(body), false)
		if want := (cacheScan{deterministic: true, tools: true}); got != want {
			t.Errorf("%s: %+v, want %+v", body, got, want)
		}
	}
}
