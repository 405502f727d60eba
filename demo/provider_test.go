// These tests call the stand-in provider over HTTP as the SDKs do.
package demo

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"image/png"
	"io"
	"math/rand/v2"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

const testKey = "sk-demo-test"

// send sends body to the provider with its key and returns the answer. The caller reads its body.
func send(t *testing.T, srv *httptest.Server, method, path, contentType, body string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, srv.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	if strings.HasPrefix(path, "/v1/messages") {
		req.Header.Set("X-Api-Key", testKey)
		req.Header.Set("Anthropic-Version", "2023-06-01")
	} else {
		req.Header.Set("Authorization", "Bearer "+testKey)
	}
	res, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	return res
}

func post(t *testing.T, srv *httptest.Server, path, body string) *http.Response {
	t.Helper()
	return send(t, srv, "POST", path, "application/json", body)
}

func newServer(t *testing.T) *httptest.Server {
	srv := httptest.NewServer(NewProvider(testKey, 0))
	t.Cleanup(srv.Close)
	return srv
}

// decode reads a JSON answer that must have the given status.
func decode(t *testing.T, res *http.Response, status int) map[string]any {
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

// lookup returns the value at a path such as "choices.0.message.content", or "absent".
func lookup(v any, path string) any {
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

// readEvents reads a stream and returns the name and the data of each event.
func readEvents(t *testing.T, res *http.Response) (names, data []string) {
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

func decodeObject(t *testing.T, data string) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal([]byte(data), &v); err != nil {
		t.Fatalf("%q: %v", data, err)
	}
	return v
}

// TestDemoToolArguments: the arguments of a tool call are what the question names.
func TestDemoToolArguments(t *testing.T) {
	for _, c := range []struct{ question, properties, want string }{
		{"What is the weather in Berlin?", `"city":{"type":"string"}`, `{"city":"Berlin"}`},
		{"Weather for New York, please", `"location":{"type":"string"}`, `{"location":"New York"}`},
		{"weather in paris tomorrow", `"city":{"type":"string"}`, `{"city":"paris"}`},
		{"Is the weather good? I ask for São Paulo.", `"city":{"type":"string"}`, `{"city":"São Paulo"}`},
		{"Will Oslo have nice weather in the evening", `"place":{"type":"string"}`, `{"place":"Oslo"}`},
		{"What is the weather?", `"city":{"type":"string"}`, `{"city":"Lisbon"}`},
		{"tool: Weather in Rome in fahrenheit, for 3 days", `"city":{"type":"string"},"days":{"type":"integer"},
			"unit":{"type":"string","enum":["celsius","fahrenheit"]}`, `{"city":"Rome","days":3,"unit":"fahrenheit"}`},
		{"Use the tool to add 2.5 and -7", `"a":{"type":"number"},"b":{"type":"number"}`, `{"a":2.5,"b":-7}`},
		{"tool: book 2026-12-24 for bob@example.org", `"date":{"type":"string"},"mail":{"type":"string"}`,
			`{"date":"2026-12-24","mail":"bob@example.org"}`},
	} {
		schema := map[string]any{}
		if err := json.Unmarshal([]byte(`{"type":"object","properties":{`+c.properties+`}}`), &schema); err != nil {
			t.Fatal(err)
		}
		if got := sampleJSON(schema, c.question, rand.New(rand.NewPCG(1, 1))); got != c.want {
			t.Errorf("%q: %s, want %s", c.question, got, c.want)
		}
	}
}

func TestDemoProviderShapes(t *testing.T) {
	srv := newServer(t)
	user := `"messages":[{"role":"user","content":"Tell me of rivers"}]` // 17 bytes: 5 tokens
	weather := `"messages":[{"role":"user","content":"What is the weather?"}],"max_tokens":999,` +
		`"tools":[{"type":"function","function":{"name":"get_weather",` +
		`"parameters":{"type":"object","properties":{"city":{"type":"string"}}}}}]`
	type want map[string]any // value by path; nil: null, "…": any value
	for _, tt := range []struct {
		name, path, body string
		want             want
	}{
		{"chat", "/v1/chat/completions", `{"model":"gpt-4o-mini",` + user + `}`, want{"object": "chat.completion",
			"id": "…", "created": "…", "system_fingerprint": "fp_demo", "model": "gpt-4o-mini",
			"usage.prompt_tokens":     5.0,
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
			`"},{"role":"tool","tool_call_id":"call_1","content":"weather: sunny"}],`, 1),
			want{"choices.0.finish_reason": "stop"}},
		{"chat schema", "/v1/chat/completions", `{"model":"gpt-4o",` + user +
			`,"response_format":{"type":"json_schema",` +
			`"json_schema":{"name":"x","schema":{"type":"object",` +
			`"properties":{"ok":{"type":"boolean"},"n":{"$ref":"#/$defs/N"}},` +
			`"$defs":{"N":{"enum":["a"]}}}}}}`, want{"choices.0.message.content": `{"n":"a","ok":true}`}},
		{"completions", "/v1/completions", `{"model":"gpt-3.5-turbo-instruct","prompt":["a","b"]}`, want{
			"object": "text_completion", "choices.1.text": "…", "choices.1.finish_reason": "stop",
			"usage.total_tokens": "…"}},
		{"responses", "/v1/responses", `{"model":"gpt-4.1","input":"Tell me of rivers"}`, want{"object": "response",
			"status": "completed", "error": nil, "output.0.type": "message", "output.0.content.0.type": "output_text",
			"usage.input_tokens": 5.0, "usage.input_tokens_details.cached_tokens": 0.0,
			"usage.output_tokens_details.reasoning_tokens": 0.0, "text.format.type": "text"}},
		{"responses reasoning", "/v1/responses", `{"model":"o3","input":[{"role":"user","content":"hm"}]}`, want{
			"output.0.type": "reasoning", "output.1.type": "message"}},
		{"responses length", "/v1/responses", `{"model":"gpt-4.1","input":"hm","max_output_tokens":4}`, want{
			"status": "incomplete", "incomplete_details.reason": "max_output_tokens", "usage.output_tokens": 4.0}},
		{"responses tool", "/v1/responses",
			`{"model":"gpt-4.1","input":"hm","tool_choice":{"type":"function","name":"f"},` +
				`"tools":[{"type":"function","name":"f"}]}`, want{"output.0.type": "function_call",
				"output.0.arguments": "{}"}},
		{"input_tokens", "/v1/responses/input_tokens", `{"model":"gpt-4.1","input":"12345"}`, want{
			"object": "response.input_tokens", "input_tokens": 2.0}},
		{"compact", "/v1/responses/compact", `{"model":"gpt-4.1","input":"12345"}`, want{
			"object": "response.compaction", "output.1.type": "compaction", "usage.input_tokens": 2.0}},
		{"embeddings", "/v1/embeddings", `{"model":"text-embedding-3-small","input":"a"}`, want{
			"object": "list", "data.0.embedding.1535": "…", "data.0.embedding.1536": "absent",
			"usage.total_tokens": 1.0}},
		{"embeddings large", "/v1/embeddings", `{"model":"text-embedding-3-large","input":["a",[1,2]]}`, want{
			"data.1.index": 1.0, "data.1.embedding.3071": "…", "usage.prompt_tokens": 3.0}},
		{"embeddings tokens", "/v1/embeddings",
			`{"model":"text-embedding-3-small","input":[7,8,100000],"dimensions":2}`, want{
				"data.1": "absent", "data.0.embedding.1": "…", "data.0.embedding.2": "absent",
				"usage.prompt_tokens": 3.0}},
		{"moderations", "/v1/moderations", `{"input":["peace","violence"]}`, want{"model": "omni-moderation-latest",
			"results.0.flagged": false, "results.1.flagged": true, "results.1.categories.violence": true,
			"results.1.category_applied_input_types.violence.0": "text"}},
		{"images", "/v1/images/generations", `{"prompt":"a cat"}`, want{"data.0.b64_json": "…",
			"usage.input_tokens": 2.0, "usage.output_tokens": 272.0}},
		{"messages", "/v1/messages", `{"model":"claude-sonnet-5","max_tokens":900,` + user + `}`,
			want{"type": "message",
				"role": "assistant", "content.0.type": "text", "stop_reason": "end_turn", "stop_sequence": nil,
				"usage.input_tokens": 5.0, "usage.output_tokens": "…"}},
		{"messages tool", "/v1/messages", `{"model":"claude-sonnet-5","max_tokens":900,` + user +
			`,"tool_choice":{"type":"any"},` +
			`"tools":[{"name":"f","input_schema":{"type":"object",` +
			`"properties":{"n":{"type":"integer","minimum":4}}}}]}`, want{
			"stop_reason": "tool_use", "content.0.type": "tool_use", "content.0.input.n": 4.0}},
		{"count_tokens", "/v1/messages/count_tokens", `{"model":"claude-sonnet-5",` + user + `}`,
			want{"input_tokens": 5.0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := decode(t, post(t, srv, tt.path, tt.body), 200)
			for path, want := range tt.want {
				got := lookup(v, path)
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
	srv := newServer(t)
	const responses, delta = "response.created response.in_progress ", " response.output_item.done response.completed"
	tool := `"tools":[{"type":"function","name":"f","input_schema":{"properties":{"city":{}}},` +
		`"parameters":{"properties":{"city":{}}},"function":{"name":"f","parameters":{"properties":{"city":{}}}}}]`
	for _, tt := range []struct {
		name, path, body string
		want             string // the event names (or kinds) without repetitions
	}{
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
			"response.content_part.added response.output_text.delta response.output_text.done " +
			"response.content_part.done" + delta},
		{"responses tool", "/v1/responses", `{"model":"gpt-4.1","input":"tool",` + tool + `}`, responses +
			"response.output_item.added response.function_call_arguments.delta response.function_call_arguments.done" +
			delta},
		{"responses length", "/v1/responses", `{"model":"gpt-4.1","input":"a","max_output_tokens":1}`, responses +
			"response.output_item.added response.content_part.added response.output_text.delta " +
			"response.output_text.done " +
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
			names, data := readEvents(t, post(t, srv, tt.path, body))
			var kinds []string
			for i, d := range data {
				kinds = append(kinds, eventKind(t, d))
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

// eventKind returns the type of an event, or the kind of content of a chunk.
func eventKind(t *testing.T, data string) string {
	if data == "[DONE]" {
		return data
	}
	v := decodeObject(t, data)
	if kind, ok := v["type"].(string); ok {
		return kind
	}
	if finish, ok := lookup(v, "choices.0.finish_reason").(string); ok && finish != "absent" {
		return finish
	}
	for _, kind := range []string{"role", "content", "tool_calls"} {
		if lookup(v, "choices.0.delta."+kind) != "absent" {
			return kind
		}
	}
	if lookup(v, "choices.0.text") != "absent" {
		return "text"
	}
	if lookup(v, "usage.total_tokens") != "absent" {
		return "usage"
	}
	return "unknown: " + data
}

// A stream and a single answer have the same text and usage.
func TestDemoProviderStreamEqualsWhole(t *testing.T) {
	srv := newServer(t)
	body := `"model":"gpt-5-mini","seed":7,"messages":[{"role":"user","content":[` +
		`{"type":"text","text":"Why bread?"}]}]}`
	whole := decode(t, post(t, srv, "/v1/chat/completions", "{"+body), 200)
	_, data := readEvents(t, post(t, srv, "/v1/chat/completions",
		`{"stream":true,"stream_options":{"include_usage":true},`+body))
	var text strings.Builder
	for _, d := range data[:len(data)-2] {
		v := decodeObject(t, d)
		if usage := lookup(v, "usage"); usage != nil {
			t.Fatalf("usage %v in an early chunk, want null", usage)
		}
		if s, ok := lookup(v, "choices.0.delta.content").(string); ok && s != "absent" {
			text.WriteString(s)
		}
	}
	if want := lookup(whole, "choices.0.message.content"); text.String() != want {
		t.Errorf("the stream has %q, the single answer %q", text.String(), want)
	}
	got, want := decodeObject(t, data[len(data)-2])["usage"], whole["usage"]
	if fmt.Sprint(got) != fmt.Sprint(want) ||
		lookup(want, "completion_tokens_details.reasoning_tokens").(float64) < 64 {
		t.Errorf("the stream has usage %v, the single answer %v", got, want)
	}
}

func TestDemoProviderErrors(t *testing.T) {
	srv := newServer(t)
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
		{"no model", "/v1/chat/completions", `{"model":"no-such-model"}`, 404, "invalid_request_error",
			"model_not_found"},
		{"no model anthropic", "/v1/messages", `{"model":"no-such-model"}`, 404, "not_found_error", "absent"},
		{"bad JSON", "/v1/responses", `{"model":`, 400, "invalid_request_error", nil},
		{"bad JSON anthropic", "/v1/messages", `nope`, 400, "invalid_request_error", "absent"},
		{"model missing", "/v1/chat/completions", `{}`, 400, "invalid_request_error", nil},
		{"max_tokens missing", "/v1/messages", `{"model":"c","messages":[{}]}`, 400, "invalid_request_error", "absent"},
		{"dimensions", "/v1/embeddings", `{"model":"m","input":"a","dimensions":9999}`, 400, "invalid_request_error",
			nil},
		{"unknown URL", "/v1/nothing", `{}`, 404, "invalid_request_error", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			res := post(t, srv, tt.path, tt.body)
			v := decode(t, res, tt.status)
			if kind, code := lookup(v, "error.type"), lookup(v, "error.code"); kind != tt.kind || code != tt.code {
				t.Errorf("type %v code %v, want %v %v", kind, code, tt.kind, tt.code)
			}
			if got := res.Header.Get("Retry-After"); (got != "") != (tt.status == 429) {
				t.Errorf("Retry-After %q", got)
			}
			id, want := res.Header.Get("X-Request-Id"), "absent"
			if strings.HasPrefix(tt.path, "/v1/messages") {
				id, want = res.Header.Get("Request-Id"), res.Header.Get("Request-Id")
			}
			if !strings.HasPrefix(id, "req_") || lookup(v, "request_id") != want {
				t.Errorf("request id %q in the header, %v in the body", id, lookup(v, "request_id"))
			}
		})
	}
}

func TestDemoProviderCut(t *testing.T) {
	srv := newServer(t)
	for _, stream := range []string{"false", "true"} {
		for path, body := range map[string]string{
			"/v1/chat/completions": `"messages":[{"content":"[[cut]]"}]`,
			"/v1/completions":      `"prompt":"[[cut]]"`,
			"/v1/responses":        `"input":"[[cut]]"`,
			"/v1/messages":         `"messages":[{"content":"[[cut]]"}],"max_tokens":1`,
		} {
			res := post(t, srv, path, `{"model":"m","stream":`+stream+`,`+body+`}`)
			b, err := io.ReadAll(res.Body)
			if !errors.Is(err, io.ErrUnexpectedEOF) || len(b) == 0 || bytes.Contains(b, []byte("[DONE]")) {
				t.Errorf("%s stream=%s: %d bytes, then %v; want a part and an unexpected EOF", path, stream, len(b),
					err)
			}
		}
	}
}

func TestDemoProviderNeedsItsKey(t *testing.T) {
	srv := newServer(t)
	for _, tt := range []struct {
		method, path, header, value string
		status                      int
		kind                        string
	}{
		{"POST", "/v1/chat/completions", "Authorization", "Bearer wrong", 401, "invalid_request_error"},
		{"POST", "/v1/chat/completions", "X-Api-Key", testKey, 401, "invalid_request_error"},
		{"GET", "/v1/models", "", "", 401, "invalid_request_error"},
		{"POST", "/v1/nothing", "", "", 401, "invalid_request_error"},
		{"POST", "/v1/messages", "X-Api-Key", "wrong", 401, "authentication_error"},
		{"POST", "/v1/messages", "Authorization", "Bearer wrong", 401, "authentication_error"},
		// no anthropic-version
		{"POST", "/v1/messages", "Authorization", "Bearer " + testKey, 400, "invalid_request_error"},
		// no anthropic-version
		{"POST", "/v1/messages", "X-Api-Key", testKey, 400, "invalid_request_error"},
	} {
		req, _ := http.NewRequestWithContext(t.Context(), tt.method, srv.URL+tt.path,
			strings.NewReader(`{"model":"m"}`))
		req.Header.Set(tt.header, tt.value)
		if tt.header == "" {
			req.Header = http.Header{}
		}
		res, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if kind := lookup(decode(t, res, tt.status), "error.type"); kind != tt.kind {
			t.Errorf("%s %s with %s: type %v, want %v", tt.method, tt.path, tt.header, kind, tt.kind)
		}
		res.Body.Close()
	}
}

func TestDemoProviderCachesPrefixes(t *testing.T) {
	p := NewProvider(testKey, 0)
	long := strings.Repeat("0123456789abcdef", 600) // 9600 bytes, 2400 tokens
	for _, tt := range []struct {
		model, prompt string
		want          int
	}{{"m", long, 0}, {"m", long, 2048}, {"m", long[:8191], 1024}, {"m", "x" + long, 0}, {"other", long, 0}, {"m",
		"short", 0}} {
		if got := p.cachedTokens(tt.model, tt.prompt); got != tt.want {
			t.Errorf("cached(%s, %d bytes) = %d, want %d", tt.model, len(tt.prompt), got, tt.want)
		}
	}
	for i := range maxPrefixes {
		p.cachedTokens("m", fmt.Sprint(i, long))
		if len(p.seenPrefixes) > maxPrefixes {
			t.Fatalf("%d prefixes are kept", len(p.seenPrefixes))
		}
	}
}

func TestDemoProviderPace(t *testing.T) {
	srv := httptest.NewServer(NewProvider(testKey, time.Millisecond))
	defer srv.Close()
	start := time.Now()
	readEvents(t, post(t, srv, "/v1/chat/completions", `{"model":"m","stream":true,"messages":[{"content":"a"}]}`))
	if took := time.Since(start); took < 150*time.Millisecond {
		t.Errorf("a paced stream took %v", took)
	}
	start = time.Now()
	post(t, newServer(t), "/v1/embeddings", `{"model":"m","input":"[[slow 60ms]]"}`)
	if took := time.Since(start); took < 60*time.Millisecond {
		t.Errorf("[[slow 60ms]] took %v", took)
	}
}

// A client that disconnects ends the call at once: Close waits for running calls.
func TestDemoProviderClientLeaves(t *testing.T) {
	srv := httptest.NewServer(NewProvider(testKey, time.Hour))
	res := post(t, srv, "/v1/responses", `{"model":"m","stream":true,"input":"a"}`)
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
	srv := newServer(t)
	v := decode(t, send(t, srv, "GET", "/v1/models", "", ""), 200)
	if v["object"] != "list" || lookup(v, "data.0.object") != "model" {
		t.Errorf("models: %v", v)
	}
	if v := decode(t, send(t, srv, "GET", "/v1/models/a/b", "", ""), 200); v["id"] != "a/b" {
		t.Errorf("model: %v", v)
	}
	decode(t, send(t, srv, "GET", "/v1/models/no-such-model", "", ""), 404)
	req, _ := http.NewRequestWithContext(t.Context(), "GET", srv.URL+"/v1/models", nil)
	req.Header.Set("X-Api-Key", testKey)
	req.Header.Set("Anthropic-Version", "2023-06-01")
	res, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if v := decode(t, res, 200); v["has_more"] != false || lookup(v, "data.0.type") != "model" {
		t.Errorf("Anthropic models: %v", v)
	}
}

func TestDemoProviderMedia(t *testing.T) {
	srv := newServer(t)
	floats := decode(t, post(t, srv, "/v1/embeddings", `{"model":"m","input":"a","dimensions":8}`), 200)
	coded := decode(t, post(t, srv, "/v1/embeddings",
		`{"model":"m","input":"a","dimensions":8,"encoding_format":"base64"}`), 200)
	b, err := base64.StdEncoding.DecodeString(lookup(coded, "data.0.embedding").(string))
	if err != nil || len(b) != 8*4 {
		t.Errorf("base64 embedding of %d bytes: %v", len(b), err)
	}
	length := 0.0
	for _, x := range lookup(floats, "data.0.embedding").([]any) {
		length += x.(float64) * x.(float64)
	}
	if length < 0.999 || length > 1.001 {
		t.Errorf("embedding of squared length %v, want 1", length)
	}
	v := decode(t, post(t, srv, "/v1/images/generations", `{"prompt":"a","n":2}`), 200)
	b, _ = base64.StdEncoding.DecodeString(lookup(v, "data.1.b64_json").(string))
	if _, err := png.Decode(bytes.NewReader(b)); err != nil {
		t.Errorf("picture: %v", err)
	}
	res := post(t, srv, "/v1/audio/speech", `{"model":"tts-1","input":"a","voice":"alloy"}`)
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
		v := decode(t, send(t, srv, "POST", path, w.FormDataContentType(), form.String()), 200)
		if v["text"] == "" || lookup(v, "usage.input_token_details.audio_tokens") != 10.0 {
			t.Errorf("%s: %v", path, v)
		}
	}
}

// TestGemini: Gemini's own API, as one body, as a stream, as a list, with a tool, and its errors.
func TestGemini(t *testing.T) {
	t.Parallel()
	srv := newServer(t)
	call := func(method, path, body string) *http.Response {
		t.Helper()
		url := srv.URL + "/v1beta/models" + path
		req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Goog-Api-Key", testKey)
		res, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { res.Body.Close() })
		return res
	}
	const flash = "/gemini-2.5-flash"
	const hello = `{"contents":[{"role":"user","parts":[{"text":"Tell me about rivers"}]}],` +
		`"systemInstruction":{"parts":[{"text":"Be kind"}]}}`
	const weather = `{"contents":[{"parts":[{"text":"the weather in Berlin"}]}],"tools":[{"functionDeclarations":[` +
		`{"name":"get_weather","parameters":{"type":"OBJECT","properties":{"city":{"type":"STRING"}}}}]}]}`
	type fields map[string]any
	for _, c := range []struct {
		name, method, path, body string
		status                   int
		want                     fields // by path; "" is any text
	}{
		{"an answer", "POST", flash + ":generateContent", hello, 200, fields{"candidates.0.content.role": "model",
			"candidates.0.content.parts.0.text": "", "candidates.0.finishReason": "STOP",
			"usageMetadata.promptTokenCount": 7.0, "modelVersion": "gemini-2.5-flash"}},
		{"a short answer", "POST", flash + ":generateContent", strings.Replace(hello, "{", `{"generationConfig":`+
			`{"maxOutputTokens":5,"candidateCount":2},`, 1), 200, fields{"candidates.1.finishReason": "MAX_TOKENS",
			"usageMetadata.candidatesTokenCount": 10.0, "usageMetadata.totalTokenCount": 17.0}},
		{"thoughts", "POST", "/gemini-2.5-pro:generateContent", hello, 200,
			fields{"candidates.0.content.parts.0.text": "", "usageMetadata.thoughtsTokenCount": nil}},
		{"a tool", "POST", flash + ":generateContent", weather, 200, fields{
			"candidates.0.content.parts.0.functionCall.name":      "get_weather",
			"candidates.0.content.parts.0.functionCall.args.city": "Berlin", "candidates.0.finishReason": "STOP"}},
		{"names in both spellings", "POST", flash + ":generateContent", strings.ReplaceAll(weather,
			`"parameters":{"type":"OBJECT","properties":{"city"`, `"parameters_json_schema":{"type":"object",`+
				`"properties":{"big_city"`), 200,
			fields{"candidates.0.content.parts.0.functionCall.args.big_city": "Berlin"}},
		{"a search", "POST", flash + ":generateContent", strings.Replace(hello, "{", `{"tools":[{"google_search":{}}],`,
			1), 200, fields{"candidates.0.groundingMetadata.webSearchQueries.0": "Tell me about rivers"}},
		{"JSON", "POST", flash + ":generateContent", strings.Replace(hello, "{", `{"generationConfig":{`+
			`"responseMimeType":"application/json","responseSchema":{"type":"OBJECT","properties":`+
			`{"n":{"type":"INTEGER","minimum":3}}}},`, 1), 200, fields{"candidates.0.content.parts.0.text": `{"n":3}`}},
		{"a count", "POST", flash + ":countTokens", `{"generateContentRequest":` + hello + `}`, 200,
			fields{"totalTokens": 7.0}},
		{"an embedding", "POST", "/gemini-embedding-001:embedContent",
			`{"content":{"parts":[{"text":"a"}]},"outputDimensionality":2}`, 200,
			fields{"embedding.values.1": nil, "embedding.values.2": "absent"}},
		{"embeddings", "POST", "/gemini-embedding-001:batchEmbedContents",
			`{"requests":[{"content":{"parts":[{"text":"a"}]}},{"content":{"parts":[{"text":"b"}]}}]}`, 200,
			fields{"embeddings.1.values.3071": nil, "embeddings.2": "absent"}},
		{"the list", "GET", "", "", 200, fields{"models.0.name": "", "nextPageToken": "absent"}},
		{"a page", "GET", "?pageSize=1", "", 200, fields{"models.1": "absent", "nextPageToken": geminiModels[0]}},
		{"the last page", "GET", "?pageToken=" + geminiModels[len(geminiModels)-2], "", 200,
			fields{"models.0.supportedGenerationMethods.0": "embedContent", "nextPageToken": "absent"}},
		{"a model", "GET", flash, "", 200, fields{"name": "models/gemini-2.5-flash"}},
		{"an unknown model", "POST", "/no-such-model:generateContent", hello, 404, fields{"error.status": "NOT_FOUND"}},
		{"an unknown method", "POST", flash + ":run", hello, 404, fields{"error.status": "NOT_FOUND"}},
		{"no JSON", "POST", flash + ":generateContent", "{", 400, fields{"error.status": "INVALID_ARGUMENT"}},
		{"an error", "POST", flash + ":generateContent", `{"contents":[{"parts":[{"text":"[[error 429]]"}]}]}`, 429,
			fields{"error.status": "RESOURCE_EXHAUSTED", "error.details.0.retryDelay": "1s"}},
	} {
		v := decode(t, call(c.method, c.path, c.body), c.status)
		for path, want := range c.want {
			got := lookup(v, path)
			if text, ok := got.(string); want == nil && got == "absent" || want == "" && (!ok || text == "") ||
				want != nil && want != "" && got != want {
				t.Errorf("%s: %s is %v, want %v", c.name, path, got, want)
			}
		}
	}
	_, events := readEvents(t, call("POST", flash+":streamGenerateContent?alt=sse", hello))
	last := decodeObject(t, events[len(events)-1])
	if len(events) < 9 || lookup(decodeObject(t, events[0]), "candidates.0.finishReason") != "absent" ||
		lookup(last, "candidates.0.groundingMetadata") != "absent" ||
		lookup(last, "candidates.0.finishReason") != "STOP" {
		t.Errorf("a stream of %d events ends with %v", len(events), last)
	}
	b, err := io.ReadAll(call("POST", flash+":streamGenerateContent", weather).Body)
	var list []map[string]any
	if json.Unmarshal(b, &list) != nil || err != nil || len(list) != 1 ||
		lookup(list[0], "candidates.0.content.parts.0.functionCall.args.city") != "Berlin" {
		t.Errorf("a list: %s, %v", b, err)
	}
	if b, err := io.ReadAll(call("POST", flash+":streamGenerateContent",
		`{"contents":[{"parts":[{"text":"[[cut]]"}]}]}`).Body); err == nil {
		t.Errorf("a list that is cut ends cleanly: %s", b)
	}
	if res := send(t, srv, "POST", "/v1beta/models"+flash+":generateContent", "application/json", hello); lookup(
		decode(t, res, 401), "error.status") != "UNAUTHENTICATED" {
		t.Error("a call without the key is answered")
	}
}
