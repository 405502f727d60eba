// Where the proxy connects to: the places that its admins name, as far as those
// are allowed, and never where a client, a provider or a name server would
// rather have it.
package main

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
)

// TestBaseURLs: which base URLs are taken with and without private ones
// allowed. (0: never, 1: where private ones are allowed, 2: always.)
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
		"https://host:22":                         always, // the port is the admin's choice
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
	for _, text := range []string{"http://169.254.169.254/latest/meta-data", "https://user:pw@h/", "https://h/?key=x", "http://[::ffff:169.254.169.254]:80"} {
		body := fmt.Sprintf(`{"name":"x","openai_api_key":"sk-0123456789","base_url":%q}`, text)
		a := p.manageAs(p.adminKey, "POST", "/manage/projects", body)
		if a.status != 400 || !strings.Contains(a.body, "base_url") || strings.Contains(a.body, "pw") {
			t.Errorf("%s: got %d %s", text, a.status, a.body)
		}
	}
}

// TestDialChecksTheAddress: the rule holds for the address that is connected
// to, after names were resolved: one that resolves otherwise by then gains
// nothing.
func TestDialChecksTheAddress(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, port, _ := strings.Cut(strings.TrimPrefix(p.provider.url, "http://"), ":")
	for url, allowPrivate := range map[string]bool{
		"http://localhost:" + port: false, // a name that resolves to a private address
		"http://127.0.0.1:" + port: false, "http://[::1]:" + port: false, "http://[::ffff:127.0.0.1]:" + port: false,
		"http://0.0.0.0:" + port: true, "http://[::]:" + port: true, "http://0:" + port: true,
		"http://169.254.169.254": true, "http://[fe80::1%25lo]:" + port: true, "http://100.100.100.200": true, "http://[::ffff:169.254.169.254]": true,
	} {
		tr := newTransport(allowPrivate)
		req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := tr.RoundTrip(req)
		if err == nil {
			res.Body.Close()
		}
		if !errors.Is(err, errForbiddenAddress) && !(url == "http://0:"+port && err != nil) { // not every resolver knows "0"
			t.Errorf("%s: got %v", url, err)
		}
		tr.CloseIdleConnections()
	}
	if tr := newTransport(true); tr.Proxy != nil {
		t.Error("the transport would send calls, and keys, through a proxy that the environment names")
	}
	// The same through the whole way of a call: the base URL was fine when it was
	// stored.
	p.newUpstream("http://localhost:" + port)
	p.in.transport.CloseIdleConnections()
	p.in.transport.DialContext = newTransport(false).DialContext
	a := p.chat()
	p.refused("forbidden when dialled", a, 502, "upstream_unreachable")
	p.tellsNothing("forbidden when dialled", a)
	if row := p.lastCall(); row.Outcome != "upstream_error" {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestPrivateUpstreamTurnedOff: what was stored while private base URLs were
// allowed is not called once they are not.
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
	p.refused("a private base URL", p.chat(), 503, "upstream_key_unreadable")
}

// TestClientChoosesNoPlace: nothing in a client's body or headers is where the
// proxy connects to.
func TestClientChoosesNoPlace(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	other := newFakeProvider(t)
	for _, name := range []string{"api_base", "base_url", "url", "endpoint", "host", "proxy", "api_key", "organization", "provider", "custom_llm_provider", "model_list"} {
		if a := p.chat(fmt.Sprintf(`%q:%q`, name, other.url)); a.status != 200 {
			t.Errorf("%s: got %d", name, a.status)
		}
	}
	for _, name := range []string{"X-Base-Url", "X-Portkey-Custom-Host", "X-Portkey-Provider", "X-Api-Base", "X-Forwarded-Host", "X-Host", "X-Original-Url", "Forwarded", "Helicone-Target-Url", "OpenAI-Base-Url", "Referer"} {
		if a := p.call("Authorization", "Bearer "+p.token, name, other.url); a.status != 200 {
			t.Errorf("%s: got %d", name, a.status)
		}
	}
	if len(other.got()) > 0 || len(p.provider.got()) != 22 {
		t.Errorf("the other place got %d calls, the provider %d", len(other.got()), len(p.provider.got()))
	}
}

// FuzzBaseURL: what is taken is where its text says, and is allowed there.
func FuzzBaseURL(f *testing.F) {
	for _, s := range []string{"https://api.openai.com/v1", "http://[::ffff:a9fe:a9fe]:80/", "https://0x7f.1", "https://a:443//", "https://u@h", "https://[64:ff9b::7f00:1]/%2e"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		u, err := parseBaseURL(text, false)
		if err != nil {
			return
		}
		if u.Scheme != "https" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Path == "" || strings.HasSuffix(u.Path, "/") || u.Host != strings.ToLower(u.Host) {
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
			t.Fatalf("%q is taken only where private places are not allowed: %v", text, err)
		}
	})
}
