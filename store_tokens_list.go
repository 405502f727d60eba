// SQL for the pages that list tokens: each order walks an index of its own, from
// where the page before ended. What no index tells apart, the caller sifts.
package main

import (
	"context"
	"fmt"
	"math"
)

// A tokenWalk says in which order tokens are listed, and from where on. Of the
// range only what the order goes by counts.
type tokenWalk struct {
	order    string // newest, oldest, name, ends, revoked, unused
	project  string // a project's id; "" for all
	prefix   string // of the name, in the order name
	from, to int64  // of the end, in the order ends: from < ends_at <= to

	afterSeq  int64 // where the page before ended; 0 and "" for the first
	afterName string
	afterEnds int64 // or when it was revoked
	limit     int   // of tokens that are looked at
}

// neverEnds is the end of a token that has none; see schema/009.
const neverEnds = 9_000_000_000_000_000

// walkTokens calls see for each token in order, until it returns false or limit
// tokens were seen. It reports whether there may be more.
func (s *store) walkTokens(ctx context.Context, w tokenWalk, see func(*tokenRow) bool) (more bool, err error) {
	query, args := w.statement()
	rows, err := s.read.QueryContext(ctx, query, append(args, w.limit+1)...)
	if err != nil {
		return false, fmt.Errorf("listing tokens: %w", err)
	}
	defer rows.Close()
	for seen := 0; rows.Next(); seen++ {
		if seen == w.limit {
			return true, nil
		}
		var t tokenRow
		if err := t.scan(andEnds{rows}); err != nil {
			return false, fmt.Errorf("listing tokens: %w", err)
		}
		if !see(&t) {
			return true, nil
		}
	}
	return false, rows.Err()
}

// andEnds reads a row that has ends_at, which the order went by, as its last.
type andEnds struct {
	row interface{ Scan(...any) error }
}

func (a andEnds) Scan(to ...any) error {
	var ends int64
	return a.row.Scan(append(to, &ends)...)
}

// statement returns the statement for an order, and its arguments but the limit.
// Where the order is by something that several tokens have in common, the rest
// of those comes first, and then all beyond.
func (w *tokenWalk) statement() (string, []any) {
	const head = `SELECT ` + tokenColumns + `, t.ends_at FROM tokens t JOIN projects p ON p.seq = t.project WHERE `
	const ofProject = `t.project = (SELECT seq FROM projects WHERE id = ?1) AND `
	backward := w.afterSeq
	if backward == 0 {
		backward = math.MaxInt64
	}
	all := w.project == ""
	switch w.order {
	case "oldest":
		if all {
			return head + `?1 = '' AND t.seq > ?2 ORDER BY t.seq LIMIT ?3`, []any{"", w.afterSeq}
		}
		return head + ofProject + `t.seq > ?2 ORDER BY t.seq LIMIT ?3`, []any{w.project, w.afterSeq}
	case "name":
		const rest, beyond, order = `t.name = ?2 AND t.seq > ?3`, `t.name >= ?4 AND t.name < ?5`, ` ORDER BY 5, 1 LIMIT ?6`
		from := w.prefix
		if w.afterSeq > 0 {
			from = w.afterName + "\x00" // the next name there can be
		}
		args := []any{w.project, w.afterName, w.afterSeq, from, prefixEnd(w.prefix)}
		if all {
			return head + `?1 = '' AND ` + rest + ` UNION ALL ` + head + `?1 = '' AND ` + beyond + order, args
		}
		return head + ofProject + rest + ` UNION ALL ` + head + ofProject + beyond + order, args
	case "ends":
		const some = `t.revoked_at IS NULL AND `
		const rest, beyond, order = some + `t.ends_at = ?2 AND t.seq > ?3`, some + `t.ends_at > ?2 AND t.ends_at <= ?4`, ` ORDER BY 19, 1 LIMIT ?5`
		args := []any{w.project, max(w.from, w.afterEnds), max(w.afterSeq, map[bool]int64{true: math.MaxInt64}[w.afterEnds == 0]), w.to}
		if all {
			return head + `?1 = '' AND ` + rest + ` UNION ALL ` + head + `?1 = '' AND ` + beyond + order, args
		}
		return head + ofProject + rest + ` UNION ALL ` + head + ofProject + beyond + order, args
	case "revoked":
		ends := w.afterEnds
		if ends == 0 {
			ends = math.MaxInt64
		}
		const some = `t.revoked_at IS NOT NULL AND `
		return head + some + `t.revoked_at = ?1 AND t.seq < ?2 UNION ALL ` + head + some + `t.revoked_at < ?1 ORDER BY 11 DESC, 1 DESC LIMIT ?3`,
			[]any{ends, backward}
	case "unused":
		return head + `t.last_used_at IS NULL AND t.seq < ?1 ORDER BY t.seq DESC LIMIT ?2`, []any{backward}
	}
	if all {
		return head + `?1 = '' AND t.seq < ?2 ORDER BY t.seq DESC LIMIT ?3`, []any{"", backward}
	}
	return head + ofProject + `t.seq < ?2 ORDER BY t.seq DESC LIMIT ?3`, []any{w.project, backward}
}
