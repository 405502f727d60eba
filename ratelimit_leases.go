// This file lets several replicas share each limit exactly. A replica counts by itself, but a counter may only spend
// what it has leased from the limit's account in the database; a store without such accounts needs none of this. The
// file has the counter's side of that. Plain code: the time is an argument. The database's side is the function
// lease_sync in schema/postgres; ratelimit_keeper.go brings the two together.
//
// Why the sum over all replicas is exact. For each account, the database has base (what was used by replicas that have
// ended), and of each replica r: spent(r), what it has used by its own last report, and unspent(r), what it may use on
// top. A counter in memory has used(r) and reserved(r), and granted(r), which used + reserved may not exceed.
//
//	(1) base + sum of spent + sum of unspent <= max    the database adds to unspent only while this holds
//	(2) granted(r) <= spent(r) + unspent(r)            a counter admits a call only within granted
//	(3) used(r) + reserved(r) <= granted(r)
//
// So what all replicas have used and reserved is at most max. Each step keeps (1) to (3):
//
//   - A call is admitted if (3) holds afterwards. It changes nothing in the database.
//   - A report moves d = used - spent from unspent to spent: both sums stay. It also says how much the counter keeps.
//     To give some back, the counter lowers granted before it sends the report, never after: however long the report
//     takes, and if its answer is lost, (2) holds, because the database takes back no more than the counter has given
//     up.
//   - A grant raises unspent first, and granted when the answer arrives. If the answer is lost, the database counts
//     more than the counter may spend, until the next report says what it keeps.
//   - A report that arrives late must not overwrite a later one: each has a number, and the database takes them in
//     their order only.
//   - A replica that is closed can commit neither reports nor pending records, and a call in an exact limit is
//     forwarded only after its pending record is committed. So what it has used is fixed, and settleDead reads it from
//     the ledger before the rest of its lease is free.
//   - In another window, or after the account was made again (incarnation), spent, unspent, used and granted all start
//     at 0; what was reserved before counts no more.
//
// Tokens and dollars: used may exceed granted, as it may exceed max on one machine, because a call may use more than
// its estimate. Then nothing more is admitted. Buckets do not refill in memory: used and granted only grow, and the
// level in the database falls. What was spent reaches it late, so it is never too low. Concurrent calls are never
// spent: unspent is the number of slots that a replica has.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// refusalMemory is how long a limit that had nothing left is not asked again: calls that hammer it cost the
	// database nothing.
	refusalMemory = 75 // milliseconds
	// spareFor is how long a counter keeps a small spare after its last call, and spareShare how small: this part of
	// the limit. Clients that call now and then need no round trip either.
	spareFor   = 60_000 // milliseconds
	spareShare = 10_000
	// firstCalls is for how many calls a counter asks that has been used little so far.
	firstCalls = 16
	// recentSeconds is for how long a replica counts its use by the second in which calls began.
	recentSeconds = 5
	leaseReportMS = 2000 // what others need is known here after this time at the latest, if nothing else tells it
	maxLeaseUse   = 1_000_000_000_000_000_000
)

// A leaseOwner says whose limits these are: a token's, or with token 0 a project's. version is that of the row with the
// policy.
type leaseOwner struct{ project, token, version int64 }

// A lease is what a counter may spend of an account. The limiter's mu guards it.
type lease struct {
	keeper  *leaseKeeper
	limiter *limiter
	owner   leaseOwner
	account string // its name in the database; see newLease
	rule    string // what it counts, as JSON

	granted     int64 // what used and reserved may reach
	others      int64 // used by others, as of the last answer; of concurrent calls, those running elsewhere
	level       int64 // of a bucket, likewise, in units multiplied by its milliseconds
	levelAt     int64
	levelUsed   int64 // how much of used level includes
	free        int64 // left in the account, likewise
	incarnation int64 // of the account; 0: the counter has not joined it
	base        int64 // what was used before, for an account that does not exist yet
	hasBase     bool
	needsBase   bool // the database has asked for it
	loading     bool
	left        leftWindow
	// addedAfter is the version of the policy in use that lacked the limit. What an account of no later version has is
	// of an earlier time. 0: the limit was not added to a policy in use.
	addedAfter int64

	reported, reportedBusy int64 // used and reserved, as of the last report that was answered
	reportedVersion        int64
	taken, takenBefore     int64 // reserved since the last regular report, and in the interval before
	lastTaken, lastAt      int64 // how much the last call took, and when
	recent                 recentCalls
	refusedNeed            int64 // a call that needs so much was refused; it is not asked again before refusedUntil
	refusedUntil           int64
	refusedIn              int64 // the number of the exchange that said so
	unsettled              bool  // other replicas may still return what the last answer lacked
	joins                  int64
	active, recalled       bool // it is in the keeper's list; another replica needs what it does not use
	retired                bool // the limit is gone
	token                  *liveToken
}

// A leftWindow is what a counter had used in the window before.
type leftWindow struct{ start, incarnation, used, reported int64 }

// A recentCalls has how many requests were counted of calls that began in each of the last seconds.
type recentCalls [8]struct{ second, count int64 }

func (r *recentCalls) add(began, n int64) {
	second := began / 1000
	switch s := &r[second&7]; {
	case s.second == second:
		s.count = max(0, s.count+n)
	case s.second < second && n > 0:
		s.second, s.count = second, n
	}
}

// since returns the number of those that began at from or later.
func (r *recentCalls) since(from int64) (n int64) {
	for i := range r {
		if r[i].second >= from/1000 {
			n += r[i].count
		}
	}
	return n
}

// newLease returns the lease of a new counter. value is that of a limit with for_each. The account's name reveals
// neither the rule nor the value, and has a fixed length. addedAfter is as in lease.
func (l *limiter) newLease(owner leaseOwner, lim *limit, value string, addedAfter int64) *lease {
	rule := leaseRule(lim)
	return &lease{keeper: l.leases, limiter: l, owner: owner, rule: rule, addedAfter: addedAfter,
		account: accountName(owner, rule, value)}
}

// setLease makes the counter, or those of its values, spend leases. If the keeper still has a counter with the same
// account, of a token that was evicted meanwhile, the new one goes on with its state.
func (c *limitCounter) setLease(g *lease, now int64) {
	if c.group != nil {
		c.group.lease = g
		return
	}
	c.lease = g
	if old := g.keeper.replace(c); old != nil {
		old.advance(now)
		old.lease.token, old.lease.owner = g.token, g.owner
		c.lease, c.used, c.reserved, c.generation = old.lease, old.used, old.reserved, old.generation
		c.windowStart, c.windowEnd = old.windowStart, old.windowEnd
	}
}

// setOwner says whose limits the next policy has.
func (s *limitScope) setOwner(owner leaseOwner) { s.lastVersion, s.owner = s.owner.version, owner }

// addedAfter is lease.addedAfter for the limits that the next policy adds.
func (s *limitScope) addedAfter() int64 {
	if s.policy == nil {
		return 0
	}
	return s.lastVersion
}

// retireLeases forgets the leases of counters that are not among those that stay.
func (l *limiter) retireLeases(old, stay []*limitCounter) {
	for _, c := range old {
		if l.leases == nil || slices.Contains(stay, c) {
			continue
		}
		l.leases.retire(c)
		if c.group != nil {
			for _, v := range c.group.counters {
				l.leases.retire(v)
			}
		}
	}
}

// forgetRefusals makes calls ask again, because something may be free.
func (s *limitScope) forgetRefusals() {
	for _, c := range s.counters {
		if c.lease != nil {
			c.lease.refusedUntil = 0
		}
		if c.group != nil {
			for _, v := range c.group.counters {
				v.lease.refusedUntil = 0
			}
		}
	}
}

// accountName returns the name of an account.
func accountName(owner leaseOwner, rule, value string) string {
	sum := sha256.Sum256([]byte(rule + value)) // a rule is an object in JSON
	scope := "p" + strconv.FormatInt(owner.project, 10)
	if owner.token != 0 {
		scope = "t" + strconv.FormatInt(owner.token, 10)
	}
	return scope + "/" + base64.RawURLEncoding.EncodeToString(sum[:18])
}

// lifetimeRule is the rule of a token's max_requests.
const lifetimeRule = `{"count":"requests","of":"max_requests"}`

// leaseRule says in JSON what a limit counts.
func leaseRule(l *limit) string {
	text, _ := json.Marshal(leaseRuleJSON{ForEach: l.forEach, Shadow: l.monitorOnly, Count: l.metric.String(),
		Per: l.period.String(), Endpoint: l.endpoint, Model: l.model}) // it cannot fail
	return string(text)
}

type leaseRuleJSON struct {
	ForEach  string `json:"for_each,omitzero"`
	Shadow   bool   `json:"shadow,omitzero"`
	Count    string `json:"count"`
	Per      string `json:"per,omitzero"`
	Endpoint string `json:"endpoint,omitzero"`
	Model    string `json:"model,omitzero"`
}

// leaseKind returns how the database counts a limit.
func leaseKind(l *limit) int64 {
	switch {
	case l.metric == metricConcurrent:
		return leaseOfSlots
	case l.period.bucketMS() > 0:
		return leaseOfBucket
	}
	return leaseOfWindow
}

// unused returns how much of the lease no call has taken.
func (c *limitCounter) unused() int64 { return max(0, c.lease.granted-addSat(c.used, c.reserved)) }

// totalUse returns what all replicas have used, in requests, tokens or nano-dollars, as far as it is known here.
func (c *limitCounter) totalUse() int64 {
	g := c.lease
	b := c.limit.period.bucketMS()
	if b == 0 {
		return max(0, addSat(g.others, c.used))
	}
	passed := min(max(0, c.windowStart-g.levelAt), 2*b)
	level := max(0, g.level-passed*c.limit.max)
	return max(0, addSat((level+b-1)/b, c.used-g.levelUsed))
}

// leaseWait returns how many milliseconds it takes until a bucket may have need again.
func (c *limitCounter) leaseWait(now, need int64) int64 {
	b := c.limit.period.bucketMS()
	missing := max(0, need-c.lease.free-c.unused()) // free is below 0 after a call has used more than its estimate
	return max(1, (missing*b+c.limit.max-1)/c.limit.max-max(0, now-c.lease.levelAt))
}

// minUse is the least that used can be. Usage that turns out lower than it was reserved may belong to what is reported.
func (c *limitCounter) minUse() int64 {
	if c.lease != nil {
		return -maxLeaseUse
	}
	return 0
}

// maxDebt is the most that a bucket's used can be: one period more than the limit, of which others have used a part.
func (c *limitCounter) maxDebt() int64 {
	if g := c.lease; g != nil {
		return max(g.granted, addSat(g.levelUsed, 2*c.limit.max-g.level/c.limit.period.bucketMS()))
	}
	return 2 * c.limit.max * c.scale()
}

// take notes that a call has taken a quantity, which is already counted in used or reserved.
func (c *limitCounter) take(r *reservation, quantity, now int64) {
	g := c.lease
	g.taken, g.lastTaken, g.lastAt = addSat(g.taken, quantity), quantity, now
	if c.limit.metric == metricRequests {
		g.recent.add(r.began, 1)
	}
	g.keeper.touch(c)
}

// untake notes that a call has ended. counted says that it counts as a request.
func (c *limitCounter) untake(r *reservation, counted bool) {
	if c.limit.metric == metricRequests && !counted {
		c.lease.recent.add(r.began, -1)
	}
	c.lease.refusedUntil = 0 // something may be free again
	c.lease.keeper.touch(c)
}

// settleLeasedBucket is settle for a bucket: what the call has not used is returned, unless it may have refilled
// already in the time since it was reserved.
func (e *reservationEntry) settleLeasedBucket(used, elapsed int64) {
	c, b := e.counter, e.counter.limit.period.bucketMS()
	if used < e.quantity {
		refilled := (min(max(0, elapsed), 2*b)*c.limit.max + b - 1) / b
		c.used -= min(e.quantity-used, max(0, e.quantity-refilled))
		return
	}
	c.used = max(c.used, min(addSat(c.used, used-e.quantity), c.maxDebt()))
}

// changeWindow makes the counter join its account anew, in the window around a time. If a clock was wrong, that may be
// the window from which it came: then it goes on with what it had used there, and reports that.
func (c *limitCounter) changeWindow(at int64) {
	g := c.lease
	if g.incarnation != 0 {
		g.left = leftWindow{c.windowStart, g.incarnation, c.used, g.reported}
	}
	g.forget()
	g.others, g.free, g.refusedUntil, g.hasBase = 0, 0, 0, false
	c.generation++
	c.used, c.reserved = 0, 0
	if c.windowStart, c.windowEnd = c.limit.period.window(at); c.windowStart == g.left.start {
		g.incarnation, c.used, g.granted, g.reported = g.left.incarnation, g.left.used, g.left.used, g.left.reported
	}
}

// forget makes the counter join its account anew. What it counts until then is added to that.
func (g *lease) forget() {
	g.granted, g.incarnation, g.reported, g.reportedBusy, g.base, g.hasBase = 0, 0, 0, 0, 0, true
	g.joins++
}

// changeLimit applies another maximum. What is not taken is given up, so that no call is admitted by the old one.
func (c *limitCounter) changeLimit(l *limit, version int64) {
	if l.max < c.limit.max {
		c.lease.granted = min(c.lease.granted, addSat(c.used, c.reserved))
	}
	c.lease.owner.version, c.lease.refusedUntil = max(c.lease.owner.version, version), 0
	c.lease.keeper.touch(c)
}

// wanted returns how much the counter should have beyond what is taken: as much as it took in the last second.
func (c *limitCounter) wanted(now int64) int64 {
	g := c.lease
	n := addSat(g.taken, g.takenBefore)
	if c.limit.metric == metricConcurrent {
		n = (n + 1) / 2 // slots come back
	}
	spare := min(mulSat(firstCalls, g.lastTaken), c.limit.max/spareShare)
	if spare >= g.lastTaken && now-g.lastAt < spareFor && c.value == nil {
		n = max(n, spare)
	}
	return min(n, c.limit.max)
}

// leaseItem returns what the counter reports and asks for, and whether that is anything. regular says that it is the
// report of an interval; ask is for calls that wait, nil if there are none.
func (c *limitCounter) leaseItem(now int64, regular bool, ask *leaseAsk, recentFrom int64) (leaseItem, bool) {
	g := c.lease
	c.advance(now)
	wanted, unused := c.wanted(now), c.unused()
	kept := min(unused, wanted)
	item := leaseItem{Account: g.account, Project: g.owner.project, Token: g.owner.token, Rule: g.rule,
		Kind: leaseKind(c.limit), PeriodMS: c.limit.period.bucketMS(), Version: g.owner.version, Max: c.limit.max,
		WindowStart: c.windowStart, WindowEnd: c.windowEnd, Incarnation: g.incarnation, Added: g.addedAfter > 0,
		Spent: min(max(c.used, -maxLeaseUse), maxLeaseUse), Busy: c.reserved, RecentFrom: recentFrom, joins: g.joins}
	if item.Added { // other replicas may have joined in the meantime, with any version since
		item.Version = g.addedAfter + 1
	}
	if item.Kind == leaseOfWindow && item.WindowEnd == 0 {
		item.WindowEnd = endOfTime
	} else if item.Kind != leaseOfWindow {
		item.WindowStart, item.WindowEnd = 0, now+dayMS
	}
	if g.hasBase {
		item.Base = new(g.base)
	}
	if c.limit.metric == metricRequests {
		item.Recent = g.recent.since(recentFrom)
	}
	switch {
	case ask != nil && ask.need > unused:
		// What is there stays for calls that have been waiting for it. If it is too little for any, it goes back, so
		// that two replicas do not wait for each other with a part of what each of them needs.
		if kept = unused; unused < ask.least {
			kept = 0
		}
		item.Least, item.Need, item.Asked = min(ask.least, ask.need-kept), ask.need-kept, ask.repeated
		item.Want = max(mulSat(2, wanted), mulSat(firstCalls, ask.need))
	case ask != nil && ask.need > 0:
		kept, ask = unused, nil
	case g.recalled:
		kept = 0
	case regular:
		item.Want = wanted - kept
	}
	changed := ask != nil || g.recalled || now-g.levelAt > leaseReportMS || kept < unused || item.Want > 0 ||
		g.incarnation == 0 || item.Spent != g.reported || item.Busy != g.reportedBusy ||
		item.Version != g.reportedVersion
	g.recalled = false
	item.Keep = addSat(c.reserved, kept)
	g.granted = min(g.granted, addSat(c.used, item.Keep))
	if regular {
		g.takenBefore, g.taken = g.taken, 0
	}
	return item, changed
}

// applyLease applies the database's answer to item, in the exchange with this number.
func (c *limitCounter) applyLease(item *leaseItem, r *leaseReply, now, number int64) {
	g := c.lease
	if item.joins != g.joins || item.Kind == leaseOfWindow && item.WindowStart != c.windowStart {
		return // the counter was reset meanwhile
	}
	switch r.status {
	case leaseNeedsBase:
		g.needsBase = true
		return
	case leaseWindowOver: // other replicas count in a later one
		if r.windowStart > c.windowStart {
			c.changeWindow(r.windowStart)
		}
		return
	case leaseWindowEarly:
		if now < c.windowStart {
			c.changeWindow(now)
		}
		return
	}
	if item.Incarnation != r.incarnation { // the counter joins the account
		if item.Incarnation != 0 {
			c.used = 0
		}
		if item.Incarnation != 0 && item.Kind == leaseOfWindow {
			c.reserved = 0
			c.generation++
		}
		c.used = addSat(c.used, r.spent)
	}
	g.incarnation, g.addedAfter, g.hasBase, g.needsBase = r.incarnation, 0, false, false
	g.granted, g.reported, g.reportedBusy = addSat(r.spent, r.unspent), r.spent, item.Busy
	if item.Max > c.limit.max { // it was lowered meanwhile: see changeLimit
		g.granted = min(g.granted, addSat(c.used, c.reserved))
	}
	g.reportedVersion = item.Version
	g.others, g.free, g.level, g.levelAt, g.levelUsed = r.others, r.free, r.level, now, r.spent
	g.refusedUntil, g.unsettled = 0, false
	if item.Least > addSat(max(0, r.free), c.unused()) {
		if g.unsettled = !r.settled; r.settled {
			g.refusedNeed, g.refusedUntil, g.refusedIn = item.Least, now+refusalMemory, number
		}
	}
	if g.token != nil {
		g.token.used.Store(c.totalUse())
	}
	if r.recalled {
		g.recalled = true
	}
}

// isIdle reports whether the database has everything that the counter has used, and the counter keeps nothing. Slots of
// running calls are kept: when other replicas need them, they must hear from this one that they are in use.
func (c *limitCounter) isIdle() bool {
	g := c.lease
	return c.unused() == 0 && c.used == g.reported && c.reserved == 0 && g.reportedBusy == 0 &&
		g.owner.version == g.reportedVersion && g.taken == 0 && g.takenBefore == 0
}

// A leaseAsk is what calls that wait need of a counter.
type leaseAsk struct {
	least, need int64 // of the one that needs least, and of all
	repeated    bool  // all of them have asked before
}

// lackingLeases returns the counters whose leases the call would exceed, and what it needs of each; none if a limit
// refuses the call anyway. clock is the time now; the call counts at now, and asked is the number of the exchange in
// which it has asked last, or 0. The caller holds mu.
func (l *limiter) lackingLeases(token *limitScope, e *estimate, now, clock, asked int64,
) (out []*limitCounter, needs []int64) {
	refused := false
	check := func(c *limitCounter, need int64) {
		if c == nil || c.lease == nil || need == 0 {
			return
		}
		if c.advance(now); c.shortfall(need) == 0 {
			return
		}
		g := c.lease
		hopeless := need > c.limit.max || e.exceedsMax(c.limit) ||
			need >= g.refusedNeed && (clock < g.refusedUntil || asked > 0 && g.refusedIn >= asked)
		if refused = refused || hopeless && !c.limit.monitorOnly; !hopeless {
			out, needs = append(out, c), append(needs, need)
		}
	}
	r := reservation{estimate: *e}
	for _, s := range [...]*limitScope{&l.project, token} {
		for _, own := range s.counters {
			if need := r.quantityIn(own.limit); need > 0 {
				own.advance(now)
				check(own.forCall(e), need)
			}
		}
	}
	check(token.lifetime, 1)
	if refused {
		return nil, nil
	}
	return out, needs
}

// reserveLifetime reserves a call in the token's max_requests. The caller holds mu.
func (l *limiter) reserveLifetime(r *reservation, s *limitScope, now int64) bool {
	c := s.lifetime
	if c == nil {
		return true
	}
	if c.shortfall(1) > 0 {
		return false
	}
	r.entries = append(r.entries, reservationEntry{counter: c, generation: c.generation, quantity: 1})
	r.entries[len(r.entries)-1].apply()
	c.take(r, 1, now)
	return true
}

// reserve counts one call against the token's lifetime limit; a negative limit means none. If the limit is reached,
// reserve returns false and counts nothing. Parallel calls never exceed the limit. The caller holds the limiter's mu.
func (t *liveToken) reserve(r *reservation, limit, now int64) bool {
	if t.limits.lifetime != nil {
		if !t.project.limiter.reserveLifetime(r, &t.limits, now) {
			return false
		}
		limit = -1 // used is what others are shown
	}
	for {
		n := t.used.Load()
		if limit >= 0 && n >= limit {
			return false
		}
		if t.used.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// refund returns a reserved call that was never forwarded.
func (t *liveToken) refund() { t.used.Add(-1) }

// durable reports whether the call counts in a limit that must hold through a crash. With leases, that is each exact
// limit: the call's record, which a replica that lost its leases cannot commit, must come before the call.
func (r *reservation) durable() bool {
	for i := range r.entries {
		switch l := r.entries[i].counter.limit; {
		case l.monitorOnly:
		case l.metric == metricRequests && (l.isWindow() || r.limiter.leases != nil),
			l.metric == metricConcurrent && r.limiter.leases != nil:
			return true
		}
	}
	return false
}

// countLate replaces what was reserved for a call by its usage in counters, where the window in which it started is the
// current one.
func countLate(counters []*limitCounter, r *requestRow, now int64) {
	_, pattern, _ := strings.Cut(r.endpoint, " ")
	for _, own := range counters {
		own.advance(now)
		earlier := own.windowEnd > 0 && r.started < own.windowStart
		if earlier || !own.limit.applies(r.endpoint, pattern, r.requestedModel) {
			continue
		}
		n := r.lateUse(own.limit.metric)
		c := own.forValueOf(r.attribution)
		if own.group != nil {
			own.group.markStale(r.attribution.value(own.limit.forEach))
		}
		if c == nil {
			continue
		}
		c.advance(now)
		if c.limit.period.bucketMS() == 0 {
			c.used = max(c.minUse(), addSat(c.used, n))
		} else if n > 0 { // at most one period of debt, as for any call
			c.used = max(c.used, min(c.used+n*c.scale(), c.maxDebt()))
		}
		if c.lease != nil {
			c.lease.keeper.touch(c)
		}
	}
}

// lateUse returns how much more a call has used than was reserved for it, of which limits have counted the latter.
func (r *requestRow) lateUse(m limitMetric) int64 {
	used := r.limitUsage()
	counted := finalUsage{tokens: addSat(r.reservedInput, r.reservedOutput), dollars: r.reservedCost}
	return used.value(m) - counted.value(m)
}

// A periodUsage is what was used in the current window of a period.
type periodUsage struct {
	period limitPeriod
	rows   []pastUsage
}

// loadPastUsage reads what was used in the current window of each limit of p.
func (ls *limitState) loadPastUsage(ctx context.Context, p *policy, project, token, now int64) ([]periodUsage, error) {
	var out []periodUsage
	for i := range p.Limits {
		period := p.Limits[i].period
		known := slices.ContainsFunc(out, func(o periodUsage) bool { return o.period == period })
		if known || !p.Limits[i].isWindow() || p.Limits[i].forEach != "" {
			continue
		}
		grain := "day"
		if period == perHour {
			grain = "hour"
		}
		from, _ := period.window(now)
		rows, err := ls.store.usageSince(ctx, grain, project, token, from)
		if err != nil {
			return nil, err
		}
		reserved, err := ls.store.reservedSince(ctx, project, token, minIDAt(time.UnixMilli(from)))
		if err != nil {
			return nil, err
		}
		out = append(out, periodUsage{period, append(rows, reserved...)})
	}
	return out, nil
}

// sumUsage adds up what counts in l. Models without their own sums count in every limit, so after a restart a
// limit may refuse too early, but never too late.
func sumUsage(past []periodUsage, l *limit) (n int64) {
	for _, p := range past {
		if p.period != l.period {
			continue
		}
		for _, u := range p.rows {
			_, pattern, _ := strings.Cut(u.endpoint, " ")
			model := u.requestedModel
			if model == otherModels {
				model = strings.TrimSuffix(l.model, "*")
			}
			if !l.applies(u.endpoint, pattern, model) {
				continue
			}
			switch l.metric {
			case metricRequests:
				n = addSat(n, u.calls)
			case metricTokens:
				n = addSat(n, addSat(u.inputTokens, u.outputTokens))
			case metricDollars:
				n = addSat(n, u.nanosUSD)
			}
		}
	}
	return n
}
