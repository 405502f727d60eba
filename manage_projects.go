// This file has the handlers of /manage for projects, upstreams, tokens and management keys, and how these are shown.
// No response contains a provider key. The value of a token or management key is only in the one that created it.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

type projectView struct {
	ID       string          `json:"id"`
	Name     string          `json:"name"`
	IsActive bool            `json:"is_active"`
	Policy   json.RawMessage `json:"policy"`
	Routing  json.RawMessage `json:"routing"`
	// CostMultiplier is what the project pays of the prices: 0.8 for a discount of 20 percent.
	CostMultiplier json.Number    `json:"cost_multiplier"`
	Upstreams      []upstreamView `json:"upstreams"`
	Version        int64          `json:"version"`
	CreatedAt      timestamp      `json:"created_at"`
	UpdatedAt      timestamp      `json:"updated_at"`
	Limits         []limitView    `json:"limits,omitzero"` // the state of the limits; only in a single project
}

func (v projectView) etag() int64 { return v.Version }

// newProjectView shows a project with its upstreams, which it reads.
func (ops *operations) newProjectView(ctx context.Context, p *projectRow) (projectView, error) {
	upstreams, err := ops.store.projectUpstreams(ctx, p.seq)
	v := projectView{
		ID:             p.id,
		Name:           p.name,
		IsActive:       p.active,
		Policy:         json.RawMessage(p.policy),
		Routing:        json.RawMessage(p.routing),
		CostMultiplier: json.Number(formatDecimal(p.costMultiplier, 4)),
		Upstreams:      []upstreamView{},
		Version:        p.version,
		CreatedAt:      timestamp(p.createdAt),
		UpdatedAt:      timestamp(p.updatedAt),
	}
	for i := range upstreams {
		v.Upstreams = append(v.Upstreams, ops.newUpstreamView(&upstreams[i]))
	}
	return v, err
}

// getProject returns a project, its upstreams and the state of its limits.
func (ops *operations) getProject(ctx context.Context, id string, q valueQuery, now time.Time) (projectView, error) {
	p, err := ops.store.projectByID(ctx, id)
	if err != nil {
		return projectView{}, err
	}
	v, err := ops.newProjectView(ctx, &p)
	if err == nil {
		q.names, err = ops.valueNames(ctx, p.id, q.names)
	}
	if err == nil {
		v.Limits, err = ops.limits.projectLimits(ctx, &p, q, ops.limits.now(now))
	}
	return v, err
}

func (api *manageAPI) getProject(r *manageRequest, q valueQuery) (any, error) {
	return api.ops.getProject(r.ctx, r.pathValue("id"), q, r.now)
}

// parseProjectFilter reads the filters and the page of the list of projects.
func (r *manageRequest) parseProjectFilter() (q projectListQuery, err error) {
	page, err := r.parseListQuery()
	if err != nil {
		return q, err
	}
	q = projectListQuery{prefix: r.query.Get("name"), afterSeq: page.seq, limit: page.limit}
	if q.active, err = r.boolParam("active"); err == nil {
		q.search, err = parseSearchTerm(r.query.Get("search"))
	}
	return q, err
}

func (ops *operations) listProjects(ctx context.Context, q projectListQuery) (listPage[projectView], error) {
	q.limit++
	rows, err := ops.store.listProjects(ctx, q)
	if err != nil {
		return listPage[projectView]{}, err
	}
	l := newListPage(rows, q.limit-1, func(p *projectRow) projectView {
		v, viewErr := ops.newProjectView(ctx, p)
		err = errors.Join(err, viewErr)
		return v
	}, func(p *projectRow) string { return formatCursor(p.seq, "") })
	return l, err
}

func (api *manageAPI) listProjects(r *manageRequest) (any, error) {
	f, err := r.parseProjectFilter()
	if err != nil {
		return nil, err
	}
	return api.ops.listProjects(r.ctx, f)
}

func (api *manageAPI) createProject(r *manageRequest, in projectInput) (any, error) {
	p, err := api.ops.createProject(r.ctx, r.origin, in)
	if err != nil {
		return nil, err
	}
	v, err := api.ops.newProjectView(r.ctx, &p)
	return created{v}, err
}

func (api *manageAPI) patchProject(r *manageRequest, in projectInput) (any, error) {
	p, err := api.ops.updateProject(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	if err != nil {
		return nil, err
	}
	return api.ops.newProjectView(r.ctx, &p)
}

func (api *manageAPI) deleteProject(r *manageRequest) (any, error) {
	return r.deleted("id", api.ops.deleteProject(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion))
}

func (api *manageAPI) revokeProjectTokens(r *manageRequest) (any, error) {
	n, err := api.ops.revokeProjectTokens(r.ctx, r.origin, r.pathValue("id"))
	return map[string]any{"revoked": n}, err
}

type upstreamView struct {
	ID             string          `json:"id"`
	ProjectID      string          `json:"project_id"`
	Name           string          `json:"name"`
	Provider       string          `json:"provider"`
	BaseURL        string          `json:"base_url"`
	KeyHint        string          `json:"key_hint"`
	Organization   string          `json:"organization"`
	OpenAIProject  string          `json:"openai_project"`
	Weight         int64           `json:"weight"`
	Priority       int64           `json:"priority"`
	Models         json.RawMessage `json:"models"`
	Rewrite        json.RawMessage `json:"rewrite"`
	ConnectMS      int64           `json:"connect_ms"`
	AnswerMS       int64           `json:"answer_ms"`
	FirstEventMS   int64           `json:"first_event_ms"`
	IdleMS         int64           `json:"idle_ms"`
	Requests       int64           `json:"requests_per_minute"`
	CostMultiplier json.Number     `json:"cost_multiplier"`
	Tokens         int64           `json:"tokens_per_minute"`
	Note           string          `json:"note"`
	SharedWith     json.RawMessage `json:"shared_with"`
	IsActive       bool            `json:"is_active"`
	Version        int64           `json:"version"`
	CreatedAt      timestamp       `json:"created_at"`
	UpdatedAt      timestamp       `json:"updated_at"`
	Health         healthView      `json:"health"`
}

func (v upstreamView) etag() int64 { return v.Version }

func (ops *operations) newUpstreamView(u *upstreamRow) upstreamView {
	var set upstreamSettings
	_ = json.Unmarshal([]byte(u.settings), &set) // the program wrote it
	return upstreamView{
		ID:             u.id,
		ProjectID:      u.projectID,
		Name:           u.name,
		Provider:       u.provider,
		BaseURL:        u.baseURL,
		KeyHint:        u.keyHint,
		Organization:   u.organization,
		OpenAIProject:  u.openaiProject,
		Weight:         u.weight,
		Priority:       u.priority,
		Models:         json.RawMessage(u.models),
		Rewrite:        json.RawMessage(u.rewrite),
		ConnectMS:      set.ConnectMS,
		AnswerMS:       set.AnswerMS,
		FirstEventMS:   set.FirstEventMS,
		IdleMS:         set.IdleMS,
		Requests:       set.RequestsPerMinute,
		CostMultiplier: json.Number(formatDecimal(cmp.Or(set.CostMultiplier, multiplierOne), 4)),
		Tokens:         set.TokensPerMinute,
		Note:           set.Note,
		SharedWith:     json.RawMessage(u.sharedWith),
		IsActive:       u.active,
		Version:        u.version,
		CreatedAt:      timestamp(u.createdAt),
		UpdatedAt:      timestamp(u.updatedAt),
		Health:         ops.newHealthView(u),
	}
}

// applyDestination sets where calls go, and the provider key. A change of the URL requires the key again:
// otherwise an admin who may edit the URL could have the stored key sent to a server of their own.
func (in *upstreamInput) applyDestination(ops *operations, row *upstreamRow, isNew bool) (keyErr error) {
	if isNew {
		switch {
		case in.baseURL.hasValue():
			row.baseURL = in.baseURL.value
		case row.provider == providerOpenAI:
			row.baseURL = ops.openaiURL
		case row.provider == providerAnthropic:
			row.baseURL = "https://api.anthropic.com"
		case row.provider == providerGoogle:
			row.baseURL = "https://generativelanguage.googleapis.com"
		default:
			return &fieldError{"base_url", "is required for this provider"}
		}
		if !in.key.hasValue() {
			keyErr = &fieldError{"api_key", "is required"}
		}
	} else if in.baseURL.set {
		if in.baseURL.value != row.baseURL && !in.key.hasValue() {
			keyErr = &fieldError{"api_key", "is required again when base_url changes"}
		}
		row.baseURL = in.baseURL.value
	}
	if in.key.set && keyErr == nil {
		if err := checkProviderKey(in.key.value()); err != nil {
			keyErr = &fieldError{"api_key", err.Error()}
		}
	}
	if row.provider == providerGoogle {
		row.baseURL = withGeminiPath(row.baseURL)
	}
	u, err := parseBaseURL(row.baseURL, ops.allowPrivate)
	if err != nil {
		return errors.Join(keyErr, &fieldError{"base_url", err.Error()}) // their own text; it contains no secret
	}
	row.baseURL = u.String()
	if keyErr != nil || !in.key.set {
		return keyErr
	}
	row.sealedKey = ops.sealer.seal(in.key.value, sealContext(row.id, row.projectID, u.Scheme+"://"+u.Host))
	row.keyHint = in.key.value.hint()
	return nil
}

func (api *manageAPI) listUpstreams(r *manageRequest) (any, error) {
	p, err := api.store.projectByID(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	rows, err := api.store.projectUpstreams(r.ctx, p.seq)
	return newListPage(rows, len(rows), api.ops.newUpstreamView, nil), err
}

func (api *manageAPI) createUpstream(r *manageRequest, in upstreamInput) (any, error) {
	u, err := api.ops.createUpstream(r.ctx, r.origin, r.pathValue("id"), in)
	if err != nil {
		return nil, err
	}
	return created{api.ops.newUpstreamView(&u)}, nil
}

// getUpstream returns an upstream of a project, and its health.
func (ops *operations) getUpstream(ctx context.Context, projectID, id string) (upstreamView, error) {
	u, err := ops.store.upstreamByID(ctx, projectID, id)
	if err != nil {
		return upstreamView{}, err
	}
	return ops.newUpstreamView(&u), nil
}

func (api *manageAPI) getUpstream(r *manageRequest) (any, error) {
	return api.ops.getUpstream(r.ctx, r.pathValue("id"), r.pathValue("upstream"))
}

func (api *manageAPI) patchUpstream(r *manageRequest, in upstreamInput) (any, error) {
	projectID, id := r.pathValue("id"), r.pathValue("upstream")
	u, err := api.ops.updateUpstream(r.ctx, r.origin, projectID, id, r.ifMatchVersion, in)
	if err != nil {
		return nil, err
	}
	return api.ops.newUpstreamView(&u), nil
}

func (api *manageAPI) deleteUpstream(r *manageRequest) (any, error) {
	projectID, id := r.pathValue("id"), r.pathValue("upstream")
	return r.deleted("upstream", api.ops.deleteUpstream(r.ctx, r.origin, projectID, id, r.ifMatchVersion))
}

// A healthView is the health of an upstream's key as /manage shows it.
type healthView struct {
	State   string     `json:"state"`
	Reason  string     `json:"reason"`
	Since   *timestamp `json:"since"`
	Until   *timestamp `json:"until"`
	Running int64      `json:"running"`
	Models  []string   `json:"models"` // that the provider does not give to the key, and where, until when and why
}

func (ops *operations) newHealthView(u *upstreamRow) healthView {
	now := time.Now().UnixMilli()
	health := ops.health.forUpstream(u.seq, u.id)
	h := health.snapshot(now)
	v := healthView{State: h.state.String(), Reason: h.reason, Running: h.running, Models: []string{}}
	if h.state != keyReady {
		v.Since, v.Until = new(timestamp(h.changedAt)), new(timestamp(h.until))
	}
	for _, p := range health.modelPauses(now) {
		until := time.UnixMilli(p.until).UTC().Format(time.RFC3339)
		v.Models = append(v.Models, p.model+" at "+p.endpoint+" until "+until+": "+p.reason)
	}
	return v
}

type tokenView struct {
	ID                string          `json:"id"`
	ProjectID         string          `json:"project_id"`
	Name              string          `json:"name"`
	IsActive          bool            `json:"is_active"` // its project may be inactive nevertheless
	ExpiresAt         *timestamp      `json:"expires_at"`
	IdleExpiryMinutes *int64          `json:"idle_expiry_minutes"`
	RevokedAt         *timestamp      `json:"revoked_at"`
	MaxRequests       *int64          `json:"max_requests"`
	RequestCount      int64           `json:"request_count"`
	Policy            json.RawMessage `json:"policy"`
	LastUsedAt        *timestamp      `json:"last_used_at"`
	OverlapUntil      *timestamp      `json:"overlap_until"` // until then the previous value is valid too
	Version           int64           `json:"version"`
	CreatedAt         timestamp       `json:"created_at"`
	UpdatedAt         timestamp       `json:"updated_at"`
	Limits            []limitView     `json:"limits,omitzero"` // the state of the limits; only in a single token
	Token             string          `json:"token,omitempty"` // the value, only if it is new
}

func (v tokenView) etag() int64 { return v.Version }

func (ops *operations) newTokenView(t *tokenRow, now time.Time) tokenView {
	ms := now.UnixMilli()
	t = ops.limits.withLiveUsage(t, ms)
	v := tokenView{
		ID:           t.id,
		ProjectID:    t.projectID,
		Name:         t.name,
		ExpiresAt:    newTimestamp(t.expiresAt),
		RevokedAt:    newTimestamp(t.revokedAt),
		MaxRequests:  t.maxRequests,
		RequestCount: t.requestCount,
		Policy:       json.RawMessage(t.policy),
		LastUsedAt:   newTimestamp(t.lastUsedAt),
		Version:      t.version,
		CreatedAt:    timestamp(t.createdAt),
		UpdatedAt:    timestamp(t.updatedAt),
	}
	if t.oldHashUntil != nil && *t.oldHashUntil > ms {
		v.OverlapUntil = newTimestamp(t.oldHashUntil)
	}
	if t.idleExpiry != nil {
		v.IdleExpiryMinutes = new(*t.idleExpiry / time.Minute.Milliseconds())
	}
	idle := t.idleExpiry != nil && max(t.createdAt, deref(t.lastUsedAt))+*t.idleExpiry <= ms
	v.IsActive = t.revokedAt == nil && (t.expiresAt == nil || *t.expiresAt > ms) && !idle
	return v
}

func (api *manageAPI) listTokens(r *manageRequest) (any, error) {
	query, err := r.parseListQuery()
	if err != nil {
		return nil, err
	}
	q := tokenListQuery{order: tokensOldest, project: r.query.Get("project_id"), prefix: r.query.Get("name"),
		afterSeq: query.seq, afterName: query.name, limit: query.limit + 1, now: r.now.UnixMilli()}
	if q.search, err = parseSearchTerm(r.query.Get("search")); err != nil {
		return nil, err
	}
	if q.prefix != "" && q.search.isEmpty() {
		q.order = tokensByName
	}
	if q.active, err = r.boolParam("active"); err != nil {
		return nil, err
	}
	if q.project != "" {
		if _, err := api.store.projectByID(r.ctx, q.project); err != nil {
			return nil, asProjectFieldError(err)
		}
	}
	rows, scanned, err := api.store.listTokens(r.ctx, q)
	l := newListPage(rows, query.limit,
		func(t *tokenRow) tokenView { return api.ops.newTokenView(t, r.now) },
		func(t *tokenRow) string { return formatCursor(t.seq, t.name) })
	if scanned != 0 {
		l.Next = cmp.Or(l.Next, formatCursor(scanned, ""))
	}
	return l, err
}

func asProjectFieldError(err error) error {
	if errors.Is(err, errNotFound) {
		return &fieldError{"project_id", "does not exist"}
	}
	return err
}

// defaultTokenLifetime is the lifetime of a token if none is sent.
const defaultTokenLifetime = 30 * 24 * time.Hour

func (api *manageAPI) createToken(r *manageRequest, in tokenInput) (any, error) {
	t, value, err := api.ops.createToken(r.ctx, r.origin, in)
	return created{api.ops.newTokenValueView(&t, value, r.now)}, err
}

// newTokenValueView is newTokenView with the value, unless that is nil.
func (ops *operations) newTokenValueView(t *tokenRow, value secret, now time.Time) tokenView {
	v := ops.newTokenView(t, now)
	if value != nil {
		v.Token = value()
	}
	return v
}

func (api *manageAPI) getToken(r *manageRequest, q valueQuery) (any, error) {
	return api.ops.getToken(r.ctx, r.pathValue("id"), q, r.now)
}

// getToken returns a token and the state of its limits.
func (ops *operations) getToken(ctx context.Context, id string, q valueQuery, now time.Time) (tokenView, error) {
	t, err := ops.store.tokenByID(ctx, id)
	if err != nil {
		return tokenView{}, err
	}
	v := ops.newTokenView(&t, now)
	if q.names, err = ops.valueNames(ctx, t.projectID, q.names); err == nil {
		v.Limits, err = ops.limits.tokenLimits(ctx, &t, q, ops.limits.now(now))
	}
	return v, err
}

func (api *manageAPI) patchToken(r *manageRequest, in tokenInput) (any, error) {
	t, err := api.ops.updateToken(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	return api.ops.newTokenView(&t, r.now), err
}

func (api *manageAPI) revokeToken(r *manageRequest) (any, error) {
	t, err := api.ops.revokeToken(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion)
	return api.ops.newTokenView(&t, r.now), err
}

func (api *manageAPI) rotateToken(r *manageRequest, in rotateInput) (any, error) {
	t, value, err := api.ops.rotateToken(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	return api.ops.newTokenValueView(&t, value, r.now), err
}

type keyView struct {
	ID        string     `json:"id"`
	Name      string     `json:"name"`
	Role      role       `json:"role"`
	IsActive  bool       `json:"is_active"`
	ExpiresAt *timestamp `json:"expires_at"`
	RevokedAt *timestamp `json:"revoked_at"`
	Version   int64      `json:"version"`
	CreatedAt timestamp  `json:"created_at"`
	UpdatedAt timestamp  `json:"updated_at"`
	Key       string     `json:"key,omitempty"` // the value, only if it is new
}

func (v keyView) etag() int64 { return v.Version }

func newKeyView(k *managementKeyRow, now time.Time) keyView {
	active := k.revokedAt == nil && (k.expiresAt == nil || *k.expiresAt > now.UnixMilli())
	return keyView{
		ID:        k.id,
		Name:      k.name,
		Role:      role(k.role),
		IsActive:  active,
		ExpiresAt: newTimestamp(k.expiresAt),
		RevokedAt: newTimestamp(k.revokedAt),
		Version:   k.version,
		CreatedAt: timestamp(k.createdAt),
		UpdatedAt: timestamp(k.updatedAt),
	}
}

func (api *manageAPI) listKeys(r *manageRequest) (any, error) {
	query, err := r.parseListQuery()
	if err != nil {
		return nil, err
	}
	return api.ops.listManagementKeys(r.ctx, query, r.now)
}

func (ops *operations) listManagementKeys(
	ctx context.Context, query listQuery, now time.Time,
) (listPage[keyView], error) {
	rows, err := ops.store.listManagementKeys(ctx, query.seq, query.limit+1)
	return newListPage(rows, query.limit,
		func(k *managementKeyRow) keyView { return newKeyView(k, now) },
		func(k *managementKeyRow) string { return formatCursor(k.seq, "") }), err
}

func (api *manageAPI) createKey(r *manageRequest, in keyInput) (any, error) {
	k, value, err := api.ops.createManagementKey(r.ctx, r.origin, in)
	return created{newKeyValueView(&k, value, r.now)}, err
}

// newKeyValueView is newKeyView with the value, unless that is nil.
func newKeyValueView(k *managementKeyRow, value secret, now time.Time) keyView {
	v := newKeyView(k, now)
	if value != nil {
		v.Key = value()
	}
	return v
}

func (api *manageAPI) getKey(r *manageRequest) (any, error) {
	return api.ops.getManagementKey(r.ctx, r.pathValue("id"), r.now)
}

func (ops *operations) getManagementKey(ctx context.Context, id string, now time.Time) (keyView, error) {
	k, err := ops.store.managementKeyByID(ctx, id)
	return newKeyView(&k, now), err
}

func (api *manageAPI) patchKey(r *manageRequest, in keyInput) (any, error) {
	k, err := api.ops.updateManagementKey(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion, in)
	return newKeyView(&k, r.now), err
}

func (api *manageAPI) revokeKey(r *manageRequest) (any, error) {
	k, err := api.ops.revokeManagementKey(r.ctx, r.origin, r.pathValue("id"), r.ifMatchVersion)
	return newKeyView(&k, r.now), err
}

type routeView struct {
	Model         string              `json:"model"`
	API           string              `json:"api"`
	ResolvedModel string              `json:"resolved_model"` // what the model stands for, if it is an alias, or ""
	FallbackModel string              `json:"fallback_model"` // "": none
	Upstreams     []routeUpstreamView `json:"upstreams"`
}

type routeUpstreamView struct {
	UpstreamID string  `json:"upstream_id"`
	Name       string  `json:"name"`
	Priority   int64   `json:"priority"`
	Weight     int64   `json:"weight"`
	SentModel  string  `json:"sent_model"` // the upstream's name for the model
	Share      float64 `json:"share"`      // of the calls at this moment
	Why        string  `json:"why"`
	// The timeouts that the upstream sets; 0: the default.
	ConnectMS    int64 `json:"connect_ms"`
	AnswerMS     int64 `json:"answer_ms"`
	FirstEventMS int64 `json:"first_event_ms"`
	IdleMS       int64 `json:"idle_ms"`
}

// explainRoute returns which upstreams of a project would get such a call now, and why. It sends no request.
func (ops *operations) explainRoute(ctx context.Context, projectID string, q routeQuery) (routeView, error) {
	v := routeView{Model: q.model, API: cmp.Or(q.api, "openai"), Upstreams: []routeUpstreamView{}}
	p, err := ops.store.projectByID(ctx, projectID)
	if err != nil {
		return v, err
	}
	need, err := q.criteria(time.Now().UnixMilli())
	if err != nil {
		return v, err
	}
	state, err := ops.registry.readProject(ctx, p.seq)
	if err != nil {
		return v, err
	}
	models := state.resolveAlias(need, func(string) bool { return true })
	if len(models) > 0 {
		v.ResolvedModel, need.model = models[0], models[0]
	}
	v.FallbackModel = state.routing.fallbackFor(need.model)
	if len(models) > 1 {
		v.FallbackModel = models[1]
	}
	need.affinity = state.affinityOf(q.session, nil, nil)
	for _, l := range state.explain(&need) {
		u := l.upstream
		v.Upstreams = append(v.Upstreams, routeUpstreamView{
			UpstreamID:   u.id,
			Name:         u.name,
			Priority:     u.priority,
			Weight:       u.weight,
			SentModel:    u.mapModel(l.model),
			Share:        l.share,
			Why:          l.reason,
			ConnectMS:    u.settings.ConnectMS,
			AnswerMS:     u.settings.AnswerMS,
			FirstEventMS: u.settings.FirstEventMS,
			IdleMS:       u.settings.IdleMS,
		})
	}
	return v, nil
}

func (api *manageAPI) explainRoute(r *manageRequest) (any, error) {
	q := routeQuery{r.query.Get("model"), r.query.Get("api"), r.query.Get("session")}
	return api.ops.explainRoute(r.ctx, r.pathValue("id"), q)
}

// A cacheView is what the response cache has of a project, and what it has saved since a time.
type cacheView struct {
	Entries   int64            `json:"entries"`
	Bytes     int64            `json:"bytes"`
	Models    []cacheModelView `json:"models"` // largest first, at most 1,000
	Since     timestamp        `json:"since"`
	Calls     int64            `json:"calls"` // all of the project's, whether they can be cached or not
	CacheHits int64            `json:"cache_hits"`
	HitShare  float64          `json:"hit_share"` // of the calls, 0 to 1
	Saved     dollars          `json:"saved"`
	SavedMS   float64          `json:"saved_ms"`
}

type cacheModelView struct {
	Model          string    `json:"model"`
	Entries        int64     `json:"entries"`
	Bytes          int64     `json:"bytes"`
	OldestStoredAt timestamp `json:"oldest_stored_at"`
}

const cacheReportDays = 30

// getCache returns what is cached of a project, and what the cache has saved in 30 days, today included. It leaves
// out Models, which needs to read every entry.
func (ops *operations) getCache(ctx context.Context, projectID string, now time.Time) (cacheView, error) {
	p, err := ops.store.projectByID(ctx, projectID)
	if err != nil {
		return cacheView{}, err
	}
	today := now.UnixMilli() - now.UnixMilli()%dayMS
	q := usageQuery{interval: "total", project: p.id, limit: 1,
		from: today - (cacheReportDays-1)*dayMS, to: today + dayMS}
	v := cacheView{Models: []cacheModelView{}, Since: timestamp(q.from)}
	if v.Entries, v.Bytes, err = ops.cache.usageSum(ctx, p.seq, now.UnixMilli()); err != nil {
		return v, err
	}
	sums, err := ops.store.usage(ctx, q)
	for _, s := range sums {
		v.Calls, v.CacheHits, v.Saved, v.SavedMS = s.calls, s.hits, dollars(s.saved), float64(s.savedUS)/1000
	}
	if v.Calls > 0 {
		v.HitShare = float64(v.CacheHits) / float64(v.Calls)
	}
	return v, err
}

func (api *manageAPI) getCache(r *manageRequest) (any, error) {
	v, err := api.ops.getCache(r.ctx, r.pathValue("id"), r.now)
	if err != nil || v.Entries == 0 {
		return v, err
	}
	p, err := api.store.projectByID(r.ctx, r.pathValue("id"))
	if err != nil {
		return nil, err
	}
	models, err := api.ops.cache.usage(r.ctx, p.seq, r.now.UnixMilli())
	for _, m := range models {
		v.Models = append(v.Models, cacheModelView{m.model, m.entries, m.bytes, timestamp(m.oldestStoredAt)})
	}
	return v, err
}

// emptyCache deletes the cached answers of a project that f describes, but for their age, and that are older than a
// number of seconds (0: of any age). It returns how many.
func (ops *operations) emptyCache(
	ctx context.Context, origin auditOrigin, projectID string, f cacheFilter, olderThan int64,
) (int64, error) {
	p, err := ops.store.projectByID(ctx, projectID)
	if err != nil {
		return 0, err
	}
	f.project = p.seq
	event := auditEvent{action: actionEmptyCache, object: p.id}
	for _, field := range [...]auditField{{"model", f.model}, {"endpoint", f.endpoint}} {
		if field.value != "" {
			event.detail = append(event.detail, field)
		}
	}
	if olderThan != 0 {
		event.detail = append(event.detail, auditField{"older_than_seconds", olderThan})
		f.storedBefore = origin.at - olderThan*1000
	}
	if err := ops.store.recordAuditEvent(ctx, origin, event); err != nil {
		return 0, fmt.Errorf("recording who empties a cache: %w", err)
	}
	return ops.cache.purge(ctx, f)
}

func (api *manageAPI) emptyCache(r *manageRequest) (any, error) {
	f, olderThan, err := r.cacheFilter()
	if err != nil {
		return nil, err
	}
	n, err := api.ops.emptyCache(r.ctx, r.origin, r.pathValue("id"), f, olderThan)
	return map[string]any{"deleted": n}, err
}
