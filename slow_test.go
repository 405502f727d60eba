// Tests of slow and silent clients and providers: each wait of a call has an
// end, what it held is given back, and its row says why it ended.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// setLimits changes what the watchdog holds calls to. No call may be running.
func (p *testProxy) setLimits(change func(*callLimits)) {
	p.in.running.mu.Lock()
	defer p.in.running.mu.Unlock()
	change(&p.in.running.limits)
}

// dial opens a connection to the proxy that ends with the test.
func (p *testProxy) dial() *net.TCPConn {
	p.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn.(*net.TCPConn)
}

// rawThenShut sends bytes, shuts the client's side, and returns what comes.
func (p *testProxy) rawThenShut(request string) string {
	p.t.Helper()
	conn := p.dial()
	_, _ = io.WriteString(conn, request)
	_ = conn.CloseWrite()
	b, _ := io.ReadAll(conn)
	return string(b)
}

// released fails the test unless nothing is held for a call any more.
func (p *testProxy) released() {
	p.t.Helper()
	waitFor(p.t, "the calls to end", func() bool { return p.in.running.oldest() == 0 && p.in.bodies.used.Load() == 0 })
}

// running returns how many calls are in a phase.
func (p *testProxy) running(in phase) (n int) {
	p.in.running.mu.Lock()
	defer p.in.running.mu.Unlock()
	for c := range p.in.running.calls {
		if phase(c.watch.phase.Load()) == in {
			n++
		}
	}
	return n
}

// TestSlowBody: a body that trickles is refused, one that is slow but steady is
// not.
func TestSlowBody(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.setLimits(func(l *callLimits) { l.readWindow, l.readRate = 500*time.Millisecond, 1000 })
	body := chatBody(`"user":"` + strings.Repeat("u", 4000) + `"`)
	head := strings.TrimSuffix(p.rawChat("Connection: close\r\n", body), body)

	trickle := p.dial()
	_, _ = io.WriteString(trickle, head+body[:3000]) // fast at first
	if b, _ := io.ReadAll(trickle); !strings.HasPrefix(string(b), "HTTP/1.1 400 ") || !strings.Contains(string(b), "request_too_slow") {
		t.Errorf("a body that stops: got %q", b)
	}
	p.released()

	steady := p.dial()
	_, _ = io.WriteString(steady, head)
	for part := range slices.Chunk([]byte(body), 200) { // over two windows, at 4 times the rate that is asked for
		_, _ = steady.Write(part)
		time.Sleep(50 * time.Millisecond)
	}
	if b, _ := io.ReadAll(steady); !strings.HasPrefix(string(b), "HTTP/1.1 200 ") {
		t.Errorf("a body that is slow: got %q", b)
	}
	p.released()
}

// TestSlowReader: a client that stops reading is cut off and the provider's
// call with it; until then the proxy does not read ahead.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.setLimits(func(l *callLimits) { l.clientStall = 300 * time.Millisecond })
	sent := make(chan int, 1)
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		c.sse()
		event, n := chatEvents(true)[1], 0
		for c.chunk(strings.Repeat(event, 100)) == nil {
			n += 100 * len(event)
		}
		sent <- n
		return false
	})
	conn := p.dial()
	_, _ = io.WriteString(conn, p.rawChat("", chatBody(`"stream":true`)))
	if n := <-sent; n > 64<<20 {
		t.Errorf("the provider could send %d bytes to a client that read none", n)
	}
	p.released()
	row := p.lastCall()
	if row.Outcome != "truncated" || row.ErrorCode != "client_stalled" || row.UsageSource != "estimated" || row.OutputTokens == 0 {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestSilentProvider: no answer is 504, an answer that stops is cut, and one
// that is merely slow is neither.
func TestSilentProvider(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"UPSTREAM_TIMEOUT": "1s", "STREAM_IDLE_TIMEOUT": "1s"})
	p.provider.answer(func(c *providerConn, _ recorded) bool { c.gone(10 * time.Second); return false })
	if res := p.chat(); res.status != 504 || res.code() != "upstream_timeout" {
		t.Errorf("no answer: got %d %s", res.status, res.body)
	}
	p.released()
	if row := p.lastCall(); row.Outcome != "upstream_error" || row.ErrorCode != "upstream_timeout" || row.UsageSource != "estimated" || row.InputTokens == 0 {
		t.Errorf("no answer: the ledger has %+v", row)
	}

	p.provider.answer(func(c *providerConn, _ recorded) bool {
		c.sse()
		_ = c.chunk(chatEvents(true)[0])
		c.gone(10 * time.Second)
		return false
	})
	if res := p.chat(`"stream":true`); res.status != 200 || res.err == nil || res.body != chatEvents(true)[0] {
		t.Errorf("an answer that stops: got %d %q %v", res.status, res.body, res.err)
	}
	if row := p.lastCall(); row.Outcome != "truncated" || row.ErrorCode != "stream_idle" || row.UsageSource != "estimated" {
		t.Errorf("an answer that stops: the ledger has %+v", row)
	}

	p.provider.answer(func(c *providerConn, _ recorded) bool { // longer in all than either limit
		time.Sleep(300 * time.Millisecond)
		c.sse()
		for _, e := range chatEvents(true) {
			_ = c.chunk(e)
			time.Sleep(300 * time.Millisecond)
		}
		return c.chunk("") == nil
	})
	if res := p.chat(`"stream":true`); res.err != nil || res.body != strings.Join(chatEvents(false), "") {
		t.Errorf("a slow answer: got %q %v", res.body, res.err)
	}
}

// TestUnseenLeaving: net/http does not see a client leave that has sent a byte
// too many. The provider's silence then ends the call.
func TestUnseenLeaving(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"UPSTREAM_TIMEOUT": "500ms"})
	called := make(chan struct{})
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		close(called)
		c.gone(10 * time.Second)
		return false
	})
	conn := p.dial()
	_, _ = io.WriteString(conn, p.rawChat("", chatBody()))
	<-called
	_, _ = io.WriteString(conn, "G")
	conn.Close()
	p.released()
	if row := p.lastCall(); row.ErrorCode != "upstream_timeout" {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestStalledUpload: an upload that stands still ends with its token, though
// the proxy is reading from its client just then.
func TestStalledUpload(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	id, token := p.newToken(`"name":"up"`)
	conn := p.dial()
	_, _ = fmt.Fprintf(conn, "POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"+
		"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n--b\r\n", token)
	waitFor(t, "the upload", func() bool { return p.running(phaseProvider) == 1 })
	p.manage("DELETE", "/manage/tokens/"+id, "", 200, nil)
	revoked := time.Now()
	p.released()
	if d := time.Since(revoked); d > time.Second {
		t.Errorf("the upload ended %v after the token was revoked", d)
	}
}

// TestNotSentTwice: a request that the provider has seen is not sent again,
// whatever net/http makes of an Idempotency-Key or a reused connection.
func TestNotSentTwice(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]func(*providerConn) bool{
		"closed": func(*providerConn) bool { return false },
		"reset":  func(c *providerConn) bool { return c.reset() },
		"half a head": func(c *providerConn) bool {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nConte")
			return false
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			if res := p.chat(); res.status != 200 { // leaves a connection to reuse
				t.Fatalf("got %d", res.status)
			}
			p.provider.answer(func(c *providerConn, _ recorded) bool { return cut(c) })
			res := p.do("POST", "/v1/chat/completions", chatBody(), "Authorization", "Bearer "+p.token,
				"Content-Type", "application/json", "Idempotency-Key", "k-1")
			if res.status != 502 {
				t.Errorf("got %d %s", res.status, res.body)
			}
			if n := len(p.provider.got()); n != 2 {
				t.Errorf("the provider got %d requests for 2 calls", n)
			}
			if got := p.provider.last(t).header[http.CanonicalHeaderKey("Idempotency-Key")]; len(got) != 1 || got[0] != "k-1" {
				t.Errorf("the provider got the Idempotency-Key %v", got)
			}
			if row := p.lastCall(); row.Attempts != 1 || row.Outcome != "upstream_error" {
				t.Errorf("the ledger has %+v", row)
			}
		})
	}
}

// TestLongUpload: an upload may take longer than UPSTREAM_TIMEOUT as long as it
// moves.
func TestLongUpload(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"UPSTREAM_TIMEOUT": "1s"})
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	body, pieces := io.Pipe()
	go func() {
		for range 8 {
			if _, err := pieces.Write(make([]byte, 1000)); err != nil {
				return
			}
			time.Sleep(200 * time.Millisecond) // the pace of a slow line, not a wait for anything
		}
		pieces.Close()
	}()
	req, err := http.NewRequestWithContext(t.Context(), "POST", p.url+"/v1/files", body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+p.token)
	req.Header.Set("Content-Type", "multipart/form-data; boundary=b")
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 200 || len(p.provider.last(t).body) != 8000 {
		t.Errorf("got %d, the provider %d bytes", res.StatusCode, len(p.provider.last(t).body))
	}
}

// TestTrickledUpload: an upload that hardly moves ends, and not as the
// provider's fault.
func TestTrickledUpload(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.setLimits(func(l *callLimits) { l.readWindow, l.readRate = 300*time.Millisecond, 1000 })
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	conn := p.dial()
	_, _ = fmt.Fprintf(conn, "POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"+
		"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n--b\r\n", p.token)
	waitFor(t, "the upload", func() bool { return p.running(phaseProvider) == 1 })
	p.released()
	if row := p.lastCall(); row.ErrorCode != "request_too_slow" || row.Outcome != "truncated" {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestStalledModelList: the one answer that is read whole is held to the limit
// for answers that pause.
func TestStalledModelList(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"STREAM_IDLE_TIMEOUT": "500ms"})
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"models":["gpt*"]}}`, 200, nil)
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
		c.gone(10 * time.Second)
		return false
	})
	if res := p.do("GET", "/v1/models", "", "Authorization", "Bearer "+p.token); res.status != 504 || res.code() != "stream_idle" {
		t.Errorf("got %d %s", res.status, res.body)
	}
}

// TestConnectionLimit: connections beyond MAX_CONNECTIONS are closed at once, and
// room that is given up is there for others.
func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_CONNECTIONS": "3"})
	answered := func(conn net.Conn) bool {
		_, _ = io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
		b := make([]byte, 12)
		_, err := io.ReadFull(conn, b)
		return err == nil && string(b) == "HTTP/1.1 200"
	}
	var open []net.Conn
	waitFor(t, "three connections", func() bool { // the harness's own may still be closing
		conn := p.dial()
		if answered(conn) {
			open = append(open, conn)
		}
		return len(open) == 3
	})
	for range 5 {
		if answered(p.dial()) {
			t.Fatal("a fourth connection was served")
		}
	}
	for _, conn := range open {
		conn.Close()
	}
	waitFor(t, "room", func() bool { return answered(p.dial()) })
}
