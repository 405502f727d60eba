// llm-proxy stands between client programs and LLM APIs: clients present a
// token that expires, can be revoked and is limited; the proxy swaps it for the
// project's provider key. This room takes arguments and environment in and
// gives an exit code out: it wires the rooms together, listens, and drains.
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
	"net/url"
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

// listen opens LISTEN_ADDR, and METRICS_ADDR if there is one.
func (in *instance) listen() (err error) {
	if in.listener, err = openListener(in.cfg.listenAddr, in.cfg.socketMode); err != nil {
		return fmt.Errorf("listening on LISTEN_ADDR %s: %w", in.cfg.listenAddr, err)
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
		return fmt.Errorf("listening on METRICS_ADDR %s: %w", in.cfg.metricsAddr, err)
	}
	return nil
}

func main() {
	ctx, drain := context.WithCancel(context.Background())
	defer drain()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() { // ends with the program
		<-signals
		drain()
		<-signals // who asks twice does not want to wait; open calls become lost rows
		os.Exit(1)
	}()
	signal.Ignore(syscall.SIGPIPE) // a log reader that dies must not take the program with it
	log.SetOutput(io.Discard)      // net/http's transport writes there what providers send unasked, unmasked
	p := &program{getenv: os.Getenv, stdout: os.Stdout, stderr: os.Stderr}
	if len(os.Args) < 2 || os.Args[1] == "serve" { // all else ends with the terminal that it was started in
		p.hangups = make(chan os.Signal, 1)
		signal.Notify(p.hangups, syscall.SIGHUP)
	}
	if err := p.run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "llm-proxy:", err)
		os.Exit(1)
	}
}

// run does what the arguments say. It returns when that is done, or when ctx is
// over and the server has drained.
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
	case "audit":
		return p.audit(ctx, args)
	case "rekey":
		return p.rekey(ctx, args)
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

// serveWithSetup serves, after first did what the database still lacks.
func (p *program) serveWithSetup(ctx context.Context, first func(context.Context, *instance) error) error {
	cfg, err := p.config()
	if err != nil {
		return err
	}
	sink := newLogSink(p.stderr)
	defer sink.close()
	log := newLogger(sink, cfg.logLevel, cfg.logText)
	in, err := openInstance(ctx, cfg, log, sink.droppedLines)
	if err != nil {
		return err
	}
	in.hangups = p.hangups
	// Before a secret is printed that is shown only once: a start that fails
	// must not have printed it.
	if err := in.listen(); err != nil {
		return errors.Join(err, in.close())
	}
	if err := first(ctx, in); err != nil {
		return errors.Join(err, in.close())
	}
	return in.serve(ctx, p.ready)
}

// An instance is a server with all that stands behind it: what is opened is
// closed by close, in the opposite order.
type instance struct {
	cfg        *config
	log        *logger
	dir        *dataDir
	store      *store
	sealer     *sealer
	contentKey *contentKey
	prices     atomic.Pointer[priceTable]
	ledger     *ledger
	health     *healthTracker
	registry   *registry
	running    *runningCalls
	transport  *http.Transport
	metrics    *metrics
	server     *server
	proxy      *proxy
	manage     *manageAPI

	listener        net.Listener
	metricsListener net.Listener       // on METRICS_ADDR; nil: none
	certificate     *certificate       // nil: no TLS
	hangups         chan os.Signal     // SIGHUP; nil: not looked at
	stop            context.CancelFunc // ends the background goroutines
	workers         sync.WaitGroup
	createdKeyFile  string // the key file, if it was made by this start
}

// openInstance opens the data directory, the database and the ledger, and builds
// the surfaces on them. linesDropped counts lost log lines; nil: nobody counts.
func openInstance(ctx context.Context, cfg *config, log *logger, linesDropped func() int64) (_ *instance, err error) {
	in := &instance{cfg: cfg, log: log, metrics: newMetrics(), stop: func() {}}
	defer func() {
		if err != nil {
			err = errors.Join(err, in.close())
		}
	}()
	if err = in.openRecords(ctx); err != nil {
		return nil, err
	}
	if in.health, err = loadHealth(ctx, in.store); err != nil {
		return nil, err
	}
	in.registry = newRegistry(in.store, in.ledger, in.sealer, in.health, cfg.allowPrivate)
	in.running = newRunningCalls(newCallLimits(cfg.maxCalls, cfg.upstreamTimeout, cfg.streamIdleTimeout))
	in.transport = newTransport(cfg.allowPrivate)
	last, err := in.store.lastRequestID(ctx)
	if err != nil {
		return nil, err
	}
	if err = in.build(newIDSource(last), linesDropped); err != nil {
		return nil, err
	}
	in.startWorkers()
	return in, nil
}

// openRecords opens what is on disk, and all that a call is recorded with.
func (in *instance) openRecords(ctx context.Context) (err error) {
	if in.dir, err = openDataDir(in.cfg); err != nil {
		return err
	}
	if in.store, err = openStore(ctx, in.cfg.databaseFile); err != nil {
		return fmt.Errorf("%w; look into it with llm-proxy doctor, or bring back a backup with llm-proxy restore FILE", err)
	}
	if in.sealer, in.createdKeyFile, err = openSealer(ctx, in.cfg, in.store); err != nil {
		return err
	}
	if err = in.store.openAudit(ctx, in.sealer, systemOrigin(time.Now())); err != nil {
		return err
	}
	if err = in.dir.recordDatabase(); err != nil {
		return fmt.Errorf("noting the database: %w", err)
	}
	if in.contentKey, err = openContentKey(ctx, in.store, in.sealer); err != nil {
		return err
	}
	prices, err := effectivePrices(ctx, in.store)
	if err != nil {
		return err
	}
	in.prices.Store(prices)
	lost := func(r *requestRow) {
		r.cost, r.priced, r.modelTracked = prices.price("", r.model, r.counts)
		r.requestedModelTracked = r.modelTracked
	}
	in.ledger, err = openLedger(ctx, in.store, in.log.Logger, lost)
	return err
}

// build makes the server and the three surfaces, each with what it uses.
func (in *instance) build(ids *idSource, linesDropped func() int64) error {
	cfg := in.cfg
	started := time.Now()
	endpoints := newEndpointTable()
	in.metrics.registerEndpoints(endpoints)
	bodies := &bodyMemory{limit: cfg.bodyMemory}
	limits := &limitState{store: in.store, ledger: in.ledger, registry: in.registry}
	addresses := &addressReader{isTrustedProxy: cfg.trustedProxies, trustUnix: cfg.trustUnix}
	quiet := newHTTPErrorLog(in.log)
	strangers := newThrottle(logLinesPerSecond, time.Second)
	diskUse := func(ctx context.Context) (diskUsage, error) { return in.dir.diskUsage(ctx, in.store) }
	in.proxy = &proxy{cfg: cfg, log: in.log, httpErrorLog: quiet, registry: in.registry, limits: limits, ledger: in.ledger, running: in.running,
		endpoints: endpoints, transport: in.transport, buffers: newBufferPool(32 << 10), emptyURL: &url.URL{}, bodies: bodies, ids: ids,
		addresses: addresses, prices: &in.prices, databaseProblem: in.dir.databaseProblem, unauthenticatedLogLimit: strangers, metrics: in.metrics, contentKey: in.contentKey}
	in.manage = &manageAPI{signIns: &signInAuditor{log: in.log, store: in.store, limiter: newSignInThrottle()}, cfg: cfg, log: in.log, store: in.store, sealer: in.sealer, registry: in.registry, limits: limits, health: in.health,
		running: in.running, addresses: addresses, prices: &in.prices, databaseProblem: in.dir.databaseProblem, authThrottle: newAuthThrottle(), contentKey: in.contentKey}
	in.server = &server{cfg: cfg, log: in.log, httpErrorLog: quiet, store: in.store, ledger: in.ledger, running: in.running, ids: ids,
		addresses: addresses, unauthenticatedLogLimit: strangers, databaseProblem: in.dir.databaseProblem, metrics: in.metrics, proxy: in.proxy, manage: in.manage,
		exporter: &exporter{cfg: cfg, metrics: in.metrics, endpoints: endpoints, registry: in.registry, health: in.health, ledger: in.ledger,
			running: in.running, bodies: bodies, diskUse: diskUse, droppedLogLines: linesDropped, started: started}}
	if !cfg.adminPages {
		return nil
	}
	pages, err := newPageSet()
	if err != nil {
		return err
	}
	in.server.admin = &adminUI{cfg: cfg, log: in.log, store: in.store, api: in.manage, registry: in.registry, limits: limits, ledger: in.ledger,
		running: in.running, endpoints: endpoints, databaseProblem: in.dir.databaseProblem, diskUse: diskUse, pages: pages, keyID: in.sealer.id(), started: started}
	return nil
}

// startWorkers starts the goroutines that run beside the calls. close ends
// them.
func (in *instance) startWorkers() {
	ctx, stop := context.WithCancel(context.Background())
	in.stop = stop
	if os.Getenv("GOGC") == "" { // else the operator knows better
		in.workers.Go(func() { tuneGC(ctx) })
	}
	in.workers.Go(func() { in.running.run(ctx) })
	keeper := &healthKeeper{health: in.health, store: in.store, log: in.log}
	in.workers.Go(func() { keeper.persistHealth(ctx) })
	in.workers.Go(func() { in.dir.watch(ctx, in.log.Logger) })
	trail, _, _, _ := in.store.loadAuditHead(ctx, in.store.chain) // trouble will show with the first entry
	in.workers.Go(func() { in.manage.signIns.runAuditCheckpoints(ctx, time.Minute, trail.seq) })
	in.workers.Go(func() {
		in.ledger.runRetention(ctx, retention{in.cfg.retention, in.cfg.maxDatabaseBytes}, 10*time.Second)
	})
	in.workers.Go(func() {
		tick := time.NewTicker(time.Minute)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case now := <-tick.C:
				in.registry.evict(now.UnixMilli(), in.ledger.flush(ctx) == nil)
			}
		}
	})
}

// close ends the workers, writes what the ledger still has, and closes the
// database.
func (in *instance) close() error {
	in.stop()
	in.workers.Wait()
	var errs []error
	if in.ledger != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		errs = append(errs, in.ledger.close(ctx))
	}
	for _, l := range []net.Listener{in.listener, in.metricsListener} {
		if l != nil {
			_ = l.Close() // again, mostly
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

// serve answers, after listen, until ctx is over, then drains and closes. A
// second signal while it drains ends the program at once: that is main's doing.
func (in *instance) serve(ctx context.Context, ready func(net.Addr)) (err error) {
	l := in.listener
	hs := &http.Server{
		Handler:           in.server.routes(),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ConnState:         limitConnections(in.cfg.maxConnections, &in.metrics.openConnections),
		HTTP2:             &http.HTTP2Config{WriteByteTimeout: writeTimeout},
		MaxHeaderBytes:    60 << 10, // net/http allows 4 KiB more
		ErrorLog:          in.server.httpErrorLog,

		DisableGeneralOptionsHandler: true, // its answer to OPTIONS * would be in no log
		// No read or write timeout: an answer may stream for hours. The watchdog
		// (proxy_running.go) ends what stands still.
	}
	if in.certificate != nil {
		hs.TLSConfig = in.certificate.tlsConfig()
	}
	in.log.Info("listening", "address", l.Addr().String(), "tls", in.certificate != nil, "version", versionText())
	failed := make(chan error, 1)
	var serving sync.WaitGroup
	serving.Go(func() {
		if in.certificate != nil {
			failed <- hs.ServeTLS(l, "", "")
		} else {
			failed <- hs.Serve(l)
		}
	})
	ms := in.server.metricsServer()
	if in.metricsListener != nil {
		in.log.Info("serving metrics", "address", in.metricsListener.Addr().String())
		serving.Go(func() { _ = ms.Serve(in.metricsListener) }) // until the drain is over
	}
	watching, stopWatching := context.WithCancel(context.Background())
	defer stopWatching()
	serving.Go(func() { in.certificate.watch(watching, certificatePollInterval, in.hangups, in.log.Logger) })
	if ready != nil {
		ready(l.Addr())
	}
	select {
	case <-ctx.Done():
	case err = <-failed:
		_ = ms.Close()
		return errors.Join(fmt.Errorf("serving: %w", err), in.close())
	}
	in.log.Info("draining", "timeout", in.cfg.drainTimeout.String())
	drain, cancel := context.WithTimeout(context.Background(), in.cfg.drainTimeout)
	defer cancel()
	// Not Shutdown yet: it would drop, without an answer, requests that are on
	// their way on connections that stand. They get 503 and Connection: close.
	_ = l.Close()
	hs.SetKeepAlivesEnabled(false)
	in.running.drain(drain)
	last, done := context.WithTimeout(context.Background(), time.Second) // for administrators' requests
	defer done()
	_ = hs.Shutdown(last)
	_ = hs.Close()
	_ = ms.Close()
	stopWatching()
	serving.Wait()
	err = in.close()
	in.log.Info("stopped")
	return err
}

const (
	gcHeadroom     = 32 << 20 // bytes of garbage that a collection may wait for
	minLiveHeap    = 4 << 20  // what is in use counts as so much at least
	minGCPercent   = 100      // per cent: Go's own rule, where that is more than gcHeadroom
	gcTuneInterval = 100 * time.Millisecond
)

// tuneGC sets the collector's target as the heap grows and shrinks, until ctx
// is over.
func tuneGC(ctx context.Context) {
	live := []runtimemetrics.Sample{{Name: "/gc/heap/live:bytes"}} // that the last collection left
	set := gcPercentFor(0)
	debug.SetGCPercent(set)
	tick := time.NewTicker(gcTuneInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		runtimemetrics.Read(live)
		if want := gcPercentFor(live[0].Value.Uint64()); want < set-set/8 || want > set+set/8 { // each change stops the world
			debug.SetGCPercent(want)
			set = want
		}
	}
}

// gcPercentFor is how much garbage may come, in per cent of what is in use.
func gcPercentFor(used uint64) int {
	return max(minGCPercent, int(gcHeadroom*100/max(used, minLiveHeap)))
}

// bootstrap makes the first management key, unless the environment has one, and
// with OPENAI_API_KEY a first project and token. Both only in a database that
// has none: nothing is ever printed again.
func (p *program) bootstrap(ctx context.Context, in *instance) error {
	if in.createdKeyFile != "" {
		in.log.Warn("an encryption key was made; keep it apart from the database and its backups", "file", in.createdKeyFile)
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
		key, err := in.manage.createFirstKey(ctx)
		if err != nil {
			return err
		}
		fmt.Fprintf(p.stdout, "\nThe first management key (role admin). It is shown only now:\n\n  %s\n", key())
		in.printAdminURL(p.stdout, base)
		if in.cfg.openaiKey == nil || projects > 0 {
			fmt.Fprintf(p.stdout, `
Next, make a project with your provider's key, and a token for it:

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
		in.log.Info("OPENAI_API_KEY is not used: the database has projects already")
		return nil
	}
	token, err := in.manage.createFirstProject(ctx, "default", in.cfg.openaiKey)
	if err != nil {
		return err
	}
	fmt.Fprintf(p.stdout, `
The project "default" was made with OPENAI_API_KEY. A token for it, good for 30 days and shown only now:

  %[2]s

Try it:

  curl %[1]s/v1/chat/completions -H "Authorization: Bearer %[2]s" -H "Content-Type: application/json" \
    -d '{"model":"gpt-4o-mini","messages":[{"role":"user","content":"Hello"}]}'

`, base, token())
	return nil
}

// printAdminURL says where the first key opens pages, if there are any.
func (in *instance) printAdminURL(w io.Writer, base string) {
	if in.cfg.adminPages {
		fmt.Fprintf(w, "\nSign in with it at %s/admin\n", base)
	}
}

// baseURL is where clients reach this server, as far as it knows.
func (in *instance) baseURL() string {
	if in.cfg.publicURL != nil {
		return in.cfg.publicURL.Scheme + "://" + in.cfg.publicURL.Host
	}
	scheme := "http"
	if in.cfg.tlsCert != "" {
		scheme = "https"
	}
	if in.listener.Addr().Network() == "unix" {
		return scheme + "://localhost" // through the socket: what is in front has another name
	}
	addr := in.listener.Addr().String()
	if ap, err := netip.ParseAddrPort(addr); err == nil && ap.Addr().IsUnspecified() {
		addr = "localhost:" + strconv.Itoa(int(ap.Port()))
	}
	return scheme + "://" + addr
}
