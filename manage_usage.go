// Handlers of /manage that read the ledger, and those of the price list.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"
)

type requestReply struct {
	ID               string        `json:"id"`
	StartedAt        stamp         `json:"started_at"`
	ProjectID        string        `json:"project_id"`
	TokenID          string        `json:"token_id"`
	UpstreamID       string        `json:"upstream_id"`
	Endpoint         string        `json:"endpoint"`
	Model            string        `json:"model"`
	Stream           bool          `json:"stream"`
	Address          string        `json:"address"`
	Status           int           `json:"status"`
	Outcome          outcome       `json:"outcome"`
	ErrorCode        string        `json:"error_code"`
	UsageSource      usageSource   `json:"usage_source"`
	InputTokens      int64         `json:"input_tokens"`
	CachedTokens     int64         `json:"cached_tokens"`
	CacheWriteTokens int64         `json:"cache_write_tokens"`
	OutputTokens     int64         `json:"output_tokens"`
	ReasoningTokens  int64         `json:"reasoning_tokens"`
	Cost             *dollars      `json:"cost"` // null: the price is not known, or nothing was billed
	FirstByteMS      *float64      `json:"first_byte_ms"`
	TotalMS          *float64      `json:"total_ms"`
	Attempts         int           `json:"attempts"`
	AttemptLog       []attemptLine `json:"attempt_log"` // empty where one was enough
	LimitHit         string        `json:"limit_hit"`   // the limit that refused the call, or a shadow limit that would have
}

func showRequest(v *requestView) requestReply {
	out := requestReply{requestID(v.id), stamp(v.started), v.projectID, v.tokenID, v.upstreamID, v.endpoint, v.model, v.stream, v.address,
		v.status, v.outcome, v.errorCode, v.source, v.counts.input, v.counts.cached, v.counts.cacheWrite,
		v.counts.output, v.counts.reasoning, nil, millis(v.firstByte), millis(v.total), v.attempts, []attemptLine{}, v.limitHit}
	if v.attemptLog != "" {
		_ = json.Unmarshal([]byte(v.attemptLog), &out.AttemptLog) // what we wrote; else the list stays empty
	}
	if v.costKnown != nil {
		out.Cost = new(dollars(*v.costKnown))
	}
	return out
}

func millis(us *int64) *float64 {
	if us == nil {
		return nil
	}
	return new(float64(*us) / 1000)
}

func (s *server) getRequest(r *manageRequest) (*reply, error) {
	id := parseRequestID(r.path("id"))
	if id == 0 {
		return nil, errNotFound
	}
	v, err := s.store.requestByID(r.ctx, id)
	if err != nil {
		return nil, err
	}
	return &reply{body: showRequest(&v)}, nil
}

func (s *server) listRequests(r *manageRequest) (*reply, error) {
	page, err := r.page("project_id", "token_id", "outcome", "from", "to")
	if err != nil {
		return nil, err
	}
	f := requestFilter{project: r.query.Get("project_id"), token: r.query.Get("token_id"), outcome: r.query.Get("outcome"),
		before: math.MaxInt64, limit: page.limit}
	if f.outcome != "" && !slices.Contains(outcomes(), outcome(f.outcome)) {
		return nil, badRequest("invalid_value", "outcome", "outcome must be open, ok, refused, client_gone, truncated, upstream_error or lost.")
	}
	from, to, err := r.span(time.Time{}, time.Time{})
	if err != nil {
		return nil, err
	}
	if !from.IsZero() {
		f.from = firstID(from)
	}
	if !to.IsZero() {
		f.before = firstID(to)
	}
	if page.seq > 0 {
		f.before = min(f.before, page.seq)
	}
	rows, next, err := s.store.pageRequests(r.ctx, f)
	if err != nil {
		return nil, err
	}
	out := pageOf(rows, page.limit, showRequest, nil)
	if next != 0 {
		out.Next = cursor(next, "")
	}
	return &reply{body: out}, nil
}

func outcomes() []outcome {
	return []outcome{outcomeOpen, outcomeOK, outcomeRefused, outcomeClientGone, outcomeTruncated, outcomeUpstreamError, outcomeLost}
}

// span reads from and to, RFC 3339 times, with what holds where they are not
// given.
func (r *manageRequest) span(from, to time.Time) (time.Time, time.Time, error) {
	for _, p := range []struct {
		name string
		at   *time.Time
	}{{"from", &from}, {"to", &to}} {
		v := r.query.Get(p.name)
		if v == "" {
			continue
		}
		t, err := time.Parse(time.RFC3339, v)
		if err != nil || t.Year() < 2000 || t.Year() > 2200 {
			return from, to, badRequest("invalid_value", p.name, p.name+" must be a time such as 2026-01-31T00:00:00Z.")
		}
		*p.at = t.UTC()
	}
	if !from.IsZero() && !to.IsZero() && !from.Before(to) {
		return from, to, badRequest("invalid_value", "from", "from must be before to.")
	}
	return from, to, nil
}

type usageReply struct {
	At              *stamp  `json:"at,omitempty"` // start of the hour, day or month
	ProjectID       *string `json:"project_id,omitempty"`
	ProjectName     *string `json:"project_name,omitempty"`
	TokenID         *string `json:"token_id,omitempty"`
	TokenName       *string `json:"token_name,omitempty"`
	Model           *string `json:"model,omitempty"` // "" stands for names that get no sums of their own (requestRow.sumModel)
	Endpoint        *string `json:"endpoint,omitempty"`
	Outcome         *string `json:"outcome,omitempty"`
	Calls           int64   `json:"calls"`
	InputTokens     int64   `json:"input_tokens"`
	CachedTokens    int64   `json:"cached_tokens"`
	OutputTokens    int64   `json:"output_tokens"`
	ReasoningTokens int64   `json:"reasoning_tokens"`
	Cost            dollars `json:"cost"` // of the calls whose price is known
	UnpricedCalls   int64   `json:"unpriced_calls"`
	EstimatedCalls  int64   `json:"estimated_calls"`
	WouldRefuse     int64   `json:"would_refuse"` // calls that a shadow limit would have refused
}

const maxUsageRows = 10_000

// getUsage adds up the sums of a span of time, by time and by group.
func (s *server) getUsage(r *manageRequest) (*reply, error) {
	if err := r.only("interval", "group_by", "project_id", "token_id", "from", "to"); err != nil {
		return nil, err
	}
	q := usageQuery{project: r.query.Get("project_id"), token: r.query.Get("token_id"), limit: maxUsageRows,
		interval: cmp.Or(r.query.Get("interval"), "day")}
	lookBack := map[string]time.Duration{"hour": 24 * time.Hour, "day": 30 * 24 * time.Hour, "month": 365 * 24 * time.Hour, "total": 30 * 24 * time.Hour}[q.interval]
	if lookBack == 0 {
		return nil, badRequest("invalid_value", "interval", "interval must be hour, day, month or total.")
	}
	if err := q.groupBy(r.query.Get("group_by")); err != nil {
		return nil, err
	}
	from, to, err := r.span(time.Time{}, r.now.UTC())
	if err != nil {
		return nil, err
	}
	if from.IsZero() {
		from = to.Add(-lookBack)
	}
	unit := int64(dayMS)
	switch q.interval {
	case "hour":
		unit = hourMS
	case "month":
		from = time.Date(from.Year(), from.Month(), 1, 0, 0, 0, 0, time.UTC)
	}
	q.from = from.UnixMilli() - from.UnixMilli()%unit // whole units: a part of one cannot be told
	q.to = to.UnixMilli()
	rows, err := s.store.usage(r.ctx, q)
	if errors.Is(err, errTooMany) {
		return nil, badRequest("too_many_rows", "", "The answer would have more than 10,000 rows. Ask for one project, a shorter time, a longer interval or fewer groups.")
	}
	if err != nil {
		return nil, err
	}
	out := list[usageReply]{Data: []usageReply{}}
	for i := range rows {
		out.Data = append(out.Data, q.show(&rows[i]))
	}
	return &reply{body: out}, nil
}

func (q *usageQuery) groupBy(text string) error {
	if text == "" {
		return nil
	}
	for by := range strings.SplitSeq(text, ",") {
		to, ok := map[string]*bool{"project": &q.byProject, "token": &q.byToken, "model": &q.byModel, "endpoint": &q.byEndpoint, "outcome": &q.byOutcome}[by]
		if !ok || *to {
			return badRequest("invalid_value", "group_by", "group_by must list some of project, token, model, endpoint and outcome, each once.")
		}
		*to = true
	}
	return nil
}

// show leaves out what the rows are not grouped by.
func (q *usageQuery) show(u *usageRow) usageReply {
	v := usageReply{Calls: u.calls, InputTokens: u.input, CachedTokens: u.cached, OutputTokens: u.output, ReasoningTokens: u.reasoning,
		Cost: dollars(u.cost), UnpricedCalls: u.unpriced, EstimatedCalls: u.estimated, WouldRefuse: u.wouldRefuse}
	if q.interval != "total" {
		v.At = new(stamp(u.at))
	}
	for _, f := range []struct {
		on   bool
		to   **string
		text *string
	}{{q.byProject, &v.ProjectID, &u.projectID}, {q.byProject, &v.ProjectName, &u.projectName}, {q.byToken, &v.TokenID, &u.tokenID},
		{q.byToken, &v.TokenName, &u.tokenName}, {q.byModel, &v.Model, &u.model}, {q.byEndpoint, &v.Endpoint, &u.endpoint}, {q.byOutcome, &v.Outcome, &u.outcome}} {
		if f.on {
			*f.to = f.text
		}
	}
	return v
}

type priceView struct {
	ID          string           `json:"id"`
	Match       string           `json:"match"`
	Input       *json.RawMessage `json:"input"` // dollars per million tokens; null: none for this kind
	CachedInput *json.RawMessage `json:"cached_input"`
	CacheWrite  *json.RawMessage `json:"cache_write"`
	Output      *json.RawMessage `json:"output"`
	AudioInput  *json.RawMessage `json:"audio_input"`
	AudioOutput *json.RawMessage `json:"audio_output"`
	UpdatedAt   *stamp           `json:"updated_at"` // null: a list price
}

func showPrice(p *priceRow) priceView {
	perMillion := func(pico *int64) *json.RawMessage {
		if pico == nil {
			return nil
		}
		return new(json.RawMessage(formatDollars(*pico)))
	}
	v := priceView{p.id, p.match, perMillion(p.input), perMillion(p.cachedInput), perMillion(p.cacheWrite), perMillion(p.output),
		perMillion(p.audioInput), perMillion(p.audioOutput), nil}
	if p.updatedAt != 0 {
		v.UpdatedAt = new(stamp(p.updatedAt))
	}
	return v
}

func (p *priceRow) kinds() []**int64 {
	return []**int64{&p.input, &p.cachedInput, &p.cacheWrite, &p.output, &p.audioInput, &p.audioOutput}
}

// listPrices returns the operator's own prices, or with ?model= the price that
// a model has now, from whichever list, or nothing if nobody knows.
func (s *server) listPrices(r *manageRequest) (*reply, error) {
	if err := r.only("model", "provider"); err != nil {
		return nil, err
	}
	if model := r.query.Get("model"); model != "" {
		p, ok := s.prices.Load().lookup(r.query.Get("provider"), model)
		if !ok {
			return &reply{body: list[priceView]{Data: []priceView{}}}, nil
		}
		row := priceRow{match: model}
		for i, v := range []int64{p.input, p.cachedInput, p.cacheWrite, p.output, p.audioInput, p.audioOutput} {
			if v >= 0 {
				*row.kinds()[i] = new(v)
			}
		}
		return &reply{body: list[priceView]{Data: []priceView{showPrice(&row)}}}, nil
	}
	rows, err := s.store.listPrices(r.ctx)
	if err != nil {
		return nil, err
	}
	return &reply{body: pageOf(rows, len(rows), showPrice, func(*priceRow) string { return "" })}, nil
}

func (s *server) setPrice(r *manageRequest) (*reply, error) {
	var match opt[string]
	names := []string{"input", "cached_input", "cache_write", "output", "audio_input", "audio_output"}
	given := make([]opt[json.RawMessage], len(names))
	fields := map[string]any{"match": &match}
	for i, n := range names {
		fields[n] = &given[i]
	}
	if err := decodeObject(r.body, fields, names...); err != nil {
		return nil, err
	}
	if match.v == "" || len(match.v) > 256 || strings.ContainsFunc(match.v, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return nil, &fieldError{"match", "must be a model's name, or a pattern with *, of 1 to 256 bytes"}
	}
	row := &priceRow{id: newID("price"), match: match.v, updatedAt: r.now.UnixMilli()}
	for i, in := range given {
		if !in.given() {
			continue
		}
		pico, err := parseDollars(strings.Trim(string(in.v), `"`))
		if err != nil {
			return nil, &fieldError{names[i], "must be dollars per million tokens: 0 to 1000000, at most 6 decimals"}
		}
		*row.kinds()[i] = new(pico)
	}
	if row.input == nil && row.output == nil {
		return nil, &fieldError{"input", "or output is needed"}
	}
	if err := s.store.setPrice(r.ctx, r.by, row); err != nil {
		return nil, err
	}
	if err := s.loadPrices(r); err != nil {
		return nil, err
	}
	return &reply{status: http.StatusCreated, body: showPrice(row)}, nil
}

func (s *server) deletePrice(r *manageRequest) (*reply, error) {
	if err := s.store.deletePrice(r.ctx, r.by, r.path("id")); err != nil {
		return nil, err
	}
	if err := s.loadPrices(r); err != nil {
		return nil, err
	}
	return &reply{body: map[string]any{"id": r.path("id"), "deleted": true}}, nil
}

func (s *server) loadPrices(r *manageRequest) error {
	t, err := pricesOf(r.ctx, s.store)
	if err != nil {
		return fmt.Errorf("the price is stored, but not yet in force: %w", err)
	}
	s.prices.Store(t)
	return nil
}
