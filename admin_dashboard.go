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
	tokensExact   = 500    // tokens that are added up exactly
	tokensLatest  = 10_000 // calls that are looked at where there are more of them
	limitsLooked  = 5_000  // projects and tokens that are live, each
	restingLooked = 20     // projects and tokens that are not, each
	spentPart     = 0.8    // of a limit, from which on it is shown
	diskLow       = 1 << 30
)

// A dashView is what the dashboard shows.
type dashView struct {
	Periods, Projects, Bys, Measures []choice
	Running, Lately                  string
	Notes                            []dashNote
	Tiles                            []tile
	Since, Before                    string
	Usage                            chartView
	Errors                           chartView
	First, Total                     chartView
	Lists                            []shareList
	Fresh                            bool     // no call ever came
	Export                           []choice // what is shown: values under names
}

// A choice is an option of a filter.
type choice struct {
	Value, Label string
	Here         bool
}

// A dashNote is something that needs attention.
type dashNote struct {
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

// A shareList is a table of the largest, with a bar each.
type shareList struct {
	Title, Kind, Note string
	Rows              []shareRow
	More              int64
}

type shareRow struct {
	Name, Label, Link   string
	Bar                 template.HTML
	Value, Part         string
	Calls, Tokens, Cost string
}

// dashQuery reads what a dashboard is asked for.
func (ui *adminUI) dashQuery(r *pageRequest, query url.Values) (*dashQuery, error) {
	q := &dashQuery{now: r.now.UnixMilli(), by: query.Get("by"), measure: cmp.Or(query.Get("measure"), "calls"),
		projectID: query.Get("project"), firstToken: tokensExact, latest: tokensLatest}
	for _, p := range dashPeriods(q.now) {
		if p.name == cmp.Or(query.Get("period"), "7d") {
			q.dashPeriod = p
		}
	}
	switch {
	case q.span == 0:
		return nil, badRequest("invalid_value", "period", "period must be 24h, 7d, 30d or 90d.")
	case q.measure != "calls" && q.measure != "tokens" && q.measure != "cost":
		return nil, badRequest("invalid_value", "measure", "measure must be calls, tokens or cost.")
	case q.by != "" && q.by != "project" && q.by != "model":
		return nil, badRequest("invalid_value", "by", "by must be project or model.")
	}
	if q.projectID != "" {
		p, err := ui.store.projectByID(r.ctx, q.projectID)
		if err != nil {
			return nil, err
		}
		q.project, q.by = p.seq, "model"
	}
	q.by = cmp.Or(q.by, "project")
	return q, nil
}

func (ui *adminUI) dashboardPage(r *pageRequest) (*page, error) {
	q, err := ui.dashQuery(r, r.query)
	if err != nil {
		return nil, err
	}
	d, err := ui.store.readDashboard(r.ctx, q)
	if err != nil {
		return nil, err
	}
	projects, err := ui.projectChoices(r, q.projectID)
	if err != nil {
		return nil, err
	}
	v := &dashView{Projects: projects, Measures: choices(q.measure, "calls", "Calls", "tokens", "Tokens", "cost", "Cost"),
		Bys: choices(q.by, "project", "Project", "model", "Model"), Tiles: d.tiles(),
		Since: stamps(q.from), Before: stamps(q.earlier) + " – " + stamps(q.earlyTo)}
	if d.total.calls+d.before.calls == 0 && q.project == 0 {
		last, err := ui.store.lastRequest(r.ctx)
		if err != nil {
			return nil, err
		}
		v.Fresh = last == 0
	}
	for _, p := range dashPeriods(q.now) {
		v.Periods = append(v.Periods, choice{p.name, p.title, p.name == q.name})
	}
	if q.project != 0 {
		v.Bys = nil // there is but one
	}
	v.Running, v.Lately = ui.liveNumbers(q, d)
	if v.Notes, err = ui.dashNotes(r, q, d); err != nil {
		return nil, err
	}
	title := map[string]string{"calls": "Calls", "tokens": "Tokens", "cost": "Cost"}[q.measure]
	v.Usage = showChart("usage", title+" by "+q.by, d.usageChart(q, title+" over time, by "+q.by))
	v.Errors = showChart("errors", "Errors by whose they are", d.errorChart(q))
	v.First = showChart("first", "Time to the first byte", d.latencyChart(q, "Time to the first byte over time", func(h *hourSum) *latencies { return &h.first }))
	v.Total = showChart("total", "Time to the whole answer", d.latencyChart(q, "Time to the whole answer over time", func(h *hourSum) *latencies { return &h.total }))
	v.Lists = d.lists(q)
	v.Export = choices("", "period", q.name, "project", q.projectID, "by", q.by, "measure", q.measure)
	return &page{template: "dashboard", title: "Dashboard", data: v}, nil
}

// usageCharts are the calls and the cost of a project over the last 30 days.
func (ui *adminUI) usageCharts(r *pageRequest, project string) (out []chartView, err error) {
	q, err := ui.dashQuery(r, url.Values{"period": {"30d"}, "project": {project}})
	if err != nil {
		return nil, err
	}
	d := &dashData{}
	if err := d.readUsage(r.ctx, ui.store, q); err != nil {
		return nil, err
	}
	for _, c := range choices("", "calls", "Calls by model", "cost", "Cost by model") {
		q.measure = c.Value
		out = append(out, showChart(c.Value, c.Label, d.usageChart(q, c.Label+" over 30 days")))
	}
	return out, nil
}

func choices(here string, pairs ...string) (out []choice) {
	for i := 0; i < len(pairs); i += 2 {
		out = append(out, choice{pairs[i], pairs[i+1], pairs[i] == here})
	}
	return out
}

// maxChoices bounds the projects that a filter offers; a list of all has its own
// page.
const maxChoices = 1000

// projectChoices is the projects to choose from, and all together.
func (ui *adminUI) projectChoices(r *pageRequest, here string) ([]choice, error) {
	out := []choice{{"", "All projects", here == ""}}
	rows, err := ui.store.projectNames(r.ctx, maxChoices)
	if err != nil {
		return nil, err
	}
	known := here == ""
	for _, p := range rows {
		out = append(out, choice{p.id, p.name, p.id == here})
		known = known || p.id == here
	}
	if !known {
		out = append(out, choice{here, here, true})
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
	if lately = group(d.lately); d.lately >= latelyMost {
		lately += "+"
	}
	return group(n), lately
}

// tiles are the totals of the period beside those of the one before.
func (d *dashData) tiles() []tile {
	now, was := &d.total, d.before
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
	count := func(label string, now, was int64, u unit, more string) tile {
		return tile{Label: label, Value: u.full(float64(now)), More: more, Change: change(float64(now), float64(was)), Before: u.full(float64(was))}
	}
	money := count("Cost", now.cost, was.cost, unitMoney, "all calls have a price")
	if now.unpriced > 0 {
		money.More = plural(now.unpriced, "call", "calls") + " without a price"
	}
	failed := tile{Label: "Errors", Value: percent(part(now)), More: plural(errorsOf(now), "call", "calls"), Before: percent(part(was))}
	if was.calls > 0 && now.calls > 0 {
		failed.Change, failed.Level = points(part(now)-part(was)), worse(part(now), part(was), 0.5)
	}
	out := []tile{
		count("Calls", now.calls, was.calls, unitCount, plural(now.errors[1], "refused by a rule", "refused by rules")),
		count("Tokens", now.input+now.output, was.input+was.output, unitCount, group(now.input)+" in, "+group(now.output)+" out"),
		money, failed,
	}
	for _, l := range []struct {
		label    string
		now, was *latencies
	}{{"First byte", &now.first, &was.first}, {"Whole answer", &now.total, &was.total}} {
		half, slow, before := l.now.quantile(0.5), l.now.quantile(0.95), l.was.quantile(0.5)
		one := tile{Label: l.label, Value: unitMillis.full(half), More: "median; p95 " + unitMillis.full(slow), Before: unitMillis.full(before)}
		if half > 0 && before > 0 && !math.IsInf(half+before, 0) {
			one.Change, one.Level = change(half, before), worse(half, before, before*0.1)
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

// worse says whether a number that should be small has changed by more than slack.
func worse(now, was, slack float64) string {
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

func signed(v float64) string {
	if v < 0 {
		return "−" + decimal(-v)
	}
	return "+" + decimal(v)
}

// points is a change of a percentage.
func points(v float64) string {
	if v = math.Round(v*10) / 10; v == 0 {
		return "±0"
	}
	return signed(v) + " points"
}

// change is a change in percent, "" where there was nothing to compare with.
func change(now, was float64) string {
	if was <= 0 {
		return ""
	}
	switch v := math.Round(100 * (now - was) / was); {
	case v == 0:
		return "±0%"
	case v > 999:
		return "×" + decimal(math.Round(now/was))
	default:
		return signed(v) + "%"
	}
}

// showChart draws a chart and writes down its numbers, newest first.
func showChart(id, title string, c *timeChart) chartView {
	v := chartView{ID: id, Title: title, SVG: template.HTML(c.svg()), Head: []string{"Time (UTC)"}, Empty: true}
	for _, s := range c.series {
		v.Legend = append(v.Legend, legendItem{s.class, s.name})
		v.Head = append(v.Head, s.name)
	}
	for i := c.steps - 1; i >= 0; i-- {
		row, any := []string{strings.TrimSuffix(c.timeOf(i), " UTC")}, false
		for _, s := range c.series {
			value := s.values[i]
			row, any = append(row, c.unit.full(value)), any || value > 0
		}
		if any {
			v.Rows, v.Empty = append(v.Rows, row), false
		}
	}
	return v
}

// lists are the largest projects, tokens, models and endpoints.
func (d *dashData) lists(q *dashQuery) []shareList {
	whole := q.of(amount{d.total.calls, d.total.input + d.total.output, d.total.cost})
	tokens := q.list("Tokens", "token", d.tokens, whole)
	if d.sampled > 0 {
		counted := 0.0
		for _, t := range d.tokens {
			counted += q.of(t.amount)
		}
		tokens = q.list("Tokens", "token", d.tokens, counted)
		tokens.Note = "Of the latest " + group(int64(d.sampled)) + " calls on record: there are more tokens than can be added up at once."
	}
	out := []shareList{tokens, q.list("Models", "model", d.modelShares(q), whole), q.list("Endpoints", "endpoint", d.endpoints, whole)}
	if q.project == 0 {
		out = append([]shareList{q.list("Projects", "project", d.projects, whole)}, out...)
	}
	return out
}

func (q *dashQuery) list(title, kind string, all []share, whole float64) shareList {
	l := shareList{Title: title, Kind: kind, More: int64(max(0, len(all)-sharesShown))}
	for _, v := range all[:min(len(all), sharesShown)] {
		if q.of(v.amount) == 0 {
			break // all that follow have nothing either
		}
		row := shareRow{Name: v.name, Label: v.label, Value: q.unit().full(q.of(v.amount)), Calls: group(v.calls), Tokens: group(v.tokens), Cost: showDollars(v.cost)}
		most := q.of(all[0].amount)
		row.Bar = template.HTML(partBar(q.of(v.amount), most, "k1"))
		if whole > 0 {
			row.Part = percent(100 * q.of(v.amount) / whole)
		}
		switch kind {
		case "project":
			if v.label != "" {
				break // its page is gone
			}
			row.Link = "/admin/dashboard?" + url.Values{"period": {q.name}, "project": {v.id}, "measure": {q.measure}}.Encode()
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

// stamps writes a time as the dashboard's texts have it.
func stamps(ms int64) string { return time.UnixMilli(ms).UTC().Format("2 Jan 2006 15:04") }

// dashNotes lists what needs attention, the worst first.
func (ui *adminUI) dashNotes(r *pageRequest, q *dashQuery, d *dashData) ([]dashNote, error) {
	notes := ui.ownTrouble(r)
	for _, k := range d.keys {
		if q.projectID == "" || k.projectID == q.projectID {
			notes = append(notes, dashNote{Level: "bad", Kind: "Provider key", Text: keyNote(&k, r.now), Link: "/admin/projects/" + k.projectID})
		}
	}
	resting, err := ui.restingLimits(r, q, d)
	if err != nil {
		return nil, err
	}
	near := append(ui.registry.nearLimits(q.now, spentPart, limitsLooked), resting...)
	fullest(near)
	left := notesShown
	for _, n := range near {
		if q.projectID != "" && n.projectID != q.projectID {
			continue
		}
		if left--; left < 0 {
			break
		}
		note := dashNote{Level: "warn", Kind: "Limit", Link: "/admin/projects/" + n.projectID,
			Text: percent(100*n.part) + " of " + n.limit + " is used: project " + n.project}
		if n.token != "" {
			note.Link, note.Text = "/admin/tokens/"+url.PathEscape(n.token), note.Text+", token "+n.name
		}
		if n.part >= 1 {
			note.Level = "bad"
		}
		notes = append(notes, note)
	}
	return append(notes, expiryNotes(r, q, d)...), nil
}

// restingLimits returns the nearly spent limits of projects and tokens that are
// not live: of the largest in the period, for each takes some reading.
func (ui *adminUI) restingLimits(r *pageRequest, q *dashQuery, d *dashData) (out []nearLimit, err error) {
	projects := d.projects[:min(len(d.projects), restingLooked)]
	if q.project != 0 {
		projects = []share{{seq: q.project, id: q.projectID}}
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
		out = append(out, nearOf(counters, q.now, spentPart, nearLimit{project: p.name, projectID: p.id})...)
	}
	for _, v := range d.tokens[:min(len(d.tokens), restingLooked)] {
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
		out = append(out, nearOf(counters, q.now, spentPart, nearLimit{token: t.id, name: t.name, project: v.label, projectID: t.projectID})...)
	}
	return out, nil
}

// ownTrouble is what keeps this program from taking or recording calls, or soon
// will.
func (ui *adminUI) ownTrouble(r *pageRequest) (notes []dashNote) {
	if why := ui.gone(); why != "" {
		notes = append(notes, dashNote{Level: "bad", Kind: "Database", Text: "The database file is gone (" + why + "). Calls are refused. Stop the program and look into it with llm-proxy doctor."})
	}
	if !ui.ledger.healthy() {
		notes = append(notes, dashNote{Level: "bad", Kind: "Ledger", Text: "The ledger cannot be written, so calls are refused. Is the disk full?"})
	}
	if ui.diskUse == nil {
		return notes
	}
	if use, err := ui.diskUse(r.ctx); err == nil && use.left < diskLow {
		notes = append(notes, dashNote{Level: "bad", Kind: "Disk", Text: showBytes(use.left) + " are left on the database's disk, which holds " + showBytes(use.file) + " of it."})
	}
	return notes
}

func keyNote(k *keyTrouble, now time.Time) string {
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
	text += ", noticed " + relative(time.UnixMilli(k.since).Sub(now)) + "."
	return text
}

// expiryNotes names the tokens that expire within a week.
func expiryNotes(r *pageRequest, q *dashQuery, d *dashData) (notes []dashNote) {
	others := int64(0)
	for _, t := range d.expiring {
		switch {
		case q.projectID != "" && t.projectID != q.projectID:
		case len(notes) < notesShown:
			notes = append(notes, dashNote{Level: "warn", Kind: "Token", Link: "/admin/tokens/" + url.PathEscape(t.id),
				Text: t.name + " of " + t.project + " expires " + relative(time.UnixMilli(t.at).Sub(r.now)) + "."})
		default:
			others++
		}
	}
	if others > 0 {
		text := plural(others, "more token expires", "more tokens expire") + " within a week."
		if len(d.expiring) == expiringMost {
			text = "At least " + text
		}
		notes = append(notes, dashNote{Level: "warn", Kind: "Token", Text: text, Link: "/admin/tokens"})
	}
	return notes
}
