// Tests of restore --revoke=since: after it, nothing may do more than in the backup, and nothing more than in the
// current database.
package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A restoreCase changes one field of an object after the backup, and says what the object has once the backup is
// restored.
type restoreCase struct {
	kind          string // token, project, upstream or key
	before, since string // JSON members, in the backup and since
	want          string // the members after the restore
}

func restoreCases() map[string]restoreCase {
	const limits = `"policy":{"limits":[%s]}`
	limit := func(texts ...string) string { return fmt.Sprintf(limits, strings.Join(texts, ",")) }
	perDay := func(n int) string { return fmt.Sprintf(`{"count":"requests","max":%d,"per":"day"}`, n) }
	const dollars, shadow = `{"count":"dollars","max":5,"per":"month"}`,
		`{"count":"tokens","max":10,"per":"day","shadow":true}`
	return map[string]restoreCase{
		"max_requests lowered": {"token", `"max_requests":9`, `"max_requests":4`, `"max_requests":4`},
		"max_requests raised":  {"token", `"max_requests":4`, `"max_requests":9`, `"max_requests":4`},
		"max_requests set":     {"token", `"name":"a"`, `"max_requests":0`, `"max_requests":0`},
		"max_requests removed": {"token", `"max_requests":4`, `"max_requests":null`, `"max_requests":4`},
		"idle expiry shortened": {"token", `"idle_expiry_minutes":90`, `"idle_expiry_minutes":30`,
			`"idle_expiry_minutes":30`},
		"idle expiry set": {"token", `"name":"a"`, `"idle_expiry_minutes":30`, `"idle_expiry_minutes":30`},
		"idle expiry removed": {"token", `"idle_expiry_minutes":30`, `"idle_expiry_minutes":null`,
			`"idle_expiry_minutes":30`},
		"expiry brought forward": {"token", `"expires_at":null`, `"expires_at":"2100-01-01T00:00:00Z"`,
			`"expires_at":"2100-01-01T00:00:00Z"`},
		"expiry put off": {"token", `"expires_at":"2100-01-01T00:00:00Z"`, `"expires_at":"2101-01-01T00:00:00Z"`,
			`"expires_at":"2100-01-01T00:00:00Z"`},
		"name changed": {"token", `"name":"old"`, `"name":"new"`, `"name":"old"`},
		"token: models narrowed": {"token", `"policy":{"models":["gpt-4o*"]}`, `"policy":{"models":["gpt-4o-mini"]}`,
			`"policy":{"models":["gpt-4o-mini"]}`},
		"token: models widened": {"token", `"policy":{"models":["gpt-4o-mini"]}`, `"policy":{"models":["gpt-4o*"]}`,
			`"policy":{"models":["gpt-4o-mini"]}`},
		"token: models set": {"token", `"policy":{}`, `"policy":{"models":["a","b*"]}`,
			`"policy":{"models":["a","b*"]}`},
		"token: models removed": {"token", `"policy":{"models":["a"]}`, `"policy":{}`,
			`"policy":{"models":["a"]}`},
		"token: models replaced": {"token", `"policy":{"models":["a","b"]}`, `"policy":{"models":["b","c"]}`,
			`"policy":{"models":["b"]}`},
		"token: other models": {"token", `"policy":{"models":["a"]}`, `"policy":{"models":["b"]}`,
			`"policy":{"models":[]}`},
		"token: addresses narrowed": {"token", `"policy":{"addresses":["127.0.0.0/8"]}`,
			`"policy":{"addresses":["127.0.0.1"]}`, `"policy":{"addresses":["127.0.0.1/32"]}`},
		"token: addresses added": {"token", `"policy":{}`, `"policy":{"addresses":["10.0.0.0/8"]}`,
			`"policy":{"addresses":["10.0.0.0/8"]}`},
		"token: addresses moved": {"token", `"policy":{"addresses":["10.0.0.0/8","::1"]}`,
			`"policy":{"addresses":["10.1.0.0/16","192.0.2.0/24"]}`, `"policy":{"addresses":["10.1.0.0/16"]}`},
		"token: endpoints narrowed": {"token", `"policy":{"endpoints":["/v1/*"]}`,
			`"policy":{"endpoints":["POST /v1/chat/completions"]}`,
			`"policy":{"endpoints":["POST /v1/chat/completions"]}`},
		"token: endpoint methods": {"token", `"policy":{"endpoints":["POST /v1/audio/*","GET /v1/models"]}`,
			`"policy":{"endpoints":["/v1/audio/speech","POST /v1/models"]}`,
			`"policy":{"endpoints":["POST /v1/audio/speech"]}`},
		"token: limit lowered": {"token", limit(perDay(9)), limit(perDay(4)), limit(perDay(4))},
		"token: limit raised":  {"token", limit(perDay(4)), limit(perDay(9)), limit(perDay(4))},
		"token: limit added":   {"token", limit(perDay(9)), limit(perDay(9), dollars), limit(perDay(9), dollars)},
		"token: limit removed": {"token", limit(perDay(9), dollars), limit(dollars), limit(perDay(9), dollars)},
		"token: limits both ways": {"token",
			limit(perDay(4), dollars), limit(perDay(9), shadow), limit(perDay(4), dollars, shadow)},
		"project: models narrowed": {"project", `"policy":{}`, `"policy":{"models":["gpt-4o-mini"]}`,
			`"policy":{"models":["gpt-4o-mini"]}`},
		"project: limit lowered": {"project", limit(perDay(9)), limit(perDay(4)), limit(perDay(4))},
		"project: addresses added": {"project", `"policy":{}`, `"policy":{"addresses":["10.0.0.0/8"]}`,
			`"policy":{"addresses":["10.0.0.0/8"]}`},
		"project: stateful ended":   {"project", `"policy":{"stateful":true}`, `"policy":{}`, `"policy":{}`},
		"project: stateful allowed": {"project", `"policy":{}`, `"policy":{"stateful":true}`, `"policy":{}`},
		"project: content kept less": {"project", `"policy":{"keep_content_days":9}`,
			`"policy":{"keep_content_days":2}`, `"policy":{"keep_content_days":2}`},
		"project: content kept": {"project", `"policy":{}`, `"policy":{"keep_content_days":2}`, `"policy":{}`},
		"project: deactivated":  {"project", `"is_active":true`, `"is_active":false`, `"is_active":false`},
		"project: activated":    {"project", `"is_active":false`, `"is_active":true`, `"is_active":false`},
		"upstream: deactivated": {"upstream", `"is_active":true`, `"is_active":false`, `"is_active":false`},
		"upstream: activated":   {"upstream", `"is_active":false`, `"is_active":true`, `"is_active":false`},
		"upstream: models narrowed": {"upstream", `"models":[]`, `"models":["gpt-4o-mini"]`,
			`"models":["gpt-4o-mini"]`},
		"upstream: models widened": {"upstream", `"models":["gpt-4o-mini"]`, `"models":[]`,
			`"models":["gpt-4o-mini"]`},
		"upstream: no model in both": {"upstream", `"models":["a"]`, `"models":["b"]`, `"models":[],"is_active":false`},
		"upstream: limit lowered": {"upstream", `"requests_per_minute":9`, `"requests_per_minute":4`,
			`"requests_per_minute":4`},
		"upstream: limit removed": {"upstream", `"tokens_per_minute":9`, `"tokens_per_minute":0`,
			`"tokens_per_minute":9`},
		"upstream: weight changed": {"upstream", `"weight":3`, `"weight":5`, `"weight":3`},
		"upstream: new key": {"upstream", `"api_key":"sk-the-first-key-0123456789AAAA"`,
			`"api_key":"sk-the-second-key-123456789BBBB"`, `"key_hint":"BBBB"`},
		"key: role lowered": {"key", `"role":"admin"`, `"role":"viewer"`, `"role":"viewer"`},
		"key: role raised":  {"key", `"role":"viewer"`, `"role":"admin"`, `"role":"viewer"`},
		"key: expiry shortened": {"key", `"expires_at":null`, `"expires_at":"2100-01-01T00:00:00Z"`,
			`"expires_at":"2100-01-01T00:00:00Z"`},
		"key: expiry removed": {"key", `"expires_at":"2100-01-01T00:00:00Z"`, `"expires_at":null`,
			`"expires_at":"2100-01-01T00:00:00Z"`},
	}
}

// create makes the object of a case and returns its URL. n makes its name unique.
func (c *restoreCase) create(p *testProxy, n int) string {
	p.t.Helper()
	var path, body string
	switch c.kind {
	case "token":
		path, body = "/manage/tokens", fmt.Sprintf(`"project_id":%q`, p.project)
	case "project":
		path, body = "/manage/projects", fmt.Sprintf(`"name":"project %d"`, n)
	case "upstream":
		path = "/manage/projects/" + p.project + "/upstreams"
		body = fmt.Sprintf(`"name":"upstream %d","api_key":"sk-another-key-0123456789AAAA"`, n)
	case "key":
		path, body = "/manage/keys", fmt.Sprintf(`"name":"key %d","role":"viewer"`, n)
	}
	var v struct{ ID string }
	p.manage("POST", path, "{"+body+"}", 201, &v)
	p.manage("PATCH", path+"/"+v.ID, "{"+c.before+"}", 200, nil)
	return path + "/" + v.ID
}

// TestRestoreNarrows (UP7): for each change that administrators can make, in both directions, the restored object
// may do no more than before the change and no more than after it.
func TestRestoreNarrows(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	urls := map[string]string{}
	cases := restoreCases()
	for name, c := range cases {
		urls[name] = c.create(p, len(urls))
	}
	backup := filepath.Join(p.dir, "backup.db")
	if out, err := runProgram(t, p.env, "backup", backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, c := range cases {
		p.manage("PATCH", urls[name], "{"+c.since+"}", 200, nil)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if out, err := runProgram(t, p.env, "restore", "--revoke=since", backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.start()
	for name, c := range cases {
		var got, want map[string]json.RawMessage
		p.manage("GET", urls[name], "", 200, &got)
		if err := json.Unmarshal([]byte("{"+c.want+"}"), &want); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for field, value := range want {
			text := strings.ReplaceAll(string(got[field]), ".000Z", "Z")
			if text != string(value) {
				t.Errorf("%s: %s is %s, want %s", name, field, text, value)
			}
		}
	}
}

// TestRestoreEnded (UP7): what was deleted or replaced since is neither usable nor readable after a restore, and
// the comparison names every kind.
func TestRestoreEnded(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	newProject := func(name string) (id, upstream string) {
		var v struct {
			ID        string
			Upstreams []struct{ ID string }
		}
		p.manage("POST", "/manage/projects", `{"name":"`+name+`","api_key":"sk-old-`+name+`-0123456789OLDK"}`, 201, &v)
		return v.ID, v.Upstreams[0].ID
	}
	deleted, _ := newProject("deleted")
	emptied, emptiedUp := newProject("emptied")
	rotated, rotatedUp := newProject("rotated")
	owner, ownerUp := newProject("owner")
	url := func(project, upstream string) string { return "/manage/projects/" + project + "/upstreams/" + upstream }
	p.manage("PATCH", url(owner, ownerUp), `{"shared_with":["`+emptied+`","`+rotated+`"]}`, 200, nil)
	backup := filepath.Join(p.dir, "backup.db")
	if out, err := runProgram(t, p.env, "backup", backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.manage("DELETE", "/manage/projects/"+deleted, "", 200, nil)
	p.manage("DELETE", url(emptied, emptiedUp), "", 200, nil)
	p.manage("PATCH", url(rotated, rotatedUp), `{"api_key":"sk-new-rotated-0123456789NEWK"}`, 200, nil)
	p.manage("PATCH", url(owner, ownerUp), `{"shared_with":["`+rotated+`"]}`, 200, nil)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	out, _ := runProgram(t, p.env, "restore", backup)
	for _, want := range []string{"1 project active, but inactive or deleted now",
		"2 upstreams active, but inactive or deleted now", "1 upstream with the provider key from before",
		"1 upstream for more projects"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in %s", want, out)
		}
	}
	if out, err := runProgram(t, p.env, "restore", "--revoke=since", backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.start()
	p.manage("GET", "/manage/projects/"+deleted, "", 404, nil)
	p.manage("GET", url(emptied, emptiedUp), "", 404, nil)
	var u struct {
		KeyHint    string   `json:"key_hint"`
		SharedWith []string `json:"shared_with"`
	}
	if p.manage("GET", url(rotated, rotatedUp), "", 200, &u); u.KeyHint != "NEWK" {
		t.Errorf("the rotated key is %s", u.KeyHint)
	}
	if p.manage("GET", url(owner, ownerUp), "", 200, &u); !slices.Equal(u.SharedWith, []string{rotated}) {
		t.Errorf("the upstream is shared with %v", u.SharedWith)
	}
	rows, err := collect(t.Context(), p.instance.store.readDB, "reading keys", func(n *int) []any { return []any{n} },
		`SELECT length(sealed_key) FROM upstreams WHERE deleted_at IS NOT NULL`)
	if err != nil || !slices.Equal(rows, []int{0, 0}) {
		t.Errorf("deleted upstreams have keys of %v bytes, %v", rows, err)
	}
	p.manage("POST", "/manage/projects", `{"name":"deleted"}`, 201, nil) // its name is free
	if out, err := runProgram(t, p.env, "doctor"); err != nil {
		t.Errorf("doctor: %v: %s", err, out)
	}
}

// TestRestoreKeepsUse: limits go on counting after a restore. Calls that ran when the backup was made, and those
// that ran when the program died, count once.
func TestRestoreKeepsUse(t *testing.T) {
	t.Parallel()
	limits := func(per string) string {
		return `"policy":{"limits":[{"count":"requests","max":6,"per":"` + per + `"}]}`
	}
	for _, per := range []string{"hour", "day", "month", "lifetime",
		`month","for_each":"end_user`, `lifetime","for_each":"tag:team`} {
		t.Run(per, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			_, token := p.newToken(`"name":"limited",` + limits(per))
			p.manage("PATCH", "/manage/projects/"+p.project, "{"+limits(per)+"}", 200, nil)
			stream := func() *clientStream {
				p.provider.setScript(endlessScript)
				defer p.provider.setScript(chatScript)
				s := p.stream(token)
				if _, err := s.read(1); err != nil {
					t.Fatal(err)
				}
				return s
			}
			p.chatAs(token)
			p.waitSettled()
			during := stream() // runs when the backup is made
			backup := filepath.Join(p.dir, "backup.db")
			if out, err := runProgram(t, p.env, "backup", backup); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			during.body.Close()
			p.waitSettled()
			p.chatAs(token)
			defer stream().body.Close()            // runs when the program dies
			p.checkRestored(t, backup, token, 2)   // the token's limit
			p.checkRestored(t, backup, p.token, 2) // the project's
		})
	}
}

// TestRestoreKeepsAttribution: restore --revoke=since brings every sum of a session, an end user and a tag up to what
// the current database has, whatever columns the table has.
func TestRestoreKeepsAttribution(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it restores a backup")
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"attribution":{"tags":["team"]}}}`, 200, nil)
	call := func() {
		res := p.do("POST", "/v1/chat/completions", chatBody(`"user":"ann","prompt_cache_key":"s1"`), "Content-Type",
			"application/json", "Authorization", "Bearer "+p.token, "X-Stainless-Retry-Count", "2",
			"X-LLM-Proxy-Tags", "team=search")
		if res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
	}
	call()
	p.waitSettled()
	backup := filepath.Join(p.dir, "backup.db")
	if out, err := runProgram(t, p.env, "backup", backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	call()
	p.waitSettled()
	sums := func() (out []string) {
		db := p.instance.store.readDB
		names, err := collect(t.Context(), db, "listing columns", func(s *string) []any { return []any{s} },
			`SELECT name FROM pragma_table_info('attribution_sums') WHERE name NOT IN ('project', 'token', 'at')`)
		if err != nil {
			t.Fatal(err)
		}
		out, err = collect(t.Context(), db, "reading sums", func(s *string) []any { return []any{s} },
			`SELECT json_array(`+strings.Join(names, ", ")+`) FROM attribution_sums ORDER BY 1`)
		if err != nil || len(out) < 3 {
			t.Fatal(out, err)
		}
		return out
	}
	before := sums()
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if out, err := runProgram(t, p.env, "restore", "--revoke=since", backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.start()
	if after := sums(); !slices.Equal(after, before) {
		t.Errorf("got  %q\nwant %q", after, before)
	}
}
