// This file turns data into HTML: it parses the embedded templates once, has the functions that templates call, formats
// the numbers of pages and charts, reads those of forms, and has the dashboard's tiles and its tables of attributes.
// Templates only format; html/template escapes whatever they print.
package main

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io"
	"io/fs"
	"math"
	"mime"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

//go:embed templates
var pageFiles embed.FS

// A pageSet holds the templates and the static files.
type pageSet struct {
	templates   func() (map[string]*template.Template, error) // by page; parsed on first use
	files       map[string]staticFile                         // by name with a hash of the content
	hashedNames map[string]string                             // by plain name
}

type staticFile struct {
	body        []byte
	contentType string
}

// newPageSet reads the static files. Templates are parsed on first use: that takes some 20 ms and 4
// MB, which a proxy without visitors of /admin need not spend.
func newPageSet() (*pageSet, error) {
	ps := &pageSet{files: map[string]staticFile{}, hashedNames: map[string]string{}}
	names, err := fs.Glob(pageFiles, "templates/static/*")
	if err != nil {
		return nil, fmt.Errorf("listing static files: %w", err)
	}
	for _, name := range names {
		body, err := pageFiles.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", name, err)
		}
		sum, ext := sha256.Sum256(body), path.Ext(name)
		hashed := strings.TrimSuffix(path.Base(name), ext) + "." + hex.EncodeToString(sum[:6]) + ext
		ps.files[hashed] = staticFile{body, mime.TypeByExtension(ext)}
		ps.hashedNames[path.Base(name)] = hashed
	}
	ps.templates = sync.OnceValues(ps.readTemplates)
	return ps, nil
}

// readTemplates parses the pages. Each is a template "content" together with templates/parts.
func (ps *pageSet) readTemplates() (map[string]*template.Template, error) {
	base, err := template.New("").Funcs(ps.funcs()).ParseFS(pageFiles, "templates/parts/*.html")
	if err != nil {
		return nil, fmt.Errorf("parsing the shared templates: %w", err)
	}
	names, err := fs.Glob(pageFiles, "templates/*.html")
	if err != nil {
		return nil, fmt.Errorf("listing templates: %w", err)
	}
	pages := map[string]*template.Template{}
	for _, name := range names {
		t, err := base.Clone()
		if err == nil {
			t, err = t.ParseFS(pageFiles, name)
		}
		if err != nil {
			return nil, fmt.Errorf("parsing %s: %w", name, err)
		}
		pages[strings.TrimSuffix(path.Base(name), ".html")] = t
	}
	return pages, nil
}

// render writes a page.
func (ps *pageSet) render(w io.Writer, name string, v *pageView) error {
	pages, err := ps.templates()
	if err != nil {
		return err
	}
	t := pages[name]
	if t == nil {
		return fmt.Errorf("no template %q", name)
	}
	if err := t.ExecuteTemplate(w, "layout", v); err != nil {
		return fmt.Errorf("template %q: %w", name, err)
	}
	return nil
}

// funcs returns what templates may call besides html/template's own functions.
func (ps *pageSet) funcs() template.FuncMap {
	return template.FuncMap{
		"static": func(name string) (string, error) {
			if ps.hashedNames[name] == "" {
				return "", fmt.Errorf("no static file %q", name)
			}
			return "/admin/static/" + ps.hashedNames[name], nil
		},
		"fieldID":    fieldID,
		"outcome":    outcomeLabel,
		"when":       newTimeView,  // for the templates "time", "ago" and "exact"
		"number":     formatNumber, // 1,234,567
		"usd":        formatUSD,    // $1,234.50; takes dollars or *dollars
		"exactUSD":   func(v dollars) string { return formatPrice(formatNanos(int64(v))) },
		"ms":         formatMillis,
		"millis":     formatLongTime,
		"seconds":    func(n int64) string { return describeDuration(time.Duration(n) * time.Second) },
		"share":      func(v float64) string { return percent(100 * v) },
		"bytes":      formatBytes,
		"capitalize": capitalize,
		"textParts":  textParts,
		"plural":     pluralize, // plural 3 "token" "tokens": 3 tokens
		"list":       func(items ...any) []any { return items },
		"price":      func(v json.RawMessage) string { return formatPrice(string(v)) },
	}
}

// An option is one choice of a select.
type option struct{ Value, Label string }

// options returns options from pairs of value and label.
func options(pairs ...string) (list []option) {
	for i := 0; i < len(pairs); i += 2 {
		list = append(list, option{pairs[i], pairs[i+1]})
	}
	return list
}

// A timeView is a time in the formats that pages use.
type timeView struct{ ISO, Text, Exact, Date, Clock, Relative string }

// newTimeView formats a timestamp or *timestamp; it returns nil for a nil one.
func newTimeView(v any) (*timeView, error) {
	var at time.Time
	switch v := v.(type) {
	case timestamp:
		at = time.UnixMilli(int64(v)).UTC()
	case *timestamp:
		if v == nil {
			return nil, nil
		}
		at = time.UnixMilli(int64(*v)).UTC()
	default:
		return nil, fmt.Errorf("%T is not a time", v)
	}
	return &timeView{ISO: at.Format(time.RFC3339), Text: at.Format("2006-01-02 15:04"), Date: at.Format(time.DateOnly),
		Exact: at.Format(time.DateTime), Clock: at.Format(time.TimeOnly), Relative: relativeTime(time.Until(at))}, nil
}

// relativeTime returns a duration from now as text, rounded to the nearest unit, such as "in 3 days" or "3 days
// ago".
func relativeTime(d time.Duration) string {
	const day = 24 * time.Hour
	text := ""
	for _, u := range []struct {
		below, unit time.Duration
		name        string
	}{
		{time.Minute, time.Second, "second"}, {time.Hour, time.Minute, "minute"}, {2 * day, time.Hour, "hour"},
		{2 * 365 * day, day, "day"}, {math.MaxInt64, 365 * day, "year"},
	} {
		if rounded := d.Abs().Round(u.unit); rounded < u.below {
			text = pluralize(int64(rounded/u.unit), u.name, u.name+"s")
			break
		}
	}
	if text == "0 seconds" {
		return "now"
	}
	if d < 0 {
		return text + " ago"
	}
	return "in " + text
}

func capitalize(s string) string {
	r, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(r)) + s[n:]
}

// formatNumber formats an int, an int64 or a *int64.
func formatNumber(v any) (string, error) {
	switch v := v.(type) {
	case int64:
		return groupDigits(v), nil
	case *int64:
		if v == nil {
			return "–", nil
		}
		return groupDigits(*v), nil
	case int:
		return groupDigits(int64(v)), nil
	}
	return "", fmt.Errorf("%T is not a whole number", v)
}

// formatUSD formats dollars or *dollars.
func formatUSD(v any) (string, error) {
	switch v := v.(type) {
	case dollars:
		return formatMoney(int64(v)), nil
	case *dollars:
		if v == nil {
			return "–", nil
		}
		return formatMoney(int64(*v)), nil
	}
	return "", fmt.Errorf("%T is no amount of money", v)
}

// A chartUnit is the unit of a number on a page.
type chartUnit int

const (
	unitCount  chartUnit = iota
	unitMoney            // nano-dollars
	unitMillis           // milliseconds
)

// compact returns a number in few characters, as tiles and axes show it: "9,999", "12.3 K", "$1.75 M", "4.2 s". Numbers
// that are read together get the same suffix: scale is the largest of them.
func (u chartUnit) compact(v, scale float64) string {
	if u == unitMillis {
		return u.format(v)
	}
	text, unit := "", 1.0
	if u == unitMoney {
		text, unit = "$", 1e9
	}
	if !(scale/unit >= 9999.5) || math.IsInf(scale, 0) || v == 0 {
		return strings.TrimSuffix(u.format(math.Round(v)), ".00")
	}
	v, scale = v/unit, scale/unit
	size, suffix := 1e3, "K"
	for _, next := range []string{"M", "B", "T", "Q"} {
		if scale < 999.5*size {
			break
		}
		size, suffix = size*1e3, next
	}
	digits := threeDigits(v / size)
	if v >= 999.5*size {
		digits = groupDigits(int64(v / size))
	}
	return text + digits + "\u00a0" + suffix
}

// A figure is a number in few characters, and exactly.
type figure struct{ Short, Exact string }

func (u chartUnit) figure(v float64) figure {
	f := figure{u.compact(v, v), u.format(v)}
	if f.Exact == f.Short+".00" { // a tile need not be shorter than that
		f.Short = f.Exact
	}
	return f
}

// format returns a number as tables show it: exactly, but times with three digits.
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

// printable removes the control characters that neither HTML nor XML allows.
func printable(text string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' && c != '\n' || c == 0x7f || c == 0xfffe || c == 0xffff {
			return -1
		}
		return c
	}, strings.ToValidUTF8(text, ""))
}

// formatLongTime formats a number of milliseconds that may be hours.
func formatLongTime(ms float64) string {
	if ms < 120_000 {
		return unitMillis.format(ms)
	}
	const longest = 100 * 365 * 24 * time.Hour // far below the largest Duration
	return describeDuration(time.Duration(min(ms, float64(longest.Milliseconds()))) * time.Millisecond)
}

// formatMillis formats a number of milliseconds.
func formatMillis(v *float64) string {
	if v == nil {
		return "–"
	}
	return unitMillis.format(*v)
}

// formatBytes formats a size with one decimal.
func formatBytes(n int64) string {
	f, units := float64(n), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for len(units) > 1 && f >= 1024 {
		f, units = f/1024, units[1:]
	}
	if units[0] == "B" {
		return strconv.FormatInt(n, 10) + " B"
	}
	return strconv.FormatFloat(f, 'f', 1, 64) + " " + units[0]
}

// formatPrice formats an exact price, a decimal number of dollars, with all its decimals but at least two.
func formatPrice(raw string) string {
	text, isNegative := strings.CutPrefix(raw, "-")
	whole, decimals, _ := strings.Cut(text, ".")
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return raw
	}
	sign := ""
	if isNegative {
		sign = "−"
	}
	return sign + "$" + groupDigits(n) + "." + (decimals + "00")[:max(2, len(decimals))]
}

func percent(v float64) string {
	if v > 0 && v < 0.1 {
		return "<0.1%"
	}
	return strconv.FormatFloat(v, 'f', 1, 64) + "%"
}

func formatSigned(v float64) string {
	if v < 0 {
		return "−" + formatTwoDecimals(-v)
	}
	return "+" + formatTwoDecimals(v)
}

// formatPointChange formats the change of a percentage, in percentage points.
func formatPointChange(v float64) string {
	if v = math.Round(v*10) / 10; v == 0 {
		return "±0"
	}
	return formatSigned(v) + " pts"
}

// formatPercentChange formats a change in percent. It returns "" if there is nothing to compare with.
func formatPercentChange(now, was float64) string {
	if was <= 0 {
		return ""
	}
	switch v := math.Round(100 * (now - was) / was); {
	case v == 0:
		return "±0%"
	case v > 999:
		return "×" + formatTwoDecimals(math.Round(now/was))
	default:
		return formatSigned(v) + "%"
	}
}

// A tile is one number, its change from that of the period before, and its course. Link leads to what it counts. Level
// is good, bad or "".
type tile struct {
	Label         string
	Value         figure
	Link          string
	Details       []tileDetail
	Change, Level string
	Previous      *figure
	Course        *chartLine
}

// A tileDetail is a line of a tile. Link leads to what it counts.
type tileDetail struct {
	Figure     figure
	Text, Link string
}

// course draws a number of each step.
func (d *dashData) course(q *dashQuery, value func(*hourSum) float64) *chartLine {
	c, s := timeChart{steps: len(d.steps)}, chartSeries{}
	for i := range d.steps {
		s.values = append(s.values, value(&d.steps[i]))
	}
	c.series = []chartSeries{s}
	_, highest := c.bounds()
	return new(c.line(s, []float64{0, max(highest, 1)}))
}

func (d *dashData) errorTile(q *dashQuery) tile {
	now, was := &d.total, d.previous
	failed, before := errorPercent(now), errorPercent(was)
	text, failures := percent(failed), unitCount.figure(float64(totalErrors(now)))
	failuresURL := q.callsURL("outcome", failedOutcomes)
	t := tile{Label: "Errors", Value: figure{text, text}, Link: failuresURL,
		Previous: &figure{percent(before), percent(before)}, Details: []tileDetail{{failures, "failed", failuresURL}},
		Course: d.course(q, func(h *hourSum) float64 { return float64(totalErrors(h)) })}
	if was.calls > 0 && now.calls > 0 {
		t.Change, t.Level = formatPointChange(failed-before), changeLevel(failed, before, 0.5)
	}
	return t
}

func (d *dashData) latencyTile(q *dashQuery, label string, of func(*hourSum) *latencyHistogram) tile {
	now, was := of(&d.total), of(d.previous)
	median, before := now.quantile(0.5), was.quantile(0.5)
	p95 := strings.ReplaceAll("p95 "+unitMillis.format(now.quantile(0.95)), " ", "\u00a0") // on one line
	t := tile{Label: label, Value: unitMillis.figure(median), Details: []tileDetail{{Text: "median, " + p95}},
		Course: d.course(q, func(h *hourSum) float64 { return orNaN(of(h).quantile(0.5)) })}
	if before >= 0 {
		t.Previous = new(unitMillis.figure(before))
	}
	if median > 0 && before > 0 && !math.IsInf(median+before, 0) {
		t.Change, t.Level = formatPercentChange(median, before), changeLevel(median, before, before*0.1)
	}
	return t
}

// changeLevel judges the change of a number that should be small; changes up to slack are neutral.
func changeLevel(now, was, slack float64) string {
	switch {
	case now > was+slack:
		return "bad"
	case now < was-slack:
		return "good"
	}
	return ""
}

// periodOptions returns the choices of a form.
func periodOptions(now int64) (list []option) {
	for _, p := range dashPeriods(now) {
		list = append(list, option{p.name, p.title})
	}
	return list
}

const commonPeriods = 5 // of dashPeriods, which forms show first

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

// barWidth returns the width, in percent, of a bar that shows part of whole.
func barWidth(part, whole float64) coordinate {
	if whole > 0 && part > 0 {
		return coordinate(max(0.5, 100*min(part/whole, 1)))
	}
	return 0
}

// A durationPart is one part of a duration, and its place in a bar that is 1000 wide.
type durationPart struct {
	Name, Class string
	us          int64
	Text        string
	X, Width    coordinate
}

// newDurationBar lays the parts out one after the other, without those that took no time.
func newDurationBar(parts ...durationPart) (bar []durationPart) {
	total, x := 0.0, 0.0
	for _, p := range parts {
		total += float64(max(0, p.us))
	}
	for _, p := range parts {
		if p.us <= 0 {
			continue
		}
		width := 1000 * float64(p.us) / total
		p.Text, p.X, p.Width = unitMillis.format(float64(p.us)/1000), coordinate(x), coordinate(width)
		bar = append(bar, p)
		x += width
	}
	return bar
}

// attributeShares is what the largest values of an attribute have.
type attributeShares struct {
	attribute string
	shares    []usageShare
	tooMany   bool // sums to add up: there are no shares
}

const (
	maxAttributeRankings = 6       // of a dashboard
	maxDashboardSums     = 100_000 // of an attribute that are read for a dashboard
)

// readLabels reads the usage of each step by model and by service tier, and that of each endpoint. Where models are
// many, so are the sums: they are read once, and added up here.
func (d *dashData) readLabels(ctx context.Context, s *store, q *dashQuery) error {
	groups, err := s.usageGroups(ctx, q.usageQuery(usageQuery{interval: q.grain, byModel: true, byEndpoint: true,
		byServiceTier: true}))
	if err != nil {
		return err
	}
	type key struct {
		at int64
		usageLabels
	}
	models, tiers, endpoints := map[key]*usageSum{}, map[key]*usageSum{}, map[string]*usageTotals{}
	for k, sum := range groups {
		getOrInsert(models, key{k.at, usageLabels{model: k.model}}).merge(*sum)
		getOrInsert(tiers, key{k.at, usageLabels{serviceTier: k.serviceTier}}).merge(*sum)
		getOrInsert(endpoints, k.endpoint).add(sum.totals())
	}
	rows := func(sums map[key]*usageSum) []usageRow {
		list := make([]usageRow, 0, len(sums))
		for k, sum := range sums {
			list = append(list, usageRow{usageKey{at: k.at, usageLabels: k.usageLabels}, *sum})
		}
		return list
	}
	d.modelPoints, d.tierPoints = rows(models), rows(tiers)
	for name, totals := range endpoints {
		d.endpoints = append(d.endpoints, usageShare{name: name, usageTotals: *totals})
	}
	q.sortLargestFirst(d.endpoints)
	return nil
}

// readAttributes reads the usage of the largest values of each attribute.
func (d *dashData) readAttributes(ctx context.Context, s *store, q *dashQuery) error {
	names, err := s.usedAttributes(ctx, q.projectID, maxAttributeRankings)
	if isAttribute(q.groupBy) && !slices.Contains(names, q.groupBy) {
		names = append(names, q.groupBy)
	}
	for _, name := range names {
		u := q.usageQuery(usageQuery{attribute: name, top: rankingSize + 1, largestBy: q.metric})
		shares, err := s.topValues(ctx, &u, maxDashboardSums)
		tooMany := errors.Is(err, errTooManyRows)
		if err != nil && !tooMany {
			return err
		}
		if len(shares) > 0 || tooMany {
			d.attributes = append(d.attributes, attributeShares{name, shares, tooMany})
		}
		if name == q.groupBy && len(shares) > 0 {
			u = q.usageQuery(usageQuery{interval: q.grain, attribute: name,
				values: shares[:min(len(shares), maxNamedSeries)]})
			if d.valuePoints, err = s.usage(ctx, u); err != nil {
				return err
			}
			isOther := func(u usageRow) bool { return u.rest == restOther }
			d.valuePoints = slices.DeleteFunc(d.valuePoints, isOther)
		}
	}
	return err
}

// attributeTitle names the values of an attribute.
func attributeTitle(attribute string) string {
	if key, isTag := strings.CutPrefix(attribute, tagAttribute); isTag {
		return "Tag " + key
	}
	return map[string]string{sessionAttribute: "Sessions", endUserAttribute: "End users"}[attribute]
}

// attributeRankings returns a table of the service tiers, if there is another than the standard one, and one for each
// attribute.
func (d *dashData) attributeRankings(q *dashQuery, whole float64) (tables []rankingTable) {
	tiers := sharesOf(d.tierSeries(q))
	if slices.ContainsFunc(tiers, func(v usageShare) bool { return v.id != "" }) {
		tables = append(tables, d.ranking(q, "Service tiers", tiers, whole))
	}
	for _, a := range d.attributes {
		table := d.ranking(q, attributeTitle(a.attribute), a.shares, whole)
		table.TooMany, table.More = a.tooMany, 0 // it is not known how many there are
		for i := range table.Rows {
			table.Rows[i].Link = attributeLink(a.attribute, table.Rows[i].Name, q.projectID)
		}
		tables = append(tables, table)
	}
	return tables
}

// attributeLink returns the page of a session, or the list of calls with another value.
func attributeLink(attribute, value, project string) string {
	query := url.Values{"project": {project}}
	switch key, isTag := strings.CutPrefix(attribute, tagAttribute); {
	case isTag:
		query.Set("tag", key+"="+value)
	case attribute == sessionAttribute:
		return "/admin/sessions?" + url.Values{"session": {value}}.Encode()
	default:
		query.Set("end_user", value)
	}
	return "/admin/requests?" + query.Encode()
}

// writeAttributesCSV writes a line for each service tier, and for each of the largest values.
func (d *dashData) writeAttributesCSV(q *dashQuery, e *exportWriter) {
	tiers := attributeShares{attribute: "service_tier", shares: sharesOf(d.tierSeries(q))}
	for _, a := range append([]attributeShares{tiers}, d.attributes...) {
		for _, v := range a.shares[:min(len(a.shares), rankingSize)] {
			row := []string{a.attribute, "", v.name, "", formatInt(v.calls), "", "", formatInt(v.tokens),
				formatNanos(v.cost)}
			e.writeRow(append(row, make([]string, 13)...)...)
		}
	}
}

// ungroupDigits removes the commas of a number such as 1,500,000. Where a comma may be that of a decimal, as in 1,5,
// the text stays as it is, and is no number.
func ungroupDigits(text string) string {
	text = strings.TrimSpace(text)
	whole, _, _ := strings.Cut(text, ".")
	groups := strings.Split(whole, ",")
	for i, group := range groups {
		if n := len(group); len(groups) > 1 && (n == 0 || n > 3 || i > 0 && n < 3) {
			return text
		}
	}
	return strings.Join(groups, "") + text[len(whole):]
}
