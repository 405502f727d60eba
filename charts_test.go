// Tests of the charts: golden pictures, round ticks, and what must hold of any
// chart whatever goes in.
package main

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const chartDay = 20_000 * dayMS // 4 October 2024

// chartCases are charts by the name of their golden file.
func chartCases() map[string]string {
	nan := math.NaN()
	calls := &timeChart{label: "Calls over time, by project", start: chartDay, step: dayMS, steps: 4, series: []chartSeries{
		{"search", "k1", []float64{10, 0, 35, 20}}, {"bot", "k2", []float64{5, 0, 5, 1}}, {"all others", "k0", []float64{0, 0, 1, 0}}}}
	money := &timeChart{label: "Cost", unit: unitMoney, start: chartDay, step: hourMS, steps: 24, series: []chartSeries{{"m", "k1", make([]float64, 24)}}}
	money.series[0].values[5], money.series[0].values[23] = 123_456_789, 900_000
	lines := &timeChart{label: "Time", unit: unitMillis, start: chartDay, step: 6 * hourMS, steps: 6, lines: true, series: []chartSeries{
		{"p50", "k1", []float64{120, 130, nan, 90.5, nan, 200}}, {"p95", "k2", []float64{900, 1300, nan, math.Inf(1), nan, 2100}}}}
	hostile := &timeChart{label: `"><script>alert(1)</script>`, start: chartDay, step: dayMS, steps: 1, series: []chartSeries{
		{"</title><img src=x onerror=alert(1)>\u202e&amp;", "k1", []float64{3}}}}
	huge := &timeChart{label: "Huge", start: chartDay, step: dayMS, steps: 2, series: []chartSeries{{"x", "k1", []float64{9.2e18, 1}}, {"y", "k2", []float64{9.2e18, 0}}}}
	bar := spanBar{}
	bar.add("to the first byte", "k1", 240_000)
	bar.add("the answer <b>", "k4", 1_760_000)
	return map[string]string{
		"stacked": calls.svg(), "money": money.svg(), "lines": lines.svg(), "hostile": hostile.svg(), "huge": huge.svg(),
		"empty":  (&timeChart{label: "Nothing", start: chartDay, step: dayMS, steps: 3, series: []chartSeries{{"x", "k1", make([]float64, 3)}}}).svg(),
		"none":   (&timeChart{label: "No series", unit: unitMoney, start: chartDay, step: dayMS, steps: 1}).svg(),
		"single": (&timeChart{label: "One point", unit: unitMillis, start: chartDay, step: hourMS, steps: 1, lines: true, series: []chartSeries{{"p50", "k1", []float64{250}}}}).svg(),
		"bars":   partBar(1, 3, "k1") + partBar(0, 0, "") + partBar(5, 3, "k2") + partBar(1e-9, 1, "k1"),
		"span":   bar.svg() + (&spanBar{}).svg(),
	}
}

// TestCharts: charts look as in testdata/charts. LLM_PROXY_GOLDEN=1 writes those
// files anew.
func TestCharts(t *testing.T) {
	t.Parallel()
	for name, got := range chartCases() {
		file := filepath.Join("testdata", "charts", name+".svg")
		if os.Getenv("LLM_PROXY_GOLDEN") != "" {
			if err := os.WriteFile(file, []byte(got+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil || string(want) != got+"\n" {
			t.Errorf("%s is not drawn as in %s (%v):\n%s", name, file, err, clip(got, 3000))
		}
		checkDrawing(t, name, got)
	}
}

// checkDrawing holds a drawing to what the pages' Content-Security-Policy and any
// browser ask for.
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
			if n := strings.ToLower(a.Value); a.Name.Local != "aria-label" && (strings.Contains(n, "nan") || strings.Contains(n, "inf") || strings.HasPrefix(n, "-")) {
				t.Errorf("%s: %s=%q", name, a.Name.Local, a.Value)
			}
		}
	}
}

// TestChartsOfAnything: no number or text makes a drawing that is not sound.
func TestChartsOfAnything(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(5, 6))
	values := []float64{0, 1, 0.4, 3e3, 1e9, 7e17, 1e-7, math.NaN(), math.Inf(1), math.MaxInt64, -1}
	names := []string{"a", "<b>", `"`, "\x00\xff", "]]>", "&", "\u202e", strings.Repeat("x", 5000)}
	for i := range 80 {
		c := &timeChart{label: names[random.IntN(len(names))], unit: unit(random.IntN(3)), start: chartDay, step: []int64{hourMS, 6 * hourMS, dayMS}[random.IntN(3)],
			steps: random.IntN(100), lines: i%2 == 0}
		for range random.IntN(8) {
			s := chartSeries{name: names[random.IntN(len(names))], class: "k1"}
			for range c.steps {
				s.values = append(s.values, values[random.IntN(len(values))])
			}
			c.series = append(c.series, s)
		}
		checkDrawing(t, "anything", c.svg())
	}
}

// TestTicks: axes end at or above the highest value, in two to five round steps.
func TestTicks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		unit    unit
		highest float64
		want    string // the labels
	}{
		{unitCount, 0, "0 1"}, {unitCount, 1, "0 1"}, {unitCount, 3, "0 1 2 3"}, {unitCount, 7, "0 2 4 6 8"}, {unitCount, 100, "0 20 40 60 80 100"},
		{unitCount, 101, "0 50 100 150"}, {unitCount, 12_345, "0 5k 10k 15k"}, {unitCount, 3_400_000, "0 1M 2M 3M 4M"}, {unitCount, 9.2e18, "0 2000000T 4000000T 6000000T 8000000T 10000000T"},
		{unitMoney, 0, "$0 $0.20 $0.40 $0.60 $0.80 $1"}, {unitMoney, 3e9, "$0 $1 $2 $3"}, {unitMoney, 2e8, "$0 $0.05 $0.10 $0.15 $0.20"}, {unitMoney, 1.2e6, "$0 $0.0005 $0.001 $0.0015"}, {unitMoney, 4.2e12, "$0 $1k $2k $3k $4k $5k"},
		{unitMillis, 900, "0 ms 200 ms 400 ms 600 ms 800 ms 1 s"}, {unitMillis, 4_000, "0 ms 1 s 2 s 3 s 4 s"}, {unitMillis, 63_000, "0 ms 20 s 40 s 60 s 80 s"},
		{unitCount, math.Inf(1), "0 1"}, {unitCount, math.NaN(), "0 1"},
	} {
		step, n := c.unit.ticks(c.highest)
		var labels []string
		for i := range n + 1 {
			labels = append(labels, c.unit.short(step*float64(i)))
		}
		if got := strings.Join(labels, " "); got != c.want {
			t.Errorf("%v up to %v: %s, want %s", c.unit, c.highest, got, c.want)
		}
	}
}
