// SQL that adds up sums. They never touch the ledger's rows.
package main

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A usageQuery says which sums are added up, and by what.
type usageQuery struct {
	interval                                           string // hour, day, month or total
	from, to                                           int64  // unix milliseconds: from <= start of the hour or day < to
	project, token                                     string // ids, "" for all
	byProject, byToken, byModel, byEndpoint, byOutcome bool
	limit                                              int // of groups, and of projects and tokens that are looked at
}

// A period is a span of time whose sums are added up into one: all of it, or a
// month. Within hours and days the rows themselves say.
type period struct{ from, to, at int64 }

func (q *usageQuery) periods() (out []period) {
	if q.interval != "month" {
		return []period{{q.from, q.to, 0}}
	}
	for t := time.UnixMilli(q.from).UTC(); t.UnixMilli() < q.to; {
		next := time.Date(t.Year(), t.Month()+1, 1, 0, 0, 0, 0, time.UTC)
		out = append(out, period{t.UnixMilli(), min(next.UnixMilli(), q.to), t.UnixMilli()})
		t = next
	}
	return out
}

// A usageKey is what a line of the answer is about; what it is not grouped by is
// zero.
type usageKey struct {
	at                       int64
	projectID, projectName   string
	tokenID, tokenName       string
	model, endpoint, outcome string
}

type usageRow struct {
	usageKey
	sum
}

func (k *usageKey) compare(o *usageKey) int {
	return cmp.Or(cmp.Compare(k.at, o.at), cmp.Compare(k.projectName, o.projectName), cmp.Compare(k.projectID, o.projectID),
		cmp.Compare(k.tokenName, o.tokenName), cmp.Compare(k.tokenID, o.tokenID), cmp.Compare(k.model, o.model),
		cmp.Compare(k.endpoint, o.endpoint), cmp.Compare(k.outcome, o.outcome))
}

var errTooMany = errors.New("too many rows")

// usage adds up sums, or returns errTooMany. For each project, or each token
// where single tokens matter, it reads one range of the table's own order, in
// which SQLite adds up as it goes: sorting them all together costs many times
// as much.
func (s *store) usage(ctx context.Context, q usageQuery) ([]usageRow, error) {
	scopes, err := s.usageScopes(ctx, &q)
	if err != nil {
		return nil, err
	}
	statement, grain := q.statement()
	st, err := s.read.PrepareContext(ctx, statement)
	if err != nil {
		return nil, fmt.Errorf("adding up usage: %w", err)
	}
	defer st.Close()
	groups := map[usageKey]*sum{}
	periods := q.periods()
	for i := range scopes {
		if len(groups) > q.limit {
			return nil, errTooMany
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		for _, p := range periods {
			if err := q.addUp(st, grain, &scopes[i], p, groups); err != nil {
				return nil, fmt.Errorf("adding up usage: %w", err)
			}
		}
	}
	if len(groups) > q.limit {
		return nil, errTooMany
	}
	out := make([]usageRow, 0, len(groups))
	for k, v := range groups {
		out = append(out, usageRow{k, *v})
	}
	slices.SortFunc(out, func(a, b usageRow) int { return a.compare(&b.usageKey) })
	return out, nil
}

// statement returns the statement that reads no finer than it must, and the
// grain to read.
func (q *usageQuery) statement() (text, grain string) {
	const sums = `sum(calls), sum(input_tokens), sum(cached_tokens), sum(output_tokens), sum(reasoning_tokens),
			sum(cost), sum(unpriced_calls), sum(estimated_calls), sum(would_refuse), sum(total_us)
		FROM usage_sums WHERE grain = ? AND project = ? AND token = ? AND at >= ? AND at < ? `
	if grain = "day"; q.interval == "hour" {
		grain = "hour"
	}
	timed, fine := q.interval == "hour" || q.interval == "day", q.byEndpoint || q.byOutcome
	switch {
	case fine && timed:
		return `SELECT at, model, endpoint, outcome, ` + sums + `GROUP BY at, model, endpoint, outcome`, grain
	case fine:
		return `SELECT 0, model, endpoint, outcome, ` + sums + `GROUP BY model, endpoint, outcome`, grain
	case q.byModel && timed:
		return `SELECT at, model, '', '', ` + sums + `GROUP BY at, model`, grain
	case q.byModel:
		return `SELECT 0, model, '', '', ` + sums + `GROUP BY model`, grain
	}
	if grain == "day" {
		grain = "token" // over all models; token 0 is all of the project's
	}
	if timed {
		return `SELECT at, '', '', '', ` + sums + `GROUP BY at`, grain
	}
	return `SELECT 0, '', '', '', ` + sums + `GROUP BY grain`, grain
}

// A usageScope is a project, or one of its tokens, whose sums are read.
type usageScope struct {
	project, token int64 // token 0: all of the project's together
	usageKey             // its ids and names
}

// addUp adds a scope's sums of a period to the groups. It reads one short range
// and cannot be cancelled: for what can, the driver starts a goroutine a time.
func (q *usageQuery) addUp(st *sql.Stmt, grain string, sc *usageScope, p period, groups map[usageKey]*sum) error {
	rows, err := st.QueryContext(context.Background(), grain, sc.project, sc.token, p.from, p.to)
	if err != nil {
		return err
	}
	defer rows.Close()
	base := usageKey{}
	if q.byProject {
		base.projectID, base.projectName = sc.projectID, sc.projectName
	}
	if q.byToken {
		base.tokenID, base.tokenName = sc.tokenID, sc.tokenName
	}
	for rows.Next() {
		var v sum
		var at int64
		var model, endpoint, outcome string
		if err := rows.Scan(&at, &model, &endpoint, &outcome, &v.calls, &v.input, &v.cached, &v.output, &v.reasoning,
			&v.cost, &v.unpriced, &v.estimated, &v.wouldRefuse, &v.totalUS); err != nil {
			return err
		}
		k := base
		k.at = p.at + at // one of them is 0
		if q.byModel {
			k.model = model
		}
		if q.byEndpoint {
			k.endpoint = endpoint
		}
		if q.byOutcome {
			k.outcome = outcome
		}
		if g := groups[k]; g != nil {
			g.merge(v)
		} else {
			groups[k] = &v
		}
	}
	return rows.Err()
}

// usedTokens lists the tokens of the project with id ?1 ("": of all) that have
// sums of grain ?2, by going from one to the next in the key's order. A row with
// token NULL ends each project.
const usedTokens = `
	WITH RECURSIVE used (project, token) AS (
		SELECT p.seq, (SELECT min(token) FROM usage_sums WHERE grain = ?2 AND project = p.seq AND token > 0)
		FROM projects p WHERE ?1 = '' OR p.id = ?1
		UNION ALL
		SELECT u.project, (SELECT min(token) FROM usage_sums WHERE grain = ?2 AND project = u.project AND token > u.token)
		FROM used u WHERE u.token IS NOT NULL)`

// usageScopes lists what a query reads. Deleted projects are among it.
func (s *store) usageScopes(ctx context.Context, q *usageQuery) ([]usageScope, error) {
	query := `SELECT seq, 0, id, name, '', '' FROM projects WHERE ?1 = '' OR id = ?1 LIMIT ?2`
	args := []any{q.project, q.limit + 1}
	switch {
	case q.token != "":
		query = `SELECT p.seq, t.seq, p.id, p.name, t.id, t.name FROM tokens t JOIN projects p ON p.seq = t.project
			WHERE t.id = ?3 AND (?1 = '' OR p.id = ?1) LIMIT ?2`
		args = append(args, q.token)
	case q.byToken:
		query = usedTokens + ` SELECT p.seq, t.seq, p.id, p.name, t.id, t.name
			FROM used u JOIN projects p ON p.seq = u.project JOIN tokens t ON t.seq = u.token LIMIT ?3`
		args = []any{q.project, "token", q.limit + 1}
	}
	rows, err := s.read.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("listing whose usage to add up: %w", err)
	}
	defer rows.Close()
	var out []usageScope
	for rows.Next() {
		var sc usageScope
		if err := rows.Scan(&sc.project, &sc.token, &sc.projectID, &sc.projectName, &sc.tokenID, &sc.tokenName); err != nil {
			return nil, fmt.Errorf("listing whose usage to add up: %w", err)
		}
		out = append(out, sc)
	}
	if len(out) > q.limit {
		return nil, errTooMany
	}
	return out, rows.Err()
}
