// What routing costs: time for each call, and what clients feel of a dead key.
package main

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// BenchmarkRouting chooses among fifty upstreams in two priorities, each with a
// list of models; with trouble, a fifth of them is not well.
func BenchmarkRouting(b *testing.B) {
	for _, trouble := range []bool{false, true} {
		b.Run(fmt.Sprintf("trouble=%v", trouble), func(b *testing.B) {
			var list []*upstream
			for i := range 50 {
				list = append(list, &upstream{id: fmt.Sprint(i), provider: providerOpenAI, weight: int64(1 + i%3), priority: int64(i / 40),
					models: []string{"gpt-4o-mini", "gpt-4o*", "o3*"}})
			}
			p := testPool(list...)
			if trouble {
				for i := range 10 {
					list[5*i].health.fault(noon, noon, true, "")
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				w := wish{api: apiOpenAI, model: "gpt-4o", now: noon + 1, tokens: 100}
				if p.pick(&w) == nil {
					b.Fatal("none")
				}
			}
		})
	}
}

// BenchmarkDeadKey is the latency of streams at a fixed rate over a pool of three
// keys: all well, and with one that fails or hangs. It prints the p99 where all
// are well, and the ratio of the others to it.
//
//	go test -run '^$' -bench DeadKey -benchtime 1x .
func BenchmarkDeadKey(b *testing.B) {
	for b.Loop() {
		healthy := deadKeyP99(b, nil)
		b.ReportMetric(float64(healthy.Microseconds()), "healthy-p99-us")
		for _, dead := range []struct {
			name   string
			script func(*providerConn, recorded) bool
		}{
			{"reset", func(c *providerConn, _ recorded) bool { return c.reset() }},
			{"503", always(503, `{}`)}, {"429", always(429, `{}`)}, {"401", always(401, `{}`)},
			{"hangs", func(c *providerConn, _ recorded) bool { return stall(c) }},
		} {
			b.ReportMetric(float64(deadKeyP99(b, dead.script))/float64(healthy), dead.name+"-ratio")
		}
	}
}

func deadKeyP99(b *testing.B, dead func(*providerConn, recorded) bool) time.Duration {
	b.Helper()
	p := newTest(b, map[string]string{"LOG_LEVEL": "error"})
	defer p.stop()
	slow := func(c *providerConn, r recorded) bool {
		time.Sleep(20 * time.Millisecond)
		return answerChat(c, r)
	}
	p.provider.answer(slow)
	for i := range 2 {
		provider, _ := p.addUpstream(`"weight":1`)
		if provider.answer(slow); i == 1 && dead != nil {
			provider.answer(dead)
		}
	}
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}}
	defer client.CloseIdleConnections()
	const calls, every = 2000, time.Second / 200
	took := make([]time.Duration, calls)
	var wait sync.WaitGroup
	begin := time.Now()
	for i := range calls {
		due := begin.Add(time.Duration(i) * every)
		time.Sleep(time.Until(due))
		wait.Go(func() {
			req, err := http.NewRequestWithContext(b.Context(), "POST", p.url+"/v1/chat/completions", strings.NewReader(chatBody(`"stream":true`)))
			if err != nil {
				b.Error(err)
				return
			}
			req.Header = http.Header{"Authorization": {"Bearer " + p.token}, "Content-Type": {"application/json"}}
			res, err := client.Do(req)
			if err != nil {
				b.Error(err)
				return
			}
			defer res.Body.Close()
			if _, err := io.Copy(io.Discard, res.Body); err != nil || res.StatusCode != 200 {
				b.Errorf("got %d, %v", res.StatusCode, err)
			}
			took[i] = time.Since(due)
		})
	}
	wait.Wait()
	slices.Sort(took)
	return took[calls*99/100]
}
