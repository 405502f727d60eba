// Tests of requests over the wire: paths, queries, framing, slow and hostile clients. A path reaches the handler
// that it names byte for byte, or none, and the provider gets only paths built from the endpoint table.
// (endpoints_test.go tests the table by itself.)
package main

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestOddPaths: no spelling of a path bypasses the table, or crosses from /v1 to /manage or back. There is no
// redirect either: a client would send its token along.
func TestOddPaths(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for target := range strings.FieldsSeq(`
		/v1/chat/completionsX /v1/chat/completions/ //v1/chat/completions /V1/chat/completions /v1/chat//completions
		/v1//chat/completions /v1/chat/completions;x=1 /v1/chat/completions. /v1/chat/completions%20 /v1 /v1/ /v1/.
		/v1/.. /./v1/chat/completions /x/../v1/chat/completions /v1/chat%2fcompletions /v1%2Fchat/completions
		/%761/chat/completions /v1/chat%5ccompletions /v1/chat\completions /v1\chat\completions
		/v1/%2e%2e/v1/chat/completions /v1/x/../chat/completions /v1/x/%2e%2e/chat/completions
		/v1/..;/v1/chat/completions /v1/chat/completions%00 /v1/chat/completions%252f /v1/chat/completions%c0%af
		/v1/chat／completions /v1/chat/completions%0a /v1/chat/completions%3f /v1/../manage/tokens
		/v1/..%2fmanage/tokens /v1/%2e%2e/manage/tokens /v1/..%5cmanage%5ctokens /v1/../admin /manage/../v1/models
		/manage/%2e%2e/v1/models /manage /manage/ /manage//tokens /manage/tokens/ /manage/./tokens
		/manage/tokens/../keys /manage/tokens%2f..%2fkeys /%6danage/tokens //manage/tokens /manage;/tokens
		/MANAGE/tokens /manage/tokens%00 /manage/tokens%20 /manage%2ftokens /healthz/ /healthz/x /HEALTHZ /readyz%00
		//healthz /x /%2f /%00 /.. /v1/engines/gpt-4o/chat/completions /openai/deployments/gpt-4o/chat/completions
		/v1beta/corpora /chat/completions /openai/v1/chat/completions /v1/realtime /v1/realtime?model=gpt-4o
		/v1/realtime/sessions /v1/realtime/client_secrets /v1/realtime/translations/client_secrets
		/v1/realtime/transcription_sessions /v1/chatkit/sessions /v1/chatkit/sessions/a/cancel
		/v1/organization/admin_api_keys /v1/organization/users /v1/organization/projects/p/api_keys
		/v1/projects/p/users /v1/dashboard/billing/usage /v1/me /v1/api_keys /v1/login /v1/workspaces`) {
		for _, method := range []string{"POST", "GET"} {
			for _, key := range []string{p.token, p.adminKey} {
				got := p.sendRaw(method + " " + target + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" +
					"Authorization: Bearer " + key + "\r\nContent-Type: application/json\r\n" +
					"Content-Length: " + fmt.Sprint(len(chatBody())) + "\r\n\r\n" + chatBody())
				status := strings.TrimPrefix(got, "HTTP/1.1 ")[:3]
				// A management key on /v1 is a 401 before the path is read; net/http refuses some targets.
				if status != "404" && status != "400" && !(status == "401" && key == p.adminKey) {
					t.Errorf("%s %s: got %q", method, target, got)
				}
				if status == "404" && !strings.Contains(got, "Content-Type: application/json\r\n") {
					t.Errorf("%s %s: the 404 is not JSON: %q", method, target, got)
				}
			}
		}
	}
	for _, target := range []string{
		"/v1/chat/completions x", "/v1/chat\tcompletions", "/v1/chat/completions\x00", "v1/chat/completions", ""} {
		got := p.sendRaw("GET " + target + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 400 ") {
			t.Errorf("%q: got %q", target, got)
		}
	}
	// A request has no fragment; net/http treats # as a byte of the path.
	got := p.sendRaw("POST /v1/chat/completions#x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" +
		"Authorization: Bearer " + p.token + "\r\n\r\n")
	if !strings.HasPrefix(got, "HTTP/1.1 404 ") {
		t.Errorf("a fragment: got %q", got)
	}
	if n := len(p.provider.received()); n > 0 {
		t.Errorf("the provider got %d requests, last %s", n, p.provider.lastRequest(t).target)
	}
}

// TestOnlyTheTableForwards: of all operations in the table, with every method, exactly those of class inference
// are forwarded by default, and to the exact path of the table.
func TestOnlyTheTableForwards(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	forms := map[string]bool{}
	classes := map[string]endpointClass{}
	for _, e := range newEndpointTable().all() {
		classes[e.name()] = e.class
		forms[e.pattern] = forms[e.pattern] || e.body == bodyForm
	}
	forwarded := map[string]bool{}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(200, "{}") })
	for pattern := range forms {
		path := pattern
		for strings.Contains(path, "{") {
			from, rest, _ := strings.Cut(path, "{")
			_, rest, _ = strings.Cut(rest, "}")
			path = from + "gpt-4o" + rest
		}
		for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"} {
			name := method + " " + pattern
			class, known := classes[strings.Replace(name, "HEAD ", "GET ", 1)]
			kind, body := "application/json", ""
			if method == "POST" && forms[pattern] {
				kind, body = formContentType, multipartBody("model=gpt-4o")
			} else if method == "POST" {
				body = `{"model":"gpt-4o"}`
				last := pattern[strings.LastIndexByte(pattern, '/')+1:]
				if slices.Contains([]string{"cancel", "hangup", "pause", "resume"}, last) ||
					strings.Contains(pattern, "evals/{eval_id}/runs/{run_id}") {
					body = ""
				}
			}
			before := len(p.provider.received())
			a := p.do(method, path, body, "Authorization", "Bearer "+p.token, "Content-Type", kind)
			n := len(p.provider.received()) - before
			ok := true
			switch {
			case !known:
				ok = a.status == 405 && n == 0
			case class == classStateful:
				ok = a.status == 403 && (method == "HEAD" || a.errorCode() == "endpoint_not_allowed" ||
					strings.Contains(a.body, `"reason":"ENDPOINT_NOT_ALLOWED"`)) && n == 0
			case class == classInference &&
				(strings.HasPrefix(pattern, "/v1/messages") || strings.HasPrefix(pattern, "/v1beta/")):
				ok = a.status == 404 && n == 0 // not an endpoint of this project's provider
			case class == classInference:
				ok = a.status == 200 && n == 1 && p.provider.lastRequest(t).target == path &&
					p.provider.lastRequest(t).method == strings.Replace(method, "HEAD", "GET", 1)
				forwarded[name] = true
			}
			if !ok {
				t.Errorf("%s: got %d %s, %d requests were forwarded", name, a.status, a.body, n)
			}
		}
	}
	if len(forwarded) != 17 {
		t.Errorf("%d operations were forwarded", len(forwarded))
	}
}

// TestQueryOverTheWire: only known parameters are forwarded, and they are encoded again.
func TestQueryOverTheWire(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	many := strings.Repeat("limit=1&", 10_000)
	for _, c := range []struct {
		query, want string
		status      int
	}{
		{"", "/v1/files", 200},
		{"?", "/v1/files", 200},
		{"?limit=5&after=a%20b", "/v1/files?limit=5&after=a%20b", 200},
		{"?after=a+b&&limit", "/v1/files?after=a+b&&limit", 200},
		{"?purpose=%61ssist%61nts%26x%3d1", "/v1/files?purpose=%61ssist%61nts%26x%3d1", 200},
		{"?limit=1;after=2", "", 400}, {"?limit=%zz", "", 400}, {"?limit=1&limit=2", "", 400},
		{"?Limit=1", "", 400}, {"?limit%00=1", "", 400}, {"?model=gpt-4o", "", 400}, {"?api_key=x", "", 400},
		{"?key=x", "", 400}, {"?api-version=1", "", 400}, {"?limit[]=1", "", 400}, {"?=1", "", 400},
		{"?" + many + "model=bad", "", 400}, {"?after=" + strings.Repeat("a", 20_000), "", 400},
		{"?limit=%0d%0a", "", 400}, {"?limit=%ff", "", 400},
		{"?order=asc#x", "", 400}, {"?order=asc%23x", "/v1/files?order=asc%23x", 200},
	} {
		before := len(p.provider.received())
		got := p.sendRaw("GET /v1/files" + c.query + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" +
			"Authorization: Bearer " + p.token + "\r\n\r\n")
		if !strings.HasPrefix(got, fmt.Sprintf("HTTP/1.1 %d ", c.status)) && !strings.HasPrefix(got, "HTTP/1.1 431 ") {
			t.Errorf("%.100s: got %.300q", c.query, got)
		}
		reqs := p.provider.received()
		if c.status != 200 && len(reqs) != before ||
			c.status == 200 && (len(reqs) != before+1 || reqs[before].target != c.want) {
			t.Errorf("%.100s: the provider got %d more, last %q",
				c.query, len(reqs)-before, p.provider.lastRequest(t).target)
		}
	}
}

// TestModelInPathIsHeldToPolicy: the policy applies to a model in the path, too.
func TestModelInPathIsHeldToPolicy(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, token := p.newToken(`"name":"held","policy":{"models":["gpt-4o-mini","meta/*"]}`)
	for path, want := range map[string]int{
		"gpt-4o-mini": 200, "meta/llama": 200, "meta%2Fllama": 200, "gpt-4o%2dmini": 200,
		"gpt-4o": 403, "meta": 403, "GPT-4O-MINI": 403, "gpt-4o-mini%20": 403, "meta%3B/x": 403,
		"gpt-4o-mini/": 404, "gpt-4o-mini%00": 404,
		"meta/../gpt-4o": 404, "meta/%2e%2e/gpt-4o": 404, "meta%2f..%2fgpt-4o": 404,
	} {
		if a := p.do("GET", "/v1/models/"+path, "", "Authorization", "Bearer "+token); a.status != want {
			t.Errorf("%s: got %d %s, want %d", path, a.status, a.body, want)
		}
	}
	allowed := []string{"/v1/models/gpt-4o-mini", "/v1/models/gpt-4o%2dmini", "/v1/models/meta/llama",
		"/v1/models/meta%2Fllama"}
	for _, r := range p.provider.received() {
		if !slices.Contains(allowed, r.target) {
			t.Errorf("the provider got %s", r.target)
		}
	}
}

// smuggledRequest is a second request, hidden where the body of the first one may be.
func (p *testProxy) smuggledRequest() string {
	return "GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token + "\r\n\r\n"
}

// requestHead is the head of a chat call; lines adds the framing.
func (p *testProxy) requestHead(version, lines string) string {
	return "POST /v1/chat/completions HTTP/" + version + "\r\nHost: x\r\nConnection: close\r\n" +
		"Authorization: Bearer " + p.token + "\r\nContent-Type: application/json\r\n" + lines + "\r\n"
}

// TestAmbiguousFraming: a request with ambiguous framing is refused and its connection closed, so that nothing
// after it is read as a request.
func TestAmbiguousFraming(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	body := chatBody()
	length := fmt.Sprintf("Content-Length: %d\r\n", len(body))
	chunked := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body)
	chunkedHead := p.requestHead("1.1", "Transfer-Encoding: chunked\r\n")
	for _, c := range []struct{ name, request string }{
		{"two lengths", p.requestHead("1.1", length+"Content-Length: 2\r\n") + body},
		{"a list of lengths", p.requestHead("1.1", fmt.Sprintf("Content-Length: %d, 2\r\n", len(body))) + body},
		{"signed length", p.requestHead("1.1", fmt.Sprintf("Content-Length: +%d\r\n", len(body))) + body},
		{"negative length", p.requestHead("1.1", "Content-Length: -1\r\n") + body},
		{"hexadecimal length", p.requestHead("1.1", "Content-Length: 0x10\r\n") + body},
		{"no number", p.requestHead("1.1", "Content-Length: \r\n") + body},
		{"huge length", p.requestHead("1.1", "Content-Length: 99999999999999999999\r\n") + body},
		{"unknown coding", p.requestHead("1.1", "Transfer-Encoding: xchunked\r\n") + chunked},
		{"chunked and identity", p.requestHead("1.1", "Transfer-Encoding: chunked, identity\r\n") + chunked},
		{"identity", p.requestHead("1.1", "Transfer-Encoding: identity\r\n"+length) + body},
		{"gzip, chunked", p.requestHead("1.1", "Transfer-Encoding: gzip, chunked\r\n") + chunked},
		{"chunked twice", p.requestHead("1.1", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n") + chunked},
		{"blank before the colon", p.requestHead("1.1", "Transfer-Encoding : chunked\r\n"+length) + chunked},
		{"vertical tab", p.requestHead("1.1", "Transfer-Encoding: \x0bchunked\r\n"+length) + chunked},
		{"no chunk size", chunkedHead + "\r\n" + body},
		{"chunk size with a sign", chunkedHead + "+" + chunked},
		{"huge chunk size", chunkedHead + "fffffffffffffffff\r\n" + body},
		{"chunk without its end", chunkedHead + fmt.Sprintf("%x\r\n%sXX0\r\n\r\n", len(body), body)},
		{"chunk extension without end", chunkedHead + "2;" + strings.Repeat("a", 1<<20)},
		{"bare CR in a chunk line", chunkedHead + fmt.Sprintf("%x\r%s", len(body), body)},
		{"HTTP/0.9", "GET /v1/models\r\n\r\n"},
		{"HTTP/2.0", p.requestHead("2.0", length) + body},
		{"HTTP/1.2.3", p.requestHead("1.2.3", length) + body},
		{"tab in the request line", strings.Replace(p.requestHead("1.1", length), "POST /", "POST\t/", 1) + body},
		{"two Hosts", p.requestHead("1.1", "Host: y\r\n"+length) + body},
		{"no Host", strings.Replace(p.requestHead("1.1", length), "Host: x\r\n", "", 1) + body},
		{"bad Host", strings.Replace(p.requestHead("1.1", length), "Host: x", "Host: x/y@z", 1) + body},
		{"method with a line end", "PO\r\nST /v1/chat/completions HTTP/1.1\r\n\r\n"},
		{"empty method", " /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"blank in the target", "GET /v1/models x HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"control in the target", "GET /v1/mod\x01els HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"bad escape in the target", "GET /v1/models/%zz HTTP/1.1\r\nHost: x\r\n\r\n"},
	} {
		got := p.sendRaw(c.request + p.smuggledRequest())
		status, _, _ := strings.Cut(strings.TrimPrefix(got, "HTTP/1.1 "), "\r\n")
		code, _, _ := strings.Cut(status, " ")
		if got != "" && !slices.Contains([]string{"400", "501", "505"}, code) {
			t.Errorf("%s: got %q", c.name, got)
		}
		if strings.Count(got, "HTTP/1.1 ") > 1 {
			t.Errorf("%s: two answers: %q", c.name, got)
		}
		if n := len(p.provider.received()); n > 0 {
			t.Fatalf("%s: the provider got %d requests: %q", c.name, n, p.provider.lastRequest(t).body)
		}
	}
}

// TestOddFraming: unusual framing with one meaning is forwarded in its simplest form, as one request.
func TestOddFraming(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	body := chatBody()
	length := fmt.Sprintf("Content-Length: %d\r\n", len(body))
	half := len(body) / 2
	chunked := fmt.Sprintf("%x;ext=\"1\"\r\n%s\r\n%X\r\n%s\r\n0\r\n", half, body[:half], len(body)-half, body[half:]) +
		"X-Trailer: GET /x HTTP/1.1\r\nAuthorization: Bearer x\r\n\r\n"
	for _, c := range []struct{ name, request string }{
		{"the same length twice", p.requestHead("1.1", length+length) + body},
		{"chunks, extensions, trailers", p.requestHead("1.1", "Transfer-Encoding: Chunked\r\nTrailer: X-Trailer\r\n") + chunked},
		{"both framings", p.requestHead("1.1", "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n") + chunked},
		{"folded header", p.requestHead("1.1", "Accept: a\r\n\tb\r\n"+length) + body},
		{"HTTP/1.0", p.requestHead("1.0", length) + body},
		{"bare line feeds", strings.ReplaceAll(p.requestHead("1.1", length), "\r\n", "\n") + body},
	} {
		before := len(p.provider.received())
		got := p.sendRaw(c.request + p.smuggledRequest())
		reqs := p.provider.received()
		refused := strings.HasPrefix(got, "HTTP/1.1 400 ")
		accepted := strings.HasPrefix(got, "HTTP/1.1 200 ") || strings.HasPrefix(got, "HTTP/1.0 200 ")
		if !refused && !accepted || strings.Count(got, "\r\nX-Llm-Proxy-Request-Id:") > 1 {
			t.Errorf("%s: got %q", c.name, got)
		}
		if refused && len(reqs) == before {
			continue
		}
		r := reqs[len(reqs)-1]
		if len(reqs) != before+1 || r.body != body || r.header.Get("Content-Length") != fmt.Sprint(len(body)) ||
			r.header["Transfer-Encoding"] != nil || r.header["X-Trailer"] != nil || r.header["Trailer"] != nil ||
			r.header.Get("Authorization") != "Bearer "+p.provider.key {
			t.Errorf("%s: the provider got %d requests, last %s",
				c.name, len(reqs)-before, strings.ReplaceAll(r.head, p.provider.key, "KEY"))
		}
	}
}

// TestBothFramings: a request with a length and chunks is the last one of its connection, because a proxy in front may
// see another end of it.
func TestBothFramings(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	body := chatBody()
	for _, c := range []struct{ head, body string }{
		{"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer " + p.token, body},
		{"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer " + p.token, ""},
		{"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer wrong", ""},
		{"POST /manage/projects HTTP/1.1\r\nAuthorization: Bearer " + p.adminKey, "{}"},
		{"POST /admin/sign-in HTTP/1.1", ""}, {"GET /healthz HTTP/1.1", ""},
	} {
		chunks := "0\r\n\r\n"
		if c.body != "" {
			chunks = fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(c.body), c.body)
		}
		got := p.sendRaw(c.head + "\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n" +
			"Content-Length: 6\r\n\r\n" + chunks + p.smuggledRequest())
		if n := strings.Count(got, "HTTP/1.1 "); n != 1 || !strings.Contains(got, "\r\nConnection: close\r\n") {
			t.Errorf("%s: %d answers: %q", strings.Fields(c.head)[1], n, got)
		}
	}
}

// TestUnreadBodyIsNoRequest: the body of a refused call is not read as the next request on the connection.
func TestUnreadBodyIsNoRequest(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	inner := p.smuggledRequest()
	for _, head := range []string{
		"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n", // refused before the body
		"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token + "\r\n",
		"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token + "\r\n",
		"GET /healthz HTTP/1.1\r\nHost: x\r\n",
		"POST /manage/projects HTTP/1.1\r\nHost: x\r\n",
	} {
		got := p.sendRaw(head + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(inner), inner) +
			"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if n := strings.Count(got, "HTTP/1.1 "); n > 2 || len(p.provider.received()) > 0 {
			t.Errorf("%q: %d answers, %d requests: %q", head[:20], n, len(p.provider.received()), got)
		}
	}
}

// TestNoContinueForUnauthenticated: a client without a valid token is not asked for the body.
func TestNoContinueForUnauthenticated(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, auth := range []string{"Bearer wrong", "Bearer " + p.unknownCredential(tokenPrefix)} {
		got := p.sendRaw("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: " + auth + "\r\n" +
			"Content-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 104857600\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 401 ") || strings.Contains(got, "100 Continue") ||
			!strings.Contains(got, "\r\nConnection: close\r\n") {
			t.Errorf("got %q", got)
		}
	}
	got := p.sendRaw(p.rawChatRequest("Expect: 100-continue\r\nConnection: close\r\n", chatBody()))
	if !strings.Contains(got, "HTTP/1.1 200 OK") || p.provider.lastRequest(t).header["Expect"] != nil {
		t.Errorf("with a token: got %q", got)
	}
	got = p.sendRaw(p.rawChatRequest("Expect: the-unexpected\r\nConnection: close\r\n", chatBody()))
	if !strings.HasPrefix(got, "HTTP/1.1 417 ") {
		t.Errorf("got %q", got)
	}
}

// TestHostIsNoRoute: neither the Host header nor an absolute URL as target selects where a call goes; /manage
// answers under its own host names only.
func TestHostIsNoRoute(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	other := newFakeProvider(t)
	auth := "\r\nAuthorization: Bearer " + p.token + "\r\nContent-Type: application/json\r\nConnection: close\r\n" +
		"Content-Length: " + fmt.Sprint(len(chatBody())) + "\r\n\r\n" + chatBody()
	evil := strings.TrimPrefix(other.url, "http://")
	for i, start := range []string{
		"POST /v1/chat/completions HTTP/1.1\r\nHost: " + evil,
		"POST http://" + evil + "/v1/chat/completions HTTP/1.1\r\nHost: x",
		"POST http://user:pw@" + evil + "/v1/chat/completions HTTP/1.1\r\nHost: " + evil,
		"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Forwarded-Host: " + evil + "\r\nX-Original-URL: " + other.url,
	} {
		got := p.sendRaw(start + auth)
		if !strings.HasPrefix(got, "HTTP/1.1 200 ") || len(p.provider.received()) != i+1 {
			t.Errorf("%q: got %q", start, got)
		}
		if h := p.provider.lastRequest(t).header.Get("Host"); h != strings.TrimPrefix(p.provider.url, "http://") {
			t.Errorf("%q: the provider got Host: %s", start, h)
		}
	}
	if len(other.received()) > 0 {
		t.Error("another host was called")
	}
	manageAuth := "\r\nConnection: close\r\nAuthorization: Bearer " + p.adminKey + "\r\n\r\n"
	for host, want := range map[string]int{
		"evil.example": 421, "evil.example:80": 421, "127.0.0.1.evil.example": 421, "evil.example.": 421, "localhost.": 421,
		"localhost": 200, "localhost:1": 200, "127.0.0.1": 200, "[::1]:8080": 200, "llm-proxy": 200,
	} {
		got := p.sendRaw("GET /manage/projects HTTP/1.1\r\nHost: " + host + manageAuth)
		if !strings.HasPrefix(got, fmt.Sprintf("HTTP/1.1 %d ", want)) {
			t.Errorf("/manage as %s: got %.60q, want %d", host, got, want)
		}
	}
	got := p.sendRaw("GET http://evil.example/manage/projects HTTP/1.1\r\nHost: localhost" + manageAuth)
	if !strings.HasPrefix(got, "HTTP/1.1 421 ") {
		t.Errorf("/manage by an absolute URL: got %.60q", got)
	}
}

// TestMethods: a method that an endpoint does not support is not forwarded.
func TestMethods(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, method := range []string{
		"GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "FOO", "post", "Post", "PRI", "COPY"} {
		a := p.do(method, "/v1/embeddings", "", "Authorization", "Bearer "+p.token)
		if a.status != 405 || a.header.Get("Allow") != "POST" ||
			method != "HEAD" && a.errorCode() != "method_not_allowed" {
			t.Errorf("%s: got %d %s %v", method, a.status, a.body, a.err)
		}
	}
	for _, line := range []string{"CONNECT evil.example:443", "CONNECT /v1/models", "OPTIONS *", "GET *", "TRACE /",
		"DELETE /healthz", "POST /", "CONNECT /manage/projects"} {
		got := p.sendRaw(line + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" +
			"Authorization: Bearer " + p.token + "\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 4") ||
			!strings.Contains(got, "nosniff") && !strings.HasPrefix(got, "HTTP/1.1 400 ") {
			t.Errorf("%s: got %q", line, got)
		}
	}
	if n := len(p.provider.received()); n > 0 {
		t.Errorf("the provider got %d requests", n)
	}
}

// TestNothingReflected: escaped line ends in a request never appear in a response header.
func TestNothingReflected(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	auth := []string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json"}
	for _, c := range []struct{ method, path, body string }{
		{"POST", "/v1/chat/completions", `{"model":"a\r\nX-Canary: 1","messages":[]}`},
		{"GET", "/v1/models/a%0d%0aX-Canary:%201", ""},
		{"GET", "/v1/models?limit=%0d%0aX-Canary:%201", ""},
		{"GET", "/v1/models?%0d%0aX-Canary:%201=1", ""},
		{"GET", "/v1/files/a%0d%0aX-Canary", ""},
		{"GET", "/%0d%0aX-Canary:1", ""},
		{"GET", "/manage/tokens?%0d%0aX-Canary:1=1", ""},
	} {
		a := p.do(c.method, c.path, c.body, auth...)
		if a.status < 400 || a.header.Get("X-Canary") != "" || strings.ContainsAny(a.body, "\r") {
			t.Errorf("%s: %d %v %s", c.path, a.status, a.header, a.body)
		}
	}
	if n := len(p.provider.received()); n > 0 {
		t.Errorf("the provider got %d requests", n)
	}
}

// setCallLimits changes the limits that the watchdog enforces. No call may be running.
func (p *testProxy) setCallLimits(change func(*callLimits)) {
	p.instance.running.mu.Lock()
	defer p.instance.running.mu.Unlock()
	change(&p.instance.running.limits)
}

// dial opens a connection to the proxy that ends with the test.
func (p *testProxy) dial() *net.TCPConn {
	p.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(hangTimeout))
	return conn.(*net.TCPConn)
}

// sendRawHalfClose sends bytes, closes the client's sending side, and returns the answer.
func (p *testProxy) sendRawHalfClose(request string) string {
	p.t.Helper()
	conn := p.dial()
	_, _ = io.WriteString(conn, request)
	_ = conn.CloseWrite()
	b, _ := io.ReadAll(conn)
	return string(b)
}

// checkReleased waits until no call is running and no memory is reserved for one.
func (p *testProxy) checkReleased() {
	p.t.Helper()
	waitFor(p.t, "the calls to end", func() bool {
		return p.instance.running.count() == 0 && p.instance.proxy.bodies.used.Load() == 0
	})
}

// pace sleeps for d. It gives a slow client or provider its speed, and never waits for a condition.
func pace(d time.Duration) { time.Sleep(d) }

// countInPhase returns how many calls are in a phase.
func (p *testProxy) countInPhase(want phase) int64 {
	return p.instance.running.snapshot().phases[want].calls
}

// bytesReceived returns how much of their bodies the running calls have received.
func (p *testProxy) bytesReceived() (n int64) {
	p.instance.running.mu.Lock()
	defer p.instance.running.mu.Unlock()
	for c := range p.instance.running.calls {
		n += c.progress.bytesReceived.Load()
	}
	return n
}

// TestPublishedCallInfo: other goroutines see a call once it is published, and a published value never changes.
func TestPublishedCallInfo(t *testing.T) {
	t.Parallel()
	first, second := &upstream{id: "first"}, &upstream{id: "second"}
	c := &call{requestID: "req_1"}
	if c.setUpstream(first); c.info.Load() != nil {
		t.Fatal("the call is visible before its admission")
	}
	c.publish()
	seen := c.info.Load()
	if c.setUpstream(first); c.info.Load() != seen {
		t.Error("the same upstream replaces the published value")
	}
	c.setUpstream(second)
	if now := c.info.Load(); seen.upstream != first || now.upstream != second || now.requestID != "req_1" || c.upstream != second {
		t.Errorf("published %+v, then %+v", seen, now)
	}
}

// TestSlowBody: a body that stops is refused; a slow but steady one is not.
func TestSlowBody(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.setCallLimits(func(l *callLimits) { l.readWindow, l.minReadRate = 500*time.Millisecond, 1000 })
	body := chatBody(`"user":"` + strings.Repeat("u", 4000) + `"`)
	head := strings.TrimSuffix(p.rawChatRequest("Connection: close\r\n", body), body)

	trickle := p.dial()
	_, _ = io.WriteString(trickle, head+body[:3000]) // fast at first
	b, _ := io.ReadAll(trickle)
	if !strings.HasPrefix(string(b), "HTTP/1.1 400 ") || !strings.Contains(string(b), "request_too_slow") {
		t.Errorf("a body that stops: got %q", b)
	}
	p.checkReleased()

	// Over two windows, at 4 times the required rate. The watchdog gets times for which nobody has to wait.
	p.setCallLimits(func(l *callLimits) { l.readWindow, l.minReadRate = 10*time.Hour, 500/(10*time.Hour).Seconds() })
	steady, now := p.dial(), time.Now()
	_, _ = io.WriteString(steady, head)
	for sent := 200; sent < len(body); sent += 200 {
		_, _ = io.WriteString(steady, body[sent-200:sent])
		waitFor(t, "a part of the body", func() bool { return p.bytesReceived() == int64(sent) })
		now = now.Add(time.Hour)
		p.instance.running.enforce(now)
	}
	_, _ = io.WriteString(steady, body[(len(body)-1)/200*200:])
	if b, _ := io.ReadAll(steady); !strings.HasPrefix(string(b), "HTTP/1.1 200 ") {
		t.Errorf("a slow body: got %q", b)
	}
	p.checkReleased()
}

// TestSlowReader: a client that stops reading is cut off, and so is the provider's answer. Until then the proxy
// does not read ahead.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.setCallLimits(func(l *callLimits) { l.clientStallTimeout = 300 * time.Millisecond })
	sent := make(chan int, 1)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		event, n := chatEvents(true)[1], 0
		for c.chunk(strings.Repeat(event, 100)) == nil {
			n += 100 * len(event)
		}
		sent <- n
		return false
	})
	conn := p.dial()
	_, _ = io.WriteString(conn, p.rawChatRequest("", chatBody(`"stream":true`)))
	if n := <-sent; n > 64<<20 {
		t.Errorf("the provider could send %d bytes to a client that read none", n)
	}
	p.checkReleased()
	row := p.lastCall()
	if row.Outcome != "truncated" || row.ErrorCode != "client_stalled" ||
		row.UsageSource != "estimated" || row.OutputTokens == 0 {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestSilentProvider: no answer is a 504, an answer that stops is cut, and a slow one passes.
func TestSilentProvider(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"UPSTREAM_TIMEOUT": "1s", "STREAM_IDLE_TIMEOUT": "1s"})
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.waitClosed(hangTimeout)
		return false
	})
	if res := p.chat(); res.status != 504 || res.errorCode() != "upstream_timeout" {
		t.Errorf("no answer: got %d %s", res.status, res.body)
	}
	p.checkReleased()
	if row := p.lastCall(); row.Outcome != "upstream_error" || row.ErrorCode != "upstream_timeout" ||
		row.UsageSource != "estimated" || row.InputTokens == 0 {
		t.Errorf("no answer: the ledger has %+v", row)
	}

	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(true)[0])
		c.waitClosed(hangTimeout)
		return false
	})
	if res := p.chat(`"stream":true`); res.status != 200 || res.err == nil || res.body != chatEvents(true)[0] {
		t.Errorf("an answer that stops: got %d %q %v", res.status, res.body, res.err)
	}
	if row := p.lastCall(); row.Outcome != "truncated" || row.ErrorCode != "stream_idle" || row.UsageSource != "estimated" {
		t.Errorf("an answer that stops: the ledger has %+v", row)
	}

	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { // longer in total than either limit
		pace(300 * time.Millisecond)
		c.beginSSE()
		for _, e := range chatEvents(true) {
			_ = c.chunk(e)
			pace(300 * time.Millisecond)
		}
		return c.chunk("") == nil
	})
	if res := p.chat(`"stream":true`); res.err != nil || res.body != strings.Join(chatEvents(false), "") {
		t.Errorf("a slow answer: got %q %v", res.body, res.err)
	}
}

// TestUndetectedClientClose: net/http does not notice that a client left if the client sent one byte too many.
// The limit on the provider's silence then ends the call.
func TestUndetectedClientClose(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"UPSTREAM_TIMEOUT": "500ms"})
	called := make(chan struct{})
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		close(called)
		c.waitClosed(hangTimeout)
		return false
	})
	conn := p.dial()
	_, _ = io.WriteString(conn, p.rawChatRequest("", chatBody()))
	<-called
	_, _ = io.WriteString(conn, "G")
	conn.Close()
	p.checkReleased()
	if row := p.lastCall(); row.ErrorCode != "upstream_timeout" {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestStalledUpload: an upload that stops ends with its token, although the proxy is waiting for its client.
func TestStalledUpload(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	id, token := p.newToken(`"name":"up"`)
	conn := p.dial()
	_, _ = fmt.Fprintf(conn, "POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"+
		"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n--b\r\n", token)
	waitFor(t, "the upload", func() bool { return p.countInPhase(phaseProvider) == 1 })
	p.manage("DELETE", "/manage/tokens/"+id, "", 200, nil)
	elapsed := stopwatch(t)
	p.checkReleased()
	if d := elapsed(); d > time.Second {
		t.Errorf("the upload ended %v after the token was revoked", d)
	}
}

// TestNotSentTwice: a request that the provider has seen is not sent again, although net/http would do so for an
// Idempotency-Key or a reused connection.
func TestNotSentTwice(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]func(*providerConn) bool{
		"closed": func(*providerConn) bool { return false },
		"reset":  func(c *providerConn) bool { return c.reset() },
		"half a head": func(c *providerConn) bool {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nConte")
			return false
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			if res := p.chat(); res.status != 200 { // leaves a connection that can be reused
				t.Fatalf("got %d", res.status)
			}
			p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return cut(c) })
			res := p.do("POST", "/v1/chat/completions", chatBody(), "Authorization", "Bearer "+p.token,
				"Content-Type", "application/json", "Idempotency-Key", "k-1")
			if res.status != 502 {
				t.Errorf("got %d %s", res.status, res.body)
			}
			if n := len(p.provider.received()); n != 2 {
				t.Errorf("the provider got %d requests for 2 calls", n)
			}
			got := p.provider.lastRequest(t).header["Idempotency-Key"]
			if want := scopeIdempotencyKeys([]string{"k-1"}, p.project); !slices.Equal(got, want) {
				t.Errorf("the provider got the Idempotency-Key %v", got)
			}
			if row := p.lastCall(); row.Attempts != 1 || row.Outcome != "upstream_error" {
				t.Errorf("the ledger has %+v", row)
			}
		})
	}
}

// TestIdempotencyKeyPerProject: a provider that several projects share sees a different Idempotency-Key from each
// for the same key of their clients, and the same for a client's repetition.
func TestIdempotencyKeyPerProject(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	sent := func(token, key string) string {
		res := p.do("POST", "/v1/chat/completions", chatBody(), "Authorization", "Bearer "+token,
			"Content-Type", "application/json", "Idempotency-Key", key)
		got := p.provider.lastRequest(t).header["Idempotency-Key"]
		if res.status != 200 || len(got) != 1 || strings.Contains(got[0], key) {
			t.Fatalf("%d, the provider got %q", res.status, got)
		}
		return got[0]
	}
	_, sibling := p.newToken(`"name":"sibling"`)
	for _, key := range []string{"", " \t "} { // no key: every call would have the same one
		if res := p.postAs(p.token, "/v1/chat/completions", chatBody(), "Idempotency-Key", key); res.status != 200 {
			t.Fatal(res.status, res.body)
		}
		if got := p.provider.lastRequest(t).header["Idempotency-Key"]; len(got) > 0 {
			t.Errorf("for the key %q, the provider got %q", key, got)
		}
	}
	first, again, other := sent(p.token, "key-1"), sent(sibling, "key-1"), sent(p.token, "key-2")
	var project struct{ ID string }
	p.manage("POST", "/manage/projects", fmt.Sprintf(`{"name":"other","openai_api_key":%q}`, p.provider.key), 201, &project)
	p.project = project.ID
	_, foreign := p.newToken(`"name":"foreign"`)
	if shared := sent(foreign, "key-1"); first != again || first == other || first == shared {
		t.Errorf("the provider got %s, again %s, for another key %s, of another project %s", first, again, other, shared)
	}
}

// TestLongUpload: an upload may take longer than UPSTREAM_TIMEOUT as long as it makes progress.
func TestLongUpload(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"UPSTREAM_TIMEOUT": "1s"})
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	body, pieces := io.Pipe()
	go func() {
		for range 8 {
			if _, err := pieces.Write(make([]byte, 1000)); err != nil {
				return
			}
			pace(200 * time.Millisecond)
		}
		pieces.Close()
	}()
	req, err := http.NewRequestWithContext(t.Context(), "POST", p.url+"/v1/files", body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+p.token)
	req.Header.Set("Content-Type", "multipart/form-data; boundary=b")
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 200 || len(p.provider.lastRequest(t).body) != 8000 {
		t.Errorf("got %d, the provider %d bytes", res.StatusCode, len(p.provider.lastRequest(t).body))
	}
}

// TestTrickledUpload: an upload that is too slow ends, and not as the provider's fault.
func TestTrickledUpload(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	conn := p.dial()
	_, _ = fmt.Fprintf(conn, "POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"+
		"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n--b\r\n", p.token)
	waitFor(t, "the upload", func() bool { return p.countInPhase(phaseProvider) == 1 })
	p.setCallLimits(func(l *callLimits) { l.readWindow, l.minReadRate = 300*time.Millisecond, 1000 })
	p.checkReleased()
	if row := p.lastCall(); row.ErrorCode != "request_too_slow" || row.Outcome != "truncated" {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestStalledModelList: the limit for pauses also applies to the one answer that is read whole.
func TestStalledModelList(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"STREAM_IDLE_TIMEOUT": "500ms"})
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"models":["gpt*"]}}`, 200, nil)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
		c.waitClosed(hangTimeout)
		return false
	})
	res := p.do("GET", "/v1/models", "", "Authorization", "Bearer "+p.token)
	if res.status != 504 || res.errorCode() != "stream_idle" {
		t.Errorf("got %d %s", res.status, res.body)
	}
}

// TestConnectionLimit: connections beyond MAX_CONNECTIONS are closed at once, and a closed one makes room for
// another.
func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_CONNECTIONS": "3"})
	answered := func(conn net.Conn) bool {
		_, _ = io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
		b := make([]byte, 12)
		_, err := io.ReadFull(conn, b)
		return err == nil && string(b) == "HTTP/1.1 200"
	}
	var open []net.Conn
	waitFor(t, "three connections", func() bool { // a connection of the harness may still be closing
		conn := p.dial()
		if answered(conn) {
			open = append(open, conn)
		}
		return len(open) == 3
	})
	for range 5 {
		if answered(p.dial()) {
			t.Fatal("a fourth connection was served")
		}
	}
	for _, conn := range open {
		conn.Close()
	}
	waitFor(t, "room", func() bool { return answered(p.dial()) })
}

// TestMassAssignment: a field that an administrator may not set is refused, not ignored.
func TestMassAssignment(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	project := `"project_id":"` + p.project + `","name":"x"`
	for _, c := range []struct{ method, path, body string }{
		{"POST", "/manage/tokens", `{` + project + `,"is_admin":true}`},
		{"POST", "/manage/tokens", `{` + project + `,"request_count":0}`},
		{"POST", "/manage/tokens", `{` + project + `,"token":"sk-mine"}`},
		{"POST", "/manage/tokens", `{` + project + `,"id":"tok_mine"}`},
		{"POST", "/manage/tokens", `{` + project + `,"Max_Requests":1}`},
		{"POST", "/manage/tokens", `{` + project + `,` + project + `}`},
		{"POST", "/manage/tokens", `{` + project + `,"policy":{"stateful":true}}`},
		{"POST", "/manage/tokens", `{` + project + `,"policy":{"models":["a"],"Models":["b"]}}`},
		{"PATCH", "/manage/tokens/" + p.tokenID, `{"project_id":"` + p.project + `"}`},
		{"PATCH", "/manage/tokens/" + p.tokenID, `{"request_count":0}`},
		{"PATCH", "/manage/tokens/" + p.tokenID, `{"revoked_at":null}`},
		{"PATCH", "/manage/projects/" + p.project, `{"id":"proj_mine"}`},
		{"POST", "/manage/keys", `{"name":"x","role":"root"}`},
		{"POST", "/manage/keys", `{"name":"x","role":"admin","id":"environment"}`},
	} {
		if a := p.manageAs(p.adminKey, c.method, c.path, c.body); a.status != 400 {
			t.Errorf("%s %s %s: %d %s", c.method, c.path, c.body, a.status, a.body)
		}
	}
	var l struct{ Data []json.RawMessage }
	p.manage("GET", "/manage/tokens", "", 200, &l)
	if len(l.Data) != 1 {
		t.Errorf("there are %d tokens", len(l.Data))
	}
}

// TestHostileText: text with a meaning to a database, a terminal or a template is plain text, or refused.
func TestHostileText(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, s := range []string{`' OR '1'='1`, `"; DROP TABLE tokens; --`, `%`, `_`, `\`, `{{.}}`, `<script>`,
		"\u2028", "é\u0301", "a\x00b", "\xff\xfe", "\x1b[2J", strings.Repeat("x", 5000)} {
		header := strings.Map(func(r rune) rune { return max(r, ' ') }, s)
		p.expectRefused(s, p.chatAs(header), 401, "invalid_api_key")
		quoted, _ := json.Marshal(s)
		escaped := urlEscape(s)
		for _, c := range []struct{ method, path, body string }{
			{"POST", "/manage/tokens", `{"project_id":` + string(quoted) + `,"name":"x"}`},
			{"GET", "/manage/tokens/" + escaped, ""},
			{"GET", "/manage/tokens?project_id=" + escaped, ""},
			{"GET", "/manage/tokens?after=" + escaped, ""},
			{"GET", "/manage/requests/" + escaped, ""},
			{"GET", "/manage/usage?group_by=" + escaped, ""},
			{"GET", "/manage/projects?" + escaped + "=1", ""},
			{"DELETE", "/manage/projects/" + escaped, ""},
			{"PATCH", "/manage/keys/" + escaped, `{"name":"x"}`},
		} {
			if a := p.manageAs(p.adminKey, c.method, c.path, c.body); a.status != 400 && a.status != 404 {
				t.Errorf("%s %.60s: %d %s", c.method, c.path, a.status, a.body)
			}
		}
		a := p.manageAs(p.adminKey, "GET", "/manage/tokens?name="+escaped, "")
		if a.status != 200 || strings.Contains(a.body, p.tokenID) {
			t.Errorf("name=%q: %d %s", s, a.status, a.body)
		}
	}
	if a := p.chat(); a.status != 200 {
		t.Errorf("afterwards: %d %s", a.status, a.body)
	}
}

// urlEscape escapes every byte.
func urlEscape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		b.WriteString("%" + strings.ToUpper(hex.EncodeToString([]byte{s[i]})))
	}
	return b.String()
}

// TestPolicyOfToken: a token whose policy names one model and one endpoint can use no other.
func TestPolicyOfToken(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, token := p.newToken(`"name":"held","policy":{"models":["gpt-4o-mini"],"endpoints":["/v1/chat/completions"]}`)
	for _, c := range []struct{ path, body, code string }{
		{"/v1/chat/completions", `{"model":"gpt-4o","messages":[]}`, "model_not_allowed"},
		{"/v1/chat/completions", `{"model":"gpt-4o-mini ","messages":[]}`, "model_not_allowed"},
		{"/v1/chat/completions", `{"model":"GPT-4o-mini","messages":[]}`, "model_not_allowed"},
		{"/v1/chat/completions", `{"messages":[]}`, "model_not_allowed"},
		{"/v1/chat/completions", chatBody(`"models":["gpt-4o"]`), "model_not_allowed"},
		{"/v1/chat/completions", chatBody(`"route":"fallback","models":[]`), "model_not_allowed"},
		{"/v1/chat/completions", chatBody(`"fallbacks":["gpt-4o"]`), "model_not_allowed"},
		{"/v1/chat/completions", chatBody(`"context_window_fallbacks":[{"gpt-4o-mini":["gpt-4o"]}]`), "model_not_allowed"},
		{"/v1/chat/completions", chatBody(`"extra_body":{"model":"gpt-4o"}`), "model_not_allowed"},
		{"/v1/embeddings", `{"model":"gpt-4o-mini","input":"x"}`, "endpoint_not_allowed"},
		{"/v1/completions", `{"model":"gpt-4o-mini","prompt":"x"}`, "endpoint_not_allowed"},
	} {
		res := p.do("POST", c.path, c.body, "Authorization", "Bearer "+token, "Content-Type", "application/json")
		p.expectRefused(c.body, res, 403, c.code)
	}
	if a := p.chatAs(token, `"models":null`); a.status != 200 {
		t.Errorf("models null: %d %s", a.status, a.body)
	}
	if a := p.chat(`"models":["a","b"]`); a.status != 200 { // no policy lists models: forwarded as sent
		t.Errorf("without a list: %d %s", a.status, a.body)
	}
}

// TestWrongTokensLockNobodyOut: a valid token works however many wrong ones come from its address.
func TestWrongTokensLockNobodyOut(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	for range 200 {
		p.expectRefused("wrong", p.chatAs(p.unknownCredential(tokenPrefix)), 401, "invalid_api_key")
	}
	if a := p.chat(); a.status != 200 {
		t.Errorf("the valid token: %d %s", a.status, a.body)
	}
}

// TestStoreDown: without the database, a token that is not in memory is neither accepted nor called wrong.
func TestStoreDown(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	if err := p.instance.store.readDB.Close(); err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{p.token, p.unknownCredential(tokenPrefix)} {
		a := p.chatAs(token)
		p.expectRefused("well-formed", a, 503, "store_unavailable")
		if a.header.Get("Retry-After") == "" {
			t.Error("no Retry-After")
		}
	}
	p.expectRefused("malformed", p.chatAs("sk-x"), 401, "invalid_api_key")
	if a := p.manageAs(p.adminKey, "GET", "/manage/projects", ""); a.status != 503 {
		t.Errorf("/manage: %d %s", a.status, a.body)
	}
}

// TestUnknownTokensBounded: unknown tokens cost one look-up each, and a bounded amount of memory.
func TestUnknownTokensBounded(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	g, now := p.instance.registry, time.Now().UnixMilli()
	var hash [32]byte
	for i := range maxUnknownHashes + 500 {
		hash[0], hash[1], hash[2] = byte(i), byte(i>>8), 1
		if _, _, err := g.lookup(t.Context(), hash, now); err != errUnknownToken {
			t.Fatal(err)
		}
		if len(g.unknownHashes) > maxUnknownHashes {
			t.Fatalf("%d hashes are stored", len(g.unknownHashes))
		}
	}
	if n := len(g.byID); n > 1 {
		t.Errorf("%d tokens are live", n)
	}
	p.allowErrors = true
	p.instance.store.readDB.Close() // a second look-up would fail
	if _, _, err := g.lookup(t.Context(), hash, now); err != errUnknownToken {
		t.Errorf("the second time: %v", err)
	}
}

// TestBodyBuffers: the buffers for a body grow to its exact size with little garbage, but never far ahead of what
// has come.
func TestBodyBuffers(t *testing.T) {
	t.Parallel()
	for _, declared := range []int64{0, 1, 1000, 64<<10 - 1, 64 << 10, 100_000, 512 << 10, 1 << 20, 4_100_000, 32 << 20, 1 << 30} {
		var garbage, have, size int64
		for have < declared+1 {
			garbage += have
			if size = bodyBufferSize(declared, have); size <= have || size > max(64<<10, 8*have) {
				t.Fatalf("%d declared, %d have come: a buffer of %d", declared, have, size)
			}
			have = size
		}
		if size != declared+1 || garbage > declared/6 {
			t.Errorf("%d declared: the last buffer has %d bytes, the others %d", declared, size, garbage)
		}
	}
	for have := int64(0); have < 1<<30; {
		size := bodyBufferSize(-1, have)
		if size <= have || size > max(64<<10, 2*have) {
			t.Fatalf("no length declared, %d have come: a buffer of %d", have, size)
		}
		have = size
	}
}

// TestDeclaredLengthReservesLittle: a client that declares a long body and sends little of it has little memory; a
// whole body has as much as it needs.
func TestDeclaredLengthReservesLittle(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_BODY_BYTES": "4MiB"})
	answer := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool { <-answer; return chatScript(c, r) })
	body := chatBody(`"user":"` + strings.Repeat("x", 3<<20) + `"`)
	used := func() int64 { return p.instance.proxy.bodies.used.Load() }
	conn := p.dial()
	_, _ = io.WriteString(conn, p.rawChatRequest("", body)[:2000])
	waitFor(t, "the first bytes", func() bool { return used() > 0 })
	if n := used(); n > 64<<10 {
		t.Errorf("%d bytes are reserved for less than 2,000", n)
	}
	_, _ = io.WriteString(conn, p.rawChatRequest("", body)[2000:])
	waitFor(t, "the call at the provider", func() bool { return len(p.provider.received()) == 1 })
	if n := used(); n != int64(len(body))+1 {
		t.Errorf("%d bytes are reserved for a body of %d", n, len(body))
	}
	close(answer)
	if b := make([]byte, 12); true {
		if _, err := io.ReadFull(conn, b); err != nil || string(b) != "HTTP/1.1 200" {
			t.Errorf("got %q, %v", b, err)
		}
	}
}

// TestMemoryOfTokenComesBack: after any mix of calls a token's share of BODY_MEMORY is 0 again, neither more
// nor less: bodies with another model's name, buffered streams and stored content are in it, too. finish, which
// every test calls, checks the same.
func TestMemoryOfTokenComesBack(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_BODY_BYTES": "64KiB", "BODY_MEMORY": "1MiB"})
	p.allowErrors = true
	p.enableContent()
	p.allowSecret(promptCanary) // stored content
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"rewrite":{"alias":"a"}}`, 200, nil)
	second, _ := p.addUpstream(`"priority":1,"rewrite":{"alias":"b"}`)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		switch {
		case strings.Contains(r.body, "fail"):
			return c.reply(500, `{"error":{"message":"no"}}`)
		case strings.Contains(r.body, "cut"):
			c.beginSSE()
			_ = c.chunk(chatEvents(false)[0])
			return false
		}
		return chatScript(c, r)
	})
	second.setScript(chatScript)
	pad := `"user":"` + strings.Repeat("x", 40<<10) + `"`
	verified := []string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json",
		"X-LLM-Proxy-Stream", "verified"}
	alias := func(members ...string) string {
		return strings.Replace(chatBody(append(members, pad)...), "gpt-4o-mini", "alias", 1)
	}
	bodies := []string{alias(), alias(`"metadata":{"do":"fail"}`), chatBody(`"stream":true`, pad),
		alias(`"stream":true`), alias(`"stream":true`, `"metadata":{"do":"cut"}`), chatBody(pad, pad), "{"}
	live := func() *liveToken { return p.instance.registry.liveToken(p.tokenID) }
	var clients sync.WaitGroup
	for client := range 4 {
		clients.Go(func() {
			for i := range 5 * len(bodies) {
				p.do("POST", "/v1/chat/completions", bodies[(i*(client+1)+client)%len(bodies)], verified...)
				if n := live().bodyBytes.Load(); n < 0 {
					t.Errorf("the share is %d bytes", n)
				}
			}
		})
	}
	clients.Wait()
	if p.waitSettled(); live().bodyBytes.Load() != 0 || p.instance.proxy.bodies.used.Load() != 0 {
		t.Errorf("%d bytes are still reserved for the token, %d in all",
			live().bodyBytes.Load(), p.instance.proxy.bodies.used.Load())
	}
	if held := second.received(); len(held) == 0 {
		t.Error("no call was sent again")
	}
}

// TestUnreadBodyHasDeadline: a client that stops sending its body cannot keep the connection once it has its
// answer, whoever gave the answer: the proxy itself, or a provider that answers an upload before it has ended.
func TestUnreadBodyHasDeadline(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	t.Cleanup(func() { l.Close(); serving.Wait() })
	serving.Go(func() { // a provider that answers as soon as it has a request's head
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				head, err := http.ReadRequest(bufio.NewReader(conn))
				if err != nil {
					return
				}
				_, _ = io.WriteString(conn, "HTTP/1.1 "+head.Header.Get("X-Stainless-Answer")+"\r\n"+
					"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
				if head.Header.Get("X-Stainless-Close") == "" {
					_, _ = io.Copy(io.Discard, conn)
				}
			})
		}
	})
	p := newTest(t, map[string]string{"OPENAI_API_URL": "http://" + l.Addr().String()})
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	own, files := "GET "+ownTokenPath, "POST /v1/files"
	sized, chunked := "Content-Length: 10\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n"
	upload := "Content-Type: multipart/form-data; boundary=b\r\nX-Stainless-Answer: "
	var clients sync.WaitGroup
	for _, request := range []string{
		own + "|" + sized, own + "|" + chunked, own + "|" + chunked + "3\r\nabc\r\n",
		"POST " + ownTokenPath + "|" + sized, "GET /v1/models|" + sized + "{}", "GET /v1/nothing|" + chunked,
		files + "|" + upload + "200 OK\r\n" + chunked + "5\r\n--b\r\n\r\n",
		files + "|" + upload + "400 No\r\n" + chunked + "5\r\n--b\r\n\r\n",
		files + "|" + upload + "400 No\r\nX-Stainless-Close: 1\r\n" + chunked + "5\r\n--b\r\n\r\n",
		files + "|" + upload + "200 OK\r\nContent-Length: 100000\r\n\r\n--b\r\n",
		files + "|" + upload + "413 No\r\nX-Stainless-Close: 1\r\nContent-Length: 100000\r\n\r\n--b\r\n",
	} {
		clients.Go(func() {
			line, rest, _ := strings.Cut(request, "|")
			conn := p.dial()
			elapsed := stopwatch(t)
			_, _ = io.WriteString(conn, line+" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "+p.token+"\r\n"+rest)
			_ = conn.SetReadDeadline(time.Now().Add(hangTimeout))
			b, err := io.ReadAll(conn)
			if err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 ") {
				t.Errorf("%q: got %q, %v", request, b, err)
			}
			if d := elapsed(); d > 5*time.Second {
				t.Errorf("%q: the connection was open for %v", request, d)
			}
		})
	}
	clients.Wait()
	p.waitSettled()
}

// TestRequestsOfRealClients: what SDKs and browsers send, and a proxy need not understand, does not end a call.
func TestRequestsOfRealClients(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	claude, _ := p.addClaude(`"priority":1`, chatScript)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	held := `"name":"held","policy":{"models":["gpt-4o","claude*"]}`
	_, heldToken := p.newToken(held)
	message := `{"model":"claude-sonnet-4-5","max_tokens":10,"messages":[{"role":"user","content":"Hi"}]}`
	form := func(file string) string {
		return multipartBody("model=gpt-4o-transcribe", `Content-Disposition: form-data; name="file"; filename="`+file+
			"\"\r\nContent-Type: audio/mpeg|\xff\xf3")
	}
	const json = "application/json"
	for name, test := range map[string]struct {
		line, lines, contentType, body string
		status                         int
		target                         string // at the provider
	}{
		"an offer of HTTP/2": {line: "POST /v1/chat/completions", body: chatBody(), contentType: json, status: 200,
			lines: "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\nUpgrade: h2c\r\n" +
				"Authorization: Bearer TOKEN\r\n",
			target: "/v1/chat/completions"},
		"an empty x-api-key": {line: "POST /v1/messages", body: message, contentType: json, status: 200,
			lines: "X-Api-Key: \r\nAuthorization: Bearer TOKEN\r\n", target: "/v1/messages"},
		"an empty bearer token": {line: "POST /v1/messages", body: message, contentType: json, status: 200,
			lines: "X-Api-Key: TOKEN\r\nAuthorization: Bearer \r\n", target: "/v1/messages"},
		"an empty api-key and Authorization": {line: "POST /v1/messages", body: message, contentType: json, status: 200,
			lines: "X-Api-Key: TOKEN\r\nAuthorization:\r\nApi-Key:\t\r\n", target: "/v1/messages"},
		"empty credentials only": {line: "POST /v1/messages", body: message, contentType: json, status: 401,
			lines: "X-Api-Key: \r\nAuthorization: Bearer\r\n"},
		"another scheme beside a token": {line: "POST /v1/messages", body: message, contentType: json, status: 401,
			lines: "X-Api-Key: TOKEN\r\nAuthorization: Basic eDp5\r\n"},
		"a semicolon in a file's name": {line: "POST /v1/audio/transcriptions", body: form("Meeting; part 1.mp3"),
			contentType: formContentType, status: 200, target: "/v1/audio/transcriptions"},
		"a backslash in a file's name": {line: "POST /v1/audio/transcriptions", body: form(`a\b.mp3`),
			contentType: formContentType, status: 200, target: "/v1/audio/transcriptions"},
		"a file's name with another name in it": {line: "POST /v1/audio/transcriptions", body: form("a; name=model"),
			contentType: formContentType, status: 400},
		"charset=utf8": {line: "POST /v1/chat/completions", body: chatBody(), contentType: json + "; charset=utf8",
			status: 200, target: "/v1/chat/completions"},
		"a model in a path": {line: "GET /v1/models/claude-opus-4-6%5B1m%5D", status: 200,
			target: "/v1/models/claude-opus-4-6%5B1m%5D"},
		"a model's raw characters": {line: "GET /v1/models/a(1)%20[x]+%C3%A9!", status: 200,
			target: "/v1/models/a(1)%20[x]+%C3%A9!"},
		"a model's parentheses": {line: "GET /v1/models/a(1)", status: 200, target: "/v1/models/a(1)"},
		"a model that the policy allows": {line: "GET /v1/models/claude%5B1m%5D", status: 200,
			lines: "X-Api-Key: HELD\r\n", target: "/v1/models/claude%5B1m%5D"},
		"one that it does not allow": {line: "GET /v1/models/gpt-4o%5B1m%5D", lines: "X-Api-Key: HELD\r\n", status: 403},
		"stored completions": {line: "GET /v1/chat/completions?limit=1&model=gpt-4o&metadata[key]=value", status: 200,
			lines: "X-Api-Key: HELD\r\n", target: "/v1/chat/completions?limit=1&model=gpt-4o&metadata[key]=value"},
		"stored completions of another model": {line: "GET /v1/chat/completions?model=o1", status: 403,
			lines: "X-Api-Key: HELD\r\n"},
	} {
		before := len(p.provider.received()) + len(claude.received())
		lines := strings.NewReplacer("TOKEN", p.token, "HELD", heldToken).Replace(test.lines)
		if lines == "" {
			lines = "Authorization: Bearer " + p.token + "\r\n"
		}
		if test.contentType != "" {
			lines += fmt.Sprintf("Content-Type: %s\r\nContent-Length: %d\r\n", test.contentType, len(test.body))
		}
		got := p.sendRaw(test.line + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + lines + "\r\n" + test.body)
		if !strings.HasPrefix(got, fmt.Sprintf("HTTP/1.1 %d ", test.status)) {
			t.Errorf("%s: got %q", name, got)
		}
		all := append(p.provider.received(), claude.received()...)
		if test.target == "" {
			if len(all) != before {
				t.Errorf("%s: a provider got it", name)
			}
			continue
		}
		if len(all) != before+1 || !slices.ContainsFunc(all, func(r recordedRequest) bool {
			return r.target == test.target && r.body == test.body
		}) {
			t.Errorf("%s: the providers got %d requests more, none of them as sent", name, len(all)-before)
		}
	}
}

// TestWrongBaseURL: the answer to a call with a wrong base URL names the path and says which base URL is right; a key of
// the wrong kind is told so, in words that are the same for every refused key.
func TestWrongBaseURL(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, c := range []struct{ path, code, names string }{
		{"/chat/completions", "unknown_url", "The path is /chat/completions."},
		{"/messages", "unknown_url", "The path is /messages."},
		{"/v1/v1/chat/completions", "unknown_endpoint", "The path is /v1/v1/chat/completions."},
		{"/v1/v1/messages", "unknown_endpoint", "The path is /v1/v1/messages."},
		{"/v1//chat/completions", "unknown_endpoint", "The path is /v1//chat/completions."},
		{"//v1/chat/completions", "unknown_url", "The path is //v1/chat/completions."},
		{"/v1/chat/completions/", "unknown_endpoint", "The path is /v1/chat/completions/."},
		{"/openai/v1/responses", "unknown_url", "The path is /openai/v1/responses."},
		{"/v1/" + p.token, "unknown_endpoint", ""},
		{"/" + p.token + "/v1/messages", "unknown_url", ""},
		{"/v1/%3Cscript%3E", "unknown_endpoint", "The path is /v1/%3Cscript%3E."},
		{"/v1alpha/models/gemini-pro:predict", "unknown_url", "The path is /v1alpha/models/gemini-pro:predict."},
		{"/v1/models/a;b@c/x", "unknown_endpoint", "The path is /v1/models/a;b@c/x."},
		{"/v1/models/%C3%A9%20%2F..%2F", "unknown_endpoint", "The path is /v1/models/%C3%A9%20%2F..%2F."},
		{"/v1/" + strings.Replace(p.token, "-", "%2D", 1), "unknown_endpoint", ""},
		{"/v1/" + strings.Repeat("x", 300), "unknown_endpoint", ""},
	} {
		res := p.post(c.path, "application/json", chatBody())
		if res.status != 404 || res.errorCode() != c.code || !strings.Contains(res.body, "with /v1 for OpenAI's SDKs, without") ||
			strings.Contains(res.body, "The path is") != (c.names != "") || !strings.Contains(res.body, c.names) {
			t.Errorf("%.100s: got %d %s", c.path, res.status, res.body)
		}
	}
	if res := p.do("GET", "/manage/nothing", "", "Authorization", "Bearer "+p.adminKey); res.status != 404 ||
		strings.Contains(res.body, "SDK") {
		t.Errorf("/manage: got %d %s", res.status, res.body)
	}
	wrong := p.chatAs("sk-x")
	res := p.chatAs(p.adminKey)
	if res.status != 401 || res.body != wrong.body || !strings.Contains(res.body, "Management keys are for /manage only") {
		t.Errorf("a management key: got %d %s, any other %s", res.status, res.body, wrong.body)
	}
	if !strings.Contains(string(p.log.bytes()), `"code":"management key"`) {
		t.Error("the log does not say that a management key was sent")
	}
	if res := p.manageAs(p.token, "GET", "/manage/projects", ""); res.status != 401 ||
		!strings.Contains(res.body, "Tokens are for /v1 only") {
		t.Errorf("a token on /manage: got %d %s", res.status, res.body)
	}
}

// TestAzureVersion: Azure's own query parameter goes to Azure's upstreams only, and a call that goes to another one first
// is told so.
func TestAzureVersion(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	const path = "/v1/chat/completions?api-version=preview"
	res := p.post(path, "application/json", chatBody())
	if res.status != 400 || !strings.Contains(res.body, `"param":"api-version"`) || !strings.Contains(res.body, "azure") {
		t.Errorf("no upstream of azure: got %d %s", res.status, res.body)
	}
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"priority":1}`, 200, nil)
	azure := newFakeProvider(t)
	p.secrets = append(p.secrets, azure.key)
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams",
		fmt.Sprintf(`{"name":"a","provider":"azure","api_key":%q,"base_url":%q}`, azure.key, azure.url), 201, nil)
	if res := p.post(path, "application/json", chatBody()); res.status != 200 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	if got := azure.lastRequest(t).target; !strings.HasSuffix(got, "/chat/completions?api-version=preview") {
		t.Errorf("azure got %s", got)
	}
	azure.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(500, `{}`) })
	if res := p.post(path+"&beta=%74rue", "application/json", chatBody()); res.status != 200 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	if got := p.provider.lastRequest(t).target; got != "/chat/completions?beta=%74rue" &&
		got != "/v1/chat/completions?beta=%74rue" {
		t.Errorf("the other upstream got %s", got)
	}
}

// TestBodyOfGetAndDelete: a GET, HEAD or DELETE with a body that would not be forwarded is refused, empty ones are
// ignored, and either way the connection can be used again, however the body is framed and wherever the call ends.
func TestBodyOfGetAndDelete(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(200, "{}") })
	length := func(body string) string { return fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body) }
	chunked := func(body string) string {
		return fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body)
	}
	long := strings.Repeat("x", 200_000) // less than the 256 KiB that net/http reads to keep a connection
	for _, c := range []struct {
		rest   string
		status string
	}{
		{length(""), "200"}, {length("{}"), "200"}, {chunked("{}"), "200"}, {"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "200"},
		{length(`{"a":1}`), "400"}, {chunked(`{"a":1}`), "400"}, {length(long), "400"}, {chunked(long), "400"},
		{length("GET /v1/models/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"), "400"},
	} {
		for _, target := range []string{"GET /v1/models/a", "GET /v1/files", "DELETE /v1/files/f", "DELETE /v1/models/a",
			"HEAD /v1/models/a", "GET " + ownTokenPath, "GET /v1/nothing", "DELETE /v1/embeddings"} {
			status := c.status
			switch _, path, _ := strings.Cut(target, " "); path {
			case ownTokenPath: // the body says nothing
				status = "200"
			case "/v1/nothing":
				status = "404"
			case "/v1/embeddings":
				status = "405"
			}
			head := target + " HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token +
				"\r\nContent-Type: application/json\r\n"
			got := p.sendRaw(head + c.rest + "GET " + ownTokenPath + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" +
				"Authorization: Bearer " + p.token + "\r\n\r\n")
			first, second := strings.Index(got, "HTTP/1.1 "+status+" "), strings.LastIndex(got, "HTTP/1.1 200 OK\r\n")
			answers := strings.Count(got, "HTTP/1.1 ")
			if strings.HasPrefix(c.rest, "Transfer-Encoding") { // the last request of its connection, see TestBothFramings
				if first != 0 || answers != 1 || !strings.Contains(got, "\r\nConnection: close\r\n") {
					t.Errorf("%s with %.60q: want %s and the end, got %.800q", target, c.rest, status, got)
				}
				continue
			}
			if first != 0 || second <= 0 || answers != 2 {
				t.Errorf("%s with %.60q: want %s and then 200, got %.800q", target, c.rest, status, got)
			}
		}
	}
	for _, r := range p.provider.received() {
		if r.body != "" || strings.Contains(r.target, "smuggled") {
			t.Errorf("the provider got %q", r.head+r.body)
		}
	}
}
