// The second half of holding openapi.yaml and the server to each other: answers.
// Every operation is called so that all that it can say occurs, and every status
// that the file declares is provoked.
package main

import (
	"fmt"
	"strings"
	"testing"
)

// TestOpenAPIAnswers: each field of each answer is in its schema, and each
// property of a schema occurs.
func TestOpenAPIAnswers(t *testing.T) {
	t.Parallel()
	s, p := readSpec(t), newTest(t, nil)
	call := func(method, path, body string, status int) string {
		t.Helper()
		res := p.manageAs(p.adminKey, method, path, body)
		if res.status != status {
			t.Fatalf("%s %s: got %d, want %d: %s", method, path, res.status, status, res.body)
		}
		s.answered(method, path, res)
		return between(res.body, `"id":"`, `"`)
	}
	const limits = `"addresses":["0.0.0.0/0","::/0"],"limits":[{"count":"requests","max":1000,"per":"day","endpoint":"/v1/*","model":"gpt*","shadow":true}]`
	const policies = `"policy":{"endpoints":["/v1/*"],"models":["gpt-4o*"],` + limits + `}`
	const projectPolicies = `"policy":{"endpoints":["/v1/*"],"models":["gpt-4o*"],` + limits + `,"stateful":true,"keep_content_days":3},"routing":{"fallbacks":[{"model":"a","to":"b"}],"verified_streams":true,"show_upstream":true}`
	project := call("POST", "/manage/projects", `{"name":"second","openai_api_key":"`+p.provider.key+`",`+projectPolicies+`}`, 201)
	call("GET", "/manage/projects?limit=1&name=second", "", 200)
	path := "/manage/projects/" + project
	call("GET", path, "", 200)
	upstreams := path + "/upstreams"
	up := call("POST", upstreams, `{"name":"u","api_key":"`+p.provider.key+`","models":["m*"]}`, 201)
	call("GET", upstreams, "", 200)
	call("GET", path+"/route?model=a&api=openai", "", 200)
	call("GET", upstreams+"/"+up, "", 200)
	call("PATCH", upstreams+"/"+up, `{"weight":2}`, 200)
	call("PATCH", path, `{"is_active":true}`, 200)
	token := call("POST", "/manage/tokens", `{"project_id":"`+project+`",`+policies+`}`, 201)
	tokenPath := "/manage/tokens/" + token
	call("GET", tokenPath, "", 200)
	call("PATCH", tokenPath, `{"max_requests":5,"idle_expiry_minutes":5,"expires_at":null}`, 200)
	call("POST", tokenPath+"/rotate", ``, 200)
	call("GET", "/manage/tokens?limit=1&project_id="+project, "", 200)
	call("GET", "/manage/tokens?limit=1", "", 200)
	call("GET", "/manage/projects?limit=1", "", 200)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"keep_content_days":3}}`, 200, nil)
	p.seenMayHold(promptCanary)
	p.chat()
	p.chat()
	p.chat(`"stream":true`)
	second, _ := p.addUpstream(`"priority":1`)
	p.provider.answer(func(c *providerConn, _ recorded) bool { return c.reply(429, "{}") })
	p.chat() // with two attempts
	p.settle()
	id := call("GET", "/manage/requests?limit=1", "", 200)
	second.answer(endless)
	for range 2 {
		if _, err := p.stream(p.token).read(1); err != nil {
			t.Fatal(err)
		}
	}
	call("GET", "/manage/streams?limit=1", "", 200)
	call("DELETE", "/manage/streams/"+call("GET", "/manage/streams", "", 200), "", 200)
	call("GET", "/manage/requests/"+id, "", 200)
	call("GET", "/manage/requests/"+id+"/content", "", 200)
	call("GET", "/manage/usage?group_by=project,token,model,endpoint,outcome", "", 200)
	call("GET", "/manage/usage?interval=total", "", 200)
	price := call("POST", "/manage/prices", `{"match":"m","input":1,"cached_input":"0.5","cache_write":2,"output":3,"audio_input":4,"audio_output":5.25}`, 201)
	call("GET", "/manage/prices", "", 200)
	call("GET", "/manage/prices?model=gpt-4o&provider=openai", "", 200)
	call("DELETE", "/manage/prices/"+price, "", 200)
	key := call("POST", "/manage/keys", `{"name":"k","role":"viewer"}`, 201)
	call("GET", "/manage/keys?limit=1", "", 200)
	call("GET", "/manage/audit?limit=1&action=key.create", "", 200)
	call("GET", "/manage/keys/"+key, "", 200)
	call("PATCH", "/manage/keys/"+key, `{"role":"operator","expires_at":"2099-01-01T00:00:00Z"}`, 200)
	call("DELETE", "/manage/keys/"+key, "", 200)
	call("DELETE", tokenPath, "", 200)
	call("POST", path+"/tokens/revoke", "", 200)
	call("DELETE", upstreams+"/"+up, "", 200)
	call("DELETE", path+"/content", "", 200)
	call("DELETE", path, "", 200)
	for _, path := range []string{"/healthz", "/readyz"} {
		s.answered("GET", path, p.do("GET", path, ""))
	}
	s.answered("GET", "/metrics", p.manageAs(p.adminKey, "GET", "/metrics", ""))
	for _, name := range s.operations() {
		for status, r := range s.at(s.operation(name), "responses") {
			where := fmt.Sprintf("%s %s ", name, status)
			if status[0] != '2' {
				continue
			}
			if !s.seen[where] {
				t.Errorf("%s: no such answer", where)
			}
			s.unseen(where, s.at(r, "content", "application/json", "schema"))
		}
	}
}

// TestOpenAPIErrors: each operation answers with each error status that it
// declares, in OpenAI's shape, and declares each that can be provoked.
func TestOpenAPIErrors(t *testing.T) {
	t.Parallel()
	s := readSpec(t)
	p := newTest(t, map[string]string{"TRUSTED_PROXIES": "127.0.0.1"})
	var viewer struct{ ID, Key string }
	p.manage("POST", "/manage/keys", `{"name":"v","role":"viewer"}`, 201, &viewer)
	p.secrets = append(p.secrets, viewer.Key)
	for range failuresAllowed {
		p.manageAs("wrong", "GET", "/manage/projects", "", "X-Forwarded-For", "192.0.2.1")
	}
	for _, name := range s.operations() {
		method, path := p.fill(name)
		path = strings.Replace(path, "/keys/none", "/keys/"+viewer.ID, 1)
		if !strings.HasPrefix(path, "/manage/") {
			continue
		}
		admin := "Bearer " + p.adminKey
		provoked := map[int]answer{
			400: p.do(method, path+"?a=1&a=2", "", "Authorization", admin),
			401: p.do(method, path, ""),
			403: p.do(method, path, "", "Authorization", "Bearer "+viewer.Key, "If-Match", `"1000"`),
			412: p.do(method, path, "{}", "Authorization", admin, "Content-Type", "application/json", "If-Match", `"1000"`),
			413: p.do(method, path, strings.Repeat(" ", maxManageBody+1), "Authorization", admin, "If-Match", `"1000"`),
			415: p.do(method, path, "{}", "Authorization", admin, "Content-Type", "text/plain", "If-Match", `"1000"`),
			421: p.do(method, path, "", "Authorization", admin, "Host", "evil.example.com"),
			429: p.do(method, path, "", "Authorization", "Bearer wrong", "X-Forwarded-For", "192.0.2.1"),
			404: p.do(method, strings.NewReplacer(p.project, "none", p.upstream, "none", p.tokenID, "none", viewer.ID, "none").Replace(path), object(needed(p)[name]),
				"Authorization", admin, "Content-Type", "application/json"),
		}
		for status, res := range provoked {
			declared := s.at(s.operation(name), "responses", fmt.Sprint(status)) != nil
			if (res.status == status) != declared {
				t.Errorf("%s: provoking %d got %d %s; openapi.yaml declares it: %v", name, status, res.status, res.body, declared)
			}
			if res.status >= 300 {
				s.answered(method, path, res)
			}
		}
		// The rest of what is declared is the database's trouble.
		for status := range s.at(s.operation(name), "responses") {
			if _, ok := provoked[atoi(status)]; !ok && status != "503" && status[0] != '2' {
				t.Errorf("%s declares %s, which this test does not provoke", name, status)
			}
		}
	}
}

func atoi(s string) (n int) {
	_, _ = fmt.Sscan(s, &n)
	return n
}
