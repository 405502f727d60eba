// This room is the door of /admin, the web pages for administrators: who may
// enter, which role each page needs, and how an answer is written. The pages stand in admin_*.go; each takes
// a request that has been let in and returns a page or an error. They read and
// change things through the handlers of /manage, so that one set of rules holds.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"
)

// An adminUI is the pages under /admin. It reads and changes everything through the
// management API, with the same checks.
type adminUI struct {
	adminDeps
	pages     *pageSet
	sentForms submittedForms // recently
}

// adminDeps has what an adminUI uses of the rest of the program. All fields are required.
type adminDeps struct {
	cfg             *config
	log             *logger
	store           *store
	ops             *operations
	auth            *managementAuth
	registry        *registry
	limits          *limitState
	ledger          *ledger
	running         *runningCalls
	endpoints       *endpointTable
	databaseProblem func() string // describes what is wrong with the database file; "" if nothing
	diskUse         func(context.Context) (diskUsage, error)
	keyID           string // of the encryption key
	started         time.Time
}

func newAdminUI(d adminDeps) (*adminUI, error) {
	pages, err := newPageSet()
	return &adminUI{adminDeps: d, pages: pages}, err
}

// An adminRoute is one URL of /admin with its methods, the least role it needs
// ("": nobody has to be signed in) and what answers it. A GET changes nothing.
type adminRoute struct {
	pattern string
	minRole role
	handle  func(*pageRequest) (*pageResponse, error)
}

// adminTable is every URL of /admin but the static files.
func (ui *adminUI) adminTable() []adminRoute {
	return []adminRoute{
		{"GET /admin/sign-in", "", ui.signInPage},
		{"POST /admin/sign-in", "", ui.signIn},
		{"POST /admin/sign-out", roleViewer, ui.signOut},
		{"POST /admin/sign-out-everywhere", roleViewer, ui.signOutEverywhere},
		{"GET /admin/{$}", roleViewer, ui.adminHome},
		{"GET /admin/account", roleViewer, ui.accountPage},
		{"GET /admin/dashboard", roleViewer, ui.dashboardPage},
		{"POST /admin/dashboard/export", roleViewer, ui.exportDashboard},
		{"GET /admin/requests", roleViewer, ui.requestsPage},
		{"GET /admin/requests/{id}", roleViewer, ui.requestPage},
		{"POST /admin/requests/export", roleViewer, ui.exportRequests},
		{"GET /admin/projects", roleViewer, ui.projectsPage},
		{"GET|POST /admin/projects/new", roleAdmin, ui.newProjectPage},
		{"GET /admin/projects/{id}", roleViewer, ui.projectPage},
		{"GET|POST /admin/projects/{id}/edit", roleAdmin, ui.editProject},
		{"GET|POST /admin/projects/{id}/activate", roleAdmin, ui.setProjectActivePage},
		{"GET|POST /admin/projects/{id}/deactivate", roleAdmin, ui.setProjectActivePage},
		{"GET|POST /admin/projects/{id}/delete", roleAdmin, ui.removeProject},
		{"GET|POST /admin/projects/{id}/erase", roleAdmin, ui.eraseContentPage},
		{"GET|POST /admin/projects/{id}/revoke-tokens", roleOperator, ui.revokeProjectTokensPage},
		{"GET /admin/projects/{id}/route", roleViewer, ui.tryRoutePage},
		{"GET|POST /admin/projects/{id}/upstreams/new", roleAdmin, ui.newUpstreamPage},
		{"GET|POST /admin/projects/{id}/upstreams/{upstream}/edit", roleAdmin, ui.editUpstream},
		{"GET|POST /admin/projects/{id}/upstreams/{upstream}/delete", roleAdmin, ui.removeUpstream},
		{"GET /admin/tokens", roleViewer, ui.tokensPage},
		{"GET|POST /admin/tokens/new", roleOperator, ui.newTokenPage},
		{"POST /admin/tokens/revoke", roleOperator, ui.revokeSelected},
		{"GET /admin/tokens/{id}", roleViewer, ui.tokenPage},
		{"GET|POST /admin/tokens/{id}/edit", roleOperator, ui.editToken},
		{"GET|POST /admin/tokens/{id}/rotate", roleOperator, ui.rotateTokenPage},
		{"GET|POST /admin/tokens/{id}/revoke", roleOperator, ui.revokeTokenPage},
		{"GET /admin/streams", roleViewer, ui.streamsPage},
		{"GET|POST /admin/streams/{id}/cut", roleOperator, ui.cutStreamPage},
		{"POST /admin/requests/{id}/content", roleAdmin, ui.contentPage},
		{"GET /admin/prices", roleViewer, ui.pricesPage},
		{"GET|POST /admin/prices/new", roleAdmin, ui.newPrice},
		{"GET|POST /admin/prices/{id}/delete", roleAdmin, ui.removePrice},
		{"GET /admin/keys", roleAdmin, ui.keysPage},
		{"GET|POST /admin/keys/new", roleAdmin, ui.newKeyPage},
		{"GET|POST /admin/keys/{id}/edit", roleAdmin, ui.editKey},
		{"GET|POST /admin/keys/{id}/revoke", roleAdmin, ui.revokeKeyPage},
		{"GET /admin/audit", roleAdmin, ui.auditPage},
		{"GET /admin/audit/verify", roleAdmin, ui.auditCheckPage},
		{"GET /admin/settings", roleAdmin, ui.settingsPage},
	}
}

// adminNav is the navigation, in order.
func adminNav() []navItem {
	return []navItem{
		{Title: "Dashboard", Path: "/admin/dashboard", minRole: roleViewer},
		{Title: "Projects", Path: "/admin/projects", minRole: roleViewer},
		{Title: "Tokens", Path: "/admin/tokens", minRole: roleViewer},
		{Title: "Calls", Path: "/admin/requests", minRole: roleViewer},
		{Title: "Running calls", Path: "/admin/streams", minRole: roleViewer},
		{Title: "Prices", Path: "/admin/prices", minRole: roleViewer},
		{Title: "Management keys", Path: "/admin/keys", minRole: roleAdmin},
		{Title: "Audit trail", Path: "/admin/audit", minRole: roleAdmin},
		{Title: "Settings", Path: "/admin/settings", minRole: roleAdmin},
	}
}

// A navItem is a link of the navigation and the role that sees it.
type navItem struct {
	Title, Path string
	minRole     role
	Here        bool
}

// A pageRequest is a request for a page that has been let in. What it embeds
// makes it fit for the handlers of /manage; see with and asking.
type pageRequest struct {
	*manageRequest
	form    url.Values // of a POST; nil else
	session *sessionRow
	secure  bool // the browser came over TLS
}

// withJSON returns a request for a handler of /manage, with a JSON body of fields.
func (r *pageRequest) withJSON(fields map[string]any) *manageRequest {
	m := *r.manageRequest
	m.query = url.Values{}
	body, err := json.Marshal(fields)
	if err != nil { // cannot be: strings, numbers, lists and maps of them
		body = []byte("null")
	}
	m.body = body
	return &m
}

// withQuery returns a request for a handler of /manage that has a query: pairs of
// name and value, of which those without a value are left out.
func (r *pageRequest) withQuery(pairs ...string) *manageRequest {
	m := *r.manageRequest
	m.query, m.body = url.Values{}, nil
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			m.query.Set(pairs[i], pairs[i+1])
		}
	}
	return &m
}

// nextPageURL returns the address of a list's next page: this one's, with another
// place to go on from; "" if there is none.
func (r *pageRequest) nextPageURL(after string) string {
	if after == "" {
		return ""
	}
	q := maps.Clone(r.query)
	q.Set("after", after)
	q.Del("done")
	return r.http.URL.Path + "?" + q.Encode()
}

// hasRole reports whether who asks has at least a role.
func (r *pageRequest) hasRole(need role) bool { return r.actor.role.rank() >= need.rank() }

// A pageResponse is what a handler answers with: a template and its data, or a place to
// go on to, or an answer that is no page.
type pageResponse struct {
	template string // the name of a file in templates/, without .html
	title    string
	status   int // 0: 200
	data     any
	redirect string // a path of ours; the browser goes there (303)
	cookie   *http.Cookie
	write    func(http.ResponseWriter) error // writes an answer of its own, such as an export
}

// redirectTo is the answer to a form that was carried out: the browser gets the page
// at path anew, so that reloading it repeats nothing. done names a notice.
func redirectTo(path, done string) *pageResponse {
	if done != "" {
		path += "?done=" + done
	}
	return &pageResponse{redirect: path}
}

// adminRoutes is /admin with all that stands in front of it.
func (ui *adminUI) adminRoutes() http.Handler {
	mux := http.NewServeMux()
	known := map[string]string{}
	for _, rt := range ui.adminTable() {
		methods, path, _ := strings.Cut(rt.pattern, " ")
		known[path] += methods
		for method := range strings.SplitSeq(methods, "|") {
			mux.Handle(method+" "+path, ui.pageHandler(rt))
		}
	}
	wrong := ui.pageHandler(adminRoute{"", "", func(*pageRequest) (*pageResponse, error) { return nil, errMethodNotAllowed("GET, HEAD or POST") }})
	for path, methods := range known {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			if !strings.Contains(methods, method) {
				mux.Handle(method+" "+path, wrong)
			}
		}
	}
	mux.HandleFunc("GET /admin/static/{name}", ui.handleStatic)
	mux.Handle("/admin/", ui.pageHandler(adminRoute{"", "", func(*pageRequest) (*pageResponse, error) { return nil, errNotFound }}))
	return ui.withPageSecurity(mux)
}

// errNotSignedIn says that somebody has to sign in first.
var errNotSignedIn = errors.New("not signed in")

// pageHandler lets a request in, or not, and writes what its handler returns.
func (ui *adminUI) pageHandler(rt adminRoute) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		pr := &pageRequest{manageRequest: &manageRequest{http: r, ctx: r.Context(), now: time.Now()}, secure: ui.isSecureRequest(r)}
		err := ui.authorizePage(rt.minRole, w, pr)
		var p *pageResponse
		if err == nil {
			p, err = rt.handle(pr)
		}
		if err != nil {
			p = ui.errorPage(w, pr, err)
		}
		ui.writePage(w, pr, p)
	})
}

const maxFormBytes = 1 << 20

// authorizePage finds out who is signed in and reads the form.
func (ui *adminUI) authorizePage(need role, w http.ResponseWriter, r *pageRequest) error {
	if err := ui.loadSession(r); err != nil {
		return err
	}
	r.origin = ui.auth.newOrigin(w, r.http, r.actor, r.now)
	if need != "" && r.session == nil {
		return errNotSignedIn
	}
	if need != "" && !r.hasRole(need) {
		return errRoleTooLow(need, r.actor.role)
	}
	var err error
	if r.query, err = url.ParseQuery(r.http.URL.RawQuery); err != nil {
		return badRequest("invalid_value", "", "The address has a query that cannot be parsed.")
	}
	for name, values := range r.query {
		if len(values) > 1 {
			return badRequest("invalid_value", clip(name, 64), "The address gives "+clip(name, 64)+" twice.")
		}
	}
	if r.http.Method != http.MethodPost {
		return nil
	}
	r.ctx = context.WithoutCancel(r.ctx) // a change is carried through when its sender leaves
	if why := ui.databaseProblem(); why != "" {
		return errStoreUnavailable(errors.New(why))
	}
	return r.readForm(w)
}

// readForm reads the body, which must be a form of ours.
func (r *pageRequest) readForm(w http.ResponseWriter) error {
	if t, _, err := mime.ParseMediaType(r.http.Header.Get("Content-Type")); err != nil || t != "application/x-www-form-urlencoded" {
		return errContentType("application/x-www-form-urlencoded")
	}
	r.http.Body = http.MaxBytesReader(w, r.http.Body, maxFormBytes)
	if err := r.http.ParseForm(); err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return errBodyTooLarge(maxFormBytes)
		}
		return badRequest("invalid_value", "", "The form cannot be read.")
	}
	r.form = r.http.PostForm
	var err error
	if v := r.form.Get("version"); v != "" { // of what the form was made from
		r.ifMatchVersion, err = parseIfMatch([]string{v})
	}
	return err
}

// errorPage is the page that says what went wrong.
func (ui *adminUI) errorPage(w http.ResponseWriter, r *pageRequest, err error) *pageResponse {
	if errors.Is(err, errNotSignedIn) {
		to := "/admin/sign-in"
		if r.http.Method == http.MethodGet && r.http.URL.Path != "/admin/" {
			to += "?next=" + url.QueryEscape(r.http.URL.RequestURI())
		} else if r.http.Method == http.MethodPost {
			to += "?done=ended"
		}
		return &pageResponse{redirect: to}
	}
	e := manageError(err)
	if e.status >= 500 {
		ui.log.Error("a page failed", "request_id", w.Header().Get("X-Request-Id"), "route", r.http.Pattern, "error", err)
	}
	title := http.StatusText(e.status)
	if e.status == http.StatusNotFound {
		title = "Not found"
	}
	return &pageResponse{template: "error", title: title, status: e.status,
		data: errorView{title, e.msg, w.Header().Get("X-Request-Id"), e.status >= 500}}
}

// An errorView is what the page about an error shows.
type errorView struct {
	Title, Message, RequestID string
	Ours                      bool
}

// writeErrorPage answers a request that nobody has looked at yet.
func (ui *adminUI) writeErrorPage(w http.ResponseWriter, r *http.Request, e *apiError) {
	pr := &pageRequest{manageRequest: &manageRequest{http: r, ctx: r.Context(), now: time.Now()}}
	ui.writePage(w, pr, ui.errorPage(w, pr, e))
}

// A pageView is what every template sees.
type pageView struct {
	Title    string
	SignedIn bool
	Name     string // of the key that is signed in with
	Role     role
	Can      map[string]bool // by role: whether who is signed in has it
	Nav      []navItem
	Notice   string
	Data     any
}

// writePage writes a page as a whole or, if its template fails, an error.
func (ui *adminUI) writePage(w http.ResponseWriter, r *pageRequest, p *pageResponse) {
	h := w.Header()
	if p.cookie != nil {
		http.SetCookie(w, p.cookie)
	}
	switch {
	case p.redirect != "":
		h.Set("Location", p.redirect)
		w.WriteHeader(http.StatusSeeOther)
		return
	case p.write != nil:
		if err := p.write(w); err != nil {
			ui.log.Warn("an answer was cut", "request_id", h.Get("X-Request-Id"), "route", r.http.Pattern, "error", err)
			panic(http.ErrAbortHandler) // the browser must see that it is not whole
		}
		return
	}
	var b bytes.Buffer
	if err := ui.pages.render(&b, p.template, ui.newPageView(r, p)); err != nil {
		ui.log.Error("a page failed", "request_id", h.Get("X-Request-Id"), "route", r.http.Pattern, "error", err)
		h.Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = w.Write([]byte("Internal error. The log has it under the request id " + h.Get("X-Request-Id") + ".\n"))
		return
	}
	h.Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(max(p.status, http.StatusOK))
	_, _ = w.Write(b.Bytes())
}

func (ui *adminUI) newPageView(r *pageRequest, p *pageResponse) *pageView {
	v := &pageView{Title: p.title, Data: p.data, Can: map[string]bool{}}
	if r.query != nil {
		v.Notice = noticeText(r.query.Get("done"))
	}
	if r.session == nil {
		return v
	}
	v.SignedIn, v.Name, v.Role = true, r.actor.name, r.actor.role
	for _, need := range []role{roleViewer, roleOperator, roleAdmin} {
		v.Can[string(need)] = r.hasRole(need)
	}
	for _, item := range adminNav() {
		item.Here = r.http.URL.Path == item.Path || strings.HasPrefix(r.http.URL.Path, item.Path+"/")
		if r.hasRole(item.minRole) {
			v.Nav = append(v.Nav, item)
		}
	}
	return v
}

// noticeText is what a page says about the form that led to it.
func noticeText(done string) string {
	switch done {
	case "saved":
		return "Saved."
	case "deleted":
		return "Removed."
	case "revoked":
		return "Revoked. The tokens do not work any more."
	case "cut":
		return "The call is cut."
	case "none-chosen":
		return "No token was chosen."
	case "project-made":
		return "The project is made. Next, make a token for it."
	case "ended":
		return "Your session has ended. Sign in again, then repeat what you did."
	case "signed-out":
		return "You are signed out."
	case "signed-out-everywhere":
		return "All sessions of this key are ended, here and elsewhere."
	}
	return ""
}

// adminHome is where somebody goes who asks for nothing in particular.
func (ui *adminUI) adminHome(*pageRequest) (*pageResponse, error) {
	return &pageResponse{redirect: "/admin/dashboard"}, nil
}

// withPageSecurity sets the headers that every answer has, and refuses host names that
// are not ours and requests that another site may have caused.
func (ui *adminUI) withPageSecurity(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		secure := ui.isSecureRequest(r)
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "+
			"form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=()")
		h.Set("Referrer-Policy", "no-referrer")
		if !secure && !isLoopbackHost(r.Host) {
			// There browsers send no Sec-Fetch-Site, and with no-referrer they also
			// hide the Origin of our own forms.
			h.Set("Referrer-Policy", "same-origin")
		}
		switch {
		case !ourHost(ui.cfg.publicURL, r.Host):
			ui.writeErrorPage(w, r, errUnknownHost)
		case r.Method != http.MethodGet && r.Method != http.MethodHead && r.Method != http.MethodPost:
			h.Set("Allow", "GET, HEAD, POST")
			ui.writeErrorPage(w, r, errMethodNotAllowed("GET, HEAD or POST"))
		case r.Method == http.MethodPost && !sameOrigin(r, secure):
			ui.writeErrorPage(w, r, errCrossOrigin)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// isSecureRequest reports whether the browser came over TLS: to us, or to what
// stands before us and answers for PUBLIC_URL.
func (ui *adminUI) isSecureRequest(r *http.Request) bool {
	public := ui.cfg.publicURL
	return r.TLS != nil || public != nil && public.Scheme == "https" && strings.EqualFold(r.Host, public.Host)
}

func isLoopbackHost(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// sameOrigin reports whether a browser says that a request comes from our own
// pages. One that says nothing at all is not believed: every browser sends one
// of the two with a form.
func sameOrigin(r *http.Request, secure bool) bool {
	if site := r.Header["Sec-Fetch-Site"]; len(site) > 0 {
		return len(site) == 1 && (site[0] == "same-origin" || site[0] == "none")
	}
	scheme := "http"
	if secure {
		scheme = "https"
	}
	origin := r.Header["Origin"]
	return len(origin) == 1 && strings.EqualFold(origin[0], scheme+"://"+r.Host)
}
