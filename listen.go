// This room opens what clients connect to: a TCP address, a unix socket, or a
// socket that systemd opened; and it keeps the TLS certificate, which may be
// renewed while the program runs. It answers nothing itself.
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
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// addressText writes an address; "" for that of a unix socket, which has none.
func addressText(addr netip.Addr) string {
	if !addr.IsValid() {
		return ""
	}
	return addr.String()
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

// certificatePollInterval is how often the files of the certificate are looked at.
const certificatePollInterval = 10 * time.Second

const (
	unixPrefix    = "unix:"
	systemdListen = "systemd"
)

// openListener opens an address that checkListen has found good.
func openListener(addr string, mode fs.FileMode) (net.Listener, error) {
	if path, ok := strings.CutPrefix(addr, unixPrefix); ok {
		return listenUnix(path, mode)
	}
	if addr == systemdListen {
		return inheritListener(os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"))
	}
	return net.Listen("tcp", addr)
}

// listenUnix makes a socket file, in the place of one that a dead process has
// left. Anything else at that path stays, and is an error.
func listenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode().Type() != fs.ModeSocket:
		return nil, errors.New("there is a file of another kind; name a path that is free")
	case err == nil:
		if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
			conn.Close()
			return nil, errors.New("another program answers there")
		}
		if err := os.Remove(path); err != nil {
			return nil, unwrapPathError(err)
		}
	}
	// The file must not be there for a moment with more rights than it should
	// have. Other files that this process makes then have fewer, which is fine.
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

// inheritListener takes the socket that systemd opened, the first of those it
// hands down. It waits there for clients while the program is started anew.
func inheritListener(pid, fds string) (net.Listener, error) {
	if n, err := strconv.Atoi(fds); err != nil || n < 1 || pid != strconv.Itoa(os.Getpid()) {
		return nil, errors.New("no socket was handed down; start it through deploy/llm-proxy.socket, or name an address")
	}
	const first = 3 // after standard input, output and error
	f := os.NewFile(first, "LISTEN_FDS")
	defer f.Close() // the listener has a copy
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("what was handed down is no socket that listens: %w", err)
	}
	return l, nil
}

// A certificate is the TLS certificate in use. It follows its files.
type certificate struct {
	certFile, keyFile string
	current           atomic.Pointer[tls.Certificate]

	mu          sync.Mutex
	loadedState string // how the files looked when they were last read
}

// newCertificate reads the files.
func newCertificate(certFile, keyFile string) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile}
	return c, c.load()
}

// load reads the files. If they are no good what was in use stays so.
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

// fileState says how the files are now, in a text that changes when they do.
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

// tlsConfig is for a server that uses the certificate, whichever is current.
func (c *certificate) tlsConfig() *tls.Config {
	return &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.current.Load(), nil }}
}

// watch reads the files again when they have changed, looking every so often,
// and when told to, until ctx is over. Without a certificate it only takes what
// it is told, which would else end the program.
func (c *certificate) watch(ctx context.Context, every time.Duration, told <-chan os.Signal, log *slog.Logger) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if c == nil || !c.changed() {
				continue
			}
		case <-told:
			if c == nil {
				log.Info("SIGHUP: there is no TLS certificate to read anew, and settings change only by a restart")
				continue
			}
		}
		if err := c.load(); err != nil {
			log.Error("the TLS certificate could not be read anew; the one from before stays in use", "error", err)
			continue
		}
		log.Info("the TLS certificate was read anew", "not_after", c.current.Load().Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
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

func (a *addressReader) trusts(addr netip.Addr) bool {
	for _, p := range a.isTrustedProxy {
		if p.Contains(addr.Unmap()) {
			return true
		}
	}
	return false
}
