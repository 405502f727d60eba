// Headers: what a client may not smuggle past the proxy to the provider, nor a
// provider to the client. (What goes up at all: TestUpHeaders, FuzzUpHeader.)
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
)

// TestConnectionHeader: naming a header in Connection takes away neither the
// key nor the type that the proxy sends, but what the client sent under it.
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
		before := len(p.provider.got())
		got := p.raw(p.rawChat(lines+"User-Agent: sdk\r\nOpenAI-Beta: b\r\nConnection: close\r\n", chatBody()))
		if !strings.HasPrefix(got, "HTTP/1.1 200 ") {
			t.Errorf("%q: got %q", lines, got)
			continue
		}
		r := p.provider.last(t)
		if len(p.provider.got()) != before+1 || r.header.Get("Authorization") != "Bearer "+p.provider.key || r.header.Get("Content-Type") != "application/json" || r.body != chatBody() {
			t.Errorf("%q: the provider got %s", lines, strings.ReplaceAll(r.head, p.provider.key, "KEY"))
		}
		taken := strings.Contains(lines, "openai-beta")
		if (r.header.Get("Openai-Beta") == "") != taken || (r.header.Get("User-Agent") == "") != taken || r.header.Get("Connection") != "" {
			t.Errorf("%q: the provider got %v", lines, r.header["Connection"])
		}
	}
}

// TestDeniedHeaders: none of these reaches the provider with the client's value.
func TestDeniedHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	var lines strings.Builder
	for _, name := range []string{"Cookie", "OpenAI-Organization", "openai-project", "Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto",
		"X-Forwarded-Prefix", "X-Real-IP", "CF-Connecting-IP", "True-Client-IP", "X-Original-URL", "X-Rewrite-URL", "X-HTTP-Method-Override",
		"X-Method-Override", "Proxy-Authorization", "Proxy-Authenticate", "Via", "Trailer", "TE", "Range", "If-Range", "If-Match", "If-None-Match",
		"If-Modified-Since", "Accept-Encoding", "Accept-Language", "Origin", "Referer", "Cache-Control", "Pragma", "Max-Forwards", "Content-Language",
		"Content-Location", "Content-MD5", "Content-Range", "X-Request-Id", "Request-Id", "X-Goog-Api-Key", "Authorization_", "X_Api_Key", "OpenAI_Beta",
		"X-Amz-Security-Token", "X-Openai-Organization", "Http2-Settings", "Keep-Alive", "Sec-Websocket-Key", "X-Llm-Proxy-Request-Id", "Api_Key", "Host_"} {
		lines.WriteString(name + ": denied-value\r\n")
	}
	if got := p.raw(p.rawChat(lines.String()+"Connection: close\r\n", chatBody())); !strings.HasPrefix(got, "HTTP/1.1 200 ") {
		t.Fatalf("got %q", got)
	}
	var names []string
	for name := range p.provider.last(t).header {
		names = append(names, name)
	}
	slices.Sort(names)
	if want := []string{"Authorization", "Content-Length", "Content-Type", "Host"}; !slices.Equal(names, want) {
		t.Errorf("the provider got the headers %v, want %v", names, want)
	}
	if h := p.provider.last(t).head; strings.Contains(h, "denied") {
		t.Errorf("the provider got %s", strings.ReplaceAll(h, p.provider.key, "KEY"))
	}
}

// TestAccountHeadersAreTheUpstreams: which organisation pays is for the
// project's admin to say.
func TestAccountHeadersAreTheUpstreams(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"organization":"org-ours","openai_project":"proj-ours"}`, 200, nil)
	p.call("Authorization", "Bearer "+p.token, "OpenAI-Organization", "org-theirs", "OpenAI-Project", "proj-theirs")
	if h := p.provider.last(t).header; strings.Join(h["Openai-Organization"], ",") != "org-ours" || strings.Join(h["Openai-Project"], ",") != "proj-ours" {
		t.Errorf("the provider got %v %v", h["Openai-Organization"], h["Openai-Project"])
	}
}

// TestMalformedHeaders: refused before anything else looks at them.
func TestMalformedHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, line := range []string{
		"X Y: 1\r\n", ": empty\r\n", "no colon\r\n", "Bäd: 1\r\n", "X-A : 1\r\n", "X-A: a\x00b\r\n", "X-A: a\x7fb\r\n", "X-A: a\rb\r\n", "Host: y\r\n",
		"Content-Type: text/plain\r\n", "Content-Type: application/json\r\n", "content-encoding: identity\r\nContent-Encoding: gzip\r\n",
	} {
		got := p.raw(p.rawChat(line+"Connection: close\r\n", chatBody()))
		if !strings.HasPrefix(got, "HTTP/1.1 400 ") {
			t.Errorf("%q: got %.200q", line, got)
		}
	}
	if n := len(p.provider.got()); n > 0 {
		t.Errorf("the provider got %d requests", n)
	}
	for _, size := range []string{"X-A: " + strings.Repeat("a", 70<<10) + "\r\n", strings.Repeat("X-A: 1\r\n", 10_000), "Cookie: " + strings.Repeat("a=b; ", 14_000) + "\r\n"} {
		if got := p.raw(p.rawChat(size, chatBody())); got != "" && !strings.HasPrefix(got, "HTTP/1.1 431 ") {
			t.Errorf("%d bytes of headers: got %.200q", len(size), got)
		}
	}
}

// TestNoUpgrade: no request to switch protocols is taken, and no unasked switch
// by a provider becomes a tunnel.
func TestNoUpgrade(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, lines := range []string{
		"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
		"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
		"Upgrade: anything\r\n", "Connection: upgrade\r\nupgrade: \t x\r\n", "Upgrade: \r\nUpgrade: h2c\r\nConnection: Upgrade\r\n",
	} {
		got := p.raw(p.rawChat(lines+"Connection: close\r\n", chatBody()) + "GET /tunnel HTTP/1.1\r\nHost: x\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 400 ") || !strings.Contains(got, "upgrade_not_supported") {
			t.Errorf("%q: got %q", lines, got)
		}
	}
	if n := len(p.provider.got()); n > 0 {
		t.Fatalf("the provider got %d requests", n)
	}
	if got := p.raw("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); !strings.HasPrefix(got, "HTTP/1.1 ") {
		t.Errorf("HTTP/2 without TLS: got %q", got)
	}
	for _, head := range []string{
		"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\n\r\n", "HTTP/1.1 101 X\r\nUpgrade: h2c\r\n\r\n",
	} {
		p.provider.answer(func(c *providerConn, _ recorded) bool {
			_, _ = io.WriteString(c, head+"bytes of a tunnel")
			return !c.gone(0)
		})
		got := p.raw(p.rawChat("Connection: close\r\n", chatBody()) + "more bytes")
		if !strings.HasPrefix(got, "HTTP/1.1 502 ") || strings.Contains(got, "tunnel") || strings.Contains(got, "101 ") {
			t.Errorf("%q: got %q", head, got)
		}
	}
}

// TestEarlyHints: no 1xx of a provider reaches the client, nor do its headers,
// and the final answer keeps all that the proxy adds.
func TestEarlyHints(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		for range 3 {
			_, _ = io.WriteString(c, "HTTP/1.1 103 Early Hints\r\nSet-Cookie: canary=1\r\nOpenAI-Organization: canary\r\nX-Canary: 1\r\nOpenAI-Canary: 1\r\nX-Request-Id: canary\r\n\r\n")
		}
		_, _ = io.WriteString(c, "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
		return c.reply(200, chatAnswer)
	})
	got := p.raw(p.rawChat("Connection: close\r\n", chatBody()))
	if !strings.HasPrefix(got, "HTTP/1.1 200 ") || strings.Count(got, "HTTP/1.1 ") != 1 || strings.Contains(strings.ToLower(got), "canary") {
		t.Errorf("got %q", got)
	}
	for _, want := range []string{"\r\nX-Request-Id: req_", "\r\nX-Llm-Proxy-Request-Id: req_", "\r\nX-Content-Type-Options: nosniff\r\n", "\r\nCache-Control: no-store\r\n", "\r\nContent-Type: application/json\r\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in %q", want, got)
		}
	}
	if row := p.lastCall(); row.Status != 200 || row.Outcome != "ok" {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestNoTrailers: announced or not, streamed or not.
func TestNoTrailers(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, announce := range []string{"", "Trailer: X-Canary, Set-Cookie\r\n", "Trailer: OpenAI-Canary\r\n"} {
		for _, kind := range []string{"text/event-stream", "application/json"} {
			p.provider.answer(func(c *providerConn, _ recorded) bool {
				_, err := fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%sTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Canary: 1\r\nSet-Cookie: canary=1\r\nOpenAI-Canary: canary\r\n\r\n", kind, announce)
				return err == nil
			})
			got := p.raw(p.rawChat("TE: trailers\r\nConnection: close\r\n", chatBody()))
			if !strings.HasPrefix(got, "HTTP/1.1 200 ") || strings.Contains(strings.ToLower(got), "canary") || !strings.Contains(got, "{}") {
				t.Errorf("%q %s: got %q", announce, kind, got)
			}
		}
	}
}

// TestAnswerHeaders: an allow-list, and no type where the provider gave none.
func TestAnswerHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		return c.reply(200, "<html><script>", "content-type: application/json", "Set-Cookie: a=b", "Server: x", "Via: x", "OpenAI-Organization: o", "openai-project: p",
			"Anthropic-Organization-Id: o", "Alt-Svc: h3=\":443\"", "Strict-Transport-Security: max-age=1", "Access-Control-Allow-Origin: *", "Clear-Site-Data: *",
			"Location: http://evil/", "WWW-Authenticate: Basic", "Content-Security-Policy: x", "Refresh: 0;url=http://evil/", "Link: <x>", "X-Accel-Redirect: /etc",
			"X-Sendfile: /etc", "X-Content-Type-Options: off", "Cache-Control: public", "X-Llm-Proxy-Request-Id: mine", "Connection: X-Ratelimit-Hidden", "X-Ratelimit-Hidden: 1",
			"X-Ratelimit-Remaining-Requests: 7", "openai-processing-ms: 12", "OpenAI-Version: 1", "retry-after-ms: 5", "Retry-After: 1", "X-Should-Retry: false",
			"X-Request-Id: theirs", "Request-Id: anth", "anthropic-ratelimit-tokens-limit: 3")
	})
	a := p.chat()
	var names []string
	for name := range a.header {
		names = append(names, name)
	}
	slices.Sort(names)
	want := []string{"Anthropic-Ratelimit-Tokens-Limit", "Cache-Control", "Content-Length", "Content-Type", "Date", "Openai-Processing-Ms", "Openai-Version", "Request-Id",
		"Retry-After", "Retry-After-Ms", "X-Content-Type-Options", "X-Llm-Proxy-Request-Id", "X-Request-Id", "X-Should-Retry"}
	if !slices.Equal(names, want) {
		t.Errorf("the client got the headers %v, want %v", names, want)
	}
	if a.header.Get("X-Request-Id") != "theirs" || a.header.Get("X-Llm-Proxy-Request-Id") == "mine" || a.header.Get("Cache-Control") != "no-store" || a.header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("got %v", a.header)
	}
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		_, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n<html><script>")
		return err == nil
	})
	if a := p.chat(); a.body != "<html><script>" || a.header["Content-Type"] != nil {
		t.Errorf("without a type: %q %v", a.body, a.header)
	}
}

// TestNoRedirect: a redirect is not followed, nor handed to the client, whose
// SDK would follow it with the token.
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
		p.provider.answer(func(c *providerConn, _ recorded) bool {
			_, err := fmt.Fprintf(c, "HTTP/1.1 %d X\r\nLocation: http://%s/v1/chat/completions\r\nContent-Length: 0\r\n\r\n", status, evil.Addr())
			return err == nil
		})
		if a := p.chat(); a.status != 502 || a.code() != "upstream_protocol_error" || a.header.Get("Location") != "" || a.header.Get("X-Should-Retry") != "false" {
			t.Errorf("%d: got %d %s %v", status, a.status, a.body, a.header)
		}
	}
	if visits.Load() > 0 {
		t.Error("the redirect was followed")
	}
}

// TestNoCrossOrigin: no other web site may read answers, or change anything.
func TestNoCrossOrigin(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, path := range []string{"/v1/chat/completions", "/manage/projects", "/"} {
		for _, origin := range []string{"https://evil.example", "null", p.url} {
			a := p.do("OPTIONS", path, "", "Origin", origin, "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "authorization")
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
	a := p.manageAs(p.adminKey, "POST", "/manage/projects", `{"name":"theirs"}`, "Origin", "https://evil.example", "Sec-Fetch-Site", "cross-site")
	if a.status != 403 {
		t.Errorf("a form of another site: %d %s", a.status, a.body)
	}
}

// TestClientAddress: X-Forwarded-For counts from trusted peers only, and from
// it the right-most address that is not theirs.
func TestClientAddress(t *testing.T) {
	t.Parallel()
	s := &server{cfg: &config{trustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}}}
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
		{"10.0.0.1:5", []string{"6.6.6.6, garbage, 10.0.0.8"}, "10.0.0.8"},
		{"10.0.0.1:5", []string{"6.6.6.6, "}, "10.0.0.1"},
		{"10.0.0.1:5", []string{"1.2.3.4:80"}, "10.0.0.1"},
		{"10.0.0.1:5", []string{"\t2001:db8::1 "}, "2001:db8::1"},
		{"10.0.0.1:5", []string{"fe80::1%evil"}, "fe80::1"},
		{"10.0.0.1:5", []string{"::ffff:10.0.0.3"}, "10.0.0.3"},
		{"[::ffff:10.0.0.1]:5", []string{"1.2.3.4"}, "1.2.3.4"},
		{"[fd00::1]:5", []string{"1.2.3.4"}, "1.2.3.4"},
		{"9.9.9.9:5", []string{"1.2.3.4"}, "9.9.9.9"},
		{"[2001:db8::2]:5", []string{"10.0.0.1"}, "2001:db8::2"},
		{"nonsense", []string{"1.2.3.4"}, ""},
	} {
		r := &http.Request{RemoteAddr: c.peer, Header: http.Header{"X-Forwarded-For": c.lines, "X-Real-Ip": {"7.7.7.7"}, "Forwarded": {"for=7.7.7.7"}}}
		if got := s.clientAddress(r); got != c.want {
			t.Errorf("%s, %q: got %q, want %q", c.peer, c.lines, got, c.want)
		}
	}
	p := newTest(t, map[string]string{"TRUSTED_PROXIES": "127.0.0.0/8"})
	p.call("Authorization", "Bearer "+p.token, "X-Forwarded-For", "6.6.6.6, 198.51.100.7")
	if row := p.lastCall(); row.Address != "198.51.100.7" {
		t.Errorf("the ledger has the address %s", row.Address)
	}
	p = newTest(t, nil)
	p.call("Authorization", "Bearer "+p.token, "X-Forwarded-For", "198.51.100.7")
	if row := p.lastCall(); row.Address != "127.0.0.1" {
		t.Errorf("the ledger has the address %s", row.Address)
	}
}

// FuzzClientAddress: whatever the header says, the result is an address: the
// peer's, or one that is in the header.
func FuzzClientAddress(f *testing.F) {
	f.Add("10.0.0.1:1", "1.2.3.4, 10.0.0.2", "6.6.6.6")
	f.Add("[fd00::1%x]:1", "::1%2, ", "")
	f.Add("9.9.9.9:1", "1.2.3.4", "\n")
	s := &server{cfg: &config{trustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}
	f.Fuzz(func(t *testing.T, peer, one, two string) {
		got := s.clientAddress(&http.Request{RemoteAddr: peer, Header: http.Header{"X-Forwarded-For": {one, two}}})
		host, _, err := net.SplitHostPort(peer)
		if err != nil && got != "" || got == host {
			return
		}
		addr, err := netip.ParseAddr(got)
		if err != nil || addr.Zone() != "" || addr.Is4In6() {
			t.Fatalf("%q, %q, %q: got %q", peer, one, two, got)
		}
		if from, err := netip.ParseAddr(host); err != nil || !s.trusted(from) {
			t.Fatalf("%q is not trusted, but got %q from %q, %q", peer, got, one, two)
		}
	})
}

// TestMediaType: what an answer is goes by its type alone, also where the
// parameters are malformed, as it does for ReverseProxy.
func TestMediaType(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]string{"": "", "application/json": "application/json", "Text/Event-Stream": "text/event-stream",
		"text/event-stream;charset=utf-8": "text/event-stream", "text/event-stream; charset": "text/event-stream", `text/event-stream; q="x`: "text/event-stream",
		"application/json; charset=utf-8, text/html": "application/json", "text/event stream": "", ";": ""} {
		if got := mediaType(header); got != want {
			t.Errorf("%q: got %q, want %q", header, got, want)
		}
	}
}
