// Tests of what counts in a limit (LI7, LI9): one table says what each way that
// a call may end takes of requests, tokens, dollars and places; docs/use.md has
// it in words. And nothing leaks, however calls end.
package main

import (
	"context"
	"fmt"
	"io"
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

// TestWhatEachEndTakes (LI9): see the file's head. Tokens and dollars are -1 where
// nobody knows what the provider will bill, and the estimate counts.
func TestWhatEachEndTakes(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error", "MAX_BODY_BYTES": "64KiB"})
	p.allowErrors = true // a provider that refuses its key is one
	p.in.running.mu.Lock()
	p.in.running.limits.upstreamTimeout = 300 * time.Millisecond
	p.in.running.mu.Unlock()
	calm(20 * time.Second)
	begun := func(then func(*providerConn) bool) func(*providerConn, recorded) bool {
		return func(c *providerConn, _ recorded) bool {
			c.sse()
			_ = c.chunk(strings.Join(chatEvents(true)[:2], ""))
			return then(c)
		}
	}
	const path = "/v1/chat/completions"
	for _, test := range []struct {
		name             string
		script           func(*providerConn, recorded) bool
		path, body       string
		leave            bool // the client does, after the first event or half a second
		requests, tokens int
	}{
		{"answered", answerChat, path, chatBody(), false, 1, 12},
		{"streamed", answerChat, path, chatBody(`"stream":true`), false, 1, 12},
		{"answered without usage", always(200, `{"choices":[]}`), path, chatBody(), false, 1, -1},
		{"the provider does not like it", always(400, `{"error":{}}`), path, chatBody(), false, 1, 0},
		{"the provider is busy", always(429, `{"error":{}}`), path, chatBody(), false, 1, 0},
		{"the provider fails", always(500, `{"error":{}}`), path, chatBody(), false, 1, 0},
		{"the provider refuses the key", always(401, `{"error":{}}`), path, chatBody(), false, 1, 0},
		{"the provider hangs up", func(c *providerConn, _ recorded) bool { return c.reset() }, path, chatBody(), false, 1, 0},
		{"the provider is silent", silence, path, chatBody(), false, 1, -1},
		{"the stream breaks off", begun((*providerConn).reset), path, chatBody(`"stream":true`), false, 1, -1},
		{"the stream has no end", begun(endChunks), path, chatBody(`"stream":true`), false, 1, -1},
		{"the client leaves the stream", begun(stall), path, chatBody(`"stream":true`), true, 1, -1},
		{"the client leaves before the answer", silence, path, chatBody(), true, 1, -1},
		{"a list of models", always(200, `{"object":"list","data":[]}`), "GET /v1/models", ``, false, 1, 0},
		{"a count of tokens", always(200, `{"input_tokens":9}`), "/v1/messages/count_tokens", strings.Replace(chatBody(), "gpt-4o-mini", "claude-sonnet-4", 1), false, 0, 0},
		{"no such endpoint", answerChat, "/v1/nothing", chatBody(), false, 0, 0},
		{"no JSON", answerChat, path, `{`, false, 0, 0},
		{"too large", answerChat, path, chatBody(`"user":"` + strings.Repeat("x", 65<<10) + `"`), false, 0, 0},
		{"a model that is not allowed", answerChat, path, strings.Replace(chatBody(), "mini", "maxi", 1), false, 0, 0},
		{"another limit refuses it", answerChat, path, chatBody(`"max_tokens":900000`), false, 0, 0},
		{"it asks about itself", answerChat, "GET " + ownTokenPath, ``, false, 0, 0},
	} {
		id, token := p.newToken(`"name":"c","max_requests":100,"policy":{"models":["gpt-4o-mini"],"limits":[{"count":"requests","max":100,"per":"day"},
			{"count":"tokens","max":800000,"per":"month"},{"count":"dollars","max":90,"per":"lifetime"},{"count":"concurrent","max":2},{"count":"requests","max":3,"per":"minute"}]}`)
		p.provider.answer(test.script)
		method, target := "POST", test.path
		if m, rest, ok := strings.Cut(target, " "); ok {
			method, target = m, rest
		}
		if test.leave {
			p.leave(token, test.body)
		} else {
			p.do(method, target, test.body, "Authorization", "Bearer "+token, "Content-Type", "application/json")
		}
		l := p.limits("/manage/tokens/" + id)
		if int(l[0].Used) != test.requests || p.count(id) != int64(test.requests) || int(l[1].Used) != test.tokens && (test.tokens >= 0 || l[1].Used == 0) ||
			(l[2].Used > 0) != (test.tokens != 0) || l[3].Used != 0 || l[1].Reserved+l[2].Reserved != 0 || int(l[4].Used) != test.requests {
			t.Errorf("%s: count %d, limits %+v", test.name, p.count(id), l)
		}
		if again := p.asStored(id)[:3]; !slices.Equal(again, []float64{l[0].Used, l[1].Used, l[2].Used}) {
			t.Errorf("%s: after a restart %v would be used, instead of %+v", test.name, again, l)
		}
	}
	p.sumsAgree()
	p.countsAgree()
}

// silence is no answer.
func silence(c *providerConn, _ recorded) bool { c.gone(20 * time.Second); return false }

// leave makes a call and goes away in the middle of it.
func (p *testProxy) leave(token, body string) {
	p.t.Helper()
	hits := len(p.provider.got())
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close()
	_, _ = fmt.Fprintf(conn, "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", token, len(body), body)
	waitFor(p.t, "the provider", func() bool { return len(p.provider.got()) > hits })
	if strings.Contains(body, `"stream":true`) {
		_, _ = io.ReadFull(conn, make([]byte, 100))
	}
}

// asStored returns what a new process would take for used of a token's limits.
func (p *testProxy) asStored(id string) (out []float64) {
	p.t.Helper()
	row, err := p.in.store.tokenByID(context.Background(), id)
	if err != nil {
		p.t.Fatal(err)
	}
	views, err := p.in.storedLimits(context.Background(), row.policy, false, row.project, row.seq, time.Now().UnixMilli())
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

// TestPlacesNeverLeak (LI7): of three places at one time none is lost, and never
// a fourth is given, while a thousand calls end in every way there is.
func TestPlacesNeverLeak(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.allowErrors = true
	id, token := p.newToken(`"name":"p","policy":{"limits":[{"count":"concurrent","max":3},{"count":"tokens","max":400000,"per":"day"}]}`)
	var running, most, calls atomic.Int64
	p.provider.answer(func(c *providerConn, r recorded) bool {
		n := running.Add(1)
		defer running.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		calls.Add(1)
		return anyAnswer(c, r)
	})
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 150 {
				ctx, cancel := context.WithCancel(context.Background())
				if j%4 == 0 { // the client goes away
					time.AfterFunc(time.Duration(j*i%17)*100*time.Microsecond, cancel)
				}
				p.callFree(ctx, token, fmt.Sprintf(`"stream":%v,"max_tokens":10,"seed":%d`, j%2 == 0, i*1000+j))
				cancel()
			}
		})
	}
	all.Wait()
	p.settle()
	if most.Load() > 3 || calls.Load() < 200 {
		t.Errorf("%d calls were with the provider at one time, %d in all", most.Load(), calls.Load())
	}
	hits, statuses := p.crowd(30, func(int) int {
		_, status := p.callFree(context.Background(), token, tinyBody)
		return status
	})
	if l := p.limits("/manage/tokens/" + id); hits != 3 || statuses[429] != 27 || l[0].Used != 0 || l[1].Reserved != 0 {
		t.Errorf("after %d calls %d run at once, clients got %v, the limits say %+v", calls.Load(), hits, statuses, l)
	}
	p.sumsAgree()
	p.countsAgree()
}

// TestPlacesAfterAPanic (LI7): a bug of ours in the middle of a call frees its
// place too.
func TestPlacesAfterAPanic(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.allowErrors = true
	id, token := p.newToken(`"name":"p","max_requests":100,"policy":{"limits":[{"count":"concurrent","max":1},{"count":"tokens","max":5000,"per":"day"}]}`)
	p.in.transport.Proxy = func(*http.Request) (*url.URL, error) { panic("broken") }
	for range 5 {
		if res := p.chatAs(token, tinyBody); res.err == nil {
			t.Errorf("got %d %s", res.status, res.body)
		}
		p.settle()
	}
	p.in.transport.Proxy = nil
	if res := p.chatAs(token, tinyBody); res.status != 200 {
		t.Errorf("got %d %s", res.status, res.body)
	}
	if l := p.limits("/manage/tokens/" + id); l[0].Used != 0 || l[1].Reserved != 0 {
		t.Errorf("the limits say %+v", l)
	}
}
