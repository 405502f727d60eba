// What leaves /admin as a file: calls of the ledger and the numbers of the
// dashboard. A file of calls is written page by page, so that its size takes no
// memory; each export is on the audit trail before its first byte.
package main

import (
	"bufio"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	exportPage     = 500              // calls that are read at once
	exportPatience = 30 * time.Second // for the receiver to take a page of them
)

// exportRequests answers with the calls that the filters in the form let through,
// newest first, as CSV or as lines of JSON.
func (s *server) exportRequests(r *pageRequest) (*page, error) {
	format := r.form.Get("format")
	if format != "csv" && format != "jsonl" {
		return nil, badRequest("invalid_value", "format", "format must be csv or jsonl.")
	}
	f, problem := requestFilterOf(r.form)
	if problem != "" {
		return nil, badRequest("invalid_value", "", problem)
	}
	f.limit = exportPage
	f.before = min(f.before, firstID(r.now.Add(time.Second))) // what comes while it is written is not in it
	rows, next, err := s.store.pageRequests(r.ctx, f)
	if err != nil {
		return nil, err
	}
	facts := []fact{{"format", format}}
	for _, name := range filterNames() {
		if v := r.form.Get(name); v != "" {
			facts = append(facts, fact{name, v})
		}
	}
	if err := s.store.note(r.ctx, r.by, act{actionExport, "requests", facts}); err != nil {
		return nil, err // no audit, no export
	}
	return &page{write: func(w http.ResponseWriter) error {
		e := newExport(w, format, "calls", r.now)
		if e.csv != nil {
			e.header()
		}
		for e.err == nil {
			for i := range rows {
				e.request(&rows[i])
			}
			e.flush()
			if next == 0 || e.err != nil {
				break
			}
			if s.running.isDraining() {
				return fmt.Errorf("the program is stopping")
			}
			f.before = next
			if rows, next, err = s.store.pageRequests(r.http.Context(), f); err != nil {
				return err
			}
		}
		return e.err
	}}, nil
}

// An export is a file on its way. After an error it writes nothing more.
type export struct {
	to  *http.ResponseController
	buf *bufio.Writer
	csv *csv.Writer // nil: JSON lines
	err error
}

func newExport(w http.ResponseWriter, format, name string, now time.Time) *export {
	h := w.Header()
	h.Set("Content-Type", map[string]string{"csv": "text/csv; charset=utf-8; header=present", "jsonl": "application/x-ndjson"}[format])
	h.Set("Content-Disposition", `attachment; filename="llm-proxy-`+name+`-`+now.UTC().Format("20060102-150405")+`.`+format+`"`)
	e := &export{to: http.NewResponseController(w), buf: bufio.NewWriterSize(w, 64<<10)}
	if format == "csv" {
		e.csv = csv.NewWriter(e.buf)
	}
	e.extend()
	return e
}

// extend gives the receiver time for the next part, however long the whole takes.
func (e *export) extend() {
	if err := e.to.SetWriteDeadline(time.Now().Add(exportPatience)); err != nil && e.err == nil {
		e.err = err
	}
}

func (e *export) flush() {
	if e.csv != nil {
		if e.csv.Flush(); e.err == nil {
			e.err = e.csv.Error()
		}
	}
	if err := e.buf.Flush(); err != nil && e.err == nil {
		e.err = err
	}
	if err := e.to.Flush(); err != nil && e.err == nil {
		e.err = err
	}
	e.extend()
}

func (e *export) cells(cells ...string) {
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

func (e *export) request(v *requestView) {
	if e.err != nil {
		return
	}
	q := showRequest(v)
	if e.csv == nil {
		line, err := json.Marshal(exportLine{q, v.projectName, v.tokenName, v.upstreamName})
		if err == nil {
			_, err = e.buf.Write(append(line, '\n'))
		}
		e.err = err
		return
	}
	cost := ""
	if v.costKnown != nil {
		cost = formatNanos(*v.costKnown)
	}
	at := time.UnixMilli(v.started).UTC().Format("2006-01-02T15:04:05.000Z")
	e.cells(q.ID, at, q.ProjectID, v.projectName, q.TokenID, v.tokenName, q.UpstreamID, v.upstreamName, q.Endpoint, q.Model, strconv.FormatBool(q.Stream), q.Address,
		strconv.Itoa(q.Status), string(q.Outcome), q.ErrorCode, string(q.UsageSource), integer(q.InputTokens), integer(q.CachedTokens), integer(q.CacheWriteTokens),
		integer(q.OutputTokens), integer(q.ReasoningTokens), cost, millisCell(q.FirstByteMS), millisCell(q.TotalMS), strconv.Itoa(q.Attempts), q.LimitHit)
}

func (e *export) header() {
	e.cells("id", "started_at", "project_id", "project_name", "token_id", "token_name", "upstream_id", "upstream_name", "endpoint", "model", "stream", "address",
		"status", "outcome", "error_code", "usage_source", "input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens", "cost",
		"first_byte_ms", "total_ms", "attempts", "limit_hit")
}

func integer(n int64) string { return strconv.FormatInt(n, 10) }

func millisCell(v *float64) string {
	if v == nil {
		return ""
	}
	return strconv.FormatFloat(*v, 'f', 3, 64)
}

// exportDashboard answers with the numbers of the charts: a line for each step of
// time, and one for each of the largest projects, tokens, models and endpoints.
func (s *server) exportDashboard(r *pageRequest) (*page, error) {
	q, err := s.dashQuery(r, r.form)
	if err != nil {
		return nil, err
	}
	d, err := s.store.readDashboard(r.ctx, q)
	if err != nil {
		return nil, err
	}
	if err := s.store.note(r.ctx, r.by, act{actionExport, "dashboard", []fact{{"period", q.name}, {"project", q.projectID}}}); err != nil {
		return nil, err
	}
	return &page{write: func(w http.ResponseWriter) error {
		e := newExport(w, "csv", "dashboard", r.now)
		d.export(q, e)
		e.flush()
		return e.err
	}}, nil
}

func (d *dashData) export(q *dashQuery, e *export) {
	head := []string{"kind", "id", "name", "at", "calls", "input_tokens", "output_tokens", "tokens", "cost"}
	for _, class := range hourClasses() {
		head = append(head, string(class)+"_errors")
	}
	e.cells(append(head, "first_byte_p50_ms", "first_byte_p95_ms", "total_p50_ms", "total_p95_ms")...)
	for i := range d.hours {
		h := &d.hours[i]
		line := []string{"time", "", "", time.UnixMilli(q.from + int64(i)*q.step).UTC().Format(time.RFC3339),
			integer(h.calls), integer(h.input), integer(h.output), integer(h.input + h.output), formatNanos(h.cost)}
		for _, n := range h.errors {
			line = append(line, integer(n))
		}
		for _, l := range []*latencies{&h.first, &h.total} {
			line = append(line, quantileCell(l, 0.5), quantileCell(l, 0.95))
		}
		e.cells(line...)
	}
	for _, of := range []struct {
		kind string
		all  []share
	}{{"project", d.projects}, {"token", d.tokens}, {"model", d.modelShares(q)}, {"endpoint", d.endpoints}} {
		for _, v := range of.all {
			e.cells(append([]string{of.kind, v.id, v.name, "", integer(v.calls), "", "", integer(v.tokens), formatNanos(v.cost)}, make([]string, 4+4)...)...)
		}
	}
	if d.sampled > 0 {
		e.cells(append([]string{"note", "", "the lines of kind token are of the latest " + strconv.Itoa(d.sampled) + " calls"}, make([]string, 14)...)...)
	}
}

func quantileCell(l *latencies, q float64) string {
	v := l.quantile(q)
	if v < 0 || v > 1e9 { // none, or in the bucket without an end
		return ""
	}
	return strconv.FormatFloat(v, 'f', 1, 64)
}
