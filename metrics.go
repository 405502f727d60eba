// This room counts: calls, tokens, money, times, attempts, for /metrics. To
// count is some atomic additions, and never an allocation once a series is there.
// Every label is from a closed set (endpoints, projects, upstreams, models with a
// price, codes of ours), and each set has an upper bound besides: nothing that a
// client sends can make a series. Plain code: what is shown is metrics.go's.
package main

import (
	"cmp"
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
	counts [14]atomic.Int64 // the last: above all bounds
	sum    atomic.Int64
}

// Bounds of histograms, in microseconds: of what takes as long as a provider
// does, and of what this program does itself.
var (
	slowBounds = [13]int64{50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000, 30_000_000, 60_000_000, 120_000_000, 300_000_000, 600_000_000}
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

// countedOutcomes and countedClasses are the rows and columns of endpointMetrics.
var (
	countedOutcomes = [...]callOutcome{outcomeOK, outcomeRefused, outcomeClientGone, outcomeTruncated, outcomeUpstreamError}
	countedClasses  = [...]errorClass{errorClassNone, errorClassCaller, errorClassPolicy, errorClassProvider, errorClassProxy}
)

// endpointMetrics is what is counted of one endpoint.
type endpointMetrics struct {
	calls     [len(countedOutcomes)][len(countedClasses)]atomic.Int64
	firstByte histogram
	total     histogram
}

// modelMetrics is what is counted of one project's use of one model.
type modelMetrics struct {
	calls    [len(countedOutcomes)]atomic.Int64
	tokens   [len(tokenKinds)]atomic.Int64
	nanos    atomic.Int64
	unpriced atomic.Int64
}

var tokenKinds = [...]string{"input", "cached_input", "output", "reasoning"}

type modelKey struct{ project, provider, model string }

// An attemptResult is how a request to a provider ended, for its upstream's series.
type attemptResult int

const (
	attemptOK          attemptResult = iota
	attemptRejected                  // 4xx: the request was at fault
	attemptRateLimited               // 429
	attemptKeyRefused                // 401 or 403: the key was
	attemptFailed                    // 5xx, or no answer to an API call
	attemptTimeout                   // no answer in time
	attemptUnreachable               // no connection, or it broke before an answer
	attemptAbandoned                 // the client left, or the call was ended, before one
	attemptResultCount
)

var attemptResultNames = [attemptResultCount]string{"ok", "refused", "rate_limited", "key_refused", "failed", "timeout", "unreachable", "abandoned"}

type upstreamMetrics struct {
	attempts [attemptResultCount]atomic.Int64
}

type upstreamKey struct{ upstream, provider string }

// Upper bounds on series. Beyond them calls count under "other": sums stay true.
const (
	maxModelSeries    = 4000
	maxUpstreamSeries = 2000
	maxCodeSeries     = 200
	otherLabel        = "other"
)

// metrics is all that is counted since the program started.
type metrics struct {
	endpoints          map[*endpoint]*endpointMetrics // made once, never changed
	noEndpoint         endpointMetrics                // calls that did not come as far as an endpoint
	overhead           histogram
	activeStreams      atomic.Int64 // being relayed now
	openConnections    atomic.Int64 // connections of clients
	suppressedLogLines atomic.Int64 // log lines about strangers

	models    series[modelKey, modelMetrics]
	upstreams series[upstreamKey, upstreamMetrics]
	codes     series[codeKey, atomic.Int64]
	routes    series[routeKey, atomic.Int64]
}

type codeKey struct {
	code  string
	class errorClass
}

type routeKey struct {
	route  string // as in routes: "GET /manage/tokens"
	status string // "2xx"
}

func newMetrics() *metrics {
	m := &metrics{endpoints: map[*endpoint]*endpointMetrics{}}
	m.models.maxLen, m.upstreams.maxLen, m.codes.maxLen, m.routes.maxLen = maxModelSeries, maxUpstreamSeries, maxCodeSeries, maxCodeSeries
	return m
}

// registerEndpoints makes room for every endpoint there is, so that counting needs no lock.
func (m *metrics) registerEndpoints(t *endpointTable) {
	for _, e := range t.all() {
		m.endpoints[e] = &endpointMetrics{}
	}
}

// series is a bounded set of things counted.
type series[K comparable, V any] struct {
	maxLen int
	mu     sync.RWMutex
	m      map[K]*V
}

// get returns what is counted under k, or nil if that would be one too many.
func (s *series[K, V]) get(k K) *V {
	s.mu.RLock()
	v := s.m[k]
	s.mu.RUnlock()
	if v != nil {
		return v
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if v = s.m[k]; v != nil || len(s.m) >= s.maxLen {
		return v
	}
	if s.m == nil {
		s.m = map[K]*V{}
	}
	v = new(V)
	s.m[k] = v
	return v
}

// getOrOther is get, with a place for what is too much. The few others there are may
// exceed the bound.
func (s *series[K, V]) getOrOther(k, other K) *V {
	if v := s.get(k); v != nil {
		return v
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m[other] == nil {
		s.m[other] = new(V)
	}
	return s.m[other]
}

func indexOf[T comparable](list []T, v T) int {
	for i := range list {
		if list[i] == v {
			return i
		}
	}
	return 0
}

// forEndpoint returns what is counted of an endpoint; nil: there is none.
func (m *metrics) forEndpoint(e *endpoint) *endpointMetrics {
	if em := m.endpoints[e]; em != nil {
		return em
	}
	return &m.noEndpoint
}

// A forwardedCall is what is counted of a call that was admitted.
type forwardedCall struct {
	project  string
	provider string
	prices   *priceTable
	overhead time.Duration // 0: the call was not answered by a provider
}

// countCall counts a call that has ended; f is nil where it was refused.
func (m *metrics) countCall(e *endpoint, row *requestRow, f *forwardedCall) {
	o, class := indexOf(countedOutcomes[:], row.outcome), row.errorClass()
	em := m.forEndpoint(e)
	em.calls[o][indexOf(countedClasses[:], class)].Add(1)
	em.total.observe(row.totalUS, &slowBounds)
	if row.outcome == outcomeRefused {
		m.codes.getOrOther(codeKey{row.errorCode, class}, codeKey{otherLabel, class}).Add(1)
	}
	if f == nil {
		return
	}
	if row.firstByteUS >= 0 {
		em.firstByte.observe(row.firstByteUS, &slowBounds)
	}
	if f.overhead > 0 {
		m.overhead.observe(f.overhead.Microseconds(), &fastBounds)
	}
	k := modelKey{f.project, f.provider, f.prices.metricLabel(row.model)}
	mm := m.models.getOrOther(k, modelKey{otherLabel, otherLabel, otherLabel})
	mm.calls[o].Add(1)
	for i, n := range [...]int64{row.counts.input, row.counts.cached, row.counts.output, row.counts.reasoning} {
		if n > 0 {
			mm.tokens[i].Add(n)
		}
	}
	if row.priced {
		mm.nanos.Add(row.cost)
	} else if row.source != usageNone {
		mm.unpriced.Add(1)
	}
}

// countAttempt counts how a request to a provider ended.
func (m *metrics) countAttempt(u *upstream, how attemptResult) {
	m.upstreams.getOrOther(upstreamKey{u.id, u.provider}, upstreamKey{otherLabel, otherLabel}).attempts[how].Add(1)
}

// resultOfStatus sorts a provider's status.
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

// resultOfError sorts an attempt that ended before the provider's head came, by
// what the client was told; nil: it had left.
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

// countRequest counts a request to anything but /v1.
func (m *metrics) countRequest(pattern string, status int) {
	group := "none"
	if status >= 100 && status < 600 {
		group = string(rune('0'+status/100)) + "xx"
	}
	m.routes.getOrOther(routeKey{pattern, group}, routeKey{otherLabel, group}).Add(1)
}

// A metricsWriter is a page of metrics as it is written.
type metricsWriter struct {
	b      []byte
	family string
}

// beginFamily begins a family.
func (t *metricsWriter) beginFamily(name, kind, help string) {
	t.family = "llm_proxy_" + name
	if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") {
		t.family = name
	}
	t.b = append(t.b, "# HELP "+t.family+" "+help+"\n# TYPE "+t.family+" "+kind+"\n"...)
}

// writeLabels writes {a="b",…}; pairs are names and values.
func (t *metricsWriter) writeLabels(pairs []string) {
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

func (t *metricsWriter) writeInt(n int64, pairs ...string) {
	t.b = append(t.b, t.family...)
	t.writeLabels(pairs)
	t.b = append(strconv.AppendInt(append(t.b, ' '), n, 10), '\n')
}

// writeDecimal writes n/10^places.
func (t *metricsWriter) writeDecimal(n int64, places int, pairs ...string) {
	t.b = append(t.b, t.family...)
	t.writeLabels(pairs)
	t.b = append(append(append(t.b, ' '), formatDecimal(n, places)...), '\n')
}

// writeHistogram writes one in seconds.
func (t *metricsWriter) writeHistogram(h *histogram, bounds *[13]int64, pairs ...string) {
	name, sum := t.family, int64(0)
	t.family = name + "_bucket"
	for i := range h.counts {
		sum += h.counts[i].Load()
		le := "+Inf"
		if i < len(bounds) {
			le = formatDecimal(bounds[i], 6)
		}
		t.writeInt(sum, append(slices.Clip(pairs), "le", le)...)
	}
	t.family = name + "_sum"
	t.writeDecimal(h.sum.Load(), 6, pairs...)
	t.family = name + "_count"
	t.writeInt(sum, pairs...) // the buckets' own, so that the two agree while calls go on
	t.family = name
}

// eachEndpoint calls do with every endpoint, and the calls that found none, with its name.
func (m *metrics) eachEndpoint(table *endpointTable, do func(name string, em *endpointMetrics)) {
	for _, e := range table.all() {
		do(e.name(), m.forEndpoint(e))
	}
	do("none", &m.noEndpoint)
}

func (m *metrics) writeCalls(t *metricsWriter, table *endpointTable) {
	t.beginFamily("calls_total", "counter", "Calls under /v1 that ended, by how and whose trouble it was.")
	m.eachEndpoint(table, func(name string, em *endpointMetrics) {
		for o := range countedOutcomes {
			for c := range countedClasses {
				if n := em.calls[o][c].Load(); n > 0 {
					t.writeInt(n, "endpoint", name, "outcome", string(countedOutcomes[o]), "class", cmp.Or(string(countedClasses[c]), "none"))
				}
			}
		}
	})
	t.beginFamily("errors_total", "counter", "Calls that did not go well, by whose trouble it was.")
	for c, class := range countedClasses {
		if class == errorClassNone {
			continue
		}
		var sum int64
		m.eachEndpoint(table, func(_ string, em *endpointMetrics) {
			for o := range countedOutcomes {
				sum += em.calls[o][c].Load()
			}
		})
		t.writeInt(sum, "class", string(class))
	}
	show := func(name, help string, of func(*endpointMetrics) *histogram) {
		t.beginFamily(name, "histogram", help)
		m.eachEndpoint(table, func(name string, em *endpointMetrics) {
			if h := of(em); h.hasObservations() {
				t.writeHistogram(h, &slowBounds, "endpoint", name)
			}
		})
	}
	show("first_byte_seconds", "From a request's arrival to the first byte of its answer.", func(em *endpointMetrics) *histogram { return &em.firstByte })
	show("duration_seconds", "From a request's arrival to the last byte of its answer.", func(em *endpointMetrics) *histogram { return &em.total })
	t.beginFamily("overhead_seconds", "histogram", "Of the time to the first byte, what was neither the provider's nor the client's.")
	t.writeHistogram(&m.overhead, &fastBounds)
}

func (h *histogram) hasObservations() bool {
	for i := range h.counts {
		if h.counts[i].Load() > 0 {
			return true
		}
	}
	return false
}

// sorted copies a series, in order.
func (s *series[K, V]) sorted(order func(a, b K) int) (keys []K, values []*V) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	keys = slices.SortedFunc(maps.Keys(s.m), order)
	for _, k := range keys {
		values = append(values, s.m[k])
	}
	return keys, values
}

func (m *metrics) writeModels(t *metricsWriter) {
	keys, values := m.models.sorted(func(a, b modelKey) int {
		return cmp.Or(cmp.Compare(a.project, b.project), cmp.Compare(a.provider, b.provider), cmp.Compare(a.model, b.model))
	})
	each := func(do func(mm *modelMetrics, labels ...string)) {
		for i, k := range keys {
			do(values[i], "project", k.project, "provider", k.provider, "model", k.model)
		}
	}
	t.beginFamily("model_calls_total", "counter", "Admitted calls that ended, by project, provider, model and outcome.")
	each(func(mm *modelMetrics, labels ...string) {
		for o := range countedOutcomes {
			if n := mm.calls[o].Load(); n > 0 {
				t.writeInt(n, append(labels, "outcome", string(countedOutcomes[o]))...)
			}
		}
	})
	t.beginFamily("tokens_total", "counter", "Tokens used. cached_input is part of input, reasoning part of output.")
	each(func(mm *modelMetrics, labels ...string) {
		for i := range tokenKinds {
			if n := mm.tokens[i].Load(); n > 0 {
				t.writeInt(n, append(labels, "kind", tokenKinds[i])...)
			}
		}
	})
	t.beginFamily("cost_dollars_total", "counter", "What calls cost, by the price table.")
	each(func(mm *modelMetrics, labels ...string) { t.writeDecimal(mm.nanos.Load(), 9, labels...) })
	t.beginFamily("unpriced_calls_total", "counter", "Calls that used tokens without a known price; their cost is in no sum.")
	each(func(mm *modelMetrics, labels ...string) {
		if n := mm.unpriced.Load(); n > 0 {
			t.writeInt(n, labels...)
		}
	})
}

func (m *metrics) writeSeries(t *metricsWriter) {
	t.beginFamily("refusals_total", "counter", "Calls that were refused, by error code; of bad tokens, by what was wrong with them.")
	codes, refused := m.codes.sorted(func(a, b codeKey) int { return cmp.Or(cmp.Compare(a.code, b.code), cmp.Compare(a.class, b.class)) })
	for i, k := range codes {
		t.writeInt(refused[i].Load(), "code", k.code, "class", string(k.class))
	}
	t.beginFamily("upstream_attempts_total", "counter", "Requests to providers, by upstream and how each ended.")
	ups, tried := m.upstreams.sorted(func(a, b upstreamKey) int { return cmp.Compare(a.upstream, b.upstream) })
	for i, k := range ups {
		for how, name := range attemptResultNames {
			// Zeros too: what has never failed must be seen to fail for the first time.
			t.writeInt(tried[i].attempts[how].Load(), "upstream", k.upstream, "provider", k.provider, "result", name)
		}
	}
	t.beginFamily("http_requests_total", "counter", "Requests to anything but /v1, by route and kind of status.")
	routes, asked := m.routes.sorted(func(a, b routeKey) int { return cmp.Or(cmp.Compare(a.route, b.route), cmp.Compare(a.status, b.status)) })
	for i, k := range routes {
		t.writeInt(asked[i].Load(), "route", cmp.Or(k.route, "none"), "status", k.status)
	}
}

// A diskUsage is what the database takes on disk, in bytes.
type diskUsage struct{ databaseSize, walSize, reusable, available int64 }

// writeRuntime writes facts of the process and of Go's runtime.
func writeRuntime(t *metricsWriter, started time.Time) {
	b := readBuildInfo()
	t.beginFamily("build_info", "gauge", "1, with the version in its labels.")
	t.writeInt(1, "version", b.version, "revision", b.revision, "go", b.goVersion)
	t.beginFamily("process_start_time_seconds", "gauge", "When the process began, in unix time.")
	t.writeDecimal(started.UnixMilli(), 3)
	if us, ok := cpuTime(); ok {
		t.beginFamily("process_cpu_seconds_total", "counter", "Processor time of the process.")
		t.writeDecimal(us, 6)
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
			t.beginFamily(m.name, m.kind, m.help)
			t.writeInt(int64(sample[0].Value.Uint64()))
		}
	}
}
