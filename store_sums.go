// This file has what the ledger does with the rows of calls in plain code, without SQL:
//
//	the forms of a row   reduced to what a database must take, as a pending record
//	batches of rows      what one transaction writes, and which pending records end with it
//	errors               what an error of the database means
//	sums                 by hour and day, token, project, model, endpoint and outcome, as they are stored and reported
//
// No sum overflows: one that would stays at the largest int64, so that a provider with absurd counts can neither stop
// the ledger nor turn its own sum into a small one.
package main

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The forms of a row.

// reduced returns the row without the texts that a database may refuse. Its call counts in every limit that has a
// pattern for the model.
func (r *requestRow) reduced() *requestRow {
	reduced := *r
	reduced.model, reduced.address, reduced.errorCode, reduced.cache, reduced.attemptLog = "", "", "", "", ""
	reduced.limitHit, reduced.refusal, reduced.content, reduced.attribution = "", "", nil, nil
	reduced.modelTracked, reduced.requestedModelTracked = false, false
	return &reduced
}

// appendPendingRecord appends the call in the form of the table begun.
func (r *requestRow) appendPendingRecord(b []byte) []byte {
	for i, n := range [...]int64{r.id, r.project, r.token, r.upstream} {
		b = strconv.AppendInt(append(b, "[,"[min(i, 1)]), n, 10)
	}
	b = appendJSONString(append(b, ','), r.endpoint)
	b = appendJSONString(append(b, ','), r.model)
	b = append(b, ",0,"...)
	if r.stream {
		b[len(b)-2] = '1'
	}
	b = appendJSONString(b, r.address)
	b = strconv.AppendInt(append(b, ','), r.counts.input, 10)
	b = strconv.AppendInt(append(b, ','), r.counts.output, 10)
	if session, endUser, tags := r.attribution.columns(); r.attribution != nil {
		for _, text := range [...]string{session, endUser, tags} {
			b = appendJSONString(append(b, ','), text)
		}
	}
	return append(b, ']')
}

// isPlainOK reports whether the row has no value beyond those of a plain successful call.
func (r *requestRow) isPlainOK() bool {
	return r.isOK() && r.counts == tokenCounts{input: r.counts.input, output: r.counts.output} &&
		r.details == usageDetails{} && r.routedBy == "" && r.attribution == nil
}

// isOK reports whether the row is that of a call which went well at once.
func (r *requestRow) isOK() bool {
	return r.outcome == outcomeOK && r.status == 200 && r.source == usageExact && r.priced && r.firstByteUS >= 0 &&
		r.attempts == 1 && r.clientRetry == 0 && r.idempotencyHash == 0 && r.errorCode == "" && r.cache == "" &&
		r.limitHit == "" && r.attemptLog == ""
}

// priceID returns what names the price in the ledger, 0 if there is none.
func (r *requestRow) priceID() int64 {
	if r.price == nil {
		return 0
	}
	return r.price.id
}

const (
	refusalPrefix   = `{"refusal":` // of the details of a refused call, before a JSON string
	maxRefusalBytes = 500
)

// detailsJSON returns the usage beside the columns that the ledger has, "" for none.
func (r *requestRow) detailsJSON() string {
	if r.refusal != "" { // it used nothing
		return refusalPrefix + string(appendJSONString(nil, clip(r.refusal, maxRefusalBytes))) + "}"
	}
	d := r.details
	if d.audioInput, d.audioOutput = r.counts.audioInput, r.counts.audioOutput; d == (usageDetails{}) {
		return ""
	}
	return string(d.appendJSON(nil))
}

// setDetails sets the usage or the refusal from what detailsJSON returned.
func (r *requestRow) setDetails(text string) error {
	if text == "" {
		return nil
	}
	if refusal, ok := strings.CutPrefix(text, refusalPrefix); ok {
		return json.Unmarshal([]byte(strings.TrimSuffix(refusal, "}")), &r.refusal)
	}
	if err := r.details.UnmarshalJSON([]byte(text)); err != nil {
		return err
	}
	r.counts.audioInput, r.counts.audioOutput = r.details.audioInput, r.details.audioOutput
	r.details.audioInput, r.details.audioOutput = 0, 0
	return nil
}

// countReserved fills in what was reserved as the usage.
func (r *requestRow) countReserved() {
	r.counts, r.source = tokenCounts{input: r.reservedInput, output: r.reservedOutput}, usageEstimated
}

// nullUnless returns v, or nil, which is NULL in SQL.
func nullUnless(ok bool, v int64) any {
	if ok {
		return v
	}
	return nil
}

// Batches of rows.

// A ledgerEntry is one call on its way into the ledger.
type ledgerEntry struct {
	row    requestRow // the caller's until settle; read-only from then on
	batch  *pendingBatch
	number uint64 // in the ledger's queue, as of a sumOnlyRow
}

// A sumOnlyRow is a call, or usage that has become known after one, that only counts in the sums. number is that of its
// place among all rows that its process has ever queued.
type sumOnlyRow struct {
	*requestRow
	number uint64
	late   []lateLeaseUse
}

// An outboxMark says that the database has all rows that a process has queued up to a number. A transaction with such
// rows contains it, so that the rows in the process's file of unwritten rows are recorded once: see outbox.go. The
// number 0 says nothing.
type outboxMark struct {
	id      string // of the process
	number  uint64
	running bool // it is this process
}

// upTo returns the same mark with another number.
func (m outboxMark) upTo(number uint64) outboxMark {
	if m.number == 0 {
		return m
	}
	return outboxMark{m.id, number, m.running}
}

// outboxSetting begins the name of a setting with the number of an outboxMark.
const outboxSetting = "outbox "

// A ledgerBatch is what one transaction writes.
type ledgerBatch struct {
	pendingBatchID     int64         // of the calls that begin together; 0: none do
	pendingRecordsJSON []byte        // those calls, in the form of the table begun
	records            []*requestRow // calls that have ended
	endedBatchIDs      []int64       // batches whose last calls are among them
	sumOnlyRows        []sumOnlyRow  // calls that only count in the sums
	delivered          outboxMark    // what is recorded once the batch is
	probe              bool          // write nothing, only find out whether it could be written
}

// reduced returns a batch of one row with that row reduced, and the row.
func (b *ledgerBatch) reduced() (_ ledgerBatch, row *requestRow) {
	reduced := *b
	if len(b.records) > 0 {
		row = b.records[0]
		reduced.records = []*requestRow{row.reduced()}
	} else {
		row = b.sumOnlyRows[0].requestRow
		reduced.sumOnlyRows = []sumOnlyRow{{row.reduced(), b.sumOnlyRows[0].number, b.sumOnlyRows[0].late}}
	}
	return reduced, row
}

// split returns a batch for each row, in an order in which each one's mark is true. Rows of calls have ids and need no
// mark.
func (b *ledgerBatch) split() (out []ledgerBatch) {
	for i := range b.records {
		out = append(out, ledgerBatch{records: b.records[i : i+1]})
	}
	for i := range b.sumOnlyRows {
		out = append(out, ledgerBatch{sumOnlyRows: b.sumOnlyRows[i : i+1],
			delivered: b.delivered.upTo(b.sumOnlyRows[i].number)})
	}
	return out
}

// A pendingBatch is the pending records of calls that begin together, a row of the table begun. The ledger's
// mu guards it until the writer takes it; then it is the writer's.
type pendingBatch struct {
	id          int64  // the lowest of its calls
	recordsJSON []byte // as in begun, without the last bracket
	size        int
	unsettled   int           // how many of its calls have not ended
	written     bool          // it is in the database
	err         error         // why it is not; may be read once done is closed
	done        chan struct{} // closed when written and err are final
}

func (b *pendingBatch) add(id int64, record []byte) {
	if b.size == 0 {
		b.id, b.recordsJSON = id, append(b.recordsJSON, '[')
	} else {
		b.id, b.recordsJSON = min(b.id, id), append(b.recordsJSON, ',')
	}
	b.recordsJSON = append(b.recordsJSON, record...)
	b.size++
	b.unsettled++
}

// buildLedgerBatch makes a batch of what was queued, and updates the pending batches as if it were written;
// undo reverts that.
func buildLedgerBatch(pending *pendingBatch, settled []*ledgerEntry, sums []sumOnlyRow) (b ledgerBatch, undo func()) {
	b.sumOnlyRows = sums
	if pending != nil {
		pending.written = true
		b.pendingBatchID, b.pendingRecordsJSON = pending.id, append(pending.recordsJSON, ']')
	}
	b.records = make([]*requestRow, 0, len(settled))
	for _, e := range settled {
		b.records = append(b.records, &e.row)
		if p := e.batch; p != nil && p.written { // otherwise the call was refused, or its pending record failed
			if p.unsettled--; p.unsettled == 0 {
				b.endedBatchIDs = append(b.endedBatchIDs, p.id)
			}
		}
	}
	// In the order of their ids nearly all rows go to the end of the table and of its indexes.
	slices.SortFunc(b.records, func(r, o *requestRow) int { return cmp.Compare(r.id, o.id) })
	return b, func() {
		for _, e := range settled {
			if e.batch != nil && e.batch.written {
				e.batch.unsettled++
			}
		}
		if pending != nil {
			pending.written = false
		}
	}
}

// A commitPace says how many calls are to share a commit of pending records. With PostgreSQL each is a transaction of a
// server that others use, too. It belongs to one goroutine.
type commitPace struct {
	since time.Time
	calls int // since then
	goal  int
}

// batchGoal counts calls whose records were committed from now on, and returns for how many the next commit is to wait:
// those of 5 ms, or one, if that is too few to be worth it.
func (p *commitPace) batchGoal(now time.Time, calls int) int {
	const pause, brisk = 0.005, 600 // seconds; fewer calls a second share few commits, whatever they wait for
	p.calls += calls
	if d := now.Sub(p.since); d >= 100*time.Millisecond {
		p.goal = 1
		if rate := float64(p.calls) / d.Seconds(); rate >= brisk {
			p.goal = int(math.Round(rate * pause))
		}
		p.since, p.calls = now, 0
	}
	return max(1, p.goal)
}

// Errors.

// Result codes of SQLite.
const (
	sqliteError      = 1
	sqliteTooBig     = 18
	sqliteConstraint = 19
	sqliteMismatch   = 20
	sqliteMisuse     = 21
	sqliteUnique     = sqliteConstraint | 8<<8 // an extended code
)

// mapUniqueViolation turns a violated UNIQUE constraint into errTaken.
func mapUniqueViolation(err error) error {
	if sqliteCode(err) == sqliteUnique || sqlState(err) == "23505" {
		return errTaken
	}
	return err
}

// sqlState returns the SQLSTATE of the PostgreSQL error in err, "" if there is none.
func sqlState(err error) string {
	if e, ok := errors.AsType[interface {
		error
		SQLState() string
	}](err); ok {
		return e.SQLState()
	}
	return ""
}

// isRejectedRow reports whether the database rejects a row, which a retry cannot change.
func isRejectedRow(err error) bool {
	switch state := sqlState(err); state[:min(2, len(state))] {
	case "21", "22", "23", "54", "P0": // its data, a constraint, its size, a trigger
		return true
	}
	switch sqliteCode(err) & 0xff {
	case sqliteConstraint, sqliteMismatch, sqliteTooBig:
		return true
	}
	return errors.Is(err, errRowIgnored)
}

// isDatabaseAway reports whether err means that a PostgreSQL server cannot be reached, or takes no connection yet.
func isDatabaseAway(err error) bool {
	switch state := sqlState(err); state[:min(2, len(state))] {
	case "08", "53", "57": // the connection, resources, the server's state
		return true
	}
	_, isNetwork := errors.AsType[net.Error](err)
	return isNetwork || errors.Is(err, driver.ErrBadConn) || errors.Is(err, io.EOF) ||
		errors.Is(err, errLockedOut)
}

// errLockedOut means that another process does what only one can do at a time, and that others have to wait for.
var errLockedOut = errors.New("another llm-proxy is starting with this database, migrates it, or records the calls " +
	"of replicas that have died")

// isSumOverflow reports whether a sum of a column is no int64: SQLite cannot add it up, PostgreSQL returns more digits.
func isSumOverflow(err error) bool {
	if code := sqliteCode(err); code != 0 {
		return code == sqliteError && strings.Contains(fmt.Sprint(err), "integer overflow")
	}
	return err != nil && strings.Contains(fmt.Sprint(err), "value out of range")
}

// isDatabaseFailure reports whether err is a failure of the database (locked, full, not writable, damaged)
// and not a mistake of the caller. Such a failure may pass.
func isDatabaseFailure(err error) bool {
	if state := sqlState(err); state != "" { // a statement can be wrong in itself: class 42
		return !isRejectedRow(err) && state[:2] != "42"
	}
	switch _, isNetwork := errors.AsType[net.Error](err); sqliteCode(err) & 0xff {
	case 0:
		return isNetwork || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, sql.ErrConnDone) ||
			errors.Is(err, driver.ErrBadConn) || errors.Is(err, io.EOF) || errors.Is(err, errFenced)
	case sqliteError, sqliteMisuse:
		return false
	}
	return !isRejectedRow(err)
}

// Sums.

// A usageSumKey names one row of usage_sums.
type usageSumKey struct {
	grain           string
	token, project  int64
	start           int64 // of the hour or day
	model, endpoint string
	outcome         callOutcome
	requestedModel  string
	tier            serviceTier
}

// billedWithoutUsage reports whether a provider charges for calls of an endpoint although their answers may
// count no tokens: speech is billed by the character, images by the piece.
func billedWithoutUsage(endpoint string) bool {
	return strings.HasPrefix(endpoint, "POST /v1/audio/") || strings.HasPrefix(endpoint, "POST /v1/images/")
}

// A usageSum is what a row of usage_sums adds up.
type usageSum struct {
	calls, input, cached, output, reasoning int64
	cost, unpriced, estimated, totalUS      int64
	wouldRefuse                             int64
	hits, saved, savedUS                    int64 // calls that were answered from the cache
	promptSaved                             int64 // nano-dollars that the providers' caches saved
	clientRetries                           int64 // calls that clients have sent before
}

func (s *usageSum) add(r *requestRow) {
	if r.usageOf == 0 {
		s.calls++
	}
	s.input = addSat(s.input, r.counts.input)
	s.cached = addSat(s.cached, r.counts.cached)
	s.output = addSat(s.output, r.counts.output)
	s.reasoning = addSat(s.reasoning, r.counts.reasoning)
	if r.priced {
		s.cost = addSat(s.cost, r.cost)
		s.promptSaved = addSat(s.promptSaved, r.promptSaved)
	} else if r.source != usageNone || r.outcome == outcomeOK && billedWithoutUsage(r.endpoint) {
		s.unpriced++
	}
	if r.source == usageEstimated {
		s.estimated++
	}
	if r.wouldRefuse {
		s.wouldRefuse++
	}
	if r.isClientRetry {
		s.clientRetries++
	}
	s.totalUS = addSat(s.totalUS, r.totalUS)
	if r.cache != "" {
		s.hits++
		s.saved = addSat(s.saved, r.saved)
		s.savedUS = addSat(s.savedUS, r.savedUS)
	}
}

// counters returns the counters in the order of the columns of usage_sums.
func (s *usageSum) counters() [15]*int64 {
	return [...]*int64{&s.calls, &s.input, &s.cached, &s.output, &s.reasoning, &s.cost, &s.unpriced, &s.estimated,
		&s.wouldRefuse, &s.totalUS, &s.hits, &s.saved, &s.savedUS, &s.promptSaved, &s.clientRetries}
}

// columns returns the counters for a row of a query.
func (s *usageSum) columns() []any {
	out := make([]any, 0, 15)
	for _, c := range s.counters() {
		out = append(out, c)
	}
	return out
}

func (s *usageSum) merge(o usageSum) {
	parts := o.counters()
	for i, c := range s.counters() {
		*c = addSat(*c, *parts[i])
	}
}

// subtract takes away a part of the sum. No count becomes negative.
func (s *usageSum) subtract(o usageSum) {
	parts := o.counters()
	for i, c := range s.counters() {
		*c = max(*c-*parts[i], 0)
	}
}

// fromCache returns the part of the sum that the cache answered. Such calls use no tokens and cost nothing.
func (s *usageSum) fromCache() usageSum {
	return usageSum{calls: s.hits, hits: s.hits, saved: s.saved, savedUS: s.savedUS}
}

// fromProviders returns the rest of the sum.
func (s *usageSum) fromProviders() usageSum {
	rest := *s
	rest.calls, rest.hits, rest.saved, rest.savedUS = s.calls-s.hits, 0, 0, 0
	return rest
}

// sumModel is the model under which a call is summed. A name that a client invented must not make a row of
// its own, or one client could fill the disk.
func (r *requestRow) sumModel() string {
	if r.modelTracked {
		return r.model
	}
	return ""
}

// otherModels stands in sums for all requested models that are not tracked.
const otherModels = "*"

// sumRequestedModel is the requested model, under the same rule.
func (r *requestRow) sumRequestedModel() string {
	if r.requestedModelTracked || r.requestedModel == "" {
		return r.requestedModel
	}
	return otherModels
}

// A usageTally adds up calls for the sums, and for the hours of projects.
type usageTally struct {
	sums  map[usageSumKey]*usageSum // of single tokens by hour, until rollUp
	hours map[hourKey]*hourSum
	// attributed are the sums of the values of attributes, by hour. nil: none of the calls has one.
	attributed map[attributedSumKey]*usageSum
	// limitUses has what values have used of limits with for_each.
	limitUses map[limitUseKey]int64

	lastKey  usageSumKey // of the previous call, which is often of the same kind
	lastSum  *usageSum
	lastHour *hourSum
}

func newUsageTally() *usageTally {
	return &usageTally{sums: map[usageSumKey]*usageSum{}, hours: map[hourKey]*hourSum{},
		limitUses: map[limitUseKey]int64{}}
}

// A limitUseKey names a row of limit_values.
type limitUseKey struct {
	project, token         int64 // token is 0 for a limit of the project
	rule, value            string
	windowStart, windowEnd int64
}

func (t *usageTally) add(r *requestRow) {
	for _, u := range r.limitUses {
		k := limitUseKey{r.project, 0, u.rule, u.value, u.windowStart, u.windowEnd}
		if u.ofToken {
			k.token = r.token
		}
		t.limitUses[k] = addSat(t.limitUses[k], u.amount)
	}
	hour := r.started - r.started%hourMS
	k := usageSumKey{"hour", r.token, r.project, hour, r.sumModel(), r.endpoint, r.outcome, r.sumRequestedModel(),
		r.details.tier}
	if t.lastSum == nil || k != t.lastKey {
		t.lastKey, t.lastSum, t.lastHour = k, getOrInsert(t.sums, k), getOrInsert(t.hours, hourKey{r.project, hour})
	}
	t.lastSum.add(r)
	t.lastHour.add(r)
	r.attribution.each(func(attribute, value string) {
		if t.attributed == nil {
			t.attributed = map[attributedSumKey]*usageSum{}
		}
		k.tier = 0 // which they do not keep apart
		getOrInsert(t.attributed, attributedSumKey{k, attribute, value}).add(r)
	})
}

// An attributedSumKey names one row of attribution_sums.
type attributedSumKey struct {
	usageSumKey
	attribute, value string
}

func getOrInsert[K comparable, V any](m map[K]*V, k K) *V {
	v := m[k]
	if v == nil {
		v = new(V)
		m[k] = v
	}
	return v
}

func (k usageSumKey) withGrain(grain string, at int64) usageSumKey {
	k.grain, k.start = grain, at
	return k
}

// rollUp adds the coarser sums to those of single tokens and projects, so that a row which calls of many
// tokens share is written once.
func (t *usageTally) rollUp() {
	for k, v := range maps.Clone(t.sums) {
		day, project, all := k.withGrain("day", k.start-k.start%dayMS), k, k
		project.token = 0
		all.token, all.project, all.requestedModel = 0, 0, ""
		for _, key := range [...]usageSumKey{
			day, {grain: "token", token: k.token, project: k.project, start: day.start},
			project, project.withGrain("day", day.start), {grain: "token", project: k.project, start: day.start},
			all, all.withGrain("day", day.start),
		} {
			getOrInsert(t.sums, key).merge(*v)
		}
	}
	for k, v := range maps.Clone(t.hours) {
		getOrInsert(t.hours, hourKey{0, k.at}).merge(v)
	}
}

// An hourKey names a row of project_hours.
type hourKey struct{ project, at int64 }

// An hourSum is what a row of project_hours and its rows of project_latency add up.
type hourSum struct {
	calls, input, output, cost, unpriced int64
	errors                               [errorClassCount]int64 // as errorColumnClasses names them
	firstByteLatency, totalLatency       latencyHistogram
}

const errorClassCount = 4

// errorColumnClasses are the columns of errors, in their order.
func errorColumnClasses() [errorClassCount]errorClass {
	return [...]errorClass{errorClassCaller, errorClassPolicy, errorClassProvider, errorClassProxy}
}

// add counts a call. s is what the call alone adds to usage_sums.
func (h *hourSum) add(r *requestRow) {
	var s usageSum
	s.add(r)
	h.calls += s.calls
	h.input = addSat(h.input, s.input)
	h.output = addSat(h.output, s.output)
	h.cost = addSat(h.cost, s.cost)
	h.unpriced = addSat(h.unpriced, s.unpriced)
	if r.usageOf != 0 {
		return
	}
	class := r.errorClass()
	for i, c := range errorColumnClasses() {
		if c == class {
			h.errors[i]++
		}
	}
	if r.outcome == outcomeOK && r.attempts > 0 && r.firstByteUS >= 0 {
		h.firstByteLatency.observe(r.firstByteUS)
		h.totalLatency.observe(r.totalUS)
	}
}

func (h *hourSum) merge(o *hourSum) {
	h.calls = addSat(h.calls, o.calls)
	h.input = addSat(h.input, o.input)
	h.output = addSat(h.output, o.output)
	h.cost = addSat(h.cost, o.cost)
	h.unpriced = addSat(h.unpriced, o.unpriced)
	for i := range h.errors {
		h.errors[i] = addSat(h.errors[i], o.errors[i])
	}
	for i := range h.firstByteLatency {
		h.firstByteLatency[i] = addSat(h.firstByteLatency[i], o.firstByteLatency[i])
		h.totalLatency[i] = addSat(h.totalLatency[i], o.totalLatency[i])
	}
}

// columns returns the counters that project_hours has, in the order of its columns.
func (h *hourSum) columns() []any {
	return []any{&h.calls, &h.input, &h.output, &h.cost, &h.unpriced,
		&h.errors[0], &h.errors[1], &h.errors[2], &h.errors[3]}
}

// usageTotals is what charts show.
type usageTotals struct{ calls, tokens, cost int64 }

func (t *usageTotals) add(o usageTotals) {
	t.calls = addSat(t.calls, o.calls)
	t.tokens = addSat(t.tokens, o.tokens)
	t.cost = addSat(t.cost, o.cost)
}

func (s *usageSum) totals() usageTotals {
	return usageTotals{s.calls, addSat(s.input, s.output), s.cost}
}

func (h *hourSum) totals() usageTotals {
	return usageTotals{h.calls, addSat(h.input, h.output), h.cost}
}

// Queries of sums.

// setRange sets the range that the sums cover: usage is stored by whole hours and days in UTC. Both ends are rounded
// down, so that ranges that adjoin never count a call twice. An end that has not come yet is rounded up instead: the
// current hour or day is part of what was until now. A total of whole projects adds up hours if one of its ends is not
// midnight in UTC; those of single tokens are not kept long enough. fromGiven: the client chose from.
func (q *usageQuery) setRange(from, to, now time.Time, fromGiven bool) {
	atMidnight := func(t time.Time) bool { return t.Equal(t.Truncate(24 * time.Hour)) }
	unit := 24 * time.Hour
	if q.interval == "total" && (fromGiven && !atMidnight(from) || to.Before(now) && !atMidnight(to)) {
		q.hourly = !q.byToken && q.token == ""
	}
	if q.interval == "hour" || q.hourly {
		unit = time.Hour
	}
	round := func(t time.Time) int64 {
		start, end := t.Truncate(unit), t.Truncate(unit).Add(unit)
		if q.interval == "month" {
			start = time.Date(t.Year(), t.Month(), 1, 0, 0, 0, 0, time.UTC)
			end = start.AddDate(0, 1, 0)
		}
		if t.Before(now) || t.Equal(start) {
			return start.UnixMilli()
		}
		return end.UnixMilli()
	}
	q.from, q.to = round(from), round(to)
}
