// The pages of /admin about the program as a whole: prices, the calls that run,
// the audit trail, and how the program is set up.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"time"
)

// A pricesView is the operator's own prices, and the price of a model that was
// asked for.
type pricesView struct {
	Prices          []priceView
	Model, Provider string
	Providers       []formOption
	Asked           bool
	Found           *priceView
}

func (ui *adminUI) pricesPage(r *pageRequest) (*pageResponse, error) {
	v := pricesView{Model: strings.TrimSpace(r.query.Get("model")), Provider: r.query.Get("provider"),
		Providers: append([]formOption{{"", "Any"}}, providerField().Options...)}
	rows, err := ui.store.listPrices(r.ctx)
	if err != nil {
		return nil, err
	}
	for i := range rows {
		v.Prices = append(v.Prices, newPriceView(&rows[i]))
	}
	if v.Asked = v.Model != ""; v.Asked {
		if p, ok := ui.ops.effectivePrice(v.Provider, v.Model); ok {
			v.Found = new(newPriceView(&p))
		}
	}
	return &pageResponse{template: "prices", title: "Prices", data: v}, nil
}

// newPrice sets a price, in place of one for the same models.
func (ui *adminUI) newPrice(r *pageRequest) (*pageResponse, error) {
	kind := func(name, label, help string) *formField {
		return &formField{Name: name, Label: label, Kind: "number", Short: true, Help: help}
	}
	v := &formView{Crumb: &formOption{"/admin/prices", "Prices"}, Intro: "In dollars per million tokens. It stands over the list price, from the next call on; calls that are on record keep their cost.",
		Form: &pageForm{Action: "/admin/prices/new", Submit: "Set the price", Cancel: "/admin/prices", Fields: []*formField{
			{Name: "match", Label: "Model", Kind: "text", Required: true, Placeholder: "gpt-4o-mini or my-model-*", Help: "A model's name, or a pattern in which * stands for anything."},
			kind("input", "Input", ""), kind("output", "Output", ""),
			kind("cached_input", "Cached input", "Empty: as input."), kind("cache_write", "Writing the cache", "Empty: as input."),
			kind("audio_input", "Audio input", "Empty: as input."), kind("audio_output", "Audio output", "Empty: as output."),
		}}}
	v.Form.fill(r.form, url.Values{"match": {r.query.Get("match")}})
	p := &pageResponse{template: "form", title: "Set a price", data: v}
	if !r.isPost() {
		return p, nil
	}
	in := map[string]any{"match": strings.TrimSpace(r.form.Get("match"))}
	for _, name := range []string{"input", "cached_input", "cache_write", "output", "audio_input", "audio_output"} {
		if text := strings.TrimSpace(r.form.Get(name)); text != "" {
			in[name] = jsonNumber(text)
		}
	}
	var typed priceInput
	err := typed.decode(r.withJSON(in).body)
	if err == nil {
		_, err = ui.ops.setPrice(r.ctx, r.origin, typed)
	}
	if err != nil {
		p.status, err = v.showError(err)
		return p, err
	}
	return redirectTo("/admin/prices", "saved"), nil
}

// removePrice takes one of the operator's prices away.
func (ui *adminUI) removePrice(r *pageRequest) (*pageResponse, error) {
	if !r.isPost() {
		return r.confirmPage("Remove this price?", "From the next call on the list price holds again, if there is one. Without a price a call has no cost, and is counted as unpriced.",
			"Remove the price", "/admin/prices"), nil
	}
	if err := ui.ops.deletePrice(r.ctx, r.origin, r.pathValue("id")); err != nil {
		return nil, err
	}
	return redirectTo("/admin/prices", "deleted"), nil
}

// A streamsView is the calls that run.
type streamsView struct {
	Calls []streamView
	Next  string
	Now   timestamp
}

func (ui *adminUI) streamsPage(r *pageRequest) (*pageResponse, error) {
	f, err := r.withQuery("limit", "200", "after", r.query.Get("after"), "project_id", r.query.Get("project_id"), "token_id", r.query.Get("token_id")).parseStreamFilter()
	if err != nil {
		return nil, err
	}
	l := ui.ops.listStreams(f, r.now)
	return &pageResponse{template: "streams", title: "Running calls", data: streamsView{l.Data, r.nextPageURL(l.Next), timestamp(r.now.UnixMilli())}}, nil
}

// cutStreamPage ends a running call.
func (ui *adminUI) cutStreamPage(r *pageRequest) (*pageResponse, error) {
	if !r.isPost() {
		if ui.running.find(parseRequestID(r.pathValue("id"))) == nil {
			return nil, errNotFound
		}
		return r.confirmPage("Cut this call?", "Its client sees the answer break off. What it has used so far is counted.", "Cut the call", "/admin/streams", r.pathValue("id")), nil
	}
	if err := ui.ops.abortStream(r.ctx, r.origin, r.pathValue("id")); err != nil {
		return nil, err
	}
	return redirectTo("/admin/streams", "cut"), nil
}

// An auditLine is an entry of the audit trail for people.
type auditLine struct {
	auditView
	Link    string // to what it was done to; "" if that has no page
	Changes []labeledValue
}

type auditPageView struct {
	Entries               []auditLine
	Actor, Action, Object string
	From, To              string
	Next                  string
	Narrowed              bool
}

func (ui *adminUI) auditPage(r *pageRequest) (*pageResponse, error) {
	v := auditPageView{Actor: strings.TrimSpace(r.query.Get("actor")), Action: strings.TrimSpace(r.query.Get("action")), Object: strings.TrimSpace(r.query.Get("object")),
		From: r.query.Get("from"), To: r.query.Get("to")}
	f, err := r.withQuery("limit", "100", "after", r.query.Get("after"), "actor", v.Actor, "action", v.Action, "object", v.Object, "from", formTimeToRFC3339(v.From), "to", formTimeToRFC3339(v.To)).parseAuditFilter()
	if err != nil {
		return nil, err
	}
	l, err := ui.ops.listAudit(r.ctx, f)
	if err != nil {
		return nil, err
	}
	v.Next = r.nextPageURL(l.Next)
	v.Narrowed = v.Actor+v.Action+v.Object+v.From+v.To != ""
	for _, e := range l.Data {
		v.Entries = append(v.Entries, auditLine{e, linkTo(e.Object), auditChanges(e.Detail)})
	}
	return &pageResponse{template: "audit", title: "Audit trail", data: v}, nil
}

// linkTo returns the page about the thing with an id, "" if it has none.
func linkTo(id string) string {
	for prefix, path := range map[string]string{"proj_": "/admin/projects/", "tok_": "/admin/tokens/", "req_": "/admin/requests/"} {
		if strings.HasPrefix(id, prefix) {
			return path + url.PathEscape(id)
		}
	}
	return ""
}

// auditChanges puts an entry's detail into words, in its own order: a pair is what
// was before and after.
func auditChanges(detail json.RawMessage) (out []labeledValue) {
	dec := json.NewDecoder(bytes.NewReader(detail))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil
	}
	for dec.More() {
		name, err := dec.Token()
		var raw json.RawMessage
		if err != nil || dec.Decode(&raw) != nil {
			return out
		}
		var pair []json.RawMessage
		text := displayJSON(raw)
		if json.Unmarshal(raw, &pair) == nil && len(pair) == 2 {
			if text = displayJSON(pair[1]); string(pair[0]) != "null" {
				text = displayJSON(pair[0]) + " → " + text
			} else if slices.Contains([]string{"", "–", "{}", "[]"}, text) { // new, and nothing is said
				continue
			}
		}
		label, _ := name.(string)
		out = append(out, labeledValue{label, text})
	}
	return out
}

// displayJSON is a value for people: a string without its quotes.
func displayJSON(raw json.RawMessage) string {
	var text string
	if json.Unmarshal(raw, &text) == nil && len(raw) > 0 && raw[0] == '"' {
		return text
	}
	if string(raw) == "null" {
		return "–"
	}
	return string(raw)
}

// An auditCheckView is what going through the whole trail found.
type auditCheckView struct {
	Head     string
	Entries  int64
	Problems []string
	More     int
}

// auditCheckTime bounds how long going through the trail may take here. The
// command takes as long as it needs.
const auditCheckTime = 40 * time.Second

// auditCheckPage goes through the whole audit trail.
func (ui *adminUI) auditCheckPage(r *pageRequest) (*pageResponse, error) {
	ctx, cancel := context.WithTimeout(r.ctx, auditCheckTime)
	defer cancel()
	k, err := ui.store.verifyAudit(ctx, ui.store.chain, nil)
	if ctx.Err() != nil && r.ctx.Err() == nil {
		return nil, errAuditTooLong
	}
	if err != nil {
		return nil, err
	}
	return &pageResponse{template: "audit-check", title: "Check of the audit trail", data: auditCheckView{Head: k.lastHead.String(), Entries: k.lastHead.seq, Problems: k.problems, More: k.omittedProblems}}, nil
}

// A settingsView is how the program is set up and how it is.
type settingsView struct {
	Settings        []effectiveSetting
	Version         string
	Started         timestamp
	DiskKnown       bool
	File, Log, Free int64
	Left            int64
	DatabaseFile    string
	KeyID           string
	LedgerOK        bool
	Calls           int
	Schema          int
}

func (ui *adminUI) settingsPage(r *pageRequest) (*pageResponse, error) {
	v := settingsView{Version: versionText(), Started: timestamp(ui.started.UnixMilli()), DatabaseFile: ui.cfg.databaseFile, KeyID: ui.keyID,
		LedgerOK: ui.ledger.healthy(), Calls: len(ui.running.admittedCalls(r.now))}
	var err error
	if v.Schema, _, err = ui.store.schemaVersion(r.ctx); err != nil {
		return nil, err
	}
	if use, err := ui.diskUse(r.ctx); err == nil {
		v.DiskKnown, v.File, v.Log, v.Free, v.Left = true, use.databaseSize, use.walSize, use.reusable, use.available
	}
	v.Settings = ui.cfg.settings
	return &pageResponse{template: "settings", title: "Settings", data: v}, nil
}

// A keyListItem is a management key in the list.
type keyListItem struct {
	keyView
	State stateView
	Own   bool // whoever looks is signed in with it
}

type keysView struct {
	Keys        []keyListItem
	Next        string
	Environment bool // MANAGEMENT_TOKEN is set
}

func (ui *adminUI) keysPage(r *pageRequest) (*pageResponse, error) {
	query, err := r.withQuery("limit", "100", "after", r.query.Get("after")).parseListQuery()
	if err != nil {
		return nil, err
	}
	l, err := ui.ops.listManagementKeys(r.ctx, query, r.now)
	if err != nil {
		return nil, err
	}
	v := keysView{Next: r.nextPageURL(l.Next), Environment: ui.cfg.managementToken != nil}
	for _, k := range l.Data {
		v.Keys = append(v.Keys, keyListItem{k, managementKeyState(&k, r.now), k.ID == r.actor.id})
	}
	return &pageResponse{template: "keys", title: "Management keys", data: v}, nil
}

func managementKeyState(k *keyView, now time.Time) stateView {
	switch {
	case k.RevokedAt != nil:
		return stateView{"bad", "revoked"}
	case !k.IsActive:
		return stateView{"bad", "expired"}
	case k.ExpiresAt != nil && int64(*k.ExpiresAt) <= now.Add(expiringSoon).UnixMilli():
		return stateView{"warn", "expires soon"}
	}
	return stateView{"good", "active"}
}

func keyFormFields() []*formField {
	return []*formField{
		{Name: "name", Label: "Name", Kind: "text", Required: true, Help: "Whose it is, or what uses it."},
		{Name: "role", Label: "Role", Kind: "select", Required: true, Options: []formOption{
			{string(roleViewer), "Viewer: sees everything but keys"}, {string(roleOperator), "Operator: also makes, changes and revokes tokens"},
			{string(roleAdmin), "Admin: does all"}}},
		{Name: "expires_at", Label: "Expires at (UTC)", Kind: "datetime-local", Short: true, Help: "Empty: it has no end."},
	}
}

// newKeyPage makes a management key, and shows it once.
func (ui *adminUI) newKeyPage(r *pageRequest) (*pageResponse, error) {
	v := &formView{Crumb: &formOption{"/admin/keys", "Management keys"}, Form: &pageForm{Action: "/admin/keys/new", Submit: "Make the key", Cancel: "/admin/keys",
		Once: randomBase62(16), Fields: keyFormFields()}}
	v.Form.fill(r.form, url.Values{"role": {string(roleViewer)}})
	p := &pageResponse{template: "form", title: "New management key", data: v}
	if !r.isPost() {
		return p, nil
	}
	in := map[string]any{"name": r.form.Get("name"), "role": r.form.Get("role")}
	if at := r.form.Get("expires_at"); at != "" {
		in["expires_at"] = formTimeToRFC3339(at)
	}
	if !ui.sentForms.claim(r.form.Get("once")) {
		return r.alreadySubmitted("/admin/keys", "key"), nil
	}
	var typed keyInput
	err := typed.decode(r.withJSON(in).body)
	var k managementKeyRow
	var value secret
	if err == nil {
		k, value, err = ui.ops.createManagementKey(r.ctx, r.origin, typed)
	}
	if err != nil {
		p.status, err = v.showError(err)
		return p, err
	}
	return &pageResponse{template: "key-once", title: "The management key is made", data: newKeyValueView(&k, value, r.now)}, nil
}

// editKey changes a management key.
func (ui *adminUI) editKey(r *pageRequest) (*pageResponse, error) {
	k, err := ui.ops.getManagementKey(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	v := &formView{Crumb: &formOption{"/admin/keys", "Management keys"}, Form: &pageForm{Action: "/admin/keys/" + k.ID + "/edit", Submit: "Save", Cancel: "/admin/keys",
		Version: k.Version, Fields: keyFormFields()}}
	stored := url.Values{"name": {k.Name}, "role": {string(k.Role)}}
	if k.ExpiresAt != nil {
		stored.Set("expires_at", k.ExpiresAt.datetimeLocal())
	}
	v.Form.fill(r.form, stored)
	p := &pageResponse{template: "form", title: "Edit " + k.Name, data: v}
	if !r.isPost() {
		return p, nil
	}
	v.Form.Version = r.ifMatchVersion
	in := map[string]any{"name": r.form.Get("name"), "role": r.form.Get("role")}
	if at := strings.TrimSpace(r.form.Get("expires_at")); at == "" {
		in["expires_at"] = nil
	} else if at != stored.Get("expires_at") { // else it stays as it is, to the millisecond
		in["expires_at"] = formTimeToRFC3339(at)
	}
	var typed keyInput
	if err = typed.decode(r.withJSON(in).body); err == nil {
		_, err = ui.ops.updateManagementKey(r.ctx, r.origin, k.ID, r.ifMatchVersion, typed)
	}
	if err != nil {
		p.status, err = v.showError(err)
		return p, err
	}
	return redirectTo("/admin/keys", "saved"), nil
}

// revokeKeyPage ends a management key, and with it its sessions.
func (ui *adminUI) revokeKeyPage(r *pageRequest) (*pageResponse, error) {
	k, err := ui.ops.getManagementKey(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	if !r.isPost() {
		return r.confirmPage("Revoke the key "+k.Name+"?", "It stops working at once, for good, and whoever is signed in with it is signed out.", "Revoke", "/admin/keys"), nil
	}
	if _, err := ui.ops.revokeManagementKey(r.ctx, r.origin, k.ID, r.ifMatchVersion); err != nil {
		return nil, err
	}
	return redirectTo("/admin/keys", "revoked"), nil
}
