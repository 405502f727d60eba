// These tests check limits with for_each: each value is counted by itself and exactly, however many values clients
// invent, and through evictions, restarts and changes of the limits.
package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestForEachForm: what a limit with for_each may be, how it is described, and that it is stored so that it reads back
// the same.
func TestForEachForm(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{"count":"requests","max":5,"per":"day","for_each":"end_user"}`: "5 requests per day for each end user",
		`{"count":"dollars","max":50,"per":"month","for_each":"tag:team","max_values":300}`: "$50.00 per month " +
			"for each value of the tag team",
		`{"count":"concurrent","max":2,"for_each":"session","shadow":true}`: "2 calls at one time for each session",
		`{"count":"tokens","max":9,"per":"second","model":"g*","for_each":"session","max_values":10000}`: "9 tokens " +
			"per second for models g* for each session",
		`{"count":"tokens","max":9,"per":"lifetime","for_each":"end_user","max_values":1000000}`: "9 tokens in total " +
			"for each end user",
	} {
		p := testLimits(t, text)
		if got := p.Limits[0].String(); got != want {
			t.Errorf("%s is %q, want %q", text, got, want)
		}
		again, err := parsePolicy([]byte(p.String()), false)
		if err != nil || !slices.Equal(again.Limits, p.Limits) {
			t.Errorf("%s: stored as %s, which is read as %+v, %v", text, p, again.Limits, err)
		}
	}
	const day = `{"count":"requests","max":5,"per":"day"`
	const million = "[0].max_values: must be a whole number from 1 to 1000000"
	for text, want := range map[string]string{
		day + `,"for_each":"user"}`:    "[0].for_each: must be end_user, session or tag:KEY",
		day + `,"for_each":""}`:        "[0].for_each: must be end_user, session or tag:KEY",
		day + `,"for_each":"tag:"}`:    "[0].for_each: must be end_user, session or tag:KEY",
		day + `,"for_each":null}`:      "[0].for_each: must be a string, not null",
		day + `,"for_each":["tag:a"]}`: "[0].for_each: must be a string",
		day + `,"max_values":5}`:       "[0].max_values: is for limits with for_each only",
		`{"count":"tokens","max":5,"per":"lifetime","for_each":"session"}`: "[0].for_each: must not be " +
			"session with lifetime",
		day + `,"for_each":"session","max_values":0}`:                                        million,
		day + `,"for_each":"session","max_values":"7"}`:                                      million,
		day + `,"for_each":"session","max_values":1000001}`:                                  million,
		`{"count":"concurrent","max":5,"for_each":"tag:team","max_values":10001}`:            million[:len(million)-2],
		`{"count":"tokens","max":5,"per":"minute","for_each":"tag:team","max_values":10001}`: million[:len(million)-2],
		day + `,"for_each":"end_user"},` + day +
			`,"for_each":"end_user","max_values":4}`: "[1]: counts the same as policy.limits[0]",
	} {
		_, err := parsePolicy([]byte(`{"limits":[`+text+`]}`), false)
		if err == nil || !strings.HasPrefix(err.Error(), "policy.limits"+want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
	if _, err := parsePolicy([]byte(`{"limits":[`+day+`},`+day+`,"for_each":"session"},`+day+
		`,"for_each":"end_user"}]}`), true); err != nil {
		t.Errorf("limits of all calls, each session and each end user: %v", err)
	}
}

// forUser returns the estimate of a call of an end user.
func forUser(name string) estimate {
	e := chatEstimate(5, 5)
	e.attribution = &attribution{endUser: name}
	return e
}

// storedUses is what a store has of values: what calls have counted up to the committed position.
type storedUses struct {
	mu                sync.Mutex
	committed, queued uint64
	uses              map[limitUse]int64 // by use without its amount
	waiting           []queuedUse
}

type queuedUse struct {
	position uint64
	use      limitUse
}

func (s *storedUses) record(uses []limitUse) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queued++
	for _, u := range uses {
		s.waiting = append(s.waiting, queuedUse{s.queued, u})
	}
	return s.queued
}

// commit stores what was recorded up to a position.
func (s *storedUses) commit(position uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commitLocked(position)
}

func (s *storedUses) commitAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commitLocked(s.queued)
}

func (s *storedUses) commitLocked(position uint64) {
	if s.uses == nil {
		s.uses = map[limitUse]int64{}
	}
	for len(s.waiting) > 0 && s.waiting[0].position <= position {
		u := s.waiting[0].use
		n := u.amount
		u.amount = 0
		s.uses[u] += n
		s.waiting = s.waiting[1:]
	}
	s.committed = position
}

func (s *storedUses) read(m *missingValue) (committed uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := limitUse{ofToken: m.group.ofToken, rule: m.rule, value: m.name, windowStart: m.windowStart}
	if u.windowEnd = m.group.own.windowEnd; u.windowEnd == 0 {
		u.windowEnd = endOfTime
	}
	m.used, m.stored = s.uses[u]
	return s.committed
}

// admit is what a call does: it brings the counters of its values into memory, then reserves.
func (l *limiter) admit(s *limitScope, store *storedUses, e estimate, now int64) (*reservation, *limitViolation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range l.missingValues(s, &e, now) {
		committed := store.read(&m)
		m.group.add(m.name, m.used, m.stored, now, committed)
	}
	r := &reservation{estimate: e}
	return r, l.reserve(r, s, now)
}

// TestMillionValues: a client invents a million end users. The counters in memory, and the values that the limit
// counts, stay within their bounds. The user that was there before keeps what it has used, and what it has left.
func TestMillionValues(t *testing.T) {
	t.Parallel()
	const capacity = 500
	for limit, most := range map[string]int64{
		`{"count":"requests","max":3,"per":"day","for_each":"end_user","max_values":2000}`:   2000,
		`{"count":"requests","max":3,"per":"minute","for_each":"end_user","max_values":400}`: 400,
		`{"count":"concurrent","max":1,"for_each":"end_user","max_values":400}`:              400,
	} {
		users := 100_000
		if most == 2000 {
			users = 1_000_000
		}
		l, s := newTestLimiter(t, ``, limit, noon)
		l.values.capacity = capacity
		store, refused, g := &storedUses{}, 0, s.counters[0].group
		settle := func(r *reservation) {
			r.settle(noon, finalUsage{forwarded: true}, store.record)
			if store.queued%100 == 0 { // the ledger commits in batches
				store.commit(store.queued)
			}
		}
		first, v := l.admit(s, store, forUser("first"), noon)
		if v != nil {
			t.Fatal(v)
		}
		for i := range users {
			r, v := l.admit(s, store, forUser(fmt.Sprint("invented ", i)), noon)
			if v != nil {
				if refused++; !v.noCounter {
					t.Fatalf("%s: call %d: %+v", limit, i, v)
				}
			} else if settle(r); i%4 == 0 {
				continue
			}
			if len(g.counters) > capacity || l.values.count != len(g.counters) || g.valueCount() > most {
				t.Fatalf("%s: %d counters of %d, %d values", limit, len(g.counters), l.values.count, g.valueCount())
			}
		}
		settle(first)
		store.commit(store.queued)
		if s.counters[0].limit.metric != metricConcurrent && users-refused > 2000 {
			t.Errorf("%s: %d of %d calls were refused", limit, refused, users)
		}
		for i := range 4 {
			r, v := l.admit(s, store, forUser("first"), noon)
			if left := s.counters[0].limit.metric == metricConcurrent || i < 2; left != (v == nil) {
				t.Errorf("%s: call %d of the first user: %+v", limit, i+1, v)
			}
			if v == nil {
				settle(r)
			}
		}
	}
}

// TestValueViolations: what a client is told.
func TestValueViolations(t *testing.T) {
	t.Parallel()
	const limits = `{"count":"requests","max":1,"per":"%s","for_each":"%s","max_values":2}`
	text := func(per, attribute string, a ...*attribution) string {
		l, s := newTestLimiter(t, ``, fmt.Sprintf(limits, per, attribute), noon)
		var last error
		for _, a := range a {
			e := chatEstimate(5, 5)
			e.attribution = a
			if _, v := l.admit(s, &storedUses{}, e, noon); v != nil {
				last = violationError(v)
			}
		}
		if e, ok := errors.AsType[*apiError](last); ok {
			return fmt.Sprint(e.status, " ", e.code, " ", e.msg)
		}
		return ""
	}
	user := func(name string) *attribution { return &attribution{endUser: name} }
	team := &attribution{tags: tagList{{"team", "search"}}}
	const ofUsers = "This token's limit of 1 request per day for each end user "
	for _, c := range []struct{ got, want string }{
		{got: text("day", "end_user", user("a"), user("b"))},
		{got: text("day", "end_user", user("a\"<b>"), user("a\"<b>")),
			want: "429 project_spend_limit_exceeded " + ofUsers + `is used up for "a\"<b>". It resets in 12 hours.`},
		{got: text("day", "end_user", user(strings.Repeat("x", 250)), user(strings.Repeat("x", 250))),
			want: "429 project_spend_limit_exceeded " + ofUsers + `is used up for "` + strings.Repeat("x", 64) +
				`…". It resets in 12 hours.`},
		{got: text("day", "end_user", nil, user("")), want: "429 project_spend_limit_exceeded " + ofUsers +
			"is used up for calls without an end user. It resets in 12 hours."},
		{got: text("hour", "session", nil, nil), want: "429 rate_limit_exceeded This token's limit of 1 request per " +
			"hour for each session is used up for calls without a session. Try again in 1 hour."},
		{got: text("hour", "tag:team", team, team), want: "429 rate_limit_exceeded This token's limit of 1 request " +
			`per hour for each value of the tag team is used up for "search". Try again in 1 hour.`},
		{got: text("hour", "tag:team", nil, nil), want: "429 rate_limit_exceeded This token's limit of 1 request " +
			"per hour for each value of the tag team is used up for calls without the tag team. Try again in 1 hour."},
	} {
		if c.got != c.want {
			t.Errorf("got  %s\nwant %s", c.got, c.want)
		}
	}
	// Calls that run keep their values.
	got := text("day", "end_user", user("a"), user("b"), user("c"))
	if want := "429 project_spend_limit_exceeded " + ofUsers + "counts 2 values at most, and this call has one more. " +
		"An administrator can raise its max_values. It resets in 12 hours."; got != want {
		t.Errorf("got %s", got)
	}
	// Memory that is full is free again soon, whatever the period of the limit.
	full := violationError(&limitViolation{limit: &limit{metric: metricRequests, period: perDay, max: 1,
		forEach: endUserAttribute}, noCounter: true, memoryFull: true, wait: 1000})
	if full.retryAfter != time.Second || full.noRetry || full.code != "rate_limit_exceeded" {
		t.Errorf("full memory: got %+v", full)
	}
}

// TestValuesInParallel: 200 callers over 50 values get exactly what the limit allows for each value, and never more at
// one time, while counters are dropped and come back.
func TestValuesInParallel(t *testing.T) {
	t.Parallel()
	const callers, values, most, together = 200, 50, 40, 3
	l, s := newTestLimiter(t, `{"count":"requests","max":40,"per":"day","for_each":"end_user"}`,
		`{"count":"concurrent","max":3,"for_each":"end_user"}`, noon)
	l.values.capacity = 2*callers + 10
	var store storedUses
	var admitted, running [values]atomic.Int64
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for range 60 {
				n := rng.IntN(values)
				r, v := l.admit(s, &store, forUser(fmt.Sprint(n)), noon)
				if v != nil {
					continue
				}
				admitted[n].Add(1)
				if at := running[n].Add(1); at > together {
					t.Errorf("%d calls of %d ran at one time", at, n)
				}
				runtime.Gosched()
				running[n].Add(-1)
				r.settle(noon, finalUsage{forwarded: true}, store.record)
				store.commitAll()
			}
		})
	}
	all.Wait()
	for n := range admitted {
		for i := admitted[n].Load(); i < most; i++ {
			if r, v := l.admit(s, &store, forUser(fmt.Sprint(n)), noon); v != nil {
				t.Errorf("value %d got %d calls: %+v", n, i, v)
			} else {
				r.settle(noon, finalUsage{forwarded: true}, store.record)
				store.commit(store.queued)
			}
		}
		if _, v := l.admit(s, &store, forUser(fmt.Sprint(n)), noon); v == nil || !v.ofProject {
			t.Errorf("value %d got one call more than allowed: %+v", n, v)
		}
	}
}

// A valueModel makes random calls in a limit of all calls and one of each end user, and adds up by itself what they
// use.
type valueModel struct {
	t       *testing.T
	rng     *rand.Rand
	limiter *limiter
	token   *limitScope
	store   storedUses
	running []modelValueCall
	used    map[string]int64 // in the current window, by value
	now     int64
	peak    int // of running calls
}

type modelValueCall struct {
	reservation *reservation
	name        string
}

const (
	modelAll  = `{"count":"tokens","max":1000000,"per":"hour"}`
	modelEach = `{"count":"tokens","max":100000,"per":"hour","for_each":"end_user"}`
)

// setLimits applies limits as limitState does: the ledger is flushed, and past use is read.
func (m *valueModel) setLimits(text string) {
	m.store.commit(m.store.queued)
	p := testLimits(m.t, text)
	past := &pastUse{used: map[limitKey]int64{}, counts: map[limitKey]int64{}, values: map[limitKey]map[string]int64{}}
	for i := range p.Limits {
		key, values := p.Limits[i].key(), map[string]int64{}
		for _, n := range m.used {
			past.used[key] += n
		}
		from, _ := perHour.window(m.now)
		for u, n := range m.store.uses {
			if u.windowStart == from {
				values[u.value] = n
				past.counts[key]++
			}
		}
		past.values[key] = values
	}
	m.limiter.mu.Lock()
	defer m.limiter.mu.Unlock()
	m.limiter.setPolicy(m.token, p, true, m.now, past)
}

func (m *valueModel) step() {
	switch n := m.rng.IntN(1000); {
	case n < 500:
		name := fmt.Sprint(m.rng.IntN(12))
		if r, v := m.limiter.admit(m.token, &m.store, forUser(name), m.now); v == nil {
			m.running = append(m.running, modelValueCall{r, name})
		} else if !v.memoryFull {
			m.t.Fatalf("%+v", v)
		}
	case n < 900 && len(m.running) > 0:
		i := m.rng.IntN(len(m.running))
		m.settle(i)
	case n < 970:
		m.store.commit(m.store.committed + uint64(m.rng.Int64N(int64(m.store.queued-m.store.committed)+1)))
	case n < 972:
		if next := m.now + m.rng.Int64N(hourMS); next/hourMS != m.now/hourMS {
			m.used = map[string]int64{}
			m.now = next
		}
	case n < 980: // calls that run meanwhile count, and so do those that end
		m.setLimits(modelAll)
		for len(m.running) > 0 && m.rng.IntN(2) == 0 {
			m.settle(0)
		}
		m.setLimits(modelAll + "," + modelEach)
	case n < 983: // a restart
		for len(m.running) > 0 {
			m.settle(0)
		}
		capacity := m.limiter.values.capacity
		m.limiter, m.token = &limiter{}, &limitScope{}
		m.limiter.values.capacity = capacity
		m.setLimits(modelAll + "," + modelEach)
	}
}

// settle ends a running call. It counts if it began in the current window.
func (m *valueModel) settle(i int) {
	c := m.running[i]
	m.running = slices.Delete(m.running, i, i+1)
	tokens := int64(m.rng.IntN(20))
	if c.reservation.start/hourMS == m.now/hourMS {
		m.used[c.name] += tokens
	}
	c.reservation.settle(m.now, finalUsage{forwarded: true, tokens: tokens}, m.store.record)
}

// check compares the counters, or what the store has of values whose counters are not in memory, with the sums.
func (m *valueModel) check() {
	all, each := m.token.counters[0], m.token.counters[1]
	all.advance(m.now)
	each.advance(m.now)
	total, values := int64(0), int64(0)
	for i := range 12 {
		name := fmt.Sprint(i)
		read := missingValue{group: each.group, name: name, rule: each.limit.rule, windowStart: each.windowStart}
		m.store.read(&read)
		used := read.used
		if c := each.group.counters[name]; c != nil {
			c.advance(m.now)
			if used = c.used; c.value.stored || c.value.running > 0 || used > 0 {
				values++
			}
		} else if read.stored {
			values++
		}
		if total += used; used != m.used[name] {
			m.t.Errorf("value %s has used %d, want %d", name, used, m.used[name])
		}
	}
	if all.used != total {
		m.t.Errorf("all calls have used %d, all values %d", all.used, total)
	}
	if n := each.group.valueCount(); n < values || n > 12 {
		m.t.Errorf("%d values are counted, %d have used something", n, values)
	}
	if m.peak = max(m.peak, len(m.running)); m.limiter.values.count > m.limiter.values.capacity+m.peak {
		m.t.Errorf("%d counters are in memory", m.limiter.values.count)
	}
}

// TestValuesAgree: through random calls, commits, evictions, ends of windows, restarts and changes of the policy, each
// value has used what its calls add up to, and all values together what a limit of all calls says.
func TestValuesAgree(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		m := &valueModel{t: t, rng: rand.New(rand.NewPCG(seed, 7)), limiter: &limiter{}, token: &limitScope{},
			used: map[string]int64{}, now: noon}
		m.limiter.values.capacity = 8
		m.setLimits(modelAll + "," + modelEach)
		for i := range 2000 {
			m.step()
			if m.check(); t.Failed() {
				t.Fatalf("seed %d, step %d", seed, i)
			}
		}
	}
}

// sendAs makes a chat call of an end user.
func (p *testProxy) sendAs(token, user string) int {
	status, _ := p.send(nil, token, chatBody(`"user":`+quote(user)+`,`+tinyBody))
	return status
}

// A valueStatus is a value of a limit in the answer of a GET.
type valueStatus struct {
	Value                string
	Used, Reserved, Left float64
}

// limitValues returns the values of the first limit of a token or project, as query asks for them, and how many there
// are.
func (p *testProxy) limitValues(path, query string) (values map[string]valueStatus, count int) {
	p.t.Helper()
	var v struct {
		Limits []struct {
			ValueCount int `json:"value_count"`
			Values     []valueStatus
		}
	}
	p.manage("GET", path+query, "", 200, &v)
	values = map[string]valueStatus{}
	for i, u := range v.Limits[0].Values {
		values[u.Value] = u
		if all := v.Limits[0].Values; i > 0 && u.Used+u.Reserved > all[i-1].Used+all[i-1].Reserved {
			p.t.Errorf("%s%s: the values are not in order: %+v", path, query, v.Limits[0].Values)
		}
	}
	return values, v.Limits[0].ValueCount
}

// TestValuesSurvive: what each value has used before a restart, a kill -9 or an eviction stays used, in limits of
// tokens and of projects, also by calls that ran at that moment.
func TestValuesSurvive(t *testing.T) {
	t.Parallel()
	for _, event := range []string{"restart", "kill", "eviction"} {
		t.Run(event, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
			awaitClearOfHour(10 * time.Second)
			paths, tokens := map[string]string{}, map[string]string{}
			for _, scope := range []string{"token", "project"} {
				for _, metric := range []string{"requests", "tokens", "dollars"} {
					limit := strings.TrimSuffix(windowLimits(metric)[1], "}") + `,"for_each":"end_user"}` // of a day
					made, path := p.newLimitedProject(scope+metric, scope, limit, 1)
					paths[path], tokens[path] = metric, made[0]
					for user, n := range map[string]int{"ann": 7, "bob": 3, "": 1} {
						for range n {
							if status := p.sendAs(made[0], user); status != 200 {
								t.Fatalf("%s: got %d", limit, status)
							}
						}
					}
				}
			}
			p.waitSettled()
			q := p
			switch event {
			case "restart":
				if err := p.stop(); err != nil {
					t.Fatal(err)
				}
				p.start()
			case "kill":
				p.provider.setScript(endlessScript)
				for path, metric := range paths {
					if metric == "requests" {
						if _, err := p.stream(tokens[path], `"user":"bob","max_tokens":50`).read(1); err != nil {
							t.Fatal(err)
						}
					}
				}
				q = p.crashedCopy()
				p.provider.setScript(chatScript)
			case "eviction":
				p.instance.registry.evict(time.Now().Add(time.Hour).UnixMilli(), true)
				waitFor(t, "the counters to be dropped", func() bool {
					p.instance.proxy.limits.dropIdleValues(time.Now().Add(time.Hour).UnixMilli())
					n := 0
					for _, project := range p.instance.registry.liveProjects() {
						project.limiter.mu.Lock()
						n += project.limiter.values.count
						project.limiter.mu.Unlock()
					}
					return n == 0
				})
			}
			for path, metric := range paths {
				checkValuesLeft(q, path, tokens[path], metric, event == "kill" && metric == "requests")
			}
		})
	}
}

// checkValuesLeft checks what ann, bob and the calls without an end user have left of windowLimits.
func checkValuesLeft(p *testProxy, path, token, metric string, bobRan bool) {
	t := p.t
	bobs := 3
	if bobRan {
		bobs++
	}
	for user, n := range map[string]int{"ann": 7, "bob": bobs, "": 1} {
		all, count := p.limitValues(path, "?limit_values=9")
		if v := all[user]; !sameAmount(v.Used, float64(n)*callUse(metric)) || count != 3 || len(all) != 3 {
			t.Errorf("%s %s: %q has used %+v of %d calls, %d values", path, metric, user, v, n, count)
		}
		for n = range 21 {
			if p.sendAs(token, user) != 200 {
				break
			}
		}
		least := map[string]int{"requests": 20, "tokens": 17, "dollars": 17}[metric]
		had := map[string]int{"ann": 7, "bob": bobs, "": 1}[user]
		if n+had > 20 || n+had < least {
			t.Errorf("%s %s: %q made %d calls, then %d", path, metric, user, had, n)
		}
	}
	one, _ := p.limitValues(path, "?limit_value=ann")
	if v := one["ann"]; len(one) != 1 || v.Used < 17*callUse(metric) {
		t.Errorf("%s: ann alone is %+v", path, one)
	}
	if none, _ := p.limitValues(path, "?limit_value=nobody"); len(none) != 0 {
		t.Errorf("%s: nobody is %+v", path, none)
	}
}

// TestValuesUnderLoad: 60 clients call for 200 end users, of whom each may make two calls in a day. Each gets exactly
// two, although only some of the counters fit into memory.
func TestValuesUnderLoad(t *testing.T) {
	t.Parallel()
	const clients, users, most = 60, 200, 2
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	awaitClearOfHour(20 * time.Second)
	tokens, path := p.newLimitedProject("load", "project",
		`{"count":"requests","max":2,"per":"day","for_each":"end_user"},
		{"count":"concurrent","max":1000,"for_each":"end_user"}`, 1)
	if status := p.sendAs(tokens[0], "first"); status != 200 {
		t.Fatal(status)
	}
	for _, project := range p.instance.registry.liveProjects() {
		project.limiter.mu.Lock()
		project.limiter.values.capacity = 4 * clients
		project.limiter.mu.Unlock()
	}
	var answered [users]atomic.Int64
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			rt := &http.Transport{}
			defer rt.CloseIdleConnections()
			for j := range 4 * users / clients {
				n := (i*7 + j*clients + i/30) % users
				for again := true; again; { // the ledger has not stored the counters that could be dropped
					status, header := p.send(rt, tokens[0], chatBody(fmt.Sprintf(`"user":"u%d",`, n)+tinyBody))
					again = status == 429 && header.Get("Retry-After") != ""
					switch status {
					case 200:
						answered[n].Add(1)
					case 429:
					case 503: // the server of all tests may be too slow to read a value's sums in time
						if again = usesTestDatabase(); !again {
							t.Errorf("got %d", status)
						}
					default:
						t.Errorf("got %d", status)
					}
				}
			}
		})
	}
	all.Wait()
	p.waitSettled()
	total := int64(0)
	for n := range answered {
		for again := true; again; {
			status, header := p.send(nil, tokens[0], chatBody(fmt.Sprintf(`"user":"u%d",`, n)+tinyBody))
			if status == 200 {
				answered[n].Add(1)
			}
			again = status == 200 || header.Get("Retry-After") != "" // until the ledger has stored other counters
		}
		if got := answered[n].Load(); got != most {
			t.Errorf("u%d got %d calls", n, got)
		}
		total += answered[n].Load()
	}
	if values, count := p.limitValues(path, "?limit_values=500"); len(values) != users+1 || count != users+1 {
		t.Errorf("%d values are listed, %d counted", len(values), count)
	}
	if n := int64(len(p.provider.received())); n != total+1 {
		t.Errorf("the provider got %d calls of %d", n, total+1)
	}
}

// TestValuesOfCalls: which value a call counts for, and what its client is told.
func TestValuesOfCalls(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	awaitClearOfHour(10 * time.Second)
	p.manage("PATCH", "/manage/projects/"+p.project,
		`{"policy":{"attribution":{"tags":["team"],"end_users":"hashed"}}}`, 200, nil)
	limit := func(attribute string) string {
		return `{"count":"requests","max":1,"per":"day","for_each":"` + attribute + `","max_values":4}`
	}
	long := strings.Repeat("x", 64<<10)
	for _, c := range []struct {
		attribute, header string
		values            [2]string // two values, of which each has a call of its own
		same              [2]string // two that are none
	}{
		{"end_user", "X-LLM-Proxy-End-User", [2]string{"caf\u00e9", "cafe\u0301"}, [2]string{"", ""}},
		{"session", "X-LLM-Proxy-Session", [2]string{"a", "A"}, [2]string{"", ""}},
		{"tag:team", "X-LLM-Proxy-Tags", [2]string{"team=a", "team=b"}, [2]string{"", ""}},
		{"end_user", "", [2]string{"a", "b"}, [2]string{long, "a\u0000b"}},
	} {
		path, token := p.newLimitedToken(limit(c.attribute))
		call := func(value string) testResponse {
			headers := []string{"Authorization", "Bearer " + token, "Content-Type", "application/json"}
			body := `"a":1`
			if c.header == "" {
				body = `"user":` + quote(value)
			} else if value != "" {
				headers = append(headers, c.header, value)
			}
			return p.do("POST", "/v1/chat/completions", chatBody(body), headers...)
		}
		for i, value := range [...]string{c.values[0], c.values[1], c.same[0]} {
			res := call(value)
			if left := res.header.Get("X-Ratelimit-Remaining-Requests"); res.status != 200 || left != "0" {
				t.Errorf("%s %d: got %d, %q left", c.attribute, i, res.status, left)
			}
		}
		for i, value := range [...]string{c.values[0], c.values[1], c.same[1]} {
			res := call(value)
			if res.status != 429 || !strings.Contains(res.body, "for each") || strings.Contains(res.body, "caf") {
				t.Errorf("%s %d: got %d %s", c.attribute, i, res.status, res.body)
			}
		}
		if values, count := p.limitValues(path, "?limit_values=500"); len(values) != 3 || count != 3 {
			t.Errorf("%s: %+v", c.attribute, values)
		}
	}
	// A name finds the hash, in the API and on the page. No other name does.
	path, named := p.newLimitedToken(limit("end_user"))
	p.sendAs(named, "ann")
	p.waitSettled()
	ann, _ := p.limitValues(path, "?limit_value=ann")
	b, page := p.signIn(p.adminKey), strings.Replace(path, "/manage/", "/admin/", 1)
	for hash, v := range ann {
		if len(ann) != 1 || !isEndUserHash(hash) || v.Used != 1 {
			t.Errorf("ann is %+v", ann)
		}
		if again, _ := p.limitValues(path, "?limit_value="+hash); again[hash].Used != 1 {
			t.Errorf("%s is %+v", hash, again)
		}
		for query, want := range map[string]bool{"": true, "?value=ann": true, "?value=" + hash: true,
			"?value=bob": false} {
			if shown := b.get(page + "/values" + query).body; strings.Contains(shown, hash+"</a>") != want {
				t.Errorf("values%s: %s", query, shown)
			}
		}
		if body := b.get(page).body; !strings.Contains(body, `href="`+page+`/values"`) {
			t.Errorf("the token's page has no link: %s", body)
		}
	}
	if bob, _ := p.limitValues(path, "?limit_value=bob"); len(ann) != 1 || len(bob) != 0 {
		t.Errorf("ann is %+v, bob %+v", ann, bob)
	}
	none := b.get("/admin/projects/" + p.project + "/values").body
	if !strings.Contains(none, "No limit counts values.") {
		t.Errorf("the project's values: %s", none)
	}
	path, shown := p.newLimitedToken(limit("session"))
	p.do("POST", "/v1/chat/completions", chatBody(), "Authorization", "Bearer "+shown, "Content-Type",
		"application/json", "X-LLM-Proxy-Session", "<b>s1")
	page = b.get(strings.Replace(path, "/manage/", "/admin/", 1)).body
	if !strings.Contains(page, "for each session") || !strings.Contains(page, "&lt;b&gt;s1") ||
		!strings.Contains(page, "1 each; 1 of 4 values counted") {
		t.Errorf("the token's page is %s", page)
	}
	// A token's client sees the limit, but nobody's name.
	_, token := p.newLimitedToken(limit("end_user"))
	if status := p.sendAs(token, "ann"); status != 200 {
		t.Fatal(status)
	}
	res := p.do("GET", ownTokenPath, "", "Authorization", "Bearer "+token)
	if !strings.Contains(res.body, `"for_each":"end_user"`) || !strings.Contains(res.body, `"value_count":1`) ||
		strings.Contains(res.body, `"values"`) {
		t.Errorf("the token's client sees %s", res.body)
	}
}

// TestValuesErased: erasing an end user forgets what it has used of limits for each end user, in memory and in the
// store, and nothing else. The calls that run meanwhile count anew.
func TestValuesErased(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	awaitClearOfHour(10 * time.Second)
	const day = `{"count":"requests","max":3,"per":"day","for_each":"`
	users, byUser := p.newLimitedToken(day + `end_user"}`)
	sessions, bySession := p.newLimitedToken(day + `session"}`)
	used := func(path, value string) float64 {
		p.waitSettled()
		values, _ := p.limitValues(path, "?limit_value="+value)
		return values[value].Used
	}
	send := func(token, user string, times int) {
		for range times {
			res := p.do("POST", "/v1/chat/completions", chatBody(`"user":"`+user+`"`), "Authorization", "Bearer "+token,
				"Content-Type", "application/json", "X-LLM-Proxy-Session", "bob")
			if res.status != 200 {
				t.Errorf("%s: %d %s", user, res.status, res.body)
			}
		}
	}
	send(byUser, "ann", 2)
	send(byUser, "bob", 2)
	send(bySession, "ann", 2)
	release := make(chan struct{})
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		if c.chunk("data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n") != nil {
			return false
		}
		<-release
		return c.chunk("data: [DONE]\n\n") == nil && c.chunk("") == nil
	})
	running := p.stream(byUser, `"user":"ann"`)
	if _, err := running.read(1); err != nil {
		t.Fatal(err)
	}
	erase := func(name string) {
		p.manage("DELETE", "/manage/projects/"+p.project+"/end-users?end_user="+name, "", 200, nil)
	}
	erase("ann")
	close(release)
	if _, err := running.readAll(); err != nil {
		t.Error(err)
	}
	p.provider.setScript(chatScript)
	check := func(when string, ann, bob, session float64) {
		a, b, s := used(users, "ann"), used(users, "bob"), used(sessions, "bob")
		if a != ann || b != bob || s != session {
			t.Errorf("%s: ann has used %v, bob %v, the session %v; want %v, %v, %v", when, a, b, s, ann, bob, session)
		}
	}
	check("ann erased", 1, 2, 2)
	send(byUser, "ann", 2)
	if status := p.sendAs(byUser, "ann"); status != 429 {
		t.Errorf("ann's fourth call: %d", status)
	}
	erase("bob") // who is also a session, of another limit, which stays
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	check("after a restart", 3, 0, 2)
	send(byUser, "bob", 3)
}

// TestValuesBefore: a limit that is set on a project or token with history counts what each value has used before, in
// the window, and what runs at that moment. That holds after a change, a restart and a kill, and in reports.
func TestValuesBefore(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	awaitClearOfHour(20 * time.Second)
	id, token := p.newToken(`"name":"l"`)
	other := p.token
	path := "/manage/tokens/" + id
	send := func(q *testProxy, token, user, path, body string) int {
		return q.do("POST", path, body, "Authorization", "Bearer "+token, "Content-Type", "application/json",
			"X-LLM-Proxy-End-User", user).status
	}
	chats := func(q *testProxy, token, user string, times int) (answered int) {
		for range times {
			if send(q, token, user, "/v1/chat/completions", chatBody()) == 200 {
				answered++
			}
		}
		return answered
	}
	chats(p, token, "ann", 3)
	chats(p, token, "bob", 1)
	chats(p, other, "bob", 2)
	send(p, token, "bob", "/v1/embeddings", `{"model":"text-embedding-3-small","input":"a"}`)
	send(p, token, "ann", "/v1/chat/completions", `{`) // refused calls do not count
	p.provider.setScript(endlessScript)
	running, err := p.openCall(t.Context(), token, "/v1/chat/completions",
		chatBody(`"stream":true,"user":"ann"`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := running.read(1); err != nil {
		t.Fatal(err)
	}
	p.provider.setScript(chatScript)
	limit := func(max int, more string) string {
		return fmt.Sprintf(`{"policy":{"limits":[{"count":"requests","max":%d,"per":"day","for_each":"end_user"%s}]}}`,
			max, more)
	}
	check := func(when string, q *testProxy, path string, want map[string]float64) {
		t.Helper()
		all, _ := q.limitValues(path, "?limit_values=9")
		for user, n := range want {
			one, _ := q.limitValues(path, "?limit_value="+user)
			if all[user].Used+all[user].Reserved != n || one[user].Used+one[user].Reserved != n {
				t.Errorf("%s, %s: %s is %+v of all, and alone %+v; want %v", when, path, user, all[user], one[user], n)
			}
		}
		if len(all) != len(want) {
			t.Errorf("%s, %s: %+v", when, path, all)
		}
	}
	project := "/manage/projects/" + p.project
	p.manage("PATCH", path, limit(6, ""), 200, nil)
	p.manage("PATCH", project, limit(50, `,"endpoint":"/v1/chat/*"`), 200, nil)
	check("at once", p, path, map[string]float64{"ann": 4, "bob": 2})
	check("at once", p, project, map[string]float64{"ann": 4, "bob": 3})
	if n := chats(p, token, "bob", 2); n != 2 {
		t.Errorf("bob made %d calls", n)
	}
	p.manage("PATCH", path, limit(6, `,"max_values":7`), 200, nil)
	running.body.Close()
	p.waitSettled()
	check("after calls", p, path, map[string]float64{"ann": 4, "bob": 4})
	check("after calls", p, project, map[string]float64{"ann": 4, "bob": 5})
	check("after a kill", p.crashedCopy(), path, map[string]float64{"ann": 4, "bob": 4})
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	check("after a restart", p, path, map[string]float64{"ann": 4, "bob": 4})
	if ann, bob, eve := chats(p, token, "ann", 9), chats(p, token, "bob", 9), chats(p, token, "eve", 9); ann != 2 ||
		bob != 2 || eve != 6 {
		t.Errorf("ann made %d calls more, bob %d, eve %d", ann, bob, eve)
	}
	check("at the end", p, path, map[string]float64{"ann": 6, "bob": 6, "eve": 6})
	// Without the limit, its values use on; it counts that, too, once it is set again.
	p.manage("PATCH", path, `{"policy":{}}`, 200, nil)
	chats(p, token, "eve", 3)
	p.manage("PATCH", path, limit(10, ""), 200, nil)
	check("set again", p, path, map[string]float64{"ann": 6, "bob": 6, "eve": 9})
	if n := chats(p, token, "eve", 3); n != 1 {
		t.Errorf("eve made %d calls more", n)
	}
}
