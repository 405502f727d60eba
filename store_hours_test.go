// Tests of what the dashboard reads: hours of projects that agree with the
// ledger, quantiles, and what an older database brings along.
package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"
)

// TestHoursAgree: the hours of a project and those of all hold what its calls
// add up to, and only those old enough are let go.
func TestHoursAgree(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	random := rand.New(rand.NewPCG(7, 7))
	for i := range 200 {
		at := u.now.Add(-time.Duration(random.Int64N(int64(50 * time.Hour))))
		r := *u.rows[random.IntN(len(u.rows))]
		r.id, r.started = firstID(at)+int64(1000+i), at.UnixMilli()
		r.firstByteUS = random.Int64N(3e6)
		r.totalUS = r.firstByteUS + random.Int64N(200e6)
		u.rows = append(u.rows, &r)
		u.in.ledger.record(&r, i%2 == 0) // on record or not: the sums have all
	}
	u.settle()
	now := u.now.UnixMilli()
	from, to := now-30*hourMS-now%hourMS, now-3*hourMS-now%hourMS
	check := func(project int64) {
		t.Helper()
		want := &hourSum{}
		for _, r := range u.rows {
			if (project == 0 || r.project == project) && r.started >= from && r.started < to {
				want.add(r)
			}
		}
		got, err := u.in.store.hoursOf(t.Context(), project, from, to)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("project %d: %+v, want %+v, %v", project, got, want, err)
		}
		if n := want.first.count(); n == 0 || n != want.total.count() || want.errors[0] == 0 {
			t.Errorf("project %d: the test proves nothing: %+v", project, want)
		}
	}
	check(0)
	for seq := range u.projects {
		check(seq)
	}
	for n := int64(1); n > 0; {
		var err error
		if n, err = u.in.store.forgetHours(t.Context(), from, 1); err != nil {
			t.Fatal(err)
		}
	}
	check(0)
	if h, err := u.in.store.hoursOf(t.Context(), 0, 0, from); err != nil || h.calls != 0 {
		t.Errorf("hours from before are left: %+v, %v", h, err)
	}
}

// TestHoursMigrated: an older database's sums are added up for all projects, and
// by hour for the dashboard.
func TestHoursMigrated(t *testing.T) {
	t.Parallel()
	const day = 20_000 * dayMS
	var sums []string
	for project := 1; project <= 2; project++ {
		for i, o := range []outcome{outcomeOK, outcomeRefused, outcomeClientGone, outcomeUpstreamError, outcomeLost} {
			for _, grain := range []string{"hour", "day"} {
				sums = append(sums, fmt.Sprintf(`
					INSERT INTO usage_sums (grain, project, token, at, model, endpoint, outcome, calls, input_tokens, cached_tokens, output_tokens,
						reasoning_tokens, cost, unpriced_calls, estimated_calls, total_us)
					VALUES ('%s', %d, 0, %d, 'm', 'e', '%s', %d, 100, 0, 10, 0, 5, 1, 0, 9)`, grain, project, int64(day), string(o), i+1))
			}
		}
	}
	st := mustOpen(t, oldDatabase(t, "schema/004_project_hours.sql", sums...))
	for project, times := range map[int64]int64{0: 2, 1: 1, 2: 1} {
		want := hourSum{calls: 15 * times, input: 500 * times, output: 50 * times, cost: 25 * times, unpriced: 5 * times, errors: [4]int64{3 * times, 2 * times, 4 * times, 5 * times}}
		if h, err := st.hoursOf(t.Context(), project, day, day+hourMS); err != nil || *h != want {
			t.Errorf("project %d: %+v, %v", project, h, err)
		}
	}
	for query, want := range map[string]int64{
		`SELECT sum(calls) FROM usage_sums WHERE grain = 'hour' AND project = 0`:                          30,
		`SELECT count(*) FROM usage_sums WHERE grain = 'day' AND project = 0`:                             5,
		`SELECT sum(calls) FROM usage_sums WHERE grain = 'token' AND project = 1 AND token = 0`:           15,
		`SELECT count(*) FROM usage_sums WHERE grain = 'token' AND token = 0 AND model || endpoint <> ''`: 0,
	} {
		var n int64
		if err := st.read.QueryRow(query).Scan(&n); err != nil || n != want {
			t.Errorf("%s: %d, %v", query, n, err)
		}
	}
}

// TestQuantiles: quantiles are off by less than a tenth, whatever the
// scale.
func TestQuantiles(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(3, 4))
	for _, typical := range []float64{30_000, 400_000, 9_000_000} {
		var h latencies
		var all []float64
		for range 20_000 {
			us := typical * math.Exp(random.NormFloat64()*0.6)
			all = append(all, us/1000)
			h.add(int64(us))
		}
		slices.Sort(all)
		for _, q := range []float64{0.5, 0.95} {
			got, want := h.quantile(q), all[int(q*float64(len(all)))]
			if math.Abs(got/want-1) > 0.1 {
				t.Errorf("p%v around %v µs: %v ms, want %v", q*100, typical, got, want)
			}
		}
	}
	var none, slow, one latencies
	slow.add(100_000_001)
	one.add(500_000)
	if none.quantile(0.5) != -1 || !math.IsInf(slow.quantile(0.5), 1) || one.quantile(0.5) < 400 || one.quantile(0.95) > 630 {
		t.Error(none.quantile(0.5), slow.quantile(0.5), one.quantile(0.5), one.quantile(0.95))
	}
}
