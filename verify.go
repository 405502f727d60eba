// This room holds a stream back until it is complete, for clients that would
// rather wait than see one break. What it holds is in memory and bounded, and
// nothing of it goes anywhere else.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"
)

// maxVerified bounds a stream that is held. It counts as BODY_MEMORY.
const maxVerified = 16 << 20

// wantsVerified reports whether the call's stream is to be held: the client says
// so, or its project does and the client does not say otherwise.
func wantsVerified(h http.Header, p *projectState) (bool, error) {
	switch v := h["X-Llm-Proxy-Stream"]; {
	case len(v) == 0:
		return p.routing.VerifiedStreams, nil
	case len(v) == 1 && (v[0] == "verified" || v[0] == "plain"):
		return v[0] == "verified", nil
	}
	return false, badRequest("invalid_value", "X-LLM-Proxy-Stream", "X-LLM-Proxy-Stream must be verified or plain.")
}

// hold reads a stream to its end and leaves it in the answer's body, whole. A
// stream that is cut, has an event that is an error or no JSON, or lacks its end
// is an error, and nothing of it is left. alive is called with each read.
func (t *tries) hold(res *http.Response, alive func()) (err error) {
	body := res.Body
	defer body.Close()
	held := int64(0)
	defer func() {
		if err != nil {
			t.s.bodies.release(held)
		}
	}()
	plain := res.Header.Get("Content-Encoding") == "" // else its events cannot be read, only its end
	var all []byte
	look := eventLook{}
	m := newMeter(t.c.endpoint.meter, true, !plain, false)
	for {
		if len(all) == cap(all) {
			all = slices.Grow(all, max(len(all), 32<<10))
			if more := int64(cap(all)) - held; !t.s.bodies.reserve(more) {
				return errUnavailable("body_memory_full", errors.New("BODY_MEMORY is used up"))
			}
			held = int64(cap(all))
		}
		n, err := body.Read(all[len(all):cap(all)])
		m.pass(all[len(all) : len(all)+n])
		all = all[:len(all)+n]
		t.c.watch.output.Store(max(m.counts.output, m.estimateOutput())) // budgets hold for what nobody has seen yet too
		alive()
		if len(all) > maxVerified {
			return &apiError{status: http.StatusBadGateway, code: "stream_too_large", noRetry: true,
				msg: "The stream is larger than the " + strconv.Itoa(maxVerified>>20) + " MiB that are held; ask for it with X-LLM-Proxy-Stream: plain."}
		}
		if why := look.read(all); plain && why != "" {
			return &eventFault{why}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	// Some compatible providers never send an end mark. Where nobody else is left to
	// ask, a reason to finish is as good.
	if m.end(); plain && t.c.endpoint.endMarked() && !m.done && (!look.finished || t.spare()) {
		return &eventFault{"ended without its end mark"}
	}
	t.c.held += held
	res.Body = &headBody{http.NoBody, all, all, true}
	return nil
}

// holding is how long a stream that is held may stand still.
func (t *tries) holding(patience time.Duration) time.Duration {
	switch own := time.Duration(t.at.settings.IdleMS) * time.Millisecond; {
	case own > 0:
		return own
	case patience > 0:
		return patience
	}
	return t.s.cfg.streamIdleTimeout
}

// An eventLook reads the events of a stream that grows.
type eventLook struct {
	at       int  // so far they have been read
	seen     int  // so far there was no end of a line since then
	finished bool // an event said why the answer ends
}

// read looks at the events that have come to their end since it was last called,
// and says what is wrong with the stream, "" if nothing is.
func (l *eventLook) read(stream []byte) string {
	fresh := stream[l.seen:]
	if l.seen = len(stream); !bytes.ContainsAny(fresh, "\r\n") {
		return "" // of a large event: looking at all of it each time would take long
	}
	for {
		data, n := nextEvent(stream[l.at:])
		if n == 0 {
			return ""
		}
		l.at += n
		if why := eventTrouble(data); why != "" {
			return why
		}
		var e struct {
			Choices []struct {
				FinishReason any `json:"finish_reason"`
			}
			Type     any
			Response struct{ Error struct{ Code any } }
		}
		_ = json.Unmarshal(data, &e) // eventTrouble has seen that it is JSON
		if code := e.Response.Error.Code; e.Type == "response.failed" && (code == "server_error" || code == "rate_limit_exceeded") {
			return "has an error in it" // others are the call's own fault, and would be again
		}
		for _, c := range e.Choices {
			l.finished = l.finished || c.FinishReason != nil
		}
	}
}
