// Requests that two HTTP parsers could read in two ways. The provider must see
// none of them, or exactly the one that the proxy checked: raw bytes in, and a
// look at what came out on the other side.
package main

import (
	"fmt"
	"strings"
	"testing"
)

// smuggled is a second request that hides in what the first one's body may be.
func (p *testProxy) smuggled() string {
	return "GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token + "\r\n\r\n"
}

// head is a chat call's head without its framing.
func (p *testProxy) head(version, lines string) string {
	return "POST /v1/chat/completions HTTP/" + version + "\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer " + p.token + "\r\nContent-Type: application/json\r\n" + lines + "\r\n"
}

// TestAmbiguousFraming: refused, and the connection closed, so that nothing
// after it is taken for a request.
func TestAmbiguousFraming(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	body := chatBody()
	length := fmt.Sprintf("Content-Length: %d\r\n", len(body))
	chunked := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body)
	for _, c := range []struct{ name, request string }{
		{"two lengths", p.head("1.1", length+"Content-Length: 2\r\n") + body},
		{"a list of lengths", p.head("1.1", fmt.Sprintf("Content-Length: %d, 2\r\n", len(body))) + body},
		{"signed length", p.head("1.1", fmt.Sprintf("Content-Length: +%d\r\n", len(body))) + body},
		{"negative length", p.head("1.1", "Content-Length: -1\r\n") + body},
		{"hexadecimal length", p.head("1.1", "Content-Length: 0x10\r\n") + body},
		{"no number", p.head("1.1", "Content-Length: \r\n") + body},
		{"huge length", p.head("1.1", "Content-Length: 99999999999999999999\r\n") + body},
		{"unknown coding", p.head("1.1", "Transfer-Encoding: xchunked\r\n") + chunked},
		{"chunked and identity", p.head("1.1", "Transfer-Encoding: chunked, identity\r\n") + chunked},
		{"identity", p.head("1.1", "Transfer-Encoding: identity\r\n"+length) + body},
		{"gzip, chunked", p.head("1.1", "Transfer-Encoding: gzip, chunked\r\n") + chunked},
		{"chunked twice", p.head("1.1", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n") + chunked},
		{"blank before the colon", p.head("1.1", "Transfer-Encoding : chunked\r\n"+length) + chunked},
		{"vertical tab", p.head("1.1", "Transfer-Encoding: \x0bchunked\r\n"+length) + chunked},
		{"no chunk size", p.head("1.1", "Transfer-Encoding: chunked\r\n") + "\r\n" + body},
		{"chunk size with a sign", p.head("1.1", "Transfer-Encoding: chunked\r\n") + "+" + chunked},
		{"huge chunk size", p.head("1.1", "Transfer-Encoding: chunked\r\n") + "fffffffffffffffff\r\n" + body},
		{"chunk without its end", p.head("1.1", "Transfer-Encoding: chunked\r\n") + fmt.Sprintf("%x\r\n%sXX0\r\n\r\n", len(body), body)},
		{"chunk extension without end", p.head("1.1", "Transfer-Encoding: chunked\r\n") + "2;" + strings.Repeat("a", 1<<20)},
		{"bare CR in a chunk line", p.head("1.1", "Transfer-Encoding: chunked\r\n") + fmt.Sprintf("%x\r%s", len(body), body)},
		{"HTTP/0.9", "GET /v1/models\r\n\r\n"},
		{"HTTP/2.0", p.head("2.0", length) + body},
		{"HTTP/1.2.3", p.head("1.2.3", length) + body},
		{"tab in the request line", strings.Replace(p.head("1.1", length), "POST /", "POST\t/", 1) + body},
		{"two Hosts", p.head("1.1", "Host: y\r\n"+length) + body},
		{"no Host", strings.Replace(p.head("1.1", length), "Host: x\r\n", "", 1) + body},
		{"bad Host", strings.Replace(p.head("1.1", length), "Host: x", "Host: x/y@z", 1) + body},
		{"method with a line end", "PO\r\nST /v1/chat/completions HTTP/1.1\r\n\r\n"},
		{"empty method", " /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"blank in the target", "GET /v1/models x HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"control in the target", "GET /v1/mod\x01els HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"bad escape in the target", "GET /v1/models/%zz HTTP/1.1\r\nHost: x\r\n\r\n"},
	} {
		got := p.raw(c.request + p.smuggled())
		status, _, _ := strings.Cut(strings.TrimPrefix(got, "HTTP/1.1 "), "\r\n")
		if got != "" && !strings.HasPrefix(status, "400 ") && !strings.HasPrefix(status, "501 ") && !strings.HasPrefix(status, "505 ") {
			t.Errorf("%s: got %q", c.name, got)
		}
		if strings.Count(got, "HTTP/1.1 ") > 1 {
			t.Errorf("%s: two answers: %q", c.name, got)
		}
		if n := len(p.provider.got()); n > 0 {
			t.Fatalf("%s: the provider got %d requests: %q", c.name, n, p.provider.last(t).body)
		}
	}
}

// TestOddFraming: what is odd but has one meaning is passed on in its plainest
// form, as one request.
func TestOddFraming(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	body := chatBody()
	length := fmt.Sprintf("Content-Length: %d\r\n", len(body))
	half := len(body) / 2
	chunked := fmt.Sprintf("%x;ext=\"1\"\r\n%s\r\n%X\r\n%s\r\n0\r\nX-Trailer: GET /x HTTP/1.1\r\nAuthorization: Bearer x\r\n\r\n", half, body[:half], len(body)-half, body[half:])
	for _, c := range []struct{ name, request string }{
		{"the same length twice", p.head("1.1", length+length) + body},
		{"chunks, extensions, trailers", p.head("1.1", "Transfer-Encoding: Chunked\r\nTrailer: X-Trailer\r\n") + chunked},
		{"both framings", p.head("1.1", "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n") + chunked},
		{"folded header", p.head("1.1", "Accept: a\r\n\tb\r\n"+length) + body},
		{"HTTP/1.0", p.head("1.0", length) + body},
		{"bare line feeds", strings.ReplaceAll(p.head("1.1", length), "\r\n", "\n") + body},
	} {
		before := len(p.provider.got())
		got := p.raw(c.request + p.smuggled())
		reqs := p.provider.got()
		refused := strings.HasPrefix(got, "HTTP/1.1 400 ")
		if !refused && !strings.HasPrefix(got, "HTTP/1.1 200 ") && !strings.HasPrefix(got, "HTTP/1.0 200 ") || strings.Count(got, "\r\nX-Llm-Proxy-Request-Id:") > 1 {
			t.Errorf("%s: got %q", c.name, got)
		}
		if refused && len(reqs) == before {
			continue
		}
		if r := reqs[len(reqs)-1]; len(reqs) != before+1 || r.body != body || r.header.Get("Content-Length") != fmt.Sprint(len(body)) || r.header["Transfer-Encoding"] != nil ||
			r.header["X-Trailer"] != nil || r.header["Trailer"] != nil || r.header.Get("Authorization") != "Bearer "+p.provider.key {
			t.Errorf("%s: the provider got %d requests, last %s", c.name, len(reqs)-before, strings.ReplaceAll(r.head, p.provider.key, "KEY"))
		}
	}
}

// TestUnreadBodyIsNoRequest: the body of a refused call is not taken for the
// next request on the same connection.
func TestUnreadBodyIsNoRequest(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	inner := p.smuggled()
	for _, head := range []string{
		"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n", // refused before the body
		"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token + "\r\n",
		"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token + "\r\n",
		"GET /healthz HTTP/1.1\r\nHost: x\r\n",
		"POST /manage/projects HTTP/1.1\r\nHost: x\r\n",
	} {
		got := p.raw(head + fmt.Sprintf("Content-Length: %d\r\n\r\n%sGET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", len(inner), inner))
		if n := strings.Count(got, "HTTP/1.1 "); n > 2 || len(p.provider.got()) > 0 {
			t.Errorf("%q: %d answers, %d requests: %q", head[:20], n, len(p.provider.got()), got)
		}
	}
}

// TestNoContinueForStrangers: who has no valid token is not asked for the body.
func TestNoContinueForStrangers(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, auth := range []string{"Bearer wrong", "Bearer " + p.mint(tokenPrefix)} {
		got := p.raw("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: " + auth + "\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 104857600\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 401 ") || strings.Contains(got, "100 Continue") || !strings.Contains(got, "\r\nConnection: close\r\n") {
			t.Errorf("got %q", got)
		}
	}
	got := p.raw(p.rawChat("Expect: 100-continue\r\nConnection: close\r\n", chatBody()))
	if !strings.Contains(got, "HTTP/1.1 200 OK") || p.provider.last(t).header["Expect"] != nil {
		t.Errorf("with a token: got %q", got)
	}
	if got := p.raw(p.rawChat("Expect: the-unexpected\r\nConnection: close\r\n", chatBody())); !strings.HasPrefix(got, "HTTP/1.1 417 ") {
		t.Errorf("got %q", got)
	}
}

// TestHostIsNoRoute: the Host header and a full URL as target choose nothing;
// /manage answers to its own names only.
func TestHostIsNoRoute(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	other := newFakeProvider(t)
	auth := "\r\nAuthorization: Bearer " + p.token + "\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: " + fmt.Sprint(len(chatBody())) + "\r\n\r\n" + chatBody()
	evil := strings.TrimPrefix(other.url, "http://")
	for i, start := range []string{
		"POST /v1/chat/completions HTTP/1.1\r\nHost: " + evil,
		"POST http://" + evil + "/v1/chat/completions HTTP/1.1\r\nHost: x",
		"POST http://user:pw@" + evil + "/v1/chat/completions HTTP/1.1\r\nHost: " + evil,
		"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Forwarded-Host: " + evil + "\r\nX-Original-URL: " + other.url,
	} {
		if got := p.raw(start + auth); !strings.HasPrefix(got, "HTTP/1.1 200 ") || len(p.provider.got()) != i+1 {
			t.Errorf("%q: got %q", start, got)
		}
		if h := p.provider.last(t).header.Get("Host"); h != strings.TrimPrefix(p.provider.url, "http://") {
			t.Errorf("%q: the provider got Host: %s", start, h)
		}
	}
	if len(other.got()) > 0 {
		t.Error("another host was called")
	}
	for host, want := range map[string]int{
		"evil.example": 421, "evil.example:80": 421, "127.0.0.1.evil.example": 421, "evil.example.": 421, "localhost.": 421,
		"localhost": 200, "localhost:1": 200, "127.0.0.1": 200, "[::1]:8080": 200, "llm-proxy": 200,
	} {
		got := p.raw("GET /manage/projects HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\nAuthorization: Bearer " + p.adminKey + "\r\n\r\n")
		if !strings.HasPrefix(got, fmt.Sprintf("HTTP/1.1 %d ", want)) {
			t.Errorf("/manage as %s: got %.60q, want %d", host, got, want)
		}
	}
	if got := p.raw("GET http://evil.example/manage/projects HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer " + p.adminKey + "\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 421 ") {
		t.Errorf("/manage by a full URL: got %.60q", got)
	}
}

// TestMethods: a method that an endpoint does not have goes nowhere.
func TestMethods(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, method := range []string{"GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "FOO", "post", "Post", "PRI", "COPY"} {
		a := p.do(method, "/v1/embeddings", "", "Authorization", "Bearer "+p.token)
		if a.status != 405 || a.header.Get("Allow") != "POST" || method != "HEAD" && a.code() != "method_not_allowed" {
			t.Errorf("%s: got %d %s %v", method, a.status, a.body, a.err)
		}
	}
	for _, line := range []string{"CONNECT evil.example:443", "CONNECT /v1/models", "OPTIONS *", "GET *", "TRACE /", "DELETE /healthz", "POST /", "CONNECT /manage/projects"} {
		got := p.raw(line + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer " + p.token + "\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 4") || !strings.Contains(got, "nosniff") && !strings.HasPrefix(got, "HTTP/1.1 400 ") {
			t.Errorf("%s: got %q", line, got)
		}
	}
	if n := len(p.provider.got()); n > 0 {
		t.Errorf("the provider got %d requests", n)
	}
}

// TestNothingReflected: line ends that a client sends in escapes come back in
// no header.
func TestNothingReflected(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	auth := []string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json"}
	for _, c := range [][3]string{
		{"POST", "/v1/chat/completions", `{"model":"a\r\nX-Canary: 1","messages":[]}`},
		{"GET", "/v1/models/a%0d%0aX-Canary:%201", ""},
		{"GET", "/v1/models?limit=%0d%0aX-Canary:%201", ""},
		{"GET", "/v1/models?%0d%0aX-Canary:%201=1", ""},
		{"GET", "/v1/files/a%0d%0aX-Canary", ""},
		{"GET", "/%0d%0aX-Canary:1", ""},
		{"GET", "/manage/tokens?%0d%0aX-Canary:1=1", ""},
	} {
		a := p.do(c[0], c[1], c[2], auth...)
		if a.status < 400 || a.header.Get("X-Canary") != "" || strings.ContainsAny(a.body, "\r") {
			t.Errorf("%s: %d %v %s", c[1], a.status, a.header, a.body)
		}
	}
	if n := len(p.provider.got()); n > 0 {
		t.Errorf("the provider got %d requests", n)
	}
}
