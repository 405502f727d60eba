// This file computes charts: usage and times in, the coordinates and colors of axes, bars and lines out.
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
	"unicode/utf8"
)

// A chartSeries is one row of values, one value for each step of time. NaN means no value.
type chartSeries struct {
	Name   string
	Class  string // of the style sheet: k1 to k8, k0 for the rest, e1 to e4 for errors, p50 and p95
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
	lineChart bool       // lines on a logarithmic scale instead of stacked bars
	calls     url.Values // the filters of the calls that it shows; nil: there is no list of them
	links     []string   // what each series is made of; "" or absent: there is no page for it
}

const plotHeight = 180 // pixels; templates/parts/charts.html has the margins around the plot

// A drawing is a time chart in coordinates: y and heights in pixels, x and widths in percent of
// the plot, so that the chart fits any screen while its letters keep their size.
type drawing struct {
	Label           string
	Start, StepMS   int64      // of the first column, in unix milliseconds, and of each
	Axis, AxisLabel coordinate // the width of the axis, and where its labels end
	Ticks           []chartTick
	Times           []timeLabel
	Lines           []chartLine
	Columns         []chartColumn
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
	Keys     string // the classes of the series that the title names
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
	d := &drawing{Label: printable(c.label), Start: c.start, StepMS: c.stepMS, Times: c.timeLabels()}
	axis := c.axis()
	longest := 0
	for _, v := range axis {
		text, y := c.unit.compact(v, axis[len(axis)-1]), coordinate(plotHeight-plotHeight*c.height(v, axis))
		d.Ticks = append(d.Ticks, chartTick{text, y, y + 12})
		longest = max(longest, utf8.RuneCountInString(text))
	}
	d.AxisLabel = coordinate(max(24, 4+longest*6)) // letters of 11 pixels are some 6 wide
	d.Axis = d.AxisLabel + 6
	if c.lineChart {
		for _, s := range c.series {
			d.Lines = append(d.Lines, c.line(s, axis))
		}
	}
	for i := range c.steps {
		d.Columns = append(d.Columns, c.column(i, axis))
	}
	return d
}

// axis returns the values at the lines of the grid, the lowest first: from 0, or powers of ten for lines.
func (c *timeChart) axis() (axis []float64) {
	lowest, highest := c.bounds()
	if !c.lineChart {
		step, n := c.unit.ticks(highest)
		for i := range n + 1 {
			axis = append(axis, step*float64(i))
		}
		return axis
	}
	if highest == 0 {
		lowest, highest = 10, 1000
	}
	from, to := math.Floor(math.Log10(lowest)), math.Ceil(math.Log10(highest))
	if to <= from {
		to = from + 1
	}
	for exp := from; exp < to; exp += math.Ceil((to - from) / 6) {
		axis = append(axis, math.Pow(10, exp))
		if to-from == 1 {
			axis = append(axis, 2*math.Pow(10, exp), 5*math.Pow(10, exp))
		}
	}
	return append(axis, math.Pow(10, to))
}

// height returns where a value is between the lowest line of the grid (0) and the highest (1).
func (c *timeChart) height(v float64, axis []float64) float64 {
	low, high := axis[0], axis[len(axis)-1]
	if c.lineChart {
		v, low, high = math.Log10(max(v, low)), math.Log10(low), math.Log10(high)
	}
	return min(1, max(0, (v-low)/(high-low)))
}

// bounds returns the lowest and the highest value above 0 or, of stacked bars, the highest stack.
func (c *timeChart) bounds() (lowest, highest float64) {
	for i := range c.steps {
		stack := 0.0
		for _, s := range c.series {
			v := s.values[i]
			if !(v > 0) || math.IsInf(v, 0) {
				continue
			}
			if lowest == 0 || v < lowest {
				lowest = v
			}
			if stack += v; c.lineChart {
				stack = v
			}
			highest = max(highest, stack)
		}
	}
	return lowest, highest
}

func (c *timeChart) column(i int, axis []float64) chartColumn {
	width := 100 / float64(c.steps)
	x := width * float64(i)
	col := chartColumn{Link: c.stepURL(i), X: coordinate(x), Width: coordinate(width)}
	col.Title, col.Keys = c.columnTitle(i)
	below := 0.0
	for _, s := range c.series {
		v := s.values[i]
		if c.lineChart || !(v > 0) || math.IsInf(v, 0) {
			continue
		}
		height := plotHeight * v / axis[len(axis)-1]
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

// columnTitle returns the numbers of a step, one series on each line after the first, and the classes of these series.
func (c *timeChart) columnTitle(i int) (title, keys string) {
	lines, classes := []string{c.stepLabel(i)}, []string{}
	total := 0.0
	for _, s := range c.series {
		v := s.values[i]
		if math.IsNaN(v) || v == 0 && !c.lineChart {
			continue
		}
		total += v
		lines = append(lines, strings.ReplaceAll(s.Name, "\n", " ")+": "+c.unit.format(v))
		classes = append(classes, s.Class)
	}
	switch {
	case len(classes) == 0:
		lines = append(lines, "no data")
	case len(classes) > 1 && !c.lineChart:
		lines = append(lines, "total: "+c.unit.format(total))
	}
	return printable(strings.Join(lines, "\n")), strings.Join(classes, " ")
}

// stepLabel returns the time of a step, such as "Mon 5 Jan 12:00–18:00 UTC".
func (c *timeChart) stepLabel(i int) string {
	at := time.UnixMilli(c.start + int64(i)*c.stepMS).UTC()
	if c.stepMS >= dayMS {
		return at.Format("Mon 2 Jan 2006")
	}
	return at.Format("Mon 2 Jan 15:04") + at.Add(time.Duration(c.stepMS)*time.Millisecond).Format("–15:04") + " UTC"
}

// timeLabels returns at most seven labels for below the plot: full hours, days, Mondays or the first days of months.
func (c *timeChart) timeLabels() (labels []timeLabel) {
	end := c.start + int64(c.steps)*c.stepMS
	for _, at := range c.labeledTimes(end) {
		x, class := 100*(float64(at-c.start)/float64(c.stepMS)+0.5)/float64(c.steps), "x"
		if len(labels)%2 == 1 {
			class = "x second" // hidden on narrow screens
		}
		switch {
		case x > 96:
			x, class = 100, class+" last"
		case x < 2:
			x, class = 0, class+" first"
		}
		format, date := "2 Jan", time.UnixMilli(at).UTC()
		switch isLong := end-c.start > maxDayLabels; {
		case at%dayMS != 0:
			format = "15:04"
		case isLong && date.Month() == time.January:
			format = "Jan 2006"
		case isLong:
			format = "Jan"
		}
		labels = append(labels, timeLabel{class, date.Format(format), coordinate(x)})
	}
	return labels
}

const maxDayLabels = 120 * dayMS // the longest period with labels of days

// labeledTimes returns the times that get a label.
func (c *timeChart) labeledTimes(end int64) (times []int64) {
	if end-c.start > maxDayLabels {
		first := time.UnixMilli(c.start - 1).UTC()
		at := time.Date(first.Year(), first.Month()+1, 1, 0, 0, 0, 0, time.UTC)
		for ; at.UnixMilli() < end; at = at.AddDate(0, int(1+(end-c.start)/(210*dayMS)), 0) {
			times = append(times, at.UnixMilli())
		}
		return times
	}
	const weekMS, monday = 7 * dayMS, 4 * dayMS // the first Monday was on 5 January 1970
	every := int64(0)
	for _, every = range []int64{hourMS, 2 * hourMS, 3 * hourMS, 4 * hourMS, 6 * hourMS, 12 * hourMS, dayMS, 2 * dayMS,
		weekMS, 2 * weekMS, 4 * weekMS} {
		if every >= c.stepMS && end-c.start <= 7*every {
			break
		}
	}
	first, offset := c.start, int64(0)
	if every >= weekMS {
		offset = monday
	}
	first += (every - (c.start-offset)%every) % every
	for at := first; at < end; at += every {
		times = append(times, at)
	}
	return times
}

// line returns the line of a series, which breaks where there is no value.
func (c *timeChart) line(s chartSeries, axis []float64) chartLine {
	l := chartLine{Class: s.Class}
	var run []chartPoint
	for i := range c.steps + 1 {
		if i < c.steps && !math.IsNaN(s.values[i]) {
			run = append(run, chartPoint{coordinate(1000 * (float64(i) + 0.5) / float64(c.steps)),
				coordinate(plotHeight - plotHeight*c.height(s.values[i], axis))})
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

// A chartView is a chart with its title and the table of its numbers, newest first.
type chartView struct {
	ID, Title, Scale string
	Drawing          *drawing
	Series           []legendEntry
	Rows             []chartRow // empty: there is nothing to show
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

// seriesClass returns the color of a value that the charts of the page consist of: the same in all of them, and k0 for
// the values that are in the rest.
func (d *dashData) seriesClass(id string) string {
	return "k" + strconv.Itoa(slices.Index(d.named, id)+1)
}

// usageChart returns the chart of the query's metric.
func (d *dashData) usageChart(q *dashQuery, id string) chartView {
	title := map[string]string{"calls": "Calls", "tokens": "Tokens", "cost": "Cost"}[q.metric] + " by " +
		strings.NewReplacer("_", " ", ":", " ").Replace(q.groupBy)
	c := q.newTimeChart(title, q.unit())
	for _, s := range d.topSeries(q) {
		class := "k0"
		if !s.isOther {
			class = d.seriesClass(s.id)
		}
		if q.valueOf(s.total) == 0 {
			continue
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
		c.addSeries(string(class), "e"+strconv.Itoa(k+1), func(i int) float64 { return float64(d.steps[i].errors[k]) })
		c.links = append(c.links, q.callsURL("cause", string(class)))
	}
	return newChartView("errors", "Errors by cause", c)
}

// latencyChart returns the chart of the median and the 95th percentile of a latency.
func (d *dashData) latencyChart(q *dashQuery, id, title string, latency func(*hourSum) *latencyHistogram) chartView {
	c := q.newTimeChart(title, unitMillis)
	c.lineChart = true
	for _, percentile := range []int{50, 95} {
		name := "p" + strconv.Itoa(percentile)
		c.addSeries(name, name, func(i int) float64 {
			return orNaN(latency(&d.steps[i]).quantile(float64(percentile) / 100))
		})
	}
	v := newChartView(id, title, c)
	v.Scale = "logarithmic scale"
	return v
}

// orNaN returns a percentile, NaN if there is none.
func orNaN(v float64) float64 {
	if v < 0 {
		return math.NaN()
	}
	return v
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

// allSeries returns the series of all values, the largest first; of projects, only the largest.
func (d *dashData) allSeries(q *dashQuery) []usageSeries {
	switch q.groupBy {
	case "model":
		return d.modelSeries(q)
	case "service_tier":
		return d.tierSeries(q)
	case "project":
		return d.byProject
	}
	return d.valueSeries(q)
}

// nameSeries chooses the values that the charts of the page consist of: those with the largest share of one of the
// metrics that it shows. Each has one color on the page, and the same place in every stack.
func (d *dashData) nameSeries(q *dashQuery, metrics ...string) {
	all, shares := d.allSeries(q), map[string]float64{}
	for _, q.metric = range metrics {
		whole := 0.0
		for _, s := range all {
			whole += q.valueOf(s.total)
		}
		for _, s := range all {
			shares[s.id] = max(shares[s.id], q.valueOf(s.total)/max(whole, 1))
		}
	}
	slices.SortStableFunc(all, func(a, b usageSeries) int { return cmp.Compare(shares[b.id], shares[a.id]) })
	d.named = nil
	for _, s := range all[:min(len(all), maxNamedSeries)] {
		d.named = append(d.named, s.id)
	}
}

// topSeries returns the series with a name, and the rest as one.
func (d *dashData) topSeries(q *dashQuery) []usageSeries {
	if d.named == nil {
		d.nameSeries(q, q.metric)
	}
	named := slices.DeleteFunc(d.allSeries(q), func(s usageSeries) bool { return !slices.Contains(d.named, s.id) })
	slices.SortFunc(named, func(a, b usageSeries) int {
		return cmp.Compare(slices.Index(d.named, a.id), slices.Index(d.named, b.id))
	})
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
