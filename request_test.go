// These tests check request bodies: sizes, encodings, types, forms, and JSON that two parsers could read in
// two ways. The provider gets exactly the bytes that were checked.
package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"
)

// post sends a body unchanged to a path, with the test's token.
func (p *testProxy) post(path, contentType, body string, headers ...string) testResponse {
	p.t.Helper()
	return p.do("POST", path, body, append([]string{"Authorization", "Bearer " + p.token, "Content-Type", contentType}, headers...)...)
}

// TestBodySize: a body of exactly the limit passes, one byte more does not, and a declared size is refused at
// once.
func TestBodySize(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	p := newTest(t, map[string]string{"MAX_BODY_BYTES": "64KiB"})
	pad := func(n int) string {
		return strings.Replace(chatBody(), "{", "{"+strings.Repeat(" ", n-len(chatBody())), 1)
	}
	if a := p.post("/v1/chat/completions", "application/json", pad(limit)); a.status != 200 || p.provider.lastRequest(t).body != pad(limit) {
		t.Errorf("the limit: got %d %s", a.status, a.body)
	}
	if a := p.post("/v1/chat/completions", "application/json", pad(limit+1)); a.status != 413 || a.errorCode() != "request_too_large" {
		t.Errorf("one more: got %d %s", a.status, a.body)
	}
	head := "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.token + "\r\nContent-Type: application/json\r\n"
	if got := p.sendRaw(head + "Content-Length: 1099511627776\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 413 ") || !strings.Contains(got, "\r\nConnection: close\r\n") {
		t.Errorf("1 TiB declared: got %q", got)
	}
	endless := strings.Repeat("1000\r\n"+strings.Repeat(" ", 0x1000)+"\r\n", 2*limit/0x1000)
	if got := p.sendRaw(head + "Transfer-Encoding: chunked\r\n\r\n" + endless); got != "" && !strings.HasPrefix(got, "HTTP/1.1 413 ") {
		t.Errorf("endless chunks: got %q", got)
	}
	p.waitSettled()
	if n := p.instance.proxy.bodies.used.Load(); n != 0 || len(p.provider.received()) != 1 {
		t.Errorf("%d bytes are still held; %d requests went up", n, len(p.provider.received()))
	}
}

// TestBodyMemory: all bodies together use no more memory than is allowed; further calls are asked to retry.
func TestBodyMemory(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_BODY_BYTES": "1MiB", "BODY_MEMORY": "1MiB"})
	p.allowErrors = true
	if !p.instance.proxy.bodies.reserve(1<<20 - 50) {
		t.Fatal("no memory at all")
	}
	if a := p.chat(); a.status != 503 || a.errorCode() != "body_memory_full" || a.header.Get("Retry-After") == "" {
		t.Errorf("got %d %s", a.status, a.body)
	}
	p.instance.proxy.bodies.release(1<<20 - 50)
	if a := p.chat(); a.status != 200 {
		t.Errorf("got %d %s", a.status, a.body)
	}
	p.waitSettled()
	if n := p.instance.proxy.bodies.used.Load(); n != 0 {
		t.Errorf("%d bytes are still held", n)
	}
}

// TestUnauthenticatedUploadNothing: without a token no byte of the body is read.
func TestUnauthenticatedUploadNothing(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, path := range []string{"/v1/chat/completions", "/v1/files", "/manage/projects"} {
		got := p.sendRaw("POST " + path + " HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer x\r\nContent-Type: application/json\r\nContent-Length: 1073741824\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 401 ") {
			t.Errorf("%s: got %q", path, got)
		}
	}
}

// TestStalledUnauthenticatedUpload: a refused client gets the answer soon, even if the rest of its body never
// comes, and the connection is closed.
func TestStalledUnauthenticatedUpload(t *testing.T) {
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
		_ = conn.SetReadDeadline(time.Now().Add(hangTimeout))
		conns[name] = conn
	}
	for name, conn := range conns {
		b, err := io.ReadAll(conn)
		if err != nil || !bytes.HasPrefix(b, []byte("HTTP/1.1 40")) {
			t.Errorf("%s: got %q, %v", name, b, err)
		}
	}
}

// TestJSONHasOneReading: a body that two parsers could read differently is refused.
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
		if a := p.do("POST", "/v1/chat/completions", body, "Authorization", "Bearer "+token, "Content-Type", "application/json"); a.status != 400 || a.errorCode() == "" || len(a.body) > 1000 {
			t.Errorf("%.80q: got %d %.300s", body, a.status, a.body)
		}
	}
	if a := p.do("POST", "/v1/chat/completions", `{"model":null}`, "Authorization", "Bearer "+token, "Content-Type", "application/json"); a.status != 400 {
		t.Errorf("no model: %d", a.status)
	}
	if n := len(p.provider.received()); n > 0 {
		t.Fatalf("%d requests went up", n)
	}
	// What has one reading goes up as it is, also where the spelling is odd.
	for _, body := range []string{
		`{"mo\u0064el":"gpt\u002d4o-mini","messages":[]}`, "\t{\r\n\"model\" : \"gpt-4o-mini\" }\n", `{"x":{"model":"gpt-4o","MODEL":1},"model":"gpt-4o-mini"}`,
	} {
		a := p.do("POST", "/v1/chat/completions", body, "Authorization", "Bearer "+token, "Content-Type", "application/json")
		var up struct{ Model string }
		if a.status != 200 || p.provider.lastRequest(t).body != body || json.Unmarshal([]byte(body), &up) != nil && up.Model != "gpt-4o-mini" {
			t.Errorf("%q: got %d %s", body, a.status, a.body)
		}
	}
}

// TestRequestEncoding: limits must be able to read a body, so a compressed body is neither decompressed nor
// forwarded unread.
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
			p.expectRefused(encoding, a, 415, "unsupported_encoding")
		}
	}
	if a := p.post("/v1/chat/completions", "application/json", chatBody(), "Content-Encoding", "Identity"); a.status != 200 || p.provider.lastRequest(t).header["Content-Encoding"] != nil {
		t.Errorf("identity: got %d %s", a.status, a.body)
	}
}

// TestContentTypes: another Content-Type than the endpoint's does not bypass the checks of the body.
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
		p.expectRefused(kind, p.do("POST", "/v1/chat/completions", chatBody(), append(headers, "Authorization", "Bearer "+p.token)...), 415, "unsupported_content_type")
	}
	for _, kind := range []string{"application/json", "APPLICATION/JSON", "application/json; charset=utf-8", "application/json; charset=utf8", "application/json;charset=\"UTF-8\"", "application/json; profile=x"} {
		if a := p.post("/v1/chat/completions", kind, chatBody()); a.status != 200 || p.provider.lastRequest(t).header.Get("Content-Type") != kind {
			t.Errorf("%s: got %d %s", kind, a.status, a.body)
		}
		_, held := p.newToken(`"name":"held","policy":{"models":["other"]}`)
		if a := p.do("POST", "/v1/chat/completions", chatBody(), "Authorization", "Bearer "+held, "Content-Type", kind); a.status != 403 {
			t.Errorf("%s: a model that is not allowed: %d", kind, a.status)
		}
	}
}

// TestForms: a form's model is checked as strictly as in JSON, and a form's size is limited.
func TestForms(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_BODY_BYTES": "1MiB"})
	_, token := p.newToken(`"name":"held","policy":{"models":["whisper-1"]}`)
	const at, disp = "/v1/audio/transcriptions", "Content-Disposition: form-data; "
	file := disp + "name=\"file\"; filename=\"a.mp3\"\r\nContent-Type: audio/mpeg|ID3\x00\xff"
	good := multipartBody("model=whisper-1", file)
	for _, c := range []struct {
		name, kind, body string
		status           int
	}{
		{"model twice", formContentType, multipartBody("model=whisper-1", "model=gpt-4o", file), 400},
		{"model as a file", formContentType, multipartBody(disp + "name=\"model\"; filename=\"x\"|whisper-1"), 400},
		{"another model", formContentType, multipartBody("model=gpt-4o", file), 403},
		{"no model", formContentType, multipartBody(file), 403},
		{"models too", formContentType, multipartBody("model=whisper-1", "models=gpt-4o", file), 403},
		{"model[]", formContentType, multipartBody("model=whisper-1", "model[]=gpt-4o"), 400},
		{"Model", formContentType, multipartBody("model=whisper-1", "Model=gpt-4o"), 400},
		{"no end", formContentType, strings.TrimSuffix(good, "--\r\n"), 400},
		{"text before", formContentType, "preamble\r\n" + good, 400},
		{"text after", formContentType, good + "--xyz\r\n" + disp + "name=\"model\"\r\n\r\ngpt-4o\r\n--xyz--", 400},
		{"two boundaries", formContentType + "; boundary=abc", good, 415},
		{"huge boundary", "multipart/form-data; boundary=" + strings.Repeat("x", 10_000), good, 400},
		{"no boundary", "multipart/form-data", good, 400},
		{"many parts", formContentType, multipartBody(strings.Split(strings.Repeat("a=1 ", 5000), " ")...), 400},
		{"huge part header", formContentType, multipartBody(disp + "name=\"" + strings.Repeat("a", 100_000) + "\"|x"), 400},
		{"too large", formContentType, multipartBody("model=whisper-1", disp+"name=\"file\"; filename=\"a\"|"+strings.Repeat("x", 1<<20)), 413},
		{"JSON", "application/json", `{"model":"whisper-1"}`, 415},
	} {
		if a := p.do("POST", at, c.body, "Authorization", "Bearer "+token, "Content-Type", c.kind); a.status != c.status && (c.status != 413 || a.err == nil) { // a client may lose the 413 while it sends
			t.Errorf("%s: got %d %s %v, want %d", c.name, a.status, a.body, a.err, c.status)
		}
	}
	if n := len(p.provider.received()); n > 0 {
		t.Fatalf("%d requests went up", n)
	}
	if a := p.do("POST", at, good, "Authorization", "Bearer "+token, "Content-Type", formContentType); a.status != 200 || p.provider.lastRequest(t).body != good || p.provider.lastRequest(t).header.Get("Content-Type") != formContentType {
		t.Errorf("a good form: got %d %s", a.status, a.body)
	}
}

// TestUnscannedUploadsHeldToModels: uploads are streamed unread, so a token that is restricted to certain
// models cannot use them with a model.
func TestUnscannedUploadsHeldToModels(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	_, token := p.newToken(`"name":"held","policy":{"models":["sora-2"]}`)
	body := multipartBody("model=sora-2", "prompt=x")
	p.expectRefused("videos", p.do("POST", "/v1/videos", body, "Authorization", "Bearer "+token, "Content-Type", formContentType), 403, "model_not_allowed")
	p.expectRefused("realtime", p.do("POST", "/v1/realtime/calls", "v=0", "Authorization", "Bearer "+token, "Content-Type", "application/sdp"), 403, "model_not_allowed")
	if a := p.post("/v1/videos", formContentType, body); a.status != 200 || p.provider.lastRequest(t).body != body {
		t.Errorf("without a list: %d %s", a.status, a.body)
	}
	if a := p.post("/v1/realtime/calls", "application/sdp", "v=0"); a.status != 200 || p.provider.lastRequest(t).body != "v=0" || p.provider.lastRequest(t).header.Get("Content-Type") != "application/sdp" {
		t.Errorf("without a list: %d %s", a.status, a.body)
	}
}

// TestBodyWhereNoneGoes: a body that would not be forwarded is refused, not dropped.
func TestBodyWhereNoneGoes(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	auth := []string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json"}
	for _, body := range []string{`{"a":1}`, `{}{}`, "x", strings.Repeat(" ", 100), strings.Repeat("x", 1<<10), "[]", "null"} {
		for _, c := range [][2]string{{"POST", "/v1/batches/b/cancel"}, {"GET", "/v1/models"}, {"DELETE", "/v1/files/f"}} {
			p.expectRefused(c[1], p.do(c[0], c[1], body, auth...), 400, "unexpected_body")
		}
	}
	for i, body := range []string{"", "{}", " {} \n"} {
		if a := p.do("POST", "/v1/batches/b/cancel", body, auth...); a.status != 200 || len(p.provider.received()) != i+1 || p.provider.lastRequest(t).body != "" {
			t.Errorf("%q: got %d %s", body, a.status, a.body)
		}
	}
}

// TestLargeResponse: a large answer passes complete, and the usage at its end is read.
func TestLargeResponse(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	const size = 24 << 20
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
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

// TestEncodedResponse: an answer in an encoding that was not requested passes unchanged, and is not recorded
// as free.
func TestEncodedResponse(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = io.WriteString(z, chatResponseBody)
	_ = z.Close()
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(200, b.String(), "Content-Encoding: gzip")
	})
	a := p.do("POST", "/v1/chat/completions", chatBody(), "Authorization", "Bearer "+p.token, "Content-Type", "application/json", "Accept-Encoding", "br")
	if a.body != b.String() || a.header.Get("Content-Encoding") != "gzip" || p.provider.lastRequest(t).header["Accept-Encoding"] != nil {
		t.Errorf("got %d %v", a.status, a.header)
	}
	if row := p.lastCall(); row.UsageSource == "none" || row.OutputTokens == 0 {
		t.Errorf("the ledger has %+v", row)
	}
}

func TestScanJSON(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		body string
		want callFields // usage is not compared
	}{
		{`{}`, callFields{n: 1}},
		{" \t\r\n{} \n", callFields{n: 1}},
		{`{"model":"gpt-4o","stream":true}`, callFields{model: "gpt-4o", stream: true, n: 1}},
		{`{"mo\u0064el":"\u0067pt-4o"}`, callFields{model: "gpt-4o", n: 1}},
		{`{"model":"\ud83d\ude00é\/\\"}`, callFields{model: "😀é/\\", n: 1}},
		{`{"stream":null,"n":3,"max_tokens":5,"max_completion_tokens":7,"max_output_tokens":6}`, callFields{n: 3, maxTokens: 5, maxCompletionTokens: 7, maxOutputTokens: 6}},
		{`{"n":-1,"max_tokens":-5}`, callFields{n: 1}},
		{`{"best_of":5,"n":2}`, callFields{n: 5}},
		{`{"n":0,"max_tokens":null}`, callFields{n: 1}},
		{`{"n":-1e400,"max_tokens":-0.0,"max_output_tokens":"inf"}`, callFields{n: 1}},
		{`{"prompt":["a","b",[1,2]]}`, callFields{n: 1, prompts: 3}},
		{`{"prompt":[1,2,3]}`, callFields{n: 1}},
		{`{"prompt":[ [1] , [2,3] ],"n":2}`, callFields{n: 2, prompts: 2}},
		{`{"prompt":[[],["x"]],"prompt":"a","Prompt":["b"]}`, callFields{n: 1, prompts: 2}},
		{`{"pr\u006fmpt":[]}`, callFields{n: 1}},
		{`{"n":4.0,"max_tokens":1e3}`, callFields{n: 4, maxTokens: 1000}},
		{`{"n":1e400,"max_tokens":9223372036854775809}`, callFields{n: maxFieldValue, maxTokens: maxFieldValue}},
		{`{"x":[1e400,-0,9223372036854775809,"\u2028",{"model":1,"Model":2,"model":3}]}`, callFields{n: 1}},
		{`{"stream_options":{"include_usage":true}}`, callFields{n: 1, includeUsage: true}},
		{`{"stream_options":{"a":[],"include_us\u0061ge":true,"b":{}}}`, callFields{n: 1, includeUsage: true}},
		{`{"previous_response_id":null,"background":false,"store":false}`, callFields{n: 1}},
		{`{"background":true,"previous_response_id":"resp_1"}`, callFields{n: 1, statefulParam: "background", background: true}},
		{`{"conversation":{"id":"conv_1"}}`, callFields{n: 1, statefulParam: "conversation"}},
		{`{"prompt":{"id":"pmpt_1"}}`, callFields{n: 1, statefulParam: "prompt"}},
		{`{"prompt":"a","Pr\u006fmpt": {"id":"pmpt_1"} }`, callFields{n: 1, statefulParam: "prompt"}},
		{`{"prompt":null,"container":null}`, callFields{n: 1}},
		{`{"container":"container_1"}`, callFields{n: 1, statefulParam: "container"}},
		{`{"container":null,"CONTAINER":{"skills":[]}}`, callFields{n: 1, statefulParam: "container"}},
		{`{"x":{"container":"c","prompt":{}},"tools":[{"container":{"type":"auto"}}]}`, callFields{n: 1}},
		{`{"x":{"mod\u0000el":1,"\ud800":2}}`, callFields{n: 1}},
		{`{"model":"a","models":["b"]}`, callFields{model: "a", n: 1, modelListParam: "models"}},
		{`{"fallbacks":[],"models":null}`, callFields{n: 1, modelListParam: "fallbacks"}},
		{`{"x":{"models":["b"]},"models":null,"fallbacks":null}`, callFields{n: 1}},
		{`{"context_window_fallbacks":[{"a":["b"]}],"preset":"p"}`, callFields{n: 1,
			modelListParam: "context_window_fallbacks"}},
		{`{"content_policy_fallbacks":[]}`, callFields{n: 1, modelListParam: "content_policy_fallbacks"}},
		{`{"ext\u0072a_body":{"model":"b"}}`, callFields{n: 1, modelListParam: "extra_body"}},
		{`{"extra_body":"model"}`, callFields{n: 1, modelListParam: "extra_body"}},
		{`{"extra_body":{"google":{},"models":["b"]}}`, callFields{n: 1, modelListParam: "extra_body"}},
		{`{"extra_body":{"google":{"thinking_config":{"thinking_budget":0}}}}`, callFields{n: 1}},
		{`{"x":{"extra_body":{}},"extra_body":null,"preset":"p"}`, callFields{n: 1, modelListParam: "preset"}},
		{`{"user":1,"user":2,"model_s":["x"],"model_":0,"":0,"nn":0}`, callFields{n: 1}},
	} {
		got, err := scanJSON([]byte(c.body))
		got.usageSplice, got.modelSplice = splice{}, splice{}
		got.prompt = promptParts{} // see TestAffinityOfPrompts
		if err != nil || got != c.want {
			t.Errorf("%s: got %+v, %v; want %+v", c.body, got, err, c.want)
		}
	}
}

// TestScanGemini: both spellings of a field count, references to stored objects are found wherever they may be, and
// what would mean different things to different parsers is refused.
func TestScanGemini(t *testing.T) {
	t.Parallel()
	for body, want := range map[string]callFields{
		`{}`: {n: 1},
		`{"generationConfig":{"maxOutputTokens":7,"candidateCount":2}}`:                        {n: 2, maxOutputTokens: 7},
		`{"generation_config":{"max_output_tokens":7.0,"candidate_count":3}}`:                  {n: 3, maxOutputTokens: 7},
		`{"generationConfig":{"responseSchema":{"properties":{"fileData":{}}}}}`:               {n: 1},
		`{"model":"models/m","generateContentRequest":{"model":"m"}}`:                          {n: 1},
		`{"cachedContent":"cachedContents/a"}`:                                                 {n: 1, statefulParam: "cachedContent"},
		`{"cached_content":null,"generationConfig":null}`:                                      {n: 1},
		`{"generateContentRequest":{"model":"m","cached_content":"a"}}`:                        {n: 1, statefulParam: "cachedContent"},
		`{"contents":[{"parts":[{"text":"fileData"},{"inlineData":{"data":"x"}}]}]}`:           {n: 1},
		`{"contents":[{"parts":[{"fileData":{"fileUri":"files/a"}}]}]}`:                        {n: 1, statefulParam: "fileData"},
		`{"contents":{"parts":{"FILE_data":{}}}}`:                                              {n: 1, statefulParam: "fileData"},
		`{"requests":[{"content":{"parts":[{"fileD\u0061ta":{}}]}}]}`:                          {n: 1, statefulParam: "fileData"},
		`{"system_instruction":{"parts":[{"file_data":{}}]}}`:                                  {n: 1, statefulParam: "fileData"},
		`{"contents":[{"parts":[{"functionCall":{"args":{"fileData":1}}}]}]}`:                  {n: 1},
		`{"contents":[{"parts":[{"functionResponse":{"parts":[{"fileData":{}}]}}]}]}`:          {n: 1, statefulParam: "fileData"},
		`{"tools":[{"fileSearch":{"fileSearchStoreNames":["fileSearchStores/a"]}}]}`:           {n: 1, statefulParam: "fileSearch"},
		`{"tools":[{"functionDeclarations":[{"parameters":{"fileSearch":{}}}]}]}`:              {n: 1},
		`{"requests":[{"model":"models/m","content":{}},{"model":"m"}],"generationConfig":{}}`: {n: 1},
	} {
		got, err := scanGemini([]byte(body), "m")
		got.prompt = promptParts{} // see TestAffinityOfPrompts
		if want.model = "m"; err != nil || got != want {
			t.Errorf("%s: got %+v, %v; want %+v", body, got, err, want)
		}
	}
	for body, param := range map[string]string{
		`{"generationConfig":{},"generationConfig":{}}`:                    "generationConfig",
		`{"generationConfig":{},"generation_config":{}}`:                   "generationConfig",
		`{"GenerationConfig":{}}`:                                          "generationConfig",
		`{"generationconfig":{}}`:                                          "generationConfig",
		`{"generation\u005fConfig":{}}`:                                    "generationConfig",
		`{"generationConfig":[]}`:                                          "",
		`{"generationConfig":{"maxOutputTokens":"7"}}`:                     "generationConfig",
		`{"generationConfig":{"maxOutputTokens":7.5}}`:                     "generationConfig",
		`{"generationConfig":{"maxOutputTokens":1,"max_output_tokens":9}}`: "maxOutputTokens",
		`{"generationConfig":{"candidateCount":1,"candidateCount":9}}`:     "candidateCount",
		`{"generationConfig":{"MAX_OUTPUT_TOKENS":9}}`:                     "maxOutputTokens",
		`{"model":"models/other"}`:                                         "model",
		`{"model":7}`:                                                      "model",
		`{"model":"m","model":"m"}`:                                        "model",
		`{"generateContentRequest":{"model":"models/other"}}`:              "model",
		`{"generateContentRequest":{},"generate_content_request":{}}`:      "generateContentRequest",
		`{"requests":[{"model":"m"},{"model":"models/other"}]}`:            "model",
		`{"requests":[{"model":"\u006d"}]}`:                                "model",
		`{"requests":{}}`:                                                  "",
		`[]`:                                                               "",
		`{"contents":[{]}`:                                                 "",
	} {
		e, ok := errors.AsType[*bodyError](second(scanGemini([]byte(body), "m")))
		if !ok || e.param != param {
			t.Errorf("%s: got %v", body, e)
		}
	}
	body := `{"model": "m","generateContentRequest":{"model" :"models/m","a":1},"requests":[{"model":"m"},{}],"x":{"model":"m"}}`
	want := `{"model": "models/n\"","generateContentRequest":{"model" :"models/n\"","a":1},` +
		`"requests":[{"model":"models/n\""},{}],"x":{"model":"m"}}`
	if got := string(withGeminiModel([]byte(body), `n"`)); got != want {
		t.Errorf("got %s", got)
	}
}

func second[A, B any](_ A, b B) B { return b }

func TestScanJSONRefuses(t *testing.T) {
	t.Parallel()
	deep := strings.Repeat("[", 100_000)
	for _, c := range []struct{ body, param, msg string }{
		{``, "", "empty"},
		{strings.Repeat(" ", 10<<20), "", "empty"},
		{`null`, "", "object (byte 0)"},
		{`[]`, "", "object"},
		{` "x"`, "", "object (byte 1)"},
		{"\xef\xbb\xbf{}", "", "byte order mark"},
		{"\xff\xfe{\x00}\x00", "", "UTF-8 (byte 0)"},
		{"{\x00}\x00", "", `'\x00' found at byte 1`},
		{"\x00{}", "", "object (byte 0)"},
		{"{\"a\":\"é\xff\"}", "", "UTF-8 (byte 8)"},
		{"{\"a\":\"\xed\xa0\x80\"}", "", "UTF-8"},
		{`{"mod\u0000el":"o1"}`, "", `"mod\x00el" has a character`},
		{`{"model\u0000":"o1","model":"m"}`, "", "has a character"},
		{`{"model\u0009":"o1"}`, "", "has a character"},
		{`{"mod\ud800el":"o1"}`, "", "has a character"},
		{`{"\u0000":1}`, "", "has a character"},
		{`{"stream_options":{"include_usage\u0000":true}}`, "", "has a character"},
		{`{}{}`, "", "byte 2"},
		{`{}]`, "", "byte 2"},
		{`{"a":1,}`, "", "byte 7"},
		{`{,}`, "", "byte 1"},
		{`{"a" 1}`, "", "':' was expected"},
		{`{'a':1}`, "", "double quotes"},
		{`{"a":1`, "", "the body ends at byte 6"},
		{`{"a":"b`, "", "the body ends"},
		{`{"a":[1,]}`, "", "byte 8"},
		{`{"a":[1 2]}`, "", "byte 8"},
		{`{"a":01}`, "", "byte 6"},
		{`{"a":1.}`, "", "digit"},
		{`{"a":1e}`, "", "digit"},
		{`{"a":-}`, "", "byte 6"},
		{`{"a":+1}`, "", "byte 5"},
		{`{"a":.5}`, "", "byte 5"},
		{`{"a":NaN}`, "", "byte 5"},
		{`{"a":nul}`, "", "byte 5"},
		{`{"a":truex}`, "", "byte 9"},
		{"{\"a\":\"\n\"}", "", `'\n' found at byte 6`},
		{`{"a":"\x"}`, "", "escape"},
		{`{"a":"\u00g0"}`, "", "escape"},
		{"{\"a\":\"\\u00\x110\"}", "", "escape"},
		{`{"a":"\u00`, "", "escape"},
		{`{"a":"\`, "", "escape"},
		{`{"a":1/* */}`, "", "byte 6"},
		{`{"a":1}//`, "", "byte 7"},
		{`{"a":` + deep, "", "deeper than 128"},
		{`{"a":` + strings.Repeat("[", 128) + strings.Repeat("]", 128) + "}", "", "deeper than 128"},
		{`{"model":"a","model":"b"}`, "model", "Duplicate"},
		{`{"model":"a","mo\u0064el":"b"}`, "model", "Duplicate"},
		{`{"model":"a","MODEL":"b"}`, "model", "Ambiguous"},
		{`{"Model":"b"}`, "model", "Ambiguous"},
		{`{"ſtream":true}`, "stream", "Ambiguous"},
		{`{"\u017ftream":true}`, "stream", "Ambiguous"},
		{`{"max_toKens":1}`, "max_tokens", "Ambiguous"},
		{`{"bac` + "\u212a" + `ground":1}`, "background", "Ambiguous"},
		{`{"N":1}`, "n", "Ambiguous"},
		{`{"Model\u0053":["b"]}`, "models", "Ambiguous"},
		{`{"models":null,"models":["b"]}`, "models", "Duplicate"},
		{`{"store":true,"store":false}`, "store", "Duplicate"},
		{`{"max_tokens":"100000"}`, "max_tokens", "whole number"},
		{`{"max_tokens":1.5}`, "max_tokens", "whole number"},
		{`{"max_completion_tokens":[5]}`, "max_completion_tokens", "whole number"},
		{`{"max_output_tokens":"5"}`, "max_output_tokens", "whole number"},
		{`{"max_tokens":"inf"}`, "max_tokens", "whole number"},
		{`{"n":"4"}`, "n", "whole number"},
		{`{"n":true}`, "n", "whole number"},
		{`{"best_of":{"a":4}}`, "best_of", "whole number"},
		{`{"model":["a"]}`, "model", "string"},
		{`{"model":1}`, "model", "string"},
		{`{"model":null}`, "model", "string"},
		{`{"model":{}}`, "model", "string"},
		{`{"model":""}`, "model", "1 to 256"},
		{`{"model":"` + strings.Repeat("x", 257) + `"}`, "model", "1 to 256"},
		{`{"model":"` + strings.Repeat("x", 1<<20) + `"}`, "model", "1 to 256"},
		{`{"model":"a\u0000b"}`, "model", "character"},
		{`{"model":"a\nb"}`, "model", "character"},
		{`{"model":"a\u007f"}`, "model", "character"},
		{`{"model":"a\ud800"}`, "model", "character"},
		{`{"model":"a\ud800\u0041"}`, "model", "character"},
		{`{"stream":1}`, "stream", "boolean"},
		{`{"stream":"true"}`, "stream", "boolean"},
		{`{"stream_options":1}`, "stream_options", "object"},
		{`{"stream_options":[]}`, "stream_options", "object"},
		{`{"stream_options":`, "", "the body ends"},
		{`{"stream_options":{},"stream_options":null}`, "stream_options", "Duplicate"},
		{`{"stream_options":{"include_usage":1}}`, "stream_options.include_usage", "boolean"},
		{`{"stream_options":{"include_usage":true,"include_usage":false}}`, "stream_options.include_usage", "Duplicate"},
		{`{"stream_options":{"Include_usage":true}}`, "stream_options.include_usage", "Ambiguous"},
	} {
		_, err := scanJSON([]byte(c.body))
		e, ok := errors.AsType[*bodyError](err)
		if !ok || e.param != c.param || !strings.Contains(e.msg, c.msg) || len(e.msg) > 200 {
			t.Errorf("%.80q: got %v; want %q for parameter %q", c.body, err, c.msg, c.param)
		}
	}
	if _, err := scanJSON([]byte(`{"a":` + strings.Repeat("[", 127) + strings.Repeat("]", 127) + "}")); err != nil {
		t.Errorf("128 levels: %v", err)
	}
}

func TestWithIncludeUsage(t *testing.T) {
	t.Parallel()
	for _, c := range [][2]string{
		{`{}`, `{"stream_options":{"include_usage":true}}`},
		{"{ \n}", "{\"stream_options\":{\"include_usage\":true} \n}"},
		{` { "b":1e400 , "a":-0 } `, ` {"stream_options":{"include_usage":true}, "b":1e400 , "a":-0 } `},
		{`{"stream_options":null}`, `{"stream_options":{"include_usage":true}}`},
		{`{"a":1, "stream_options" : null ,"b":2}`, `{"a":1, "stream_options" : {"include_usage":true} ,"b":2}`},
		{`{"stream_options":{}}`, `{"stream_options":{"include_usage":true}}`},
		{`{"stream_options":{ "x":1}}`, `{"stream_options":{"include_usage":true, "x":1}}`},
		{`{"stream_options":{"include_usage":false}}`, `{"stream_options":{"include_usage":true}}`},
		{`{"stream_options":{"x":1,"include_usage": null }}`, `{"stream_options":{"x":1,"include_usage": true }}`},
		{`{"stream_options":{"x":1,"include_usage": true }}`, `{"stream_options":{"x":1,"include_usage": true }}`},
	} {
		f, err := scanJSON([]byte(c[0]))
		if got := withIncludeUsage([]byte(c[0]), f); err != nil || string(got) != c[1] {
			t.Errorf("%s: got %s, %v; want %s", c[0], got, err, c[1])
		}
	}
}

// TestStringBytes puts every byte at every place of a word and compares with encoding/json.
func TestStringBytes(t *testing.T) {
	t.Parallel()
	for c := range 0x80 {
		for i := range 20 {
			body := []byte(`{"a":"aaaaaaaaaaaaaaaaaaaa"}`)
			body[6+i] = byte(c)
			if _, err := scanJSON(body); (err == nil) != json.Valid(body) {
				t.Errorf("%q: %v", body, err)
			}
		}
	}
}

func TestUnescape(t *testing.T) {
	t.Parallel()
	for _, s := range []string{
		`plain é`, `\"\\\/\b\f\n\r\t`, `\u0041\u00e9\u20AC\uFFFF`, `\ud83d\ude00\uD83D\uDE00`, `\ud800`, `\udc00\ud800`,
		`\ud800\u0041`, `\ud800A`, `\ud800\n`, `\ud800\ud83d\ude00`, `\ud800\\u0041`,
	} {
		var want string
		if err := json.Unmarshal([]byte(`"`+s+`"`), &want); err != nil {
			t.Fatal(err)
		}
		if got := unescape([]byte(s)); string(got) != want {
			t.Errorf("%s: got %q, want %q", s, got, want)
		}
	}
}

// TestProtectedNames checks the assumptions behind protectedName's shortcuts.
func TestProtectedNames(t *testing.T) {
	t.Parallel()
	for i, name := range protectedNames {
		twin := strings.NewReplacer("s", "ſ", "k", "\u212a").Replace(name)
		for _, s := range []string{name, strings.ToUpper(name), twin} {
			if got, exact := protectedName([]byte(s)); got != i || exact != (s == name) {
				t.Errorf("protectedName(%q) = %d, %v", s, got, exact)
			}
		}
		for _, s := range []string{"x" + name, name + "x", name + " ", name + "\x00"} {
			if got, _ := protectedName([]byte(s)); got >= 0 {
				t.Errorf("protectedName(%q) = %d", s, got)
			}
		}
	}
}

func FuzzScanJSON(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"model":"a","stream":true,"n":2}`, `{"stream_options":{"include_usage":false,"x":[1,2]}}`,
		`{"mo\u0064el":"\ud83d\ude00","stream_options":null}`, `{"a":{"b":[1.5e-3,null,true,"\\"]}} `, `{"ſtream":1}`,
		`{"stream_options":{},"model":"x"}`, `{"a":"\ud800","max_tokens":1e3}`, "{\"\\u0000\":1}", `{"model":"a","model":"b"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		before := bytes.Clone(body)
		got, err := scanJSON(body)
		if !bytes.Equal(before, body) {
			t.Fatal("the body was changed")
		}
		if err != nil {
			if e, ok := errors.AsType[*bodyError](err); !ok || e.msg == "" {
				t.Fatalf("error %#v", err)
			}
			if e := err.(*bodyError); json.Valid(body) && strings.Contains(e.msg, "not valid JSON") {
				t.Fatalf("valid JSON refused: %v", err)
			}
			return
		}
		checkFields(t, body, got)
		changed := withIncludeUsage(body, got)
		again, err := scanJSON(changed)
		if err != nil || again.model != got.model || again.stream != got.stream || again.n != got.n || !again.includeUsage || again.usageSplice.text != "" {
			t.Fatalf("after the splice: %+v, %v", again, err)
		}
		if !got.includeUsage && !bytes.Equal(withoutIncludeUsage(changed, got), body) {
			t.Fatalf("the splice cannot be undone: %q became %q", changed, withoutIncludeUsage(changed, got))
		}
		for added, body := range map[bool][]byte{false: body, true: changed} { // the model is where it was said to be
			renamed, err := scanJSON(withModel(body, got, added, `m"<é>`))
			if err != nil || got.model != "" && renamed.model != `m"<é>` || renamed.stream != got.stream || renamed.n != got.n {
				t.Fatalf("with another model: %+v, %v", renamed, err)
			}
		}
		want, have := decodeJSON(t, body), decodeJSON(t, changed)
		options, _ := want["stream_options"].(map[string]any)
		if options == nil {
			options = map[string]any{}
		}
		options["include_usage"] = true
		want["stream_options"] = options
		if a, b := encodeJSON(t, want), encodeJSON(t, have); a != b {
			t.Fatalf("the splice made %s of %s", b, a)
		}
	})
}

// checkFields compares the fields with what encoding/json reads.
func checkFields(t *testing.T, body []byte, got callFields) {
	t.Helper()
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); !json.Valid(body) || err != nil {
		t.Fatalf("accepted, but encoding/json says %v", err)
	}
	var model string
	var stream bool
	if raw, ok := members["model"]; ok {
		if err := json.Unmarshal(raw, &model); err != nil {
			t.Fatal(err)
		}
	}
	if raw, ok := members["stream"]; ok {
		if err := json.Unmarshal(raw, &stream); err != nil {
			t.Fatal(err)
		}
	}
	if model != got.model || stream != got.stream {
		t.Fatalf("encoding/json has %q, %v; got %+v", model, stream, got)
	}
	var folded struct { // a struct takes the last key in any case: there must be no other
		Model  string
		Stream bool
	}
	if err := json.Unmarshal(body, &folded); err != nil || folded.Model != model || folded.Stream != stream {
		t.Fatalf("a struct has %+v, %v; got %+v", folded, err, got)
	}
}

func decodeJSON(t *testing.T, body []byte) map[string]any {
	t.Helper()
	var v map[string]any
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

func encodeJSON(t *testing.T, v any) string {
	t.Helper()
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func BenchmarkScanJSON(b *testing.B) {
	text := strings.Repeat("The quick brown fox jumps over the lazy dog. ", 9)
	small := `{"model":"gpt-4o-mini","stream":true,"temperature":0.7,"max_tokens":256,"messages":[{"role":"system","content":"` +
		text + `"},{"role":"user","content":"` + text + `\n"}]}`
	for _, c := range []struct{ name, body string }{
		{"1KB", small},
		{"15MiB", `{"model":"gpt-4o","image":"` + strings.Repeat("QUJD", 15<<18) + `"}`},
		{"dense", `{"model":"text-embedding-3-small","input":[` + strings.Repeat(`{"a":[1,2.5]},`, 5000) + `0]}`},
	} {
		b.Run(c.name, func(b *testing.B) {
			body := []byte(c.body)
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := scanJSON(body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

const formContentType = "multipart/form-data; boundary=xyz"

// multipartBody writes parts as "headers|value", with the common header for a bare "name=value".
func multipartBody(parts ...string) string {
	var b strings.Builder
	for _, p := range parts {
		head, value, ok := strings.Cut(p, "|")
		if !ok {
			name, v, _ := strings.Cut(p, "=")
			head, value = `Content-Disposition: form-data; name="`+name+`"`, v
		}
		b.WriteString("--xyz\r\n" + head + "\r\n\r\n" + value + "\r\n")
	}
	return b.String() + "--xyz--\r\n"
}

func TestScanForm(t *testing.T) {
	t.Parallel()
	const disp = "Content-Disposition: form-data; "
	for _, c := range []struct {
		contentType, body string
		want              callFields
	}{
		{formContentType, multipartBody("model=whisper-1", "stream=true", "n=2"), callFields{model: "whisper-1", stream: true, n: 2}},
		{formContentType + "; charset=utf8", multipartBody(disp + "name=model\r\nContent-Type: text/plain; charset=UTF8|a"),
			callFields{model: "a", n: 1}},
		{formContentType, multipartBody(disp+`name="file"; filename="Meeting; part 1.mp3"|x`, "model=a"),
			callFields{model: "a", n: 1}},
		{formContentType, multipartBody(disp+`name="file"; filename="a\b;c=d;\\e.mp3"|x`, "model=a"),
			callFields{model: "a", n: 1}},
		{`Multipart/Form-Data; Boundary="xyz"; charset=UTF-8`, multipartBody("model=a"), callFields{model: "a", n: 1}},
		{formContentType, strings.TrimSuffix(multipartBody("model=a"), "\r\n"), callFields{model: "a", n: 1}},
		{formContentType, multipartBody(disp+"name=\"file\"; filename=\"a.mp3\"\r\nContent-Type: audio/mpeg|ID3\r\n\r\n--xy\x00\xff", "model=a"), callFields{model: "a", n: 1}},
		{formContentType, multipartBody(disp+"name=file; filename=a.mp3; filename*=utf-8''a.mp3|x", disp+"name=model\r\nContent-Type: text/plain; charset=utf-8|a"), callFields{model: "a", n: 1}},
		{formContentType, multipartBody("model=a", "include[]=logprobs", "include[]=x", "file=", disp+`name="image[]"; filename="ü.png"|x`), callFields{model: "a", n: 1}},
		{formContentType, multipartBody("content-disposition:form-data;name=\"model\"\r\nContent-Length: 1\r\nContent-Transfer-Encoding: 8bit|a"), callFields{model: "a", n: 1}},
		{formContentType, multipartBody("conversation=c", "n="), callFields{n: 1, statefulParam: "conversation"}},
		{formContentType, multipartBody("models=b"), callFields{n: 1, modelListParam: "models"}},
		{formContentType, multipartBody(disp + "name=\"prompt\"\r\nContent-Type: text/plain; charset=utf-16|x"), callFields{n: 1}},
	} {
		got, err := scanForm(c.contentType, []byte(c.body))
		renamed := withModel([]byte(c.body), got, false, "renamed")
		movable := got.modelSplice.to > 0
		got.modelSplice = splice{}
		if err != nil || got != c.want {
			t.Errorf("%q: got %+v, %v; want %+v", c.body, got, err, c.want)
		}
		if movable != (c.want.model != "" && !strings.Contains(c.body, "Content-Length")) {
			t.Errorf("%q: the model can be replaced: %v", c.body, movable)
		}
		if again, err := scanForm(c.contentType, renamed); movable && (err != nil || again.model != "renamed" || len(renamed)-len(c.body) != len("renamed")-len(got.model)) {
			t.Errorf("%q: with another model: %q: %v", c.body, renamed, err)
		}
	}
}

func TestScanFormRefuses(t *testing.T) {
	t.Parallel()
	const disp = "Content-Disposition: form-data; "
	good := multipartBody("model=a")
	for _, c := range []struct{ contentType, body, param string }{
		{"", good, ""},
		{"multipart/form-data", good, ""},
		{"multipart/mixed; boundary=xyz", good, ""},
		{"application/json", good, ""},
		{formContentType + "; boundary=xyz", good, ""},
		{formContentType + "; boundary*=utf-8''xyz", good, ""},
		{formContentType + "; x=y", good, ""},
		{formContentType + "; charset=utf-16", good, ""},
		{formContentType + ", multipart/form-data; boundary=abc", good, ""},
		{formContentType + ";", good, ""},
		{"multipart/form-data; boundary=\"xyz", good, ""},
		{"multipart/form-data; boundary=\"x\\yz\"", good, ""},
		{"multipart/form-data; boundary=\"\"", good, ""},
		{"multipart/form-data; boundary=" + strings.Repeat("x", 71), good, ""},
		{"multipart/form-data; boundary=" + strings.Repeat("x", 100_000), good, ""},
		{formContentType, "", ""},
		{formContentType, "--xyz--\r\n", ""},
		{formContentType, "preamble\r\n" + good, ""},
		{formContentType, "\r\n" + good, ""},
		{formContentType, good + "epilogue", ""},
		{formContentType, good + good, ""},
		{formContentType, strings.TrimSuffix(good, "\r\n") + "\n", ""},
		{formContentType, strings.TrimSuffix(good, "\r\n") + " ", ""},
		{formContentType, strings.TrimSuffix(good, "--xyz--\r\n"), ""},
		{formContentType, strings.TrimSuffix(good, "--\r\n"), ""},
		{formContentType, strings.ReplaceAll(good, "\r\n", "\n"), ""},
		{formContentType, strings.Replace(good, "--xyz\r\n", "--xyz \r\n", 1), ""},
		{formContentType, strings.Replace(good, "--xyz\r\n", "--xyz\n", 1), ""},
		{formContentType, multipartBody(disp + "name=\"file\"; filename=\"a\"|x--xyzq"), ""},
		{formContentType, multipartBody(disp + "name=\"file\"; filename=\"a\"|x\n--xyz\r\n" + disp + "name=\"model\"\r\n\r\nb"), ""},
		{formContentType, "--xyz\r\n--xyz--\r\n", ""},
		{formContentType, "--xyz\r\n\r\n--xyz--\r\n", ""},
		{formContentType, "--xyz\r\n" + disp + "name=\"model\"\r\n\r\n--xyz--\r\n", ""},
		{formContentType, multipartBody("model=a", "model=b"), "model"},
		{formContentType, multipartBody("Model=a"), "model"},
		{formContentType, multipartBody("model[]=a"), "model"},
		{formContentType, multipartBody("models[]=a"), "models"},
		{formContentType, multipartBody("model[x=a"), "model"},
		{formContentType, multipartBody("stream_options[include_usage]=a"), "stream_options"},
		{formContentType, multipartBody(disp + "name=\"model\"; filename=\"a\"|a"), "model"},
		{formContentType, multipartBody(disp + "name=\"model\"; filename*=utf-8''a|a"), "model"},
		{formContentType, multipartBody(disp + "name=\"model\"\r\nContent-Type: text/plain; charset=utf-7|a"), "model"},
		{formContentType, multipartBody(disp + "name=\"model\"\r\nContent-Type: application/json|\"a\""), "model"},
		{formContentType, multipartBody("model="), "model"},
		{formContentType, multipartBody("model=é"), "model"},
		{formContentType, multipartBody("model=a\r\n"), "model"},
		{formContentType, multipartBody("model=" + strings.Repeat("x", 257)), "model"},
		{formContentType, multipartBody("stream=True"), "stream"},
		{formContentType, multipartBody("stream="), "stream"},
		{formContentType, multipartBody("n=4_0"), "n"},
		{formContentType, multipartBody("n= 4"), "n"},
		{formContentType, multipartBody("mod%65l=a"), ""},
		{formContentType, multipartBody(disp + `name="file"; filename="a; name=model"|x`), ""},
		{formContentType, multipartBody(disp + `name="file"; filename="a;FileName*=utf-8''b"|x`), ""},
		{formContentType, multipartBody(disp + `name="file"; filename="a\"|x`), ""},
		{formContentType, multipartBody(disp + `name="file"; filename="a\"; name="model"|x`), ""},
		{formContentType, multipartBody(disp + `name="mo;del"|x`), ""},
		{formContentType, multipartBody(" model=a"), ""},
		{formContentType, multipartBody("_charset_=utf-7"), ""},
		{formContentType, multipartBody("=a"), ""},
		{formContentType, multipartBody(disp + "filename=\"a\"|x"), ""},
		{formContentType, multipartBody(disp + "name*=utf-8''model|x"), ""},
		{formContentType, multipartBody(disp + "name=\"file\"; name*=utf-8''model|x"), ""},
		{formContentType, multipartBody(disp + "name=\"file\"; name=\"model\"|x"), ""},
		{formContentType, multipartBody(disp + "name=\"file\"; NAME=\"model\"|x"), ""},
		{formContentType, multipartBody(disp + "name=\"mo\\del\"|x"), ""},
		{formContentType, multipartBody(disp + `name="file"; filename="a\"; name="model"|x`), ""},
		{formContentType, multipartBody(disp + `name="file"; filename="a; name=model"|x`), ""},
		{formContentType, multipartBody(disp + `name="file" filename="a"|x`), ""},
		{formContentType, multipartBody(disp + `name="file"; size=3|x`), ""},
		{formContentType, multipartBody("Content-Disposition: attachment; name=\"file\"|x"), ""},
		{formContentType, multipartBody("Content-Disposition: form-data|x"), ""},
		{formContentType, multipartBody("Content-Type: text/plain|x"), ""},
		{formContentType, multipartBody(disp + "name=\"a\"\r\n" + disp + "name=\"model\"|x"), ""},
		{formContentType, multipartBody(disp + "name=\"a\"\r\ncontent-disposition: form-data; name=\"model\"|x"), ""},
		{formContentType, multipartBody("Content-Disposition: form-data;\r\n name=\"model\"|x"), ""},
		{formContentType, multipartBody("Content-Disposition : form-data; name=\"model\"|x"), ""},
		{formContentType, multipartBody(disp + "name=\"a\"\nContent-Type: text/plain|x"), ""},
		{formContentType, multipartBody(disp + "name=\"a\"; filename=\"\x00\"|x"), ""},
		{formContentType, multipartBody(disp + "name=\"a\"\r\nContent-Encoding: gzip|x"), ""},
		{formContentType, multipartBody(disp + "name=\"a\"\r\nContent-Transfer-Encoding: base64|x"), ""},
		{formContentType, multipartBody(disp + "name=\"a\"\r\nContent-Length: 9|x"), ""},
		{formContentType, multipartBody(disp + "name=\"a\"; filename=\"" + strings.Repeat("x", 1<<20) + "\"|x"), ""},
		{formContentType, multipartBody(make([]string, 100_000)...), ""},
	} {
		_, err := scanForm(c.contentType, []byte(c.body))
		if e, ok := errors.AsType[*bodyError](err); !ok || e.param != c.param || len(e.msg) > 200 {
			t.Errorf("%.80q %.120q: got %v; want an error for parameter %q", c.contentType, c.body, err, c.param)
		}
	}
	many := make([]string, maxFormParts+1)
	for i := range many {
		many[i] = fmt.Sprintf("f%d=", i)
	}
	if _, err := scanForm(formContentType, []byte(multipartBody(many[1:]...))); err != nil {
		t.Errorf("%d parts: %v", maxFormParts, err)
	}
	if _, err := scanForm(formContentType, []byte(multipartBody(many...))); err == nil {
		t.Errorf("%d parts: accepted", len(many))
	}
}

func FuzzScanForm(f *testing.F) {
	for _, s := range []string{
		multipartBody("model=a", "stream=true"), multipartBody("file=", "model=whisper-1", "n=1"),
		multipartBody("Content-Disposition: form-data; name=file; filename=\"a b\"\r\nContent-Type: audio/mpeg|x\r\n--xy", "model=a"),
		"--xyz\r\n\r\n--xyz--", "--xyz\r\nContent-Disposition: form-data; name=model\r\n\r\n--xyz--",
	} {
		f.Add(formContentType, []byte(s))
	}
	f.Add(`multipart/form-data; boundary="x"; charset=utf-8`, []byte("--x\r\nContent-Disposition: form-data; name=model\r\n\r\na\r\n--x--"))
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		got, err := scanForm(contentType, body)
		if err != nil {
			return
		}
		boundary, err := formBoundary(contentType)
		if err != nil {
			t.Fatal(err)
		}
		var model, stream []string
		for r := multipart.NewReader(bytes.NewReader(body), boundary); ; {
			p, err := r.NextRawPart()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("accepted, but mime/multipart says %v", err)
			}
			value, err := io.ReadAll(p)
			if err != nil {
				t.Fatal(err)
			}
			switch p.FormName() {
			case "model":
				model = append(model, string(value))
			case "stream":
				stream = append(stream, string(value))
			}
		}
		if len(model) > 1 || len(stream) > 1 || strings.Join(model, "") != got.model || (strings.Join(stream, "") == "true") != got.stream {
			t.Fatalf("mime/multipart has model %q, stream %q; got %+v", model, stream, got)
		}
	})
}

func BenchmarkScanForm(b *testing.B) {
	body := []byte(multipartBody("Content-Disposition: form-data; name=file; filename=a|"+strings.Repeat("-\r\n-QUJD", 2<<20), "model=whisper-1"))
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := scanForm(formContentType, body); err != nil {
			b.Fatal(err)
		}
	}
}

// FuzzDecodeObject: decodeObject never panics, each error is a *fieldError, and encoding/json reads the same
// from what it accepts.
func FuzzDecodeObject(f *testing.F) {
	for _, s := range []string{`{}`, `{"s":"x","n":1,"b":true,"l":["a"],"r":{"x":1}}`, `{"s":null}`, `{"r":null}`, `{"s":"a","s":"b"}`, `{"S":"a"}`, `{"n":1.0}`, `{"n":1e2}`, `{"n":9223372036854775808}`,
		`{"s":"\ud800"}`, `{"\u0073":"x"}`, `{"s":"x"} `, `{"s":"x"}{}`, `[]`, `{"s"`, "{\"s\":\"\xff\"}", `{"l":[null,"a"]}`, `{"r":[[[[1]]]]}`, `{"k":"secret"}`, ` {"b" : false } `, `{"n":-0}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var s optional[string]
		var k optional[secret]
		var n optional[int64]
		var b optional[bool]
		var l optional[[]string]
		var r optional[json.RawMessage]
		fields := map[string]any{"s": &s, "k": &k, "n": &n, "b": &b, "l": &l, "r": &r}
		if err := decodeObject(body, fields, "r", "n"); err != nil {
			if fe, ok := err.(*fieldError); !ok || fe.msg == "" || len(fe.param) > 70 {
				t.Fatalf("%T %v", err, err)
			}
			return
		}
		var all map[string]json.RawMessage
		if err := json.Unmarshal(body, &all); err != nil {
			t.Fatalf("accepted, but encoding/json says %v", err)
		}
		given := 0
		for name, got := range map[string]any{"s": s.value, "n": n.value, "b": b.value, "l": l.value} {
			want := reflect.New(reflect.TypeOf(got))
			raw, there := all[name]
			if there {
				given++
				if err := json.Unmarshal(raw, want.Interface()); err != nil {
					t.Fatalf("%s: accepted, but encoding/json says %v", name, err)
				}
			}
			if !reflect.DeepEqual(want.Elem().Interface(), got) {
				t.Errorf("%s is %v, encoding/json says %v", name, got, want.Elem())
			}
		}
		for name, set := range map[string]bool{"k": k.set, "r": r.set} {
			if _, there := all[name]; there != set {
				t.Errorf("%s: set is %v", name, set)
			} else if there {
				given++
			}
		}
		if given != len(all) {
			t.Errorf("encoding/json sees %d fields, %d are known", len(all), given)
		}
		if r.hasValue() && !bytes.Equal(r.value, all["r"]) {
			t.Errorf("r is %s, encoding/json says %s", r.value, all["r"])
		}
	})
}

// FuzzParsePolicy: parsePolicy never panics. An accepted policy parses to itself again, and allows what
// encoding/json's reading of it allows.
func FuzzParsePolicy(f *testing.F) {
	for _, s := range []string{`{}`, `{"models":[]}`, `{"models":["gpt-4o*","a"],"endpoints":["/v1/*"],"stateful":true}`, `{"models":["*"]}`, `{"models":["**"]}`, `{"models":null}`, `{"Models":[]}`,
		`{"endpoints":["POST /v1/responses"]}`, `{"models":["\u0000"]}`, `[]`, `{"stateful":1}`, `{"models":["a\ud800"]}`} {
		f.Add(s, "gpt-4o-mini")
	}
	f.Fuzz(func(t *testing.T, text, model string) {
		p, err := parsePolicy([]byte(text), true)
		if err != nil {
			for _, mistake := range splitMistakes(err) {
				if fe, ok := mistake.(*fieldError); !ok || !strings.HasPrefix(fe.param, "policy") {
					t.Fatalf("%T %v", mistake, err)
				}
			}
			return
		}
		again, err := parsePolicy([]byte(p.String()), true)
		if err != nil || !reflect.DeepEqual(p, again) {
			t.Fatalf("%v became %s and then %v, %v", p, p.String(), again, err)
		}
		var plain policy
		if err := json.Unmarshal([]byte(text), &plain); err != nil {
			t.Fatal(err)
		}
		if plain.allowsModel(model) != p.allowsModel(model) || plain.Stateful != p.Stateful || plain.allowsEndpoint("GET "+model, model) != p.allowsEndpoint("GET "+model, model) {
			t.Errorf("%s: %v or %v", text, p, plain)
		}
		if _, err := parsePolicy([]byte(text), false); err == nil && p.Stateful {
			t.Error("a token's policy turns stateful endpoints on")
		}
		for _, m := range p.Models {
			if !p.allowsModel(strings.TrimSuffix(m, "*")) {
				t.Errorf("%s does not allow %q", text, m)
			}
		}
	})
}
