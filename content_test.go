// Tests of content that projects ask to keep: that nobody else's is, what is
// kept and for how long, who sees it, and that on disk it is sealed.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// enableContent turns content on for the test's project.
func (p *testProxy) enableContent() {
	p.t.Helper()
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"keep_content_days":7}}`, 200, nil)
}

func (p *testProxy) getContent(id string) (v struct {
	Until           time.Time `json:"kept_until"`
	Request, Answer struct {
		Bytes, Kept  int64
		Text, Base64 *string
	}
}) {
	p.t.Helper()
	b := p.manageAs(p.adminKey, "GET", "/manage/requests/"+id+"/content", "")
	if b.status != 200 {
		p.t.Fatalf("got %d: %s", b.status, b.body)
	}
	if err := json.Unmarshal([]byte(strings.ReplaceAll(b.body, "kept_bytes", "kept")), &v); err != nil {
		p.t.Fatal(err)
	}
	return v
}

// countContents counts what is stored.
func (p *testProxy) countContents() (n int) {
	p.t.Helper()
	if err := p.instance.store.readDB.QueryRow(`SELECT count(*) FROM contents`).Scan(&n); err != nil {
		p.t.Fatal(err)
	}
	return n
}

// TestContentOff: unless a project asks for it nothing is kept, whatever a token
// says; when it no longer asks, nothing more is.
func TestContentOff(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.chat()
	expectParamError(t, "of a token", p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+p.tokenID, `{"policy":{"keep_content_days":7}}`), 400, "policy.keep_content_days")
	expectParamError(t, "a year and a day", p.manageAs(p.adminKey, "PATCH", "/manage/projects/"+p.project, `{"policy":{"keep_content_days":366}}`), 400, "policy.keep_content_days")
	expectParamError(t, "negative", p.manageAs(p.adminKey, "PATCH", "/manage/projects/"+p.project, `{"policy":{"keep_content_days":-1}}`), 400, "policy.keep_content_days")
	if row := p.lastCall(); p.countContents() != 0 || p.manageAs(p.adminKey, "GET", "/manage/requests/"+row.ID+"/content", "").status != 404 {
		t.Error("something is kept")
	}
	p.enableContent()
	p.chat()
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{}}`, 200, nil)
	p.chat()
	p.chatAs("sk-llmp_wrong")
	if p.waitSettled(); p.countContents() != 1 {
		t.Errorf("%d calls are kept, want 1", p.countContents())
	}
}

// TestContentStored: what went to the provider and what came to the client, both
// within the limit; streams and cut answers too. On disk all of it is sealed,
// which the harness looks for at the end.
func TestContentStored(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_CONTENT_BYTES": "2KiB"})
	p.enableContent()
	const canary = "kept-canary-5Tq8vNw2"
	p.secrets = append(p.secrets, canary)
	for name, c := range map[string]struct {
		members []string
		script  func(c *providerConn, r recordedRequest) bool
		answer  string // how it begins
		bytes   int64
	}{
		"unary":  {nil, nil, chatResponseBody, int64(len(chatResponseBody))},
		"stream": {[]string{`"stream":true`}, nil, `data: {"id":"chatcmpl-1"`, 0},
		"error": {nil, func(c *providerConn, _ recordedRequest) bool { return c.reply(400, `{"error":{"message":"no"}}`) },
			`{"error":{"message":"no"`, 0},
		"long": {nil, func(c *providerConn, _ recordedRequest) bool { return c.reply(200, strings.Repeat("ä", 5000)) }, strings.Repeat("ä", 1024), 10000},
		"odd":  {nil, func(c *providerConn, _ recordedRequest) bool { return c.reply(200, "x"+strings.Repeat("ä", 5000)) }, "x" + strings.Repeat("ä", 1023), 10001},
		"binary": {nil, func(c *providerConn, _ recordedRequest) bool {
			return c.reply(200, strings.Repeat("\xff\xfe", 5), "Content-Type: audio/mpeg")
		}, "", 10},
		"cut": {[]string{`"stream":true`}, func(c *providerConn, _ recordedRequest) bool {
			c.beginSSE()
			_ = c.chunk(chatEvents(false)[0])
			return c.reset()
		}, `data: {"id":"chatcmpl-1"`, 0},
		"nothing": {nil, func(c *providerConn, _ recordedRequest) bool { return c.reset() }, "", 0},
	} {
		if c.script == nil {
			c.script = chatScript
		}
		p.provider.setScript(c.script)
		body := append(c.members, `"user":"`+canary+`"`)
		p.chat(body...)
		v := p.getContentUntraced(p.lastCall().ID)
		sent := chatBody(body...)
		if v.Request.Text == nil || !strings.Contains(*v.Request.Text, canary) || v.Request.Bytes < int64(len(sent)) {
			t.Errorf("%s: the request: %+v", name, v.Request)
		}
		got := ""
		if v.Answer.Text != nil {
			got = *v.Answer.Text
		}
		if !strings.HasPrefix(got, c.answer) || c.bytes > 0 && v.Answer.Bytes != c.bytes || v.Answer.Kept > 2048 || len(got) > 2048 || !utf8.ValidString(got) {
			t.Errorf("%s: the answer: %d of %d bytes, %q", name, v.Answer.Kept, v.Answer.Bytes, got)
		}
		if (v.Answer.Base64 != nil) != (name == "binary") {
			t.Errorf("%s: base64 is %v", name, v.Answer.Base64)
		}
		if days := time.Until(v.Until).Hours() / 24; days < 6.9 || days > 7 {
			t.Errorf("%s: kept for %v days", name, days)
		}
	}
}

// getContentUntraced is content without a trace in what clients saw: it shows what is
// looked for there.
func (p *testProxy) getContentUntraced(id string) (v struct {
	Until           time.Time `json:"kept_until"`
	Request, Answer struct {
		Bytes, Kept  int64
		Text, Base64 *string
	}
}) {
	p.t.Helper()
	q := &testProxy{t: p.t, url: p.url, adminKey: p.adminKey}
	return q.getContent(id)
}

// TestContentRights: only administrators see it, each time is on the audit
// trail first, and erasing leaves nothing.
func TestContentRights(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableContent()
	p.chat()
	id := p.lastCall().ID
	for role, status := range map[string]int{"viewer": 403, "operator": 403} {
		var key struct{ Key string }
		p.manage("POST", "/manage/keys", fmt.Sprintf(`{"name":%q,"role":%q}`, role, role), 201, &key)
		p.secrets = append(p.secrets, key.Key)
		if res := p.manageAs(key.Key, "GET", "/manage/requests/"+id+"/content", ""); res.status != status {
			t.Errorf("%s: got %d", role, res.status)
		}
	}
	seen := func() (n int) {
		var l struct {
			Data []struct{ Action, Object string }
		}
		p.manage("GET", "/manage/audit?limit=100", "", 200, &l)
		for _, e := range l.Data {
			if e.Action == actionReveal && e.Object == id {
				n++
			}
		}
		return n
	}
	if seen() != 0 {
		t.Error("seen already")
	}
	p.getContentUntraced(id)
	p.getContentUntraced(id)
	if n := seen(); n != 2 {
		t.Errorf("the trail has %d views, want 2", n)
	}
	if _, err := p.instance.store.writeDB.Exec(`CREATE TRIGGER broken BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no'); END`); err != nil {
		t.Fatal(err)
	}
	p.allowErrors = true
	if res := p.manageAs(p.adminKey, "GET", "/manage/requests/"+id+"/content", ""); res.status < 500 {
		t.Errorf("shown without an entry on the trail: %d", res.status)
	}
	if res := p.manageAs(p.adminKey, "DELETE", "/manage/projects/"+p.project+"/content", ""); res.status < 500 || p.countContents() != 1 {
		t.Errorf("erased without an entry on the trail: %d", res.status)
	}
	if _, err := p.instance.store.writeDB.Exec(`DROP TRIGGER broken`); err != nil {
		t.Fatal(err)
	}
	var erased struct{ Erased int }
	p.manage("DELETE", "/manage/projects/"+p.project+"/content", "", 200, &erased)
	if res := p.manageAs(p.adminKey, "GET", "/manage/requests/"+id+"/content", ""); erased.Erased != 1 || p.countContents() != 0 || res.status != 404 {
		t.Errorf("after erasing %d: %d are left, got %d", erased.Erased, p.countContents(), res.status)
	}
}

// TestContentMoved: what is kept of one call does not open as another's, and a
// changed byte opens as nothing.
func TestContentMoved(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	p.enableContent()
	p.chat()
	p.chat()
	rows := p.ledger()
	if _, err := p.instance.store.writeDB.Exec(`UPDATE contents SET answer = (SELECT request FROM contents ORDER BY id LIMIT 1)
		WHERE id = (SELECT min(id) FROM contents)`); err != nil {
		t.Fatal(err)
	}
	if _, err := p.instance.store.writeDB.Exec(`UPDATE contents SET request = (SELECT request FROM contents ORDER BY id LIMIT 1)
		WHERE id = (SELECT max(id) FROM contents)`); err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		if res := p.manageAs(p.adminKey, "GET", "/manage/requests/"+r.ID+"/content", ""); res.status != 500 {
			t.Errorf("got %d %s", res.status, res.body)
		}
	}
}

// TestContentExpires: it goes at its time, and first of all where room is needed;
// it never stays longer than the call's row.
func TestContentExpires(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"RETENTION": "2h"})
	p.enableContent()
	p.chat()
	row := p.lastCall()
	if left := time.Until(p.getContentUntraced(row.ID).Until); left > 2*time.Hour || left < time.Hour {
		t.Errorf("kept for %v", left)
	}
	late := time.Now().Add(3 * time.Hour).UnixMilli()
	if _, err := p.instance.store.contentByID(t.Context(), parseRequestID(row.ID), late); err != errNotFound {
		t.Errorf("shown after its time: %v", err)
	}
	if n, err := p.instance.store.deleteExpiredContents(t.Context(), time.Now().UnixMilli(), 10); n != 0 || err != nil {
		t.Errorf("gone before its time: %d %v", n, err)
	}
	if n, err := p.instance.store.deleteExpiredContents(t.Context(), late, 10); n != 1 || err != nil || p.countContents() != 0 {
		t.Errorf("not gone: %d %v", n, err)
	}
	p.chat()
	p.waitSettled()
	if p.instance.ledger.pruneToSize(context.Background(), 1, 0); p.countContents() != 0 || len(p.ledger()) != 2 {
		t.Error("where room is needed, content does not go first")
	}
}

// TestContentMemory: calls come before what is kept of them.
func TestContentMemory(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableContent()
	m := &bodyMemory{limit: 10}
	k := &storedContent{memory: m, maxBytes: 100}
	k.add(&k.request, []byte("12345678"))
	k.addResponse([]byte("1234"))
	k.addResponse([]byte("1"))
	if string(k.request.bytes) != "12345678" || k.response.bytes != nil || k.response.size != 5 || m.used.Load() != 8 {
		t.Errorf("%+v, %d bytes taken", k, m.used.Load())
	}
	if k.release(); m.used.Load() != 0 {
		t.Error("memory is not given back")
	}
	p.chat()
	p.waitSettled()
}

// TestContentPage (AD6): an administrator sees it on a page, escaped, after a
// click that is on the audit trail; others see no way to it. The project's form
// turns it on and off.
func TestContentPage(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowSecret(promptCanary)
	b := p.signIn(p.adminKey)
	edit := "/admin/projects/" + p.project + "/edit"
	form := func(days string) url.Values {
		return url.Values{"name": {"test"}, "policy.keep_content_days": {days}, "version": {b.formVersion(edit)}}
	}
	if res := b.post(edit, form("400")); res.status != 400 || !strings.Contains(res.body, `value="400"`) || !strings.Contains(res.body, "to 365.") {
		t.Errorf("400 days: got %d", res.status)
	}
	if res := b.post(edit, form("30")); res.status != 303 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	if res := b.get(edit); !strings.Contains(res.body, `name="policy.keep_content_days" value="30"`) {
		t.Error("the form does not show the days")
	}
	p.chat(`"user":"<script>alert(1)</script>"`)
	id := p.lastCall().ID
	button := `action="/admin/requests/` + id + `/content"`
	if res := b.get("/admin/requests/" + id); !strings.Contains(res.body, button) || strings.Contains(res.body, promptCanary) {
		t.Error("the page of the call does not lead to the content, or shows it")
	}
	res := b.post("/admin/requests/"+id+"/content", url.Values{})
	if res.status != 200 || !strings.Contains(res.body, promptCanary) || strings.Contains(res.body, "<script>alert") || !strings.Contains(res.body, "chatcmpl-1") {
		t.Errorf("got %d %s", res.status, res.body)
	}
	if problems := checkHTML(res.body); len(problems) > 0 {
		t.Errorf("%v", problems)
	}
	if entries, err := p.instance.store.auditPage(t.Context(), p.lastAuditSeq()-1, 1<<60); err != nil || len(entries) != 1 || entries[0].action != actionReveal || entries[0].object != id {
		t.Errorf("the trail ends with %v %v", entries, err)
	}
	_, operator := p.newKey("o", "operator")
	o := p.signIn(operator)
	if res := o.get("/admin/requests/" + id); res.status != 200 || strings.Contains(res.body, button) {
		t.Error("an operator is shown a way to the content")
	}
	if res := o.post("/admin/requests/"+id+"/content", url.Values{}); res.status != 403 {
		t.Errorf("an operator: got %d", res.status)
	}
	if res := b.post(edit, form("")); res.status != 303 {
		t.Fatalf("got %d", res.status)
	}
	p.chat()
	if p.waitSettled(); p.countContents() != 1 {
		t.Error("it is kept though the form turned it off")
	}
	p.manage("DELETE", "/manage/projects/"+p.project+"/content", "", 200, nil)
	if res := b.get("/admin/requests/" + id); strings.Contains(res.body, button) {
		t.Error("a way to content that is erased")
	}
}

// formVersion reads from a form which version of its thing it was made from.
func (b *browser) formVersion(path string) string {
	return between(b.get(path).body, `name="version" value="`, `"`)
}
