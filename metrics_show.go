// This room is /metrics: what metrics.go counted and what the other rooms are
// doing now, in the Prometheus text format, written by hand. It changes nothing,
// and shows neither names that people gave nor anything of a call's content.
package main

import (
	"cmp"
	"context"
	"maps"
	"net/http"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A metricsText is a page of metrics as it is written.
type metricsText struct {
	b      []byte
	family string
}

// about begins a family.
func (t *metricsText) about(name, kind, help string) {
	t.family = "llm_proxy_" + name
	if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") {
		t.family = name
	}
	t.b = append(t.b, "# HELP "+t.family+" "+help+"\n# TYPE "+t.family+" "+kind+"\n"...)
}

// labels writes {a="b",…}; pairs are names and values.
func (t *metricsText) labels(pairs []string) {
	for i := 0; i+1 < len(pairs); i += 2 {
		t.b = append(t.b, "{,"[min(i, 1)])
		t.b = append(append(t.b, pairs[i]...), `="`...)
		for _, r := range pairs[i+1] { // ranging turns bytes that are no UTF-8 into U+FFFD
			switch r {
			case '\\':
				t.b = append(t.b, `\\`...)
			case '"':
				t.b = append(t.b, `\"`...)
			case '\n':
				t.b = append(t.b, `\n`...)
			default:
				t.b = append(t.b, string(r)...)
			}
		}
		t.b = append(t.b, '"')
	}
	if len(pairs) > 0 {
		t.b = append(t.b, '}')
	}
}

func (t *metricsText) int(n int64, pairs ...string) {
	t.b = append(t.b, t.family...)
	t.labels(pairs)
	t.b = append(strconv.AppendInt(append(t.b, ' '), n, 10), '\n')
}

// decimal writes n/10^places.
func (t *metricsText) decimal(n int64, places int, pairs ...string) {
	t.b = append(t.b, t.family...)
	t.labels(pairs)
	t.b = append(append(append(t.b, ' '), formatDecimal(n, places)...), '\n')
}

// histogram writes one in seconds.
func (t *metricsText) histogram(h *histogram, bounds *[13]int64, pairs ...string) {
	name, sum := t.family, int64(0)
	t.family = name + "_bucket"
	for i := range h.counts {
		sum += h.counts[i].Load()
		le := "+Inf"
		if i < len(bounds) {
			le = formatDecimal(bounds[i], 6)
		}
		t.int(sum, append(slices.Clip(pairs), "le", le)...)
	}
	t.family = name + "_sum"
	t.decimal(h.sum.Load(), 6, pairs...)
	t.family = name + "_count"
	t.int(sum, pairs...) // the buckets' own, so that the two agree while calls go on
	t.family = name
}

// handleMetrics is open: it stands on METRICS_ADDR.
func (s *server) handleMetrics(w http.ResponseWriter, r *http.Request) {
	s.showing.Lock() // one at a time: a page takes memory
	defer s.showing.Unlock()
	ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
	defer cancel()
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = w.Write(s.metricsPage(ctx))
}

// handleKeyedMetrics asks for a management key first, of any role.
func (s *server) handleKeyedMetrics(w http.ResponseWriter, r *http.Request) {
	if _, err := s.authenticateManager(w, r); err != nil {
		s.writeManageError(w, r, err)
		return
	}
	s.handleMetrics(w, r)
}

// metricsPage writes the page.
func (s *server) metricsPage(ctx context.Context) []byte {
	t := &metricsText{b: make([]byte, 0, 64<<10)}
	s.metrics.showCalls(t, s.endpoints)
	s.metrics.showModels(t)
	s.metrics.showSeries(t)
	s.showRunning(t)
	s.showLedger(t)
	s.showDisk(ctx, t)
	showRuntime(t, s.started)
	return t.b
}

// eachEndpoint calls do with every endpoint, and the calls that found none, with its name.
func (m *metrics) eachEndpoint(table *endpointTable, do func(name string, em *endpointMetrics)) {
	for _, e := range table.all() {
		do(e.name(), m.of(e))
	}
	do("none", &m.nowhere)
}

func (m *metrics) showCalls(t *metricsText, table *endpointTable) {
	t.about("calls_total", "counter", "Calls under /v1 that ended, by how and whose trouble it was.")
	m.eachEndpoint(table, func(name string, em *endpointMetrics) {
		for o := range countedOutcomes {
			for c := range countedClasses {
				if n := em.calls[o][c].Load(); n > 0 {
					t.int(n, "endpoint", name, "outcome", string(countedOutcomes[o]), "class", cmp.Or(string(countedClasses[c]), "none"))
				}
			}
		}
	})
	t.about("errors_total", "counter", "Calls that did not go well, by whose trouble it was.")
	for c, class := range countedClasses {
		if class == classNone {
			continue
		}
		var sum int64
		m.eachEndpoint(table, func(_ string, em *endpointMetrics) {
			for o := range countedOutcomes {
				sum += em.calls[o][c].Load()
			}
		})
		t.int(sum, "class", string(class))
	}
	show := func(name, help string, of func(*endpointMetrics) *histogram) {
		t.about(name, "histogram", help)
		m.eachEndpoint(table, func(name string, em *endpointMetrics) {
			if h := of(em); h.used() {
				t.histogram(h, &slowBounds, "endpoint", name)
			}
		})
	}
	show("first_byte_seconds", "From a request's arrival to the first byte of its answer.", func(em *endpointMetrics) *histogram { return &em.firstByte })
	show("duration_seconds", "From a request's arrival to the last byte of its answer.", func(em *endpointMetrics) *histogram { return &em.total })
	t.about("overhead_seconds", "histogram", "Of the time to the first byte, what was neither the provider's nor the client's.")
	t.histogram(&m.overhead, &fastBounds)
}

func (h *histogram) used() bool {
	for i := range h.counts {
		if h.counts[i].Load() > 0 {
			return true
		}
	}
	return false
}

// list copies a series, in order.
func (s *series[K, V]) list(order func(a, b K) int) (keys []K, values []*V) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	keys = slices.SortedFunc(maps.Keys(s.m), order)
	for _, k := range keys {
		values = append(values, s.m[k])
	}
	return keys, values
}

func (m *metrics) showModels(t *metricsText) {
	keys, values := m.models.list(func(a, b modelKey) int {
		return cmp.Or(cmp.Compare(a.project, b.project), cmp.Compare(a.provider, b.provider), cmp.Compare(a.model, b.model))
	})
	each := func(do func(mm *modelMetrics, labels ...string)) {
		for i, k := range keys {
			do(values[i], "project", k.project, "provider", k.provider, "model", k.model)
		}
	}
	t.about("model_calls_total", "counter", "Admitted calls that ended, by project, provider, model and outcome.")
	each(func(mm *modelMetrics, labels ...string) {
		for o := range countedOutcomes {
			if n := mm.calls[o].Load(); n > 0 {
				t.int(n, append(labels, "outcome", string(countedOutcomes[o]))...)
			}
		}
	})
	t.about("tokens_total", "counter", "Tokens used. cached_input is part of input, reasoning part of output.")
	each(func(mm *modelMetrics, labels ...string) {
		for i := range tokenKinds {
			if n := mm.tokens[i].Load(); n > 0 {
				t.int(n, append(labels, "kind", tokenKinds[i])...)
			}
		}
	})
	t.about("cost_dollars_total", "counter", "What calls cost, by the price table.")
	each(func(mm *modelMetrics, labels ...string) { t.decimal(mm.nanos.Load(), 9, labels...) })
	t.about("unpriced_calls_total", "counter", "Calls that used tokens without a known price; their cost is in no sum.")
	each(func(mm *modelMetrics, labels ...string) {
		if n := mm.unpriced.Load(); n > 0 {
			t.int(n, labels...)
		}
	})
}

func (m *metrics) showSeries(t *metricsText) {
	t.about("refusals_total", "counter", "Calls that were refused, by error code; of bad tokens, by what was wrong with them.")
	codes, refused := m.codes.list(func(a, b codeKey) int { return cmp.Or(cmp.Compare(a.code, b.code), cmp.Compare(a.class, b.class)) })
	for i, k := range codes {
		t.int(refused[i].Load(), "code", k.code, "class", string(k.class))
	}
	t.about("upstream_attempts_total", "counter", "Requests to providers, by upstream and how each ended.")
	ups, tried := m.upstreams.list(func(a, b upstreamKey) int { return cmp.Compare(a.upstream, b.upstream) })
	for i, k := range ups {
		for how, name := range attemptNames {
			// Zeros too: what has never failed must be seen to fail for the first time.
			t.int(tried[i].attempts[how].Load(), "upstream", k.upstream, "provider", k.provider, "result", name)
		}
	}
	t.about("http_requests_total", "counter", "Requests to anything but /v1, by route and kind of status.")
	routes, asked := m.routes.list(func(a, b routeKey) int { return cmp.Or(cmp.Compare(a.route, b.route), cmp.Compare(a.status, b.status)) })
	for i, k := range routes {
		t.int(asked[i].Load(), "route", cmp.Or(k.route, "none"), "status", k.status)
	}
}

// showRunning writes what is going on now.
func (s *server) showRunning(t *metricsText) {
	t.about("running_calls", "gauge", "Calls that are running, by what they wait for.")
	for i, n := range s.running.phases() {
		t.int(n, "phase", phaseNames[i])
	}
	t.about("running_calls_max", "gauge", "MAX_CONCURRENT_CALLS.")
	t.int(s.cfg.maxCalls)
	t.about("running_streams", "gauge", "Event streams that are being relayed.")
	t.int(s.metrics.streams.Load())
	t.about("draining", "gauge", "1 while new calls are refused because the program is ending.")
	t.int(oneIf(s.running.isDraining()))
	t.about("connections", "gauge", "Connections that clients have open.")
	t.int(s.metrics.open.Load())
	t.about("connections_max", "gauge", "MAX_CONNECTIONS.")
	t.int(s.cfg.maxConnections)
	t.about("body_memory_bytes", "gauge", "Memory that request bodies take.")
	t.int(s.bodies.used.Load())
	t.about("body_memory_max_bytes", "gauge", "BODY_MEMORY.")
	t.int(s.bodies.limit)
	t.about("log_lines_left_out_total", "counter", "Log lines about callers without a key that were not written, so as not to fill the disk.")
	t.int(s.metrics.leftOut.Load())
	t.about("log_lines_dropped_total", "counter", "Log lines that were lost because their reader was too slow.")
	if s.linesDropped != nil {
		t.int(s.linesDropped())
	} else {
		t.int(0)
	}
	t.about("upstreams", "gauge", "Upstreams of projects that were used since the start, by what is known of their keys.")
	for state, n := range s.health.count(time.Now().UnixMilli()) {
		t.int(n, "state", keyState(state).String())
	}
	tokens, projects := s.registry.size()
	t.about("registry_tokens", "gauge", "Tokens held in memory because they were used of late.")
	t.int(tokens)
	t.about("registry_projects", "gauge", "Projects held in memory.")
	t.int(projects)
}

func oneIf(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func (s *server) showLedger(t *metricsText) {
	begins, settles := s.ledger.backlog()
	t.about("ledger_queue_rows", "gauge", "Rows that wait to be committed.")
	t.int(begins, "kind", "begin")
	t.int(settles, "kind", "settle")
	t.about("ledger_failing", "gauge", "1 while the ledger cannot be written; calls are refused then.")
	t.int(oneIf(!s.ledger.healthy()))
	t.about("ledger_commit_seconds", "histogram", "Time to commit one batch of rows.")
	t.histogram(&s.ledger.commits, &fastBounds)
	t.about("ledger_rows_total", "counter", "What was committed: a note and a row for an admitted call, a row for a refused one.")
	t.int(s.ledger.rows.Load())
}

// showDisk writes sizes; what cannot be read now is left out.
func (s *server) showDisk(ctx context.Context, t *metricsText) {
	if s.diskUse == nil {
		return
	}
	use, err := s.diskUse(ctx)
	if err != nil {
		return
	}
	t.about("database_bytes", "gauge", "Size of the database file, of its write-ahead log, and of the space in the file that is free for new rows.")
	t.int(use.file, "part", "file")
	t.int(use.log, "part", "wal")
	t.int(use.free, "part", "free")
	t.about("disk_free_bytes", "gauge", "What can still be written to the database's disk.")
	t.int(use.left)
}

// A diskUse is what the database takes on disk, in bytes.
type diskUse struct{ file, log, free, left int64 }

// showRuntime writes facts of the process and of Go's runtime.
func showRuntime(t *metricsText, started time.Time) {
	b := buildFacts()
	t.about("build_info", "gauge", "1, with the version in its labels.")
	t.int(1, "version", b.version, "revision", b.revision, "go", b.goVersion)
	t.about("process_start_time_seconds", "gauge", "When the process began, in unix time.")
	t.decimal(started.UnixMilli(), 3)
	if us, ok := cpuTime(); ok {
		t.about("process_cpu_seconds_total", "counter", "Processor time of the process.")
		t.decimal(us, 6)
	}
	for _, m := range []struct{ source, name, kind, help string }{
		{"/sched/goroutines:goroutines", "go_goroutines", "gauge", "Goroutines."},
		{"/sched/gomaxprocs:threads", "go_gomaxprocs", "gauge", "Threads that may run Go code at once."},
		{"/memory/classes/heap/objects:bytes", "go_heap_objects_bytes", "gauge", "Memory of live objects and of dead ones not yet swept."},
		{"/memory/classes/total:bytes", "go_memory_bytes", "gauge", "Memory that the runtime has mapped."},
		{"/gc/cycles/total:gc-cycles", "go_gc_cycles_total", "counter", "Garbage collections."},
		{"/gc/heap/allocs:bytes", "go_allocated_bytes_total", "counter", "Memory allocated since the start."},
	} {
		sample := []runtimemetrics.Sample{{Name: m.source}}
		runtimemetrics.Read(sample)
		if sample[0].Value.Kind() == runtimemetrics.KindUint64 {
			t.about(m.name, m.kind, m.help)
			t.int(int64(sample[0].Value.Uint64()))
		}
	}
}

// metricsServer is for a listener of its own, METRICS_ADDR: who reaches that
// needs no key. It knows one URL.
func (s *server) metricsServer() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", s.handleMetrics)
	return &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ConnState:         closeBeyond(64, nil),
		ErrorLog:          s.quietLog,
	}
}
