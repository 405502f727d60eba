// This file makes a call's attempts. It stands where ReverseProxy expects its transport and tries upstreams in
// turn until one has answered. Nothing reaches the client before RoundTrip has returned, and nothing is sent
// again after that. Of the client's body it may replace the model's name, and take back what the proxy has added.
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
	"sync/atomic"
	"time"
)

const (
	maxAttempts     = 5
	sameKeyWindow   = time.Minute // after its start, a call is sent to the same key again within this time only
	maxRetryAfterMS = 2_000       // the longest Retry-After to wait for, if no other upstream is left
)

// attempts makes the attempts of one call and is its transport. It belongs to the goroutine of the call.
type attempts struct {
	p *proxy
	c *call

	current       attempt       // its upstream is nil while no attempt is under way
	route                       // where the call was, and where it may still go
	log           []attemptLine // the attempts that have ended, and why
	connected     atomic.Bool   // the attempt has a connection; recorded only if outcomeUnknown needs it
	plainFor      *upstream     // gets the call without the stream_options that the proxy has added
	mayBeBilled   bool          // the call failed, but its provider may have run it
	savedResponse *savedResponse
	lastFault     faultKind     // of the last answer
	merged        *mergedModels // not nil: the call merges lists of models
}

// An attemptLine is one line of a call's attempt log, as stored and shown.
type attemptLine struct {
	Upstream string `json:"upstream_id"`      // "": the answer came from the cache
	Alias    string `json:"alias,omitempty"`  // what the client calls the model, if that is an alias
	Model    string `json:"model"`            // as sent to this upstream
	Status   int    `json:"status,omitempty"` // of the provider's answer
	Error    string `json:"error,omitempty"`  // what was wrong, in the proxy's words
	MS       int64  `json:"ms"`
}

// A savedResponse is a provider's error, complete in memory. The client gets it if later attempts end worse.
type savedResponse struct {
	res      *http.Response
	upstream *upstream
	fault    faultKind
}

// RoundTrip makes attempts until one is good enough for the client or none is left.
func (t *attempts) RoundTrip(req *http.Request) (*http.Response, error) {
	if list := t.modelSources(); list != nil {
		return t.mergeModels(req, list)
	}
	for {
		res, err := t.attempt(req)
		if t.askWithoutUsage(res, err) {
			continue
		}
		decision := t.classify(res, err)
		if t.mayBeBilled = t.outcomeUnknown(res, err); t.mayBeBilled {
			return res, err
		}
		if !t.retry(&decision, res, err) {
			return t.bestResponse(res, err)
		}
	}
}

// outcomeUnknown reports whether an attempt failed in a way that does not tell whether the provider has run the call:
// it had a connection and broke off or took too long, or a gateway before the provider says so. A call that is billed
// by the picture or by the sound is not sent again then, because it might be paid for twice.
func (t *attempts) outcomeUnknown(res *http.Response, err error) bool {
	switch {
	case !billedWithoutUsage(t.c.endpoint.name()):
		return false
	case err != nil:
		e, said := errors.AsType[*streamError](err) // said: the provider itself says that the call failed
		return t.connected.Load() && !(said && e.problem == errorInStream)
	}
	status := cmp.Or(t.current.fault.status, res.StatusCode)
	return slices.Contains([]int{http.StatusBadGateway, http.StatusGatewayTimeout, 520, 524}, status) // Cloudflare
}

// attempt makes one attempt at the call's upstream and counts it. The attempt stays current until it ends.
func (t *attempts) attempt(req *http.Request) (*http.Response, error) {
	a := t.newAttempt()
	res, err := a.roundTrip(req)
	if err != nil {
		t.p.metrics.countAttempt(a.upstream, resultOfError(upstreamFailure(t.c, err)))
		return nil, err
	}
	t.p.metrics.countAttempt(a.upstream, resultOfStatus(cmp.Or(a.fault.status, res.StatusCode)))
	return res, nil
}

// An attempt is one request to one upstream, from newAttempt to end. It has its own time limit, and counts as
// a running call of the upstream.
type attempt struct {
	t         *attempts
	upstream  *upstream
	model     string // the model's name as this upstream gets it
	plain     bool   // it gets the body without the stream_options that the proxy has added
	start     time.Time
	startedAt int64 // start in unix milliseconds
	timeout   time.Duration
	forSpare  bool        // timeout is the time after which a spare gets the call: the upstream alone would have more
	hasSpare  bool        // another upstream can answer instead
	fault     fault       // the answer is an error despite its status 200
	timer     *time.Timer // ends an attempt that brings no answer in time; nil: only the watchdog does
	cancel    context.CancelCauseFunc
}

// newAttempt begins an attempt at the call's upstream and makes it current. The one before has ended.
func (t *attempts) newAttempt() *attempt {
	c, u, startedAt := t.c, t.c.upstream, t.c.times.sentAt
	t.connected.Store(false)
	if c.attemptCount > 0 {
		startedAt = time.Now()
	}
	c.attemptCount++
	u.health.running.Add(1)
	u.retryBudget.earn()
	c.setPhase(phaseProvider)
	model := u.mapModel(cmp.Or(t.fallbackModel, c.fields.model))
	t.current = attempt{t: t, upstream: u, model: model, start: startedAt, startedAt: startedAt.UnixMilli()}
	t.current.plain = c.usageAdded && (t.plainFor == u || !u.health.takesUsage(t.current.startedAt))
	return &t.current
}

// An attemptEnd says how an attempt has ended.
type attemptEnd struct {
	status   int    // of the provider's answer; 0: none
	reason   string // what was wrong, in the proxy's words
	recorded bool   // classify has recorded the result in the key's health
	complete bool   // the answer is good and complete
	cut      bool   // the answer broke off or stalled
}

// end is the one exit of an attempt: it releases the context, ends the upstream's running call, records the
// result in the key's health, and returns the line for the attempt log.
func (a *attempt) end(now int64, e attemptEnd) attemptLine {
	if a.cancel != nil {
		a.cancel(nil)
	}
	h := a.upstream.health
	h.running.Add(-1)
	switch {
	case e.recorded: // that ended the probe, too
	case e.complete:
		h.recordSuccess(now, a.startedAt, true)
		h.resumeModel(a.t.c.endpoint.pattern, cmp.Or(a.t.fallbackModel, a.t.c.fields.model))
	case e.cut:
		h.recordFailure(now, a.startedAt, false, "the provider's answer broke off or stalled")
	default:
		h.endProbe()
	}
	line := attemptLine{Upstream: a.upstream.id, Alias: a.t.c.alias, Model: a.model, Status: e.status, Error: e.reason,
		MS: time.Since(a.start).Milliseconds()}
	*a = attempt{}
	return line
}

// roundTrip sends the attempt's request. If chooseTimeout sets a limit, an answer must begin within it, and a
// stream must bring its first event. Buffered streams and lists to be merged are read to their end.
func (a *attempt) roundTrip(req *http.Request) (*http.Response, error) {
	t := a.t
	if billedWithoutUsage(t.c.endpoint.name()) {
		req = traceConnection(req, &t.connected)
	}
	out, err := a.buildRequest(req)
	if err != nil {
		return nil, err
	}
	if a.timeout = a.chooseTimeout(); a.timeout == 0 && !t.c.bufferStream && t.merged == nil {
		return a.upstream.send(t.p.transport, out)
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	a.cancel = cancel
	a.timer = time.AfterFunc(cmp.Or(a.timeout, t.p.cfg.upstreamTimeout), func() { cancel(errAttemptTimeout) })
	res, err := a.upstream.send(t.p.transport, out.WithContext(ctx))
	if err == nil {
		err = a.readStart(res)
	}
	if a.timer.Stop(); context.Cause(ctx) == error(errAttemptTimeout) {
		if err == nil {
			res.Body.Close()
		}
		return nil, errAttemptTimeout
	}
	if err != nil {
		return nil, err
	}
	return res, nil
}

// readStart reads the part of an answer that must come while the attempt's time is limited.
func (a *attempt) readStart(res *http.Response) error {
	switch {
	case res.StatusCode >= 400:
		peekBody(res)
	case res.StatusCode == http.StatusOK && a.t.merged != nil:
		return a.readModelPage(res)
	case res.StatusCode >= 300 || res.StatusCode == http.StatusNoContent || res.Request.Method == http.MethodHead:
	case a.t.c.bufferStream && mediaType(res.Header.Get("Content-Type")) == "text/event-stream":
		return a.bufferStream(res)
	case a.hasSpare:
		return a.checkStart(res)
	}
	return nil
}

// readModelPage reads a page to its end while its time is limited and leaves it in the answer's body. It masks
// the provider's key, because responseWriter searches the client's answer for one upstream's key only.
func (a *attempt) readModelPage(res *http.Response) error {
	n := a.t.merged
	defer res.Body.Close()
	page, err := io.ReadAll(io.LimitReader(res.Body, int64(n.bytesLeft)+1))
	if err != nil {
		return err
	}
	if len(page) > n.bytesLeft {
		return errModelList.withCause(errors.New("the lists of models are too large"))
	}
	n.bytesLeft -= len(page)
	mask := a.upstream.newKeyMask()
	if page = append(mask.redact(page), mask.flush()...); mask.found {
		a.t.p.log.Error("a provider's list of models contained its key; the key was masked",
			"request_id", a.t.c.requestID, "upstream", a.upstream.id)
	}
	res.Body = &peekedBody{ReadCloser: http.NoBody, peeked: page, unread: page, complete: true}
	return nil
}

// chooseTimeout returns how long the answer may take to begin; 0 means no limit but the watchdog's. While an
// upstream is left that the call can go on to, the attempt ends in time for that: an answer in one piece has
// UPSTREAM_TIMEOUT, as without a spare, and only a stream is given to a spare earlier. answer_ms replaces
// UPSTREAM_TIMEOUT for answers in one piece, with or without a spare. It does not apply to streamed uploads, which
// take as long as the client does, nor to a list of models while other upstreams can make up the answer.
func (a *attempt) chooseTimeout() time.Duration {
	settings, c, most := &a.upstream.settings, a.t.c, a.t.p.cfg.upstreamTimeout
	stream, alternative := c.fields.stream, a.t.hasAlternative()
	a.hasSpare = a.t.hasNext() || a.t.slow.upstream != nil
	switch {
	case settings.AnswerMS > 0 && !stream && c.replayable() && (a.t.merged == nil || !alternative):
		return min(most, time.Duration(settings.AnswerMS)*time.Millisecond)
	case alternative && (stream || c.endpoint.listsModels()):
		first := cmp.Or(time.Duration(settings.FirstEventMS)*time.Millisecond, a.t.p.cfg.firstEventTimeout)
		a.forSpare = first < most
		return min(most, first)
	case a.hasSpare:
		return most
	}
	return 0
}

// buildRequest returns the attempt's request. The first attempt uses ReverseProxy's own. A later one shares no
// map with it, because the transport may still be sending it, and drops the key and account of the one before.
func (a *attempt) buildRequest(req *http.Request) (*http.Request, error) {
	c, out := a.t.c, req
	if c.attemptCount > 1 {
		out = req.WithContext(req.Context())
		out.Header = req.Header.Clone()
		for _, name := range [...]string{
			"Authorization", "X-Api-Key", "Api-Key", "X-Goog-Api-Key", "Openai-Organization", "Openai-Project"} {
			delete(out.Header, name)
		}
	}
	path, query := c.match.path, c.query
	if c.endpoint.modelInPath && a.model != c.askedModel() {
		path = c.endpoint.pathForModel(a.model, path)
	}
	if a.t.merged != nil {
		query = a.t.merged.query
	}
	if a.upstream.provider != providerAzure {
		query = withoutAzureVersion(query)
	}
	body, err := a.buildBody()
	if err != nil {
		return nil, err
	}
	if body != nil { // the checked bytes, which are in memory
		out.Body, out.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		out.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	}
	out.URL = a.upstream.url(path, query) // URL and key always come from the same upstream
	a.upstream.authorize(out.Header)
	return out, nil
}

// buildBody returns the call's body with the model's name that this upstream uses, and without stream_options if it
// refuses those that the proxy has added.
func (a *attempt) buildBody() ([]byte, error) {
	c := a.t.c
	rename := a.model != c.askedModel() && c.body != nil && c.canChangeModel()
	if !rename && !a.plain {
		return c.body, nil
	}
	if err := c.memory.reserve(int64(len(c.body) + len(a.model))); err != nil {
		return nil, err
	}
	body := c.body
	if a.plain {
		body = withoutIncludeUsage(body, c.fields)
	}
	switch {
	case rename && c.endpoint.api == apiGemini && c.endpoint.modelInPath:
		body = withGeminiModel(body, a.model)
	case rename:
		body = withModel(body, c.fields, c.usageAdded && !a.plain, a.model)
	}
	return body, nil
}

// askWithoutUsage reports whether the call's upstream gets the call again without the stream_options that the proxy
// has added, because it refuses them; the attempt has ended then. The client must not see an error about a field that
// it did not send. An answer to the second attempt is remembered for the upstream.
func (t *attempts) askWithoutUsage(res *http.Response, err error) bool {
	c, a, u := t.c, &t.current, t.current.upstream
	if err != nil || !c.usageAdded {
		return false
	}
	now := time.Now().UnixMilli()
	failed := res.StatusCode >= 400 || a.fault.kind != faultNone // which may come with status 200
	if a.plain || !failed {
		if t.plainFor == u && !failed {
			u.health.usageRefused.Store(now + usageRefusedMS)
		}
		return false
	}
	status := cmp.Or(a.fault.status, res.StatusCode)
	if c.ctx.Err() != nil || !refusesUsage(status, peekBody(res)) || !t.reserveCapacity(now) {
		return false
	}
	u.health.recordSuccess(now, a.startedAt, true)
	saved := t.savedResponse // stays: this one is not for the client
	t.endAttempt("refuses stream_options", res)
	t.savedResponse, t.plainFor = saved, u
	return true
}

// A retryDecision says what an attempt means for the call. Unless it is final, the call may be sent again; the
// zero value sends it to another upstream.
type retryDecision struct {
	final        bool   // the client gets this answer or error
	retrySameKey bool   // the fault may be momentary: the same key may be tried once more
	tooLong      bool   // the call is too long for the model: only a fallback model can help
	fault        bool   // the provider is in trouble, not this key alone: a retry costs retry budget
	retryAfterMS int64  // how long the provider asks to wait; 0: it does not say
	reason       string // for the attempt log
}

// classify decides what an attempt means and records it in the key's health.
func (t *attempts) classify(res *http.Response, err error) retryDecision {
	t.lastFault = faultNone
	isFault := t.current.fault.kind != faultNone
	if err == nil && res.StatusCode == http.StatusOK && !isFault && t.current.upstream.health.ready() { // nearly always
		return retryDecision{final: true}
	}
	now := time.Now()
	ms := now.UnixMilli()
	if err != nil {
		return t.classifyError(err, ms)
	}
	if isFault || t.c.isNotModified(res.StatusCode) {
		return t.applyFault(&t.current.fault, ms)
	}
	var text []byte
	if _, peeked := res.Body.(*peekedBody); peeked || needsText(res.StatusCode) {
		text = peekBody(res)
	}
	f := judgeStatus(res.StatusCode, res.Header.Get, text, now)
	return t.applyFault(&f, ms)
}

// applyFault records a judgment in the health of the key and returns what it means for the call.
func (t *attempts) applyFault(f *fault, now int64) retryDecision {
	h, began := t.current.upstream.health, t.current.startedAt
	t.lastFault = f.kind
	d := retryDecision{retrySameKey: f.momentary, reason: f.reason, retryAfterMS: f.waitMS}
	switch f.kind {
	case faultKey:
		h.recordRejected(now, began, f.health)
	case faultQuota:
		h.recordExhausted(now, began, f.health)
	case faultRate:
		h.recordRateLimit(now, began, f.waitMS, f.health)
	case faultProvider:
		h.recordFailure(now, began, false, f.health)
		d.fault = true
	case faultCall: // says nothing about the key
		h.endProbe()
	case faultModel:
		h.recordSuccess(now, began, true)
		if want := t.criteria(); want.model != "" && !t.c.endpoint.isAboutModel() {
			h.pauseModel(now, want.endpoint, want.model, f.health)
		}
	case faultTooLong:
		h.recordSuccess(now, began, true)
		d.tooLong, d.final = true, t.availableFallback() == ""
	default: // an error here is the client's fault; without one, the key works
		h.recordSuccess(now, began, f.kind == faultRequest)
		d.final = f.status != http.StatusNotFound || !t.c.endpoint.isAboutModel() // another upstream may know the model
	}
	return d
}

// classifyError is classify for an attempt without an answer that can be used.
func (t *attempts) classifyError(err error, now int64) retryDecision {
	if t.c.ctx.Err() != nil { // the client left, or the watchdog ended the call
		return retryDecision{final: true}
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return retryDecision{final: true}
	}
	if e, ok := errors.AsType[*apiError](err); ok && e != errAttemptTimeout && e != errConnectTimeout {
		return retryDecision{final: true} // the proxy's own error
	}
	d := retryDecision{retrySameKey: true, fault: true, reason: "broke off before it answered"}
	unsent := false // it is certain that the provider has not received the request
	netErr, isNet := errors.AsType[net.Error](err)
	switch e, isStream := errors.AsType[*streamError](err); {
	case isStream:
		d.reason = e.problem
	case err == error(errAttemptTimeout):
		d.retrySameKey, d.reason = false, "did not answer in time"
	case err == error(errConnectTimeout):
		d.retrySameKey, unsent, d.reason = false, true, "could not be reached in time"
	case isDialError(err):
		unsent, d.reason = true, "could not be reached"
	case isNet && netErr.Timeout():
		d.retrySameKey, d.reason = false, "did not answer in time"
	}
	t.current.upstream.health.recordFailure(now, t.current.startedAt, unsent, "the provider "+d.reason)
	return d
}

// retry reports whether the call is sent again. If so, the current attempt has ended, and the call's upstream
// is the one that gets the next. As long as one is left that can answer, time does not matter: a client that has
// waited for one upstream waits for the next, or leaves.
func (t *attempts) retry(d *retryDecision, res *http.Response, err error) bool {
	c, u, now := t.c, t.current.upstream, time.Now().UnixMilli()
	if d.final || !t.retryable() || c.attemptCount >= maxAttempts || c.ctx.Err() != nil {
		return false
	}
	if t.current.forSpare && err == error(errAttemptTimeout) && t.slow.upstream == nil {
		t.slow = slowUpstream{u, t.fallbackModel}
	}
	want := t.criteria()
	f := failedAttempt{upstream: u, fault: d.fault, tooLong: d.tooLong, fallback: t.availableFallback()}
	early := time.Since(c.start) <= sameKeyWindow
	if d.retrySameKey && early && u.health.available(now) && t.reserveSameKey(c.project, &want, &f, true) {
		return t.retrySameKey(d, res, time.Duration(50+rand.IntN(150))*time.Millisecond)
	}
	next, model := t.pickNext(c.project, &want, &f), t.fallbackModel
	if next == nil && d.retryAfterMS > 0 && d.retryAfterMS <= maxRetryAfterMS && early &&
		t.reserveSameKey(c.project, &want, &f, d.fault) {
		return t.retrySameKey(d, res, time.Duration(d.retryAfterMS)*time.Millisecond)
	}
	if next == nil {
		next, model = t.pickLast(c.project, want, &f)
	}
	if next == nil {
		return false
	}
	t.endAttempt(d.reason, res)
	t.moveOn(u, model)
	c.setUpstream(next)
	return true
}

// retrySameKey ends the attempt after a pause, so that the same key is tried once more. It returns false if the
// call ends first.
func (t *attempts) retrySameKey(d *retryDecision, res *http.Response, pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.c.ctx.Done():
		t.current.upstream.health.unreserve(time.Now().UnixMilli(), t.c.inputEstimate(), &t.current.upstream.settings)
		return false
	}
	t.retriedSameKey = true
	t.endAttempt(d.reason, res)
	return true
}

// endAttempt ends an attempt that is followed by another. classify has recorded its result.
func (t *attempts) endAttempt(reason string, res *http.Response) {
	e := attemptEnd{reason: reason, recorded: true}
	if res != nil {
		e.status = res.StatusCode
		body, ok := res.Body.(*peekedBody)
		if ok && body.complete && (t.savedResponse == nil || !t.lastFault.isPrivate()) {
			t.savedResponse = &savedResponse{res, t.current.upstream, t.lastFault}
		}
		res.Body.Close()
	}
	t.log = append(t.log, t.current.end(time.Now().UnixMilli(), e))
}

// bestResponse returns the answer for the client: the last one, unless an earlier one is more useful. An error about
// a fallback model says less to the client than one about the model that it has asked for.
func (t *attempts) bestResponse(res *http.Response, err error) (*http.Response, error) {
	useful := err == nil && !t.lastFault.isPrivate() && (t.fallbackModel == "" || res.StatusCode < 400)
	if t.savedResponse == nil || useful || t.c.ctx.Err() != nil {
		return res, err
	}
	if res != nil {
		res.Body.Close()
	}
	t.c.setUpstream(t.savedResponse.upstream)
	t.lastFault = t.savedResponse.fault
	return t.savedResponse.res, nil
}

// finish ends the last attempt after the call, however the call ended, and adds the attempts to its row.
func (t *attempts) finish(row *requestRow, now int64) {
	c, a := t.c, &t.current
	if a.upstream == nil { // the call was never sent
		c.unreserveUpstream()
		return
	}
	m, answered := c.response.meter, c.upstream == a.upstream // otherwise the client got an earlier answer
	if t.fallbackModel != "" && (m == nil || m.model == "") {
		row.model = t.fallbackModel // the answer does not name one
	}
	if row.source == usageExact {
		used := row.counts.input + row.counts.output
		a.upstream.health.correctUsage(a.startedAt, c.inputEstimate(), used, &a.upstream.settings)
	}
	e := attemptEnd{reason: row.errorCode, complete: row.outcome == outcomeOK && answered,
		recorded: a.fault.kind != faultNone}
	switch row.errorCode {
	case "upstream_cut", "stream_idle":
		e.cut = true
	case "error_in_stream": // in a stream that was not checked, or had begun
		if !e.recorded && answered && m != nil {
			f := judgeEmbedded(m.errorEvent, 0)
			t.applyFault(&f, now)
			e.recorded = true
		}
	case "upstream_timeout": // if the attempt itself timed out, classify has recorded that
		e.cut = abortCause(c.ctx) != nil
	}
	if t.merged != nil {
		e.status, e.reason = t.merged.lastStatus, cmp.Or(row.errorCode, t.merged.lastReason)
	}
	if m != nil && answered {
		e.status = row.status
	}
	line := a.end(now, e)
	if len(t.log) == 0 && c.alias == "" {
		return // the row already describes a single attempt
	}
	row.attemptLog = formatAttemptLog(append(t.log, line)...)
}

func formatAttemptLog(lines ...attemptLine) string {
	text, _ := json.Marshal(lines) // strings and numbers: it cannot fail
	return string(text)
}

// hasAlternative reports whether the call could go on to another upstream or model now, if its provider had it and
// did not answer.
func (t *attempts) hasAlternative() bool {
	return !billedWithoutUsage(t.c.endpoint.name()) && t.hasNext()
}

// hasNext reports whether the call could go on to another upstream or model now, if its provider said that it failed.
func (t *attempts) hasNext() bool {
	if !t.retryable() || t.c.attemptCount >= maxAttempts {
		return false
	}
	want := t.criteria()
	if t.c.project.hasAlternative(&want) {
		return true
	}
	want.model, want.tried = t.availableFallback(), nil
	return want.model != "" && t.c.project.hasAlternative(&want)
}

// retryable reports whether the call may be sent more than once: its body can be, it is not pinned to one
// upstream, and the project has another upstream or a fallback model.
func (t *attempts) retryable() bool {
	p := t.c.project
	more := len(p.upstreams) > 1 || len(p.routing.Fallbacks) > 0 || len(t.c.models) > 1
	return more && !t.c.pinned() && t.c.replayable()
}

// availableFallback returns the model that the call can still fall back to, "" if there is none. A call falls
// back once, and only to a model that the policies allow.
func (t *attempts) availableFallback() string {
	c := t.c
	if next := t.fallbacks + 1; next < len(c.models) {
		return c.models[next]
	}
	if t.fallbacks > 0 || len(c.project.routing.Fallbacks) == 0 || !c.canChangeModel() {
		return ""
	}
	if to := c.project.routing.fallbackFor(c.fields.model); to != "" && c.mayUseModel(to) {
		return to
	}
	return ""
}

// criteria returns what the call requires of its next upstream.
func (t *attempts) criteria() criteria {
	want := t.c.criteria(time.Now().UnixMilli())
	want.model, want.healthyOnly = cmp.Or(t.fallbackModel, want.model), true
	want.api = t.current.upstream.family() // an endpoint of both families stays with the first attempt's
	want.tried = append(slices.Clip(t.tried), t.current.upstream)
	return want
}

// reserveCapacity reserves one more attempt in the current key's own limits.
func (t *attempts) reserveCapacity(now int64) bool {
	u := t.current.upstream
	return u.health.admits(now, t.c.inputEstimate(), &u.settings, true)
}

// mayUseModel reports whether the policies of both project and token allow a model.
func (c *call) mayUseModel(model string) bool {
	return c.project.policy.allowsModel(model) && c.tokenState.policy.allowsModel(model)
}

// canChangeModel reports whether the call can be sent with another model.
func (c *clientRequest) canChangeModel() bool {
	e := c.endpoint
	return c.fields.modelSplice.to != 0 || e.api == apiGemini && e.modelInPath && e.needsModel
}

// replayable reports whether the body can be sent again.
func (c *clientRequest) replayable() bool { return c.body != nil || !c.endpoint.upload }

// criteria returns what the call requires of an upstream.
func (c *call) criteria(now int64) criteria {
	return criteria{api: c.endpoint.api, endpoint: c.endpoint.pattern, model: c.fields.model, pinned: c.pinned(),
		affinity: c.affinity, tokens: c.inputEstimate(), now: now}
}

// pinned reports whether the call may name or create objects that a provider stores. They belong to one account,
// so one upstream gets all such calls.
func (c *call) pinned() bool {
	return c.endpoint.class == classStateful || c.fields.statefulParam != "" ||
		c.project.policy.Stateful && strings.HasPrefix(c.endpoint.pattern, "/v1/responses")
}
