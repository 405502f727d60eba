// Provider keys never come back: not from a provider that echoes them, not
// from /manage, not from a database that somebody has edited, not from a crash.
// (After every test the harness looks for them in all that was seen or stored.)
package main

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// TestEchoedKeyMasked: whatever a provider sends of its key, in body, headers
// or reason phrase, does not reach the client, nor the log.
func TestEchoedKeyMasked(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true // each is noted as one
	key, stars := p.provider.key, strings.Repeat("*", len(p.provider.key))
	for _, status := range []int{200, 400, 404, 429, 500, 503} {
		p.provider.answer(func(c *providerConn, r recorded) bool {
			body := `{"error":{"message":"Bad key: ` + r.header.Get("Authorization") + `, that is ` + key + key + `"}}`
			fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nX-Request-Id: %s\r\nOpenAI-Version: a%sb\r\nX-Echo: %s\r\nRetry-After: %s\r\nContent-Length: %d\r\n\r\n%s",
				status, key, key, key, key, key, len(body), body)
			return true
		})
		a := p.chat()
		want := `{"error":{"message":"Bad key: Bearer ` + stars + `, that is ` + stars + stars + `"}}`
		if a.status != status || a.body != want {
			t.Errorf("%d: got %d %s", status, a.status, a.body)
		}
		if a.header.Get("Openai-Version") != "" || a.header.Get("Retry-After") != "" || !strings.HasPrefix(a.header.Get("X-Request-Id"), "req_") {
			t.Errorf("%d: headers %v", status, a.header)
		}
	}
	if !bytes.Contains(p.log.bytes(), []byte("held its key")) {
		t.Error("the log does not say that a provider echoes keys")
	}
}

// TestRefusedKeyIsOurTrouble: a provider's 401 or 403 is not the client's, and
// its text, which may quote a part of the key, stays here.
func TestRefusedKeyIsOurTrouble(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	part := p.provider.key[:20]
	for _, status := range []int{401, 403} {
		for _, stream := range []string{`"x":0`, `"stream":true`} {
			p.provider.answer(func(c *providerConn, _ recorded) bool {
				return c.reply(status, `{"error":{"message":"Incorrect API key provided: `+part+`"}}`, "X-Request-Id: "+part, "WWW-Authenticate: Bearer "+part)
			})
			a := p.chat(stream)
			if a.status != 502 || a.code() != "upstream_auth_error" || a.header.Get("X-Should-Retry") != "false" {
				t.Errorf("%d: got %d %s %v", status, a.status, a.body, a.header)
			}
			if all := fmt.Sprint(a.header, a.body); strings.Contains(all, part[:12]) || a.header.Get("WWW-Authenticate") != "" {
				t.Errorf("%d: the answer has a part of the key: %s", status, all)
			}
		}
	}
	if bytes.Contains(p.log.bytes(), []byte(part)) {
		t.Error("the log has a part of the key")
	}
}

// TestEchoedKeyInStream: also where the key is cut in two by events, chunks and
// packets.
func TestEchoedKeyInStream(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	key := p.provider.key
	event := `data: {"choices":[{"delta":{"content":"` + key + `"}}]}` + "\n\n"
	want := strings.ReplaceAll(event, key, strings.Repeat("*", len(key))) + ": " + key[:14] + "\n\ndata: [DONE]\n\n"
	whole := event + ": " + key[:14] + "\n\ndata: [DONE]\n\n"
	at := strings.Index(event, key)
	for _, cut := range []int{at, at + 1, at + 7, at + len(key)/2, at + len(key) - 1, at + len(key), len(event) + 5, -1} {
		p.provider.answer(func(c *providerConn, _ recorded) bool {
			c.sse("X-Request-Id: " + key)
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
	// What looks like the beginning of the key at the very end is no key.
	p.provider.answer(func(c *providerConn, _ recorded) bool { return c.reply(200, `{"x":"`+key[:14]) })
	if a := p.chat(); a.body != `{"x":"`+key[:14] {
		t.Errorf("got %q, %v", a.body, a.err)
	}
}

// TestBrokenProviderSaysNothing: however a provider fails, the client learns no
// address, no certificate, and nothing of what the provider sent.
func TestBrokenProviderSaysNothing(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	key := p.provider.key
	for name, script := range map[string]func(c *providerConn, r recorded) bool{
		"no http":    func(c *providerConn, _ recorded) bool { fmt.Fprintf(c, "SSH-2.0 %s\r\n\r\n", key); return false },
		"bad status": func(c *providerConn, _ recorded) bool { fmt.Fprintf(c, "HTTP/1.1 2x0 %s\r\n\r\n", key); return false },
		"bad header": func(c *providerConn, _ recorded) bool {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\n%s\r\n\r\n", key)
			return false
		},
		"bad header name": func(c *providerConn, _ recorded) bool {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\n %s: x\r\n\r\n", key)
			return false
		},
		"bad length": func(c *providerConn, _ recorded) bool {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n", key)
			return false
		},
		"two lengths": func(c *providerConn, _ recorded) bool {
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab")
			return false
		},
		"unknown transfer": func(c *providerConn, _ recorded) bool {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\n\r\n", key)
			return false
		},
		"endless headers": func(c *providerConn, _ recorded) bool {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nX: %s\r\n\r\n", strings.Repeat(key, 4000))
			return false
		},
		"closes": func(*providerConn, recorded) bool { return false },
		"resets": func(c *providerConn, _ recorded) bool { return c.reset() },
	} {
		p.provider.answer(script)
		a := p.chat()
		if a.status != 502 || a.err != nil {
			t.Errorf("%s: got %d %s %v", name, a.status, a.body, a.err)
		}
		p.tellsNothing(name, a)
	}
}

// tellsNothing looks for traces of the network in an error.
func (p *testProxy) tellsNothing(what string, a answer) {
	p.t.Helper()
	text := strings.ToLower(fmt.Sprint(a.body, a.header))
	for _, s := range []string{"127.0.0.1", "localhost", strings.TrimPrefix(p.provider.url, "http://127.0.0.1"), "dial", "tcp", "x509", "certificate", "tls", "http/1.x", "eof", "connection re", "goroutine", "malformed"} {
		if strings.Contains(text, s) {
			p.t.Errorf("%s: the answer tells %q: %s", what, s, text)
		}
	}
}

// newUpstream makes the test's project use another base URL, with a key of its own.
func (p *testProxy) newUpstream(baseURL string) (key string) {
	p.t.Helper()
	key = "sk-other-" + randomBase62(40)
	p.secrets = append(p.secrets, key)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, fmt.Sprintf(`{"base_url":%q,"api_key":%q}`, baseURL, key), 200, nil)
	return key
}

// TestUnreachableProvider: refused, no TLS where it should be, a certificate
// that nobody trusts. The last must not even get the request.
func TestUnreachableProvider(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	var served atomic.Int64
	untrusted := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served.Add(1) }))
	untrusted.Config.ErrorLog = quietLogger(newLogger(io.Discard, 0, true))
	untrusted.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	untrusted.StartTLS()
	defer untrusted.Close()
	for name, base := range map[string]string{
		"refused":           "http://" + closed.Addr().String(),
		"refused, https":    "https://" + closed.Addr().String(),
		"no TLS there":      "https" + strings.TrimPrefix(p.provider.url, "http"),
		"self-signed":       untrusted.URL,
		"a name not there":  "https://provider.invalid",
		"TLS not asked for": "http" + strings.TrimPrefix(untrusted.URL, "https"),
	} {
		p.newUpstream(base)
		a := p.chat()
		if name == "TLS not asked for" { // Go's server explains itself in plain HTTP: a 400
			if a.status != 400 {
				t.Errorf("%s: %d", name, a.status)
			}
			continue
		}
		if a.status != 502 || a.code() != "upstream_unreachable" {
			t.Errorf("%s: got %d %s", name, a.status, a.body)
		}
		p.tellsNothing(name, a)
	}
	if served.Load() > 0 || len(p.provider.got()) > 0 {
		t.Error("a request went out without a trusted certificate")
	}
}

// TestProviderKeyNeverShown: /manage tells four characters of a long key and
// nothing of a short one, and takes no masked one.
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
	for _, masked := range []string{"sk-…" + v.KeyHint, "****" + v.KeyHint, "sk-..." + v.KeyHint, v.KeyHint, "", "[secret]\n", "a key with spaces", "schlüssel-schlüssel"} {
		body, _ := json.Marshal(map[string]string{"api_key": masked})
		if a := p.manageAs(p.adminKey, "PATCH", at, string(body)); a.status != 400 || strings.Contains(a.body, masked) && len(masked) > 4 {
			t.Errorf("%q: %d %s", masked, a.status, a.body)
		}
	}
	if a := p.chat(); a.status != 200 || p.provider.last(t).header.Get("Authorization") != "Bearer "+p.provider.key {
		t.Errorf("the stored key is not in use any more: %d %s", a.status, a.body)
	}
	const short = "Zk39xPqL07"
	p.secrets = append(p.secrets, short)
	p.manage("PATCH", at, `{"api_key":"`+short+`"}`, 200, &v)
	if v.KeyHint != "" {
		t.Errorf("the hint of a short key is %q", v.KeyHint)
	}
	for _, path := range []string{at, "/manage/projects/" + p.project, "/manage/projects", "/manage/projects/" + p.project + "/upstreams"} {
		a := p.manageAs(p.adminKey, "GET", path, "")
		if strings.Contains(a.body, "sealed") || strings.Contains(a.body, `"api_key"`) || strings.Contains(a.body, "openai_api_key") {
			t.Errorf("%s: %s", path, a.body)
		}
	}
	for _, path := range []string{"/debug/pprof/", "/debug/vars", "/metrics", "/manage/config", "/version", "/.env", "/data/llm-proxy.db"} {
		if a := p.do("GET", path, ""); a.status < 400 {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
}

// TestKeyFollowsNoURL: who may edit a base URL cannot have the stored key sent
// elsewhere: the new place needs the key anew.
func TestKeyFollowsNoURL(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	thief := newFakeProvider(t)
	at := "/manage/projects/" + p.project + "/upstreams/" + p.upstream
	for _, body := range []string{
		`{"base_url":"` + thief.url + `"}`, `{"base_url":"` + thief.url + `","api_key":null}`, `{"base_url":"` + thief.url + `","api_key":""}`,
		`{"base_url":"` + p.provider.url + `/other"}`, `{"base_url":"http://user@` + strings.TrimPrefix(p.provider.url, "http://") + `"}`, `{"base_url":null}`,
		`{"provider":"anthropic"}`,
	} {
		if a := p.manageAs(p.adminKey, "PATCH", at, body); a.status != 400 {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
	if a := p.chat(); a.status != 200 || len(thief.got()) > 0 {
		t.Fatalf("got %d; the other place got %d requests", a.status, len(thief.got()))
	}
	key := p.newUpstream(thief.url)
	if a := p.chat(); a.status != 200 || thief.last(t).header.Get("Authorization") != "Bearer "+key || strings.Contains(thief.last(t).head, p.provider.key) {
		t.Errorf("with a new key: %d %s", a.status, a.body)
	}
}

// TestEditedDatabase: whoever can write to the database cannot make the proxy
// use a key for another row or place, nor take one in clear.
func TestEditedDatabase(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	thief := newFakeProvider(t)
	var other struct {
		ID        string
		Upstreams []struct{ ID string }
	}
	p.manage("POST", "/manage/projects", fmt.Sprintf(`{"name":"other","openai_api_key":%q,"base_url":%q}`, thief.key, thief.url), 201, &other)
	p.secrets = append(p.secrets, thief.key)
	from := other.Upstreams[0].ID
	for _, c := range []struct {
		name, set string
		args      []any
	}{
		{"another project's key", "sealed_key = (SELECT sealed_key FROM upstreams WHERE id = ?)", []any{from}},
		{"in clear", "sealed_key = ?", []any{[]byte("sk-clear-text-key-0123456789")}},
		{"empty", "sealed_key = ?", []any{[]byte{}}},
		{"one byte", "sealed_key = CAST(substr(sealed_key, 1, 30) || x'00' || substr(sealed_key, 32) AS BLOB)", nil},
		{"without its version", "sealed_key = substr(sealed_key, 2)", nil},
		{"another version", "sealed_key = CAST(x'00' || substr(sealed_key, 2) AS BLOB)", nil},
		{"cut", "sealed_key = substr(sealed_key, 1, 21)", nil},
		{"another host", "base_url = ?", []any{thief.url + "/v1"}},
		{"another scheme", "base_url = replace(base_url, 'http:', 'https:')", nil},
		{"another id", "id = ?", []any{"up_0000000000000000"}},
		{"another project", "project = (SELECT seq FROM projects WHERE id = ?)", []any{other.ID}},
	} {
		var sealed []byte
		var base string
		row := p.in.store.write.QueryRow("SELECT sealed_key, base_url FROM upstreams WHERE id = ?", p.upstream)
		if err := row.Scan(&sealed, &base); err != nil {
			t.Fatal(err)
		}
		p.edit("UPDATE upstreams SET "+c.set+" WHERE id = ?", append(c.args, p.upstream)...)
		a := p.chat()
		want := "upstream_key_unreadable"
		if c.name == "another project" { // this one has none left, and the other two
			if want = "no_upstream"; a.status != 404 || a.code() != want {
				t.Errorf("%s: got %d %s", c.name, a.status, a.body)
			}
		} else if a.status != 503 || a.code() != want {
			t.Errorf("%s: got %d %s", c.name, a.status, a.body)
		}
		p.edit("UPDATE upstreams SET id = ?, project = (SELECT seq FROM projects WHERE id = ?), sealed_key = ?, base_url = ? WHERE id IN (?, 'up_0000000000000000')",
			p.upstream, p.project, sealed, base, p.upstream)
	}
	if len(p.provider.got())+len(thief.got()) > 0 {
		t.Error("a provider was called")
	}
	if a := p.chat(); a.status != 200 {
		t.Errorf("put right again: %d %s", a.status, a.body)
	}
}

// edit changes the database behind the program's back, and starts it anew.
func (p *testProxy) edit(query string, args ...any) {
	p.t.Helper()
	if _, err := p.in.store.write.Exec(query, args...); err != nil {
		p.t.Fatal(err)
	}
	if err := p.stop(); err != nil {
		p.t.Fatal(err)
	}
	p.start()
}

// TestWrongEncryptionKey: the program does not start with another key, or with
// none, and makes none where there are sealed keys.
func TestWrongEncryptionKey(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(p.env["DATA_DIR"], keyName)
	right, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	open := func() error {
		cfg, err := loadConfig(func(name string) string { return p.env[name] })
		if err != nil {
			return err
		}
		in, err := openInstance(t.Context(), cfg, newLogger(p.log, cfg.logLevel, false))
		if err != nil {
			return err
		}
		return errors.Join(errors.New("it opened"), in.close())
	}
	for _, key := range []string{newEncryptionKey()(), "", "not a key", strings.Repeat("ab", 32)} {
		if err := os.WriteFile(file, []byte(key), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := open(); err == nil || !strings.Contains(err.Error(), "encryption key") || key != "" && strings.Contains(err.Error(), key) {
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
		t.Error("a new key was made")
	}
	if err := os.WriteFile(file, right, 0o600); err != nil {
		t.Fatal(err)
	}
	p.start()
	if a := p.chat(); a.status != 200 {
		t.Errorf("with the right key: %d %s", a.status, a.body)
	}
}

// FuzzUnseal: only what seal made opens, and only in its own context.
func FuzzUnseal(f *testing.F) {
	sl, err := newSealer(bytes.Repeat([]byte{1, 2, 3, 4}, 8))
	if err != nil {
		f.Fatal(err)
	}
	// Sealed once, for good: each fuzzing process runs this anew, and must know
	// the others' seed.
	good, err := hex.DecodeString("017df8add5aae1f62b59fbc78bb02009590ac2d8e761d315f78141de5b7efed647336707ad57d7f6216a50f567c0755f")
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
