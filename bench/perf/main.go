// Perf compares the cost of llm-proxy with that of a minimal reverse proxy on net/http: httputil.ReverseProxy with a buffer
// pool and another key.
//
//	go run ./bench/perf
//
// It starts a provider with fixed answers, the bare proxy and the real program (newly built, or -bin), each as a separate
// process, and puts the same load on both proxies in turn: unary calls, with and without a session, 64-event streams and
// embeddings of 25 KB as fast as answers arrive, 500 streams with an event every 20 ms, unary calls at a fixed rate, and
// idle streams. Then it compares, in the real program, calls of a project that has a cache with those of one that has
// none. Both projects have three limits, and their tokens two. It prints the CPU time per call (of the proxy's process,
// from /proc, so on Linux only) and the median of the ratios of the rounds, and for the fixed rate the latency. Only
// figures of one run are comparable: machines differ, and one machine differs from hour to hour. Many short rounds are
// more reliable than few long ones, because a machine's speed changes by the second.
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

func main() {
	role := os.Getenv("PERF_ROLE")
	if role != "" {
		if err := serveRole(role); err != nil {
			fmt.Fprintln(os.Stderr, "perf:", err)
			os.Exit(1)
		}
		return
	}
	o := options{}
	flag.StringVar(&o.bin, "bin", "", "llm-proxy binary; if empty, it is built from this tree")
	flag.IntVar(&o.rounds, "rounds", 15, "rounds; the figures are their medians")
	flag.DurationVar(&o.duration, "duration", time.Second, "length of one measurement")
	flag.IntVar(&o.conns, "c", 64, "connections")
	flag.IntVar(&o.rate, "rate", 500, "calls per second of the fixed-rate workload")
	flag.IntVar(&o.idle, "idle", 2000, "idle streams; 0 skips them")
	flag.BoolVar(&o.cacheOnly, "cache", false, "measure the cache only")
	flag.StringVar(&o.only, "only", "", "measure only workloads whose name contains this")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "perf:", err)
		os.Exit(1)
	}
}

type options struct {
	bin                       string
	rounds, conns, rate, idle int
	duration                  time.Duration
	cacheOnly                 bool
	only                      string
}

// A workload is calls of one kind.
type workload struct {
	name, path, headers, body string // path: "" is that of chat; headers are lines
	conns, rate               int    // rate is in calls per second; 0: as fast as answers arrive
	atLeast                   time.Duration
}

// A target is a proxy that is measured.
type target struct {
	name, addr, token string
	pid               int
}

func run(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp("", "llm-proxy-perf-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if o.bin == "" {
		o.bin = filepath.Join(dir, "llm-proxy")
		if err := build(ctx, o.bin); err != nil {
			return err
		}
	}
	targets, pair, stop, err := start(ctx, o.bin, dir)
	defer stop()
	if err != nil {
		return err
	}
	if !o.cacheOnly {
		if err := compareProxies(ctx, o, targets); err != nil {
			return err
		}
	}
	if o.only != "" {
		return nil
	}
	return compareCache(ctx, o, pair.forwarded, pair.cached)
}

// compareCache measures calls of a project with a cache (hits, misses, calls that the cache does not cover), each in turn
// with the same calls of a project without one.
func compareCache(ctx context.Context, o options, forwarded, cached target) error {
	const unique = `"stream":false,"stop":"` + uniquePlace + `"`
	workloads := []workload{
		{name: "hit", body: chatBody(`"stream":false`), conns: o.conns},
		{name: "miss, stored", body: chatBody(unique), conns: o.conns},
		{name: "long miss, stored", body: promptBody(unique+`,"metadata":{"answer":"long"}`, 340), conns: o.conns},
		{name: "miss, not stored", body: chatBody(unique + `,"metadata":{"answer":"no-store"}`), conns: o.conns},
		{name: "bypass", body: chatBody(unique + `,"store":true`), conns: o.conns},
	}
	with, without := make([][]float64, len(workloads)), make([][]float64, len(workloads))
	var p50 []float64
	for range o.rounds {
		for i, w := range workloads {
			for _, side := range []struct {
				target
				cpu *[]float64
			}{{forwarded, &without[i]}, {cached, &with[i]}} {
				m, err := load(ctx, side.target, w, o.duration)
				if err != nil {
					return err
				}
				*side.cpu = append(*side.cpu, m.cpuPerCall)
				time.Sleep(300 * time.Millisecond) // what is written after the answers belongs to no other workload
			}
		}
		m, err := load(ctx, cached, workload{body: workloads[0].body, conns: 16, rate: 1000}, o.duration)
		if err != nil {
			return err
		}
		p50 = append(p50, m.p50)
	}
	for i, w := range workloads {
		fmt.Printf("cache: %-18s at saturation   CPU per call: without %6.1f us, with %6.1f us, ratio %.3f\n", w.name,
			median(without[i]), median(with[i]), medianRatio(with[i], without[i]))
	}
	fmt.Printf("cache: hits at 1000 calls/s           median latency: %.0f us\n", median(p50))
	return nil
}

// compareProxies measures the bare proxy and the real program, and prints a table like that of the README.
func compareProxies(ctx context.Context, o options, targets []target) error {
	fmt.Println("| | bare proxy | llm-proxy | |\n| --- | --- | --- | --- |")
	for _, w := range []workload{
		{name: "unary call, at saturation", body: chatBody(`"stream":false`), conns: o.conns},
		{name: "unary call with a session, at saturation", headers: "X-LLM-Proxy-Session: " + clientPlace + "\r\n",
			body: chatBody(`"stream":false`), conns: o.conns},
		{name: "64-event stream, at saturation", body: chatBody(`"stream":true`), conns: o.conns},
		{name: "stream of 25 events, 20 ms apart, 500 at a time", body: chatBody(`"stream":true,"user":"slow"`),
			conns: 500, atLeast: 3 * time.Second},
		{name: "embedding of 25 KB, at saturation", path: "/v1/embeddings", conns: o.conns,
			body: `{"model":"text-embedding-3-small","input":"` + strings.Repeat("lorem ipsum ", 80) + `"}`},
	} {
		if o.only != "" && !strings.Contains(w.name, o.only) {
			continue
		}
		m, err := compare(ctx, o, targets, w)
		if err != nil {
			return err
		}
		cpu := func(m measured) float64 { return m.cpuPerCall }
		fmt.Printf("| CPU per %s | %.0f µs | %.0f µs | %.2f × |\n", w.name, medianOf(m[0], cpu), medianOf(m[1], cpu),
			medianRatio(values(m[1], cpu), values(m[0], cpu)))
	}
	if o.only != "" {
		return nil
	}
	m, err := compare(ctx, o, targets, workload{body: chatBody(`"stream":false`), conns: 16, rate: o.rate})
	if err != nil {
		return err
	}
	for _, latency := range []struct {
		name string
		of   func(measured) float64
	}{{"median", func(m measured) float64 { return m.p50 }}, {"99th percentile", func(m measured) float64 { return m.p99 }}} {
		bare, ours := medianOf(m[0], latency.of)/1e3, medianOf(m[1], latency.of)/1e3
		fmt.Printf("| latency at %d calls/s, %s | %.2f ms | %.2f ms | + %.2f ms |\n", o.rate, latency.name, bare, ours, ours-bare)
	}
	if o.idle == 0 {
		return nil
	}
	var kib []float64
	for _, t := range targets {
		each, err := idleStreams(ctx, t, o.idle)
		if err != nil {
			return err
		}
		kib = append(kib, each)
	}
	fmt.Printf("| memory per idle stream (%d of them) | %.0f KiB | %.0f KiB | |\n", o.idle, kib[0], kib[1])
	return nil
}

// compare measures each target in turn, in rounds.
func compare(ctx context.Context, o options, targets []target, w workload) ([][]measured, error) {
	all := make([][]measured, len(targets))
	for range o.rounds {
		for i, t := range targets {
			m, err := load(ctx, t, w, max(o.duration, w.atLeast))
			if err != nil {
				return nil, err
			}
			all[i] = append(all[i], m)
		}
	}
	return all, nil
}

func values(all []measured, of func(measured) float64) (v []float64) {
	for _, m := range all {
		v = append(v, of(m))
	}
	return v
}

func medianOf(all []measured, of func(measured) float64) float64 { return median(values(all, of)) }

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// medianRatio is the median of the ratios of each round: a slow minute of the machine affects both sides.
func medianRatio(a, b []float64) float64 {
	r := make([]float64, len(a))
	for i := range a {
		r[i] = a[i] / b[i]
	}
	return median(r)
}

// chatBody is a call of about 1 KB.
func chatBody(members string) string { return promptBody(members, 80) }

// promptBody is a call whose prompt repeats its words n times.
func promptBody(members string, n int) string {
	return `{"model":"gpt-4o-mini",` + members + `,"messages":[{"role":"user","content":"` + strings.Repeat("lorem ipsum ", n) + `"}]}`
}

// request is a whole HTTP/1.1 request to t.
func (t target) request(w workload) []byte {
	path := cmp.Or(w.path, "/v1/chat/completions")
	return fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\n"+
		"Accept: application/json\r\nUser-Agent: perf\r\n%sContent-Length: %d\r\n\r\n%s", path, t.addr, t.token, w.headers,
		len(w.body), w.body)
}

func serveRole(role string) error {
	if role == "bare" {
		return serveBare(os.Getenv("PERF_UPSTREAM"))
	}
	return provide()
}
