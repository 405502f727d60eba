// This file decides whether a call may be made: policies first, then an upstream, then limits. An admitted call has
// a reservation in every limit that applies, and its pending record is on the way to the ledger. Nothing is
// forwarded here.
package main

import (
	"cmp"
	"errors"
	"strings"
	"time"
)

// admit checks the call against policies and limits, reserves what it may use, and begins its record.
func (p *proxy) admit(c *call) error {
	if !p.ledger.healthy() {
		return errLedgerUnavailable(errors.New("the ledger cannot be written"))
	}
	if problem := p.databaseProblem(); problem != "" { // rows would go into a file that was deleted or replaced
		return errLedgerUnavailable(errors.New(problem))
	}
	c.resolveAlias()
	if err := c.checkPolicies(); err != nil {
		return err
	}
	if c.setUpstream(c.pickUpstream()); c.upstream == nil {
		now := c.readAt()
		if w := c.criteria(now); c.project.atCapacity(&w) {
			return errUpstreamsAtCapacity(time.Duration(60_000-now%60_000) * time.Millisecond)
		}
		return errNoUpstream
	}
	if c.upstream.provider != providerAzure && hasParam(c.query, azureVersion) {
		c.unreserveUpstream()
		return errAzureOnly(azureVersion)
	}
	if c.upstream.configErr != nil {
		c.unreserveUpstream()
		return errUpstreamKeyUnreadable(c.upstream.configErr)
	}
	if c.endpoint.addUsage && c.fields.stream && !c.fields.includeUsage && c.upstream.provider != providerAnthropic {
		c.body, c.usageAdded = withIncludeUsage(c.body, c.fields), true
	}
	c.prices = p.prices.Load()
	if err := p.reserve(c); err != nil {
		c.unreserveUpstream()
		return err
	}
	c.publish()
	c.entry = p.ledger.begin(requestRow{
		id: c.id, started: c.start.UnixMilli(), project: c.project.seq, token: c.tokenState.seq,
		endpoint: c.endpoint.name(), stream: c.fields.stream, address: c.address,
		upstream: c.upstream.seq, model: c.fields.model,
		counts: tokenCounts{input: c.inputEstimate(), output: c.reservation.outputIfLost},
	})
	return nil
}

// pickUpstream chooses the call's first upstream, nil if there is none. An endpoint that both API families have (the
// list of models) goes to the family of the client's SDK, if the project has it.
func (c *call) pickUpstream() *upstream {
	want := c.criteria(c.readAt())
	if want.api == apiAny {
		want.api = apiOpenAI
		if c.shape == shapeAnthropic {
			want.api = apiAnthropic
		}
		if u := c.project.pickUpstream(&want); u != nil {
			return u
		}
		want.api = apiAny
	}
	if want.pinned {
		return c.project.pickUpstream(&want)
	}
	return c.attempts.pickFirst(c.project, want, c.attempts.availableFallback())
}

// readAt returns when the call's body had been read, in unix milliseconds: an upstream is chosen then.
func (c *call) readAt() int64 { return c.start.Add(c.times.bodyRead).UnixMilli() }

// unreserveUpstream takes back what pickUpstream has reserved, for a call that is not sent.
func (c *call) unreserveUpstream() {
	c.upstream.health.unreserve(c.readAt(), c.inputEstimate(), &c.upstream.settings)
}

// resolveAlias replaces an alias of the project by the first of the models that it stands for; the others are the
// call's fallback models. Everything after it sees models only. Uploads and multipart forms that name no model which
// could be replaced keep what they say, and nothing is deleted by an alias.
func (c *call) resolveAlias() {
	inPath := c.endpoint.modelInPath && c.endpoint.method == "GET"
	if c.project.routing.Aliases == nil || !c.canChangeModel() && !inPath {
		return
	}
	if models := c.project.resolveAlias(c.criteria(c.readAt()), c.mayUseModel); len(models) > 0 {
		c.alias, c.models, c.fields.model = c.fields.model, models, models[0]
	}
}

// askedModel returns the model's name in the client's request.
func (c *call) askedModel() string { return cmp.Or(c.alias, c.fields.model) }

// checkPolicies checks the call against the policies of its project and its token.
func (c *call) checkPolicies() error {
	e := c.endpoint
	if e.class == classStateful && !c.project.policy.Stateful {
		return errStatefulEndpoint
	}
	if c.fields.statefulParam != "" && !c.project.policy.Stateful {
		return errStatefulField(c.fields.statefulParam)
	}
	for _, p := range [...]*policy{&c.project.policy, &c.tokenState.policy} {
		if !p.allowsEndpoint(e.name(), e.pattern) {
			return errEndpointNotAllowed(p.Endpoints)
		}
		if p.Models != nil && c.fields.modelListParam != "" { // the provider would pick one of them
			return errModelListNotAllowed(c.fields.modelListParam)
		}
		if p.Models == nil || (c.fields.model == "" && !e.needsModel) {
			continue
		}
		if c.fields.model == "" || !p.allowsModel(c.fields.model) {
			return errModelNotAllowed(p.Models)
		}
	}
	return nil
}

const (
	maxFormText       = 32 << 10 // bytes of a form that are estimated as text
	formBytesPerToken = 64       // of the rest: sound and pictures have hundreds of bytes a token, however compressed
)

// inputEstimate returns how many tokens the body may have. JSON always counts as text: otherwise a client could
// disguise text as a picture to lower the estimate.
func (q *clientRequest) inputEstimate() int64 {
	n := int64(len(q.body))
	switch {
	case q.endpoint.meter == meterNone:
		return 0
	case q.form && n > maxFormText:
		return estimateTokens(maxFormText) + (n-maxFormText)/formBytesPerToken
	}
	return estimateTokens(n)
}

// maxOutputTokens returns the most output that the call asks for, 0 if it does not say. Only the endpoint's own
// field names count: a provider ignores the others, and would not hold the call to them.
func (q *clientRequest) maxOutputTokens() int64 {
	limit := q.fields.maxTokens
	switch pattern := q.endpoint.pattern; {
	case pattern == chatPattern:
		limit = max(limit, q.fields.maxCompletionTokens)
	case strings.HasPrefix(pattern, "/v1/responses"), q.endpoint.api == apiGemini:
		limit = q.fields.maxOutputTokens
	}
	return q.timesAnswers(limit)
}

// timesAnswers multiplies tokens by the number of answers that the body asks for: each prompt gets n of them.
func (q *clientRequest) timesAnswers(tokens int64) int64 {
	answers := max(1, q.fields.n) * max(1, q.fields.prompts) // 32 and 25 bits
	if tokens > maxTokenCount/answers {
		return maxTokenCount
	}
	return tokens * answers
}

// assumedOutput is the estimate of output tokens for a call that sets no maximum.
const assumedOutput = 4096

// estimate returns what the call may use at most.
func (c *call) estimate() estimate {
	e := c.endpoint
	est := estimate{endpoint: e.name(), pattern: e.pattern, model: c.fields.model}
	if e.meter == meterNone || strings.HasSuffix(e.pattern, "_tokens") { // counting tokens uses none
		return est
	}
	est.input, est.output = c.inputEstimate(), c.maxOutputTokens()
	// Many compatible servers ignore max_completion_tokens.
	ignored := c.upstream.provider == providerCompatible && c.fields.maxTokens == 0 && e.pattern == chatPattern
	if e.hasOutputTokens() && (est.output == 0 || ignored) {
		est.outputAssumed = true
		est.output = max(est.output, c.timesAnswers(assumedOutput))
	}
	return est
}

// reserve reserves the call in every limit of its project and its token, or in none.
func (p *proxy) reserve(c *call) error {
	maxRequests := c.tokenState.maxRequests
	if maxRequests >= 0 && c.token.used.Load() >= maxRequests { // checked before the limits it shares with others
		return requestsExhausted(maxRequests)
	}
	c.reservation.estimate = c.estimate()
	now := c.start.UnixMilli()
	l := &c.token.project.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := p.limits.syncLimits(c.token, now); err != nil {
		return errLimitsUnavailable(err)
	}
	if err := c.estimateCost(l.project.policy, c.token.limits.policy); err != nil {
		return err
	}
	if v := l.reserve(&c.reservation, &c.token.limits, now); v != nil {
		return violationError(v)
	}
	if !c.token.reserve(maxRequests) {
		l.release(&c.reservation, now, finalUsage{})
		return requestsExhausted(maxRequests)
	}
	c.reservation.outputIfLost = c.reservation.lostOutput(c.maxOutputTokens())
	c.rates = c.token.rateHeaders(maxRequests, now)
	c.commitFirst = maxRequests >= 0 || c.reservation.durable()
	return nil
}

// estimateCost fills in what the call may cost, if a limit in dollars applies to it. A budget cannot hold for a
// call without a known price: such a call is refused.
func (c *call) estimateCost(policies ...*policy) error {
	est := &c.reservation.estimate
	if c.endpoint.meter == meterNone && !billedWithoutUsage(c.endpoint.name()) {
		return nil
	}
	looked, unbounded := false, ""
	for _, p := range policies {
		for i := range p.Limits {
			l := &p.Limits[i]
			if l.metric != metricDollars || !l.applies(est.endpoint, est.pattern, est.model) {
				continue
			}
			if !looked {
				looked, unbounded = true, c.fillEstimatedCost(est)
			}
			if unbounded != "" && !l.monitorOnly {
				return errCostUnbounded(l.String(), unbounded)
			}
		}
	}
	return nil
}

// fillEstimatedCost fills in the costs of est. If they have no bound, it returns the name of the field that is why.
func (c *call) fillEstimatedCost(est *estimate) (unbounded string) {
	at := c.start.UnixMilli()
	price := c.prices.lookup(c.priceVendor(), cmp.Or(c.attempts.fallbackModel, c.fields.model), at)
	if price == nil && c.attempts.fallbackModel != "" {
		price = c.prices.lookup("", c.fields.model, at)
	}
	if price == nil {
		return "model"
	}
	d := usageDetails{region: hostRegion(c.upstream.host),
		multiplier: combinedMultiplier(c.project.multiplier, c.upstream.settings.CostMultiplier)}
	b, unbounded := c.endpoint.costBound(price, &c.fields, c.body, est, d)
	est.inputCost, est.outputCost = b.input, b.output
	return unbounded
}

// priceVendor returns whose prices hold for the call.
func (c *call) priceVendor() string { return priceVendor(c.upstream.provider, c.upstream.host) }
