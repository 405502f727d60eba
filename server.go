// This room is the HTTP server: every URL on one screen, the doors in front of
// them, and what all rooms behind share. It forwards nothing and decides on no
// token itself.
package main

import (
	"context"
	"log"
	"log/slog"
	"net/http"
	"path"
	"strings"
	"sync"
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
	unauthenticatedLogLimit *throttle     // of log lines about callers without a key
	databaseProblem         func() string // says what is wrong with the database file, "" if nothing
	metrics                 *metrics
	writable                writeCheck
	metricsMu               sync.Mutex // held while a page of metrics is written

	proxy    *proxy
	manage   *manageAPI
	admin    *adminUI // nil: the pages are turned off
	exporter *exporter
}

// routes is every URL of the program. /v1 takes tokens only, /manage management
// keys only, /admin sessions only.
func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.handleHome)                                              // open: one line of text
	mux.HandleFunc("GET /healthz", s.handleHealth)                                        // open: the process answers
	mux.HandleFunc("GET /readyz", s.handleReady)                                          // open: calls would be taken
	mux.Handle("/manage/", s.protect(s.manage.manageRoutes()))                            // a management key, by role: manage.go
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
			wait, left := s.unauthenticatedLogLimit.allow(start)
			if wait > 0 {
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
		writeError(w, errCrossOrigin, false)
	}))
	guarded := origins.Handler(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !ourHost(s.cfg.publicURL, r.Host) {
			writeError(w, errUnknownHost, false)
			return
		}
		guarded.ServeHTTP(w, r)
	})
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
	if _, err := s.manage.authenticateManager(w, r); err != nil {
		s.manage.writeManageError(w, r, err)
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

// An exporter writes the page of metrics.
type exporter struct {
	cfg             *config
	metrics         *metrics
	endpoints       *endpointTable
	registry        *registry
	health          *healthTracker
	ledger          *ledger
	running         *runningCalls
	bodies          *bodyMemory
	diskUse         func(context.Context) (diskUsage, error)
	droppedLogLines func() int64 // nil: nobody counts
	started         time.Time
}

// metricsPage writes the page.
func (e *exporter) metricsPage(ctx context.Context) []byte {
	t := &metricsWriter{b: make([]byte, 0, 64<<10)}
	e.metrics.writeCalls(t, e.endpoints)
	e.metrics.writeModels(t)
	e.metrics.writeSeries(t)
	e.writeRunning(t)
	e.writeLedger(t)
	e.writeDisk(ctx, t)
	writeRuntime(t, e.started)
	return t.b
}

// writeRunning writes what is going on now.
func (e *exporter) writeRunning(t *metricsWriter) {
	t.beginFamily("running_calls", "gauge", "Calls that are running, by what they wait for.")
	for i, n := range e.running.countByPhase() {
		t.writeInt(n, "phase", phaseNames[i])
	}
	t.beginFamily("running_calls_max", "gauge", "MAX_CONCURRENT_CALLS.")
	t.writeInt(e.cfg.maxCalls)
	t.beginFamily("running_streams", "gauge", "Event streams that are being relayed.")
	t.writeInt(e.metrics.activeStreams.Load())
	t.beginFamily("draining", "gauge", "1 while new calls are refused because the program is ending.")
	t.writeInt(boolToInt(e.running.isDraining()))
	t.beginFamily("connections", "gauge", "Connections that clients have open.")
	t.writeInt(e.metrics.openConnections.Load())
	t.beginFamily("connections_max", "gauge", "MAX_CONNECTIONS.")
	t.writeInt(e.cfg.maxConnections)
	t.beginFamily("body_memory_bytes", "gauge", "Memory that request bodies take.")
	t.writeInt(e.bodies.used.Load())
	t.beginFamily("body_memory_max_bytes", "gauge", "BODY_MEMORY.")
	t.writeInt(e.bodies.limit)
	t.beginFamily("log_lines_left_out_total", "counter", "Log lines about callers without a key that were not written, so as not to fill the disk.")
	t.writeInt(e.metrics.suppressedLogLines.Load())
	t.beginFamily("log_lines_dropped_total", "counter", "Log lines that were lost because their reader was too slow.")
	if e.droppedLogLines != nil {
		t.writeInt(e.droppedLogLines())
	} else {
		t.writeInt(0)
	}
	t.beginFamily("upstreams", "gauge", "Upstreams of projects that were used since the start, by what is known of their keys.")
	for state, n := range e.health.countByState(time.Now().UnixMilli()) {
		t.writeInt(n, "state", keyState(state).String())
	}
	tokens, projects := e.registry.size()
	t.beginFamily("registry_tokens", "gauge", "Tokens held in memory because they were used of late.")
	t.writeInt(tokens)
	t.beginFamily("registry_projects", "gauge", "Projects held in memory.")
	t.writeInt(projects)
}

func boolToInt(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func (e *exporter) writeLedger(t *metricsWriter) {
	begins, settles := e.ledger.backlog()
	t.beginFamily("ledger_queue_rows", "gauge", "Rows that wait to be committed.")
	t.writeInt(begins, "kind", "begin")
	t.writeInt(settles, "kind", "settle")
	t.beginFamily("ledger_failing", "gauge", "1 while the ledger cannot be written; calls are refused then.")
	t.writeInt(boolToInt(!e.ledger.healthy()))
	t.beginFamily("ledger_commit_seconds", "histogram", "Time to commit one batch of rows.")
	t.writeHistogram(&e.ledger.commitDurations, &fastBounds)
	t.beginFamily("ledger_rows_total", "counter", "What was committed: a note and a row for an admitted call, a row for a refused one.")
	t.writeInt(e.ledger.committedRows.Load())
}

// writeDisk writes sizes; what cannot be read now is left out.
func (e *exporter) writeDisk(ctx context.Context, t *metricsWriter) {
	if e.diskUse == nil {
		return
	}
	use, err := e.diskUse(ctx)
	if err != nil {
		return
	}
	t.beginFamily("database_bytes", "gauge", "Size of the database file, of its write-ahead log, and of the space in the file that is free for new rows.")
	t.writeInt(use.databaseSize, "part", "file")
	t.writeInt(use.walSize, "part", "wal")
	t.writeInt(use.reusable, "part", "free")
	t.beginFamily("disk_free_bytes", "gauge", "What can still be written to the database's disk.")
	t.writeInt(use.available)
}
