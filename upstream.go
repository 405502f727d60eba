// This file holds a project's upstreams and their keys, the rules for base URLs, and the one outbound transport,
// which checks every address it dials. Nothing that a client sends decides here where a call goes.
package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// baseURLOrigin returns the origin of a stored base URL, which the sealed key is bound to. It does not check
// whether calls may go there.
func baseURLOrigin(s string) (string, error) {
	u, err := parseBaseURL(s, true)
	if err != nil {
		return "", err
	}
	return u.Scheme + "://" + u.Host, nil
}

// parseBaseURL checks a base URL in the form SDKs use, such as https://api.openai.com/v1. An empty path means
// /v1. Plain http and private addresses need allowPrivate. Addresses that are never allowed (metadata services
// and the like) are refused here as far as the text shows them, and again when the resolved address is dialled.
func parseBaseURL(s string, allowPrivate bool) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case len(s) > 2000 || err != nil || u.Host == "" || u.Opaque != "" || (u.Scheme != "https" && u.Scheme != "http"):
		return nil, errors.New("must be an absolute URL, as in https://api.openai.com/v1")
	case u.User != nil:
		return nil, errors.New("must not contain a user name or password; the key has its own field")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(s, "#"):
		return nil, errors.New("must not have a query or a fragment")
	case u.Scheme == "http" && !allowPrivate:
		return nil, errors.New("must be https; plain http needs ALLOW_PRIVATE_UPSTREAMS=true")
	case u.RawPath != "" || strings.Contains(u.Path, "//") || strings.Contains(u.Path, "/.") ||
		strings.ContainsAny(u.Path, `\;%`):
		return nil, errors.New("must have a plain path, without escapes, dot segments or empty segments")
	}
	if err := checkHost(u.Hostname(), allowPrivate); err != nil {
		return nil, err
	}
	if err := checkPort(u); err != nil {
		return nil, err
	}
	u.Host = strings.ToLower(u.Host)
	if u.Path = strings.TrimRight(u.Path, "/"); u.Path == "" {
		u.Path = "/v1"
	}
	return u, nil
}

// parseWebhookURL checks the URL that notifications are sent to, as parseBaseURL does. It may have any path and query.
func parseWebhookURL(text secret, allowPrivate bool) (*url.URL, error) {
	s := text()
	u, err := url.Parse(s)
	switch {
	case len(s) > 2000 || err != nil || u.Host == "" || u.Opaque != "" || (u.Scheme != "https" && u.Scheme != "http"):
		return nil, errors.New("must be an absolute URL, as in https://hooks.example.com/llm-proxy")
	case u.User != nil:
		return nil, errors.New("must not contain a user name or password")
	case strings.Contains(s, "#"):
		return nil, errors.New("must not have a fragment")
	case u.Scheme == "http" && !allowPrivate:
		return nil, errors.New("must be https; plain http needs ALLOW_PRIVATE_UPSTREAMS=true")
	}
	if err := checkHost(u.Hostname(), allowPrivate); err != nil {
		return nil, err
	}
	return u, checkPort(u)
}

// checkPort checks the port of a URL, and removes it if it is the scheme's own.
func checkPort(u *url.URL) error {
	if p := u.Port(); p != "" || strings.HasSuffix(u.Host, ":") {
		if p == "" || p == "0" || len(p) > 5 || (len(p) == 5 && p > "65535") {
			return errors.New("must have a port from 1 to 65535")
		}
		if u.Scheme == "https" && p == "443" || u.Scheme == "http" && p == "80" {
			u.Host = strings.TrimSuffix(u.Host, ":"+p)
		}
	}
	return nil
}

// An upstream is one provider key of a project and the base URL that the key may be sent to. It is immutable,
// except that health and retryBudget are shared by all its versions.
type upstream struct {
	seq           int64
	owner         int64 // the project that owns it; others may share it
	id, name      string
	provider      string
	scheme, host  string
	basePath      string // replaces the client's /v1 or /v1beta
	key           secret
	organization  string
	openaiProject string // OpenAI's project, not this program's
	models        []string
	rewrite       map[string]string // the client's name of a model -> the name that is sent
	settings      upstreamSettings
	weight        int64
	priority      int64
	configErr     error // not nil: the row cannot be used; its key cannot be decrypted, or its URL is not allowed
	health        *keyHealth
	retryBudget   *retryBudget // of its host
}

const (
	providerOpenAI     = "openai"
	providerAnthropic  = "anthropic"
	providerAzure      = "azure"
	providerCompatible = "compatible"
	providerGoogle     = "google"
)

// newUpstream returns a stored upstream, ready for use. If something is wrong with it, configErr says what, and
// its key is quarantined: other upstreams are preferred, and without any, calls are refused. It is not left out,
// because a key that cannot be decrypted must not go unnoticed.
func newUpstream(row *upstreamRow, sl *sealer, allowPrivate bool, tracker *healthTracker) *upstream {
	u := &upstream{
		seq: row.seq, owner: row.project, id: row.id, name: row.name, provider: row.provider, weight: row.weight,
		priority: row.priority, organization: row.organization, openaiProject: row.openaiProject,
	}
	u.configErr = u.unseal(row, sl, allowPrivate)
	u.health, u.retryBudget = tracker.forUpstream(row.seq, row.id), tracker.budgetFor(u.host)
	u.health.setUsable(time.Now().UnixMilli(), u.configErr == nil)
	return u
}

// unseal decrypts the key, which works only for the row and origin it was sealed for, and parses the settings.
func (u *upstream) unseal(row *upstreamRow, sl *sealer, allowPrivate bool) error {
	if row.foreign != nil {
		return row.foreign
	}
	base, err := parseBaseURL(row.baseURL, allowPrivate)
	if err != nil {
		return fmt.Errorf("base URL %w", err)
	}
	u.scheme, u.host, u.basePath = base.Scheme, base.Host, base.Path
	sealedFor := sealContext(row.id, row.projectID, base.Scheme+"://"+base.Host)
	if u.key, err = sl.open(row.sealedKey, sealedFor); err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(row.models), &u.models); err != nil {
		return fmt.Errorf("list of models: %w", err)
	}
	if u.rewrite, err = parseRewrite([]byte(row.rewrite)); err != nil {
		return fmt.Errorf("model name mapping: %w", err)
	}
	if err := json.Unmarshal([]byte(row.settings), &u.settings); err != nil {
		return fmt.Errorf("settings: %w", err)
	}
	return nil
}

// serves reports whether the upstream speaks the API family and has the model.
func (u *upstream) serves(api apiFamily, model string) bool {
	if family := u.family(); api != family && (api != apiAny || family == apiGemini) {
		return false
	}
	return len(u.models) == 0 || model == "" || matchesAnyPattern(u.models, model)
}

// family returns the API family that the upstream speaks.
func (u *upstream) family() apiFamily {
	switch u.provider {
	case providerAnthropic:
		return apiAnthropic
	case providerGoogle:
		return apiGemini
	}
	return apiOpenAI
}

// url returns the URL of a call. path begins with /v1 or /v1beta and is built from an endpoint's pattern and checked
// ids, never from a client's path as it came.
func (u *upstream) url(path, query string) *url.URL {
	raw := u.basePath + path[1+strings.IndexByte(path[1:], '/'):]
	out := &url.URL{Scheme: u.scheme, Host: u.host, Path: raw, RawQuery: query}
	if hasModelPrefix(path) { // the only paths with escapes; they keep the client's
		if p, err := url.PathUnescape(raw); err == nil {
			out.Path, out.RawPath = p, raw
		}
	}
	return out
}

// mapModel returns the upstream's own name for a model.
func (u *upstream) mapModel(model string) string {
	if name, ok := u.rewrite[model]; ok {
		return name
	}
	return model
}

// authorize sets the provider's key and account in an outgoing request's header.
func (u *upstream) authorize(h http.Header) {
	switch u.provider {
	case providerAnthropic:
		h["X-Api-Key"] = []string{u.key()}
	case providerGoogle:
		h["X-Goog-Api-Key"] = []string{u.key()}
	case providerAzure:
		h["Api-Key"] = []string{u.key()}
	default:
		h["Authorization"] = []string{"Bearer " + u.key()}
	}
	if u.organization != "" {
		h["Openai-Organization"] = []string{u.organization}
	}
	if u.openaiProject != "" {
		h["Openai-Project"] = []string{u.openaiProject}
	}
}

// checkHost checks a base URL's host. It refuses names that look like numbers, because resolvers may read them as
// addresses that no check has seen.
func checkHost(host string, allowPrivate bool) error {
	if addr, err := netip.ParseAddr(host); err == nil {
		return checkAddress(addr, allowPrivate)
	}
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	if name == "" || name != strings.ToLower(host) || len(name) > 253 {
		return errors.New("must have a plain host name, without a dot at its end")
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return errors.New("must have an ASCII host name")
		}
	}
	last := name[strings.LastIndexByte(name, '.')+1:]
	if strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x") {
		return errors.New("has a host that looks like a number; write the address in full")
	}
	if name == "metadata" || name == "metadata.google.internal" ||
		strings.HasSuffix(name, ".metadata.google.internal") {
		return errors.New("names a cloud metadata service, which is never allowed")
	}
	if (name == "localhost" || strings.HasSuffix(name, ".localhost")) && !allowPrivate {
		return errors.New("names this machine; that needs ALLOW_PRIVATE_UPSTREAMS=true")
	}
	return nil
}

// blockedNetworks are never dialled, whatever the settings: unspecified, link-local (where most cloud metadata
// services are), multicast and reserved addresses, and metadata services at other addresses.
var blockedNetworks = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("100::/64"), netip.MustParsePrefix("100:0:0:1::/64"),
	netip.MustParsePrefix("100.100.100.200/32"), netip.MustParsePrefix("168.63.129.16/32"), // metadata services
	netip.MustParsePrefix("192.0.0.0/24"), netip.MustParsePrefix("fd00:ec2::/32"),
	netip.MustParsePrefix("fd20:ce::/32"), netip.MustParsePrefix("fd00:42::42/128"),
	netip.MustParsePrefix("::/128"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
	// Other forms of IPv4 addresses, which nothing here checks: local NAT64, 6to4, Teredo and the like, and translated.
	netip.MustParsePrefix("64:ff9b:1::/48"), netip.MustParsePrefix("2002::/16"), netip.MustParsePrefix("2001::/23"),
	netip.MustParsePrefix("::ffff:0:0:0/96"), netip.MustParsePrefix("192.88.99.0/24"),
}

// privateNetworks are not public: those of one machine or site, of benchmarks, of examples, of segment routing.
var privateNetworks = []netip.Prefix{
	netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("192.0.2.0/24"),
	netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("203.0.113.0/24"),
	netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("fc00::/7"), netip.MustParsePrefix("fec0::/10"),
	netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("3fff::/20"), netip.MustParsePrefix("5f00::/16"),
}

// Prefixes of IPv4 addresses that are written as IPv6.
var (
	nat64          = netip.MustParsePrefix("64:ff9b::/96")
	ipv4Compatible = netip.MustParsePrefix("::/96") // but ::1 is the loopback address
)

// checkAddress checks an address, as written in a base URL and as dialled after a name was resolved.
func checkAddress(addr netip.Addr, allowPrivate bool) error {
	if addr.Zone() != "" {
		return errors.New("has an address with a zone, which is never allowed")
	}
	addr = addr.Unmap()
	if nat64.Contains(addr) || ipv4Compatible.Contains(addr) && !addr.IsLoopback() && !addr.IsUnspecified() {
		b := addr.As16()
		addr = netip.AddrFrom4([4]byte(b[12:]))
	}
	for _, p := range blockedNetworks {
		if p.Contains(addr) {
			return errors.New(
				"is a link-local, metadata, multicast, tunnel or unspecified address, which is never allowed")
		}
	}
	if allowPrivate {
		return nil
	}
	for _, p := range privateNetworks {
		if p.Contains(addr) {
			return errors.New("is a loopback or private address, or one for examples or benchmarks; " +
				"that needs ALLOW_PRIVATE_UPSTREAMS=true")
		}
	}
	return nil
}

var errForbiddenAddress = errors.New("upstream resolves to an address that is not allowed")

// connectTimeout limits dialling, and again the TLS handshake after it, whatever an upstream's settings say.
const connectTimeout = 10 * time.Second

// newTransport returns the transport that all calls to providers share. It follows no redirect, does not
// decompress, and does not limit the time of an answer: the watchdog does. With proxy (nil: none) all calls go
// through it; no variable of the environment redirects a key.
func newTransport(allowPrivate bool, proxy *url.URL) *http.Transport {
	dialPrivate := allowPrivate || proxy != nil // then only the proxy is dialled, which the operator chose
	dialer := &net.Dialer{
		Timeout: connectTimeout, KeepAlive: 30 * time.Second,
		// The check is of the address itself, after the name is resolved: a name that
		// resolves to another address than before gains nothing.
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			ap, err := netip.ParseAddrPort(address)
			if err != nil || checkAddress(ap.Addr(), dialPrivate) != nil {
				return errForbiddenAddress
			}
			return nil
		},
	}
	transport := &http.Transport{
		DialContext:            dialer.DialContext,
		TLSHandshakeTimeout:    connectTimeout,
		MaxIdleConns:           4096,
		MaxIdleConnsPerHost:    2048,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		ExpectContinueTimeout:  time.Second,
		ForceAttemptHTTP2:      true,
		// Many calls share an HTTP/2 connection. If a firewall drops one silently,
		// they must not all hang until TCP gives up.
		HTTP2:              &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
		DisableCompression: true, // the meter reads the bytes that the client gets
	}
	if proxy != nil {
		targets := &proxyTargets{allowPrivate: allowPrivate, resolve: net.DefaultResolver.LookupNetIP}
		transport.Proxy = func(req *http.Request) (*url.URL, error) {
			return proxy, targets.check(req.Context(), req.URL.Hostname())
		}
		transport.OnProxyConnectResponse = func(
			_ context.Context, _ *url.URL, _ *http.Request, res *http.Response,
		) error {
			if res.StatusCode != http.StatusOK {
				return &net.OpError{Op: "proxyconnect", Net: "tcp",
					Err: fmt.Errorf("UPSTREAM_PROXY answers %d to CONNECT", res.StatusCode)}
			}
			return nil
		}
	}
	return transport
}

// isDialError reports whether an error of the transport is one of connecting, directly or through
// UPSTREAM_PROXY: the provider has not received the request.
func isDialError(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && (op.Op == "dial" || op.Op == "proxyconnect" || op.Op == "socks connect") ||
		errors.Is(err, errForbiddenAddress)
}

// proxyTargets checks the hosts to which UPSTREAM_PROXY is asked to connect. The proxy resolves names itself,
// so the address that it dials cannot be checked here. What can be: the host as written, and every address that
// its name has on this machine. A name that only the proxy can resolve passes.
type proxyTargets struct {
	allowPrivate bool
	resolve      func(ctx context.Context, network, host string) ([]netip.Addr, error)

	mu      sync.Mutex
	allowed map[string]time.Time // hosts, and until when
}

const (
	maxProxyTargets      = 1024
	proxyTargetLifetime  = time.Minute
	proxyResolverTimeout = time.Second // where only the proxy reaches the DNS, lookups may hang
)

func (t *proxyTargets) check(ctx context.Context, host string) error {
	now := time.Now()
	t.mu.Lock()
	until := t.allowed[host]
	t.mu.Unlock()
	if now.Before(until) {
		return nil
	}
	if checkHost(host, t.allowPrivate) != nil {
		return errForbiddenAddress
	}
	lookup, cancel := context.WithTimeout(ctx, proxyResolverTimeout)
	defer cancel()
	found, err := t.resolve(lookup, "ip", host)
	for _, addr := range found {
		if checkAddress(addr, t.allowPrivate) != nil {
			return errForbiddenAddress
		}
	}
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.allowed) >= maxProxyTargets || t.allowed == nil {
		t.allowed = map[string]time.Time{}
	}
	t.allowed[host] = now.Add(proxyTargetLifetime)
	return nil
}

// traceConnection returns req with a trace that sets connected when there is a connection for it: from then on, the
// provider may have received the request.
func traceConnection(req *http.Request, connected *atomic.Bool) *http.Request {
	return req.WithContext(httptrace.WithClientTrace(req.Context(),
		&httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connected.Store(true) }}))
}

// send makes a request. If the upstream has a connect_ms and no connection is ready by then (name resolved,
// dialled, TLS handshake done), the error is errConnectTimeout.
//
// The limit is on the request, not on the dial, because all upstreams share one transport, and a dial belongs to
// no request: it may serve any request that waits for the host, or outlast its own request and serve the next.
// With an open connection, there is no wait.
func (u *upstream) send(transport http.RoundTripper, req *http.Request) (*http.Response, error) {
	limit := time.Duration(u.settings.ConnectMS) * time.Millisecond
	if limit == 0 {
		return transport.RoundTrip(req)
	}
	ctx, cancel := context.WithCancelCause(req.Context()) // ends with its parent: the answer is read under it
	timer := time.AfterFunc(limit, func() { cancel(errConnectTimeout) })
	defer timer.Stop()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GetConn: func(string) { timer.Reset(limit) }, // called again if the first connection was dead
		GotConn: func(httptrace.GotConnInfo) { timer.Stop() },
	})
	res, err := transport.RoundTrip(req.WithContext(ctx))
	if context.Cause(ctx) != error(errConnectTimeout) {
		return res, err
	}
	if err == nil {
		res.Body.Close()
	}
	return nil, errConnectTimeout
}
