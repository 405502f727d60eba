// This file holds the ten promises of the proxy, one test each, in the order in which SECURITY.md lists them.
// Each test runs a real server on a real port with a real database, against a scripted provider. The details of
// a promise are tested beside the file that keeps it.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestPromiseTransparent: bodies pass byte for byte, both ways.
func TestPromiseTransparent(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	body := `{ "messages": [], "big": 9223372036854775809, "e": 1e400, "sep": "` + "\u2028" + `", "neg": -0, "model":"gpt-4o-mini" }`
	res := p.do("POST", "/v1/chat/completions", body,
		"Authorization", "Bearer "+p.token, "Content-Type", "application/json", "User-Agent", "sdk/1")
	if res.status != 200 || res.body != chatResponseBody {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	got := p.provider.lastRequest(t)
	if got.body != body {
		t.Errorf("the provider got %s", got.body)
	}
	if got.target != "/v1/chat/completions" || got.header.Get("Authorization") != "Bearer "+p.provider.key ||
		got.header.Get("User-Agent") != "sdk/1" {
		t.Errorf("the provider got %s", strings.ReplaceAll(got.head, p.provider.key, "KEY"))
	}
	if res.header.Get("X-Request-Id") != "provider-1" || !strings.HasPrefix(res.header.Get("X-Llm-Proxy-Request-Id"), "req_") {
		t.Errorf("request ids: %v", res.header)
	}
	row := p.lastCall()
	if row.Outcome != "ok" || row.UsageSource != "exact" || row.InputTokens != 9 || row.OutputTokens != 3 ||
		row.Status != 200 || row.Cost == nil {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestPromiseLimitIsALimit: of 200 simultaneous calls, exactly as many pass as the token has left. All others are refused
// and reach no provider.
func TestPromiseLimitIsALimit(t *testing.T) {
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
			hits := len(p.provider.received())
			statuses := p.burst(token, 200)
			left := limit - used
			if n := len(p.provider.received()) - hits; n != left || statuses[200] != left || statuses[429] != 200-left {
				t.Errorf("%d of %d used: the provider got %d calls, the clients %v", used, limit, n, statuses)
			}
			if n := p.requestCount(id); n != int64(limit) {
				t.Errorf("%d of %d used: the count is %d", used, limit, n)
			}
		}
	}
	p.checkCounts()
}

// TestPromiseOnRecord: no byte of an answer leaves before the call's pending record is committed.
func TestPromiseOnRecord(t *testing.T) {
	t.Parallel()
	for name, fields := range map[string]string{"unlimited": `"name":"a"`, "limited": `"name":"b","max_requests":10`} {
		for _, member := range []string{`"stream":true`, `"stream":false`} {
			t.Run(name+" "+member, func(t *testing.T) {
				t.Parallel()
				p := newTest(t, nil)
				_, p.token = p.newToken(fields)
				if res := p.chat(); res.status != 200 { // so that the token is live
					t.Fatalf("got %d", res.status)
				}
				release := p.lockDatabase()
				conn := p.dial()
				_, _ = io.WriteString(conn, p.rawChatRequest("Connection: close\r\n", chatBody(member)))
				if name == "unlimited" { // a limited one is recorded before the provider is called
					waitFor(t, "the provider", func() bool { return len(p.provider.received()) == 2 })
				}
				_ = conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
				if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
					t.Error("a byte of the answer left while the database was locked")
				}
				if n := len(p.provider.received()); name == "limited" && n != 1 {
					t.Errorf("the provider got %d calls", n)
				}
				release()
				_ = conn.SetReadDeadline(time.Now().Add(hangTimeout))
				if b, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 200 ") {
					t.Errorf("after that: %q, %v", b, err)
				}
				p.checkSums()
				p.checkCounts()
			})
		}
	}
	p := newTest(t, nil)
	s := p.endlessStream()
	rows, err := p.instance.store.listRequests(t.Context(), requestFilter{before: math.MaxInt64, limit: 10})
	if err != nil || len(rows) != 1 || rows[0].outcome != outcomeOpen {
		t.Errorf("at the first byte, the ledger has %+v, %v", rows, err)
	}
	s.body.Close()
}

// TestPromiseRevocationIsImmediate: whatever ends a token ends its running streams within a second and refuses its next call.
func TestPromiseRevocationIsImmediate(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		method, path, body string
		status             int // of the next call
		code               string
	}{
		"revoked":             {"DELETE", "/manage/tokens/TOKEN", "", 401, "revoked"},
		"all revoked":         {"POST", "/manage/projects/PROJECT/tokens/revoke", "", 401, "revoked"},
		"project deactivated": {"PATCH", "/manage/projects/PROJECT", `{"is_active":false}`, 403, "project_inactive"},
		"project deleted":     {"DELETE", "/manage/projects/PROJECT", "", 401, "revoked"},
		"expired":             {"PATCH", "/manage/tokens/TOKEN", `{"expires_at":"SOON"}`, 401, "expired"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			cut := make(chan bool, 1)
			p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
				if !strings.Contains(r.body, `"stream":true`) {
					c.waitClosed(hangTimeout) // no answer
					return false
				}
				c.beginSSE()
				_ = c.chunk(chatEvents(true)[1])
				cut <- c.waitClosed(hangTimeout)
				return false
			})
			s := p.stream(p.token)
			if _, err := s.read(1); err != nil {
				t.Fatal(err)
			}
			waiting := make(chan testResponse, 1)
			go func() { waiting <- p.chat() }()
			waitFor(t, "the second call", func() bool { return len(p.provider.received()) == 2 })

			var ends time.Time
			for soon := 200 * time.Millisecond; ; soon *= 2 {
				ends = time.Now().Add(soon)
				replace := strings.NewReplacer("TOKEN", p.tokenID, "PROJECT", p.project,
					"SOON", ends.UTC().Format(time.RFC3339Nano))
				res := p.manageAs(p.adminKey, test.method, replace.Replace(test.path), replace.Replace(test.body))
				if res.status == 200 {
					break
				}
				if name != "expired" || time.Now().Before(ends) { // a busy machine lets SOON pass
					t.Fatalf("got %d %s", res.status, res.body)
				}
			}
			elapsed := stopwatch(t)
			if name == "expired" {
				waitFor(t, "the expiry", func() bool { return time.Now().After(ends) })
				elapsed = stopwatch(t)
			}
			if _, err := s.readAll(); err == nil {
				t.Error("the stream ended as if it were complete")
			}
			if !<-cut {
				t.Error("the call to the provider continued")
			}
			if res := <-waiting; res.status != test.status {
				t.Errorf("a call without an answer yet: got %d %s", res.status, res.body)
			}
			if d := elapsed(); d > time.Second {
				t.Errorf("the calls ended after %v", d)
			}
			if res := p.chat(); res.status != test.status {
				t.Errorf("the next call: got %d %s", res.status, res.body)
			}
			rows := p.ledger()
			if len(rows) != 3 || rows[0].Outcome != "truncated" || rows[1].Outcome != "truncated" || rows[2].Outcome != "refused" ||
				rows[0].Status != 200 || rows[1].Status != test.status {
				t.Errorf("the ledger has %+v", rows)
			}
			for i, row := range rows {
				if want := test.code; row.ErrorCode != want || i < 2 && (row.UsageSource != "estimated" || row.InputTokens == 0) {
					t.Errorf("row %d: the ledger has %+v", i, row)
				}
			}
		})
	}
}

// TestPromiseKeysNeverComeBack: a provider that quotes its key wherever it can, and all URLs of all roles: no key, token or
// session id is in any answer, log line, metric, error or database file. (testProxy.finish searches after every test.)
func TestPromiseKeysNeverComeBack(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true // "the provider's answer contained its key" is one
	for _, status := range []int{200, 400, 401, 403, 404, 429, 500} {
		p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
			key := p.provider.key
			if status == 200 && strings.Contains(r.body, `"stream":true`) {
				c.beginSSE("X-Request-Id: " + key)
				_ = c.chunk(`data: {"choices":[],"echo":"` + key[:20])
				_ = c.chunk(key[20:] + "\"}\n\ndata: [DONE]\n\n")
				return c.chunk("") == nil
			}
			return c.reply(status, `{"error":{"message":"`+key+`"}}`, "X-Request-Id: "+key, "OpenAI-Version: "+key)
		})
		p.chat()
		p.chat(`"stream":true`)
	}
	p.chatAs(p.unknownCredential(tokenPrefix))
	p.do("POST", "/v1/chat/completions?key="+p.token, chatBody(), "Authorization", "Bearer "+p.token)
	p.waitSettled()
	for _, r := range []role{roleViewer, roleOperator, roleAdmin} {
		_, key := p.newKey("k", string(r))
		for _, route := range p.instance.manage.manageTable() {
			if method, path := p.operationPath(route.pattern); method == "GET" {
				p.manageAs(key, method, path, "")
			}
		}
		p.manageAs(key, "GET", "/metrics", "")
		b := p.signIn(key)
		for _, route := range p.instance.server.admin.adminTable() {
			if strings.HasPrefix(route.pattern, "GET ") {
				b.get(p.expandPattern(route.pattern))
			}
		}
	}
	if n := len(p.secrets); n < 10 || !slices.Contains(p.secrets, p.provider.key) || !slices.Contains(p.secrets, p.token) {
		t.Errorf("the search is for %d secrets only", n)
	}
}

// TestPromiseNeverLieAboutAStream: an answer that the provider cuts, at whatever byte, never looks complete to the client.
func TestPromiseNeverLieAboutAStream(t *testing.T) {
	t.Parallel()
	head := "HTTP/1.1 200 OK\r\nContent-Type: "
	var chunks strings.Builder
	for _, e := range chatEvents(true) {
		fmt.Fprintf(&chunks, "%x\r\n%s\r\n", len(e), e)
	}
	length := len(chatResponseBody)
	answers := []struct{ name, raw, body, members string }{
		{name: "unary", body: chatResponseBody, members: `"n":1`,
			raw: head + fmt.Sprintf("application/json\r\nContent-Length: %d\r\n\r\n%s", length, chatResponseBody)},
		{name: "unary in chunks", body: chatResponseBody, members: `"n":1`,
			raw: head + "application/json\r\nTransfer-Encoding: chunked\r\n\r\n" +
				fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", length, chatResponseBody)},
		{name: "stream", body: strings.Join(chatEvents(true), ""), members: `"stream":true,"stream_options":{"include_usage":true}`,
			raw: head + "text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks.String() + "0\r\n\r\n"},
	}
	for _, a := range answers {
		for how, step := range map[string]int{"FIN": 1, "RST": 5} {
			t.Run(a.name+" "+how, func(t *testing.T) {
				t.Parallel()
				p := newTest(t, nil)
				headLength := strings.Index(a.raw, "\r\n\r\n") + 4
				for k := 0; k < len(a.raw); k += step {
					p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
						_, _ = io.WriteString(c, a.raw[:k])
						if how == "RST" {
							return c.reset()
						}
						return false
					})
					res := p.chat(a.members)
					switch {
					case res.err == nil && res.status == 502 && res.errorCode() == "upstream_unreachable" && k <= headLength:
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

// TestPromiseFailClosedHonestly: trouble of ours is 503 with Retry-After, and trouble of the provider is 502 or 504. Neither
// is ever 401, after which a client would throw its token away.
func TestPromiseFailClosedHonestly(t *testing.T) {
	t.Parallel()
	silent := func(c *providerConn, _ recordedRequest) bool { c.waitClosed(hangTimeout); return false }
	for _, test := range []struct {
		name   string
		begin  func(p *testProxy)
		script func(c *providerConn, r recordedRequest) bool
		status int
		code   string
	}{
		{name: "ledger locked", begin: func(p *testProxy) { p.setPragma(`PRAGMA busy_timeout = 20`); p.lockDatabase() },
			status: 503, code: "ledger_unavailable"},
		{name: "database closed", begin: func(p *testProxy) { p.instance.store.readDB.Close() },
			status: 503, code: "store_unavailable"},
		{name: "body memory full", begin: func(p *testProxy) {
			p.instance.proxy.bodies.reserve(1 << 20)
			p.t.Cleanup(func() { p.instance.proxy.bodies.release(1 << 20) })
		}, status: 503, code: "body_memory_full"},
		{name: "provider unreachable", begin: func(p *testProxy) { p.provider.listener.Close() },
			status: 502, code: "upstream_unreachable"},
		{name: "provider breaks off", script: func(c *providerConn, _ recordedRequest) bool { return c.reset() },
			status: 502, code: "upstream_unreachable"},
		{name: "provider silent", script: silent, status: 504, code: "upstream_timeout"},
		{name: "key refused", script: replyScript(401, `{"error":{"code":"invalid_api_key"}}`),
			status: 502, code: "upstream_auth_error"},
		{name: "key without rights", script: replyScript(403, `{}`), status: 502, code: "upstream_auth_error"},
		{name: "redirect", script: replyScript(302, ``, "Location: /v1/models"), status: 502, code: "upstream_protocol_error"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"UPSTREAM_TIMEOUT": "1s", "MAX_BODY_BYTES": "1MiB", "BODY_MEMORY": "1MiB"})
			p.allowErrors = true
			if test.script != nil {
				p.provider.setScript(test.script)
			}
			if test.begin != nil {
				test.begin(p)
			}
			for range 2 {
				res := p.chat()
				if res.status != test.status || res.errorCode() != test.code || res.status == 503 && res.header.Get("Retry-After") == "" {
					t.Errorf("got %d %v %s, want %d %s", res.status, res.header, res.body, test.status, test.code)
				}
			}
		})
	}
}

// countGoroutines returns how many goroutines run that began in a function under pprof.Do with this label.
func countGoroutines(t testing.TB, label string) (n int) {
	t.Helper()
	var profile bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&profile, 1); err != nil {
		t.Fatal(err)
	}
	stacks := regexp.MustCompile(`(?m)^(\d+) @.*\n# labels: (.*)$`)
	for _, m := range stacks.FindAllStringSubmatch(profile.String(), -1) {
		if strings.Contains(m[2], `"`+label+`"`) {
			n += atoi(m[1])
		}
	}
	return n
}

// labelled runs f so that countGoroutines counts the goroutines which it starts.
func labelled(t testing.TB, label string, f func()) {
	pprof.Do(t.Context(), pprof.Labels("test", label), func(context.Context) { f() })
}

// TestPromiseBounded: hostile clients use up no memory, goroutine or series that outlives their calls.
func TestPromiseBounded(t *testing.T) {
	t.Parallel()
	var p *testProxy
	labelled(t, "bounded", func() {
		p = newTest(t, map[string]string{"MAX_BODY_BYTES": "64KiB", "BODY_MEMORY": "1MiB", "LOG_LEVEL": "error"})
	})
	auth := []string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json"}
	attack := func(i int) {
		p.chatAs(p.unknownCredential(tokenPrefix))
		p.do("POST", "/v1/chat/completions", fmt.Sprintf(`{"model":"model-%d","messages":[]}`, i), auth...)
		p.do("GET", fmt.Sprintf("/v1/path-%d", i), "", auth...)
		p.do(fmt.Sprintf("METHOD%d", i), "/v1/chat/completions", "", auth...)
		if res := p.do("POST", "/v1/chat/completions", strings.Repeat(" ", 64<<10+1), auth...); res.err == nil && res.status != 413 {
			t.Errorf("a body over the limit: got %d %s", res.status, res.body)
		}
		for _, request := range []string{ // clients that send a part of a request and leave
			"POST /v1/chat/comp", p.requestHead("1.1", "Content-Length: 60000\r\n") + "{", p.rawChatRequest("", chatBody(`"stream":true`)),
		} {
			conn := p.dial()
			_, _ = io.WriteString(conn, request)
			conn.Close()
		}
	}
	settled := func() (goroutines, series int) {
		p.checkReleased()
		p.waitSettled()
		p.instance.transport.CloseIdleConnections()
		return countGoroutines(t, "bounded"), len(p.metrics())
	}
	for i := range 20 {
		attack(i)
	}
	settled()
	before, seriesBefore := settled() // the metrics page has counted itself by now
	for i := range 40 {
		attack(100 + i)
	}
	_, series := settled()
	if series > seriesBefore+10 { // a few more outcomes may have been seen for the first time
		t.Errorf("there were %d series, now there are %d", seriesBefore, series)
	}
	waitFor(t, "the goroutines of the calls to end", func() bool { n, _ := settled(); return n <= before })
	if n := len(p.instance.registry.byID); n > 1 {
		t.Errorf("%d tokens are live", n)
	}
}

// TestPromiseLight: with everything on, a call allocates little more than one through the standard library's bare
// reverse proxy, and keeps no more goroutines. (bench/perf measures the time.)
func TestPromiseLight(t *testing.T) { // not parallel: it counts allocations
	p := newLightTest(t)
	for _, base := range []string{p.bare, p.url} { // connections, pools and caches
		p.allocations(base, 20)
	}
	bare, got := p.allocations(p.bare, 300), p.allocations(p.url, 300)
	if got > bare+90 {
		t.Errorf("a call makes %d allocations, and %d through a bare proxy", got, bare)
	}
	p.provider.setScript(endlessScript)
	p.expectGoroutines(10, 5)
}

// A lightTest is a proxy beside a bare one to the same provider.
type lightTest struct {
	*testProxy
	bare   string // its URL
	client *http.Client
}

func newLightTest(t *testing.T) *lightTest {
	p := &lightTest{client: &http.Client{Transport: &http.Transport{DisableCompression: true}}}
	labelled(t, "light", func() {
		p.testProxy = newTest(t, map[string]string{"LOG_LEVEL": "info"})
		target, err := url.Parse(p.provider.url)
		if err != nil {
			t.Fatal(err)
		}
		bare := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Header.Set("Authorization", "Bearer "+p.provider.key)
		}})
		t.Cleanup(bare.Close)
		t.Cleanup(p.client.CloseIdleConnections)
		p.bare = bare.URL
	})
	return p
}

// send makes a chat call through the proxy at base and returns its answer, once it has begun.
func (p *lightTest) send(base, body string) *http.Response {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.t.Context(), "POST", base+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header = http.Header{"Authorization": {"Bearer " + p.token}, "Content-Type": {"application/json"}}
	res, err := p.client.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	return res
}

// allocations makes n calls and returns how many allocations there were for each, in the whole process.
func (p *lightTest) allocations(base string, n int) int {
	p.t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range n {
		res := p.send(base, chatBody())
		if b, err := io.ReadAll(res.Body); err != nil || string(b) != chatResponseBody {
			p.t.Fatalf("got %s, %v", b, err)
		}
		res.Body.Close()
	}
	p.waitSettled()
	runtime.ReadMemStats(&after)
	return int(after.Mallocs-before.Mallocs) / n
}

// expectGoroutines expects that n running streams keep no more than most goroutines each. Five are net/http's: two serve the
// client's connection, two the provider's, and one is the scripted provider's own.
func (p *lightTest) expectGoroutines(n, most int) {
	p.t.Helper()
	before, unchanged := 0, 0
	waitFor(p.t, "the goroutines of earlier calls to end", func() bool {
		p.client.CloseIdleConnections()
		p.instance.transport.CloseIdleConnections()
		count := countGoroutines(p.t, "light")
		if unchanged++; count != before {
			before, unchanged = count, 0
		}
		return unchanged == 20
	})
	for range n {
		res := p.send(p.url, chatBody(`"stream":true`))
		defer res.Body.Close()
		if _, err := res.Body.Read(make([]byte, 1)); err != nil {
			p.t.Fatal(err)
		}
	}
	waitFor(p.t, "the streams to keep few goroutines", func() bool { return countGoroutines(p.t, "light")-before <= n*most })
}

// TestPromiseAuditable: the trust core, which docs/security-review.md lists, is small enough to be read in a day, and
// no other file opens a secret, but for the few that are named here.
func TestPromiseAuditable(t *testing.T) {
	t.Parallel()
	const maxLines = 9_000
	outside := []string{
		"demo.go",            // the stand-in provider's key, which is none
		"command_restore.go", // a new key, for the operator at the terminal
		"manage_usage.go",    // stored content, shown to administrators
		"store_postgres.go",  // the password of the database, in the build that uses one
		"manage_projects.go", // the form of a new provider key; new credentials, shown once to who creates them
		// the secret of a new webhook, shown once to who creates it
		"manage_notifications.go",
	}
	_, section, _ := strings.Cut(mustReadFile(t, "docs/security-review.md"), "\n## The trust core\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var core []string
	lines := 0
	for _, m := range regexp.MustCompile("`([a-z_]+\\.go)`").FindAllStringSubmatch(section, -1) {
		core = append(core, m[1])
		lines += strings.Count(mustReadFile(t, m[1]), "\n")
	}
	if lines > maxLines || len(core) < 19 {
		t.Errorf("the trust core has %d lines in %d files", lines, len(core))
	}
	for name := range openedSecrets(t, postgresBuild) {
		if slices.Contains(core, name) == slices.Contains(outside, name) {
			t.Errorf("%s opens a secret; it belongs either to the trust core or to the exceptions", name)
		}
	}
}
