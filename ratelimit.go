// This room counts: what calls have taken of each limit of their project and
// token, and what is left. Requests and running calls are exact; tokens and
// dollars are reserved as an estimate and settled to what the answer says. Plain
// code: time comes in as an argument (unix milliseconds), nothing here does I/O.
package main

import "sync"

// A counter is what was taken of one limit.
type counter struct {
	limit    *limit // of the policy in force
	from, to int64  // the window; a bucket's from is when it last flowed back
	// used is what is spent; in a bucket times its milliseconds, so that what
	// flows back in one of them is a whole number.
	used        int64
	held        int64 // reserved and not spent yet; of countConcurrent, running calls
	flowed      int64 // of a bucket: what has flowed back, ever; it may wrap
	round       int32 // of the window: what was reserved in an earlier one is void
	wouldRefuse int64 // calls that a shadow limit would have refused
}

// newCounter returns the counter of a limit of which used was taken in the
// window that holds now.
func newCounter(l *limit, now, used int64) *counter {
	c := &counter{limit: l}
	if c.from, c.to = l.per.window(now); l.per.bucket() > 0 {
		c.from = now
	}
	c.used = used * c.unit()
	return c
}

// unit is what one request or token is in used.
func (c *counter) unit() int64 { return max(1, c.limit.per.bucket()) }

// advance brings the counter to now. A clock that was set back gives nothing
// back: up to a period the counter waits for it, beyond that it goes on from
// there with what was used.
func (c *counter) advance(now int64) {
	if b := c.limit.per.bucket(); b > 0 {
		switch passed := now - c.from; {
		case passed < 0 && passed >= -b:
			return
		case passed > 0 && (c.limit.max == 0 || passed > c.used/c.limit.max):
			c.flow(c.used)
		case passed > 0:
			c.flow(passed * c.limit.max)
		}
		c.from = now
		return
	}
	if c.to == 0 || now >= c.from && now < c.to { // no window, or within it
		return
	}
	if now < c.from && c.from-now <= c.to-c.from {
		return
	}
	if now >= c.to {
		c.used, c.held = 0, 0
		c.round++
	}
	c.from, c.to = c.limit.per.window(now)
}

// flow gives n of a bucket back.
func (c *counter) flow(n int64) {
	c.used -= n
	c.flowed += n
}

// missing returns by how much need is too much now, 0 if there is room.
func (c *counter) missing(need int64) int64 {
	u := c.unit()
	return max(0, c.used+(c.held+need-c.limit.max)*u)
}

// wait returns the milliseconds until need has room, if nothing more is taken;
// never is false where it will have one.
func (c *counter) wait(now, need int64) (ms int64, never bool) {
	switch l := c.limit; {
	case l.max == 0 || l.per == perLifetime:
		return 0, true
	case l.count == countConcurrent:
		return 1000, false // nobody knows when a running call ends
	case l.per.bucket() > 0:
		return max(1, (c.missing(need)+l.max-1)/l.max+max(0, c.from-now)), false
	}
	return max(1, c.to-now), false
}

// An ask is what a call may take at most, as far as can be told before it is
// made.
type ask struct {
	name, pattern, model  string // the endpoint and the model asked for
	input, output         int64  // tokens
	inputCost, outputCost int64  // nano-dollars
	assumed               bool   // the call names no most output: output is a guess
}

// need is what the call reserves of a limit. A guess takes at most a quarter of
// it, and nothing needs more than all of it: a rough estimate must not make a
// call impossible. 0: the call takes nothing of what l counts.
func (a *ask) need(l *limit) int64 {
	in, out := a.input, a.output
	switch l.count {
	case countRequests, countConcurrent:
		return 1
	case countDollars:
		in, out = a.inputCost, a.outputCost
	}
	if in+out == 0 {
		return 0
	}
	if a.assumed {
		out = min(out, l.max/4)
	}
	return max(1, min(in+out, l.max))
}

// impossible reports whether the call asks for more output than l ever allows.
func (a *ask) impossible(l *limit) bool {
	switch l.count {
	case countTokens:
		return !a.assumed && a.output > l.max
	case countDollars:
		return !a.assumed && a.outputCost > l.max
	}
	return false
}

// A holding is what a call has of one counter.
type holding struct {
	counter *counter
	round   int32
	amount  int64 // reserved
	mark    int64 // of a bucket: once so much has flowed back, so has this
	spent   int64 // of it, or beyond it, what the running call has used so far
}

// A hold is all that one running call has reserved. It belongs to its limiter
// between reserve and settle.
type hold struct {
	limiter    *limiter
	token      *subject
	ask        ask
	start      int64
	holdings   []holding
	shadow     string // the shadow limit that would have refused the call, "" if none
	prev, next *hold
}

// A subject is a project or a token with limits of its own.
type subject struct {
	of       *policy // whose limits the counters are; nil before the first call
	counters []*counter
	admitted bool // a call was: what it used may not be in the sums yet
}

// A limiter counts for one project and all its tokens.
type limiter struct {
	mu      sync.Mutex
	project subject
	running *hold // the list of calls between reserve and settle
}

// A refusal says which limit has no room.
type refusal struct {
	limit      *limit
	ofProject  bool
	left, need int64
	wait       int64 // milliseconds; 0 if never
	never      bool  // waiting does not help
	impossible bool  // the call asks for more than the limit ever allows
}

// reserve takes a call from every limit of its project and token that applies:
// from all of them, or from none. It returns nil, or the limit that keeps the
// call waiting longest. The caller holds mu.
func (l *limiter) reserve(h *hold, token *subject, now int64) *refusal {
	if n := len(l.project.counters) + len(token.counters); n > 0 {
		h.holdings = make([]holding, 0, n)
	}
	var worst *refusal
	for i, s := range [...]*subject{&l.project, token} {
		for _, c := range s.counters {
			if !c.limit.applies(h.ask.name, h.ask.pattern, h.ask.model) {
				continue
			}
			c.advance(now)
			need := h.ask.need(c.limit)
			if need == 0 {
				continue
			}
			r := c.refuses(&h.ask, now, need)
			switch {
			case r == nil:
				h.holdings = append(h.holdings, holding{counter: c, round: c.round, amount: need})
			case c.limit.shadow:
				c.wouldRefuse++ // and it takes nothing, as a limit that is enforced
				h.shadow = c.limit.String()
			case worst == nil || !worst.never && (r.never || r.wait > worst.wait):
				worst, r.ofProject = r, i == 0
			}
		}
	}
	if worst != nil {
		h.holdings = nil
		return worst
	}
	for i := range h.holdings {
		h.holdings[i].take()
	}
	h.limiter, h.token, h.start = l, token, now
	l.project.admitted, token.admitted = true, true
	if h.next = l.running; h.next != nil {
		h.next.prev = h
	}
	l.running = h
	return nil
}

// refuses returns why need has no room, nil if it has.
func (c *counter) refuses(a *ask, now, need int64) *refusal {
	if a.impossible(c.limit) {
		return &refusal{limit: c.limit, need: need, left: c.left(), never: true, impossible: true}
	}
	if c.missing(need) == 0 {
		return nil
	}
	r := &refusal{limit: c.limit, need: need, left: c.left()}
	r.wait, r.never = c.wait(now, need)
	return r
}

// left is what has room now, in requests, tokens, nano-dollars or calls.
func (c *counter) left() int64 {
	return max(0, c.limit.max-c.held-(c.used+c.unit()-1)/c.unit())
}

// take reserves the amount. What a bucket gives is spent at once, and flows
// back from then on; so is a request.
func (g *holding) take() {
	c := g.counter
	if c.limit.per.bucket() > 0 || c.limit.count == countRequests {
		c.used += g.amount * c.unit()
		g.mark = c.flowed + c.used
		return
	}
	c.held += g.amount
}

// A spending is what a call has used in the end.
type spending struct {
	counted bool  // it was forwarded: it counts as a request
	tokens  int64 // input and output
	dollars int64 // nano-dollars
}

func (s *spending) of(m measure) int64 {
	switch m {
	case countTokens:
		return s.tokens
	case countDollars:
		return s.dollars
	}
	return 0
}

// settle gives back what the call has reserved and takes what it used. record
// is called within: a counter that is made meanwhile finds the call either
// here or on record.
func (h *hold) settle(now int64, s spending, record func()) {
	h.limiter.mu.Lock()
	defer h.limiter.mu.Unlock()
	h.limiter.release(h, now, s)
	record()
}

// release ends a hold. The caller holds mu.
func (l *limiter) release(h *hold, now int64, s spending) {
	for i := range h.holdings {
		g := &h.holdings[i]
		if g.counter.advance(now); g.round == g.counter.round {
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
	h.prev, h.next, h.holdings = nil, nil, nil
}

func (g *holding) settle(s spending) {
	c := g.counter
	used := s.of(c.limit.count)
	if c.limit.count == countRequests && s.counted {
		used = g.amount
	}
	switch {
	case c.limit.count == countConcurrent:
		c.held -= g.amount
	case c.limit.per.bucket() > 0 && used < g.amount:
		// Of what was reserved and not used, what has flowed back is not there any
		// more. To give it back all the same would let calls that reserve much and
		// take long save it up, and take it all in one moment when they end.
		c.used -= min(c.used, (g.amount-used)*c.unit(), max(0, g.mark-c.flowed))
	case c.limit.per.bucket() > 0:
		// What was used beyond the estimate is a debt, which keeps others
		// waiting; not for longer than one more period, though.
		c.used = max(c.used, min(c.used+(used-g.amount)*c.unit(), 2*c.limit.max*c.unit()))
	case c.limit.count == countRequests:
		c.used = max(0, c.used-(g.amount-used))
	default:
		c.held -= max(0, g.amount-g.spent)
		c.used = max(0, c.used+used-g.spent)
	}
}

// overdraft is by how much what was really spent may pass a window of tokens or
// dollars before the running calls that count in it are ended.
func overdraft(l *limit) int64 { return l.max / 10 }

// progress counts what a running call has used so far: output tokens, as far as
// one can tell. It returns a limit that is spent by more than its overdraft, nil
// if none is. A call that named its most output never counts for more than it
// has reserved, as the provider holds it to that. It does not wait: while the
// limiter is busy reading the store, the next tick is soon enough.
func (h *hold) progress(now, output int64) *limit {
	if !h.limiter.mu.TryLock() {
		return nil
	}
	defer h.limiter.mu.Unlock()
	var spent *limit
	for i := range h.holdings {
		g := &h.holdings[i]
		c := g.counter
		if c.limit.count != countTokens && c.limit.count != countDollars || c.limit.per.bucket() > 0 {
			continue
		}
		if c.advance(now); g.round != c.round {
			continue
		}
		sofar := h.ask.input + output
		if c.limit.count == countDollars {
			sofar = h.ask.inputCost
			if h.ask.output > 0 {
				sofar += h.ask.outputCost / h.ask.output * output
			}
		}
		if !h.ask.assumed {
			sofar = min(sofar, g.amount)
		}
		if sofar > g.spent {
			c.held -= max(0, g.amount-g.spent) - max(0, g.amount-sofar)
			c.used += sofar - g.spent
			g.spent = sofar
		}
		if !c.limit.shadow && c.used > c.limit.max+overdraft(c.limit) {
			spent = c.limit
		}
	}
	return spent
}

// adopt makes the counters of s those of p's limits. What counts the same keeps
// its count; past says what was used of a limit that has no counter yet, in the
// window that holds now. The calls that are running count in new limits too.
// The caller holds mu.
func (l *limiter) adopt(s *subject, p *policy, now int64, past func(*limit) int64) {
	old := map[limitKey]*counter{}
	for _, c := range s.counters {
		old[c.limit.key()] = c
	}
	s.of, s.counters = p, make([]*counter, 0, len(p.Limits))
	for i := range p.Limits {
		lim := &p.Limits[i]
		c := old[lim.key()]
		if c == nil {
			c = newCounter(lim, now, past(lim))
			if lim.shadow { // what it would have refused is in past too
				c.used = min(c.used, lim.max*c.unit())
			}
			l.join(s, c)
		} else {
			c.rebase(lim, now)
		}
		s.counters = append(s.counters, c)
	}
}

// rebase puts another max in force.
func (c *counter) rebase(l *limit, now int64) {
	c.advance(now)
	c.limit = l
}

// join makes running calls count in c, a new counter of s.
func (l *limiter) join(s *subject, c *counter) {
	for h := l.running; h != nil; h = h.next {
		if s != &l.project && s != h.token || !c.limit.applies(h.ask.name, h.ask.pattern, h.ask.model) {
			continue
		}
		if c.to > 0 && h.start < c.from { // it counts in the window in which it began
			continue
		}
		if need := h.ask.need(c.limit); need > 0 {
			g := holding{counter: c, round: c.round, amount: need}
			g.take()
			h.holdings = append(h.holdings, g)
		}
	}
}

// lacking reports whether p has limits whose past use the store must be asked
// for. The caller holds mu.
func (s *subject) lacking(p *policy) bool {
next:
	for i := range p.Limits {
		l := &p.Limits[i]
		if l.per < perHour {
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
func (h *hold) durable() bool {
	for i := range h.holdings {
		if l := h.holdings[i].counter.limit; l.count == countRequests && l.per >= perHour && !l.shadow {
			return true
		}
	}
	return false
}
