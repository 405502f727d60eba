// Tests of the pages as a whole (group AD): who sees what, what guards them
// against other web sites, and that every page is sound HTML whatever it shows.
package main

import (
	"encoding/json"
	"fmt"
	"html"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// A browser is signed in to the pages.
type browser struct {
	p      *testProxy
	cookie string
}

// signIn signs in with a management key.
func (p *testProxy) signIn(key string) *browser {
	p.t.Helper()
	b := &browser{p: p}
	res := b.post("/admin/sign-in", url.Values{"key": {key}})
	if res.status != http.StatusSeeOther {
		p.t.Fatalf("signing in: %d %s", res.status, res.body)
	}
	b.cookie, _, _ = strings.Cut(res.header.Get("Set-Cookie"), ";")
	_, id, _ := strings.Cut(b.cookie, "=")
	p.mu.Lock()
	defer p.mu.Unlock()
	p.secrets = append(p.secrets, id)
	return b
}

func (b *browser) get(path string, headers ...string) testResponse {
	b.p.t.Helper()
	return b.p.do("GET", path, "", append([]string{"Cookie", b.cookie}, headers...)...)
}

// post sends a form as a browser does from a page of ours.
func (b *browser) post(path string, form url.Values, headers ...string) testResponse {
	b.p.t.Helper()
	h := []string{"Content-Type", "application/x-www-form-urlencoded", "Sec-Fetch-Site", "same-origin"}
	if b.cookie != "" {
		h = append(h, "Cookie", b.cookie)
	}
	return b.p.do("POST", path, form.Encode(), append(h, headers...)...)
}

// seedObjects fills the test's database with one of each thing that pages show, all
// with the same name, and returns the paths of pages about them.
func (p *testProxy) seedObjects(name string) []string {
	p.t.Helper()
	q := quoteJSON(name)
	n := quoteJSON(strings.NewReplacer(" ", "_", "*", "_").Replace(name)) // fit for a model
	var project struct {
		ID        string
		Upstreams []struct{ ID string }
	}
	p.manage("PATCH", "/manage/projects/"+p.project, `{"name":`+q+`,"policy":{"models":[`+n+`,"gpt-4o*"],"addresses":["10.0.0.0/8","127.0.0.1"],"limits":[{"count":"requests","max":60,"per":"minute","model":`+n+`},
		{"count":"dollars","max":1.5,"per":"month","shadow":true},{"count":"concurrent","max":5}]}}`, 200, &project)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"name":`+q+`,"note":`+q+`,"models":[`+n+`,"gpt*"],"rewrite":{`+n+`:"x"}}`, 200, nil)
	id, _ := p.newToken(`"name":` + q + `,"max_requests":5,"idle_expiry_minutes":90,"policy":{"limits":[{"count":"tokens","max":1000,"per":"day"}]}`)
	gone, _ := p.newToken(`"name":` + q + `,"expires_at":null`)
	p.manage("DELETE", "/manage/tokens/"+gone, "", 200, nil)
	p.newToken(`"name":` + q + `,"duration_hours":1`)
	keyID, _ := p.newKey("spare", "viewer")
	p.manage("PATCH", "/manage/keys/"+keyID, `{"name":`+q+`}`, 200, nil)
	var price struct{ ID string }
	match := strings.ReplaceAll(name, " ", "_")
	p.manage("POST", "/manage/prices", `{"match":`+quoteJSON(match)+`,"input":1.5,"output":2}`, 201, &price)
	p.do("POST", "/v1/chat/completions", `{"model":`+n+`,"messages":[]}`, "Authorization", "Bearer "+p.token, "Content-Type", "application/json", "User-Agent", "x")
	p.waitSettled()
	up := "/admin/projects/" + p.project + "/upstreams/" + p.upstream
	return []string{"/admin/", "/admin/account", "/admin/projects", "/admin/projects/" + p.project, "/admin/projects/" + p.project + "/edit", up + "/edit", up + "/delete",
		"/admin/projects/" + p.project + "/route", "/admin/projects/" + p.project + "/route?model=" + url.QueryEscape(strings.ReplaceAll(match, "*", "x")), "/admin/projects/" + p.project + "/route?api=anthropic&model=a+b",
		"/admin/tokens", "/admin/tokens/" + id, "/admin/tokens/" + id + "/edit", "/admin/tokens/" + gone, "/admin/tokens/new?project_id=" + p.project,
		"/admin/keys", "/admin/keys/" + keyID + "/edit", "/admin/prices", "/admin/prices/" + price.ID + "/delete", "/admin/audit", "/admin/audit/verify", "/admin/settings", "/admin/streams",
		"/admin/dashboard?by=model", "/admin/dashboard?period=24h&measure=tokens", "/admin/dashboard?period=90d&project=" + p.project,
		"/admin/requests", "/admin/requests/" + p.lastCall().ID, "/admin/requests?model=" + url.QueryEscape(name) + "&from=x", "/admin/requests?id=" + url.QueryEscape(name),
		"/admin/prices?model=" + url.QueryEscape(match), "/admin/tokens?name=" + url.QueryEscape(name), "/admin/audit?object=" + url.QueryEscape(name)}
}

func quoteJSON(s string) string { return string(auditValueJSON(s)) }

// expandPattern fills in a pattern of adminTable.
func (p *testProxy) expandPattern(pattern string) string {
	_, path, _ := strings.Cut(pattern, " ")
	id := p.tokenID
	for prefix, other := range map[string]string{"/admin/projects/": p.project, "/admin/keys/": "key_none", "/admin/prices/": "price_none", "/admin/streams/": "req_0000000000000", "/admin/requests/": "req_0000000000000"} {
		if strings.HasPrefix(path, prefix) {
			id = other
		}
	}
	return strings.NewReplacer("{id}", id, "{upstream}", p.upstream, "{$}", "").Replace(path)
}

// managedDigest is all that administrators manage, to see whether something changed.
func (p *testProxy) managedDigest() string {
	p.t.Helper()
	var b strings.Builder
	for _, query := range []string{`SELECT group_concat(id || name || is_active || policy || version || coalesce(deleted_at, '')) FROM projects`,
		`SELECT group_concat(id || name || hex(sealed_key) || version) FROM upstreams`,
		`SELECT group_concat(id || name || hex(hash) || coalesce(revoked_at, '') || version || policy) FROM tokens`,
		`SELECT group_concat(id || name || role || coalesce(revoked_at, '') || version) FROM management_keys`,
		`SELECT group_concat(id || match || coalesce(input, '')) FROM prices`, `SELECT group_concat(hex(hash)) FROM sessions`,
		`SELECT group_concat(action || object) FROM audit WHERE action <> 'sign_in_failed'`} {
		var text *string
		if err := p.instance.store.readDB.QueryRowContext(p.t.Context(), query).Scan(&text); err != nil {
			p.t.Fatal(err)
		}
		if text != nil {
			b.WriteString(*text + "\n")
		}
	}
	return b.String()
}

// requiredRole returns the role that a method and path need, by the table of routes.
func (p *testProxy) requiredRole(method, path string) role {
	mux := http.NewServeMux()
	needs := map[string]role{}
	for _, rt := range p.instance.server.admin.adminTable() {
		methods, pattern, _ := strings.Cut(rt.pattern, " ")
		for m := range strings.SplitSeq(methods, "|") {
			mux.HandleFunc(m+" "+pattern, func(http.ResponseWriter, *http.Request) {})
			needs[m+" "+pattern] = rt.minRole
		}
	}
	u, err := url.Parse(path)
	if err != nil {
		p.t.Fatal(err)
	}
	_, pattern := mux.Handler(&http.Request{Method: method, URL: &url.URL{Path: u.Path}, Host: "x"})
	if pattern == "" {
		p.t.Errorf("%s %s leads nowhere", method, path)
	}
	return needs[pattern]
}

// TestAdminRoles: each route against each role, and no page shows a way to what
// its reader may not do.
func TestAdminRoles(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	keys := map[role]string{roleAdmin: p.adminKey}
	_, keys[roleViewer] = p.newKey("v", "viewer")
	_, keys[roleOperator] = p.newKey("o", "operator")
	pages := p.seedObjects("Ada")
	for who, key := range keys {
		b := p.signIn(key)
		for _, rt := range p.instance.server.admin.adminTable() {
			methods, _, _ := strings.Cut(rt.pattern, " ")
			path := p.expandPattern(rt.pattern)
			for method := range strings.SplitSeq(methods, "|") {
				if rt.minRole == "" || who.rank() >= rt.minRole.rank() && (method == "POST") {
					continue // those are tried elsewhere
				}
				res := b.get(path)
				if method == "POST" {
					res = b.post(path, url.Values{"version": {"1"}})
				}
				allowed := who.rank() >= rt.minRole.rank()
				if forbidden := res.status == http.StatusForbidden; forbidden == allowed || res.status >= 500 {
					t.Errorf("%s as %s: got %d", rt.pattern, who, res.status)
				}
				if problems := checkHTML(res.body); res.status != http.StatusSeeOther && res.header.Get("Content-Type") == "text/html; charset=utf-8" && len(problems) > 0 {
					t.Errorf("%s as %s: %v", rt.pattern, who, problems)
				}
			}
		}
		for _, path := range pages {
			if p.requiredRole("GET", path).rank() > who.rank() {
				continue
			}
			gets, posts := pageLinks(b.get(path).body)
			for _, to := range gets {
				if need := p.requiredRole("GET", to); need.rank() > who.rank() {
					t.Errorf("%s shows a %s the way to %s", path, who, to)
				}
			}
			for _, to := range posts {
				if need := p.requiredRole("POST", to); need.rank() > who.rank() {
					t.Errorf("%s shows a %s a form for %s", path, who, to)
				}
			}
		}
	}
}

// TestAdminGetsChangeNothing (AD2): everything that can be reached by links alone
// is read, and nothing is different after.
func TestAdminGetsChangeNothing(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	todo := p.seedObjects("Ada")
	b := p.signIn(p.adminKey)
	before := p.managedDigest()
	seen := map[string]bool{}
	for len(todo) > 0 && len(seen) < 300 {
		path := todo[0]
		todo = todo[1:]
		if seen[path] {
			continue
		}
		seen[path] = true
		res := b.get(path, "Purpose", "prefetch", "Sec-Purpose", "prefetch", "X-HTTP-Method-Override", "POST")
		if res.status != 200 && res.status != 303 {
			t.Errorf("GET %s: got %d", path, res.status)
		}
		if head := p.do("HEAD", path, "", "Cookie", b.cookie); head.status != res.status || head.body != "" {
			t.Errorf("HEAD %s: got %d", path, head.status)
		}
		if problems := checkHTML(res.body); res.status == 200 && strings.HasPrefix(res.header.Get("Content-Type"), "text/html") && len(problems) > 0 {
			t.Errorf("%s: %v", path, problems)
		}
		gets, _ := pageLinks(res.body)
		todo = append(todo, gets...)
	}
	for _, method := range []string{"PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"} { // AD3
		if res := p.do(method, "/admin/projects", "", "Cookie", b.cookie, "Sec-Fetch-Site", "same-origin"); res.status != 405 {
			t.Errorf("%s: got %d", method, res.status)
		}
	}
	b.get("/admin/projects/" + p.project + "/delete?_method=POST&_method=DELETE")
	if p.managedDigest() != before {
		t.Error("reading changed something")
	}
	if len(seen) < 60 {
		t.Errorf("only %d pages were found", len(seen))
	}
}

// TestAdminCrossOrigin (AD1, AD4): forms are taken from our own pages only.
func TestAdminCrossOrigin(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"PUBLIC_URL": "https://llm.example.test"})
	b := p.signIn(p.adminKey)
	before := p.managedDigest()
	host := strings.TrimPrefix(p.url, "http://")
	for name, headers := range map[string][]string{
		"cross-site": {"Sec-Fetch-Site", "cross-site"}, "same-site": {"Sec-Fetch-Site", "same-site"}, "odd": {"Sec-Fetch-Site", "x"},
		"two":                    {"Sec-Fetch-Site", "same-origin", "Sec-Fetch-Site", "cross-site"},
		"cross-site, our origin": {"Sec-Fetch-Site", "cross-site", "Origin", p.url},
		"evil origin":            {"Origin", "http://evil.test"}, "null": {"Origin", "null"}, "nothing": nil, "other port": {"Origin", "http://127.0.0.1:1"},
		"other scheme": {"Origin", "https://" + host}, "two origins": {"Origin", p.url, "Origin", p.url}, "prefix": {"Origin", p.url + ".evil.test"},
		"public over http": {"Host", "llm.example.test", "Origin", "http://llm.example.test"},
	} {
		for _, rt := range p.instance.server.admin.adminTable() {
			if !strings.Contains(rt.pattern, "POST ") {
				continue
			}
			path := p.expandPattern(rt.pattern)
			res := p.do("POST", path, "sure=yes&id="+p.tokenID+"&name=x&once=y&key="+p.adminKey, append([]string{"Cookie", b.cookie, "Content-Type", "application/x-www-form-urlencoded"}, headers...)...)
			if res.status != http.StatusForbidden {
				t.Errorf("%s, %s: got %d", name, path, res.status)
			}
		}
	}
	for _, host := range []string{"evil.test", "evil.test:8080", "127.0.0.1.evil.test", ""} {
		for _, method := range []string{"GET", "POST"} {
			res := p.sendRaw(method + " /admin/projects HTTP/1.1\r\nHost: " + host + "\r\nOrigin: http://" + host + "\r\nCookie: " + b.cookie + "\r\nSec-Fetch-Site: same-origin\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			if !strings.HasPrefix(res, "HTTP/1.1 421 ") {
				t.Errorf("%s to %q: got %s", method, host, clip(res, 60))
			}
		}
	}
	for _, kind := range []string{"application/json", "text/plain", "multipart/form-data; boundary=x", ""} {
		res := p.do("POST", "/admin/tokens/"+p.tokenID+"/revoke", "sure=yes", "Cookie", b.cookie, "Sec-Fetch-Site", "same-origin", "Content-Type", kind)
		if res.status != http.StatusUnsupportedMediaType {
			t.Errorf("%q: got %d", kind, res.status)
		}
	}
	if p.managedDigest() != before {
		t.Error("something changed")
	}
	if res := p.do("POST", "/admin/tokens/"+p.tokenID+"/revoke", "", "Cookie", b.cookie, "Origin", p.url, "Content-Type", "application/x-www-form-urlencoded"); res.status != http.StatusSeeOther {
		t.Errorf("an old browser on our own page: got %d %s", res.status, res.body)
	}
}

// TestAdminHeaders (AD5): every answer tells browsers what they may not do.
func TestAdminHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	static := "/admin/static/" + p.instance.server.admin.pages.hashedNames["admin.css"]
	for what, res := range map[string]testResponse{
		"sign-in": p.do("GET", "/admin/sign-in", ""), "page": b.get("/admin/projects"), "redirect": p.do("GET", "/admin/projects", ""), "not found": b.get("/admin/nothing"),
		"static": p.do("GET", static, ""), "no static": p.do("GET", "/admin/static/x.css", ""), "wrong method": p.do("DELETE", "/admin/projects", ""),
		"forbidden": p.do("POST", "/admin/sign-in", ""), "wrong host": p.do("GET", "/admin/", "", "Host", "evil.test"), "wrong key": b.post("/admin/sign-in", url.Values{"key": {"x"}}),
		"wrong type": p.do("POST", "/admin/sign-in", "x", "Sec-Fetch-Site", "same-origin"), "form": b.get("/admin/projects/new"), "bad form": b.post("/admin/projects/new", url.Values{"name": {""}}),
	} {
		csp := res.header.Get("Content-Security-Policy")
		for _, part := range []string{"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'self'", "script-src 'self'", "style-src 'self'"} {
			if !slices.Contains(strings.Split(csp, "; "), part) {
				t.Errorf("%s: no %s in %s", what, part, csp)
			}
		}
		want := map[string]string{"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
			"X-Frame-Options": "DENY", "Cache-Control": "no-store"}
		if what == "static" {
			want["Cache-Control"] = "public, max-age=31536000, immutable" // the name has a hash of what is in it
		}
		if what == "wrong host" { // which is reached over plain HTTP
			want["Referrer-Policy"] = "same-origin"
		}
		for name, value := range want {
			if res.header.Get(name) != value {
				t.Errorf("%s: %s is %q", what, name, res.header.Get(name))
			}
		}
		if strings.Contains(csp, "unsafe") || res.status >= 500 {
			t.Errorf("%s: %d %s", what, res.status, csp)
		}
	}
	if got := p.do("GET", "/admin/sign-in", "", "Host", "10.1.2.3").header.Get("Referrer-Policy"); got != "same-origin" {
		t.Errorf("plain HTTP: %s", got)
	}
	for _, path := range []string{"/admin/static/", "/admin/static/../static/admin.css", "/admin/static/%2e%2e/admin.css", "/admin/static/admin.css", "/admin/static/..", "/admin/static/icon.svg/x"} { // AD19
		if res := p.do("GET", path, ""); res.status != 404 && !(res.status == 303 && strings.HasPrefix(res.header.Get("Location"), "/admin/sign-in")) {
			t.Errorf("%s: got %d", path, res.status)
		}
	}
}

// TestAdminHostileText (AD6): whatever a name holds, a page stays the page it is.
func TestAdminHostileText(t *testing.T) {
	t.Parallel()
	payloads := []string{`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onmouseover='alert(1)`, `</title><script>alert(1)</script>`, `</textarea><svg onload=alert(1)>`,
		`javascript:alert(1)`, `{{.}}{{template "layout"}}`, `${7*7}<%= 7 %>`, `<!--`, `]]><x>`, `&lt;script&gt;`, `%3Cscript%3E`, `\u003cscript\u003e`, "`+alert(1)+`", `=cmd|'/c calc'!A1`, `</select><b>`,
		`<iframe srcdoc="<script>1</script>">`, `👩‍💻<i>`, `"autofocus onfocus="x`, `--></style><style>*{}`}
	shape := func(body string) string {
		tags, _, err := readHTML(body)
		if err != nil {
			return err.Error()
		}
		var b strings.Builder
		for _, tag := range tags {
			if slices.Contains([]string{"text", "line", "path", "circle", "rect", "g", "title"}, tag.name) {
				continue // a chart's axis goes by how long calls took
			}
			b.WriteString(tag.name + " " + strings.Join(slices.Sorted(maps.Keys(tag.attrs)), " ") + "\n")
		}
		return b.String()
	}
	var plain []string
	for i, payload := range append([]string{"Ada"}, payloads...) {
		p := newTest(t, nil)
		pages := p.seedObjects(payload)
		b := p.signIn(p.adminKey)
		for j, path := range pages {
			res := b.get(path)
			if res.status == 303 && path == "/admin/" {
				continue
			}
			if problems := checkHTML(res.body); res.status != 200 || len(problems) > 0 {
				t.Errorf("%q on %s: %d %v", payload, path, res.status, problems)
			}
			for len(plain) <= j {
				plain = append(plain, "")
			}
			if i == 0 {
				plain[j] = shape(res.body)
			} else if got := shape(res.body); got != plain[j] && !strings.HasPrefix(path, "/admin/tokens/new") && !strings.HasPrefix(path, "/admin/requests/req_") {
				t.Errorf("%q changes the shape of %s", payload, path)
			}
			if strings.ContainsAny(payload, "<") && strings.Contains(res.body, payload) {
				t.Errorf("%q stands as it is on %s", payload, path)
			}
		}
	}
}

// TestAdminOff (AD21): the pages can be left out.
func TestAdminOff(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"ADMIN_PAGES": "false"})
	for _, path := range []string{"/admin", "/admin/", "/admin/sign-in", "/admin/static/admin.css"} {
		if res := p.do("GET", path, ""); res.status != 404 || strings.Contains(res.body, "html") {
			t.Errorf("%s: got %d %s", path, res.status, res.body)
		}
	}
}

// parseForm reads the first posting form of a page, but the sign-out: its fields as a
// browser would send them.
func parseForm(t *testing.T, page string) url.Values {
	t.Helper()
	out := url.Values{}
	_, rest, _ := strings.Cut(page, "<main")
	_, rest, ok := strings.Cut(rest, `method="post"`)
	body, _, _ := strings.Cut(rest, "</form>")
	if !ok {
		t.Fatalf("there is no form in %s", page)
	}
	for _, m := range regexp.MustCompile(`(?s)<(input)([^>]*)>()|<(select|textarea)([^>]*)>(.*?)</`).FindAllStringSubmatch(strings.ReplaceAll(body, "</option>", ""), -1) {
		if m[1] == "" {
			m = m[3:]
		}
		attr := func(name string) (string, bool) {
			v := regexp.MustCompile(` ` + name + `(?:="([^"]*)")?[ >]`).FindStringSubmatch(m[2] + " ")
			if v == nil {
				return "", false
			}
			return html.UnescapeString(v[1]), true
		}
		name, _ := attr("name")
		value, _ := attr("value")
		switch kind, _ := attr("type"); {
		case m[1] == "textarea":
			value = html.UnescapeString(strings.TrimPrefix(m[3], "\n"))
		case m[1] == "select":
			chosen := regexp.MustCompile(`<option value="([^"]*)" selected`).FindStringSubmatch(m[3])
			if chosen == nil {
				chosen = regexp.MustCompile(`<option value="([^"]*)"`).FindStringSubmatch(m[3])
			}
			value = html.UnescapeString(chosen[1])
		case kind == "checkbox":
			if _, on := attr("checked"); !on {
				continue
			}
			if value == "" {
				value = "on"
			}
		}
		out.Set(name, value)
	}
	return out
}

// TestAdminJourney: a project, its key and limits, a token, its use, its end, all
// through pages.
func TestAdminJourney(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	form := parseForm(t, b.get("/admin/projects/new").body)
	form.Set("name", "From a page")
	form.Set("api_key", p.provider.key)
	form.Set("base_url", p.provider.url)
	form.Set("policy.models", "gpt-4o-mini\r\nclaude-*\r\n\r\n")
	form.Set("policy.addresses", "127.0.0.1")
	form.Set("policy.limits[1].max", "1,000")
	form.Set("policy.limits[1].count", "tokens")
	form.Set("policy.limits[1].per", "day")
	res := b.post("/admin/projects/new", form)
	here, _, _ := strings.Cut(res.header.Get("Location"), "?")
	if res.status != 303 || !strings.HasPrefix(here, "/admin/projects/proj_") {
		t.Fatalf("got %d %v %s", res.status, res.header, res.body)
	}
	var project projectReply
	p.manage("GET", "/manage"+strings.TrimPrefix(here, "/admin"), "", 200, &project)
	if got := string(project.Policy); got != `{"models":["gpt-4o-mini","claude-*"],"addresses":["127.0.0.1/32"],"limits":[{"count":"tokens","max":1000,"per":"day"}]}` || !project.IsActive {
		t.Errorf("the policy is %s", got)
	}
	page := b.get(here).body
	for _, want := range []string{"From a page", "0 of 1,000", "•••• " + p.provider.key[len(p.provider.key)-4:], "gpt-4o-mini, claude-*"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}

	form = parseForm(t, b.get("/admin/tokens/new?project_id="+project.ID).body)
	if form.Get("project_id") != project.ID || form.Get("lifetime") != "720" {
		t.Errorf("the form begins with %v", form)
	}
	form.Set("name", "app")
	res = b.post("/admin/tokens/new", form)
	token := regexp.MustCompile(`sk-llmp_\w+`).FindString(res.body)
	if res.status != 200 || token == "" || strings.Count(res.body, token) != 5 || len(checkHTML(res.body)) > 0 {
		t.Fatalf("got %d %s %v", res.status, res.body, checkHTML(res.body))
	}
	p.secrets = append(p.secrets, token)
	if again := b.post("/admin/tokens/new", form); again.status != 409 || strings.Contains(again.body, "sk-llmp_") { // AD20
		t.Errorf("reloaded: got %d %s", again.status, again.body)
	}
	if res := p.chatAs(token); res.status != 200 {
		t.Errorf("the token: %d %s", res.status, res.body)
	}
	p.waitSettled()
	id := "tok_" + token[len(tokenPrefix):][:publicLen]
	if page := b.get("/admin/tokens/" + id).body; !strings.Contains(page, "POST /v1/chat/completions") || !strings.Contains(page, "active") || strings.Contains(page, token) {
		t.Errorf("the token's page: %s", page)
	}
	if calls := b.get("/admin/requests?token=" + id).body; strings.Count(calls, `href="/admin/requests/req_`) != 1 || !strings.Contains(b.get("/admin/tokens/"+id).body, `"/admin/requests?token=`+id+`"`) {
		t.Errorf("the token's calls: %s", calls)
	}
	if page := b.get(here).body; !strings.Contains(page, "12 of 1,000") {
		t.Errorf("the project's page does not show the use: %s", page)
	}
	res = b.post("/admin/tokens/"+id+"/rotate", parseForm(t, b.get("/admin/tokens/"+id+"/rotate").body))
	rotated := regexp.MustCompile(`sk-llmp_\w+`).FindString(res.body)
	p.secrets = append(p.secrets, rotated)
	if res.status != 200 || rotated == token || p.chatAs(rotated).status != 200 || p.chatAs(token).status != 200 {
		t.Errorf("rotated: %d %s", res.status, res.body)
	}
	if res := b.post("/admin/tokens/"+id+"/revoke", nil); res.status != 303 || p.chatAs(rotated).status != 401 || p.chatAs(token).status != 401 {
		t.Errorf("revoked: %d", res.status)
	}
	if res := b.post("/admin/tokens/"+id+"/edit", url.Values{"name": {"x"}}); res.status != 400 || !strings.Contains(res.body, "is revoked") {
		t.Errorf("edited after it was revoked: %d %s", res.status, res.body)
	}
	if res := b.post(here+"/deactivate", nil); res.status != 303 || !strings.Contains(b.get(here).body, "inactive") {
		t.Errorf("deactivated: %d", res.status)
	}
	if res := b.post(here+"/delete", nil); res.status != 303 || b.get(here).status != 404 {
		t.Errorf("deleted: %d", res.status)
	}
}

// projectReply is a project as /manage shows it.
type projectReply struct {
	ID, Name  string
	IsActive  bool `json:"is_active"`
	Policy    json.RawMessage
	Routing   json.RawMessage
	Version   int64
	Upstreams []struct {
		ID, Name, Note string
		BaseURL        string `json:"base_url"`
		KeyHint        string `json:"key_hint"`
		Models         []string
		SharedWith     []string `json:"shared_with"`
		Rewrite        map[string]string
		IsActive       bool  `json:"is_active"`
		Requests       int64 `json:"requests_per_minute"`
		Priority       int64
	}
}

// TestAdminFormsKeepWhatIsStored: a form that is sent as it was shown changes
// nothing, whatever the policy.
func TestAdminFormsKeepWhatIsStored(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"other"}`, 201, &other)
	for _, body := range []string{`{}`, `{"models":[]}`, `{"endpoints":["POST /v1/audio/*"],"addresses":[],"stateful":true,"keep_content_days":3}`,
		`{"models":["a","b*"],"limits":[{"count":"dollars","max":12.5,"per":"month","model":"gpt*","shadow":true},{"count":"concurrent","max":3},{"count":"requests","max":0,"per":"lifetime","endpoint":"/v1/*"}]}`} {
		p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":`+body+`,"routing":{"fallbacks":[{"model":"gpt-4o*","to":"gpt-4o-mini"}],"show_upstream":true}}`, 200, nil)
		p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"models":["x*"],"rewrite":{"a":"b=c"},"note":"ours","requests_per_minute":7,"connect_ms":700,"answer_ms":90000,"priority":3,"shared_with":["`+other.ID+`"]}`, 200, nil)
		read := func() (v projectReply) {
			p.manage("GET", "/manage/projects/"+p.project, "", 200, &v)
			v.Version = 0
			return v
		}
		before := read()
		for _, path := range []string{"/admin/projects/" + p.project + "/edit", "/admin/projects/" + p.project + "/upstreams/" + p.upstream + "/edit"} {
			if res := b.post(path, parseForm(t, b.get(path).body)); res.status != 303 {
				t.Fatalf("%s: %d %s", path, res.status, res.body)
			}
		}
		if after := read(); fmt.Sprintf("%+v", after) != fmt.Sprintf("%+v", before) {
			t.Errorf("%s\nbefore %+v\nafter  %+v", body, before, after)
		}
		if body == `{}` {
			continue
		}
		policy := strings.Replace(body, `,"stateful":true,"keep_content_days":3`, "", 1)
		id, token := p.newToken(`"name":"keeps","expires_at":"2099-01-31T10:20:30.456Z","idle_expiry_minutes":61,"max_requests":5,"policy":` + policy)
		p.secrets = append(p.secrets, token)
		was := b.p.manageAs(p.adminKey, "GET", "/manage/tokens/"+id, "").body
		if res := b.post("/admin/tokens/"+id+"/edit", parseForm(t, b.get("/admin/tokens/"+id+"/edit").body)); res.status != 303 {
			t.Fatalf("%d %s", res.status, res.body)
		}
		volatile := regexp.MustCompile(`"(version|updated_at)":[^,]*,`)
		if is := b.p.manageAs(p.adminKey, "GET", "/manage/tokens/"+id, "").body; volatile.ReplaceAllString(is, "") != volatile.ReplaceAllString(was, "") {
			t.Errorf("before %s\nafter  %s", was, is)
		}
	}
}

// TestAdminMistakes: a refused form says what is wrong beside the field, keeps
// what was typed, and changes nothing.
func TestAdminMistakes(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	p.manage("POST", "/manage/projects", `{"name":"taken"}`, 201, nil)
	project, upstream := "/admin/projects/"+p.project+"/edit", "/admin/projects/"+p.project+"/upstreams/"+p.upstream+"/edit"
	keyID, _ := p.newKey("k", "viewer")
	for _, c := range []struct {
		path, name, value, field, says string
	}{
		{"/admin/projects/new", "name", "", "name", "must have 1 to 100 bytes"}, {"/admin/projects/new", "name", "taken", "name", "is already taken"},
		{"/admin/projects/new", "base_url", "https://x.test", "api_key", "is needed"}, {"/admin/projects/new", "provider", "azure", "api_key", "is needed"},
		{"/admin/projects/new", "policy.models", "a*b", "policy.models", "only at the end"}, {"/admin/projects/new", "policy.endpoints", "chat", "policy.endpoints", "must name endpoints"},
		{"/admin/projects/new", "policy.addresses", "10.0.0.1/8", "policy.addresses", "10.0.0.1/8 is none"},
		{"/admin/projects/new", "policy.limits[1].max", "many", "policy.limits[0].max", "must be a whole number"}, {project, "policy.limits[0].max", "-1", "policy.limits[0].max", "must be a whole number"},
		{project, "routing.fallbacks", "gpt", "routing.fallbacks", "must have lines"}, {project, "routing.fallbacks", "gpt = a b", "routing.fallbacks", "must be a model"},
		{upstream, "api_key", "sk-****", "api_key", "masked"}, {upstream, "base_url", "https://elsewhere.test", "api_key", "must be given again"}, {upstream, "priority", "x", "priority", "must be a whole number"},
		{upstream, "rewrite", "a", "rewrite", "must have lines"}, {upstream, "connect_ms", "10001", "connect_ms", "must be 0 or from 100 to 10000"}, {upstream, "answer_ms", "1", "answer_ms", "must be 0 or from 100"},
		{"/admin/tokens/new", "expires_at", "2001-01-01T00:00", "expires_at", "must be in the future"}, {"/admin/tokens/new", "max_requests", "ten", "max_requests", "must be a whole number"},
		{"/admin/tokens/new", "project_id", "proj_none", "project_id", "does not exist"}, {"/admin/tokens/new", "policy.models", "a*b", "policy.models", "only at the end"},
		{"/admin/tokens/" + p.tokenID + "/edit", "name", " x", "name", "white space"}, {"/admin/tokens/" + p.tokenID + "/rotate", "overlap_minutes", "-1", "overlap_minutes", "must be from 0"},
		{"/admin/keys/new", "role", "god", "role", "must be viewer"}, {"/admin/keys/" + keyID + "/edit", "expires_at", "soon", "expires_at", "must be a time"},
		{"/admin/prices/new", "match", "", "match", "must be a model"}, {"/admin/prices/new", "input", "-5", "input", "must be dollars"},
	} {
		form := parseForm(t, b.get(c.path).body)
		for name, v := range map[string]string{"name": "fine", "match": "some-model", "output": "1"} {
			if form.Has(name) && form.Get(name) == "" {
				form.Set(name, v)
			}
		}
		if c.name == "expires_at" && c.path == "/admin/tokens/new" {
			form.Set("lifetime", "")
		}
		form.Set(c.name, c.value)
		before := p.managedDigest()
		res := b.post(c.path, form)
		_, after, _ := strings.Cut(res.body, `name="`+c.field+`"`)
		if len(after) > 1500 {
			after = after[:1500]
		}
		if res.status != 400 || !strings.Contains(html.UnescapeString(after), c.says) || len(checkHTML(res.body)) > 0 || !strings.Contains(res.body, `aria-invalid="true"`) {
			t.Errorf("%s with %s=%q: %d, beside %s stands %s %v", c.path, c.name, c.value, res.status, c.field, after, checkHTML(res.body))
		}
		again := parseForm(t, res.body)
		for name := range form {
			if name == "once" || name == "api_key" || strings.HasPrefix(name, "policy.limits[") {
				continue
			}
			if again.Get(name) != strings.TrimSuffix(form.Get(name), "\n") && again.Get(name) != form.Get(name) && !(name == "role" || name == "project_id" || name == "overlap_minutes") {
				t.Errorf("%s with %s=%q: %s was %q and is now %q", c.path, c.name, c.value, name, form.Get(name), again.Get(name))
			}
		}
		if p.managedDigest() != before {
			t.Errorf("%s with %s=%q changed something", c.path, c.name, c.value)
		}
	}
}

// TestAdminLostUpdate (AD14): who opened a form before somebody else's change is
// told so, and overwrites nothing.
func TestAdminLostUpdate(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	for path, change := range map[string]string{
		"/admin/projects/" + p.project + "/edit": "/manage/projects/" + p.project, "/admin/tokens/" + p.tokenID + "/edit": "/manage/tokens/" + p.tokenID,
		"/admin/projects/" + p.project + "/upstreams/" + p.upstream + "/edit": "/manage/projects/" + p.project + "/upstreams/" + p.upstream,
	} {
		form := parseForm(t, b.get(path).body)
		p.manage("PATCH", change, `{"name":"theirs"}`, 200, nil)
		form.Set("name", "mine")
		res := b.post(path, form)
		if again := parseForm(t, res.body); res.status != 409 || !strings.Contains(res.body, "Someone else changed this") || again.Get("name") != "mine" || again.Get("version") != form.Get("version") {
			t.Errorf("%s: got %d %s", path, res.status, res.body)
		}
		if res := p.manageAs(p.adminKey, "GET", change, ""); !strings.Contains(res.body, "theirs") {
			t.Errorf("%s: overwritten: %s", path, res.body)
		}
	}
}

// TestAdminKeysAndBulk: keys are made, changed and revoked; nobody changes their
// own; tokens are revoked together, after a question.
func TestAdminKeysAndBulk(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	form := parseForm(t, b.get("/admin/keys/new").body)
	form.Set("name", "Grace")
	form.Set("role", "operator")
	res := b.post("/admin/keys/new", form)
	key := regexp.MustCompile(`llmpm_\w+`).FindString(res.body)
	p.secrets = append(p.secrets, key)
	if res.status != 200 || key == "" {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	if again := b.post("/admin/keys/new", form); again.status != 409 || strings.Contains(again.body, "llmpm_") {
		t.Errorf("reloaded: %d", again.status)
	}
	grace := p.signIn(key)
	own := regexp.MustCompile(`key_\w+`).FindString(b.get("/admin/account").body)
	if res := b.post("/admin/keys/"+own+"/revoke", nil); res.status != 400 || !b.isSignedIn() {
		t.Errorf("revoking one's own: %d %s", res.status, res.body)
	}
	var ids []string
	for range 3 {
		id, _ := p.newToken(`"name":"many"`)
		ids = append(ids, id)
	}
	before := p.managedDigest()
	res = grace.post("/admin/tokens/revoke", url.Values{"id": ids})
	if res.status != 200 || p.managedDigest() != before || strings.Count(res.body, "many (tok_") != 3 || len(checkHTML(res.body)) > 0 {
		t.Errorf("before it is sure: %d %s", res.status, res.body)
	}
	if res := grace.post("/admin/tokens/revoke", url.Values{"id": ids, "sure": {"yes"}}); res.status != 303 {
		t.Errorf("sure: %d %s", res.status, res.body)
	}
	for _, id := range ids {
		if res := p.manageAs(p.adminKey, "GET", "/manage/tokens/"+id, ""); !strings.Contains(res.body, `"is_active":false`) {
			t.Errorf("%s lives on", id)
		}
	}
	if res := grace.post("/admin/tokens/revoke", nil); res.header.Get("Location") != "/admin/tokens?done=none-selected" {
		t.Errorf("none: %d %v", res.status, res.header)
	}
	if res := b.post("/admin/keys/key_"+key[len(manageKeyPrefix):][:publicLen]+"/revoke", nil); res.status != 303 || grace.isSignedIn() {
		t.Errorf("revoking a key: %d", res.status)
	}
}

// TestAdminTokenList: each filter with each order shows what it says, page by page.
func TestAdminTokenList(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"other"}`, 201, &other)
	now, in := time.Now().UnixMilli(), p.instance.store
	for i := range 130 {
		project := p.project
		if i%3 == 0 {
			project = other.ID
		}
		row := &tokenRow{id: fmt.Sprintf("tok_n%03d", i), projectID: project, name: fmt.Sprintf("n%02d", i%40), hash: fmt.Appendf(nil, "%032d", i), policy: "{}", createdAt: now, updatedAt: now}
		switch i % 5 {
		case 0:
			row.expiresAt = new(now - int64(i+1)*1000)
		case 1:
			row.expiresAt = new(now + dayMS + int64(i))
		case 2:
			row.expiresAt = new(now + 30*dayMS)
		}
		if err := in.addToken(t.Context(), systemOrigin(time.Now()), row); err != nil {
			t.Fatal(err)
		}
		if i%7 == 0 {
			p.manage("DELETE", "/manage/tokens/"+row.id, "", 200, nil)
		}
	}
	is := func(i int, state string) bool {
		revoked := i%7 == 0
		switch state {
		case "active":
			return !revoked && i%5 != 0
		case "expiring":
			return !revoked && i%5 == 1
		case "expired":
			return !revoked && i%5 == 0
		case "revoked":
			return revoked
		}
		return true
	}
	link := regexp.MustCompile(`class="name" href="/admin/tokens/(tok_n\d+)"`)
	next := regexp.MustCompile(`href="(/admin/tokens\?[^"]*after=[^"]*)"`)
	for _, state := range tokenStates() {
		for _, order := range tokenOrders() {
			for _, project := range []string{"", other.ID} {
				for _, name := range []string{"", "n1"} {
					var got []string
					path := "/admin/tokens?" + url.Values{"state": {state.Value}, "order": {order.Value}, "project_id": {project}, "name": {name}}.Encode()
					for range 9 {
						res := b.get(path)
						if res.status != 200 || len(checkHTML(res.body)) > 0 {
							t.Fatalf("%s: %d %v", path, res.status, checkHTML(res.body))
						}
						for _, m := range link.FindAllStringSubmatch(res.body, -1) {
							got = append(got, m[1])
						}
						m := next.FindStringSubmatch(res.body)
						if m == nil {
							break
						}
						path = html.UnescapeString(m[1])
					}
					var want []string
					for i := range 130 {
						if is(i, state.Value) && !(order.Value == "ends" && state.Value != "revoked" && name == "" && is(i, "revoked")) && (project == "" || i%3 == 0) && strings.HasPrefix(fmt.Sprintf("n%02d", i%40), name) {
							want = append(want, fmt.Sprintf("tok_n%03d", i))
						}
					}
					if order.Value == "" && state.Value == "" && name == "" && !slices.IsSortedFunc(got, func(a, b string) int { return strings.Compare(b, a) }) {
						t.Errorf("not newest first: %v", got)
					}
					if order.Value == "oldest" && name == "" && !slices.IsSorted(got) {
						t.Errorf("not oldest first: %v", got)
					}
					slices.Sort(got)
					if !slices.Equal(got, want) {
						t.Errorf("state %q order %q project %q name %q:\ngot  %v\nwant %v", state.Value, order.Value, project, name, got, want)
					}
				}
			}
		}
	}
	for _, query := range []string{"state=;drop", "order=x", "after=x", "after=-1.", "after=zzzzzzzzzzzzzzzz.", "order=ends&after=5.!", "name=" + strings.Repeat("x", 101), "state=active&state=active"} { // AD15
		if res := b.get("/admin/tokens?" + query); res.status != 400 {
			t.Errorf("%s: got %d", query, res.status)
		}
	}
	for _, name := range []string{"%", "_", "n__", "*", "'", `\`} {
		if res := b.get("/admin/tokens?name=" + url.QueryEscape(name)); res.status != 200 || link.MatchString(res.body) {
			t.Errorf("%q: got %d %s", name, res.status, res.body)
		}
	}
	if res := b.get("/admin/tokens?name=tok_n007"); res.header.Get("Location") != "/admin/tokens/tok_n007" {
		t.Errorf("an id: %d %v", res.status, res.header)
	}
}

// TestAdminContent: what is kept of a call is shown to admins, by a form alone,
// and erased.
func TestAdminContent(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	p.chat()
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"keep_content_days":2}}`, 200, nil)
	p.chat(`"user":"<script>"`)
	rows := p.ledger()
	if res := b.post("/admin/requests/"+rows[0].ID+"/content", nil); res.status != 404 {
		t.Errorf("before: got %d %s", res.status, res.body)
	}
	path := "/admin/requests/" + rows[1].ID + "/content"
	res := b.post(path, nil)
	if res.status != 200 || !strings.Contains(res.body, promptCanary) || strings.Contains(res.body, "<script>") || len(checkHTML(res.body)) > 0 {
		t.Errorf("got %d %v %s", res.status, checkHTML(res.body), res.body)
	}
	if res := b.get(path); res.status != 405 {
		t.Errorf("by a link: %d", res.status)
	}
	_, key := p.newKey("o", "operator")
	if res := p.signIn(key).post(path, nil); res.status != 403 {
		t.Errorf("an operator: %d", res.status)
	}
	if res := b.post("/admin/projects/"+p.project+"/erase", nil); res.status != 303 || b.post(path, nil).status != 404 {
		t.Errorf("erased: %d", res.status)
	}
	if page := b.get("/admin/audit?object=" + rows[1].ID).body; !strings.Contains(page, "reveal") {
		t.Errorf("the trail does not tell who looked: %s", page)
	}
}

// An htmlTag is an opening tag.
type htmlTag struct {
	name      string
	attrs     map[string]string
	ancestors []string // names of the open tags around it
}

// readHTML returns the opening tags of a page and its text, or what is wrong.
func readHTML(page string) (tags []htmlTag, text string, err error) {
	void := []string{"meta", "link", "input", "img", "br", "hr", "col", "rect", "path", "line", "circle", "polyline", "polygon"}
	var open []string
	var b strings.Builder
	for rest := page; rest != ""; {
		i := strings.IndexByte(rest, '<')
		if i < 0 {
			b.WriteString(rest)
			break
		}
		b.WriteString(rest[:i])
		rest = rest[i:]
		switch {
		case strings.HasPrefix(rest, "<!DOCTYPE html>"):
			rest = rest[len("<!DOCTYPE html>"):]
		case strings.HasPrefix(rest, "</"):
			name, after, ok := strings.Cut(rest[2:], ">")
			if !ok || len(open) == 0 || open[len(open)-1] != name {
				return tags, "", fmt.Errorf("</%s> closes %v", clip(name, 40), open)
			}
			open, rest = open[:len(open)-1], after
			b.WriteByte(' ')
		default:
			tag, closed, after, err := readTag(rest)
			if err != nil {
				return tags, "", err
			}
			tag.ancestors = slices.Clone(open)
			tags = append(tags, tag)
			if !slices.Contains(void, tag.name) && !closed {
				open = append(open, tag.name)
			}
			if tag.name == "script" && !strings.HasPrefix(after, "</script>") || tag.name == "style" {
				return tags, "", fmt.Errorf("inline %s", tag.name)
			}
			rest = after
		}
	}
	if len(open) > 0 {
		return tags, "", fmt.Errorf("still open: %v", open)
	}
	return tags, html.UnescapeString(b.String()), nil
}

// readTag reads one opening tag: only names, and values in double quotes.
func readTag(rest string) (tag htmlTag, closed bool, after string, err error) {
	word := func(s string) int {
		n := 0
		for n < len(s) && (s[n] >= 'a' && s[n] <= 'z' || s[n] >= 'A' && s[n] <= 'Z' || s[n] >= '0' && s[n] <= '9' || s[n] == '-' || s[n] == ':') {
			n++
		}
		return n
	}
	s := rest[1:]
	n := word(s)
	if n == 0 {
		return tag, false, "", fmt.Errorf("a tag without a name: %q", clip(rest, 60))
	}
	tag = htmlTag{name: s[:n], attrs: map[string]string{}}
	for s = s[n:]; ; {
		s = strings.TrimLeft(s, " \n")
		switch {
		case strings.HasPrefix(s, "/>"):
			return tag, true, s[2:], nil
		case strings.HasPrefix(s, ">"):
			return tag, false, s[1:], nil
		}
		n := word(s)
		if n == 0 {
			return tag, false, "", fmt.Errorf("in <%s>: %q", tag.name, clip(s, 60))
		}
		name, value := s[:n], ""
		s = s[n:]
		if strings.HasPrefix(s, "=") {
			v, more, ok := strings.Cut(strings.TrimPrefix(s, `="`), `"`)
			if !ok || !strings.HasPrefix(s, `="`) {
				return tag, false, "", fmt.Errorf("in <%s %s: not quoted", tag.name, name)
			}
			value, s = html.UnescapeString(v), more
		}
		if _, twice := tag.attrs[name]; twice {
			return tag, false, "", fmt.Errorf("in <%s>: %s twice", tag.name, name)
		}
		tag.attrs[name] = value
	}
}

// checkHTML returns what is wrong with a page.
func checkHTML(page string) (problems []string) {
	tags, _, err := readHTML(page)
	if err != nil {
		return []string{err.Error()}
	}
	known := strings.Fields(`html head meta title link script body a header img nav ul li div span form button main p h1 h2 h3 section table thead tbody tr th td
		caption time code dl dt dd input select option label textarea strong br pre fieldset legend svg rect path line circle polyline polygon g text desc details summary ol small abbr figure figcaption tspan tfoot optgroup em colgroup col`)
	complain := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	ids, labelled := map[string]bool{}, map[string]bool{}
	for _, t := range tags {
		if id, ok := t.attrs["id"]; ok {
			if ids[id] || id == "" || strings.ContainsAny(id, " \"<>") {
				complain("the id %q is there twice, or is none", id)
			}
			ids[id] = true
		}
		if t.name == "label" {
			labelled[t.attrs["for"]] = true
		}
	}
	for _, t := range tags {
		if !slices.Contains(known, t.name) {
			complain("<%s> is not one of ours", t.name)
		}
		for name, value := range t.attrs {
			if strings.HasPrefix(name, "on") || name == "style" || name == "srcdoc" {
				complain("<%s> has %s", t.name, name)
			}
			if (name == "href" || name == "src" || name == "action" || name == "formaction") && !strings.HasPrefix(value, "/admin/") && !strings.HasPrefix(value, "#") {
				complain("<%s %s=%q> leads elsewhere", t.name, name, value)
			}
			if name == "for" || name == "aria-describedby" || name == "aria-labelledby" || name == "data-copy" {
				for id := range strings.FieldsSeq(value) {
					if !ids[id] {
						complain("<%s %s=%q> names nothing", t.name, name, id)
					}
				}
			}
		}
		switch t.name {
		case "input", "select", "textarea":
			if t.attrs["type"] != "hidden" && !labelled[t.attrs["id"]] && t.attrs["aria-label"] == "" {
				complain("<%s name=%q> has no label", t.name, t.attrs["name"])
			}
		case "form":
			if slices.Contains(t.ancestors, "form") || t.attrs["method"] == "" || t.attrs["action"] == "" {
				complain("a form within a form, or without method or action")
			}
		case "button":
			if t.attrs["type"] == "" {
				complain("a button without a type")
			}
		case "img":
			if _, ok := t.attrs["alt"]; !ok {
				complain("an image without alt")
			}
		}
	}
	return problems
}

// pageLinks returns the places that a page leads to with GET, and the actions of
// forms that post.
func pageLinks(page string) (gets, posts []string) {
	tags, _, _ := readHTML(page)
	for _, t := range tags {
		switch {
		case t.name == "a" && strings.HasPrefix(t.attrs["href"], "/"):
			gets = append(gets, t.attrs["href"])
		case t.name == "form" && t.attrs["method"] == "get":
			gets = append(gets, t.attrs["action"])
		case t.name == "form":
			posts = append(posts, t.attrs["action"])
		}
	}
	return gets, posts
}
