// This room decides whether a call may be made: rights first, then limits. What
// it lets through has been taken from every limit that applies, and is on its
// way to the ledger. It forwards nothing.
package main

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// admit decides whether the call may be made, takes it from every limit that
// applies, and puts it on record.
func (p *proxy) admit(c *call) error {
	if !p.ledger.healthy() {
		return errLedgerUnavailable(errors.New("the ledger cannot be written"))
	}
	if why := p.databaseProblem(); why != "" { // rows would go into a file that has no name any more
		return errLedgerUnavailable(errors.New(why))
	}
	if err := c.checkPolicies(); err != nil {
		return err
	}
	if c.setUpstream(c.pickUpstream()); c.upstream == nil {
		now := c.start.UnixMilli()
		if w := c.criteria(now); c.project.atCapacity(&w) {
			return errUpstreamsAtCapacity(time.Duration(60_000-now%60_000) * time.Millisecond)
		}
		return errNoUpstream
	}
	if c.upstream.configErr != nil {
		return errUpstreamKeyUnreadable(c.upstream.configErr)
	}
	if c.endpoint.addUsage && c.fields.stream && !c.fields.includeUsage && c.upstream.provider != providerAnthropic {
		c.body, c.usageAdded = withIncludeUsage(c.body, c.fields), true
	}
	c.prices = p.prices.Load()
	if err := p.reserve(c); err != nil {
		c.upstream.health.endProbe() // it may have been chosen to probe it
		return err
	}
	c.publish()
	c.entry = p.ledger.begin(requestRow{
		id: c.id, started: c.start.UnixMilli(), project: c.project.seq, token: c.tokenState.seq, endpoint: c.endpoint.name(),
		stream: c.fields.stream, address: c.address, upstream: c.upstream.seq, model: c.fields.model,
		counts: tokenCounts{input: c.inputEstimate(), output: c.maxOutputTokens()},
	})
	return nil
}

// checkPolicies checks the call against the policies of project and token.
func (c *call) checkPolicies() error {
	e := c.endpoint
	if e.class == classStateful && !c.project.policy.Stateful {
		return errStatefulEndpoint
	}
	if ref := c.fields.statefulParam; ref != "" && !c.project.policy.Stateful {
		return errStatefulField(ref)
	}
	for _, p := range [...]*policy{&c.project.policy, &c.tokenState.policy} {
		if !p.allowsEndpoint(e.name(), e.pattern) {
			return errEndpointNotAllowed(p.Endpoints)
		}
		if p.Models != nil && c.fields.modelListParam != "" { // the provider would choose among them
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

// maxFormText is how much of a form is taken for text, and so for four bytes a
// token. The rest is sound or a picture, of which even the most compressed has
// hundreds of bytes a token.
const (
	maxFormText       = 32 << 10
	formBytesPerToken = 64 // a token, of the rest
)

// inputEstimate is how many tokens the body may be. Nothing in JSON is taken for
// less than text: who pays for what it says could else make it look like a
// picture.
func (c *clientRequest) inputEstimate() int64 {
	n := int64(len(c.body))
	switch {
	case c.endpoint.meter == meterNone:
		return 0
	case c.form && n > maxFormText:
		return estimateTokens(maxFormText) + (n-maxFormText)/formBytesPerToken
	}
	return estimateTokens(n)
}

// maxOutputTokens is the most output that the call asks for, 0 if it does not say. Only
// the endpoint's own names for it count: a provider that takes no notice of
// another one would not hold the call to it.
func (c *clientRequest) maxOutputTokens() int64 {
	most := c.fields.maxTokens
	switch p := c.endpoint.pattern; {
	case p == "/v1/chat/completions":
		most = max(most, c.fields.maxCompletionTokens)
	case strings.HasPrefix(p, "/v1/responses"):
		most = c.fields.maxOutputTokens
	}
	n := max(1, c.fields.n) // 0: there is no body
	if most > maxTokenCount/n {
		return maxTokenCount
	}
	return most * n
}

// assumedOutput is what a call may write that names no most output.
const assumedOutput = 4096

// estimate says what the call may take at most.
func (c *call) estimate() estimate {
	e := c.endpoint
	a := estimate{endpoint: e.name(), pattern: e.pattern, model: c.fields.model}
	if e.meter == meterNone || strings.HasSuffix(e.pattern, "_tokens") { // those count, and use nothing
		return a
	}
	a.input, a.output = c.inputEstimate(), c.maxOutputTokens()
	if a.output == 0 && e.hasOutputTokens() {
		a.outputAssumed = true
		a.output = assumedOutput * min(max(1, c.fields.n), maxTokenCount/assumedOutput)
	}
	return a
}

// hasOutputTokens reports whether answers of the endpoint have output tokens.
func (e *endpoint) hasOutputTokens() bool {
	return e.meter != meterNone && e.pattern != "/v1/embeddings" && e.pattern != "/v1/audio/speech"
}

// reserve takes the call from every limit of its project and token, or from
// none.
func (p *proxy) reserve(c *call) error {
	most := c.tokenState.maxRequests
	if most >= 0 && c.token.used.Load() >= most { // before it disturbs the limits it shares with others
		return requestsExhausted(most)
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
	refused := l.reserve(&c.reservation, &c.token.limits, now)
	if refused == nil && !c.token.reserve(most) {
		l.release(&c.reservation, now, finalUsage{})
		return requestsExhausted(most)
	}
	if refused != nil {
		return violationError(refused)
	}
	c.rates = c.token.rateHeaders(most, now)
	c.commitFirst = most >= 0 || c.reservation.durable()
	return nil
}

// estimateCost works out what the call may cost, if a limit of its project or token
// counts dollars. Where nobody knows the price, a budget could not hold: such a
// call is refused.
func (c *call) estimateCost(policies ...*policy) error {
	a := &c.reservation.estimate
	if c.endpoint.meter == meterNone && !billedWithoutUsage(c.endpoint.name()) {
		return nil
	}
	looked, known := false, false
	for _, p := range policies {
		for i := range p.Limits {
			l := &p.Limits[i]
			if l.metric != metricDollars || !l.applies(a.endpoint, a.pattern, a.model) {
				continue
			}
			if !looked {
				looked, known = true, c.fillEstimatedCost(a)
			}
			if !known && !l.monitorOnly {
				return errPriceUnknown(l.String())
			}
		}
	}
	return nil
}

// fillEstimatedCost fills in the costs, and reports whether they are known.
func (c *call) fillEstimatedCost(a *estimate) bool {
	p, ok := c.prices.lookup(c.upstream.provider, c.fields.model)
	if !ok || c.endpoint.pattern == "/v1/audio/speech" { // billed by the character; its answer counts nothing
		return false
	}
	var in, out bool
	a.inputCost, in = p.cost(tokenCounts{input: a.input})
	a.outputCost, out = p.cost(tokenCounts{output: a.output})
	return in && out
}

// requestsExhausted refuses a call of a token that has made all of its requests.
func requestsExhausted(maxRequests int64) *apiError {
	l := limit{metric: metricRequests, period: perLifetime, max: maxRequests}
	return errQuotaSpent(l.String(), "This token's limit of "+l.String()+" is used up.")
}

// violationError says which limit has no room, and when it will have.
func violationError(v *limitViolation) *apiError {
	name, kind := v.limit.String(), ""
	msg := "This token's limit of " + name
	if v.ofProject {
		msg = "The project's limit of " + name
	}
	if v.limit.metric == metricRequests || v.limit.metric == metricTokens {
		kind = v.limit.metric.String()
	}
	if v.exceedsMax {
		return errNeverFits(name, kind, msg+" never allows as much output as this call asks for. Ask for less.")
	}
	if v.remaining > 0 && v.limit.metric != metricRequests {
		msg += fmt.Sprintf(" has no room for this call: it may need %s, and %s is left.",
			v.limit.valueJSON(v.need), v.limit.valueJSON(v.remaining))
	} else {
		msg += " is used up."
	}
	wait := time.Duration(v.wait) * time.Millisecond
	switch {
	case v.permanent:
		return errQuotaSpent(name, msg)
	case v.limit.isQuota():
		return errQuotaSpent(name, msg+" It resets in "+wait.Round(time.Minute).String()+".")
	}
	return errRateLimited(name, kind, msg, wait)
}
