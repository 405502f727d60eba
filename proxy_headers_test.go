// These tests are about proxy_headers.go: conditional and partial requests, HEAD, and web pages of other origins.
package main

import (
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// objectScript answers like a server of one object: whole, in part, or not at all if the client has it. It does not
// know HEAD.
func objectScript(body string) func(*providerConn, recordedRequest) bool {
	return func(c *providerConn, r recordedRequest) bool {
		status, part, lines := 200, body, []string{`ETag: "v1"`, "Last-Modified: Sat, 29 Nov 2026 00:00:00 GMT",
			"Accept-Ranges: bytes"}
		switch {
		case r.header.Get("If-None-Match") == `"v1"`:
			status, part = 304, ""
		case r.header.Get("Range") == "bytes=4-":
			status, part, lines = 206, body[4:], append(lines, "Content-Range: bytes 4-9/10")
		case r.header.Get("Range") != "":
			status, part, lines = 416, "", append(lines, "Content-Range: bytes */10")
		}
		if r.method == "HEAD" {
			return c.reply(405, "")
		}
		return c.reply(status, part, lines...)
	}
}

// TestConditionalRequests: a client can fetch the rest of a file, and learn that its copy is still valid. A POST and
// an answer that the proxy puts together have no conditions, and a 304 that nobody asked for is no answer.
func TestConditionalRequests(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	p.provider.setScript(objectScript("0123456789"))
	auth := []string{"Authorization", "Bearer " + p.token}
	contents := []string{"/v1/files/f/content", "/v1/containers/c/files/f/content", "/v1/skills/s/content",
		"/v1/skills/s/versions/1/content", "/v1/videos/v/content", "/v1/vector_stores/v/files/f/content",
		"/v1/models/gpt-4o"}
	for _, path := range contents {
		for _, c := range []struct {
			name, value, body string
			status            int
			rangeOf           string
		}{
			{"Range", "bytes=4-", "456789", 206, "bytes 4-9/10"},
			{"Range", "bytes=20-", "", 416, "bytes */10"},
			{"If-None-Match", `"v1"`, "", 304, ""},
			{"If-None-Match", `"v0"`, "0123456789", 200, ""},
			{"If-Match", `"v1"`, "0123456789", 200, ""},
		} {
			a := p.do("GET", path, "", append(auth, c.name, c.value)...)
			if a.status != c.status || a.body != c.body || a.header.Get("Content-Range") != c.rangeOf ||
				a.header.Get("Etag") != `"v1"` || a.header.Get("Accept-Ranges") != "bytes" ||
				a.header.Get("Last-Modified") == "" || p.provider.lastRequest(t).header.Get(c.name) != c.value {
				t.Errorf("%s with %s: %s: got %d %q %v", path, c.name, c.value, a.status, a.body, a.header)
			}
		}
	}
	conditions := []string{"Range", "bytes=4-", "If-None-Match", `"v1"`, "If-Modified-Since", "x", "If-Range", "x"}
	for _, c := range []struct {
		method, path, body string
		want               []string // conditions that go up
	}{
		{"GET", "/v1/files", "", []string{"If-None-Match", "If-Modified-Since"}},
		{"GET", "/v1/responses/r", "", []string{"If-None-Match", "If-Modified-Since"}},
		{"GET", "/v1/models", "", []string{"If-None-Match", "If-Modified-Since"}},
		{"DELETE", "/v1/files/f", "", nil},
		{"POST", "/v1/chat/completions", chatBody(), nil},
	} {
		p.do(c.method, c.path, c.body, append(append(auth, conditions...), "Content-Type", "application/json")...)
		up := p.provider.lastRequest(t).header
		for i := 0; i < len(conditions); i += 2 {
			if name := conditions[i]; (up[name] != nil) != slices.Contains(c.want, name) {
				t.Errorf("%s %s: the provider got %s: %v", c.method, c.path, name, up[name])
			}
		}
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(304, "") })
	for _, path := range contents {
		if a := p.do("GET", path, "", auth...); a.status != 502 || a.errorCode() != "upstream_protocol_error" {
			t.Errorf("%s: a 304 for no condition: got %d %s", path, a.status, a.body)
		}
	}
	for _, row := range p.ledger() {
		if row.Status < 400 && row.Outcome != "ok" {
			t.Errorf("%s: %d is recorded as %s %s", row.Endpoint, row.Status, row.Outcome, row.ErrorCode)
		}
	}
}

// TestRewrittenListHasNoConditions: the provider's ETag says nothing about a list that a policy cuts down or that has
// models of two providers, so neither conditions nor validators pass, and a HEAD describes the list a GET would bring.
func TestRewrittenListHasNoConditions(t *testing.T) {
	t.Parallel()
	const list = `{"object":"list","data":[{"id":"gpt-4o"},{"id":"o1"}]}`
	script := func(c *providerConn, r recordedRequest) bool {
		if r.header.Get("If-None-Match") != "" || r.header.Get("Range") != "" || r.method != "GET" {
			return c.reply(500, "")
		}
		return c.reply(200, list, `ETag: "v1"`, "Last-Modified: x", "Accept-Ranges: bytes")
	}
	for _, merged := range []bool{false, true} {
		p := newTest(t, nil)
		p.provider.setScript(script)
		want := `{"data":[{"id":"gpt-4o"}],"object":"list"}`
		if merged {
			second, _ := p.addUpstream(`"weight":1`)
			second.setScript(script)
			want = `{"data":[{"id":"gpt-4o"},{"id":"o1"}],"object":"list"}`
		} else {
			p.manage("PATCH", "/manage/tokens/"+p.tokenID, `{"policy":{"models":["gpt-4o"]}}`, 200, nil)
		}
		for _, method := range []string{"GET", "HEAD"} {
			a := p.do(method, "/v1/models", "", "Authorization", "Bearer "+p.token, "If-None-Match", `"v1"`,
				"Range", "bytes=0-3")
			if method == "HEAD" && a.body == "" {
				a.body = want
			}
			if a.status != 200 || a.body != want || a.header["Etag"] != nil || a.header["Last-Modified"] != nil ||
				a.header["Accept-Ranges"] != nil || a.header.Get("Content-Length") != "42" && !merged {
				t.Errorf("merged %v: %s got %d %s %v", merged, method, a.status, a.body, a.header)
			}
		}
	}
}

// TestHead: HEAD is answered wherever GET is, with the same status, type and length and no body, and the connection
// can be used again.
func TestHead(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.addUpstreamAt(p.provider, providerAnthropic, `"weight":1`)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	p.provider.setScript(objectScript(`{"data":[]}`[:10]))
	paths := []string{"/", "/healthz", "/readyz", "/metrics", "/manage/projects", "/manage/tokens/" + p.tokenID,
		"/manage/requests", "/admin/sign-in", ownTokenPath}
	for _, e := range newEndpointTable().all() {
		if e.method == "GET" {
			paths = append(paths, strings.NewReplacer("{", "", "}", "").Replace(e.pattern))
		}
	}
	claude, claudeToken := p.addProject("claude", `"name":"claude"`)
	p.manage("PATCH", "/manage/projects/"+claude, `{"policy":{"stateful":true}}`, 200, nil)
	p.manage("POST", "/manage/projects/"+claude+"/upstreams", `{"name":"a","provider":"anthropic","base_url":"`+
		p.provider.url+`","api_key":"`+p.provider.key+`"}`, 201, nil)
	gemini, geminiToken := p.addProject("gemini", `"name":"gemini"`)
	p.manage("PATCH", "/manage/projects/"+gemini, `{"policy":{"stateful":true}}`, 200, nil)
	p.manage("POST", "/manage/projects/"+gemini+"/upstreams", `{"name":"a","provider":"google","base_url":"`+
		p.provider.url+`","api_key":"`+p.provider.key+`"}`, 201, nil)
	for _, path := range paths {
		credential := p.token
		switch {
		case strings.HasPrefix(path, "/v1beta/"):
			credential = geminiToken
		case !strings.HasPrefix(path, "/v1/"):
			credential = p.adminKey
		case strings.HasPrefix(path, "/v1/messages"):
			credential = claudeToken
		}
		get := p.do("GET", path, "", "Authorization", "Bearer "+credential)
		head := p.do("HEAD", path, "", "Authorization", "Bearer "+credential)
		length := head.header.Get("Content-Length")
		if path == "/metrics" || path == "/manage/requests" { // they change, and their length is not known before
			length = get.header.Get("Content-Length")
		}
		if get.status != 200 || head.status != 200 || head.body != "" || length != get.header.Get("Content-Length") ||
			head.header.Get("Content-Type") != get.header.Get("Content-Type") {
			t.Errorf("%s: GET %d %v, HEAD %d %q %v", path, get.status, get.header, head.status, head.body, head.header)
		}
	}
	once := "HEAD /v1/models/m HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token + "\r\n"
	got := p.sendRaw(once + "\r\n" + once + "Connection: close\r\n\r\n")
	if strings.Count(got, "HTTP/1.1 200 OK\r\n") != 2 {
		t.Errorf("two requests on one connection: %q", got)
	}
	if a := p.do("HEAD", "/v1/models", "", "Authorization", "Bearer x"); a.status != 401 || a.body != "" {
		t.Errorf("with a wrong token: %d %q", a.status, a.body)
	}
	auth := []string{"Authorization", "Bearer " + p.token}
	if a := p.do("HEAD", "/v1/files/f/content", "", append(auth, "Range", "bytes=4-")...); a.status != 200 {
		t.Errorf("a range of a HEAD: %d %v", a.status, a.header)
	}
	if a := p.do("HEAD", "/v1/models/m", "", append(auth, "If-None-Match", `"v1"`)...); a.status != 304 {
		t.Errorf("a condition of a HEAD: %d %v", a.status, a.header)
	}
	ended := make(chan bool, 1)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\nfirst bytes")
		ended <- c.waitClosed(hangTimeout)
		return false
	})
	a := p.do("HEAD", "/v1/files/f/content", "", "Authorization", "Bearer "+p.token)
	if a.status != 200 || a.header.Get("Content-Length") != "1000000000" || !<-ended {
		t.Errorf("a large file: %d %v; its body is read", a.status, a.header)
	}
	for _, row := range p.ledger() {
		if row.Status == 200 && row.Outcome != "ok" {
			t.Errorf("recorded as %+v", row)
		}
	}
	p.provider.setScript(objectScript(`{"data":[]}`[:10]))
	p.manage("PATCH", "/manage/tokens/"+p.tokenID, `{"policy":{"endpoints":["GET /v1/files"]}}`, 200, nil)
	for path, status := range map[string]int{"/v1/files": 200, "/v1/models": 403} {
		if a := p.do("HEAD", path, "", "Authorization", "Bearer "+p.token); a.status != status {
			t.Errorf("a policy for GET: HEAD %s got %d", path, a.status)
		}
	}
}

// TestProviderErrorsKeepHeaders: an error of the provider keeps what SDKs act on and show: the status, the body byte
// for byte, hints about retries, and the provider's request ids.
func TestProviderErrorsKeepHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	kept := []string{"Retry-After: 7", "Retry-After-Ms: 6500", "X-Ms-Retry-After-Ms: 6500", "X-Should-Retry: false",
		"X-Request-Id: req_1", "Request-Id: req_2", "Apim-Request-Id: a", "X-Ms-Request-Id: m",
		"X-Amzn-Requestid: z", "Cf-Ray: 8-FRA", "Mistral-Correlation-Id: c", "Openai-Processing-Ms: 3",
		"Openai-Version: 2020-10-01", "Content-Type: application/problem+json"}
	withheld := []string{"X-Ratelimit-Remaining-Requests: 0", "Anthropic-Ratelimit-Requests-Reset: x",
		"Openai-Organization: o", "Anthropic-Organization-Id: o", "Set-Cookie: a=b", "Www-Authenticate: Bearer",
		"Server: x", "Via: y"}
	const body = "{ \"error\" : {\"message\":\"caf\u00e9 \\u00e9\",\"x\":[1.50]} }\r\n"
	for _, status := range []int{400, 404, 408, 409, 413, 422, 424, 429, 500, 501, 503, 529} {
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			return c.reply(status, body, append(kept, withheld...)...)
		})
		for _, members := range []string{`"stream":false`, `"stream":true`} {
			a := p.chat(members)
			if a.status != status || a.body != body {
				t.Errorf("%d: got %d %q", status, a.status, a.body)
			}
			for _, line := range kept {
				if name, value, _ := strings.Cut(line, ": "); !slices.Equal(a.header[name], []string{value}) {
					t.Errorf("%d: %s is %q", status, name, a.header[name])
				}
			}
			for _, line := range withheld {
				if name, _, _ := strings.Cut(line, ": "); a.header[name] != nil {
					t.Errorf("%d: %s reached the client", status, name)
				}
			}
		}
	}
}

const (
	testOrigin   = "https://chat.example.test"
	askedHeaders = "authorization,content-type,x-stainless-os,x-anything"
)

// preflight asks as a browser does before it sends a page's call.
func (p *testProxy) preflight(path, origin string) testResponse {
	p.t.Helper()
	return p.do("OPTIONS", path, "", "Origin", origin, "Access-Control-Request-Method", "POST",
		"Access-Control-Request-Headers", askedHeaders)
}

// TestCrossOriginPages: with CORS_ORIGINS, pages of exactly the listed origins may call /v1 and read every answer.
func TestCrossOriginPages(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"CORS_ORIGINS": testOrigin + ", http://localhost:5173,app://notes.test"})
	for _, origin := range []string{testOrigin, "http://localhost:5173", "app://notes.test"} {
		for _, path := range []string{"/v1/chat/completions", ownTokenPath, "/v1/models/a%20b", "/v1/no/such"} {
			a := p.preflight(path, origin)
			if a.status != 204 || a.body != "" || a.header.Get("Access-Control-Allow-Origin") != origin ||
				a.header.Get("Access-Control-Allow-Methods") != "GET, HEAD, POST, DELETE" ||
				a.header.Get("Access-Control-Allow-Headers") != askedHeaders ||
				a.header.Get("Access-Control-Max-Age") != preflightSeconds || a.header.Get("Vary") != "Origin" {
				t.Errorf("%s %s: got %d %s %v", origin, path, a.status, a.body, a.header)
			}
		}
	}
	for _, origin := range []string{"https://evil.example", "null", testOrigin + ":8443",
		testOrigin + ".evil.example", "http://chat.example.test", strings.ToUpper(testOrigin), testOrigin + "/",
		testOrigin + ", https://evil.example"} {
		a := p.preflight("/v1/chat/completions", origin)
		if a.status != 403 || a.errorCode() != "origin_not_allowed" || a.header.Get("Vary") != "Origin" {
			t.Errorf("%s: got %d %s %v", origin, a.status, a.body, a.header)
		}
		p.expectNoCrossOrigin(origin, a)
		p.expectNoCrossOrigin(origin, p.do("GET", ownTokenPath, "", "Authorization", "Bearer "+p.token,
			"Origin", origin))
	}
	a := p.do("OPTIONS", "/v1/chat/completions", "", "Origin", testOrigin, "Access-Control-Request-Method", "POST",
		"Access-Control-Request-Headers", "x-a\tb\"<")
	if a.status != 204 || a.header["Access-Control-Allow-Headers"] != nil {
		t.Errorf("no names of headers: got %d %v", a.status, a.header)
	}
	if n := len(p.provider.received()); n > 0 {
		t.Errorf("the provider got %d preflights", n)
	}
}

// TestExposedHeaders: a page may read every header that the allow-list for answers names.
func TestExposedHeaders(t *testing.T) {
	t.Parallel()
	readable := strings.Split(strings.ToLower(exposedHeaders), ", ")
	readable = append(readable, "content-type", "content-length", "last-modified", // browsers show these
		"content-encoding") // browsers decode it
	n := 0
	names := regexp.MustCompile(`"([A-Z][A-Za-z-]*[a-z])"`)
	for _, m := range names.FindAllStringSubmatch(mustReadFile(t, "proxy_headers.go"), -1) {
		if !allowResponseHeader(m[1]) {
			continue
		}
		if n++; !slices.Contains(readable, strings.ToLower(m[1])) {
			t.Errorf("a page may not read %s", m[1])
		}
	}
	if n < 15 {
		t.Errorf("only %d names were found", n)
	}
}

// TestCrossOriginAnswers: calls from a page get the headers on every answer, the provider's and the proxy's own, in
// one piece and streamed. No other surface has them, and credentials of the browser are never allowed.
func TestCrossOriginAnswers(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"CORS_ORIGINS": testOrigin})
	auth := []string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json", "Origin", testOrigin}
	bad := append([]string{"Authorization", "Bearer x"}, auth[2:]...)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.Contains(r.body, `"fail"`) {
			return c.reply(429, `{}`, "Vary: Cookie", "Access-Control-Allow-Origin: *",
				"Access-Control-Allow-Credentials: true")
		}
		return chatScript(c, r)
	})
	for what, a := range map[string]testResponse{
		"unary":          p.do("POST", "/v1/chat/completions", chatBody(), auth...),
		"stream":         p.do("POST", "/v1/chat/completions", chatBody(`"stream":true`), auth...),
		"provider error": p.do("POST", "/v1/chat/completions", chatBody(`"x":"fail"`), auth...),
		"bad token":      p.do("POST", "/v1/chat/completions", chatBody(), bad...),
		"bad body":       p.do("POST", "/v1/chat/completions", "{", auth...),
		"no endpoint":    p.do("POST", "/v1/nothing", "", auth...),
		"own token":      p.do("GET", ownTokenPath, "", auth...),
		"wrong method":   p.do("PUT", ownTokenPath, "", auth...),
	} {
		exposed := a.header.Get("Access-Control-Expose-Headers")
		if allowed := a.header["Access-Control-Allow-Origin"]; !slices.Equal(allowed, []string{testOrigin}) ||
			a.header.Get("Vary") != "Origin" || a.header["Access-Control-Allow-Credentials"] != nil {
			t.Errorf("%s: got %d %v", what, a.status, a.header)
		}
		for _, name := range []string{"X-LLM-Proxy-Request-ID", "X-Request-ID", "Retry-After", "X-Should-Retry"} {
			if !slices.Contains(strings.Split(exposed, ", "), name) {
				t.Errorf("%s: a page may not read %s", what, name)
			}
		}
	}
	if h := p.provider.lastRequest(t).header; h["Origin"] != nil {
		t.Errorf("the provider got %v", h)
	}
	for _, path := range []string{"/", "/healthz", "/manage/projects", "/admin/", "/metrics", "/chat/completions",
		"/v1"} {
		p.expectNoCrossOrigin(path, p.do("GET", path, "", "Authorization", "Bearer "+p.adminKey, "Origin", testOrigin))
		if a := p.preflight(path, testOrigin); a.status < 400 {
			t.Errorf("%s: a preflight got %d", path, a.status)
		} else {
			p.expectNoCrossOrigin(path, a)
		}
	}
}

// TestCrossOriginOff: without CORS_ORIGINS nothing is added, and a preflight is a request without a token.
func TestCrossOriginOff(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if a := p.preflight("/v1/chat/completions", testOrigin); a.status != 401 {
		t.Errorf("a preflight got %d", a.status)
	} else {
		p.expectNoCrossOrigin("preflight", a)
	}
	a := p.do("GET", ownTokenPath, "", "Authorization", "Bearer "+p.token, "Origin", testOrigin)
	p.expectNoCrossOrigin("call", a)
	if a.header["Vary"] != nil {
		t.Errorf("got %v", a.header)
	}
}

// expectNoCrossOrigin checks that no page may read an answer.
func (p *testProxy) expectNoCrossOrigin(what string, a testResponse) {
	p.t.Helper()
	for name := range a.header {
		if strings.HasPrefix(name, "Access-Control-") {
			p.t.Errorf("%s: got %d with %s", what, a.status, name)
		}
	}
	if a.err != nil || a.status == http.StatusNoContent {
		p.t.Errorf("%s: got %d, %v", what, a.status, a.err)
	}
}
