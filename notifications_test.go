// This file tests notifications from outside: what webhooks receive, byte by byte, that nothing is lost or repeated,
// and what no webhook may reach.
package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
)

// A testHook is a webhook whose receiver records all bytes.
type testHook struct {
	*fakeProvider
	t              *testing.T
	path           string // in /manage
	secret, target string
}

const hookCanary = "/hooks/T0-canary-8h2Kx9"

// A shownDelivery is a delivery as /manage shows it.
type shownDelivery struct {
	ID, State, Problem string
	MessageID          string  `json:"message_id"`
	NextAttemptAt      *string `json:"next_attempt_at"`
	Attempts           int64
	Status             *int64
}

// newHook creates a webhook. members are JSON members, each preceded by a comma.
func (p *testProxy) newHook(t *testing.T, format, members string) *testHook {
	t.Helper()
	h := &testHook{fakeProvider: newFakeProvider(t), t: t, target: hookCanary + "?sig=a%2Fb"}
	h.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(200, "thanks") })
	var v struct{ ID, Secret string }
	p.manage("POST", "/manage/webhooks", fmt.Sprintf(`{"name":"w","format":%q,"url":%q%s}`, format, h.url+h.target,
		members), 201, &v)
	h.path, h.secret = "/manage/webhooks/"+v.ID, v.Secret
	p.mu.Lock()
	defer p.mu.Unlock()
	p.secrets = append(p.secrets, hookCanary, strings.TrimPrefix(v.Secret, webhookSecretPrefix))
	return h
}

// verify checks the signature of a request, by its own reading of Standard Webhooks, with each of the secrets.
func (h *testHook) verify(r recordedRequest, secrets ...string) {
	h.t.Helper()
	at := r.header.Get("Webhook-Timestamp")
	if sent := time.Unix(int64(atoi(at)), 0); time.Since(sent).Abs() > time.Minute {
		h.t.Errorf("the timestamp is %s", at)
	}
	for _, s := range secrets {
		key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(s, "whsec_"))
		if err != nil || len(key) != 32 {
			h.t.Fatalf("secret %q: %v", s, err)
		}
		mac := hmac.New(sha256.New, key)
		fmt.Fprintf(mac, "%s.%s.%s", r.header.Get("Webhook-Id"), at, r.body)
		want := "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
		if got := strings.Fields(r.header.Get("Webhook-Signature")); len(got) != len(secrets) ||
			!slices.Contains(got, want) {
			h.t.Errorf("the signatures are %q, want %q", got, want)
		}
	}
}

// await waits for the nth request and returns its data.
func (h *testHook) await(n int) (r recordedRequest, eventType string, data map[string]any) {
	h.t.Helper()
	waitFor(h.t, fmt.Sprintf("notification %d", n), func() bool { return len(h.received()) >= n })
	r = h.received()[n-1]
	var v struct {
		Type, Timestamp string
		Data            map[string]any
	}
	if err := json.Unmarshal([]byte(r.body), &v); err != nil {
		h.t.Errorf("%v: %s", err, r.body)
	}
	return r, v.Type, v.Data
}

// TestNotifications: the thresholds of a limit are sent once each, signed, in each format, and not again after a
// restart or by another process.
func TestNotifications(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	hook := p.newHook(t, formatStandard, `,"events":["limit.threshold"]`)
	slack, teams := p.newHook(t, formatSlack, ""), p.newHook(t, formatTeams, "")
	id, token := p.newToken(`"name":"<!channel> [x](https://x.example) & co","policy":{"limits":[` +
		`{"count":"requests","max":10,"per":"day"},{"count":"requests","max":1000,"per":"month","shadow":true}]}`)
	call := func(n int) {
		for range n {
			if res := p.chatAs(token); res.status != 200 {
				t.Fatalf("got %d %s", res.status, res.body)
			}
		}
	}
	call(5)
	r, eventType, data := hook.await(1)
	hook.verify(r, hook.secret)
	if r.method != "POST" || r.target != hook.target || r.header.Get("Content-Type") != "application/json" ||
		eventType != "limit.threshold" || data["percent"] != 50.0 || data["token_id"] != id || data["used"] != 5.0 ||
		data["max"] != 10.0 || data["limit"] != "10 requests per day" || data["resets_at"] == nil {
		t.Errorf("got %s\n%s", r.head, r.body)
	}
	for _, name := range []string{"Cookie", "Authorization", "Referer", "Accept-Encoding", "X-Api-Key"} {
		if got := r.header.Get(name); got != "" && name != "Accept-Encoding" {
			t.Errorf("the request has %s: %s", name, got)
		}
	}
	r, _, _ = slack.await(1)
	if slack.verify(r, slack.secret); !strings.Contains(r.body, `"type":"plain_text"`) ||
		strings.Contains(r.body, "<!channel>") && !strings.Contains(r.body, `\u003c!channel`) {
		t.Errorf("Slack gets %s", r.body)
	}
	var message struct {
		Text        string
		Attachments []struct {
			ContentType string
			Content     struct {
				Type, Version string
				Body          []struct{ Type string }
			}
		}
	}
	if err := json.Unmarshal([]byte(r.body), &message); err != nil || strings.Contains(message.Text, "<!") {
		t.Errorf("Slack gets %q: %v", message.Text, err)
	}
	r, _, _ = teams.await(1)
	err := json.Unmarshal([]byte(r.body), &message)
	if teams.verify(r, teams.secret); err != nil || len(message.Attachments) != 1 ||
		message.Attachments[0].ContentType != "application/vnd.microsoft.card.adaptive" ||
		message.Attachments[0].Content.Body[1].Type != "RichTextBlock" {
		t.Errorf("Teams gets %s", r.body)
	}
	call(3)
	if _, _, data = hook.await(2); data["percent"] != 80.0 {
		t.Errorf("got %v", data)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	call(2)
	if _, _, data = hook.await(3); data["percent"] != 100.0 {
		t.Errorf("got %v", data)
	}
	// Another process finds nothing that was not noticed.
	for range 2 {
		p.checkAsOther(time.Now())
	}
	if res := p.chatAs(token); res.status != 429 {
		t.Errorf("got %d", res.status)
	}
	var log struct{ Data []shownDelivery }
	p.manage("GET", hook.path+"/deliveries", "", 200, &log)
	if len(log.Data) != 3 || len(hook.received()) != 3 || log.Data[0].State != "delivered" ||
		*log.Data[0].Status != 200 ||
		log.Data[0].Attempts != 1 || log.Data[2].MessageID != hook.received()[0].header.Get("Webhook-Id") {
		t.Errorf("%d were received; the log has %+v", len(hook.received()), log.Data)
	}
}

// checkAsOther looks for events as another process would, at a time.
func (p *testProxy) checkAsOther(now time.Time) {
	p.t.Helper()
	in := p.instance
	n := newNotifier(in.sealer, in.operations.limits, in.log.Logger, in.transport, true)
	if err := n.check(p.t.Context(), now.UnixMilli()); err != nil {
		p.t.Error(err)
	}
}

// TestNotificationsStored: what a process has not noticed before it was killed, the next one does, and a delivery that
// it had claimed is sent again.
func TestNotificationsStored(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it makes calls without workers, and what a replica may spend of a limit is leased by one")
	p := newTest(t, nil)
	hook := p.newHook(t, formatStandard, "")
	_, token := p.newToken(`"name":"limited","max_requests":2`)
	ctx, in := t.Context(), p.instance
	in.stop() // the workers, as a kill would
	in.workers.Wait()
	p.chatAs(token)
	p.chatAs(token)
	until := notifiedUntil{Audit: p.lastAuditSeq(), At: time.Now().UnixMilli()}
	if err := in.store.setNotifiedUntil(ctx, until); err != nil {
		t.Fatal(err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	r, eventType, data := hook.await(1)
	if eventType != eventLimit || data["percent"] != 100.0 || data["token_name"] != "limited" {
		t.Errorf("got %s", r.body)
	}
	// A claim that has run out.
	w, err := p.instance.store.webhookByID(ctx, strings.TrimPrefix(hook.path, "/manage/webhooks/"))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().UnixMilli()
	msg := newNotification(eventTest, now, notificationData{Summary: "killed"})
	add := func() (bool, error) {
		return p.instance.store.addNotification(ctx, msg, []mark{{"killed", now + dayMS}}, []webhookRow{w}, now+dayMS,
			newDeliveryID)
	}
	p.execSQL(`UPDATE webhooks SET is_active = FALSE`)
	if isNew, err := add(); !isNew || err != nil {
		t.Fatal(isNew, err)
	}
	if isNew, err := add(); isNew || err != nil {
		t.Error("the same was queued twice", err)
	}
	due, err := p.instance.store.dueDeliveries(ctx, w.seq, now, 9)
	if err != nil || len(due) != 1 {
		t.Fatal(due, err)
	}
	other := due[0]
	if ok, err := p.instance.store.claimDelivery(ctx, &w, &due[0], now, now+1000); !ok || err != nil {
		t.Error(ok, err)
	}
	if ok, err := p.instance.store.claimDelivery(ctx, &w, &other, now, now+1000); ok || err != nil {
		t.Error("two processes have the same delivery", err)
	}
	p.execSQL(`UPDATE webhooks SET is_active = TRUE`)
	if r, _, data = hook.await(2); data["summary"] != "killed" || r.header.Get("Webhook-Id") != msg.id {
		t.Errorf("got %s", r.body)
	}
}

// TestNotificationRetries: a delivery is repeated with the same id until the receiver takes it; no redirect is
// followed.
func TestNotificationRetries(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	other := newFakeProvider(t)
	hook := p.newHook(t, formatStandard, "")
	attempt := 0
	hook.setScript(func(c *providerConn, _ recordedRequest) bool {
		switch attempt++; attempt {
		case 1:
			return c.reply(302, strings.Repeat(promptCanary, 10_000), "Location: "+other.url)
		case 2:
			return c.reset()
		}
		return c.reply(204, "")
	})
	_, token := p.newToken(`"name":"limited","max_requests":1`)
	p.chatAs(token)
	first, _, _ := hook.await(1)
	var log struct{ Data []shownDelivery }
	waitFor(t, "a redirect in the log", func() bool {
		p.manage("GET", hook.path+"/deliveries", "", 200, &log)
		return len(log.Data) == 1 && log.Data[0].Attempts >= 1
	})
	if v := log.Data[0]; v.State != deliveryPending || *v.Status != 302 || v.Problem != "answered 302 Found" ||
		v.NextAttemptAt == nil {
		t.Errorf("the log has %+v", v)
	}
	p.manage("POST", hook.path+"/deliveries/"+log.Data[0].ID+"/redeliver", "", 200, nil)
	hook.await(2)
	p.manage("POST", hook.path+"/deliveries/"+log.Data[0].ID+"/redeliver", "", 200, nil)
	last, _, _ := hook.await(3)
	if last.header.Get("Webhook-Id") != first.header.Get("Webhook-Id") || last.body != first.body {
		t.Errorf("the repetition has %s\n%s", last.head, last.body)
	}
	if len(other.received()) > 0 {
		t.Error("a redirect was followed")
	}
	for n, d := range []int64{2_000, 8_000, 32_000, 128_000, 512_000, 2_048_000, 8_192_000, 14_400_000, 14_400_000} {
		for _, random := range []float64{0, 0.5, 1} {
			want := d + int64((random-0.5)*0.4*float64(d))
			if got := retryDelay(int64(n+1), random); got != want {
				t.Errorf("after %d attempts: %d, want %d", n+1, got, want)
			}
		}
	}
	row := deliveryRow{state: deliveryPending, giveUpAt: dayMS}
	for now := int64(0); row.state == deliveryPending && row.attempts < 100; now = row.nextAt {
		row.record(deliveryResult{status: 500, problem: "answered 500"}, now, 0.5)
	}
	if row.state != deliveryFailed || row.attempts < 10 || row.attempts > 16 {
		t.Errorf("it is given up after %d attempts", row.attempts)
	}
}

// TestWebhookTest: the test button sends once and says how that went; a rotation signs with both secrets.
func TestWebhookTest(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	hook := p.newHook(t, formatStandard, "")
	var v shownDelivery
	p.manage("POST", hook.path+"/test", "", 200, &v)
	r, eventType, _ := hook.await(1)
	if hook.verify(r, hook.secret); eventType != "test" || v.State != deliveryDelivered || *v.Status != 200 {
		t.Errorf("got %+v and %s", v, r.body)
	}
	hook.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(503, "no", "Retry-After: 9") })
	p.manage("POST", hook.path+"/test", "", 200, &v)
	if v.State != deliveryFailed || *v.Status != 503 || v.Attempts != 1 {
		t.Errorf("got %+v", v)
	}
	var rotated struct{ Secret string }
	p.manage("POST", hook.path+"/rotate", `{"overlap_minutes":60}`, 200, &rotated)
	p.secrets = append(p.secrets, strings.TrimPrefix(rotated.Secret, webhookSecretPrefix))
	p.manage("POST", hook.path+"/test", "", 200, nil)
	if r, _, _ = hook.await(3); rotated.Secret == hook.secret {
		t.Error("the secret is the same")
	}
	hook.verify(r, hook.secret, rotated.Secret)
	p.manage("POST", hook.path+"/rotate", `{"overlap_minutes":0}`, 200, &rotated)
	p.secrets = append(p.secrets, strings.TrimPrefix(rotated.Secret, webhookSecretPrefix))
	p.manage("POST", hook.path+"/test", "", 200, nil)
	r, _, _ = hook.await(4)
	hook.verify(r, rotated.Secret)
	_, viewer := p.newKey("v", "viewer")
	_, operator := p.newKey("o", "operator")
	for _, c := range []struct {
		key, method, path, body string
		status                  int
	}{
		{viewer, "GET", hook.path, "", 200},
		{viewer, "POST", hook.path + "/test", "", 403},
		{operator, "POST", hook.path + "/test", "", 200},
		{operator, "POST", "/manage/webhooks", `{"name":"x","format":"slack","url":"` + deadURL + `"}`, 403},
		{operator, "PATCH", hook.path, `{"is_active":false}`, 403},
		{operator, "DELETE", hook.path, "", 403},
		{operator, "POST", hook.path + "/rotate", "", 403},
	} {
		if res := p.manageAs(c.key, c.method, c.path, c.body); res.status != c.status {
			t.Errorf("%s %s: got %d, want %d", c.method, c.path, res.status, c.status)
		}
	}
	for range maxWebhooks - 1 {
		p.manage("POST", "/manage/webhooks", `{"name":"x","format":"slack","url":"`+deadURL+`"}`, 201, nil)
	}
	p.manageRefused("POST", "/manage/webhooks", `{"name":"x","format":"slack","url":"`+deadURL+`"}`, 400, "")
	p.manage("DELETE", hook.path, "", 200, nil)
	p.manageRefused("GET", hook.path+"/deliveries", "", 404, "")
}

// TestWebhookURLs: no webhook reaches a private address, and no URL carries a credential or a header.
func TestWebhookURLs(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"ALLOW_PRIVATE_UPSTREAMS": "false", "OPENAI_API_URL": ""})
	for _, u := range []string{
		"", "x", "//example.com", "http://example.com/", "ftp://example.com/", "file:///etc/passwd",
		"gopher://example.com", "javascript:alert(1)", "https://", "https:///x", "https:example.com",
		"https://user@example.com/", "https://user:pw@example.com/", "https://example.com/#f", "https://example.com:0/",
		"https://example.com:/", "https://example.com:65536/", "https://example.com:443x/", "https://exa mple.com/",
		"https://example.com/\r\nX: y", "https://example.com\r\n.evil/", "https://127.0.0.1/", "https://127.1/",
		"https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/", "https://localhost/",
		"https://x.localhost/", "https://localhost./", "https://10.1.2.3/", "https://172.16.0.1/",
		"https://192.168.1.1/", "https://100.64.0.1/", "https://198.18.0.1/", "https://0.0.0.0/",
		"https://169.254.169.254/",
		"https://169.254.1.1/", "https://100.100.100.200/", "https://168.63.129.16/", "https://metadata/",
		"https://metadata.google.internal/", "https://[::1]/", "https://[::]/", "https://[fe80::1]/",
		"https://[fec0::1]/", "https://[fc00::1]/", "https://[fd00:ec2::254]/",
		"https://[::ffff:127.0.0.1]/", "https://[::ffff:10.0.0.1]/", "https://[::127.0.0.1]/",
		"https://[64:ff9b::7f00:1]/", "https://[2002:7f00:1::]/",
		"https://[fe80::1%25eth0]/", "https://224.0.0.1/",
		"https://255.255.255.255/", "https://[ff02::1]/", "https://ex\u00e4mple.com/",
		"https://example.com\\@127.0.0.1/",
		"https://" + strings.Repeat("a", 2100) + ".com/",
	} {
		body, err := json.Marshal(map[string]string{"name": "x", "format": "standard", "url": u})
		if err != nil {
			t.Fatal(err)
		}
		res := p.manageAs(p.adminKey, "POST", "/manage/webhooks", string(body))
		if res.status != 400 || res.param() != "url" || len(u) > 8 && strings.Contains(res.body, u) {
			t.Errorf("%q: got %d %s", u, res.status, res.body)
		}
	}
	// An escaped line break stays in the path, and so do other forms that no check needs to refuse.
	for _, u := range []string{"https://example.com/%0d%0aX-Evil:%20y?a=%0a", "https://example.com:8443/x;y=1?z",
		"HTTPS://EXAMPLE.COM:443", "https://[2606:4700::1111]/"} {
		target, err := parseWebhookURL(newSecret(u), false)
		if err != nil || strings.ContainsAny(target.RequestURI(), "\r\n ") {
			t.Errorf("%q: %v %v", u, target, err)
		}
	}
	// What was allowed once is checked at each delivery, and each address when it is dialled.
	hook := p.instance.operations
	w, _, err := func() (webhookRow, secret, error) {
		allowed := *hook
		allowed.allowPrivate = true
		return allowed.createWebhook(t.Context(), systemOrigin(time.Now()), webhookInput{name: given("old"),
			format: given("standard"), url: given(newSecret(deadURL))})
	}()
	if err != nil {
		t.Fatal(err)
	}
	var v shownDelivery
	p.manage("POST", "/manage/webhooks/"+w.id+"/test", "", 200, &v)
	if v.State != deliveryFailed || !strings.Contains(v.Problem, "cannot be used") {
		t.Errorf("got %+v", v)
	}
	n := newNotifier(p.instance.sealer, hook.limits, p.instance.log.Logger, p.instance.transport, true)
	res := n.send(t.Context(), &w, newNotification(eventTest, 0, notificationData{}))
	if res.problem != "resolves to an address that is not allowed" {
		t.Errorf("got %+v", res)
	}
	// A row of another webhook cannot be used.
	moved := w
	moved.id = "hook_other"
	res = n.send(t.Context(), &moved, newNotification(eventTest, 0, notificationData{}))
	if res.status != 0 || !res.final {
		t.Errorf("got %+v", res)
	}
}

// TestNotificationEvents: each kind of trouble is sent once: keys that are refused or used up, sign-ins, tokens that
// expire, calls that fail, and changes of the audit trail.
func TestNotificationEvents(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	hook := p.newHook(t, formatStandard, `,"error_percent":20`)
	expiring, _ := p.newToken(`"name":"soon","expires_in_days":30`)
	short, _ := p.newToken(`"name":"short","expires_in_days":7`) // it was made for no longer
	waitFor(t, "the first check", func() bool {
		_, err := p.instance.store.notifiedUntil(t.Context())
		return err == nil
	})
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(401, `{"error":{"message":"Incorrect API key: `+promptCanary+`","code":"invalid_api_key"}}`)
	})
	for range minErrorCalls {
		p.chat()
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(429, `{"error":{"message":"You exceeded your quota","code":"insufficient_quota"}}`)
	})
	second, _ := p.addUpstream(`"priority":1`)
	second.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(429, `{"error":{"message":"You exceeded your quota","code":"insufficient_quota"}}`)
	})
	p.chat()
	p.waitSettled()
	p.signIn(p.adminKey)
	for i, days := range []int64{7, 1} {
		now := time.Now().Add(2 * time.Duration(i) * time.Second) // later than the check before
		setExpiry := func(id string, days int64) {
			p.execSQLBound(fmt.Sprintf(`UPDATE tokens SET expires_at = %d WHERE id = '%s'`,
				now.UnixMilli()+days*dayMS+500, id))
		}
		p.execSQLBound(`UPDATE tokens SET created_at = created_at - 3000000000 WHERE id = '` + expiring + `'`)
		setExpiry(expiring, days)
		setExpiry(short, 7)
		for range 2 {
			p.checkAsOther(now.Add(time.Second))
		}
	}
	want := map[string]int{eventRefused: 1, eventExhausted: 1, eventErrors: 1, eventExpiry: 2, eventNewAddress: 1}
	count := func() map[string]int {
		got := map[string]int{}
		for i := range hook.received() {
			r, eventType, data := hook.await(i + 1)
			got[eventType]++
			if strings.Contains(r.body, promptCanary) || data["summary"] == "" ||
				eventType == eventExpiry && data["token_id"] != expiring ||
				eventType == eventErrors && data["project_id"] != p.project ||
				eventType == eventNewAddress && data["address"] != "127.0.0.1" {
				t.Errorf("got %s", r.body)
			}
		}
		return got
	}
	waitFor(t, "all notifications", func() bool { return len(hook.received()) >= 6 })
	if got := count(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	requireSQLite(t, "its triggers are those of SQLite")
	p.manage("POST", "/manage/keys", `{"name":"k","role":"viewer"}`, 201, nil)
	p.execSQL(`DROP TRIGGER audit_never_changed`,
		`UPDATE audit SET detail = '{}' WHERE seq = (SELECT max(seq) FROM audit)`)
	want[eventAudit] = 1
	waitFor(t, "the problem of the audit trail", func() bool { return count()[eventAudit] == 1 })
}

// TestNotificationOfLedger: trouble of the ledger is sent although the queue cannot be written, and once more from the
// queue with the same id.
func TestNotificationOfLedger(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it locks the file")
	p := newTest(t, nil)
	p.allowErrors = true
	hook := p.newHook(t, formatStandard, `,"events":["ledger.failing"]`)
	waitFor(t, "the first check", func() bool { return p.instance.notifier.active.Load() })
	release := p.lockDatabase()
	p.chat()
	r, eventType, _ := hook.await(1)
	if hook.verify(r, hook.secret); eventType != eventLedger {
		t.Errorf("got %s", r.body)
	}
	release()
	again, _, _ := hook.await(2)
	if again.header.Get("Webhook-Id") != r.header.Get("Webhook-Id") {
		t.Error("the queue has another id")
	}
}

// TestNotificationBounds: a receiver that is down bounds its queue, and old deliveries are deleted.
func TestNotificationBounds(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	ctx, st := context.Background(), p.instance.store
	w, _, err := p.instance.operations.createWebhook(ctx, systemOrigin(time.Now()), webhookInput{name: given("dead"),
		format: given("standard"), url: given(newSecret(deadURL)), active: given(false)})
	if err != nil {
		t.Fatal(err)
	}
	old := time.Now().UnixMilli() - 40*dayMS
	for i := range maxPendingDeliveries + 2 {
		if _, err := st.addNotification(ctx, newNotification(eventTest, old, notificationData{}),
			[]mark{{fmt.Sprint(i), old + 1}}, []webhookRow{w}, old+50*dayMS, newDeliveryID); err != nil {
			t.Fatal(err)
		}
	}
	count := func(state string) int {
		rows, err := st.listDeliveries(ctx, w.seq, 1<<60, state, 5000)
		if err != nil {
			t.Fatal(err)
		}
		return len(rows)
	}
	if count(deliveryPending) != maxPendingDeliveries || count(deliveryFailed) != 2 {
		t.Errorf("%d are pending, %d have failed", count(deliveryPending), count(deliveryFailed))
	}
	p.execSQL(`UPDATE deliveries SET state = 'delivered' WHERE seq % 2 = 0`)
	err = st.trimDeliveries(ctx, w.seq, 400, 1000)
	if err != nil || count("") < 400 || count(deliveryDelivered) > 200 {
		t.Errorf("%d are left: %v", count(""), err)
	}
	for {
		n, err := st.pruneNotifications(ctx, time.Now().UnixMilli(), time.Now().UnixMilli()-keepNotifications, 1000)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
	}
	if count(deliveryDelivered) != 0 || count(deliveryPending) != maxPendingDeliveries/2 {
		t.Errorf("%d are left", count(""))
	}
}

// TestWebhookRekey: a change of the encryption key takes webhooks along, and the old key opens nothing any more.
func TestWebhookRekey(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	hook := p.newHook(t, formatStandard, "")
	var rotated struct{ Secret string }
	p.manage("POST", hook.path+"/rotate", "", 200, &rotated)
	p.secrets = append(p.secrets, strings.TrimPrefix(rotated.Secret, webhookSecretPrefix))
	in, ctx := p.instance, t.Context()
	to, err := newSealer([]byte("0123456789abcdefghijklmnopqrstuv"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.store.reseal(ctx, systemOrigin(time.Now()), in.sealer, to, baseURLOrigin); err != nil {
		t.Fatal(err)
	}
	w, err := in.store.webhookByID(ctx, strings.TrimPrefix(hook.path, "/manage/webhooks/"))
	if err != nil {
		t.Fatal(err)
	}
	n := newNotifier(to, in.operations.limits, in.log.Logger, in.transport, true)
	msg := newNotification(eventTest, time.Now().UnixMilli(), notificationData{})
	if res := n.send(ctx, &w, msg); res.problem != "" {
		t.Errorf("with the new key: %+v", res)
	}
	r, _, _ := hook.await(1)
	hook.verify(r, hook.secret, rotated.Secret)
	n.sealer = in.sealer
	if res := n.send(ctx, &w, msg); !res.final || len(hook.received()) != 1 {
		t.Errorf("with the old key: %+v", res)
	}
	if _, err := in.store.reseal(ctx, systemOrigin(time.Now()), to, in.sealer, baseURLOrigin); err != nil {
		t.Fatal(err) // the rest of the program has the old one
	}
}

// queue queues a notification for a webhook at a time, as if it had been noticed then.
func (p *testProxy) queue(hook *testHook, summary string, at int64) *notification {
	p.t.Helper()
	st := p.instance.store
	w, err := st.webhookByID(p.t.Context(), strings.TrimPrefix(hook.path, "/manage/webhooks/"))
	if err != nil {
		p.t.Fatal(err)
	}
	msg := newNotification(eventTest, at, notificationData{Summary: summary})
	if _, err = st.addNotification(p.t.Context(), msg, []mark{{msg.id, at + dayMS}}, []webhookRow{w},
		at+deliveryGiveUpMS, newDeliveryID); err != nil {
		p.t.Fatal(err)
	}
	return msg
}

// TestNotificationsAfterChange: what waits behind a slow receiver goes to the URL that the webhook has by then, and
// what was not sent within a day is not sent late, however long the webhook was inactive.
func TestNotificationsAfterChange(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	release := make(chan struct{})
	hook := p.newHook(t, formatStandard, `,"is_active":false`)
	hook.setScript(func(c *providerConn, _ recordedRequest) bool {
		<-release
		return c.reply(200, "")
	})
	next := p.newHook(t, formatStandard, `,"is_active":false`)
	now := time.Now().UnixMilli()
	late := p.queue(hook, "late", now-2*dayMS)
	first := p.queue(hook, "1", now)
	for range 3 {
		p.queue(hook, "n", now+1)
	}
	p.manage("PATCH", hook.path, `{"is_active":true}`, 200, nil)
	if r, _, _ := hook.await(1); r.header.Get("Webhook-Id") != first.id {
		t.Errorf("got %s first", r.body)
	}
	p.manage("PATCH", hook.path, `{"url":`+quote(next.url+next.target)+`}`, 200, nil)
	close(release)
	next.await(3)
	if n := len(hook.received()); n != 1 {
		t.Errorf("the first URL got %d notifications", n)
	}
	p.checkAsOther(time.Now())
	var log struct{ Data []shownDelivery }
	p.manage("GET", hook.path+"/deliveries?state=failed", "", 200, &log)
	if len(log.Data) != 1 || log.Data[0].MessageID != late.id || log.Data[0].Problem != "was not sent in time" {
		t.Errorf("the log has %+v", log.Data)
	}
}

// TestNotificationTimes: tokens that expire at one moment are all noticed, calls that fail at the end of an hour are
// noticed after it, and nothing from the time without a webhook is.
func TestNotificationTimes(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it adds rows in SQLite's dialect")
	p := newTest(t, nil)
	ctx := t.Context()
	p.signIn(p.adminKey) // while there is no webhook
	if err := p.instance.store.setNotifiedUntil(ctx, notifiedUntil{At: 1}); err != nil {
		t.Fatal(err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	waitFor(t, "the end of what an earlier process remembered", func() bool {
		_, err := p.instance.store.notifiedUntil(ctx)
		return errors.Is(err, errNotFound)
	})
	hook := p.newHook(t, formatStandard, `,"events":["errors.high","sign_in.new_address"],"error_percent":20`)
	waitFor(t, "the first check", func() bool {
		_, err := p.instance.store.notifiedUntil(ctx)
		return err == nil
	})
	awaitClearOfHour(20 * time.Second)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(500, "{}") })
	for range minErrorCalls {
		p.chat()
	}
	p.waitSettled()
	now := time.Now()
	p.checkAsOther(now.Truncate(time.Hour).Add(time.Hour + 50*time.Second))
	var log struct {
		Data []struct{ Type, Summary string }
	} // it is sent an hour later
	p.manage("GET", hook.path+"/deliveries", "", 200, &log)
	if len(log.Data) != 1 || log.Data[0].Type != eventErrors ||
		!strings.Contains(log.Data[0].Summary, now.UTC().Format("from 15:00 UTC")+" have failed: 20 of 20.") {
		t.Errorf("after the hour: %+v", log.Data)
	}
	const same = expiringAtOnce + 20
	p.manage("PATCH", hook.path, `{"is_active":false,"events":["token.expiring"]}`, 200, nil)
	p.execSQL(fmt.Sprintf(`WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
		INSERT INTO tokens (id, project, name, hash, expires_at, created_at, updated_at)
		SELECT 'tok_' || hex(randomblob(8)), 1, 'same', randomblob(32), %d, 1, 1 FROM n`,
		same, now.Add(48*time.Hour).UnixMilli()))
	in := p.instance
	n := newNotifier(in.sealer, in.operations.limits, in.log.Logger, in.transport, true)
	all, err := in.store.listWebhooks(ctx)
	if err != nil {
		t.Fatal(err)
	}
	n.hooks, n.until.At = all, now.UnixMilli()-6*dayMS // it had stopped for so long
	for range 2 {
		if err := n.checkExpiry(ctx, now.UnixMilli()); err != nil {
			t.Fatal(err)
		}
	}
	p.manage("GET", hook.path+"/deliveries?limit=500", "", 200, &log)
	if len(log.Data) != 500 || !strings.Contains(log.Data[0].Summary, "expires in 2 days") {
		t.Errorf("%d deliveries, the last of %q", len(log.Data), log.Data[0].Summary)
	}
	count, err := queryValue[int](ctx, in.store.readDB, "counting notifications",
		`SELECT count(*) FROM notifications WHERE type = 'token.expiring'`)
	if err != nil || count != same {
		t.Errorf("%d notifications of %d tokens: %v", count, same, err)
	}
}

// TestWebhookTestAbandoned: the result of a test is recorded although who asked for it has left, and a delivery that is
// gone is not queued again.
func TestWebhookTestAbandoned(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	hook := p.newHook(t, formatStandard, "")
	ctx, cancel := context.WithCancel(t.Context())
	hook.setScript(func(c *providerConn, _ recordedRequest) bool {
		cancel()
		return c.reply(503, "")
	})
	ops, id := p.instance.operations, strings.TrimPrefix(hook.path, "/manage/webhooks/")
	d, err := ops.testWebhook(ctx, systemOrigin(time.Now()), id)
	if err != nil || d.state != deliveryFailed || d.attempts != 1 || d.status != 503 {
		t.Errorf("got %+v, %v", d, err)
	}
	w, err := ops.store.webhookByID(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	p.manage("DELETE", hook.path, "", 200, nil)
	seq := p.lastAuditSeq()
	err = ops.store.redeliver(t.Context(), systemOrigin(time.Now()), &w, &d, dayMS)
	if !errors.Is(err, errNotFound) || p.lastAuditSeq() != seq {
		t.Errorf("a delivery that is gone: %v", err)
	}
}

// TestLimitThresholds: a threshold is reached exactly there, whatever the limit.
func TestLimitThresholds(t *testing.T) {
	t.Parallel()
	for _, c := range [...]struct{ max, used, want int64 }{
		{1, 0, 0}, {1, 1, 100}, {2, 1, 50}, {3, 1, 0}, {3, 2, 50}, {10, 8, 80}, {101, 80, 50}, {101, 81, 80},
		{10, 1 << 62, 100}, {1, math.MaxInt64, 100}, {0, 5, 0}, {100, 99, 80},
		{maxLimitDollars * 1_000_000_000, maxLimitDollars * 950_000_000, 80},
		{maxLimitDollars * 1_000_000_000, maxLimitDollars*1_000_000_000 - 1, 80},
		{maxLimitDollars * 1_000_000_000, math.MaxInt64, 100},
	} {
		u := limitUseState{limit: &limit{metric: metricDollars, period: perMonth, max: c.max}, used: c.used}
		if got, _ := u.reached(1); got != c.want {
			t.Errorf("%d of %d: got %d %%, want %d %%", c.used, c.max, got, c.want)
		}
	}
}
