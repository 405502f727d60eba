// This file tests /manage as a whole: who may do what, which bodies, queries and URLs are refused, pages and
// versions.
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

// manageRefused expects /manage to refuse a request with the admin's key, with a status and about a parameter.
func (p *testProxy) manageRefused(method, path, body string, status int, param string, headers ...string) {
	p.t.Helper()
	what := clip(method+" "+path+" "+body, 120)
	expectParamError(p.t, what, p.manageAs(p.adminKey, method, path, body, headers...), status, param)
}

// listIDs returns the IDs of a list, page by page. It calls between after each page that is not the last.
func (p *testProxy) listIDs(list string, between func(page int)) (ids []string) {
	p.t.Helper()
	for after, page := "", 0; ; page++ {
		var l struct {
			Data []struct{ ID string }
			Next string
		}
		p.manage("GET", list+after, "", 200, &l)
		for _, v := range l.Data {
			ids = append(ids, v.ID)
		}
		if l.Next == "" || page > 200 {
			return ids
		}
		after = "&after=" + l.Next
		between(page)
	}
}

// A managementCaller is what a request to /manage presents, and the rank of the role that it has; 0: none.
type managementCaller struct {
	headers []string // names and values
	rank    int
}

// managementCallers returns callers with each kind of key, and without one.
func managementCallers(p *testProxy, environment string) map[string]managementCaller {
	p.t.Helper()
	_, viewer := p.newKey("v", "viewer")
	_, operator := p.newKey("o", "operator")
	revokedID, revoked := p.newKey("r", "admin")
	p.manage("DELETE", "/manage/keys/"+revokedID, "", 200, nil)
	expiredID, expired := p.newKey("e", "admin")
	p.execSQLBound(fmt.Sprintf(`UPDATE management_keys SET expires_at = %d WHERE id = '%s'`,
		time.Now().UnixMilli()-1, expiredID))
	const name = "Authorization"
	authorization := func(value string) []string { return []string{name, value} }
	return map[string]managementCaller{
		"viewer":                   {authorization("Bearer " + viewer), 1},
		"operator":                 {authorization("Bearer " + operator), 2},
		"admin":                    {authorization("bearer " + p.adminKey), 3},
		"MANAGEMENT_TOKEN":         {authorization("Bearer " + environment), 3},
		"part of MANAGEMENT_TOKEN": {authorization("Bearer " + environment[:32]), 0},
		"no scheme":                {authorization(p.adminKey), 0},
		"basic":                    {authorization("Basic " + p.adminKey), 0},
		"a token":                  {authorization("Bearer " + p.token), 0},
		"revoked":                  {authorization("Bearer " + revoked), 0},
		"expired":                  {authorization("Bearer " + expired), 0},
		"empty":                    {authorization("Bearer "), 0},
		"no header":                {nil, 0},
		"cookie":                   {[]string{"Cookie", "session=" + p.adminKey}, 0},
		"x-api-key":                {[]string{"X-Api-Key", p.adminKey}, 0},
		"two headers":              {[]string{name, "Bearer " + viewer, name, "Bearer " + p.adminKey}, 0},
	}
}

// TestManageRoles (AU15, AU16): each URL requires its role of each kind of caller. The URLs and roles are those
// of the program's own table.
func TestManageRoles(t *testing.T) {
	t.Parallel()
	const environment = "environment-key-Jx81LmQp04TzVb67wYcN" // MANAGEMENT_TOKEN
	const refusal = `{"error":{"message":"A valid management key is needed: Authorization: Bearer \u003ckey\u003e. ` +
		`Tokens are for /v1 only.",` +
		`"type":"invalid_request_error","param":null,"code":"invalid_management_key"}}` + "\n"
	p := newTest(t, map[string]string{"MANAGEMENT_TOKEN": environment, "TRUSTED_PROXIES": "127.0.0.1"})
	p.secrets = append(p.secrets, environment)
	addresses := 0
	for who, c := range managementCallers(p, environment) {
		for _, rt := range p.instance.manage.manageTable() {
			method, path := p.operationPath(rt.pattern)
			addresses++ // each request has an address of its own, because an address that fails often is delayed
			address := fmt.Sprintf("10.%d.%d.1", addresses/256, addresses%256)
			res := p.do(method, path+"?no_such=1", "", append([]string{"X-Forwarded-For", address}, c.headers...)...)
			want := 400 // authorized, and refused for the parameter
			switch {
			case c.rank == 0:
				want = 401
			case c.rank < rt.minRole.rank():
				want = 403
			}
			if res.status != want {
				t.Errorf("%s as %s: got %d %s, want %d", rt.pattern, who, res.status, res.body, want)
			}
			if want == 401 && res.body != refusal {
				t.Errorf("%s as %s: the refusal says more: %s", rt.pattern, who, res.body)
			}
		}
	}
	for _, key := range []string{p.adminKey, environment} {
		if res := p.do("GET", "/v1/models", "", "Authorization", "Bearer "+key); res.status != 401 {
			t.Errorf("a management key on /v1: got %d", res.status)
		}
	}
}

// TestManageGuessing: an address that sends wrong keys is delayed. A valid key works even from there, so that a
// guesser locks nobody out.
func TestManageGuessing(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"TRUSTED_PROXIES": "127.0.0.1"})
	from := func(address, key string) testResponse {
		return p.manageAs(key, "GET", "/manage/projects", "", "X-Forwarded-For", address)
	}
	for range maxAuthFailures {
		if res := from("192.0.2.7", "guess"); res.status != 401 {
			t.Fatalf("got %d", res.status)
		}
	}
	if res := from("192.0.2.7", "guess"); res.status != 429 || res.header.Get("Retry-After") == "" {
		t.Errorf("after many wrong keys: got %d %v", res.status, res.header)
	}
	if res := from("192.0.2.8", "guess"); res.status != 401 {
		t.Errorf("another address: got %d", res.status)
	}
	if res := from("192.0.2.7", p.adminKey); res.status != 200 {
		t.Errorf("a valid key: got %d", res.status)
	}
}

// refusedBodies returns bodies that no POST of a project may have, with the field that the error names.
func refusedBodies() [][2]string {
	deep := strings.Repeat("[", 100_000)
	return [][2]string{
		{`[]`, ""}, {`"x"`, ""}, {`null`, ""}, {`7`, ""}, {`{`, ""}, {`{"name":"x"`, ""},
		{`{"name":}`, ""},
		{`{"name":"x"}{"name":"y"}`, ""}, {`{"name":"x"} x`, ""}, {"{\"name\":\"x\"}\x00", ""},
		{`{'name':'x'}`, ""},
		{`{"name":"x",}`, ""}, {"{\"name\":\"\xff\"}", ""}, {"\ufeff{}", ""},
		{`{"name":"x","is_admin":true}`, "is_admin"}, {`{"name":"x","Name":"y"}`, "Name"},
		{`{"NAME":"x"}`, "NAME"},
		{`{"name":"x","name":"x"}`, "name"}, {`{"name":"x","na\u006de":"x"}`, "name"},
		{`{"name":"x","id":"proj_1"}`, "id"},
		{`{"name":"x","` + strings.Repeat("a", 200) + `":1}`, strings.Repeat("a", 64) + "…"},
		{`{"name":5}`, "name"}, {`{"name":null}`, "name"}, {`{"name":["x"]}`, "name"},
		{`{"name":{}}`, "name"}, {`{"name":""}`, "name"},
		{`{"name":" x"}`, "name"}, {`{"name":"a\u0000b"}`, "name"}, {`{"name":"a\u202eb"}`, "name"},
		{`{"name":"` + strings.Repeat("x", 101) + `"}`, "name"},
		{`{"name":"x","is_active":"true"}`, "is_active"}, {`{"name":"x","is_active":null}`, "is_active"},
		{`{"name":"x","is_active":1}`, "is_active"},
		{`{"name":` + deep + `}`, ""}, {`{"policy":{"models":` + deep + `}}`, ""},
		{`{"name":"x","limits":null}`, "limits"},
		{`{"name":"x","policy":[]}`, "policy"}, {`{"name":"x","policy":"{}"}`, "policy"},
		{`{"name":"x","policy":{"model":[]}}`, "policy.model"},
		{`{"name":"x","policy":{"models":["a"],"models":["b"]}}`, "policy.models"},
		{`{"name":"x","policy":{"models":"a"}}`, "policy.models"},
		{`{"name":"x","policy":{"models":null}}`, "policy.models"},
		{`{"name":"x","policy":{"models":[""]}}`, "policy.models"},
		{`{"name":"x","policy":{"models":["a*b"]}}`, "policy.models"},
		{`{"name":"x","policy":{"models":[null]}}`, "policy.models"},
		{`{"name":"x","policy":{"endpoints":["chat"]}}`, "policy.endpoints"},
		{`{"name":"x","policy":{"stateful":"yes"}}`, "policy.stateful"},
		{`{"name":"x","policy":{"models":[` + strings.Repeat(`"a",`, 500) + `"a"]}}`, "policy.models"},
		{`{"name":"x","openai_api_key":"sk-aaaaaaaaaaaaaaaaaaaa","api_key":"sk-aaaaaaaaaaaaaaaaaaaa"}`, "api_key"},
		{`{"name":"x","base_url":"https://api.openai.com"}`, "api_key"},
		{`{"name":"x","api_key":"sk-aaaaaaaaaaaaaaaaaaaa","provider":"openai2"}`, "provider"},
		{`{"name":"x","api_key":"sk-aaaaaaaaaaaaaaaaaaaa","provider":"azure"}`, "base_url"},
		{`{"name":"x","api_key":"sk-aaaaaaaaaaaaaaaaaaaa","base_url":"ftp://x"}`, "base_url"},
		{`{"name":"x","api_key":""}`, "api_key"},
		{`{"name":"x","api_key":"sk-aaaa aaaaaaaaaaaaa"}`, "api_key"},
		{`{"name":"x","api_key":"sk-...abcd"}`, "api_key"},
		{`{"name":"x","api_key":"********abcd"}`, "api_key"},
		{`{"name":"test"}`, "name"},
	}
}

// TestManageBodies (AD12, AD13, AU17): a body that is not exactly one JSON object of known fields is refused, and
// nothing is stored.
func TestManageBodies(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, c := range refusedBodies() {
		p.manageRefused("POST", "/manage/projects", c[0], 400, c[1])
	}
	p.manageRefused("POST", "/manage/projects", `{"name":"`+strings.Repeat("x", maxManageBodyBytes)+`"}`, 413, "")
	for _, kind := range []string{
		"text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonp",
		"application/json, text/plain",
	} {
		res := p.do("POST", "/manage/projects", `{"name":"x"}`, "Authorization", "Bearer "+p.adminKey,
			"Content-Type", kind)
		expectParamError(t, kind, res, 415, "")
	}
	for _, site := range []string{"cross-site", "same-site"} {
		p.manageRefused("POST", "/manage/projects", `{"name":"x"}`, 403, "", "Sec-Fetch-Site", site)
	}
	p.manageRefused("POST", "/manage/projects", `{"name":"x"}`, 403, "", "Origin", "https://evil.example.com")
	var l struct{ Data []struct{ Name string } }
	if p.manage("GET", "/manage/projects", "", 200, &l); len(l.Data) != 1 {
		t.Errorf("something was stored: %v", l)
	}
}

// TestManageQueries (AD15): the page size is bounded, unknown parameters are refused, and names are searched
// literally.
func TestManageQueries(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, c := range [][2]string{
		{"limit=0", "limit"}, {"limit=501", "limit"}, {"limit=100000", "limit"}, {"limit=-1", "limit"},
		{"limit=x", "limit"}, {"limit=1.5", "limit"},
		{"limit=", "limit"}, {"name=", "name"}, {"after=x", "after"}, {"after=-1.", "after"},
		{"after=zzzzzzzzzzzzzzzz.", "after"}, {"after=1.%25zz", "after"},
		{"active=yes", "active"}, {"active=True", "active"}, {"sort=%3Bdrop", "sort"}, {"offset=-1", "offset"},
		{"Name=x", "Name"}, {"name=a&name=b", "name"},
		{"name=%zz", ""}, {"a;b", ""},
	} {
		p.manageRefused("GET", "/manage/projects?"+c[0], "", 400, c[1])
	}
	p.manageRefused("GET", "/manage/tokens?project_id=proj_x", "", 400, "project_id")
	names := []string{"50% off", "50_ off", "50x off", "Ünï", "a'b\"c", `back\slash`, "50", "\U0010ffff"}
	for _, n := range names {
		p.manage("POST", "/manage/projects", fmt.Sprintf(`{"name":%s}`, quote(n)), 201, nil)
		p.newToken(`"name":` + quote(n))
	}
	for prefix, want := range map[string][]string{
		"50%25": {"50% off"}, "50_": {"50_ off"}, "50": {"50", "50% off", "50_ off", "50x off"}, "%25": nil, "_": nil,
		"%C3%9C": {"Ünï"}, "a'": {"a'b\"c"}, "back%5C": {`back\slash`}, "%F4%8F%BF%BF": {"\U0010ffff"}, "x": nil,
		"%27%3B--": nil, "%FF": nil,
	} {
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

// TestManagePages: the pages of a list have no gap and no repetition while others add to it.
func TestManagePages(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	want := map[string]bool{p.tokenID: true}
	for i := range 40 {
		id, _ := p.newToken(fmt.Sprintf(`"name":"n%d"`, i%3))
		want[id] = true
	}
	for _, list := range []string{
		"/manage/tokens?limit=7", "/manage/tokens?limit=7&project_id=" + p.project, "/manage/tokens?limit=7&name=n",
		"/manage/tokens?limit=7&active=true",
		"/manage/tokens?limit=7&name=n&project_id=" + p.project, "/manage/tokens?limit=1&name=n1",
	} {
		seen := map[string]int{}
		var adding sync.WaitGroup
		for _, id := range p.listIDs(list, func(page int) {
			if page < 5 {
				adding.Go(func() { p.newToken(`"name":"n1"`) })
			}
		}) {
			seen[id]++
		}
		adding.Wait()
		_, rest, _ := strings.Cut(list, "name=")
		prefix, _, _ := strings.Cut(rest, "&")
		for id := range want {
			var v struct{ Name string }
			p.manage("GET", "/manage/tokens/"+id, "", 200, &v)
			if seen[id] == 0 && strings.HasPrefix(v.Name, prefix) {
				t.Errorf("%s: %s (%s) is on no page", list, id, v.Name)
			}
		}
		for id, n := range seen {
			if n != 1 {
				t.Errorf("%s: %s is listed %d times", list, id, n)
			}
		}
	}
}

// TestManageVersions (AD14): of two admins who change the same object, the one who did not see the other's change
// is refused.
func TestManageVersions(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	keyID, _ := p.newKey("k", "viewer")
	for _, path := range []string{
		"/manage/projects/" + p.project, "/manage/projects/" + p.project + "/upstreams/" + p.upstream,
		"/manage/tokens/" + p.tokenID, "/manage/keys/" + keyID,
	} {
		etag := p.manageAs(p.adminKey, "GET", path, "").header.Get("ETag")
		first := p.manageAs(p.adminKey, "PATCH", path, `{"name":"first"}`, "If-Match", etag)
		if first.status != 200 || first.header.Get("ETag") == etag {
			t.Fatalf("%s: got %d %s", path, first.status, first.body)
		}
		p.manageRefused("PATCH", path, `{"name":"second"}`, 412, "", "If-Match", etag)
		p.manageRefused("DELETE", path, "", 412, "", "If-Match", etag)
		for _, bad := range []string{"x", `"x"`, `W/"1"`, `"1", "2"`, "-1", "0", `""`} {
			p.manageRefused("PATCH", path, `{"name":"second"}`, 400, "If-Match", "If-Match", bad)
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
	// Of many requests with the same ETag at the same time, one wins.
	etag := p.manageAs(p.adminKey, "GET", "/manage/tokens/"+p.tokenID, "").header.Get("ETag")
	var mu sync.Mutex
	got := map[int]int{}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			res := p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+p.tokenID, fmt.Sprintf(`{"name":"n%d"}`, i),
				"If-Match", etag)
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

// TestManageURLs: unknown paths and methods get errors of the API, never redirects.
func TestManageURLs(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, c := range []struct {
		method, path string
		want         int
	}{
		{"GET", "/manage/nothing", 404}, {"GET", "/manage/", 404}, {"GET", "/manage", 404},
		{"GET", "/manage/projects/", 404}, {"GET", "/manage//projects", 404},
		{"GET", "/manage/projects/../tokens", 404}, {"GET", "/manage/%70rojects", 404},
		{"GET", "/manage/tokens/a%2Fb", 404}, {"GET", "/manage/tokens/tok_x", 404},
		{"PUT", "/manage/projects", 405}, {"DELETE", "/manage/projects", 405}, {"POST", "/manage/usage", 405},
		{"TRACE", "/manage/tokens", 405},
		{"GET", "/manage/requests/req_zzzzzzzzzzzzz", 404}, {"GET", "/manage/requests/req_0000000000001", 404},
		{"DELETE", "/manage/prices/price_x", 404},
	} {
		p.manageRefused(c.method, c.path, "", c.want, "")
	}
	if res := p.manageAs(p.adminKey, "HEAD", "/manage/projects", ""); res.status != 200 || res.body != "" {
		t.Errorf("HEAD: got %d", res.status)
	}
	if res := p.manageAs(p.adminKey, "PUT", "/manage/projects", ""); res.header.Get("Allow") != "GET, POST" {
		t.Errorf("Allow: %s", res.header.Get("Allow"))
	}
	for _, res := range []testResponse{
		p.manageAs(p.adminKey, "GET", "/manage/projects", ""), p.do("GET", "/manage/projects", ""),
	} {
		if res.header.Get("Cache-Control") != "no-store" ||
			!strings.HasPrefix(res.header.Get("X-Request-Id"), "req_") ||
			res.header.Get("Content-Type") != "application/json" {
			t.Errorf("headers: %v", http.Header(res.header))
		}
	}
}
