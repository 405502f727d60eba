// Package demo is the stand-in provider of `llm-proxy demo`, with the sample data. It answers over
// real HTTP as OpenAI, Anthropic and Google would, so that every feature can be tried without a key. It
// invents its answers, opens no connection, stores nothing, and may only be served on loopback.
//
// Operators can see how the proxy handles faults: a prompt with [[error 429]] or [[error 500]] (any
// status from 400 to 599) gets that error, [[cut]] breaks the connection half-way through the
// answer, and [[slow 3s]] delays it (at most a minute).
package demo

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
	maxBodyBytes    = 32 << 20
	maxPrefixes     = 4096 // prompt prefixes kept for cached_tokens
	unknownModel    = "no-such-model"
	cacheStepTokens = 1024 // the prompt cache counts in steps of this many tokens
)

// A provider answers like OpenAI (Authorization: Bearer), Anthropic (x-api-key) and Google
// (x-goog-api-key). It requires its key. The text depends only on the model, the prompt and the
// request's seed; ids are new for each call, and cached tokens depend on earlier long prompts. It is
// safe for concurrent use.
type provider struct {
	key        string
	chunkDelay time.Duration // between the chunks of a stream; 0: no delays at all

	mu           sync.Mutex
	ids          *rand.Rand          // guarded by mu
	seenPrefixes map[uint64]struct{} // guarded by mu: hashes of prompt prefixes, at most maxPrefixes
}

// NewProvider returns a provider that requires key. If pace > 0, the first token takes 150 to 600
// ms and each further chunk about pace; if it is 0, the provider answers at once.
func NewProvider(key string, pace time.Duration) *provider {
	return &provider{
		key:          key,
		chunkDelay:   pace,
		ids:          rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1)),
		seenPrefixes: map[uint64]struct{}{},
	}
}

// ServeHTTP answers one call. It panics with http.ErrAbortHandler where a real provider's
// connection would break: on [[cut]], and when the client has disconnected.
func (p *provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{p: p, w: w, r: r, start: time.Now(), requestID: p.newID("req_")}
	_, version := r.Header["Anthropic-Version"]
	c.anthropic = strings.HasPrefix(r.URL.Path, "/v1/messages") || version &&
		strings.HasPrefix(r.URL.Path, "/v1/models")
	c.google = strings.HasPrefix(r.URL.Path, "/v1beta/")
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

// A call is one call being answered. Only one goroutine uses it.
type call struct {
	p          *provider
	w          http.ResponseWriter
	r          *http.Request
	start      time.Time
	requestID  string
	anthropic  bool // answer in Anthropic's shapes, not OpenAI's
	google     bool // answer in Google's
	body       request
	rawBody    []byte // the JSON body; nil for multipart
	audioBytes int64  // bytes of an uploaded file
}

// handler returns the method that answers the request's URL, or nil if there is none. It lists
// every URL of the provider.
func (c *call) handler() func() {
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
	if strings.HasPrefix(c.r.URL.Path, geminiPrefix) {
		return c.geminiHandler()
	}
	if id, ok := strings.CutPrefix(c.r.URL.Path, "/v1/models/"); ok && id != "" && c.r.Method == http.MethodGet {
		return func() { c.model(id) }
	}
	return nil
}

// authorized reports whether the call carries the key in its API's header; if not, it answers with
// the error. SDKs send Anthropic's key in either of two headers.
func (c *call) authorized() bool {
	given, msg := c.r.Header.Get("X-Api-Key"), "invalid x-api-key"
	if !c.anthropic || given == "" {
		given, _ = strings.CutPrefix(c.r.Header.Get("Authorization"), "Bearer ")
	}
	if c.google {
		given = c.r.Header.Get("X-Goog-Api-Key")
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

// readBody reads and checks the body and injects the faults that its prompt asks for. It returns
// false if it has answered the call.
func (c *call) readBody() bool {
	body := http.MaxBytesReader(c.w, c.r.Body, maxBodyBytes)
	kind, params, _ := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	var err error
	if kind == "multipart/form-data" {
		err = c.readForm(multipart.NewReader(body, params["boundary"]))
	} else if c.rawBody, err = io.ReadAll(body); err == nil && c.google {
		var g geminiRequest
		err = json.Unmarshal(c.rawBody, &g)
		c.body = g.translate(c.body.Model)
	} else if err == nil {
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
	case c.body.Model == unknownModel:
		c.failUnknownModel()
		return false
	}
	if c.body.N < 0 || c.body.N > 128 {
		c.fail(http.StatusBadRequest, "", "'n' must be from 1 to 128")
		return false
	}
	return !c.injectFault()
}

// readForm reads a multipart body: the fields of audio calls and the size of the file.
func (c *call) readForm(form *multipart.Reader) error {
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

// injectFault carries out [[slow …]] and [[error …]] and reports whether it has answered the call.
func (c *call) injectFault() bool {
	if arg, ok := findTrigger(c.body.prompt, "slow"); ok {
		if d, err := time.ParseDuration(arg); err == nil {
			c.sleep(min(d, time.Minute))
		}
	}
	arg, _ := findTrigger(c.body.prompt, "error")
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

// failUnknownModel answers 404 for a model that does not exist.
func (c *call) failUnknownModel() {
	msg := "The model `" + unknownModel + "` does not exist or you do not have access to it."
	switch {
	case c.anthropic:
		msg = "model: " + unknownModel
	case c.google:
		msg = "models/" + unknownModel + " is not found for API version v1beta."
	}
	c.fail(http.StatusNotFound, "model_not_found", msg)
}

// fail answers with an error in the API's shape. OpenAI's code is null if code is empty;
// Anthropic's errors have no code.
func (c *call) fail(status int, code, msg string) {
	kind := errorType(status, c.anthropic)
	v := obj{"error", obj{"message", msg, "type", kind, "param", nil, "code", nullIfEmpty(code)}}
	if c.anthropic {
		v = obj{"type", "error", "error", obj{"type", kind, "message", msg}, "request_id", c.requestID}
	}
	if c.google {
		v = geminiError(status, msg)
	}
	b, _ := json.Marshal(v) // strings only
	c.writeHeader(status, "application/json")
	c.w.Write(append(b, '\n'))
}

// errorType returns the API's error type for a status.
func errorType(status int, anthropic bool) string {
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

// writeHeader sends the status and headers. Nothing may have been sent before.
func (c *call) writeHeader(status int, contentType string) {
	h := c.w.Header()
	h.Set("Content-Type", contentType)
	used, remaining := countTokens(len(c.body.prompt)), "9999"
	if status == http.StatusTooManyRequests {
		remaining = "0"
	}
	untilReset := time.Duration(used) * 30 * time.Microsecond
	set := map[string]string{
		"X-Request-Id": c.requestID, "Openai-Version": "2020-10-01", "Openai-Organization": "org-demo",
		"Openai-Processing-Ms":           strconv.FormatInt(time.Since(c.start).Milliseconds(), 10),
		"X-Ratelimit-Limit-Requests":     "10000",
		"X-Ratelimit-Remaining-Requests": remaining,
		"X-Ratelimit-Reset-Requests":     "6ms",
		"X-Ratelimit-Limit-Tokens":       "2000000",
		"X-Ratelimit-Remaining-Tokens":   strconv.Itoa(max(0, 2000000-used)),
		"X-Ratelimit-Reset-Tokens":       untilReset.Round(time.Millisecond).String(),
	}
	if c.anthropic {
		reset := c.start.Add(time.Second).UTC().Format(time.RFC3339)
		set = map[string]string{
			"Request-Id": c.requestID, "Anthropic-Organization-Id": "00000000-0000-4000-8000-000000000000",
			"Anthropic-Ratelimit-Requests-Limit":     "10000",
			"Anthropic-Ratelimit-Requests-Remaining": remaining,
			"Anthropic-Ratelimit-Requests-Reset":     reset,
			"Anthropic-Ratelimit-Tokens-Limit":       "2000000",
			"Anthropic-Ratelimit-Tokens-Remaining":   strconv.Itoa(max(0, 2000000-used)),
			"Anthropic-Ratelimit-Tokens-Reset":       reset,
		}
	}
	if c.google {
		set = nil
	}
	for name, value := range set {
		h.Set(name, value)
	}
	c.w.WriteHeader(status)
}

// replyJSON sends v as JSON to a client that did not ask for a stream, after the time that so many
// words would take.
func (c *call) replyJSON(words int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		c.fail(http.StatusInternalServerError, "", "The demo provider could not encode its answer.")
		return
	}
	c.replyBytes(words, "application/json", append(b, '\n'))
}

// replyBytes is replyJSON for any content type. [[cut]] ends it half-way.
func (c *call) replyBytes(words int, contentType string, b []byte) {
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

// beginStream waits for the first token's delay and sends the headers of an event stream.
func (c *call) beginStream() {
	c.sleep(c.firstTokenDelay())
	c.w.Header().Set("Cache-Control", "no-cache")
	c.writeHeader(http.StatusOK, "text/event-stream; charset=utf-8")
}

// sendEvent sends one event of a stream and flushes it. Without a name it sends data only; it sends
// a json.RawMessage as is.
func (c *call) sendEvent(name string, v any) {
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
		panic(http.ErrAbortHandler) // a broken stream must not look complete
	}
}

// sendPaced emits the chunks of a stream at the provider's pace. [[cut]] breaks the connection
// half-way.
func (c *call) sendPaced(chunks []string, emit func(chunk string)) {
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

func (c *call) wantsCut() bool {
	_, ok := findTrigger(c.body.prompt, "cut")
	return ok
}

// firstTokenDelay returns a realistic delay before the first token: 150 to 600 ms, the same for the
// same prompt, or 0 without a pace.
func (c *call) firstTokenDelay() time.Duration {
	if c.p.chunkDelay <= 0 {
		return 0
	}
	return time.Duration(150+hash(c.body.Model, c.body.prompt)%451) * time.Millisecond
}

// sleep waits. It panics with http.ErrAbortHandler if the client disconnects meanwhile.
func (c *call) sleep(d time.Duration) {
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

// newID returns a new id with the prefix, as long as a real one.
func (p *provider) newID(prefix string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("%s%016x%016x", prefix, p.ids.Uint64(), p.ids.Uint64())
}

// cachedTokens returns how many of the prompt's tokens, in steps of 1024, the model has seen at the
// start of an earlier prompt. It records this prompt.
func (p *provider) cachedTokens(model, prompt string) (tokens int) {
	fresh := map[uint64]struct{}{}
	p.mu.Lock()
	defer p.mu.Unlock()
	const step = cacheStepTokens * 4 // bytes
	h := hash(model)
	for end := step; end <= len(prompt) && len(fresh) < maxPrefixes/4; end += step {
		h = hash(strconv.FormatUint(h, 16), prompt[end-step:end])
		if _, ok := p.seenPrefixes[h]; ok {
			tokens = end / 4
		} else {
			fresh[h] = struct{}{}
		}
	}
	if len(p.seenPrefixes)+len(fresh) > maxPrefixes {
		clear(p.seenPrefixes)
	}
	maps.Copy(p.seenPrefixes, fresh)
	return tokens
}
