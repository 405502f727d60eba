// llm-proxy stands between client programs and LLM APIs. Clients present a token that
// expires, can be revoked and is limited; the proxy replaces it with the project's
// provider key.
//
// This file takes arguments and environment and returns an exit code. It builds the
// program from its parts, listens, serves and drains.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	ctx, drain := context.WithCancel(context.Background())
	defer drain()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() { // ends with the program
		<-signals
		drain()
		<-signals // a second signal means: do not wait. Open calls become lost rows.
		os.Exit(1)
	}()
	signal.Ignore(syscall.SIGPIPE) // the program must outlive the process that reads its log
	log.SetOutput(io.Discard)      // net/http's transport logs unsolicited data of providers here, with secrets
	p := &program{getenv: os.Getenv, environment: os.Environ(), stdout: os.Stdout, stderr: os.Stderr}
	if len(os.Args) < 2 || os.Args[1] == "serve" { // other commands end with their terminal
		p.hangups = make(chan os.Signal, 1)
		signal.Notify(p.hangups, syscall.SIGHUP)
	}
	if err := p.run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "llm-proxy:", err)
		os.Exit(1)
	}
}

// run carries out the command in args. The server's commands return after they have
// drained, which starts when ctx is done.
func (p *program) run(ctx context.Context, args []string) error {
	command := "serve"
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	if slices.Contains(args, "--help") || slices.Contains(args, "-h") {
		command = "help"
	}
	switch command {
	case "serve":
		return p.noArgs(args, func() error { return p.serve(ctx) })
	case "demo":
		return p.noArgs(args, func() error { return p.demo(ctx) })
	case "doctor":
		return p.doctor(ctx, args)
	case "healthcheck":
		return p.noArgs(args, func() error { return p.healthcheck(ctx) })
	case "backup":
		return p.backup(ctx, args)
	case "restore":
		return p.restore(ctx, args)
	case "migrate-database":
		return p.migrateDatabase(ctx, args)
	case "audit":
		return p.audit(ctx, args)
	case "rekey":
		return p.rekey(ctx, args)
	case "prices":
		return p.showPrice(ctx, args)
	case "version", "--version":
		fmt.Fprintln(p.stdout, versionText())
		return nil
	case "help", "--help", "-h":
		fmt.Fprint(p.stdout, usageText)
		writeSettings(tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0))
		return nil
	}
	return fmt.Errorf("unknown command %q; see llm-proxy --help", clip(command, 64))
}

func (p *program) serve(ctx context.Context) error { return p.serveWithSetup(ctx, p.bootstrap) }

// serveWithSetup serves. It calls setup first, to add what the database lacks.
func (p *program) serveWithSetup(ctx context.Context, setup func(context.Context, *instance) error) error {
	cfg, err := p.config()
	if err != nil {
		return err
	}
	sink := newLogSink(p.stderr)
	defer sink.close()
	log := newLogger(sink, cfg.logLevel, cfg.logText)
	for _, n := range cfg.settingNotices(p.environment) {
		log.Warn(n.finding+"; "+n.remedy, "name", n.name)
	}
	limitMemory(log.Logger)
	for _, w := range cfg.databaseWarnings {
		log.Warn(w+"; set sslmode=verify-full in DATABASE_URL", "name", "DATABASE_URL")
	}
	in, err := openWhenAvailable(ctx, cfg, log, sink.droppedLines)
	if err != nil {
		return err
	}
	in.hangups = p.hangups
	// Listen before setup, which prints secrets that are shown only once: a start that
	// fails must not have printed them.
	if err := in.listen(); err != nil {
		return errors.Join(err, in.close())
	}
	if err := setup(ctx, in); err != nil {
		return errors.Join(err, in.close())
	}
	return in.serve(ctx, p.ready)
}

// An instance is a server with everything it uses. close closes what was opened, in the
// opposite order.
type instance struct {
	cfg            *config
	log            *logger
	metrics        *metrics
	dir            *dataDir
	store          *store
	sealer         *sealer
	createdKeyFile string // the key file, if this start created it
	contentKey     *contentKey
	cache          *responseCache
	prices         atomic.Pointer[priceTable]
	ledger         *ledger
	health         *healthTracker
	registry       *registry
	running        *runningCalls
	transport      *http.Transport
	notifier       *notifier

	operations *operations
	proxy      *proxy
	manage     *manageAPI
	server     *server

	stop    context.CancelFunc // ends the workers
	workers sync.WaitGroup

	listener        net.Listener
	metricsListener net.Listener   // on METRICS_ADDR; nil if not set
	certificate     *certificate   // nil: no TLS
	hangups         chan os.Signal // SIGHUP; nil: ignored
	fenced          chan struct{}  // closed once this process can write nothing any more, and has to end
	endsFenced      bool           // it ends because of that
}

// openInstance opens what is on disk, builds the surfaces on it and starts the workers.
// droppedLogLines counts lost log lines; it may be nil.
func openInstance(
	ctx context.Context, cfg *config, log *logger, droppedLogLines func() int64,
) (_ *instance, err error) {
	in := &instance{cfg: cfg, log: log, metrics: newMetrics(), stop: func() {}, fenced: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, in.close())
		}
	}()
	if err = in.openDatabase(ctx); err != nil {
		return nil, err
	}
	if err = in.openLedger(ctx); err != nil {
		return nil, err
	}
	if in.health, err = loadHealth(ctx, in.store); err != nil {
		return nil, err
	}
	ids, err := in.store.newIDSource(ctx, time.Now())
	if err != nil {
		return nil, err
	}
	in.registry = newRegistry(in.store, in.ledger, in.sealer, in.health, cfg.allowPrivate)
	in.running = newRunningCalls(newCallLimits(cfg.maxCalls, cfg.upstreamTimeout, cfg.streamIdleTimeout))
	in.transport = newTransport(cfg.allowPrivate, cfg.upstreamProxy)
	if err = in.buildSurfaces(ids, droppedLogLines); err != nil {
		return nil, err
	}
	in.startWorkers()
	return in, nil
}

// openDatabase opens the data directory, the database and the keys that unseal it.
func (in *instance) openDatabase(ctx context.Context) (err error) {
	if in.dir, err = openDataDir(in.cfg); err != nil {
		return err
	}
	if in.cfg.postgres != nil {
		in.cfg.postgres.replicated, in.cfg.postgres.address = true, in.cfg.replicaAddress()
		in.cfg.postgres.inform = in.log.Info
		in.cfg.postgres.nonce, in.cfg.postgres.previousNonce = randomBase62(22), in.dir.replicaNonce()
	}
	if in.store, err = openDatabase(ctx, in.cfg.databaseFile, in.cfg.postgres); err != nil && in.cfg.postgres != nil {
		return err
	} else if err != nil {
		return fmt.Errorf("%w; examine it with llm-proxy doctor, or restore a backup with llm-proxy restore FILE", err)
	}
	in.store.reportForeignRow = func(e *foreignRowError) {
		in.log.Error("a row of the database is refused; see llm-proxy audit verify", "kind", e.kind, "id", e.id,
			"reason", e.reason)
		in.notifier.reportForeignRow(e)
	}
	if in.sealer, in.createdKeyFile, err = openSealer(ctx, in.cfg, in.store); err != nil {
		return err
	}
	if err = in.store.openAudit(ctx, in.sealer, systemOrigin(time.Now())); err != nil {
		return err
	}
	if in.cfg.postgres == nil {
		err = in.dir.recordDatabase()
	} else {
		err = in.dir.recordReplica(in.cfg.postgres.nonce)
	}
	if err != nil {
		return fmt.Errorf("recording the database: %w", err)
	}
	if in.contentKey, err = openContentKey(ctx, in.store, in.sealer); err != nil {
		return err
	}
	in.cache, err = newResponseCache(in.store, in.contentKey, in.log.Logger, in.cfg.maxCacheBytes)
	return err
}

// databaseProblem describes why no call may be admitted, or returns "".
func (in *instance) databaseProblem() string {
	if in.store.backend != nil {
		return in.store.backend.problem()
	}
	return in.dir.databaseProblem()
}

// openLedger opens the ledger, which turns the pending records of a crash into lost rows.
func (in *instance) openLedger(ctx context.Context) error {
	prices, err := effectivePrices(ctx, in.store)
	if err != nil {
		return err
	}
	in.prices.Store(prices)
	if err = recordUnwritten(ctx, in.store, in.log.Logger, in.cfg.unwrittenFile()); err != nil {
		return err
	}
	box := newOutbox(in.cfg.unwrittenFile(), in.store.chain, in.log.Logger)
	in.ledger, err = openLedger(ctx, in.store, in.log.Logger, box, in.newLostRowCompleter)
	return err
}

// newLostRowCompleter returns a function that completes lost rows.
func (in *instance) newLostRowCompleter(ctx context.Context) func(*requestRow) error {
	policies := &storedPolicies{store: in.store}
	return func(r *requestRow) error {
		r.modelTracked = in.prices.Load().priceRow(r, "", r.model)
		r.requestedModelTracked = r.modelTracked
		return policies.countUses(ctx, r)
	}
}

// buildSurfaces builds the proxy, the management API, the pages and the server, each with
// exactly what it uses.
func (in *instance) buildSurfaces(ids *idSource, droppedLogLines func() int64) (err error) {
	cfg := in.cfg
	started := time.Now()
	endpoints := newEndpointTable()
	bodies := &bodyMemory{limit: cfg.bodyMemory}
	limits := newLimitState(in.store, in.ledger, in.registry, &in.prices)
	addresses := &addressReader{trustedProxies: cfg.trustedProxies, trustUnix: cfg.trustUnix}
	httpErrorLog := newHTTPErrorLog(in.log)
	logThrottle := newThrottle(logLinesPerSecond, time.Second)
	diskUse := func(ctx context.Context) (diskUsage, error) { return in.dir.diskUsage(ctx, in.store) }
	if droppedLogLines == nil {
		droppedLogLines = func() int64 { return 0 }
	}
	in.proxy = newProxy(proxyDeps{
		cfg: cfg, log: in.log, httpErrorLog: httpErrorLog, logThrottle: logThrottle, metrics: in.metrics,
		registry: in.registry, limits: limits, ledger: in.ledger, running: in.running, contentKey: in.contentKey,
		cache: in.cache, endpoints: endpoints, transport: in.transport, bodies: bodies, ids: ids, addresses: addresses,
		prices: &in.prices, retries: newRetryTracker(in.metrics), databaseProblem: in.databaseProblem,
	})
	in.notifier = newNotifier(in.sealer, limits, in.log.Logger, in.transport, cfg.allowPrivate)
	in.operations = &operations{
		store: in.store, sealer: in.sealer, registry: in.registry, limits: limits, health: in.health,
		running: in.running, prices: &in.prices, contentKey: in.contentKey, cache: in.cache,
		notifier: in.notifier, keyTester: newKeyTester(in.transport), openaiURL: cfg.openaiURL,
		allowPrivate: cfg.allowPrivate, fields: newFieldTables(),
		self: replicaRow{version: versionText(), address: cfg.replicaAddress(), startedAt: started.UnixMilli()},
	}
	auth := newManagementAuth(in.log, in.store, cfg.managementToken, addresses)
	in.manage = &manageAPI{
		log: in.log, store: in.store, ops: in.operations, auth: auth, databaseProblem: in.databaseProblem,
	}
	in.server = &server{
		cfg: cfg, log: in.log, httpErrorLog: httpErrorLog, logThrottle: logThrottle, metrics: in.metrics,
		ids: ids, addresses: addresses, proxy: in.proxy, manage: in.manage,
		crossOrigin: newCrossOrigin(cfg.corsOrigins),
		readiness: &readiness{running: in.running, databaseProblem: in.databaseProblem, ledger: in.ledger,
			store: in.store},
		exporter: &exporter{
			cfg: cfg, metrics: in.metrics, registry: in.registry, health: in.health, ledger: in.ledger, bodies: bodies,
			cache: in.cache, running: in.running.snapshot, diskUse: diskUse, droppedLogLines: droppedLogLines,
			started: started,
		},
	}
	if cfg.adminPages {
		in.server.admin, err = newAdminUI(adminDeps{
			cfg: cfg, log: in.log, store: in.store, ops: in.operations, auth: auth, registry: in.registry,
			limits: limits, ledger: in.ledger, running: in.running, endpoints: endpoints,
			databaseProblem: in.databaseProblem, diskUse: diskUse, keyID: in.sealer.id(), started: started,
			storms: in.proxy.retries.storms,
			callAPI: func(w http.ResponseWriter, r *http.Request, token secret) {
				r.Header.Set("Authorization", "Bearer "+token())
				in.proxy.handleV1(w, r)
			},
		})
	}
	return err
}

// startWorkers starts the background goroutines. close ends them.
func (in *instance) startWorkers() {
	ctx, stop := context.WithCancel(context.Background())
	in.stop = stop
	if os.Getenv("GOGC") == "" { // otherwise the operator has tuned it
		in.workers.Go(func() { tuneGC(ctx, in.proxy) })
	}
	in.workers.Go(func() { in.running.run(ctx) })
	in.workers.Go(func() { in.proxy.limits.run(ctx) })
	in.workers.Go(func() { in.cache.run(ctx) })
	keeper := &healthKeeper{in.health, in.store, in.log, make(chan []healthRow, 1)}
	in.workers.Go(func() { keeper.persistHealth(ctx) })
	in.workers.Go(func() { in.dir.watch(ctx, in.log.Logger) })
	if in.store.backend != nil {
		in.workers.Go(func() { in.store.backend.watch(ctx, in.replicaHooks(keeper.stored)) })
	}
	trail, _, _, _ := in.store.loadAuditHead(ctx, in.store.chain) // an error shows with the first event
	in.workers.Go(func() { in.manage.auth.signIns.runAuditCheckpoints(ctx, time.Minute, trail.seq) })
	in.workers.Go(func() {
		in.ledger.runRetention(ctx, retention{in.cfg.retention, in.cfg.maxDatabaseBytes}, 10*time.Second)
	})
	in.workers.Go(func() { in.evictIdle(ctx) })
	in.workers.Go(func() { in.notifier.watch(ctx) })
	in.workers.Go(func() { in.notifier.deliver(ctx) })
}

// evictIdle removes idle entries from the registry, and waits no longer for background responses, every minute until
// ctx is done.
func (in *instance) evictIdle(ctx context.Context) {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if in.store.isLeader() {
				age := min(maxResponseAge, in.cfg.retention)
				err := errors.Join(in.proxy.limits.expireResponses(ctx, now, age, in.prices.Load()),
					in.proxy.limits.pruneAccounts(ctx, in.proxy.limits.now(now)))
				if err != nil && ctx.Err() == nil {
					in.log.Error("old responses or accounts of limits could not be ended", "error", err)
				}
			}
			in.registry.evict(now.UnixMilli(), in.ledger.flush(ctx) == nil)
			in.proxy.limits.dropIdleValues(in.proxy.limits.now(now))
		}
	}
}

// close ends the workers, writes what the ledger has queued, and closes what was opened.
func (in *instance) close() error {
	in.stop()
	in.workers.Wait()
	var errs []error
	if in.ledger != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if in.endsFenced { // nothing can be written any more
			cancel()
		}
		if err := in.ledger.close(ctx); err != nil {
			errs = append(errs, in.ledger.keepUnwritten(in.endsFenced, in.cfg.databaseFile))
		}
		if in.proxy != nil && !in.endsFenced {
			in.proxy.limits.returnLeases(ctx, in.log.Logger)
		}
	}
	for _, l := range []net.Listener{in.listener, in.metricsListener} {
		if l != nil {
			_ = l.Close() // usually closed already
		}
	}
	if in.transport != nil {
		in.transport.CloseIdleConnections()
	}
	if in.store != nil {
		errs = append(errs, in.store.close())
	}
	if in.dir != nil {
		errs = append(errs, in.dir.close())
	}
	return errors.Join(errs...)
}

// listen opens LISTEN_ADDR, and METRICS_ADDR if it is set.
func (in *instance) listen() (err error) {
	if in.listener, err = openListener(in.cfg.listenAddr, in.cfg.socketMode); err != nil {
		return describeListenError("LISTEN_ADDR", in.cfg.listenAddr, err)
	}
	if in.cfg.tlsCert != "" {
		if in.certificate, err = newCertificate(in.cfg.tlsCert, in.cfg.tlsKey); err != nil {
			return err
		}
	}
	if in.cfg.metricsAddr == "" {
		return nil
	}
	if in.metricsListener, err = openListener(in.cfg.metricsAddr, in.cfg.socketMode); err != nil {
		return describeListenError("METRICS_ADDR", in.cfg.metricsAddr, err)
	}
	return nil
}

// serve serves on the open listeners until ctx is done, then drains and closes. It calls
// ready, if not nil, when it accepts connections. A second signal during the drain ends
// the program at once: main does that.
func (in *instance) serve(ctx context.Context, ready func(net.Addr)) error {
	l, hs, ms := in.listener, in.server.httpServer(), in.server.metricsServer()
	if in.certificate != nil {
		hs.TLSConfig = in.certificate.tlsConfig()
	}
	in.log.Info("listening", "address", l.Addr().String(), "tls", in.certificate != nil, "version", versionText())
	failed, ended := make(chan error, 1), error(nil)
	var serving sync.WaitGroup
	serving.Go(func() {
		if in.certificate != nil {
			failed <- hs.ServeTLS(l, "", "")
		} else {
			failed <- hs.Serve(l)
		}
	})
	if in.metricsListener != nil {
		in.log.Info("serving metrics", "address", in.metricsListener.Addr().String())
		serving.Go(func() { _ = ms.Serve(in.metricsListener) }) // until the drain is over
	}
	watching, stopWatching := context.WithCancel(context.Background())
	defer stopWatching()
	serving.Go(func() { in.certificate.watch(watching, certificatePollInterval, in.hangups, in.log.Logger) })
	if in.store.backend != nil {
		in.store.backend.started()
	}
	if ready != nil {
		ready(l.Addr())
	}
	select {
	case <-ctx.Done():
		in.drain(hs, in.cfg.drainTimeout, in.cfg.drainDelay)
	case <-in.fenced:
		in.log.Error("another process has closed this replica, which did not answer: it ends; start it again")
		ended, in.endsFenced = errFenced, true
		in.drain(hs, 0, 0)
	case err := <-failed:
		_ = ms.Close()
		return errors.Join(fmt.Errorf("serving: %w", err), in.close())
	}
	_ = ms.Close()
	stopWatching()
	serving.Wait()
	err := errors.Join(ended, in.close())
	in.log.Info("stopped")
	return err
}

// drain refuses new calls, waits for running ones to end, and closes hs. Until then, and at least
// for delay, it accepts connections and answers 503 and Connection: close on new and open
// ones: a closed port or connection would drop requests that are under way.
func (in *instance) drain(hs *http.Server, timeout, delay time.Duration) {
	in.log.Info("draining", "timeout", timeout.String())
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	delayed := time.After(delay)
	if in.cfg.listenAddr == systemdListen {
		_ = in.listener.Close() // clients wait in systemd's socket for the next process
	}
	in.running.drain(ctx)
	<-delayed
	_ = in.listener.Close()
	last, done := context.WithTimeout(context.Background(), time.Second) // for administrators' requests
	defer done()
	_ = hs.Shutdown(last)
	_ = hs.Close()
}

// tuneGC adjusts the garbage collector's target to the size of the live heap, until ctx is
// done. Go's default would collect very often while the heap is small. After a peak it gives memory back to the
// system, which Go would do only after minutes without load.
func tuneGC(ctx context.Context, p *proxy) {
	var idle idleMemory
	live := []runtimemetrics.Sample{{Name: "/gc/heap/live:bytes"}} // after the last collection
	set := gcPercentFor(0, 0)
	debug.SetGCPercent(set)
	tick := time.NewTicker(gcTuneInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		bodies := p.bodies.used.Load()
		if idle.afterPeak(p.running.count()*bytesPerCall + bodies) {
			debug.FreeOSMemory()
			debug.FreeOSMemory() // pools keep what they have over one collection
		}
		runtimemetrics.Read(live)
		want := gcPercentFor(int64(live[0].Value.Uint64()), bodies)
		if want < set-set/8 || want > set+set/8 { // few changes: each one stops the world
			debug.SetGCPercent(want)
			set = want
		}
	}
}

// bootstrap creates the first management key, unless the environment has one, and with
// OPENAI_API_KEY a first project and token. It does so only in a database that has none,
// so no secret is ever printed again.
func (p *program) bootstrap(ctx context.Context, in *instance) error {
	if in.createdKeyFile != "" {
		in.log.Warn("an encryption key was created; keep it apart from the database and its backups", "file",
			in.createdKeyFile)
	}
	keys, err := in.store.countManagementKeys(ctx)
	if err != nil {
		return fmt.Errorf("counting management keys: %w", err)
	}
	projects, err := in.store.countProjects(ctx)
	if err != nil {
		return fmt.Errorf("counting projects: %w", err)
	}
	base := in.baseURL()
	if keys == 0 && in.cfg.managementToken == nil {
		key, err := in.operations.createFirstKey(ctx)
		if err != nil {
			return err
		}
		fmt.Fprintf(p.stdout, "\nThe first management key (role admin), shown only once:\n\n  %s\n", key())
		in.printAdminURL(p.stdout, base)
		if in.cfg.openaiKey == nil || projects > 0 {
			fmt.Fprintf(p.stdout, `
Next, create a project with your provider's key, and a token for it:

  export KEY=<the management key>
  curl %[1]s/manage/projects -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \
    -d '{"name":"first","openai_api_key":"sk-..."}'
  curl %[1]s/manage/tokens -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \
    -d '{"project_id":"<id from the answer>","name":"me","expires_in_days":30}'

Clients then use the base URL %[1]s/v1 and the token as their API key.

`, base)
		}
	}
	if in.cfg.openaiKey == nil {
		return nil
	}
	if projects > 0 {
		in.log.Info("OPENAI_API_KEY is ignored: the database already has projects")
		return nil
	}
	token, err := in.operations.createFirstProject(ctx, "default", in.cfg.openaiKey)
	if err != nil {
		return err
	}
	fmt.Fprintf(p.stdout, `
The project "default" was created with OPENAI_API_KEY. Its token, valid for 30 days and shown only once:

  %[2]s

Try it:

  curl %[1]s/v1/chat/completions -H "Authorization: Bearer %[2]s" -H "Content-Type: application/json" \
    -d '{"model":"gpt-4o-mini","messages":[{"role":"user","content":"Hello"}]}'

`, base, token())
	return nil
}

// printAdminURL prints where to sign in with the first key, unless ADMIN_PAGES=false.
func (in *instance) printAdminURL(w io.Writer, base string) {
	if in.cfg.adminPages {
		fmt.Fprintf(w, "\nSign in with it at %s/admin\n", base)
	}
}

// baseURL returns the URL under which clients reach this server, as far as it knows.
func (in *instance) baseURL() string {
	if in.cfg.publicURL != nil {
		return in.cfg.publicURL.Scheme + "://" + in.cfg.publicURL.Host
	}
	scheme := "http"
	if in.cfg.tlsCert != "" {
		scheme = "https"
	}
	if in.listener.Addr().Network() == "unix" {
		return scheme + "://localhost" // a proxy in front of the socket has the public name
	}
	addr := in.listener.Addr().String()
	if ap, err := netip.ParseAddrPort(addr); err == nil && ap.Addr().IsUnspecified() {
		addr = "localhost:" + strconv.Itoa(int(ap.Port()))
	}
	return scheme + "://" + addr
}
