// This room reads what an attempt at a provider has come to: what it means for
// the call, and for the key. It reads the begin of an answer only, and leaves
// what it read in its body.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"
)

// A verdict says what an attempt means for the call.
type verdict struct {
	over    bool   // the answer is the client's
	again   bool   // the same key may be tried once more
	unsent  bool   // the provider has not had the request
	tooLong bool   // the call does not fit into the model
	fault   bool   // the provider is in trouble, not this key alone
	wait    int64  // milliseconds that the provider asks to wait
	reason  string // for the log
}

const maxErrorHead = 16 << 10 // of a provider's error that is read, to know what it is

// judge says what an attempt means, and tells the key's health.
func (t *tries) judge(res *http.Response, err error) verdict {
	if err == nil && res.StatusCode == http.StatusOK && t.at.health.ready() { // nearly always
		return verdict{over: true}
	}
	h, now, began := t.at.health, time.Now().UnixMilli(), t.began
	if err != nil {
		return t.judgeError(err, now)
	}
	switch code := res.StatusCode; {
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		h.quarantined(now, began, "the provider refuses the key: "+res.Status[:3])
		return verdict{reason: "key refused"}
	case code == http.StatusPaymentRequired:
		h.exhausted(now, began, "the provider answers 402: payment required")
		return verdict{reason: "exhausted"}
	case code == http.StatusTooManyRequests && isErrorCode(errorHead(res), "insufficient_quota"):
		h.exhausted(now, began, "the provider says insufficient_quota")
		return verdict{reason: "exhausted"}
	case code == http.StatusTooManyRequests:
		wait := retryHint(res.Header.Get, time.Now())
		h.limited(now, began, wait, "the provider answers 429: too many requests")
		return verdict{reason: "rate limited", wait: wait}
	case code >= 500 && code != http.StatusNotImplemented:
		wait := retryHint(res.Header.Get, time.Now())
		h.fault(now, began, false, "the provider answers "+res.Status[:3])
		return verdict{again: wait == 0, fault: true, reason: "server error", wait: wait}
	case code < 200 || code >= 300 && code < 400:
		h.fault(now, began, false, "the provider does not answer like an API")
		return verdict{fault: true, reason: "no API's answer"}
	case code == http.StatusBadRequest && t.fallback() != "" && isTooLong(errorHead(res)):
		h.good(now, began, true)
		return verdict{tooLong: true, reason: "too long for the model"}
	case code == http.StatusNotFound && t.c.endpoint.modelInPath:
		h.good(now, began, true)
		return verdict{reason: "does not know the model"} // another may
	case code >= 400:
		h.good(now, began, true) // the call is wrong, not the key
		return verdict{over: true}
	}
	h.good(now, began, false)
	return verdict{over: true}
}

func (t *tries) judgeError(err error, now int64) verdict {
	if t.c.ctx.Err() != nil { // the client, or the watchdog
		return verdict{over: true}
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return verdict{over: true}
	}
	if e, ok := errors.AsType[*apiError](err); ok && e != errImpatient && e != errUnconnected { // of our own making
		return verdict{over: true}
	}
	v := verdict{again: true, fault: true, reason: "broke off before it answered"}
	op, ok := errors.AsType[*net.OpError](err)
	ne, isNet := errors.AsType[net.Error](err)
	switch e, inStream := errors.AsType[*eventFault](err); {
	case inStream:
		v.reason = e.reason
	case err == error(errImpatient):
		v.again, v.reason = false, "did not answer in time"
	case err == error(errUnconnected):
		v.again, v.unsent, v.reason = false, true, "could not be reached in time"
	case ok && op.Op == "dial" || errors.Is(err, errForbiddenAddress):
		v.unsent, v.reason = true, "could not be reached"
	case isNet && ne.Timeout():
		v.again, v.reason = false, "did not answer in time"
	}
	t.at.health.fault(now, t.began, v.unsent, "the provider "+v.reason)
	return v
}

// A headBody is an answer's body whose first bytes have been read.
type headBody struct {
	io.ReadCloser
	head  []byte
	rest  []byte // of head, not yet given out
	whole bool   // there is nothing after it
}

func (b *headBody) Read(p []byte) (int, error) {
	if len(b.rest) > 0 {
		n := copy(p, b.rest)
		b.rest = b.rest[n:]
		return n, nil
	}
	if b.whole {
		return 0, io.EOF
	}
	return b.ReadCloser.Read(p)
}

// errorHead returns the first bytes of a provider's error, and leaves them in
// its body.
func errorHead(res *http.Response) []byte {
	if b, ok := res.Body.(*headBody); ok {
		return b.head
	}
	head, err := io.ReadAll(io.LimitReader(res.Body, maxErrorHead))
	res.Body = &headBody{res.Body, head, head, err == nil && len(head) < maxErrorHead}
	return head
}

// isErrorCode reports whether an error in OpenAI's or Anthropic's shape has a
// code or type.
func isErrorCode(body []byte, code string) bool {
	var e struct{ Error struct{ Code, Type any } }
	_ = json.Unmarshal(body, &e) // what cannot be read has no code
	return e.Error.Code == code || e.Error.Type == code
}

// isTooLong reports whether an error says that the call is too long for the
// model: OpenAI has a code for it, Anthropic and others only words.
func isTooLong(body []byte) bool {
	if isErrorCode(body, "context_length_exceeded") {
		return true
	}
	var e struct{ Error struct{ Message string } }
	_ = json.Unmarshal(body, &e)
	return strings.HasPrefix(e.Error.Message, "prompt is too long") || strings.Contains(e.Error.Message, "maximum context length")
}

// An eventFault says that a stream failed at its very begin.
type eventFault struct{ reason string }

func (e *eventFault) Error() string { return "the stream " + e.reason }

// awaitEvent returns when the stream's first event is there, and leaves all
// that was read in its body. A stream that ends before, or whose first event is
// an error, is an *eventFault.
func awaitEvent(res *http.Response) error {
	head := make([]byte, 0, 4<<10)
	body := res.Body
	for {
		n, err := body.Read(head[len(head):cap(head)])
		head = head[:len(head)+n]
		if data, ok := firstData(head); ok || len(head) >= maxEvent {
			if why := eventTrouble(data); ok && why != "" {
				body.Close()
				return &eventFault{why}
			}
			res.Body = &headBody{body, head, head, false}
			return nil
		}
		if err != nil {
			body.Close()
			if err == io.EOF {
				return &eventFault{"ended before its first event"}
			}
			return err
		}
		if len(head) == cap(head) {
			head = slices.Grow(head, len(head))
		}
	}
}

// firstData returns the data of the first event that has any, if it is whole.
func firstData(b []byte) ([]byte, bool) {
	for {
		data, n := nextEvent(b)
		if n == 0 || data != nil {
			return data, n > 0
		}
		b = b[n:]
	}
}

// nextEvent returns the data of the first event in b, nil if it has none, and
// how long the event is with the empty line that ends it; 0: it is not whole.
func nextEvent(b []byte) (data []byte, n int) {
	for {
		rest := b[n:]
		i := bytes.IndexAny(rest, "\r\n")
		if i < 0 {
			return nil, 0
		}
		line := bytes.TrimPrefix(rest[:i], []byte("\ufeff"))
		if bytes.HasPrefix(rest[i:], []byte("\r\n")) {
			i++
		}
		n += i + 1
		if len(line) == 0 {
			return data, n
		}
		if text, ok := bytes.CutPrefix(line, []byte("data:")); ok {
			data = append(append(data, text...), '\n')
		}
	}
}

// eventTrouble says what is wrong with an event's data, "" if nothing is: an
// error and nothing else, or no JSON at all.
func eventTrouble(data []byte) string {
	var e struct {
		Type  any
		Error json.RawMessage
	}
	data = bytes.TrimSpace(data)
	switch err := json.Unmarshal(data, &e); {
	case string(data) == "[DONE]" || len(data) == 0:
		return ""
	case err != nil && !json.Valid(data):
		return "has an event that is no JSON"
	case e.Type == "error" || len(e.Error) > 0 && string(e.Error) != "null":
		return "has an error in it"
	}
	return ""
}
