// Bodies: sizes, encodings, types, forms, and JSON that two parsers could read
// in two ways. What goes up are the bytes that were checked. (The readers by
// themselves: callbody_test.go, callform_test.go.)
package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// post sends a body as it is to a path, with the test's token.
func (p *testProxy) post(path, contentType, body string, headers ...string) answer {
	p.t.Helper()
	return p.do("POST", path, body, append([]string{"Authorization", "Bearer " + p.token, "Content-Type", contentType}, headers...)...)
}

// TestBodySize: the limit itself passes, one byte more does not, and a declared
// size is not waited for.
func TestBodySize(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	p := newTest(t, map[string]string{"MAX_BODY_BYTES": "64KiB"})
	pad := func(n int) string {
		return strings.Replace(chatBody(), "{", "{"+strings.Repeat(" ", n-len(chatBody())), 1)
	}
	if a := p.post("/v1/chat/completions", "application/json", pad(limit)); a.status != 200 || p.provider.last(t).body != pad(limit) {
		t.Errorf("the limit: got %d %s", a.status, a.body)
	}
	if a := p.post("/v1/chat/completions", "application/json", pad(limit+1)); a.status != 413 || a.code() != "request_too_large" {
		t.Errorf("one more: got %d %s", a.status, a.body)
	}
	head := "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token + "\r\nContent-Type: application/json\r\n"
	if got := p.raw(head + "Content-Length: 1099511627776\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 413 ") || !strings.Contains(got, "\r\nConnection: close\r\n") {
		t.Errorf("1 TiB declared: got %q", got)
	}
	endless := strings.Repeat("1000\r\n"+strings.Repeat(" ", 0x1000)+"\r\n", 2*limit/0x1000)
	if got := p.raw(head + "Transfer-Encoding: chunked\r\n\r\n" + endless); got != "" && !strings.HasPrefix(got, "HTTP/1.1 413 ") {
		t.Errorf("endless chunks: got %q", got)
	}
	p.settle()
	if n := p.in.bodies.used.Load(); n != 0 || len(p.provider.got()) != 1 {
		t.Errorf("%d bytes are still held; %d requests went up", n, len(p.provider.got()))
	}
}

// TestBodyMemory: bodies together take no more than is allowed; who comes on
// top is told to come again.
func TestBodyMemory(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_BODY_BYTES": "1MiB", "BODY_MEMORY": "1MiB"})
	p.allowErrors = true
	if !p.in.bodies.reserve(1<<20 - 50) {
		t.Fatal("no memory at all")
	}
	if a := p.chat(); a.status != 503 || a.code() != "body_memory_full" || a.header.Get("Retry-After") == "" {
		t.Errorf("got %d %s", a.status, a.body)
	}
	p.in.bodies.release(1<<20 - 50)
	if a := p.chat(); a.status != 200 {
		t.Errorf("got %d %s", a.status, a.body)
	}
	p.settle()
	if n := p.in.bodies.used.Load(); n != 0 {
		t.Errorf("%d bytes are still held", n)
	}
}

// TestStrangersUploadNothing: without a token not a byte of the body is read.
func TestStrangersUploadNothing(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, path := range []string{"/v1/chat/completions", "/v1/files", "/manage/projects"} {
		got := p.raw("POST " + path + " HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer x\r\nContent-Type: application/json\r\nContent-Length: 1073741824\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 401 ") {
			t.Errorf("%s: got %q", path, got)
		}
	}
}

// TestStalledStrangers: who is refused gets the answer soon, also when the rest
// of the body never comes, and the connection is closed.
func TestStalledStrangers(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	conns := map[string]net.Conn{}
	for name, request := range map[string]string{
		"no token":    "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
		"wrong token": "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nContent-Length: 1000\r\n\r\nabc",
		"wrong path":  "POST /v1/nothing HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token + "\r\nContent-Length: 1000\r\n\r\n",
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, request)
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		conns[name] = conn
	}
	for name, conn := range conns {
		b, err := io.ReadAll(conn)
		if err != nil || !bytes.HasPrefix(b, []byte("HTTP/1.1 40")) {
			t.Errorf("%s: got %q, %v", name, b, err)
		}
	}
}

// TestJSONHasOneReading: what two parsers could read differently is refused.
func TestJSONHasOneReading(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, token := p.newToken(`"name":"held","policy":{"models":["gpt-4o-mini"]}`)
	long := strings.Repeat("x", 1<<20)
	for _, body := range []string{
		`{"model":"gpt-4o-mini","model":"gpt-4o"}`, `{"model":"gpt-4o","model":"gpt-4o-mini"}`, `{"model":"gpt-4o-mini","MODEL":"gpt-4o"}`, `{"Model":"gpt-4o-mini"}`,
		`{"model":"gpt-4o-mini","mo\u0064el":"gpt-4o"}`, `{"model":"gpt-4o-mini","\u004dodel":"gpt-4o"}`, `{"model":"gpt-4o-mini\u0000"}`,
		"\xef\xbb\xbf" + chatBody(), "{\x00\"\x00m\x00", "\xff\xfe{\x00}\x00", "\x00" + chatBody(), chatBody() + "{}", chatBody() + "\x00", chatBody() + `{"model":"gpt-4o"}`,
		`{"model":"gpt-4o-mini"/*,"model":"gpt-4o"*/}`, `{"model":"gpt-4o-mini",}`, `{"model":'gpt-4o-mini'}`, `{model:"gpt-4o-mini"}`, `{"model":"gpt-4o-mini","x":NaN}`,
		`{"model":["gpt-4o-mini"]}`, `{"model":1}`, `{"model":{"id":"gpt-4o"}}`, `{"model":"` + long + `"}`, `{"x":` + strings.Repeat("[", 100_000) + `}`,
		`{"x":` + strings.Repeat(`{"x":`, 1000) + "1" + strings.Repeat("}", 1001), "", "null", "[]", `"x"`, "1", strings.Repeat(" ", 10<<20), `[{"model":"gpt-4o-mini"}]`,
		"model=gpt-4o-mini", `{"model":"gpt-4o-mini` + "\n" + `"}`, `{"stream":"yes","model":"gpt-4o-mini"}`, "{\"model\":\"gpt-4o-mini\",\"x\":\"\xc0\xaf\"}",
	} {
		if a := p.do("POST", "/v1/chat/completions", body, "Authorization", "Bearer "+token, "Content-Type", "application/json"); a.status != 400 || a.code() == "" || len(a.body) > 1000 {
			t.Errorf("%.80q: got %d %.300s", body, a.status, a.body)
		}
	}
	if a := p.do("POST", "/v1/chat/completions", `{"model":null}`, "Authorization", "Bearer "+token, "Content-Type", "application/json"); a.status != 400 {
		t.Errorf("no model: %d", a.status)
	}
	if n := len(p.provider.got()); n > 0 {
		t.Fatalf("%d requests went up", n)
	}
	// What has one reading goes up as it is, also where the spelling is odd.
	for _, body := range []string{
		`{"mo\u0064el":"gpt\u002d4o-mini","messages":[]}`, "\t{\r\n\"model\" : \"gpt-4o-mini\" }\n", `{"x":{"model":"gpt-4o","MODEL":1},"model":"gpt-4o-mini"}`,
	} {
		a := p.do("POST", "/v1/chat/completions", body, "Authorization", "Bearer "+token, "Content-Type", "application/json")
		var up struct{ Model string }
		if a.status != 200 || p.provider.last(t).body != body || json.Unmarshal([]byte(body), &up) != nil && up.Model != "gpt-4o-mini" {
			t.Errorf("%q: got %d %s", body, a.status, a.body)
		}
	}
}

// TestRequestEncoding: limits must be able to read a body, so it is not
// inflated, nor passed on unread.
func TestRequestEncoding(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	_, _ = z.Write(make([]byte, 8<<20))
	_ = z.Close()
	for _, encoding := range []string{"gzip", "GZIP", "br", "zstd", "deflate", "gzip, gzip", "identity, gzip", "x-gzip", "compress", "aws-chunked", "unknown", " , "} {
		for _, body := range []string{chatBody(), bomb.String()} {
			a := p.post("/v1/chat/completions", "application/json", body, "Content-Encoding", encoding)
			p.refused(encoding, a, 415, "unsupported_encoding")
		}
	}
	if a := p.post("/v1/chat/completions", "application/json", chatBody(), "Content-Encoding", "Identity"); a.status != 200 || p.provider.last(t).header["Content-Encoding"] != nil {
		t.Errorf("identity: got %d %s", a.status, a.body)
	}
}

// TestContentTypes: a type that is not the endpoint's is no way around what is
// read from its body.
func TestContentTypes(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, kind := range []string{"", "text/plain", "text/json", "application/x-www-form-urlencoded", "application/xml", "application/json+x", "application/jsonl", "json",
		"application/json, text/plain", "application/json; charset=utf-16", "application/json; charset=utf-7", "application/json; charset=\"UTF-32\"", "application/json;;;",
		"application/json; charset=utf-8; charset=utf-7", "multipart/form-data; boundary=xyz", "multipart/mixed; boundary=xyz", "*/*", "application/json; charset"} {
		headers := []string{"Content-Type", kind}
		if kind == "" {
			headers = nil
		}
		p.refused(kind, p.do("POST", "/v1/chat/completions", chatBody(), append(headers, "Authorization", "Bearer "+p.token)...), 415, "unsupported_content_type")
	}
	for _, kind := range []string{"application/json", "APPLICATION/JSON", "application/json; charset=utf-8", "application/json;charset=\"UTF-8\"", "application/json; profile=x"} {
		if a := p.post("/v1/chat/completions", kind, chatBody()); a.status != 200 || p.provider.last(t).header.Get("Content-Type") != kind {
			t.Errorf("%s: got %d %s", kind, a.status, a.body)
		}
		_, held := p.newToken(`"name":"held","policy":{"models":["other"]}`)
		if a := p.do("POST", "/v1/chat/completions", chatBody(), "Authorization", "Bearer "+held, "Content-Type", kind); a.status != 403 {
			t.Errorf("%s: a model that is not allowed: %d", kind, a.status)
		}
	}
}

// TestForms: the model of a form is read as strictly, and its size limited.
func TestForms(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_BODY_BYTES": "1MiB"})
	_, token := p.newToken(`"name":"held","policy":{"models":["whisper-1"]}`)
	const at, disp = "/v1/audio/transcriptions", "Content-Disposition: form-data; "
	file := disp + "name=\"file\"; filename=\"a.mp3\"\r\nContent-Type: audio/mpeg|ID3\x00\xff"
	good := form("model=whisper-1", file)
	for _, c := range []struct {
		name, kind, body string
		status           int
	}{
		{"model twice", formType, form("model=whisper-1", "model=gpt-4o", file), 400},
		{"model as a file", formType, form(disp + "name=\"model\"; filename=\"x\"|whisper-1"), 400},
		{"another model", formType, form("model=gpt-4o", file), 403},
		{"no model", formType, form(file), 403},
		{"models too", formType, form("model=whisper-1", "models=gpt-4o", file), 403},
		{"model[]", formType, form("model=whisper-1", "model[]=gpt-4o"), 400},
		{"Model", formType, form("model=whisper-1", "Model=gpt-4o"), 400},
		{"no end", formType, strings.TrimSuffix(good, "--\r\n"), 400},
		{"text before", formType, "preamble\r\n" + good, 400},
		{"text after", formType, good + "--xyz\r\n" + disp + "name=\"model\"\r\n\r\ngpt-4o\r\n--xyz--", 400},
		{"two boundaries", formType + "; boundary=abc", good, 415},
		{"huge boundary", "multipart/form-data; boundary=" + strings.Repeat("x", 10_000), good, 400},
		{"no boundary", "multipart/form-data", good, 400},
		{"many parts", formType, form(strings.Split(strings.Repeat("a=1 ", 5000), " ")...), 400},
		{"huge part header", formType, form(disp + "name=\"" + strings.Repeat("a", 100_000) + "\"|x"), 400},
		{"too large", formType, form("model=whisper-1", disp+"name=\"file\"; filename=\"a\"|"+strings.Repeat("x", 1<<20)), 413},
		{"JSON", "application/json", `{"model":"whisper-1"}`, 415},
	} {
		if a := p.do("POST", at, c.body, "Authorization", "Bearer "+token, "Content-Type", c.kind); a.status != c.status && (c.status != 413 || a.err == nil) { // a client may lose the 413 while it sends
			t.Errorf("%s: got %d %s %v, want %d", c.name, a.status, a.body, a.err, c.status)
		}
	}
	if n := len(p.provider.got()); n > 0 {
		t.Fatalf("%d requests went up", n)
	}
	if a := p.do("POST", at, good, "Authorization", "Bearer "+token, "Content-Type", formType); a.status != 200 || p.provider.last(t).body != good || p.provider.last(t).header.Get("Content-Type") != formType {
		t.Errorf("a good form: got %d %s", a.status, a.body)
	}
}

// TestUnscannedUploadsHeldToModels: uploads are streamed unread, so who is held
// to certain models cannot name one there.
func TestUnscannedUploadsHeldToModels(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	_, token := p.newToken(`"name":"held","policy":{"models":["sora-2"]}`)
	body := form("model=sora-2", "prompt=x")
	p.refused("videos", p.do("POST", "/v1/videos", body, "Authorization", "Bearer "+token, "Content-Type", formType), 403, "model_not_allowed")
	p.refused("realtime", p.do("POST", "/v1/realtime/calls", "v=0", "Authorization", "Bearer "+token, "Content-Type", "application/sdp"), 403, "model_not_allowed")
	if a := p.post("/v1/videos", formType, body); a.status != 200 || p.provider.last(t).body != body {
		t.Errorf("without a list: %d %s", a.status, a.body)
	}
	if a := p.post("/v1/realtime/calls", "application/sdp", "v=0"); a.status != 200 || p.provider.last(t).body != "v=0" || p.provider.last(t).header.Get("Content-Type") != "application/sdp" {
		t.Errorf("without a list: %d %s", a.status, a.body)
	}
}

// TestBodyWhereNoneGoes: a body that would not be forwarded is refused rather
// than dropped.
func TestBodyWhereNoneGoes(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	auth := []string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json"}
	for _, body := range []string{`{"a":1}`, `{}{}`, "x", strings.Repeat(" ", 100), strings.Repeat("x", 1<<10), "[]", "null"} {
		for _, c := range [][2]string{{"POST", "/v1/batches/b/cancel"}, {"GET", "/v1/models"}, {"DELETE", "/v1/files/f"}} {
			p.refused(c[1], p.do(c[0], c[1], body, auth...), 400, "unexpected_body")
		}
	}
	for i, body := range []string{"", "{}", " {} \n"} {
		if a := p.do("POST", "/v1/batches/b/cancel", body, auth...); a.status != 200 || len(p.provider.got()) != i+1 || p.provider.last(t).body != "" {
			t.Errorf("%q: got %d %s", body, a.status, a.body)
		}
	}
}

// TestLargeAnswer: an answer passes whole, its usage at the far end is read.
func TestLargeAnswer(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	const size = 24 << 20
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		head, tail := `{"data":[{"b64_json":"`, `"}],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}}`
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(head)+size+len(tail), head)
		block := bytes.Repeat([]byte("QUJD"), 1<<14)
		for n := 0; n < size; n += len(block) {
			if _, err := c.Write(block); err != nil {
				return false
			}
		}
		_, err := io.WriteString(c, tail)
		return err == nil
	})
	a := p.chat()
	if a.err != nil || len(a.body) < size || !strings.HasSuffix(a.body, `"total_tokens":18}}`) {
		t.Errorf("got %d, %d bytes, %v", a.status, len(a.body), a.err)
	}
	if row := p.lastCall(); row.InputTokens != 11 || row.OutputTokens != 7 || row.UsageSource != "exact" {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestEncodedAnswer: an answer in an encoding nobody asked for passes as it is,
// and is not called free.
func TestEncodedAnswer(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = io.WriteString(z, chatAnswer)
	_ = z.Close()
	p.provider.answer(func(c *providerConn, _ recorded) bool { return c.reply(200, b.String(), "Content-Encoding: gzip") })
	a := p.do("POST", "/v1/chat/completions", chatBody(), "Authorization", "Bearer "+p.token, "Content-Type", "application/json", "Accept-Encoding", "br")
	if a.body != b.String() || a.header.Get("Content-Encoding") != "gzip" || p.provider.last(t).header["Accept-Encoding"] != nil {
		t.Errorf("got %d %v", a.status, a.header)
	}
	if row := p.lastCall(); row.UsageSource == "none" || row.OutputTokens == 0 {
		t.Errorf("the ledger has %+v", row)
	}
}
