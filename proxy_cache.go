// This file connects a call to the response cache: whether the cache takes part, the key of its answer, waiting for an
// identical call, replaying a cached answer, keeping a complete one, and what clients and providers say about caching.
// It reads no secret, sends nothing to a provider and writes no row; settle records what happened.
package main

import (
	"context"
	"encoding/json"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A cachedCall is what the cache does for one call. It belongs to the call's goroutine, except for lead, which the
// cache guards. nil: the call's project has no cache.
type cachedCall struct {
	policy     *cachePolicy
	key        cacheKey
	upstream   *upstream // the key is for its answers only
	purges     int64     // of the cache, when the call asked it
	directives cacheDirectives
	status     string // Cache-Status without "; stored"

	hit *cachedAnswer // the answer that the client gets; nil: the provider is called

	mayStore bool // the answer is stored if it turns out to be complete
	storing  bool // the head of the answer allows that, and so does its body so far
	header   []string
	body     []byte
	reserved int64 // of the call's body memory
	response *http.Response

	lead      flightLead
	stopWatch func() bool    // of the client
	watching  sync.WaitGroup // done when the watch has acted
}

// callParent returns the parent of the call's context. In a project with a cache the call does not end with its
// client's connection by itself: watchClient decides that.
func (c *call) callParent(r *http.Request) context.Context {
	if c.project.policy.Cache == nil {
		return r.Context()
	}
	return context.WithoutCancel(r.Context())
}

// watchClient ends the call when its client leaves, but not while other calls wait for its answer.
func (p *proxy) watchClient(c *call, r *http.Request) {
	u := c.cached
	u.watching.Add(1)
	u.stopWatch = context.AfterFunc(r.Context(), func() {
		defer u.watching.Done()
		p.cache.clientLeft(&u.lead, func() { c.cancel(context.Cause(r.Context())) })
	})
}

// answerFromCache answers the call from the cache, or decides what the cache does with the provider's answer, and
// returns false. It does nothing in a project without a cache.
func (p *proxy) answerFromCache(c *call, w http.ResponseWriter, r *http.Request) bool {
	policy := c.project.policy.Cache
	if policy == nil {
		return false
	}
	u := &cachedCall{policy: policy, upstream: c.upstream, purges: p.cache.purges.Load()}
	c.cached = u
	p.watchClient(c, r)
	u.directives = parseCacheControl(r.Header["Cache-Control"], r.Header["Pragma"])
	reason := policy.bypassReason(c.endpoint, &c.fields, c.body)
	if reason == "" && u.directives.noStore {
		reason = "no-store"
	}
	if reason != "" {
		p.cache.bypasses[indexOf(bypassReasons[:], reason)].Add(1)
		u.setStatus(w.Header(), cacheBypass+reason)
		return u.directives.onlyIfCached && p.failUncached(c, w)
	}
	u.key = newCacheKey(p.cache.salt, c.cacheKeyParts(r), c.body)
	u.mayStore = true
	now := time.Now().UnixMilli()
	a := p.cache.lookup(c.ctx, &u.key, c.project.seq, now)
	switch {
	case a != nil && !u.directives.noCache && a.satisfies(&u.directives, now):
		return p.replay(c, w, a, now, "")
	case u.directives.onlyIfCached:
		u.setStatus(w.Header(), cacheMiss)
		return p.failUncached(c, w)
	case a != nil: // the client asks for a newer one
		p.cache.misses.Add(1)
		u.setStatus(w.Header(), cacheRequest)
		return false
	case u.directives.noCache:
		p.cache.misses.Add(1)
		u.setStatus(w.Header(), cacheMiss)
		return false
	}
	return p.joinFlight(c, w, now)
}

// joinFlight waits for an identical call that is running, and answers the call from its answer. Otherwise it returns
// false, and the call goes to the provider: others may wait for it then.
func (p *proxy) joinFlight(c *call, w http.ResponseWriter, now int64) bool {
	u := c.cached
	a, f, alone := p.cache.join(&u.key, &u.lead, now)
	if a != nil {
		return p.replay(c, w, a, now, "")
	}
	if f != nil {
		a, err := p.awaitFlight(c, f)
		if err != nil {
			p.fail(c, w, err)
			return true
		}
		if a != nil {
			p.cache.collapsed.Add(1)
			return p.replay(c, w, a, time.Now().UnixMilli(), "; detail=collapsed")
		}
	}
	p.cache.misses.Add(1)
	if u.setStatus(w.Header(), cacheMiss); f != nil || alone {
		u.setStatus(w.Header(), cacheAlone)
	}
	return false
}

// awaitFlight waits for the answer of an identical call. It returns nil if that call has none to share, or takes too
// long, and an error if this call ends first.
func (p *proxy) awaitFlight(c *call, f *flight) (*cachedAnswer, error) {
	defer p.cache.leave(f)
	c.setPhase(phaseProvider)
	timer := time.NewTimer(min(maxFlightWait, p.running.limits.upstreamTimeout))
	defer timer.Stop()
	select {
	case <-f.done:
		return f.answer, nil
	case <-c.ctx.Done():
		return nil, context.Cause(c.ctx)
	case <-timer.C:
		return nil, nil
	}
}

// failUncached answers a call with only-if-cached for which there is no answer.
func (p *proxy) failUncached(c *call, w http.ResponseWriter) bool {
	p.fail(c, w, errNotCached)
	return true
}

// The values of Cache-Status (RFC 9211) of calls that go to the provider.
const (
	cacheMiss      = "llm-proxy; fwd=miss"
	cacheRequest   = "llm-proxy; fwd=request"
	cacheAlone     = "llm-proxy; fwd=miss; collapsed=?0"
	cacheBypass    = "llm-proxy; fwd=bypass; detail="
	cacheStored    = "; stored"
	cacheMissStore = cacheMiss + cacheStored
)

func (u *cachedCall) setStatus(h http.Header, status string) {
	u.status = status
	h["Cache-Status"] = []string{status}
}

// cacheKeyParts returns what the answer depends on beside the body. The project's version stands for its policy: no
// answer outlives a change of it.
func (c *call) cacheKeyParts(r *http.Request) []string {
	u := c.upstream
	scope, id := "project", c.project.id
	if c.project.policy.Cache.Scope == "token" {
		scope, id = "token", c.tokenState.id
	}
	parts := make([]string, 0, 32)
	parts = append(parts, scope, id, strconv.FormatInt(c.project.version, 10), c.endpoint.name(), u.provider, u.scheme,
		u.host, u.basePath, u.organization, u.openaiProject, u.mapModel(c.fields.model), c.query,
		strconv.FormatBool(c.usageAdded), strconv.FormatBool(c.bufferStream))
	header := func(name string) {
		values := r.Header[name]
		parts = append(append(parts, name, strconv.Itoa(len(values))), values...)
	}
	header("Accept")
	header("Content-Type")
	if v := r.Header["Connection"]; len(v) > 1 || len(v) == 1 && !isPlainConnection(v[0]) {
		header("Connection") // it may name headers that do not go up
	}
	var space [8]string
	names := space[:0]
	for name := range r.Header {
		if isProviderHeader(name) && !describesAccount(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		header(name)
	}
	return parts
}

func isPlainConnection(value string) bool {
	return strings.EqualFold(value, "keep-alive") || strings.EqualFold(value, "close")
}

// replay answers the call with a cached answer. detail is added to Cache-Status.
func (p *proxy) replay(c *call, w http.ResponseWriter, a *cachedAnswer, now int64, detail string) bool {
	if err := p.awaitCommit(c); err != nil {
		p.fail(c, w, err)
		return true
	}
	u := c.cached
	u.hit = a
	c.upstream.health.releaseCapacity(c.start.UnixMilli(), c.inputEstimate(), &c.upstream.settings)
	h := w.Header()
	h["Content-Type"] = nil // net/http would guess one from the body
	for i := 0; i+1 < len(a.Header); i += 2 {
		h[a.Header[i]] = append(h[a.Header[i]], a.Header[i+1])
	}
	ttl := strconv.FormatInt(max(0, a.ExpiresAt-now)/1000, 10)
	u.setStatus(h, "llm-proxy; hit; ttl="+ttl+`; key="`+u.key.String()+`"`+detail)
	h["Age"] = []string{strconv.FormatInt(a.age(now), 10)}
	h["Cache-Control"] = []string{"no-store"}
	if a.Stream {
		h["Cache-Control"] = []string{"no-cache, no-store"}
		h["X-Accel-Buffering"] = []string{"no"}
	} else {
		h["Content-Length"] = []string{strconv.Itoa(len(a.body))}
	}
	c.response = newResponseWriter(p, c, w)
	c.response.body = answerBody{peeked: true, ended: true}
	c.response.framed = !a.Stream // otherwise in chunks, like the provider's
	c.response.WriteHeader(http.StatusOK)
	c.progress.bytesRelayed.Store(int64(len(a.body)))
	_ = c.response.send(a.body) // the response knows whether it failed
	c.relayed = true
	return true
}

// accept decides by the head of the provider's answer whether it may be stored. to is the client's header.
func (u *cachedCall) accept(p *proxy, c *call, res *http.Response, to http.Header) {
	if u == nil || !u.mayStore {
		return
	}
	encoding := res.Header.Get("Content-Encoding")
	if res.StatusCode != http.StatusOK || encoding != "" && encoding != "identity" || len(res.Trailer) > 0 ||
		forbidsStoring(res.Header["Cache-Control"]) || slices.Contains(res.Header["Vary"], "*") ||
		res.ContentLength > u.policy.maxEntry() || c.upstream != u.upstream || c.attempts.fallbackModel != "" {
		u.discard(p)
		return
	}
	u.storing, u.response = true, res
	if u.status == cacheMiss {
		to["Cache-Status"] = []string{cacheMissStore}
	} else {
		to["Cache-Status"] = []string{u.status + cacheStored}
	}
	u.header = make([]string, 0, 8)
	for name, values := range to {
		if replaysHeader(name) {
			for _, v := range values {
				u.header = append(u.header, name, v)
			}
		}
	}
	if res.ContentLength > 0 {
		u.grow(p, c, res.ContentLength)
	}
}

// replaysHeader reports whether an answer header describes the answer, and not the call that brought it.
func replaysHeader(name string) bool {
	switch name {
	case "Content-Type", "Content-Disposition":
		return true
	case "Openai-Processing-Ms":
		return false
	}
	return isProviderHeader(name) && !describesAccount(name)
}

// add keeps bytes of the answer as they go to the client.
func (u *cachedCall) add(p *proxy, c *call, b []byte) {
	if u == nil || !u.storing {
		return
	}
	if need := int64(len(u.body) + len(b)); need > u.policy.maxEntry() ||
		need > int64(cap(u.body)) && !u.grow(p, c, max(need, 2*int64(cap(u.body)))) {
		u.discard(p)
		return
	}
	u.body = append(u.body, b...)
}

// grow makes space for n bytes of the answer. It returns false, and the answer is not stored, if BODY_MEMORY has none.
func (u *cachedCall) grow(p *proxy, c *call, n int64) bool {
	if c.memory.reserve(n-u.reserved) != nil {
		u.discard(p)
		return false
	}
	u.reserved = n
	u.body = append(make([]byte, 0, n), u.body...)
	return true
}

// discard gives up storing the answer. Who waits for it goes on.
func (u *cachedCall) discard(p *proxy) {
	u.mayStore, u.storing, u.body, u.response = false, false, nil, nil
	p.cache.end(&u.lead, nil)
}

// isAwaited reports whether other calls wait for the answer, so that it is read to its end even if the client leaves.
func (u *cachedCall) isAwaited(p *proxy) bool { return u != nil && p.cache.isAwaited(&u.lead) }

// settleCache fills in what the cache changes in the row of a call that has ended, and stores its answer.
func (p *proxy) settleCache(c *call, row *requestRow) {
	u := c.cached
	if u == nil {
		return
	}
	if !u.stopWatch() {
		u.watching.Wait()
	}
	if a := u.hit; a != nil {
		row.cache, row.upstream, row.model, row.cost, row.priced = "hit", 0, a.Model, 0, true
		row.saved, row.savedUS = a.Cost, max(0, a.TotalUS-row.totalUS)
		p.cache.hits.Add(1)
		p.cache.savedNanos.Add(row.saved)
		p.cache.savedUS.Add(row.savedUS)
		return
	}
	var answer *cachedAnswer
	if u.storing && c.isWhole() {
		answer = &cachedAnswer{key: u.key, project: c.project.seq, body: slices.Clip(u.body),
			cachedMeta: cachedMeta{Header: u.header, Stream: c.response.sse, Model: row.model, Cost: row.cost,
				TotalUS: row.totalUS, StoredAt: c.times.settledAt.UnixMilli()}}
		answer.ExpiresAt = answer.StoredAt + u.policy.TTLSeconds*1000
		if u.policy.Scope == "token" {
			answer.token = c.tokenState.seq
		}
		p.cache.put(answer, u.purges)
	}
	p.cache.end(&u.lead, answer)
}

// isWhole reports whether the call has a complete answer without an error that others may get.
func (c *call) isWhole() bool {
	w := c.response
	if !c.relayed || c.failure != nil || c.commitFailed || w.status != http.StatusOK || w.keyMask.found ||
		abortCause(c.ctx) != nil || len(c.cached.response.Trailer) > 0 {
		return false
	}
	m, body := w.meter, c.cached.body
	switch {
	case m.kind == meterNone: // the meter does not look
		return len(body) > 0 && body[0] == '{' && json.Valid(body)
	case m.failed || m.implausible || m.isUnfinished():
		return false
	case m.isStream():
		return w.sse && m.done
	}
	return !w.sse && m.format == formatJSON && m.done
}

// satisfies reports whether the answer is fresh, and fresh enough for the client.
func (a *cachedAnswer) satisfies(d *cacheDirectives, now int64) bool {
	return now+d.minFresh*1000 < a.ExpiresAt && (d.maxAge < 0 || now-a.StoredAt < d.maxAge*1000)
}

// cacheDirectives are the directives of a request's Cache-Control (RFC 9111, 5.2.1) that a cache which never answers
// with a stale answer must follow.
type cacheDirectives struct {
	noStore, noCache, onlyIfCached bool
	maxAge, minFresh               int64 // seconds; maxAge is -1 if there is none
}

// parseCacheControl reads the Cache-Control lines of a request, or without any its Pragma lines. A number that cannot
// be read makes every stored answer too old.
func parseCacheControl(lines, pragma []string) cacheDirectives {
	d := cacheDirectives{maxAge: -1}
	if len(lines) == 0 {
		lines = pragma
	}
	eachDirective(lines, func(name, value string) {
		switch name {
		case "no-store":
			d.noStore = true
		case "no-cache":
			d.noCache = true
		case "only-if-cached":
			d.onlyIfCached = true
		case "max-age":
			n := parseSeconds(value, 0)
			if d.maxAge < 0 || n < d.maxAge {
				d.maxAge = n
			}
		case "min-fresh":
			d.minFresh = max(d.minFresh, parseSeconds(value, math.MaxInt32))
		}
	})
	return d
}

// parseSeconds reads a number of seconds; it is at most MaxInt32, and otherwise if it is not a number.
func parseSeconds(text string, otherwise int64) int64 {
	if !allDigits(text) {
		return otherwise
	}
	if n, err := strconv.ParseInt(text, 10, 64); err == nil {
		return min(n, math.MaxInt32)
	}
	return math.MaxInt32
}

// eachDirective calls do for every directive, with its name in lower case and its value without quotes.
func eachDirective(lines []string, do func(name, value string)) {
	for _, line := range lines {
		for line != "" {
			end, quoted := 0, false
			for ; end < len(line) && (quoted || line[end] != ','); end++ {
				switch {
				case line[end] == '"':
					quoted = !quoted
				case line[end] == '\\' && quoted:
					end++
				}
			}
			end = min(end, len(line))
			name, value, _ := strings.Cut(line[:end], "=")
			if name = strings.ToLower(strings.TrimSpace(name)); name != "" {
				do(name, strings.Trim(strings.TrimSpace(value), `"`))
			}
			line = line[min(end+1, len(line)):]
		}
	}
}

// forbidsStoring reports whether a provider's Cache-Control forbids a shared cache to store the answer. Its other
// directives are about browsers: event streams have no-cache by custom.
func forbidsStoring(lines []string) (forbidden bool) {
	eachDirective(lines, func(name, _ string) { forbidden = forbidden || name == "no-store" || name == "private" })
	return forbidden
}
