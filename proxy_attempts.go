// This room makes a call's attempts: it stands where ReverseProxy expects its
// transport, and tries upstreams in turn until one has answered. Nothing has
// reached the client while RoundTrip has not returned, and nothing is tried any
// more once it has. It never reads what the client wrote.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"
)

const (
	maxAttempts   = 5
	attemptWindow = time.Minute     // after its begin a call is not sent again
	shortWait     = 2_000           // milliseconds of a Retry-After that are waited for where no other key is left
	unaryPatience = 2 * time.Minute // for an answer in one piece, where another upstream is left and this one has no answer_ms
)

// tries are a call's attempts, and its transport. It belongs to the goroutine of the call.
type tries struct {
	s *proxy
	c *call

	model    string    // that stands in for the client's; "" while none does
	at       *upstream // where the last attempt went
	began    int64     // and when
	cancel   context.CancelCauseFunc
	tried    []*upstream   // those that are left behind
	log      []attemptLine // why
	repeated bool          // a key has had its second attempt
	kept     *keptAnswer
	union    *union // a list of models that is put together
}

// An attemptLine is one line of a call's attempt log, as stored and shown.
type attemptLine struct {
	Upstream string `json:"upstream_id"`
	Model    string `json:"model"`            // that was asked for there
	Status   int    `json:"status,omitempty"` // of the provider's answer
	Error    string `json:"error,omitempty"`  // what was wrong, in our words
	MS       int64  `json:"ms"`
}

// A keptAnswer is a provider's error that is whole in memory. The client gets it
// if what comes after is worse.
type keptAnswer struct {
	res *http.Response
	up  *upstream
}

var errImpatient = &apiError{status: http.StatusGatewayTimeout, code: "upstream_timeout", msg: "The provider did not answer in time."}

// RoundTrip makes attempts until one is good enough for the client, or no other
// is left.
func (t *tries) RoundTrip(req *http.Request) (*http.Response, error) {
	if list := t.united(); list != nil {
		return t.unite(req, list)
	}
	for {
		res, err := t.attempt(req)
		v := t.judge(res, err)
		if v.over || !t.goOn(&v, res) {
			return t.best(res, err)
		}
	}
}

// attempt makes one attempt, and counts it.
func (t *tries) attempt(req *http.Request) (*http.Response, error) {
	res, err := t.try(req)
	if err != nil {
		t.s.metrics.attempt(t.at, unanswered(upstreamFailure(t.c, err)))
		return nil, err
	}
	t.s.metrics.attempt(t.at, attemptOf(res.StatusCode))
	return res, nil
}

// try makes one attempt, at the call's upstream. Where another is left, or its
// settings say so, it is not waited for for ever: an answer must begin, and a
// stream must bring its first event.
func (t *tries) try(req *http.Request) (*http.Response, error) {
	c := t.c
	t.at, t.began = c.upstream, c.sentAt.UnixMilli()
	if c.attempts > 0 {
		t.began = time.Now().UnixMilli()
	}
	c.attempts++
	t.at.health.running.Add(1)
	t.at.budget.earn()
	t.s.running.enter(c, phaseProvider)
	out, err := t.request(req)
	if err != nil {
		return nil, err
	}
	patience := t.patience()
	if patience == 0 && !c.verified && t.union == nil {
		return t.at.send(t.s.transport, out)
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	t.cancel = cancel
	timer := time.AfterFunc(cmp.Or(patience, t.s.cfg.upstreamTimeout), func() { cancel(errImpatient) })
	res, err := t.at.send(t.s.transport, out.WithContext(ctx))
	if err == nil {
		err = t.begun(res, timer, patience)
	}
	if timer.Stop(); context.Cause(ctx) == error(errImpatient) {
		if err == nil {
			res.Body.Close()
		}
		return nil, errImpatient
	}
	if err != nil {
		cancel(nil)
		return nil, err
	}
	return res, nil
}

// begun reads what must have come of an answer while its time is limited.
func (t *tries) begun(res *http.Response, timer *time.Timer, patience time.Duration) error {
	switch {
	case res.StatusCode >= 400:
		errorHead(res)
	case res.StatusCode == http.StatusOK && t.union != nil:
		return t.readPage(res)
	case res.StatusCode != http.StatusOK || mediaType(res.Header.Get("Content-Type")) != "text/event-stream":
	case t.c.verified:
		still := t.holding(patience)
		return t.hold(res, func() { timer.Reset(still); t.s.running.enter(t.c, phaseProvider) })
	default:
		return awaitEvent(res)
	}
	return nil
}

// patience is how long an attempt may take to begin, 0 for as long as any may.
// Where no other upstream is left, a stream's first event has no time of its
// own: first_event_ms says when to turn to another. answer_ms is the upstream's
// UPSTREAM_TIMEOUT for answers in one piece, and holds in any case; but not for
// uploads that are streamed, which take as long as the client does, nor for a
// list that others can make up too.
func (t *tries) patience() time.Duration {
	set, stream, spare := &t.at.settings, t.c.fields.stream, t.spare()
	if set.AnswerMS > 0 && !stream && t.c.replayable() && (t.union == nil || !spare) {
		return time.Duration(set.AnswerMS) * time.Millisecond
	}
	if !spare {
		return 0
	}
	if !stream && t.c.endpoint.pattern != "/v1/models" {
		return unaryPatience
	}
	return cmp.Or(time.Duration(set.FirstEventMS)*time.Millisecond, t.s.cfg.firstEventTimeout)
}

// spare reports whether there is another place to send the call to.
func (t *tries) spare() bool {
	if t.alone() {
		return false
	}
	w := t.wish()
	return t.c.project.spare(&w) || t.fallback() != ""
}

// alone reports whether the call can be sent to one upstream and no other.
func (t *tries) alone() bool {
	p := t.c.project
	return len(p.upstreams) == 1 && len(p.routing.Fallbacks) == 0 || t.c.pinned() || !t.c.replayable()
}

// fallback returns the model that may stand in for the client's: once, and if
// the policies allow it.
func (t *tries) fallback() string {
	c := t.c
	if t.model != "" || len(c.project.routing.Fallbacks) == 0 || c.fields.modelAt.to == 0 {
		return ""
	}
	if to := c.project.routing.fallback(c.fields.model); to != "" && c.mayUse(to) {
		return to
	}
	return ""
}

// mayUse reports whether the policies allow a model.
func (c *call) mayUse(model string) bool {
	return c.project.policy.allowsModel(model) && c.state.policy.allowsModel(model)
}

// wish is what the call asks of the upstreams that have not had their turn.
func (t *tries) wish() wish {
	w := t.c.wish(time.Now().UnixMilli())
	w.model, w.strict = cmp.Or(t.model, w.model), true
	w.api = apiOpenAI // of the family that the first attempt has settled
	if t.at.provider == providerAnthropic {
		w.api = apiAnthropic
	}
	w.tried = append(slices.Clip(t.tried), t.at)
	return w
}

// request returns the request for this attempt. The first is ReverseProxy's own;
// a later one shares no map with it, for the transport may still be writing it.
func (t *tries) request(req *http.Request) (*http.Request, error) {
	c, out := t.c, req
	if c.attempts > 1 {
		out = req.WithContext(req.Context())
		out.Header = req.Header.Clone()
		for _, name := range [...]string{"Authorization", "X-Api-Key", "Api-Key", "Openai-Organization", "Openai-Project"} {
			delete(out.Header, name)
		}
	}
	path, query := c.match.path, c.query
	if name := t.sent(); c.endpoint.modelInPath && name != c.fields.model {
		path = pathOfModel(name, path)
	}
	if t.union != nil {
		query = t.union.query
	}
	out.URL = t.at.url(path, query) // with the key that goes there, always together
	body, err := t.body()
	if err != nil {
		return nil, err
	}
	if body != nil { // the bytes that were checked, known to be in memory
		out.Body, out.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		out.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	}
	t.at.authorize(out.Header)
	return out, nil
}

// body returns the call's body with the model's name as this upstream knows it.
func (t *tries) body() ([]byte, error) {
	c := t.c
	name := t.sent()
	if name == c.fields.model || c.body == nil || c.fields.modelAt.to == 0 {
		return c.body, nil
	}
	body := withModel(c.body, c.fields, c.stripped, name)
	if !t.s.bodies.reserve(int64(len(body))) {
		return nil, errUnavailable("body_memory_full", errors.New("BODY_MEMORY is used up"))
	}
	c.held += int64(len(body))
	return body, nil
}

// sent is the model's name as the upstream of this attempt gets it.
func (t *tries) sent() string { return t.at.named(cmp.Or(t.model, t.c.fields.model)) }

// replayable reports whether the call's body can be sent again.
func (c *call) replayable() bool { return c.body != nil || !c.endpoint.upload }

// pick chooses the upstream. An endpoint that both families of providers have
// (the list of models) goes to the family whose SDK is asking, if it is there.
func (c *call) pick() (u *upstream) {
	w := c.wish(c.start.UnixMilli())
	if w.api == apiAny {
		w.api = apiOpenAI
		if c.anthropic {
			w.api = apiAnthropic
		}
		if u = c.project.pick(&w); u == nil {
			w.api = apiAny
		}
	}
	if u == nil {
		u = c.project.pick(&w)
	}
	c.shown.Store(u)
	return u
}

// wish is what the call asks of its project's upstreams.
func (c *call) wish(now int64) wish {
	return wish{api: c.endpoint.api, model: c.fields.model, pinned: c.pinned(), tokens: c.inputEstimate(), now: now}
}

// pinned reports whether the call may name objects that are kept at a provider,
// or makes some: those are in one account, so one upstream gets all such calls.
func (c *call) pinned() bool {
	return c.endpoint.class == classStateful || c.fields.stateRef != "" ||
		c.project.policy.Stateful && strings.HasPrefix(c.endpoint.pattern, "/v1/responses")
}

// goOn decides whether the call is sent again, and where: if so, that is its
// upstream now.
func (t *tries) goOn(v *verdict, res *http.Response) bool {
	c := t.c
	now := time.Now()
	if t.alone() || c.attempts >= maxAttempts || now.Sub(c.start) > t.window() || c.ctx.Err() != nil {
		return false
	}
	ms := now.UnixMilli()
	if v.again && !t.repeated && len(c.project.upstreams) > 1 && t.at.health.mayTry(ms) && t.room(ms) && t.at.budget.spend(ms) {
		return t.repeat(v, res, time.Duration(50+rand.IntN(150))*time.Millisecond)
	}
	var next *upstream
	if !v.tooLong { // which it would be anywhere
		w := t.wish()
		next = c.project.pick(&w)
	}
	if next == nil && v.wait > 0 && v.wait <= shortWait && !t.repeated && (!v.fault || t.at.budget.spend(ms)) && t.room(ms) {
		return t.repeat(v, res, time.Duration(v.wait)*time.Millisecond)
	}
	model, tried := t.model, append(t.tried, t.at)
	if next == nil {
		if model = t.fallback(); model == "" {
			return false
		}
		w := t.wish()
		w.model, w.tried, tried = model, nil, nil
		if next = c.project.pick(&w); next == nil {
			return false
		}
	}
	if v.fault && next.host == t.at.host && !t.at.budget.spend(ms) {
		next.health.release()
		return false
	}
	t.leave(v, res)
	t.model, t.tried = model, tried
	c.upstream = next
	c.shown.Store(next)
	return true
}

// window is the time after a call's begin in which it may be sent again.
func (t *tries) window() time.Duration {
	if t.c.verified { // that its stream is cut may show late
		return t.s.cfg.upstreamTimeout
	}
	return attemptWindow
}

// room takes one more attempt at the same key from its own limits.
func (t *tries) room(now int64) bool {
	return t.at.health.room(now, t.c.inputEstimate(), &t.at.settings, true)
}

// repeat has the same key tried once more, after a pause.
func (t *tries) repeat(v *verdict, res *http.Response, pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.c.ctx.Done():
		return false
	}
	t.repeated = true
	t.leave(v, res)
	return true
}

// leave puts an attempt behind the call.
func (t *tries) leave(v *verdict, res *http.Response) {
	line := attemptLine{Upstream: t.at.id, Model: t.sent(), Error: v.reason, MS: time.Now().UnixMilli() - t.began}
	if res != nil {
		line.Status = res.StatusCode
		if head, ok := res.Body.(*headBody); ok && head.whole && res.StatusCode != http.StatusPaymentRequired {
			t.kept = &keptAnswer{res, t.at}
		}
		res.Body.Close()
	}
	t.log = append(t.log, line)
	t.at.health.running.Add(-1)
	if t.cancel != nil {
		t.cancel(nil)
		t.cancel = nil
	}
}

// best returns the answer for the client: the last one, unless a provider has
// said more useful things before.
func (t *tries) best(res *http.Response, err error) (*http.Response, error) {
	refused := res != nil && (res.StatusCode == http.StatusUnauthorized || res.StatusCode == http.StatusForbidden || res.StatusCode == http.StatusPaymentRequired)
	if t.kept == nil || err == nil && !refused || t.c.ctx.Err() != nil {
		return res, err
	}
	if res != nil {
		res.Body.Close()
	}
	t.c.upstream = t.kept.up
	t.c.shown.Store(t.kept.up)
	return t.kept.res, nil
}

// finish is called once the call is over, however it ended: it frees the key,
// and tells its health what only the end can show.
func (t *tries) finish(row *requestRow, now int64) {
	if t.at == nil { // it never went out
		t.c.upstream.health.release()
		return
	}
	if len(t.log) > 0 {
		last := attemptLine{Upstream: t.at.id, Model: t.sent(), MS: now - t.began, Error: row.errorCode}
		if t.union != nil {
			last.Status, last.Error = t.union.status, cmp.Or(row.errorCode, t.union.reason)
		}
		if t.c.answer.meter != nil && t.c.upstream == t.at {
			last.Status = row.status
		}
		if text, err := json.Marshal(append(t.log, last)); err == nil { // strings and numbers: it cannot fail
			row.attemptLog = string(text)
		}
	}
	if m := t.c.answer.meter; t.model != "" && (m == nil || m.model == "") {
		row.model = t.model // the answer does not say
	}
	h := t.at.health
	if row.source == usageExact {
		h.used(t.began, t.c.inputEstimate(), row.counts.input+row.counts.output, &t.at.settings)
	}
	h.running.Add(-1)
	if t.cancel != nil {
		t.cancel(nil)
	}
	switch {
	case row.outcome == outcomeOK && t.c.upstream == t.at:
		h.good(now, t.began, true)
	case row.errorCode == "upstream_cut" || row.errorCode == "stream_idle" || row.errorCode == "error_in_stream" ||
		row.errorCode == "upstream_timeout" && asCause(t.c.ctx) != nil:
		h.fault(now, t.began, false, "the provider's answer broke off or stood still")
	default:
		h.release()
	}
}

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
