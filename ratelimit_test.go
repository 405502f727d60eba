// These tests check the counters of limits: against a model that adds up all calls again each time, with
// random orders of events, and in parallel.
package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
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

// newLimiter returns a limiter with limits on a project and on one of its tokens.
func newTestLimiter(t testing.TB, project, token string, now int64) (*limiter, *limitScope) {
	t.Helper()
	l, s := &limiter{}, &limitScope{}
	none := func(*limit) int64 { return 0 }
	l.setPolicy(&l.project, testLimits(t, project), now, none)
	l.setPolicy(s, testLimits(t, token), now, none)
	return l, s
}

func chatEstimate(input, output int64) estimate {
	return estimate{endpoint: "POST /v1/chat/completions", pattern: "/v1/chat/completions", model: "gpt-4o-mini", input: input, output: output,
		inputCost: input * 100, outputCost: output * 400}
}

func (l *limiter) tryReserve(s *limitScope, a estimate, now int64) (*reservation, *limitViolation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := &reservation{estimate: a}
	return h, l.reserve(h, s, now)
}

func TestWindows(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		per          limitPeriod
		at, from, to string
	}{
		{perHour, "2026-02-11T12:59:59.999Z", "2026-02-11T12:00:00Z", "2026-02-11T13:00:00Z"},
		{perHour, "2026-02-11T13:00:00Z", "2026-02-11T13:00:00Z", "2026-02-11T14:00:00Z"},
		{perDay, "2026-02-28T23:59:59Z", "2026-02-28T00:00:00Z", "2026-03-01T00:00:00Z"},
		{perWeek, "2026-02-15T23:59:59Z", "2026-02-09T00:00:00Z", "2026-02-16T00:00:00Z"}, // a Sunday
		{perWeek, "2026-02-16T00:00:00Z", "2026-02-16T00:00:00Z", "2026-02-23T00:00:00Z"},
		{perWeek, "2027-01-01T10:00:00Z", "2026-12-28T00:00:00Z", "2027-01-04T00:00:00Z"},
		{perMonth, "2028-02-29T12:00:00Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"},
		{perMonth, "2026-12-31T23:59:59Z", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"},
	} {
		ms := func(s string) int64 {
			at, err := time.Parse(time.RFC3339, s)
			if err != nil {
				t.Fatal(err)
			}
			return at.UnixMilli()
		}
		if from, to := test.per.window(ms(test.at)); from != ms(test.from) || to != ms(test.to) {
			t.Errorf("%s at %s: from %s to %s", test.per, test.at, time.UnixMilli(from).UTC(), time.UnixMilli(to).UTC())
		}
	}
}

// TestLimitRules (LI6): which lists of limits are valid, and the errors for the others.
func TestLimitRules(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{"count":"requests","max":60,"per":"minute"}`:                           "60 requests per minute",
		`{"count":"requests","max":0,"per":"lifetime"}`:                          "0 requests in total",
		`{"count":"tokens","max":1000000000000,"per":"month","model":"gpt-4o*"}`: "1000000000000 tokens per month for models gpt-4o*",
		`{"count":"dollars","max":12.5,"per":"day","endpoint":"/v1/audio/*"}`:    "$12.5 per day on /v1/audio/*",
		`{"count":"dollars","max":0.000000001,"per":"hour"}`:                     "$0.000000001 per hour",
		`{"count":"concurrent","max":3,"shadow":true}`:                           "3 calls at one time",

		`{"count":"requests","max":-1,"per":"minute"}`:                  "policy.limits[0].max: must be a whole number from 0",
		`{"count":"requests","max":9223372036854775808,"per":"minute"}`: "policy.limits[0].max: must be a whole number from 0",
		`{"count":"requests","max":"5","per":"minute"}`:                 "policy.limits[0].max: must be a whole number from 0",
		`{"count":"requests","max":1.5,"per":"minute"}`:                 "policy.limits[0].max: must be a whole number from 0",
		`{"count":"requests","max":1e3,"per":"minute"}`:                 "policy.limits[0].max: must be a whole number from 0",
		`{"count":"requests","max":null,"per":"minute"}`:                "policy.limits[0].max: must be a value, not null",
		`{"count":"requests","per":"minute"}`:                           "policy.limits[0].max: must be a whole number from 0",
		`{"count":"requests","max":5}`:                                  "policy.limits[0].per: must be second, minute, hour",
		`{"count":"requests","max":5,"per":"year"}`:                     "policy.limits[0].per: must be second, minute, hour",
		`{"count":"dollars","max":5,"per":"minute"}`:                    "policy.limits[0].per: must be hour, day",
		`{"count":"dollars","max":-5,"per":"day"}`:                      "policy.limits[0].max: must be dollars from 0",
		`{"count":"dollars","max":0.0000000001,"per":"day"}`:            "policy.limits[0].max: must be dollars from 0",
		`{"count":"dollars","max":100000001,"per":"day"}`:               "policy.limits[0].max: must be dollars from 0",
		`{"count":"concurrent","max":3,"per":"day"}`:                    "policy.limits[0].per: is not allowed with concurrent",
		`{"count":"calls","max":3,"per":"day"}`:                         "policy.limits[0].count: must be requests, tokens, dollars or concurrent",
		`{"max":3,"per":"day"}`:                                         "policy.limits[0].count: must be requests, tokens, dollars or concurrent",
		`{"count":"requests","max":3,"per":"day","model":"a*b"}`:        "policy.limits[0].model: may have * only at the end",
		`{"count":"requests","max":3,"per":"day","model":""}`:           "policy.limits[0].model: must have 1 to 256 bytes",
		`{"count":"requests","max":3,"per":"day","endpoint":"chat"}`:    "policy.limits[0].endpoint: must name endpoints",
		`{"count":"requests","max":3,"per":"day","shadow":1}`:           "policy.limits[0].shadow: must be true or false",
		`{"count":"requests","max":3,"per":"day","burst":1}`:            "policy.limits[0].burst: is not a known field",
		`{"count":"requests","max":3,"per":"day","max":4}`:              "policy.limits[0].max: is given twice",
		`3`: "policy.limits[0]: must be an object",
		`{"count":"requests","max":3,"per":"day"},{"count":"requests","max":4,"per":"day"}`: "policy.limits[1]: counts the same as policy.limits[0]",
		strings.Repeat(`{},`, 20) + `{}`: "policy.limits: must have 20 entries or fewer",
	} {
		p, err := parsePolicy([]byte(`{"limits":[`+text+`]}`), false)
		if err != nil {
			if !strings.HasPrefix(err.Error(), want) {
				t.Errorf("%s: %v, want %s", text, err, want)
			}
			continue
		}
		if got := p.Limits[0].String(); got != want {
			t.Errorf("%s is %q, want %q", text, got, want)
		}
		again, err := parsePolicy([]byte(p.String()), false)
		if err != nil || !slices.Equal(again.Limits, p.Limits) {
			t.Errorf("%s: stored as %s, which is read as %+v, %v", text, p.String(), again.Limits, err)
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
		for now := int64(noon); now <= noon+3_600_000; now += step {
			for {
				h, refused := l.tryReserve(s, chatEstimate(1, 1), now)
				if refused != nil {
					if refused.wait < 1 || refused.wait > 60_000/7+1 {
						t.Fatalf("told to wait %d ms", refused.wait)
					}
					if _, early := l.tryReserve(s, chatEstimate(1, 1), now+refused.wait-1); early == nil && refused.wait > 1 {
						t.Fatalf("there was room before the %d ms were over", refused.wait)
					}
					break
				}
				accepted++
				h.settle(now, finalUsage{forwarded: true}, func() {})
			}
			if most := 7 + 7*(now-noon)/60_000; accepted > most || step < 7000 && accepted < most {
				t.Fatalf("steps of %d ms: %d accepted after %d ms, want %d", step, accepted, now-noon, most)
			}
		}
	}
}

// TestRetryAfterIsHonest (LI12): a call that waits for the given time is admitted, and the time is not longer
// than necessary.
func TestRetryAfterIsHonest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l, s := newTestLimiter(t, `{"count":"requests","max":5,"per":"second"}`, `{"count":"requests","max":20,"per":"hour"}`, time.Now().UnixMilli())
		began := time.Now()
		for i := range 40 {
			h, refused := l.tryReserve(s, chatEstimate(1, 1), time.Now().UnixMilli())
			if refused != nil {
				time.Sleep(time.Duration(refused.wait) * time.Millisecond)
				if h, refused = l.tryReserve(s, chatEstimate(1, 1), time.Now().UnixMilli()); refused != nil {
					t.Fatalf("call %d waited as it was told and was refused again: %+v", i, refused)
				}
			}
			h.settle(time.Now().UnixMilli(), finalUsage{forwarded: true}, func() {})
		}
		// 20 in the first hour, the rest at the full hour, five of them at once.
		if took := time.Since(began); took > time.Hour+4*time.Second || took < 4*time.Second {
			t.Errorf("forty calls took %v", took)
		}
	})
}

// TestExactInParallel (LI1): of many parallel calls exactly the limit is admitted, and everything reserved is
// released afterwards.
func TestExactInParallel(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		`{"count":"requests","max":100,"per":"second"}`, `{"count":"requests","max":100,"per":"day"}`, `{"count":"requests","max":100,"per":"lifetime"}`,
		`{"count":"concurrent","max":100}`, `{"count":"tokens","max":1000,"per":"minute"}`, `{"count":"tokens","max":1000,"per":"month"}`,
		`{"count":"dollars","max":0.0000025,"per":"week"}`, // 100 calls of 2500 nano-dollars are 0.00025
	} {
		text = strings.Replace(text, "0.0000025", "0.00025", 1)
		for _, project := range []bool{false, true} {
			a, b := text, ``
			if project {
				a, b = b, a
			}
			l, s := newTestLimiter(t, b, a, noon)
			for round := range 2 {
				var admitted atomic.Int64
				start := make(chan struct{})
				var wait sync.WaitGroup
				holds := make(chan *reservation, 1000)
				for range 1000 {
					wait.Go(func() {
						<-start
						if h, refused := l.tryReserve(s, chatEstimate(5, 5), noon); refused == nil {
							admitted.Add(1)
							holds <- h
						}
					})
				}
				close(start)
				wait.Wait()
				if admitted.Load() != 100 {
					t.Errorf("%s, on the project %v, round %d: %d of 1000 got in, want 100", text, project, round, admitted.Load())
				}
				close(holds)
				for h := range holds { // none was forwarded
					wait.Go(func() { h.settle(noon, finalUsage{}, func() {}) })
				}
				wait.Wait()
			}
			if l.running != nil {
				t.Errorf("%s: calls are still in the list", text)
			}
		}
	}
}

// TestEstimates: how many tokens and dollars a call reserves.
func TestEstimates(t *testing.T) {
	t.Parallel()
	guess := chatEstimate(100, 4096)
	guess.outputAssumed = true
	for _, test := range []struct {
		limit string
		ask   estimate
		need  int64
	}{
		{`{"count":"tokens","max":10000,"per":"day"}`, chatEstimate(100, 500), 600},
		{`{"count":"tokens","max":10000,"per":"day"}`, guess, 100 + 2500},
		{`{"count":"tokens","max":1000000,"per":"day"}`, guess, 100 + 4096},
		{`{"count":"tokens","max":50,"per":"day"}`, guess, 50},
		{`{"count":"tokens","max":0,"per":"day"}`, guess, 1},
		{`{"count":"tokens","max":50,"per":"day"}`, estimate{}, 0},
		{`{"count":"dollars","max":1,"per":"day"}`, chatEstimate(100, 500), 100*100 + 500*400},
		{`{"count":"dollars","max":0.0001,"per":"day"}`, guess, 10000 + 25000},
		{`{"count":"requests","max":5,"per":"day"}`, estimate{}, 1},
	} {
		if got := test.ask.quantityFor(&testLimits(t, test.limit).Limits[0]); got != test.need {
			t.Errorf("%s, %+v: needs %d, want %d", test.limit, test.ask, got, test.need)
		}
	}
	chat, speech := &endpoint{meter: meterOpenAI}, &endpoint{meter: meterNone}
	for _, test := range []struct {
		c    *clientRequest
		want int64
	}{
		{&clientRequest{endpoint: chat, body: make([]byte, 1<<20)}, 1 << 18}, {&clientRequest{endpoint: speech, body: make([]byte, 1<<20)}, 0},
		{&clientRequest{endpoint: chat, form: true, body: make([]byte, 20_000)}, 5000}, {&clientRequest{endpoint: chat, form: true, body: make([]byte, 1<<20)}, 8192 + (1<<20-32<<10)/64},
	} {
		if got := test.c.inputEstimate(); got != test.want {
			t.Errorf("%d bytes, a form %v: %d tokens, want %d", len(test.c.body), test.c.form, got, test.want)
		}
	}
	l, s := newTestLimiter(t, ``, `{"count":"tokens","max":100,"per":"day"}`, noon)
	if _, r := l.tryReserve(s, chatEstimate(10, 101), noon); r == nil || !r.exceedsMax {
		t.Errorf("more output than there ever is: %+v", r)
	}
}

// TestDebt (LI13): use beyond the estimate delays other calls in a bucket, by at most one more period. A
// window never carries it over.
func TestDebt(t *testing.T) {
	t.Parallel()
	l, s := newTestLimiter(t, `{"count":"tokens","max":1000,"per":"hour"}`, `{"count":"tokens","max":1000,"per":"minute"}`, noon)
	h, _ := l.tryReserve(s, chatEstimate(50, 50), noon)
	h.settle(noon, finalUsage{forwarded: true, tokens: 1_000_000}, func() {})
	if _, r := l.tryReserve(s, chatEstimate(5, 5), noon+60_000); r == nil || r.ofProject != true {
		t.Errorf("after a debt: %+v", r)
	}
	at := int64(noon + 3_600_000)
	if h, r := l.tryReserve(s, chatEstimate(5, 5), at); r != nil {
		t.Errorf("the next hour: %+v", r)
	} else {
		h.settle(at, finalUsage{tokens: 10}, func() {})
	}
	if used := s.counters[0].used; used != 10*60_000 {
		t.Errorf("an hour later the bucket has %d", used)
	}
}

// TestSpentBudgetEndsStreams: only real use beyond a budget and its allowance ends calls. For a call that
// limits its output, no estimate does.
func TestSpentBudgetEndsStreams(t *testing.T) {
	t.Parallel()
	l, s := newTestLimiter(t, ``, `{"count":"tokens","max":1000,"per":"day"},{"count":"tokens","max":100,"per":"week","shadow":true}`, noon)
	named, _ := l.tryReserve(s, chatEstimate(100, 400), noon)
	guess := chatEstimate(50, 4096)
	guess.outputAssumed = true
	open, _ := l.tryReserve(s, guess, noon)
	if spent := named.updateUsage(noon, 100_000); spent != nil {
		t.Errorf("a call that named its most output was ended: %s", spent)
	}
	if spent := open.updateUsage(noon, 550); spent != nil { // 500 + 600 = 1100: at the edge
		t.Errorf("ended at 1100 of 1000: %s", spent)
	}
	if spent := open.updateUsage(noon, 551); spent == nil || named.updateUsage(noon, 0) == nil {
		t.Error("not ended beyond the overdraft")
	}
	open.settle(noon, finalUsage{forwarded: true, tokens: 600}, func() {})
	named.settle(noon, finalUsage{forwarded: true, tokens: 120}, func() {})
	if c := s.counters[0]; c.used != 720 || c.reserved != 0 {
		t.Errorf("settled to %d used, %d held", c.used, c.reserved)
	}
}

// TestPolicyChangeKeepsCounts (LI8): a limit that counts the same keeps its count, a new limit starts with
// the past use and the running calls, and a removed limit leaves nothing behind.
func TestPolicyChangeKeepsCounts(t *testing.T) {
	t.Parallel()
	l, s := newTestLimiter(t, ``, `{"count":"requests","max":10,"per":"day"},{"count":"concurrent","max":9}`, noon)
	var holds []*reservation
	for range 3 {
		h, _ := l.tryReserve(s, chatEstimate(10, 10), noon)
		holds = append(holds, h)
	}
	p := testLimits(t, `{"count":"requests","max":4,"per":"day"},{"count":"tokens","max":1000,"per":"day"},{"count":"requests","max":50,"per":"week","model":"other"}`)
	if !s.needsHistory(p) {
		t.Error("the past of two new limits is not asked for")
	}
	l.setPolicy(s, p, noon, func(lim *limit) int64 { return int64(lim.period) * 7 })
	got := fmt.Sprint(s.counters[0].used, s.counters[1].used, s.counters[1].reserved, s.counters[2].used)
	if want := fmt.Sprint(3, int64(perDay)*7, 60, int64(perWeek)*7); got != want {
		t.Errorf("after the change: %s, want %s", got, want)
	}
	if s.needsHistory(p) {
		t.Error("the past is asked for again")
	}
	for _, h := range holds {
		h.settle(noon, finalUsage{forwarded: true, tokens: 15}, func() {})
	}
	if c := s.counters[1]; c.used != int64(perDay)*7+45 || c.reserved != 0 {
		t.Errorf("the new limit settled to %d used, %d held", c.used, c.reserved)
	}
	if _, r := l.tryReserve(s, chatEstimate(1, 1), noon); r != nil {
		t.Errorf("the fourth of four: %+v", r)
	}
	if _, r := l.tryReserve(s, chatEstimate(1, 1), noon); r == nil || !r.limit.isQuota() {
		t.Errorf("the fifth of four: %+v", r)
	}
}

// modelCall is a call in the model of TestAgainstModel.
type modelCall struct {
	reservation      *reservation
	window, reserved int64 // the window it began in, what it reserved
	used             int64 // at least so much, so far or in the end
	ended            bool
}

// TestAgainstModel: random orders of reserving, settling, abandoning, progress, passing time and clock jumps,
// compared with a model that keeps all calls and adds them up again each time.
func TestAgainstModel(t *testing.T) {
	t.Parallel()
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		per := []limitPeriod{perHour, perDay, perWeek, perMonth, perLifetime}[r.IntN(5)]
		count := []limitMetric{metricRequests, metricTokens, metricDollars}[r.IntN(3)]
		most := int64(20 + r.IntN(2000))
		text, _ := json.Marshal(limit{metric: count, period: per, max: most})
		now := int64(noon)
		l, s := newTestLimiter(t, `{"count":"concurrent","max":5}`, string(text), now)
		from, to := per.window(now)
		var calls []*modelCall
		total := func() (n int64, running int) {
			for _, c := range calls {
				if !c.ended {
					running++
				}
				if c.window != from {
					continue
				}
				if n += c.used; !c.ended {
					n += max(0, c.reserved-c.used)
				}
			}
			return n, running
		}
		for step := range 400 {
			switch r.IntN(8) {
			case 0: // time passes, or the clock is set back a little
				now += r.Int64N(max(1, to-from)/3+1) - min(5000, max(1, to-from)/10)
				if to > 0 && now >= to {
					from, to = per.window(now)
				}
				continue
			case 1, 2, 3:
				a := chatEstimate(r.Int64N(50), r.Int64N(50)+1)
				a.outputAssumed = r.IntN(2) == 0
				taken, running := total()
				need := a.quantityFor(s.counters[0].limit)
				h, refused := l.tryReserve(s, a, now)
				fits := taken+need <= most && running < 5 && !a.exceedsMax(s.counters[0].limit)
				if (refused == nil) != fits {
					t.Fatalf("seed %d step %d: %s with %d taken, %d running, needs %d: %+v", seed, step, s.counters[0].limit, taken, running, need, refused)
				}
				if refused == nil {
					c := &modelCall{reservation: h, window: from, reserved: need}
					if count == metricRequests {
						c.used = 1
					}
					calls = append(calls, c)
				}
			default:
				if len(calls) == 0 {
					continue
				}
				c := calls[r.IntN(len(calls))]
				if c.ended {
					continue
				}
				if r.IntN(3) > 0 {
					if output := r.Int64N(80); count != metricRequests {
						c.reservation.updateUsage(now, output)
						sofar := c.reservation.estimate.input + output
						if count == metricDollars {
							sofar = c.reservation.estimate.inputCost + output*400
						}
						if !c.reservation.estimate.outputAssumed {
							sofar = min(sofar, c.reserved)
						}
						if c.window == from {
							c.used = max(c.used, sofar)
						}
					}
					continue
				}
				spent := finalUsage{forwarded: r.IntN(4) > 0, tokens: r.Int64N(200), dollars: r.Int64N(100_000)}
				c.reservation.settle(now, spent, func() {})
				if c.ended = true; count == metricRequests {
					if !spent.forwarded {
						c.used = 0
					}
				} else {
					c.used = spent.value(count)
				}
			}
			taken, running := total()
			got := s.counters[0]
			got.advance(now)
			if got.used+got.reserved != taken || int64(running) != l.project.counters[0].reserved {
				t.Fatalf("seed %d step %d: %s has %d used and %d held, the model %d; %d running, the model %d",
					seed, step, got.limit, got.used, got.reserved, taken, l.project.counters[0].reserved, running)
			}
		}
	}
}

// tenLimits apply to every call and refuse none here.
const tenLimits = `{"count":"requests","max":1000000000,"per":"second"},{"count":"requests","max":1000000000000,"per":"minute"},
	{"count":"requests","max":1000000000000,"per":"hour","model":"gpt-4o*"},{"count":"requests","max":1000000000000,"per":"day","endpoint":"/v1/chat/completions"},
	{"count":"tokens","max":1000000000000,"per":"minute"},{"count":"tokens","max":1000000000000,"per":"day"},{"count":"tokens","max":1000000000000,"per":"month"},
	{"count":"concurrent","max":1000000},{"count":"dollars","max":100000000,"per":"day"},{"count":"dollars","max":100000000,"per":"month","shadow":true}`

// BenchmarkAdmission measures reserve and settle with ten limits on the project and ten on the token.
func BenchmarkAdmission(b *testing.B) {
	l, s := newTestLimiter(b, tenLimits, tenLimits, noon)
	now := int64(noon)
	a := chatEstimate(100, 200)
	h := &reservation{}
	b.ReportAllocs()
	for b.Loop() {
		*h = reservation{estimate: a}
		l.mu.Lock()
		if l.reserve(h, s, now) != nil {
			b.Fatal("refused")
		}
		l.mu.Unlock()
		h.settle(now, finalUsage{forwarded: true, tokens: 250, dollars: 40_000}, func() {})
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
			row := &tokenRow{seq: int64(i), id: fmt.Sprintf("tok_%08d", i), name: fmt.Sprintf("client %d", i), hash: make([]byte, 32),
				policy: `{"limits":[{"count":"requests","max":60,"per":"minute"},{"count":"dollars","max":50,"per":"month"},{"count":"concurrent","max":5}]}`}
			copy(row.hash, fmt.Sprint(i))
			st, err := newTokenState(row)
			if err != nil {
				b.Fatal(err)
			}
			t := &liveToken{project: project}
			t.state.Store(st)
			project.limiter.setPolicy(&t.limits, &st.policy, noon, func(*limit) int64 { return 0 })
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
	for _, test := range []struct {
		per   string
		step  time.Duration
		whole int // windows that are hammered from end to end
	}{{"hour", 20 * time.Second, 5}, {"day", 7 * time.Minute, 5}, {"week", 53 * time.Minute, 5}, {"month", 4 * time.Hour, 5}} {
		l, s := newTestLimiter(t, ``, `{"count":"requests","max":10,"per":"`+test.per+`"}`, noon)
		per := s.counters[0].limit.period
		got := map[int64]int{}
		last := int64(0) // the window that has just begun
		for now := int64(noon); len(got) <= test.whole; now += test.step.Milliseconds() {
			from, to := per.window(now)
			last = from
			for range 3 {
				h, refused := l.tryReserve(s, chatEstimate(1, 1), now)
				if refused == nil {
					got[from]++
					h.settle(now, finalUsage{forwarded: true}, func() {})
				} else if refused.wait != to-now {
					t.Fatalf("%s: told to wait %d ms, %d before the edge", test.per, refused.wait, to-now)
				}
			}
		}
		for from, n := range got {
			if from != last && n != 10 {
				t.Errorf("%s from %s: %d calls", test.per, time.UnixMilli(from).UTC(), n)
			}
		}
	}
}

// TestCallsOutliveTheirToken (LI11): a call's use is recorded for its token and project, even if both ended
// while it ran.
func TestCallsOutliveTheirToken(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"limits":[{"count":"tokens","max":1000000,"per":"day"},{"count":"concurrent","max":100}]}}`, 200, nil)
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
	if l := &p.instance.registry.liveToken(p.tokenID).project.limiter; l.running != nil || l.project.counters[1].reserved != 0 || l.project.counters[0].reserved != 0 {
		t.Error("reservations are left behind")
	}
}
