// Handlers of /manage for projects. A provider's key comes in here and never
// goes out again: no answer has it, whatever the role.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"
)

// addOpenAIProject makes a project with one upstream, OpenAI with this key.
func (api *manageAPI) addOpenAIProject(ctx context.Context, name, policy string, key secret, at time.Time) (*projectRow, *upstreamRow, error) {
	ms := at.UnixMilli()
	project := &projectRow{id: newID("proj"), name: name, active: true, policy: policy, routing: "{}", createdAt: ms, updatedAt: ms}
	up := newUpstreamRow(project, ms)
	in := upstreamInput{name: optional[string]{set: true, value: "primary"}, key: optional[secret]{set: true, value: key}}
	if err := in.apply(api, up, true); err != nil {
		return nil, nil, err
	}
	if err := api.store.addProject(ctx, systemOrigin(time.Now()), project, up); err != nil {
		return nil, nil, fmt.Errorf("storing the project: %w", err)
	}
	return project, up, nil
}

// newUpstreamRow returns an upstream of the project, for an upstreamInput to
// fill in.
func newUpstreamRow(p *projectRow, ms int64) *upstreamRow {
	return &upstreamRow{id: newID("up"), project: p.seq, projectID: p.id, weight: 1, models: "[]", rewrite: "{}", settings: "{}", sharedWith: "[]", active: true, createdAt: ms, updatedAt: ms}
}

type projectView struct {
	ID        string          `json:"id"`
	Name      string          `json:"name"`
	IsActive  bool            `json:"is_active"`
	Policy    json.RawMessage `json:"policy"`
	Routing   json.RawMessage `json:"routing"`
	Upstreams []upstreamView  `json:"upstreams"`
	Version   int64           `json:"version"`
	CreatedAt timestamp       `json:"created_at"`
	UpdatedAt timestamp       `json:"updated_at"`
	Limits    []limitView     `json:"limits,omitzero"` // how those of the policy stand; of one project that is read
}

// newProjectView reads the project's upstreams to go with it.
func (api *manageAPI) newProjectView(r *manageRequest, p *projectRow) (projectView, error) {
	ups, err := api.store.projectUpstreams(r.ctx, p.seq)
	v := projectView{p.id, p.name, p.active, json.RawMessage(p.policy), json.RawMessage(p.routing), []upstreamView{}, p.version, timestamp(p.createdAt), timestamp(p.updatedAt), nil}
	for i := range ups {
		v.Upstreams = append(v.Upstreams, api.newUpstreamView(&ups[i]))
	}
	return v, err
}

func (api *manageAPI) projectResponse(r *manageRequest, status int, p *projectRow) (*manageResponse, error) {
	v, err := api.newProjectView(r, p)
	return &manageResponse{status, p.version, v}, err
}

func (api *manageAPI) listProjects(r *manageRequest) (*manageResponse, error) {
	page, err := r.parseListQuery("active", "name")
	if err != nil {
		return nil, err
	}
	active, err := r.boolParam("active")
	if err != nil {
		return nil, err
	}
	rows, err := api.store.listProjects(r.ctx, page.seq, page.limit+1, active, r.query.Get("name"))
	if err != nil {
		return nil, err
	}
	views := make([]projectView, 0, len(rows))
	for i := range rows {
		v, err := api.newProjectView(r, &rows[i])
		if err != nil {
			return nil, err
		}
		views = append(views, v)
	}
	l := listPage[projectView]{Data: views[:min(len(views), page.limit)]}
	if len(rows) > page.limit {
		l.Next = formatCursor(rows[page.limit-1].seq, "")
	}
	return &manageResponse{body: l}, nil
}

// createProject makes a project and, when a key is given, its first upstream.
func (api *manageAPI) createProject(r *manageRequest) (*manageResponse, error) {
	var name, provider, baseURL optional[string]
	var key, openaiKey optional[secret]
	var active optional[bool]
	var pol, rt optional[json.RawMessage]
	if err := decodeObject(r.body, map[string]any{"name": &name, "api_key": &key, "openai_api_key": &openaiKey,
		"provider": &provider, "base_url": &baseURL, "is_active": &active, "policy": &pol, "routing": &rt}); err != nil {
		return nil, err
	}
	if err := validateName(name.value); err != nil {
		return nil, err
	}
	if key.hasValue() && openaiKey.hasValue() {
		return nil, &fieldError{"api_key", "and openai_api_key exclude each other"}
	}
	now := r.now.UnixMilli()
	p := &projectRow{id: newID("proj"), name: name.value, active: !active.hasValue() || active.value, policy: "{}", routing: "{}", createdAt: now, updatedAt: now}
	if pol.hasValue() {
		parsed, err := parsePolicy(pol.value, true)
		if err != nil {
			return nil, err
		}
		p.policy = parsed.String()
	}
	if rt.hasValue() {
		parsed, err := parseRouting(rt.value)
		if err != nil {
			return nil, err
		}
		p.routing = parsed.String()
	}
	var up *upstreamRow
	if openaiKey.hasValue() {
		key = openaiKey
	}
	if key.hasValue() {
		in := upstreamInput{name: optional[string]{set: true, value: "primary"}, provider: provider, baseURL: baseURL, key: key}
		up = newUpstreamRow(p, now)
		if err := in.apply(api, up, true); err != nil {
			return nil, err
		}
	} else if provider.set || baseURL.set {
		return nil, &fieldError{"api_key", "is needed with provider or base_url"}
	}
	if err := api.store.addProject(r.ctx, r.origin, p, up); err != nil {
		return nil, err
	}
	return api.projectResponse(r, http.StatusCreated, p)
}

func (api *manageAPI) getProject(r *manageRequest) (*manageResponse, error) {
	p, err := api.store.projectByID(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	v, err := api.newProjectView(r, &p)
	if err == nil {
		v.Limits, err = api.limits.projectLimits(r.ctx, &p, r.now.UnixMilli())
	}
	return &manageResponse{0, p.version, v}, err
}

func (api *manageAPI) patchProject(r *manageRequest) (*manageResponse, error) {
	var name optional[string]
	var active optional[bool]
	var pol, rt optional[json.RawMessage]
	if err := decodeObject(r.body, map[string]any{"name": &name, "is_active": &active, "policy": &pol, "routing": &rt}, "policy", "routing"); err != nil {
		return nil, err
	}
	p, err := api.store.changeProject(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, r.now.UnixMilli(), func(p *projectRow) error {
		if name.set {
			if err := validateName(name.value); err != nil {
				return err
			}
			p.name = name.value
		}
		if active.set {
			p.active = active.value
		}
		if pol.set {
			parsed, err := parsePolicy(objectOrEmpty(pol), true)
			if err != nil {
				return err
			}
			p.policy = parsed.String()
		}
		if rt.set {
			parsed, err := parseRouting(objectOrEmpty(rt))
			if err != nil {
				return err
			}
			p.routing = parsed.String()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := api.registry.projectChanged(r.ctx, p.seq, false); err != nil {
		return nil, err
	}
	return api.projectResponse(r, 0, &p)
}

// objectOrEmpty returns an object that was given, or the empty one for null.
func objectOrEmpty(p optional[json.RawMessage]) []byte {
	if p.null {
		return []byte("{}")
	}
	return p.value
}

func (api *manageAPI) deleteProject(r *manageRequest) (*manageResponse, error) {
	p, err := api.store.deleteProject(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, r.now.UnixMilli())
	if err != nil {
		return nil, err
	}
	if err := errors.Join(api.registry.projectChanged(r.ctx, p.seq, true), api.registry.upstreamsChanged(r.ctx, p.seq, nil)); err != nil {
		return nil, err
	}
	return &manageResponse{body: map[string]any{"id": p.id, "deleted": true}}, nil
}

func (api *manageAPI) revokeProjectTokens(r *manageRequest) (*manageResponse, error) {
	if err := decodeObject(r.body, map[string]any{}); err != nil {
		return nil, err
	}
	p, err := api.store.projectByID(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	n, err := api.store.revokeTokens(r.ctx, r.origin, p.id, r.now.UnixMilli())
	if err != nil {
		return nil, err
	}
	if err := api.registry.projectChanged(r.ctx, p.seq, true); err != nil {
		return nil, err
	}
	return &manageResponse{body: map[string]any{"revoked": n}}, nil
}

type upstreamView struct {
	ID            string          `json:"id"`
	ProjectID     string          `json:"project_id"`
	Name          string          `json:"name"`
	Provider      string          `json:"provider"`
	BaseURL       string          `json:"base_url"`
	KeyHint       string          `json:"key_hint"`
	Organization  string          `json:"organization"`
	OpenAIProject string          `json:"openai_project"`
	Weight        int64           `json:"weight"`
	Priority      int64           `json:"priority"`
	Models        json.RawMessage `json:"models"`
	Rewrite       json.RawMessage `json:"rewrite"`
	ConnectMS     int64           `json:"connect_ms"`
	AnswerMS      int64           `json:"answer_ms"`
	FirstEventMS  int64           `json:"first_event_ms"`
	IdleMS        int64           `json:"idle_ms"`
	Requests      int64           `json:"requests_per_minute"`
	Tokens        int64           `json:"tokens_per_minute"`
	Note          string          `json:"note"`
	SharedWith    json.RawMessage `json:"shared_with"`
	IsActive      bool            `json:"is_active"`
	Version       int64           `json:"version"`
	CreatedAt     timestamp       `json:"created_at"`
	UpdatedAt     timestamp       `json:"updated_at"`
	Health        healthView      `json:"health"`
}

func (api *manageAPI) newUpstreamView(u *upstreamRow) upstreamView {
	var set upstreamSettings
	_ = json.Unmarshal([]byte(u.settings), &set) // what we wrote
	return upstreamView{u.id, u.projectID, u.name, u.provider, u.baseURL, u.keyHint, u.organization, u.openaiProject,
		u.weight, u.priority, json.RawMessage(u.models), json.RawMessage(u.rewrite), set.ConnectMS, set.AnswerMS, set.FirstEventMS, set.IdleMS,
		set.RequestsPerMinute, set.TokensPerMinute, set.Note, json.RawMessage(u.sharedWith), u.active, u.version, timestamp(u.createdAt), timestamp(u.updatedAt), api.newHealthView(u)}
}

// An upstreamInput is what an admin may say about an upstream.
type upstreamInput struct {
	name, provider, baseURL, organization, openaiProject                          optional[string]
	key                                                                           optional[secret]
	weight, priority                                                              optional[int64]
	models                                                                        optional[[]string]
	rewrite                                                                       optional[json.RawMessage]
	connectMS, answerMS, firstEventMS, idleMS, requestsPerMinute, tokensPerMinute optional[int64]
	note                                                                          optional[string]
	sharedWith                                                                    optional[[]string]
	active                                                                        optional[bool]
}

func (in *upstreamInput) decode(body []byte) error {
	return decodeObject(body, map[string]any{"name": &in.name, "provider": &in.provider, "base_url": &in.baseURL, "api_key": &in.key,
		"organization": &in.organization, "openai_project": &in.openaiProject, "weight": &in.weight, "priority": &in.priority,
		"models": &in.models, "rewrite": &in.rewrite, "connect_ms": &in.connectMS, "answer_ms": &in.answerMS,
		"first_event_ms": &in.firstEventMS, "idle_ms": &in.idleMS, "requests_per_minute": &in.requestsPerMinute, "tokens_per_minute": &in.tokensPerMinute, "note": &in.note, "shared_with": &in.sharedWith, "is_active": &in.active})
}

// apply checks the input and puts it into row, whose id and projectID are set.
func (in *upstreamInput) apply(s *manageAPI, row *upstreamRow, isNew bool) error {
	if err := in.applyIdentity(row, isNew); err != nil {
		return err
	}
	if err := in.applyDestination(s, row, isNew); err != nil {
		return err
	}
	for _, apply := range [...]func(*upstreamRow) error{in.applyAccount, in.applyWeight, in.applyModels, in.applySharing, in.applySettings} {
		if err := apply(row); err != nil {
			return err
		}
	}
	if in.active.hasValue() {
		row.active = in.active.value
	}
	return nil
}

// applyIdentity takes over the name and, of a new upstream, the provider.
func (in *upstreamInput) applyIdentity(row *upstreamRow, isNew bool) error {
	if in.name.set || isNew {
		if err := validateName(in.name.value); err != nil {
			return err
		}
		row.name = in.name.value
	}
	if !isNew {
		if in.provider.set {
			return &fieldError{"provider", "cannot be changed; make another upstream"}
		}
		return nil
	}
	row.provider = providerOpenAI
	if in.provider.hasValue() {
		row.provider = in.provider.value
	}
	if !slices.Contains([]string{providerOpenAI, providerAnthropic, providerAzure, providerCompatible}, row.provider) {
		return &fieldError{"provider", "must be openai, anthropic, azure or compatible"}
	}
	return nil
}

// applyAccount takes over which account of the provider's pays.
func (in *upstreamInput) applyAccount(row *upstreamRow) error {
	for _, f := range []struct {
		name string
		in   optional[string]
		to   *string
	}{{"organization", in.organization, &row.organization}, {"openai_project", in.openaiProject, &row.openaiProject}} {
		if !f.in.set {
			continue
		}
		for _, c := range f.in.value {
			if c <= ' ' || c > '~' || len(f.in.value) > 200 {
				return &fieldError{f.name, "must be a provider's id: at most 200 printable ASCII characters"}
			}
		}
		*f.to = f.in.value
	}
	return nil
}

// applyWeight takes over which share of the calls it gets.
func (in *upstreamInput) applyWeight(row *upstreamRow) error {
	for _, f := range []struct {
		name string
		in   optional[int64]
		to   *int64
	}{{"weight", in.weight, &row.weight}, {"priority", in.priority, &row.priority}} {
		if !f.in.hasValue() {
			continue
		}
		if f.in.value < 0 || f.in.value > 1000 {
			return &fieldError{f.name, "must be from 0 to 1000"}
		}
		*f.to = f.in.value
	}
	return nil
}

// applyModels takes over which models it serves, and its own names for them.
func (in *upstreamInput) applyModels(row *upstreamRow) error {
	if in.models.set {
		if err := checkPatterns("models", in.models.value); err != nil {
			return err
		}
		b, err := json.Marshal(append([]string{}, in.models.value...))
		if err != nil {
			return err
		}
		row.models = string(b)
	}
	if in.rewrite.hasValue() {
		names, err := parseRewrite(in.rewrite.value)
		if err != nil {
			return err
		}
		b, err := json.Marshal(names)
		if err != nil {
			return err
		}
		row.rewrite = string(b)
	}
	return nil
}

// applySharing takes over which other projects it serves.
func (in *upstreamInput) applySharing(row *upstreamRow) error {
	if !in.sharedWith.set {
		return nil
	}
	ids := slices.Compact(slices.Sorted(slices.Values(in.sharedWith.value)))
	if len(ids) > 500 {
		return &fieldError{"shared_with", "must have 500 entries or fewer"}
	}
	b, err := json.Marshal(append([]string{}, ids...))
	if err != nil {
		return err
	}
	row.sharedWith = string(b)
	return nil
}

// applySettings takes over the upstream's own limits and patience.
func (in *upstreamInput) applySettings(row *upstreamRow) error {
	var set upstreamSettings
	if err := json.Unmarshal([]byte(row.settings), &set); err != nil {
		return fmt.Errorf("settings of upstream %s: %w", row.id, err)
	}
	for _, f := range []struct {
		in optional[int64]
		to *int64
	}{{in.connectMS, &set.ConnectMS}, {in.answerMS, &set.AnswerMS}, {in.firstEventMS, &set.FirstEventMS}, {in.idleMS, &set.IdleMS},
		{in.requestsPerMinute, &set.RequestsPerMinute}, {in.tokensPerMinute, &set.TokensPerMinute}} {
		if f.in.hasValue() {
			*f.to = f.in.value
		}
	}
	if in.note.hasValue() {
		set.Note = in.note.value
	}
	if err := set.check(); err != nil {
		return err
	}
	row.settings = set.String()
	return nil
}

// applyDestination takes over where calls go, and the key. A change of where
// they go needs the key anew: without that rule, whoever may edit a URL could
// have the key sent to a server of theirs.
func (in *upstreamInput) applyDestination(s *manageAPI, row *upstreamRow, isNew bool) error {
	if isNew {
		switch {
		case in.baseURL.hasValue():
			row.baseURL = in.baseURL.value
		case row.provider == providerOpenAI:
			row.baseURL = s.cfg.openaiURL
		case row.provider == providerAnthropic:
			row.baseURL = "https://api.anthropic.com"
		default:
			return &fieldError{"base_url", "is needed for this provider"}
		}
		if !in.key.hasValue() {
			return &fieldError{"api_key", "is needed"}
		}
	} else if in.baseURL.set {
		if in.baseURL.value != row.baseURL && !in.key.hasValue() {
			return &fieldError{"api_key", "must be given again when base_url changes"}
		}
		row.baseURL = in.baseURL.value
	}
	u, err := parseBaseURL(row.baseURL, s.cfg.allowPrivate)
	if err != nil {
		return &fieldError{"base_url", err.Error()} // an error of ours about the admin's text; no secret in it
	}
	row.baseURL = u.String()
	if !in.key.set {
		return nil
	}
	if err := checkProviderKey(in.key.value()); err != nil {
		return &fieldError{"api_key", err.Error()}
	}
	row.sealedKey = s.sealer.seal(in.key.value, sealContext(row.id, row.projectID, u.Scheme+"://"+u.Host))
	row.keyHint = in.key.value.hint()
	return nil
}

func (api *manageAPI) listUpstreams(r *manageRequest) (*manageResponse, error) {
	if err := r.checkParams(); err != nil {
		return nil, err
	}
	p, err := api.store.projectByID(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	rows, err := api.store.projectUpstreams(r.ctx, p.seq)
	if err != nil {
		return nil, err
	}
	return &manageResponse{body: newListPage(rows, len(rows), api.newUpstreamView, func(*upstreamRow) string { return "" })}, nil
}

func (api *manageAPI) createUpstream(r *manageRequest) (*manageResponse, error) {
	var in upstreamInput
	if err := in.decode(r.body); err != nil {
		return nil, err
	}
	p, err := api.store.projectByID(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	now := r.now.UnixMilli()
	row := newUpstreamRow(&p, now)
	if err := in.apply(api, row, true); err != nil {
		return nil, err
	}
	if err := api.store.addUpstream(r.ctx, r.origin, row, now); err != nil {
		return nil, err
	}
	if err := api.upstreamChanged(r, row); err != nil {
		return nil, err
	}
	return &manageResponse{http.StatusCreated, row.version, api.newUpstreamView(row)}, nil
}

func (api *manageAPI) getUpstream(r *manageRequest) (*manageResponse, error) {
	u, err := api.store.upstreamByID(r.ctx, r.pathValue("id"), r.pathValue("upstream"))
	if err != nil {
		return nil, err
	}
	return &manageResponse{0, u.version, api.newUpstreamView(&u)}, nil
}

func (api *manageAPI) patchUpstream(r *manageRequest) (*manageResponse, error) {
	var in upstreamInput
	if err := in.decode(r.body); err != nil {
		return nil, err
	}
	return api.changeUpstream(r, func(u *upstreamRow) (bool, error) { return false, in.apply(api, u, false) })
}

// deleteUpstream takes an upstream out of use and wipes its key. The row stays,
// for the ledger names it.
func (api *manageAPI) deleteUpstream(r *manageRequest) (*manageResponse, error) {
	rep, err := api.changeUpstream(r, func(u *upstreamRow) (bool, error) {
		u.active, u.sealedKey, u.keyHint = false, []byte{}, ""
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	return &manageResponse{body: map[string]any{"id": rep.body.(upstreamView).ID, "deleted": true}}, nil
}

func (api *manageAPI) changeUpstream(r *manageRequest, change func(*upstreamRow) (bool, error)) (*manageResponse, error) {
	u, err := api.store.changeUpstream(r.ctx, r.origin, r.pathValue("id"), r.pathValue("upstream"), r.ifMatchVersion, r.now.UnixMilli(), change)
	if err != nil {
		return nil, err
	}
	api.health.reset(u.seq, r.now.UnixMilli())
	if err := api.upstreamChanged(r, &u); err != nil {
		return nil, err
	}
	return &manageResponse{0, u.version, api.newUpstreamView(&u)}, nil
}

// upstreamChanged puts a changed upstream in force, wherever it serves.
func (api *manageAPI) upstreamChanged(r *manageRequest, u *upstreamRow) error {
	sharers, err := api.store.sharedProjects(r.ctx, u.seq)
	return errors.Join(err, api.registry.upstreamsChanged(r.ctx, u.project, sharers))
}
