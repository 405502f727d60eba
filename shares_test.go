// Tests of upstreams that serve other projects beside their own.
package main

import (
	"fmt"
	"testing"
	"time"
)

// TestSharedUpstream: calls of a project that an upstream is shared with go there
// from the next call on, with its key and its health, and do so no more once it is
// not shared, changed, or gone with its project.
func TestSharedUpstream(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"other"}`, 201, &other)
	var token struct{ Token string }
	p.manage("POST", "/manage/tokens", `{"project_id":"`+other.ID+`","name":"o"}`, 201, &token)
	p.secrets = append(p.secrets, token.Token)
	path := "/manage/projects/" + p.project + "/upstreams/" + p.upstream
	share := func(ids string, status int) {
		t.Helper()
		p.manage("PATCH", path, `{"shared_with":[`+ids+`]}`, status, nil)
	}
	expect := func(what string, status int) {
		t.Helper()
		before := len(p.provider.got())
		res := p.chatAs(token.Token)
		if asked := len(p.provider.got()) - before; res.status != status || asked != 1 && status == 200 {
			t.Errorf("%s: got %d %s, the provider was asked %d times", what, res.status, res.body, asked)
		}
	}
	expect("not shared", 404)
	share(`"`+other.ID+`"`, 200)
	expect("shared", 200)
	if row := p.lastCall(); row.UpstreamID != p.upstream || row.Outcome != "ok" {
		t.Errorf("the ledger has %+v", row)
	}
	share(`"`+p.project+`"`, 400) // its own
	share(`"proj_nobody"`, 400)
	share(`1`, 400)
	expect("still shared", 200)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	expect("after a restart", 200)
	p.manage("PATCH", path, `{"api_key":"`+p.provider.key+`"}`, 200, nil)
	expect("with its key given again", 200)
	var up struct {
		SharedWith []string `json:"shared_with"`
	}
	if p.manage("GET", path, "", 200, &up); fmt.Sprint(up.SharedWith) != "["+other.ID+"]" {
		t.Errorf("it is shared with %v", up.SharedWith)
	}
	p.manage("PATCH", path, `{"is_active":false}`, 200, nil)
	expect("off", 404)
	p.manage("PATCH", path, `{"is_active":true}`, 200, nil)
	expect("on", 200)
	share("", 200)
	expect("not shared any more", 404)
	share(`"`+other.ID+`"`, 200)
	now := time.Now().UnixMilli()
	p.in.health.of(1, "").limited(now, now, 60_000, "x")
	if _, id := p.addUpstream(`"priority":1,"shared_with":["` + other.ID + `"]`); p.chatAs(token.Token).status != 200 || p.lastCall().UpstreamID != id {
		t.Errorf("a key that cools in one project is used in another: %+v", p.lastCall())
	}
	p.manage("DELETE", path, "", 200, nil)
	if res := p.chatAs(token.Token); res.status != 200 {
		t.Errorf("with the other one: got %d", res.status)
	}
	p.manage("DELETE", "/manage/projects/"+p.project, "", 200, nil)
	expect("gone with its project", 404)
}
