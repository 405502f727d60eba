// This file has the pages of /admin about the ledger: the list of calls with its filters, one call with
// its timing, its stored content, and the downloads. A download is recorded in the audit trail before
// its first byte leaves.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/csv"
	"encoding/json"
	"errors"
	"maps"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A requestsView is the data of templates/requests.html.
type requestsView struct {
	FilterNames                   []string // those that a download takes
	Projects, Outcomes, Endpoints []option
	CacheStates, Periods          []option
	PriceStates, Causes           []option
	Rows                          []requestListItem
	listView
	InputTokens, OutputTokens int64 // of the page
	Filtered                  bool
	MoreFilters               bool // one is set of those that are folded away
	NoCalls                   bool // there was never a call
}

// A requestListItem is a call in a list. State is good, warn, bad or "".
type requestListItem struct {
	requestReply
	ProjectName, TokenName, UpstreamName string
	State                                string
	Class                                errorClass
}

// filterNames returns the filters, which the form, the pages and the download of the list share.
func filterNames() []string {
	return []string{"period", "from", "to", "project", "token", "model", "endpoint", "status", "outcome", "cache",
		"session", "end_user", "tag", "search", "cost", "cause"}
}

// parseRequestFilter reads the filters. It returns what is wrong with them as text.
func parseRequestFilter(query url.Values) (f requestFilter, problem string) {
	f = requestFilter{project: query.Get("project"), token: query.Get("token"), model: query.Get("model"),
		endpoint: query.Get("endpoint"), outcome: query.Get("outcome"), cache: query.Get("cache"),
		before: math.MaxInt64}
	for _, bound := range []struct {
		name string
		id   *int64
	}{{"from", &f.from}, {"to", &f.before}} {
		if v := query.Get(bound.name); v != "" {
			t, err := parseFilterTime(v)
			if err != nil {
				return f, "“" + bound.name + "” must be a time (UTC) such as 2026-01-31T00:00."
			}
			*bound.id = minIDAt(t)
		}
	}
	if query.Get("from") != "" && query.Get("to") != "" && f.from >= f.before {
		return f, "“from” must be before “to”."
	}
	if f.outcome != "" && f.outcome != failedOutcomes && !slices.Contains(allOutcomes(), callOutcome(f.outcome)) {
		return f, "There is no such outcome."
	}
	if cost := query.Get("cost"); cost != "" && cost != "none" {
		return f, "“cost” must be none."
	}
	f.isUnpriced, f.cause = query.Get("cost") == "none", errorClass(query.Get("cause"))
	if causes := errorColumnClasses(); f.cause != "" && !slices.Contains(causes[:], f.cause) {
		return f, "“cause” must be caller, policy, provider or proxy."
	}
	if f.cache != "" && f.cache != cacheHit && f.cache != cacheNone {
		return f, "“cache” must be hit or none."
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
	for _, v := range []string{f.project, f.token, f.model, f.endpoint, query.Get("session"), query.Get("end_user")} {
		if len(v) > 512 {
			return f, "A filter is longer than 512 bytes."
		}
	}
	f.findModelPattern()
	var err error
	if f.search, err = parseCallSearch(query.Get("search")); err != nil {
		return f, "A search has at most 4 words and 200 bytes."
	}
	if f.attributionFilter, err = newAttributionFilter(query.Get("session"), query.Get("end_user"),
		query.Get("tag")); err != nil {
		return f, "“tag” must be a key and a value such as team=search."
	}
	return f, ""
}

// findModelPattern makes the filter for a model a pattern, if it has a wildcard.
func (f *requestFilter) findModelPattern() {
	if strings.Contains(f.model, "*") {
		like := strings.NewReplacer("!", "!!", "%", "!%", "_", "!_", "*", "%")
		f.model, f.modelPattern = "", like.Replace(strings.ToLower(f.model))
	}
}

// withPeriod returns the filters with the times of the period instead of its name. Times that are given count more.
func withPeriod(query url.Values, now time.Time) (url.Values, error) {
	name := query.Get("period")
	if name == "" || query.Get("from") != "" || query.Get("to") != "" {
		return query, nil
	}
	p, err := parsePeriod(now.UnixMilli(), name, "", "")
	if err != nil {
		return nil, err
	}
	query = maps.Clone(query)
	query.Set("from", time.UnixMilli(p.from).UTC().Format(time.RFC3339))
	query.Set("to", time.UnixMilli(p.to).UTC().Format(time.RFC3339))
	return query, nil
}

// parseRequestFilter is the function of the same name, with the periods of the pages, and for a project that records
// end users by their hashes too.
func (ui *adminUI) parseRequestFilter(r *pageRequest, query url.Values) (f requestFilter, problem string, err error) {
	if query, err = withPeriod(query, r.now); err != nil {
		return f, "There is no such period.", nil
	}
	if f, problem = parseRequestFilter(query); problem == "" {
		problem, err = ui.findFilterToken(r, &f)
	}
	if problem != "" || err != nil || f.endUser == "" {
		return f, problem, err
	}
	found, err := ui.ops.parseAttributionFilter(r.ctx, f.project, url.Values{endUserAttribute: {f.endUser}})
	f.endUser = found.endUser
	return f, "", err
}

// parseFilterTime parses a time as browsers send it, or as /manage writes it.
func parseFilterTime(v string) (t time.Time, err error) {
	for _, layout := range []string{"2006-01-02T15:04", "2006-01-02T15:04:05", time.RFC3339} {
		if t, err = time.Parse(layout, v); err == nil {
			break
		}
	}
	if err == nil && (t.Year() < 2000 || t.Year() > 2200) {
		err = strconv.ErrRange
	}
	return t, err
}

func (ui *adminUI) requestsPage(r *pageRequest) (*pageResponse, error) {
	v := &requestsView{FilterNames: filterNames(), listView: r.newListView()}
	v.Filtered = slices.ContainsFunc(append(filterNames(), "id"), func(n string) bool { return r.query.Get(n) != "" })
	v.MoreFilters = slices.ContainsFunc(append(filterNames(), "id"), func(n string) bool {
		return !slices.Contains([]string{"search", "period", "project", "outcome"}, n) && r.query.Get(n) != ""
	})
	f, problem, err := ui.parseRequestFilter(r, r.query)
	if err != nil {
		return nil, err
	}
	v.Problem = cmp.Or(v.Problem, problem)
	if parseRequestID(v.Search) != 0 {
		return &pageResponse{redirect: "/admin/requests/" + v.Search}, nil
	}
	if id := strings.TrimSpace(r.query.Get("id")); id != "" {
		if parseRequestID(id) != 0 {
			return &pageResponse{redirect: "/admin/requests/" + id}, nil
		}
		v.Problem = "A request ID looks like req_0000000000000. See the response header X-LLM-Proxy-Request-ID."
	}
	if v.Projects, err = ui.projectOptions(r, f.project); err != nil {
		return nil, err
	}
	v.Outcomes, v.Endpoints = options("", "All outcomes", failedOutcomes, "all failures"), options("", "All endpoints")
	v.Periods = append(options("", "Any time"), periodOptions(r.now.UnixMilli())...)
	v.PriceStates, v.Causes = options("", "All", "none", "Without"), options("", "All")
	for _, c := range errorColumnClasses() {
		v.Causes = append(v.Causes, option{string(c), string(c)})
	}
	v.CacheStates = options("", "All", cacheHit, "Hit", cacheNone, "None")
	for _, o := range allOutcomes() {
		v.Outcomes = append(v.Outcomes, option{string(o), outcomeLabel(o)})
	}
	for _, e := range ui.endpoints.all() {
		v.Endpoints = append(v.Endpoints, option{e.name(), e.name()})
	}
	if v.Problem == "" {
		err = ui.fillRequests(r, v, f)
	}
	return showPage("requests", "Calls", v), err
}

// fillRequests reads the page of the list of calls that the address asks for.
func (ui *adminUI) fillRequests(r *pageRequest, v *requestsView, f requestFilter) error {
	if err := checkChoice("order", v.Order, append(callOrders(), "", tokensNewest, tokensOldest)...); err != nil {
		v.Problem = "There is no such order."
		return nil
	}
	v.addColumns(r, cmp.Or(v.Order, tokensNewest), sortColumn{"Started", tokensNewest, ""},
		sortColumn{"Outcome", "", ""}, sortColumn{"Project and token", "", ""},
		sortColumn{"Model and endpoint", "", ""}, sortColumn{"Tokens in / out", "-tokens", "num"},
		sortColumn{"Cost", "-cost", "num"}, sortColumn{"Total / first byte", "-time", "num"})
	ui.awaitRecorded(r)
	if slices.Contains(callOrders(), v.Order) {
		return ui.sortRequests(r, v, f)
	}
	f.limit = v.Size
	before := r.query.Get("before")
	cursor := cmp.Or(before, r.query.Get("after"))
	f.isOldestFirst = (v.Order == tokensOldest) != (before != "")
	if cursor != "" {
		id, _, err := parseCursor(cursor)
		switch {
		case err != nil:
			return badRequest("invalid_value", "after", "This address is not a page of the list.")
		case f.isOldestFirst:
			f.from = max(f.from, id+1)
		default:
			f.before = min(f.before, id)
		}
	}
	rows, next, err := ui.store.requestsPage(r.ctx, f)
	if err != nil {
		return err
	}
	ends := pageEnds{more: next != 0, beyond: formatCursor(next, "")}
	if before != "" {
		slices.Reverse(rows)
	}
	if n := len(rows); n > 0 {
		ends.first, ends.last = formatCursor(rows[0].id, ""), formatCursor(rows[n-1].id, "")
	}
	v.setPages(r, ends)
	v.Partial = ends.more && len(rows) < v.Size
	v.addRows(rows)
	if v.Total.Label = "This page"; !v.LaterPage && v.Next == "" {
		v.Total.Label = "All " + pluralize(v.Total.Calls, "call", "calls")
	}
	v.NoCalls = len(rows) == 0 && next == 0 && !v.Filtered && cursor == ""
	return nil
}

// addRows adds the rows of the page and sets their total.
func (v *requestsView) addRows(rows []requestView) {
	v.Total = &listTotal{Calls: int64(len(rows))}
	for i := range rows {
		v.Rows = append(v.Rows, newRequestListItem(&rows[i]))
		v.Total.Cost = dollars(addSat(int64(v.Total.Cost), deref(rows[i].nullCost)))
		v.InputTokens = addSat(v.InputTokens, rows[i].counts.input)
		v.OutputTokens = addSat(v.OutputTokens, rows[i].counts.output)
	}
}

// callOrders returns the orders of calls that no index has.
func callOrders() []string { return []string{"tokens", "-tokens", "cost", "-cost", "time", "-time"} }

// sortRequests sorts the latest calls that match: no index has their order, so that the time for it must be limited.
func (ui *adminUI) sortRequests(r *pageRequest, v *requestsView, f requestFilter) error {
	f.limit = maxSorted
	rows, next, err := ui.store.requestsPage(r.ctx, f)
	if err != nil {
		return err
	}
	if next != 0 {
		v.Hint = "Only the latest " + pluralize(int64(len(rows)), "matching call is", "matching calls are") +
			" sorted. Choose a shorter period to sort all of its calls."
	}
	v.addRows(sortedPage(r, &v.listView, rows, v.Order, func(c *requestView) sortKey {
		key := sortKey{seq: c.id, number: -1} // without a cost or an end
		switch strings.TrimPrefix(v.Order, "-") {
		case "tokens":
			key.number = addSat(c.counts.input, c.counts.output)
		case "cost":
			if c.nullCost != nil {
				key.number = *c.nullCost
			}
		case "time":
			if c.nullTotalUS != nil {
				key.number = *c.nullTotalUS
			}
		}
		return key
	}))
	v.Total.Label = "This page"
	return nil
}

// outcomeLabel returns an outcome in words, the same on every page.
func outcomeLabel(o callOutcome) string {
	switch o {
	case outcomeOpen:
		return "running"
	case outcomeClientGone:
		return "client disconnected"
	}
	return strings.ReplaceAll(string(o), "_", " ")
}

// awaitRecorded returns when the calls that have ended are in the ledger, so that no page lists one as running.
// It does not wait for a ledger that cannot be written.
func (ui *adminUI) awaitRecorded(r *pageRequest) {
	_ = ui.ledger.awaitIfHealthy(r.ctx, ui.ledger.queuedSoFar()) // without it, the page is a moment old
}

func newRequestListItem(v *requestView) requestListItem {
	item := requestListItem{requestReply: newRequestReply(v), ProjectName: v.projectName, TokenName: v.tokenName,
		UpstreamName: v.upstreamName, State: "bad", Class: v.errorClass()}
	switch v.outcome {
	case outcomeOK:
		item.State = "good"
	case outcomeOpen:
		item.State = ""
	case outcomeClientGone, outcomeRefused:
		item.State = "warn"
	}
	return item
}

// A requestPageView is the data of templates/request.html.
type requestPageView struct {
	requestListItem
	TagLinks      []string // key=value, as in the filter
	Bar           []durationPart
	CostParts     *costTable // nil: there is no cost, or its price is not known
	UnpricedKinds string     // for want of whose price the cost is not known, in words
	Multiplier    string     // "": 1
	ContentUntil  *timestamp // nil: there is no content, or none for this role
	Refusal       *refusalView
}

// tagTexts returns the tags in the form of the filter.
func (v *requestListItem) tagTexts() (out []string) {
	for _, t := range v.Tags {
		out = append(out, t.key+"="+t.value)
	}
	return out
}

// A costTable is the data of the template "cost-table".
type costTable struct {
	Rows  []costTableRow
	Cost  dollars
	Price priceSource
}

// A costTableRow is a part of a cost in words: what was used, at what price, and what that costs.
type costTableRow struct {
	What, Price string
	Cost        dollars
}

// newCostTable returns a breakdown in words, nil for none.
func newCostTable(b *costBreakdown) *costTable {
	if b == nil {
		return nil
	}
	table := &costTable{Cost: b.Cost, Price: b.Price}
	for _, l := range b.Lines {
		row := costTableRow{What: capitalize(strings.ReplaceAll(l.Kind, "_", " ")), Cost: l.Cost}
		if l.Multiplier != nil {
			row.Price = string(*l.Multiplier)
			table.Rows = append(table.Rows, row)
			continue
		}
		k := slices.IndexFunc(priceKinds[:], func(info priceKindInfo) bool { return info.name == l.Kind })
		info := priceKinds[k] // newCostBreakdown took the name from there
		row.What = groupDigits(*l.Quantity) + " " + info.label
		row.Price = formatPrice(string(*l.Price)) + info.unit.suffix()
		if info.unit == perMinuteOfMedia {
			row.What = formatDecimal(*l.Quantity, 3) + " " + strings.Replace(info.label, "minutes", "seconds", 1)
		}
		table.Rows = append(table.Rows, row)
	}
	return table
}

// suffix says what a price of the unit is for.
func (u priceUnit) suffix() string {
	switch u {
	case perToken, perCharacter:
		return "/M"
	case perMinuteOfMedia:
		return "/minute"
	}
	return " each"
}

func (ui *adminUI) requestPage(r *pageRequest) (*pageResponse, error) {
	id := parseRequestID(r.pathValue("id"))
	if id == 0 {
		return nil, errNotFound
	}
	ui.awaitRecorded(r)
	row, err := ui.store.requestByID(r.ctx, id)
	if err != nil {
		return nil, err
	}
	v := &requestPageView{requestListItem: newRequestListItem(&row), Bar: durationBar(&row)}
	breakdown, missing, err := ui.ops.breakdownOf(r.ctx, &row)
	if err != nil {
		return nil, err
	}
	v.CostParts, v.TagLinks = newCostTable(breakdown), v.tagTexts()
	v.UnpricedKinds = strings.ReplaceAll(strings.Join(missing, ", "), "_", " ")
	if m := row.details.multiplier; m != 0 {
		v.Multiplier = formatDecimal(m, 4)
	}
	if row.outcome == outcomeRefused {
		if v.Refusal, err = ui.explainRefusal(r, &row); err != nil {
			return nil, err
		}
	}
	v.ContentUntil, err = ui.contentUntil(r, id)
	return showPage("request", cmp.Or(v.Model, "Call")+" · "+v.ID, v), err
}

// durationBar splits the time of a call.
func durationBar(v *requestView) []durationPart {
	if v.nullTotalUS == nil || *v.nullTotalUS <= 0 {
		return nil
	}
	rest, failed := *v.nullTotalUS, int64(0)
	attempts := newRequestReply(v).AttemptLog
	for _, a := range attempts[:max(0, len(attempts)-1)] {
		failed += a.MS * 1000
	}
	failed = min(failed, rest)
	rest -= failed
	failures := durationPart{Name: "failed attempts", Class: "e2", us: failed}
	if v.nullFirstByteUS == nil {
		return newDurationBar(failures, durationPart{Name: "no response byte", Class: "k3", us: rest})
	}
	wait := max(0, min(*v.nullFirstByteUS-failed, rest))
	return newDurationBar(failures, durationPart{Name: "to the first byte", Class: "k1", us: wait},
		durationPart{Name: "the response", Class: "k2", us: rest - wait})
}

// A contentPageView is the data of templates/content.html.
type contentPageView struct {
	contentView
	Parts []contentPart
}

// A contentPart is the request or the response.
type contentPart struct {
	Name string
	bodyView
	Pretty string // the text; JSON is indented
}

func (ui *adminUI) contentPage(r *pageRequest) (*pageResponse, error) {
	content, err := ui.ops.revealContent(r.ctx, r.origin, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	v := &contentPageView{contentView: *content}
	parts := []contentPart{{Name: "Request", bodyView: content.Request}, {Name: "Response", bodyView: content.Answer}}
	for _, part := range parts {
		if part.Text != nil {
			part.Pretty = indentJSON(*part.Text)
		}
		v.Parts = append(v.Parts, part)
	}
	return showPage("content", "Content · "+v.ID, v), nil
}

// indentJSON indents JSON, and returns any other text unchanged.
func indentJSON(text string) string {
	var out bytes.Buffer
	if json.Indent(&out, []byte(text), "", "  ") != nil {
		return text
	}
	return out.String()
}

// contentUntil returns until when a call's content is stored. It returns nil if there is none, or
// if the role may not see it.
func (ui *adminUI) contentUntil(r *pageRequest, id int64) (*timestamp, error) {
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
	exportBatchSize    = 500              // calls per read
	exportWriteTimeout = 30 * time.Second // for the client to receive a batch
)

// exportRequests downloads the calls that match the filters of the form, newest first, as CSV or
// JSON lines.
func (ui *adminUI) exportRequests(r *pageRequest) (*pageResponse, error) {
	format := r.form.Get("format")
	if err := checkChoice("format", format, "csv", "jsonl"); err != nil {
		return nil, err
	}
	f, problem, err := ui.parseRequestFilter(r, r.form)
	if err != nil {
		return nil, err
	}
	if problem != "" {
		return nil, badRequest("invalid_value", "", problem)
	}
	f.limit = exportBatchSize
	f.before = min(f.before, minIDAt(r.now.Add(time.Second))) // without calls that begin during the download
	rows, next, err := ui.store.requestsPage(r.ctx, f)
	if err != nil {
		return nil, err
	}
	details := []auditField{{"format", format}}
	for _, name := range filterNames() {
		if v := r.form.Get(name); v != "" {
			if name == endUserAttribute || name == sessionAttribute {
				if v, err = ui.ops.auditName(f.project, v); err != nil {
					return nil, err
				}
			}
			details = append(details, auditField{name, v})
		}
	}
	return ui.download(r, "requests", details, func(w http.ResponseWriter) error {
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
				return errors.New("the proxy is stopping")
			}
			f.before = next
			if rows, next, err = ui.store.requestsPage(r.http.Context(), f); err != nil {
				return err
			}
		}
		return e.err
	})
}

// download records a download in the audit trail and returns the response that writes it. Without
// an audit entry there is no download.
func (ui *adminUI) download(r *pageRequest, object string, details []auditField,
	write func(http.ResponseWriter) error) (*pageResponse, error) {
	err := ui.store.recordAuditEvent(r.ctx, r.origin, auditEvent{actionExport, object, details})
	return &pageResponse{write: write}, err
}

// exportDashboard downloads the numbers of the dashboard as CSV.
func (ui *adminUI) exportDashboard(r *pageRequest) (*pageResponse, error) {
	q, err := ui.parseDashQuery(r, r.form)
	if err != nil {
		return nil, err
	}
	q.allTokens = true
	d, err := ui.store.readDashboard(r.ctx, q)
	if err != nil {
		return nil, err
	}
	details := []auditField{{"period", q.name}, {"project", q.projectID}}
	if q.fromDay != "" {
		details = append(details, auditField{"from", q.fromDay}, auditField{"to", q.toDay})
	}
	return ui.download(r, "dashboard", details, func(w http.ResponseWriter) error {
		e := newExportWriter(w, "csv", "dashboard", r.now)
		d.writeCSV(q, e)
		e.flush()
		return e.err
	})
}

// An exportWriter writes a download. After an error it writes nothing more.
type exportWriter struct {
	ctrl *http.ResponseController
	buf  *bufio.Writer
	csv  *csv.Writer // nil: JSON lines
	err  error
}

func newExportWriter(w http.ResponseWriter, format, name string, now time.Time) *exportWriter {
	h := w.Header()
	file := "llm-proxy-" + name + "-" + now.UTC().Format("20060102-150405") + "." + format
	h.Set("Content-Disposition", `attachment; filename="`+file+`"`)
	h.Set("Content-Type", "application/x-ndjson")
	e := &exportWriter{ctrl: http.NewResponseController(w), buf: bufio.NewWriterSize(w, 64<<10)}
	if format == "csv" {
		h.Set("Content-Type", csvType)
		e.csv = csv.NewWriter(e.buf)
	}
	e.extendDeadline()
	return e
}

// fail keeps the first error.
func (e *exportWriter) fail(err error) {
	if e.err == nil {
		e.err = err
	}
}

// extendDeadline gives the client time for the next batch, however long the whole download takes.
func (e *exportWriter) extendDeadline() {
	e.fail(e.ctrl.SetWriteDeadline(time.Now().Add(exportWriteTimeout)))
}

func (e *exportWriter) flush() {
	if e.csv != nil {
		e.csv.Flush()
		e.fail(e.csv.Error())
	}
	e.fail(e.buf.Flush())
	e.fail(e.ctrl.Flush())
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

// An exportLine is a call as a JSON line: as /manage returns it, with names.
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
	e.writeRow(q.ID, at, q.ProjectID, v.projectName, q.TokenID, v.tokenName, q.UpstreamID, v.upstreamName,
		q.Endpoint, q.Model, strconv.FormatBool(q.Stream), q.Address, strconv.Itoa(q.Status), string(q.Outcome),
		q.ErrorCode, string(q.UsageSource), formatInt(q.InputTokens), formatInt(q.CachedTokens),
		formatInt(q.CacheWriteTokens), formatInt(q.OutputTokens), formatInt(q.ReasoningTokens), cost,
		millisCell(q.FirstByteMS), millisCell(q.TotalMS), strconv.Itoa(q.Attempts), q.LimitHit, q.Cache,
		formatNanos(int64(q.Saved)), millisCell(&q.SavedMS), q.Session, q.EndUser, q.Tags.text(),
		q.RoutedBy, formatInt(q.ClientRetry), q.IdempotencyHash)
}

func (e *exportWriter) writeRequestHeader() {
	e.writeRow("id", "started_at", "project_id", "project_name", "token_id", "token_name",
		"upstream_id", "upstream_name", "endpoint", "model", "stream", "address", "status", "outcome",
		"error_code", "usage_source", "input_tokens", "cached_tokens",
		"cache_write_tokens", "output_tokens", "reasoning_tokens", "cost",
		"first_byte_ms", "total_ms", "attempts", "limit_hit", "cache", "saved", "saved_ms",
		"session", "end_user", "tags", "routed_by", "client_retry", "idempotency_hash")
}

func formatInt(n int64) string { return strconv.FormatInt(n, 10) }

func millisCell(v *float64) string {
	if v == nil {
		return ""
	}
	return strconv.FormatFloat(*v, 'f', 3, 64)
}
