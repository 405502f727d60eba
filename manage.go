// This room is the door of /manage, the JSON API for administrators: who may
// enter, which role each URL needs, how bodies come in and answers go out. The
// handlers stand in manage_*.go; each takes a request that has been let in and
// returns a reply or an error.
package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// A signInAuditor puts failed sign-ins on the audit trail, and tells the log where
// the trail ends.
type signInAuditor struct {
	log     *logger
	store   *store
	limiter *throttle
}

// auditFailedSignIn puts a wrong management key on the trail. by.actor is the key's
// id if it is one that was valid once. Whoever presented it is refused in any
// case, so trouble with the trail is for the log alone.
func (a *signInAuditor) auditFailedSignIn(ctx context.Context, by auditOrigin, door string, now time.Time) {
	wait, left := a.limiter.allow(now)
	if wait > 0 {
		return
	}
	a.writeFailedSignIns(ctx, by, door, left, 1)
}

// writeFailedSignIns adds an entry that tells of failed sign-ins: of so many that were
// left out before, and of one more or none. It waits no longer than a few seconds, but for as long as it needs:
// who presents a key must not be able to keep it off the trail by leaving.
func (a *signInAuditor) writeFailedSignIns(ctx context.Context, by auditOrigin, door string, left, more int64) {
	event := auditEvent{action: actionSignInFailed, object: door}
	if left > 0 {
		event.detail = []auditField{{"left_out", left}}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := a.store.recordAuditEvent(ctx, by, event); err != nil {
		a.limiter.addOmitted(left + more)
		a.log.Error("a failed sign-in could not be put on the audit trail", "request_id", by.requestID, "address", by.address, "error", err)
	}
}

// runAuditCheckpoints notes, every so often and at the end, how many failed sign-ins were
// left out, and logs where the trail ends, if that is not where it was logged
// last: a log that is kept elsewhere shows later that nothing up to there was
// removed.
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
		if left := a.limiter.takeOmitted(now, end); left > 0 {
			a.writeFailedSignIns(ctx, systemOrigin(now), "", left, 0)
		}
		if h, ok, _, err := a.store.loadAuditHead(context.WithoutCancel(ctx), a.store.chain); err == nil && ok && h.seq != logged {
			logged = h.seq
			a.log.Info("the audit trail ends here", "head", h.String())
		}
	}
}

// A manageAPI is the JSON API under /manage. All fields are required.
type manageAPI struct {
	log             *logger
	store           *store
	ops             *operations
	auth            *managementAuth
	databaseProblem func() string // describes what is wrong with the database file; "" if nothing
}

// A managementAuth finds out who acts: whose management key a request presents, and from where.
type managementAuth struct {
	store           *store
	managementToken secret // MANAGEMENT_TOKEN; nil: not set
	addresses       *addressReader
	throttle        *addressThrottle // of wrong management keys
	signIns         *signInAuditor   // of wrong management keys, for the audit trail
}

func newManagementAuth(log *logger, st *store, managementToken secret, addresses *addressReader) *managementAuth {
	signIns := &signInAuditor{log: log, store: st, limiter: newSignInThrottle()}
	return &managementAuth{st, managementToken, addresses, newAuthThrottle(), signIns}
}

// newOrigin says who makes a request, for the audit trail.
func (a *managementAuth) newOrigin(w http.ResponseWriter, r *http.Request, caller actor, now time.Time) auditOrigin {
	return auditOrigin{
		actorID:   caller.id,
		role:      caller.role,
		address:   a.addresses.clientAddress(r),
		requestID: w.Header().Get("X-Request-Id"),
		at:        now.UnixMilli(),
	}
}

// A manageRoute is one URL of /manage, the least role it needs and what
// answers it.
type manageRoute struct {
	pattern string
	minRole role
	handle  func(*manageRequest) (*manageResponse, error)
}

// manageTable is every URL of /manage.
func (api *manageAPI) manageTable() []manageRoute {
	return []manageRoute{
		{"GET /manage/projects", roleViewer, api.listProjects},
		{"POST /manage/projects", roleAdmin, api.createProject},
		{"GET /manage/projects/{id}", roleViewer, api.getProject},
		{"PATCH /manage/projects/{id}", roleAdmin, api.patchProject},
		{"DELETE /manage/projects/{id}", roleAdmin, api.deleteProject},
		{"POST /manage/projects/{id}/tokens/revoke", roleOperator, api.revokeProjectTokens},
		{"DELETE /manage/projects/{id}/content", roleAdmin, api.eraseContent},
		{"GET /manage/projects/{id}/route", roleViewer, api.explainRoute},
		{"GET /manage/projects/{id}/upstreams", roleViewer, api.listUpstreams},
		{"POST /manage/projects/{id}/upstreams", roleAdmin, api.createUpstream},
		{"GET /manage/projects/{id}/upstreams/{upstream}", roleViewer, api.getUpstream},
		{"PATCH /manage/projects/{id}/upstreams/{upstream}", roleAdmin, api.patchUpstream},
		{"DELETE /manage/projects/{id}/upstreams/{upstream}", roleAdmin, api.deleteUpstream},
		{"GET /manage/tokens", roleViewer, api.listTokens},
		{"POST /manage/tokens", roleOperator, api.createToken},
		{"GET /manage/tokens/{id}", roleViewer, api.getToken},
		{"PATCH /manage/tokens/{id}", roleOperator, api.patchToken},
		{"DELETE /manage/tokens/{id}", roleOperator, api.revokeToken},
		{"POST /manage/tokens/{id}/rotate", roleOperator, api.rotateToken},
		{"GET /manage/usage", roleViewer, api.getUsage},
		{"GET /manage/requests", roleViewer, api.listRequests},
		{"GET /manage/requests/{id}", roleViewer, api.getRequest},
		{"GET /manage/requests/{id}/content", roleAdmin, api.getContent},
		{"GET /manage/streams", roleViewer, api.listStreams},
		{"DELETE /manage/streams/{id}", roleOperator, api.abortStream},
		{"GET /manage/prices", roleViewer, api.listPrices},
		{"POST /manage/prices", roleAdmin, api.setPrice},
		{"DELETE /manage/prices/{id}", roleAdmin, api.deletePrice},
		{"GET /manage/audit", roleAdmin, api.listAudit},
		{"GET /manage/keys", roleAdmin, api.listKeys},
		{"POST /manage/keys", roleAdmin, api.createKey},
		{"GET /manage/keys/{id}", roleAdmin, api.getKey},
		{"PATCH /manage/keys/{id}", roleAdmin, api.patchKey},
		{"DELETE /manage/keys/{id}", roleAdmin, api.revokeKey},
	}
}

func (api *manageAPI) manageRoutes() http.Handler {
	mux := http.NewServeMux()
	methods := map[string][]string{}
	for _, rt := range api.manageTable() {
		mux.Handle(rt.pattern, api.manageHandler(rt))
		method, path, _ := strings.Cut(rt.pattern, " ")
		methods[path] = append(methods[path], method)
	}
	for path, allowed := range methods {
		mux.Handle(path, methodNotAllowed(strings.Join(allowed, ", ")))
	}
	mux.HandleFunc("/manage/", notFound)
	return mux
}

func methodNotAllowed(allowed string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Allow", allowed)
		writeError(w, errMethodNotAllowed(allowed), false)
	})
}

// A manageRequest is a request that has been let in.
type manageRequest struct {
	http           *http.Request
	ctx            context.Context
	actor          actor
	origin         auditOrigin // the actor, for the audit trail
	body           []byte      // "" unless the method has one
	query          url.Values  // every name known and given once
	now            time.Time
	ifMatchVersion int64 // the version in If-Match; 0: none asked for
}

func (r *manageRequest) pathValue(name string) string { return r.http.PathValue(name) }

// A manageResponse is what a handler answers with.
type manageResponse struct {
	status  int   // 0: 200
	version int64 // becomes the ETag; 0: none
	body    any
}

const maxManageBodyBytes = 1 << 20

// manageHandler lets a request in, or not, and writes what its handler returns.
func (api *manageAPI) manageHandler(rt manageRoute) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rep, err := api.manage(rt, w, r)
		if err != nil {
			api.writeManageError(w, r, err)
			return
		}
		body, err := json.Marshal(rep.body)
		if err != nil {
			api.writeManageError(w, r, err)
			return
		}
		if rep.version != 0 {
			w.Header().Set("ETag", strconv.Quote(strconv.FormatInt(rep.version, 10)))
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(max(rep.status, http.StatusOK))
		_, _ = w.Write(append(body, '\n'))
	})
}

func (api *manageAPI) manage(rt manageRoute, w http.ResponseWriter, r *http.Request) (*manageResponse, error) {
	who, err := api.authenticateManager(w, r)
	if err != nil {
		return nil, err
	}
	if who.role.rank() < rt.minRole.rank() {
		return nil, errRoleTooLow(rt.minRole, who.role)
	}
	now := time.Now()
	req := &manageRequest{http: r, ctx: r.Context(), actor: who, origin: api.auth.newOrigin(w, r, who, now), now: now}
	if req.query, err = url.ParseQuery(r.URL.RawQuery); err != nil {
		return nil, badRequest("invalid_value", "", "The query cannot be parsed.")
	}
	for name, values := range req.query {
		if len(values) > 1 {
			return nil, badRequest("invalid_value", clip(name, 64), "The query gives "+clip(name, 64)+" twice.")
		}
		if values[0] == "" { // as a script with an unset variable sends it: it would list all
			return nil, badRequest("invalid_value", clip(name, 64), "The query gives no value for "+clip(name, 64)+".")
		}
	}
	if r.Method != http.MethodGet || strings.HasSuffix(rt.pattern, "}") { // only lists have parameters
		if err := req.checkParams(); err != nil {
			return nil, err
		}
	}
	if r.Method != http.MethodGet {
		// A change is carried through when its sender leaves: half of it, stored
		// but not in force, would let a revoked token live on.
		req.ctx = context.WithoutCancel(req.ctx)
	}
	if why := api.databaseProblem(); why != "" { // nothing may be stored in a file that has no name any more
		return nil, errStoreUnavailable(errors.New(why))
	}
	if req.ifMatchVersion, err = parseIfMatch(r.Header["If-Match"]); err != nil {
		return nil, err
	}
	if r.Method == http.MethodPost || r.Method == http.MethodPatch {
		if req.body, err = readManageBody(w, r); err != nil {
			return nil, err
		}
	}
	return rt.handle(req)
}

func parseIfMatch(values []string) (int64, error) {
	if len(values) == 0 || len(values) == 1 && values[0] == "*" {
		return 0, nil
	}
	if len(values) == 1 {
		if n, err := strconv.ParseInt(strings.Trim(values[0], `"`), 10, 64); err == nil && n > 0 {
			return n, nil
		}
	}
	return 0, badRequest("invalid_value", "If-Match", `If-Match must be the ETag of an earlier answer, as in "3".`)
}

func readManageBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxManageBodyBytes))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, errBodyTooLarge(maxManageBodyBytes)
	}
	if err != nil {
		return nil, badRequest("request_cut", "", "The body ended early.")
	}
	if len(body) == 0 {
		return []byte("{}"), nil // all fields absent; needs no Content-Type
	}
	// A form of another site can only send the simple types.
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		return nil, errContentType("application/json")
	}
	return body, nil
}

// authenticateManager finds out whose management key the request presents.
func (api *manageAPI) authenticateManager(w http.ResponseWriter, r *http.Request) (actor, error) {
	values := r.Header["Authorization"]
	if len(values) != 1 {
		return actor{}, errManageKey
	}
	scheme, presented, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return actor{}, errManageKey
	}
	now := time.Now()
	return api.auth.verifyKey(r.Context(), api.auth.newOrigin(w, r, actor{}, now), r.Pattern, presented, now)
}

// verifyKey returns who holds the management key that by presents at a door, or
// why it is refused. A wrong key is on the audit trail then.
func (a *managementAuth) verifyKey(ctx context.Context, by auditOrigin, door, presented string, now time.Time) (actor, error) {
	who, err := a.actorByKey(ctx, presented, now)
	if !errors.Is(err, errNotFound) {
		return who, err
	}
	by.actorID = who.id
	a.signIns.auditFailedSignIn(ctx, by, door, now)
	// Only wrong keys are held up: whoever shares an address with a guesser, as
	// all do behind a proxy that is not in TRUSTED_PROXIES, must not be.
	if wait, _ := a.throttle.of(by.address).allow(now); wait > 0 {
		return actor{}, errTooManyFailures(wait)
	}
	return actor{}, errManageKey
}

// environmentActor is who holds MANAGEMENT_TOKEN.
func environmentActor() actor { return actor{actorEnvironment, "MANAGEMENT_TOKEN", roleAdmin} }

// actorByKey returns who holds a management key, or errNotFound: with the key's id
// if it is one that was valid once, and else with none.
func (a *managementAuth) actorByKey(ctx context.Context, presented string, now time.Time) (actor, error) {
	if a.managementToken != nil {
		// Hashes are compared: equal lengths, and no clue in the time taken.
		want, got := sha256.Sum256([]byte(a.managementToken())), sha256.Sum256([]byte(presented))
		if subtle.ConstantTimeCompare(want[:], got[:]) == 1 {
			return environmentActor(), nil
		}
	}
	hash, ok := hashCredential(manageKeyPrefix, presented)
	if !ok {
		return actor{}, errNotFound
	}
	key, err := a.store.managementKeyByHash(ctx, hash)
	switch {
	case errors.Is(err, errNotFound):
		return actor{}, errNotFound
	case err != nil:
		return actor{}, errStoreUnavailable(err)
	case key.revokedAt != nil, key.expiresAt != nil && now.UnixMilli() >= *key.expiresAt:
		return actor{id: key.id}, errNotFound
	}
	return actor{key.id, key.name, role(key.role)}, nil
}

// manageError turns what a handler returned into what its caller is told.
func manageError(err error) *apiError {
	switch {
	case errors.Is(err, errNotFound):
		return errObjectNotFound
	case errors.Is(err, errStale):
		return errStaleVersion
	case errors.Is(err, errTaken):
		return errNameTaken
	case isDatabaseFailure(err):
		return errStoreUnavailable(err)
	}
	return asAPIError(err)
}

func (api *manageAPI) writeManageError(w http.ResponseWriter, r *http.Request, err error) {
	e := manageError(err)
	if e.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	if e.status >= 500 {
		api.log.Error("a management call failed", "request_id", w.Header().Get("X-Request-Id"), "route", r.Pattern, "error", err)
	}
	writeError(w, e, false)
}

// A listQuery is where a list goes on and how long a page is.
type listQuery struct {
	limit int
	seq   int64
	name  string
}

// parseListQuery reads limit and after, and refuses names that are not in known.
func (r *manageRequest) parseListQuery(known ...string) (listQuery, error) {
	p := listQuery{limit: 100}
	if err := r.checkParams(append(known, "limit", "after")...); err != nil {
		return p, err
	}
	if v := r.query.Get("limit"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > 500 {
			return p, badRequest("invalid_value", "limit", "limit must be a whole number from 1 to 500.")
		}
		p.limit = n
	}
	if v := r.query.Get("after"); v != "" {
		var err error
		if p.seq, p.name, err = parseCursor(v); err != nil {
			return p, badRequest("invalid_value", "after", "after must be the value of next in an earlier answer.")
		}
	}
	return p, nil
}

// checkParams refuses query names that are not known: a filter that is silently
// ignored lists too much.
func (r *manageRequest) checkParams(known ...string) error {
next:
	for name := range r.query {
		for _, k := range known {
			if name == k {
				continue next
			}
		}
		return badRequest("unknown_parameter", clip(name, 64), "The query has an unknown parameter "+clip(name, 64)+"; known are: "+cmp.Or(strings.Join(known, ", "), "none")+".")
	}
	return nil
}

// formatCursor writes where a list goes on: a row's seq, and its name if the list is
// in order of names. Clients treat it as opaque.
func formatCursor(seq int64, name string) string {
	return strconv.FormatInt(seq, 36) + "." + url.QueryEscape(name)
}

func parseCursor(s string) (seq int64, name string, err error) {
	head, rest, ok := strings.Cut(s, ".")
	if !ok || len(s) > 400 {
		return 0, "", errors.New("malformed")
	}
	if seq, err = strconv.ParseInt(head, 36, 64); err != nil || seq < 0 {
		return 0, "", errors.New("malformed")
	}
	name, err = url.QueryUnescape(rest)
	return seq, name, err
}

// boolParam reads an optional true or false from the query.
func (r *manageRequest) boolParam(name string) (*bool, error) {
	switch r.query.Get(name) {
	case "":
		return nil, nil
	case "true":
		return new(true), nil
	case "false":
		return new(false), nil
	}
	return nil, badRequest("invalid_value", name, name+" must be true or false.")
}

// deletedResponse answers that the thing with the id in the path is deleted.
func (r *manageRequest) deletedResponse(name string, err error) (*manageResponse, error) {
	return &manageResponse{body: map[string]any{"id": r.pathValue(name), "deleted": true}}, err
}

// A listPage is a page of things and where the next one begins.
type listPage[T any] struct {
	Data []T    `json:"data"`
	Next string `json:"next,omitempty"`
}

// newListPage makes a page from rows, of which one more than limit was asked for.
func newListPage[R, T any](rows []R, limit int, show func(*R) T, at func(*R) string) listPage[T] {
	l := listPage[T]{Data: []T{}}
	for i := range rows {
		if i == limit {
			l.Next = at(&rows[i-1])
			break
		}
		l.Data = append(l.Data, show(&rows[i]))
	}
	return l
}

// A dollars is money in answers: nano-dollars inside, a decimal number outside.
type dollars int64

func (d dollars) MarshalJSON() ([]byte, error) { return []byte(formatNanos(int64(d))), nil }

type routeView struct {
	Model         string              `json:"model"`
	API           string              `json:"api"`
	FallbackModel string              `json:"fallback_model"` // "": none
	Upstreams     []routeUpstreamView `json:"upstreams"`
}

type routeUpstreamView struct {
	UpstreamID string  `json:"upstream_id"`
	Name       string  `json:"name"`
	Priority   int64   `json:"priority"`
	Weight     int64   `json:"weight"`
	SentModel  string  `json:"sent_model"` // as the upstream knows the model
	Share      float64 `json:"share"`      // of the calls, now
	Why        string  `json:"why"`
	// How long a call waits there, as far as its own settings say.
	ConnectMS    int64 `json:"connect_ms"`
	AnswerMS     int64 `json:"answer_ms"`
	FirstEventMS int64 `json:"first_event_ms"`
	IdleMS       int64 `json:"idle_ms"`
}

// explainRoute says which upstream of a project would get a call for a model now, and why. It calls no
// provider. api is openai, anthropic or "" for openai.
func (ops *operations) explainRoute(ctx context.Context, projectID, model, api string) (routeView, error) {
	v := routeView{Model: model, API: cmp.Or(api, "openai"), Upstreams: []routeUpstreamView{}}
	need := criteria{api: apiOpenAI, model: model, now: time.Now().UnixMilli()}
	p, err := ops.store.projectByID(ctx, projectID)
	if err != nil {
		return v, err
	}
	switch v.API {
	case "openai":
	case "anthropic":
		need.api = apiAnthropic
	default:
		return v, &fieldError{"api", "must be openai or anthropic"}
	}
	if err := checkModelName("model", model); err != nil {
		return v, err
	}
	state, err := ops.registry.readProject(ctx, p.seq)
	if err != nil {
		return v, err
	}
	v.FallbackModel = state.routing.fallbackFor(model)
	for _, l := range state.explain(&need) {
		u := l.upstream
		v.Upstreams = append(v.Upstreams, routeUpstreamView{
			UpstreamID:   u.id,
			Name:         u.name,
			Priority:     u.priority,
			Weight:       u.weight,
			SentModel:    u.mapModel(model),
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

func (api *manageAPI) explainRoute(r *manageRequest) (*manageResponse, error) {
	if err := r.checkParams("model", "api"); err != nil {
		return nil, err
	}
	v, err := api.ops.explainRoute(r.ctx, r.pathValue("id"), r.query.Get("model"), r.query.Get("api"))
	return &manageResponse{body: v}, err
}

type healthView struct {
	State   string     `json:"state"`
	Reason  string     `json:"reason"`
	Since   *timestamp `json:"since"`
	Until   *timestamp `json:"until"`
	Running int64      `json:"running"`
}

func (ops *operations) newHealthView(u *upstreamRow) healthView {
	h := ops.health.forUpstream(u.seq, u.id).snapshot(time.Now().UnixMilli())
	v := healthView{State: h.state.String(), Reason: h.reason, Running: h.running}
	if h.state != keyReady {
		v.Since, v.Until = new(timestamp(h.changedAt)), new(timestamp(h.until))
	}
	return v
}
