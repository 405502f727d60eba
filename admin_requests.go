// The pages of /admin that show the ledger: calls by filters, one call with its
// times, and the way out of it as a file (admin_requests.go).
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"html/template"
	"math"
	"net/http"
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
	Projects  []filterOption
	Outcomes  []filterOption
	Endpoints []filterOption
	Rows      []requestListItem
	Next      string
	Short     bool // the list goes on, though the page is not full
	Filtered  bool
	Empty     bool // there is no call at all
}

// A requestListItem is a call of the list.
type requestListItem struct {
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

// parseRequestFilter reads the filters. What is wrong with one of them it says in
// words.
func parseRequestFilter(query url.Values) (f requestFilter, problem string) {
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
		*at.to = minIDAt(t)
	}
	if query.Get("from") != "" && query.Get("to") != "" && f.from >= f.before {
		return f, "“from” must be before “to”."
	}
	if f.outcome != "" && !slices.Contains(allOutcomes(), callOutcome(f.outcome)) {
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

const requestsPageSize = 50

func (ui *adminUI) requestsPage(r *pageRequest) (*pageResponse, error) {
	v := &requestsView{Given: map[string]string{}}
	for _, name := range append(filterNames(), "id") {
		v.Given[name] = r.query.Get(name)
		v.Filtered = v.Filtered || v.Given[name] != ""
	}
	var f requestFilter
	f, v.Problem = parseRequestFilter(r.query)
	if id := strings.TrimSpace(v.Given["id"]); id != "" {
		if parseRequestID(id) != 0 {
			return &pageResponse{redirect: "/admin/requests/" + id}, nil
		}
		v.Problem = "A request id looks like req_" + strings.Repeat("0", 13) + ": see the header X-LLM-Proxy-Request-ID of an answer."
	}
	var err error
	if v.Projects, err = ui.projectFilterOptions(r, f.project); err != nil {
		return nil, err
	}
	v.Outcomes, v.Endpoints = []filterOption{{"", "All", f.outcome == ""}}, []filterOption{{"", "All", f.endpoint == ""}}
	for _, o := range allOutcomes() {
		v.Outcomes = append(v.Outcomes, filterOption{string(o), strings.ReplaceAll(string(o), "_", " "), string(o) == f.outcome})
	}
	for _, e := range ui.endpoints.all() {
		v.Endpoints = append(v.Endpoints, filterOption{e.name(), e.name(), e.name() == f.endpoint})
	}
	if v.Problem == "" {
		err = ui.fillRequests(r, v, f)
	}
	return &pageResponse{template: "requests", title: "Calls", data: v}, err
}

func (ui *adminUI) fillRequests(r *pageRequest, v *requestsView, f requestFilter) error {
	f.limit = requestsPageSize
	if after := r.query.Get("after"); after != "" {
		seq, _, err := parseCursor(after)
		if err != nil {
			return badRequest("invalid_value", "after", "This is not the address of a page of the list.")
		}
		f.before = min(f.before, seq)
	}
	rows, next, err := ui.store.requestsPage(r.ctx, f)
	if err != nil {
		return err
	}
	for i := range rows {
		v.Rows = append(v.Rows, newRequestListItem(&rows[i]))
	}
	if next != 0 {
		v.Next, v.Short = r.nextPageURL(formatCursor(next, "")), len(rows) < requestsPageSize
	}
	v.Empty = len(rows) == 0 && next == 0 && !v.Filtered && r.query.Get("after") == ""
	return nil
}

func newRequestListItem(v *requestView) requestListItem {
	l := requestListItem{requestReply: newRequestReply(v), ProjectName: v.projectName, TokenName: v.tokenName, UpstreamName: v.upstreamName, State: "bad", Class: v.errorClass()}
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

// A requestPageView is one call.
type requestPageView struct {
	requestListItem
	Bar               template.HTML
	Legend            []legendItem
	Tries             int
	Attempts          []attemptLine
	Lost              bool
	CallsOfToken      string // the address of the token's calls
	Running, Reported bool
	Kept              *timestamp // until when its content can be shown; nil: there is none
}

func (ui *adminUI) requestPage(r *pageRequest) (*pageResponse, error) {
	id := parseRequestID(r.pathValue("id"))
	if id == 0 {
		return nil, errNotFound
	}
	row, err := ui.store.requestByID(r.ctx, id)
	if err != nil {
		return nil, err
	}
	v := &requestPageView{requestListItem: newRequestListItem(&row), Lost: row.outcome == outcomeLost, Running: row.outcome == outcomeOpen,
		Reported: row.source == usageExact, CallsOfToken: "/admin/requests?" + url.Values{"token": {row.tokenID}}.Encode()}
	v.Tries, v.Attempts = row.attempts, v.AttemptLog
	if v.Kept, err = ui.storedContentUntil(r, id); err != nil {
		return nil, err
	}
	bar := timeBar(&row, v.Attempts)
	v.Bar, v.Legend = template.HTML(bar.svg()), bar.legend()
	return &pageResponse{template: "request", title: cmp.Or(v.Model, "Call") + " · " + v.ID, data: v}, nil
}

// timeBar is where the time of a call went.
func timeBar(v *requestView, attempts []attemptLine) (b durationBar) {
	if v.nullTotalUS == nil || *v.nullTotalUS <= 0 {
		return b
	}
	rest, failed := *v.nullTotalUS, int64(0)
	for _, a := range attempts[:max(0, len(attempts)-1)] {
		failed += a.MS * 1000
	}
	if failed = min(failed, rest); failed > 0 {
		b.add("attempts that failed", "k6", failed)
		rest -= failed
	}
	if v.nullFirstByteUS == nil {
		b.add("without an answer byte", "k2", rest)
		return b
	}
	wait := max(0, min(*v.nullFirstByteUS-failed, rest))
	b.add("to the first byte", "k1", wait)
	b.add("the answer", "k4", rest-wait)
	return b
}

// A contentPageView is what is kept of a call.
type contentPageView struct {
	contentView
	Parts []contentPart
}

// A contentPart is one body with its name.
type contentPart struct {
	Name string
	bodyView
	Cut    bool   // there was more of it
	Pretty string // its text; JSON on lines of its own
}

func (ui *adminUI) contentPage(r *pageRequest) (*pageResponse, error) {
	v, err := ui.ops.revealContent(r.ctx, r.origin, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	p := &contentPageView{contentView: *v}
	for _, b := range []contentPart{{Name: "What it said", bodyView: v.Request}, {Name: "What it was answered", bodyView: v.Answer}} {
		b.Cut = b.Kept < b.Bytes
		if b.Text != nil {
			b.Pretty = indentJSON(*b.Text)
		}
		p.Parts = append(p.Parts, b)
	}
	return &pageResponse{template: "content", title: "Content · " + v.ID, data: p}, nil
}

// indentJSON indents JSON, and leaves everything else as it is.
func indentJSON(text string) string {
	var out bytes.Buffer
	if json.Indent(&out, []byte(text), "", "  ") != nil {
		return text
	}
	return out.String()
}

// storedContentUntil says until when there is content of a call to show, nil if there is
// none, or none for who asks.
func (ui *adminUI) storedContentUntil(r *pageRequest, id int64) (*timestamp, error) {
	if !r.hasRole(roleAdmin) {
		return nil, nil
	}
	until, err := ui.store.contentExpiry(r.ctx, id)
	if err != nil || until <= time.Now().UnixMilli() {
		return nil, err
	}
	return new(timestamp(until)), nil
}

const (
	exportBatchSize    = 500              // calls that are read at once
	exportWriteTimeout = 30 * time.Second // for the receiver to take a page of them
)

// exportRequests answers with the calls that the filters in the form let through,
// newest first, as CSV or as lines of JSON.
func (ui *adminUI) exportRequests(r *pageRequest) (*pageResponse, error) {
	format := r.form.Get("format")
	if format != "csv" && format != "jsonl" {
		return nil, badRequest("invalid_value", "format", "format must be csv or jsonl.")
	}
	f, problem := parseRequestFilter(r.form)
	if problem != "" {
		return nil, badRequest("invalid_value", "", problem)
	}
	f.limit = exportBatchSize
	f.before = min(f.before, minIDAt(r.now.Add(time.Second))) // what comes while it is written is not in it
	rows, next, err := ui.store.requestsPage(r.ctx, f)
	if err != nil {
		return nil, err
	}
	facts := []auditField{{"format", format}}
	for _, name := range filterNames() {
		if v := r.form.Get(name); v != "" {
			facts = append(facts, auditField{name, v})
		}
	}
	if err := ui.store.recordAuditEvent(r.ctx, r.origin, auditEvent{actionExport, "requests", facts}); err != nil {
		return nil, err // no audit, no export
	}
	return &pageResponse{write: func(w http.ResponseWriter) error {
		e := newExportWriter(w, format, "calls", r.now)
		if e.csv != nil {
			e.writeRequestHeader()
		}
		for e.err == nil {
			for i := range rows {
				e.writeRequest(&rows[i])
			}
			e.flush()
			if next == 0 || e.err != nil {
				break
			}
			if ui.running.isDraining() {
				return fmt.Errorf("the program is stopping")
			}
			f.before = next
			if rows, next, err = ui.store.requestsPage(r.http.Context(), f); err != nil {
				return err
			}
		}
		return e.err
	}}, nil
}

// An exportWriter is a file on its way. After an error it writes nothing more.
type exportWriter struct {
	ctrl *http.ResponseController
	buf  *bufio.Writer
	csv  *csv.Writer // nil: JSON lines
	err  error
}

func newExportWriter(w http.ResponseWriter, format, name string, now time.Time) *exportWriter {
	h := w.Header()
	h.Set("Content-Type", map[string]string{"csv": "text/csv; charset=utf-8; header=present", "jsonl": "application/x-ndjson"}[format])
	h.Set("Content-Disposition", `attachment; filename="llm-proxy-`+name+`-`+now.UTC().Format("20060102-150405")+`.`+format+`"`)
	e := &exportWriter{ctrl: http.NewResponseController(w), buf: bufio.NewWriterSize(w, 64<<10)}
	if format == "csv" {
		e.csv = csv.NewWriter(e.buf)
	}
	e.extendDeadline()
	return e
}

// extendDeadline gives the receiver time for the next part, however long the whole takes.
func (e *exportWriter) extendDeadline() {
	if err := e.ctrl.SetWriteDeadline(time.Now().Add(exportWriteTimeout)); err != nil && e.err == nil {
		e.err = err
	}
}

func (e *exportWriter) flush() {
	if e.csv != nil {
		if e.csv.Flush(); e.err == nil {
			e.err = e.csv.Error()
		}
	}
	if err := e.buf.Flush(); err != nil && e.err == nil {
		e.err = err
	}
	if err := e.ctrl.Flush(); err != nil && e.err == nil {
		e.err = err
	}
	e.extendDeadline()
}

func (e *exportWriter) writeRow(cells ...string) {
	if e.err == nil {
		for i := range cells {
			cells[i] = safeCell(cells[i])
		}
		e.err = e.csv.Write(cells)
	}
}

// safeCell keeps spreadsheets from taking a text for a formula.
func safeCell(v string) string {
	if v != "" && strings.ContainsRune("=+-@\t\r\n", rune(v[0])) {
		return "'" + v
	}
	return v
}

// An exportLine is a call as a line of JSON: as /manage shows it, with names.
type exportLine struct {
	requestReply
	ProjectName  string `json:"project_name"`
	TokenName    string `json:"token_name"`
	UpstreamName string `json:"upstream_name"`
}

func (e *exportWriter) writeRequest(v *requestView) {
	if e.err != nil {
		return
	}
	q := newRequestReply(v)
	if e.csv == nil {
		line, err := json.Marshal(exportLine{q, v.projectName, v.tokenName, v.upstreamName})
		if err == nil {
			_, err = e.buf.Write(append(line, '\n'))
		}
		e.err = err
		return
	}
	cost := ""
	if v.nullCost != nil {
		cost = formatNanos(*v.nullCost)
	}
	at := time.UnixMilli(v.started).UTC().Format("2006-01-02T15:04:05.000Z")
	e.writeRow(q.ID, at, q.ProjectID, v.projectName, q.TokenID, v.tokenName, q.UpstreamID, v.upstreamName, q.Endpoint, q.Model, strconv.FormatBool(q.Stream), q.Address,
		strconv.Itoa(q.Status), string(q.Outcome), q.ErrorCode, string(q.UsageSource), formatInt(q.InputTokens), formatInt(q.CachedTokens), formatInt(q.CacheWriteTokens),
		formatInt(q.OutputTokens), formatInt(q.ReasoningTokens), cost, millisCell(q.FirstByteMS), millisCell(q.TotalMS), strconv.Itoa(q.Attempts), q.LimitHit)
}

func (e *exportWriter) writeRequestHeader() {
	e.writeRow("id", "started_at", "project_id", "project_name", "token_id", "token_name", "upstream_id", "upstream_name", "endpoint", "model", "stream", "address",
		"status", "outcome", "error_code", "usage_source", "input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens", "cost",
		"first_byte_ms", "total_ms", "attempts", "limit_hit")
}

func formatInt(n int64) string { return strconv.FormatInt(n, 10) }

func millisCell(v *float64) string {
	if v == nil {
		return ""
	}
	return strconv.FormatFloat(*v, 'f', 3, 64)
}

// exportDashboard answers with the numbers of the charts: a line for each step of
// time, and one for each of the largest projects, tokens, models and endpoints.
func (ui *adminUI) exportDashboard(r *pageRequest) (*pageResponse, error) {
	q, err := ui.parseDashQuery(r, r.form)
	if err != nil {
		return nil, err
	}
	d, err := ui.store.readDashboard(r.ctx, q)
	if err != nil {
		return nil, err
	}
	if err := ui.store.recordAuditEvent(r.ctx, r.origin, auditEvent{actionExport, "dashboard", []auditField{{"period", q.name}, {"project", q.projectID}}}); err != nil {
		return nil, err
	}
	return &pageResponse{write: func(w http.ResponseWriter) error {
		e := newExportWriter(w, "csv", "dashboard", r.now)
		d.writeCSV(q, e)
		e.flush()
		return e.err
	}}, nil
}

func (d *dashData) writeCSV(q *dashQuery, e *exportWriter) {
	head := []string{"kind", "id", "name", "at", "calls", "input_tokens", "output_tokens", "tokens", "cost"}
	for _, class := range errorColumnClasses() {
		head = append(head, string(class)+"_errors")
	}
	e.writeRow(append(head, "first_byte_p50_ms", "first_byte_p95_ms", "total_p50_ms", "total_p95_ms")...)
	for i := range d.steps {
		h := &d.steps[i]
		line := []string{"time", "", "", time.UnixMilli(q.from + int64(i)*q.stepMS).UTC().Format(time.RFC3339),
			formatInt(h.calls), formatInt(h.input), formatInt(h.output), formatInt(h.input + h.output), formatNanos(h.cost)}
		for _, n := range h.errors {
			line = append(line, formatInt(n))
		}
		for _, l := range []*latencyHistogram{&h.firstByteLatency, &h.totalLatency} {
			line = append(line, quantileCell(l, 0.5), quantileCell(l, 0.95))
		}
		e.writeRow(line...)
	}
	for _, of := range []struct {
		kind string
		all  []usageShare
	}{{"project", d.projects}, {"token", d.tokens}, {"model", d.usageByModel(q)}, {"endpoint", d.endpoints}} {
		for _, v := range of.all {
			e.writeRow(append([]string{of.kind, v.id, v.name, "", formatInt(v.calls), "", "", formatInt(v.tokens), formatNanos(v.cost)}, make([]string, 4+4)...)...)
		}
	}
	if d.sampledCalls > 0 {
		e.writeRow(append([]string{"note", "", "the lines of kind token are of the latest " + strconv.Itoa(d.sampledCalls) + " calls"}, make([]string, 14)...)...)
	}
}

func quantileCell(l *latencyHistogram, q float64) string {
	v := l.quantile(q)
	if v < 0 || v > 1e9 { // none, or in the bucket without an end
		return ""
	}
	return strconv.FormatFloat(v, 'f', 1, 64)
}
