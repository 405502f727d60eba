// Tests of stored content: only projects that ask for it have any; what is stored and for how long, who sees it, and
// that it is sealed on disk.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"
)

// enableContent makes the test's project store content.
func (p *testProxy) enableContent() {
	p.t.Helper()
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"keep_content_days":7}}`, 200, nil)
}

// A contentAnswer is the answer of /manage/requests/{id}/content.
type contentAnswer struct {
	Until           time.Time `json:"kept_until"`
	Request, Answer struct {
		Bytes, Kept  int64
		Text, Base64 *string
	}
}

// getContent reads the stored content of a call. It leaves no trace in what clients saw, where the harness looks for
// the same text.
func (p *testProxy) getContent(id string) (v contentAnswer) {
	p.t.Helper()
	untraced := &testProxy{t: p.t, url: p.url, adminKey: p.adminKey}
	b := untraced.manageAs(p.adminKey, "GET", "/manage/requests/"+id+"/content", "")
	if b.status != 200 {
		p.t.Fatalf("got %d: %s", b.status, b.body)
	}
	if err := json.Unmarshal([]byte(strings.ReplaceAll(b.body, "kept_bytes", "kept")), &v); err != nil {
		p.t.Fatal(err)
	}
	return v
}

// countContents counts the stored contents.
func (p *testProxy) countContents() (n int) {
	p.t.Helper()
	if err := p.instance.store.readDB.QueryRow(`SELECT count(*) FROM contents`).Scan(&n); err != nil {
		p.t.Fatal(err)
	}
	return n
}

// TestContentOff: nothing is stored unless the project asks for it, whatever a token's policy says, and nothing more
// once the project no longer asks.
func TestContentOff(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.chat()
	for _, c := range []struct{ name, path, days string }{
		{"of a token", "/manage/tokens/" + p.tokenID, "7"},
		{"a year and a day", "/manage/projects/" + p.project, "366"},
		{"negative", "/manage/projects/" + p.project, "-1"},
	} {
		res := p.manageAs(p.adminKey, "PATCH", c.path, `{"policy":{"keep_content_days":`+c.days+`}}`)
		expectParamError(t, c.name, res, 400, "policy.keep_content_days")
	}
	res := p.manageAs(p.adminKey, "GET", "/manage/requests/"+p.lastCall().ID+"/content", "")
	if res.status != 404 || p.countContents() != 0 {
		t.Error("content is stored")
	}
	p.enableContent()
	p.chat()
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{}}`, 200, nil)
	p.chat()
	p.chatAs("sk-llmp_wrong")
	if p.waitSettled(); p.countContents() != 1 {
		t.Errorf("%d contents are stored, want 1", p.countContents())
	}
}

// TestContentStored: the request as sent to the provider and the answer as sent to the client are stored up to the
// limit, of streams and cut answers too. All of it is sealed on disk: the harness checks that at the end.
func TestContentStored(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_CONTENT_BYTES": "2KiB"})
	p.enableContent()
	const canary = "kept-canary-5Tq8vNw2"
	p.secrets = append(p.secrets, canary)
	for name, c := range map[string]struct {
		members []string
		script  func(c *providerConn, r recordedRequest) bool
		answer  string // its start
		bytes   int64
	}{
		"unary":  {answer: chatResponseBody, bytes: int64(len(chatResponseBody))},
		"stream": {members: []string{`"stream":true`}, answer: `data: {"id":"chatcmpl-1"`},
		"error": {script: func(c *providerConn, _ recordedRequest) bool {
			return c.reply(400, `{"error":{"message":"no"}}`)
		}, answer: `{"error":{"message":"no"`},
		"long": {script: func(c *providerConn, _ recordedRequest) bool {
			return c.reply(200, strings.Repeat("ä", 5000))
		}, answer: strings.Repeat("ä", 1024), bytes: 10000},
		"odd": {script: func(c *providerConn, _ recordedRequest) bool {
			return c.reply(200, "x"+strings.Repeat("ä", 5000))
		}, answer: "x" + strings.Repeat("ä", 1023), bytes: 10001},
		"binary": {script: func(c *providerConn, _ recordedRequest) bool {
			return c.reply(200, strings.Repeat("\xff\xfe", 5), "Content-Type: audio/mpeg")
		}, bytes: 10},
		"cut": {members: []string{`"stream":true`}, script: func(c *providerConn, _ recordedRequest) bool {
			c.beginSSE()
			_ = c.chunk(chatEvents(false)[0])
			return c.reset()
		}, answer: `data: {"id":"chatcmpl-1"`},
		"nothing": {script: func(c *providerConn, _ recordedRequest) bool { return c.reset() }},
	} {
		if c.script == nil {
			c.script = chatScript
		}
		p.provider.setScript(c.script)
		body := append(c.members, `"metadata":{"note":"`+canary+`"}`) // "user" is on record
		p.chat(body...)
		v := p.getContent(p.lastCall().ID)
		sent := chatBody(body...)
		if v.Request.Text == nil || !strings.Contains(*v.Request.Text, canary) || v.Request.Bytes < int64(len(sent)) {
			t.Errorf("%s: the request: %+v", name, v.Request)
		}
		got := ""
		if v.Answer.Text != nil {
			got = *v.Answer.Text
		}
		if !strings.HasPrefix(got, c.answer) || c.bytes > 0 && v.Answer.Bytes != c.bytes ||
			v.Answer.Kept > 2048 || len(got) > 2048 || !utf8.ValidString(got) {
			t.Errorf("%s: the answer: %d of %d bytes, %q", name, v.Answer.Kept, v.Answer.Bytes, got)
		}
		if (v.Answer.Base64 != nil) != (name == "binary") {
			t.Errorf("%s: base64 is %v", name, v.Answer.Base64)
		}
		if days := time.Until(v.Until).Hours() / 24; days < 6.9 || days > 7 {
			t.Errorf("%s: stored for %v days", name, days)
		}
	}
}

// TestContentRights: only administrators see content, each view is on the audit trail first, and erasing leaves
// nothing.
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
	views := func() (n int) {
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
	if views() != 0 {
		t.Error("there is a view on the trail before the first one")
	}
	p.getContent(id)
	p.getContent(id)
	if n := views(); n != 2 {
		t.Errorf("the trail has %d views, want 2", n)
	}
	p.execSQL(`CREATE TRIGGER broken BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no'); END`)
	p.allowErrors = true
	if res := p.manageAs(p.adminKey, "GET", "/manage/requests/"+id+"/content", ""); res.status < 500 {
		t.Errorf("shown without an entry on the trail: %d", res.status)
	}
	res := p.manageAs(p.adminKey, "DELETE", "/manage/projects/"+p.project+"/content", "")
	if res.status < 500 || p.countContents() != 1 {
		t.Errorf("erased without an entry on the trail: %d", res.status)
	}
	if _, err := p.instance.store.writeDB.Exec(`DROP TRIGGER broken`); err != nil {
		t.Fatal(err)
	}
	var erased struct{ Erased int }
	p.manage("DELETE", "/manage/projects/"+p.project+"/content", "", 200, &erased)
	res = p.manageAs(p.adminKey, "GET", "/manage/requests/"+id+"/content", "")
	if erased.Erased != 1 || p.countContents() != 0 || res.status != 404 {
		t.Errorf("after erasing %d: %d are left, got %d", erased.Erased, p.countContents(), res.status)
	}
}

// TestContentMoved: content that is moved to another call, or to the other body of the same call, cannot be opened.
func TestContentMoved(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	p.enableContent()
	p.chat()
	p.chat()
	rows := p.ledger()
	for _, move := range []string{
		`UPDATE contents SET answer = (SELECT request FROM contents ORDER BY id LIMIT 1)
		WHERE id = (SELECT min(id) FROM contents)`,
		`UPDATE contents SET request = (SELECT request FROM contents ORDER BY id LIMIT 1)
		WHERE id = (SELECT max(id) FROM contents)`,
	} {
		if _, err := p.instance.store.writeDB.Exec(move); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range rows {
		if res := p.manageAs(p.adminKey, "GET", "/manage/requests/"+r.ID+"/content", ""); res.status != 500 {
			t.Errorf("got %d %s", res.status, res.body)
		}
	}
}

// TestContentExpires: content is deleted when it expires, and first of all data where space is needed. It never
// outlives the call's row.
func TestContentExpires(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"RETENTION": "2h"})
	p.enableContent()
	p.chat()
	row := p.lastCall()
	if left := time.Until(p.getContent(row.ID).Until); left > 2*time.Hour || left < time.Hour {
		t.Errorf("stored for %v", left)
	}
	late := time.Now().Add(3 * time.Hour).UnixMilli()
	if _, err := p.instance.store.contentByID(t.Context(), parseRequestID(row.ID), late); err != errNotFound {
		t.Errorf("shown after it expired: %v", err)
	}
	if n, err := p.instance.store.deleteExpiredContents(t.Context(), time.Now().UnixMilli(), 10); n != 0 || err != nil {
		t.Errorf("deleted before it expired: %d %v", n, err)
	}
	n, err := p.instance.store.deleteExpiredContents(t.Context(), late, 10)
	if n != 1 || err != nil || p.countContents() != 0 {
		t.Errorf("not deleted: %d %v", n, err)
	}
	p.chat()
	p.waitSettled()
	if p.instance.ledger.pruneToSize(context.Background(), 1, 0); p.countContents() != 0 || len(p.ledger()) != 2 {
		t.Error("content is not the first data to be deleted where space is needed")
	}
}

// TestContentMemory: request bodies have precedence over stored content.
func TestContentMemory(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableContent()
	m := &bodyMemory{limit: 10}
	share := &bodyShare{memory: m, token: new(atomic.Int64), max: 10}
	sc := &storedContent{memory: share, maxBytes: 100}
	sc.add(&sc.request, []byte("12345678"))
	sc.addResponse([]byte("1234"))
	sc.addResponse([]byte("1"))
	if string(sc.request.bytes) != "12345678" || sc.response.bytes != nil || sc.response.size != 5 || m.used.Load() != 8 {
		t.Errorf("%+v, %d bytes reserved", sc, m.used.Load())
	}
	if share.releaseAll(); m.used.Load() != 0 || share.token.Load() != 0 {
		t.Error("the memory is not released")
	}
	p.chat()
	p.waitSettled()
}

// TestContentPage (AD6): an administrator sees content on a page, escaped, after a click that is on the audit trail;
// other roles see no link to it. The project's form turns storing on and off.
func TestContentPage(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowSecret(promptCanary)
	b := p.signIn(p.adminKey)
	edit := "/admin/projects/" + p.project + "/edit"
	form := func(days string) url.Values {
		return url.Values{"name": {"test"}, "policy.keep_content_days": {days}, "version": {b.formVersion(edit)}}
	}
	res := b.post(edit, form("400"))
	if res.status != 400 || !strings.Contains(res.body, `value="400"`) || !strings.Contains(res.body, "to 365.") {
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
	res = b.get("/admin/requests/" + id)
	if !strings.Contains(res.body, button) || strings.Contains(res.body, promptCanary) {
		t.Error("the call's page has no button for the content, or shows the content itself")
	}
	res = b.post("/admin/requests/"+id+"/content", url.Values{})
	if res.status != 200 || !strings.Contains(res.body, promptCanary) ||
		strings.Contains(res.body, "<script>alert") || !strings.Contains(res.body, "chatcmpl-1") {
		t.Errorf("got %d %s", res.status, res.body)
	}
	if problems := checkHTML(res.body); len(problems) > 0 {
		t.Errorf("%v", problems)
	}
	entries, err := p.instance.store.auditPage(t.Context(), p.lastAuditSeq()-1, 1<<60)
	if err != nil || len(entries) != 1 || entries[0].action != actionReveal || entries[0].object != id {
		t.Errorf("the trail ends with %v %v", entries, err)
	}
	_, operator := p.newKey("o", "operator")
	o := p.signIn(operator)
	if res := o.get("/admin/requests/" + id); res.status != 200 || strings.Contains(res.body, button) {
		t.Error("an operator sees the button for the content")
	}
	if res := o.post("/admin/requests/"+id+"/content", url.Values{}); res.status != 403 {
		t.Errorf("an operator: got %d", res.status)
	}
	if res := b.post(edit, form("")); res.status != 303 {
		t.Fatalf("got %d", res.status)
	}
	p.chat()
	if p.waitSettled(); p.countContents() != 1 {
		t.Error("content is stored although the form turned it off")
	}
	p.manage("DELETE", "/manage/projects/"+p.project+"/content", "", 200, nil)
	if res := b.get("/admin/requests/" + id); strings.Contains(res.body, button) {
		t.Error("there is a button for erased content")
	}
}

// formVersion reads the object version that a form was built from.
func (b *browser) formVersion(path string) string {
	return between(b.get(path).body, `name="version" value="`, `"`)
}
