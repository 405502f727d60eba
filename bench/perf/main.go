// Perf compares the cost of llm-proxy with that of a minimal reverse proxy on net/http: httputil.ReverseProxy with a buffer
// pool and another key.
//
//	go run ./bench/perf
//
// It starts a provider with fixed answers, the bare proxy and the real program (newly built, or -bin), each as a separate
// process, and puts the same load on both proxies in turn: unary calls and 64-event streams as fast as answers arrive,
// unary calls at a fixed rate, and idle streams. Then it compares, in the real program, forwarded unary calls with calls of
// a project that has a cache: hits, and misses that are stored. It prints the CPU time per call (of the proxy's process, from /proc, so
// on Linux only), the ratio, and for the fixed rate the median latency. Only figures of one run are comparable: machines
// differ, and one machine differs from hour to hour. Many short rounds are more reliable than few long ones, because a
// machine's speed changes by the second.
package main

import (
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
	return compareCache(ctx, o, pair.forwarded, pair.cached)
}

// compareCache measures calls of a project with a cache (hits, misses, calls that the cache does not cover), each in turn
// with the same calls of a project without one.
func compareCache(ctx context.Context, o options, forwarded, cached target) error {
	const unique = `"stream":false,"stop":"` + uniquePlace + `"`
	workloads := []struct{ name, body string }{
		{"hit", chatBody(`"stream":false`)},
		{"miss, stored", chatBody(unique)},
		{"miss, not stored", chatBody(unique + `,"metadata":{"answer":"no-store"}`)},
		{"bypass", chatBody(unique + `,"store":true`)},
	}
	with, without := make([][]float64, len(workloads)), make([][]float64, len(workloads))
	var p50 []float64
	for range o.rounds {
		for i, w := range workloads {
			for _, side := range []struct {
				target
				cpu *[]float64
			}{{forwarded, &without[i]}, {cached, &with[i]}} {
				m, err := load(ctx, side.target, w.body, o.conns, 0, o.duration)
				if err != nil {
					return err
				}
				*side.cpu = append(*side.cpu, m.cpuPerCall)
				time.Sleep(300 * time.Millisecond) // what is written after the answers belongs to no other workload
			}
		}
		m, err := load(ctx, cached, workloads[0].body, 16, 1000, o.duration)
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

// compareProxies measures the bare proxy and the real program.
func compareProxies(ctx context.Context, o options, targets []target) error {
	for _, w := range []struct{ name, body string }{
		{"unary", chatBody(`"stream":false`)}, {"64-event stream", chatBody(`"stream":true`)},
	} {
		cpu := make([][]float64, len(targets))
		for range o.rounds {
			for i, t := range targets {
				m, err := load(ctx, t, w.body, o.conns, 0, o.duration)
				if err != nil {
					return err
				}
				cpu[i] = append(cpu[i], m.cpuPerCall)
			}
		}
		fmt.Printf("%-16s at saturation   CPU per call: bare %6.1f us, llm-proxy %6.1f us, ratio %.2f\n",
			w.name, median(cpu[0]), median(cpu[1]), medianRatio(cpu[1], cpu[0]))
	}
	p50 := make([][]float64, len(targets))
	for range o.rounds {
		for i, t := range targets {
			m, err := load(ctx, t, chatBody(`"stream":false`), 16, o.rate, o.duration)
			if err != nil {
				return err
			}
			p50[i] = append(p50[i], m.p50)
		}
	}
	fmt.Printf("unary at %d calls/s           median latency: bare %.0f us, llm-proxy %.0f us, added %.0f us\n",
		o.rate, median(p50[0]), median(p50[1]), median(p50[1])-median(p50[0]))
	if o.idle == 0 {
		return nil
	}
	for _, t := range targets {
		kib, err := idleStreams(ctx, t, o.idle)
		if err != nil {
			return err
		}
		fmt.Printf("%d idle streams            %s: %.1f KiB each\n", o.idle, t.name, kib)
	}
	return nil
}

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
func chatBody(members string) string {
	return `{"model":"gpt-4o-mini",` + members + `,"messages":[{"role":"user","content":"` + strings.Repeat("lorem ipsum ", 80) + `"}]}`
}

// request is a whole HTTP/1.1 request to t.
func (t target) request(body string) []byte {
	return fmt.Appendf(nil, "POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\n"+
		"Accept: application/json\r\nUser-Agent: perf\r\nContent-Length: %d\r\n\r\n%s", t.addr, t.token, len(body), body)
}

func serveRole(role string) error {
	if role == "bare" {
		return serveBare(os.Getenv("PERF_UPSTREAM"))
	}
	return provide()
}
