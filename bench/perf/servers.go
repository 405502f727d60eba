// This file starts the servers of a measurement: a provider with fixed answers, the bare proxy, and the real program with a
// project and a token.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	providerKey   = "sk-provider-key-of-the-benchmark"
	managementKey = "benchmark-0a9s8d7f6g5h4j3k2l1qwertyuiop"
)

// The provider's answers, each a list of writes, so that the provider uses little of the CPU time of the processes that
// are measured.
type answers struct {
	unary, unaryNoStore, long, embedding, stream, streamWithUsage, idle, slow, slowWithUsage, refusal [][]byte
}

func newAnswers() answers {
	const event = `data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1764000000,"model":"gpt-4o-mini",`
	const word = `"logprobs":null,"finish_reason":null}]}` + "\n\n"
	const head = "HTTP/1.1 200 OK\r\nDate: Tue, 24 Nov 2026 12:00:00 GMT\r\nopenai-organization: bench\r\nopenai-processing-ms: 350\r\n" +
		"openai-version: 2020-10-01\r\nx-request-id: req_bench\r\nx-ratelimit-limit-requests: 10000\r\nx-ratelimit-limit-tokens: 2000000\r\n" +
		"x-ratelimit-remaining-requests: 9999\r\nx-ratelimit-remaining-tokens: 1999000\r\nx-ratelimit-reset-requests: 6ms\r\n" +
		"x-ratelimit-reset-tokens: 30ms\r\nstrict-transport-security: max-age=31536000\r\n" // as OpenAI sends them
	const streamed = head + "Content-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
	body := `{"id":"chatcmpl-bench","object":"chat.completion","created":1764000000,"model":"gpt-4o-mini","choices":[{"index":0,"message":` +
		`{"role":"assistant","content":"` + strings.Repeat("The band plays on. ", 35) + `"},"finish_reason":"stop"}],` +
		`"usage":{"prompt_tokens":200,"completion_tokens":150,"total_tokens":350}}`
	long := strings.Replace(body, "The band", strings.Repeat("The band plays on. ", 375)+"The band", 1) // 8 KB
	embedding := `{"object":"list","data":[{"object":"embedding","index":0,"embedding":[-0.0123456789` +
		strings.Repeat(",0.0234567891", 1900) + `]}],"model":"text-embedding-3-small","usage":{"prompt_tokens":200,"total_tokens":200}}`
	chunk := func(text string) []byte { return fmt.Appendf(nil, "%x\r\n%s\r\n", len(text), text) }
	events := [][]byte{[]byte(streamed)}
	for range 64 {
		events = append(events, chunk(event+`"choices":[{"index":0,"delta":{"content":" token"},`+word))
	}
	usage := chunk(event + `"choices":[],"usage":{"prompt_tokens":200,"completion_tokens":64,"total_tokens":264}}` + "\n\n")
	end := append(chunk("data: [DONE]\n\n"), "0\r\n\r\n"...)
	return answers{
		unary: [][]byte{fmt.Appendf(nil, "%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", head, len(body), body)},
		unaryNoStore: [][]byte{fmt.Appendf(nil, "%sContent-Type: application/json\r\nCache-Control: no-store\r\n"+
			"Content-Length: %d\r\n\r\n%s", head, len(body), body)},
		long: [][]byte{fmt.Appendf(nil, "%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", head, len(long), long)},
		embedding: [][]byte{fmt.Appendf(nil, "%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", head,
			len(embedding), embedding)},
		stream:          append(slices.Clip(events), end),
		streamWithUsage: append(slices.Clip(events), slices.Concat(usage, end)),
		idle:            events[:2],
		slow:            append(slices.Clip(events[:26]), end),
		slowWithUsage:   append(slices.Clip(events[:26]), slices.Concat(usage, end)),
		refusal:         [][]byte{[]byte("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")},
	}
}

// provide runs the provider on a free loopback port, and first prints its URL.
func provide() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println("http://" + l.Addr().String())
	all := newAnswers()
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			for br := bufio.NewReader(conn); ; {
				m, err := readMessage(br, true)
				if err != nil {
					return
				}
				slow := bytes.Contains(m.body, []byte(`"user":"slow"`))
				for _, part := range all.to(m) {
					if slow {
						time.Sleep(20 * time.Millisecond)
					}
					if _, err := conn.Write(part); err != nil {
						return
					}
				}
			}
		}()
	}
}

func (a *answers) to(m message) [][]byte {
	has := func(text string) bool { return bytes.Contains(m.body, []byte(text)) }
	switch {
	case !bytes.Contains(m.head, []byte("Bearer "+providerKey)):
		return a.refusal
	case has(`"user":"idle"`):
		return a.idle
	case has(`"user":"slow"`) && has("include_usage"):
		return a.slowWithUsage
	case has(`"user":"slow"`):
		return a.slow
	case has(`"input":`):
		return a.embedding
	case has("include_usage"):
		return a.streamWithUsage
	case has(`"stream":true`):
		return a.stream
	case has(`"answer":"no-store"`):
		return a.unaryNoStore
	case has(`"answer":"long"`):
		return a.long
	}
	return a.unary
}

// A message is a request or a response. Its slices are valid until the next one is read.
type message struct{ head, body []byte }

// readMessage reads an HTTP/1.1 message of a trusted sender. It keeps the body if it is wanted, and otherwise only its last
// bytes.
func readMessage(br *bufio.Reader, wanted bool) (m message, err error) {
	length, chunked := 0, false
	for {
		line, err := br.ReadSlice('\n')
		if err != nil {
			return m, err
		}
		if len(line) == 2 {
			break
		}
		m.head = append(m.head, line...)
		if name, value, ok := bytes.Cut(line, []byte(": ")); ok && len(name) == len("Content-Length") && bytes.EqualFold(name, []byte("Content-Length")) {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil {
				return m, err
			}
		} else if ok && bytes.EqualFold(name, []byte("Transfer-Encoding")) {
			chunked = true
		}
	}
	if chunked {
		for last := false; !last; {
			line, err := br.ReadSlice('\n')
			if err != nil {
				return m, err
			}
			size, err := strconv.ParseInt(string(bytes.TrimSpace(line)), 16, 32)
			if err != nil {
				return m, err
			}
			if last = size == 0; !last {
				m.body = m.body[:0]
			}
			if m.body, err = readPart(br, m.body, int(size)); err != nil {
				return m, err
			}
			if _, err := br.Discard(2); err != nil {
				return m, err
			}
		}
		return m, nil
	}
	if !wanted {
		_, err = br.Discard(length)
		return m, err
	}
	m.body, err = readPart(br, nil, length)
	return m, err
}

func readPart(br *bufio.Reader, b []byte, n int) ([]byte, error) {
	from := len(b)
	b = slices.Grow(b, n)[:from+n]
	_, err := io.ReadFull(br, b[from:])
	return b, err
}

// bareProxy is the lower bound: a reverse proxy on net/http that reads the body first, sets another key, and does nothing
// else.
func bareProxy(upstream string) (http.Handler, error) {
	to, err := url.Parse(upstream)
	if err != nil {
		return nil, err
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.Out.Header["Authorization"] = []string{"Bearer " + providerKey}
			r.Out.Body = r.In.Body // in memory
		},
		Transport:  &http.Transport{MaxIdleConns: 4096, MaxIdleConnsPerHost: 4096, DisableCompression: true},
		BufferPool: &buffers{sync.Pool{New: func() any { return new(make([]byte, 32<<10)) }}},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body bytes.Buffer
		body.Grow(int(max(0, r.ContentLength)) + bytes.MinRead)
		if _, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, 32<<20)); err != nil {
			http.Error(w, "cannot read the body", http.StatusBadRequest)
			return
		}
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body.Bytes())), int64(body.Len())
		proxy.ServeHTTP(w, r)
	}), nil
}

type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte  { return *b.pool.Get().(*[]byte) }
func (b *buffers) Put(p []byte) { b.pool.Put(&p) }

// serveBare runs the bare proxy on a free loopback port, and first prints its URL.
func serveBare(upstream string) error {
	handler, err := bareProxy(upstream)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println("http://" + l.Addr().String())
	return http.Serve(l, handler)
}

func build(ctx context.Context, to string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", to, "llm-proxy")
	cmd.Stderr = os.Stderr
	return cmd.Run()
}

// A cachePair is the real program as two projects with the same limits use it, one of them with a cache.
type cachePair struct{ forwarded, cached target }

// start starts all processes and returns the targets, the bare proxy first.
func start(ctx context.Context, bin, dir string) (_ []target, pair cachePair, stop func(), err error) {
	var running []*exec.Cmd
	stop = func() {
		for _, c := range running {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, pair, stop, err
	}
	spawn := func(path string, env ...string) (*exec.Cmd, *bufio.Reader, error) {
		c := exec.CommandContext(ctx, path)
		c.Env = append(os.Environ(), env...)
		out, err := c.StdoutPipe()
		if err != nil {
			return nil, nil, err
		}
		if err := c.Start(); err != nil {
			return nil, nil, err
		}
		running = append(running, c)
		return c, bufio.NewReader(out), nil
	}
	_, out, err := spawn(self, "PERF_ROLE=provider")
	if err != nil {
		return nil, pair, stop, err
	}
	provider, err := out.ReadString('\n')
	if err != nil {
		return nil, pair, stop, err
	}
	provider = strings.TrimSpace(provider)
	bare, out, err := spawn(self, "PERF_ROLE=bare", "PERF_UPSTREAM="+provider)
	if err != nil {
		return nil, pair, stop, err
	}
	bareURL, err := out.ReadString('\n')
	if err != nil {
		return nil, pair, stop, err
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, pair, stop, err
	}
	addr := free.Addr().String()
	free.Close()
	proxy, _, err := spawn(bin, "LISTEN_ADDR="+addr, "DATA_DIR="+filepath.Join(dir, "data"), "MANAGEMENT_TOKEN="+managementKey,
		"ALLOW_PRIVATE_UPSTREAMS=true", "OPENAI_API_URL="+provider)
	if err != nil {
		return nil, pair, stop, err
	}
	token, cached, err := setUp(ctx, "http://"+addr)
	pair.forwarded = target{"llm-proxy", addr, token, proxy.Process.Pid}
	pair.cached = target{"llm-proxy, cached", addr, cached, proxy.Process.Pid}
	return []target{
		{"bare", strings.TrimPrefix(strings.TrimSpace(bareURL), "http://"), "any", bare.Process.Pid},
		{"llm-proxy", addr, token, proxy.Process.Pid},
	}, pair, stop, err
}

// setUp creates two projects with a token each as soon as the program answers: with five limits, and one with a cache.
func setUp(ctx context.Context, base string) (token, cached string, err error) {
	for range 100 {
		var res *http.Response
		if res, err = http.Get(base + "/readyz"); err == nil {
			res.Body.Close()
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		return "", "", fmt.Errorf("llm-proxy did not start: %w", err)
	}
	create := func(name, policy string) (string, error) {
		var made struct{ ID, Token string }
		err := post(ctx, base+"/manage/projects",
			`{"name":"`+name+`","openai_api_key":"`+providerKey+`","policy":`+policy+`}`, &made)
		if err == nil {
			err = post(ctx, base+"/manage/tokens", `{"name":"bench","project_id":"`+made.ID+`","policy":{"limits":[`+
				`{"count":"requests","max":1000000000,"per":"minute"},{"count":"concurrent","max":100000}]}}`, &made)
		}
		return made.Token, err
	}
	const limits = `"limits":[{"count":"requests","max":1000000000,"per":"minute"},` +
		`{"count":"tokens","max":1000000000000,"per":"day"},{"count":"dollars","max":10000000,"per":"month"}]`
	for _, p := range []struct {
		token        *string
		name, policy string
	}{
		{&token, "bench", `{` + limits + `}`},
		{&cached, "cached", `{` + limits + `,"cache":{"ttl_seconds":3600,"when":"always"}}`},
	} {
		if *p.token, err = create(p.name, p.policy); err != nil {
			return "", "", err
		}
	}
	return token, cached, nil
}

func post(ctx context.Context, to, body string, answer any) error {
	req, err := http.NewRequestWithContext(ctx, "POST", to, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+managementKey)
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusCreated {
		return fmt.Errorf("POST %s: %s", to, res.Status)
	}
	return json.NewDecoder(res.Body).Decode(answer)
}
