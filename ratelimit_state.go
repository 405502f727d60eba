// This file gives the counters of limits their past use from the store, counts usage that becomes known after its call
// has ended, and shows the current state of limits. It reads the store; what it records goes through the ledger.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// limitLoadTimeout is how long the calls of a project may wait until the past use of a new limit is read.
const limitLoadTimeout = 2 * time.Second

// lateUsageTimeout is how long the end of an answer may wait until the usage of another call that it tells is recorded.
const lateUsageTimeout = 10 * time.Second

// A limitState is the access to the limits of tokens and projects, live or not.
type limitState struct {
	store    *store
	ledger   *ledger
	registry *registry
	prices   *atomic.Pointer[priceTable]
	leases   *leaseKeeper // nil: this process counts alone
	// lateUse is held, for reading, from before the attribution of a call is read until its late usage is queued.
	lateUse sync.RWMutex
}

// now returns a time by the clock by which limits count, in unix milliseconds. All replicas have the same.
func (ls *limitState) now(t time.Time) int64 {
	if ls.leases == nil {
		return t.UnixMilli()
	}
	return ls.leases.now() - time.Since(t).Milliseconds()
}

// syncLimits applies the limits of t's policy and of its project's policy. The caller holds the limiter's mu, so
// that no call of the project starts or ends at the same time.
func (ls *limitState) syncLimits(t *liveToken, now int64) error {
	if err := ls.syncProjectLimits(t.project, now); err != nil {
		return err
	}
	st := t.state.Load()
	owner := leaseOwner{t.project.state.Load().seq, st.seq, st.version}
	ls.syncLifetime(t, st, owner, now)
	return ls.syncScope(&t.project.limiter, &t.limits, &st.policy, owner, now)
}

func (ls *limitState) syncProjectLimits(p *liveProject, now int64) error {
	st := p.state.Load()
	return ls.syncScope(&p.limiter, &p.limiter.project, &st.policy, leaseOwner{st.seq, 0, st.version}, now)
}

// syncScope replaces the counters of s by those of p, unless s has p already.
func (ls *limitState) syncScope(l *limiter, s *limitScope, p *policy, owner leaseOwner, now int64) error {
	if s.policy == p {
		return nil
	}
	l.leases = ls.leases
	past := &pastUse{}
	if s.needsHistory(p) {
		ctx, cancel := context.WithTimeout(context.Background(), limitLoadTimeout)
		defer cancel()
		if s.admitted { // its use may not be in the stored sums yet
			if err := ls.ledger.flush(ctx); err != nil {
				return fmt.Errorf("waiting for the ledger: %w", err)
			}
		}
		var err error
		if past, err = ls.loadPast(ctx, l, s, p, owner.project, owner.token, now); err != nil {
			return err
		}
	}
	s.setOwner(owner)
	l.setPolicy(s, p, owner.token != 0, now, past)
	return nil
}

// loadPast reads what the limits of p that s does not have yet have used.
func (ls *limitState) loadPast(ctx context.Context, l *limiter, s *limitScope, p *policy, project, token, now int64,
) (*pastUse, error) {
	past := &pastUse{used: map[limitKey]int64{}, counts: map[limitKey]int64{}, values: map[limitKey]map[string]int64{},
		before: map[limitKey]map[string]int64{}}
	var rows []periodUsage
	var err error
	if l.leases == nil { // otherwise that is in the limits' accounts
		rows, err = ls.loadPastUsage(ctx, p, project, token, now)
	}
	for i := 0; i < len(p.Limits) && err == nil; i++ {
		lim := &p.Limits[i]
		switch from, _ := lim.period.window(now); {
		case !lim.isWindow() || counterFor(s.counters, lim) != nil:
		case lim.forEach == "":
			past.used[lim.key()] = sumUsage(rows, lim)
		default:
			n, e := ls.store.countLimitValues(ctx, project, token, lim.rule, from)
			past.counts[lim.key()], err = n, e
			values, before := map[string]int64{}, map[string]int64{} // of running calls
			past.values[lim.key()], past.before[lim.key()] = values, before
			l.eachRunning(s, lim, from, func(r *reservation, _ int64) {
				name := r.estimate.attribution.value(lim.forEach)
				_, counted := values[name]
				if _, known := before[name]; known || counted || err != nil {
					return
				}
				used, stored, e := ls.store.limitValueUse(ctx, project, token, lim.rule, name, from)
				if err = e; stored {
					values[name] = used
				} else if err == nil {
					before[name] = used
				}
			})
		}
	}
	return past, err
}

// maxValueReads is how often the use of a call's values is read, if it changes meanwhile.
const maxValueReads = 20

// prepare applies the limits of t and of its project, and leases what the call needs of them, if that can be had. The
// caller holds the limiter's mu. prepare releases it while it waits.
func (ls *limitState) prepare(t *liveToken, e *estimate, now int64) error {
	for wait := (leaseWait{}); ; {
		if err := ls.prepareValues(t, e, now); err != nil || ls.leases == nil {
			return err
		}
		if ready, err := ls.lease(&wait, t, e, now); ready || err != nil {
			return err
		}
	}
}

// prepareValues applies the limits of t and of its project, and brings the counters of the call's values into memory,
// unless there is no room for one. The caller holds the limiter's mu. prepareValues releases it while it reads the
// store.
func (ls *limitState) prepareValues(t *liveToken, e *estimate, now int64) error {
	l := &t.project.limiter
	for range maxValueReads {
		if err := ls.syncLimits(t, now); err != nil {
			return err
		}
		missing := l.missingValues(&t.limits, e, now)
		if len(missing) == 0 {
			return nil
		}
		project, token := l.project.policy, t.limits.policy
		fresh, err := ls.readValues(t, missing)
		if err == nil {
			err = ls.syncLimits(t, now)
		}
		if err != nil {
			return err
		}
		if !fresh || project != l.project.policy || token != t.limits.policy {
			continue
		}
		committed := ls.ledger.committedSoFar()
		for _, m := range missing {
			m.group.add(m.name, m.used, m.stored, now, committed)
		}
		return nil
	}
	return errors.New("reading what a value has used: it kept changing")
}

// readValues reads what values have used. It returns false if that may have changed meanwhile. The caller holds the
// limiter's mu, which is released for the time of reading. Only windows have use in the store.
func (ls *limitState) readValues(t *liveToken, missing []missingValue) (fresh bool, err error) {
	for i := range missing {
		missing[i].group.beginRead(missing[i].name)
	}
	project, token := t.project.state.Load().seq, t.state.Load().seq
	t.project.limiter.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), limitLoadTimeout)
	defer cancel()
	for i := 0; i < len(missing) && err == nil; i++ {
		if m := &missing[i]; m.rule != "" {
			owner := int64(0)
			if m.group.ofToken {
				owner = token
			}
			m.used, m.stored, err = ls.store.limitValueUse(ctx, project, owner, m.rule, m.name, m.windowStart)
		}
	}
	t.project.limiter.mu.Lock()
	fresh = true
	for i := range missing {
		fresh = missing[i].group.endRead(missing[i].name) && fresh
	}
	return fresh, err
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
	ls.lateUse.RLock()
	defer ls.lateUse.RUnlock()
	ctx, cancel := context.WithTimeout(context.Background(), lateUsageTimeout)
	defer cancel()
	// The call that made it may have ended a moment ago.
	if err = ls.ledger.awaitWhileHealthy(ctx, ls.ledger.queuedSoFar()); err != nil {
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
	return row, ls.recordResponse(ctx, &row, shown.prices, shown.vendor, shown.meter.model)
}

// maxResponseAge is how long the usage of a background response may stay unknown. Then it counts what was reserved.
const maxResponseAge = 24 * time.Hour

// expireResponses records the usage of background responses of which nothing was heard for maxAge.
func (ls *limitState) expireResponses(ctx context.Context, now time.Time, maxAge time.Duration, prices *priceTable,
) error {
	for range 50 { // a minute later it is called again
		n, err := ls.expireSomeResponses(ctx, minIDAt(now.Add(-maxAge)), prices)
		if err != nil || n == 0 {
			return err
		}
	}
	return nil
}

// expireSomeResponses is expireResponses for a few of the calls with an id below before. It returns how many.
func (ls *limitState) expireSomeResponses(ctx context.Context, before int64, prices *priceTable) (n int, err error) {
	ls.lateUse.RLock()
	defer ls.lateUse.RUnlock()
	rows, err := ls.store.expiredUsage(ctx, before, 20)
	for i := range rows {
		rows[i].countReserved()
		err = errors.Join(err, ls.recordResponse(ctx, &rows[i], prices, "", rows[i].model))
	}
	return len(rows), err
}

// awaitLateUse returns when all late usage is in the ledger's queue whose attribution was read before.
func (ls *limitState) awaitLateUse() {
	ls.lateUse.Lock()
	defer ls.lateUse.Unlock()
}

// recordResponse records the usage of a background response, by the price of the model that answered, or of another
// name that the call had for it.
func (ls *limitState) recordResponse(ctx context.Context, row *requestRow, prices *priceTable, vendor, model string,
) error {
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
	return ls.recordUsage(ctx, row)
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
	b := &batchAnswer{host: u.host, object: resultsName(u.host, path), isNew: e.makesBatch()}
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
// returns what was counted. row is that of the call that got it; answer may be nil.
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
	ctx, cancel := context.WithTimeout(context.Background(), lateUsageTimeout)
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
	ls.lateUse.RLock()
	defer ls.lateUse.RUnlock()
	ctx, cancel := context.WithTimeout(context.Background(), lateUsageTimeout)
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
		if err := ls.recordUsage(ctx, &row); err != nil || row.counted {
			return row, err
		}
	}
	return owner, errors.New("other calls read the results at the same time")
}

// recordUsage records the usage of a call that has become known after its end, and counts it in the limits of the
// token that made the call and of its project. The limiter is locked meanwhile, so that no new counter finds it twice.
func (ls *limitState) recordUsage(ctx context.Context, r *requestRow) error {
	policies := storedPolicies{store: ls.store}
	if err := policies.countUses(ctx, r); err != nil {
		return err
	}
	p := ls.registry.liveProject(r.project)
	if p == nil || ls.leases != nil {
		ls.ledger.recordUsage(r, ls.lateUses(r, policies.known[[2]int64{r.project, r.token}]))
		err := ls.ledger.awaitWhileHealthy(ctx, ls.ledger.queuedSoFar())
		if err == nil && p != nil && r.counted {
			ls.forgetRefusals(p, r.token)
		}
		return err
	}
	p.limiter.mu.Lock()
	defer p.limiter.mu.Unlock()
	ls.ledger.recordUsage(r, nil)
	if err := ls.ledger.awaitWhileHealthy(ctx, ls.ledger.queuedSoFar()); err != nil || !r.counted {
		return err
	}
	now := ls.now(time.Now())
	countLate(p.limiter.project.counters, r, now)
	if t := ls.registry.liveTokenOf(r.token); t != nil {
		countLate(t.limits.counters, r, now)
	}
	return nil
}

// storedPolicies finds out what calls count in limits with for_each, where no reservation says it: calls that were lost
// with the process, and usage that becomes known late. It reads each policy once.
type storedPolicies struct {
	store *store
	known map[[2]int64][2][]limit // by project and token: the limits of both
}

const maxKnownPolicies = 1000

// countUses fills in r.limitUses.
func (s *storedPolicies) countUses(ctx context.Context, r *requestRow) error {
	key := [2]int64{r.project, r.token}
	limits, known := s.known[key]
	if !known {
		texts, err := s.store.policyTexts(ctx, r.project, r.token)
		if err != nil {
			return err
		}
		// The limits of a policy that cannot be read count nothing: until it can be, calls are refused.
		project, _ := parsePolicy([]byte(texts[0]), true)
		token, _ := parsePolicy([]byte(texts[1]), false)
		limits = [2][]limit{project.Limits, token.Limits}
		if s.known == nil || len(s.known) >= maxKnownPolicies {
			s.known = map[[2]int64][2][]limit{}
		}
		s.known[key] = limits
	}
	r.limitUses = r.appendLimitUses(r.appendLimitUses(nil, limits[0], false), limits[1], true)
	return nil
}

// withLiveUsage returns the row with the calls that it does not include yet: a row counts a call after its end.
func (ls *limitState) withLiveUsage(row *tokenRow, now int64) *tokenRow {
	t := ls.registry.liveToken(row.id)
	if t == nil {
		return row
	}
	current := *row
	if current.requestCount = max(row.requestCount, t.used.Load()); t.running.Load() > 0 {
		current.lastUsedAt = &now
	} else if current.requestCount > row.requestCount {
		current.lastUsedAt = new(t.lastUsed.Load())
	}
	return &current
}

// tokenLimits returns the state of a token's limits, with the values that q asks for.
func (ls *limitState) tokenLimits(ctx context.Context, row *tokenRow, q valueQuery, now int64) ([]limitView, error) {
	views, err := ls.liveTokenLimits(row, q, now)
	if err != nil || views != nil {
		return ls.withValues(ctx, views, row.project, row.seq, q, err)
	}
	return ls.storedLimits(ctx, row.policy, false, row.project, row.seq, q, now)
}

// liveTokenLimits returns the state of the limits of a token in memory, nil if it is not.
func (ls *limitState) liveTokenLimits(row *tokenRow, q valueQuery, now int64) ([]limitView, error) {
	t := ls.registry.liveToken(row.id)
	if t == nil {
		return nil, nil
	}
	t.project.limiter.mu.Lock()
	defer t.project.limiter.mu.Unlock()
	if err := ls.syncLimits(t, now); err != nil {
		return nil, errLimitsUnavailable(err)
	}
	if err := ls.refreshLeases(&t.project.limiter, &t.limits); err != nil {
		return nil, errLimitsUnavailable(err)
	}
	return newLimitViews(t.limits.counters, q, now), nil
}

// projectLimits returns the state of a project's limits, with the values that q asks for.
func (ls *limitState) projectLimits(ctx context.Context, row *projectRow, q valueQuery, now int64,
) ([]limitView, error) {
	views, err := ls.liveProjectLimits(row, q, now)
	if err != nil || views != nil {
		return ls.withValues(ctx, views, row.seq, 0, q, err)
	}
	return ls.storedLimits(ctx, row.policy, true, row.seq, 0, q, now)
}

// liveProjectLimits returns the state of the limits of a project in memory, nil if it is not.
func (ls *limitState) liveProjectLimits(row *projectRow, q valueQuery, now int64) ([]limitView, error) {
	p := ls.registry.liveProject(row.seq)
	if p == nil {
		return nil, nil
	}
	p.limiter.mu.Lock()
	defer p.limiter.mu.Unlock()
	if err := ls.syncProjectLimits(p, now); err != nil {
		return nil, errLimitsUnavailable(err)
	}
	if err := ls.refreshLeases(&p.limiter, &p.limiter.project); err != nil {
		return nil, errLimitsUnavailable(err)
	}
	return newLimitViews(p.limiter.project.counters, q, now), nil
}

// withValues fills in the values that q asks for: those in memory, and of the others what the store has.
func (ls *limitState) withValues(ctx context.Context, views []limitView, project, token int64, q valueQuery, err error,
) ([]limitView, error) {
	for i := 0; i < len(views) && err == nil; i++ {
		v := &views[i]
		if v.ForEach == "" || !q.single() && q.top == 0 {
			continue
		}
		var stored []valueUse
		if v.limit.isWindow() && !q.single() {
			stored, err = ls.store.topLimitValues(ctx, project, token, v.limit.rule, v.windowStart, q.top)
		}
		for n := 0; n < len(q.names) && v.limit.isWindow() && err == nil; n++ {
			use, found := valueUse{value: q.names[n]}, false
			use.used, found, err = ls.store.limitValueUse(ctx, project, token, v.limit.rule, use.value, v.windowStart)
			if found || use.used > 0 {
				stored = append(stored, use)
			}
		}
		v.Values = []valueView{}
		for _, c := range topValues(v.inMemory, stored, max(len(q.names), q.top)) {
			v.Values = append(v.Values, v.limit.viewValue(c))
		}
		v.inMemory = nil
	}
	return views, err
}

// storedLimits returns the state of the limits of a token or project that is not live.
func (ls *limitState) storedLimits(ctx context.Context, policyText string, ofProject bool, project, token int64,
	q valueQuery, now int64) ([]limitView, error) {
	counters, err := ls.storedCounters(ctx, policyText, ofProject, project, token, now)
	return ls.withValues(ctx, newLimitViews(counters, q, now), project, token, q, err)
}

// storedCounters returns the counters of a token or project that is not live: all its use is in the store.
func (ls *limitState) storedCounters(ctx context.Context, policyText string, ofProject bool, project, token, now int64,
) ([]*limitCounter, error) {
	p, err := parsePolicy([]byte(policyText), ofProject)
	if err != nil {
		return nil, err
	}
	var l limiter
	past, err := ls.loadPast(ctx, &l, &l.project, &p, project, token, now)
	if err != nil {
		return nil, err
	}
	l.setPolicy(&l.project, &p, token != 0, now, past)
	return l.project.counters, nil
}
