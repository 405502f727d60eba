// These tests check the log: clients and providers cannot forge lines in it or put content into
// it, and it can neither delay calls nor fill the disk.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// logLines parses the log. Each line must be one JSON object of at most 4 KiB.
func (p *testProxy) logLines() []map[string]any {
	p.t.Helper()
	var out []map[string]any
	for line := range bytes.Lines(p.log.bytes()) {
		var m map[string]any
		if err := json.Unmarshal(line, &m); err != nil || m["level"] == nil || m["msg"] == nil || len(line) > 4<<10 ||
			bytes.ContainsAny(bytes.TrimSuffix(line, []byte("\n")), "\x00\x1b\r\n") {
			p.t.Errorf("%d bytes are not a log line: %.300q, %v", len(line), line, err)
		}
		out = append(out, m)
	}
	return out
}

// hostileText has texts that break logs which do not escape them.
var hostileText = [...]string{
	"a\nb", "a\rb", "\x1b[31mred\x1b[0m", "nul\x00", "line\u2028separator", `","level":"ERROR","msg":"forged`,
	`%s%n{{.}}`, "\xff\xfe invalid", strings.Repeat("long", 1<<10),
}

// TestLogLinesCannotBeForged: hostile text in paths, headers, models and answers of providers cannot
// forge log lines.
func TestLogLinesCannotBeForged(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, s := range hostileText {
		header := strings.Map(func(r rune) rune { return max(r, ' ') }, s)
		model, _ := json.Marshal(s)
		p.post("/v1/chat/completions", "application/json", `{"model":`+string(model)+`,"messages":[]}`, "User-Agent",
			header, "X-Request-Id", header, "X-Client-Request-Id", header)
		p.do("GET", "/"+urlEscape(clip(s, 500)), "", "User-Agent", header)
		p.do("GET", "/v1/models/"+urlEscape(clip(s, 500)), "", "Authorization", "Bearer "+p.token)
		p.do("GET", "/v1/models?"+urlEscape(clip(s, 500))+"=1", "", "Authorization", "Bearer "+p.token)
		p.manageAs(p.adminKey, "GET", "/manage/tokens?"+urlEscape(clip(s, 500))+"=1", "")
		p.manageAs(p.adminKey, "POST", "/manage/tokens", `{"project_id":"`+p.project+`","name":`+string(model)+`}`)
		p.sendRaw("GET /" + s + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			fmt.Fprintf(c, "HTTP/1.1 500 %s\r\nX-Request-Id: %s\r\nContent-Type: %s\r\nContent-Length: 2\r\n\r\n{}", s,
				s, s)
			return false
		})
		p.chat()
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			fmt.Fprintf(c, "%s\r\n\r\n", s)
			return false
		})
		p.chat()
		body, _ := json.Marshal(map[string]any{"model": s,
			"usage": map[string]int{"prompt_tokens": 1, "completion_tokens": 1}, "error": s})
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(200, string(body)) })
		p.chat()
	}
	p.waitSettled()
	for _, line := range p.logLines() {
		if line["level"] == "ERROR" || line["msg"] == "forged" {
			t.Errorf("a forged line: %v", line)
		}
	}
	if n := len(p.logLines()); n < 5*len(hostileText) {
		t.Errorf("there are %d lines", n)
	}
}

// TestOwnRequestID: the proxy chooses the id in answers, in the log and in the ledger, whatever
// id the client sends.
func TestOwnRequestID(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(200, chatResponseBody) })
	a := p.chatWithHeaders("Authorization", "Bearer "+p.token, "X-Request-Id", "mine", "X-Request-Id", "mine2",
		"Request-Id", "mine3", "X-Llm-Proxy-Request-Id", "mine4")
	id := a.header.Get("X-Llm-Proxy-Request-Id")
	if parseRequestID(id) == 0 || len(a.header["X-Llm-Proxy-Request-Id"]) != 1 || a.header.Get("X-Request-Id") != id ||
		strings.Contains(p.provider.lastRequest(t).head, "mine") {
		t.Errorf("got %v", a.header)
	}
	if row := p.lastCall(); row.ID != id {
		t.Errorf("the ledger has %s, the client got %s", row.ID, id)
	}
	if !bytes.Contains(p.log.bytes(), []byte(`"request_id":"`+id+`"`)) ||
		bytes.Contains(p.log.bytes(), []byte("mine")) {
		t.Error("the log has another id")
	}
}

// TestLogHasNoContent: the log never contains requests or answers. (The harness searches it for
// the prompt after every test; this test searches for the answer too.)
func TestLogHasNoContent(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	const canary = "answer-canary-93kd"
	for _, status := range []int{200, 400, 401, 500} {
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			return c.reply(status, `{"error":{"message":"`+canary+`","code":"`+canary+`"},`+
				`"choices":[{"message":{"content":"`+canary+`"}}]}`)
		})
		p.chat()
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			c.beginSSE()
			_ = c.chunk(`data: {"error":{"message":"` + canary + `"}}` + "\n\n")
			return false
		})
		p.chat(`"stream":true`)
	}
	p.post("/v1/chat/completions", "application/json", `{"model":"`+canary+`x`+strings.Repeat("y", 300)+`"}`)
	p.post("/v1/chat/completions", "application/json", `{"`+canary)
	p.waitSettled()
	if bytes.Contains(p.log.bytes(), []byte(canary)) {
		t.Error("the log has a part of an answer or a body")
	}
}

// TestUnauthenticatedLogLimit: of lines that anyone can cause, only a few per second are
// written, and the rest are counted.
func TestUnauthenticatedLogLimit(t *testing.T) {
	t.Parallel()
	l := newThrottle(logLinesPerSecond, time.Second)
	now, written, left := time.Unix(1000, 0), 0, int64(0)
	for i := range 1000 {
		wait, n := l.allow(now.Add(time.Duration(i) * time.Millisecond))
		if wait == 0 {
			written++
		}
		left += n
	}
	wait, n := l.allow(now.Add(5 * time.Second))
	if written != logLinesPerSecond || left != 0 || wait != 0 || n != 1000-logLinesPerSecond {
		t.Errorf("%d lines of 1000 were written, then %v with %d left out", written, wait, n)
	}
	p := newTest(t, nil)
	for range logLinesPerSecond {
		p.instance.server.logThrottle.allow(time.Now())
	}
	p.chatWithHeaders("Authorization", "Bearer x")
	p.chat()
	p.waitSettled()
	var calls int
	for _, line := range p.logLines() {
		if line["msg"] == "call" && line["status"] == 200.0 {
			calls++
		}
	}
	if calls != 1 {
		t.Errorf("%d lines of a call with a token", calls)
	}
}

// A stuckWriter blocks until it is released.
type stuckWriter struct {
	entered chan struct{}
	once    sync.Once
	release chan struct{}
	syncBuffer
}

func (w *stuckWriter) Write(b []byte) (int, error) {
	w.once.Do(func() { close(w.entered) })
	<-w.release
	return w.syncBuffer.Write(b)
}

// TestCallLineMatchesSlog: the line of a call is the same as slog's.
func TestCallLineMatchesSlog(t *testing.T) {
	t.Parallel()
	texts := []string{"", "gpt-4o", "two words", "a=b", `say "hi" \ <&>`, "line\nfeed\t\x00\x1b[0m", "\xff\xfe broken",
		"größe 日本 \u2028 \u00a0", "x\u0301\U0001f600"}
	at := time.Date(2026, 11, 25, 17, 0, 5, 120_000_000, time.FixedZone("", 3600))
	for _, text := range []bool{false, true} {
		for _, level := range []slog.Level{slog.LevelInfo, slog.LevelError} {
			var ours, theirs bytes.Buffer
			line := newLogger(&ours, slog.LevelInfo, text).beginLine(at, level, "call")
			record := slog.NewRecord(at, level, "call", 0)
			for i, v := range texts {
				line.str("text", v)
				line.num("number", int64(-i))
				line.flag("flag", i%2 == 0)
				record.Add("text", v, "number", -i, "flag", i%2 == 0)
			}
			line.end()
			if err := newLogger(&theirs, slog.LevelInfo, text).Handler().Handle(t.Context(), record); err != nil {
				t.Fatal(err)
			}
			if ours.String() != theirs.String() {
				t.Errorf("got  %s\nwant %s", ours.String(), theirs.String())
			}
		}
	}
}

// TestStuckLogReaderBlocksNoCall: when the reader of the log stops reading, lines are dropped, and the
// next line that is written says how many.
func TestStuckLogReaderBlocksNoCall(t *testing.T) {
	t.Parallel()
	w := &stuckWriter{entered: make(chan struct{}), release: make(chan struct{})}
	sink := newLogSink(w)
	line := []byte(strings.Repeat("x", 1023) + "\n")
	_, _ = sink.Write(line)
	<-w.entered
	const extra = 100
	for range maxLogBacklog/len(line) + extra { // returns at once, or the test hangs here
		_, _ = sink.Write(line)
	}
	close(w.release)
	waitFor(t, "the backlog", func() bool { return bytes.Contains(w.bytes(), []byte("dropped")) })
	sink.close()
	if out := w.bytes(); bytes.Count(out, []byte("x\n")) != maxLogBacklog/len(line)+1 ||
		!bytes.Contains(out, fmt.Appendf(nil, `"lines":%d}`, extra)) {
		t.Errorf("%d bytes came out, ending with %.200q", len(out), out[max(0, len(out)-200):])
	}
	_, _ = sink.Write(line) // after close: dropped, no panic
}

// TestNetHTTPErrorsAreClipped: net/http's messages about single connections are clipped and logged at
// debug level in our format; a panic is an error.
func TestNetHTTPErrorsAreClipped(t *testing.T) {
	t.Parallel()
	var out syncBuffer
	q := newHTTPErrorLog(newLogger(&out, -4, false))
	q.Printf("http: TLS handshake error from 127.0.0.1:1: %s", strings.Repeat("x\n\x1b", 1000))
	q.Printf("http: panic serving 127.0.0.1:1: boom\ngoroutine 1 [running]:")
	p := &testProxy{t: t, log: &out}
	lines := p.logLines()
	if len(lines) != 2 || lines[0]["level"] != "DEBUG" || len(lines[0]["note"].(string)) > 520 ||
		lines[1]["level"] != "ERROR" {
		t.Errorf("got %v", lines)
	}
}

// TestDisconnectLogsNoError: a client that uses a well-formed but unknown token and disconnects at
// once causes no error in the log (the harness checks that).
func TestDisconnectLogsNoError(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for range 100 {
		token, _ := mintCredential(tokenPrefix, "")
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "+token()+"\r\n\r\n")
		conn.Close()
	}
	if res := p.chat(); res.status != 200 {
		t.Errorf("another client: got %d", res.status)
	}
}
