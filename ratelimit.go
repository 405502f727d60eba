// This file counts what calls use of the limits of their project and token. Plain code: the time is an
// argument (unix milliseconds), and nothing here does I/O.
//
// A call goes through three steps:
//
//	reserve      checks every limit that applies and reserves in all of them, or in none. Requests and running
//	             calls are exact; tokens and dollars are an estimate.
//	updateUsage  moves a running call's tokens and dollars from reserved to used as the answer comes.
//	settle       returns what was reserved and counts what the call used.
//
// A window (an hour or longer) counts used and reserved. Both restart at 0 in the next window, where reservations
// of earlier windows no longer count. A bucket (a second or a minute) counts only used: what a call reserves is
// used at once and refills from then on, and settling returns only what has not refilled yet.
//
// Below that are the bounds of what clients can cause otherwise: lines in the log, entries in the audit trail,
// attempts to guess a key, and the memory of request bodies and calls. Nothing there grows with the number of clients.
package main

import (
	"math"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// A limitCounter is the current state of one limit.
type limitCounter struct {
	limit                  *limit // of the current policy
	windowStart, windowEnd int64  // in a bucket, windowStart is the time of the last refill
	// In a bucket, used is multiplied by the bucket's milliseconds (see scale), so that each millisecond refills
	// a whole number.
	used        int64
	reserved    int64 // reserved and not used yet; for metricConcurrent, the running calls
	refilled    int64 // in a bucket, the sum of all refills; it may wrap around
	generation  int32 // the number of the window: reservations of earlier generations are void
	wouldRefuse int64 // calls that a shadow limit would have refused
}

// newLimitCounter returns the counter of a limit. used is what was used in the window around now.
func newLimitCounter(l *limit, now, used int64) *limitCounter {
	c := &limitCounter{limit: l}
	if c.windowStart, c.windowEnd = l.period.window(now); l.period.bucketMS() > 0 {
		c.windowStart = now
	}
	c.used = used * c.scale()
	return c
}

// scale is the value of one request or token in used.
func (c *limitCounter) scale() int64 { return max(1, c.limit.period.bucketMS()) }

// advance brings the counter to now. Setting the clock back never frees anything: if it is at most one period, the
// counter waits until the clock catches up; if it is more, the counter continues from the new time with its use.
func (c *limitCounter) advance(now int64) {
	if b := c.limit.period.bucketMS(); b > 0 {
		switch passed := now - c.windowStart; {
		case passed < 0 && passed >= -b:
			return
		case passed > 0 && (c.limit.max == 0 || passed > c.used/c.limit.max):
			c.refill(c.used)
		case passed > 0:
			c.refill(passed * c.limit.max)
		}
		c.windowStart = now
		return
	}
	if c.windowEnd == 0 || now >= c.windowStart && now < c.windowEnd { // never ends, or has not ended
		return
	}
	if now < c.windowStart && c.windowStart-now <= c.windowEnd-c.windowStart {
		return
	}
	if now >= c.windowEnd {
		c.used, c.reserved = 0, 0
		c.generation++
	}
	c.windowStart, c.windowEnd = c.limit.period.window(now)
}

func (c *limitCounter) refill(n int64) {
	c.used -= n
	c.refilled += n
}

// shortfall returns how much of need, scaled, exceeds the limit now; 0 if it fits.
func (c *limitCounter) shortfall(need int64) int64 {
	return max(0, addSat(c.used, (addSat(c.reserved, need)-c.limit.max)*c.scale()))
}

// retryAfter returns the milliseconds until need fits, if nothing else is used until then. It returns never if
// need will not fit by waiting.
func (c *limitCounter) retryAfter(now, need int64) (ms int64, never bool) {
	switch l := c.limit; {
	case l.max == 0 || l.period == perLifetime:
		return 0, true
	case l.metric == metricConcurrent:
		return 1000, false // when a running call ends is unknown
	case l.period.bucketMS() > 0:
		return max(1, (c.shortfall(need)+l.max-1)/l.max+max(0, c.windowStart-now)), false
	}
	return max(1, c.windowEnd-now), false
}

// An estimate is the most that a call may use, as far as this is known before the call is forwarded.
type estimate struct {
	endpoint, pattern, model string // the endpoint's name and pattern, the requested model
	input, output            int64  // tokens
	inputCost, outputCost    int64  // nano-dollars
	outputAssumed            bool   // the request does not limit its output: output is a guess
}

// quantityFor returns the amount that the call reserves in a limit, or 0 if it uses nothing that l counts. A
// guessed output reserves at most a quarter of the limit, and the whole call at most all of it, so that a rough
// estimate never makes a call impossible.
func (e *estimate) quantityFor(l *limit) int64 {
	in, out := e.input, e.output
	switch l.metric {
	case metricRequests, metricConcurrent:
		return 1
	case metricDollars:
		in, out = e.inputCost, e.outputCost
	}
	if in == 0 && out == 0 {
		return 0
	}
	if e.outputAssumed {
		out = min(out, l.max/4)
	}
	return max(1, min(addSat(in, out), l.max))
}

// exceedsMax reports whether the call asks for more output than l ever allows.
func (e *estimate) exceedsMax(l *limit) bool {
	switch l.metric {
	case metricTokens:
		return !e.outputAssumed && e.output > l.max
	case metricDollars:
		return !e.outputAssumed && e.outputCost > l.max
	}
	return false
}

// A reservationEntry is what a call has reserved in one counter.
type reservationEntry struct {
	counter    *limitCounter
	generation int32
	quantity   int64 // reserved
	refillMark int64 // of a bucket: when refilled reaches it, all of quantity has refilled
	spent      int64 // what updateUsage has counted as used so far; it may exceed quantity
}

// A reservation is everything that one running call has reserved. Its limiter owns it between reserve and
// settle.
type reservation struct {
	limiter          *limiter
	token            *limitScope
	estimate         estimate
	start            int64
	entries          []reservationEntry
	outputIfLost     int64  // tokens, see lostOutput
	monitorOnlyLimit string // the shadow limit that would have refused the call, "" if none
	prev, next       *reservation
}

// A limitScope is a project or a token with its own limits.
type limitScope struct {
	policy   *policy // has the limits of the counters; nil before the first call
	counters []*limitCounter
	admitted bool // a call was admitted, whose use the stored sums may not include yet
}

// A limiter counts for one project and all its tokens.
type limiter struct {
	mu      sync.Mutex
	project limitScope
	running *reservation // the list of calls between reserve and settle
}

// A limitViolation is a limit that a call would exceed.
type limitViolation struct {
	limit           *limit
	ofProject       bool
	remaining, need int64
	wait            int64 // milliseconds; 0 if permanent
	permanent       bool  // waiting does not help
	exceedsMax      bool  // the call asks for more than the limit ever allows
}

// reserve reserves a call in every limit of its project and token that applies: in all of them, or in none. It
// returns nil, or the violation that keeps the call waiting longest. The caller holds mu.
func (l *limiter) reserve(r *reservation, token *limitScope, now int64) *limitViolation {
	if n := len(l.project.counters) + len(token.counters); n > 0 {
		r.entries = make([]reservationEntry, 0, n)
	}
	var worst *limitViolation
	for i, s := range [...]*limitScope{&l.project, token} {
		for _, c := range s.counters {
			need := r.quantityIn(c)
			if need == 0 {
				continue
			}
			c.advance(now)
			v := c.checkCapacity(&r.estimate, now, need)
			switch {
			case v == nil:
				r.entries = append(r.entries, reservationEntry{counter: c, generation: c.generation, quantity: need})
			case c.limit.monitorOnly:
				c.wouldRefuse++ // as with an enforced limit, the call uses nothing here
				r.monitorOnlyLimit = c.limit.String()
			case worst == nil || !worst.permanent && (v.permanent || v.wait > worst.wait):
				worst, v.ofProject = v, i == 0
			}
		}
	}
	if worst != nil {
		r.entries = nil
		return worst
	}
	for i := range r.entries {
		r.entries[i].apply()
	}
	r.limiter, r.token, r.start = l, token, now
	l.project.admitted, token.admitted = true, true
	if r.next = l.running; r.next != nil {
		r.next.prev = r
	}
	l.running = r
	return nil
}

// quantityIn returns the amount that the call reserves in a counter, or 0 if the limit does not apply.
func (r *reservation) quantityIn(c *limitCounter) int64 {
	if !c.limit.applies(r.estimate.endpoint, r.estimate.pattern, r.estimate.model) {
		return 0
	}
	return r.estimate.quantityFor(c.limit)
}

// checkCapacity returns the violation if need does not fit, or nil.
func (c *limitCounter) checkCapacity(e *estimate, now, need int64) *limitViolation {
	tooLarge := e.exceedsMax(c.limit)
	if !tooLarge && c.shortfall(need) == 0 {
		return nil
	}
	v := &limitViolation{limit: c.limit, need: need, remaining: c.remaining(), exceedsMax: tooLarge, permanent: true}
	if !tooLarge {
		v.wait, v.permanent = c.retryAfter(now, need)
	}
	return v
}

// remaining returns how many requests, tokens, nano-dollars or running calls still fit.
func (c *limitCounter) remaining() int64 {
	return max(0, addSat(c.limit.max-c.reserved, -c.unscaledUse()))
}

// unscaledUse returns used in requests, tokens or nano-dollars, rounded up.
func (c *limitCounter) unscaledUse() int64 { return addSat(c.used, c.scale()-1) / c.scale() }

// apply reserves the quantity. In a bucket it is used at once and refills from then on; a request is used at
// once, too.
func (e *reservationEntry) apply() {
	c := e.counter
	if c.limit.period.bucketMS() > 0 || c.limit.metric == metricRequests {
		c.used = addSat(c.used, e.quantity*c.scale())
		e.refillMark = c.refilled + c.used
		return
	}
	c.reserved += e.quantity
}

// A finalUsage is what a call used in the end.
type finalUsage struct {
	forwarded bool  // it counts as a request
	tokens    int64 // input and output
	dollars   int64 // nano-dollars
}

// limitUsage returns what limits count of a call that has ended: what was reserved, while the usage of its background
// response is not known.
func (r *requestRow) limitUsage() finalUsage {
	u := finalUsage{forwarded: r.outcome != outcomeRefused, tokens: addSat(r.counts.input, r.counts.output)}
	switch {
	case r.backgroundID != "":
		u.tokens, u.dollars = addSat(r.reservedInput, r.reservedOutput), r.reservedCost
	case r.priced:
		u.dollars = r.cost
	}
	return u
}

func (u *finalUsage) value(m limitMetric) int64 {
	switch m {
	case metricTokens:
		return u.tokens
	case metricDollars:
		return u.dollars
	}
	return 0
}

// settle returns what the call has reserved and counts what it used. record hands the call to the ledger, under the
// same lock: a counter that is created at this moment finds the call either in running or in the ledger.
func (r *reservation) settle(now int64, usage finalUsage, record func()) {
	r.limiter.mu.Lock()
	defer r.limiter.mu.Unlock()
	r.limiter.release(r, now, usage)
	record()
}

// release ends a reservation. The caller holds mu.
func (l *limiter) release(r *reservation, now int64, usage finalUsage) {
	for i := range r.entries {
		e := &r.entries[i]
		if e.counter.advance(now); e.generation == e.counter.generation {
			e.settle(usage)
		}
	}
	if r.prev != nil {
		r.prev.next = r.next
	} else {
		l.running = r.next
	}
	if r.next != nil {
		r.next.prev = r.prev
	}
	r.prev, r.next, r.entries = nil, nil, nil
}

func (e *reservationEntry) settle(usage finalUsage) {
	c := e.counter
	used := usage.value(c.limit.metric)
	if c.limit.metric == metricRequests && usage.forwarded {
		used = e.quantity
	}
	switch {
	case c.limit.metric == metricConcurrent:
		c.reserved -= e.quantity
	case c.limit.period.bucketMS() > 0 && used < e.quantity:
		// Only what has not refilled yet is returned. Otherwise long calls with large reservations would return
		// what has refilled already, and a burst at their end would exceed the limit.
		c.used -= min(c.used, (e.quantity-used)*c.scale(), max(0, e.refillMark-c.refilled))
	case c.limit.period.bucketMS() > 0:
		// Use beyond the estimate is a debt that delays other calls, but at most by one more period.
		c.used = max(c.used, min(c.used+(used-e.quantity)*c.scale(), 2*c.limit.max*c.scale()))
	case c.limit.metric == metricRequests:
		c.used = max(0, c.used-(e.quantity-used))
	default:
		c.reserved -= max(0, e.quantity-e.spent)
		c.used = max(0, addSat(c.used, used-e.spent))
	}
}

// overrunAllowance is how far the use of tokens or dollars may exceed a limit before the running calls that
// count in it are ended.
func overrunAllowance(l *limit) int64 { return l.max / 10 }

// mulSat multiplies numbers of 0 or more, and returns the largest int64 if the product is larger.
func mulSat(a, b int64) int64 {
	if a > 0 && b > math.MaxInt64/a {
		return math.MaxInt64
	}
	return a * b
}

// updateUsage counts what a running call has used so far, given an estimate of its output tokens. It returns a
// limit that is exceeded by more than its allowance, or nil. What is observed counts, whatever maximum the call
// has named, because a provider may ignore it. updateUsage does not wait: if the limiter is locked to read the
// store, the next tick is soon enough.
func (r *reservation) updateUsage(now, output int64) *limit {
	if !r.limiter.mu.TryLock() {
		return nil
	}
	defer r.limiter.mu.Unlock()
	var exceeded *limit
	for i := range r.entries {
		e := &r.entries[i]
		c := e.counter
		if c.limit.metric != metricTokens && c.limit.metric != metricDollars || c.limit.period.bucketMS() > 0 {
			continue
		}
		if c.advance(now); e.generation != c.generation {
			continue
		}
		used := r.estimate.input + output
		if c.limit.metric == metricDollars {
			used = r.estimate.inputCost
			if r.estimate.output > 0 {
				used = addSat(used, mulSat(r.estimate.outputCost/r.estimate.output, output))
			}
		}
		if used > e.spent {
			c.reserved -= max(0, e.quantity-e.spent) - max(0, e.quantity-used)
			c.used = addSat(c.used, used-e.spent)
			e.spent = used
		}
		if !c.limit.monitorOnly && c.used > c.limit.max+overrunAllowance(c.limit) {
			exceeded = c.limit
		}
	}
	return exceeded
}

// setPolicy replaces the counters of s by those of p's limits. A limit that counts the same as before keeps its
// counter. For any other, past returns what was used in the window around now, and the running calls count, too.
// The caller holds mu.
func (l *limiter) setPolicy(s *limitScope, p *policy, now int64, past func(*limit) int64) {
	old := s.counters
	s.policy, s.counters = p, make([]*limitCounter, 0, len(p.Limits))
	for i := range p.Limits {
		lim := &p.Limits[i]
		c := counterFor(old, lim)
		if c == nil {
			c = newLimitCounter(lim, now, past(lim))
			if lim.monitorOnly { // past includes the calls that it would have refused
				c.used = min(c.used, lim.max*c.scale())
			}
			l.countRunning(s, c)
		} else {
			c.advance(now)
			c.limit = lim
		}
		s.counters = append(s.counters, c)
	}
}

// counterFor returns the counter that counts the same as l, or nil.
func counterFor(counters []*limitCounter, l *limit) *limitCounter {
	for _, c := range counters {
		if c.limit.key() == l.key() {
			return c
		}
	}
	return nil
}

// countRunning counts the running calls in c, a new counter of s.
func (l *limiter) countRunning(s *limitScope, c *limitCounter) {
	for r := l.running; r != nil; r = r.next {
		if s != &l.project && s != r.token {
			continue
		}
		if c.windowEnd > 0 && r.start < c.windowStart { // a call counts in the window in which it starts
			continue
		}
		if need := r.quantityIn(c); need > 0 {
			// Nothing has checked that all of them fit. The bound keeps their sum within an int64.
			need = min(need, math.MaxInt64/2-c.reserved)
			e := reservationEntry{counter: c, generation: c.generation, quantity: need}
			e.apply()
			r.entries = append(r.entries, e)
		}
	}
}

// needsHistory reports whether p has a new limit whose past use is in the store. The caller holds mu.
func (s *limitScope) needsHistory(p *policy) bool {
	for i := range p.Limits {
		if l := &p.Limits[i]; l.period >= perHour && counterFor(s.counters, l) == nil {
			return true
		}
	}
	return false
}

// durable reports whether the call counts in a request limit that must hold through a crash.
func (r *reservation) durable() bool {
	for i := range r.entries {
		if l := r.entries[i].counter.limit; l.metric == metricRequests && l.period >= perHour && !l.monitorOnly {
			return true
		}
	}
	return false
}

// A throttle allows a number of events per window and counts those that it omits. If it has several
// windows, an event must fit into each of them.
type throttle struct {
	mu      sync.Mutex
	windows []throttleWindow
	omitted int64
}

// A throttleWindow allows limit events. It starts with its first event.
type throttleWindow struct {
	limit  int
	length time.Duration
	count  int
	ends   time.Time
}

const (
	logLinesPerSecond           = 50 // for lines that anyone can cause, with or without a token
	maxAuthFailures             = 20 // wrong management keys per minute, from the addresses of one slot
	maxFailuresAuditedPerMinute = 10 // failed sign-ins with their own audit entry: entries are kept forever
	maxFailuresAuditedPerDay    = 500
	refusalLogInterval          = time.Second // a token's refused calls get at most one ledger row in this time
)

// newThrottle returns a throttle with one window.
func newThrottle(limit int, window time.Duration) *throttle {
	return &throttle{windows: []throttleWindow{{limit: limit, length: window}}}
}

// newSignInThrottle limits the failed sign-ins that get their own audit entry.
func newSignInThrottle() *throttle {
	return &throttle{windows: []throttleWindow{
		{limit: maxFailuresAuditedPerMinute, length: time.Minute},
		{limit: maxFailuresAuditedPerDay, length: 24 * time.Hour},
	}}
}

// allow returns a wait of 0 if an event is allowed now, and how many were omitted since the last allowed one.
// Otherwise it counts the event as omitted and returns how long no event will be allowed.
func (t *throttle) allow(now time.Time) (wait time.Duration, omitted int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if wait = t.count(now); wait > 0 {
		t.omitted++
		return wait, 0
	}
	omitted, t.omitted = t.omitted, 0
	return 0, omitted
}

// addOmitted counts n more events as omitted.
func (t *throttle) addOmitted(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.omitted += n
}

// drainOmitted returns the number of omitted events and resets it. Reporting them is an event itself: unless
// force is set, drainOmitted returns 0 until that event is allowed.
func (t *throttle) drainOmitted(now time.Time, force bool) (omitted int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.omitted > 0 && (force || t.count(now) == 0) {
		omitted, t.omitted = t.omitted, 0
	}
	return omitted
}

// count adds an event to every window and returns 0; if a window is full, it adds none and returns
// how long that window lasts. The caller holds t.mu.
func (t *throttle) count(now time.Time) (wait time.Duration) {
	for i := range t.windows {
		w := &t.windows[i]
		if !now.Before(w.ends) {
			w.count, w.ends = 0, now.Add(w.length)
		}
		if w.count >= w.limit {
			wait = max(wait, w.ends.Sub(now))
		}
	}
	if wait == 0 {
		for i := range t.windows {
			t.windows[i].count++
		}
	}
	return wait
}

// An addressThrottle is a fixed number of throttles that addresses share by hash, so it cannot grow.
type addressThrottle [1024]*throttle

// newAuthThrottle limits wrong management keys per address. It only slows down guessing: guessing 256 bits is
// hopeless in any case.
func newAuthThrottle() *addressThrottle {
	var a addressThrottle
	for i := range a {
		a[i] = newThrottle(maxAuthFailures, time.Minute)
	}
	return &a
}

// forAddress returns the throttle of an address.
func (a *addressThrottle) forAddress(address string) *throttle {
	if ip, err := netip.ParseAddr(address); err == nil && ip.Is6() && !ip.Is4In6() {
		if p, err := ip.Prefix(64); err == nil { // one customer has a whole /64
			address = p.String()
		}
	}
	var h uint32 = 2166136261 // FNV-1a
	for i := range len(address) {
		h = (h ^ uint32(address[i])) * 16777619
	}
	return a[h%uint32(len(a))]
}

// bodyMemory limits the memory of all request bodies that are in memory at one time.
type bodyMemory struct {
	limit int64
	used  atomic.Int64
}

// reserve reports whether n more bytes fit, and counts them if so.
func (b *bodyMemory) reserve(n int64) bool {
	if b.used.Add(n) > b.limit {
		b.used.Add(-n)
		return false
	}
	return true
}

func (b *bodyMemory) release(n int64) { b.used.Add(-n) }

// A bodyShare is what one call has reserved of the memory for bodies, for its token and in the whole program:
// the body, its copies with another model's name, a buffered stream, stored content. All that goes in comes out
// again in releaseAll, so neither count can drift. It belongs to the call's goroutine.
type bodyShare struct {
	memory   *bodyMemory
	token    *atomic.Int64 // what the token's calls have reserved together
	max      int64         // of token, unless this call alone has all of it
	reserved int64
}

// reserve reserves n more bytes.
func (s *bodyShare) reserve(n int64) error {
	if used := s.token.Add(n); used > s.max && used > s.reserved+n {
		s.token.Add(-n)
		return errTokenBodyMemory()
	}
	if !s.memory.reserve(n) {
		s.token.Add(-n)
		return errBodyMemoryFull()
	}
	s.reserved += n
	return nil
}

func (s *bodyShare) release(n int64) {
	s.reserved -= n
	s.token.Add(-n)
	s.memory.release(n)
}

func (s *bodyShare) releaseAll() { s.release(s.reserved) }

// bodyBufferSize returns the size of the buffer for a body that declares a length (negative: it does not), when have
// bytes of it have come. The last buffer fits exactly, with one more byte to find the end, so that growing leaves
// little garbage. But memory follows the bytes that arrive: a buffer is at most eight times as large as what has.
func bodyBufferSize(declared, have int64) int64 {
	const first, growth = 64 << 10, 8
	if declared < 0 {
		return max(first, have+have/2)
	}
	size := declared + 1
	for size > max(first, growth*have) {
		size = size/growth + 1
	}
	return size
}

const (
	gcHeadroom     = 32 << 20 // bytes of garbage that may accumulate before a collection
	minLiveHeap    = 4 << 20  // bytes; a smaller live heap counts as this much
	gcTuneInterval = 100 * time.Millisecond
	bytesPerCall   = 60 << 10 // about what a running stream needs
	minIdlePeak    = 64 << 20 // bytes of calls and bodies; less is not worth giving back
	idleTicks      = 20       // how many gcTuneIntervals the need must be low before memory is given back
)

// An idleMemory notices that a peak of calls is over.
type idleMemory struct {
	peak int64 // bytes
	low  int   // for how many ticks the need has been low
}

// afterPeak is called once per tick with the bytes that running calls need. It reports whether that has been less than
// a quarter of the last peak for idleTicks: once for each peak.
func (m *idleMemory) afterPeak(need int64) bool {
	m.peak = max(m.peak, need)
	if m.low++; m.peak < minIdlePeak || need > m.peak/4 {
		m.low = 0
	}
	if m.low < idleTicks {
		return false
	}
	m.peak, m.low = need, 0
	return true
}

// gcPercentFor returns how much garbage may accumulate, in percent of the live heap: as much as there is live, which
// is Go's default, and gcHeadroom at least. Request bodies count a quarter. They are the largest part of the heap
// when there are many, and have no pointers, so that a collection is cheap.
func gcPercentFor(liveHeap, bodies int64) int {
	liveHeap = max(liveHeap, bodies, minLiveHeap)
	return int(max(gcHeadroom, liveHeap-bodies, bodies/4) * 100 / liveHeap)
}
