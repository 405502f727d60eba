// These tests hold what passes between client and provider: headers both ways, streams, and the mask for keys. (The
// request headers that do pass: TestCalls, FuzzUpHeader.)
package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestConnectionHeader: a header named in Connection loses the client's value, but not the key or the type that the
// proxy sends.
func TestConnectionHeader(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, lines := range []string{
		"Connection: authorization\r\n",
		"Connection: Authorization, close\r\n",
		"Connection: \r\nConnection: AUTHORIZATION\r\nConnection: content-type\r\n",
		"connection:\tauthorization\t,\tContent-Type\r\n",
		"Connection: authorization,content-type,content-length,host,transfer-encoding\r\n",
		"Connection: close, openai-beta, user-agent, x-api-key\r\n",
		"Connection: keep-alive\r\nKeep-Alive: timeout=1\r\nProxy-Connection: authorization\r\n",
	} {
		before := len(p.provider.received())
		got := p.sendRaw(p.rawChatRequest(lines+"User-Agent: sdk\r\nOpenAI-Beta: b\r\nConnection: close\r\n",
			chatBody()))
		if !strings.HasPrefix(got, "HTTP/1.1 200 ") {
			t.Errorf("%q: got %q", lines, got)
			continue
		}
		r := p.provider.lastRequest(t)
		if len(p.provider.received()) != before+1 || r.header.Get("Authorization") != "Bearer "+p.provider.key ||
			r.header.Get("Content-Type") != "application/json" || r.body != chatBody() {
			t.Errorf("%q: the provider got %s", lines, strings.ReplaceAll(r.head, p.provider.key, "KEY"))
		}
		removed := strings.Contains(lines, "openai-beta")
		if (r.header.Get("Openai-Beta") == "") != removed || (r.header.Get("User-Agent") == "") != removed ||
			r.header.Get("Connection") != "" {
			t.Errorf("%q: the provider got %v", lines, r.header["Connection"])
		}
	}
}

// TestDeniedHeaders: none of these headers reaches the provider with the client's value.
func TestDeniedHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	var lines strings.Builder
	for _, name := range []string{"Cookie", "OpenAI-Organization", "openai-project", "Forwarded", "X-Forwarded-For",
		"X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Prefix", "X-Real-IP", "CF-Connecting-IP",
		"True-Client-IP", "X-Original-URL", "X-Rewrite-URL", "X-HTTP-Method-Override",
		"X-Method-Override", "Proxy-Authorization", "Proxy-Authenticate", "Via", "Trailer",
		"TE", "Range", "If-Range", "If-Match", "If-None-Match", "If-Modified-Since", "Accept-Encoding",
		"Accept-Language", "Origin", "Referer", "Cache-Control", "Pragma", "Max-Forwards", "Content-Language",
		"Content-Location", "Content-MD5", "Content-Range", "X-Request-Id", "Request-Id", "X-Goog-User-Project",
		"Authorization_", "X_Api_Key", "OpenAI_Beta", "X-Amz-Security-Token", "X-Openai-Organization", "Http2-Settings",
		"Keep-Alive", "Sec-Websocket-Key", "X-Llm-Proxy-Request-Id", "Api_Key", "Host_"} {
		lines.WriteString(name + ": denied-value\r\n")
	}
	got := p.sendRaw(p.rawChatRequest(lines.String()+"Connection: close\r\n", chatBody()))
	if !strings.HasPrefix(got, "HTTP/1.1 200 ") {
		t.Fatalf("got %q", got)
	}
	var names []string
	for name := range p.provider.lastRequest(t).header {
		names = append(names, name)
	}
	slices.Sort(names)
	if want := []string{"Authorization", "Content-Length", "Content-Type", "Host"}; !slices.Equal(names, want) {
		t.Errorf("the provider got the headers %v, want %v", names, want)
	}
	if h := p.provider.lastRequest(t).head; strings.Contains(h, "denied") {
		t.Errorf("the provider got %s", strings.ReplaceAll(h, p.provider.key, "KEY"))
	}
}

// TestAccountHeadersAreTheUpstreams: only the project's administrator decides which organisation pays.
func TestAccountHeadersAreTheUpstreams(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.changeUpstream(p.upstream, `"organization":"org-ours","openai_project":"proj-ours"`)
	p.chatWithHeaders("Authorization", "Bearer "+p.token,
		"OpenAI-Organization", "org-theirs", "OpenAI-Project", "proj-theirs")
	if h := p.provider.lastRequest(t).header; strings.Join(h["Openai-Organization"], ",") != "org-ours" ||
		strings.Join(h["Openai-Project"], ",") != "proj-ours" {
		t.Errorf("the provider got %v %v", h["Openai-Organization"], h["Openai-Project"])
	}
}

// TestMalformedHeaders: malformed headers are refused before anything reads them.
func TestMalformedHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, line := range []string{
		"X Y: 1\r\n", ": empty\r\n", "no colon\r\n", "Bäd: 1\r\n", "X-A : 1\r\n", "X-A: a\x00b\r\n", "X-A: a\x7fb\r\n",
		"X-A: a\rb\r\n", "Host: y\r\n", "Content-Type: text/plain\r\n", "Content-Type: application/json\r\n",
		"content-encoding: identity\r\nContent-Encoding: gzip\r\n",
	} {
		got := p.sendRaw(p.rawChatRequest(line+"Connection: close\r\n", chatBody()))
		if !strings.HasPrefix(got, "HTTP/1.1 400 ") {
			t.Errorf("%q: got %.200q", line, got)
		}
	}
	if n := len(p.provider.received()); n > 0 {
		t.Errorf("the provider got %d requests", n)
	}
	for _, size := range []string{"X-A: " + strings.Repeat("a", 70<<10) + "\r\n", strings.Repeat("X-A: 1\r\n", 10_000),
		"Cookie: " + strings.Repeat("a=b; ", 14_000) + "\r\n"} {
		if got := p.sendRaw(p.rawChatRequest(size, chatBody())); got != "" && !strings.HasPrefix(got, "HTTP/1.1 431 ") {
			t.Errorf("%d bytes of headers: got %.200q", len(size), got)
		}
	}
}

// TestNoUpgrade: requests for a WebSocket are refused, other offers to switch protocols are ignored, and a provider
// that switches unasked gets no tunnel.
func TestNoUpgrade(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	key := "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
	for _, lines := range []string{
		"Connection: Upgrade\r\nUpgrade: websocket\r\n" + key, "Upgrade: WebSocket/13\r\n",
		"Upgrade: h2c\r\nUpgrade: x/1, \t websocket\r\nConnection: Upgrade\r\n",
	} {
		next := "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
		got := p.sendRaw(p.rawChatRequest(lines, chatBody()) + next)
		if !strings.HasPrefix(got, "HTTP/1.1 426 ") || !strings.Contains(got, "upgrade_not_supported") ||
			!strings.Contains(got, "\r\nUpgrade: HTTP/1.1\r\n") {
			t.Errorf("%q: got %q", lines, got)
		}
	}
	if n := len(p.provider.received()); n > 0 {
		t.Fatalf("the provider got %d requests", n)
	}
	for i, lines := range []string{
		"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
		"Upgrade: anything\r\n", "Connection: upgrade\r\nupgrade: \t x\r\n", "Upgrade: TLS/1.2, HTTP/2.0\r\n",
		"Upgrade: \r\nUpgrade: h2c\r\nConnection: Upgrade\r\n", "Upgrade: notwebsocket\r\n",
	} {
		tunnel := "GET /tunnel HTTP/1.1\r\nHost: x\r\n\r\n"
		got := p.sendRaw(p.rawChatRequest(lines+"Connection: close\r\n", chatBody()) + tunnel)
		if !strings.HasPrefix(got, "HTTP/1.1 200 ") || strings.Count(got, "HTTP/1.1 ") != 1 ||
			strings.Contains(got, "\r\nUpgrade:") {
			t.Errorf("%q: got %q", lines, got)
		}
		if all := p.provider.received(); len(all) != i+1 || strings.Contains(strings.ToLower(all[i].head), "upgrade") ||
			all[i].header["Http2-Settings"] != nil {
			t.Errorf("%q: the provider got %+v", lines, all)
		}
	}
	preface := "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	if got := p.sendRaw(preface); !strings.HasPrefix(got, "HTTP/1.1 ") {
		t.Errorf("HTTP/2 without TLS: got %q", got)
	}
	for _, head := range []string{
		"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\n\r\n", "HTTP/1.1 101 X\r\nUpgrade: h2c\r\n\r\n",
	} {
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			_, _ = io.WriteString(c, head+"bytes of a tunnel")
			return !c.waitClosed(0)
		})
		got := p.sendRaw(p.rawChatRequest("Connection: close\r\n", chatBody()) + "more bytes")
		if !strings.HasPrefix(got, "HTTP/1.1 502 ") || strings.Contains(got, "tunnel") ||
			strings.Contains(got, "101 ") {
			t.Errorf("%q: got %q", head, got)
		}
	}
}

// TestEarlyHints: no 1xx of a provider reaches the client, nor do its headers, and the final answer has all headers
// that the proxy adds.
func TestEarlyHints(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		for range 3 {
			_, _ = io.WriteString(c,
				"HTTP/1.1 103 Early Hints\r\nSet-Cookie: canary=1\r\nOpenAI-Organization: canary\r\n"+
					"X-Canary: 1\r\nOpenAI-Canary: 1\r\nX-Request-Id: canary\r\n\r\n")
		}
		_, _ = io.WriteString(c, "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
		return c.reply(200, chatResponseBody)
	})
	got := p.sendRaw(p.rawChatRequest("Connection: close\r\n", chatBody()))
	if !strings.HasPrefix(got, "HTTP/1.1 200 ") || strings.Count(got, "HTTP/1.1 ") != 1 ||
		strings.Contains(strings.ToLower(got), "canary") {
		t.Errorf("got %q", got)
	}
	for _, want := range []string{"\r\nX-Request-Id: req_", "\r\nX-Llm-Proxy-Request-Id: req_",
		"\r\nX-Content-Type-Options: nosniff\r\n", "\r\nCache-Control: no-store\r\n",
		"\r\nContent-Type: application/json\r\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in %q", want, got)
		}
	}
	if row := p.lastCall(); row.Status != 200 || row.Outcome != "ok" {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestNoTrailers: no trailer reaches the client, announced or not, streamed or not.
func TestNoTrailers(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, announce := range []string{"", "Trailer: X-Canary, Set-Cookie\r\n", "Trailer: OpenAI-Canary\r\n"} {
		for _, kind := range []string{"text/event-stream", "application/json"} {
			p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
				_, err := fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%sTransfer-Encoding: chunked\r\n\r\n"+
					"2\r\n{}\r\n0\r\nX-Canary: 1\r\nSet-Cookie: canary=1\r\nOpenAI-Canary: canary\r\n\r\n",
					kind, announce)
				return err == nil
			})
			got := p.sendRaw(p.rawChatRequest("TE: trailers\r\nConnection: close\r\n", chatBody()))
			if !strings.HasPrefix(got, "HTTP/1.1 200 ") || strings.Contains(strings.ToLower(got), "canary") ||
				!strings.Contains(got, "{}") {
				t.Errorf("%q %s: got %q", announce, kind, got)
			}
		}
	}
}

// TestResponseHeaders: only listed headers reach the client, and no type is added if the provider sends none.
func TestResponseHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(200, "<html><script>", "content-type: application/json", "Set-Cookie: a=b", "Server: x",
			"Via: x", "OpenAI-Organization: o", "openai-project: p",
			"Anthropic-Organization-Id: o", "Alt-Svc: h3=\":443\"", "Strict-Transport-Security: max-age=1",
			"Access-Control-Allow-Origin: *", "Clear-Site-Data: *", "Location: http://evil/", "WWW-Authenticate: Basic",
			"Content-Security-Policy: x", "Refresh: 0;url=http://evil/", "Link: <x>", "X-Accel-Redirect: /etc",
			"X-Sendfile: /etc", "X-Content-Type-Options: off", "Cache-Control: public", "X-Llm-Proxy-Request-Id: mine",
			"Connection: X-Ratelimit-Hidden", "X-Ratelimit-Hidden: 1", "X-Ratelimit-Remaining-Requests: 7",
			"openai-processing-ms: 12", "OpenAI-Version: 1", "retry-after-ms: 5", "Retry-After: 1",
			"X-Should-Retry: false", "X-Request-Id: theirs", "Request-Id: anth", "anthropic-ratelimit-tokens-limit: 3",
			"anthropic-ratelimit-unified-status: x", "anthropic-priority-input-tokens-remaining: 3",
			"anthropic-fast-output-tokens-reset: x", "Anthropic-Workspace-Id: w", "OpenAI-Limit: 1")
	})
	a := p.chat()
	var names []string
	for name := range a.header {
		names = append(names, name)
	}
	slices.Sort(names)
	want := []string{"Cache-Control", "Content-Length", "Content-Type", "Date",
		"Openai-Processing-Ms", "Openai-Version", "Request-Id", "Retry-After", "Retry-After-Ms",
		"X-Content-Type-Options", "X-Llm-Proxy-Request-Id", "X-Request-Id", "X-Should-Retry"}
	if !slices.Equal(names, want) {
		t.Errorf("the client got the headers %v, want %v", names, want)
	}
	if a.header.Get("X-Request-Id") != "theirs" || a.header.Get("X-Llm-Proxy-Request-Id") == "mine" ||
		a.header.Get("Cache-Control") != "no-store" || a.header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("got %v", a.header)
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		_, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n<html><script>")
		return err == nil
	})
	if a := p.chat(); a.body != "<html><script>" || a.header["Content-Type"] != nil {
		t.Errorf("without a type: %q %v", a.body, a.header)
	}
}

// TestNoRedirect: a redirect is neither followed nor passed to the client, whose SDK would follow it with the token.
func TestNoRedirect(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	evil, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer evil.Close()
	var visits atomic.Int64
	go func() {
		for {
			c, err := evil.Accept()
			if err != nil {
				return
			}
			visits.Add(1)
			c.Close()
		}
	}()
	for _, status := range []int{300, 301, 302, 303, 304, 307, 308} {
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			_, err := fmt.Fprintf(c, "HTTP/1.1 %d X\r\nLocation: http://%s/v1/chat/completions\r\n"+
				"Content-Length: 0\r\n\r\n", status, evil.Addr())
			return err == nil
		})
		if a := p.chat(); a.status != 502 || a.errorCode() != "upstream_protocol_error" ||
			a.header.Get("Location") != "" || a.header.Get("X-Should-Retry") != "false" {
			t.Errorf("%d: got %d %s %v", status, a.status, a.body, a.header)
		}
	}
	if visits.Load() > 0 {
		t.Error("the redirect was followed")
	}
}

// TestNoCrossOrigin: other web sites can neither read answers nor change anything.
func TestNoCrossOrigin(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, path := range []string{"/v1/chat/completions", "/manage/projects", "/"} {
		for _, origin := range []string{"https://evil.example", "null", p.url} {
			a := p.do("OPTIONS", path, "", "Origin", origin, "Access-Control-Request-Method", "POST",
				"Access-Control-Request-Headers", "authorization")
			for name := range a.header {
				if strings.HasPrefix(name, "Access-Control-") {
					t.Errorf("%s from %s: %s", path, origin, name)
				}
			}
			if a.status < 400 {
				t.Errorf("%s from %s: %d", path, origin, a.status)
			}
		}
	}
	a := p.manageAs(p.adminKey, "POST", "/manage/projects", `{"name":"theirs"}`, "Origin", "https://evil.example",
		"Sec-Fetch-Site", "cross-site")
	if a.status != 403 {
		t.Errorf("a form of another site: %d %s", a.status, a.body)
	}
}

// TestClientAddress: X-Forwarded-For is read from trusted peers only; its right-most untrusted address counts.
func TestClientAddress(t *testing.T) {
	t.Parallel()
	s := &addressReader{trustedProxies: []netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}}
	for _, c := range []struct {
		peer  string
		lines []string
		want  string
	}{
		{"10.0.0.1:5", nil, "10.0.0.1"},
		{"10.0.0.1:5", []string{"1.2.3.4"}, "1.2.3.4"},
		{"10.0.0.1:5", []string{"6.6.6.6, 1.2.3.4"}, "1.2.3.4"},
		{"10.0.0.1:5", []string{"6.6.6.6", "1.2.3.4"}, "1.2.3.4"},
		{"10.0.0.1:5", []string{"6.6.6.6, 1.2.3.4, 10.9.9.9", "10.0.0.2"}, "1.2.3.4"},
		{"10.0.0.1:5", []string{"10.0.0.7, 10.0.0.8"}, "10.0.0.7"},
		{"10.0.0.1:5", []string{"6.6.6.6, garbage, 10.0.0.8"}, ""},
		{"10.0.0.1:5", []string{"6.6.6.6, "}, ""},
		{"10.0.0.1:5", []string{"unknown"}, ""},
		{"10.0.0.1:5", []string{""}, ""},
		{"10.0.0.1:5", []string{"1.2.3.4:80"}, "1.2.3.4"},
		{"10.0.0.1:5", []string{"6.6.6.6, 198.51.100.7:55123, 10.0.0.8:1"}, "198.51.100.7"},
		{"10.0.0.1:5", []string{"[2001:db8::1]:443"}, "2001:db8::1"},
		{"10.0.0.1:5", []string{"[2001:db8::1]"}, "2001:db8::1"},
		{"10.0.0.1:5", []string{"[fd00::2]:1, [fd00::3]"}, "fd00::2"},
		{"10.0.0.1:5", []string{"[::ffff:1.2.3.4]:80"}, "1.2.3.4"},
		{"10.0.0.1:5", []string{"[1.2.3.4]"}, ""},
		{"10.0.0.1:5", []string{"[2001:db8::1"}, ""},
		{"10.0.0.1:5", []string{"2001:db8::1]:80"}, ""},
		{"10.0.0.1:5", []string{"1.2.3.4:99999"}, ""},
		{"10.0.0.1:5", []string{"1.2.3.4:"}, ""},
		{"10.0.0.1:5", []string{"\t2001:db8::1 "}, "2001:db8::1"},
		{"10.0.0.1:5", []string{"fe80::1%evil"}, "fe80::1"},
		{"10.0.0.1:5", []string{"::ffff:10.0.0.3"}, "10.0.0.3"},
		{"[::ffff:10.0.0.1]:5", []string{"1.2.3.4"}, "1.2.3.4"},
		{"[fd00::1]:5", []string{"1.2.3.4"}, "1.2.3.4"},
		{"9.9.9.9:5", []string{"1.2.3.4"}, "9.9.9.9"},
		{"[2001:db8::2]:5", []string{"10.0.0.1"}, "2001:db8::2"},
		{"nonsense", []string{"1.2.3.4"}, ""},
	} {
		r := &http.Request{RemoteAddr: c.peer, Header: http.Header{
			"X-Forwarded-For": c.lines, "X-Real-Ip": {"7.7.7.7"}, "Forwarded": {"for=7.7.7.7"}}}
		if got := s.clientAddress(r); got != c.want {
			t.Errorf("%s, %q: got %q, want %q", c.peer, c.lines, got, c.want)
		}
	}
	p := newTest(t, map[string]string{"TRUSTED_PROXIES": "127.0.0.0/8"})
	p.chatWithHeaders("Authorization", "Bearer "+p.token, "X-Forwarded-For", "6.6.6.6, 198.51.100.7")
	if row := p.lastCall(); row.Address != "198.51.100.7" {
		t.Errorf("the ledger has the address %s", row.Address)
	}
	_, held := p.newToken(`"name":"held","policy":{"addresses":["127.0.0.0/8","198.51.100.7"]}`)
	for hop, status := range map[string]int{"198.51.100.7:55123": 200, "198.51.100.8:1": 403, "unreadable": 403} {
		if res := p.chatWithHeaders("Authorization", "Bearer "+held, "X-Forwarded-For", hop); res.status != status {
			t.Errorf("a list with the proxy's own address, %s: got %d", hop, res.status)
		}
	}
	p = newTest(t, nil)
	p.chatWithHeaders("Authorization", "Bearer "+p.token, "X-Forwarded-For", "198.51.100.7")
	if row := p.lastCall(); row.Address != "127.0.0.1" {
		t.Errorf("the ledger has the address %s", row.Address)
	}
}

// FuzzClientAddress: whatever the header contains, the result is the peer's address, one in the header, or unknown.
func FuzzClientAddress(f *testing.F) {
	f.Add("10.0.0.1:1", "1.2.3.4, 10.0.0.2", "6.6.6.6")
	f.Add("[fd00::1%x]:1", "::1%2, ", "")
	f.Add("9.9.9.9:1", "1.2.3.4", "\n")
	s := &addressReader{trustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	f.Fuzz(func(t *testing.T, peer, one, two string) {
		got := s.clientAddress(&http.Request{RemoteAddr: peer, Header: http.Header{"X-Forwarded-For": {one, two}}})
		host, _, err := net.SplitHostPort(peer)
		if err != nil && got != "" || got == host || got == "" {
			return
		}
		addr, err := netip.ParseAddr(got)
		if err != nil || addr.Zone() != "" || addr.Is4In6() {
			t.Fatalf("%q, %q, %q: got %q", peer, one, two, got)
		}
		if from, err := netip.ParseAddr(host); err != nil || !s.trusts(from) {
			t.Fatalf("%q is not trusted, but got %q from %q, %q", peer, got, one, two)
		}
	})
}

// TestMediaType: the type alone counts, even with malformed parameters, as it does for ReverseProxy.
func TestMediaType(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]string{
		"":                                "",
		"application/json":                "application/json",
		"Text/Event-Stream":               "text/event-stream",
		"text/event-stream;charset=utf-8": "text/event-stream",
		"text/event-stream; charset":      "text/event-stream",
		`text/event-stream; q="x`:         "text/event-stream",
		"application/json; charset=utf-8, text/html": "application/json",
		"text/event stream":                          "",
		";":                                          "",
	} {
		if got := mediaType(header); got != want {
			t.Errorf("%q: got %q, want %q", header, got, want)
		}
	}
}

// TestStreamEventsPassAtOnce: the provider sends an event only when the client has the one before.
func TestStreamEventsPassAtOnce(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	got := make(chan struct{})
	events := chatEvents(true)
	for _, comment := range []string{": ping\n\n", "event: x\nid: 7\ndata: {}\n\n", "data:\r\n\r\n"} {
		events = append([]string{comment}, events...)
	}
	for _, asked := range []bool{true, false} { // the client, or the proxy, asked for the usage event
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			c.beginSSE()
			for i, e := range events {
				if c.chunk(e) != nil {
					return false
				}
				if !asked && i == len(events)-2 {
					continue // the client will not get this one
				}
				select {
				case <-got:
				case <-time.After(hangTimeout):
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
		if rest, err := s.readAll(); rest != "" || err != nil {
			t.Errorf("after the last event: %q, %v", rest, err)
		}
	}
}

// answerFramings are the ways in which a provider tells where an answer ends. Each body has 1,000 bytes.
var answerFramings = []struct{ name, contentType, framing string }{
	{"JSON with a length", "application/json", "Content-Length: 1000"},
	{"sound with a length", "audio/mpeg", "Content-Length: 1000"},
	{"an error with a length", "application/json", "Content-Length: 1000"},
	{"a stream with a length", "text/event-stream", "Content-Length: 1000"},
	{"without a type", "", "Content-Length: 1000"},
	{"compressed", "application/json", "Content-Encoding: gzip\r\nContent-Length: 1000"},
	{"in chunks", "application/json", "Transfer-Encoding: chunked"},
	{"a stream in chunks", "text/event-stream", "Transfer-Encoding: chunked"},
	{"up to the end of the connection", "application/json", "Connection: close"},
}

// writeFramed writes the head and then body[from:to] of each further step, with a framing. It returns false if the
// connection must be closed.
func (c *providerConn) writeFramed(name, contentType, framing, body string, steps []int, next func() bool) bool {
	head := "HTTP/1.1 200 OK\r\n"
	if strings.HasPrefix(name, "an error") {
		head = "HTTP/1.1 422 Unprocessable\r\n"
	}
	if contentType != "" {
		head += "Content-Type: " + contentType + "\r\n"
	}
	_, _ = io.WriteString(c, head+framing+"\r\n\r\n")
	chunked, from := strings.Contains(framing, "chunked"), 0
	for _, to := range steps {
		if !next() {
			return false
		}
		if piece := body[from:to]; chunked {
			_ = c.chunk(piece)
		} else {
			_, _ = io.WriteString(c, piece)
		}
		from = to
	}
	if from < len(body) {
		return false
	}
	return !chunked && !strings.Contains(framing, "close") || chunked && c.chunk("") == nil
}

// TestAnswersPassAtOnce: whatever its type and framing, the client gets the head of an answer, and each byte, before
// the provider sends the next one.
func TestAnswersPassAtOnce(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	got := make(chan struct{})
	body := "data: {" + strings.Repeat(" ", 990) + "}\n\n"
	steps := []int{1, 400, 1000}
	for _, a := range answerFramings {
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			return c.writeFramed(a.name, a.contentType, a.framing, body, steps, func() bool {
				select {
				case <-got:
					return true
				case <-time.After(hangTimeout):
					return false // the answer breaks off, and the client sees it
				}
			})
		})
		res, err := p.openChat(t)
		if err != nil {
			t.Fatalf("%s: %v", a.name, err)
		}
		from := 0
		for _, to := range steps {
			got <- struct{}{}
			piece := make([]byte, to-from)
			if n, err := io.ReadFull(res.Body, piece); err != nil || string(piece) != body[from:to] {
				t.Fatalf("%s, bytes %d to %d: got %q, %v", a.name, from, to, piece[:n], err)
			}
			from = to
		}
		if rest, err := io.ReadAll(res.Body); len(rest) > 0 || err != nil {
			t.Errorf("%s, after the last byte: %q, %v", a.name, rest, err)
		}
		res.Body.Close()
	}
}

// TestCutAnswersHaveAHead: if the provider breaks off an answer, the client gets its head and all bytes that came.
// Without a head, official SDKs would send a call again that the provider has already run.
func TestCutAnswersHaveAHead(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	body := "data: {" + strings.Repeat(" ", 990) + "}\n\n"
	for _, a := range answerFramings {
		for _, cut := range [][]int{{}, {1}, {400}, {100, 400}} {
			if a.framing == "Connection: close" { // the end of the connection is the end of the answer
				continue
			}
			p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
				return c.writeFramed(a.name, a.contentType, a.framing, body, cut, func() bool { return true })
			})
			res, err := p.openChat(t)
			if err != nil {
				t.Errorf("%s, cut at %v: no head: %v", a.name, cut, err)
				continue
			}
			want := body[:slices.Max(append([]int{0}, cut...))]
			if rest, err := io.ReadAll(res.Body); string(rest) != want || err == nil {
				t.Errorf("%s, cut at %v: got %d bytes, %v", a.name, cut, len(rest), err)
			}
			res.Body.Close()
			if row := p.lastCall(); row.Outcome != "truncated" || row.ErrorCode != "upstream_cut" {
				t.Errorf("%s, cut at %v: the ledger has %+v", a.name, cut, row)
			}
		}
	}
}

// openChat makes a chat call and returns when the head of the answer has come.
func (p *testProxy) openChat(t *testing.T) (*http.Response, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "POST", p.url+"/v1/chat/completions",
		strings.NewReader(chatBody()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"Authorization": {"Bearer " + p.token}, "Content-Type": {"application/json"}}
	tr := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	return tr.RoundTrip(req)
}

// oddStreams are streams as providers may write them, and what the ledger must have.
var oddStreams = []struct {
	name, stream string
	outcome      string
	source       string
	output       int64 // if exact
}{
	{name: "plain", stream: strings.Join(chatEvents(true), ""), outcome: "ok", source: "exact", output: 3},
	{name: "CRLF", stream: strings.ReplaceAll(strings.Join(chatEvents(true), ""), "\n", "\r\n"), outcome: "ok",
		source: "exact", output: 3},
	{name: "CR alone", stream: strings.ReplaceAll(strings.Join(chatEvents(true), ""), "\n", "\r"), outcome: "ok",
		source: "exact", output: 3},
	{name: "no space", stream: strings.ReplaceAll(strings.Join(chatEvents(true), ""), "data: ", "data:"),
		outcome: "ok", source: "exact", output: 3},
	{name: "mark, comments, names",
		stream:  "\ufeff: hello\n\nretry: 10\n\nid: 1\nevent: x\n" + strings.Join(chatEvents(true), ": c\n\n\n\n"),
		outcome: "ok", source: "exact", output: 3},
	{name: "lines of data",
		stream: "data: {\"choices\":\ndata: [{\"delta\":{\"content\":\"x\"}}]}\n\ndata: {\"choices\":[],\n" +
			"data: \"usage\":{\"prompt_tokens\":1,\"completion_tokens\":5}}\n\ndata: [DONE]\n\n",
		outcome: "ok", source: "exact", output: 5},
	{name: "letters in pieces",
		stream: "data: {\"choices\":[{\"delta\":{\"content\":\"😀é\\ud83d\\ude00\u2028\"}}]}\n\n" +
			strings.Join(chatEvents(true), ""),
		outcome: "ok", source: "exact", output: 3},
	{name: "no usage", stream: strings.Join(chatEvents(false), ""), outcome: "ok", source: "estimated"},
	{name: "usage null",
		stream:  strings.ReplaceAll(strings.Join(chatEvents(false), ""), `"choices"`, `"usage":null,"choices"`),
		outcome: "ok", source: "estimated"},
	{name: "usage twice",
		stream: chatEvents(true)[3] +
			strings.ReplaceAll(chatEvents(true)[3], `completion_tokens":3`, `completion_tokens":4`) +
			"data: [DONE]\n\n",
		outcome: "ok", source: "exact", output: 4},
	{name: "usage in the middle", stream: chatEvents(true)[3] + strings.Join(chatEvents(false), ""), outcome: "ok",
		source: "exact", output: 3},
	{name: "no end mark", stream: strings.Join(chatEvents(true)[:4], ""), outcome: "truncated", source: "exact",
		output: 3},
	{name: "a lying answer",
		stream: `data: {"choices":[{"delta":{"content":"data: [DONE]\n\ndata: {\"usage\":{\"total_tokens\":0}}\n\n",` +
			`"tool_calls":[{"function":{"arguments":"{\"usage\":{\"completion_tokens\":99}}"}}]},` +
			`"metadata":{"usage":{"completion_tokens":98}}}]}` + "\n\n" + strings.Join(chatEvents(true), ""),
		outcome: "ok", source: "exact", output: 3},
	{name: "a lie and no end",
		stream: `data: {"choices":[{"delta":{"content":"[DONE]",` +
			`"usage":{"completion_tokens":98,"prompt_tokens":1}}}]}` + "\n\n",
		outcome: "truncated", source: "estimated"},
	{name: "error inside",
		stream:  chatEvents(true)[0] + "data: {\"error\":{\"message\":\"overloaded\",\"code\":\"server_error\"}}\n\n",
		outcome: "upstream_error", source: "estimated"},
	{name: "long", stream: strings.Repeat(chatEvents(true)[1], 1000) + strings.Join(chatEvents(true), ""),
		outcome: "ok", source: "exact", output: 3},
}

// TestStreamBytes: whatever the chunks, the client gets the provider's bytes and the ledger has the same usage.
func TestStreamBytes(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	rng := rand.New(rand.NewPCG(1, 2))
	for _, test := range oddStreams {
		whole := func() int { return len(test.stream) }
		for how, size := range map[string]func() int{
			"one byte": func() int { return 1 }, "random": func() int { return 1 + rng.IntN(40) }, "whole": whole} {
			if how == "one byte" && len(test.stream) > 10_000 {
				continue
			}
			p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
				c.beginSSE()
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
			if row.Outcome != test.outcome || row.UsageSource != test.source ||
				test.source == "exact" && row.OutputTokens != test.output {
				t.Errorf("%s, %s: the ledger has %+v", test.name, how, row)
			}
			if row.OutputTokens == 0 {
				t.Errorf("%s, %s: usage is silently zero: %+v", test.name, how, row)
			}
		}
	}
}

// TestStreamBigEvent: an event of 16 MiB, such as an image, passes like any other.
func TestStreamBigEvent(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	big := `data: {"choices":[{"delta":{"content":"` + strings.Repeat("x", 16<<20) + `"}}]}` + "\n\n"
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
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

// TestClientGone: a client that leaves, before the answer or after any of its events, cancels the provider's call
// within a second, and the call has its row.
func TestClientGone(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	events := chatEvents(true)
	for k := range len(events) {
		sent, gone := make(chan struct{}), make(chan bool, 1)
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			if k > 0 {
				c.beginSSE()
				_ = c.chunk(strings.Join(events[:k], ""))
			}
			close(sent)
			gone <- c.waitClosed(hangTimeout)
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
		elapsed := stopwatch(t)
		if !<-gone || elapsed() > time.Second {
			t.Errorf("after %d events: the provider's call ended %v after the client had left", k, elapsed())
		}
		row := p.lastCall()
		if row.Outcome != "client_gone" || row.UsageSource == "none" || k == 0 && row.Status != 499 ||
			k > 0 && row.Status != 200 {
			t.Errorf("after %d events: the ledger has %+v", k, row)
		}
	}
	if rows := p.ledger(); len(rows) != len(events) {
		t.Errorf("%d rows for %d calls", len(rows), len(events))
	}
}

// TestClientShutsItsSide: net/http treats a half-closed connection as a client that has left. The client must not
// get an empty 200.
func TestClientShutsItsSide(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { c.waitClosed(hangTimeout); return false })
	if got := p.sendRawHalfClose(p.rawChatRequest("", chatBody())); got != "" {
		t.Errorf("the client got %q", got)
	}
	if row := p.lastCall(); row.Outcome != "client_gone" || row.Status != 499 {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestStreamOfAnotherKind: a provider may answer with JSON for a stream, or with a stream for JSON.
func TestStreamOfAnotherKind(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(200, chatResponseBody) })
	if res := p.chat(`"stream":true`); res.body != chatResponseBody ||
		res.header.Get("Content-Type") != "application/json" {
		t.Errorf("JSON for a stream: %+v", res)
	}
	if row := p.lastCall(); row.Outcome != "ok" || row.UsageSource != "exact" || row.OutputTokens != 3 {
		t.Errorf("JSON for a stream: the ledger has %+v", row)
	}
	stream := strings.Join(chatEvents(true), "")
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(stream)
		return c.chunk("") == nil
	})
	if res := p.chat(); res.body != stream {
		t.Errorf("a stream for JSON: %+v", res)
	}
	if row := p.lastCall(); row.Outcome != "ok" || row.UsageSource != "exact" || row.OutputTokens != 3 {
		t.Errorf("a stream for JSON: the ledger has %+v", row)
	}
}

// TestStreamCompressed: a stream that a provider compresses unasked is passed on unchanged, each event at once, with
// estimated usage.
func TestStreamCompressed(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	got := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if r.header.Get("Accept-Encoding") != "" {
			return c.reply(400, "{}") // the client's Accept-Encoding is not forwarded
		}
		c.beginSSE("Content-Encoding: gzip")
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
			case <-time.After(hangTimeout):
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

// TestStreamFraming: the same stream passes over HTTP/1.0, without keep-alive, and over HTTP/2 with TLS, where a cut
// is a reset stream.
func TestStreamFraming(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	want := strings.Join(chatEvents(false), "")
	body := chatBody(`"stream":true`)
	old := p.sendRaw(strings.Replace(p.rawChatRequest("", body), "HTTP/1.1", "HTTP/1.0", 1))
	if head, rest, _ := strings.Cut(old, "\r\n\r\n"); rest != want ||
		strings.Contains(strings.ToLower(head), "chunked") {
		t.Errorf("HTTP/1.0: got %q", old)
	}
	if once := p.sendRaw(p.rawChatRequest("Connection: close\r\n", body)); !strings.HasSuffix(once, "0\r\n\r\n") ||
		!strings.Contains(once, "Connection: close") {
		t.Errorf("without keep-alive: got %q", once)
	}
	hs := httptest.NewUnstartedServer(p.instance.server.routes())
	hs.EnableHTTP2 = true
	hs.Config.ErrorLog = p.instance.server.httpErrorLog
	hs.StartTLS()
	defer hs.Close()
	client := hs.Client()
	defer client.CloseIdleConnections()
	call := func() (string, error) {
		req, err := http.NewRequestWithContext(t.Context(), "POST", hs.URL+"/v1/chat/completions",
			strings.NewReader(body))
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
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(true)[0])
		return false
	})
	if got, err := call(); err == nil || strings.Contains(got, "[DONE]") {
		t.Errorf("HTTP/2, cut: got %q, %v", got, err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// maskChunks passes chunks through a mask for key and returns the whole output.
func maskChunks(key string, chunks ...[]byte) (string, bool) {
	m := newKeyMask(key)
	var out []byte
	for _, c := range chunks {
		out = append(out, m.redact(bytes.Clone(c))...)
	}
	return string(append(out, m.flush()...)), m.found
}

func TestKeyMask(t *testing.T) {
	t.Parallel()
	const key = "sk-sksk-aab-sk"
	stars := strings.Repeat("*", len(key))
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{"nothing of it", "nothing of it"},
		{key, stars},
		{"a" + key + "b" + key, "a" + stars + "b" + stars},
		{key + key, stars + stars},
		{"sk-" + key, "sk-" + stars},
		{key[:13], key[:13]}, // all but its last byte: not the key
		{key[:13] + "x" + key, key[:13] + "x" + stars},
		{key[1:] + key[:5], key[1:] + key[:5]},
		{key + "-sksk-aab-sk", stars + "-sksk-aab-sk"},
	} {
		in := []byte(c.in)
		for i := range len(in) + 1 { // every way to cut it in three
			for j := i; j <= len(in); j++ {
				if got, seen := maskChunks(key, in[:i], in[i:j], in[j:]); got != c.want || seen != (c.in != c.want) {
					t.Fatalf("%q cut at %d and %d: got %q, seen %v; want %q", c.in, i, j, got, seen, c.want)
				}
			}
		}
	}
	if got, _ := maskChunks("", []byte("abc")); got != "abc" {
		t.Errorf("without a key: got %q", got)
	}
}

// FuzzKeyMask: the output never contains the key, leaves everything else unchanged, and does not depend on how the
// input is cut. cuts has the lengths of the pieces.
func FuzzKeyMask(f *testing.F) {
	f.Add("secret-key-1", "x", []byte("secret-key-1 and secret-key-"), []byte{3, 9})
	f.Add("aabaabaa", "aab", []byte("aabaabaabaabaa"), []byte{1})
	f.Add("12345678", "\x00", bytes.Repeat([]byte("1234567812"), 9), []byte{8, 1, 0, 7})
	f.Fuzz(func(t *testing.T, key, between string, in, cuts []byte) {
		if checkProviderKey(key) != nil || len(in) > 1<<12 {
			t.Skip()
		}
		in = append(in, between+key+between+key[:len(key)-1]...)
		whole, seen := maskChunks(key, in)
		if strings.Contains(whole, key) || !seen || len(whole) != len(in) {
			t.Fatalf("%q became %q", in, whole)
		}
		for i := range in {
			if whole[i] != in[i] && whole[i] != '*' {
				t.Fatalf("byte %d of %q became %q", i, in, whole)
			}
		}
		if want := strings.ReplaceAll(string(in), key, strings.Repeat("*", len(key))); whole != want {
			t.Fatalf("got %q, want %q", whole, want)
		}
		var chunks [][]byte
		rest := in
		for i := 0; len(rest) > 0 && len(cuts) > 0; i++ {
			n := min(int(cuts[i%len(cuts)]), len(rest))
			if n == 0 && i%len(cuts) == 0 {
				n = 1 // 0 would loop for ever
			}
			chunks, rest = append(chunks, rest[:n]), rest[n:]
		}
		if cut, _ := maskChunks(key, append(chunks, rest)...); cut != whole {
			t.Fatalf("in pieces %q, whole %q", cut, whole)
		}
	})
}

// FuzzUpHeader: only listed headers reach the provider, with the client's values, and of those that the client's
// Connection header names only Content-Type.
func FuzzUpHeader(f *testing.F) {
	f.Add("Authorization", "Bearer x", "authorization, close")
	f.Add("OpenAI-Beta", "a", "openai-beta")
	f.Add("content-type", "application/json", "Content-Type")
	f.Add("X-Forwarded-For", "1.2.3.4", "")
	f.Add("OpenAI-Organization", "org", "\t,,x")
	f.Add("Anthropic-Workspace-Id", "w", "")
	f.Add("Idempotency-Key", "k", "")
	f.Add("If-None-Match", `"v1"`, "range")
	f.Add("Range", "bytes=0-", "Range")
	table := newEndpointTable()
	f.Fuzz(func(t *testing.T, name, value, connection string) {
		in := http.Header{"User-Agent": {"sdk"}, "Content-Type": {"application/json"}, "Cookie": {"a=b"},
			"X-Api-Key": {"k"}}
		name = http.CanonicalHeaderKey(name)
		in[name] = []string{value}
		in["Connection"] = append(in["Connection"], connection)
		e := table.all()[len(value)%len(table.all())]
		if len(connection)%4 == 0 {
			e = nil
		}
		out := upstreamHeader(in, "proj_1", e)
		for n, values := range out {
			want := in[n]
			if n == "idempotency-key" {
				n = "Idempotency-Key"
				want = scopeIdempotencyKeys(in[n], "proj_1")
			}
			condition := e != nil && e.method == "GET" && (n == "Range" || strings.HasPrefix(n, "If-"))
			if !allowRequestHeader(n) && !condition || !slices.Equal(values, want) {
				t.Fatalf("%q: %q reached the provider", n, values)
			}
			for listed := range strings.SplitSeq(connection, ",") {
				if n != "Content-Type" && strings.EqualFold(strings.TrimSpace(listed), n) {
					t.Fatalf("%q reached the provider, although Connection is %q", n, connection)
				}
			}
		}
		if out["Content-Type"] == nil {
			t.Fatal("Content-Type was removed")
		}
		for _, n := range []string{"Authorization", "X-Api-Key", "Api-Key", "Cookie", "Host", "Connection", "Upgrade",
			"Content-Length", "Transfer-Encoding", "Te", "Trailer", "Expect", "Content-Encoding",
			"Openai-Organization", "Openai-Project", "X-Request-Id", "Anthropic-Workspace-Id",
			"Anthropic-User-Profile-Id", "Anthropic-Organization-Id"} {
			if out[n] != nil {
				t.Fatalf("%s reached the provider", n)
			}
		}
	})
}

// TestStreamPings: a client of a verified stream gets pings in its API's form while the provider works. They bind the
// call to no upstream. A failure after a ping is an event in the stream's own form, and the stream ends broken.
func TestStreamPings(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"STREAM_PING_INTERVAL": "20ms"})
	p.allowErrors = true // the log tells of a masked key
	p.changeProject(`"routing":{"verified_streams":true}`)
	spare, anthropic, google := newFakeProvider(t), newFakeProvider(t), newFakeProvider(t)
	spareID := p.addUpstreamAt(spare, "openai", `"weight":0,"priority":1`)
	ids := []string{p.upstream, spareID, p.addUpstreamAt(anthropic, "anthropic", `"weight":1`),
		p.addUpstreamAt(google, "google", `"weight":1`)}
	const (
		chat, responses, messages = "/v1/chat/completions", "/v1/responses", "/v1/messages"
		gemini                    = "/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse"

		comment, event = ": ping\n\n", "event: ping\ndata: {\"type\": \"ping\"}\n\n"
	)
	message := []string{"event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":" +
		"{\"input_tokens\":9,\"output_tokens\":1}}}\n\n", "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"}
	candidate := []string{`data: {"candidates":[{"content":{"parts":[{"text":"Hi"}]},"finishReason":"STOP"}],` +
		"\"usageMetadata\":{\"promptTokenCount\":9,\"candidatesTokenCount\":3}}\n\n"}
	whole := strings.Join(chatEvents(false), "")
	for _, c := range []struct {
		name, path, ping string
		provider         *fakeProvider
		script           func(*providerConn, recordedRequest) bool
		want             string // what follows the pings; <any> is any text
		outcome          string // "ok": the stream ends cleanly
		status           int
		code             string
		failover         bool
	}{
		{name: "whole", path: chat, provider: p.provider, script: chatScript, want: whole, outcome: "ok", status: 200},
		{name: "Anthropic", path: messages, provider: anthropic, script: streamScript(message, 2, endStream),
			want: strings.Join(message, ""), outcome: "ok", status: 200},
		{name: "Gemini", path: gemini, provider: google, script: streamScript(candidate, 1, endStream),
			want: candidate[0], outcome: "ok", status: 200},
		{name: "another upstream answers", path: chat, provider: p.provider, failover: true, want: whole,
			script: streamScript(longStream(), 9, resetStream), outcome: "ok", status: 200},
		{name: "cut", path: chat, provider: p.provider, script: streamScript(longStream(), 9, resetStream),
			want: `data: {"error":{"message":"<any>","type":"server_error","param":null,` +
				`"code":"upstream_unreachable"}}` + "\n\n",
			outcome: "upstream_error", status: 502, code: "upstream_unreachable"},
		{name: "an error event that came first", path: chat, provider: p.provider, outcome: "upstream_error",
			status: 200, script: streamScript([]string{"data: {\"error\":{\"message\":\"x\"}}\n\n"}, 1, endStream),
			want: "data: {\"error\":{\"message\":\"x\"}}\n\n", code: "error_in_stream"},
		{name: "overloaded", path: messages, provider: anthropic,
			script: replyScript(529, "{\"type\":\"error\",\n "+`"error":{"type":"overloaded_error","message":"Busy"}}`),
			want: "event: error\n" +
				`data: {"type":"error","error":{"type":"overloaded_error","message":"Busy"}}` + "\n\n",
			outcome: "upstream_error", status: 529},
		{name: "the request's fault", path: responses, provider: p.provider,
			script: replyScript(400, `{"error":{"message":"no","type":"invalid_request_error","code":"bad"}}`),
			want: "event: error\n" + `data: {"code":"bad","error":{"message":"no","type":"invalid_request_error",` +
				`"code":"bad"},"message":"no","param":null,"sequence_number":0,"type":"error"}` + "\n\n",
			outcome: "upstream_error", status: 400},
		{name: "Gemini's quota", path: gemini, provider: google,
			script:  replyScript(429, `{"error":{"code":429,"message":"Quota","status":"RESOURCE_EXHAUSTED"}}`),
			want:    `data: {"error":{"code":429,"message":"Quota","status":"RESOURCE_EXHAUSTED"}}` + "\n\n",
			outcome: "upstream_error", status: 429},
		{name: "a page", path: messages, provider: anthropic,
			script: replyScript(503, "<html>", "Content-Type: text/html"),
			want: "event: error\n" + `data: {"type":"error","error":{"message":"<any>503.","type":"overloaded_error",` +
				`"param":null,"code":"upstream_error"}}` + "\n\n",
			outcome: "upstream_error", status: 503},
		{name: "the key is refused", path: messages, provider: anthropic, script: replyScript(401, `{"error":{}}`),
			want:    "event: error\ndata: {\"type\":\"error\",\"error\":{<any>\"code\":\"upstream_auth_error\"}}\n\n",
			outcome: "upstream_error", status: 502, code: "upstream_auth_error"},
		{name: "the key in an error", path: chat, provider: p.provider,
			script:  replyScript(400, `{"error":{"message":"your key `+p.provider.key+`"}}`),
			want:    `data: {"error":{"message":"your key ****<any>"}}` + "\n\n",
			outcome: "upstream_error", status: 400},
		{name: "no stream", path: chat, provider: p.provider, script: replyScript(200, chatResponseBody),
			want:    `data: {"error":{<any>"code":"upstream_protocol_error"}}` + "\n\n",
			outcome: "upstream_error", status: 502, code: "upstream_protocol_error"},
	} {
		for _, id := range ids { // any change makes an upstream ready again
			p.changeUpstream(id, `"note":"`+c.name+`"`)
		}
		if p.changeUpstream(spareID, `"weight":0`); c.failover {
			p.changeUpstream(spareID, `"weight":1`)
		}
		bodies := map[string]string{gemini: `{"contents":[]}`}
		for _, path := range []string{chat, responses, messages} {
			bodies[path] = `{"model":"gpt-4o-mini","stream":true,"max_tokens":9,"messages":[],"input":"x"}`
		}
		ping := map[string]string{chat: comment, responses: comment, messages: event, gemini: "\n\n"}[c.path]
		gate := make(chan struct{})
		c.provider.setScript(func(conn *providerConn, r recordedRequest) bool {
			select {
			case <-gate:
			case <-t.Context().Done(): // the test has failed
			}
			return c.script(conn, r)
		})
		s, err := p.openCall(t.Context(), p.token, c.path, bodies[c.path])
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		got, err := s.read(2 * len(ping))
		close(gate)
		if got != ping+ping || err != nil {
			t.Fatalf("%s: got %q, %v before the answer", c.name, got, err)
		}
		got, err = s.readAll()
		for strings.HasPrefix(got, ping) {
			got = strings.TrimPrefix(got, ping)
		}
		clean := c.outcome == "ok" || c.code == "error_in_stream"
		if !(callSection{text: c.want}).matches(callSection{text: got}) || (err == nil) != clean {
			t.Errorf("%s: got %q, %v; want %q", c.name, got, err, c.want)
		}
		row := p.lastCall()
		if row.Outcome != c.outcome || row.Status != c.status || row.ErrorCode != c.code ||
			c.failover != (row.UpstreamID == spareID) {
			t.Errorf("%s: the ledger has %+v", c.name, row)
		}
		used := c.outcome == "ok" || c.name == "no stream" || c.name == "cut"
		if used != (row.UsageSource != "none") {
			t.Errorf("%s: the usage is %s", c.name, row.UsageSource)
		}
	}
}

// TestStreamPingsEnd: no ping leaves before the call is on record, and none in a plain stream. A call that ends while
// its client gets pings ends as it would without them.
func TestStreamPingsEnd(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"STREAM_PING_INTERVAL": "20ms"})
	p.changeProject(`"routing":{"verified_streams":true}`)
	hold := func() (release func()) {
		gate := make(chan struct{})
		p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
			select {
			case <-gate:
			case <-t.Context().Done(): // the test has failed
			}
			return chatScript(c, r)
		})
		return func() { close(gate) }
	}
	const ping = ": ping\n\n"
	someTicks := func() {
		now := p.instance.running.ticks.Load()
		waitFor(t, "the watchdog's clock", func() bool { return p.instance.running.ticks.Load() > now+1 })
	}

	unlock, calls, answer := p.lockDatabase(), len(p.provider.received()), hold()
	type opened struct {
		s   *clientStream
		err error
		at  time.Time
	}
	result := make(chan opened, 1)
	go func() {
		s, err := p.openStream(t.Context(), p.token, "")
		result <- opened{s, err, time.Now()}
	}()
	waitFor(t, "the provider", func() bool { return len(p.provider.received()) > calls })
	someTicks()
	released := time.Now()
	unlock()
	r := <-result
	if r.err != nil || r.at.Before(released) {
		t.Fatalf("the head came before the call was on record, or %v", r.err)
	}
	if got, err := r.s.read(len(ping)); got != ping || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	r.s.body.Close()
	if row := p.lastCall(); row.Outcome != "client_gone" {
		t.Errorf("a client that left: the ledger has %+v", row)
	}
	answer()

	answer = hold()
	id, token := p.newToken(`"name":"revoked"`)
	s := p.stream(token)
	if got, err := s.read(len(ping)); got != ping || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	p.manage("DELETE", "/manage/tokens/"+id, "", 200, nil)
	got, err := s.readAll()
	event := strings.ReplaceAll(got, ping, "")
	if !strings.HasPrefix(event, `data: {"error":{"message":"Incorrect API key`) || err == nil {
		t.Errorf("a revoked token: got %q, %v", got, err)
	}
	if row := p.lastCall(); row.Outcome != "truncated" || row.ErrorCode != "revoked" {
		t.Errorf("a revoked token: the ledger has %+v", row)
	}
	answer()

	p.changeProject(`"routing":{"verified_streams":false}`)
	answer = hold()
	plain := make(chan testResponse, 1)
	go func() { plain <- p.chat(`"stream":true`) }()
	calls = len(p.provider.received())
	waitFor(t, "the provider", func() bool { return len(p.provider.received()) > calls })
	someTicks()
	answer()
	if res := <-plain; res.status != 200 || res.body != strings.Join(chatEvents(false), "") {
		t.Errorf("a plain stream: got %d %q, %v", res.status, res.body, res.err)
	}
}

// TestStreamPingsHTTP2: pings, the answer and an error event in HTTP/2, and over HTTP/1 with a cache.
func TestStreamPingsHTTP2(t *testing.T) {
	t.Parallel()
	cert, key := testCertificate(t, t.TempDir(), time.Hour)
	p := newTest(t, map[string]string{"STREAM_PING_INTERVAL": "10ms", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key})
	p.changeProject(`"routing":{"verified_streams":true},"policy":{"cache":{"ttl_seconds":60}}`)
	transport := p.http2(cert)
	t.Cleanup(transport.CloseIdleConnections)
	want, body := strings.Join(chatEvents(false), ""), chatBody(`"stream":true`, `"temperature":0`)
	call := func(script func(*providerConn, recordedRequest) bool) testResponse { // the provider waits for a ping
		pinged := make(chan struct{})
		p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
			<-pinged
			return script(c, r)
		})
		ctx, cancel := context.WithTimeout(t.Context(), hangTimeout)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, "POST", p.url+"/v1/chat/completions", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{"Authorization": {"Bearer " + p.token}, "Content-Type": {"application/json"}}
		res, err := transport.RoundTrip(req) // it returns with the head, which leaves with a ping
		close(pinged)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		return testResponse{res.StatusCode, res.Header, string(b), err}
	}
	if res := call(resetScript); res.status != 200 || res.err == nil || !strings.HasPrefix(res.body, ": ping\n\n") ||
		!strings.Contains(res.body, `"code":"upstream_unreachable"`) {
		t.Errorf("no answer: got %d %q, %v", res.status, res.body, res.err)
	}
	res := call(chatScript)
	if got := strings.ReplaceAll(res.body, ": ping\n\n", ""); res.status != 200 || res.err != nil || got != want ||
		got == res.body {
		t.Errorf("an answer: got %d %q, %v", res.status, res.body, res.err)
	}
	p.cacheSettled()
	if res = call(chatScript); res.body != want || !strings.Contains(res.header.Get("Cache-Status"), "hit") {
		t.Errorf("from the cache: got %q, %v", res.body, res.header)
	}
}
