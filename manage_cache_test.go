// Tests of what administrators see and do about the response cache: /manage, its sums and filters, /metrics, and the
// pages.
package main

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"
)

// A cacheReport is the answer of /manage/projects/{id}/cache.
type cacheReport struct {
	Entries, Bytes int64
	Models         []struct {
		Model, OldestStoredAt string
		Entries, Bytes        int64
	}
	Since    time.Time
	Calls    int64
	Hits     int64   `json:"cache_hits"`
	HitShare float64 `json:"hit_share"`
	Saved    float64
	SavedMS  float64 `json:"saved_ms"`
}

func (p *testProxy) cacheReport(project string) (r cacheReport) {
	p.t.Helper()
	p.cacheSettled()
	p.manage("GET", "/manage/projects/"+project+"/cache", "", 200, &r)
	return r
}

// replyAs answers each call as the model that it names.
func replyAs(c *providerConn, r recordedRequest) bool {
	return c.reply(200, `{"id":"c1","object":"chat.completion","model":"`+between(r.body, `"model":"`, `"`)+
		`","choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}],`+
		`"usage":{"prompt_tokens":1000,"completion_tokens":100,"total_tokens":1100}}`)
}

// cachedModel makes a call to a model that may be cached.
func (p *testProxy) cachedModel(token, model, text string) testResponse {
	p.t.Helper()
	return p.do("POST", "/v1/chat/completions", `{"model":"`+model+`","temperature":0,"messages":[{"role":"user",`+
		`"content":"`+text+`"}]}`, "Authorization", "Bearer "+token, "Content-Type", "application/json")
}

// TestManageCache: an administrator sees what is cached of a project and what that saves, and deletes all of it, what
// a model gave, or what is old. Nothing of another project is seen or deleted.
func TestManageCache(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	p.provider.setScript(replyAs)
	if r := p.cacheReport(p.project); r.Entries+r.Bytes+r.Calls+r.Hits != 0 || len(r.Models) != 0 || r.HitShare != 0 {
		t.Errorf("an empty cache: %+v", r)
	}
	other, otherToken := p.secondCachedProject()
	p.expectFrom("the other project", "provider", func() testResponse {
		return p.cachedModel(otherToken, "gpt-4o", "a")
	})
	call := func(from, model, text string) {
		t.Helper()
		p.expectFrom(model+" "+text, from, func() testResponse { return p.cachedModel(p.token, model, text) })
	}
	fill := func() {
		t.Helper()
		p.manage("DELETE", "/manage/projects/"+p.project+"/cache", "", 200, nil)
		call("provider", "gpt-4o", "a")
		call("provider", "gpt-4o", "b")
		call("provider", "gpt-4o-mini", "a")
		p.cacheSettled()
	}
	fill()
	call("cache", "gpt-4o", "a")
	r := p.cacheReport(p.project)
	const cost = 1000*2.5e-6 + 100*10e-6 // of gpt-4o
	if r.Entries != 3 || r.Bytes < 3*entryOverhead || len(r.Models) != 2 || r.Models[0].Model != "gpt-4o" ||
		r.Models[0].Entries != 2 || r.Models[0].Bytes+r.Models[1].Bytes != r.Bytes || r.Calls != 4 || r.Hits != 1 ||
		r.HitShare != 0.25 || r.Saved < cost-1e-9 || r.Saved > cost+1e-9 || r.SavedMS < 0 ||
		time.Since(r.Since) < 29*24*time.Hour || time.Since(r.Since) > 30*24*time.Hour {
		t.Errorf("got %+v", r)
	}
	for _, c := range []struct {
		query string
		sql   string // before
		want  int
		left  []string
	}{
		{"?model=gpt-4o", "", 2, []string{"gpt-4o-mini a"}},
		{"?model=none-such", "", 0, []string{"gpt-4o a", "gpt-4o b", "gpt-4o-mini a"}},
		{"?older_than_seconds=3600", "", 0, []string{"gpt-4o a", "gpt-4o b", "gpt-4o-mini a"}},
		{"?older_than_seconds=60", `UPDATE cache SET stored_at = stored_at - 61000 WHERE model = 'gpt-4o-mini'`, 1,
			[]string{"gpt-4o a", "gpt-4o b"}},
		{"?older_than_seconds=60&model=gpt-4o", `UPDATE cache SET stored_at = stored_at - 61000`, 2,
			[]string{"gpt-4o-mini a"}},
		{"?endpoint=/v1/embeddings", "", 0, []string{"gpt-4o a", "gpt-4o b", "gpt-4o-mini a"}},
		{"?endpoint=POST+/v1/chat/*&model=gpt-4o-mini", "", 1, []string{"gpt-4o a", "gpt-4o b"}},
		{"?endpoint=/v1/embeddings", `UPDATE cache SET endpoint = '/v1/embeddings' WHERE model = 'gpt-4o-mini'`, 1,
			[]string{"gpt-4o a", "gpt-4o b"}},
		{"?endpoint=/v1/embeddings&model=gpt-4o", `UPDATE cache SET endpoint = ''`, 2, []string{"gpt-4o-mini a"}},
		{"?endpoint=/v1/chat/completions", "", 3, nil},
		{"", "", 3, nil},
	} {
		fill()
		if c.sql != "" {
			p.execSQL(c.sql)
			p.forgetMemory()
		}
		var got struct{ Deleted int }
		p.manage("DELETE", "/manage/projects/"+p.project+"/cache"+c.query, "", 200, &got)
		if got.Deleted != c.want {
			t.Errorf("%q deleted %d, want %d", c.query, got.Deleted, c.want)
		}
		if r := p.cacheReport(p.project); r.Entries != int64(3-c.want) {
			t.Errorf("%q left %d entries", c.query, r.Entries)
		}
		for _, name := range []string{"gpt-4o a", "gpt-4o b", "gpt-4o-mini a"} {
			from := "provider"
			if strings.Contains(strings.Join(c.left, ","), name) {
				from = "cache"
			}
			model, text, _ := strings.Cut(name, " ")
			call(from, model, text)
		}
	}
	if r := p.cacheReport(other); r.Entries != 1 || r.Calls != 1 {
		t.Errorf("of the other project: %+v", r)
	}
}

// secondCachedProject creates another project with a cache, and returns its ID and a token of it.
func (p *testProxy) secondCachedProject() (id, token string) {
	p.t.Helper()
	var project, created struct{ ID, Token string }
	p.manage("POST", "/manage/projects", `{"name":"second","openai_api_key":"`+p.provider.key+
		`","policy":{"cache":{"ttl_seconds":3600}}}`, 201, &project)
	p.manage("POST", "/manage/tokens", `{"project_id":"`+project.ID+`","name":"other"}`, 201, &created)
	return project.ID, created.Token
}

// TestManageCacheRefused: a viewer sees the cache and deletes nothing; parameters that cannot be meant are refused, and
// nothing is deleted without an entry on the audit trail.
func TestManageCacheRefused(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	p.cachedChat(p.token, "")
	p.cacheSettled()
	var viewer, operator struct{ Key string }
	p.manage("POST", "/manage/keys", `{"name":"v","role":"viewer"}`, 201, &viewer)
	p.manage("POST", "/manage/keys", `{"name":"o","role":"operator"}`, 201, &operator)
	path := "/manage/projects/" + p.project + "/cache"
	for _, c := range []struct {
		key, method, path string
		want              int
		param             string
	}{
		{viewer.Key, "GET", path, 200, ""},
		{viewer.Key, "DELETE", path, 403, ""},
		{operator.Key, "GET", "/manage/projects/proj_none/cache", 404, ""},
		{operator.Key, "DELETE", "/manage/projects/proj_none/cache", 404, ""},
		{operator.Key, "DELETE", path + "?older_than_seconds=0", 400, "older_than_seconds"},
		{operator.Key, "DELETE", path + "?older_than_seconds=-1", 400, "older_than_seconds"},
		{operator.Key, "DELETE", path + "?older_than_seconds=2592001", 400, "older_than_seconds"},
		{operator.Key, "DELETE", path + "?older_than_seconds=1h", 400, "older_than_seconds"},
		{operator.Key, "DELETE", path + "?older_than_seconds=99999999999999999999", 400, "older_than_seconds"},
		{operator.Key, "DELETE", path + "?model=", 400, "model"},
		{operator.Key, "DELETE", path + "?endpoint=x", 400, "endpoint"},
		{operator.Key, "DELETE", path + "?endpoint=", 400, "endpoint"},
		{operator.Key, "DELETE", path + "?endpoint=/v1/files", 400, "endpoint"},
		{operator.Key, "DELETE", path + "?endpoint=GET+/v1/embeddings", 400, "endpoint"},
		{operator.Key, "DELETE", path + "?endpoint=/v1/chat/completions&endpoint=/v1/embeddings", 400, "endpoint"},
		{operator.Key, "DELETE", path + "?endpoints=/v1/embeddings", 400, "endpoints"},
		{operator.Key, "GET", "/manage/requests?cache=miss", 400, "cache"},
		{operator.Key, "GET", "/manage/usage?group_by=cache,cache", 400, "group_by"},
	} {
		res := p.manageAs(c.key, c.method, c.path, "")
		if res.status != c.want || c.param != "" && !strings.Contains(res.body, `"param":"`+c.param+`"`) {
			t.Errorf("%s %s: got %d %s, want %d about %q", c.method, c.path, res.status, res.body, c.want, c.param)
		}
	}
	p.allowErrors = true
	p.execSQL(`CREATE TRIGGER no_audit BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no'); END`)
	if res := p.manageAs(operator.Key, "DELETE", path, ""); res.status < 500 {
		t.Errorf("emptied without an entry on the trail: %d", res.status)
	}
	p.execSQL(`DROP TRIGGER no_audit`)
	if r := p.cacheReport(p.project); r.Entries != 1 {
		t.Errorf("%d entries are left", r.Entries)
	}
	p.expectFrom("afterwards", "cache", func() testResponse { return p.cachedChat(p.token, "") })
	if res := p.manageAs(operator.Key, "DELETE", path, ""); res.status != 200 || res.body != "{\"deleted\":1}\n" {
		t.Errorf("got %d %s", res.status, res.body)
	}
}

// TestUsageByCache: usage can be grouped by whether the cache answered, alone and with every other group, for every
// interval, and the parts add up to the whole. Calls can be filtered by it.
func TestUsageByCache(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	p.provider.setScript(replyAs)
	for range 3 {
		p.cachedModel(p.token, "gpt-4o", "a")
	}
	p.cachedModel(p.token, "gpt-4o-mini", "a")
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(400, "{}") })
	p.cachedModel(p.token, "gpt-4o", "refused")
	p.waitSettled()
	type row struct {
		Cache, Model, Outcome string
		Calls                 int64
		CacheHits             int64 `json:"cache_hits"`
		InputTokens           int64 `json:"input_tokens"`
		Cost, Saved           float64
		WouldRefuse           *int64 `json:"would_refuse"`
	}
	usage := func(query string) (rows []row) {
		var list struct{ Data []row }
		p.manage("GET", "/manage/usage?"+query, "", 200, &list)
		return list.Data
	}
	const cost, mini = 0.0035, 1000*0.15e-6 + 100*0.6e-6
	for _, interval := range []string{"hour", "day", "month", "total"} {
		for _, scope := range []string{"", "&project_id=" + p.project, "&token_id=" + p.lastCall().TokenID} {
			rows := usage("interval=" + interval + "&group_by=cache" + scope)
			if len(rows) != 2 || rows[0].Cache != "hit" || rows[1].Cache != "none" || rows[0].Calls != 2 ||
				rows[0].CacheHits != 2 || rows[0].InputTokens != 0 || rows[0].Cost != 0 ||
				!isAbout(rows[0].Saved, 2*cost) || rows[1].Calls != 3 || rows[1].InputTokens != 2000 ||
				!isAbout(rows[1].Cost, cost+mini) || rows[1].Saved != 0 || rows[1].CacheHits != 0 ||
				rows[0].WouldRefuse != nil || rows[1].WouldRefuse != nil {
				t.Errorf("%s %s: got %+v", interval, scope, rows)
			}
			rows = usage("interval=" + interval + scope)
			if len(rows) != 1 || rows[0].Calls != 5 || rows[0].CacheHits != 2 || !isAbout(rows[0].Saved, 2*cost) ||
				rows[0].WouldRefuse == nil {
				t.Errorf("%s %s, all together: got %+v", interval, scope, rows)
			}
		}
		var got []string
		for _, r := range usage("interval=" + interval + "&group_by=project,token,endpoint,outcome,model,cache") {
			got = append(got, fmt.Sprint(r.Model, " ", r.Outcome, " ", r.Cache, " ", r.Calls))
		}
		want := "gpt-4o ok hit 2, gpt-4o ok none 1, gpt-4o upstream_error none 1, gpt-4o-mini ok none 1"
		if strings.Join(got, ", ") != want {
			t.Errorf("%s by everything: got %s, want %s", interval, strings.Join(got, ", "), want)
		}
	}
	type call struct {
		Cache   string
		Saved   float64
		SavedMS *float64 `json:"saved_ms"`
	}
	for query, want := range map[string]int{"": 5, "?cache=hit": 2, "?cache=none": 3, "?cache=hit&outcome=ok": 2,
		"?cache=hit&outcome=refused": 0, "?cache=hit&limit=1": 1} {
		var list struct{ Data []call }
		p.manage("GET", "/manage/requests"+query, "", 200, &list)
		if len(list.Data) != want {
			t.Errorf("%q: got %d calls, want %d", query, len(list.Data), want)
		}
		for _, c := range list.Data {
			if c.SavedMS == nil || (c.Cache == "hit") != (c.Saved > 0) || strings.Contains(query, "cache=") &&
				!strings.Contains(query, "cache="+c.Cache) {
				t.Errorf("%q: got %+v", query, c)
			}
		}
	}
}

func isAbout(got, want float64) bool { return got >= want-1e-9 && got <= want+1e-9 }

// TestMetricsCache: /metrics counts what the cache does, and its numbers agree with the ledger.
func TestMetricsCache(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.cachedChat(p.token, "") // without a cache
	p.enableCache()
	for range 3 {
		p.cachedChat(p.token, "")
	}
	p.chat()                          // not deterministic
	p.cachedChat(p.token, `"seed":1`) // a miss
	p.cachedChat(p.token, `"store":true`)
	p.cachedChat(p.token, "", "Cache-Control", "no-store")
	p.cachedChat(p.token, "", "Cache-Control", "no-cache")
	p.cacheSettled()
	var usage struct {
		Data []struct{ Saved float64 }
	}
	p.manage("GET", "/manage/usage?interval=total", "", 200, &usage)
	m := p.metrics()
	for name, want := range map[string]float64{
		`hits_total`: 2, `collapsed_total`: 0, `misses_total`: 3, `stored_total`: 3,
		`bypasses_total{reason="not-deterministic"}`: 1, `bypasses_total{reason="stateful"}`: 1,
		`bypasses_total{reason="no-store"}`: 1, `bypasses_total{reason="tools"}`: 0,
		`bypasses_total{reason="endpoint"}`: 0, `entries{tier="memory"}`: 2, `entries{tier="disk"}`: 2,
		`waiting_calls`: 0, `evictions_total`: 0, `dropped_writes_total`: 0, `max_bytes`: 256 << 20,
		`saved_dollars_total`: usage.Data[0].Saved,
	} {
		if got, ok := m["llm_proxy_cache_"+name]; !ok || !isAbout(got, want) {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	if m[`llm_proxy_cache_bytes{tier="disk"}`] < 2*entryOverhead || m[`llm_proxy_cache_saved_seconds_total`] < 0 {
		t.Errorf("got %v bytes", m[`llm_proxy_cache_bytes{tier="disk"}`])
	}
	release := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		<-release
		return chatScript(c, r)
	})
	_, wait := p.manyChats(context.Background(), 3, p.token, `"temperature":0,"seed":2`)
	waitFor(t, "two calls to wait for the first", func() bool {
		return p.metrics()["llm_proxy_cache_waiting_calls"] == 2
	})
	close(release)
	wait()
	p.waitSettled()
	if m := p.metrics(); m["llm_proxy_cache_waiting_calls"] != 0 || m["llm_proxy_cache_collapsed_total"] != 2 ||
		m["llm_proxy_cache_hits_total"] != 4 {
		t.Errorf("after waiting: %v hits", m["llm_proxy_cache_hits_total"])
	}
}

// TestAdminCache: the pages show what the cache has and has saved, and empty it after a question. They show nothing of
// a cache that was never used.
func TestAdminCache(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(replyAs)
	b := p.signIn(p.adminKey)
	project := "/admin/projects/" + p.project
	p.cachedModel(p.token, "gpt-4o", "a")
	p.waitSettled()
	for _, path := range []string{project, "/admin/dashboard", "/admin/requests/" + p.lastCall().ID} {
		if body := b.get(path).body; strings.Contains(body, "esponse cache") || strings.Contains(body, "cache: hit") {
			t.Errorf("%s shows a cache that there is not", path)
		}
	}
	form := parseForm(t, b.get(project+"/edit").body)
	form.Set("policy.cache.ttl_seconds", "7,200")
	form.Set("policy.cache.endpoints", "/v1/chat/*\r\n/v1/embeddings")
	if res := b.post(project+"/edit", form); res.status != 303 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	var saved struct {
		Policy struct{ Cache map[string]any }
	}
	p.manage("GET", "/manage/projects/"+p.project, "", 200, &saved)
	if got := fmt.Sprint(saved.Policy.Cache); got != "map[endpoints:[/v1/chat/* /v1/embeddings] ttl_seconds:7200]" {
		t.Errorf("the form saved %s", got)
	}
	contains := func(path string, want ...string) string {
		t.Helper()
		body := b.get(path).body
		for _, w := range want {
			if !strings.Contains(body, w) {
				t.Errorf("%s does not show %q", path, w)
			}
		}
		return body
	}
	if body := contains(project, "<h2>Response cache</h2>", "<dd>2 hours</dd>", "<dd>/v1/chat/*, /v1/embeddings</dd>",
		"deterministic only", "all tokens", "<dt>Entries</dt><dd>0</dd>"); strings.Contains(body, "/empty-cache") {
		t.Error("there is a button to empty an empty cache")
	}
	p.cachedModel(p.token, "gpt-4o", "a")
	for range 2 {
		p.expectFrom("again", "cache", func() testResponse { return p.cachedModel(p.token, "gpt-4o", "a") })
	}
	p.cacheSettled()
	hit := p.lastCall().ID
	contains(project, "<dt>Entries</dt><dd>1</dd>", project+"/empty-cache", "<dd>2, 50.0% of all calls</dd>", "$0.007")
	contains("/admin/requests/"+hit, "hit: saved $0.0035 and ", "The response came from the cache")
	contains("/admin/tokens/"+p.tokenID, "cache: hit")
	body := contains("/admin/requests?cache=hit", "cache: hit", "saved $0.0035")
	if strings.Count(body, hitLink) != 2 {
		t.Errorf("the list has %d calls", strings.Count(body, hitLink))
	}
	if body = contains("/admin/requests?cache=none"); strings.Count(body, hitLink) != 2 {
		t.Errorf("the list of other calls has %d", strings.Count(body, hitLink))
	}
	contains("/admin/requests?cache=miss", "must be hit or none")
	for _, query := range []string{"?period=24h", "?period=7d&measure=cost", "?period=30d&by=model", "?period=90d"} {
		contains("/admin/dashboard"+query, "2 calls were answered from the cache, 50.0% of all calls",
			`aria-label="Response cache: Projects"`, `<a href="`+project+`">`, `aria-label="Response cache: Models"`)
	}
	body = contains("/admin/dashboard?project="+p.project, `aria-label="Response cache: Models"`)
	if strings.Contains(body, "Response cache: Projects") {
		t.Error("the dashboard of one project lists projects")
	}
	p.checkCacheExports(b, hit)
	p.checkCacheButton(b)
	form = parseForm(t, b.get(project+"/edit").body)
	form.Set("policy.cache.ttl_seconds", "")
	if res := b.post(project+"/edit", form); res.status != 303 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	saved.Policy.Cache = nil
	p.manage("GET", "/manage/projects/"+p.project, "", 200, &saved)
	if saved.Policy.Cache != nil {
		t.Errorf("turned off, the policy has %v", saved.Policy.Cache)
	}
	contains(project, "<dt>State</dt><dd>turned off</dd>", "<dd>2, 50.0% of all calls</dd>")
}

const hitLink = `<a class="name" href="/admin/requests/req_`

// checkCacheExports downloads calls and the dashboard: both say what the cache answered and saved.
func (p *testProxy) checkCacheExports(b *browser, hit string) {
	p.t.Helper()
	for format, want := range map[string]string{"csv": ",hit,0.0035,", "jsonl": `"cache":"hit","saved":0.0035,`} {
		res := b.post("/admin/requests/export", url.Values{"format": {format}, "cache": {"hit"}})
		if strings.Count(res.body, want) != 2 || strings.Count(res.body, "req_") != 2 ||
			!strings.Contains(res.body, hit) {
			p.t.Errorf("the download as %s has %s", format, res.body)
		}
	}
	res := b.post("/admin/dashboard/export", url.Values{"period": {"7d"}})
	for _, kind := range []string{"project", "model", "time"} {
		found := false
		for line := range strings.Lines(res.body) {
			found = found || strings.HasPrefix(line, kind+",") && strings.Contains(line, ",2,0.007,")
		}
		if !found {
			p.t.Errorf("the download of the dashboard has no line of %s with the hits: %s", kind, res.body)
		}
	}
	columns := strings.Count(res.body[:strings.Index(res.body, "\n")], ",")
	for line := range strings.Lines(res.body) {
		if strings.Count(line, ",") != columns {
			p.t.Errorf("%q has other columns than the head", line)
		}
	}
}

// checkCacheButton empties the cache as an operator. A viewer cannot.
func (p *testProxy) checkCacheButton(b *browser) {
	p.t.Helper()
	page := "/admin/projects/" + p.project
	_, viewerKey := p.newKey("viewer", "viewer")
	_, operatorKey := p.newKey("operator", "operator")
	viewer, operator := p.signIn(viewerKey), p.signIn(operatorKey)
	if strings.Contains(viewer.get(page).body, "/empty-cache") || viewer.post(page+"/empty-cache", nil).status != 403 {
		p.t.Error("a viewer can empty the cache")
	}
	if body := operator.get(page + "/empty-cache").body; !strings.Contains(body, "All cached answers of the project") {
		p.t.Errorf("it is not asked: %s", body)
	}
	if r := p.cacheReport(p.project); r.Entries != 1 {
		p.t.Errorf("the question has left %d entries", r.Entries)
	}
	if res := operator.post(page+"/empty-cache", nil); res.status != 303 {
		p.t.Errorf("got %d", res.status)
	}
	if r := p.cacheReport(p.project); r.Entries != 0 || r.Hits != 2 {
		p.t.Errorf("emptied: %+v", r)
	}
	if !strings.Contains(b.get("/admin/audit").body, actionEmptyCache) {
		p.t.Error("the audit trail does not show it")
	}
}

// TestCachePurgeMany: a purge finds what it names among many answers, of equal and of different size, before and behind
// what it leaves.
func TestCachePurgeMany(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	st := p.instance.store
	for _, c := range []struct {
		f     cacheFilter
		where string
	}{
		{cacheFilter{project: 1}, `project = 1`},
		{cacheFilter{project: 1, token: 1}, `project = 1 AND token = 1`},
		{cacheFilter{project: 1, token: 3}, `project = 1 AND token = 3`},
		{cacheFilter{project: 1, token: 9}, `project = 1 AND token = 9`},
		{cacheFilter{project: 1, token: anyToken}, `project = 1 AND token > 0`},
		{cacheFilter{project: 1, model: "m1"}, `project = 1 AND model = 'm1'`},
		{cacheFilter{project: 1, storedBefore: 40}, `project = 1 AND stored_at < 40`},
		{cacheFilter{project: 1, token: 2, model: "m2", storedBefore: 2000},
			`project = 1 AND token = 2 AND model = 'm2' AND stored_at < 2000`},
	} {
		p.execSQL(`DELETE FROM cache`)
		p.execSQL(`WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)
			INSERT INTO cache (id, project, token, model, stored_at, expires_at, used_at, size, answer)
			SELECT i * 400003, CASE WHEN i % 10 = 0 THEN 2 ELSE 1 END, i % 4, 'm' || (i % 3), i, 9999999999999, 1,
				CASE WHEN i % 2 = 0 THEN 1024 ELSE 1000 + i % 50 END, zeroblob(1) FROM n`)
		count := func(where string) (n int64) {
			if err := st.readDB.QueryRow(`SELECT count(*) FROM cache WHERE ` + where).Scan(&n); err != nil {
				t.Fatal(err)
			}
			return n
		}
		want := count(c.where)
		n, err := p.instance.cache.purge(t.Context(), c.f)
		if err != nil || n != want || count(c.where) != 0 || count(`true`) != 5000-want {
			t.Errorf("%+v deleted %d of %d, and left %d of %d: %v", c.f, n, want, count(`true`), 5000-want, err)
		}
	}
}
