// What hostile callers and careless admins send: fields that are not theirs to
// set, text that means something to a database, more tokens than memory, and
// calls beyond a token's policy.
package main

import (
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// TestMassAssignment: what an admin may not set is refused, not ignored.
func TestMassAssignment(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	project := `"project_id":"` + p.project + `","name":"x"`
	for _, c := range [][3]string{
		{"POST", "/manage/tokens", `{` + project + `,"is_admin":true}`},
		{"POST", "/manage/tokens", `{` + project + `,"request_count":0}`},
		{"POST", "/manage/tokens", `{` + project + `,"token":"sk-mine"}`},
		{"POST", "/manage/tokens", `{` + project + `,"id":"tok_mine"}`},
		{"POST", "/manage/tokens", `{` + project + `,"Max_Requests":1}`},
		{"POST", "/manage/tokens", `{` + project + `,` + project + `}`},
		{"POST", "/manage/tokens", `{` + project + `,"policy":{"stateful":true}}`},
		{"POST", "/manage/tokens", `{` + project + `,"policy":{"models":["a"],"Models":["b"]}}`},
		{"PATCH", "/manage/tokens/" + p.tokenID, `{"project_id":"` + p.project + `"}`},
		{"PATCH", "/manage/tokens/" + p.tokenID, `{"request_count":0}`},
		{"PATCH", "/manage/tokens/" + p.tokenID, `{"revoked_at":null}`},
		{"PATCH", "/manage/projects/" + p.project, `{"id":"proj_mine"}`},
		{"POST", "/manage/keys", `{"name":"x","role":"root"}`},
		{"POST", "/manage/keys", `{"name":"x","role":"admin","id":"environment"}`},
	} {
		if a := p.manageAs(p.adminKey, c[0], c[1], c[2]); a.status != 400 {
			t.Errorf("%s %s %s: %d %s", c[0], c[1], c[2], a.status, a.body)
		}
	}
	var l struct{ Data []json.RawMessage }
	p.manage("GET", "/manage/tokens", "", 200, &l)
	if len(l.Data) != 1 {
		t.Errorf("there are %d tokens", len(l.Data))
	}
}

// TestHostileText: text that means something to a database, a terminal or a
// template is text, or refused.
func TestHostileText(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, s := range []string{`' OR '1'='1`, `"; DROP TABLE tokens; --`, `%`, `_`, `\`, `{{.}}`, `<script>`, "\u2028", "é\u0301", "a\x00b", "\xff\xfe", "\x1b[2J", strings.Repeat("x", 5000)} {
		header := strings.Map(func(r rune) rune { return max(r, ' ') }, s)
		p.refused(s, p.chatAs(header), 401, "invalid_api_key")
		quoted, _ := json.Marshal(s)
		for _, c := range [][3]string{
			{"POST", "/manage/tokens", `{"project_id":` + string(quoted) + `,"name":"x"}`},
			{"GET", "/manage/tokens/" + urlEscape(s), ""}, {"GET", "/manage/tokens?project_id=" + urlEscape(s), ""}, {"GET", "/manage/tokens?after=" + urlEscape(s), ""},
			{"GET", "/manage/requests/" + urlEscape(s), ""}, {"GET", "/manage/usage?group_by=" + urlEscape(s), ""}, {"GET", "/manage/projects?" + urlEscape(s) + "=1", ""},
			{"DELETE", "/manage/projects/" + urlEscape(s), ""}, {"PATCH", "/manage/keys/" + urlEscape(s), `{"name":"x"}`},
		} {
			if a := p.manageAs(p.adminKey, c[0], c[1], c[2]); a.status != 400 && a.status != 404 {
				t.Errorf("%s %.60s: %d %s", c[0], c[1], a.status, a.body)
			}
		}
		if a := p.manageAs(p.adminKey, "GET", "/manage/tokens?name="+urlEscape(s), ""); a.status != 200 || strings.Contains(a.body, p.tokenID) {
			t.Errorf("name=%q: %d %s", s, a.status, a.body)
		}
	}
	if a := p.chat(); a.status != 200 {
		t.Errorf("afterwards: %d %s", a.status, a.body)
	}
}

// urlEscape escapes every byte.
func urlEscape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		b.WriteString("%" + strings.ToUpper(hex.EncodeToString([]byte{s[i]})))
	}
	return b.String()
}

// TestPolicyOfToken: a token held to a model and an endpoint does nothing else.
func TestPolicyOfToken(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, token := p.newToken(`"name":"held","policy":{"models":["gpt-4o-mini"],"endpoints":["/v1/chat/completions"]}`)
	for _, c := range []struct{ path, body, code string }{
		{"/v1/chat/completions", `{"model":"gpt-4o","messages":[]}`, "model_not_allowed"},
		{"/v1/chat/completions", `{"model":"gpt-4o-mini ","messages":[]}`, "model_not_allowed"},
		{"/v1/chat/completions", `{"model":"GPT-4o-mini","messages":[]}`, "model_not_allowed"},
		{"/v1/chat/completions", `{"messages":[]}`, "model_not_allowed"},
		{"/v1/chat/completions", chatBody(`"models":["gpt-4o"]`), "model_not_allowed"},
		{"/v1/chat/completions", chatBody(`"route":"fallback","models":[]`), "model_not_allowed"},
		{"/v1/chat/completions", chatBody(`"fallbacks":["gpt-4o"]`), "model_not_allowed"},
		{"/v1/embeddings", `{"model":"gpt-4o-mini","input":"x"}`, "endpoint_not_allowed"},
		{"/v1/completions", `{"model":"gpt-4o-mini","prompt":"x"}`, "endpoint_not_allowed"},
	} {
		p.refused(c.body, p.do("POST", c.path, c.body, "Authorization", "Bearer "+token, "Content-Type", "application/json"), 403, c.code)
	}
	if a := p.chatAs(token, `"models":null`); a.status != 200 {
		t.Errorf("models null: %d %s", a.status, a.body)
	}
	if a := p.chat(`"models":["a","b"]`); a.status != 200 { // no list of models applies: as sent
		t.Errorf("without a list: %d %s", a.status, a.body)
	}
}

// TestWrongTokensLockNobodyOut: however many wrong tokens come from an address.
func TestWrongTokensLockNobodyOut(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	for range 200 {
		p.refused("wrong", p.chatAs(p.mint(tokenPrefix)), 401, "invalid_api_key")
	}
	if a := p.chat(); a.status != 200 {
		t.Errorf("the valid token: %d %s", a.status, a.body)
	}
}

// TestStoreDown: without the database, a token that is not known is neither
// accepted nor called wrong.
func TestStoreDown(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	if err := p.in.store.read.Close(); err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{p.token, p.mint(tokenPrefix)} {
		a := p.chatAs(token)
		p.refused("well-formed", a, 503, "store_unavailable")
		if a.header.Get("Retry-After") == "" {
			t.Error("no Retry-After")
		}
	}
	p.refused("malformed", p.chatAs("sk-x"), 401, "invalid_api_key")
	if a := p.manageAs(p.adminKey, "GET", "/manage/projects", ""); a.status != 503 {
		t.Errorf("/manage: %d %s", a.status, a.body)
	}
}

// TestUnknownTokensBounded: tokens that nobody has cost one look-up each and no
// lasting memory.
func TestUnknownTokensBounded(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	g, now := p.in.registry, time.Now().UnixMilli()
	var hash [32]byte
	for i := range maxUnknown + 500 {
		hash[0], hash[1], hash[2] = byte(i), byte(i>>8), 1
		if _, _, err := g.lookup(t.Context(), hash, now); err != errUnknownToken {
			t.Fatal(err)
		}
		if len(g.unknown) > maxUnknown {
			t.Fatalf("%d hashes are kept", len(g.unknown))
		}
	}
	if n := len(g.byID); n > 1 {
		t.Errorf("%d tokens are live", n)
	}
	p.allowErrors = true
	p.in.store.read.Close() // so that a second look-up would show
	if _, _, err := g.lookup(t.Context(), hash, now); err != errUnknownToken {
		t.Errorf("the second time: %v", err)
	}
}
