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
	maxAttempts        = 5
	defaultRetryWindow = time.Minute     // after its begin a call is not sent again
	maxRetryAfterMS    = 2_000           // milliseconds of a Retry-After that are waited for where no other key is left
	unaryTimeout       = 2 * time.Minute // for an answer in one piece, where another upstream is left and this one has no answer_ms
)

// attempts are a call's attempts, and its transport. It belongs to the goroutine of the call.
type attempts struct {
	s *proxy
	c *call

	fallbackModel  string    // that stands in for the client's; "" while none does
	current        *upstream // where the last attempt went
	startedAt      int64     // and when
	cancel         context.CancelCauseFunc
	tried          []*upstream   // those that are left behind
	log            []attemptLine // why
	retriedSameKey bool          // a key has had its second attempt
	savedResponse  *savedResponse
	merged         *mergedModels // a list of models that is put together
}

// An attemptLine is one line of a call's attempt log, as stored and shown.
type attemptLine struct {
	Upstream string `json:"upstream_id"`
	Model    string `json:"model"`            // that was asked for there
	Status   int    `json:"status,omitempty"` // of the provider's answer
	Error    string `json:"error,omitempty"`  // what was wrong, in our words
	MS       int64  `json:"ms"`
}

// A savedResponse is a provider's error that is whole in memory. The client gets it
// if what comes after is worse.
type savedResponse struct {
	res      *http.Response
	upstream *upstream
}

// RoundTrip makes attempts until one is good enough for the client, or no other
// is left.
func (t *attempts) RoundTrip(req *http.Request) (*http.Response, error) {
	if list := t.modelSources(); list != nil {
		return t.mergeModels(req, list)
	}
	for {
		res, err := t.attempt(req)
		v := t.classify(res, err)
		if v.final || !t.nextAttempt(&v, res) {
			return t.bestResponse(res, err)
		}
	}
}

// attempt makes one attempt, and counts it.
func (t *attempts) attempt(req *http.Request) (*http.Response, error) {
	res, err := t.roundTrip(req)
	if err != nil {
		t.s.metrics.countAttempt(t.current, resultOfError(upstreamFailure(t.c, err)))
		return nil, err
	}
	t.s.metrics.countAttempt(t.current, resultOfStatus(res.StatusCode))
	return res, nil
}

// roundTrip makes one attempt, at the call's upstream. Where another is left, or its
// settings say so, it is not waited for for ever: an answer must begin, and a
// stream must bring its first event.
func (t *attempts) roundTrip(req *http.Request) (*http.Response, error) {
	c := t.c
	t.current, t.startedAt = c.upstream, c.times.sentAt.UnixMilli()
	if c.attemptCount > 0 {
		t.startedAt = time.Now().UnixMilli()
	}
	c.attemptCount++
	t.current.health.running.Add(1)
	t.current.retryBudget.earn()
	c.setPhase(phaseProvider)
	out, err := t.buildRequest(req)
	if err != nil {
		return nil, err
	}
	patience := t.attemptTimeout()
	if patience == 0 && !c.bufferStream && t.merged == nil {
		return t.current.send(t.s.transport, out)
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	t.cancel = cancel
	timer := time.AfterFunc(cmp.Or(patience, t.s.cfg.upstreamTimeout), func() { cancel(errAttemptTimeout) })
	res, err := t.current.send(t.s.transport, out.WithContext(ctx))
	if err == nil {
		err = t.readStart(res, timer, patience)
	}
	if timer.Stop(); context.Cause(ctx) == error(errAttemptTimeout) {
		if err == nil {
			res.Body.Close()
		}
		return nil, errAttemptTimeout
	}
	if err != nil {
		cancel(nil)
		return nil, err
	}
	return res, nil
}

// readStart reads what must have come of an answer while its time is limited.
func (t *attempts) readStart(res *http.Response, timer *time.Timer, patience time.Duration) error {
	switch {
	case res.StatusCode >= 400:
		peekBody(res)
	case res.StatusCode == http.StatusOK && t.merged != nil:
		return t.readModelPage(res)
	case res.StatusCode != http.StatusOK || mediaType(res.Header.Get("Content-Type")) != "text/event-stream":
	case t.c.bufferStream:
		still := t.bufferIdleTimeout(patience)
		return t.bufferStream(res, func() { timer.Reset(still); t.c.setPhase(phaseProvider) })
	default:
		return awaitFirstEvent(res)
	}
	return nil
}

// attemptTimeout is how long an attempt may take to begin, 0 for as long as any may.
// Where no other upstream is left, a stream's first event has no time of its
// own: first_event_ms says when to turn to another. answer_ms is the upstream's
// UPSTREAM_TIMEOUT for answers in one piece, and holds in any case; but not for
// uploads that are streamed, which take as long as the client does, nor for a
// list that others can make up too.
func (t *attempts) attemptTimeout() time.Duration {
	set, stream, spare := &t.current.settings, t.c.fields.stream, t.hasAlternative()
	if set.AnswerMS > 0 && !stream && t.c.replayable() && (t.merged == nil || !spare) {
		return time.Duration(set.AnswerMS) * time.Millisecond
	}
	if !spare {
		return 0
	}
	if !stream && t.c.endpoint.pattern != "/v1/models" {
		return unaryTimeout
	}
	return cmp.Or(time.Duration(set.FirstEventMS)*time.Millisecond, t.s.cfg.firstEventTimeout)
}

// hasAlternative reports whether there is another place to send the call to.
func (t *attempts) hasAlternative() bool {
	if t.singleUpstream() {
		return false
	}
	w := t.criteria()
	return t.c.project.hasAlternative(&w) || t.availableFallback() != ""
}

// singleUpstream reports whether the call can be sent to one upstream and no other.
func (t *attempts) singleUpstream() bool {
	p := t.c.project
	return len(p.upstreams) == 1 && len(p.routing.Fallbacks) == 0 || t.c.pinned() || !t.c.replayable()
}

// availableFallback returns the model that may stand in for the client's: once, and if
// the policies allow it.
func (t *attempts) availableFallback() string {
	c := t.c
	if t.fallbackModel != "" || len(c.project.routing.Fallbacks) == 0 || c.fields.modelSplice.to == 0 {
		return ""
	}
	if to := c.project.routing.fallbackFor(c.fields.model); to != "" && c.mayUseModel(to) {
		return to
	}
	return ""
}

// mayUseModel reports whether the policies allow a model.
func (c *call) mayUseModel(model string) bool {
	return c.project.policy.allowsModel(model) && c.tokenState.policy.allowsModel(model)
}

// criteria is what the call asks of the upstreams that have not had their turn.
func (t *attempts) criteria() criteria {
	w := t.c.criteria(time.Now().UnixMilli())
	w.model, w.healthyOnly = cmp.Or(t.fallbackModel, w.model), true
	w.api = apiOpenAI // of the family that the first attempt has settled
	if t.current.provider == providerAnthropic {
		w.api = apiAnthropic
	}
	w.tried = append(slices.Clip(t.tried), t.current)
	return w
}

// buildRequest returns the request for this attempt. The first is ReverseProxy's own;
// a later one shares no map with it, for the transport may still be writing it.
func (t *attempts) buildRequest(req *http.Request) (*http.Request, error) {
	c, out := t.c, req
	if c.attemptCount > 1 {
		out = req.WithContext(req.Context())
		out.Header = req.Header.Clone()
		for _, name := range [...]string{"Authorization", "X-Api-Key", "Api-Key", "Openai-Organization", "Openai-Project"} {
			delete(out.Header, name)
		}
	}
	path, query := c.match.path, c.query
	if name := t.upstreamModel(); c.endpoint.modelInPath && name != c.fields.model {
		path = modelOutboundPath(name, path)
	}
	if t.merged != nil {
		query = t.merged.query
	}
	out.URL = t.current.url(path, query) // with the key that goes there, always together
	body, err := t.buildBody()
	if err != nil {
		return nil, err
	}
	if body != nil { // the bytes that were checked, known to be in memory
		out.Body, out.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		out.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	}
	t.current.authorize(out.Header)
	return out, nil
}

// buildBody returns the call's body with the model's name as this upstream knows it.
func (t *attempts) buildBody() ([]byte, error) {
	c := t.c
	name := t.upstreamModel()
	if name == c.fields.model || c.body == nil || c.fields.modelSplice.to == 0 {
		return c.body, nil
	}
	body := withModel(c.body, c.fields, c.usageAdded, name)
	if !t.s.bodies.reserve(int64(len(body))) {
		return nil, errBodyMemoryFull()
	}
	c.bodyReserved += int64(len(body))
	return body, nil
}

// upstreamModel is the model's name as the upstream of this attempt gets it.
func (t *attempts) upstreamModel() string {
	return t.current.mapModel(cmp.Or(t.fallbackModel, t.c.fields.model))
}

// replayable reports whether the call's body can be sent again.
func (c *clientRequest) replayable() bool { return c.body != nil || !c.endpoint.upload }

// pickUpstream chooses the upstream. An endpoint that both families of providers have
// (the list of models) goes to the family whose SDK is asking, if it is there.
func (c *call) pickUpstream() (u *upstream) {
	w := c.criteria(c.start.UnixMilli())
	if w.api == apiAny {
		w.api = apiOpenAI
		if c.anthropic {
			w.api = apiAnthropic
		}
		if u = c.project.pickUpstream(&w); u == nil {
			w.api = apiAny
		}
	}
	if u == nil {
		u = c.project.pickUpstream(&w)
	}
	return u
}

// criteria is what the call asks of its project's upstreams.
func (c *call) criteria(now int64) criteria {
	return criteria{api: c.endpoint.api, model: c.fields.model, pinned: c.pinned(), tokens: c.inputEstimate(), now: now}
}

// pinned reports whether the call may name objects that are kept at a provider,
// or makes some: those are in one account, so one upstream gets all such calls.
func (c *call) pinned() bool {
	return c.endpoint.class == classStateful || c.fields.statefulParam != "" ||
		c.project.policy.Stateful && strings.HasPrefix(c.endpoint.pattern, "/v1/responses")
}

// nextAttempt decides whether the call is sent again, and where: if so, that is its
// upstream now.
func (t *attempts) nextAttempt(v *retryDecision, res *http.Response) bool {
	c := t.c
	now := time.Now()
	if t.singleUpstream() || c.attemptCount >= maxAttempts || now.Sub(c.start) > t.retryWindow() || c.ctx.Err() != nil {
		return false
	}
	ms := now.UnixMilli()
	if v.retrySameKey && !t.retriedSameKey && len(c.project.upstreams) > 1 && t.current.health.available(ms) && t.reserveCapacity(ms) && t.current.retryBudget.spend(ms) {
		return t.retrySameKey(v, res, time.Duration(50+rand.IntN(150))*time.Millisecond)
	}
	var next *upstream
	if !v.tooLong { // which it would be anywhere
		w := t.criteria()
		next = c.project.pickUpstream(&w)
	}
	if next == nil && v.retryAfterMS > 0 && v.retryAfterMS <= maxRetryAfterMS && !t.retriedSameKey && (!v.fault || t.current.retryBudget.spend(ms)) && t.reserveCapacity(ms) {
		return t.retrySameKey(v, res, time.Duration(v.retryAfterMS)*time.Millisecond)
	}
	model, tried := t.fallbackModel, append(t.tried, t.current)
	if next == nil {
		if model = t.availableFallback(); model == "" {
			return false
		}
		w := t.criteria()
		w.model, w.tried, tried = model, nil, nil
		if next = c.project.pickUpstream(&w); next == nil {
			return false
		}
	}
	if v.fault && next.host == t.current.host && !t.current.retryBudget.spend(ms) {
		next.health.endProbe()
		return false
	}
	t.endAttempt(v, res)
	t.fallbackModel, t.tried = model, tried
	c.setUpstream(next)
	return true
}

// retryWindow is the time after a call's begin in which it may be sent again.
func (t *attempts) retryWindow() time.Duration {
	if t.c.bufferStream { // that its stream is cut may show late
		return t.s.cfg.upstreamTimeout
	}
	return defaultRetryWindow
}

// reserveCapacity takes one more attempt at the same key from its own limits.
func (t *attempts) reserveCapacity(now int64) bool {
	return t.current.health.admits(now, t.c.inputEstimate(), &t.current.settings, true)
}

// retrySameKey has the same key tried once more, after a pause.
func (t *attempts) retrySameKey(v *retryDecision, res *http.Response, pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.c.ctx.Done():
		return false
	}
	t.retriedSameKey = true
	t.endAttempt(v, res)
	return true
}

// endAttempt puts an attempt behind the call.
func (t *attempts) endAttempt(v *retryDecision, res *http.Response) {
	line := attemptLine{Upstream: t.current.id, Model: t.upstreamModel(), Error: v.reason, MS: time.Now().UnixMilli() - t.startedAt}
	if res != nil {
		line.Status = res.StatusCode
		if head, ok := res.Body.(*peekedBody); ok && head.complete && res.StatusCode != http.StatusPaymentRequired {
			t.savedResponse = &savedResponse{res, t.current}
		}
		res.Body.Close()
	}
	t.log = append(t.log, line)
	t.current.health.running.Add(-1)
	if t.cancel != nil {
		t.cancel(nil)
		t.cancel = nil
	}
}

// bestResponse returns the answer for the client: the last one, unless a provider has
// said more useful things before.
func (t *attempts) bestResponse(res *http.Response, err error) (*http.Response, error) {
	refused := res != nil && (res.StatusCode == http.StatusUnauthorized || res.StatusCode == http.StatusForbidden || res.StatusCode == http.StatusPaymentRequired)
	if t.savedResponse == nil || err == nil && !refused || t.c.ctx.Err() != nil {
		return res, err
	}
	if res != nil {
		res.Body.Close()
	}
	t.c.setUpstream(t.savedResponse.upstream)
	return t.savedResponse.res, nil
}

// finish is called once the call is over, however it ended: it frees the key,
// and tells its health what only the end can show.
func (t *attempts) finish(row *requestRow, now int64) {
	if t.current == nil { // it never went out
		t.c.upstream.health.endProbe()
		return
	}
	if len(t.log) > 0 {
		last := attemptLine{Upstream: t.current.id, Model: t.upstreamModel(), MS: now - t.startedAt, Error: row.errorCode}
		if t.merged != nil {
			last.Status, last.Error = t.merged.lastStatus, cmp.Or(row.errorCode, t.merged.lastReason)
		}
		if t.c.response.meter != nil && t.c.upstream == t.current {
			last.Status = row.status
		}
		if text, err := json.Marshal(append(t.log, last)); err == nil { // strings and numbers: it cannot fail
			row.attemptLog = string(text)
		}
	}
	if m := t.c.response.meter; t.fallbackModel != "" && (m == nil || m.model == "") {
		row.model = t.fallbackModel // the answer does not say
	}
	h := t.current.health
	if row.source == usageExact {
		h.correctUsage(t.startedAt, t.c.inputEstimate(), row.counts.input+row.counts.output, &t.current.settings)
	}
	h.running.Add(-1)
	if t.cancel != nil {
		t.cancel(nil)
	}
	switch {
	case row.outcome == outcomeOK && t.c.upstream == t.current:
		h.recordSuccess(now, t.startedAt, true)
	case row.errorCode == "upstream_cut" || row.errorCode == "stream_idle" || row.errorCode == "error_in_stream" ||
		row.errorCode == "upstream_timeout" && abortCause(t.c.ctx) != nil:
		h.recordFailure(now, t.startedAt, false, "the provider's answer broke off or stood still")
	default:
		h.endProbe()
	}
}

// A retryDecision says what an attempt means for the call.
type retryDecision struct {
	final        bool   // the answer is the client's
	retrySameKey bool   // the same key may be tried once more
	unsent       bool   // the provider has not had the request
	tooLong      bool   // the call does not fit into the model
	fault        bool   // the provider is in trouble, not this key alone
	retryAfterMS int64  // milliseconds that the provider asks to wait
	reason       string // for the log
}

// classify says what an attempt means, and tells the key's health.
func (t *attempts) classify(res *http.Response, err error) retryDecision {
	if err == nil && res.StatusCode == http.StatusOK && t.current.health.ready() { // nearly always
		return retryDecision{final: true}
	}
	h, now, began := t.current.health, time.Now().UnixMilli(), t.startedAt
	if err != nil {
		return t.classifyError(err, now)
	}
	switch code := res.StatusCode; {
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		h.recordRejected(now, began, "the provider refuses the key: "+res.Status[:3])
		return retryDecision{reason: "key refused"}
	case code == http.StatusPaymentRequired:
		h.recordExhausted(now, began, "the provider answers 402: payment required")
		return retryDecision{reason: "exhausted"}
	case code == http.StatusTooManyRequests && hasErrorCode(peekBody(res), "insufficient_quota"):
		h.recordExhausted(now, began, "the provider says insufficient_quota")
		return retryDecision{reason: "exhausted"}
	case code == http.StatusTooManyRequests:
		wait := retryHint(res.Header.Get, time.Now())
		h.recordRateLimit(now, began, wait, "the provider answers 429: too many requests")
		return retryDecision{reason: "rate limited", retryAfterMS: wait}
	case code >= 500 && code != http.StatusNotImplemented:
		wait := retryHint(res.Header.Get, time.Now())
		h.recordFailure(now, began, false, "the provider answers "+res.Status[:3])
		return retryDecision{retrySameKey: wait == 0, fault: true, reason: "server error", retryAfterMS: wait}
	case code < 200 || code >= 300 && code < 400:
		h.recordFailure(now, began, false, "the provider does not answer like an API")
		return retryDecision{fault: true, reason: "no API's answer"}
	case code == http.StatusBadRequest && t.availableFallback() != "" && isContextTooLong(peekBody(res)):
		h.recordSuccess(now, began, true)
		return retryDecision{tooLong: true, reason: "too long for the model"}
	case code == http.StatusNotFound && t.c.endpoint.modelInPath:
		h.recordSuccess(now, began, true)
		return retryDecision{reason: "does not know the model"} // another may
	case code >= 400:
		h.recordSuccess(now, began, true) // the call is wrong, not the key
		return retryDecision{final: true}
	}
	h.recordSuccess(now, began, false)
	return retryDecision{final: true}
}

func (t *attempts) classifyError(err error, now int64) retryDecision {
	if t.c.ctx.Err() != nil { // the client, or the watchdog
		return retryDecision{final: true}
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return retryDecision{final: true}
	}
	if e, ok := errors.AsType[*apiError](err); ok && e != errAttemptTimeout && e != errConnectTimeout { // of our own making
		return retryDecision{final: true}
	}
	v := retryDecision{retrySameKey: true, fault: true, reason: "broke off before it answered"}
	op, ok := errors.AsType[*net.OpError](err)
	ne, isNet := errors.AsType[net.Error](err)
	switch e, inStream := errors.AsType[*streamError](err); {
	case inStream:
		v.reason = e.reason
	case err == error(errAttemptTimeout):
		v.retrySameKey, v.reason = false, "did not answer in time"
	case err == error(errConnectTimeout):
		v.retrySameKey, v.unsent, v.reason = false, true, "could not be reached in time"
	case ok && op.Op == "dial" || errors.Is(err, errForbiddenAddress):
		v.unsent, v.reason = true, "could not be reached"
	case isNet && ne.Timeout():
		v.retrySameKey, v.reason = false, "did not answer in time"
	}
	t.current.health.recordFailure(now, t.startedAt, v.unsent, "the provider "+v.reason)
	return v
}

// hasErrorCode reports whether an error in OpenAI's or Anthropic's shape has a
// code or type.
func hasErrorCode(body []byte, code string) bool {
	var e struct{ Error struct{ Code, Type any } }
	_ = json.Unmarshal(body, &e) // what cannot be read has no code
	return e.Error.Code == code || e.Error.Type == code
}

// isContextTooLong reports whether an error says that the call is too long for the
// model: OpenAI has a code for it, Anthropic and others only words.
func isContextTooLong(body []byte) bool {
	if hasErrorCode(body, "context_length_exceeded") {
		return true
	}
	var e struct{ Error struct{ Message string } }
	_ = json.Unmarshal(body, &e)
	return strings.HasPrefix(e.Error.Message, "prompt is too long") || strings.Contains(e.Error.Message, "maximum context length")
}
