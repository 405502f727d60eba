// This file has what the process shares with its host: the TCP address, unix socket or socket of systemd that clients
// connect to, the TLS certificate (reloaded when its files change), the address that a request comes from, the memory
// limit of the cgroup, and what the system reports about disk and processor.
//
// Below that are the bounds of what clients can cause: lines in the log, entries in the audit trail, attempts to guess
// a key, and the memory of request bodies and calls. Nothing there grows with the number of clients. The file answers
// no request itself.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// addressText returns an address as text, or "" for a unix socket, which has none.
func addressText(addr netip.Addr) string {
	if !addr.IsValid() {
		return ""
	}
	return addr.String()
}

// limitConnections returns a hook for http.Server that closes new connections while maximum
// are open; otherwise an attacker could use up memory with idle connections. open counts the
// open ones.
func limitConnections(maximum int64, open *atomic.Int64) func(net.Conn, http.ConnState) {
	return func(c net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			if open.Add(1) > maximum {
				c.Close() // its goroutine notices and ends in StateClosed
			}
		case http.StateClosed, http.StateHijacked:
			open.Add(-1)
		}
	}
}

// certificatePollInterval is how often the certificate's files are checked for changes.
const certificatePollInterval = 10 * time.Second

const (
	unixPrefix    = "unix:"
	systemdListen = "systemd"
)

// openListener opens an address that has passed checkListen.
func openListener(addr string, mode fs.FileMode) (net.Listener, error) {
	if path, ok := strings.CutPrefix(addr, unixPrefix); ok {
		return listenUnix(path, mode)
	}
	if addr == systemdListen {
		return inheritListener(os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"))
	}
	return net.Listen("tcp", addr)
}

// describeListenError says why an address cannot be listened on, and what to do.
func describeListenError(setting, addr string, err error) error {
	var remedy string
	switch _, port, _ := net.SplitHostPort(addr); {
	case errors.Is(err, syscall.EADDRINUSE):
		remedy = "; another program listens there: stop it (find it with ss -ltnp), or set another address"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		remedy = "; this machine has no such address: see ip address, or listen on :" + port
	case errors.Is(err, fs.ErrPermission) && !strings.HasPrefix(addr, unixPrefix):
		remedy = "; ports below 1024 need CAP_NET_BIND_SERVICE: use another port, and let a proxy or the container " +
			"publish that one"
	case errors.Is(err, fs.ErrNotExist):
		remedy = "; create the directory first"
	case errors.Is(err, fs.ErrPermission):
		remedy = "; " + fileRemedy(err)
	}
	return fmt.Errorf("listening on %s %s: %w%s", setting, addr, err, remedy)
}

// parseFileMode reads the permissions of a socket.
func parseFileMode(s string) (fs.FileMode, error) {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 || n&0o600 != 0o600 {
		return 0, errors.New("must be octal permissions that let the owner read and write, as in 0660")
	}
	return fs.FileMode(n), nil
}

// replicaAddress returns the address by which administrators recognize this process among others.
func (c *config) replicaAddress() string {
	host, port, err := net.SplitHostPort(c.listenAddr)
	ip, ipErr := netip.ParseAddr(host)
	if err != nil || host == "" || ipErr == nil && ip.IsUnspecified() {
		if name, err := os.Hostname(); err == nil {
			host = name
		}
	}
	if err != nil { // a socket
		return host
	}
	return net.JoinHostPort(host, port)
}

// listenUnix creates a socket file. It replaces a socket that a dead process has left; any
// other file at that path is an error and is not touched.
func listenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode().Type() != fs.ModeSocket:
		return nil, errors.New("a file that is not a socket exists there; choose another path")
	case err == nil:
		if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
			conn.Close()
			return nil, errors.New("another program answers there")
		}
		if err := os.Remove(path); err != nil {
			return nil, unwrapPathError(err)
		}
	}
	// The umask makes sure that the file never has more permissions than it should, not even
	// for a moment. Other files created at the same time get fewer, which is harmless.
	old := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, mode); err != nil {
		return nil, errors.Join(unwrapPathError(err), l.Close())
	}
	return l, nil
}

// inheritListener returns the first socket that systemd passed to this process. Clients can
// connect to it even while the program restarts.
func inheritListener(pid, fds string) (net.Listener, error) {
	if n, err := strconv.Atoi(fds); err != nil || n < 1 || pid != strconv.Itoa(os.Getpid()) {
		return nil, errors.New("no socket was inherited; start the program with deploy/llm-proxy.socket, or set an " +
			"address")
	}
	const first = 3 // after standard input, output and error
	f := os.NewFile(first, "LISTEN_FDS")
	defer f.Close() // the listener has a copy
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("the inherited file is not a listening socket: %w", err)
	}
	return l, nil
}

// A certificate is the TLS certificate in use. watch reloads it when its files change.
type certificate struct {
	certFile, keyFile string
	current           atomic.Pointer[tls.Certificate]

	mu          sync.Mutex
	loadedState string // fileState when the files were last read
}

// newCertificate reads the files.
func newCertificate(certFile, keyFile string) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile}
	return c, c.load()
}

// load reads the files. If they are not usable, the current certificate stays in use.
func (c *certificate) load() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.loadedState = c.fileState()
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("TLS_CERT_FILE, TLS_KEY_FILE: not a usable pair: %w", unwrapPathError(err))
	}
	c.current.Store(&pair)
	return nil
}

// fileState describes the files in a text that changes when they do.
func (c *certificate) fileState() string {
	var out strings.Builder
	for _, name := range [...]string{c.certFile, c.keyFile} {
		if info, err := os.Stat(name); err == nil {
			fmt.Fprintf(&out, "%d %d,", info.ModTime().UnixNano(), info.Size())
		}
	}
	return out.String()
}

func (c *certificate) changed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fileState() != c.loadedState
}

// tlsConfig returns the configuration of a server that uses the current certificate.
func (c *certificate) tlsConfig() *tls.Config {
	return &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		return c.current.Load(), nil
	}}
}

// watch reloads the files when they have changed, which it checks at each interval, and on
// SIGHUP, until ctx is done. Without a certificate it only receives SIGHUP, which would
// otherwise end the program.
func (c *certificate) watch(ctx context.Context, interval time.Duration, hangups <-chan os.Signal, log *slog.Logger) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if c == nil || !c.changed() {
				continue
			}
		case <-hangups:
			if c == nil {
				log.Info("SIGHUP: there is no TLS certificate to reload, and settings change only with a restart")
				continue
			}
		}
		if err := c.load(); err != nil {
			log.Error("the TLS certificate could not be reloaded; the previous one stays in use", "error", err)
			continue
		}
		notAfter := c.current.Load().Leaf.NotAfter.UTC().Format(time.RFC3339)
		log.Info("the TLS certificate was reloaded", "not_after", notAfter)
	}
}

// ourHost reports whether a Host header can name this server: an IP address, a name without a
// dot (which no attacker can own), or the host of PUBLIC_URL.
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

// An addressReader finds out which address a request comes from.
type addressReader struct {
	trustedProxies []netip.Prefix // networks of proxies whose X-Forwarded-For is trusted
	trustUnix      bool           // clients of the unix socket are such proxies
}

// clientAddress returns the client's address: that of the connection, or behind trusted
// proxies the last one in X-Forwarded-For that is not a trusted proxy's. It returns "" if the
// address is unknown: a list of allowed addresses does not contain it.
func (a *addressReader) clientAddress(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	var addr netip.Addr
	switch {
	case err != nil: // a unix socket
		if !a.trustUnix {
			return ""
		}
	case len(a.trustedProxies) == 0:
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
			hop, ok := parseHop(strings.TrimSpace(hops[j]))
			if !ok {
				return "" // it is not the proxy's address either, and the rest cannot be trusted
			}
			addr = hop.Unmap().WithZone("")
			if !a.trusts(addr) {
				return addressText(addr)
			}
		}
	}
	return addressText(addr)
}

// parseHop reads an entry of X-Forwarded-For. Some proxies add the port, which needs brackets
// around an IPv6 address.
func parseHop(text string) (netip.Addr, bool) {
	if withPort, err := netip.ParseAddrPort(text); err == nil {
		return withPort.Addr(), true
	}
	if inner, ok := strings.CutPrefix(text, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		addr, err := netip.ParseAddr(inner)
		return addr, ok && err == nil && addr.Is6()
	}
	addr, err := netip.ParseAddr(text)
	return addr, err == nil
}

func (a *addressReader) trusts(addr netip.Addr) bool {
	return slices.ContainsFunc(a.trustedProxies, func(p netip.Prefix) bool { return p.Contains(addr.Unmap()) })
}

// parseTrustedProxies reads a list of networks, in which "unix" means the socket.
func parseTrustedProxies(s string) (trustUnix bool, networks []netip.Prefix, err error) {
	var rest []string
	for item := range strings.SplitSeq(s, ",") {
		if strings.TrimSpace(item) == "unix" {
			trustUnix = true
		} else {
			rest = append(rest, item)
		}
	}
	if len(rest) > 0 {
		networks, err = parsePrefixes(strings.Join(rest, ","))
	}
	return trustUnix, networks, err
}

func parsePrefixes(s string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for item := range strings.SplitSeq(s, ",") {
		item = strings.TrimSpace(item)
		if addr, err := netip.ParseAddr(item); err == nil {
			out = append(out, netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()))
			continue
		}
		p, err := netip.ParsePrefix(item)
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("must list addresses or networks such as 10.0.0.0/8; %q is neither", item)
		}
		out = append(out, p)
	}
	return out, nil
}

// limitMemory keeps the heap below the memory limit of this process's cgroup (of its container or
// unit), unless GOMEMLIMIT is set. Otherwise the collector's headroom alone could exceed that limit
// under load, and the kernel would kill the program.
func limitMemory(log *slog.Logger) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	groups, _ := os.ReadFile("/proc/self/cgroup") // without it, as on other systems, there is no limit
	read := func(name string) string { text, _ := os.ReadFile(name); return string(text) }
	if limit := cgroupMemoryLimit(string(groups), read); limit > 0 {
		limit -= limit / 10 // for what is not Go's: the database's pages, stacks of the kernel
		debug.SetMemoryLimit(limit)
		log.Info("the heap is limited to nine tenths of the cgroup's memory", "bytes", limit)
	}
}

// cgroupMemoryLimit returns the lowest memory limit of the cgroups in groups (the content of
// /proc/self/cgroup) and of those above them; 0: there is none. read returns the content of a file, or "".
func cgroupMemoryLimit(groups string, read func(name string) string) (lowest int64) {
	for line := range strings.Lines(groups) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, group, _ := strings.Cut(rest, ":")
		root, files := "/sys/fs/cgroup", []string{"memory.max", "memory.high"}
		if slices.Contains(strings.Split(controllers, ","), "memory") { // version 1
			root, files = "/sys/fs/cgroup/memory", []string{"memory.limit_in_bytes"}
		} else if controllers != "" {
			continue
		}
		for dir := path.Join("/", group); ; dir = path.Dir(dir) {
			for _, file := range files {
				n, err := strconv.ParseInt(strings.TrimSpace(read(path.Join(root, dir, file))), 10, 64)
				if err == nil && n > 0 && n < 1<<60 && (lowest == 0 || n < lowest) { // larger values mean none
					lowest = n
				}
			}
			if dir == "/" {
				break
			}
		}
	}
	return lowest
}

// fileSize returns the size of a file; 0: it cannot be read.
func fileSize(name string) int64 {
	info, err := os.Stat(name)
	if err != nil {
		return 0
	}
	return info.Size()
}

// cpuTime returns the processor time of this process in microseconds, or false if the system
// does not report it.
func cpuTime() (us int64, ok bool) {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0, false
	}
	return int64(u.Utime.Sec+u.Stime.Sec)*1_000_000 + int64(u.Utime.Usec+u.Stime.Usec), true
}

// freeSpace returns the number of bytes that this user can still write under path.
func freeSpace(path string) (uint64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return 0, err
	}
	return uint64(st.Bavail) * uint64(st.Bsize), nil
}

// A throttle allows a number of events per window and counts those that it omits. If it has several
// windows, an event must fit into each of them.
type throttle struct {
	mu      sync.Mutex
	windows []throttleWindow
	omitted int64
}

// A throttleWindow allows limit events. It starts with its first event.
type throttleWindow struct {
	limit  int
	length time.Duration
	count  int
	ends   time.Time
}

const (
	logLinesPerSecond           = 50 // for lines that anyone can cause, with or without a token
	maxAuthFailures             = 20 // wrong management keys per minute, from the addresses of one slot
	maxFailuresAuditedPerMinute = 10 // failed sign-ins with their own audit entry: entries are kept forever
	maxFailuresAuditedPerDay    = 500
	refusalLogInterval          = time.Second // a token's refused calls get at most one ledger row in this time
)

// newThrottle returns a throttle with one window.
func newThrottle(limit int, window time.Duration) *throttle {
	return &throttle{windows: []throttleWindow{{limit: limit, length: window}}}
}

// newSignInThrottle limits the failed sign-ins that get their own audit entry.
func newSignInThrottle() *throttle {
	return &throttle{windows: []throttleWindow{
		{limit: maxFailuresAuditedPerMinute, length: time.Minute},
		{limit: maxFailuresAuditedPerDay, length: 24 * time.Hour},
	}}
}

// allow returns a wait of 0 if an event is allowed now, and how many were omitted since the last allowed one.
// Otherwise it counts the event as omitted and returns how long no event will be allowed.
func (t *throttle) allow(now time.Time) (wait time.Duration, omitted int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if wait = t.count(now); wait > 0 {
		t.omitted++
		return wait, 0
	}
	omitted, t.omitted = t.omitted, 0
	return 0, omitted
}

// addOmitted counts n more events as omitted.
func (t *throttle) addOmitted(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.omitted += n
}

// drainOmitted returns the number of omitted events and resets it. Reporting them is an event itself: unless
// force is set, drainOmitted returns 0 until that event is allowed.
func (t *throttle) drainOmitted(now time.Time, force bool) (omitted int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.omitted > 0 && (force || t.count(now) == 0) {
		omitted, t.omitted = t.omitted, 0
	}
	return omitted
}

// count adds an event to every window and returns 0; if a window is full, it adds none and returns
// how long that window lasts. The caller holds t.mu.
func (t *throttle) count(now time.Time) (wait time.Duration) {
	for i := range t.windows {
		w := &t.windows[i]
		if !now.Before(w.ends) {
			w.count, w.ends = 0, now.Add(w.length)
		}
		if w.count >= w.limit {
			wait = max(wait, w.ends.Sub(now))
		}
	}
	if wait == 0 {
		for i := range t.windows {
			t.windows[i].count++
		}
	}
	return wait
}

// An addressThrottle is a fixed number of throttles that addresses share by hash, so it cannot grow.
type addressThrottle [1024]*throttle

// newAuthThrottle limits wrong management keys per address. It only slows down guessing: guessing 256 bits is
// hopeless in any case.
func newAuthThrottle() *addressThrottle {
	var a addressThrottle
	for i := range a {
		a[i] = newThrottle(maxAuthFailures, time.Minute)
	}
	return &a
}

// forAddress returns the throttle of an address.
func (a *addressThrottle) forAddress(address string) *throttle {
	if ip, err := netip.ParseAddr(address); err == nil && ip.Is6() && !ip.Is4In6() {
		if p, err := ip.Prefix(64); err == nil { // one customer has a whole /64
			address = p.String()
		}
	}
	var h uint32 = 2166136261 // FNV-1a
	for i := range len(address) {
		h = (h ^ uint32(address[i])) * 16777619
	}
	return a[h%uint32(len(a))]
}

// bodyMemory limits the memory of all request bodies that are in memory at one time.
type bodyMemory struct {
	limit int64
	used  atomic.Int64
}

// reserve reports whether n more bytes fit, and counts them if so.
func (b *bodyMemory) reserve(n int64) bool {
	if b.used.Add(n) > b.limit {
		b.used.Add(-n)
		return false
	}
	return true
}

func (b *bodyMemory) release(n int64) { b.used.Add(-n) }

// A bodyShare is what one call has reserved of the memory for bodies, for its token and in the whole program:
// the body, its copies with another model's name, a buffered stream, stored content. All that goes in comes out
// again in releaseAll, so neither count can drift. It belongs to the call's goroutine.
type bodyShare struct {
	memory   *bodyMemory
	token    *atomic.Int64 // what the token's calls have reserved together
	max      int64         // of token, unless this call alone has all of it
	reserved int64
}

// reserve reserves n more bytes.
func (s *bodyShare) reserve(n int64) error {
	if used := s.token.Add(n); used > s.max && used > s.reserved+n {
		s.token.Add(-n)
		return errTokenBodyMemory
	}
	if !s.memory.reserve(n) {
		s.token.Add(-n)
		return errBodyMemoryFull
	}
	s.reserved += n
	return nil
}

func (s *bodyShare) release(n int64) {
	s.reserved -= n
	s.token.Add(-n)
	s.memory.release(n)
}

func (s *bodyShare) releaseAll() { s.release(s.reserved) }

// bodyBufferSize returns the size of the buffer for a body that declares a length (negative: it does not), when have
// bytes of it have come. The last buffer fits exactly, with one more byte to find the end, so that growing leaves
// little garbage. But memory follows the bytes that arrive: a buffer is at most eight times as large as what has.
func bodyBufferSize(declared, have int64) int64 {
	const first, growth = 64 << 10, 8
	if declared < 0 {
		return max(first, have+have/2)
	}
	size := declared + 1
	for size > max(first, growth*have) {
		size = size/growth + 1
	}
	return size
}

const (
	gcHeadroom     = 32 << 20 // bytes of garbage that may accumulate before a collection
	minLiveHeap    = 4 << 20  // bytes; a smaller live heap counts as this much
	gcTuneInterval = 100 * time.Millisecond
	bytesPerCall   = 60 << 10 // about what a running stream needs
	minIdlePeak    = 64 << 20 // bytes of calls and bodies; less is not worth giving back
	idleTicks      = 20       // how many gcTuneIntervals the need must be low before memory is given back
)

// An idleMemory notices that a peak of calls is over.
type idleMemory struct {
	peak int64 // bytes
	low  int   // for how many ticks the need has been low
}

// afterPeak is called once per tick with the bytes that running calls need. It reports whether that has been less than
// a quarter of the last peak for idleTicks: once for each peak.
func (m *idleMemory) afterPeak(need int64) bool {
	m.peak = max(m.peak, need)
	if m.low++; m.peak < minIdlePeak || need > m.peak/4 {
		m.low = 0
	}
	if m.low < idleTicks {
		return false
	}
	m.peak, m.low = need, 0
	return true
}

// gcPercentFor returns how much garbage may accumulate, in percent of the live heap: as much as there is live, which
// is Go's default, and gcHeadroom at least. Request bodies count a quarter. They are the largest part of the heap
// when there are many, and have no pointers, so that a collection is cheap.
func gcPercentFor(liveHeap, bodies int64) int {
	liveHeap = max(liveHeap, bodies, minLiveHeap)
	return int(max(gcHeadroom, liveHeap-bodies, bodies/4) * 100 / liveHeap)
}

// A bufferPool lends ReverseProxy the buffers it copies with.
type bufferPool struct{ pool sync.Pool }

// A pooledBuffer is an array, because a pointer to it is put into a pool without an allocation.
type pooledBuffer = [32 << 10]byte

func newBufferPool() *bufferPool {
	return &bufferPool{sync.Pool{New: func() any { return new(pooledBuffer) }}}
}

func (p *bufferPool) Get() []byte { return p.pool.Get().(*pooledBuffer)[:] }

func (p *bufferPool) Put(b []byte) { p.pool.Put((*pooledBuffer)(b)) }

// checkListen checks an address to listen on.
func checkListen(s string) error {
	if path, ok := strings.CutPrefix(s, unixPrefix); ok {
		if !filepath.IsAbs(path) || len(path) > 100 || strings.ContainsRune(path, 0) {
			return errors.New("must be unix: followed by an absolute path of at most 100 bytes")
		}
		return nil
	}
	if s == systemdListen {
		return nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return errors.New("must be HOST:PORT, as in 127.0.0.1:8080 or :8080, or unix:/path")
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return errors.New("has a port that is not a number from 0 to 65535")
	}
	if host != "" && host != "localhost" {
		if _, err := netip.ParseAddr(host); err != nil {
			return errors.New("must name an IP address of this machine, localhost, or nothing for all of them")
		}
	}
	return nil
}

func checkMetricsListen(s string) error {
	if s == systemdListen {
		return errors.New("must be another address; the inherited socket is for LISTEN_ADDR")
	}
	return checkListen(s)
}
