package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestClusterCost measures what docs/scale.md says of cost, if LLM_PROXY_CLUSTER_MEASURE is the calls per second: CPU
// time per call of the proxies and of PostgreSQL, transactions and WAL per call, and the median latency; with SQLite,
// with one replica, and with one, two and three replicas that each have a third of the calls. Each is measured in several short rounds, in turn, because a shared machine's speed
// changes by the second.
func TestClusterCost(t *testing.T) {
	rate, _ := strconv.Atoi(os.Getenv("LLM_PROXY_CLUSTER_MEASURE"))
	if rate == 0 {
		t.Skip("LLM_PROXY_CLUSTER_MEASURE is not set")
	}
	c := newCluster(t, 3)
	alone := &cluster{t: t, provider: c.provider, answered: map[string]int{}}
	for _, v := range c.env {
		if !strings.HasPrefix(v, "DATABASE_") {
			alone.env = append(alone.env, v)
		}
	}
	lite := &replica{c: alone, name: "SQLite", data: filepath.Join(t.TempDir(), "data")}
	alone.replicas = []*replica{lite}
	lite.restart()
	t.Cleanup(lite.kill)
	var made struct{ ID string }
	alone.manage(0, "POST", "/manage/projects", map[string]any{"name": "x", "openai_api_key": "sk-provider-5Hq2ZtVb8N"}, &made)
	alone.project = made.ID
	tokens := func(c *cluster) (list []string) {
		for range 20 {
			_, token := c.newToken(`"policy":{"limits":[{"count":"requests","max":1000000000,"per":"day"}]}`)
			list = append(list, token)
		}
		return list
	}
	shared, own := tokens(c), tokens(alone)
	figures := map[string][]figure{}
	setups := []struct {
		name     string
		replicas int // 0: SQLite
		rate     int
	}{
		{"SQLite", 0, rate}, {"1 replica", 1, rate},
		{"1 of the rate", 1, rate / 3}, {"2 of the rate", 2, 2 * rate / 3}, {"3 of the rate", 3, rate},
	}
	for round := range 4 {
		for _, s := range setups {
			name, f := s.name, figure{}
			if s.replicas == 0 {
				f = alone.measure([]*replica{lite}, own, s.rate)
			} else {
				f = c.measure(c.replicas[:s.replicas], shared, s.rate)
			}
			if round > 0 { // the first warms up
				figures[name] = append(figures[name], f)
			}
		}
	}
	for _, s := range setups {
		name := s.name
		median := func(of func(figure) float64) float64 {
			var list []float64
			for _, f := range figures[name] {
				list = append(list, of(f))
			}
			slices.Sort(list)
			return list[len(list)/2]
		}
		t.Logf("%-13s %4.0f calls/s, proxy %3.0f us/call, PostgreSQL %3.0f us/call, %.3f transactions/call, %4.0f bytes of WAL/call, p50 %.2f ms",
			name, median(func(f figure) float64 { return f.rate }), median(func(f figure) float64 { return f.proxyUS }),
			median(func(f figure) float64 { return f.databaseUS }), median(func(f figure) float64 { return f.transactions }),
			median(func(f figure) float64 { return f.wal }), median(func(f figure) float64 { return f.p50 }))
	}
}

// A figure is what one round has measured, per call but for rate and p50 (milliseconds).
type figure struct{ rate, proxyUS, databaseUS, transactions, wal, p50 float64 }

// measure makes calls at a rate for some seconds.
func (c *cluster) measure(replicas []*replica, tokens []string, rate int) figure {
	c.t.Helper()
	const length = 5 * time.Second
	var before, after [4]float64
	read := func(out *[4]float64) {
		for _, r := range replicas {
			out[0] += cpuOf(r.cmd.Process.Pid)
		}
		if c.dir == "" {
			return
		}
		time.Sleep(1200 * time.Millisecond) // the server publishes its counters once a second
		out[1] = c.databaseCPU()
		_, _ = fmt.Sscanf(c.sql(`SELECT d.xact_commit + d.xact_rollback, w.wal_bytes FROM pg_stat_database d, pg_stat_wal w
			WHERE d.datname = 'proxy'`), "%g|%g", &out[2], &out[3])
	}
	read(&before)
	var mu sync.Mutex
	var latencies []float64
	var wg sync.WaitGroup
	start := time.Now()
	const pacers = 64
	for p := range pacers {
		wg.Go(func() {
			every := time.Duration(float64(time.Second) * pacers / float64(rate))
			next := start.Add(every * time.Duration(p) / pacers)
			for i := p; next.Before(start.Add(length)); i++ {
				time.Sleep(time.Until(next))
				next = next.Add(every)
				begin := time.Now()
				if c.call(replicas[i%len(replicas)], tokens[i%len(tokens)], "measured") == 200 {
					mu.Lock()
					latencies = append(latencies, float64(time.Since(begin).Microseconds())/1000)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	read(&after)
	slices.Sort(latencies)
	n := float64(len(latencies))
	return figure{rate: n / took.Seconds(), proxyUS: (after[0] - before[0]) / n, databaseUS: (after[1] - before[1]) / n,
		transactions: (after[2] - before[2]) / n, wal: (after[3] - before[3]) / n, p50: latencies[len(latencies)/2]}
}

// cpuOf returns the CPU time of a process in microseconds.
func cpuOf(pid int) float64 {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 15 {
		return 0
	}
	var ticks float64
	for _, f := range fields[11:13] {
		n, _ := strconv.ParseFloat(f, 64)
		ticks += n
	}
	return ticks * 10_000 // 100 ticks a second
}

// databaseCPU returns that of all processes of the server.
func (c *cluster) databaseCPU() (us float64) {
	text, _ := os.ReadFile(filepath.Join(c.dir, "data", "postmaster.pid"))
	pid, _, _ := strings.Cut(string(text), "\n")
	names, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range names {
		text, _ := os.ReadFile(name)
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		if own := filepath.Base(filepath.Dir(name)); own == pid || len(fields) > 1 && fields[1] == pid {
			n, _ := strconv.Atoi(own)
			us += cpuOf(n)
		}
	}
	return us
}
