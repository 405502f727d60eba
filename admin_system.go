// The pages of /admin about the program as a whole: prices, the calls that run,
// the audit trail, and how the program is set up.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
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
	Providers       []option
	Asked           bool
	Found           *priceView
}

func (ui *adminUI) pricesPage(r *pageRequest) (*page, error) {
	v := pricesView{Model: strings.TrimSpace(r.query.Get("model")), Provider: r.query.Get("provider"),
		Providers: append([]option{{"", "Any"}}, providerField().Options...)}
	rep, err := ui.api.listPrices(r.asking())
	if err != nil {
		return nil, err
	}
	v.Prices = rep.body.(list[priceView]).Data
	if v.Asked = v.Model != ""; v.Asked {
		if rep, err = ui.api.listPrices(r.asking("model", v.Model, "provider", v.Provider)); err != nil {
			return nil, err
		}
		if found := rep.body.(list[priceView]).Data; len(found) > 0 {
			v.Found = &found[0]
		}
	}
	return &page{template: "prices", title: "Prices", data: v}, nil
}

// newPrice sets a price, in place of one for the same models.
func (ui *adminUI) newPrice(r *pageRequest) (*page, error) {
	kind := func(name, label, help string) *field {
		return &field{Name: name, Label: label, Kind: "number", Short: true, Help: help}
	}
	v := &formView{Crumb: &option{"/admin/prices", "Prices"}, Intro: "In dollars per million tokens. It stands over the list price, from the next call on; calls that are on record keep their cost.",
		Form: &pageForm{Action: "/admin/prices/new", Submit: "Set the price", Cancel: "/admin/prices", Fields: []*field{
			{Name: "match", Label: "Model", Kind: "text", Required: true, Placeholder: "gpt-4o-mini or my-model-*", Help: "A model's name, or a pattern in which * stands for anything."},
			kind("input", "Input", ""), kind("output", "Output", ""),
			kind("cached_input", "Cached input", "Empty: as input."), kind("cache_write", "Writing the cache", "Empty: as input."),
			kind("audio_input", "Audio input", "Empty: as input."), kind("audio_output", "Audio output", "Empty: as output."),
		}}}
	v.Form.fill(r.form, url.Values{"match": {r.query.Get("match")}})
	p := &page{template: "form", title: "Set a price", data: v}
	if !r.posted() {
		return p, nil
	}
	in := map[string]any{"match": strings.TrimSpace(r.form.Get("match"))}
	for _, name := range []string{"input", "cached_input", "cache_write", "output", "audio_input", "audio_output"} {
		if text := strings.TrimSpace(r.form.Get(name)); text != "" {
			in[name] = jsonNumber(text)
		}
	}
	if _, err := ui.api.setPrice(r.with(in)); err != nil {
		p.status, err = v.refused(err)
		return p, err
	}
	return goTo("/admin/prices", "saved"), nil
}

// removePrice takes one of the operator's prices away.
func (ui *adminUI) removePrice(r *pageRequest) (*page, error) {
	if !r.posted() {
		return r.confirm("Remove this price?", "From the next call on the list price holds again, if there is one. Without a price a call has no cost, and is counted as unpriced.",
			"Remove the price", "/admin/prices"), nil
	}
	if _, err := ui.api.deletePrice(r.with(nil)); err != nil {
		return nil, err
	}
	return goTo("/admin/prices", "deleted"), nil
}

// A streamsView is the calls that run.
type streamsView struct {
	Calls []streamView
	Next  string
	Now   stamp
}

func (ui *adminUI) streamsPage(r *pageRequest) (*page, error) {
	rep, err := ui.api.listStreams(r.asking("limit", "200", "after", r.query.Get("after"), "project_id", r.query.Get("project_id"), "token_id", r.query.Get("token_id")))
	if err != nil {
		return nil, err
	}
	l := rep.body.(list[streamView])
	return &page{template: "streams", title: "Running calls", data: streamsView{l.Data, r.nextPage(l.Next), stamp(r.now.UnixMilli())}}, nil
}

// cutPage ends a running call.
func (ui *adminUI) cutPage(r *pageRequest) (*page, error) {
	if !r.posted() {
		if ui.running.find(parseRequestID(r.path("id"))) == nil {
			return nil, errNotFound
		}
		return r.confirm("Cut this call?", "Its client sees the answer break off. What it has used so far is counted.", "Cut the call", "/admin/streams", r.path("id")), nil
	}
	if _, err := ui.api.cutStream(r.with(nil)); err != nil {
		return nil, err
	}
	return goTo("/admin/streams", "cut"), nil
}

// An auditLine is an entry of the audit trail for people.
type auditLine struct {
	auditView
	Link    string // to what it was done to; "" if that has no page
	Changes []labelled
}

type auditPageView struct {
	Entries               []auditLine
	Actor, Action, Object string
	From, To              string
	Next                  string
	Narrowed              bool
}

func (ui *adminUI) auditPageOf(r *pageRequest) (*page, error) {
	v := auditPageView{Actor: strings.TrimSpace(r.query.Get("actor")), Action: strings.TrimSpace(r.query.Get("action")), Object: strings.TrimSpace(r.query.Get("object")),
		From: r.query.Get("from"), To: r.query.Get("to")}
	rep, err := ui.api.listAudit(r.asking("limit", "100", "after", r.query.Get("after"), "actor", v.Actor, "action", v.Action, "object", v.Object, "from", timeOf(v.From), "to", timeOf(v.To)))
	if err != nil {
		return nil, err
	}
	l := rep.body.(list[auditView])
	v.Next = r.nextPage(l.Next)
	v.Narrowed = v.Actor+v.Action+v.Object+v.From+v.To != ""
	for _, e := range l.Data {
		v.Entries = append(v.Entries, auditLine{e, linkTo(e.Object), changesIn(e.Detail)})
	}
	return &page{template: "audit", title: "Audit trail", data: v}, nil
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

// changesIn puts an entry's detail into words, in its own order: a pair is what
// was before and after.
func changesIn(detail json.RawMessage) (out []labelled) {
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
		text := plainJSON(raw)
		if json.Unmarshal(raw, &pair) == nil && len(pair) == 2 {
			if text = plainJSON(pair[1]); string(pair[0]) != "null" {
				text = plainJSON(pair[0]) + " → " + text
			} else if slices.Contains([]string{"", "–", "{}", "[]"}, text) { // new, and nothing is said
				continue
			}
		}
		label, _ := name.(string)
		out = append(out, labelled{label, text})
	}
	return out
}

// plainJSON is a value for people: a string without its quotes.
func plainJSON(raw json.RawMessage) string {
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

// verifyAudit goes through the whole audit trail.
func (ui *adminUI) verifyAudit(r *pageRequest) (*page, error) {
	ctx, cancel := context.WithTimeout(r.ctx, auditCheckTime)
	defer cancel()
	k, err := ui.store.checkAudit(ctx, ui.store.chain, nil)
	if ctx.Err() != nil && r.ctx.Err() == nil {
		return nil, &apiError{status: http.StatusServiceUnavailable, code: "too_long", msg: "The trail is too long to be checked here. Use llm-proxy audit verify."}
	}
	if err != nil {
		return nil, err
	}
	return &page{template: "audit-check", title: "Check of the audit trail", data: auditCheckView{Head: k.last.String(), Entries: k.last.seq, Problems: k.problems, More: k.more}}, nil
}

// A settingsView is how the program is set up and how it is.
type settingsView struct {
	Settings        []settingLine
	Version         string
	Started         stamp
	DiskKnown       bool
	File, Log, Free int64
	Left            int64
	DatabaseFile    string
	KeyID           string
	LedgerOK        bool
	Calls           int
	Schema          int
}

func (ui *adminUI) settingsPage(r *pageRequest) (*page, error) {
	v := settingsView{Version: versionText(), Started: stamp(ui.started.UnixMilli()), DatabaseFile: ui.cfg.databaseFile, KeyID: ui.keyID,
		LedgerOK: ui.ledger.healthy(), Calls: len(ui.running.admittedCalls(r.now))}
	var err error
	if v.Schema, _, err = ui.store.schemaVersion(r.ctx); err != nil {
		return nil, err
	}
	if use, err := ui.diskUse(r.ctx); err == nil {
		v.DiskKnown, v.File, v.Log, v.Free, v.Left = true, use.file, use.log, use.free, use.left
	}
	v.Settings = ui.cfg.lines
	return &page{template: "settings", title: "Settings", data: v}, nil
}

// A keyLine is a management key in the list.
type keyLine struct {
	keyView
	State stateView
	Own   bool // whoever looks is signed in with it
}

type keysView struct {
	Keys        []keyLine
	Next        string
	Environment bool // MANAGEMENT_TOKEN is set
}

func (ui *adminUI) keysPage(r *pageRequest) (*page, error) {
	rep, err := ui.api.listKeys(r.asking("limit", "100", "after", r.query.Get("after")))
	if err != nil {
		return nil, err
	}
	l := rep.body.(list[keyView])
	v := keysView{Next: r.nextPage(l.Next), Environment: ui.cfg.managementToken != nil}
	for _, k := range l.Data {
		v.Keys = append(v.Keys, keyLine{k, stateOfKey(&k, r.now), k.ID == r.actor.id})
	}
	return &page{template: "keys", title: "Management keys", data: v}, nil
}

func stateOfKey(k *keyView, now time.Time) stateView {
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

func keyFields() []*field {
	return []*field{
		{Name: "name", Label: "Name", Kind: "text", Required: true, Help: "Whose it is, or what uses it."},
		{Name: "role", Label: "Role", Kind: "select", Required: true, Options: []option{
			{string(roleViewer), "Viewer: sees everything but keys"}, {string(roleOperator), "Operator: also makes, changes and revokes tokens"},
			{string(roleAdmin), "Admin: does all"}}},
		{Name: "expires_at", Label: "Expires at (UTC)", Kind: "datetime-local", Short: true, Help: "Empty: it has no end."},
	}
}

// newKeyPage makes a management key, and shows it once.
func (ui *adminUI) newKeyPage(r *pageRequest) (*page, error) {
	v := &formView{Crumb: &option{"/admin/keys", "Management keys"}, Form: &pageForm{Action: "/admin/keys/new", Submit: "Make the key", Cancel: "/admin/keys",
		Once: randomBase62(16), Fields: keyFields()}}
	v.Form.fill(r.form, url.Values{"role": {string(roleViewer)}})
	p := &page{template: "form", title: "New management key", data: v}
	if !r.posted() {
		return p, nil
	}
	in := map[string]any{"name": r.form.Get("name"), "role": r.form.Get("role")}
	if at := r.form.Get("expires_at"); at != "" {
		in["expires_at"] = timeOf(at)
	}
	if !ui.sent.first(r.form.Get("once")) {
		return r.sentBefore("/admin/keys", "key"), nil
	}
	rep, err := ui.api.createKey(r.with(in))
	if err != nil {
		p.status, err = v.refused(err)
		return p, err
	}
	return &page{template: "key-once", title: "The management key is made", data: rep.body.(keyView)}, nil
}

// editKey changes a management key.
func (ui *adminUI) editKey(r *pageRequest) (*page, error) {
	rep, err := ui.api.getKey(r.asking())
	if err != nil {
		return nil, err
	}
	k := rep.body.(keyView)
	v := &formView{Crumb: &option{"/admin/keys", "Management keys"}, Form: &pageForm{Action: "/admin/keys/" + k.ID + "/edit", Submit: "Save", Cancel: "/admin/keys",
		Version: k.Version, Fields: keyFields()}}
	stored := url.Values{"name": {k.Name}, "role": {string(k.Role)}}
	if k.ExpiresAt != nil {
		stored.Set("expires_at", k.ExpiresAt.field())
	}
	v.Form.fill(r.form, stored)
	p := &page{template: "form", title: "Edit " + k.Name, data: v}
	if !r.posted() {
		return p, nil
	}
	v.Form.Version = r.match
	in := map[string]any{"name": r.form.Get("name"), "role": r.form.Get("role")}
	if at := strings.TrimSpace(r.form.Get("expires_at")); at == "" {
		in["expires_at"] = nil
	} else if at != stored.Get("expires_at") { // else it stays as it is, to the millisecond
		in["expires_at"] = timeOf(at)
	}
	if _, err := ui.api.patchKey(r.with(in)); err != nil {
		p.status, err = v.refused(err)
		return p, err
	}
	return goTo("/admin/keys", "saved"), nil
}

// revokeKeyPage ends a management key, and with it its sessions.
func (ui *adminUI) revokeKeyPage(r *pageRequest) (*page, error) {
	rep, err := ui.api.getKey(r.asking())
	if err != nil {
		return nil, err
	}
	k := rep.body.(keyView)
	if !r.posted() {
		return r.confirm("Revoke the key "+k.Name+"?", "It stops working at once, for good, and whoever is signed in with it is signed out.", "Revoke", "/admin/keys"), nil
	}
	if _, err := ui.api.revokeKey(r.with(nil)); err != nil {
		return nil, err
	}
	return goTo("/admin/keys", "revoked"), nil
}
