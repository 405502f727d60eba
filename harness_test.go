// This file is the harness of the tests: a real server on a real port with a real SQLite database in a temporary directory,
// and a scripted provider that speaks raw TCP and records every byte. After each test it searches all output for secrets.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/textproto"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A testProxy is a running proxy with one project, one upstream and one token.
type testProxy struct {
	t        testing.TB
	instance *instance
	url      string // http://127.0.0.1:port
	dir      string // the data directory
	env      map[string]string
	provider *fakeProvider
	adminKey string // a management key of role admin
	project  string // the project's id
	upstream string // the upstream's id
	tokenID  string
	token    string
	log      *syncBuffer
	stop     func() error // drains and stops; further calls do nothing

	mu           sync.Mutex
	clientOutput bytes.Buffer // all bytes that clients saw, except answers that show a secret once
	secrets      []string     // must not appear anywhere
	// allowErrors allows log lines of level ERROR, which otherwise fail the test.
	allowErrors bool
	clock       func() time.Time
	shared      *http.Transport // of requests that need no connection of their own
}

const promptCanary = "prompt-canary-7Qz1xW"

// newTest starts a proxy with one project, upstream and token. env overrides settings.
func newTest(t testing.TB, env map[string]string) *testProxy {
	t.Helper()
	p := &testProxy{t: t, dir: t.TempDir(), log: &syncBuffer{}}
	t.Cleanup(p.release) // after everything else
	p.provider = newFakeProvider(t)
	p.secrets = []string{p.provider.key, promptCanary}
	p.env = map[string]string{
		"LISTEN_ADDR": "127.0.0.1:0", "DATA_DIR": filepath.Join(p.dir, "data"), "DRAIN_TIMEOUT": "5s", "DRAIN_DELAY": "0s",
		"ALLOW_PRIVATE_UPSTREAMS": "true", "OPENAI_API_URL": p.provider.url, "LOG_LEVEL": "debug",
	}
	if url := newTestDatabase(t); url != "" && env["DATABASE_URL"] == "" {
		p.env["DATABASE_URL"] = url
		// Tests share one server, which may be slow to answer while many of them run.
		p.env["STALE_LIMIT"], p.env["REPLICA_TIMEOUT"] = "30s", "60s"
	}
	maps.Copy(p.env, env)
	p.copyDatabase()
	p.start()
	key, err := p.instance.operations.createFirstKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p.adminKey = key()
	p.secrets = append(p.secrets, p.adminKey)
	var project struct {
		ID        string
		Upstreams []struct{ ID string }
	}
	body := fmt.Sprintf(`{"name":"test","openai_api_key":%q}`, p.provider.key)
	p.manage("POST", "/manage/projects", body, 201, &project)
	p.project, p.upstream = project.ID, project.Upstreams[0].ID
	p.tokenID, p.token = p.newToken(`"name":"t"`)
	t.Cleanup(p.finish)
	return p
}

// newReplicas starts n proxies with one PostgreSQL database and one provider. They share the project, the token and the
// management key of the first.
func newReplicas(t *testing.T, n int, env map[string]string) []*testProxy {
	t.Helper()
	if !usesTestDatabase() {
		t.Skip("there is no PostgreSQL server")
	}
	shared := map[string]string{"ENCRYPTION_KEY": goodKey}
	maps.Copy(shared, env)
	replicas := []*testProxy{newTest(t, shared)}
	for range n - 1 {
		replicas = append(replicas, replicas[0].newReplica(nil, nil))
	}
	return replicas
}

// newReplica starts another replica with the database of p. env overrides settings; clock may be nil.
func (p *testProxy) newReplica(env map[string]string, clock func() time.Time) *testProxy {
	p.t.Helper()
	q := &testProxy{t: p.t, dir: p.t.TempDir(), log: &syncBuffer{}, env: maps.Clone(p.env), provider: p.provider,
		adminKey: p.adminKey, project: p.project, upstream: p.upstream, tokenID: p.tokenID, token: p.token,
		secrets: slices.Clone(p.secrets), clock: clock}
	q.env["DATA_DIR"] = filepath.Join(q.dir, "data")
	maps.Copy(q.env, env)
	q.start()
	p.t.Cleanup(q.finish)
	return q
}

// emptyDatabase is a database as a first start makes it. Most tests start with a copy, because to run the schema files
// takes longer than they do.
var emptyDatabase = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "llm-proxy-test-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "empty.db")
	st, err := openStore(context.Background(), file)
	if err != nil {
		return nil, err
	}
	if err := st.close(); err != nil {
		return nil, err
	}
	return os.ReadFile(file)
})

// pageTemplates are the parsed pages, which are the same in each server and take long to parse.
var pageTemplates = sync.OnceValues(func() (map[string]*template.Template, error) {
	pages, err := newPageSet()
	if err != nil {
		return nil, err
	}
	return pages.templates()
})

// copyDatabase puts an empty database into p's data directory, unless the test chose another directory or made it.
func (p *testProxy) copyDatabase() {
	p.t.Helper()
	dir := filepath.Join(p.dir, "data")
	if p.env["DATA_DIR"] != dir {
		return
	}
	b, err := emptyDatabase()
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "llm-proxy.db"), b, 0o600)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// start runs the server on p's data directory. It may be called again after stop.
func (p *testProxy) start() {
	p.t.Helper()
	cfg, err := loadConfig(func(name string) string { return p.env[name] })
	if err != nil {
		p.t.Fatal(err)
	}
	if cfg.postgres != nil {
		cfg.postgres.clock = p.clock
	}
	p.instance, err = openInstance(context.Background(), cfg, newLogger(p.log, cfg.logLevel, cfg.logText), nil)
	if err != nil {
		p.t.Fatal(err)
	}
	if admin := p.instance.server.admin; admin != nil {
		admin.pages.templates = pageTemplates
	}
	if err := p.instance.listen(); err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	addr, done := make(chan net.Addr, 1), make(chan error, 1)
	go func() { done <- p.instance.serve(ctx, func(a net.Addr) { addr <- a }) }()
	select {
	case a := <-addr:
		p.url = "http://" + a.String()
		if cfg.tlsCert != "" {
			p.url = "https://" + a.String()
		}
	case err := <-done:
		p.t.Fatal(err)
	}
	p.stop = sync.OnceValue(func() error { cancel(); return <-done })
}

// release lets go of what p has. The testing package keeps the functions of Cleanup, and what they refer to, until all
// tests have ended.
func (p *testProxy) release() {
	p.instance, p.provider, p.log, p.clientOutput = nil, nil, nil, bytes.Buffer{}
}

// finish stops the server and searches the clients' output, the log and the data directory for secrets.
func (p *testProxy) finish() {
	if err := p.stop(); err != nil && !p.allowErrors {
		p.t.Errorf("stopping: %v", err)
	}
	if n := p.instance.proxy.bodies.used.Load(); n != 0 {
		p.t.Errorf("%d bytes of request bodies are still reserved", n)
	}
	for id, token := range p.instance.registry.byID {
		if n := token.bodyBytes.Load(); n != 0 {
			p.t.Errorf("%d bytes of request bodies are still reserved for token %s", n, id)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	places := map[string][]byte{"what clients saw": p.clientOutput.Bytes(), "the log": p.log.bytes()}
	files, err := filepath.Glob(filepath.Join(p.env["DATA_DIR"], "*"))
	if err != nil {
		p.t.Error(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			places[filepath.Base(f)] = b
		}
	}
	if p.instance.cfg.postgres != nil {
		places["the database"] = dumpTestDatabase(p.t, p.env["DATABASE_URL"])
	}
	for where, b := range places {
		for _, s := range p.secrets {
			for _, form := range secretEncodings(s) {
				if bytes.Contains(b, []byte(form)) {
					p.t.Errorf("a secret is in %s, as %q", where, form)
				}
			}
		}
	}
	if p.allowErrors {
		return
	}
	for line := range strings.SplitSeq(string(p.log.bytes()), "\n") {
		// The server that tests share on PostgreSQL may be too slow to tell in time what a limit has counted.
		slow := usesTestDatabase() && strings.Contains(line, `"code":"limits_unavailable"`)
		if strings.Contains(line, `"level":"ERROR"`) && !slow {
			p.t.Errorf("unexpected error in the log: %s", line)
		}
	}
}

// allowSecret removes a secret from the list, because the test shows it to someone who may see it.
func (p *testProxy) allowSecret(secret string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.secrets = slices.DeleteFunc(p.secrets, func(s string) bool { return s == secret })
}

// secretEncodings returns the forms in which a secret might leak. For a long secret that includes parts of it.
func secretEncodings(s string) []string {
	forms := []string{s, base64.StdEncoding.EncodeToString([]byte(s)), hex.EncodeToString([]byte(s))}
	if body := strings.TrimPrefix(strings.TrimPrefix(s, tokenPrefix), manageKeyPrefix); len(body) > 32 {
		for i := 12; i+16 <= len(body)-4; i += 7 { // neither the public part nor the hint
			forms = append(forms, body[i:i+16])
		}
	}
	return forms
}

// newToken creates a token of the test's project. fields are JSON members.
func (p *testProxy) newToken(fields string) (id, token string) {
	p.t.Helper()
	var v struct{ ID, Token string }
	p.manage("POST", "/manage/tokens", `{"project_id":"`+p.project+`",`+fields+`}`, 201, &v)
	p.mu.Lock()
	p.secrets = append(p.secrets, v.Token)
	p.mu.Unlock()
	return v.ID, v.Token
}

// manage makes a call to /manage as admin, expects a status, and decodes the answer into to unless that is nil.
func (p *testProxy) manage(method, path, body string, status int, to any) {
	p.t.Helper()
	res := p.manageAs(p.adminKey, method, path, body)
	if res.status != status {
		p.t.Fatalf("%s %s: got %d, want %d: %s", method, path, res.status, status, res.body)
	}
	if to != nil {
		if err := json.Unmarshal([]byte(res.body), to); err != nil {
			p.t.Fatalf("%s %s: %v: %s", method, path, err, res.body)
		}
	}
}

func (p *testProxy) manageAs(key, method, path, body string, headers ...string) testResponse {
	p.t.Helper()
	h := append([]string{"Authorization", "Bearer " + key}, headers...)
	if body != "" {
		h = append([]string{"Content-Type", "application/json"}, h...)
	}
	return p.do(method, path, body, h...)
}

// A testResponse is an answer that a client received.
type testResponse struct {
	status int
	header http.Header
	body   string
	err    error // from reading the body, if the answer was cut
}

// errorCode returns the error code in an OpenAI-shaped error body, "" if the body has another shape.
func (r testResponse) errorCode() string {
	var e struct{ Error struct{ Code string } }
	_ = json.Unmarshal([]byte(r.body), &e)
	return e.Error.Code
}

// do makes any request. headers are pairs of name and value.
func (p *testProxy) do(method, path, body string, headers ...string) testResponse {
	p.t.Helper()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(p.t.Context(), method, p.url+path, r)
	if err != nil {
		p.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
		if headers[i] == "Host" { // net/http ignores the header and sends this field
			req.Host = headers[i+1]
		}
	}
	isManagement := strings.HasPrefix(path, "/manage/") || strings.HasPrefix(path, "/admin/")
	tr := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	if isManagement && method == "GET" {
		tr = p.sharedTransport()
	}
	if cert := p.env["TLS_CERT_FILE"]; cert != "" {
		tr = p.http2(cert)
		defer tr.CloseIdleConnections()
	}
	res, err := tr.RoundTrip(req)
	if err != nil {
		return testResponse{err: err}
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	a := testResponse{res.StatusCode, res.Header, string(b), err}
	showsSecret := isManagement && method == "POST" && res.StatusCode < 300
	p.mu.Lock()
	defer p.mu.Unlock()
	public := res.Header.Clone()
	public.Del("Set-Cookie") // the only place where a session id may appear
	fmt.Fprintln(&p.clientOutput, public, res.Trailer)
	if !showsSecret {
		p.clientOutput.Write(b)
	}
	return a
}

// sharedTransport returns a transport that keeps connections. A new one for each request takes longer than many requests do.
func (p *testProxy) sharedTransport() *http.Transport {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shared == nil {
		p.shared = &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 8}
	}
	return p.shared
}

// http2 returns a transport that speaks HTTP/2 and trusts the certificate made by testCertificate.
func (p *testProxy) http2(cert string) *http.Transport {
	p.t.Helper()
	text, err := os.ReadFile(cert)
	if err != nil {
		p.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(text)
	return &http.Transport{ForceAttemptHTTP2: true, DisableCompression: true,
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "llm.example.test"}}
}

// chat makes a chat call with the test's token. members are added to the body, for example `"stream":true`.
func (p *testProxy) chat(members ...string) testResponse {
	p.t.Helper()
	return p.chatAs(p.token, members...)
}

func (p *testProxy) chatAs(token string, members ...string) testResponse {
	p.t.Helper()
	return p.do("POST", "/v1/chat/completions", chatBody(members...),
		"Authorization", "Bearer "+token, "Content-Type", "application/json")
}

func chatBody(members ...string) string {
	return `{"model":"gpt-4o-mini","messages":[{"role":"user","content":"` + promptCanary + `"}]` +
		strings.Join(append([]string{""}, members...), ",") + `}`
}

// requestEntry is a row of GET /manage/requests.
type requestEntry struct {
	ID, Endpoint, Model, Outcome, Address string
	ErrorCode                             string        `json:"error_code"`
	LimitHit                              string        `json:"limit_hit"`
	UsageSource                           string        `json:"usage_source"`
	TokenID                               string        `json:"token_id"`
	UpstreamID                            string        `json:"upstream_id"`
	AttemptLog                            []attemptLine `json:"attempt_log"`
	Status, Attempts                      int
	Stream                                bool
	InputTokens                           int64    `json:"input_tokens"`
	OutputTokens                          int64    `json:"output_tokens"`
	CachedTokens                          int64    `json:"cached_tokens"`
	ReasoningTokens                       int64    `json:"reasoning_tokens"`
	Cost                                  *float64 `json:"cost"`
	FirstByteMS                           *float64 `json:"first_byte_ms"`
	TotalMS                               *float64 `json:"total_ms"`
	Session                               string   `json:"session"`
	EndUser                               string   `json:"end_user"`
	Tags                                  tagList  `json:"tags"`
	RoutedBy                              string   `json:"routed_by"`
	ClientRetry                           int64    `json:"client_retry"`
	IdempotencyHash                       string   `json:"idempotency_hash"`
}

// ledger returns the rows of all calls, oldest first, after all calls are settled.
func (p *testProxy) ledger() []requestEntry {
	p.t.Helper()
	p.waitSettled()
	var l struct{ Data []requestEntry }
	p.manage("GET", "/manage/requests?limit=500", "", 200, &l)
	slices.Reverse(l.Data)
	return l.Data
}

// waitSettled waits until no call is running and the ledger is written.
func (p *testProxy) waitSettled() {
	p.t.Helper()
	waitFor(p.t, "calls to end", func() bool { return p.instance.running.count() == 0 })
	ctx, cancel := context.WithTimeout(context.Background(), hangTimeout)
	defer cancel()
	if err := p.instance.ledger.flush(ctx); err != nil {
		p.t.Fatal(err)
	}
}

// waitDisconnected waits until the server has ended the connections of all clients. A call whose client has left does
// not count as running before the server reads it, which may be after the client's end. Clients that keep their
// connections must have closed them.
func (p *testProxy) waitDisconnected() {
	p.t.Helper()
	p.do("GET", "/healthz", "") // connections are accepted in order: with this one, all before it have been
	p.sharedTransport().CloseIdleConnections()
	open := &p.instance.metrics.openConnections
	waitFor(p.t, "connections to end", func() bool { return open.Load() == 0 })
}

// lastCall returns the last row in the ledger, and fails the test if there is none.
func (p *testProxy) lastCall() requestEntry {
	p.t.Helper()
	p.waitSettled()
	var l struct{ Data []requestEntry }
	if p.manage("GET", "/manage/requests?limit=1", "", 200, &l); len(l.Data) == 0 {
		p.t.Fatal("the ledger has no row")
	}
	return l.Data[0]
}

// sendRaw sends bytes unchanged over TCP, and returns what arrives until the server closes the connection.
func (p *testProxy) sendRaw(request string) string {
	p.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, request); err != nil {
		return ""
	}
	_ = conn.SetReadDeadline(time.Now().Add(hangTimeout))
	b, err := io.ReadAll(conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Errorf("the connection stays open after %q", b)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clientOutput.Write(b)
	return string(b)
}

// rawChatRequest is a chat call as raw bytes, with extra header lines ("A: b\r\n").
func (p *testProxy) rawChatRequest(lines, body string) string {
	return "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token +
		"\r\nContent-Type: application/json\r\n" + lines + "Content-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body
}

// hangTimeout is how long a test waits for what must happen, however busy the machine is.
const hangTimeout = time.Minute

// waitFor polls until ok returns true. After hangTimeout it fails the test and reports what it waited for.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline, pause := time.Now().Add(hangTimeout), 100*time.Microsecond
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
		time.Sleep(pause)
		pause = min(2*pause, 5*time.Millisecond)
	}
}

// stopwatch starts to measure how long something takes, for a test of a promise such as "within 1 s". It stands still while
// a busy machine keeps this process waiting: it counts steps of a few milliseconds, however late they are.
func stopwatch(t testing.TB) (elapsed func() time.Duration) {
	t.Helper()
	const step = 5 * time.Millisecond
	var steps atomic.Int64
	var counting sync.WaitGroup
	begin, stop := time.Now(), make(chan struct{})
	counting.Go(func() {
		ticker := time.NewTicker(step) // it drops the ticks that nobody was there to take
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				steps.Add(1)
			case <-stop:
				return
			}
		}
	})
	t.Cleanup(func() { close(stop); counting.Wait() })
	return func() time.Duration { return min(time.Since(begin), time.Duration(steps.Load()+1)*step) }
}

// A recordedRequest is a request that the provider received.
type recordedRequest struct {
	method, target string
	header         http.Header // canonical names
	head           string      // the raw head
	body           string
}

// A fakeProvider speaks HTTP/1.1 over raw TCP. script answers each request with raw bytes; if it returns false, the
// connection is closed.
type fakeProvider struct {
	url, key string
	listener net.Listener

	mu       sync.Mutex
	script   func(c *providerConn, r recordedRequest) bool
	requests []recordedRequest
	inFlight int // requests being answered
}

// A providerConn is one connection from the proxy.
type providerConn struct {
	net.Conn
	r *bufio.Reader
}

// reply writes a complete answer with Content-Length. headers are whole lines.
func (c *providerConn) reply(status int, body string, headers ...string) bool {
	var h strings.Builder
	fmt.Fprintf(&h, "HTTP/1.1 %d X\r\nContent-Length: %d\r\n", status, len(body))
	if !strings.Contains(strings.ToLower(strings.Join(headers, "\n")), "content-type") {
		h.WriteString("Content-Type: application/json\r\n")
	}
	for _, line := range headers {
		h.WriteString(line + "\r\n")
	}
	_, err := io.WriteString(c, h.String()+"\r\n"+body)
	return err == nil
}

// beginSSE writes the head of a chunked event stream.
func (c *providerConn) beginSSE(headers ...string) {
	lines := strings.Join(append(headers, ""), "\r\n")
	head := "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
	_, _ = io.WriteString(c, head+lines+"\r\n")
}

// chunk writes one chunk; an empty chunk ends the answer.
func (c *providerConn) chunk(s string) error {
	_, err := fmt.Fprintf(c, "%x\r\n%s\r\n", len(s), s)
	return err
}

// waitClosed waits for at most d and reports whether the proxy closed the connection.
func (c *providerConn) waitClosed(d time.Duration) bool {
	_ = c.SetReadDeadline(time.Now().Add(d))
	_, err := c.r.ReadByte()
	ne, ok := err.(net.Error)
	return err != nil && (!ok || !ne.Timeout())
}

// reset closes the connection with a TCP reset.
func (c *providerConn) reset() bool {
	_ = c.Conn.(*net.TCPConn).SetLinger(0)
	c.Conn.Close()
	return false
}

const chatResponseBody = `{"id":"chatcmpl-1","object":"chat.completion","created":1764000000,` +
	`"model":"gpt-4o-mini-2024-07-18","choices":[{"index":0,` +
	`"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}],` +
	`"usage":{"prompt_tokens":9,"completion_tokens":3,"total_tokens":12}}`

// chatEvents returns a short stream, with or without the usage event.
func chatEvents(usage bool) []string {
	event := func(rest string) string {
		return `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1764000000,` +
			`"model":"gpt-4o-mini-2024-07-18",` + rest + "}\n\n"
	}
	events := []string{
		event(`"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]`),
		event(`"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]`),
		event(`"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]`),
	}
	if usage {
		events = append(events, event(`"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,"total_tokens":12}`))
	}
	return append(events, "data: [DONE]\n\n")
}

// chatScript is the default script of a provider. It answers chat calls, streamed or not, with usage if the call asks for it.
func chatScript(c *providerConn, r recordedRequest) bool {
	if !strings.Contains(r.body, `"stream":true`) {
		return c.reply(200, chatResponseBody, "X-Request-Id: provider-1")
	}
	c.beginSSE()
	for _, e := range chatEvents(strings.Contains(r.body, `"include_usage":true`)) {
		if c.chunk(e) != nil {
			return false
		}
	}
	return c.chunk("") == nil
}

func newFakeProvider(t testing.TB) *fakeProvider {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	key := "sk-provider-" + randomBase62(40)
	p := &fakeProvider{url: "http://" + l.Addr().String(), key: key, listener: l, script: chatScript}
	var serving sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				stop := context.AfterFunc(ctx, func() { conn.Close() })
				defer stop()
				p.serve(&providerConn{conn, bufio.NewReader(conn)})
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		serving.Wait()
		p.script, p.requests = nil, nil // see testProxy.release
	})
	return p
}

func (p *fakeProvider) serve(c *providerConn) {
	for {
		r, err := readRequest(c.r)
		if err != nil {
			return
		}
		p.mu.Lock()
		p.requests = append(p.requests, r)
		p.inFlight++
		script := p.script
		p.mu.Unlock()
		again := script(c, r)
		p.mu.Lock()
		p.inFlight--
		p.mu.Unlock()
		if !again {
			return
		}
	}
}

func readRequest(br *bufio.Reader) (recordedRequest, error) {
	var head strings.Builder
	tr := textproto.NewReader(bufio.NewReader(io.TeeReader(byteReader{br}, &head)))
	line, err := tr.ReadLine()
	if err != nil {
		return recordedRequest{}, err
	}
	h, err := tr.ReadMIMEHeader()
	if err != nil {
		return recordedRequest{}, err
	}
	method, rest, _ := strings.Cut(line, " ")
	target, _, _ := strings.Cut(rest, " ")
	r := recordedRequest{method: method, target: target, header: http.Header(h), head: head.String()}
	req, err := http.ReadRequest(bufio.NewReader(io.MultiReader(strings.NewReader(r.head), br)))
	if err != nil {
		return recordedRequest{}, err
	}
	body, err := io.ReadAll(req.Body)
	r.body = string(body)
	return r, err
}

// A byteReader returns one byte at a time, so that nothing is read ahead.
type byteReader struct{ r *bufio.Reader }

func (b byteReader) Read(p []byte) (int, error) {
	c, err := b.r.ReadByte()
	if err != nil {
		return 0, err
	}
	p[0] = c
	return 1, nil
}

// setScript sets the script for all further requests.
func (p *fakeProvider) setScript(script func(c *providerConn, r recordedRequest) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.script = script
}

// received returns the requests received so far.
func (p *fakeProvider) received() []recordedRequest {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]recordedRequest(nil), p.requests...)
}

// lastRequest returns the last request, and fails the test if there is none.
func (p *fakeProvider) lastRequest(t *testing.T) recordedRequest {
	t.Helper()
	all := p.received()
	if len(all) == 0 {
		t.Fatal("the provider received no request")
	}
	return all[len(all)-1]
}

// A syncBuffer is a bytes.Buffer that several goroutines may use.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) bytes() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.b.Bytes())
}

// newKey makes a management key with a role.
func (p *testProxy) newKey(name, role string) (id, key string) {
	p.t.Helper()
	var v struct{ ID, Key string }
	p.manage("POST", "/manage/keys", fmt.Sprintf(`{"name":%q,"role":%q}`, name, role), 201, &v)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.secrets = append(p.secrets, v.Key)
	return v.ID, v.Key
}

// expectParamError fails the test unless an answer is a refusal in OpenAI's shape that
// names param.
func expectParamError(t testing.TB, what string, res testResponse, status int, param string) {
	t.Helper()
	var e struct {
		Error struct {
			Message, Type, Code *string
			Param               *string
		}
	}
	err := json.Unmarshal([]byte(res.body), &e)
	got := ""
	if e.Error.Param != nil {
		got = *e.Error.Param
	}
	if err != nil || e.Error.Message == nil || *e.Error.Message == "" || e.Error.Type == nil || e.Error.Code == nil || res.status != status || got != param {
		t.Errorf("%s: got %d %s, want %d about %q", what, res.status, res.body, status, param)
	}
}

func quote(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// chatWithHeaders makes a chat call with exactly these headers.
func (p *testProxy) chatWithHeaders(headers ...string) testResponse {
	p.t.Helper()
	headers = append([]string{"Content-Type", "application/json"}, headers...)
	return p.do("POST", "/v1/chat/completions", chatBody(), headers...)
}

// expectRefused checks that an answer is a refusal with status and code, and that the provider got no request.
func (p *testProxy) expectRefused(what string, a testResponse, status int, code string) {
	p.t.Helper()
	if a.status != status || a.errorCode() != code {
		p.t.Errorf("%s: got %d %s (%v), want %d %s", what, a.status, a.body, a.err, status, code)
	}
	if n := len(p.provider.received()); n > 0 {
		p.t.Fatalf("%s: the provider got %d requests", what, n)
	}
}

// unknownCredential returns a well-formed token or key that was never issued.
func (p *testProxy) unknownCredential(prefix string) string {
	value, _ := mintCredential(prefix, "")
	p.mu.Lock()
	defer p.mu.Unlock()
	p.secrets = append(p.secrets, value())
	return value()
}

// A clientStream is a stream that a client reads.
type clientStream struct {
	p    *testProxy
	body io.ReadCloser
	r    *bufio.Reader
}

// stream starts a chat stream with the token; members are added to the request. It ends with the test.
func (p *testProxy) stream(token string, members ...string) *clientStream {
	p.t.Helper()
	s, err := p.openStream(p.t.Context(), token, strings.Join(members, ","))
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

// endlessStream makes a call whose answer begins with an event and does not end by itself, and returns it after its
// first byte.
func (p *testProxy) endlessStream() *clientStream {
	p.t.Helper()
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(false)[0])
		return !c.waitClosed(hangTimeout)
	})
	s := p.stream(p.token)
	if _, err := s.read(1); err != nil {
		p.t.Fatal(err)
	}
	return s
}

// openStream is stream for any goroutine, with a context. A status other than 200 is an error.
func (p *testProxy) openStream(ctx context.Context, token, members string) (*clientStream, error) {
	all := []string{`"stream":true`}
	if members != "" {
		all = append(all, members)
	}
	return p.openCall(ctx, token, "/v1/chat/completions", chatBody(all...))
}

// openCall is openStream for any endpoint. The answer need not be a stream.
func (p *testProxy) openCall(ctx context.Context, token, path, body string) (*clientStream, error) {
	req, err := http.NewRequestWithContext(ctx, "POST", p.url+path, strings.NewReader(body))
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
		return p.clientOutput.Write(b)
	}))
	return &clientStream{p, res.Body, bufio.NewReader(seen)}, nil
}

// read returns the next n bytes.
func (s *clientStream) read(n int) (string, error) {
	b := make([]byte, n)
	n, err := io.ReadFull(s.r, b)
	return string(b[:n]), err
}

// readAll returns the rest of the stream. The error is nil if the stream ended cleanly.
func (s *clientStream) readAll() (string, error) {
	b, err := io.ReadAll(s.r)
	return string(b), err
}

// allRequests returns all rows of the ledger.
func (p *testProxy) allRequests() (all []requestView) {
	p.t.Helper()
	p.waitSettled()
	for before := int64(math.MaxInt64); ; before = all[len(all)-1].id {
		rows, err := p.instance.store.listRequests(context.Background(), requestFilter{before: before, limit: 1000})
		if err != nil {
			p.t.Fatal(err)
		}
		if len(rows) == 0 {
			return all
		}
		all = append(all, rows...)
	}
}

// checkSums compares the sums of each grain with the rows. It omits refused calls, of which not all have a row.
func (p *testProxy) checkSums() {
	p.t.Helper()
	type key struct{ at, token, model, endpoint, outcome any }
	want := map[string]map[key]usageSum{"hour": {}, "day": {}, "total": {}}
	severalPrices := map[key]bool{} // of sums with rows that tell no single price for their cached input
	for _, v := range p.allRequests() {
		if v.outcome == outcomeRefused {
			continue
		}
		if v.outcome == outcomeOpen {
			p.t.Errorf("%s is still open", formatRequestID(v.id))
		}
		r := v.requestRow
		if r.priced = v.nullCost != nil; r.priced {
			r.cost = *v.nullCost
		}
		r.totalUS = deref(v.nullTotalUS)
		r.promptSaved = p.promptSaved(&v)
		for grain, k := range map[string]key{
			"hour":  {r.started - r.started%hourMS, v.tokenID, nil, r.endpoint, string(r.outcome)},
			"day":   {r.started - r.started%dayMS, nil, nil, r.endpoint, string(r.outcome)},
			"total": {int64(0), v.tokenID, nil, nil, string(r.outcome)},
		} {
			s := want[grain][k]
			s.add(&r)
			want[grain][k] = s
			severalPrices[k] = severalPrices[k] || r.priced && r.counts.cached > 0 && v.billedPriceID == 0
		}
	}
	for grain, want := range want {
		rows, err := p.instance.store.usage(context.Background(), usageQuery{interval: grain,
			to: math.MaxInt64, limit: 1 << 20,
			byToken: grain != "day", byEndpoint: grain != "total", byOutcome: true})
		if err != nil {
			p.t.Fatal(err)
		}
		got := map[key]usageSum{}
		for _, u := range rows {
			k := key{at: u.at, outcome: u.outcome}
			if grain != "day" {
				k.token = u.tokenID
			}
			if grain != "total" {
				k.endpoint = u.endpoint
			}
			if u.outcome != string(outcomeRefused) {
				got[k] = u.usageSum
			}
		}
		for k, s := range want {
			if severalPrices[k] {
				s.promptSaved = got[k].promptSaved
			}
			if got[k] != s {
				p.t.Errorf("by %s, %v: the rows add up to %+v, the sums are %+v", grain, k, s, got[k])
			}
		}
		if len(got) != len(want) {
			p.t.Errorf("by %s: %d sums, want %d", grain, len(got), len(want))
		}
	}
}

// promptSaved returns what the cached input of a call has saved, by the price that its cost was made of.
func (p *testProxy) promptSaved(v *requestView) int64 {
	if v.billedPriceID == 0 || v.counts.cached == 0 || v.nullCost == nil {
		return 0
	}
	text, err := p.instance.store.billedPrice(context.Background(), v.billedPriceID)
	if err != nil {
		p.t.Fatal(err)
	}
	price, err := parseBilledPrice(text)
	if err != nil {
		p.t.Fatal(err)
	}
	r := v.requestRow
	r.cost = *v.nullCost
	return price.promptSaved(&r)
}

// checkCounts compares each token's count, stored and in memory, with its rows. A call that could not be recorded was
// refused, and does not count.
func (p *testProxy) checkCounts() {
	p.t.Helper()
	calls, kinds := map[string]int64{}, map[string]map[string]int{}
	for _, v := range p.allRequests() {
		if kinds[v.tokenID] == nil {
			kinds[v.tokenID] = map[string]int{}
		}
		kinds[v.tokenID][fmt.Sprintf("%s %d %s, %d attempts", v.outcome, v.status, v.errorCode, v.attempts)]++
		if v.outcome != outcomeRefused || v.attempts > 0 && v.errorCode != "ledger_unavailable" {
			calls[v.tokenID]++
		}
	}
	for id, n := range calls {
		row, err := p.instance.store.tokenByID(context.Background(), id)
		if err != nil {
			p.t.Fatal(err)
		}
		p.instance.registry.mu.RLock()
		live := n // for a token that was not used since the start
		if token := p.instance.registry.byID[id]; token != nil {
			live = token.used.Load()
		}
		p.instance.registry.mu.RUnlock()
		if row.requestCount != n || live != n {
			p.t.Errorf("token %s has %d rows, but the stored count %d, in memory %d; its rows by kind: %v", id, n,
				row.requestCount, live, kinds[id])
		}
	}
}

// sendChat makes a chat call from any goroutine and reads the answer. It returns the call's id and status; the status
// is 0 if the client got no headers.
func (p *testProxy) sendChat(ctx context.Context, token, members string) (id string, status int) {
	body := strings.NewReader(chatBody(members))
	req, err := http.NewRequestWithContext(ctx, "POST", p.url+"/v1/chat/completions", body)
	if err != nil {
		p.t.Error(err)
		return "", 0
	}
	req.Header = http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}}
	res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return "", 0
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	return res.Header.Get("X-Llm-Proxy-Request-Id"), res.StatusCode
}

// lockDatabase holds the database's write lock, as another program may, until
// release is called.
func (p *testProxy) lockDatabase() (release func()) {
	p.t.Helper()
	requireSQLite(p.t, "it locks the file of the database")
	db, err := openSQLite(p.instance.cfg.databaseFile, 1, "")
	if err != nil {
		p.t.Fatal(err)
	}
	conn, err := db.Conn(context.Background())
	if err == nil {
		_, err = conn.ExecContext(context.Background(), `BEGIN EXCLUSIVE`)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	release = sync.OnceFunc(func() { _, _ = conn.ExecContext(context.Background(), `ROLLBACK`); db.Close() })
	p.t.Cleanup(release)
	return release
}

// setPragma sets something on the writing connection, of which there is one.
func (p *testProxy) setPragma(text string) {
	p.t.Helper()
	requireSQLite(p.t, "it sets a pragma")
	if _, err := p.instance.store.writeDB.Exec(text); err != nil {
		p.t.Fatal(err)
	}
}

// between returns what stands in text after from and before to.
func between(text, from, to string) string {
	_, rest, _ := strings.Cut(text, from)
	found, _, _ := strings.Cut(rest, to)
	return found
}

// requireSQLite skips a test on PostgreSQL.
func requireSQLite(t testing.TB, reason string) {
	t.Helper()
	if usesTestDatabase() {
		t.Skip("on SQLite only: " + reason)
	}
}

// pendingReplica returns the replica of the pending records in a database, 0 in one of SQLite.
func pendingReplica(t *testing.T, st *store) int64 {
	t.Helper()
	if st.backend == nil {
		return 0
	}
	replica, err := queryValue[int64](t.Context(), st.readDB, "reading the replica",
		`SELECT coalesce(max(replica), 0) FROM begun`)
	if err != nil {
		t.Fatal(err)
	}
	return replica
}
