// Tests of the dashboard and of charts: the numbers agree with the ledger, alerts are listed, and
// charts are sound for any value and any name.
package main

import (
	"cmp"
	"encoding/xml"
	"errors"
	"fmt"
	"html"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestDashboardAgrees: for any period, project and grouping, the numbers of the dashboard are those
// of the calls on record.
func TestDashboardAgrees(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	projects := map[int64]string{0: ""}
	maps.Copy(projects, u.projects)
	for _, p := range dashPeriods(u.now.UnixMilli()) {
		for seq, id := range projects {
			for _, by := range []string{"project", "model"} {
				q := &dashQuery{dashPeriod: p, projectSeq: seq, projectID: id, groupBy: by, metric: "tokens",
					now: u.now.UnixMilli(), maxExactTokens: 100, sampleSize: 1000}
				if seq != 0 {
					q.groupBy = "model"
				}
				u.compareDashboard(q)
			}
		}
	}
}

func (u *usageTest) compareDashboard(q *dashQuery) {
	u.t.Helper()
	d, err := u.instance.store.readDashboard(u.t.Context(), q)
	if err != nil {
		u.t.Fatal(err)
	}
	var want, before hourSum
	tokens, endpoints := map[string]usageTotals{}, map[string]usageTotals{}
	for _, r := range u.rows {
		if q.projectSeq != 0 && r.project != q.projectSeq {
			continue
		}
		if r.started >= q.prevFrom && r.started < q.prevTo {
			before.add(r)
		}
		if r.started < q.from || r.started >= q.to {
			continue
		}
		want.add(r)
		one := usageTotals{1, r.counts.input + r.counts.output, r.cost}
		for of, key := range map[*map[string]usageTotals]string{&tokens: u.tokens[r.token], &endpoints: r.endpoint} {
			sum := (*of)[key]
			sum.add(one)
			(*of)[key] = sum
		}
	}
	name := fmt.Sprintf("%s of project %d by %s", q.name, q.projectSeq, q.groupBy)
	if d.total != want || *d.previous != before {
		u.t.Errorf("%s: %+v and before %+v, want %+v and %+v", name, d.total, *d.previous, want, before)
	}
	whole := usageTotals{want.calls, want.input + want.output, want.cost}
	var inSeries, inSteps usageTotals
	for _, s := range d.topSeries(q) {
		inSeries.add(s.total)
		for _, a := range s.values {
			inSteps.add(a)
		}
	}
	if inSeries != whole || inSteps != whole {
		u.t.Errorf("%s: the series add up to %+v, their steps to %+v, want %+v", name, inSeries, inSteps, whole)
	}
	for what, list := range map[string][]usageShare{"models": d.usageByModel(q), "endpoints": d.endpoints,
		"tokens": d.tokens, "projects": d.projects} {
		var sum usageTotals
		for i, v := range list {
			sum.add(v.usageTotals)
			if i > 0 && q.valueOf(list[i-1].usageTotals) < q.valueOf(v.usageTotals) {
				u.t.Errorf("%s: %s are not sorted", name, what)
			}
			if what == "tokens" && v.usageTotals != tokens[v.id] || what == "endpoints" &&
				v.usageTotals != endpoints[v.name] {
				u.t.Errorf("%s: %s %s has %+v", name, what, cmp.Or(v.id, v.name), v.usageTotals)
			}
		}
		if sum != whole && !(what == "projects" && q.projectSeq != 0) {
			u.t.Errorf("%s: the %s add up to %+v, want %+v", name, what, sum, whole)
		}
	}
}

// TestDashboardBounded: with too many tokens to add up quickly, only the latest calls are read, and
// the page says so.
func TestDashboardBounded(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	p := dashPeriods(u.now.UnixMilli())[2]
	for _, c := range []struct {
		maxExactTokens, sampleSize, sampled int
		calls                               int64 // -1: all
	}{
		{maxExactTokens: 100, sampleSize: 20, sampled: 0, calls: -1},
		{maxExactTokens: 1, sampleSize: 20, sampled: 20, calls: 20},
		{maxExactTokens: 1, sampleSize: 100_000, sampled: 100_000, calls: -1},
	} {
		q := &dashQuery{dashPeriod: p, groupBy: "project", metric: "calls", now: u.now.UnixMilli(),
			maxExactTokens: c.maxExactTokens, sampleSize: c.sampleSize}
		d, err := u.instance.store.readDashboard(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		calls := int64(0)
		for _, v := range d.tokens {
			calls += v.calls
		}
		if c.calls < 0 {
			c.calls = d.total.calls
		}
		list := d.rankings(q)[1]
		if d.sampledCalls != c.sampled || calls != c.calls || list.Sampled != int64(c.sampled) {
			t.Errorf("%+v: %d calls, of the latest %d; the page says %d", c, calls, d.sampledCalls, list.Sampled)
		}
	}
}

// TestDashboardPage: what the page shows, and the error for each invalid parameter.
func TestDashboardPage(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	has := func(path string, status int, texts ...string) {
		t.Helper()
		res := b.get(path)
		if res.status != status {
			t.Errorf("%s: %d", path, res.status)
		}
		for _, text := range texts {
			if absent, ok := strings.CutPrefix(text, "!"); ok == strings.Contains(res.body,
				strings.TrimPrefix(text, "!")) {
				t.Errorf("%s: %q is on the page: %v\n%s", path, absent, ok, res.body)
			}
		}
	}
	has("/admin/dashboard", 200, "No calls yet", "!Needs attention", "!<svg class=\"axis\"")
	soon, _ := p.newToken(`"name":"ends soon","duration_hours":30`)
	gone, _ := p.newToken(`"name":"revoked one","duration_hours":30`)
	p.newToken(`"name":"ends late","expires_in_days":300`)
	p.manage("DELETE", "/manage/tokens/"+gone, "", 200, nil)
	p.manage("PATCH", "/manage/projects/"+p.project,
		`{"policy":{"limits":[{"count":"requests","max":4,"per":"day"},
		{"count":"requests","max":100,"per":"minute"},
		{"count":"tokens","max":1,"per":"day","shadow":true}]}}`, 200, nil)
	for range 4 {
		if res := p.chat(); res.status != 200 {
			t.Fatal(res.status, res.body)
		}
	}
	p.waitSettled()
	row, err := p.instance.store.projectByID(t.Context(), p.project)
	if err != nil {
		t.Fatal(err)
	}
	ups, err := p.instance.store.projectUpstreams(t.Context(), row.seq)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.instance.store.setHealth(t.Context(), time.Now().UnixMilli(),
		&healthRow{upstream: ups[0].seq, state: keyQuarantined, reason: "401",
			changedAt: time.Now().UnixMilli()}, keyReady); err != nil {
		t.Fatal(err)
	}
	for _, query := range []string{"", "?period=24h&measure=cost", "?period=7d&by=model",
		"?period=30d&measure=tokens&by=project", "?period=90d", "?project=" + p.project + "&period=24h"} {
		has("/admin/dashboard"+query, 200, "Needs attention", "/admin/tokens/"+soon,
			">Token ends soon of project test</a> expires <time", ">in 30 hours</time>",
			"!revoked one", "!ends late", "100.0% of 4 requests per day", "!100 requests", "!1 tokens",
			"the provider rejects its key",
			`<svg class="axis"`, "gpt-4o-mini", "POST /v1/chat/completions", "!No calls yet")
	}
	if err := p.stop(); err != nil { // after a restart limits are known before the first call
		t.Fatal(err)
	}
	p.start()
	has("/admin/dashboard", 200, "100.0% of 4 requests per day")
	has("/admin/dashboard?project="+p.project, 200, "100.0% of 4 requests per day")
	p.manage("DELETE", "/manage/projects/"+p.project, "", 200, nil)
	has("/admin/dashboard", 200, "!100.0% of 4 requests")
	has("/admin/dashboard?period=1y", 400, "period must be")
	has("/admin/dashboard?measure=x", 400, "measure must be")
	has("/admin/dashboard?by=x", 400, "by must be")
	has("/admin/dashboard?project=proj_none", 404)
	if res := p.do("GET", "/admin/dashboard", ""); res.status != 303 {
		t.Errorf("without a session: %d", res.status)
	}
}

// TestChange: how times, percentages and the change of a number are shown.
func TestChange(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		now, was float64
		want     string
	}{{5, 0, ""}, {0, 5, "−100%"}, {5, 5, "±0%"}, {6, 5, "+20%"}, {5.01, 5, "±0%"}, {100, 1, "×100"}, {5, -1, ""}} {
		if got := formatPercentChange(c.now, c.was); got != c.want {
			t.Errorf("from %v to %v: %q", c.was, c.now, got)
		}
	}
	for v, want := range map[float64]string{ // times have three digits, from milliseconds to hours
		-1: "–", 0.31: "0.31 ms", 158.3: "158 ms", 999.6: "1 s", 2_696: "2.7 s", 63_000: "63 s", 7.2e6: "7200 s",
	} {
		if got := unitMillis.format(v); got != want {
			t.Errorf("%v ms: %q", v, got)
		}
	}
	const day = 24 * time.Hour
	for d, want := range map[time.Duration]string{0: "now", -400 * time.Millisecond: "now", time.Second: "in 1 second",
		30*day - time.Second: "in 30 days", -30*day - time.Hour: "30 days ago", day - time.Minute: "in 24 hours",
		time.Hour - time.Second: "in 1 hour", -59600 * time.Millisecond: "1 minute ago",
		7*day - time.Second:   "in 7 days",
		365*day - time.Second: "in 365 days", 90*day - time.Minute: "in 90 days", 1e5 * time.Hour: "in 11 years",
		-2*day + time.Minute: "2 days ago"} {
		if got := relativeTime(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
	for v, want := range map[float64]string{0: "0.0%", 0.01: "<0.1%", 3.14: "3.1%", 100: "100.0%"} {
		if got := percent(v); got != want {
			t.Errorf("%v: %q", v, got)
		}
	}
}

const chartDay = 20_000 * dayMS // 4 October 2024

// chartCases returns charts by the name of their golden file.
func chartCases(t *testing.T) map[string]string {
	render := chartRenderer(t)
	draw := func(c *timeChart) string { return render("drawing", c.draw()) }
	nan := math.NaN()
	calls := &timeChart{label: "Calls over time, by project", start: chartDay, stepMS: dayMS, steps: 4,
		series: []chartSeries{
			{"search", "k1", []float64{10, 0, 35, 20}}, {"bot", "k2", []float64{5, 0, 5, 1}}, {"all others", "k0",
				[]float64{0, 0, 1, 0}}}}
	money := &timeChart{label: "Cost", unit: unitMoney, start: chartDay, stepMS: hourMS, steps: 24,
		series: []chartSeries{{"m", "k1", make([]float64, 24)}}}
	money.series[0].values[5], money.series[0].values[23] = 123_456_789, 900_000
	lines := &timeChart{label: "Time", unit: unitMillis, start: chartDay, stepMS: 6 * hourMS, steps: 6, lineChart: true,
		series: []chartSeries{
			{"p50", "p50", []float64{120, 130, nan, 90.5, nan, 200}}, {"p95", "p95",
				[]float64{900, 1300, nan, math.Inf(1), nan, 2100}}}}
	hostile := &timeChart{label: `"><script>alert(1)</script>`, start: chartDay, stepMS: dayMS, steps: 1,
		series: []chartSeries{
			{"</title><img src=x onerror=alert(1)>\u202e&amp;", "k1", []float64{3}}}}
	huge := &timeChart{label: "Huge", start: chartDay, stepMS: dayMS, steps: 2,
		series: []chartSeries{{"x", "k1", []float64{9.2e18, 1}}, {"y", "k2", []float64{9.2e18, 0}}}}
	empty := &timeChart{label: "Nothing", start: chartDay, stepMS: dayMS, steps: 3,
		series: []chartSeries{{"x", "k1", make([]float64, 3)}}}
	none := &timeChart{label: "No series", unit: unitMoney, start: chartDay, stepMS: dayMS, steps: 1}
	single := &timeChart{label: "One point", unit: unitMillis, start: chartDay, stepMS: hourMS, steps: 1,
		lineChart: true,
		series:    []chartSeries{{"p50", "p50", []float64{250}}}}
	bar := newDurationBar(durationPart{Name: "to the first byte", Class: "k1", us: 240_000},
		durationPart{Name: "nothing", Class: "e2"},
		durationPart{Name: "the answer <b>", Class: "k2", us: 1_760_000})
	shareBar := func(width coordinate) string { return render("share-bar", []any{"plain", width}) }
	return map[string]string{
		"stacked": draw(calls), "money": draw(money), "lines": draw(lines), "hostile": draw(hostile),
		"huge":  draw(huge),
		"empty": draw(empty), "none": draw(none), "single": draw(single),
		"bars": shareBar(barWidth(1, 3)) + shareBar(barWidth(0, 0)) +
			shareBar(barWidth(5, 3)) +
			shareBar(barWidth(1e-9, 1)),
		"span": render("duration-bar", bar) + render("duration-bar", newDurationBar()),
	}
}

// chartRenderer returns a function that renders a template of templates/parts.
func chartRenderer(t *testing.T) func(name string, data any) string {
	t.Helper()
	ps, err := newPageSet()
	if err != nil {
		t.Fatal(err)
	}
	pages, err := ps.templates()
	if err != nil {
		t.Fatal(err)
	}
	return func(name string, data any) string {
		t.Helper()
		var b strings.Builder
		if err := pages["dashboard"].ExecuteTemplate(&b, name, data); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
}

// TestCharts: charts look as in testdata/charts. LLM_PROXY_GOLDEN=1 rewrites these files.
func TestCharts(t *testing.T) {
	t.Parallel()
	for name, got := range chartCases(t) {
		file := filepath.Join("testdata", "charts", name+".svg")
		if os.Getenv("LLM_PROXY_GOLDEN") != "" {
			if err := os.WriteFile(file, []byte(got+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil || string(want) != got+"\n" {
			t.Errorf("%s differs from %s (%v):\n%s", name, file, err, clip(got, 3000))
		}
		checkDrawing(t, name, got)
	}
}

// checkDrawing checks that a drawing is well-formed, has no script or style, and no impossible
// coordinate.
func checkDrawing(t *testing.T, name, svg string) {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader("<x>" + svg + "</x>"))
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Errorf("%s is not well-formed: %v\n%s", name, err, clip(svg, 2000))
			return
		}
		e, ok := token.(xml.StartElement)
		if !ok {
			continue
		}
		if strings.Contains(" script style img foreignObject a ", " "+e.Name.Local+" ") {
			t.Errorf("%s has the element %s", name, e.Name.Local)
		}
		for _, a := range e.Attr {
			if a.Name.Local == "style" || strings.HasPrefix(a.Name.Local, "on") {
				t.Errorf("%s has the attribute %s", name, a.Name.Local)
			}
			if n := strings.ToLower(a.Value); a.Name.Local != "aria-label" &&
				(strings.Contains(n, "nan") || strings.Contains(n, "inf") || strings.HasPrefix(n, "-")) {
				t.Errorf("%s: %s=%q", name, a.Name.Local, a.Value)
			}
		}
	}
}

// TestChartsOfAnything: drawings are sound for any number and any text.
func TestChartsOfAnything(t *testing.T) {
	t.Parallel()
	render := chartRenderer(t)
	random := rand.New(rand.NewPCG(5, 6))
	values := []float64{0, 1, 0.4, 3e3, 1e9, 7e17, 1e-7, math.NaN(), math.Inf(1), math.MaxInt64, -1}
	names := []string{"a", "<b>", `"`, "\x00\xff", "]]>", "&", "\u202e", strings.Repeat("x", 5000)}
	for i := range 80 {
		c := &timeChart{label: names[random.IntN(len(names))], unit: chartUnit(random.IntN(3)), start: chartDay,
			stepMS: []int64{hourMS, 6 * hourMS, dayMS}[random.IntN(3)], steps: random.IntN(100), lineChart: i%2 == 0}
		for range random.IntN(8) {
			s := chartSeries{Name: names[random.IntN(len(names))], Class: "k1"}
			for range c.steps {
				s.values = append(s.values, values[random.IntN(len(values))])
			}
			c.series = append(c.series, s)
		}
		checkDrawing(t, "anything", render("drawing", c.draw()))
	}
}

// TestTicks: an axis ends at or above the highest value, after one to five round steps.
func TestTicks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		unit    chartUnit
		highest float64
		want    string // the labels
	}{
		{unitCount, 0, "0 1"},
		{unitCount, 1, "0 1"},
		{unitCount, 3, "0 1 2 3"},
		{unitCount, 7, "0 2 4 6 8"},
		{unitCount, 100, "0 20 40 60 80 100"},
		{unitCount, 101, "0 50 100 150"},
		{unitCount, 12_345, "0 5\u00a0K 10\u00a0K 15\u00a0K"},
		{unitCount, 3_400_000, "0 1\u00a0M 2\u00a0M 3\u00a0M 4\u00a0M"},
		{unitCount, 9.2e18, "0 2,000\u00a0Q 4,000\u00a0Q 6,000\u00a0Q 8,000\u00a0Q 10,000\u00a0Q"},
		{unitMoney, 0, "$0 $0.20 $0.40 $0.60 $0.80 $1"},
		{unitMoney, 3e9, "$0 $1 $2 $3"},
		{unitMoney, 2e8, "$0 $0.05 $0.10 $0.15 $0.20"},
		{unitMoney, 1.2e6, "$0 $0.0005 $0.001 $0.0015"},
		{unitMoney, 4.2e12, "$0 $1,000 $2,000 $3,000 $4,000 $5,000"},
		{unitMillis, 900, "0 ms 200 ms 400 ms 600 ms 800 ms 1 s"},
		{unitMillis, 4_000, "0 ms 1 s 2 s 3 s 4 s"},
		{unitMillis, 63_000, "0 ms 20 s 40 s 60 s 80 s"},
		{unitCount, math.Inf(1), "0 1"},
		{unitCount, math.NaN(), "0 1"},
	} {
		step, n := c.unit.ticks(c.highest)
		var labels []string
		for i := range n + 1 {
			labels = append(labels, c.unit.compact(step*float64(i), step*float64(n)))
		}
		if got := strings.Join(labels, " "); got != c.want {
			t.Errorf("%v up to %v: %s, want %s", c.unit, c.highest, got, c.want)
		}
	}
}

// TestCompactNumbers: numbers in tiles and on axes have at most four digits, and numbers of an axis the same suffix.
func TestCompactNumbers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		unit        chartUnit
		v           float64
		want, exact string
	}{
		{unitCount, 0, "0", "0"}, {unitCount, 9999, "9,999", "9,999"}, {unitCount, 10_000, "10 K", "10,000"},
		{unitCount, 12_345, "12.3 K", "12,345"}, {unitCount, 999_499, "999 K", "999,499"},
		{unitCount, 999_950, "1 M", "999,950"}, {unitCount, 1_747_497, "1.75 M", "1,747,497"},
		{unitCount, 2e9, "2 B", "2,000,000,000"}, {unitCount, 3.21e12, "3.21 T", "3,210,000,000,000"},
		{unitCount, math.MaxInt64, "9,223 Q", "9,223,372,036,854,775,807"},
		{unitMoney, 0, "$0.00", "$0.00"}, {unitMoney, 4_200_000, "$0.0042", "$0.0042"},
		{unitMoney, 1.72e9, "$1.72", "$1.72"}, {unitMoney, 5e9, "$5.00", "$5.00"},
		{unitMoney, 1_234.5e9, "$1,234.50", "$1,234.50"},
		{unitMoney, 12_345.6e9, "$12.3 K", "$12,345.60"}, {unitMoney, 9.2e18, "$9.2 B", "$9,200,000,000.00"},
		{unitMillis, 257, "257 ms", "257 ms"}, {unitMillis, 4_200, "4.2 s", "4.2 s"}, {unitMillis, -1, "–", "–"},
		{unitCount, math.NaN(), "–", "–"},
	} {
		got := c.unit.figure(c.v)
		if got.Short = strings.ReplaceAll(got.Short, "\u00a0", " "); got != (figure{c.want, c.exact}) {
			t.Errorf("%v of unit %d: %+v, want %q", c.v, c.unit, got, c.want)
		}
	}
	if got := unitCount.compact(500, 2e6) + unitMoney.compact(5e11, 2e13); got != "0.0005\u00a0M$0.5\u00a0K" {
		t.Errorf("beside larger numbers: %s", got)
	}
}

// TestTimeLabels: below a chart are at most seven labels, of full hours, days, Mondays or months, that do not overlap.
func TestTimeLabels(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		start, step int64
		steps       int
		want        string
	}{
		{chartDay + 7*hourMS, hourMS, 24, "08:00 12:00 16:00 20:00 5 Oct 04:00"},
		{chartDay, hourMS, 3, "4 Oct 01:00 02:00"},
		{chartDay, hourMS, 48, "4 Oct 12:00 5 Oct 12:00"},
		{chartDay, 6 * hourMS, 28, "4 Oct 5 Oct 6 Oct 7 Oct 8 Oct 9 Oct 10 Oct"},
		{chartDay, 6 * hourMS, 56, "4 Oct 6 Oct 8 Oct 10 Oct 12 Oct 14 Oct 16 Oct"},
		{chartDay, dayMS, 30, "7 Oct 14 Oct 21 Oct 28 Oct"},
		{chartDay, dayMS, 90, "14 Oct 28 Oct 11 Nov 25 Nov 9 Dec 23 Dec"},
		{chartDay, dayMS, 180, "Nov Dec Jan 2025 Feb Mar Apr"},
		{chartDay, dayMS, 366, "Nov Jan 2025 Mar May Jul Sep"},
	} {
		chart := &timeChart{start: c.start, stepMS: c.step, steps: c.steps}
		labels := chart.timeLabels()
		var texts []string
		for i, l := range labels {
			if texts = append(texts, l.Text); i > 0 && l.X-labels[i-1].X < 12 {
				t.Errorf("%+v: %q and %q are too close", c, labels[i-1].Text, l.Text)
			}
		}
		if got := strings.Join(texts, " "); got != c.want {
			t.Errorf("%d steps of %d hours: %s, want %s", c.steps, c.step/hourMS, got, c.want)
		}
	}
}

// styleColors returns a variable of the style sheet in light and in dark mode, in linear light.
func styleColors(t *testing.T, css, name string) (light, dark [3]float64) {
	t.Helper()
	m := regexp.MustCompile(`--` + name + `: light-dark\(#(\w{6}), #(\w{6})\)`).FindStringSubmatch(css)
	if m == nil {
		t.Fatalf("the style sheet has no color %s", name)
	}
	for i, out := range []*[3]float64{&light, &dark} {
		n, err := strconv.ParseUint(m[i+1], 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		for k := range out {
			v := float64(n>>(16-8*k)&0xff) / 255
			if out[k] = v / 12.92; v > 0.04045 {
				out[k] = math.Pow((v+0.055)/1.055, 2.4)
			}
		}
	}
	return light, dark
}

// contrastOf returns the contrast of two colors as WCAG defines it.
func contrastOf(a, b [3]float64) float64 {
	luminance := func(c [3]float64) float64 { return 0.2126*c[0] + 0.7152*c[1] + 0.0722*c[2] + 0.05 }
	return max(luminance(a)/luminance(b), luminance(b)/luminance(a))
}

// seenDistance returns the distance of two colors in OKLab: the smallest for eyes that see all colors, no red, no green
// or no blue (Machado, Oliveira and Fernandes, 2009).
func seenDistance(a, b [3]float64) float64 {
	times := func(m [3][3]float64, c [3]float64) (out [3]float64) {
		for i := range m {
			out[i] = m[i][0]*c[0] + m[i][1]*c[1] + m[i][2]*c[2]
		}
		return out
	}
	lab := func(c [3]float64) [3]float64 {
		c = times([3][3]float64{{0.41222, 0.53633, 0.05145}, {0.21190, 0.68070, 0.10740},
			{0.08830, 0.28172, 0.62998}}, c)
		for i := range c {
			c[i] = math.Cbrt(c[i])
		}
		return times([3][3]float64{{0.21045, 0.79362, -0.00407}, {1.97800, -2.42859, 0.45059},
			{0.02590, 0.78277, -0.80868}}, c)
	}
	least := math.Inf(1)
	for _, eyes := range [][3][3]float64{
		{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}},
		{{0.152286, 1.052583, -0.204868}, {0.114503, 0.786281, 0.099216}, {-0.003882, -0.048116, 1.051998}},
		{{0.367322, 0.860646, -0.227968}, {0.280085, 0.672501, 0.047413}, {-0.011820, 0.042940, 0.968881}},
		{{1.255528, -0.076749, -0.178779}, {-0.078411, 0.930809, 0.147602}, {0.004733, 0.691367, 0.303900}},
	} {
		see := func(c [3]float64) [3]float64 {
			c = times(eyes, c)
			for i := range c {
				c[i] = min(1, max(0, c[i]))
			}
			return lab(c)
		}
		x, y := see(a), see(b)
		least = min(least, math.Hypot(math.Hypot(x[0]-y[0], x[1]-y[1]), x[2]-y[2]))
	}
	return least
}

// TestChartColors: color-blind people can tell the series of a chart apart, and all stand out from the ground, in light
// and dark mode.
func TestChartColors(t *testing.T) {
	t.Parallel()
	css := mustReadFile(t, "templates/static/admin.css")
	groups := [][]string{{"k0"}, {"e1", "e2", "e3", "e4"}, {"text", "soft"}}
	for i := range maxNamedSeries {
		groups[0] = append(groups[0], fmt.Sprint("k", i+1))
	}
	for _, names := range groups {
		for i, name := range names {
			light, dark := styleColors(t, css, name)
			for _, ground := range []string{"ground", "raised"} {
				groundLight, groundDark := styleColors(t, css, ground)
				if a, b := contrastOf(light, groundLight), contrastOf(dark, groundDark); a < 3 || b < 3 {
					t.Errorf("%s on %s: contrast %.2f in light mode, %.2f in dark mode", name, ground, a, b)
				}
			}
			for _, other := range names[:i] {
				otherLight, otherDark := styleColors(t, css, other)
				if a, b := seenDistance(light, otherLight), seenDistance(dark, otherDark); min(a, b) < 0.08 {
					t.Errorf("%s and %s: distance %.3f in light mode, %.3f in dark mode", name, other, a, b)
				}
			}
		}
	}
	if !strings.Contains(css, fmt.Sprintf(".k%d {", maxNamedSeries)) {
		t.Error("there are fewer colors than series")
	}
}

// TestLayoutStyles: the style sheet has its sizes of text, distances and colors in one place, and uses only these.
func TestLayoutStyles(t *testing.T) {
	t.Parallel()
	_, rules, ok := strings.Cut(mustReadFile(t, "templates/static/admin.css"), "\n}\n")
	if !ok {
		t.Fatal("the style sheet does not begin with its variables")
	}
	rules = regexp.MustCompile(`(?s)/\*.*?\*/|@keyframes[^\n]*`).ReplaceAllString(rules, "")
	distance := `(?:0|auto|-?[12]px|10vh|\d+%|var\(--s\d+\)|calc\(-1 \* var\(--s\d+\)\))`
	allowed := map[string]*regexp.Regexp{
		"font-size": regexp.MustCompile(`^(?:var\(--t[1-6]\)|inherit|11px)$`), // 11px: in charts
		"font":      regexp.MustCompile(`^(?:inherit|var\(--t3\)/.*)$`),
		"padding":   regexp.MustCompile(`^` + distance + `(?: ` + distance + `)*$`),
	}
	allowed["margin"], allowed["gap"] = allowed["padding"], allowed["padding"]
	seen, side := 0, regexp.MustCompile(`-(?:top|right|bottom|left)$`)
	for _, m := range regexp.MustCompile(`([a-z-]+): ([^;{}]+);`).FindAllStringSubmatch(rules, -1) {
		seen++
		property := side.ReplaceAllString(m[1], "")
		if re := allowed[property]; re != nil && !re.MatchString(m[2]) {
			t.Errorf("%q: use the variables --t1 to --t6 for sizes of text, --s1 to --s12 for distances", m[0])
		}
		if regexp.MustCompile(`#[0-9a-fA-F]{3,8}\b|\brgb|\bhsl`).MatchString(m[2]) {
			t.Errorf("%q: use a variable for the color", m[0])
		}
	}
	if seen < 300 {
		t.Errorf("only %d properties were found", seen)
	}
}

// TestSeriesColors: a project or model has the same color in all charts, legends and lists of a page, whatever its
// rank in them.
func TestSeriesColors(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	b := u.signIn(u.adminKey)
	entry := regexp.MustCompile(`<li><svg[^>]*><rect class="(\w+)"[^>]*/></svg>(?:<a [^>]*>)?([^<]+)`)
	row := regexp.MustCompile(`<th scope="row"><span>(?:<a [^>]*>)?([^<]+)(?:</a>)?</span>` +
		`<svg[^>]*><rect class="(\w+)"`)
	var project string
	for _, project = range u.projects {
		break
	}
	for path, legends := range map[string]int{"/admin/projects/" + project: 2,
		"/admin/dashboard?period=30d&by=model": 1, "/admin/dashboard?period=30d&by=project&measure=cost": 1} {
		page := b.get(path).body
		colors, shared := map[string]string{}, 0
		check := func(name, class string) {
			if was := colors[name]; was != "" {
				if shared++; was != class {
					t.Errorf("%s: %s is %s and %s", path, name, was, class)
				}
			}
			colors[name] = class
			if isRest := name == "all others"; isRest != (class == "k0") {
				t.Errorf("%s: %s is %s", path, name, class)
			}
		}
		found := 0
		for _, section := range strings.Split(page, "<section")[1:] {
			if strings.Contains(section, `class="line`) || strings.Contains(section, "Errors by cause") {
				continue
			}
			if !strings.Contains(section, `class="legend"`) {
				for _, m := range row.FindAllStringSubmatch(section, -1) {
					if m[2] != "plain" && m[2] != "k0" {
						check(m[1], m[2])
					}
				}
				continue
			}
			found++
			for _, m := range entry.FindAllStringSubmatch(section, -1) {
				check(m[2], m[1])
			}
		}
		if found != legends || shared < 2 {
			t.Errorf("%s: %d legends, %d names that occur again: %v", path, found, shared, colors)
		}
	}
	// The rank in a chart differs from the color.
	d := &dashData{steps: make([]hourSum, 1), modelPoints: []usageRow{modelUse("cheap", 90, 10),
		modelUse("dear", 10, 95), modelUse("small", 5, 5)}}
	q := &dashQuery{dashPeriod: dashPeriod{to: dayMS, stepMS: dayMS, grain: "day"}, groupBy: "model"}
	d.nameSeries(q, "calls", "cost")
	for _, q.metric = range []string{"calls", "cost"} {
		var got strings.Builder
		for _, s := range d.usageChart(q, q.metric).Series {
			got.WriteString(s.Name + " " + s.Class + ", ")
		}
		if got.String() != "dear k1, cheap k2, small k3, " {
			t.Errorf("%s: %s", q.metric, got.String())
		}
	}
}

// modelUse is the usage of a model at the start of a period.
func modelUse(model string, calls, cost int64) usageRow {
	return usageRow{usageKey{usageLabels: usageLabels{model: model}}, usageSum{calls: calls, cost: cost}}
}

// BenchmarkScaleAdmin pages through lists and opens single pages. Most tokens never expire and
// share their name with many others, so that an order by either that does not use an index shows.
func BenchmarkScaleAdmin(b *testing.B) {
	s := newScaleTest(b)
	defer s.close()
	s.seed(`
		WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000)
		INSERT INTO projects (id, name, created_at, updated_at)
		SELECT 'proj_' || hex(randomblob(8)), 'project ' || i, 1764000000000, 1764000000000 FROM n`, `
		WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000)
		INSERT INTO tokens (id, project, name, hash, expires_at, revoked_at, last_used_at, created_at, updated_at)
		SELECT 'tok_' || hex(randomblob(8)), CASE WHEN i % 3 = 0 THEN 7 ELSE 1 + i % 1000 END,
			CASE WHEN i % 2 = 0 THEN 'unnamed' ELSE 'seeded ' || hex(randomblob(3)) END,
			randomblob(32), CASE WHEN i % 10 = 0 THEN 1 WHEN i % 10 = 1 THEN unixepoch() * 1000 + 86400000 + i END,
			CASE WHEN i % 20 = 3 THEN 1764000000000 END,
			CASE WHEN i % 4 > 0 THEN 1764000000000 + i END, 1764000000000 + i, 1764000000000 + i FROM n`)
	client := s.web.Client()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	var cookie string
	do := func(method, path string, form url.Values) (time.Duration, string) {
		req, err := http.NewRequestWithContext(b.Context(), method, s.web.URL+path, strings.NewReader(form.Encode()))
		if err != nil {
			b.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.Header.Set("Sec-Fetch-Site", "same-origin")
		req.Header.Set("Cookie", cookie)
		start := time.Now()
		res, err := client.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		took := time.Since(start)
		if err != nil || res.StatusCode > 399 || method == "GET" && res.StatusCode != 200 {
			b.Fatalf("%s: %d %v %s", path, res.StatusCode, err, text)
		}
		if method == "POST" {
			cookie, _, _ = strings.Cut(res.Header.Get("Set-Cookie"), ";")
		}
		return took, string(text)
	}
	do("POST", "/admin/sign-in", url.Values{"key": {s.key()}})
	// The program did not write the seeded projects, so it refuses to show the page of one.
	project, err := queryValue[string](b.Context(), s.instance.store.readDB, "reading an id",
		`SELECT id FROM projects WHERE seq = 7`)
	if err != nil {
		b.Fatal(err)
	}
	_, page := do("GET", "/admin/tokens", nil)
	token := between(page, `class="name" href="`, `"`)
	next := regexp.MustCompile(`href="(/admin/tokens\?[^"]*after=[^"]*)"`)
	paths := []string{"/admin/projects", token, "/admin/tokens/new", "/admin/tokens"}
	for _, query := range []string{"order=oldest", "order=name", "order=ends", "name=unn", "name=seeded+A",
		"search=seeded", "search=unnamed", "search=SEEDED+a7", "search=9f3c", "search=zq", "search=%C3%A9",
		"search=seeded+A7&order=-cost",
		"order=-cost&project_id=" + project, "order=-name", "order=-ends",
		"state=active",
		"state=expiring", "state=expired", "state=revoked", "state=unused", "state=active&project_id=" + project,
		"state=revoked&project_id=" + project, "order=name&project_id=" + project, "state=revoked&name=unn"} {
		paths = append(paths, "/admin/tokens?"+query)
	}
	for _, path := range paths {
		b.Run(strings.ReplaceAll(strings.TrimPrefix(path, "/admin/"), project, "ID"), func(b *testing.B) {
			var times []time.Duration
			to := path
			for b.Loop() {
				took, page := do("GET", to, nil)
				times = append(times, took)
				if m := next.FindStringSubmatch(page); m != nil && strings.HasPrefix(path, "/admin/tokens") {
					to = html.UnescapeString(m[1])
				}
			}
			reportTimes(b, "", times)
		})
	}
}

// TestDashboardAttentionIsOfNow: “Needs attention” is the same whatever period and metric the dashboard shows, also for
// projects and tokens without a recent call. What the numbers link to is of the same period.
func TestDashboardAttentionIsOfNow(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	limits := `{"policy":{"limits":[{"count":"requests","max":2,"per":"lifetime"}]}}`
	p.manage("PATCH", "/manage/projects/"+p.project, limits, 200, nil)
	p.manage("PATCH", "/manage/tokens/"+p.tokenID, limits, 200, nil)
	token, err := p.instance.store.tokenByID(t.Context(), p.tokenID)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Now().AddDate(0, 0, -20) // in the last 30 days, but not in the last 7
	for i := range 2 {
		row := &requestRow{id: minIDAt(at) + int64(i), project: token.project, token: token.seq, model: "m",
			endpoint: "POST /v1/chat/completions", outcome: outcomeOK, source: usageNone, status: 200, firstByteUS: -1}
		row.started = at.UnixMilli()
		p.instance.ledger.recordRefused(row, true)
	}
	p.waitSettled()
	attention := func(query string) string {
		_, rest, _ := strings.Cut(b.get("/admin/dashboard"+query).body, "Needs attention</h2>")
		section, _, _ := strings.Cut(rest, "</section>")
		return pageText(t, section)
	}
	want := attention("?period=30d")
	if !strings.Contains(want, "Project test has used 100.0% of 2 requests in total") ||
		!strings.Contains(want, "of project test has used 100.0% of 2 requests in total") {
		t.Fatalf("30 days: %s", want)
	}
	for _, query := range []string{"", "?period=24h", "?period=90d", "?period=7d&measure=cost", "?period=24h&by=model",
		"?period=24h&project=" + p.project} {
		if got := attention(query); got != want {
			t.Errorf("%s: %s\nwant %s", query, got, want)
		}
	}
	days := time.Now().UTC().AddDate(0, 0, -40).Format("from=2006-01-02") + time.Now().UTC().Format("&to=2006-01-02")
	for _, period := range []string{"period=30d", "period=90d", days} {
		page := html.UnescapeString(b.get("/admin/dashboard?" + period).body)
		if n := strings.Count(page, "/admin/requests?"); n < 2 || strings.Contains(page, "/admin/requests?model=m\"") {
			t.Errorf("%s: %d links", period, n)
		}
		lists := regexp.MustCompile(`href="(/admin/requests\?[^"]*(?:model|endpoint)=[^"]*)"`)
		for _, m := range lists.FindAllStringSubmatch(page, -1) {
			if ids, _ := parseCallList(b.get(m[1]).body); len(ids) != 2 {
				t.Errorf("%s lists %q", m[1], ids)
			}
		}
	}
}

// TestProjectWithoutUpstream: a project whose calls would be refused does not invite to make tokens; one that uses a
// shared upstream does.
func TestProjectWithoutUpstream(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	var bare projectReply
	p.manage("POST", "/manage/projects", `{"name":"bare"}`, 201, &bare)
	invites := func(project string) bool {
		return strings.Contains(b.get("/admin/projects/"+project).body, "/admin/tokens/new?project_id="+project)
	}
	if invites(bare.ID) || !invites(p.project) {
		t.Errorf("a project without an upstream invites to make tokens: %v; one with: %v", invites(bare.ID),
			invites(p.project))
	}
	upstream := "/manage/projects/" + p.project + "/upstreams/" + p.upstream
	p.manage("PATCH", upstream, `{"shared_with":["`+bare.ID+`"]}`, 200, nil)
	page := b.get("/admin/projects/" + bare.ID).body
	if !invites(bare.ID) || strings.Contains(page, "No upstreams yet") {
		t.Error("a project with a shared upstream does not invite to make tokens")
	}
	p.manage("PATCH", upstream, `{"is_active":false}`, 200, nil)
	if invites(bare.ID) || invites(p.project) {
		t.Error("projects with an inactive upstream invite to make tokens")
	}
}

// TestPeriods: the periods of the dashboard and of the list of calls, and the period before that each is compared with.
func TestPeriods(t *testing.T) {
	t.Parallel()
	at := func(text string) int64 {
		for _, layout := range []string{"2006-01-02T15", time.DateOnly} {
			if v, err := time.Parse(layout, text); err == nil {
				return v.UnixMilli()
			}
		}
		t.Fatal(text)
		return 0
	}
	now := at("2026-03-11T14") + 25*60_000 // a Wednesday
	for _, c := range []struct {
		name, from, to                     string // as they are asked for
		wantFrom, wantTo, before, beforeTo string
		steps                              int
	}{
		{"24h", "", "", "2026-03-10T15", "2026-03-11T15", "2026-03-09T15", "2026-03-10T15", 24},
		{"7d", "", "", "2026-03-05", "2026-03-11T18", "2026-02-26", "2026-03-04T15", 27},
		{"30d", "", "", "2026-02-10", "2026-03-12", "2026-01-11", "2026-02-09T15", 30},
		{"today", "", "", "2026-03-11", "2026-03-11T15", "2026-03-10", "2026-03-10T15", 15},
		{"yesterday", "", "", "2026-03-10", "2026-03-11", "2026-03-09", "2026-03-10", 24},
		{"this-week", "", "", "2026-03-09", "2026-03-11T18", "2026-03-02", "2026-03-04T15", 11},
		{"last-week", "", "", "2026-03-02", "2026-03-09", "2026-02-23", "2026-03-02", 28},
		{"this-month", "", "", "2026-03-01", "2026-03-12", "2026-02-01", "2026-02-11T15", 11},
		{"last-month", "", "", "2026-02-01", "2026-03-01", "2026-01-01", "2026-01-29", 28},
		{"7d", "2026-03-01", "2026-03-02", "2026-03-01", "2026-03-03", "2026-02-27", "2026-03-01", 48},
		{"7d", "2026-01-01", "2026-03-31", "2026-01-01", "2026-03-12", "2025-10-03", "2025-12-11T15", 70},
		{"7d", "2026-03-11", "", "2026-03-11", "2026-03-11T15", "2026-03-10", "2026-03-10T15", 15},
		{"7d", "", "2026-03-02", "2026-02-24", "2026-03-03", "2026-02-17", "2026-02-24", 28},
	} {
		p, err := parsePeriod(now, c.name, c.from, c.to)
		if err != nil || p.from != at(c.wantFrom) || p.to != at(c.wantTo) || p.prevFrom != at(c.before) ||
			p.prevTo != at(c.beforeTo) || p.steps() != c.steps || p.index(now) >= p.steps() && p.to > now {
			show := func(v int64) string { return time.UnixMilli(v).UTC().Format("2006-01-02T15") }
			t.Errorf("%+v: %v, from %s to %s, before %s to %s, %d steps", c, err, show(p.from), show(p.to),
				show(p.prevFrom), show(p.prevTo), p.steps())
		}
	}
	for _, c := range [][3]string{{"1y"}, {"range"}, {"", "x"}, {"", "2026-03-02", "2026-03-01"}, {"", "2026-03-12"},
		{"", "2020-01-01", "2026-01-01"}, {"", "1970-01-01", "1970-01-02"}, {"", "", "9999-99-99"},
		{"", "2026-02-30"}, {"", "2026-03-01T10:00"}} {
		if p, err := parsePeriod(now, c[0], c[1], c[2]); err == nil {
			t.Errorf("%v: %+v", c, p)
		}
	}
	for k := range int64(800) { // on no day of the year and at no hour is a period empty, or compared with itself
		now := at("2026-01-01") + k*11*hourMS + k*7
		for _, p := range dashPeriods(now) {
			if p.from >= p.to || p.prevFrom >= p.prevTo || p.prevTo > p.from || p.to > now+dayMS || p.from > now ||
				(p.to-p.from)%p.stepMS != 0 || p.steps() > 100 {
				t.Errorf("at %d: %+v", now, p)
			}
		}
	}
}
