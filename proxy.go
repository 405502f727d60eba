// This file carries one /v1 call from top to bottom: authenticate, match and read, admit, record, forward,
// meter, settle. It is the only file that uses httputil. No answer byte leaves before the call is on record.
package main

import (
	"cmp"
	"context"
	"errors"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A proxy carries /v1 calls to providers. It is the only type that holds the transport.
type proxy struct {
	proxyDeps
	flights          flights
	buffers          *bufferPool
	meters           sync.Pool     // of *meter
	blankRequest     *http.Request // what requests to providers have in common; never changed
	noStore, noSniff []string      // values of headers, which calls share: nobody changes them in place
}

// proxyDeps has what a proxy uses of the rest of the program. All fields are required.
type proxyDeps struct {
	cfg             *config
	log             *logger
	httpErrorLog    *log.Logger // for messages of net/http, at debug level
	logThrottle     *throttle   // of log lines about unauthenticated callers
	metrics         *metrics
	registry        *registry
	limits          *limitState
	ledger          *ledger
	running         *runningCalls
	contentKey      *contentKey
	cache           *responseCache
	endpoints       *endpointTable
	transport       *http.Transport
	bodies          *bodyMemory
	ids             *idSource
	addresses       *addressReader
	prices          *atomic.Pointer[priceTable]
	retries         *retryTracker
	databaseProblem func() string // describes what is wrong with the database file; "" if nothing
}

func newProxy(d proxyDeps) *proxy {
	p := &proxy{proxyDeps: d, flights: flights{waiting: &d.cache.waiting, byKey: map[cacheKey]*flight{}},
		buffers: newBufferPool(), meters: sync.Pool{New: func() any { return new(meter) }},
		blankRequest: &http.Request{URL: &url.URL{}, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1},
		noStore:      []string{"no-store"}, noSniff: []string{"nosniff"}}
	d.running.endAbandoned = p.endAbandoned
	return p
}

// A call is one /v1 call. It belongs to the goroutine that serves it; other goroutines see its runningCall only. The
// steps of handleV1 fill in its fields, in their order.
type call struct {
	runningCall   // what other goroutines may use: id, start, token, progress, ...
	clientRequest // what the client asks for

	requestID      string // id as clients see it
	address        string
	trace          traceContext
	shape          errorShape // of errors
	credentialHash [32]byte   // of the credential that the client presents
	tokenState     *tokenState
	project        *projectState
	attribution    *attribution
	alias          string   // the client's name for the model, if that is an alias; fields.model is never one
	models         []string // what the alias stands for, in the order in which they are asked

	affinity      affinity    // to other calls whose upstream it should get
	reservation   reservation // of its limits
	commitFirst   bool        // a limit must hold through a crash: commit before forwarding
	rates         rateHeaders // what is left of its token's limits
	upstream      *upstream   // of the current attempt, in the end the one that answered; see setUpstream
	reservedAt    int64       // when the call was reserved at its first upstream; 0: it is not
	prices        *priceTable // as they were when the call was admitted
	entry         *ledgerEntry
	storedContent *storedContent // nil: the project does not store content
	cached        *cachedCall    // nil: the project has no cache, or it was not asked yet
	admittedInfo  callInfo       // the first that is published: here it costs no allocation
	responseSpace responseWriter // of response, for the same reason
	ctx           context.Context

	attempts     attempts
	attemptCount int  // made so far, over all upstreams
	committed    bool // the pending record is committed
	commitFailed bool // it could not be: the call is refused, whatever the provider answered
	withheld     bool // the provider had answered with success by then
	response     *responseWriter
	failure      *apiError // the error that the client got instead of an answer
	relayed      bool      // ReverseProxy returned: the answer is complete
	times        callTimes
}

// A clientRequest is a client's request as read, checked and matched.
type clientRequest struct {
	match        endpointMatch
	endpoint     *endpoint
	query        string
	fields       callFields
	form         bool   // the body is multipart/form-data
	body         []byte // the whole body; nil for uploads
	memory       bodyShare
	bufferStream bool // the answer's stream is held back until it is complete
	headOnly     bool // HEAD: the client gets the head of the answer to a GET
	conditional  bool // a condition goes up, so that a 304 is an answer
	fullDuplex   bool // HTTP/1: the answer may begin before the streamed body has ended
	usageAdded   bool // stream_options.include_usage was added by the proxy
}

// callTimes are the moments of a call that its row and the metrics need.
type callTimes struct {
	bodyRead  time.Duration // the client took to send the body
	sentAt    time.Time     // when the call went to the provider; zero: it did not
	headersAt time.Time     // when the provider's headers came; zero: none did
	firstByte time.Duration // from the start until the first answer byte left; 0: none did
	settledAt time.Time     // zero: not settled
}

// publish lets other goroutines see the call. It is called once, at admission.
func (c *call) publish() {
	c.admittedInfo = callInfo{requestID: c.requestID, address: c.address, project: c.project, token: c.tokenState,
		endpoint: c.endpoint, model: c.fields.model, stream: c.fields.stream, attribution: c.attribution,
		upstream: c.upstream, inputTokens: c.reservation.estimate.input, reservation: &c.reservation}
	c.info.Store(&c.admittedInfo)
}

// setUpstream makes u the call's current upstream. A published value is replaced, never changed.
func (c *call) setUpstream(u *upstream) {
	c.upstream = u
	if old := c.info.Load(); old != nil && old.upstream != u {
		info := *old
		info.upstream = u
		c.info.Store(&info)
	}
}

// endTime returns when the call was settled, or now if it was not admitted.
func (c *call) endTime() time.Time {
	if c.times.settledAt.IsZero() {
		return time.Now()
	}
	return c.times.settledAt
}

// handleV1 carries one call to the provider and back. Each step may end the call; none is repeated.
func (p *proxy) handleV1(w http.ResponseWriter, r *http.Request) {
	c := p.newCall(w, r)
	if err := p.authenticate(c, r); err != nil {
		p.refuse(c, w, r, err)
		return
	}
	defer func() { c.token.release(c.endTime()) }()
	c.memory = p.newBodyShare(c.token)
	c.ctx, c.cancel = context.WithCancelCause(c.newCallContext(r))
	defer c.cancel(nil)
	if err := p.running.add(&c.runningCall); err != nil {
		p.refuse(c, w, r, err)
		return
	}
	defer p.leave(c)
	err := p.readCall(c, w, r)
	err = cmp.Or(err, p.readAttribution(c, r.Header)) // of calls that are refused, too
	if err == nil {
		err = p.admit(c) // reserves, and hands the pending record to the ledger
	}
	if err != nil {
		p.refuse(c, w, r, err)
		return
	}
	c.storedContent = p.newStoredContent(c)
	// Deferred: a cut answer leaves ReverseProxy by a panic (http.ErrAbortHandler), and is still recorded
	// and paid for.
	defer p.settle(c, r)
	c.rates.write(w.Header())
	if c.commitFirst { // otherwise the record is committed while the provider works on its answer
		if err := p.awaitCommit(c); err != nil {
			p.fail(c, w, err)
			return
		}
	}
	if p.answerFromCache(c, w, r) {
		return
	}
	if err := c.reserveUpstream(); err != nil {
		p.fail(c, w, err)
		return
	}
	p.forward(c, w, r) // meters the answer as it passes: proxy_response.go
}

// newCall returns a call with an id, and puts the id into the header of every answer.
func (p *proxy) newCall(w http.ResponseWriter, r *http.Request) *call {
	useGeminiPath(r)
	c := &call{runningCall: runningCall{
		ticks: &p.running.ticks, start: time.Now(), controller: http.NewResponseController(w)}}
	c.attempts.p, c.attempts.c = p, c
	c.id = p.ids.next(c.start)
	c.address = p.addresses.clientAddress(r)
	c.trace, _ = parseTraceparent(r.Header["Traceparent"])
	c.shape = shapeFor(r)
	c.requestID = formatRequestID(c.id)
	id := []string{c.requestID}
	w.Header()["X-Llm-Proxy-Request-Id"] = id
	w.Header()["X-Request-Id"] = id // replaced by the provider's, if it sends one
	if c.shape == shapeAnthropic {
		w.Header()["Request-Id"] = id // where Anthropic's SDKs look for it
	}
	w.Header()["X-Content-Type-Options"] = p.noSniff
	if c.shape == shapeGoogle && r.Header["X-Goog-Api-Key"] == nil && r.Header["Authorization"] == nil {
		// A link can have the token in its query. In a browser, scripts of the answer could use a session of /admin.
		w.Header()["Content-Security-Policy"] = []string{"default-src 'none'; frame-ancestors 'none'; sandbox"}
	}
	return c
}

// leave frees what the call holds until its handler returns. It runs after settle.
func (p *proxy) leave(c *call) {
	// After the handler net/http sends what it has buffered, and the watchdog no longer sees the call.
	_ = c.controller.SetWriteDeadline(c.endTime().Add(p.running.limits.clientStallTimeout))
	c.memory.releaseAll()
	p.running.remove(&c.runningCall)
	if w := c.response; w != nil && w.meter != nil {
		p.meters.Put(w.meter)
		w.meter = nil
	}
}

// authenticate finds the token that the request presents, and acquires it. It reads no byte of the body.
func (p *proxy) authenticate(c *call, r *http.Request) error {
	presented, err := credential(r)
	if err != nil {
		return err
	}
	hash, ok := hashCredential(tokenPrefix, presented)
	if !ok && strings.HasPrefix(presented, manageKeyPrefix) {
		return errBadToken("management key")
	}
	if !ok {
		return errBadToken("malformed")
	}
	c.credentialHash = hash
	now := c.start.UnixMilli()
	token, state, err := p.registry.lookup(r.Context(), hash, now)
	switch {
	case errors.Is(err, errUnknownToken):
		return errBadToken("unknown")
	case err != nil && r.Context().Err() != nil:
		return errClientGone.withCause(err)
	case err != nil:
		return errStoreUnavailable(err)
	}
	c.token, c.tokenState, c.project = token, state, token.project.state.Load()
	if reason := token.validity(state, now); reason != "" {
		return errBadToken(reason)
	}
	if !c.project.active {
		return errProjectEnded(c.project.deleted)
	}
	if !c.project.policy.allowsAddress(c.address) || !state.policy.allowsAddress(c.address) {
		return errAddressNotAllowed(c.address)
	}
	if !token.acquire() {
		return p.authenticate(c, r) // it was evicted a moment ago: load it again, with its counts
	}
	return nil
}

// abortCause returns why the watchdog ended a call, or nil if it did not.
func abortCause(ctx context.Context) *apiError {
	e, _ := errors.AsType[*apiError](context.Cause(ctx))
	return e
}

// awaitCommit returns when the pending record is committed. No answer byte may leave before.
func (p *proxy) awaitCommit(c *call) error {
	if c.committed {
		return nil
	}
	select {
	case <-c.entry.committed():
		return c.checkCommit()
	default:
	}
	c.setPhase(phaseLedger)
	select {
	case <-c.entry.committed():
		return c.checkCommit()
	case <-c.ctx.Done():
		return context.Cause(c.ctx)
	}
}

func (c *call) checkCommit() error {
	if err := c.entry.commitErr(); err != nil {
		c.commitFailed = true
		return errLedgerUnavailable(err)
	}
	c.committed = true
	return nil
}

// forward sends the call to the provider and relays the answer.
func (p *proxy) forward(c *call, w http.ResponseWriter, r *http.Request) {
	c.response = newResponseWriter(p, c, w)
	c.bufferStream = c.bufferStream && c.fields.stream
	c.headOnly = r.Method == http.MethodHead
	unchanged := c.endpoint
	if c.rewritesModelList() {
		unchanged = nil
	}
	in := p.blankRequest.WithContext(c.ctx) // a copy; each attempt sets its own URL
	in.Method = c.endpoint.method
	if c.body == nil && c.endpoint.upload {
		// An upload is streamed, and the answer may begin before the upload ends. HTTP/1 has to be told.
		c.fullDuplex = r.ProtoMajor == 1 && c.controller.EnableFullDuplex() == nil
		c.progress.uploading.Store(true)
		in.Body = &progressReader{http.MaxBytesReader(w, r.Body, p.cfg.maxUploadBytes), &c.runningCall}
		in.ContentLength = r.ContentLength
		defer c.endUpload(in.Body)
	}
	rp := &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.Header, c.times.sentAt = upstreamHeader(r.Header, c.project.id, unchanged), time.Now()
			if c.headOnly || c.endpoint.hasResults() && pr.Out.Header["Range"] != nil &&
				p.limits.hasKnownResults(c.ctx, c.upstream.host, c.match.path) {
				delete(pr.Out.Header, "Range") // only a GET has ranges, and usage is counted in whole results
			}
			c.conditional = pr.Out.Header["If-None-Match"] != nil || pr.Out.Header["If-Modified-Since"] != nil
		},
		Transport:      &c.attempts, // it builds each attempt's request: proxy_attempts.go
		BufferPool:     p.buffers,
		ErrorLog:       p.httpErrorLog,
		ModifyResponse: func(res *http.Response) error { return p.acceptResponse(c, res) },
		ErrorHandler:   func(_ http.ResponseWriter, _ *http.Request, err error) { p.fail(c, w, err) },
	}
	defer c.response.stopHeadTimer()
	if c.bufferStream {
		c.response.startPings(p.cfg.streamPing)
		defer c.response.stopPings()
	}
	rp.ServeHTTP(c.response, in)
	c.response.finish()
	if c.relayed = true; c.response.broken {
		_ = c.response.flush()
		panic(http.ErrAbortHandler)
	}
}

// acceptResponse checks the status and header of the provider's answer before any of it leaves.
func (p *proxy) acceptResponse(c *call, res *http.Response) error {
	c.times.headersAt = time.Now()
	c.response.stopPings()
	switch code := res.StatusCode; {
	case code == http.StatusUnauthorized || c.attempts.lastFault == faultKey:
		return errUpstreamAuth(code)
	case code == http.StatusForbidden || code == http.StatusNotFound:
		maskKeyLike(peekBody(res)) // in place
	case code < 200 || code >= 300 && code < 400 && !c.isNotModified(code):
		return errUpstreamProtocol(code)
	}
	if err := p.awaitCommit(c); err != nil {
		c.withheld = res.StatusCode < 300
		return err
	}
	if c.response.headSent && !isEventStream(res) {
		if c.withheld = res.StatusCode < 300; c.withheld {
			return errUpstreamProtocol(res.StatusCode)
		}
		c.response.relayErrorEvent(res)
	}
	c.progress.idleTimeout.Store(c.upstream.settings.IdleMS * int64(time.Millisecond))
	c.setPhase(phaseRelaying)
	if res.StatusCode == http.StatusOK {
		if err := rewriteModels(c, res); err != nil {
			return err
		}
	}
	c.response.prepare(res)
	if c.headOnly { // the head of the answer to a GET: not every provider answers HEAD
		res.Body.Close()
		res.Body = http.NoBody
	}
	return nil
}

// isNotModified reports whether an answer says that the client's copy is still valid, and the client has asked that.
func (c *call) isNotModified(status int) bool {
	return status == http.StatusNotModified && c.conditional
}

// fail answers a call that got no answer from the provider. w is the client's own.
func (p *proxy) fail(c *call, w http.ResponseWriter, err error) {
	if c.response != nil {
		c.response.stopPings()
	}
	c.failure = upstreamFailure(c, err)
	if c.failure == nil {
		// The client has left, or has only closed its sending side, which looks the same. Returning would
		// send an empty 200: break the connection instead.
		panic(http.ErrAbortHandler)
	}
	if c.attempts.mayBeBilled { // SDKs repeat a call by themselves otherwise
		c.failure = c.failure.withoutRetry()
	}
	if !c.committed && !c.commitFailed { // an error is an answer too: it waits for the record
		select {
		case <-c.entry.committed():
			_ = c.checkCommit()
		case <-time.After(p.running.limits.commitTimeout):
		}
	}
	if !c.committed {
		c.failure = errLedgerUnavailable(err)
	}
	c.times.firstByte = time.Since(c.start)
	if c.response != nil && c.response.headSent {
		c.response.sendErrorEvent(c.failure)
		panic(http.ErrAbortHandler)
	}
	c.closeIfUnread(w.Header())
	writeError(w, c.failure, c.shape)
}

// upstreamFailure returns the error for the client, or nil if the client has left. err may name hosts and
// addresses: it becomes the cause, which only the log gets.
func upstreamFailure(c *call, err error) *apiError {
	if cause := abortCause(c.ctx); cause != nil {
		return cause
	}
	if c.ctx.Err() != nil {
		return nil
	}
	if e, ok := errors.AsType[*apiError](err); ok {
		return e
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return errUploadTooLarge.withCause(err)
	}
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return errConnectTimeout.withCause(err)
	}
	return errUpstreamUnreachable.withCause(err)
}
