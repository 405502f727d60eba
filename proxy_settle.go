// This file ends a call: its outcome, what it used and cost, its ledger row, its log line. It runs for every call,
// also where the answer was cut, and never under the request's own context, which may be over by then.
package main

import (
	"cmp"
	"context"
	"net/http"
	"strings"
	"time"
)

// newStoredContent starts to keep the call's content, if its project asks for it.
func (p *proxy) newStoredContent(c *call) *storedContent {
	days := c.project.policy.KeepContentDays
	if days == 0 {
		return nil
	}
	age := min(time.Duration(days)*24*time.Hour, p.cfg.retention) // never longer than the call's row
	sc := &storedContent{memory: &c.memory, maxBytes: p.cfg.maxContentBytes, expiresAt: c.start.Add(age).UnixMilli()}
	sc.add(&sc.request, c.body)
	return sc
}

// overhead is the time that the proxy itself took for an answered call: until it was sent on, without the time
// that the client took to send its body, and from the provider's headers to the first byte that left.
func (c *call) overhead() time.Duration {
	t := &c.times
	if t.sentAt.IsZero() || t.headersAt.IsZero() || t.firstByte == 0 {
		return 0
	}
	return t.firstByte - t.bodyRead - t.headersAt.Sub(t.sentAt)
}

// settle releases the call's reservation and finishes its row. handleV1 defers it for every admitted call.
func (p *proxy) settle(c *call, r *http.Request) {
	now, row := time.Now(), &c.entry.row
	c.times.settledAt = now
	row.totalUS, row.firstByteUS = now.Sub(c.start).Microseconds(), -1
	if c.times.firstByte > 0 {
		row.firstByteUS = c.times.firstByte.Microseconds()
	}
	row.attempts, row.upstream = c.attemptCount, c.upstream.seq
	row.outcome, row.errorCode, row.status = c.classifyOutcome(r)
	c.fillUsage(row)
	c.attempts.finish(row, now.UnixMilli())
	c.fillCost(row)
	p.recordRetry(c, r, row)
	p.settleCache(c, row)
	if c.response != nil && c.response.meter != nil && c.response.meter.implausible {
		row.errorCode = cmp.Or(row.errorCode, "usage_implausible")
		p.log.Warn("the provider reported token counts that cannot be; the call was estimated",
			"request_id", c.requestID, "upstream", c.upstream.id)
	}
	if c.settling.Store(true); c.unnamed.Load() {
		row.attribution = row.attribution.withEndUser("", nil)
		c.storedContent = nil // the calls that have ended have none left either
	}
	row.limitHit, row.wouldRefuse = c.reservation.monitorOnlyLimit, c.reservation.monitorOnlyLimit != ""
	if reason := abortCause(c.ctx); reason != nil && reason.limit != "" {
		row.limitHit, row.wouldRefuse = reason.limit, false
	}
	used := row.limitUsage()
	if used.forwarded && !row.priced && row.source != usageNone { // what it costs is not known, but it is not free
		used.dollars = addSat(c.reservation.estimate.inputCost, c.reservation.estimate.outputCost)
	}
	if !used.forwarded {
		c.token.refund() // the ledger does not count it either
	} else if c.storedContent != nil {
		var err error
		if row.content, err = p.contentKey.seal(c.id, c.project.seq, c.storedContent); err != nil {
			p.log.Error("content could not be stored", "request_id", c.requestID, "error", err)
		}
	}
	c.reservation.settle(p.limits.now(now), used, func(uses []limitUse) uint64 {
		row.limitUses = uses
		return p.ledger.settle(c.entry)
	})
	p.settleLate(c)
	p.metrics.countCall(c.endpoint, row, &forwardedCall{c.project.id, c.upstream.provider, c.prices, c.overhead()})
	if c.response != nil && c.response.sse {
		p.metrics.activeStreams.Add(-1)
	}
	if c.response != nil && c.response.keyMask.found {
		p.log.Error("the provider's answer contained its key; the key was masked",
			"request_id", c.requestID, "upstream", c.upstream.id)
	}
	p.logCall(c, row, now)
}

// settleLate records the usage of earlier calls that the call's answer tells: of a background response, or of a batch.
func (p *proxy) settleLate(c *call) {
	if c.response == nil || c.response.watch == nil && c.response.batch == nil {
		return
	}
	counted, err := p.limits.recordBatch(c.response.batch, &c.entry.row)
	if c.response.watch != nil {
		if c.relayed {
			c.response.watch.finish()
		}
		shown := shownResponse{id: responseID(c.match.path), project: c.project.seq, upstream: c.upstream.seq,
			meter:   c.response.watch,
			deleted: c.endpoint.method == http.MethodDelete, vendor: c.priceVendor(), prices: p.prices.Load()}
		row, responseErr := p.limits.settleResponse(&shown)
		counted, err = append(counted, row), responseErr
	}
	for i := range counted {
		if counted[i].counted {
			p.metrics.countUsage(&forwardedCall{c.project.id, c.upstream.provider, c.prices, 0}, &counted[i])
		}
	}
	if err != nil {
		p.log.Error("the usage of a background response or batch could not be recorded", "request_id", c.requestID,
			"error", err)
	}
}

// classifyOutcome returns how the call ended, and what its client saw: the error code, or the reason why the
// answer was cut, and the status.
func (c *call) classifyOutcome(r *http.Request) (outcome callOutcome, code string, status int) {
	answer := c.response
	switch {
	case c.commitFailed && c.attemptCount == 0:
		return outcomeRefused, "ledger_unavailable", http.StatusServiceUnavailable
	case c.failure != nil:
		outcome = outcomeRefused
		if c.attemptCount > 0 {
			outcome = outcomeTruncated // the provider had the request, and may bill it
			if c.failure.status == http.StatusBadGateway || c.failure.status == http.StatusGatewayTimeout {
				outcome = outcomeUpstreamError
			}
		}
		return outcome, c.failure.recordCode(), c.failure.status
	case answer == nil || answer.status == 0:
		return outcomeClientGone, "client_gone", statusClientClosed
	case !c.relayed || answer.clientGone: // ReverseProxy panicked, or the client did not take the last bytes
		if reason := abortCause(c.ctx); reason != nil {
			return outcomeTruncated, reason.recordCode(), answer.status
		}
		if answer.clientGone || r.Context().Err() != nil {
			return outcomeClientGone, "client_gone", answer.status
		}
		return outcomeTruncated, "upstream_cut", answer.status
	case answer.status >= 400:
		return outcomeUpstreamError, "", answer.status
	case answer.meter == nil: // from the cache
		return outcomeOK, "", answer.status
	case answer.meter.failed && answer.meter.isStream():
		return outcomeUpstreamError, "error_in_stream", answer.status
	case answer.meter.failed:
		return outcomeUpstreamError, "error_in_answer", answer.status
	case answer.meter.lacksEndMarker() && c.endpoint.hasEndMarker():
		return outcomeTruncated, "stream_unfinished", answer.status
	case answer.meter.isUnfinished():
		return outcomeTruncated, "answer_unfinished", answer.status
	}
	return outcomeOK, "", answer.status
}

// fillUsage fills in the usage that the answer reports, or an estimate: no usage is silently zero.
func (c *call) fillUsage(row *requestRow) {
	row.counts, row.source = tokenCounts{}, usageNone
	if c.endpoint.meter == meterNone || c.attemptCount == 0 {
		return
	}
	est := &c.reservation.estimate
	if c.attempts.mayBeBilled {
		row.counts, row.source = tokenCounts{input: est.input, output: est.output}, usageEstimated
		return
	}
	if c.response == nil || c.response.meter == nil {
		buffered := c.progress.outputTokens.Load() // of a buffered stream that was never complete
		if c.withheld {
			buffered = max(buffered, c.reservation.estimate.output)
		}
		// The proxy or the client gave up on a provider that had the request and may bill it.
		if buffered > 0 || c.withheld || c.failure == nil || c.commitFailed || abortCause(c.ctx) != nil ||
			c.failure.status == http.StatusGatewayTimeout && c.failure != errConnectTimeout {
			row.counts, row.source = tokenCounts{input: c.inputEstimate(), output: buffered}, usageEstimated
		}
		return
	}
	m := c.response.meter
	if m.model != "" {
		row.model = m.model
	}
	if row.backgroundID = m.pendingResponse(c.fields.background); row.backgroundID != "" {
		est := &c.reservation.estimate
		row.reservedInput, row.reservedOutput = est.input, est.output
		row.reservedCost = addSat(est.inputCost, est.outputCost)
		return // its usage is known later: see settleResponse
	}
	row.counts, row.source, row.details = m.counts, m.source(), m.details
	price := c.prices.lookup(c.priceVendor(), c.fields.model, row.started)
	c.endpoint.completeUsage(row, m, &c.fields, price, c.upstream.host)
	if row.source != usageEstimated {
		return
	}
	row.counts.input = cmp.Or(row.counts.input, c.inputEstimate())
	if !m.unmeasured {
		return
	}
	if m.done && !m.hasUsage && price == nil {
		row.counts, row.source = tokenCounts{}, usageNone // pictures of a model that is billed by the picture
		return
	}
	row.counts.output = max(row.counts.output, est.output)
}

// fillCost fills in what the usage costs, if the model has a price, and which models the sums list by name. An
// answer may name a model that has no price, such as a new snapshot. A budget that admitted the call by the
// price of another name must not lose it, so the model that was sent counts next, and then the one asked for.
func (c *call) fillCost(row *requestRow) {
	row.requestedModel = c.fields.model
	row.details.multiplier = combinedMultiplier(c.project.multiplier, c.upstream.settings.CostMultiplier)
	listed := c.prices.priceRow(row, c.priceVendor(), row.model, c.attempts.current.model,
		c.attempts.fallbackModel, c.fields.model)
	// Speech is billed by the character, or by tokens of sound that nobody counts.
	speech := c.endpoint.pattern == "/v1/audio/speech" && row.source == usageEstimated
	if row.source == usageNone || speech {
		row.cost, row.priced, row.price, row.details.multiplier = 0, false, nil, 0
	}
	listed = listed || row.outcome == outcomeOK
	row.modelTracked = listed && c.token.trackModel(row.model)
	row.requestedModelTracked = listed && c.token.trackModel(row.requestedModel)
}

// refuse answers a call that was not admitted. The sums count every refusal of a known token, but at most one a
// second gets a row of its own: a client in a retry loop must not fill the disk.
func (p *proxy) refuse(c *call, w http.ResponseWriter, r *http.Request, err error) {
	e := asAPIError(err)
	c.failure = e
	now := time.Now()
	row := requestRow{id: c.id, started: c.start.UnixMilli(), totalUS: now.Sub(c.start).Microseconds(),
		address: c.address, stream: c.fields.stream, model: c.fields.model, outcome: outcomeRefused,
		errorCode: e.recordCode(), status: e.status, source: usageNone, firstByteUS: -1, limitHit: e.limit,
		attribution: c.attribution, refusal: e.msg}
	if c.endpoint != nil {
		row.endpoint = c.endpoint.name()
	}
	if c.token != nil {
		p.recordRetry(c, r, &row)
		if p.ledger.healthy() {
			row.project, row.token = c.project.seq, c.tokenState.seq
			wait, _ := c.token.refusals.allow(c.start)
			p.ledger.recordRefused(&row, wait == 0)
		}
		l := &c.token.project.limiter
		l.mu.Lock()
		c.rates = c.token.rateHeaders(c.tokenState.maxRequests, c.attribution, p.limits.now(c.start))
		l.mu.Unlock()
	}
	if c.ctx == nil || c.ctx.Err() == nil {
		c.limitUnreadBody(r)
	}
	_ = c.controller.SetWriteDeadline(time.Now().Add(writeTimeout))
	c.rates.write(w.Header())
	writeError(w, e, c.shape)
	p.metrics.countCall(c.endpoint, &row, nil)
	p.logCall(c, &row, now)
}

// logCall writes the call's one log line: never a header, body, query or key.
func (p *proxy) logCall(c *call, row *requestRow, now time.Time) {
	level := row.logLevel()
	if !p.log.Enabled(context.Background(), level) {
		return
	}
	var omitted int64
	if c.token == nil { // anyone can cause such lines
		var wait time.Duration
		if wait, omitted = p.logThrottle.allow(c.start); wait > 0 {
			p.metrics.suppressedLogLines.Add(1)
			return
		}
	}
	line := p.log.beginLine(now, level, "call")
	defer line.end()
	optional := func(name, value string) {
		if value != "" {
			line.str(name, value)
		}
	}
	if omitted > 0 {
		line.num("lines_left_out", omitted)
	}
	line.str("request_id", c.requestID)
	line.str("route", row.endpoint)
	line.num("status", int64(row.status))
	line.str("outcome", string(row.outcome))
	optional("code", row.errorCode)
	if row.wouldRefuse {
		optional("shadow_limit", row.limitHit)
	} else {
		optional("limit", row.limitHit)
	}
	if c.token != nil {
		line.str("token", c.tokenState.id)
		line.str("project", c.project.id)
	}
	line.str("address", row.address)
	optional("trace_id", c.trace.traceID)
	optional("span_id", c.trace.spanID)
	optional("model", clip(row.model, 256))
	if c.entry != nil {
		line.flag("stream", row.stream)
		optional("cache", row.cache)
		line.str("usage", string(row.source))
		line.num("input_tokens", row.counts.input)
		line.num("output_tokens", row.counts.output)
		line.num("first_byte_us", row.firstByteUS)
		if c.response != nil {
			optional("provider_request_id", c.response.providerRequestID)
		}
	}
	optional("error", c.logCause(row.status))
	line.num("total_us", row.totalUS)
}

// logCause returns the text of what caused a 5xx, without the provider's key: net/http quotes what it cannot
// parse of an answer, and that may contain the key.
func (c *call) logCause(status int) string {
	if status < 500 || c.failure == nil || c.failure.cause == nil {
		return ""
	}
	text := c.failure.cause.Error()
	if c.entry != nil {
		text = strings.ReplaceAll(text, c.upstream.key(), hiddenSecret)
	}
	return clip(text, 1024)
}
