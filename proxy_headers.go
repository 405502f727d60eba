// This file decides which headers pass: the allow-lists for requests and for answers, and the headers that web pages
// of other sites need (CORS_ORIGINS). It also decides which query parameters pass, reads the headers that ask for a
// WebSocket or a buffered stream, and those that concern the response cache, and finds the credential that a request
// presents. At its end, it has what the key of a cached answer is made of, finds out which calls belong together, and
// has the headers of a token's limits. It sends nothing and checks no token.
package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// credential returns the token that the request presents: a bearer token, or one of the headers that some SDKs send
// instead. Two different ones are an error: another part of the system might read the other one. An empty one,
// which SDKs send for a key that is not set, is none. The query parameter key, which Gemini's API also takes, is
// removed from the request: it must be neither forwarded nor shown.
func credential(r *http.Request) (found string, err error) {
	for _, name := range [...]string{"Authorization", "X-Api-Key", "Api-Key", "X-Goog-Api-Key", queryKey} {
		values, what := r.Header[name], name+" header"
		if name == queryKey {
			values, what = takeQueryKey(r.URL), "key in its query"
		}
		if len(values) > 1 {
			return "", errRepeatedCredential(what)
		}
		if len(values) == 0 {
			continue
		}
		value := values[0]
		if name == "Authorization" {
			scheme, rest, _ := strings.Cut(value, " ")
			if value != "" && !strings.EqualFold(scheme, "Bearer") {
				return "", errBadToken("not a bearer token")
			}
			value = strings.TrimLeft(rest, " ")
		}
		if value == "" {
			continue
		}
		if found != "" && value != found {
			return "", errTwoCredentials
		}
		found = value
	}
	return found, nil
}

// useGeminiPath gives a request of Google's SDKs for version v1 of Gemini's API the path of v1beta, which has all that
// v1 has. OpenAI's lists of models have the same URL, but their clients send neither of these headers.
func useGeminiPath(r *http.Request) {
	if r.Header["X-Goog-Api-Key"] == nil && r.Header["X-Goog-Api-Client"] == nil {
		return
	}
	rest, isV1 := strings.CutPrefix(r.URL.Path, "/v1/")
	raw, rawIsV1 := strings.CutPrefix(r.URL.RawPath, "/v1/") // RawPath is empty if the path has no escapes
	resource, _, _ := strings.Cut(rest, "/")
	if !isV1 || resource != "models" && resource != "interactions" || !rawIsV1 && raw != "" {
		return
	}
	if r.URL.Path = geminiPrefix + rest; rawIsV1 {
		r.URL.RawPath = geminiPrefix + raw
	}
}

// queryKey is a credential in the query of Gemini's API.
const queryKey = "key"

// takeQueryKey removes every queryKey from the query of a request to Gemini's API, and returns the values.
func takeQueryKey(u *url.URL) (keys []string) {
	if u.RawQuery == "" || !strings.HasPrefix(u.Path, geminiPrefix) {
		return nil
	}
	rest := slices.DeleteFunc(strings.Split(u.RawQuery, "&"), func(pair string) bool {
		rawName, rawValue, _ := strings.Cut(pair, "=")
		name, err := url.QueryUnescape(rawName)
		if err != nil || name != queryKey {
			return false
		}
		value, err := url.QueryUnescape(rawValue)
		if err != nil {
			value = rawValue // no token has a '%'
		}
		keys = append(keys, value)
		return true
	})
	u.RawQuery = strings.Join(rest, "&")
	return keys
}

// allowRequestHeader is the allow-list for request headers. Names are canonical.
func allowRequestHeader(name string) bool {
	switch name {
	case "Content-Type", "Accept", "User-Agent", "Idempotency-Key", "X-Client-Request-Id", "Traceparent", "Tracestate",
		"X-Goog-Api-Client", "X-Server-Timeout", "Api-Revision": // of Google's SDKs
		return true
	}
	return strings.HasPrefix(name, "X-Stainless-") || isCodexRequestHeader(name) ||
		isProviderHeader(name) && !describesAccount(name)
}

// isCodexRequestHeader reports whether a header is one by which Codex names itself, its session and its turn: the
// provider keeps the calls of a session where its prompt is cached. None of them chooses an account.
func isCodexRequestHeader(name string) bool {
	switch name {
	case "Originator", "Session-Id", "Session_id", "Conversation-Id", "Conversation_id", "Thread-Id",
		"X-Openai-Subagent":
		return true
	}
	return strings.HasPrefix(name, "X-Codex-")
}

func isProviderHeader(name string) bool {
	return strings.HasPrefix(name, "Openai-") || strings.HasPrefix(name, "Anthropic-")
}

// describesAccount reports whether a provider's header names or describes the account behind the key: its
// organization, project, workspace or user, and how much of its limits is left. Clients that share the key may
// neither choose the account nor see its state. The upstream's settings choose it.
func describesAccount(name string) bool {
	switch name {
	case "Openai-Organization", "Openai-Project":
		return true
	}
	for _, suffix := range [...]string{"-Id", "-Limit", "-Remaining", "-Reset"} {
		if strings.HasSuffix(name, suffix) {
			return true
		}
	}
	return strings.Contains(name, "-Ratelimit-")
}

// allowConditionHeader is the allow-list for headers that ask for a part of an object, or for an object only if it
// has changed. Ranges are for contents and models only: the proxy must read other answers whole.
func (e *endpoint) allowConditionHeader(name string) bool {
	switch name {
	case "If-None-Match", "If-Modified-Since":
		return e.method == http.MethodGet
	case "Range", "If-Range", "If-Match", "If-Unmodified-Since":
		return e.method == http.MethodGet && (e.modelInPath || strings.HasSuffix(e.pattern, "/content"))
	}
	return false
}

// upstreamHeader returns the headers that go to the provider, without the key. Headers that the client's
// Connection header names are for this hop only, except that the client cannot remove Content-Type. project is
// the id of the client's project. e is the endpoint if its answers pass unchanged, and otherwise nil: a condition
// about the provider's bytes says nothing about bytes of the proxy.
func upstreamHeader(in http.Header, project string, e *endpoint) http.Header {
	out := make(http.Header, 8)
	for name, values := range in {
		if allowRequestHeader(name) || e != nil && e.allowConditionHeader(name) {
			out[name] = values
		}
	}
	if _, ok := parseTraceparent(out["Traceparent"]); !ok { // the client's own text, not a trace
		delete(out, "Traceparent")
		delete(out, "Tracestate")
	}
	for _, line := range in["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			if name = http.CanonicalHeaderKey(strings.TrimSpace(name)); name != "Content-Type" {
				delete(out, name)
			}
		}
	}
	if v, ok := out["Idempotency-Key"]; ok {
		// Under its canonical name, net/http takes the header as permission to resend what
		// the provider may have received already, unseen by limits and ledger.
		delete(out, "Idempotency-Key")
		if v = scopeIdempotencyKeys(v, project); len(v) > 0 {
			out["idempotency-key"] = v
		}
	}
	return out
}

// scopeIdempotencyKeys replaces a client's keys by others that only its project can cause. Projects may share a
// provider key, and the provider would answer one project's request with what another got for an equal key. An empty
// key is left out: as an HMAC it would be the same key for all calls that have none.
func scopeIdempotencyKeys(keys []string, project string) []string {
	out := make([]string, 0, len(keys))
	for _, key := range keys {
		if key == "" {
			continue
		}
		mac := hmac.New(sha256.New, []byte(project))
		mac.Write([]byte(key))
		out = append(out, hex.EncodeToString(mac.Sum(nil)))
	}
	return out
}

// allowResponseHeader is the allow-list for answer headers. Names are canonical. The provider's X-Ratelimit-*
// are not on it: they describe the key, which many tokens share. The client gets its token's (proxy_admit.go).
func allowResponseHeader(name string) bool {
	switch name {
	case "Content-Type", "Content-Length", "Content-Encoding", "Content-Disposition",
		"Content-Range", "Accept-Ranges", "Etag", "Last-Modified",
		"Retry-After", "Retry-After-Ms", "X-Ms-Retry-After-Ms", "X-Should-Retry",
		"X-Codex-Turn-State", "X-Models-Etag", "X-Reasoning-Included": // the other X-Codex-* describe the account
		return true
	}
	return isRequestID(name) || isProviderHeader(name) && !describesAccount(name)
}

// mediaType returns the type in a Content-Type header, "" if there is none.
func mediaType(header string) string {
	switch header { // nearly all are one of these
	case "application/json", "text/event-stream":
		return header
	case "text/event-stream; charset=utf-8":
		return "text/event-stream"
	}
	t, _, err := mime.ParseMediaType(header)
	if err != nil && !errors.Is(err, mime.ErrInvalidMediaParameter) { // despite a bad parameter, the type is clear
		return ""
	}
	return t
}

// headerValue returns the first value of a header, "" if there is none. name is canonical: Header.Get would make it so.
func headerValue(h http.Header, name string) string {
	if values := h[name]; len(values) > 0 {
		return values[0]
	}
	return ""
}

// setStreamHeaders sets the headers of a stream of events.
func setStreamHeaders(h http.Header) {
	h["Cache-Control"] = []string{"no-cache, no-store"}
	h["X-Accel-Buffering"] = []string{"no"} // an nginx in front must not collect events
}

// isEventStream reports whether an answer is a stream of events that can be read.
func isEventStream(res *http.Response) bool {
	return res.StatusCode == http.StatusOK && headerValue(res.Header, "Content-Encoding") == "" &&
		mediaType(headerValue(res.Header, "Content-Type")) == "text/event-stream"
}

// isRequestID reports whether a header has a provider's own id of a request, for its support.
func isRequestID(name string) bool {
	switch name {
	case "X-Request-Id", "Request-Id", "Apim-Request-Id", "X-Ms-Request-Id", "X-Amzn-Requestid", "Cf-Ray",
		"Mistral-Correlation-Id":
		return true
	}
	return false
}

// offersWebSocket reports whether an Upgrade header asks for a WebSocket. Any other offer, like h2c, may be ignored:
// the request is complete without it (RFC 9110, 7.8).
func offersWebSocket(upgrade []string) bool {
	for _, line := range upgrade {
		for protocol := range strings.SplitSeq(line, ",") {
			name, _, _ := strings.Cut(strings.TrimSpace(protocol), "/")
			if strings.EqualFold(name, "websocket") {
				return true
			}
		}
	}
	return false
}

// wantsBufferedStream reports whether the call's stream is to be buffered: as the client's header says or,
// without one, as the project's setting says.
func wantsBufferedStream(h http.Header, p *projectState) (bool, error) {
	switch v := h["X-Llm-Proxy-Stream"]; {
	case len(v) == 0:
		return p.routing.VerifiedStreams, nil
	case len(v) == 1 && (v[0] == "verified" || v[0] == "plain"):
		return v[0] == "verified", nil
	}
	return false, errStreamHeader
}

// queryParams are the query parameters of the endpoints; true means that one may be repeated. model is
// not among them: with a provider that takes it there, it would bypass the model check. See checkQuery.
var queryParams = map[string]bool{
	"after": false, "before": false, "after_id": false, "before_id": false, "starting_after": false,
	"limit": false, "order": false, "order_by": false, "filter": false, "purpose": false, "status": false,
	"name": false, "variant": false, "run_id": false, "group_id": false, "project_id": false, "user": false,
	"stream": false, "include_obfuscation": false, "beta": false, "include": true, "include[]": true,
	"page": false, "source": false, clientVersion: false, azureVersion: false,
}

// geminiParams is queryParams for Gemini's API. fields is not among them: it could leave the usage out of answers.
var geminiParams = map[string]bool{"alt": false, "pageSize": false, "pageToken": false, "stream": false,
	"last_event_id": false}

// clientVersion is a query parameter of Codex. It asks GET /v1/models for the provider's own description of the models
// that this version of Codex can use: {"models":[{"slug":…}]}. Such lists are not merged.
const clientVersion = "client_version"

// azureVersion is a query parameter of Azure's own: no other provider gets it.
const azureVersion = "api-version"

const maxQueryLen = 2 << 10

// checkQuery checks that a query has one reading and known parameters only: queryParams, metadata[key], and model
// for the list of stored chat completions, whose model it returns. Such a query goes up as it is. For any other it
// returns a *bodyError that names the parameter.
func checkQuery(raw string, e *endpoint) (model string, err error) {
	if raw == "" {
		return "", nil
	}
	switch {
	case len(raw) > maxQueryLen:
		return "", &bodyError{"", fmt.Sprintf("The query string is longer than %d bytes.", maxQueryLen)}
	case strings.Contains(raw, ";"):
		return "", &bodyError{"", "The query string contains ';', which some servers treat as a separator."}
	case strings.Contains(raw, "#"):
		return "", &bodyError{"", "The query string contains '#', which ends it for some servers. Send %23."}
	}
	seen := make(map[string]bool)
	for pair := range strings.SplitSeq(raw, "&") {
		if pair == "" {
			continue
		}
		rawName, rawValue, _ := strings.Cut(pair, "=")
		name, err1 := url.QueryUnescape(rawName)
		value, err2 := url.QueryUnescape(rawValue)
		if err1 != nil || err2 != nil {
			return "", &bodyError{"", fmt.Sprintf("The query parameter %+q contains a bad escape.", rawName)}
		}
		repeatable, known := queryParams[name]
		known = known || isMetadataParam(name) || name == "metadata" && value == "null" // objects without metadata
		if e.api == apiGemini {
			repeatable, known = geminiParams[name]
		}
		isModel := name == "model" && e.name() == "GET "+chatPattern
		switch {
		case !known && !isModel:
			return "", &bodyError{name, fmt.Sprintf("Unknown query parameter %+q.", name)}
		case seen[name] && !repeatable:
			return "", &bodyError{name, fmt.Sprintf("Repeated query parameter %+q.", name)}
		case name == "alt" && value != "sse" && value != "json":
			return "", &bodyError{name, "The query parameter \"alt\" must be sse or json."}
		case !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl):
			return "", &bodyError{name, fmt.Sprintf("The query parameter %+q contains an invalid character.", name)}
		}
		seen[name] = true
		if isModel {
			var f callFields
			if err := f.setModel([]byte(value)); err != nil {
				return "", err
			}
			model = f.model
		}
	}
	return model, nil
}

// hasParam reports whether a query that checkQuery has passed has a parameter.
func hasParam(query, name string) bool {
	if query == "" {
		return false
	}
	values, err := url.ParseQuery(query)
	return err == nil && values.Has(name)
}

// withoutAzureVersion returns a query without the parameter azureVersion, for an upstream that is not Azure's.
func withoutAzureVersion(query string) string {
	if !hasParam(query, azureVersion) {
		return query
	}
	isVersion := func(pair string) bool { return hasParam(pair, azureVersion) }
	pairs := slices.DeleteFunc(strings.Split(query, "&"), isVersion)
	return strings.Join(pairs, "&")
}

// isMetadataParam reports whether name is metadata[key], which filters a list.
func isMetadataParam(name string) bool {
	key, ok := strings.CutPrefix(name, "metadata[")
	key, closed := strings.CutSuffix(key, "]")
	return ok && closed && key != "" && len(key) <= 64 && isAlphanumericOr(key, "_-. ")
}

// A crossOrigin lets web pages of the origins in CORS_ORIGINS call /v1. A page presents its token itself: browsers
// add no cookie or other credential to such calls. It is immutable.
type crossOrigin struct {
	origins map[string][]string // by origin, the value of Access-Control-Allow-Origin
	vary    []string
	exposed []string
}

// exposedHeaders are the answer headers that pages may read, besides those that browsers show anyway.
const exposedHeaders = "X-LLM-Proxy-Request-ID, X-LLM-Proxy-Upstream, X-Request-ID, Request-ID, Apim-Request-ID, " +
	"X-Ms-Request-ID, X-Amzn-RequestID, CF-Ray, Mistral-Correlation-ID, Retry-After, Retry-After-Ms, " +
	"X-Ms-Retry-After-Ms, X-Codex-Turn-State, X-Models-ETag, X-Reasoning-Included, X-Should-Retry, " +
	"X-RateLimit-Limit-Requests, X-RateLimit-Remaining-Requests, " +
	"X-RateLimit-Reset-Requests, X-RateLimit-Limit-Tokens, X-RateLimit-Remaining-Tokens, X-RateLimit-Reset-Tokens, " +
	"OpenAI-Processing-Ms, OpenAI-Version, OpenAI-Model, Content-Disposition, Content-Range, Accept-Ranges, ETag, " +
	"Allow, Age, Cache-Status"

// preflightSeconds is how long browsers may remember the answer to a preflight request; Chrome's maximum.
const preflightSeconds = "7200"

const preflightPattern = "OPTIONS /v1/" // in the log and the metrics

// newCrossOrigin returns nil if there are no origins: nothing is added to any answer.
func newCrossOrigin(origins []string) *crossOrigin {
	if len(origins) == 0 {
		return nil
	}
	x := &crossOrigin{origins: map[string][]string{}, vary: []string{"Origin"}, exposed: []string{exposedHeaders}}
	for _, origin := range origins {
		x.origins[origin] = []string{origin}
	}
	return x
}

// isPreflight reports whether a browser asks if a page may make a call: without a token, which only the call has.
func (x *crossOrigin) isPreflight(r *http.Request) bool {
	return x != nil && r.Method == http.MethodOptions && len(r.Header["Origin"]) == 1 &&
		r.Header["Access-Control-Request-Method"] != nil
}

// addHeaders adds to every answer, errors too, what lets a page of a listed origin read it.
func (x *crossOrigin) addHeaders(h, request http.Header) {
	if x == nil {
		return
	}
	h["Vary"] = x.vary // a cache must not give one origin's answer to another
	if origin := request["Origin"]; len(origin) == 1 && x.origins[origin[0]] != nil {
		h["Access-Control-Allow-Origin"] = x.origins[origin[0]]
		h["Access-Control-Expose-Headers"] = x.exposed
	}
}

// answerPreflight allows a page of a listed origin every method and every header: those that are not on
// allowRequestHeader's list go nowhere. Any other origin gets an error without the headers, which the browser takes
// as a no.
func (x *crossOrigin) answerPreflight(w http.ResponseWriter, r *http.Request) {
	r.Pattern = preflightPattern
	h := w.Header()
	x.addHeaders(h, r.Header)
	if h["Access-Control-Allow-Origin"] == nil {
		writeError(w, errOriginNotAllowed, shapeFor(r))
		return
	}
	delete(h, "Access-Control-Expose-Headers")
	h["Access-Control-Allow-Methods"] = []string{"GET, HEAD, POST, DELETE"}
	if names := strings.Join(r.Header["Access-Control-Request-Headers"], ","); isHeaderNameList(names) {
		h["Access-Control-Allow-Headers"] = []string{names}
	}
	h["Access-Control-Max-Age"] = []string{preflightSeconds}
	w.WriteHeader(http.StatusNoContent)
}

// isHeaderNameList reports whether s has only characters of header names, with commas and spaces between them.
func isHeaderNameList(s string) bool {
	return s != "" && isAlphanumericOr(s, "!#$%&'*+-.^_`|~, ")
}

// cacheDirectives are the directives of a request's Cache-Control (RFC 9111, 5.2.1) that a cache which never answers
// with a stale answer must follow.
type cacheDirectives struct {
	noStore, noCache, onlyIfCached bool
	maxAge, minFresh               int64 // seconds; maxAge is -1 if there is none
}

// parseCacheControl reads the Cache-Control lines of a request, or without any its Pragma lines. A number that cannot
// be read makes every stored answer too old.
func parseCacheControl(lines, pragma []string) cacheDirectives {
	d := cacheDirectives{maxAge: -1}
	if len(lines) == 0 {
		lines = pragma
	}
	eachDirective(lines, func(name, value string) {
		switch name {
		case "no-store":
			d.noStore = true
		case "no-cache":
			d.noCache = true
		case "only-if-cached":
			d.onlyIfCached = true
		case "max-age":
			n := parseSeconds(value, 0)
			if d.maxAge < 0 || n < d.maxAge {
				d.maxAge = n
			}
		case "min-fresh":
			d.minFresh = max(d.minFresh, parseSeconds(value, math.MaxInt32))
		}
	})
	return d
}

// parseSeconds reads a number of seconds; it is at most MaxInt32, and otherwise if it is not a number.
func parseSeconds(text string, otherwise int64) int64 {
	if !allDigits(text) {
		return otherwise
	}
	if n, err := strconv.ParseInt(text, 10, 64); err == nil {
		return min(n, math.MaxInt32)
	}
	return math.MaxInt32
}

// eachDirective calls do for every directive, with its name in lower case and its value without quotes.
func eachDirective(lines []string, do func(name, value string)) {
	for _, line := range lines {
		for line != "" {
			end, quoted := 0, false
			for ; end < len(line) && (quoted || line[end] != ','); end++ {
				switch {
				case line[end] == '"':
					quoted = !quoted
				case line[end] == '\\' && quoted:
					end++
				}
			}
			end = min(end, len(line))
			name, value, _ := strings.Cut(line[:end], "=")
			if name = strings.ToLower(strings.TrimSpace(name)); name != "" {
				do(name, strings.Trim(strings.TrimSpace(value), `"`))
			}
			line = line[min(end+1, len(line)):]
		}
	}
}

// forbidsStoring reports whether a provider's Cache-Control forbids a shared cache to store the answer. Its other
// directives are about browsers: event streams have no-cache by custom.
func forbidsStoring(lines []string) (forbidden bool) {
	eachDirective(lines, func(name, _ string) { forbidden = forbidden || name == "no-store" || name == "private" })
	return forbidden
}

// appendCacheKeyParts appends what the answer depends on beside the body. The project's version stands for its policy:
// no answer outlives a change of it.
func (c *call) appendCacheKeyParts(parts []string, h http.Header) []string {
	u := c.upstream
	scope, id := "project", c.project.id
	if c.project.policy.Cache.Scope == "token" {
		scope, id = "token", c.tokenState.id
	}
	parts = append(parts, scope, id, strconv.FormatInt(c.project.version, 10), c.endpoint.name(), u.provider, u.scheme,
		u.host, u.basePath, u.organization, u.openaiProject, u.mapModel(c.fields.model), c.query,
		strconv.FormatBool(c.usageAdded), strconv.FormatBool(c.bufferStream))
	parts = appendHeaderParts(parts, h, "Accept")
	parts = appendHeaderParts(parts, h, "Content-Type")
	if v := h["Connection"]; len(v) > 1 || len(v) == 1 && !isPlainConnection(v[0]) {
		parts = appendHeaderParts(parts, h, "Connection") // it may name headers that do not go up
	}
	var space [8]string
	names := space[:0]
	for name := range h {
		if isProviderHeader(name) && !describesAccount(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		parts = appendHeaderParts(parts, h, name)
	}
	return parts
}

func appendHeaderParts(parts []string, h http.Header, name string) []string {
	values := h[name]
	return append(append(parts, name, strconv.Itoa(len(values))), values...)
}

func isPlainConnection(value string) bool {
	return strings.EqualFold(value, "keep-alive") || strings.EqualFold(value, "close")
}

// The values of Cache-Status (RFC 9211) of calls that go to the provider.
const (
	cacheMiss      = "llm-proxy; fwd=miss"
	cacheRequest   = "llm-proxy; fwd=request"
	cacheAlone     = "llm-proxy; fwd=miss; collapsed=?0"
	cacheBypass    = "llm-proxy; fwd=bypass; detail="
	cacheStored    = "; stored"
	cacheMissStore = cacheMiss + cacheStored
)

func (u *cachedCall) setStatus(h http.Header, status string) {
	u.status[0] = status
	h["Cache-Status"] = u.status[:]
}

// findAffinity returns what keeps the call together with others, so that they get the upstream that has their prompt
// cached.
func (c *call) findAffinity() affinity {
	body := c.body
	if !c.endpoint.hasOutputTokens() {
		body = nil
	}
	return c.project.affinityOf(c.attribution.value(sessionAttribute), body, &c.fields)
}

// recordRetry fills in the row of a call that has ended: how its upstream was chosen, and whether its client had sent
// it before. The call has a token.
func (p *proxy) recordRetry(c *call, r *http.Request, row *requestRow) {
	if c.attemptCount > 0 && !c.pinned() {
		row.routedBy = string(c.affinity.source)
	}
	p.retries.record(&sentCall{token: c.tokenState, project: c.project, endpoint: c.endpoint, body: c.body,
		header: r.Header}, row)
}

// A rateHeader is the state of one limit in the x-ratelimit-* headers.
type rateHeader struct {
	set              bool
	limit, remaining int64
	reset            time.Duration // until the whole limit is available again; 0: unknown
}

// rateHeaders describe a token's limits of requests and of tokens, of each the one with the least remaining.
type rateHeaders struct{ requests, tokens rateHeader }

// rateHeaders returns the headers of a token's call; maxRequests is its lifetime limit, or negative. A limit with
// for_each shows what the call's own value has left. The caller holds the limiter's mu. The project's limits are not
// included: they would reveal what other tokens use.
func (t *liveToken) rateHeaders(maxRequests int64, a *attribution, now int64) (r rateHeaders) {
	if maxRequests >= 0 {
		r.requests = rateHeader{set: true, limit: maxRequests, remaining: max(0, maxRequests-t.used.Load())}
	}
	for _, c := range t.limits.counters {
		if c = c.forValueOf(a); c == nil {
			continue
		}
		header := &r.requests
		switch l := c.limit; {
		case l.metric == metricTokens:
			header = &r.tokens
		case l.metric != metricRequests:
			continue
		}
		if c.limit.monitorOnly {
			continue
		}
		c.advance(now)
		if n := c.remaining(); !header.set || n < header.remaining {
			reset := time.Duration(max(0, c.resetTime(now)-now)) * time.Millisecond
			*header = rateHeader{set: true, limit: c.limit.max, remaining: n, reset: reset}
		}
	}
	return r
}

// write sets the headers, in OpenAI's form.
func (r *rateHeaders) write(h http.Header) {
	r.requests.write(h, "X-Ratelimit-Limit-Requests", "X-Ratelimit-Remaining-Requests", "X-Ratelimit-Reset-Requests")
	r.tokens.write(h, "X-Ratelimit-Limit-Tokens", "X-Ratelimit-Remaining-Tokens", "X-Ratelimit-Reset-Tokens")
}

func (r *rateHeader) write(h http.Header, limit, remaining, reset string) {
	if !r.set {
		return
	}
	values := []string{strconv.FormatInt(r.limit, 10), strconv.FormatInt(r.remaining, 10), ""}
	h[limit], h[remaining] = values[0:1:1], values[1:2:2]
	if r.reset > 0 {
		values[2] = r.reset.String()
		h[reset] = values[2:]
	}
}
