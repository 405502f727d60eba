// This file counts calls, tokens, money, durations and attempts, and writes the page
// of /metrics. Counting is a few atomic additions: it takes no lock and allocates
// nothing once a series exists. Clients cannot create series: every label value is
// from a closed set (endpoints, projects, upstreams, priced models, error codes), and
// each vector has a maximum size as well. Serving the page over HTTP is server.go's.
package main

import (
	"cmp"
	"context"
	"maps"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A histogram counts durations in microseconds by upper bound.
type histogram struct {
	counts [14]atomic.Int64 // the last one: above all bounds
	sum    atomic.Int64
}

// Upper bounds of histograms, in microseconds: slowBounds for durations that include a
// provider's, fastBounds for what this program does itself.
var (
	slowBounds = [13]int64{50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000, 30_000_000,
		60_000_000, 120_000_000, 300_000_000, 600_000_000}
	fastBounds = [13]int64{50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000}
)

func (h *histogram) observe(us int64, bounds *[13]int64) {
	i := 0
	for i < len(bounds) && us > bounds[i] {
		i++
	}
	h.counts[i].Add(1)
	h.sum.Add(us)
}

// labelValues are the values of a vector's labels.
type labelValues interface {
	[1]string | [2]string | [3]string
}

// A vector has one V, a set of counters, for each combination of label values that was
// counted. Readers take no lock: adding a combination replaces the map.
type vector[L labelValues, V any] struct {
	max    int        // combinations; one more is added for each overflow that get is given
	adding sync.Mutex // held while a combination is added
	series atomic.Pointer[map[L]*V]
}

// get returns the counters of a combination. If the vector is full, it returns those of
// overflow for combinations that it does not have, so that sums stay true.
func (v *vector[L, V]) get(labels, overflow L) *V {
	series := v.load()
	if c := series[labels]; c != nil {
		return c
	}
	if c := series[overflow]; c != nil && len(series) >= v.max {
		return c
	}
	v.adding.Lock()
	defer v.adding.Unlock()
	series = v.load()
	if series[labels] == nil && len(series) >= v.max {
		labels = overflow
	}
	if c := series[labels]; c != nil {
		return c
	}
	larger := make(map[L]*V, len(series)+1)
	maps.Copy(larger, series)
	larger[labels] = new(V)
	v.series.Store(&larger)
	return larger[labels]
}

// load returns the series. The map is never changed.
func (v *vector[L, V]) load() map[L]*V {
	if p := v.series.Load(); p != nil {
		return *p
	}
	return nil
}

// sorted returns the combinations, sorted by label values, and their counters.
func (v *vector[L, V]) sorted() (labels []L, counters []*V) {
	series := v.load()
	labels = slices.SortedFunc(maps.Keys(series), compareLabels)
	for _, l := range labels {
		counters = append(counters, series[l])
	}
	return labels, counters
}

// each calls do for every combination, sorted by label values.
func (v *vector[L, V]) each(do func(labels L, counters *V)) {
	labels, counters := v.sorted()
	for i, l := range labels {
		do(l, counters[i])
	}
}

func compareLabels[L labelValues](a, b L) int {
	for i := range len(a) {
		if order := cmp.Compare(a[i], b[i]); order != 0 {
			return order
		}
	}
	return 0
}

// Maximum numbers of combinations.
const (
	maxEndpointSeries = 1000
	maxModelSeries    = 4000
	maxUpstreamSeries = 2000
	maxCodeSeries     = 200
	otherLabel        = "other"
)

// countedOutcomes and countedClasses are the rows and columns of endpointCounters.
var (
	countedOutcomes = [...]callOutcome{
		outcomeOK, outcomeRefused, outcomeClientGone, outcomeTruncated, outcomeUpstreamError,
	}
	countedClasses = [...]errorClass{
		errorClassNone, errorClassCaller, errorClassPolicy, errorClassProvider, errorClassProxy,
	}
	tokenKinds = [...]string{"input", "cached_input", "output", "reasoning"}
)

// endpointCounters are the counters of one endpoint.
type endpointCounters struct {
	calls     [len(countedOutcomes)][len(countedClasses)]atomic.Int64
	firstByte histogram
	duration  histogram
}

// modelCounters are the counters of one project's use of one model.
type modelCounters struct {
	calls    [len(countedOutcomes)]atomic.Int64
	tokens   [len(tokenKinds)]atomic.Int64
	nanos    atomic.Int64 // nano-dollars
	unpriced atomic.Int64
}

// An attemptResult says how a request to a provider ended.
type attemptResult int

const (
	attemptOK          attemptResult = iota
	attemptRejected                  // 4xx: the provider rejected the request
	attemptRateLimited               // 429
	attemptKeyRefused                // 401 or 403: the provider refused the key
	attemptFailed                    // 5xx, or an answer that is not an API's
	attemptTimeout                   // no answer in time
	attemptUnreachable               // no connection, or it broke before the answer
	attemptAbandoned                 // the client left, or the call was ended, before the answer
	attemptResultCount
)

var attemptResultNames = [attemptResultCount]string{
	"ok", "refused", "rate_limited", "key_refused", "failed", "timeout", "unreachable", "abandoned",
}

// metrics holds everything that was counted since the program started.
type metrics struct {
	endpoints vector[[1]string, endpointCounters]
	models    vector[[3]string, modelCounters]                    // project, provider, model
	attempts  vector[[2]string, [attemptResultCount]atomic.Int64] // upstream, provider
	refusals  vector[[2]string, atomic.Int64]                     // error code, class
	requests  vector[[2]string, atomic.Int64]                     // route ("GET /manage/tokens"), status ("2xx")
	retries   vector[[1]string, atomic.Int64]                     // project

	overhead           histogram
	retryStorms        atomic.Int64 // requests that have failed again and again
	activeStreams      atomic.Int64 // streams that are being relayed
	openConnections    atomic.Int64 // of clients
	suppressedLogLines atomic.Int64 // about unauthenticated callers
}

func newMetrics() *metrics {
	m := &metrics{}
	m.endpoints.max, m.models.max, m.attempts.max = maxEndpointSeries, maxModelSeries, maxUpstreamSeries
	m.refusals.max, m.requests.max, m.retries.max = maxCodeSeries, maxCodeSeries, maxUpstreamSeries
	return m
}

func indexOf[T comparable](list []T, v T) int { return max(0, slices.Index(list, v)) }

// A forwardedCall has what is counted of a call that was admitted.
type forwardedCall struct {
	project  string
	provider string
	prices   *priceTable
	overhead time.Duration // 0: no provider answered the call
}

// countCall counts a call that has ended. e is nil if no endpoint matched, and f is nil
// if the call was refused.
func (m *metrics) countCall(e *endpoint, row *requestRow, f *forwardedCall) {
	outcome, class := indexOf(countedOutcomes[:], row.outcome), row.errorClass()
	name := "none"
	if e != nil {
		name = e.name()
	}
	ec := m.endpoints.get([1]string{name}, [1]string{otherLabel})
	ec.calls[outcome][indexOf(countedClasses[:], class)].Add(1)
	ec.duration.observe(row.totalUS, &slowBounds)
	if row.outcome == outcomeRefused {
		m.refusals.get([2]string{row.errorCode, string(class)}, [2]string{otherLabel, string(class)}).Add(1)
	}
	if f == nil {
		return
	}
	if row.firstByteUS >= 0 {
		ec.firstByte.observe(row.firstByteUS, &slowBounds)
	}
	if f.overhead > 0 {
		m.overhead.observe(f.overhead.Microseconds(), &fastBounds)
	}
	mc := m.countUsage(f, row)
	mc.calls[outcome].Add(1)
}

// countUsage counts what a call has used, and returns the counters of its model.
func (m *metrics) countUsage(f *forwardedCall, row *requestRow) *modelCounters {
	model := [3]string{f.project, f.provider, f.prices.metricLabel(row.model)}
	mc := m.models.get(model, [3]string{otherLabel, otherLabel, otherLabel})
	for i, n := range [...]int64{row.counts.input, row.counts.cached, row.counts.output, row.counts.reasoning} {
		if n > 0 {
			addCounter(&mc.tokens[i], n)
		}
	}
	if row.priced {
		addCounter(&mc.nanos, row.cost)
	} else if row.source != usageNone {
		mc.unpriced.Add(1)
	}
	return mc
}

// addCounter adds to a counter, which stays at the largest int64 if it would overflow.
func addCounter(counter *atomic.Int64, n int64) {
	for old := counter.Load(); !counter.CompareAndSwap(old, addSat(old, n)); {
		old = counter.Load()
	}
}

// countAttempt counts a request to a provider that has ended.
func (m *metrics) countAttempt(u *upstream, result attemptResult) {
	m.attempts.get([2]string{u.id, u.provider}, [2]string{otherLabel, otherLabel})[result].Add(1)
}

// countClientRetry counts a call of a project that its client had sent before.
func (m *metrics) countClientRetry(project string) {
	m.retries.get([1]string{project}, [1]string{otherLabel}).Add(1)
}

// resultOfStatus returns the result of an attempt that a provider answered.
func resultOfStatus(status int) attemptResult {
	switch {
	case status == 401 || status == 403:
		return attemptKeyRefused
	case status == 429:
		return attemptRateLimited
	case status >= 400 && status < 500:
		return attemptRejected
	case status >= 200 && status < 300:
		return attemptOK
	}
	return attemptFailed
}

// resultOfError returns the result of an attempt that ended before the provider's
// headers came, by the error that the client gets; nil: the client had left.
func resultOfError(e *apiError) attemptResult {
	switch {
	case e == nil:
		return attemptAbandoned
	case e.status == 504:
		return attemptTimeout
	case e.code == "upstream_unreachable":
		return attemptUnreachable
	}
	return attemptAbandoned
}

// countRequest counts a request to a URL outside /v1.
func (m *metrics) countRequest(pattern string, status int) {
	group := "none"
	if status >= 100 && status < 600 {
		group = statusGroups[status/100]
	}
	m.requests.get([2]string{cmp.Or(pattern, "none"), group}, [2]string{otherLabel, group}).Add(1)
}

var statusGroups = [...]string{"none", "1xx", "2xx", "3xx", "4xx", "5xx"}

// A metricsWriter writes a page in Prometheus' text format.
type metricsWriter struct {
	b      []byte
	family string
}

// beginFamily starts a metric family. Names that are not go_ or process_ get our prefix.
func (w *metricsWriter) beginFamily(name, kind, help string) {
	w.family = "llm_proxy_" + name
	if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") {
		w.family = name
	}
	w.b = append(w.b, "# HELP "+w.family+" "+help+"\n# TYPE "+w.family+" "+kind+"\n"...)
}

// writeLabels writes {a="b",…}; pairs holds names and values in turn.
func (w *metricsWriter) writeLabels(pairs []string) {
	for i := 0; i+1 < len(pairs); i += 2 {
		w.b = append(w.b, "{,"[min(i, 1)])
		w.b = append(append(w.b, pairs[i]...), `="`...)
		for _, r := range pairs[i+1] { // range turns invalid UTF-8 into U+FFFD
			switch r {
			case '\\':
				w.b = append(w.b, `\\`...)
			case '"':
				w.b = append(w.b, `\"`...)
			case '\n':
				w.b = append(w.b, `\n`...)
			default:
				w.b = append(w.b, string(r)...)
			}
		}
		w.b = append(w.b, '"')
	}
	if len(pairs) > 0 {
		w.b = append(w.b, '}')
	}
}

func (w *metricsWriter) writeInt(n int64, pairs ...string) {
	w.b = append(w.b, w.family...)
	w.writeLabels(pairs)
	w.b = append(strconv.AppendInt(append(w.b, ' '), n, 10), '\n')
}

// writeDecimal writes n/10^places.
func (w *metricsWriter) writeDecimal(n int64, places int, pairs ...string) {
	w.b = append(w.b, w.family...)
	w.writeLabels(pairs)
	w.b = append(append(append(w.b, ' '), formatDecimal(n, places)...), '\n')
}

// writeHistogram writes a histogram in seconds.
func (w *metricsWriter) writeHistogram(h *histogram, bounds *[13]int64, pairs ...string) {
	name, sum := w.family, int64(0)
	w.family = name + "_bucket"
	for i := range h.counts {
		sum += h.counts[i].Load()
		le := "+Inf"
		if i < len(bounds) {
			le = formatDecimal(bounds[i], 6)
		}
		w.writeInt(sum, append(slices.Clip(pairs), "le", le)...)
	}
	w.family = name + "_sum"
	w.writeDecimal(h.sum.Load(), 6, pairs...)
	w.family = name + "_count"
	w.writeInt(sum, pairs...) // the sum of the buckets, so that the two agree while calls are counted
	w.family = name
}

// hasObservations reports whether anything was observed.
func (h *histogram) hasObservations() bool {
	for i := range h.counts {
		if h.counts[i].Load() > 0 {
			return true
		}
	}
	return false
}

func (m *metrics) writeCalls(w *metricsWriter) {
	var byClass [len(countedClasses)]int64
	w.beginFamily("calls_total", "counter", "Finished calls under /v1, by outcome and class of error.")
	m.endpoints.each(func(labels [1]string, ec *endpointCounters) {
		for o := range countedOutcomes {
			for c := range countedClasses {
				n := ec.calls[o][c].Load()
				byClass[c] += n
				if n > 0 {
					w.writeInt(n, "endpoint", labels[0], "outcome", string(countedOutcomes[o]),
						"class", cmp.Or(string(countedClasses[c]), "none"))
				}
			}
		}
	})
	w.beginFamily("errors_total", "counter", "Calls that failed, by class of error.")
	for c, class := range countedClasses {
		if class != errorClassNone {
			w.writeInt(byClass[c], "class", string(class))
		}
	}
	writeDurations := func(name, help string, pick func(*endpointCounters) *histogram) {
		w.beginFamily(name, "histogram", help)
		m.endpoints.each(func(labels [1]string, ec *endpointCounters) {
			if h := pick(ec); h.hasObservations() {
				w.writeHistogram(h, &slowBounds, "endpoint", labels[0])
			}
		})
	}
	writeDurations("first_byte_seconds", "Time from a request's arrival to the first byte of its answer.",
		func(ec *endpointCounters) *histogram { return &ec.firstByte })
	writeDurations("duration_seconds", "Time from a request's arrival to the last byte of its answer.",
		func(ec *endpointCounters) *histogram { return &ec.duration })
	w.beginFamily("overhead_seconds", "histogram",
		"The part of the time to the first byte that was spent neither by the provider nor by the client.")
	w.writeHistogram(&m.overhead, &fastBounds)
}

func (m *metrics) writeModels(w *metricsWriter) {
	models, counters := m.models.sorted()
	each := func(write func(mc *modelCounters, labels ...string)) {
		for i, l := range models {
			write(counters[i], "project", l[0], "provider", l[1], "model", l[2])
		}
	}
	w.beginFamily("model_calls_total", "counter",
		"Finished calls that were admitted, by project, provider, model and outcome.")
	each(func(mc *modelCounters, labels ...string) {
		for o := range countedOutcomes {
			if n := mc.calls[o].Load(); n > 0 {
				w.writeInt(n, append(labels, "outcome", string(countedOutcomes[o]))...)
			}
		}
	})
	w.beginFamily("tokens_total", "counter", "Tokens used. cached_input is part of input, reasoning part of output.")
	each(func(mc *modelCounters, labels ...string) {
		for i := range tokenKinds {
			if n := mc.tokens[i].Load(); n > 0 {
				w.writeInt(n, append(labels, "kind", tokenKinds[i])...)
			}
		}
	})
	w.beginFamily("cost_dollars_total", "counter", "Cost of calls, by the price table.")
	each(func(mc *modelCounters, labels ...string) { w.writeDecimal(mc.nanos.Load(), 9, labels...) })
	w.beginFamily("unpriced_calls_total", "counter",
		"Calls that used tokens without a known price; no sum contains their cost.")
	each(func(mc *modelCounters, labels ...string) {
		if n := mc.unpriced.Load(); n > 0 {
			w.writeInt(n, labels...)
		}
	})
}

func (m *metrics) writeRequests(w *metricsWriter) {
	w.beginFamily("refusals_total", "counter",
		"Refused calls, by error code; if the token is not valid, by the reason.")
	m.refusals.each(func(l [2]string, n *atomic.Int64) { w.writeInt(n.Load(), "code", l[0], "class", l[1]) })
	w.beginFamily("upstream_attempts_total", "counter", "Requests to providers, by upstream and result.")
	m.attempts.each(func(l [2]string, results *[attemptResultCount]atomic.Int64) {
		for i, name := range attemptResultNames {
			// Zeros are written too, so that an alert sees the first failure as an increase.
			w.writeInt(results[i].Load(), "upstream", l[0], "provider", l[1], "result", name)
		}
	})
	w.beginFamily("client_retries_total", "counter", "Calls that clients had sent before, as far as that is known.")
	m.retries.each(func(l [1]string, n *atomic.Int64) { w.writeInt(n.Load(), "project", l[0]) })
	w.beginFamily("retry_storms_total", "counter", "Requests of a token that failed ten times in a row.")
	w.writeInt(m.retryStorms.Load())
	w.beginFamily("http_requests_total", "counter", "Requests to URLs outside /v1, by route and class of status.")
	m.requests.each(func(l [2]string, n *atomic.Int64) { w.writeInt(n.Load(), "route", l[0], "status", l[1]) })
}

// A runningSnapshot describes the running calls at one moment.
type runningSnapshot struct {
	phases   []phaseCount
	draining bool
}

type phaseCount struct {
	phase string
	calls int64
}

// A diskUsage is the space that the database takes on disk, in bytes.
type diskUsage struct{ databaseSize, walSize, reusable, available int64 }

// An exporter writes the page of /metrics: the counters and the state of the program.
type exporter struct {
	cfg             *config
	metrics         *metrics
	registry        *registry
	health          *healthTracker
	ledger          *ledger
	bodies          *bodyMemory
	cache           *responseCache
	running         func() runningSnapshot
	diskUse         func(context.Context) (diskUsage, error)
	droppedLogLines func() int64
	started         time.Time
}

// page returns the page.
func (e *exporter) page(ctx context.Context) []byte {
	w := &metricsWriter{b: make([]byte, 0, 64<<10)}
	e.metrics.writeCalls(w)
	e.metrics.writeModels(w)
	e.metrics.writeRequests(w)
	e.writeRunning(w)
	e.writeLedger(w)
	e.cache.writeMetrics(w)
	e.writeReplica(w)
	e.writeDisk(ctx, w)
	writeRuntime(w, e.started)
	return w.b
}

// writeRunning writes the load of the program.
func (e *exporter) writeRunning(w *metricsWriter) {
	running := e.running()
	w.beginFamily("running_calls", "gauge", "Running calls, by what they are waiting for.")
	for _, p := range running.phases {
		w.writeInt(p.calls, "phase", p.phase)
	}
	w.beginFamily("draining", "gauge", "1 while new calls are refused because the program is stopping.")
	w.writeInt(boolToInt(running.draining))
	w.beginFamily("upstreams", "gauge", "Upstreams of projects used since the start, by the state of their keys.")
	for state, n := range e.health.countByState(time.Now().UnixMilli()) {
		w.writeInt(n, "state", keyState(state).String())
	}
	tokens, projects := e.registry.size()
	w.writeGauges([]gauge{
		{"running_calls_max", "MAX_CONCURRENT_CALLS.", e.cfg.maxCalls},
		{"running_streams", "Event streams that are being relayed.", e.metrics.activeStreams.Load()},
		{"connections", "Open connections of clients.", e.metrics.openConnections.Load()},
		{"connections_max", "MAX_CONNECTIONS.", e.cfg.maxConnections},
		{"body_memory_bytes", "Memory that request bodies take.", e.bodies.used.Load()},
		{"body_memory_max_bytes", "BODY_MEMORY.", e.bodies.limit},
		{"registry_tokens", "Recently used tokens that are kept in memory.", tokens},
		{"registry_projects", "Projects that are kept in memory.", projects},
	})
	w.beginFamily("log_lines_left_out_total", "counter",
		"Log lines about unauthenticated callers that were not written, to protect the disk.")
	w.writeInt(e.metrics.suppressedLogLines.Load())
	w.beginFamily("log_lines_dropped_total", "counter", "Log lines that were lost because their reader was too slow.")
	w.writeInt(e.droppedLogLines())
}

// A gauge is a family with one sample.
type gauge struct {
	name, help string
	value      int64
}

func (w *metricsWriter) writeGauges(gauges []gauge) {
	for _, g := range gauges {
		w.beginFamily(g.name, "gauge", g.help)
		w.writeInt(g.value)
	}
}

func boolToInt(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func (e *exporter) writeLedger(w *metricsWriter) {
	begins, settles := e.ledger.backlog()
	w.beginFamily("ledger_queue_rows", "gauge", "Rows that wait to be committed.")
	w.writeInt(begins, "kind", "begin")
	w.writeInt(settles, "kind", "settle")
	w.beginFamily("ledger_failing", "gauge", "1 while the ledger cannot be written; calls are refused then.")
	w.writeInt(boolToInt(!e.ledger.healthy()))
	w.beginFamily("ledger_commit_seconds", "histogram", "Time to commit one batch of rows.")
	w.writeHistogram(&e.ledger.commitDurations, &fastBounds)
	w.beginFamily("ledger_rows_total", "counter",
		"Committed rows: a pending record and a row for an admitted call, a row for a refused one.")
	w.writeInt(e.ledger.committedRows.Load())
	w.beginFamily("ledger_rows_refused_total", "counter",
		"Writes of rows that the database refused, such as by a trigger; each retry counts.")
	w.writeInt(e.ledger.refusedRows.Load())
}

// writeMetrics writes what the response cache has, and what it has done since the start.
func (c *responseCache) writeMetrics(w *metricsWriter) {
	c.mu.Lock()
	inMemory, memoryBytes, onDisk, diskBytes := c.memory.count, c.memoryBytes, len(c.onDisk), c.diskBytes
	c.mu.Unlock()
	for _, f := range []struct {
		name, help string
		value      int64
	}{
		{"hits_total", "Calls that the response cache answered.", c.hits.Load()},
		{"collapsed_total", "Hits that waited for the answer to an identical call.", c.collapsed.Load()},
		{"misses_total", "Calls that the cache could have answered and did not.", c.misses.Load()},
		{"stored_total", "Answers that were cached.", c.stored.Load()},
		{"evictions_total", "Answers that were deleted from the disk to make room.", c.evicted.Load()},
		{"dropped_writes_total", "Answers that should be on disk and are not: the disk was too slow, or failed.",
			c.dropped.Load()},
	} {
		w.beginFamily("cache_"+f.name, "counter", f.help)
		w.writeInt(f.value)
	}
	w.beginFamily("cache_bypasses_total", "counter",
		"Calls of projects with a cache that took no part in it, by reason.")
	for i, reason := range bypassReasons {
		w.writeInt(c.bypasses[i].Load(), "reason", reason)
	}
	w.beginFamily("cache_saved_dollars_total", "counter", "What the answers from the cache would have cost.")
	w.writeDecimal(c.savedNanos.Load(), 9)
	w.beginFamily("cache_saved_seconds_total", "counter", "How much longer the providers would have taken.")
	w.writeDecimal(c.savedUS.Load(), 6)
	w.beginFamily("cache_entries", "gauge", "Cached answers, in memory and on disk. Most are in both.")
	w.writeInt(int64(inMemory), "tier", "memory")
	w.writeInt(int64(onDisk), "tier", "disk")
	w.beginFamily("cache_bytes", "gauge", "Size of these answers.")
	w.writeInt(memoryBytes, "tier", "memory")
	w.writeInt(max(0, diskBytes), "tier", "disk")
	w.writeGauges([]gauge{
		{"cache_max_bytes", "MAX_CACHE_BYTES.", c.maxBytes},
		{"cache_waiting_calls", "Calls that wait for the answer to an identical one.", c.waiting.Load()},
	})
}

// writeReplica writes what concerns one of several replicas; with SQLite there is nothing.
func (e *exporter) writeReplica(w *metricsWriter) {
	if e.ledger.store.backend == nil {
		return
	}
	s := e.ledger.store.backend.status()
	w.writeGauges([]gauge{
		{"replica_leader", "1 on the replica that does what only one does.", boolToInt(s.Leader)},
		{"replica_changes_lag_milliseconds", "Time since the last look for administrators' changes.", s.LagMS},
		{"replica_clock_offset_milliseconds", "How far the database's clock is ahead of this machine's.", s.OffsetMS},
	})
}

// writeDisk writes sizes. It leaves them out if they cannot be read.
func (e *exporter) writeDisk(ctx context.Context, w *metricsWriter) {
	use, err := e.diskUse(ctx)
	if err != nil {
		return
	}
	w.beginFamily("database_bytes", "gauge",
		"Size of the database file, of its write-ahead log, and of the free space inside the file.")
	w.writeInt(use.databaseSize, "part", "file")
	w.writeInt(use.walSize, "part", "wal")
	w.writeInt(use.reusable, "part", "free")
	w.writeGauges([]gauge{{"disk_free_bytes", "Free space on the database's disk.", use.available}})
}

// writeRuntime writes measurements of the process and of the Go runtime.
func writeRuntime(w *metricsWriter, started time.Time) {
	b := readBuildInfo()
	w.beginFamily("build_info", "gauge", "Always 1; the labels have the version.")
	w.writeInt(1, "version", b.version, "revision", b.revision, "go", b.goVersion)
	w.beginFamily("process_start_time_seconds", "gauge", "Start time of the process, in unix time.")
	w.writeDecimal(started.UnixMilli(), 3)
	if us, ok := cpuTime(); ok {
		w.beginFamily("process_cpu_seconds_total", "counter", "Processor time that the process used.")
		w.writeDecimal(us, 6)
	}
	for _, m := range []struct{ source, name, kind, help string }{
		{"/sched/goroutines:goroutines", "go_goroutines", "gauge", "Goroutines."},
		{"/sched/gomaxprocs:threads", "go_gomaxprocs", "gauge", "Threads that may run Go code at the same time."},
		{"/memory/classes/heap/objects:bytes", "go_heap_objects_bytes", "gauge",
			"Memory of live objects and of dead objects that are not swept yet."},
		{"/memory/classes/total:bytes", "go_memory_bytes", "gauge", "Memory that the runtime has mapped."},
		{"/gc/cycles/total:gc-cycles", "go_gc_cycles_total", "counter", "Garbage collections."},
		{"/gc/heap/allocs:bytes", "go_allocated_bytes_total", "counter", "Memory allocated since the start."},
	} {
		sample := []runtimemetrics.Sample{{Name: m.source}}
		runtimemetrics.Read(sample)
		if sample[0].Value.Kind() == runtimemetrics.KindUint64 {
			w.beginFamily(m.name, m.kind, m.help)
			w.writeInt(int64(sample[0].Value.Uint64()))
		}
	}
}
