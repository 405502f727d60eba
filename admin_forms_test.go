// Tests of the forms of the pages: an administrator's whole journey, unchanged forms, mistakes,
// lost updates and the list of tokens.
package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"html"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// parseForm returns the fields of the first POST form of a page, except the sign-out, as a browser
// would send them.
func parseForm(t *testing.T, page string) url.Values {
	t.Helper()
	out := url.Values{}
	_, rest, _ := strings.Cut(page, "<main")
	_, rest, ok := strings.Cut(rest, `method="post"`)
	body, _, _ := strings.Cut(rest, "</form>")
	if !ok {
		t.Fatalf("no form in %s", page)
	}
	fields := regexp.MustCompile(`(?s)<(input)([^>]*)>()|<(select|textarea)([^>]*)>(.*?)</`)
	for _, m := range fields.FindAllStringSubmatch(strings.ReplaceAll(body, "</option>", ""), -1) {
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

// TestAdminJourney: the pages alone are enough to create a project with limits and a token, and to
// use, rotate and revoke it.
func TestAdminJourney(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	form := parseForm(t, b.get("/admin/projects/new").body)
	form.Set("name", "From a page")
	form.Set("api_key", p.provider.key)
	form.Set("base_url", p.provider.url)
	form.Set("cost_multiplier", "0.85")
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
	want := `{"models":["gpt-4o-mini","claude-*"],"addresses":["127.0.0.1/32"],` +
		`"limits":[{"count":"tokens","max":1000,"per":"day"}]}`
	if string(project.Policy) != want || !project.IsActive || project.Multiplier != "0.85" {
		t.Errorf("the policy is %s, the multiplier %s", project.Policy, project.Multiplier)
	}
	page := b.get(here).body
	for _, want := range []string{"From a page", "0 of 1,000", "•••• " + p.provider.key[len(p.provider.key)-4:],
		"gpt-4o-mini, claude-*"} {
		if !strings.Contains(page, want) {
			t.Errorf("%q is not on the page", want)
		}
	}

	form = parseForm(t, b.get("/admin/tokens/new?project_id="+project.ID).body)
	if form.Get("project_id") != project.ID || form.Get("lifetime") != "720" {
		t.Errorf("the form starts with %v", form)
	}
	form.Set("name", "app")
	res = b.post("/admin/tokens/new", form)
	token := regexp.MustCompile(`sk-llmp_\w+`).FindString(res.body)
	if res.status != 200 || token == "" || strings.Count(res.body, token) != 5 || len(checkHTML(res.body)) > 0 {
		t.Fatalf("got %d %s %v", res.status, res.body, checkHTML(res.body))
	}
	p.secrets = append(p.secrets, token)
	// AD20
	if again := b.post("/admin/tokens/new", form); again.status != 409 || strings.Contains(again.body, "sk-llmp_") {
		t.Errorf("reloaded: %d %s", again.status, again.body)
	}
	if res := p.chatAs(token); res.status != 200 {
		t.Errorf("the token: %d %s", res.status, res.body)
	}
	p.waitSettled()
	id := "tok_" + token[len(tokenPrefix):][:publicLen]
	if page := b.get("/admin/tokens/" + id).body; !strings.Contains(page, "POST /v1/chat/completions") ||
		!strings.Contains(page, "active") || strings.Contains(page, token) {
		t.Errorf("the token's page: %s", page)
	}
	if calls := b.get("/admin/requests?token=" + id).body; strings.Count(calls, `href="/admin/requests/req_`) != 1 ||
		!strings.Contains(b.get("/admin/tokens/"+id).body, `"/admin/requests?token=`+id+`"`) {
		t.Errorf("the token's calls: %s", calls)
	}
	if page := b.get(here).body; !strings.Contains(page, "12 of 1,000") {
		t.Errorf("the project's page does not show the usage: %s", page)
	}
	res = b.post("/admin/tokens/"+id+"/rotate", parseForm(t, b.get("/admin/tokens/"+id+"/rotate").body))
	rotated := regexp.MustCompile(`sk-llmp_\w+`).FindString(res.body)
	p.secrets = append(p.secrets, rotated)
	if res.status != 200 || rotated == token || p.chatAs(rotated).status != 200 || p.chatAs(token).status != 200 {
		t.Errorf("rotated: %d %s", res.status, res.body)
	}
	if res := b.post("/admin/tokens/"+id+"/revoke", nil); res.status != 303 || p.chatAs(rotated).status != 401 ||
		p.chatAs(token).status != 401 {
		t.Errorf("revoked: %d", res.status)
	}
	if res := b.post("/admin/tokens/"+id+"/edit", url.Values{"name": {"x"}}); res.status != 400 ||
		!strings.Contains(res.body, "is revoked") {
		t.Errorf("edited after revocation: %d %s", res.status, res.body)
	}
	if res := b.post(here+"/deactivate", nil); res.status != 303 || !strings.Contains(b.get(here).body, "inactive") {
		t.Errorf("deactivated: %d", res.status)
	}
	if res := b.post(here+"/delete", nil); res.status != 303 || b.get(here).status != 404 {
		t.Errorf("deleted: %d", res.status)
	}
}

// A projectReply is a project as /manage returns it.
type projectReply struct {
	ID, Name   string
	IsActive   bool `json:"is_active"`
	Policy     json.RawMessage
	Routing    json.RawMessage
	Version    int64
	Multiplier json.Number `json:"cost_multiplier"`
	Upstreams  []struct {
		Multiplier     json.Number `json:"cost_multiplier"`
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

// TestAdminFormsKeepWhatIsStored: a form that is submitted unchanged changes nothing, whatever the
// policy.
func TestAdminFormsKeepWhatIsStored(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"other"}`, 201, &other)
	for _, body := range []string{`{}`, `{"models":[]}`,
		`{"endpoints":["POST /v1/audio/*"],"addresses":[],"stateful":true,"keep_content_days":3}`,
		`{"cache":{"ttl_seconds":60}}`,
		`{"attribution":{"tags":["team","task"],"required":["tag:team","session"],"end_users":"hashed"}}`,
		`{"attribution":{"required":["end_user"],"fixed_tags":{"team":"search","task":"a.b/c"}}}`,
		`{"attribution":{"end_users":"plain"}}`, `{"attribution":{"end_users":"off"}}`,
		`{"cache":{"ttl_seconds":2592000,"scope":"token","endpoints":["/v1/embeddings","/v1/chat/*"],"when":"always",` +
			`"max_entry_bytes":4096}}`,
		`{"models":["a","b*"],"limits":[{"count":"dollars","max":12.5,"per":"month","model":"gpt*","shadow":true},` +
			`{"count":"requests","max":9,"per":"day","for_each":"tag:team","max_values":70},` +
			`{"count":"concurrent","max":3},{"count":"requests","max":0,"per":"lifetime","endpoint":"/v1/*"}]}`} {
		ofProject, ofToken := body, strings.Replace(body, `,"stateful":true,"keep_content_days":3`, "", 1)
		if strings.Contains(body, "fixed_tags") { // tokens have them, projects do not
			ofProject = `{}`
		}
		p.manage("PATCH", "/manage/projects/"+p.project,
			`{"policy":`+ofProject+`,"cost_multiplier":0.1234,
			"routing":{"fallbacks":[{"model":"gpt-4o*","to":"gpt-4o-mini"}],"show_upstream":true,"affinity":"none",
			"aliases":{"smart":["a","b=c","d"],"fast":"gpt-5-mini"}}}`, 200, nil)
		p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream,
			`{"models":["x*"],"rewrite":{"a":"b=c"},"note":"ours","cost_multiplier":0.85,
			"requests_per_minute":7,"connect_ms":700,"answer_ms":90000,"priority":3,
			"shared_with":["`+other.ID+`"]}`, 200, nil)
		read := func() (v projectReply) {
			p.manage("GET", "/manage/projects/"+p.project, "", 200, &v)
			v.Version = 0
			return v
		}
		before := read()
		for _, path := range []string{"/admin/projects/" + p.project + "/edit", "/admin/projects/" + p.project +
			"/upstreams/" + p.upstream + "/edit"} {
			if res := b.post(path, parseForm(t, b.get(path).body)); res.status != 303 {
				t.Fatalf("%s: %d %s", path, res.status, res.body)
			}
		}
		if after := read(); fmt.Sprintf("%+v", after) != fmt.Sprintf("%+v", before) {
			t.Errorf("%s\nbefore %+v\nafter  %+v", body, before, after)
		}
		if body == `{}` || strings.Contains(body, "cache") || strings.Contains(body, "end_users") {
			continue // tokens have none of these
		}
		id, token := p.newToken(`"name":"keeps","expires_at":"2099-01-31T10:20:30.456Z",
			"idle_expiry_minutes":61,"max_requests":5,"policy":` + ofToken)
		p.secrets = append(p.secrets, token)
		was := b.p.manageAs(p.adminKey, "GET", "/manage/tokens/"+id, "").body
		if res := b.post("/admin/tokens/"+id+"/edit",
			parseForm(t, b.get("/admin/tokens/"+id+"/edit").body)); res.status != 303 {
			t.Fatalf("%d %s", res.status, res.body)
		}
		volatile := regexp.MustCompile(`"(version|updated_at)":[^,]*,`)
		if is := b.p.manageAs(p.adminKey, "GET", "/manage/tokens/"+id, "").body; volatile.ReplaceAllString(is,
			"") != volatile.ReplaceAllString(was, "") {
			t.Errorf("before %s\nafter  %s", was, is)
		}
	}
}

// TestAdminMistakes: a refused form shows the error beside its field, keeps the input, and changes
// nothing.
func TestAdminMistakes(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	p.manage("POST", "/manage/projects", `{"name":"taken"}`, 201, nil)
	project := "/admin/projects/" + p.project + "/edit"
	upstream := "/admin/projects/" + p.project + "/upstreams/" + p.upstream + "/edit"
	keyID, _ := p.newKey("k", "viewer")
	newProject, newToken := "/admin/projects/new", "/admin/tokens/new"
	token := "/admin/tokens/" + p.tokenID
	for _, c := range []struct{ path, name, value, field, says string }{
		{path: newProject, name: "name", value: "", says: "Name is required."},
		{path: newProject, name: "name", value: "taken", says: "is already taken"},
		{path: newProject, name: "base_url", value: "https://x.test", field: "api_key", says: "is required"},
		{path: newProject, name: "provider", value: "azure", field: "api_key", says: "is required"},
		{path: newProject, name: "policy.models", value: "a*b", says: "only at the end"},
		{path: newProject, name: "policy.endpoints", value: "chat", says: "must name endpoints"},
		{path: newProject, name: "policy.addresses", value: "10.0.0.1/8", says: "10.0.0.1/8 is neither"},
		{path: newProject, name: "policy.limits[0].max", value: "many", says: "must be dollars from 0"},
		{path: newProject, name: "policy.cache.ttl_seconds", value: "1h", says: "must be a whole number"},
		{path: project, name: "policy.cache.ttl_seconds", value: "0", says: "must be from 1 to 2592000"},
		{path: project, name: "policy.cache.endpoints", value: "/v1/files", field: "policy.cache.ttl_seconds",
			says: "is required"},
		{path: project, name: "policy.cache.max_entry_bytes", value: "5", field: "policy.cache.ttl_seconds",
			says: "is required"},
		{path: project, name: "policy.attribution.tags", value: "Team", says: "must have 50 keys or fewer"},
		{path: project, name: "policy.attribution.required", value: "tag:team", says: "tags does not allow this key"},
		{path: project, name: "policy.attribution.required", value: "user", says: "must list some of"},
		{path: newToken, name: "policy.attribution.fixed_tags", value: "team", says: "must be an object such as"},
		{path: token + "/edit", name: "policy.attribution.fixed_tags", value: "team = a b", says: "must be an object"},
		{path: project, name: "policy.limits[0].max", value: "-1", says: "must be dollars from 0"},
		{path: project, name: "routing.fallbacks", value: "gpt", says: "must have lines"},
		{path: project, name: "routing.fallbacks", value: "gpt = a b", says: "must be a model"},
		{path: project, name: "routing.aliases", value: "fast", says: "must have lines"},
		{path: project, name: "routing.aliases", value: "a = b\na = c", says: "no name twice"},
		{path: project, name: "routing.aliases", value: "fast = a,,b", says: "must be a model"},
		{path: upstream, name: "api_key", value: "sk-****", says: "masked"},
		{path: upstream, name: "base_url", value: "https://elsewhere.test", field: "api_key",
			says: "is required again"},
		{path: upstream, name: "priority", value: "x", says: "must be a whole number"},
		{path: upstream, name: "rewrite", value: "a", says: "must have lines"},
		{path: upstream, name: "connect_ms", value: "10001", says: "must be 0 or from 100 to 10000"},
		{path: upstream, name: "answer_ms", value: "1", says: "must be 0 or from 100"},
		{path: newToken, name: "expires_at", value: "2001-01-01T00:00", says: "must be in the future"},
		{path: newToken, name: "lifetime", value: "", field: "expires_at", says: "must be a time"},
		{path: newToken, name: "max_requests", value: "ten", says: "must be a whole number"},
		{path: newToken, name: "project_id", value: "proj_none", says: "does not exist"},
		{path: newToken, name: "policy.models", value: "a*b", says: "only at the end"},
		{path: token + "/edit", name: "name", value: " x", says: "white space"},
		{path: token + "/rotate", name: "overlap_minutes", value: "-1", says: "must be from 0"},
		{path: "/admin/keys/new", name: "role", value: "god", says: "must be viewer"},
		{path: "/admin/keys/" + keyID + "/edit", name: "expires_at", value: "soon", says: "must be a time"},
		{path: "/admin/prices/new", name: "match", value: "", says: "Model is required."},
		{path: "/admin/prices/new", name: "input", value: "-5", says: "must be dollars"},
		{path: project, name: "cost_multiplier", value: "0", says: "must be a number"},
		{path: upstream, name: "cost_multiplier", value: "101", says: "must be a number"},
		{path: "/admin/prices/new", name: "web_search_call", value: "1001", says: "must be dollars for one"},
		{path: "/admin/prices/new", name: "valid_from", value: "soon", says: "must be a time"},
		{path: "/admin/prices/new", name: "service_tier", value: "flex", says: "must be JSON"},
		{path: "/admin/prices/new", name: "service_tier", value: `{"slow":{}}`, says: "must have batch"},
		{path: "/admin/prices/new", name: "unknown_above_input_tokens", value: "-1", says: "must be a number"},
	} {
		c.field = cmp.Or(c.field, c.name)
		form := parseForm(t, b.get(c.path).body)
		for name, v := range map[string]string{"name": "fine", "match": "some-model", "output": "1"} {
			if form.Has(name) && form.Get(name) == "" {
				form.Set(name, v)
			}
		}
		if c.name == "expires_at" && c.path == newToken {
			form.Set("lifetime", "")
		}
		form.Set(c.name, c.value)
		before := p.managedDigest()
		res := b.post(c.path, form)
		_, after, _ := strings.Cut(res.body, `name="`+c.field+`"`)
		if len(after) > 2500 {
			after = after[:2500]
		}
		if res.status != 400 || !strings.Contains(html.UnescapeString(after), c.says) || len(checkHTML(res.body)) > 0 ||
			!strings.Contains(res.body, `aria-invalid="true"`) {
			t.Errorf("%s with %s=%q: %d, beside %s is %s %v", c.path, c.name, c.value, res.status, c.field, after,
				checkHTML(res.body))
		}
		again := parseForm(t, res.body)
		for name := range form {
			if name == "once" || name == "api_key" || strings.HasPrefix(name, "policy.limits[") {
				continue
			}
			if again.Get(name) != strings.TrimSuffix(form.Get(name), "\n") && again.Get(name) != form.Get(name) &&
				!(name == "role" || name == "project_id" || name == "overlap_minutes") {
				t.Errorf("%s with %s=%q: %s was %q and is now %q", c.path, c.name, c.value, name, form.Get(name),
					again.Get(name))
			}
		}
		if p.managedDigest() != before {
			t.Errorf("%s with %s=%q changed something", c.path, c.name, c.value)
		}
	}
}

// TestAdminMistakesSummary: above a refused form, links lead to every field with a mistake, in the words of the form;
// the first of them has the focus.
func TestAdminMistakesSummary(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	upstreams := "/admin/projects/" + p.project + "/upstreams"
	upstream := upstreams + "/" + p.upstream + "/edit"
	for _, c := range []struct {
		path  string
		set   map[string]string
		focus string
		links map[string]string // id of the input to the text
	}{
		{"/admin/tokens/new", map[string]string{"name": "x", "max_requests": "many", "idle_expiry_minutes": "soon"},
			"max_requests", map[string]string{"f-max_requests": "Maximum calls must be a whole number.",
				"f-idle_expiry_minutes": "Expires when idle (minutes) must be a whole number."}},
		{"/admin/tokens/new", map[string]string{"name": " ", "max_requests": "-1", "idle_expiry_minutes": "0"},
			"name", map[string]string{"f-name": "Name must", "f-max_requests": "or more, or empty (unlimited).",
				"f-idle_expiry_minutes": "at most 100 years, or empty."}},
		{"/admin/projects/new", map[string]string{"name": "x", "policy.limits[0].count": "requests",
			"policy.limits[0].max": "9", "policy.limits[0].per": ""},
			"policy.limits[0].per", map[string]string{
				"limit-0-per": "Limit 1: Period must be second, minute, hour, day, week, month or in total."}},
		{"/admin/projects/new", map[string]string{"name": "", "policy.limits[0].max": "9",
			"policy.limits[0].count": "dollars", "policy.limits[0].per": "minute"}, "name", map[string]string{
			"f-name":      "Name is required.",
			"limit-0-per": "Limit 1: Period must be hour, day, week, month or in total."}},
		{"/admin/tokens/new", map[string]string{"name": "", "expires_at": "2020-01-01T00:00", "max_requests": "-1",
			"policy.limits[0].max": "x"}, "name", map[string]string{"f-name": "Name is required.",
			"f-expires_at": "must be in the future", "limit-0-max": "Limit 1: Maximum must",
			"f-max_requests": "or more"}},
		{"/admin/keys/new", map[string]string{"name": "", "expires_at": "2020-01-01T00:00"}, "name",
			map[string]string{"f-name": "Name is required.", "f-expires_at": "must be in the future"}},
		{upstreams + "/new", map[string]string{"name": "", "base_url": "ftp://x", "priority": "-1"}, "name",
			map[string]string{"f-name": "Name is required.", "f-api_key": "API key is required.",
				"f-base_url": "Base URL must", "f-priority": "must be from 0"}},
		{"/admin/projects/new", map[string]string{"name": "", "base_url": "ftp://x"}, "name", map[string]string{
			"f-name": "Name is required.", "f-api_key": "API key is required with"}},
		{"/admin/projects/new", map[string]string{"name": "x", "policy.models": "a*b"}, "policy.models",
			map[string]string{"f-policy-models": "Models may have * only at the end"}},
		{upstream, map[string]string{"base_url": "https://elsewhere.test"}, "api_key",
			map[string]string{"f-api_key": "New API key is required again when “Base URL” changes."}},
		{upstream, map[string]string{"priority": "x", "weight": "y", "connect_ms": "z"}, "priority", map[string]string{
			"f-priority": "must be a whole number", "f-weight": "must be a whole number", "f-connect_ms": "whole"}},
		// Numbers that cannot be read, such as those with a decimal comma, are among the other mistakes.
		{upstream, map[string]string{"name": "", "priority": "1e99", "rewrite": "x"}, "name", map[string]string{
			"f-name": "required", "f-priority": "whole", "f-rewrite": "lines"}},
		{"/admin/tokens/new", map[string]string{"name": "", "idle_expiry_minutes": "1,5", "policy.addresses": "x",
			"policy.limits[0].max": "1,5", "policy.limits[1].max": "1e99", "policy.limits[1].count": "requests",
			"policy.limits[1].per": "day", "policy.models": "a*b"}, "name", map[string]string{"f-name": "required",
			"f-policy-models": "may have *", "limit-0-max": "Limit 1: Maximum", "limit-1-max": "Limit 2: Maximum",
			"f-idle_expiry_minutes": "must be a whole number", "f-policy-addresses": "must have networks"}},
		{"/admin/projects/new", map[string]string{"name": "x", "cost_multiplier": "1,5", "routing.aliases": "x",
			"policy.keep_content_days": "abc", "policy.cache.ttl_seconds": "1,5", "policy.cache.max_entry_bytes": "x",
			"policy.attribution.required": "x"}, "routing.aliases", map[string]string{"f-routing-aliases": "lines",
			"f-cost_multiplier": "must be a number", "f-policy-keep_content_days": "must be a whole number",
			"f-policy-cache-ttl_seconds": "whole", "f-policy-cache-max_entry_bytes": "must be a whole number",
			"f-policy-attribution-required": "must list"}},
	} {
		form := parseForm(t, b.get(c.path).body)
		for name, value := range c.set {
			form.Set(name, value)
		}
		res := b.post(c.path, form)
		page := html.UnescapeString(res.body)
		for name, value := range parseForm(t, res.body) {
			if form.Get(name) != value[0] && name != "once" {
				t.Errorf("%s with %v: %s came back as %q", c.path, c.set, name, value)
			}
		}
		_, summary, _ := strings.Cut(page, `role="alert"`)
		summary, _, _ = strings.Cut(summary, "</ul>")
		if res.status != 400 || strings.Count(summary, "<li>") != len(c.links) || len(checkHTML(res.body)) > 0 {
			t.Errorf("%s with %v: %d %v, summary %s", c.path, c.set, res.status, checkHTML(res.body), summary)
		}
		for id, text := range c.links {
			line := regexp.MustCompile(`<a href="#` + id + `">([^<]*)</a>`).FindStringSubmatch(summary)
			if line == nil || !strings.Contains(line[1], text) || !strings.Contains(page, `id="`+id+`"`) {
				t.Errorf("%s with %v: no link to %s with %q in %s", c.path, c.set, id, text, summary)
			}
		}
		at := 0
		for _, link := range regexp.MustCompile(`<a href="#([^"]*)">`).FindAllStringSubmatch(summary, -1) {
			next := strings.Index(page, `id="`+link[1]+`"`)
			if next < at {
				t.Errorf("%s with %v: the order is not that of the page: %s", c.path, c.set, summary)
			}
			at = next
		}
		focus := regexp.MustCompile(`<[^>]* name="([^"]*)"[^>]* autofocus`).FindAllStringSubmatch(page, -1)
		if len(focus) != 1 || focus[0][1] != c.focus {
			t.Errorf("%s with %v: the focus is at %q", c.path, c.set, focus)
		}
	}
}

// TestAdminTokenExpiry: a date that was chosen is never ignored, whatever the list of times says.
func TestAdminTokenExpiry(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	date := time.Now().UTC().AddDate(0, 2, 0).Format("2006-01-02T15:04")
	in := func(d time.Duration) string { return time.Now().UTC().Add(d).Format("2006-01-02") }
	for _, c := range []struct{ lifetime, date, want string }{
		{"720", "", in(720 * time.Hour)}, {"1", "", in(time.Hour)}, {"never", "", ""},
		{"720", date, date}, {"never", date, date}, {"", date, date}, {"1", date, date},
	} {
		form := parseForm(t, b.get("/admin/tokens/new?project_id="+p.project).body)
		form.Set("name", "token")
		form.Set("lifetime", c.lifetime)
		form.Set("expires_at", c.date)
		res := b.post("/admin/tokens/new", form)
		id := regexp.MustCompile(`/admin/tokens/(tok_\w+)`).FindStringSubmatch(res.body)
		if res.status != 200 || id == nil {
			t.Fatalf("%v: %d %s", c, res.status, res.body)
		}
		p.secrets = append(p.secrets, regexp.MustCompile(`sk-llmp_\w+`).FindString(res.body))
		var token struct {
			ExpiresAt *string `json:"expires_at"`
		}
		p.manage("GET", "/manage/tokens/"+id[1], "", 200, &token)
		got := ""
		if token.ExpiresAt != nil {
			got = *token.ExpiresAt
		}
		if !strings.HasPrefix(got, c.want) || c.want == "" && got != "" {
			t.Errorf("%v: the token expires at %q", c, got)
		}
	}
	form := parseForm(t, b.get("/admin/tokens/new?project_id="+p.project).body)
	form.Set("name", "token")
	form.Set("expires_at", "2001-01-01T00:00") // with the list as it is
	if res := b.post("/admin/tokens/new", form); res.status != 400 || strings.Contains(res.body, "sk-llmp_") {
		t.Errorf("a date in the past: %d", res.status)
	}
}

// TestAdminLostUpdate (AD14): a form that was opened before someone else's change is refused.
func TestAdminLostUpdate(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	for path, change := range map[string]string{
		"/admin/projects/" + p.project + "/edit": "/manage/projects/" + p.project, "/admin/tokens/" + p.tokenID +
			"/edit": "/manage/tokens/" + p.tokenID,
		"/admin/projects/" + p.project + "/upstreams/" + p.upstream + "/edit": "/manage/projects/" + p.project +
			"/upstreams/" + p.upstream,
	} {
		form := parseForm(t, b.get(path).body)
		p.manage("PATCH", change, `{"name":"theirs"}`, 200, nil)
		form.Set("name", "mine")
		res := b.post(path, form)
		if again := parseForm(t, res.body); res.status != 409 ||
			!strings.Contains(res.body, "Someone else changed this") || again.Get("name") != "mine" ||
			again.Get("version") != form.Get("version") {
			t.Errorf("%s: got %d %s", path, res.status, res.body)
		}
		if res := p.manageAs(p.adminKey, "GET", change, ""); !strings.Contains(res.body, "theirs") {
			t.Errorf("%s: overwritten: %s", path, res.body)
		}
	}
}

// TestAdminKeysAndBulk: keys are created and revoked, except one's own; several tokens are revoked
// together after a confirmation.
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
		t.Errorf("revoking one's own key: %d %s", res.status, res.body)
	}
	var ids []string
	for range 3 {
		id, _ := p.newToken(`"name":"many"`)
		ids = append(ids, id)
	}
	before := p.managedDigest()
	res = grace.post("/admin/tokens/revoke", url.Values{"id": ids})
	if res.status != 200 || p.managedDigest() != before || strings.Count(res.body, "many (tok_") != 3 ||
		len(checkHTML(res.body)) > 0 {
		t.Errorf("before the confirmation: %d %s", res.status, res.body)
	}
	if res := grace.post("/admin/tokens/revoke", url.Values{"id": ids, "sure": {"yes"}}); res.status != 303 {
		t.Errorf("confirmed: %d %s", res.status, res.body)
	}
	for _, id := range ids {
		if res := p.manageAs(p.adminKey, "GET", "/manage/tokens/"+id, ""); !strings.Contains(res.body,
			`"is_active":false`) {
			t.Errorf("%s is still active", id)
		}
	}
	if res := grace.post("/admin/tokens/revoke", nil); res.header.Get("Location") != "/admin/tokens" ||
		!strings.Contains(grace.follow(res), "No token was selected.") {
		t.Errorf("none selected: %d %v", res.status, res.header)
	}
	if res := b.post("/admin/keys/key_"+key[len(manageKeyPrefix):][:publicLen]+"/revoke", nil); res.status != 303 ||
		grace.isSignedIn() {
		t.Errorf("revoking a key: %d", res.status)
	}
}

// TestAdminTokenList: each filter with each order lists exactly the matching tokens, over all pages.
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
		row := &tokenRow{id: fmt.Sprintf("tok_n%03d", i), projectID: project, name: fmt.Sprintf("n%02d", i%40),
			hash: fmt.Appendf(nil, "%032d", i), policy: "{}", createdAt: now, updatedAt: now}
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
					if (project != "" || name != "") && strings.HasPrefix(order.Value, "-") {
						continue // as without the minus
					}
					var got []string
					path := "/admin/tokens?" +
						url.Values{"state": {state.Value}, "order": {order.Value}, "project_id": {project},
							"name": {name}}.Encode()
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
						if is(i, state.Value) &&
							!(strings.HasSuffix(order.Value, "ends") && state.Value != "revoked" && name == "" &&
								is(i, "revoked")) &&
							(project == "" || i%3 == 0) && strings.HasPrefix(fmt.Sprintf("n%02d", i%40), name) {
							want = append(want, fmt.Sprintf("tok_n%03d", i))
						}
					}
					if order.Value == "" && state.Value == "" && name == "" &&
						!slices.IsSortedFunc(got, func(a, b string) int { return strings.Compare(b, a) }) {
						t.Errorf("not newest first: %v", got)
					}
					if order.Value == "oldest" && name == "" && !slices.IsSorted(got) {
						t.Errorf("not oldest first: %v", got)
					}
					slices.Sort(got)
					if !slices.Equal(got, want) {
						t.Errorf("state %q order %q project %q name %q:\ngot  %v\nwant %v", state.Value, order.Value,
							project, name, got, want)
					}
				}
			}
		}
	}
	// AD15
	for _, query := range []string{"state=;drop", "order=x", "after=x", "after=-1.", "after=zzzzzzzzzzzzzzzz.",
		"order=ends&after=5.!", "name=" + strings.Repeat("x", 101), "state=active&state=active"} {
		if res := b.get("/admin/tokens?" + query); res.status != 400 {
			t.Errorf("%s: got %d", query, res.status)
		}
	}
	for _, name := range []string{"%", "_", "n__", "*", "'", `\`} {
		if res := b.get("/admin/tokens?name=" + url.QueryEscape(name)); res.status != 200 ||
			link.MatchString(res.body) {
			t.Errorf("%q: got %d %s", name, res.status, res.body)
		}
	}
	if res := b.get("/admin/tokens?name=tok_n007"); res.header.Get("Location") != "/admin/tokens/tok_n007" {
		t.Errorf("an id: %d %v", res.status, res.header)
	}
}

// TestAdminContent: stored content is shown to admins only, after a POST, and can be deleted.
func TestAdminContent(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	p.chat()
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"keep_content_days":2}}`, 200, nil)
	p.chat(`"user":"<script>"`)
	rows := p.ledger()
	if res := b.post("/admin/requests/"+rows[0].ID+"/content", nil); res.status != 404 {
		t.Errorf("a call without content: %d %s", res.status, res.body)
	}
	path := "/admin/requests/" + rows[1].ID + "/content"
	res := b.post(path, nil)
	if res.status != 200 || !strings.Contains(res.body, promptCanary) || strings.Contains(res.body, "<script>") ||
		len(checkHTML(res.body)) > 0 {
		t.Errorf("got %d %v %s", res.status, checkHTML(res.body), res.body)
	}
	if res := b.get(path); res.status != 405 {
		t.Errorf("by GET: %d", res.status)
	}
	_, key := p.newKey("o", "operator")
	if res := p.signIn(key).post(path, nil); res.status != 403 {
		t.Errorf("an operator: %d", res.status)
	}
	if res := b.post("/admin/projects/"+p.project+"/erase", nil); res.status != 303 || b.post(path, nil).status != 404 {
		t.Errorf("erased: %d", res.status)
	}
	if page := b.get("/admin/audit?object=" + rows[1].ID).body; !strings.Contains(page, "reveal") {
		t.Errorf("the audit trail does not record the view: %s", page)
	}
}

// TestPricesPages: the pages lead from a model without a price to the form that sets one, of every kind and from a
// time on, and the list can be searched page by page.
func TestPricesPages(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(200, strings.ReplaceAll(chatResponseBody, "gpt-4o-mini-2024-07-18", "no/price+1"))
	})
	p.do("POST", chatPattern, strings.Replace(chatBody(), "gpt-4o-mini", "no/price+1", 1), p.jsonHeaders()...)
	p.waitSettled()
	expect := func(path string, wants ...string) string {
		t.Helper()
		res := b.get(path)
		for _, want := range wants {
			if !strings.Contains(pageText(t, res.body), want) {
				t.Errorf("%q is not on %s: %s", want, path, pageText(t, res.body))
			}
		}
		if problems := checkHTML(res.body); res.status != 200 || len(problems) > 0 {
			t.Errorf("%s: %d %v", path, res.status, problems)
		}
		return res.body
	}
	page := expect("/admin/prices", "Models without a price", "no/price+1 1 1 9 3 Set a price")
	calls := html.UnescapeString(between(b.get("/admin/dashboard").body, `<dd class="soft"><a href="`,
		`">1 without a price</a>`))
	calls = calls[strings.LastIndex(calls, `"`)+1:]
	if !strings.Contains(calls, "cost=none") || !strings.Contains(pageText(t, b.get(calls).body), "no/price+1") {
		t.Errorf("the dashboard leads to %q, not to the calls without a price", calls)
	}
	link := html.UnescapeString(between(page, `/admin/prices/new?match=`, `"`))
	form := parseForm(t, expect("/admin/prices/new?match="+link, "Advanced"))
	if form.Get("match") != "no/price+1" {
		t.Errorf("the form is for the model %q", form.Get("match"))
	}
	for _, info := range priceKinds {
		if !form.Has(info.name) {
			t.Errorf("the form has no field for %s", info.name)
		}
		form.Set(info.name, "2")
	}
	form.Set("valid_from", "2027-05-01T10:00")
	form.Set("service_tier", `{"flex":{"input":1,"output":1}}`)
	form.Set("unknown_above_input_tokens", "100000")
	if res := b.post("/admin/prices/new", form); res.status != 303 {
		t.Fatalf("%d %s", res.status, pageText(t, res.body))
	}
	expect("/admin/prices", "from 2027-05-01 10:00 $2.00", "web searches $2.00 each", "minutes of input $2.00/minute",
		"image output $2.00/M", "service tiers")
	var own struct {
		Data []map[string]any
	}
	p.manage("GET", "/manage/prices", "", 200, &own)
	for _, info := range priceKinds {
		if own.Data[0][info.name] == nil {
			t.Errorf("the price has no %s: %v", info.name, own.Data[0])
		}
	}
	if own.Data[0]["valid_from"] != "2027-05-01T10:00:00.000Z" && own.Data[0]["valid_from"] != "2027-05-01T10:00:00Z" {
		t.Errorf("valid from %v", own.Data[0]["valid_from"])
	}
	expect("/admin/prices/list?search=GPT-4o-mini&provider=openai", "gpt-4o-mini openai, as of 20", "$0.15 $0.60")
	expect("/admin/prices/list?search=nothing-like-this", "No matching models")
	expect("/admin/prices/simulate?model=gpt-4o-mini&input_tokens=2,000&cached_tokens=1200&output_tokens=10",
		"1,200 cached input × $0.075/M = $0.00009", "Total $0.000216", "List price of gpt-4o-mini")
	usage := url.QueryEscape(`{"input_tokens":1000,"cache_read_input_tokens":2000,"output_tokens":100}`)
	expect("/admin/prices/simulate?model=claude-sonnet-4-5&usage="+usage,
		"2,000 cached input × $0.30/M = $0.0006", "Total $0.0051")
	expect("/admin/prices/simulate?model=gpt-4o-mini", "The previous month with gpt-4o-mini", "Actual cost $0.00")
	expect("/admin/prices/simulate?model=none&input_tokens=1", "There is no price for this usage of none.")
	for query, says := range map[string]string{
		"model=": "Model is required.", "model=m&input_tokens=x": "Input tokens must be a whole number",
		"model=m&usage=x":                  "must be a JSON object",
		"model=m&usage={}&output_tokens=1": "must not be given together with usage",
	} {
		res := b.get("/admin/prices/simulate?" + query)
		if text := pageText(t, res.body); res.status != 400 || !strings.Contains(text, says) {
			t.Errorf("%s: %d, no %q in %s", query, res.status, says, text)
		}
	}
	names, pages := 0, 0
	for path := "/admin/prices/list"; path != "" && pages < 50; pages++ {
		page := expect(path)
		names += strings.Count(page, `<td class="name">`)
		next := regexp.MustCompile(`href="([^"]*)" rel="next"`).FindStringSubmatch(page)
		if path = ""; next != nil {
			path = html.UnescapeString(next[1])
		}
	}
	if want := len(p.instance.server.admin.ops.prices.Load().search("", "")); names != want || pages < 2 {
		t.Errorf("%d pages have %d models, want %d", pages, names, want)
	}
}

// TestTextsExist: every text that the source names is in the templates: help of fields, questions, introductions and
// notices.
func TestTextsExist(t *testing.T) {
	t.Parallel()
	var templates strings.Builder
	for _, name := range []string{"confirm", "form", "parts/help", "parts/layout"} {
		templates.WriteString(mustReadFile(t, "templates/"+name+".html"))
	}
	names := regexp.MustCompile(`(?:Ask|Help|help|Intro): "([a-z-]+)"|redirectTo\([^\n]*, "([a-z-]+)"\)|` +
		`signedOut\("([a-z-]+)"|confirmProject\(r, [^,]+, "([a-z-]+)", "[^"]+", "([a-z-]+)"`)
	seen := 0
	for _, file := range []string{"admin.go", "admin_forms.go", "admin_policy_form.go", "admin_projects.go",
		"admin_session.go", "admin_system.go", "admin_tokens.go", "manage_fields.go"} {
		for _, m := range names.FindAllStringSubmatch(mustReadFile(t, file), -1) {
			for _, name := range m[1:] {
				if name == "" {
					continue
				}
				seen++
				if !strings.Contains(templates.String(), `eq . "`+name+`"`) {
					t.Errorf("%s names the text %q, which no template has", file, name)
				}
			}
		}
	}
	if seen < 50 {
		t.Errorf("only %d names of texts were found", seen)
	}
}

// TestWebhookPages: webhooks are created, tested, changed, rotated and deleted with forms; the secret is shown once,
// and the URL never.
func TestWebhookPages(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	receiver := newFakeProvider(t)
	receiver.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(500, "no") })
	b := p.signIn(p.adminKey)
	form := parseForm(t, b.get("/admin/webhooks/new").body)
	form.Set("name", "<b>ops")
	form.Set("url", "ftp://example.com")
	if res := b.post("/admin/webhooks/new", form); res.status != 400 || !strings.Contains(res.body, "absolute URL") {
		t.Errorf("got %d %s", res.status, res.body)
	}
	form = parseForm(t, b.get("/admin/webhooks/new").body)
	form.Set("name", "<b>ops")
	form.Set("url", receiver.url+hookCanary)
	form.Set(eventField(eventExpiry), "on")
	res := b.post("/admin/webhooks/new", form)
	value := between(res.body, `<code id="secret">`, `</code>`)
	if res.status != 200 || !strings.HasPrefix(value, "whsec_") {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	if again := b.post("/admin/webhooks/new", form); again.status != 409 {
		t.Errorf("the form is carried out twice: %d", again.status)
	}
	path := "/admin/webhooks/hook_" + between(res.body, `"/admin/webhooks/hook_`, `"`)
	p.secrets = append(p.secrets, hookCanary)
	if page := b.follow(b.post(path+"/test", nil)); !strings.Contains(page, "was not delivered") ||
		!strings.Contains(page, "answered 500") || !strings.Contains(page, "&lt;b&gt;ops") {
		t.Errorf("got %s", page)
	}
	receiver.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(200, "") })
	delivery := between(b.get(path).body, "/deliveries/", "/")
	if page := b.follow(b.post(path+"/deliveries/"+delivery+"/redeliver", nil)); !strings.Contains(page, "sent again") {
		t.Errorf("got %s", page)
	}
	waitFor(t, "the repetition", func() bool { return len(receiver.received()) == 2 })
	form = parseForm(t, b.get(path+"/edit").body)
	if form.Get("url") != "" || form.Get(eventField(eventExpiry)) == "" || form.Get(eventField(eventLimit)) != "" {
		t.Errorf("the form has %v", form)
	}
	form.Set("name", "renamed")
	form.Set(eventField(eventLimit), "on")
	page := b.follow(b.post(path+"/edit", form))
	if !strings.Contains(page, "renamed") ||
		!strings.Contains(page, "<code>limit.threshold</code>, <code>token.expiring") {
		t.Errorf("got %s", page)
	}
	res = b.post(path+"/rotate", parseForm(t, b.get(path+"/rotate").body))
	if got := between(res.body, `<code id="secret">`, `</code>`); got == value || !strings.HasPrefix(got, "whsec_") {
		t.Errorf("got %d %s", res.status, res.body)
	}
	if page = b.get("/admin/webhooks").body; !strings.Contains(page, "renamed") || strings.Contains(page, value) {
		t.Errorf("got %s", page)
	}
	_, operator := p.newKey("o", "operator")
	o := p.signIn(operator)
	if page = o.get(path).body; strings.Contains(page, path+"/edit") || !strings.Contains(page, path+"/test") {
		t.Errorf("an operator sees %s", page)
	}
	if res = o.post(path+"/delete", nil); res.status != 403 {
		t.Errorf("got %d", res.status)
	}
	if page = b.follow(b.post(path+"/delete", nil)); !strings.Contains(page, "Webhook deleted") ||
		!strings.Contains(page, "No webhooks yet") {
		t.Errorf("got %s", page)
	}
}
