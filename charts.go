// This file computes charts: usage and times in, the coordinates of axes, bars and lines out.
// templates/parts/charts.html draws them, and html/template escapes every name. Nothing here reads from
// the database or knows of HTTP.
package main

import (
	"cmp"
	"maps"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A chartUnit is the unit of a chart's values.
type chartUnit int

const (
	unitCount  chartUnit = iota
	unitMoney            // nano-dollars
	unitMillis           // milliseconds
)

// formatShort returns a value as an axis shows it: short.
func (u chartUnit) formatShort(v float64) string {
	switch u {
	case unitMoney:
		text := shortNumber(v / 1e9)
		if i := strings.IndexByte(text, '.'); i > 0 && i == len(text)-2 && v < 1e12 {
			text += "0" // $0.20
		}
		return "$" + text
	case unitMillis:
		if v >= 1000 {
			return shortNumber(v/1000) + " s"
		}
		return shortNumber(v) + " ms"
	}
	return shortNumber(v)
}

// format returns a value as titles and tables show it.
func (u chartUnit) format(v float64) string {
	switch {
	case math.IsInf(v, 1) && u == unitMillis:
		return "over 100 s"
	case math.IsNaN(v) || math.IsInf(v, 0) || u == unitMillis && v < 0:
		return "–"
	case u == unitMillis && v >= 999.5:
		return threeDigits(v/1000) + " s"
	case u == unitMillis:
		return threeDigits(v) + " ms"
	}
	n := int64(math.MaxInt64)
	if v < math.MaxInt64 { // otherwise the conversion has no defined result
		n = int64(v)
	}
	if u == unitMoney {
		return formatMoney(n)
	}
	return groupDigits(n)
}

// threeDigits returns a number with three significant digits, or all digits before the point.
func threeDigits(v float64) string {
	if v >= 999.5 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}

func shortNumber(v float64) string {
	for _, scale := range []struct {
		size   float64
		letter string
	}{{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e3, "k"}} {
		if math.Abs(v) >= scale.size {
			return strconv.FormatFloat(v/scale.size, 'f', -1, 64) + scale.letter
		}
	}
	return strconv.FormatFloat(v, 'f', -1, 64)
}

// ticks returns a round step (1, 2 or 5 times a power of ten) and how many steps reach highest:
// at least two and at most five, or one for a small count.
func (u chartUnit) ticks(highest float64) (step float64, n int) {
	if !(highest > 0) || math.IsInf(highest, 0) {
		highest = 1
		if u == unitMoney {
			highest = 1e9
		}
	}
	power := math.Pow(10, math.Floor(math.Log10(highest/4)))
	for _, f := range []float64{1, 2, 5, 10} {
		if step = f * power; math.Ceil(highest/step) <= 5 {
			break
		}
	}
	if u == unitCount && step < 1 {
		step = 1
	}
	return step, max(1, int(math.Ceil(highest/step-1e-9)))
}

// A coordinate is a position or a length in a drawing: pixels, percent or a share of a viewBox.
type coordinate float64

func (v coordinate) String() string { return formatTwoDecimals(float64(v)) }

// formatTwoDecimals returns a number with at most two decimals.
func formatTwoDecimals(v float64) string {
	text := strings.TrimRight(strings.TrimRight(strconv.FormatFloat(v, 'f', 2, 64), "0"), ".")
	if text == "-0" {
		return "0"
	}
	return text
}

// A chartSeries is one row of values, one value for each step of time. NaN means no value.
type chartSeries struct {
	Name   string
	Class  string // of the style sheet: k1 to k6, k0 for the rest
	values []float64
}

// A timeChart shows series over time.
type timeChart struct {
	label     string // describes the chart to screen readers
	unit      chartUnit
	start     int64 // unix milliseconds of the first step
	stepMS    int64
	steps     int
	series    []chartSeries
	lineChart bool       // lines side by side instead of stacked bars
	calls     url.Values // the filters of the calls that it shows; nil: there is no list of them
	links     []string   // what each series is made of; "" or absent: there is no page for it
}

const plotHeight = 180 // pixels; templates/parts/charts.html has the margins around the plot

// A drawing is a time chart in coordinates: y and heights in pixels, x and widths in percent of
// the plot, so that the chart fits any screen while its letters keep their size.
type drawing struct {
	Label   string
	Ticks   []chartTick
	Times   []timeLabel
	Lines   []chartLine
	Columns []chartColumn
}

// A chartTick is one line of the grid and its label on the axis.
type chartTick struct {
	Text      string
	Y, LabelY coordinate
}

// A timeLabel is a label below the plot.
type timeLabel struct {
	Class, Text string
	X           coordinate
}

// A chartLine is the line of one series: unbroken runs, and a dot for each run of one point.
// The x of runs counts from 0 to 1000, that of dots in percent.
type chartLine struct {
	Class string
	Runs  [][]chartPoint
	Dots  []chartPoint
}

type chartPoint struct{ X, Y coordinate }

// A chartColumn is one step of time: its bars, and the area that shows its numbers on hover.
type chartColumn struct {
	Title    string
	Link     string // the calls of the step, "" if it has none
	X, Width coordinate
	Bars     []chartBar
}

type chartBar struct {
	Class               string
	X, Y, Width, Height coordinate
}

// draw computes the drawing of the chart.
func (c *timeChart) draw() *drawing {
	d := &drawing{Label: printable(c.label), Times: c.timeLabels()}
	step, n := c.unit.ticks(c.highest())
	for i := range n + 1 {
		y := coordinate(plotHeight - plotHeight*float64(i)/float64(n))
		d.Ticks = append(d.Ticks, chartTick{c.unit.formatShort(step * float64(i)), y, y + 12})
	}
	top := step * float64(n)
	if c.lineChart {
		for _, s := range c.series {
			d.Lines = append(d.Lines, c.line(s, top))
		}
	}
	for i := range c.steps {
		d.Columns = append(d.Columns, c.column(i, top))
	}
	return d
}

// printable removes the control characters that neither HTML nor XML allows.
func printable(text string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' && c != '\n' || c == 0x7f || c == 0xfffe || c == 0xffff {
			return -1
		}
		return c
	}, strings.ToValidUTF8(text, ""))
}

// highest returns the highest value or, of stacked bars, the highest stack.
func (c *timeChart) highest() (highest float64) {
	for i := range c.steps {
		stack := 0.0
		for _, s := range c.series {
			v := s.values[i]
			if math.IsNaN(v) || math.IsInf(v, 0) {
				continue
			}
			if stack += v; c.lineChart {
				stack = v
			}
			highest = max(highest, stack)
		}
	}
	return highest
}

func (c *timeChart) column(i int, top float64) chartColumn {
	width := 100 / float64(c.steps)
	x := width * float64(i)
	col := chartColumn{Title: printable(c.columnTitle(i)), Link: c.stepURL(i), X: coordinate(x),
		Width: coordinate(width)}
	below := 0.0
	for _, s := range c.series {
		v := s.values[i]
		if c.lineChart || !(v > 0) || math.IsInf(v, 0) {
			continue
		}
		height := plotHeight * v / top
		col.Bars = append(col.Bars, chartBar{Class: s.Class, X: coordinate(x + width*0.1),
			Width: coordinate(width * 0.8), Y: coordinate(max(0, plotHeight-below-height)), Height: coordinate(height)})
		below += height
	}
	return col
}

// stepURL returns the list of the calls of a step, "" if it has none.
func (c *timeChart) stepURL(i int) string {
	hasValue := func(s chartSeries) bool { return s.values[i] > 0 }
	if c.calls == nil || !slices.ContainsFunc(c.series, hasValue) {
		return ""
	}
	values, from := maps.Clone(c.calls), c.start+int64(i)*c.stepMS
	values.Set("from", timestamp(from).datetimeLocal())
	values.Set("to", timestamp(from+c.stepMS).datetimeLocal())
	return "/admin/requests?" + values.Encode()
}

func (c *timeChart) columnTitle(i int) string {
	var t strings.Builder
	t.WriteString(c.stepLabel(i))
	total, shown := 0.0, 0
	for _, s := range c.series {
		v := s.values[i]
		if math.IsNaN(v) || v == 0 && !c.lineChart {
			continue
		}
		total, shown = total+v, shown+1
		t.WriteString("\n" + s.Name + ": " + c.unit.format(v))
	}
	switch {
	case shown == 0:
		t.WriteString("\nno data")
	case shown > 1 && !c.lineChart:
		t.WriteString("\ntotal: " + c.unit.format(total))
	}
	return t.String()
}

// stepLabel returns the time of a step, such as "Mon 5 Jan 12:00–18:00 UTC".
func (c *timeChart) stepLabel(i int) string {
	at := time.UnixMilli(c.start + int64(i)*c.stepMS).UTC()
	if c.stepMS >= dayMS {
		return at.Format("Mon 2 Jan 2006")
	}
	return at.Format("Mon 2 Jan 15:04") + at.Add(time.Duration(c.stepMS)*time.Millisecond).Format("–15:04") + " UTC"
}

// timeLabels returns at most seven labels for below the plot.
func (c *timeChart) timeLabels() (labels []timeLabel) {
	every, format := int64(max(1, (c.steps+5)/6))*c.stepMS, "2 Jan"
	first := c.start
	if c.stepMS < dayMS {
		for _, hours := range []int64{1, 2, 3, 4, 6, 12, 24, 2 * 24, 7 * 24} {
			if every = hours * hourMS; every >= c.stepMS && int64(c.steps)*c.stepMS <= 7*every {
				break
			}
		}
		if every < dayMS {
			format = "15:04"
		}
		first += (every - c.start%every) % every // at full hours or days
	}
	for at := first; at < c.start+int64(c.steps)*c.stepMS; at += every {
		x := 100 * (float64(at-c.start)/float64(c.stepMS) + 0.5) / float64(c.steps)
		class := "x"
		if len(labels)%2 == 1 {
			class = "x second" // hidden on narrow screens
		}
		if x > 96 {
			x, class = 100, class+" last"
		}
		labels = append(labels, timeLabel{class, time.UnixMilli(at).UTC().Format(format), coordinate(x)})
	}
	return labels
}

// line returns the line of a series, which breaks where there is no value.
func (c *timeChart) line(s chartSeries, top float64) chartLine {
	l := chartLine{Class: s.Class}
	var run []chartPoint
	for i := range c.steps + 1 {
		if i < c.steps && !math.IsNaN(s.values[i]) {
			run = append(run, chartPoint{coordinate(1000 * (float64(i) + 0.5) / float64(c.steps)),
				coordinate(plotHeight - plotHeight*min(s.values[i], top)/top)})
			continue
		}
		if len(run) == 1 {
			l.Dots = append(l.Dots, chartPoint{run[0].X / 10, run[0].Y})
		}
		if len(run) > 0 {
			l.Runs = append(l.Runs, run)
		}
		run = nil
	}
	return l
}

// barWidth returns the width, in percent, of a bar that shows part of whole.
func barWidth(part, whole float64) coordinate {
	if whole > 0 && part > 0 {
		return coordinate(max(0.5, 100*min(part/whole, 1)))
	}
	return 0
}

// A chartView is a chart with its title and the table of its numbers, newest first.
type chartView struct {
	ID, Title string
	Drawing   *drawing
	Series    []legendEntry
	Rows      []chartRow // empty: there is nothing to show
}

// A legendEntry names a series. Link leads to what it is made of, "" if there is no page.
type legendEntry struct{ Name, Class, Link string }

// A chartRow has the numbers of a step. Link leads to its calls.
type chartRow struct {
	Step, Link string
	Values     []string
}

func newChartView(id, title string, c *timeChart) chartView {
	v := chartView{ID: id, Title: title, Drawing: c.draw()}
	for i, s := range c.series {
		e := legendEntry{Name: s.Name, Class: s.Class}
		if i < len(c.links) {
			e.Link = c.links[i]
		}
		v.Series = append(v.Series, e)
	}
	for i := c.steps - 1; i >= 0; i-- {
		row, hasValue := chartRow{Step: strings.TrimSuffix(c.stepLabel(i), " UTC"), Link: c.stepURL(i)}, false
		for _, s := range c.series {
			row.Values, hasValue = append(row.Values, c.unit.format(s.values[i])), hasValue || s.values[i] > 0
		}
		if hasValue {
			v.Rows = append(v.Rows, row)
		}
	}
	return v
}

// charts returns the charts of the dashboard.
func (d *dashData) charts(q *dashQuery) []chartView {
	firstByte := func(h *hourSum) *latencyHistogram { return &h.firstByteLatency }
	totalTime := func(h *hourSum) *latencyHistogram { return &h.totalLatency }
	return []chartView{
		d.usageChart(q, "usage"),
		d.errorChart(q),
		d.latencyChart(q, "first", "Time to first byte", firstByte),
		d.latencyChart(q, "total", "Total time", totalTime),
	}
}

// newTimeChart returns a chart of the query's period, without series.
func (q *dashQuery) newTimeChart(title string, unit chartUnit) *timeChart {
	calls := url.Values{}
	for name, value := range map[string]string{"project": q.projectID, "token": q.tokenID} {
		if value != "" {
			calls.Set(name, value)
		}
	}
	return &timeChart{label: title + " over time", unit: unit, start: q.from, stepMS: q.stepMS, steps: q.steps(),
		calls: calls}
}

// addSeries adds a series with a value for each step.
func (c *timeChart) addSeries(name, class string, value func(step int) float64) {
	s := chartSeries{Name: name, Class: class}
	for i := range c.steps {
		s.values = append(s.values, value(i))
	}
	c.series = append(c.series, s)
}

func seriesClass(i int) string { return "k" + strconv.Itoa(i+1) }

// usageChart returns the chart of the query's metric.
func (d *dashData) usageChart(q *dashQuery, id string) chartView {
	title := map[string]string{"calls": "Calls", "tokens": "Tokens", "cost": "Cost"}[q.metric] + " by " +
		strings.NewReplacer("_", " ", ":", " ").Replace(q.groupBy)
	c := q.newTimeChart(title, q.unit())
	for i, s := range d.topSeries(q) {
		class := seriesClass(i)
		if s.isOther {
			class = "k0"
		}
		c.addSeries(s.name, class, func(i int) float64 { return q.valueOf(s.values[i]) })
		c.links = append(c.links, q.seriesLink(&s))
	}
	return newChartView(id, title, c)
}

// errorChart returns the chart of errors by cause.
func (d *dashData) errorChart(q *dashQuery) chartView {
	c := q.newTimeChart("Errors by cause", unitCount)
	c.calls.Set("outcome", failedOutcomes)
	for k, class := range errorColumnClasses() {
		c.addSeries(string(class), seriesClass(k), func(i int) float64 { return float64(d.steps[i].errors[k]) })
		c.links = append(c.links, q.callsURL("cause", string(class)))
	}
	return newChartView("errors", "Errors by cause", c)
}

// latencyChart returns the chart of the median and the 95th percentile of a latency.
func (d *dashData) latencyChart(q *dashQuery, id, title string, latency func(*hourSum) *latencyHistogram) chartView {
	c := q.newTimeChart(title, unitMillis)
	c.lineChart = true
	for k, percentile := range []int{50, 95} {
		c.addSeries("p"+strconv.Itoa(percentile), seriesClass(k), func(i int) float64 {
			if v := latency(&d.steps[i]).quantile(float64(percentile) / 100); v >= 0 {
				return v
			}
			return math.NaN()
		})
	}
	return newChartView(id, title, c)
}

// A usageSeries is the usage in each step of a period.
type usageSeries struct {
	id      string // of a model: its name as recorded
	name    string
	isOther bool // the sum of all that have no series of their own
	values  []usageTotals
	total   usageTotals
}

func (s *usageSeries) add(i int, a usageTotals) {
	if i >= 0 && i < len(s.values) {
		s.values[i].add(a)
		s.total.add(a)
	}
}

// topSeries returns the largest series, and the rest as one.
func (d *dashData) topSeries(q *dashQuery) []usageSeries {
	named := d.byProject
	switch q.groupBy {
	case "model":
		named = d.modelSeries(q)
	case "service_tier":
		named = d.tierSeries(q)
	case "project":
	default:
		named = d.valueSeries(q)
	}
	named = named[:min(len(named), maxNamedSeries)]
	rest := usageSeries{name: "all others", isOther: true, values: make([]usageTotals, q.steps())}
	for i := range d.steps {
		h := &d.steps[i]
		rest.add(i, h.totals())
	}
	for _, s := range named {
		for i, a := range s.values {
			rest.add(i, usageTotals{-a.calls, -a.tokens, -a.cost})
		}
	}
	for i := range rest.values { // below zero where a call settled between two reads
		a := &rest.values[i]
		a.calls, a.tokens, a.cost = max(0, a.calls), max(0, a.tokens), max(0, a.cost)
	}
	if q.valueOf(rest.total) > 0 {
		named = append(named, rest)
	}
	return named
}

// modelSeries returns the series of each model, the largest first.
func (d *dashData) modelSeries(q *dashQuery) []usageSeries {
	return q.series(d.modelPoints, func(v *usageRow) (id, name string) { return v.model, modelLabel(v.model) })
}

// tierSeries returns the series of each service tier, the largest first.
func (d *dashData) tierSeries(q *dashQuery) []usageSeries {
	return q.series(d.tierPoints, func(v *usageRow) (id, name string) {
		return v.serviceTier, cmp.Or(v.serviceTier, "standard")
	})
}

// valueSeries returns the series of the largest values of the attribute that is grouped by, and that of calls without
// a value, the largest first.
func (d *dashData) valueSeries(q *dashQuery) []usageSeries {
	return q.series(d.valuePoints, func(v *usageRow) (id, name string) {
		if v.rest == restNone {
			return "", "no value"
		}
		return v.value, clip(v.value, 40)
	})
}

// series returns the series of each id that usage has, the largest first.
func (q *dashQuery) series(points []usageRow, nameOf func(*usageRow) (id, name string)) (all []usageSeries) {
	index := map[string]int{}
	for j := range points {
		v := &points[j]
		id, name := nameOf(v)
		i, ok := index[id]
		if !ok {
			i = len(all)
			index[id] = i
			all = append(all, usageSeries{id: id, name: name, values: make([]usageTotals, q.steps())})
		}
		all[i].add(q.index(v.at), v.totals())
	}
	slices.SortStableFunc(all, func(a, b usageSeries) int {
		return cmp.Or(cmp.Compare(q.valueOf(b.total), q.valueOf(a.total)), cmp.Compare(b.total.calls, a.total.calls),
			cmp.Compare(a.name, b.name))
	})
	return all
}

// modelLabel names the usage without a model: see sumModel.
func modelLabel(model string) string { return cmp.Or(model, "no model, or unknown") }

// A cacheFigure is what a cache saved in a period: the proxy's own, or those of the providers.
type cacheFigure struct {
	Amount int64 // answers from the proxy's cache, or input tokens from the providers'
	Total  cacheFigureRow
	Tables []cacheTable
}

// A cacheTable lists projects or models that a cache served, those that saved most first.
type cacheTable struct {
	Title, Cache string
	Heads        []string // of the cells
	Rows         []cacheFigureRow
	More         int64 // rows left out
}

// A cacheFigureRow is a line of a cacheTable, or the total. Time is "" for the providers' caches.
type cacheFigureRow struct{ Name, Label, Link, Amount, Share, Saved, Time string }

// A cacheKind says what a cacheFigure shows.
type cacheKind struct {
	title  string
	timed  bool // how much longer the calls would have taken is known
	heads  []string
	amount func(s *usageSum) (part, whole int64)
	saved  func(s *usageSum) int64
}

func responseCacheKind() cacheKind {
	return cacheKind{title: "Response cache", timed: true,
		heads:  []string{"Hits", "Share of calls", "Saved", "Time saved"},
		amount: func(s *usageSum) (part, whole int64) { return s.hits, s.calls },
		saved:  func(s *usageSum) int64 { return s.saved }}
}

func promptCacheKind() cacheKind {
	return cacheKind{title: "Prompt caches", heads: []string{"Cached input", "Share of input", "Saved"},
		amount: func(s *usageSum) (part, whole int64) { return s.cached, s.input },
		saved:  func(s *usageSum) int64 { return s.promptSaved }}
}

func (k *cacheKind) row(s *usageSum) cacheFigureRow {
	part, whole := k.amount(s)
	row := cacheFigureRow{Amount: groupDigits(part), Saved: formatMoney(k.saved(s))}
	if k.timed {
		row.Time = formatLongTime(float64(s.savedUS) / 1000)
	}
	if whole > 0 {
		row.Share = percent(100 * float64(part) / float64(whole))
	}
	return row
}

// cacheSum adds up all calls, and what the caches did.
func (d *dashData) cacheSum() (sum usageSum) {
	for i := range d.modelPoints {
		sum.merge(d.modelPoints[i].usageSum)
	}
	return sum
}

// cacheHits adds up what the caches did by step and by model.
func (d *dashData) cacheHits(q *dashQuery) (bySteps []usageSum, byModel map[string]usageSum) {
	bySteps, byModel = make([]usageSum, q.steps()), map[string]usageSum{}
	for i := range d.modelPoints {
		v := &d.modelPoints[i]
		if step := q.index(v.at); step >= 0 && step < len(bySteps) {
			bySteps[step].merge(v.usageSum)
		}
		sum := byModel[v.model]
		sum.merge(v.usageSum)
		byModel[v.model] = sum
	}
	return bySteps, byModel
}

// cacheFigure returns what a cache saved; nil if it served no call.
func (d *dashData) cacheFigure(q *dashQuery, k cacheKind) *cacheFigure {
	total := d.cacheSum()
	part, _ := k.amount(&total)
	if part == 0 {
		return nil
	}
	f := &cacheFigure{Amount: part, Total: k.row(&total)}
	if q.projectSeq == 0 {
		f.Tables = append(f.Tables, k.table("Projects", d.cacheByProject, func(r *usageRow, v *cacheFigureRow) {
			v.Name, v.Link = r.projectName, "/admin/projects/"+r.projectID
			if r.projectDeleted {
				v.Label, v.Link = "deleted", ""
			}
		}))
	}
	_, byModel := d.cacheHits(q)
	models := make([]usageRow, 0, len(byModel))
	for name, sum := range byModel {
		models = append(models, usageRow{usageKey{usageLabels: usageLabels{model: name}}, sum})
	}
	f.Tables = append(f.Tables, k.table("Models", models, func(r *usageRow, v *cacheFigureRow) {
		if v.Name = modelLabel(r.model); r.model == "" {
			return
		}
		v.Link = q.callsURL("model", r.model)
		if k.timed { // the filter knows the proxy's own cache only
			v.Link += "&cache=" + cacheHit
		}
	}))
	return f
}

// table lists the rows that the cache served. name fills in what a line is about.
func (k *cacheKind) table(title string, rows []usageRow, name func(*usageRow, *cacheFigureRow)) cacheTable {
	part := func(r *usageRow) int64 {
		n, _ := k.amount(&r.usageSum)
		return n
	}
	rows = slices.DeleteFunc(slices.Clone(rows), func(r usageRow) bool { return part(&r) == 0 })
	slices.SortFunc(rows, func(a, b usageRow) int {
		return cmp.Or(cmp.Compare(k.saved(&b.usageSum), k.saved(&a.usageSum)), cmp.Compare(part(&b), part(&a)),
			a.compare(&b.usageKey))
	})
	t := cacheTable{Title: title, Cache: k.title, Heads: k.heads, More: int64(max(0, len(rows)-rankingSize))}
	for i := range rows[:min(len(rows), rankingSize)] {
		row := k.row(&rows[i].usageSum)
		name(&rows[i], &row)
		t.Rows = append(t.Rows, row)
	}
	return t
}

// cacheCells returns the columns of the caches in a download.
func cacheCells(s *usageSum) []string {
	return []string{formatInt(s.hits), formatNanos(s.saved), strconv.FormatFloat(float64(s.savedUS)/1000, 'f', 3, 64),
		formatInt(s.cached), formatNanos(s.promptSaved)}
}
