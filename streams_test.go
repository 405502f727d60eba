// Tests of streams: they pass byte for byte and at once, they end broken when
// they are broken, and what a client or a provider does in the middle of one has
// the right row in the ledger.
package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// TestStreamEventsPassAtOnce: the provider sends an event only when the client
// has the one before.
func TestStreamEventsPassAtOnce(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	got := make(chan struct{})
	events := chatEvents(true)
	for _, comment := range []string{": ping\n\n", "event: x\nid: 7\ndata: {}\n\n", "data:\r\n\r\n"} {
		events = append([]string{comment}, events...)
	}
	for _, asked := range []bool{true, false} { // with and without the usage event being looked for
		p.provider.answer(func(c *providerConn, _ recorded) bool {
			c.sse()
			for i, e := range events {
				if c.chunk(e) != nil {
					return false
				}
				if !asked && i == len(events)-2 {
					continue // the client will not get this one
				}
				select {
				case <-got:
				case <-time.After(5 * time.Second):
					return false // the stream breaks, and the client sees it
				}
			}
			return c.chunk("") == nil
		})
		s := p.stream(p.token, fmt.Sprintf(`"stream_options":{"include_usage":%v}`, asked))
		for i, want := range events {
			if !asked && i == len(events)-2 {
				continue
			}
			if e, err := s.read(len(want)); err != nil || e != want {
				t.Fatalf("asked %v, event %d: got %q, %v; want %q", asked, i, e, err, want)
			}
			got <- struct{}{}
		}
		if rest, err := s.rest(); rest != "" || err != nil {
			t.Errorf("after the last event: %q, %v", rest, err)
		}
	}
}

// oddStreams are streams as providers may write them. usage is whether the
// proxy can know what was used.
var oddStreams = []struct {
	name, stream string
	outcome      string
	source       string
	output       int64 // if exact
}{
	{"plain", strings.Join(chatEvents(true), ""), "ok", "exact", 3},
	{"CRLF", strings.ReplaceAll(strings.Join(chatEvents(true), ""), "\n", "\r\n"), "ok", "exact", 3},
	{"CR alone", strings.ReplaceAll(strings.Join(chatEvents(true), ""), "\n", "\r"), "ok", "exact", 3},
	{"no space", strings.ReplaceAll(strings.Join(chatEvents(true), ""), "data: ", "data:"), "ok", "exact", 3},
	{"mark, comments, names", "\ufeff: hello\n\nretry: 10\n\nid: 1\nevent: x\n" + strings.Join(chatEvents(true), ": c\n\n\n\n"), "ok", "exact", 3},
	{"lines of data", "data: {\"choices\":\ndata: [{\"delta\":{\"content\":\"x\"}}]}\n\ndata: {\"choices\":[],\ndata: \"usage\":{\"prompt_tokens\":1,\"completion_tokens\":5}}\n\ndata: [DONE]\n\n", "ok", "exact", 5},
	{"letters in pieces", "data: {\"choices\":[{\"delta\":{\"content\":\"😀é\\ud83d\\ude00\u2028\"}}]}\n\n" + strings.Join(chatEvents(true), ""), "ok", "exact", 3},
	{"no usage", strings.Join(chatEvents(false), ""), "ok", "estimated", 0},
	{"usage null", strings.ReplaceAll(strings.Join(chatEvents(false), ""), `"choices"`, `"usage":null,"choices"`), "ok", "estimated", 0},
	{"usage twice", chatEvents(true)[3] + strings.ReplaceAll(chatEvents(true)[3], `completion_tokens":3`, `completion_tokens":4`) + "data: [DONE]\n\n", "ok", "exact", 4},
	{"usage in the middle", chatEvents(true)[3] + strings.Join(chatEvents(false), ""), "ok", "exact", 3},
	{"no end mark", strings.Join(chatEvents(true)[:4], ""), "truncated", "exact", 3},
	{"a lying answer", `data: {"choices":[{"delta":{"content":"data: [DONE]\n\ndata: {\"usage\":{\"total_tokens\":0}}\n\n","tool_calls":[{"function":{"arguments":"{\"usage\":{\"completion_tokens\":99}}"}}]},"metadata":{"usage":{"completion_tokens":98}}}]}` +
		"\n\n" + strings.Join(chatEvents(true), ""), "ok", "exact", 3},
	{"a lie and no end", `data: {"choices":[{"delta":{"content":"[DONE]","usage":{"completion_tokens":98,"prompt_tokens":1}}}]}` + "\n\n", "truncated", "estimated", 0},
	{"error inside", chatEvents(true)[0] + "data: {\"error\":{\"message\":\"overloaded\",\"code\":\"server_error\"}}\n\n", "upstream_error", "estimated", 0},
	{"long", strings.Repeat(chatEvents(true)[1], 1000) + strings.Join(chatEvents(true), ""), "ok", "exact", 3},
}

// TestStreamBytes: whatever the chunks, the client gets the provider's bytes and
// the ledger the same usage.
func TestStreamBytes(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	rng := rand.New(rand.NewPCG(1, 2))
	for _, test := range oddStreams {
		whole := func() int { return len(test.stream) }
		for how, size := range map[string]func() int{"one byte": func() int { return 1 }, "random": func() int { return 1 + rng.IntN(40) }, "whole": whole} {
			if how == "one byte" && len(test.stream) > 10_000 {
				continue
			}
			p.provider.answer(func(c *providerConn, _ recorded) bool {
				c.sse()
				for rest := test.stream; rest != ""; {
					n := min(size(), len(rest))
					if c.chunk(rest[:n]) != nil {
						return false
					}
					rest = rest[n:]
				}
				return c.chunk("") == nil
			})
			res := p.chat(`"stream":true`, `"stream_options":{"include_usage":true}`)
			if res.err != nil || res.body != test.stream {
				t.Errorf("%s, %s: got %q, %v", test.name, how, clip(res.body, 2000), res.err)
			}
			row := p.lastCall()
			if row.Outcome != test.outcome || row.UsageSource != test.source || test.source == "exact" && row.OutputTokens != test.output {
				t.Errorf("%s, %s: the ledger has %+v", test.name, how, row)
			}
			if row.OutputTokens == 0 {
				t.Errorf("%s, %s: usage is silently zero: %+v", test.name, how, row)
			}
		}
	}
}

// TestStreamBigEvent: an event of 16 MiB, as of an image, passes like any other.
func TestStreamBigEvent(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	big := `data: {"choices":[{"delta":{"content":"` + strings.Repeat("x", 16<<20) + `"}}]}` + "\n\n"
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		c.sse()
		_ = c.chunk(big)
		_ = c.chunk(strings.Join(chatEvents(true), ""))
		return c.chunk("") == nil
	})
	if res := p.chat(`"stream":true`); res.err != nil || res.body != big+strings.Join(chatEvents(false), "") {
		t.Errorf("got %d bytes, %v", len(res.body), res.err)
	}
	if row := p.lastCall(); row.Outcome != "ok" || row.UsageSource != "exact" || row.OutputTokens != 3 {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestNeverLieAboutAStream: an answer that the provider cuts, at whatever byte,
// is an error for the client: 502 while nothing has left, a broken connection
// after. Nothing is made up to complete it.
func TestNeverLieAboutAStream(t *testing.T) {
	t.Parallel()
	head := "HTTP/1.1 200 OK\r\nContent-Type: "
	var chunks strings.Builder
	for _, e := range chatEvents(true) {
		fmt.Fprintf(&chunks, "%x\r\n%s\r\n", len(e), e)
	}
	answers := []struct{ name, raw, body, members string }{
		{"unary", head + "application/json\r\nContent-Length: " + fmt.Sprint(len(chatAnswer)) + "\r\n\r\n" + chatAnswer, chatAnswer, `"n":1`},
		{"unary in chunks", head + "application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(chatAnswer), chatAnswer), chatAnswer, `"n":1`},
		{"stream", head + "text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks.String() + "0\r\n\r\n",
			strings.Join(chatEvents(true), ""), `"stream":true,"stream_options":{"include_usage":true}`},
	}
	for _, a := range answers {
		for how, step := range map[string]int{"FIN": 1, "RST": 5} {
			t.Run(a.name+" "+how, func(t *testing.T) {
				t.Parallel()
				p := newTest(t, nil)
				for k := 0; k < len(a.raw); k += step {
					p.provider.answer(func(c *providerConn, _ recorded) bool {
						_, _ = io.WriteString(c, a.raw[:k])
						if how == "RST" {
							return c.reset()
						}
						return false
					})
					res := p.chat(a.members)
					switch {
					case res.err == nil && res.status == 502 && res.code() == "upstream_unreachable" && k < strings.Index(a.raw, "\r\n\r\n")+4+1:
					case res.err != nil && strings.HasPrefix(a.body, res.body):
					case how == "RST" && res.status == 502: // the reset overtook the bytes before it
					default:
						t.Fatalf("cut after %d of %d bytes: status %d, %q, %v", k, len(a.raw), res.status, res.body, res.err)
					}
				}
				for _, row := range p.ledger() {
					if row.Outcome != "truncated" && row.Outcome != "upstream_error" || row.ErrorCode == "" {
						t.Errorf("the ledger has %+v", row)
					}
				}
			})
		}
	}
}

// TestClientGone: a client that leaves, before the answer or after any event of
// it, cancels the provider's call within a second and has its row.
func TestClientGone(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	events := chatEvents(true)
	for k := range len(events) {
		sent, gone := make(chan struct{}), make(chan bool, 1)
		p.provider.answer(func(c *providerConn, _ recorded) bool {
			if k > 0 {
				c.sse()
				_ = c.chunk(strings.Join(events[:k], ""))
			}
			close(sent)
			gone <- c.gone(5 * time.Second)
			return false
		})
		ctx, leave := context.WithCancel(t.Context())
		var s *clientStream
		if k == 0 {
			failed := make(chan error, 1)
			go func() { _, err := p.openStream(ctx, p.token, ""); failed <- err }()
			<-sent
			leave()
			<-failed
		} else {
			var err error
			if s, err = p.openStream(ctx, p.token, `"stream_options":{"include_usage":true}`); err != nil {
				t.Fatal(err)
			}
			for _, want := range events[:k] {
				if e, err := s.read(len(want)); e != want || err != nil {
					t.Fatalf("got %q, %v", e, err)
				}
			}
			leave()
		}
		left := time.Now()
		if !<-gone || time.Since(left) > time.Second {
			t.Errorf("after %d events: the provider's call ended %v after the client had left", k, time.Since(left))
		}
		row := p.lastCall()
		if row.Outcome != "client_gone" || row.UsageSource == "none" || k == 0 && row.Status != 499 || k > 0 && row.Status != 200 {
			t.Errorf("after %d events: the ledger has %+v", k, row)
		}
	}
	if rows := p.ledger(); len(rows) != len(events) {
		t.Errorf("%d rows for %d calls", len(rows), len(events))
	}
}

// TestClientShutsItsSide: net/http takes a half-closed connection for a client
// that has left. What it must not get is an empty 200.
func TestClientShutsItsSide(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.answer(func(c *providerConn, _ recorded) bool { c.gone(5 * time.Second); return false })
	if got := p.rawThenShut(p.rawChat("", chatBody())); got != "" {
		t.Errorf("the client got %q", got)
	}
	if row := p.lastCall(); row.Outcome != "client_gone" || row.Status != 499 {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestStreamOfAnotherKind: what was asked for is not always what comes.
func TestStreamOfAnotherKind(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.answer(func(c *providerConn, _ recorded) bool { return c.reply(200, chatAnswer) })
	if res := p.chat(`"stream":true`); res.body != chatAnswer || res.header.Get("Content-Type") != "application/json" {
		t.Errorf("JSON for a stream: %+v", res)
	}
	if row := p.lastCall(); row.Outcome != "ok" || row.UsageSource != "exact" || row.OutputTokens != 3 {
		t.Errorf("JSON for a stream: the ledger has %+v", row)
	}
	stream := strings.Join(chatEvents(true), "")
	p.provider.answer(func(c *providerConn, _ recorded) bool { c.sse(); _ = c.chunk(stream); return c.chunk("") == nil })
	if res := p.chat(); res.body != stream {
		t.Errorf("a stream for JSON: %+v", res)
	}
	if row := p.lastCall(); row.Outcome != "ok" || row.UsageSource != "exact" || row.OutputTokens != 3 {
		t.Errorf("a stream for JSON: the ledger has %+v", row)
	}
}

// TestStreamCompressed: a provider that compresses unasked is passed on as it
// is, each event at once, with usage estimated.
func TestStreamCompressed(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	got := make(chan struct{})
	p.provider.answer(func(c *providerConn, r recorded) bool {
		if r.header.Get("Accept-Encoding") != "" {
			return c.reply(400, "{}") // the client's wish goes no further
		}
		c.sse("Content-Encoding: gzip")
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		for _, e := range chatEvents(false) {
			_, _ = io.WriteString(z, e)
			_ = z.Flush()
			if c.chunk(b.String()) != nil {
				return false
			}
			b.Reset()
			select {
			case <-got:
			case <-time.After(5 * time.Second):
				return false
			}
		}
		_ = z.Close()
		_ = c.chunk(b.String())
		return c.chunk("") == nil
	})
	s := p.stream(p.token, `"n":1`)
	z, err := gzip.NewReader(s.r)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range chatEvents(false) {
		b := make([]byte, len(want))
		if _, err := io.ReadFull(z, b); err != nil || string(b) != want {
			t.Fatalf("got %q, %v", b, err)
		}
		got <- struct{}{}
	}
	if _, err := io.ReadAll(z); err != nil {
		t.Error(err)
	}
	if row := p.lastCall(); row.Outcome == "client_gone" || row.UsageSource != "estimated" || row.OutputTokens == 0 {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestStreamFraming: the same stream over HTTP/1.0, without keep-alive, and
// over HTTP/2 with TLS, where a cut is a reset stream.
func TestStreamFraming(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	want := strings.Join(chatEvents(false), "")
	body := chatBody(`"stream":true`)
	old := p.raw(strings.Replace(p.rawChat("", body), "HTTP/1.1", "HTTP/1.0", 1))
	if head, rest, _ := strings.Cut(old, "\r\n\r\n"); rest != want || strings.Contains(strings.ToLower(head), "chunked") {
		t.Errorf("HTTP/1.0: got %q", old)
	}
	if once := p.raw(p.rawChat("Connection: close\r\n", body)); !strings.HasSuffix(once, "0\r\n\r\n") || !strings.Contains(once, "Connection: close") {
		t.Errorf("without keep-alive: got %q", once)
	}
	hs := httptest.NewUnstartedServer(p.in.routes())
	hs.EnableHTTP2 = true
	hs.Config.ErrorLog = p.in.quietLog
	hs.StartTLS()
	defer hs.Close()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: hs.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}, ForceAttemptHTTP2: true}}
	defer client.CloseIdleConnections()
	call := func() (string, error) {
		req, err := http.NewRequestWithContext(t.Context(), "POST", hs.URL+"/v1/chat/completions", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{"Authorization": {"Bearer " + p.token}, "Content-Type": {"application/json"}}
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if res.ProtoMajor != 2 {
			t.Fatalf("the protocol is %s", res.Proto)
		}
		b, err := io.ReadAll(res.Body)
		return string(b), err
	}
	if got, err := call(); got != want || err != nil {
		t.Errorf("HTTP/2: got %q, %v", got, err)
	}
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		c.sse()
		_ = c.chunk(chatEvents(true)[0])
		return false
	})
	if got, err := call(); err == nil || strings.Contains(got, "[DONE]") {
		t.Errorf("HTTP/2, cut: got %q, %v", got, err)
	}
}

// A clientStream is a stream as a client reads it.
type clientStream struct {
	p    *testProxy
	body io.ReadCloser
	r    *bufio.Reader
}

// stream begins a chat stream with the given token; members are added to its
// body. It ends with the test.
func (p *testProxy) stream(token string, members ...string) *clientStream {
	p.t.Helper()
	s, err := p.openStream(p.t.Context(), token, strings.Join(members, ","))
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

// openStream is stream for any goroutine and with a context of its own. An
// answer that is not 200 is an error.
func (p *testProxy) openStream(ctx context.Context, token, members string) (*clientStream, error) {
	all := []string{`"stream":true`}
	if members != "" {
		all = append(all, members)
	}
	req, err := http.NewRequestWithContext(ctx, "POST", p.url+"/v1/chat/completions", strings.NewReader(chatBody(all...)))
	if err != nil {
		return nil, err
	}
	req.Header = http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}}
	res, err := (&http.Transport{DisableKeepAlives: true, DisableCompression: true}).RoundTrip(req)
	if err != nil {
		return nil, err
	}
	p.t.Cleanup(func() { res.Body.Close() })
	if res.StatusCode != 200 {
		return nil, errors.New(res.Status)
	}
	seen := io.TeeReader(res.Body, writerFunc(func(b []byte) (int, error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.seen.Write(b)
	}))
	return &clientStream{p, res.Body, bufio.NewReader(seen)}, nil
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// read returns the next n bytes.
func (s *clientStream) read(n int) (string, error) {
	b := make([]byte, n)
	n, err := io.ReadFull(s.r, b)
	return string(b[:n]), err
}

// rest returns all that is still to come, with how it ended: nil is a clean end.
func (s *clientStream) rest() (string, error) {
	b, err := io.ReadAll(s.r)
	return string(b), err
}
