// A property of retry and failover under random faults: no call is answered
// twice, billed twice, or sent again once a byte of an answer could have left.
package main

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A randomPool is what the providers of a test saw, by call.
type randomPool struct {
	mu       sync.Mutex
	attempts map[string]int
	settled  map[string]int // attempt that gave an answer of which bytes could leave
	again    []string       // calls that were sent after it
}

// begin notes an attempt and returns which one of its call it is.
func (r *randomPool) begin(call string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.attempts[call]++
	if r.settled[call] > 0 {
		r.again = append(r.again, call)
	}
	return r.attempts[call]
}

func (r *randomPool) settle(call string, attempt int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settled[call] = attempt
}

// answer does something to an attempt that its call's name and its number pick.
// A good answer has the call's name and, as usage, its number.
func (r *randomPool) answer(c *providerConn, req recorded) bool {
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
		return streamOf(nil, 0, func(c *providerConn) bool { c.gone(20 * time.Millisecond); return false })(c, req)
	case what == 5:
		return c.reply(503, `{"error":{}}`, "Retry-After: 1")
	case what == 6 && stream:
		return streamOf([]string{"data: {\"error\":{\"message\":\"x\"}}\n\n"}, 1, endChunks)(c, req)
	case what <= 8 && stream: // it breaks after two events
		if !verified {
			r.settle(call, attempt)
		}
		return streamOf(events, 2, hangUp)(c, req)
	case what == 9:
		r.settle(call, attempt)
		return c.reply(400, `{"error":{"code":"invalid_value"}}`)
	case what == 10:
		return c.reply(402, `{}`)
	}
	r.settle(call, attempt)
	if stream {
		return streamOf(events, len(events), endChunks)(c, req)
	}
	return c.reply(200, bodyOf(chatAnswer))
}

func TestRandomFaults(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"FIRST_EVENT_TIMEOUT": "1m"})
	r := &randomPool{attempts: map[string]int{}, settled: map[string]int{}}
	p.provider.answer(r.answer)
	providers := []*fakeProvider{p.provider}
	for i := range 3 {
		provider, _ := p.addUpstream(fmt.Sprintf(`"priority":%d`, i/2))
		provider.answer(r.answer)
		providers = append(providers, provider)
	}
	const calls = 320
	var mu sync.Mutex
	billed := map[int64]bool{} // output tokens of answers that came whole: each call has its own number
	var wait sync.WaitGroup
	for worker := range 16 {
		wait.Go(func() {
			for i := worker; i < calls; i += 16 {
				call, headers := fmt.Sprintf("call-%d", i), []string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json"}
				if i%3 == 2 {
					call += "-verified"
					headers = append(headers, "X-LLM-Proxy-Stream", "verified")
				}
				for seq := range int64(4) { // all keys are well again, or few faults would be met
					p.in.health.forget(seq+1, time.Now().UnixMilli())
				}
				res := p.do("POST", "/v1/chat/completions", chatBody(fmt.Sprintf(`"stream":%v`, i%3 > 0), `"stream_options":{"include_usage":true}`, `"user":"`+call+`"`), headers...)
				text := res.body
				if strings.HasPrefix(text, `data: {"error"`) { // the last upstream's, which passes as it is
					continue
				}
				if own, roles := strings.Count(text, `"`+call+`"`), strings.Count(text, `"role":"assistant"`); res.status == 200 &&
					(own > 1 || roles > 1 || res.err == nil && own+roles != 2) { // a reset may take what was sent before it along
					t.Errorf("%s: not one answer of its own: %q", call, text)
				}
				whole := res.status == 200 && res.err == nil
				if i%3 == 2 && res.status == 200 && !(whole && strings.HasSuffix(text, "data: [DONE]\n\n")) {
					t.Errorf("%s: a verified stream broke: %q, %v", call, text, res.err)
				}
				if whole {
					mu.Lock()
					billed[int64(1000+i)] = true
					mu.Unlock()
				}
			}
		})
	}
	wait.Wait()
	p.keysApart(providers...)
	rows := p.ledger()
	if len(rows) != calls {
		t.Errorf("%d rows for %d calls", len(rows), calls)
	}
	if len(r.again) > 0 {
		t.Errorf("sent again after an answer: %v", r.again)
	}
	sent := 0
	for call, n := range r.attempts {
		if sent += n; n > maxAttempts {
			t.Errorf("%s was sent %d times", call, n)
		}
	}
	for _, row := range rows {
		if sent -= row.Attempts; row.Outcome == "ok" && !billed[row.OutputTokens] {
			t.Errorf("billed what no client got, or twice: %+v", row)
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
	for seq := range int64(4) {
		if n := p.in.health.of(seq+1, "").running.Load(); n != 0 {
			t.Errorf("upstream %d still has %d running calls", seq+1, n)
		}
	}
}
