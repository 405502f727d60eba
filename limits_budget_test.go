// Tests of budgets (LI5, LI13): what calls may take of tokens and dollars is set
// aside before they are made and settled to what they took, whatever becomes of
// them; and who takes more than a budget has is ended.
package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// usageAnswer is an answer that used so many tokens.
func usageAnswer(input, output int) string {
	return strings.Replace(strings.Replace(chatAnswer, `"prompt_tokens":9`, fmt.Sprintf(`"prompt_tokens":%d`, input), 1),
		`"completion_tokens":3`, fmt.Sprintf(`"completion_tokens":%d`, output), 1)
}

// policyToken makes a token with these limits and returns its path in /manage.
func (p *testProxy) policyToken(limits string) (path, token string) {
	p.t.Helper()
	id, token := p.newToken(`"name":"l","policy":{"limits":[` + limits + `]}`)
	return "/manage/tokens/" + id, token
}

// TestBudgetHolds (LI5): calls of which nobody knows beforehand what they will
// cost spend no more than the budget together, however many come at once.
func TestBudgetHolds(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	// A call may cost 26*150 + 5000*600 nano-dollars, and costs a tenth of it.
	path, token := p.policyToken(`{"count":"dollars","max":0.01,"per":"lifetime"}`)
	total := 0
	for round := 0; ; round++ {
		hits, statuses := p.crowd(50, func(i int) int {
			status, _ := p.send(nil, token, "/v1/chat/completions", chatBody(`"max_tokens":5000`))
			return status
		})
		if hits > 3 || statuses[429] != 50-hits {
			t.Fatalf("round %d: %d calls ran at once, clients got %v", round, hits, statuses)
		}
		if total += hits; hits == 0 || total > 1000 {
			break
		}
		p.provider.answer(func(c *providerConn, _ recorded) bool { return c.reply(200, usageAnswer(9, 500)) })
		for range 5 { // and one after the other
			if status, _ := p.send(nil, token, "/v1/chat/completions", chatBody(`"max_tokens":5000`)); status == 200 {
				total++
			}
		}
	}
	l := p.limits(path)[0]
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

// TestReservationsComeBack (LI5): whatever becomes of a call, what it had set
// aside and did not use has room again for the next one.
func TestReservationsComeBack(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.allowErrors = true
	path, token := p.policyToken(`{"count":"tokens","max":1000,"per":"day"},{"count":"dollars","max":0.001,"per":"lifetime"},` +
		`{"count":"concurrent","max":1},{"count":"tokens","max":1000,"per":"minute"}`)
	for name, script := range map[string]func(*providerConn, recorded) bool{
		"fails":            always(500, `{"error":{}}`),
		"is busy":          always(429, `{"error":{}}`),
		"does not like it": always(400, `{"error":{}}`),
		"refuses the key":  always(401, `{"error":{}}`),
		"sends elsewhere":  always(302, ``, "Location: http://127.0.0.1:1/"),
		"breaks off":       func(c *providerConn, _ recorded) bool { return c.reset() },
		"speaks no HTTP":   func(c *providerConn, _ recorded) bool { _, _ = c.Write([]byte("220 smtp\r\n")); return false },
	} {
		t.Log(name)
		p.provider.answer(script)
		for range 5 { // each asks for nearly all there is
			if res := p.chatAs(token, `"max_tokens":900`); res.status == 429 && name != "is busy" || strings.Contains(res.body, "limit of") {
				t.Fatalf("the provider %s: got %d %s", name, res.status, res.body)
			}
			p.settle()
		}
		for _, l := range p.limits(path) {
			if l.Reserved != 0 || l.Used != 0 {
				t.Errorf("the provider %s: %+v", name, l)
			}
		}
	}
	p.provider.answer(answerChat)
	if res := p.chatAs(token, `"max_tokens":900`); res.status != 200 {
		t.Errorf("then: got %d %s", res.status, res.body)
	}
	if res := p.chatAs(token, `"max_tokens":980`); res.status != 429 || res.header.Get("X-Should-Retry") != "false" {
		t.Errorf("a call for more than is left: got %d %v %s", res.status, res.header, res.body)
	}
}

// TestBucketSavesNothingUp: calls that reserve all there is, minute by minute,
// and are all ended unused at one moment give that moment no more than one
// bucket and what it still held.
func TestBucketSavesNothingUp(t *testing.T) {
	t.Parallel()
	l, s := newTestLimiter(t, ``, `{"count":"tokens","max":1000,"per":"minute"}`, noon)
	var kept []*hold
	now := int64(noon)
	for range 20 {
		h, refused := l.try(s, chatAsk(10, 990), now)
		if refused != nil {
			t.Fatalf("after %d minutes: %+v", (now-noon)/60_000, refused)
		}
		kept, now = append(kept, h), now+60_000
	}
	taken := 0
	for {
		if h, _ := l.try(s, chatAsk(10, 990), now); h.limiter != nil {
			h.settle(now, spending{counted: true, tokens: 1000}, func() {})
			taken += 1000
		} else if len(kept) > 0 {
			kept[0].settle(now, spending{counted: true, tokens: 0}, func() {})
			kept = kept[1:]
		} else {
			break
		}
	}
	if taken > 1000 {
		t.Errorf("in one moment %d tokens were taken of 1000 per minute", taken)
	}
}

// TestSpentStreams (LI5): a stream that goes on beyond a budget by more than a
// tenth is ended within a second, and its client sees that it is not complete.
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
			calm(10 * time.Second)
			own, its := `{"limits":[`+test.limit+`]}`, `{}`
			if test.project {
				own, its = its, own
			}
			project, tokens, ids := p.newProject("b", its, own, 2)
			enough, cut := make(chan struct{}), make(chan time.Time, 1)
			p.provider.answer(func(c *providerConn, _ recorded) bool {
				c.sse()
				_ = c.chunk(strings.Repeat(chatEvents(true)[1], 500))
				<-enough
				_ = c.chunk(strings.Repeat(chatEvents(true)[1], 1000))
				if test.ended {
					c.gone(10 * time.Second)
					cut <- time.Now()
					return false
				}
				time.Sleep(3 * watchEvery) // in which it would be seen
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
			rest, err := s.rest()
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
			if l := p.limits(path)[0]; l.Left != 0 || l.Used <= l.Max || l.Reserved != 0 {
				t.Errorf("the limit says %+v", l)
			}
			for i, token := range tokens {
				want := 429
				if i == 1 && !test.project {
					want = 200 // it is another token's budget
				}
				p.provider.answer(answerChat)
				if res := p.chatAs(token); res.status != want || want == 429 && (res.code() != "project_spend_limit_exceeded" || res.header.Get("Retry-After") != "") {
					t.Errorf("then token %d: got %d %s", i, res.status, res.body)
				}
			}
		})
	}
}

// TestSpentHeldStream: a stream that is held back until it is complete is ended
// like any other; as nothing of it has left, its client is told why.
func TestSpentHeldStream(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	_, token := p.policyToken(`{"count":"tokens","max":1000,"per":"day"}`)
	p.provider.answer(streamOf([]string{strings.Repeat(chatEvents(true)[1], 1500)}, 1, stall))
	res := p.do("POST", "/v1/chat/completions", chatBody(`"stream":true`), "Authorization", "Bearer "+token, "Content-Type", "application/json", "X-LLM-Proxy-Stream", "verified")
	if res.status != 429 || res.code() != "project_spend_limit_exceeded" || res.header.Get("X-Should-Retry") != "false" {
		t.Errorf("got %d %v %s", res.status, res.header, clip(res.body, 300))
	}
	if row := p.lastCall(); row.Outcome != "truncated" || row.UsageSource != "estimated" || row.OutputTokens < 1000 {
		t.Errorf("the ledger has %+v", row)
	}
	_, token = p.policyToken(`{"count":"tokens","max":1000,"per":"day"}`)
	p.provider.answer(streamOf([]string{strings.Repeat(chatEvents(true)[1], 900)}, 1, func(*providerConn) bool { return false }))
	p.do("POST", "/v1/chat/completions", chatBody(`"stream":true`), "Authorization", "Bearer "+token, "Content-Type", "application/json", "X-LLM-Proxy-Stream", "verified")
	if row := p.lastCall(); row.Outcome != "upstream_error" || row.UsageSource != "estimated" || row.OutputTokens < 800 {
		t.Errorf("cut by the provider: the ledger has %+v", row)
	}
}

// TestPriceUnknown: a call whose cost nobody knows could not be held to a
// budget, so it is refused where one holds for it, and only there.
func TestPriceUnknown(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.answer(func(c *providerConn, r recorded) bool {
		if strings.HasSuffix(r.target, "/speech") || strings.HasSuffix(r.target, "/generations") {
			return c.reply(200, `x`, "Content-Type: audio/mpeg")
		}
		return answerChat(c, r)
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
		_, token := p.policyToken(test.limit)
		before := len(p.provider.got())
		res := p.do("POST", test.call[0], test.call[1], "Authorization", "Bearer "+token, "Content-Type", "application/json")
		if res.status != test.want || test.want == 403 && (res.code() != "price_unknown" || len(p.provider.got()) != before) {
			t.Errorf("%s, %s: got %d %s", test.limit, test.call[1], res.status, res.body)
		}
	}
	path, token := p.policyToken(day + `}`)
	p.manage("POST", "/manage/prices", `{"match":"unheard-of","input":1000,"output":2000}`, 201, nil)
	if res := p.do("POST", "/v1/chat/completions", chat("unheard-of")[1], "Authorization", "Bearer "+token, "Content-Type", "application/json"); res.status != http.StatusOK {
		t.Errorf("with a price: got %d %s", res.status, res.body)
	}
	if l := p.limits(path)[0]; l.Used == 0 {
		t.Errorf("with a price: %+v", l)
	}
}

// TestDebtIsCarried (LI13): what a call took beyond its estimate is paid for by those
// that come after it, and keeps nobody waiting for longer than one more period.
func TestDebtIsCarried(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	path, token := p.policyToken(`{"count":"tokens","max":1000,"per":"minute"}`)
	p.provider.answer(always(200, usageAnswer(9, 5_000_000)))
	if res := p.chatAs(token, `"max_tokens":10`); res.status != 200 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	p.settle()
	res := p.chatAs(token, `"max_tokens":10`)
	wait, err := time.ParseDuration(res.header.Get("Retry-After-Ms") + "ms")
	if res.status != 429 || err != nil || wait < time.Minute || wait > 2*time.Minute {
		t.Errorf("got %d, Retry-After-Ms %v, %s", res.status, wait, res.body)
	}
	if l := p.limits(path)[0]; l.Used != 2000 || l.Left != 0 {
		t.Errorf("the limit says %+v", l)
	}
}
