// This file holds every error that clients can get: one catalogue, the JSON shapes and the one function that
// writes them. A cause is for the log alone: err.Error() never reaches a client.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An apiError is a failure as the client gets it. Catalogue values are shared and never change.
type apiError struct {
	status     int
	code       string
	kind       string // OpenAI's "type"; "" for the status's usual type
	param      string
	msg        string
	retryAfter time.Duration // 0: no Retry-After
	noRetry    bool          // tells SDKs not to retry although the status says so
	limit      string        // the limit that refused the call, in words, for the ledger and the log
	cause      error
}

func (e *apiError) Error() string {
	if e.cause != nil {
		return fmt.Sprintf("%d %s: %v", e.status, e.code, e.cause)
	}
	return fmt.Sprintf("%d %s", e.status, e.code)
}

func (e *apiError) Unwrap() error { return e.cause }

// withoutRetry returns a copy of e that tells SDKs not to retry.
func (e *apiError) withoutRetry() *apiError {
	c := *e
	c.noRetry = true
	return &c
}

// withCause returns a copy of e with a cause.
func (e *apiError) withCause(cause error) *apiError {
	c := *e
	c.cause = cause
	return &c
}

// recordCode is the code for the ledger and the log: for a bad token the reason, which only operators see.
func (e *apiError) recordCode() string {
	if e.status == http.StatusUnauthorized && e.cause != nil {
		return e.cause.Error()
	}
	return e.code
}

// errorTypes are the names of a kind of error: "type" in OpenAI's and in Anthropic's shape, and "status" in Google's,
// which is the name of a google.rpc.Code.
type errorTypes struct{ openAI, anthropic, google string }

func errorTypesOf(status int) errorTypes {
	switch status {
	case http.StatusUnauthorized:
		return errorTypes{"invalid_request_error", "authentication_error", "UNAUTHENTICATED"}
	case http.StatusForbidden:
		return errorTypes{"permission_error", "permission_error", "PERMISSION_DENIED"}
	case http.StatusNotFound:
		return errorTypes{"invalid_request_error", "not_found_error", "NOT_FOUND"}
	case http.StatusRequestEntityTooLarge:
		return errorTypes{"invalid_request_error", "request_too_large", "INVALID_ARGUMENT"}
	case http.StatusTooManyRequests:
		return errorTypes{"rate_limit_error", "rate_limit_error", "RESOURCE_EXHAUSTED"}
	case http.StatusInternalServerError:
		return errorTypes{"server_error", "api_error", "INTERNAL"}
	case http.StatusServiceUnavailable:
		return errorTypes{"server_error", "overloaded_error", "UNAVAILABLE"}
	case http.StatusGatewayTimeout:
		return errorTypes{"server_error", "api_error", "DEADLINE_EXCEEDED"}
	}
	if status >= 500 {
		return errorTypes{"server_error", "api_error", "UNAVAILABLE"}
	}
	return errorTypes{"invalid_request_error", "invalid_request_error", "INVALID_ARGUMENT"}
}

// asAPIError returns err as an apiError. Any other error is a fault of the proxy: 500.
func asAPIError(err error) *apiError {
	if e, ok := errors.AsType[*apiError](err); ok {
		return e
	}
	if e, ok := errors.AsType[*fieldError](err); ok {
		return badRequest("invalid_value", e.param, fieldErrorMessage(e))
	}
	return errInternal(err)
}

func fieldErrorMessage(e *fieldError) string {
	if e.param == "" {
		return e.msg
	}
	return fmt.Sprintf("%s %s.", e.param, strings.TrimSuffix(e.msg, "."))
}

// An errorShape is the JSON in which the SDKs of an API read errors.
type errorShape uint8

const (
	shapeOpenAI    errorShape = iota
	shapeAnthropic            // has OpenAI's members too
	shapeGoogle
)

// shapeFor returns the shape for a request.
func shapeFor(r *http.Request) errorShape {
	switch {
	case strings.HasPrefix(r.URL.Path, "/v1beta/"):
		return shapeGoogle
	case strings.HasPrefix(r.URL.Path, "/v1/messages") || r.Header["Anthropic-Version"] != nil:
		return shapeAnthropic
	}
	return shapeOpenAI
}

type errorBody struct {
	Type  string     `json:"type,omitempty"` // "error" in Anthropic's shape, absent in OpenAI's
	Error errorInner `json:"error"`
}

type errorInner struct {
	Message string  `json:"message"`
	Type    string  `json:"type"`
	Param   *string `json:"param"`
	Code    *string `json:"code"`
}

// responseBody returns the JSON for the client.
func (e *apiError) responseBody(shape errorShape) []byte {
	if shape == shapeGoogle {
		return e.googleBody()
	}
	types := errorTypesOf(e.status)
	body := errorBody{Error: errorInner{Message: e.msg, Type: cmp.Or(e.kind, types.openAI)}}
	if e.param != "" {
		body.Error.Param = &e.param
	}
	if e.code != "" {
		body.Error.Code = &e.code
	}
	if shape == shapeAnthropic {
		body.Type, body.Error.Type = "error", types.anthropic
	}
	return append(mustMarshal(body), '\n')
}

// A googleError is a google.rpc.Status.
type googleError struct {
	Code    int            `json:"code"`
	Message string         `json:"message"`
	Status  string         `json:"status"`
	Details []googleDetail `json:"details"`
}

// A googleDetail is a google.rpc.ErrorInfo or a google.rpc.RetryInfo.
type googleDetail struct {
	Type       string            `json:"@type"`
	Reason     string            `json:"reason,omitempty"`
	Domain     string            `json:"domain,omitempty"`
	Metadata   map[string]string `json:"metadata,omitempty"`
	RetryDelay string            `json:"retryDelay,omitempty"`
}

// googleBody returns the JSON that Google's SDKs read. Its details have the proxy's own code, and how long to wait.
func (e *apiError) googleBody() []byte {
	info := googleDetail{Type: "type.googleapis.com/google.rpc.ErrorInfo", Reason: strings.ToUpper(e.code),
		Domain: "llm-proxy"}
	if e.param != "" {
		info.Metadata = map[string]string{"param": e.param}
	}
	details := []googleDetail{info}
	if e.retryAfter > 0 && !e.noRetry {
		details = append(details, googleDetail{Type: "type.googleapis.com/google.rpc.RetryInfo",
			RetryDelay: strconv.FormatInt(wholeSeconds(e.retryAfter), 10) + "s"})
	}
	return append(mustMarshal(map[string]googleError{
		"error": {Code: e.status, Message: e.msg, Status: errorTypesOf(e.status).google, Details: details}}), '\n')
}

// wholeSeconds rounds up.
func wholeSeconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

// writeError is the only function that writes errors.
func writeError(w http.ResponseWriter, e *apiError, shape errorShape) {
	b := e.responseBody(shape)
	h := w.Header()
	if e.retryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(wholeSeconds(e.retryAfter), 10))
		h.Set("Retry-After-Ms", strconv.FormatInt(e.retryAfter.Milliseconds(), 10))
	}
	if e.noRetry {
		h.Set("X-Should-Retry", "false")
	}
	if e.code == "draining" {
		h.Set("Connection", "close") // in HTTP/2 too: a retry then uses a new connection, to another process
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(b)))
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(e.status)
	_, _ = w.Write(b) // fails only if the client has disconnected
}

// An eventForm is how a stream of events writes errors, and what keeps it alive.
type eventForm uint8

const (
	eventsNamed     eventForm = iota // an error is an event of that name
	eventsUnnamed                    // OpenAI's completions: events have no names
	eventsResponses                  // of OpenAI's responses: an error has the members of their events too
	eventsAnthropic
	eventsGemini
)

// ping returns what keeps a stream alive and is skipped by its clients. Google's SDKs take a comment for data, but skip
// empty lines.
func (f eventForm) ping() []byte {
	switch f {
	case eventsAnthropic:
		return []byte("event: ping\ndata: {\"type\": \"ping\"}\n\n")
	case eventsGemini:
		return []byte("\n\n")
	}
	return []byte(": ping\n\n")
}

// errorEvent returns a JSON document with an error as an event, nil if the document has none.
func (f eventForm) errorEvent(document []byte) []byte {
	var members map[string]json.RawMessage
	var text bytes.Buffer
	if json.Unmarshal(document, &members) != nil || len(members["error"]) == 0 || json.Compact(&text, document) != nil {
		return nil
	}
	line := text.Bytes()
	if f == eventsResponses {
		var inner map[string]json.RawMessage
		_ = json.Unmarshal(members["error"], &inner) // where it is no object, it stays as it is
		for _, member := range [...]string{"code", "message", "param"} {
			if members[member] = inner[member]; inner[member] == nil {
				members[member] = json.RawMessage("null")
			}
		}
		members["type"], members["sequence_number"] = json.RawMessage(`"error"`), json.RawMessage("0")
		line = mustMarshal(members)
	}
	name := "event: error\n"
	if f == eventsUnnamed || f == eventsGemini {
		name = ""
	}
	return slices.Concat([]byte(name+"data: "), line, []byte("\n\n"))
}

// writeTimeout is how long a client may take to receive an answer of the proxy itself, and an HTTP/2 connection
// to accept a byte.
const writeTimeout = time.Minute

func notFound(w http.ResponseWriter, _ *http.Request) { writeError(w, errUnknownURL, shapeOpenAI) }

// An errorClass says who has to act on a failed call.
type errorClass string

const (
	errorClassNone     errorClass = ""         // the call succeeded
	errorClassCaller   errorClass = "caller"   // the request was wrong, or the client left
	errorClassPolicy   errorClass = "policy"   // a rule or limit of an administrator
	errorClassProvider errorClass = "provider" // the provider failed, was silent or cut its answer off
	errorClassProxy    errorClass = "proxy"    // the proxy, its database or its disk
)

// errorClass returns the class of a settled call. It uses only columns of the ledger, so that metrics, pages and
// queries of old rows agree.
func (r *requestRow) errorClass() errorClass {
	switch r.outcome {
	case outcomeClientGone:
		return errorClassCaller
	case outcomeLost:
		return errorClassProxy
	case outcomeTruncated:
		return truncatedErrorClass(r.errorCode)
	case outcomeRefused:
		return refusedErrorClass(r.status, r.errorCode)
	case outcomeUpstreamError:
		if r.status >= 400 && r.status < 500 && r.status != 429 {
			return errorClassCaller // the provider rejected the request
		}
		return errorClassProvider
	}
	return errorClassNone
}

// logLevel returns the level of a call's log line.
func (r *requestRow) logLevel() slog.Level {
	switch {
	case r.status < 500 || r.errorCode == errNotCached.code:
		return slog.LevelInfo // the client's mistakes, too, and what it asked for
	case r.outcome == outcomeRefused && r.errorCode != "draining" || r.errorCode == "ledger_unavailable":
		return slog.LevelError // the proxy failed
	}
	return slog.LevelWarn // the provider failed, or the program ends
}

func refusedErrorClass(status int, code string) errorClass {
	switch {
	case code == "no_upstream" || status == 403 || status == 429:
		return errorClassPolicy
	case code == errNotCached.code:
		return errorClassCaller
	case status == 502 || status == 504:
		return errorClassProvider
	case status >= 500:
		return errorClassProxy
	}
	return errorClassCaller
}

// truncatedErrorClass returns the class of an answer that was cut off.
func truncatedErrorClass(code string) errorClass {
	switch code {
	case "upstream_cut", "stream_unfinished", "answer_unfinished", "stream_idle", "upstream_timeout":
		return errorClassProvider
	case "client_stalled":
		return errorClassCaller
	case "draining", "ledger_unavailable", "store_unavailable":
		return errorClassProxy
	}
	return errorClassPolicy // revoked, expired, over a limit, or ended by an administrator
}

// The catalogue: every error that clients get, by who has to act. The values are shared and never change;
// an error whose text depends on the call is a function.

// The caller has to act: the request is wrong, or the client too slow.
var (
	errTwoCredentials = newError(400, "ambiguous_credentials", "The request has two different keys. Send one token.")
	errUpgrade        = newError(426, "upgrade_not_supported", "This proxy has no WebSockets. Send HTTP requests.")
	errUnexpectedBody = newError(400, "unexpected_body", "This endpoint takes no request body.")
	errRequestTooSlow = newError(400, "request_too_slow", "The request body arrived too slowly.")
	errRequestCut     = newError(400, "request_cut", "The request body ended early or was malformed.")
	errStreamHeader   = badRequest("invalid_value", "X-LLM-Proxy-Stream",
		"X-LLM-Proxy-Stream must be verified or plain.")
	errTwoCursors      = badRequest("invalid_value", "before_id", "Send after_id or before_id, not both.")
	errUnknownURL      = newError(404, "unknown_url", "There is nothing at this URL.")
	errUnknownEndpoint = newError(404, "unknown_endpoint", "This proxy does not support this endpoint.")
	errClientStalled   = newError(408, "client_stalled", "The client stopped reading the response.")
	errUploadTooLarge  = newError(413, "request_too_large", "The upload is larger than this proxy's limit.")
	errEncodedBody     = newError(415, "unsupported_encoding", "Send the request body without Content-Encoding.")
	errCharset         = newError(415, "unsupported_content_type", "Send JSON in UTF-8, not in another charset.")
	errNotCached       = &apiError{status: 504, code: "not_cached", noRetry: true,
		msg: "The cache has no answer to this request, and Cache-Control: only-if-cached allows no other."}
	errClientGone = newError(statusClientClosed, "client_gone", "") // for the ledger and the log only
)

// statusClientClosed is the status of a call whose client left before any answer. No client sees it.
const statusClientClosed = 499

func newError(status int, code, msg string) *apiError {
	return &apiError{status: status, code: code, msg: msg}
}

func badRequest(code, param, msg string) *apiError {
	return &apiError{status: 400, code: code, param: param, msg: msg}
}

// checkChoice returns an error unless the value of a parameter is one of those allowed.
func checkChoice(name, value string, allowed ...string) error {
	if slices.Contains(allowed, value) {
		return nil
	}
	return badRequest("invalid_value", name, name+" must be "+joinChoices(allowed)+".")
}

// joinChoices lists texts: "a, b or c".
func joinChoices(texts []string) string {
	last := len(texts) - 1
	return strings.Join(texts[:last], ", ") + " or " + texts[last]
}

// errRepeatedCredential is for a header or query parameter that occurs twice.
func errRepeatedCredential(what string) *apiError {
	return newError(400, "ambiguous_credentials", "The request has more than one "+what+".")
}

func errRepeatedHeader(header string) *apiError {
	return badRequest("ambiguous_header", header, "The request has more than one "+header+" header.")
}

// errAzureOnly is for a parameter that only Azure's upstreams know.
func errAzureOnly(param string) *apiError {
	return badRequest("invalid_request", param,
		"The query parameter "+param+" is for upstreams of the provider azure only. The call would go to another one.")
}

func errPageSize(param string, most int) *apiError {
	return badRequest("invalid_value", param, param+" must be from 1 to "+strconv.Itoa(most)+".")
}

func errUnknownCursor(param string) *apiError {
	return badRequest("invalid_value", param, param+" must be the id of a model in this list.")
}

// errBadToken has one body for unknown, malformed, expired and revoked tokens, so that a thief learns nothing.
// Only the ledger and the log get the reason.
func errBadToken(reason string) *apiError {
	return newError(401, "invalid_api_key", "Incorrect API key provided. "+
		"Use a token of this proxy (sk-llmp_...) that has not expired and is not revoked. "+
		"Management keys are for /manage only.").withCause(errors.New(reason))
}

// errProjectEnded says why a token of an inactive project is refused: all tokens of a deleted project are revoked.
func errProjectEnded(deleted bool) *apiError {
	if deleted {
		return errBadToken("revoked")
	}
	return errInactiveProject
}

func errMethodNotAllowed(allowed string) *apiError {
	return newError(405, "method_not_allowed", "This URL does not support the request's method. Use "+allowed+".")
}

func errBodyTooLarge(limit int64) *apiError {
	return newError(413, "request_too_large", "The request body is larger than the limit of "+formatSize(limit)+".")
}

func errContentType(want string) *apiError {
	return newError(415, "unsupported_content_type",
		"Send the request body as "+want+", and name that type in Content-Type.")
}

// An administrator has to act: a policy does not allow the call.
var (
	errInactiveProject  = newError(403, "project_inactive", "This token's project is inactive. Ask its administrator.")
	errStatefulEndpoint = newError(403, "endpoint_not_allowed",
		"This endpoint reads or changes objects stored at the provider. The project's policy does not allow that.")
	errOriginNotAllowed = newError(403, "origin_not_allowed",
		"Web pages of this origin may not call this proxy. The setting CORS_ORIGINS lists those that may.")
	errCutByAdmin = newError(403, "cut_by_administrator", "An administrator ended this call.")
	errNoUpstream = &apiError{status: 404, code: "no_upstream", noRetry: true,
		msg: "This project has no provider for this endpoint and model. Ask the proxy's administrator."}
)

// errAddressNotAllowed does not name the allowed networks, because a thief of the token would learn them. The address
// is "" if it is unknown.
func errAddressNotAllowed(address string) *apiError {
	from := "the address " + address
	if address == "" {
		from = "an unknown address: the reverse proxy in front of this one sent none that can be read"
	}
	return newError(403, "address_not_allowed",
		"This token may not be used from "+from+". Ask the proxy's administrator.")
}

func errStatefulField(param string) *apiError {
	return &apiError{status: 403, code: "endpoint_not_allowed", param: param, msg: "The field " + param +
		" refers to objects stored at the provider. The project's policy does not allow that."}
}

func errEndpointNotAllowed(allowed []string) *apiError {
	return newError(403, "endpoint_not_allowed",
		"This token may not use this endpoint. It may use: "+clip(strings.Join(allowed, ", "), 500)+".")
}

func errModelNotAllowed(allowed []string) *apiError {
	return &apiError{status: 403, code: "model_not_allowed", param: "model",
		msg: "This token may not use this model. It may use: " + clip(strings.Join(allowed, ", "), 500) + "."}
}

func errModelListNotAllowed(param string) *apiError {
	return &apiError{status: 403, code: "model_not_allowed", param: param,
		msg: "This token may use certain models only. Name one of them in model, and leave out " + param + "."}
}

// errCostUnbounded refuses a call to which a budget applies, because nobody knows what a field of it may cost.
func errCostUnbounded(limit, field string) *apiError {
	why := "it is not known what '" + field + "' may cost. " +
		"Leave it out, or ask the proxy's administrator to set the model's price for it."
	if field == "model" {
		why = "the model's price is not known. Use another model, or ask the proxy's administrator to set the price."
	}
	return &apiError{status: 403, code: "price_unknown", param: field, limit: limit,
		msg: "A budget of " + limit + " applies to this call, but " + why}
}

// A limit is reached: of the token, of its project or of the upstreams.

// maxRetryWait is the longest wait after which SDKs are asked to retry: some sleep for as long as the header says,
// others ignore it.
const maxRetryWait = 2 * time.Minute

// errRateLimited is for a limit that allows the call after wait. kind is what the limit counts, or "".
func errRateLimited(limit, kind, msg string, wait time.Duration) *apiError {
	return &apiError{status: 429, code: "rate_limit_exceeded", kind: kind, limit: limit,
		msg: msg + " Try again in " + describeDuration(wait) + ".", retryAfter: wait, noRetry: wait > maxRetryWait}
}

// errNeverFits is for a call that asks for more than the limit ever allows.
func errNeverFits(limit, kind, msg string) *apiError {
	return &apiError{status: 429, code: "rate_limit_exceeded", kind: kind, limit: limit, msg: msg, noRetry: true}
}

// errQuotaSpent is for a used-up limit of a day or longer, and for any limit that waiting does not help.
func errQuotaSpent(limit, msg string) *apiError {
	return &apiError{status: 429, code: "project_spend_limit_exceeded", kind: "insufficient_quota", limit: limit,
		msg: msg, noRetry: true}
}

func errUpstreamsAtCapacity(wait time.Duration) *apiError {
	return &apiError{status: 429, code: "rate_limit_exceeded", retryAfter: wait,
		msg: "This project's upstreams have reached their own limits for this minute."}
}

var errTokenBodyMemory = &apiError{status: 429, code: "body_memory_full", retryAfter: time.Second,
	msg: "This token's calls use too much memory for request bodies. Send fewer large requests at the same time."}

// The provider failed, was silent, or did not answer like an API. Another attempt may follow the timeouts of an
// attempt, so they are separate values.
var (
	errUpstreamUnreachable = newError(502, "upstream_unreachable",
		"The provider could not be reached, or closed the connection before it answered.")
	errModelList       = newError(502, "upstream_protocol_error", "The provider's list of models could not be read.")
	errConnectTimeout  = newError(504, "upstream_timeout", "The provider could not be reached in time.")
	errAttemptTimeout  = newError(504, "upstream_timeout", "The provider did not answer in time.")
	errUpstreamTimeout = newError(504, "upstream_timeout", "The provider did not answer in time.")
	errStreamIdle      = newError(504, "stream_idle", "The provider's answer paused for too long.")
)

// errUpstreamAuth replaces the provider's answer, which may quote the key.
func errUpstreamAuth(status int) *apiError {
	return &apiError{status: 502, code: "upstream_auth_error", noRetry: true, cause: errProviderStatus(status),
		msg: "The provider refused this project's key. Ask the proxy's administrator."}
}

func errUpstreamProtocol(status int) *apiError {
	return &apiError{status: 502, code: "upstream_protocol_error", noRetry: true, cause: errProviderStatus(status),
		msg: "The provider did not answer like an API. Ask the proxy's administrator to check the base URL."}
}

// errUpstreamStatus stands for a provider's error that is not JSON, where only an event can be sent.
func errUpstreamStatus(status int) *apiError {
	return &apiError{status: status, code: "upstream_error", cause: errProviderStatus(status),
		msg: "The provider answered with status " + strconv.Itoa(status) + "."}
}

func errProviderStatus(status int) error { return fmt.Errorf("the provider answered %d", status) }

func errStreamTooLarge(limit int64) *apiError {
	return &apiError{status: 502, code: "stream_too_large", noRetry: true, msg: "The stream is larger than the " +
		formatSize(limit) + " that the proxy can hold back. Ask for it with X-LLM-Proxy-Stream: plain."}
}

// The proxy itself failed: 503 with Retry-After (500 for an internal error), and never 401, because the token may
// be valid.

func errUnavailable(code, msg string, cause error) *apiError {
	return &apiError{status: 503, code: code, kind: "service_unavailable_error",
		msg: msg + " Try again shortly.", retryAfter: time.Second, cause: cause}
}

func errStoreUnavailable(cause error) *apiError {
	return errUnavailable("store_unavailable", "The proxy cannot use its database at the moment.", cause)
}

func errLedgerUnavailable(cause error) *apiError {
	return errUnavailable("ledger_unavailable", "The proxy cannot record calls at the moment.", cause)
}

func errLimitsUnavailable(cause error) *apiError {
	return errUnavailable("limits_unavailable", "The proxy cannot check limits at the moment.", cause)
}

func errUpstreamKeyUnreadable(cause error) *apiError {
	return errUnavailable("upstream_key_unreadable", "The proxy cannot read this project's provider key.", cause)
}

var (
	errBodyMemoryFull = errUnavailable("body_memory_full", "The proxy's memory for request bodies is used up.",
		errors.New("BODY_MEMORY is used up"))
	errTooManyCalls = errUnavailable("too_many_calls", "The proxy is handling as many calls as it can.",
		errors.New("MAX_CONCURRENT_CALLS are running"))
	errDraining = errUnavailable("draining", "The proxy is shutting down.", errors.New("shutting down"))
)

func errInternal(cause error) *apiError {
	return newError(500, "internal_error",
		"Internal error. The proxy's log has details under this request's id.").withCause(cause)
}

// Errors that only /manage and /admin have.
var (
	errUnknownHost = newError(421, "unknown_host", "Unknown host name. Set PUBLIC_URL to the one in use.")
	errCrossOrigin = newError(403, "cross_origin", "The request comes from a page of another site.")
	errManageKey   = newError(401, "invalid_management_key",
		"A valid management key is needed: Authorization: Bearer <key>. Tokens are for /v1 only.")
	errObjectNotFound = newError(404, "not_found", "No such object exists, or it was deleted.")
	errStaleVersion   = newError(412, "stale_version", "It has changed since it was read. Read it again, then retry.")
	errNameTaken      = badRequest("name_taken", "name", "This name is already in use.")
	errTooManyReports = errUnavailable("too_many_reports", "Other reports on sessions, end users or tags are running.",
		errors.New("as many reports on attributes are running as may"))
	errAuditTooLong = newError(503, "too_long", "The audit trail is too long. Use llm-proxy audit verify.")
)

func errRoleTooLow(need, have role) *apiError {
	return newError(403, "role_too_low",
		"This needs the role "+string(need)+"; the key in use has the role "+string(have)+".")
}

func errTooManyFailures(wait time.Duration) *apiError {
	return &apiError{status: 429, code: "too_many_failures", retryAfter: wait,
		msg: "Too many wrong management keys from this address. Try again later."}
}

// A bodyError says why a body is refused. msg is for the client; param is the field at fault, or "".
type bodyError struct{ param, msg string }

func (e *bodyError) Error() string { return e.msg }
