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
	faultRate                      // the key has reached a rate limit
	faultQuota                     // the key's account has no credit left
	faultKey                       // the provider refuses the key
	faultProvider                  // the provider is in trouble, or does not answer like an API
)

// A fault is the judgment of one answer.
type fault struct {
	kind      faultKind
	waitMS    int64  // how long the provider asks to wait; 0: it does not say
	momentary bool   // the same key may answer if it is asked again at once
	reason    string // for the attempt log
	health    string // for the health of the key; "": the key is not affected
}

// judgeStatus judges an answer by its status. get returns a header's value, body the first bytes of the body.
func judgeStatus(status int, get func(string) string, body func() []byte, now time.Time) fault {
	code := strconv.Itoa(status)
	switch {
	case status == 401 || status == 403:
		return fault{kind: faultKey, reason: "key refused", health: "the provider refuses the key: " + code}
	case status == 402:
		return fault{kind: faultQuota, reason: "exhausted", health: "the provider answers 402: payment required"}
	case status == 429 && hasErrorCode(body(), "insufficient_quota"):
		return fault{kind: faultQuota, reason: "exhausted", health: "the provider answers insufficient_quota"}
	case status == 429:
		return fault{kind: faultRate, waitMS: retryHint(get, now), reason: "rate limited",
			health: "the provider answers 429: too many requests"}
	case status >= 500 && status != 501:
		wait := retryHint(get, now)
		return fault{kind: faultProvider, waitMS: wait, momentary: wait == 0, reason: "server error",
			health: "the provider answers " + code}
	case status < 200 || status >= 300 && status < 400:
		return fault{kind: faultProvider, reason: "not an API answer",
			health: "the provider does not answer like an API"}
	case status == 400 && isContextTooLong(body()):
		return fault{kind: faultTooLong, reason: "too long for the model"}
	case status >= 400:
		return fault{kind: faultRequest, reason: "request refused"}
	}
	return fault{}
}

// hasErrorCode reports whether an error in OpenAI's or Anthropic's shape has a code or type.
func hasErrorCode(body []byte, code string) bool {
	var e struct{ Error struct{ Code, Type any } }
	_ = json.Unmarshal(body, &e) // a body that cannot be read has no code
	return e.Error.Code == code || e.Error.Type == code
}

// isContextTooLong reports whether an error means that the call is too long for the model. OpenAI has a code
// for that; Anthropic and others only say so in the message.
func isContextTooLong(body []byte) bool {
	if hasErrorCode(body, "context_length_exceeded") {
		return true
	}
	var e struct{ Error struct{ Message string } }
	_ = json.Unmarshal(body, &e)
	return strings.HasPrefix(e.Error.Message, "prompt is too long") ||
		strings.Contains(e.Error.Message, "maximum context length")
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

// retryHint returns how many milliseconds an answer asks to wait, at most cooldownMax. It returns 0 if the answer
// does not say, or not in a form that is understood. get returns a header's value.
func retryHint(get func(string) string, now time.Time) int64 {
	if ms, err := strconv.ParseFloat(get("Retry-After-Ms"), 64); err == nil && ms > 0 {
		return boundedMS(ms)
	}
	if v := get("Retry-After"); v != "" {
		if ms := parseWait(v, now, false); ms > 0 {
			return ms
		}
	}
	var most int64
	for _, kind := range [...]string{"Requests", "Tokens"} {
		if get("X-Ratelimit-Remaining-"+kind) == "0" {
			most = max(most, parseWait(get("X-Ratelimit-Reset-"+kind), now, true))
		}
		if get("Anthropic-Ratelimit-"+kind+"-Remaining") == "0" {
			most = max(most, parseWait(get("Anthropic-Ratelimit-"+kind+"-Reset"), now, true))
		}
	}
	if most == 0 {
		most = parseWait(get("X-Ratelimit-Reset"), now, true)
	}
	return most
}

// parseWait reads one value, and returns milliseconds: seconds, a duration such as 6m0s or 12ms, or a date. With
// epoch, a large number is a unix time in seconds or milliseconds.
func parseWait(v string, now time.Time, epoch bool) int64 {
	v = strings.TrimSpace(v)
	if n, err := strconv.ParseFloat(v, 64); err == nil {
		switch ms := float64(now.UnixMilli()); {
		case epoch && n > 1e11:
			return boundedMS(n - ms)
		case epoch && n > 1e9:
			return boundedMS(n*1000 - ms)
		}
		return boundedMS(n * 1000)
	}
	if d, err := time.ParseDuration(v); err == nil {
		return boundedMS(float64(d.Milliseconds()))
	}
	for _, layout := range [...]string{time.RFC1123, time.RFC3339Nano} {
		if t, err := time.Parse(layout, v); err == nil {
			return boundedMS(float64(t.Sub(now).Milliseconds()))
		}
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
