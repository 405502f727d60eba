// This file judges a provider's failed answer: whose fault it is, how long to wait, and whether another attempt may
// help. It decides by the status, the headers and the first bytes of the body, which may be an error despite status
// 200, and does nothing about it: proxy_attempts.go acts on the result. Plain code: no network, no state; the time is
// an argument.
package main

import (
	"bytes"
	"encoding/json"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

const maxPeekBytes = 16 << 10 // bytes of an answer that are read to judge it

// A faultKind says whose fault a failed answer is, and so what has to change before a call can succeed.
type faultKind uint8

const (
	faultNone     faultKind = iota // the answer is good
	faultRequest                   // the client's request: every upstream would refuse it
	faultTooLong                   // the request is too long for its model: another model may take it
	faultCall                      // this key cannot serve this call; other calls may succeed
	faultModel                     // the provider does not give this key the model
	faultRate                      // the key has reached a rate limit
	faultQuota                     // the key's account has no credit left
	faultKey                       // the provider refuses the key
	faultProvider                  // the provider is in trouble, or does not answer like an API
)

// isPrivate reports whether the fault is about the key or its account, which says nothing to the client.
func (k faultKind) isPrivate() bool { return k == faultKey || k == faultQuota }

// A fault is the judgment of one answer.
type fault struct {
	kind      faultKind
	status    int    // of the answer; of an error that came with status 200, the one it should have had
	waitMS    int64  // how long the provider asks to wait; 0: it does not say
	momentary bool   // the same key may answer if it is asked again at once
	reason    string // for the attempt log
	health    string // for the health of the key; "": the key is not affected
}

// judgeStatus judges an answer by its status. get returns a header's value, text is the beginning of the
// body.
//
// Only a provider's own codes, and words at the start of its message, can take a key out of use. Messages quote
// what the client has sent, and one client must not be able to pause a key for all others. The words of a call
// that is too long may be anywhere: they only concern the call itself.
func judgeStatus(status int, get func(string) string, text []byte, now time.Time) fault {
	switch {
	case status < 200 || status >= 300 && status < 400:
		return fault{kind: faultProvider, status: status, reason: "not an API answer",
			health: "the provider does not answer like an API"}
	case status < 400:
		return fault{}
	}
	e := parseProviderError(text)
	return e.judge(status, retryHint(get, now))
}

// judgeEmbedded judges an error that came with status 200, as the same error with a status would be. waitMS is how
// long the headers ask to wait.
func judgeEmbedded(body []byte, waitMS int64) fault {
	e := parseProviderError(body)
	f := e.judge(e.impliedStatus(), waitMS)
	if f.kind == faultProvider {
		f.reason, f.health = errorInAnswer, "the provider answers 200 with an error"
	}
	return f
}

const errorInAnswer = "sent an error with status 200"

// impliedStatus returns the status that an error should have had: the one that it names, or the one that its codes
// and words stand for; 500 if they do not say.
func (e *providerError) impliedStatus() int {
	trouble := e.accountTrouble()
	switch {
	case e.status != 0:
		return e.status
	case trouble == quotaTrouble || e.isRateLimit() || e.begins("rate limit", "too many requests"):
		return 429
	case trouble != noTrouble || e.isTooLong(400) || e.isRefusedContent():
		return 400
	case e.hasCode("server_error", "api_error", "internal_error", "internal_server_error", "internal", "unavailable",
		"service_unavailable", "overloaded", "overloaded_error", "engine_overloaded", "timeout", "timeout_error",
		"deadline_exceeded", "vector_store_timeout", "unknown", "unknown_error"):
		return 500
	case e.hasCode("permission_error", "permission_denied"):
		return 403
	case e.hasCode("not_found_error", "not_found") || e.lacksModel(404):
		return 404
	case slices.ContainsFunc(e.codes, isRequestCode):
		return 400
	}
	return 500
}

// isRequestCode reports whether a code, in lower case, says that the request is wrong.
func isRequestCode(code string) bool {
	switch code {
	case "bad_request", "bad_request_error", "badrequesterror", "validation_error", "failed_precondition",
		"out_of_range", "request_too_large", "string_above_max_length", "unprocessable_entity", "empty_image_file",
		"failed_to_download_image":
		return true
	case "invalid_response", "invalid_response_error":
		return false
	}
	return strings.HasPrefix(code, "invalid_") || strings.HasPrefix(code, "unsupported_") ||
		strings.HasPrefix(code, "image_")
}

// needsText reports whether the text of an error with this status can say something about the key. Such errors are
// read before they pass on; others only if another upstream may answer instead.
func needsText(status int) bool {
	return status == 400 || status == 403 || status == 404 || status == 429
}

// judge judges an error that came with a status. waitMS is how long the headers ask to wait.
func (e *providerError) judge(status int, waitMS int64) fault {
	code := strconv.Itoa(status)
	f := fault{status: status}
	if waitMS == 0 && (status == 429 || status >= 500) {
		waitMS = e.waitMS
	}
	account := noTrouble
	if status < 500 {
		account = e.accountTrouble()
	}
	if account == quotaTrouble && (status != 429 || waitMS == 0 || waitMS == cooldownMax) {
		account = creditTrouble // otherwise the quota is one of some minutes
	}
	switch {
	case account == creditTrouble || status == 402 && account != keyTrouble:
		f.kind, f.reason = faultQuota, "exhausted"
		f.health = "the account has no credit left: the provider answers " + code
	case account == keyTrouble:
		f.kind, f.reason, f.health = faultKey, "key refused", "the provider refuses the key: "+code
	case e.isTooLong(status):
		f.kind, f.reason = faultTooLong, "too long for the model"
	case e.isTooLargeForKey():
		f.kind, f.reason = faultCall, "too large for the limits of this key"
	case e.isRefusedContent():
		f.kind, f.reason = faultRequest, "content refused"
	case status == 429 || status < 500 && e.isRateLimit():
		f.kind, f.waitMS, f.reason = faultRate, waitMS, "rate limited"
		f.health = "the provider answers " + code + ": too many requests"
	case status >= 500 && status != 501:
		f.kind, f.waitMS, f.momentary, f.reason = faultProvider, waitMS, waitMS == 0, "server error"
		f.health = "the provider answers " + code
	case e.lacksScope():
		f.kind, f.reason = faultCall, "not permitted to this key"
	case status == 401:
		f.kind, f.reason, f.health = faultKey, "key refused", "the provider refuses the key: "+code
	case e.lacksModel(status):
		f.kind, f.reason, f.health = faultModel, "does not know the model", "the provider answers "+code
		if status == 403 {
			f.reason = "does not give the key the model"
		}
	case status == 403 && len(e.messages) == 0 && !e.isPage:
		f.kind, f.reason, f.health = faultKey, "key refused", "the provider refuses the key: "+code
	case status == 403: // a page of a firewall, which may have disliked the text of one client's call
		f.kind, f.reason = faultCall, "call refused"
	default:
		f.kind, f.reason = faultRequest, "request refused"
	}
	return f
}

// An providerError is what the body of an error says, in lower case.
type providerError struct {
	status   int      // an HTTP status in the body; 0: none
	codes    []string // codes, types and reasons: the provider's own words
	messages []string // may quote what the client has sent
	waitMS   int64    // how long it asks to wait
	isPage   bool     // it is an HTML page
}

const (
	maxErrorDepth = 8
	maxErrorParts = 16 // codes and messages each
)

// parseProviderError reads the body of an error in the shape of any provider. It reads only the members that hold
// the provider's words, never a part of a request that a provider sends back.
func parseProviderError(body []byte) (e providerError) {
	var v any
	if json.Unmarshal(body, &v) != nil {
		text := strings.TrimSpace(string(body))
		if e.isPage = strings.HasPrefix(text, "<"); !e.isPage {
			e.addMessage(text, 0)
		}
		return e
	}
	e.read(v, 0)
	return e
}

// read reads an error, or what contains one.
func (e *providerError) read(v any, depth int) {
	if depth > maxErrorDepth {
		return
	}
	switch v := v.(type) {
	case string:
		e.addMessage(v, depth)
	case []any:
		for _, part := range v[:min(len(v), maxErrorParts)] {
			e.read(part, depth+1)
		}
	case map[string]any:
		for _, name := range [...]string{
			"code", "type", "status", "reason", "error_code", "error_type", "statusCode", "status_code", "__type"} {
			e.addCode(v[name])
		}
		for _, name := range [...]string{"message", "Message", "msg", "detail", "error", "error_description",
			"error_msg", "error_message", "errorMessage", "status_msg"} {
			e.read(v[name], depth+1)
		}
		for _, name := range [...]string{"innererror", "details", "errors", "base_resp"} {
			if _, isText := v[name].(string); !isText {
				e.read(v[name], depth+1)
			}
		}
		if response, ok := v["response"].(map[string]any); ok && depth == 0 { // of the event response.failed
			e.read(response["error"], depth+1)
		}
		if choices, ok := v["choices"].([]any); ok && depth == 0 && len(choices) > 0 { // OpenRouter
			if choice, ok := choices[0].(map[string]any); ok {
				e.read(choice["error"], depth+1)
			}
		}
		if delay, ok := v["retryDelay"].(string); ok { // google.rpc.RetryInfo
			ms, _ := durationMS(delay)
			e.waitMS = boundedMS(ms)
		}
		if meta, ok := v["metadata"].(map[string]any); ok && depth > 0 { // OpenRouter: the error that it was given
			e.read(meta["raw"], depth+1)
			if reasons, ok := meta["reasons"].([]any); ok && len(reasons) > 0 {
				e.codes = append(e.codes, "content_filter")
			}
		}
	}
}

// addCode adds a code, a type, a reason, or a status as a number.
func (e *providerError) addCode(v any) {
	switch v := v.(type) {
	case float64:
		if v >= 400 && v < 600 && e.status == 0 {
			e.status = int(v)
		}
	case string:
		if n, err := strconv.Atoi(v); err == nil {
			e.addCode(float64(n))
		} else if len(e.codes) < maxErrorParts {
			e.codes = append(e.codes, strings.ToLower(v))
		}
	}
}

// addMessage adds a message. One that is an error as JSON is read as that.
func (e *providerError) addMessage(text string, depth int) {
	text = strings.TrimSpace(text)
	if strings.HasPrefix(text, "{") {
		var v map[string]any
		if json.Unmarshal([]byte(text), &v) == nil {
			e.read(v, depth+1)
			return
		}
	}
	if text == "" || len(e.messages) == maxErrorParts {
		return
	}
	text = strings.ToLower(text)
	for _, before := range [...]string{"try again in ", "retry after ", "retry in ", "try again after "} {
		if _, hint, ok := strings.Cut(text, before); ok && e.waitMS == 0 {
			ms, _ := durationMS(hint)
			e.waitMS = boundedMS(ms)
		}
	}
	for _, label := range [...]string{"error: ", "error code: ", "bad request: "} {
		text = strings.TrimPrefix(text, label)
	}
	e.messages = append(e.messages, text)
}

// hasCode reports whether one of the codes is in list.
func (e *providerError) hasCode(list ...string) bool {
	return slices.ContainsFunc(e.codes, func(code string) bool { return slices.Contains(list, code) })
}

// begins reports whether a message begins with one of the texts in list.
func (e *providerError) begins(list ...string) bool {
	return slices.ContainsFunc(e.messages, func(message string) bool {
		return slices.ContainsFunc(list, func(text string) bool { return strings.HasPrefix(message, text) })
	})
}

// mentions reports whether a message contains one of the texts in list. It may be in what the client has sent.
func (e *providerError) mentions(list ...string) bool {
	return slices.ContainsFunc(e.messages, func(message string) bool {
		return slices.ContainsFunc(list, func(text string) bool { return strings.Contains(message, text) })
	})
}

// What accountTrouble finds.
type accountTrouble uint8

const (
	noTrouble     accountTrouble = iota
	quotaTrouble                 // a quota is used up, for a minute or until someone pays
	creditTrouble                // there is no credit left
	keyTrouble                   // the key or its account is refused
)

// accountTrouble reports whether an error is about the key or its account, whatever its status.
func (e *providerError) accountTrouble() accountTrouble {
	switch {
	case e.hasCode("billing_not_active", "billing_hard_limit_reached", "billing_error", "billing_disabled",
		"insufficient_balance", "insufficient_credits", "insufficient_funds", "credit_balance_too_low", "arrearage",
		"payment_required", "usage_limit_reached", "spend_limit_exceeded"),
		e.begins("your credit balance is too low", "credit balance is too low", "credit balance too low",
			"you have reached your specified", "you have reached your api usage limit",
			"you have reached your usage limit", "you have reached your monthly", "usage limit reached",
			"usage limits reached", "api usage limit", "monthly usage limit", "monthly spending limit",
			"spending limit", "billing hard limit", "billing not active", "billing is not active",
			"billing has not been enabled",
			"this api method requires billing", "your account is not active", "your account balance",
			"account balance", "insufficient balance", "insufficient credit", "insufficient funds",
			"insufficient account balance", "your prepayment credits", "your newly created team",
			"your team has either used all", "you have run out of credit", "you have no credit", "out of credits",
			"not enough credits", "this account has no credit"):
		return creditTrouble
	case e.hasCode("insufficient_quota", "insufficient_user_quota", "exceeded_current_quota_error", "quota_exceeded",
		"quota_exhausted"),
		e.begins("you exceeded your current quota", "you have exceeded your current quota",
			"you have exceeded your monthly", "your quota", "insufficient quota"):
		return quotaTrouble
	case e.hasCode("invalid_api_key", "api_key_invalid", "api_key_expired", "expired_api_key", "invalid_key",
		"key_disabled", "api_key_service_blocked", "api_key_ip_address_blocked", "api_key_http_referrer_blocked",
		"service_disabled", "consumer_suspended", "consumer_invalid", "authentication_error",
		"invalid_authentication", "invalid_authentication_error", "unauthenticated", "user_deactivated",
		"account_deactivated", "account_disabled", "account_suspended", "organization_deactivated",
		"organization_disabled", "organization_restricted"),
		e.begins("incorrect api key", "invalid api key", "invalid api-key", "invalid x-api-key", "api key not valid",
			"api key expired", "api key not found", "api key has", "api key is", "your api key has", "your api key is",
			"your api key was", "this api key", "the api key", "the provided api key", "invalid authentication",
			"authentication fails", "your account has been", "your account is suspended", "your account is disabled",
			"your account was", "account has been", "account suspended", "account deactivated",
			"this organization has been", "your organization has been", "organization has been",
			"access denied, please make sure your account"):
		return keyTrouble
	}
	return noTrouble
}

// isTooLong reports whether an error means that the call is too long for the model. OpenAI has a code for that;
// others only say so in the message.
func (e *providerError) isTooLong(status int) bool {
	if e.hasCode("context_length_exceeded", "context_window_exceeded", "model_context_window_exceeded",
		"exceed_context_size_error", "context_limit_exceeded", "tokens_limit_reached", "token_limit_exceeded",
		"input_too_long", "prompt_too_long", "max_prompt_tokens_exceeded") {
		return true
	}
	switch status {
	case 401, 402, 403, 404, 429:
		return false
	}
	return slices.ContainsFunc(e.messages, saysTooLong)
}

// saysTooLong reports whether a message, in lower case, says that the input is too long for a model. It does not
// mean a field that is too long, or too many output tokens asked for.
func saysTooLong(text string) bool {
	has := func(words ...string) bool {
		return slices.ContainsFunc(words, func(word string) bool { return strings.Contains(text, word) })
	}
	beyond := has("exceed", "too long", "too large", "longer than", "greater than", "larger than", "overflow",
		"at most", "too many", "more than", "over the", "beyond", "maximum", "supports up to", "must be",
		"must have", "should be")
	tokens := has("token", "context")
	switch {
	case has("string too long") || strings.HasPrefix(strings.TrimLeft(text, "`'\""), "max_"):
		return strings.Contains(text, "context l") // max_tokens beside an input that fills the context
	case has("context length", "context window", "context size", "context limit", "maximum prompt length",
		"max prompt length", "maximum model length", "max_model_len", "max_new_tokens` must be",
		"range of input length") && beyond:
		return true
	case has("prompt is too long", "prompt too long", "input is too long", "input too long", "inputs are too long",
		"request is too long", "messages are too long", "conversation is too long", "prompt exceeds max",
		"prompt tokens too long", "reduce the length of the messages", "reduce the length of the prompt",
		"reduce the length of your", "reduce your prompt", "shorten your prompt", "shorten your input",
		"message you submitted was too long"):
		return true
	case tokens && beyond && has("input token count", "token count", "input tokens", "prompt tokens",
		"number of tokens in the prompt", "model token limit", "total number of tokens", "too many tokens",
		"`inputs` must have", "`inputs` tokens", "max size", "tokens in request", "total tokens"),
		tokens && has("supports a maximum of") && has("provided", "prompt", "input"),
		beyond && has("input length", "prompt length", "total length of messages"):
		return true
	}
	return false
}

// isTooLargeForKey reports whether a call is larger than the key's rate limit itself: it would never pass.
func (e *providerError) isTooLargeForKey() bool { return e.begins("request too large for") }

// isRefusedContent reports whether a filter refuses the content of the call.
func (e *providerError) isRefusedContent() bool {
	return e.hasCode("content_filter", "content_filtered", "content_policy_violation",
		"image_content_policy_violation", "responsibleaipolicyviolation", "moderation_blocked",
		"data_inspection_failed", "datainspectionfailed", "invalid_prompt", "prohibited_content", "safety_violation")
}

// isRateLimit reports whether an error with another status than 429 is one of a rate limit.
func (e *providerError) isRateLimit() bool {
	return e.hasCode("rate_limit_exceeded", "rate_limit_error", "rate_limit_reached", "rate_limit_reached_error",
		"ratelimitexceeded", "userratelimitexceeded", "resource_exhausted", "too_many_requests", "throttling",
		"throttlingexception", "throttling.ratequota", "throttling.allocationquota", "capacity_exceeded")
}

// lacksScope reports whether the key is not permitted to make calls of this kind.
func (e *providerError) lacksScope() bool {
	return e.begins("you have insufficient permissions for this operation", "missing scopes") ||
		e.hasCode("insufficient_scope", "missing_scope", "access_token_scope_insufficient")
}

// lacksModel reports whether the provider does not give this key the model, or does not serve this place.
func (e *providerError) lacksModel(status int) bool {
	if e.hasCode("model_not_found", "model_not_available", "invalid_model", "model_not_active", "model_not_supported",
		"model_decommissioned", "model_terms_required", "deploymentnotfound", "deployment_not_found",
		"unsupported_country_region_territory") || e.begins("user location is not supported") {
		return true
	}
	if status == 403 {
		return e.hasCode("permission_error", "permission_denied") || e.mentions("model", "country, region")
	}
	return slices.ContainsFunc(e.messages, saysNoModel) ||
		status == 404 && e.hasCode("not_found_error") && e.begins("model: ")
}

// saysNoModel reports whether a message, in lower case, begins by saying that a model does not exist.
func saysNoModel(text string) bool {
	for _, start := range [...]string{"the requested ", "the ", "this ", "publisher ", "api ", "your "} {
		text = strings.TrimPrefix(text, start)
	}
	rest, ok := "", false
	for _, word := range [...]string{"models/", "model", "deployment"} {
		if rest, ok = strings.CutPrefix(text, word); ok {
			break
		}
	}
	if !ok {
		return strings.HasPrefix(text, "unknown model") || strings.HasPrefix(text, "invalid model") ||
			strings.HasPrefix(text, "no such model") || strings.HasPrefix(text, "no endpoints found for")
	}
	absent := func(s string) bool {
		for _, start := range [...]string{"is ", "was ", "has been ", "for this resource ", "does ", "do ", "you ",
			"could "} {
			s = strings.TrimPrefix(s, start)
		}
		return slices.ContainsFunc([]string{"not exist", "not found", "not available", "not be found", "not supported",
			"not have access", "requested is not", "decommissioned", "deprecated", "retired", "unavailable",
			"no longer available", "unknown"}, func(word string) bool { return strings.HasPrefix(s, word) })
	}
	rest = strings.TrimLeft(rest, ": ")
	if absent(rest) {
		return true
	}
	end := " "
	if len(rest) > 0 && strings.Contains("`'\"", rest[:1]) {
		end, rest = rest[:1], rest[1:]
	}
	_, rest, _ = strings.Cut(rest, end)
	return absent(strings.TrimLeft(rest, " "))
}

// An answerCheck looks at the beginning of an answer with status 200 that could still be replaced by another
// upstream's. Its result is problem and errorText; without both, the answer has begun well.
//
// A stream is checked up to its first event that belongs to an answer. A JSON document is checked as a whole up to
// maxPeekBytes: nobody can use a part of it. White space before it passes at once: providers send it to keep
// connections open. Anything else is checked by its first bytes. scan has to be reset before the first use.
type answerCheck struct {
	problem   string // not "": the answer cannot be used
	errorText []byte // not nil: the answer is this error

	kind        meterKind
	declaredSSE bool
	format      answerFormat
	events      sseEvents
	scan        usageScanner
}

// feed reads the next bytes of the answer; all are those so far, including them. It reports whether the check is
// over. Otherwise the answer needs more bytes, or end.
func (c *answerCheck) feed(next, all []byte) (done bool) {
	if c.format == formatUnknown {
		if next = bytes.TrimLeft(all, " \t\r\n\xef\xbb\xbf"); len(next) == 0 {
			return !c.declaredSSE && len(all) > 0 // white space passes
		}
		if c.format = formatOf(next, c.declaredSSE); c.format == formatUnknown {
			return false
		}
	}
	switch c.format {
	case formatSSE:
		return c.feedEvents(next) || len(all) >= maxEventBytes
	case formatJSON:
		return c.feedDocument(next, all)
	}
	if isPage(next, c.kind) {
		c.problem = htmlPage
	}
	return true
}

// end reads the end of an answer whose check was not over.
func (c *answerCheck) end(all []byte) {
	switch {
	case c.format == formatSSE || c.format == formatUnknown && c.declaredSSE:
		c.problem = noFirstEvent
	case c.format == formatJSON && c.saysError():
		c.errorText = all
	case c.format == formatJSON && c.scan.state != scanClosed && c.scan.state != scanBroken:
		c.problem = unfinished
	case c.format == formatUnknown && c.kind != meterTranscripts: // silence has an empty transcript
		c.problem = noAnswer
	}
}

// feedEvents reads events until one belongs to an answer, and reports whether it found it.
func (c *answerCheck) feedEvents(next []byte) (done bool) {
	c.events.feed(next)
	for data, ok := c.events.nextData(); ok; data, ok = c.events.nextData() {
		if string(bytes.TrimSpace(data)) == "[DONE]" {
			c.problem = noFirstEvent
			return true
		}
		switch e := parseStreamEvent(c.events.eventName(), data); {
		case e.isIdle:
			continue
		case e.isError:
			c.errorText = data
		case e.isBroken:
			c.problem = notJSON
		}
		return true
	}
	return false
}

// feedDocument reads a JSON document, and reports whether it is complete or too large to be read to its end.
func (c *answerCheck) feedDocument(next, all []byte) (done bool) {
	for len(next) > 0 && c.scan.state != scanClosed && c.scan.state != scanBroken {
		next = next[c.scan.feed(next):]
	}
	switch {
	case c.saysError() && len(all) >= maxEventBytes:
		c.errorText = all
		return true
	case c.saysError(): // its text matters, and whether it is complete
		return false
	}
	return c.scan.state == scanClosed || c.scan.state == scanBroken || len(all) >= maxPeekBytes
}

func (c *answerCheck) saysError() bool { return c.scan.saysError() || c.scan.statusFailed }

// isPage reports whether an answer that begins with p is an HTML page instead of what is due. Only a transcript
// or a medium may begin with an angle bracket.
func isPage(p []byte, kind meterKind) bool {
	if kind != meterTranscripts && kind != meterMedia && kind != meterNone {
		return p[0] == '<'
	}
	text := strings.ToLower(string(p[:min(len(p), 16)]))
	return strings.HasPrefix(text, "<!doctype html") || strings.HasPrefix(text, "<html")
}

// retryHint returns how many milliseconds the headers of an answer ask to wait, at most cooldownMax. It returns 0
// if they do not say, or not in a form that is understood. get returns a header's value.
func retryHint(get func(string) string, now time.Time) int64 {
	for _, name := range [...]string{"Retry-After-Ms", "X-Ms-Retry-After-Ms"} {
		if ms, err := strconv.ParseFloat(strings.TrimSpace(get(name)), 64); err == nil && ms > 0 {
			return boundedMS(ms)
		}
	}
	if ms := parseWait(get("Retry-After"), now); ms > 0 {
		return ms
	}
	var most int64
	for _, kind := range [...]string{"Requests", "Tokens", "Input-Tokens", "Output-Tokens", "Requests-Minute",
		"Tokens-Minute", "Requests-Day", "Tokens-Day", "Project-Requests", "Project-Tokens"} {
		if isUsedUp(get("X-Ratelimit-Remaining-" + kind)) {
			most = max(most, parseWait(get("X-Ratelimit-Reset-"+kind), now))
		}
		if isUsedUp(get("Anthropic-Ratelimit-" + kind + "-Remaining")) {
			most = max(most, parseWait(get("Anthropic-Ratelimit-"+kind+"-Reset"), now))
		}
	}
	for _, prefix := range [...]string{"X-Ratelimit-", "Ratelimit-"} {
		if remaining := get(prefix + "Remaining"); most == 0 && (remaining == "" || isUsedUp(remaining)) {
			most = parseWait(get(prefix+"Reset"), now)
		}
	}
	return most
}

// isUsedUp reports whether the value of a header says that nothing is left.
func isUsedUp(remaining string) bool {
	n, err := strconv.ParseFloat(strings.TrimSpace(remaining), 64)
	return err == nil && n <= 0
}

// parseWait returns how many milliseconds a value asks to wait: seconds, a unix time in seconds or milliseconds, a
// duration such as 6m0s or 12ms, a date, or a list of these, of which the longest counts.
func parseWait(v string, now time.Time) int64 {
	v = strings.TrimSpace(v)
	if n, err := strconv.ParseFloat(v, 64); err == nil {
		switch ms := float64(now.UnixMilli()); {
		case n > 1e11:
			return boundedMS(n - ms)
		case n > 1e9:
			return boundedMS(n*1000 - ms)
		}
		return boundedMS(n * 1000)
	}
	if ms, rest := durationMS(v); rest == "" {
		return boundedMS(ms)
	}
	for _, layout := range [...]string{
		time.RFC1123, time.RFC1123Z, time.RFC850, time.ANSIC, time.RFC3339Nano, "2006-01-02 15:04:05Z07:00",
		"2006-01-02T15:04:05", time.DateTime} {
		if t, err := time.Parse(layout, v); err == nil {
			return boundedMS(float64(t.Sub(now).Milliseconds()))
		}
	}
	var most int64
	if first, others, isList := strings.Cut(v, ","); isList {
		most = max(parseWait(first, now), parseWait(others, now))
	}
	return most
}

// boundedMS rounds up to whole milliseconds, from 0 to cooldownMax.
func boundedMS(ms float64) int64 {
	if math.IsNaN(ms) || ms <= 0 {
		return 0
	}
	return int64(math.Ceil(min(ms, cooldownMax)))
}

// refusesUsage reports whether an error is about stream_options, which the proxy adds to the body of a stream, or
// about a field that it does not name. Whatever the wording, the client did not send that field.
func refusesUsage(status int, body []byte) bool {
	switch status {
	case 401, 402, 403, 429:
		return false
	}
	letters := string(bytes.Map(func(c rune) rune { // "Stream options", "streamOptions" and "stream_options" are one
		switch {
		case c >= 'A' && c <= 'Z':
			return c | 0x20
		case c >= 'a' && c <= 'z':
			return c
		}
		return -1
	}, body))
	if strings.Contains(letters, "streamoptions") || strings.Contains(letters, "includeusage") {
		return true
	}
	var e struct{ Error struct{ Param any } }
	_ = json.Unmarshal(body, &e)
	if status != 400 && status != 422 || e.Error.Param != nil && e.Error.Param != "" {
		return false
	}
	for _, words := range [...]string{"extrainput", "extrafield", "extraforbidden", "unknownfield", "unknownparameter",
		"unknownargument", "unrecognizedrequestargument", "unrecognizedfield", "unrecognizedparameter",
		"unexpectedfield", "unexpectedparameter", "unsupportedfield", "unsupportedparameter", "additionalproperties"} {
		if strings.Contains(letters, words) {
			return true
		}
	}
	return false
}
