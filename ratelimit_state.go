// This file gives the counters of limits their past use from the store, counts usage that becomes known after its call
// has ended, and shows the current state of limits: to administrators, to a token's holder, and in the rate limit
// headers of each answer. It reads the store; what it records goes through the ledger.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// limitLoadTimeout is how long the calls of a project may wait until the past use of a new limit is read.
const limitLoadTimeout = 2 * time.Second

// A limitState is the access to the limits of tokens and projects, live or not.
type limitState struct {
	store    *store
	ledger   *ledger
	registry *registry
}

// syncLimits applies the limits of t's policy and of its project's policy. The caller holds the limiter's mu, so
// that no call of the project starts or ends at the same time.
func (ls *limitState) syncLimits(t *liveToken, now int64) error {
	if err := ls.syncProjectLimits(t.project, now); err != nil {
		return err
	}
	st := t.state.Load()
	return ls.syncScope(&t.project.limiter, &t.limits, &st.policy, t.project.state.Load().seq, st.seq, now)
}

func (ls *limitState) syncProjectLimits(p *liveProject, now int64) error {
	st := p.state.Load()
	return ls.syncScope(&p.limiter, &p.limiter.project, &st.policy, st.seq, 0, now)
}

// syncScope replaces the counters of s by those of p, unless s has p already.
func (ls *limitState) syncScope(l *limiter, s *limitScope, p *policy, project, token, now int64) error {
	if s.policy == p {
		return nil
	}
	var past []periodUsage
	if s.needsHistory(p) {
		ctx, cancel := context.WithTimeout(context.Background(), limitLoadTimeout)
		defer cancel()
		if s.admitted { // its use may not be in the stored sums yet
			if err := ls.ledger.flush(ctx); err != nil {
				return fmt.Errorf("waiting for the ledger: %w", err)
			}
		}
		var err error
		if past, err = ls.loadPastUsage(ctx, p, project, token, now); err != nil {
			return err
		}
	}
	l.setPolicy(s, p, now, func(l *limit) int64 { return sumUsage(past, l) })
	return nil
}

// A shownResponse is a stored response as an answer shows it.
type shownResponse struct {
	id                string
	project, upstream int64  // of the call that got the answer
	meter             *meter // has read the answer
	deleted           bool   // the answer says that it is deleted
	vendor            string
	prices            *priceTable
}

// settleResponse records what a background response has used, if the answer says so and it was not known. The usage
// belongs to the call that made the response, whoever asks. It returns the usage.
func (ls *limitState) settleResponse(shown *shownResponse) (row requestRow, err error) {
	if _, _, known := shown.meter.responseUsage(0); !known && !shown.deleted {
		return row, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), limitLoadTimeout)
	defer cancel()
	// The call that made it may have ended a moment ago.
	if err = ls.ledger.awaitIfHealthy(ctx, ls.ledger.queuedSoFar()); err != nil {
		return row, err
	}
	row, err = ls.store.pendingUsage(ctx, shown.project, shown.upstream, shown.id)
	if err != nil {
		if errors.Is(err, errNotFound) {
			err = nil
		}
		return row, err
	}
	var known bool
	if row.counts, row.source, known = shown.meter.responseUsage(row.reservedInput); !known { // nobody can ask any more
		row.countReserved()
	}
	row.details = shown.meter.details
	return row, ls.recordResponse(&row, shown.prices, shown.vendor, shown.meter.model)
}

// maxResponseAge is how long the usage of a background response may stay unknown. Then it counts what was reserved.
const maxResponseAge = 24 * time.Hour

// expireResponses records the usage of background responses of which nothing was heard for maxAge.
func (ls *limitState) expireResponses(ctx context.Context, now time.Time, maxAge time.Duration, prices *priceTable,
) error {
	rows, err := ls.store.expiredUsage(ctx, minIDAt(now.Add(-maxAge)), 1000)
	for i := range rows {
		rows[i].countReserved()
		err = errors.Join(err, ls.recordResponse(&rows[i], prices, "", rows[i].model))
	}
	return err
}

// recordResponse records the usage of a background response, by the price of the model that answered, or of another
// name that the call had for it.
func (ls *limitState) recordResponse(row *requestRow, prices *priceTable, vendor, model string) error {
	if row.source != usageNone {
		if p := ls.registry.liveProject(row.project); p != nil {
			state := p.state.Load()
			row.details.multiplier = combinedMultiplier(state.multiplier, 0)
			for _, u := range state.upstreams {
				if u.seq == row.upstream {
					row.details.multiplier = combinedMultiplier(state.multiplier, u.settings.CostMultiplier)
					row.details.region = cmp.Or(row.details.region, hostRegion(u.host))
					vendor = cmp.Or(vendor, priceVendor(u.provider, u.host))
				}
			}
		}
		prices.priceRow(row, vendor, model, row.model, row.requestedModel)
	}
	return ls.recordUsage(row)
}

// showsBatch reports whether an answer of the endpoint shows batches of whose ids the proxy remembers who made them, or
// which files have their results.
func (e *endpoint) showsBatch() bool {
	return strings.HasPrefix(e.pattern, "/v1/batches") || e.name() == "POST /v1/messages/batches"
}

// hasResults reports whether an answer of the endpoint may be the results of a batch. Other files have another form.
func (e *endpoint) hasResults() bool {
	return e.pattern == "/v1/files/{file_id}/content" || e.pattern == "/v1/messages/batches/{message_batch_id}/results"
}

// A batchAnswer is an answer that shows batches, or has the results of one.
type batchAnswer struct {
	call     requestRow  // that gets the answer: usageOf is its id
	host     string      // of the provider
	object   string      // the batchName of what has the results
	isNew    bool        // the answer shows a batch that the call has made
	isPart   bool        // of a file
	results  *batchMeter // nil: the answer shows batches
	shown    []byte      // what has been read of an answer that does
	memory   *bodyShare  // for that
	tooLarge bool
}

// newBatchAnswer returns what reads the answers of an endpoint that show batches or may have results, nil for those of
// any other. path is the call's; multiplier is of its project's costs.
func newBatchAnswer(e *endpoint, u *upstream, path string, prices *priceTable, multiplier int64) *batchAnswer {
	if !e.showsBatch() && !e.hasResults() {
		return nil
	}
	b := &batchAnswer{host: u.host, object: resultsName(u.host, path),
		isNew: e.method == http.MethodPost && !strings.Contains(e.pattern, "{")}
	if e.showsBatch() {
		return b
	}
	kind := meterOpenAI
	if e.api == apiAnthropic {
		kind = meterAnthropic
	}
	answer := usageDetails{region: hostRegion(u.host),
		multiplier: combinedMultiplier(multiplier, u.settings.CostMultiplier)}
	vendor, now := priceVendor(u.provider, u.host), time.Now().UnixMilli()
	b.results = newBatchMeter(kind, answer, func(row *requestRow) {
		row.started = now
		prices.priceRow(row, vendor, row.model)
	})
	return b
}

// setBody says what memory an answer may take, and whether it is a part of a file. b may be nil.
func (b *batchAnswer) setBody(memory *bodyShare, isPart bool) {
	if b != nil {
		b.memory, b.isPart = memory, isPart
	}
}

// batchName returns what names a batch, or a file with results: ids are unique at one host.
func batchName(host, id string) string { return host + " " + id }

// resultsName returns the batchName of the results at a path: /v1/files/{file_id}/content and such.
func resultsName(host, path string) string {
	parts := strings.Split(path, "/")
	return batchName(host, parts[max(len(parts)-2, 0)])
}

// maxShownBatches is the most that is read of an answer that shows batches. A list has up to 100 of them.
const maxShownBatches = 1 << 20 // bytes

// process reads the next bytes of the answer. b may be nil.
func (b *batchAnswer) process(p []byte) {
	switch {
	case b == nil:
	case b.results != nil:
		b.results.process(p)
	case b.tooLarge || len(b.shown)+len(p) > maxShownBatches || b.memory.reserve(int64(len(p))) != nil:
		b.tooLarge = true
	default:
		b.shown = append(b.shown, p...)
	}
}

// recordBatch remembers the batches that an answer has shown, or records the usage of the results that it had, and
// returns what was counted. row is that of the call that got it; answer
// may be nil.
func (ls *limitState) recordBatch(answer *batchAnswer, row *requestRow) (counted []requestRow, err error) {
	if answer == nil {
		return nil, nil
	}
	answer.call = requestRow{usageOf: row.id, started: row.started, project: row.project, token: row.token,
		endpoint: row.endpoint, outcome: row.outcome, attribution: row.attribution}
	if answer.results == nil {
		return nil, ls.recordBatches(answer)
	}
	answer.results.finish()
	return ls.recordResults(answer)
}

// A batchObject is a batch as OpenAI's and Anthropic's API show it.
type batchObject struct {
	ID     string `json:"id"`
	Output string `json:"output_file_id"`
	Errors string `json:"error_file_id"`
}

// maxObjectID is the length of the longest id of a batch or file that is remembered.
const maxObjectID = 128 // bytes

// recordBatches remembers which call has made a batch, and which files have the results of one.
func (ls *limitState) recordBatches(answer *batchAnswer) error {
	var list struct {
		batchObject
		Data []batchObject `json:"data"`
	}
	if answer.tooLarge || json.Unmarshal(answer.shown, &list) != nil {
		return nil // it shows none, or the provider's answer was cut
	}
	ctx, cancel := context.WithTimeout(context.Background(), limitLoadTimeout)
	defer cancel()
	if answer.isNew && list.ID != "" && len(list.ID) <= maxObjectID {
		return ls.store.addBatch(ctx, batchName(answer.host, list.ID), &answer.call)
	}
	for _, b := range append(list.Data, list.batchObject) {
		for _, file := range [...]string{b.Output, b.Errors} {
			if b.ID == "" || file == "" || len(b.ID)+len(file) > 2*maxObjectID {
				continue
			}
			if _, err := ls.store.batchMaker(ctx, batchName(answer.host, file)); !errors.Is(err, errNotFound) {
				continue // it is known
			}
			maker, err := ls.store.batchMaker(ctx, batchName(answer.host, b.ID))
			if err != nil && !errors.Is(err, errNotFound) {
				return err
			}
			if err := ls.store.addBatch(ctx, batchName(answer.host, file), &maker); err != nil {
				return err
			}
		}
	}
	return nil
}

// hasKnownResults reports whether a path is known to have the results of a batch, which the proxy must read whole.
func (ls *limitState) hasKnownResults(ctx context.Context, host, path string) bool {
	_, err := ls.store.batchMaker(ctx, resultsName(host, path))
	return !errors.Is(err, errNotFound)
}

// recordResults records the usage of the results that an answer had, as far as it was not counted before. It belongs to
// the call that made the batch, if that is known, and otherwise to the call that read them; it counts at the time at
// which they were read. recordResults returns what was counted.
func (ls *limitState) recordResults(answer *batchAnswer) (counted []requestRow, err error) {
	if !answer.results.isResult {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), limitLoadTimeout)
	defer cancel()
	owner, err := ls.store.batchMaker(ctx, answer.object)
	if errors.Is(err, errNotFound) {
		err = ls.store.addBatch(ctx, answer.object, &owner)
	}
	if err != nil {
		return nil, err
	}
	if owner.usageOf == 0 {
		owner = answer.call
	}
	owner.started, owner.batch = answer.call.started, answer.object
	for i := range answer.results.models {
		row, err := ls.recordModelResults(ctx, answer, owner, &answer.results.models[i])
		if err != nil {
			return counted, err
		}
		if row.counted {
			counted = append(counted, row)
		}
	}
	return counted, nil
}

// maxResultAttempts is how often the usage of results is computed anew because another call has read them meanwhile.
const maxResultAttempts = 100

// recordModelResults is recordResults for the answers of one model.
func (ls *limitState) recordModelResults(ctx context.Context, answer *batchAnswer, owner requestRow, read *batchUsage,
) (requestRow, error) {
	var allRead int64 // lines of the model, whether they have a price or not
	for _, u := range answer.results.models {
		if u.model == read.model {
			allRead = addSat(allRead, u.lines)
		}
	}
	for range maxResultAttempts {
		before, err := ls.store.countedUsage(ctx, owner.batch, read.model)
		if err != nil {
			return owner, err
		}
		var allCounted int64
		var counted batchUsage
		for _, u := range before {
			if allCounted = addSat(allCounted, u.lines); u.priced == read.priced {
				counted = u
			}
		}
		fresh := *read
		if !answer.isPart { // a part has other lines than those that were counted
			fresh = read.withoutCounted(&counted)
		}
		if fresh.lines == 0 || allRead <= allCounted && !answer.isPart {
			return owner, nil
		}
		row := owner
		row.model, row.requestedModel, row.source = read.model, read.model, read.source
		row.counts, row.details, row.price = fresh.counts, fresh.details, fresh.price
		row.cost, row.promptSaved, row.priced = fresh.cost, fresh.promptSaved, read.priced
		row.batchLines, row.linesCounted = fresh.lines, counted.lines
		if t := ls.registry.liveTokenOf(owner.token); t != nil && read.model != "" {
			row.modelTracked = t.trackModel(read.model)
			row.requestedModelTracked = row.modelTracked
		}
		if err := ls.recordUsage(&row); err != nil || row.counted {
			return row, err
		}
	}
	return owner, errors.New("other calls read the results at the same time")
}

// recordUsage records the usage of a call that has become known after its end, and counts it in the limits of the
// token that made the call and of its project. The limiter is locked meanwhile, so that no new counter finds it twice.
func (ls *limitState) recordUsage(r *requestRow) error {
	ctx, cancel := context.WithTimeout(context.Background(), limitLoadTimeout)
	defer cancel()
	p := ls.registry.liveProject(r.project)
	if p == nil {
		ls.ledger.recordUsage(r)
		return ls.ledger.awaitIfHealthy(ctx, ls.ledger.queuedSoFar())
	}
	p.limiter.mu.Lock()
	defer p.limiter.mu.Unlock()
	ls.ledger.recordUsage(r)
	if err := ls.ledger.awaitIfHealthy(ctx, ls.ledger.queuedSoFar()); err != nil || !r.counted {
		return err
	}
	now := time.Now().UnixMilli()
	countLate(p.limiter.project.counters, r, now)
	if t := ls.registry.liveTokenOf(r.token); t != nil {
		countLate(t.limits.counters, r, now)
	}
	return nil
}

// A periodUsage is what was used in the current window of a period.
type periodUsage struct {
	period limitPeriod
	rows   []pastUsage
}

// loadPastUsage reads what was used in the current window of each limit of p.
func (ls *limitState) loadPastUsage(ctx context.Context, p *policy, project, token, now int64) ([]periodUsage, error) {
	var out []periodUsage
	for i := range p.Limits {
		period := p.Limits[i].period
		if period < perHour || slices.ContainsFunc(out, func(o periodUsage) bool { return o.period == period }) {
			continue
		}
		grain := "day"
		if period == perHour {
			grain = "hour"
		}
		from, _ := period.window(now)
		rows, err := ls.store.usageSince(ctx, grain, project, token, from)
		if err != nil {
			return nil, err
		}
		reserved, err := ls.store.reservedSince(ctx, project, token, minIDAt(time.UnixMilli(from)))
		if err != nil {
			return nil, err
		}
		out = append(out, periodUsage{period, append(rows, reserved...)})
	}
	return out, nil
}

// sumUsage adds up what counts in l. Models without their own sums count in every limit, so after a restart a
// limit may refuse too early, but never too late.
func sumUsage(past []periodUsage, l *limit) (n int64) {
	for _, p := range past {
		if p.period != l.period {
			continue
		}
		for _, u := range p.rows {
			_, pattern, _ := strings.Cut(u.endpoint, " ")
			model := u.requestedModel
			if model == otherModels {
				model = strings.TrimSuffix(l.model, "*")
			}
			if !l.applies(u.endpoint, pattern, model) {
				continue
			}
			switch l.metric {
			case metricRequests:
				n = addSat(n, u.calls)
			case metricTokens:
				n = addSat(n, addSat(u.inputTokens, u.outputTokens))
			case metricDollars:
				n = addSat(n, u.nanosUSD)
			}
		}
	}
	return n
}

// A limitView is the current state of a limit in JSON.
type limitView struct {
	Count       string          `json:"count"`
	Max         json.RawMessage `json:"max"`
	Per         string          `json:"per,omitempty"`
	Endpoint    string          `json:"endpoint,omitempty"`
	Model       string          `json:"model,omitempty"`
	Shadow      bool            `json:"shadow"`
	Used        json.RawMessage `json:"used"`
	Reserved    json.RawMessage `json:"reserved"` // by running calls
	Left        json.RawMessage `json:"left"`
	ResetsAt    *timestamp      `json:"resets_at"`    // null: never, or when running calls end
	WouldRefuse int64           `json:"would_refuse"` // calls since the limit was loaded
}

func newLimitViews(counters []*limitCounter, now int64) []limitView {
	out := make([]limitView, 0, len(counters))
	for _, c := range counters {
		c.advance(now)
		l := c.limit
		v := limitView{
			Count: l.metric.String(), Max: l.valueJSON(l.max), Per: l.period.String(),
			Endpoint: l.endpoint, Model: l.model, Shadow: l.monitorOnly,
			Used: l.valueJSON(c.unscaledUse()), Reserved: l.valueJSON(c.reserved), Left: l.valueJSON(c.remaining()),
			WouldRefuse: c.wouldRefuse,
		}
		if l.metric == metricConcurrent { // running calls are in use, not reserved
			v.Used, v.Reserved = v.Reserved, v.Used
		}
		if at := c.resetTime(now); at > now {
			v.ResetsAt = new(timestamp(at))
		}
		out = append(out, v)
	}
	return out
}

// resetTime returns when the whole limit is available again without further calls, or 0 if that is unknown or
// never.
func (c *limitCounter) resetTime(now int64) int64 {
	switch {
	case c.limit.period.bucketMS() > 0 && c.limit.max > 0:
		return now + (c.used+c.limit.max-1)/c.limit.max
	case c.windowEnd > 0:
		return c.windowEnd
	}
	return 0
}

// withLiveUsage returns the row with the calls that it does not include yet: a row counts a call after its end.
func (ls *limitState) withLiveUsage(row *tokenRow, now int64) *tokenRow {
	t := ls.registry.liveToken(row.id)
	if t == nil {
		return row
	}
	current := *row
	if current.requestCount = t.used.Load(); t.running.Load() > 0 {
		current.lastUsedAt = &now
	} else if current.requestCount > row.requestCount {
		current.lastUsedAt = new(t.lastUsed.Load())
	}
	return &current
}

// tokenLimits returns the state of a token's limits.
func (ls *limitState) tokenLimits(ctx context.Context, row *tokenRow, now int64) ([]limitView, error) {
	if t := ls.registry.liveToken(row.id); t != nil {
		t.project.limiter.mu.Lock()
		defer t.project.limiter.mu.Unlock()
		if err := ls.syncLimits(t, now); err != nil {
			return nil, errLimitsUnavailable(err)
		}
		return newLimitViews(t.limits.counters, now), nil
	}
	return ls.storedLimits(ctx, row.policy, false, row.project, row.seq, now)
}

// projectLimits returns the state of a project's limits.
func (ls *limitState) projectLimits(ctx context.Context, row *projectRow, now int64) ([]limitView, error) {
	if p := ls.registry.liveProject(row.seq); p != nil {
		p.limiter.mu.Lock()
		defer p.limiter.mu.Unlock()
		if err := ls.syncProjectLimits(p, now); err != nil {
			return nil, errLimitsUnavailable(err)
		}
		return newLimitViews(p.limiter.project.counters, now), nil
	}
	return ls.storedLimits(ctx, row.policy, true, row.seq, 0, now)
}

// storedLimits returns the state of the limits of a token or project that is not live.
func (ls *limitState) storedLimits(ctx context.Context, policyText string, ofProject bool, project, token, now int64,
) ([]limitView, error) {
	counters, err := ls.storedCounters(ctx, policyText, ofProject, project, token, now)
	if err != nil {
		return nil, err
	}
	return newLimitViews(counters, now), nil
}

// storedCounters returns the counters of a token or project that is not live: all its use is in the store.
func (ls *limitState) storedCounters(ctx context.Context, policyText string, ofProject bool, project, token, now int64,
) ([]*limitCounter, error) {
	p, err := parsePolicy([]byte(policyText), ofProject)
	if err != nil {
		return nil, err
	}
	past, err := ls.loadPastUsage(ctx, &p, project, token, now)
	if err != nil {
		return nil, err
	}
	counters := make([]*limitCounter, 0, len(p.Limits))
	for i := range p.Limits {
		counters = append(counters, newLimitCounter(&p.Limits[i], now, sumUsage(past, &p.Limits[i])))
	}
	return counters, nil
}

// A rateHeader is the state of one limit in the x-ratelimit-* headers.
type rateHeader struct {
	set              bool
	limit, remaining int64
	reset            time.Duration // until the whole limit is available again; 0: unknown
}

// rateHeaders describe a token's limits of requests and of tokens, of each the one with the least remaining.
type rateHeaders struct{ requests, tokens rateHeader }

// rateHeaders returns the headers of a token; maxRequests is its lifetime limit, or negative. The caller holds
// the limiter's mu. The project's limits are not included: they would reveal what other tokens use.
func (t *liveToken) rateHeaders(maxRequests, now int64) (r rateHeaders) {
	if maxRequests >= 0 {
		r.requests = rateHeader{set: true, limit: maxRequests, remaining: max(0, maxRequests-t.used.Load())}
	}
	for _, c := range t.limits.counters {
		header := &r.requests
		switch l := c.limit; {
		case l.metric == metricTokens:
			header = &r.tokens
		case l.metric != metricRequests:
			continue
		}
		if c.limit.monitorOnly {
			continue
		}
		c.advance(now)
		if n := c.remaining(); !header.set || n < header.remaining {
			reset := time.Duration(max(0, c.resetTime(now)-now)) * time.Millisecond
			*header = rateHeader{set: true, limit: c.limit.max, remaining: n, reset: reset}
		}
	}
	return r
}

// write sets the headers, in OpenAI's form.
func (r *rateHeaders) write(h http.Header) {
	r.requests.write(h, "X-Ratelimit-Limit-Requests", "X-Ratelimit-Remaining-Requests", "X-Ratelimit-Reset-Requests")
	r.tokens.write(h, "X-Ratelimit-Limit-Tokens", "X-Ratelimit-Remaining-Tokens", "X-Ratelimit-Reset-Tokens")
}

func (r *rateHeader) write(h http.Header, limit, remaining, reset string) {
	if !r.set {
		return
	}
	h[limit] = []string{strconv.FormatInt(r.limit, 10)}
	h[remaining] = []string{strconv.FormatInt(r.remaining, 10)}
	if r.reset > 0 {
		h[reset] = []string{r.reset.String()}
	}
}

// A nearLimit is a limit of a day or longer that is mostly used up.
type nearLimit struct {
	token, name, project, projectID string // token and name are "" for a project's limit
	limit                           string // as limit.String describes it
	fraction                        float64
}

// nearLimits returns the limits that are used up to the given fraction or more. It checks at most maxEach
// projects and maxEach tokens, to bound the cost of a page.
func (g *registry) nearLimits(now int64, fraction float64, maxEach int) []nearLimit {
	g.mu.RLock()
	var projects []*liveProject
	for _, p := range g.projects {
		if projects = append(projects, p); len(projects) == maxEach {
			break
		}
	}
	var tokens []*liveToken
	for _, t := range g.byID {
		if tokens = append(tokens, t); len(tokens) == maxEach {
			break
		}
	}
	g.mu.RUnlock()
	var out []nearLimit
	for _, p := range projects {
		st := p.state.Load()
		owner := nearLimit{project: st.name, projectID: st.id}
		out = append(out, p.limiter.nearLimits(&p.limiter.project, now, fraction, owner)...)
	}
	for _, t := range tokens {
		st, p := t.state.Load(), t.project.state.Load()
		owner := nearLimit{token: st.id, name: st.name, project: p.name, projectID: p.id}
		out = append(out, t.project.limiter.nearLimits(&t.limits, now, fraction, owner)...)
	}
	return out
}

// sortNearLimits sorts limits by fraction, the highest first.
func sortNearLimits(limits []nearLimit) {
	slices.SortFunc(limits, func(a, b nearLimit) int {
		return cmp.Or(cmp.Compare(b.fraction, a.fraction), cmp.Compare(a.project, b.project),
			cmp.Compare(a.name, b.name), cmp.Compare(a.limit, b.limit))
	})
}

// nearLimits returns the limits of a scope that are used up to the fraction or more, each with owner's names.
func (l *limiter) nearLimits(s *limitScope, now int64, fraction float64, owner nearLimit) []nearLimit {
	l.mu.Lock()
	defer l.mu.Unlock()
	return filterNearLimits(s.counters, now, fraction, owner)
}

func filterNearLimits(counters []*limitCounter, now int64, fraction float64, owner nearLimit) (out []nearLimit) {
	for _, c := range counters {
		if !c.limit.isQuota() || c.limit.monitorOnly || c.limit.max == 0 {
			continue
		}
		c.advance(now)
		near := owner
		if near.fraction = float64(c.used) / float64(c.limit.max); near.fraction >= fraction {
			near.limit = c.limit.String()
			out = append(out, near)
		}
	}
	return out
}
