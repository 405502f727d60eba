// This room ends a call: what became of it, what it used and cost, its ledger
// row, its log line. It runs on every path, also when the answer was cut, and
// never under the request's own context, which is over by then.
package main

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
	"time"
)

// newStoredContent begins to keep a call's content, if its project asks for it.
func (p *proxy) newStoredContent(c *call) *storedContent {
	days := c.project.policy.KeepContentDays
	if days == 0 {
		return nil
	}
	age := min(time.Duration(days)*24*time.Hour, p.cfg.retention) // never longer than the call's own row
	k := &storedContent{memory: p.bodies, maxBytes: p.cfg.maxContentBytes, expiresAt: c.start.Add(age).UnixMilli()}
	k.add(&k.request, c.body)
	return k
}

// overhead is what a call that reached a provider and was answered took of this
// program's own: until it was sent on, without the time the client took to send
// its body, and from the provider's head to the first byte that left.
func (c *call) overhead() time.Duration {
	if c.times.sentAt.IsZero() || c.times.headersAt.IsZero() || c.times.firstByte == 0 {
		return 0
	}
	return c.times.firstByte - c.times.bodyRead - c.times.headersAt.Sub(c.times.sentAt)
}

// settle is deferred by handleV1 for every admitted call.
func (p *proxy) settle(c *call, r *http.Request) {
	now, row := time.Now(), &c.entry.row
	c.times.settledAt = now
	row.totalUS = now.Sub(c.start).Microseconds()
	row.attempts = c.attemptCount
	row.upstream = c.upstream.seq
	row.outcome, row.errorCode, row.status = c.classifyOutcome(r)
	row.firstByteUS = -1
	if c.times.firstByte > 0 {
		row.firstByteUS = c.times.firstByte.Microseconds()
	}
	c.fillUsage(row)
	c.attempts.finish(row, now.UnixMilli())
	row.cost, row.priced, row.modelTracked = c.prices.price(c.upstream.provider, row.model, row.counts)
	row.requestedModel, row.limitHit, row.wouldRefuse = c.fields.model, c.reservation.monitorOnlyLimit, c.reservation.monitorOnlyLimit != ""
	if ended := abortCause(c.ctx); ended != nil && ended.limit != "" {
		row.limitHit, row.wouldRefuse = ended.limit, false
	}
	known := row.modelTracked || row.outcome == outcomeOK
	row.modelTracked = known && c.token.trackModel(row.model)
	row.requestedModelTracked = known && c.token.trackModel(row.requestedModel)
	if row.source == usageNone {
		row.cost, row.priced = 0, false
	}
	if row.outcome == outcomeRefused {
		c.token.refund() // nor does the ledger count it
	}
	if c.storedContent != nil && row.outcome != outcomeRefused {
		var err error
		if row.content, err = p.contentKey.seal(c.id, c.project.seq, c.storedContent); err != nil {
			p.log.Error("content could not be kept", "request_id", c.requestID, "error", err)
		}
	}
	spent := finalUsage{forwarded: row.outcome != outcomeRefused, tokens: row.counts.input + row.counts.output, dollars: row.cost}
	if !row.priced {
		spent.dollars = 0 // as in the sums
	}
	c.reservation.settle(now.UnixMilli(), spent, func() { p.ledger.settle(c.entry) })
	p.metrics.countCall(c.endpoint, row, &forwardedCall{c.project.id, c.upstream.provider, c.prices, c.overhead()})
	if c.response != nil && c.response.sse {
		p.metrics.activeStreams.Add(-1)
	}
	if c.response != nil && c.response.keyMask.found {
		p.log.Error("the provider's answer held its key; it was masked", "request_id", c.requestID, "upstream", c.upstream.id)
	}
	p.logCall(c, row, now)
}

// classifyOutcome says how the call ended, with the client's view of it: the error code
// it got, or why the answer broke off, and its status.
func (c *call) classifyOutcome(r *http.Request) (callOutcome, string, int) {
	a := c.response
	switch {
	case c.commitFailed:
		return outcomeRefused, "ledger_unavailable", http.StatusServiceUnavailable
	case c.failure != nil:
		o := outcomeRefused
		if c.attemptCount > 0 {
			o = outcomeTruncated // the provider had it, and may bill it
		}
		if c.attemptCount > 0 && (c.failure.status == http.StatusBadGateway || c.failure.status == http.StatusGatewayTimeout) {
			o = outcomeUpstreamError
		}
		return o, c.failure.recordCode(), c.failure.status
	case a == nil || a.status == 0:
		return outcomeClientGone, "client_gone", statusClientClosed
	case !c.relayed || a.clientGone: // ReverseProxy panicked, or the last bytes had no taker
		if cause := abortCause(c.ctx); cause != nil {
			return outcomeTruncated, cause.recordCode(), a.status
		}
		if a.clientGone || r.Context().Err() != nil {
			return outcomeClientGone, "client_gone", a.status
		}
		return outcomeTruncated, "upstream_cut", a.status
	case a.status >= 400:
		return outcomeUpstreamError, "", a.status
	case a.meter.failed:
		return outcomeUpstreamError, "error_in_stream", a.status
	case a.sse && !a.meter.done && c.endpoint.hasEndMarker():
		return outcomeTruncated, "stream_unfinished", a.status
	}
	return outcomeOK, "", a.status
}

// hasEndMarker reports whether a stream of this endpoint says that it is complete.
func (e *endpoint) hasEndMarker() bool {
	switch e.pattern {
	case "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages":
		return true
	}
	return false
}

// fillUsage fills in what the answer says was used, or an estimate of it: no
// usage is silently zero.
func (c *call) fillUsage(row *requestRow) {
	row.counts, row.source = tokenCounts{}, usageNone
	if c.endpoint.meter == meterNone || c.attemptCount == 0 {
		return
	}
	if c.response == nil || c.response.meter == nil {
		held := c.progress.outputTokens.Load() // of a stream that was held back, and never became whole
		if c.failure == nil || c.failure.status == http.StatusGatewayTimeout && c.failure != errConnectTimeout || abortCause(c.ctx) != nil || c.commitFailed || held > 0 {
			// We or the client gave up on a provider that had the request and may bill it.
			row.counts, row.source = tokenCounts{input: c.inputEstimate(), output: held}, usageEstimated
		}
		return
	}
	m := c.response.meter
	if m.model != "" {
		row.model = m.model
	}
	row.counts, row.source = m.counts, m.source()
	if row.source != usageEstimated {
		return
	}
	if strings.HasPrefix(c.endpoint.pattern, "/v1/images/") || c.endpoint.pattern == "/v1/moderations" {
		row.counts, row.source = tokenCounts{}, usageNone // their bytes say nothing of tokens; moderation is free
	} else if row.counts.input == 0 {
		row.counts.input = c.inputEstimate()
	}
}

// price returns what counts of a model cost, whether that is known, and whether
// the model is one with a price.
func (t *priceTable) price(provider, model string, counts tokenCounts) (nanos int64, priced, known bool) {
	p, ok := t.lookup(provider, model)
	if !ok {
		return 0, false, false
	}
	nanos, priced = p.cost(counts)
	return nanos, priced, true
}

// refuse answers a call that was not admitted. A known token's refusal is put
// on record, though not more often than once a second for one token: a client
// that tries again and again must not fill the disk. All are in the sums.
func (p *proxy) refuse(c *call, w http.ResponseWriter, r *http.Request, err error) {
	e := asAPIError(err)
	row := requestRow{id: c.id, started: c.start.UnixMilli(), address: c.address, stream: c.fields.stream, model: c.fields.model,
		outcome: outcomeRefused, errorCode: e.recordCode(), status: e.status, source: usageNone, firstByteUS: -1, limitHit: e.limit}
	if c.endpoint != nil {
		row.endpoint = c.endpoint.name()
	}
	at := time.Now()
	row.totalUS = at.Sub(c.start).Microseconds()
	if c.token != nil && p.ledger.healthy() {
		row.project, row.token = c.project.seq, c.tokenState.seq
		wait, _ := c.token.refusals.allow(c.start)
		p.ledger.recordRefused(&row, wait == 0)
	}
	if r.ContentLength != 0 && (c.ctx == nil || c.ctx.Err() == nil) {
		// net/http reads on before it answers, so as to keep the connection.
		// Who is refused, above all who has no token, must not hold it by
		// sending nothing.
		_ = c.controller.SetReadDeadline(time.Now().Add(refusedBodyGrace))
	}
	_ = c.controller.SetWriteDeadline(time.Now().Add(writeTimeout))
	c.failure = e
	if c.token != nil {
		l := &c.token.project.limiter
		l.mu.Lock()
		c.rates = c.token.rateHeaders(c.tokenState.maxRequests, row.started)
		l.mu.Unlock()
	}
	c.rates.write(w.Header())
	writeError(w, e, c.anthropic)
	p.metrics.countCall(c.endpoint, &row, nil)
	p.logCall(c, &row, at)
}

// logCall writes the call's one log line, at the call's end: never a header, body,
// query or key.
func (p *proxy) logCall(c *call, row *requestRow, at time.Time) {
	level := slog.LevelInfo // what clients do wrong is theirs
	if row.status >= 500 {
		level = slog.LevelWarn // the provider's trouble
		if row.outcome == outcomeRefused {
			level = slog.LevelError // ours
		}
	}
	if !p.log.Enabled(context.Background(), level) {
		return
	}
	var left int64
	if c.token == nil { // whatever went wrong: anyone can cause it
		var wait time.Duration
		if wait, left = p.logThrottle.allow(c.start); wait > 0 {
			p.metrics.suppressedLogLines.Add(1)
			return
		}
	}
	line := p.log.beginLine(at, level, "call")
	defer line.end()
	if left > 0 {
		line.num("lines_left_out", left)
	}
	line.str("request_id", c.requestID)
	line.str("route", row.endpoint)
	line.num("status", int64(row.status))
	line.str("outcome", string(row.outcome))
	if row.errorCode != "" {
		line.str("code", row.errorCode)
	}
	if row.limitHit != "" {
		name := "limit"
		if row.wouldRefuse {
			name = "shadow_limit"
		}
		line.str(name, row.limitHit)
	}
	if c.token != nil {
		line.str("token", c.tokenState.id)
		line.str("project", c.project.id)
	}
	line.str("address", row.address)
	if c.trace.traceID != "" {
		line.str("trace_id", c.trace.traceID)
		line.str("span_id", c.trace.spanID)
	}
	if row.model != "" {
		line.str("model", clip(row.model, 256))
	}
	if c.entry != nil {
		line.flag("stream", row.stream)
		line.str("usage", string(row.source))
		line.num("input_tokens", row.counts.input)
		line.num("output_tokens", row.counts.output)
		line.num("first_byte_us", row.firstByteUS)
		if c.response != nil && c.response.providerRequestID != "" {
			line.str("provider_request_id", c.response.providerRequestID)
		}
	}
	if c.failure != nil && c.failure.cause != nil && row.status >= 500 {
		text := c.failure.cause.Error()
		if c.entry != nil { // net/http quotes what it could not read of an answer, which may quote the key
			text = strings.ReplaceAll(text, c.upstream.key(), hiddenSecret)
		}
		line.str("error", clip(text, 1024))
	}
	line.num("total_us", row.totalUS)
}
