// This room is the stand-in provider of `llm-proxy demo`: it answers over real HTTP as OpenAI and Anthropic would, so that
// every feature can be tried without a key. It invents its answers, calls nobody, keeps nothing, and may only be served on
// loopback. A prompt that contains [[error 429]] or [[error 500]] (any status from 400 to 599) is refused in that way,
// [[cut]] breaks the connection half-way through the answer, and [[slow 3s]] delays it (a minute at most): for operators to
// see how faults show.
package main

import (
	"bytes"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"mime"
	"mime/multipart"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	demoMaxBody      = 32 << 20
	demoMaxPrefixes  = 4096 // prompt prefixes remembered for cached_tokens
	demoUnknownModel = "no-such-model"
	demoCacheStep    = 1024 // tokens: the grain of the prompt cache
)

// A demoProvider answers like OpenAI (Authorization: Bearer) and Anthropic (x-api-key). It requires its key. What it says
// follows from the model, the prompt and the request's seed alone; ids are new for each call, and cached tokens depend on
// the long prompts it saw before. It is safe for concurrent use.
type demoProvider struct {
	key        string
	chunkDelay time.Duration // between the chunks of a stream; 0 = no delays anywhere

	mu           sync.Mutex
	ids          *rand.Rand          // guarded by mu
	seenPrefixes map[uint64]struct{} // guarded by mu: hashes of prompt prefixes, at most demoMaxPrefixes
}

// newDemoProvider returns a provider that requires key. With pace > 0 the first token takes 150 to 600 ms and each
// further chunk about pace; with 0 it answers at once.
func newDemoProvider(key string, pace time.Duration) *demoProvider {
	return &demoProvider{
		key:          key,
		chunkDelay:   pace,
		ids:          rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1)),
		seenPrefixes: map[uint64]struct{}{},
	}
}

// ServeHTTP answers one call. It panics with http.ErrAbortHandler where a real provider's connection would break: on
// [[cut]], and when the client has left.
func (p *demoProvider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &demoCall{p: p, w: w, r: r, start: time.Now(), requestID: p.newID("req_")}
	_, version := r.Header["Anthropic-Version"]
	c.anthropic = strings.HasPrefix(r.URL.Path, "/v1/messages") || version && strings.HasPrefix(r.URL.Path, "/v1/models")
	if !c.authorized() {
		return
	}
	answer := c.handler()
	if answer == nil {
		c.fail(http.StatusNotFound, "", fmt.Sprintf("Invalid URL (%s %s)", r.Method, r.URL.Path))
		return
	}
	if r.Method == http.MethodPost && !c.readBody() {
		return
	}
	answer()
}

// A demoCall is one call being answered, by one goroutine.
type demoCall struct {
	p          *demoProvider
	w          http.ResponseWriter
	r          *http.Request
	start      time.Time
	requestID  string
	anthropic  bool // answer in Anthropic's shapes, not OpenAI's
	body       demoBody
	rawBody    []byte // the JSON body; nil for multipart
	audioBytes int64  // bytes of an uploaded file
}

// handler returns what answers the route, nil if nothing does: every URL of the provider.
func (c *demoCall) handler() func() {
	switch c.r.Method + " " + c.r.URL.Path {
	case "GET /v1/models":
		return c.models
	case "POST /v1/chat/completions":
		return c.chat
	case "POST /v1/completions":
		return c.completions
	case "POST /v1/responses":
		return c.responses
	case "POST /v1/responses/input_tokens":
		return c.responsesInputTokens
	case "POST /v1/responses/compact":
		return c.responsesCompact
	case "POST /v1/embeddings":
		return c.embeddings
	case "POST /v1/moderations":
		return c.moderations
	case "POST /v1/images/generations":
		return c.images
	case "POST /v1/audio/speech":
		return c.speech
	case "POST /v1/audio/transcriptions", "POST /v1/audio/translations":
		return c.transcriptions
	case "POST /v1/messages":
		return c.messages
	case "POST /v1/messages/count_tokens":
		return c.messagesCountTokens
	}
	if id, ok := strings.CutPrefix(c.r.URL.Path, "/v1/models/"); ok && id != "" && c.r.Method == http.MethodGet {
		return func() { c.model(id) }
	}
	return nil
}

// authorized reports whether the call carries the key in its dialect's header; if not, it has been refused. Anthropic's
// dialect has two: SDKs send the key in either.
func (c *demoCall) authorized() bool {
	given, msg := c.r.Header.Get("X-Api-Key"), "invalid x-api-key"
	if !c.anthropic || given == "" {
		given, _ = strings.CutPrefix(c.r.Header.Get("Authorization"), "Bearer ")
	}
	if !c.anthropic {
		msg = "Incorrect API key provided. This is the demo provider of llm-proxy."
	}
	if subtle.ConstantTimeCompare([]byte(given), []byte(c.p.key)) != 1 {
		c.fail(http.StatusUnauthorized, "invalid_api_key", msg)
		return false
	}
	if c.anthropic && c.r.Header.Get("Anthropic-Version") == "" {
		c.fail(http.StatusBadRequest, "", "anthropic-version: header is required")
		return false
	}
	return true
}

// readBody reads and checks the body and plays the faults that its prompt asks for. It reports whether the call goes on; if
// not, it has been answered.
func (c *demoCall) readBody() bool {
	body := http.MaxBytesReader(c.w, c.r.Body, demoMaxBody)
	kind, params, _ := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	var err error
	if kind == "multipart/form-data" {
		err = c.readForm(multipart.NewReader(body, params["boundary"]))
	} else if c.rawBody, err = io.ReadAll(body); err == nil {
		err = json.Unmarshal(c.rawBody, &c.body)
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		c.fail(http.StatusRequestEntityTooLarge, "", "The request body is too large.")
		return false
	}
	if err != nil {
		c.fail(http.StatusBadRequest, "", "We could not parse the body of your request: "+err.Error())
		return false
	}
	c.body.prompt = c.body.promptText()
	switch {
	case c.body.Model == "" && c.r.URL.Path == "/v1/moderations":
		c.body.Model = "omni-moderation-latest"
	case c.body.Model == "" && c.r.URL.Path == "/v1/images/generations":
		c.body.Model = "gpt-image-1"
	case c.body.Model == "":
		c.fail(http.StatusBadRequest, "", "you must provide a model parameter")
		return false
	case c.body.Model == demoUnknownModel:
		c.failUnknownModel()
		return false
	}
	if c.body.N < 0 || c.body.N > 128 {
		c.fail(http.StatusBadRequest, "", "'n' must be from 1 to 128")
		return false
	}
	return !c.injectFault()
}

// readForm reads a multipart body: the fields of audio calls, and the file's size.
func (c *demoCall) readForm(form *multipart.Reader) error {
	for {
		part, err := form.NextPart()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if part.FileName() != "" {
			if c.audioBytes, err = io.Copy(io.Discard, part); err != nil {
				return err
			}
			continue
		}
		value, err := io.ReadAll(part)
		if err != nil {
			return err
		}
		switch part.FormName() {
		case "model":
			c.body.Model = string(value)
		case "prompt":
			c.body.Prompt = string(value)
		case "response_format":
			c.body.ResponseFormat = string(value)
		case "stream":
			c.body.Stream = string(value) == "true"
		}
	}
}

// injectFault plays [[slow …]] and [[error …]] and reports whether the call has been answered by it.
func (c *demoCall) injectFault() bool {
	if arg, ok := demoTrigger(c.body.prompt, "slow"); ok {
		if d, err := time.ParseDuration(arg); err == nil {
			c.sleep(min(d, time.Minute))
		}
	}
	arg, _ := demoTrigger(c.body.prompt, "error")
	status, err := strconv.Atoi(arg)
	if err != nil || status < 400 || status > 599 {
		return false
	}
	switch status {
	case http.StatusTooManyRequests:
		c.w.Header().Set("Retry-After", "1")
		c.fail(status, "rate_limit_exceeded", "Rate limit reached for "+c.body.Model+" (demo). Please try again in 1s.")
	case http.StatusInternalServerError:
		c.fail(status, "", "The server had an error while processing your request. Sorry about that! (demo)")
	default:
		c.fail(status, "", fmt.Sprintf("The prompt asked for a %d (demo).", status))
	}
	return true
}

// failUnknownModel answers 404 as the dialect does for a model that does not exist.
func (c *demoCall) failUnknownModel() {
	msg := "The model `" + demoUnknownModel + "` does not exist or you do not have access to it."
	if c.anthropic {
		msg = "model: " + demoUnknownModel
	}
	c.fail(http.StatusNotFound, "model_not_found", msg)
}

// fail answers with an error in the dialect's shape. code "" is null; Anthropic has none.
func (c *demoCall) fail(status int, code, msg string) {
	kind := demoErrorType(status, c.anthropic)
	v := demoJSON{"error", demoJSON{"message", msg, "type", kind, "param", nil, "code", nullIfEmpty(code)}}
	if c.anthropic {
		v = demoJSON{"type", "error", "error", demoJSON{"type", kind, "message", msg}, "request_id", c.requestID}
	}
	b, _ := json.Marshal(v) // strings only
	c.writeHeader(status, "application/json")
	c.w.Write(append(b, '\n'))
}

// demoErrorType is the error type that the dialect gives a status.
func demoErrorType(status int, anthropic bool) string {
	switch {
	case !anthropic && status == 429:
		return "requests"
	case !anthropic && status >= 500:
		return "server_error"
	case !anthropic:
		return "invalid_request_error"
	}
	names := map[int]string{401: "authentication_error", 403: "permission_error", 404: "not_found_error",
		413: "request_too_large", 429: "rate_limit_error", 529: "overloaded_error"}
	if name, ok := names[status]; ok {
		return name
	}
	if status >= 500 {
		return "api_error"
	}
	return "invalid_request_error"
}

// writeHeader sends the status and headers. Nothing was sent before.
func (c *demoCall) writeHeader(status int, contentType string) {
	h := c.w.Header()
	h.Set("Content-Type", contentType)
	used, left := demoTokenCount(len(c.body.prompt)), "9999"
	if status == http.StatusTooManyRequests {
		left = "0"
	}
	set := map[string]string{
		"X-Request-Id": c.requestID, "Openai-Version": "2020-10-01", "Openai-Organization": "org-demo",
		"Openai-Processing-Ms":           strconv.FormatInt(time.Since(c.start).Milliseconds(), 10),
		"X-Ratelimit-Limit-Requests":     "10000",
		"X-Ratelimit-Remaining-Requests": left,
		"X-Ratelimit-Reset-Requests":     "6ms",
		"X-Ratelimit-Limit-Tokens":       "2000000",
		"X-Ratelimit-Remaining-Tokens":   strconv.Itoa(max(0, 2000000-used)),
		"X-Ratelimit-Reset-Tokens":       (time.Duration(used) * 30 * time.Microsecond).Round(time.Millisecond).String(),
	}
	if c.anthropic {
		reset := c.start.Add(time.Second).UTC().Format(time.RFC3339)
		set = map[string]string{
			"Request-Id": c.requestID, "Anthropic-Organization-Id": "00000000-0000-4000-8000-000000000000",
			"Anthropic-Ratelimit-Requests-Limit":     "10000",
			"Anthropic-Ratelimit-Requests-Remaining": left,
			"Anthropic-Ratelimit-Requests-Reset":     reset,
			"Anthropic-Ratelimit-Tokens-Limit":       "2000000",
			"Anthropic-Ratelimit-Tokens-Remaining":   strconv.Itoa(max(0, 2000000-used)),
			"Anthropic-Ratelimit-Tokens-Reset":       reset,
		}
	}
	for name, value := range set {
		h.Set(name, value)
	}
	c.w.WriteHeader(status)
}

// replyJSON answers a call that is not a stream with v as JSON, after the time that words of text would take.
func (c *demoCall) replyJSON(words int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		c.fail(http.StatusInternalServerError, "", "The demo provider could not encode its answer.")
		return
	}
	c.replyBytes(words, "application/json", append(b, '\n'))
}

// replyBytes is reply for any content type; [[cut]] ends it half-way.
func (c *demoCall) replyBytes(words int, contentType string, b []byte) {
	c.sleep(c.firstTokenDelay() + time.Duration(words)*c.p.chunkDelay)
	c.w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	c.writeHeader(http.StatusOK, contentType)
	if !c.wantsCut() {
		c.w.Write(b)
		return
	}
	c.w.Write(b[:len(b)/2])
	http.NewResponseController(c.w).Flush()
	panic(http.ErrAbortHandler)
}

// beginStream sends the headers of an event stream when the first token would be there.
func (c *demoCall) beginStream() {
	c.sleep(c.firstTokenDelay())
	c.w.Header().Set("Cache-Control", "no-cache")
	c.writeHeader(http.StatusOK, "text/event-stream; charset=utf-8")
}

// sendEvent sends one event of a stream and flushes it. name "" sends data alone; a json.RawMessage goes as it is.
func (c *demoCall) sendEvent(name string, v any) {
	data, ok := v.(json.RawMessage)
	var err error
	if !ok {
		data, err = json.Marshal(v)
	}
	var b bytes.Buffer
	if name != "" {
		fmt.Fprintf(&b, "event: %s\n", name)
	}
	fmt.Fprintf(&b, "data: %s\n\n", data)
	if err == nil {
		_, err = c.w.Write(b.Bytes())
	}
	if err == nil {
		err = http.NewResponseController(c.w).Flush()
	}
	if err != nil {
		panic(http.ErrAbortHandler) // a stream that cannot go on must not look complete
	}
}

// sendPaced emits the chunks of a stream at the provider's pace; [[cut]] ends the connection half-way.
func (c *demoCall) sendPaced(chunks []string, emit func(chunk string)) {
	for i, chunk := range chunks {
		if i > 0 {
			c.sleep(c.p.chunkDelay)
		}
		emit(chunk)
		if c.wantsCut() && 2*(i+1) >= len(chunks) {
			panic(http.ErrAbortHandler)
		}
	}
}

func (c *demoCall) wantsCut() bool {
	_, ok := demoTrigger(c.body.prompt, "cut")
	return ok
}

// firstTokenDelay is the believable delay before the first token: 150 to 600 ms, the same for the same prompt; 0 without a pace.
func (c *demoCall) firstTokenDelay() time.Duration {
	if c.p.chunkDelay <= 0 {
		return 0
	}
	return time.Duration(150+demoHash(c.body.Model, c.body.prompt)%451) * time.Millisecond
}

// sleep waits; it panics with http.ErrAbortHandler when the client leaves meanwhile.
func (c *demoCall) sleep(d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.r.Context().Done():
		panic(http.ErrAbortHandler)
	}
}

// newID returns a new id with the prefix, in the length of the real ones.
func (p *demoProvider) newID(prefix string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("%s%016x%016x", prefix, p.ids.Uint64(), p.ids.Uint64())
}

// cachedTokens returns how many of the prompt's tokens the model has seen at the start of an earlier prompt, in steps of 1024,
// and remembers this one.
func (p *demoProvider) cachedTokens(model, prompt string) (tokens int) {
	fresh := map[uint64]struct{}{}
	p.mu.Lock()
	defer p.mu.Unlock()
	const step = demoCacheStep * 4 // bytes
	h := demoHash(model)
	for end := step; end <= len(prompt) && len(fresh) < demoMaxPrefixes/4; end += step {
		h = demoHash(strconv.FormatUint(h, 16), prompt[end-step:end])
		if _, ok := p.seenPrefixes[h]; ok {
			tokens = end / 4
		} else {
			fresh[h] = struct{}{}
		}
	}
	if len(p.seenPrefixes)+len(fresh) > demoMaxPrefixes {
		clear(p.seenPrefixes)
	}
	maps.Copy(p.seenPrefixes, fresh)
	return tokens
}
