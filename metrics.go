// This room counts: calls, tokens, money, times, attempts, for /metrics. To
// count is some atomic additions, and never an allocation once a series is there.
// Every label is from a closed set (endpoints, projects, upstreams, models with a
// price, codes of ours), and each set has an upper bound besides: nothing that a
// client sends can make a series. Plain code: what is shown is metrics.go's.
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
	countedOutcomes = [...]outcome{outcomeOK, outcomeRefused, outcomeClientGone, outcomeTruncated, outcomeUpstreamError}
	countedClasses  = [...]errorClass{classNone, classCaller, classPolicy, classProvider, classProxy}
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

// An attempt is how a request to a provider ended, for its upstream's series.
type attempt int

const (
	attemptOK          attempt = iota
	attemptRefused             // 4xx: the request was at fault
	attemptLimited             // 429
	attemptAuth                // 401 or 403: the key was
	attemptFailed              // 5xx, or no answer to an API call
	attemptTimeout             // no answer in time
	attemptUnreachable         // no connection, or it broke before an answer
	attemptAbandoned           // the client left, or the call was ended, before one
	attempts
)

var attemptNames = [attempts]string{"ok", "refused", "rate_limited", "key_refused", "failed", "timeout", "unreachable", "abandoned"}

type upstreamMetrics struct{ attempts [attempts]atomic.Int64 }

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
	endpoints map[*endpoint]*endpointMetrics // made once, never changed
	nowhere   endpointMetrics                // calls that did not come as far as an endpoint
	overhead  histogram
	streams   atomic.Int64 // being relayed now
	open      atomic.Int64 // connections of clients
	leftOut   atomic.Int64 // log lines about strangers

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
	m.models.most, m.upstreams.most, m.codes.most, m.routes.most = maxModelSeries, maxUpstreamSeries, maxCodeSeries, maxCodeSeries
	return m
}

// know makes room for every endpoint there is, so that counting needs no lock.
func (m *metrics) know(t *endpointTable) {
	for _, e := range t.all() {
		m.endpoints[e] = &endpointMetrics{}
	}
}

// series is a bounded set of things counted.
type series[K comparable, V any] struct {
	most int
	mu   sync.RWMutex
	m    map[K]*V
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
	if v = s.m[k]; v != nil || len(s.m) >= s.most {
		return v
	}
	if s.m == nil {
		s.m = map[K]*V{}
	}
	v = new(V)
	s.m[k] = v
	return v
}

// getOr is get, with a place for what is too much. The few others there are may
// exceed the bound.
func (s *series[K, V]) getOr(k, other K) *V {
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

// of returns what is counted of an endpoint; nil: there is none.
func (m *metrics) of(e *endpoint) *endpointMetrics {
	if em := m.endpoints[e]; em != nil {
		return em
	}
	return &m.nowhere
}

// call counts a call that has ended, admitted or refused.
func (m *metrics) call(c *call, row *requestRow) {
	o, class := indexOf(countedOutcomes[:], row.outcome), row.class()
	em := m.of(c.endpoint)
	em.calls[o][indexOf(countedClasses[:], class)].Add(1)
	em.total.observe(row.totalUS, &slowBounds)
	if row.outcome == outcomeRefused {
		m.codes.getOr(codeKey{row.errorCode, class}, codeKey{otherLabel, class}).Add(1)
	}
	if c.entry == nil || c.upstream == nil {
		return
	}
	if row.firstByteUS >= 0 {
		em.firstByte.observe(row.firstByteUS, &slowBounds)
	}
	if own := c.overhead(); own > 0 {
		m.overhead.observe(own.Microseconds(), &fastBounds)
	}
	k := modelKey{c.project.id, c.upstream.provider, c.prices.label(row.model)}
	mm := m.models.getOr(k, modelKey{otherLabel, otherLabel, otherLabel})
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

// overhead is what a call that reached a provider and was answered took of this
// program's own: until it was sent on, without the time the client took to send
// its body, and from the provider's head to the first byte that left.
func (c *call) overhead() time.Duration {
	if c.sentAt.IsZero() || c.headAt.IsZero() || c.firstByte == 0 {
		return 0
	}
	return c.firstByte - c.reading - c.headAt.Sub(c.sentAt)
}

// attempt counts how a request to a provider ended.
func (m *metrics) attempt(u *upstream, how attempt) {
	m.upstreams.getOr(upstreamKey{u.id, u.provider}, upstreamKey{otherLabel, otherLabel}).attempts[how].Add(1)
}

// attemptOf sorts a provider's status.
func attemptOf(status int) attempt {
	switch {
	case status == 401 || status == 403:
		return attemptAuth
	case status == 429:
		return attemptLimited
	case status >= 400 && status < 500:
		return attemptRefused
	case status >= 200 && status < 300:
		return attemptOK
	}
	return attemptFailed
}

// unanswered sorts an attempt that ended before the provider's head came, by
// what the client was told; nil: it had left.
func unanswered(e *apiError) attempt {
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

// request counts a request to anything but /v1.
func (m *metrics) request(pattern string, status int) {
	group := "none"
	if status >= 100 && status < 600 {
		group = string(rune('0'+status/100)) + "xx"
	}
	m.routes.getOr(routeKey{pattern, group}, routeKey{otherLabel, group}).Add(1)
}

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

// An exporter writes the page of metrics.
type exporter struct {
	cfg          *config
	metrics      *metrics
	endpoints    *endpointTable
	registry     *registry
	health       *healthBook
	ledger       *ledger
	running      *runningCalls
	bodies       *bodyMemory
	diskUse      func(context.Context) (diskUse, error)
	linesDropped func() int64 // nil: nobody counts
	started      time.Time
}

// metricsPage writes the page.
func (e *exporter) metricsPage(ctx context.Context) []byte {
	t := &metricsText{b: make([]byte, 0, 64<<10)}
	e.metrics.showCalls(t, e.endpoints)
	e.metrics.showModels(t)
	e.metrics.showSeries(t)
	e.showRunning(t)
	e.showLedger(t)
	e.showDisk(ctx, t)
	showRuntime(t, e.started)
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
func (e *exporter) showRunning(t *metricsText) {
	t.about("running_calls", "gauge", "Calls that are running, by what they wait for.")
	for i, n := range e.running.phases() {
		t.int(n, "phase", phaseNames[i])
	}
	t.about("running_calls_max", "gauge", "MAX_CONCURRENT_CALLS.")
	t.int(e.cfg.maxCalls)
	t.about("running_streams", "gauge", "Event streams that are being relayed.")
	t.int(e.metrics.streams.Load())
	t.about("draining", "gauge", "1 while new calls are refused because the program is ending.")
	t.int(oneIf(e.running.isDraining()))
	t.about("connections", "gauge", "Connections that clients have open.")
	t.int(e.metrics.open.Load())
	t.about("connections_max", "gauge", "MAX_CONNECTIONS.")
	t.int(e.cfg.maxConnections)
	t.about("body_memory_bytes", "gauge", "Memory that request bodies take.")
	t.int(e.bodies.used.Load())
	t.about("body_memory_max_bytes", "gauge", "BODY_MEMORY.")
	t.int(e.bodies.limit)
	t.about("log_lines_left_out_total", "counter", "Log lines about callers without a key that were not written, so as not to fill the disk.")
	t.int(e.metrics.leftOut.Load())
	t.about("log_lines_dropped_total", "counter", "Log lines that were lost because their reader was too slow.")
	if e.linesDropped != nil {
		t.int(e.linesDropped())
	} else {
		t.int(0)
	}
	t.about("upstreams", "gauge", "Upstreams of projects that were used since the start, by what is known of their keys.")
	for state, n := range e.health.count(time.Now().UnixMilli()) {
		t.int(n, "state", keyState(state).String())
	}
	tokens, projects := e.registry.size()
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

func (e *exporter) showLedger(t *metricsText) {
	begins, settles := e.ledger.backlog()
	t.about("ledger_queue_rows", "gauge", "Rows that wait to be committed.")
	t.int(begins, "kind", "begin")
	t.int(settles, "kind", "settle")
	t.about("ledger_failing", "gauge", "1 while the ledger cannot be written; calls are refused then.")
	t.int(oneIf(!e.ledger.healthy()))
	t.about("ledger_commit_seconds", "histogram", "Time to commit one batch of rows.")
	t.histogram(&e.ledger.commits, &fastBounds)
	t.about("ledger_rows_total", "counter", "What was committed: a note and a row for an admitted call, a row for a refused one.")
	t.int(e.ledger.rows.Load())
}

// showDisk writes sizes; what cannot be read now is left out.
func (e *exporter) showDisk(ctx context.Context, t *metricsText) {
	if e.diskUse == nil {
		return
	}
	use, err := e.diskUse(ctx)
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
