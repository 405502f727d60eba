// This file is the dashboard of /admin: it reads what a period, a project and a metric ask for,
// compares it with the period before, and lists what needs attention. charts.go computes the
// charts, templates/dashboard.html writes the page.
package main

import (
	"cmp"
	"context"
	"errors"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	maxExactTokens     = 500     // tokens whose usage is added up exactly
	maxSampledCalls    = 10_000  // latest calls that are read where there are more tokens
	maxLiveScanned     = 5_000   // live projects, and live tokens, whose limits are checked
	maxIdleSample      = 2000    // latest calls that show which tokens have the most
	maxIdleScanned     = 20      // other projects, and other tokens, whose limits are checked
	maxLastMinuteCalls = 100_000 // that are counted
	maxExpiringTokens  = 1000    // that are read
	maxAlertsPerKind   = 5
	maxShownAlerts     = 3  // at once
	maxNamedSeries     = 8  // of a chart, as many as there are colors; the others are added up in one
	rankingSize        = 10 // rows
	nearLimitFraction  = 0.8
	lowDiskBytes       = 1 << 30
)

// A dashQuery is what a dashboard shows.
type dashQuery struct {
	dashPeriod
	projectSeq     int64  // 0: all projects
	projectID      string // "": all projects
	tokenID        string // of the page of a token; otherwise ""
	groupBy        string // what the bars consist of: "project", "model", "service_tier" or an attribute
	metric         string // "calls", "tokens" or "cost"
	now            int64
	maxExactTokens int  // with more tokens, only the latest calls are added up by token
	sampleSize     int  // how many of them
	allTokens      bool // all tokens of these calls are read, not only the largest
}

// valueOf returns the value of the query's metric.
func (q *dashQuery) valueOf(a usageTotals) float64 {
	switch q.metric {
	case "tokens":
		return float64(a.tokens)
	case "cost":
		return float64(a.cost)
	}
	return float64(a.calls)
}

func (q *dashQuery) unit() chartUnit {
	if q.metric == "cost" {
		return unitMoney
	}
	return unitCount
}

// usageQuery completes a query of the store with the period and the project.
func (q *dashQuery) usageQuery(u usageQuery) usageQuery {
	u.from, u.to, u.project, u.limit = q.from, q.to, cmp.Or(u.project, q.projectID), cmp.Or(u.limit, math.MaxInt32)
	return u
}

// sortLargestFirst sorts by the query's metric.
func (q *dashQuery) sortLargestFirst(shares []usageShare) {
	slices.SortStableFunc(shares, func(a, b usageShare) int {
		return cmp.Or(cmp.Compare(q.valueOf(b.usageTotals), q.valueOf(a.usageTotals)), cmp.Compare(b.calls, a.calls),
			cmp.Compare(a.name, b.name), cmp.Compare(a.id, b.id))
	})
}

// parseDashQuery reads the query of a dashboard from an address or a form.
func (ui *adminUI) parseDashQuery(r *pageRequest, values url.Values) (*dashQuery, error) {
	q := &dashQuery{now: r.now.UnixMilli(), groupBy: cmp.Or(values.Get("by"), "project"),
		metric: cmp.Or(values.Get("measure"), "calls"), projectID: values.Get("project"),
		maxExactTokens: maxExactTokens, sampleSize: maxSampledCalls}
	var err error
	if q.dashPeriod, err = parsePeriod(q.now, cmp.Or(values.Get("period"), "7d"), values.Get("from"),
		values.Get("to")); err != nil {
		return nil, err
	}
	err = checkChoice("measure", q.metric, "calls", "tokens", "cost")
	if err == nil && !isAttribute(q.groupBy) {
		err = checkChoice("by", q.groupBy, "project", "model", "service_tier", sessionAttribute, endUserAttribute,
			tagAttribute+"KEY")
	}
	if err != nil {
		return nil, err
	}
	if q.projectID != "" {
		p, err := ui.store.projectByID(r.ctx, q.projectID)
		if err != nil {
			return nil, err
		}
		if q.projectSeq = p.seq; q.groupBy == "project" {
			q.groupBy = "model"
		}
	}
	return q, nil
}

// A dashData is what the store has for a dashboard.
type dashData struct {
	steps              []hourSum
	total              hourSum
	previous           *hourSum
	modelPoints        []usageRow // by step and model
	tierPoints         []usageRow // by step and service tier
	valuePoints        []usageRow // by step and value, of the attribute that is grouped by; without the rest
	byProject          []usageSeries
	named              []string     // the values that charts consist of, in the order of their colors
	projects           []usageShare // all that made calls, largest first
	tokens             []usageShare // largest first
	sampledCalls       int          // tokens has only this many of the latest calls; 0: all calls
	sampledTokens      int64        // that made these calls; tokens has the largest of them
	sampledTotals      usageTotals  // of these calls
	endpoints          []usageShare
	attributes         []attributeShares
	lastMinuteCalls    int64
	expiring           []expiringToken
	unhealthyUpstreams []unhealthyUpstream
	cacheByProject     []usageRow // empty if no cache served a call
	// The projects and tokens with the most calls on recent days, whatever the period is.
	busyProjects, busyTokens []usageShare
}

// readDashboard reads everything that a dashboard shows, in parallel.
func (s *store) readDashboard(ctx context.Context, q *dashQuery) (*dashData, error) {
	d := &dashData{}
	err := inParallel(
		func() (err error) {
			d.steps, err = s.hourSumsByStep(ctx, q.projectSeq, q.from, q.to, q.stepMS)
			for i := range d.steps {
				d.total.merge(&d.steps[i])
			}
			return err
		},
		func() (err error) {
			d.previous, err = s.sumHours(ctx, q.projectSeq, q.prevFrom, q.prevTo)
			return err
		},
		func() error { return d.readLabels(ctx, s, q) },
		func() error { return d.readProjects(ctx, s, q) },
		func() error { return d.readAttributes(ctx, s, q) },
		func() (err error) {
			if err = d.readTokens(ctx, s, q); err != nil {
				return err
			}
			from, to := minIDAt(time.UnixMilli(q.now-60_000)), minIDAt(time.UnixMilli(q.now+1000))
			d.lastMinuteCalls, err = s.countRequests(ctx, q.projectSeq, from, to, maxLastMinuteCalls)
			return err
		},
		func() (err error) {
			if q.projectSeq == 0 {
				from, to := recentDaysOf(q.now)
				d.busyProjects, err = s.busiestProjects(ctx, from, to, maxIdleScanned)
			}
			return err
		},
		func() (err error) {
			if d.expiring, err = s.expiringTokens(ctx, expiringToken{expiresAt: q.now}, q.now+7*dayMS,
				maxExpiringTokens); err != nil {
				return err
			}
			d.unhealthyUpstreams, err = s.unhealthyUpstreams(ctx, q.now, maxAlertsPerKind)
			return err
		},
	)
	if sum := d.cacheSum(); err != nil || q.projectSeq != 0 || sum.hits == 0 && sum.cached == 0 {
		return d, err
	}
	byProject := usageQuery{interval: "total", hourly: !q.hasWholeDays(), byProject: true}
	d.cacheByProject, err = s.usage(ctx, q.usageQuery(byProject))
	return d, err
}

// inParallel runs jobs, two at a time, and returns when all have ended. Two at most, so that calls
// keep the other connections that read.
func inParallel(jobs ...func() error) error {
	errs := make([]error, len(jobs))
	slots := make(chan struct{}, readPoolSize/2)
	var wait sync.WaitGroup
	for i, job := range jobs {
		wait.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			errs[i] = job()
		})
	}
	wait.Wait()
	return errors.Join(errs...)
}

// readUsage reads the usage of each step, in total and by model.
func (d *dashData) readUsage(ctx context.Context, s *store, q *dashQuery) (err error) {
	if d.steps, err = s.hourSumsByStep(ctx, q.projectSeq, q.from, q.to, q.stepMS); err != nil {
		return err
	}
	d.modelPoints, err = s.usage(ctx, q.usageQuery(usageQuery{interval: q.grain, byModel: true}))
	return err
}

// readProjects reads the usage of each project, and by step that of the largest.
func (d *dashData) readProjects(ctx context.Context, s *store, q *dashQuery) (err error) {
	if q.projectSeq != 0 {
		return nil
	}
	d.projects, err = s.projectTotals(ctx, q.from, q.to, !q.hasWholeDays())
	q.sortLargestFirst(d.projects)
	if err != nil || q.groupBy != "project" {
		return err
	}
	for _, p := range d.projects[:min(len(d.projects), maxNamedSeries)] {
		points, err := s.usage(ctx, q.usageQuery(usageQuery{interval: q.grain, project: p.id, totalsOnly: true}))
		if err != nil {
			return err
		}
		series := usageSeries{id: p.id, name: p.name, values: make([]usageTotals, q.steps())}
		for _, v := range points {
			series.add(q.index(v.at), v.totals())
		}
		d.byProject = append(d.byProject, series)
	}
	return nil
}

// readTokens reads the usage of each token, in the period and on recent days: of all calls or, with too many tokens
// to add up, of the latest calls.
func (d *dashData) readTokens(ctx context.Context, s *store, q *dashQuery) error {
	byToken := q.usageQuery(usageQuery{hourly: !q.hasWholeDays(), byToken: true, limit: q.maxExactTokens})
	from, to := recentDaysOf(q.now)
	recent := byToken
	recent.from, recent.to, recent.hourly = from, to, false
	tokens, err := s.usageShares(ctx, byToken)
	if err == nil {
		d.tokens = tokens
		q.sortLargestFirst(d.tokens)
		d.busyTokens, err = s.usageShares(ctx, recent)
	}
	if !errors.Is(err, errTooManyRows) {
		slices.SortFunc(d.busyTokens, func(a, b usageShare) int { return cmp.Compare(b.calls, a.calls) })
		return err
	}
	sample := latestCalls{project: q.projectSeq, from: minIDAt(time.UnixMilli(q.from)),
		to: minIDAt(time.UnixMilli(q.to)), sampleSize: q.sampleSize, orderBy: q.metric, limit: rankingSize}
	if q.allTokens {
		sample.limit = q.sampleSize
	}
	d.sampledCalls = q.sampleSize
	if d.tokens, d.sampledTotals, d.sampledTokens, err = s.latestSharesByToken(ctx, sample); err != nil {
		return err
	}
	q.sortLargestFirst(d.tokens)
	sample.from, sample.to = minIDAt(time.UnixMilli(from)), minIDAt(time.UnixMilli(to))
	sample.sampleSize, sample.orderBy, sample.limit = min(q.sampleSize, maxIdleSample), "calls", maxIdleScanned
	d.busyTokens, _, _, err = s.latestSharesByToken(ctx, sample)
	return err
}

// recentDaysOf returns the range of the days on which limits that are not live are looked for.
func recentDaysOf(now int64) (from, to int64) {
	from = recentFrom(now)
	return from, from + recentDays*dayMS
}

// A dashView is the data of templates/dashboard.html.
type dashView struct {
	Periods, Projects, Groups, Metrics []option
	Period, Project, GroupBy, Metric   string
	Alerts                             []dashAlert
	ShownAlerts                        int // before those that are folded away
	Tiles                              []tile
	Since, PreviousFrom, PreviousTo    timestamp
	Until                              *timestamp  // nil: now
	From, To                           string      // of a range of days, as the form sends them
	IsCommon                           bool        // the period is one of the first
	Charts                             []chartView // usage, errors, first byte, total time
	Rankings                           []rankingTable
	Cache                              *cacheFigure // nil: the cache answered no call
	PromptCache                        *cacheFigure // nil: no provider had cached any input
	NoCalls                            bool         // there was never a call
}

// A dashAlert is something that needs attention. Level is bad or warn. Kind selects a sentence of
// templates/dashboard.html, which uses the other fields as far as it needs them.
type dashAlert struct {
	Level, Kind              string
	Project, ProjectID       string
	Token, TokenID           string
	Upstream, Reason, Limit  string
	UsedPercent              string // of the limit
	At                       timestamp
	Calls, Endpoint, Link    string // of a storm; Link leads to its calls
	Last                     timestamp
	Others                   int64 // tokens
	AtLeast                  bool  // there are more than Others
	FreeBytes, DatabaseBytes int64
}

// A rankingTable lists the largest, each with a bar.
type rankingTable struct {
	Title   string
	Rows    []rankingRow
	More    int64 // rows left out
	Sampled int64 // the rows count only this many of the latest calls; 0: all
	TooMany bool  // sums to add up

	Rest, RestShare string // what the rows that are left out have
}

type rankingRow struct {
	Name, Label, Link string
	Class             string // of the bar: the color of a series, if a chart of the page has one
	Bar               coordinate
	Value, Share      string
	Amounts           string // calls, tokens and cost
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
	v := &dashView{Period: q.name, Project: q.projectID, GroupBy: q.groupBy, Metric: q.metric,
		Metrics: options("calls", "Calls", "tokens", "Tokens", "cost", "Cost"),
		Groups:  d.groups(q),
		Since:   timestamp(q.from), PreviousFrom: timestamp(q.prevFrom), PreviousTo: timestamp(q.prevTo),
		Tiles: append(d.tiles(q), ui.runningTile(q, d)), Charts: d.charts(q), Rankings: d.rankings(q),
		Cache: d.cacheFigure(q, responseCacheKind()), PromptCache: d.cacheFigure(q, promptCacheKind())}
	if v.Projects, err = ui.projectOptions(r, q.projectID); err != nil {
		return nil, err
	}
	if d.total.calls+d.previous.calls == 0 && q.projectSeq == 0 {
		last, err := ui.store.lastRequestID(r.ctx)
		if err != nil {
			return nil, err
		}
		v.NoCalls = last == 0
	}
	v.Periods, v.From, v.To = periodOptions(q.now), q.fromDay, q.toDay
	v.IsCommon = slices.ContainsFunc(v.Periods[:commonPeriods], func(o option) bool { return o.Value == q.name })
	if q.to <= q.now {
		v.Until = new(timestamp(q.to))
	}
	v.Alerts, err = ui.dashAlerts(r, q, d)
	v.ShownAlerts = min(len(v.Alerts), maxShownAlerts)
	return showPage("dashboard", "Dashboard", v), err
}

// groups returns what the chart of usage can be grouped by.
func (d *dashData) groups(q *dashQuery) []option {
	list := options("project", "Project", "model", "Model", "service_tier", "Service tier")
	if q.projectSeq != 0 {
		list = list[1:]
	}
	for _, a := range d.attributes {
		list = append(list, option{a.attribute, attributeTitle(a.attribute)})
	}
	if !slices.ContainsFunc(list, func(o option) bool { return o.Value == q.groupBy }) {
		list = append(list, option{q.groupBy, attributeTitle(q.groupBy)})
	}
	return list
}

func totalErrors(h *hourSum) (n int64) {
	for _, v := range h.errors {
		n = addSat(n, v)
	}
	return n
}

// errorPercent returns how many percent of the calls failed.
func errorPercent(h *hourSum) float64 {
	if h.calls == 0 {
		return 0
	}
	return 100 * float64(totalErrors(h)) / float64(h.calls)
}

// tiles returns the totals of the period beside those of the period before.
func (d *dashData) tiles(q *dashQuery) []tile {
	now, was := &d.total, d.previous
	count := func(label string, u chartUnit, value func(*hourSum) int64, details ...tileDetail) tile {
		a, b := float64(value(now)), float64(value(was))
		return tile{Label: label, Value: u.figure(a), Details: details, Previous: new(u.figure(b)),
			Change: formatPercentChange(a, b),
			Course: d.course(q, func(h *hourSum) float64 { return float64(value(h)) })}
	}
	detail := func(n int64, text, link string) tileDetail {
		return tileDetail{unitCount.figure(float64(n)), text, link}
	}
	calls := count("Calls", unitCount, func(h *hourSum) int64 { return h.calls },
		detail(now.errors[1], "refused", q.callsURL("cause", string(errorClassPolicy))))
	if n := d.cacheSum().clientRetries; n > 0 {
		calls.Details = append(calls.Details, detail(n, "retries of clients", ""))
	}
	cost := count("Cost", unitMoney, func(h *hourSum) int64 { return h.cost })
	if cost.Details = []tileDetail{{Text: "all calls have a price"}}; now.unpriced > 0 {
		cost.Details = []tileDetail{detail(now.unpriced, "without a price", q.callsURL("cost", "none"))}
	}
	tiles := []tile{cost, calls,
		count("Tokens", unitCount, func(h *hourSum) int64 { return h.totals().tokens }, detail(now.input, "in", ""),
			detail(now.output, "out", "")),
		d.errorTile(q),
		d.latencyTile(q, "Time to first byte", func(h *hourSum) *latencyHistogram { return &h.firstByteLatency }),
		d.latencyTile(q, "Total time", func(h *hourSum) *latencyHistogram { return &h.totalLatency }),
	}
	for i := range tiles {
		if tiles[i].Link = cmp.Or(tiles[i].Link, q.callsURL("", "")); was.calls == 0 {
			tiles[i].Previous = nil
		}
	}
	return tiles
}

// runningTile counts the calls that run now.
func (ui *adminUI) runningTile(q *dashQuery, d *dashData) tile {
	running := 0
	for _, c := range ui.running.admittedCalls(ui.started) {
		if q.includes(c.ProjectID) {
			running++
		}
	}
	recent := tileDetail{Figure: unitCount.figure(float64(d.lastMinuteCalls)), Text: "in the last minute"}
	if d.lastMinuteCalls >= maxLastMinuteCalls {
		recent.Text = "or more " + recent.Text
	}
	return tile{Label: "Running now", Value: unitCount.figure(float64(running)), Link: "/admin/streams",
		Details: []tileDetail{recent}}
}

// rankings returns the largest projects, tokens, models and endpoints.
func (d *dashData) rankings(q *dashQuery) (tables []rankingTable) {
	whole := q.valueOf(d.total.totals())
	if q.projectSeq == 0 {
		tables = append(tables, d.ranking(q, "Projects", d.projects, whole))
	}
	ofTokens := whole
	if d.sampledCalls > 0 {
		ofTokens = q.valueOf(d.sampledTotals)
	}
	tokens := d.ranking(q, "Tokens", d.tokens, ofTokens)
	if d.sampledCalls > 0 {
		tokens.Sampled, tokens.More = int64(d.sampledCalls), max(0, d.sampledTokens-rankingSize)
	}
	tables = append(tables, tokens, d.ranking(q, "Models", d.usageByModel(q), whole),
		d.ranking(q, "Endpoints", d.endpoints, whole))
	return append(tables, d.attributeRankings(q, whole)...)
}

func (d *dashData) ranking(q *dashQuery, title string, shares []usageShare, whole float64) rankingTable {
	t, rest := rankingTable{Title: title, More: int64(max(0, len(shares)-rankingSize))}, whole
	for _, v := range shares[:min(len(shares), rankingSize)] {
		value := q.valueOf(v.usageTotals)
		if value == 0 {
			break // the others are zero too
		}
		rest -= value
		row := rankingRow{Name: v.name, Label: v.label, Link: q.rankingLink(title, &v), Value: q.unit().format(value),
			Amounts: pluralize(v.calls, "call", "calls") + ", " + pluralize(v.tokens, "token", "tokens") + ", " +
				formatMoney(v.cost),
			Class: d.barClass(q, title, v.id), Bar: barWidth(value, q.valueOf(shares[0].usageTotals))}
		if whole > 0 {
			row.Share = percent(100 * value / whole)
		}
		if row.Name == "" { // the call reached no endpoint, or named no model
			row.Name, row.Link = "none", ""
		}
		t.Rows = append(t.Rows, row)
	}
	if rest = max(0, rest); whole > 0 {
		t.Rest, t.RestShare = q.unit().format(rest), percent(100*rest/whole)
	}
	return t
}

// barClass returns the color of a row: that of its series if the charts consist of such values, otherwise a plain one.
func (d *dashData) barClass(q *dashQuery, title, id string) string {
	of := map[string]string{"project": "Projects", "model": "Models", "service_tier": "Service tiers"}
	if title == cmp.Or(of[q.groupBy], attributeTitle(q.groupBy)) {
		return d.seriesClass(id)
	}
	return "plain"
}

// callsURL returns the list of the calls that the dashboard covers and that match a filter; "" for all.
func (q *dashQuery) callsURL(filter, value string) string {
	values := url.Values{"period": {q.name}}
	if q.fromDay != "" {
		values = url.Values{"from": {timestamp(q.from).datetimeLocal()}, "to": {timestamp(q.to).datetimeLocal()}}
	}
	for name, value := range map[string]string{"project": q.projectID, "token": q.tokenID, filter: value} {
		if value != "" {
			values.Set(name, value)
		}
	}
	return "/admin/requests?" + values.Encode()
}

// seriesLink returns the page that an entry of a legend links to, "" if there is none.
func (q *dashQuery) seriesLink(s *usageSeries) string {
	switch {
	case s.id == "":
		return ""
	case q.groupBy == "project":
		return "/admin/dashboard?" + q.addTo(url.Values{"project": {s.id}, "measure": {q.metric}}).Encode()
	case q.groupBy == "model", q.groupBy == sessionAttribute, q.groupBy == endUserAttribute:
		return q.callsURL(q.groupBy, s.id)
	}
	if key, isTag := strings.CutPrefix(q.groupBy, tagAttribute); isTag {
		return q.callsURL("tag", key+"="+s.id)
	}
	return ""
}

// rankingLink returns the page that a row links to, "" if there is none.
func (q *dashQuery) rankingLink(title string, v *usageShare) string {
	switch {
	case title == "Projects" && v.label == "": // otherwise it was deleted
		return "/admin/dashboard?" + q.addTo(url.Values{"project": {v.id}, "measure": {q.metric}}).Encode()
	case title == "Tokens":
		return "/admin/tokens/" + url.PathEscape(v.id)
	case title == "Models" && v.id != "":
		return q.callsURL("model", v.id)
	case title == "Endpoints":
		return q.callsURL("endpoint", v.name)
	}
	return ""
}

// dashAlerts lists what needs attention, the most urgent first.
func (ui *adminUI) dashAlerts(r *pageRequest, q *dashQuery, d *dashData) ([]dashAlert, error) {
	alerts := ui.systemAlerts(r)
	for _, u := range d.unhealthyUpstreams {
		if q.includes(u.projectID) {
			alerts = append(alerts, dashAlert{Level: "bad", Kind: "upstream-" + u.state, Project: u.project,
				ProjectID: u.projectID, Upstream: u.upstream, Reason: u.reason, At: timestamp(u.since)})
		}
	}
	near, err := ui.idleNearLimits(r, q, d)
	if err != nil {
		return nil, err
	}
	near = append(ui.registry.nearLimits(q.now, nearLimitFraction, maxLiveScanned), near...)
	near = slices.DeleteFunc(near, func(n nearLimit) bool { return !q.includes(n.projectID) })
	sortNearLimits(near)
	for _, n := range near[:min(len(near), maxAlertsPerKind)] {
		alert := dashAlert{Level: "warn", Kind: "limit", Project: n.project, ProjectID: n.projectID,
			Token: n.name, TokenID: n.token, Limit: n.limit, UsedPercent: percent(100 * n.fraction)}
		if n.fraction >= 1 {
			alert.Level = "bad"
		}
		alerts = append(alerts, alert)
	}
	alerts = append(alerts, ui.stormAlerts(q)...)
	return append(alerts, d.expiryAlerts(q)...), nil
}

// includes reports whether the dashboard covers a project.
func (q *dashQuery) includes(projectID string) bool {
	return q.projectID == "" || q.projectID == projectID
}

// idleNearLimits returns the nearly spent limits of projects and tokens that are not live. Each takes a
// few reads, so only those with the most calls on recent days are checked.
func (ui *adminUI) idleNearLimits(r *pageRequest, q *dashQuery, d *dashData) (near []nearLimit, err error) {
	projects := d.busyProjects
	if q.projectSeq != 0 {
		projects = []usageShare{{seq: q.projectSeq, id: q.projectID}}
	}
	for _, v := range projects {
		if ui.registry.liveProject(v.seq) != nil {
			continue
		}
		p, err := ui.store.projectByID(r.ctx, v.id)
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
		owner := nearLimit{project: p.name, projectID: p.id}
		near = append(near, filterNearLimits(counters, q.now, nearLimitFraction, owner)...)
	}
	for _, v := range d.busyTokens[:min(len(d.busyTokens), maxIdleScanned)] {
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
		owner := nearLimit{token: t.id, name: t.name, project: v.label, projectID: t.projectID}
		near = append(near, filterNearLimits(counters, q.now, nearLimitFraction, owner)...)
	}
	return near, nil
}

// systemAlerts lists what keeps the proxy from taking or recording calls, or soon will.
func (ui *adminUI) systemAlerts(r *pageRequest) (alerts []dashAlert) {
	if problem := ui.databaseProblem(); problem != "" {
		alerts = append(alerts, dashAlert{Level: "bad", Kind: "database", Reason: problem})
	}
	if !ui.ledger.healthy() {
		alerts = append(alerts, dashAlert{Level: "bad", Kind: "ledger"})
	}
	if use, err := ui.diskUse(r.ctx); err == nil && use.available < lowDiskBytes {
		alerts = append(alerts, dashAlert{Level: "bad", Kind: "disk", FreeBytes: use.available,
			DatabaseBytes: use.databaseSize})
	}
	return alerts
}

// writeCSV writes the numbers of the dashboard: a line for each step of time, and one for each project,
// token, model and endpoint.
func (d *dashData) writeCSV(q *dashQuery, e *exportWriter) {
	head := []string{"kind", "id", "name", "at", "calls", "input_tokens", "output_tokens", "tokens", "cost"}
	for _, class := range errorColumnClasses() {
		head = append(head, string(class)+"_errors")
	}
	e.writeRow(append(head, "first_byte_p50_ms", "first_byte_p95_ms", "total_p50_ms", "total_p95_ms",
		"cache_hits", "saved", "saved_ms", "cached_tokens", "prompt_cache_saved")...)
	hitsByStep, hitsByModel := d.cacheHits(q)
	hitsByProject := map[string]usageSum{}
	for _, r := range d.cacheByProject {
		hitsByProject[r.projectID] = r.usageSum
	}
	for i := range d.steps {
		h := &d.steps[i]
		row := []string{"time", "", "", time.UnixMilli(q.from + int64(i)*q.stepMS).UTC().Format(time.RFC3339),
			formatInt(h.calls), formatInt(h.input), formatInt(h.output), formatInt(h.totals().tokens),
			formatNanos(h.cost)}
		for _, n := range h.errors {
			row = append(row, formatInt(n))
		}
		for _, l := range []*latencyHistogram{&h.firstByteLatency, &h.totalLatency} {
			row = append(row, quantileCell(l, 0.5), quantileCell(l, 0.95))
		}
		e.writeRow(append(row, cacheCells(&hitsByStep[i])...)...)
	}
	for _, list := range []struct {
		kind   string
		shares []usageShare
		hits   map[string]usageSum // nil: not known
	}{{"project", d.projects, hitsByProject}, {"token", d.tokens, nil}, {"model", d.usageByModel(q), hitsByModel},
		{"endpoint", d.endpoints, nil}} {
		for _, v := range list.shares {
			row := []string{list.kind, v.id, v.name, "", formatInt(v.calls), "", "", formatInt(v.tokens),
				formatNanos(v.cost)}
			row = append(row, make([]string, 4+4)...)
			if sum := list.hits[v.id]; list.hits != nil {
				row = append(row, cacheCells(&sum)...)
			} else {
				row = append(row, make([]string, 5)...)
			}
			e.writeRow(row...)
		}
	}
	d.writeAttributesCSV(q, e)
	if d.sampledCalls > 0 {
		note := "rows of kind token count only the latest " + strconv.Itoa(d.sampledCalls) + " calls"
		e.writeRow(append([]string{"note", "", note}, make([]string, 19)...)...)
	}
}

func quantileCell(l *latencyHistogram, q float64) string {
	v := l.quantile(q)
	if v < 0 || v > 1e9 { // no call, or in the unbounded bucket
		return ""
	}
	return strconv.FormatFloat(v, 'f', 1, 64)
}
