// These tests check the counters of limits: against a model that adds up all calls again each time, with
// random orders of events, and in parallel.
package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// noon is a Wednesday, far from the edge of any window except the hour's.
const noon = 1_770_811_200_000 // 2026-02-11T12:00:00Z

// testLimits parses a policy's limits.
func testLimits(t testing.TB, text string) *policy {
	t.Helper()
	p, err := parsePolicy([]byte(`{"limits":[`+text+`]}`), false)
	if err != nil {
		t.Fatal(err)
	}
	return &p
}

// newTestLimiter returns a limiter with limits on its project, and a token of the project with limits.
func newTestLimiter(t testing.TB, project, token string, now int64) (*limiter, *limitScope) {
	t.Helper()
	l, s := &limiter{}, &limitScope{}
	l.setPolicy(&l.project, testLimits(t, project), false, now, &pastUse{})
	l.setPolicy(s, testLimits(t, token), true, now, &pastUse{})
	return l, s
}

func chatEstimate(input, output int64) estimate {
	return estimate{
		endpoint: "POST /v1/chat/completions", pattern: "/v1/chat/completions", model: "gpt-4o-mini",
		input: input, output: output, inputCost: input * 100, outputCost: output * 400,
	}
}

// assumedEstimate is chatEstimate for a request that does not limit its output.
func assumedEstimate(input, output int64) estimate {
	e := chatEstimate(input, output)
	e.outputAssumed = true
	return e
}

func (l *limiter) tryReserve(s *limitScope, e estimate, now int64) (*reservation, *limitViolation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := &reservation{estimate: e}
	return r, l.reserve(r, s, now)
}

// settleForwarded settles a call that was forwarded and used tokens.
func (r *reservation) settleForwarded(now, tokens int64) {
	r.settle(now, finalUsage{forwarded: true, tokens: tokens}, func([]limitUse) uint64 { return 0 })
}

// TestWindows: each period's window starts and ends at the calendar's edges in UTC.
func TestWindows(t *testing.T) {
	t.Parallel()
	ms := func(s string) int64 {
		at, err := time.Parse(time.RFC3339, s)
		if err != nil {
			t.Fatal(err)
		}
		return at.UnixMilli()
	}
	for _, c := range []struct {
		per          limitPeriod
		at, from, to string
	}{
		{per: perHour, at: "2026-02-11T12:59:59.999Z", from: "2026-02-11T12:00:00Z", to: "2026-02-11T13:00:00Z"},
		{per: perHour, at: "2026-02-11T13:00:00Z", from: "2026-02-11T13:00:00Z", to: "2026-02-11T14:00:00Z"},
		{per: perDay, at: "2026-02-28T23:59:59Z", from: "2026-02-28T00:00:00Z", to: "2026-03-01T00:00:00Z"},
		// Weeks start on Monday: the 15th is a Sunday.
		{per: perWeek, at: "2026-02-15T23:59:59Z", from: "2026-02-09T00:00:00Z", to: "2026-02-16T00:00:00Z"},
		{per: perWeek, at: "2026-02-16T00:00:00Z", from: "2026-02-16T00:00:00Z", to: "2026-02-23T00:00:00Z"},
		{per: perWeek, at: "2027-01-01T10:00:00Z", from: "2026-12-28T00:00:00Z", to: "2027-01-04T00:00:00Z"},
		{per: perMonth, at: "2028-02-29T12:00:00Z", from: "2028-02-01T00:00:00Z", to: "2028-03-01T00:00:00Z"},
		{per: perMonth, at: "2026-12-31T23:59:59Z", from: "2026-12-01T00:00:00Z", to: "2027-01-01T00:00:00Z"},
	} {
		if from, to := c.per.window(ms(c.at)); from != ms(c.from) || to != ms(c.to) {
			t.Errorf("%s at %s: from %s to %s", c.per, c.at, time.UnixMilli(from).UTC(), time.UnixMilli(to).UTC())
		}
	}
}

// TestValidLimits (LI6): each kind of limit is described in words, and stored so that it reads back the same.
func TestValidLimits(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{"count":"requests","max":60,"per":"minute"}`:                        "60 requests per minute",
		`{"count":"requests","max":0,"per":"lifetime"}`:                       "0 requests in total",
		`{"count":"dollars","max":12.5,"per":"day","endpoint":"/v1/audio/*"}`: "$12.50 per day on /v1/audio/*",
		`{"count":"dollars","max":0.000000001,"per":"hour"}`:                  "$0.000000001 per hour",
		`{"count":"concurrent","max":3,"shadow":true}`:                        "3 calls at one time",
		`{"count":"requests","max":1,"per":"second"}`:                         "1 request per second",
		`{"count":"concurrent","max":1}`:                                      "1 call at one time",
		`{"count":"tokens","max":3000000,"per":"day"}`:                        "3,000,000 tokens per day",
		`{"count":"tokens","max":1000000000000,"per":"month","model":"gpt*"}`: "1,000,000,000,000 tokens per month " +
			"for models gpt*",
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
}

// TestAmounts: money has two significant digits and at least two decimals, numbers are grouped, and durations are in
// plain words and never too short.
func TestAmounts(t *testing.T) {
	t.Parallel()
	for nanos, want := range map[int64]string{
		0: "$0.00", 1: "$0.000000001", 4_200_000: "$0.0042", 4_249_999: "$0.0042", 4_250_000: "$0.0043",
		5_000: "$0.000005", 12_500_000_000: "$12.50", 420_000_000: "$0.42", 425_000_000: "$0.43", 50_000_000: "$0.05",
		99_500_000: "$0.10", 99_400_000: "$0.099", 995_000_000: "$1.00", 10: "$0.00000001", 12: "$0.000000012",
		1_000_000_000: "$1.00", 1_234_567_890_000: "$1,234.57", 50_000_000_000: "$50.00", -4_200_000: "-$0.0042",
		100_000_000_000_000_000: "$100,000,000.00", math.MaxInt64: "$9,223,372,036.85",
		math.MinInt64: "-$9,223,372,036.85",
	} {
		if got := formatMoney(nanos); got != want {
			t.Errorf("%d nano-dollars are %s, want %s", nanos, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0 tokens", 1: "1 token", 999: "999 tokens", 1000: "1,000 tokens",
		3_000_000: "3,000,000 tokens", -1234: "-1,234 tokens"} {
		if got := (&limit{metric: metricTokens}).describe(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
	const s, m, h = time.Second, time.Minute, time.Hour
	for d, want := range map[time.Duration]string{
		0: "0 seconds", -s: "0 seconds", 1: "1 second", s: "1 second", s + 1: "2 seconds", 60*s - 1: "1 minute",
		2 * m: "2 minutes", m + s: "1 minute 1 second", 65 * m: "1 hour 5 minutes", 65*m + 1: "1 hour 6 minutes",
		h: "1 hour", 24*h - 1: "1 day", 23*h + 59*m: "23 hours 59 minutes", 24*h + s: "1 day 1 hour",
		31 * 24 * h: "31 days", 30*24*h + 5*h: "30 days 5 hours",
	} {
		if got := describeDuration(d); got != want {
			t.Errorf("%v: got %s, want %s", d, got, want)
		}
	}
}

// TestInvalidLimits (LI6): the error names the entry and the field, and says what is allowed.
func TestInvalidLimits(t *testing.T) {
	t.Parallel()
	const wholeNumber, dollars = "[0].max: must be a whole number from 0", "[0].max: must be dollars from 0"
	const metrics = "[0].count: must be requests, tokens, dollars or concurrent"
	const periods = "[0].per: must be second, minute, hour"
	for text, want := range map[string]string{
		`{"count":"requests","max":-1,"per":"minute"}`:                  wholeNumber,
		`{"count":"requests","max":9223372036854775808,"per":"minute"}`: wholeNumber,
		`{"count":"requests","max":"5","per":"minute"}`:                 wholeNumber,
		`{"count":"requests","max":1.5,"per":"minute"}`:                 wholeNumber,
		`{"count":"requests","max":1e3,"per":"minute"}`:                 wholeNumber,
		`{"count":"requests","max":null,"per":"minute"}`:                "[0].max: must be a value, not null",
		`{"count":"requests","per":"minute"}`:                           wholeNumber,
		`{"count":"requests","max":5}`:                                  periods,
		`{"count":"requests","max":5,"per":"year"}`:                     periods,
		`{"count":"dollars","max":5,"per":"minute"}`:                    "[0].per: must be hour, day",
		`{"count":"dollars","max":-5,"per":"day"}`:                      dollars,
		`{"count":"dollars","max":0.0000000001,"per":"day"}`:            dollars,
		`{"count":"dollars","max":100000001,"per":"day"}`:               dollars,
		`{"count":"concurrent","max":3,"per":"day"}`:                    "[0].per: is not allowed with concurrent",
		`{"count":"calls","max":3,"per":"day"}`:                         metrics,
		`{"max":3,"per":"day"}`:                                         metrics,
		`{"count":"requests","max":3,"per":"day","model":"a*b"}`:        "[0].model: may have * only at the end",
		`{"count":"requests","max":3,"per":"day","model":""}`:           "[0].model: must have 1 to 256 bytes",
		`{"count":"requests","max":3,"per":"day","endpoint":"chat"}`:    "[0].endpoint: must name endpoints",
		`{"count":"requests","max":3,"per":"day","shadow":1}`:           "[0].shadow: must be true or false",
		`{"count":"requests","max":3,"per":"day","burst":1}`:            "[0].burst: is not a known field",
		`{"count":"requests","max":3,"per":"day","max":4}`:              "[0].max: is given twice",
		`3`:                              "[0]: must be an object",
		strings.Repeat(`{},`, 20) + `{}`: ": must have 20 entries or fewer",
		`{"count":"requests","max":3,"per":"day"},
			{"count":"requests","max":4,"per":"day"}`: "[1]: counts the same as policy.limits[0]",
	} {
		_, err := parsePolicy([]byte(`{"limits":[`+text+`]}`), false)
		if err == nil || !strings.HasPrefix(err.Error(), "policy.limits"+want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

// TestBucket (LI2, LI3): a new bucket has max at once, then exactly what refills, without drift at any step
// size.
func TestBucket(t *testing.T) {
	t.Parallel()
	for _, step := range []int64{1, 3, 7, 100, 999, 61_001} {
		l, s := newTestLimiter(t, ``, `{"count":"requests","max":7,"per":"minute"}`, noon)
		accepted := int64(0)
		end := min(noon+3_600_000, noon+500_000*step)
		for now := int64(noon); now <= end; now += step {
			r, v := l.tryReserve(s, chatEstimate(1, 1), now)
			for ; v == nil; r, v = l.tryReserve(s, chatEstimate(1, 1), now) {
				accepted++
				r.settleForwarded(now, 0)
			}
			if v.wait < 1 || v.wait > 60_000/7+1 {
				t.Fatalf("the wait is %d ms", v.wait)
			}
			if _, early := l.tryReserve(s, chatEstimate(1, 1), now+v.wait-1); early == nil && v.wait > 1 {
				t.Fatalf("a call was admitted before the wait of %d ms was over", v.wait)
			}
			if most := 7 + 7*(now-noon)/60_000; accepted > most || step < 7000 && accepted < most {
				t.Fatalf("steps of %d ms: %d accepted after %d ms, want %d", step, accepted, now-noon, most)
			}
		}
	}
}

// TestRetryAfterIsHonest (LI12): a call that waits for the given time is admitted, and the time is not longer
// than necessary. The test is about elapsed time, on synctest's clock.
func TestRetryAfterIsHonest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start, now := time.Now(), func() int64 { return time.Now().UnixMilli() }
		l, s := newTestLimiter(t, `{"count":"requests","max":5,"per":"second"}`,
			`{"count":"requests","max":20,"per":"hour"}`, now())
		for i := range 40 {
			r, v := l.tryReserve(s, chatEstimate(1, 1), now())
			if v != nil {
				time.Sleep(time.Duration(v.wait) * time.Millisecond)
				if r, v = l.tryReserve(s, chatEstimate(1, 1), now()); v != nil {
					t.Fatalf("call %d was refused after the wait: %+v", i, v)
				}
			}
			r.settleForwarded(now(), 0)
		}
		// 20 in the first hour, the others from the full hour on, five of them at once.
		if took := time.Since(start); took > time.Hour+4*time.Second || took < 4*time.Second {
			t.Errorf("40 calls took %v", took)
		}
	})
}

// TestExactInParallel (LI1): of many parallel calls exactly the limit is admitted, and everything reserved is
// released afterwards.
func TestExactInParallel(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		`{"count":"requests","max":100,"per":"second"}`,
		`{"count":"requests","max":100,"per":"day"}`,
		`{"count":"requests","max":100,"per":"lifetime"}`,
		`{"count":"concurrent","max":100}`,
		`{"count":"tokens","max":1000,"per":"minute"}`,
		`{"count":"tokens","max":1000,"per":"month"}`,
		`{"count":"dollars","max":0.00025,"per":"week"}`, // 100 calls of 2500 nano-dollars
	} {
		for _, ofProject := range []bool{false, true} {
			project, token := ``, text
			if ofProject {
				project, token = token, project
			}
			l, s := newTestLimiter(t, project, token, noon)
			for round := range 2 {
				var mu sync.Mutex
				var admitted []*reservation
				statuses := callAtOnce(1000, func(int) int {
					r, v := l.tryReserve(s, chatEstimate(5, 5), noon)
					if v != nil {
						return 429
					}
					mu.Lock()
					defer mu.Unlock()
					admitted = append(admitted, r)
					return 200
				})
				if statuses[200] != 100 {
					t.Errorf("%s, of the project %v, round %d: %d of 1000 were admitted, want 100",
						text, ofProject, round, statuses[200])
				}
				callAtOnce(len(admitted), func(i int) int { // as if no call was forwarded
					admitted[i].settle(noon, finalUsage{}, func([]limitUse) uint64 { return 0 })
					return 0
				})
			}
			if l.running != nil {
				t.Errorf("%s: reservations remain", text)
			}
		}
	}
}

// TestEstimates: how many tokens and dollars a call reserves.
func TestEstimates(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		limit    string
		estimate estimate
		quantity int64
	}{
		{`{"count":"tokens","max":10000,"per":"day"}`, chatEstimate(100, 500), 600},
		{`{"count":"tokens","max":10000,"per":"day"}`, assumedEstimate(100, 4096), 100 + 2500},
		{`{"count":"tokens","max":1000000,"per":"day"}`, assumedEstimate(100, 4096), 100 + 4096},
		{`{"count":"tokens","max":50,"per":"day"}`, assumedEstimate(100, 4096), 50},
		{`{"count":"tokens","max":0,"per":"day"}`, assumedEstimate(100, 4096), 1},
		{`{"count":"tokens","max":50,"per":"day"}`, estimate{}, 0},
		{`{"count":"dollars","max":1,"per":"day"}`, chatEstimate(100, 500), 100*100 + 500*400},
		{`{"count":"dollars","max":0.0001,"per":"day"}`, assumedEstimate(100, 4096), 10000 + 25000},
		{`{"count":"requests","max":5,"per":"day"}`, estimate{}, 1},
	} {
		if got := c.estimate.quantityFor(&testLimits(t, c.limit).Limits[0]); got != c.quantity {
			t.Errorf("%s, %+v: reserves %d, want %d", c.limit, c.estimate, got, c.quantity)
		}
	}
	chat, speech := &endpoint{meter: meterOpenAI}, &endpoint{meter: meterNone}
	for _, c := range []struct {
		endpoint *endpoint
		form     bool
		size     int
		want     int64
	}{
		{endpoint: chat, size: 1 << 20, want: 1 << 18},
		{endpoint: speech, size: 1 << 20, want: 0},
		{endpoint: chat, form: true, size: 20_000, want: 5000},
		{endpoint: chat, form: true, size: 1 << 20, want: 8192 + (1<<20-32<<10)/64},
	} {
		request := &clientRequest{endpoint: c.endpoint, form: c.form, body: make([]byte, c.size)}
		if got := request.inputEstimate(); got != c.want {
			t.Errorf("%d bytes, a form %v: %d tokens, want %d", c.size, c.form, got, c.want)
		}
	}
	l, s := newTestLimiter(t, ``, `{"count":"tokens","max":100,"per":"day"}`, noon)
	if _, v := l.tryReserve(s, chatEstimate(10, 101), noon); v == nil || !v.exceedsMax {
		t.Errorf("more output than the limit ever allows: %+v", v)
	}
}

// TestDebt (LI13): use beyond the estimate delays other calls in a bucket, by at most one more period. A
// window never carries it over.
func TestDebt(t *testing.T) {
	t.Parallel()
	l, s := newTestLimiter(t, `{"count":"tokens","max":1000,"per":"hour"}`,
		`{"count":"tokens","max":1000,"per":"minute"}`, noon)
	r, _ := l.tryReserve(s, chatEstimate(50, 50), noon)
	r.settleForwarded(noon, 1_000_000)
	if _, v := l.tryReserve(s, chatEstimate(5, 5), noon+60_000); v == nil || !v.ofProject {
		t.Errorf("after a debt: %+v", v)
	}
	at := int64(noon + 3_600_000)
	r, v := l.tryReserve(s, chatEstimate(5, 5), at)
	if v != nil {
		t.Fatalf("the next hour: %+v", v)
	}
	r.settle(at, finalUsage{tokens: 10}, func([]limitUse) uint64 { return 0 })
	if used := s.counters[0].used; used != 10*60_000 {
		t.Errorf("an hour later the bucket has %d", used)
	}
}

// TestSpentBudgetEndsStreams: use beyond a budget and its allowance ends calls, whether or not they limit their
// output.
func TestSpentBudgetEndsStreams(t *testing.T) {
	t.Parallel()
	l, s := newTestLimiter(t, ``, `{"count":"tokens","max":1000,"per":"day"},
		{"count":"tokens","max":100,"per":"week","shadow":true}`, noon)
	limited, _ := l.tryReserve(s, chatEstimate(100, 400), noon)
	unlimited, _ := l.tryReserve(s, assumedEstimate(50, 4096), noon)
	if exceeded := limited.updateUsage(noon, 400); exceeded != nil { // all that it named, and its input
		t.Errorf("500 of 1000 exceed %s", exceeded)
	}
	if exceeded := unlimited.updateUsage(noon, 550); exceeded != nil { // 500 + 600 = 1100: at the edge
		t.Errorf("1100 of 1000 exceed %s", exceeded)
	}
	if limited.updateUsage(noon, 401) == nil || unlimited.updateUsage(noon, 0) == nil {
		t.Error("1101 of 1000 exceed no limit")
	}
	unlimited.settleForwarded(noon, 600)
	limited.settleForwarded(noon, 120)
	if c := s.counters[0]; c.used != 720 || c.reserved != 0 {
		t.Errorf("settled to %d used, %d reserved", c.used, c.reserved)
	}
}

// TestPolicyChangeKeepsCounts (LI8): a limit that counts the same keeps its count, a new limit starts with
// the past use and the running calls, and a removed limit leaves nothing behind.
func TestPolicyChangeKeepsCounts(t *testing.T) {
	t.Parallel()
	l, s := newTestLimiter(t, ``, `{"count":"requests","max":10,"per":"day"},{"count":"concurrent","max":9}`, noon)
	var running []*reservation
	for range 3 {
		r, _ := l.tryReserve(s, chatEstimate(10, 10), noon)
		running = append(running, r)
	}
	p := testLimits(t, `{"count":"requests","max":4,"per":"day"},{"count":"tokens","max":1000,"per":"day"},
		{"count":"requests","max":50,"per":"week","model":"other"}`)
	if !s.needsHistory(p) {
		t.Error("two new limits need no history")
	}
	past := &pastUse{used: map[limitKey]int64{}}
	for i := range p.Limits {
		past.used[p.Limits[i].key()] = int64(p.Limits[i].period) * 7
	}
	l.setPolicy(s, p, true, noon, past)
	got := fmt.Sprint(s.counters[0].used, s.counters[1].used, s.counters[1].reserved, s.counters[2].used)
	if want := fmt.Sprint(3, int64(perDay)*7, 60, int64(perWeek)*7); got != want {
		t.Errorf("after the change: %s, want %s", got, want)
	}
	if s.needsHistory(p) {
		t.Error("limits that have their history need it again")
	}
	for _, r := range running {
		r.settleForwarded(noon, 15)
	}
	if c := s.counters[1]; c.used != int64(perDay)*7+45 || c.reserved != 0 {
		t.Errorf("the new limit settled to %d used, %d reserved", c.used, c.reserved)
	}
	if _, v := l.tryReserve(s, chatEstimate(1, 1), noon); v != nil {
		t.Errorf("the fourth of four: %+v", v)
	}
	if _, v := l.tryReserve(s, chatEstimate(1, 1), noon); v == nil || !v.limit.isQuota() {
		t.Errorf("the fifth of four: %+v", v)
	}
}

// A limitModel is one token limit and a project's limit of 5 running calls. It keeps all calls and adds them up
// again each time.
type limitModel struct {
	random   *rand.Rand
	limit    *limit
	now      int64
	from, to int64 // the window around now
	calls    []*modelCall

	limiter *limiter
	token   *limitScope
}

// A modelCall is a call in a limitModel.
type modelCall struct {
	reservation      *reservation
	window, reserved int64 // the window in which it started, what it reserved
	used             int64 // at least so much, so far or in the end
	ended            bool
}

func newLimitModel(t *testing.T, seed uint64) *limitModel {
	t.Helper()
	m := &limitModel{random: rand.New(rand.NewPCG(seed, 1)), now: noon}
	m.limit = &limit{
		period: []limitPeriod{perHour, perDay, perWeek, perMonth, perLifetime}[m.random.IntN(5)],
		metric: []limitMetric{metricRequests, metricTokens, metricDollars}[m.random.IntN(3)],
		max:    int64(20 + m.random.IntN(2000)),
	}
	text, _ := json.Marshal(m.limit)
	m.limiter, m.token = newTestLimiter(t, `{"count":"concurrent","max":5}`, string(text), m.now)
	m.from, m.to = m.limit.period.window(m.now)
	return m
}

// total returns what is used and reserved in the current window, and the number of running calls.
func (m *limitModel) total() (n, running int64) {
	for _, c := range m.calls {
		if !c.ended {
			running++
		}
		if c.window != m.from {
			continue
		}
		if n += c.used; !c.ended {
			n += max(0, c.reserved-c.used)
		}
	}
	return n, running
}

// passTime lets time pass, or sets the clock back a little.
func (m *limitModel) passTime() {
	m.now += m.random.Int64N(max(1, m.to-m.from)/3+1) - min(5000, max(1, m.to-m.from)/10)
	if m.to > 0 && m.now >= m.to {
		m.from, m.to = m.limit.period.window(m.now)
	}
}

// reserve starts a call. It returns an error if the limiter admits it and the model does not, or the reverse.
func (m *limitModel) reserve() error {
	e := chatEstimate(m.random.Int64N(50), m.random.Int64N(50)+1)
	e.outputAssumed = m.random.IntN(2) == 0
	total, running := m.total()
	need := e.quantityFor(m.limit)
	r, v := m.limiter.tryReserve(m.token, e, m.now)
	if fits := total+need <= m.limit.max && running < 5 && !e.exceedsMax(m.limit); (v == nil) != fits {
		return fmt.Errorf("%s has %d used and reserved, %d running; %d more: %+v", m.limit, total, running, need, v)
	}
	if v == nil {
		c := &modelCall{reservation: r, window: m.from, reserved: need}
		if m.limit.metric == metricRequests {
			c.used = 1
		}
		m.calls = append(m.calls, c)
	}
	return nil
}

// progress reports to the limiter how many tokens a call has used so far.
func (m *limitModel) progress(c *modelCall) {
	output, e := m.random.Int64N(80), &c.reservation.estimate
	if m.limit.metric == metricRequests {
		return
	}
	c.reservation.updateUsage(m.now, output)
	used := e.input + output
	if m.limit.metric == metricDollars {
		used = e.inputCost + output*400
	}
	if c.window == m.from {
		c.used = max(c.used, used)
	}
}

// settle ends a call.
func (m *limitModel) settle(c *modelCall) {
	usage := finalUsage{
		forwarded: m.random.IntN(4) > 0, tokens: m.random.Int64N(200), dollars: m.random.Int64N(100_000)}
	c.reservation.settle(m.now, usage, func([]limitUse) uint64 { return 0 })
	c.ended = true
	if m.limit.metric != metricRequests {
		c.used = usage.value(m.limit.metric)
	} else if !usage.forwarded {
		c.used = 0
	}
}

// check compares the limiter's counters with the sums of the model.
func (m *limitModel) check() error {
	total, running := m.total()
	c := m.token.counters[0]
	c.advance(m.now)
	if got := m.limiter.project.counters[0].reserved; c.used+c.reserved != total || running != got {
		return fmt.Errorf("%s has %d used and %d reserved, the model %d; %d running, the model %d",
			c.limit, c.used, c.reserved, total, got, running)
	}
	return nil
}

// TestAgainstModel: random orders of reserving, settling, abandoning, progress, passing time and clock jumps,
// compared with a model.
func TestAgainstModel(t *testing.T) {
	t.Parallel()
	for seed := range uint64(200) {
		m := newLimitModel(t, seed)
		for step := range 400 {
			var err error
			switch event := m.random.IntN(8); {
			case event == 0:
				m.passTime()
			case event <= 3:
				err = m.reserve()
			case len(m.calls) > 0:
				c := m.calls[m.random.IntN(len(m.calls))]
				switch progress := m.random.IntN(3) > 0; {
				case c.ended:
				case progress:
					m.progress(c)
				default:
					m.settle(c)
				}
			}
			if err = cmp.Or(err, m.check()); err != nil {
				t.Fatalf("seed %d step %d: %v", seed, step, err)
			}
		}
	}
}

// tenLimits apply to every call and refuse none here.
const tenLimits = `{"count":"requests","max":1000000000,"per":"second"},
	{"count":"requests","max":1000000000000,"per":"minute"},
	{"count":"requests","max":1000000000000,"per":"hour","model":"gpt-4o*"},
	{"count":"requests","max":1000000000000,"per":"day","endpoint":"/v1/chat/completions"},
	{"count":"tokens","max":1000000000000,"per":"minute"},
	{"count":"tokens","max":1000000000000,"per":"day"},
	{"count":"tokens","max":1000000000000,"per":"month"},
	{"count":"concurrent","max":1000000},
	{"count":"dollars","max":100000000,"per":"day"},
	{"count":"dollars","max":100000000,"per":"month","shadow":true}`

// BenchmarkAdmission measures reserve and settle with ten limits on the project and ten on the token.
func BenchmarkAdmission(b *testing.B) {
	l, s := newTestLimiter(b, tenLimits, tenLimits, noon)
	now := int64(noon)
	e := chatEstimate(100, 200)
	r := &reservation{}
	b.ReportAllocs()
	for b.Loop() {
		*r = reservation{estimate: e}
		l.mu.Lock()
		if l.reserve(r, s, now) != nil {
			b.Fatal("refused")
		}
		l.mu.Unlock()
		r.settle(now, finalUsage{forwarded: true, tokens: 250, dollars: 40_000}, func([]limitUse) uint64 { return 0 })
		now++
	}
}

// BenchmarkLiveTokens measures the memory of 100,000 live tokens with three limits each.
func BenchmarkLiveTokens(b *testing.B) {
	const tokens = 100_000
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		g := newRegistry(nil, nil, nil, nil, true)
		project := &liveProject{}
		project.state.Store(&projectState{id: "proj_x"})
		for i := range tokens {
			row := &tokenRow{seq: int64(i), id: fmt.Sprintf("tok_%08d", i), name: fmt.Sprintf("client %d", i),
				hash: make([]byte, 32), policy: `{"limits":[{"count":"requests","max":60,"per":"minute"},
					{"count":"dollars","max":50,"per":"month"},{"count":"concurrent","max":5}]}`}
			copy(row.hash, fmt.Sprint(i))
			st, err := newTokenState(row)
			if err != nil {
				b.Fatal(err)
			}
			t := &liveToken{project: project}
			t.state.Store(st)
			project.limiter.setPolicy(&t.limits, &st.policy, true, noon, &pastUse{})
			g.byHash[st.hash], g.byID[strings.Clone(st.id)] = t, t
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MiB")
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/tokens, "B/token")
		runtime.KeepAlive(g)
	}
}

// TestWindowEdges (LI4): clients that call without a pause across the edges of windows get exactly the limit
// in each window.
func TestWindowEdges(t *testing.T) {
	t.Parallel()
	const windows = 5 // complete ones
	for per, step := range map[limitPeriod]time.Duration{
		perHour: 20 * time.Second, perDay: 7 * time.Minute, perWeek: 53 * time.Minute, perMonth: 4 * time.Hour,
	} {
		l, s := newTestLimiter(t, ``, `{"count":"requests","max":10,"per":"`+per.String()+`"}`, noon)
		admitted := map[int64]int{}
		last := int64(0) // the window that has just started
		for now := int64(noon); len(admitted) <= windows; now += step.Milliseconds() {
			from, to := per.window(now)
			last = from
			for range 3 {
				r, v := l.tryReserve(s, chatEstimate(1, 1), now)
				if v == nil {
					admitted[from]++
					r.settleForwarded(now, 0)
				} else if v.wait != to-now {
					t.Fatalf("%s: the wait is %d ms, %d before the edge", per, v.wait, to-now)
				}
			}
		}
		for from, n := range admitted {
			if from != last && n != 10 {
				t.Errorf("%s from %s: %d calls", per, time.UnixMilli(from).UTC(), n)
			}
		}
	}
}

// TestCallsOutliveTheirToken (LI11): a call's use is recorded for its token and project, even if both ended
// while it ran.
func TestCallsOutliveTheirToken(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"limits":[
		{"count":"tokens","max":1000000,"per":"day"},{"count":"concurrent","max":100}]}}`, 200, nil)
	p.provider.setScript(endlessScript)
	const calls = 20
	for range calls {
		if _, err := p.stream(p.token, `"max_tokens":50`).read(1); err != nil {
			t.Fatal(err)
		}
	}
	p.manage("DELETE", "/manage/tokens/"+p.tokenID, "", 200, nil)
	p.manage("DELETE", "/manage/projects/"+p.project, "", 200, nil)
	rows := p.ledger()
	if len(rows) != calls {
		t.Fatalf("%d of %d calls are on record", len(rows), calls)
	}
	for _, row := range rows {
		if row.TokenID != p.tokenID || row.InputTokens == 0 || row.Outcome != string(outcomeTruncated) {
			t.Errorf("the ledger has %+v", row)
		}
	}
	l := &p.instance.registry.liveToken(p.tokenID).project.limiter
	if l.running != nil || l.project.counters[1].reserved != 0 || l.project.counters[0].reserved != 0 {
		t.Error("reservations remain")
	}
}
