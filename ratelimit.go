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
// A limit with for_each has a group of counters, one for each value of an attribute; see ratelimit_values.go.
package main

import (
	"bytes"
	"math"
	"strings"
	"sync"
)

// A limitCounter is the current state of one limit, or of one value of a limit with for_each.
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

	group *valueGroup // of a limit with for_each: the counters of its values. Its own has their window, and no use
	value *valueState // of a counter in a group
	lease *lease      // what the counter may spend; nil: all of the limit
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
func (c *limitCounter) scale() int64 {
	if c.lease != nil {
		return 1
	}
	return max(1, c.limit.period.bucketMS())
}

// advance brings the counter to now. Setting the clock back never frees anything: if it is at most one period, the
// counter waits until the clock catches up; if it is more, the counter continues from the new time with its use.
func (c *limitCounter) advance(now int64) {
	if b := c.limit.period.bucketMS(); b > 0 {
		switch passed := now - c.windowStart; {
		case c.lease != nil: // it refills in the database
			c.windowStart = max(c.windowStart, now)
			return
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
	if c.value != nil {
		c.value.group.own.advance(now) // the windows of a group begin together
	}
	if c.windowEnd == 0 || now >= c.windowStart && now < c.windowEnd { // never ends, or has not ended
		return
	}
	if now < c.windowStart && (c.lease != nil || c.windowStart-now <= c.windowEnd-c.windowStart) {
		return // a leased counter returns only when the database says so
	}
	if c.lease != nil {
		c.changeWindow(now)
		return
	}
	ended := now >= c.windowEnd
	if c.windowStart, c.windowEnd = c.limit.period.window(now); !ended {
		return
	}
	c.generation++
	c.used, c.reserved = 0, 0
	if c.group != nil {
		c.group.beginWindow(now)
	}
}

func (c *limitCounter) refill(n int64) {
	c.used -= n
	c.refilled += n
}

// shortfall returns how much of need, scaled, exceeds the limit now; 0 if it fits.
func (c *limitCounter) shortfall(need int64) int64 {
	if c.lease != nil {
		return max(0, addSat(addSat(c.used, addSat(c.reserved, need)), -c.lease.granted))
	}
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
	case l.period.bucketMS() > 0 && c.lease != nil:
		return c.leaseWait(now, need), false
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
	attribution              *attribution
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
	start            int64 // by the limits' clock
	began            int64 // by the clock of the call's id
	entries          []reservationEntry
	outputIfLost     int64  // tokens, see lostOutput
	monitorOnlyLimit string // the shadow limit that would have refused the call, "" if none
	prev, next       *reservation
}

// A limitScope is a project or a token with its own limits.
type limitScope struct {
	policy      *policy // has the limits of the counters; nil before the first call
	owner       leaseOwner
	lastVersion int64 // owner.version of the policy before
	counters    []*limitCounter
	lifetime    *limitCounter // of a token's max_requests, where that is leased
	forEach     bool          // a limit has for_each
	admitted    bool          // a call was admitted, whose use the stored sums may not include yet
}

// A limiter counts for one project and all its tokens.
type limiter struct {
	mu      sync.Mutex
	project limitScope
	running *reservation // the list of calls between reserve and settle
	values  valueMemory
	leases  *leaseKeeper // nil: the counters need no leases
}

// A limitViolation is a limit that a call would exceed.
type limitViolation struct {
	limit           *limit
	value           string // of the call, in a limit with for_each
	noCounter       bool   // for this value: the limit has max_values others, or memory is full
	memoryFull      bool
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
		for _, own := range s.counters {
			need := r.quantityIn(own.limit)
			if need == 0 {
				continue
			}
			own.advance(now)
			c, v := own.forCall(&r.estimate), (*limitViolation)(nil)
			if c == nil {
				v = own.group.noCounterViolation(&r.estimate, now)
			} else {
				c.advance(now)
				v = c.checkCapacity(&r.estimate, now, need)
			}
			switch {
			case v == nil:
				r.entries = append(r.entries, reservationEntry{counter: c, generation: c.generation, quantity: need})
			case own.limit.monitorOnly: // as with an enforced limit, the call uses nothing here
				own.wouldRefuse++
				r.monitorOnlyLimit = own.limit.String()
				if c != nil && c != own {
					c.wouldRefuse++
				}
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
		e := &r.entries[i]
		if e.apply(); e.counter.lease != nil {
			e.counter.take(r, e.quantity, now)
		}
	}
	r.limiter, r.token, r.start = l, token, now
	l.project.admitted, token.admitted = true, true
	if r.next = l.running; r.next != nil {
		r.next.prev = r
	}
	l.running = r
	return nil
}

// quantityIn returns the amount that the call reserves in a limit, or 0 if the limit does not apply.
func (r *reservation) quantityIn(l *limit) int64 {
	if !l.applies(r.estimate.endpoint, r.estimate.pattern, r.estimate.model) {
		return 0
	}
	return r.estimate.quantityFor(l)
}

// checkCapacity returns the violation if need does not fit, or nil.
func (c *limitCounter) checkCapacity(e *estimate, now, need int64) *limitViolation {
	tooLarge := e.exceedsMax(c.limit)
	if !tooLarge && c.shortfall(need) == 0 {
		return nil
	}
	v := &limitViolation{limit: c.limit, need: need, remaining: c.remaining(), exceedsMax: tooLarge, permanent: true,
		value: e.attribution.value(c.limit.forEach)}
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
func (c *limitCounter) unscaledUse() int64 {
	if c.lease != nil {
		return c.totalUse()
	}
	return addSat(c.used, c.scale()-1) / c.scale()
}

// apply reserves the quantity. In a bucket it is used at once and refills from then on; a request is used at
// once, too.
func (e *reservationEntry) apply() {
	c := e.counter
	if c.value != nil {
		c.value.group.acquire(c)
	}
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
// same lock: a counter that is created at this moment finds the call either in running or in the ledger. It gets what
// the call counts in limits with for_each, and returns the ledger's position.
func (r *reservation) settle(now int64, usage finalUsage, record func([]limitUse) uint64) {
	l := r.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	entries := r.entries
	position := record(l.release(r, now, usage))
	for i := range entries {
		if v := entries[i].counter.value; v != nil {
			v.recorded = position
		}
	}
}

// release ends a reservation, and returns what the call counts in windows of limits with for_each. The caller holds mu.
func (l *limiter) release(r *reservation, now int64, usage finalUsage) (uses []limitUse) {
	for i := range r.entries {
		e := &r.entries[i]
		if e.counter.advance(now); e.generation == e.counter.generation {
			e.settle(usage, now-r.start)
			uses = e.appendUse(uses, usage)
		}
		if e.counter.lease != nil {
			e.counter.untake(r, usage.forwarded)
		}
		if e.counter.value != nil {
			e.counter.value.group.release(e.counter, now)
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
	return uses
}

// used returns what the call used of the entry's limit.
func (e *reservationEntry) used(usage finalUsage) int64 {
	if e.counter.limit.metric == metricRequests && usage.forwarded {
		return e.quantity
	}
	return usage.value(e.counter.limit.metric)
}

// settle counts what the call has used, elapsed milliseconds after it was reserved.
func (e *reservationEntry) settle(usage finalUsage, elapsed int64) {
	c, used := e.counter, e.used(usage)
	switch {
	case c.lease != nil && c.limit.period.bucketMS() > 0:
		e.settleLeasedBucket(used, elapsed)
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
		c.used = max(c.minUse(), c.used-(e.quantity-used))
	default:
		c.reserved -= max(0, e.quantity-e.spent)
		c.used = max(c.minUse(), addSat(c.used, used-e.spent))
	}
}

// lostOutput returns the output tokens that the call counts with if the program is killed: what a limit of tokens or
// dollars has reserved for it, otherwise what it asks for. The caller holds mu.
func (r *reservation) lostOutput(asked int64) int64 {
	for i := range r.entries {
		if m := r.entries[i].counter.limit.metric; m == metricTokens || m == metricDollars {
			return max(asked, r.estimate.output)
		}
	}
	return asked
}

// overrunAllowance is how far the use of tokens or dollars may exceed a limit before the running calls that
// count in it are ended.
func overrunAllowance(l *limit) int64 { return l.max / 10 }

// updateUsage counts what a running call has used so far, given an estimate of its output tokens. It returns a
// limit that is exceeded by more than its allowance, or nil. What is observed counts, whatever maximum the call
// has named, because a provider may ignore it. updateUsage does not wait: if the limiter is locked to read the
// store, the next tick is soon enough.
func (r *reservation) updateUsage(now, output int64) *limit {
	if !r.limiter.mu.TryLock() {
		return nil
	}
	defer r.limiter.mu.Unlock()
	if r.limiter.leases != nil {
		now += r.start - r.began
	}
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
		if !c.limit.monitorOnly && c.unscaledUse() > c.limit.max+overrunAllowance(c.limit) {
			exceeded = c.limit
		}
	}
	return exceeded
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

// countRunning counts the running calls in own, a new counter of s. values has what the values of these calls have
// used, in a limit with for_each.
func (l *limiter) countRunning(s *limitScope, own *limitCounter, values, before map[string]int64) {
	l.eachRunning(s, own.limit, own.windowStart, func(r *reservation, need int64) {
		c := own
		if own.group != nil {
			name := r.estimate.attribution.value(own.limit.forEach)
			if c = own.group.counters[name]; c == nil {
				used, stored := values[name]
				c = own.group.insert(name, max(used, before[name]), stored)
			}
		}
		// Nothing has checked that all of them fit. The bound keeps their sum within an int64.
		need = min(need, math.MaxInt64/2-c.reserved)
		e := reservationEntry{counter: c, generation: c.generation, quantity: need}
		if e.apply(); c.lease != nil {
			l.leases.touch(c)
		}
		r.entries = append(r.entries, e)
	})
}

// eachRunning calls do with each running call of s that counts in a limit whose window begins at from, and with the
// amount that it reserves there. A call counts in the window in which it starts.
func (l *limiter) eachRunning(s *limitScope, lim *limit, from int64, do func(r *reservation, need int64)) {
	for r := l.running; r != nil; r = r.next {
		if s != &l.project && s != r.token || lim.isWindow() && r.start < from {
			continue
		}
		if need := r.quantityIn(lim); need > 0 {
			do(r, need)
		}
	}
}

// needsHistory reports whether p has a new limit whose past use is in the store. The caller holds mu.
func (s *limitScope) needsHistory(p *policy) bool {
	for i := range p.Limits {
		if l := &p.Limits[i]; l.isWindow() && counterFor(s.counters, l) == nil {
			return true
		}
	}
	return false
}

// A costBound is what a call may cost at most, in nano-dollars.
type costBound struct{ input, output int64 }

// Bounds of what the request itself does not bound.
const (
	maxWebSearches   = 10 // in one call
	maxFileSearches  = 10 // likewise, as is the next
	maxSearchSources = 50
	minBytesASecond  = 500 // of sound, however compressed
	// A picture of 1024x1536 has at most so many tokens, and one of low or medium quality fewer.
	maxPictureTokens, mediumPictureTokens, lowPictureTokens = 6_240, 1_584, 408
)

// costBound returns what a call may cost at most. d has the multipliers of the project and the region of the upstream.
// If something that the request asks for has no bound, or its price is not known, unbounded is the name of the field.
func (e *endpoint) costBound(
	p *price, f *callFields, body []byte, est *estimate, d usageDetails,
) (b costBound, unbounded string) {
	if d.tier = f.dearestTier(); d.tier != tierStandard && !p.allTiers && p.tiers[d.tier] == nil {
		return b, "service_tier"
	}
	if f.fast {
		if d.speed = speedFast; p.fast == 0 && !p.allTiers {
			return b, "speed"
		}
	}
	var plain []byte // the body is only searched for what would raise the bound
	mentions := func(text string) bool {
		if plain == nil {
			plain = unescapeASCII(body)
		}
		return bytes.Contains(plain, []byte(text))
	}
	if d.region == regionAny && p.us > 0 && mentions("inference_geo") {
		d.region = regionUS
	}
	input := tokenCounts{input: est.input}
	output := tokenCounts{input: est.input, output: est.output} // a long input makes the output dearer
	pictures := strings.HasPrefix(e.pattern, "/v1/images/")
	if pictures {
		output.output = mulSat(f.pictureTokens(), max(1, f.n))
	}
	rates := p.ratesFor(est.input, d.tier)
	raise := func(bound int64, k, plain priceKind, c tokenCounts, d usageDetails, certain bool, text string) int64 {
		if rates.rate(k) <= rates.rate(plain) && !pictures { // nearly always: all is of the kind, so it is not dearer
			return bound
		}
		if nanos, _ := p.cost(&c, &d, nil); nanos > bound && (certain || mentions(text)) {
			return nanos
		}
		return bound
	}
	if !e.billsOtherwise(p) {
		pictureOutput, known := d, false
		if pictures {
			pictureOutput.imageOutput = output.output
		}
		if b.input, known = p.cost(&input, &d, nil); known && output.output > 0 {
			b.output, known = p.cost(&output, &pictureOutput, nil)
		}
		if !known {
			return b, "model"
		}
		least := b.input
		e.boundKinds(&b, input, output, d, raise)
		b.output = max(b.output-least, 0)
	}
	tools, unbounded := e.toolBound(p, f, est, body, d)
	b.input = addSat(b.input, tools)
	return b, unbounded
}

// boundKinds raises the bound to the dearest kinds of input and output that the body may ask for. A kind without a
// price does not raise it: then nothing bills it, or the cost turns out to be unknown. raise returns a bound, raised
// by a kind in place of another if that is certain, or the body has a text.
func (e *endpoint) boundKinds(b *costBound, input, output tokenCounts, d usageDetails,
	raise func(bound int64, k, plain priceKind, c tokenCounts, d usageDetails, certain bool, text string) int64,
) {
	written, hour, sound, picture := input, d, input, d
	written.cacheWrite, sound.audioInput = input.input, input.input
	hour.cacheWrite1h, picture.imageInput = input.input, input.input
	b.input = raise(b.input, kindCacheWrite, kindInput, written, d, e.api != apiAnthropic, "cache_control")
	b.input = raise(b.input, kindCacheWrite1h, kindInput, written, hour, false, `"1h"`)
	b.input = raise(b.input, kindAudioInput, kindInput, sound, d, e.body == bodyForm, "input_audio")
	isPicture := strings.HasPrefix(e.pattern, "/v1/images/")
	b.input = raise(b.input, kindImageInput, kindInput, input, picture, isPicture, "image")
	if output.output == 0 {
		return
	}
	thoughts, spoken := output, output
	thoughts.reasoning, spoken.audioOutput = output.output, output.output
	b.output = raise(b.output, kindReasoningOutput, kindOutput, thoughts, d, true, "")
	b.output = raise(b.output, kindAudioOutput, kindOutput, spoken, d, false, `"audio"`)
}

// billsOtherwise reports whether the endpoint bills this model by something else than tokens.
func (e *endpoint) billsOtherwise(p *price) bool {
	switch {
	case e.pattern == "/v1/audio/speech":
		return p.rates[kindInputCharacter] >= 0
	case strings.HasPrefix(e.pattern, "/v1/images/"):
		return p.rates[kindOutputPicture] >= 0 && p.rates[kindImageOutput] < 0 && p.rates[kindOutput] < 0
	case strings.HasPrefix(e.pattern, "/v1/audio/"):
		return p.rates[kindInputMinute] >= 0 && p.rates[kindInput] < 0
	}
	return false
}

// toolBound returns what tools, characters, pictures and minutes may cost at most.
func (e *endpoint) toolBound(p *price, f *callFields, est *estimate, body []byte, d usageDetails,
) (nanos int64, unbounded string) {
	field := "tools"
	switch {
	case e.pattern == "/v1/audio/speech" && !e.billsOtherwise(p):
		return 0, "input" // sound of a length that nobody knows
	case !e.billsOtherwise(p):
	case e.pattern == "/v1/audio/speech":
		d.characters, field = f.characters, "input"
	case strings.HasPrefix(e.pattern, "/v1/images/"):
		d.outputPictures, field = max(1, f.n), "n"
	default:
		d.inputMS, field = int64(len(body))*1000/minBytesASecond, "file"
	}
	if f.tools[toolWebSearch] {
		d.webSearches, d.searchContext = maxWebSearches, searchContextHigh
	} else if e.pattern == chatPattern && alwaysSearches(est.model) {
		d.webSearches, d.searchContext, field = 1, searchContextHigh, "model"
	}
	if f.tools[toolFileSearch] {
		d.fileSearches = maxFileSearches
	}
	if f.tools[toolCodeInterpreter] {
		if d.codeSessions = 1; f.sizedContainer {
			return 0, "tools" // the price of another size is not known
		}
	}
	if f.tools[toolLiveSearch] && p.rates[kindSearchSource] >= 0 {
		d.searchSources, field = maxSearchSources, "search_parameters"
	}
	if f.tools[toolImageGeneration] {
		d.imageCalls = 1
	}
	nanos, ok := p.cost(&tokenCounts{}, &d, nil)
	if !ok {
		return 0, field
	}
	return nanos, ""
}
