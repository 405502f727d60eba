// Tests of /manage as a whole: who may do what, what bodies and queries are
// refused, pages, versions; and projects with their upstreams.
package main

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestManageRoles (AU15, AU16): each route against each kind of key, from the
// table of routes itself.
func TestManageRoles(t *testing.T) {
	t.Parallel()
	const environment = "environment-key-Jx81LmQp04TzVb67wYcN" // of MANAGEMENT_TOKEN
	p := newTest(t, map[string]string{"MANAGEMENT_TOKEN": environment, "TRUSTED_PROXIES": "127.0.0.1"})
	p.secrets = append(p.secrets, environment)
	_, viewer := p.newKey("v", "viewer")
	_, operator := p.newKey("o", "operator")
	revokedID, revoked := p.newKey("r", "admin")
	p.manage("DELETE", "/manage/keys/"+revokedID, "", 200, nil)
	expiredID, expired := p.newKey("e", "admin")
	if _, err := p.instance.store.writeDB.ExecContext(t.Context(), `UPDATE management_keys SET expires_at = ? WHERE id = ?`, time.Now().UnixMilli()-1, expiredID); err != nil {
		t.Fatal(err)
	}
	denied := func(key, scheme string) func(manageRoute) []string { // header pairs, for no role at all
		return func(manageRoute) []string { return []string{"Authorization", scheme + key} }
	}
	addresses := 0
	for who, c := range map[string]struct {
		headers func(manageRoute) []string
		rank    int
	}{
		"viewer": {denied(viewer, "Bearer "), 1}, "operator": {denied(operator, "Bearer "), 2}, "admin": {denied(p.adminKey, "bearer "), 3},
		"MANAGEMENT_TOKEN": {denied(environment, "Bearer "), 3}, "no scheme": {denied(p.adminKey, ""), 0}, "basic": {denied(p.adminKey, "Basic "), 0},
		"a token": {denied(p.token, "Bearer "), 0}, "revoked": {denied(revoked, "Bearer "), 0}, "expired": {denied(expired, "Bearer "), 0},
		"part of MANAGEMENT_TOKEN": {denied(environment[:32], "Bearer "), 0}, "empty": {denied("", "Bearer "), 0},
		"none":      {func(manageRoute) []string { return nil }, 0},
		"cookie":    {func(manageRoute) []string { return []string{"Cookie", "session=" + p.adminKey} }, 0},
		"x-api-key": {func(manageRoute) []string { return []string{"X-Api-Key", p.adminKey} }, 0},
		"two": {func(manageRoute) []string {
			return []string{"Authorization", "Bearer " + viewer, "Authorization", "Bearer " + p.adminKey}
		}, 0},
	} {
		for _, rt := range p.instance.manage.manageTable() {
			method, path := p.operationPath(rt.pattern)
			addresses++ // one each, for an address that fails often is slowed down
			headers := append(c.headers(rt), "X-Forwarded-For", fmt.Sprintf("10.%d.%d.1", addresses/256, addresses%256))
			res := p.do(method, path+"?no_such=1", "", headers...)
			want := 400 // let in, and refused for the parameter
			switch {
			case c.rank == 0:
				want = 401
			case c.rank < rt.minRole.rank():
				want = 403
			}
			if res.status != want {
				t.Errorf("%s as %s: got %d %s, want %d", rt.pattern, who, res.status, res.body, want)
			}
			if want == 401 && res.body != `{"error":{"message":"A valid management key is needed: Authorization: Bearer \u003ckey\u003e.","type":"invalid_request_error","param":null,"code":"invalid_management_key"}}`+"\n" {
				t.Errorf("%s as %s: tells more: %s", rt.pattern, who, res.body)
			}
		}
	}
	for _, key := range []string{p.adminKey, environment} { // the other way round
		if res := p.do("GET", "/v1/models", "", "Authorization", "Bearer "+key); res.status != 401 {
			t.Errorf("a management key on /v1: got %d", res.status)
		}
	}
}

// TestManageGuessing: wrong keys slow their address down; a right one is let in
// even from there, so that a guesser locks nobody out.
func TestManageGuessing(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"TRUSTED_PROXIES": "127.0.0.1"})
	for range maxAuthFailures {
		if res := p.manageAs("guess", "GET", "/manage/projects", "", "X-Forwarded-For", "192.0.2.7"); res.status != 401 {
			t.Fatalf("got %d", res.status)
		}
	}
	res := p.manageAs("guess", "GET", "/manage/projects", "", "X-Forwarded-For", "192.0.2.7")
	if res.status != 429 || res.header.Get("Retry-After") == "" {
		t.Errorf("got %d %v", res.status, res.header)
	}
	if res := p.manageAs("guess", "GET", "/manage/projects", "", "X-Forwarded-For", "192.0.2.8"); res.status != 401 {
		t.Errorf("another address: got %d", res.status)
	}
	if res := p.manageAs(p.adminKey, "GET", "/manage/projects", "", "X-Forwarded-For", "192.0.2.7"); res.status != 200 {
		t.Errorf("the right key: got %d", res.status)
	}
}

// TestManageBodies (AD12, AD13, AU17): what is not exactly one JSON object with
// known fields is refused, and nothing is stored.
func TestManageBodies(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	deep := strings.Repeat("[", 100_000)
	for _, c := range []struct {
		body   string
		status int
		param  string
	}{
		{`[]`, 400, ""}, {`"x"`, 400, ""}, {`null`, 400, ""}, {`7`, 400, ""}, {`{`, 400, ""}, {`{"name":"x"`, 400, ""}, {`{"name":}`, 400, ""},
		{`{"name":"x"}{"name":"y"}`, 400, ""}, {`{"name":"x"} x`, 400, ""}, {"{\"name\":\"x\"}\x00", 400, ""}, {`{'name':'x'}`, 400, ""},
		{`{"name":"x",}`, 400, ""}, {"{\"name\":\"\xff\"}", 400, ""}, {"\ufeff{}", 400, ""},
		{`{"name":"x","is_admin":true}`, 400, "is_admin"}, {`{"name":"x","Name":"y"}`, 400, "Name"}, {`{"NAME":"x"}`, 400, "NAME"},
		{`{"name":"x","name":"x"}`, 400, "name"}, {`{"name":"x","na\u006de":"x"}`, 400, "name"}, {`{"name":"x","id":"proj_1"}`, 400, "id"},
		{`{"name":"x","` + strings.Repeat("a", 200) + `":1}`, 400, strings.Repeat("a", 64) + "…"},
		{`{"name":5}`, 400, "name"}, {`{"name":null}`, 400, "name"}, {`{"name":["x"]}`, 400, "name"}, {`{"name":{}}`, 400, "name"}, {`{"name":""}`, 400, "name"},
		{`{"name":" x"}`, 400, "name"}, {`{"name":"a\u0000b"}`, 400, "name"}, {`{"name":"a\u202eb"}`, 400, "name"}, {`{"name":"` + strings.Repeat("x", 101) + `"}`, 400, "name"},
		{`{"name":"x","is_active":"true"}`, 400, "is_active"}, {`{"name":"x","is_active":null}`, 400, "is_active"}, {`{"name":"x","is_active":1}`, 400, "is_active"},
		{`{"name":` + deep + `}`, 400, ""}, {`{"policy":{"models":` + deep + `}}`, 400, ""}, {`{"name":"x","limits":null}`, 400, "limits"},
		{`{"name":"x","policy":[]}`, 400, "policy"}, {`{"name":"x","policy":"{}"}`, 400, "policy"}, {`{"name":"x","policy":{"model":[]}}`, 400, "policy.model"},
		{`{"name":"x","policy":{"models":["a"],"models":["b"]}}`, 400, "policy.models"}, {`{"name":"x","policy":{"models":"a"}}`, 400, "policy.models"},
		{`{"name":"x","policy":{"models":null}}`, 400, "policy.models"}, {`{"name":"x","policy":{"models":[""]}}`, 400, "policy.models"},
		{`{"name":"x","policy":{"models":["a*b"]}}`, 400, "policy.models"}, {`{"name":"x","policy":{"models":[null]}}`, 400, "policy.models"},
		{`{"name":"x","policy":{"endpoints":["chat"]}}`, 400, "policy.endpoints"}, {`{"name":"x","policy":{"stateful":"yes"}}`, 400, "policy.stateful"},
		{`{"name":"x","policy":{"models":[` + strings.Repeat(`"a",`, 500) + `"a"]}}`, 400, "policy.models"},
		{`{"name":"x","openai_api_key":"sk-aaaaaaaaaaaaaaaaaaaa","api_key":"sk-aaaaaaaaaaaaaaaaaaaa"}`, 400, "api_key"}, {`{"name":"x","base_url":"https://api.openai.com"}`, 400, "api_key"},
		{`{"name":"x","api_key":"sk-aaaaaaaaaaaaaaaaaaaa","provider":"openai2"}`, 400, "provider"}, {`{"name":"x","api_key":"sk-aaaaaaaaaaaaaaaaaaaa","provider":"azure"}`, 400, "base_url"},
		{`{"name":"x","api_key":"sk-aaaaaaaaaaaaaaaaaaaa","base_url":"ftp://x"}`, 400, "base_url"}, {`{"name":"x","api_key":""}`, 400, "api_key"},
		{`{"name":"x","api_key":"sk-aaaa aaaaaaaaaaaaa"}`, 400, "api_key"}, {`{"name":"x","api_key":"sk-...abcd"}`, 400, "api_key"}, {`{"name":"x","api_key":"********abcd"}`, 400, "api_key"},
		{`{"name":"` + strings.Repeat("x", maxManageBodyBytes) + `"}`, 413, ""}, {`{"name":"test"}`, 400, "name"},
	} {
		expectParamError(t, clip(c.body, 80), p.manageAs(p.adminKey, "POST", "/manage/projects", c.body), c.status, c.param)
	}
	for _, kind := range []string{"text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonp", "application/json, text/plain"} {
		expectParamError(t, kind, p.do("POST", "/manage/projects", `{"name":"x"}`, "Authorization", "Bearer "+p.adminKey, "Content-Type", kind), 415, "")
	}
	for _, site := range []string{"cross-site", "same-site"} {
		expectParamError(t, site, p.manageAs(p.adminKey, "POST", "/manage/projects", `{"name":"x"}`, "Sec-Fetch-Site", site), 403, "")
	}
	expectParamError(t, "Origin", p.manageAs(p.adminKey, "POST", "/manage/projects", `{"name":"x"}`, "Origin", "https://evil.example.com"), 403, "")
	var l struct{ Data []struct{ Name string } }
	if p.manage("GET", "/manage/projects", "", 200, &l); len(l.Data) != 1 {
		t.Errorf("something was stored: %v", l)
	}
}

// TestManageQueries (AD15): limits on limit, strict parameters, and names that
// are searched to the letter.
func TestManageQueries(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, c := range [][2]string{{"limit=0", "limit"}, {"limit=501", "limit"}, {"limit=100000", "limit"}, {"limit=-1", "limit"}, {"limit=x", "limit"}, {"limit=1.5", "limit"},
		{"limit=", "limit"}, {"name=", "name"}, {"after=x", "after"}, {"after=-1.", "after"}, {"after=zzzzzzzzzzzzzzzz.", "after"}, {"after=1.%25zz", "after"},
		{"active=yes", "active"}, {"active=True", "active"}, {"sort=%3Bdrop", "sort"}, {"offset=-1", "offset"}, {"Name=x", "Name"}, {"name=a&name=b", "name"},
		{"name=%zz", ""}, {"a;b", ""}} {
		expectParamError(t, c[0], p.manageAs(p.adminKey, "GET", "/manage/projects?"+c[0], ""), 400, c[1])
	}
	expectParamError(t, "no such project", p.manageAs(p.adminKey, "GET", "/manage/tokens?project_id=proj_x", ""), 400, "project_id")
	names := []string{"50% off", "50_ off", "50x off", "Ünï", "a'b\"c", `back\slash`, "50", "\U0010ffff"}
	for _, n := range names {
		p.manage("POST", "/manage/projects", fmt.Sprintf(`{"name":%s}`, quote(n)), 201, nil)
		p.newToken(`"name":` + quote(n))
	}
	for prefix, want := range map[string][]string{"50%25": {"50% off"}, "50_": {"50_ off"}, "50": {"50", "50% off", "50_ off", "50x off"}, "%25": nil, "_": nil,
		"%C3%9C": {"Ünï"}, "a'": {"a'b\"c"}, "back%5C": {`back\slash`}, "%F4%8F%BF%BF": {"\U0010ffff"}, "x": nil, "%27%3B--": nil, "%FF": nil} {
		for _, list := range []string{"projects?", "tokens?", "tokens?project_id=" + p.project + "&"} {
			var l struct{ Data []struct{ Name string } }
			p.manage("GET", "/manage/"+list+"name="+prefix, "", 200, &l)
			var got []string
			for _, v := range l.Data {
				got = append(got, v.Name)
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("%sname=%s: got %q, want %q", list, prefix, got, want)
			}
		}
	}
}

// TestManagePages: a list is walked to its end without gap or repetition while
// others add to it.
func TestManagePages(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	want := map[string]bool{p.tokenID: true}
	for i := range 40 {
		id, _ := p.newToken(fmt.Sprintf(`"name":"n%d"`, i%3))
		want[id] = true
	}
	for _, list := range []string{"/manage/tokens?limit=7", "/manage/tokens?limit=7&project_id=" + p.project, "/manage/tokens?limit=7&name=n", "/manage/tokens?limit=7&active=true",
		"/manage/tokens?limit=7&name=n&project_id=" + p.project, "/manage/tokens?limit=1&name=n1"} {
		seen := map[string]int{}
		var adding sync.WaitGroup
		for after, pages := "", 0; ; pages++ {
			var l struct {
				Data []struct{ ID, Name string }
				Next string
			}
			p.manage("GET", list+after, "", 200, &l)
			for _, v := range l.Data {
				seen[v.ID]++
			}
			if l.Next == "" || pages > 200 {
				break
			}
			after = "&after=" + l.Next
			if pages < 5 {
				adding.Go(func() { p.newToken(`"name":"n1"`) })
			}
		}
		adding.Wait()
		for id := range want {
			var v struct{ Name string }
			if seen[id] == 0 && !strings.Contains(list, "name=") {
				t.Errorf("%s: %s was passed over", list, id)
			}
			if p.manage("GET", "/manage/tokens/"+id, "", 200, &v); seen[id] == 0 && strings.HasPrefix(v.Name, between(list+"&", "name=", "&")) && strings.Contains(list, "name=") {
				t.Errorf("%s: %s (%s) was passed over", list, id, v.Name)
			}
		}
		for id, n := range seen {
			if n != 1 {
				t.Errorf("%s: %s came %d times", list, id, n)
			}
		}
	}
}

// TestManageVersions (AD14): of two admins who change the same thing, the one
// who did not see the other's change is told so.
func TestManageVersions(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	keyID, _ := p.newKey("k", "viewer")
	for _, path := range []string{"/manage/projects/" + p.project, "/manage/projects/" + p.project + "/upstreams/" + p.upstream, "/manage/tokens/" + p.tokenID, "/manage/keys/" + keyID} {
		etag := p.manageAs(p.adminKey, "GET", path, "").header.Get("ETag")
		first := p.manageAs(p.adminKey, "PATCH", path, `{"name":"first"}`, "If-Match", etag)
		if first.status != 200 || first.header.Get("ETag") == etag {
			t.Fatalf("%s: got %d %s", path, first.status, first.body)
		}
		for _, method := range []string{"PATCH", "DELETE"} {
			body := ""
			if method == "PATCH" {
				body = `{"name":"second"}`
			}
			expectParamError(t, method+" "+path, p.manageAs(p.adminKey, method, path, body, "If-Match", etag), 412, "")
		}
		for _, odd := range []string{"x", `"x"`, `W/"1"`, `"1", "2"`, "-1", "0", `""`} {
			expectParamError(t, odd, p.manageAs(p.adminKey, "PATCH", path, `{"name":"second"}`, "If-Match", odd), 400, "If-Match")
		}
		var v struct{ Name string }
		if p.manage("GET", path, "", 200, &v); v.Name != "first" {
			t.Errorf("%s: the name is %s", path, v.Name)
		}
		again := p.manageAs(p.adminKey, "PATCH", path, `{"name":"third"}`, "If-Match", first.header.Get("ETag"))
		any := p.manageAs(p.adminKey, "PATCH", path, `{"name":"fourth"}`, "If-Match", "*")
		if again.status != 200 || any.status != 200 {
			t.Errorf("%s: got %d, %d", path, again.status, any.status)
		}
	}
	// At the same time, of many with the same ETag one wins.
	etag := p.manageAs(p.adminKey, "GET", "/manage/tokens/"+p.tokenID, "").header.Get("ETag")
	var mu sync.Mutex
	got := map[int]int{}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			res := p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+p.tokenID, fmt.Sprintf(`{"name":"n%d"}`, i), "If-Match", etag)
			mu.Lock()
			defer mu.Unlock()
			got[res.status]++
		})
	}
	all.Wait()
	if got[200] != 1 || got[412] != 7 {
		t.Errorf("got %v", got)
	}
}

// TestManageURLs: odd paths and methods are answers of our own, never redirects.
func TestManageURLs(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, c := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/manage/nothing", 404}, {"GET", "/manage/", 404}, {"GET", "/manage", 404}, {"GET", "/manage/projects/", 404}, {"GET", "/manage//projects", 404},
		{"GET", "/manage/projects/../tokens", 404}, {"GET", "/manage/%70rojects", 404}, {"GET", "/manage/tokens/a%2Fb", 404}, {"GET", "/manage/tokens/tok_x", 404},
		{"PUT", "/manage/projects", 405}, {"DELETE", "/manage/projects", 405}, {"POST", "/manage/usage", 405}, {"TRACE", "/manage/tokens", 405},
		{"GET", "/manage/requests/req_zzzzzzzzzzzzz", 404}, {"GET", "/manage/requests/req_0000000000001", 404}, {"DELETE", "/manage/prices/price_x", 404},
	} {
		expectParamError(t, c.method+" "+c.path, p.manageAs(p.adminKey, c.method, c.path, ""), c.status, "")
	}
	if res := p.manageAs(p.adminKey, "HEAD", "/manage/projects", ""); res.status != 200 || res.body != "" {
		t.Errorf("HEAD: got %d", res.status)
	}
	if res := p.manageAs(p.adminKey, "PUT", "/manage/projects", ""); res.header.Get("Allow") != "GET, POST" {
		t.Errorf("Allow: %s", res.header.Get("Allow"))
	}
	for _, res := range []testResponse{p.manageAs(p.adminKey, "GET", "/manage/projects", ""), p.do("GET", "/manage/projects", "")} {
		if res.header.Get("Cache-Control") != "no-store" || !strings.HasPrefix(res.header.Get("X-Request-Id"), "req_") || res.header.Get("Content-Type") != "application/json" {
			t.Errorf("headers: %v", http.Header(res.header))
		}
	}
}
