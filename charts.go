// This room draws charts: plain code, numbers in, SVG out. Widths are parts of
// what there is, so that a chart fits any screen with its letters as large as
// everywhere; colours and strokes are classes of the style sheet. Every name that
// comes in is escaped. Nothing here knows of HTTP, templates or the database.
package main

import (
	"cmp"
	"fmt"
	"html"
	"math"
	"strconv"
	"strings"
	"time"
)

// A chartUnit is what a chart counts.
type chartUnit int

const (
	unitCount  chartUnit = iota
	unitMoney            // nano-dollars
	unitMillis           // milliseconds
)

// formatShort writes a value as it stands at an axis: round, and in few letters.
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

// format writes a value as it stands in a title or a table.
func (u chartUnit) format(v float64) string {
	switch {
	case math.IsInf(v, 1) && u == unitMillis:
		return "over 100 s"
	case math.IsNaN(v) || math.IsInf(v, 0) || u == unitMillis && v < 0:
		return "–"
	case u == unitMillis && v >= 1000:
		return strconv.FormatFloat(v/1000, 'g', 3, 64) + " s"
	case u == unitMillis:
		return strconv.FormatFloat(v, 'g', 3, 64) + " ms"
	case u == unitMoney:
		return formatMoney(int64(v))
	}
	return groupDigits(int64(v))
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

// ticks returns a round step, and how many of them reach up to highest: 1, 2 or 5
// times a power of ten, at least two and at most five.
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

// A chartSeries is a row of values, one for each step of time. NaN is none.
type chartSeries struct {
	name   string
	class  string // of the style sheet: k1 to k6, k0 for the rest
	values []float64
}

// A timeChart shows series over time.
type timeChart struct {
	label     string // what it shows, for those who do not see it
	unit      chartUnit
	start     int64 // unix milliseconds of the first step
	stepMS    int64 // its length
	steps     int
	series    []chartSeries
	lineChart bool // lines beside each other, not bars on top of each other
}

const (
	plotHeight = 180
	plotTop    = 8  // room for the highest label
	plotLeft   = 52 // room for the labels of the axis
	plotBottom = 24 // and of time
)

// svg draws the chart: the axis, which is as wide as its labels, and beside it the
// plot, which takes what is left.
func (c *timeChart) svg() string {
	var b strings.Builder
	const height = plotTop + plotHeight + plotBottom
	fmt.Fprintf(&b, `<div class="chart" role="img" aria-label="%s"><svg class="axis" width="%d" height="%d">`, escapeSVG(c.label), plotLeft, height)
	step, n := c.unit.ticks(c.highest())
	top := step * float64(n)
	for i := range n + 1 {
		fmt.Fprintf(&b, `<text class="y" x="%d" y="%s">%s</text>`, plotLeft-6, formatTwoDecimals(plotTop+plotHeight-plotHeight*float64(i)/float64(n)+4), c.unit.formatShort(step*float64(i)))
	}
	fmt.Fprintf(&b, `</svg><svg class="plot" height="%d"><svg y="%d" width="100%%" height="%d">`, height, plotTop, plotHeight+plotBottom)
	for i := range n + 1 {
		y := formatTwoDecimals(plotHeight - plotHeight*float64(i)/float64(n))
		fmt.Fprintf(&b, `<line class="grid" x1="0" x2="100%%" y1="%s" y2="%s"/>`, y, y)
	}
	c.drawTimeLabels(&b)
	if c.lineChart {
		c.drawLines(&b, top)
	}
	for i := range c.steps {
		c.drawColumn(&b, i, top)
	}
	b.WriteString(`</svg></svg></div>`)
	return b.String()
}

// highest returns the highest value, or the highest pile of them.
func (c *timeChart) highest() (most float64) {
	for i := range c.steps {
		pile := 0.0
		for _, s := range c.series {
			v := s.values[i]
			if math.IsNaN(v) || math.IsInf(v, 0) {
				continue
			}
			if pile += v; c.lineChart {
				pile = v
			}
			most = max(most, pile)
		}
	}
	return most
}

// drawColumn draws the bars of a step, and the ground over which a pointer finds the
// step's numbers.
func (c *timeChart) drawColumn(b *strings.Builder, i int, top float64) {
	width := 100 / float64(c.steps)
	x := width * float64(i)
	fmt.Fprintf(b, `<g class="slot"><title>%s</title><rect class="hit" x="%s%%" y="0" width="%s%%" height="%d"/>`,
		escapeSVG(c.columnTitle(i)), formatTwoDecimals(x), formatTwoDecimals(width), plotHeight)
	below := 0.0
	for _, s := range c.series {
		v := s.values[i]
		if c.lineChart || !(v > 0) || math.IsInf(v, 0) {
			continue
		}
		height := plotHeight * v / top
		fmt.Fprintf(b, `<rect class="%s" x="%s%%" y="%s" width="%s%%" height="%s"/>`, s.class,
			formatTwoDecimals(x+width*0.1), formatTwoDecimals(max(0, plotHeight-below-height)), formatTwoDecimals(width*0.8), formatTwoDecimals(height))
		below += height
	}
	b.WriteString(`</g>`)
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
		t.WriteString("\n" + s.name + ": " + c.unit.format(v))
	}
	switch {
	case shown == 0:
		t.WriteString("\nnothing")
	case shown > 1 && !c.lineChart:
		t.WriteString("\ntogether: " + c.unit.format(total))
	}
	return t.String()
}

// formTimeToRFC3339 names a step of time.
func (c *timeChart) stepLabel(i int) string {
	at := time.UnixMilli(c.start + int64(i)*c.stepMS).UTC()
	if c.stepMS >= dayMS {
		return at.Format("Mon 2 Jan 2006")
	}
	return at.Format("Mon 2 Jan 15:04") + at.Add(time.Duration(c.stepMS)*time.Millisecond).Format("–15:04") + " UTC"
}

// drawTimeLabels writes at most seven labels below the plot.
func (c *timeChart) drawTimeLabels(b *strings.Builder) {
	every, format := int64(max(1, (c.steps+5)/6))*c.stepMS, "2 Jan"
	if c.stepMS < dayMS {
		for _, every = range []int64{hourMS, 2 * hourMS, 3 * hourMS, 4 * hourMS, 6 * hourMS, 12 * hourMS, dayMS, 2 * dayMS, 7 * dayMS} {
			if every >= c.stepMS && int64(c.steps)*c.stepMS <= 7*every {
				break
			}
		}
		if every < dayMS {
			format = "15:04"
		}
	}
	first := c.start
	if c.stepMS < dayMS {
		first += (every - c.start%every) % every // whole ones
	}
	shown := 0
	for at := first; at < c.start+int64(c.steps)*c.stepMS; at += every {
		x := 100 * (float64(at-c.start)/float64(c.stepMS) + 0.5) / float64(c.steps)
		class := "x"
		if shown%2 == 1 {
			class = "x second" // left out where it is tight
		}
		shown++
		if x > 96 {
			x, class = 100, class+" last"
		}
		fmt.Fprintf(b, `<text class="%s" x="%s%%" y="%d">%s</text>`, class, formatTwoDecimals(x), plotHeight+18, time.UnixMilli(at).UTC().Format(format))
	}
}

// drawLines draws each series as a line that breaks where there is no value. A
// value between two gaps is a dot.
func (c *timeChart) drawLines(b *strings.Builder, top float64) {
	for _, s := range c.series {
		var path strings.Builder
		var dots []string
		length := 0
		for i := range c.steps + 1 {
			if i < c.steps && !math.IsNaN(s.values[i]) {
				x, y := 1000*(float64(i)+0.5)/float64(c.steps), plotHeight-plotHeight*min(s.values[i], top)/top
				path.WriteString(map[bool]string{true: "M", false: "L"}[length == 0] + formatTwoDecimals(x) + " " + formatTwoDecimals(y))
				length++
				continue
			}
			if length == 1 {
				y := plotHeight - plotHeight*min(s.values[i-1], top)/top
				dots = append(dots, fmt.Sprintf(`<circle class="dot %s" cx="%s%%" cy="%s" r="2.5"/>`, s.class, formatTwoDecimals(100*(float64(i)-0.5)/float64(c.steps)), formatTwoDecimals(y)))
			}
			length = 0
		}
		fmt.Fprintf(b, `<svg viewBox="0 0 1000 %d" width="100%%" height="%d" preserveAspectRatio="none"><path class="line %s" d="%s"/></svg>%s`,
			plotHeight, plotHeight, s.class, path.String(), strings.Join(dots, ""))
	}
}

// fractionBar is a bar of a part of a whole; both are counted in the same unit.
func fractionBar(part, whole float64, class string) string {
	width := 0.0
	if whole > 0 && part > 0 {
		width = max(0.5, 100*min(part/whole, 1))
	}
	return fmt.Sprintf(`<svg class="hbar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true"><rect class="%s" width="%s" height="8"/></svg>`,
		escapeSVG(cmp.Or(class, "k1")), formatTwoDecimals(width))
}

// escapeSVG makes a text fit for a drawing: it ends no element or attribute, and has
// no character that neither HTML nor XML may have.
func escapeSVG(text string) string {
	return html.EscapeString(strings.Map(func(c rune) rune {
		if c < ' ' && c != '\n' || c == 0x7f || c == 0xfffe || c == 0xffff {
			return -1
		}
		return c
	}, strings.ToValidUTF8(text, "")))
}

// formatTwoDecimals writes a coordinate, with two decimals at most.
func formatTwoDecimals(v float64) string {
	text := strings.TrimRight(strings.TrimRight(strconv.FormatFloat(v, 'f', 2, 64), "0"), ".")
	if text == "-0" {
		return "0"
	}
	return text
}

// A durationBar shows of what a span of time is made, one after the other.
type durationBar struct{ parts []durationPart }

type durationPart struct {
	name, class string
	us          int64
}

func (b *durationBar) add(name, class string, us int64) {
	if us > 0 {
		b.parts = append(b.parts, durationPart{name, class, us})
	}
}

func (b *durationBar) total() (us int64) {
	for _, p := range b.parts {
		us += p.us
	}
	return us
}

// svg draws the bar; "" if there is no time to show.
func (b *durationBar) svg() string {
	total := float64(b.total())
	if total == 0 {
		return ""
	}
	var out strings.Builder
	out.WriteString(`<svg class="span" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" aria-label="Where the time went">`)
	x := 0.0
	for _, p := range b.parts {
		width := 1000 * float64(p.us) / total
		fmt.Fprintf(&out, `<g><title>%s: %s</title><rect class="%s" x="%s" width="%s" height="20"/></g>`,
			escapeSVG(p.name), unitMillis.format(float64(p.us)/1000), escapeSVG(p.class), formatTwoDecimals(x), formatTwoDecimals(width))
		x += width
	}
	out.WriteString(`</svg>`)
	return out.String()
}

func (b *durationBar) legend() (out []legendItem) {
	for _, p := range b.parts {
		out = append(out, legendItem{p.class, p.name + ": " + unitMillis.format(float64(p.us)/1000)})
	}
	return out
}
