// Paths and queries over the wire. Whatever a path is made of, it reaches the
// handler that it names byte for byte, or none; and the provider gets only
// paths made from the table. (The table by itself: endpoints_test.go.)
package main

import (
	"fmt"
	"strings"
	"testing"
)

// TestOddPaths: no spelling of a path gets around the table, or from one door
// to another. There is no redirect either: a client would send its token along.
func TestOddPaths(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for target := range strings.FieldsSeq(`
		/v1/chat/completionsX /v1/chat/completions/ //v1/chat/completions /V1/chat/completions /v1/chat//completions /v1//chat/completions
		/v1/chat/completions;x=1 /v1/chat/completions. /v1/chat/completions%20 /v1 /v1/ /v1/. /v1/.. /./v1/chat/completions /x/../v1/chat/completions
		/v1/chat%2fcompletions /v1%2Fchat/completions /%761/chat/completions /v1/chat%5ccompletions /v1/chat\completions /v1\chat\completions
		/v1/%2e%2e/v1/chat/completions /v1/x/../chat/completions /v1/x/%2e%2e/chat/completions /v1/..;/v1/chat/completions
		/v1/chat/completions%00 /v1/chat/completions%252f /v1/chat/completions%c0%af /v1/chat／completions /v1/chat/completions%0a /v1/chat/completions%3f
		/v1/../manage/tokens /v1/..%2fmanage/tokens /v1/%2e%2e/manage/tokens /v1/..%5cmanage%5ctokens /v1/../admin /manage/../v1/models /manage/%2e%2e/v1/models
		/manage /manage/ /manage//tokens /manage/tokens/ /manage/./tokens /manage/tokens/../keys /manage/tokens%2f..%2fkeys /%6danage/tokens //manage/tokens
		/manage;/tokens /MANAGE/tokens /manage/tokens%00 /manage/tokens%20 /manage%2ftokens /healthz/ /healthz/x /HEALTHZ /readyz%00 //healthz /x /%2f /%00 /..
		/v1/engines/gpt-4o/chat/completions /openai/deployments/gpt-4o/chat/completions /v1beta/models /chat/completions /openai/v1/chat/completions
		/v1/realtime /v1/realtime?model=gpt-4o /v1/realtime/sessions /v1/realtime/client_secrets /v1/realtime/translations/client_secrets
		/v1/realtime/transcription_sessions /v1/chatkit/sessions /v1/chatkit/sessions/a/cancel /v1/organization/admin_api_keys /v1/organization/users
		/v1/organization/projects/p/api_keys /v1/projects/p/users /v1/dashboard/billing/usage /v1/me /v1/api_keys /v1/login /v1/workspaces`) {
		for _, method := range []string{"POST", "GET"} {
			for _, key := range []string{p.token, p.adminKey} {
				got := p.raw(method + " " + target + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer " + key +
					"\r\nContent-Type: application/json\r\nContent-Length: " + fmt.Sprint(len(chatBody())) + "\r\n\r\n" + chatBody())
				status := strings.TrimPrefix(got, "HTTP/1.1 ")[:3]
				// An admin's key at /v1 is 401 before the path is looked at; net/http calls some targets malformed.
				if status != "404" && status != "400" && !(status == "401" && key == p.adminKey) {
					t.Errorf("%s %s: got %q", method, target, got)
				}
				if status == "404" && !strings.Contains(got, "Content-Type: application/json\r\n") {
					t.Errorf("%s %s: the 404 is no JSON: %q", method, target, got)
				}
			}
		}
	}
	for _, target := range []string{"/v1/chat/completions x", "/v1/chat\tcompletions", "/v1/chat/completions\x00", "v1/chat/completions", ""} {
		if got := p.raw("GET " + target + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 400 ") {
			t.Errorf("%q: got %q", target, got)
		}
	}
	// A fragment is no part of a request; net/http takes it for a byte of the path.
	if got := p.raw("POST /v1/chat/completions#x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer " + p.token + "\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 404 ") {
		t.Errorf("a fragment: got %q", got)
	}
	if n := len(p.provider.got()); n > 0 {
		t.Errorf("the provider got %d requests, last %s", n, p.provider.last(t).target)
	}
}

// TestOnlyTheTableForwards: of every operation in the table, by every method,
// exactly those of class inference go up where nothing else is turned on, and
// to the very path of the table.
func TestOnlyTheTableForwards(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	forms := map[string]bool{}
	classes := map[string]endpointClass{}
	for _, e := range endpointRows {
		classes[e.method+" "+e.pattern] = e.class
		forms[e.pattern] = forms[e.pattern] || e.body == bodyForm
	}
	forwarded := map[string]bool{}
	p.provider.answer(func(c *providerConn, r recorded) bool { return c.reply(200, "{}") })
	for pattern := range forms {
		path := pattern
		for strings.Contains(path, "{") {
			from, rest, _ := strings.Cut(path, "{")
			_, rest, _ = strings.Cut(rest, "}")
			path = from + "gpt-4o" + rest
		}
		for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"} {
			name := method + " " + pattern
			class, known := classes[name]
			kind, body := "application/json", ""
			if method == "POST" && forms[pattern] {
				kind, body = formType, form("model=gpt-4o")
			} else if method == "POST" {
				body = `{"model":"gpt-4o"}`
				if strings.HasSuffix(pattern, "/cancel") || strings.HasSuffix(pattern, "/hangup") || strings.HasSuffix(pattern, "/pause") || strings.HasSuffix(pattern, "/resume") || strings.Contains(pattern, "evals/{eval_id}/runs/{run_id}") {
					body = ""
				}
			}
			before := len(p.provider.got())
			a := p.do(method, path, body, "Authorization", "Bearer "+p.token, "Content-Type", kind)
			up := len(p.provider.got()) - before
			switch {
			case !known && (a.status != 405 || up > 0):
				t.Errorf("%s: got %d, %d went up", name, a.status, up)
			case known && class == classStateful && (a.status != 403 || a.code() != "endpoint_not_allowed" || up > 0):
				t.Errorf("%s: got %d %s, %d went up", name, a.status, a.body, up)
			case known && class == classInference && strings.HasPrefix(pattern, "/v1/messages"):
				if a.status != 404 || up > 0 { // this project's provider does not speak it
					t.Errorf("%s: got %d %s", name, a.status, a.body)
				}
			case known && class == classInference:
				if a.status != 200 || up != 1 || p.provider.last(t).target != path || p.provider.last(t).method != method {
					t.Errorf("%s: got %d %s, %d went up", name, a.status, a.body, up)
				}
				forwarded[name] = true
			}
		}
	}
	if len(forwarded) != 15 {
		t.Errorf("%d operations went up", len(forwarded))
	}
}

// TestQueryOverTheWire: known names only, encoded anew.
func TestQueryOverTheWire(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	many := strings.Repeat("limit=1&", 10_000)
	for _, c := range []struct {
		query, want string
		status      int
	}{
		{"", "/v1/files", 200},
		{"?", "/v1/files", 200},
		{"?limit=5&after=a%20b", "/v1/files?limit=5&after=a+b", 200},
		{"?purpose=%61ssist%61nts%26x%3d1", "/v1/files?purpose=assistants%26x%3D1", 200},
		{"?limit=1;after=2", "", 400}, {"?limit=%zz", "", 400}, {"?limit=1&limit=2", "", 400}, {"?Limit=1", "", 400}, {"?limit%00=1", "", 400},
		{"?model=gpt-4o", "", 400}, {"?api_key=x", "", 400}, {"?key=x", "", 400}, {"?api-version=1", "", 400}, {"?limit[]=1", "", 400}, {"?=1", "", 400},
		{"?" + many + "model=bad", "", 400}, {"?after=" + strings.Repeat("a", 20_000), "", 400}, {"?limit=%0d%0a", "", 400}, {"?limit=%ff", "", 400},
		{"?order=asc#x", "/v1/files?order=asc%23x", 200},
	} {
		before := len(p.provider.got())
		got := p.raw("GET /v1/files" + c.query + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer " + p.token + "\r\n\r\n")
		if !strings.HasPrefix(got, fmt.Sprintf("HTTP/1.1 %d ", c.status)) && !strings.HasPrefix(got, "HTTP/1.1 431 ") {
			t.Errorf("%.100s: got %.300q", c.query, got)
		}
		reqs := p.provider.got()
		if c.status != 200 && len(reqs) != before || c.status == 200 && (len(reqs) != before+1 || reqs[before].target != c.want) {
			t.Errorf("%.100s: the provider got %d more, last %q", c.query, len(reqs)-before, p.provider.last(t).target)
		}
	}
}

// TestModelInPathIsHeldToPolicy: the model counts wherever it is named.
func TestModelInPathIsHeldToPolicy(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, token := p.newToken(`"name":"held","policy":{"models":["gpt-4o-mini","meta/*"]}`)
	for path, want := range map[string]int{
		"gpt-4o-mini": 200, "meta/llama": 200, "meta%2Fllama": 200, "gpt-4o": 403, "meta": 403, "GPT-4O-MINI": 403, "gpt-4o-mini%20": 404,
		"meta/../gpt-4o": 404, "meta/%2e%2e/gpt-4o": 404, "meta%2f..%2fgpt-4o": 404, "gpt-4o-mini/": 404, "gpt-4o-mini%00": 404, "gpt-4o%2dmini": 200,
	} {
		if a := p.do("GET", "/v1/models/"+path, "", "Authorization", "Bearer "+token); a.status != want {
			t.Errorf("%s: got %d %s, want %d", path, a.status, a.body, want)
		}
	}
	for _, r := range p.provider.got() {
		if r.target != "/v1/models/gpt-4o-mini" && r.target != "/v1/models/meta/llama" && r.target != "/v1/models/meta%2Fllama" {
			t.Errorf("the provider got %s", r.target)
		}
	}
}
