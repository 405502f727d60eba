// This file reads what the client asks for (the endpoint, the query, and the body within its limits), then decides
// whether the call may be made: policies first, then an upstream, then limits. An admitted call has a reservation in
// every limit that applies, and its pending record is on the way to the ledger. Nothing is forwarded here.
package main

import (
	"cmp"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// readCall fills in the call's clientRequest: the endpoint, the body, and the fields of the body that policies,
// limits and metering need.
func (p *proxy) readCall(c *call, w http.ResponseWriter, r *http.Request) error {
	if offersWebSocket(r.Header["Upgrade"]) {
		w.Header()["Upgrade"], w.Header()["Connection"] = []string{"HTTP/1.1"}, []string{"Upgrade"}
		return errUpgrade
	}
	m, err := p.endpoints.match(r.Method, r.URL)
	switch {
	case errors.Is(err, errWrongMethod):
		w.Header().Set("Allow", m.allow)
		return errMethodNotAllowed(m.allow)
	case err != nil:
		return errUnknownPath(errUnknownEndpoint, r.URL)
	}
	c.match, c.endpoint = m, m.endpoint
	queryModel, err := checkQuery(r.URL.RawQuery, c.endpoint)
	if err != nil {
		return asClientError(err)
	}
	c.query = r.URL.RawQuery
	for _, name := range [...]string{"Content-Type", "Content-Encoding"} {
		if len(r.Header[name]) > 1 { // the provider might use another one than the proxy
			return errRepeatedHeader(name)
		}
	}
	encoding := headerValue(r.Header, "Content-Encoding")
	if encoding != "" && !strings.EqualFold(encoding, "identity") {
		return errEncodedBody
	}
	if c.bufferStream, err = wantsBufferedStream(r.Header, c.project); err != nil {
		return err
	}
	if c.form, err = isForm(c.endpoint, headerValue(r.Header, "Content-Type")); err != nil {
		return err
	}
	switch {
	case c.endpoint.body == bodyNone:
		c.fields.model = cmp.Or(m.model, queryModel)
		c.limitUnreadBody(r)
		defer c.unlimitReads(r)
		return rejectBody(r.Body)
	case c.endpoint.upload && c.form:
		return nil // streamed
	}
	readAt := time.Now()
	if c.body, err = p.readBody(c, r); err != nil {
		return err
	}
	c.times.bodyRead = time.Since(readAt)
	if c.fields, err = c.match.scanBody(c.form, headerValue(r.Header, "Content-Type"), c.body); err != nil {
		return asClientError(err)
	}
	return nil
}

// readAttribution fills in for whom and for what the call is made. Calls that use no tokens need not say that.
func (p *proxy) readAttribution(c *call, header http.Header) error {
	if c.endpoint == nil {
		return nil
	}
	if c.endpoint.api != apiAnthropic {
		c.fields.identity.metadataUserID = "" // another API's metadata is the client's own
	}
	project, token := c.project.policy.Attribution, c.tokenState.policy.Attribution
	a, err := readAttribution(header, &c.fields.identity, project, token)
	if kept := project.recordsEndUsers(); a != nil && kept != endUsersPlain {
		name := ""
		if kept == endUsersHashed && a.endUser != "" {
			var hashErr error
			if name, hashErr = p.contentKey.hashEndUser(c.project.id, a.endUser); hashErr != nil {
				return hashErr
			}
		}
		a = a.withEndUser(name, token.fixedTags())
	}
	if c.attribution = a; err == nil && c.endpoint.meter != meterNone {
		err = checkRequired(a, project, token)
	}
	return err
}

// readBody reads the whole body: the provider gets it in one write, and an early answer does not break the
// client's connection.
func (p *proxy) readBody(c *call, r *http.Request) ([]byte, error) {
	if r.ContentLength > p.cfg.maxBodyBytes {
		return nil, errBodyTooLarge(p.cfg.maxBodyBytes)
	}
	c.setPhase(phaseReading)
	var buf []byte
	for {
		if have := int64(len(buf)); len(buf) == cap(buf) {
			size := min(bodyBufferSize(r.ContentLength, have), p.cfg.maxBodyBytes+1)
			if err := c.memory.reserve(size - have); err != nil {
				return nil, err
			}
			buf = append(make([]byte, 0, size), buf...)
		}
		n, err := r.Body.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		c.progress.bytesReceived.Store(int64(len(buf)))
		if int64(len(buf)) > p.cfg.maxBodyBytes {
			return nil, errBodyTooLarge(p.cfg.maxBodyBytes)
		}
		if err == io.EOF {
			return buf, nil
		}
		if err != nil {
			if cause := abortCause(c.ctx); cause != nil {
				return nil, cause
			}
			return nil, errRequestCut.withCause(err)
		}
	}
}

// newBodyShare returns the share of a call. One token gets at most a quarter of the memory, so that it cannot keep
// out all others, but always enough for one body of the largest size.
func (p *proxy) newBodyShare(t *liveToken) bodyShare {
	return bodyShare{memory: p.bodies, token: &t.bodyBytes, max: max(p.bodies.limit/4, p.cfg.maxBodyBytes+1)}
}

// A progressReader reports the progress of an upload to the watchdog: the provider's time to answer starts again
// with each read, and a client that sends too slowly is noticed.
type progressReader struct {
	io.ReadCloser
	c *runningCall
}

func (r *progressReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.c.progress.bytesReceived.Add(int64(n))
	if err != nil {
		r.c.progress.uploaded.Store(err == io.EOF)
		r.c.progress.uploading.Store(false)
	}
	if n > 0 && phase(r.c.progress.phase.Load()) == phaseProvider {
		r.c.setPhase(phaseProvider)
	}
	return n, err
}

// endUpload closes an upload's body. ReverseProxy leaves it open, and its transport may still read it, which would
// spoil the next request on the connection. endUpload waits for that read and for what is left of the body, so that
// the connection can be used again, but not for a client that has stopped sending.
func (c *call) endUpload(body io.Closer) {
	if !c.progress.uploaded.Load() {
		deadline := time.Now().Add(unreadBodyGrace)
		if c.ctx.Err() != nil {
			deadline = time.Unix(1, 0)
		}
		_ = c.controller.SetReadDeadline(deadline)
	}
	body.Close()
}

// unreadBodyGrace is how long a client may take to send the rest of a body that is not read.
const unreadBodyGrace = time.Second

// limitUnreadBody sets the deadline for a body that the proxy does not read. net/http reads what is left of it
// before it answers, to keep the connection: a client must not hold the connection by sending nothing.
func (c *call) limitUnreadBody(r *http.Request) {
	if r.ContentLength != 0 {
		_ = c.controller.SetReadDeadline(time.Now().Add(unreadBodyGrace))
	}
}

// unlimitReads takes the deadline back: net/http keeps reading, to notice when the client leaves.
func (c *call) unlimitReads(r *http.Request) {
	if r.ContentLength != 0 && c.ctx.Err() == nil {
		_ = c.controller.SetReadDeadline(time.Time{})
	}
}

// closeIfUnread makes the answer the last one on its HTTP/1 connection if it begins before the upload has ended:
// net/http could take the rest of the body for the next request.
func (c *call) closeIfUnread(h http.Header) {
	if c.fullDuplex && !c.progress.uploaded.Load() {
		h.Set("Connection", "close")
	}
}

// errUnknownPath returns a 404 that names the path, so that a wrong base URL shows, and says which one is right. It
// leaves out a path that is too long to read, or may contain a credential.
func errUnknownPath(e *apiError, u *url.URL) *apiError {
	path := u.EscapedPath()
	named := *e
	if len(path) <= 200 && isAlphanumericOr(path, "/._-~:@!$&'()*+,;=%[]") && // what a URL may have, escaped or not
		!strings.Contains(u.Path, tokenPrefix) && !strings.Contains(u.Path, manageKeyPrefix) {
		named.msg += " The path is " + path + "."
	}
	named.msg += " The base URL is this proxy's address: with /v1 for OpenAI's SDKs, without /v1 for Anthropic's" +
		" and Google's."
	return &named
}

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
	if err := c.chooseUpstream(c.readAt(), c.project.policy.Cache == nil); err != nil {
		return err
	}
	if c.endpoint.addUsage && c.fields.stream && !c.fields.includeUsage && c.upstream.provider != providerAnthropic {
		c.body, c.usageAdded = withIncludeUsage(c.body, c.fields), true
	}
	c.prices = p.prices.Load()
	if err := p.reserve(c); err != nil {
		c.unreserveUpstream()
		return err
	}
	c.entry = &ledgerEntry{row: requestRow{
		id: c.id, started: c.start.UnixMilli(), project: c.project.seq, token: c.tokenState.seq,
		endpoint: c.endpoint.name(), stream: c.fields.stream, address: c.address,
		upstream: c.upstream.seq, model: c.fields.model, attribution: c.attribution,
		counts: tokenCounts{input: c.inputEstimate(), output: c.reservation.outputIfLost},
	}}
	p.ledger.begin(c.entry)
	c.publish() // now: forgetEndUser waits for the records that are queued of the calls that it sees
	return nil
}

// chooseUpstream sets the call's first upstream, and with reserve reserves the call there. In a project with a cache
// that happens when the cache has no answer: reserveUpstream.
func (c *call) chooseUpstream(now int64, reserve bool) error {
	c.affinity = c.findAffinity()
	want := c.criteria(now)
	want.unreserved = !reserve
	u := c.pickUpstream(want)
	if want.overLimits = !reserve; u == nil && !reserve {
		u = c.pickUpstream(want)
	}
	switch {
	case u == nil && c.project.atCapacity(&want):
		return errUpstreamsAtCapacity(time.Duration(60_000-now%60_000) * time.Millisecond)
	case u == nil:
		return errNoUpstream
	}
	if c.setUpstream(u); reserve {
		c.reservedAt = now
	}
	var err error
	switch {
	case u.provider != providerAzure && hasParam(c.query, azureVersion):
		err = errAzureOnly(azureVersion)
	case u.configErr != nil:
		err = errUpstreamKeyUnreadable(u.configErr)
	default:
		return nil
	}
	c.unreserveUpstream()
	return err
}

// pickUpstream picks the call's first upstream, nil if there is none. An endpoint that OpenAI's and Anthropic's API
// have goes to the family of the client's SDK, if the project has it. Models may also be Google's.
func (c *call) pickUpstream(want criteria) *upstream {
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
	u := c.attempts.pickFirst(c.project, want, c.attempts.availableFallback())
	if u == nil && c.endpoint.mayBeGoogles() && !hasParam(c.query, clientVersion) {
		want.api = apiGemini
		u = c.project.pickUpstream(&want)
	}
	return u
}

// readAt returns when the call's body had been read, in unix milliseconds: its first upstream is chosen then.
func (c *call) readAt() int64 { return c.start.Add(c.times.bodyRead).UnixMilli() }

// unreserveUpstream takes back what chooseUpstream has reserved, if anything, for a call that is not sent.
func (c *call) unreserveUpstream() {
	if c.reservedAt != 0 {
		c.upstream.health.unreserve(c.reservedAt, c.inputEstimate(), &c.upstream.settings)
		c.reservedAt = 0
	}
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
	case pattern == interactionsPattern:
		limit = 0 // it is in generation_config
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
	est := estimate{endpoint: e.name(), pattern: e.pattern, model: c.fields.model, attribution: c.attribution}
	if e.meter == meterNone || strings.HasSuffix(e.pattern, "_tokens") { // counting tokens uses none
		if e.makesBatch() { // nobody knows what it will use, but something must be left
			est.input, est.inputCost = 1, 1
		}
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
	// Checked before the limits it shares with others. Replicas may have returned requests since.
	if maxRequests >= 0 && c.token.used.Load() >= maxRequests && p.limits.leases == nil {
		return requestsExhausted(maxRequests)
	}
	c.reservation.estimate, c.reservation.began = c.estimate(), c.start.UnixMilli()
	now := p.limits.now(c.start)
	l := &c.token.project.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	est := &c.reservation.estimate
	for hasCost := false; ; hasCost = true { // the policies say whether the cost matters; then it is leased, too
		if err := p.limits.prepare(c.token, est, now); err != nil {
			return errLimitsUnavailable(err)
		}
		if err := c.estimateCost(l.project.policy, c.token.limits.policy); err != nil {
			return err
		}
		if p.limits.leases == nil || hasCost || est.inputCost == 0 && est.outputCost == 0 {
			break
		}
	}
	if v := l.reserve(&c.reservation, &c.token.limits, now); v != nil {
		return violationError(v)
	}
	if err := p.limits.reserveRequest(c.token, &c.reservation, maxRequests, now); err != nil {
		l.release(&c.reservation, now, finalUsage{})
		return err
	}
	c.reservation.outputIfLost = c.reservation.lostOutput(c.maxOutputTokens())
	c.rates = c.token.rateHeaders(maxRequests, c.attribution, now)
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
