// This file has the handlers of /manage that read: running calls, the ledger, usage, the audit trail and stored
// content.
package main

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

type streamView struct {
	ID           string    `json:"id"` // of the request
	StartedAt    timestamp `json:"started_at"`
	AgeMS        int64     `json:"age_ms"`
	ProjectID    string    `json:"project_id"`
	ProjectName  string    `json:"project_name"`
	TokenID      string    `json:"token_id"`
	TokenName    string    `json:"token_name"`
	UpstreamID   string    `json:"upstream_id"`
	Endpoint     string    `json:"endpoint"`
	Model        string    `json:"model"` // as requested
	Stream       bool      `json:"stream"`
	Address      string    `json:"address"`
	State        string    `json:"state"`         // what the call waits for: ledger, provider, relaying or writing
	Bytes        int64     `json:"bytes"`         // of the response so far
	InputTokens  int64     `json:"input_tokens"`  // an estimate
	OutputTokens int64     `json:"output_tokens"` // so far, an estimate; of a streamed response only
	attributionJSON
	seq int64
}

// admittedCalls returns the running calls that were admitted, oldest first.
func (rc *runningCalls) admittedCalls(now time.Time) []streamView {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	out := make([]streamView, 0, len(rc.calls))
	for c := range rc.calls {
		info := c.info.Load()
		if info == nil { // not admitted yet
			continue
		}
		out = append(out, streamView{
			ID:           info.requestID,
			StartedAt:    timestamp(c.id >> idTimeShift), // as the ledger's row has it: ids are in this order
			AgeMS:        now.Sub(c.start).Milliseconds(),
			ProjectID:    info.project.id,
			ProjectName:  info.project.name,
			TokenID:      info.token.id,
			TokenName:    info.token.name,
			UpstreamID:   info.upstream.id,
			Endpoint:     info.endpoint.name(),
			Model:        info.model,
			Stream:       info.stream,
			Address:      info.address,
			State:        phaseNames[c.progress.phase.Load()],
			Bytes:        c.progress.bytesRelayed.Load(),
			InputTokens:  info.inputTokens,
			OutputTokens: c.progress.outputTokens.Load(),

			attributionJSON: newAttributionJSON(info.attribution),
			seq:             c.id,
		})
	}
	slices.SortFunc(out, func(a, b streamView) int { return cmp.Compare(a.seq, b.seq) })
	return out
}

// find returns an admitted running call, nil if there is none.
func (rc *runningCalls) find(id int64) *runningCall {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for c := range rc.calls {
		if c.id == id && c.info.Load() != nil {
			return c
		}
	}
	return nil
}

// A streamFilter narrows the list of running calls.
type streamFilter struct {
	project, token string // ids; "" for all
	attributionFilter
	afterSeq int64
	limit    int
}

// parseStreamFilter reads the filters and the page of a list of running calls.
func (ops *operations) parseStreamFilter(r *manageRequest) (streamFilter, error) {
	page, err := r.parseListQuery()
	if err != nil {
		return streamFilter{}, err
	}
	f := streamFilter{project: r.query.Get("project_id"), token: r.query.Get("token_id"), afterSeq: page.seq,
		limit: page.limit}
	f.attributionFilter, err = ops.parseAttributionFilter(r.ctx, f.project, r.query)
	return f, err
}

func (api *manageAPI) listStreams(r *manageRequest) (any, error) {
	f, err := api.ops.parseStreamFilter(r)
	if err != nil {
		return nil, err
	}
	return api.ops.listStreams(r.ctx, f, r.now)
}

func (api *manageAPI) abortStream(r *manageRequest) (any, error) {
	return r.deleted("id", api.ops.abortStream(r.ctx, r.origin, r.pathValue("id")))
}

type requestReply struct {
	ID               string        `json:"id"`
	StartedAt        timestamp     `json:"started_at"`
	ProjectID        string        `json:"project_id"`
	TokenID          string        `json:"token_id"`
	UpstreamID       string        `json:"upstream_id"`
	Endpoint         string        `json:"endpoint"`
	Model            string        `json:"model"`
	Stream           bool          `json:"stream"`
	Address          string        `json:"address"`
	Status           int           `json:"status"`
	Outcome          callOutcome   `json:"outcome"`
	ErrorCode        string        `json:"error_code"`
	UsageSource      usageSource   `json:"usage_source"`
	InputTokens      int64         `json:"input_tokens"`
	CachedTokens     int64         `json:"cached_tokens"`
	CacheWriteTokens int64         `json:"cache_write_tokens"`
	OutputTokens     int64         `json:"output_tokens"`
	ReasoningTokens  int64         `json:"reasoning_tokens"`
	Cost             *dollars      `json:"cost"` // null: the price is unknown, or nothing was billed
	FirstByteMS      *float64      `json:"first_byte_ms"`
	TotalMS          *float64      `json:"total_ms"`
	Attempts         int           `json:"attempts"`
	AttemptLog       []attemptLine `json:"attempt_log"`  // empty if there was one attempt
	LimitHit         string        `json:"limit_hit"`    // that refused the call, or would have (monitor only)
	Cache            string        `json:"cache"`        // cacheHit or cacheNone
	Saved            dollars       `json:"saved"`        // what the answer from the cache would have cost
	SavedMS          float64       `json:"saved_ms"`     // how much longer the provider would have taken
	ServiceTier      string        `json:"service_tier"` // "" for the standard one
	UsageDetails     usageDetails  `json:"usage_details"`
	RoutedBy         string        `json:"routed_by"`        // session, prompt, failover or ""
	ClientRetry      int64         `json:"client_retry"`     // as the client counts; 0: its first attempt, or unsaid
	IdempotencyHash  string        `json:"idempotency_hash"` // "" if there is no Idempotency-Key
	attributionJSON
}

// A requestDetail is a call with what its cost is made of.
type requestDetail struct {
	requestReply
	CostBreakdown *costBreakdown `json:"cost_breakdown"` // null: there is no cost, or its price is not known
	UnpricedKinds []string       `json:"unpriced_kinds"` // of usage, for want of whose price the call has no cost
}

func newRequestReply(v *requestView) requestReply {
	out := requestReply{
		ID:               formatRequestID(v.id),
		StartedAt:        timestamp(v.started),
		ProjectID:        v.projectID,
		TokenID:          v.tokenID,
		UpstreamID:       v.upstreamID,
		Endpoint:         v.endpoint,
		Model:            v.model,
		Stream:           v.stream,
		Address:          v.address,
		Status:           v.status,
		Outcome:          v.outcome,
		ErrorCode:        v.errorCode,
		UsageSource:      v.source,
		InputTokens:      v.counts.input,
		CachedTokens:     v.counts.cached,
		CacheWriteTokens: v.counts.cacheWrite,
		OutputTokens:     v.counts.output,
		ReasoningTokens:  v.counts.reasoning,
		FirstByteMS:      microsToMillis(v.nullFirstByteUS),
		TotalMS:          microsToMillis(v.nullTotalUS),
		Attempts:         v.attempts,
		AttemptLog:       []attemptLine{},
		LimitHit:         v.limitHit,
		Cache:            cmp.Or(v.cache, cacheNone),
		Saved:            dollars(v.saved),
		SavedMS:          float64(v.savedUS) / 1000,
		ServiceTier:      v.details.tier.String(),
		UsageDetails:     v.details,
		RoutedBy:         v.routedByText(),
		ClientRetry:      v.clientRetry,
		IdempotencyHash:  v.idempotencyText(),
		attributionJSON:  newAttributionJSON(v.attribution),
	}
	out.UsageDetails.audioInput, out.UsageDetails.audioOutput = v.counts.audioInput, v.counts.audioOutput
	if v.attemptLog != "" {
		_ = json.Unmarshal([]byte(v.attemptLog), &out.AttemptLog) // the program wrote it
	}
	if v.nullCost != nil {
		out.Cost = new(dollars(*v.nullCost))
	}
	return out
}

func (api *manageAPI) getRequest(r *manageRequest) (any, error) {
	id := parseRequestID(r.pathValue("id"))
	if id == 0 {
		return nil, errNotFound
	}
	v, err := api.store.requestByID(r.ctx, id)
	if err != nil {
		return nil, err
	}
	breakdown, missing, err := api.ops.breakdownOf(r.ctx, &v)
	return requestDetail{newRequestReply(&v), breakdown, missing}, err
}

func (api *manageAPI) listRequests(r *manageRequest) (any, error) {
	page, err := r.parseListQuery()
	if err != nil {
		return nil, err
	}
	f := requestFilter{
		project: r.query.Get("project_id"), token: r.query.Get("token_id"), outcome: r.query.Get("outcome"),
		before: math.MaxInt64, limit: page.limit}
	if f.outcome != "" && !slices.Contains(allOutcomes(), callOutcome(f.outcome)) {
		return nil, badRequest("invalid_value", "outcome",
			"outcome must be open, ok, refused, client_gone, truncated, upstream_error or lost.")
	}
	if f.cache, err = r.choiceParam("cache", cacheHit, cacheNone); err != nil {
		return nil, err
	}
	if f.attributionFilter, err = api.ops.parseAttributionFilter(r.ctx, f.project, r.query); err != nil {
		return nil, err
	}
	if f.search, err = parseCallSearch(r.query.Get("search")); err != nil {
		return nil, err
	}
	from, to, err := r.timeRange(time.Time{}, time.Time{})
	if err != nil {
		return nil, err
	}
	if !from.IsZero() {
		f.from = minIDAt(from)
	}
	if !to.IsZero() {
		f.before = minIDAt(to)
	}
	if page.seq > 0 {
		f.before = min(f.before, page.seq)
	}
	return api.ops.listRequests(r.ctx, f)
}

// listRequests returns a page of the ledger, newest first.
func (ops *operations) listRequests(ctx context.Context, f requestFilter) (listPage[requestReply], error) {
	rows, next, err := ops.store.requestsPage(ctx, f)
	l := newListPage(rows, f.limit, newRequestReply, nil)
	if next != 0 {
		l.Next = formatCursor(next, "")
	}
	return l, err
}

type usageReply struct {
	At              *timestamp `json:"at,omitempty"` // start of the hour, day or month
	ProjectID       *string    `json:"project_id,omitempty"`
	ProjectName     *string    `json:"project_name,omitempty"`
	TokenID         *string    `json:"token_id,omitempty"`
	TokenName       *string    `json:"token_name,omitempty"`
	Model           *string    `json:"model,omitempty"` // "": names without sums of their own, see requestRow.sumModel
	Endpoint        *string    `json:"endpoint,omitempty"`
	Outcome         *string    `json:"outcome,omitempty"`
	Cache           *string    `json:"cache,omitempty"`        // cacheHit or cacheNone
	ServiceTier     *string    `json:"service_tier,omitempty"` // "": the standard one
	Session         *string    `json:"session,omitempty"`      // the value of the attribute that is grouped by;
	EndUser         *string    `json:"end_user,omitempty"`     // absent: Rest says what the row stands for
	Tag             *string    `json:"tag,omitempty"`
	Rest            string     `json:"rest,omitempty"` // restOther or restNone
	Calls           int64      `json:"calls"`
	InputTokens     int64      `json:"input_tokens"`
	CachedTokens    int64      `json:"cached_tokens"`
	OutputTokens    int64      `json:"output_tokens"`
	ReasoningTokens int64      `json:"reasoning_tokens"`
	Cost            dollars    `json:"cost"` // of the calls with a known price
	UnpricedCalls   int64      `json:"unpriced_calls"`
	EstimatedCalls  int64      `json:"estimated_calls"`
	WouldRefuse     *int64     `json:"would_refuse,omitempty"` // calls that a monitor-only limit would have refused
	CacheHits       int64      `json:"cache_hits"`
	Saved           dollars    `json:"saved"` // by these
	SavedMS         float64    `json:"saved_ms"`
	PromptSaved     dollars    `json:"prompt_cache_saved"` // what cached input would have cost more
	ClientRetries   *int64     `json:"client_retries,omitempty"`
}

const maxUsageRows = 10_000

// getUsage adds up usage over a range of time, by interval and by group.
func (api *manageAPI) getUsage(r *manageRequest) (any, error) {
	q := usageQuery{project: r.query.Get("project_id"), token: r.query.Get("token_id"), limit: maxUsageRows,
		interval: cmp.Or(r.query.Get("interval"), "day")}
	const day = 24 * time.Hour
	defaults := map[string]time.Duration{"hour": day, "day": 30 * day, "month": 365 * day, "total": 30 * day}
	lookBack := defaults[q.interval]
	if lookBack == 0 {
		return nil, badRequest("invalid_value", "interval", "interval must be hour, day, month or total.")
	}
	format, err := r.choiceParam("format", "json", "csv")
	if err != nil {
		return nil, err
	}
	if err := q.parseGroupBy(r.query.Get("group_by")); err != nil {
		return nil, err
	}
	if err := q.parseTop(r.query.Get("top")); err != nil {
		return nil, err
	}
	from, to, err := r.timeRange(time.Time{}, r.now.UTC())
	if err != nil {
		return nil, err
	}
	if from.IsZero() {
		from = to.Add(-lookBack)
	}
	q.setRange(from, to, r.now.UTC(), r.query.Get("from") != "")
	rows, err := api.store.usage(r.ctx, q)
	if errors.Is(err, errTooManyRows) {
		return nil, badRequest("too_many_rows", "", "The response would have more than 10,000 rows. "+
			"Select one project, a shorter time, a longer interval or fewer groups.")
	}
	if err != nil {
		return nil, err
	}
	out := usageListReply{From: timestamp(q.from), To: timestamp(q.to), Data: []usageReply{}}
	for i := range rows {
		out.Data = append(out.Data, q.newReply(&rows[i]))
	}
	if format == "csv" || format == "" && strings.HasPrefix(r.http.Header.Get("Accept"), "text/csv") {
		return newCSVTable(usageColumns(), out.Data)
	}
	return out, nil
}

// A usageListReply has the sums, and the range of time that they cover.
type usageListReply struct {
	From timestamp    `json:"from"`
	To   timestamp    `json:"to"`
	Data []usageReply `json:"data"`
}

// usageColumns returns the columns of a usageListReply as a table. They do not depend on what is grouped by.
func usageColumns() []string {
	return strings.Fields("at project_id project_name token_id token_name model endpoint outcome cache service_tier " +
		"session end_user tag rest calls input_tokens cached_tokens output_tokens reasoning_tokens cost " +
		"unpriced_calls estimated_calls would_refuse cache_hits saved saved_ms prompt_cache_saved client_retries")
}

// newReply shows a row, without the columns that are not grouped by.
func (q *usageQuery) newReply(u *usageRow) usageReply {
	v := usageReply{
		Calls:           u.calls,
		InputTokens:     u.input,
		CachedTokens:    u.cached,
		OutputTokens:    u.output,
		ReasoningTokens: u.reasoning,
		Cost:            dollars(u.cost),
		UnpricedCalls:   u.unpriced,
		EstimatedCalls:  u.estimated,
		CacheHits:       u.hits,
		Saved:           dollars(u.saved),
		SavedMS:         float64(u.savedUS) / 1000,
		PromptSaved:     dollars(u.promptSaved),
	}
	if q.interval != "total" {
		v.At = new(timestamp(u.at))
	}
	if q.byProject {
		v.ProjectID, v.ProjectName = &u.projectID, &u.projectName
	}
	if q.byToken {
		v.TokenID, v.TokenName = &u.tokenID, &u.tokenName
	}
	if q.byModel {
		v.Model = &u.model
	}
	if q.byEndpoint {
		v.Endpoint = &u.endpoint
	}
	if q.byOutcome {
		v.Outcome = &u.outcome
	}
	if q.byServiceTier {
		v.ServiceTier = &u.serviceTier
	}
	if v.Rest = u.rest; u.rest == "" {
		switch q.attribute {
		case "":
		case sessionAttribute:
			v.Session = &u.value
		case endUserAttribute:
			v.EndUser = &u.value
		default:
			v.Tag = &u.value
		}
	}
	if q.byCache {
		v.Cache = &u.cache
	} else { // the sums do not say which of these calls the cache answered
		v.WouldRefuse, v.ClientRetries = &u.wouldRefuse, &u.clientRetries
	}
	return v
}

type auditView struct {
	Seq       int64           `json:"seq"`
	At        timestamp       `json:"at"`
	Actor     string          `json:"actor"`
	ActorName string          `json:"actor_name"` // the current name of the key
	Role      role            `json:"role"`
	Address   string          `json:"address"`
	RequestID string          `json:"request_id"`
	Action    string          `json:"action"`
	Object    string          `json:"object"`
	Detail    json.RawMessage `json:"detail"`
}

func newAuditView(r *auditRow) auditView {
	v := auditView{
		Seq:       r.seq,
		At:        timestamp(r.at),
		Actor:     r.actorID,
		ActorName: r.actorName,
		Role:      r.role,
		Address:   r.address,
		RequestID: r.requestID,
		Action:    r.action,
		Object:    r.object,
		Detail:    json.RawMessage(r.detail),
	}
	if !json.Valid(v.Detail) { // someone edited the database; the list must still show the event
		v.Detail = mustMarshal(map[string]string{"unreadable": r.detail})
	}
	return v
}

// listAudit returns a page of the audit trail, newest first.
func (ops *operations) listAudit(ctx context.Context, f auditFilter) (listPage[auditView], error) {
	rows, err := ops.store.listAudit(ctx, f)
	return newListPage(rows, f.limit-1, newAuditView, func(e *auditRow) string {
		return formatCursor(e.seq, strconv.FormatInt(e.at, 10))
	}), err
}

func (api *manageAPI) listAudit(r *manageRequest) (any, error) {
	f, err := r.parseAuditFilter()
	if err != nil {
		return nil, err
	}
	return api.ops.listAudit(r.ctx, f)
}

// A contentView is the stored content of a call.
type contentView struct {
	ID      string    `json:"id"`
	Until   timestamp `json:"kept_until"`
	Request bodyView  `json:"request"`
	Answer  bodyView  `json:"answer"`
}

// A bodyView is one body: as text, or in base64 if it is not UTF-8.
type bodyView struct {
	Bytes  int64   `json:"bytes"`
	Kept   int64   `json:"kept_bytes"`
	Text   *string `json:"text"`
	Base64 *string `json:"base64"`
}

// newBodyView shows the stored start of a body of size bytes. An incomplete character at its end is omitted.
func newBodyView(stored string, size int64) bodyView {
	v := bodyView{Bytes: size, Kept: int64(len(stored))}
	whole := stored
	for cut := 0; cut < utf8.UTFMax && int64(len(stored)) < size && !utf8.ValidString(whole); cut++ {
		whole = stored[:max(len(stored)-cut-1, 0)]
	}
	if utf8.ValidString(whole) {
		v.Text = &whole
	} else {
		v.Base64 = new(base64.StdEncoding.EncodeToString([]byte(stored)))
	}
	return v
}

func (api *manageAPI) getContent(r *manageRequest) (any, error) {
	return api.ops.revealContent(r.ctx, r.origin, r.pathValue("id"))
}

func (api *manageAPI) eraseContent(r *manageRequest) (any, error) {
	n, err := api.ops.eraseContent(r.ctx, r.origin, r.pathValue("id"))
	return map[string]any{"erased": n}, err
}

// revealContent returns the stored content of a call, after the audit trail has recorded who reads it.
func (ops *operations) revealContent(ctx context.Context, origin auditOrigin, requestID string) (*contentView, error) {
	id := parseRequestID(requestID)
	if id == 0 {
		return nil, errNotFound
	}
	row, err := ops.store.contentByID(ctx, id, origin.at)
	if err != nil {
		return nil, err
	}
	event := auditEvent{action: actionReveal, object: formatRequestID(id), detail: []auditField{{"what", "content"}}}
	if err := ops.store.recordAuditEvent(ctx, origin, event); err != nil {
		return nil, fmt.Errorf("recording who reads content: %w", err)
	}
	request, response, err := ops.contentKey.open(row)
	if err != nil {
		return nil, fmt.Errorf("content of %s: %w", formatRequestID(id), err)
	}
	return &contentView{
		ID:      formatRequestID(id),
		Until:   timestamp(row.expiresAt),
		Request: newBodyView(request(), row.requestBytes),
		Answer:  newBodyView(response(), row.responseBytes),
	}, nil
}

// An unpricedModel is a model that had calls without a known cost.
type unpricedModel struct {
	Model         string `json:"model"` // "": names without sums of their own
	Calls         int64  `json:"calls"`
	UnpricedCalls int64  `json:"unpriced_calls"`
	InputTokens   int64  `json:"input_tokens"` // of all its calls
	OutputTokens  int64  `json:"output_tokens"`
}

func (api *manageAPI) listUnpriced(r *manageRequest) (any, error) {
	return api.ops.listUnpriced(r.ctx, r.now)
}

// listUnpriced returns the models of the last 30 days that had calls without a known cost, most calls first.
func (ops *operations) listUnpriced(ctx context.Context, now time.Time) (listPage[unpricedModel], error) {
	to := now.UnixMilli()
	from := to - 30*dayMS
	rows, err := ops.store.usage(ctx, usageQuery{interval: "total", byModel: true, from: from - from%dayMS, to: to,
		limit: maxUsageRows})
	out := listPage[unpricedModel]{Data: []unpricedModel{}}
	for i := range rows {
		if u := &rows[i]; u.unpriced > 0 {
			out.Data = append(out.Data, unpricedModel{Model: u.model, Calls: u.calls, UnpricedCalls: u.unpriced,
				InputTokens: u.input, OutputTokens: u.output})
		}
	}
	slices.SortStableFunc(out.Data, func(a, b unpricedModel) int {
		return cmp.Compare(b.UnpricedCalls, a.UnpricedCalls)
	})
	return out, err
}

// maxReportedValues is how many values of a limit with for_each a report may have.
const maxReportedValues = 500

// valueParams are the query parameters that withValueQuery reads.
func valueParams() []string { return []string{"limit_values", "limit_value"} }

// withValueQuery returns a handler that reads which values of limits with for_each are to be shown: limit_values of
// those that have used most, or limit_value alone. Without either, none is.
func withValueQuery(handle func(*manageRequest, valueQuery) (any, error)) func(*manageRequest) (any, error) {
	return func(r *manageRequest) (any, error) {
		q := valueQuery{}
		if v := r.query.Get("limit_value"); v != "" {
			q.names = []string{v}
		}
		if v := r.query.Get("limit_values"); v != "" {
			n, err := strconv.Atoi(v)
			if err != nil || n < 1 || n > maxReportedValues {
				return nil, badRequest("invalid_value", "limit_values", fmt.Sprintf(
					"limit_values must be a whole number from 1 to %d.", maxReportedValues))
			}
			if q.top = n; q.single() {
				return nil, badRequest("invalid_value", "limit_value", "Use limit_values or limit_value, not both.")
			}
		}
		return handle(r, q)
	}
}

func (api *manageAPI) eraseEndUser(r *manageRequest) (any, error) {
	n, err := api.ops.eraseEndUser(r.ctx, r.origin, r.pathValue("id"), r.query.Get("end_user"))
	return map[string]any{"erased": n}, err
}

// A callSession is a session of a client: what its calls used, and a list page of them, the first one first.
type callSession struct {
	Session         string    `json:"session"`
	Calls           int64     `json:"calls"` // that have ended, like the sums
	Partial         bool      `json:"partial"`
	FirstAt         timestamp `json:"first_at"`
	LastAt          timestamp `json:"last_at"`
	InputTokens     int64     `json:"input_tokens"`
	CachedTokens    int64     `json:"cached_tokens"`
	CachedShare     float64   `json:"cached_share"` // of the input tokens
	OutputTokens    int64     `json:"output_tokens"`
	ReasoningTokens int64     `json:"reasoning_tokens"`
	Cost            dollars   `json:"cost"` // of the calls with a known price
	UnpricedCalls   int64     `json:"unpriced_calls"`
	FailedCalls     int64     `json:"failed_calls"`
	listPage[requestReply]
	rows []requestView
}

// getSession returns a session of a project ("" for all), or errNotFound if it has no calls. after is the id of the
// last call before the page.
func (ops *operations) getSession(ctx context.Context, session, project string, after int64, limit int,
) (*callSession, error) {
	t, err := ops.store.sessionTotals(ctx, session, project)
	if err != nil {
		return nil, err
	}
	rows, err := ops.store.sessionCalls(ctx, session, project, after, limit+1)
	if err != nil {
		return nil, err
	}
	if t.calls == 0 && len(rows) == 0 {
		return nil, errNotFound
	}
	v := &callSession{Session: session, Calls: t.calls, Partial: t.calls == maxSessionCalls,
		FirstAt: timestamp(t.first), LastAt: timestamp(t.last), InputTokens: t.input, CachedTokens: t.cached,
		OutputTokens: t.output, ReasoningTokens: t.reasoning, Cost: dollars(t.cost), UnpricedCalls: t.unpriced,
		FailedCalls: t.failed}
	if t.calls == 0 { // the first ones are running
		v.FirstAt, v.LastAt = timestamp(rows[0].started), timestamp(rows[len(rows)-1].started)
	}
	if t.input > 0 {
		v.CachedShare = float64(t.cached) / float64(t.input)
	}
	v.rows = rows[:min(len(rows), limit)]
	v.listPage = newListPage(rows, limit, newRequestReply,
		func(r *requestView) string { return formatCursor(r.id, "") })
	return v, nil
}

func (api *manageAPI) getSession(r *manageRequest) (any, error) {
	page, err := r.parseListQuery()
	if err != nil {
		return nil, err
	}
	session := r.query.Get("session")
	if session == "" {
		return nil, badRequest("invalid_value", "session", "session must be the name of a session.")
	}
	return api.ops.getSession(r.ctx, session, r.query.Get("project_id"), page.seq, page.limit)
}

// cacheFilter reads which cached answers are meant, and how old they are at least, in seconds; 0: of any age.
func (r *manageRequest) cacheFilter() (f cacheFilter, olderThan int64, err error) {
	f = cacheFilter{model: r.query.Get("model"), endpoint: r.query.Get("endpoint")}
	if f.endpoint != "" && !namesCacheable(f.endpoint) {
		return f, 0, badRequest("invalid_value", "endpoint",
			"endpoint must name endpoints that can be cached, such as /v1/embeddings or POST /v1/chat/*.")
	}
	if v := r.query.Get("older_than_seconds"); v != "" {
		if olderThan, err = strconv.ParseInt(v, 10, 64); err != nil || olderThan < 1 || olderThan > maxCacheTTL {
			return f, 0, badRequest("invalid_value", "older_than_seconds",
				fmt.Sprintf("older_than_seconds must be a whole number from 1 to %d (30 days).", maxCacheTTL))
		}
	}
	return f, olderThan, nil
}
