// This file keeps the counters of limits with for_each: one for each value of an attribute, such as each end user.
// Clients can invent values, so only some of the counters are in memory. One that a running call refers to stays, and
// so does one whose state is nowhere else: that of a bucket until it has refilled, that of a window until the ledger
// has stored it. Any other may be dropped, and comes back from the store exactly.
//
// Two bounds keep that small: the values that a limit counts at one time (max_values), and the counters of a project
// and its tokens in memory. Where they are reached, calls with further values are refused, and all others go on.
//
// Plain code: the time is an argument, and nothing here does I/O. The limiter's mu guards all of it.
package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// max_values, the values that a limit with for_each counts at one time.
const (
	defaultMaxValues = 10_000
	maxStoredValues  = 1_000_000
	maxBucketValues  = 10_000 // where all counters are in memory
)

// parseForEach checks for_each, and reads the JSON text of max_values; "" is the default.
func (l *limit) parseForEach(isSet bool, maxValues string) error {
	switch {
	case !isSet:
		return &fieldError{"max_values", "is for limits with for_each only"}
	case !isAttribute(l.forEach):
		return &fieldError{"for_each", "must be end_user, session or tag:KEY, with a key such as team"}
	case l.forEach == sessionAttribute && l.period == perLifetime:
		return &fieldError{"for_each", "must not be session with lifetime: sessions never end, so their counts would " +
			"be kept for ever. Choose month"}
	}
	highest := int64(maxStoredValues)
	if !l.isWindow() {
		highest = maxBucketValues
	}
	l.maxValues = defaultMaxValues
	if maxValues != "" {
		var err error
		if l.maxValues, err = strconv.ParseInt(maxValues, 10, 64); err != nil || l.maxValues < 1 ||
			l.maxValues > highest {
			return &fieldError{"max_values", fmt.Sprintf("must be a whole number from 1 to %d", highest)}
		}
	}
	rule, err := json.Marshal(limitRule{ForEach: l.forEach, Count: l.metric.String(), Per: l.period.String(),
		Endpoint: l.endpoint, Model: l.model})
	l.rule = string(rule)
	return err
}

// describeForEach says in words what a limit counts by itself: "for each end user".
func describeForEach(attribute string) string {
	if key, isTag := strings.CutPrefix(attribute, tagAttribute); isTag {
		return "for each value of the tag " + key
	}
	return "for each " + strings.ReplaceAll(attribute, "_", " ")
}

// forValue names the call's own value in a limit with for_each: ` for "alice"`.
func (v *limitViolation) forValue() string {
	switch key, isTag := strings.CutPrefix(v.limit.forEach, tagAttribute); {
	case v.limit.forEach == "":
		return ""
	case v.value != "":
		return fmt.Sprintf(" for %q", clip(v.value, 64))
	case isTag:
		return " for calls without the tag " + key
	case v.limit.forEach == endUserAttribute:
		return " for calls without an end user"
	}
	return " for calls without a session"
}

// describeNoCounter says why a call's value cannot be counted.
func (v *limitViolation) describeNoCounter() string {
	if v.memoryFull {
		return " cannot count one more value now: as many as fit into memory are in use."
	}
	return " counts " + pluralize(v.limit.maxValues, "value", "values") + " at most, and this call has one more. " +
		"An administrator can raise its max_values."
}

// A valueGroup has the counters of a limit with for_each.
type valueGroup struct {
	memory   *valueMemory
	own      *limitCounter            // the limit's, whose window is that of all counters
	ofToken  bool                     // the limit is a token's, not the project's
	counters map[string]*limitCounter // by value, those in memory
	// The values that count toward max_values: those with use in the store, or on the way there, and the others, which
	// are in memory.
	stored, unstored int64
	lease            *lease // whose owner the leases of the values have; nil: they need none
	reading          map[string]*valueRead
	sweptAt          int64
}

// A valueState is what a counter of a group has beside its count.
type valueState struct {
	group      *valueGroup
	name       string
	running    int    // calls that refer to the counter
	stored     bool   // the store has use of this window, or gets it
	recorded   uint64 // the ledger's position of the last use: what is in memory only before that is committed
	idleSince  int64
	prev, next *limitCounter // in memory.idle, while no call refers to it
}

// A valueRead is a value whose use is being read from the store, without the limiter's lock.
type valueRead struct {
	readers int
	stale   bool // what is read may lack later use
}

// A valueMemory bounds the counters of all groups of a project and its tokens.
type valueMemory struct {
	count    int
	capacity int // 0: defaultValueCapacity
	idle     [3]idleCounters
}

// idleCounters are counters that no call refers to, those that were idle for longest first. Each list has one kind, so
// that its first can be dropped first: buckets per second, per minute, and all others.
type idleCounters struct{ first, last *limitCounter }

const (
	defaultValueCapacity = 20_000 // counters: about 8 MB
	valueSweepInterval   = 100    // milliseconds between searches for a counter that can be dropped, if there was none
)

// forCall returns the counter in which a call counts: c, or in a group that of the call's value. It is nil if that is
// not in memory.
func (c *limitCounter) forCall(e *estimate) *limitCounter { return c.forValueOf(e.attribution) }

func (c *limitCounter) forValueOf(a *attribution) *limitCounter {
	if c.group == nil {
		return c
	}
	return c.group.counters[a.value(c.limit.forEach)]
}

// valueCount returns how many values count toward max_values.
func (g *valueGroup) valueCount() int64 { return g.stored + g.unstored }

// insert adds the counter of a value, with its use in the window. stored says that the store has a row of it.
func (g *valueGroup) insert(name string, used int64, stored bool) *limitCounter {
	own := g.own
	c := &limitCounter{limit: own.limit, windowStart: own.windowStart, windowEnd: own.windowEnd, used: used,
		value: &valueState{group: g, name: name, stored: stored}}
	if own.limit.monitorOnly { // it may be stored for an enforced limit that counts the same
		c.used = min(used, own.limit.max)
	}
	if g.lease != nil {
		c.lease = g.lease.limiter.newLease(g.lease.owner, own.limit, name, 0)
		c.lease.base, c.lease.hasBase, c.used = c.used, true, 0
	}
	if !stored {
		g.unstored++
	}
	g.counters[name] = c
	g.memory.count++
	g.memory.idleFor(c).append(c)
	return c
}

// add is insert for a value that a client names: if there is room. committed is the ledger's committed position.
func (g *valueGroup) add(name string, used int64, stored bool, now int64, committed uint64) {
	if g.counters[name] == nil && (stored || g.hasCapacity(now, committed)) && g.memory.makeSpace(now, committed) {
		g.insert(name, used, stored).value.idleSince = now
	}
}

// hasCapacity reports whether one more value may count. If not, it drops the counters that count nothing.
func (g *valueGroup) hasCapacity(now int64, committed uint64) bool {
	full := func() bool { return g.valueCount() >= g.own.limit.maxValues }
	if full() && (now < g.sweptAt || now-g.sweptAt >= valueSweepInterval) {
		for _, c := range g.counters {
			if !c.value.stored && c.canDrop(now, committed) {
				g.drop(c)
			}
		}
		if full() {
			g.sweptAt = now
		}
	}
	return !full()
}

// noCounterViolation returns the violation of a call whose value has no counter, because there was no room.
func (g *valueGroup) noCounterViolation(e *estimate, now int64) *limitViolation {
	l := g.own.limit
	v := &limitViolation{limit: l, value: e.attribution.value(l.forEach), noCounter: true, wait: 1000,
		memoryFull: g.valueCount() < l.maxValues}
	if l.isWindow() && !v.memoryFull {
		v.permanent = l.period == perLifetime
		v.wait = max(1, g.own.windowEnd-now)
	}
	return v
}

// canDrop reports whether the state of a counter is also elsewhere, or none at all.
func (c *limitCounter) canDrop(now int64, committed uint64) bool {
	if c.value.running > 0 {
		return false
	}
	if c.advance(now); c.lease != nil {
		return !c.lease.active && c.value.recorded <= committed
	}
	if c.limit.isWindow() {
		return c.value.recorded <= committed
	}
	return c.used == 0
}

// drop removes a counter that no call refers to.
func (g *valueGroup) drop(c *limitCounter) {
	if c.lease != nil { // another counter of the value may report to the account from now on
		c.lease.keeper.retire(c)
	}
	g.memory.idleFor(c).remove(c)
	g.memory.count--
	if g.counters[c.value.name] != c {
		return
	}
	delete(g.counters, c.value.name)
	if !c.value.stored {
		g.unstored--
	}
	g.markStale(c.value.name)
}

// A missingValue is a value of a call whose counter is not in memory.
type missingValue struct {
	group       *valueGroup
	name        string
	rule        string // "": nothing is stored of it
	windowStart int64
	used        int64 // what the store has
	stored      bool  // the store has anything
}

// missingValues returns the values of a call whose counters are not in memory. The caller holds mu.
func (l *limiter) missingValues(token *limitScope, e *estimate, now int64) (out []missingValue) {
	for _, s := range [...]*limitScope{&l.project, token} {
		if !s.forEach {
			continue
		}
		for _, own := range s.counters {
			if own.group == nil || !own.limit.applies(e.endpoint, e.pattern, e.model) {
				continue
			}
			if own.advance(now); own.forCall(e) != nil {
				continue
			}
			name := e.attribution.value(own.limit.forEach)
			m := missingValue{group: own.group, name: name, windowStart: own.windowStart}
			if own.limit.isWindow() {
				m.rule = own.limit.rule
			}
			out = append(out, m)
		}
	}
	return out
}

// beginRead notes that the use of a value is being read.
func (g *valueGroup) beginRead(name string) {
	r := g.reading[name]
	if r == nil {
		if g.reading == nil {
			g.reading = map[string]*valueRead{}
		}
		r = &valueRead{}
		g.reading[name] = r
	}
	r.readers++
}

// endRead ends that, and reports whether what was read is still all that the value has used.
func (g *valueGroup) endRead(name string) (fresh bool) {
	r := g.reading[name]
	if r.readers--; r.readers == 0 {
		delete(g.reading, name)
	}
	return !r.stale
}

// markStale makes those who are reading a value's use read it again.
func (g *valueGroup) markStale(name string) {
	if r := g.reading[name]; r != nil {
		r.stale = true
	}
}

// beginWindow forgets what belongs to the window that has ended.
func (g *valueGroup) beginWindow(now int64) {
	for _, c := range g.counters {
		if c.value.running == 0 {
			g.drop(c)
		}
	}
	for _, c := range g.counters {
		c.advance(now)
		c.value.stored = false
	}
	g.stored, g.unstored = 0, int64(len(g.counters))
	for _, r := range g.reading {
		r.stale = true
	}
}

// acquire keeps a counter in memory for a call that reserves in it.
func (g *valueGroup) acquire(c *limitCounter) {
	if c.value.running++; c.value.running == 1 {
		g.memory.idleFor(c).remove(c)
	}
}

// release ends that.
func (g *valueGroup) release(c *limitCounter, now int64) {
	if c.value.running--; c.value.running == 0 {
		c.value.idleSince = now
		g.memory.idleFor(c).append(c)
	}
}

// appendUse appends what the call of e used to uses. A limit that was removed and set again counts a call once.
func (e *reservationEntry) appendUse(uses []limitUse, usage finalUsage) []limitUse {
	c := e.counter
	n := int64(0)
	if c.value != nil && c.limit.isWindow() {
		n = e.used(usage)
	}
	if n == 0 {
		return uses
	}
	if v := c.value; !v.stored {
		v.stored = true
		v.group.unstored--
		v.group.stored++
	}
	u := limitUse{ofToken: c.value.group.ofToken, rule: c.limit.rule, value: c.value.name, amount: n,
		windowStart: c.windowStart, windowEnd: c.windowEnd}
	for _, o := range uses {
		if o.ofToken == u.ofToken && o.rule == u.rule && o.value == u.value {
			return uses
		}
	}
	if u.windowEnd == 0 {
		u.windowEnd = endOfTime
	}
	return append(uses, u)
}

// idleFor returns the list for a counter.
func (m *valueMemory) idleFor(c *limitCounter) *idleCounters {
	switch c.limit.period {
	case perSecond:
		return &m.idle[0]
	case perMinute:
		return &m.idle[1]
	}
	return &m.idle[2]
}

// makeSpace reports whether there is room for one more counter. If there is not, it drops those that were idle for
// longest.
func (m *valueMemory) makeSpace(now int64, committed uint64) bool {
	capacity := m.capacity
	if capacity == 0 {
		capacity = defaultValueCapacity
	}
	for i := range m.idle {
		for c := m.idle[i].first; m.count >= capacity && c != nil && c.canDrop(now, committed); c = m.idle[i].first {
			c.value.group.drop(c)
		}
	}
	return m.count < capacity
}

// dropIdle drops the counters that were idle since before.
func (m *valueMemory) dropIdle(before, now int64, committed uint64) {
	for i := range m.idle {
		list := &m.idle[i]
		for c := list.first; c != nil && c.value.idleSince < before && c.canDrop(now, committed); c = list.first {
			c.value.group.drop(c)
		}
	}
}

func (l *idleCounters) append(c *limitCounter) {
	if c.value.prev = l.last; l.last != nil {
		l.last.value.next = c
	} else {
		l.first = c
	}
	l.last = c
}

func (l *idleCounters) remove(c *limitCounter) {
	v := c.value
	if v.prev != nil {
		v.prev.value.next = v.next
	} else {
		l.first = v.next
	}
	if v.next != nil {
		v.next.value.prev = v.prev
	} else {
		l.last = v.prev
	}
	v.prev, v.next = nil, nil
}

// appendLimitUses appends what a call of whose reservation nothing is left counts in limits with for_each: one that was
// lost with the process, or with usageOf, how much more it has used than was reserved.
func (r *requestRow) appendLimitUses(uses []limitUse, limits []limit, ofToken bool) []limitUse {
	_, pattern, _ := strings.Cut(r.endpoint, " ")
	usage := r.limitUsage()
	for i := range limits {
		l := &limits[i]
		if l.forEach == "" || !l.isWindow() || !l.applies(r.endpoint, pattern, r.requestedModel) {
			continue
		}
		n := usage.value(l.metric)
		switch {
		case r.usageOf != 0:
			n = r.lateUse(l.metric)
		case l.metric == metricRequests && usage.forwarded:
			n = 1
		}
		if n == 0 {
			continue
		}
		u := limitUse{ofToken: ofToken, rule: l.rule, value: r.attribution.value(l.forEach), amount: n}
		if u.windowStart, u.windowEnd = l.period.window(r.started); u.windowEnd == 0 {
			u.windowEnd = endOfTime
		}
		uses = append(uses, u)
	}
	return uses
}

// endOfTime is when the window of a lifetime ends, in unix milliseconds.
const endOfTime = 9_000_000_000_000_000

// A pastUse is what was used in the windows around now, for the counters of new limits. Of limits with for_each it has
// the number of values, and the use of those that running calls have.
type pastUse struct {
	used   map[limitKey]int64
	values map[limitKey]map[string]int64
	before map[limitKey]map[string]int64 // like values, of those that the limit has not counted yet
	counts map[limitKey]int64
}

// setPolicy replaces the counters of s by those of p's limits. A limit that counts the same as before keeps its
// counter. Any other starts with its past use, and the running calls count, too. The caller holds mu.
func (l *limiter) setPolicy(s *limitScope, p *policy, ofToken bool, now int64, past *pastUse) {
	old, addedAfter := s.counters, s.addedAfter()
	s.policy, s.counters, s.forEach = p, make([]*limitCounter, 0, len(p.Limits)), false
	for i := range p.Limits {
		lim := &p.Limits[i]
		c := counterFor(old, lim)
		if c == nil {
			c = newLimitCounter(lim, now, past.used[lim.key()])
			if lim.monitorOnly { // past includes the calls that it would have refused
				c.used = min(c.used, lim.max*c.scale())
			}
			if lim.forEach != "" {
				c.group = &valueGroup{memory: &l.values, own: c, ofToken: ofToken, stored: past.counts[lim.key()],
					counters: map[string]*limitCounter{}}
			}
			if l.leases != nil {
				c.setLease(l.newLease(s.owner, lim, "", addedAfter), now)
			}
			if c.lease == nil || !lim.isWindow() { // otherwise they are in what the account begins with
				l.countRunning(s, c, past.values[lim.key()], past.before[lim.key()])
			}
		} else {
			c.advance(now)
			c.setLimit(lim, s.owner.version)
		}
		s.counters, s.forEach = append(s.counters, c), s.forEach || lim.forEach != ""
	}
	l.retireLeases(old, s.counters)
}

// setLimit replaces the limit by one that counts the same.
func (c *limitCounter) setLimit(l *limit, version int64) {
	if c.lease != nil {
		c.changeLimit(l, version)
	}
	c.limit = l
	if c.group != nil {
		if c.group.lease != nil {
			c.group.lease.owner.version = version
		}
		for _, v := range c.group.counters {
			v.setLimit(l, version)
		}
	}
}

// A valueQuery says which values of limits with for_each a report has: those that have used most, or a single one.
type valueQuery struct {
	top   int
	names []string // of the single one: a value may be recorded by a hash of it, too
}

// single reports whether a single value is asked for.
func (q *valueQuery) single() bool { return len(q.names) > 0 }

// A countedValue is what a value has used, in the limit's unit.
type countedValue struct {
	name           string
	used, reserved int64 // of concurrent calls, reserved are the running ones
}

func (c *limitCounter) countedValue() countedValue {
	v := countedValue{used: c.unscaledUse(), reserved: c.reserved}
	if c.lease != nil && c.limit.metric == metricConcurrent {
		v.used, v.reserved = 0, addSat(c.reserved, c.lease.others)
	}
	if c.value != nil {
		v.name = c.value.name
	}
	return v
}

// countedValues returns what the values in memory that q asks for have used.
func (g *valueGroup) countedValues(q valueQuery, now int64) (out []countedValue) {
	for name, c := range g.counters {
		if slices.Contains(q.names, name) || !q.single() && q.top > 0 {
			c.advance(now)
			out = append(out, c.countedValue())
		}
	}
	return out
}

// viewValue shows what a value, or a limit that has no values, has used.
func (l *limit) viewValue(v countedValue) valueView {
	left := max(0, addSat(l.max-v.reserved, -v.used))
	if l.metric == metricConcurrent { // running calls are in use, not reserved
		v.used, v.reserved = v.reserved, v.used
	}
	return valueView{
		Value: v.name, Used: l.valueJSON(v.used), Reserved: l.valueJSON(v.reserved), Left: l.valueJSON(left),
	}
}

// topValues returns the values that have used most, of those in memory and those in the store. A value that is in both
// has used what memory says.
func topValues(inMemory []countedValue, stored []valueUse, top int) []countedValue {
	known := map[string]bool{}
	for i := range inMemory {
		known[inMemory[i].name] = true
	}
	all := inMemory
	for _, u := range stored {
		if !known[u.value] {
			all = append(all, countedValue{name: u.value, used: u.used})
		}
	}
	slices.SortFunc(all, func(a, b countedValue) int {
		return cmp.Or(cmp.Compare(addSat(b.used, b.reserved), addSat(a.used, a.reserved)), cmp.Compare(a.name, b.name))
	})
	return all[:min(len(all), top)]
}

// forget drops the counters of a value. Those that running calls refer to begin anew. The caller holds mu.
func (l *limiter) forget(attribute, value string) {
	matches := func(c *limitCounter) bool {
		return c.value != nil && c.value.name == value && c.limit.forEach == attribute
	}
	for i := range l.values.idle {
		for c := l.values.idle[i].first; c != nil; {
			next := c.value.next
			if matches(c) {
				if g := c.value.group; c.value.stored {
					g.stored, g.unstored, c.value.stored = g.stored-1, g.unstored+1, false
				}
				c.value.group.drop(c)
			}
			c = next
		}
	}
	eachEntry := func(do func(e *reservationEntry)) {
		for r := l.running; r != nil; r = r.next {
			for i := range r.entries {
				if c := r.entries[i].counter; matches(c) && c.limit.isWindow() {
					do(&r.entries[i])
				}
			}
		}
	}
	eachEntry(func(e *reservationEntry) {
		if e.counter.used = 0; e.counter.lease != nil {
			e.counter.lease.forget()
		}
	})
	eachEntry(func(e *reservationEntry) { // what it has used so far, as settle will correct it
		n := e.spent
		if e.counter.limit.metric == metricRequests {
			n = e.quantity
		}
		e.counter.used = addSat(e.counter.used, n)
	})
}

// dropIdleValues drops the counters of values that were not used for a while.
func (ls *limitState) dropIdleValues(now int64) {
	committed := ls.ledger.committedSoFar()
	for _, p := range ls.registry.liveProjects() {
		p.limiter.mu.Lock()
		p.limiter.values.dropIdle(now-evictAfter.Milliseconds(), now, committed)
		p.limiter.mu.Unlock()
	}
}

// A limitView is the current state of a limit in JSON.
type limitView struct {
	Count       string          `json:"count"`
	Max         json.RawMessage `json:"max"`
	Per         string          `json:"per,omitempty"`
	Endpoint    string          `json:"endpoint,omitempty"`
	Model       string          `json:"model,omitempty"`
	Shadow      bool            `json:"shadow"`
	Used        json.RawMessage `json:"used"`
	Reserved    json.RawMessage `json:"reserved"` // by running calls
	Left        json.RawMessage `json:"left"`
	ResetsAt    *timestamp      `json:"resets_at"`    // null: never, or when running calls end
	WouldRefuse int64           `json:"would_refuse"` // calls since the limit was loaded
	// Of a limit with for_each, whose Used, Reserved and Left are null: each value has its own.
	ForEach    string      `json:"for_each,omitempty"`
	MaxValues  int64       `json:"max_values,omitempty"`
	ValueCount *int64      `json:"value_count,omitempty"`
	Values     []valueView `json:"values,omitzero"` // only where they were asked for

	limit       *limit
	windowStart int64
	inMemory    []countedValue // until Values are made of them
}

// A valueView is what one value of a limit with for_each has used, in JSON.
type valueView struct {
	Value    string          `json:"value"` // "": the calls without one
	Used     json.RawMessage `json:"used"`
	Reserved json.RawMessage `json:"reserved"`
	Left     json.RawMessage `json:"left"`
}

// newLimitViews returns the state of limits. Of limits with for_each it has the counters in memory that q asks for.
func newLimitViews(counters []*limitCounter, q valueQuery, now int64) []limitView {
	out := make([]limitView, 0, len(counters))
	for _, c := range counters {
		c.advance(now)
		l := c.limit
		use := l.viewValue(c.countedValue())
		v := limitView{
			Count: l.metric.String(), Max: l.valueJSON(l.max), Per: l.period.String(),
			Endpoint: l.endpoint, Model: l.model, Shadow: l.monitorOnly,
			Used: use.Used, Reserved: use.Reserved, Left: use.Left, WouldRefuse: c.wouldRefuse,
			limit: l, windowStart: c.windowStart,
		}
		if c.group != nil {
			null := json.RawMessage("null")
			v.Used, v.Reserved, v.Left = null, null, null
			v.ForEach, v.MaxValues, v.ValueCount = l.forEach, l.maxValues, new(c.group.valueCount())
			v.inMemory = c.group.countedValues(q, now)
		}
		if at := c.resetTime(now); at > now {
			v.ResetsAt = new(timestamp(at))
		}
		out = append(out, v)
	}
	return out
}

// resetTime returns when the whole limit is available again without further calls, or 0 if that is unknown or
// never.
func (c *limitCounter) resetTime(now int64) int64 {
	switch {
	case c.group != nil && c.windowEnd == 0: // each value has its own
		return 0
	case c.limit.period.bucketMS() > 0 && c.lease != nil && c.limit.max > 0:
		return now + (c.totalUse()*c.limit.period.bucketMS()+c.limit.max-1)/c.limit.max
	case c.limit.period.bucketMS() > 0 && c.limit.max > 0:
		return now + (c.used+c.limit.max-1)/c.limit.max
	case c.windowEnd > 0:
		return c.windowEnd
	}
	return 0
}
