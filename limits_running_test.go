// Tests of running calls: administrators see them and can cut one, all of them
// together are bounded, and so is the memory that one token's bodies take.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// A streamNow is a running call as GET /manage/streams shows it.
type streamNow struct {
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

func (p *testProxy) streams(query string) (list []streamNow, next string) {
	p.t.Helper()
	var v struct {
		Data []streamNow
		Next string
	}
	p.manage("GET", "/manage/streams"+query, "", 200, &v)
	return v.Data, v.Next
}

// TestStreamsAreListed: each running call is there once, oldest first, page by
// page and by its project or token, with how far it is; and not when it is over.
func TestStreamsAreListed(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if list, _ := p.streams(""); len(list) != 0 {
		t.Errorf("without a call there are %+v", list)
	}
	project, tokens, ids := p.newProject("watched", `{}`, `{}`, 1)
	enough := make(chan struct{})
	p.provider.answer(func(c *providerConn, r recorded) bool {
		if !strings.Contains(r.body, `"stream":true`) {
			<-enough
			return answerChat(c, r)
		}
		c.sse()
		_ = c.chunk(strings.Repeat(chatEvents(true)[1], 200))
		<-enough
		for _, e := range chatEvents(true) {
			_ = c.chunk(e)
		}
		return c.chunk("") == nil
	})
	var all sync.WaitGroup
	for range 5 {
		all.Go(func() { p.callFree(context.Background(), p.token, `"max_tokens":10`) })
	}
	waitFor(t, "the calls", func() bool { return len(p.provider.got()) == 5 })
	s := p.stream(tokens[0])
	if _, err := s.read(200 * len(chatEvents(true)[1])); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the calls", func() bool { list, _ := p.streams(""); return len(list) == 6 })
	list, _ := p.streams("?project_id=" + project)
	if len(list) != 1 {
		t.Fatalf("of the project there are %+v", list)
	}
	if v := list[0]; v.TokenID != ids[0] || v.TokenName != "t" || v.ProjectName != "watched" || v.Endpoint != "POST /v1/chat/completions" || v.Model != "gpt-4o-mini" ||
		!v.Stream || v.Address != "127.0.0.1" || v.Bytes < 200*50 || v.OutputTokens < 150 || v.InputTokens < 20 || v.AgeMS < 0 || time.Since(v.StartedAt) > time.Minute || v.State != "relaying" {
		t.Errorf("the stream is %+v", v)
	}
	if list, _ := p.streams("?token_id=" + p.tokenID); len(list) != 5 || list[0].Stream || list[0].State != "provider" || list[0].Bytes != 0 {
		t.Errorf("of the token there are %+v", list)
	}
	seen, last := map[string]bool{}, time.Time{}
	for query := "?limit=2"; ; {
		list, next := p.streams(query)
		for _, v := range list {
			if seen[v.ID] || v.StartedAt.Before(last) {
				t.Errorf("%s twice, or out of order", v.ID)
			}
			seen[v.ID], last = true, v.StartedAt
		}
		if next == "" {
			break
		}
		query = "?limit=2&after=" + next
	}
	if len(seen) != 6 {
		t.Errorf("page by page there are %d calls", len(seen))
	}
	for _, query := range []string{"?limit=0", "?limit=x", "?after=x", "?token=x", "?project_id=a&project_id=b"} {
		if res := p.manageAs(p.adminKey, "GET", "/manage/streams"+query, ""); res.status != 400 {
			t.Errorf("%s: got %d %s", query, res.status, res.body)
		}
	}
	close(enough)
	if rest, err := s.rest(); err != nil || !strings.HasSuffix(rest, "[DONE]\n\n") {
		t.Errorf("the stream ended with %v", err)
	}
	all.Wait()
	p.settle()
	if list, _ := p.streams(""); len(list) != 0 {
		t.Errorf("when all are over there are %+v", list)
	}
}

// TestStreamsAreCut: an operator may end a call, whatever it waits for. Its client
// sees that, its row says so, its place is free, and other calls go on.
func TestStreamsAreCut(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, viewer := p.newKey("v", "viewer")
	_, operator := p.newKey("o", "operator")
	id, token := p.newToken(`"name":"c","policy":{"limits":[{"count":"concurrent","max":2}]}`)
	p.provider.answer(func(c *providerConn, r recorded) bool {
		if !strings.Contains(r.body, `"stream":true`) {
			return silence(c, r)
		}
		return endless(c, r)
	})
	other := p.stream(p.token)
	s := p.stream(token)
	if _, err := s.read(len(chatEvents(true)[1])); err != nil {
		t.Fatal(err)
	}
	waiting := make(chan answer, 1)
	go func() { waiting <- p.chatAs(token) }()
	waitFor(t, "the second call", func() bool { list, _ := p.streams("?token_id=" + id); return len(list) == 2 })
	list, _ := p.streams("?token_id=" + id)
	for key, want := range map[string]int{viewer: 403, p.token: 401, token: 401} {
		if res := p.manageAs(key, "DELETE", "/manage/streams/"+list[0].ID, ""); res.status != want {
			t.Errorf("got %d, want %d: %s", res.status, want, res.body)
		}
	}
	if res := p.manageAs(viewer, "GET", "/manage/streams", ""); res.status != 200 {
		t.Errorf("a viewer got %d", res.status)
	}
	if again, _ := p.streams("?token_id=" + id); len(again) != 2 {
		t.Fatalf("of 2 calls %d are left", len(again))
	}
	for _, v := range list {
		asked := time.Now()
		if res := p.manageAs(operator, "DELETE", "/manage/streams/"+v.ID, ""); res.status != 200 {
			t.Errorf("got %d %s", res.status, res.body)
		}
		if v.Stream {
			if rest, err := s.rest(); err == nil || strings.Contains(rest, "[DONE]") {
				t.Errorf("the stream ended as if it were complete: %q", rest)
			}
		} else if res := <-waiting; res.status != 403 || res.code() != "cut_by_administrator" {
			t.Errorf("the waiting call: got %d %s", res.status, res.body)
		}
		if d := time.Since(asked); d > time.Second {
			t.Errorf("it took %v", d)
		}
	}
	waitFor(t, "their ends", func() bool { list, _ := p.streams("?token_id=" + id); return len(list) == 0 })
	for _, gone := range []string{list[0].ID, "req_0000000000000", "x", "%2e%2e", strings.Repeat("z", 5000)} {
		if res := p.manageAs(operator, "DELETE", "/manage/streams/"+gone, ""); res.status != 404 {
			t.Errorf("DELETE of %s: got %d %s", clip(gone, 20), res.status, res.body)
		}
	}
	if list, _ := p.streams(""); len(list) != 1 || list[0].TokenID != p.tokenID {
		t.Errorf("beside those that were cut there are %+v", list)
	}
	if l := p.limitsNow("/manage/tokens/" + id)[0]; l.Used != 0 {
		t.Errorf("the places are %+v", l)
	}
	if err := other.body.Close(); err != nil {
		t.Error(err)
	}
	cut := 0
	for _, row := range p.ledger() {
		if row.TokenID == id {
			cut++
			if row.Outcome != "truncated" || row.ErrorCode != "cut_by_administrator" || row.UsageSource != "estimated" {
				t.Errorf("the ledger has %+v", row)
			}
		}
	}
	if cut != 2 {
		t.Errorf("%d calls are on record as cut", cut)
	}
}

// TestMaxConcurrentCalls: of all tokens together no more calls run than the
// setting says, those among them that have not sent their body yet. Who comes on
// top is told to come again, and takes nothing of its own limits.
func TestMaxConcurrentCalls(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_CONCURRENT_CALLS": "10", "LOG_LEVEL": "error"})
	p.allowErrors = true // a proxy that is full is its operator's trouble
	path, token := p.policyToken(`{"count":"requests","max":1000,"per":"lifetime"}`)
	for round := range 5 {
		hits, statuses := p.crowd(50, func(i int) int {
			status, h := p.send(nil, []string{p.token, token}[i%2], "/v1/chat/completions", chatBody(tinyBody))
			if status == 503 && h.Get("Retry-After") == "" {
				t.Error("503 without Retry-After")
			}
			return status
		})
		if hits != 10 || statuses[200] != 10 || statuses[503] != 40 {
			t.Errorf("round %d: %d calls ran at once, clients got %v", round, hits, statuses)
		}
		p.settle()
	}
	calls := 0.0
	for _, v := range p.rows() {
		if v.outcome == outcomeOK && v.tokenID != p.tokenID {
			calls++
		}
	}
	if l := p.limits(path)[0]; l.Used != calls {
		t.Errorf("after %v calls: %+v", calls, l)
	}
	var open []net.Conn
	for range 10 {
		conn := p.dial()
		_, _ = io.WriteString(conn, strings.TrimSuffix(p.rawChat("", chatBody()), "}"))
		open = append(open, conn)
	}
	waitFor(t, "the bodies", func() bool { return p.running(phaseReading) == 10 })
	if res := p.chat(); res.status != 503 || res.code() != "too_many_calls" {
		t.Errorf("beside 10 calls that send their bodies: got %d %s", res.status, res.body)
	}
	if res := p.do("GET", ownTokenPath, "", "Authorization", "Bearer "+p.token); res.status != 200 {
		t.Errorf("the token asks about itself: got %d %s", res.status, res.body)
	}
	for _, conn := range open {
		conn.Close()
	}
	waitFor(t, "their ends", func() bool { return p.running(phaseReading) == 0 })
	if res := p.chat(); res.status != 200 {
		t.Errorf("then: got %d %s", res.status, res.body)
	}
}

// TestBodyMemoryOfAToken: one token's bodies take a quarter of the memory for all,
// so that it cannot keep the others out; what it held comes back.
func TestBodyMemoryOfAToken(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_BODY_BYTES": "1MiB", "BODY_MEMORY": "8MiB", "LOG_LEVEL": "error"})
	_, greedy := p.newToken(`"name":"greedy"`)
	var open []net.Conn
	for range 12 {
		conn := p.dial()
		_, _ = fmt.Fprintf(conn, "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
			greedy, 1<<20, strings.Repeat(" ", 900<<10))
		open = append(open, conn)
	}
	var refused sync.WaitGroup
	got := make(chan string, len(open))
	for _, conn := range open {
		refused.Go(func() {
			_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
			b := make([]byte, 4096)
			n, _ := conn.Read(b)
			got <- string(b[:n])
		})
	}
	for range 8 { // at least so many have no room
		if text := <-got; !strings.HasPrefix(text, "HTTP/1.1 429 ") || !strings.Contains(text, "body_memory_full") || !strings.Contains(text, "\r\nRetry-After: 1\r\n") {
			t.Errorf("got %q", text)
		}
	}
	if used := p.in.bodies.used.Load(); used > 2<<20+64<<10 {
		t.Errorf("one token holds %d bytes of 8 MiB", used)
	}
	if res := p.do("POST", "/v1/chat/completions", chatBody(`"user":"`+strings.Repeat("x", 1000<<10)+`"`), "Authorization", "Bearer "+p.token, "Content-Type", "application/json"); res.status != 200 {
		t.Errorf("another token: got %d %s", res.status, res.body)
	}
	for _, conn := range open {
		conn.Close()
	}
	refused.Wait()
	p.settle()
	if res := p.do("POST", "/v1/chat/completions", chatBody(`"user":"`+strings.Repeat("x", 1000<<10)+`"`), "Authorization", "Bearer "+greedy, "Content-Type", "application/json"); res.status != 200 {
		t.Errorf("the token, when its calls are over: got %d %s", res.status, res.body)
	}
}
