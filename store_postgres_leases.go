//go:build postgres

// This file has the SQL of the accounts from which replicas lease what they may spend of a limit: see
// ratelimit_leases.go, which says why the sum is exact. The accounts themselves are kept by the functions lease_sync
// and lease_end in schema/postgres. The file also reads what was used before an account existed, and what a replica
// that has died has used without reporting it.
package main

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"slices"
)

// A postgresLeases is the part of a postgres that leases from limits.
type postgresLeases struct {
	*postgres
	db     *sql.DB // one connection
	number int64   // of the last exchange
}

func (l *postgresLeases) backend(p *postgres) leaseBackend {
	l.postgres = p
	return leaseBackend{exchange: l.exchange, giveBack: l.giveBack, deleteAccounts: l.deleteAccounts,
		keepRules: l.keepRules, prune: l.prune,
		countRequests: l.countRequests, pastUse: l.pastUse}
}

const selectLeaseSync = `
		SELECT o_item, o_status, coalesce(o_incarnation, 0), coalesce(o_window_start, 0), coalesce(o_spent, 0),
			coalesce(o_unspent, 0), coalesce(o_others, 0), coalesce(o_free, 0), coalesce(o_level, 0),
			coalesce(o_settled, false), coalesce(o_recalled, false)
		FROM lease_sync(?::bigint, ?::bigint, ?::bigint, ?::text, ?::text)`

// columns returns where the columns of selectLeaseSync belong.
func (r *leaseReply) columns() []any {
	return []any{&r.item, &r.status, &r.incarnation, &r.windowStart, &r.spent, &r.unspent, &r.others, &r.free,
		&r.level, &r.settled, &r.recalled}
}

// exchange makes one exchange with the accounts. It is called by one goroutine only. It returns errFenced if this
// process may not write any more.
func (l *postgresLeases) exchange(ctx context.Context, items []leaseItem) ([]leaseReply, error) {
	l.number++
	replies, err := collect(ctx, l.db, "exchanging leases", (*leaseReply).columns, selectLeaseSync,
		l.replica, l.epoch, l.number, l.channel(), string(mustMarshal(items)))
	if err == nil && len(replies) < len(items) {
		err = errFenced
	}
	return replies, err
}

// giveBack ends the leases of this replica, which has reported everything that it has used.
func (l *postgresLeases) giveBack(ctx context.Context) error {
	return l.store.withTx(ctx, func(tx *sql.Tx) error {
		return execute(ctx, tx, "returning leases", `
			SELECT lease_end(l.account, l.replica, l.spent)
			FROM (SELECT * FROM limit_leases WHERE replica = ? ORDER BY account) l`, l.replica)
	})
}

// settleDead ends the leases of a replica that is closed, and whose lost calls are recorded: what it has used by its
// last report, and what the ledger has beyond that. The rest is free again. It may be repeated.
//
// Of requests, those that began at recent_from or later are counted in the ledger instead of in the report, so that
// none counts twice. A limit for models counts at most what was leased, because the ledger does not have what decides.
// A limit for each value of an attribute counts the calls with the account's value. Of tokens and dollars, the ledger
// has what calls have used that ended after the report, or never.
func (l *postgresLeases) settleDead(ctx context.Context, replica int64) error {
	return l.store.withTx(ctx, func(tx *sql.Tx) error {
		return execute(ctx, tx, "settling the leases of a replica", `
			SELECT lease_end(f.account, f.replica, f.final) FROM (
				SELECT l.account, l.replica, CASE
					WHEN a.kind <> 0 THEN 0
					WHEN a.rule::jsonb ->> 'count' = 'requests' THEN least(l.spent + l.unspent,
						l.spent - l.recent + lease_use(a, l.recent_from, p.slot))
					ELSE l.spent + lease_use(a, l.recent_from, p.slot)
					END AS final
				FROM limit_leases l JOIN limit_accounts a ON a.account = l.account
					JOIN replicas p ON p.id = l.replica AND p.closed_at IS NOT NULL
				WHERE l.replica = ? AND NOT EXISTS (SELECT 1 FROM begun b WHERE b.replica = l.replica)
				ORDER BY l.account) f`, replica)
	})
}

// deleteAccounts forgets what was used of accounts. Replicas that spend leases of them begin anew.
func (l *postgresLeases) deleteAccounts(ctx context.Context, accounts []string) error {
	return l.store.withTx(ctx, func(tx *sql.Tx) error {
		slices.Sort(accounts) // as lease_sync locks them
		for _, account := range accounts {
			if _, err := execEach(ctx, tx, "deleting an account", []string{
				`DELETE FROM limit_accounts WHERE account = ?`, `DELETE FROM limit_leases WHERE account = ?`,
			}, account); err != nil {
				return err
			}
		}
		return nil
	})
}

// keepRules is leaseBackend.keepRules.
func (l *postgresLeases) keepRules(ctx context.Context, project, token int64, rules []string) error {
	return l.store.withTx(ctx, func(tx *sql.Tx) error {
		// The second statement sees the leases that were made while the first one waited for their accounts.
		_, err := execEach(ctx, tx, "deleting the accounts of removed limits", []string{
			`SELECT account FROM limit_accounts
				WHERE project = ? AND token = ? AND rule NOT IN (SELECT jsonb_array_elements_text(?::jsonb))
				ORDER BY account FOR UPDATE`,
			`WITH old AS (DELETE FROM limit_accounts
					WHERE project = ? AND token = ? AND rule NOT IN (SELECT jsonb_array_elements_text(?::jsonb))
					RETURNING account)
				DELETE FROM limit_leases l USING old WHERE l.account = old.account`},
			project, token, string(mustMarshal(rules)))
		return err
	})
}

// addLate adds what has become known after calls had ended.
func (l *postgresLeases) addLate(ctx context.Context, tx *sql.Tx, uses []lateLeaseUse) error {
	slices.SortFunc(uses, func(a, b lateLeaseUse) int { return cmp.Compare(a.Account, b.Account) }) // as lease_sync
	for _, u := range uses {
		err := execute(ctx, tx, "adding late usage", `
			UPDATE limit_accounts SET
				base = CASE WHEN kind <> 0 THEN base
					ELSE greatest(0, least(base::numeric + ?2::bigint, 1000000000000000000))::bigint END,
				level = CASE WHEN kind <> 1 THEN level ELSE least(
					greatest(0, level - least(greatest(?4::bigint - level_at, 0), 2 * period_ms) * max)
						+ least(greatest(?2::bigint, 0), 2 * max) * period_ms, 2 * max * period_ms) END,
				level_at = CASE WHEN kind <> 1 THEN level_at ELSE greatest(level_at, ?4::bigint) END
			WHERE account = ?1 AND (kind = 1 OR window_start = ?3)`,
			u.Account, u.Amount, u.WindowStart, l.cluster.limitNow())
		if err != nil {
			return err
		}
	}
	return nil
}

// prune deletes up to limit accounts of windows that ended before, and of buckets and slots that nobody has used since,
// and returns how many.
func (l *postgresLeases) prune(ctx context.Context, before int64, limit int) (n int64, err error) {
	err = l.store.withTx(ctx, func(tx *sql.Tx) error {
		n, err = execCount(ctx, tx, "deleting old accounts", `
			WITH old AS (SELECT a.account FROM limit_accounts a WHERE a.window_end < ?::bigint
					AND NOT EXISTS (SELECT 1 FROM limit_leases l
						WHERE l.account = a.account AND l.unspent > 0 AND a.kind <> 0)
					ORDER BY a.account LIMIT ? FOR UPDATE SKIP LOCKED),
				leases AS (DELETE FROM limit_leases l USING old WHERE l.account = old.account)
			DELETE FROM limit_accounts a USING old WHERE a.account = old.account`, before, limit)
		return err
	})
	return n, err
}

// countRequests returns how many calls a token has made or is making.
func (l *postgresLeases) countRequests(ctx context.Context, token int64) (int64, error) {
	return queryValue[int64](ctx, l.store.readDB, "counting a token's calls", `
		SELECT request_count + (SELECT count(*) FROM running WHERE token = ?1) FROM tokens WHERE seq = ?1`, token)
}

// pastUse returns what ended calls have used, as usageSince, and the calls that run, as of one moment.
func (l *postgresLeases) pastUse(ctx context.Context, grain string, project, token, from int64,
) (ended []pastUsage, running []requestRow, err error) {
	tx, err := l.store.readDB.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true})
	if err != nil {
		return nil, nil, fmt.Errorf("reading what a limit has used: %w", err)
	}
	defer tx.Rollback() // it has changed nothing
	ended, err = usageSince(ctx, tx, grain, project, token, from)
	if err != nil {
		return nil, nil, err
	}
	reserved, err := reservedSince(ctx, tx, project, token, from<<idTimeShift)
	if err != nil {
		return nil, nil, err
	}
	running, err = collect(ctx, tx, "reading pending records", func(r *requestRow) []any {
		return []any{&r.id, &r.started, &r.endpoint, &r.model, &r.counts.input, &r.counts.output}
	}, `SELECT id, started_at, endpoint, model, input_tokens, output_tokens FROM running
		WHERE project = ? AND CAST(? AS BIGINT) IN (0, token) AND started_at >= ?`, project, token, from)
	for i := range running {
		running[i].source = usageEstimated
	}
	return append(ended, reserved...), running, err
}
