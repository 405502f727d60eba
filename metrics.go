// This room counts: calls, tokens, money, times, attempts, for /metrics. To
// count is some atomic additions, and never an allocation once a series is there.
// Every label is from a closed set (endpoints, projects, upstreams, models with a
// price, codes of ours), and each set has an upper bound besides: nothing that a
// client sends can make a series. Plain code: what is shown is metrics_show.go's.
package main

import (
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
