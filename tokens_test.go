// These tests are about authentication over HTTP: tokens and management keys that are missing, wrong, expired,
// revoked, sent twice or in the wrong place. Whatever is wrong with a token, the client gets the same answer, and
// the provider gets no request.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestBadTokensAlike: unknown, revoked, expired, malformed and missing tokens get the same answer, byte for byte.
func TestBadTokensAlike(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	expiredID, expired := p.newToken(`"name":"expired","duration_hours":1`)
	p.execSQLBound(fmt.Sprintf(`UPDATE tokens SET expires_at = %d WHERE id = '%s'`,
		time.Now().UnixMilli()-1, expiredID))
	revokedID, revoked := p.newToken(`"name":"revoked"`)
	p.manage("DELETE", "/manage/tokens/"+revokedID, "", 200, nil)
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("user:"+p.token))
	var first string
	for _, c := range []struct {
		name    string
		headers []string
	}{
		{"no header", nil},
		{"empty header", []string{"Authorization", ""}},
		{"scheme only", []string{"Authorization", "Bearer"}},
		{"scheme and blank", []string{"Authorization", "Bearer "}},
		{"basic", []string{"Authorization", basic}},
		{"no scheme", []string{"Authorization", p.token}},
		{"tab", []string{"Authorization", "Bearer\t" + p.token}},
		{"no-break space", []string{"Authorization", "Bearer \u00a0" + p.token}},
		{"quoted", []string{"Authorization", `Bearer "` + p.token + `"`}},
		{"text after it", []string{"Authorization", "Bearer " + p.token + " x"}},
		{"two in one", []string{"Authorization", "Bearer " + p.token + ", Bearer " + p.token}},
		{"long", []string{"Authorization", "Bearer " + strings.Repeat("a", 30<<10)}},
		{"unknown", []string{"Authorization", "Bearer " + p.unknownCredential(tokenPrefix)}},
		{"expired", []string{"Authorization", "Bearer " + expired}},
		{"revoked", []string{"Authorization", "Bearer " + revoked}},
		{"wrong checksum", []string{"Authorization", "Bearer " + p.token[:len(p.token)-1] + "!"}},
		{"empty x-api-key", []string{"X-Api-Key", ""}},
		{"bearer in x-api-key", []string{"X-Api-Key", "Bearer " + p.token}},
		{"underscores", []string{"X_Api_Key", p.token, "Authorization_", "Bearer " + p.token}},
	} {
		got := p.chatWithHeaders(c.headers...)
		p.expectRefused(c.name, got, 401, "invalid_api_key")
		if first == "" {
			first = got.body
		}
		if got.body != first {
			t.Errorf("%s: the answer differs: %s", c.name, got.body)
		}
	}
	if a := p.chatWithHeaders("Authorization", "Bearer "+strings.Repeat("a", 1<<20)); a.err == nil && a.status != 431 {
		t.Errorf("1 MiB: got %d", a.status)
	}
	p.manage("PATCH", "/manage/projects/"+p.project, `{"is_active":false}`, 200, nil)
	p.expectRefused("valid, of an inactive project", p.chat(), 403, "project_inactive")
	unknown := p.chatAs(p.unknownCredential(tokenPrefix))
	p.expectRefused("unknown, with the project inactive", unknown, 401, "invalid_api_key")
}

// TestEveryCharacterCounts: a token with any one character changed is refused by its checksum, without a look-up
// in the database.
func TestEveryCharacterCounts(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for i := range len(p.token) {
		other := byte('0')
		if p.token[i] == other {
			other = '1'
		}
		changed := p.token[:i] + string(other) + p.token[i+1:]
		if _, ok := hashCredential(tokenPrefix, changed); ok {
			t.Errorf("with character %d changed, the token is still well-formed", i)
		}
		if i%7 == 0 {
			p.expectRefused("changed", p.chatAs(changed), 401, "invalid_api_key")
		}
	}
	if n := len(p.instance.registry.unknownHashes); n > 0 {
		t.Errorf("%d malformed tokens were looked up", n)
	}
}

// TestTokenSpelling: what is accepted besides "Bearer <token>".
func TestTokenSpelling(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, headers := range [][]string{
		{"Authorization", "bearer " + p.token}, {"Authorization", "BEARER " + p.token},
		{"Authorization", "Bearer  " + p.token + " "},
		{"X-Api-Key", p.token}, {"Api-Key", p.token},
		{"Authorization", "Bearer " + p.token, "X-Api-Key", p.token, "Api-Key", p.token},
	} {
		if a := p.chatWithHeaders(headers...); a.status != 200 {
			t.Errorf("%d headers, scheme %.8q: got %d", len(headers)/2, headers[1], a.status)
		}
	}
	for _, line := range []string{"Authorization: Bearer \x00", "Authorization: Bearer \x01",
		"Authorization : Bearer x", "Authorization\r\n: x"} {
		got := p.sendRaw("GET /v1/models HTTP/1.1\r\nHost: x\r\n" + line + "\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 400 ") {
			t.Errorf("%q: got %q", line, got)
		}
	}
}

// TestNoMixedIdentity: two different credentials are an error, never a choice.
func TestNoMixedIdentity(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, other := p.newToken(`"name":"other"`)
	a, b := "Bearer "+p.token, "Bearer "+other
	for _, c := range []struct {
		name    string
		headers []string
	}{
		{"two Authorization", []string{"Authorization", a, "Authorization", b}},
		{"the same twice", []string{"Authorization", a, "Authorization", a}},
		{"one of them empty", []string{"Authorization", a, "Authorization", ""}},
		{"x-api-key", []string{"Authorization", a, "X-Api-Key", other}},
		{"api-key", []string{"Authorization", a, "Api-Key", other}},
		{"x-goog-api-key", []string{"Authorization", a, "X-Goog-Api-Key", other}},
		{"two x-goog-api-key", []string{"X-Goog-Api-Key", p.token, "X-Goog-Api-Key", other}},
		{"both others", []string{"X-Api-Key", p.token, "Api-Key", other}},
		{"two x-api-key", []string{"X-Api-Key", p.token, "X-Api-Key", other}},
		{"a wrong second one", []string{"Authorization", a, "X-Api-Key", "sk-other"}},
	} {
		p.expectRefused(c.name, p.chatWithHeaders(c.headers...), 400, "ambiguous_credentials")
	}
	p.expectRefused("in one line", p.chatWithHeaders("Authorization", a+", "+b), 401, "invalid_api_key")
	res := p.do("POST", "/v1/chat/completions?api_key="+other, chatBody(),
		"Authorization", a, "Content-Type", "application/json")
	p.expectRefused("in the query", res, 400, "invalid_request")
	const gemini = "/v1beta/models/gemini-2.5-flash:generateContent?"
	for query, headers := range map[string][]string{
		"key=" + other:                         {"Authorization", a},
		"alt=json&k%65y=" + other:              {"X-Goog-Api-Key", p.token},
		"key=" + p.token + "&key=" + other:     nil,
		"key=" + other + "&key=" + p.token:     {"X-Goog-Api-Key", p.token},
		"key=" + p.token + "&k%65y=" + p.token: nil,
	} {
		res := p.do("POST", gemini+query, "{}", append(headers, "Content-Type", "application/json")...)
		if res.status != 400 || !strings.Contains(res.body, "AMBIGUOUS_CREDENTIALS") {
			t.Errorf("%s: got %d %s", query, res.status, res.body)
		}
	}
	for _, row := range p.ledger() {
		if row.TokenID != p.tokenID {
			t.Errorf("recorded for the other token: %+v", row)
		}
	}
}

// TestGeminiKeyInQuery: Gemini's API takes the token in its query. It is not forwarded, no log shows it, and the rest
// of the query goes up as it is.
func TestGeminiKeyInQuery(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "debug"})
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"gemini","provider":"google","base_url":"`+
		p.provider.url+`","api_key":"`+p.provider.key+`"}`, 201, nil)
	send := func(query string) testResponse {
		return p.do("POST", "/v1beta/models/gemini-2.5-flash:countTokens"+query, `{"contents":[]}`,
			"Content-Type", "application/json")
	}
	for query, want := range map[string]string{
		"?key=" + p.token:                                 "",
		"?k%65y=" + p.token + "&alt=json":                 "?alt=json",
		"?%61lt=json&key=" + p.token:                      "?%61lt=json",
		"?alt=json&&key=" + p.token + "&":                 "?alt=json&&",
		"?key=" + strings.Replace(p.token, "s", "%73", 1): "",
	} {
		if res := send(query); res.status != 200 {
			t.Errorf("%s: got %d %s", query, res.status, res.body)
		} else if got := p.provider.lastRequest(t).target; got != "/v1beta/models/gemini-2.5-flash:countTokens"+want {
			t.Errorf("%s: the provider got %s", query, got)
		}
	}
	for _, query := range []string{"?key=", "?key", "?key=%zz", "?Key=" + p.token, "?key=" + p.token + "x",
		"?alt=json;key=" + p.token} {
		if res := send(query); res.status != 401 || !strings.Contains(res.body, "UNAUTHENTICATED") {
			t.Errorf("%s: got %d %s", query, res.status, res.body)
		}
	}
	if logs := fmt.Sprint(p.logLines()); strings.Contains(logs, p.token) || strings.Contains(logs, "key=") {
		t.Errorf("the log has a query: %s", logs)
	}

	// A link with a token opens in a browser. What a provider sends runs no script there.
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(200, "<script>fetch('/admin/')</script>", "Content-Type: text/html",
			"Content-Security-Policy: default-src *")
	})
	const page = "/v1beta/models/gemini-2.5-flash"
	for target, headers := range map[string][]string{page + "?key=" + p.token: nil,
		page: {"X-Goog-Api-Key", p.token}} {
		csp := p.do("GET", target, "", headers...).header.Values("Content-Security-Policy")
		if sandboxed := len(csp) == 1 && strings.Contains(csp[0], "sandbox"); sandboxed != (headers == nil) {
			t.Errorf("%v: the Content-Security-Policy is %q", headers, csp)
		}
	}
}

// TestTokenElsewhere: a token is accepted in the headers for it and nowhere else, and no log shows one that was
// sent in another place.
func TestTokenElsewhere(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	body := strings.Replace(chatBody(), "{", `{"api_key":"`+p.token+`","authorization":"Bearer `+p.token+`",`, 1)
	for _, c := range []struct {
		path, body string
		headers    []string
	}{
		{"/v1/chat/completions?api_key=" + p.token, chatBody(), nil},
		{"/v1/chat/completions?key=" + p.token + "&access_token=" + p.token, chatBody(), nil},
		{"/v1/" + p.token + "/chat/completions", chatBody(), nil},
		{"/v1/chat/completions", body, nil},
		{"/v1/chat/completions", chatBody(), []string{"Cookie", "token=" + p.token + "; session=" + p.token}},
		{"/v1/chat/completions", chatBody(),
			[]string{"Sec-WebSocket-Protocol", "realtime, openai-insecure-api-key." + p.token}},
		{"/v1/chat/completions", chatBody(),
			[]string{"Proxy-Authorization", "Bearer " + p.token, "X-Auth-Token", p.token, "Token", p.token}},
	} {
		res := p.do("POST", c.path, c.body, append(c.headers, "Content-Type", "application/json")...)
		p.expectRefused(c.path[:16], res, 401, "invalid_api_key")
	}
	if a := p.do("GET", "/"+p.token, ""); a.status != 404 || a.errorCode() != "unknown_url" {
		t.Errorf("a token as a URL: %d %s", a.status, a.body)
	}
}

// TestRevokedForGood: under load, while administrators change the token, every call that starts after the
// revocation was answered is refused: no stale copy of the token is ever used again.
func TestRevokedForGood(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	var revoked atomic.Bool
	var accepted, acceptedAfter atomic.Int64
	ctx, stop := context.WithCancel(t.Context())
	var load sync.WaitGroup
	for i := range 4 {
		load.Go(func() {
			for ctx.Err() == nil {
				after := revoked.Load()
				switch a := p.chat(); {
				case a.status == 200 && after:
					acceptedAfter.Add(1)
				case a.status == 200:
					accepted.Add(1)
				}
				if i == 0 { // makes the registry load the token again
					p.instance.registry.evict(time.Now().Add(time.Hour).UnixMilli(), true)
					p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+p.tokenID, `{"name":"n"}`)
				}
			}
		})
	}
	waitFor(t, "calls", func() bool { return accepted.Load() > 20 })
	p.manage("DELETE", "/manage/tokens/"+p.tokenID, "", 200, nil)
	revoked.Store(true)
	for range 50 {
		if a := p.chat(); a.status != 401 {
			t.Fatalf("after revocation: %d %s", a.status, a.body)
		}
	}
	stop()
	load.Wait()
	if n := acceptedAfter.Load(); n > 0 {
		t.Errorf("%d calls were accepted after the revocation", n)
	}
}

// TestExpiry: a token is valid until its expires_at, exclusive.
func TestExpiry(t *testing.T) {
	t.Parallel()
	live, st := &liveToken{project: &liveProject{}}, &tokenState{expiresAt: 1000}
	live.project.state.Store(&projectState{})
	for now, want := range map[int64]string{999: "", 1000: "expired", 1001: "expired"} {
		if got := live.validity(st, now); got != want {
			t.Errorf("at %d: %q, want %q", now, got, want)
		}
	}
	p := newTest(t, nil)
	var v struct {
		ID        string
		ExpiresAt string `json:"expires_at"`
	}
	before := time.Now()
	p.manage("POST", "/manage/tokens", `{"project_id":"`+p.project+`","name":"day","duration_hours":24}`, 201, &v)
	at, err := time.Parse(time.RFC3339, v.ExpiresAt)
	if err != nil || !strings.HasSuffix(v.ExpiresAt, "Z") ||
		at.Before(before.Add(24*time.Hour-time.Second)) || at.After(time.Now().Add(24*time.Hour)) {
		t.Errorf("24 hours from %v is %s", before, v.ExpiresAt)
	}
}

// TestTokenShownOnce: no later answer shows a token; the harness looks for them in every answer.
func TestTokenShownOnce(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, c := range []struct{ method, path, body string }{
		{"GET", "/manage/tokens/" + p.tokenID, ""},
		{"GET", "/manage/tokens", ""},
		{"PATCH", "/manage/tokens/" + p.tokenID, `{"name":"x"}`},
		{"GET", "/manage/keys", ""},
		{"GET", "/manage/projects", ""},
	} {
		a := p.manageAs(p.adminKey, c.method, c.path, c.body)
		if a.status != 200 || strings.Contains(a.body, `"token"`) ||
			strings.Contains(a.body, "hash") || strings.Contains(a.body, `"key"`) {
			t.Errorf("%s %s: %d %s", c.method, c.path, a.status, a.body)
		}
	}
	var m map[string]any
	p.manage("GET", "/manage/tokens/"+p.tokenID, "", 200, &m)
	if !strings.Contains(p.token, strings.TrimPrefix(m["id"].(string), "tok_")) {
		t.Errorf("the id %v is not part of its token", m["id"])
	}
}

// TestPassTheHash: what the database stores of a token is not accepted as a credential.
func TestPassTheHash(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	hash := sha256.Sum256([]byte(p.token))
	for _, s := range []string{
		hex.EncodeToString(hash[:]), base64.StdEncoding.EncodeToString(hash[:]),
		base64.RawURLEncoding.EncodeToString(hash[:]), string(hash[:20]), tokenPrefix + hex.EncodeToString(hash[:]),
		p.tokenID, strings.TrimPrefix(p.tokenID, "tok_"), p.project, p.upstream,
	} {
		s = strings.Map(func(r rune) rune { return max(r, ' ') }, strings.ReplaceAll(s, "\x7f", " "))
		p.expectRefused("in place of the token", p.chatAs(s), 401, "invalid_api_key")
		if a := p.manageAs(s, "GET", "/manage/projects", ""); a.status != 401 {
			t.Errorf("on /manage: %d", a.status)
		}
	}
}

// TestCredentialsAreSeparate: a token is accepted on /v1 only, a management key on /manage only.
func TestCredentialsAreSeparate(t *testing.T) {
	t.Parallel()
	const fromEnvironment = "mgmt-Qd81kz0PvYw7Xn3Lr6Ts2Hb9" + "JcMf5"
	p := newTest(t, map[string]string{"MANAGEMENT_TOKEN": fromEnvironment})
	p.secrets = append(p.secrets, fromEnvironment)
	for _, key := range []string{p.adminKey, fromEnvironment} {
		p.expectRefused("management key on /v1", p.chatAs(key), 401, "invalid_api_key")
		if a := p.manageAs(key, "GET", "/manage/projects", ""); a.status != 200 {
			t.Errorf("on /manage: %d %s", a.status, a.body)
		}
	}
	for _, c := range [][]string{
		{"Authorization", "Bearer " + p.token},
		{"Authorization", "Bearer " + p.unknownCredential(manageKeyPrefix)},
		{"X-Api-Key", p.adminKey},
		{"Cookie", "session=" + p.adminKey},
		{"Authorization", p.adminKey},
		{"Authorization", "Bearer " + p.adminKey, "Authorization", "Bearer x"},
		nil,
	} {
		a := p.do("GET", "/manage/projects", "", c...)
		if a.status != 401 || a.errorCode() != "invalid_management_key" ||
			a.header.Get("WWW-Authenticate") != "Bearer" {
			t.Errorf("%d headers on /manage: %d %s", len(c)/2, a.status, a.body)
		}
	}
}

// FuzzHashCredential: an accepted text has the form and the checksum of a token, and no text that differs from it
// by one byte is accepted.
func FuzzHashCredential(f *testing.F) {
	token, public := mintCredential(tokenPrefix, "")
	f.Add(token(), 9, byte('x'))
	f.Add(token()[:40], 0, byte(0))
	f.Add(tokenPrefix+public, 3, byte('_'))
	f.Add(strings.Repeat("é", 33), 70, byte(0xff))
	form := regexp.MustCompile(`\Ask-llmp_[0-9A-Za-z]{8}_[0-9A-Za-z]{49}\z`)
	f.Fuzz(func(t *testing.T, text string, at int, with byte) {
		hash, ok := hashCredential(tokenPrefix, text)
		if !ok {
			return
		}
		if !form.MatchString(text) || hash != sha256.Sum256([]byte(text)) ||
			checksum([]byte(text[:len(text)-6])) != [6]byte([]byte(text[len(text)-6:])) {
			t.Fatalf("%q was accepted", text)
		}
		if _, ok := hashCredential(manageKeyPrefix, text); ok {
			t.Fatalf("%q is a management key too", text)
		}
		if at < 0 || at >= len(text) || text[at] == with {
			return
		}
		other := text[:at] + string([]byte{with}) + text[at+1:]
		if _, ok := hashCredential(tokenPrefix, other); ok {
			t.Fatalf("%q and %q are both accepted", text, other)
		}
	})
}

// FuzzParseRequestID: every accepted id is formatted as it was written.
func FuzzParseRequestID(f *testing.F) {
	for _, s := range []string{formatRequestID(1), formatRequestID(1<<63 - 1), "req_", "req_0000000000000",
		"req_z000000000000", "req_00000000é00", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if id := parseRequestID(s); id < 0 || id != 0 && formatRequestID(id) != s {
			t.Fatalf("%q is parsed as %d, which is %s", s, id, formatRequestID(id))
		}
	})
}

// TestUnreadTokenComesBack: a token whose row could not be read again counts as revoked until it can be read.
func TestUnreadTokenComesBack(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if res := p.chat(); res.status != 200 {
		t.Fatalf("got %d", res.status)
	}
	p.instance.registry.markRevoked(p.tokenID) // as after an error of the database
	if res := p.chat(); res.status != 401 {
		t.Errorf("meanwhile: got %d", res.status)
	}
	ops := p.instance.operations
	if err := ops.applyChanges(t.Context(), []auditChange{{action: "of.a later version"}}); err != nil {
		t.Fatal(err)
	}
	if res := p.chat(); res.status != 200 {
		t.Errorf("afterwards: got %d %s", res.status, res.body)
	}
}

// addLiveTokens puts n tokens of the test's project into the memory of p as if they had made calls. They have no rows:
// none of them can be read again.
func (p *testProxy) addLiveTokens(n int) (hashes [][32]byte) {
	p.t.Helper()
	g, now := p.instance.registry, time.Now().UnixMilli()
	t, st, err := g.lookup(p.t.Context(), tokenHash(p.token), now)
	if err != nil {
		p.t.Fatal(err)
	}
	g.mu.RLock()
	changes := g.changes
	g.mu.RUnlock()
	for i := range n {
		hash := sha256.Sum256(fmt.Append(nil, "live token ", i))
		row := tokenRow{seq: st.seq, id: fmt.Sprint("tok_live", i), project: t.project.state.Load().seq, hash: hash[:],
			policy: "{}", createdAt: now}
		state, err := newTokenState(&row)
		if err != nil || g.addToken(&row, hash, state, t.project, changes) == nil {
			p.t.Fatal("a token could not be added: ", err)
		}
		hashes = append(hashes, hash)
	}
	return hashes
}

// areRevoked reports whether all tokens with these hashes are refused because they are revoked.
func (p *testProxy) areRevoked(hashes [][32]byte) bool {
	g, now := p.instance.registry, time.Now().UnixMilli()
	for _, hash := range hashes {
		t, st, err := g.lookup(p.t.Context(), hash, now)
		if err != nil {
			p.t.Fatal(err)
		}
		if project := t.project.state.Load(); t.validity(st, now) != "revoked" && !project.deleted {
			return false
		}
	}
	return true
}

// TestRevokeManyTokens: thousands of tokens of a project are revoked by its new state; none of them is read for that.
func TestRevokeManyTokens(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	s := p.endlessStream()
	hashes := p.addLiveTokens(5000)
	p.manage("POST", "/manage/projects/"+p.project+"/tokens/revoke", "", 200, nil)
	if _, err := s.readAll(); err == nil {
		t.Error("a stream of a revoked token ended as if it were complete")
	}
	if !p.areRevoked(hashes) || p.chat().status != 401 {
		t.Error("a revoked token may be used")
	}
	p.provider.setScript(chatScript)
	_, later := p.newToken(`"name":"later"`)
	for _, change := range []string{`"name":"renamed"`, `"policy":{"models":["gpt-*"]}`} {
		if res := p.chatAs(later); res.status != 200 {
			t.Errorf("a token that was created afterwards: got %d %s", res.status, res.body)
		}
		p.changeProject(change)
		p.execSQL(`UPDATE tokens SET revoked_at = NULL WHERE id = '` + p.tokenID + `'`) // by a stranger
		if !p.areRevoked(hashes) || p.chat().status != 401 {
			t.Errorf("after the change %s a revoked token may be used", change)
		}
	}
	p.manage("DELETE", "/manage/projects/"+p.project, "", 200, nil)
	if !p.areRevoked(hashes) || p.chatAs(later).status != 401 {
		t.Error("a token of a deleted project may be used")
	}
}
