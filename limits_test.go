// Tests of limits: they hold exactly, for a token that is new and one that is
// in use, under any parallelism, across restarts, evictions and admins' changes.
package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// burst makes n calls at the same moment and returns how often each status came.
func (p *testProxy) burst(token string, n int) map[int]int {
	var mu sync.Mutex
	statuses := map[int]int{}
	var all, ready sync.WaitGroup
	barrier := make(chan struct{})
	ready.Add(n)
	for range n {
		all.Go(func() {
			ready.Done()
			<-barrier
			_, status := p.callFree(context.Background(), token, `"n":1`)
			mu.Lock()
			defer mu.Unlock()
			statuses[status]++
		})
	}
	ready.Wait()
	close(barrier)
	all.Wait()
	return statuses
}

// count returns a token's request_count.
func (p *testProxy) count(id string) int64 {
	p.t.Helper()
	p.settle()
	var v struct {
		RequestCount int64 `json:"request_count"`
	}
	p.manage("GET", "/manage/tokens/"+id, "", 200, &v)
	return v.RequestCount
}

// TestALimitIsALimit: of 200 calls at once exactly as many get through as the
// token has left.
func TestALimitIsALimit(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	for _, limit := range []int{1, 7, 100} {
		for used := 0; used < limit; used += max(1, limit-1) { // a token that is new, and one with little left
			id, token := p.newToken(fmt.Sprintf(`"name":"l","max_requests":%d`, limit))
			for range used {
				if res := p.chatAs(token); res.status != 200 {
					t.Fatalf("got %d", res.status)
				}
			}
			hits := len(p.provider.got())
			statuses := p.burst(token, 200)
			left := limit - used
			if n := len(p.provider.got()) - hits; n != left || statuses[200] != left || statuses[429] != 200-left {
				t.Errorf("%d of %d used: the provider got %d calls, the clients %v", used, limit, n, statuses)
			}
			if n := p.count(id); n != int64(limit) {
				t.Errorf("%d of %d used: the count is %d", used, limit, n)
			}
		}
	}
	p.countsAgree()
}

// TestLimitAcrossRestart: what was used before a restart is used after it.
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
	if n := len(p.provider.got()); total != 20 || n != 20 || p.count(id) != 20 {
		t.Errorf("of 20 calls %d were answered, %d made, %d counted", total, n, p.count(id))
	}
}

// TestLimitWhileChanged: an admin's changes and the eviction of idle tokens, both
// without a pause, neither reset nor lose a count.
func TestLimitWhileChanged(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	for round := range 5 {
		id, token := p.newToken(`"name":"l","max_requests":50`)
		hits := len(p.provider.got())
		stop := make(chan struct{})
		var others sync.WaitGroup
		for _, do := range []func(i int){
			func(i int) {
				if res := p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+id, fmt.Sprintf(`{"name":"n%d"}`, i)); res.status != 200 {
					t.Errorf("PATCH: got %d %s", res.status, res.body)
				}
			},
			func(int) {
				p.in.registry.evict(time.Now().Add(time.Hour).UnixMilli(), p.in.ledger.flush(t.Context()) == nil)
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
			n := p.count(id)
			if n < last {
				t.Errorf("round %d: the count went from %d to %d", round, last, n)
			}
			last = n
		}
		close(stop)
		others.Wait()
		if n := len(p.provider.got()) - hits; n != 50 || last != 50 {
			t.Errorf("round %d: of 50 calls %d were made and %d counted", round, n, last)
		}
	}
}

// TestEvictedTokenIsNotUsed: a call that has found a token just when it is
// evicted finds it again, for the next call would count from another one.
func TestEvictedTokenIsNotUsed(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	g, hash := p.in.registry, hashOf(p.token)
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
	if evicted.hold() {
		t.Error("an evicted token can be used")
	}
	held := find()
	if held == evicted || !held.hold() {
		t.Fatal("the token cannot be used again")
	}
	g.evict(later, true)
	if find() != held {
		t.Error("a token was evicted amid a call")
	}
	held.release(time.Now())
}

func hashOf(token string) [32]byte {
	hash, _, _ := hashCredential(tokenPrefix, token)
	return hash
}

// TestLimitValues: 0 is none, null is no limit, and what is no whole number is
// refused.
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

// TestWhatCounts: a call counts when it was made, whatever became of it, and
// does not when it was refused.
func TestWhatCounts(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true // a provider that refuses its key is one
	id, token := p.newToken(`"name":"c","max_requests":6,"policy":{"models":["gpt-4o-mini"]}`)
	auth := []string{"Authorization", "Bearer " + token, "Content-Type", "application/json"}
	reply := func(status int) func(*providerConn, recorded) bool {
		return func(c *providerConn, _ recorded) bool { return c.reply(status, `{"error":{}}`) }
	}
	for i, test := range []struct {
		name   string
		script func(*providerConn, recorded) bool
		path   string
		body   string
		status int
		counts int64
	}{
		{"answered", answerChat, "/v1/chat/completions", chatBody(), 200, 1},
		{"model not allowed", answerChat, "/v1/chat/completions", strings.Replace(chatBody(), "mini", "maxi", 1), 403, 0},
		{"no such endpoint", answerChat, "/v1/nothing", chatBody(), 404, 0},
		{"no JSON", answerChat, "/v1/chat/completions", "{", 400, 0},
		{"the provider fails", reply(500), "/v1/chat/completions", chatBody(), 500, 1},
		{"the provider is busy", reply(429), "/v1/chat/completions", chatBody(), 429, 1},
		{"the provider refuses the key", reply(401), "/v1/chat/completions", chatBody(), 502, 1},
		{"the provider breaks off", func(c *providerConn, _ recorded) bool { return false }, "/v1/chat/completions", chatBody(), 502, 1},
		{"the answer breaks off", func(c *providerConn, _ recorded) bool {
			_, _ = c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1"))
			return false
		}, "/v1/chat/completions", chatBody(), 0, 1},
		{"used up", answerChat, "/v1/chat/completions", chatBody(), 429, 0},
	} {
		p.provider.answer(test.script)
		before := p.count(id)
		if res := p.do("POST", test.path, test.body, auth...); res.status != test.status && (test.status != 0 || res.err == nil) {
			t.Errorf("%d %s: got %d %s", i, test.name, res.status, res.body)
		}
		if n := p.count(id) - before; n != test.counts {
			t.Errorf("%d %s: counts %d, want %d", i, test.name, n, test.counts)
		}
	}
	p.countsAgree()
}

// TestUsedUp: the refusal does not send clients into retrying what will not
// change, and a raised limit holds from the next call on, with the count kept.
func TestUsedUp(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	id, token := p.newToken(`"name":"u","max_requests":1`)
	p.chatAs(token)
	res := p.chatAs(token)
	if res.status != 429 || res.code() != "project_spend_limit_exceeded" || !strings.Contains(res.body, `"insufficient_quota"`) ||
		res.header.Get("X-Should-Retry") != "false" || res.header.Get("Retry-After") != "" {
		t.Errorf("got %d %v %s", res.status, res.header, res.body)
	}
	p.manage("PATCH", "/manage/tokens/"+id, `{"max_requests":2}`, 200, nil)
	if a, b := p.chatAs(token), p.chatAs(token); a.status != 200 || b.status != 429 {
		t.Errorf("after one more was allowed: got %d, %d", a.status, b.status)
	}
	p.manage("PATCH", "/manage/tokens/"+id, `{"max_requests":1}`, 200, nil)
	if res := p.chatAs(token); res.status != 429 || p.count(id) != 2 {
		t.Errorf("after it was lowered: got %d, count %d", res.status, p.count(id))
	}
}

// TestDeletedWhileRunning: calls in flight when their project is deleted are
// settled under its name.
func TestDeletedWhileRunning(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		c.sse()
		_ = c.chunk(chatEvents(true)[1])
		c.gone(10 * time.Second)
		return false
	})
	const n = 50
	for range n {
		if _, err := p.stream(p.token).read(1); err != nil {
			t.Fatal(err)
		}
	}
	p.manage("DELETE", "/manage/projects/"+p.project, "", http.StatusOK, nil)
	rows := p.rows()
	if len(rows) != n {
		t.Errorf("%d rows for %d calls", len(rows), n)
	}
	for _, v := range rows {
		if v.projectID != p.project || v.tokenID != p.tokenID || v.outcome != outcomeTruncated || v.source != usageEstimated || v.counts.output == 0 {
			t.Errorf("the ledger has %+v", v.requestRow)
		}
	}
	p.sumsAgree()
	p.countsAgree()
}
