// This room remembers how each provider key fares: whether it may have the next
// call, and if not, why and until when. One key's trouble is never another's.
// Plain code: no network, no store; time comes in as an argument, in unix
// milliseconds.
package main

import (
	"context"
	"log/slog"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	failuresToOpen  = 3       // failures in a row, with no complete answer between them
	breakerMinPause = 1_000   // milliseconds of a breaker's first pause, doubled with each probe that fails
	breakerMaxPause = 30_000  // and its longest
	cooldownMin     = 1_000   // where a 429 does not say how long
	cooldownMax     = 300_000 // whatever it says
	quarantineMin   = 300_000
	quarantineMax   = hourMS
	probeLease      = 60_000 // a probe that has told nothing for so long is forgotten
)

// A keyHealth is what is known of one upstream's key. Of a key that is well,
// asking costs one atomic load.
type keyHealth struct {
	upstream      int64 // the row's seq
	id            string
	tracker       *healthTracker
	running       atomic.Int64 // calls it has now
	until         atomic.Int64 // 0: ready; else it is left out before, and probed by one call after
	hasFailures   atomic.Bool  // faults or strikes are not 0
	reportedState keyState     // as the audit trail has it; of the goroutine that stores changes

	mu         sync.Mutex
	minute     int64 // which the counts below are of
	requests   int64
	tokens     int64
	state      keyState
	failures   int // failures in a row while ready
	strikes    int // times it was left out since its last good answer: the pauses grow with them
	probeUntil int64
	changedAt  int64
	reason     string
}

// ready reports whether the key is well: nothing keeps calls from it.
func (h *keyHealth) ready() bool { return h.until.Load() == 0 }

// available reports whether the key may have a call now. It takes nothing.
func (h *keyHealth) available(now int64) bool {
	until := h.until.Load()
	if until == 0 {
		return true
	}
	if now < until {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state <= keyCooling || now >= h.probeUntil
}

// tryAcquire reports whether a call that chose the key may go there: of several that
// would probe it, one may.
func (h *keyHealth) tryAcquire(now int64) bool {
	until := h.until.Load()
	if until == 0 {
		return true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.state == keyReady:
		return true
	case now < h.until.Load() || h.state != keyCooling && now < h.probeUntil:
		return false
	case h.state == keyCooling: // over; its strikes stay until an answer is good
		h.setState(now, keyReady, 0, "")
		return true
	}
	h.probeUntil = now + probeLease
	return true
}

// admits reports whether the key's own limits a minute (0: none) let one more call
// of so many tokens through; with take it also takes that from them.
func (h *keyHealth) admits(now, tokens int64, limits *upstreamSettings, take bool) bool {
	if limits.RequestsPerMinute == 0 && limits.TokensPerMinute == 0 {
		return true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if m := now / 60_000; m > h.minute {
		h.minute, h.requests, h.tokens = m, 0, 0
	}
	if limits.RequestsPerMinute > 0 && h.requests >= limits.RequestsPerMinute ||
		limits.TokensPerMinute > 0 && h.tokens > 0 && h.tokens+tokens > limits.TokensPerMinute {
		return false
	}
	if take {
		h.requests++
		h.tokens += tokens
	}
	return true
}

// correctUsage corrects what room took for a call that began then, by what it has
// really used, if it is still the same minute.
func (h *keyHealth) correctUsage(began, took, tokens int64, limits *upstreamSettings) {
	if limits.RequestsPerMinute == 0 && limits.TokensPerMinute == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if began/60_000 == h.minute {
		h.tokens = max(0, h.tokens+tokens-took)
	}
}

// setState changes the state; the caller holds the lock.
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

// isStale reports whether an attempt that began then says nothing new: the state
// has changed since. The caller holds the lock.
func (h *keyHealth) isStale(began int64) bool {
	return began < h.changedAt || began == h.changedAt && h.state != keyReady
}

// isRedundant reports whether trouble that would lead to state s is no news: stale, or
// from a key that is left out for as much and was asked because none was well.
func (h *keyHealth) isRedundant(now, began int64, s keyState) bool {
	return h.isStale(began) || s <= h.state && now < h.until.Load()
}

// recordSuccess notes an answer that shows the key to work. done says that the answer
// was complete: only then are the failures before it forgotten, or a provider
// that cuts each of its answers would never be left out.
func (h *keyHealth) recordSuccess(now, began int64, done bool) {
	if h.until.Load() == 0 && !(done && h.hasFailures.Load()) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.isStale(began) {
		return
	}
	if h.state != keyReady {
		h.strikes = 0
		h.setState(now, keyReady, 0, "")
	}
	if done {
		h.failures, h.strikes = 0, 0
		h.hasFailures.Store(false)
	}
}

// recordFailure notes that the provider failed: some make a breaker open. sure is for
// failures that leave no doubt, as of a connection that could not be made.
func (h *keyHealth) recordFailure(now, began int64, sure bool, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.isRedundant(now, began, keyBreakerOpen) {
		return
	}
	if h.state == keyReady {
		h.hasFailures.Store(true)
		if h.failures++; h.failures < failuresToOpen && !sure {
			return
		}
	}
	pause := int64(breakerMinPause) << min(h.strikes, 10)
	h.strikes++
	h.setState(now, keyBreakerOpen, min(pause, breakerMaxPause), reason)
}

// recordRateLimit notes that the key gets too many calls. wait is what the provider
// asked for, 0 if it did not say.
func (h *keyHealth) recordRateLimit(now, began, wait int64, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	pause := wait
	if pause <= 0 {
		pause = int64(cooldownMin) << min(h.strikes, 10)
	}
	pause = min(max(pause, cooldownMin), cooldownMax)
	if h.isRedundant(now, began, keyCooling) {
		if h.state == keyCooling && wait > 0 && now+pause > h.until.Load()+1000 {
			h.until.Store(now + pause)
			h.tracker.markChanged(h)
		}
		return
	}
	h.strikes++
	h.setState(now, keyCooling, pause, reason)
}

// recordExhausted notes that the key's account has nothing left. Nobody says until
// when, so it is tried again each hour, and when a day begins.
func (h *keyHealth) recordExhausted(now, began int64, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.isRedundant(now, began, keyExhausted) {
		return
	}
	h.strikes++
	h.setState(now, keyExhausted, min(hourMS, dayMS-now%dayMS), reason)
}

// recordRejected notes that the provider refuses the key.
func (h *keyHealth) recordRejected(now, began int64, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.isRedundant(now, began, keyQuarantined) {
		return
	}
	pause := int64(quarantineMin) << min(h.strikes, 10)
	h.strikes++
	h.setState(now, keyQuarantined, min(pause, quarantineMax), reason)
}

const unusableReason = "its key does not open, or its URL is not allowed any more"

// setUsable says whether the upstream can be used at all as it is stored. One that
// cannot is out until it can.
func (h *keyHealth) setUsable(now int64, yes bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch out := h.state == keyQuarantined && h.reason == unusableReason; {
	case yes && out:
		h.setState(now, keyReady, 0, "")
	case !yes && !out:
		h.setState(now, keyQuarantined, 100*365*dayMS, unusableReason)
	}
}

// endProbe ends a probe that told nothing, as when its client left.
func (h *keyHealth) endProbe() {
	if h.until.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.probeUntil = 0
}

// snapshot returns what is known now; a pause that is over is over.
func (h *keyHealth) snapshot(now int64) healthRow {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := healthRow{h.upstream, h.id, h.state, h.until.Load(), h.strikes, h.reason, h.changedAt, h.running.Load()}
	if r.state == keyCooling && now >= r.until {
		r.state, r.until, r.reason = keyReady, 0, ""
	}
	return r
}

// A healthTracker has the health of every upstream that has been used since the
// start, or was not well then. Admins make upstreams, so it does not grow
// without end.
type healthTracker struct {
	mu      sync.Mutex
	keys    map[int64]*keyHealth
	budgets map[string]*retryBudget
	dirty   map[*keyHealth]struct{}
	wake    chan struct{} // gets a value when dirty has one
}

func newHealthTracker() *healthTracker {
	return &healthTracker{keys: map[int64]*keyHealth{}, budgets: map[string]*retryBudget{}, dirty: map[*keyHealth]struct{}{}, wake: make(chan struct{}, 1)}
}

// forUpstream returns the health of an upstream.
func (b *healthTracker) forUpstream(upstream int64, id string) *keyHealth {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.keys[upstream]
	if h == nil {
		h = &keyHealth{upstream: upstream, id: id, tracker: b}
		b.keys[upstream] = h
	}
	return h
}

// restore puts in what was stored by a process before.
func (b *healthTracker) restore(r healthRow) {
	h := b.forUpstream(r.upstream, r.id)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state, h.reason, h.changedAt, h.strikes = r.state, r.reason, r.changedAt, r.strikes
	h.until.Store(r.until)
	h.hasFailures.Store(r.strikes > 0)
	if r.state.needsAttention() {
		h.reportedState = r.state
	}
}

// reset makes an upstream ready again: an admin has changed it.
func (b *healthTracker) reset(upstream, now int64) {
	b.mu.Lock()
	h := b.keys[upstream]
	b.mu.Unlock()
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.strikes = 0; h.state != keyReady {
		h.setState(now, keyReady, 0, "")
		return
	}
	h.failures, h.changedAt = 0, now // what attempts with the key before still bring says nothing of this one
	h.hasFailures.Store(false)
}

// countByState returns how many upstreams are in each state.
func (b *healthTracker) countByState(now int64) (n [keyQuarantined + 1]int64) {
	b.mu.Lock()
	keys := slices.Collect(maps.Values(b.keys))
	b.mu.Unlock()
	for _, h := range keys {
		n[h.snapshot(now).state]++
	}
	return n
}

// markChanged queues a changed key for changes.
func (b *healthTracker) markChanged(h *keyHealth) {
	b.mu.Lock()
	b.dirty[h] = struct{}{}
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// takeChanges returns the keys whose state has changed since it was last called.
func (b *healthTracker) takeChanges() (keys []*keyHealth) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for h := range b.dirty {
		keys = append(keys, h)
	}
	clear(b.dirty)
	return keys
}

// budgetFor returns what may be sent again to a host.
func (b *healthTracker) budgetFor(host string) *retryBudget {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := b.budgets[host]
	if r == nil {
		r = &retryBudget{}
		r.credit.Store(retryCreditMax)
		b.budgets[host] = r
	}
	return r
}

// A retryBudget bounds the calls that are sent again to a host in trouble: a
// fifth of its calls, and one a second. Without it, an outage would be met with
// twice the load. Credit is in thousandths of a call.
type retryBudget struct {
	credit     atomic.Int64
	refilledAt atomic.Int64 // when the second's share was last added
}

const (
	retryCreditPerCall = 200 // for each call
	retryCreditMax     = 50_000
)

// earn notes a call to the host.
func (r *retryBudget) earn() {
	if r.credit.Load() < retryCreditMax {
		r.credit.Add(retryCreditPerCall)
	}
}

// spend takes one call from the budget, if it has one.
func (r *retryBudget) spend(now int64) bool {
	if at := r.refilledAt.Load(); now > at && r.refilledAt.CompareAndSwap(at, now) && at != 0 {
		r.credit.Add(min(now-at, retryCreditMax))
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

// retryHint returns how many milliseconds a 429 asks to wait, at most cooldownMax,
// and 0 if it does not say or cannot be understood. get returns a header's value.
func retryHint(get func(string) string, now time.Time) int64 {
	if ms, err := strconv.ParseFloat(get("Retry-After-Ms"), 64); err == nil && ms > 0 {
		return boundedMS(ms)
	}
	if v := get("Retry-After"); v != "" {
		if ms := parseWait(v, now, false); ms > 0 {
			return ms
		}
	}
	var most int64
	for _, kind := range [...]string{"Requests", "Tokens"} {
		if get("X-Ratelimit-Remaining-"+kind) == "0" {
			most = max(most, parseWait(get("X-Ratelimit-Reset-"+kind), now, true))
		}
		if get("Anthropic-Ratelimit-"+kind+"-Remaining") == "0" {
			most = max(most, parseWait(get("Anthropic-Ratelimit-"+kind+"-Reset"), now, true))
		}
	}
	if most == 0 {
		most = parseWait(get("X-Ratelimit-Reset"), now, true)
	}
	return most
}

// parseWait reads one value: seconds, a duration such as 6m0s or 12ms, a date, or
// where epoch says so a large number that is a time of its own.
func parseWait(v string, now time.Time, epoch bool) int64 {
	v = strings.TrimSpace(v)
	if n, err := strconv.ParseFloat(v, 64); err == nil {
		switch ms := float64(now.UnixMilli()); {
		case epoch && n > 1e11:
			return boundedMS(n - ms)
		case epoch && n > 1e9:
			return boundedMS(n*1000 - ms)
		}
		return boundedMS(n * 1000)
	}
	if d, err := time.ParseDuration(v); err == nil {
		return boundedMS(float64(d.Milliseconds()))
	}
	for _, layout := range [...]string{time.RFC1123, time.RFC3339Nano} {
		if t, err := time.Parse(layout, v); err == nil {
			return boundedMS(float64(t.Sub(now).Milliseconds()))
		}
	}
	return 0
}

func boundedMS(ms float64) int64 {
	if math.IsNaN(ms) || ms <= 0 {
		return 0
	}
	return int64(math.Ceil(min(ms, cooldownMax)))
}

// loadHealth returns what is known of the keys that were not well when the last
// process ended.
func loadHealth(ctx context.Context, st *store) (*healthTracker, error) {
	rows, err := st.listUnhealthy(ctx)
	if err != nil {
		return nil, err
	}
	book := newHealthTracker()
	for _, r := range rows {
		if now := time.Now().UnixMilli(); r.changedAt > now { // the clock was set back
			r.changedAt, r.until = now, now
		}
		if r.state != keyReady { // a name that this version does not know
			book.restore(r)
		}
	}
	return book, nil
}

// A healthKeeper stores what changes in a healthTracker.
type healthKeeper struct {
	health *healthTracker
	store  *store
	log    *logger
}

// persistHealth stores changes as they come, until ctx is over. What cannot be
// stored holds in memory all the same, and is tried again.
func (k *healthKeeper) persistHealth(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			k.saveHealthChanges(context.WithoutCancel(ctx))
			return
		case <-k.health.wake:
		}
		if !k.saveHealthChanges(context.WithoutCancel(ctx)) { // a statement that is cut short costs the connection
			select {
			case <-ctx.Done():
			case <-time.After(ledgerRetryDelay):
			}
		}
	}
}

// saveHealthChanges stores the changes there are, and reports whether all were.
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
			k.log.Warn("the health of an upstream cannot be stored", "upstream", row.id, "error", err)
			continue
		}
		h.reportedState = keyReady // or in a pause that ends by itself, which the trail has not
		if row.state.needsAttention() {
			h.reportedState = row.state
		}
		level := slog.LevelWarn // the provider's trouble, or the key's
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
