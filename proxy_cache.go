// This file connects a call to the response cache: whether the cache takes part, waiting for an identical call,
// replaying a cached answer, keeping a complete one. It also has what administrators see and delete. It reads no
// secret, sends nothing to a provider and writes no row; settle records what happened.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// A cachedCall is what the cache does for one call. It belongs to the call's goroutine, except for lead, which the
// flights guards. nil: the cache takes no part in the call.
type cachedCall struct {
	policy     *cachePolicy
	upstream   *upstream // the key is for its answers only
	purges     int64     // of the cache, when the call asked it
	directives cacheDirectives
	status     [1]string // the client's header Cache-Status

	hit *cachedAnswer // the answer that the client gets; nil: the provider is called

	answer   cachedAnswer // the provider's: the key, and what has come of header and body
	mayStore bool         // it is stored if it turns out to be complete
	storing  bool         // the head of the answer allows that, and so does its body so far
	buffer   []byte       // of the proxy's pool, in which the answer is; nil: it is too large
	reserved int64        // of the call's body memory
	response *http.Response

	lead flightLead
}

// newCallContext returns the parent of the call's context. In a project with a cache the call does not end with its
// client's connection by itself: the watchdog sees that the client has left, and calls endAbandoned.
func (c *call) newCallContext(r *http.Request) context.Context {
	if c.project.policy.Cache == nil {
		return r.Context()
	}
	c.client = r.Context()
	return context.WithoutCancel(c.client)
}

// endAbandoned ends a call whose client has left, but not while other calls wait for its answer.
func (p *proxy) endAbandoned(c *runningCall) {
	p.flights.clientLeft(c.lead.Load(), func() { c.cancel(context.Cause(c.client)) })
}

// answerFromCache answers the call from the cache, or decides what the cache does with the provider's answer, and
// returns false. It does nothing in a project without a cache.
func (p *proxy) answerFromCache(c *call, w http.ResponseWriter, r *http.Request) bool {
	policy := c.project.policy.Cache
	if policy == nil {
		return false
	}
	directives := parseCacheControl(r.Header["Cache-Control"], r.Header["Pragma"])
	reason := policy.bypassReason(c.endpoint, &c.fields, c.body)
	if reason == "" && directives.noStore {
		reason = "no-store"
	}
	if reason != "" {
		p.cache.bypasses[indexOf(bypassReasons[:], reason)].Add(1)
		w.Header()["Cache-Status"] = []string{cacheBypass + reason}
		return directives.onlyIfCached && p.failUncached(c, w)
	}
	u := &cachedCall{policy: policy, upstream: c.upstream, purges: p.cache.purges.Load(), directives: directives}
	c.cached = u
	var space [32]string
	u.answer.key = newCacheKey(p.cache.salt, c.appendCacheKeyParts(space[:0], r.Header), c.body)
	c.lead.Store(&u.lead)
	u.mayStore = true
	now := time.Now().UnixMilli()
	stored := p.cache.stored.Load()
	a := p.cache.lookup(c.ctx, &u.answer.key, c.project.seq, now)
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
	return p.joinFlight(c, w, now, stored)
}

// joinFlight waits for an identical call that is running, and answers the call from its answer. Otherwise it returns
// false, and the call goes to the provider: others may wait for it then. The cache had no answer when stored was read.
func (p *proxy) joinFlight(c *call, w http.ResponseWriter, now, stored int64) bool {
	u := c.cached
	f, alone := p.flights.join(&u.answer.key, &u.lead)
	switch {
	case f != nil:
		a, err := p.awaitFlight(c, f)
		if err != nil {
			p.fail(c, w, err)
			return true
		}
		if a != nil {
			p.cache.collapsed.Add(1)
			now = time.Now().UnixMilli()
			p.cache.lookup(c.ctx, &u.answer.key, c.project.seq, now) // notes the use
			return p.replay(c, w, a, now, "; detail=collapsed")
		}
	case !alone && p.cache.stored.Load() != stored: // perhaps by a call that ended meanwhile
		if a := p.cache.lookup(c.ctx, &u.answer.key, c.project.seq, now); a != nil {
			p.flights.end(&u.lead, a)
			return p.replay(c, w, a, now, "")
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
	defer p.flights.leave(f)
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

// reserveUpstream reserves a call that the cache has not answered at the upstream whose answers it looked for, or if
// that has no capacity left, at another. Before, the call reserves nothing there: a hit needs no upstream, and one that
// waits for an identical call must not keep others away.
func (c *call) reserveUpstream() error {
	if c.reservedAt != 0 { // the project has no cache
		return nil
	}
	want := c.criteria(time.Now().UnixMilli())
	if !want.pinned && want.reserve(c.upstream) {
		c.reservedAt = want.now
		return nil
	}
	c.attempts.route = route{}
	return c.chooseUpstream(want.now, true)
}

// failUncached answers a call with only-if-cached for which there is no answer.
func (p *proxy) failUncached(c *call, w http.ResponseWriter) bool {
	p.fail(c, w, errNotCached)
	return true
}

// replay answers the call with a cached answer. detail is added to Cache-Status.
func (p *proxy) replay(c *call, w http.ResponseWriter, a *cachedAnswer, now int64, detail string) bool {
	if err := p.awaitCommit(c); err != nil {
		p.fail(c, w, err)
		return true
	}
	u := c.cached
	u.hit = a
	h := w.Header()
	h["Content-Type"] = nil // net/http would guess one from the body
	for pair := range slices.Chunk(a.header(), 2) {
		h[pair[0]] = append(h[pair[0]], pair[1])
	}
	ttl := strconv.FormatInt(max(0, a.ExpiresAt-now)/1000, 10)
	u.setStatus(h, "llm-proxy; hit; ttl="+ttl+`; key="`+u.answer.key.String()+`"`+detail)
	h["Age"] = []string{strconv.FormatInt(a.age(now), 10)}
	h["Cache-Control"] = p.noStore
	if a.Stream {
		h["Cache-Control"] = []string{"no-cache, no-store"}
		h["X-Accel-Buffering"] = []string{"no"}
	} else {
		h["Content-Length"] = []string{strconv.Itoa(len(a.body()))}
	}
	c.response = newResponseWriter(p, c, w)
	c.response.body = answerBody{peeked: true, ended: true}
	c.response.framed = !a.Stream // otherwise in chunks, like the provider's
	c.response.WriteHeader(http.StatusOK)
	c.progress.bytesRelayed.Store(int64(len(a.body())))
	_ = c.response.send(a.body()) // the response knows whether it failed
	c.relayed = true
	return true
}

// accept decides by the head of the provider's answer whether it may be stored.
func (u *cachedCall) accept(p *proxy, c *call, res *http.Response) {
	if u == nil || !u.mayStore {
		return
	}
	encoding := headerValue(res.Header, "Content-Encoding")
	if res.StatusCode != http.StatusOK || encoding != "" && encoding != "identity" || len(res.Trailer) > 0 ||
		forbidsStoring(res.Header["Cache-Control"]) || slices.Contains(res.Header["Vary"], "*") ||
		res.ContentLength > u.policy.maxEntry() || c.upstream != u.upstream || c.attempts.fallbackModel != "" {
		u.discard(p)
		return
	}
	u.storing, u.response = true, res
	if u.status[0] == cacheMiss {
		u.status[0] = cacheMissStore
	} else {
		u.status[0] += cacheStored
	}
	u.grow(p, c, 1<<10+max(0, res.ContentLength)) // a kilobyte for the header
}

// addHeader keeps a header of the answer that the client gets.
func (u *cachedCall) addHeader(name string, values []string) {
	if u == nil || !u.storing || !replaysHeader(name) {
		return
	}
	a := &u.answer
	for _, v := range values {
		a.data = appendHeaderLine(appendHeaderLine(a.data, name), v)
	}
	a.bodyAt = len(a.data)
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

// add keeps bytes of the body as they go to the client.
func (u *cachedCall) add(p *proxy, c *call, b []byte) {
	if u == nil || !u.storing {
		return
	}
	if need := int64(len(u.answer.data) + len(b)); need-int64(u.answer.bodyAt) > u.policy.maxEntry() ||
		need > u.reserved && !u.grow(p, c, max(need, 2*u.reserved)) {
		u.discard(p)
		return
	}
	u.answer.data = append(u.answer.data, b...)
}

// grow makes space for n bytes of the answer. It returns false, and the answer is not stored, if BODY_MEMORY has none.
func (u *cachedCall) grow(p *proxy, c *call, n int64) bool {
	if c.memory.reserve(n-u.reserved) != nil {
		u.discard(p)
		return false
	}
	u.reserved = n
	switch data := u.answer.data; {
	case n > int64(len(pooledBuffer{})):
		u.answer.data = append(make([]byte, 0, n), data...)
		u.returnBuffer(p)
	case u.buffer == nil:
		u.buffer = p.buffers.Get()
		u.answer.data = u.buffer[:0]
	}
	return true
}

// returnBuffer gives back the buffer of the answer, which nobody uses any more.
func (u *cachedCall) returnBuffer(p *proxy) {
	if u.buffer != nil {
		p.buffers.Put(u.buffer)
		u.buffer = nil
	}
}

// discard gives up storing the answer. Who waits for it goes on.
func (u *cachedCall) discard(p *proxy) {
	u.mayStore, u.storing, u.answer.data, u.response = false, false, nil, nil
	u.returnBuffer(p)
	p.flights.end(&u.lead, nil)
}

// isAwaited reports whether other calls wait for the answer, so that it is read to its end even if the client leaves.
func (u *cachedCall) isAwaited(p *proxy) bool { return u != nil && p.flights.isAwaited(&u.lead) }

// settleCache fills in what the cache changes in the row of a call that has ended, and stores its answer.
func (p *proxy) settleCache(c *call, row *requestRow) {
	u := c.cached
	if u == nil {
		return
	}
	if a := u.hit; a != nil {
		row.cache, row.upstream, row.model, row.cost, row.priced = "hit", 0, a.model, 0, true
		row.saved, row.savedUS = a.Cost, max(0, a.TotalUS-row.totalUS)
		if c.alias != "" {
			row.attemptLog = formatAttemptLog(attemptLine{Alias: c.alias, Model: c.upstream.mapModel(c.fields.model),
				Status: row.status})
		}
		p.cache.hits.Add(1)
		p.cache.savedNanos.Add(row.saved)
		p.cache.savedUS.Add(row.savedUS)
		return
	}
	if !u.storing || !c.isWhole() {
		u.discard(p)
		return
	}
	a := &u.answer
	a.project, a.endpoint, a.model = c.project.seq, c.endpoint.pattern, row.model
	a.cachedMeta = cachedMeta{Stream: c.response.sse, Cost: row.cost, TotalUS: row.totalUS,
		StoredAt: c.times.settledAt.UnixMilli()}
	a.ExpiresAt = a.StoredAt + u.policy.TTLSeconds*1000
	if u.policy.Scope == "token" {
		a.token = c.tokenState.seq
	}
	p.cache.put(a, u.purges)
	if awaited := p.flights.end(&u.lead, a); !awaited {
		a.data = nil
		u.returnBuffer(p)
	}
}

// isWhole reports whether the call has a complete answer without an error that others may get.
func (c *call) isWhole() bool {
	w := c.response
	if !c.relayed || c.failure != nil || c.commitFailed || w.status != http.StatusOK || w.keyMask.found ||
		abortCause(c.ctx) != nil || len(c.cached.response.Trailer) > 0 {
		return false
	}
	m, body := w.meter, c.cached.answer.body()
	switch {
	case m.kind == meterNone: // the meter does not look
		return len(body) > 0 && body[0] == '{' && json.Valid(body)
	case m.failed || m.implausible || m.isUnfinished():
		return false
	case m.isStream():
		return m.done && (w.sse || m.format == formatJSON && c.endpoint.streams()) // Gemini's can be a list
	}
	return !w.sse && m.format == formatJSON && m.done
}

// satisfies reports whether the answer is fresh, and fresh enough for the client.
func (a *cachedAnswer) satisfies(d *cacheDirectives, now int64) bool {
	return now+d.minFresh*1000 < a.ExpiresAt && (d.maxAge < 0 || now-a.StoredAt < d.maxAge*1000)
}

// lookup returns the answer of a key, nil if there is none.
func (c *responseCache) lookup(ctx context.Context, key *cacheKey, project, now int64) *cachedAnswer {
	purges := c.purges.Load()
	c.mu.Lock()
	a := c.fromMemory(key, now)
	_, maybe := c.onDisk[key.id()]
	maybe = maybe || c.onDisk == nil
	c.mu.Unlock()
	if a != nil || !maybe {
		return a
	}
	if a = c.read(ctx, key, project, now); a == nil {
		return nil
	}
	own := a.chunkOfOwn()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.purges.Load() != purges {
		return nil
	}
	c.addToMemory(a, own)
	return c.fromMemory(key, now)
}

// read returns an answer from the disk, nil if there is none that can be used.
func (c *responseCache) read(ctx context.Context, key *cacheKey, project, now int64) *cachedAnswer {
	ctx, cancel := context.WithTimeout(ctx, cacheReadTimeout)
	defer cancel()
	token, sealed, err := c.store.cachedAnswer(ctx, key.id(), project, now)
	if err != nil {
		return nil
	}
	a := &cachedAnswer{answerHead: answerHead{key: *key, project: project, token: token}}
	plain, err := c.sealing.openCached(key.context(project), sealed)
	if err != nil || !a.decode(plain) || now >= a.ExpiresAt {
		return nil
	}
	return a
}

// put stores an answer in memory, unless something was purged since purges was read. It is written at once if it takes
// the place of another, and otherwise when it is asked for again, or there is time. Memory has a copy of its data,
// unless that is large.
func (c *responseCache) put(a *cachedAnswer, purges int64) {
	own := a.chunkOfOwn()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.purges.Load() != purges {
		return
	}
	c.stored.Add(1)
	_, earlier := c.inMemory(a.key.id()) // whoever asked for it brought it there
	m, e := c.addToMemory(a, own)
	e.recordedUse = e.StoredAt
	switch {
	case e.size() > c.maxBytes:
		c.dropped.Add(1)
	case earlier != nil:
		c.writeSoon(m, e)
	default:
		m.setWaits(e, writeOnce)
	}
}

// A flights has the calls on which identical ones wait.
type flights struct {
	waiting *atomic.Int64 // counts them

	mu    sync.Mutex
	byKey map[cacheKey]*flight
}

// A flight is one call to a provider on which identical calls wait. The mutex of flights guards it.
type flight struct {
	key     cacheKey
	done    chan struct{} // nil: nobody waits, or has waited
	answer  *cachedAnswer // once done is closed; nil: there is none to share
	ended   bool
	waiting int
	abandon func() // ends the leader's call when nobody waits any more; nil while its client is there
}

// A flightLead is a call's part in the flight that it leads. The mutex of flights guards it.
type flightLead struct {
	flight *flight // nil: the call leads none
	own    flight  // saves an allocation
}

const (
	maxFlightWait    = 2 * time.Minute
	maxFlightWaiting = 1000 // calls that wait for one flight
)

// join returns the flight to wait for, which the caller must leave. If it returns none, the caller leads a new flight
// and must end it, or with alone goes without one, because the flight has as many calls as it may have.
func (fs *flights) join(key *cacheKey, lead *flightLead) (f *flight, alone bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if f := fs.byKey[*key]; f != nil {
		if f.waiting >= maxFlightWaiting {
			return nil, true
		}
		fs.waiting.Add(1)
		if f.waiting++; f.done == nil {
			f.done = make(chan struct{})
		}
		return f, false
	}
	lead.own.key, lead.flight = *key, &lead.own
	fs.byKey[*key] = lead.flight
	return nil, false
}

// leave is called by a call that waits no longer.
func (fs *flights) leave(f *flight) {
	fs.mu.Lock()
	fs.waiting.Add(-1)
	f.waiting--
	var abandon func()
	if f.waiting == 0 && !f.ended {
		if abandon = f.abandon; abandon != nil {
			fs.remove(f)
		}
	}
	fs.mu.Unlock()
	if abandon != nil {
		abandon()
	}
}

// end ends the flight that lead leads, if any, and gives answer to those who wait; nil: they go on by themselves. It
// reports whether anybody has waited.
func (fs *flights) end(lead *flightLead, answer *cachedAnswer) (awaited bool) {
	f := lead.flight // which only the call itself sets
	if f == nil {
		return false
	}
	fs.mu.Lock()
	lead.flight = nil
	f.ended, f.answer = true, answer
	fs.remove(f)
	abandon := f.abandon
	if awaited = f.done != nil; awaited {
		close(f.done)
	}
	fs.mu.Unlock()
	if abandon != nil {
		abandon()
	}
	return awaited
}

// remove lets the next call with the flight's key lead another. The caller has mu locked.
func (fs *flights) remove(f *flight) {
	if fs.byKey[f.key] == f {
		delete(fs.byKey, f.key)
	}
}

// clientLeft calls abandon, which ends a call whose client has left: at once, or when nobody waits for it any more.
// lead is nil for a call that cannot have others wait.
func (fs *flights) clientLeft(lead *flightLead, abandon func()) {
	if lead == nil {
		abandon()
		return
	}
	fs.mu.Lock()
	f := lead.flight
	if f != nil && f.waiting > 0 {
		f.abandon = abandon
		fs.mu.Unlock()
		return
	}
	if f != nil {
		fs.remove(f)
	}
	fs.mu.Unlock()
	abandon()
}

// isAwaited reports whether calls wait for the call that leads.
func (fs *flights) isAwaited(lead *flightLead) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return lead.flight != nil && lead.flight.waiting > 0
}

// What administrators see and delete.

// purge deletes the answers that f describes, in memory and on disk, and returns how many. An answer that a running
// call gets is not stored. Also if the disk fails, memory has none of them afterwards.
func (c *responseCache) purge(ctx context.Context, f cacheFilter) (int64, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	deleted := map[int64]struct{}{}
	c.mu.Lock()
	c.purges.Add(1)
	c.spare = nil // it has bytes of answers that are gone
	for _, m := range c.chunks {
		live := m.live
		for e := range m.all() {
			a := m.answer(e)
			if row := a.row(); f.matches(&row) {
				deleted[e.key.id()] = struct{}{}
				c.removeFromMemory(m, e)
			}
		}
		if m.live < live {
			m.erase()
		}
	}
	c.mu.Unlock()
	err := c.purgeDisk(ctx, f, deleted)
	return int64(len(deleted)), err
}

// purgeDisk deletes the answers that f describes on disk, and adds their ids to deleted. It looks for them where
// nobody waits, and deletes few at a time: calls can be recorded in between. The caller has writing locked.
func (c *responseCache) purgeDisk(ctx context.Context, f cacheFilter, deleted map[int64]struct{}) error {
	after := cachePosition{token: f.token, size: -1}
	if f.token == anyToken {
		after.token = 1
	}
	for {
		rows, err := c.store.cachedAfter(ctx, f.project, after, cachePurgePage)
		if err != nil {
			return err
		}
		var ids []int64
		for i := range rows {
			r := &rows[i]
			if after = (cachePosition{r.token, r.size, r.id}); f.matches(r) {
				ids = append(ids, r.id)
			}
		}
		for batch := range slices.Chunk(ids, cacheBatchEntries) {
			gone, bytes, err := c.store.deleteCached(ctx, batch)
			if err != nil {
				return err
			}
			for _, id := range gone {
				deleted[id] = struct{}{}
			}
			c.forget(gone)
			c.mu.Lock()
			c.diskBytes -= bytes
			c.mu.Unlock()
			time.Sleep(time.Millisecond)
		}
		if len(rows) < cachePurgePage || f.token > 0 && after.token > f.token {
			return nil
		}
	}
}

// purgeUnreachable purges answers that no call can get any more. What the disk keeps because of a failure expires.
func (c *responseCache) purgeUnreachable(ctx context.Context, f cacheFilter) {
	if _, err := c.purge(context.WithoutCancel(ctx), f); err != nil {
		c.log.Warn("cached answers could not be deleted", "error", err)
	}
}

// usage returns what is cached of a project, by model, the largest share first.
func (c *responseCache) usage(ctx context.Context, project, now int64) ([]*cacheUsage, error) {
	c.writing.Lock() // an answer that is being written is either in memory only or on disk
	defer c.writing.Unlock()
	onDisk, err := c.store.cacheUsage(ctx, project, now)
	models := c.memoryUsage(project, now)
	for _, u := range onDisk {
		if m := models[u.model]; m != nil {
			u.entries, u.bytes = u.entries+m.entries, u.bytes+m.bytes
			u.oldestStoredAt = min(u.oldestStoredAt, m.oldestStoredAt)
		}
		models[u.model] = &u
	}
	all := slices.SortedFunc(maps.Values(models), func(a, b *cacheUsage) int {
		return cmp.Or(cmp.Compare(b.bytes, a.bytes), cmp.Compare(a.model, b.model))
	})
	return all[:min(len(all), maxCacheModels)], err
}

// usageSum is usage without the models. It is faster.
func (c *responseCache) usageSum(ctx context.Context, project, now int64) (entries, bytes int64, err error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if entries, bytes, err = c.store.cacheSize(ctx, project); err != nil {
		return 0, 0, err
	}
	for _, u := range c.memoryUsage(project, now) {
		entries, bytes = entries+u.entries, bytes+u.bytes
	}
	return entries, bytes, nil
}

// memoryUsage returns what is only in memory of a project, by model.
func (c *responseCache) memoryUsage(project, now int64) map[string]*cacheUsage {
	models := map[string]*cacheUsage{}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.chunks {
		for e := range m.all() {
			_, onDisk := c.onDisk[e.key.id()]
			if e.project != project || now >= e.ExpiresAt || onDisk ||
				e.waits == notToWrite && c.onDisk == nil {
				continue
			}
			u := getOrInsert(models, m.names[e.model])
			if u.model = m.names[e.model]; u.entries == 0 || e.StoredAt < u.oldestStoredAt {
				u.oldestStoredAt = e.StoredAt
			}
			u.entries, u.bytes = u.entries+1, u.bytes+e.size()
		}
	}
	return models
}
