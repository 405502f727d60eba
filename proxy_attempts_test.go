// These tests hold retry and failover: for each fault of a provider, what the client gets, how often each provider
// is called, and what is on record.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// addUpstream adds an upstream with a provider of its own to the test's project and returns its id; fields are
// JSON members.
func (p *testProxy) addUpstream(fields string) (provider *fakeProvider, id string) {
	p.t.Helper()
	provider = newFakeProvider(p.t)
	return provider, p.addUpstreamAt(provider, providerCompatible, fields)
}

// addUpstreamAt adds an upstream with the provider's URL and key, which speaks the API of kind.
func (p *testProxy) addUpstreamAt(provider *fakeProvider, kind, fields string) string {
	p.t.Helper()
	p.mu.Lock()
	p.secrets = append(p.secrets, provider.key)
	p.mu.Unlock()
	var up struct{ ID string }
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams", fmt.Sprintf(
		`{"name":"u","provider":%q,"api_key":%q,"base_url":%q,%s}`, kind, provider.key, provider.url, fields), 201, &up)
	return up.ID
}

// changeUpstream changes an upstream of the test's project; fields are JSON members.
func (p *testProxy) changeUpstream(id, fields string) {
	p.t.Helper()
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+id, "{"+fields+"}", 200, nil)
}

// changeProject changes the test's project; fields are JSON members.
func (p *testProxy) changeProject(fields string) {
	p.t.Helper()
	p.manage("PATCH", "/manage/projects/"+p.project, "{"+fields+"}", 200, nil)
}

// jsonHeaders returns the headers of a JSON call with the test's token, and the further ones.
func (p *testProxy) jsonHeaders(more ...string) []string {
	return append([]string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json"}, more...)
}

// checkKeysApart fails if a provider's request contains the key of another upstream, or not its own.
func (p *testProxy) checkKeysApart(providers ...*fakeProvider) {
	p.t.Helper()
	for _, to := range providers {
		for _, r := range to.received() {
			for _, of := range providers {
				if has := strings.Contains(r.head+r.body, of.key); has != (of == to) {
					p.t.Errorf("a provider's own key: %v, in its request: %v", of == to, has)
				}
			}
		}
	}
}

// healthOf returns the state of an upstream's key as /manage shows it.
func (p *testProxy) healthOf(upstream string) healthView {
	p.t.Helper()
	var up struct {
		Health struct{ State, Reason string }
	}
	p.manage("GET", "/manage/projects/"+p.project+"/upstreams/"+upstream, "", 200, &up)
	return healthView{State: up.Health.State, Reason: up.Health.Reason}
}

// stateAfterCalls returns the state of an upstream's key after calls that have just ended. The shortest pause is a
// second: a busy machine may see its end before the key is asked for.
func (p *testProxy) stateAfterCalls(upstream string) string {
	p.t.Helper()
	view := p.healthOf(upstream)
	tracker := p.instance.registry.health
	tracker.mu.Lock()
	defer tracker.mu.Unlock()
	now := time.Now().UnixMilli()
	for _, h := range tracker.keys {
		h.mu.Lock()
		if h.id == upstream && view.State == "ready" && h.state == keyCooling && now >= h.until.Load() {
			view.State = "cooling"
		}
		h.mu.Unlock()
	}
	return view.State
}

// longStream is a stream of sixty events and its end.
func longStream() []string {
	events := []string{chatEvents(true)[0]}
	for range 57 {
		events = append(events, chatEvents(true)[1])
	}
	return append(events, chatEvents(true)[2:]...)
}

// uploadForm is the body of an upload, with the boundary b.
const uploadForm = "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nx\r\n--b--\r\n"

// streamScript answers with n of the events and then runs then.
func streamScript(events []string, n int, then func(*providerConn) bool) func(*providerConn, recordedRequest) bool {
	return func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		for _, e := range events[:n] {
			if c.chunk(e) != nil {
				return false
			}
		}
		return then(c)
	}
}

func replyScript(status int, body string, headers ...string) func(*providerConn, recordedRequest) bool {
	return func(c *providerConn, _ recordedRequest) bool { return c.reply(status, body, headers...) }
}

func endStream(c *providerConn) bool { return c.chunk("") == nil }

func stallStream(c *providerConn) bool { c.waitClosed(hangTimeout); return false }

func resetStream(c *providerConn) bool { return c.reset() }

func stallScript(c *providerConn, _ recordedRequest) bool { return stallStream(c) }

func resetScript(c *providerConn, _ recordedRequest) bool { return c.reset() }

// A providerFault is a fault that a provider has throughout the test, and the result of a call. attempts are those
// at the provider and at the fallback.
type providerFault struct {
	name             string
	stream           bool
	script           func(*providerConn, recordedRequest) bool
	attempts         [2]int
	status           int    // 0: the answer is cut
	outcome          string // in the ledger
	code             string
	health           string // of the provider after the call
	fallback         string // the fallback rejects bodies that contain it; "": none
	bufferedAttempts [2]int // attempts for a verified stream, if they differ
}

var providerFaults = []providerFault{
	{name: "429 with Retry-After",
		script: replyScript(429, `{"error":{"code":"rate_limit_exceeded"}}`, "Retry-After: 7"), attempts: [2]int{1, 1},
		status: 200, outcome: "ok", health: "cooling"},
	{name: "429 without", stream: true, script: replyScript(429, `{"error":{}}`), attempts: [2]int{1, 1}, status: 200,
		outcome: "ok", health: "cooling"},
	{name: "429 for good", script: replyScript(429, `{"error":{"code":"insufficient_quota"}}`),
		attempts: [2]int{1, 1}, status: 200, outcome: "ok", health: "exhausted"},
	{name: "402", script: replyScript(402, `{}`), attempts: [2]int{1, 1}, status: 200, outcome: "ok",
		health: "exhausted"},
	{name: "401", script: replyScript(401, `{}`), attempts: [2]int{1, 1}, status: 200, outcome: "ok",
		health: "quarantined"},
	{name: "403", stream: true, script: replyScript(403, `{}`), attempts: [2]int{1, 1}, status: 200, outcome: "ok",
		health: "quarantined"},
	{name: "503 persistent", script: replyScript(503, `{"error":{}}`), attempts: [2]int{2, 1}, status: 200,
		outcome: "ok", health: "ready"},
	{name: "503 with Retry-After", script: replyScript(503, `{"error":{}}`, "Retry-After: 20"),
		attempts: [2]int{1, 1}, status: 200, outcome: "ok", health: "ready"},
	{name: "an error that never ends", stream: true, script: func(c *providerConn, _ recordedRequest) bool {
		_, _ = c.Write([]byte("HTTP/1.1 500 X\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"))
		return stallStream(c)
	}, attempts: [2]int{1, 1}, status: 200, outcome: "ok", health: "ready"},
	{name: "redirect", script: replyScript(302, ``, "Location: /"), attempts: [2]int{1, 1}, status: 200,
		outcome: "ok", health: "ready"},
	{name: "reset before headers", script: resetScript,
		attempts: [2]int{2, 1}, status: 200, outcome: "ok", health: "ready"},
	{name: "no HTTP", stream: true, script: func(c *providerConn, _ recordedRequest) bool {
		_, _ = c.Write([]byte("nonsense\r\n\r\n"))
		return false
	}, attempts: [2]int{2, 1}, status: 200, outcome: "ok", health: "ready"},
	{name: "no response", stream: true,
		script: stallScript, attempts: [2]int{1, 1},
		status: 200, outcome: "ok", health: "ready"},
	{name: "slow first token", stream: true, script: streamScript(longStream(), 0, stallStream),
		attempts: [2]int{1, 1}, status: 200, outcome: "ok", health: "ready"},
	{name: "comments and no token", stream: true,
		script: streamScript([]string{": wait\n\n", "event: ping\n\n"}, 2, stallStream), attempts: [2]int{1, 1},
		status: 200, outcome: "ok", health: "ready"},
	{name: "empty stream", stream: true, script: streamScript(nil, 0, endStream), attempts: [2]int{2, 1}, status: 200,
		outcome: "ok", health: "ready"},
	{name: "cut before the first event", stream: true, script: streamScript([]string{": wait\n\n"}, 1, resetStream),
		attempts: [2]int{2, 1}, status: 200, outcome: "ok", health: "ready"},
	{name: "error as first event", stream: true,
		script: streamScript([]string{
			"event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\"}}\n\n"}, 1, endStream),
		attempts: [2]int{2, 1}, status: 200, outcome: "ok", health: "ready"},
	{name: "malformed chunk at first", stream: true,
		script: streamScript([]string{"data: {\"choices\":[{\"delta\n\n"}, 1, endStream), attempts: [2]int{2, 1},
		status: 200, outcome: "ok", health: "ready"},
	{name: "malformed chunk later", stream: true,
		script: streamScript(append([]string{chatEvents(true)[0], "data: {\"choices\":[{\"delta\n\n"},
			chatEvents(true)[1:]...), 6, endStream),
		attempts: [2]int{1, 0}, status: 200, outcome: "ok", health: "ready", bufferedAttempts: [2]int{2, 1}},
	{name: "stream cut after 40 of 60 events", stream: true, script: streamScript(longStream(), 40, resetStream),
		attempts: [2]int{1, 0}, outcome: "truncated", code: "upstream_cut", health: "ready",
		bufferedAttempts: [2]int{2, 1}},
	{name: "stream stalled", stream: true, script: streamScript(longStream(), 40, stallStream),
		attempts: [2]int{1, 0}, outcome: "truncated", code: "stream_idle", health: "ready",
		bufferedAttempts: [2]int{1, 1}},
	{name: "cut, and a fallback that rejects prefill", stream: true,
		script: streamScript(longStream(), 40, resetStream), attempts: [2]int{1, 0}, outcome: "truncated",
		code: "upstream_cut", health: "ready", fallback: `"role":"assistant"`, bufferedAttempts: [2]int{2, 1}},
	{name: "missing [DONE]", stream: true, script: streamScript(longStream(), 60, endStream), attempts: [2]int{1, 0},
		status: 200, outcome: "truncated", code: "stream_unfinished", health: "ready", bufferedAttempts: [2]int{2, 1}},
	{name: "content filter", script: replyScript(400, `{"error":{"code":"content_filter"}}`), attempts: [2]int{1, 0},
		status: 400, outcome: "upstream_error", health: "ready"},
	{name: "bad request", script: replyScript(400, `{"error":{"code":"invalid_value"}}`), attempts: [2]int{1, 0},
		status: 400, outcome: "upstream_error", health: "ready"},
	{name: "model not found", script: replyScript(404, `{"error":{"code":"model_not_found"}}`),
		attempts: [2]int{1, 1}, status: 200, outcome: "ok", health: "ready"},
	{name: "not found", script: replyScript(404, `{"error":{"message":"Not Found"}}`), attempts: [2]int{1, 0},
		status: 404, outcome: "upstream_error", health: "ready"},
	{name: "conflict", script: replyScript(409, `{"error":{}}`), attempts: [2]int{1, 0}, status: 409,
		outcome: "upstream_error", health: "ready"},
}

// TestFailover: with a fallback, a call survives each fault that shows before an event has left. It has one row,
// which names the upstream that answered, and one bill. Other calls end visibly broken.
func TestFailover(t *testing.T) {
	t.Parallel()
	faults := slices.Clone(providerFaults)
	for _, f := range providerFaults {
		if f.stream {
			if f.name += ", verified"; f.bufferedAttempts != [2]int{} {
				f.attempts, f.status, f.outcome, f.code = f.bufferedAttempts, 200, "ok", ""
			}
			faults = append(faults, f)
		}
	}
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"FIRST_EVENT_TIMEOUT": "3s", "STREAM_IDLE_TIMEOUT": "3s"})
			fallback, id := p.addUpstream(`"priority":1`)
			fallback.setScript(func(c *providerConn, r recordedRequest) bool {
				if f.fallback != "" && strings.Contains(r.body, f.fallback) {
					return c.reply(400, "{}")
				}
				return chatScript(c, r)
			})
			p.provider.setScript(f.script)
			headers := p.jsonHeaders()
			if strings.HasSuffix(f.name, "verified") {
				headers = append(headers, "X-LLM-Proxy-Stream", "verified")
			}
			res := p.do("POST", "/v1/chat/completions", chatBody(fmt.Sprintf(`"stream":%v`, f.stream)), headers...)
			if got := [2]int{len(p.provider.received()), len(fallback.received())}; got != f.attempts {
				t.Errorf("the providers got %v attempts, want %v", got, f.attempts)
			}
			p.checkKeysApart(p.provider, fallback)
			rescued := f.attempts[1] > 0
			switch want := strings.Join(chatEvents(false), ""); {
			case f.status == 0 && (res.err == nil || strings.Contains(res.body, "[DONE]")):
				t.Errorf("a cut answer came as %d %q, %v", res.status, clip(res.body, 300), res.err)
			case f.status != 0 && (res.err != nil || res.status != f.status):
				t.Errorf("got %d %q, %v", res.status, clip(res.body, 300), res.err)
			case rescued && f.stream && res.body != want || rescued && !f.stream && res.body != chatResponseBody:
				t.Errorf("the answer is %q", res.body)
			}
			row := p.lastCall()
			if row.Outcome != f.outcome || row.ErrorCode != f.code || row.Attempts != f.attempts[0]+f.attempts[1] {
				t.Errorf("the ledger has %+v", row)
			}
			if rescued && (row.UpstreamID != id || len(row.AttemptLog) != row.Attempts || row.OutputTokens != 3 ||
				row.InputTokens != 9 || row.UsageSource != "exact") {
				t.Errorf("the ledger has %+v", row)
			}
			if len(row.AttemptLog) > 0 && row.AttemptLog[0].Error == "" {
				t.Errorf("the attempt log is %+v", row.AttemptLog)
			}
			if n, state := len(p.ledger()), p.stateAfterCalls(p.upstream); n != 1 || state != f.health {
				t.Errorf("there are %d rows for one call, and the key is %s, want %s", n, state, f.health)
			}
		})
	}
}

// TestOnceOnly: a call that meets a single 500 or broken connection is sent again with the same key, not to the
// fallback.
func TestOnceOnly(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]func(*providerConn, recordedRequest) bool{
		"500 once": replyScript(500, `{"error":{}}`),
		"reset":    resetScript,
	} {
		p := newTest(t, nil)
		fallback, _ := p.addUpstream(`"priority":1`)
		p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
			if len(p.provider.received()) == 1 {
				return first(c, r)
			}
			return chatScript(c, r)
		})
		if res := p.chat(); res.status != 200 || res.body != chatResponseBody {
			t.Errorf("%s: got %d %s", name, res.status, res.body)
		}
		if n, m := len(p.provider.received()), len(fallback.received()); n != 2 || m != 0 {
			t.Errorf("%s: the providers got %d and %d attempts", name, n, m)
		}
		if row := p.lastCall(); row.Outcome != "ok" || row.Attempts != 2 || len(row.AttemptLog) != 2 ||
			row.OutputTokens != 3 {
			t.Errorf("%s: the ledger has %+v", name, row)
		}
	}
}

// TestOutage: during an outage of the first provider, all of twenty calls are answered. The breaker limits the
// attempts there; after the first good answer, the provider gets the calls again.
func TestOutage(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	fallback, _ := p.addUpstream(`"priority":1`)
	p.provider.setScript(replyScript(503, `{"error":{}}`))
	for i := range 20 {
		if res := p.chat(); res.status != 200 {
			t.Errorf("call %d in the outage: got %d %s", i, res.status, res.body)
		}
	}
	asked := len(p.provider.received())
	if asked < 3 || asked > 8 { // three open the breaker; a slow machine may see a probe or two
		t.Errorf("a provider that is down got %d attempts for 20 calls", asked)
	}
	if h := p.healthOf(p.upstream); h.State != "open" {
		t.Errorf("after 20 failed calls: %+v", h)
	}
	p.provider.setScript(chatScript)
	h := p.instance.health.forUpstream(1, "")
	h.until.Store(time.Now().UnixMilli()) // the pause is over
	before := len(fallback.received())
	for i := range 5 {
		if res := p.chat(); res.status != 200 {
			t.Errorf("call %d after the outage: got %d %s", i, res.status, res.body)
		}
	}
	if n := len(p.provider.received()) - asked; n != 5 || len(fallback.received()) != before {
		t.Errorf("after the outage the provider got %d of 5 calls", n)
	}
	if h := p.healthOf(p.upstream); h.State != "ready" {
		t.Errorf("after the outage: %+v", h)
	}
}

// TestHealthSurvives: a key's health survives a restart and is reset when an administrator changes the upstream.
func TestHealthSurvives(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	fallback, _ := p.addUpstream(`"priority":1`)
	p.provider.setScript(replyScript(401, `{}`))
	p.chat()
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	if h := p.healthOf(p.upstream); h.State != "quarantined" || h.Reason == "" {
		t.Errorf("after a restart: %+v", h)
	}
	p.chat()
	if n, m := len(p.provider.received()), len(fallback.received()); n != 1 || m != 2 {
		t.Errorf("the providers got %d and %d attempts", n, m)
	}
	if n := sumSamples(p.metrics(), "llm_proxy_upstreams", `state="quarantined"`); n != 1 {
		t.Errorf("the metrics count %v quarantined upstreams", n)
	}
	p.changeUpstream(p.upstream, `"weight":2`)
	p.provider.setScript(chatScript)
	if res := p.chat(); res.status != 200 || len(p.provider.received()) != 2 {
		t.Errorf("after the change: got %d, the provider got %d attempts", res.status, len(p.provider.received()))
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	if h := p.healthOf(p.upstream); h.State != "ready" {
		t.Errorf("after another restart: %+v", h)
	}
	var changes []string
	for _, e := range p.auditEntries(0) {
		if e.action == "upstream.health" && e.object == p.upstream && e.actorID == actorSystem {
			changes = append(changes, between(e.detail, `"state":[`, `]`))
		}
	}
	if want := []string{`"ready","quarantined"`, `"quarantined","ready"`}; !slices.Equal(changes, want) {
		t.Errorf("the audit trail has %v", changes)
	}
}

// TestNoneLeft: if no upstream is healthy, each call is still sent, at most once to each upstream, and the client
// gets a provider's answer.
func TestNoneLeft(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	second, _ := p.addUpstream(`"weight":1`)
	p.provider.setScript(replyScript(429, `{"error":{"code":"rate_limit_exceeded"}}`, "Retry-After: 30"))
	second.setScript(replyScript(429, `{"error":{"code":"rate_limit_exceeded"}}`, "Retry-After: 20"))
	if res := p.chat(); res.status != 429 || res.errorCode() != "rate_limit_exceeded" ||
		res.header.Get("Retry-After") == "" {
		t.Errorf("got %d %v %s", res.status, res.header, res.body)
	}
	if n, m := len(p.provider.received()), len(second.received()); n != 1 || m != 1 {
		t.Errorf("the providers got %d and %d attempts", n, m)
	}
	if res := p.chat(); res.status != 429 || len(p.provider.received()) != 1 || len(second.received()) != 2 {
		t.Errorf("the next call: got %d; the providers got %d and %d attempts", res.status, len(p.provider.received()),
			len(second.received()))
	}
	second.setScript(replyScript(401, `{}`)) // less useful to the client than the other's 429
	p.changeUpstream(p.upstream, ``)
	p.chat()
	if res := p.chat(); res.status != 502 && res.status != 429 {
		t.Errorf("got %d %s", res.status, res.body)
	}
}

// TestRefusedKeysHideNoAnswer: after a 429 of one provider, the client gets that answer, even if the keys of all
// others are refused.
func TestRefusedKeysHideNoAnswer(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(replyScript(429, `{"error":{"code":"rate_limit_exceeded"}}`, "Retry-After: 30"))
	for i := range 2 {
		refused, _ := p.addUpstream(fmt.Sprintf(`"priority":%d`, i+1))
		refused.setScript(replyScript(401, `{}`))
	}
	if res := p.chat(); res.status != 429 || res.errorCode() != "rate_limit_exceeded" {
		t.Errorf("got %d %s", res.status, res.body)
	}
	if row := p.lastCall(); row.Attempts != 3 || row.UpstreamID != p.upstream {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestShortWait: if no other key is left, the call waits for a short Retry-After.
func TestShortWait(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	second, _ := p.addUpstream(`"priority":1`)
	p.provider.setScript(replyScript(429, `{}`, "Retry-After: 300"))
	second.setScript(func(c *providerConn, _ recordedRequest) bool {
		second.setScript(chatScript)
		return c.reply(429, `{}`, "Retry-After: 1")
	})
	if res := p.chat(); res.status != 200 || len(p.provider.received()) != 1 || len(second.received()) != 2 {
		t.Errorf("got %d; the providers got %d and %d attempts", res.status, len(p.provider.received()),
			len(second.received()))
	}
}

// TestStoredObjects: all calls that may name objects stored at a provider go to one upstream, and are sent once.
func TestStoredObjects(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	second, _ := p.addUpstream(`"weight":1000`)
	p.changeProject(`"policy":{"stateful":true}`)
	const body = `{"model":"m","input":"x","previous_response_id":"resp_1"}`
	p.provider.setScript(replyScript(500, `{"error":{}}`))
	for range 5 {
		if res := p.do("GET", "/v1/files", "", "Authorization", "Bearer "+p.token); res.status != 500 {
			t.Errorf("got %d %s", res.status, res.body)
		}
		if res := p.do("POST", "/v1/responses", body, p.jsonHeaders()...); res.status != 500 {
			t.Errorf("got %d %s", res.status, res.body)
		}
	}
	if n, m := len(p.provider.received()), len(second.received()); n != 10 || m != 0 {
		t.Errorf("the providers got %d and %d attempts", n, m)
	}
}

// TestBufferedStreamAlone: without another upstream, a verified stream that breaks is a plain error, and a good one
// comes complete, byte for byte.
func TestBufferedStreamAlone(t *testing.T) {
	t.Parallel()
	long := longStream()
	unmarked := append(slices.Clone(long[:58]), chatEvents(true)[2])
	big := []string{
		`data: {"choices":[{"delta":{"content":"` + strings.Repeat("x", maxBufferedStream) + `"}}]}` + "\n\n"}
	for _, c := range []struct {
		name   string
		script func(*providerConn, recordedRequest) bool
		env    map[string]string
		status int
		want   string // the stream if the status is 200, otherwise the error code
	}{
		{name: "whole", script: streamScript(long, len(long), endStream), status: 200,
			want: strings.Join(slices.Delete(slices.Clone(long), len(long)-2, len(long)-1), "")},
		{name: "in pieces", script: func(c *providerConn, _ recordedRequest) bool {
			c.beginSSE()
			for _, b := range []byte(strings.ReplaceAll(strings.Join(long, ""), "\n", "\r\n")) {
				if c.chunk(string(b)) != nil {
					return false
				}
			}
			return c.chunk("") == nil
		}, status: 200,
			want: strings.ReplaceAll(strings.Join(slices.Delete(slices.Clone(long), len(long)-2, len(long)-1), ""),
				"\n", "\r\n")},
		{name: "never marked", script: streamScript(unmarked, len(unmarked), endStream), status: 200,
			want: strings.Join(unmarked, "")},
		{name: "no end", script: streamScript(long, 40, endStream), status: 502, want: "upstream_unreachable"},
		{name: "cut", script: streamScript(long, 40, resetStream), status: 502, want: "upstream_unreachable"},
		{name: "stalled", script: streamScript(long, 40, stallStream),
			env: map[string]string{"STREAM_IDLE_TIMEOUT": "300ms"}, status: 504, want: "upstream_timeout"},
		{name: "error inside",
			script: streamScript([]string{long[0], "data: {\"error\":{\"message\":\"x\"}}\n\n"}, 2, endStream),
			status: 502, want: "upstream_unreachable"},
		{name: "too large", script: streamScript(big, 1, endStream), status: 502, want: "stream_too_large"},
		{name: "no memory", script: streamScript(big, 1, endStream),
			env: map[string]string{"BODY_MEMORY": "4MiB", "MAX_BODY_BYTES": "1MiB"}, status: 503,
			want: "body_memory_full"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, c.env)
			p.allowErrors = c.status == 503
			p.changeProject(`"routing":{"verified_streams":true}`)
			p.provider.setScript(c.script)
			res := p.chat(`"stream":true`)
			if res.err != nil || res.status != c.status || c.status == 200 && res.body != c.want ||
				c.status != 200 && res.errorCode() != c.want {
				t.Errorf("got %d %q, %v", res.status, clip(res.body, 500), res.err)
			}
			if row := p.lastCall(); row.Status != c.status || row.Attempts != 1 ||
				(row.Outcome == "ok") != (c.name == "whole" || c.name == "in pieces") {
				t.Errorf("the ledger has %+v", row)
			}
		})
	}
}

// TestBufferedStreamHeader: the client's header has priority over the project's setting, and other values of it are
// refused.
func TestBufferedStreamHeader(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	stream := func(mode string) testResponse {
		return p.do("POST", "/v1/chat/completions", chatBody(`"stream":true`),
			p.jsonHeaders("X-LLM-Proxy-Stream", mode)...)
	}
	if res := stream("yes"); res.status != 400 || len(p.provider.received()) != 0 {
		t.Errorf("an invalid header: got %d %s", res.status, res.body)
	}
	p.changeProject(`"routing":{"verified_streams":true}`)
	p.provider.setScript(streamScript(longStream(), 40, resetStream))
	if res := stream("plain"); res.status != 200 || res.err == nil {
		t.Errorf("a plain stream: got %d %v", res.status, res.err)
	}
}

// TestFailoverOtherAPIs: Anthropic's messages and OpenAI's responses have other events and other headers for keys.
// Each fails over within its API family.
func TestFailoverOtherAPIs(t *testing.T) {
	t.Parallel()
	event := func(name, rest string) string {
		return "event: " + name + "\ndata: {\"type\":\"" + name + "\"" + rest + "}\n\n"
	}
	messages := []string{event("message_start",
		`,"message":{"model":"claude-sonnet-4-5","usage":{"input_tokens":9,"output_tokens":1}}`), event("ping", ""),
		event("content_block_delta", `,"delta":{"text":"Hi"}`), event("message_delta", `,"usage":{"output_tokens":3}`),
		event("message_stop", "")}
	responses := []string{event("response.created", `,"response":{"model":"gpt-4o"}`),
		event("response.output_text.delta", `,"delta":"Hi"`),
		event("response.completed", `,"response":{"model":"gpt-4o","usage":{"input_tokens":9,"output_tokens":3}}`)}
	gemini := []string{`data: {"candidates":[{"content":{"parts":[{"text":"Hi"}]}}],"usageMetadata":` +
		`{"promptTokenCount":9,"candidatesTokenCount":1}}` + "\r\n\r\n",
		`data: {"candidates":[{"finishReason":"STOP"}],"usageMetadata":{"promptTokenCount":9,` +
			`"candidatesTokenCount":3}}` + "\r\n\r\n"}
	const geminiStream = "/v1beta/models/m:streamGenerateContent?alt=sse"
	overloaded := event("error", `,"error":{"type":"overloaded_error","message":"Overloaded"}`)
	for _, c := range []struct {
		path, provider, header string
		good                   []string
		script                 func(*providerConn, recordedRequest) bool
		verified               bool
		attempts               [2]int
	}{
		{path: "/v1/messages", provider: "anthropic", header: "X-Api-Key", good: messages,
			script: replyScript(529, `{"type":"error","error":{"type":"overloaded_error"}}`), attempts: [2]int{2, 1}},
		{path: "/v1/messages", provider: "anthropic", header: "X-Api-Key", good: messages,
			script: replyScript(429, `{"type":"error","error":{"type":"rate_limit_error"}}`,
				"anthropic-ratelimit-tokens-remaining: 0", "anthropic-ratelimit-tokens-reset: 2099-01-01T00:00:00Z"),
			attempts: [2]int{1, 1}},
		{path: "/v1/messages", provider: "anthropic", header: "X-Api-Key", good: messages,
			script: streamScript([]string{overloaded}, 1, endStream), attempts: [2]int{2, 1}},
		{path: "/v1/messages", provider: "anthropic", header: "X-Api-Key", good: messages,
			script: streamScript([]string{messages[0], messages[2], overloaded}, 3, endStream), verified: true,
			attempts: [2]int{2, 1}},
		{path: "/v1/messages", provider: "anthropic", header: "X-Api-Key", good: messages,
			script: streamScript(messages, 4, endStream), verified: true, attempts: [2]int{2, 1}},
		{path: "/v1/messages", provider: "anthropic", header: "X-Api-Key", good: messages,
			script: streamScript(messages, 3, resetStream), verified: true, attempts: [2]int{2, 1}},
		{path: geminiStream, provider: "google", header: "X-Goog-Api-Key", good: gemini,
			script: replyScript(503, `{"error":{"code":503,"status":"UNAVAILABLE"}}`), attempts: [2]int{2, 1}},
		{path: geminiStream, provider: "google", header: "X-Goog-Api-Key", good: gemini,
			script:   replyScript(429, `{"error":{"code":429,"status":"RESOURCE_EXHAUSTED"}}`),
			attempts: [2]int{1, 1}},
		{path: geminiStream, provider: "google", header: "X-Goog-Api-Key", good: gemini,
			script: streamScript([]string{"data: {\"error\":{\"code\":503,\"status\":\"UNAVAILABLE\"}}\n\n"}, 1,
				endStream), attempts: [2]int{2, 1}},
		{path: geminiStream, provider: "google", header: "X-Goog-Api-Key", good: gemini,
			script: streamScript(gemini, 1, resetStream), verified: true, attempts: [2]int{2, 1}},
		{path: geminiStream, provider: "google", header: "X-Goog-Api-Key", good: gemini,
			script: streamScript(gemini, 1, endStream), verified: true, attempts: [2]int{2, 1}},
		{path: "/v1/responses", provider: "azure", header: "Api-Key", good: responses,
			script: replyScript(500, `{"error":{}}`), attempts: [2]int{2, 1}},
		{path: "/v1/responses", provider: "azure", header: "Api-Key", good: responses,
			script: streamScript(responses, 2, resetStream), verified: true, attempts: [2]int{2, 1}},
		{path: "/v1/responses", provider: "azure", header: "Api-Key", good: responses,
			script: streamScript(append(responses[:1:1],
				event("response.failed", `,"response":{"error":{"code":"server_error"}}`)), 2, endStream),
			verified: true, attempts: [2]int{2, 1}},
	} {
		p := newTest(t, nil)
		p.changeUpstream(p.upstream, `"weight":0`)
		var providers [2]*fakeProvider
		for i := range providers {
			providers[i] = newFakeProvider(t)
			p.addUpstreamAt(providers[i], c.provider, fmt.Sprintf(`"priority":%d`, i))
		}
		providers[0].setScript(c.script)
		providers[1].setScript(streamScript(c.good, len(c.good), endStream))
		headers := p.jsonHeaders()
		if c.verified {
			headers = append(headers, "X-LLM-Proxy-Stream", "verified")
		}
		res := p.do("POST", c.path, `{"model":"m","max_tokens":9,"stream":true,"messages":[],"input":"x"}`, headers...)
		if want := strings.Join(c.good, ""); res.status != 200 || res.err != nil || res.body != want {
			t.Errorf("%s, verified %v: got %d %q, %v", c.path, c.verified, res.status, res.body, res.err)
		}
		if got := [2]int{len(providers[0].received()), len(providers[1].received())}; got != c.attempts ||
			len(p.provider.received()) != 0 {
			t.Errorf("%s: the providers got %v attempts, want %v", c.path, got, c.attempts)
		}
		for _, provider := range providers {
			if got := provider.lastRequest(t).header.Get(c.header); got != provider.key {
				t.Errorf("%s: %s is not the provider's own key", c.path, c.header)
			}
		}
		if row := p.lastCall(); row.Outcome != "ok" || row.OutputTokens != 3 || row.InputTokens != 9 {
			t.Errorf("%s: the ledger has %+v", c.path, row)
		}
	}
}

// TestBufferedStreamEnds: while a stream is buffered, a client that leaves ends the provider's call, and so does
// revoking the token.
func TestBufferedStreamEnds(t *testing.T) {
	t.Parallel()
	for what, end := range map[string]func(p *testProxy, leave func()){
		"client_gone": func(_ *testProxy, leave func()) { leave() },
		"revoked":     func(p *testProxy, _ func()) { p.manage("DELETE", "/manage/tokens/"+p.tokenID, "", 200, nil) },
	} {
		p := newTest(t, nil)
		p.changeProject(`"routing":{"verified_streams":true}`)
		sent, gone := make(chan struct{}), make(chan bool, 1)
		p.provider.setScript(streamScript(longStream(), 30, func(c *providerConn) bool {
			close(sent)
			gone <- c.waitClosed(hangTimeout)
			return false
		}))
		ctx, leave := context.WithCancel(t.Context())
		failed := make(chan error, 1)
		go func() { _, err := p.openStream(ctx, p.token, ""); failed <- err }()
		<-sent
		end(p, leave)
		if !<-gone || <-failed == nil {
			t.Errorf("%s: the stream continued", what)
		}
		leave()
		if row := p.lastCall(); row.ErrorCode != what || row.UsageSource == "none" {
			t.Errorf("%s: the ledger has %+v", what, row)
		}
	}
}

// chatOver makes a chat call over a client that keeps its connections. Anything but a complete 200 is an error.
func (p *testProxy) chatOver(client *http.Client, members ...string) {
	req, err := http.NewRequestWithContext(
		p.t.Context(), "POST", p.url+"/v1/chat/completions", strings.NewReader(chatBody(members...)))
	if err != nil {
		p.t.Error(err)
		return
	}
	req.Header = http.Header{"Authorization": {"Bearer " + p.token}, "Content-Type": {"application/json"}}
	res, err := client.Do(req)
	if err != nil {
		p.t.Error(err)
		return
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil || res.StatusCode != 200 {
		p.t.Errorf("got %d, %v", res.StatusCode, err)
	}
}

// TestSharesInParallel (LI15): three keys with the weights 1, 2 and 7 keep their shares of parallel calls. The others
// take over a dead key's share by weight, and it gets its share back when it recovers.
func TestSharesInParallel(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.changeUpstream(p.upstream, `"weight":1`)
	two, _ := p.addUpstream(`"weight":2`)
	seven, _ := p.addUpstream(`"weight":7`)
	providers := []*fakeProvider{p.provider, two, seven}
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 32}}
	defer client.CloseIdleConnections()
	shares := func(what string, calls int, want ...float64) {
		t.Helper()
		var before []int
		for _, provider := range providers {
			before = append(before, len(provider.received()))
		}
		var wait sync.WaitGroup
		for range 16 {
			wait.Go(func() {
				for range calls / 16 {
					p.chatOver(client)
				}
			})
		}
		wait.Wait()
		for i, provider := range providers {
			got := float64(len(provider.received())-before[i]) / float64(calls)
			t.Logf("%s: provider %d got %.3f of the calls, its share is %.3f", what, i, got, want[i])
			if d := got - want[i]; d > 0.04 || d < -0.04 {
				t.Errorf("%s: provider %d got %.3f of the calls, its share is %.3f", what, i, got, want[i])
			}
		}
	}
	const calls = 2400 // 0.04 is four standard deviations of the largest share
	shares("all healthy", calls, 0.1, 0.2, 0.7)
	seven.setScript(replyScript(401, `{}`))
	shares("one is dead", calls, 1./3, 2./3, 0)
	seven.setScript(chatScript)
	p.instance.health.reset(3, time.Now().UnixMilli())
	shares("it has recovered", calls, 0.1, 0.2, 0.7)
}

// A faultyPool plays several providers with random faults and records their requests, by call.
type faultyPool struct {
	mu       sync.Mutex
	attempts map[string]int
	settled  map[string]int // the attempt whose answer could reach the client
	resent   []string       // calls that were sent again after that
}

// begin counts an attempt and returns its number within its call.
func (r *faultyPool) begin(call string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.attempts[call]++
	if r.settled[call] > 0 {
		r.resent = append(r.resent, call)
	}
	return r.attempts[call]
}

func (r *faultyPool) settle(call string, attempt int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settled[call] = attempt
}

// answer answers an attempt in a way that depends on its call's name and its number only. A good answer contains
// the call's name and, as usage, its number.
func (r *faultyPool) answer(c *providerConn, req recordedRequest) bool {
	call := between(req.body, `"user":"`, `"`)
	attempt := r.begin(call)
	var number int
	_, _ = fmt.Sscanf(call, "call-%d", &number)
	h := fnv.New32a()
	fmt.Fprint(h, call, attempt)
	what := int(h.Sum32()>>3) % 16
	stream, verified := strings.Contains(req.body, `"stream":true`), strings.HasSuffix(call, "-verified")
	bodyOf := func(text string) string {
		text = strings.ReplaceAll(text, `"Hi"`, `"`+call+`"`)
		return strings.ReplaceAll(text, `"completion_tokens":3`, fmt.Sprintf(`"completion_tokens":%d`, 1000+number))
	}
	var events []string
	for _, e := range chatEvents(true) {
		events = append(events, bodyOf(e))
	}
	switch {
	case what == 0:
		return c.reply(429, `{"error":{}}`)
	case what == 1:
		return c.reply(500, `{"error":{}}`)
	case what == 2:
		return c.reply(401, `{"error":{}}`)
	case what == 3:
		return c.reset()
	case what == 4 && stream:
		return streamScript(nil, 0, func(c *providerConn) bool {
			c.waitClosed(20 * time.Millisecond)
			return false
		})(c, req)
	case what == 5:
		return c.reply(503, `{"error":{}}`, "Retry-After: 1")
	case what == 6 && stream:
		return streamScript([]string{"data: {\"error\":{\"message\":\"x\"}}\n\n"}, 1, endStream)(c, req)
	case what <= 8 && stream: // break after two events
		if !verified {
			r.settle(call, attempt)
		}
		return streamScript(events, 2, resetStream)(c, req)
	case what == 9:
		r.settle(call, attempt)
		return c.reply(400, `{"error":{"code":"invalid_value"}}`)
	case what == 10:
		return c.reply(402, `{}`)
	}
	r.settle(call, attempt)
	if stream {
		return streamScript(events, len(events), endStream)(c, req)
	}
	return c.reply(200, bodyOf(chatResponseBody))
}

// callFaultyPool makes call i, checks that the client gets its own answer only, and reports whether the answer is
// complete.
func (p *testProxy) callFaultyPool(i int) (complete bool) {
	call, headers := fmt.Sprintf("call-%d", i), p.jsonHeaders()
	if i%3 == 2 {
		call += "-verified"
		headers = append(headers, "X-LLM-Proxy-Stream", "verified")
	}
	res := p.do("POST", "/v1/chat/completions", chatBody(fmt.Sprintf(`"stream":%v`, i%3 > 0),
		`"stream_options":{"include_usage":true}`, `"user":"`+call+`"`), headers...)
	if res.status != 200 || strings.HasPrefix(res.body, `data: {"error"`) { // the last upstream's error is passed on
		return false
	}
	own, roles := strings.Count(res.body, `"`+call+`"`), strings.Count(res.body, `"role":"assistant"`)
	if own > 1 || roles > 1 || res.err == nil && own+roles != 2 { // a reset may discard bytes sent before it
		p.t.Errorf("%s: not exactly its own answer: %q", call, res.body)
	}
	if i%3 == 2 && !(res.err == nil && strings.HasSuffix(res.body, "data: [DONE]\n\n")) {
		p.t.Errorf("%s: a verified stream broke: %q, %v", call, res.body, res.err)
	}
	return res.err == nil
}

// TestRandomFaults: whatever faults four providers have, each call gets its own answer at most once, is not sent
// again after a part of the answer has left, and has one row with all its attempts and the right bill.
func TestRandomFaults(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"FIRST_EVENT_TIMEOUT": "1m"})
	r := &faultyPool{attempts: map[string]int{}, settled: map[string]int{}}
	p.provider.setScript(r.answer)
	providers := []*fakeProvider{p.provider}
	for i := range 3 {
		provider, _ := p.addUpstream(fmt.Sprintf(`"priority":%d`, i/2))
		provider.setScript(r.answer)
		providers = append(providers, provider)
	}
	const calls = 320
	var mu sync.Mutex
	billed := map[int64]bool{} // output tokens of complete answers; each call has its own number
	var wait sync.WaitGroup
	for worker := range 16 {
		wait.Go(func() {
			for i := worker; i < calls; i += 16 {
				for seq := range int64(4) { // keep all keys healthy: otherwise calls meet few faults
					p.instance.health.reset(seq+1, time.Now().UnixMilli())
				}
				if p.callFaultyPool(i) {
					mu.Lock()
					billed[int64(1000+i)] = true
					mu.Unlock()
				}
			}
		})
	}
	wait.Wait()
	p.checkKeysApart(providers...)
	rows := p.ledger()
	if len(rows) != calls {
		t.Errorf("%d rows for %d calls", len(rows), calls)
	}
	r.checkLedger(t, rows, billed)
	for seq := range int64(4) {
		if n := p.instance.health.forUpstream(seq+1, "").running.Load(); n != 0 {
			t.Errorf("upstream %d still has %d running calls", seq+1, n)
		}
	}
}

// checkLedger compares the ledger with the attempts that the providers saw and the answers that clients got, which
// are named by their output tokens.
func (r *faultyPool) checkLedger(t *testing.T, rows []requestEntry, billed map[int64]bool) {
	t.Helper()
	if len(r.resent) > 0 {
		t.Errorf("calls were sent again after an answer: %v", r.resent)
	}
	sent := 0
	for call, n := range r.attempts {
		if sent += n; n > maxAttempts {
			t.Errorf("%s was sent %d times", call, n)
		}
	}
	for _, row := range rows {
		if sent -= row.Attempts; row.Outcome == "ok" && !billed[row.OutputTokens] {
			t.Errorf("no client got this answer, or it was billed twice: %+v", row)
		}
		if row.Outcome == "ok" {
			delete(billed, row.OutputTokens)
		}
		if row.Attempts > 1 && len(row.AttemptLog) != row.Attempts {
			b, _ := json.Marshal(row.AttemptLog)
			t.Errorf("%d attempts, and the log %s", row.Attempts, b)
		}
	}
	if len(billed) > 0 {
		t.Errorf("%d answers were delivered and not billed: %v", len(billed), billed)
	}
	if sent != 0 {
		t.Errorf("the providers saw %d attempts more than are on record", sent)
	}
}

// A silentHost accepts connections and never sends a byte: a TLS handshake with it hangs.
type silentHost struct {
	url   string
	calls atomic.Int64
}

func newSilentHost(t *testing.T) *silentHost {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &silentHost{url: "https://" + l.Addr().String()}
	var serving sync.WaitGroup
	serving.Go(func() {
		var open []net.Conn
		for {
			conn, err := l.Accept()
			if err != nil {
				break
			}
			h.calls.Add(1)
			open = append(open, conn)
		}
		for _, conn := range open {
			conn.Close()
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	return h
}

// addSilentUpstream adds an upstream at a silent host to the project, with priority over the test's own.
func (p *testProxy) addSilentUpstream(h *silentHost, fields string) string {
	p.t.Helper()
	id := p.addUpstreamAt(&fakeProvider{url: h.url, key: "sk-silent-0123456789"}, providerCompatible, fields)
	p.changeUpstream(p.upstream, `"priority":1`)
	return id
}

// TestConnectTimeout: if an upstream has no connection within its connect_ms, the call goes to the next at once, and
// so do all calls until the upstream is probed.
func TestConnectTimeout(t *testing.T) {
	t.Parallel()
	for _, stream := range []bool{false, true} {
		p, silent := newTest(t, nil), newSilentHost(t)
		id := p.addSilentUpstream(silent, `"connect_ms":200`)
		start, elapsed := time.Now(), stopwatch(t)
		if res := p.chat(fmt.Sprintf(`"stream":%v`, stream)); res.status != 200 || res.err != nil {
			t.Fatalf("got %d %s, %v", res.status, res.body, res.err)
		}
		if d := time.Since(start); d < 200*time.Millisecond || elapsed() > connectTimeout {
			t.Errorf("it took %v", d)
		}
		row := p.lastCall()
		if row.UpstreamID != p.upstream || row.Attempts != 2 || row.AttemptLog[0].Upstream != id ||
			row.AttemptLog[0].Error != "could not be reached in time" || row.OutputTokens != 3 {
			t.Errorf("the ledger has %+v", row)
		}
		if h := p.healthOf(id); h.State != "open" || !strings.Contains(h.Reason, "could not be reached in time") {
			t.Errorf("the key is %+v", h)
		}
		before := silent.calls.Load()
		// No probe, even on a slow machine.
		p.instance.health.forUpstream(2, "").until.Store(time.Now().Add(time.Hour).UnixMilli())
		if res := p.chat(); res.status != 200 || silent.calls.Load() != before || p.lastCall().Attempts != 1 {
			t.Errorf("the next call: got %d, after %d attempts", res.status, p.lastCall().Attempts)
		}
	}
}

// TestConnectTimeoutAlone: without another upstream, the client gets an error that says so, and the ledger has a call
// that did not reach the provider.
func TestConnectTimeoutAlone(t *testing.T) {
	t.Parallel()
	p, silent := newTest(t, nil), newSilentHost(t)
	id := p.addSilentUpstream(silent, `"connect_ms":200`)
	p.changeProject(`"policy":{"stateful":true}`)
	p.manage("DELETE", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, "", 200, nil)
	for what, call := range map[string]func() testResponse{
		"unary":  func() testResponse { return p.chat() },
		"stream": func() testResponse { return p.chat(`"stream":true`) },
		"verified": func() testResponse {
			return p.do("POST", "/v1/chat/completions", chatBody(`"stream":true`),
				p.jsonHeaders("X-LLM-Proxy-Stream", "verified")...)
		},
		"upload": func() testResponse {
			return p.do("POST", "/v1/files", uploadForm, "Authorization", "Bearer "+p.token,
				"Content-Type", "multipart/form-data; boundary=b")
		},
	} {
		elapsed := stopwatch(t)
		p.expectRefused(what, call(), 504, "upstream_timeout")
		if d := elapsed(); d > connectTimeout {
			t.Errorf("%s: it took %v", what, d)
		}
		if row := p.lastCall(); row.Outcome != "upstream_error" || row.Attempts != 1 || row.UsageSource != "none" ||
			row.UpstreamID != id {
			t.Errorf("%s: the ledger has %+v", what, row)
		}
	}
	if h := p.healthOf(id); h.State != "open" {
		t.Errorf("the key is %+v", h)
	}
}

// TestConnectTimeoutIsNoMore: connect_ms does not limit the answer once there is a connection, new or reused, with
// HTTP/1.1 or shared by calls over HTTP/2. The provider sleeps because the elapsed time is what the test is about.
func TestConnectTimeoutIsNoMore(t *testing.T) {
	t.Parallel()
	for _, http2 := range []bool{false, true} {
		var protocols, bodies sync.Map
		slow := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			protocols.Store(r.Proto, true)
			body, _ := io.ReadAll(r.Body)
			bodies.Store(string(body), true)
			time.Sleep(300 * time.Millisecond)
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, chatResponseBody[:20])
			_ = http.NewResponseController(w).Flush()
			time.Sleep(300 * time.Millisecond)
			_, _ = io.WriteString(w, chatResponseBody[20:])
		}))
		slow.EnableHTTP2 = http2
		slow.StartTLS()
		t.Cleanup(slow.Close)
		p := newTest(t, nil)
		roots := x509.NewCertPool()
		roots.AddCert(slow.Certificate())
		p.instance.transport.TLSClientConfig = &tls.Config{RootCAs: roots}
		p.replaceBaseURL(slow.URL)
		p.changeUpstream(p.upstream, `"connect_ms":200`)
		for i := range 2 { // the second time over open connections
			var calls sync.WaitGroup
			for j := range 3 {
				calls.Go(func() {
					seed := fmt.Sprintf(`"seed":%d`, 10*i+j)
					res := p.chat(seed)
					for res.status == 504 { // a busy machine may be too slow to connect
						if _, arrived := bodies.Load(chatBody(seed)); arrived {
							break
						}
						res = p.chat(seed)
					}
					if res.status != 200 || res.body != chatResponseBody {
						t.Errorf("HTTP/2 %v: got %d %s, %v", http2, res.status, res.body, res.err)
					}
				})
			}
			calls.Wait()
		}
		if _, ok := protocols.Load("HTTP/2.0"); ok != http2 {
			t.Errorf("the provider got calls over HTTP/2: %v, want %v", ok, http2)
		}
	}
}

// TestConnectTimeoutAfterADeadConnection: an open connection that turns out to be dead is replaced, and connect_ms
// applies to the new one.
func TestConnectTimeoutAfterADeadConnection(t *testing.T) {
	t.Parallel()
	certified := httptest.NewUnstartedServer(nil) // for its certificate
	certified.StartTLS()
	t.Cleanup(certified.Close)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		raw, err := l.Accept()
		if err != nil {
			return
		}
		conn := tls.Server(raw, &tls.Config{Certificates: certified.TLS.Certificates})
		first := &providerConn{Conn: conn}
		_, _ = conn.Read(make([]byte, 64<<10)) // a request without a body, in one piece
		first.reply(200, `{"id":"m","object":"model"}`)
		_, _ = conn.Read(make([]byte, 64<<10)) // the next has no answer
		raw.Close()
		if silent, err := l.Accept(); err == nil { // and the next connection no handshake
			_, _ = io.Copy(io.Discard, silent) // until the transport gives it up
			silent.Close()
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	p := newTest(t, nil)
	roots := x509.NewCertPool()
	roots.AddCert(certified.Certificate())
	p.instance.transport.TLSClientConfig = &tls.Config{RootCAs: roots}
	p.instance.transport.TLSHandshakeTimeout = 3 * time.Second // so that the test does not take longer
	p.replaceBaseURL("https://" + l.Addr().String())
	p.changeUpstream(p.upstream, `"connect_ms":500`)
	get := func() testResponse { return p.do("GET", "/v1/models/m", "", "Authorization", "Bearer "+p.token) }
	if res := get(); res.status != 200 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	start, elapsed := time.Now(), stopwatch(t)
	p.expectRefused("after the connection died", get(), 504, "upstream_timeout")
	if d := time.Since(start); d < 500*time.Millisecond || elapsed() > 2500*time.Millisecond {
		t.Errorf("it took %v", d)
	}
}

// TestResponseTimeout: if an answer in one piece has not begun within the upstream's answer_ms, the call goes to
// another upstream.
func TestResponseTimeout(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.changeUpstream(p.upstream, `"answer_ms":300`)
	p.provider.setScript(stallScript)

	start := time.Now() // alone
	if res := p.chat(); res.status != 504 || res.errorCode() != "upstream_timeout" {
		t.Errorf("alone: got %d %s", res.status, res.body)
	}
	if d := time.Since(start); d < 300*time.Millisecond || d > 10*time.Second {
		t.Errorf("alone it took %v", d)
	}
	if row := p.lastCall(); row.Outcome != "upstream_error" || row.Attempts != 1 || row.UsageSource != "estimated" {
		t.Errorf("alone: the ledger has %+v", row)
	}

	second, id := p.addUpstream(`"priority":1`)
	if res := p.chat(); res.status != 200 || res.body != chatResponseBody {
		t.Errorf("got %d %s", res.status, res.body)
	}
	row := p.lastCall()
	if row.UpstreamID != id || row.Attempts != 2 || row.AttemptLog[0].Error != "did not answer in time" ||
		row.AttemptLog[0].MS < 300 || row.AttemptLog[0].MS > 10_000 {
		t.Errorf("the ledger has %+v", row)
	}
	if h := p.healthOf(p.upstream); h.State != "ready" { // one failure opens no breaker
		t.Errorf("the key is %+v", h)
	}

	// The last upstream's own answer_ms applies, too.
	p.changeUpstream(id, `"answer_ms":300`)
	second.setScript(stallScript)
	if res := p.chat(); res.status != 504 || res.errorCode() != "upstream_timeout" {
		t.Errorf("with two that hang: got %d %s", res.status, res.body)
	}
}

// TestResponseTimeoutIsNoMore: answer_ms does not limit streams, uploads, and answers that have begun. The provider
// sleeps because the elapsed time is what the test is about.
func TestResponseTimeoutIsNoMore(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.changeUpstream(p.upstream, `"answer_ms":300`)
	p.changeProject(`"policy":{"stateful":true}`)
	later := func(script func(*providerConn, recordedRequest) bool) func(*providerConn, recordedRequest) bool {
		return func(c *providerConn, r recordedRequest) bool {
			time.Sleep(600 * time.Millisecond)
			return script(c, r)
		}
	}
	p.provider.setScript(later(chatScript))
	if res := p.chat(`"stream":true`); res.status != 200 || res.body != strings.Join(chatEvents(false), "") {
		t.Errorf("a stream that begins later: got %d %s", res.status, res.body)
	}
	p.provider.setScript(later(replyScript(200, `{"id":"file-1"}`)))
	if res := p.do("POST", "/v1/files", uploadForm, "Authorization", "Bearer "+p.token,
		"Content-Type", "multipart/form-data; boundary=b"); res.status != 200 {
		t.Errorf("an upload: got %d %s", res.status, res.body)
	}
	slowBody := func(c *providerConn, _ recordedRequest) bool { // the head in time, the rest later
		_, _ = fmt.Fprintf(c, "HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n",
			len(chatResponseBody))
		time.Sleep(600 * time.Millisecond)
		_, err := io.WriteString(c, chatResponseBody)
		return err == nil
	}
	p.provider.setScript(slowBody)
	if res := p.chat(); res.status != 200 || res.body != chatResponseBody {
		t.Errorf("an answer that began in time: got %d %s", res.status, res.body)
	}
}

// afterScript waits before it answers. The elapsed time is what these tests are about.
func afterScript(
	wait time.Duration, script func(*providerConn, recordedRequest) bool,
) func(*providerConn, recordedRequest) bool {
	return func(c *providerConn, r recordedRequest) bool {
		if c.waitClosed(wait) {
			return false
		}
		_ = c.SetReadDeadline(time.Time{}) // the connection may serve another call
		return script(c, r)
	}
}

// TestSpareIsNoHarm: with a spare, a call never fails where one of the upstreams alone would have answered. It waits
// as long for an answer in one piece as without a spare, and then goes on. If a stream's first event is late, the
// spare gets the call; if that fails, the first upstream has it again, for as long as it would have had it alone.
func TestSpareIsNoHarm(t *testing.T) {
	t.Parallel()
	refuse, late := replyScript(401, `{}`), 900*time.Millisecond
	good := func(c *providerConn, r recordedRequest) bool { return chatScript(c, r) }
	for _, c := range []struct {
		name          string
		stream        bool
		mode          string // X-LLM-Proxy-Stream
		first, second func(*providerConn, recordedRequest) bool
		attempts      [2]int
		upstream      string // fields of the first
	}{
		{name: "late in one piece", first: afterScript(late, good), second: good, attempts: [2]int{1, 0}},
		{name: "hangs in one piece", first: stallScript, second: good, attempts: [2]int{1, 1}},
		{name: "hangs, then late", first: stallScript, second: afterScript(late, good), attempts: [2]int{1, 1}},
		{name: "hangs with a long answer_ms", upstream: `"answer_ms":60000`, first: stallScript, second: good,
			attempts: [2]int{1, 1}},
		{name: "late stream, and a good spare", stream: true, first: afterScript(late, good), second: good,
			attempts: [2]int{1, 1}},
		{name: "late stream, and a refused spare", stream: true, first: afterScript(late, good), second: refuse,
			attempts: [2]int{2, 1}},
		{name: "late stream, and a spare that hangs", stream: true, first: afterScript(late, good),
			second: stallScript, attempts: [2]int{2, 1}},
		{name: "late verified stream, and a refused spare", stream: true, mode: "verified",
			first: afterScript(late, good), second: refuse, attempts: [2]int{2, 1}},
		{name: "a stream with pauses, verified, and a refused spare", stream: true, mode: "verified",
			first: streamScript(chatEvents(true), 2, func(c *providerConn) bool {
				if c.waitClosed(late) {
					return false
				}
				return streamRest(c, chatEvents(true)[2:])
			}), second: refuse, attempts: [2]int{2, 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"UPSTREAM_TIMEOUT": "3s", "FIRST_EVENT_TIMEOUT": "300ms"})
			second, _ := p.addUpstream(`"priority":1`)
			p.provider.setScript(c.first)
			second.setScript(c.second)
			if c.upstream != "" {
				p.changeUpstream(p.upstream, c.upstream)
			}
			headers, want := p.jsonHeaders(), chatResponseBody
			if c.mode != "" {
				headers = append(headers, "X-LLM-Proxy-Stream", c.mode)
			}
			if c.stream {
				want = strings.Join(chatEvents(false), "")
			}
			body := chatBody(fmt.Sprintf(`"stream":%v`, c.stream))
			res := p.do("POST", "/v1/chat/completions", body, headers...)
			if res.status != 200 || res.body != want || res.err != nil {
				t.Errorf("got %d %s, %v", res.status, res.body, res.err)
			}
			if got := [2]int{len(p.provider.received()), len(second.received())}; got != c.attempts {
				t.Errorf("the providers got %v attempts, want %v", got, c.attempts)
			}
			if row := p.lastCall(); row.Outcome != "ok" || row.Attempts != c.attempts[0]+c.attempts[1] {
				t.Errorf("the ledger has %+v", row)
			}
		})
	}
}

// streamRest sends further events and the end of a stream.
func streamRest(c *providerConn, events []string) bool {
	for _, e := range events {
		if c.chunk(e) != nil {
			return false
		}
	}
	return endStream(c)
}

// TestNoRealAlternative: a fallback model that no upstream serves now is no reason to give up a late stream.
func TestNoRealAlternative(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"FIRST_EVENT_TIMEOUT": "300ms"})
	p.changeProject(`"routing":{"fallbacks":[{"model":"*","to":"llama"}]}`)
	p.changeUpstream(p.upstream, `"models":["gpt*"]`)
	p.provider.setScript(afterScript(900*time.Millisecond, chatScript))
	if res := p.chat(`"stream":true`); res.status != 200 || len(p.provider.received()) != 1 {
		t.Errorf("got %d %s after %d attempts", res.status, res.body, len(p.provider.received()))
	}
}

// TestSameKeyNeedsCandidates: a key is asked again only if another upstream could have had the call. One of another
// API, for other models, or without weight, and a fallback model, are none.
func TestSameKeyNeedsCandidates(t *testing.T) {
	t.Parallel()
	for name, other := range map[string]func(*testProxy){
		"another API": func(p *testProxy) {
			p.addUpstreamAt(newFakeProvider(t), providerAnthropic, `"priority":1`)
		},
		"another model":    func(p *testProxy) { p.addUpstream(`"models":["llama*"]`) },
		"weight 0":         func(p *testProxy) { p.addUpstream(`"weight":0`) },
		"a fallback model": func(p *testProxy) { p.changeProject(`"routing":{"fallbacks":[{"model":"*","to":"x"}]}`) },
	} {
		for what, script := range map[string]func(*providerConn, recordedRequest) bool{
			"500": replyScript(500, `{}`), "reset": resetScript,
			"429 for a second": replyScript(429, `{}`, "Retry-After: 1"),
			"503 for a second": replyScript(503, `{}`, "Retry-After: 1"),
		} {
			t.Run(name+", "+what, func(t *testing.T) {
				t.Parallel()
				p := newTest(t, nil)
				other(p)
				p.provider.setScript(script)
				p.chat()
				asked := 0
				for _, r := range p.provider.received() {
					if between(r.body, `"model":"`, `"`) == "gpt-4o-mini" {
						asked++
					}
				}
				if asked != 1 {
					t.Errorf("the provider was asked %d times", asked)
				}
			})
		}
	}
}

// TestUnsentCallsCountNowhere: a call that was reserved in an upstream's own limits and not sent there leaves them as
// they were.
func TestUnsentCallsCountNowhere(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(replyScript(503, `{}`, "Retry-After: 20"))
	p.addUpstreamAt(p.provider, providerCompatible, `"priority":1,"requests_per_minute":1`)
	host := strings.TrimPrefix(p.provider.url, "http://")
	budget := p.instance.health.budgetFor(host)
	budget.credit.Store(-1 << 30) // an outage has used it up
	waitForMinute(10)
	if res := p.chat(); res.status != 503 || p.lastCall().Attempts != 1 {
		t.Errorf("without retry budget: got %d after %d attempts", res.status, p.lastCall().Attempts)
	}
	if h := p.instance.health.forUpstream(2, ""); h.requests != 0 || h.tokens != 0 {
		t.Errorf("a call that was not sent counts as %d requests, %d tokens", h.requests, h.tokens)
	}
	elsewhere, _ := p.addUpstream(`"priority":2`) // its host has retry budget
	if res := p.chat(); res.status != 200 || len(elsewhere.received()) != 1 {
		t.Errorf("with another host: got %d %s", res.status, res.body)
	}

	p = newTest(t, nil)
	p.changeUpstream(p.upstream, `"requests_per_minute":3`)
	p.manage("PATCH", "/manage/tokens/"+p.tokenID,
		`{"policy":{"limits":[{"count":"requests","max":1,"per":"day"}]}}`, 200, nil)
	waitForMinute(10)
	for range 5 {
		p.chat()
	}
	if h := p.instance.health.forUpstream(1, ""); h.requests != 1 {
		t.Errorf("one call and four refused ones count as %d requests of the key", h.requests)
	}
}

// TestProbeSooner: if a call fails otherwise, a key whose breaker is open gets it before its pause is over, but at
// most once a second.
func TestProbeSooner(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	second, _ := p.addUpstream(`"priority":1`)
	second.setScript(replyScript(503, `{}`, "Retry-After: 20"))
	h, now := p.instance.health.forUpstream(1, ""), time.Now().UnixMilli()
	open := func(since int64) {
		h.recordFailure(now-since, now-since, true, "down")
		h.until.Store(now + hourMS)
	}
	open(0)
	if res := p.chat(); res.status != 503 || len(p.provider.received()) != 0 {
		t.Errorf("just after it failed: got %d, the key got %d attempts", res.status, len(p.provider.received()))
	}
	p.instance.health.reset(1, now-10_000)
	p.instance.health.reset(2, now-10_000)
	open(2 * breakerMinPause)
	if res := p.chat(); res.status != 200 || len(p.provider.received()) != 1 {
		t.Errorf("later: got %d %s", res.status, res.body)
	}
	if h := p.healthOf(p.upstream); h.State != "ready" {
		t.Errorf("the key that has answered is %+v", h)
	}
}

// TestBilledCallsOnce: a call that is billed by the picture or by the sound is not sent again if its provider may have
// run it, and is on record as what was reserved. It is sent again if the provider cannot have begun, or says that the
// call failed.
func TestBilledCallsOnce(t *testing.T) {
	t.Parallel()
	const boundary = "multipart/form-data; boundary=b"
	form := strings.Replace(uploadForm, "--b--", "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n"+
		"whisper-1\r\n--b--", 1)
	calls := []struct {
		path, contentType, body string
		output                  int64 // what is reserved
	}{
		{"/v1/images/generations", "application/json", `{"model":"gpt-image-1","prompt":"x","n":2}`, 2 * assumedOutput},
		{"/v1/images/edits", "application/json", `{"model":"gpt-image-1","prompt":"a cat"}`, assumedOutput},
		{"/v1/audio/speech", "application/json", `{"model":"tts-1","input":"Hello","voice":"x"}`, 0},
		{"/v1/audio/transcriptions", boundary, form, assumedOutput},
	}
	good := replyScript(200, `{"created":1,"usage":{"input_tokens":9,"output_tokens":3,"total_tokens":12}}`)
	stall := func(p *testProxy) {
		p.changeUpstream(p.upstream, `"answer_ms":300`)
		p.provider.setScript(stallScript)
	}
	script := func(s func(*providerConn, recordedRequest) bool) func(*testProxy) {
		return func(p *testProxy) { p.provider.setScript(s) }
	}
	for _, c := range []struct {
		name     string
		set      func(*testProxy)
		attempts [2]int
		status   int
	}{
		{"cut", script(resetScript), [2]int{1, 0}, 502},
		{"no answer in time", stall, [2]int{1, 0}, 504},
		{"a gateway that waited", script(replyScript(504, `{}`)), [2]int{1, 0}, 504},
		{"a gateway that lost it", script(replyScript(502, `{}`)), [2]int{1, 0}, 502},
		{"too many", script(replyScript(429, `{}`)), [2]int{1, 1}, 200},
		{"refused", script(replyScript(401, `{}`)), [2]int{1, 1}, 200},
		{"failed", script(replyScript(500, `{}`)), [2]int{2, 1}, 200},
		{"failed with status 200", script(replyScript(200, `{"error":{"code":500}}`)), [2]int{2, 1}, 200},
		{"no credit, with status 200", script(replyScript(200, `{"error":{"code":"insufficient_quota"}}`)),
			[2]int{1, 1}, 200},
		{"no connection", func(p *testProxy) {
			closed, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			closed.Close()
			p.replaceBaseURL("http://" + closed.Addr().String())
		}, [2]int{0, 1}, 200},
		{"no handshake", func(p *testProxy) {
			p.replaceBaseURL("https" + strings.TrimPrefix(p.provider.url, "http"))
		}, [2]int{0, 1}, 200},
	} {
		for _, call := range calls {
			t.Run(c.name+", "+call.path, func(t *testing.T) {
				t.Parallel()
				p := newTest(t, nil)
				second, _ := p.addUpstream(`"priority":1`)
				second.setScript(good)
				c.set(p)
				res := p.do("POST", call.path, call.body,
					"Authorization", "Bearer "+p.token, "Content-Type", call.contentType)
				if res.status != c.status {
					t.Errorf("got %d %s", res.status, res.body)
				}
				if got := [2]int{len(p.provider.received()), len(second.received())}; got != c.attempts {
					t.Errorf("the providers got %v attempts, want %v", got, c.attempts)
				}
				row := p.lastCall()
				if c.status != 200 && (row.UsageSource != "estimated" || row.InputTokens == 0 ||
					row.OutputTokens != call.output || row.Outcome != "upstream_error") {
					t.Errorf("the ledger has %+v", row)
				}
				if noRetry := res.header.Get("X-Should-Retry") == "false"; strings.HasPrefix(c.name, "a gateway") ==
					noRetry && c.status != 200 {
					t.Errorf("SDKs are told not to retry: %v", noRetry)
				}
			})
		}
	}
}

// TestBilledCallLeft: a picture whose client leaves, or that takes too long, is on record as what was reserved. One
// that is streamed is not given to a spare because it is late.
func TestBilledCallLeft(t *testing.T) {
	t.Parallel()
	const path, body = "/v1/images/generations", `{"model":"gpt-image-1","prompt":"a cat","stream":true}`
	p := newTest(t, map[string]string{"UPSTREAM_TIMEOUT": "2s", "FIRST_EVENT_TIMEOUT": "300ms"})
	second, _ := p.addUpstream(`"priority":1`)
	events := []string{
		`data: {"type":"image_generation.completed","usage":{"input_tokens":9,"output_tokens":3}}` + "\n\n"}
	p.provider.setScript(afterScript(900*time.Millisecond, streamScript(events, 1, endStream)))
	if res := p.do("POST", path, body, p.jsonHeaders()...); res.status != 200 || res.body != events[0] {
		t.Errorf("a late stream: got %d %s", res.status, res.body)
	}
	p.provider.setScript(stallScript)
	if res := p.do("POST", path, body, p.jsonHeaders()...); res.status != 504 || len(second.received()) != 0 {
		t.Errorf("one that hangs: got %d %s, and the spare was asked %d times",
			res.status, res.body, len(second.received()))
	}
	if row := p.lastCall(); row.UsageSource != "estimated" || row.OutputTokens != assumedOutput {
		t.Errorf("one that hangs: the ledger has %+v", row)
	}
	ctx, leave := context.WithCancel(t.Context())
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { leave(); return stallStream(c) })
	req, err := http.NewRequestWithContext(ctx, "POST", p.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"Authorization": {"Bearer " + p.token}, "Content-Type": {"application/json"}}
	if res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req); err == nil {
		res.Body.Close()
	}
	if row := p.lastCall(); row.Outcome != "client_gone" || row.UsageSource != "estimated" ||
		row.OutputTokens != assumedOutput {
		t.Errorf("one whose client has left: the ledger has %+v", row)
	}
}

// strictScript refuses a body with stream_options by an answer, and answers others well.
func strictScript(status int, refusal string) func(*providerConn, recordedRequest) bool {
	return func(c *providerConn, r recordedRequest) bool {
		if strings.Contains(r.body, "stream_options") {
			return c.reply(status, refusal)
		}
		return chatScript(c, r)
	}
}

// TestStreamOptionsRefused: if a provider refuses the stream_options that the proxy adds, in whatever words, the call
// is sent again without them, and later ones are from the start. The client gets its stream, and usage is estimated.
func TestStreamOptionsRefused(t *testing.T) {
	t.Parallel()
	for name, refusal := range map[string]struct {
		status int
		body   string
	}{
		"OpenAI": {400,
			`{"error":{"message":"Unrecognized request argument supplied: stream_options","param":null}}`},
		"param":         {400, `{"error":{"message":"Unsupported.","param":"stream_options.include_usage"}}`},
		"pydantic":      {422, `{"detail":[{"type":"extra_forbidden","loc":["body","stream_options"]}]}`},
		"without names": {422, `{"detail":"Extra inputs are not permitted"}`},
		"unknown field": {400, `{"error":{"message":"Request has an unknown field"}}`},
		"in words":      {400, `{"message":"Stream options are not supported by this model"}`},
		"camel case":    {400, `{"message":"streamOptions: not allowed"}`},
		"plain text":    {400, `json: unknown field "stream_options"`},
		"a 500":         {500, `create() got an unexpected keyword argument 'stream_options'`},
		"a 501":         {501, `include_usage is not implemented`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			p.provider.setScript(strictScript(refusal.status, refusal.body))
			want := strings.Join(chatEvents(false), "")
			for i, attempts := range []int{2, 1, 1} {
				res := p.chat(`"stream":true`)
				row := p.lastCall()
				if res.status != 200 || res.body != want || row.Attempts != attempts ||
					row.UsageSource != "estimated" || row.Outcome != "ok" || row.OutputTokens == 0 {
					t.Errorf("call %d: got %d %s, and the ledger has %+v", i, res.status, res.body, row)
				}
				if h := p.healthOf(p.upstream); h.State != "ready" {
					t.Errorf("the key is %+v", h)
				}
			}
			p.changeUpstream(p.upstream, `"note":"updated"`)
			p.provider.setScript(chatScript)
			if res := p.chat(`"stream":true`); res.body != want || p.lastCall().UsageSource != "exact" {
				t.Errorf("after the upstream was changed: got %d %s", res.status, res.body)
			}
		})
	}
}

// TestStreamOptionsNotRefused: other errors are not about the added field: the call is sent once, or once more if the
// error may be about that field, and nothing is remembered.
func TestStreamOptionsNotRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		status   int
		body     string
		attempts int
	}{
		"another field":        {400, `{"error":{"message":"Unknown parameter: 'x'.","param":"x"}}`, 1},
		"a bad value":          {400, `{"error":{"message":"Invalid value","param":"messages"}}`, 1},
		"too many":             {429, `{"error":{"message":"stream_options"}}`, 1},
		"refused":              {401, `{"error":{"message":"stream_options"}}`, 1},
		"the client's mistake": {400, `{"detail":"Extra inputs are not permitted"}`, 2},
		"an echo":              {400, `{"error":{"message":"Invalid text: stream_options"}}`, 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			p.provider.setScript(replyScript(c.status, c.body))
			res := p.chat(`"stream":true`)
			if n := len(p.provider.received()); n != c.attempts || c.status == 400 && res.body != c.body {
				t.Errorf("got %d %s after %d attempts", res.status, res.body, n)
			}
			p.changeUpstream(p.upstream, `"note":"x"`)
			if c.attempts == 2 { // not after the change, which makes the proxy forget
				p.provider.setScript(replyScript(c.status, c.body))
				p.chat(`"stream":true`)
			}
			p.provider.setScript(chatScript)
			if p.chat(`"stream":true`); p.lastCall().UsageSource != "exact" {
				t.Errorf("the next call: the ledger has %+v", p.lastCall())
			}
			before := len(p.provider.received())
			p.provider.setScript(replyScript(c.status, c.body))
			if p.chat(); len(p.provider.received()) != before+1 && c.status == 400 {
				t.Errorf("a call without a stream was sent %d times", len(p.provider.received())-before)
			}
		})
	}
}

// TestStreamOptionsElsewhere: what one upstream refuses, another gets; a rewritten model and a verified stream change
// nothing; and the refusal is never the answer that a client gets, whatever comes after it.
func TestStreamOptionsElsewhere(t *testing.T) {
	t.Parallel()
	const refusal = `{"error":{"message":"Unrecognized request argument supplied: stream_options"}}`
	p := newTest(t, nil)
	p.changeUpstream(p.upstream, `"rewrite":{"gpt-4o-mini":"mine"}`)
	second, _ := p.addUpstream(`"priority":1`)
	p.provider.setScript(strictScript(400, refusal))
	for _, headers := range [][]string{p.jsonHeaders(), p.jsonHeaders("X-LLM-Proxy-Stream", "verified")} {
		p.instance.health.reset(1, time.Now().UnixMilli())
		body := `{"stream":true,"model":"gpt-4o-mini","messages":[]}`
		res := p.do("POST", "/v1/chat/completions", body, headers...)
		want := strings.Replace(body, "gpt-4o-mini", "mine", 1)
		if got := p.provider.lastRequest(t).body; res.status != 200 || got != want || len(second.received()) != 0 {
			t.Errorf("got %d %s; the provider got %s", res.status, res.body, got)
		}
	}
	p.provider.setScript(replyScript(429, `{}`))
	if res := p.chat(`"stream":true`); res.status != 200 || p.lastCall().UsageSource != "exact" ||
		!strings.Contains(second.lastRequest(t).body, "include_usage") {
		t.Errorf("another upstream: got %d; it got %s", res.status, second.lastRequest(t).body)
	}

	p = newTest(t, nil)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.Contains(r.body, "stream_options") {
			return c.reply(400, refusal)
		}
		return c.reset()
	})
	if res := p.chat(`"stream":true`); res.status != 502 || strings.Contains(res.body, "stream_options") {
		t.Errorf("a connection that breaks after the refusal: got %d %s", res.status, res.body)
	}
}

// TestStreamOptionsRefusedInStream: with a spare, the refusal may come as a stream's first event, too.
func TestStreamOptionsRefusedInStream(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	second, _ := p.addUpstream(`"priority":1`)
	refusal := `data: {"error":{"message":"Unrecognized argument: stream_options","code":400}}` + "\n\n"
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.Contains(r.body, "stream_options") {
			return streamScript([]string{refusal}, 1, endStream)(c, r)
		}
		return chatScript(c, r)
	})
	for i, attempts := range []int{2, 1} {
		if res := p.chat(`"stream":true`); res.status != 200 || res.body != strings.Join(chatEvents(false), "") ||
			len(second.received()) != 0 || p.lastCall().Attempts != attempts {
			t.Errorf("call %d: got %d %s; the ledger has %+v", i, res.status, res.body, p.lastCall())
		}
	}
}
