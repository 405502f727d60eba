// This file has the pages of /admin about tokens, and about the calls that are running. The value of a token is on one
// page only: the response to the form that created or rotated it.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/url"
	"slices"
	"strings"
	"time"
)

const (
	expiringSoon      = 7 * 24 * time.Hour
	maxProjectOptions = 2000
)

// advancedOfToken says what the advanced fields of a token are about.
const advancedOfToken = "number of calls, idle expiry, endpoints, client addresses, attribution"

func (ui *adminUI) newTokenPage(r *pageRequest) (*pageResponse, error) {
	projectID := cmp.Or(r.form.Get("project_id"), r.query.Get("project_id"))
	like := r.query.Get("like")
	projects, err := ui.projectOptions(r, projectID)
	if err != nil {
		return nil, err
	}
	if projects = projects[1:]; len(projects) == 0 {
		return &pageResponse{template: "no-project", title: "New token"}, nil
	}
	fields := formFields(ui.ops.fields.token, "project_id", "name", "expires_at", "max_requests", "idle_expiry_minutes")
	fields[0].Options = projects
	date := fields[2]
	date.Label, date.Help, date.Short = "Expiry date (UTC)", "expiry-date", true
	date.Empty = emptyValue // “On a date” without a date is a mistake, not a token that never expires
	fields = slices.Insert(fields, 2, &formField{Name: "lifetime", Label: "Expires", Kind: "select", Required: true,
		Short: true, Options: options("1", "In 1 hour", "8", "In 8 hours", "24", "In 1 day", "168", "In 7 days",
			"720", "In 30 days", "2160", "In 90 days", "8760", "In 1 year", "never", "Never expires",
			"", "On a date")})
	v := &formView{Crumb: option{"/admin/tokens", "Tokens"}, Policy: newPolicyForm(false, nil),
		Form: &pageForm{Submit: "Create token", Cancel: "/admin/tokens", Creates: "token", Fields: fields}}
	v.Form.setAdvanced(advancedOfToken, "max_requests", "idle_expiry_minutes")
	title, defaults := "New token", url.Values{"project_id": {projectID}, "lifetime": {"720"}}
	if like != "" {
		title = "New token like another"
		if defaults, err = ui.fillLikeToken(r, v, like); err != nil {
			return nil, err
		}
	}
	var in tokenInput
	targets := fieldTargets(&in, ui.ops.fields.token)
	return ui.submit(r, title, v, defaults, targets, func() (*pageResponse, error) {
		switch lifetime := r.form.Get("lifetime"); {
		case lifetime == "", in.expiresAt.value != "": // on the date: it overrides the list, which always has a choice
		case lifetime == "never":
			in.expiresAt = optional[string]{set: true, null: true}
		default:
			in.expiresAt = optional[string]{}
			hours := &formField{Name: "lifetime", Kind: "number"}
			hours.decode(lifetime, &in.hours)
		}
		t, value, err := ui.ops.createToken(r.ctx, r.origin, in)
		if err != nil {
			return nil, err
		}
		return ui.tokenValuePage(r, "Token created", &t, value)
	})
}

func (ui *adminUI) editToken(r *pageRequest) (*pageResponse, error) {
	t, err := ui.ops.getToken(r.ctx, r.pathValue("id"), valueQuery{}, r.now)
	if err != nil {
		return nil, err
	}
	tokenURL := "/admin/tokens/" + t.ID
	fields := formFields(ui.ops.fields.token, "name", "expires_at", "max_requests", "idle_expiry_minutes")
	v := &formView{Crumb: option{tokenURL, t.Name}, Policy: newPolicyForm(false, t.Policy), Form: &pageForm{
		Submit: "Save", Cancel: tokenURL, Version: t.Version, Fields: fields}}
	v.Form.setAdvanced(advancedOfToken, "max_requests", "idle_expiry_minutes")
	var in tokenInput
	targets := fieldTargets(&in, ui.ops.fields.token)
	return ui.submit(r, "Edit token", v, storedValues(t, fields), targets, func() (*pageResponse, error) {
		_, err := ui.ops.updateToken(r.ctx, r.origin, t.ID, r.ifMatchVersion, in)
		return redirectTo(tokenURL, "saved"), err
	})
}

func (ui *adminUI) rotateTokenPage(r *pageRequest) (*pageResponse, error) {
	t, err := ui.ops.getToken(r.ctx, r.pathValue("id"), valueQuery{}, r.now)
	if err != nil {
		return nil, err
	}
	tokenURL := "/admin/tokens/" + t.ID
	v := &formView{Crumb: option{tokenURL, t.Name}, Intro: "rotate", Form: &pageForm{
		Submit: "Rotate", Cancel: tokenURL, Creates: "value", Version: t.Version,
		Fields: formFields(ui.ops.fields.rotate, "overlap_minutes")}}
	var in rotateInput
	targets := fieldTargets(&in, ui.ops.fields.rotate)
	defaults := url.Values{"overlap_minutes": {"60"}}
	return ui.submit(r, "Rotate "+t.Name, v, defaults, targets, func() (*pageResponse, error) {
		row, value, err := ui.ops.rotateToken(r.ctx, r.origin, t.ID, r.ifMatchVersion, in)
		if err != nil {
			return nil, err
		}
		return ui.tokenValuePage(r, "Token rotated", &row, value)
	})
}

func (ui *adminUI) revokeTokenPage(r *pageRequest) (*pageResponse, error) {
	t, err := ui.ops.getToken(r.ctx, r.pathValue("id"), valueQuery{}, r.now)
	if err != nil {
		return nil, err
	}
	tokenURL := "/admin/tokens/" + t.ID
	v := &confirmView{Ask: "revoke-token", Form: &pageForm{Submit: "Revoke token", Cancel: tokenURL}}
	return r.confirm("Revoke "+t.Name+"?", v, redirectTo(tokenURL, "tokens-revoked"), func() error {
		_, err := ui.ops.revokeToken(r.ctx, r.origin, t.ID, r.ifMatchVersion)
		return err
	})
}

// revokeSelected revokes the tokens that were selected in the list, after asking.
func (ui *adminUI) revokeSelected(r *pageRequest) (*pageResponse, error) {
	ids := slices.Compact(slices.Sorted(slices.Values(r.form["id"])))
	switch {
	case len(ids) == 0:
		return redirectTo("/admin/tokens", "none-selected"), nil
	case len(ids) > 500:
		return nil, badRequest("invalid_value", "id", "At most 500 tokens can be revoked at once.")
	}
	form := &pageForm{Action: "/admin/tokens/revoke", Submit: "Revoke " + pluralize(int64(len(ids)), "token", "tokens"),
		Cancel: "/admin/tokens", Danger: true, Hidden: []labeledValue{{"sure", "yes"}}}
	var names []string
	for _, id := range ids {
		t, err := ui.store.tokenByID(r.ctx, id)
		if err != nil {
			return nil, err
		}
		names = append(names, t.name+" ("+id+")")
		form.Hidden = append(form.Hidden, labeledValue{"id", id})
	}
	if r.form.Get("sure") != "yes" {
		v, title := &confirmView{Ask: "revoke-tokens", Items: names, Form: form}, "Revoke these tokens?"
		if len(ids) == 1 {
			v.Ask, title = "revoke-token", "Revoke this token?"
		}
		return showPage("confirm", title, v), nil
	}
	for _, id := range ids {
		if _, err := ui.ops.revokeToken(r.ctx, r.origin, id, 0); err != nil {
			return nil, fmt.Errorf("revoking %s: %w", id, err)
		}
	}
	return redirectWithCount("/admin/tokens", "tokens-revoked", int64(len(ids))), nil
}

// A tokenValueView is the data of templates/token-once.html.
type tokenValueView struct {
	tokenView
	exampleCall
	Base        string // the proxy's base URL for clients
	ProjectName string
	NoUpstream  bool // its project has no active upstream: its calls are refused
}

// tokenValuePage shows a token's value, and how to use it.
func (ui *adminUI) tokenValuePage(r *pageRequest, title string, t *tokenRow, value secret) (*pageResponse, error) {
	v := tokenValueView{tokenView: ui.ops.newTokenValueView(t, value, r.now), Base: ui.publicBase(r)}
	state, err := ui.registry.readProject(r.ctx, t.project)
	if err != nil {
		return nil, err
	}
	policy, err := parsePolicy([]byte(t.policy), false)
	if err != nil {
		return nil, err
	}
	v.ProjectName, v.NoUpstream = state.name, len(state.upstreams) == 0
	v.exampleCall = ui.chooseExample(state, policy)
	return showPage("token-once", title, v), nil
}

// An exampleCall is what the snippets call: an endpoint and a model that the token may use, with the headers that
// its policies require.
type exampleCall struct {
	Kind    string // of the call, as templates/parts/snippets.html names it; "": the token may use none of them
	Model   string // "": the program knows no model that the token may use
	Guessed bool   // nothing says that the provider has the model
	Headers []labeledValue
	Body    string // for curl, in single quotes; "": a short one
}

// An exampleKind is a way to call upstreams of a provider: an endpoint, and models that most of them have.
type exampleKind struct {
	name, endpoint string
	api            apiFamily
	models         []string
}

func exampleKinds(provider string) []exampleKind {
	switch provider {
	case providerAnthropic:
		return []exampleKind{{"messages", "POST /v1/messages", apiAnthropic,
			[]string{"claude-haiku-4-5", "claude-sonnet-5", "claude-opus-5-5"}}}
	case providerGoogle:
		return []exampleKind{{"gemini", "POST " + geminiModelPrefix + "{model}:generateContent", apiGemini,
			[]string{"gemini-2.5-flash", "gemini-2.5-pro"}}}
	}
	models := []string{"gpt-4o-mini", "gpt-4.1-mini", "gpt-5-mini", "gpt-4o", "gpt-4.1", "gpt-5"}
	return []exampleKind{{"chat", "POST " + chatPattern, apiOpenAI, models},
		{"responses", "POST /v1/responses", apiOpenAI, models},
		{"embeddings", "POST /v1/embeddings", apiOpenAI, []string{"text-embedding-3-small"}}}
}

// chooseExample returns a call that the policies of the token and its project allow and that one of the project's
// upstreams serves.
func (ui *adminUI) chooseExample(project *projectState, token policy) (best exampleCall) {
	headers := requiredHeaders("example", project.policy.Attribution, token.Attribution)
	for _, u := range project.upstreams {
		for _, kind := range exampleKinds(u.provider) {
			_, pattern, _ := strings.Cut(kind.endpoint, " ")
			if u.weight == 0 || !token.allowsEndpoint(kind.endpoint, pattern) ||
				!project.policy.allowsEndpoint(kind.endpoint, pattern) {
				continue
			}
			named := slices.Concat(token.Models, project.policy.Models, u.models,
				slices.Sorted(maps.Keys(u.rewrite)), slices.Sorted(maps.Keys(project.routing.Aliases)))
			known := slices.Concat(named, kind.models, ui.listedModels(u.provider))
			i := slices.IndexFunc(known, func(model string) bool {
				return !ui.isOfOtherProvider(u, model) && kind.suits(project, token, model)
			})
			if i >= 0 {
				isGuess := i >= len(named) && (u.provider == providerCompatible || u.provider == providerAzure)
				return exampleCall{Kind: kind.name, Model: known[i], Guessed: isGuess, Headers: headers}
			}
			if best.Kind == "" {
				best = exampleCall{Kind: kind.name, Headers: headers}
			}
		}
	}
	return best
}

// listedModels returns the models of the built-in price list that upstreams of the provider may have.
func (ui *adminUI) listedModels(provider string) (models []string) {
	if provider == providerCompatible || provider == providerAzure {
		provider = ""
	}
	for _, p := range ui.ops.prices.Load().search("", provider) {
		models = append(models, p.from.Name)
	}
	return models
}

// isOfOtherProvider reports whether the price list has the model, but not of the provider of an upstream that is to
// serve whatever it has.
func (ui *adminUI) isOfOtherProvider(u *upstream, model string) bool {
	prices := ui.ops.prices.Load()
	anyHost := u.provider == providerCompatible || u.provider == providerAzure
	return !anyHost && len(u.models) == 0 && prices.lookupListed(u.provider, model) == nil &&
		prices.lookupAny(model) != nil
}

// suits reports whether the model is one for calls of this kind, the token may use it, and an upstream serves it.
func (kind *exampleKind) suits(project *projectState, token policy, model string) bool {
	isOf := func(word string) bool { return strings.Contains(model, word) }
	others := []string{"audio", "dall-e", "image", "imagen", "moderation", "realtime", "rerank", "search", "sora",
		"speech", "transcribe", "tts", "veo", "video", "whisper"}
	if !isShellSafe(model) || isOf("embed") != (kind.name == "embeddings") || slices.ContainsFunc(others, isOf) {
		return false
	}
	allowed := func(model string) bool { return project.policy.allowsModel(model) && token.allowsModel(model) }
	c := criteria{api: kind.api, model: model}
	if models := project.resolveAlias(c, allowed); len(models) > 0 {
		c.model = models[0]
	}
	return allowed(c.model) && project.hasCandidate(&c, nil)
}

// requiredHeaders returns headers with the attributes that the policies require. word is a part of their values.
func requiredHeaders(word string, policies ...*attributionPolicy) (headers []labeledValue) {
	var tags []string
	for _, p := range policies {
		if p == nil {
			continue
		}
		for _, attribute := range p.Required {
			key, isTag := strings.CutPrefix(attribute, tagAttribute)
			header := labeledValue{"X-LLM-Proxy-Session", word + "-session"}
			if attribute == endUserAttribute {
				header = labeledValue{"X-LLM-Proxy-End-User", word + "-user"}
			}
			switch {
			case isTag && !slices.Contains(tags, key+"="+word):
				tags = append(tags, key+"="+word)
			case !isTag && !slices.Contains(headers, header):
				headers = append(headers, header)
			}
		}
	}
	if len(tags) > 0 {
		headers = append(headers, labeledValue{"X-LLM-Proxy-Tags", strings.Join(tags, ",")})
	}
	return headers
}

// isShellSafe reports whether a model's name can be pasted into a shell, a URL and source code unquoted.
func isShellSafe(model string) bool {
	return model != "" && !strings.ContainsFunc(model, func(c rune) bool {
		return !strings.ContainsRune(base62+"-_.:/", c)
	})
}

// publicBase returns the base URL for clients, as far as the proxy knows it.
func (ui *adminUI) publicBase(r *pageRequest) string {
	switch {
	case ui.cfg.publicURL != nil:
		return ui.cfg.publicURL.Scheme + "://" + ui.cfg.publicURL.Host
	case r.secure:
		return "https://" + r.http.Host
	}
	return "http://" + r.http.Host
}

// A tokenPageView is the data of templates/token.html.
type tokenPageView struct {
	tokenView
	ProjectName string
	State       stateView
	Limits      []barView
	Values      string // the address of the page of values, "" if no limit has any
	Allowed     policyView
	Requests    *barView // usage of max_requests; nil: there is no such limit
	Calls       []requestListItem
	Failures    []requestListItem // the latest of the last 30 days
	Use         useView
	Charts      []chartView
	Models      rankingTable
	History     []auditLine // the latest changes; only for roles that see the audit trail
}

// shownFailures and shownChanges are how many entries the page of a token or project has.
const (
	shownFailures = 5
	shownChanges  = 10
)

func (ui *adminUI) tokenPage(r *pageRequest) (*pageResponse, error) {
	t, err := ui.ops.getToken(r.ctx, r.pathValue("id"), valueQuery{top: shownValues}, r.now)
	if err != nil {
		return nil, err
	}
	v := tokenPageView{tokenView: t, State: newTokenStateView(&t, r.now), Limits: newBarViews(t.Limits),
		Values: valuesURL("/admin/tokens/"+t.ID, t.Limits), Allowed: newPolicyView(t.Policy)}
	if v.ProjectName, err = ui.projectName(r, t.ProjectID); err != nil {
		return nil, err
	}
	if t.MaxRequests != nil {
		b := newBarView(float64(t.RequestCount), float64(*t.MaxRequests))
		b.Used, b.Max = groupDigits(t.RequestCount), groupDigits(*t.MaxRequests)
		v.Requests = &b
	}
	ui.awaitRecorded(r)
	calls, _, err := ui.store.requestsPage(r.ctx, requestFilter{token: t.ID, before: math.MaxInt64, limit: 10})
	for i := range calls {
		v.Calls = append(v.Calls, newRequestListItem(&calls[i]))
	}
	if err != nil {
		return nil, err
	}
	if v.Failures, err = ui.latestFailures(r, requestFilter{token: t.ID}); err != nil {
		return nil, err
	}
	if err := ui.addTokenCharts(r, &v); err != nil {
		return nil, err
	}
	v.History, err = ui.objectHistory(r, t.ID)
	forecastLimits(v.Limits, r.now)
	return showPage("token", t.Name+" · Tokens", v), err
}

// latestFailures returns the latest calls of the last 30 days that failed, of those that f lets through.
func (ui *adminUI) latestFailures(r *pageRequest, f requestFilter) (list []requestListItem, err error) {
	f.outcome, f.limit, f.before = failedOutcomes, shownFailures, math.MaxInt64
	f.from = minIDAt(time.UnixMilli(recentFrom(r.now.UnixMilli())))
	rows, _, err := ui.store.requestsPage(r.ctx, f)
	for i := range rows {
		list = append(list, newRequestListItem(&rows[i]))
	}
	return list, err
}

// addTokenCharts adds what a token has used in the last 30 days, by day and model.
func (ui *adminUI) addTokenCharts(r *pageRequest, v *tokenPageView) error {
	q, err := ui.parseDashQuery(r, url.Values{"period": {"30d"}})
	if err != nil {
		return err
	}
	q.tokenID, q.groupBy = v.ID, "model"
	d := &dashData{steps: make([]hourSum, q.steps())}
	byDay := q.usageQuery(usageQuery{interval: q.grain, byModel: true, token: v.ID})
	if d.modelPoints, err = ui.store.usage(r.ctx, byDay); err != nil {
		return err
	}
	for i := range d.modelPoints {
		p := &d.modelPoints[i]
		if step := q.index(p.at); step >= 0 && step < len(d.steps) {
			sum := hourSum{calls: p.calls, input: p.input, output: p.output, cost: p.cost}
			d.steps[step].merge(&sum)
			d.total.merge(&sum)
		}
	}
	v.Use = useView{Calls: d.total.calls, Cost: dollars(d.total.cost)}
	if d.total.calls == 0 {
		return nil
	}
	d.nameSeries(q, "calls", "cost")
	for _, q.metric = range []string{"calls", "cost"} {
		v.Charts = append(v.Charts, d.usageChart(q, q.metric))
	}
	if d.total.cost == 0 {
		q.metric = "calls"
	}
	v.Models = d.ranking(q, "Models", d.usageByModel(q), q.valueOf(d.total.totals()))
	return nil
}

// objectHistory returns the latest entries of the audit trail about an object, none for a role that may not see it.
func (ui *adminUI) objectHistory(r *pageRequest, id string) ([]auditLine, error) {
	if !r.hasRole(roleAdmin) {
		return nil, nil
	}
	page, err := ui.ops.listAudit(r.ctx, auditFilter{object: id, from: math.MinInt64, to: math.MaxInt64,
		beforeAt: math.MaxInt64, beforeSeq: math.MaxInt64, limit: shownChanges + 1})
	if err != nil {
		return nil, err
	}
	return ui.auditLines(r, page.Data)
}

// forecastLimits says of limits of a day or longer when they will be used up if use goes on as it has since the start
// of their window, unless it has just begun.
func forecastLimits(bars []barView, now time.Time) {
	for i := range bars {
		b := &bars[i]
		if b.limit == nil || !b.limit.isQuota() || b.ForEach != "" {
			continue
		}
		start, end := b.limit.period.window(now.UnixMilli())
		at := forecast(jsonFloat(b.limitView.Used), jsonFloat(b.limitView.Max), start, end, now.UnixMilli())
		if at > 0 {
			b.UsedUpAt = new(timestamp(at))
		}
	}
}

// forecast returns when use of max will be complete if it goes on as since the start of its window; 0 if it will not be
// within the window, is already, or if less than a twentieth of the window has passed.
func forecast(used, limit float64, start, end, now int64) int64 {
	passed := float64(now - start)
	if end <= start || used <= 0 || used >= limit || passed < float64(end-start)/20 {
		return 0
	}
	at := float64(start) + passed*limit/used
	if at >= float64(end) {
		return 0
	}
	return int64(at)
}

// projectName returns a project's name, or a text if the project was deleted.
func (ui *adminUI) projectName(r *pageRequest, id string) (string, error) {
	p, err := ui.store.projectByID(r.ctx, id)
	if errors.Is(err, errNotFound) {
		return "(deleted project)", nil
	}
	return p.name, err
}

// A stateView is a state and its color: good, warn or bad.
type stateView struct{ Kind, Text string }

// newTokenStateView returns the state of a token now.
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
	case expiresSoon(t.ExpiresAt, now):
		return stateView{"warn", "expires soon"}
	}
	return stateView{"good", "active"}
}

func expiresSoon(at *timestamp, now time.Time) bool {
	return at != nil && int64(*at) <= now.Add(expiringSoon).UnixMilli()
}

// A barView is the usage of a limit. Level is "", warn or bad.
type barView struct {
	limitView
	Text            string // the limit as a sentence; "": of calls in total, or of one value
	Level           string
	Percent         int
	Used, Max, Left string
	Top             []barView  // of a limit with for_each: the values that have used most
	Value, CallsURL string     // of these; CallsURL may be ""
	UsedUpAt        *timestamp // at the pace of its window; nil: not before its end, or not known
}

// shownValues is how many values of a limit pages show.
const shownValues = 10

// newBarViews returns the usage of limits.
func newBarViews(limits []limitView) (bars []barView) {
	for _, l := range limits {
		quantity := func(raw json.RawMessage) string {
			if l.Count == metricDollars.String() {
				return formatMoney(int64(math.Round(jsonFloat(raw) * 1e9)))
			}
			return groupDigits(int64(jsonFloat(raw)))
		}
		var b barView
		if l.ForEach == "" {
			b = newBarView(jsonFloat(l.Used), jsonFloat(l.Max))
		}
		b.limitView, b.Text = l, l.limit.String()
		b.Used, b.Max, b.Left = quantity(l.Used), quantity(l.Max), quantity(l.Left)
		for _, v := range l.Values {
			top := newBarView(jsonFloat(v.Used), jsonFloat(l.Max))
			top.Value, top.Used, top.Max, top.Left = v.Value, quantity(v.Used), b.Max, quantity(v.Left)
			b.Top = append(b.Top, top)
		}
		bars = append(bars, b)
	}
	return bars
}

func newBarView(used, limit float64) (b barView) {
	switch {
	case limit <= 0 || used >= limit:
		b.Percent, b.Level = 100, "bad"
		if used <= 0 {
			b.Percent = 0
		}
	case used > 0:
		b.Percent = max(1, int(100*used/limit))
		if b.Percent >= 80 {
			b.Level = "warn"
		}
	}
	return b
}

func jsonFloat(raw json.RawMessage) (f float64) {
	_ = json.Unmarshal(raw, &f) // cannot fail: the operations return numbers
	return f
}

// projectOptions returns the projects by name, after an option for all of them. The selected one is
// included even if there are too many.
func (ui *adminUI) projectOptions(r *pageRequest, selected string) ([]option, error) {
	rows, err := ui.store.projectNames(r.ctx, maxProjectOptions)
	if err != nil {
		return nil, err
	}
	list := make([]option, 0, len(rows)+2)
	for _, p := range rows {
		list = append(list, option{p.id, p.name})
	}
	if selected != "" && !slices.ContainsFunc(list, func(o option) bool { return o.Value == selected }) {
		p, err := ui.store.projectByID(r.ctx, selected)
		if err != nil && !errors.Is(err, errNotFound) {
			return nil, err
		}
		list = append(list, option{selected, cmp.Or(p.name, selected)})
	}
	slices.SortStableFunc(list, func(a, b option) int {
		return cmp.Compare(strings.ToLower(a.Label), strings.ToLower(b.Label))
	})
	return slices.Insert(list, 0, option{"", "All projects"}), nil
}

// nameProjects fills in the names of the tokens' projects.
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

// stormAlerts lists the requests that fail again and again.
func (ui *adminUI) stormAlerts(q *dashQuery) (alerts []dashAlert) {
	for _, s := range ui.storms(q.now) {
		if !q.includes(s.projectID) || len(alerts) == maxAlertsPerKind {
			continue
		}
		link := url.Values{"token": {s.tokenID}, "from": {timestamp(s.firstAt).datetimeLocal()}}
		alerts = append(alerts, dashAlert{Level: "warn", Kind: "storm", Project: s.project, ProjectID: s.projectID,
			Token: s.tokenName, TokenID: s.tokenID, Reason: s.code, Calls: groupDigits(s.failures),
			Endpoint: s.endpoint.name(), Link: "/admin/requests?" + link.Encode(), At: timestamp(s.firstAt),
			Last: timestamp(s.lastAt)})
	}
	return alerts
}

// expiryAlerts lists the tokens that expire within a week, and counts those that it has no line for.
func (d *dashData) expiryAlerts(q *dashQuery) (alerts []dashAlert) {
	others := dashAlert{Level: "warn", Kind: "expiry", AtLeast: len(d.expiring) == maxExpiringTokens}
	for _, t := range d.expiring {
		switch {
		case !q.includes(t.projectID), strings.HasPrefix(t.name, playgroundTokenName): // these are renewed on use
		case len(alerts) < maxAlertsPerKind:
			alerts = append(alerts, dashAlert{Level: "warn", Kind: "expiry", Project: t.project, ProjectID: t.projectID,
				Token: t.name, TokenID: t.id, At: timestamp(t.expiresAt)})
		default:
			others.Others++
		}
	}
	if others.Others > 0 {
		alerts = append(alerts, others)
	}
	return alerts
}

// sharesOf returns what each of some series has in the whole period.
func sharesOf(all []usageSeries) (shares []usageShare) {
	for _, s := range all {
		shares = append(shares, usageShare{id: s.id, name: s.name, usageTotals: s.total})
	}
	return shares
}

// usageByModel returns the usage of each model, the largest first.
func (d *dashData) usageByModel(q *dashQuery) []usageShare { return sharesOf(d.modelSeries(q)) }

// A streamsView is the data of templates/streams.html.
type streamsView struct {
	Calls  []streamView
	Next   string
	Now    timestamp
	Silent []int64 // replicas that did not answer
}

func (ui *adminUI) streamsPage(r *pageRequest) (*pageResponse, error) {
	f, err := ui.ops.parseStreamFilter(r.listRequest(200, "project_id", "token_id", "session", "end_user", "tag"))
	if err != nil {
		return nil, err
	}
	page, err := ui.ops.listStreams(r.ctx, f, r.now)
	return showPage("streams", "Running calls", streamsView{Calls: page.Data, Next: r.nextPageURL(page.Next),
		Now: timestamp(r.now.UnixMilli()), Silent: page.SilentReplicas}), err
}

func (ui *adminUI) endCallPage(r *pageRequest) (*pageResponse, error) {
	id := r.pathValue("id")
	if _, err := ui.ops.findStream(r.ctx, id, r.now); err != nil {
		return nil, err
	}
	form := &pageForm{Submit: "End call", Cancel: "/admin/streams"}
	v := &confirmView{Ask: "end-call", Items: []string{id}, Form: form}
	return r.confirm("End this call?", v, redirectTo("/admin/streams", "ended-call"), func() error {
		return ui.ops.abortStream(r.ctx, r.origin, id)
	})
}
