// This file has the SQL for lists of tokens, projects and calls: their orders, pages in both directions, filters, and
// the search for a part of a name or of whatever else a list shows. It only reads.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A searchTerm finds what has a text in its name or id, in any case. The zero value finds everything.
type searchTerm struct {
	text     string
	indexed  string    // the query of the indexes token_search and project_search; "": the text is too short for them
	variants [4]string // the cases of a text that is too short; each is "" if there is none
}

const (
	maxSearchBytes  = 200
	minIndexedRunes = 3 // the index has parts of three characters
	// maxScannedNames is how many tokens are read for one page of a search that the index does not cover.
	maxScannedNames = 25_000
	// maxFoundNames is how many of the tokens that the index finds are read for one page with other filters.
	maxFoundNames = 50_000
)

// newSearchTerm returns the term for a text of at most maxSearchBytes. All characters stand for themselves. A NUL,
// which no name has, is replaced: it would end the query.
func newSearchTerm(text string) (t searchTerm) {
	t.text = strings.ToValidUTF8(strings.ReplaceAll(strings.TrimSpace(text), "\x00", "\ufffd"), "\ufffd")
	switch n := utf8.RuneCountInString(t.text); {
	case n == 0:
	case n >= minIndexedRunes:
		t.indexed = `"` + strings.ReplaceAll(t.text, `"`, `""`) + `"`
	default:
		runes := []rune(t.text)
		first, last := runes[:n-1], runes[n-1]
		lower, upper := strings.ToLower(string(first)), strings.ToUpper(string(first))
		for i, head := range []string{lower, upper} {
			t.variants[2*i] = head + string(unicode.ToLower(last))
			t.variants[2*i+1] = head + string(unicode.ToUpper(last))
		}
	}
	return t
}

// parseSearchTerm is newSearchTerm for the parameter search of an address.
func parseSearchTerm(text string) (searchTerm, error) {
	if len(text) > maxSearchBytes {
		return searchTerm{}, badRequest("invalid_value", "search", "search must have at most 200 bytes.")
	}
	return newSearchTerm(text), nil
}

// isEmpty reports whether the term finds everything.
func (t *searchTerm) isEmpty() bool { return t.text == "" }

// isShort reports whether the index does not cover the term.
func (t *searchTerm) isShort() bool { return t.text != "" && t.indexed == "" }

// The orders of a list of tokens. With a minus they are reversed. The last two are of all projects.
const (
	tokensOldest  = "oldest"
	tokensNewest  = "newest"
	tokensByName  = "name"
	tokensByEnd   = "ends" // without those revoked
	tokensRevoked = "revoked"
	tokensUnused  = "unused"
)

// A tokenListQuery says which tokens to list, in which order, and after which one.
type tokenListQuery struct {
	order    string     // one of the constants
	project  string     // a project's id; "" for all
	active   *bool      // nil for all
	now      int64      // for active: a token can expire
	search   searchTerm // in the orders newest and oldest
	prefix   string     // of the name, in the order name, and of a search
	from, to int64      // of the end, in the order ends: from < ends_at <= to

	afterSeq  int64  // the last token of the page before, 0 for the first page
	afterName string // its name, in the order name
	afterTime int64  // its end or revocation, in the orders ends and revoked
	limit     int    // of tokens that are visited
	maxFound  int    // instead of maxFoundNames; 0: that
}

// reversed returns the same list from its end.
func (q tokenListQuery) reversed() tokenListQuery {
	order, isReversed := strings.CutPrefix(q.order, "-")
	switch {
	case q.order == tokensNewest:
		q.order = tokensOldest
	case q.order == tokensOldest:
		q.order = tokensNewest
	case isReversed:
		q.order = order
	default:
		q.order = "-" + order
	}
	return q
}

// walkTokens calls visit for each token in order, until it returns false or limit tokens were visited. more reports
// whether there may be further ones: after the token with the seq scanned if that is not 0, otherwise after the last
// one visited.
func (s *store) walkTokens(ctx context.Context, q tokenListQuery, visit func(*tokenRow) bool,
) (more bool, scanned int64, err error) {
	if more, scanned, err = s.searchRange(ctx, &q); err != nil {
		return false, 0, err
	}
	query, args := q.statement()
	args = append(args, q.active, q.now, q.limit+1, q.search.indexed, scanned)
	for _, v := range q.search.variants {
		args = append(args, v)
	}
	rows, err := s.readDB.QueryContext(ctx, query, args...)
	if err != nil {
		return false, 0, fmt.Errorf("listing tokens: %w", err)
	}
	defer rows.Close()
	for n := 0; rows.Next(); n++ {
		var t tokenRow
		if err := rows.Scan(t.columns()...); err != nil {
			return false, 0, fmt.Errorf("listing tokens: %w", err)
		}
		if n == q.limit || !visit(&t) {
			return true, 0, nil
		}
	}
	if !more {
		scanned = 0
	}
	return more, scanned, rows.Err()
}

// listTokens returns up to q.limit tokens, and scanned as walkTokens does.
func (s *store) listTokens(ctx context.Context, q tokenListQuery) (rows []tokenRow, scanned int64, err error) {
	_, scanned, err = s.walkTokens(ctx, q, func(t *tokenRow) bool {
		rows = append(rows, *t)
		return true
	})
	return rows, scanned, err
}

// searchRange returns the last seq that one page of a search reads, and whether there may be tokens after it.
func (s *store) searchRange(ctx context.Context, q *tokenListQuery) (more bool, last int64, err error) {
	if q.search.isShort() {
		newest, err := queryValue[int64](ctx, s.readDB, "finding the newest token",
			`SELECT coalesce(max(seq), 0) FROM tokens`)
		more, last = q.scanRange(newest)
		return more, last, err
	}
	const found = `SELECT rowid FROM token_search(?1) WHERE `
	query := found + `rowid < ?2 ORDER BY rowid DESC LIMIT 1 OFFSET ?3`
	if q.order == tokensOldest {
		query, last = found+`rowid > ?2 ORDER BY rowid LIMIT 1 OFFSET ?3`, math.MaxInt64
	}
	isFiltered := q.project != "" || q.active != nil || q.prefix != ""
	if q.search.isEmpty() || !isFiltered || s.backend != nil { // PostgreSQL uses the index of the project instead
		return false, last, nil
	}
	end, err := queryValue[int64](ctx, s.readDB, "searching tokens", query, q.search.indexed, q.seqBound(),
		cmp.Or(q.maxFound, maxFoundNames)-1)
	if errors.Is(err, errNotFound) {
		return false, last, nil
	}
	return true, end, err
}

// scanRange returns the last seq that one page of a search without an index reads, and whether there are tokens after
// it.
func (q *tokenListQuery) scanRange(newest int64) (more bool, last int64) {
	if q.order == tokensOldest {
		last = min(q.afterSeq, newest) + maxScannedNames
		return last < newest, last
	}
	last = max(1, min(cmp.Or(q.afterSeq, math.MaxInt64), newest+1)-maxScannedNames)
	return last > 1, last
}

const (
	inAllTokens      = selectTokens + `WHERE `
	inProjectTokens  = selectTokens + `WHERE project = (SELECT seq FROM projects WHERE id = ?1) AND `
	tokensWithActive = ` AND (CAST(?5 AS BOOLEAN) IS NULL OR ?5 = (
		(SELECT p.is_active FROM projects p WHERE p.seq = tokens.project) AND revoked_at IS NULL AND ends_at > ?6
		AND (idle_expiry IS NULL OR coalesce(last_used_at, created_at) + idle_expiry > ?6))) `
)

// statement returns the statement for an order, and its first four arguments: the project, the seq and the
// sort key after which the page begins, and the end of the range of keys. Each statement walks one index.
// Where several tokens can have the same key, the rest of those comes first and then all with later keys: a
// page must not cost more because many share a key.
func (q *tokenListQuery) statement() (string, []any) {
	if !q.search.isEmpty() {
		return q.searchStatement()
	}
	switch strings.TrimPrefix(q.order, "-") {
	case tokensByName, tokensByEnd:
		return q.keyStatement()
	case tokensRevoked, tokensUnused:
		return q.stateStatement()
	}
	const (
		newest = `seq < ?2` + tokensWithActive + `ORDER BY seq DESC LIMIT ?7`
		oldest = `seq > ?2` + tokensWithActive + `ORDER BY seq LIMIT ?7`
	)
	texts := [2]string{inAllTokens + newest, inProjectTokens + newest} // of all projects, of one
	if q.order == tokensOldest {
		texts = [2]string{inAllTokens + oldest, inProjectTokens + oldest}
	}
	return q.chooseText(texts), []any{q.project, q.seqBound(), nil, nil}
}

func (q *tokenListQuery) chooseText(texts [2]string) string {
	if q.project != "" {
		return texts[1]
	}
	return texts[0]
}

// isDescending reports whether the seqs of tokens with the same key become smaller.
func (q *tokenListQuery) isDescending() bool {
	switch q.order {
	case tokensOldest, tokensByName, tokensByEnd, "-" + tokensRevoked, "-" + tokensUnused:
		return false
	}
	return true
}

// seqBound returns the seq of the last token of the page before, or one before the first.
func (q *tokenListQuery) seqBound() int64 {
	if q.afterSeq == 0 && q.isDescending() {
		return math.MaxInt64
	}
	return q.afterSeq
}

// searchStatement is statement for a search: it walks the index of the texts or, for a short text, a range of tokens.
func (q *tokenListQuery) searchStatement() (string, []any) {
	const (
		// The subquery hides the columns of the index, which have the names of columns of tokens. A short text has no
		// space in it, so it is not found across name and id.
		found = `SELECT ` + tokenColumns + ` FROM (SELECT rowid AS found FROM token_search(?8)) f
			JOIN tokens ON seq = found WHERE `
		foundInProject = found + `project = (SELECT seq FROM projects WHERE id = ?1) AND `
		hasPrefix      = ` AND name >= ?3 AND name < ?4` + tokensWithActive
		newest         = `found < ?2 AND found >= ?9` + hasPrefix + `ORDER BY found DESC LIMIT ?7`
		oldest         = `found > ?2 AND found <= ?9` + hasPrefix + `ORDER BY found LIMIT ?7`
		isMatch        = ` AND (instr(name || ' ' || id, ?10) > 0 OR instr(name || ' ' || id, ?11) > 0
			OR instr(name || ' ' || id, ?12) > 0 OR instr(name || ' ' || id, ?13) > 0)` + hasPrefix
		shortNewest = `seq < ?2 AND seq >= ?9` + isMatch + `ORDER BY seq DESC LIMIT ?7`
		shortOldest = `seq > ?2 AND seq <= ?9` + isMatch + `ORDER BY seq LIMIT ?7`
	)
	texts := [2]string{found + newest, foundInProject + newest}
	switch isOldest := q.order == tokensOldest; {
	case q.search.isShort() && isOldest:
		texts = [2]string{inAllTokens + shortOldest, inProjectTokens + shortOldest}
	case q.search.isShort():
		texts = [2]string{inAllTokens + shortNewest, inProjectTokens + shortNewest}
	case isOldest:
		texts = [2]string{found + oldest, foundInProject + oldest}
	}
	return q.chooseText(texts), []any{q.project, q.seqBound(), q.prefix, prefixEnd(q.prefix)}
}

// keyStatement is statement for the orders by name and by end.
func (q *tokenListQuery) keyStatement() (string, []any) {
	const (
		sameName   = `name = ?3 AND seq > ?2` + tokensWithActive + `UNION ALL `
		laterNames = `name > ?3 AND name < ?4` + tokensWithActive + `ORDER BY name, seq LIMIT ?7`
		sameName2  = `name = ?3 AND seq < ?2` + tokensWithActive + `UNION ALL `
		priorNames = `name < ?3 AND name >= ?4` + tokensWithActive + `ORDER BY name DESC, seq DESC LIMIT ?7`
		sameEnd    = `revoked_at IS NULL AND ends_at = ?3 AND seq > ?2` + tokensWithActive + `UNION ALL `
		laterEnds  = `revoked_at IS NULL AND ends_at > ?3 AND ends_at <= ?4` + tokensWithActive +
			`ORDER BY ends_at, seq LIMIT ?7`
		sameEnd2  = `revoked_at IS NULL AND ends_at = ?3 AND seq < ?2` + tokensWithActive + `UNION ALL `
		priorEnds = `revoked_at IS NULL AND ends_at < ?3 AND ends_at > ?4` + tokensWithActive +
			`ORDER BY ends_at DESC, seq DESC LIMIT ?7`
	)
	seq, first := q.seqBound(), q.afterSeq == 0
	switch q.order {
	case tokensByName:
		texts := [2]string{inAllTokens + sameName + inAllTokens + laterNames,
			inProjectTokens + sameName + inProjectTokens + laterNames}
		return q.chooseText(texts), []any{q.project, seq, max(q.afterName, q.prefix), prefixEnd(q.prefix)}
	case "-" + tokensByName:
		texts := [2]string{inAllTokens + sameName2 + inAllTokens + priorNames,
			inProjectTokens + sameName2 + inProjectTokens + priorNames}
		key := q.afterName
		if first {
			key = prefixEnd(q.prefix)
		}
		return q.chooseText(texts), []any{q.project, seq, key, q.prefix}
	case "-" + tokensByEnd:
		texts := [2]string{inAllTokens + sameEnd2 + inAllTokens + priorEnds,
			inProjectTokens + sameEnd2 + inProjectTokens + priorEnds}
		key := q.afterTime
		if first {
			key = q.to + 1
		}
		return q.chooseText(texts), []any{q.project, seq, key, q.from}
	}
	texts := [2]string{inAllTokens + sameEnd + inAllTokens + laterEnds,
		inProjectTokens + sameEnd + inProjectTokens + laterEnds}
	if first {
		seq = math.MaxInt64 // from itself is not in the range
	}
	return q.chooseText(texts), []any{q.project, seq, max(q.from, q.afterTime), q.to}
}

// stateStatement is statement for the orders of revoked and of unused tokens.
func (q *tokenListQuery) stateStatement() (string, []any) {
	const (
		sameRevoked  = `revoked_at = ?3 AND seq < ?2` + tokensWithActive + `UNION ALL `
		priorRevoked = `revoked_at < ?3` + tokensWithActive + `ORDER BY revoked_at DESC, seq DESC LIMIT ?7`
		sameRevoked2 = `revoked_at = ?3 AND seq > ?2` + tokensWithActive + `UNION ALL `
		laterRevoked = `revoked_at > ?3` + tokensWithActive + `ORDER BY revoked_at, seq LIMIT ?7`
		unusedNewest = `last_used_at IS NULL AND seq < ?2` + tokensWithActive + `ORDER BY seq DESC LIMIT ?7`
		unusedOldest = `last_used_at IS NULL AND seq > ?2` + tokensWithActive + `ORDER BY seq LIMIT ?7`
	)
	text, key := inAllTokens+sameRevoked+inAllTokens+priorRevoked, q.afterTime
	switch q.order {
	case tokensRevoked:
		key = cmp.Or(q.afterTime, math.MaxInt64)
	case "-" + tokensRevoked:
		text = inAllTokens + sameRevoked2 + inAllTokens + laterRevoked
	case tokensUnused:
		text = inAllTokens + unusedNewest
	default:
		text = inAllTokens + unusedOldest
	}
	return text, []any{q.project, q.seqBound(), key, nil}
}

// A projectListQuery says which projects to list, by age, and after which one.
type projectListQuery struct {
	isNewestFirst bool
	active        *bool  // nil for all
	prefix        string // of the name
	search        searchTerm
	afterSeq      int64 // the last project of the page before, 0 for the first page
	limit         int
}

// listProjects returns up to q.limit projects.
func (s *store) listProjects(ctx context.Context, q projectListQuery) ([]projectRow, error) {
	const (
		isMatch = `deleted_at IS NULL AND (CAST(?2 AS BOOLEAN) IS NULL OR is_active = ?2)
			AND (?3 = '' OR (name >= ?3 AND name < ?4))
			AND (?6 = '' OR seq IN (SELECT rowid FROM project_search(?6)))
			AND (?7 = '' OR instr(name || ' ' || id, ?7) > 0 OR instr(name || ' ' || id, ?8) > 0
				OR instr(name || ' ' || id, ?9) > 0 OR instr(name || ' ' || id, ?10) > 0)`
		oldest = selectProjects + `WHERE seq > ?1 AND ` + isMatch + ` ORDER BY seq LIMIT ?5`
		newest = selectProjects + `WHERE seq < ?1 AND ` + isMatch + ` ORDER BY seq DESC LIMIT ?5`
	)
	text, after := oldest, q.afterSeq
	if q.isNewestFirst {
		text, after = newest, cmp.Or(q.afterSeq, math.MaxInt64)
	}
	v := &q.search.variants
	return collect(ctx, s.readDB, "listing projects", (*projectRow).columns, text, after, q.active, q.prefix,
		prefixEnd(q.prefix), q.limit, q.search.indexed, v[0], v[1], v[2], v[3])
}

// A callSearch finds the calls that have all its words, in any case, in what a list shows of them: project, token,
// endpoint, model, address, status, outcome, error code, session, end user and tags. It has each word in two forms,
// because the database folds the case of ASCII letters only.
type callSearch struct {
	words [maxSearchWords][2]string
	count int
}

const maxSearchWords = 4

// parseCallSearch reads the parameter search of a list of calls.
func parseCallSearch(text string) (c callSearch, err error) {
	t, err := parseSearchTerm(text)
	for word := range strings.FieldsSeq(t.text) {
		if c.count == maxSearchWords {
			return c, badRequest("invalid_value", "search", "search must have at most 4 words.")
		}
		c.words[c.count] = [2]string{strings.ToLower(word), lowerASCII(strings.ToUpper(word))}
		c.count++
	}
	return c, err
}

// lowerASCII folds the case of ASCII letters.
func lowerASCII(text string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' {
			r += 'a' - 'A'
		}
		return r
	}, text)
}

// A requestFilter says which calls a list has. Empty strings and zeros let all calls through.
type requestFilter struct {
	project, token           string // ids
	outcome, model, endpoint string
	modelPattern             string // of LIKE, in lower case, with ! as its escape; besides model
	cache                    string // cacheHit or cacheNone
	attributionFilter
	statusFrom, statusTo int   // statusFrom <= status < statusTo
	from, before         int64 // ids, and so a range of time: from <= id < before
	search               callSearch
	cause                errorClass // of failed calls
	isUnpriced           bool       // only calls whose usage has no known price
	isOldestFirst        bool
	limit                int
}

// failedOutcomes stands in a filter for all outcomes but outcomeOK and outcomeOpen.
const failedOutcomes = "failed"

// needsScan reports whether the filter has a condition that no index covers: calls that do not meet it are
// read too, and they may be many.
func (f *requestFilter) needsScan() bool {
	indexed := 0
	for _, v := range [...]string{f.session, f.endUser, f.token, f.project} {
		if v != "" {
			indexed++
		}
	}
	return f.outcome != "" || f.model+f.modelPattern != "" || f.endpoint != "" || f.statusTo != 0 || f.cache != "" ||
		f.tagKey != "" || f.search.count > 0 || f.isUnpriced || f.cause != "" || indexed > 1
}

// maxScannedRequests is how many calls are read for one page of a list.
const maxScannedRequests = 20_000

// requestsPage returns up to f.limit calls, and the id of the call after which the next page begins, 0 if there is
// none. For a filter that few calls meet, a page can be short or empty although there is a next one, so that no page
// takes long.
func (s *store) requestsPage(ctx context.Context, f requestFilter) (rows []requestView, next int64, err error) {
	limit, from, before := f.limit, f.from, f.before
	f.limit++
	if f.needsScan() {
		if err := s.limitScan(ctx, &f, maxScannedRequests); err != nil {
			return nil, 0, err
		}
	}
	if rows, err = s.listRequests(ctx, f); err != nil {
		return nil, 0, err
	}
	switch {
	case len(rows) > limit:
		return rows[:limit], rows[limit-1].id, nil
	case f.from > from:
		return rows, f.from, nil
	case f.before < before:
		return rows, f.before - 1, nil
	}
	return rows, 0, nil
}

// limitScan narrows f to the first limit calls of its scope: its session, end user, token or project.
func (s *store) limitScan(ctx context.Context, f *requestFilter, limit int) error {
	const (
		head      = `SELECT count(*), coalesce(min(id), 0), coalesce(max(id), 0) FROM (SELECT id FROM requests WHERE `
		newest    = ` AND id >= ?2 AND id < ?3 ORDER BY id DESC LIMIT ?4) first_calls`
		oldest    = ` AND id >= ?2 AND id < ?3 ORDER BY id LIMIT ?4) first_calls`
		ofAll     = head + `?1 = ''`
		ofSession = head + `session = ?1 AND session <> ''`
		ofEndUser = head + `end_user = ?1 AND end_user <> ''`
		ofToken   = head + `token = (SELECT seq FROM tokens WHERE id = ?1)`
		ofProject = head + `project = (SELECT seq FROM projects WHERE id = ?1)`
	)
	texts, scope := [2]string{ofAll + newest, ofAll + oldest}, ""
	switch {
	case f.session != "":
		texts, scope = [2]string{ofSession + newest, ofSession + oldest}, f.session
	case f.endUser != "":
		texts, scope = [2]string{ofEndUser + newest, ofEndUser + oldest}, f.endUser
	case f.token != "":
		texts, scope = [2]string{ofToken + newest, ofToken + oldest}, f.token
	case f.project != "":
		texts, scope = [2]string{ofProject + newest, ofProject + oldest}, f.project
	}
	text := texts[0]
	if f.isOldestFirst {
		text = texts[1]
	}
	n, first, last := 0, int64(0), int64(0)
	err := s.readDB.QueryRowContext(ctx, text, scope, f.from, f.before, limit).Scan(&n, &first, &last)
	switch {
	case err != nil:
		return fmt.Errorf("listing calls: %w", err)
	case n < limit:
	case f.isOldestFirst:
		f.before = last + 1
	default:
		f.from = first
	}
	return nil
}

// The conditions of lists of calls. callsMatching has those that no index covers, and hasWords that of a search.
const (
	hasWords = ` AND (?17 = '' OR EXISTS (SELECT 1 FROM (SELECT lower(coalesce(p.name, '') || ' ' ||
			coalesce(p.id, '') || ' ' || coalesce(t.name, '') || ' ' || coalesce(t.id, '') || ' ' || r.endpoint ||
			' ' || coalesce(nullif(r.model, ''), g.model, '') || ' ' || r.address || ' ' || r.status || ' ' ||
			(r.status / 100) || 'xx ' || r.outcome || ' ' || r.error_code || ' ' || r.session || ' ' ||
			r.end_user || ' ' || replace(replace(r.tags, '":"', '='), '"', ' ')) AS shown) f
		WHERE (instr(shown, ?17) > 0 OR instr(shown, ?18) > 0)
			AND (?19 = '' OR instr(shown, ?19) > 0 OR instr(shown, ?20) > 0)
			AND (?21 = '' OR instr(shown, ?21) > 0 OR instr(shown, ?22) > 0)
			AND (?23 = '' OR instr(shown, ?23) > 0 OR instr(shown, ?24) > 0)))`
	// hasCause is errorClass in SQL.
	hasCause = ` AND (?26 = '' OR ?26 = CASE r.outcome WHEN 'client_gone' THEN 'caller' WHEN 'lost' THEN 'proxy'
		WHEN 'upstream_error' THEN CASE WHEN r.status >= 400 AND r.status < 500 AND r.status <> 429 THEN 'caller'
			ELSE 'provider' END
		WHEN 'truncated' THEN CASE WHEN r.error_code IN ('upstream_cut', 'stream_unfinished', 'answer_unfinished',
				'stream_idle', 'upstream_timeout') THEN 'provider' WHEN r.error_code = 'client_stalled' THEN 'caller'
			WHEN r.error_code IN ('draining', 'ledger_unavailable', 'store_unavailable') THEN 'proxy'
			ELSE 'policy' END
		WHEN 'refused' THEN CASE WHEN r.error_code = 'no_upstream' OR r.status IN (403, 429) THEN 'policy'
			WHEN r.error_code = 'not_cached' THEN 'caller' WHEN r.status IN (502, 504) THEN 'provider'
			WHEN r.status >= 500 THEN 'proxy' ELSE 'caller' END
		ELSE '' END)`
	callsMatching = ` AND r.id >= ?2 AND r.id < ?3 AND (?4 = '' OR r.outcome = ?4
			OR ?4 = 'failed' AND r.outcome <> 'ok' AND r.outcome <> 'open')
		AND (?6 = '' OR r.project = (SELECT seq FROM projects WHERE id = ?6)) AND (?7 = '' OR r.model = ?7)
		AND (?27 = '' OR lower(r.model) LIKE ?27 ESCAPE '!') AND (?8 = '' OR r.endpoint = ?8)
		AND (?10 = 0 OR r.status >= ?9 AND r.status < ?10) AND (?11 = '' OR (r.cache = 'hit') = (?11 = 'hit'))
		AND (?12 = '' OR r.token = (SELECT seq FROM tokens WHERE id = ?12))
		AND (?13 = '' OR r.session = ?13) AND (?14 = '' OR r.end_user = ?14)
		AND (?15 = '' OR CASE r.tags WHEN '' THEN '' ELSE r.tags ->> ?15 END = ?16)
		AND (?25 = '' OR coalesce(g.cost, r.cost) IS NULL AND (coalesce(g.usage_source, r.usage_source) <> 'none'
			OR r.outcome = 'ok' AND (r.endpoint LIKE 'POST /v1/audio/%' OR r.endpoint LIKE 'POST /v1/images/%')))` +
		hasCause + hasWords
	newestCalls  = callsMatching + ` ORDER BY r.id DESC LIMIT ?5`
	oldestCalls  = callsMatching + ` ORDER BY r.id LIMIT ?5`
	fromRunning  = selectRunning + `WHERE r.batch < ?3 AND ` // no later batch has an earlier call
	fromEnded    = selectEnded + `WHERE `
	callsOfAll   = `?1 = ''`
	ofTheSession = `r.session = ?1 AND r.session <> ''`
	ofTheEndUser = `r.end_user = ?1 AND r.end_user <> ''`
	ofTheToken   = `r.token = (SELECT seq FROM tokens WHERE id = ?1)`
	ofTheProject = `r.project = (SELECT seq FROM projects WHERE id = ?1)`
)

// statements returns the statements for running and for ended calls, and their first argument.
func (f *requestFilter) statements() (running, ended, scope string) {
	texts := [4]string{fromRunning + callsOfAll + newestCalls, fromEnded + callsOfAll + newestCalls,
		fromRunning + callsOfAll + oldestCalls, fromEnded + callsOfAll + oldestCalls}
	switch {
	case f.session != "":
		texts, scope = [4]string{fromRunning + ofTheSession + newestCalls, fromEnded + ofTheSession + newestCalls,
			fromRunning + ofTheSession + oldestCalls, fromEnded + ofTheSession + oldestCalls}, f.session
	case f.endUser != "":
		texts, scope = [4]string{fromRunning + ofTheEndUser + newestCalls, fromEnded + ofTheEndUser + newestCalls,
			fromRunning + ofTheEndUser + oldestCalls, fromEnded + ofTheEndUser + oldestCalls}, f.endUser
	case f.token != "":
		texts, scope = [4]string{fromRunning + ofTheToken + newestCalls, fromEnded + ofTheToken + newestCalls,
			fromRunning + ofTheToken + oldestCalls, fromEnded + ofTheToken + oldestCalls}, f.token
	case f.project != "":
		texts, scope = [4]string{fromRunning + ofTheProject + newestCalls, fromEnded + ofTheProject + newestCalls,
			fromRunning + ofTheProject + oldestCalls, fromEnded + ofTheProject + oldestCalls}, f.project
	}
	if f.isOldestFirst {
		return texts[2], texts[3], scope
	}
	return texts[0], texts[1], scope
}

// listRequests returns up to f.limit calls, running and ended.
func (s *store) listRequests(ctx context.Context, f requestFilter) ([]requestView, error) {
	running, ended, scope := f.statements()
	args := []any{scope, f.from, f.before, f.outcome, f.limit, f.project, f.model, f.endpoint, f.statusFrom,
		f.statusTo, f.cache, f.token, f.session, f.endUser, f.tagKey, f.tagValue}
	for _, forms := range f.search.words {
		args = append(args, forms[0], forms[1])
	}
	unpriced := ""
	if f.isUnpriced {
		unpriced = "yes"
	}
	args = append(args, unpriced, string(f.cause), f.modelPattern)
	list := func(query string) ([]requestView, error) {
		return withDetails(collect(ctx, s.readDB, "listing calls", (*requestView).columns, query, args...))
	}
	var out []requestView
	canRun := f.outcome == "" || f.outcome == string(outcomeOpen)
	if canRun && f.statusTo == 0 && !f.isUnpriced && f.cause == "" { // running calls can match
		var err error
		if out, err = list(running); err != nil {
			return nil, err
		}
	}
	// Read after the running ones: a call that ends in between is in both lists, and the sort puts its row
	// last.
	rows, err := list(ended)
	if err != nil || len(out) == 0 {
		return rows, err
	}
	out = append(out, rows...)
	slices.SortStableFunc(out, func(a, b requestView) int {
		if f.isOldestFirst {
			return cmp.Compare(a.id, b.id)
		}
		return cmp.Compare(b.id, a.id)
	})
	for i := len(out) - 1; i > 0; i-- {
		if out[i].id == out[i-1].id {
			out = slices.Delete(out, i-1, i)
		}
	}
	return out[:min(len(out), f.limit)], nil
}

// recentDays is how many days the lists of tokens and projects cover, up to today.
const recentDays = 30

// recentFrom returns the start of the first of the recent days.
func recentFrom(now int64) int64 { return now - now%dayMS - (recentDays-1)*dayMS }

// A recentUse is what a token or project has used on the recent days.
type recentUse struct {
	usageTotals
	days [recentDays]usageTotals
}

// A listedUse is a row of usage_sums: what a token or project, by its seq, used on a day.
type listedUse struct {
	seq, at int64
	usageTotals
}

func (u *listedUse) columns() []any { return []any{&u.seq, &u.at, &u.calls, &u.tokens, &u.cost} }

// recentTokenUse returns what tokens have used on each of the recent days, by their seqs.
func (s *store) recentTokenUse(ctx context.Context, seqs []int64, now int64) (map[int64]*recentUse, error) {
	return s.recentUse(ctx, seqs, now, `
		SELECT u.token, u.at, u.calls, u.input_tokens + u.output_tokens, u.cost
		FROM json_each(CAST(?1 AS TEXT)) j CROSS JOIN tokens t CROSS JOIN usage_sums u
		WHERE t.seq = CAST(j.value AS BIGINT)
			AND u.grain = 'token' AND u.project = t.project AND u.token = t.seq AND u.at >= ?2`)
}

// recentProjectUse is recentTokenUse for projects.
func (s *store) recentProjectUse(ctx context.Context, seqs []int64, now int64) (map[int64]*recentUse, error) {
	return s.recentUse(ctx, seqs, now, `
		SELECT u.project, u.at, u.calls, u.input_tokens + u.output_tokens, u.cost
		FROM json_each(CAST(?1 AS TEXT)) j CROSS JOIN usage_sums u
		WHERE u.grain = 'token' AND u.project = CAST(j.value AS BIGINT) AND u.token = 0 AND u.at >= ?2`)
}

func (s *store) recentUse(ctx context.Context, seqs []int64, now int64, query string,
) (map[int64]*recentUse, error) {
	if len(seqs) == 0 {
		return nil, nil
	}
	from := recentFrom(now)
	rows, err := collect(ctx, s.readDB, "listing recent use", (*listedUse).columns, query, string(mustMarshal(seqs)),
		from)
	found := map[int64]*recentUse{}
	for _, row := range rows {
		u := getOrInsert(found, row.seq)
		u.add(row.usageTotals)
		if day := (row.at - from) / dayMS; day < recentDays {
			u.days[day].add(row.usageTotals)
		}
	}
	return found, err
}

// latestCalls returns when the latest call of each project began, by its seq. It is 0 for one without calls on record.
func (s *store) latestCalls(ctx context.Context, projects []int64) (map[int64]int64, error) {
	if len(projects) == 0 {
		return nil, nil
	}
	return collectMap[int64, int64](ctx, s.readDB, "listing latest calls", `
		SELECT CAST(value AS BIGINT), coalesce((SELECT max(id) FROM requests
			WHERE project = CAST(value AS BIGINT)), 0) >> 21 FROM json_each(CAST(? AS TEXT)) j`,
		string(mustMarshal(projects)))
}

// objectNames returns the names of projects, tokens, upstreams and management keys by their ids, as they are now.
// Deleted ones have none.
func (s *store) objectNames(ctx context.Context, ids []string) (map[string]string, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	return collectMap[string, string](ctx, s.readDB, "reading names", `
		WITH wanted (id) AS (SELECT atom FROM json_each(CAST(?1 AS TEXT)) j)
		SELECT id, name FROM projects WHERE id IN (SELECT id FROM wanted) AND deleted_at IS NULL
		UNION ALL SELECT id, name FROM tokens WHERE id IN (SELECT id FROM wanted)
		UNION ALL SELECT id, name FROM upstreams WHERE id IN (SELECT id FROM wanted) AND deleted_at IS NULL
		UNION ALL SELECT id, name FROM management_keys WHERE id IN (SELECT id FROM wanted)`, string(mustMarshal(ids)))
}
