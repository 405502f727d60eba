// This file is the frame of /manage, the JSON API for administrators: authentication, the role and the query
// parameters of each URL, and how bodies are read and responses written. The handlers are in manage_*.go. Each
// takes an authorized request and returns the body of the response or an error.
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
	"slices"
	"strconv"
	"strings"
	"time"
)

// A manageAPI is the JSON API under /manage. All fields are required.
type manageAPI struct {
	log             *logger
	store           *store
	ops             *operations
	auth            *managementAuth
	databaseProblem func() string // describes what is wrong with the database file; "" if nothing
}

// A managementAuth identifies the caller: the management key that a request presents, and its address.
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

// newOrigin returns who makes a request, for the audit trail.
func (a *managementAuth) newOrigin(w http.ResponseWriter, r *http.Request, caller actor, now time.Time) auditOrigin {
	return auditOrigin{
		actorID:   caller.id,
		role:      caller.role,
		address:   a.addresses.clientAddress(r),
		requestID: w.Header().Get("X-Request-Id"),
		at:        now.UnixMilli(),
	}
}

// A manageRoute is one URL of /manage: the role that it requires, its handler, which returns the body of the
// response, and its query parameters.
type manageRoute struct {
	pattern string
	minRole role
	handle  func(*manageRequest) (any, error)
	params  []string
}

// manageTable lists every URL of /manage; those of webhooks are in webhookRoutes.
func (api *manageAPI) manageTable() []manageRoute {
	fields := &api.ops.fields
	return append(api.webhookRoutes(), []manageRoute{
		{"GET /manage/projects", roleViewer, api.listProjects, pageParams("active", "name", "search")},
		{"POST /manage/projects", roleAdmin, withInput(fields.project, api.createProject), nil},
		{"GET /manage/projects/{id}", roleViewer, withValueQuery(api.getProject), valueParams()},
		{"PATCH /manage/projects/{id}", roleAdmin, withInput(fields.project, api.patchProject), nil},
		{"DELETE /manage/projects/{id}", roleAdmin, api.deleteProject, nil},
		{"POST /manage/projects/{id}/tokens/revoke", roleOperator, withoutInput(api.revokeProjectTokens), nil},
		{"DELETE /manage/projects/{id}/content", roleAdmin, api.eraseContent, nil},
		{"DELETE /manage/projects/{id}/end-users", roleAdmin, api.eraseEndUser, []string{"end_user"}},
		{"GET /manage/projects/{id}/cache", roleViewer, api.getCache, nil},
		{"DELETE /manage/projects/{id}/cache", roleOperator, api.emptyCache,
			[]string{"model", "endpoint", "older_than_seconds"}},
		{"GET /manage/projects/{id}/route", roleViewer, api.explainRoute, []string{"model", "api", "session"}},
		{"GET /manage/projects/{id}/upstreams", roleViewer, api.listUpstreams, nil},
		{"POST /manage/projects/{id}/upstreams", roleAdmin, withInput(fields.upstream, api.createUpstream), nil},
		{"GET /manage/projects/{id}/upstreams/{upstream}", roleViewer, api.getUpstream, nil},
		{"PATCH /manage/projects/{id}/upstreams/{upstream}", roleAdmin,
			withInput(fields.upstream, api.patchUpstream), nil},
		{"DELETE /manage/projects/{id}/upstreams/{upstream}", roleAdmin, api.deleteUpstream, nil},
		{"POST /manage/projects/{id}/upstreams/{upstream}/test", roleOperator, withoutInput(api.testKey), nil},
		{"GET /manage/tokens", roleViewer, api.listTokens, pageParams("project_id", "active", "name", "search")},
		{"POST /manage/tokens", roleOperator, withInput(fields.token, api.createToken), nil},
		{"GET /manage/tokens/{id}", roleViewer, withValueQuery(api.getToken), valueParams()},
		{"PATCH /manage/tokens/{id}", roleOperator, withInput(fields.token, api.patchToken), nil},
		{"DELETE /manage/tokens/{id}", roleOperator, api.revokeToken, nil},
		{"POST /manage/tokens/{id}/rotate", roleOperator, withInput(fields.rotate, api.rotateToken), nil},
		{"GET /manage/usage", roleViewer, api.getUsage,
			[]string{"interval", "group_by", "top", "project_id", "token_id", "from", "to", "format"}},
		{"GET /manage/requests", roleViewer, api.listRequests,
			pageParams("project_id", "token_id", "outcome", "cache", "from", "to", "session", "end_user", "tag",
				"search")},
		{"GET /manage/requests/{id}", roleViewer, api.getRequest, nil},
		{"GET /manage/requests/{id}/content", roleAdmin, api.getContent, nil},
		{"GET /manage/sessions", roleViewer, api.getSession, pageParams("session", "project_id")},
		{"GET /manage/streams", roleViewer, api.listStreams,
			pageParams("project_id", "token_id", "session", "end_user", "tag")},
		{"DELETE /manage/streams/{id}", roleOperator, api.abortStream, nil},
		{"GET /manage/replicas", roleViewer, api.listReplicas, nil},
		{"GET /manage/prices", roleViewer, api.listPrices, []string{"model", "provider"}},
		{"POST /manage/prices", roleAdmin, withInput(fields.price, api.setPrice), nil},
		{"GET /manage/prices/list", roleViewer, api.listListPrices, pageParams("search", "provider")},
		{"GET /manage/prices/unpriced", roleViewer, api.listUnpriced, nil},
		{"POST /manage/prices/simulate", roleViewer, api.simulate, nil},
		{"DELETE /manage/prices/{id}", roleAdmin, api.deletePrice, nil},
		{"GET /manage/audit", roleAdmin, api.listAudit, pageParams("actor", "action", "object", "from", "to")},
		{"GET /manage/keys", roleAdmin, api.listKeys, pageParams()},
		{"POST /manage/keys", roleAdmin, withInput(fields.key, api.createKey), nil},
		{"GET /manage/keys/{id}", roleAdmin, api.getKey, nil},
		{"PATCH /manage/keys/{id}", roleAdmin, withInput(fields.key, api.patchKey), nil},
		{"DELETE /manage/keys/{id}", roleAdmin, api.revokeKey, nil},
	}...)
}

func pageParams(filters ...string) []string { return append(filters, "limit", "after") }

// withInput returns a handler that decodes the body into the input of an operation. A PATCH changes an object;
// a POST may send the fields that only a new object can have too.
func withInput[I, R any](
	fields []field[I, R], handle func(*manageRequest, I) (any, error),
) func(*manageRequest) (any, error) {
	return func(r *manageRequest) (any, error) {
		var in I
		if err := decodeFields(r.body, &in, fields, r.http.Method == http.MethodPost); err != nil {
			return nil, err
		}
		return handle(r, in)
	}
}

// withoutInput returns a handler whose request has no fields.
func withoutInput(handle func(*manageRequest) (any, error)) func(*manageRequest) (any, error) {
	return func(r *manageRequest) (any, error) {
		if err := decodeObject(r.body, map[string]any{}); err != nil {
			return nil, err
		}
		return handle(r)
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
		refuse := methodNotAllowed(strings.Join(allowed, ", "))
		if _, twin := methods[path[:strings.LastIndexByte(path, '/')]+"/{id}"]; !twin || strings.HasSuffix(path, "}") {
			mux.Handle(path, refuse)
			continue
		}
		// The path also has the form of an id.
		for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE"} {
			if !slices.Contains(allowed, method) {
				mux.Handle(method+" "+path, refuse)
			}
		}
	}
	mux.HandleFunc("/manage/", notFound)
	return mux
}

func methodNotAllowed(allowed string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Allow", allowed)
		writeError(w, errMethodNotAllowed(allowed), shapeOpenAI)
	})
}

// A manageRequest is an authorized request.
type manageRequest struct {
	http           *http.Request
	ctx            context.Context
	actor          actor
	origin         auditOrigin // the actor and the time, for the audit trail
	body           []byte      // nil unless the method has one
	query          url.Values  // no name occurs twice
	now            time.Time
	ifMatchVersion int64 // the version in If-Match; 0: any
}

func (r *manageRequest) pathValue(name string) string { return r.http.PathValue(name) }

// A created is the body of a response about a new object, which has status 201.
type created struct{ view any }

// A versioned is a view of an object with a version, which is its ETag.
type versioned interface{ etag() int64 }

const maxManageBodyBytes = 1 << 20

// manageHandler authorizes a request, runs its handler and writes the response.
func (api *manageAPI) manageHandler(rt manageRoute) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		view, err := api.manage(rt, w, r)
		status := http.StatusOK
		if c, ok := view.(created); ok {
			view, status = c.view, http.StatusCreated
		}
		var body []byte
		contentType := "application/json"
		if table, ok := view.(csvTable); ok && err == nil {
			contentType = csvType
			body, err = table.encode()
		} else if err == nil {
			body, err = json.Marshal(view)
			body = append(body, '\n')
		}
		if err != nil {
			api.writeManageError(w, r, err)
			return
		}
		if v, ok := view.(versioned); ok {
			w.Header().Set("ETag", strconv.Quote(strconv.FormatInt(v.etag(), 10)))
		}
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		_, _ = w.Write(body)
	})
}

// manage authorizes a request, reads it and runs its handler.
func (api *manageAPI) manage(rt manageRoute, w http.ResponseWriter, r *http.Request) (any, error) {
	caller, err := api.authenticateManager(w, r)
	if err != nil {
		return nil, err
	}
	if caller.role.rank() < rt.minRole.rank() {
		return nil, errRoleTooLow(rt.minRole, caller.role)
	}
	now := time.Now()
	origin := api.auth.newOrigin(w, r, caller, now)
	req := &manageRequest{http: r, ctx: r.Context(), actor: caller, origin: origin, now: now}
	if req.query, err = parseManageQuery(r.URL.RawQuery, rt.params); err != nil {
		return nil, err
	}
	if r.Method != http.MethodGet {
		// A change is completed even if the caller disconnects. If it were stored but not put in force, a
		// revoked token would stay valid.
		req.ctx = context.WithoutCancel(req.ctx)
	}
	if problem := api.databaseProblem(); problem != "" { // a deleted file must not accept changes
		return nil, errStoreUnavailable(errors.New(problem))
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

// parseManageQuery parses a query. It refuses parameters that the route does not have: a filter that is silently
// ignored lists too much.
func parseManageQuery(raw string, params []string) (url.Values, error) {
	query, err := url.ParseQuery(raw)
	if err != nil {
		return nil, badRequest("invalid_value", "", "The query cannot be parsed.")
	}
	for name, values := range query {
		shown := clip(name, 64)
		switch {
		case len(values) > 1:
			return nil, badRequest("invalid_value", shown, "The query has "+shown+" twice.")
		case values[0] == "": // a script with an unset variable would list everything
			return nil, badRequest("invalid_value", shown, "The query has no value for "+shown+".")
		case !slices.Contains(params, name):
			known := cmp.Or(strings.Join(params, ", "), "none")
			return nil, badRequest("unknown_parameter", shown,
				"The query has an unknown parameter "+shown+"; known are: "+known+".")
		}
	}
	return query, nil
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
	return 0, badRequest("invalid_value", "If-Match", `If-Match must be the ETag of an earlier response, as in "3".`)
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
		return []byte("{}"), nil // no fields; needs no Content-Type
	}
	// A form on another site cannot send this type.
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		return nil, errContentType("application/json")
	}
	return body, nil
}

// authenticateManager returns the owner of the management key in the request.
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

// verifyKey returns the owner of a management key that is presented at a surface (a route), or why it is
// refused. It records a wrong key in the audit trail.
func (a *managementAuth) verifyKey(
	ctx context.Context, origin auditOrigin, surface, presented string, now time.Time,
) (actor, error) {
	caller, err := a.actorByKey(ctx, presented, now)
	if !errors.Is(err, errNotFound) {
		return caller, err
	}
	origin.actorID = caller.id
	a.signIns.auditFailedSignIn(ctx, origin, surface, now)
	// Only wrong keys are delayed. Callers with a valid key may share the guesser's address, as all callers do
	// behind a proxy that is not in TRUSTED_PROXIES.
	if wait, _ := a.throttle.forAddress(origin.address).allow(now); wait > 0 {
		return actor{}, errTooManyFailures(wait)
	}
	return actor{}, errManageKey
}

// environmentActor is the actor with MANAGEMENT_TOKEN.
func environmentActor() actor { return actor{actorEnvironment, "MANAGEMENT_TOKEN", roleAdmin} }

// actorByKey returns the owner of a management key. For a key that is not valid it returns errNotFound, with
// the key's ID if the key was once valid.
func (a *managementAuth) actorByKey(ctx context.Context, presented string, now time.Time) (actor, error) {
	if a.managementToken != nil {
		// Comparing hashes of equal length leaks nothing through timing.
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

// manageError converts the error of a handler into the error for its caller.
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
		requestID := w.Header().Get("X-Request-Id")
		api.log.Error("a management call failed", "request_id", requestID, "route", r.Pattern, "error", err)
	}
	writeError(w, e, shapeOpenAI)
}

// formatCursor returns the position in a list: a row's seq, and its name if the list is ordered by name.
// Clients treat it as opaque.
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
	v, err := r.choiceParam(name, "true", "false")
	if err != nil || v == "" {
		return nil, err
	}
	return new(v == "true"), nil
}

// choiceParam reads an optional parameter of the query that has few values; "" if it is missing.
func (r *manageRequest) choiceParam(name string, allowed ...string) (string, error) {
	v := r.query.Get(name)
	if v == "" {
		return "", nil
	}
	return v, checkChoice(name, v, allowed...)
}

// deleted confirms that the object whose ID is in the path, under this name, is deleted.
func (r *manageRequest) deleted(name string, err error) (any, error) {
	return map[string]any{"id": r.pathValue(name), "deleted": true}, err
}

// A listPage is a page of a list, and the cursor of the next page.
type listPage[T any] struct {
	Data []T    `json:"data"`
	Next string `json:"next,omitempty"`
}

// newListPage makes a page from rows, one more than limit if there is a next page.
func newListPage[R, T any](rows []R, limit int, toItem func(*R) T, cursorFor func(*R) string) listPage[T] {
	l := listPage[T]{Data: []T{}}
	for i := range rows {
		if i == limit {
			l.Next = cursorFor(&rows[i-1])
			break
		}
		l.Data = append(l.Data, toItem(&rows[i]))
	}
	return l
}

// A dollars is an amount in nano-dollars. In JSON it is a decimal number of dollars.
type dollars int64

func (d dollars) MarshalJSON() ([]byte, error) { return []byte(formatNanos(int64(d))), nil }
