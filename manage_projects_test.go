// Tests of projects and upstreams through /manage, and of what a project's and a
// token's policy lets through.
package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// TestUpstreamChanges (KC7, KC14): a key goes in and never out, a mask is no
// key, and a key is never sent to a place it was not given for.
func TestUpstreamChanges(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	other := newFakeProvider(t)
	p.secrets = append(p.secrets, other.key)
	path := "/manage/projects/" + p.project + "/upstreams/" + p.upstream
	patch := func(body string) testResponse { t.Helper(); return p.manageAs(p.adminKey, "PATCH", path, body) }
	var u struct {
		KeyHint string `json:"key_hint"`
		BaseURL string `json:"base_url"`
	}
	p.manage("GET", path, "", 200, &u)
	if u.KeyHint != p.provider.key[len(p.provider.key)-4:] || u.BaseURL != p.provider.url+"/v1" {
		t.Errorf("got %+v", u)
	}
	for _, mask := range []string{"****" + u.KeyHint, "sk-..." + u.KeyHint, "sk-…" + u.KeyHint, "••••••••" + u.KeyHint, u.KeyHint, "[secret]", ""} {
		expectParamError(t, "mask "+mask, patch(`{"api_key":`+quote(mask)+`}`), 400, "api_key")
	}
	for _, c := range [][2]string{
		{`{"base_url":"` + other.url + `"}`, "api_key"}, {`{"base_url":"` + other.url + `/v1","name":"x"}`, "api_key"},
		{`{"base_url":"` + p.provider.url + `/v2"}`, "api_key"}, {`{"base_url":null}`, "base_url"}, {`{"base_url":"","api_key":"` + other.key + `"}`, "base_url"},
		{`{"base_url":"http://169.254.169.254/","api_key":"` + other.key + `"}`, "base_url"}, {`{"base_url":"http://u:p@x/","api_key":"` + other.key + `"}`, "base_url"},
		{`{"provider":"anthropic"}`, "provider"}, {`{"weight":1001}`, "weight"}, {`{"weight":-1}`, "weight"}, {`{"weight":null}`, "weight"}, {`{"weight":1.5}`, "weight"},
		{`{"priority":1001}`, "priority"}, {`{"priority":"1"}`, "priority"}, {`{"models":["a*b"]}`, "models"}, {`{"models":null}`, "models"}, {`{"models":"a"}`, "models"},
		{`{"organization":"a\r\nb"}`, "organization"}, {`{"openai_project":"` + strings.Repeat("x", 201) + `"}`, "openai_project"}, {`{"is_active":null}`, "is_active"},
		{`{"sealed_key":"x"}`, "sealed_key"}, {`{"id":"up_1"}`, "id"}, {`{"project_id":"x"}`, "project_id"},
	} {
		expectParamError(t, c[0], patch(c[0]), 400, c[1])
	}
	if res := p.chat(); res.status != 200 || len(other.received()) != 0 {
		t.Fatalf("after what was refused: got %d, the other provider was called %d times", res.status, len(other.received()))
	}
	if res := patch(`{"base_url":"` + p.provider.url + `/v1","name":"same place"}`); res.status != 200 { // unchanged: needs no key
		t.Errorf("got %d %s", res.status, res.body)
	}
	if res := patch(`{"base_url":"` + other.url + `","api_key":"` + other.key + `"}`); res.status != 200 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	if res := p.chat(); res.status != 200 || other.lastRequest(t).header.Get("Authorization") != "Bearer "+other.key {
		t.Errorf("got %d", res.status)
	}
	// Sealed for one row and host: moved by hand in the database, it opens nowhere.
	if _, err := p.instance.store.writeDB.ExecContext(t.Context(), `UPDATE upstreams SET base_url = ?`, p.provider.url+"/v1"); err != nil {
		t.Fatal(err)
	}
	before := len(p.provider.received())
	p.manage("PATCH", "/manage/projects/"+p.project, `{"is_active":true}`, 200, nil) // read anew
	p.allowErrors = true
	if res := p.chat(); res.status != 503 || len(p.provider.received()) != before {
		t.Errorf("with a moved URL: got %d, %d calls", res.status, len(p.provider.received())-before)
	}
}

// TestUpstreamChoice: priority first, models after that, only active ones, and a
// deleted one no more.
func TestUpstreamChoice(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	path := "/manage/projects/" + p.project + "/upstreams"
	second := newFakeProvider(t)
	p.secrets = append(p.secrets, second.key)
	var u struct{ ID string }
	p.manage("POST", path, `{"name":"second","api_key":"`+second.key+`","base_url":"`+second.url+`","priority":1,"organization":"org-2","openai_project":"proj-2"}`, 201, &u)
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
			t.Errorf("after %s: the second one was called: %v", c.body, !c.second)
		}
	}
	if got := second.lastRequest(t).header; got.Get("Openai-Organization") != "org-2" || got.Get("Openai-Project") != "proj-2" {
		t.Errorf("account headers: %v", got["Openai-Organization"])
	}
	p.manage("DELETE", path+"/"+u.ID, "", 200, nil)
	expectParamError(t, "deleted", p.manageAs(p.adminKey, "GET", path+"/"+u.ID, ""), 404, "")
	expectParamError(t, "deleted twice", p.manageAs(p.adminKey, "DELETE", path+"/"+u.ID, ""), 404, "")
	var sealed int
	if err := p.instance.store.readDB.QueryRowContext(t.Context(), `SELECT length(sealed_key) FROM upstreams WHERE id = ?`, u.ID).Scan(&sealed); err != nil || sealed != 0 {
		t.Errorf("its key is %d bytes long still: %v", sealed, err)
	}
	if calledSecond() {
		t.Error("a deleted upstream was called")
	}
	p.manage("DELETE", path+"/"+p.upstream, "", 200, nil)
	if res := p.chat(); res.status != 404 || res.errorCode() != "no_upstream" {
		t.Errorf("without any: got %d %s", res.status, res.body)
	}
	var project struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"another"}`, 201, &project)
	expectParamError(t, "through another project", p.manageAs(p.adminKey, "GET", "/manage/projects/"+project.ID+"/upstreams/"+p.upstream, ""), 404, "")
}

// TestProjectEnds: an inactive project's tokens are refused at once and work
// again after; a deleted one's are dead for good, its name is free, its rows stay.
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
	for _, c := range [][3]string{{"GET", path}, {"DELETE", path}, {"PATCH", path, `{"is_active":true}`}, {"POST", path + "/upstreams", `{"name":"x","api_key":"sk-0123456789abcdef"}`},
		{"GET", path + "/upstreams/" + p.upstream}, {"POST", path + "/tokens/revoke"}} {
		expectParamError(t, c[0]+" "+c[1], p.manageAs(p.adminKey, c[0], c[1], c[2]), 404, "")
	}
	expectParamError(t, "a token of it", p.manageAs(p.adminKey, "POST", "/manage/tokens", `{"project_id":"`+p.project+`"}`), 400, "project_id")
	expectParamError(t, "rotation", p.manageAs(p.adminKey, "POST", "/manage/tokens/"+p.tokenID+"/rotate", ""), 400, "")
	var sealed int
	if err := p.instance.store.readDB.QueryRowContext(t.Context(), `SELECT sum(length(sealed_key)) FROM upstreams`).Scan(&sealed); err != nil || sealed != 0 {
		t.Errorf("%d bytes of its keys are left: %v", sealed, err)
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

// TestPolicies: what a project's and a token's policy let through, which holds
// from the next call on; a token can only narrow.
func TestPolicies(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	models := `{"object":"list","data":[{"id":"gpt-4o"},{"id":"gpt-4o-mini"},{"id":"gpt-5"},{"id":"vendor/m:free"},{"id":"ft:gpt-4o:org::1"}]}`
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		switch {
		case r.target == "/v1/models":
			return c.reply(200, models)
		case strings.HasPrefix(r.target, "/v1/models/"):
			return c.reply(200, `{"id":"`+strings.TrimPrefix(r.target, "/v1/models/")+`","object":"model"}`)
		}
		return chatScript(c, r)
	})
	const chat, none = "/v1/chat/completions", ""
	for i, c := range []struct {
		project, token string
		method, path   string
		body           string
		status         int
		param, want    string
	}{
		{`{}`, `{}`, "GET", "/v1/models", none, 200, "", models},
		{`{"models":["gpt-4o*"]}`, `{}`, "GET", "/v1/models", none, 200, "", `{"data":[{"id":"gpt-4o"},{"id":"gpt-4o-mini"}],"object":"list"}`},
		{`{"models":["gpt-4o*","gpt-5"]}`, `{"models":["gpt-5","vendor/m:free"]}`, "GET", "/v1/models", none, 200, "", `{"data":[{"id":"gpt-5"}],"object":"list"}`},
		{`{}`, `{"models":["vendor/*","ft:*"]}`, "GET", "/v1/models", none, 200, "", `{"data":[{"id":"vendor/m:free"},{"id":"ft:gpt-4o:org::1"}],"object":"list"}`},
		{`{}`, `{"models":[]}`, "GET", "/v1/models", none, 200, "", `{"data":[],"object":"list"}`},
		{`{}`, `{"models":["gpt-4o"]}`, "GET", "/v1/models/gpt-4o", none, 200, "", `{"id":"gpt-4o","object":"model"}`},
		{`{}`, `{"models":["gpt-4o"]}`, "GET", "/v1/models/gpt-4o-mini", none, 403, "model", ""},
		{`{}`, `{"models":["gpt-4o"]}`, "GET", "/v1/models/ft:gpt-4o:org::1", none, 403, "model", ""},
		{`{"models":["ft:*"]}`, `{}`, "GET", "/v1/models/ft:gpt-4o:org::1", none, 200, "", `{"id":"ft:gpt-4o:org::1","object":"model"}`},
		{`{}`, `{"models":["vendor/*"]}`, "GET", "/v1/models/vendor/m:free", none, 200, "", `{"id":"vendor/m:free","object":"model"}`},
		{`{}`, `{"models":["vendor/x"]}`, "GET", "/v1/models/vendor/m:free", none, 403, "model", ""},
		{`{}`, `{"models":["gpt-4o-mini"]}`, "POST", chat, chatBody(), 200, "", chatResponseBody},
		{`{}`, `{"models":["gpt-4o"]}`, "POST", chat, chatBody(), 403, "model", ""},
		{`{"models":["gpt-5"]}`, `{"models":["gpt-4o-mini"]}`, "POST", chat, chatBody(), 403, "model", ""},
		{`{"models":[]}`, `{}`, "POST", chat, chatBody(), 403, "model", ""},
		{`{"models":["GPT-4o-mini"]}`, `{}`, "POST", chat, chatBody(), 403, "model", ""},
		{`{"models":["gpt-4o-mini"]}`, `{}`, "POST", chat, `{"messages":[]}`, 403, "model", ""},
		{`{}`, `{"endpoints":["/v1/chat/completions"]}`, "POST", chat, chatBody(), 200, "", chatResponseBody},
		{`{}`, `{"endpoints":["POST /v1/chat/completions"]}`, "POST", chat, chatBody(), 200, "", chatResponseBody},
		{`{}`, `{"endpoints":["/v1/chat/*"]}`, "POST", chat, chatBody(), 200, "", chatResponseBody},
		{`{}`, `{"endpoints":["*"]}`, "POST", chat, chatBody(), 200, "", chatResponseBody},
		{`{}`, `{"endpoints":["/v1/chat/*"]}`, "POST", "/v1/embeddings", `{"model":"m","input":"x"}`, 403, "", ""},
		{`{"endpoints":["/v1/embeddings"]}`, `{"endpoints":["*"]}`, "POST", chat, chatBody(), 403, "", ""},
		{`{"endpoints":[]}`, `{}`, "GET", "/v1/models", none, 403, "", ""},
		{`{"endpoints":["/v1/models"]}`, `{}`, "GET", "/v1/models/gpt-4o", none, 403, "", ""},
		{`{"endpoints":["/v1/models*"]}`, `{}`, "GET", "/v1/models/gpt-4o", none, 200, "", `{"id":"gpt-4o","object":"model"}`},
		{`{}`, `{}`, "GET", "/v1/files", none, 403, "", ""},
		{`{"stateful":true}`, `{}`, "GET", "/v1/files", none, 200, "", chatResponseBody},
		{`{"stateful":true}`, `{"endpoints":["/v1/chat/*"]}`, "GET", "/v1/files", none, 403, "", ""},
		{`{"stateful":false}`, `{}`, "GET", "/v1/responses/resp_1", none, 403, "", ""},
		{`{}`, `{}`, "POST", "/v1/responses", `{"model":"m","input":"x","previous_response_id":"resp_1"}`, 403, "previous_response_id", ""},
		{`{"stateful":true}`, `{}`, "POST", "/v1/responses", `{"model":"m","input":"x","previous_response_id":"resp_1"}`, 200, "", chatResponseBody},
	} {
		p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":`+c.project+`}`, 200, nil)
		p.manage("PATCH", "/manage/tokens/"+p.tokenID, `{"policy":`+c.token+`}`, 200, nil)
		before := len(p.provider.received())
		headers := []string{"Authorization", "Bearer " + p.token}
		if c.body != "" {
			headers = append(headers, "Content-Type", "application/json")
		}
		res := p.do(c.method, c.path, c.body, headers...)
		what := fmt.Sprintf("%d: %s with %s and %s", i, c.path, c.project, c.token)
		if c.status != 200 {
			if expectParamError(t, what, res, c.status, c.param); len(p.provider.received()) != before {
				t.Errorf("%s: the provider was called", what)
			}
			continue
		}
		if res.status != 200 || res.body != c.want {
			t.Errorf("%s: got %d %s", what, res.status, res.body)
		}
	}
	// A token's policy cannot turn stateful endpoints on.
	expectParamError(t, "stateful token", p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+p.tokenID, `{"policy":{"stateful":true}}`), 400, "policy.stateful")
	var v struct{ Policy map[string]any }
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":null}`, 200, &v)
	if len(v.Policy) != 0 {
		t.Errorf("after null: %v", v.Policy)
	}
}

// TestListProjects: its filters, and upstreams in the order of preference.
func TestListProjects(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("POST", "/manage/projects", `{"name":"idle","is_active":false}`, 201, nil)
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"other","api_key":"`+p.provider.key+`"}`, 201, nil)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"priority":9}`, 200, nil)
	for query, want := range map[string][]string{"": {"test", "idle"}, "?active=true": {"test"}, "?active=false": {"idle"}, "?name=te": {"test"}, "?name=te&active=false": nil} {
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
