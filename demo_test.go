// These tests run `llm-proxy demo` as a newcomer does: what it prints works, its
// sample data agrees with itself, and nothing of it stays.
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"image/png"
	"io"
	"maps"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestDemo starts the demo and does what it says to try. The start is held to
// two seconds, so it has the machine to itself; the rest is parallel.
func TestDemo(t *testing.T) {
	env := serveEnv(t)
	env["TMPDIR"] = t.TempDir()
	env["DATA_DIR"], env["DATABASE_URL"], env["OPENAI_API_URL"] = "/nonexistent/and/not/used", "sqlite:/nonexistent/x", "https://example.com"
	start := time.Now()
	s := serveProgram(t, env, "demo")
	most := 2 * time.Second
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		most = time.Minute // the race detector makes SQLite, which is Go here, many times slower
	}
	if took := time.Since(start); took > most {
		t.Errorf("the demo takes %v to start", took)
	}
	t.Parallel()
	out := string(s.out.bytes())
	calls := parseDemoCommands(t, out)
	if len(calls) != 7 {
		t.Fatalf("%d curl lines in %s", len(calls), out)
	}
	want := []string{`"object":"chat.completion"`, "data: [DONE]", `"tool_calls"`, `"type":"message"`, `"calls":`, `"outcome":`, `"request_count":`}
	var clients sync.WaitGroup
	for i, c := range calls {
		clients.Go(func() {
			status, body := c.do(t)
			if status != 200 || !strings.Contains(body, want[i]) {
				t.Errorf("%s %s: %d %s", c.method, c.url, status, clip(body, 300))
			}
		})
	}
	for trigger, want := range map[string]int{"[[error 429]]": 429, "[[error 500]]": 500, "no-such-model": 404} {
		c := calls[0]
		c.body = strings.Replace(c.body, "Hello", trigger, 1)
		if trigger == demoUnknownModel {
			c.body = strings.Replace(calls[0].body, "gpt-4o-mini", trigger, 1)
		}
		clients.Go(func() {
			if status, body := c.do(t); status != want {
				t.Errorf("%s: %d %s", trigger, status, body)
			}
		})
	}
	clients.Wait()
	token, key := findCredential(t, tokenPrefix, out), findCredential(t, manageKeyPrefix, out)
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(env["TMPDIR"]); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	for _, secret := range []string{token, key, "sk-demo-"} {
		if bytes.Contains(s.log.bytes(), []byte(secret)) {
			t.Error("a secret is in the log")
		}
	}
	if strings.Contains(out, "sk-demo-") {
		t.Error("the provider's key is printed")
	}
}

// A demoCommand is a curl line as a request.
type demoCommand struct {
	method, url, body string
	header            http.Header
}

// parseDemoCommands reads the curl lines of the invitation, with the variables that its
// export line sets.
func parseDemoCommands(t *testing.T, out string) (lines []demoCommand) {
	t.Helper()
	vars := map[string]string{}
	for _, m := range regexp.MustCompile(`([A-Z]+)=("[^"]*"|\S+)`).FindAllStringSubmatch(regexp.MustCompile(`(?m)^  export .*$`).FindString(out), -1) {
		vars[m[1]] = strings.Trim(m[2], `"`)
	}
	text := strings.ReplaceAll(out, "\\\n", " ")
	for _, l := range regexp.MustCompile(`(?m)^  curl .*$`).FindAllString(text, -1) {
		c := demoCommand{method: "GET", header: http.Header{}}
		words := regexp.MustCompile(`'[^']*'|"[^"]*"|\S+`).FindAllString(l, -1)[1:]
		for i := range words {
			w := words[i]
			if quoted := strings.Trim(w, "'"); quoted != w {
				w = quoted
			} else {
				w = os.Expand(strings.Trim(w, `"`), func(name string) string { return vars[name] })
			}
			switch {
			case w == "-H" || w == "-d":
				continue
			case i > 0 && words[i-1] == "-H":
				name, value, _ := strings.Cut(w, ": ")
				c.header.Set(name, value)
			case i > 0 && words[i-1] == "-d":
				c.method, c.body = "POST", w
			case w != "-N":
				c.url = w
			}
		}
		lines = append(lines, c)
	}
	return lines
}

func (c demoCommand) do(t *testing.T) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), c.method, c.url, strings.NewReader(c.body))
	if err != nil {
		return 0, err.Error()
	}
	req.Header = c.header
	res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return 0, err.Error()
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, err.Error()
	}
	return res.StatusCode, string(b)
}

// TestDemoData: sums, counts and rows agree, every kind of token and outcome is
// there, and the numbers are believable.
func TestDemoData(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	now := time.Now()
	d, err := p.instance.seedDemoData(t.Context(), now, newSecret(p.provider.key))
	if err != nil {
		t.Fatal(err)
	}
	p.secrets = append(p.secrets, d.token(), d.key())
	if d.projects != 3 || d.tokens != 12 || d.calls < 4000 || d.calls > 15000 {
		t.Errorf("made %d projects, %d tokens, %d calls", d.projects, d.tokens, d.calls)
	}
	one := func(query string) (n int64) {
		t.Helper()
		if err := p.instance.store.readDB.QueryRow(query).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for name, query := range map[string]string{
		"request_count":       `SELECT count(*) FROM tokens t WHERE request_count <> (SELECT count(*) FROM requests r WHERE r.token = t.seq AND r.outcome <> 'refused')`,
		"last_used_at":        `SELECT count(*) FROM tokens t WHERE request_count > 0 AND last_used_at IS NULL`,
		"calls summed by day": `SELECT (SELECT sum(calls) FROM usage_sums WHERE grain = 'day' AND token <> 0) - (SELECT count(*) FROM requests)`,
		"tokens summed by hour": `SELECT (SELECT sum(input_tokens + output_tokens) FROM usage_sums WHERE grain = 'hour' AND token <> 0) -
			(SELECT sum(input_tokens + output_tokens) FROM requests)`,
		"cost":               `SELECT (SELECT sum(cost) FROM usage_sums WHERE grain = 'day' AND token = 0 AND project <> 0) - (SELECT sum(cost) FROM requests)`,
		"rows in the future": `SELECT count(*) FROM requests WHERE started_at > unixepoch() * 1000`,
		"calls before their token, or after its end": `SELECT count(*) FROM requests r JOIN tokens t ON t.seq = r.token WHERE r.started_at < t.created_at
			OR r.outcome <> 'refused' AND (r.started_at > t.expires_at OR r.started_at > t.revoked_at)`,
		"more than max_requests":      `SELECT count(*) FROM tokens WHERE request_count > max_requests`,
		"first byte after the end":    `SELECT count(*) FROM requests WHERE first_byte_us > total_us`,
		"parts larger than the whole": `SELECT count(*) FROM requests WHERE cached_tokens > input_tokens OR reasoning_tokens > output_tokens`,
		"calls of the wrong provider": `SELECT count(*) FROM requests r JOIN upstreams u ON u.seq = r.upstream
			WHERE (u.provider = 'anthropic') <> (r.endpoint = 'POST /v1/messages')`,
	} {
		if n := one(query); n != 0 {
			t.Errorf("%s: %d", name, n)
		}
	}
	for name, query := range map[string]string{
		"revoked tokens":                 `SELECT count(*) FROM tokens WHERE revoked_at IS NOT NULL`,
		"expired tokens":                 `SELECT count(*) FROM tokens WHERE expires_at < unixepoch() * 1000`,
		"tokens expiring soon":           `SELECT count(*) FROM tokens WHERE expires_at BETWEEN unixepoch() * 1000 AND (unixepoch() + 3 * 86400) * 1000`,
		"tokens nearly used up":          `SELECT count(*) FROM tokens WHERE max_requests - request_count BETWEEN 1 AND 10`,
		"unpriced calls":                 `SELECT count(*) FROM requests WHERE cost IS NULL AND usage_source = 'exact'`,
		"streams":                        `SELECT count(*) FROM requests WHERE stream = 1`,
		"ok":                             `SELECT count(*) FROM requests WHERE outcome = 'ok'`,
		"refused":                        `SELECT count(*) FROM requests WHERE outcome = 'refused'`,
		"client_gone":                    `SELECT count(*) FROM requests WHERE outcome = 'client_gone'`,
		"truncated":                      `SELECT count(*) FROM requests WHERE outcome = 'truncated'`,
		"upstream_error":                 `SELECT count(*) FROM requests WHERE outcome = 'upstream_error'`,
		"weekdays busier than week-ends": `SELECT max(0, sum(CASE WHEN strftime('%w', started_at / 1000, 'unixepoch') IN ('0', '6') THEN -5 ELSE 2 END)) FROM requests`,
	} {
		if n := one(query); n == 0 {
			t.Errorf("no %s", name)
		}
	}
	var usage struct{ Data []json.RawMessage }
	p.manage("GET", "/manage/usage?interval=total&group_by=model", "", 200, &usage)
	if len(usage.Data) < 10 {
		t.Errorf("%d models in use", len(usage.Data))
	}
}

// TestDemoHistorySame: the same moment gives the same calls.
func TestDemoHistorySame(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 34, 56, 0, time.UTC)
	a, b := demoHistory(now, demoUsers()), demoHistory(now, demoUsers())
	if !reflect.DeepEqual(a, b) {
		t.Error("two histories of one moment differ")
	}
	ids := map[int64]bool{}
	models := map[string]bool{}
	for _, r := range a {
		ids[r.id], models[r.model] = true, true
	}
	if len(ids) != len(a) || !slices.IsSortedFunc(a, func(x, y *requestRow) int { return int(x.id>>idTimeShift - y.id>>idTimeShift) }) {
		t.Error("ids are not unique or not in order")
	}
	if len(models) < 10 {
		t.Errorf("models: %v", slices.Sorted(maps.Keys(models)))
	}
}

// TestDemoKeepsSettings: the environment holds but for where data is and where
// calls go, and MANAGEMENT_TOKEN is not printed.
func TestDemoKeepsSettings(t *testing.T) {
	t.Parallel()
	env := serveEnv(t)
	env["MANAGEMENT_TOKEN"], env["OPENAI_API_KEY"], env["LOG_FORMAT"] = goodToken, "sk-real-key-canary-123", "json"
	s := serveProgram(t, env, "demo")
	if got := s.status(t, "/manage/projects", goodToken); got != 200 {
		t.Errorf("MANAGEMENT_TOKEN: %d", got)
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	out := string(s.out.bytes())
	if strings.Contains(out, goodToken) || strings.Contains(out, "canary") || strings.Contains(out, manageKeyPrefix) || !strings.Contains(out, "your MANAGEMENT_TOKEN") {
		t.Errorf("printed %s", out)
	}
	if !bytes.HasPrefix(s.log.bytes(), []byte("{")) {
		t.Errorf("LOG_FORMAT=json gives %s", s.log.bytes())
	}
	if _, err := os.Stat(env["DATA_DIR"]); err == nil {
		t.Error("DATA_DIR was made")
	}
}

const demoTestKey = "sk-demo-test"

// demoSend sends body to the provider with its key in both dialects and returns the answer, its body unread.
func demoSend(t *testing.T, srv *httptest.Server, method, path, contentType, body string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, srv.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	if strings.HasPrefix(path, "/v1/messages") {
		req.Header.Set("X-Api-Key", demoTestKey)
		req.Header.Set("Anthropic-Version", "2023-06-01")
	} else {
		req.Header.Set("Authorization", "Bearer "+demoTestKey)
	}
	res, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	return res
}

func demoPost(t *testing.T, srv *httptest.Server, path, body string) *http.Response {
	t.Helper()
	return demoSend(t, srv, "POST", path, "application/json", body)
}

func demoServer(t *testing.T) *httptest.Server {
	srv := httptest.NewServer(newDemoProvider(demoTestKey, 0))
	t.Cleanup(srv.Close)
	return srv
}

// demoDecode reads a whole JSON answer with the status that is wanted.
func demoDecode(t *testing.T, res *http.Response, status int) map[string]any {
	t.Helper()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	var v map[string]any
	if err := json.Unmarshal(b, &v); err != nil || res.StatusCode != status {
		t.Fatalf("got %d %s (%v), want %d", res.StatusCode, b, err, status)
	}
	return v
}

// demoLookup walks a decoded answer: "choices.0.message.content". A missing step gives "absent".
func demoLookup(v any, path string) any {
	for step := range strings.SplitSeq(path, ".") {
		switch x := v.(type) {
		case map[string]any:
			var ok bool
			if v, ok = x[step]; !ok {
				return "absent"
			}
		case []any:
			var i int
			if _, err := fmt.Sscan(step, &i); err != nil || i >= len(x) {
				return "absent"
			}
			v = x[i]
		default:
			return "absent"
		}
	}
	return v
}

// demoEvents reads a stream: the name and the data of each event.
func demoEvents(t *testing.T, res *http.Response) (names, data []string) {
	t.Helper()
	if ct := res.Header.Get("Content-Type"); !strings.HasPrefix(ct, "text/event-stream") {
		t.Fatalf("Content-Type %q, want an event stream", ct)
	}
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	for event := range strings.SplitSeq(strings.TrimSuffix(string(b), "\n\n"), "\n\n") {
		head, body, ok := strings.Cut("\n"+event, "\ndata: ")
		if !ok {
			t.Fatalf("event without data: %q", event)
		}
		names = append(names, strings.TrimPrefix(head, "\nevent: "))
		data = append(data, body)
	}
	return names, data
}

func demoDecodeObject(t *testing.T, data string) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal([]byte(data), &v); err != nil {
		t.Fatalf("%q: %v", data, err)
	}
	return v
}

func TestDemoProviderShapes(t *testing.T) {
	srv := demoServer(t)
	user := `"messages":[{"role":"user","content":"Tell me of rivers"}]` // 17 bytes: 5 tokens
	weather := `"messages":[{"role":"user","content":"What is the weather?"}],"max_tokens":999,"tools":[{"type":"function",` +
		`"function":{"name":"get_weather","parameters":{"type":"object","properties":{"city":{"type":"string"}}}}}]`
	type want map[string]any // path: value; nil is null, "…" anything
	for _, tt := range []struct {
		name, path, body string
		want             want
	}{
		{"chat", "/v1/chat/completions", `{"model":"gpt-4o-mini",` + user + `}`, want{"object": "chat.completion",
			"id": "…", "created": "…", "system_fingerprint": "fp_demo", "model": "gpt-4o-mini", "usage.prompt_tokens": 5.0,
			"choices.0.finish_reason": "stop", "choices.0.message.role": "assistant", "choices.0.message.refusal": nil,
			"usage.completion_tokens_details.reasoning_tokens": 0.0, "usage.prompt_tokens_details.cached_tokens": 0.0}},
		{"chat n", "/v1/chat/completions", `{"model":"gpt-4o","n":3,` + user + `}`, want{"choices.2.index": 2.0}},
		{"chat length", "/v1/chat/completions", `{"model":"gpt-4o","max_completion_tokens":7,` + user + `}`, want{
			"choices.0.finish_reason": "length", "usage.completion_tokens": 7.0, "usage.total_tokens": 12.0}},
		{"chat tool", "/v1/chat/completions", `{"model":"gpt-4o",` + weather + `}`, want{
			"choices.0.finish_reason": "tool_calls", "choices.0.message.content": nil,
			"choices.0.message.tool_calls.0.type":               "function",
			"choices.0.message.tool_calls.0.function.name":      "get_weather",
			"choices.0.message.tool_calls.0.function.arguments": `{"city":"Lisbon"}`}},
		{"chat no tool", "/v1/chat/completions", `{"model":"gpt-4o","tool_choice":"none",` + weather + `}`, want{
			"choices.0.finish_reason": "stop"}},
		{"chat tool result", "/v1/chat/completions", strings.Replace(`{"model":"gpt-4o",`+weather+`}`, `"}],`,
			`"},{"role":"tool","tool_call_id":"call_1","content":"weather: sunny"}],`, 1), want{"choices.0.finish_reason": "stop"}},
		{"chat schema", "/v1/chat/completions", `{"model":"gpt-4o",` + user + `,"response_format":{"type":"json_schema",` +
			`"json_schema":{"name":"x","schema":{"type":"object","properties":{"ok":{"type":"boolean"},"n":{"$ref":"#/$defs/N"}},` +
			`"$defs":{"N":{"enum":["a"]}}}}}}`, want{"choices.0.message.content": `{"n":"a","ok":true}`}},
		{"completions", "/v1/completions", `{"model":"gpt-3.5-turbo-instruct","prompt":["a","b"]}`, want{
			"object": "text_completion", "choices.1.text": "…", "choices.1.finish_reason": "stop", "usage.total_tokens": "…"}},
		{"responses", "/v1/responses", `{"model":"gpt-4.1","input":"Tell me of rivers"}`, want{"object": "response",
			"status": "completed", "error": nil, "output.0.type": "message", "output.0.content.0.type": "output_text",
			"usage.input_tokens": 5.0, "usage.input_tokens_details.cached_tokens": 0.0,
			"usage.output_tokens_details.reasoning_tokens": 0.0, "text.format.type": "text"}},
		{"responses reasoning", "/v1/responses", `{"model":"o3","input":[{"role":"user","content":"hm"}]}`, want{
			"output.0.type": "reasoning", "output.1.type": "message"}},
		{"responses length", "/v1/responses", `{"model":"gpt-4.1","input":"hm","max_output_tokens":4}`, want{
			"status": "incomplete", "incomplete_details.reason": "max_output_tokens", "usage.output_tokens": 4.0}},
		{"responses tool", "/v1/responses", `{"model":"gpt-4.1","input":"hm","tool_choice":{"type":"function","name":"f"},` +
			`"tools":[{"type":"function","name":"f"}]}`, want{"output.0.type": "function_call", "output.0.arguments": "{}"}},
		{"input_tokens", "/v1/responses/input_tokens", `{"model":"gpt-4.1","input":"12345"}`, want{
			"object": "response.input_tokens", "input_tokens": 2.0}},
		{"compact", "/v1/responses/compact", `{"model":"gpt-4.1","input":"12345"}`, want{
			"object": "response.compaction", "output.1.type": "compaction", "usage.input_tokens": 2.0}},
		{"embeddings", "/v1/embeddings", `{"model":"text-embedding-3-small","input":"a"}`, want{
			"object": "list", "data.0.embedding.1535": "…", "data.0.embedding.1536": "absent", "usage.total_tokens": 1.0}},
		{"embeddings large", "/v1/embeddings", `{"model":"text-embedding-3-large","input":["a",[1,2]]}`, want{
			"data.1.index": 1.0, "data.1.embedding.3071": "…", "usage.prompt_tokens": 3.0}},
		{"embeddings tokens", "/v1/embeddings", `{"model":"text-embedding-3-small","input":[7,8,100000],"dimensions":2}`, want{
			"data.1": "absent", "data.0.embedding.1": "…", "data.0.embedding.2": "absent", "usage.prompt_tokens": 3.0}},
		{"moderations", "/v1/moderations", `{"input":["peace","violence"]}`, want{"model": "omni-moderation-latest",
			"results.0.flagged": false, "results.1.flagged": true, "results.1.categories.violence": true,
			"results.1.category_applied_input_types.violence.0": "text"}},
		{"images", "/v1/images/generations", `{"prompt":"a cat"}`, want{"data.0.b64_json": "…",
			"usage.input_tokens": 2.0, "usage.output_tokens": 272.0}},
		{"messages", "/v1/messages", `{"model":"claude-sonnet-5","max_tokens":900,` + user + `}`, want{"type": "message",
			"role": "assistant", "content.0.type": "text", "stop_reason": "end_turn", "stop_sequence": nil,
			"usage.input_tokens": 5.0, "usage.output_tokens": "…"}},
		{"messages tool", "/v1/messages", `{"model":"claude-sonnet-5","max_tokens":900,` + user + `,"tool_choice":{"type":"any"},` +
			`"tools":[{"name":"f","input_schema":{"type":"object","properties":{"n":{"type":"integer","minimum":4}}}}]}`, want{
			"stop_reason": "tool_use", "content.0.type": "tool_use", "content.0.input.n": 4.0}},
		{"count_tokens", "/v1/messages/count_tokens", `{"model":"claude-sonnet-5",` + user + `}`, want{"input_tokens": 5.0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := demoDecode(t, demoPost(t, srv, tt.path, tt.body), 200)
			for path, want := range tt.want {
				got := demoLookup(v, path)
				if want == "…" && got != "absent" && got != nil {
					continue
				}
				if got != want {
					t.Errorf("%s = %v, want %v in %v", path, got, want, v)
				}
			}
		})
	}
}

func TestDemoProviderStreams(t *testing.T) {
	srv := demoServer(t)
	const responses, delta = "response.created response.in_progress ", " response.output_item.done response.completed"
	tool := `"tools":[{"type":"function","name":"f","input_schema":{"properties":{"city":{}}},"parameters":{"properties":` +
		`{"city":{}}},"function":{"name":"f","parameters":{"properties":{"city":{}}}}}]`
	for _, tt := range []struct{ name, path, body, want string }{ // want: the event names (or kinds), repeats folded
		{"chat", "/v1/chat/completions", `{"model":"gpt-4o","messages":[{"content":"a"}]}`, "role content stop [DONE]"},
		{"chat n", "/v1/chat/completions", `{"model":"gpt-4o","n":2,"messages":[{"content":"a"}]}`,
			"role content stop role content stop [DONE]"},
		{"chat usage", "/v1/chat/completions", `{"model":"gpt-4o","messages":[{"content":"a"}],` +
			`"stream_options":{"include_usage":true}}`, "role content stop usage [DONE]"},
		{"chat tool", "/v1/chat/completions", `{"model":"gpt-4o","messages":[{"content":"tool"}],` + tool + `}`,
			"role tool_calls [DONE]"},
		{"completions", "/v1/completions", `{"model":"x","prompt":"a","stream_options":{"include_usage":true}}`,
			"text stop usage [DONE]"},
		{"responses", "/v1/responses", `{"model":"gpt-4.1","input":"a"}`, responses + "response.output_item.added " +
			"response.content_part.added response.output_text.delta response.output_text.done response.content_part.done" + delta},
		{"responses tool", "/v1/responses", `{"model":"gpt-4.1","input":"tool",` + tool + `}`, responses +
			"response.output_item.added response.function_call_arguments.delta response.function_call_arguments.done" + delta},
		{"responses length", "/v1/responses", `{"model":"gpt-4.1","input":"a","max_output_tokens":1}`, responses +
			"response.output_item.added response.content_part.added response.output_text.delta response.output_text.done " +
			"response.content_part.done response.output_item.done response.incomplete"},
		{"messages", "/v1/messages", `{"model":"c","max_tokens":99,"messages":[{"content":"a"}]}`, "message_start " +
			"content_block_start ping content_block_delta content_block_stop message_delta message_stop"},
		{"messages tool", "/v1/messages", `{"model":"c","max_tokens":99,"messages":[{"content":"tool"}],` + tool + `}`,
			"message_start content_block_start ping content_block_delta content_block_stop message_delta message_stop"},
		{"speech", "/v1/audio/speech", `{"model":"gpt-4o-mini-tts","input":"a","stream_format":"sse"}`,
			"speech.audio.delta speech.audio.done"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			body := `{"stream":true,` + tt.body[1:]
			names, data := demoEvents(t, demoPost(t, srv, tt.path, body))
			var kinds []string
			for i, d := range data {
				kinds = append(kinds, demoEventKind(t, d))
				if names[i] != "" && names[i] != kinds[i] {
					t.Errorf("event %q carries type %q", names[i], kinds[i])
				}
			}
			if got := strings.Join(slices.Compact(kinds), " "); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// demoEventKind names an event by its type, or a chunk by what it brings.
func demoEventKind(t *testing.T, data string) string {
	if data == "[DONE]" {
		return data
	}
	v := demoDecodeObject(t, data)
	if kind, ok := v["type"].(string); ok {
		return kind
	}
	if finish, ok := demoLookup(v, "choices.0.finish_reason").(string); ok && finish != "absent" {
		return finish
	}
	for _, kind := range []string{"role", "content", "tool_calls"} {
		if demoLookup(v, "choices.0.delta."+kind) != "absent" {
			return kind
		}
	}
	if demoLookup(v, "choices.0.text") != "absent" {
		return "text"
	}
	if demoLookup(v, "usage.total_tokens") != "absent" {
		return "usage"
	}
	return "unknown: " + data
}

// A stream and a whole answer say the same and cost the same.
func TestDemoProviderStreamEqualsWhole(t *testing.T) {
	srv := demoServer(t)
	body := `"model":"gpt-5-mini","seed":7,"messages":[{"role":"user","content":[{"type":"text","text":"Why bread?"}]}]}`
	whole := demoDecode(t, demoPost(t, srv, "/v1/chat/completions", "{"+body), 200)
	_, data := demoEvents(t, demoPost(t, srv, "/v1/chat/completions",
		`{"stream":true,"stream_options":{"include_usage":true},`+body))
	var text strings.Builder
	for _, d := range data[:len(data)-2] {
		v := demoDecodeObject(t, d)
		if usage := demoLookup(v, "usage"); usage != nil {
			t.Fatalf("usage %v in an early chunk, want null", usage)
		}
		if s, ok := demoLookup(v, "choices.0.delta.content").(string); ok && s != "absent" {
			text.WriteString(s)
		}
	}
	if want := demoLookup(whole, "choices.0.message.content"); text.String() != want {
		t.Errorf("stream says %q, whole says %q", text.String(), want)
	}
	got, want := demoDecodeObject(t, data[len(data)-2])["usage"], whole["usage"]
	if fmt.Sprint(got) != fmt.Sprint(want) || demoLookup(want, "completion_tokens_details.reasoning_tokens").(float64) < 64 {
		t.Errorf("stream costs %v, whole costs %v", got, want)
	}
}

func TestDemoProviderErrors(t *testing.T) {
	srv := demoServer(t)
	ask := func(prompt string) string {
		return `{"model":"m","max_tokens":9,"messages":[{"content":"` + prompt + `"}]}`
	}
	for _, tt := range []struct {
		name, path, body string
		status           int
		kind             string
		code             any
	}{
		{"429", "/v1/chat/completions", ask("[[error 429]]"), 429, "requests", "rate_limit_exceeded"},
		{"500", "/v1/responses", `{"model":"m","input":"[[error 500]]"}`, 500, "server_error", nil},
		{"503", "/v1/embeddings", `{"model":"m","input":"[[error 503]]"}`, 503, "server_error", nil},
		{"429 anthropic", "/v1/messages", ask("[[error 429]]"), 429, "rate_limit_error", "absent"},
		{"529 anthropic", "/v1/messages", ask("[[error 529]]"), 529, "overloaded_error", "absent"},
		{"no model", "/v1/chat/completions", `{"model":"no-such-model"}`, 404, "invalid_request_error", "model_not_found"},
		{"no model anthropic", "/v1/messages", `{"model":"no-such-model"}`, 404, "not_found_error", "absent"},
		{"bad JSON", "/v1/responses", `{"model":`, 400, "invalid_request_error", nil},
		{"bad JSON anthropic", "/v1/messages", `nope`, 400, "invalid_request_error", "absent"},
		{"model missing", "/v1/chat/completions", `{}`, 400, "invalid_request_error", nil},
		{"max_tokens missing", "/v1/messages", `{"model":"c","messages":[{}]}`, 400, "invalid_request_error", "absent"},
		{"dimensions", "/v1/embeddings", `{"model":"m","input":"a","dimensions":9999}`, 400, "invalid_request_error", nil},
		{"unknown URL", "/v1/nothing", `{}`, 404, "invalid_request_error", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			res := demoPost(t, srv, tt.path, tt.body)
			v := demoDecode(t, res, tt.status)
			if kind, code := demoLookup(v, "error.type"), demoLookup(v, "error.code"); kind != tt.kind || code != tt.code {
				t.Errorf("type %v code %v, want %v %v", kind, code, tt.kind, tt.code)
			}
			if got := res.Header.Get("Retry-After"); (got != "") != (tt.status == 429) {
				t.Errorf("Retry-After %q", got)
			}
			id, want := res.Header.Get("X-Request-Id"), "absent"
			if strings.HasPrefix(tt.path, "/v1/messages") {
				id, want = res.Header.Get("Request-Id"), res.Header.Get("Request-Id")
			}
			if !strings.HasPrefix(id, "req_") || demoLookup(v, "request_id") != want {
				t.Errorf("request id %q in the header, %v in the body", id, demoLookup(v, "request_id"))
			}
		})
	}
}

func TestDemoProviderCut(t *testing.T) {
	srv := demoServer(t)
	for _, stream := range []string{"false", "true"} {
		for path, body := range map[string]string{
			"/v1/chat/completions": `"messages":[{"content":"[[cut]]"}]`,
			"/v1/completions":      `"prompt":"[[cut]]"`,
			"/v1/responses":        `"input":"[[cut]]"`,
			"/v1/messages":         `"messages":[{"content":"[[cut]]"}],"max_tokens":1`,
		} {
			res := demoPost(t, srv, path, `{"model":"m","stream":`+stream+`,`+body+`}`)
			b, err := io.ReadAll(res.Body)
			if !errors.Is(err, io.ErrUnexpectedEOF) || len(b) == 0 || bytes.Contains(b, []byte("[DONE]")) {
				t.Errorf("%s stream=%s: %d bytes, then %v; want a part and an unexpected EOF", path, stream, len(b), err)
			}
		}
	}
}

func TestDemoProviderNeedsItsKey(t *testing.T) {
	srv := demoServer(t)
	for _, tt := range []struct {
		method, path, header, value string
		status                      int
		kind                        string
	}{
		{"POST", "/v1/chat/completions", "Authorization", "Bearer wrong", 401, "invalid_request_error"},
		{"POST", "/v1/chat/completions", "X-Api-Key", demoTestKey, 401, "invalid_request_error"},
		{"GET", "/v1/models", "", "", 401, "invalid_request_error"},
		{"POST", "/v1/nothing", "", "", 401, "invalid_request_error"},
		{"POST", "/v1/messages", "X-Api-Key", "wrong", 401, "authentication_error"},
		{"POST", "/v1/messages", "Authorization", "Bearer wrong", 401, "authentication_error"},
		{"POST", "/v1/messages", "Authorization", "Bearer " + demoTestKey, 400, "invalid_request_error"}, // no anthropic-version
		{"POST", "/v1/messages", "X-Api-Key", demoTestKey, 400, "invalid_request_error"},                 // no anthropic-version
	} {
		req, _ := http.NewRequestWithContext(t.Context(), tt.method, srv.URL+tt.path, strings.NewReader(`{"model":"m"}`))
		req.Header.Set(tt.header, tt.value)
		if tt.header == "" {
			req.Header = http.Header{}
		}
		res, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if kind := demoLookup(demoDecode(t, res, tt.status), "error.type"); kind != tt.kind {
			t.Errorf("%s %s with %s: type %v, want %v", tt.method, tt.path, tt.header, kind, tt.kind)
		}
		res.Body.Close()
	}
}

func TestDemoProviderRemembersPrefixes(t *testing.T) {
	p := newDemoProvider(demoTestKey, 0)
	long := strings.Repeat("0123456789abcdef", 600) // 9600 bytes, 2400 tokens
	for _, tt := range []struct {
		model, prompt string
		want          int
	}{{"m", long, 0}, {"m", long, 2048}, {"m", long[:8191], 1024}, {"m", "x" + long, 0}, {"other", long, 0}, {"m", "short", 0}} {
		if got := p.cachedTokens(tt.model, tt.prompt); got != tt.want {
			t.Errorf("cached(%s, %d bytes) = %d, want %d", tt.model, len(tt.prompt), got, tt.want)
		}
	}
	for i := range demoMaxPrefixes {
		p.cachedTokens("m", fmt.Sprint(i, long))
		if len(p.seenPrefixes) > demoMaxPrefixes {
			t.Fatalf("%d prefixes remembered", len(p.seenPrefixes))
		}
	}
}

func TestDemoProviderPace(t *testing.T) {
	srv := httptest.NewServer(newDemoProvider(demoTestKey, time.Millisecond))
	defer srv.Close()
	start := time.Now()
	demoEvents(t, demoPost(t, srv, "/v1/chat/completions", `{"model":"m","stream":true,"messages":[{"content":"a"}]}`))
	if took := time.Since(start); took < 150*time.Millisecond {
		t.Errorf("a paced stream took %v", took)
	}
	start = time.Now()
	demoPost(t, demoServer(t), "/v1/embeddings", `{"model":"m","input":"[[slow 60ms]]"}`)
	if took := time.Since(start); took < 60*time.Millisecond {
		t.Errorf("[[slow 60ms]] took %v", took)
	}
}

// A client that leaves ends the call at once: Close waits for running calls.
func TestDemoProviderClientLeaves(t *testing.T) {
	srv := httptest.NewServer(newDemoProvider(demoTestKey, time.Hour))
	res := demoPost(t, srv, "/v1/responses", `{"model":"m","stream":true,"input":"a"}`)
	if _, err := io.ReadFull(res.Body, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	start := time.Now()
	srv.Close()
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("the call ended after %v", took)
	}
}

func TestDemoProviderModels(t *testing.T) {
	srv := demoServer(t)
	v := demoDecode(t, demoSend(t, srv, "GET", "/v1/models", "", ""), 200)
	if v["object"] != "list" || demoLookup(v, "data.0.object") != "model" {
		t.Errorf("models: %v", v)
	}
	if v := demoDecode(t, demoSend(t, srv, "GET", "/v1/models/a/b", "", ""), 200); v["id"] != "a/b" {
		t.Errorf("model: %v", v)
	}
	demoDecode(t, demoSend(t, srv, "GET", "/v1/models/no-such-model", "", ""), 404)
	req, _ := http.NewRequestWithContext(t.Context(), "GET", srv.URL+"/v1/models", nil)
	req.Header.Set("X-Api-Key", demoTestKey)
	req.Header.Set("Anthropic-Version", "2023-06-01")
	res, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if v := demoDecode(t, res, 200); v["has_more"] != false || demoLookup(v, "data.0.type") != "model" {
		t.Errorf("Anthropic models: %v", v)
	}
}

func TestDemoProviderMedia(t *testing.T) {
	srv := demoServer(t)
	floats := demoDecode(t, demoPost(t, srv, "/v1/embeddings", `{"model":"m","input":"a","dimensions":8}`), 200)
	coded := demoDecode(t, demoPost(t, srv, "/v1/embeddings",
		`{"model":"m","input":"a","dimensions":8,"encoding_format":"base64"}`), 200)
	b, err := base64.StdEncoding.DecodeString(demoLookup(coded, "data.0.embedding").(string))
	if err != nil || len(b) != 8*4 {
		t.Errorf("base64 embedding of %d bytes: %v", len(b), err)
	}
	length := 0.0
	for _, x := range demoLookup(floats, "data.0.embedding").([]any) {
		length += x.(float64) * x.(float64)
	}
	if length < 0.999 || length > 1.001 {
		t.Errorf("embedding of squared length %v, want 1", length)
	}
	v := demoDecode(t, demoPost(t, srv, "/v1/images/generations", `{"prompt":"a","n":2}`), 200)
	b, _ = base64.StdEncoding.DecodeString(demoLookup(v, "data.1.b64_json").(string))
	if _, err := png.Decode(bytes.NewReader(b)); err != nil {
		t.Errorf("picture: %v", err)
	}
	res := demoPost(t, srv, "/v1/audio/speech", `{"model":"tts-1","input":"a","voice":"alloy"}`)
	b, _ = io.ReadAll(res.Body)
	if res.Header.Get("Content-Type") != "audio/wav" || !bytes.HasPrefix(b, []byte("RIFF")) || len(b) != 4044 {
		t.Errorf("speech: %s, %d bytes", res.Header.Get("Content-Type"), len(b))
	}
	for _, path := range []string{"/v1/audio/transcriptions", "/v1/audio/translations"} {
		var form bytes.Buffer
		w := multipart.NewWriter(&form)
		w.WriteField("model", "gpt-4o-mini-transcribe")
		part, _ := w.CreateFormFile("file", "a.wav")
		part.Write(b)
		w.Close()
		v := demoDecode(t, demoSend(t, srv, "POST", path, w.FormDataContentType(), form.String()), 200)
		if v["text"] == "" || demoLookup(v, "usage.input_token_details.audio_tokens") != 10.0 {
			t.Errorf("%s: %v", path, v)
		}
	}
}
