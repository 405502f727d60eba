// These tests hold the affinity of calls to upstreams: which calls stay together, when they move, and what that is
// good for; and what is recorded of calls that clients send again.
package main

import (
	"crypto/sha256"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func testHashKey(n byte) *hashKey {
	k := hashKey(sha256.Sum256([]byte{n}))
	return &k
}

// affinityPool returns a project with upstreams of these weights in one priority.
func affinityPool(weights ...int64) *projectState {
	var list []*upstream
	for i, w := range weights {
		list = append(list, &upstream{seq: int64(i + 1), id: fmt.Sprint(i), provider: providerOpenAI, weight: w})
	}
	p := testPool(list...)
	p.hashKey = testHashKey(1)
	return p
}

// pickForSession returns the id of the upstream that a session's next call gets.
func pickForSession(p *projectState, session string, now int64, tried ...*upstream) string {
	c := criteria{api: apiOpenAI, affinity: p.affinityOf(session, nil, nil), now: now, tried: tried}
	return p.pickUpstream(&c).id
}

// TestAffinityShares: over many sessions each upstream has the share of its weight. An upstream that is added, removed
// or given another weight moves its own share only, and every replica with the key chooses the same upstream.
func TestAffinityShares(t *testing.T) {
	t.Parallel()
	const sessions = 20_000
	before, after, replica := affinityPool(1, 2, 3, 2), affinityPool(1, 2, 3, 2), affinityPool(1, 2, 3, 2)
	other := affinityPool(1, 2, 3, 2)
	other.hashKey = testHashKey(2)
	after.upstreams = append(after.upstreams[:1], after.upstreams[2:]...) // without "1"
	heavier := affinityPool(1, 2, 6, 2)
	counts, moved, same := map[string]int{}, 0, 0
	for i := range sessions {
		session := fmt.Sprint("session-", i)
		was := pickForSession(before, session, 1)
		counts[was]++
		if is := pickForSession(after, session, 1); is != was && was != "1" {
			t.Fatalf("%s moved from %s to %s, but only upstream 1 was removed", session, was, is)
		}
		if is := pickForSession(heavier, session, 1); is != was {
			if moved++; is != "2" {
				t.Fatalf("%s moved from %s to %s, but only upstream 2 became heavier", session, was, is)
			}
		}
		if is := pickForSession(replica, session, 1); is != was {
			t.Fatalf("%s: one replica chooses %s, another one %s", session, was, is)
		}
		if pickForSession(other, session, 1) == was {
			same++
		}
	}
	for i, w := range []float64{1, 2, 3, 2} { // 6 standard deviations
		if d := float64(counts[fmt.Sprint(i)])/sessions - w/8; math.Abs(d) > 0.02 {
			t.Errorf("upstream %d of weight %v has %d of %d sessions", i, w, counts[fmt.Sprint(i)], sessions)
		}
	}
	if share := float64(moved) / sessions; math.Abs(share-(6.0/11-3.0/8)) > 0.02 {
		t.Errorf("%v of the sessions moved to the upstream that became heavier", share)
	}
	if share := float64(same) / sessions; math.Abs(share-18.0/64) > 0.02 { // that of chance
		t.Errorf("with another key, %v of the sessions are at the same upstream", share)
	}
}

// TestAffinityMoves: a session leaves its upstream while that is paused, has no capacity, was tried, or has far more
// running calls than its share; it goes to the same second one each time, and comes back.
func TestAffinityMoves(t *testing.T) {
	t.Parallel()
	const now = 1_000_000
	p := affinityPool(1, 1, 1, 1)
	p.upstreams = append(p.upstreams, &upstream{seq: 9, id: "spare", provider: providerOpenAI, weight: 1, priority: 1,
		health: newHealthTracker().forUpstream(9, "spare"), retryBudget: &retryBudget{}})
	byID := map[string]*upstream{}
	for _, u := range p.upstreams {
		byID[u.id] = u
	}
	first := pickForSession(p, "s", now)
	u := byID[first]
	second := pickForSession(p, "s", now, u)
	if second == first || second == "spare" {
		t.Fatalf("after %s, %s is next", first, second)
	}
	expect := func(what, want string, at int64) {
		t.Helper()
		for range 20 {
			if got := pickForSession(p, "s", at); got != want {
				t.Fatalf("%s: got %s, want %s", what, got, want)
			}
		}
	}
	expect("healthy", first, now)
	u.health.recordRateLimit(now, now, 20_000, "")
	expect("cooling", second, now+1)
	expect("the cooldown is over", first, now+20_000)
	u.settings.RequestsPerMinute = 1
	pickForSession(p, "s", now+20_000)
	expect("at its limit", second, now+20_000)
	u.settings.RequestsPerMinute = 0
	u.health.pauseModel(now+20_000, "", "", "")
	expect("without the model", second, now+20_001)
	u.health.resumeModel("", "")
	u.health.running.Store(40)
	for _, other := range p.upstreams[:4] {
		if other != u {
			other.health.running.Store(5)
		}
	}
	expect("it hangs", second, now+20_001)
	u.health.running.Store(8) // of 23: chance explains it
	expect("busy", first, now+20_001)
	for _, other := range p.upstreams[:4] {
		other.health.recordFailure(now+20_001, now+20_001, true, "")
	}
	expect("the group is down", "spare", now+20_002)
}

// TestAffinityOfPrompts: calls belong together if the first 4 KiB of what a provider caches are the same: model,
// tools, system's prompt and messages, wherever they are in the body. Shorter prompts have no affinity.
func TestAffinityOfPrompts(t *testing.T) {
	t.Parallel()
	p := affinityPool(1, 1)
	long, text := strings.Repeat("x", minCachedPrompt), strings.Repeat("word ", 500)
	of := func(body string) affinity {
		f, err := scanJSON([]byte(body))
		if strings.Contains(body, `"contents"`) {
			f, err = scanGemini([]byte(body), "m")
		}
		if err != nil {
			t.Fatal(err)
		}
		a := p.affinityOf("", []byte(body), &f)
		if a.source != affinityNone && a.source != affinityPrompt {
			t.Fatalf("the source is %q", a.source)
		}
		return a
	}
	for _, c := range []struct {
		what, a, b string
		together   bool
	}{
		{"a conversation that grows", `{"model":"m","messages":["` + long + `"]}`,
			`{"model":"m","messages":["` + long + `","more"],"stream":true}`, true},
		{"another order of fields", `{"model":"m","messages":["a"],"system":"` + long + `"}`,
			`{"max_tokens":5,"system":"` + long + `","messages":["b"],"model":"m"}`, true},
		{"parts that are long enough together",
			`{"model":"m","tools":["` + text + `"],"instructions":"` + text + `","input":"a"}`,
			`{"model":"m","input":"b","instructions":"` + text + `","tools":["` + text + `"]}`, true},
		{"Gemini", `{"contents":[{"parts":[{"text":"a"}]}],"systemInstruction":{"parts":[{"text":"` + long + `"}]}}`,
			`{"system_instruction":{"parts":[{"text":"` + long + `"}]},"contents":[{"parts":[{"text":"b"}]}]}`, true},
		{"other messages", `{"model":"m","messages":["` + long + `"]}`, `{"model":"m","messages":["y` + long + `"]}`,
			false},
		{"another model", `{"model":"m","messages":["` + long + `"]}`, `{"model":"n","messages":["` + long + `"]}`,
			false},
		{"other tools", `{"model":"m","tools":["a"],"messages":["` + long + `"]}`,
			`{"model":"m","tools":["b"],"messages":["` + long + `"]}`, false},
	} {
		a, b := of(c.a), of(c.b)
		if a.source != affinityPrompt || b.source != affinityPrompt || (a == b) != c.together {
			t.Errorf("%s: %v and %v", c.what, a, b)
		}
	}
	for _, body := range []string{`{}`, `{"model":"m","messages":["short"]}`, `{"model":"m","other":"` + long + `"}`} {
		if a := of(body); a != (affinity{}) {
			t.Errorf("%.60s has the affinity %v", body, a)
		}
	}
	p.routing.Affinity = affinityOff
	if a := p.affinityOf("s", []byte(long), &callFields{}); a != (affinity{}) {
		t.Errorf("turned off: %v", a)
	}
	p.routing.Affinity = affinityBySession
	session := p.affinityOf("s", []byte(long), &callFields{})
	if session.source != affinitySession {
		t.Errorf("a session: %v", session)
	}
	if p.upstreams = p.upstreams[:1]; p.affinityOf("s", nil, nil) != (affinity{}) {
		t.Error("a project with one upstream has affinity")
	}
}

// TestAffinityIsCheap: neither finding a call's affinity nor choosing by it allocates.
func TestAffinityIsCheap(t *testing.T) {
	p := affinityPool(1, 2, 3)
	body := []byte(`{"model":"m","messages":["` + strings.Repeat("x", 100_000) + `"]}`)
	f := mustScan(scanJSON(body))
	for _, session := range []string{"", "0b5d4f6e-1f0e-4b0c-9a3e-2f6c1d7e8a90"} {
		c := criteria{api: apiOpenAI, now: 1}
		if n := testing.AllocsPerRun(100, func() {
			c.affinity = p.affinityOf(session, body, &f)
			p.pickUpstream(&c)
		}); n > 0 {
			t.Errorf("%q: %v allocations", c.affinity.source, n)
		}
	}
}

// BenchmarkAffinity finds the affinity of a call and chooses among four upstreams.
func BenchmarkAffinity(b *testing.B) {
	p := affinityPool(1, 2, 3, 4)
	body := []byte(`{"model":"m","messages":["` + strings.Repeat("x", 100_000) + `"]}`)
	f := mustScan(scanJSON(body))
	for _, c := range []struct{ name, session, setting string }{
		{"none", "", affinityOff}, {"session", "0b5d4f6e-1f0e-4b0c-9a3e-2f6c1d7e8a90", ""}, {"prompt", "", ""}} {
		b.Run(c.name, func(b *testing.B) {
			p.routing.Affinity = c.setting
			want := criteria{api: apiOpenAI, now: 1}
			b.ReportAllocs()
			for b.Loop() {
				want.affinity = p.affinityOf(c.session, body, &f)
				p.pickUpstream(&want)
			}
		})
	}
}

// A promptCache is a provider that caches prompts by key: a prompt that it has seen with a key counts as cached.
type promptCache struct {
	mu   sync.Mutex
	seen map[string]bool
}

// script answers for the upstream with a key. The first message names the prompt.
func (p *promptCache) script(key string) func(*providerConn, recordedRequest) bool {
	return func(c *providerConn, r recordedRequest) bool {
		prompt, cached := key+between(r.body, `"content":"`, " "), 0
		p.mu.Lock()
		if p.seen[prompt] {
			cached = 1024
		}
		p.seen[prompt] = true
		p.mu.Unlock()
		return c.reply(200, strings.Replace(chatResponseBody, `"usage":{"prompt_tokens":9,`,
			fmt.Sprintf(`"usage":{"prompt_tokens":1280,"prompt_tokens_details":{"cached_tokens":%d},`, cached), 1))
	}
}

// TestAffinityKeepsCachesWarm: with four keys of a provider that caches by key, at least 95 % of the calls after a
// session's first are answered from its cache, instead of a few at random. An upstream that fails loses its own
// sessions only.
func TestAffinityKeepsCachesWarm(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	provider := &promptCache{seen: map[string]bool{}}
	p.provider.setScript(provider.script("0"))
	var second *fakeProvider
	for i := range 3 {
		u, _ := p.addUpstream(`"weight":1`)
		u.setScript(provider.script(fmt.Sprint(i + 1)))
		second = u
	}
	const sessions, turns = 16, 5
	// hits returns the share of the calls after the first of each session that are cached. Each setting has its own
	// prompts.
	hits := func(setting string, member func(session, turn int) string, headers func(session int) []string) float64 {
		p.changeProject(`"routing":{"affinity":"` + setting + `"}`)
		var calls sync.WaitGroup
		var mu sync.Mutex
		cached := 0
		for s := range sessions {
			calls.Go(func() {
				for turn := range turns {
					res := p.do("POST", "/v1/chat/completions", member(s, turn), p.jsonHeaders(headers(s)...)...)
					var v struct {
						Usage struct {
							Details struct {
								Cached int `json:"cached_tokens"`
							} `json:"prompt_tokens_details"`
						}
					}
					if err := json.Unmarshal([]byte(res.body), &v); err != nil || res.status != 200 {
						t.Errorf("got %d %s", res.status, res.body)
						return
					}
					mu.Lock()
					if turn > 0 && v.Usage.Details.Cached > 0 {
						cached++
					}
					mu.Unlock()
				}
			})
		}
		calls.Wait()
		return float64(cached) / (sessions * (turns - 1))
	}
	long := strings.Repeat("word ", minCachedPrompt/5)
	prompt := func(name string) func(session, turn int) string {
		return func(session, turn int) string {
			return fmt.Sprintf(`{"model":"gpt-4o","messages":[{"role":"user","content":"%s-%d %s"}%s]}`, name, session,
				long, strings.Repeat(`,{"role":"user","content":"more"}`, turn))
		}
	}
	none := func(int) []string { return nil }
	random, byPrompt := hits("none", prompt("r"), none), hits("session", prompt("p"), none)
	short := func(session, turn int) string {
		return fmt.Sprintf(`{"model":"gpt-4o","messages":[{"role":"user","content":"s-%d of %d"}]}`, session, turn)
	}
	bySession := hits("session", short, func(session int) []string {
		return []string{"X-Claude-Code-Session-Id", fmt.Sprint("session-", session)}
	})
	if row := p.lastCall(); bySession < 0.95 || row.RoutedBy != string(affinitySession) {
		t.Errorf("by session, %.2f of the calls are cached; they were routed by %q", bySession, row.RoutedBy)
	}
	p.do("POST", "/v1/chat/completions", prompt("p")(0, 1), p.jsonHeaders()...)
	if row := p.lastCall(); row.RoutedBy != string(affinityPrompt) {
		t.Errorf("a long prompt was routed by %q", row.RoutedBy)
	}
	t.Logf("cached after a session's first call: %.0f %% at random, %.0f %% by prompt", 100*random, 100*byPrompt)
	if random > 0.8 || byPrompt < 0.95 {
		t.Errorf("%.2f of the calls are cached at random, %.2f by prompt", random, byPrompt)
	}
	second.setScript(replyScript(429, `{"error":{"message":"rate limited"}}`, "Retry-After: 60"))
	if again := hits("session", prompt("p"), none); again < 0.95 { // its sessions warm another key with one call
		t.Errorf("with one key less, %.2f are cached", again)
	}
	p.instance.health.reset(4, time.Now().UnixMilli())
	second.setScript(provider.script("3"))
	if back := hits("session", prompt("p"), none); back < 1 {
		t.Errorf("after the key has come back, %.2f are cached", back)
	}
	p.checkPromptCacheShare()
}

// checkPromptCacheShare holds the dashboard's share of cached input, and its download, against the calls.
func (p *testProxy) checkPromptCacheShare() {
	p.t.Helper()
	p.waitSettled()
	var sum usageSum
	for _, r := range p.allRequests() {
		sum.add(&r.requestRow)
	}
	share := percent(100 * float64(sum.cached) / float64(sum.input))
	b := p.signIn(p.adminKey)
	texts := []string{`aria-label="Prompt caches: Models"`, `">` + share + `</td>`,
		"had cached " + groupDigits(sum.cached) + " input tokens, " + share + " of all input. That saved $"}
	for _, query := range []string{"?period=24h", "?period=30d&by=model", "?project=" + p.project} {
		page := b.get("/admin/dashboard" + query).body
		for _, text := range texts {
			if !strings.Contains(page, text) {
				p.t.Errorf("%s: the dashboard lacks %q", query, text)
			}
		}
		if strings.Contains(page, "Prompt caches: Projects") == strings.Contains(query, "project=") {
			p.t.Errorf("%s: projects are listed for one project, or not for all", query)
		}
	}
	var usage struct {
		Data []struct {
			Cached int64   `json:"cached_tokens"`
			Saved  float64 `json:"prompt_cache_saved"`
		}
	}
	p.manage("GET", "/manage/usage?interval=total&group_by=project", "", 200, &usage)
	if n := usage.Data[0]; n.Cached != sum.cached || n.Saved <= 0 {
		p.t.Errorf("the usage is %+v", n)
	}
	form := url.Values{"period": {"7d"}, "by": {"project"}, "measure": {"calls"}}
	lines, err := csv.NewReader(strings.NewReader(b.post("/admin/dashboard/export", form).body)).ReadAll()
	if err != nil {
		p.t.Fatal(err)
	}
	column := slices.Index(lines[0], "cached_tokens")
	found := map[string]string{}
	for _, line := range lines[1:] {
		if line[column] != "0" && line[0] != "time" {
			found[line[0]] = line[column]
		}
	}
	if n := formatInt(sum.cached); found["project"] != n || found["model"] != n {
		p.t.Errorf("the download has %v cached tokens, want %s", found, n)
	}
}

// TestClientRetries: what clients say about calls that they send again is on record, is counted, and is bounded. Of an
// Idempotency-Key, only a keyed hash is stored, which differs from token to token.
func TestClientRetries(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	const key = "idempotent-canary-8Hs2"
	p.secrets = append(p.secrets, key)
	_, other := p.newToken(`"name":"other"`)
	_, narrow := p.newToken(`"name":"narrow","policy":{"models":["o3"]}`)
	hashes := map[string]bool{}
	retries := 0
	for i, c := range []struct {
		token, header, value string
		retry                int64
		counts               bool
	}{
		{p.token, "", "", 0, false},
		{p.token, "X-Stainless-Retry-Count", "0", 0, false},
		{p.token, "X-Stainless-Retry-Count", "2", 2, true},
		{p.token, "X-Stainless-Retry-Count", "4000000000", maxClientRetry, true},
		{p.token, "X-Stainless-Retry-Count", "99999999999999999999", 0, false},
		{p.token, "X-Stainless-Retry-Count", "-1", 0, false},
		{p.token, "X-Stainless-Retry-Count", "one", 0, false},
		{p.token, "Idempotency-Key", key, 0, false},
		{p.token, "Idempotency-Key", key, 0, true},
		{other, "Idempotency-Key", key, 0, false},
		{p.token, "Idempotency-Key", key + "2", 0, false},
		{p.token, "Idempotency-Key", "", 0, false},
		{narrow, "X-Stainless-Retry-Count", "1", 1, true}, // refused
	} {
		headers := []string{"Authorization", "Bearer " + c.token, "Content-Type", "application/json"}
		if c.header != "" {
			headers = append(headers, c.header, c.value)
		}
		p.do("POST", "/v1/chat/completions", chatBody(), headers...)
		row := p.lastCall()
		hasKey := c.header == "Idempotency-Key" && c.value != ""
		if row.ClientRetry != c.retry || (row.IdempotencyHash != "") != hasKey {
			t.Errorf("case %d: got %d and %q", i, row.ClientRetry, row.IdempotencyHash)
		}
		if hash := row.IdempotencyHash; hash != "" {
			if hashes[hash] != c.counts {
				t.Errorf("case %d: the hash %s", i, hash)
			}
			hashes[hash] = true
		}
		if c.counts {
			retries++
		}
	}
	var usage struct {
		Data []struct {
			Retries int `json:"client_retries"`
		}
	}
	for _, group := range []string{"", "&group_by=project,token,outcome", "&group_by=model"} {
		p.manage("GET", "/manage/usage?interval=total"+group, "", 200, &usage)
		sum := 0
		for _, u := range usage.Data {
			sum += u.Retries
		}
		if sum != retries {
			t.Errorf("%s: the usage has %d retries, want %d", group, sum, retries)
		}
	}
	if n := p.metrics()[`llm_proxy_client_retries_total{project="`+p.project+`"}`]; n != float64(retries) {
		t.Errorf("the metrics have %v retries", n)
	}
	b := p.signIn(p.adminKey)
	if page := b.get("/admin/dashboard").body; !strings.Contains(page, fmt.Sprint(retries, " retries of clients")) {
		t.Error("the dashboard does not count the retries")
	}
	page := b.get("/admin/requests/" + p.lastCall().ID).body
	if !strings.Contains(page, "<dt>Retry of the client</dt><dd>1</dd>") {
		t.Errorf("the call's page does not show the retry: %s", page)
	}
}

// TestRetryStorms: a request that fails again and again is named under "Needs attention", with its token, its project,
// how and how often it failed, and a link to its calls, until it succeeds. Different requests are no storm.
func TestRetryStorms(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.Contains(r.body, "fails") {
			return c.reply(400, `{"error":{"message":"no","type":"invalid_request_error"}}`)
		}
		return chatScript(c, r)
	})
	b := p.signIn(p.adminKey)
	alert := func() string {
		p.waitSettled()
		page := b.get("/admin/dashboard?project=" + p.project).body
		return between(page, `<span class="state warn">Retries</span>`, "</li>")
	}
	var calls sync.WaitGroup
	for i := range 2 * stormFailures {
		calls.Go(func() { p.chat(fmt.Sprintf(`"user":"fails %d"`, 10+i)) })
	}
	for range stormFailures - 1 {
		calls.Go(func() { p.chat(`"user":"fails"`) })
	}
	calls.Wait()
	if text := alert(); text != "" {
		t.Errorf("nine failures, and different ones, are a storm: %s", text)
	}
	for range stormFailures + 2 {
		calls.Go(func() { p.chat(`"metadata":"fails"`) })
	}
	calls.Wait()
	text := alert()
	for _, want := range []string{"/admin/tokens/" + p.tokenID, "of project test", "POST /v1/chat/completions",
		`/admin/requests?from=`, "token=" + p.tokenID, ">12 times</a>", "(status 400)"} {
		if !strings.Contains(text, want) {
			t.Errorf("the alert lacks %q: %s", want, text)
		}
	}
	link := strings.ReplaceAll(between(text, `<a href="/admin/requests`, `"`), "&amp;", "&")
	if page := b.get("/admin/requests" + link); page.status != 200 || strings.Count(page.body, hitLink) < 12 {
		t.Errorf("the link leads to %d %s", page.status, page.body)
	}
	if n := p.metrics()["llm_proxy_retry_storms_total"]; n != 1 {
		t.Errorf("the metrics have %v storms", n)
	}
	p.provider.setScript(chatScript)
	p.chat(`"metadata":"fails"`)
	if text := alert(); text != "" {
		t.Errorf("the request has succeeded, but is still a storm: %s", text)
	}
	_, narrow := p.newToken(`"name":"narrow","policy":{"models":["o3"]}`)
	for range stormFailures { // refused by a policy
		p.chatAs(narrow)
	}
	if text := alert(); !strings.Contains(text, "(model_not_allowed)") {
		t.Errorf("a refused request is no storm: %q", text)
	}
}

// TestRetryTrackerBounded: no client can make the tracker grow, or push another token's storm out of it. Failures that
// are long past do not add up.
func TestRetryTrackerBounded(t *testing.T) {
	t.Parallel()
	tracker, e := newRetryTracker(newMetrics()), &endpoint{method: "POST", pattern: "/v1/x"}
	call := func(token int64, body string, at int64, outcome callOutcome) {
		c := &sentCall{token: &tokenState{seq: token, id: fmt.Sprint("tok_", token)}, project: &projectState{},
			endpoint: e, body: []byte(body)}
		tracker.record(c, &requestRow{started: at, outcome: outcome, status: 500})
	}
	const set, now = 256, 10 * hourMS
	for range stormFailures {
		call(1, "storm", now, outcomeUpstreamError)
	}
	for i := range 20_000 { // of tokens in the same set
		call(1+set*int64(1+i%50), fmt.Sprint("body ", i), now, outcomeUpstreamError)
	}
	if list := tracker.storms(now); len(list) != 1 || list[0].tokenID != "tok_1" || list[0].failures != stormFailures {
		t.Fatalf("the storms are %+v", list)
	}
	for i := range int64(3) { // a token has two entries at most
		for range stormFailures {
			call(2, fmt.Sprint("storm ", i), now, outcomeUpstreamError)
		}
	}
	if list := tracker.storms(now); len(list) != 3 {
		t.Errorf("the storms are %+v", list)
	}
	if list := tracker.storms(now + stormMemoryMS + 1); len(list) != 0 {
		t.Errorf("an hour later, the storms are %+v", list)
	}
	for i := range int64(3 * stormFailures) {
		call(3, "now and then", now+i*(failureMemoryMS+1), outcomeUpstreamError)
	}
	for i := range 3 * stormFailures {
		call(4, "mostly fails", now, []callOutcome{outcomeUpstreamError, outcomeUpstreamError, outcomeOK}[i%3])
	}
	if list := tracker.storms(now); slices.ContainsFunc(list, func(e failingRequest) bool { return e.token > 2 }) {
		t.Errorf("the storms are %+v", list)
	}
}
