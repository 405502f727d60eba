// This room holds what clients are told when something fails: the errors, their
// shapes and the one function that writes them. err.Error() never reaches a
// client; only the log sees a cause.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// An apiError is a failure as its receiver is told it. cause is for the log.
type apiError struct {
	status     int
	code       string
	kind       string // OpenAI's "type"; "" for what goes with the status
	param      string
	msg        string
	retryAfter time.Duration // 0: no Retry-After
	noRetry    bool          // tells SDKs not to try again although the status says so
	limit      string        // the limit that refused, in words, for ledger and log
	cause      error
}

func (e *apiError) Error() string {
	if e.cause != nil {
		return fmt.Sprintf("%d %s: %v", e.status, e.code, e.cause)
	}
	return fmt.Sprintf("%d %s", e.status, e.code)
}

func (e *apiError) Unwrap() error { return e.cause }

// recordCode is what ledger and log say about the failure: the code, but of a
// bad token which of the reasons it was, for the operator alone.
func (e *apiError) recordCode() string {
	if e.status == http.StatusUnauthorized && e.cause != nil {
		return e.cause.Error()
	}
	return e.code
}

// errorType returns OpenAI's "type" for a status (wire.md: what SDKs see).
func (e *apiError) errorType() string {
	switch {
	case e.kind != "":
		return e.kind
	case e.status == http.StatusTooManyRequests:
		return "rate_limit_error"
	case e.status == http.StatusForbidden:
		return "permission_error"
	case e.status >= 500:
		return "server_error"
	}
	return "invalid_request_error"
}

// anthropicType returns Anthropic's "type" for a status.
func (e *apiError) anthropicType() string {
	switch e.status {
	case http.StatusUnauthorized:
		return "authentication_error"
	case http.StatusForbidden:
		return "permission_error"
	case http.StatusNotFound:
		return "not_found_error"
	case http.StatusRequestEntityTooLarge:
		return "request_too_large"
	case http.StatusTooManyRequests:
		return "rate_limit_error"
	case http.StatusServiceUnavailable:
		return "overloaded_error"
	}
	if e.status >= 500 {
		return "api_error"
	}
	return "invalid_request_error"
}

// asAPIError returns err as an apiError. What is none is a mistake of ours: 500.
func asAPIError(err error) *apiError {
	if e, ok := errors.AsType[*apiError](err); ok {
		return e
	}
	if e, ok := errors.AsType[*fieldError](err); ok {
		return &apiError{status: http.StatusBadRequest, code: "invalid_value", param: e.param, msg: fieldErrorMessage(e)}
	}
	return &apiError{status: http.StatusInternalServerError, code: "internal_error", msg: "Internal error. The log has it under this request's id.", cause: err}
}

func fieldErrorMessage(e *fieldError) string {
	if e.param == "" {
		return e.msg
	}
	return fmt.Sprintf("%s %s.", e.param, strings.TrimSuffix(e.msg, "."))
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

// responseBody is the failure as a client reads it. anthropic picks that provider's
// shape, which its SDKs read; it holds OpenAI's members too.
func (e *apiError) responseBody(anthropic bool) []byte {
	body := errorBody{Error: errorInner{Message: e.msg, Type: e.errorType()}}
	if e.param != "" {
		body.Error.Param = &e.param
	}
	if e.code != "" {
		body.Error.Code = &e.code
	}
	if anthropic {
		body.Type, body.Error.Type = "error", e.anthropicType()
	}
	b, err := json.Marshal(body)
	if err != nil { // cannot be: strings only
		b = []byte(`{"error":{"message":"Internal error.","type":"server_error","param":null,"code":"internal_error"}}`)
	}
	return append(b, '\n')
}

// writeError is the only writer of failures.
func writeError(w http.ResponseWriter, e *apiError, anthropic bool) {
	b := e.responseBody(anthropic)
	h := w.Header()
	if e.retryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64((e.retryAfter+time.Second-1)/time.Second), 10))
		h.Set("Retry-After-Ms", strconv.FormatInt(e.retryAfter.Milliseconds(), 10))
	}
	if e.noRetry {
		h.Set("X-Should-Retry", "false")
	}
	if e.code == "draining" {
		h.Set("Connection", "close") // over HTTP/2: no new call on this connection, so that a retry goes elsewhere
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(b)))
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(e.status)
	_, _ = w.Write(b) // a client that has gone needs no error
}

func errBadToken(cause string) *apiError {
	// One body for unknown, malformed, expired and revoked alike: a thief learns
	// nothing. The ledger and the log know which it was.
	return &apiError{status: http.StatusUnauthorized, code: "invalid_api_key",
		msg:   "Incorrect API key provided. Use a token of this proxy that is valid: not expired, not revoked.",
		cause: errors.New(cause)}
}

func errUnavailable(code string, cause error) *apiError {
	return &apiError{status: http.StatusServiceUnavailable, code: code, kind: "service_unavailable_error",
		msg: "The proxy cannot take this call now. Try again shortly.", retryAfter: time.Second, cause: cause}
}

func badRequest(code, param, msg string) *apiError {
	return &apiError{status: http.StatusBadRequest, code: code, param: param, msg: msg}
}

// An errorClass says who has to do something about a call that did not go well.
type errorClass string

const (
	errorClassNone     errorClass = ""         // it went well
	errorClassCaller   errorClass = "caller"   // the client sent what nobody can serve, or left
	errorClassPolicy   errorClass = "policy"   // an administrator's rule or limit
	errorClassProvider errorClass = "provider" // the provider failed, was silent or broke off
	errorClassProxy    errorClass = "proxy"    // this program, its database or its disk
)

// errorClass sorts a settled call. It goes by what the ledger knows of it, so that
// metrics, pages and a query over old rows say the same.
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
			return errorClassCaller // the provider judged the request
		}
		return errorClassProvider
	}
	return errorClassNone
}

func refusedErrorClass(status int, code string) errorClass {
	switch {
	case code == "no_upstream" || status == 403 || status == 429:
		return errorClassPolicy
	case status == 502 || status == 504:
		return errorClassProvider
	case status >= 500:
		return errorClassProxy
	}
	return errorClassCaller
}

// truncatedErrorClass sorts answers that broke off after they had begun, by why.
func truncatedErrorClass(code string) errorClass {
	switch code {
	case "upstream_cut", "stream_unfinished", "stream_idle", "upstream_timeout":
		return errorClassProvider
	case "client_stalled":
		return errorClassCaller
	case "draining", "ledger_unavailable", "store_unavailable":
		return errorClassProxy
	}
	return errorClassPolicy // revoked, expired, a limit, an administrator's cut
}

// writeTimeout is for a client to take an answer that is not a provider's, and
// for an HTTP/2 connection to take a byte.
const writeTimeout = time.Minute

func notFound(w http.ResponseWriter, r *http.Request) {
	writeError(w, &apiError{status: http.StatusNotFound, code: "unknown_url", msg: "There is nothing at this URL."}, false)
}
