// This file counts what a call costs: the allocations of each kind of call, which must stay within a committed budget,
// and benchmarks of the same calls. Client and provider speak raw TCP and allocate nothing for a call, so that the
// proxy's own cost is what is counted.
package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"
)

// A costKind is a kind of call whose cost is counted.
type costKind struct {
	name     string
	bare     bool // the call goes to the proxy that costs are compared with
	token    string
	headers  string // lines of the request
	body     string // costNumber in it is replaced by another number for each call
	streamed bool
	allocs   float64 // the budget: how many allocations the call may have more than one of the bare proxy
	bytes    float64 // and how many bytes they may have
	number   int     // of the next call
}

const costNumber = "000000000000"

// TestCallAllocations: no kind of call allocates more than its budget. Time differs from machine to machine,
// allocations hardly do. The test is not parallel: others would be counted.
func TestCallAllocations(t *testing.T) {
	requireSQLite(t, "the budget is that of calls with SQLite")
	const calls, connections, tolerance = 800, 8, 1.05 // how many calls the ledger commits together varies
	p, bare, kinds := newCostTest(t)
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // which would empty the pools
	var unary, stream [2]float64                     // of the bare proxy
	for _, k := range kinds {
		clients := newCostClients(p, bare, k, connections)
		makeCostCalls(p, clients, calls/4)
		got := measureCost(p, clients, calls)
		base := &unary
		if k.streamed {
			base = &stream
		}
		if k.bare {
			*base = got
		}
		budget := [2]float64{(base[0] + k.allocs) * tolerance, (base[1] + k.bytes) * tolerance}
		for i := 0; i < 10 && (got[0] > budget[0] || got[1] > budget[1]); i++ { // on a busy machine, commits are small
			again := measureCost(p, clients, calls)
			got = [2]float64{min(got[0], again[0]), min(got[1], again[1])}
		}
		more := [2]float64{got[0] - base[0], got[1] - base[1]}
		t.Logf("%-24s %6.1f allocations, %6.0f bytes; %5.1f and %5.0f more than the bare proxy", k.name, got[0], got[1],
			more[0], more[1])
		if got[0] > budget[0] || got[1] > budget[1] {
			t.Errorf("%s: a call has %.1f allocations and %.0f bytes more than one of the bare proxy, the budget is "+
				"%.0f and %.0f", k.name, more[0], more[1], k.allocs, k.bytes)
		}
	}
}

// measureCost makes calls and returns the allocations and the bytes of one.
func measureCost(p *testProxy, clients []*costClient, calls int) [2]float64 {
	p.t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	makeCostCalls(p, clients, calls)
	runtime.ReadMemStats(&after)
	return [2]float64{float64(after.Mallocs-before.Mallocs) / float64(calls),
		float64(after.TotalAlloc-before.TotalAlloc) / float64(calls)}
}

// BenchmarkCall measures calls of each kind on eight connections, client and provider included.
func BenchmarkCall(b *testing.B) {
	p, bare, kinds := newCostTest(b)
	defer func() { p.t = b }()
	for _, k := range kinds {
		b.Run(k.name, func(b *testing.B) {
			p.t = b
			clients := newCostClients(p, bare, k, 8)
			makeCostCalls(p, clients, 200)
			b.ReportAllocs()
			b.ResetTimer()
			makeCostCalls(p, clients, b.N)
		})
	}
}

// BenchmarkSettle measures what follows a call's answer: usage and cost, limits, metrics, and the row, which the ledger
// writes beside.
func BenchmarkSettle(b *testing.B) {
	p, _, kinds := newCostTest(b)
	proxy, k := p.instance.proxy, kinds[2]
	unary, _, _, _ := costAnswers()
	_, answer, _ := strings.Cut(string(unary), "\r\n\r\n")
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(b.Context(), "POST", "/v1/chat/completions", strings.NewReader(k.body))
		r.Header = http.Header{"Authorization": {"Bearer " + k.token}, "Content-Type": {"application/json"}}
		c := proxy.newCall(w, r)
		err := proxy.authenticate(c, r)
		if err == nil {
			c.memory = proxy.newBodyShare(c.token)
			c.ctx, c.cancel = context.WithCancelCause(r.Context())
			err = cmp.Or(proxy.running.add(&c.runningCall), proxy.readCall(c, w, r), proxy.admit(c))
		}
		if err != nil {
			b.Fatal(err)
		}
		c.response, c.times.sentAt = newResponseWriter(proxy, c, w), time.Now()
		c.attempts.newAttempt()
		c.response.prepare(&http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"application/json"}}})
		c.response.WriteHeader(200)
		if _, err := c.response.Write([]byte(answer)); err != nil {
			b.Fatal(err)
		}
		c.response.finish()
		c.relayed = true
		b.StartTimer()
		proxy.settle(c, r)
		b.StopTimer()
		proxy.leave(c)
		c.token.release(c.endTime())
		b.StartTimer()
	}
}

// newCostTest starts a proxy with five limits on project and token, once without and once with a cache, and the bare
// proxy, whose address it returns. The kinds of the bare proxy come first.
func newCostTest(t testing.TB) (p *testProxy, bare string, kinds []*costKind) {
	provider := newCostProvider(t)
	p = newTest(t, map[string]string{"OPENAI_API_URL": provider, "LOG_LEVEL": "error"})
	newToken := func(cache string) string {
		var project struct{ ID string }
		p.manage("POST", "/manage/projects", fmt.Sprintf(`{"name":%q,"openai_api_key":%q,"policy":{"limits":[
			{"count":"requests","max":1000000000,"per":"minute"},{"count":"tokens","max":1000000000000,"per":"day"},
			{"count":"dollars","max":1000000,"per":"month"}]%s}}`, "cost"+cache, p.provider.key, cache),
			201, &project)
		p.project = project.ID
		_, token := p.newToken(`"name":"cost","policy":{"limits":[{"count":"concurrent","max":1000},
			{"count":"requests","max":1000000000,"per":"minute"}]}`)
		return token
	}
	body := func(members string) string {
		return `{"model":"gpt-4o-mini",` + members + `"messages":[{"role":"user","content":"` +
			strings.Repeat("lorem ipsum ", 80) + `"}]}`
	}
	const unique, noStore = `"stop":"` + costNumber + `",`, `"metadata":{"answer":"no-store"},`
	plain, cached := newToken(""), newToken(`,"cache":{"ttl_seconds":3600,"when":"always"}`)
	streamed := body(`"stream":true,`)
	return p, newBareProxy(t, provider), []*costKind{
		{name: "bare", bare: true, body: body(unique)},
		{name: "bare stream", bare: true, body: streamed, streamed: true},
		{name: "unary", token: plain, body: body(unique), allocs: 31, bytes: 3900},
		{name: "stream", token: plain, body: streamed, streamed: true, allocs: 32, bytes: 4600},
		{name: "session", token: plain, body: body(unique), headers: "X-LLM-Proxy-Session: s-1\r\n", allocs: 38,
			bytes: 4300},
		{name: "cache bypass", token: cached, body: body(unique + `"store":true,`), allocs: 31, bytes: 3500},
		{name: "cache hit", token: cached, body: body(`"seed":1,`), allocs: -35, bytes: -1200},
		{name: "cache miss, not stored", token: cached, body: body(unique + noStore), allocs: 32, bytes: 3900},
		{name: "cache miss", token: cached, body: body(unique), allocs: 37, bytes: 5300}, // the last: it is written
	}
}

// The ends of the provider's answers: the client finds the end of an answer by them.
const costUnaryEnd, costStreamEnd = `"end":"of the answer"}`, "0\r\n\r\n"

// costAnswers returns the provider's answers: to a unary call, to one whose answer may not be stored, and to a stream
// without and with its usage.
func costAnswers() (unary, noStore, stream, withUsage []byte) {
	const head = "HTTP/1.1 200 OK\r\nDate: Tue, 24 Nov 2026 12:00:00 GMT\r\nopenai-organization: org\r\n" +
		"openai-processing-ms: 350\r\nopenai-version: 2020-10-01\r\nx-request-id: req_1\r\n" +
		"x-ratelimit-limit-requests: 10000\r\nx-ratelimit-remaining-requests: 9999\r\n" +
		"strict-transport-security: max-age=31536000\r\n"
	body := `{"id":"chatcmpl-1","object":"chat.completion","created":1764000000,"model":"gpt-4o-mini","choices":[` +
		`{"index":0,"message":{"role":"assistant","content":"` + strings.Repeat("The band plays on. ", 35) + `"},` +
		`"finish_reason":"stop"}],"usage":{"prompt_tokens":200,"completion_tokens":150,"total_tokens":350},` +
		costUnaryEnd
	whole := func(more string) []byte {
		return fmt.Appendf(nil, "%s%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", head, more,
			len(body), body)
	}
	const event = `{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1764000000,"model":"gpt-4o-mini",`
	appendEvent := func(b []byte, data string) []byte {
		return fmt.Appendf(b, "%x\r\ndata: %s\n\n\r\n", len("data: ")+len(data)+2, data)
	}
	stream = []byte(head + "Content-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n")
	for range 64 {
		stream = appendEvent(stream, event+`"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,`+
			`"finish_reason":null}]}`)
	}
	withUsage = appendEvent(bytes.Clone(stream), event+
		`"choices":[],"usage":{"prompt_tokens":200,"completion_tokens":64,"total_tokens":264}}`)
	end := func(b []byte) []byte { return append(appendEvent(b, "[DONE]"), costStreamEnd...) }
	return whole(""), whole("Cache-Control: no-store\r\n"), end(stream), end(withUsage)
}

// newCostProvider starts a provider with fixed answers and returns its URL.
func newCostProvider(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	unary, noStore, stream, withUsage := costAnswers()
	serve := func(conn net.Conn) {
		defer conn.Close()
		for buf := make([]byte, 64<<10); ; {
			n := 0
			for n == 0 || buf[n-1] != '}' { // each body ends so
				more, err := conn.Read(buf[n:])
				if n += more; err != nil {
					return
				}
			}
			answer, request := unary, buf[:n]
			switch {
			case bytes.Contains(request, []byte("include_usage")):
				answer = withUsage
			case bytes.Contains(request, []byte(`"stream":true`)):
				answer = stream
			case bytes.Contains(request, []byte("no-store")):
				answer = noStore
			}
			if _, err := conn.Write(answer); err != nil {
				return
			}
		}
	}
	var serving sync.WaitGroup
	t.Cleanup(func() { l.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { serve(conn) })
		}
	})
	return "http://" + l.Addr().String()
}

// newBareProxy starts the proxy that costs are compared with: httputil.ReverseProxy, which reads the body first, sets
// another key, and does nothing else. It returns its address.
func newBareProxy(t testing.TB, provider string) (addr string) {
	to, err := url.Parse(provider)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}
	proxy := &httputil.ReverseProxy{Transport: transport, BufferPool: newBufferPool(),
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.Out.Header["Authorization"] = []string{"Bearer key"}
		}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body bytes.Buffer
		body.Grow(int(r.ContentLength) + bytes.MinRead)
		_, _ = body.ReadFrom(http.MaxBytesReader(w, r.Body, 32<<20))
		r.Body = io.NopCloser(bytes.NewReader(body.Bytes()))
		proxy.ServeHTTP(w, r)
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() { server.Close(); serving.Wait(); transport.CloseIdleConnections() })
	return l.Addr().String()
}

// A costClient makes calls of one kind on one connection, one after the other.
type costClient struct {
	conn         net.Conn
	request, buf []byte
	number       []byte // of a call, a part of request; nil: all calls are the same
	nextNumber   int
	end          []byte
}

// newCostClients connects clients for calls of one kind. No two of their calls have the same number.
func newCostClients(p *testProxy, bare string, k *costKind, count int) (clients []*costClient) {
	p.t.Helper()
	addr := strings.TrimPrefix(p.url, "http://")
	if k.bare {
		addr = bare
	}
	for range count {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(func() { conn.Close() })
		c := &costClient{conn: conn, buf: make([]byte, 64<<10), nextNumber: k.number, end: []byte(costUnaryEnd)}
		if k.streamed {
			c.end = []byte(costStreamEnd)
		}
		c.request = fmt.Appendf(nil, "POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n"+
			"Content-Type: application/json\r\nAccept: application/json\r\nUser-Agent: cost\r\n%s"+
			"Content-Length: %d\r\n\r\n%s", addr, k.token, k.headers, len(k.body), k.body)
		k.number += 1_000_000
		if i := bytes.Index(c.request, []byte(costNumber)); i >= 0 {
			c.number = c.request[i : i+len(costNumber)]
		}
		clients = append(clients, c)
	}
	return clients
}

// call makes a call. It returns an error if the answer does not have status 200.
func (c *costClient) call() error {
	c.nextNumber++
	for i, n := len(c.number)-1, c.nextNumber; i >= 0; i, n = i-1, n/10 {
		c.number[i] = '0' + byte(n%10)
	}
	if _, err := c.conn.Write(c.request); err != nil {
		return err
	}
	for n := 0; !bytes.HasSuffix(c.buf[:n], c.end); {
		more, err := c.conn.Read(c.buf[n:])
		if n += more; err != nil || n < 12 || string(c.buf[9:12]) != "200" {
			return fmt.Errorf("got %q, %v", c.buf[:min(n, 400)], err)
		}
	}
	return nil
}

// makeCostCalls makes calls on all clients in parallel, and returns when they are settled.
func makeCostCalls(p *testProxy, clients []*costClient, calls int) {
	p.t.Helper()
	var wait sync.WaitGroup
	for _, c := range clients {
		wait.Go(func() {
			for range calls / len(clients) {
				if err := c.call(); err != nil {
					p.t.Error(err)
					return
				}
			}
		})
	}
	wait.Wait()
	p.waitSettled()
}
