// This file has the pages of /admin about projects and their upstreams. They are thin over the
// operations of /manage. No page shows an API key of an upstream: only its last four characters.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
)

// A projectsView is the data of templates/projects.html.
type projectsView struct {
	listView
	Projects   []projectLine
	Active     string // the filter
	States     []option
	NoProjects bool // there are none at all
}

// A projectLine is a project in the list.
type projectLine struct {
	projectView
	row      *projectRow
	Use      useView
	LastCall *timestamp // nil: there is none on record
}

func projectOrders() []string {
	return []string{"", tokensOldest, tokensNewest, "name", "-name", "used", "-used", "calls", "-calls",
		"cost", "-cost", "changed", "-changed"}
}

func (ui *adminUI) projectsPage(r *pageRequest) (*pageResponse, error) {
	v := &projectsView{listView: r.newListView(), Active: r.query.Get("active"),
		States: options("", "All", "true", "Active", "false", "Inactive")}
	q := projectListQuery{prefix: strings.TrimSpace(r.query.Get("name")), limit: maxSorted + 1}
	var err error
	if q.active, err = r.boolParam("active"); err == nil {
		q.search, err = parseSearchTerm(v.Search)
	}
	if err == nil {
		err = checkChoice("order", v.Order, projectOrders()...)
	}
	if v.Problem == "" {
		v.Problem, err = problemOf(err)
	}
	if err == nil && v.Problem == "" {
		err = ui.fillProjects(r, v, q)
	}
	page := showPage("projects", "Projects", v)
	if v.Problem != "" {
		page.status = http.StatusBadRequest
	}
	return page, err
}

// fillProjects reads the page of the list that the address asks for. More than maxSorted projects are listed by age
// alone.
func (ui *adminUI) fillProjects(r *pageRequest, v *projectsView, q projectListQuery) error {
	rows, err := ui.store.listProjects(r.ctx, q)
	if err != nil {
		return err
	}
	lines := make([]projectLine, len(rows))
	for i := range rows {
		lines[i].row = &rows[i]
	}
	order := cmp.Or(v.Order, tokensOldest)
	if len(lines) <= maxSorted {
		if err := ui.sortProjects(r, v, lines, order); err != nil {
			return err
		}
	} else {
		if strings.Trim(order, "-") != tokensOldest && order != tokensNewest {
			v.Hint = "More than 1,000 projects match: too many to sort by this column. Search, or choose a state."
			order = tokensOldest
		}
		if err := ui.fillOldestProjects(r, v, q, order); err != nil {
			return err
		}
	}
	for i := range v.Projects {
		view, viewErr := ui.ops.newProjectView(r.ctx, v.Projects[i].row)
		v.Projects[i].projectView, err = view, errors.Join(err, viewErr)
	}
	v.addColumns(r, order, sortColumn{"Project", "name", ""}, sortColumn{"State", "", ""},
		sortColumn{"Upstreams", "", ""}, sortColumn{"Latest call", "-used", ""},
		sortColumn{"Calls, 30 days", "-calls", "num"}, sortColumn{"Cost, 30 days", "-cost", "num"},
		sortColumn{"Created", tokensOldest, "extra"},
		sortColumn{"Changed", "-changed", "extra"})
	v.NoProjects = len(v.Projects) == 0 && !v.LaterPage && v.Search == "" && v.Active == "" && q.prefix == ""
	return err
}

// addProjectUse fills in what projects have used on the recent days, and when they were called last. It returns the
// sum.
func (ui *adminUI) addProjectUse(r *pageRequest, lines []projectLine) (sum usageTotals, err error) {
	var seqs []int64
	for i := range lines {
		seqs = append(seqs, lines[i].row.seq)
	}
	found, err := ui.store.recentProjectUse(r.ctx, seqs, r.now.UnixMilli())
	if err != nil {
		return sum, err
	}
	latest, err := ui.store.latestCalls(r.ctx, seqs)
	for i := range lines {
		u := found[lines[i].row.seq]
		if lines[i].Use = newUseView(u); u != nil {
			sum.add(u.usageTotals)
		}
		if at := latest[lines[i].row.seq]; at != 0 {
			lines[i].LastCall = newTimestamp(&at)
		}
	}
	return sum, err
}

func (ui *adminUI) sortProjects(r *pageRequest, v *projectsView, lines []projectLine, order string) error {
	sum, err := ui.addProjectUse(r, lines)
	v.Projects = sortedPage(r, &v.listView, lines, order, func(p *projectLine) sortKey {
		key := sortKey{seq: p.row.seq}
		switch strings.TrimPrefix(order, "-") {
		case "name":
			key.text = strings.ToLower(p.row.name)
		case "used":
			if p.LastCall != nil {
				key.number = int64(*p.LastCall)
			}
		case "calls":
			key.number = p.Use.Calls
		case "cost":
			key.number = int64(p.Use.Cost)
		case "changed":
			key.number = p.row.updatedAt
		}
		return key
	})
	v.Total = &listTotal{Label: pluralize(int64(len(lines)), "project", "projects"), Calls: sum.calls,
		Cost: dollars(sum.cost)}
	return err
}

// fillOldestProjects reads a page of the projects by age.
func (ui *adminUI) fillOldestProjects(r *pageRequest, v *projectsView, q projectListQuery, order string) error {
	before := r.query.Get("before")
	q.isNewestFirst = (order == tokensNewest) != (before != "")
	q.limit = v.Size + 1
	cursor := cmp.Or(r.query.Get("after"), before)
	if cursor != "" {
		key, err := parseSortKey(cursor)
		if err != nil || key.seq < 1 {
			v.Problem = "This address is not a page of the list."
			return nil
		}
		q.afterSeq = key.seq
	}
	rows, err := ui.store.listProjects(r.ctx, q)
	if err != nil {
		return err
	}
	ends := pageEnds{more: len(rows) > v.Size}
	if rows = rows[:min(len(rows), v.Size)]; before != "" {
		slices.Reverse(rows)
	}
	if n := len(rows); n > 0 {
		ends.first, ends.last = sortKey{seq: rows[0].seq}.cursor(), sortKey{seq: rows[n-1].seq}.cursor()
		if ends.beyond = ends.last; before != "" {
			ends.beyond = ends.first
		}
	}
	v.setPages(r, ends)
	for i := range rows {
		v.Projects = append(v.Projects, projectLine{row: &rows[i]})
	}
	sum, err := ui.addProjectUse(r, v.Projects)
	v.Total = &listTotal{Label: "This page", Calls: sum.calls, Cost: dollars(sum.cost)}
	return err
}

// A projectPageView is the data of templates/project.html.
type projectPageView struct {
	projectView
	Ready   bool // it has an active upstream, its own or one shared with it: without, its calls are refused
	Limits  []barView
	Values  string // the address of the page of values, "" if no limit has any
	Allowed policyView
	Cache   *cacheView // nil: there is no cache, and was none
	Tokens  []tokenView
	More    bool // there are more active tokens
	Charts  []chartView
	// Failures and History are as on the page of a token.
	Failures []requestListItem
	History  []auditLine
}

const maxProjectPageTokens = 10

func (ui *adminUI) projectPage(r *pageRequest) (*pageResponse, error) {
	p, err := ui.ops.getProject(r.ctx, r.pathValue("id"), valueQuery{top: shownValues}, r.now)
	if err != nil {
		return nil, err
	}
	row, err := ui.store.projectByID(r.ctx, p.ID)
	if err != nil {
		return nil, err
	}
	state, err := ui.registry.readProject(r.ctx, row.seq)
	if err != nil {
		return nil, err
	}
	v := projectPageView{projectView: p, Ready: len(state.upstreams) > 0,
		Limits: newBarViews(p.Limits), Values: valuesURL("/admin/projects/"+p.ID, p.Limits),
		Allowed: newPolicyView(p.Policy)}
	q := tokenListQuery{order: "ends", project: p.ID, from: r.now.UnixMilli(), to: neverExpires, limit: 100}
	v.More, _, err = ui.store.walkTokens(r.ctx, q, func(row *tokenRow) bool {
		if t := ui.ops.newTokenView(row, r.now); t.IsActive {
			v.Tokens = append(v.Tokens, t)
		}
		return len(v.Tokens) < maxProjectPageTokens
	})
	if err != nil {
		return nil, err
	}
	cache, err := ui.ops.getCache(r.ctx, p.ID, r.now)
	if err != nil {
		return nil, err
	}
	if v.Allowed.Cache != nil || cache.Entries+cache.CacheHits > 0 {
		v.Cache = &cache
	}
	if v.Charts, err = ui.projectCharts(r, p.ID); err != nil {
		return nil, err
	}
	ui.awaitRecorded(r)
	if v.Failures, err = ui.latestFailures(r, requestFilter{project: p.ID}); err != nil {
		return nil, err
	}
	v.History, err = ui.objectHistory(r, p.ID)
	forecastLimits(v.Limits, r.now)
	return showPage("project", p.Name+" · Projects", v), err
}

// crumbsTo returns the page of an object after the page of the list that it is in. Another page it returns alone.
func crumbsTo(page option) []option {
	section, _, isObject := strings.Cut(strings.TrimPrefix(page.Value, "/admin/"), "/")
	if !isObject {
		return []option{page}
	}
	return []option{{"/admin/" + section, capitalize(section)}, page}
}

// A valuesView is the data of templates/limit-values.html: what the values of limits with for_each have used.
type valuesView struct {
	Crumb  option   // the page of the owner
	Crumbs []option // the pages above this one
	Value  string   // that is searched for, "" for those that have used most
	Limits []barView
}

// maxPageValues is how many values of a limit their page shows.
const maxPageValues = 100

// valuesURL returns the address of the page of values, "" if no limit has any.
func valuesURL(owner string, limits []limitView) string {
	if slices.ContainsFunc(limits, func(l limitView) bool { return l.ForEach != "" }) {
		return owner + "/values"
	}
	return ""
}

// valueQuery returns the values that the page is asked for.
func (r *pageRequest) valueQuery() valueQuery {
	if value := r.query.Get("value"); value != "" {
		return valueQuery{names: []string{value}}
	}
	return valueQuery{top: maxPageValues}
}

func (ui *adminUI) projectValuesPage(r *pageRequest) (*pageResponse, error) {
	p, err := ui.ops.getProject(r.ctx, r.pathValue("id"), r.valueQuery(), r.now)
	if err != nil {
		return nil, err
	}
	return r.valuesPage(option{"/admin/projects/" + p.ID, p.Name}, "project="+p.ID, p.Limits), nil
}

func (ui *adminUI) tokenValuesPage(r *pageRequest) (*pageResponse, error) {
	t, err := ui.ops.getToken(r.ctx, r.pathValue("id"), r.valueQuery(), r.now)
	if err != nil {
		return nil, err
	}
	return r.valuesPage(option{"/admin/tokens/" + t.ID, t.Name}, "token="+t.ID, t.Limits), nil
}

// valuesPage shows the values of an owner's limits. calls is the filter for the owner's calls.
func (r *pageRequest) valuesPage(crumb option, calls string, limits []limitView) *pageResponse {
	v := valuesView{Crumb: crumb, Crumbs: crumbsTo(crumb), Value: r.query.Get("value")}
	for _, bar := range newBarViews(limits) {
		if bar.ForEach == "" {
			continue
		}
		name, prefix := bar.ForEach, ""
		if key, isTag := strings.CutPrefix(name, tagAttribute); isTag {
			name, prefix = "tag", key+"="
		}
		for i := range bar.Top {
			if value := bar.Top[i].Value; value != "" {
				bar.Top[i].CallsURL = "/admin/requests?" + calls + "&" + name + "=" + url.QueryEscape(prefix+value)
			}
		}
		v.Limits = append(v.Limits, bar)
	}
	return showPage("limit-values", "Values of the limits of "+crumb.Label, v)
}

func (ui *adminUI) newProjectPage(r *pageRequest) (*pageResponse, error) {
	v := &formView{Crumb: option{"/admin/projects", "Projects"}, Policy: newPolicyForm(true, nil), Form: &pageForm{
		Submit: "Create project", Cancel: "/admin/projects",
		Fields: formFields(ui.ops.fields.project, "name", "provider", "api_key", "base_url")}}
	title, stored, err := ui.fillLikeProject(r, v)
	if err != nil {
		return nil, err
	}
	v.Form.addRouting(ui.ops.fields.project)
	var in projectInput
	targets := fieldTargets(&in, ui.ops.fields.project)
	return ui.submit(r, title, v, stored, targets, func() (*pageResponse, error) {
		if !in.key.set && !in.baseURL.set && in.provider.value == providerOpenAI {
			in.provider.set = false // the form's default: a project without an upstream
		}
		in.routing = encodeRouting(r.form)
		keyFields, err := ui.addLikeUpstreams(r, v, &in)
		if err != nil {
			return nil, err
		}
		p, err := ui.ops.createProject(r.ctx, r.origin, in)
		if err != nil {
			return nil, qualifyLikeErrors(keyFields, err)
		}
		upstreams, err := ui.store.projectUpstreams(r.ctx, p.seq)
		if len(upstreams) == 0 {
			return redirectTo("/admin/projects/"+p.id, "project-without-upstream"), err
		}
		return ui.testKeys(r, redirectTo("/admin/projects/"+p.id, "project-created"), upstreams...), err
	})
}

func (ui *adminUI) editProject(r *pageRequest) (*pageResponse, error) {
	project, err := ui.ops.getProject(r.ctx, r.pathValue("id"), valueQuery{}, r.now)
	if err != nil {
		return nil, err
	}
	projectURL := "/admin/projects/" + project.ID
	v := &formView{Crumb: option{projectURL, project.Name}, Policy: newPolicyForm(true, project.Policy),
		Form: &pageForm{Submit: "Save", Cancel: projectURL, Version: project.Version,
			Fields: []*formField{{Name: "name", Label: "Name", Required: true}}}}
	v.Form.addRouting(ui.ops.fields.project)
	var in projectInput
	targets := fieldTargets(&in, ui.ops.fields.project)
	return ui.submit(r, "Edit project", v, routingValues(&project), targets, func() (*pageResponse, error) {
		in.routing = encodeRouting(r.form)
		_, err := ui.ops.updateProject(r.ctx, r.origin, project.ID, r.ifMatchVersion, in)
		return redirectTo(projectURL, "saved"), err
	})
}

// confirmProject confirms an operation on a whole project. done names the notice on the page that follows; run
// returns how many objects it changed.
func (ui *adminUI) confirmProject(r *pageRequest, title, ask, submit, done string,
	run func(id string) (count int64, err error)) (*pageResponse, error) {
	p, err := ui.ops.getProject(r.ctx, r.pathValue("id"), valueQuery{}, r.now)
	if err != nil {
		return nil, err
	}
	projectURL := "/admin/projects/" + p.ID
	then := redirectTo(projectURL, done)
	if ask == "delete-project" {
		then = redirectTo("/admin/projects", done)
	}
	v := &confirmView{Ask: ask, Form: &pageForm{Submit: submit, Cancel: projectURL}}
	return r.confirm(fmt.Sprintf(title, p.Name), v, then, func() (err error) {
		then.notice.Count, err = run(p.ID)
		return err
	})
}

func (ui *adminUI) activateProject(r *pageRequest) (*pageResponse, error) {
	return ui.confirmProject(r, "Activate %s?", "activate", "Activate", "project-activated",
		ui.setProjectActive(r, true))
}

func (ui *adminUI) deactivateProject(r *pageRequest) (*pageResponse, error) {
	return ui.confirmProject(r, "Deactivate %s?", "deactivate", "Deactivate", "project-deactivated",
		ui.setProjectActive(r, false))
}

func (ui *adminUI) setProjectActive(r *pageRequest, active bool) func(id string) (int64, error) {
	return func(id string) (int64, error) {
		_, err := ui.ops.updateProject(r.ctx, r.origin, id, r.ifMatchVersion, projectInput{active: given(active)})
		return 1, err
	}
}

func (ui *adminUI) deleteProjectPage(r *pageRequest) (*pageResponse, error) {
	remove := func(id string) (int64, error) {
		return 1, ui.ops.deleteProject(r.ctx, r.origin, id, r.ifMatchVersion)
	}
	return ui.confirmProject(r, "Delete %s?", "delete-project", "Delete project", "project-deleted", remove)
}

func (ui *adminUI) eraseContentPage(r *pageRequest) (*pageResponse, error) {
	title := "Delete the stored content of %s?"
	erase := func(id string) (int64, error) { return ui.ops.eraseContent(r.ctx, r.origin, id) }
	return ui.confirmProject(r, title, "erase", "Delete content", "content-erased", erase)
}

// eraseEndUserPage asks for the name of an end user, or shows the one that a link names.
func (ui *adminUI) eraseEndUserPage(r *pageRequest) (*pageResponse, error) {
	p, err := ui.ops.getProject(r.ctx, r.pathValue("id"), valueQuery{}, r.now)
	if err != nil {
		return nil, err
	}
	projectURL := "/admin/projects/" + p.ID
	then := redirectTo(projectURL, "end-user-erased")
	v := &confirmView{Ask: "erase-end-user", Form: &pageForm{Submit: "Erase end user", Cancel: projectURL,
		Fields: []*formField{{Name: "end_user", Label: "End user", Kind: "text", Required: true,
			Value: r.query.Get("end_user"), Help: "end-user"}}}}
	return r.confirm(fmt.Sprintf("Erase an end user of %s?", p.Name), v, then, func() (err error) {
		then.notice.Count, err = ui.ops.eraseEndUser(r.ctx, r.origin, p.ID, r.form.Get("end_user"))
		return err
	})
}

func (ui *adminUI) emptyCachePage(r *pageRequest) (*pageResponse, error) {
	title := "Empty the response cache of %s?"
	return ui.confirmProject(r, title, "empty-cache", "Empty cache", "cache-emptied", func(id string) (int64, error) {
		return ui.ops.emptyCache(r.ctx, r.origin, id, cacheFilter{}, 0)
	})
}

func (ui *adminUI) revokeProjectTokensPage(r *pageRequest) (*pageResponse, error) {
	title := "Revoke all tokens of %s?"
	revoke := func(id string) (int64, error) { return ui.ops.revokeProjectTokens(r.ctx, r.origin, id) }
	return ui.confirmProject(r, title, "revoke-all", "Revoke all tokens", "tokens-revoked", revoke)
}

// upstreamForm returns a form with the named fields and, among the advanced ones, those that a new upstream and a
// changed one share.
func (ui *adminUI) upstreamForm(submit, cancel string, first ...string) *pageForm {
	fields := formFields(ui.ops.fields.upstream, append(first, "models", "priority", "weight", "rewrite",
		"requests_per_minute", "tokens_per_minute", "connect_ms", "answer_ms", "first_event_ms", "idle_ms",
		"cost_multiplier", "shared_with", "note", "organization", "openai_project")...)
	defaults := map[string]string{"priority": "0", "weight": "1", "cost_multiplier": "1"}
	for _, field := range fields[len(first):] {
		field.Advanced, field.Default = true, defaults[field.Name]
	}
	return &pageForm{Submit: submit, Cancel: cancel, Fields: fields,
		Advanced: "models, priority, provider's limits, timeouts, sharing, cost"}
}

func (ui *adminUI) newUpstreamPage(r *pageRequest) (*pageResponse, error) {
	project, err := ui.ops.getProject(r.ctx, r.pathValue("id"), valueQuery{}, r.now)
	if err != nil {
		return nil, err
	}
	projectURL := "/admin/projects/" + project.ID
	v := &formView{Crumb: option{projectURL, project.Name},
		Form: ui.upstreamForm("Add upstream", projectURL, "name", "provider", "api_key", "base_url")}
	key := v.Form.Fields[2]
	key.Required, key.Empty = true, emptyValue
	defaults := url.Values{"priority": {"0"}, "weight": {"1"}}
	var in upstreamInput
	targets := fieldTargets(&in, ui.ops.fields.upstream)
	return ui.submit(r, "Add an upstream", v, defaults, targets, func() (*pageResponse, error) {
		u, err := ui.ops.createUpstream(r.ctx, r.origin, project.ID, in)
		if err != nil {
			return nil, err
		}
		return ui.testKeys(r, redirectTo(projectURL, "upstream-added"), u), nil
	})
}

func (ui *adminUI) editUpstream(r *pageRequest) (*pageResponse, error) {
	u, err := ui.ops.getUpstream(r.ctx, r.pathValue("id"), r.pathValue("upstream"))
	if err != nil {
		return nil, err
	}
	projectURL := "/admin/projects/" + u.ProjectID
	project, err := ui.projectName(r, u.ProjectID)
	if err != nil {
		return nil, err
	}
	v := &formView{Crumb: option{projectURL, project},
		Form: ui.upstreamForm("Save", projectURL, "name", "api_key", "base_url", "is_active")}
	v.Form.Version = u.Version
	key, baseURL := v.Form.Fields[1], v.Form.Fields[2]
	key.Label, key.Help = "New API key", "new-api-key"
	if u.KeyHint != "" {
		key.Placeholder = "•••• " + u.KeyHint
	}
	baseURL.Required, baseURL.Empty, baseURL.Help = true, emptyValue, ""
	var in upstreamInput
	targets := fieldTargets(&in, ui.ops.fields.upstream)
	stored := storedValues(u, v.Form.Fields)
	return ui.submit(r, "Upstream "+u.Name, v, stored, targets, func() (*pageResponse, error) {
		row, err := ui.ops.updateUpstream(r.ctx, r.origin, u.ProjectID, u.ID, r.ifMatchVersion, in)
		if err != nil || !in.key.set {
			return redirectTo(projectURL, "saved"), err
		}
		return ui.testKeys(r, redirectTo(projectURL, "saved"), row), nil
	})
}

// testKeys adds what the providers say about the keys of upstreams to the page that follows. If there are too many to
// show, those that work are left out.
func (ui *adminUI) testKeys(r *pageRequest, p *pageResponse, upstreams ...upstreamRow) *pageResponse {
	tests := make([]*keyTest, len(upstreams))
	var running sync.WaitGroup
	for i := range upstreams {
		running.Go(func() {
			t, err := ui.ops.testKey(r.ctx, r.origin, upstreams[i].projectID, upstreams[i].id)
			if err != nil { // it is stored nevertheless
				ui.log.Error("a key could not be tested", "request_id", r.origin.requestID, "upstream", upstreams[i].id,
					"error", err)
				return
			}
			tests[i] = &t
		})
	}
	running.Wait()
	for i, t := range tests {
		if t != nil {
			p.notice.tests = append(p.notice.tests, namedKeyTest{*t, upstreams[i].name})
		}
	}
	if len(p.notice.tests) > maxShownTests {
		works := func(t namedKeyTest) bool { return t.result == keyTestAccepted }
		p.notice.tests = slices.DeleteFunc(p.notice.tests, works)
		p.notice.tests = p.notice.tests[:min(len(p.notice.tests), maxShownTests)]
	}
	return p
}

func (ui *adminUI) testKeyPage(r *pageRequest) (*pageResponse, error) {
	t, err := ui.ops.testKey(r.ctx, r.origin, r.pathValue("id"), r.pathValue("upstream"))
	then := redirectTo("/admin/projects/"+url.PathEscape(r.pathValue("id")), "key-tested")
	then.notice.tests = []namedKeyTest{{keyTest: t}}
	return then, err
}

func (ui *adminUI) deleteUpstreamPage(r *pageRequest) (*pageResponse, error) {
	u, err := ui.ops.getUpstream(r.ctx, r.pathValue("id"), r.pathValue("upstream"))
	if err != nil {
		return nil, err
	}
	projectURL := "/admin/projects/" + u.ProjectID
	v := &confirmView{Ask: "delete-upstream", Form: &pageForm{Submit: "Delete upstream", Cancel: projectURL}}
	return r.confirm("Delete upstream "+u.Name+"?", v, redirectTo(projectURL, "upstream-deleted"), func() error {
		return ui.ops.deleteUpstream(r.ctx, r.origin, u.ProjectID, u.ID, r.ifMatchVersion)
	})
}

// A refusalView says why a call was refused: what the client was told, and which rule it was that did so.
type refusalView struct {
	Message      string       // "": it is not on record
	Rules        []policyRule // of the project and the token, as they are now
	ChangeURL    string       // the form with the rule, "" if none is known or the role may not change it
	AllowedToday bool         // the rules have changed since
}

// A policyRule is a list of what a policy allows. A nil list allows everything.
type policyRule struct {
	Owner, Name string
	Allowed     *[]string
}

// explainRefusal returns why a call was refused. Rules are those of now: a ledger keeps no policies.
func (ui *adminUI) explainRefusal(r *pageRequest, row *requestView) (*refusalView, error) {
	v := &refusalView{Message: row.refusal}
	owners, err := ui.refusalOwners(r, row)
	if err != nil {
		return nil, err
	}
	list := map[string]string{"model_not_allowed": "models", "endpoint_not_allowed": "endpoints",
		"address_not_allowed": "addresses"}[row.errorCode]
	v.AllowedToday = list != ""
	for _, o := range owners {
		change, refuses := "", false
		switch {
		case list != "":
			rule := policyRule{Owner: o.name, Name: list, Allowed: o.view.list(list)}
			v.Rules = append(v.Rules, rule)
			change, refuses = "#"+fieldID("policy."+list), !o.allows(list, row)
		case row.limitHit != "":
			isOwn := func(l limit) bool { return l.String() == row.limitHit }
			change, refuses = "#limits", slices.ContainsFunc(o.policy.Limits, isOwn)
			if o.maxRequests != nil && !refuses && requestsExhausted(*o.maxRequests).limit == row.limitHit {
				change, refuses = "#"+fieldID("max_requests"), true
			}
		}
		v.AllowedToday = v.AllowedToday && !refuses
		if refuses && v.ChangeURL == "" && r.hasRole(o.minRole) {
			v.ChangeURL = o.url + "/edit" + change
		}
	}
	return v, nil
}

// A refusalOwner is a project or a token whose policy may have refused a call.
type refusalOwner struct {
	name, url   string
	minRole     role // to change it
	policy      policy
	view        policyView
	maxRequests *int64
}

// refusalOwners returns the project and the token of a call, as far as they exist.
func (ui *adminUI) refusalOwners(r *pageRequest, row *requestView) (owners []refusalOwner, err error) {
	p, err := ui.store.projectByID(r.ctx, row.projectID)
	if err == nil {
		o := refusalOwner{name: "Project " + p.name, url: "/admin/projects/" + p.id, minRole: roleAdmin,
			view: newPolicyView(json.RawMessage(p.policy))}
		if o.policy, err = parsePolicy([]byte(p.policy), true); err == nil {
			owners = append(owners, o)
		}
	}
	if err != nil && !errors.Is(err, errNotFound) {
		return nil, err
	}
	t, err := ui.store.tokenByID(r.ctx, row.tokenID)
	if err == nil && t.revokedAt == nil {
		o := refusalOwner{name: "Token " + t.name, url: "/admin/tokens/" + t.id, minRole: roleOperator,
			view: newPolicyView(json.RawMessage(t.policy)), maxRequests: t.maxRequests}
		if o.policy, err = parsePolicy([]byte(t.policy), false); err == nil {
			owners = append(owners, o)
		}
	}
	if err != nil && !errors.Is(err, errNotFound) {
		return nil, err
	}
	return owners, nil
}

// allows reports whether a list of the policy allows a call.
func (o *refusalOwner) allows(list string, row *requestView) bool {
	switch list {
	case "models":
		return o.policy.Models == nil || row.model != "" && o.policy.allowsModel(row.model)
	case "endpoints":
		_, pattern, _ := strings.Cut(row.endpoint, " ")
		return o.policy.allowsEndpoint(row.endpoint, pattern)
	}
	return o.policy.allowsAddress(row.address)
}

// list returns a list of the policy by its name.
func (p *policyView) list(name string) *[]string {
	switch name {
	case "models":
		return p.Models
	case "endpoints":
		return p.Endpoints
	}
	return p.Addresses
}

// projectCharts returns charts of a project's calls and cost over the last 30 days.
func (ui *adminUI) projectCharts(r *pageRequest, project string) (charts []chartView, err error) {
	q, err := ui.parseDashQuery(r, url.Values{"period": {"30d"}, "project": {project}})
	if err != nil {
		return nil, err
	}
	d := &dashData{}
	if err := d.readUsage(r.ctx, ui.store, q); err != nil {
		return nil, err
	}
	d.nameSeries(q, "calls", "cost")
	for _, q.metric = range []string{"calls", "cost"} {
		charts = append(charts, d.usageChart(q, q.metric))
	}
	return charts, nil
}
