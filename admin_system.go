// This file has the pages of /admin about the proxy as a whole: prices, routing, sessions of clients,
// management keys, webhooks, the audit trail and the settings. They are thin over the operations of /manage.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/url"
	"slices"
	"strings"
	"time"
)

// A pricesView is the data of templates/prices.html: the price of a model that was looked up, the models that lack
// a price, and the operator's own prices.
type pricesView struct {
	Prices          []priceTableRow
	Model, Provider string
	Providers       []option
	Found           *priceTableRow
	Unpriced        []unpricedModel
}

// A priceTableRow is a price. Other has what has no column of its own, in words.
type priceTableRow struct {
	priceView
	Other []string
}

// commonPriceKinds are the kinds that have a column in tables of prices. The form has the others under "Advanced".
func commonPriceKinds() []string {
	return []string{"input", "output", "cached_input", "cache_write"}
}

func newPriceTableRow(v priceView) priceTableRow {
	row := priceTableRow{priceView: v}
	has := func(name string) bool { return len(v.Members[name]) > 0 && string(v.Members[name]) != "null" }
	for _, info := range priceKinds {
		if has(info.name) && !slices.Contains(commonPriceKinds(), info.name) {
			text := formatPrice(displayJSON(v.Members[info.name])) + info.unit.suffix()
			row.Other = append(row.Other, info.label+" "+text)
		}
	}
	for i, text := range [...]string{"other prices for long inputs", "service tiers", "region or speed", ""} {
		if has(pricePartNames[i]) && text != "" {
			row.Other = append(row.Other, text)
		}
	}
	return row
}

func (ui *adminUI) pricesPage(r *pageRequest) (*pageResponse, error) {
	v := pricesView{Model: strings.TrimSpace(r.query.Get("model")), Provider: r.query.Get("provider"),
		Providers: append(options("", "Any"), providerOptions()...)}
	rows, err := ui.store.listPrices(r.ctx)
	if err != nil {
		return nil, err
	}
	for i := range rows {
		v.Prices = append(v.Prices, newPriceTableRow(newPriceView(&rows[i])))
	}
	if v.Model != "" {
		if p := ui.ops.effectivePrice(v.Provider, v.Model, r.now); p != nil {
			v.Found = new(newPriceTableRow(newEffectivePriceView(v.Model, p)))
		}
	}
	unpriced, err := ui.ops.listUnpriced(r.ctx, r.now)
	v.Unpriced = unpriced.Data[:min(len(unpriced.Data), maxUnpricedRows)]
	return showPage("prices", "Prices", v), err
}

const maxUnpricedRows = 50 // on the page; the rest follows when these have a price

// A priceListView is the data of templates/price-list.html.
type priceListView struct {
	Providers []option
	Rows      []priceTableRow
	Next      string
}

// priceListPage shows the built-in list, page by page.
func (ui *adminUI) priceListPage(r *pageRequest) (*pageResponse, error) {
	page, err := ui.ops.listListPrices(r.listRequest(100, "search", "provider"))
	if err != nil {
		return nil, err
	}
	v := priceListView{Next: r.nextPageURL(page.Next), Providers: options("", "All")}
	for _, name := range ui.ops.prices.Load().listedProviders() {
		v.Providers = append(v.Providers, option{name, name})
	}
	for _, p := range page.Data {
		v.Rows = append(v.Rows, newPriceTableRow(p))
	}
	return showPage("price-list", "List prices", v), nil
}

// A simulateView is the data of templates/simulate.html. At most one of Call and Period is not nil.
type simulateView struct {
	Form   *pageForm
	Call   *simulation
	Parts  *costTable // nil: there is no price for the call
	Period *periodSimulation
}

// simulatePage shows what a call would cost with a model or, without any usage, what the last month would have.
func (ui *adminUI) simulatePage(r *pageRequest) (*pageResponse, error) {
	v := &simulateView{Form: &pageForm{Action: r.http.URL.Path, Submit: "Calculate", Fields: []*formField{
		{Name: "model", Label: "Model", Required: true, Placeholder: "gpt-4o-mini"},
		{Name: "service_tier", Label: "Service tier", Kind: "select", Short: true, Options: options("", "Standard")}}}}
	for _, tier := range []serviceTier{tierBatch, tierFlex, tierPriority, tierUltrafast} {
		field := v.Form.Fields[1]
		field.Options = append(field.Options, option{tier.String(), capitalize(tier.String())})
	}
	counts := options("input_tokens", "Input tokens", "cached_tokens", "Cached input tokens",
		"cache_write_tokens", "Cache write tokens", "output_tokens", "Output tokens",
		"reasoning_tokens", "Reasoning tokens")
	for _, o := range counts {
		v.Form.Fields = append(v.Form.Fields, &formField{Name: o.Value, Label: o.Label, Kind: "number"})
	}
	v.Form.Fields = append(v.Form.Fields, &formField{Name: "usage", Label: "Or the usage object of a response",
		Kind: "json", Placeholder: `{"prompt_tokens":1000,"completion_tokens":100}`})
	v.Form.fill(r.query, nil)
	page := showPage("simulate", "Calculate a cost", v)
	if len(r.query) == 0 {
		return page, nil
	}
	in := simulateInput{model: given(strings.TrimSpace(r.query.Get("model"))),
		serviceTier: given(r.query.Get("service_tier"))}
	sent := map[string]json.RawMessage{}
	for _, o := range counts {
		if text := strings.TrimSpace(r.query.Get(o.Value)); text != "" {
			sent[o.Value] = jsonNumber(text)
		}
	}
	if len(sent) > 0 {
		in.counts = given(mustMarshal(sent))
	}
	err := error(nil)
	if text := strings.TrimSpace(r.query.Get("usage")); text != "" {
		in.usage = given(json.RawMessage(text))
		if !json.Valid(in.usage.value) {
			err = &fieldError{"usage", "must be a JSON object"}
		}
	}
	var result any
	if err == nil {
		result, err = ui.ops.simulate(r.manageRequest, &in)
	}
	if err != nil {
		page.status, err = v.Form.showErrors(err, nil)
		return page, err
	}
	if v.Call, _ = result.(*simulation); v.Call != nil {
		v.Parts = newCostTable(v.Call.CostBreakdown)
	}
	v.Period, _ = result.(*periodSimulation)
	return page, nil
}

func (ui *adminUI) newPricePage(r *pageRequest) (*pageResponse, error) {
	names := append([]string{"match"}, append(commonPriceKinds(), "valid_from")...)
	shown := len(names)
	for _, f := range ui.ops.fields.price {
		if !slices.Contains(names, f.name) {
			names = append(names, f.name)
		}
	}
	v := &formView{Crumb: option{"/admin/prices", "Prices"}, Intro: "price", Form: &pageForm{
		Submit: "Set price", Cancel: "/admin/prices", Fields: formFields(ui.ops.fields.price, names...)}}
	for _, field := range v.Form.Fields[shown:] {
		field.Advanced = true
	}
	var in priceInput
	targets := fieldTargets(&in, ui.ops.fields.price)
	defaults := url.Values{"match": {r.query.Get("match")}}
	return ui.submit(r, "Set a price", v, defaults, targets, func() (*pageResponse, error) {
		_, err := ui.ops.setPrice(r.ctx, r.origin, in)
		return redirectTo("/admin/prices", "price-set"), err
	})
}

func (ui *adminUI) deletePricePage(r *pageRequest) (*pageResponse, error) {
	v := &confirmView{Ask: "delete-price", Form: &pageForm{Submit: "Delete price", Cancel: "/admin/prices"}}
	return r.confirm("Delete this price?", v, redirectTo("/admin/prices", "price-deleted"), func() error {
		return ui.ops.deletePrice(r.ctx, r.origin, r.pathValue("id"))
	})
}

// A replicasView is the data of templates/replicas.html.
type replicasView struct {
	Replicas []replicaView
	Shared   bool // the database can have several replicas
	Now      timestamp
}

func (ui *adminUI) replicasPage(r *pageRequest) (*pageResponse, error) {
	replicas, err := ui.ops.listReplicas(r.ctx)
	v := replicasView{Replicas: replicas, Shared: ui.cfg.postgres != nil, Now: timestamp(r.now.UnixMilli())}
	return showPage("replicas", "Replicas", v), err
}

// A sessionPageView is the data of templates/session.html.
type sessionPageView struct {
	*callSession
	Rows  []requestListItem
	Next  string
	Tiles []tile
}

func (ui *adminUI) sessionPage(r *pageRequest) (*pageResponse, error) {
	ui.awaitRecorded(r)
	var after int64
	if text := r.query.Get("after"); text != "" {
		var err error
		if after, _, err = parseCursor(text); err != nil {
			return nil, badRequest("invalid_value", "after", "This address is not a page of the list.")
		}
	}
	s, err := ui.ops.getSession(r.ctx, r.query.Get("session"), r.query.Get("project"), after, defaultPageSize)
	if err != nil {
		return nil, err
	}
	v := &sessionPageView{callSession: s, Next: r.nextPageURL(s.Next)}
	for i := range s.rows {
		v.Rows = append(v.Rows, newRequestListItem(&s.rows[i]))
	}
	took := time.Duration(int64(s.LastAt)-int64(s.FirstAt)) * time.Millisecond
	add := func(label string, value figure, n int64, text string) {
		detail := tileDetail{Figure: unitCount.figure(float64(n)), Text: text}
		v.Tiles = append(v.Tiles, tile{Label: label, Value: value, Details: []tileDetail{detail}})
	}
	add("Calls", unitCount.figure(float64(s.Calls)), s.FailedCalls, "failed")
	add("Tokens", unitCount.figure(float64(s.InputTokens+s.OutputTokens)), s.InputTokens, "in")
	v.Tiles[1].Details = append(v.Tiles[1].Details, tileDetail{unitCount.figure(float64(s.OutputTokens)), "out", ""})
	add("Cost", unitMoney.figure(float64(s.Cost)), s.UnpricedCalls, "without a price")
	share := percent(100 * s.CachedShare)
	add("Cached input", figure{share, share}, s.CachedTokens, "tokens")
	duration := describeDuration(took)
	v.Tiles = append(v.Tiles, tile{Label: "Duration", Value: figure{duration, duration}})
	return showPage("session", "Session "+s.Session, v), nil
}

// An auditPageView is the data of templates/audit.html.
type auditPageView struct {
	Entries  []auditLine
	Next     string
	Filtered bool // or a later page
}

// An auditLine is an entry of the audit trail.
type auditLine struct {
	auditView
	Name    string // of the object, as it is now; "": it has none
	Link    string // to the page of the object, "" if it has none
	Changes []labeledValue
}

func (ui *adminUI) auditPage(r *pageRequest) (*pageResponse, error) {
	list := r.listRequest(100, "actor", "action", "object", "from", "to")
	f, err := list.parseAuditFilter()
	if err != nil {
		return nil, err
	}
	page, err := ui.ops.listAudit(r.ctx, f)
	if err != nil {
		return nil, err
	}
	v := auditPageView{Next: r.nextPageURL(page.Next), Filtered: len(list.query) > 1}
	v.Entries, err = ui.auditLines(r, page.Data)
	return showPage("audit", "Audit trail", v), err
}

// auditLines adds to entries of the audit trail what pages show beside them.
func (ui *adminUI) auditLines(r *pageRequest, entries []auditView) (lines []auditLine, err error) {
	var ids []string
	for _, e := range entries {
		ids = append(ids, e.Object)
	}
	names, err := ui.store.objectNames(r.ctx, ids)
	for _, e := range entries {
		lines = append(lines, auditLine{auditView: e, Name: names[e.Object], Link: objectURL(e.Object),
			Changes: auditChanges(e.Detail)})
	}
	return lines, err
}

// objectURL returns the page of the object with an id, "" if it has none.
func objectURL(id string) string {
	kind, _, _ := strings.Cut(id, "_")
	lists := map[string]string{"proj": "/admin/projects/", "tok": "/admin/tokens/", "req": "/admin/requests/",
		"hook": "/admin/webhooks/"}
	if lists[kind] == "" {
		return ""
	}
	return lists[kind] + url.PathEscape(id)
}

// auditChanges describes the details of an entry, in their order. A pair of values is before and after.
func auditChanges(detail json.RawMessage) (changes []labeledValue) {
	dec := json.NewDecoder(bytes.NewReader(detail))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil
	}
	for dec.More() {
		name, err := dec.Token()
		var raw json.RawMessage
		if err != nil || dec.Decode(&raw) != nil {
			return changes
		}
		label, _ := name.(string)
		show := displayJSON
		if label == "policy" {
			show = describePolicy
		}
		text := show(raw)
		var pair []json.RawMessage
		if json.Unmarshal(raw, &pair) == nil && len(pair) == 2 {
			if text = show(pair[1]); string(pair[0]) != "null" {
				text = show(pair[0]) + " → " + text
			} else if slices.Contains([]string{"", "–", "{}", "[]"}, text) {
				continue // a field of a new object that was left empty
			}
		}
		changes = append(changes, labeledValue{label, text})
	}
	return changes
}

// An auditCheckView is the data of templates/audit-check.html.
type auditCheckView struct {
	Head     string
	Entries  int64
	Problems []string
	More     int64 // problems left out
}

// auditCheckTimeout bounds the check on a page. The command takes as long as it needs.
const auditCheckTimeout = 40 * time.Second

func (ui *adminUI) auditCheckPage(r *pageRequest) (*pageResponse, error) {
	ctx, cancel := context.WithTimeout(r.ctx, auditCheckTimeout)
	defer cancel()
	check, err := ui.store.verifyAudit(ctx, ui.store.chain, nil)
	if ctx.Err() != nil && r.ctx.Err() == nil {
		return nil, errAuditTooLong
	}
	if err != nil {
		return nil, err
	}
	v := auditCheckView{Head: check.lastHead.String(), Entries: check.lastHead.seq,
		Problems: check.problems, More: int64(check.omittedProblems)}
	return showPage("audit-check", "Verification of the audit trail", v), nil
}

// A settingsView is the data of templates/settings.html.
type settingsView struct {
	Settings                  []effectiveSetting
	Version                   string
	Started                   timestamp
	DiskKnown                 bool
	File, Log, Reusable, Free int64 // bytes
	DatabaseFile, KeyID       string
	LedgerOK                  bool
	Calls, Schema             int
}

func (ui *adminUI) settingsPage(r *pageRequest) (*pageResponse, error) {
	v := settingsView{Settings: ui.cfg.settings, Version: versionText(), Started: timestamp(ui.started.UnixMilli()),
		DatabaseFile: ui.cfg.databaseName, KeyID: ui.keyID, LedgerOK: ui.ledger.healthy(),
		Calls: len(ui.running.admittedCalls(r.now))}
	if use, err := ui.diskUse(r.ctx); err == nil {
		v.DiskKnown, v.Free = true, use.available
		v.File, v.Log, v.Reusable = use.databaseSize, use.walSize, use.reusable
	}
	var err error
	v.Schema, _, err = ui.store.schemaVersion(r.ctx)
	return showPage("settings", "Settings", v), err
}

// A keysView is the data of templates/keys.html.
type keysView struct {
	Keys        []keyListItem
	Next        string
	Environment bool // MANAGEMENT_TOKEN is set
}

type keyListItem struct {
	keyView
	State stateView
	Own   bool // the session belongs to it
}

func (ui *adminUI) keysPage(r *pageRequest) (*pageResponse, error) {
	q, err := r.listRequest(100).parseListQuery()
	if err != nil {
		return nil, err
	}
	page, err := ui.ops.listManagementKeys(r.ctx, q, r.now)
	v := keysView{Next: r.nextPageURL(page.Next), Environment: ui.cfg.managementToken != nil}
	for _, k := range page.Data {
		v.Keys = append(v.Keys, keyListItem{k, newKeyStateView(&k, r.now), k.ID == r.actor.id})
	}
	return showPage("keys", "Management keys", v), err
}

func newKeyStateView(k *keyView, now time.Time) stateView {
	switch {
	case k.RevokedAt != nil:
		return stateView{"bad", "revoked"}
	case !k.IsActive:
		return stateView{"bad", "expired"}
	case expiresSoon(k.ExpiresAt, now):
		return stateView{"warn", "expires soon"}
	}
	return stateView{"good", "active"}
}

func (ui *adminUI) newKeyPage(r *pageRequest) (*pageResponse, error) {
	v := &formView{Crumb: option{"/admin/keys", "Management keys"},
		Form: &pageForm{Submit: "Create key", Cancel: "/admin/keys", Creates: "key",
			Fields: formFields(ui.ops.fields.key, "name", "role", "expires_at")}}
	defaults := url.Values{"role": {string(roleViewer)}}
	var in keyInput
	targets := fieldTargets(&in, ui.ops.fields.key)
	return ui.submit(r, "New management key", v, defaults, targets, func() (*pageResponse, error) {
		k, value, err := ui.ops.createManagementKey(r.ctx, r.origin, in)
		if err != nil {
			return nil, err
		}
		return showPage("key-once", "Management key created", newKeyValueView(&k, value, r.now)), nil
	})
}

func (ui *adminUI) editKey(r *pageRequest) (*pageResponse, error) {
	k, err := ui.ops.getManagementKey(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	v := &formView{Crumb: option{"/admin/keys", "Management keys"},
		Form: &pageForm{Submit: "Save", Cancel: "/admin/keys", Version: k.Version,
			Fields: formFields(ui.ops.fields.key, "name", "role", "expires_at")}}
	var in keyInput
	targets := fieldTargets(&in, ui.ops.fields.key)
	return ui.submit(r, "Edit "+k.Name, v, storedValues(k, v.Form.Fields), targets, func() (*pageResponse, error) {
		_, err := ui.ops.updateManagementKey(r.ctx, r.origin, k.ID, r.ifMatchVersion, in)
		return redirectTo("/admin/keys", "saved"), err
	})
}

func (ui *adminUI) revokeKeyPage(r *pageRequest) (*pageResponse, error) {
	k, err := ui.ops.getManagementKey(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	v := &confirmView{Ask: "revoke-key", Form: &pageForm{Submit: "Revoke key", Cancel: "/admin/keys"}}
	return r.confirm("Revoke the key "+k.Name+"?", v, redirectTo("/admin/keys", "key-revoked"), func() error {
		_, err := ui.ops.revokeManagementKey(r.ctx, r.origin, k.ID, r.ifMatchVersion)
		return err
	})
}

// A routePageView is the data of templates/route.html.
type routePageView struct {
	Project   projectView
	APIs      []option
	Problem   string // with the model or API
	Resolved  string // what the model stands for, if it is an alias
	Fallback  string
	Upstreams []routePageUpstream
}

type routePageUpstream struct {
	routeUpstreamView
	Percent, Timeouts string
}

// testRoutePage shows which upstreams would get a call for a model now, and why the others would not.
func (ui *adminUI) testRoutePage(r *pageRequest) (*pageResponse, error) {
	project, err := ui.ops.getProject(r.ctx, r.pathValue("id"), valueQuery{}, r.now)
	if err != nil {
		return nil, err
	}
	v := routePageView{Project: project,
		APIs: options("openai", "OpenAI", "anthropic", "Anthropic", "gemini", "Gemini")}
	page := showPage("route", "Test routing in "+project.Name, &v)
	if r.query.Get("model") == "" {
		return page, nil
	}
	q := routeQuery{r.query.Get("model"), r.query.Get("api"), r.query.Get("session")}
	route, err := ui.ops.explainRoute(r.ctx, project.ID, q)
	if fe, ok := errors.AsType[*fieldError](err); ok {
		v.Problem = fieldErrorMessage(fe)
		return page, nil
	}
	v.Resolved, v.Fallback = route.ResolvedModel, route.FallbackModel
	for _, u := range route.Upstreams {
		v.Upstreams = append(v.Upstreams, routePageUpstream{u, percent(100 * u.Share), u.timeoutsText()})
	}
	return page, err
}

// timeoutsText lists the upstream's own timeouts.
func (u *routeUpstreamView) timeoutsText() string {
	var set []string
	for _, t := range []struct {
		name string
		ms   int64
	}{{"connect", u.ConnectMS}, {"response", u.AnswerMS}, {"first event", u.FirstEventMS}, {"pause", u.IdleMS}} {
		if t.ms > 0 {
			set = append(set, t.name+" "+(time.Duration(t.ms)*time.Millisecond).String())
		}
	}
	return strings.Join(set, ", ")
}

// webhookPages returns the URLs of webhooks.
func (ui *adminUI) webhookPages() []adminRoute {
	return []adminRoute{
		{"GET /admin/webhooks", roleViewer, ui.webhooksPage},
		{"GET|POST /admin/webhooks/new", roleAdmin, ui.newWebhookPage},
		{"GET /admin/webhooks/{id}", roleViewer, ui.webhookPage},
		{"GET|POST /admin/webhooks/{id}/edit", roleAdmin, ui.editWebhook},
		{"GET|POST /admin/webhooks/{id}/rotate", roleAdmin, ui.rotateWebhookPage},
		{"GET|POST /admin/webhooks/{id}/delete", roleAdmin, ui.deleteWebhookPage},
		{"POST /admin/webhooks/{id}/test", roleOperator, ui.testWebhookPage},
		{"POST /admin/webhooks/{id}/deliveries/{delivery}/redeliver", roleOperator, ui.redeliverPage},
	}
}

// A webhookItem is a webhook as pages show it, with its deliveries, the newest first, or just the latest.
type webhookItem struct {
	webhookView
	FormatName string
	Types      []string // none: all
	Status     stateView
	Latest     *deliveryLine
	Deliveries []deliveryLine
	Next       string
}

type deliveryLine struct {
	deliveryView
	Result stateView
}

func newWebhookItem(w webhookView, page listPage[deliveryView]) webhookItem {
	item := webhookItem{webhookView: w, Status: stateView{"good", "active"}}
	_ = json.Unmarshal(w.Events, &item.Types) // the program wrote it
	for _, o := range webhookFormats() {
		if o.Value == w.Format {
			item.FormatName = o.Label
		}
	}
	if !w.IsActive {
		item.Status = stateView{"warn", "inactive"}
	}
	kinds := map[string]string{deliveryDelivered: "good", deliveryFailed: "bad", deliveryPending: "warn"}
	for _, d := range page.Data {
		item.Deliveries = append(item.Deliveries, deliveryLine{d, stateView{kinds[d.State], d.State}})
	}
	if len(item.Deliveries) > 0 {
		item.Latest = &item.Deliveries[0]
	}
	return item
}

func webhookFormats() []option {
	return options(formatStandard, "JSON (Standard Webhooks)", formatSlack, "Slack", formatTeams, "Teams")
}

func (ui *adminUI) webhooksPage(r *pageRequest) (*pageResponse, error) {
	all, err := ui.ops.listWebhooks(r.ctx)
	var v struct{ Webhooks []webhookItem }
	for _, w := range all.Data {
		latest, e := ui.ops.listDeliveries(r.ctx, deliveryFilter{listQuery: listQuery{limit: 1}, webhook: w.ID})
		err = errors.Join(err, e)
		v.Webhooks = append(v.Webhooks, newWebhookItem(w, latest))
	}
	return showPage("webhooks", "Webhooks", v), err
}

func (ui *adminUI) webhookPage(r *pageRequest) (*pageResponse, error) {
	w, err := ui.ops.getWebhook(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	f, err := r.listRequest(50, "state").parseDeliveryFilter()
	if err != nil {
		return nil, err
	}
	page, err := ui.ops.listDeliveries(r.ctx, f)
	item := newWebhookItem(w, page)
	item.Next = r.nextPageURL(page.Next)
	return showPage("webhook", w.Name+" · Webhooks", item), err
}

// webhookForm returns the form of a webhook. Each type of notification is a checkbox, which the page itself reads.
func (ui *adminUI) webhookForm(submit, cancel string) *formView {
	fields := formFields(ui.ops.fields.webhook, "name", "format", "url", "is_active", "error_percent")
	fields[1].Options, fields[4].Advanced, fields[4].Default = webhookFormats(), true, formatInt(defaultErrorPercent)
	for _, t := range notificationTypes() {
		fields = append(fields, &formField{Name: eventField(t), Label: notificationLabel(t), Kind: "checkbox"})
	}
	fields[5].Heading, fields[5].HeadingHelp = "Events", "webhook-events"
	crumb := option{"/admin/webhooks", "Webhooks"}
	return &formView{Crumb: crumb, Form: &pageForm{Submit: submit, Cancel: cancel, Fields: fields}}
}

func eventField(eventType string) string { return "event-" + eventType }

// checkedEvents returns the types whose checkboxes are checked.
func checkedEvents(form url.Values) optional[[]string] {
	list := []string{}
	for _, t := range notificationTypes() {
		if form.Get(eventField(t)) != "" {
			list = append(list, t)
		}
	}
	return given(list)
}

func (ui *adminUI) newWebhookPage(r *pageRequest) (*pageResponse, error) {
	v := ui.webhookForm("Create webhook", "/admin/webhooks")
	v.Form.Creates = "webhook"
	defaults := url.Values{"is_active": {"on"}, "format": {formatStandard}}
	var in webhookInput
	return ui.submit(r, "New webhook", v, defaults, fieldTargets(&in, ui.ops.fields.webhook),
		func() (*pageResponse, error) {
			in.events = checkedEvents(r.form)
			w, value, err := ui.ops.createWebhook(r.ctx, r.origin, in)
			if err != nil {
				return nil, err
			}
			return showPage("webhook-once", "Webhook created", newWebhookSecretView(&w, value)), nil
		})
}

func (ui *adminUI) editWebhook(r *pageRequest) (*pageResponse, error) {
	w, err := ui.ops.getWebhook(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	v := ui.webhookForm("Save", "/admin/webhooks/"+w.ID)
	v.Form.Version, v.Crumb = w.Version, option{"/admin/webhooks/" + w.ID, w.Name}
	v.Form.Fields[2].Help, v.Form.Fields[2].Required = "webhook-new-url", false
	stored := storedValues(w, v.Form.Fields)
	for _, t := range newWebhookItem(w, listPage[deliveryView]{}).Types {
		stored.Set(eventField(t), "on")
	}
	var in webhookInput
	return ui.submit(r, "Edit "+w.Name, v, stored, fieldTargets(&in, ui.ops.fields.webhook),
		func() (*pageResponse, error) {
			in.events = checkedEvents(r.form)
			_, err := ui.ops.updateWebhook(r.ctx, r.origin, w.ID, r.ifMatchVersion, in)
			return redirectTo("/admin/webhooks/"+w.ID, "saved"), err
		})
}

func (ui *adminUI) rotateWebhookPage(r *pageRequest) (*pageResponse, error) {
	w, err := ui.ops.getWebhook(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	v := &formView{Crumb: option{"/admin/webhooks/" + w.ID, w.Name}, Intro: "rotate-webhook",
		Form: &pageForm{Submit: "Rotate secret", Cancel: "/admin/webhooks/" + w.ID, Creates: "secret",
			Fields: formFields(ui.ops.fields.rotate, "overlap_minutes")}}
	var in rotateInput
	return ui.submit(r, "Rotate the secret of "+w.Name, v, url.Values{"overlap_minutes": {"60"}},
		fieldTargets(&in, ui.ops.fields.rotate), func() (*pageResponse, error) {
			row, value, err := ui.ops.rotateWebhook(r.ctx, r.origin, w.ID, r.ifMatchVersion, in)
			return showPage("webhook-once", "Secret rotated", newWebhookSecretView(&row, value)), err
		})
}

func (ui *adminUI) deleteWebhookPage(r *pageRequest) (*pageResponse, error) {
	w, err := ui.ops.getWebhook(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	v := &confirmView{Ask: "delete-webhook", Form: &pageForm{Submit: "Delete webhook",
		Cancel: "/admin/webhooks/" + w.ID}}
	return r.confirm("Delete the webhook "+w.Name+"?", v, redirectTo("/admin/webhooks", "webhook-deleted"),
		func() error { return ui.store.deleteWebhook(r.ctx, r.origin, w.ID, r.ifMatchVersion) })
}

func (ui *adminUI) testWebhookPage(r *pageRequest) (*pageResponse, error) {
	d, err := ui.ops.testWebhook(r.ctx, r.origin, r.pathValue("id"))
	done := "webhook-tested"
	if d.state != deliveryDelivered {
		done = "webhook-test-failed"
	}
	return redirectTo("/admin/webhooks/"+url.PathEscape(r.pathValue("id")), done), err
}

func (ui *adminUI) redeliverPage(r *pageRequest) (*pageResponse, error) {
	_, err := ui.ops.redeliver(r.ctx, r.origin, r.pathValue("id"), r.pathValue("delivery"))
	return redirectTo("/admin/webhooks/"+url.PathEscape(r.pathValue("id")), "redelivered"), err
}
