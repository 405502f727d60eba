// The pages of /admin about projects. What they show and change goes through the
// handlers of /manage.
package main

import (
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A projectsView is the list of projects.
type projectsView struct {
	Projects []projectView
	Name     string // what the list is searched by
	Active   string
	Next     string // the address of the next page, "" if there is none
	First    bool   // there is no project at all
}

func (ui *adminUI) projectsPage(r *pageRequest) (*pageResponse, error) {
	v := projectsView{Name: r.query.Get("name"), Active: r.query.Get("active")}
	f, err := r.withQuery("limit", "100", "name", v.Name, "active", v.Active, "after", r.query.Get("after")).parseProjectFilter()
	if err != nil {
		return nil, err
	}
	l, err := ui.ops.listProjects(r.ctx, f)
	if err != nil {
		return nil, err
	}
	v.Projects = l.Data
	v.Next = r.nextPageURL(l.Next)
	v.First = len(l.Data) == 0 && v.Name == "" && v.Active == "" && r.query.Get("after") == ""
	return &pageResponse{template: "projects", title: "Projects", data: v}, nil
}

// A formView is a page with a form, and the way back.
type formView struct {
	Crumb  *formOption // Label and, as Value, address
	Intro  string
	Form   *pageForm
	Policy *policyForm
}

// showError puts a mistake where it belongs in the form, or returns the error.
func (v *formView) showError(err error) (int, error) {
	if fe, ok := errors.AsType[*fieldError](err); ok && v.Policy != nil {
		if v.Policy.showError(fe) {
			return http.StatusBadRequest, nil
		}
		status, err := (&pageForm{Fields: v.Policy.fields()}).showError(fe)
		for _, in := range v.Policy.fields() {
			if in.Error != "" {
				return status, err
			}
		}
	}
	return v.Form.showError(err)
}

// A confirmView is a page that asks before it does something.
type confirmView struct {
	Question string
	Items    []string
	Form     *pageForm
}

// confirmPage is the page that asks. It posts to its own address.
func (r *pageRequest) confirmPage(title, question, submit, back string, items ...string) *pageResponse {
	return &pageResponse{template: "confirm", title: title, data: confirmView{question, items,
		&pageForm{Action: r.http.URL.Path, Submit: submit, Cancel: back, Danger: true}}}
}

func (r *pageRequest) isPost() bool { return r.http.Method == http.MethodPost }

func providerField() *formField {
	return &formField{Name: "provider", Label: "Provider", Kind: "select", Required: true, Short: true, Options: []formOption{
		{providerOpenAI, "OpenAI"}, {providerAnthropic, "Anthropic"}, {providerAzure, "Azure OpenAI"}, {providerCompatible, "Another with OpenAI's API"}}}
}

func providerKeyField(help string, required bool) *formField {
	return &formField{Name: "api_key", Label: "Provider key", Kind: "password", Required: required, Help: help}
}

const baseURLHelp = "Empty: the provider's own address. Azure and others need one, such as https://name.openai.azure.com/openai/v1."

// newProjectPage is the page that makes a project.
func (ui *adminUI) newProjectPage(r *pageRequest) (*pageResponse, error) {
	v := &formView{Crumb: &formOption{"/admin/projects", "Projects"}, Policy: newPolicyForm(true), Form: &pageForm{
		Action: "/admin/projects/new", Submit: "Make the project", Cancel: "/admin/projects", Fields: []*formField{
			{Name: "name", Label: "Name", Kind: "text", Required: true, Help: "What people call it, such as a team or an application."},
			providerField(),
			providerKeyField("It is sealed, and never shown again. More keys can be added later.", false),
			{Name: "base_url", Label: "Base URL", Kind: "text", Placeholder: "https://", Help: baseURLHelp},
		}}}
	v.Form.fill(r.form, nil)
	v.Policy.fill(r.form, json.RawMessage("{}"))
	p := &pageResponse{template: "form", title: "New project", data: v}
	if !r.isPost() {
		return p, nil
	}
	in := map[string]any{"name": r.form.Get("name"), "policy": v.Policy.parsePolicy(r.form, nil)}
	setText(in, r.form, "api_key", false)
	setText(in, r.form, "base_url", false)
	if in["api_key"] != nil || in["base_url"] != nil || r.form.Get("provider") != providerOpenAI {
		in["provider"] = r.form.Get("provider")
	}
	var typed projectInput
	err := typed.decode(r.withJSON(in).body)
	var project projectRow
	if err == nil {
		project, err = ui.ops.createProject(r.ctx, r.origin, typed)
	}
	if err != nil {
		p.status, err = v.showError(err)
		return p, err
	}
	return redirectTo("/admin/projects/"+project.id, "project-made"), nil
}

// A labeledValue is a line of facts.
type labeledValue struct{ Label, Value string }

// policySummary puts a policy's lists into words.
func policySummary(text json.RawMessage) []labeledValue {
	var p struct {
		Models, Endpoints, Addresses []string
		Stateful                     bool
		KeepContentDays              int64 `json:"keep_content_days"`
	}
	if err := json.Unmarshal(text, &p); err != nil { // cannot be: it was checked when it was stored
		return nil
	}
	words := func(l []string, all string) string {
		switch {
		case l == nil:
			return all
		case len(l) == 0:
			return "none"
		}
		return strings.Join(l, ", ")
	}
	out := []labeledValue{{"Models", words(p.Models, "all")}, {"Endpoints", words(p.Endpoints, "all")}, {"Client addresses", words(p.Addresses, "all")}}
	if p.Stateful {
		out = append(out, labeledValue{"Objects kept at the provider", "allowed"})
	}
	if p.KeepContentDays > 0 {
		out = append(out, labeledValue{"What calls say is kept", pluralize(p.KeepContentDays, "day", "days")})
	}
	return out
}

// A projectPageView is the page of one project.
type projectPageView struct {
	projectView
	Limits  []barView
	Allowed []labeledValue
	Tokens  []tokenView
	More    bool // there are more tokens
	Charts  []chartView
}

const maxProjectPageTokens = 10

func (ui *adminUI) projectPage(r *pageRequest) (*pageResponse, error) {
	p, err := ui.ops.getProject(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	v := projectPageView{projectView: p, Limits: newBarViews(p.Limits), Allowed: policySummary(p.Policy)}
	w := tokenListQuery{order: "ends", project: p.ID, from: r.now.UnixMilli(), to: neverExpires, limit: 100}
	v.More, err = ui.store.walkTokens(r.ctx, w, func(row *tokenRow) bool {
		if t := ui.ops.newTokenView(row, r.now); t.IsActive {
			v.Tokens = append(v.Tokens, t)
		}
		return len(v.Tokens) < maxProjectPageTokens
	})
	if err != nil {
		return nil, err
	}
	if v.Charts, err = ui.usageCharts(r, p.ID); err != nil {
		return nil, err
	}
	return &pageResponse{template: "project", title: p.Name, data: v}, nil
}

// editProject is the page that changes a project's name and policy.
func (ui *adminUI) editProject(r *pageRequest) (*pageResponse, error) {
	project, err := ui.ops.getProject(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	here := "/admin/projects/" + project.ID
	v := &formView{Crumb: &formOption{here, project.Name}, Policy: newPolicyForm(true), Form: &pageForm{
		Action: here + "/edit", Submit: "Save", Cancel: here, Version: project.Version, Fields: []*formField{
			{Name: "name", Label: "Name", Kind: "text", Required: true},
			{Name: "routing.fallbacks", Label: "Models that stand in", Kind: "textarea", Placeholder: "gpt-4o* = gpt-4o-mini", Help: "When no provider can answer for a model: the model = the one that answers instead, one a line."},
			{Name: "routing.verified_streams", Label: "Hold streams until they are complete", Kind: "checkbox", Help: "A stream that breaks off can then be tried again. Clients wait for all of it."},
			{Name: "routing.show_upstream", Label: "Tell clients which provider key answered", Kind: "checkbox"}}}}
	v.Form.fill(r.form, routingValues(project.Routing, project.Name))
	v.Policy.fill(r.form, project.Policy)
	p := &pageResponse{template: "form", title: "Edit project", data: v}
	if !r.isPost() {
		return p, nil
	}
	v.Form.Version = r.ifMatchVersion
	routing, err := parseRoutingForm(r.form)
	if err == nil {
		var in projectInput
		err = in.decodePatch(r.withJSON(map[string]any{"name": r.form.Get("name"), "policy": v.Policy.parsePolicy(r.form, project.Policy), "routing": routing}).body)
		if err == nil {
			_, err = ui.ops.updateProject(r.ctx, r.origin, project.ID, r.ifMatchVersion, in)
		}
	}
	if err != nil {
		p.status, err = v.showError(err)
		return p, err
	}
	return redirectTo(here, "saved"), nil
}

// routingValues writes a stored routing as the form has it.
func routingValues(stored json.RawMessage, name string) url.Values {
	values := url.Values{"name": {name}}
	r, err := parseRouting(stored)
	if err != nil { // cannot be: it was checked when it was stored
		return values
	}
	for _, f := range r.Fallbacks {
		values.Set("routing.fallbacks", values.Get("routing.fallbacks")+f.Model+" = "+f.To+"\n")
	}
	if r.VerifiedStreams {
		values.Set("routing.verified_streams", "on")
	}
	if r.ShowUpstream {
		values.Set("routing.show_upstream", "on")
	}
	return values
}

// parseRoutingForm reads a routing from a form that was sent.
func parseRoutingForm(form url.Values) (map[string]any, error) {
	fallbacks := []map[string]string{}
	for _, line := range splitLines(form.Get("routing.fallbacks")) {
		model, to, ok := strings.Cut(line, "=")
		if !ok {
			return nil, &fieldError{"routing.fallbacks", "must have lines such as gpt-4o* = gpt-4o-mini"}
		}
		fallbacks = append(fallbacks, map[string]string{"model": strings.TrimSpace(model), "to": strings.TrimSpace(to)})
	}
	return map[string]any{"fallbacks": fallbacks, "verified_streams": form.Get("routing.verified_streams") != "",
		"show_upstream": form.Get("routing.show_upstream") != ""}, nil
}

// setProjectActivePage activates or deactivates a project.
func (ui *adminUI) setProjectActivePage(r *pageRequest) (*pageResponse, error) {
	project, err := ui.ops.getProject(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	here, on := "/admin/projects/"+project.ID, strings.HasSuffix(r.http.URL.Path, "/activate")
	if !r.isPost() && on {
		return r.confirmPage("Activate "+project.Name+"?", "Its tokens work again from the next call on.", "Activate", here), nil
	}
	if !r.isPost() {
		return r.confirmPage("Deactivate "+project.Name+"?", "All its tokens stop working at once, and their running calls are cut. Nothing is lost; it can be activated again.",
			"Deactivate", here), nil
	}
	if _, err := ui.ops.updateProject(r.ctx, r.origin, project.ID, r.ifMatchVersion, projectInput{active: given(on)}); err != nil {
		return nil, err
	}
	return redirectTo(here, "saved"), nil
}

// removeProject deletes a project.
func (ui *adminUI) removeProject(r *pageRequest) (*pageResponse, error) {
	project, err := ui.ops.getProject(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	if !r.isPost() {
		return r.confirmPage("Delete "+project.Name+"?", "This is for good:", "Delete the project", "/admin/projects/"+project.ID,
			"all its tokens are revoked, and their running calls are cut", "its provider keys are wiped", "its calls stay in the ledger"), nil
	}
	if err := ui.ops.deleteProject(r.ctx, r.origin, project.ID, r.ifMatchVersion); err != nil {
		return nil, err
	}
	return redirectTo("/admin/projects", "deleted"), nil
}

// eraseContentPage erases what is kept of a project's calls.
func (ui *adminUI) eraseContentPage(r *pageRequest) (*pageResponse, error) {
	project, err := ui.ops.getProject(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	if !r.isPost() {
		return r.confirmPage("Erase what the calls of "+project.Name+" say?", "The questions and answers that are kept of its calls are deleted, for good. The calls stay in the ledger.",
			"Erase", "/admin/projects/"+project.ID), nil
	}
	if _, err := ui.ops.eraseContent(r.ctx, r.origin, project.ID); err != nil {
		return nil, err
	}
	return redirectTo("/admin/projects/"+project.ID, "deleted"), nil
}

// revokeProjectTokensPage revokes all tokens of a project.
func (ui *adminUI) revokeProjectTokensPage(r *pageRequest) (*pageResponse, error) {
	project, err := ui.ops.getProject(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	if !r.isPost() {
		return r.confirmPage("Revoke all tokens of "+project.Name+"?", "All of them stop working at once, for good, and their running calls are cut.",
			"Revoke all tokens", "/admin/projects/"+project.ID), nil
	}
	if _, err := ui.ops.revokeProjectTokens(r.ctx, r.origin, project.ID); err != nil {
		return nil, err
	}
	return redirectTo("/admin/projects/"+project.ID, "revoked"), nil
}

// upstreamFields are those that a new upstream and a changed one have in common.
func upstreamFields() []*formField {
	return []*formField{
		{Name: "models", Label: "Models", Kind: "textarea", Placeholder: "gpt-4o*", Help: "Which models it serves, one a line; * at the end stands for any rest. Empty: all."},
		{Name: "priority", Label: "Priority", Kind: "number", Short: true, Required: true, Help: "Calls go to the lowest number that serves their model."},
		{Name: "weight", Label: "Weight", Kind: "number", Short: true, Required: true, Help: "Keys of one priority share the calls in this proportion; 0: none."},
		{Name: "rewrite", Label: "Its own names for models", Kind: "textarea", Placeholder: "gpt-4o = my-deployment", Help: "What clients ask for = what is sent, one a line. Empty: the same."},
		{Name: "requests_per_minute", Label: "Requests per minute", Kind: "number", Short: true, Help: "That the provider takes. Beyond them calls go to the next key. Empty: not known."},
		{Name: "tokens_per_minute", Label: "Tokens per minute", Kind: "number", Short: true, Help: "The same, in tokens."},
		{Name: "connect_ms", Label: "Connected within, ms", Kind: "number", Short: true, Help: "Name look-up, dialling and TLS handshake; a call that has no connection by then goes to the next key. Empty: 10000 each."},
		{Name: "answer_ms", Label: "Answer within, ms", Kind: "number", Short: true, Help: "An answer in one piece that has not begun by then goes to the next key; without one, the call ends. Empty: the program's own."},
		{Name: "first_event_ms", Label: "First event within, ms", Kind: "number", Short: true, Help: "A stream that begins later goes to the next key. Empty: the program's own."},
		{Name: "idle_ms", Label: "Pauses at most, ms", Kind: "number", Short: true, Help: "Empty: the program's own."},
		{Name: "shared_with", Label: "Serves other projects too", Kind: "textarea", Placeholder: "proj_…", Help: "Their ids, one a line. They use the key, and never see it."},
		{Name: "note", Label: "Note", Kind: "text", Help: "For administrators, such as whose account it is."},
		{Name: "organization", Label: "OpenAI organisation", Kind: "text", Placeholder: "org-…", Help: "Sent along as OpenAI-Organization."},
		{Name: "openai_project", Label: "OpenAI project", Kind: "text", Placeholder: "proj_…", Help: "Sent along as OpenAI-Project."},
	}
}

// parseUpstreamForm reads what the fields in common say.
func parseUpstreamForm(form url.Values) (map[string]any, error) {
	in := map[string]any{"name": form.Get("name"), "models": splitLines(form.Get("models")),
		"organization": strings.TrimSpace(form.Get("organization")), "openai_project": strings.TrimSpace(form.Get("openai_project"))}
	setNumber(in, form, "priority", false)
	setNumber(in, form, "weight", false)
	setText(in, form, "api_key", false)
	in["shared_with"] = splitLines(form.Get("shared_with"))
	in["note"] = strings.TrimSpace(form.Get("note"))
	for _, name := range []string{"requests_per_minute", "tokens_per_minute", "connect_ms", "answer_ms", "first_event_ms", "idle_ms"} {
		in[name] = 0
		setNumber(in, form, name, false)
	}
	names := map[string]string{}
	for _, line := range splitLines(form.Get("rewrite")) {
		asked, sent, ok := strings.Cut(line, "=")
		if !ok {
			return nil, &fieldError{"rewrite", "must have lines such as gpt-4o = my-deployment"}
		}
		names[strings.TrimSpace(asked)] = strings.TrimSpace(sent)
	}
	in["rewrite"] = names
	return in, nil
}

// rewriteLines writes an upstream's own names for models one a line.
func rewriteLines(raw json.RawMessage) string {
	var names map[string]string
	if err := json.Unmarshal(raw, &names); err != nil { // cannot be: it was checked when it was stored
		return ""
	}
	var b strings.Builder
	for _, asked := range slices.Sorted(maps.Keys(names)) {
		b.WriteString(asked + " = " + names[asked] + "\n")
	}
	return b.String()
}

// formatNonZero writes a number that means nothing when it is 0.
func formatNonZero(n int64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

// newUpstreamPage adds a provider key to a project.
func (ui *adminUI) newUpstreamPage(r *pageRequest) (*pageResponse, error) {
	project, err := ui.ops.getProject(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	here := "/admin/projects/" + project.ID
	v := &formView{Crumb: &formOption{here, project.Name}, Form: &pageForm{Action: here + "/upstreams/new", Submit: "Add the key", Cancel: here,
		Fields: append([]*formField{
			{Name: "name", Label: "Name", Kind: "text", Required: true, Help: "To tell it from the project's other keys."},
			providerField(),
			providerKeyField("It is sealed, and never shown again.", true),
			{Name: "base_url", Label: "Base URL", Kind: "text", Placeholder: "https://", Help: baseURLHelp},
		}, upstreamFields()...)}}
	v.Form.fill(r.form, url.Values{"priority": {"0"}, "weight": {"1"}})
	p := &pageResponse{template: "form", title: "Add a provider key", data: v}
	if !r.isPost() {
		return p, nil
	}
	in, err := parseUpstreamForm(r.form)
	if err == nil {
		in["provider"] = r.form.Get("provider")
		setText(in, r.form, "base_url", false)
		var typed upstreamInput
		if err = typed.decode(r.withJSON(in).body); err == nil {
			_, err = ui.ops.createUpstream(r.ctx, r.origin, project.ID, typed)
		}
	}
	if err != nil {
		p.status, err = v.showError(err)
		return p, err
	}
	return redirectTo(here, "saved"), nil
}

// editUpstream changes an upstream, and replaces its key if one is given.
func (ui *adminUI) editUpstream(r *pageRequest) (*pageResponse, error) {
	u, err := ui.ops.getUpstream(r.ctx, r.pathValue("id"), r.pathValue("upstream"))
	if err != nil {
		return nil, err
	}
	here := "/admin/projects/" + u.ProjectID
	key := providerKeyField("Empty: the key that is stored stays. A new base URL needs the key anew.", false)
	key.Label = "New provider key"
	if u.KeyHint != "" {
		key.Placeholder = "•••• " + u.KeyHint
	}
	v := &formView{Crumb: &formOption{here, "Project"}, Form: &pageForm{Action: here + "/upstreams/" + u.ID + "/edit", Submit: "Save", Cancel: here, Version: u.Version,
		Fields: append([]*formField{
			{Name: "name", Label: "Name", Kind: "text", Required: true},
			key,
			{Name: "base_url", Label: "Base URL", Kind: "text", Required: true},
			{Name: "is_active", Label: "In use", Kind: "checkbox", Help: "Without it no call goes there; the key is kept."},
		}, upstreamFields()...)}}
	stored := url.Values{"name": {u.Name}, "base_url": {u.BaseURL}, "organization": {u.Organization}, "openai_project": {u.OpenAIProject},
		"priority": {strconv.FormatInt(u.Priority, 10)}, "weight": {strconv.FormatInt(u.Weight, 10)}, "models": {jsonListToLines(u.Models)},
		"rewrite": {rewriteLines(u.Rewrite)}, "note": {u.Note}, "shared_with": {jsonListToLines(u.SharedWith)}, "requests_per_minute": {formatNonZero(u.Requests)}, "tokens_per_minute": {formatNonZero(u.Tokens)},
		"connect_ms": {formatNonZero(u.ConnectMS)}, "answer_ms": {formatNonZero(u.AnswerMS)}, "first_event_ms": {formatNonZero(u.FirstEventMS)}, "idle_ms": {formatNonZero(u.IdleMS)}}
	if u.IsActive {
		stored.Set("is_active", "on")
	}
	v.Form.fill(r.form, stored)
	p := &pageResponse{template: "form", title: "Provider key " + u.Name, data: v}
	if !r.isPost() {
		return p, nil
	}
	v.Form.Version = r.ifMatchVersion
	in, err := parseUpstreamForm(r.form)
	if err == nil {
		in["base_url"], in["is_active"] = r.form.Get("base_url"), r.form.Get("is_active") != ""
		var typed upstreamInput
		if err = typed.decode(r.withJSON(in).body); err == nil {
			_, err = ui.ops.updateUpstream(r.ctx, r.origin, u.ProjectID, u.ID, r.ifMatchVersion, typed)
		}
	}
	if err != nil {
		p.status, err = v.showError(err)
		return p, err
	}
	return redirectTo(here, "saved"), nil
}

// jsonListToLines writes a stored JSON list one entry a line.
func jsonListToLines(raw json.RawMessage) string {
	var l []string
	if err := json.Unmarshal(raw, &l); err != nil { // cannot be: it was checked when it was stored
		return ""
	}
	return strings.Join(l, "\n")
}

// removeUpstream deletes an upstream.
func (ui *adminUI) removeUpstream(r *pageRequest) (*pageResponse, error) {
	u, err := ui.ops.getUpstream(r.ctx, r.pathValue("id"), r.pathValue("upstream"))
	if err != nil {
		return nil, err
	}
	here := "/admin/projects/" + u.ProjectID
	if !r.isPost() {
		return r.confirmPage("Remove the provider key "+u.Name+"?", "The key is wiped, for good. Calls go to the project's other keys; without any they are refused.", "Remove the key", here), nil
	}
	if err := ui.ops.deleteUpstream(r.ctx, r.origin, u.ProjectID, u.ID, r.ifMatchVersion); err != nil {
		return nil, err
	}
	return redirectTo(here, "deleted"), nil
}

// A routePageView is a project's route as it was tried, if it was.
type routePageView struct {
	Project    projectView
	Model, API string
	Mistake    string // of what was asked for
	Fallback   string
	Lines      []routePageUpstream
}

type routePageUpstream struct {
	routeUpstreamView
	Percent string
	Times   string // of its own, in words; "": none
}

// tryRoutePage shows which provider key would get a call for a model now, and
// why the others would not.
func (ui *adminUI) tryRoutePage(r *pageRequest) (*pageResponse, error) {
	project, err := ui.ops.getProject(r.ctx, r.pathValue("id"), r.now)
	if err != nil {
		return nil, err
	}
	v := routePageView{Project: project, Model: r.query.Get("model"), API: r.query.Get("api")}
	p := &pageResponse{template: "route", title: "Route in " + v.Project.Name, data: &v}
	if v.Model == "" {
		return p, nil
	}
	route, err := ui.ops.explainRoute(r.ctx, project.ID, v.Model, v.API)
	if fe, ok := errors.AsType[*fieldError](err); ok {
		v.Mistake = fieldErrorMessage(fe)
		return p, nil
	}
	if err != nil {
		return nil, err
	}
	v.Fallback = route.FallbackModel
	for _, l := range route.Upstreams {
		v.Lines = append(v.Lines, routePageUpstream{l, percent(100 * l.Share), l.timeoutsText()})
	}
	return p, nil
}

// timeoutsText says in words how long a call waits there, as far as its own settings
// say.
func (l *routeUpstreamView) timeoutsText() string {
	var set []string
	for _, t := range []struct {
		what string
		ms   int64
	}{{"connection", l.ConnectMS}, {"answer", l.AnswerMS}, {"first event", l.FirstEventMS}, {"pauses", l.IdleMS}} {
		if t.ms > 0 {
			set = append(set, t.what+" "+(time.Duration(t.ms)*time.Millisecond).String())
		}
	}
	return strings.Join(set, ", ")
}
