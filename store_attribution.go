// This file has the statements about attribution: what sessions, end users and tags have used, by hour and of limits
// with for_each, and the erasure of an end user. It reads the sums and what limits have counted, and deletes both; the
// ledger alone adds to them.
package main

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// parseTop reads how many values of an attribute are listed.
func (q *usageQuery) parseTop(text string) (err error) {
	const most = 1000
	if q.top = 100; text == "" {
		return nil
	}
	if q.top, err = strconv.Atoi(text); err != nil || q.top < 1 || q.top > most || q.attribute == "" {
		return badRequest("invalid_value", "top",
			"top must be from 1 to 1000, and needs session, end_user or tag:KEY in group_by.")
	}
	return nil
}

// The calls of an attribute, in a project (?1, "" for all), with a token (?2, "" for all) and in a range of time.
const fromAttributed = ` FROM attribution_sums s WHERE project IN (SELECT seq FROM projects WHERE ?1 = '' OR id = ?1)
	AND (?2 = '' OR token = (SELECT seq FROM tokens WHERE id = ?2)) AND attribute = ?3 AND at >= ?4 AND at < ?5 `

func (q *usageQuery) attributedArgs(more ...any) []any {
	return append([]any{q.project, q.token, q.attribute, q.from, q.to}, more...)
}

// maxAttributedSums is how many sums of an attribute are read for one answer, some seconds' worth.
const maxAttributedSums = 1_000_000

const (
	maxReports = readPoolSize / 2 // on attributes, at the same time
	reportWait = 2 * time.Second  // for another one to end
)

// beginReport waits until a report on attributes may run, each of whose statements can take a connection of readDB for
// seconds: calls and pages keep the others. The caller calls end after it.
func (s *store) beginReport(ctx context.Context) (end func(), err error) {
	if s.reports == nil {
		return func() {}, nil
	}
	timer := time.NewTimer(reportWait)
	defer timer.Stop()
	select {
	case s.reports <- struct{}{}:
		return func() { <-s.reports }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-timer.C:
		return nil, errTooManyReports
	}
}

// topValues returns what each of the q.top largest values of an attribute has, the largest first, or errTooManyRows if
// more than limit sums would be read.
func (s *store) topValues(ctx context.Context, q *usageQuery, limit int) ([]usageShare, error) {
	end, err := s.beginReport(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	return s.readTopValues(ctx, q, limit)
}

// readTopValues is topValues as a part of a report.
func (s *store) readTopValues(ctx context.Context, q *usageQuery, limit int) ([]usageShare, error) {
	n, err := queryValue[int](ctx, s.readDB, "counting sums of an attribute",
		`SELECT count(*) FROM (SELECT 1`+fromAttributed+`LIMIT ?6) counted`, q.attributedArgs(limit+1)...)
	if err == nil && n > limit {
		err = errTooManyRows
	}
	if err != nil {
		return nil, err
	}
	return collect(ctx, s.readDB, "finding the largest values of an attribute", func(v *usageShare) []any {
		return []any{&v.name, &v.calls, &v.tokens, &v.cost}
	}, `
		SELECT value, calls, tokens, cost FROM (SELECT value, sum(min(calls, ?6)) AS calls,
				sum(min(input_tokens, ?6) + min(output_tokens, ?6)) AS tokens, sum(min(cost, ?6)) AS cost
			`+fromAttributed+`GROUP BY value) v
		ORDER BY CASE ?7 WHEN 'calls' THEN calls WHEN 'tokens' THEN tokens ELSE cost END DESC, calls DESC, value
		LIMIT ?8`,
		q.attributedArgs(int64(math.MaxInt64/maxAttributedSums/2), q.largestBy, q.top)...)
}

// usedAttributes returns up to limit attributes that calls of a project ("": of all) had: session, end_user and tags by
// their keys.
func (s *store) usedAttributes(ctx context.Context, project string, limit int) ([]string, error) {
	return collect(ctx, s.readDB, "listing attributes", single[string], usedAttributesCTE+`
		SELECT attribute FROM used WHERE attribute IS NOT NULL GROUP BY attribute
		ORDER BY attribute LIKE 'tag:%', attribute DESC LIMIT ?2`, project, limit)
}

// reportByValue is splitByValue as a report.
func (s *store) reportByValue(ctx context.Context, q *usageQuery, all map[usageKey]*usageSum,
) (map[usageKey]*usageSum, error) {
	end, err := s.beginReport(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	return s.splitByValue(ctx, q, all)
}

// splitByValue returns groups by the values of an attribute instead of the groups of all calls: the largest values, all
// others together, and what is left of each group of all calls. So they add up to all calls.
func (s *store) splitByValue(ctx context.Context, q *usageQuery, all map[usageKey]*usageSum,
) (map[usageKey]*usageSum, error) {
	top := q.values
	if top == nil {
		var err error
		if top, err = s.readTopValues(ctx, q, maxAttributedSums); err != nil {
			return nil, err
		}
	}
	values := make([]string, len(top))
	for i := range top {
		values[i] = top[i].name
	}
	groups, err := s.sumAttributed(ctx, q, string(mustMarshal(values)))
	if err != nil {
		return nil, err
	}
	attributed, err := s.sumAttributed(ctx, q, "")
	if err != nil {
		return nil, err
	}
	others := map[usageKey]*usageSum{}
	for k, v := range attributed {
		if all[k] != nil {
			all[k].subtract(*v)
		}
		others[k] = v
	}
	for k, v := range groups {
		if k.value = ""; others[k] != nil {
			others[k].subtract(*v)
		}
	}
	for rest, sums := range map[string]map[usageKey]*usageSum{restOther: others, restNone: all} {
		for k, v := range sums {
			if k.rest = rest; *v != (usageSum{}) {
				groups[k] = v
			}
		}
	}
	return groups, nil
}

// sumAttributed adds up the sums of an attribute by the values in a JSON list, without any others; "" adds up all
// values together.
func (s *store) sumAttributed(ctx context.Context, q *usageQuery, values string) (map[usageKey]*usageSum, error) {
	groups, err := s.readAttributed(ctx, q, values, true)
	if isSumOverflow(err) {
		groups, err = s.readAttributed(ctx, q, values, false)
	}
	return groups, err
}

// readAttributed is sumAttributed. With inSQL, SQLite does most of it, and fails if a sum overflows.
func (s *store) readAttributed(ctx context.Context, q *usageQuery, values string, inSQL bool,
) (map[usageKey]*usageSum, error) {
	args := q.attributedArgs(q.limit+1, q.interval, q.byProject)
	byLabels := q.byToken || q.byModel || q.byEndpoint || q.byOutcome
	if values != "" || byLabels {
		args = append(args, q.byToken, q.byModel, q.byEndpoint, q.byOutcome)
	}
	if values != "" {
		args = append(args, values)
	}
	if !inSQL {
		args[5] = maxAttributedSums
	}
	rows, err := collect(ctx, s.readDB, "adding up an attribute", func(r *usageRow) []any {
		return append([]any{&r.at, &r.value, &r.projectSeq, &r.projectID, &r.projectName, &r.projectDeleted,
			&r.tokenID, &r.tokenName, &r.model, &r.endpoint, &r.outcome}, r.columns()...)
	}, attributedStatement(values != "", byLabels, inSQL), args...)
	if err == nil && inSQL && len(rows) > q.limit {
		err = errTooManyRows
	}
	groups := map[usageKey]*usageSum{}
	for i := range rows {
		r := &rows[i]
		if q.interval == "month" {
			at := time.UnixMilli(r.at).UTC()
			r.at = max(time.Date(at.Year(), at.Month(), 1, 0, 0, 0, 0, time.UTC).UnixMilli(), q.from)
		}
		q.addTo(groups, r.usageKey, r.usageSum)
	}
	return groups, err
}

// attributedStatement returns a statement of readAttributed. Where neither values nor labels matter, it adds up in the
// order of the key: sorting all rows costs many times as much.
func attributedStatement(byValue, byLabels, addUp bool) string {
	const sums = `sum(calls) AS calls, sum(input_tokens) AS input_tokens, sum(cached_tokens) AS cached_tokens,
			sum(output_tokens) AS output_tokens, sum(reasoning_tokens) AS reasoning_tokens, sum(cost) AS cost,
			sum(unpriced_calls) AS unpriced_calls, sum(estimated_calls) AS estimated_calls,
			sum(would_refuse) AS would_refuse, sum(total_us) AS total_us, sum(cache_hits) AS cache_hits,
			sum(saved) AS saved, sum(saved_us) AS saved_us, sum(prompt_saved) AS prompt_saved,
			sum(client_retries) AS client_retries`
	const head = `SELECT g.at, g.value, g.project, coalesce(p.id, ''), coalesce(p.name, ''), p.deleted_at IS NOT NULL,
			coalesce(t.id, ''), coalesce(t.name, ''), g.model, g.endpoint, g.outcome, ` + sumColumns + `
		FROM (SELECT CASE ?7 WHEN 'hour' THEN at WHEN 'total' THEN 0 ELSE at - at % 86400000 END AS at,
			CASE WHEN ?8 THEN project ELSE 0 END AS project, `
	const labels = `CASE WHEN ?9 THEN token ELSE 0 END AS token, CASE WHEN ?10 THEN model ELSE '' END AS model,
			CASE WHEN ?11 THEN endpoint ELSE '' END AS endpoint, CASE WHEN ?12 THEN outcome ELSE '' END AS outcome, `
	const noLabels = `0 AS token, '' AS model, '' AS endpoint, '' AS outcome, '' AS value, `
	const inList = `AND value IN (SELECT atom FROM json_each(CAST(?13 AS TEXT))) `
	const tail = `) g LEFT JOIN projects p ON p.seq = g.project LEFT JOIN tokens t ON t.seq = g.token LIMIT ?6`
	switch {
	case byValue && addUp:
		return head + labels + `value, ` + sums + fromAttributed + inList + `GROUP BY 1, 2, 3, 4, 5, 6, 7` + tail
	case byValue:
		return head + labels + `value, ` + sumColumns + fromAttributed + inList + tail
	case byLabels && addUp:
		return head + labels + `'' AS value, ` + sums + fromAttributed + `GROUP BY 1, 2, 3, 4, 5, 6` + tail
	case byLabels:
		return head + labels + `'' AS value, ` + sumColumns + fromAttributed + tail
	case addUp:
		return head + noLabels + sums + ` FROM (SELECT project, at, ` + sums + fromAttributed +
			`GROUP BY project, at) hours GROUP BY 1, 2` + tail
	}
	return head + noLabels + sumColumns + fromAttributed + tail
}

// deleteOldAttributionSums deletes some of the sums from before a time, sessions for those of sessions and others for
// the rest, and returns how many: of up to limit attributes of projects, those of about 200 values in the oldest hour.
func (s *store) deleteOldAttributionSums(ctx context.Context, sessions, others int64, limit int) (int64, error) {
	type oldest struct {
		project, at int64
		attribute   string
	}
	found, err := collect(ctx, s.readDB, "finding old sums of attributes", func(o *oldest) []any {
		return []any{&o.project, &o.attribute, &o.at}
	}, usedAttributesCTE+`
		SELECT o.project, o.attribute, o.at FROM (SELECT project, attribute, (SELECT min(at) FROM attribution_sums
				WHERE project = u.project AND attribute = u.attribute) AS at
			FROM used u WHERE attribute IS NOT NULL) o
		WHERE o.at < CASE o.attribute WHEN 'session' THEN CAST(?2 AS BIGINT)
			ELSE CAST(?3 AS BIGINT) END LIMIT ?4`, "", sessions, others, limit)
	var deleted int64
	for _, o := range found {
		n, deleteErr := execCount(ctx, s.writeDB, "deleting old sums of attributes", `
			DELETE FROM attribution_sums WHERE project = ?1 AND attribute = ?2 AND at = ?3 AND value <= coalesce(
				(SELECT value FROM attribution_sums WHERE project = ?1 AND attribute = ?2 AND at = ?3
					ORDER BY value LIMIT 1 OFFSET 200),
				(SELECT max(value) FROM attribution_sums WHERE project = ?1 AND attribute = ?2 AND at = ?3))`,
			o.project, o.attribute, o.at)
		if err = cmp.Or(err, deleteErr); err != nil {
			break
		}
		deleted += n
	}
	return deleted, err
}

// eraseEndUser removes a name from the calls of a project, where it is an end user, or a session or a tag beside that,
// from their pending records and from the sums, and deletes the content of these calls. It takes small steps, between
// which calls are written, and returns how many calls there were. awaitLate returns when all usage is written that was
// recorded late and may still have found the name in a call. What is removed is overwritten; what was deleted earlier,
// such as pending records, stays in free space of the file until later rows take that.
func (s *store) eraseEndUser(ctx context.Context, project int64, name string, awaitLate func() error,
) (erased int64, err error) {
	const doing = "erasing an end user"
	_ = execute(ctx, s.writeDB, doing, `PRAGMA secure_delete = 1`)
	defer func() { _ = execute(ctx, s.writeDB, doing, `PRAGMA secure_delete = 0`) }()
	if err := s.eraseFromPending(ctx, project, name); err != nil {
		return 0, err
	}
	for _, query := range [...]string{
		`SELECT id, session, end_user, tags FROM requests
			WHERE end_user = ?2 AND end_user <> '' AND project = ?1 LIMIT 200`,
		`SELECT id, session, end_user, tags FROM requests
			WHERE session = ?2 AND session <> '' AND project = ?1 LIMIT 200`,
	} {
		for {
			n, err := s.eraseCalls(ctx, query, project, name)
			if erased += n; err != nil {
				return erased, err
			}
			if n == 0 {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	if err := awaitLate(); err != nil { // from now on no call has the name that a sum could get
		return erased, err
	}
	attributes, err := collect(ctx, s.readDB, doing, single[string],
		`SELECT DISTINCT attribute FROM attribution_sums WHERE project = ?`, project)
	for _, attribute := range attributes {
		if err == nil {
			err = s.eraseSums(ctx, project, attribute, name)
		}
	}
	_ = execute(ctx, s.writeDB, doing, `PRAGMA wal_checkpoint(TRUNCATE)`) // a reader may be in its way
	return erased, err
}

// hoursOfAttributeCTE lists the hours, from ?3 on, in which calls of the project with seq ?1 had the attribute ?2, by
// stepping from one to the next in the key's order. A row with NULL ends them.
const hoursOfAttributeCTE = `
	WITH RECURSIVE hours (at) AS (
		SELECT min(at) FROM attribution_sums WHERE project = ?1 AND attribute = ?2 AND at >= ?3
		UNION ALL
		SELECT (SELECT min(at) FROM attribution_sums WHERE project = ?1 AND attribute = ?2 AND at > h.at)
		FROM hours h WHERE h.at IS NOT NULL)`

// usedAttributesCTE lists the attributes that calls of the project with id ?1 ("": of all) had, in the same way.
const usedAttributesCTE = `
	WITH RECURSIVE used (project, attribute) AS (
		SELECT p.seq, (SELECT min(attribute) FROM attribution_sums WHERE project = p.seq)
		FROM projects p WHERE ?1 = '' OR p.id = ?1
		UNION ALL
		SELECT u.project,
			(SELECT min(attribute) FROM attribution_sums WHERE project = u.project AND attribute > u.attribute)
		FROM used u WHERE u.attribute IS NOT NULL)`

// eraseSums deletes the sums of a name in all hours; those of a tag only where no call of the hour has it.
func (s *store) eraseSums(ctx context.Context, project int64, attribute, name string) error {
	const doing = "erasing an end user from the sums"
	key, isTag := strings.CutPrefix(attribute, tagAttribute)
	hours, err := collect(ctx, s.readDB, doing, single[int64], hoursOfAttributeCTE+`
		SELECT h.at FROM hours h WHERE EXISTS (SELECT 1 FROM attribution_sums s
			WHERE s.project = ?1 AND s.attribute = ?2 AND s.at = h.at AND s.value = ?4)`, project, attribute, 0, name)
	for _, at := range hours {
		if isTag {
			kept, err := queryValue[int](ctx, s.readDB, doing, `
				SELECT count(*) FROM (SELECT 1 FROM requests r WHERE r.project = ?1 AND r.id >= ?2 AND r.id < ?3
					AND CASE r.tags WHEN '' THEN '' ELSE r.tags ->> ?4 END = ?5 LIMIT 1) kept`, project,
				minIDAt(time.UnixMilli(at)), minIDAt(time.UnixMilli(at+hourMS)), key, name)
			if err != nil {
				return err
			}
			if kept > 0 {
				continue
			}
		}
		for range 2 { // the first may have waited for mergeSlots, whose new rows only the second finds
			if err := execute(ctx, s.writeDB, doing, `
				DELETE FROM attribution_sums WHERE project = ? AND attribute = ? AND at = ? AND value = ?`,
				project, attribute, at, name); err != nil {
				return err
			}
		}
	}
	return err
}

// eraseFromPending takes a name out of the pending records of a project. Whoever has read them before, to record the
// calls of a closed replica as lost, is done when it returns.
func (s *store) eraseFromPending(ctx context.Context, project int64, name string) error {
	const doing = "erasing an end user from pending records"
	type batch struct {
		id    int64
		calls string
	}
	err := s.withTx(ctx, func(tx *sql.Tx) error {
		batches, err := collect(ctx, tx, doing, func(b *batch) []any { return []any{&b.id, &b.calls} },
			`SELECT batch, calls FROM begun`)
		if err != nil {
			return err
		}
		for _, b := range batches {
			calls, found, err := eraseFromBatch(b.calls, project, name)
			if err != nil {
				return fmt.Errorf("%s: %w", doing, err)
			}
			if !found {
				continue
			}
			if err := execute(ctx, tx, doing, `UPDATE begun SET calls = ? WHERE batch = ?`, calls, b.id); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && s.backend != nil {
		err = s.backend.awaitRecovery(ctx)
	}
	return err
}

// A namedCall is a call that may have the name of an end user.
type namedCall struct {
	id          int64
	attribution attribution
}

// eraseCalls takes a name out of up to 200 calls of a project and deletes their content. query finds calls by one of
// the columns that may have the name.
func (s *store) eraseCalls(ctx context.Context, query string, project int64, name string) (n int64, err error) {
	const doing = "erasing an end user from calls"
	err = s.withTx(ctx, func(tx *sql.Tx) error {
		calls, err := collect(ctx, tx, doing, func(c *namedCall) []any {
			return []any{&c.id, &c.attribution.session, &c.attribution.endUser, &c.attribution.tags}
		}, query, project, name)
		if err != nil {
			return err
		}
		for _, c := range calls {
			session, endUser, tags := c.attribution.without(name).columns()
			if err := execute(ctx, tx, doing, `DELETE FROM contents WHERE id = ?`, c.id); err != nil {
				return err
			}
			err = execute(ctx, tx, doing, `UPDATE requests SET session = ?, end_user = ?, tags = ? WHERE id = ?`,
				session, endUser, tags, c.id)
			if err != nil {
				return err
			}
		}
		n = int64(len(calls))
		return nil
	})
	return n, err
}

// deleteEndedValues deletes up to limit rows of windows that ended at before or earlier, and returns how many.
func (s *store) deleteEndedValues(ctx context.Context, before int64, limit int) (int64, error) {
	return execCount(ctx, s.writeDB, "deleting the use of values", `
		DELETE FROM limit_values WHERE (project, token, rule, value, window_start) IN (
			SELECT project, token, rule, value, window_start FROM limit_values
			WHERE window_end <= ? ORDER BY window_end LIMIT ?)`, before, limit)
}

// deleteLimitValues deletes such rows.
func (s *store) deleteLimitValues(ctx context.Context, project int64, value string, rows []limitValueRow) error {
	return s.withTx(ctx, func(tx *sql.Tx) error {
		for _, r := range rows {
			err := execute(ctx, tx, "deleting what a value has used", `
				DELETE FROM limit_values
				WHERE project = ? AND token = ? AND rule = ? AND value = ? AND window_start = ?`,
				project, r.token, r.rule, value, r.windowStart)
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// Where appendPendingRecord puts what erasing an end user reads.
const (
	pendingProject = 1
	pendingSession = 10
	pendingEndUser = 11
	pendingTags    = 12
)

// eraseFromBatch takes a name out of the calls of a project in a row of begun (see appendPendingRecord), and reports
// whether any had it. Such a call loses its tags too.
func eraseFromBatch(text string, project int64, name string) (erased string, found bool, err error) {
	var calls [][]json.RawMessage
	if err := json.Unmarshal([]byte(text), &calls); err != nil {
		return "", false, err
	}
	for _, c := range calls {
		var session, endUser string
		if len(c) <= pendingTags || string(c[pendingProject]) != strconv.FormatInt(project, 10) {
			continue
		}
		if json.Unmarshal(c[pendingSession], &session) != nil || json.Unmarshal(c[pendingEndUser], &endUser) != nil ||
			session != name && endUser != name {
			continue
		}
		found = true
		c[pendingEndUser], c[pendingTags] = json.RawMessage(`""`), json.RawMessage(`""`)
		if session == name {
			c[pendingSession] = json.RawMessage(`""`)
		}
	}
	out, err := json.Marshal(calls)
	return string(out), found, err
}

// limitValueUse returns what a value has used in windows that began at from or later, of a project's limit with
// for_each or, unless token is 0, of a token's. rule says what the limit counts. stored is false if the limit itself
// has counted nothing of the value yet: what it has used before the limit was set is in the sums.
func (s *store) limitValueUse(ctx context.Context, project, token int64, rule, value string, from int64,
) (used int64, stored bool, err error) {
	past, err := s.pastValueUse(ctx, project, token, rule, value, from)
	if err != nil {
		return 0, false, err
	}
	err = scanRow(ctx, s.readDB, "reading what a value has used", []any{&used, &stored}, `
		SELECT coalesce(sum(min(used, 1000000000000000000)), 0), count(*) > 0 FROM limit_values
		WHERE project = ? AND token = ? AND rule = ? AND value = ? AND window_start >= ?`,
		project, token, rule, value, from)
	return max(used, past, 0), stored, err
}

// mayBeNew reports whether a limit of a project or, unless token is 0, of a token may have been set at from or later.
func (s *store) mayBeNew(ctx context.Context, project, token, from int64) (bool, error) {
	query, seq := `SELECT coalesce((SELECT updated_at FROM projects WHERE seq = ?), 0)`, project
	if token != 0 {
		query, seq = `SELECT coalesce((SELECT updated_at FROM tokens WHERE seq = ?), 0)`, token
	}
	changedAt, err := queryValue[int64](ctx, s.readDB, "reading when a policy was changed", query, seq)
	return changedAt >= from, err
}

// pastValueUse is limitValueUse by the sums, which have all calls with the value, whenever the limit was set. It
// returns 0 where the limit has counted all of them itself. It reads one place of an index for each hour.
func (s *store) pastValueUse(ctx context.Context, project, token int64, rule, value string, from int64,
) (used int64, err error) {
	if value == "" { // the sums have calls with a value only
		return 0, nil
	}
	r, err := parseLimitRule(rule)
	if err != nil {
		return 0, err
	}
	if isNew, err := s.mayBeNew(ctx, project, token, from); err != nil || !isNew {
		return 0, err
	}
	sums, err := collect(ctx, s.readDB, "reading the sums of a value", (*pastUsage).columns, hoursOfAttributeCTE+`
		SELECT s.endpoint, s.asked, s.calls, s.input_tokens, s.output_tokens, s.cost
		FROM hours h JOIN attribution_sums s ON s.project = ?1 AND s.attribute = ?2 AND s.at = h.at AND s.value = ?4
		WHERE CAST(?5 AS BIGINT) IN (0, s.token) AND s.outcome <> 'refused'`, project, r.ForEach, from, value, token)
	for _, u := range sums {
		if r.applies(u.endpoint, u.requestedModel) {
			used = addSat(used, r.amount(&u))
		}
	}
	return used, err
}

// parseLimitRule reads what a limit with for_each counts.
func parseLimitRule(rule string) (r limitRule, err error) {
	if err = json.Unmarshal([]byte(rule), &r); err != nil {
		err = fmt.Errorf("reading what a limit counts: %w", err)
	}
	return r, err
}

// applies reports whether calls of an endpoint and a model count. Models without sums of their own always do.
func (r *limitRule) applies(endpoint, model string) bool {
	_, pattern, _ := strings.Cut(endpoint, " ")
	return (r.Endpoint == "" || matchesPattern(r.Endpoint, endpoint) || matchesPattern(r.Endpoint, pattern)) &&
		(r.Model == "" || model == otherModels || matchesPattern(r.Model, model))
}

// amount returns how much of what calls have used counts.
func (r *limitRule) amount(u *pastUsage) int64 {
	switch r.Count {
	case "requests":
		return u.calls
	case "tokens":
		return addSat(u.inputTokens, u.outputTokens)
	}
	return u.nanosUSD
}

// countLimitValues returns how many values limitValueUse has use of.
func (s *store) countLimitValues(ctx context.Context, project, token int64, rule string, from int64) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "counting the values of a limit", `
		SELECT count(DISTINCT value) FROM limit_values
		WHERE project = ? AND token = ? AND rule = ? AND window_start >= ?`,
		project, token, rule, from)
}

// A valueUse is what a value has used.
type valueUse struct {
	value string
	used  int64
}

func (u *valueUse) columns() []any { return []any{&u.value, &u.used} }

// maxPastSums is how many sums are read to find the values that have used most before a limit was set.
const maxPastSums = 200_000

// topLimitValues returns up to limit of these values, those that have used most first. Where the limit is new, it also
// looks for values that have used much before, in maxPastSums sums at most.
func (s *store) topLimitValues(ctx context.Context, project, token int64, rule string, from int64, limit int,
) ([]valueUse, error) {
	top, err := collect(ctx, s.readDB, "listing the values of a limit", (*valueUse).columns, `
		SELECT value, sum(min(used, 1000000000000000000)) AS total FROM limit_values
		WHERE project = ? AND token = ? AND rule = ? AND window_start >= ?
		GROUP BY value ORDER BY total DESC, value LIMIT ?`, project, token, rule, from, limit)
	if err != nil {
		return nil, err
	}
	r, err := parseLimitRule(rule)
	if err != nil {
		return nil, err
	}
	if isNew, err := s.mayBeNew(ctx, project, token, from); err != nil || !isNew {
		return top, err
	}
	before, err := collect(ctx, s.readDB, "finding the largest values before a limit", (*valueUse).columns, `
		SELECT value, sum(amount) AS total FROM (
			SELECT value, min(CASE ?5 WHEN 'requests' THEN calls
				WHEN 'tokens' THEN min(input_tokens, ?6) + min(output_tokens, ?6) ELSE cost END, ?6) AS amount
			FROM attribution_sums
			WHERE project = ?1 AND attribute = ?2 AND at >= ?3 AND CAST(?4 AS BIGINT) IN (0, token)
				AND outcome <> 'refused' LIMIT ?7) counted
		GROUP BY value ORDER BY total DESC, value LIMIT ?8`,
		project, r.ForEach, from, token, r.Count, int64(math.MaxInt64/maxPastSums/2), maxPastSums, limit)
	for i := 0; i < len(before) && err == nil; i++ {
		if !slices.ContainsFunc(top, func(u valueUse) bool { return u.value == before[i].value }) {
			top = append(top, before[i])
		}
	}
	for i := 0; i < len(top) && err == nil; i++ {
		top[i].used, _, err = s.limitValueUse(ctx, project, token, rule, top[i].value, from)
	}
	top = slices.DeleteFunc(top, func(u valueUse) bool { return u.used == 0 })
	slices.SortStableFunc(top, func(a, b valueUse) int { return cmp.Compare(b.used, a.used) })
	return top[:min(limit, len(top))], err
}

// A limitValueRow names a row of limit_values, of one project and value.
type limitValueRow struct {
	token       int64
	rule        string
	windowStart int64
}

// limitValueRows returns the rows of a value of an attribute, in the limits of a project and its tokens.
func (s *store) limitValueRows(ctx context.Context, project int64, attribute, value string) ([]limitValueRow, error) {
	rows, err := collect(ctx, s.readDB, "looking for what a value has used", func(r *limitValueRow) []any {
		return []any{&r.token, &r.rule, &r.windowStart}
	}, `SELECT DISTINCT token, rule, window_start FROM limit_values WHERE project = ? AND value = ?`, project, value)
	return slices.DeleteFunc(rows, func(r limitValueRow) bool { // a rule begins with its attribute
		return !strings.HasPrefix(r.rule, `{"for_each":"`+attribute+`"`)
	}), err
}
