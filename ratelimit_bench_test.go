// What limits cost: time for each call, memory for each live token.
package main

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// tenLimits are such as apply to every call and never refuse one here.
const tenLimits = `{"count":"requests","max":1000000000,"per":"second"},{"count":"requests","max":1000000000000,"per":"minute"},
	{"count":"requests","max":1000000000000,"per":"hour","model":"gpt-4o*"},{"count":"requests","max":1000000000000,"per":"day","endpoint":"/v1/chat/completions"},
	{"count":"tokens","max":1000000000000,"per":"minute"},{"count":"tokens","max":1000000000000,"per":"day"},{"count":"tokens","max":1000000000000,"per":"month"},
	{"count":"concurrent","max":1000000},{"count":"dollars","max":100000000,"per":"day"},{"count":"dollars","max":100000000,"per":"month","shadow":true}`

// BenchmarkAdmission is reserve and settle, with ten limits on the project and
// ten on the token.
func BenchmarkAdmission(b *testing.B) {
	l, s := newTestLimiter(b, tenLimits, tenLimits, noon)
	now := int64(noon)
	a := chatAsk(100, 200)
	h := &hold{}
	b.ReportAllocs()
	for b.Loop() {
		*h = hold{ask: a}
		l.mu.Lock()
		if l.reserve(h, s, now) != nil {
			b.Fatal("refused")
		}
		l.mu.Unlock()
		h.settle(now, spending{counted: true, tokens: 250, dollars: 40_000}, func() {})
		now++
	}
}

// BenchmarkLiveTokens is what 100,000 live tokens with three limits each hold.
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
			project.limiter.adopt(&t.limits, &st.policy, noon, func(*limit) int64 { return 0 })
			g.byHash[st.hash], g.byID[strings.Clone(st.id)] = t, t
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MiB")
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/tokens, "B/token")
		runtime.KeepAlive(g)
	}
}
