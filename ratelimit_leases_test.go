// These tests check that replicas which share limits never exceed them: random orders of calls, reports, lost and late
// messages, deaths and changes of a limit, against a database that is a model of the function lease_sync.
package main

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// A leaseTable is a model of the accounts in the database. It does what lease_sync and lease_end in schema/postgres do.
type leaseTable struct {
	mu       sync.Mutex
	now      int64
	accounts map[string]*leaseAccount
	replicas map[int64]*leaseReplica
	made     int64 // incarnations
	recalls  func(account string, asker int64)
	observe  func(leaseStep)
}

// A leaseStep is something that was done to a table: an exchange, or with a name of an account in ended, its end for a
// replica.
type leaseStep struct {
	replica, number int64
	items           []leaseItem
	replies         []leaseReply // none if it was refused
	ended           string
	final           int64
}

type leaseReplica struct {
	number int64 // of the last exchange
	closed bool
}

type leaseAccount struct {
	incarnation, version, max, kind, period int64
	windowStart, base, level, levelAt       int64
	recall, recalledAt                      int64
	leases                                  map[int64]*leaseRow
}

type leaseRow struct{ spent, unspent, busy, recent, recentFrom, seenRecall int64 }

var errModelFenced = errors.New("the replica is closed, or the exchange is late")

func newLeaseTable() *leaseTable {
	return &leaseTable{accounts: map[string]*leaseAccount{}, replicas: map[int64]*leaseReplica{},
		recalls: func(string, int64) {}, observe: func(leaseStep) {}}
}

func (t *leaseTable) exchange(replica, number int64, items []leaseItem) (out []leaseReply, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	defer func() { t.observe(leaseStep{replica: replica, number: number, items: items, replies: out}) }()
	r := t.replicas[replica]
	if r.closed || number <= r.number {
		return nil, errModelFenced
	}
	r.number = number
	sorted := slices.Clone(items)
	slices.SortFunc(sorted, func(a, b leaseItem) int { return cmp.Compare(a.Account, b.Account) })
	for i := range sorted {
		out = append(out, t.item(replica, &sorted[i]))
	}
	return out, nil
}

// account returns the account of an item, nil if the item lacks what was used before.
func (t *leaseTable) account(i *leaseItem) *leaseAccount {
	acc := t.accounts[i.Account]
	if acc == nil || i.Added && i.Version > acc.version {
		if i.Base == nil {
			return nil
		}
		t.made++
		next := &leaseAccount{incarnation: t.made, version: i.Version, max: i.Max, kind: i.Kind, period: i.PeriodMS,
			windowStart: i.WindowStart, base: *i.Base, levelAt: t.now, leases: map[int64]*leaseRow{}}
		if acc != nil {
			next.recall, next.recalledAt = acc.recall, acc.recalledAt
		}
		t.accounts[i.Account], acc = next, next
	}
	return acc
}

func (t *leaseTable) item(replica int64, i *leaseItem) leaseReply {
	out := leaseReply{item: i.Index}
	if i.WindowStart > t.now+2000 {
		out.status = leaseWindowEarly
		return out
	}
	acc := t.account(i)
	if acc == nil {
		out.status = leaseNeedsBase
		return out
	}
	recalls := false
	if i.Version > acc.version {
		recalls = i.Max < acc.max
		acc.version, acc.max = i.Version, i.Max
	}
	if i.WindowStart < acc.windowStart {
		out.status, out.windowStart = leaseWindowOver, acc.windowStart
		return out
	}
	if i.WindowStart > acc.windowStart {
		clear(acc.leases)
		acc.windowStart, acc.base = i.WindowStart, 0
	}
	own := acc.leases[replica]
	if own == nil {
		own = &leaseRow{seenRecall: acc.recall}
		acc.leases[replica] = own
	}
	acc.report(own, i, t.now)
	granted, asks := acc.grant(replica, own, i, t.now, t.open())
	if recalls = recalls || asks; recalls {
		acc.recall++
		acc.recalledAt = t.now
	}
	out.recalled = own.unspent > own.busy && own.seenRecall < acc.recall && i.Keep > i.Busy
	if i.Keep <= i.Busy {
		own.seenRecall = acc.recall
	}
	out.settled = true
	for id, l := range acc.leases {
		if id != replica && l.unspent > 0 && l.seenRecall < acc.recall && !t.replicas[id].closed {
			out.settled = false
		}
	}
	if recalls && !out.settled {
		t.recalls(i.Account, replica)
	}
	out.incarnation, out.windowStart, out.spent, out.unspent = acc.incarnation, acc.windowStart, own.spent, own.unspent
	spent, _, busy := acc.others(replica)
	if out.others = acc.base + spent; i.Kind == leaseOfSlots {
		out.others = busy
	}
	out.free, out.level = acc.available(replica, own), acc.level
	if granted > 0 && out.free < 0 {
		panic("more was granted than is left")
	}
	return out
}

func (t *leaseTable) open() (n int64) {
	for _, r := range t.replicas {
		if !r.closed {
			n++
		}
	}
	return n
}

// fall lets the level of a bucket fall until now.
func (acc *leaseAccount) fall(now int64) {
	acc.level = max(0, acc.level-min(max(now-acc.levelAt, 0), 2*acc.period)*acc.max)
	acc.levelAt = max(now, acc.levelAt)
}

func (acc *leaseAccount) report(own *leaseRow, i *leaseItem, now int64) {
	delta := i.Spent - own.spent
	if i.Incarnation != acc.incarnation {
		delta, own.unspent, own.seenRecall = 0, 0, acc.recall
	}
	own.spent += delta
	if i.Kind == leaseOfBucket {
		if acc.fall(now); delta < 0 {
			delta = max(delta, -(acc.level / i.PeriodMS))
		}
	}
	own.unspent = max(min(own.unspent-delta, i.Keep), i.Busy)
	own.busy, own.recent, own.recentFrom = i.Busy, i.Recent, i.RecentFrom
	switch {
	case i.Kind == leaseOfBucket && delta > 0:
		acc.level = max(acc.level, min(acc.level+min(delta, 4*acc.max)*i.PeriodMS, 2*acc.max*i.PeriodMS))
	case i.Kind == leaseOfBucket:
		acc.level += delta * i.PeriodMS
	}
}

func (acc *leaseAccount) others(replica int64) (spent, unspent, busy int64) {
	for id, l := range acc.leases {
		if id != replica {
			spent, unspent, busy = spent+l.spent, unspent+l.unspent, busy+l.busy
		}
	}
	return spent, unspent, busy
}

// available returns what is left of the limit.
func (acc *leaseAccount) available(replica int64, own *leaseRow) int64 {
	spent, unspent, _ := acc.others(replica)
	n := acc.max - unspent - own.unspent
	switch acc.kind {
	case leaseOfWindow:
		n -= acc.base + spent + own.spent
	case leaseOfBucket:
		n -= (acc.level + acc.period - 1) / acc.period
	}
	return n
}

func (acc *leaseAccount) grant(replica int64, own *leaseRow, i *leaseItem, now, open int64) (granted int64, asks bool) {
	n := acc.available(replica, own)
	switch {
	case i.Least > 0 && i.Least <= n:
		if granted = min(n, i.Need); now-acc.recalledAt >= 500 {
			granted = min(n, max(i.Need, min(i.Want, n/(2*open))))
		}
	case i.Least > 0:
		asks = !i.Asked
	case i.Want > 0 && now-acc.recalledAt >= 500 && n > 0:
		granted = min(i.Want, n/(2*open))
	}
	own.unspent += granted
	return granted, asks
}

// end is lease_end.
func (t *leaseTable) end(account string, replica, final int64) {
	defer func() { t.observe(leaseStep{replica: replica, ended: account, final: final}) }()
	acc := t.accounts[account]
	if acc == nil || acc.leases[replica] == nil {
		return
	}
	l := acc.leases[replica]
	delete(acc.leases, replica)
	switch acc.kind {
	case leaseOfWindow:
		acc.base = max(0, acc.base+final)
	case leaseOfBucket:
		acc.fall(t.now)
		acc.level += min(l.unspent, acc.max) * acc.period
	}
}

// A leaseModel is replicas that share one limit, messages on their way, and all calls that were ever admitted.
type leaseModel struct {
	random   *rand.Rand
	table    *leaseTable
	limit    *limit
	version  int64
	highest  int64 // the highest maximum so far
	replicas []*leaseModelReplica
	lastID   int64
	calls    []*leaseModelCall
	lost     int64 // requests that count although they were returned: their replica died before it said so
	missed   int64 // tokens of calls whose replica counted them in another window, by a wrong clock
}

type leaseModelReplica struct {
	id, number int64
	limiter    *limiter
	counter    *limitCounter
	keeper     *leaseKeeper
	recentFrom int64
	offset     int64 // of its clock, which was set and not yet compared with the database's
	frozen     bool  // its messages do not arrive, and it receives none
	inTransit  []leaseMessage
}

// A leaseMessage is an exchange on its way to the database.
type leaseMessage struct {
	number int64
	item   leaseItem
	waited bool // its replica still waits for the answer
}

type leaseModelCall struct {
	replica     *leaseModelReplica
	reservation *reservation
	at, window  int64
	began       int64
	quantity    int64
	used        int64 // in the end
	ended       bool
	isDead      bool // its replica has died
}

func newLeaseModel(seed uint64) *leaseModel {
	m := &leaseModel{random: rand.New(rand.NewPCG(seed, 7)), table: newLeaseTable(), version: 1}
	m.table.now = noon
	m.limit = &limit{metric: metricRequests, max: 1 + m.random.Int64N(40),
		period: []limitPeriod{perHour, perDay, perLifetime, perSecond, perMinute, 0}[m.random.IntN(6)]}
	switch {
	case m.limit.period == 0:
		m.limit.metric = metricConcurrent
	case m.random.IntN(3) == 0:
		m.limit.metric, m.limit.max = metricTokens, 200+m.random.Int64N(2000)
	}
	m.highest = m.limit.max
	for range 3 {
		m.replicas = append(m.replicas, m.newReplica())
	}
	return m
}

func (m *leaseModel) newReplica() *leaseModelReplica {
	m.lastID++
	r := &leaseModelReplica{id: m.lastID, limiter: &limiter{}}
	r.keeper = testLeaseKeeper(func() int64 { return m.table.now })
	r.limiter.leases = r.keeper
	m.table.replicas[r.id] = &leaseReplica{}
	r.limiter.project.owner = leaseOwner{project: 1, version: m.version}
	r.limiter.setPolicy(&r.limiter.project, &policy{Limits: []limit{*m.limit}}, false, m.table.now, &pastUse{})
	r.counter = r.limiter.project.counters[0]
	return r
}

// send puts a message of a replica on its way. A replica that sends another has stopped to wait for the one before.
func (m *leaseModel) send(r *leaseModelReplica, regular bool, ask *leaseAsk) {
	for i := range r.inTransit {
		r.inTransit[i].waited = false
	}
	r.recentFrom = max(r.recentFrom, m.table.now/1000*1000-recentSeconds*1000)
	r.number++
	item, changed := r.counter.leaseItem(m.table.now+r.offset, regular, ask, r.recentFrom)
	if changed {
		r.inTransit = append(r.inTransit, leaseMessage{r.number, item, true})
	}
}

// deliver brings one message of a replica to the database, and its answer back, unless the answer is lost.
func (m *leaseModel) deliver(r *leaseModelReplica) error {
	if len(r.inTransit) == 0 || r.frozen {
		return nil
	}
	i := m.random.IntN(len(r.inTransit))
	msg := r.inTransit[i]
	r.inTransit = slices.Delete(r.inTransit, i, i+1)
	if m.random.IntN(10) == 0 {
		return nil // the message is lost
	}
	replies, err := m.table.exchange(r.id, msg.number, []leaseItem{msg.item})
	if err != nil || !msg.waited || m.random.IntN(10) == 0 {
		return nil
	}
	if replies[0].status == leaseNeedsBase {
		r.counter.lease.base, r.counter.lease.hasBase = 0, true
		return nil
	}
	r.counter.applyLease(&msg.item, &replies[0], m.table.now+r.offset, 0)
	return nil
}

// reserve starts a call, or asks for what it lacks.
func (m *leaseModel) reserve(r *leaseModelReplica) {
	began := m.table.now - m.random.Int64N(3000)
	if began < r.recentFrom {
		return // it would have to be confirmed first
	}
	e := chatEstimate(m.random.Int64N(50), m.random.Int64N(50)+1)
	now := m.table.now + r.offset
	lacking, needs := r.limiter.lackingLeases(&limitScope{}, &e, now, now, 0)
	if len(lacking) > 0 && m.random.IntN(4) > 0 {
		m.send(r, false, &leaseAsk{needs[0], needs[0], m.random.IntN(2) == 0})
		return
	}
	c := &leaseModelCall{replica: r, at: m.table.now, began: began,
		reservation: &reservation{estimate: e, began: began}}
	if v := r.limiter.reserve(c.reservation, &limitScope{}, now); v != nil {
		return
	}
	c.window, c.quantity, c.used = r.counter.windowStart, e.quantityFor(m.limit), e.quantityFor(m.limit)
	m.calls = append(m.calls, c)
}

func (m *leaseModel) settle(c *leaseModelCall) {
	usage := finalUsage{forwarded: m.random.IntN(3) > 0, tokens: m.random.Int64N(60)}
	counter, generation := c.replica.counter, c.reservation.entries[0].generation
	c.reservation.settle(m.table.now+c.replica.offset, usage, func([]limitUse) uint64 { return 0 })
	c.ended = true
	switch {
	case m.limit.metric == metricTokens:
		c.used = usage.tokens
	case m.limit.metric == metricRequests && !usage.forwarded:
		c.used = 0
	}
	if acc := m.table.accounts[counter.lease.account]; generation != counter.generation && acc.windowStart == c.window {
		m.lost++ // its replica has left the window for a while, because of a wrong clock
		if m.limit.metric == metricTokens {
			m.missed += c.used
		}
	}
}

// die closes a replica, settles its lease from the calls on record, and starts another in its place.
func (m *leaseModel) die(i int) {
	r := m.replicas[i]
	m.table.replicas[r.id].closed = true
	for _, g := range r.inTransit { // a message that was sent before arrives too late
		if _, err := m.table.exchange(r.id, g.number, []leaseItem{g.item}); err == nil {
			panic("a closed replica has made an exchange")
		}
	}
	account := r.counter.lease.account
	acc := m.table.accounts[account]
	var row *leaseRow
	if acc != nil {
		row = acc.leases[r.id]
	}
	var final int64
	if row != nil {
		final = row.spent
		if m.limit.metric == metricRequests {
			final -= row.recent
		}
	}
	for _, c := range m.calls {
		if c.replica != r || c.isDead {
			continue
		}
		c.isDead, c.ended = true, true
		if row == nil || acc.windowStart != c.window {
			continue
		}
		if m.limit.metric == metricTokens || c.began >= row.recentFrom {
			final += c.used
		} else if c.used == 0 {
			m.lost++ // perhaps it was returned after the last report
		}
	}
	if row != nil {
		m.table.end(account, r.id, final)
	}
	m.replicas[i] = m.newReplica()
}

// change sets another maximum, of which the replicas learn one after the other.
func (m *leaseModel) change() {
	next := *m.limit
	next.max = max(1, next.max+m.random.Int64N(21)-10)
	m.limit, m.highest = &next, max(m.highest, next.max)
	m.version++
}

func (m *leaseModel) learn(r *leaseModelReplica) {
	r.limiter.project.owner.version = m.version
	r.limiter.setPolicy(&r.limiter.project, &policy{Limits: []limit{*m.limit}}, false, m.table.now, &pastUse{})
	r.counter = r.limiter.project.counters[0]
}

// check compares the replicas, the database and the calls with the invariant.
func (m *leaseModel) check() error {
	for _, r := range m.replicas {
		c := r.counter
		if c.limit.metric != metricTokens && c.used+c.reserved > c.lease.granted && c.lease.granted > 0 {
			return fmt.Errorf("replica %d has %d used and %d reserved of %d", r.id, c.used, c.reserved, c.lease.granted)
		}
		acc := m.table.accounts[c.lease.account]
		if acc == nil || acc.windowStart != c.windowStart && acc.kind == leaseOfWindow ||
			c.lease.incarnation != acc.incarnation || m.limit.metric == metricTokens {
			continue
		}
		if l := acc.leases[r.id]; l != nil && acc.kind != leaseOfBucket && c.lease.granted > l.spent+l.unspent {
			return fmt.Errorf("replica %d may spend %d, the database has %+v", r.id, c.lease.granted, l)
		}
	}
	for _, acc := range m.table.accounts {
		spent, unspent, _ := acc.others(0)
		total := acc.base + spent + unspent
		if acc.kind == leaseOfBucket {
			total = unspent
		}
		if m.limit.metric != metricTokens && total > m.highest {
			return fmt.Errorf("%d are used and lent of %d", total, m.highest)
		}
		if m.limit.metric == metricTokens {
			return nil
		}
		var used int64
		for _, c := range m.calls {
			switch {
			case acc.kind == leaseOfWindow && c.window == acc.windowStart, acc.kind == leaseOfSlots && !c.ended:
				used += c.used
			}
		}
		if used > m.highest {
			return fmt.Errorf("%d are used of %d", used, m.highest)
		}
	}
	return m.checkBucket()
}

// checkBucket lets all calls flow into one bucket, in their order.
func (m *leaseModel) checkBucket() error {
	b := m.limit.period.bucketMS()
	if b == 0 || m.limit.metric != metricRequests {
		return nil
	}
	var level, at int64
	for _, c := range m.calls {
		level = max(0, level-(c.at-at)*m.highest) + c.used*b
		if at = c.at; level > m.highest*b {
			return fmt.Errorf("the bucket of %d has %d", m.highest, level/b)
		}
	}
	return nil
}

// quiesce ends all calls, delivers everything, and compares the sums.
func (m *leaseModel) quiesce() error {
	for _, r := range m.replicas {
		r.offset = 0
	}
	for _, c := range m.calls {
		if !c.ended {
			m.settle(c)
		}
	}
	for _, r := range m.replicas {
		m.learn(r)
		r.frozen, r.inTransit = false, nil
		r.counter.lease.keeper.touch(r.counter)
		for range 6 {
			r.number++
			item, _ := r.counter.leaseItem(m.table.now, true, nil, r.recentFrom)
			item.Keep = item.Busy
			replies, err := m.table.exchange(r.id, r.number, []leaseItem{item})
			if err != nil {
				return err
			}
			if replies[0].status == leaseNeedsBase {
				r.counter.lease.base, r.counter.lease.hasBase = 0, true
				continue
			}
			r.counter.applyLease(&item, &replies[0], m.table.now, 0)
		}
	}
	for _, acc := range m.table.accounts {
		var used int64
		for _, c := range m.calls {
			if c.window == acc.windowStart {
				used += c.used
			}
		}
		spent, _, busy := acc.others(0)
		total := acc.base + spent
		if acc.kind == leaseOfSlots && busy != 0 {
			return fmt.Errorf("%d slots are in use, but no call runs", busy)
		}
		if acc.kind == leaseOfWindow && m.limit.metric == metricRequests &&
			(total < used || total > used+m.lost) {
			return fmt.Errorf("%d requests were made, the database has %d; at most %d are too many",
				used, total, m.lost)
		}
		if acc.kind == leaseOfWindow && total < used-m.missed {
			return fmt.Errorf("%d were used, the database has %d", used, total)
		}
	}
	return nil
}

func (m *leaseModel) step() error {
	i := m.random.IntN(len(m.replicas))
	r := m.replicas[i]
	switch event := m.random.IntN(100); {
	case event < 30:
		m.reserve(r)
	case event < 55:
		if err := m.deliver(r); err != nil {
			return err
		}
	case event < 65:
		m.send(r, true, nil)
	case event < 85:
		if len(m.calls) > 0 {
			if c := m.calls[m.random.IntN(len(m.calls))]; !c.ended {
				m.settle(c)
			}
		}
	case event < 88:
		r.counter.lease.recalled = !r.frozen
	case event < 90:
		m.change()
	case event < 93:
		m.learn(r)
	case event < 94:
		m.die(i)
	case event < 96:
		r.frozen = !r.frozen
	case event < 97 && m.limit.period.bucketMS() == 0:
		if m.lost += max(0, r.counter.used-r.counter.lease.reported); r.offset == 0 {
			r.offset = m.random.Int64N(6*hourMS) - 3*hourMS
		} else {
			r.offset = 0
		}
	default:
		m.table.now += m.random.Int64N(700)
		if m.random.IntN(60) == 0 {
			m.table.now += hourMS / 2
		}
	}
	return m.check()
}

// exchangeOne makes an exchange of one replica for one counter, which gets the answer.
func (t *leaseTable) exchangeOne(r int64, c *limitCounter, ask *leaseAsk) leaseReply {
	item, _ := c.leaseItem(t.now, true, ask, t.now)
	replies, err := t.exchange(r, t.replicas[r].number+1, []leaseItem{item})
	if err != nil {
		panic(err)
	}
	if replies[0].status == leaseNeedsBase {
		c.lease.base, c.lease.hasBase = 0, true
		return t.exchangeOne(r, c, ask)
	}
	c.applyLease(&item, &replies[0], t.now, 0)
	return replies[0]
}

// TestLeaseOfAddedLimit: a replica that learns of a new limit together with a later change joins the account that
// another one has made, instead of making it again without what that one has used meanwhile.
func TestLeaseOfAddedLimit(t *testing.T) {
	t.Parallel()
	table := newLeaseTable()
	table.now = noon
	limited := &policy{Limits: []limit{{metric: metricRequests, max: 10, period: perDay}}}
	var counters []*limitCounter
	for r := range int64(2) {
		table.replicas[r] = &leaseReplica{}
		l := &limiter{leases: testLeaseKeeper(func() int64 { return noon })}
		l.project.setOwner(leaseOwner{project: 1, version: 1})
		l.setPolicy(&l.project, &policy{}, false, noon, &pastUse{})
		l.project.setOwner(leaseOwner{project: 1, version: 2 + r})
		l.setPolicy(&l.project, limited, false, noon, &pastUse{})
		counters = append(counters, l.project.counters[0])
	}
	table.exchangeOne(0, counters[0], &leaseAsk{4, 4, false})
	counters[0].used += 4
	table.exchangeOne(1, counters[1], &leaseAsk{6, 6, false})
	counters[1].used += 6
	for i, c := range counters {
		table.exchangeOne(int64(i), c, nil)
	}
	for _, acc := range table.accounts {
		if spent, _, _ := acc.others(-1); acc.base+spent != 10 {
			t.Errorf("of 10 requests that were made, the account has %d", acc.base+spent)
		}
	}
	if r := table.exchangeOne(0, counters[0], &leaseAsk{1, 1, false}); counters[0].shortfall(1) == 0 {
		t.Errorf("an eleventh request was admitted: %+v", r)
	}
}

// TestLeaseLoweredMeanwhile: what the database has lent while a limit was lowered is not spent by the old one.
func TestLeaseLoweredMeanwhile(t *testing.T) {
	t.Parallel()
	table := newLeaseTable()
	table.now = noon
	table.replicas[1] = &leaseReplica{}
	l := &limiter{leases: testLeaseKeeper(func() int64 { return noon })}
	l.setPolicy(&l.project, &policy{Limits: []limit{{metric: metricRequests, max: 100, period: perDay}}}, false, noon,
		&pastUse{})
	c := l.project.counters[0]
	c.lease.hasBase = true
	item, _ := c.leaseItem(noon, false, &leaseAsk{50, 50, false}, noon)
	replies, err := table.exchange(1, 1, []leaseItem{item})
	if err != nil {
		t.Fatal(err)
	}
	l.setPolicy(&l.project, &policy{Limits: []limit{{metric: metricRequests, max: 10, period: perDay}}}, false, noon,
		&pastUse{})
	if c.applyLease(&item, &replies[0], noon, 1); c.shortfall(1) == 0 {
		t.Errorf("a limit that was lowered to 10 has lent %d", c.lease.granted)
	}
}

// TestLeaseModel: in random orders of everything that can happen to replicas and their messages, no limit is exceeded,
// and none counts too little.
func TestLeaseModel(t *testing.T) {
	t.Parallel()
	seeds := uint64(2000)
	if testing.Short() {
		seeds = 200
	}
	for seed := range seeds {
		m := newLeaseModel(seed)
		for step := range 300 {
			if err := m.step(); err != nil {
				t.Fatalf("seed %d step %d, %s: %v", seed, step, m.limit, err)
			}
		}
		if err := m.quiesce(); err != nil {
			t.Fatalf("seed %d, %s: %v", seed, m.limit, err)
		}
	}
}
