// Tests of retry and failover: what a provider does wrong, and what the client
// then sees, how often each provider is asked, and what is on record.
package main

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// addUpstream gives the test's project another upstream, a provider of its own.
func (p *testProxy) addUpstream(fields string) (*fakeProvider, string) {
	p.t.Helper()
	provider := newFakeProvider(p.t)
	p.mu.Lock()
	p.secrets = append(p.secrets, provider.key)
	p.mu.Unlock()
	var up struct{ ID string }
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams",
		fmt.Sprintf(`{"name":"u","provider":"compatible","api_key":%q,"base_url":%q,%s}`, provider.key, provider.url, fields), 201, &up)
	return provider, up.ID
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

// longStream is a stream of sixty events and its end.
func longStream() []string {
	events := []string{chatEvents(true)[0]}
	for range 57 {
		events = append(events, chatEvents(true)[1])
	}
	return append(events, chatEvents(true)[2:]...)
}

// streamOf answers with n of the events and then does what then says.
func streamOf(events []string, n int, then func(*providerConn) bool) func(*providerConn, recorded) bool {
	return func(c *providerConn, _ recorded) bool {
		c.sse()
		for _, e := range events[:n] {
			if c.chunk(e) != nil {
				return false
			}
		}
		return then(c)
	}
}

func always(status int, body string, headers ...string) func(*providerConn, recorded) bool {
	return func(c *providerConn, _ recorded) bool { return c.reply(status, body, headers...) }
}

func endChunks(c *providerConn) bool { return c.chunk("") == nil }
func stall(c *providerConn) bool     { c.gone(20 * time.Second); return false }
func hangUp(c *providerConn) bool    { return c.reset() }

// A providerFault is something that a provider does wrong, for as long as the
// test runs, and what becomes of the calls. asked is how often the provider, and
// then the fallback, is asked for one call.
type providerFault struct {
	name     string
	stream   bool
	script   func(*providerConn, recorded) bool
	asked    [2]int
	status   int    // 0: the answer is cut
	outcome  string // on record
	code     string
	health   string // of the provider after the call
	fallback string // what the fallback rejects, if anything: a part of a body
}

var providerFaults = []providerFault{
	{"429 with Retry-After", false, always(429, `{"error":{"code":"rate_limit_exceeded"}}`, "Retry-After: 7"), [2]int{1, 1}, 200, "ok", "", "cooling", ""},
	{"429 without", true, always(429, `{"error":{}}`), [2]int{1, 1}, 200, "ok", "", "cooling", ""},
	{"429 for good", false, always(429, `{"error":{"code":"insufficient_quota"}}`), [2]int{1, 1}, 200, "ok", "", "exhausted", ""},
	{"402", false, always(402, `{}`), [2]int{1, 1}, 200, "ok", "", "exhausted", ""},
	{"401", false, always(401, `{}`), [2]int{1, 1}, 200, "ok", "", "quarantined", ""},
	{"403", true, always(403, `{}`), [2]int{1, 1}, 200, "ok", "", "quarantined", ""},
	{"503 persistent", false, always(503, `{"error":{}}`), [2]int{2, 1}, 200, "ok", "", "ready", ""},
	{"redirect", false, always(302, ``, "Location: /"), [2]int{1, 1}, 200, "ok", "", "ready", ""},
	{"reset before headers", false, func(c *providerConn, _ recorded) bool { return c.reset() }, [2]int{2, 1}, 200, "ok", "", "ready", ""},
	{"no HTTP", true, func(c *providerConn, _ recorded) bool { _, _ = c.Write([]byte("nonsense\r\n\r\n")); return false }, [2]int{2, 1}, 200, "ok", "", "ready", ""},
	{"no response", true, func(c *providerConn, _ recorded) bool { return stall(c) }, [2]int{1, 1}, 200, "ok", "", "ready", ""},
	{"slow first token", true, streamOf(longStream(), 0, stall), [2]int{1, 1}, 200, "ok", "", "ready", ""},
	{"comments and no token", true, streamOf([]string{": wait\n\n", "event: ping\n\n"}, 2, stall), [2]int{1, 1}, 200, "ok", "", "ready", ""},
	{"empty stream", true, streamOf(nil, 0, endChunks), [2]int{2, 1}, 200, "ok", "", "ready", ""},
	{"cut before the first event", true, streamOf([]string{": wait\n\n"}, 1, hangUp), [2]int{2, 1}, 200, "ok", "", "ready", ""},
	{"error as first event", true, streamOf([]string{"event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\"}}\n\n"}, 1, endChunks), [2]int{2, 1}, 200, "ok", "", "ready", ""},
	{"malformed chunk at first", true, streamOf([]string{"data: {\"choices\":[{\"delta\n\n"}, 1, endChunks), [2]int{2, 1}, 200, "ok", "", "ready", ""},
	{"malformed chunk later", true, streamOf(append([]string{chatEvents(true)[0], "data: {\"choices\":[{\"delta\n\n"}, chatEvents(true)[1:]...), 6, endChunks), [2]int{1, 0}, 200, "ok", "", "ready", ""},
	{"stream cut after 40 of 60 events", true, streamOf(longStream(), 40, hangUp), [2]int{1, 0}, 0, "truncated", "upstream_cut", "ready", ""},
	{"stream stalled", true, streamOf(longStream(), 40, stall), [2]int{1, 0}, 0, "truncated", "stream_idle", "ready", ""},
	{"cut, and a fallback that rejects prefill", true, streamOf(longStream(), 40, hangUp), [2]int{1, 0}, 0, "truncated", "upstream_cut", "ready", `"role":"assistant"`},
	{"missing [DONE]", true, streamOf(longStream(), 60, endChunks), [2]int{1, 0}, 200, "truncated", "stream_unfinished", "ready", ""},
	{"content filter", false, always(400, `{"error":{"code":"content_filter"}}`), [2]int{1, 0}, 400, "upstream_error", "", "ready", ""},
	{"bad request", false, always(400, `{"error":{"code":"invalid_value"}}`), [2]int{1, 0}, 400, "upstream_error", "", "ready", ""},
	{"not found", false, always(404, `{"error":{"code":"model_not_found"}}`), [2]int{1, 0}, 404, "upstream_error", "", "ready", ""},
	{"conflict", false, always(409, `{"error":{}}`), [2]int{1, 0}, 409, "upstream_error", "", "ready", ""},
}

// TestFailover: with a fallback, each fault that shows before an event has left
// is rescued, with one row on record that names who answered and one bill; and
// what cannot be rescued ends as what it is.
func TestFailover(t *testing.T) {
	t.Parallel()
	for _, f := range providerFaults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"FIRST_EVENT_TIMEOUT": "400ms", "STREAM_IDLE_TIMEOUT": "900ms"})
			fallback, id := p.addUpstream(`"priority":1`)
			fallback.answer(func(c *providerConn, r recorded) bool {
				if f.fallback != "" && strings.Contains(r.body, f.fallback) {
					return c.reply(400, "{}")
				}
				return answerChat(c, r)
			})
			p.provider.answer(f.script)
			var res answer
			if f.stream {
				res = p.chat(`"stream":true`)
			} else {
				res = p.chat()
			}
			if got := [2]int{len(p.provider.got()), len(fallback.got())}; got != f.asked {
				t.Errorf("the providers were asked %v times, want %v", got, f.asked)
			}
			rescued := f.asked[1] > 0
			switch want := strings.Join(chatEvents(false), ""); {
			case f.status == 0 && (res.err == nil || strings.Contains(res.body, "[DONE]")):
				t.Errorf("a cut answer came as %d %q, %v", res.status, clip(res.body, 300), res.err)
			case f.status != 0 && (res.err != nil || res.status != f.status):
				t.Errorf("got %d %q, %v", res.status, clip(res.body, 300), res.err)
			case rescued && f.stream && res.body != want || rescued && !f.stream && res.body != chatAnswer:
				t.Errorf("the answer is %q", res.body)
			}
			row := p.lastCall()
			if row.Outcome != f.outcome || row.ErrorCode != f.code || row.Attempts != f.asked[0]+f.asked[1] {
				t.Errorf("the ledger has %+v", row)
			}
			if rescued && (row.UpstreamID != id || len(row.AttemptLog) != row.Attempts || row.OutputTokens != 3 || row.InputTokens != 9 || row.UsageSource != "exact") {
				t.Errorf("the ledger has %+v", row)
			}
			if len(row.AttemptLog) > 0 && row.AttemptLog[0].Error == "" {
				t.Errorf("the attempt log is %+v", row.AttemptLog)
			}
			if n := len(p.ledger()); n != 1 {
				t.Errorf("%d rows for one call", n)
			}
			if h := p.healthOf(p.upstream); h.State != f.health {
				t.Errorf("the key is %+v, want %s", h, f.health)
			}
		})
	}
}

// TestOnceOnly: a single 500, or a connection that breaks once, is tried again at
// the same key; the fallback never hears of it.
func TestOnceOnly(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]func(*providerConn, recorded) bool{
		"500 once": always(500, `{"error":{}}`),
		"reset":    func(c *providerConn, _ recorded) bool { return c.reset() },
	} {
		p := newTest(t, nil)
		fallback, _ := p.addUpstream(`"priority":1`)
		p.provider.answer(func(c *providerConn, r recorded) bool {
			if len(p.provider.got()) == 1 {
				return first(c, r)
			}
			return answerChat(c, r)
		})
		if res := p.chat(); res.status != 200 || res.body != chatAnswer {
			t.Errorf("%s: got %d %s", name, res.status, res.body)
		}
		if n, m := len(p.provider.got()), len(fallback.got()); n != 2 || m != 0 {
			t.Errorf("%s: the providers were asked %d and %d times", name, n, m)
		}
		if row := p.lastCall(); row.Outcome != "ok" || row.Attempts != 2 || len(row.AttemptLog) != 2 || row.OutputTokens != 3 {
			t.Errorf("%s: the ledger has %+v", name, row)
		}
	}
}

// TestOutage: twenty calls through an outage of the first provider are all
// answered; it is asked as often as the breaker lets it, and has the calls again
// with its first good answer.
func TestOutage(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	fallback, _ := p.addUpstream(`"priority":1`)
	p.provider.answer(always(503, `{"error":{}}`))
	for i := range 20 {
		if res := p.chat(); res.status != 200 {
			t.Errorf("call %d in the outage: got %d %s", i, res.status, res.body)
		}
	}
	asked := len(p.provider.got())
	if asked < 3 || asked > 5 { // three open the breaker; a slow machine may see a probe or two
		t.Errorf("a provider that is down was asked %d times in 20 calls", asked)
	}
	if h := p.healthOf(p.upstream); h.State != "open" {
		t.Errorf("after 20 failed calls: %+v", h)
	}
	p.provider.answer(answerChat)
	h := p.in.health.of(1, "")
	h.until.Store(time.Now().UnixMilli()) // the pause is over
	before := len(fallback.got())
	for i := range 5 {
		if res := p.chat(); res.status != 200 {
			t.Errorf("call %d after the outage: got %d %s", i, res.status, res.body)
		}
	}
	if n := len(p.provider.got()) - asked; n != 5 || len(fallback.got()) != before {
		t.Errorf("after the outage the provider got %d of 5 calls", n)
	}
	if h := p.healthOf(p.upstream); h.State != "ready" {
		t.Errorf("after the outage: %+v", h)
	}
}

// TestHealthSurvives: what is known of a key outlives the process, and ends when
// an admin changes the upstream.
func TestHealthSurvives(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	fallback, _ := p.addUpstream(`"priority":1`)
	p.provider.answer(always(401, `{}`))
	p.chat()
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	if h := p.healthOf(p.upstream); h.State != "quarantined" || h.Reason == "" {
		t.Errorf("after a restart: %+v", h)
	}
	p.chat()
	if n, m := len(p.provider.got()), len(fallback.got()); n != 1 || m != 2 {
		t.Errorf("the providers were asked %d and %d times", n, m)
	}
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"weight":2}`, 200, nil)
	p.provider.answer(answerChat)
	if res := p.chat(); res.status != 200 || len(p.provider.got()) != 2 {
		t.Errorf("after the change: got %d, the provider was asked %d times", res.status, len(p.provider.got()))
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	if h := p.healthOf(p.upstream); h.State != "ready" {
		t.Errorf("after another restart: %+v", h)
	}
}

// TestNoneLeft: when no upstream is well the client gets what a provider says,
// with no more attempts than upstreams, and no call is turned away unasked.
func TestNoneLeft(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	second, _ := p.addUpstream(`"weight":1`)
	p.provider.answer(always(429, `{"error":{"code":"rate_limit_exceeded"}}`, "Retry-After: 30"))
	second.answer(always(429, `{"error":{"code":"rate_limit_exceeded"}}`, "Retry-After: 20"))
	if res := p.chat(); res.status != 429 || res.code() != "rate_limit_exceeded" || res.header.Get("Retry-After") == "" {
		t.Errorf("got %d %v %s", res.status, res.header, res.body)
	}
	if n, m := len(p.provider.got()), len(second.got()); n != 1 || m != 1 {
		t.Errorf("the providers were asked %d and %d times", n, m)
	}
	if res := p.chat(); res.status != 429 || len(p.provider.got()) != 1 || len(second.got()) != 2 {
		t.Errorf("the next call: got %d; the providers were asked %d and %d times", res.status, len(p.provider.got()), len(second.got()))
	}
	second.answer(always(401, `{}`)) // less use to the client than the other's 429
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{}`, 200, nil)
	p.chat()
	if res := p.chat(); res.status != 502 && res.status != 429 {
		t.Errorf("got %d %s", res.status, res.body)
	}
}

// TestShortWait: where no other key is left, a short Retry-After is waited for.
func TestShortWait(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	second, _ := p.addUpstream(`"priority":1`)
	second.answer(always(429, `{}`, "Retry-After: 1"))
	p.provider.answer(func(c *providerConn, r recorded) bool { return c.reply(429, `{}`, "Retry-After: 300") })
	go func() {
		for len(second.got()) == 0 && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
		second.answer(answerChat)
	}()
	if res := p.chat(); res.status != 200 || len(p.provider.got()) != 1 || len(second.got()) != 2 {
		t.Errorf("got %d; the providers were asked %d and %d times", res.status, len(p.provider.got()), len(second.got()))
	}
}

// TestKeptObjects: calls that may name what is kept at a provider all go to one
// upstream, and are made once.
func TestKeptObjects(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	second, _ := p.addUpstream(`"weight":1000`)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	auth := []string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json"}
	p.provider.answer(always(500, `{"error":{}}`))
	for range 5 {
		if res := p.do("GET", "/v1/files", "", auth[:2]...); res.status != 500 {
			t.Errorf("got %d %s", res.status, res.body)
		}
		if res := p.do("POST", "/v1/responses", `{"model":"m","input":"x","previous_response_id":"resp_1"}`, auth...); res.status != 500 {
			t.Errorf("got %d %s", res.status, res.body)
		}
	}
	if n, m := len(p.provider.got()), len(second.got()); n != 10 || m != 0 {
		t.Errorf("the providers were asked %d and %d times", n, m)
	}
}
