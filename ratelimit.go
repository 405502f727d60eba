// This room counts: what calls have taken of each limit of their project and
// token, and what is left. Requests and running calls are exact; tokens and
// dollars are reserved as an estimate and settled to what the answer says. Plain
// code: time comes in as an argument (unix milliseconds), nothing here does I/O.
package main

import "sync"

// A limitCounter is what was taken of one limit.
type limitCounter struct {
	limit                  *limit // of the policy in force
	windowStart, windowEnd int64  // the window; a bucket's from is when it last flowed back
	// used is what is spent; in a bucket times its milliseconds, so that what
	// flows back in one of them is a whole number.
	used        int64
	reserved    int64 // reserved and not spent yet; of metricConcurrent, running calls
	refilled    int64 // of a bucket: what has flowed back, ever; it may wrap
	generation  int32 // of the window: what was reserved in an earlier one is void
	wouldRefuse int64 // calls that a shadow limit would have refused
}

// newLimitCounter returns the counter of a limit of which used was taken in the
// window that holds now.
func newLimitCounter(l *limit, now, used int64) *limitCounter {
	c := &limitCounter{limit: l}
	if c.windowStart, c.windowEnd = l.period.window(now); l.period.bucketMS() > 0 {
		c.windowStart = now
	}
	c.used = used * c.scale()
	return c
}

// scale is what one request or token is in used.
func (c *limitCounter) scale() int64 { return max(1, c.limit.period.bucketMS()) }

// advance brings the counter to now. A clock that was set back gives nothing
// back: up to a period the counter waits for it, beyond that it goes on from
// there with what was used.
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
	if c.windowEnd == 0 || now >= c.windowStart && now < c.windowEnd { // no window, or within it
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

// refill gives n of a bucket back.
func (c *limitCounter) refill(n int64) {
	c.used -= n
	c.refilled += n
}

// shortfall returns by how much need is too much now, 0 if there is room.
func (c *limitCounter) shortfall(need int64) int64 {
	u := c.scale()
	return max(0, c.used+(c.reserved+need-c.limit.max)*u)
}

// retryAfter returns the milliseconds until need has room, if nothing more is taken;
// never is false where it will have one.
func (c *limitCounter) retryAfter(now, need int64) (ms int64, never bool) {
	switch l := c.limit; {
	case l.max == 0 || l.period == perLifetime:
		return 0, true
	case l.metric == metricConcurrent:
		return 1000, false // nobody knows when a running call ends
	case l.period.bucketMS() > 0:
		return max(1, (c.shortfall(need)+l.max-1)/l.max+max(0, c.windowStart-now)), false
	}
	return max(1, c.windowEnd-now), false
}

// An estimate is what a call may take at most, as far as can be told before it is
// made.
type estimate struct {
	endpoint, pattern, model string // the endpoint and the model asked for
	input, output            int64  // tokens
	inputCost, outputCost    int64  // nano-dollars
	outputAssumed            bool   // the call names no most output: output is a guess
}

// quantityFor is what the call reserves of a limit. A guess takes at most a quarter of
// it, and nothing needs more than all of it: a rough estimate must not make a
// call impossible. 0: the call takes nothing of what l counts.
func (a *estimate) quantityFor(l *limit) int64 {
	in, out := a.input, a.output
	switch l.metric {
	case metricRequests, metricConcurrent:
		return 1
	case metricDollars:
		in, out = a.inputCost, a.outputCost
	}
	if in+out == 0 {
		return 0
	}
	if a.outputAssumed {
		out = min(out, l.max/4)
	}
	return max(1, min(in+out, l.max))
}

// exceedsMax reports whether the call asks for more output than l ever allows.
func (a *estimate) exceedsMax(l *limit) bool {
	switch l.metric {
	case metricTokens:
		return !a.outputAssumed && a.output > l.max
	case metricDollars:
		return !a.outputAssumed && a.outputCost > l.max
	}
	return false
}

// A reservationEntry is what a call has of one counter.
type reservationEntry struct {
	counter    *limitCounter
	generation int32
	quantity   int64 // reserved
	refillMark int64 // of a bucket: once so much has flowed back, so has this
	spent      int64 // of it, or beyond it, what the running call has used so far
}

// A reservation is all that one running call has reserved. It belongs to its limiter
// between reserve and settle.
type reservation struct {
	limiter          *limiter
	token            *limitScope
	estimate         estimate
	start            int64
	entries          []reservationEntry
	monitorOnlyLimit string // the shadow limit that would have refused the call, "" if none
	prev, next       *reservation
}

// A limitScope is a project or a token with limits of its own.
type limitScope struct {
	policy   *policy // whose limits the counters are; nil before the first call
	counters []*limitCounter
	admitted bool // a call was: what it used may not be in the sums yet
}

// A limiter counts for one project and all its tokens.
type limiter struct {
	mu      sync.Mutex
	project limitScope
	running *reservation // the list of calls between reserve and settle
}

// A limitViolation says which limit has no room.
type limitViolation struct {
	limit           *limit
	ofProject       bool
	remaining, need int64
	wait            int64 // milliseconds; 0 if never
	permanent       bool  // waiting does not help
	exceedsMax      bool  // the call asks for more than the limit ever allows
}

// reserve takes a call from every limit of its project and token that applies:
// from all of them, or from none. It returns nil, or the limit that keeps the
// call waiting longest. The caller holds mu.
func (l *limiter) reserve(h *reservation, token *limitScope, now int64) *limitViolation {
	if n := len(l.project.counters) + len(token.counters); n > 0 {
		h.entries = make([]reservationEntry, 0, n)
	}
	var worst *limitViolation
	for i, s := range [...]*limitScope{&l.project, token} {
		for _, c := range s.counters {
			if !c.limit.applies(h.estimate.endpoint, h.estimate.pattern, h.estimate.model) {
				continue
			}
			c.advance(now)
			need := h.estimate.quantityFor(c.limit)
			if need == 0 {
				continue
			}
			r := c.checkCapacity(&h.estimate, now, need)
			switch {
			case r == nil:
				h.entries = append(h.entries, reservationEntry{counter: c, generation: c.generation, quantity: need})
			case c.limit.monitorOnly:
				c.wouldRefuse++ // and it takes nothing, as a limit that is enforced
				h.monitorOnlyLimit = c.limit.String()
			case worst == nil || !worst.permanent && (r.permanent || r.wait > worst.wait):
				worst, r.ofProject = r, i == 0
			}
		}
	}
	if worst != nil {
		h.entries = nil
		return worst
	}
	for i := range h.entries {
		h.entries[i].apply()
	}
	h.limiter, h.token, h.start = l, token, now
	l.project.admitted, token.admitted = true, true
	if h.next = l.running; h.next != nil {
		h.next.prev = h
	}
	l.running = h
	return nil
}

// checkCapacity returns why need has no room, nil if it has.
func (c *limitCounter) checkCapacity(a *estimate, now, need int64) *limitViolation {
	if a.exceedsMax(c.limit) {
		return &limitViolation{limit: c.limit, need: need, remaining: c.remaining(), permanent: true, exceedsMax: true}
	}
	if c.shortfall(need) == 0 {
		return nil
	}
	r := &limitViolation{limit: c.limit, need: need, remaining: c.remaining()}
	r.wait, r.permanent = c.retryAfter(now, need)
	return r
}

// remaining is what has room now, in requests, tokens, nano-dollars or calls.
func (c *limitCounter) remaining() int64 {
	return max(0, c.limit.max-c.reserved-(c.used+c.scale()-1)/c.scale())
}

// apply reserves the amount. What a bucket gives is spent at once, and flows
// back from then on; so is a request.
func (g *reservationEntry) apply() {
	c := g.counter
	if c.limit.period.bucketMS() > 0 || c.limit.metric == metricRequests {
		c.used += g.quantity * c.scale()
		g.refillMark = c.refilled + c.used
		return
	}
	c.reserved += g.quantity
}

// A finalUsage is what a call has used in the end.
type finalUsage struct {
	forwarded bool  // it was forwarded: it counts as a request
	tokens    int64 // input and output
	dollars   int64 // nano-dollars
}

func (s *finalUsage) value(m limitMetric) int64 {
	switch m {
	case metricTokens:
		return s.tokens
	case metricDollars:
		return s.dollars
	}
	return 0
}

// settle gives back what the call has reserved and takes what it used. record
// is called within: a counter that is made meanwhile finds the call either
// here or on record.
func (h *reservation) settle(now int64, s finalUsage, record func()) {
	h.limiter.mu.Lock()
	defer h.limiter.mu.Unlock()
	h.limiter.release(h, now, s)
	record()
}

// release ends a hold. The caller holds mu.
func (l *limiter) release(h *reservation, now int64, s finalUsage) {
	for i := range h.entries {
		g := &h.entries[i]
		if g.counter.advance(now); g.generation == g.counter.generation {
			g.settle(s)
		}
	}
	if h.prev != nil {
		h.prev.next = h.next
	} else {
		l.running = h.next
	}
	if h.next != nil {
		h.next.prev = h.prev
	}
	h.prev, h.next, h.entries = nil, nil, nil
}

func (g *reservationEntry) settle(s finalUsage) {
	c := g.counter
	used := s.value(c.limit.metric)
	if c.limit.metric == metricRequests && s.forwarded {
		used = g.quantity
	}
	switch {
	case c.limit.metric == metricConcurrent:
		c.reserved -= g.quantity
	case c.limit.period.bucketMS() > 0 && used < g.quantity:
		// Of what was reserved and not used, what has flowed back is not there any
		// more. To give it back all the same would let calls that reserve much and
		// take long save it up, and take it all in one moment when they end.
		c.used -= min(c.used, (g.quantity-used)*c.scale(), max(0, g.refillMark-c.refilled))
	case c.limit.period.bucketMS() > 0:
		// What was used beyond the estimate is a debt, which keeps others
		// waiting; not for longer than one more period, though.
		c.used = max(c.used, min(c.used+(used-g.quantity)*c.scale(), 2*c.limit.max*c.scale()))
	case c.limit.metric == metricRequests:
		c.used = max(0, c.used-(g.quantity-used))
	default:
		c.reserved -= max(0, g.quantity-g.spent)
		c.used = max(0, c.used+used-g.spent)
	}
}

// overrunAllowance is by how much what was really spent may pass a window of tokens or
// dollars before the running calls that count in it are ended.
func overrunAllowance(l *limit) int64 { return l.max / 10 }

// updateUsage counts what a running call has used so far: output tokens, as far as
// one can tell. It returns a limit that is spent by more than its overdraft, nil
// if none is. A call that named its most output never counts for more than it
// has reserved, as the provider holds it to that. It does not wait: while the
// limiter is busy reading the store, the next tick is soon enough.
func (h *reservation) updateUsage(now, output int64) *limit {
	if !h.limiter.mu.TryLock() {
		return nil
	}
	defer h.limiter.mu.Unlock()
	var spent *limit
	for i := range h.entries {
		g := &h.entries[i]
		c := g.counter
		if c.limit.metric != metricTokens && c.limit.metric != metricDollars || c.limit.period.bucketMS() > 0 {
			continue
		}
		if c.advance(now); g.generation != c.generation {
			continue
		}
		sofar := h.estimate.input + output
		if c.limit.metric == metricDollars {
			sofar = h.estimate.inputCost
			if h.estimate.output > 0 {
				sofar += h.estimate.outputCost / h.estimate.output * output
			}
		}
		if !h.estimate.outputAssumed {
			sofar = min(sofar, g.quantity)
		}
		if sofar > g.spent {
			c.reserved -= max(0, g.quantity-g.spent) - max(0, g.quantity-sofar)
			c.used += sofar - g.spent
			g.spent = sofar
		}
		if !c.limit.monitorOnly && c.used > c.limit.max+overrunAllowance(c.limit) {
			spent = c.limit
		}
	}
	return spent
}

// setPolicy makes the counters of s those of p's limits. What counts the same keeps
// its count; past says what was used of a limit that has no counter yet, in the
// window that holds now. The calls that are running count in new limits too.
// The caller holds mu.
func (l *limiter) setPolicy(s *limitScope, p *policy, now int64, past func(*limit) int64) {
	old := map[limitKey]*limitCounter{}
	for _, c := range s.counters {
		old[c.limit.key()] = c
	}
	s.policy, s.counters = p, make([]*limitCounter, 0, len(p.Limits))
	for i := range p.Limits {
		lim := &p.Limits[i]
		c := old[lim.key()]
		if c == nil {
			c = newLimitCounter(lim, now, past(lim))
			if lim.monitorOnly { // what it would have refused is in past too
				c.used = min(c.used, lim.max*c.scale())
			}
			l.countRunning(s, c)
		} else {
			c.setLimit(lim, now)
		}
		s.counters = append(s.counters, c)
	}
}

// setLimit puts another max in force.
func (c *limitCounter) setLimit(l *limit, now int64) {
	c.advance(now)
	c.limit = l
}

// countRunning makes running calls count in c, a new counter of s.
func (l *limiter) countRunning(s *limitScope, c *limitCounter) {
	for h := l.running; h != nil; h = h.next {
		if s != &l.project && s != h.token || !c.limit.applies(h.estimate.endpoint, h.estimate.pattern, h.estimate.model) {
			continue
		}
		if c.windowEnd > 0 && h.start < c.windowStart { // it counts in the window in which it began
			continue
		}
		if need := h.estimate.quantityFor(c.limit); need > 0 {
			g := reservationEntry{counter: c, generation: c.generation, quantity: need}
			g.apply()
			h.entries = append(h.entries, g)
		}
	}
}

// needsHistory reports whether p has limits whose past use the store must be asked
// for. The caller holds mu.
func (s *limitScope) needsHistory(p *policy) bool {
next:
	for i := range p.Limits {
		l := &p.Limits[i]
		if l.period < perHour {
			continue
		}
		for _, c := range s.counters {
			if c.limit.key() == l.key() {
				continue next
			}
		}
		return true
	}
	return false
}

// durable reports whether the call counts in a limit of requests that must hold
// through a crash.
func (h *reservation) durable() bool {
	for i := range h.entries {
		if l := h.entries[i].counter.limit; l.metric == metricRequests && l.period >= perHour && !l.monitorOnly {
			return true
		}
	}
	return false
}
