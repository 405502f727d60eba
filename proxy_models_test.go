// These tests hold lists of models that are merged from several providers, Anthropic's pages among them, and
// requests for one model.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// claudeListScript answers like Anthropic, in pages of limited size.
func claudeListScript(most int, ids ...string) func(*providerConn, recordedRequest) bool {
	return func(c *providerConn, r recordedRequest) bool {
		u, err := url.Parse(r.target)
		q := u.Query()
		limit, errLimit := strconv.Atoi(q.Get("limit"))
		if err != nil || errLimit != nil || limit > 1000 || r.header.Get("Anthropic-Version") == "" {
			return c.reply(400, `{"type":"error","error":{"type":"invalid_request_error","message":"bad list"}}`)
		}
		from := slices.Index(ids, q.Get("after_id")) + 1
		page := ids[from:min(len(ids), from+limit, from+most)]
		var entries []string
		for _, id := range page {
			entries = append(entries, fmt.Sprintf(
				`{"type":"model","id":%q,"display_name":%q,"created_at":"2025-01-01T00:00:00Z"}`,
				id, strings.ToUpper(id)))
		}
		first, last := "null", "null"
		if len(page) > 0 {
			first, last = strconv.Quote(page[0]), strconv.Quote(page[len(page)-1])
		}
		return c.reply(200, fmt.Sprintf(`{"data":[%s],"has_more":%v,"first_id":%s,"last_id":%s}`,
			strings.Join(entries, ","), from+len(page) < len(ids), first, last))
	}
}

// addClaude adds an upstream with Anthropic's API to the test's project.
func (p *testProxy) addClaude(fields string, script func(*providerConn, recordedRequest) bool) (*fakeProvider, string) {
	p.t.Helper()
	provider := newFakeProvider(p.t)
	provider.setScript(script)
	return provider, p.addUpstreamAt(provider, providerAnthropic, fields)
}

// A claudePage is a page of a list as Anthropic's SDKs read it.
type claudePage struct {
	Data []struct {
		ID          string
		DisplayName string `json:"display_name"`
	}
	HasMore *bool   `json:"has_more"`
	FirstID *string `json:"first_id"`
	LastID  *string `json:"last_id"`
}

func (p *testProxy) listClaudeModels(token, query string) testResponse {
	p.t.Helper()
	return p.do("GET", "/v1/models"+query, "", "X-Api-Key", token, "Anthropic-Version", "2023-06-01")
}

// claudeModels returns the ids on a page, and fails if the answer is not a page.
func (p *testProxy) claudeModels(token, query string) (string, claudePage) {
	p.t.Helper()
	res := p.listClaudeModels(token, query)
	var page claudePage
	if err := json.Unmarshal([]byte(res.body), &page); err != nil || res.status != 200 || page.Data == nil ||
		page.HasMore == nil || strings.Contains(res.body, `"object"`) {
		p.t.Fatalf("%s: got %d %s", query, res.status, res.body)
	}
	var ids []string
	for _, m := range page.Data {
		ids = append(ids, m.ID)
	}
	if len(ids) > 0 && (page.FirstID == nil || *page.FirstID != ids[0] || page.LastID == nil ||
		*page.LastID != ids[len(ids)-1]) {
		p.t.Errorf("%s: the ends of the page are wrong: %s", query, res.body)
	}
	return strings.Join(ids, " "), page
}

// walkClaudePages reads page after page as Anthropic's SDKs do: by has_more, and by last_id or, with before_id, by
// first_id.
func (p *testProxy) walkClaudePages(token string, limit int, before string) (pages []string) {
	p.t.Helper()
	q := url.Values{"limit": {strconv.Itoa(limit)}}
	if before != "" {
		q.Set("before_id", before)
	}
	for range 100 {
		ids, page := p.claudeModels(token, "?"+q.Encode())
		pages = append(pages, ids)
		switch {
		case !*page.HasMore:
			return pages
		case before != "" && page.FirstID != nil:
			q.Set("before_id", *page.FirstID)
		case before == "" && page.LastID != nil:
			q.Set("after_id", *page.LastID)
		default:
			p.t.Fatalf("a page that is not the last says nothing of the next: %v", pages)
		}
	}
	p.t.Fatal("the list has no end")
	return nil
}

// TestMergedClaudeModels: the lists of several providers with Anthropic's API are merged without duplicates, and a
// client can page through the result in both directions.
func TestMergedClaudeModels(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil) // its first upstream speaks OpenAI's API and must not be asked
	one, id := p.addClaude(`"models":["claude*"]`,
		claudeListScript(2, "claude-5", "claude-4", "claude-3", "claude-2", "other", "claude-1"))
	two, _ := p.addClaude(`"priority":1,"rewrite":{"mine":"glm-4"}`,
		claudeListScript(1000, "glm-5", "claude-3", "glm-4"))
	const all = "claude-5 claude-4 claude-3 claude-2 claude-1 glm-5 glm-4 mine"

	for _, query := range []string{"", "?limit=1000", "?limit=8", "?beta=true"} {
		if got, page := p.claudeModels(p.token, query); got != all || *page.HasMore {
			t.Errorf("%q: got %s, more: %v", query, got, *page.HasMore)
		}
	}
	if row := p.lastCall(); row.Outcome != "ok" || row.Attempts != 4 || len(row.AttemptLog) != 4 ||
		row.UpstreamID != id || row.AttemptLog[3].Status != 200 || row.AttemptLog[3].Error != "" {
		t.Errorf("the ledger has %+v", row)
	}
	var asked []string
	for _, r := range one.received()[len(one.received())-3:] {
		asked = append(asked, r.target)
	}
	if want := []string{"/v1/models?beta=true&limit=1000", "/v1/models?after_id=claude-4&beta=true&limit=1000",
		"/v1/models?after_id=claude-2&beta=true&limit=1000"}; !slices.Equal(asked, want) {
		t.Errorf("the provider got %v", asked)
	}
	p.checkKeysApart(one, two)
	if n := len(p.provider.received()); n != 0 {
		t.Errorf("the provider of another API got %d requests", n)
	}

	want := []string{"claude-5 claude-4", "claude-3 claude-2", "claude-1 glm-5", "glm-4 mine"}
	if got := p.walkClaudePages(p.token, 2, ""); !slices.Equal(got, want) {
		t.Errorf("forwards: %q", got)
	}
	want = []string{"glm-5 glm-4", "claude-2 claude-1", "claude-4 claude-3", "claude-5"}
	if got := p.walkClaudePages(p.token, 2, "mine"); !slices.Equal(got, want) {
		t.Errorf("backwards: %q", got)
	}
	if got := p.walkClaudePages(p.token, 3, ""); len(got) != 3 || got[2] != "glm-4 mine" {
		t.Errorf("by three: %q", got)
	}
	if got, page := p.claudeModels(p.token, "?after_id=mine"); got != "" || *page.HasMore || page.FirstID != nil ||
		page.LastID != nil {
		t.Errorf("after the last: %q %+v", got, page)
	}
	if got, page := p.claudeModels(p.token, "?before_id=claude-5"); got != "" || *page.HasMore {
		t.Errorf("before the first: %q", got)
	}
	// OpenAI's SDKs get the other list, unchanged.
	const list = `{"object": "list", "data": [{"id":"gpt-4o"}]}`
	p.provider.setScript(replyScript(200, list))
	if res := p.do("GET", "/v1/models", "", "Authorization", "Bearer "+p.token); res.body != list {
		t.Errorf("the list of the other API: got %d %s", res.status, res.body)
	}
	if _, page := p.claudeModels(p.token, "?limit=1&after_id=glm-5"); page.Data[0].DisplayName != "GLM-4" {
		t.Errorf("what is known of a model is lost: %+v", page)
	}
}

// TestInvalidModelPages: an invalid request for a page is refused as the provider would, and a cursor that is not in
// the merged list is invalid.
func TestInvalidModelPages(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	one, _ := p.addClaude(`"models":["claude*"]`, claudeListScript(2, "claude-2", "other", "claude-1"))
	p.addClaude(`"priority":1`, claudeListScript(1000, "glm-5", "glm-4"))
	for query, param := range map[string]string{"?limit=0": "limit", "?limit=1001": "limit", "?limit=x": "limit",
		"?after_id=glm-5&before_id=glm-4": "before_id", "?after_id=nonesuch": "after_id",
		"?before_id=nonesuch": "before_id", "?after_id=other": "after_id"} {
		before := len(one.received())
		res := p.listClaudeModels(p.token, query)
		if res.status != 400 || between(res.body, `"param":"`, `"`) != param ||
			!strings.Contains(res.body, `"type":"error"`) || !strings.Contains(res.body, `"invalid_request_error"`) {
			t.Errorf("%s: got %d %s", query, res.status, res.body)
		}
		if asked := len(one.received()) > before; asked != strings.Contains(query, "=nonesuch") &&
			asked != strings.HasSuffix(query, "=other") {
			t.Errorf("%s: the provider was asked: %v", query, asked)
		}
	}
}

// TestClaudeModelsWithinPolicies: a model that the token may not use is in no page and no cursor, with one provider
// or several, and every page but the last is full.
func TestClaudeModelsWithinPolicies(t *testing.T) {
	t.Parallel()
	list := []string{"claude-opus-1", "claude-haiku-1", "claude-opus-2", "claude-opus-3", "claude-haiku-2",
		"claude-haiku-3", "claude-opus-4", "claude-haiku-4", "claude-opus-5"}
	p := newTest(t, nil)
	p.manage("DELETE", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, "", 200, nil)
	one, _ := p.addClaude(`"priority":0`, claudeListScript(3, list...))
	narrowID, narrow := p.newToken(`"name":"narrow","policy":{"models":["claude-haiku*","glm*"]}`)
	check := func(what string, want ...string) {
		t.Helper()
		if got := p.walkClaudePages(narrow, 2, ""); !slices.Equal(got, want) {
			t.Errorf("%s: %q", what, got)
		}
		if res := p.listClaudeModels(narrow, "?after_id=claude-opus-3"); res.status != 400 {
			t.Errorf("%s: a hidden model as cursor: got %d %s", what, res.status, res.body)
		}
	}
	check("of one provider", "claude-haiku-1 claude-haiku-2", "claude-haiku-3 claude-haiku-4")
	if row := p.lastCall(); row.TokenID != narrowID || row.Attempts != 3 {
		t.Errorf("the ledger has %+v", row)
	}
	// Without a policy that lists models, a single provider's list is passed on byte for byte.
	res := p.listClaudeModels(p.token, "?limit=2&after_id=claude-opus-2")
	if one.lastRequest(t).target != "/v1/models?limit=2&after_id=claude-opus-2" ||
		!strings.HasPrefix(res.body, `{"data":[{"type":"model","id":"claude-opus-3","display_name"`) ||
		p.lastCall().Attempts != 1 {
		t.Errorf("the list of one provider: requested %s, got %s", one.lastRequest(t).target, res.body)
	}
	p.addClaude(`"priority":1`, claudeListScript(1000, "glm-5", "kimi-3", "claude-haiku-1"))
	check("of two", "claude-haiku-1 claude-haiku-2", "claude-haiku-3 claude-haiku-4", "glm-5")
	p.changeProject(`"policy":{"models":["claude-haiku-1","glm-5"]}`)
	check("within the project's policy too", "claude-haiku-1 glm-5")
	p.changeProject(`"policy":{"models":[]}`)
	if got, page := p.claudeModels(narrow, ""); got != "" || *page.HasMore {
		t.Errorf("of none: %s", got)
	}
}

// TestClaudeModelsOfHealthyUpstreams: a provider that does not give its complete list is left out, whatever the
// fault; the answer is the others' list, and the ledger says why. Without any list, the client gets the fault.
func TestClaudeModelsOfHealthyUpstreams(t *testing.T) {
	t.Parallel()
	secondPage := func(then func(*providerConn, recordedRequest) bool) func(*providerConn, recordedRequest) bool {
		first := claudeListScript(1, "claude-2", "claude-1")
		return func(c *providerConn, r recordedRequest) bool {
			if strings.Contains(r.target, "after_id") {
				return then(c, r)
			}
			return first(c, r)
		}
	}
	halfway := func(c *providerConn, _ recordedRequest) bool {
		_, _ = c.Write(
			[]byte("HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{\"data\":"))
		return stallStream(c)
	}
	for _, c := range []struct {
		name   string
		script func(*providerConn, recordedRequest) bool
		asked  int
		reason string
		alone  int // the status if there is no other provider
	}{
		{name: "503", script: replyScript(503, `{}`), asked: 1, reason: "server error", alone: 503},
		{name: "429", script: replyScript(429, `{}`, "Retry-After: 60"), asked: 1, reason: "rate limited", alone: 429},
		{name: "401", script: replyScript(401, `{}`), asked: 1, reason: "key refused", alone: 502},
		{name: "reset", script: resetScript, asked: 1,
			reason: "broke off before it answered", alone: 502},
		{name: "hangs", script: stallScript, asked: 1, reason: "did not answer in time", alone: 504},
		{name: "hangs within a page", script: halfway, asked: 1, reason: "did not answer in time", alone: 504},
		{name: "no JSON", script: replyScript(200, `nonsense`), asked: 1, reason: "its list of models cannot be read",
			alone: 502},
		{name: "no list", script: replyScript(200, `{"data":{}}`), asked: 1,
			reason: "its list of models cannot be read", alone: 502},
		{name: "too large", script: replyScript(200, `{"data":["`+strings.Repeat("x", maxModelList)+`"]}`), asked: 1,
			alone: 502},
		{name: "503 at the second page", script: secondPage(replyScript(503, `{}`)), asked: 2, reason: "server error",
			alone: 503},
		{name: "cut within the second page", script: secondPage(func(c *providerConn, _ recordedRequest) bool {
			_, _ = c.Write(
				[]byte("HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{\"data\":"))
			return c.reset()
		}), asked: 2, reason: "broke off before it answered", alone: 502},
		{name: "hangs at the second page", script: secondPage(halfway), asked: 2, reason: "did not answer in time",
			alone: 504},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			timeout := "60s"
			if c.alone == 504 {
				timeout = "1s"
			}
			p := newTest(t, map[string]string{"FIRST_EVENT_TIMEOUT": timeout})
			first := c.name != "503" && c.name != "no JSON" // it is asked first, otherwise last
			bad, badID := p.addClaude(fmt.Sprintf(`"priority":%d`, map[bool]int{true: 0, false: 2}[first]), c.script)
			_, goodID := p.addClaude(`"priority":1`, claudeListScript(1, "glm-5", "glm-4"))
			if got, _ := p.claudeModels(p.token, ""); got != "glm-5 glm-4" {
				t.Errorf("got %q", got)
			}
			if n := len(bad.received()); n != c.asked {
				t.Errorf("it got %d requests", n)
			}
			row := p.lastCall()
			if row.Outcome != "ok" || row.UpstreamID != goodID || row.Attempts != c.asked+2 ||
				len(row.AttemptLog) != c.asked+2 {
				t.Fatalf("the ledger has %+v", row)
			}
			at := c.asked - 1
			if !first {
				at += 2
			}
			if line := row.AttemptLog[at]; line.Upstream != badID || c.reason != "" && line.Error != c.reason {
				t.Errorf("the attempt log has %+v", row.AttemptLog)
			}
			p.changeUpstream(goodID, `"weight":0`)
			p.changeUpstream(badID, `"note":"recovered"`)
			same := newFakeProvider(t) // another provider with the same fault, so that lists are merged
			same.setScript(c.script)
			p.addUpstreamAt(same, providerAnthropic, `"priority":3`)
			if res := p.listClaudeModels(p.token, ""); res.status != c.alone || res.err != nil {
				t.Errorf("with none: got %d %s, %v", res.status, clip(res.body, 300), res.err)
			}
		})
	}
}

// TestClaudeModelsBounds: an endless list is cut off, an upstream's own limits apply to its pages, and another key
// of the same provider is the first one's spare.
func TestClaudeModelsBounds(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	number := 0
	endless, endlessID := p.addClaude(`"priority":0`, func(c *providerConn, _ recordedRequest) bool {
		number++
		return c.reply(200,
			fmt.Sprintf(`{"data":[{"id":"m%d"}],"has_more":true,"first_id":"m%[1]d","last_id":"m%[1]d"}`, number))
	})
	again, againID := p.addClaude(`"priority":1`,
		replyScript(200, `{"data":[{"id":"same"}],"has_more":true,"first_id":"same","last_id":"same"}`))
	got, page := p.claudeModels(p.token, "?limit=1000")
	if n := len(strings.Fields(got)); n != maxModelPages+1 || len(endless.received()) != maxModelPages ||
		len(again.received()) != 2 || *page.HasMore {
		t.Errorf("got %d models from %d and %d pages", n, len(endless.received()), len(again.received()))
	}
	for _, id := range []string{endlessID, againID} {
		p.manage("DELETE", "/manage/projects/"+p.project+"/upstreams/"+id, "", 200, nil)
	}

	waitForMinute(5)
	limited, _ := p.addClaude(`"priority":0,"requests_per_minute":2`,
		claudeListScript(1, "claude-3", "claude-2", "claude-1"))
	p.addClaude(`"priority":1`, claudeListScript(9, "glm-5"))
	if got, _ := p.claudeModels(p.token, ""); got != "glm-5" || len(limited.received()) != 2 {
		t.Errorf("got %q, and the limited provider got %d requests", got, len(limited.received()))
	}
	if row := p.lastCall(); row.Attempts != 3 || !strings.Contains(row.AttemptLog[1].Error, "own limits") {
		t.Errorf("the ledger has %+v", row)
	}

	q := newTest(t, nil) // two keys of one provider, the first of which is refused
	provider, first := q.addClaude(`"priority":0`, nil)
	list := claudeListScript(1, "claude-2", "claude-1")
	spare := &fakeProvider{url: provider.url, key: "sk-spare-" + randomBase62(30)}
	provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if r.header.Get("X-Api-Key") != spare.key {
			return c.reply(401, `{}`)
		}
		return list(c, r)
	})
	second := q.addUpstreamAt(spare, providerAnthropic, `"priority":1`)
	q.addClaude(`"priority":2`, claudeListScript(9, "glm-5"))
	if got, _ := q.claudeModels(q.token, ""); got != "claude-2 claude-1 glm-5" {
		t.Errorf("with a spare key: %q", got)
	}
	if row := q.lastCall(); row.UpstreamID != second || row.Attempts != 4 || row.AttemptLog[0].Upstream != first {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestModelListErrorsAreCopies: what was wrong with one call's list is not in the error of another call.
func TestModelListErrorsAreCopies(t *testing.T) {
	t.Parallel()
	response := func() *http.Response { return &http.Response{Body: io.NopCloser(strings.NewReader(`{"data":{}}`))} }
	a := attempt{t: &attempts{merged: &mergedModels{bytesLeft: 1}}}
	_, unreadable := parseModelPage(listOpenAI, response())
	for _, err := range []error{a.readModelPage(response()), unreadable} {
		if e, ok := errors.AsType[*apiError](err); !ok || e == errModelList || e.cause == nil {
			t.Errorf("got %v", err)
		}
	}
	if errModelList.cause != nil {
		t.Errorf("the shared error has the cause %v", errModelList.cause)
	}
}

// TestOneModel: a request for one model goes to an upstream that has the model by its list of models or its name
// mapping, otherwise to the first that knows it.
func TestOneModel(t *testing.T) {
	t.Parallel()
	knows := func(ids ...string) func(*providerConn, recordedRequest) bool {
		return func(c *providerConn, r recordedRequest) bool {
			id, _ := url.PathUnescape(strings.TrimPrefix(r.target, "/v1/models/"))
			if !slices.Contains(ids, id) {
				return c.reply(404, `{"type":"error","error":{"type":"not_found_error","message":"model: `+id+`"}}`)
			}
			return c.reply(200, `{"type":"model","id":"`+id+`"}`)
		}
	}
	p := newTest(t, nil)
	p.provider.setScript(knows("gpt-4o", "deployed"))
	claude, _ := p.addClaude(`"models":["claude*"]`, knows("claude-5"))
	glm, _ := p.addClaude(`"priority":1,"rewrite":{"mine":"z/glm-4"}`, knows("glm-5", "z/glm-4"))
	kimi, kimiID := p.addClaude(`"priority":2`, knows("kimi-3"))
	for _, c := range []struct {
		id     string
		status int
		asked  string
		by     *fakeProvider
	}{
		{id: "claude-5", status: 200, asked: "/v1/models/claude-5", by: claude},
		{id: "glm-5", status: 200, asked: "/v1/models/glm-5", by: glm},
		{id: "mine", status: 200, asked: "/v1/models/z/glm-4", by: glm},
		{id: "kimi-3", status: 200, asked: "/v1/models/kimi-3", by: kimi},
		{id: "nonesuch", status: 404, asked: "/v1/models/nonesuch", by: kimi},
	} {
		res := p.do("GET", "/v1/models/"+c.id, "", "X-Api-Key", p.token, "Anthropic-Version", "2023-06-01")
		if res.status != c.status || c.by.lastRequest(t).target != c.asked ||
			c.status == 404 && !strings.Contains(res.body, "model: nonesuch") {
			t.Errorf("%s: got %d %s, and the provider got a request for %s", c.id, res.status, res.body,
				c.by.lastRequest(t).target)
		}
	}
	if row := p.lastCall(); row.Attempts != 2 || row.UpstreamID != kimiID || row.Outcome != "upstream_error" ||
		row.AttemptLog[0].Error != "does not know the model" {
		t.Errorf("the ledger has %+v", row)
	}
	if n := len(p.provider.received()); n != 0 {
		t.Errorf("the provider of another API got %d requests", n)
	}
	for _, id := range []string{kimiID, p.upstream} { // the key stays healthy
		if h := p.healthOf(id); h.State != "ready" {
			t.Errorf("%s is %+v", id, h)
		}
	}
	if res := p.do("GET", "/v1/models/gpt-4o", "", "Authorization", "Bearer "+p.token); res.status != 200 ||
		p.lastCall().Attempts != 1 {
		t.Errorf("got %d %s", res.status, res.body)
	}
	p.changeUpstream(p.upstream, `"rewrite":{"ours":"deployed"}`)
	if res := p.do("GET", "/v1/models/ours", "", "Authorization", "Bearer "+p.token); res.status != 200 ||
		p.provider.lastRequest(t).target != "/v1/models/deployed" {
		t.Errorf("got %d %s", res.status, res.body)
	}
}

// TestMergedModelsContainNoKey: a merged list contains no provider's key, whichever provider echoes it.
func TestMergedModelsContainNoKey(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	second, id := p.addUpstream(`"priority":1`)
	p.provider.setScript(replyScript(200, `{"object":"list","data":[{"id":"a"}]}`))
	second.setScript(replyScript(200,
		`{"object":"list","data":[{"id":"b","owned_by":"`+second.key+`"},{"id":"`+second.key+`"}]}`))
	p.addClaude(`"priority":0`, claudeListScript(9, "claude-5"))
	claude, claudeID := p.addClaude(`"priority":1`, nil)
	claude.setScript(replyScript(200, `{"data":[{"id":"glm-5","display_name":"x`+claude.key+`x"}],"has_more":false}`))
	for _, c := range []struct{ header, owner, id, model string }{
		{header: "Openai-Beta", owner: second.key, id: id, model: "b"},
		{header: "Anthropic-Version", owner: claude.key, id: claudeID, model: "glm-5"},
	} {
		res := p.do("GET", "/v1/models", "", "X-Api-Key", p.token, c.header, "1")
		if res.status != 200 || !strings.Contains(res.body, `"`+c.model+`"`) ||
			!strings.Contains(res.body, strings.Repeat("*", len(c.owner))) || strings.Contains(res.body, c.owner) {
			t.Errorf("got %d %s", res.status, res.body)
		}
		line := `list of models contained its key; the key was masked","request_id":"` +
			res.header.Get("X-LLM-Proxy-Request-Id") + `","upstream":"` + c.id
		if !strings.Contains(string(p.log.bytes()), line) {
			t.Error("the log does not say whose answer held a key")
		}
	}
}

// TestModelsGoToTheSDKsFamily: in a project with both API families, each SDK gets the list of its own family.
func TestModelsGoToTheSDKsFamily(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.addUpstreamAt(&fakeProvider{url: p.provider.url + "/claude/v1", key: p.provider.key}, providerAnthropic,
		`"weight":1`)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(200, `{"data":[]}`) })
	for _, c := range []struct{ name, value, want string }{
		{"Anthropic-Version", "2023-06-01", "/claude/v1/models"}, {"X-Stainless-Lang", "js", "/v1/models"},
	} {
		p.do("GET", "/v1/models", "", "Authorization", "Bearer "+p.token, c.name, c.value)
		if got := p.provider.lastRequest(t).target; got != c.want {
			t.Errorf("with %s the list came from %s, want %s", c.name, got, c.want)
		}
	}
}

// TestCodexModels: the list that Codex asks for is one provider's own, in any project; a policy cuts it down.
func TestCodexModels(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	other, _ := p.addUpstream(`"priority":1`)
	const list = `{"models":[{"slug":"gpt-5.4","x":1},{"slug":"o9"}]}`
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if r.header.Get("If-None-Match") == `"m1"` {
			return c.reply(304, "", `ETag: "m1"`)
		}
		return c.reply(200, list, `ETag: "m1"`)
	})
	get := func(headers ...string) testResponse {
		return p.do("GET", "/v1/models?client_version=0.171.0", "",
			append(headers, "Authorization", "Bearer "+p.token)...)
	}
	if a := get(); a.status != 200 || a.body != list || a.header.Get("ETag") != `"m1"` {
		t.Errorf("got %d %v %s", a.status, a.header, a.body)
	}
	if a := get("If-None-Match", `"m1"`); a.status != 304 || a.header.Get("ETag") != `"m1"` {
		t.Errorf("with the list's ETag: got %d %v %s", a.status, a.header, a.body)
	}
	p.changeProject(`"policy":{"models":["gpt*"]}`)
	if a := get("If-None-Match", `"m1"`); a.body != `{"models":[{"slug":"gpt-5.4","x":1}]}` ||
		a.header["Etag"] != nil {
		t.Errorf("with a policy: got %d %v %s", a.status, a.header, a.body)
	}
	if n := len(other.received()); n != 0 {
		t.Errorf("the other provider got %d requests", n)
	}
}

// TestObjectsOfBothFamilies: files and skills are at OpenAI or at Anthropic: the client's SDK says where.
func TestObjectsOfBothFamilies(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.addUpstreamAt(&fakeProvider{url: p.provider.url + "/claude/v1", key: p.provider.key}, providerAnthropic,
		`"weight":1`)
	p.provider.setScript(replyScript(200, `{"id":"x"}`))
	paths := []string{"/v1/files", "/v1/files/f", "/v1/files/f/content", "/v1/skills", "/v1/skills/s",
		"/v1/skills/s/versions", "/v1/skills/s/versions/1"}
	for _, path := range paths {
		auth := []string{"Authorization", "Bearer " + p.token}
		if a := p.do("GET", path, "", auth...); a.status != 403 {
			t.Errorf("%s in a project without stored objects: got %d", path, a.status)
		}
	}
	p.changeProject(`"policy":{"stateful":true}`)
	for _, path := range paths {
		for header, want := range map[string]string{"Anthropic-Version": "/claude" + path, "X-Stainless-Lang": path} {
			p.do("GET", path, "", "Authorization", "Bearer "+p.token, header, "1")
			if got := p.provider.lastRequest(t).target; got != want {
				t.Errorf("%s with %s went to %s", path, header, got)
			}
		}
	}
}

// TestMessageBatches: Anthropic's batches go to Anthropic, where a project allows stored objects. Where models are
// restricted no batch is created: its models are not checked.
func TestMessageBatches(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.addUpstreamAt(&fakeProvider{url: p.provider.url + "/claude/v1", key: p.provider.key}, providerAnthropic,
		`"weight":1`)
	p.provider.setScript(replyScript(200, `{"id":"msgbatch_1"}`))
	const body = `{"requests":[{"custom_id":"a","params":{"model":"claude-sonnet-5","max_tokens":9,"messages":[]}}]}`
	send := func(method, path, body string) testResponse {
		return p.do(method, path, body, "X-Api-Key", p.token, "Content-Type", "application/json",
			"Anthropic-Version", "2023-06-01")
	}
	if a := send("POST", "/v1/messages/batches", body); a.status != 403 {
		t.Errorf("in a project without stored objects: got %d %s", a.status, a.body)
	}
	p.changeProject(`"policy":{"stateful":true}`)
	for _, c := range []struct{ method, path, body string }{
		{"POST", "/v1/messages/batches", body},
		{"GET", "/v1/messages/batches?limit=20&after_id=msgbatch_0", ""},
		{"GET", "/v1/messages/batches/msgbatch_1", ""},
		{"POST", "/v1/messages/batches/msgbatch_1/cancel", ""},
		{"GET", "/v1/messages/batches/msgbatch_1/results", ""},
		{"DELETE", "/v1/messages/batches/msgbatch_1", ""},
	} {
		a := send(c.method, c.path, c.body)
		r := p.provider.lastRequest(t)
		if a.status != 200 || r.method != c.method || r.target != "/claude"+c.path || r.body != c.body ||
			r.header.Get("X-Api-Key") != p.provider.key {
			t.Errorf("%s %s: got %d %s; the provider got %s %s %s", c.method, c.path, a.status, a.body, r.method,
				r.target, r.body)
		}
	}
	p.changeProject(`"policy":{"stateful":true,"models":["claude*"]}`)
	if a := send("POST", "/v1/messages/batches", body); a.status != 403 {
		t.Errorf("with restricted models: got %d %s", a.status, a.body)
	}
}

// TestProbes: agents ask for the base URL before their first call, without a token.
func TestProbes(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, method := range []string{"HEAD", "GET"} {
		if a := p.do(method, "/", ""); a.status != 200 {
			t.Errorf("%s /: got %d %s", method, a.status, a.body)
		}
		for _, path := range []string{"/v1", "/v1/", "/api/hello"} {
			if a := p.do(method, path, ""); a.status != 404 && a.status != 401 {
				t.Errorf("%s %s: got %d %s", method, path, a.status, a.body)
			}
		}
	}
}

// geminiListScript answers like Gemini's API: the list of models in pages of limited size, and single models.
func geminiListScript(most int, ids ...string) func(*providerConn, recordedRequest) bool {
	entry := func(id string) string {
		return fmt.Sprintf(`{"name":"models/%s","displayName":%q,"supportedGenerationMethods":["generateContent"]}`,
			id, strings.ToUpper(id))
	}
	return func(c *providerConn, r recordedRequest) bool {
		u, err := url.Parse(r.target)
		if id, one := strings.CutPrefix(u.Path, "/v1beta/models/"); one && slices.Contains(ids, id) {
			return c.reply(200, entry(id))
		}
		size, errSize := strconv.Atoi(u.Query().Get("pageSize"))
		if err != nil || u.Path != "/v1beta/models" || errSize != nil || len(r.header.Get("X-Goog-Api-Key")) < 9 ||
			len(u.Query()) > 2 {
			return c.reply(404, `{"error":{"code":404,"message":"models/x is not found","status":"NOT_FOUND"}}`)
		}
		from := slices.Index(ids, u.Query().Get("pageToken")) + 1
		page := ids[from:min(len(ids), from+size, from+most)]
		var entries []string
		for _, id := range page {
			entries = append(entries, entry(id))
		}
		next := ""
		if from+len(page) < len(ids) {
			next = `,"nextPageToken":` + strconv.Quote(page[len(page)-1])
		}
		if len(ids) == 0 {
			return c.reply(200, "{}\n")
		}
		return c.reply(200, `{"models":[`+strings.Join(entries, ",")+`]`+next+`}`)
	}
}

// listGemini returns the ids in a list of Gemini's API, and what names the next page.
func (p *testProxy) listGemini(token, query string) (ids, next string) {
	p.t.Helper()
	res := p.do("GET", "/v1beta/models"+query, "", "X-Goog-Api-Key", token)
	var page struct {
		Models        []struct{ Name string }
		NextPageToken string
	}
	if err := json.Unmarshal([]byte(res.body), &page); err != nil || res.status != 200 || page.Models == nil {
		p.t.Fatalf("%s: got %d %s", query, res.status, res.body)
	}
	for _, m := range page.Models {
		ids += " " + m.Name
	}
	return strings.ReplaceAll(ids, " models/", " "), page.NextPageToken
}

// TestGeminiModels: Gemini's list of models and its single models. One provider's list passes as it is; it is merged
// with others, cut down by policies, extended by aliases, and cut into the pages that the client asks for.
func TestGeminiModels(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	first := newFakeProvider(t)
	first.setScript(geminiListScript(2, "gemini-a", "gemini-b", "gemini-c", "embed-a"))
	firstID := p.addUpstreamAt(first, "google", `"weight":1`)
	page := func(token, query, want, wantNext string) {
		t.Helper()
		if ids, next := p.listGemini(token, query); ids != want || next != wantNext {
			t.Errorf("%s: got%s, next %q; want%s, %q", query, ids, next, want, wantNext)
		}
	}
	page(p.token, "?pageSize=9", " gemini-a gemini-b", "gemini-b") // the provider's own page
	if got := first.lastRequest(t).target; got != "/v1beta/models?pageSize=9" {
		t.Errorf("the provider got %s", got)
	}
	page(p.token, "?pageToken=gemini-b&pageSize=9&key="+p.token, " gemini-c embed-a", "")
	if row := p.lastCall(); row.Endpoint != "GET /v1beta/models" || row.Outcome != "ok" || row.Attempts != 1 {
		t.Errorf("the ledger has %+v", row)
	}

	_, limited := p.newToken(`"name":"limited","policy":{"models":["gemini-*","fast"]}`)
	page(limited, "", " gemini-a gemini-b gemini-c", "")
	page(limited, "?pageSize=2", " gemini-a gemini-b", "gemini-b")
	page(limited, "?pageSize=2&pageToken=gemini-b&alt=json", " gemini-c", "")
	page(limited, "?pageSize=0", " gemini-a gemini-b gemini-c", "")
	page(limited, "?pageSize=5000", " gemini-a gemini-b gemini-c", "")

	second := newFakeProvider(t)
	second.setScript(geminiListScript(9, "gemini-c", "gemini-d"))
	p.addUpstreamAt(second, "google", `"priority":1,"rewrite":{"team":"gemini-d"}`)
	p.changeProject(`"routing":{"aliases":{"fast":"gemini-b","smart":["gone","embed-z"]}}`)
	page(p.token, "", " gemini-a gemini-b gemini-c embed-a gemini-d team fast smart", "")
	page(limited, "", " gemini-a gemini-b gemini-c gemini-d fast", "")
	second.setScript(geminiListScript(9)) // an empty list is {}
	page(p.token, "", " gemini-a gemini-b gemini-c embed-a fast smart", "")
	second.setScript(replyScript(200, `{"models":{}}`))
	page(p.token, "", " gemini-a gemini-b gemini-c embed-a fast smart", "")

	second.setScript(geminiListScript(9, "gemini-c"))
	if res := p.do("GET", "/v1beta/models/fast", "", "X-Goog-Api-Key", p.token); res.status != 200 ||
		!strings.Contains(res.body, `"models/gemini-b"`) {
		t.Errorf("one model by its alias: got %d %s", res.status, res.body)
	}
	if row := p.lastCall(); row.Endpoint != "GET /v1beta/models/{model}" || row.Outcome != "ok" {
		t.Errorf("the ledger has %+v", row)
	}
	for _, c := range []struct{ name, path, token, status string }{
		{"a size that is none", "/v1beta/models?pageSize=x", limited, "400 INVALID_ARGUMENT"},
		{"a negative size", "/v1beta/models?pageSize=-1", limited, "400 INVALID_ARGUMENT"},
		{"an unknown page", "/v1beta/models?pageToken=zz", limited, "400 INVALID_ARGUMENT"},
		{"a repeated parameter", "/v1beta/models?pageSize=1&pageSize=2", limited, "400 INVALID_ARGUMENT"},
		{"another API's parameter", "/v1beta/models?limit=1", limited, "400 INVALID_ARGUMENT"},
		{"an unknown parameter", "/v1beta/models?filter=x", limited, "400 INVALID_ARGUMENT"},
		{"a model that the token may not use", "/v1beta/models/embed-a", limited, "403 PERMISSION_DENIED"},
		{"an unknown model", "/v1beta/models/gemini-x", p.token, "404 NOT_FOUND"},
		{"no model", "/v1beta/models/", p.token, "404 NOT_FOUND"},
		{"a part of a model", "/v1beta/models/gemini-a/x", p.token, "404 NOT_FOUND"},
	} {
		res := p.do("GET", c.path, "", "X-Goog-Api-Key", c.token)
		var e struct{ Error struct{ Status string } }
		_ = json.Unmarshal([]byte(res.body), &e)
		if got := strconv.Itoa(res.status) + " " + e.Error.Status; got != c.status {
			t.Errorf("%s: got %s", c.name, res.body)
		}
	}
	for path, want := range map[string]string{"/v1/models?pageSize=1": `{"models":[{"name":"models/gemini-a"`,
		"/v1/models/gemini-a": `{"name":"models/gemini-a"`, "/v1/models?limit=1": `{"error":{"code":400`,
		"/v1/models/": `{"error":{"code":404`, "/v1/modelsx": `{"error":{"message":`} { // as Google's SDK for Python
		if res := p.do("GET", path, "", "X-Goog-Api-Key", p.token); !strings.HasPrefix(res.body, want) {
			t.Errorf("%s: got %d %s", path, res.status, res.body)
		}
	}
	if res := p.do("DELETE", "/v1beta/models/gemini-a", "", "X-Goog-Api-Key", p.token); res.status != 405 ||
		res.header.Get("Allow") != "GET, HEAD" {
		t.Errorf("DELETE: got %d %v", res.status, res.header)
	}
	first.setScript(resetScript)
	second.setScript(geminiListScript(9, "gemini-d"))
	p.changeUpstream(firstID, `"note":"ready again"`)
	page(limited, "", " gemini-d fast", "")
}

// TestGeminiModelsElsewhere: a project that has only Google's API lists its models at /v1/models too, in the form that
// the client reads. With another API, that one's list is the answer.
func TestGeminiModelsElsewhere(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	google := newFakeProvider(t)
	google.setScript(geminiListScript(1, "gemini-a", "embed-a", "gemini-b"))
	p.addUpstreamAt(google, "google", `"weight":1`)
	p.provider.setScript(replyScript(200, `{"object":"list","data":[{"id":"gpt-a"}]}`))
	list := func(headers ...string) string {
		return p.do("GET", "/v1/models", "", p.jsonHeaders(headers...)...).body
	}
	if got := list(); !strings.Contains(got, "gpt-a") || strings.Contains(got, "gemini") {
		t.Errorf("with both APIs: %s", got)
	}
	p.changeUpstream(p.upstream, `"weight":0`)
	p.changeProject(`"policy":{"models":["gemini-*"]},"routing":{"aliases":{"fast":"gemini-b"}}`)
	entry := func(id string) string { return `{"created":0,"id":"` + id + `","object":"model","owned_by":"google"}` }
	want := `{"data":[` + entry("gemini-a") + `,` + entry("gemini-b") + `,` + entry("fast") + `],"object":"list"}`
	if got := list(); got != want {
		t.Errorf("in OpenAI's form: got %s", got)
	}
	claude, got := p.claudeModels(p.token, "?limit=2")
	if claude != "gemini-a gemini-b" || got.Data[0].DisplayName != "GEMINI-A" || !*got.HasMore ||
		*got.LastID != "gemini-b" {
		t.Errorf("in Anthropic's form: got %+v", got)
	}
	if claude, _ = p.claudeModels(p.token, "?after_id=gemini-b"); claude != "fast" {
		t.Errorf("the next page: got %s", claude)
	}
	for _, c := range []struct{ path, headers, want string }{
		{"/v1/models/gemini-a", "", entry("gemini-a")},
		{"/v1/models/fast", "", entry("fast")},
		{"/v1/models/gemini-a", "Anthropic-Version", `{"created_at":"1970-01-01T00:00:00Z","display_name":"GEMINI-A",` +
			`"id":"gemini-a","type":"model"}`},
		{"/v1/models/gemini-z", "", `{"error":{"code":404`},
		{"/v1/models/embed-a", "", `{"error":{"message":"`}, // the policy does not allow it
	} {
		var headers []string
		if c.headers != "" {
			headers = append(headers, c.headers, "2023-06-01")
		}
		if res := p.do("GET", c.path, "", p.jsonHeaders(headers...)...); !strings.HasPrefix(res.body, c.want) {
			t.Errorf("%s: got %d %s, want %s", c.path, res.status, res.body, c.want)
		}
	}
	if res := p.do("GET", "/v1/models?client_version=1", "", p.jsonHeaders()...); res.errorCode() != "no_upstream" {
		t.Errorf("Codex's list: got %d %s", res.status, res.body)
	}
}
