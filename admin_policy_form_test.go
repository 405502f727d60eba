// Tests of the part of forms that is about policies: presets, rows of limits, and the advanced fields.
package main

import (
	"encoding/json"
	"fmt"
	"html"
	"maps"
	"net/url"
	"regexp"
	"strings"
	"testing"
)

// TestPresets: each preset is a valid policy of a project and, as a form sends it, of a token.
func TestPresets(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	for _, preset := range policyPresets() {
		want, err := parsePolicy([]byte(preset.policy), true)
		if err != nil {
			t.Errorf("%s: %v", preset.name, err)
			continue
		}
		spends := 0
		for _, l := range want.Limits {
			if l.metric == metricDollars {
				spends++
			}
		}
		if spends == 0 || preset.title == "" || !strings.HasSuffix(preset.about, ".") {
			t.Errorf("%s has no limit of dollars, no title or no text", preset.name)
		}
		form := parseForm(t, b.get("/admin/projects/new?preset="+preset.name).body)
		form.Set("name", preset.name)
		res := b.post("/admin/projects/new", form)
		var project projectReply
		p.manage("GET", "/manage/projects/proj_"+between(b.follow(res), `id="id-proj_`, `"`), "", 200, &project)
		if string(project.Policy) != want.String() {
			t.Errorf("the project with %s has the policy %s, not %s", preset.name, project.Policy, want.String())
		}
		want.Stateful = false // a token cannot have it
		form = parseForm(t, b.get("/admin/tokens/new?project_id="+p.project+"&preset="+preset.name).body)
		form.Set("name", preset.name)
		if form.Get("lifetime") != preset.lifetime || form.Get("project_id") != p.project {
			t.Errorf("the form with %s has %v", preset.name, form)
		}
		res = b.post("/admin/tokens/new", form)
		p.secrets = append(p.secrets, regexp.MustCompile(`sk-llmp_\w+`).FindString(res.body))
		var token struct{ Policy json.RawMessage }
		p.manage("GET", "/manage/tokens/tok_"+between(res.body, `/admin/tokens/tok_`, `"`), "", 200, &token)
		if string(token.Policy) != want.String() {
			t.Errorf("the token with %s has the policy %s, not %s", preset.name, token.Policy, want.String())
		}
	}
	before := p.managedDigest()
	for _, name := range []string{"", "none", "<script>"} {
		path := "/admin/projects/new?preset=" + url.QueryEscape(name)
		if res := b.get(path); !strings.Contains(res.body, "There is no preset") || len(checkHTML(res.body)) > 0 {
			t.Errorf("%s: %d %v", path, res.status, checkHTML(res.body))
		}
		form := url.Values{"name": {"x"}, "preset": {name}}
		if res := b.post("/admin/projects/new", form); !strings.Contains(res.body, "There is no preset") {
			t.Errorf("a form with the preset %q: %d", name, res.status)
		}
	}
	if p.managedDigest() != before {
		t.Error("a form with an unknown preset changed something")
	}
}

// TestFormEdits: the buttons that add or remove a limit or fill in a preset return the form with its input and change
// nothing; what a preset does not set stays.
func TestFormEdits(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	typed := url.Values{"name": {"typed"}, "api_key": {"sk-canary-0123456789abcdefWXYZ"}, "policy.models": {"a*"},
		"policy.addresses": {"10.0.0.0/8"}, "policy.stateful": {"on"}, "version": {"1"},
		"policy.limits[0].max": {"1"}, "policy.limits[0].count": {"tokens"}, "policy.limits[0].per": {"day"},
		"policy.limits[7].max": {"x"}, "policy.limits[7].count": {"dollars"}, "policy.limits[7].per": {"month"},
		"policy.limits[7].shadow": {"on"}, "policy.limits[NEW].max": {"9"}, "policy.limits[-1].max": {"9"}}
	p.secrets = append(p.secrets, typed.Get("api_key"))
	rows := func(form url.Values) string {
		var all []string
		for i := range 25 {
			if name := fmt.Sprintf("policy.limits[%d].", i); form.Has(name + "count") {
				all = append(all, form.Get(name+"max")+" "+form.Get(name+"count")+" "+form.Get(name+"per"))
			}
		}
		return strings.Join(all, ", ")
	}
	for _, path := range []string{"/admin/projects/new", "/admin/projects/" + p.project + "/edit",
		"/admin/tokens/new", "/admin/tokens/" + p.tokenID + "/edit"} {
		for _, c := range []struct{ button, value, models, limits, focus string }{
			{"add_limit", "yes", "a*", "1 tokens day, x dollars month,  requests minute", "policy.limits[2].max"},
			{"remove_limit", "0", "a*", "x dollars month", "add_limit"},
			{"remove_limit", "7", "a*", "1 tokens day", "add_limit"},
			{"remove_limit", "5", "a*", "1 tokens day, x dollars month", "add_limit"},
			{"preset", "batch-job", "", "100 dollars lifetime, 3000 requests minute, 64 concurrent ", ""},
		} {
			form, before := url.Values{}, p.managedDigest()
			maps.Copy(form, typed)
			form.Set(c.button, c.value)
			res := b.post(path, form)
			again := parseForm(t, res.body)
			if problems := checkHTML(res.body); res.status != 200 || len(problems) > 0 || p.managedDigest() != before {
				t.Fatalf("%s with %s=%s: %d %v %s", path, c.button, c.value, res.status, problems, res.body)
			}
			if again.Get("name") != "typed" || again.Get("policy.addresses") != "10.0.0.0/8" ||
				again.Get("policy.models") != c.models || again.Get("api_key") != "" || rows(again) != c.limits {
				t.Errorf("%s with %s=%s: %v", path, c.button, c.value, again)
			}
			focus := regexp.MustCompile(`<[^>]* name="([^"]*)"[^>]* autofocus`).FindStringSubmatch(res.body)
			if c.focus != "" && (focus == nil || focus[1] != c.focus) {
				t.Errorf("%s with %s=%s: the focus is at %q", path, c.button, c.value, focus)
			}
			if strings.HasSuffix(path, "projects/new") && !strings.Contains(res.body, "Enter it again") {
				t.Errorf("%s with %s=%s does not ask for the key again", path, c.button, c.value)
			}
		}
	}
	many := url.Values{"name": {"many"}}
	for i := range 30 {
		many.Set(fmt.Sprintf("policy.limits[%d].max", 3*i), "1")
		many.Set(fmt.Sprintf("policy.limits[%d].count", 3*i), "requests")
		many.Set(fmt.Sprintf("policy.limits[%d].per", 3*i), "day")
		many.Set(fmt.Sprintf("policy.limits[%d].model", 3*i), fmt.Sprintf("m%d", i))
	}
	res := b.post("/admin/projects/new", many)
	if res.status != 400 || !strings.Contains(res.body, "20 entries or fewer") ||
		!strings.Contains(res.body, `value="m29"`) {
		t.Errorf("30 limits: %d %s", res.status, res.body)
	}
}

// TestLimitMistakes: a mistake in a limit is shown in the row that has it, wherever empty rows are.
func TestLimitMistakes(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	form := url.Values{"name": {"x"}, "policy.limits[0].count": {"requests"}, "policy.limits[0].per": {"day"}}
	for i, row := range []string{"5 requests day", " requests minute", "7 requests week", "x tokens day"} {
		for n, name := range []string{"max", "count", "per"} {
			form.Set(fmt.Sprintf("policy.limits[%d].%s", 2*i+1, name), strings.Split(row, " ")[n])
		}
	}
	res := b.post("/admin/projects/new", form)
	if want := `<a href="#limit-4-max">Limit 5: Maximum must be a whole number`; res.status != 400 ||
		!strings.Contains(res.body, want) || !strings.Contains(res.body, `id="limit-4-error"`) {
		t.Errorf("got %d %s", res.status, res.body)
	}
	form.Set("policy.limits[7].max", "8")
	form.Set("policy.limits[5].per", "day") // now the first and the third count the same
	res = b.post("/admin/projects/new", form)
	want := `<a href="#limit-3-max">Limit 4: This limit counts the same as limit 2; keep one of them.</a>`
	if res.status != 400 || !strings.Contains(res.body, want) {
		t.Errorf("got %d %s", res.status, res.body)
	}
}

// TestAdvancedFields: a form hides its advanced fields, unless one of them has a value of its own or a mistake.
func TestAdvancedFields(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	isOpen := func(body string) bool {
		if !strings.Contains(body, `<details class="advanced"`) {
			t.Errorf("there are no advanced fields: %s", body)
		}
		return strings.Contains(body, `<details class="advanced" open>`)
	}
	project, token := "/projects/"+p.project, "/tokens/"+p.tokenID
	upstream := project + "/upstreams/" + p.upstream
	for _, path := range []string{"/projects/new", "/tokens/new", project + "/upstreams/new", "/webhooks/new",
		"/prices/new", project + "/edit", token + "/edit", upstream + "/edit"} {
		if isOpen(b.get("/admin" + path).body) {
			t.Errorf("the advanced fields of %s are open", path)
		}
	}
	for _, c := range []struct{ path, body string }{
		{project, `{"policy":{"cache":{"ttl_seconds":60}}}`}, {project, `{"policy":{"endpoints":[]}}`},
		{project, `{"policy":{"models":[]}}`}, {project, `{"policy":{"attribution":{"end_users":"off"}}}`},
		{project, `{"policy":{},"cost_multiplier":0.5}`},
		{project, `{"cost_multiplier":1,"routing":{"affinity":"none"}}`},
		{token, `{"max_requests":5}`}, {token, `{"max_requests":null,"policy":{"addresses":["10.0.0.0/8"]}}`},
		{upstream, `{"priority":1}`}, {upstream, `{"priority":0,"models":["gpt*"]}`},
		{upstream, `{"models":[],"idle_ms":5000}`},
	} {
		p.manage("PATCH", "/manage"+c.path, c.body, 200, nil)
		if !isOpen(b.get("/admin" + c.path + "/edit").body) {
			t.Errorf("with %s the advanced fields of %s are closed", c.body, c.path)
		}
	}
	res := b.post("/admin/tokens/new", url.Values{"once": {"a"}, "name": {"x"}, "idle_expiry_minutes": {"soon"}})
	page := html.UnescapeString(res.body)
	if !isOpen(page) || !strings.Contains(page, `href="#f-idle_expiry_minutes"`) {
		t.Errorf("with a mistake in them: %d %s", res.status, page)
	}
}

// TestPolicyInWords: the audit trail shows a policy's limits as the sentences that pages and refusals have.
func TestPolicyInWords(t *testing.T) {
	t.Parallel()
	for policy, want := range map[string]string{
		`{}`: "{}", `"x"`: "x", `{"models":[]}`: "models: none",
		`{"limits":[{"count":"dollars","max":50,"per":"month","model":"gpt-5*","shadow":true},
			{"count":"concurrent","max":1}],"models":["a","b*"],"stateful":true}`: "limits: $50.00 per month for " +
			"models gpt-5* (monitor only), 1 call at one time; models: a, b*; stateful: true",
		`{"limits":[{"count":"pages","max":5}]}`: `limits: {"count":"pages","max":5}`,
	} {
		if got := describePolicy(json.RawMessage(policy)); got != want {
			t.Errorf("%s is shown as %q, not %q", policy, got, want)
		}
	}
}

// TestProjectLikeAnother: a new project can have the policy, the routing and the upstreams of another one, but not
// their keys: each key is entered, and tested, and an upstream without one is left out.
func TestProjectLikeAnother(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	list := `{"data":[{"id":"gpt-4o"},{"id":"gpt-4o-mini"}]}`
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if r.header.Get("X-Api-Key") != "" {
			return c.reply(401, `{"error":{"type":"authentication_error"}}`)
		}
		return c.reply(200, list)
	})
	policy := `{"models":["gpt-4o*"],"limits":[{"count":"dollars","max":9,"per":"day"}],"keep_content_days":3,` +
		`"cache":{"ttl_seconds":60}}`
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":`+policy+`,"cost_multiplier":0.5,
		"routing":{"aliases":{"fast":["gpt-4o-mini"]},"affinity":"none"}}`, 200, nil)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"priority":2,"rewrite":{"a":"b"},
		"models":["gpt*","a"],"cost_multiplier":0.9,"idle_ms":5000,"note":"ours"}`, 200, nil)
	for _, name := range []string{"claude", "spare"} {
		p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"`+name+`","provider":"anthropic",
			"base_url":"`+p.provider.url+`","api_key":"`+p.provider.key+`"}`, 201, nil)
	}
	page := b.get("/admin/projects/" + p.project).body
	path := "/admin/projects/new?like=" + p.project
	if !strings.Contains(page, `href="`+path+`"`) {
		t.Errorf("the project's page has no link to %s", path)
	}
	form := parseForm(t, b.get(path).body)
	form.Set("name", "twin")
	form.Set("upstreams[2].api_key", "sk-****")
	form.Set("upstreams[0].api_key", p.provider.key)
	ended := p.signIn(p.adminKey)
	ended.ageSession(maxSessionAge, 0)
	signIn := parseForm(t, ended.post(path, form).body)
	signIn.Set("key", p.adminKey)
	signedIn := ended.post("/admin/sign-in", signIn)
	ended.cookie, _, _ = strings.Cut(signedIn.header.Get("Set-Cookie"), ";")
	if again := parseForm(t, ended.get(path).body); signedIn.header.Get("Location") != path ||
		again.Get("name") != "twin" || !again.Has("upstreams[2].api_key") || again.Get("upstreams[0].api_key") != "" {
		t.Errorf("after signing in again: %v, the form is %v", signedIn.header, again)
	}
	before := p.managedDigest()
	res := b.post(path, form)
	if page := html.UnescapeString(res.body); res.status != 400 || p.managedDigest() != before ||
		!strings.Contains(page, `<a href="#f-upstreams-2-api_key">API key of primary looks masked`) ||
		strings.Contains(page, p.provider.key) || len(checkHTML(res.body)) > 0 {
		t.Errorf("a masked key: %d %v %s", res.status, checkHTML(res.body), page)
	}
	form.Set("upstreams[2].api_key", p.provider.key)
	page = b.follow(b.post(path, form))
	refused := "The provider refuses the key: 401 authentication_error. It was saved anyway."
	for _, text := range []string{`class="notice" role="status">primary: The key works: 2 models.<`,
		`class="caution" role="status">claude: ` + refused + "<"} {
		if !strings.Contains(page, text) {
			t.Errorf("the page does not say %s: %s", text, page)
		}
	}
	var twin projectReply
	p.manage("GET", "/manage/projects/proj_"+between(page, `id="id-proj_`, `"`), "", 200, &twin)
	got := fmt.Sprintf("%s %s %s %s", twin.Name, twin.Policy, twin.Routing, twin.Multiplier)
	if want := "twin " + policy + ` {"aliases":{"fast":"gpt-4o-mini"},"affinity":"none"} 0.5`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if len(twin.Upstreams) != 2 || twin.Upstreams[0].Name != "claude" || twin.Upstreams[1].Name != "primary" {
		t.Fatalf("the upstreams are %+v", twin.Upstreams)
	}
	if u := twin.Upstreams[1]; u.Priority != 2 || u.Rewrite["a"] != "b" || u.Multiplier != "0.9" || u.Note != "ours" ||
		len(u.Models) != 2 || !u.IsActive {
		t.Errorf("the second upstream is %+v", u)
	}
	if entries := p.verifyAudit(); len(entries.problems) > 0 {
		t.Error(entries.problems)
	}
	for _, path := range []string{"/admin/projects/new?like=none", "/admin/tokens/new?like=none"} {
		if res := b.get(path); res.status != 404 {
			t.Errorf("%s: %d", path, res.status)
		}
	}
	const folded = `<details class="folded"><summary>API keys of 4 upstreams <span class="soft">claude, `
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"fourth","api_key":"`+p.provider.key+`",
		"priority":7}`, 201, nil)
	if page := b.get(path).body; !strings.Contains(page, folded) {
		t.Errorf("four keys are not folded away: %s", page)
	}
	form = parseForm(t, b.get(path).body)
	form.Set("upstreams[1].api_key", "sk-****")
	form.Set("upstreams[3].api_key", "sk-****")
	if page := b.post(path, form).body; !strings.Contains(page, `<details class="folded" open>`) ||
		!strings.Contains(page, `href="#f-name"`) || !strings.Contains(page, `href="#f-upstreams-1-api_key"`) ||
		!strings.Contains(page, `href="#f-upstreams-3-api_key"`) {
		t.Errorf("the page does not have all mistakes: %s", page)
	}
	p.manage("POST", "/manage/projects", `{"name":"bare","policy":{"models":[]}}`, 201, &twin)
	form = parseForm(t, b.get("/admin/projects/new?like="+twin.ID).body)
	if !form.Has("api_key") || form.Get("policy.models.none") != "on" {
		t.Errorf("like a project without upstreams: %v", form)
	}
}

// TestTokenLikeAnother: a new token can have what another one has, for as long.
func TestTokenLikeAnother(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	for lifetime, fields := range map[string]string{"168": `"expires_in_days":7`, "never": `"expires_at":null`,
		"720": `"expires_in_days":77`} {
		policy := `{"models":["a*"],"limits":[{"count":"requests","max":5,"per":"day"}]}`
		id, value := p.newToken(`"name":"first","max_requests":50,"idle_expiry_minutes":60,` + fields +
			`,"policy":` + policy)
		p.secrets = append(p.secrets, value)
		path := "/admin/tokens/new?like=" + id
		if !strings.Contains(b.get("/admin/tokens/"+id).body, `href="`+path+`"`) {
			t.Errorf("the token's page has no link to %s", path)
		}
		form := parseForm(t, b.get(path).body)
		if form.Get("lifetime") != lifetime || form.Get("name") != "" {
			t.Errorf("like a token with %s: %v", fields, form)
		}
		form.Set("name", "second")
		res := b.post(path, form)
		p.secrets = append(p.secrets, regexp.MustCompile(`sk-llmp_\w+`).FindString(res.body))
		var token struct {
			Policy      json.RawMessage
			MaxRequests int64 `json:"max_requests"`
			Idle        int64 `json:"idle_expiry_minutes"`
		}
		p.manage("GET", "/manage/tokens/tok_"+between(res.body, `/admin/tokens/tok_`, `"`), "", 200, &token)
		if string(token.Policy) != policy || token.MaxRequests != 50 || token.Idle != 60 {
			t.Errorf("the new token is %+v", token)
		}
	}
}
