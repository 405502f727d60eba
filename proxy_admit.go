// This room decides whether a call may be made: rights first, then limits. What
// it lets through has been taken from every limit that applies, and is on its
// way to the ledger. It forwards nothing.
package main

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// admit decides whether the call may be made, takes it from every limit that
// applies, and puts it on record.
func (p *proxy) admit(c *call) error {
	if !p.ledger.healthy() {
		return errUnavailable("ledger_unavailable", errors.New("the ledger cannot be written"))
	}
	if why := p.databaseProblem(); why != "" { // rows would go into a file that has no name any more
		return errUnavailable("ledger_unavailable", errors.New(why))
	}
	if err := c.checkPolicies(); err != nil {
		return err
	}
	if c.setUpstream(c.pickUpstream()); c.upstream == nil {
		now := c.start.UnixMilli()
		if w := c.criteria(now); c.project.atCapacity(&w) {
			return &apiError{status: http.StatusTooManyRequests, code: "rate_limit_exceeded", retryAfter: time.Duration(60_000-now%60_000) * time.Millisecond,
				msg: "This project's upstreams have reached their own limits for this minute."}
		}
		return &apiError{status: http.StatusNotFound, code: "no_upstream", msg: "This project has no provider for this endpoint and model.", noRetry: true}
	}
	if c.upstream.configErr != nil {
		return errUnavailable("upstream_key_unreadable", c.upstream.configErr)
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
		return &apiError{status: http.StatusForbidden, code: "endpoint_not_allowed",
			msg: "This endpoint reads or changes objects kept at the provider; the project's policy does not turn such endpoints on."}
	}
	if ref := c.fields.statefulParam; ref != "" && !c.project.policy.Stateful {
		return &apiError{status: http.StatusForbidden, code: "endpoint_not_allowed", param: ref,
			msg: "The field " + ref + " refers to objects kept at the provider; the project's policy does not turn those on."}
	}
	for _, p := range [...]*policy{&c.project.policy, &c.tokenState.policy} {
		if !p.allowsEndpoint(e.name(), e.pattern) {
			return &apiError{status: http.StatusForbidden, code: "endpoint_not_allowed",
				msg: "This token may not use this endpoint. It may use: " + clip(strings.Join(p.Endpoints, ", "), 500) + "."}
		}
		if p.Models != nil && c.fields.modelListParam != "" { // the provider would choose among them
			return &apiError{status: http.StatusForbidden, code: "model_not_allowed", param: c.fields.modelListParam,
				msg: "This token is held to certain models; name one in model, and leave " + c.fields.modelListParam + " out."}
		}
		if p.Models == nil || (c.fields.model == "" && !e.needsModel) {
			continue
		}
		if c.fields.model == "" || !p.allowsModel(c.fields.model) {
			return &apiError{status: http.StatusForbidden, code: "model_not_allowed", param: "model",
				msg: "This token may not use this model. It may use: " + clip(strings.Join(p.Models, ", "), 500) + "."}
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
		return errRequestsExhausted(most)
	}
	c.reservation.estimate = c.estimate()
	now := c.start.UnixMilli()
	l := &c.token.project.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := p.limits.syncLimits(c.token, now); err != nil {
		return errUnavailable("limits_unavailable", err)
	}
	if err := c.estimateCost(l.project.policy, c.token.limits.policy); err != nil {
		return err
	}
	refused := l.reserve(&c.reservation, &c.token.limits, now)
	if refused == nil && !c.token.reserve(most) {
		l.release(&c.reservation, now, finalUsage{})
		return errRequestsExhausted(most)
	}
	if refused != nil {
		return errLimitExceeded(refused)
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
				return &apiError{status: http.StatusForbidden, code: "price_unknown", param: "model", limit: l.String(),
					msg: "A budget holds for this call, " + l.String() + ", but what it would cost is not known. Ask the administrator to set a price for this model, or use another one."}
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

func errRequestsExhausted(most int64) *apiError {
	return &apiError{status: http.StatusTooManyRequests, code: "project_spend_limit_exceeded", kind: "insufficient_quota", noRetry: true,
		limit: strconv.FormatInt(most, 10) + " requests in all", msg: "This token has used all of its " + strconv.FormatInt(most, 10) + " requests."}
}

// maxRetryWait is the longest wait that clients are asked to sit out: some of
// their libraries sleep for as long as they are told, others refuse (wire.md).
const maxRetryWait = 2 * time.Minute

// errLimitExceeded says which limit has no room, and when it will have.
func errLimitExceeded(r *limitViolation) *apiError {
	whose := "This token's limit of "
	if r.ofProject {
		whose = "The limit of this token's project of "
	}
	e := &apiError{status: http.StatusTooManyRequests, code: "rate_limit_exceeded", limit: r.limit.String(), msg: whose + r.limit.String() + " is used up"}
	switch r.limit.metric {
	case metricRequests, metricTokens:
		e.kind = r.limit.metric.String()
	}
	if r.remaining > 0 && r.limit.metric != metricRequests {
		e.msg = fmt.Sprintf("%s%s has no room for this call: it may need %s, and %s is left", whose, r.limit, r.limit.valueJSON(r.need), r.limit.valueJSON(r.remaining))
	}
	switch wait := time.Duration(r.wait) * time.Millisecond; {
	case r.exceedsMax:
		e.noRetry = true
		e.msg = whose + r.limit.String() + " never allows as much output as this call asks for. Ask for less."
	case r.limit.isQuota() || r.permanent:
		e.code, e.kind, e.noRetry = "project_spend_limit_exceeded", "insufficient_quota", true
		e.msg += "."
		if !r.permanent {
			e.msg += " It begins anew in " + wait.Round(time.Minute).String() + "."
		}
	default:
		e.retryAfter, e.noRetry = wait, wait > maxRetryWait
		e.msg += ". Try again in " + wait.String() + "."
	}
	return e
}
