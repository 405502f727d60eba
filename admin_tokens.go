// The pages of /admin about single tokens. The value of one is on one page only:
// the answer to the form that made it.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// projectName is what a project is called, deleted ones included.
func (ui *adminUI) projectName(r *pageRequest, id string) (string, error) {
	p, err := ui.store.projectByID(r.ctx, id)
	if errors.Is(err, errNotFound) {
		return "(deleted project)", nil
	}
	return p.name, err
}

// lifetimeOptions are the lives that a new token may be given, in hours; "" is a time
// of its own, and 0 none at all.
func lifetimeOptions() []formOption {
	return []formOption{{"1", "1 hour"}, {"8", "8 hours"}, {"24", "1 day"}, {"168", "7 days"}, {"720", "30 days"}, {"2160", "90 days"}, {"8760", "1 year"},
		{"0", "no end"}, {"", "until the time below"}}
}

const idleHelp = "It stops working when it was not used for so long. Empty: it does not."

// newTokenPage makes a token, and shows it once.
func (ui *adminUI) newTokenPage(r *pageRequest) (*pageResponse, error) {
	projects, err := ui.projectOptions(r, r.query.Get("project_id")+r.form.Get("project_id"))
	if err != nil {
		return nil, err
	}
	if len(projects) == 0 {
		return &pageResponse{template: "no-project", title: "New token"}, nil
	}
	v := &formView{Crumb: &formOption{"/admin/tokens", "Tokens"}, Policy: newPolicyForm(false), Form: &pageForm{
		Action: "/admin/tokens/new", Submit: "Make the token", Cancel: "/admin/tokens", Once: randomBase62(16), Fields: []*formField{
			{Name: "project_id", Label: "Project", Kind: "select", Required: true, Options: projects},
			{Name: "name", Label: "Name", Kind: "text", Required: true, Help: "Who or what will use it. One token for each program makes it easy to revoke one of them."},
			{Name: "lifetime", Label: "Works for", Kind: "select", Required: true, Short: true, Options: lifetimeOptions()},
			{Name: "expires_at", Label: "Expires at (UTC)", Kind: "datetime-local", Short: true, Help: "Only for “until the time below”."},
			{Name: "max_requests", Label: "Requests in all", Kind: "number", Short: true, Help: "After so many calls it stops working. Empty: no such limit."},
			{Name: "idle_expiry_minutes", Label: "Ends after disuse, in minutes", Kind: "number", Short: true, Help: idleHelp},
		}}}
	v.Form.fill(r.form, url.Values{"project_id": {r.query.Get("project_id")}, "lifetime": {"720"}})
	v.Policy.fill(r.form, json.RawMessage("{}"))
	p := &pageResponse{template: "form", title: "New token", data: v}
	if !r.isPost() {
		return p, nil
	}
	in := parseTokenForm(r.form)
	in["project_id"], in["policy"] = r.form.Get("project_id"), v.Policy.parsePolicy(r.form, nil)
	switch hours, err := strconv.ParseInt(r.form.Get("lifetime"), 10, 64); {
	case r.form.Get("lifetime") == "":
		in["expires_at"] = formTimeToRFC3339(r.form.Get("expires_at"))
	case err != nil:
		in["duration_hours"] = r.form.Get("lifetime")
	case hours == 0:
		in["expires_at"] = nil
	default:
		in["duration_hours"] = hours
	}
	if !ui.sentForms.claim(r.form.Get("once")) {
		return r.alreadySubmitted("/admin/tokens", "token"), nil
	}
	var typed tokenInput
	err = typed.decode(r.withJSON(in).body, true)
	var t tokenRow
	var value secret
	if err == nil {
		t, value, err = ui.ops.createToken(r.ctx, r.origin, typed)
	}
	if err != nil {
		p.status, err = v.showError(err)
		return p, err
	}
	return ui.tokenValuePage(r, "The token is made", ui.ops.newTokenValueView(&t, value, r.now), nil)
}

// parseTokenForm reads the fields that a new token and a changed one have in common.
func parseTokenForm(form url.Values) map[string]any {
	in := map[string]any{"name": form.Get("name")}
	setNumber(in, form, "max_requests", true)
	setNumber(in, form, "idle_expiry_minutes", true)
	return in
}

// formTimeToRFC3339 writes what a datetime-local field holds as RFC 3339. What is no time
// goes on as it is, for the rules to refuse.
func formTimeToRFC3339(text string) string {
	switch len(text) {
	case len("2006-01-02T15:04"):
		return text + ":00Z"
	case len("2006-01-02T15:04:05"):
		return text + "Z"
	}
	return text
}

// alreadySubmitted is the answer to a form that was carried out already.
func (r *pageRequest) alreadySubmitted(back, one string) *pageResponse {
	return &pageResponse{template: "sent", title: "Sent already", status: http.StatusConflict, data: labeledValue{Label: "The " + one +
		" was made when this form was first sent, and its value is not shown again. If nobody noted it, make another one and revoke that one.", Value: back}}
}

// A tokenValueView is the page that shows a token.
type tokenValueView struct {
	Title, ID, Name, Value, Base string
	Anthropic                    bool
	Model                        string
	Overlap                      *timestamp // until then the value before works too
	ExpiresAt                    *timestamp
}

// tokenValuePage is the page with a token's value and what to do with it.
func (ui *adminUI) tokenValuePage(r *pageRequest, title string, t tokenView, overlap *timestamp) (*pageResponse, error) {
	v := tokenValueView{Title: title, ID: t.ID, Name: t.Name, Value: t.Token, Base: ui.publicBase(r), Model: "gpt-4o-mini", Overlap: overlap, ExpiresAt: t.ExpiresAt}
	p, err := ui.store.projectByID(r.ctx, t.ProjectID)
	if err == nil {
		var ups []upstreamRow
		if ups, err = ui.store.projectUpstreams(r.ctx, p.seq); err == nil {
			v.Anthropic = len(ups) > 0 && !slices.ContainsFunc(ups, func(u upstreamRow) bool { return u.provider != providerAnthropic })
		}
	}
	if err != nil {
		return nil, err
	}
	if v.Anthropic {
		v.Model = "claude-haiku-4-5"
	}
	for _, policy := range []string{p.policy, string(t.Policy)} {
		if parsed, err := parsePolicy([]byte(policy), true); err == nil {
			if i := slices.IndexFunc(parsed.Models, isShellSafe); i >= 0 {
				v.Model = parsed.Models[i]
			}
		}
	}
	return &pageResponse{template: "token-once", title: title, data: v}, nil
}

// isShellSafe reports whether a model's name can be pasted into a shell and into
// source code as it is.
func isShellSafe(model string) bool {
	return !strings.ContainsFunc(model, func(c rune) bool {
		return !strings.ContainsRune(base62+"-_.:/", c)
	})
}

// publicBase is where clients reach the proxy, as far as it knows.
func (ui *adminUI) publicBase(r *pageRequest) string {
	switch {
	case ui.cfg.publicURL != nil:
		return ui.cfg.publicURL.Scheme + "://" + ui.cfg.publicURL.Host
	case r.secure:
		return "https://" + r.http.Host
	}
	return "http://" + r.http.Host
}

// A tokenPageView is the page of one token.
type tokenPageView struct {
	tokenView
	ProjectName string
	State       stateView
	Limits      []barView
	Allowed     []labeledValue
	Requests    *barView // use of max_requests; nil: no such limit
	Calls       []requestReply
	BadReason   string
}

func (ui *adminUI) tokenPage(r *pageRequest) (*pageResponse, error) {
	t, err := ui.ops.getToken(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	v := tokenPageView{tokenView: t, State: newTokenStateView(&t, r.now), Limits: newBarViews(t.Limits), Allowed: policySummary(t.Policy)}
	if v.ProjectName, err = ui.projectName(r, t.ProjectID); err != nil {
		return nil, err
	}
	if t.MaxRequests != nil {
		b := newBarView(t.RequestCount, *t.MaxRequests)
		b.Used, b.Max, b.Left = groupDigits(t.RequestCount), groupDigits(*t.MaxRequests), groupDigits(max(0, *t.MaxRequests-t.RequestCount))
		b.Label = fmt.Sprintf("%s of %s requests used", b.Used, b.Max)
		v.Requests = &b
	}
	calls, err := ui.ops.listRequests(r.ctx, requestFilter{token: t.ID, before: math.MaxInt64, limit: 10})
	if err != nil {
		return nil, err
	}
	v.Calls = calls.Data
	return &pageResponse{template: "token", title: t.Name, data: v}, nil
}

// editToken changes a token's name, life and policy.
func (ui *adminUI) editToken(r *pageRequest) (*pageResponse, error) {
	t, err := ui.ops.getToken(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	here := "/admin/tokens/" + t.ID
	v := &formView{Crumb: &formOption{here, t.Name}, Policy: newPolicyForm(false), Form: &pageForm{Action: here + "/edit", Submit: "Save", Cancel: here, Version: t.Version, Fields: []*formField{
		{Name: "name", Label: "Name", Kind: "text", Required: true},
		{Name: "expires_at", Label: "Expires at (UTC)", Kind: "datetime-local", Short: true, Help: "Empty: it has no end."},
		{Name: "max_requests", Label: "Requests in all", Kind: "number", Short: true, Help: "Those it has made count: " + groupDigits(t.RequestCount) + " so far. Empty: no such limit."},
		{Name: "idle_expiry_minutes", Label: "Ends after disuse, in minutes", Kind: "number", Short: true, Help: idleHelp},
	}}}
	stored := url.Values{"name": {t.Name}, "max_requests": {formatOptionalInt(t.MaxRequests)}, "idle_expiry_minutes": {formatOptionalInt(t.IdleExpiryMinutes)}}
	if t.ExpiresAt != nil {
		stored.Set("expires_at", t.ExpiresAt.datetimeLocal())
	}
	v.Form.fill(r.form, stored)
	v.Policy.fill(r.form, t.Policy)
	p := &pageResponse{template: "form", title: "Edit token", data: v}
	if !r.isPost() {
		return p, nil
	}
	v.Form.Version = r.ifMatchVersion
	in := parseTokenForm(r.form)
	in["policy"] = v.Policy.parsePolicy(r.form, t.Policy)
	if at := r.form.Get("expires_at"); at == "" {
		in["expires_at"] = nil
	} else if at != stored.Get("expires_at") { // else it stays as it is, to the millisecond, also in the past
		in["expires_at"] = formTimeToRFC3339(at)
	}
	var typed tokenInput
	if err = typed.decode(r.withJSON(in).body, false); err == nil {
		_, err = ui.ops.updateToken(r.ctx, r.origin, t.ID, r.ifMatchVersion, typed)
	}
	if err != nil {
		p.status, err = v.showError(err)
		return p, err
	}
	return redirectTo(here, "saved"), nil
}

func formatOptionalInt(n *int64) string {
	if n == nil {
		return ""
	}
	return strconv.FormatInt(*n, 10)
}

// rotateTokenPage gives a token a new value, and shows it once.
func (ui *adminUI) rotateTokenPage(r *pageRequest) (*pageResponse, error) {
	t, err := ui.ops.getToken(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	here := "/admin/tokens/" + t.ID
	v := &formView{Crumb: &formOption{here, t.Name}, Intro: "The token gets a new value; its id, its limits and what they count stay. The value it has now goes on working for a while, so that programs can change over.",
		Form: &pageForm{Action: here + "/rotate", Submit: "Rotate", Cancel: here, Once: randomBase62(16), Version: t.Version, Fields: []*formField{
			{Name: "overlap_minutes", Label: "The value of now works for", Kind: "select", Required: true, Short: true,
				Options: []formOption{{"0", "no longer: it leaked"}, {"60", "1 hour"}, {"1440", "1 day"}, {"10080", "7 days"}, {"43200", "30 days"}}}}}}
	v.Form.fill(r.form, url.Values{"overlap_minutes": {"60"}})
	p := &pageResponse{template: "form", title: "Rotate " + t.Name, data: v}
	if !r.isPost() {
		return p, nil
	}
	v.Form.Version = r.ifMatchVersion
	if !ui.sentForms.claim(r.form.Get("once")) {
		return r.alreadySubmitted(here, "new value"), nil
	}
	fields := map[string]any{}
	setNumber(fields, r.form, "overlap_minutes", false)
	var in rotateInput
	err = in.decode(r.withJSON(fields).body)
	var row tokenRow
	var value secret
	if err == nil {
		row, value, err = ui.ops.rotateToken(r.ctx, r.origin, t.ID, r.ifMatchVersion, in)
	}
	if err != nil {
		p.status, err = v.showError(err)
		return p, err
	}
	t = ui.ops.newTokenValueView(&row, value, r.now)
	return ui.tokenValuePage(r, "The token has a new value", t, t.OverlapUntil)
}

// revokeTokenPage ends a token.
func (ui *adminUI) revokeTokenPage(r *pageRequest) (*pageResponse, error) {
	t, err := ui.ops.getToken(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	here := "/admin/tokens/" + t.ID
	if !r.isPost() {
		return r.confirmPage("Revoke "+t.Name+"?", "It stops working at once, for good, and its running calls are cut. Its calls stay in the ledger.", "Revoke", here), nil
	}
	if _, err := ui.ops.revokeToken(r.ctx, r.origin, t.ID, r.ifMatchVersion); err != nil {
		return nil, err
	}
	return redirectTo(here, "revoked"), nil
}

// revokeSelected revokes the tokens that were chosen in a list, after asking.
func (ui *adminUI) revokeSelected(r *pageRequest) (*pageResponse, error) {
	ids := slices.Compact(slices.Sorted(slices.Values(r.form["id"])))
	if len(ids) == 0 {
		return &pageResponse{redirect: "/admin/tokens?done=none-chosen"}, nil
	}
	if len(ids) > 500 {
		return nil, badRequest("invalid_value", "id", "At most 500 tokens can be revoked at once.")
	}
	f := &pageForm{Action: "/admin/tokens/revoke", Submit: "Revoke " + pluralize(int64(len(ids)), "token", "tokens"), Cancel: "/admin/tokens", Danger: true,
		Hidden: []formOption{{"yes", "sure"}}}
	var names []string
	for _, id := range ids {
		t, err := ui.store.tokenByID(r.ctx, id)
		if err != nil {
			return nil, err
		}
		names = append(names, t.name+" ("+id+")")
		f.Hidden = append(f.Hidden, formOption{id, "id"})
	}
	if r.form.Get("sure") != "yes" {
		return &pageResponse{template: "confirm", title: "Revoke these tokens?", data: confirmView{"They stop working at once, for good, and their running calls are cut:", names, f}}, nil
	}
	for _, id := range ids {
		if _, err := ui.ops.revokeToken(r.ctx, r.origin, id, 0); err != nil {
			return nil, fmt.Errorf("revoking %s: %w", id, err)
		}
	}
	return redirectTo("/admin/tokens", "revoked"), nil
}

const (
	tokensPerPage     = 50
	maxTokensScanned  = 5000 // so many at most are looked at for one page
	expiringSoon      = 7 * 24 * time.Hour
	maxProjectOptions = 2000 // in the choice of projects
)

// A tokenLine is a token in a list.
type tokenLine struct {
	tokenView
	ProjectName string
	State       stateView
}

// A stateView is a word on how something is, and its colour.
type stateView struct{ Kind, Text string }

// newTokenStateView says what a token is worth now.
func newTokenStateView(t *tokenView, now time.Time) stateView {
	switch {
	case t.RevokedAt != nil:
		return stateView{"bad", "revoked"}
	case t.ExpiresAt != nil && int64(*t.ExpiresAt) <= now.UnixMilli():
		return stateView{"bad", "expired"}
	case !t.IsActive:
		return stateView{"bad", "idle too long"}
	case t.MaxRequests != nil && t.RequestCount >= *t.MaxRequests:
		return stateView{"warn", "used up"}
	case t.ExpiresAt != nil && int64(*t.ExpiresAt) <= now.Add(expiringSoon).UnixMilli():
		return stateView{"warn", "expires soon"}
	}
	return stateView{"good", "active"}
}

// A tokensView is the list of tokens.
type tokensView struct {
	Tokens               []tokenLine
	Project, Name        string // what the list is narrowed by
	State, Order         string
	Projects             []formOption
	States, Orders       []formOption
	Next                 string
	First, Sifted, Above bool // no token at all; not all were looked at; it is not the first page
	Problem              string
}

func tokenStates() []formOption {
	return []formOption{{"", "All"}, {"active", "Active"}, {"expiring", "Expiring within 7 days"}, {"expired", "Expired"}, {"revoked", "Revoked"}, {"unused", "Never used"}}
}

func tokenOrders() []formOption {
	return []formOption{{"", "Newest first"}, {"oldest", "Oldest first"}, {"name", "Name"}, {"ends", "Expiry, soonest first; no revoked ones"}}
}

func (ui *adminUI) tokensPage(r *pageRequest) (*pageResponse, error) {
	v := &tokensView{Project: r.query.Get("project_id"), Name: strings.TrimSpace(r.query.Get("name")), State: r.query.Get("state"), Order: r.query.Get("order"),
		States: tokenStates(), Orders: tokenOrders(), Above: r.query.Get("after") != ""}
	if strings.HasPrefix(v.Name, "tok_") {
		if t, err := ui.store.tokenByID(r.ctx, v.Name); err == nil {
			return &pageResponse{redirect: "/admin/tokens/" + t.id}, nil
		}
	}
	p := &pageResponse{template: "tokens", title: "Tokens", data: v}
	projects, err := ui.projectOptions(r, v.Project)
	if err != nil {
		return nil, err
	}
	v.Projects = append([]formOption{{"", "All"}}, projects...)
	w, err := v.listQuery(r)
	if err != nil {
		return nil, err
	}
	if v.Project != "" {
		if _, err := ui.store.projectByID(r.ctx, v.Project); err != nil {
			return nil, err
		}
	}
	last, looked := "", 0
	more, err := ui.store.walkTokens(r.ctx, w, func(t *tokenRow) bool {
		if len(v.Tokens) == tokensPerPage {
			return false
		}
		looked++
		last = w.cursorAfter(t)
		line := tokenLine{tokenView: ui.ops.newTokenView(t, r.now)}
		line.State = newTokenStateView(&line.tokenView, r.now)
		if v.matches(&line, r.now) {
			v.Tokens = append(v.Tokens, line)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	if more {
		v.Next = r.nextPageURL(last)
		v.Sifted = len(v.Tokens) < tokensPerPage
	}
	v.First = looked == 0 && !v.Above && v.Project == "" && v.Name == "" && v.State == ""
	return p, ui.nameProjects(r, v.Tokens)
}

// listQuery works out along which index the list goes. An order that the filters do
// not allow gives way to theirs.
func (v *tokensView) listQuery(r *pageRequest) (tokenListQuery, error) {
	for _, c := range []struct {
		name, value string
		known       []formOption
	}{{"state", v.State, v.States}, {"order", v.Order, v.Orders}} {
		if !slices.ContainsFunc(c.known, func(o formOption) bool { return o.Value == c.value }) {
			return tokenListQuery{}, badRequest("invalid_value", c.name, "There is no such "+c.name+".")
		}
	}
	if len(v.Name) > 100 {
		return tokenListQuery{}, badRequest("invalid_value", "name", "A name has 100 bytes at most.")
	}
	now := r.now.UnixMilli()
	w := tokenListQuery{order: cmp.Or(v.Order, "newest"), project: v.Project, prefix: v.Name, to: neverExpires, limit: maxTokensScanned}
	if v.Name != "" {
		w.order = "name"
	}
	if w.order != "name" && v.Order != "oldest" {
		switch v.State {
		case "active":
			w.order, w.from = "ends", now
		case "expiring":
			w.order, w.from, w.to = "ends", now, now+expiringSoon.Milliseconds()
		case "expired":
			w.order, w.to = "ends", now
		case "revoked", "unused":
			if v.State == "revoked" {
				w.order, v.Order = "newest", "" // these expire no more
			}
			if v.Project == "" && v.Order == "" {
				w.order = v.State
			}
		}
	}
	if w.order == "ends" || w.order == "name" || w.order == "oldest" {
		v.Order = w.order
	}
	after := r.query.Get("after")
	if after == "" {
		return w, nil
	}
	var key string
	var err error
	if w.afterSeq, key, err = parseCursor(after); err == nil {
		switch w.order {
		case "name":
			w.afterName = key
		case "ends", "revoked":
			w.afterTime, err = strconv.ParseInt(key, 36, 64)
		}
	}
	if err != nil || w.afterSeq < 1 || w.afterTime < 0 {
		return w, badRequest("invalid_value", "after", "This is not the address of a page of the list.")
	}
	return w, nil
}

// cursorAfter says where the list goes on after a token.
func (w *tokenListQuery) cursorAfter(t *tokenRow) string {
	switch w.order {
	case "name":
		return formatCursor(t.seq, t.name)
	case "ends":
		ends := int64(neverExpires)
		if t.expiresAt != nil {
			ends = *t.expiresAt
		}
		return formatCursor(t.seq, strconv.FormatInt(ends, 36))
	case "revoked":
		return formatCursor(t.seq, strconv.FormatInt(deref(t.revokedAt), 36))
	}
	return formatCursor(t.seq, "")
}

// matches sifts out what the index did not.
func (v *tokensView) matches(t *tokenLine, now time.Time) bool {
	switch v.State {
	case "active":
		return t.IsActive
	case "expiring":
		return t.IsActive && t.ExpiresAt != nil && int64(*t.ExpiresAt) <= now.Add(expiringSoon).UnixMilli()
	case "expired":
		return t.RevokedAt == nil && !t.IsActive
	case "revoked":
		return t.RevokedAt != nil
	case "unused":
		return t.LastUsedAt == nil
	}
	return true
}

// projectOptions is the choice of projects, by name. The one that is chosen is
// among them even where there are too many.
func (ui *adminUI) projectOptions(r *pageRequest, chosen string) ([]formOption, error) {
	rows, err := ui.store.listProjects(r.ctx, 0, maxProjectOptions, nil, "")
	if err != nil {
		return nil, err
	}
	out := make([]formOption, 0, len(rows))
	found := chosen == ""
	for i := range rows {
		out = append(out, formOption{rows[i].id, rows[i].name})
		found = found || rows[i].id == chosen
	}
	if !found {
		if p, err := ui.store.projectByID(r.ctx, chosen); err == nil {
			out = append(out, formOption{p.id, p.name})
		}
	}
	slices.SortFunc(out, func(a, b formOption) int { return cmp.Compare(strings.ToLower(a.Label), strings.ToLower(b.Label)) })
	return out, nil
}

// nameProjects fills in the names of the projects of a page.
func (ui *adminUI) nameProjects(r *pageRequest, lines []tokenLine) error {
	names := map[string]string{}
	for i := range lines {
		id := lines[i].ProjectID
		if _, ok := names[id]; !ok {
			name, err := ui.projectName(r, id)
			if err != nil {
				return err
			}
			names[id] = name
		}
		lines[i].ProjectName = names[id]
	}
	return nil
}

// renderSnippet puts the token, the base URL and a model into a text.
func (v tokenValueView) renderSnippet(openai, anthropic string) string {
	text := openai
	if v.Anthropic {
		text = anthropic
	}
	return strings.NewReplacer("BASE", v.Base, "TOKEN", v.Value, "MODEL", v.Model).Replace(strings.TrimPrefix(text, "\n"))
}

func curlSnippet(v tokenValueView) string {
	return v.renderSnippet(`
curl BASE/v1/chat/completions \
  -H "Authorization: Bearer TOKEN" \
  -H "Content-Type: application/json" \
  -d '{"model":"MODEL","messages":[{"role":"user","content":"Hello"}]}'
`, `
curl BASE/v1/messages \
  -H "x-api-key: TOKEN" -H "anthropic-version: 2023-06-01" \
  -H "Content-Type: application/json" \
  -d '{"model":"MODEL","max_tokens":200,"messages":[{"role":"user","content":"Hello"}]}'
`)
}

func pythonSnippet(v tokenValueView) string {
	return v.renderSnippet(`
from openai import OpenAI

client = OpenAI(base_url="BASE/v1", api_key="TOKEN")
answer = client.chat.completions.create(
    model="MODEL", messages=[{"role": "user", "content": "Hello"}]
)
print(answer.choices[0].message.content)
`, `
from anthropic import Anthropic

client = Anthropic(base_url="BASE", api_key="TOKEN")
answer = client.messages.create(
    model="MODEL", max_tokens=200, messages=[{"role": "user", "content": "Hello"}]
)
print(answer.content[0].text)
`)
}

func nodeSnippet(v tokenValueView) string {
	return v.renderSnippet(`
import OpenAI from "openai";

const client = new OpenAI({ baseURL: "BASE/v1", apiKey: "TOKEN" });
const answer = await client.chat.completions.create({
  model: "MODEL", messages: [{ role: "user", content: "Hello" }],
});
console.log(answer.choices[0].message.content);
`, `
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: "BASE", apiKey: "TOKEN" });
const answer = await client.messages.create({
  model: "MODEL", max_tokens: 200, messages: [{ role: "user", content: "Hello" }],
});
console.log(answer.content[0].text);
`)
}

func goSnippet(v tokenValueView) string {
	return v.renderSnippet(`
client := openai.NewClient(option.WithBaseURL("BASE/v1"), option.WithAPIKey("TOKEN"))
answer, err := client.Chat.Completions.New(ctx, openai.ChatCompletionNewParams{
	Model:    "MODEL",
	Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Hello")},
})
`, `
client := anthropic.NewClient(option.WithBaseURL("BASE"), option.WithAPIKey("TOKEN"))
answer, err := client.Messages.New(ctx, anthropic.MessageNewParams{
	Model:     "MODEL",
	MaxTokens: 200,
	Messages:  []anthropic.MessageParam{anthropic.NewUserMessage(anthropic.NewTextBlock("Hello"))},
})
`)
}
