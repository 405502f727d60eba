// Tests of signing in to the pages, and of sessions (group AD).
package main

import (
	"crypto/sha256"
	"maps"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// isSignedIn reports whether the cookie still opens the pages.
func (b *browser) isSignedIn() bool {
	b.p.t.Helper()
	res := b.get("/admin/account")
	if res.status != 200 && (res.status != 303 || !strings.HasPrefix(res.header.Get("Location"), "/admin/sign-in")) {
		b.p.t.Errorf("got %d %s", res.status, res.body)
	}
	return res.status == 200
}

// ageSession makes a browser's session older.
func (b *browser) ageSession(created, seen time.Duration) {
	b.p.t.Helper()
	_, id, _ := strings.Cut(b.cookie, "=")
	hash := sha256.Sum256([]byte(id))
	res, err := b.p.instance.store.writeDB.ExecContext(b.p.t.Context(),
		`UPDATE sessions SET created_at = created_at - ?, seen_at = seen_at - ? WHERE hash = ?`,
		created.Milliseconds(), seen.Milliseconds(), hash[:])
	if err != nil {
		b.p.t.Fatal(err)
	}
	if n, _ := res.RowsAffected(); n != 1 {
		b.p.t.Fatal("no such session")
	}
	b.p.execSQLBound()
}

// TestSessionsEnd (AD9): sessions end by signing out, here or everywhere, by time, and with the
// key. A reduced role takes effect immediately.
func TestSessionsEnd(t *testing.T) {
	t.Parallel()
	const environment = "environment-key-Jx81LmQp04TzVb67wYcN"
	p := newTest(t, map[string]string{"MANAGEMENT_TOKEN": environment})
	p.secrets = append(p.secrets, environment)
	a, other := p.signIn(p.adminKey), p.signIn(p.adminKey)
	env := p.signIn(environment)
	if res := a.post("/admin/sign-out", nil); res.status != 303 ||
		!strings.Contains(res.header.Get("Set-Cookie"), "Max-Age=0") {
		t.Errorf("sign out: %d %v", res.status, res.header)
	}
	if a.isSignedIn() || !other.isSignedIn() || !env.isSignedIn() {
		t.Error("signing out must end exactly this session")
	}
	a = p.signIn(p.adminKey)
	if other.post("/admin/sign-out-everywhere", nil); a.isSignedIn() || other.isSignedIn() || !env.isSignedIn() {
		t.Error("signing out everywhere must end all sessions of the key, and no others")
	}
	for name, c := range map[string]struct {
		created, seen time.Duration
		valid         bool
	}{
		"fresh":               {0, 0, true},
		"used 29 minutes ago": {time.Hour, 29 * time.Minute, true},
		"idle":                {time.Hour, sessionIdleTimeout, false},
		"nearly too old":      {maxSessionAge - time.Minute, 0, true},
		"too old, in use":     {maxSessionAge, 0, false},
	} {
		b := p.signIn(p.adminKey)
		if b.ageSession(c.created, c.seen); b.isSignedIn() != c.valid {
			t.Errorf("%s: signed in is %v", name, !c.valid)
		}
	}
	b := p.signIn(p.adminKey)
	for range 3 { // use keeps a session alive, up to its maximum age
		if b.ageSession(29*time.Minute, 29*time.Minute); !b.isSignedIn() {
			t.Error("a session in use ended")
		}
	}
	b.ageSession(0, 20*time.Minute)
	b.get("/admin/account", "X-Auto-Refresh", "1")
	if b.ageSession(0, 20*time.Minute); b.isSignedIn() {
		t.Error("a page that refreshes itself kept the session alive")
	}
	id, key := p.newKey("o", "operator")
	b = p.signIn(key)
	if res := b.get("/admin/tokens/new"); res.status != 200 {
		t.Errorf("an operator: %d", res.status)
	}
	p.manage("PATCH", "/manage/keys/"+id, `{"role":"viewer"}`, 200, nil)
	if res := b.get("/admin/tokens/new"); res.status != 403 {
		t.Errorf("now a viewer: %d", res.status)
	}
	if p.manage("DELETE", "/manage/keys/"+id, "", 200, nil); b.isSignedIn() {
		t.Error("the session outlived its revoked key")
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	if !env.isSignedIn() {
		t.Error("a restart ended a session")
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.env["MANAGEMENT_TOKEN"] = environment + "2"
	if p.start(); env.isSignedIn() {
		t.Error("the session outlived a change of MANAGEMENT_TOKEN")
	}
}

// TestSessionCookie (AD7, AD8): the attributes of the cookie; a planted id is not adopted; two
// cookies count as none.
func TestSessionCookie(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"PUBLIC_URL": "https://llm.example.test"})
	form := url.Values{"key": {p.adminKey}}
	anonymous := &browser{p: p}
	planted := strings.Repeat("A", sessionIDLen)
	for name, c := range map[string]struct {
		headers []string
		want    string
	}{
		"plain HTTP": {nil, "llm-proxy=; Path=/admin; HttpOnly; SameSite=Strict"},
		"behind TLS": {[]string{"Host", "llm.example.test"},
			"__Host-llm-proxy=; Path=/; HttpOnly; Secure; SameSite=Strict"},
		"planted": {[]string{"Cookie", "llm-proxy=" + planted},
			"llm-proxy=; Path=/admin; HttpOnly; SameSite=Strict"},
		"planted TLS": {[]string{"Host", "llm.example.test", "Cookie", "__Host-llm-proxy=" + planted},
			"__Host-llm-proxy=; Path=/; HttpOnly; Secure; SameSite=Strict"},
	} {
		cookie := anonymous.post("/admin/sign-in", form, c.headers...).header.Get("Set-Cookie")
		name0, rest, _ := strings.Cut(cookie, "=")
		id, attributes, _ := strings.Cut(rest, ";")
		if got := name0 + "=;" + attributes; got != c.want || len(id) != sessionIDLen || id == planted ||
			strings.Contains(p.adminKey, id[:12]) {
			t.Errorf("%s: %s", name, got)
		}
	}
	b := p.signIn(p.adminKey)
	old := b.cookie
	res := b.post("/admin/sign-in", form)
	b.cookie, _, _ = strings.Cut(res.header.Get("Set-Cookie"), ";")
	if before := (&browser{p, old}); before.isSignedIn() || !b.isSignedIn() || old == b.cookie {
		t.Error("signing in again must end the previous session")
	}
	for name, cookie := range map[string]string{
		"two": b.cookie + "; " + b.cookie, "the other name": "__Host-" + b.cookie, "the management key": "llm-proxy=" +
			p.adminKey, "none": "llm-proxy=",
		"its hash": "llm-proxy=" + strings.Repeat("0", 43), "planted": "llm-proxy=" + planted,
	} {
		if (&browser{p, cookie}).isSignedIn() {
			t.Errorf("%s: opens the pages", name)
		}
	}
	for _, header := range []string{"Authorization", "X-Api-Key"} {
		if res := p.do("GET", "/admin/account", "", header, "Bearer "+p.adminKey); res.status != 303 {
			t.Errorf("%s opens the pages: %d", header, res.status)
		}
	}
	for _, path := range []string{"/manage/projects", "/v1/models"} {
		if res := b.get(path); res.status != 401 {
			t.Errorf("a session opens %s: %d", path, res.status)
		}
	}
}

// TestSignInPage (AD10, AD11): wrong keys are throttled, a valid one never is; and signing in leads
// to our own pages only.
func TestSignInPage(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"TRUSTED_PROXIES": "127.0.0.1"})
	b := &browser{p: p}
	try := func(key, address string) testResponse {
		return b.post("/admin/sign-in", url.Values{"key": {key}, "next": {"/admin/tokens"}}, "X-Forwarded-For", address)
	}
	for i := range maxAuthFailures {
		res := try("wrong", "192.0.2.7")
		if res.status != 401 || !strings.Contains(res.body, "This key is not valid") ||
			!strings.Contains(res.body, `value="/admin/tokens"`) || strings.Contains(res.body, "wrong\"") {
			t.Fatalf("attempt %d: %d %s", i, res.status, res.body)
		}
	}
	res := try("wrong", "192.0.2.7")
	if res.status != 429 || !strings.Contains(res.body, "Too many wrong keys") || len(checkHTML(res.body)) > 0 {
		t.Errorf("got %d %s", res.status, res.body)
	}
	if res := try("wrong", "192.0.2.8"); res.status != 401 {
		t.Errorf("another address: %d", res.status)
	}
	for _, key := range []string{"", p.token, strings.Repeat("x", 100_000), "llmpm_", p.adminKey[:len(p.adminKey)-1]} {
		if res := try(key, "192.0.2.9"); res.status != 401 {
			t.Errorf("%q: got %d", clip(key, 20), res.status)
		}
	}
	if res := try(p.adminKey, "192.0.2.7"); res.status != 303 || res.header.Get("Location") != "/admin/tokens" {
		t.Errorf("the valid key: %d %v", res.status, res.header)
	}
	const local = "/admin/tokens?state=active&name=a%20b"
	elsewhere := []string{"", "//evil.test", "https://evil.test/admin/", "javascript:alert(1)", `/\evil.test`,
		`/admin/\evil`, "/admin/../v1", "/admin//evil.test", "admin/x", "/manage/projects",
		"/admin/x\r\nSet-Cookie: a=b", "/admin/sign-in", "http:/admin/x", "///admin/", "/admin/%2e%2e/x"}
	for _, next := range append(elsewhere, local) {
		want := "/admin/"
		if next == local {
			want = local
		}
		res := b.post("/admin/sign-in", url.Values{"key": {p.adminKey}, "next": {next}})
		if res.status != http.StatusSeeOther || res.header.Get("Location") != want {
			t.Errorf("next=%q leads to %q", next, res.header.Get("Location"))
		}
	}
	if res := p.do("GET", "/admin/tokens?state=active&x=%0d",
		""); res.header.Get("Location") != "/admin/sign-in?next=%2Fadmin%2Ftokens%3Fstate%3Dactive%26x%3D%250d" {
		t.Errorf("before signing in: %d %v", res.status, res.header)
	}
	if res := p.do("GET", "/admin/sign-in", "", "Host", "10.1.2.3"); !strings.Contains(res.body, "not encrypted") {
		t.Error("the page does not warn of plain HTTP")
	}
	b = p.signIn(p.adminKey)
	for range 2 * maxSessions {
		p.signIn(p.adminKey)
	}
	var n int
	if err := p.instance.store.readDB.QueryRowContext(t.Context(),
		`SELECT count(*) FROM sessions`).Scan(&n); err != nil || n > maxSessions {
		t.Errorf("%d sessions of one key: %v", n, err)
	}
	if b.isSignedIn() {
		t.Error("the oldest session did not end")
	}
}

// TestSessionsDoNotComeBack: restoring a backup revives no session.
func TestSessionsDoNotComeBack(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	file := filepath.Join(p.dir, "backup.db")
	if out, err := runProgram(t, p.env, "backup", file); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b.post("/admin/sign-out", nil)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if out, err := runProgram(t, p.env, "restore", "--revoke=none", file); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if p.start(); b.isSignedIn() {
		t.Error("a session that was signed out is valid again")
	}
	if !p.signIn(p.adminKey).isSignedIn() {
		t.Error("signing in fails")
	}
}

// TestSessionOverTLS (AD8): if the proxy serves https itself, its cookie is for https only.
func TestSessionOverTLS(t *testing.T) {
	t.Parallel()
	cert, key := testCertificate(t, t.TempDir(), time.Hour)
	p := newTest(t, map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key})
	b := p.signIn(p.adminKey)
	if !strings.HasPrefix(b.cookie, "__Host-llm-proxy=") || !b.isSignedIn() {
		t.Errorf("the cookie is %s", clip(b.cookie, 20))
	}
	if (&browser{p, strings.TrimPrefix(b.cookie, "__Host-")}).isSignedIn() {
		t.Error("a cookie that plain HTTP may have set is accepted")
	}
	if res := b.get("/admin/projects"); res.header.Get("Referrer-Policy") != "no-referrer" {
		t.Errorf("got %v", res.header)
	}
}

// TestSessionEndKeepsForm: what was typed into a form is still there after its session has ended and another began, but
// no key. It is kept for the person who signs in, for that form, once, and within bounds.
func TestSessionEndKeepsForm(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	const newProject, secretKey = "/admin/projects/new", "sk-typed-into-a-form-0123456789"
	form := parseForm(t, b.get(newProject).body)
	form.Set("name", `Typed <b>"name"`)
	form.Set("api_key", secretKey)
	form.Set("policy.models", "gpt-4o\r\nclaude-*")
	form.Set("policy.limits[0].max", "500")
	b.ageSession(maxSessionAge, 0)
	page := b.post(newProject, form)
	if page.status != 401 || strings.Contains(page.body, secretKey) || len(checkHTML(page.body)) > 0 ||
		!strings.Contains(page.body, "your input is kept") {
		t.Fatalf("the form without a session: %d %v %s", page.status, checkHTML(page.body), page.body)
	}
	signIn := parseForm(t, page.body)
	wrong := maps.Clone(signIn)
	wrong.Set("key", "llmpm_wrong")
	if res := b.post("/admin/sign-in", wrong); res.status != 401 {
		t.Errorf("a wrong key: %d", res.status)
	} else {
		signIn = parseForm(t, res.body) // still has the input
	}
	signIn.Set("key", p.adminKey)
	signIn.Set("kept", signIn.Get("kept")+"&api_key="+secretKey+"&once=x") // is not filled in either
	again := func() *browser {
		res := b.post("/admin/sign-in", signIn)
		if to := res.header.Get("Location"); res.status != 303 || to != newProject {
			t.Fatalf("signing in: %d to %q", res.status, to)
		}
		c := &browser{p: p}
		c.cookie, _, _ = strings.Cut(res.header.Get("Set-Cookie"), ";")
		return c
	}
	c := again()
	if other := c.get("/admin/tokens/new?project_id=" + p.project).body; strings.Contains(other, "Typed") {
		t.Error("another form has the input")
	}
	if other := p.signIn(p.adminKey).get(newProject).body; strings.Contains(other, "Typed") {
		t.Error("another session has the input")
	}
	page = c.get(newProject)
	restored := parseForm(t, page.body)
	for _, name := range []string{"name", "policy.limits[0].max"} {
		if restored.Get(name) != form.Get(name) {
			t.Errorf("%s is %q", name, restored.Get(name))
		}
	}
	if restored.Get("policy.models") != "gpt-4o\nclaude-*" || strings.Contains(page.body, secretKey) ||
		restored.Get("once") == "x" || !strings.Contains(page.body, "Your input is still here") {
		t.Errorf("the form is %v", restored)
	}
	if page := c.get(newProject).body; strings.Contains(page, "Typed") {
		t.Error("the input is there a second time")
	}
	if res := c.post(newProject, restored); res.status != 303 {
		t.Errorf("the restored form: %d %s", res.status, res.body)
	}

	edit := "/admin/tokens/" + p.tokenID + "/edit" // a change in between is noticed
	form = parseForm(t, c.get(edit).body)
	form.Set("name", "typed before")
	p.manage("PATCH", "/manage/tokens/"+p.tokenID, `{"name":"changed meanwhile"}`, 200, nil)
	signIn = parseForm(t, p.doForm(edit, form))
	signIn.Set("key", p.adminKey)
	res := b.post("/admin/sign-in", signIn)
	c.cookie, _, _ = strings.Cut(res.header.Get("Set-Cookie"), ";")
	if form = parseForm(t, c.get(edit).body); form.Get("name") != "typed before" || c.post(edit, form).status != 409 {
		t.Errorf("the restored change: %v", form)
	}

	for _, next := range []string{"https://evil.test/", "//evil.test", "/admin/../v1", "/manage/tokens"} {
		signIn.Set("next", next)
		if to := b.post("/admin/sign-in", signIn).header.Get("Location"); to != "/admin/" {
			t.Errorf("next=%s leads to %q", next, to)
		}
	}
	if res := p.do("POST", newProject, form.Encode(), "Content-Type", "application/x-www-form-urlencoded",
		"Sec-Fetch-Site", "cross-site"); res.status != 403 || strings.Contains(res.body, "kept") {
		t.Errorf("from another site: %d", res.status)
	}
	form.Set("name", strings.Repeat("x", maxKeptFormBytes))
	for _, body := range []string{form.Encode(), "", "version=3", "%zz"} {
		res := p.do("POST", newProject, body, "Content-Type", "application/x-www-form-urlencoded",
			"Sec-Fetch-Site", "same-origin")
		to := res.header.Get("Location")
		if res.status != 303 || to != "/admin/sign-in?next=%2Fadmin%2Fprojects%2Fnew" {
			t.Errorf("%.20s: %d to %q", body, res.status, to)
		}
	}
	var kept keptForms
	for i := range 1000 {
		kept.put([]byte{byte(i)}, newProject, "name=x", time.Now())
	}
	if kept.take([]byte{231}, newProject, time.Now()) == nil || kept.take([]byte{100}, newProject, time.Now()) != nil ||
		kept.take([]byte{230}, newProject, time.Now().Add(time.Hour)) != nil {
		t.Error("not the latest forms are kept, or for too long")
	}
}

// doForm sends a form without a session and returns the page.
func (p *testProxy) doForm(path string, form url.Values) string {
	p.t.Helper()
	return p.do("POST", path, form.Encode(), "Content-Type", "application/x-www-form-urlencoded", "Sec-Fetch-Site",
		"same-origin").body
}

// TestSecretFields: the fields of forms that hold secrets are those that isSecretField knows.
func TestSecretFields(t *testing.T) {
	t.Parallel()
	tables, seen := newFieldTables(), 0
	check := func(name, kind string) {
		if isSecretField(name) != (kind == "password") && kind != "" {
			t.Errorf("%s of the kind %q: a secret is %v", name, kind, isSecretField(name))
		}
		if kind == "password" {
			seen++
		}
	}
	for _, f := range tables.project {
		check(f.name, f.kind)
	}
	for _, f := range tables.upstream {
		check(f.name, f.kind)
	}
	for _, f := range tables.token {
		check(f.name, f.kind)
	}
	for _, f := range tables.key {
		check(f.name, f.kind)
	}
	if seen < 2 {
		t.Errorf("%d fields hold secrets", seen)
	}
}
