// This file has the routes of the program: every URL, what a client must present for it,
// and what every request passes first. It forwards nothing and checks no token itself.
package main

import (
	"context"
	"io"
	"log"
	"log/slog"
	"net/http"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A server has the routes. The three surfaces behind them are types of their own.
type server struct {
	cfg          *config
	log          *logger
	httpErrorLog *log.Logger
	ids          *idSource
	addresses    *addressReader
	logThrottle  *throttle // of log lines about unauthenticated callers
	metrics      *metrics
	readiness    *readiness
	exporter     *exporter
	exporting    sync.Mutex // held while a page of metrics is written

	proxy       *proxy
	crossOrigin *crossOrigin // nil: CORS_ORIGINS is not set
	manage      *manageAPI
	admin       *adminUI // nil: ADMIN_PAGES=false
}

// routes returns the handler of every URL. /v1 and /v1beta take client tokens only, /manage management
// keys only, /admin session cookies only.
func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.handleHome)            // open: one line of text
	mux.HandleFunc("GET /healthz", s.handleHealth)      // open: the process answers
	mux.HandleFunc("GET /readyz", s.handleReady)        // open: calls would be accepted
	mux.HandleFunc("GET /openapi.yaml", serveOpenAPI()) // open: it describes /manage, and says nothing of this server
	// A management key of any role. METRICS_ADDR serves the same page without a key.
	mux.Handle("GET /metrics", s.protect(http.HandlerFunc(s.handleAuthenticatedMetrics)))
	// A management key; manageTable in manage.go has the URLs and the role that each needs.
	mux.Handle("/manage/", s.protect(s.manage.manageRoutes()))
	if s.admin != nil {
		// A session; adminTable in admin.go has the URLs and the role that each needs.
		mux.Handle("/admin/", s.admin.adminRoutes())
		mux.Handle("GET /admin", http.RedirectHandler("/admin/", http.StatusSeeOther))
	}
	for _, open := range [...]string{"/{$}", "/healthz", "/readyz", "/metrics", "/openapi.yaml"} {
		mux.Handle(open, methodNotAllowed("GET"))
	}
	mux.HandleFunc("/manage", notFound) // ServeMux would redirect, and a client would follow with its key
	mux.HandleFunc("/", unknownPath)
	outsideV1, preflight := canonicalOnly(mux), http.HandlerFunc(s.crossOrigin.answerPreflight)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// While draining, the client's next request goes to another process. A chunked request may have a length too,
		// by which a proxy in front sees another end of it: nothing after it is a request (RFC 9112, 6.1).
		if s.readiness.running.isDraining() || r.TransferEncoding != nil {
			w.Header().Set("Connection", "close")
		}
		// ServeMux must not see the APIs: it cleans paths that are not canonical and answers with a
		// redirect, but such a path must not reach another endpoint than the one it names.
		switch {
		case r.Method == http.MethodConnect || !isAPIPath(r.URL.Path):
			s.serveLogged(w, r, outsideV1)
		case s.crossOrigin.isPreflight(r): // open: what pages of the origins in CORS_ORIGINS may send
			s.serveLogged(w, r, preflight)
		case r.URL.Path == ownTokenPath: // /v1/llm-proxy/token
			s.crossOrigin.addHeaders(w.Header(), r.Header)
			s.proxy.handleOwnToken(w, r) // a client token: what it may know about itself
		default: // /v1/*, /v1beta/*: endpoints.go has the endpoints
			s.crossOrigin.addHeaders(w.Header(), r.Header)
			s.proxy.handleV1(w, r) // a client token: the call goes to a provider
		}
	})
}

// unknownPath answers a request that no route has: often a call with a wrong base URL.
func unknownPath(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/manage") || strings.HasPrefix(r.URL.Path, "/admin") {
		notFound(w, r)
		return
	}
	writeError(w, errUnknownPath(errUnknownURL, r.URL), shapeFor(r))
}

// smallBodyTimeout limits reading the body of a request outside /v1. The watchdog limits
// those of calls.
const smallBodyTimeout = 30 * time.Second

// serveLogged serves a request outside /v1, with an id and one log line.
func (s *server) serveLogged(w http.ResponseWriter, r *http.Request, next http.Handler) {
	start := time.Now()
	id := formatRequestID(s.ids.next(start))
	h := w.Header()
	h.Set("X-Request-Id", id)
	h.Set("X-Llm-Proxy-Request-Id", id)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	controller := http.NewResponseController(w)
	_ = controller.SetWriteDeadline(start.Add(writeTimeout))
	r = limitBodyTime(r, controller, start.Add(smallBodyTimeout))
	sw := &statusWriter{ResponseWriter: w}
	defer func() {
		s.metrics.countRequest(r.Pattern, sw.status)
		s.logRequest(r, sw.status, id, start)
	}()
	next.ServeHTTP(sw, r)
}

// limitBodyTime sets the deadline by which a request's body must have been read. It returns the request to go on with:
// the deadline ends with the body. Otherwise it would end the request later, because net/http goes on reading, to
// notice when the client leaves.
func limitBodyTime(r *http.Request, c *http.ResponseController, deadline time.Time) *http.Request {
	if r.ContentLength == 0 {
		return r
	}
	_ = c.SetReadDeadline(deadline)
	timed := *r // net/http looks at the body of its own request
	timed.Body = &timedBody{r.Body, c}
	return &timed
}

// A timedBody is a request's body with a deadline.
type timedBody struct {
	io.ReadCloser
	controller *http.ResponseController
}

func (b *timedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF {
		_ = b.controller.SetReadDeadline(time.Time{})
	}
	return n, err
}

// canonicalOnly refuses paths that ServeMux would clean, or read in another way than they are written.
func canonicalOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p := r.URL.Path; r.Method == http.MethodConnect || p == "" || p[0] != '/' || r.URL.EscapedPath() != p ||
			path.Clean(p) != strings.TrimSuffix(p, "/") && p != "/" {
			unknownPath(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (s *server) logRequest(r *http.Request, status int, id string, start time.Time) {
	level := slog.LevelInfo
	if r.Pattern == "GET /healthz" || r.Pattern == "GET /readyz" || r.Pattern == preflightPattern {
		level = slog.LevelDebug
	}
	line := []any{"request_id", id, "route", r.Pattern, "status", status,
		"address", s.addresses.clientAddress(r), "total_us", time.Since(start).Microseconds()}
	if status >= 400 && status < 500 { // anyone can cause these
		wait, suppressed := s.logThrottle.allow(start)
		if wait > 0 {
			s.metrics.suppressedLogLines.Add(1)
			return
		}
		if suppressed > 0 {
			line = append(line, "lines_left_out", suppressed)
		}
	}
	s.log.Log(context.Background(), level, "request", line...)
}

// A statusWriter records the status for the log.
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

func writePlainText(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write([]byte(text + "\n"))
}

func (s *server) handleHome(w http.ResponseWriter, _ *http.Request) {
	writePlainText(w, http.StatusOK, "llm-proxy. Clients use /v1, administrators /admin (pages) and /manage (JSON).")
}

// handleHealth answers that the process runs, whatever its state.
func (s *server) handleHealth(w http.ResponseWriter, _ *http.Request) {
	writePlainText(w, http.StatusOK, "ok")
}

// handleReady answers whether calls would be accepted now.
func (s *server) handleReady(w http.ResponseWriter, r *http.Request) {
	if problem := s.readiness.problem(r.Context()); problem != "" {
		w.Header().Set("Retry-After", "1")
		writePlainText(w, http.StatusServiceUnavailable, problem)
		return
	}
	writePlainText(w, http.StatusOK, "ready")
}

// A readiness finds out whether this program can accept calls. It does not look at
// providers: sending clients to another replica would not help with those.
type readiness struct {
	running         *runningCalls
	databaseProblem func() string // describes what is wrong with the database file; "" if nothing
	ledger          *ledger
	store           *store

	mu        sync.Mutex
	checkedAt time.Time
	writeErr  error // the last check of the database
}

// problem returns the reason why calls would be refused, or "".
func (rd *readiness) problem(ctx context.Context) string {
	switch {
	case rd.running.isDraining():
		return "draining"
	case rd.databaseProblem() != "":
		return "the database file is gone"
	case !rd.ledger.healthy():
		return "the ledger cannot be written"
	case rd.checkWritable(ctx) != nil:
		return "the database cannot be written"
	}
	return ""
}

// checkWritable asks the database at most once a second: the check is a write, and
// anyone may ask.
func (rd *readiness) checkWritable(ctx context.Context) error {
	rd.mu.Lock()
	defer rd.mu.Unlock()
	if time.Since(rd.checkedAt) >= time.Second {
		// Other callers get the same answer, so one that disconnects must not end the check.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
		defer cancel()
		rd.writeErr, rd.checkedAt = rd.store.checkWritable(ctx), time.Now()
	}
	return rd.writeErr
}

// protect guards what administrators use against cross-origin requests, and against host
// names that an attacker has pointed at this server (DNS rebinding).
func (s *server) protect(next http.Handler) http.Handler {
	origins := http.NewCrossOriginProtection()
	origins.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		writeError(w, errCrossOrigin, shapeOpenAI)
	}))
	sameOrigin := origins.Handler(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !ourHost(s.cfg.publicURL, r.Host) {
			writeError(w, errUnknownHost, shapeOpenAI)
			return
		}
		sameOrigin.ServeHTTP(w, r)
	})
}

// handleMetrics writes the page of metrics. METRICS_ADDR serves it without a key.
func (s *server) handleMetrics(w http.ResponseWriter, r *http.Request) {
	s.exporting.Lock() // one at a time: a page takes memory
	defer s.exporting.Unlock()
	ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
	defer cancel()
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = w.Write(s.exporter.page(ctx))
}

// handleAuthenticatedMetrics is handleMetrics for a management key of any role.
func (s *server) handleAuthenticatedMetrics(w http.ResponseWriter, r *http.Request) {
	if _, err := s.manage.authenticateManager(w, r); err != nil {
		s.manage.writeManageError(w, r, err)
		return
	}
	s.handleMetrics(w, r)
}

// httpServer returns the server for LISTEN_ADDR.
func (s *server) httpServer() *http.Server {
	return &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ConnState:         limitConnections(s.cfg.maxConnections, &s.metrics.openConnections),
		HTTP2:             &http.HTTP2Config{WriteByteTimeout: writeTimeout},
		MaxHeaderBytes:    60 << 10, // net/http allows 4 KiB more
		ErrorLog:          s.httpErrorLog,
		// The answer of net/http to OPTIONS * would be in no log.
		DisableGeneralOptionsHandler: true,
		// There is no read or write timeout, because an answer may stream for hours. The
		// watchdog (proxy_running.go) ends calls that make no progress.
	}
}

// metricsServer returns the server for METRICS_ADDR. It has one URL and needs no key.
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
		ConnState:         limitConnections(64, new(atomic.Int64)),
		ErrorLog:          s.httpErrorLog,
	}
}

// openWhenAvailable is openInstance, but waits for a PostgreSQL server that cannot be reached. Meanwhile calls get 503.
func openWhenAvailable(ctx context.Context, cfg *config, log *logger, dropped func() int64) (*instance, error) {
	in, err := openInstance(ctx, cfg, log, dropped)
	if cfg.postgres == nil || !isDatabaseAway(err) {
		return in, err
	}
	log.Warn("the database cannot be reached; calls get 503 until it can", "error", err)
	hs := &http.Server{Handler: unavailable(err), ReadHeaderTimeout: 10 * time.Second, ErrorLog: newHTTPErrorLog(log)}
	var serving sync.WaitGroup
	defer serving.Wait()
	defer hs.Close()
	if cfg.listenAddr != systemdListen { // there, clients wait in systemd's socket
		l, err := openListener(cfg.listenAddr, cfg.socketMode)
		if err != nil {
			return nil, describeListenError("LISTEN_ADDR", cfg.listenAddr, err)
		}
		serving.Go(func() {
			if cfg.tlsCert != "" {
				_ = hs.ServeTLS(l, cfg.tlsCert, cfg.tlsKey)
			} else {
				_ = hs.Serve(l)
			}
		})
	}
	for isDatabaseAway(err) {
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(time.Second):
		}
		in, err = openInstance(ctx, cfg, log, dropped)
	}
	return in, err
}

// unavailable answers while there is no database: the process is alive, and nothing else works.
func unavailable(cause error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			writeError(w, errStoreUnavailable(cause), shapeFor(r))
		}
	})
}

// reportDatabase logs a change of databaseProblem.
func (in *instance) reportDatabase(problem string) {
	if problem != "" {
		in.log.Error("calls are refused until the database can be used", "problem", problem)
		return
	}
	in.log.Info("the database can be used again")
}

// replicaHooks returns what a database with several replicas needs. It sends the stored health of upstreams to health.
func (in *instance) replicaHooks(health chan<- []healthRow) *replicaHooks {
	return &replicaHooks{
		report:       in.reportDatabase,
		fenced:       func() { close(in.fenced) },
		apply:        in.operations.applyChanges,
		recoverCalls: in.ledger.recoverCalls,
		answer:       in.operations.answer,
		warn:         in.log.Warn,
		recall:       in.proxy.limits.leases.recall,
		describe: func(info *replicaInfo) {
			info.Calls, info.Leases = in.running.count(), in.proxy.limits.leases.count()
		},
		mergeHealth: func(rows []healthRow) {
			select {
			case health <- rows:
			default: // it is busy, and gets all again in a moment
			}
		},
	}
}
