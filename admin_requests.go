// The pages of /admin that show the ledger: calls by filters, one call with its
// times, and the way out of it as a file (admin_export.go).
package main

import (
	"cmp"
	"html/template"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A requestsView is the list of calls.
type requestsView struct {
	Problem   string
	Given     map[string]string // the filters, as they were given
	Projects  []choice
	Outcomes  []choice
	Endpoints []choice
	Rows      []requestLine
	Next      string
	Short     bool // the list goes on, though the page is not full
	Filtered  bool
	Empty     bool // there is no call at all
}

// A requestLine is a call of the list.
type requestLine struct {
	requestReply
	ProjectName, TokenName, UpstreamName string
	State                                string // good, warn, bad
	Class                                errorClass
}

// filterNames are the filters of the list, which its form, its pages and its
// export have in common.
func filterNames() []string {
	return []string{"from", "to", "project", "token", "model", "endpoint", "status", "outcome"}
}

// requestFilterOf reads the filters. What is wrong with one of them it says in
// words.
func requestFilterOf(query url.Values) (f requestFilter, problem string) {
	f = requestFilter{project: query.Get("project"), token: query.Get("token"), model: query.Get("model"), endpoint: query.Get("endpoint"),
		outcome: query.Get("outcome"), before: math.MaxInt64}
	for _, at := range []struct {
		name string
		to   *int64
	}{{"from", &f.from}, {"to", &f.before}} {
		v := query.Get(at.name)
		if v == "" {
			continue
		}
		t, err := parseFilterTime(v)
		if err != nil {
			return f, "“" + at.name + "” must be a time (UTC) such as 2026-01-31T00:00."
		}
		*at.to = firstID(t)
	}
	if query.Get("from") != "" && query.Get("to") != "" && f.from >= f.before {
		return f, "“from” must be before “to”."
	}
	if f.outcome != "" && !slices.Contains(outcomes(), outcome(f.outcome)) {
		return f, "There is no outcome of that name."
	}
	if v := query.Get("status"); v != "" {
		if n, err := strconv.Atoi(v); err == nil && n >= 100 && n <= 599 {
			f.statusFrom, f.statusTo = n, n+1
		} else if len(v) == 3 && v[0] >= '1' && v[0] <= '5' && v[1:] == "xx" {
			f.statusFrom = int(v[0]-'0') * 100
			f.statusTo = f.statusFrom + 100
		} else {
			return f, "“status” must be a status such as 429, or a class such as 5xx."
		}
	}
	for _, v := range []string{f.project, f.token, f.model, f.endpoint} {
		if len(v) > 512 {
			return f, "A filter is longer than any name."
		}
	}
	return f, ""
}

// parseFilterTime reads a time as browsers send it, or as /manage shows it.
func parseFilterTime(v string) (time.Time, error) {
	t, err := time.Parse("2006-01-02T15:04", v)
	if err != nil {
		if t, err = time.Parse("2006-01-02T15:04:05", v); err != nil {
			t, err = time.Parse(time.RFC3339, v)
		}
	}
	if err == nil && (t.Year() < 2000 || t.Year() > 2200) {
		err = strconv.ErrRange
	}
	return t, err
}

const requestsShown = 50

func (s *server) requestsPage(r *pageRequest) (*page, error) {
	v := &requestsView{Given: map[string]string{}}
	for _, name := range append(filterNames(), "id") {
		v.Given[name] = r.query.Get(name)
		v.Filtered = v.Filtered || v.Given[name] != ""
	}
	var f requestFilter
	f, v.Problem = requestFilterOf(r.query)
	if id := strings.TrimSpace(v.Given["id"]); id != "" {
		if parseRequestID(id) != 0 {
			return &page{to: "/admin/requests/" + id}, nil
		}
		v.Problem = "A request id looks like req_" + strings.Repeat("0", 13) + ": see the header X-LLM-Proxy-Request-ID of an answer."
	}
	var err error
	if v.Projects, err = s.projectChoices(r, f.project); err != nil {
		return nil, err
	}
	v.Outcomes, v.Endpoints = []choice{{"", "All", f.outcome == ""}}, []choice{{"", "All", f.endpoint == ""}}
	for _, o := range outcomes() {
		v.Outcomes = append(v.Outcomes, choice{string(o), strings.ReplaceAll(string(o), "_", " "), string(o) == f.outcome})
	}
	for _, e := range s.endpoints.all() {
		v.Endpoints = append(v.Endpoints, choice{e.name(), e.name(), e.name() == f.endpoint})
	}
	if v.Problem == "" {
		err = s.fillRequests(r, v, f)
	}
	return &page{template: "requests", title: "Calls", data: v}, err
}

func (s *server) fillRequests(r *pageRequest, v *requestsView, f requestFilter) error {
	f.limit = requestsShown
	if after := r.query.Get("after"); after != "" {
		seq, _, err := parseCursor(after)
		if err != nil {
			return badRequest("invalid_value", "after", "This is not the address of a page of the list.")
		}
		f.before = min(f.before, seq)
	}
	rows, next, err := s.store.pageRequests(r.ctx, f)
	if err != nil {
		return err
	}
	for i := range rows {
		v.Rows = append(v.Rows, lineOf(&rows[i]))
	}
	if next != 0 {
		v.Next, v.Short = r.nextPage(cursor(next, "")), len(rows) < requestsShown
	}
	v.Empty = len(rows) == 0 && next == 0 && !v.Filtered && r.query.Get("after") == ""
	return nil
}

func lineOf(v *requestView) requestLine {
	l := requestLine{requestReply: showRequest(v), ProjectName: v.projectName, TokenName: v.tokenName, UpstreamName: v.upstreamName, State: "bad", Class: v.class()}
	switch v.outcome {
	case outcomeOK:
		l.State = "good"
	case outcomeOpen:
		l.State = ""
	case outcomeClientGone, outcomeRefused:
		l.State = "warn"
	}
	return l
}

// A requestPage is one call.
type requestPage struct {
	requestLine
	Bar               template.HTML
	Legend            []legendItem
	Tries             int
	Attempts          []attemptLine
	Lost              bool
	CallsOfToken      string // the address of the token's calls
	Running, Reported bool
	Kept              *stamp // until when its content can be shown; nil: there is none
}

func (s *server) requestPage(r *pageRequest) (*page, error) {
	id := parseRequestID(r.path("id"))
	if id == 0 {
		return nil, errNotFound
	}
	row, err := s.store.requestByID(r.ctx, id)
	if err != nil {
		return nil, err
	}
	v := &requestPage{requestLine: lineOf(&row), Lost: row.outcome == outcomeLost, Running: row.outcome == outcomeOpen,
		Reported: row.source == usageExact, CallsOfToken: "/admin/requests?" + url.Values{"token": {row.tokenID}}.Encode()}
	v.Tries, v.Attempts = row.attempts, v.AttemptLog
	if v.Kept, err = s.keptUntil(r, id); err != nil {
		return nil, err
	}
	bar := timeBar(&row, v.Attempts)
	v.Bar, v.Legend = template.HTML(bar.svg()), bar.legend()
	return &page{template: "request", title: cmp.Or(v.Model, "Call") + " · " + v.ID, data: v}, nil
}

// timeBar is where the time of a call went.
func timeBar(v *requestView, attempts []attemptLine) (b spanBar) {
	if v.total == nil || *v.total <= 0 {
		return b
	}
	rest, failed := *v.total, int64(0)
	for _, a := range attempts[:max(0, len(attempts)-1)] {
		failed += a.MS * 1000
	}
	if failed = min(failed, rest); failed > 0 {
		b.add("attempts that failed", "k6", failed)
		rest -= failed
	}
	if v.firstByte == nil {
		b.add("without an answer byte", "k2", rest)
		return b
	}
	wait := max(0, min(*v.firstByte-failed, rest))
	b.add("to the first byte", "k1", wait)
	b.add("the answer", "k4", rest-wait)
	return b
}
