// SQL for the tokens that clients present. request_count belongs to the ledger:
// it changes only by x = x + ?, there; nothing here writes it.
package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"math"
)

// A tokenRow is a token as stored. Pointers are nil where the column is NULL.
type tokenRow struct {
	seq                  int64
	id                   string
	project              int64
	projectID            string
	name                 string
	hash, oldHash        []byte
	oldHashUntil         *int64
	expiresAt            *int64
	idleExpiry           *int64
	revokedAt            *int64
	maxRequests          *int64
	requestCount         int64
	policy               string
	version              int64
	lastUsedAt           *int64
	createdAt, updatedAt int64
}

const tokenColumns = `t.seq, t.id, t.project, p.id, t.name, t.hash, t.old_hash, t.old_hash_until, t.expires_at, t.idle_expiry,
	t.revoked_at, t.max_requests, t.request_count, t.policy, t.version, t.last_used_at, t.created_at, t.updated_at`

func (t *tokenRow) scan(row interface{ Scan(...any) error }) error {
	return mapNoRows(row.Scan(&t.seq, &t.id, &t.project, &t.projectID, &t.name, &t.hash, &t.oldHash, &t.oldHashUntil, &t.expiresAt, &t.idleExpiry,
		&t.revokedAt, &t.maxRequests, &t.requestCount, &t.policy, &t.version, &t.lastUsedAt, &t.createdAt, &t.updatedAt))
}

// addToken stores a new token of the project with id t.projectID and fills in
// what the database decides. A project that does not exist is errNotFound; a
// taken id or hash is errTaken.
func (s *store) addToken(ctx context.Context, by auditOrigin, t *tokenRow) error {
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		err := tx.QueryRowContext(ctx, `
			INSERT INTO tokens (id, project, name, hash, expires_at, idle_expiry, max_requests, policy, created_at, updated_at)
			SELECT ?, seq, ?, ?, ?, ?, ?, ?, ?, ? FROM projects WHERE id = ? AND deleted_at IS NULL
			RETURNING seq, project, version`,
			t.id, t.name, t.hash, t.expiresAt, t.idleExpiry, t.maxRequests, t.policy, t.createdAt, t.updatedAt, t.projectID).
			Scan(&t.seq, &t.project, &t.version)
		return t.auditEvent("token.create", nil), mapNoRows(mapUniqueViolation(err))
	})
}

// auditFields are what the audit trail says of a token. Not its hashes: that one was
// replaced is an action of its own.
func (t *tokenRow) auditFields() []auditField {
	var idle *int64
	if t.idleExpiry != nil {
		idle = new(*t.idleExpiry / 60_000)
	}
	return []auditField{{"name", t.name}, {"expires_at", auditTime(t.expiresAt)}, {"idle_expiry_minutes", idle}, {"max_requests", t.maxRequests},
		{"policy", json.RawMessage(t.policy)}, {"overlap_until", auditTime(t.oldHashUntil)}, {"revoked_at", auditTime(t.revokedAt)}}
}

// auditEvent is what happened to a token that was before, nil if it is new.
func (t *tokenRow) auditEvent(action string, before *tokenRow) auditEvent {
	var was []auditField
	if before != nil {
		was = before.auditFields()
	}
	return auditEvent{action, t.id, append([]auditField{{"project_id", t.projectID}}, diffAuditFields(was, t.auditFields())...)}
}

// changeAction names a change by what it did, whoever asked for it.
func (t *tokenRow) changeAction(before *tokenRow) string {
	switch {
	case t.revokedAt != nil:
		return "token.revoke"
	case !bytes.Equal(t.hash, before.hash):
		return "token.rotate"
	}
	return "token.change"
}

// tokenByHash finds the token that a hash stands for now or stood for before
// its last rotation. It does not judge whether the token is valid.
func (s *store) tokenByHash(ctx context.Context, hash [32]byte) (t tokenRow, err error) {
	err = t.scan(s.readDB.QueryRowContext(ctx, `
		SELECT `+tokenColumns+` FROM tokens t JOIN projects p ON p.seq = t.project WHERE t.hash = ?1
		UNION ALL
		SELECT `+tokenColumns+` FROM tokens t JOIN projects p ON p.seq = t.project WHERE t.old_hash = ?1`, hash[:]))
	return t, err
}

func (s *store) tokenByID(ctx context.Context, id string) (t tokenRow, err error) {
	err = t.scan(s.readDB.QueryRowContext(ctx, `
		SELECT `+tokenColumns+` FROM tokens t JOIN projects p ON p.seq = t.project WHERE t.id = ?`, id))
	return t, err
}

// A tokenFilter says which tokens a list holds, and after which it goes on.
type tokenFilter struct {
	project   string // a project's id; "" for all
	active    *bool  // nil for all
	prefix    string // of the name; then the order is by name
	afterSeq  int64
	afterName string
	limit     int
	now       int64
}

// listTokens returns up to f.limit tokens in seq order, or with a prefix in
// order of name and seq. Each of the four cases walks an index of its own.
func (s *store) listTokens(ctx context.Context, f tokenFilter) ([]tokenRow, error) {
	const head = `SELECT ` + tokenColumns + ` FROM tokens t JOIN projects p ON p.seq = t.project WHERE `
	const active = ` AND (?2 IS NULL OR ?2 = (p.is_active AND t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > ?3)
			AND (t.idle_expiry IS NULL OR coalesce(t.last_used_at, t.created_at) + t.idle_expiry > ?3))) `
	const bySeq, byName = ` ORDER BY t.seq LIMIT ?4`, ` ORDER BY t.name, t.seq LIMIT ?4`
	var query string
	args := []any{f.afterSeq, f.active, f.now, f.limit}
	switch {
	case f.project == "" && f.prefix == "":
		query = head + `t.seq > ?1` + active + bySeq
	case f.prefix == "":
		query = head + `t.seq > ?1 AND t.project = (SELECT seq FROM projects WHERE id = ?5)` + active + bySeq
		args = append(args, f.project)
	case f.project == "":
		query = head + `t.name >= ?5 AND t.name < ?6 AND (t.name, t.seq) > (?7, ?1)` + active + byName
		args = append(args, f.prefix, prefixEnd(f.prefix), f.afterName)
	default:
		query = head + `t.name >= ?5 AND t.name < ?6 AND (t.name, t.seq) > (?7, ?1)
			AND t.project = (SELECT seq FROM projects WHERE id = ?8)` + active + byName
		args = append(args, f.prefix, prefixEnd(f.prefix), f.afterName, f.project)
	}
	rows, err := s.readDB.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("listing tokens: %w", err)
	}
	defer rows.Close()
	var out []tokenRow
	for rows.Next() {
		var t tokenRow
		if err := t.scan(rows); err != nil {
			return nil, fmt.Errorf("listing tokens: %w", err)
		}
		out = append(out, t)
	}
	return out, rows.Err()
}

// changeToken reads a token, lets change edit it, and writes it back in one
// transaction: all columns an admin may change, none that counts. version,
// unless 0, must be the row's.
func (s *store) changeToken(ctx context.Context, by auditOrigin, id string, version, now int64, change func(*tokenRow) error) (t tokenRow, err error) {
	err = s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		if err := t.scan(tx.QueryRowContext(ctx, `
			SELECT `+tokenColumns+` FROM tokens t JOIN projects p ON p.seq = t.project WHERE t.id = ?`, id)); err != nil {
			return auditEvent{}, err
		}
		if version != 0 && version != t.version {
			return auditEvent{}, errStale
		}
		was := t
		if err := change(&t); err != nil {
			return auditEvent{}, err
		}
		t.version, t.updatedAt = t.version+1, now
		_, err := tx.ExecContext(ctx, `
			UPDATE tokens SET name = ?, hash = ?, old_hash = ?, old_hash_until = ?, expires_at = ?, idle_expiry = ?,
				revoked_at = ?, max_requests = ?, policy = ?, version = ?, updated_at = ? WHERE seq = ?`,
			t.name, t.hash, t.oldHash, t.oldHashUntil, t.expiresAt, t.idleExpiry,
			t.revokedAt, t.maxRequests, t.policy, t.version, t.updatedAt, t.seq)
		return t.auditEvent(t.changeAction(&was), &was), mapUniqueViolation(err)
	})
	return t, err
}

// revokeTokens revokes all of a project's tokens that are not revoked yet and
// returns how many.
func (s *store) revokeTokens(ctx context.Context, by auditOrigin, project string, now int64) (n int64, err error) {
	err = s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		res, err := tx.ExecContext(ctx, `
			UPDATE tokens SET revoked_at = ?1, version = version + 1, updated_at = ?1
			WHERE revoked_at IS NULL AND project = (SELECT seq FROM projects WHERE id = ?2)`, now, project)
		if err != nil {
			return auditEvent{}, fmt.Errorf("revoking tokens: %w", err)
		}
		n, err = res.RowsAffected()
		return auditEvent{"project.revoke_tokens", project, []auditField{{"tokens", n}}}, err
	})
	return n, err
}

// A tokenListQuery says in which order tokens are listed, and from where on. Of the
// range only what the order goes by counts.
type tokenListQuery struct {
	order    string // newest, oldest, name, ends, revoked, unused
	project  string // a project's id; "" for all
	prefix   string // of the name, in the order name
	from, to int64  // of the end, in the order ends: from < ends_at <= to

	afterSeq  int64 // where the page before ended; 0 and "" for the first
	afterName string
	afterTime int64 // or when it was revoked
	limit     int   // of tokens that are looked at
}

// neverExpires is the end of a token that has none; see schema/009.
const neverExpires = 9_000_000_000_000_000

// walkTokens calls see for each token in order, until it returns false or limit
// tokens were seen. It reports whether there may be more.
func (s *store) walkTokens(ctx context.Context, w tokenListQuery, see func(*tokenRow) bool) (more bool, err error) {
	query, args := w.statement()
	rows, err := s.readDB.QueryContext(ctx, query, append(args, w.limit+1)...)
	if err != nil {
		return false, fmt.Errorf("listing tokens: %w", err)
	}
	defer rows.Close()
	for seen := 0; rows.Next(); seen++ {
		if seen == w.limit {
			return true, nil
		}
		var t tokenRow
		if err := t.scan(rowWithEndsAt{rows}); err != nil {
			return false, fmt.Errorf("listing tokens: %w", err)
		}
		if !see(&t) {
			return true, nil
		}
	}
	return false, rows.Err()
}

// rowWithEndsAt reads a row that has ends_at, which the order went by, as its last.
type rowWithEndsAt struct {
	row interface{ Scan(...any) error }
}

func (a rowWithEndsAt) Scan(to ...any) error {
	var ends int64
	return a.row.Scan(append(to, &ends)...)
}

// statement returns the statement for an order, and its arguments but the limit.
// Where the order is by something that several tokens have in common, the rest
// of those comes first, and then all beyond.
func (w *tokenListQuery) statement() (string, []any) {
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
		args := []any{w.project, max(w.from, w.afterTime), max(w.afterSeq, map[bool]int64{true: math.MaxInt64}[w.afterTime == 0]), w.to}
		if all {
			return head + `?1 = '' AND ` + rest + ` UNION ALL ` + head + `?1 = '' AND ` + beyond + order, args
		}
		return head + ofProject + rest + ` UNION ALL ` + head + ofProject + beyond + order, args
	case "revoked":
		ends := w.afterTime
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

// A pastUsage is what settled calls of an endpoint and a model asked for have
// used since some time. asked is "" where names were not kept apart.
type pastUsage struct {
	endpoint, requestedModel string
	calls, tokens, nanosUSD  int64
}

// usageSince adds up what calls that began at from or later have used, of a
// token or, with token 0, of a whole project. from is the start of an hour (grain
// "hour") or of a day. Refused calls are not among them: they took nothing.
func (s *store) usageSince(ctx context.Context, grain string, project, token, from int64) ([]pastUsage, error) {
	rows, err := s.readDB.QueryContext(ctx, `
		SELECT endpoint, asked, sum(calls), sum(input_tokens + output_tokens), sum(cost) FROM usage_sums
		WHERE grain = ? AND project = ? AND token = ? AND at >= ? AND outcome <> 'refused' GROUP BY endpoint, asked`,
		grain, project, token, from)
	if err != nil {
		return nil, fmt.Errorf("reading what a limit has used: %w", err)
	}
	defer rows.Close()
	var out []pastUsage
	for rows.Next() {
		var u pastUsage
		if err := rows.Scan(&u.endpoint, &u.requestedModel, &u.calls, &u.tokens, &u.nanosUSD); err != nil {
			return nil, fmt.Errorf("reading what a limit has used: %w", err)
		}
		out = append(out, u)
	}
	return out, rows.Err()
}
