//go:build postgres

// This file copies a SQLite database into an empty PostgreSQL database, for llm-proxy migrate-database. It goes table
// by table, in pages whose position is stored with them, so that a copy that was killed goes on where it was. It only
// reads the source.
package main

import (
	"context"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
)

// A copiedTable is a table to copy: its key, a value below every key, and its statements.
type copiedTable struct {
	name               string
	key                []string
	start              []any
	count, read, write string
}

// The columns that are copied.
const (
	copiedSettings = `name, value`
	copiedProjects = `seq, id, name, is_active, policy, version, created_at, updated_at, deleted_at, routing,
		bound_by, mac, cost_multiplier`
	copiedUpstreams = `seq, id, project, name, base_url, sealed_key, key_hint, organization, openai_project, weight,
		priority, models, rewrite, is_active, version, created_at, updated_at, deleted_at, settings,
		bound_by, mac, provider`
	copiedUpstreamShares = `upstream, project, bound_by, mac`
	copiedUpstreamHealth = `upstream, state, until, strikes, reason, changed_at`
	copiedTokens         = `seq, id, project, name, hash, old_hash, old_hash_until, expires_at, idle_expiry, revoked_at,
		max_requests, request_count, policy, version, last_used_at, created_at, updated_at,
		bound_by, mac`
	copiedManagementKeys = `seq, id, name, hash, role, expires_at, revoked_at, version, created_at, updated_at,
		bound_by, mac`
	copiedSessions     = `hash, key, proof, address, created_at, seen_at, bound_by, mac`
	copiedAudit        = `seq, at, actor, role, address, request_id, action, object, detail, prev, mac`
	copiedPrices       = `seq, id, match, valid_from, price, updated_at`
	copiedBilledPrices = `id, price`
	copiedRequests     = `id, project, token, upstream, endpoint, model, stream, address, status, outcome, error_code,
		usage_source, input_tokens, cached_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
		cost, first_byte_us, total_us, attempts, cache, limit_hit, attempt_log, saved, saved_us,
		details, price, session, end_user, tags, routed_by, client_retry, idempotency_hash`
	copiedPending      = `batch, calls`
	copiedUsageSums    = `grain, project, token, at, model, endpoint, outcome, asked, service_tier, ` + sumColumns
	copiedProjectHours = `project, at, calls, input_tokens, output_tokens, cost, unpriced_calls, caller_errors,
		policy_errors, provider_errors, proxy_errors`
	copiedProjectLatency  = `project, at, bucket, first_bytes, answers`
	copiedAttributionSums = `project, attribute, at, value, token, model, endpoint, outcome, asked, ` + sumColumns
	copiedLimitValues     = `project, token, rule, value, window_start, window_end, used`
	copiedBackground      = `call, project, token, upstream, response, endpoint, outcome, model, model_tracked, asked,
		asked_tracked, reserved_input, reserved_output, reserved_cost, usage_source, input_tokens,
		cached_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost, details, price`
	copiedBatches    = `seq, object, call, project, token, endpoint, outcome`
	copiedBatchUsage = `seq, object, model, priced, lines, input_tokens, cached_tokens, cache_write_tokens,
		output_tokens, reasoning_tokens, cost, prompt_saved`
	copiedContents = `id, project, until, request, request_bytes, answer, answer_bytes`
	copiedWebhooks = `seq, id, name, format, events, error_percent, host, sealed_url, sealed_secret, old_secret,
		old_secret_until, is_active, version, created_at, updated_at`
	copiedNotifications = `seq, id, type, at, data`
	copiedMarks         = `key, until`
	copiedDeliveries    = `seq, id, webhook, notification, state, attempts, next_at, leased_until, give_up_at, status,
		problem, updated_at`
	copiedCache = `id, project, token, model, stored_at, expires_at, used_at, size, answer, endpoint`
)

// lowestKey is below the keys of all rows.
const lowestKey = int64(math.MinInt64)

// copiedTables are all tables, in the order in which they are copied: what administrators manage, records, sums,
// notifications, and the rest. They never change.
var copiedTables = []copiedTable{
	{"settings", []string{"name"}, []any{""}, `SELECT count(*) FROM settings`,
		`SELECT ` + copiedSettings + ` FROM settings WHERE name > ? ORDER BY name LIMIT ?`,
		`INSERT INTO settings (` + copiedSettings + `)
		SELECT ` + copiedSettings + ` FROM json_populate_recordset(NULL::settings, ?)
		ON CONFLICT DO NOTHING`},
	{"projects", []string{"seq"}, []any{lowestKey}, `SELECT count(*) FROM projects`,
		`SELECT ` + copiedProjects + ` FROM projects WHERE seq > ? ORDER BY seq LIMIT ?`,
		`INSERT INTO projects (` + copiedProjects + `)
		SELECT ` + copiedProjects + ` FROM json_populate_recordset(NULL::projects, ?)
		ON CONFLICT DO NOTHING`},
	{"upstreams", []string{"seq"}, []any{lowestKey}, `SELECT count(*) FROM upstreams`,
		`SELECT ` + copiedUpstreams + ` FROM upstreams WHERE seq > ? ORDER BY seq LIMIT ?`,
		`INSERT INTO upstreams (` + copiedUpstreams + `)
		SELECT ` + copiedUpstreams + ` FROM json_populate_recordset(NULL::upstreams, ?)
		ON CONFLICT DO NOTHING`},
	{"upstream_shares", []string{"upstream", "project"},
		[]any{lowestKey, lowestKey}, `SELECT count(*) FROM upstream_shares`,
		`SELECT ` + copiedUpstreamShares + ` FROM upstream_shares
		WHERE (upstream, project) > (?, ?)
		ORDER BY upstream, project LIMIT ?`,
		`INSERT INTO upstream_shares (` + copiedUpstreamShares + `)
		SELECT ` + copiedUpstreamShares + ` FROM json_populate_recordset(NULL::upstream_shares, ?)
		ON CONFLICT DO NOTHING`},
	{"upstream_health", []string{"upstream"}, []any{lowestKey}, `SELECT count(*) FROM upstream_health`,
		`SELECT ` + copiedUpstreamHealth + ` FROM upstream_health
		WHERE upstream > ?
		ORDER BY upstream LIMIT ?`,
		`INSERT INTO upstream_health (` + copiedUpstreamHealth + `)
		SELECT ` + copiedUpstreamHealth + ` FROM json_populate_recordset(NULL::upstream_health, ?)
		ON CONFLICT DO NOTHING`},
	{"tokens", []string{"seq"}, []any{lowestKey}, `SELECT count(*) FROM tokens`,
		`SELECT ` + copiedTokens + ` FROM tokens WHERE seq > ? ORDER BY seq LIMIT ?`,
		`INSERT INTO tokens (` + copiedTokens + `)
		SELECT ` + copiedTokens + ` FROM json_populate_recordset(NULL::tokens, ?)
		ON CONFLICT DO NOTHING`},
	{"management_keys", []string{"seq"}, []any{lowestKey}, `SELECT count(*) FROM management_keys`,
		`SELECT ` + copiedManagementKeys + ` FROM management_keys
		WHERE seq > ?
		ORDER BY seq LIMIT ?`,
		`INSERT INTO management_keys (` + copiedManagementKeys + `)
		SELECT ` + copiedManagementKeys + ` FROM json_populate_recordset(NULL::management_keys, ?)
		ON CONFLICT DO NOTHING`},
	{"sessions", []string{"hash"}, []any{[]byte{}}, `SELECT count(*) FROM sessions`,
		`SELECT ` + copiedSessions + ` FROM sessions WHERE hash > ? ORDER BY hash LIMIT ?`,
		`INSERT INTO sessions (` + copiedSessions + `)
		SELECT ` + copiedSessions + ` FROM json_populate_recordset(NULL::sessions, ?)
		ON CONFLICT DO NOTHING`},
	{"audit", []string{"seq"}, []any{lowestKey}, `SELECT count(*) FROM audit`,
		`SELECT ` + copiedAudit + ` FROM audit WHERE seq > ? ORDER BY seq LIMIT ?`,
		`INSERT INTO audit (` + copiedAudit + `)
		SELECT ` + copiedAudit + ` FROM json_populate_recordset(NULL::audit, ?)
		ON CONFLICT DO NOTHING`},
	{"prices", []string{"seq"}, []any{lowestKey}, `SELECT count(*) FROM prices`,
		`SELECT ` + copiedPrices + ` FROM prices WHERE seq > ? ORDER BY seq LIMIT ?`,
		`INSERT INTO prices (` + copiedPrices + `)
		SELECT ` + copiedPrices + ` FROM json_populate_recordset(NULL::prices, ?)
		ON CONFLICT DO NOTHING`},
	{"billed_prices", []string{"id"}, []any{lowestKey}, `SELECT count(*) FROM billed_prices`,
		`SELECT ` + copiedBilledPrices + ` FROM billed_prices WHERE id > ? ORDER BY id LIMIT ?`,
		`INSERT INTO billed_prices (` + copiedBilledPrices + `)
		SELECT ` + copiedBilledPrices + ` FROM json_populate_recordset(NULL::billed_prices, ?)
		ON CONFLICT DO NOTHING`},
	{"requests", []string{"id"}, []any{lowestKey}, `SELECT count(*) FROM requests`,
		`SELECT ` + copiedRequests + ` FROM requests WHERE id > ? ORDER BY id LIMIT ?`,
		`INSERT INTO requests (` + copiedRequests + `)
		SELECT ` + copiedRequests + ` FROM json_populate_recordset(NULL::requests, ?)
		ON CONFLICT DO NOTHING`},
	{"begun", []string{"batch"}, []any{lowestKey}, `SELECT count(*) FROM begun`,
		`SELECT ` + copiedPending + ` FROM begun WHERE batch > ? ORDER BY batch LIMIT ?`,
		`INSERT INTO begun (` + copiedPending + `)
		SELECT ` + copiedPending + ` FROM json_populate_recordset(NULL::begun, ?)
		ON CONFLICT DO NOTHING`},
	{"usage_sums", []string{"grain", "project", "token", "at", "model", "endpoint",
		"outcome", "asked", "service_tier"},
		[]any{"", lowestKey, lowestKey, lowestKey, "", "", "", "", ""}, `SELECT count(*) FROM usage_sums`,
		`SELECT ` + copiedUsageSums + ` FROM usage_sums
		WHERE (grain, project, token, at, model, endpoint, outcome, asked, service_tier)
			> (?, ?, ?, ?, ?, ?, ?, ?, ?)
		ORDER BY grain, project, token, at, model, endpoint, outcome, asked, service_tier LIMIT ?`,
		`INSERT INTO usage_sums (` + copiedUsageSums + `)
		SELECT ` + copiedUsageSums + ` FROM json_populate_recordset(NULL::usage_sums, ?)
		ON CONFLICT DO NOTHING`},
	{"project_hours", []string{"project", "at"},
		[]any{lowestKey, lowestKey}, `SELECT count(*) FROM project_hours`,
		`SELECT ` + copiedProjectHours + ` FROM project_hours
		WHERE (project, at) > (?, ?)
		ORDER BY project, at LIMIT ?`,
		`INSERT INTO project_hours (` + copiedProjectHours + `)
		SELECT ` + copiedProjectHours + ` FROM json_populate_recordset(NULL::project_hours, ?)
		ON CONFLICT DO NOTHING`},
	{"project_latency", []string{"project", "at", "bucket"},
		[]any{lowestKey, lowestKey, lowestKey}, `SELECT count(*) FROM project_latency`,
		`SELECT ` + copiedProjectLatency + ` FROM project_latency
		WHERE (project, at, bucket) > (?, ?, ?)
		ORDER BY project, at, bucket LIMIT ?`,
		`INSERT INTO project_latency (` + copiedProjectLatency + `)
		SELECT ` + copiedProjectLatency + ` FROM json_populate_recordset(NULL::project_latency, ?)
		ON CONFLICT DO NOTHING`},
	{"attribution_sums", []string{"project", "attribute", "at", "value", "token", "model", "endpoint",
		"outcome", "asked"},
		[]any{lowestKey, "", lowestKey, "", lowestKey, "", "", "", ""}, `SELECT count(*) FROM attribution_sums`,
		`SELECT ` + copiedAttributionSums + ` FROM attribution_sums
		WHERE (project, attribute, at, value, token, model, endpoint, outcome, asked) > (?, ?, ?, ?, ?, ?, ?, ?, ?)
		ORDER BY project, attribute, at, value, token, model, endpoint, outcome, asked LIMIT ?`,
		`INSERT INTO attribution_sums (` + copiedAttributionSums + `)
		SELECT ` + copiedAttributionSums + ` FROM json_populate_recordset(NULL::attribution_sums, ?)
		ON CONFLICT DO NOTHING`},
	{"limit_values", []string{"project", "token", "rule", "value", "window_start"},
		[]any{lowestKey, lowestKey, "", "", lowestKey}, `SELECT count(*) FROM limit_values`,
		`SELECT ` + copiedLimitValues + ` FROM limit_values
		WHERE (project, token, rule, value, window_start) > (?, ?, ?, ?, ?)
		ORDER BY project, token, rule, value, window_start LIMIT ?`,
		`INSERT INTO limit_values (` + copiedLimitValues + `)
		SELECT ` + copiedLimitValues + ` FROM json_populate_recordset(NULL::limit_values, ?)
		ON CONFLICT DO NOTHING`},
	{"background", []string{"call"}, []any{lowestKey}, `SELECT count(*) FROM background`,
		`SELECT ` + copiedBackground + ` FROM background WHERE call > ? ORDER BY call LIMIT ?`,
		`INSERT INTO background (` + copiedBackground + `)
		SELECT ` + copiedBackground + ` FROM json_populate_recordset(NULL::background, ?)
		ON CONFLICT DO NOTHING`},
	{"webhooks", []string{"seq"}, []any{lowestKey}, `SELECT count(*) FROM webhooks`,
		`SELECT ` + copiedWebhooks + ` FROM webhooks WHERE seq > ? ORDER BY seq LIMIT ?`,
		`INSERT INTO webhooks (` + copiedWebhooks + `)
		SELECT ` + copiedWebhooks + ` FROM json_populate_recordset(NULL::webhooks, ?)
		ON CONFLICT DO NOTHING`},
	{"notifications", []string{"seq"}, []any{lowestKey}, `SELECT count(*) FROM notifications`,
		`SELECT ` + copiedNotifications + ` FROM notifications WHERE seq > ? ORDER BY seq LIMIT ?`,
		`INSERT INTO notifications (` + copiedNotifications + `)
		SELECT ` + copiedNotifications + ` FROM json_populate_recordset(NULL::notifications, ?)
		ON CONFLICT DO NOTHING`},
	{"notification_marks", []string{"key"}, []any{""}, `SELECT count(*) FROM notification_marks`,
		`SELECT ` + copiedMarks + ` FROM notification_marks WHERE key > ? ORDER BY key LIMIT ?`,
		`INSERT INTO notification_marks (` + copiedMarks + `)
		SELECT ` + copiedMarks + ` FROM json_populate_recordset(NULL::notification_marks, ?)
		ON CONFLICT DO NOTHING`},
	{"deliveries", []string{"seq"}, []any{lowestKey}, `SELECT count(*) FROM deliveries`,
		`SELECT ` + copiedDeliveries + ` FROM deliveries WHERE seq > ? ORDER BY seq LIMIT ?`,
		`INSERT INTO deliveries (` + copiedDeliveries + `)
		SELECT ` + copiedDeliveries + ` FROM json_populate_recordset(NULL::deliveries, ?)
		ON CONFLICT DO NOTHING`},
	{"batches", []string{"seq"}, []any{lowestKey}, `SELECT count(*) FROM batches`,
		`SELECT ` + copiedBatches + ` FROM batches WHERE seq > ? ORDER BY seq LIMIT ?`,
		`INSERT INTO batches (` + copiedBatches + `)
		SELECT ` + copiedBatches + ` FROM json_populate_recordset(NULL::batches, ?)
		ON CONFLICT DO NOTHING`},
	{"batch_usage", []string{"seq"}, []any{lowestKey}, `SELECT count(*) FROM batch_usage`,
		`SELECT ` + copiedBatchUsage + ` FROM batch_usage WHERE seq > ? ORDER BY seq LIMIT ?`,
		`INSERT INTO batch_usage (` + copiedBatchUsage + `)
		SELECT ` + copiedBatchUsage + ` FROM json_populate_recordset(NULL::batch_usage, ?)
		ON CONFLICT DO NOTHING`},
	{"contents", []string{"id"}, []any{lowestKey}, `SELECT count(*) FROM contents`,
		`SELECT ` + copiedContents + ` FROM contents WHERE id > ? ORDER BY id LIMIT ?`,
		`INSERT INTO contents (` + copiedContents + `)
		SELECT ` + copiedContents + ` FROM json_populate_recordset(NULL::contents, ?)
		ON CONFLICT DO NOTHING`},
	{"cache", []string{"id"}, []any{lowestKey}, `SELECT count(*) FROM cache`,
		`SELECT ` + copiedCache + ` FROM cache WHERE id > ? ORDER BY id LIMIT ?`,
		`INSERT INTO cache (` + copiedCache + `)
		SELECT ` + copiedCache + ` FROM json_populate_recordset(NULL::cache, ?)
		ON CONFLICT DO NOTHING`},
}

const (
	copyPageSize = 2000
	// copyPositionPrefix begins the names of the settings with the keys of the last rows that were copied.
	copyPositionPrefix = "copied "
)

// copyToPostgres copies the source into a database that is empty, or in which an earlier copy of the same source ended.
// Until it has ended, no server opens the target. report is called with each table and its rows.
func copyToPostgres(ctx context.Context, source, target *store, report func(table string, rows int64)) error {
	if err := beginCopy(ctx, source, target); err != nil {
		return err
	}
	for i := range copiedTables {
		t := &copiedTables[i]
		for more := true; more; {
			var err error
			if more, err = copyPage(ctx, source, target, t); err != nil {
				return fmt.Errorf("copying %s: %w", t.name, err)
			}
		}
		from, err := queryValue[int64](ctx, source.readDB, "counting the rows of "+t.name, t.count)
		if err != nil {
			return err
		}
		to, err := queryValue[int64](ctx, target.writeDB, "counting the rows of "+t.name, t.count)
		if err != nil {
			return err
		}
		if t.name == "settings" {
			to = from // the target has more: the positions
		}
		if from != to {
			return fmt.Errorf("%s has %d rows, but the copy has %d", t.name, from, to)
		}
		report(t.name, to)
	}
	return execute(ctx, target.writeDB, "setting the next numbers of rows", `
		SELECT setval(pg_get_serial_sequence('projects', 'seq'),
				(SELECT coalesce(max(seq), 0) + 1 FROM projects), false),
			setval(pg_get_serial_sequence('upstreams', 'seq'),
				(SELECT coalesce(max(seq), 0) + 1 FROM upstreams), false),
			setval(pg_get_serial_sequence('tokens', 'seq'), (SELECT coalesce(max(seq), 0) + 1 FROM tokens), false),
			setval(pg_get_serial_sequence('management_keys', 'seq'),
				(SELECT coalesce(max(seq), 0) + 1 FROM management_keys), false),
			setval(pg_get_serial_sequence('prices', 'seq'), (SELECT coalesce(max(seq), 0) + 1 FROM prices), false),
			setval(pg_get_serial_sequence('webhooks', 'seq'), (SELECT coalesce(max(seq), 0) + 1 FROM webhooks), false),
			setval(pg_get_serial_sequence('notifications', 'seq'),
				(SELECT coalesce(max(seq), 0) + 1 FROM notifications), false),
			setval(pg_get_serial_sequence('deliveries', 'seq'),
				(SELECT coalesce(max(seq), 0) + 1 FROM deliveries), false),
			setval(pg_get_serial_sequence('batches', 'seq'), (SELECT coalesce(max(seq), 0) + 1 FROM batches), false),
			setval(pg_get_serial_sequence('batch_usage', 'seq'),
				(SELECT coalesce(max(seq), 0) + 1 FROM batch_usage), false)`)
}

// endCopy makes the target a database that a server may open.
func endCopy(ctx context.Context, target *store) error {
	return execute(ctx, target.writeDB, "ending the copy",
		`DELETE FROM settings WHERE name = ? OR name LIKE 'copied %'`, copySourceSetting)
}

// beginCopy notes the source in the target, unless the target has other data.
func beginCopy(ctx context.Context, source, target *store) error {
	identity, err := source.setting(ctx, keyCheckSetting)
	if err != nil {
		return fmt.Errorf("reading the key check: %w", err)
	}
	copied, err := queryValue[string](ctx, target.writeDB, "looking for an earlier copy",
		`SELECT value FROM settings WHERE name = ?`, copySourceSetting)
	switch {
	case err == nil && copied == identity:
		return nil
	case err == nil:
		return errors.New("the target has a part of another database; name an empty one")
	case !errors.Is(err, errNotFound):
		return err
	}
	used, err := queryValue[bool](ctx, target.writeDB, "looking for rows in the target", `
		SELECT EXISTS (SELECT 1 FROM settings) OR EXISTS (SELECT 1 FROM projects) OR EXISTS (SELECT 1 FROM audit)
			OR EXISTS (SELECT 1 FROM requests) OR EXISTS (SELECT 1 FROM management_keys)`)
	if err == nil && used {
		err = errors.New("the target has data already; name an empty database")
	}
	if err != nil {
		return err
	}
	return saveSetting(ctx, target.writeDB, copySourceSetting, identity)
}

// copyPage copies the next rows of a table, and reports whether there may be more.
func copyPage(ctx context.Context, source, target *store, t *copiedTable) (more bool, err error) {
	after := slices.Clone(t.start)
	position, err := queryValue[string](ctx, target.writeDB, "reading the position",
		`SELECT value FROM settings WHERE name = ?`, copyPositionPrefix+t.name)
	if err == nil {
		err = decodeCopyKey(position, after)
	}
	if err != nil && !errors.Is(err, errNotFound) {
		return false, err
	}
	page, last, n, err := readCopyPage(ctx, source, t, after)
	if err != nil || n == 0 {
		return false, err
	}
	next, err := json.Marshal(last)
	if err != nil {
		return false, fmt.Errorf("storing the position: %w", err)
	}
	return n == copyPageSize, target.withTx(ctx, func(tx *sql.Tx) error {
		if err := execute(ctx, tx, "writing rows", t.write, page); err != nil {
			return err
		}
		return saveSetting(ctx, tx, copyPositionPrefix+t.name, string(next))
	})
}

// decodeCopyKey reads a stored key into values of the right types.
func decodeCopyKey(text string, key []any) error {
	var parts []json.RawMessage
	if err := json.Unmarshal([]byte(text), &parts); err != nil || len(parts) != len(key) {
		return errors.New("the position of an earlier copy is damaged; name an empty database")
	}
	for i := range key {
		var err error
		switch key[i].(type) {
		case int64:
			var n int64
			err = json.Unmarshal(parts[i], &n)
			key[i] = n
		case string:
			var s string
			err = json.Unmarshal(parts[i], &s)
			key[i] = s
		default:
			var b []byte
			err = json.Unmarshal(parts[i], &b)
			key[i] = b
		}
		if err != nil {
			return fmt.Errorf("the position of an earlier copy: %w", err)
		}
	}
	return nil
}

// readCopyPage reads rows after a key. It returns them as a JSON list of objects, the last key, and how many they are.
func readCopyPage(ctx context.Context, source *store, t *copiedTable, after []any) (
	page string, last []any, n int, err error) {
	rows, err := source.readDB.QueryContext(ctx, t.read, append(after, copyPageSize)...)
	if err != nil {
		return "", nil, 0, err
	}
	defer rows.Close()
	names, err := rows.Columns()
	if err != nil {
		return "", nil, 0, err
	}
	var out []byte
	values, pointers := make([]any, len(names)), make([]any, len(names))
	for i := range values {
		pointers[i] = &values[i]
	}
	for ; rows.Next(); n++ {
		if err := rows.Scan(pointers...); err != nil {
			return "", nil, 0, err
		}
		object := map[string]any{}
		for i, name := range names {
			object[name] = values[i]
			if b, ok := values[i].([]byte); ok {
				object[name] = `\x` + hex.EncodeToString(b)
			}
		}
		text, err := json.Marshal(object)
		if err != nil {
			return "", nil, 0, err
		}
		out = append(append(out, ','), text...)
		last = last[:0]
		for _, column := range t.key {
			last = append(last, values[slices.Index(names, column)])
		}
	}
	if n == 0 {
		return "", nil, 0, rows.Err()
	}
	return "[" + strings.TrimPrefix(postgresJSON(out), ",") + "]", last, n, rows.Err()
}
