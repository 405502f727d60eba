// This file is the entrance of /admin, the web pages for administrators: who may see which page, and
// how a response is written. The pages are in the other admin files; each takes a request that was
// let in and returns a page or an error. They read and change things through the operations of
// /manage, so that the same rules hold.
package main

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// An adminUI serves the pages under /admin.
type adminUI struct {
	adminDeps
	pages      *pageSet
	reference  func() ([]byte, error) // the content of /admin/api; rendered on first use
	sentForms  submittedForms
	keptForms  keptForms
	playground playground
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
	databaseProblem func() string // returns what is wrong with the database file, "" if nothing
	diskUse         func(context.Context) (diskUsage, error)
	storms          func(now int64) []failingRequest
	// callAPI serves a request to /v1 that presents the token.
	callAPI func(w http.ResponseWriter, r *http.Request, token secret)
	keyID   string // of the encryption key
	started time.Time
}

func newAdminUI(d adminDeps) (*adminUI, error) {
	pages, err := newPageSet()
	return &adminUI{adminDeps: d, pages: pages, reference: referenceBody(pages),
		playground: playground{values: map[playgroundOwner]secret{}, running: map[string]int{}}}, err
}

// An adminRoute is one URL of /admin: its methods, the least role it needs ("": no session needed)
// and its handler. A GET changes nothing.
type adminRoute struct {
	pattern string
	minRole role
	handle  func(*pageRequest) (*pageResponse, error)
}

// adminTable returns every URL of /admin except the static files.
func (ui *adminUI) adminTable() []adminRoute {
	return append(ui.webhookPages(), []adminRoute{
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
		{"GET /admin/sessions", roleViewer, ui.sessionPage},
		{"GET /admin/projects", roleViewer, ui.projectsPage},
		{"GET|POST /admin/projects/new", roleAdmin, ui.newProjectPage},
		{"GET /admin/projects/{id}", roleViewer, ui.projectPage},
		{"GET|POST /admin/projects/{id}/edit", roleAdmin, ui.editProject},
		{"GET|POST /admin/projects/{id}/activate", roleAdmin, ui.activateProject},
		{"GET|POST /admin/projects/{id}/deactivate", roleAdmin, ui.deactivateProject},
		{"GET|POST /admin/projects/{id}/delete", roleAdmin, ui.deleteProjectPage},
		{"GET|POST /admin/projects/{id}/erase", roleAdmin, ui.eraseContentPage},
		{"GET|POST /admin/projects/{id}/erase-end-user", roleAdmin, ui.eraseEndUserPage},
		{"GET|POST /admin/projects/{id}/empty-cache", roleOperator, ui.emptyCachePage},
		{"GET|POST /admin/projects/{id}/revoke-tokens", roleOperator, ui.revokeProjectTokensPage},
		{"GET /admin/projects/{id}/route", roleViewer, ui.testRoutePage},
		{"GET /admin/projects/{id}/values", roleViewer, ui.projectValuesPage},
		{"GET|POST /admin/projects/{id}/upstreams/new", roleAdmin, ui.newUpstreamPage},
		{"GET|POST /admin/projects/{id}/upstreams/{upstream}/edit", roleAdmin, ui.editUpstream},
		{"GET|POST /admin/projects/{id}/upstreams/{upstream}/delete", roleAdmin, ui.deleteUpstreamPage},
		{"POST /admin/projects/{id}/upstreams/{upstream}/test", roleOperator, ui.testKeyPage},
		{"GET /admin/tokens", roleViewer, ui.tokensPage},
		{"GET|POST /admin/tokens/new", roleOperator, ui.newTokenPage},
		{"POST /admin/tokens/revoke", roleOperator, ui.revokeSelected},
		{"GET /admin/tokens/{id}", roleViewer, ui.tokenPage},
		{"GET /admin/tokens/{id}/values", roleViewer, ui.tokenValuesPage},
		{"GET|POST /admin/tokens/{id}/edit", roleOperator, ui.editToken},
		{"GET|POST /admin/tokens/{id}/rotate", roleOperator, ui.rotateTokenPage},
		{"GET|POST /admin/tokens/{id}/revoke", roleOperator, ui.revokeTokenPage},
		{"GET|POST /admin/playground", roleOperator, ui.playgroundPage},
		{"GET /admin/streams", roleViewer, ui.streamsPage},
		{"GET|POST /admin/streams/{id}/cut", roleOperator, ui.endCallPage},
		{"POST /admin/requests/{id}/content", roleAdmin, ui.contentPage},
		{"GET /admin/prices", roleViewer, ui.pricesPage},
		{"GET /admin/prices/list", roleViewer, ui.priceListPage},
		{"GET /admin/prices/simulate", roleViewer, ui.simulatePage},
		{"GET|POST /admin/prices/new", roleAdmin, ui.newPricePage},
		{"GET|POST /admin/prices/{id}/delete", roleAdmin, ui.deletePricePage},
		{"GET /admin/keys", roleAdmin, ui.keysPage},
		{"GET|POST /admin/keys/new", roleAdmin, ui.newKeyPage},
		{"GET|POST /admin/keys/{id}/edit", roleAdmin, ui.editKey},
		{"GET|POST /admin/keys/{id}/revoke", roleAdmin, ui.revokeKeyPage},
		{"GET /admin/audit", roleAdmin, ui.auditPage},
		{"GET /admin/audit/verify", roleAdmin, ui.auditCheckPage},
		{"GET /admin/settings", roleAdmin, ui.settingsPage},
		{"GET /admin/replicas", roleViewer, ui.replicasPage},
		{"GET /admin/api", roleViewer, ui.referencePage},
	}...)
}

// adminNav returns the navigation, in order.
func adminNav() []navItem {
	return []navItem{
		{Title: "Dashboard", Path: "/admin/dashboard", minRole: roleViewer},
		{Title: "Projects", Path: "/admin/projects", minRole: roleViewer},
		{Title: "Tokens", Path: "/admin/tokens", minRole: roleViewer},
		{Title: "Playground", Path: "/admin/playground", minRole: roleOperator},
		{Title: "Calls", Path: "/admin/requests", minRole: roleViewer},
		{Title: "Running calls", Path: "/admin/streams", minRole: roleViewer},
		{Title: "Prices", Path: "/admin/prices", minRole: roleViewer},
		{Title: "Management keys", Path: "/admin/keys", minRole: roleAdmin},
		{Title: "Webhooks", Path: "/admin/webhooks", minRole: roleViewer},
		{Title: "Audit trail", Path: "/admin/audit", minRole: roleAdmin},
		{Title: "Replicas", Path: "/admin/replicas", minRole: roleViewer},
		{Title: "API reference", Path: "/admin/api", minRole: roleViewer},
		{Title: "Settings", Path: "/admin/settings", minRole: roleAdmin},
	}
}

// A navItem is a link of the navigation, and the least role that sees it.
type navItem struct {
	Title, Path string
	minRole     role
	Here        bool
}

// A pageRequest is a request for a page that was let in.
type pageRequest struct {
	*manageRequest
	form    url.Values // of a POST, otherwise nil
	session *sessionRow
	secure  bool // the browser connected over TLS
	hasForm bool // a GET of the address shows the form that a POST sends

	connection *http.ResponseController // for pages that take longer than others
}

// listRequest returns the request of /manage for a page of a list. Its query has the limit, the
// cursor and the named filters, as far as they are given: with nothing but the limit, it is the
// start of the whole list.
func (r *pageRequest) listRequest(limit int64, filters ...string) *manageRequest {
	m := *r.manageRequest
	m.query = url.Values{"limit": {formatInt(limit)}}
	for _, name := range append(filters, "after") {
		value := strings.TrimSpace(r.query.Get(name))
		if name == "from" || name == "to" {
			value = formTimeToRFC3339(value)
		}
		if value != "" {
			m.query.Set(name, value)
		}
	}
	return &m
}

// nextPageURL returns the address of a list's next page, "" if there is none.
func (r *pageRequest) nextPageURL(after string) string {
	if after == "" {
		return ""
	}
	q := maps.Clone(r.query)
	q.Set("after", after)
	return r.http.URL.Path + "?" + q.Encode()
}

// hasRole reports whether the actor's role is at least minRole.
func (r *pageRequest) hasRole(minRole role) bool { return r.actor.role.rank() >= minRole.rank() }

func (r *pageRequest) isPost() bool { return r.http.Method == http.MethodPost }

// A pageResponse is a template and its data, or a redirect, or a download.
type pageResponse struct {
	template string // the name of a file in templates/, without .html
	title    string
	status   int // 0: 200
	data     any
	rendered []byte // HTML that takes the place of the element with the ID "rendered"
	redirect string // a path under /admin (303)
	notice   notice // for the page that the redirect leads to
	cookie   *http.Cookie
	write    func(http.ResponseWriter) error // writes a download
}

// renderedElement is where a page has pageResponse.rendered. Templates escape the text of people, so none can forge it.
const renderedElement = `<div id="rendered"></div>`

// showPage is the response that renders a template.
func showPage(template, title string, data any) *pageResponse {
	return &pageResponse{template: template, title: title, data: data}
}

// redirectTo is the response to a form that succeeded: the browser loads another page, so that a
// reload repeats nothing. done names a notice of templates/parts/layout.html.
func redirectTo(path, done string) *pageResponse {
	return &pageResponse{redirect: path, notice: notice{Name: done, Count: 1}}
}

// redirectWithCount is redirectTo for a form that changed count objects.
func redirectWithCount(path, done string, count int64) *pageResponse {
	return &pageResponse{redirect: path, notice: notice{Name: done, Count: count}}
}

// adminRoutes returns the handler of everything under /admin.
func (ui *adminUI) adminRoutes() http.Handler {
	fail := func(err error) http.Handler {
		return ui.pageHandler(adminRoute{handle: func(*pageRequest) (*pageResponse, error) { return nil, err }})
	}
	mux := http.NewServeMux()
	allowed := map[string]string{}
	for _, rt := range ui.adminTable() {
		methods, path, _ := strings.Cut(rt.pattern, " ")
		allowed[path] += methods
		for method := range strings.SplitSeq(methods, "|") {
			mux.Handle(method+" "+path, ui.pageHandler(rt))
		}
	}
	for path, methods := range allowed {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			if !strings.Contains(methods, method) {
				mux.Handle(method+" "+path, fail(errMethodNotAllowed("GET, HEAD or POST")))
			}
		}
	}
	mux.HandleFunc("GET /admin/static/{name}", ui.handleStatic)
	mux.Handle("/admin/", fail(errNotFound))
	return ui.withPageSecurity(mux)
}

// errNotSignedIn means that the page needs a session.
var errNotSignedIn = errors.New("not signed in")

// newPageRequest returns a request of which nothing was checked yet.
func (ui *adminUI) newPageRequest(r *http.Request) *pageRequest {
	m := &manageRequest{http: r, ctx: r.Context(), now: time.Now()}
	return &pageRequest{manageRequest: m, secure: ui.isSecureRequest(r)}
}

// pageHandler checks that a request may see the page, and writes what the page's handler returns.
func (ui *adminUI) pageHandler(rt adminRoute) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		pr := ui.newPageRequest(r)
		pr.connection = http.NewResponseController(w)
		pr.hasForm = strings.HasPrefix(rt.pattern, "GET|POST ")
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

// sessionCheckInterval is how soon a response that takes long ends after its session.
const sessionCheckInterval = 500 * time.Millisecond

// watchSession calls end when the session of a request that was let in has ended, for example with its key, or when its
// role has become lower. It returns then, or when ctx is done.
func (ui *adminUI) watchSession(ctx context.Context, r *pageRequest, end func()) {
	ticker := time.NewTicker(sessionCheckInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		current := ui.newPageRequest(r.http)
		current.ctx = ctx
		err := ui.loadSession(current)
		if err == nil && (current.session == nil || !current.hasRole(r.actor.role)) {
			end()
			return
		}
	}
}

// A connListener accepts one connection, which is in the channel.
type connListener chan net.Conn

func (l connListener) Addr() net.Addr { return &net.UnixAddr{} }
func (l connListener) Close() error   { close(l); return nil }
func (l connListener) Accept() (net.Conn, error) {
	if conn, ok := <-l; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}

const maxFormBytes = 1 << 20

// authorizePage loads the session, checks the role and reads the query and the form.
func (ui *adminUI) authorizePage(minRole role, w http.ResponseWriter, r *pageRequest) error {
	if err := ui.loadSession(r); err != nil {
		return err
	}
	r.origin = ui.auth.newOrigin(w, r.http, r.actor, r.now)
	if minRole != "" && r.session == nil {
		return errNotSignedIn
	}
	if minRole != "" && !r.hasRole(minRole) {
		return errRoleTooLow(minRole, r.actor.role)
	}
	var err error
	if r.query, err = url.ParseQuery(r.http.URL.RawQuery); err != nil {
		return badRequest("invalid_value", "", "The query of this address is malformed.")
	}
	for name, values := range r.query {
		if len(values) > 1 {
			return badRequest("invalid_value", clip(name, 64), "The address has "+clip(name, 64)+" more than once.")
		}
	}
	if !r.isPost() {
		return nil
	}
	r.ctx = context.WithoutCancel(r.ctx) // a change is completed even if the browser disconnects
	if problem := ui.databaseProblem(); problem != "" {
		return errStoreUnavailable(errors.New(problem))
	}
	return r.readForm(w)
}

// readForm reads the body, which must be a form as browsers send it.
func (r *pageRequest) readForm(w http.ResponseWriter) error {
	const formType = "application/x-www-form-urlencoded"
	if t, _, err := mime.ParseMediaType(r.http.Header.Get("Content-Type")); err != nil || t != formType {
		return errContentType(formType)
	}
	r.http.Body = http.MaxBytesReader(w, r.http.Body, maxFormBytes)
	if err := r.http.ParseForm(); err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return errBodyTooLarge(maxFormBytes)
		}
		return badRequest("invalid_value", "", "The form is malformed.")
	}
	r.form = r.http.PostForm
	var err error
	if v := r.form.Get("version"); v != "" { // the version that the form was made from
		r.ifMatchVersion, err = parseIfMatch([]string{v})
	}
	return err
}

// signInFirst is the response to a request that needs a session and has none: a redirect to the sign-in page. A form
// with input gets the sign-in page at once, which keeps the input.
func (ui *adminUI) signInFirst(w http.ResponseWriter, r *pageRequest) *pageResponse {
	to := "/admin/sign-in"
	switch {
	case r.isPost() && r.hasForm:
		kept := ""
		if r.readForm(w) == nil {
			kept = encodeKeptForm(r.form)
		}
		if kept != "" {
			v := signInView{Next: r.http.URL.RequestURI(), Kept: kept, Unencrypted: r.isUnencrypted()}
			return &pageResponse{template: "sign-in", title: "Sign in", status: http.StatusUnauthorized, data: v}
		}
		return redirectTo(to+"?next="+url.QueryEscape(r.http.URL.Path), "ended")
	case r.isPost():
		return redirectTo(to, "ended")
	case r.http.Method == http.MethodGet && r.http.URL.Path != "/admin/":
		to += "?next=" + url.QueryEscape(r.http.URL.RequestURI())
	}
	return &pageResponse{redirect: to}
}

// errorPage returns the page about an error or, without a session, what leads to one.
func (ui *adminUI) errorPage(w http.ResponseWriter, r *pageRequest, err error) *pageResponse {
	if errors.Is(err, errNotSignedIn) {
		return ui.signInFirst(w, r)
	}
	e := manageError(err)
	if e.status >= 500 {
		ui.logFailure(w, r, err)
	}
	title := capitalize(strings.ToLower(http.StatusText(e.status)))
	return &pageResponse{template: "error", title: title, status: e.status,
		data: errorView{Message: e.msg, RequestID: w.Header().Get("X-Request-Id"), InLog: e.status >= 500}}
}

// An errorView is the data of templates/error.html.
type errorView struct {
	Message, RequestID string
	InLog              bool // the log has more about it
}

// writeErrorPage answers a request of which nothing was checked yet.
func (ui *adminUI) writeErrorPage(w http.ResponseWriter, r *http.Request, e *apiError) {
	pr := ui.newPageRequest(r)
	ui.writePage(w, pr, ui.errorPage(w, pr, e))
}

// A pageView is the data of every template.
type pageView struct {
	Title    string
	SignedIn bool
	Name     string // of the management key
	Role     role
	Can      map[string]bool // whether the role includes a role
	Nav      []navItem
	Notice   notice            // about the form that led to this page
	Given    map[string]string // the parameters of the address
	Data     any
}

// writePage writes the whole page or, if its template fails, an error.
func (ui *adminUI) writePage(w http.ResponseWriter, r *pageRequest, p *pageResponse) {
	h := w.Header()
	if p.cookie != nil {
		http.SetCookie(w, p.cookie)
	}
	switch {
	case p.redirect != "":
		if p.notice.Name != "" {
			http.SetCookie(w, p.notice.cookie(r.secure))
		}
		h.Set("Location", p.redirect)
		w.WriteHeader(http.StatusSeeOther)
		return
	case p.write != nil:
		if err := p.write(w); err != nil {
			ui.log.Warn("a download was cut off", "request_id", h.Get("X-Request-Id"),
				"route", r.http.Pattern, "error", err)
			panic(http.ErrAbortHandler) // the browser must see that the file is incomplete
		}
		return
	}
	var b bytes.Buffer
	v := ui.newPageView(r, p)
	if v.Notice.Name != "" {
		http.SetCookie(w, notice{}.cookie(r.secure)) // it is shown once
	}
	if err := ui.pages.render(&b, p.template, v); err != nil {
		ui.logFailure(w, r, err)
		h.Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = w.Write([]byte("Internal error. See the log for request ID " + h.Get("X-Request-Id") + ".\n"))
		return
	}
	h.Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(max(p.status, http.StatusOK))
	before, after, _ := bytes.Cut(b.Bytes(), []byte(renderedElement))
	_, _ = w.Write(slices.Concat(before, p.rendered, after))
}

func (ui *adminUI) logFailure(w http.ResponseWriter, r *pageRequest, err error) {
	ui.log.Error("a page failed", "request_id", w.Header().Get("X-Request-Id"), "route", r.http.Pattern, "error", err)
}

func (ui *adminUI) newPageView(r *pageRequest, p *pageResponse) *pageView {
	v := &pageView{Title: p.title, Data: p.data, Can: map[string]bool{}, Given: map[string]string{}, Notice: r.notice()}
	for name := range r.query {
		v.Given[name] = r.query.Get(name)
	}
	if r.session == nil {
		return v
	}
	v.SignedIn, v.Name, v.Role = true, r.actor.name, r.actor.role
	for _, minRole := range []role{roleViewer, roleOperator, roleAdmin} {
		v.Can[string(minRole)] = r.hasRole(minRole)
	}
	for _, item := range adminNav() {
		item.Here = r.http.URL.Path == item.Path || strings.HasPrefix(r.http.URL.Path, item.Path+"/")
		if r.hasRole(item.minRole) {
			v.Nav = append(v.Nav, item)
		}
	}
	return v
}

func (ui *adminUI) adminHome(*pageRequest) (*pageResponse, error) {
	return &pageResponse{redirect: "/admin/dashboard"}, nil
}

// withPageSecurity sets the security headers of every response. It refuses unknown host names (DNS
// rebinding) and forms that another site may have sent.
func (ui *adminUI) withPageSecurity(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		secure := ui.isSecureRequest(r)
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "+
			"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=()")
		h.Set("Referrer-Policy", "no-referrer")
		if !secure && !isLoopbackHost(r.Host) {
			// Over plain HTTP browsers send no Sec-Fetch-Site, and no-referrer would make them hide
			// the Origin of our own forms too.
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

// isSecureRequest reports whether the browser connected over TLS: to this process, or to the
// reverse proxy in front of it that serves PUBLIC_URL.
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

// sameOrigin reports whether the browser states that the request comes from our own pages. A request
// with neither header is refused: every browser sends one of the two with a form.
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

// submittedForms remembers the latest forms that were carried out, so that reloading the response
// to one that shows a secret does not create another secret.
type submittedForms struct {
	mu   sync.Mutex
	ids  [512]string // a ring
	next int
}

// claim reports whether a form is submitted for the first time.
func (s *submittedForms) claim(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(s.ids[:], id) {
		return false
	}
	s.ids[s.next] = id
	s.next = (s.next + 1) % len(s.ids)
	return true
}

const (
	maxKeptFormBytes = 64 << 10
	keptFormTime     = 10 * time.Minute
)

// encodeKeptForm returns the input of a form for the sign-in page, which sends it along with the key. Secrets are left
// out. It returns "" if there is nothing worth keeping, or too much.
func encodeKeptForm(form url.Values) string {
	kept, isTyped := url.Values{}, false
	for name, values := range form {
		if isSecretField(name) || name == "once" {
			continue
		}
		kept[name] = values
		isTyped = isTyped || name != "version"
	}
	if text := kept.Encode(); isTyped && len(text) <= maxKeptFormBytes {
		return text
	}
	return ""
}

// isSecretField reports whether a form's field holds a secret: an API key or a management key.
func isSecretField(name string) bool { return strings.HasSuffix(name, "key") }

// keptForms holds the input of forms from the sign-in to the page with the form: for one page of a session, for a short
// time, and of the latest sessions only. Only people who have signed in put something there.
type keptForms struct {
	mu   sync.Mutex
	ring [64]keptForm
	next int
}

type keptForm struct {
	session []byte // the hash of its id
	path    string
	input   string // as encodeKeptForm returned it
	until   time.Time
}

// put keeps the input of the form at path for a session.
func (k *keptForms) put(session []byte, path, input string, now time.Time) {
	if input == "" || len(input) > maxKeptFormBytes {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ring[k.next] = keptForm{session: session, path: path, input: input, until: now.Add(keptFormTime)}
	k.next = (k.next + 1) % len(k.ring)
}

// take returns the input that is kept for a page and forgets it. It returns nil if there is none.
func (k *keptForms) take(session []byte, path string, now time.Time) url.Values {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := range k.ring {
		f := k.ring[i]
		if f.path != path || !bytes.Equal(f.session, session) {
			continue
		}
		k.ring[i] = keptForm{}
		input, err := url.ParseQuery(f.input)
		if err != nil || now.After(f.until) {
			return nil
		}
		for name := range input {
			if isSecretField(name) {
				delete(input, name)
			}
		}
		return input
	}
	return nil
}
