// This file has webhooks, notifications and deliveries as they are stored: their rows, what a notification says in each
// format, when a delivery is repeated, and the SQL. A change of a webhook is audited. URLs and secrets are sealed in
// the rows; nothing here opens them but the change of the encryption key.
package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// A webhookRow is a webhook as stored.
type webhookRow struct {
	seq                  int64
	id, name, format     string
	events               string // JSON list of types; []: all
	errorPercent         int64
	host                 string // of the URL: https://hooks.example.com
	sealedURL            []byte
	sealedSecret         []byte
	oldSecret            []byte // the secret before the last rotation, sealed; nil: none
	oldSecretUntil       *int64
	active               bool
	version              int64
	createdAt, updatedAt int64
	noBinding            binding // a webhook grants nothing; changeRow asks
}

const (
	webhookEditable = `name, format, events, error_percent, host, sealed_url, sealed_secret, old_secret,
		old_secret_until, is_active, version, updated_at`
	selectWebhooks = `SELECT seq, id, created_at, ` + webhookEditable + ` FROM webhooks `
)

// editable returns the columns that a change may write.
func (w *webhookRow) editable() []any {
	return []any{&w.name, &w.format, &w.events, &w.errorPercent, &w.host, &w.sealedURL, &w.sealedSecret, &w.oldSecret,
		&w.oldSecretUntil, &w.active, &w.version, &w.updatedAt}
}

func (w *webhookRow) columns() []any {
	return append([]any{&w.seq, &w.id, &w.createdAt}, w.editable()...)
}

func (w *webhookRow) versionFields() (version, updatedAt *int64) { return &w.version, &w.updatedAt }

func (w *webhookRow) bound() boundContent {
	return boundContent{binding: &w.noBinding, kind: "webhook", id: w.id}
}

// auditFields are what the audit trail records of a webhook: neither its URL nor its secret.
func (w *webhookRow) auditFields() []auditField {
	return []auditField{{"name", w.name}, {"format", w.format}, {"events", json.RawMessage(w.events)},
		{"error_percent", w.errorPercent}, {"host", w.host}, {"is_active", w.active},
		{"old_secret_until", auditTime(w.oldSecretUntil)}}
}

// lists reports whether notifications of a type are sent to the webhook.
func (w *webhookRow) lists(eventType string) bool {
	var types []string
	_ = json.Unmarshal([]byte(w.events), &types) // the program wrote it
	return len(types) == 0 || slices.Contains(types, eventType)
}

// listeningTo returns the webhooks that list a type and that only, if it is not nil, lets through.
func listeningTo(eventType string, all []webhookRow, only func(*webhookRow) bool) (to []webhookRow) {
	for i := range all {
		if w := &all[i]; w.lists(eventType) && (only == nil || only(w)) {
			to = append(to, *w)
		}
	}
	return to
}

// errTooManyWebhooks means that there are maxWebhooks already.
var errTooManyWebhooks = errors.New("there are too many webhooks")

// maxWebhooks bounds what one event sets off.
const maxWebhooks = 20

// addWebhook stores a new webhook and fills in what the database decides.
func (s *store) addWebhook(ctx context.Context, origin auditOrigin, w *webhookRow) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		w.version = 1
		n, err := queryValue[int64](ctx, tx, "counting webhooks", `SELECT count(*) FROM webhooks`)
		if err == nil && n >= maxWebhooks {
			err = errTooManyWebhooks
		}
		if err != nil {
			return auditEvent{}, err
		}
		err = tx.QueryRowContext(ctx, `
			INSERT INTO webhooks (id, created_at, `+webhookEditable+`)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING seq`, w.columns()[1:]...).Scan(&w.seq)
		return auditEvent{"webhook.create", w.id, diffAuditFields(nil, w.auditFields())}, err
	})
}

func (s *store) webhookByID(ctx context.Context, id string) (webhookRow, error) {
	return webhookByID(ctx, s.readDB, id)
}

func webhookByID(ctx context.Context, db querier, id string) (webhookRow, error) {
	return queryRow(ctx, db, (*webhookRow).columns, selectWebhooks+`WHERE id = ?`, id)
}

// listWebhooks returns all webhooks, in the order in which they were made.
func (s *store) listWebhooks(ctx context.Context) ([]webhookRow, error) {
	return listWebhooks(ctx, s.readDB)
}

func listWebhooks(ctx context.Context, db querier) ([]webhookRow, error) {
	return collect(ctx, db, "listing webhooks", (*webhookRow).columns, selectWebhooks+`ORDER BY seq`)
}

// changeWebhook is changeRow for a webhook. action is what the audit trail says of it.
func (s *store) changeWebhook(ctx context.Context, origin auditOrigin, action, id string, version int64,
	edit func(*webhookRow) error) (webhookRow, error) {
	load := func(tx *auditedTx) (webhookRow, error) { return webhookByID(ctx, tx, id) }
	save := func(tx *auditedTx, old, w *webhookRow) (auditEvent, error) {
		err := execute(ctx, tx, "changing a webhook", `
			UPDATE webhooks SET (`+webhookEditable+`) = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE seq = ?`,
			append(w.editable(), w.seq)...)
		fields := diffAuditFields(old.auditFields(), w.auditFields())
		if string(old.sealedURL) != string(w.sealedURL) { // which differs each time it is sealed
			fields = append(fields, auditField{"url", "replaced"})
		}
		return auditEvent{action, w.id, fields}, err
	}
	return changeRow(ctx, s, origin, version, origin.at, load, edit, save)
}

// deleteWebhook deletes a webhook and its deliveries.
func (s *store) deleteWebhook(ctx context.Context, origin auditOrigin, id string, version int64) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		w, err := webhookByID(ctx, tx, id)
		if err == nil && version != 0 && version != w.version {
			err = errStale
		}
		if err == nil {
			err = execute(ctx, tx, "deleting deliveries", `DELETE FROM deliveries WHERE webhook = ?`, w.seq)
		}
		if err == nil {
			err = execute(ctx, tx, "deleting a webhook", `DELETE FROM webhooks WHERE seq = ?`, w.seq)
		}
		return auditEvent{"webhook.delete", w.id, diffAuditFields(w.auditFields(), nil)}, err
	})
}

// A notification is an event that is sent to webhooks.
type notification struct {
	seq       int64
	id        string // the webhook-id of all its deliveries
	eventType string
	at        int64
	data      string // JSON object
}

func (n *notification) columns() []any { return []any{&n.seq, &n.id, &n.eventType, &n.at, &n.data} }

// The types of notifications.
const (
	eventLimit      = "limit.threshold"
	eventExpiry     = "token.expiring"
	eventExhausted  = "key.exhausted"
	eventRefused    = "key.refused"
	eventErrors     = "errors.high"
	eventLedger     = "ledger.failing"
	eventAudit      = "audit.problem"
	eventNewAddress = "sign_in.new_address"
	eventTest       = "test" // when an administrator asks for it
)

// notificationTypes returns the types that a webhook can list.
func notificationTypes() []string {
	return []string{eventLimit, eventExpiry, eventExhausted, eventRefused, eventErrors, eventLedger, eventAudit,
		eventNewAddress}
}

// notificationLabel says for what a type of notification is.
func notificationLabel(eventType string) string {
	return map[string]string{
		eventLimit:      "Limits that are used at 50, 80 and 100%",
		eventExpiry:     "Tokens that expire in 7 days or 1 day",
		eventExhausted:  "Provider keys without credit or quota",
		eventRefused:    "Provider keys that are refused",
		eventErrors:     "Many failed calls",
		eventLedger:     "A ledger that cannot be written",
		eventAudit:      "Changes of the database from outside",
		eventNewAddress: "Sign-ins from a new address",
	}[eventType]
}

// The formats of webhooks.
const (
	formatStandard = "standard"
	formatSlack    = "slack"
	formatTeams    = "teams"
)

// A notificationData is what a notification says. It has names and ids, and neither secrets nor the content of calls.
type notificationData struct {
	Summary      string          `json:"summary"` // a sentence for people
	ProjectID    string          `json:"project_id,omitempty"`
	ProjectName  string          `json:"project_name,omitempty"`
	TokenID      string          `json:"token_id,omitempty"`
	TokenName    string          `json:"token_name,omitempty"`
	UpstreamID   string          `json:"upstream_id,omitempty"`
	UpstreamName string          `json:"upstream_name,omitempty"`
	KeyID        string          `json:"key_id,omitempty"`
	KeyName      string          `json:"key_name,omitempty"`
	Address      string          `json:"address,omitempty"`
	Limit        string          `json:"limit,omitempty"`
	Percent      int64           `json:"percent,omitempty"`
	Used         json.RawMessage `json:"used,omitempty"`
	Max          json.RawMessage `json:"max,omitempty"`
	Shadow       bool            `json:"shadow,omitempty"`
	ResetsAt     *timestamp      `json:"resets_at,omitempty"`
	ExpiresAt    *timestamp      `json:"expires_at,omitempty"`
	Calls        int64           `json:"calls,omitempty"`
	Errors       int64           `json:"errors,omitempty"`
	Problem      string          `json:"problem,omitempty"`
}

// limitThresholds are the percentages of a limit's maximum that are worth a notification, ascending.
func limitThresholds() []int64 { return []int64{50, 80, 100} }

// lifetimeMarkMS is how long it is remembered that a lifetime limit has reached a threshold.
const lifetimeMarkMS = 400 * dayMS

// failed counts the calls of an hour that a provider or the proxy itself has failed.
func (h *hourSum) failed() (n int64) {
	for i, class := range errorColumnClasses() {
		if class == errorClassProvider || class == errorClassProxy {
			n += h.errors[i]
		}
	}
	return n
}

// summary returns what the notification says in a sentence.
func (n *notification) summary() string {
	var data struct{ Summary string }
	_ = json.Unmarshal([]byte(n.data), &data) // the program wrote it
	return data.Summary
}

// event describes that the token will expire.
func (t *expiringToken) event(now int64) notificationData {
	days := (t.expiresAt - now + dayMS - 1) / dayMS
	return notificationData{TokenID: t.id, TokenName: t.name, ProjectID: t.projectID, ProjectName: t.project,
		ExpiresAt: new(timestamp(t.expiresAt)), Summary: fmt.Sprintf("The token %s of the project %s expires in %s.",
			t.name, t.project, pluralize(days, "day", "days"))}
}

// notificationBody returns the body of a notification in a format.
func notificationBody(format string, n *notification) ([]byte, error) {
	summary := n.summary()
	switch format {
	case formatSlack: // plain text: a name cannot mention people or show a link
		escaped := strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(summary)
		return json.Marshal(map[string]any{"text": escaped, "blocks": []any{map[string]any{"type": "section",
			"text": map[string]any{"type": "plain_text", "text": "llm-proxy: " + summary}}}})
	case formatTeams: // text runs, which have no Markdown
		run := map[string]any{"type": "TextRun", "text": summary}
		title := map[string]any{"type": "TextRun", "text": "llm-proxy", "weight": "Bolder"}
		card := map[string]any{"$schema": "http://adaptivecards.io/schemas/adaptive-card.json", "type": "AdaptiveCard",
			"version": "1.4", "body": []any{
				map[string]any{"type": "RichTextBlock", "inlines": []any{title}},
				map[string]any{"type": "RichTextBlock", "inlines": []any{run}}}}
		return json.Marshal(map[string]any{"type": "message", "attachments": []any{map[string]any{
			"contentType": "application/vnd.microsoft.card.adaptive", "contentUrl": nil, "content": card}}})
	}
	return json.Marshal(map[string]any{"type": n.eventType, "timestamp": timestamp(n.at),
		"data": json.RawMessage(n.data)})
}

const (
	deliveryLeaseMS   = 30_000 // longer than an attempt; then another process may send it
	deliveryGiveUpMS  = dayMS
	deliveryFirstWait = 2_000
	deliveryLastWait  = 4 * hourMS
	deliveriesAtOnce  = 20 // of one webhook, before the others are looked at again
)

// How the workers of notifications.go work.
const (
	deliveryTimeout    = 10 * time.Second
	deliveryStopWait   = 2 * time.Second
	notifyInterval     = 2 * time.Second
	slowNotifyInterval = 60_000 // ms
	keepNotifications  = 30 * dayMS
	keepDeliveries     = 10_000 // of one webhook
	knownAddressDays   = 90
	minErrorCalls      = 20 // fewer calls in an hour are no sample
	expiringAtOnce     = 500
	pruneAtOnce        = 1000
	pruneSteps         = 50 // at one time
	maxNoticed         = 20_000
	maxUsedTokens      = 10_000
)

// retryDelay returns how long to wait after the given number of attempts: four times as long each time, with up to a
// fifth more or less, so that receivers that were down do not get everything at once. random is from 0 to 1.
func retryDelay(attempts int64, random float64) int64 {
	wait := int64(deliveryFirstWait)
	for range min(attempts-1, 16) {
		wait = min(4*wait, deliveryLastWait)
	}
	return wait + int64((random-0.5)*0.4*float64(wait))
}

// A deliveryResult is how an attempt ended. problem is "" if the receiver has taken it.
type deliveryResult struct {
	status  int
	problem string
	wait    int64 // that the receiver asks for, in ms
	final   bool  // there is no point in trying again
}

// record puts the result of an attempt into the row.
func (d *deliveryRow) record(res deliveryResult, now int64, random float64) {
	d.attempts++
	d.status, d.problem, d.updatedAt = int64(res.status), res.problem, now
	d.nextAt = now + max(retryDelay(d.attempts, random), min(res.wait, deliveryLastWait))
	switch {
	case res.problem == "":
		d.state = deliveryDelivered
	case res.final || d.nextAt > d.giveUpAt:
		d.state = deliveryFailed
	}
}

// A mark says that something has been noticed. It may be forgotten at until.
type mark struct {
	key   string
	until int64
}

const (
	deliveryPending   = "pending"
	deliveryDelivered = "delivered"
	deliveryFailed    = "failed"
)

// A deliveryRow is what is sent of one notification to one webhook.
type deliveryRow struct {
	seq                   int64
	id                    string
	webhook, notification int64 // their seqs
	state                 string
	attempts              int64
	nextAt                int64
	leasedUntil           int64
	giveUpAt              int64
	status                int64 // of the last answer; 0: none
	problem               string
	updatedAt             int64
	of                    notification
}

const selectDeliveries = `
	SELECT d.seq, d.id, d.webhook, d.notification, d.state, d.attempts, d.next_at, d.leased_until, d.give_up_at,
		d.status, d.problem, d.updated_at, n.seq, n.id, n.type, n.at, n.data
	FROM deliveries d JOIN notifications n ON n.seq = d.notification `

func (d *deliveryRow) columns() []any {
	return append([]any{&d.seq, &d.id, &d.webhook, &d.notification, &d.state, &d.attempts, &d.nextAt, &d.leasedUntil,
		&d.giveUpAt, &d.status, &d.problem, &d.updatedAt}, d.of.columns()...)
}

const (
	// maxPendingDeliveries bounds the queue of one webhook. What does not fit is recorded as failed.
	maxPendingDeliveries = 1000
	queueFull            = "the queue of this webhook is full"
)

// addNotification queues a notification for webhooks, unless another process has noticed the same: the last of marks
// decides, and all are set. It reports whether it was new. deliveryID makes the id of a delivery.
func (s *store) addNotification(ctx context.Context, n *notification, marks []mark, webhooks []webhookRow,
	giveUpAt int64, deliveryID func() string) (isNew bool, err error) {
	err = s.withTx(ctx, func(tx *sql.Tx) error {
		isNew = true
		for _, m := range marks {
			count, err := execCount(ctx, tx, "marking a notification", `
				INSERT INTO notification_marks (key, until) VALUES (?, ?) ON CONFLICT (key) DO NOTHING`, m.key, m.until)
			if err != nil {
				return err
			}
			isNew = count == 1
		}
		if !isNew {
			return nil
		}
		return queueNotification(ctx, tx, n, webhooks, 0, giveUpAt, deliveryID)
	})
	return isNew && err == nil, err
}

// queueNotification stores a notification and its deliveries, which this process has until leasedUntil.
func queueNotification(ctx context.Context, tx querier, n *notification, webhooks []webhookRow,
	leasedUntil, giveUpAt int64, deliveryID func() string) error {
	if len(webhooks) == 0 {
		return nil
	}
	err := tx.QueryRowContext(ctx, `
		INSERT INTO notifications (id, type, at, data) VALUES (?, ?, ?, ?) RETURNING seq`,
		n.id, n.eventType, n.at, n.data).Scan(&n.seq)
	if err != nil {
		return fmt.Errorf("storing a notification: %w", err)
	}
	for i := range webhooks {
		pending, err := queryValue[int64](ctx, tx, "counting pending deliveries", `
			SELECT count(*) FROM deliveries WHERE webhook = ? AND state = 'pending'`, webhooks[i].seq)
		if err != nil {
			return err
		}
		state, problem := deliveryPending, ""
		if pending >= maxPendingDeliveries {
			state, problem = deliveryFailed, queueFull
		}
		// The webhook may be gone since the list was read.
		err = execute(ctx, tx, "queueing a delivery", `
			INSERT INTO deliveries (id, webhook, notification, state, attempts, next_at, leased_until, give_up_at,
				status, problem, updated_at)
			SELECT ?, seq, ?, ?, 0, ?, ?, ?, 0, ?, ? FROM webhooks WHERE seq = ?`,
			deliveryID(), n.seq, state, n.at, leasedUntil, giveUpAt, problem, n.at, webhooks[i].seq)
		if err != nil {
			return err
		}
	}
	return nil
}

// dueDeliveries returns up to limit deliveries of a webhook that are due and not too late, and that no process is
// sending.
func (s *store) dueDeliveries(ctx context.Context, webhook, now int64, limit int) ([]deliveryRow, error) {
	return collect(ctx, s.readDB, "looking for deliveries", (*deliveryRow).columns, selectDeliveries+`
		WHERE d.webhook = ?1 AND d.state = 'pending' AND d.next_at <= ?2 AND d.leased_until <= ?2
			AND d.give_up_at >= ?2
		ORDER BY d.next_at, d.seq LIMIT ?3`, webhook, now, limit)
}

// claimDelivery reserves a delivery for this process until a time. It reports false if another process has it, or if
// it or the webhook has changed since it was read: no request goes to a URL that was replaced before.
func (s *store) claimDelivery(ctx context.Context, w *webhookRow, d *deliveryRow, now, until int64) (bool, error) {
	n, err := execCount(ctx, s.writeDB, "claiming a delivery", `
		UPDATE deliveries SET leased_until = ?
		WHERE seq = ? AND state = 'pending' AND attempts = ? AND leased_until = ? AND leased_until <= ?
			AND EXISTS (SELECT 1 FROM webhooks w WHERE w.seq = deliveries.webhook AND w.version = ?)`,
		until, d.seq, d.attempts, d.leasedUntil, now, w.version)
	d.leasedUntil = until
	return n == 1, err
}

// saveDelivery records the result of an attempt, if the claim still holds.
func (s *store) saveDelivery(ctx context.Context, d *deliveryRow) error {
	return execute(ctx, s.writeDB, "recording a delivery", `
		UPDATE deliveries SET state = ?, attempts = ?, next_at = ?, leased_until = 0, status = ?, problem = ?,
			updated_at = ?
		WHERE seq = ? AND leased_until = ?`,
		d.state, d.attempts, d.nextAt, d.status, d.problem, d.updatedAt, d.seq, d.leasedUntil)
}

// listDeliveries returns up to limit deliveries of a webhook below before, the newest first. An empty state lists all.
func (s *store) listDeliveries(ctx context.Context, webhook, before int64, state string, limit int,
) ([]deliveryRow, error) {
	return collect(ctx, s.readDB, "listing deliveries", (*deliveryRow).columns, selectDeliveries+`
		WHERE d.webhook = ?1 AND d.seq < ?2 AND (?3 = '' OR d.state = ?3) ORDER BY d.seq DESC LIMIT ?4`,
		webhook, before, state, limit)
}

// deliveryByID returns a delivery of a webhook.
func (s *store) deliveryByID(ctx context.Context, webhook int64, id string) (deliveryRow, error) {
	return queryRow(ctx, s.readDB, (*deliveryRow).columns, selectDeliveries+`WHERE d.id = ? AND d.webhook = ?`,
		id, webhook)
}

// giveUpDeliveries ends the deliveries of a webhook that were not sent in time: it was inactive, or no process ran.
func (s *store) giveUpDeliveries(ctx context.Context, webhook, now int64) error {
	return execute(ctx, s.writeDB, "giving up deliveries", `
		UPDATE deliveries SET state = 'failed', updated_at = ?1,
			problem = CASE problem WHEN '' THEN 'was not sent in time' ELSE problem END
		WHERE webhook = ?2 AND state = 'pending' AND give_up_at < ?1 AND leased_until <= ?1`, now, webhook)
}

// redeliver queues a delivery again, as if it were new. It returns errNotFound if the delivery is gone.
func (s *store) redeliver(ctx context.Context, origin auditOrigin, w *webhookRow, d *deliveryRow, now int64) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		n, err := execCount(ctx, tx, "queueing a delivery again", `
			UPDATE deliveries SET state = 'pending', attempts = 0, next_at = ?, give_up_at = ?, problem = '',
				updated_at = ?
			WHERE seq = ?`, now, now+deliveryGiveUpMS, now, d.seq)
		if err == nil && n == 0 {
			err = errNotFound
		}
		return auditEvent{"webhook.redeliver", w.id, []auditField{{"delivery", d.id}}}, err
	})
}

// addTest queues a notification for one webhook, which an administrator has asked for, and returns its delivery. This
// process has it until a time, and sends it once.
func (s *store) addTest(ctx context.Context, origin auditOrigin, w *webhookRow, n *notification, leasedUntil int64,
	deliveryID string) (d deliveryRow, err error) {
	err = s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		err := queueNotification(ctx, tx, n, []webhookRow{*w}, leasedUntil, n.at, func() string { return deliveryID })
		if err == nil {
			d, err = queryRow(ctx, tx, (*deliveryRow).columns, selectDeliveries+`WHERE d.id = ?`, deliveryID)
		}
		return auditEvent{"webhook.test", w.id, []auditField{{"delivery", deliveryID}}}, err
	})
	return d, err
}

// pruneWebhooks deletes what is old, and gives up deliveries that were not sent in time. webhooks are all, whether they
// are active or not.
func (s *store) pruneWebhooks(ctx context.Context, now int64, webhooks []webhookRow) error {
	var errs []error
	for i := range webhooks {
		errs = append(errs, s.giveUpDeliveries(ctx, webhooks[i].seq, now),
			s.trimDeliveries(ctx, webhooks[i].seq, keepDeliveries, pruneAtOnce))
	}
	for range pruneSteps {
		n, err := s.pruneNotifications(ctx, now, now-keepNotifications, pruneAtOnce)
		if errs = append(errs, err); n < pruneAtOnce {
			break
		}
	}
	return errors.Join(errs...)
}

// pruneNotifications deletes up to limit each of: marks that are no longer needed, notifications from before a time
// that are not pending any more, and their deliveries. It returns how many rows it deleted.
func (s *store) pruneNotifications(ctx context.Context, now, before int64, limit int) (n int64, err error) {
	err = s.withTx(ctx, func(tx *sql.Tx) error {
		for _, st := range []struct {
			text string
			arg  int64
		}{
			{`DELETE FROM notification_marks WHERE key IN (
				SELECT key FROM notification_marks WHERE until < ? ORDER BY until LIMIT ?)`, now},
			{`DELETE FROM deliveries WHERE state <> 'pending' AND notification IN (
				SELECT seq FROM notifications WHERE at < ? ORDER BY at LIMIT ?)`, before},
			{`DELETE FROM notifications WHERE seq IN (
				SELECT n.seq FROM notifications n WHERE n.at < ?
					AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.notification = n.seq)
				ORDER BY n.at LIMIT ?)`, before},
		} {
			count, err := execCount(ctx, tx, "deleting old notifications", st.text, st.arg, limit)
			if err != nil {
				return err
			}
			n += count
		}
		return nil
	})
	return n, err
}

// trimDeliveries deletes the oldest deliveries of a webhook that have ended, up to limit, if there are more than keep.
func (s *store) trimDeliveries(ctx context.Context, webhook int64, keep, limit int) error {
	return execute(ctx, s.writeDB, "deleting old deliveries", `
		DELETE FROM deliveries WHERE seq IN (
			SELECT seq FROM deliveries WHERE webhook = ?1 AND state <> 'pending'
				AND seq <= (SELECT coalesce(max(seq), 0) FROM (
					SELECT seq FROM deliveries WHERE webhook = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2) AS kept)
			ORDER BY seq LIMIT ?3)`, webhook, keep, limit)
}

// A notifiedUntil says up to where events have been looked for.
type notifiedUntil struct {
	Audit int64 `json:"audit"` // seq of the audit trail
	At    int64 `json:"at"`    // for what becomes due with time
}

const notifiedSetting = "notified_until"

// notifiedUntil returns up to where events have been looked for, or errNotFound if there was no webhook.
func (s *store) notifiedUntil(ctx context.Context) (n notifiedUntil, err error) {
	text, err := s.setting(ctx, notifiedSetting)
	if err == nil {
		err = json.Unmarshal([]byte(text), &n)
	}
	return n, err
}

func (s *store) setNotifiedUntil(ctx context.Context, n notifiedUntil) error {
	return s.setSetting(ctx, notifiedSetting, string(mustMarshal(n)))
}

// forgetNotified says that there is no webhook, and nothing to look for.
func (s *store) forgetNotified(ctx context.Context) error {
	return execute(ctx, s.writeDB, "forgetting the time of notifications",
		`DELETE FROM settings WHERE name = 'notified_until'`)
}

// signedInBefore reports whether a management key has signed in from an address in the audit trail before an entry and
// not before a time.
func (s *store) signedInBefore(ctx context.Context, e *auditEntry, since int64) (bool, error) {
	return queryValue[bool](ctx, s.readDB, "looking for earlier sign-ins", `
		SELECT EXISTS (SELECT 1 FROM audit
			WHERE actor = ? AND at >= ? AND action = 'sign_in' AND address = ? AND seq < ?)`,
		e.actorID, since, e.address, e.seq)
}

// A namedObject is an object with its name and its project's.
type namedObject struct{ name, projectID, projectName string }

func (o *namedObject) columns() []any { return []any{&o.name, &o.projectID, &o.projectName} }

// namedUpstream returns the names of an upstream, deleted or not.
func (s *store) namedUpstream(ctx context.Context, id string) (namedObject, error) {
	return queryRow(ctx, s.readDB, (*namedObject).columns, `
		SELECT u.name, p.id, p.name FROM upstreams u JOIN projects p ON p.seq = u.project WHERE u.id = ?`, id)
}

// A usedToken is a token that has made calls.
type usedToken struct {
	id, project string
}

// tokensUsedSince returns the ids of up to limit tokens, and of their projects, with calls that began after a request
// id.
func (s *store) tokensUsedSince(ctx context.Context, after int64, limit int) ([]usedToken, error) {
	return collect(ctx, s.readDB, "listing tokens in use", func(u *usedToken) []any {
		return []any{&u.id, &u.project}
	}, `SELECT t.id, p.id FROM tokens t JOIN projects p ON p.seq = t.project
		WHERE t.seq IN (SELECT token FROM requests WHERE id > ?) AND t.revoked_at IS NULL
			AND p.deleted_at IS NULL
		ORDER BY t.seq LIMIT ?`, after, limit)
}

// resealWebhooks seals with to what from has sealed of webhooks, within the transaction of a change of the key.
func resealWebhooks(ctx context.Context, tx querier, from, to *sealer) error {
	all, err := listWebhooks(ctx, tx)
	if err != nil {
		return err
	}
	for i := range all {
		w := &all[i]
		for part, sealed := range map[string]*[]byte{
			webhookURLPart: &w.sealedURL, webhookSecretPart: &w.sealedSecret, webhookOldSecretPart: &w.oldSecret} {
			if len(*sealed) == 0 {
				continue
			}
			plain, err := from.open(*sealed, webhookContext(w.id, part))
			if err != nil {
				return fmt.Errorf("webhook %s: %w; nothing was changed. Delete it, then repeat", w.id, err)
			}
			*sealed = to.seal(plain, webhookContext(w.id, part))
		}
		if err := execute(ctx, tx, "writing webhook "+w.id, `
			UPDATE webhooks SET sealed_url = ?, sealed_secret = ?, old_secret = ? WHERE seq = ?`,
			w.sealedURL, w.sealedSecret, w.oldSecret, w.seq); err != nil {
			return err
		}
	}
	return nil
}
