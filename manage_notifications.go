// This file has what administrators do with webhooks: the fields of one, the operations, the handlers of /manage, and
// how webhooks and deliveries are shown. No response contains the URL of a webhook; its secret is only in the one that
// created it. What is sent when is decided in notifications.go. It also finds the limits that are nearly used up, has
// the test of a provider's key, and records failed sign-ins in the audit trail, and the end of the trail in the log.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// webhookRoutes lists the URLs of webhooks.
func (api *manageAPI) webhookRoutes() []manageRoute {
	fields := &api.ops.fields
	return []manageRoute{
		{"GET /manage/webhooks", roleViewer, api.listWebhooks, nil},
		{"POST /manage/webhooks", roleAdmin, withInput(fields.webhook, api.createWebhook), nil},
		{"GET /manage/webhooks/{id}", roleViewer, api.getWebhook, nil},
		{"PATCH /manage/webhooks/{id}", roleAdmin, withInput(fields.webhook, api.patchWebhook), nil},
		{"DELETE /manage/webhooks/{id}", roleAdmin, api.deleteWebhook, nil},
		{"POST /manage/webhooks/{id}/rotate", roleAdmin, withInput(fields.rotate, api.rotateWebhook), nil},
		{"POST /manage/webhooks/{id}/test", roleOperator, withoutInput(api.testWebhook), nil},
		{"GET /manage/webhooks/{id}/deliveries", roleViewer, api.listDeliveries, pageParams("state")},
		{"POST /manage/webhooks/{id}/deliveries/{delivery}/redeliver", roleOperator, withoutInput(api.redeliver), nil},
	}
}

// A webhookInput is what can be sent about a webhook.
type webhookInput struct {
	name, format optional[string]
	url          optional[secret]
	events       optional[[]string]
	errorPercent optional[int64]
	active       optional[bool]
}

// A webhookEdit is a webhook while it is changed. url is nil if it stays as it is.
type webhookEdit struct {
	webhookRow
	url secret
}

const defaultErrorPercent = 10

func webhookFields() []field[webhookInput, webhookEdit] {
	type f = field[webhookInput, webhookEdit]
	return []f{
		stored(f{name: "name", label: "Name", required: true, help: "webhook-name"}, anyName,
			func(in *webhookInput, w *webhookEdit) (*optional[string], *string) { return &in.name, &w.name }),
		stored(f{name: "format", label: "Format", kind: "select", required: true},
			oneOf(formatStandard, formatSlack, formatTeams),
			func(in *webhookInput, w *webhookEdit) (*optional[string], *string) { return &in.format, &w.format }),
		stored(f{name: "url", label: "URL", required: true, placeholder: "https://", empty: emptyOmitted,
			help: "webhook-url"}, anyValue,
			func(in *webhookInput, w *webhookEdit) (*optional[secret], *secret) { return &in.url, &w.url }),
		{name: "events", label: "Events", kind: "lines", placeholder: eventLimit,
			target: func(in *webhookInput) inputField { return &in.events }, apply: (*webhookInput).applyEvents},
		stored(f{name: "error_percent", label: "Error share (percent)", kind: "number", empty: emptyOmitted,
			help: "webhook-errors"}, inRange(1, 100),
			func(in *webhookInput, w *webhookEdit) (*optional[int64], *int64) {
				return &in.errorPercent, &w.errorPercent
			}),
		stored(f{name: "is_active", label: "Active", kind: "checkbox", help: "webhook-active"}, anyValue,
			func(in *webhookInput, w *webhookEdit) (*optional[bool], *bool) { return &in.active, &w.active }),
	}
}

// applyEvents stores the list of types, in the order of notificationTypes.
func (in *webhookInput) applyEvents(w *webhookEdit) error {
	if !in.events.set {
		return nil
	}
	list := []string{}
	for _, t := range notificationTypes() {
		if slices.Contains(in.events.value, t) {
			list = append(list, t)
		}
	}
	for i, t := range in.events.value {
		if !slices.Contains(list, t) {
			return &fieldError{fmt.Sprintf("events[%d]", i),
				"must be one of " + strings.Join(notificationTypes(), ", ")}
		}
	}
	w.events = string(mustMarshal(list))
	return nil
}

// apply checks the input and stores it in the row. A new URL is sealed for the row.
func (in *webhookInput) apply(ops *operations, w *webhookRow) error {
	edit := webhookEdit{webhookRow: *w}
	err := applyFields(in, &edit, ops.fields.webhook)
	if edit.url != nil {
		u, urlErr := parseWebhookURL(edit.url, ops.allowPrivate)
		if urlErr != nil {
			// About the administrator's own text; it contains no part of it.
			return errors.Join(err, &fieldError{"url", urlErr.Error()})
		}
		edit.host = u.Scheme + "://" + strings.ToLower(u.Host)
		edit.sealedURL = ops.sealer.seal(edit.url, webhookContext(w.id, webhookURLPart))
	}
	*w = edit.webhookRow
	return err
}

// createWebhook creates a webhook and returns its secret, which is not shown again.
func (ops *operations) createWebhook(ctx context.Context, origin auditOrigin, in webhookInput,
) (webhookRow, secret, error) {
	in.name.set, in.format.set = true, true // both are required
	w := webhookRow{id: newID("hook"), events: "[]", errorPercent: defaultErrorPercent, active: true,
		createdAt: origin.at, updatedAt: origin.at}
	err := in.apply(ops, &w)
	if !in.url.hasValue() {
		err = errors.Join(err, &fieldError{"url", "is required"})
	}
	if err != nil {
		return w, nil, err
	}
	value := newWebhookSecret()
	w.sealedSecret = ops.sealer.seal(value, webhookContext(w.id, webhookSecretPart))
	err = ops.store.addWebhook(ctx, origin, &w)
	if errors.Is(err, errTooManyWebhooks) {
		err = &fieldError{"", fmt.Sprintf("There are %d webhooks already. Delete one first.", maxWebhooks)}
	}
	return w, value, err
}

func (ops *operations) updateWebhook(ctx context.Context, origin auditOrigin, id string, version int64, in webhookInput,
) (webhookRow, error) {
	return ops.store.changeWebhook(ctx, origin, "webhook.change", id, version, func(w *webhookRow) error {
		return in.apply(ops, w)
	})
}

// rotateWebhook gives a webhook a new secret, which it returns. Deliveries are signed with the previous one as well for
// the given overlap.
func (ops *operations) rotateWebhook(ctx context.Context, origin auditOrigin, id string, version int64, in rotateInput,
) (webhookRow, secret, error) {
	overlap := int64(defaultOverlapMinutes)
	if err := applyFields(&in, &overlap, ops.fields.rotate); err != nil {
		return webhookRow{}, nil, err
	}
	value := newWebhookSecret()
	w, err := ops.store.changeWebhook(ctx, origin, "webhook.rotate", id, version, func(w *webhookRow) error {
		old, err := ops.sealer.open(w.sealedSecret, webhookContext(w.id, webhookSecretPart))
		w.oldSecret, w.oldSecretUntil = nil, nil
		if err == nil && overlap > 0 { // a secret that cannot be opened signs nothing
			w.oldSecret = ops.sealer.seal(old, webhookContext(w.id, webhookOldSecretPart))
			w.oldSecretUntil = new(origin.at + overlap*time.Minute.Milliseconds())
		}
		w.sealedSecret = ops.sealer.seal(value, webhookContext(w.id, webhookSecretPart))
		return nil
	})
	return w, value, err
}

// testWebhook sends a test notification once, and returns how that went.
func (ops *operations) testWebhook(ctx context.Context, origin auditOrigin, id string) (deliveryRow, error) {
	w, err := ops.store.webhookByID(ctx, id)
	if err != nil {
		return deliveryRow{}, err
	}
	now := ops.notifier.now()
	msg := newNotification(eventTest, now, notificationData{Summary: "This is a test of the webhook " + w.name + "."})
	d, err := ops.store.addTest(ctx, origin, &w, msg, now+deliveryLeaseMS, newDeliveryID())
	if err == nil && d.state == deliveryPending { // the result is recorded also if the caller has left
		err = ops.notifier.sendClaimed(context.WithoutCancel(ctx), &w, &d)
	}
	return d, err
}

// redeliver queues a delivery again.
func (ops *operations) redeliver(ctx context.Context, origin auditOrigin, id, deliveryID string) (deliveryRow, error) {
	w, err := ops.store.webhookByID(ctx, id)
	if err != nil {
		return deliveryRow{}, err
	}
	d, err := ops.store.deliveryByID(ctx, w.seq, deliveryID)
	if err == nil {
		err = ops.store.redeliver(ctx, origin, &w, &d, ops.notifier.now())
	}
	if err != nil {
		return deliveryRow{}, err
	}
	ops.notifier.wakeUp()
	return ops.store.deliveryByID(ctx, w.seq, deliveryID)
}

// A webhookView is a webhook as the management API shows it.
type webhookView struct {
	ID             string          `json:"id"`
	Name           string          `json:"name"`
	Format         string          `json:"format"`
	Host           string          `json:"host"` // of the URL, the rest of which may be a credential
	Events         json.RawMessage `json:"events"`
	ErrorPercent   int64           `json:"error_percent"`
	IsActive       bool            `json:"is_active"`
	OldSecretUntil *timestamp      `json:"old_secret_until"` // until then the previous secret signs too
	Version        int64           `json:"version"`
	CreatedAt      timestamp       `json:"created_at"`
	UpdatedAt      timestamp       `json:"updated_at"`
	Secret         string          `json:"secret,omitempty"` // only if it is new
}

func (v webhookView) etag() int64 { return v.Version }

func newWebhookView(w *webhookRow) webhookView {
	return webhookView{ID: w.id, Name: w.name, Format: w.format, Host: w.host, Events: json.RawMessage(w.events),
		ErrorPercent: w.errorPercent, IsActive: w.active, OldSecretUntil: newTimestamp(w.oldSecretUntil),
		Version: w.version, CreatedAt: timestamp(w.createdAt), UpdatedAt: timestamp(w.updatedAt)}
}

// newWebhookSecretView is newWebhookView with the new secret.
func newWebhookSecretView(w *webhookRow, value secret) webhookView {
	v := newWebhookView(w)
	if value != nil {
		v.Secret = value()
	}
	return v
}

// A deliveryView is a delivery as the management API shows it.
type deliveryView struct {
	ID            string     `json:"id"`
	MessageID     string     `json:"message_id"` // the header webhook-id
	Type          string     `json:"type"`
	Summary       string     `json:"summary"`
	CreatedAt     timestamp  `json:"created_at"`
	State         string     `json:"state"`
	Attempts      int64      `json:"attempts"`
	Status        *int64     `json:"status"` // of the last answer; null: none
	Problem       string     `json:"problem"`
	NextAttemptAt *timestamp `json:"next_attempt_at"` // null: there is none
	UpdatedAt     timestamp  `json:"updated_at"`
}

func newDeliveryView(d *deliveryRow) deliveryView {
	v := deliveryView{ID: d.id, MessageID: d.of.id, Type: d.of.eventType, Summary: d.of.summary(),
		CreatedAt: timestamp(d.of.at), State: d.state, Attempts: d.attempts, Problem: d.problem,
		UpdatedAt: timestamp(d.updatedAt)}
	if d.status != 0 {
		v.Status = &d.status
	}
	if d.state == deliveryPending {
		v.NextAttemptAt = new(timestamp(d.nextAt))
	}
	return v
}

func (ops *operations) listWebhooks(ctx context.Context) (listPage[webhookView], error) {
	rows, err := ops.store.listWebhooks(ctx)
	return newListPage(rows, len(rows), newWebhookView, nil), err
}

func (ops *operations) getWebhook(ctx context.Context, id string) (webhookView, error) {
	w, err := ops.store.webhookByID(ctx, id)
	return newWebhookView(&w), err
}

// A deliveryFilter narrows and pages the deliveries of a webhook.
type deliveryFilter struct {
	listQuery
	webhook, state string
}

func (r *manageRequest) parseDeliveryFilter() (f deliveryFilter, err error) {
	f.webhook = r.pathValue("id")
	if f.listQuery, err = r.parseListQuery(); err == nil {
		f.state, err = r.choiceParam("state", deliveryPending, deliveryDelivered, deliveryFailed)
	}
	return f, err
}

// listDeliveries returns deliveries of a webhook, the newest first.
func (ops *operations) listDeliveries(ctx context.Context, f deliveryFilter) (listPage[deliveryView], error) {
	w, err := ops.store.webhookByID(ctx, f.webhook)
	if err != nil {
		return listPage[deliveryView]{}, err
	}
	before := int64(math.MaxInt64)
	if f.seq > 0 {
		before = f.seq
	}
	rows, err := ops.store.listDeliveries(ctx, w.seq, before, f.state, f.limit+1)
	return newListPage(rows, f.limit, newDeliveryView,
		func(d *deliveryRow) string { return formatCursor(d.seq, "") }), err
}

func (api *manageAPI) listWebhooks(r *manageRequest) (any, error) { return api.ops.listWebhooks(r.ctx) }

func (api *manageAPI) createWebhook(r *manageRequest, in webhookInput) (any, error) {
	w, value, err := api.ops.createWebhook(r.ctx, r.origin, in)
	return created{newWebhookSecretView(&w, value)}, err
}

func (api *manageAPI) getWebhook(r *manageRequest) (any, error) {
	return api.ops.getWebhook(r.ctx, r.pathValue("id"))
}

func (api *manageAPI) patchWebhook(r *manageRequest, in webhookInput) (any, error) {
	w, err := api.ops.updateWebhook(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	return newWebhookView(&w), err
}

func (api *manageAPI) deleteWebhook(r *manageRequest) (any, error) {
	return r.deleted("id", api.store.deleteWebhook(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion))
}

func (api *manageAPI) rotateWebhook(r *manageRequest, in rotateInput) (any, error) {
	w, value, err := api.ops.rotateWebhook(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	return newWebhookSecretView(&w, value), err
}

func (api *manageAPI) testWebhook(r *manageRequest) (any, error) {
	d, err := api.ops.testWebhook(r.ctx, r.origin, r.pathValue("id"))
	return newDeliveryView(&d), err
}

func (api *manageAPI) listDeliveries(r *manageRequest) (any, error) {
	f, err := r.parseDeliveryFilter()
	if err != nil {
		return nil, err
	}
	return api.ops.listDeliveries(r.ctx, f)
}

func (api *manageAPI) redeliver(r *manageRequest) (any, error) {
	d, err := api.ops.redeliver(r.ctx, r.origin, r.pathValue("id"), r.pathValue("delivery"))
	return newDeliveryView(&d), err
}

// A keyTester asks providers for their lists of models, which costs nothing, to find out whether they accept a key.
type keyTester struct {
	transport http.RoundTripper
	slots     chan struct{} // of running tests: a list of models takes memory
}

const (
	keyTestTimeout  = 10 * time.Second
	keyTestWait     = time.Second // for one of the others to end
	maxKeyTests     = 16
	maxKeyTestBytes = 4 << 20 // of an answer
)

func newKeyTester(transport http.RoundTripper) *keyTester {
	return &keyTester{transport, make(chan struct{}, maxKeyTests)}
}

// A keyTestResult is what the test of a key has shown, as /manage names it.
type keyTestResult string

const (
	keyTestAccepted    keyTestResult = "accepted"
	keyTestRefused     keyTestResult = "refused"
	keyTestExhausted   keyTestResult = "exhausted"   // the account has no credit left
	keyTestUnreachable keyTestResult = "unreachable" // there was no answer
	keyTestUnusable    keyTestResult = "unusable"    // nothing was sent: the stored upstream cannot be used
	keyTestUnclear     keyTestResult = "unclear"     // the answer says nothing about the key
)

func keyTestResults() []keyTestResult {
	return []keyTestResult{keyTestAccepted, keyTestRefused, keyTestExhausted, keyTestUnreachable, keyTestUnusable,
		keyTestUnclear}
}

// A keyTest is the result of a test. It has nothing of the provider's answer but a number and an identifier.
type keyTest struct {
	result keyTestResult
	status int    // of the provider's answer; 0: there was none
	code   string // the provider's code for its error, "" if it has none
	models int    // in the list; only with status 200
	more   bool   // the list is longer
}

// send asks the provider of an upstream for its models.
func (t *keyTester) send(ctx context.Context, u *upstream) (result keyTest) {
	select {
	case t.slots <- struct{}{}:
		defer func() { <-t.slots }()
	case <-time.After(keyTestWait):
		return keyTest{result: keyTestUnclear}
	}
	ctx, cancel := context.WithTimeout(ctx, keyTestTimeout)
	defer cancel()
	form, h := listFormOf(u.family()), http.Header{"Accept": {"application/json"}, "User-Agent": {"llm-proxy"}}
	u.authorize(h)
	if u.provider == providerAnthropic {
		h["Anthropic-Version"] = []string{"2023-06-01"}
	}
	target := u.url("/v1/models", form.pageQuery("", ""))
	req := &http.Request{Method: http.MethodGet, URL: target, Host: u.host, Header: h}
	res, err := u.send(t.transport, req.WithContext(ctx))
	if err != nil {
		return keyTest{result: keyTestUnreachable}
	}
	defer res.Body.Close()
	var text []byte
	if mediaType(res.Header.Get("Content-Type")) != "text/event-stream" { // which may have no end
		text, _ = io.ReadAll(io.LimitReader(res.Body, maxKeyTestBytes)) // a part of an error says enough
	}
	mask := u.newKeyMask()
	text = append(mask.redact(text), mask.flush()...)
	maskKeyLike(text)
	return judgeKey(res.StatusCode, form, text)
}

// judgeKey returns what an answer to the request for a list of models says about the key. The request has nothing of a
// client, so that every refusal is about the key. text has no key any more.
func judgeKey(status int, form modelListForm, text []byte) keyTest {
	t := keyTest{result: keyTestUnclear, status: status}
	if status == http.StatusOK {
		if page, err := form.parsePage(text); err == nil {
			t.result, t.models, t.more = keyTestAccepted, len(page.entries), page.next != ""
		}
		return t
	}
	e := parseProviderError(text)
	for _, code := range e.codes {
		isTelling := (&providerError{codes: []string{code}}).accountTrouble() != noTrouble
		if isCode(code) && code != "error" && (t.code == "" || isTelling) {
			t.code = code
		}
	}
	switch f := e.judge(status, 0); {
	case f.kind == faultQuota:
		t.result = keyTestExhausted
	case status < 500 && e.lacksScope(), status == http.StatusTooManyRequests: // it is a key of an account
		t.result = keyTestAccepted
	case f.kind == faultKey, status == http.StatusUnauthorized, status == http.StatusForbidden:
		t.result = keyTestRefused
	}
	return t
}

// isCode reports whether a text is an identifier: a provider's text may quote anything.
func isCode(text string) bool {
	return text != "" && len(text) <= 40 && strings.Trim(text, "abcdefghijklmnopqrstuvwxyz_") == ""
}

// summary describes the result for people.
func (t *keyTest) summary() string {
	answer := strings.TrimSpace(strconv.Itoa(t.status) + " " + t.code)
	switch t.result {
	case keyTestAccepted:
		switch {
		case t.more:
			return "The key works: more than " + pluralize(int64(t.models), "model", "models") + "."
		case t.status == http.StatusOK:
			return "The key works: " + pluralize(int64(t.models), "model", "models") + "."
		case t.status == http.StatusTooManyRequests:
			return "The provider limits the rate of the key at the moment: " + answer + "."
		}
		return "The key works, but it may not list models: " + answer + "."
	case keyTestRefused:
		return "The provider refuses the key: " + answer + "."
	case keyTestExhausted:
		return "The provider knows the key, but its account has no credit left: " + answer + "."
	case keyTestUnreachable:
		return "The provider cannot be reached, or did not answer in 10 seconds. Check the base URL and the network."
	case keyTestUnusable:
		return "The stored key does not open, or its base URL is not allowed any more. Enter the key again."
	}
	if t.status == 0 {
		return "The key was not tested, because too many others are being tested. Try again."
	}
	return "The provider answered " + answer + " when it was asked for its models. That says nothing about the key."
}

const actionTestKey = "upstream.test"

// testKey finds out whether the provider accepts the key of an upstream. It changes nothing, not even the key's health.
func (ops *operations) testKey(ctx context.Context, origin auditOrigin, projectID, id string) (keyTest, error) {
	row, err := ops.store.upstreamByID(ctx, projectID, id)
	if err != nil {
		return keyTest{}, err
	}
	event := auditEvent{actionTestKey, row.id, []auditField{{"project_id", row.projectID}}}
	if err := ops.store.recordAuditEvent(ctx, origin, event); err != nil {
		return keyTest{}, fmt.Errorf("recording who tests a key: %w", err)
	}
	u := ops.registry.upstream(&row)
	if u.configErr != nil {
		return keyTest{result: keyTestUnusable}, nil
	}
	return ops.keyTester.send(ctx, u), nil
}

// A keyTestView is the result of a test as the management API shows it.
type keyTestView struct {
	UpstreamID string        `json:"upstream_id"`
	Result     keyTestResult `json:"result"`
	Status     *int          `json:"status"` // of the provider's answer; null: there was none
	Code       string        `json:"code"`
	Models     *int          `json:"models"` // null: there was no list
	MoreModels bool          `json:"more_models"`
	Summary    string        `json:"summary"`
}

func (api *manageAPI) testKey(r *manageRequest) (any, error) {
	t, err := api.ops.testKey(r.ctx, r.origin, r.pathValue("id"), r.pathValue("upstream"))
	v := keyTestView{UpstreamID: r.pathValue("upstream"), Result: t.result, Code: t.code, MoreModels: t.more,
		Summary: t.summary()}
	if t.status != 0 {
		v.Status = &t.status
	}
	if t.status == http.StatusOK && t.result == keyTestAccepted {
		v.Models = &t.models
	}
	return v, err
}

// A signInAuditor records failed sign-ins in the audit trail, and logs the head of the trail.
type signInAuditor struct {
	log     *logger
	store   *store
	limiter *throttle
}

// auditFailedSignIn records a wrong management key. origin.actorID is the key's ID if the key was once valid.
// The caller is refused in any case, so a failure to record is only logged.
func (a *signInAuditor) auditFailedSignIn(ctx context.Context, origin auditOrigin, surface string, now time.Time) {
	wait, omitted := a.limiter.allow(now)
	if wait > 0 {
		return
	}
	a.writeFailedSignIns(ctx, origin, surface, omitted, 1)
}

// writeFailedSignIns records an event for failed sign-ins: omitted of them had no event of their own, and
// current (0 or 1) is the latest. It ignores the request's cancellation, so that a caller cannot keep a
// wrong key off the trail by disconnecting.
func (a *signInAuditor) writeFailedSignIns(
	ctx context.Context, origin auditOrigin, surface string, omitted, current int64,
) {
	event := auditEvent{action: actionSignInFailed, object: surface}
	if omitted > 0 {
		event.detail = []auditField{{"left_out", omitted}}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := a.store.recordAuditEvent(ctx, origin, event); err != nil {
		a.limiter.addOmitted(omitted + current)
		a.log.Error("cannot record a failed sign-in in the audit trail",
			"request_id", origin.requestID, "address", origin.address, "error", err)
	}
}

// runAuditCheckpoints records how many failed sign-ins were omitted, and logs the head of the trail if it has
// changed since it was last logged, periodically and at the end. A log that is kept on another machine then
// proves that no event up to the head was removed.
func (a *signInAuditor) runAuditCheckpoints(ctx context.Context, every time.Duration, logged int64) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for end := false; !end; {
		var now time.Time
		select {
		case <-ctx.Done():
			now, end = time.Now(), true
		case now = <-tick.C:
		}
		if omitted := a.limiter.drainOmitted(now, end); omitted > 0 {
			a.writeFailedSignIns(ctx, systemOrigin(now), "", omitted, 0)
		}
		head, ok, _, err := a.store.loadAuditHead(context.WithoutCancel(ctx), a.store.chain)
		if err == nil && ok && head.seq != logged {
			logged = head.seq
			a.log.Info("the audit trail ends here", "head", head.String())
		}
	}
}

// A nearLimit is a limit of a day or longer that is mostly used up.
type nearLimit struct {
	token, name, project, projectID string // token and name are "" for a project's limit
	limit                           string // as limit.String describes it
	fraction                        float64
}

// nearLimits returns the limits that are used up to the given fraction or more. It checks at most maxEach
// projects and maxEach tokens, to bound the cost of a page.
func (g *registry) nearLimits(now int64, fraction float64, maxEach int) []nearLimit {
	g.mu.RLock()
	var projects []*liveProject
	for _, p := range g.projects {
		if projects = append(projects, p); len(projects) == maxEach {
			break
		}
	}
	var tokens []*liveToken
	for _, t := range g.byID {
		if tokens = append(tokens, t); len(tokens) == maxEach {
			break
		}
	}
	g.mu.RUnlock()
	var out []nearLimit
	for _, p := range projects {
		st := p.state.Load()
		owner := nearLimit{project: st.name, projectID: st.id}
		out = append(out, p.limiter.nearLimits(&p.limiter.project, now, fraction, owner)...)
	}
	for _, t := range tokens {
		st, p := t.state.Load(), t.project.state.Load()
		owner := nearLimit{token: st.id, name: st.name, project: p.name, projectID: p.id}
		out = append(out, t.project.limiter.nearLimits(&t.limits, now, fraction, owner)...)
	}
	return out
}

// sortNearLimits sorts limits by fraction, the highest first.
func sortNearLimits(limits []nearLimit) {
	slices.SortFunc(limits, func(a, b nearLimit) int {
		return cmp.Or(cmp.Compare(b.fraction, a.fraction), cmp.Compare(a.project, b.project),
			cmp.Compare(a.name, b.name), cmp.Compare(a.limit, b.limit))
	})
}

// nearLimits returns the limits of a scope that are used up to the fraction or more, each with owner's names.
func (l *limiter) nearLimits(s *limitScope, now int64, fraction float64, owner nearLimit) []nearLimit {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.leases != nil {
		now = l.leases.now()
	}
	return filterNearLimits(s.counters, now, fraction, owner)
}

func filterNearLimits(counters []*limitCounter, now int64, fraction float64, owner nearLimit) (out []nearLimit) {
	for _, c := range counters {
		if !c.limit.isQuota() || c.limit.monitorOnly || c.limit.max == 0 || c.group != nil {
			continue
		}
		c.advance(now)
		near := owner
		if near.fraction = float64(c.unscaledUse()) / float64(c.limit.max); near.fraction >= fraction {
			near.limit = c.limit.String()
			out = append(out, near)
		}
	}
	return out
}
