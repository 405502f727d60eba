// Tests of the pages as a whole (group AD): roles, protection against other sites, and that every
// page is sound HTML whatever it shows.
package main

import (
	"fmt"
	"html"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
)

// A browser is a client of the pages with a session.
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

// post sends a form as a browser does from one of our pages.
func (b *browser) post(path string, form url.Values, headers ...string) testResponse {
	b.p.t.Helper()
	h := []string{"Content-Type", "application/x-www-form-urlencoded", "Sec-Fetch-Site", "same-origin"}
	if b.cookie != "" {
		h = append(h, "Cookie", b.cookie)
	}
	return b.p.do("POST", path, form.Encode(), append(h, headers...)...)
}

// follow returns the page that a form's response leads to, as the browser shows it with the notice.
func (b *browser) follow(res testResponse) string {
	b.p.t.Helper()
	var cookie strings.Builder
	cookie.WriteString(b.cookie)
	for _, c := range (&http.Response{Header: res.header}).Cookies() {
		cookie.WriteString("; " + c.Name + "=" + c.Value)
	}
	return b.p.do("GET", res.header.Get("Location"), "", "Cookie", cookie.String()).body
}

// seedObjects creates one of each kind of object, all with the same name, and returns the paths of
// the pages that show them.
func (p *testProxy) seedObjects(name string) []string {
	p.t.Helper()
	q := quoteJSON(name)
	n := quoteJSON(strings.NewReplacer(" ", "_", "*", "_").Replace(name)) // valid as a model
	p.manage("PATCH", "/manage/projects/"+p.project, `{"name":`+q+`,"policy":{"models":[`+n+`,"gpt-4o*"],
		"addresses":["10.0.0.0/8","127.0.0.1"],"limits":[{"count":"requests","max":60,"per":"day","model":`+n+`},
		{"count":"dollars","max":1.5,"per":"month","shadow":true},{"count":"concurrent","max":5}]}}`, 200, nil)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream,
		`{"name":`+q+`,"note":`+q+`,"models":[`+n+`,"gpt*"],"rewrite":{`+n+`:"x"}}`, 200, nil)
	id, _ := p.newToken(`"name":` + q + `,"max_requests":5,"idle_expiry_minutes":90,
		"policy":{"limits":[{"count":"tokens","max":1000,"per":"day"}]}`)
	gone, _ := p.newToken(`"name":` + q + `,"expires_at":null`)
	p.manage("DELETE", "/manage/tokens/"+gone, "", 200, nil)
	p.newToken(`"name":` + q + `,"duration_hours":1`)
	keyID, _ := p.newKey("spare", "viewer")
	p.manage("PATCH", "/manage/keys/"+keyID, `{"name":`+q+`}`, 200, nil)
	var price struct{ ID string }
	match := strings.ReplaceAll(name, " ", "_")
	p.manage("POST", "/manage/prices", `{"match":`+quoteJSON(match)+`,"input":1.5,"output":2}`, 201, &price)
	p.do("POST", "/v1/chat/completions", `{"model":`+n+`,"messages":[]}`, "Authorization", "Bearer "+p.token,
		"Content-Type", "application/json", "User-Agent", "x")
	p.waitSettled()
	project, upstream := "/admin/projects/"+p.project, "/admin/projects/"+p.project+"/upstreams/"+p.upstream
	return []string{
		"/admin/", "/admin/account", "/admin/projects", project, project + "/edit",
		upstream + "/edit", upstream + "/delete", project + "/route",
		project + "/route?model=" + url.QueryEscape(strings.ReplaceAll(match, "*", "x")),
		project + "/route?api=anthropic&model=a+b",
		"/admin/tokens", "/admin/tokens/" + id, "/admin/tokens/" + id + "/edit", "/admin/tokens/" + gone,
		"/admin/tokens/new?project_id=" + p.project,
		"/admin/keys", "/admin/keys/" + keyID + "/edit", "/admin/prices", "/admin/prices/" + price.ID + "/delete",
		"/admin/audit", "/admin/audit/verify", "/admin/settings", "/admin/streams",
		"/admin/dashboard?by=model", "/admin/dashboard?period=24h&measure=tokens",
		"/admin/dashboard?period=90d&project=" + p.project,
		"/admin/requests", "/admin/requests/" + p.lastCall().ID,
		"/admin/requests?from=x&model=" + url.QueryEscape(name), "/admin/requests?id=" + url.QueryEscape(name),
		"/admin/prices?model=" + url.QueryEscape(match), "/admin/prices/list?search=zz-" + url.QueryEscape(match),
		"/admin/prices/simulate?input_tokens=1&model=" + url.QueryEscape(match),
		"/admin/tokens?name=" + url.QueryEscape(name),
		"/admin/audit?object=" + url.QueryEscape(name),
	}
}

func quoteJSON(s string) string { return string(mustMarshal(s)) }

// expandPattern fills in a pattern of adminTable.
func (p *testProxy) expandPattern(pattern string) string {
	_, path, _ := strings.Cut(pattern, " ")
	id := p.tokenID
	for prefix, other := range map[string]string{"/admin/projects/": p.project, "/admin/keys/": "key_none",
		"/admin/webhooks/": "hook_none", "/admin/prices/": "price_none", "/admin/streams/": "req_0000000000000",
		"/admin/requests/": "req_0000000000000"} {
		if strings.HasPrefix(path, prefix) {
			id = other
		}
	}
	return strings.NewReplacer("{id}", id, "{upstream}", p.upstream, "{delivery}", "del_none", "{$}", "").Replace(path)
}

// managedDigest returns everything that administrators manage, to detect changes.
func (p *testProxy) managedDigest() string {
	p.t.Helper()
	requireSQLite(p.t, "its queries are written for SQLite")
	var b strings.Builder
	for _, query := range []string{
		`SELECT group_concat(id || name || is_active || policy || version || coalesce(deleted_at, '')) FROM projects`,
		`SELECT group_concat(id || name || hex(sealed_key) || version) FROM upstreams`,
		`SELECT group_concat(id || name || hex(hash) || coalesce(revoked_at, '') || version || policy) FROM tokens`,
		`SELECT group_concat(id || name || role || coalesce(revoked_at, '') || version) FROM management_keys`,
		`SELECT group_concat(id || match || price) FROM prices`,
		`SELECT group_concat(hex(hash)) FROM sessions`,
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

// requiredRole returns the least role for a method and path, from the table of routes.
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
		p.t.Errorf("%s %s matches no route", method, path)
	}
	return needs[pattern]
}

// TestAdminRoles: each role can use exactly its routes, and no page links to a route that its
// viewer may not use.
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
					continue // other tests cover these
				}
				res := b.get(path)
				if method == "POST" {
					res = b.post(path, url.Values{"version": {"1"}})
				}
				allowed := who.rank() >= rt.minRole.rank()
				if forbidden := res.status == http.StatusForbidden; forbidden == allowed || res.status >= 500 {
					t.Errorf("%s as %s: got %d", rt.pattern, who, res.status)
				}
				if problems := checkHTML(res.body); res.status != http.StatusSeeOther &&
					res.header.Get("Content-Type") == "text/html; charset=utf-8" && len(problems) > 0 {
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
					t.Errorf("%s shows the role %s a link to %s", path, who, to)
				}
			}
			for _, to := range posts {
				if need := p.requiredRole("POST", to); need.rank() > who.rank() {
					t.Errorf("%s shows the role %s a form for %s", path, who, to)
				}
			}
		}
	}
}

// TestAdminGetsChangeNothing (AD2): following every link changes nothing.
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
		if problems := checkHTML(res.body); res.status == 200 &&
			strings.HasPrefix(res.header.Get("Content-Type"), "text/html") && len(problems) > 0 {
			t.Errorf("%s: %v", path, problems)
		}
		if strings.Contains(res.body, `-help"></p>`) {
			t.Errorf("%s: a field has a help text that does not exist", path)
		}
		gets, _ := pageLinks(res.body)
		todo = append(todo, gets...)
	}
	for _, method := range []string{"PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"} { // AD3
		res := p.do(method, "/admin/projects", "", "Cookie", b.cookie, "Sec-Fetch-Site", "same-origin")
		if res.status != 405 {
			t.Errorf("%s: got %d", method, res.status)
		}
	}
	b.get("/admin/projects/" + p.project + "/delete?_method=POST&_method=DELETE")
	if p.managedDigest() != before {
		t.Error("following links changed something")
	}
	if len(seen) < 60 {
		t.Errorf("only %d pages were found", len(seen))
	}
}

// TestAdminCrossOrigin (AD1, AD4): forms are accepted from our own pages only.
func TestAdminCrossOrigin(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"PUBLIC_URL": "https://llm.example.test"})
	b := p.signIn(p.adminKey)
	before := p.managedDigest()
	host := strings.TrimPrefix(p.url, "http://")
	for name, headers := range map[string][]string{
		"cross-site":             {"Sec-Fetch-Site", "cross-site"},
		"same-site":              {"Sec-Fetch-Site", "same-site"},
		"odd":                    {"Sec-Fetch-Site", "x"},
		"two":                    {"Sec-Fetch-Site", "same-origin", "Sec-Fetch-Site", "cross-site"},
		"cross-site, our origin": {"Sec-Fetch-Site", "cross-site", "Origin", p.url},
		"evil origin":            {"Origin", "http://evil.test"},
		"null":                   {"Origin", "null"},
		"nothing":                nil,
		"other port":             {"Origin", "http://127.0.0.1:1"},
		"other scheme":           {"Origin", "https://" + host},
		"two origins":            {"Origin", p.url, "Origin", p.url},
		"prefix":                 {"Origin", p.url + ".evil.test"},
		"public over http":       {"Host", "llm.example.test", "Origin", "http://llm.example.test"},
	} {
		for _, rt := range p.instance.server.admin.adminTable() {
			if !strings.Contains(rt.pattern, "POST ") {
				continue
			}
			path := p.expandPattern(rt.pattern)
			res := p.do("POST", path, "sure=yes&id="+p.tokenID+"&name=x&once=y&key="+p.adminKey,
				append([]string{"Cookie", b.cookie, "Content-Type", "application/x-www-form-urlencoded"},
					headers...)...)
			if res.status != http.StatusForbidden {
				t.Errorf("%s, %s: got %d", name, path, res.status)
			}
		}
	}
	for _, host := range []string{"evil.test", "evil.test:8080", "127.0.0.1.evil.test", ""} {
		for _, method := range []string{"GET", "POST"} {
			res := p.sendRaw(method + " /admin/projects HTTP/1.1\r\nHost: " + host + "\r\nOrigin: http://" + host +
				"\r\nCookie: " + b.cookie +
				"\r\nSec-Fetch-Site: same-origin\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			if !strings.HasPrefix(res, "HTTP/1.1 421 ") {
				t.Errorf("%s to %q: got %s", method, host, clip(res, 60))
			}
		}
	}
	for _, kind := range []string{"application/json", "text/plain", "multipart/form-data; boundary=x", ""} {
		res := p.do("POST", "/admin/tokens/"+p.tokenID+"/revoke", "sure=yes", "Cookie", b.cookie, "Sec-Fetch-Site",
			"same-origin", "Content-Type", kind)
		if res.status != http.StatusUnsupportedMediaType {
			t.Errorf("%q: got %d", kind, res.status)
		}
	}
	if p.managedDigest() != before {
		t.Error("something changed")
	}
	if res := p.do("POST", "/admin/tokens/"+p.tokenID+"/revoke", "", "Cookie", b.cookie, "Origin", p.url,
		"Content-Type", "application/x-www-form-urlencoded"); res.status != http.StatusSeeOther {
		t.Errorf("an old browser on our own page: %d %s", res.status, res.body)
	}
}

// TestAdminHeaders (AD5): every response has the security headers.
func TestAdminHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	static := "/admin/static/" + p.instance.server.admin.pages.hashedNames["admin.css"]
	for what, res := range map[string]testResponse{
		"sign-in":      p.do("GET", "/admin/sign-in", ""),
		"page":         b.get("/admin/projects"),
		"redirect":     p.do("GET", "/admin/projects", ""),
		"not found":    b.get("/admin/nothing"),
		"static":       p.do("GET", static, ""),
		"no static":    p.do("GET", "/admin/static/x.css", ""),
		"wrong method": p.do("DELETE", "/admin/projects", ""),
		"forbidden":    p.do("POST", "/admin/sign-in", ""),
		"wrong host":   p.do("GET", "/admin/", "", "Host", "evil.test"),
		"wrong key":    b.post("/admin/sign-in", url.Values{"key": {"x"}}),
		"wrong type":   p.do("POST", "/admin/sign-in", "x", "Sec-Fetch-Site", "same-origin"),
		"form":         b.get("/admin/projects/new"),
		"bad form":     b.post("/admin/projects/new", url.Values{"name": {""}}),
	} {
		csp := res.header.Get("Content-Security-Policy")
		for _, part := range []string{"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'",
			"form-action 'self'", "script-src 'self'", "style-src 'self'"} {
			if !slices.Contains(strings.Split(csp, "; "), part) {
				t.Errorf("%s: no %s in %s", what, part, csp)
			}
		}
		want := map[string]string{"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
			"Cross-Origin-Opener-Policy": "same-origin", "X-Frame-Options": "DENY", "Cache-Control": "no-store"}
		if what == "static" {
			want["Cache-Control"] = "public, max-age=31536000, immutable" // the name contains a hash of the content
		}
		if what == "wrong host" { // over plain HTTP
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
	plain := p.do("GET", "/admin/sign-in", "", "Host", "10.1.2.3")
	if got := plain.header.Get("Referrer-Policy"); got != "same-origin" {
		t.Errorf("plain HTTP: %s", got)
	}
	// AD19
	for _, path := range []string{"/admin/static/", "/admin/static/../static/admin.css",
		"/admin/static/%2e%2e/admin.css", "/admin/static/admin.css", "/admin/static/..", "/admin/static/icon.svg/x"} {
		if res := p.do("GET", path, ""); res.status != 404 &&
			!(res.status == 303 && strings.HasPrefix(res.header.Get("Location"), "/admin/sign-in")) {
			t.Errorf("%s: got %d", path, res.status)
		}
	}
}

// TestAdminHostileText (AD6): no name changes the structure of a page.
func TestAdminHostileText(t *testing.T) {
	t.Parallel()
	// Each group is one name. What means something only at the start of a text is the first of its group.
	groups := [][]string{
		{`javascript:alert(1)`, `<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `<!--`},
		{`=cmd|'/c calc'!A1`, `' onmouseover='alert(1)`, `</title><script>alert(1)</script>`, `]]><x>`},
		{`"autofocus onfocus="x`, `</textarea><svg onload=alert(1)>`, `&lt;script&gt;`, `\u003cscript\u003e`},
		{`%3Cscript%3E`, `{{.}}{{template "layout"}}`, `</select><b>`, `<iframe srcdoc="<script>1</script>">`},
		{"`+alert(1)+`", `${7*7}<%= 7 %>`, `👩‍💻<i>`, `--></style><style>*{}`},
	}
	shape := func(body string) string {
		tags, _, err := readHTML(body)
		if err != nil {
			return err.Error()
		}
		var b strings.Builder
		for _, tag := range tags {
			if slices.Contains([]string{"svg", "text", "line", "path", "circle", "rect", "g", "title"}, tag.name) {
				continue // a chart depends on how long calls took; no payload passes unescaped, see below
			}
			b.WriteString(tag.name + " " + strings.Join(slices.Sorted(maps.Keys(tag.attrs)), " ") + "\n")
		}
		return b.String()
	}
	var plain []string
	for i, payloads := range append([][]string{{"Ada"}}, groups...) {
		p, payload := newTest(t, nil), strings.Join(payloads, " ")
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
			} else if got := shape(res.body); got != plain[j] && !strings.HasPrefix(path, "/admin/tokens/new") &&
				!strings.HasPrefix(path, "/admin/requests/req_") {
				was, is := firstDifference(plain[j], got)
				t.Errorf("%q changes the structure of %s: %q instead of %q", payload, path, is, was)
			}
			for _, payload := range payloads {
				if strings.ContainsAny(payload, "<") && strings.Contains(res.body, payload) {
					t.Errorf("%q is not escaped on %s", payload, path)
				}
			}
		}
	}
}

// firstDifference returns the first lines that differ, each with the three before it.
func firstDifference(a, b string) (ofA, ofB string) {
	x, y := strings.SplitAfter(a, "\n"), strings.SplitAfter(b, "\n")
	i := 0
	for i < min(len(x), len(y)) && x[i] == y[i] {
		i++
	}
	around := func(lines []string) string {
		return strings.Join(lines[min(max(i-3, 0), len(lines)):min(i+1, len(lines))], "")
	}
	return around(x), around(y)
}

// TestAdminOff (AD21): the pages can be turned off.
func TestAdminOff(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"ADMIN_PAGES": "false"})
	for _, path := range []string{"/admin", "/admin/", "/admin/sign-in", "/admin/static/admin.css"} {
		if res := p.do("GET", path, ""); res.status != 404 || strings.Contains(res.body, "html") {
			t.Errorf("%s: got %d %s", path, res.status, res.body)
		}
	}
}

// An htmlTag is an opening tag.
type htmlTag struct {
	name      string
	attrs     map[string]string
	ancestors []string // names of the open tags around it
}

// readHTML returns the opening tags of a page and its text.
func readHTML(page string) (tags []htmlTag, text string, err error) {
	void := []string{"meta", "link", "input", "img", "br", "hr", "col", "rect", "path", "line", "circle", "polyline",
		"polygon"}
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

// readTag reads one opening tag. Values must be in double quotes.
func readTag(rest string) (tag htmlTag, closed bool, after string, err error) {
	word := func(s string) int {
		n := 0
		for n < len(s) && (s[n] >= 'a' && s[n] <= 'z' || s[n] >= 'A' && s[n] <= 'Z' || s[n] >= '0' && s[n] <= '9' ||
			s[n] == '-' || s[n] == ':') {
			n++
		}
		return n
	}
	s := rest[1:]
	n := word(s)
	if n == 0 {
		return tag, false, "", fmt.Errorf("a tag has no name: %q", clip(rest, 60))
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
				return tag, false, "", fmt.Errorf("in <%s %s: the value is not quoted", tag.name, name)
			}
			value, s = html.UnescapeString(v), more
		}
		if _, twice := tag.attrs[name]; twice {
			return tag, false, "", fmt.Errorf("in <%s>: %s twice", tag.name, name)
		}
		tag.attrs[name] = value
	}
}

// checkHTML returns the problems of a page.
func checkHTML(page string) (problems []string) {
	tags, _, err := readHTML(page)
	if err != nil {
		return []string{err.Error()}
	}
	known := strings.Fields(`html head meta title link script body a header img nav ul li div span form button main p h1
		h2 h3 section table thead tbody tfoot tr th td caption time code dl dt dd input select option label
		textarea strong br pre fieldset legend svg rect path line circle g text details summary colgroup col
		template datalist`)
	complain := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	ids, labelled := map[string]bool{}, map[string]bool{}
	for _, t := range tags {
		if id, ok := t.attrs["id"]; ok {
			if ids[id] || id == "" || strings.ContainsAny(id, " \"<>") {
				complain("the id %q is repeated or invalid", id)
			}
			ids[id] = true
		}
		if t.name == "label" {
			labelled[t.attrs["for"]] = true
		}
	}
	for _, t := range tags {
		if !slices.Contains(known, t.name) {
			complain("<%s> is not an element that pages use", t.name)
		}
		for name, value := range t.attrs {
			if strings.HasPrefix(name, "on") || name == "style" || name == "srcdoc" {
				complain("<%s> has %s", t.name, name)
			}
			if (name == "href" || name == "src" || name == "action" || name == "formaction") &&
				!strings.HasPrefix(value, "/admin/") && !strings.HasPrefix(value, "#") && value != "/openapi.yaml" {
				complain("<%s %s=%q> is not a page of ours", t.name, name, value)
			}
			if name == "for" || name == "aria-describedby" || name == "aria-labelledby" || name == "data-copy" {
				for id := range strings.FieldsSeq(value) {
					if !ids[id] {
						complain("<%s %s=%q> refers to no element", t.name, name, id)
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
				complain("a form is nested, or has no method or action")
			}
		case "button":
			if t.attrs["type"] == "" {
				complain("a button has no type")
			}
		case "img":
			if _, ok := t.attrs["alt"]; !ok {
				complain("an image has no alt")
			}
		}
	}
	return problems
}

// pageLinks returns the targets of links and GET forms, and those of POST forms.
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

// TestAdminNotices: the page after a form says what was done and to how many, once. A reload, a saved address and a
// page that refreshes itself do not repeat it.
func TestAdminNotices(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	one, _ := p.newToken(`"name":"one"`)
	two, _ := p.newToken(`"name":"two"`)
	three, _ := p.newToken(`"name":"three"`)
	project := "/admin/projects/" + p.project
	for _, c := range []struct {
		path, form, says string
	}{
		{"/admin/tokens/" + one + "/revoke", "", "1 token revoked, effective immediately."},
		{"/admin/tokens/revoke", "sure=yes&id=" + two + "&id=" + three, "2 tokens revoked, effective immediately."},
		{project + "/revoke-tokens", "", "1 token revoked, effective immediately."},
		{project + "/revoke-tokens", "", "There was no token to revoke."},
		{project + "/erase", "", "There was no stored content to delete."},
		{project + "/empty-cache", "", "The cache was empty already."},
		{project + "/deactivate", "", "Project deactivated. Its tokens no longer work."},
		{project + "/activate", "", "Project activated."},
		{"/admin/prices/new", "match=m&input=1", "Price set."},
		{"/admin/projects/new", "name=none&provider=openai", "Next, add an upstream"},
		{project + "/delete", "", "Project deleted."},
	} {
		form, err := url.ParseQuery(c.form)
		if err != nil {
			t.Fatal(err)
		}
		res := b.post(c.path, form)
		if page := b.follow(res); res.status != 303 || !strings.Contains(page, c.says) {
			t.Errorf("%s: %d %v, and the page does not say %q", c.path, res.status, res.header, c.says)
		}
		if page := b.get(res.header.Get("Location")).body; strings.Contains(page, `class="notice"`) {
			t.Errorf("%s: without its cookie the page has a notice", c.path)
		}
	}
	shown := p.do("GET", "/admin/tokens?done=saved", "", "Cookie", b.cookie+"; llm-proxy-notice=saved.1")
	if set := shown.header.Values("Set-Cookie"); strings.Count(shown.body, `class="notice"`) != 1 || len(set) != 1 ||
		!strings.HasPrefix(set[0], "llm-proxy-notice=;") || !strings.Contains(set[0], "Max-Age=0") {
		t.Errorf("a shown notice is not removed: %q", set)
	}
	for _, cookie := range []string{"saved", "saved.x", "saved.-1", "<b>.1", "saved.1.2", ".", "nothing.1"} {
		res := p.do("GET", "/admin/tokens", "", "Cookie", b.cookie+"; llm-proxy-notice="+cookie)
		if res.status != 200 || strings.Contains(res.body, `class="notice"`) {
			t.Errorf("the notice %q: %d %s", cookie, res.status, res.body)
		}
	}
	res := p.do("GET", "/admin/tokens", "", "Cookie", b.cookie+"; llm-proxy-notice=saved.1", "X-Auto-Refresh", "1")
	if strings.Contains(res.body, `class="notice"`) || len(res.header.Values("Set-Cookie")) != 0 {
		t.Errorf("a page that refreshes itself took the notice: %v", res.header)
	}
}
