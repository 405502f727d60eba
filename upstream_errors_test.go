// These tests hold how a provider's failed answers are judged: whose fault each is, what that does to the key, and what
// the client gets.
package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestJudgeStatus: whose fault an answer is, by its status and by what providers write into errors.
func TestJudgeStatus(t *testing.T) {
	t.Parallel()
	openAI := func(code, message string) string {
		return fmt.Sprintf(`{"error":{"message":%q,"type":"invalid_request_error","param":null,"code":%q}}`,
			message, code)
	}
	anthropic := func(kind, message string) string {
		return fmt.Sprintf(`{"type":"error","error":{"type":%q,"message":%q}}`, kind, message)
	}
	for _, c := range []struct {
		status int
		body   string
		retry  string // Retry-After
		want   faultKind
		waitMS int64
	}{
		{status: 200, body: openAI("insufficient_quota", ""), want: faultNone},
		{status: 302, want: faultProvider},
		// The account's trouble, whatever the status.
		{status: 400, body: anthropic("invalid_request_error", "Your credit balance is too low to access the "+
			"Anthropic API. Please go to Plans & Billing to upgrade or purchase credits."), want: faultQuota},
		{status: 400, body: anthropic("invalid_request_error", "You have reached your specified API usage limits. You "+
			"will regain access on 2026-12-01 at 00:00 UTC."), want: faultQuota},
		{status: 400, body: openAI("billing_hard_limit_reached", "Billing hard limit has been reached"),
			want: faultQuota},
		{status: 400, body: `{"code":"Arrearage","message":"Access denied, please make sure your account is in good ` +
			`standing."}`, want: faultQuota},
		{status: 402, body: `{}`, want: faultQuota},
		{status: 403, body: `{"code":"The caller does not have permission","error":"Your newly created team doesn't ` +
			`have any credits yet."}`, want: faultQuota},
		{status: 429, body: openAI("insufficient_quota", "You exceeded your current quota"), want: faultQuota},
		{status: 429, body: openAI("insufficient_quota", "You exceeded your current quota (TPM)"), retry: "1",
			want: faultRate, waitMS: 1000},
		{status: 429, body: openAI("insufficient_quota", "You exceeded your current quota"), retry: "86400",
			want: faultQuota},
		{status: 429, body: openAI("billing_not_active", "Your account is not active, please check billing."),
			want: faultQuota},
		{status: 429, body: openAI("billing_not_active", "Your account is not active."), retry: "1", want: faultQuota},
		// The key.
		{status: 401, body: `{}`, want: faultKey},
		{status: 401, body: `<html>`, want: faultKey},
		{status: 403, body: `{}`, want: faultKey},
		{status: 400, body: `{"error":{"code":400,"message":"API key not valid. Please pass a valid API key.",` +
			`"status":"INVALID_ARGUMENT","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":` +
			`"API_KEY_INVALID"}]}}`, want: faultKey},
		{status: 400, body: `[{"error":{"code":400,"message":"x","details":[{"reason":"API_KEY_INVALID"}]}}]`,
			want: faultKey},
		{status: 400, body: `{"code":"Client specified an invalid argument",` +
			`"error":"Incorrect API key provided: xa***ab."}`,
			want: faultKey},
		{status: 403, body: anthropic("invalid_request_error", "This organization has been disabled."), want: faultKey},
		// The key and the model.
		{status: 404, body: openAI("model_not_found", "The model `gpt-0` does not exist or you do not have access."),
			want: faultModel},
		{status: 403, body: openAI("", "Project `proj_x` does not have access to model `gpt-4o`"), want: faultModel},
		{status: 403, body: anthropic("permission_error", "Your API key does not have permission to use the specified "+
			"resource."), want: faultModel},
		{status: 404, body: anthropic("not_found_error", "model: claude-0"), want: faultModel},
		{status: 404, body: `{"error":"model 'llama9' not found"}`, want: faultModel},
		{status: 404, body: `{"error":{"code":404,"message":"models/gemini-0 is not found for API version v1beta"}}`,
			want: faultModel},
		{status: 404, body: `{"error":{"code":"DeploymentNotFound","message":"The API deployment for this resource ` +
			`does not exist."}}`, want: faultModel},
		{status: 400, body: `{"object":"error","message":"Invalid model: x","type":"invalid_model","code":"1500"}`,
			want: faultModel},
		// This key and this call.
		{status: 403, body: `<!doctype html><title>Attention Required!</title>`, want: faultCall},
		{status: 403, body: openAI("", "Blocked by a guardrail"), want: faultCall},
		{status: 401, body: openAI("", "You have insufficient permissions for this operation. Missing scopes: "+
			"api.model.images.request."), want: faultCall},
		{status: 429, body: openAI("rate_limit_exceeded", "Request too large for gpt-4o on tokens per min (TPM): "+
			"Limit 30000, Requested 40000."), want: faultCall},
		{status: 413, body: openAI("rate_limit_exceeded", "Request too large for model `x` on tokens per minute (TPM)"),
			want: faultCall},
		// The client.
		{status: 400, body: openAI("invalid_value", "Invalid value"), want: faultRequest},
		{status: 400, body: openAI("content_filter", "The response was filtered"), want: faultRequest},
		{status: 403, body: openAI("content_policy_violation", "Your model input was flagged"), want: faultRequest},
		{status: 404, body: anthropic("not_found_error", "Not Found"), want: faultRequest},
		{status: 404, body: openAI("", "This is a chat model and not supported in the v1/completions endpoint."),
			want: faultRequest},
		{status: 400, body: openAI("", "The model `gpt-4o` does not support image input."), want: faultRequest},
		{status: 409, body: `{"error":{}}`, want: faultRequest},
		// What a client sends and the provider quotes is no one else's trouble.
		{status: 404, body: openAI("", "No such file: credit balance is too low, model x not found"),
			want: faultRequest},
		{status: 400, body: openAI("", "Invalid value: 'Your credit balance is too low'. API key not valid"),
			want: faultRequest},
		{status: 422, body: `{"detail":[{"type":"string_type","loc":["body"],"msg":"Input should be a string",` +
			`"input":{"code":"insufficient_quota","error":{"code":"invalid_api_key"}}}]}`, want: faultRequest},
		{status: 500, body: openAI("", "Your credit balance is too low"), want: faultProvider},
		// Rate limits and trouble of the provider.
		{status: 429, body: `{}`, want: faultRate},
		{status: 429, body: `{}`, retry: "7", want: faultRate, waitMS: 7000},
		{status: 429, body: openAI("", "Rate limit reached. Please try again in 6.5s."), want: faultRate, waitMS: 6500},
		{status: 429, body: `{"error":{"code":429,"message":"You exceeded your current quota","status":` +
			`"RESOURCE_EXHAUSTED","details":[{"@type":"google.rpc.RetryInfo","retryDelay":"39s"}]}}`,
			want: faultRate, waitMS: 39_000},
		{status: 400, body: `{"__type":"ThrottlingException","message":"Too many requests"}`, want: faultRate},
		{status: 503, body: `x`, retry: "3", want: faultProvider, waitMS: 3000},
		{status: 500, body: ``, want: faultProvider},
		{status: 501, body: ``, want: faultRequest},
	} {
		get := func(name string) string {
			if name == "Retry-After" {
				return c.retry
			}
			return ""
		}
		f := judgeStatus(c.status, get, []byte(c.body), time.Now())
		if f.kind != c.want || f.waitMS != c.waitMS {
			t.Errorf("%d %s: got %d, wait %d, want %d, %d", c.status, c.body, f.kind, f.waitMS, c.want, c.waitMS)
		}
	}
}

// TestTooLongWordings: every provider's way to say that a call is too long for its model is understood; the limits of
// other things are no such.
func TestTooLongWordings(t *testing.T) {
	t.Parallel()
	tooLong := []string{
		"This model's maximum prompt length is 131072 but the request contains 537812 tokens.",
		"Input is too long for requested model.",
		"The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
		"prompt is too long: 203789 tokens > 200000 maximum",
		"This model's maximum context length is 8192 tokens. However, you requested 9000 tokens.",
		"Your input exceeds the context window of this model. Please adjust your input and try again.",
		"Prompt contains 40000 tokens, too large for model with 32768 maximum context length",
		"the request exceeds the available context size. try increasing the context size",
		"too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 5000",
		"Please reduce the length of the messages or completion.",
		"Range of input length should be [1, 30720]",
		"Invalid request: Your request exceeded model token limit: 131072",
		"Request body too large for gpt-4o model. Max size: 8000 tokens.",
		"Unable to submit request because the input token count is 1049000 but model only supports up to 1048576",
		"`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens",
		"The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
		"Input validation error: `inputs` must have less than 512 tokens. Given: 1000",
		"input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000, decrease input length " +
			"or `max_tokens`",
		"Prompt exceeds max length",
		"Input length 10000 exceeds maximum length 8192",
		"This model supports a maximum of 32768 tokens, but 40000 were provided",
		"tokens in request more than max tokens allowed",
		"Total tokens of image and text exceed max message tokens",
		"Total length of messages exceeds limit",
		"The message you submitted was too long, please submit something shorter.",
	}
	other := []string{
		"Invalid 'user': string too long. Expected a string with maximum length 64, but got one of 99 instead.",
		"max_tokens is too large: 100000. This model supports at most 16384 completion tokens.",
		"max_tokens: 100000 > 64000, which is the maximum allowed number of output tokens",
		"Invalid value: 'x'.",
		"Too many stop sequences. Maximum is 4.",
		"image is too large: the maximum is 5 MB",
		"Too many requests. Please wait and try again.",
		"tools: too many tools, the maximum number is 128.",
		"This model supports a maximum of 16384 output tokens, but 100000 were requested",
		"Total length of stop sequences exceeds limit",
	}
	for i, text := range slices.Concat(tooLong, other) {
		want := i < len(tooLong)
		body := fmt.Appendf(nil, `{"error":{"message":%q}}`, text)
		if e := parseProviderError(body); e.isTooLong(400) != want {
			t.Errorf("%q: too long: %v", text, !want)
		}
		if e := parseProviderError(body); e.isTooLong(429) {
			t.Errorf("%q: a rate limit is read as too long", text)
		}
	}
	for _, body := range []string{
		`{"error":{"code":"context_length_exceeded","message":"x"}}`,
		`{"error":{"message":"Provider returned error","code":400,"metadata":{"raw":"{\"type\":\"error\",\"error\":` +
			`{\"type\":\"invalid_request_error\",\"message\":\"prompt is too long: 9 tokens > 8 maximum\"}}"}}}`,
		`{"error":"prompt too long; exceeded max context length by 10 tokens"}`,
		`{"message":"Input is too long for requested model."}`,
		`{"detail":"This model's maximum context length is 4096 tokens"}`,
		`Input is too long for requested model.`,
	} {
		if e := parseProviderError([]byte(body)); !e.isTooLong(400) {
			t.Errorf("%s is not too long", body)
		}
	}
}

// A faultCase is an answer of the first of two upstreams, and what it leads to.
type faultCase struct {
	name     string
	status   int
	body     string
	lines    []string
	attempts [2]int
	health   string // of the first upstream's key
	paused   bool   // the first upstream does not get the model
	alone    int    // the client's status without the second upstream
	shows    string // of the body that the client gets then
	hides    string
}

// TestFaultOf4xx: account trouble takes the key out of use and the next key is asked, whatever the status. An error
// about one model takes out the key and model only. One bad request takes out nothing.
func TestFaultOf4xx(t *testing.T) {
	t.Parallel()
	for _, c := range []faultCase{
		{name: "no credit", status: 400, body: `{"type":"error","error":{"type":"invalid_request_error","message":` +
			`"Your credit balance is too low to access the Anthropic API."}}`,
			attempts: [2]int{1, 1}, health: "exhausted", alone: 400, shows: "credit balance"},
		{name: "invalid key", status: 400, body: `{"error":{"code":400,"message":"API key not valid: sk-abcdefghij",` +
			`"details":[{"reason":"API_KEY_INVALID"}]}}`,
			attempts: [2]int{1, 1}, health: "quarantined", alone: 502, shows: "upstream_auth_error", hides: "sk-abc"},
		{name: "short wait for quota", status: 429, body: `{"error":{"code":"insufficient_quota","type":` +
			`"insufficient_quota","message":"You exceeded your current quota (TPM), please slow down."}}`,
			lines: []string{"Retry-After: 30"}, attempts: [2]int{1, 1}, health: "cooling", alone: 429,
			shows: "slow down"},
		{name: "billing", status: 429, body: `{"error":{"code":"billing_not_active","message":"Your account is not ` +
			`active"}}`, attempts: [2]int{1, 1}, health: "exhausted", alone: 429, shows: "billing_not_active"},
		{name: "model unknown", status: 404, body: `{"error":{"code":"model_not_found","message":"The model ` +
			`gpt-4o-mini does not exist or you do not have access to it."}}`,
			attempts: [2]int{1, 1}, health: "ready", paused: true, alone: 404, shows: "gpt-4o-mini does not exist"},
		{name: "model forbidden", status: 403, body: `{"error":{"message":"Project proj_ABCDEFGH12345678 with key ` +
			`sk-svcacct-*****wxyz does not have access to model gpt-4o-mini","code":"model_not_found"}}`,
			attempts: [2]int{1, 1}, health: "ready", paused: true, alone: 403,
			shows: "does not have access to model gpt-4o-mini", hides: "wxyz"},
		{name: "forbidden page", status: 403, body: `<html>Sorry, you have been blocked</html>`,
			lines: []string{"Content-Type: text/html"}, attempts: [2]int{1, 1}, health: "ready", alone: 403,
			shows: "you have been blocked"},
		{name: "bad request", status: 400, body: `{"error":{"message":"Invalid value: 'API key not valid. Your ` +
			`credit balance is too low'"}}`, attempts: [2]int{1, 0}, health: "ready", alone: 400,
			shows: "Invalid value"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.check(t)
		})
	}
}

func (c *faultCase) check(t *testing.T) {
	p := newTest(t, nil)
	second, id := p.addUpstream(`"priority":1`)
	p.provider.setScript(replyScript(c.status, c.body, c.lines...))
	for i := range 2 { // the second call must not change anything about the first key
		res := p.chat()
		if c.attempts[1] > 0 && (res.status != 200 || res.body != chatResponseBody) {
			t.Errorf("call %d got %d %s", i, res.status, res.body)
		}
		if i > 0 {
			break
		}
		if got := [2]int{len(p.provider.received()), len(second.received())}; got != c.attempts {
			t.Errorf("the providers got %v attempts, want %v", got, c.attempts)
		}
	}
	if h := p.healthOf(p.upstream); h.State != c.health {
		t.Errorf("the key is %+v, want %s", h, c.health)
	}
	isOut := c.paused || c.health != "ready"
	if n := len(p.provider.received()); isOut && n != 1 {
		t.Errorf("a key that is out got %d calls of 2", n)
	}
	if models := p.modelPauses(p.upstream); (len(models) == 1) != c.paused ||
		c.paused && !strings.HasPrefix(models[0], "gpt-4o-mini at /v1/chat/completions until 20") {
		t.Errorf("the key's models are %q", models)
	}
	if c.paused { // other models and endpoints still go there
		asked := len(p.provider.received())
		p.do("POST", "/v1/chat/completions", `{"model":"gpt-5","messages":[]}`, p.jsonHeaders()...)
		p.do("POST", "/v1/embeddings", `{"model":"gpt-4o-mini","input":"x"}`, p.jsonHeaders()...)
		if n := len(p.provider.received()); n != asked+2 {
			t.Errorf("%d of 2 calls for other models and endpoints went there", n-asked)
		}
		var route struct{ Upstreams []struct{ Why string } }
		p.manage("GET", "/manage/projects/"+p.project+"/route?model=gpt-4o-mini", "", 200, &route)
		if !slices.ContainsFunc(route.Upstreams, func(line struct{ Why string }) bool {
			return strings.Contains(line.Why, "for this model")
		}) {
			t.Errorf("the route is explained as %+v", route)
		}
	}
	p.manage("DELETE", "/manage/projects/"+p.project+"/upstreams/"+id, "", 200, nil)
	p.changeUpstream(p.upstream, ``)
	res := p.chat()
	if res.status != c.alone || !strings.Contains(res.body, c.shows) ||
		c.hides != "" && strings.Contains(res.body, c.hides) {
		t.Errorf("alone: got %d %s", res.status, res.body)
	}
	if row := p.lastCall(); row.Outcome != "upstream_error" || row.UsageSource != "none" || row.Status != c.alone {
		t.Errorf("alone: the ledger has %+v", row)
	}
}

// modelPauses returns the models that an upstream's key does not get, as /manage shows them.
func (p *testProxy) modelPauses(upstream string) []string {
	p.t.Helper()
	var up struct{ Health struct{ Models []string } }
	p.manage("GET", "/manage/projects/"+p.project+"/upstreams/"+upstream, "", 200, &up)
	return up.Health.Models
}

// TestModelPauses: however many models clients name, a key remembers a few for some minutes. A good answer ends a
// pause, and so does an administrator.
func TestModelPauses(t *testing.T) {
	t.Parallel()
	tracker := newHealthTracker()
	h, now := tracker.forUpstream(1, "up_1"), int64(1_000)
	const chat = "/v1/chat/completions"
	for i := range 10 * maxModelPauses {
		h.pauseModel(now, chat, fmt.Sprint("m", i), "x")
	}
	last := fmt.Sprint("m", 10*maxModelPauses-1)
	if n := len(h.modelPauses(now)); n != maxModelPauses || h.modelPause(now, chat, last) == nil {
		t.Errorf("%d models are remembered", n)
	}
	if h.modelPause(now, "/v1/embeddings", last) != nil || h.modelPause(now, "", last) == nil || !h.available(now) {
		t.Error("the pause is not of one endpoint")
	}
	h.resumeModel(chat, last)
	if h.modelPause(now, chat, last) != nil || len(h.modelPauses(now)) != maxModelPauses-1 {
		t.Error("a good answer does not end the pause")
	}
	if n := len(h.modelPauses(now + modelPauseMS)); n != 0 || h.hasPauses.Load() {
		t.Errorf("%d pauses last too long", n)
	}
	h.pauseModel(now, chat, "m", "x")
	if tracker.reset(1, now); h.modelPause(now, chat, "m") != nil {
		t.Error("an administrator's change does not end the pause")
	}
}

// TestMaskKeyLike: keys and accounts disappear from a text; what a client needs to know stays.
func TestMaskKeyLike(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"Incorrect API key provided: sk-proj-ab12****wxyz.":    "Incorrect API key provided: ********************.",
		"key AIzaSyA-1234567890 of org-abcdefgh12":             "key ****************** of **************",
		"0123456789abcdef0123456789abcdef":                     "********************************",
		"The model claude-sonnet-4-5-20250929 does not exist":  "The model claude-sonnet-4-5-20250929 does not exist",
		"No such file: file-AbCdEfGhIjKlMnOpQrStUv, batch_123": "No such file: file-AbCdEfGhIjKlMnOpQrStUv, batch_123",
		"sk-3 and key-1": "sk-3 and key-1",
	} {
		b := []byte(text)
		if maskKeyLike(b); string(b) != want {
			t.Errorf("%q became %q", text, b)
		}
	}
}

// rawScript answers with bytes as they are, except that they announce that the connection is closed, which then is.
func rawScript(text string) func(*providerConn, recordedRequest) bool {
	text = strings.Replace(text, "\r\n", "\r\nConnection: close\r\n", 1)
	return func(c *providerConn, _ recordedRequest) bool {
		_, _ = io.WriteString(c, text)
		return false
	}
}

// chunked is an answer of one chunk with a type, "": none.
func chunked(contentType, body string) string {
	head := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
	if contentType != "" {
		head += "Content-Type: " + contentType + "\r\n"
	}
	if body == "" {
		return head + "\r\n0\r\n\r\n"
	}
	return fmt.Sprintf("%s\r\n%x\r\n%s\r\n0\r\n\r\n", head, len(body), body)
}

// A status200Case is an answer with status 200 that may be an error. attempts are those at the first and the second
// upstream.
type status200Case struct {
	name     string
	path     string // "": /v1/chat/completions
	stream   bool
	answer   string
	attempts [2]int
	health   string // of the first upstream's key
	outcome  string // if the client gets the answer; "": it gets the second upstream's
	exact    bool   // the answer is good and has its usage
	aloneOK  bool   // without the second upstream, nothing is wrong with it
}

const (
	sseType       = "text/event-stream"
	contextLength = "data: {\"error\": {\"code\": \"context_length_exceeded\", \"type\": \"invalid_request_error\", " +
		"\"param\": \"messages\", \"message\": \"Your input exceeds the context window of this model.\"}}\n\n"
	contextLength400 = "data: {\"error\": {\"code\": 400, \"message\": \"This endpoint's maximum context length is " +
		"8192 tokens. However, you requested about 90000 tokens.\"}}\n\ndata: [DONE]\n\n"
)

func status200Cases() []status200Case {
	events := strings.Join(chatEvents(true), "")
	good := func(name, before string) status200Case {
		return status200Case{name: name, stream: true, answer: chunked(sseType, before+events),
			attempts: [2]int{1, 0}, health: "ready", outcome: "ok", exact: true}
	}
	failsOver := func(name string, stream bool, answer, health string, attempts int) status200Case {
		return status200Case{name: name, stream: stream, answer: answer, attempts: [2]int{attempts, 1}, health: health}
	}
	ofClient := func(name string, stream bool, answer string) status200Case {
		return status200Case{name: name, stream: stream, answer: answer, attempts: [2]int{1, 0}, health: "ready",
			outcome: "upstream_error"}
	}
	html := "<!doctype html><html><body>Just a moment...</body></html>"
	empty := "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n"
	half := chatResponseBody[:len(chatResponseBody)/2]
	overloaded := "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\"}}\n\n"
	cases := []status200Case{
		good("text heartbeat", "data: keep-alive\n\n"),
		good("pings", "event: ping\ndata: {\"type\": \"ping\"}\n\n: comment\n\ndata:\n\ndata: \"ping\"\n\n"),
		good("nothing to say", `data: {"choices":[],"error":null}`+"\n\n"),
		failsOver("chunks without choices, then an error", true, chunked(sseType, `data: {"choices":[]}`+"\n\n"+
			overloaded), "ready", 2),
		failsOver("page as stream", true, chunked(sseType, html), "ready", 2),
		failsOver("error of vLLM", false, chunked("application/json", `{"object":"error","message":"x","code":500}`),
			"ready", 2),
		ofClient("error of vLLM: too long", true, chunked(sseType, `data: {"object":"error","code":400,`+
			`"message":"This model's maximum context length is 4096 tokens."}`+"\n\ndata: [DONE]\n\n")),
		failsOver("error in a choice", true, chunked(sseType, `data: {"choices":[{"delta":{"content":""},`+
			`"finish_reason":"error","error":{"code":429,"message":"x"}}]}`+"\n\n"), "cooling", 1),
		failsOver("balance of MiniMax", false, chunked("application/json", `{"choices":null,"base_resp":`+
			`{"status_code":1008,"status_msg":"insufficient balance"}}`), "exhausted", 1),
		failsOver("only a message", false, chunked("application/json", `{"message":"no Route matched"}`), "ready", 2),
		{name: "empty errors", answer: chunked("application/json", strings.Replace(chatResponseBody, "{",
			`{"error":{"message":"","code":null},`, 1)), attempts: [2]int{1, 0}, health: "ready", outcome: "ok",
			exact: true},
		{name: "blank lines", answer: chunked("application/json", "\n\n\n"+chatResponseBody), attempts: [2]int{1, 0},
			health: "ready", outcome: "ok", exact: true},
		failsOver("pings, then an error", true, chunked(sseType, strings.Repeat("event: ping\ndata: {}\n\n", 2)+
			overloaded), "ready", 2),
		failsOver("named event with text", true, chunked(sseType, "event: error\ndata: failed\n\n"), "ready", 2),
		{name: "only [DONE]", stream: true, answer: chunked(sseType, "data: [DONE]\n\n"), attempts: [2]int{2, 1},
			health: "ready", aloneOK: true},
		failsOver("undeclared stream", true, chunked("", overloaded), "ready", 2),
		failsOver("quota", true, chunked(sseType, `data: {"error":{"code":"insufficient_quota"}}`+"\n\n"), "exhausted",
			1),
		failsOver("key", true, chunked(sseType, `data: {"error":{"code":401}}`+"\n\n"), "quarantined", 1),
		failsOver("rate", true, chunked(sseType, `data: {"error":{"type":"rate_limit_error"}}`+"\n\n"), "cooling", 1),
		failsOver("JSON error for a stream", true, chunked("application/json", `{"error":{"code":"server_error"}}`),
			"ready", 2),
		failsOver("JSON error", false, chunked("application/json", `{"error":{"code":502,"message":"lost"}}`),
			"ready", 2),
		failsOver("JSON error as text", false, chunked("text/plain", ` {"id":null,"error":"x"}`), "ready", 2),
		failsOver("JSON error with status 202", false, strings.Replace(chunked("application/json",
			`{"error":{"code":"server_error"}}`), "200 OK", "202 Accepted", 1), "ready", 2),
		failsOver("JSON quota", false, chunked("", `{"error":{"code":"insufficient_quota"}}`), "exhausted", 1),
		failsOver("page", false, chunked("text/html", html), "ready", 2),
		failsOver("page as JSON", true, chunked("application/json", html), "ready", 2),
		failsOver("empty", false, empty, "ready", 2),
		failsOver("empty chunks", false, chunked("", ""), "ready", 2),
		failsOver("half", false, chunked("application/json", half), "ready", 2),
		failsOver("half of its length", false, fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"+
			"Content-Length: %d\r\n\r\n%s", len(chatResponseBody), half), "ready", 2),
		ofClient("too long", true, chunked(sseType, contextLength)),
		ofClient("too long, by its words", true, chunked(sseType, contextLength400)),
		ofClient("content filter", true, chunked(sseType, `data: {"error":{"code":"content_filter"}}`+"\n\n")),
		ofClient("JSON: too long", false, chunked("application/json", strings.TrimPrefix(contextLength, "data: "))),
		ofClient("JSON: wrong", false, chunked("application/json", `{"error":{"type":"invalid_request_error"}}`)),
	}
	failed := `{"id":"resp_1","object":"response","status":"failed","model":"gpt-5","error":` +
		`{"code":"server_error","message":"stream closed"},"output":[],"usage":null}`
	response := failsOver("failed response", false, chunked("application/json", failed), "ready", 2)
	response.path = "/v1/responses"
	event := failsOver("failed response as first event", true, chunked(sseType, "event: response.failed\ndata: "+
		`{"type":"response.failed","response":`+failed+"}\n\n"), "ready", 2)
	event.path = "/v1/responses"
	return append(cases, response, event)
}

// TestErrorsWithStatus200: an error that comes with status 200 is judged as the same error with a status would be, in
// a stream and in one piece, while no byte has left. Heartbeats and empty errors say nothing.
func TestErrorsWithStatus200(t *testing.T) {
	t.Parallel()
	for _, c := range status200Cases() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.check(t)
		})
	}
}

func (c *status200Case) check(t *testing.T) {
	p := newTest(t, nil)
	second, id := p.addUpstream(`"priority":1`)
	p.provider.setScript(rawScript(c.answer))
	events := strings.Join(chatEvents(true), "")
	second.setScript(func(conn *providerConn, _ recordedRequest) bool {
		if c.stream {
			return streamScript(chatEvents(true), len(chatEvents(true)), endStream)(conn, recordedRequest{})
		}
		return conn.reply(200, chatResponseBody)
	})
	call := func() testResponse {
		return p.do("POST", cmp.Or(c.path, "/v1/chat/completions"), chatBody(fmt.Sprintf(`"stream":%v`, c.stream),
			`"stream_options":{"include_usage":true}`, `"input":"x"`), p.jsonHeaders()...)
	}
	res, row := call(), p.lastCall()
	if got := [2]int{len(p.provider.received()), len(second.received())}; got != c.attempts {
		t.Errorf("the providers got %v attempts, want %v", got, c.attempts)
	}
	switch {
	case res.status != 200:
		t.Errorf("got %d %s", res.status, res.body)
	case c.outcome == "" && (row.UpstreamID != id || !c.stream && res.body != chatResponseBody ||
		c.stream && res.body != events || row.AttemptLog[0].Error == ""):
		t.Errorf("the second upstream did not answer: %q, %+v", res.body, row)
	case c.outcome != "" && (row.Outcome != c.outcome || row.Attempts != 1 || c.exact != (row.UsageSource == "exact") ||
		!c.exact && row.InputTokens+row.OutputTokens != 0):
		t.Errorf("got %q; the ledger has %+v", res.body, row)
	}
	if c.outcome == "upstream_error" { // three of them would open the breaker of a failing key
		call()
		call()
	}
	if state := p.stateAfterCalls(p.upstream); state != c.health {
		t.Errorf("the key is %s, want %s", state, c.health)
	}
	// Alone, the answer passes as it is, and bills nothing.
	p.manage("DELETE", "/manage/projects/"+p.project+"/upstreams/"+id, "", 200, nil)
	p.changeUpstream(p.upstream, ``)
	for range 3 {
		call()
	}
	row = p.lastCall()
	if (row.Outcome == "ok") != (c.exact || c.aloneOK) ||
		row.Outcome == "upstream_error" && row.InputTokens+row.OutputTokens != 0 {
		t.Errorf("alone: the ledger has %+v", row)
	}
	if h := p.healthOf(p.upstream); c.outcome != "" && h.State != "ready" {
		t.Errorf("alone: the key is %+v", h)
	}
}

// TestTooLongGoesToTheFallback: a call that is too long goes straight to the fallback model, whichever way the provider
// says so.
func TestTooLongGoesToTheFallback(t *testing.T) {
	t.Parallel()
	for _, stream := range []bool{true, false} {
		for _, answer := range []string{contextLength, contextLength400} {
			p := newTest(t, nil)
			second, _ := p.addUpstream(`"priority":1`)
			p.changeProject(`"routing":{"fallbacks":[{"model":"gpt-4o-mini","to":"gpt-long"}]}`)
			text, contentType := answer, sseType
			if !stream {
				text, contentType = strings.TrimPrefix(strings.SplitN(answer, "\n", 2)[0], "data: "), "application/json"
			}
			p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
				if strings.Contains(r.body, "gpt-long") {
					return chatScript(c, r)
				}
				return rawScript(chunked(contentType, text))(c, r)
			})
			res := p.chat(fmt.Sprintf(`"stream":%v`, stream))
			if res.status != 200 || strings.Contains(res.body, "error") || len(p.provider.received()) != 2 ||
				len(second.received()) != 0 {
				t.Errorf("stream %v: got %d %s after %d and %d attempts", stream, res.status, res.body,
					len(p.provider.received()), len(second.received()))
			}
			if row := p.lastCall(); row.Outcome != "ok" || row.Attempts != 2 {
				t.Errorf("the ledger has %+v", row)
			}
			if h := p.healthOf(p.upstream); h.State != "ready" {
				t.Errorf("the key is %+v", h)
			}
		}
	}
}
