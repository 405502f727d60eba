// These tests check limits over time (LI1, LI8, LI14): restarts, crashes, evictions, a locked database, and
// administrators who change limits while calls run. A window of an hour or longer is exact through all of
// them.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// windowLimits are limits of 20 calls, each of 12 tokens and $0.00000315, over every window. The max of tokens
// and dollars also covers the reservation of the last call.
func windowLimits(metric string) (out []string) {
	most := map[string]string{
		"requests": "20",
		"tokens":   fmt.Sprint(19*12 + 30),
		"dollars":  fmt.Sprintf("0.%09d", 19*3150+5_000),
	}[metric]
	for per := perHour; per <= perLifetime; per++ {
		out = append(out, fmt.Sprintf(`{"count":%q,"max":%s,"per":%q}`, metric, most, per))
	}
	return out
}

// callUse is what an answered call counts in a limit: one request, 9 and 3 tokens, and their price.
func callUse(metric string) float64 {
	return map[string]float64{"requests": 1, "tokens": 12, "dollars": 3150e-9}[metric]
}

// sameAmount compares amounts to the nano-dollar.
func sameAmount(a, b float64) bool { return fmt.Sprintf("%.9f", a) == fmt.Sprintf("%.9f", b) }

// tinyBody reserves 26 tokens for the request and 1 for the answer.
const tinyBody = `"max_tokens":1`

// useUpLimit makes up to most calls from each of n parallel clients, which stop when one is refused. It returns
// the number of answered calls.
func (p *testProxy) useUpLimit(token string, n, most int) int {
	var answered atomic.Int64
	var clients sync.WaitGroup
	for range n {
		clients.Go(func() {
			for range most {
				if _, status := p.sendChat(context.Background(), token, tinyBody); status != 200 {
					return
				}
				answered.Add(1)
			}
		})
	}
	clients.Wait()
	return int(answered.Load())
}

// TestWindowsSurvive: what was used before a restart, a kill -9 or an eviction stays used, for tokens and
// projects, to the last call.
func TestWindowsSurvive(t *testing.T) {
	t.Parallel()
	for _, metric := range []string{"requests", "tokens", "dollars"} {
		for _, scope := range []string{"token", "project"} {
			for _, event := range []string{"restart", "kill", "eviction"} {
				t.Run(strings.Join([]string{metric, scope, event}, " "), func(t *testing.T) {
					t.Parallel()
					checkWindowsSurvive(t, metric, scope, event)
				})
			}
		}
	}
}

func checkWindowsSurvive(t *testing.T, metric, scope, event string) {
	t.Helper()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	awaitClearOfHour(10 * time.Second)
	paths, tokens := map[string]string{}, map[string]string{}
	for i, limit := range windowLimits(metric) {
		made, path := p.newLimitedProject(fmt.Sprint("p", i), scope, limit, 1)
		tokens[limit], paths[limit] = made[0], path
		if n := p.useUpLimit(made[0], 1, 7); n != 7 {
			t.Fatalf("%s: %d of 7 calls were answered", limit, n)
		}
	}
	p.waitSettled()
	q := p
	switch event {
	case "restart":
		if err := p.stop(); err != nil {
			t.Fatal(err)
		}
		p.start()
	case "kill":
		q = p.crashedCopy()
	case "eviction":
		p.instance.registry.evict(time.Now().Add(time.Hour).UnixMilli(), true)
	}
	least := map[string]int{"requests": 13, "tokens": 10, "dollars": 10}[metric]
	for limit, token := range tokens {
		before := q.settledLimits(paths[limit])[0] // while the token is not in memory
		n := q.useUpLimit(token, 4, 20)
		if n > 13 || n < least {
			t.Errorf("%s: after 7 calls, %d of 13 more were answered", limit, n)
		}
		after := q.settledLimits(paths[limit])[0]
		if use := callUse(metric); !sameAmount(before.Used, 7*use) || !sameAmount(after.Used, float64(7+n)*use) {
			t.Errorf("%s: %+v, and after %d more calls %+v", limit, before, n, after)
		}
	}
}

// TestKilledAmidCalls: calls that ran when the program was killed count, because the provider may have served
// them. Their tokens count by the estimate: what the limit had reserved, also for a call that names no maximum.
func TestKilledAmidCalls(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	awaitClearOfHour(10 * time.Second)
	path, token := p.newLimitedToken(`{"count":"requests","max":10,"per":"hour"},` +
		`{"count":"requests","max":10,"per":"lifetime","endpoint":"/v1/chat/*"},` +
		`{"count":"tokens","max":100000,"per":"day","model":"gpt-4o-mini"},{"count":"concurrent","max":5}`)
	if n := p.useUpLimit(token, 1, 3); n != 3 {
		t.Fatalf("%d of 3 calls were answered", n)
	}
	p.waitSettled()
	p.provider.setScript(endlessScript)
	for range 5 {
		if _, err := p.stream(token, `"max_tokens":50`).read(1); err != nil {
			t.Fatal(err)
		}
	}
	paths, tokens := [2]string{}, [2]string{}
	for i, limit := range []string{`"tokens","max":100000`, `"dollars","max":1`} {
		paths[i], tokens[i] = p.newLimitedToken(`{"count":` + limit + `,"per":"day"}`)
		for _, maximum := range []string{"", `,"max_tokens":50`} {
			if _, err := p.stream(tokens[i], `"n":2`+maximum).read(1); err != nil {
				t.Fatal(err)
			}
		}
	}
	q := p.crashedCopy()
	p.provider.setScript(chatScript)
	if l := q.settledLimits(paths[0]); l[0].Used < 2*4096+2*50 {
		t.Errorf("after the kill, the limit of tokens is %+v", l)
	}
	if l := q.settledLimits(paths[1]); l[0].Used < (2*4096+2*50)*0.6e-6 { // the price of output
		t.Errorf("after the kill, the limit of dollars is %+v", l)
	}
	l := q.settledLimits(path)
	if l[0].Used != 8 || l[1].Used != 8 || l[2].Used < 3*12+5*50 || l[2].Used > 3*12+5*100 || l[3].Used != 0 {
		t.Errorf("after the kill: %+v", l)
	}
	if n := q.useUpLimit(token, 1, 20); n != 2 {
		t.Errorf("after the kill %d calls were answered; 2 remained", n)
	}
}

// TestLimitsChangeUnderLoad (LI8): while clients call without a pause, an administrator raises, lowers,
// removes and restores a limit. Each change applies as soon as it is answered, and no count starts again.
func TestLimitsChangeUnderLoad(t *testing.T) {
	t.Parallel()
	for _, scope := range []string{"token", "project"} {
		t.Run(scope, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
			awaitClearOfHour(20 * time.Second)
			tokens, path := p.newLimitedProject("load", scope, "", 2)
			set := func(limits string) {
				p.manage("PATCH", path, `{"policy":{"limits":[`+limits+`]}}`, 200, nil)
			}
			forwarded := func() int { return len(p.provider.received()) }
			refused, stop := p.callWithoutPause(tokens[0], 6)
			defer stop()
			const day = `{"count":"requests","max":%d,"per":"day"}`
			const lifetime = `{"count":"requests","max":%d,"per":"lifetime"}`
			for round := range 4 {
				waitFor(t, "calls", func() bool { return forwarded() >= (round+1)*30 })
				set("") // the calls that run now count in no limit
				waitFor(t, "calls without a limit", func() bool { return forwarded() >= (round+1)*30+10 })
				n, limit := forwarded()+40, []string{day, lifetime}[round%2]
				set(fmt.Sprintf(limit, n))         // counts all earlier calls exactly
				if late := forwarded(); late > n { // while it was being set: more than it allows, as it may be
					set("")
					n = late + 400
					set(fmt.Sprintf(limit, n))
				}
				waitFor(t, "the limit", func() bool { return forwarded() >= n })
				set(fmt.Sprintf(limit, n-20)) // lowered: refuses, and keeps the count
				raised := fmt.Sprintf(limit, n+5)
				set(raised)
				set(raised + `,{"count":"requests","max":1000000,"per":"hour"}`)
				waitFor(t, "the raised limit", func() bool { return forwarded() >= n+5 })
				set(raised + `,{"count":"concurrent","max":0,"model":"gpt-5*"}`)
				before := refused.Load()
				waitFor(t, "refused calls", func() bool { return refused.Load() >= before+20 })
				if got := forwarded(); got != n+5 {
					t.Fatalf("round %d: the provider got %d calls, the limit is %d", round, got, n+5)
				}
				set(fmt.Sprintf(limit, n+10_000))
			}
			stop()
			set(fmt.Sprintf(day, 1) + `,{"count":"tokens","max":1,"per":"month"},` + fmt.Sprintf(lifetime, 1))
			p.waitSettled()
			l, n := p.settledLimits(path), float64(forwarded())
			if l[0].Used != n || l[1].Used != 12*n || l[2].Used != n {
				t.Errorf("after %v calls: %+v", n, l)
			}
			p.checkSums()
			p.checkCounts()
		})
	}
}

// callWithoutPause starts n clients, each of which makes one call after the other, and counts the calls that
// are refused with 429. stop ends the clients and waits for them; it may be called twice.
func (p *testProxy) callWithoutPause(token string, n int) (refused *atomic.Int64, stop func()) {
	refused = new(atomic.Int64)
	var stopped atomic.Bool
	var clients sync.WaitGroup
	for range n {
		clients.Go(func() {
			for !stopped.Load() {
				switch _, status := p.sendChat(context.Background(), token, tinyBody); status {
				case 200:
				case 429:
					refused.Add(1)
				default:
					p.t.Errorf("got %d", status)
				}
			}
		})
	}
	return refused, func() {
		stopped.Store(true)
		clients.Wait()
	}
}

// TestLimitAddedAmidCalls (LI8): a limit that is added while calls run counts them: as requests, by what they
// reserve, and as running.
func TestLimitAddedAmidCalls(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	awaitClearOfHour(10 * time.Second)
	p.provider.setScript(endlessScript)
	for range 4 {
		if _, err := p.stream(p.token, `"max_tokens":70`).read(1); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"/manage/tokens/" + p.tokenID, "/manage/projects/" + p.project} {
		p.manage("PATCH", path, `{"policy":{"limits":[
			{"count":"requests","max":5,"per":"day"},{"count":"concurrent","max":5},
			{"count":"tokens","max":500,"per":"month"},
			{"count":"requests","max":9,"per":"day","model":"gpt-5*"}]}}`, 200, nil)
		l := p.currentLimits(path)
		if l[0].Used != 4 || l[1].Used != 4 || l[2].Reserved+l[2].Used < 4*70 || l[3].Used != 0 {
			t.Errorf("%s: %+v", path, l)
		}
	}
	p.provider.setScript(chatScript)
	if n := p.useUpLimit(p.token, 4, 3); n != 1 {
		t.Errorf("beside 4 running calls %d were answered; 1 remained", n)
	}
}

// TestCommitTimeout (LI14): calls that wait too long for the ledger are refused without being forwarded. They
// do not count, whether the ledger writes them later or never.
func TestCommitTimeout(t *testing.T) {
	t.Parallel()
	for _, busy := range []int{50, 3000} { // the write fails while the database is locked, or waits for the lock
		t.Run(fmt.Sprint(busy), func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
			p.allowErrors = true
			commitTimeout := p.instance.running.limits.commitTimeout
			awaitClearOfHour(20 * time.Second)
			id, token := p.newToken(`"name":"l","max_requests":12,
				"policy":{"limits":[{"count":"requests","max":12,"per":"day"}]}`)
			if n := p.useUpLimit(token, 1, 2); n != 2 {
				t.Fatalf("%d of 2 calls were answered", n)
			}
			p.waitSettled()
			p.setPragma(fmt.Sprintf(`PRAGMA busy_timeout = %d`, busy))
			release := p.lockDatabase()
			p.setCallLimits(func(l *callLimits) { l.commitTimeout = 200 * time.Millisecond })
			if statuses := p.burst(token, 8); statuses[503] != 8 {
				t.Errorf("while the database was locked clients got %v", statuses)
			}
			p.setCallLimits(func(l *callLimits) { l.commitTimeout = commitTimeout })
			release()
			waitFor(t, "the ledger", p.instance.ledger.healthy)
			p.waitSettled()
			if n := p.requestCount(id); n != 2 || len(p.provider.received()) != 2 {
				t.Errorf("the count is %d after %d calls", n, len(p.provider.received()))
			}
			p.checkCounts()
			if n := p.useUpLimit(token, 3, 20); n != 10 {
				t.Errorf("of the remaining 10 calls %d were answered", n)
			}
			p.checkCounts()
		})
	}
}

// TestLockedDatabase (LI14): while the database accepts no writes, calls are refused with 503 and no limit is
// ignored. Refused calls do not count afterwards.
func TestLockedDatabase(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]string{
		"requests per day":    `{"count":"requests","max":10,"per":"day"}`,
		"requests per second": `{"count":"requests","max":10,"per":"second"}`,
		"dollars in total":    `{"count":"dollars","max":0.000100,"per":"lifetime"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
			p.allowErrors = true
			awaitClearOfHour(10 * time.Second)
			id, token := p.newToken(`"name":"l","max_requests":20,"policy":{"limits":[` + limit + `]}`)
			if n := p.useUpLimit(token, 1, 2); n != 2 {
				t.Fatalf("%d of 2 calls were answered", n)
			}
			p.waitSettled()
			p.setPragma(`PRAGMA busy_timeout = 20`)
			hits, durable := len(p.provider.received()), strings.Contains(name, "day")
			release := p.lockDatabase()
			statuses := p.burst(token, 50)
			if statuses[200] != 0 || statuses[503] == 0 || statuses[503]+statuses[429] != 50 {
				t.Errorf("while the database was locked clients got %v", statuses)
			}
			if n := len(p.provider.received()) - hits; n > 10 || durable && n != 0 {
				t.Errorf("while the database was locked the provider got %d calls", n)
			}
			release()
			waitFor(t, "the ledger", p.instance.ledger.healthy)
			p.waitSettled()
			if n := p.requestCount(id); n != 2 {
				t.Errorf("the count is %d after 2 calls", n)
			}
			p.checkCounts()
			if !durable {
				return
			}
			if l := p.settledLimits("/manage/tokens/" + id)[0]; l.Used != 2 {
				t.Errorf("after 2 calls: %+v", l)
			}
			if n := p.useUpLimit(token, 3, 20); n != 8 {
				t.Errorf("of the remaining 8 calls %d were answered", n)
			}
		})
	}
}

// A streamStatus is a running call in the answer of GET /manage/streams.
type streamStatus struct {
	ID, Endpoint, Model, Address, State string
	StartedAt                           time.Time `json:"started_at"`
	AgeMS                               int64     `json:"age_ms"`
	ProjectID                           string    `json:"project_id"`
	ProjectName                         string    `json:"project_name"`
	TokenID                             string    `json:"token_id"`
	TokenName                           string    `json:"token_name"`
	Stream                              bool
	Bytes                               int64
	InputTokens                         int64 `json:"input_tokens"`
	OutputTokens                        int64 `json:"output_tokens"`
}

func (p *testProxy) streams(query string) (list []streamStatus, next string) {
	p.t.Helper()
	var v struct {
		Data []streamStatus
		Next string
	}
	p.manage("GET", "/manage/streams"+query, "", 200, &v)
	return v.Data, v.Next
}

// TestStreamsAreListed: each running call is listed once with its progress, oldest first, by page and by
// project or token. It disappears when it ends.
func TestStreamsAreListed(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if list, _ := p.streams(""); len(list) != 0 {
		t.Errorf("without a call there are %+v", list)
	}
	project, tokens, ids := p.newProject("watched", `{}`, `{}`, 1)
	event, enough := chatEvents(true)[1], make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if !strings.Contains(r.body, `"stream":true`) {
			<-enough
			return chatScript(c, r)
		}
		c.beginSSE()
		_ = c.chunk(strings.Repeat(event, 200))
		<-enough
		for _, e := range chatEvents(true) {
			_ = c.chunk(e)
		}
		return endStream(c)
	})
	p.instance.proxy.ids.next(time.Now().Add(time.Second)) // as if another call had got its id a moment before these
	var all sync.WaitGroup
	for range 5 {
		all.Go(func() { p.sendChat(context.Background(), p.token, `"max_tokens":10`) })
	}
	waitFor(t, "the calls", func() bool { return len(p.provider.received()) == 5 })
	s := p.stream(tokens[0])
	if _, err := s.read(200 * len(event)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the calls", func() bool { list, _ := p.streams(""); return len(list) == 6 })
	// The client has the bytes a moment before the proxy counts them and waits for more.
	waitFor(t, "the stream", func() bool {
		list, _ := p.streams("?project_id=" + project)
		return len(list) == 1 && list[0].State == "relaying"
	})
	p.checkListedStreams(project, ids[0])
	p.checkStreamPages(6)
	list, _ := p.streams("")
	for _, v := range list {
		var row struct {
			StartedAt time.Time `json:"started_at"`
		}
		if p.manage("GET", "/manage/requests/"+v.ID, "", 200, &row); !row.StartedAt.Equal(v.StartedAt) {
			t.Errorf("%s started at %v, but by its row at %v", v.ID, v.StartedAt, row.StartedAt)
		}
	}
	for _, query := range []string{"?limit=0", "?limit=x", "?after=x", "?token=x", "?project_id=a&project_id=b"} {
		if res := p.manageAs(p.adminKey, "GET", "/manage/streams"+query, ""); res.status != 400 {
			t.Errorf("%s: got %d %s", query, res.status, res.body)
		}
	}
	close(enough)
	if rest, err := s.readAll(); err != nil || !strings.HasSuffix(rest, "[DONE]\n\n") {
		t.Errorf("the stream ended with %v", err)
	}
	all.Wait()
	p.waitSettled()
	if list, _ := p.streams(""); len(list) != 0 {
		t.Errorf("when all calls have ended there are %+v", list)
	}
}

// checkListedStreams checks the lists of TestStreamsAreListed: one stream of the project and its token, and
// five calls of the test's own token.
func (p *testProxy) checkListedStreams(project, token string) {
	p.t.Helper()
	list, _ := p.streams("?project_id=" + project)
	if len(list) != 1 {
		p.t.Fatalf("of the project there are %+v", list)
	}
	v := list[0]
	if v.TokenID != token || v.TokenName != "t" || v.ProjectName != "watched" || !v.Stream ||
		v.Endpoint != "POST /v1/chat/completions" || v.Model != "gpt-4o-mini" || v.Address != "127.0.0.1" ||
		v.State != "relaying" || v.Bytes < 200*50 || v.OutputTokens < 150 || v.InputTokens < 20 ||
		v.AgeMS < 0 || time.Since(v.StartedAt) > time.Minute {
		p.t.Errorf("the stream is %+v", v)
	}
	list, _ = p.streams("?token_id=" + p.tokenID)
	if len(list) != 5 || list[0].Stream || list[0].State != "provider" || list[0].Bytes != 0 {
		p.t.Errorf("of the token there are %+v", list)
	}
}

// checkStreamPages reads the running calls in pages of two: n calls, each once, oldest first.
func (p *testProxy) checkStreamPages(n int) {
	p.t.Helper()
	seen, last := map[string]bool{}, time.Time{}
	for query, more := "?limit=2", true; more; {
		list, next := p.streams(query)
		for _, v := range list {
			if seen[v.ID] || v.StartedAt.Before(last) {
				p.t.Errorf("%s is listed twice or out of order", v.ID)
			}
			seen[v.ID], last = true, v.StartedAt
		}
		query, more = "?limit=2&after="+next, next != ""
	}
	if len(seen) != n {
		p.t.Errorf("page by page there are %d calls, want %d", len(seen), n)
	}
}

// TestStreamsAreCut: an operator can end a call in any state. Its client and its row show that, its slot is
// released, and other calls continue.
func TestStreamsAreCut(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, viewer := p.newKey("v", "viewer")
	_, operator := p.newKey("o", "operator")
	id, token := p.newToken(`"name":"c","policy":{"limits":[{"count":"concurrent","max":2}]}`)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if !strings.Contains(r.body, `"stream":true`) {
			return stallScript(c, r)
		}
		return endlessScript(c, r)
	})
	other := p.stream(p.token)
	s := p.stream(token)
	if _, err := s.read(len(chatEvents(true)[1])); err != nil {
		t.Fatal(err)
	}
	waiting := make(chan testResponse, 1)
	go func() { waiting <- p.chatAs(token) }()
	count := func() int { list, _ := p.streams("?token_id=" + id); return len(list) }
	waitFor(t, "the second call", func() bool { return count() == 2 })
	list, _ := p.streams("?token_id=" + id)
	cut := func(key, call string) testResponse { return p.manageAs(key, "DELETE", "/manage/streams/"+call, "") }
	for key, want := range map[string]int{viewer: 403, p.token: 401, token: 401} {
		if res := cut(key, list[0].ID); res.status != want {
			t.Errorf("got %d, want %d: %s", res.status, want, res.body)
		}
	}
	if res := p.manageAs(viewer, "GET", "/manage/streams", ""); res.status != 200 {
		t.Errorf("a viewer got %d", res.status)
	}
	if n := count(); n != 2 {
		t.Fatalf("of 2 calls %d remain", n)
	}
	for _, v := range list {
		elapsed := stopwatch(t)
		if res := cut(operator, v.ID); res.status != 200 {
			t.Errorf("got %d %s", res.status, res.body)
		}
		if v.Stream {
			if rest, err := s.readAll(); err == nil || strings.Contains(rest, "[DONE]") {
				t.Errorf("the stream ended as if it were complete: %q", rest)
			}
		} else if res := <-waiting; res.status != 403 || res.errorCode() != "cut_by_administrator" {
			t.Errorf("the waiting call: got %d %s", res.status, res.body)
		}
		if d := elapsed(); d > time.Second {
			t.Errorf("the call ended after %v", d)
		}
	}
	waitFor(t, "their ends", func() bool { return count() == 0 })
	for _, call := range []string{list[0].ID, "req_0000000000000", "x", "%2e%2e", strings.Repeat("z", 5000)} {
		if res := cut(operator, call); res.status != 404 {
			t.Errorf("DELETE of %s: got %d %s", clip(call, 20), res.status, res.body)
		}
	}
	p.checkCutStreams(id, other)
}

// checkCutStreams checks that the two calls of a token were cut, and that the other stream still runs.
func (p *testProxy) checkCutStreams(tokenID string, other *clientStream) {
	p.t.Helper()
	if list, _ := p.streams(""); len(list) != 1 || list[0].TokenID != p.tokenID {
		p.t.Errorf("beside the calls that were cut there are %+v", list)
	}
	if l := p.currentLimits("/manage/tokens/" + tokenID)[0]; l.Used != 0 {
		p.t.Errorf("the limit of running calls is %+v", l)
	}
	if err := other.body.Close(); err != nil {
		p.t.Error(err)
	}
	cut := 0
	for _, row := range p.ledger() {
		if row.TokenID != tokenID {
			continue
		}
		cut++
		if row.Outcome != "truncated" || row.ErrorCode != "cut_by_administrator" || row.UsageSource != "estimated" {
			p.t.Errorf("the ledger has %+v", row)
		}
	}
	if cut != 2 {
		p.t.Errorf("the ledger has %d calls of the token, want 2", cut)
	}
}

// TestMaxConcurrentCalls: the setting limits the running calls of all tokens, including those that have not
// sent their body yet. Further calls are asked to retry, and do not count in their limits.
func TestMaxConcurrentCalls(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_CONCURRENT_CALLS": "10", "LOG_LEVEL": "error"})
	p.allowErrors = true // a full proxy logs an error
	path, token := p.newLimitedToken(`{"count":"requests","max":1000,"per":"lifetime"}`)
	for round := range 5 {
		hits, statuses := p.runConcurrently(50, func(i int) int {
			status, h := p.send(nil, []string{p.token, token}[i%2], chatBody(tinyBody))
			if status == 503 && h.Get("Retry-After") == "" {
				t.Error("503 without Retry-After")
			}
			return status
		})
		if hits != 10 || statuses[200] != 10 || statuses[503] != 40 {
			t.Errorf("round %d: %d calls ran at once, clients got %v", round, hits, statuses)
		}
		p.waitSettled()
	}
	calls := 0.0
	for _, v := range p.allRequests() {
		if v.outcome == outcomeOK && v.tokenID != p.tokenID {
			calls++
		}
	}
	if l := p.settledLimits(path)[0]; l.Used != calls {
		t.Errorf("after %v calls: %+v", calls, l)
	}
	var open []net.Conn
	for range 10 {
		conn := p.dial()
		_, _ = io.WriteString(conn, strings.TrimSuffix(p.rawChatRequest("", chatBody()), "}"))
		open = append(open, conn)
	}
	waitFor(t, "the bodies", func() bool { return p.countInPhase(phaseReading) == 10 })
	if res := p.chat(); res.status != 503 || res.errorCode() != "too_many_calls" {
		t.Errorf("beside 10 calls that send their bodies: got %d %s", res.status, res.body)
	}
	if res := p.do("GET", ownTokenPath, "", "Authorization", "Bearer "+p.token); res.status != 200 {
		t.Errorf("GET %s: got %d %s", ownTokenPath, res.status, res.body)
	}
	for _, conn := range open {
		conn.Close()
	}
	waitFor(t, "their ends", func() bool { return p.countInPhase(phaseReading) == 0 })
	if res := p.chat(); res.status != 200 {
		t.Errorf("after they ended: got %d %s", res.status, res.body)
	}
}

// TestBodyMemoryOfAToken: the bodies of one token use at most a quarter of the shared memory, so that it
// cannot lock out the others. The memory is released afterwards.
func TestBodyMemoryOfAToken(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_BODY_BYTES": "1MiB", "BODY_MEMORY": "8MiB", "LOG_LEVEL": "error"})
	_, greedy := p.newToken(`"name":"greedy"`)
	var open []net.Conn
	for range 12 {
		conn := p.dial()
		_, _ = fmt.Fprintf(conn, "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"+
			"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
			greedy, 1<<20, strings.Repeat(" ", 900<<10))
		open = append(open, conn)
	}
	var readers sync.WaitGroup
	got := make(chan string, len(open))
	for _, conn := range open {
		readers.Go(func() {
			_ = conn.SetReadDeadline(time.Now().Add(hangTimeout))
			b := make([]byte, 4096)
			n, _ := conn.Read(b)
			got <- string(b[:n])
		})
	}
	for range 8 { // at least so many do not fit
		if text := <-got; !strings.HasPrefix(text, "HTTP/1.1 429 ") || !strings.Contains(text, "body_memory_full") ||
			!strings.Contains(text, "\r\nRetry-After: 1\r\n") {
			t.Errorf("got %q", text)
		}
	}
	if used := p.instance.proxy.bodies.used.Load(); used > 2<<20+64<<10 {
		t.Errorf("one token uses %d bytes of 8 MiB", used)
	}
	large := `"user":"` + strings.Repeat("x", 1000<<10) + `"`
	if res := p.chat(large); res.status != 200 {
		t.Errorf("another token: got %d %s", res.status, res.body)
	}
	for _, conn := range open {
		conn.Close()
	}
	readers.Wait()
	p.waitSettled()
	if res := p.chatAs(greedy, large); res.status != 200 {
		t.Errorf("the token, when its calls have ended: got %d %s", res.status, res.body)
	}
}

// awaitClearOfHour waits until the next full hour, where every calendar window may start, is at least d away.
func awaitClearOfHour(d time.Duration) {
	if wait := time.Until(time.Now().Truncate(time.Hour).Add(time.Hour)); wait < d {
		time.Sleep(wait + 10*time.Millisecond)
	}
}

// newProject creates a project with one policy, and n tokens in it with another.
func (p *testProxy) newProject(name, policy, tokenPolicy string, n int) (id string, tokens, ids []string) {
	p.t.Helper()
	var v struct{ ID string }
	p.manage("POST", "/manage/projects",
		fmt.Sprintf(`{"name":%q,"openai_api_key":%q,"policy":%s}`, name, p.provider.key, policy), 201, &v)
	for range n {
		var tok struct{ ID, Token string }
		p.manage("POST", "/manage/tokens",
			fmt.Sprintf(`{"project_id":%q,"name":"t","policy":%s}`, v.ID, tokenPolicy), 201, &tok)
		p.mu.Lock()
		p.secrets = append(p.secrets, tok.Token)
		p.mu.Unlock()
		tokens, ids = append(tokens, tok.Token), append(ids, tok.ID)
	}
	return v.ID, tokens, ids
}

// newLimitedProject creates a project with n tokens. The limits are the project's or, if scope is "token", each
// token's. path is the project's URL in /manage or, accordingly, the first token's.
func (p *testProxy) newLimitedProject(name, scope, limits string, n int) (tokens []string, path string) {
	p.t.Helper()
	limits = `{"limits":[` + limits + `]}`
	if scope == "token" {
		_, tokens, ids := p.newProject(name, `{}`, limits, n)
		return tokens, "/manage/tokens/" + ids[0]
	}
	id, tokens, _ := p.newProject(name, limits, `{}`, n)
	return tokens, "/manage/projects/" + id
}

// newLimitedToken creates a token with these limits and returns its path in /manage.
func (p *testProxy) newLimitedToken(limits string) (path, token string) {
	p.t.Helper()
	id, token := p.newToken(`"name":"l","policy":{"limits":[` + limits + `]}`)
	return "/manage/tokens/" + id, token
}

// settledLimits returns the state of the limits of a token or project when no call runs.
func (p *testProxy) settledLimits(path string) []limitStatus {
	p.t.Helper()
	p.waitSettled()
	return p.currentLimits(path)
}

// A limitStatus is the state of a limit in the answer of a GET.
type limitStatus struct {
	Count, Per, Endpoint, Model string
	Max, Used, Reserved, Left   float64
	Shadow                      bool
	ResetsAt                    *time.Time `json:"resets_at"`
	WouldRefuse                 int        `json:"would_refuse"`
}

func (p *testProxy) currentLimits(path string) []limitStatus {
	p.t.Helper()
	var v struct{ Limits []limitStatus }
	p.manage("GET", path, "", 200, &v)
	return v.Limits
}

// send makes a chat call from any goroutine, over rt or, if that is nil, over a new connection. Status 0 means
// no complete answer.
func (p *testProxy) send(rt http.RoundTripper, token, body string, headers ...string) (int, http.Header) {
	req, err := http.NewRequestWithContext(context.Background(), "POST", p.url+"/v1/chat/completions",
		strings.NewReader(body))
	if err != nil {
		p.t.Error(err)
		return 0, nil
	}
	req.Header = http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	if rt == nil {
		rt = &http.Transport{DisableKeepAlives: true}
	}
	res, err := rt.RoundTrip(req)
	if err != nil {
		return 0, nil
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return 0, res.Header
	}
	return res.StatusCode, res.Header
}

// callAtOnce makes n calls at the same moment and returns the number of answers with each status.
func callAtOnce(n int, call func(i int) (status int)) map[int]int {
	var mu sync.Mutex
	statuses := map[int]int{}
	var all, ready sync.WaitGroup
	barrier := make(chan struct{})
	ready.Add(n)
	for i := range n {
		all.Go(func() {
			ready.Done()
			<-barrier
			status := call(i)
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

// runConcurrently makes n calls at the same moment. The provider answers only when each call has reached it
// or was refused, so that all admitted calls run together. It returns how many reached the provider, and the
// number of answers with each status.
func (p *testProxy) runConcurrently(n int, call func(i int) (status int)) (hits int, statuses map[int]int) {
	p.t.Helper()
	var in, out atomic.Int64
	open := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if c.waitClosed(time.Millisecond) { // an earlier call, which the provider reads only now
			return false
		}
		_ = c.SetReadDeadline(time.Time{})
		in.Add(1)
		<-open
		return chatScript(c, r)
	})
	done := make(chan map[int]int, 1)
	go func() {
		done <- callAtOnce(n, func(i int) int {
			defer out.Add(1)
			return call(i)
		})
	}()
	waitFor(p.t, "the calls to be with the provider or over", func() bool { return in.Load()+out.Load() >= int64(n) })
	hits = int(in.Load())
	close(open)
	statuses = <-done
	p.provider.setScript(chatScript)
	return hits, statuses
}

// A limitKind is a limit that admits exactly 5 calls: a new one, or one with 3 calls already made. Its max is
// in JSON.
type limitKind struct {
	metric, per string
	newMax      string  // max for 5 calls
	usedMax     string  // max for 3 that were answered, and 5
	rate        float64 // calls that refill per millisecond
}

// limitKinds has every kind of limit. A call may need 26 tokens for its body and 100 for its answer; it uses
// 9 and 3. A token of gpt-4o-mini costs 150 and 600 nano-dollars.
func limitKinds() (out []limitKind) {
	const need, used, needUSD, usedUSD = 126, 12, 26*150 + 100*600, 9*150 + 3*600
	for per := perSecond; per <= perLifetime; per++ {
		requests := limitKind{metric: "requests", per: per.String(), newMax: "5", usedMax: "8"}
		tokens := limitKind{metric: "tokens", per: per.String(), newMax: fmt.Sprint(5*need + need/2),
			usedMax: fmt.Sprint(3*used + 5*need + need/2)}
		if b := per.bucketMS(); b > 0 { // checkExactlyFive allows for what refills
			requests.usedMax, requests.rate = requests.newMax, 5/float64(b)
			tokens.usedMax, tokens.rate = tokens.newMax, 5.5/float64(b)
		}
		out = append(out, requests, tokens)
		if per >= perHour {
			out = append(out, limitKind{metric: "dollars", per: per.String(),
				newMax:  fmt.Sprintf("0.%09d", 5*needUSD+needUSD/2),
				usedMax: fmt.Sprintf("0.%09d", 3*usedUSD+5*needUSD+needUSD/2)})
		}
	}
	return append(out, limitKind{metric: "concurrent", newMax: "5", usedMax: "5"})
}

// fiveBody reserves what limitKinds says.
const fiveBody = `"max_tokens":100`

// TestExactlyN (LI1): each kind of limit admits exactly its number of parallel calls.
func TestExactlyN(t *testing.T) {
	t.Parallel()
	if n := len(chatBody(fiveBody)); (n+3)/4 != 26 {
		t.Fatalf("the body has %d bytes: limitKinds is made for another number", n)
	}
	for _, scope := range []string{"token", "project"} {
		for _, warm := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, warm %v", scope, warm), func(t *testing.T) {
				t.Parallel()
				p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
				for i, k := range limitKinds() {
					p.checkExactlyFive(k, scope, warm, i%3)
				}
				p.checkSums()
				p.checkCounts()
			})
		}
	}
}

// json returns the limit with a max as JSON. Patterns 1 and 2 restrict it to an endpoint or a model, beside
// limits that do not apply to the calls.
func (k limitKind) json(most string, pattern int) string {
	limit := fmt.Sprintf(`{"count":%q,"max":%s`, k.metric, most)
	if k.per != "" {
		limit += fmt.Sprintf(`,"per":%q`, k.per)
	}
	return limit + []string{
		`}`,
		`,"endpoint":"/v1/chat/*"},{"count":"requests","max":0,"per":"day","endpoint":"POST /v1/embeddings"}`,
		`,"model":"gpt-4o*"},{"count":"concurrent","max":0,"model":"gpt-5*"}`,
	}[pattern]
}

// checkExactlyFive checks one kind of limit: new, or warm, with three calls already made.
func (p *testProxy) checkExactlyFive(k limitKind, scope string, warm bool, pattern int) {
	p.t.Helper()
	const made, calls = 3, 40
	name := fmt.Sprintf("%s per %s of a %s, warm %v, pattern %d", k.metric, k.per, scope, warm, pattern)
	most := k.newMax
	if warm {
		most = k.usedMax
	}
	awaitClearOfHour(5 * time.Second)
	clients := 1
	if scope == "project" {
		clients = 3
	}
	tokens, path := p.newLimitedProject(name, scope, k.json(most, pattern), clients)
	before := time.Now()
	if warm {
		for i := range made {
			if res := p.chatAs(tokens[i%len(tokens)], fiveBody); res.status != 200 {
				p.t.Fatalf("%s: got %d %s", name, res.status, res.body)
			}
		}
		p.waitSettled()
		if k.rate > 0 && k.metric == "tokens" { // replicas return to a bucket what a call has not used a moment later
			waitFor(p.t, "what was not used to return", func() bool {
				return p.settledLimits(path)[0].Used <= made*callUse(k.metric)
			})
			before = time.Now()
		}
	}
	want := 5
	if k.rate > 0 && warm && k.metric != "tokens" { // settling returns unused tokens, but never a request
		want -= made
	}
	hits, statuses := p.runConcurrently(calls, func(i int) int {
		status, _ := p.send(nil, tokens[i%len(tokens)], chatBody(fiveBody))
		return status
	})
	// Limits of tokens fit half a call more than five.
	refilled := int(k.rate*float64(time.Since(before).Milliseconds()+1) + 0.5)
	if hits < want || hits > want+refilled || k.rate == 0 && hits != want ||
		statuses[200] != hits || statuses[429] != calls-hits {
		p.t.Errorf("%s: of %d calls %d reached the provider, want %d and up to %d more that refilled; clients got %v",
			name, calls, hits, want, refilled, statuses)
	}
	l := p.settledLimits(path)[0]
	if l.Reserved != 0 || k.metric == "concurrent" && l.Used != 0 {
		p.t.Errorf("%s: when no call runs, the limit is %+v", name, l)
	}
	if k.rate > 0 || k.metric == "concurrent" {
		return
	}
	done := hits
	if warm {
		done += made
	}
	if !sameAmount(l.Used, float64(done)*callUse(k.metric)) {
		p.t.Errorf("%s: after %d calls the limit is %+v", name, done, l)
	}
}

// TestOneCounter (LI10): HTTP/1.1, HTTP/2 and clients at many addresses behind a trusted proxy share one
// count per token and project.
func TestOneCounter(t *testing.T) {
	t.Parallel()
	cert, key := testCertificate(t, t.TempDir(), time.Hour)
	p := newTest(t, map[string]string{
		"LOG_LEVEL": "error", "TRUSTED_PROXIES": "127.0.0.1", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key})
	h2 := p.http2(cert)
	defer h2.CloseIdleConnections()
	for i, limit := range []string{
		`{"count":"requests","max":5,"per":"day"}`,
		`{"count":"concurrent","max":5}`,
		`{"count":"tokens","max":693,"per":"lifetime"}`,
	} {
		for _, scope := range []string{"token", "project"} {
			awaitClearOfHour(5 * time.Second)
			tokens, _ := p.newLimitedProject(fmt.Sprint(scope, i), scope, limit, 1)
			hits, statuses := p.runConcurrently(60, func(i int) int {
				rt := h2
				if i%2 == 0 {
					rt = p.http2(cert)
					rt.ForceAttemptHTTP2, rt.DisableKeepAlives = false, true
				}
				status, _ := p.send(rt, tokens[0], chatBody(fiveBody),
					"X-Forwarded-For", fmt.Sprintf("198.51.100.%d, 203.0.113.%d", i, i%10))
				return status
			})
			if hits != 5 || statuses[200] != 5 || statuses[429] != 55 {
				t.Errorf("%s of a %s: %d calls reached the provider, clients got %v", limit, scope, hits, statuses)
			}
		}
	}
	addresses := map[string]bool{}
	for _, v := range p.allRequests() {
		addresses[v.address] = true
	}
	if len(addresses) < 5 {
		t.Errorf("the calls came from %v: too few addresses for this test", addresses)
	}
}
