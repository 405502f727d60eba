// These tests check /metrics: who may read it, that its text is valid for Prometheus and agrees
// with the ledger and the provider, and that clients can neither grow nor slow it.
package main

import (
	"fmt"
	"maps"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// parseMetrics reads a page of metrics strictly: every sample belongs to the family
// announced before it, no series occurs twice, histograms are cumulative. It
// returns the samples by name and labels.
func parseMetrics(t testing.TB, page string) map[string]float64 {
	t.Helper()
	sample := regexp.MustCompile(`^([a-z_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+\})? (-?[0-9.]+)$`)
	out, kinds := map[string]float64{}, map[string]string{}
	var family, lastBucket string
	var below float64
	for line := range strings.SplitSeq(strings.TrimSuffix(page, "\n"), "\n") {
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(rest, " ")
			if kinds[name] != "" {
				t.Errorf("%s is announced twice", name)
			}
			family, kinds[name] = name, kind
			if (kind == "counter") != strings.HasSuffix(name, "_total") {
				t.Errorf("%s is a %s", name, kind)
			}
			continue
		}
		if strings.HasPrefix(line, "# HELP ") {
			continue
		}
		m := sample.FindStringSubmatch(line)
		if m == nil {
			t.Errorf("not a sample: %q", line)
			continue
		}
		name := m[1]
		if kinds[family] == "histogram" {
			name = regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
		}
		if name != family {
			t.Errorf("%s is in the family %s", m[1], family)
		}
		if _, twice := out[m[1]+m[2]]; twice {
			t.Errorf("repeated: %s", line)
		}
		v, err := strconv.ParseFloat(m[3], 64)
		if err != nil {
			t.Error(err)
		}
		out[m[1]+m[2]] = v
		if strings.HasSuffix(m[1], "_bucket") {
			if of := regexp.MustCompile(`,?le="[^"]*"`).ReplaceAllString(m[1]+m[2], ""); of != lastBucket {
				lastBucket, below = of, 0
			}
			if v < below {
				t.Errorf("not cumulative: %s", line)
			}
			below = v
		}
	}
	return out
}

func (p *testProxy) metrics() map[string]float64 {
	p.t.Helper()
	res := p.manageAs(p.adminKey, "GET", "/metrics", "")
	if res.status != 200 {
		p.t.Fatalf("got %d: %s", res.status, res.body)
	}
	return parseMetrics(p.t, res.body)
}

// sumSamples adds up the samples of a family that have all the given labels.
func sumSamples(samples map[string]float64, family string, labels ...string) (sum float64) {
next:
	for name, v := range samples {
		if got, _, _ := strings.Cut(name, "{"); got != family {
			continue
		}
		for _, l := range labels {
			if !strings.Contains(name, l) {
				continue next
			}
		}
		sum += v
	}
	return sum
}

// TestMetricsAccess: on the main address /metrics requires a management key; on METRICS_ADDR it
// requires none and is the only URL.
func TestMetricsAccess(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"METRICS_ADDR": "127.0.0.1:0"})
	var viewer struct{ Key string }
	p.manage("POST", "/manage/keys", `{"name":"v","role":"viewer"}`, 201, &viewer)
	p.secrets = append(p.secrets, viewer.Key)
	for _, c := range []struct {
		headers []string
		status  int
	}{
		{nil, 401},
		{[]string{"Authorization", "Bearer " + p.token}, 401},
		{[]string{"Authorization", "Bearer " + viewer.Key}, 200},
		{[]string{"Authorization", "Bearer " + viewer.Key, "Host", "evil.example.com"}, 421},
	} {
		if res := p.do("GET", "/metrics", "", c.headers...); res.status != c.status {
			t.Errorf("%v: got %d, want %d", c.headers, res.status, c.status)
		}
	}
	if res := p.do("POST", "/metrics", "", "Authorization", "Bearer "+viewer.Key); res.status != 405 {
		t.Errorf("POST: got %d", res.status)
	}
	p.chat()
	p.waitSettled()
	main := p.url
	p.url = "http://" + p.instance.metricsListener.Addr().String()
	res := p.do("GET", "/metrics", "")
	if samples := parseMetrics(t, res.body); res.status != 200 || sumSamples(samples, "llm_proxy_calls_total") != 1 {
		t.Errorf("METRICS_ADDR: got %d %s", res.status, res.body)
	}
	if strings.Contains(res.body, `"test"`) || strings.Contains(res.body, p.tokenID) ||
		strings.Contains(res.body, p.dir) {
		t.Error("the page names a project, a token or a directory")
	}
	for _, path := range []string{"/", "/healthz", "/manage/projects", "/v1/models", "/debug/pprof/", "/debug/vars",
		"/metrics/x"} {
		if res := p.do("GET", path, "", "Authorization", "Bearer "+p.adminKey); res.status != 404 {
			t.Errorf("METRICS_ADDR%s: got %d", path, res.status)
		}
	}
	p.url = main
	for _, path := range []string{"/debug/pprof/", "/debug/vars", "/version"} {
		if res := p.do("GET", path, ""); res.status != 404 {
			t.Errorf("%s: got %d", path, res.status)
		}
	}
}

// TestMetricsAgree: after calls with many outcomes, the counters agree with the ledger and with
// the requests that the provider got.
func TestMetricsAgree(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, narrow := p.newToken(`"name":"n","policy":{"models":["gpt-4o"]}`)
	_, once := p.newToken(`"name":"o","max_requests":1`)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		switch {
		case strings.Contains(r.body, `"user":"500"`):
			return c.reply(500, `{"error":{}}`)
		case strings.Contains(r.body, `"user":"400"`):
			return c.reply(400, `{"error":{}}`)
		case strings.Contains(r.body, `"user":"401"`):
			return c.reply(401, `{"error":{}}`)
		case strings.Contains(r.body, `"user":"cut"`):
			c.beginSSE()
			_ = c.chunk(chatEvents(false)[0])
			return c.reset()
		case strings.Contains(r.body, `"user":"reset"`):
			return c.reset()
		}
		return chatScript(c, r)
	})
	for range 3 {
		p.chat()
		p.chat(`"stream":true`)
		p.chat(`"user":"500"`)
	}
	p.chat(`"user":"400"`)
	p.chat(`"user":"401"`)
	p.chat(`"user":"reset"`)
	p.chat(`"stream":true`, `"user":"cut"`)
	p.chatAs(narrow)
	p.chatAs(once)
	p.chatAs(once)
	p.chatAs("sk-llmp_wrong")
	rows := p.ledger()
	m := p.metrics()
	// One call was not authenticated: it is counted but not recorded.
	if n := sumSamples(m, "llm_proxy_calls_total"); n != float64(len(rows)+1) {
		t.Errorf("%v calls counted, %d on record", n, len(rows))
	}
	want := map[string]float64{}
	var input, output float64
	for _, r := range rows {
		want[r.Outcome]++
		input, output = input+float64(r.InputTokens), output+float64(r.OutputTokens)
	}
	want["refused"]++
	for outcome, n := range want {
		if got := sumSamples(m, "llm_proxy_calls_total", `outcome="`+outcome+`"`); got != n {
			t.Errorf("outcome %s: %v counted, %v on record", outcome, got, n)
		}
	}
	if i, o := sumSamples(m, "llm_proxy_tokens_total", `kind="input"`), sumSamples(m, "llm_proxy_tokens_total",
		`kind="output"`); i != input || o != output || i == 0 {
		t.Errorf("tokens: %v and %v counted, %v and %v on record", i, o, input, output)
	}
	if n := sumSamples(m, "llm_proxy_upstream_attempts_total"); n != float64(len(p.provider.received())) {
		t.Errorf("%v attempts counted, the provider got %d", n, len(p.provider.received()))
	}
	for labels, n := range map[string]float64{
		`result="ok"`: 8, `result="failed"`: 3, `result="refused"`: 1,
		`result="key_refused"`: 1, `result="unreachable"`: 1,
	} {
		if got := sumSamples(m, "llm_proxy_upstream_attempts_total", labels); got != n {
			t.Errorf("attempts %s: %v, want %v", labels, got, n)
		}
	}
	for labels, n := range map[string]float64{`code="model_not_allowed",class="policy"`: 1,
		`code="project_spend_limit_exceeded",class="policy"`: 1, `code="malformed",class="caller"`: 1} {
		if got := sumSamples(m, "llm_proxy_refusals_total", labels); got != n {
			t.Errorf("refusals %s: %v, want %v", labels, got, n)
		}
	}
	for class, n := range map[string]float64{"caller": 2, "policy": 2, "provider": 6, "proxy": 0, "none": 7} {
		if got := sumSamples(m, "llm_proxy_calls_total", `class="`+class+`"`); got != n {
			t.Errorf("class %s: %v, want %v", class, got, n)
		}
	}
	for name, n := range map[string]float64{"llm_proxy_running_streams": 0, "llm_proxy_running_calls": 0,
		"llm_proxy_ledger_queue_rows": 0, "llm_proxy_draining": 0,
		"llm_proxy_ledger_failing": 0, "llm_proxy_registry_projects": 1, "llm_proxy_build_info": 1} {
		if got := sumSamples(m, name); got != n {
			t.Errorf("%s is %v, want %v", name, got, n)
		}
	}
	for _, name := range []string{"llm_proxy_overhead_seconds_count", "llm_proxy_first_byte_seconds_count",
		"llm_proxy_duration_seconds_sum",
		"llm_proxy_ledger_commit_seconds_count", "llm_proxy_ledger_rows_total",
		"llm_proxy_database_bytes", "llm_proxy_disk_free_bytes",
		"llm_proxy_cost_dollars_total", "llm_proxy_http_requests_total", "go_goroutines", "go_memory_bytes",
		"process_cpu_seconds_total", "process_start_time_seconds"} {
		if sumSamples(m, name) <= 0 {
			t.Errorf("%s is %v", name, sumSamples(m, name))
		}
	}
}

// TestMetricsRunning: running calls and streams are shown while they run.
func TestMetricsRunning(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	goOn := make(chan bool)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(false)[0])
		<-goOn
		return c.chunk(chatEvents(false)[4-1]) == nil && c.chunk("") == nil
	})
	done := make(chan testResponse, 1)
	go func() { done <- p.chat(`"stream":true`) }()
	waitFor(t, "a stream", func() bool { return p.instance.metrics.activeStreams.Load() == 1 })
	m := p.metrics()
	if sumSamples(m, "llm_proxy_running_streams") != 1 || sumSamples(m, "llm_proxy_running_calls") != 1 ||
		sumSamples(m, "llm_proxy_connections") < 1 {
		t.Error("a running stream is not shown")
	}
	close(goOn)
	<-done
	p.waitSettled()
	if m := p.metrics(); sumSamples(m, "llm_proxy_running_streams") != 0 {
		t.Error("a stream that has ended is shown as running")
	}
}

// TestMetricsBounded: clients cannot create series.
func TestMetricsBounded(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	odd := func(i int) {
		p.do("GET", fmt.Sprintf("/path-%d", i), "")
		p.do("GET", fmt.Sprintf("/v1/path-%d", i), "", "Authorization", "Bearer "+p.token)
		p.do("GET", fmt.Sprintf("/manage/path-%d", i), "", "Authorization", "Bearer "+p.adminKey)
		p.chatAs(p.token, fmt.Sprintf(`"user":"%d"`, i))
		p.do("POST", "/v1/chat/completions", strings.Replace(chatBody(), "gpt-4o-mini", fmt.Sprintf("model-%d", i), 1),
			"Authorization", "Bearer "+p.token, "Content-Type", "application/json",
			"User-Agent", fmt.Sprintf("agent-%d", i))
		p.chatAs(fmt.Sprintf("sk-llmp_%d", i))
		p.do(fmt.Sprintf("METHOD%d", i), "/v1/chat/completions", "", "Authorization", "Bearer "+p.token)
	}
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		n := len(p.provider.received())
		return c.reply(400+n%90, strings.Replace(chatResponseBody, "gpt-4o-mini-2024-07-18",
			fmt.Sprintf("answered-%d", n), 1))
	})
	for i := range 40 {
		odd(i)
	}
	p.waitSettled()
	p.metrics() // the request counts itself
	before := slices.Sorted(maps.Keys(p.metrics()))
	for i := range 60 {
		odd(1000 + i)
	}
	p.waitSettled()
	if after := slices.Sorted(maps.Keys(p.metrics())); !slices.Equal(before, after) {
		t.Errorf("there were %d series, then %d", len(before), len(after))
	}
	v := vector[[1]string, atomic.Int64]{max: 2}
	for i := range 100 {
		v.get([1]string{strconv.Itoa(i)}, [1]string{otherLabel}).Add(1)
	}
	if series := v.load(); len(series) != 3 || series[[1]string{otherLabel}].Load() != 98 {
		t.Errorf("a full vector has %d series", len(series))
	}
}

// TestMetricsPage: the page of some counted calls is the one in testdata, and a running
// program has the families and labels listed there. Dashboards depend on both.
func TestMetricsPage(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "with PostgreSQL there are those about replicas, too")
	prices, err := loadPrices()
	if err != nil {
		t.Fatal(err)
	}
	m, endpoints := newMetrics(), newEndpointTable().all()
	chat, messages := endpoints[3], endpoints[15]
	openai := &upstream{id: "up_1", provider: providerOpenAI}
	anthropic := &upstream{id: "up_2", provider: providerAnthropic}
	forwarded := func(u *upstream) *forwardedCall {
		return &forwardedCall{project: "proj_1", provider: u.provider, prices: prices,
			overhead: 1500 * time.Microsecond}
	}
	m.countCall(chat, &requestRow{outcome: outcomeOK, status: 200, model: "gpt-4o-mini", source: usageExact,
		priced: true,
		cost:   5_250_000_000, firstByteUS: 60_000, totalUS: 700_000_000,
		counts: tokenCounts{input: 9, cached: 4, output: 3, reasoning: 2}}, forwarded(openai))
	m.countCall(chat, &requestRow{outcome: outcomeOK, status: 200, model: "made-up", source: usageEstimated,
		firstByteUS: 1, totalUS: 2, counts: tokenCounts{input: 1}}, forwarded(openai))
	m.countCall(messages, &requestRow{outcome: outcomeTruncated, status: 200, errorCode: "upstream_cut",
		model: "claude-sonnet-5", source: usageNone, firstByteUS: -1, totalUS: 3}, forwarded(anthropic))
	m.countCall(messages, &requestRow{outcome: outcomeRefused, status: 403, errorCode: "model_not_allowed",
		totalUS: 90, firstByteUS: -1}, nil)
	m.countCall(nil, &requestRow{outcome: outcomeRefused, status: 401, errorCode: "malformed",
		totalUS: 100, firstByteUS: -1}, nil)
	m.countAttempt(openai, attemptOK)
	m.countAttempt(openai, attemptOK)
	m.countAttempt(anthropic, attemptTimeout)
	m.countClientRetry("proj_1")
	m.countRequest("GET /healthz", 200)
	m.countRequest("", 404)
	m.countRequest("GET /manage/tokens", 0)
	w := &metricsWriter{}
	m.writeCalls(w)
	m.writeModels(w)
	m.writeRequests(w)
	cache := &responseCache{maxBytes: 1 << 28, memoryBytes: 2048, diskBytes: 1 << 20,
		onDisk: map[int64]struct{}{1: {}, 2: {}}}
	for i, n := range []*atomic.Int64{&cache.hits, &cache.collapsed, &cache.misses, &cache.stored, &cache.evicted,
		&cache.dropped, &cache.bypasses[1], &cache.savedNanos, &cache.savedUS} {
		n.Store(int64(i + 1))
	}
	cache.waiting.Store(5)
	cache.writeMetrics(w)
	parseMetrics(t, string(w.b))
	if want := mustReadFile(t, "testdata/metrics_page.txt"); string(w.b) != want {
		t.Errorf("the page differs from testdata/metrics_page.txt:\n%s", w.b)
	}

	p := newTest(t, nil)
	p.chat()
	p.waitSettled()
	families := map[string]bool{}
	for name := range p.metrics() {
		families[regexp.MustCompile(`="[^"]*"`).ReplaceAllString(name, "")] = true
	}
	got := strings.Join(slices.Sorted(maps.Keys(families)), "\n") + "\n"
	if want := mustReadFile(t, "testdata/metrics_families.txt"); got != want {
		t.Errorf("the families differ from testdata/metrics_families.txt:\n%s", got)
	}
}

// TestMetricsEscape: labels chosen by administrators cannot break the page.
func TestMetricsEscape(t *testing.T) {
	t.Parallel()
	text := &metricsWriter{}
	text.beginFamily("x", "gauge", "X.")
	text.writeInt(1, "a", "q\"b\\s\nn\xffé")
	if got, want := string(text.b), "# HELP llm_proxy_x X.\n# TYPE llm_proxy_x "+
		"gauge\nllm_proxy_x{a=\"q\\\"b\\\\s\\nn\uFFFDé\"} 1\n"; got != want {
		t.Errorf("got %q", got)
	}
	parseMetrics(t, string(text.b))
}

// TestMetricsInUse: if the address is in use, the start fails with an error that names it.
func TestMetricsInUse(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	in := &instance{cfg: &config{listenAddr: "127.0.0.1:0", metricsAddr: l.Addr().String()}, stop: func() {}}
	if err := in.listen(); err == nil || !strings.Contains(err.Error(), "METRICS_ADDR") {
		t.Errorf("got %v", err)
	}
	in.listener.Close()
}

// newCountedCall returns a call as settle passes it to metrics.
func newCountedCall(tb testing.TB) (*metrics, *call, *requestRow) {
	prices, err := loadPrices()
	if err != nil {
		tb.Fatal(err)
	}
	m, table := newMetrics(), newEndpointTable()
	c := &call{clientRequest: clientRequest{endpoint: table.all()[0]}, entry: &ledgerEntry{},
		upstream: &upstream{id: "up_1", provider: providerOpenAI}, prices: prices,
		project: &projectState{id: "proj_1"}, times: callTimes{firstByte: 3 * time.Millisecond,
			bodyRead: time.Millisecond}}
	c.times.sentAt, c.times.headersAt = time.UnixMilli(1), time.UnixMilli(2)
	return m, c, &requestRow{outcome: outcomeOK, status: 200, model: "gpt-4o-mini", source: usageExact, priced: true,
		cost: 5, firstByteUS: 3000, totalUS: 4000,
		counts: tokenCounts{input: 9, output: 3}}
}

// TestMetricsAllocateNothing: counting allocates nothing.
func TestMetricsAllocateNothing(t *testing.T) {
	m, c, row := newCountedCall(t)
	if n := testing.AllocsPerRun(1000, func() {
		m.countCall(c.endpoint, row, &forwardedCall{c.project.id, c.upstream.provider, c.prices, c.overhead()})
		m.countAttempt(c.upstream, attemptOK)
	}); n != 0 {
		t.Errorf("%v allocations a call", n)
	}
}

func BenchmarkMetricsCall(b *testing.B) {
	m, c, row := newCountedCall(b)
	for b.Loop() {
		m.countCall(c.endpoint, row, &forwardedCall{c.project.id, c.upstream.provider, c.prices, c.overhead()})
		m.countAttempt(c.upstream, attemptOK)
	}
}

// BenchmarkMetricsPage writes a page with the maximum number of series.
func BenchmarkMetricsPage(b *testing.B) {
	m, c, row := newCountedCall(b)
	for i := range maxModelSeries {
		c.project = &projectState{id: fmt.Sprintf("proj_%d", i)}
		m.countCall(c.endpoint, row, &forwardedCall{c.project.id, c.upstream.provider, c.prices, c.overhead()})
	}
	t := &metricsWriter{}
	for b.Loop() {
		t.b = t.b[:0]
		m.writeCalls(t)
		m.writeModels(t)
		m.writeRequests(t)
	}
}

// TestHealthWhenFull (ME4): at MAX_CONCURRENT_CALLS the program still answers health checks and
// /metrics.
func TestHealthWhenFull(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_CONCURRENT_CALLS": "2"})
	p.allowErrors = true // the refused call is logged as one
	goOn := make(chan bool)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		<-goOn
		return chatScript(c, r)
	})
	var calls sync.WaitGroup
	for range 2 {
		calls.Go(func() { p.chat() })
	}
	waitFor(t, "two calls to run", func() bool { return len(p.provider.received()) == 2 })
	if res := p.chat(); res.status != 503 || res.header.Get("Retry-After") == "" {
		t.Errorf("a third call: got %d", res.status)
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		if res := p.do("GET", path, ""); res.status != 200 {
			t.Errorf("%s: got %d", path, res.status)
		}
	}
	if m := p.metrics(); sumSamples(m, "llm_proxy_running_calls") != 2 {
		t.Error("/metrics does not show the calls")
	}
	close(goOn)
	calls.Wait()
}
