//go:build postgres

// This file has the keeper of leases, which leases for all counters of a replica at once, and what calls do while they
// wait for it: see ratelimit_leases.go. It also reads what was used before a counter or an account was made. It has no
// SQL, and without replicas nothing of the keeper runs.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	leaseInterval = 500 * time.Millisecond // between reports of counters that are in use
	leaseTimeout  = 2 * time.Second        // of one exchange with the database
	// An asker waits for what other replicas return, at growing intervals, and then refuses the call.
	maxLeaseWait   = 300 * time.Millisecond
	firstLeaseWait = 5 * time.Millisecond
	maxLeasePause  = 80 * time.Millisecond
	maxLeaseItems  = 1000 // in one exchange
)

// A leaseRound is one exchange with the database, for which calls wait.
type leaseRound struct {
	number int64
	asks   map[*limitCounter]*leaseAsk
	done   chan struct{}
	err    error // valid once done is closed
}

// A leaseKeeper leases for all counters of a replica. One goroutine exchanges reports, requests and grants with the
// database, one exchange after the other; calls that ask meanwhile share the next.
type leaseKeeper struct {
	exchange func(context.Context, []leaseItem) ([]leaseReply, error)
	now      func() int64 // the time by which limits count
	wake     chan struct{}

	mu         sync.Mutex
	next       *leaseRound // nil: no call waits
	rounds     int64       // in which calls waited
	active     map[string]*limitCounter
	recalls    map[string]struct{} // accounts of which others need what is not used here
	recentFrom int64               // the latest that a report has had
	stopped    bool
}

// newLimitState returns the limits of a process. They are leased where other replicas may share the database.
func newLimitState(st *store, l *ledger, g *registry, prices *atomic.Pointer[priceTable]) *limitState {
	ls := &limitState{store: st, ledger: l, registry: g, prices: prices}
	if st.backend != nil {
		ls.leases = newLeaseKeeper(st.backend.leases.exchange, st.backend.limitNow)
	}
	return ls
}

// run keeps the leases until ctx is done.
func (ls *limitState) run(ctx context.Context) {
	if ls.leases != nil {
		ls.leases.run(ctx)
	}
}

// returnLeases reports everything that this replica has used, and gives back what it has leased. No call runs any more,
// and the keeper has ended.
func (ls *limitState) returnLeases(ctx context.Context, log *slog.Logger) {
	if ls.leases == nil {
		return
	}
	err := ls.leases.round(ctx, true)
	if err == nil {
		err = ls.store.backend.leases.giveBack(ctx)
	}
	if err != nil { // another replica does it, as for one that has died
		log.Warn("the leases of limits could not be returned", "error", err)
	}
}

var errLeasesStopped = errors.New("the program is stopping")

func newLeaseKeeper(exchange func(context.Context, []leaseItem) ([]leaseReply, error), now func() int64) *leaseKeeper {
	return &leaseKeeper{exchange: exchange, now: now, wake: make(chan struct{}, 1),
		active: map[string]*limitCounter{}, recalls: map[string]struct{}{}}
}

// touch makes the keeper report a counter. The caller holds its limiter's mu.
func (k *leaseKeeper) touch(c *limitCounter) {
	if c.lease.active || c.lease.retired {
		return
	}
	c.lease.active = true
	k.mu.Lock()
	defer k.mu.Unlock()
	k.active[c.lease.account] = c
}

// replace puts a new counter in the place of the one that is reported for its account, and returns that; nil if there
// is none. The caller holds the limiter's mu.
func (k *leaseKeeper) replace(c *limitCounter) (old *limitCounter) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if old = k.active[c.lease.account]; old == nil || old.lease.limiter != c.lease.limiter || old.lease.retired {
		return nil
	}
	k.active[c.lease.account] = c
	return old
}

// current returns the counter that has taken c's place, or c. The caller holds the limiter's mu.
func (k *leaseKeeper) current(c *limitCounter) *limitCounter {
	k.mu.Lock()
	defer k.mu.Unlock()
	if other := k.active[c.lease.account]; other != nil && other.lease == c.lease {
		return other
	}
	return c
}

// retire forgets the counter of a limit that is gone.
func (k *leaseKeeper) retire(c *limitCounter) {
	if c != nil && c.lease != nil {
		k.forget(c)
		c.lease.retired = true
	}
}

// recall returns what is not used of an account, because another replica needs it.
func (k *leaseKeeper) recall(account string) {
	k.mu.Lock()
	_, known := k.active[account]
	if known {
		k.recalls[account] = struct{}{}
	}
	k.mu.Unlock()
	if known {
		k.kick()
	}
}

// count returns for how many counters something is leased or still to be reported.
func (k *leaseKeeper) count() int64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return int64(len(k.active))
}

func (k *leaseKeeper) kick() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// ask has the keeper ask for what a call needs of counters, and returns the exchange to wait for.
func (k *leaseKeeper) ask(counters []*limitCounter, needs []int64, repeated bool) *leaseRound {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.stopped {
		r := &leaseRound{done: make(chan struct{}), err: errLeasesStopped}
		close(r.done)
		return r
	}
	if k.next == nil {
		k.rounds++
		k.next = &leaseRound{number: k.rounds, asks: map[*limitCounter]*leaseAsk{}, done: make(chan struct{})}
	}
	for i, c := range counters {
		switch a := k.next.asks[c]; {
		case a == nil:
			k.next.asks[c] = &leaseAsk{needs[i], needs[i], repeated}
		default:
			a.least, a.need, a.repeated = min(a.least, needs[i]), addSat(a.need, needs[i]), a.repeated && repeated
		}
	}
	k.kick()
	return k.next
}

// run exchanges until ctx is done.
func (k *leaseKeeper) run(ctx context.Context) {
	tick := time.NewTicker(leaseInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			k.mu.Lock()
			k.stopped = true
			r := k.next
			k.next = nil
			k.mu.Unlock()
			if r != nil {
				r.err = errLeasesStopped
				close(r.done)
			}
			return
		case <-k.wake:
			_ = k.round(ctx, false) // its callers get the error
		case <-tick.C:
			_ = k.round(ctx, true) // what could not be reported is reported later
		}
	}
}

// A leaseEntry is a counter in an exchange.
type leaseEntry struct {
	counter *limitCounter
	ask     *leaseAsk
}

// A leaseExchange is what the counters of an exchange have in common.
type leaseExchange struct {
	number     int64 // of the round; 0: no call waits
	regular    bool
	recalls    map[string]struct{}
	recentFrom int64
}

// round makes one exchange. A regular one has the reports of all counters that are in use.
func (k *leaseKeeper) round(ctx context.Context, regular bool) (err error) {
	k.mu.Lock()
	r := k.next
	k.next = nil
	var entries []leaseEntry
	if r != nil {
		for c, a := range r.asks {
			entries = append(entries, leaseEntry{c, a})
		}
	}
	for account, c := range k.active {
		_, recalled := k.recalls[account]
		if (regular || recalled) && (r == nil || r.asks[c] == nil) {
			entries = append(entries, leaseEntry{counter: c})
		}
	}
	recalls := k.recalls
	k.recalls = map[string]struct{}{}
	recentFrom := max(k.recentFrom, time.Now().Unix()*1000-recentSeconds*1000)
	k.recentFrom = recentFrom
	k.mu.Unlock()
	x := leaseExchange{regular: regular, recalls: recalls, recentFrom: recentFrom}
	if r != nil {
		x.number = r.number
	}
	for part := range slices.Chunk(entries, maxLeaseItems) {
		err = errors.Join(err, k.exchangePart(ctx, part, &x))
	}
	if r != nil {
		r.err = err
		close(r.done)
	}
	return err
}

// exchangePart makes the exchange of some counters.
func (k *leaseKeeper) exchangePart(ctx context.Context, part []leaseEntry, x *leaseExchange) error {
	items := make([]leaseItem, 0, len(part))
	sent := make([]*limitCounter, 0, len(part))
	now := k.now()
	for _, e := range part {
		c := e.counter
		c.lease.limiter.mu.Lock()
		if c = k.current(c); c.lease.retired { // another counter may report for the account now
			c.lease.limiter.mu.Unlock()
			continue
		}
		if _, ok := x.recalls[c.lease.account]; ok {
			c.lease.recalled = true
		}
		if item, changed := c.leaseItem(now, x.regular, e.ask, x.recentFrom); changed {
			item.Index = int64(len(items))
			items, sent = append(items, item), append(sent, c)
		} else if c.isIdle() {
			k.forget(c)
		}
		c.lease.limiter.mu.Unlock()
	}
	if len(items) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	replies, err := k.exchange(ctx, items)
	if err != nil { // the database may have lent something nevertheless
		for _, c := range sent {
			c.lease.limiter.mu.Lock()
			c.lease.reportedVersion = -1
			k.touch(c)
			c.lease.limiter.mu.Unlock()
		}
		return fmt.Errorf("leasing from limits: %w", err)
	}
	now = k.now()
	for i := range replies {
		r := &replies[i]
		if r.item < 0 || r.item >= int64(len(items)) {
			continue
		}
		c := sent[r.item]
		c.lease.limiter.mu.Lock()
		c = k.current(c)
		c.applyLease(&items[r.item], r, now, x.number)
		if c.isIdle() {
			k.forget(c)
		} else {
			k.touch(c)
		}
		if c.lease.recalled {
			k.recall(c.lease.account)
		}
		c.lease.limiter.mu.Unlock()
	}
	return nil
}

// forget stops reporting a counter. The caller holds its limiter's mu.
func (k *leaseKeeper) forget(c *limitCounter) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if c.lease.active = false; k.active[c.lease.account] == c {
		delete(k.active, c.lease.account)
	}
}

// isLate reports whether a call began so long ago that a report without it may already say that it has all such calls.
func (k *leaseKeeper) isLate(began int64) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return began < k.recentFrom
}

// A leaseWait is how long a call has been waiting for leases.
type leaseWait struct {
	began    time.Time
	recalled time.Time     // since when it waits for what other replicas return
	pause    time.Duration // before the next time that it asks
	asked    int64         // the number of the exchange in which it has asked last
}

// lease gets what the call lacks of its counters. It returns true when reserve can decide: nothing is lacking, or what
// is lacking cannot be had. The caller holds the limiter's mu, which lease releases while it waits.
func (ls *limitState) lease(w *leaseWait, t *liveToken, e *estimate, now int64) (ready bool, err error) {
	l := &t.project.limiter
	lacking, needs := l.lackingLeases(&t.limits, e, now, ls.leases.now(), w.asked)
	if len(lacking) == 0 {
		return true, nil
	}
	unsettled := slices.ContainsFunc(lacking, func(c *limitCounter) bool { return c.lease.unsettled })
	switch {
	case w.began.IsZero():
		w.began, unsettled = time.Now(), false
	case time.Since(w.began) > limitLoadTimeout: // others were faster each time
		return true, nil
	case unsettled && w.recalled.IsZero():
		w.recalled = time.Now()
	case unsettled && time.Since(w.recalled) >= maxLeaseWait:
		return true, nil
	}
	if loaded, err := ls.loadBases(l, lacking); loaded || err != nil {
		return false, err
	}
	l.mu.Unlock()
	if unsettled {
		w.pause = min(max(firstLeaseWait, 2*w.pause), maxLeasePause)
		time.Sleep(w.pause)
	}
	r := ls.leases.ask(lacking, needs, unsettled)
	<-r.done
	w.asked = r.number
	l.mu.Lock()
	return false, r.err
}

// loadBases reads what was used of accounts that do not exist yet. It returns true if it has read one, or another call
// reads it. The caller holds mu, which loadBases releases meanwhile.
func (ls *limitState) loadBases(l *limiter, counters []*limitCounter) (loaded bool, err error) {
	for _, c := range counters {
		g := c.lease
		if !g.needsBase || g.hasBase {
			continue
		}
		if g.loading {
			l.mu.Unlock()
			time.Sleep(firstLeaseWait)
			l.mu.Lock()
			return true, nil
		}
		at, lent := *c, *g // they may change meanwhile
		at.lease, g.loading = &lent, true
		l.mu.Unlock()
		base, loadErr := ls.loadBase(&at)
		l.mu.Lock()
		g.loading = false
		if loadErr != nil {
			return false, loadErr
		}
		g.base, g.hasBase, g.needsBase, loaded = base, true, false, true
	}
	return loaded, nil
}

// loadBase reads what was used of a limit in its window by calls that do not count in an account. Calls that run now
// are among them, with what they have reserved.
func (ls *limitState) loadBase(c *limitCounter) (n int64, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limitLoadTimeout)
	defer cancel()
	owner, lim := c.lease.owner, c.limit
	if c.value != nil {
		n, _, err = ls.store.limitValueUse(ctx, owner.project, owner.token, lim.rule, c.value.name, c.windowStart)
	} else if err = ls.ledger.flush(ctx); err != nil {
		return 0, fmt.Errorf("waiting for the ledger: %w", err)
	} else if c.lease.token != nil {
		n, err = ls.store.backend.leases.countRequests(ctx, owner.token)
	} else {
		grain := "day"
		if lim.period == perHour {
			grain = "hour"
		}
		var rows []pastUsage
		var pending []requestRow
		rows, pending, err = ls.store.backend.leases.pastUse(ctx, grain, owner.project, owner.token, c.windowStart)
		for i := range pending {
			r := &pending[i]
			if lim.metric == metricDollars {
				ls.prices.Load().priceRow(r, "", r.model)
			}
			rows = append(rows, pastUsage{endpoint: r.endpoint, requestedModel: r.model, calls: 1, nanosUSD: r.cost,
				inputTokens: r.counts.input, outputTokens: r.counts.output})
		}
		n = sumUsage([]periodUsage{{lim.period, rows}}, lim)
	}
	if lim.monitorOnly { // that includes the calls that it would have refused
		n = min(n, lim.max)
	}
	return min(n, maxLeaseUse), err
}

// refreshLeases brings what a report shows of counters up to date. The caller holds mu, which refreshLeases releases
// meanwhile.
func (ls *limitState) refreshLeases(l *limiter, s *limitScope) error {
	if ls.leases == nil {
		return nil
	}
	for range 3 { // the second has what the database needs for new accounts
		var old []*limitCounter
		now := ls.leases.now()
		for _, c := range append(slices.Clone(s.counters), s.lifetime) {
			if c != nil && c.lease != nil && (c.lease.incarnation == 0 ||
				now-c.lease.levelAt >= leaseInterval.Milliseconds()) {
				old = append(old, c)
			}
			if c != nil && c.group != nil { // those of calls that ran when the limit was set
				for _, v := range c.group.counters {
					if v.lease.incarnation == 0 {
						old = append(old, v)
					}
				}
			}
		}
		if len(old) == 0 {
			return nil
		}
		if _, err := ls.loadBases(l, old); err != nil {
			return err
		}
		l.mu.Unlock()
		r := ls.leases.ask(old, make([]int64, len(old)), true)
		<-r.done
		l.mu.Lock()
		if r.err != nil {
			return r.err
		}
	}
	return nil
}

// syncLifetime makes or changes the counter of a token's max_requests. The caller holds the limiter's mu.
func (ls *limitState) syncLifetime(t *liveToken, st *tokenState, owner leaseOwner, now int64) {
	s := &t.limits
	switch {
	case ls.leases == nil || s.lifetime != nil && s.lifetime.limit.max == st.maxRequests:
		return
	case st.maxRequests < 0:
		ls.leases.retire(s.lifetime)
		s.lifetime = nil
		return
	}
	lim := &limit{metric: metricRequests, period: perLifetime, max: st.maxRequests}
	if s.lifetime != nil {
		s.lifetime.changeLimit(lim, st.version)
		s.lifetime.limit = lim
		return
	}
	s.lifetime = newLimitCounter(lim, now, 0)
	addedAfter := int64(0)
	if s.policy != nil { // syncScope has not set the owner yet
		addedAfter = s.owner.version
	}
	g := t.project.limiter.newLease(owner, lim, "", addedAfter)
	g.token, g.rule, g.account = t, lifetimeRule, accountName(owner, lifetimeRule, "")
	s.lifetime.setLease(g, now)
}

// lateUses returns what a call has used more than was counted, by the accounts of the limits in which it counts: those
// of its project, and of its token.
func (ls *limitState) lateUses(r *requestRow, limits [2][]limit) (uses []lateLeaseUse) {
	if ls.leases == nil {
		return nil
	}
	_, pattern, _ := strings.Cut(r.endpoint, " ")
	for i, owner := range [...]leaseOwner{{project: r.project}, {project: r.project, token: r.token}} {
		for k := range limits[i] {
			l := &limits[i][k]
			amount := r.lateUse(l.metric)
			if amount == 0 || !l.applies(r.endpoint, pattern, r.requestedModel) {
				continue
			}
			u := lateLeaseUse{Account: accountName(owner, leaseRule(l), r.attribution.value(l.forEach)),
				Amount: amount}
			u.WindowStart, _ = l.period.window(r.started)
			uses = append(uses, u)
		}
	}
	return uses
}

// forgetRefusals makes calls of a project and a token ask again, because something may be free.
func (ls *limitState) forgetRefusals(p *liveProject, token int64) {
	p.limiter.mu.Lock()
	defer p.limiter.mu.Unlock()
	p.limiter.project.forgetRefusals()
	if t := ls.registry.liveTokenOf(token); t != nil {
		t.limits.forgetRefusals()
	}
}

// policyChanged forgets what limits have counted that a token, or with token 0 a project, no longer has: if one is set
// again, the calls made meanwhile count, too.
func (ls *limitState) policyChanged(ctx context.Context, owner leaseOwner, text string, maxRequests bool) error {
	if ls.leases == nil {
		return nil
	}
	p, err := parsePolicy([]byte(text), owner.token == 0)
	if err != nil {
		return err
	}
	rules := make([]string, 0, len(p.Limits)+1)
	for i := range p.Limits {
		rules = append(rules, leaseRule(&p.Limits[i]))
	}
	if maxRequests {
		rules = append(rules, lifetimeRule)
	}
	return ls.store.backend.leases.keepRules(ctx, owner.project, owner.token, rules)
}

// pruneAccounts deletes the accounts of windows that are over.
func (ls *limitState) pruneAccounts(ctx context.Context, now int64) error {
	if ls.leases == nil {
		return nil
	}
	for range 100 {
		if n, err := ls.store.backend.leases.prune(ctx, now-hourMS, 1000); n == 0 || err != nil {
			return err
		}
	}
	return nil
}

// reserveRequest counts a call, which has reserved in all other limits, in the token's lifetime limit; a negative one
// means none. The caller holds the limiter's mu, which reserveRequest may release meanwhile.
func (ls *limitState) reserveRequest(t *liveToken, r *reservation, maxRequests, now int64) error {
	if !t.reserve(r, maxRequests, now) {
		return requestsExhausted(maxRequests)
	}
	if err := ls.confirmLate(r); err != nil {
		t.refund()
		return errLimitsUnavailable(err)
	}
	return nil
}

// confirmLate reports what a call has reserved before it is forwarded, if it began so long ago that the replica's calls
// of that time count as reported. The caller holds the limiter's mu, which confirmLate releases meanwhile.
func (ls *limitState) confirmLate(r *reservation) error {
	if ls.leases == nil || !ls.leases.isLate(r.began) {
		return nil
	}
	var counters []*limitCounter
	for i := range r.entries {
		if c := r.entries[i].counter; c.lease != nil {
			counters = append(counters, c)
		}
	}
	if len(counters) == 0 {
		return nil
	}
	r.limiter.mu.Unlock()
	round := ls.leases.ask(counters, make([]int64, len(counters)), true)
	<-round.done
	r.limiter.mu.Lock()
	return round.err
}
