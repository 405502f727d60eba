// This room is the HTTP server: every URL on one screen, the doors in front of
// them, and what all rooms behind share. It forwards nothing and decides on no
// token itself.
package main

import (
	"context"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A server has the routes of the program and what stands in front of them. The
// three surfaces behind it are types of their own: proxy, manageAPI and adminUI.
type server struct {
	cfg                     *config
	log                     *logger
	httpErrorLog            *log.Logger // for net/http's own notes, at debug
	store                   *store
	ledger                  *ledger
	running                 *runningCalls
	ids                     *idSource
	addresses               *addressReader
	unauthenticatedLogLimit *logLimiter   // of log lines about callers without a key
	databaseProblem         func() string // says what is wrong with the database file, "" if nothing
	metrics                 *metrics
	writable                writeCheck
	metricsMu               sync.Mutex // held while a page of metrics is written

	proxy          *proxy
	dispatchManage *manageAPI
	admin          *adminUI // nil: the pages are turned off
	exporter       *exporter
}

// writeTimeout is for a client to take an answer that is not a provider's, and
// for an HTTP/2 connection to take a byte.
const writeTimeout = time.Minute

// routes is every URL of the program. /v1 takes tokens only, /manage management
// keys only, /admin sessions only.
func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.handleHome)                                              // open: one line of text
	mux.HandleFunc("GET /healthz", s.handleHealth)                                        // open: the process answers
	mux.HandleFunc("GET /readyz", s.handleReady)                                          // open: calls would be taken
	mux.Handle("/manage/", s.protect(s.dispatchManage.manageRoutes()))                    // a management key, by role: manage.go
	mux.Handle("GET /metrics", s.protect(http.HandlerFunc(s.handleAuthenticatedMetrics))) // a management key of any role; open on METRICS_ADDR
	if s.cfg.adminPages {
		mux.Handle("/admin/", s.admin.adminRoutes()) // a session, by role: admin.go
		mux.Handle("GET /admin", http.RedirectHandler("/admin/", http.StatusSeeOther))
	}
	for _, open := range [...]string{"/{$}", "/healthz", "/readyz", "/metrics"} {
		mux.Handle(open, methodNotAllowed("GET"))
	}
	mux.HandleFunc("/manage", notFound) // else a redirect, which a client follows with its key
	mux.HandleFunc("/", notFound)
	return s.dispatch(mux)
}

// dispatch is the first to see a request. /v1 goes straight to its room: ServeMux
// would answer odd paths with redirects, and a path that is not plain must not
// be cleaned into another one that is.
func (s *server) dispatch(mux http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p := r.URL.Path; strings.HasPrefix(p, "/v1/") && r.Method != http.MethodConnect {
			if p == ownTokenPath { // what a token may ask about itself
				s.proxy.handleOwnToken(w, r)
			} else {
				s.proxy.handleV1(w, r)
			}
			return
		}
		s.logRequest(w, r, mux)
	})
}

// smallBodyTimeout is for bodies that are not calls': those have a watchdog.
const smallBodyTimeout = 30 * time.Second

// logRequest serves what is not /v1, with its own id and one log line.
func (s *server) logRequest(w http.ResponseWriter, r *http.Request, next http.Handler) {
	start := time.Now()
	id := formatRequestID(s.ids.next(start))
	h := w.Header()
	h.Set("X-Request-Id", id)
	h.Set("X-Llm-Proxy-Request-Id", id)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	_ = http.NewResponseController(w).SetWriteDeadline(start.Add(writeTimeout))
	sw := &statusWriter{ResponseWriter: w}
	_ = http.NewResponseController(w).SetReadDeadline(start.Add(smallBodyTimeout))
	defer func() {
		s.metrics.countRequest(r.Pattern, sw.status)
		level := slog.LevelInfo
		if r.Pattern == "GET /healthz" || r.Pattern == "GET /readyz" {
			level = slog.LevelDebug
		}
		line := []any{"request_id", id, "route", r.Pattern, "status", sw.status, "address", s.addresses.clientAddress(r), "total_us", time.Since(start).Microseconds()}
		if sw.status >= 400 && sw.status < 500 { // anyone can cause these
			ok, left := s.unauthenticatedLogLimit.allow(start)
			if !ok {
				s.metrics.suppressedLogLines.Add(1)
				return
			}
			if left > 0 {
				line = append(line, "lines_left_out", left)
			}
		}
		s.log.Log(context.Background(), level, "request", line...)
	}()
	if p := r.URL.Path; r.Method == http.MethodConnect || p == "" || p[0] != '/' || r.URL.EscapedPath() != p ||
		path.Clean(p) != strings.TrimSuffix(p, "/") && p != "/" {
		notFound(sw, r)
		return
	}
	next.ServeHTTP(sw, r)
}

func notFound(w http.ResponseWriter, r *http.Request) {
	writeError(w, &apiError{status: http.StatusNotFound, code: "unknown_url", msg: "There is nothing at this URL."}, false)
}

// A statusWriter remembers the status for the log.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *statusWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

func (s *server) handleHome(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte("llm-proxy. Clients use /v1, administrators /admin (pages) and /manage (JSON).\n"))
}

// handleHealth says that the process answers, whatever else may be wrong.
func (s *server) handleHealth(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte("ok\n"))
}

// handleReady says whether calls would be taken now. It is about this program,
// not about providers: a load balancer cannot mend those by going elsewhere.
func (s *server) handleReady(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	// The answer is kept for others, so who asks must not be able to spoil it by
	// leaving.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), 3*time.Second)
	defer cancel()
	var why string
	switch {
	case s.running.isDraining():
		why = "draining"
	case s.databaseProblem() != "":
		why = "the database file is gone"
	case !s.ledger.healthy():
		why = "the ledger cannot be written"
	case s.writable.check(ctx, s.store) != nil:
		why = "the database cannot be written"
	default:
		_, _ = w.Write([]byte("ready\n"))
		return
	}
	w.Header().Set("Retry-After", "1")
	w.WriteHeader(http.StatusServiceUnavailable)
	_, _ = w.Write([]byte(why + "\n"))
}

// A writeCheck asks the database at most once a second whether it can be written:
// the question is a write, and anyone may ask.
type writeCheck struct {
	mu        sync.Mutex
	checkedAt time.Time
	err       error
}

func (c *writeCheck) check(ctx context.Context, st *store) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.checkedAt) >= time.Second {
		c.err, c.checkedAt = st.checkWritable(ctx), time.Now()
	}
	return c.err
}

// protect guards what administrators use: against other web sites
// (cross-origin requests) and against names that an attacker points at us.
func (s *server) protect(next http.Handler) http.Handler {
	origins := http.NewCrossOriginProtection()
	origins.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		writeError(w, &apiError{status: http.StatusForbidden, code: "cross_origin", msg: "The request comes from a page of another site."}, false)
	}))
	guarded := origins.Handler(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !ourHost(s.cfg.publicURL, r.Host) {
			writeError(w, &apiError{status: http.StatusMisdirectedRequest, code: "unknown_host",
				msg: "This host name is not the proxy's. Set PUBLIC_URL if it should be."}, false)
			return
		}
		guarded.ServeHTTP(w, r)
	})
}

// ourHost reports whether a Host header can be ours: an address, a name without
// a dot (no attacker can own one), or PUBLIC_URL's.
func ourHost(publicURL *url.URL, hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	if publicURL != nil && strings.EqualFold(host, publicURL.Hostname()) {
		return true
	}
	if _, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return true
	}
	return host != "" && !strings.ContainsAny(host, ".%")
}

// An addressReader finds out where a request comes from.
type addressReader struct {
	isTrustedProxy []netip.Prefix // networks of proxies whose X-Forwarded-For is believed
	trustUnix      bool           // whoever connects by the unix socket is such a proxy
}

// clientAddress returns the client's address: the connection's, or behind
// trusted proxies the right-most one in X-Forwarded-For that is not theirs.
func (a *addressReader) clientAddress(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	var addr netip.Addr
	switch {
	case err != nil: // by a unix socket
		if !a.trustUnix {
			return ""
		}
	case len(a.isTrustedProxy) == 0:
		return host
	default:
		if addr, err = netip.ParseAddr(host); err != nil || !a.trusts(addr) {
			return host
		}
	}
	lines := r.Header["X-Forwarded-For"]
	for i := len(lines) - 1; i >= 0; i-- {
		hops := strings.Split(lines[i], ",")
		for j := len(hops) - 1; j >= 0; j-- {
			hop, err := netip.ParseAddr(strings.TrimSpace(hops[j]))
			if err != nil {
				return addressText(addr) // what is left of it cannot be believed
			}
			addr = hop.Unmap().WithZone("")
			if !a.trusts(addr) {
				return addressText(addr)
			}
		}
	}
	return addressText(addr)
}

// addressText writes an address; "" for that of a unix socket, which has none.
func addressText(addr netip.Addr) string {
	if !addr.IsValid() {
		return ""
	}
	return addr.String()
}

func (a *addressReader) trusts(addr netip.Addr) bool {
	for _, p := range a.isTrustedProxy {
		if p.Contains(addr.Unmap()) {
			return true
		}
	}
	return false
}

// limitConnections returns a hook for http.Server that closes new connections while
// most are open: what a connection takes, an attacker could else take without end.
// open counts them; nil for who does not want to know.
func limitConnections(most int64, open *atomic.Int64) func(net.Conn, http.ConnState) {
	if open == nil {
		open = new(atomic.Int64)
	}
	return func(c net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			if open.Add(1) > most {
				c.Close() // its goroutine sees that, and ends in StateClosed
			}
		case http.StateClosed, http.StateHijacked:
			open.Add(-1)
		}
	}
}

// A bufferPool lends ReverseProxy the buffers it copies with.
type bufferPool struct{ pool sync.Pool }

func newBufferPool(size int) *bufferPool {
	return &bufferPool{sync.Pool{New: func() any { return new(make([]byte, size)) }}}
}

func (p *bufferPool) Get() []byte { return *p.pool.Get().(*[]byte) }

func (p *bufferPool) Put(b []byte) { p.pool.Put(&b) }

// authThrottle counts wrong management keys, by address and minute, in a fixed number
// of slots that addresses share by hash: it cannot grow. Who has too many is told
// to wait; guessing 256 bits is in vain in any case.
type authThrottle struct {
	mu    sync.Mutex
	slots [1024]struct {
		count int
		until time.Time
	}
}

const (
	maxAuthFailures   = 20
	authFailureWindow = time.Minute
)

func throttleSlot(address string) int {
	if a, err := netip.ParseAddr(address); err == nil && a.Is6() && !a.Is4In6() {
		if p, err := a.Prefix(64); err == nil { // one customer has a whole /64
			address = p.String()
		}
	}
	var h uint32 = 2166136261 // FNV-1a
	for i := range len(address) {
		h = (h ^ uint32(address[i])) * 16777619
	}
	return int(h % 1024)
}

// blockedFor reports whether an address has guessed wrong too often of late, and
// for how long it stays so.
func (f *authThrottle) blockedFor(address string, now time.Time) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &f.slots[throttleSlot(address)]
	if now.After(s.until) || s.count < maxAuthFailures {
		return 0
	}
	return s.until.Sub(now)
}

func (f *authThrottle) recordFailure(address string, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &f.slots[throttleSlot(address)]
	if now.After(s.until) {
		s.count, s.until = 0, now.Add(authFailureWindow)
	}
	s.count++
}

// handleMetrics is open: it stands on METRICS_ADDR.
func (s *server) handleMetrics(w http.ResponseWriter, r *http.Request) {
	s.metricsMu.Lock() // one at a time: a page takes memory
	defer s.metricsMu.Unlock()
	ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
	defer cancel()
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = w.Write(s.exporter.metricsPage(ctx))
}

// handleAuthenticatedMetrics asks for a management key first, of any role.
func (s *server) handleAuthenticatedMetrics(w http.ResponseWriter, r *http.Request) {
	if _, err := s.dispatchManage.authenticateManager(w, r); err != nil {
		s.dispatchManage.writeManageError(w, r, err)
		return
	}
	s.handleMetrics(w, r)
}

// metricsServer is for a listener of its own, METRICS_ADDR: who reaches that
// needs no key. It knows one URL.
func (s *server) metricsServer() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", s.handleMetrics)
	return &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ConnState:         limitConnections(64, nil),
		ErrorLog:          s.httpErrorLog,
	}
}
