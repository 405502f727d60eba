// This file tests projects and upstreams through /manage, and what the policies of projects and tokens allow.
package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestUpstreamChanges (KC7, KC14): no response shows a key, a masked key is refused, and a key is sent only to the
// host that it was stored for.
func TestUpstreamChanges(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	other := newFakeProvider(t)
	p.secrets = append(p.secrets, other.key)
	path := "/manage/projects/" + p.project + "/upstreams/" + p.upstream
	var u struct {
		KeyHint string `json:"key_hint"`
		BaseURL string `json:"base_url"`
	}
	p.manage("GET", path, "", 200, &u)
	if u.KeyHint != p.provider.key[len(p.provider.key)-4:] || u.BaseURL != p.provider.url+"/v1" {
		t.Errorf("got %+v", u)
	}
	for _, mask := range []string{
		"****" + u.KeyHint, "sk-..." + u.KeyHint, "sk-…" + u.KeyHint, "••••••••" + u.KeyHint, u.KeyHint, "[secret]", "",
	} {
		p.manageRefused("PATCH", path, `{"api_key":`+quote(mask)+`}`, 400, "api_key")
	}
	for _, c := range [][2]string{
		{`{"base_url":"` + other.url + `"}`, "api_key"}, {`{"base_url":"` + other.url + `/v1","name":"x"}`, "api_key"},
		{`{"base_url":"` + p.provider.url + `/v2"}`, "api_key"}, {`{"base_url":null}`, "base_url"},
		{`{"base_url":"","api_key":"` + other.key + `"}`, "base_url"},
		{`{"base_url":"http://169.254.169.254/","api_key":"` + other.key + `"}`, "base_url"},
		{`{"base_url":"http://u:p@x/","api_key":"` + other.key + `"}`, "base_url"},
		{`{"provider":"anthropic"}`, "provider"}, {`{"weight":1001}`, "weight"}, {`{"weight":-1}`, "weight"},
		{`{"weight":null}`, "weight"}, {`{"weight":1.5}`, "weight"},
		{`{"priority":1001}`, "priority"}, {`{"priority":"1"}`, "priority"}, {`{"models":["a*b"]}`, "models"},
		{`{"models":null}`, "models"}, {`{"models":"a"}`, "models"},
		{`{"organization":"a\r\nb"}`, "organization"},
		{`{"openai_project":"` + strings.Repeat("x", 201) + `"}`, "openai_project"},
		{`{"is_active":null}`, "is_active"},
		{`{"sealed_key":"x"}`, "sealed_key"}, {`{"id":"up_1"}`, "id"}, {`{"project_id":"x"}`, "project_id"},
	} {
		p.manageRefused("PATCH", path, c[0], 400, c[1])
	}
	if res := p.chat(); res.status != 200 || len(other.received()) != 0 {
		t.Fatalf("after the refusals: got %d, and %d calls to the other provider", res.status, len(other.received()))
	}
	// An unchanged URL does not require the key.
	p.manage("PATCH", path, `{"base_url":"`+p.provider.url+`/v1","name":"same place"}`, 200, nil)
	p.manage("PATCH", path, `{"base_url":"`+other.url+`","api_key":"`+other.key+`"}`, 200, nil)
	if res := p.chat(); res.status != 200 || other.lastRequest(t).header.Get("Authorization") != "Bearer "+other.key {
		t.Errorf("got %d", res.status)
	}
	// The key is sealed for its row and host: when the URL is changed in the database, it does not open.
	p.execSQL(`UPDATE upstreams SET base_url = '` + p.provider.url + `/v1'`)
	before := len(p.provider.received())
	p.manage("PATCH", "/manage/projects/"+p.project, `{"is_active":true}`, 200, nil) // reloads the project
	p.allowErrors = true
	if res := p.chat(); res.status != 503 || len(p.provider.received()) != before {
		t.Errorf("with another URL: got %d, %d calls", res.status, len(p.provider.received())-before)
	}
}

// TestUpstreamChoice: upstreams are chosen by priority, models and weight. Inactive and deleted ones get no calls.
func TestUpstreamChoice(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	path := "/manage/projects/" + p.project + "/upstreams"
	second := newFakeProvider(t)
	p.secrets = append(p.secrets, second.key)
	var u struct{ ID string }
	p.manage("POST", path, `{"name":"second","api_key":"`+second.key+`","base_url":"`+second.url+
		`","priority":1,"organization":"org-2","openai_project":"proj-2"}`, 201, &u)
	calledSecond := func() bool {
		t.Helper()
		before := len(second.received())
		p.chat()
		return len(second.received()) > before
	}
	for _, c := range []struct {
		path, body string
		second     bool
	}{
		{path + "/" + u.ID, `{"weight":5}`, false},
		{path + "/" + p.upstream, `{"priority":2}`, true},
		{path + "/" + u.ID, `{"models":["gpt-5*"]}`, false},
		{path + "/" + u.ID, `{"models":["gpt-5*","gpt-4o-mini"]}`, true},
		{path + "/" + u.ID, `{"models":[]}`, true},
		{path + "/" + u.ID, `{"weight":0}`, false},
		{path + "/" + u.ID, `{"weight":1}`, true},
		{path + "/" + u.ID, `{"is_active":false}`, false},
		{path + "/" + u.ID, `{"is_active":true}`, true},
	} {
		if p.manage("PATCH", c.path, c.body, 200, nil); calledSecond() != c.second {
			t.Errorf("after %s: the second upstream was called: %v", c.body, !c.second)
		}
	}
	if got := second.lastRequest(t).header; got.Get("Openai-Organization") != "org-2" ||
		got.Get("Openai-Project") != "proj-2" {
		t.Errorf("account headers: %v", got["Openai-Organization"])
	}
	p.manage("DELETE", path+"/"+u.ID, "", 200, nil)
	p.manageRefused("GET", path+"/"+u.ID, "", 404, "")
	p.manageRefused("DELETE", path+"/"+u.ID, "", 404, "")
	var sealed int
	if err := p.instance.store.readDB.QueryRowContext(t.Context(),
		`SELECT length(sealed_key) FROM upstreams WHERE id = ?`, u.ID).Scan(&sealed); err != nil || sealed != 0 {
		t.Errorf("its key still has %d bytes: %v", sealed, err)
	}
	if calledSecond() {
		t.Error("a deleted upstream was called")
	}
	p.manage("DELETE", path+"/"+p.upstream, "", 200, nil)
	if res := p.chat(); res.status != 404 || res.errorCode() != "no_upstream" {
		t.Errorf("without an upstream: got %d %s", res.status, res.body)
	}
	var project struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"another"}`, 201, &project)
	p.manageRefused("GET", "/manage/projects/"+project.ID+"/upstreams/"+p.upstream, "", 404, "")
}

// TestProjectEnds: the tokens of an inactive project are refused at once, and work again when it is active. Those
// of a deleted project never work again. Its name is free, and its rows of the ledger stay.
func TestProjectEnds(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	path := "/manage/projects/" + p.project
	if res := p.chat(); res.status != 200 {
		t.Fatalf("got %d", res.status)
	}
	p.manage("PATCH", path, `{"is_active":false}`, 200, nil)
	if res := p.chat(); res.status != 403 || res.errorCode() != "project_inactive" {
		t.Errorf("inactive: got %d %s", res.status, res.body)
	}
	p.manage("PATCH", path, `{"is_active":true}`, 200, nil)
	if res := p.chat(); res.status != 200 {
		t.Errorf("active again: got %d", res.status)
	}
	_, unused := p.newToken(`"name":"never used"`)
	p.manage("DELETE", path, "", 200, nil)
	for _, token := range []string{p.token, unused} {
		if res := p.chatAs(token); res.status != 401 || res.errorCode() != "invalid_api_key" {
			t.Errorf("deleted: got %d %s", res.status, res.body)
		}
	}
	for _, c := range [][3]string{
		{"GET", path}, {"DELETE", path}, {"PATCH", path, `{"is_active":true}`},
		{"POST", path + "/upstreams", `{"name":"x","api_key":"sk-0123456789abcdef"}`},
		{"GET", path + "/upstreams/" + p.upstream}, {"POST", path + "/tokens/revoke"},
	} {
		p.manageRefused(c[0], c[1], c[2], 404, "")
	}
	p.manageRefused("POST", "/manage/tokens", `{"project_id":"`+p.project+`"}`, 400, "project_id")
	p.manageRefused("POST", "/manage/tokens/"+p.tokenID+"/rotate", "", 400, "")
	var sealed int
	if err := p.instance.store.readDB.QueryRowContext(t.Context(),
		`SELECT sum(length(sealed_key)) FROM upstreams`).Scan(&sealed); err != nil || sealed != 0 {
		t.Errorf("its keys still have %d bytes: %v", sealed, err)
	}
	var again struct{ ID string }
	if p.manage("POST", "/manage/projects", `{"name":"test"}`, 201, &again); again.ID == p.project {
		t.Error("the id is not new")
	}
	if rows := p.ledger(); len(rows) < 3 || rows[0].TokenID != p.tokenID {
		t.Errorf("the ledger has %+v", rows)
	}
	var usage struct {
		Data []struct {
			ProjectID string `json:"project_id"`
			Calls     int
		}
	}
	p.manage("GET", "/manage/usage?interval=total&group_by=project&project_id="+p.project, "", 200, &usage)
	if len(usage.Data) != 1 || usage.Data[0].ProjectID != p.project || usage.Data[0].Calls < 3 {
		t.Errorf("usage has %+v", usage)
	}
	var l struct{ Data []struct{ ID string } }
	if p.manage("GET", "/manage/projects", "", 200, &l); len(l.Data) != 1 {
		t.Errorf("projects: %v", l)
	}
}

// A policyCase is a call under the policies of a project and a token; "" is the empty policy. A call without a path
// is a chat completion. It is expected to be passed on: want is the response, "" for that of a chat completion.
// Otherwise it is refused with status, about param.
type policyCase struct {
	project, token string
	path, body     string
	status         int
	param, want    string
}

func policyCases(models string) []policyCase {
	const chat = "/v1/chat/completions"
	return []policyCase{
		{path: "/v1/models", want: models},
		{project: `{"models":["gpt-4o*"]}`, path: "/v1/models",
			want: `{"data":[{"id":"gpt-4o"},{"id":"gpt-4o-mini"}],"object":"list"}`},
		{project: `{"models":["gpt-4o*","gpt-5"]}`, token: `{"models":["gpt-5","vendor/m:free"]}`, path: "/v1/models",
			want: `{"data":[{"id":"gpt-5"}],"object":"list"}`},
		{token: `{"models":["vendor/*","ft:*"]}`, path: "/v1/models",
			want: `{"data":[{"id":"vendor/m:free"},{"id":"ft:gpt-4o:org::1"}],"object":"list"}`},
		{token: `{"models":[]}`, path: "/v1/models", want: `{"data":[],"object":"list"}`},
		{token: `{"models":["gpt-4o"]}`, path: "/v1/models/gpt-4o", want: `{"id":"gpt-4o","object":"model"}`},
		{token: `{"models":["gpt-4o"]}`, path: "/v1/models/gpt-4o-mini", status: 403, param: "model"},
		{token: `{"models":["gpt-4o"]}`, path: "/v1/models/ft:gpt-4o:org::1", status: 403, param: "model"},
		{project: `{"models":["ft:*"]}`, path: "/v1/models/ft:gpt-4o:org::1",
			want: `{"id":"ft:gpt-4o:org::1","object":"model"}`},
		{token: `{"models":["vendor/*"]}`, path: "/v1/models/vendor/m:free",
			want: `{"id":"vendor/m:free","object":"model"}`},
		{token: `{"models":["vendor/x"]}`, path: "/v1/models/vendor/m:free", status: 403, param: "model"},
		{token: `{"models":["gpt-4o-mini"]}`},
		{token: `{"models":["gpt-4o"]}`, status: 403, param: "model"},
		{project: `{"models":["gpt-5"]}`, token: `{"models":["gpt-4o-mini"]}`, status: 403, param: "model"},
		{project: `{"models":[]}`, status: 403, param: "model"},
		{project: `{"models":["GPT-4o-mini"]}`, status: 403, param: "model"},
		{project: `{"models":["gpt-4o-mini"]}`, path: chat, body: `{"messages":[]}`, status: 403, param: "model"},
		{token: `{"endpoints":["/v1/chat/completions"]}`},
		{token: `{"endpoints":["POST /v1/chat/completions"]}`},
		{token: `{"endpoints":["/v1/chat/*"]}`},
		{token: `{"endpoints":["*"]}`},
		{token: `{"endpoints":["/v1/chat/*"]}`, path: "/v1/embeddings", body: `{"model":"m","input":"x"}`, status: 403},
		{project: `{"endpoints":["/v1/embeddings"]}`, token: `{"endpoints":["*"]}`, status: 403},
		{project: `{"endpoints":[]}`, path: "/v1/models", status: 403},
		{project: `{"endpoints":["/v1/models"]}`, path: "/v1/models/gpt-4o", status: 403},
		{project: `{"endpoints":["/v1/models*"]}`, path: "/v1/models/gpt-4o", want: `{"id":"gpt-4o","object":"model"}`},
		{path: "/v1/files", status: 403},
		{project: `{"stateful":true}`, path: "/v1/files"},
		{project: `{"stateful":true}`, token: `{"endpoints":["/v1/chat/*"]}`, path: "/v1/files", status: 403},
		{project: `{"stateful":false}`, path: "/v1/responses/resp_1", status: 403},
		{path: "/v1/responses", body: `{"model":"m","input":"x","previous_response_id":"resp_1"}`, status: 403,
			param: "previous_response_id"},
		{project: `{"stateful":true}`, path: "/v1/responses",
			body: `{"model":"m","input":"x","previous_response_id":"resp_1"}`},
		{path: "/v1/responses", body: `{"model":"m","prompt":{"id":"pmpt_1"}}`, status: 403, param: "prompt"},
		{path: "/v1/responses", body: `{"model":"m","input":"x","container":"c"}`, status: 403, param: "container"},
		{project: `{"stateful":true}`, path: "/v1/responses", body: `{"model":"m","prompt":{"id":"pmpt_1"}}`},
	}
}

// TestPolicies: what the policies of a project and a token allow, from the next call on. A token's policy can only
// narrow the project's.
func TestPolicies(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	models := `{"object":"list","data":[{"id":"gpt-4o"},{"id":"gpt-4o-mini"},{"id":"gpt-5"},{"id":"vendor/m:free"},` +
		`{"id":"ft:gpt-4o:org::1"}]}`
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		switch {
		case r.target == "/v1/models":
			return c.reply(200, models)
		case strings.HasPrefix(r.target, "/v1/models/"):
			return c.reply(200, `{"id":"`+strings.TrimPrefix(r.target, "/v1/models/")+`","object":"model"}`)
		}
		return chatScript(c, r)
	})
	for i, c := range policyCases(models) {
		p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":`+cmp.Or(c.project, "{}")+`}`, 200, nil)
		p.manage("PATCH", "/manage/tokens/"+p.tokenID, `{"policy":`+cmp.Or(c.token, "{}")+`}`, 200, nil)
		before := len(p.provider.received())
		if c.path == "" {
			c.path, c.body = "/v1/chat/completions", chatBody()
		}
		method, headers := "GET", []string{"Authorization", "Bearer " + p.token}
		if c.body != "" {
			method, headers = "POST", append(headers, "Content-Type", "application/json")
		}
		res := p.do(method, c.path, c.body, headers...)
		what := fmt.Sprintf("%d: %s with %s and %s", i, c.path, c.project, c.token)
		if c.status != 0 {
			if expectParamError(t, what, res, c.status, c.param); len(p.provider.received()) != before {
				t.Errorf("%s: the provider was called", what)
			}
			continue
		}
		if res.status != 200 || res.body != cmp.Or(c.want, chatResponseBody) {
			t.Errorf("%s: got %d %s", what, res.status, res.body)
		}
	}
	// A token's policy cannot turn stateful endpoints on.
	p.manageRefused("PATCH", "/manage/tokens/"+p.tokenID, `{"policy":{"stateful":true}}`, 400, "policy.stateful")
	var v struct{ Policy map[string]any }
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":null}`, 200, &v)
	if len(v.Policy) != 0 {
		t.Errorf("after null: %v", v.Policy)
	}
}

// TestListProjects: the list has filters, and shows upstreams in the order of preference.
func TestListProjects(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("POST", "/manage/projects", `{"name":"idle","is_active":false}`, 201, nil)
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"other","api_key":"`+p.provider.key+`"}`, 201,
		nil)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"priority":9}`, 200, nil)
	for query, want := range map[string][]string{
		"": {"test", "idle"}, "?active=true": {"test"}, "?active=false": {"idle"}, "?name=te": {"test"},
		"?name=te&active=false": nil,
	} {
		var l struct {
			Data []struct {
				Name      string
				Upstreams []struct{ Name string }
			}
		}
		p.manage("GET", "/manage/projects"+query, "", 200, &l)
		var got []string
		for _, v := range l.Data {
			got = append(got, v.Name)
			if v.Name == "test" && (len(v.Upstreams) != 2 || v.Upstreams[0].Name != "other") {
				t.Errorf("upstreams: %v", v.Upstreams)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", query, got, want)
		}
	}
}

// TestGoogleBaseURL: an upstream of Google's has Gemini's API as its base URL, and /v1beta as its path.
func TestGoogleBaseURL(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for given, want := range map[string]string{
		"":                       "https://generativelanguage.googleapis.com/v1beta",
		"https://example.com":    "https://example.com/v1beta",
		"https://example.com/":   "https://example.com/v1beta",
		"https://example.com/g/": "https://example.com/g",
	} {
		var got struct {
			BaseURL  string `json:"base_url"`
			Provider string
		}
		base := ""
		if given != "" {
			base = `"base_url":"` + given + `",`
		}
		p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"g`+strconv.Itoa(len(given))+
			`","provider":"google",`+base+`"api_key":"AIzaSy0123456789"}`, 201, &got)
		if got.BaseURL != want || got.Provider != "google" {
			t.Errorf("%q: got %+v", given, got)
		}
	}
}

// TestKeyTest: the test of a key says what the provider answered, whatever its API, reveals nothing of the answer but a
// code, changes nothing, and goes only where calls may go.
func TestKeyTest(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	upstreams := map[string]string{"openai": p.upstream}
	for _, provider := range []string{"anthropic", "google", "azure", "compatible"} {
		var up struct{ ID string }
		p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"`+provider+`","provider":"`+provider+
			`","base_url":"`+p.provider.url+`","api_key":"`+p.provider.key+`"}`, 201, &up)
		upstreams[provider] = up.ID
	}
	list := `{"object":"list","data":[{"id":"a"},{"id":"b"},{"id":"` + p.provider.key + `"}]}`
	refusal := func(code, text string) string {
		return `{"error":{"message":"` + text + `","type":"invalid_request_error","code":"` + code + `"}}`
	}
	for _, c := range []struct {
		provider, target string
		status           int
		body             string
		want             string // the result, with everything but its id
	}{
		{"openai", "/v1/models", 200, list, `"accepted","status":200,"code":"","models":3,"more_models":false,` +
			`"summary":"The key works: 3 models."`},
		{"azure", "/v1/models", 200, `{"data":[{"id":"a"}]}`, `"models":1,"more_models":false,` +
			`"summary":"The key works: 1 model."`},
		{"compatible", "/v1/models", 200, `{"data":[]}`, `"summary":"The key works: 0 models."`},
		{"anthropic", "/v1/models?limit=1000", 200, `{"data":[{"id":"a"}],"has_more":true,"last_id":"a"}`,
			`"more_models":true,"summary":"The key works: more than 1 model."`},
		{"google", "/v1beta/models?pageSize=1000", 200, `{"models":[{"name":"models/a"},{"name":"models/b"}]}`,
			`"summary":"The key works: 2 models."`},
		{"openai", "/v1/models", 401, refusal("invalid_api_key", "Incorrect API key provided: "+p.provider.key),
			`"refused","status":401,"code":"invalid_api_key","models":null,"more_models":false,` +
				`"summary":"The provider refuses the key: 401 invalid_api_key."`},
		{"anthropic", "/v1/models?limit=1000", 401, `{"type":"error","error":{"type":"authentication_error"}}`,
			`"The provider refuses the key: 401 authentication_error."`},
		{"google", "/v1beta/models?pageSize=1000", 400, `{"error":{"code":400,"message":"API key not valid.",` +
			`"status":"INVALID_ARGUMENT","details":[{"reason":"API_KEY_INVALID"}]}}`,
			`"The provider refuses the key: 400 api_key_invalid."`},
		{"openai", "/v1/models", 401, refusal(p.provider.key, "no"),
			`"refused","status":401,"code":"invalid_request_error"`},
		{"openai", "/v1/models", 403, "<html>" + p.provider.key, `"refused","status":403,"code":""`},
		{"openai", "/v1/models", 403, refusal("", "You have insufficient permissions for this operation."),
			`"accepted","status":403`},
		{"openai", "/v1/models", 429, refusal("insufficient_quota", "x"), `"exhausted","status":429`},
		{"openai", "/v1/models", 429, refusal("rate_limit_exceeded", "x"), `"accepted","status":429`},
		{"compatible", "/v1/models", 404, "", `"unclear","status":404`},
		{"compatible", "/v1/models", 200, "<html>hello", `"unclear","status":200`},
		{"compatible", "/v1/models", 302, "", `"unclear","status":302`},
		{"compatible", "/v1/models", 500, refusal("<b>", "x"), `"unclear","status":500,"code":"invalid_request_error"`},
	} {
		p.provider.setScript(func(conn *providerConn, _ recordedRequest) bool { return conn.reply(c.status, c.body) })
		before := p.managedRows()
		path := "/manage/projects/" + p.project + "/upstreams/" + upstreams[c.provider] + "/test"
		res := p.manageAs(p.adminKey, "POST", path, "")
		if res.status != 200 || !strings.Contains(res.body, c.want) {
			t.Errorf("%s answers %d %s: got %d %s, want %s", c.provider, c.status, c.body, res.status, res.body, c.want)
		}
		r := p.provider.lastRequest(t)
		credentials := r.header.Get("Authorization") + r.header.Get("X-Api-Key") + r.header.Get("Api-Key") +
			r.header.Get("X-Goog-Api-Key")
		if r.method != "GET" || r.target != c.target || strings.TrimPrefix(credentials, "Bearer ") != p.provider.key {
			t.Errorf("%s got %s %s with %q", c.provider, r.method, r.target, credentials)
		}
		if p.managedRows() != before {
			t.Errorf("testing the key of %s changed something", c.provider)
		}
	}
	test := "/manage/projects/" + p.project + "/upstreams/" + p.upstream + "/test"
	p.provider.setScript(func(conn *providerConn, _ recordedRequest) bool { return conn.reset() })
	if res := p.manageAs(p.adminKey, "POST", test, ""); !strings.Contains(res.body, `"unreachable","status":null`) {
		t.Errorf("a provider that hangs up: %s", res.body)
	}
	requests, tester := len(p.provider.received()), p.instance.operations.keyTester
	for range maxKeyTests {
		tester.slots <- struct{}{}
	}
	if res := p.manageAs(p.adminKey, "POST", test, ""); !strings.Contains(res.body, `"unclear","status":null`) ||
		len(p.provider.received()) != requests {
		t.Errorf("while many are running: %s", res.body)
	}
	for range maxKeyTests {
		<-tester.slots
	}
	_, viewer := p.newKey("v", "viewer")
	_, operator := p.newKey("o", "operator")
	for path, want := range map[string]int{test: 200, test + "s": 404, "/manage/projects/none/upstreams/x/test": 404} {
		if res := p.manageAs(operator, "POST", path, ""); res.status != want {
			t.Errorf("an operator, %s: %d", path, res.status)
		}
	}
	if res := p.manageAs(viewer, "POST", test, ""); res.status != 403 {
		t.Errorf("a viewer: %d", res.status)
	}
	requests = len(p.provider.received())
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.env["ALLOW_PRIVATE_UPSTREAMS"], p.env["OPENAI_API_URL"] = "false", ""
	p.start()
	res := p.manageAs(p.adminKey, "POST", test, "")
	if !strings.Contains(res.body, `"unusable","status":null`) || len(p.provider.received()) != requests {
		t.Errorf("an address that is not allowed any more: %s", res.body)
	}
}
