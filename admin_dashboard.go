// The dashboard of /admin: it reads what is asked for, hands numbers to
// dashboard.go and charts.go, and puts what they make of it into a page.
package main

import (
	"cmp"
	"errors"
	"html/template"
	"math"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	maxExactTokens    = 500    // tokens that are added up exactly
	maxSampledCalls   = 10_000 // calls that are looked at where there are more of them
	maxLiveScanned    = 5_000  // projects and tokens that are live, each
	maxIdleScanned    = 20     // projects and tokens that are not, each
	nearLimitFraction = 0.8    // of a limit, from which on it is shown
	lowDiskBytes      = 1 << 30
)

// A dashView is what the dashboard shows.
type dashView struct {
	Periods, Projects, Bys, Measures []filterOption
	Running, Lately                  string
	Notes                            []dashboardAlert
	Tiles                            []tile
	Since, Before                    string
	Usage                            chartView
	Errors                           chartView
	First, Total                     chartView
	Lists                            []rankingTable
	Fresh                            bool           // no call ever came
	Export                           []filterOption // what is shown: values under names
}

// A filterOption is an option of a filter.
type filterOption struct {
	Value, Label string
	Here         bool
}

// A dashboardAlert is something that needs attention.
type dashboardAlert struct {
	Level, Kind string // level is bad or warn
	Text, Link  string
}

// A tile is one number, and what it was in the period before.
type tile struct {
	Label, Value, More string
	Change, Before     string
	Level              string // good, bad or ""
}

// A chartView is a chart with its legend and the table of its numbers.
type chartView struct {
	ID, Title, Note string
	SVG             template.HTML // charts.go escapes what comes from outside
	Legend          []legendItem
	Head            []string
	Rows            [][]string
	Empty           bool
}

type legendItem struct{ Class, Name string }

// A rankingTable is a table of the largest, with a bar each.
type rankingTable struct {
	Title, Kind, Note string
	Rows              []rankingRow
	More              int64
}

type rankingRow struct {
	Name, Label, Link   string
	Bar                 template.HTML
	Value, Part         string
	Calls, Tokens, Cost string
}

// parseDashQuery reads what a dashboard is asked for.
func (ui *adminUI) parseDashQuery(r *pageRequest, query url.Values) (*dashQuery, error) {
	q := &dashQuery{now: r.now.UnixMilli(), groupBy: query.Get("by"), metric: cmp.Or(query.Get("measure"), "calls"),
		projectID: query.Get("project"), maxExactTokens: maxExactTokens, sampleSize: maxSampledCalls}
	for _, p := range dashPeriods(q.now) {
		if p.name == cmp.Or(query.Get("period"), "7d") {
			q.dashPeriod = p
		}
	}
	switch {
	case q.lengthMS == 0:
		return nil, badRequest("invalid_value", "period", "period must be 24h, 7d, 30d or 90d.")
	case q.metric != "calls" && q.metric != "tokens" && q.metric != "cost":
		return nil, badRequest("invalid_value", "measure", "measure must be calls, tokens or cost.")
	case q.groupBy != "" && q.groupBy != "project" && q.groupBy != "model":
		return nil, badRequest("invalid_value", "by", "by must be project or model.")
	}
	if q.projectID != "" {
		p, err := ui.store.projectByID(r.ctx, q.projectID)
		if err != nil {
			return nil, err
		}
		q.projectSeq, q.groupBy = p.seq, "model"
	}
	q.groupBy = cmp.Or(q.groupBy, "project")
	return q, nil
}

func (ui *adminUI) dashboardPage(r *pageRequest) (*pageResponse, error) {
	q, err := ui.parseDashQuery(r, r.query)
	if err != nil {
		return nil, err
	}
	d, err := ui.store.readDashboard(r.ctx, q)
	if err != nil {
		return nil, err
	}
	projects, err := ui.projectFilterOptions(r, q.projectID)
	if err != nil {
		return nil, err
	}
	v := &dashView{Projects: projects, Measures: filterOptions(q.metric, "calls", "Calls", "tokens", "Tokens", "cost", "Cost"),
		Bys: filterOptions(q.groupBy, "project", "Project", "model", "Model"), Tiles: d.tiles(),
		Since: formatDashboardTime(q.from), Before: formatDashboardTime(q.prevFrom) + " – " + formatDashboardTime(q.prevTo)}
	if d.total.calls+d.previous.calls == 0 && q.projectSeq == 0 {
		last, err := ui.store.lastRequestID(r.ctx)
		if err != nil {
			return nil, err
		}
		v.Fresh = last == 0
	}
	for _, p := range dashPeriods(q.now) {
		v.Periods = append(v.Periods, filterOption{p.name, p.title, p.name == q.name})
	}
	if q.projectSeq != 0 {
		v.Bys = nil // there is but one
	}
	v.Running, v.Lately = ui.liveNumbers(q, d)
	if v.Notes, err = ui.dashboardAlerts(r, q, d); err != nil {
		return nil, err
	}
	title := map[string]string{"calls": "Calls", "tokens": "Tokens", "cost": "Cost"}[q.metric]
	v.Usage = newChartView("usage", title+" by "+q.groupBy, d.usageChart(q, title+" over time, by "+q.groupBy))
	v.Errors = newChartView("errors", "Errors by whose they are", d.errorChart(q))
	v.First = newChartView("first", "Time to the first byte", d.latencyChart(q, "Time to the first byte over time", func(h *hourSum) *latencyHistogram { return &h.firstByteLatency }))
	v.Total = newChartView("total", "Time to the whole answer", d.latencyChart(q, "Time to the whole answer over time", func(h *hourSum) *latencyHistogram { return &h.totalLatency }))
	v.Lists = d.rankings(q)
	v.Export = filterOptions("", "period", q.name, "project", q.projectID, "by", q.groupBy, "measure", q.metric)
	return &pageResponse{template: "dashboard", title: "Dashboard", data: v}, nil
}

// usageCharts are the calls and the cost of a project over the last 30 days.
func (ui *adminUI) usageCharts(r *pageRequest, project string) (out []chartView, err error) {
	q, err := ui.parseDashQuery(r, url.Values{"period": {"30d"}, "project": {project}})
	if err != nil {
		return nil, err
	}
	d := &dashData{}
	if err := d.readUsage(r.ctx, ui.store, q); err != nil {
		return nil, err
	}
	for _, c := range filterOptions("", "calls", "Calls by model", "cost", "Cost by model") {
		q.metric = c.Value
		out = append(out, newChartView(c.Value, c.Label, d.usageChart(q, c.Label+" over 30 days")))
	}
	return out, nil
}

func filterOptions(here string, pairs ...string) (out []filterOption) {
	for i := 0; i < len(pairs); i += 2 {
		out = append(out, filterOption{pairs[i], pairs[i+1], pairs[i] == here})
	}
	return out
}

// maxFilterProjects bounds the projects that a filter offers; a list of all has its own
// page.
const maxFilterProjects = 1000

// projectFilterOptions is the projects to choose from, and all together.
func (ui *adminUI) projectFilterOptions(r *pageRequest, here string) ([]filterOption, error) {
	out := []filterOption{{"", "All projects", here == ""}}
	rows, err := ui.store.projectNames(r.ctx, maxFilterProjects)
	if err != nil {
		return nil, err
	}
	known := here == ""
	for _, p := range rows {
		out = append(out, filterOption{p.id, p.name, p.id == here})
		known = known || p.id == here
	}
	if !known {
		out = append(out, filterOption{here, here, true})
	}
	return out, nil
}

// liveNumbers are the running calls and those of the last minute.
func (ui *adminUI) liveNumbers(q *dashQuery, d *dashData) (running, lately string) {
	n := int64(0)
	for _, c := range ui.running.admittedCalls(ui.started) {
		if q.projectID == "" || c.ProjectID == q.projectID {
			n++
		}
	}
	if lately = groupDigits(d.lastMinuteCalls); d.lastMinuteCalls >= maxLastMinuteCalls {
		lately += "+"
	}
	return groupDigits(n), lately
}

// tiles are the totals of the period beside those of the one before.
func (d *dashData) tiles() []tile {
	now, was := &d.total, d.previous
	errorsOf := func(h *hourSum) (n int64) {
		for _, v := range h.errors {
			n += v
		}
		return n
	}
	part := func(h *hourSum) float64 {
		if h.calls == 0 {
			return 0
		}
		return 100 * float64(errorsOf(h)) / float64(h.calls)
	}
	count := func(label string, now, was int64, u chartUnit, more string) tile {
		return tile{Label: label, Value: u.format(float64(now)), More: more, Change: formatPercentChange(float64(now), float64(was)), Before: u.format(float64(was))}
	}
	money := count("Cost", now.cost, was.cost, unitMoney, "all calls have a price")
	if now.unpriced > 0 {
		money.More = pluralize(now.unpriced, "call", "calls") + " without a price"
	}
	failed := tile{Label: "Errors", Value: percent(part(now)), More: pluralize(errorsOf(now), "call", "calls"), Before: percent(part(was))}
	if was.calls > 0 && now.calls > 0 {
		failed.Change, failed.Level = formatPointChange(part(now)-part(was)), changeLevel(part(now), part(was), 0.5)
	}
	out := []tile{
		count("Calls", now.calls, was.calls, unitCount, pluralize(now.errors[1], "refused by a rule", "refused by rules")),
		count("Tokens", now.input+now.output, was.input+was.output, unitCount, groupDigits(now.input)+" in, "+groupDigits(now.output)+" out"),
		money, failed,
	}
	for _, l := range []struct {
		label    string
		now, was *latencyHistogram
	}{{"First byte", &now.firstByteLatency, &was.firstByteLatency}, {"Whole answer", &now.totalLatency, &was.totalLatency}} {
		half, slow, before := l.now.quantile(0.5), l.now.quantile(0.95), l.was.quantile(0.5)
		one := tile{Label: l.label, Value: unitMillis.format(half), More: "median; p95 " + unitMillis.format(slow), Before: unitMillis.format(before)}
		if half > 0 && before > 0 && !math.IsInf(half+before, 0) {
			one.Change, one.Level = formatPercentChange(half, before), changeLevel(half, before, before*0.1)
		}
		out = append(out, one)
	}
	for i := range out {
		if was.calls == 0 {
			out[i].Before = ""
		}
	}
	return out
}

// changeLevel says whether a number that should be small has changed by more than slack.
func changeLevel(now, was, slack float64) string {
	switch {
	case now > was+slack:
		return "bad"
	case now < was-slack:
		return "good"
	}
	return ""
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

// formatPointChange is a change of a percentage.
func formatPointChange(v float64) string {
	if v = math.Round(v*10) / 10; v == 0 {
		return "±0"
	}
	return formatSigned(v) + " points"
}

// formatPercentChange is a change in percent, "" where there was nothing to compare with.
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

// newChartView draws a chart and writes down its numbers, newest first.
func newChartView(id, title string, c *timeChart) chartView {
	v := chartView{ID: id, Title: title, SVG: template.HTML(c.svg()), Head: []string{"Time (UTC)"}, Empty: true}
	for _, s := range c.series {
		v.Legend = append(v.Legend, legendItem{s.class, s.name})
		v.Head = append(v.Head, s.name)
	}
	for i := c.steps - 1; i >= 0; i-- {
		row, any := []string{strings.TrimSuffix(c.stepLabel(i), " UTC")}, false
		for _, s := range c.series {
			value := s.values[i]
			row, any = append(row, c.unit.format(value)), any || value > 0
		}
		if any {
			v.Rows, v.Empty = append(v.Rows, row), false
		}
	}
	return v
}

// rankings are the largest projects, tokens, models and endpoints.
func (d *dashData) rankings(q *dashQuery) []rankingTable {
	whole := q.valueOf(usageTotals{d.total.calls, d.total.input + d.total.output, d.total.cost})
	tokens := q.ranking("Tokens", "token", d.tokens, whole)
	if d.sampledCalls > 0 {
		counted := 0.0
		for _, t := range d.tokens {
			counted += q.valueOf(t.usageTotals)
		}
		tokens = q.ranking("Tokens", "token", d.tokens, counted)
		tokens.Note = "Of the latest " + groupDigits(int64(d.sampledCalls)) + " calls on record: there are more tokens than can be added up at once."
	}
	out := []rankingTable{tokens, q.ranking("Models", "model", d.usageByModel(q), whole), q.ranking("Endpoints", "endpoint", d.endpoints, whole)}
	if q.projectSeq == 0 {
		out = append([]rankingTable{q.ranking("Projects", "project", d.projects, whole)}, out...)
	}
	return out
}

func (q *dashQuery) ranking(title, kind string, all []usageShare, whole float64) rankingTable {
	l := rankingTable{Title: title, Kind: kind, More: int64(max(0, len(all)-rankingSize))}
	for _, v := range all[:min(len(all), rankingSize)] {
		if q.valueOf(v.usageTotals) == 0 {
			break // all that follow have nothing either
		}
		row := rankingRow{Name: v.name, Label: v.label, Value: q.unit().format(q.valueOf(v.usageTotals)), Calls: groupDigits(v.calls), Tokens: groupDigits(v.tokens), Cost: formatMoney(v.cost)}
		most := q.valueOf(all[0].usageTotals)
		row.Bar = template.HTML(fractionBar(q.valueOf(v.usageTotals), most, "k1"))
		if whole > 0 {
			row.Part = percent(100 * q.valueOf(v.usageTotals) / whole)
		}
		switch kind {
		case "project":
			if v.label != "" {
				break // its page is gone
			}
			row.Link = "/admin/dashboard?" + url.Values{"period": {q.name}, "project": {v.id}, "measure": {q.metric}}.Encode()
		case "token":
			row.Link = "/admin/tokens/" + url.PathEscape(v.id)
		case "model":
			if v.id != "" {
				row.Link = "/admin/requests?" + url.Values{"model": {v.id}, "project": {q.projectID}}.Encode()
			}
		case "endpoint":
			row.Link = "/admin/requests?" + url.Values{"endpoint": {v.name}, "project": {q.projectID}}.Encode()
		}
		if row.Name == "" { // calls that did not come as far as an endpoint, or named no model
			row.Name, row.Link = "none", ""
		}
		l.Rows = append(l.Rows, row)
	}
	return l
}

// formatDashboardTime writes a time as the dashboard's texts have it.
func formatDashboardTime(ms int64) string { return time.UnixMilli(ms).UTC().Format("2 Jan 2006 15:04") }

// dashboardAlerts lists what needs attention, the worst first.
func (ui *adminUI) dashboardAlerts(r *pageRequest, q *dashQuery, d *dashData) ([]dashboardAlert, error) {
	notes := ui.systemAlerts(r)
	for _, k := range d.unhealthyUpstreams {
		if q.projectID == "" || k.projectID == q.projectID {
			notes = append(notes, dashboardAlert{Level: "bad", Kind: "Provider key", Text: keyAlertText(&k, r.now), Link: "/admin/projects/" + k.projectID})
		}
	}
	resting, err := ui.inactiveNearLimits(r, q, d)
	if err != nil {
		return nil, err
	}
	near := append(ui.registry.nearLimits(q.now, nearLimitFraction, maxLiveScanned), resting...)
	sortNearLimits(near)
	left := maxAlertsPerKind
	for _, n := range near {
		if q.projectID != "" && n.projectID != q.projectID {
			continue
		}
		if left--; left < 0 {
			break
		}
		note := dashboardAlert{Level: "warn", Kind: "Limit", Link: "/admin/projects/" + n.projectID,
			Text: percent(100*n.fraction) + " of " + n.limit + " is used: project " + n.project}
		if n.token != "" {
			note.Link, note.Text = "/admin/tokens/"+url.PathEscape(n.token), note.Text+", token "+n.name
		}
		if n.fraction >= 1 {
			note.Level = "bad"
		}
		notes = append(notes, note)
	}
	return append(notes, expiryAlerts(r, q, d)...), nil
}

// inactiveNearLimits returns the nearly spent limits of projects and tokens that are
// not live: of the largest in the period, for each takes some reading.
func (ui *adminUI) inactiveNearLimits(r *pageRequest, q *dashQuery, d *dashData) (out []nearLimit, err error) {
	projects := d.projects[:min(len(d.projects), maxIdleScanned)]
	if q.projectSeq != 0 {
		projects = []usageShare{{seq: q.projectSeq, id: q.projectID}}
	}
	for _, of := range projects {
		if ui.registry.liveProject(of.seq) != nil {
			continue
		}
		p, err := ui.store.projectByID(r.ctx, of.id)
		if errors.Is(err, errNotFound) { // deleted
			continue
		}
		if err != nil {
			return nil, err
		}
		counters, err := ui.limits.storedCounters(r.ctx, p.policy, true, p.seq, 0, q.now)
		if err != nil {
			return nil, err
		}
		out = append(out, filterNearLimits(counters, q.now, nearLimitFraction, nearLimit{project: p.name, projectID: p.id})...)
	}
	for _, v := range d.tokens[:min(len(d.tokens), maxIdleScanned)] {
		if ui.registry.liveToken(v.id) != nil {
			continue
		}
		t, err := ui.store.tokenByID(r.ctx, v.id)
		if err != nil {
			return nil, err
		}
		if t.revokedAt != nil || t.expiresAt != nil && *t.expiresAt <= q.now {
			continue
		}
		counters, err := ui.limits.storedCounters(r.ctx, t.policy, false, t.project, t.seq, q.now)
		if err != nil {
			return nil, err
		}
		out = append(out, filterNearLimits(counters, q.now, nearLimitFraction, nearLimit{token: t.id, name: t.name, project: v.label, projectID: t.projectID})...)
	}
	return out, nil
}

// systemAlerts is what keeps this program from taking or recording calls, or soon
// will.
func (ui *adminUI) systemAlerts(r *pageRequest) (notes []dashboardAlert) {
	if why := ui.databaseProblem(); why != "" {
		notes = append(notes, dashboardAlert{Level: "bad", Kind: "Database", Text: "The database file is gone (" + why + "). Calls are refused. Stop the program and look into it with llm-proxy doctor."})
	}
	if !ui.ledger.healthy() {
		notes = append(notes, dashboardAlert{Level: "bad", Kind: "Ledger", Text: "The ledger cannot be written, so calls are refused. Is the disk full?"})
	}
	if ui.diskUse == nil {
		return notes
	}
	if use, err := ui.diskUse(r.ctx); err == nil && use.available < lowDiskBytes {
		notes = append(notes, dashboardAlert{Level: "bad", Kind: "Disk", Text: formatBytes(use.available) + " are left on the database's disk, which holds " + formatBytes(use.databaseSize) + " of it."})
	}
	return notes
}

func keyAlertText(k *unhealthyUpstream, now time.Time) string {
	text := k.project + ", " + k.upstream + ": "
	switch k.state {
	case "quarantined":
		text += "the provider does not take this key"
	case "exhausted":
		text += "the account has no money or quota left"
	case "cooling":
		text += "the provider says that it gets too many calls"
	default:
		text += "its calls fail"
	}
	if k.reason != "" {
		text += " (" + k.reason + ")"
	}
	text += ", noticed " + relativeTime(time.UnixMilli(k.since).Sub(now)) + "."
	return text
}

// expiryAlerts names the tokens that expire within a week.
func expiryAlerts(r *pageRequest, q *dashQuery, d *dashData) (notes []dashboardAlert) {
	others := int64(0)
	for _, t := range d.expiring {
		switch {
		case q.projectID != "" && t.projectID != q.projectID:
		case len(notes) < maxAlertsPerKind:
			notes = append(notes, dashboardAlert{Level: "warn", Kind: "Token", Link: "/admin/tokens/" + url.PathEscape(t.id),
				Text: t.name + " of " + t.project + " expires " + relativeTime(time.UnixMilli(t.expiresAt).Sub(r.now)) + "."})
		default:
			others++
		}
	}
	if others > 0 {
		text := pluralize(others, "more token expires", "more tokens expire") + " within a week."
		if len(d.expiring) == maxExpiringTokens {
			text = "At least " + text
		}
		notes = append(notes, dashboardAlert{Level: "warn", Kind: "Token", Text: text, Link: "/admin/tokens"})
	}
	return notes
}
