// This file tests whole calls. Most of them are transcripts in testdata/calls, one case a file; README.md there describes
// the form. The others need more than one call or another protocol.
package main

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// A callCase is one file of testdata/calls.
type callCase struct {
	preamble string // comments and settings, as they are in the file
	settings map[string]string
	sections []callSection
}

// A callSection is a part of a transcript, under a heading "--- NAME".
type callSection struct{ name, text string }

// splitHead splits a message into its first line, its header lines and its body. One line end at the end of the text
// belongs to the file and not to the body, unless the body is a stream of events.
func (s callSection) splitHead() (first string, header []string, body string) {
	head, body, _ := strings.Cut(s.text, "\n\n")
	lines := strings.Split(strings.TrimSuffix(head, "\n"), "\n")
	contentType := ""
	for _, line := range lines {
		if name, value, _ := strings.Cut(line, ": "); strings.EqualFold(name, "Content-Type") {
			contentType = value
		}
	}
	if !strings.HasPrefix(contentType, "text/event-stream") {
		body = strings.TrimSuffix(body, "\n")
	}
	if strings.HasPrefix(contentType, "multipart/") {
		body = strings.ReplaceAll(body, "\n", "\r\n")
	}
	return lines[0], lines[1:], body
}

// readCallCase reads a transcript.
func readCallCase(t *testing.T, file string) *callCase {
	t.Helper()
	preamble, rest, _ := strings.Cut(mustReadFile(t, file), "--- ")
	rest = strings.TrimSuffix(rest, "\n")
	c := &callCase{preamble: preamble, settings: map[string]string{}}
	for line := range strings.Lines(preamble) {
		if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); ok && !strings.HasPrefix(line, "#") {
			c.settings[name] = value
		}
	}
	for section := range strings.SplitSeq(rest, "\n--- ") {
		name, text, found := strings.Cut(section, "\n")
		if found {
			text += "\n"
		}
		c.sections = append(c.sections, callSection{name, text})
	}
	return c
}

// write writes the answer of a provider.
func (s callSection) write(c *providerConn) bool {
	if strings.HasSuffix(s.name, ", raw") {
		_, _ = io.WriteString(c, strings.ReplaceAll(s.text, "\n", "\r\n"))
		return false
	}
	status, header, body := s.splitHead()
	breaksOff := strings.HasSuffix(s.name, ", broken off")
	isStream := slices.Contains(header, "Content-Type: text/event-stream")
	switch {
	case isStream:
		header = append(header, "Transfer-Encoding: chunked")
	case breaksOff:
		header = append(header, fmt.Sprint("Content-Length: ", len(body)+1))
	default:
		header = append(header, fmt.Sprint("Content-Length: ", len(body)))
	}
	_, _ = io.WriteString(c, "HTTP/1.1 "+status+" X\r\n"+strings.Join(header, "\r\n")+"\r\n\r\n")
	if !isStream {
		_, err := io.WriteString(c, body)
		return err == nil && !breaksOff
	}
	for event := range strings.SplitAfterSeq(body, "\n\n") {
		if event != "" && c.chunk(event) != nil {
			return false
		}
	}
	return !breaksOff && c.chunk("") == nil
}

// A callRunner runs one transcript.
type callRunner struct {
	*testProxy
	c   *callCase
	got []callSection // what happened, in the form of the file
}

// newCallRunner returns a proxy that is set up as a transcript asks for.
func newCallRunner(t *testing.T, c *callCase) *callRunner {
	t.Helper()
	env := map[string]string{}
	for setting := range strings.FieldsSeq(c.settings["env"]) {
		name, value, _ := strings.Cut(setting, "=")
		env[name] = value
	}
	p := &callRunner{testProxy: newTest(t, env), c: c}
	p.allowErrors = true // an answer that quotes the key is one
	upstreams := "/manage/projects/" + p.project + "/upstreams"
	provider := fmt.Sprintf(`{"base_url":"%s/v1","api_key":%q,`, p.provider.url, p.provider.key)
	if fields, ok := c.settings["upstream"]; ok {
		p.manage("PATCH", upstreams+"/"+p.upstream, fields, 200, nil)
	}
	if fields, ok := c.settings["add upstream"]; ok {
		p.manage("POST", upstreams, provider+strings.TrimPrefix(fields, "{"), 201, nil)
	}
	switch c.settings["provider"] {
	case "anthropic":
		p.manage("POST", upstreams, provider+`"name":"claude","provider":"anthropic"}`, 201, nil)
	case "google":
		google := fmt.Sprintf(`{"base_url":"%s","api_key":%q,"name":"gemini","provider":"google",`+
			`"rewrite":{"team-model":"gemini-2.5-flash"}}`, p.provider.url, p.provider.key)
		p.manage("POST", upstreams, google, 201, nil)
	}
	if c.settings["provider"] != "" {
		p.manage("DELETE", upstreams+"/"+p.upstream, "", 200, nil)
	}
	if fields, ok := c.settings["project"]; ok {
		p.manage("PATCH", "/manage/projects/"+p.project, fields, 200, nil)
	}
	if fields, ok := c.settings["token"]; ok {
		p.manage("PATCH", "/manage/tokens/"+p.tokenID, fields, 200, nil)
	}
	return p
}

// run makes the call, and adds what happened to got.
func (p *callRunner) run() {
	p.t.Helper()
	var answers []callSection
	for _, s := range p.c.sections {
		if strings.HasPrefix(s.name, "provider answers") {
			answers = append(answers, s)
		}
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		n := len(p.provider.received())
		if n > len(answers) {
			return false
		}
		a := answers[n-1]
		a.text = strings.ReplaceAll(a.text, "{key}", p.provider.key)
		return a.write(c)
	})
	client := p.send(p.c.sections[0])
	p.got = append(p.got, p.c.sections[0])
	for i, r := range p.provider.received() {
		p.got = append(p.got, callSection{"provider gets", p.message(r.method+" "+r.target, r.header, r.body, "Host")})
		if i < len(answers) {
			p.got = append(p.got, answers[i])
		}
	}
	p.got = append(p.got, client)
	for _, row := range p.ledger() {
		p.got = append(p.got, callSection{"row", p.row(row)})
	}
}

// send sends a client's request, and returns what the client gets.
func (p *callRunner) send(request callSection) callSection {
	p.t.Helper()
	request.text = strings.ReplaceAll(request.text, "{token}", p.token)
	first, header, body := request.splitHead()
	hasCredential := regexp.MustCompile(`(?im)^(authorization|x-api-key|api-key):`)
	header = append(header, "Host: proxy.test", "Connection: close")
	if p.c.settings["authorization"] != "none" && !hasCredential.MatchString(strings.Join(header, "\n")) {
		header = append(header, "Authorization: Bearer "+p.token)
	}
	if body != "" {
		header = append(header, fmt.Sprint("Content-Length: ", len(body)))
	}
	conn := p.dial()
	if _, err := io.WriteString(conn, first+" HTTP/1.1\r\n"+strings.Join(header, "\r\n")+"\r\n\r\n"+body); err != nil {
		p.t.Fatal(err)
	}
	method, _, _ := strings.Cut(first, " ")
	res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		return callSection{"client gets nothing", ""}
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	p.mu.Lock()
	fmt.Fprintf(&p.clientOutput, "%v %v %s", res.Header, res.Trailer, b)
	p.mu.Unlock()
	name := "client gets"
	if err != nil {
		name += ", broken off"
	}
	for name := range res.Trailer {
		res.Header.Add("Trailer", name)
	}
	return callSection{name, p.message(fmt.Sprint(res.StatusCode), res.Header, string(b), "Connection", "Date")}
}

// message returns a message in the form of the file, with its header sorted and what differs from run to run named.
func (p *callRunner) message(first string, header http.Header, body string, without ...string) string {
	lines := []string{}
	for name, values := range header {
		for _, v := range values {
			if !slices.Contains(without, name) {
				lines = append(lines, name+": "+v)
			}
		}
	}
	slices.Sort(lines)
	text := strings.Join(append([]string{first}, lines...), "\n") + "\n"
	if body != "" {
		text += "\n" + body
		if !strings.Contains(header.Get("Content-Type"), "text/event-stream") {
			text += "\n"
		}
	}
	if strings.HasPrefix(header.Get("Content-Type"), "multipart/") {
		text = strings.ReplaceAll(text, "\r\n", "\n")
	}
	text = strings.NewReplacer(p.provider.key, "{key}", p.token, "{token}", p.upstream, "{upstream}").Replace(text)
	return regexp.MustCompile(`req_[0-9a-z]{13}\b`).ReplaceAllString(text, "{id}")
}

// row returns a row of the ledger in the form of the file: all that is not zero.
func (p *callRunner) row(r requestEntry) string {
	var b strings.Builder
	for _, f := range []struct {
		name  string
		value any
	}{
		{"endpoint", r.Endpoint}, {"model", r.Model}, {"outcome", r.Outcome}, {"status", r.Status},
		{"error_code", r.ErrorCode}, {"limit_hit", r.LimitHit}, {"stream", r.Stream}, {"attempts", r.Attempts},
		{"usage_source", r.UsageSource},
		{"input_tokens", r.InputTokens}, {"cached_tokens", r.CachedTokens}, {"output_tokens", r.OutputTokens},
		{"reasoning_tokens", r.ReasoningTokens},
		{"session", r.Session}, {"end_user", r.EndUser}, {"tags", r.Tags.text()},
	} {
		if text := fmt.Sprint(f.value); text != "" && text != "0" && text != "false" {
			fmt.Fprintf(&b, "%s: %s\n", f.name, text)
		}
	}
	if r.Cost != nil {
		fmt.Fprintf(&b, "cost: %.9f\n", *r.Cost)
	}
	return b.String()
}

// matches reports whether text is what a section of the file expects, where <any> stands for anything, and a length in
// brackets may be missing.
func (s callSection) matches(got callSection) bool {
	pattern := strings.ReplaceAll(regexp.QuoteMeta(s.text), "<any>", ".*?")
	pattern = regexp.MustCompile(`(?m)^\\\[(Content-Length: \d+)\\\]\n`).ReplaceAllString(pattern, "(?:$1\n)?")
	return s.name == got.name && regexp.MustCompile(`\A(?s:`+pattern+`)\z`).MatchString(got.text)
}

// TestCalls: each transcript of testdata/calls, byte for byte. LLM_PROXY_GOLDEN=1 writes what happened into the files.
func TestCalls(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/calls/*.txt")
	if err != nil || len(files) < 100 {
		t.Fatalf("testdata/calls has %d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			c := readCallCase(t, file)
			p := newCallRunner(t, c)
			p.run()
			if os.Getenv("LLM_PROXY_GOLDEN") != "" {
				if err := os.WriteFile(file, []byte(p.transcript()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			for i, got := range p.got {
				if i >= len(c.sections) || !c.sections[i].matches(got) {
					t.Errorf("%s, section %d: unexpected\n--- %s\n%s", file, i+1, got.name, got.text)
				}
			}
			if len(p.got) < len(c.sections) {
				t.Errorf("%s has %d sections, but only %d happened", file, len(c.sections), len(p.got))
			}
		})
	}
}

// transcript returns what happened as a file, in the words of the old file where these match.
func (p *callRunner) transcript() string {
	var text strings.Builder
	text.WriteString(p.c.preamble)
	for i, got := range p.got {
		if i < len(p.c.sections) && p.c.sections[i].matches(got) {
			got = p.c.sections[i]
		}
		text.WriteString("--- " + got.name + "\n" + got.text)
	}
	return text.String()
}

// TestHTTP2: over TLS the proxy speaks HTTP/2. Calls, streams, cuts and revocation work as over HTTP/1.
func TestHTTP2(t *testing.T) {
	t.Parallel()
	cert, key := testCertificate(t, t.TempDir(), time.Hour)
	p := newTest(t, map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key})
	if res := p.chat(); res.status != 200 || res.body != chatResponseBody || res.header.Get("Connection") != "" {
		t.Errorf("unary: got %d %s", res.status, res.body)
	}
	if res := p.chat(`"stream":true`); res.err != nil || res.body != strings.Join(chatEvents(false), "") {
		t.Errorf("stream: got %v %s", res.err, res.body)
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(false)[0])
		return c.reset()
	})
	if res := p.chat(`"stream":true`); res.status == 200 && res.err == nil {
		t.Errorf("a cut stream ended cleanly: %s", res.body)
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(false)[0])
		return !c.waitClosed(hangTimeout)
	})
	req := httptest.NewRequestWithContext(t.Context(), "POST", p.url+"/v1/chat/completions",
		strings.NewReader(chatBody(`"stream":true`)))
	req.Header = http.Header{"Authorization": {"Bearer " + p.token}, "Content-Type": {"application/json"}}
	h2 := p.http2(cert)
	defer h2.CloseIdleConnections()
	res, err := h2.RoundTrip(req)
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("a stream: got %v %v", res, err)
	}
	p.manage("DELETE", "/manage/tokens/"+p.tokenID, "", 200, nil)
	if body, err := io.ReadAll(res.Body); err == nil {
		t.Errorf("a revoked token's stream ended cleanly: %s", body)
	}
	if res := p.chat(); res.status != 401 {
		t.Errorf("after revocation: got %d", res.status)
	}
	var outcomes []string
	for _, row := range p.ledger() {
		outcomes = append(outcomes, row.Outcome)
	}
	if want := []string{"ok", "ok", "truncated", "truncated", "refused"}; !slices.Equal(outcomes, want) {
		t.Errorf("the ledger has %v, want %v", outcomes, want)
	}
}
