// Tests of the dashboard: its numbers are those of the ledger, it says what needs
// attention, and what it is asked for wrongly it says in words.
package main

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"
)

// TestDashboardAgrees: whatever the period, the project and what bars are made
// of, the dashboard's numbers are those of the calls on record.
func TestDashboardAgrees(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	projects := map[int64]string{0: ""}
	maps.Copy(projects, u.projects)
	for _, p := range dashPeriods(u.now.UnixMilli()) {
		for seq, id := range projects {
			for _, by := range []string{"project", "model"} {
				q := &dashQuery{dashPeriod: p, project: seq, projectID: id, by: by, measure: "tokens", now: u.now.UnixMilli(), firstToken: 100, latest: 1000}
				if seq != 0 {
					q.by = "model"
				}
				u.compareDashboard(q)
			}
		}
	}
}

func (u *usageTest) compareDashboard(q *dashQuery) {
	u.t.Helper()
	d, err := u.in.store.readDashboard(u.t.Context(), q)
	if err != nil {
		u.t.Fatal(err)
	}
	var want, before hourSum
	tokens, endpoints := map[string]amount{}, map[string]amount{}
	for _, r := range u.rows {
		if q.project != 0 && r.project != q.project {
			continue
		}
		if r.started >= q.earlier && r.started < q.earlyTo {
			before.add(r)
		}
		if r.started < q.from || r.started >= q.to {
			continue
		}
		want.add(r)
		one := amount{1, r.counts.input + r.counts.output, r.cost}
		for of, key := range map[*map[string]amount]string{&tokens: u.tokens[r.token], &endpoints: r.endpoint} {
			sum := (*of)[key]
			sum.add(one)
			(*of)[key] = sum
		}
	}
	name := fmt.Sprintf("%s of project %d by %s", q.name, q.project, q.by)
	if d.total != want || *d.before != before {
		u.t.Errorf("%s: %+v and before %+v, want %+v and %+v", name, d.total, *d.before, want, before)
	}
	whole := amount{want.calls, want.input + want.output, want.cost}
	var inSeries, inSteps amount
	for _, s := range d.series(q) {
		inSeries.add(s.total)
		for _, a := range s.parts {
			inSteps.add(a)
		}
	}
	if inSeries != whole || inSteps != whole {
		u.t.Errorf("%s: the series hold %+v, their steps %+v, of %+v", name, inSeries, inSteps, whole)
	}
	for what, list := range map[string][]share{"models": d.modelShares(q), "endpoints": d.endpoints, "tokens": d.tokens, "projects": d.projects} {
		var sum amount
		for i, v := range list {
			sum.add(v.amount)
			if i > 0 && q.of(list[i-1].amount) < q.of(v.amount) {
				u.t.Errorf("%s: %s are in no order", name, what)
			}
			if what == "tokens" && v.amount != tokens[v.id] || what == "endpoints" && v.amount != endpoints[v.name] {
				u.t.Errorf("%s: %s %s has %+v", name, what, cmpOr(v.id, v.name), v.amount)
			}
		}
		if sum != whole && !(what == "projects" && q.project != 0) {
			u.t.Errorf("%s: all %s have %+v of %+v", name, what, sum, whole)
		}
	}
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// TestDashboardBounded: where there are more tokens and calls than can be added
// up soon, the latest calls are looked at, and the page says so.
func TestDashboardBounded(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	p := dashPeriods(u.now.UnixMilli())[2]
	for _, c := range []struct {
		firstToken, latest, sampled int
		calls                       int64
	}{{100, 20, 0, -1}, {1, 20, 20, 20}, {1, 100_000, 100_000, -1}} {
		q := &dashQuery{dashPeriod: p, by: "project", measure: "calls", now: u.now.UnixMilli(), firstToken: c.firstToken, latest: c.latest}
		d, err := u.in.store.readDashboard(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		calls := int64(0)
		for _, v := range d.tokens {
			calls += v.calls
		}
		if c.calls < 0 {
			c.calls = d.total.calls
		}
		list := d.lists(q)[1]
		if d.sampled != c.sampled || calls != c.calls || (list.Note != "") != (c.sampled > 0) {
			t.Errorf("%+v: %d calls, of the latest %d, %q", c, calls, d.sampled, list.Note)
		}
	}
}

// TestDashboardPage: what the page shows, and how it answers what makes no sense.
func TestDashboardPage(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	has := func(path string, status int, texts ...string) {
		t.Helper()
		res := b.get(path)
		if res.status != status {
			t.Errorf("%s: %d", path, res.status)
		}
		for _, text := range texts {
			if absent, ok := strings.CutPrefix(text, "!"); ok == strings.Contains(res.body, strings.TrimPrefix(text, "!")) {
				t.Errorf("%s: %q is there: %v\n%s", path, absent, ok, res.body)
			}
		}
	}
	has("/admin/dashboard", 200, "No call has come yet", "!Needs attention", "!<svg class=\"axis\"")
	soon, _ := p.newToken(`"name":"soon to end","duration_hours":30`)
	gone, _ := p.newToken(`"name":"revoked one","duration_hours":30`)
	p.newToken(`"name":"far from it","expires_in_days":300`)
	p.manage("DELETE", "/manage/tokens/"+gone, "", 200, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"limits":[{"count":"requests","max":4,"per":"day"},{"count":"requests","max":100,"per":"minute"},{"count":"tokens","max":1,"per":"day","shadow":true}]}}`, 200, nil)
	for range 4 {
		if res := p.chat(); res.status != 200 {
			t.Fatal(res.status, res.body)
		}
	}
	p.settle()
	row, err := p.in.store.projectByID(t.Context(), p.project)
	if err != nil {
		t.Fatal(err)
	}
	ups, err := p.in.store.upstreamsOf(t.Context(), row.seq)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.in.store.setHealth(t.Context(), time.Now().UnixMilli(), &healthRow{upstream: ups[0].seq, state: keyQuarantined, reason: "401", changedAt: time.Now().UnixMilli()}, keyReady); err != nil {
		t.Fatal(err)
	}
	for _, query := range []string{"", "?period=24h&measure=cost", "?period=7d&by=model", "?period=30d&measure=tokens&by=project", "?period=90d", "?project=" + p.project + "&period=24h"} {
		has("/admin/dashboard"+query, 200, "Needs attention", "/admin/tokens/"+soon, "soon to end of test expires in 29 hours", "!revoked one", "!far from it",
			"100.0% of 4 requests per day", "!100 requests", "!1 tokens", "does not take this key", `<svg class="axis"`, "gpt-4o-mini", "POST /v1/chat/completions", "!No call has come")
	}
	if err := p.stop(); err != nil { // limits are known again after a restart, before any call
		t.Fatal(err)
	}
	p.start()
	has("/admin/dashboard", 200, "100.0% of 4 requests per day")
	has("/admin/dashboard?project="+p.project, 200, "100.0% of 4 requests per day")
	p.manage("DELETE", "/manage/projects/"+p.project, "", 200, nil)
	has("/admin/dashboard", 200, "!100.0% of 4 requests")
	has("/admin/dashboard?period=1y", 400, "period must be")
	has("/admin/dashboard?measure=x", 400, "measure must be")
	has("/admin/dashboard?by=x", 400, "by must be")
	has("/admin/dashboard?project=proj_none", 404)
	if res := p.do("GET", "/admin/dashboard", ""); res.status != 303 {
		t.Errorf("without a session: %d", res.status)
	}
}

// TestChange: how a number is told beside the one before it.
func TestChange(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		now, was float64
		want     string
	}{{5, 0, ""}, {0, 5, "−100%"}, {5, 5, "±0%"}, {6, 5, "+20%"}, {5.01, 5, "±0%"}, {100, 1, "×100"}, {5, -1, ""}} {
		if got := change(c.now, c.was); got != c.want {
			t.Errorf("from %v to %v: %q", c.was, c.now, got)
		}
	}
	for v, want := range map[float64]string{0: "0.0%", 0.01: "<0.1%", 3.14: "3.1%", 100: "100.0%"} {
		if got := percent(v); got != want {
			t.Errorf("%v: %q", v, got)
		}
	}
}
