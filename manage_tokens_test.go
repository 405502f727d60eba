// This file tests tokens and management keys through /manage: refused input, expiry, rotation, revocation, and
// counts that stay right while a token is changed.
package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestTokenInput: a refusal names its field, and changes nothing.
func TestTokenInput(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	past, far := time.Now().Add(-time.Second).UTC().Format(time.RFC3339), "2999-01-01T00:00:00Z"
	before := p.manageAs(p.adminKey, "GET", "/manage/tokens/"+p.tokenID, "").body
	for _, c := range [][2]string{
		{`"duration_minutes":0`, "duration_minutes"}, {`"duration_minutes":-5`, "duration_minutes"},
		{`"duration_minutes":1.5`, "duration_minutes"}, {`"duration_minutes":"5"`, "duration_minutes"},
		{`"duration_minutes":52560001`, "duration_minutes"},
		{`"duration_minutes":9223372036854775807`, "duration_minutes"},
		{`"duration_minutes":9223372036854775808`, "duration_minutes"},
		{`"duration_hours":0`, "duration_hours"}, {`"duration_hours":876001`, "duration_hours"},
		{`"expires_in_days":36501`, "expires_in_days"}, {`"expires_in_days":null`, "expires_in_days"},
		{`"expires_at":"` + past + `"`, "expires_at"}, {`"expires_at":"` + far + `"`, "expires_at"},
		{`"expires_at":"tomorrow"`, "expires_at"}, {`"expires_at":"2099-01-01"`, "expires_at"},
		{`"expires_at":"2099-01-01T00:00:00"`, "expires_at"}, {`"expires_at":4102444800`, "expires_at"},
		{`"expires_at":""`, "expires_at"}, {`"expires_at":"2099-02-30T00:00:00Z"`, "expires_at"},
		{`"expires_at":"2099-01-01T00:00:00Z","duration_hours":1`, "expires_at"},
		{`"duration_minutes":1,"duration_hours":1`, "expires_at"},
		{`"expires_at":null,"expires_in_days":1`, "expires_at"},
		{`"idle_expiry_minutes":0`, "idle_expiry_minutes"}, {`"idle_expiry_minutes":52560001`, "idle_expiry_minutes"},
		{`"max_requests":-1`, "max_requests"}, {`"max_requests":1e3`, "max_requests"},
		{`"max_requests":9223372036854775807`, "max_requests"}, {`"max_requests":true`, "max_requests"},
		{`"name":""`, "name"}, {`"name":"a\nb"`, "name"}, {`"policy":{"stateful":true}`, "policy.stateful"},
		{`"policy":{"models":[7]}`, "policy.models"}, {`"policy":1`, "policy"},
		{`"request_count":0`, "request_count"}, {`"token":"x"`, "token"}, {`"revoked_at":null`, "revoked_at"},
		{`"is_active":true`, "is_active"}, {`"hash":"x"`, "hash"},
	} {
		p.manageRefused("POST", "/manage/tokens", `{"project_id":"`+p.project+`",`+c[0]+`}`, 400, c[1])
		p.manageRefused("PATCH", "/manage/tokens/"+p.tokenID, `{`+c[0]+`}`, 400, c[1])
	}
	for _, c := range [][2]string{
		{`{}`, "project_id"}, {`{"project_id":""}`, "project_id"}, {`{"project_id":"proj_none"}`, "project_id"},
		{`{"project_id":7}`, "project_id"},
		{`{"project_id":"` + p.project + `","project_id":"` + p.project + `"}`, "project_id"},
	} {
		p.manageRefused("POST", "/manage/tokens", c[0], 400, c[1])
	}
	p.manageRefused("PATCH", "/manage/tokens/"+p.tokenID, `{"project_id":"x"}`, 400, "project_id")
	if after := p.manageAs(p.adminKey, "GET", "/manage/tokens/"+p.tokenID, "").body; after != before {
		t.Errorf("the token was %s, and is %s", before, after)
	}
	for _, c := range [][2]string{
		{`{"overlap_minutes":-1}`, "overlap_minutes"}, {`{"overlap_minutes":43201}`, "overlap_minutes"},
		{`{"overlap_minutes":null}`, "overlap_minutes"}, {`{"minutes":1}`, "minutes"},
	} {
		p.manageRefused("POST", "/manage/tokens/"+p.tokenID+"/rotate", c[0], 400, c[1])
	}
	if res := p.chat(); res.status != 200 {
		t.Errorf("after the refusals: got %d", res.status)
	}
}

// TestTokenExpiry: a token expires when each of the fields sets, to the millisecond.
func TestTokenExpiry(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	day := 24 * time.Hour
	for fields, want := range map[string]time.Duration{
		`"duration_minutes":5`: 5 * time.Minute, `"duration_hours":2`: 2 * time.Hour, `"expires_in_days":3`: 3 * day,
		`"name":"the default"`: defaultTokenLifetime,
		`"expires_at":null`:    0, `"expires_in_days":36500`: maxLifetime,
		`"expires_at":"` + time.Now().Add(36*time.Hour).In(time.FixedZone("", 2*3600+1800)).Format(time.RFC3339Nano) +
			`"`: 36 * time.Hour,
	} {
		start := time.Now()
		id, _ := p.newToken(fields)
		var v struct {
			ExpiresAt *time.Time `json:"expires_at"`
		}
		p.manage("GET", "/manage/tokens/"+id, "", 200, &v)
		if want == 0 && v.ExpiresAt != nil || want != 0 &&
			(v.ExpiresAt == nil || v.ExpiresAt.Sub(start.Add(want)).Abs() > 10*time.Second) {
			t.Errorf("%s: expires at %v, %v from now", fields, v.ExpiresAt, want)
		}
	}
	now := time.Now().UnixMilli()
	// Expired and idle tokens are refused, and shown as not active.
	for column, at := range map[string]int64{"expires_at": now - 1, "idle_expiry": 1} {
		id, token := p.newToken(`"name":"` + column + `"`)
		p.execSQLBound(fmt.Sprintf(`UPDATE tokens SET created_at = 1, %s = %d WHERE id = '%s'`, column, at, id))
		if res := p.chatAs(token); res.status != 401 || res.errorCode() != "invalid_api_key" {
			t.Errorf("%s: got %d %s", column, res.status, res.body)
		}
		for _, query := range []string{"?name=" + column + "&active=false", "?name=" + column} {
			body := p.manageAs(p.adminKey, "GET", "/manage/tokens"+query, "").body
			if !strings.Contains(body, id) || !strings.Contains(body, `"is_active":false`) {
				t.Errorf("%s: %s", query, body)
			}
		}
		if res := p.manageAs(p.adminKey, "GET", "/manage/tokens?active=true", ""); strings.Contains(res.body, id) {
			t.Errorf("%s is listed as active", column)
		}
	}
}

// TestTokenValidity: a token expires and goes idle at the given millisecond.
func TestTokenValidity(t *testing.T) {
	t.Parallel()
	now := time.Now().UnixMilli()
	token := &liveToken{project: &liveProject{}}
	token.project.state.Store(&projectState{})
	for _, c := range []struct {
		state tokenState
		used  int64
		want  string
	}{
		{tokenState{}, 0, ""}, {tokenState{expiresAt: now + 1}, 0, ""}, {tokenState{expiresAt: now}, 0, "expired"},
		{tokenState{expiresAt: now - 1}, 0, "expired"},
		{tokenState{revoked: true, expiresAt: 1}, 0, "revoked"}, {tokenState{idleExpiry: 100}, now - 99, ""},
		{tokenState{idleExpiry: 100}, now - 100, "idle_expired"},
	} {
		token.lastUsed.Store(c.used)
		if got := token.validity(&c.state, now); got != c.want {
			t.Errorf("%+v: got %q, want %q", c.state, got, c.want)
		}
	}
}

// TestTokenRevocation: a revoked token is refused from the next call on, its running streams end, and nothing can
// change it. Revoking it twice keeps the first time.
func TestTokenRevocation(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, operation := range [][2]string{
		{"DELETE", "/manage/tokens/%s"}, {"POST", "/manage/projects/" + p.project + "/tokens/revoke"},
	} {
		id, token := p.newToken(`"name":"x"`)
		started := make(chan struct{})
		p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
			if !strings.Contains(r.body, `"stream":true`) {
				return chatScript(c, r)
			}
			c.beginSSE()
			_ = c.chunk(chatEvents(false)[0])
			close(started)
			c.waitClosed(hangTimeout)
			return false
		})
		stream := make(chan testResponse, 1)
		go func() { stream <- p.chatAs(token, `"stream":true`) }()
		<-started
		elapsed := stopwatch(t)
		path := strings.Replace(operation[1], "%s", id, 1)
		p.manage(operation[0], path, "", 200, nil)
		if res := p.chatAs(token); res.status != 401 {
			t.Errorf("%s: the next call got %d", path, res.status)
		}
		if res := <-stream; strings.Contains(res.body, "[DONE]") || elapsed() > time.Second {
			t.Errorf("%s: the stream ended after %v with %s", path, elapsed(), res.body)
		}
		var v, again struct {
			RevokedAt *string `json:"revoked_at"`
			IsActive  bool    `json:"is_active"`
		}
		p.manage("GET", "/manage/tokens/"+id, "", 200, &v)
		p.manage("DELETE", "/manage/tokens/"+id, "", 200, &again)
		if v.RevokedAt == nil || v.IsActive || *again.RevokedAt != *v.RevokedAt {
			t.Errorf("%s: %v, then %v", path, v, again)
		}
		for _, c := range [][3]string{
			{"PATCH", "", `{"name":"y"}`}, {"PATCH", "", `{"expires_at":null}`}, {"POST", "/rotate", ``},
		} {
			p.manageRefused(c[0], "/manage/tokens/"+id+c[1], c[2], 400, "")
		}
	}
}

// A cutWriter is the client of a call that waits for it. When the call is aborted, it calls cut.
type cutWriter struct {
	http.ResponseWriter
	cut func()
}

func (w cutWriter) SetWriteDeadline(time.Time) error { w.cut(); return nil }

// TestAbortedCallsEndAtOnce: while many calls are aborted, each one can end, and others can begin; a call that has
// ended leaves its connection alone.
func TestAbortedCallsEndAtOnce(t *testing.T) {
	t.Parallel()
	rc := newRunningCalls(newCallLimits(10, time.Minute, time.Minute))
	newCall := func(id int64, cut func()) *runningCall {
		c := &runningCall{ticks: &rc.ticks, id: id, token: &liveToken{}, cancel: func(error) {},
			controller: http.NewResponseController(cutWriter{cut: cut})}
		c.setPhase(phaseWriting)
		if err := rc.add(c); err != nil {
			t.Fatal(err)
		}
		return c
	}
	var cuts atomic.Int64
	ended := newCall(1, func() { t.Error("the call had ended") })
	for id := range int64(3) {
		newCall(2+id, func() {
			cuts.Add(1)
			last := newCall(10+cuts.Load(), func() {})
			rc.remove(last)
		})
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		all := rc.endingCalls(func(*runningCall) *apiError { return errInactiveProject })
		rc.remove(ended)
		abortAll(all)
	}()
	select {
	case <-done:
	case <-time.After(hangTimeout):
		t.Fatal("the calls wait for each other")
	}
	if cuts.Load() != 3 {
		t.Errorf("%d calls were cut", cuts.Load())
	}
}

// TestProjectTokensRevoked: revoking the tokens of a project reports how many were valid, and leaves those of other
// projects.
func TestProjectTokensRevoked(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("DELETE", "/manage/tokens/"+p.tokenID, "", 200, nil)
	var project struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"other","openai_api_key":"`+p.provider.key+`"}`, 201, &project)
	var made struct{ Token string }
	p.manage("POST", "/manage/tokens", `{"project_id":"`+project.ID+`"}`, 201, &made)
	for range 3 {
		p.newToken(`"name":"bulk"`)
	}
	for _, want := range []int{3, 0} {
		var v struct{ Revoked int }
		if p.manage("POST", "/manage/projects/"+p.project+"/tokens/revoke", "{}", 200, &v); v.Revoked != want {
			t.Errorf("revoked %d, want %d", v.Revoked, want)
		}
	}
	if res := p.chatAs(made.Token); res.status != 200 {
		t.Errorf("a token of another project: got %d", res.status)
	}
	p.manageRefused("POST", "/manage/projects/"+project.ID+"/tokens/revoke", `{"older_than":"x"}`, 400, "older_than")
}

// rotate rotates a token with max_requests 100, and returns the new value.
func (p *testProxy) rotate(id, body string) string {
	p.t.Helper()
	var v struct {
		ID, Token    string
		MaxRequests  int64      `json:"max_requests"`
		OverlapUntil *time.Time `json:"overlap_until"`
	}
	p.manage("POST", "/manage/tokens/"+id+"/rotate", body, 200, &v)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.secrets = append(p.secrets, v.Token)
	if v.ID != id || v.MaxRequests != 100 || (v.OverlapUntil == nil) != (body == `{"overlap_minutes":0}`) {
		p.t.Errorf("%s: got %+v", body, v.OverlapUntil)
	}
	return v.Token
}

// TestTokenRotation: the previous value and the new one work until the overlap ends; older ones do not. The ID,
// limits and counts stay.
func TestTokenRotation(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	id, first := p.newToken(`"name":"r","max_requests":100`)
	rotate := func(body string) string { t.Helper(); return p.rotate(id, body) }
	works := func(what string, token string, want bool) {
		t.Helper()
		if res := p.chatAs(token); (res.status == 200) != want || !want && res.status != 401 {
			t.Errorf("%s: got %d", what, res.status)
		}
	}
	works("the first, alone", first, true)
	second := rotate("")
	works("the first, in the overlap", first, true)
	works("the second", second, true)
	third := rotate(`{"overlap_minutes":5}`)
	works("the first, after two rotations", first, false)
	works("the second, in the overlap", second, true)
	works("the third", third, true)
	fourth := rotate(`{"overlap_minutes":0}`)
	works("the third, without overlap", third, false)
	works("the second, without overlap", second, false)
	works("the fourth", fourth, true)
	fifth := rotate(`{"overlap_minutes":1}`)
	works("the fourth, in the overlap", fourth, true)
	// The overlap ends early, by a change of the database; then the token is loaded again.
	p.waitSettled()
	p.execSQLBound(fmt.Sprintf(`UPDATE tokens SET old_hash_until = %d WHERE id = '%s'`, time.Now().UnixMilli(), id))
	p.manage("PATCH", "/manage/tokens/"+id, `{"name":"loaded again"}`, 200, nil)
	works("the fourth, after the overlap", fourth, false)
	works("the fifth", fifth, true)
	if n := p.requestCount(id); n != 8 {
		t.Errorf("counted %d of 8 calls", n)
	}
	// It is the same after a restart, when nothing is in memory.
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	works("the fourth, after a restart", fourth, false)
	works("the fifth, after a restart", fifth, true)
}

// TestTokenLimitChanged: max_requests may change while calls are made. No call is lost from the count, which never
// exceeds the limit in force.
func TestTokenLimitChanged(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	id, token := p.newToken(`"max_requests":0`)
	set := func(limit string) {
		t.Helper()
		p.manage("PATCH", "/manage/tokens/"+id, `{"max_requests":`+limit+`}`, 200, nil)
	}
	burst := func(calls int) (ok int) {
		t.Helper()
		var mu sync.Mutex
		var all sync.WaitGroup
		for range calls {
			all.Go(func() {
				res := p.chatAs(token)
				mu.Lock()
				defer mu.Unlock()
				if res.status == 200 {
					ok++
				} else if res.status != 429 {
					t.Errorf("got %d %s", res.status, res.body)
				}
			})
		}
		all.Wait()
		return ok
	}
	for _, c := range []struct {
		limit string
		calls int
		ok    int
	}{{"0", 3, 0}, {"4", 12, 4}, {"6", 12, 2}, {"5", 3, 0}, {"null", 5, 5}, {"12", 6, 1}, {"2", 2, 0}} {
		if set(c.limit); burst(c.calls) != c.ok {
			t.Errorf("with max_requests %s, not %d of %d calls succeeded", c.limit, c.ok, c.calls)
		}
	}
	set("100")
	var changing sync.WaitGroup
	changing.Go(func() { // a change during calls loses none from the count
		for i := range 10 {
			p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+id, fmt.Sprintf(`{"name":"n%d"}`, i))
		}
	})
	ok := burst(20)
	changing.Wait()
	if n := p.requestCount(id); ok != 20 || n != 32 {
		t.Errorf("%d calls, counted %d, want 20 and 32", ok, n)
	}
}

// TestManagementKeys: bad input is refused, a key cannot change itself, and a change is in force from the next
// request on.
func TestManagementKeys(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, c := range [][2]string{
		{`{"name":"k"}`, "role"}, {`{"role":"viewer"}`, "name"}, {`{"name":"k","role":"root"}`, "role"},
		{`{"name":"k","role":"Admin"}`, "role"},
		{`{"name":"k","role":null}`, "role"},
		{`{"name":"k","role":"viewer","expires_at":"2020-01-01T00:00:00Z"}`, "expires_at"},
		{`{"name":"k","role":"viewer","is_admin":true}`, "is_admin"},
		{`{"name":"k","role":"viewer","role":"admin"}`, "role"}, {`{"name":"k","role":"viewer","key":"x"}`, "key"},
	} {
		p.manageRefused("POST", "/manage/keys", c[0], 400, c[1])
	}
	id, key := p.newKey("k", "viewer")
	own := p.ownKeyID()
	p.manageRefused("PATCH", "/manage/keys/"+own, `{"role":"viewer"}`, 400, "")
	p.manageRefused("DELETE", "/manage/keys/"+own, "", 400, "")
	post := func() int { return p.manageAs(key, "POST", "/manage/tokens", `{"project_id":"`+p.project+`"}`).status }
	for _, c := range []struct {
		body string
		want int
	}{{`{}`, 403}, {`{"role":"operator"}`, 201}, {`{"role":"viewer"}`, 403}, {`{"role":"admin"}`, 201}} {
		if p.manage("PATCH", "/manage/keys/"+id, c.body, 200, nil); post() != c.want {
			t.Errorf("after %s: not %d", c.body, c.want)
		}
	}
	if res := p.manageAs(key, "POST", "/manage/keys", `{"name":"by the other","role":"admin"}`); res.status != 201 {
		t.Errorf("an admin's key: got %d", res.status)
	}
	p.manage("DELETE", "/manage/keys/"+id, "", 200, nil)
	if got := post(); got != 401 {
		t.Errorf("revoked: got %d", got)
	}
	p.manageRefused("PATCH", "/manage/keys/"+id, `{"name":"x"}`, 400, "")
	p.manageRefused("DELETE", "/manage/keys/key_none", "", 404, "")
	for range 5 {
		p.newKey("page", "viewer")
	}
	ids := p.listIDs("/manage/keys?limit=3", func(int) {})
	if slices.Sort(ids); len(ids) != 8 || len(slices.Compact(ids)) != 8 {
		t.Errorf("the list has not 8 keys, each once: %v", ids)
	}
}

// ownKeyID returns the id of the key that the test uses.
func (p *testProxy) ownKeyID() string {
	p.t.Helper()
	who, err := p.instance.manage.auth.actorByKey(context.Background(), p.adminKey, time.Now())
	if err != nil {
		p.t.Fatal(err)
	}
	return who.id
}

// TestKeysNeverReturned: only the response to its creation has the value of a token or management key, and none has
// a provider key. The harness searches all other responses for them.
func TestKeysNeverReturned(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	id, key := p.newKey("shown once", "viewer")
	for _, path := range []string{
		"/manage/projects", "/manage/projects/" + p.project, "/manage/projects/" + p.project + "/upstreams",
		"/manage/projects/" + p.project + "/upstreams/" + p.upstream,
		"/manage/tokens", "/manage/tokens/" + p.tokenID, "/manage/keys", "/manage/keys/" + id,
	} {
		for _, who := range []string{p.adminKey, key} {
			res := p.manageAs(who, "GET", path, "")
			for _, secret := range p.secrets {
				if strings.Contains(res.body, secret) {
					t.Errorf("%s shows a secret", path)
				}
			}
			if strings.Contains(res.body, `"token":`) || strings.Contains(res.body, `"key":`) ||
				strings.Contains(res.body, "sealed") {
				t.Errorf("%s: %s", path, res.body)
			}
		}
	}
	for _, body := range []string{`{"name":"x"}`, `{}`} {
		res := p.manageAs(p.adminKey, "PATCH", "/manage/tokens/"+p.tokenID, body)
		if strings.Contains(res.body, `"token":`) {
			t.Errorf("PATCH: %s", res.body)
		}
	}
}
