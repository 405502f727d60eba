// This room puts the dashboard's numbers together: which times a period has and
// the one before it, what of it is read from the store, and which charts are made
// of that. It draws nothing itself (charts.go) and writes no HTML
// (admin_dashboard.go).
package main

import (
	"cmp"
	"context"
	"errors"
	"math"
	"slices"
	"sync"
	"time"
)

// A dashPeriod is what a dashboard is about: steps from from on up to now, and
// the time as long before.
type dashPeriod struct {
	name, title      string
	lengthMS, stepMS int64 // milliseconds
	from, to         int64 // whole steps; to is the end of the one that runs
	prevFrom, prevTo int64 // as much of the period before as has passed of this one
	grain            string
}

// dashPeriods are the periods that can be chosen.
func dashPeriods(now int64) []dashPeriod {
	out := []dashPeriod{
		{name: "24h", title: "24 hours", lengthMS: dayMS, stepMS: hourMS, grain: "hour"},
		{name: "7d", title: "7 days", lengthMS: 7 * dayMS, stepMS: 6 * hourMS, grain: "hour"},
		{name: "30d", title: "30 days", lengthMS: 30 * dayMS, stepMS: dayMS, grain: "day"},
		{name: "90d", title: "90 days", lengthMS: 90 * dayMS, stepMS: dayMS, grain: "day"},
	}
	for i := range out {
		p := &out[i]
		p.to = now - now%p.stepMS + p.stepMS
		unit := int64(dayMS) // periods of days begin with one
		if p.lengthMS == dayMS {
			unit = hourMS
		}
		p.from = now - now%unit + unit - p.lengthMS
		hour := now - now%hourMS + hourMS
		p.prevFrom, p.prevTo = p.from-p.lengthMS, hour-p.lengthMS
	}
	return out
}

func (p *dashPeriod) steps() int { return int((p.to - p.from) / p.stepMS) }

// A dashQuery is what a dashboard is asked for.
type dashQuery struct {
	dashPeriod
	projectSeq     int64  // seq; 0: all
	projectID      string // "": all
	groupBy        string // "project" or "model": what bars are made of
	metric         string // "calls", "tokens" or "cost"
	now            int64
	maxExactTokens int // how many tokens are added up exactly; beyond, the latest calls are
	sampleSize     int
}

// valueOf returns the part of an amount that is asked for.
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

// A dashData is what was read for a dashboard.
type dashData struct {
	steps              []hourSum // by step
	total              hourSum
	previous           *hourSum
	modelPoints        []usageRow // by step and model
	byProject          []usageSeries
	projects           []usageShare // all with calls, most first
	tokens             []usageShare // most first
	sampledCalls       int          // tokens are those of so many of the latest calls; 0: of all
	endpoints          []usageShare
	lastMinuteCalls    int64 // calls in the last minute
	expiring           []expiringToken
	unhealthyUpstreams []unhealthyUpstream
}

// An usageSeries is a row of amounts, one for each step of the period.
type usageSeries struct {
	id      string // of a model: its name as it is on record
	name    string
	isOther bool // it stands for all that have no name of their own
	values  []usageTotals
	total   usageTotals
}

const (
	maxNamedSeries     = 6  // with names of their own; the rest is one
	rankingSize        = 10 // in lists of the largest
	maxLastMinuteCalls = 100_000
	maxAlertsPerKind   = 5
	maxExpiringTokens  = 1000
)

// readDashboard reads all that a dashboard shows, side by side.
func (s *store) readDashboard(ctx context.Context, q *dashQuery) (*dashData, error) {
	d := &dashData{}
	err := inParallel(
		func() (err error) {
			if err = d.readUsage(ctx, s, q); err != nil {
				return err
			}
			for i := range d.steps {
				d.total.merge(&d.steps[i])
			}
			return nil
		},
		func() (err error) {
			if d.previous, err = s.sumHours(ctx, q.projectSeq, q.prevFrom, q.prevTo); err != nil {
				return err
			}
			d.endpoints, err = s.usageShares(ctx, usageQuery{project: q.projectID, hourly: q.grain == "hour", byEndpoint: true,
				from: q.from, to: q.to, limit: 1 << 30})
			q.sortLargestFirst(d.endpoints)
			return err
		},
		func() error { return d.readProjects(ctx, s, q) },
		func() (err error) {
			if err = d.readTokens(ctx, s, q); err != nil {
				return err
			}
			d.lastMinuteCalls, err = s.countRequestsSince(ctx, q.projectSeq, minIDAt(time.UnixMilli(q.now-60_000)), maxLastMinuteCalls)
			return err
		},
		func() (err error) {
			if d.expiring, err = s.expiringTokens(ctx, q.now, q.now+7*dayMS, maxExpiringTokens); err != nil {
				return err
			}
			d.unhealthyUpstreams, err = s.unhealthyUpstreams(ctx, q.now, maxAlertsPerKind)
			return err
		},
	)
	return d, err
}

// inParallel runs jobs, two at the same time, and returns when all have ended: of
// the connections that read, calls keep the others.
func inParallel(jobs ...func() error) error {
	errs := make([]error, len(jobs))
	room := make(chan struct{}, readPoolSize/2)
	var wait sync.WaitGroup
	for i, job := range jobs {
		wait.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			errs[i] = job()
		})
	}
	wait.Wait()
	return errors.Join(errs...)
}

// readUsage reads what each step of the period has, as a whole and by model.
func (d *dashData) readUsage(ctx context.Context, s *store, q *dashQuery) (err error) {
	if d.steps, err = s.hourSumsByStep(ctx, q.projectSeq, q.from, q.to, q.stepMS); err != nil {
		return err
	}
	d.modelPoints, err = s.usage(ctx, usageQuery{interval: q.grain, project: q.projectID, byModel: true, from: q.from, to: q.to, limit: 1 << 30})
	return err
}

// sortLargestFirst sorts shares by what is asked for, most first.
func (q *dashQuery) sortLargestFirst(all []usageShare) {
	slices.SortStableFunc(all, func(a, b usageShare) int {
		return cmp.Or(cmp.Compare(q.valueOf(b.usageTotals), q.valueOf(a.usageTotals)), cmp.Compare(b.calls, a.calls), cmp.Compare(a.name, b.name), cmp.Compare(a.id, b.id))
	})
}

// readProjects reads what each project has, and of the largest what each step has.
func (d *dashData) readProjects(ctx context.Context, s *store, q *dashQuery) (err error) {
	if q.projectSeq != 0 {
		return nil
	}
	d.projects, err = s.usageShares(ctx, usageQuery{hourly: q.lengthMS == dayMS, byProject: true, from: q.from, to: q.to, limit: 1 << 30})
	if err != nil || q.groupBy != "project" {
		q.sortLargestFirst(d.projects)
		return err
	}
	q.sortLargestFirst(d.projects)
	for _, p := range d.projects[:min(len(d.projects), maxNamedSeries)] {
		steps, err := s.usage(ctx, usageQuery{interval: q.grain, project: p.id, totalsOnly: true, from: q.from, to: q.to, limit: 1 << 30})
		if err != nil {
			return err
		}
		one := usageSeries{name: p.name, values: make([]usageTotals, q.steps())}
		for _, v := range steps {
			one.add(q.index(v.at), v.totals())
		}
		d.byProject = append(d.byProject, one)
	}
	return nil
}

func (q *dashQuery) index(at int64) int { return int((at - q.from) / q.stepMS) }

func (v *usageSeries) add(i int, a usageTotals) {
	if i >= 0 && i < len(v.values) {
		v.values[i].add(a)
		v.total.add(a)
	}
}

// readTokens reads what each token has: of all calls of the period if tokens are
// not too many to be added up, else of the latest calls.
func (d *dashData) readTokens(ctx context.Context, s *store, q *dashQuery) (err error) {
	d.tokens, err = s.usageShares(ctx, usageQuery{project: q.projectID, hourly: q.lengthMS == dayMS, byToken: true,
		from: q.from, to: q.to, limit: q.maxExactTokens})
	if errors.Is(err, errTooManyRows) {
		d.sampledCalls = q.sampleSize
		d.tokens, err = s.latestSharesByToken(ctx, q.projectSeq, minIDAt(time.UnixMilli(q.from)), minIDAt(time.UnixMilli(q.to)), q.sampleSize)
	}
	q.sortLargestFirst(d.tokens)
	return err
}

// topSeries returns what the bars over time are made of, the largest first and the
// rest as one.
func (d *dashData) topSeries(q *dashQuery) []usageSeries {
	whole := usageSeries{values: make([]usageTotals, q.steps())}
	for i := range d.steps {
		h := &d.steps[i]
		whole.add(i, usageTotals{h.calls, h.input + h.output, h.cost})
	}
	named := d.byProject
	if q.groupBy == "model" {
		named = d.modelSeries(q)
	}
	rest := usageSeries{name: "all others", isOther: true, values: slices.Clone(whole.values), total: whole.total}
	named = named[:min(len(named), maxNamedSeries)]
	for _, s := range named {
		for i, a := range s.values {
			rest.add(i, usageTotals{-a.calls, -a.tokens, -a.cost})
		}
	}
	for i := range rest.values { // calls that are settled while this is read
		a := &rest.values[i]
		a.calls, a.tokens, a.cost = max(0, a.calls), max(0, a.tokens), max(0, a.cost)
	}
	if q.valueOf(rest.total) > 0 {
		named = append(named, rest)
	}
	return named
}

// modelSeries returns what each model has of each step, the largest first.
func (d *dashData) modelSeries(q *dashQuery) []usageSeries {
	at := map[string]*usageSeries{}
	var all []*usageSeries
	for _, v := range d.modelPoints {
		one := at[v.model]
		if one == nil {
			one = &usageSeries{id: v.model, name: modelLabel(v.model), values: make([]usageTotals, q.steps())}
			at[v.model], all = one, append(all, one)
		}
		one.add(q.index(v.at), v.totals())
	}
	slices.SortStableFunc(all, func(a, b *usageSeries) int {
		return cmp.Or(cmp.Compare(q.valueOf(b.total), q.valueOf(a.total)), cmp.Compare(b.total.calls, a.total.calls), cmp.Compare(a.name, b.name))
	})
	out := make([]usageSeries, len(all))
	for i, s := range all {
		out[i] = *s
	}
	return out
}

// modelLabel is how a model is called where it has no name: see sumModel.
func modelLabel(model string) string { return cmp.Or(model, "no model, or unknown") }

// usageByModel returns what each model has, the largest first.
func (d *dashData) usageByModel(q *dashQuery) []usageShare {
	var out []usageShare
	for _, s := range d.modelSeries(q) {
		out = append(out, usageShare{id: s.id, name: s.name, usageTotals: s.total})
	}
	return out
}

// usageChart is the chart of what is asked for, over time.
func (d *dashData) usageChart(q *dashQuery, label string) *timeChart {
	c := &timeChart{label: label, unit: q.unit(), start: q.from, stepMS: q.stepMS, steps: q.steps()}
	for i, s := range d.topSeries(q) {
		one := chartSeries{name: s.name, class: seriesClass(i, s.isOther)}
		for _, a := range s.values {
			one.values = append(one.values, q.valueOf(a))
		}
		c.series = append(c.series, one)
	}
	return c
}

func seriesClass(i int, rest bool) string {
	if rest || i >= maxNamedSeries {
		return "k0"
	}
	return "k" + string(rune('1'+i))
}

// errorChart is the chart of whose fault errors were.
func (d *dashData) errorChart(q *dashQuery) *timeChart {
	c := &timeChart{label: "Errors over time, by whose fault they were", start: q.from, stepMS: q.stepMS, steps: q.steps()}
	for k, class := range errorColumnClasses() {
		one := chartSeries{name: string(class), class: seriesClass(k, false)}
		for i := range d.steps {
			one.values = append(one.values, float64(d.steps[i].errors[k]))
		}
		c.series = append(c.series, one)
	}
	return c
}

// latencyChart is the chart of how long something took, of half of the calls and
// of all but the slowest twentieth.
func (d *dashData) latencyChart(q *dashQuery, label string, of func(*hourSum) *latencyHistogram) *timeChart {
	c := &timeChart{label: label, unit: unitMillis, start: q.from, stepMS: q.stepMS, steps: q.steps(), lineChart: true}
	for k, at := range []struct {
		name string
		part float64
	}{{"p50", 0.5}, {"p95", 0.95}} {
		one := chartSeries{name: at.name, class: seriesClass(k, false)}
		for i := range d.steps {
			v := of(&d.steps[i]).quantile(at.part)
			if v < 0 {
				v = math.NaN()
			}
			one.values = append(one.values, v)
		}
		c.series = append(c.series, one)
	}
	return c
}
