// This file tracks the health of each provider key: whether it may have the next call and, if not, why and until
// when. One key's failures never affect another. A keyHealth does no I/O and takes the time as an argument, in
// unix milliseconds; healthKeeper stores the changes.
package main

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	failuresToOpen  = 3       // failures in a row, without a complete answer between them
	breakerMinPause = 1_000   // ms; a breaker's first pause, doubled with each failed probe
	breakerMaxPause = 15_000  // ms; calls that would fail otherwise probe sooner
	cooldownMin     = 1_000   // ms; after a 429 that does not say how long
	cooldownMax     = 300_000 // ms; whatever the 429 says
	quarantineMin   = 300_000 // ms
	quarantineMax   = hourMS
	probeLease      = 60_000 // ms; after this long without a result, a probe is given up
	usageRefusedMS  = hourMS // after this long, a provider that refused stream_options is asked for usage again
	clockSlack      = 30_000 // ms; a time that is earlier than the last by more means that the clock was set back
	modelPauseMS    = 300_000
	maxModelPauses  = 32 // for each key; clients choose the names
)

// A keyHealth is the health of one upstream's key. For a healthy key, a check costs one atomic load.
type keyHealth struct {
	upstream      int64 // the row's seq
	id            string
	tracker       *healthTracker
	running       atomic.Int64 // attempts under way
	until         atomic.Int64 // 0: ready; otherwise the key gets no call before, and one probe after
	hasFailures   atomic.Bool  // failures or strikes are not 0
	hasPauses     atomic.Bool  // pauses is not empty
	usageRefused  atomic.Int64 // until then, streams are sent there without stream_options
	reportedState keyState     // as in the audit trail; only the goroutine that stores changes uses it

	mu         sync.Mutex
	latest     int64 // the latest time that was seen
	minute     int64 // the minute that requests and tokens count
	requests   int64
	tokens     int64
	state      keyState
	failures   int   // failures in a row while ready
	strikes    int   // pauses since the last good answer; each makes the next one longer
	probeUntil int64 // a probe is under way, and given up then
	changedAt  int64
	reason     string
	pauses     []modelPause // at most maxModelPauses
}

// A modelPause keeps the calls for one model from a key to which the provider does not give it. Other calls go to
// the key as before: what a client asks for must not take the key from others.
type modelPause struct {
	endpoint string // a pattern: a model may serve one endpoint and not another
	model    string // as clients name it
	reason   string
	until    int64
}

// ready reports whether the key is healthy.
func (h *keyHealth) ready() bool { return h.until.Load() == 0 }

// available reports whether the key may have a call now. It reserves nothing.
func (h *keyHealth) available(now int64) bool {
	until := h.until.Load()
	if until == 0 {
		return true
	}
	if now < until && until-now <= breakerMaxPause {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	return now >= h.until.Load() && (h.state <= keyCooling || now >= h.probeUntil)
}

// observe notes the time. If the clock was set back, it moves all times of the key back as well: they lie as far
// ahead or behind as before. Otherwise a pause would last until the clock has caught up. The caller holds the lock.
func (h *keyHealth) observe(now int64) {
	back := h.latest - now
	if back <= clockSlack {
		h.latest = max(h.latest, now)
		return
	}
	h.latest, h.minute = now, 0
	h.changedAt -= back
	h.probeUntil -= back
	for i := range h.pauses {
		h.pauses[i].until -= back
	}
	if until := h.until.Load(); until != 0 {
		h.until.Store(until - back)
		h.tracker.markChanged(h)
	}
}

// tryAcquire reports whether a call that has chosen the key may use it. Of several calls that would probe the
// key, only one may.
func (h *keyHealth) tryAcquire(now int64) bool {
	until := h.until.Load()
	if until == 0 {
		return true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	switch {
	case h.state == keyReady:
		return true
	case now < h.until.Load() || h.state != keyCooling && now < h.probeUntil:
		return false
	case h.state == keyCooling: // the pause is over; strikes stay until a good answer
		h.setState(now, keyReady, 0, "")
		return true
	}
	h.probeUntil = now + probeLease
	return true
}

// probeEarly reserves a probe of a key whose breaker is open, before its pause is over, for a call that would fail
// otherwise. It reports false if the key was tried in the last breakerMinPause.
func (h *keyHealth) probeEarly(now int64) bool {
	if h.until.Load() == 0 {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	if h.state != keyBreakerOpen || now < h.changedAt+breakerMinPause || now < h.probeUntil {
		return false
	}
	h.until.Store(min(h.until.Load(), now))
	h.probeUntil = now + probeLease
	return true
}

// admits reports whether the key's own limits per minute (0: none) admit one more call of this many tokens. With
// reserve, it also counts the call.
func (h *keyHealth) admits(now, tokens int64, limits *upstreamSettings, reserve bool) bool {
	if limits.RequestsPerMinute == 0 && limits.TokensPerMinute == 0 {
		return true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	if m := now / 60_000; m > h.minute {
		h.minute, h.requests, h.tokens = m, 0, 0
	}
	if limits.RequestsPerMinute > 0 && h.requests >= h.tracker.share(limits.RequestsPerMinute) ||
		limits.TokensPerMinute > 0 && h.tokens > 0 && h.tokens+tokens > h.tracker.share(limits.TokensPerMinute) {
		return false
	}
	if reserve {
		h.requests++
		h.tokens += tokens
	}
	return true
}

// unreserve takes back what was reserved at a time for a call that is not sent after all: the probe of the key, and
// its part of the key's own limits.
func (h *keyHealth) unreserve(reservedAt, tokens int64, limits *upstreamSettings) {
	h.endProbe()
	h.addToMinute(reservedAt, -1, -tokens, limits)
}

// correctUsage replaces the tokens reserved for a call by those that it used.
func (h *keyHealth) correctUsage(began, reserved, used int64, limits *upstreamSettings) {
	h.addToMinute(began, 0, used-reserved, limits)
}

// addToMinute adds to what counts in the key's own limits, if the minute in which the call began is not over.
func (h *keyHealth) addToMinute(began, requests, tokens int64, limits *upstreamSettings) {
	if limits.RequestsPerMinute == 0 && limits.TokensPerMinute == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if began/60_000 == h.minute {
		h.requests, h.tokens = max(0, h.requests+requests), max(0, h.tokens+tokens)
	}
}

// setState changes the state. The caller holds the lock.
func (h *keyHealth) setState(now int64, s keyState, pause int64, reason string) {
	h.state, h.reason, h.changedAt, h.probeUntil, h.failures = s, reason, now, 0, 0
	if s == keyReady {
		h.until.Store(0)
	} else {
		h.until.Store(now + pause)
	}
	h.hasFailures.Store(h.strikes > 0)
	h.tracker.markChanged(h)
}

// pause takes the key out of use for a time. The caller holds the lock.
func (h *keyHealth) pause(now int64, s keyState, ms int64, reason string) {
	h.strikes++
	h.setState(now, s, ms, reason)
}

// backoff doubles a pause for each strike so far. The caller holds the lock.
func (h *keyHealth) backoff(ms int64) int64 { return ms << min(h.strikes, 10) }

// isStale reports whether the state has changed since an attempt began: its result then says nothing about the
// current state. The caller holds the lock.
func (h *keyHealth) isStale(began int64) bool {
	return began < h.changedAt || began == h.changedAt && h.state != keyReady
}

// isRedundant reports whether a result that would lead to state s changes nothing: it is stale, or the key is
// already paused, with s or worse, and was only tried because no key was healthy. The caller holds the lock.
func (h *keyHealth) isRedundant(now, began int64, s keyState) bool {
	return h.isStale(began) || s <= h.state && now < h.until.Load()
}

// recordSuccess records an answer that shows that the key works. Only a complete answer clears the failures
// before it: otherwise a provider that breaks off every answer would never be paused.
func (h *keyHealth) recordSuccess(now, began int64, complete bool) {
	if h.until.Load() == 0 && !(complete && h.hasFailures.Load()) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	if h.isStale(began) {
		return
	}
	if h.state != keyReady {
		h.strikes = 0
		h.setState(now, keyReady, 0, "")
	}
	if complete {
		h.failures, h.strikes = 0, 0
		h.hasFailures.Store(false)
	}
}

// recordFailure records a failure of the provider. failuresToOpen in a row open the breaker. One is enough if it
// is certain, as when there is no connection.
func (h *keyHealth) recordFailure(now, began int64, certain bool, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	if h.isRedundant(now, began, keyBreakerOpen) {
		return
	}
	if h.state == keyReady {
		h.hasFailures.Store(true)
		if h.failures++; h.failures < failuresToOpen && !certain {
			return
		}
	}
	h.pause(now, keyBreakerOpen, min(h.backoff(breakerMinPause), breakerMaxPause), reason)
}

// recordRateLimit records that the provider limits the key's rate. wait is the pause that the provider asks for,
// 0 if it does not say.
func (h *keyHealth) recordRateLimit(now, began, wait int64, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	pause := wait
	if pause <= 0 {
		pause = h.backoff(cooldownMin)
	}
	pause = min(max(pause, cooldownMin), cooldownMax)
	if h.isRedundant(now, began, keyCooling) {
		if h.state == keyCooling && wait > 0 && now+pause > h.until.Load()+1000 {
			h.until.Store(now + pause)
			h.tracker.markChanged(h)
		}
		return
	}
	h.pause(now, keyCooling, pause, reason)
}

// recordExhausted records that the key's account has no credit left. Providers do not say until when, so the key
// is tried again every hour and at the start of each day.
func (h *keyHealth) recordExhausted(now, began int64, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	if h.isRedundant(now, began, keyExhausted) {
		return
	}
	h.pause(now, keyExhausted, min(hourMS, dayMS-now%dayMS), reason)
}

// recordRejected records that the provider refuses the key.
func (h *keyHealth) recordRejected(now, began int64, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	if h.isRedundant(now, began, keyQuarantined) {
		return
	}
	h.pause(now, keyQuarantined, min(h.backoff(quarantineMin), quarantineMax), reason)
}

// pauseModel records that the provider does not give a model to the key. The oldest of too many pauses ends.
func (h *keyHealth) pauseModel(now int64, endpoint, model, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	h.pauses = slices.DeleteFunc(h.pauses, func(p modelPause) bool {
		return p.until <= now || p.endpoint == endpoint && p.model == model
	})
	if len(h.pauses) == maxModelPauses {
		h.pauses = slices.Delete(h.pauses, 0, 1)
	}
	h.pauses = append(h.pauses, modelPause{
		endpoint: endpoint, model: strings.Clone(model), reason: reason, until: now + modelPauseMS})
	h.hasPauses.Store(true)
}

// resumeModel ends the pause of a model, because the key has just served it.
func (h *keyHealth) resumeModel(endpoint, model string) {
	if !h.hasPauses.Load() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pauses = slices.DeleteFunc(h.pauses, func(p modelPause) bool {
		return p.endpoint == endpoint && p.model == model
	})
	h.hasPauses.Store(len(h.pauses) > 0)
}

// modelPause returns the pause of a model, nil if there is none. An empty endpoint means any.
func (h *keyHealth) modelPause(now int64, endpoint, model string) *modelPause {
	if !h.hasPauses.Load() {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	for _, p := range h.pauses {
		if p.until > now && p.model == model && (p.endpoint == endpoint || endpoint == "") {
			return &p
		}
	}
	return nil
}

// modelPauses returns the pauses of models that are not over.
func (h *keyHealth) modelPauses(now int64) []modelPause {
	if !h.hasPauses.Load() {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	h.pauses = slices.DeleteFunc(h.pauses, func(p modelPause) bool { return p.until <= now })
	h.hasPauses.Store(len(h.pauses) > 0)
	return slices.Clone(h.pauses)
}

// takesUsage reports whether streams may ask the provider for their usage.
func (h *keyHealth) takesUsage(now int64) bool {
	until := h.usageRefused.Load()
	return now >= until || until-now > usageRefusedMS // the clock was set back
}

// unusableReason is stored, and setUsable compares it: another text would leave upstreams quarantined for ever.
const unusableReason = "its key does not open, or its URL is not allowed any more"

// setUsable records whether the upstream can be used at all as it is stored. If not, it is quarantined until it
// can.
func (h *keyHealth) setUsable(now int64, usable bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch unusable := h.state == keyQuarantined && h.reason == unusableReason; {
	case usable && unusable:
		h.setState(now, keyReady, 0, "")
	case !usable && !unusable:
		h.setState(now, keyQuarantined, 100*365*dayMS, unusableReason)
	}
}

// endProbe ends a probe without a result, as when the client has left.
func (h *keyHealth) endProbe() {
	if h.until.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.probeUntil = 0
}

// snapshot returns the health as of now: a key whose cooldown is over is ready.
func (h *keyHealth) snapshot(now int64) healthRow {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.observe(now)
	r := healthRow{h.upstream, h.id, h.state, h.until.Load(), h.strikes, h.reason, h.changedAt, h.running.Load()}
	if r.state == keyCooling && now >= r.until {
		r.state, r.until, r.reason = keyReady, 0, ""
	}
	return r
}

// A healthTracker has the health of every upstream that has been loaded since the start or was unhealthy then.
// Only administrators create upstreams and name hosts, so its size is bounded.
type healthTracker struct {
	mu      sync.Mutex
	keys    map[int64]*keyHealth
	budgets map[string]*retryBudget
	changed map[*keyHealth]struct{} // to be stored
	stored  map[int64]healthRow     // as merge saw it the last time
	wake    chan struct{}           // gets a value after each change
	share   func(int64) int64       // of a key's own limit, for this replica
}

func newHealthTracker() *healthTracker {
	return &healthTracker{keys: map[int64]*keyHealth{}, budgets: map[string]*retryBudget{},
		changed: map[*keyHealth]struct{}{}, wake: make(chan struct{}, 1), share: func(n int64) int64 { return n }}
}

// forUpstream returns the health of an upstream; a new one is ready.
func (t *healthTracker) forUpstream(upstream int64, id string) *keyHealth {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.keys[upstream]
	if h == nil {
		h = &keyHealth{upstream: upstream, id: id, tracker: t}
		t.keys[upstream] = h
	}
	return h
}

// restore sets the health that an earlier process has stored.
func (t *healthTracker) restore(r healthRow) {
	h := t.forUpstream(r.upstream, r.id)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state, h.reason, h.changedAt, h.strikes = r.state, r.reason, r.changedAt, r.strikes
	h.until.Store(r.until)
	h.hasFailures.Store(r.strikes > 0)
	if r.state.needsAttention() {
		h.reportedState = r.state
	}
}

// reset makes an upstream ready again, after an administrator has changed it.
func (t *healthTracker) reset(upstream, now int64) {
	t.mu.Lock()
	h := t.keys[upstream]
	t.mu.Unlock()
	if h == nil {
		return
	}
	h.usageRefused.Store(0)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pauses = nil
	h.hasPauses.Store(false)
	if h.strikes = 0; h.state != keyReady {
		h.setState(now, keyReady, 0, "")
		return
	}
	h.failures, h.changedAt = 0, now // the results of running attempts say nothing about the new key
	h.hasFailures.Store(false)
}

// adopt takes over a state that another replica has stored, without storing it again.
func (h *keyHealth) adopt(r *healthRow, now int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.reportedState = keyReady; r.state.needsAttention() {
		h.reportedState = r.state
	}
	if until := h.until.Load(); h.state == r.state && h.reason == r.reason && until == r.until {
		return
	}
	h.state, h.reason, h.changedAt, h.strikes, h.probeUntil, h.failures = r.state, r.reason, now, r.strikes, 0, 0
	h.until.Store(r.until)
	h.hasFailures.Store(r.strikes > 0)
}

// merge takes over what other replicas have stored since the last call. rows are all that are stored: an upstream
// without one is ready. A change that this process has not stored yet is not overwritten.
func (t *healthTracker) merge(rows []healthRow, now int64) {
	stored := map[int64]healthRow{}
	for _, r := range rows {
		stored[r.upstream] = r
	}
	changed := map[*keyHealth]healthRow{}
	t.mu.Lock()
	for seq, old := range t.stored {
		if _, ok := stored[seq]; !ok && t.keys[seq] != nil {
			changed[t.keys[seq]] = healthRow{upstream: seq, id: old.id, state: keyReady}
		}
	}
	t.mu.Unlock()
	for seq, r := range stored {
		if t.stored[seq] != r {
			changed[t.forUpstream(seq, r.id)] = r
		}
	}
	for h, r := range changed {
		t.mu.Lock()
		_, pending := t.changed[h]
		t.mu.Unlock()
		if !pending {
			h.adopt(&r, now)
		}
	}
	t.stored = stored
}

// adoptReset makes an upstream ready again that an administrator has changed at another replica.
func (t *healthTracker) adoptReset(id string, now int64) {
	t.mu.Lock()
	var changed *keyHealth
	for _, h := range t.keys {
		if h.id == id {
			changed = h
		}
	}
	t.mu.Unlock()
	if changed == nil {
		return
	}
	changed.usageRefused.Store(0)
	changed.mu.Lock()
	defer changed.mu.Unlock()
	changed.pauses = nil
	changed.hasPauses.Store(false)
	changed.state, changed.reason, changed.changedAt, changed.strikes, changed.failures = keyReady, "", now, 0, 0
	changed.until.Store(0)
	changed.hasFailures.Store(false)
}

// countByState returns how many upstreams are in each state.
func (t *healthTracker) countByState(now int64) (n [keyQuarantined + 1]int64) {
	t.mu.Lock()
	keys := slices.Collect(maps.Values(t.keys))
	t.mu.Unlock()
	for _, h := range keys {
		n[h.snapshot(now).state]++
	}
	return n
}

// markChanged queues a key for takeChanges.
func (t *healthTracker) markChanged(h *keyHealth) {
	t.mu.Lock()
	t.changed[h] = struct{}{}
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// takeChanges returns the keys whose state has changed since the last call.
func (t *healthTracker) takeChanges() (keys []*keyHealth) {
	t.mu.Lock()
	defer t.mu.Unlock()
	keys = slices.Collect(maps.Keys(t.changed))
	clear(t.changed)
	return keys
}

// budgetFor returns the retry budget of a host; a new one is full.
func (t *healthTracker) budgetFor(host string) *retryBudget {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.budgets[host]
	if r == nil {
		r = &retryBudget{}
		r.credit.Store(retryCreditMax)
		t.budgets[host] = r
	}
	return r
}

// A retryBudget limits how many calls are sent again to a failing host: a fifth of its calls, plus one a second.
// Without it, an outage would double the load. Credit is in thousandths of a call.
type retryBudget struct {
	credit     atomic.Int64
	refilledAt atomic.Int64 // when the credit for the time passed was last added
}

const (
	retryCreditPerCall = 200 // for each call
	retryCreditMax     = 50_000
)

// earn adds the credit for one call.
func (r *retryBudget) earn() {
	if r.credit.Load() < retryCreditMax {
		r.credit.Add(retryCreditPerCall)
	}
}

// spend takes the credit for one retry and reports whether there was enough.
func (r *retryBudget) spend(now int64) bool {
	if at := r.refilledAt.Load(); (now > at || at-now > clockSlack) && r.refilledAt.CompareAndSwap(at, now) && at != 0 {
		r.credit.Add(min(max(0, now-at), retryCreditMax)) // one thousandth for each millisecond
	}
	if r.credit.Load() > retryCreditMax {
		r.credit.Store(retryCreditMax)
	}
	if r.credit.Add(-1000) < 0 {
		r.credit.Add(1000)
		return false
	}
	return true
}

// loadHealth returns a tracker with the keys that were unhealthy when the last process ended.
func loadHealth(ctx context.Context, st *store) (*healthTracker, error) {
	rows, err := st.listUnhealthy(ctx)
	if err != nil {
		return nil, err
	}
	tracker := newHealthTracker()
	tracker.share = st.shareOf
	for _, r := range rows {
		if now := time.Now().UnixMilli(); r.changedAt > now { // the clock has been set back
			r.changedAt, r.until = now, now
		}
		if r.state != keyReady { // listUnhealthy reads a state that this version does not have as ready
			tracker.restore(r)
		}
	}
	return tracker, nil
}

// A healthKeeper stores the changes in a healthTracker.
type healthKeeper struct {
	health *healthTracker
	store  *store
	log    *logger
	stored chan []healthRow // all that is stored, from time to time; only with several replicas
}

// persistHealth stores changes as they come, until ctx ends. A change that cannot be stored still applies in
// memory; storing it is tried again.
func (k *healthKeeper) persistHealth(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			k.saveHealthChanges(context.WithoutCancel(ctx))
			return
		case rows := <-k.stored:
			k.health.merge(rows, time.Now().UnixMilli())
		case <-k.health.wake:
		}
		if !k.saveHealthChanges(context.WithoutCancel(ctx)) { // to cancel a statement would cost the connection
			select {
			case <-ctx.Done():
			case <-time.After(ledgerRetryDelay):
			}
		}
	}
}

// saveHealthChanges stores the current changes and reports whether all were stored.
func (k *healthKeeper) saveHealthChanges(ctx context.Context) bool {
	all := true
	for _, h := range k.health.takeChanges() {
		now := time.Now().UnixMilli()
		row := h.snapshot(now)
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := k.store.setHealth(ctx, now, &row, h.reportedState)
		cancel()
		if err != nil {
			all = false
			k.health.markChanged(h)
			k.log.Warn("the health of an upstream could not be stored", "upstream", row.id, "error", err)
			continue
		}
		h.reportedState = keyReady // or in a pause that ends by itself, which is not in the audit trail
		if row.state.needsAttention() {
			h.reportedState = row.state
		}
		level := slog.LevelWarn // a fault of the provider or the key
		if row.state == keyReady {
			level = slog.LevelInfo
		}
		line := []any{"upstream", row.id, "state", row.state.String()}
		if row.state != keyReady {
			line = append(line, "reason", row.reason, "until", time.UnixMilli(row.until).UTC().Format(time.RFC3339))
		}
		k.log.Log(ctx, level, "the health of an upstream has changed", line...)
	}
	return all
}
