// This file judges a provider's failed answer: whose fault it is, how long to wait, and whether another attempt may
// help. It decides by the status, the headers and the first bytes of the body, or by the events of a stream, and
// does nothing about it: proxy_attempts.go acts on the result. Plain code: no network, no state; the time is an
// argument.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

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
		for _, name := range [...]string{"message", "Message", "msg", "detail", "error", "error_description"} {
			e.read(v[name], depth+1)
		}
		for _, name := range [...]string{"innererror", "details", "errors"} {
			if _, isText := v[name].(string); !isText {
				e.read(v[name], depth+1)
			}
		}
		if delay, ok := v["retryDelay"].(string); ok { // google.rpc.RetryInfo
			e.waitMS, _ = durationMS(delay)
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
			e.waitMS, _ = durationMS(hint)
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
		"at most", "too many", "over the", "beyond", "maximum", "supports up to", "must be", "must have", "should be")
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
		"reduce the length of your", "reduce your prompt", "shorten your prompt", "shorten your input"):
		return true
	case tokens && beyond && has("input token count", "token count", "input tokens", "prompt tokens",
		"number of tokens in the prompt", "model token limit", "total number of tokens", "too many tokens",
		"input length", "prompt length", "`inputs` must have", "`inputs` tokens", "max size"):
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

// A streamError says why a stream cannot be used. None of it has reached the client.
type streamError struct{ problem string }

func (e *streamError) Error() string { return "the provider " + e.problem }

// A streamEvent is what one event shows about its stream.
type streamEvent struct {
	problem  string // not "": the event is an error and nothing else, or is not JSON
	retry    bool   // the answer failed for a reason that another attempt may not meet
	finished bool   // the event has a finish reason
}

const errorInStream = "sent an error in the stream"

// parseStreamEvent reads an event's data.
func parseStreamEvent(data []byte) (e streamEvent) {
	data = bytes.TrimSpace(data)
	if len(data) == 0 || string(data) == "[DONE]" {
		return e
	}
	var v struct {
		Type     any
		Error    json.RawMessage
		Response struct{ Error struct{ Code any } }
		Choices  []struct {
			FinishReason any `json:"finish_reason"`
		}
	}
	if _, ok := errors.AsType[*json.SyntaxError](json.Unmarshal(data, &v)); ok { // members of other types do not matter
		e.problem = "sent an event that is not JSON"
	} else if v.Type == "error" || len(v.Error) > 0 && hasError(data) {
		e.problem = errorInStream
	}
	code := v.Response.Error.Code // other codes are the call's own fault, and would come back
	e.retry = v.Type == "response.failed" && (code == "server_error" || code == "rate_limit_exceeded")
	for _, c := range v.Choices {
		e.finished = e.finished || c.FinishReason != nil
	}
	return e
}

// A streamCheck checks the events of a stream as they come.
type streamCheck struct {
	events   sseEvents
	finished bool // an event had a finish reason
}

// problem reads the next bytes and returns what is wrong with the stream, "" if nothing is.
func (s *streamCheck) problem(p []byte) string {
	s.events.feed(p)
	for data, ok := s.events.nextData(); ok; data, ok = s.events.nextData() {
		e := parseStreamEvent(data)
		if e.problem != "" {
			return e.problem
		}
		if e.retry {
			return errorInStream
		}
		s.finished = s.finished || e.finished
	}
	return ""
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
		return ms
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

// durationMS reads a duration from the beginning of v, such as 1m30.5s, 20 seconds or PT30S. It returns
// milliseconds, and the rest of v, which is v if it does not begin with a duration.
func durationMS(v string) (ms int64, rest string) {
	rest = strings.ToLower(v)
	rest = strings.TrimPrefix(strings.TrimPrefix(rest, "p"), "t")
	sum, found := 0.0, false
	for {
		next := strings.TrimLeft(rest, " t")
		digits := len(next) - len(strings.TrimLeft(next, "0123456789."))
		n, err := strconv.ParseFloat(strings.TrimRight(next[:digits], "."), 64)
		if err != nil {
			break
		}
		word := strings.TrimLeft(next[digits:], " ")
		letters := len(word) - len(strings.TrimLeft(word, "abcdefghijklmnopqrstuvwxyz\u00b5\u03bc"))
		if strings.HasPrefix(word, "dt") { // P1DT2H
			letters = 1
		}
		unit := unitMS(word[:letters])
		if unit == 0 {
			break
		}
		sum, found, rest = sum+n*unit, true, word[letters:]
	}
	if !found {
		return 0, v
	}
	return boundedMS(sum), rest
}

// unitMS returns how many milliseconds a unit of time has, 0 if the word is none.
func unitMS(word string) float64 {
	switch word {
	case "ns", "us", "\u00b5s", "\u03bcs":
		return 0.001
	case "ms", "msec", "millisecond", "milliseconds":
		return 1
	case "s", "sec", "secs", "second", "seconds":
		return 1000
	case "m", "min", "mins", "minute", "minutes":
		return 60_000
	case "h", "hr", "hrs", "hour", "hours":
		return 3_600_000
	case "d", "day", "days":
		return 86_400_000
	}
	return 0
}

// boundedMS rounds up to whole milliseconds, from 0 to cooldownMax.
func boundedMS(ms float64) int64 {
	if math.IsNaN(ms) || ms <= 0 {
		return 0
	}
	return int64(math.Ceil(min(ms, cooldownMax)))
}

// maskKeyLike replaces what looks like a provider's key, or names the account behind it, by as many asterisks: the
// text of a 403 or 404 reaches the client, and may quote a part of the key. It writes to text.
func maskKeyLike(text []byte) {
	for from := 0; from < len(text); from++ {
		to := from
		for to < len(text) && isKeyByte(text[to]) {
			to++
		}
		if word := text[from:to]; looksLikeKey(string(word)) {
			copy(word, strings.Repeat("*", len(word)))
		}
		from = to
	}
}

func isKeyByte(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '_' || c == '*'
}

// looksLikeKey reports whether a word begins like a key or an account's id, or is one of 32 letters and digits.
func looksLikeKey(word string) bool {
	const minLen = 8 // shorter words are no keys, such as sk-3
	for _, start := range [...]string{"sk-", "sk_", "pk-", "rk-", "gsk_", "xai-", "AIza", "hf_", "r8_", "nvapi-",
		"pplx-", "fw_", "tgp_", "csk-", "key-", "key_", "org-", "proj_"} {
		if strings.HasPrefix(word, start) && len(word) >= minLen {
			return true
		}
	}
	return len(word) >= 32 && !strings.ContainsAny(word, "-_*") && strings.ContainsAny(word, "0123456789")
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
