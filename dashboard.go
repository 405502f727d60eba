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
	span, step       int64 // milliseconds
	from, to         int64 // whole steps; to is the end of the one that runs
	earlier, earlyTo int64 // as much of the period before as has passed of this one
	grain            string
}

// dashPeriods are the periods that can be chosen.
func dashPeriods(now int64) []dashPeriod {
	out := []dashPeriod{
		{name: "24h", title: "24 hours", span: dayMS, step: hourMS, grain: "hour"},
		{name: "7d", title: "7 days", span: 7 * dayMS, step: 6 * hourMS, grain: "hour"},
		{name: "30d", title: "30 days", span: 30 * dayMS, step: dayMS, grain: "day"},
		{name: "90d", title: "90 days", span: 90 * dayMS, step: dayMS, grain: "day"},
	}
	for i := range out {
		p := &out[i]
		p.to = now - now%p.step + p.step
		unit := int64(dayMS) // periods of days begin with one
		if p.span == dayMS {
			unit = hourMS
		}
		p.from = now - now%unit + unit - p.span
		hour := now - now%hourMS + hourMS
		p.earlier, p.earlyTo = p.from-p.span, hour-p.span
	}
	return out
}

func (p *dashPeriod) steps() int { return int((p.to - p.from) / p.step) }

// A dashQuery is what a dashboard is asked for.
type dashQuery struct {
	dashPeriod
	project    int64  // seq; 0: all
	projectID  string // "": all
	by         string // "project" or "model": what bars are made of
	measure    string // "calls", "tokens" or "cost"
	now        int64
	firstToken int // how many tokens are added up exactly; beyond, the latest calls are
	latest     int
}

// of returns the part of an amount that is asked for.
func (q *dashQuery) of(a amount) float64 {
	switch q.measure {
	case "tokens":
		return float64(a.tokens)
	case "cost":
		return float64(a.cost)
	}
	return float64(a.calls)
}

func (q *dashQuery) unit() unit {
	if q.measure == "cost" {
		return unitMoney
	}
	return unitCount
}

// A dashData is what was read for a dashboard.
type dashData struct {
	hours     []hourSum // by step
	total     hourSum
	before    *hourSum
	models    []step
	byProject []timeline
	projects  []share // all with calls, most first
	tokens    []share // most first
	sampled   int     // tokens are those of so many of the latest calls; 0: of all
	endpoints []share
	lately    int64 // calls in the last minute
	expiring  []tokenNote
	keys      []keyTrouble
}

// A timeline is a row of amounts, one for each step of the period.
type timeline struct {
	id    string // of a model: its name as it is on record
	name  string
	rest  bool // it stands for all that have no name of their own
	parts []amount
	total amount
}

const (
	seriesShown  = 6  // with names of their own; the rest is one
	sharesShown  = 10 // in lists of the largest
	latelyMost   = 100_000
	notesShown   = 5
	expiringMost = 1000
)

// readDashboard reads all that a dashboard shows, side by side.
func (s *store) readDashboard(ctx context.Context, q *dashQuery) (*dashData, error) {
	d := &dashData{}
	err := inParallel(
		func() (err error) {
			if err = d.readUsage(ctx, s, q); err != nil {
				return err
			}
			for i := range d.hours {
				d.total.merge(&d.hours[i])
			}
			return nil
		},
		func() (err error) {
			if d.before, err = s.hoursOf(ctx, q.project, q.earlier, q.earlyTo); err != nil {
				return err
			}
			d.endpoints, err = s.sharesByEndpoint(ctx, q.grain, q.project, q.from, q.to)
			q.largest(d.endpoints)
			return err
		},
		func() error { return d.readProjects(ctx, s, q) },
		func() (err error) {
			if err = d.readTokens(ctx, s, q); err != nil {
				return err
			}
			d.lately, err = s.countSince(ctx, q.project, firstID(time.UnixMilli(q.now-60_000)), latelyMost)
			return err
		},
		func() (err error) {
			if d.expiring, err = s.expiringTokens(ctx, q.now, q.now+7*dayMS, expiringMost); err != nil {
				return err
			}
			d.keys, err = s.keyTroubles(ctx, q.now, notesShown)
			return err
		},
	)
	return d, err
}

// inParallel runs jobs, two at the same time, and returns when all have ended: of
// the connections that read, calls keep the others.
func inParallel(jobs ...func() error) error {
	errs := make([]error, len(jobs))
	room := make(chan struct{}, readers/2)
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
	if d.hours, err = s.hourSlots(ctx, q.project, q.from, q.to, q.step); err != nil {
		return err
	}
	d.models, err = s.stepsByModel(ctx, q.grain, q.project, q.from, q.to)
	return err
}

// largest sorts shares by what is asked for, most first.
func (q *dashQuery) largest(all []share) {
	slices.SortStableFunc(all, func(a, b share) int {
		return cmp.Or(cmp.Compare(q.of(b.amount), q.of(a.amount)), cmp.Compare(b.calls, a.calls), cmp.Compare(a.name, b.name), cmp.Compare(a.id, b.id))
	})
}

// readProjects reads what each project has, and of the largest what each step has.
func (d *dashData) readProjects(ctx context.Context, s *store, q *dashQuery) (err error) {
	if q.project != 0 {
		return nil
	}
	if q.span == dayMS {
		d.projects, err = s.sharesByProjectHours(ctx, q.from, q.to)
	} else {
		d.projects, err = s.sharesByProjectDays(ctx, q.from, q.to)
	}
	if err != nil || q.by != "project" {
		q.largest(d.projects)
		return err
	}
	q.largest(d.projects)
	for _, p := range d.projects[:min(len(d.projects), seriesShown)] {
		read := s.stepsOfDays
		if q.grain == "hour" {
			read = s.stepsOfHours
		}
		steps, err := read(ctx, p.seq, q.from, q.to)
		if err != nil {
			return err
		}
		one := timeline{name: p.name, parts: make([]amount, q.steps())}
		for _, v := range steps {
			one.add(q.index(v.at), v.amount)
		}
		d.byProject = append(d.byProject, one)
	}
	return nil
}

func (q *dashQuery) index(at int64) int { return int((at - q.from) / q.step) }

func (v *timeline) add(i int, a amount) {
	if i >= 0 && i < len(v.parts) {
		v.parts[i].add(a)
		v.total.add(a)
	}
}

// readTokens reads what each token has: of all calls of the period if tokens are
// not too many to be added up, else of the latest calls.
func (d *dashData) readTokens(ctx context.Context, s *store, q *dashQuery) (err error) {
	grain := "token"
	if q.span == dayMS {
		grain = "hour"
	}
	d.tokens, err = s.sharesByToken(ctx, grain, q.projectID, q.from, q.to, q.firstToken)
	if errors.Is(err, errTooMany) {
		d.sampled = q.latest
		d.tokens, err = s.sharesOfLatest(ctx, q.project, firstID(time.UnixMilli(q.from)), firstID(time.UnixMilli(q.to)), q.latest)
	}
	q.largest(d.tokens)
	return err
}

// series returns what the bars over time are made of, the largest first and the
// rest as one.
func (d *dashData) series(q *dashQuery) []timeline {
	whole := timeline{parts: make([]amount, q.steps())}
	for i := range d.hours {
		h := &d.hours[i]
		whole.add(i, amount{h.calls, h.input + h.output, h.cost})
	}
	named := d.byProject
	if q.by == "model" {
		named = d.modelSeries(q)
	}
	rest := timeline{name: "all others", rest: true, parts: slices.Clone(whole.parts), total: whole.total}
	named = named[:min(len(named), seriesShown)]
	for _, s := range named {
		for i, a := range s.parts {
			rest.add(i, amount{-a.calls, -a.tokens, -a.cost})
		}
	}
	for i := range rest.parts { // calls that are settled while this is read
		a := &rest.parts[i]
		a.calls, a.tokens, a.cost = max(0, a.calls), max(0, a.tokens), max(0, a.cost)
	}
	if q.of(rest.total) > 0 {
		named = append(named, rest)
	}
	return named
}

// modelSeries returns what each model has of each step, the largest first.
func (d *dashData) modelSeries(q *dashQuery) []timeline {
	at := map[string]*timeline{}
	var all []*timeline
	for _, v := range d.models {
		one := at[v.model]
		if one == nil {
			one = &timeline{id: v.model, name: modelName(v.model), parts: make([]amount, q.steps())}
			at[v.model], all = one, append(all, one)
		}
		one.add(q.index(v.at), v.amount)
	}
	slices.SortStableFunc(all, func(a, b *timeline) int {
		return cmp.Or(cmp.Compare(q.of(b.total), q.of(a.total)), cmp.Compare(b.total.calls, a.total.calls), cmp.Compare(a.name, b.name))
	})
	out := make([]timeline, len(all))
	for i, s := range all {
		out[i] = *s
	}
	return out
}

// modelName is how a model is called where it has no name: see sumModel.
func modelName(model string) string { return cmp.Or(model, "no model, or unknown") }

// modelShares returns what each model has, the largest first.
func (d *dashData) modelShares(q *dashQuery) []share {
	var out []share
	for _, s := range d.modelSeries(q) {
		out = append(out, share{id: s.id, name: s.name, amount: s.total})
	}
	return out
}

// usageChart is the chart of what is asked for, over time.
func (d *dashData) usageChart(q *dashQuery, label string) *timeChart {
	c := &timeChart{label: label, unit: q.unit(), start: q.from, step: q.step, steps: q.steps()}
	for i, s := range d.series(q) {
		one := chartSeries{name: s.name, class: seriesClass(i, s.rest)}
		for _, a := range s.parts {
			one.values = append(one.values, q.of(a))
		}
		c.series = append(c.series, one)
	}
	return c
}

func seriesClass(i int, rest bool) string {
	if rest || i >= seriesShown {
		return "k0"
	}
	return "k" + string(rune('1'+i))
}

// errorChart is the chart of whose fault errors were.
func (d *dashData) errorChart(q *dashQuery) *timeChart {
	c := &timeChart{label: "Errors over time, by whose fault they were", start: q.from, step: q.step, steps: q.steps()}
	for k, class := range hourClasses() {
		one := chartSeries{name: string(class), class: seriesClass(k, false)}
		for i := range d.hours {
			one.values = append(one.values, float64(d.hours[i].errors[k]))
		}
		c.series = append(c.series, one)
	}
	return c
}

// latencyChart is the chart of how long something took, of half of the calls and
// of all but the slowest twentieth.
func (d *dashData) latencyChart(q *dashQuery, label string, of func(*hourSum) *latencies) *timeChart {
	c := &timeChart{label: label, unit: unitMillis, start: q.from, step: q.step, steps: q.steps(), lines: true}
	for k, at := range []struct {
		name string
		part float64
	}{{"p50", 0.5}, {"p95", 0.95}} {
		one := chartSeries{name: at.name, class: seriesClass(k, false)}
		for i := range d.hours {
			v := of(&d.hours[i]).quantile(at.part)
			if v < 0 {
				v = math.NaN()
			}
			one.values = append(one.values, v)
		}
		c.series = append(c.series, one)
	}
	return c
}
