// These tests hold where the proxy connects to: only to addresses that its administrators configure and that are
// allowed, whatever a client, a provider or a name server tries. They also hold keys and their health.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestSpecialAddresses: the networks of IANA's registries of special-purpose addresses, and of cloud metadata services.
// Each is dialed always, only with ALLOW_PRIVATE_UPSTREAMS, or never, from its first address to its last, and in all
// forms in which IPv6 has IPv4 addresses.
func TestSpecialAddresses(t *testing.T) {
	t.Parallel()
	const never, private, always = 0, 1, 2
	check := func(network string, addr netip.Addr, want int) {
		got := never
		if checkAddress(addr, true) == nil {
			got = private
		}
		if checkAddress(addr, false) == nil {
			got++
		}
		if got != want {
			t.Errorf("%s: %s is %d, want %d", network, addr, got, want)
		}
	}
	for network, want := range map[string]int{
		"0.0.0.0/8": never, "0.0.0.0/32": never, "10.0.0.0/8": private, "100.64.0.0/15": private,
		"127.0.0.0/8": private, "169.254.0.0/16": never, "172.16.0.0/12": private, "192.0.0.0/24": never,
		"192.0.2.0/24": private, "192.31.196.0/24": always, "192.52.193.0/24": always, "192.88.99.0/24": never,
		"192.168.0.0/16": private, "192.175.48.0/24": always, "198.18.0.0/15": private, "198.51.100.0/24": private,
		"203.0.113.0/24": private, "224.0.0.0/4": never, "240.0.0.0/4": never, "255.255.255.255/32": never,
		"100.100.100.200/32": never, "168.63.129.16/32": never, "100.127.255.0/24": private,
		// The neighbors of these networks are public.
		"1.0.0.0/8": always, "9.255.255.0/24": always, "11.0.0.0/8": always, "100.63.255.0/24": always,
		"100.128.0.0/24": always, "126.255.255.0/24": always, "128.0.0.0/24": always, "169.253.255.0/24": always,
		"169.255.0.0/24": always, "172.15.255.0/24": always, "172.32.0.0/24": always, "192.0.1.0/24": always,
		"192.0.3.0/24": always, "192.167.255.0/24": always, "192.169.0.0/24": always, "198.17.255.0/24": always,
		"198.20.0.0/24": always, "203.0.112.0/24": always, "203.0.114.0/24": always, "223.255.255.0/24": always,

		"::1/128": private, "::/128": never, "64:ff9b:1::/48": never, "100::/64": never, "100:0:0:1::/64": never,
		"2001::/23": never, "2001::/32": never, "2001:1::1/128": never, "2001:1::2/128": never, "2001:1::3/128": never,
		"2001:2::/48": never, "2001:3::/32": never, "2001:4:112::/48": never, "2001:10::/28": never,
		"2001:20::/28": never, "2001:30::/28": never, "2001:db8::/32": private, "2002::/16": never,
		"2620:4f:8000::/48": always, "3fff::/20": private, "5f00::/16": private, "fc00::/8": private,
		"fd12::/16": private, "fd00:ec2::/32": never, "fd20:ce::/32": never, "fd00:42::42/128": never,
		"fe80::/10": never, "fec0::/10": private, "ff00::/8": never, "::ffff:0:0:0/96": never,
		"2001:200::/24": always, "2001:db7::/32": always, "2001:db9::/32": always, "2003::/16": always,
		"2606:4700::/32": always, "3ffe:ffff::/32": always, "2a00::/12": always,
	} {
		p := netip.MustParsePrefix(network)
		first := p.Addr().AsSlice()
		last := slices.Clone(first)
		for i := p.Bits(); i < 8*len(last); i++ {
			last[i/8] |= 1 << (7 - i%8)
		}
		for _, b := range [][]byte{first, last} {
			addr, _ := netip.AddrFromSlice(b)
			check(network, addr, want)
			if !addr.Is4() {
				continue
			}
			for _, prefix := range []string{"::ffff:", "64:ff9b::"} {
				check(network, netip.MustParseAddr(prefix+addr.String()), want)
			}
			if b[0] != 0 { // otherwise it is a short IPv6 address
				check(network, netip.MustParseAddr("::"+addr.String()), want)
			}
			in6to4, teredo := netip.MustParseAddr("2002::1").As16(), netip.MustParseAddr("2001::").As16()
			copy(in6to4[2:], b)
			copy(teredo[12:], b)
			check(network, netip.AddrFrom16(in6to4), never)
			check(network, netip.AddrFrom16(teredo), never)
		}
	}
}

// TestBaseURLs: which base URLs are accepted always, only with ALLOW_PRIVATE_UPSTREAMS, or never.
func TestBaseURLs(t *testing.T) {
	t.Parallel()
	const never, private, always = 0, 1, 2
	for text, want := range map[string]int{
		"https://api.openai.com":                  always,
		"https://api.openai.com/v1":               always,
		"https://api.openai.com:443/v1/":          always,
		"HTTPS://API.OpenAI.com/v1":               always,
		"https://8.8.8.8":                         always,
		"https://[2001:4860:4860::8888]:8443":     always,
		"https://x.openai.azure.com/openai/v1":    always,
		"https://xn--bcher-kva.example":           always,
		"https://host:22":                         always, // the port is the administrator's choice
		"http://api.openai.com":                   private,
		"http://127.0.0.1:8000":                   private,
		"https://127.0.0.1":                       private,
		"https://127.255.255.254":                 private,
		"https://10.1.2.3":                        private,
		"https://172.16.0.1":                      private,
		"https://192.168.1.1":                     private,
		"https://100.64.0.1":                      private,
		"https://[::1]":                           private,
		"https://[fd12:3456::1]":                  private,
		"https://[::ffff:127.0.0.1]":              private,
		"https://[::ffff:10.0.0.1]":               private,
		"https://[64:ff9b::7f00:1]":               private,
		"https://localhost":                       private,
		"https://LOCALHOST:8443":                  private,
		"https://a.localhost":                     private,
		"https://127.1":                           never,
		"https://2130706433":                      never,
		"https://0x7f000001":                      never,
		"https://0x7f.1":                          never,
		"https://017700000001":                    never,
		"https://0177.0.0.1":                      never,
		"https://127.0.0.01":                      never,
		"https://1.2.3":                           never,
		"https://1.2.3.4.":                        never,
		"https://0.0.0.0":                         never,
		"https://0":                               never,
		"https://0.1.2.3":                         never,
		"https://[::]":                            never,
		"https://169.254.169.254":                 never,
		"https://169.254.1.1":                     never,
		"https://[::ffff:169.254.169.254]":        never,
		"https://[::ffff:a9fe:a9fe]":              never,
		"https://[64:ff9b::a9fe:a9fe]":            never,
		"https://[64:ff9b::169.254.169.254]":      never,
		"https://[64:ff9b:1::a9fe:a9fe]":          never,
		"https://[2002:a9fe:a9fe::1]":             never,
		"https://[2001::a9fe:a9fe]":               never,
		"https://[fd00:ec2::254]":                 never,
		"https://[fd20:ce::254]":                  never,
		"https://[fd00:42::42]":                   never,
		"https://192.0.0.192":                     never,
		"https://192.0.0.1":                       never,
		"https://[::ffff:192.0.0.192]":            never,
		"https://[64:ff9b::c000:c0]":              never,
		"https://[::169.254.169.254]":             never,
		"https://[::ffff:0:169.254.169.254]":      never,
		"https://[fe80::1]":                       never,
		"https://[fe80::1%25eth0]":                never,
		"https://[ff02::1]":                       never,
		"https://224.0.0.1":                       never,
		"https://255.255.255.255":                 never,
		"https://100.100.100.200":                 never,
		"https://168.63.129.16":                   never,
		"https://metadata":                        never,
		"https://metadata.google.internal":        never,
		"https://METADATA.google.internal":        never,
		"https://a.metadata.google.internal":      never,
		"https://metadata.google.internal.":       never,
		"https://localhost.":                      never,
		"https://api.openai.com.":                 never,
		"https://bücher.example":                  never,
		"https://127。0。0。1":                       never,
		"https://①②⑦.⓪.⓪.①":                       never,
		"https://%31%32%37.0.0.1":                 never,
		"https://a%2eb":                           never,
		"https://a b":                             never,
		"https://a..b":                            never,
		"https://user@api.openai.com":             never,
		"https://user:pw@api.openai.com":          never,
		"https://api.openai.com@169.254.169.254":  never,
		"https://api.openai.com?key=x":            never,
		"https://api.openai.com/v1?":              never,
		"https://api.openai.com/v1#x":             never,
		"https://api.openai.com#":                 never,
		"https://api.openai.com/../x":             never,
		"https://api.openai.com/v1/..":            never,
		"https://api.openai.com/%2e%2e/x":         never,
		"https://api.openai.com//x":               never,
		`https://api.openai.com\@evil`:            never,
		"https://api.openai.com/a\\b":             never,
		"https://api.openai.com/a;b":              never,
		"https://api.openai.com:0":                never,
		"https://api.openai.com:":                 never,
		"https://api.openai.com:65536":            never,
		"https://api.openai.com:99999999":         never,
		"https://api.openai.com:-1":               never,
		"https://api.openai.com:x":                never,
		"https://":                                never,
		"https:///v1":                             never,
		"https:api.openai.com":                    never,
		"//api.openai.com":                        never,
		"api.openai.com":                          never,
		"":                                        never,
		"file:///etc/passwd":                      never,
		"gopher://127.0.0.1":                      never,
		"unix:///var/run/docker.sock":             never,
		"ftp://api.openai.com":                    never,
		"javascript:alert(1)":                     never,
		"https://a\r\nHost: evil":                 never,
		"https://a\x00b":                          never,
		"https://" + strings.Repeat("a", 254):     never,
		"https://a/" + strings.Repeat("b/", 1000): never,
	} {
		_, errPrivate := parseBaseURL(text, true)
		_, errPublic := parseBaseURL(text, false)
		got := never
		if errPrivate == nil {
			got = private
		}
		if errPublic == nil {
			got = always
		}
		if got != want || errPublic == nil && errPrivate != nil {
			t.Errorf("%.60q: got %d, want %d (%v; %v)", text, got, want, errPublic, errPrivate)
		}
		if errPublic != nil && strings.Contains(errPublic.Error(), "@") {
			t.Errorf("%.60q: the error repeats user name or password: %v", text, errPublic)
		}
	}
	p := newTest(t, map[string]string{"ALLOW_PRIVATE_UPSTREAMS": "true"})
	for _, text := range []string{"http://169.254.169.254/latest/meta-data", "https://user:pw@h/", "https://h/?key=x",
		"http://[::ffff:169.254.169.254]:80"} {
		body := fmt.Sprintf(`{"name":"x","openai_api_key":"sk-0123456789","base_url":%q}`, text)
		a := p.manageAs(p.adminKey, "POST", "/manage/projects", body)
		if a.status != 400 || !strings.Contains(a.body, "base_url") || strings.Contains(a.body, "pw") {
			t.Errorf("%s: got %d %s", text, a.status, a.body)
		}
	}
}

// TestDialChecksTheAddress: the rule applies to the address that is dialled, after names are resolved. A name that
// resolves to another address by then gains nothing.
func TestDialChecksTheAddress(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, port, _ := strings.Cut(strings.TrimPrefix(p.provider.url, "http://"), ":")
	for url, allowPrivate := range map[string]bool{
		"http://localhost:" + port: false, // a name that resolves to a private address
		"http://127.0.0.1:" + port: false, "http://[::1]:" + port: false, "http://[::ffff:127.0.0.1]:" + port: false,
		"http://0.0.0.0:" + port: true, "http://[::]:" + port: true, "http://0:" + port: true,
		"http://169.254.169.254": true, "http://[fe80::1%25lo]:" + port: true, "http://100.100.100.200": true,
		"http://[::ffff:169.254.169.254]": true, "http://192.0.0.192": true, "http://[fd20:ce::254]": true,
	} {
		tr := newTransport(allowPrivate, nil)
		req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := tr.RoundTrip(req)
		if err == nil {
			res.Body.Close()
		}
		// Not every resolver knows "0".
		if !errors.Is(err, errForbiddenAddress) && !(url == "http://0:"+port && err != nil) {
			t.Errorf("%s: got %v", url, err)
		}
		tr.CloseIdleConnections()
	}
	if tr := newTransport(true, nil); tr.Proxy != nil {
		t.Error("the transport would send calls, and keys, through a proxy that the environment names")
	}
	// The same for a whole call: the base URL was allowed when it was stored.
	p.replaceBaseURL("http://localhost:" + port)
	p.instance.transport.CloseIdleConnections()
	p.instance.transport.DialContext = newTransport(false, nil).DialContext
	a := p.chat()
	p.expectRefused("forbidden when dialled", a, 502, "upstream_unreachable")
	p.checkNoNetworkDetail("forbidden when dialled", a)
	if row := p.lastCall(); row.Outcome != "upstream_error" {
		t.Errorf("the ledger has %+v", row)
	}
}

// A testForwardProxy is a proxy for CONNECT, for plain HTTP and for SOCKS5 that records the targets.
type testForwardProxy struct {
	addr    string
	mu      sync.Mutex
	targets []string
}

func newTestForwardProxy(t *testing.T) *testForwardProxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &testForwardProxy{addr: l.Addr().String()}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(t.Context(), func() { conn.Close() })
			serving.Go(func() { defer stop(); defer conn.Close(); f.serve(conn) })
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	return f
}

func (f *testForwardProxy) serve(conn net.Conn) {
	r := bufio.NewReader(conn)
	first, err := r.Peek(1)
	if err != nil {
		return
	}
	if first[0] == 5 { // SOCKS: a greeting, then a request with a name or an IPv4 address
		head := make([]byte, 2)
		_, _ = io.ReadFull(r, head)
		_, _ = r.Discard(int(head[1]))
		_, _ = conn.Write([]byte{5, 0})
		head = make([]byte, 5)
		_, _ = io.ReadFull(r, head)
		rest := make([]byte, 5) // of an IPv4 address and the port
		if head[3] == 3 {
			rest = make([]byte, int(head[4])+2)
		}
		_, _ = io.ReadFull(r, rest)
		host := string(rest[:len(rest)-2])
		if head[3] == 1 {
			host = net.IP(append([]byte{head[4]}, rest[:3]...)).String()
		}
		f.tunnel(conn, r, fmt.Sprintf("%s:%d", host, int(rest[len(rest)-2])<<8|int(rest[len(rest)-1])),
			"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
		return
	}
	req, err := http.ReadRequest(r)
	if err != nil {
		return
	}
	if req.Method == http.MethodConnect && req.Header.Get("Proxy-Authorization") == "" {
		_, _ = io.WriteString(conn, "HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
		return
	}
	if req.Method == http.MethodConnect {
		f.tunnel(conn, r, req.Host, "HTTP/1.1 200 OK\r\n\r\n")
		return
	}
	f.record(req.Host)
	req.Header.Del("Proxy-Authorization")
	req.RequestURI = ""
	res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return
	}
	defer res.Body.Close()
	res.Close = true
	_ = res.Write(conn)
}

func (f *testForwardProxy) record(target string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.targets = append(f.targets, target)
}

func (f *testForwardProxy) tunnel(conn net.Conn, r io.Reader, target, answer string) {
	f.record(target)
	to, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	_, _ = io.WriteString(conn, answer)
	go func() { _, _ = io.Copy(to, r); to.Close() }()
	_, _ = io.Copy(conn, to)
}

// TestUpstreamProxy: with UPSTREAM_PROXY every call goes through it, by each of the protocols; TLS ends at the
// provider.
func TestUpstreamProxy(t *testing.T) {
	t.Parallel()
	provider := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Header.Get("Authorization")+r.Header.Get("Proxy-Authorization"))
	}))
	defer provider.Close()
	for proxyURL, wantErr := range map[string]bool{
		"http://user:password@": false, "socks5://": false,
		"http://": true, // the proxy asks for a password
	} {
		f := newTestForwardProxy(t)
		proxy, err := parseUpstreamProxy(proxyURL + f.addr)
		if err != nil {
			t.Fatal(err)
		}
		tr := newTransport(true, proxy)
		tr.TLSClientConfig = provider.Client().Transport.(*http.Transport).TLSClientConfig
		req, err := http.NewRequestWithContext(t.Context(), "GET", provider.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer k")
		res, err := tr.RoundTrip(req)
		if (err != nil) != wantErr || err != nil && (!isDialError(err) || strings.Contains(err.Error(), "Bearer")) {
			t.Errorf("%s: %v", proxyURL, err)
		}
		if err == nil {
			body, _ := io.ReadAll(res.Body)
			res.Body.Close()
			if string(body) != "Bearer k" || !slices.Equal(f.targets, []string{provider.Listener.Addr().String()}) {
				t.Errorf("%s: the provider got %q, the proxy %q", proxyURL, body, f.targets)
			}
		}
		tr.CloseIdleConnections()
	}
	// A whole call, to a provider without TLS.
	f := newTestForwardProxy(t)
	p := newTest(t, map[string]string{"UPSTREAM_PROXY": "http://user:proxy-password@" + f.addr})
	p.secrets = append(p.secrets, "proxy-password")
	if res := p.chat(); res.status != 200 || len(f.targets) != 1 || "http://"+f.targets[0] != p.provider.url {
		t.Errorf("got %d %s, the proxy got %v", res.status, res.body, f.targets)
	}
}

// TestUpstreamProxyTargets: through a proxy, a host is refused by how it is written and by every address that it
// has here. A name that only the proxy can resolve passes.
func TestUpstreamProxyTargets(t *testing.T) {
	t.Parallel()
	names := map[string][]string{"public.example": {"93.184.216.34"}, "private.example": {"93.184.216.34", "10.0.0.1"},
		"metadata.example": {"169.254.169.254"}}
	lookups := 0
	resolve := func(_ context.Context, _, host string) (found []netip.Addr, err error) {
		lookups++
		if addr, err := netip.ParseAddr(host); err == nil {
			return []netip.Addr{addr}, nil
		}
		for _, text := range names[host] {
			found = append(found, netip.MustParseAddr(text))
		}
		if found == nil {
			err = &net.DNSError{IsNotFound: true}
		}
		return found, err
	}
	for host, allowed := range map[string][2]bool{ // without and with ALLOW_PRIVATE_UPSTREAMS
		"public.example": {true, true}, "private.example": {false, true}, "metadata.example": {false, false},
		"only-the-proxy-knows.example": {true, true}, "169.254.169.254": {false, false}, "10.0.0.1": {false, true},
		"fd20:ce::254": {false, false}, "93.184.216.34": {true, true}, "metadata.google.internal": {false, false},
		"localhost": {false, true}, "2130706433": {false, false},
	} {
		for i, allowPrivate := range []bool{false, true} {
			targets := &proxyTargets{allowPrivate: allowPrivate, resolve: resolve}
			err := targets.check(t.Context(), host)
			if (err == nil) != allowed[i] || err != nil && !errors.Is(err, errForbiddenAddress) {
				t.Errorf("%s, private allowed %v: %v", host, allowPrivate, err)
			}
		}
	}
	targets := &proxyTargets{resolve: resolve}
	lookups = 0
	for range 100 {
		if err := targets.check(t.Context(), "public.example"); err != nil {
			t.Fatal(err)
		}
	}
	if lookups != 1 {
		t.Errorf("%d lookups for 100 calls", lookups)
	}
	for i := range 3 * maxProxyTargets {
		_ = targets.check(t.Context(), fmt.Sprintf("h%d.example", i))
	}
	if n := len(targets.allowed); n > maxProxyTargets {
		t.Errorf("%d hosts are kept", n)
	}
}

// TestPrivateUpstreamTurnedOff: a private base URL that was stored while allowed is not called once it is not.
func TestPrivateUpstreamTurnedOff(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.env["ALLOW_PRIVATE_UPSTREAMS"] = "false"
	p.env["OPENAI_API_URL"] = ""
	p.start()
	p.expectRefused("a private base URL", p.chat(), 503, "upstream_key_unreadable")
}

// TestClientChoosesNoPlace: nothing in a client's body or headers decides where the proxy connects to.
func TestClientChoosesNoPlace(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	other := newFakeProvider(t)
	for _, name := range []string{"api_base", "base_url", "url", "endpoint", "host", "proxy", "api_key",
		"organization", "provider", "custom_llm_provider", "model_list"} {
		if a := p.chat(fmt.Sprintf(`%q:%q`, name, other.url)); a.status != 200 {
			t.Errorf("%s: got %d", name, a.status)
		}
	}
	for _, name := range []string{"X-Base-Url", "X-Portkey-Custom-Host", "X-Portkey-Provider", "X-Api-Base",
		"X-Forwarded-Host", "X-Host", "X-Original-Url", "Forwarded", "Helicone-Target-Url", "OpenAI-Base-Url",
		"Referer"} {
		if a := p.chatWithHeaders("Authorization", "Bearer "+p.token, name, other.url); a.status != 200 {
			t.Errorf("%s: got %d", name, a.status)
		}
	}
	if len(other.received()) > 0 || len(p.provider.received()) != 22 {
		t.Errorf("the other host got %d calls, the provider %d", len(other.received()), len(p.provider.received()))
	}
}

// FuzzBaseURL: an accepted URL points where its text says, and that address is allowed.
func FuzzBaseURL(f *testing.F) {
	for _, s := range []string{"https://api.openai.com/v1", "http://[::ffff:a9fe:a9fe]:80/", "https://0x7f.1",
		"https://a:443//", "https://u@h", "https://[64:ff9b::7f00:1]/%2e"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		u, err := parseBaseURL(text, false)
		if err != nil {
			return
		}
		if u.Scheme != "https" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Path == "" ||
			strings.HasSuffix(u.Path, "/") || u.Host != strings.ToLower(u.Host) {
			t.Fatalf("%q became %q", text, u)
		}
		if addr, err := netip.ParseAddr(u.Hostname()); err == nil && checkAddress(addr, false) != nil {
			t.Fatalf("%q names %s", text, addr)
		}
		again, err := parseBaseURL(u.String(), false)
		if err != nil || again.String() != u.String() {
			t.Fatalf("%q became %q, then %q, %v", text, u, again, err)
		}
		if _, err := parseBaseURL(text, true); err != nil {
			t.Fatalf("%q is accepted only if private addresses are not: %v", text, err)
		}
	})
}

// TestEchoedKeyMasked: a key that a provider echoes in body, headers or reason phrase reaches neither the client
// nor the log.
func TestEchoedKeyMasked(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true // each is logged as an error
	key, stars := p.provider.key, strings.Repeat("*", len(p.provider.key))
	for _, status := range []int{200, 400, 404, 429, 500, 503} {
		p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
			body := `{"error":{"message":"Bad key: ` + r.header.Get("Authorization") + `, that is ` + key + key + `"}}`
			fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nX-Request-Id: %[2]s\r\n"+
				"OpenAI-Version: a%[2]sb\r\nX-Echo: %[2]s\r\nRetry-After: %[2]s\r\nContent-Length: %d\r\n\r\n%s",
				status, key, len(body), body)
			return true
		})
		a := p.chat()
		want := `{"error":{"message":"Bad key: Bearer ` + stars + `, that is ` + stars + stars + `"}}`
		if a.status != status || a.body != want {
			t.Errorf("%d: got %d %s", status, a.status, a.body)
		}
		if a.header.Get("Openai-Version") != "" || a.header.Get("Retry-After") != "" ||
			!strings.HasPrefix(a.header.Get("X-Request-Id"), "req_") {
			t.Errorf("%d: headers %v", status, a.header)
		}
	}
	if !bytes.Contains(p.log.bytes(), []byte("contained its key")) {
		t.Error("the log does not say that a provider echoes keys")
	}
}

// TestRefusedKeyIsProxyError: a provider's 401 or 403 does not reach the client, nor does its text, which may quote
// a part of the key.
func TestRefusedKeyIsProxyError(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	part := p.provider.key[:20]
	for _, status := range []int{401, 403} {
		for _, stream := range []string{`"x":0`, `"stream":true`} {
			p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
				return c.reply(status, `{"error":{"message":"Incorrect API key provided: `+part+`"}}`,
					"X-Request-Id: "+part, "WWW-Authenticate: Bearer "+part)
			})
			a := p.chat(stream)
			if a.status != 502 || a.errorCode() != "upstream_auth_error" || a.header.Get("X-Should-Retry") != "false" {
				t.Errorf("%d: got %d %s %v", status, a.status, a.body, a.header)
			}
			if all := fmt.Sprint(a.header, a.body); strings.Contains(all, part[:12]) ||
				a.header.Get("WWW-Authenticate") != "" {
				t.Errorf("%d: the answer has a part of the key: %s", status, all)
			}
		}
	}
	if bytes.Contains(p.log.bytes(), []byte(part)) {
		t.Error("the log has a part of the key")
	}
}

// TestEchoedKeyInStream: the key is masked even if events, chunks and packets cut it in two.
func TestEchoedKeyInStream(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	key := p.provider.key
	event := `data: {"choices":[{"delta":{"content":"` + key + `"}}]}` + "\n\n"
	want := strings.ReplaceAll(event, key, strings.Repeat("*", len(key))) + ": " + key[:14] + "\n\ndata: [DONE]\n\n"
	whole := event + ": " + key[:14] + "\n\ndata: [DONE]\n\n"
	at := strings.Index(event, key)
	for _, cut := range []int{
		at, at + 1, at + 7, at + len(key)/2, at + len(key) - 1, at + len(key), len(event) + 5, -1} {
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			c.beginSSE("X-Request-Id: " + key)
			if cut < 0 { // byte by byte
				for i := range len(whole) {
					if c.chunk(whole[i:i+1]) != nil {
						return false
					}
				}
				return c.chunk("") == nil
			}
			_ = c.chunk(whole[:cut])
			_ = c.chunk(whole[cut:])
			return c.chunk("") == nil
		})
		if a := p.chat(`"stream":true`, `"stream_options":{"include_usage":true}`); a.body != want || a.err != nil {
			t.Errorf("cut at %d: got %q, %v", cut, strings.ReplaceAll(a.body, key, "KEY"), a.err)
		}
	}
	// The beginning of the key at the very end is not a key.
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(200, `{"x":"`+key[:14]) })
	if a := p.chat(); a.body != `{"x":"`+key[:14] {
		t.Errorf("got %q, %v", a.body, a.err)
	}
}

// TestBrokenProviderSaysNothing: however a provider fails, the client learns no address, no certificate, and nothing
// that the provider sent.
func TestBrokenProviderSaysNothing(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	key := p.provider.key
	writes := func(text string) func(*providerConn, recordedRequest) bool {
		return func(c *providerConn, _ recordedRequest) bool { _, _ = io.WriteString(c, text); return false }
	}
	for name, script := range map[string]func(*providerConn, recordedRequest) bool{
		"no http":          writes("SSH-2.0 " + key + "\r\n\r\n"),
		"bad status":       writes("HTTP/1.1 2x0 " + key + "\r\n\r\n"),
		"bad header":       writes("HTTP/1.1 200 OK\r\n" + key + "\r\n\r\n"),
		"bad header name":  writes("HTTP/1.1 200 OK\r\n " + key + ": x\r\n\r\n"),
		"bad length":       writes("HTTP/1.1 200 OK\r\nContent-Length: " + key + "\r\n\r\n"),
		"two lengths":      writes("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
		"unknown transfer": writes("HTTP/1.1 200 OK\r\nTransfer-Encoding: " + key + "\r\n\r\n"),
		"endless headers":  writes("HTTP/1.1 200 OK\r\nX: " + strings.Repeat(key, 4000) + "\r\n\r\n"),
		"closes":           writes(""),
		"resets":           resetScript,
	} {
		p.provider.setScript(script)
		a := p.chat()
		if a.status != 502 || a.err != nil {
			t.Errorf("%s: got %d %s %v", name, a.status, a.body, a.err)
		}
		p.checkNoNetworkDetail(name, a)
	}
}

// checkNoNetworkDetail looks for traces of the network in an error.
func (p *testProxy) checkNoNetworkDetail(what string, a testResponse) {
	p.t.Helper()
	text := strings.ToLower(fmt.Sprint(a.body, a.header))
	for _, s := range []string{"127.0.0.1", "localhost", strings.TrimPrefix(p.provider.url, "http://127.0.0.1"),
		"dial", "tcp", "x509", "certificate", "tls", "http/1.x", "eof", "connection re", "goroutine", "malformed"} {
		if strings.Contains(text, s) {
			p.t.Errorf("%s: the answer contains %q: %s", what, s, text)
		}
	}
}

// replaceBaseURL sets another base URL, with a key sealed for it, in the test's project.
func (p *testProxy) replaceBaseURL(baseURL string) (key string) {
	p.t.Helper()
	key = "sk-other-" + randomBase62(40)
	p.secrets = append(p.secrets, key)
	p.changeUpstream(p.upstream, fmt.Sprintf(`"base_url":%q,"api_key":%q`, baseURL, key))
	return key
}

// TestUnreachableProvider: a refused connection, missing TLS, and an untrusted certificate. A provider with an
// untrusted certificate must not even get the request.
func TestUnreachableProvider(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	var served atomic.Int64
	untrusted := httptest.NewUnstartedServer(http.HandlerFunc(
		func(http.ResponseWriter, *http.Request) { served.Add(1) }))
	untrusted.Config.ErrorLog = newHTTPErrorLog(newLogger(io.Discard, 0, true))
	untrusted.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	untrusted.StartTLS()
	defer untrusted.Close()
	for name, base := range map[string]string{
		"refused":          "http://" + closed.Addr().String(),
		"refused, https":   "https://" + closed.Addr().String(),
		"no TLS there":     "https" + strings.TrimPrefix(p.provider.url, "http"),
		"self-signed":      untrusted.URL,
		"an unknown name":  "https://provider.invalid",
		"no TLS requested": "http" + strings.TrimPrefix(untrusted.URL, "https"),
	} {
		p.replaceBaseURL(base)
		a := p.chat()
		if name == "no TLS requested" { // Go's server explains itself in plain HTTP: a 400
			if a.status != 400 {
				t.Errorf("%s: %d", name, a.status)
			}
			continue
		}
		if a.status != 502 || a.errorCode() != "upstream_unreachable" {
			t.Errorf("%s: got %d %s", name, a.status, a.body)
		}
		p.checkNoNetworkDetail(name, a)
	}
	if served.Load() > 0 || len(p.provider.received()) > 0 {
		t.Error("a request went out without a trusted certificate")
	}
}

// TestProviderKeyNeverShown: /manage shows four characters of a long key and none of a short one, and refuses a
// masked key.
func TestProviderKeyNeverShown(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	at := "/manage/projects/" + p.project + "/upstreams/" + p.upstream
	var v struct {
		KeyHint string `json:"key_hint"`
	}
	p.manage("GET", at, "", 200, &v)
	if v.KeyHint != p.provider.key[len(p.provider.key)-4:] {
		t.Errorf("the hint is %q", v.KeyHint)
	}
	for _, masked := range []string{"sk-…" + v.KeyHint, "****" + v.KeyHint, "sk-..." + v.KeyHint, v.KeyHint, "",
		"[secret]\n", "a key with spaces", "schlüssel-schlüssel"} {
		body, _ := json.Marshal(map[string]string{"api_key": masked})
		if a := p.manageAs(p.adminKey, "PATCH", at, string(body)); a.status != 400 ||
			strings.Contains(a.body, masked) && len(masked) > 4 {
			t.Errorf("%q: %d %s", masked, a.status, a.body)
		}
	}
	if a := p.chat(); a.status != 200 ||
		p.provider.lastRequest(t).header.Get("Authorization") != "Bearer "+p.provider.key {
		t.Errorf("the stored key is no longer used: %d %s", a.status, a.body)
	}
	const short = "Zk39xPqL07"
	p.secrets = append(p.secrets, short)
	p.manage("PATCH", at, `{"api_key":"`+short+`"}`, 200, &v)
	if v.KeyHint != "" {
		t.Errorf("the hint of a short key is %q", v.KeyHint)
	}
	for _, path := range []string{at, "/manage/projects/" + p.project, "/manage/projects",
		"/manage/projects/" + p.project + "/upstreams"} {
		a := p.manageAs(p.adminKey, "GET", path, "")
		if strings.Contains(a.body, "sealed") || strings.Contains(a.body, `"api_key"`) ||
			strings.Contains(a.body, "openai_api_key") {
			t.Errorf("%s: %s", path, a.body)
		}
	}
	for _, path := range []string{"/debug/pprof/", "/debug/vars", "/metrics", "/manage/config", "/version", "/.env",
		"/data/llm-proxy.db"} {
		if a := p.do("GET", path, ""); a.status < 400 {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
}

// TestKeyFollowsNoURL: editing a base URL cannot send the stored key elsewhere: a new origin needs the key again.
func TestKeyFollowsNoURL(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	thief := newFakeProvider(t)
	at := "/manage/projects/" + p.project + "/upstreams/" + p.upstream
	for _, body := range []string{
		`{"base_url":"` + thief.url + `"}`, `{"base_url":"` + thief.url + `","api_key":null}`,
		`{"base_url":"` + thief.url + `","api_key":""}`, `{"base_url":"` + p.provider.url + `/other"}`,
		`{"base_url":"http://user@` + strings.TrimPrefix(p.provider.url, "http://") + `"}`, `{"base_url":null}`,
		`{"provider":"anthropic"}`,
	} {
		if a := p.manageAs(p.adminKey, "PATCH", at, body); a.status != 400 {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
	if a := p.chat(); a.status != 200 || len(thief.received()) > 0 {
		t.Fatalf("got %d; the other host got %d requests", a.status, len(thief.received()))
	}
	key := p.replaceBaseURL(thief.url)
	if a := p.chat(); a.status != 200 || thief.lastRequest(t).header.Get("Authorization") != "Bearer "+key ||
		strings.Contains(thief.lastRequest(t).head, p.provider.key) {
		t.Errorf("with a new key: %d %s", a.status, a.body)
	}
}

// TestEditedDatabase: write access to the database is not enough to make the proxy use a key for another row or
// origin, or accept one in clear.
func TestEditedDatabase(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	thief := newFakeProvider(t)
	var other struct {
		ID        string
		Upstreams []struct{ ID string }
	}
	p.manage("POST", "/manage/projects", fmt.Sprintf(
		`{"name":"other","openai_api_key":%q,"base_url":%q}`, thief.key, thief.url), 201, &other)
	p.secrets = append(p.secrets, thief.key)
	from := other.Upstreams[0].ID
	for _, c := range []struct {
		name, set string
		args      []any
	}{
		{"another project's key", "sealed_key = (SELECT sealed_key FROM upstreams WHERE id = ?)", []any{from}},
		{"in clear", "sealed_key = ?", []any{[]byte("sk-clear-text-key-0123456789")}},
		{"empty", "sealed_key = ?", []any{[]byte{}}},
		{"one byte", "sealed_key = ?", []any{func(key []byte) []byte { return slices.Replace(key, 30, 31, 0) }}},
		{"without its version", "sealed_key = substr(sealed_key, 2)", nil},
		{"another version", "sealed_key = ?", []any{func(key []byte) []byte { return slices.Replace(key, 0, 1, 0) }}},
		{"cut", "sealed_key = substr(sealed_key, 1, 21)", nil},
		{"another host", "base_url = ?", []any{thief.url + "/v1"}},
		{"another scheme", "base_url = replace(base_url, 'http:', 'https:')", nil},
		{"another id", "id = ?", []any{"up_0000000000000000"}},
		{"another project", "project = (SELECT seq FROM projects WHERE id = ?)", []any{other.ID}},
	} {
		var sealed []byte
		var base string
		row := p.instance.store.writeDB.QueryRow("SELECT sealed_key, base_url FROM upstreams WHERE id = ?", p.upstream)
		if err := row.Scan(&sealed, &base); err != nil {
			t.Fatal(err)
		}
		if len(c.args) > 0 {
			if edit, ok := c.args[0].(func([]byte) []byte); ok {
				c.args[0] = edit(slices.Clone(sealed))
			}
		}
		p.editDatabase("UPDATE upstreams SET "+c.set+" WHERE id = ?", append(c.args, p.upstream)...)
		a := p.chat()
		want := "upstream_key_unreadable"
		if c.name == "another project" { // this project has none left, the other has two
			if want = "no_upstream"; a.status != 404 || a.errorCode() != want {
				t.Errorf("%s: got %d %s", c.name, a.status, a.body)
			}
		} else if a.status != 503 || a.errorCode() != want {
			t.Errorf("%s: got %d %s", c.name, a.status, a.body)
		}
		p.editDatabase("UPDATE upstreams SET id = ?, project = (SELECT seq FROM projects WHERE id = ?), "+
			"sealed_key = ?, base_url = ? WHERE id IN (?, 'up_0000000000000000')",
			p.upstream, p.project, sealed, base, p.upstream)
	}
	if len(p.provider.received())+len(thief.received()) > 0 {
		t.Error("a provider was called")
	}
	if a := p.chat(); a.status != 200 {
		t.Errorf("after the row was restored: %d %s", a.status, a.body)
	}
}

// editDatabase changes the program's database and restarts the program.
func (p *testProxy) editDatabase(query string, args ...any) {
	p.t.Helper()
	if _, err := p.instance.store.writeDB.Exec(query, args...); err != nil {
		p.t.Fatal(err)
	}
	if err := p.stop(); err != nil {
		p.t.Fatal(err)
	}
	p.start()
}

// TestWrongEncryptionKey: the program does not start with another encryption key or without one, and creates none
// if there are sealed keys.
func TestWrongEncryptionKey(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(p.env["DATA_DIR"], keyFileName)
	right, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	open := func() error {
		cfg, err := loadConfig(func(name string) string { return p.env[name] })
		if err != nil {
			return err
		}
		in, err := openInstance(t.Context(), cfg, newLogger(p.log, cfg.logLevel, false), nil)
		if err != nil {
			return err
		}
		return errors.Join(errors.New("it opened"), in.close())
	}
	for _, key := range []string{newEncryptionKey()(), "", "not a key", strings.Repeat("ab", 32)} {
		if err := os.WriteFile(file, []byte(key), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := open(); err == nil || !strings.Contains(err.Error(), "encryption key") ||
			key != "" && strings.Contains(err.Error(), key) {
			t.Errorf("with another key: %v", err)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := open(); err == nil || !strings.Contains(err.Error(), "encryption key is missing") {
		t.Errorf("without a key: %v", err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("a new key was created")
	}
	if err := os.WriteFile(file, right, 0o600); err != nil {
		t.Fatal(err)
	}
	p.start()
	if a := p.chat(); a.status != 200 {
		t.Errorf("with the right key: %d %s", a.status, a.body)
	}
}

// FuzzUnseal: only sealed text opens, and only in its own context.
func FuzzUnseal(f *testing.F) {
	sl, err := newSealer(bytes.Repeat([]byte{1, 2, 3, 4}, 8))
	if err != nil {
		f.Fatal(err)
	}
	// Sealed in advance: each fuzzing process runs this code again, and they must share their seeds.
	good, err := hex.DecodeString(
		"017df8add5aae1f62b59fbc78bb02009590ac2d8e761d315f78141de5b7efed647336707ad57d7f6216a50f567c0755f")
	if err != nil {
		f.Fatal(err)
	}
	if _, err := sl.open(good, "here"); err != nil {
		f.Fatalf("what was sealed before does not open: %v", err)
	}
	f.Add(good, "here")
	f.Add(good, "there")
	f.Add(good[1:], "here")
	f.Add([]byte("sk-provider"), "here")
	f.Add([]byte{}, "")
	f.Fuzz(func(t *testing.T, sealed []byte, context string) {
		value, err := sl.open(sealed, context)
		if err != nil {
			if value != nil || err != errUnseal {
				t.Fatalf("got %v, %v", value, err)
			}
			return
		}
		if value() != "sk-provider" || context != "here" || !bytes.Equal(sealed, good) {
			t.Fatalf("%x opened", sealed)
		}
	})
}

// TestRetryHint: all forms in which providers ask to wait are understood, and the wait is at most five minutes.
func TestRetryHint(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for headers, want := range map[string]int64{
		"":                                  0,
		"Retry-After: 7":                    7_000,
		"Retry-After: 0.25":                 250,
		"Retry-After: 0":                    0,
		"Retry-After: -5":                   0,
		"Retry-After: soon":                 0,
		"Retry-After: NaN":                  0,
		"Retry-After: Inf":                  cooldownMax,
		"Retry-After: 1000000000":           cooldownMax,
		"Retry-After: 1e300":                cooldownMax,
		"Retry-After: 99999999999999999999": cooldownMax,
		"Retry-After: 6m0s":                 cooldownMax,
		"Retry-After: 1m30s":                90_000,
		"Retry-After: Tue, 24 Nov 2026 12:00:20 GMT":                         20_000,
		"Retry-After: Tue, 24 Nov 2026 11:00:20 GMT":                         0,
		"Retry-After: Fri, 24 Nov 2028 12:00:20 GMT":                         cooldownMax,
		"Retry-After-Ms: 1500|Retry-After: 7":                                1_500,
		"Retry-After-Ms: x|Retry-After: 7":                                   7_000,
		"X-Ratelimit-Reset-Requests: 6m0s":                                   0, // the remaining count is not 0
		"X-Ratelimit-Remaining-Requests: 0|X-Ratelimit-Reset-Requests: 12ms": 12,
		"X-Ratelimit-Remaining-Tokens: 0|X-Ratelimit-Reset-Tokens: 6m0s":     cooldownMax,
		"X-Ratelimit-Remaining-Requests: 0|X-Ratelimit-Reset-Requests: 2s|" +
			"X-Ratelimit-Remaining-Tokens: 9|X-Ratelimit-Reset-Tokens: 50s": 2_000,
		"X-Ratelimit-Remaining-Requests: 0|X-Ratelimit-Reset-Requests: -1":                               0,
		"X-Ratelimit-Remaining-Requests: 0|X-Ratelimit-Reset-Requests: 45":                               45_000,
		"Anthropic-Ratelimit-Tokens-Remaining: 0|Anthropic-Ratelimit-Tokens-Reset: 2026-11-24T12:00:30Z": 30_000,
		"Anthropic-Ratelimit-Input-Tokens-Remaining: 0|Anthropic-Ratelimit-Input-Tokens-Reset: " +
			"2026-11-24T12:00:50Z": 50_000,
		"Anthropic-Ratelimit-Output-Tokens-Remaining: 0|Anthropic-Ratelimit-Output-Tokens-Reset: " +
			"2026-11-24T12:00:50Z": 50_000,
		"Retry-After: Tuesday, 24-Nov-26 12:00:40 GMT":                      40_000,
		"Retry-After: Tue Nov 24 12:00:40 2026":                             40_000,
		fmt.Sprintf("Retry-After: %d", now.Unix()+40):                       40_000,
		"Retry-After: 20, 30":                                               30_000,
		"Retry-After: soon, 30":                                             30_000,
		"Retry-After: 20 seconds":                                           20_000,
		"Retry-After: PT1M5S":                                               65_000,
		"Retry-After: 1 minute 5 sec":                                       65_000,
		"Retry-After: 2026-11-24T12:00:40.5Z":                               40_500,
		"Retry-After-Ms: -1|Retry-After: 20":                                20_000,
		"X-Ms-Retry-After-Ms: 20000":                                        20_000,
		"X-Ratelimit-Remaining-Tokens: 0|X-Ratelimit-Reset-Tokens: 1m30.5s": 90_500,
		"X-Ratelimit-Remaining-Tokens: 0.0|X-Ratelimit-Reset-Tokens: 0.25":  250,
		"X-Ratelimit-Remaining-Requests: 0|X-Ratelimit-Reset-Requests: " +
			"2026-11-24T12:00:20Z": 20_000,
		fmt.Sprintf("X-Ratelimit-Remaining-Requests: 0|X-Ratelimit-Reset-Requests: %d", now.UnixMilli()+90): 90,
		"X-Ratelimit-Remaining: 7|X-Ratelimit-Reset: 50":                                                    0,
		"Ratelimit-Remaining: 0|Ratelimit-Reset: 50":                                                        50_000,
		fmt.Sprintf("X-Ratelimit-Reset: %d", now.Unix()+40):                                                 40_000,
		fmt.Sprintf("X-Ratelimit-Reset: %d", now.UnixMilli()+40):                                            40,
	} {
		get := func(name string) string {
			for line := range strings.SplitSeq(headers, "|") {
				if v, ok := strings.CutPrefix(line, name+": "); ok {
					return v
				}
			}
			return ""
		}
		if got := retryHint(get, now); got != want {
			t.Errorf("%q: %d ms, want %d", headers, got, want)
		}
	}
}

// TestHealthThroughOutage: while a provider is down for a minute, with a call each 100 ms, it gets a few attempts. It
// gets its calls again at the first probe after that, at most 15 s later.
func TestHealthThroughOutage(t *testing.T) {
	t.Parallel()
	h := newHealthTracker().forUpstream(1, "up_1")
	attempts, back := 0, int64(0)
	const down = 60_000
	for now := int64(1); now < 3*down && back == 0; now += 100 {
		if !h.available(now) || !h.tryAcquire(now) {
			continue
		}
		if h.available(now) != (h.state == keyReady) {
			t.Fatalf("at %d a second call may use the key while the first probes it", now)
		}
		if now < down {
			attempts++
			h.recordFailure(now+1, now, false, "down")
			continue
		}
		h.recordSuccess(now+1, now, false)
		back = now
	}
	if attempts < failuresToOpen || attempts > 10 {
		t.Errorf("a provider that is down for a minute got %d attempts", attempts)
	}
	if back == 0 || back > down+breakerMaxPause+100 {
		t.Errorf("the key has its calls again after %d ms", back)
	}
	if h.recordSuccess(back+10, back+5, true); h.snapshot(back+11).state != keyReady || h.strikes != 0 {
		t.Errorf("after a good answer: %+v", h.snapshot(back+11))
	}
}

// TestHealthStates: the state of a key after each kind of failure, and for how long.
func TestHealthStates(t *testing.T) {
	t.Parallel()
	const day = 20_000 * dayMS
	h, now := newHealthTracker().forUpstream(1, "up_1"), int64(day+23*hourMS+30*60_000)
	expect := func(what string, s keyState, pause int64) {
		t.Helper()
		r := h.snapshot(now)
		if until := now + pause; r.state != s || pause > 0 && r.until != until {
			t.Errorf("%s: %v for %d ms, want %v for %d", what, r.state, r.until-now, s, pause)
		}
	}
	pass := func(ms int64) { now += ms }
	h.recordFailure(now, now, false, "x")
	h.recordFailure(now, now, false, "x")
	expect("two failures", keyReady, 0)
	h.recordSuccess(now, now, true)
	h.recordFailure(now, now, false, "x")
	expect("an answer between", keyReady, 0)
	h.recordSuccess(now, now, false) // not complete
	h.recordFailure(now, now, false, "x")
	h.recordFailure(now, now, false, "x")
	expect("three in a row", keyBreakerOpen, breakerMinPause)
	h.recordSuccess(now+1, now, true) // of a call that began earlier
	expect("an old answer", keyBreakerOpen, breakerMinPause)
	pass(breakerMinPause)
	if !h.tryAcquire(now) || h.tryAcquire(now) || h.available(now) {
		t.Error("there is not exactly one probe")
	}
	h.recordFailure(now, now, false, "x")
	expect("a probe that failed", keyBreakerOpen, 2*breakerMinPause)
	pass(2 * breakerMinPause)
	h.tryAcquire(now)
	h.endProbe()
	if !h.available(now) {
		t.Error("a probe without a result blocks the next")
	}
	h.recordRateLimit(now, now, 7_000, "x")
	expect("limited while it was open", keyCooling, 7_000)
	h.recordRateLimit(now, now-1, 20_000, "x")
	expect("a longer wait", keyCooling, 20_000)
	h.recordRateLimit(now, now, 0, "x")
	expect("a 429 that does not say how long", keyCooling, 20_000)
	h.recordExhausted(now, now+1, "x")
	expect("exhausted: until the day begins", keyExhausted, day+dayMS-now)
	h.recordFailure(now, now+1, true, "x")
	expect("lesser trouble", keyExhausted, day+dayMS-now)
	pass(hourMS)
	h.tryAcquire(now)
	h.recordExhausted(now, now, "x")
	expect("again: an hour", keyExhausted, hourMS)
	pass(1)
	h.recordRejected(now, now, "x")
	expect("refused", keyQuarantined, quarantineMax)
	pass(1)
	h.recordSuccess(now, now, false) // tried because no key was healthy
	expect("a good answer", keyReady, 0)
	pass(1)
	h.recordRateLimit(now, now, 0, "x")
	expect("limited", keyCooling, cooldownMin)
	pass(cooldownMin)
	expect("the cooldown is over", keyReady, 0)
	h.tryAcquire(now)
	pass(1)
	h.recordRateLimit(now, now, 0, "x")
	expect("limited again", keyCooling, 2*cooldownMin)
	pass(1)
	h.setUsable(now, false)
	if h.available(now + 50*365*dayMS) {
		t.Error("a key that does not open is tried")
	}
	h.setUsable(now, true)
	expect("it opens", keyReady, 0)
	pass(1)
	h.recordRejected(now, now, "x")
	h.tracker.reset(1, now)
	expect("an admin changed it", keyReady, 0)
	h.recordRejected(now+1, now-1, "x")
	expect("an attempt with the key before", keyReady, 0)
	pass(10)
	h.tracker.reset(1, now)
	h.recordRejected(now+1, now-1, "x")
	expect("an old attempt, from when the key was healthy", keyReady, 0)
}

// TestClockSetBack: after the clock was a day ahead, a key's limits count again, a pause ends when it would have
// ended, and failures and good answers have their effects.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	const start = 20_000 * dayMS
	for _, jump := range []int64{dayMS, hourMS, 5 * 60_000} {
		h, now := newHealthTracker().forUpstream(1, "up_1"), start+jump
		limits := &upstreamSettings{RequestsPerMinute: 10}
		admitted := func(calls int) (n int) {
			for range calls {
				if h.admits(now, 1, limits, true) {
					n++
				}
			}
			return n
		}
		if n := admitted(3); n != 3 {
			t.Errorf("%d of 3 calls were admitted before the jump", n)
		}
		now = start
		for minute := range 4 {
			if n := admitted(12); n != 10 {
				t.Errorf("jump %d, minute %d: %d of 12 calls were admitted", jump, minute, n)
			}
			now += 60_000
		}
		now = start + jump
		h.recordRateLimit(now, now, 2_000, "x")
		now = start
		h.available(now) // notices the jump
		if now += 2_001; !h.available(now) || !h.tryAcquire(now) {
			t.Errorf("jump %d: the key is still paused: %+v", jump, h.snapshot(now))
		}
		h.recordSuccess(now+1, now, true)
		for range failuresToOpen {
			h.recordFailure(now+2, now+1, false, "x")
		}
		if r := h.snapshot(now + 2); r.state != keyBreakerOpen || r.until != now+2+breakerMinPause {
			t.Errorf("jump %d: after three failures: %+v", jump, r)
		}
		h.recordRejected(start+jump, start+jump, "x")
		now = start
		h.available(now)
		h.recordSuccess(now+2, now+1, true)
		if r := h.snapshot(now + 2); r.state != keyReady {
			t.Errorf("jump %d: after a good answer: %+v", jump, r)
		}
	}
	h, now := newHealthTracker().forUpstream(1, "up_1"), int64(start)
	h.recordRateLimit(now, now, 2_000, "x")
	if now -= clockSlack / 2; h.available(now) { // a call that began before may come late
		t.Error("a late call ended the pause")
	}
	b := newHealthTracker().budgetFor("host")
	b.spend(start + dayMS)
	b.credit.Store(0)
	if b.spend(start); !b.spend(start + 1_000) {
		t.Error("the retry budget gets no credit after the clock was set back")
	}
}

// TestRetryBudget: after the initial credit, a fifth of the calls plus one a second may be sent again.
func TestRetryBudget(t *testing.T) {
	t.Parallel()
	b := newHealthTracker().budgetFor("host")
	spent := func(calls int, from, ms int64) (n int) {
		for i := range calls {
			b.earn()
			if b.spend(from + int64(i)*ms/int64(calls)) {
				n++
			}
		}
		return n
	}
	spent(1000, 1, 1000) // the initial credit
	if n := spent(10_000, 2_000, 10_000); n < 1990 || n > 2030 {
		t.Errorf("%d of 10,000 calls in 10 s were sent again", n)
	}
	if n := spent(100, 13_000_000, 1); n != 50+20 && n != 50+19 && n != 50+18 {
		t.Errorf("after a pause %d of 100 were sent again", n)
	}
}
