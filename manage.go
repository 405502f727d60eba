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

// A role is what a management key may do. Each includes the ones before.
type role string

const (
	roleViewer   role = "viewer"   // sees everything but keys
	roleOperator role = "operator" // makes, changes and revokes tokens
	roleAdmin    role = "admin"    // projects, provider keys, prices, management keys
)

func (r role) rank() int {
	switch r {
	case roleViewer:
		return 1
	case roleOperator:
		return 2
	case roleAdmin:
		return 3
	}
	return 0
}

// A manageRoute is one URL of /manage, the least role it needs and what
// answers it.
type manageRoute struct {
	pattern string
	need    role
	handle  func(*manageRequest) (*reply, error)
}

// manageTable is every URL of /manage.
func (s *server) manageTable() []manageRoute {
	return []manageRoute{
		{"GET /manage/projects", roleViewer, s.listProjects},
		{"POST /manage/projects", roleAdmin, s.createProject},
		{"GET /manage/projects/{id}", roleViewer, s.getProject},
		{"PATCH /manage/projects/{id}", roleAdmin, s.patchProject},
		{"DELETE /manage/projects/{id}", roleAdmin, s.deleteProject},
		{"POST /manage/projects/{id}/tokens/revoke", roleOperator, s.revokeProjectTokens},
		{"DELETE /manage/projects/{id}/content", roleAdmin, s.eraseContent},
		{"GET /manage/projects/{id}/route", roleViewer, s.tryRoute},
		{"GET /manage/projects/{id}/upstreams", roleViewer, s.listUpstreams},
		{"POST /manage/projects/{id}/upstreams", roleAdmin, s.createUpstream},
		{"GET /manage/projects/{id}/upstreams/{upstream}", roleViewer, s.getUpstream},
		{"PATCH /manage/projects/{id}/upstreams/{upstream}", roleAdmin, s.patchUpstream},
		{"DELETE /manage/projects/{id}/upstreams/{upstream}", roleAdmin, s.deleteUpstream},
		{"GET /manage/tokens", roleViewer, s.listTokens},
		{"POST /manage/tokens", roleOperator, s.createToken},
		{"GET /manage/tokens/{id}", roleViewer, s.getToken},
		{"PATCH /manage/tokens/{id}", roleOperator, s.patchToken},
		{"DELETE /manage/tokens/{id}", roleOperator, s.revokeToken},
		{"POST /manage/tokens/{id}/rotate", roleOperator, s.rotateToken},
		{"GET /manage/usage", roleViewer, s.getUsage},
		{"GET /manage/requests", roleViewer, s.listRequests},
		{"GET /manage/requests/{id}", roleViewer, s.getRequest},
		{"GET /manage/requests/{id}/content", roleAdmin, s.getContent},
		{"GET /manage/streams", roleViewer, s.listStreams},
		{"DELETE /manage/streams/{id}", roleOperator, s.cutStream},
		{"GET /manage/prices", roleViewer, s.listPrices},
		{"POST /manage/prices", roleAdmin, s.setPrice},
		{"DELETE /manage/prices/{id}", roleAdmin, s.deletePrice},
		{"GET /manage/audit", roleAdmin, s.listAudit},
		{"GET /manage/keys", roleAdmin, s.listKeys},
		{"POST /manage/keys", roleAdmin, s.createKey},
		{"GET /manage/keys/{id}", roleAdmin, s.getKey},
		{"PATCH /manage/keys/{id}", roleAdmin, s.patchKey},
		{"DELETE /manage/keys/{id}", roleAdmin, s.revokeKey},
	}
}

func (s *server) manageRoutes() http.Handler {
	mux := http.NewServeMux()
	methods := map[string][]string{}
	for _, rt := range s.manageTable() {
		mux.Handle(rt.pattern, s.manageHandler(rt))
		method, path, _ := strings.Cut(rt.pattern, " ")
		methods[path] = append(methods[path], method)
	}
	for path, allowed := range methods {
		mux.Handle(path, wrongMethod(strings.Join(allowed, ", ")))
	}
	mux.HandleFunc("/manage/", s.notFound)
	return mux
}

func wrongMethod(allowed string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Allow", allowed)
		writeError(w, &apiError{status: http.StatusMethodNotAllowed, code: "method_not_allowed", msg: "This URL takes " + allowed + "."}, false)
	})
}

// An actor is who acts: a stored management key, or the one in the environment.
type actor struct {
	id, name string
	role     role
}

// A manageRequest is a request that has been let in.
type manageRequest struct {
	http  *http.Request
	ctx   context.Context
	actor actor
	by    origin     // the actor, for the audit trail
	body  []byte     // "" unless the method has one
	query url.Values // every name known and given once
	now   time.Time
	match int64 // the version in If-Match; 0: none asked for
}

func (r *manageRequest) path(name string) string { return r.http.PathValue(name) }

// A reply is what a handler answers with.
type reply struct {
	status  int   // 0: 200
	version int64 // becomes the ETag; 0: none
	body    any
}

const maxManageBody = 1 << 20

// manageHandler lets a request in, or not, and writes what its handler returns.
func (s *server) manageHandler(rt manageRoute) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rep, err := s.manage(rt, w, r)
		if err != nil {
			s.writeManageError(w, r, err)
			return
		}
		body, err := json.Marshal(rep.body)
		if err != nil {
			s.writeManageError(w, r, err)
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

func (s *server) manage(rt manageRoute, w http.ResponseWriter, r *http.Request) (*reply, error) {
	who, err := s.authenticateManager(w, r)
	if err != nil {
		return nil, err
	}
	if who.role.rank() < rt.need.rank() {
		return nil, &apiError{status: http.StatusForbidden, code: "role_too_low",
			msg: "This needs the role " + string(rt.need) + "; this key has the role " + string(who.role) + "."}
	}
	now := time.Now()
	req := &manageRequest{http: r, ctx: r.Context(), actor: who, by: s.originOf(w, r, who, now), now: now}
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
		if err := req.only(); err != nil {
			return nil, err
		}
	}
	if r.Method != http.MethodGet {
		// A change is carried through when its sender leaves: half of it, stored
		// but not in force, would let a revoked token live on.
		req.ctx = context.WithoutCancel(req.ctx)
	}
	if why := s.gone(); why != "" { // nothing may be stored in a file that has no name any more
		return nil, errUnavailable("store_unavailable", errors.New(why))
	}
	if req.match, err = ifMatch(r.Header["If-Match"]); err != nil {
		return nil, err
	}
	if r.Method == http.MethodPost || r.Method == http.MethodPatch {
		if req.body, err = manageBody(w, r); err != nil {
			return nil, err
		}
	}
	return rt.handle(req)
}

func ifMatch(values []string) (int64, error) {
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

func manageBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxManageBody))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, &apiError{status: http.StatusRequestEntityTooLarge, code: "request_too_large", msg: "The body is larger than 1 MiB."}
	}
	if err != nil {
		return nil, badRequest("request_cut", "", "The body ended early.")
	}
	if len(body) == 0 {
		return []byte("{}"), nil // all fields absent; needs no Content-Type
	}
	// A form of another site can only send the simple types.
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		return nil, &apiError{status: http.StatusUnsupportedMediaType, code: "unsupported_content_type", msg: "Send JSON, with Content-Type: application/json."}
	}
	return body, nil
}

// authenticateManager finds out whose management key the request presents.
func (s *server) authenticateManager(w http.ResponseWriter, r *http.Request) (actor, error) {
	denied := errNoManager()
	values := r.Header["Authorization"]
	if len(values) != 1 {
		return actor{}, denied
	}
	scheme, presented, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return actor{}, denied
	}
	now := time.Now()
	return s.present(r.Context(), s.originOf(w, r, actor{}, now), r.Pattern, presented, now)
}

// present returns who holds the management key that by presents at a door, or
// why it is refused. A wrong key is on the audit trail then.
func (s *server) present(ctx context.Context, by origin, door, presented string, now time.Time) (actor, error) {
	who, err := s.manager(ctx, presented, now)
	if !errors.Is(err, errNotFound) {
		return who, err
	}
	by.actor = who.id
	s.signInFailed(ctx, by, door, now)
	// Only wrong keys are held up: whoever shares an address with a guesser, as
	// all do behind a proxy that is not in TRUSTED_PROXIES, must not be.
	if wait := s.throttle.blocked(by.address, now); wait > 0 {
		return actor{}, &apiError{status: http.StatusTooManyRequests, code: "too_many_failures", retryAfter: wait,
			msg: "Too many wrong management keys from this address."}
	}
	s.throttle.add(by.address, now)
	return actor{}, errNoManager()
}

func errNoManager() *apiError {
	return &apiError{status: http.StatusUnauthorized, code: "invalid_management_key",
		msg: "A valid management key is needed: Authorization: Bearer <key>."}
}

// environmentActor is who holds MANAGEMENT_TOKEN.
func environmentActor() actor { return actor{actorEnvironment, "MANAGEMENT_TOKEN", roleAdmin} }

// manager returns who holds a management key, or errNotFound: with the key's id
// if it is one that was valid once, and else with none.
func (s *server) manager(ctx context.Context, presented string, now time.Time) (actor, error) {
	if s.cfg.managementToken != nil {
		// Hashes are compared: equal lengths, and no clue in the time taken.
		want, got := sha256.Sum256([]byte(s.cfg.managementToken())), sha256.Sum256([]byte(presented))
		if subtle.ConstantTimeCompare(want[:], got[:]) == 1 {
			return environmentActor(), nil
		}
	}
	hash, _, ok := hashCredential(keyPrefix, presented)
	if !ok {
		return actor{}, errNotFound
	}
	key, err := s.store.keyByHash(ctx, hash)
	switch {
	case errors.Is(err, errNotFound):
		return actor{}, errNotFound
	case err != nil:
		return actor{}, errUnavailable("store_unavailable", err)
	case key.revokedAt != nil, key.expiresAt != nil && now.UnixMilli() >= *key.expiresAt:
		return actor{id: key.id}, errNotFound
	}
	return actor{key.id, key.name, role(key.role)}, nil
}

// manageError turns what a handler returned into what its caller is told.
func manageError(err error) *apiError {
	switch {
	case errors.Is(err, errNotFound):
		return &apiError{status: http.StatusNotFound, code: "not_found", msg: "There is no such thing, or it was deleted."}
	case errors.Is(err, errStale):
		return &apiError{status: http.StatusPreconditionFailed, code: "stale_version", msg: "It was changed since it was read. Read it again, then repeat the change."}
	case errors.Is(err, errTaken):
		return &apiError{status: http.StatusBadRequest, code: "name_taken", param: "name", msg: "This name is taken."}
	case isTrouble(err):
		return errUnavailable("store_unavailable", err)
	}
	return asAPIError(err)
}

func (s *server) writeManageError(w http.ResponseWriter, r *http.Request, err error) {
	e := manageError(err)
	if e.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	if e.status >= 500 {
		s.log.Error("a management call failed", "request_id", w.Header().Get("X-Request-Id"), "route", r.Pattern, "error", err)
	}
	writeError(w, e, false)
}

// A pageQuery is where a list goes on and how long a page is.
type pageQuery struct {
	limit int
	seq   int64
	name  string
}

// page reads limit and after, and refuses names that are not in known.
func (r *manageRequest) page(known ...string) (pageQuery, error) {
	p := pageQuery{limit: 100}
	if err := r.only(append(known, "limit", "after")...); err != nil {
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

// only refuses query names that are not known: a filter that is silently
// ignored lists too much.
func (r *manageRequest) only(known ...string) error {
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

// cursor writes where a list goes on: a row's seq, and its name if the list is
// in order of names. Clients treat it as opaque.
func cursor(seq int64, name string) string {
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

// boolean reads an optional true or false from the query.
func (r *manageRequest) boolean(name string) (*bool, error) {
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

// A list is a page of things and where the next one begins.
type list[T any] struct {
	Data []T    `json:"data"`
	Next string `json:"next,omitempty"`
}

// pageOf makes a page from rows, of which one more than limit was asked for.
func pageOf[R, T any](rows []R, limit int, show func(*R) T, at func(*R) string) list[T] {
	l := list[T]{Data: []T{}}
	for i := range rows {
		if i == limit {
			l.Next = at(&rows[i-1])
			break
		}
		l.Data = append(l.Data, show(&rows[i]))
	}
	return l
}

// A stamp is a time in answers: unix milliseconds inside, RFC 3339 outside.
type stamp int64

func (t stamp) MarshalJSON() ([]byte, error) {
	return []byte(time.UnixMilli(int64(t)).UTC().Format(`"2006-01-02T15:04:05.000Z07:00"`)), nil
}

// field writes a time as an input for times has it.
func (t stamp) field() string { return time.UnixMilli(int64(t)).UTC().Format("2006-01-02T15:04") }

func stampOf(p *int64) *stamp {
	if p == nil {
		return nil
	}
	return new(stamp(*p))
}

// A dollars is money in answers: nano-dollars inside, a decimal number outside.
type dollars int64

func (d dollars) MarshalJSON() ([]byte, error) { return []byte(formatNanos(int64(d))), nil }
