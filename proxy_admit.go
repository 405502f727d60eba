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
	if why := p.gone(); why != "" { // rows would go into a file that has no name any more
		return errUnavailable("ledger_unavailable", errors.New(why))
	}
	if err := c.allowed(); err != nil {
		return err
	}
	if c.upstream = c.pick(); c.upstream == nil {
		now := c.start.UnixMilli()
		if w := c.wish(now); c.project.full(&w) {
			return &apiError{status: http.StatusTooManyRequests, code: "rate_limit_exceeded", retryAfter: time.Duration(60_000-now%60_000) * time.Millisecond,
				msg: "This project's upstreams have reached their own limits for this minute."}
		}
		return &apiError{status: http.StatusNotFound, code: "no_upstream", msg: "This project has no provider for this endpoint and model.", noRetry: true}
	}
	if c.upstream.broken != nil {
		return errUnavailable("upstream_key_unreadable", c.upstream.broken)
	}
	if c.endpoint.addUsage && c.fields.stream && !c.fields.includeUsage && c.upstream.provider != providerAnthropic {
		c.body, c.stripped = withIncludeUsage(c.body, c.fields), true
	}
	c.prices = p.prices.Load()
	if err := p.reserve(c); err != nil {
		c.upstream.health.release() // it may have been chosen to probe it
		return err
	}
	c.admitted.Store(true)
	c.entry = p.ledger.begin(requestRow{
		id: c.id, started: c.start.UnixMilli(), project: c.project.seq, token: c.state.seq, endpoint: c.endpoint.name(),
		stream: c.fields.stream, address: c.address, upstream: c.upstream.seq, model: c.fields.model,
		counts: tokenCounts{input: c.inputEstimate(), output: c.mostOutput()},
	})
	return nil
}

// allowed checks the call against the policies of project and token.
func (c *call) allowed() error {
	e := c.endpoint
	if e.class == classStateful && !c.project.policy.Stateful {
		return &apiError{status: http.StatusForbidden, code: "endpoint_not_allowed",
			msg: "This endpoint reads or changes objects kept at the provider; the project's policy does not turn such endpoints on."}
	}
	if ref := c.fields.stateRef; ref != "" && !c.project.policy.Stateful {
		return &apiError{status: http.StatusForbidden, code: "endpoint_not_allowed", param: ref,
			msg: "The field " + ref + " refers to objects kept at the provider; the project's policy does not turn those on."}
	}
	for _, p := range [...]*policy{&c.project.policy, &c.state.policy} {
		if !p.allowsEndpoint(e.name(), e.pattern) {
			return &apiError{status: http.StatusForbidden, code: "endpoint_not_allowed",
				msg: "This token may not use this endpoint. It may use: " + clip(strings.Join(p.Endpoints, ", "), 500) + "."}
		}
		if p.Models != nil && c.fields.otherModels != "" { // the provider would choose among them
			return &apiError{status: http.StatusForbidden, code: "model_not_allowed", param: c.fields.otherModels,
				msg: "This token is held to certain models; name one in model, and leave " + c.fields.otherModels + " out."}
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

// formText is how much of a form is taken for text, and so for four bytes a
// token. The rest is sound or a picture, of which even the most compressed has
// hundreds of bytes a token.
const (
	formText  = 32 << 10
	formBytes = 64 // a token, of the rest
)

// inputEstimate is how many tokens the body may be. Nothing in JSON is taken for
// less than text: who pays for what it says could else make it look like a
// picture.
func (c *call) inputEstimate() int64 {
	n := int64(len(c.body))
	switch {
	case c.endpoint.meter == meterNone:
		return 0
	case c.form && n > formText:
		return estimateTokens(formText) + (n-formText)/formBytes
	}
	return estimateTokens(n)
}

// mostOutput is the most output that the call asks for, 0 if it does not say. Only
// the endpoint's own names for it count: a provider that takes no notice of
// another one would not hold the call to it.
func (c *call) mostOutput() int64 {
	most := c.fields.maxTokens
	switch p := c.endpoint.pattern; {
	case p == "/v1/chat/completions":
		most = max(most, c.fields.maxComplete)
	case strings.HasPrefix(p, "/v1/responses"):
		most = c.fields.maxOutput
	}
	n := max(1, c.fields.n) // 0: there is no body
	if most > maxCount/n {
		return maxCount
	}
	return most * n
}

// assumedOutput is what a call may write that names no most output.
const assumedOutput = 4096

// ask says what the call may take at most.
func (c *call) ask() ask {
	e := c.endpoint
	a := ask{name: e.name(), pattern: e.pattern, model: c.fields.model}
	if e.meter == meterNone || strings.HasSuffix(e.pattern, "_tokens") { // those count, and use nothing
		return a
	}
	a.input, a.output = c.inputEstimate(), c.mostOutput()
	if a.output == 0 && e.writes() {
		a.assumed = true
		a.output = assumedOutput * min(max(1, c.fields.n), maxCount/assumedOutput)
	}
	return a
}

// writes reports whether answers of the endpoint have output tokens.
func (e *endpoint) writes() bool {
	return e.meter != meterNone && e.pattern != "/v1/embeddings" && e.pattern != "/v1/audio/speech"
}

// reserve takes the call from every limit of its project and token, or from
// none.
func (p *proxy) reserve(c *call) error {
	most := c.state.maxRequests
	if most >= 0 && c.token.used.Load() >= most { // before it disturbs the limits it shares with others
		return errAllUsed(most)
	}
	c.hold.ask = c.ask()
	now := c.start.UnixMilli()
	l := &c.token.project.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := p.limits.adoptLimits(c.token, now); err != nil {
		return errUnavailable("limits_unavailable", err)
	}
	if err := c.appraise(l.project.of, c.token.limits.of); err != nil {
		return err
	}
	refused := l.reserve(&c.hold, &c.token.limits, now)
	if refused == nil && !c.token.reserve(most) {
		l.release(&c.hold, now, spending{})
		return errAllUsed(most)
	}
	if refused != nil {
		return errLimit(refused)
	}
	c.rates = c.token.rates(most, now)
	c.durable = most >= 0 || c.hold.durable()
	return nil
}

// appraise works out what the call may cost, if a limit of its project or token
// counts dollars. Where nobody knows the price, a budget could not hold: such a
// call is refused.
func (c *call) appraise(policies ...*policy) error {
	a := &c.hold.ask
	if c.endpoint.meter == meterNone && !billedUnseen(c.endpoint.name()) {
		return nil
	}
	looked, known := false, false
	for _, p := range policies {
		for i := range p.Limits {
			l := &p.Limits[i]
			if l.count != countDollars || !l.applies(a.name, a.pattern, a.model) {
				continue
			}
			if !looked {
				looked, known = true, c.appraiseAt(a)
			}
			if !known && !l.shadow {
				return &apiError{status: http.StatusForbidden, code: "price_unknown", param: "model", limit: l.String(),
					msg: "A budget holds for this call, " + l.String() + ", but what it would cost is not known. Ask the administrator to set a price for this model, or use another one."}
			}
		}
	}
	return nil
}

// appraiseAt fills in the costs, and reports whether they are known.
func (c *call) appraiseAt(a *ask) bool {
	p, ok := c.prices.lookup(c.upstream.provider, c.fields.model)
	if !ok || c.endpoint.pattern == "/v1/audio/speech" { // billed by the character; its answer counts nothing
		return false
	}
	var in, out bool
	a.inputCost, in = p.cost(tokenCounts{input: a.input})
	a.outputCost, out = p.cost(tokenCounts{output: a.output})
	return in && out
}

func errAllUsed(most int64) *apiError {
	return &apiError{status: http.StatusTooManyRequests, code: "project_spend_limit_exceeded", kind: "insufficient_quota", noRetry: true,
		limit: strconv.FormatInt(most, 10) + " requests in all", msg: "This token has used all of its " + strconv.FormatInt(most, 10) + " requests."}
}

// noLongSleep is the longest wait that clients are asked to sit out: some of
// their libraries sleep for as long as they are told, others refuse (wire.md).
const noLongSleep = 2 * time.Minute

// errLimit says which limit has no room, and when it will have.
func errLimit(r *refusal) *apiError {
	whose := "This token's limit of "
	if r.ofProject {
		whose = "The limit of this token's project of "
	}
	e := &apiError{status: http.StatusTooManyRequests, code: "rate_limit_exceeded", limit: r.limit.String(), msg: whose + r.limit.String() + " is used up"}
	switch r.limit.count {
	case countRequests, countTokens:
		e.kind = r.limit.count.String()
	}
	if r.left > 0 && r.limit.count != countRequests {
		e.msg = fmt.Sprintf("%s%s has no room for this call: it may need %s, and %s is left", whose, r.limit, r.limit.amount(r.need), r.limit.amount(r.left))
	}
	switch wait := time.Duration(r.wait) * time.Millisecond; {
	case r.impossible:
		e.noRetry = true
		e.msg = whose + r.limit.String() + " never allows as much output as this call asks for. Ask for less."
	case r.limit.quota() || r.never:
		e.code, e.kind, e.noRetry = "project_spend_limit_exceeded", "insufficient_quota", true
		e.msg += "."
		if !r.never {
			e.msg += " It begins anew in " + wait.Round(time.Minute).String() + "."
		}
	default:
		e.retryAfter, e.noRetry = wait, wait > noLongSleep
		e.msg += ". Try again in " + wait.String() + "."
	}
	return e
}
