// These tests hold the choice among a project's upstreams, its routing, and upstreams' own limits.
package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// testPool returns a project with these upstreams, all healthy.
func testPool(list ...*upstream) *projectState {
	tracker := newHealthTracker()
	for i, u := range list {
		u.health, u.retryBudget = tracker.forUpstream(int64(i+1), u.id), tracker.budgetFor(u.host)
	}
	return &projectState{upstreams: list}
}

// TestUpstreamShares: calls go to the first priority that serves them, in shares by weight; weight 0 gets none. An
// unhealthy upstream is skipped, and gets its share again when it recovers.
func TestUpstreamShares(t *testing.T) {
	t.Parallel()
	p := testPool(
		&upstream{id: "a", provider: providerOpenAI, weight: 1},
		&upstream{id: "claude", provider: providerAnthropic, weight: 9},
		&upstream{id: "b", provider: providerCompatible, weight: 3, models: []string{"gpt*"}},
		&upstream{id: "out", provider: providerOpenAI, weight: 0},
		&upstream{id: "c", provider: providerOpenAI, weight: 6, models: []string{"o*"}},
		&upstream{id: "d", provider: providerOpenAI, weight: 1, models: []string{"o*"}},
		&upstream{id: "e", provider: providerOpenAI, weight: 2, models: []string{"o*"}},
		&upstream{id: "spare", provider: providerOpenAI, weight: 5, priority: 1},
		&upstream{id: "last", provider: providerOpenAI, weight: 5, priority: 2},
	)
	health := map[string]*keyHealth{}
	for _, u := range p.upstreams {
		health[u.id] = u.health
	}
	const now, calls = 1_000_000, 40_000
	for _, c := range []struct {
		name, model string
		do          func()
		now         int64
		want        map[string]float64
	}{
		{name: "weights", model: "gpt-4o", now: now, want: map[string]float64{"a": 0.25, "b": 0.75}},
		{name: "only one serves", model: "llama", now: now, want: map[string]float64{"a": 1}},
		{name: "of four", model: "o3", now: now, want: map[string]float64{"a": 0.1, "c": 0.6, "d": 0.1, "e": 0.2}},
		{name: "one is cooling", model: "o3", do: func() { health["c"].recordRateLimit(now, now, 20_000, "") },
			now:  now + 1,
			want: map[string]float64{"a": 0.25, "d": 0.25, "e": 0.5}},
		{name: "the cooldown is over", model: "o3", now: now + 20_000,
			want: map[string]float64{"a": 0.1, "c": 0.6, "d": 0.1, "e": 0.2}},
		{name: "two are dead", model: "o3", do: func() {
			health["a"].recordFailure(now+20_001, now+20_000, true, "")
			health["c"].recordRejected(now+20_001, now+20_000, "")
		}, now: now + 20_002, want: map[string]float64{"d": 0.33, "e": 0.67}},
		{name: "a group is down", model: "gpt-4o",
			do: func() { health["b"].recordExhausted(now+20_001, now+20_000, "") }, now: now + 20_002,
			want: map[string]float64{"spare": 1}},
		{name: "two groups are", model: "gpt-4o",
			do: func() { health["spare"].recordFailure(now+20_001, now+20_000, true, "") }, now: now + 20_002,
			want: map[string]float64{"last": 1}},
		{name: "all are: the least bad", model: "gpt-4o",
			do: func() { health["last"].recordRateLimit(now+20_001, now+20_000, 5000, "") }, now: now + 20_002,
			want: map[string]float64{"last": 1}},
		{name: "a probe goes out, once", model: "gpt-4o", now: now + 20_001 + breakerMinPause,
			want: map[string]float64{"last": 1}},
	} {
		if c.do != nil {
			c.do()
		}
		got := map[string]int{}
		for range calls {
			got[p.pickUpstream(&criteria{api: apiOpenAI, model: c.model, now: c.now}).id]++
		}
		if c.name == "a probe goes out, once" { // one to each that is due, all others to the one that recovers first
			if got["a"] != 1 || got["spare"] != 1 {
				t.Errorf("%s: %v", c.name, got)
			}
			continue
		}
		if len(got) != len(c.want) {
			t.Errorf("%s: %v", c.name, got)
		}
		for id, share := range c.want { // ±2 % of the calls is 8 standard deviations and more
			if d := float64(got[id])/calls - share; d > 0.02 || d < -0.02 {
				t.Errorf("%s: %s got %d of %d calls, want a share of %.2f", c.name, id, got[id], calls, share)
			}
		}
	}
	if u := testPool(p.upstreams[3]).pickUpstream(&criteria{api: apiOpenAI}); u != nil {
		t.Errorf("weight 0: %s was chosen", u.id)
	}
}

// TestRewrite: only the model's name changes in a body, and each attempt uses the name that its upstream knows.
func TestRewrite(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream,
		`{"rewrite":{"gpt-4o-mini":"my \u0022deployment\u0022"}}`, 400, nil)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream,
		`{"rewrite":{"gpt-4o-mini":"a","gpt-4o-mini":"b"}}`, 400, nil)
	p.changeUpstream(p.upstream, `"rewrite":{"gpt-4o-mini":"my-deployment"}`)
	second, _ := p.addUpstream(`"priority":1,"rewrite":{"gpt-4o-mini":"é\u0022"}`)
	for _, body := range []string{
		chatBody(), chatBody(`"stream":true`), chatBody(`"stream":true`, `"stream_options":{"include_usage":false}`),
		`{"stream_options":{},  "stream":true, "messages":[], "mo\u0064el" : "gpt-4o\u002dmini" , "n":1}`,
	} {
		for fails := range 2 {
			if p.provider.setScript(chatScript); fails == 1 {
				p.provider.setScript(replyScript(429, `{}`))
			}
			p.instance.health.reset(1, time.Now().UnixMilli())
			if res := p.do("POST", "/v1/chat/completions", body, p.jsonHeaders()...); res.status != 200 {
				t.Fatalf("got %d %s", res.status, res.body)
			}
			added := string(withIncludeUsage([]byte(body), mustScan(scanJSON([]byte(body)))))
			if !strings.Contains(body, `"stream":true`) {
				added = body
			}
			model := `"gpt-4o-mini"`
			if strings.Contains(body, `\u002d`) {
				model = `"gpt-4o\u002dmini"`
			}
			want := strings.Replace(added, model, `"my-deployment"`, 1)
			if got := p.provider.lastRequest(t).body; got != want {
				t.Errorf("the provider got %s, want %s", got, want)
			}
			want = strings.Replace(added, model, `"é\""`, 1)
			if fails == 1 && second.lastRequest(t).body != want {
				t.Errorf("the second got %s, want %s", second.lastRequest(t).body, want)
			}
		}
	}
	p.provider.setScript(chatScript)
	p.instance.health.reset(1, time.Now().UnixMilli())
	form := func(model string) string {
		return "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\ngpt-4o-mini\r\n" +
			"--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n" + model + "\r\n--b--\r\n"
	}
	p.do("POST", "/v1/audio/transcriptions", form("gpt-4o-mini"), "Authorization", "Bearer "+p.token,
		"Content-Type", "multipart/form-data; boundary=b")
	if got, want := p.provider.lastRequest(t).body, form("my-deployment"); got != want {
		t.Errorf("the form came as %q, want %q", got, want)
	}
}

func mustScan(f callFields, err error) callFields {
	if err != nil {
		panic(err)
	}
	return f
}

// TestFallbackModel: a call goes to the fallback model if it is too long for its model or no upstream answers for
// that. It does not after a refusal by a content filter, or if the token may not use the fallback model.
func TestFallbackModel(t *testing.T) {
	t.Parallel()
	const tooLong = `{"error":{"message":"too long","type":"invalid_request_error","param":"messages",` +
		`"code":"context_length_exceeded"}}`
	byModel := func(status int, body string) func(*providerConn, recordedRequest) bool {
		return func(c *providerConn, r recordedRequest) bool {
			if strings.Contains(r.body, `"gpt-4.1"`) {
				return c.reply(200,
					strings.ReplaceAll(chatResponseBody, "gpt-4o-mini-2024-07-18", "gpt-4.1-2025-04-14"))
			}
			return c.reply(status, body)
		}
	}
	for _, c := range []struct {
		name, routing, policy string
		script                func(*providerConn, recordedRequest) bool
		status                int
		models                []string // sent, in order
	}{
		{name: "too long", routing: `{"fallbacks":[{"model":"gpt-4o*","to":"gpt-4.1"}]}`, policy: `{}`,
			script: byModel(400, tooLong), status: 200, models: []string{"gpt-4o-mini", "gpt-4.1"}},
		{name: "too long, in words", routing: `{"fallbacks":[{"model":"gpt-4o*","to":"gpt-4.1"}]}`, policy: `{}`,
			script: byModel(400, `{"error":{"message":"This model's maximum context length is 9 tokens.","code":400}}`),
			status: 200, models: []string{"gpt-4o-mini", "gpt-4.1"}},
		{name: "no fallback", routing: `{}`, policy: `{}`, script: byModel(400, tooLong), status: 400,
			models: []string{"gpt-4o-mini"}},
		{name: "of another model", routing: `{"fallbacks":[{"model":"o3","to":"gpt-4.1"}]}`, policy: `{}`,
			script: byModel(400, tooLong), status: 400, models: []string{"gpt-4o-mini"}},
		{name: "not allowed", routing: `{"fallbacks":[{"model":"*","to":"gpt-4.1"}]}`, policy: `{"models":["gpt-4o*"]}`,
			script: byModel(400, tooLong), status: 400, models: []string{"gpt-4o-mini"}},
		{name: "content filter", routing: `{"fallbacks":[{"model":"*","to":"gpt-4.1"}]}`, policy: `{}`,
			script: byModel(400, `{"error":{"code":"content_filter"}}`), status: 400, models: []string{"gpt-4o-mini"}},
		{name: "too long twice",
			routing: `{"fallbacks":[{"model":"*","to":"gpt-4.2"},{"model":"gpt-4.2","to":"gpt-4.1"}]}`, policy: `{}`,
			script: byModel(400, tooLong), status: 400, models: []string{"gpt-4o-mini", "gpt-4.2"}},
	} {
		p := newTest(t, nil)
		p.manage("PATCH", "/manage/projects/"+p.project, `{"routing":`+c.routing+`,"policy":`+c.policy+`}`, 200, nil)
		p.provider.setScript(c.script)
		res := p.chat()
		if n := len(p.ledger()); res.status != c.status || n != 1 {
			t.Errorf("%s: got %d %s, and the ledger has %d rows", c.name, res.status, res.body, n)
		}
		var models []string
		for _, r := range p.provider.received() {
			models = append(models, between(r.body, `"model":"`, `"`))
		}
		if !slices.Equal(models, c.models) {
			t.Errorf("%s: the provider got %v, want %v", c.name, models, c.models)
		}
		row := p.lastCall()
		if c.status == 200 && (row.Model != "gpt-4.1-2025-04-14" || row.Outcome != "ok" || row.Attempts != 2 ||
			row.AttemptLog[1].Model != "gpt-4.1" || row.Cost == nil ||
			!strings.Contains(res.body, "gpt-4.1-2025-04-14")) {
			t.Errorf("%s: the ledger has %+v", c.name, row)
		}
	}
}

// TestFallbackModelElsewhere: if all upstreams of a model are down, the call goes to another model's upstream.
func TestFallbackModelElsewhere(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.changeProject(`"routing":{"fallbacks":[{"model":"gpt-4o*","to":"llama"}],"show_upstream":true}`)
	p.changeUpstream(p.upstream, `"models":["gpt*"]`)
	other, id := p.addUpstream(`"models":["llama"]`)
	p.provider.setScript(replyScript(503, `{}`))
	if res := p.chat(); res.status != 200 || res.header.Get("X-LLM-Proxy-Upstream") != id {
		t.Errorf("a model that is down: got %d %v %s", res.status, res.header, res.body)
	}
	if n, m := len(p.provider.received()), len(other.received()); n != 2 || m != 1 ||
		between(other.lastRequest(t).body, `"model":"`, `"`) != "llama" {
		t.Errorf("the providers got %d and %d requests", n, m)
	}
}

// waitForMinute returns when at least room seconds of the current minute are left: an upstream's own limits count
// by the minute, and the test must fit into one.
func waitForMinute(room int) {
	for 60-time.Now().Second() < room {
		time.Sleep(50 * time.Millisecond)
	}
}

// TestOwnLimits: an upstream's own limits per minute are never exceeded. Other calls go elsewhere; without another
// upstream, they are told when to retry.
func TestOwnLimits(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	second, id := p.addUpstream(`"priority":1,"requests_per_minute":2`)
	p.changeUpstream(p.upstream, `"requests_per_minute":3`)
	waitForMinute(10)
	statuses := make(chan int)
	for range 8 {
		go func() { statuses <- p.chat().status }()
	}
	got := map[int]int{}
	for range 8 {
		got[<-statuses]++
	}
	if n, m := len(p.provider.received()), len(second.received()); n != 3 || m != 2 || got[200] != 5 || got[429] != 3 {
		t.Errorf("the providers got %d and %d calls, clients %v", n, m, got)
	}
	if res := p.chat(); res.errorCode() != "rate_limit_exceeded" || res.header.Get("Retry-After") == "" {
		t.Errorf("got %d %v %s", res.status, res.header, res.body)
	}
	p.changeUpstream(id, `"requests_per_minute":0,"tokens_per_minute":100`)
	answered := 0
	for range 8 { // each uses 12 tokens, as the two before, and is expected to read 25
		if p.waitSettled(); p.chat().status == 200 {
			answered++
		}
	}
	if answered != 5 {
		t.Errorf("100 tokens a minute let %d calls through after 2", answered)
	}
}

// manyAliases returns n members of an object of aliases.
func manyAliases(n int) string {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf(`"a%d":"b"`, i))
	}
	return strings.Join(list, ",")
}

// TestRoutingRefused: invalid routing is refused with the field's name.
func TestRoutingRefused(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	refused := func(path, body, param string) {
		t.Helper()
		res := p.manageAs(p.adminKey, "PATCH", "/manage/projects/"+p.project+path, body)
		expectParamError(t, body, res, 400, param)
	}
	for body, param := range map[string]string{
		`{"routing":{"fallbacks":[{"model":"a*b","to":"c"}]}}`:                "routing.fallbacks[0].model",
		`{"routing":{"fallbacks":[{"model":"a"}]}}`:                           "routing.fallbacks[0].to",
		`{"routing":{"fallbacks":[{"model":"a","to":"b*"}]}}`:                 "routing.fallbacks[0].to",
		`{"routing":{"fallbacks":[{"model":"a","tp":"b"}]}}`:                  "routing.fallbacks[0].tp",
		`{"routing":{"fallbacks":[1]}}`:                                       "routing.fallbacks[0]",
		`{"routing":{"aliases":[]}}`:                                          "routing.aliases",
		`{"routing":{"aliases":null}}`:                                        "routing.aliases",
		`{"routing":{"aliases":{"a b":"c"}}}`:                                 "routing.aliases",
		`{"routing":{"aliases":{"a":"b","a":"c"}}}`:                           "routing.aliases",
		`{"routing":{"aliases":{"a":null}}}`:                                  "routing.aliases[a]",
		`{"routing":{"aliases":{"a":""}}}`:                                    "routing.aliases[a]",
		`{"routing":{"aliases":{"a":"b*"}}}`:                                  "routing.aliases[a]",
		`{"routing":{"aliases":{"a":[]}}}`:                                    "routing.aliases[a]",
		`{"routing":{"aliases":{"a":["b",1]}}}`:                               "routing.aliases[a]",
		`{"routing":{"aliases":{"a":["b","b"]}}}`:                             "routing.aliases[a]",
		`{"routing":{"aliases":{"a":["1","2","3","4","5","6","7","8","9"]}}}`: "routing.aliases[a]",
		`{"routing":{"aliases":{` + manyAliases(101) + `}}}`:                  "routing.aliases",
		`{"routing":{"fallback":[]}}`:                                         "routing.fallback",
		`{"routing":{"verified_streams":1}}`:                                  "routing.verified_streams",
		`{"routing":{"affinity":"token"}}`:                                    "routing.affinity",
		`{"routing":{"affinity":""}}`:                                         "routing.affinity",
		`{"routing":[]}`:                                                      "routing",
	} {
		refused("", body, param)
	}
	for body, param := range map[string]string{
		`{"rewrite":[]}`:                                     "rewrite",
		`{"rewrite":{"a":1}}`:                                "rewrite",
		`{"rewrite":{"a":""}}`:                               "rewrite",
		`{"rewrite":{"a*":"b"}}`:                             "rewrite",
		`{"connect_ms":99}`:                                  "connect_ms",
		`{"connect_ms":10001}`:                               "connect_ms",
		`{"connect_ms":"1s"}`:                                "connect_ms",
		`{"answer_ms":99}`:                                   "answer_ms",
		`{"answer_ms":7200001}`:                              "answer_ms",
		`{"first_event_ms":50}`:                              "first_event_ms",
		`{"idle_ms":-1}`:                                     "idle_ms",
		`{"requests_per_minute":-1}`:                         "requests_per_minute",
		`{"tokens_per_minute":1.5}`:                          "tokens_per_minute",
		`{"note":"a\nb"}`:                                    "note",
		fmt.Sprintf(`{"note":%q}`, strings.Repeat("x", 501)): "note",
	} {
		refused("/upstreams/"+p.upstream, body, param)
	}
}

// TestTryRoute: the explanation of a route matches what calls then do, and explaining changes nothing.
func TestTryRoute(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.changeUpstream(p.upstream, `"weight":3,"rewrite":{"gpt-4o":"mine"},"connect_ms":1500,"answer_ms":30000`)
	p.changeProject(`"routing":{"fallbacks":[{"model":"gpt*","to":"gpt-4.1"}]}`)
	p.addUpstream(`"weight":1`)
	p.addUpstream(`"weight":1,"priority":1`)
	p.addUpstream(`"weight":0`)
	p.addUpstream(`"models":["llama*"]`)
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams",
		`{"name":"claude","provider":"anthropic","api_key":"sk-ant-12345678"}`, 201, nil)
	route := func(query string) (v routeView) {
		p.manage("GET", "/manage/projects/"+p.project+"/route?"+query, "", 200, &v)
		return v
	}
	check := func(what string, v routeView, want map[string]float64) {
		t.Helper()
		for _, u := range v.Upstreams {
			if u.Share != want[u.UpstreamID] || u.Why == "" {
				t.Errorf("%s: %+v, want the share %v", what, u, want[u.UpstreamID])
			}
		}
	}
	v := route("model=gpt-4o")
	var ids []string
	for _, u := range v.Upstreams {
		ids = append(ids, u.UpstreamID)
	}
	if len(ids) != 6 || ids[0] != p.upstream || v.Upstreams[0].SentModel != "mine" || v.FallbackModel != "gpt-4.1" {
		t.Fatalf("got %+v", v)
	}
	if u := v.Upstreams[0]; u.ConnectMS != 1500 || u.AnswerMS != 30000 || u.IdleMS != 0 ||
		v.Upstreams[1].AnswerMS != 0 {
		t.Errorf("the times that a call waits there: %+v", v.Upstreams)
	}
	page := p.signIn(p.adminKey).get("/admin/projects/" + p.project + "/route?model=gpt-4o").body
	if strings.Count(page, "Timeouts:") != 1 || !strings.Contains(page, "connect 1.5s, response 30s") {
		t.Errorf("the page does not say how long a call waits: %s", page)
	}
	check("all healthy", v, map[string]float64{ids[0]: 0.75, ids[1]: 0.25})
	chosen := map[string]int{}
	for i := range 40 {
		for _, u := range route(fmt.Sprint("model=gpt-4o&session=", i)).Upstreams {
			if u.Share == 1 && strings.Contains(u.Why, "this session") {
				chosen[u.UpstreamID]++
			}
		}
	}
	if chosen[ids[0]]+chosen[ids[1]] != 40 || len(chosen) != 2 {
		t.Errorf("40 sessions went to %v", chosen)
	}
	now := time.Now().UnixMilli()
	p.instance.health.forUpstream(1, "").recordRejected(now, now, "the provider refuses the key")
	check("one refused", route("model=gpt-4o&api=openai"), map[string]float64{ids[1]: 1})
	check("a model of one", route("model=llama-3"), map[string]float64{ids[1]: 0.5, ids[3]: 0.5})
	check("another API", route("model=claude&api=anthropic"), map[string]float64{ids[4]: 1})
	if n := len(p.provider.received()); n != 0 {
		t.Errorf("the provider got %d requests", n)
	}
	for query, param := range map[string]string{"": "model", "model=a&api=x": "api", "model=a%20b": "model",
		"model=a&session=" + strings.Repeat("s", 257): "session"} {
		res := p.manageAs(p.adminKey, "GET", "/manage/projects/"+p.project+"/route?"+query, "")
		if res.status != 400 || between(res.body, `"param":"`, `"`) != param {
			t.Errorf("%q: got %d %s", query, res.status, res.body)
		}
	}
}

// TestMergedModels: the list of models has, of each of the project's providers, the models whose calls may go there
// and that the token may use.
func TestMergedModels(t *testing.T) {
	t.Parallel()
	list := func(ids ...string) func(*providerConn, recordedRequest) bool {
		var entries []string
		for _, id := range ids {
			entries = append(entries, `{"id":"`+id+`","object":"model","owned_by":"x"}`)
		}
		return replyScript(200, `{"object":"list","data":[`+strings.Join(entries, ",")+`]}`)
	}
	p := newTest(t, nil)
	models := func() string {
		t.Helper()
		res := p.do("GET", "/v1/models", "", "Authorization", "Bearer "+p.token)
		var v struct {
			Object string
			Data   []struct{ ID string }
		}
		if err := json.Unmarshal([]byte(res.body), &v); err != nil || res.status != 200 || v.Object != "list" {
			t.Fatalf("got %d %s", res.status, res.body)
		}
		var ids []string
		for _, m := range v.Data {
			ids = append(ids, m.ID)
		}
		return strings.Join(ids, " ")
	}
	p.provider.setScript(list("gpt-4o", "gpt-4o-mini", "o3"))
	if got := models(); got != "gpt-4o gpt-4o-mini o3" {
		t.Errorf("of one upstream: %s", got)
	}
	llama, _ := p.addUpstream(`"models":["llama*","mine"],"rewrite":{"mine":"llama-3"}`)
	llama.setScript(list("llama-3", "llama-4", "other"))
	azure, _ := p.addUpstream(`"priority":1,"rewrite":{"o3":"deployed"}`)
	azure.setScript(list("deployed", "gpt-4o"))
	for range 5 { // whichever would get the call
		if got := models(); got != "gpt-4o gpt-4o-mini o3 llama-3 mine llama-4 deployed" {
			t.Errorf("of three: %s", got)
		}
	}
	if row := p.lastCall(); row.Outcome != "ok" || row.Attempts != 3 || len(row.AttemptLog) != 3 {
		t.Errorf("the ledger has %+v", row)
	}
	p.changeProject(`"policy":{"models":["llama*","o3"]}`)
	if got := models(); got != "o3 llama-3 llama-4" {
		t.Errorf("within a policy: %s", got)
	}
	p.changeProject(`"policy":{}`)
	p.provider.setScript(resetScript)
	azure.setScript(replyScript(200, `no JSON`))
	if got := models(); got != "llama-3 mine llama-4" {
		t.Errorf("with one that answers: %s", got)
	}
	p.checkKeysApart(p.provider, llama, azure)
	llama.setScript(replyScript(503, `{"error":{}}`))
	if res := p.do("GET", "/v1/models", "", "Authorization", "Bearer "+p.token); res.status < 500 {
		t.Errorf("with none: got %d %s", res.status, res.body)
	}
}

// BenchmarkRouting chooses among fifty upstreams in two priorities, each with a list of models; in a second case, a
// fifth of them is unhealthy.
func BenchmarkRouting(b *testing.B) {
	for _, trouble := range []bool{false, true} {
		b.Run(fmt.Sprintf("trouble=%v", trouble), func(b *testing.B) {
			var list []*upstream
			for i := range 50 {
				list = append(list, &upstream{id: fmt.Sprint(i), provider: providerOpenAI, weight: int64(1 + i%3),
					priority: int64(i / 40), models: []string{"gpt-4o-mini", "gpt-4o*", "o3*"}})
			}
			p := testPool(list...)
			if trouble {
				for i := range 10 {
					list[5*i].health.recordFailure(noon, noon, true, "")
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				w := criteria{api: apiOpenAI, model: "gpt-4o", now: noon + 1, tokens: 100}
				if p.pickUpstream(&w) == nil {
					b.Fatal("none")
				}
			}
		})
	}
}

// BenchmarkDeadKey measures the latency of streams at a fixed rate over a pool of three keys: all healthy, and with
// one that fails or hangs. It prints the p99 of the healthy pool, and the ratio of the others to it. It sleeps to
// keep the rate and to make the providers slow.
//
//	go test -run '^$' -bench DeadKey -benchtime 1x .
func BenchmarkDeadKey(b *testing.B) {
	for b.Loop() {
		healthy := deadKeyP99(b, nil)
		b.ReportMetric(float64(healthy.Microseconds()), "healthy-p99-us")
		for _, dead := range []struct {
			name   string
			script func(*providerConn, recordedRequest) bool
		}{
			{"reset", resetScript},
			{"503", replyScript(503, `{}`)}, {"429", replyScript(429, `{}`)}, {"401", replyScript(401, `{}`)},
			{"hangs", stallScript},
		} {
			b.ReportMetric(float64(deadKeyP99(b, dead.script))/float64(healthy), dead.name+"-ratio")
		}
	}
}

func deadKeyP99(b *testing.B, dead func(*providerConn, recordedRequest) bool) time.Duration {
	b.Helper()
	p := newTest(b, map[string]string{"LOG_LEVEL": "error"})
	defer p.stop()
	slow := func(c *providerConn, r recordedRequest) bool {
		time.Sleep(20 * time.Millisecond)
		return chatScript(c, r)
	}
	p.provider.setScript(slow)
	for i := range 2 {
		provider, _ := p.addUpstream(`"weight":1`)
		if provider.setScript(slow); i == 1 && dead != nil {
			provider.setScript(dead)
		}
	}
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}}
	defer client.CloseIdleConnections()
	const calls, every = 2000, time.Second / 200
	took := make([]time.Duration, calls)
	var wait sync.WaitGroup
	begin := time.Now()
	for i := range calls {
		due := begin.Add(time.Duration(i) * every)
		time.Sleep(time.Until(due))
		wait.Go(func() {
			p.chatOver(client, `"stream":true`)
			took[i] = time.Since(due)
		})
	}
	wait.Wait()
	slices.Sort(took)
	return took[calls*99/100]
}

// TestSharedUpstream: an upstream that is shared with a project serves its calls from the next one on, with its key
// and its health, until it is no longer shared, is changed, or is deleted with its project.
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
		before := len(p.provider.received())
		res := p.chatAs(token.Token)
		if asked := len(p.provider.received()) - before; res.status != status || asked != 1 && status == 200 {
			t.Errorf("%s: got %d %s, the provider got %d requests", what, res.status, res.body, asked)
		}
	}
	expect("not shared", 404)
	share(`"`+other.ID+`"`, 200)
	expect("shared", 200)
	if row := p.lastCall(); row.UpstreamID != p.upstream || row.Outcome != "ok" {
		t.Errorf("the ledger has %+v", row)
	}
	for _, ids := range []string{`"` + p.project + `"`, `"proj_nobody"`, `1`} { // its own project is the first
		share(ids, 400)
	}
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
	p.instance.health.forUpstream(1, "").recordRateLimit(now, now, 60_000, "x")
	_, id := p.addUpstream(`"priority":1,"shared_with":["` + other.ID + `"]`)
	if p.chatAs(token.Token).status != 200 || p.lastCall().UpstreamID != id {
		t.Errorf("a key that cools in one project is used in another: %+v", p.lastCall())
	}
	p.manage("DELETE", path, "", 200, nil)
	if res := p.chatAs(token.Token); res.status != 200 {
		t.Errorf("with the other one: got %d", res.status)
	}
	p.manage("DELETE", "/manage/projects/"+p.project, "", 200, nil)
	expect("gone with its project", 404)
}

// TestFallbackModelFirst: if no upstream of a model is ready, its calls go to the fallback model's upstream at once,
// and to a paused key only if that fails. The explanation of the route says so.
func TestFallbackModelFirst(t *testing.T) {
	t.Parallel()
	for name, pause := range map[string]func(h *keyHealth, now int64){
		"open":        func(h *keyHealth, now int64) { h.recordFailure(now, now, true, "x") },
		"cooling":     func(h *keyHealth, now int64) { h.recordRateLimit(now, now, 200_000, "x") },
		"exhausted":   func(h *keyHealth, now int64) { h.recordExhausted(now, now, "x") },
		"quarantined": func(h *keyHealth, now int64) { h.recordRejected(now, now, "x") },
		"at capacity": func(h *keyHealth, now int64) {
			h.admits(now, 1, &upstreamSettings{RequestsPerMinute: 1}, true)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			p.changeProject(`"routing":{"fallbacks":[{"model":"gpt-4o*","to":"llama"}]},` +
				`"policy":{"limits":[{"count":"dollars","max":5,"per":"day"}]}`)
			p.changeUpstream(p.upstream, `"models":["gpt*"]`)
			if name == "at capacity" {
				p.changeUpstream(p.upstream, `"requests_per_minute":1`)
				waitForMinute(10)
			}
			other, id := p.addUpstream(`"models":["llama"],"rewrite":{"llama":"llama-70b"}`)
			h, now := p.instance.health.forUpstream(1, ""), time.Now().UnixMilli()
			pause(h, now)
			if name == "open" {
				h.until.Store(now + hourMS)
			}
			for _, stream := range []bool{false, true} {
				if res := p.chat(fmt.Sprintf(`"stream":%v`, stream)); res.status != 200 {
					t.Errorf("got %d %s", res.status, res.body)
				}
			}
			if n, m := len(p.provider.received()), len(other.received()); n != 0 || m != 2 ||
				between(other.lastRequest(t).body, `"model":"`, `"`) != "llama-70b" {
				t.Errorf("the providers got %d and %d requests", n, m)
			}
			if row := p.lastCall(); row.Attempts != 1 || row.UpstreamID != id || row.Cost == nil {
				t.Errorf("the ledger has %+v", row)
			}
			var v routeView
			p.manage("GET", "/manage/projects/"+p.project+"/route?model=gpt-4o", "", 200, &v)
			if own, to := v.Upstreams[0], v.Upstreams[1]; own.Share != 0 || own.Why == "" || to.Share != 1 ||
				to.SentModel != "llama-70b" || !strings.Contains(to.Why, "fallback model llama") {
				t.Errorf("the explanation is %+v", v.Upstreams)
			}
			if name == "at capacity" {
				return
			}
			other.setScript(replyScript(503, `{}`))
			if res := p.chat(); res.status != 200 || len(p.provider.received()) != 1 {
				t.Errorf("if the fallback fails: got %d %s", res.status, res.body)
			}
			if row := p.lastCall(); row.UpstreamID != p.upstream || row.OutputTokens != 3 {
				t.Errorf("the ledger has %+v", row)
			}
			p.manage("PATCH", "/manage/tokens/"+p.tokenID, `{"policy":{"models":["gpt*"]}}`, 200, nil)
			other.setScript(chatScript)
			before := len(other.received())
			pause(h, time.Now().UnixMilli())
			if res := p.chat(); res.status != 200 || len(other.received()) != before {
				t.Errorf("a token that may not use the fallback model: got %d, and the other was asked", res.status)
			}
		})
	}
}

// TestFallbackModelWhileOpen: a model whose upstream hangs or fails costs a few calls their time until its breaker
// is open; all others go to the fallback model at once.
func TestFallbackModelWhileOpen(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]func(*providerConn, recordedRequest) bool{
		"hangs": stallScript, "answers 503": replyScript(503, `{}`),
	} {
		p := newTest(t, map[string]string{"FIRST_EVENT_TIMEOUT": "200ms"})
		p.changeProject(`"routing":{"fallbacks":[{"model":"gpt-4o*","to":"llama"}]}`)
		p.changeUpstream(p.upstream, `"models":["gpt*"]`)
		p.addUpstream(`"models":["llama"]`)
		p.provider.setScript(script)
		for range 12 {
			if res := p.chat(`"stream":true`); res.status != 200 {
				t.Errorf("%s: got %d %s", name, res.status, res.body)
			}
		}
		if n := len(p.provider.received()); n > 6 { // three open the breaker; a slow machine sees a probe or two
			t.Errorf("%s: a provider that is down was asked %d times for 12 calls", name, n)
		}
	}
}

// TestFallbackModelFails: an error about a fallback model that the client has not named says less than the error about
// its own model, which the client gets.
func TestFallbackModelFails(t *testing.T) {
	t.Parallel()
	const tooLong = `{"error":{"message":"too long","code":"context_length_exceeded"}}`
	for name, c := range map[string]struct {
		own, other                 func(*providerConn, recordedRequest) bool
		status                     int
		body                       string
		ownAttempts, otherAttempts int
	}{
		"no such model": {own: replyScript(400, tooLong), other: replyScript(404,
			`{"error":{"message":"The model llama does not exist","code":"model_not_found"}}`),
			status: 400, body: tooLong, ownAttempts: 1, otherAttempts: 1},
		"a bad request there": {own: replyScript(503, `{"error":{"message":"overloaded"}}`, "Retry-After: 9"),
			other:  replyScript(400, `{"error":{"message":"llama takes no tools"}}`),
			status: 503, body: `{"error":{"message":"overloaded"}}`, ownAttempts: 1, otherAttempts: 1},
		"nothing of its own": {own: resetScript, other: replyScript(400, `{"error":{"message":"no tools"}}`),
			status: 400, body: `{"error":{"message":"no tools"}}`, ownAttempts: 2, otherAttempts: 1},
		"it answers": {own: replyScript(400, tooLong), other: chatScript,
			status: 200, body: chatResponseBody, ownAttempts: 1, otherAttempts: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			p.changeProject(`"routing":{"fallbacks":[{"model":"gpt-4o*","to":"llama"}]}`)
			p.changeUpstream(p.upstream, `"models":["gpt*"]`)
			other, _ := p.addUpstream(`"models":["llama"]`)
			p.provider.setScript(c.own)
			other.setScript(c.other)
			if res := p.chat(); res.status != c.status || res.body != c.body {
				t.Errorf("got %d %s", res.status, res.body)
			}
			if n, m := len(p.provider.received()), len(other.received()); n != c.ownAttempts || m != c.otherAttempts {
				t.Errorf("the providers got %d and %d attempts", n, m)
			}
		})
	}
}

// sentModels returns the models that a provider was asked for, in order.
func sentModels(f *fakeProvider) (models []string) {
	for _, r := range f.received() {
		models = append(models, between(r.body, `"model":"`, `"`))
	}
	return models
}

const aliases = `"aliases":{"fast":"gpt-4o-mini","smart":["gpt-9","gpt-4.1","gpt-4o"]}`

// TestAliases: a project's alias is replaced before policies, limits and prices; the record has both names.
func TestAliases(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.changeProject(`"routing":{` + aliases + `},"policy":{"models":["gpt-4o*"],"limits":[` +
		`{"count":"dollars","max":5,"per":"day","model":"gpt-4o-mini"}]}`)
	p.changeUpstream(p.upstream, `"rewrite":{"gpt-4o-mini":"mine"}`)
	body := strings.Replace(chatBody(), `"gpt-4o-mini"`, `"fast"`, 1)
	send := func(body string) testResponse {
		return p.do("POST", "/v1/chat/completions", body, "Authorization", "Bearer "+p.token,
			"Content-Type", "application/json")
	}
	if a := send(body); a.status != 200 {
		t.Fatalf("got %d %s", a.status, a.body)
	}
	want := strings.Replace(body, `"fast"`, `"mine"`, 1)
	if got := p.provider.lastRequest(t).body; got != want {
		t.Errorf("the provider got %s, want %s", got, want)
	}
	row := p.lastCall()
	if row.Model != "gpt-4o-mini-2024-07-18" || row.Cost == nil || len(row.AttemptLog) != 1 ||
		row.AttemptLog[0].Alias != "fast" || row.AttemptLog[0].Model != "mine" {
		t.Errorf("the ledger has %+v", row)
	}
	if a := send(strings.Replace(chatBody(), `"gpt-4o-mini"`, `"Fast"`, 1)); a.errorCode() != "model_not_allowed" {
		t.Errorf("an alias in another case: got %d %s", a.status, a.body)
	}
	if a := p.do("GET", "/v1/models/fast", "", "Authorization", "Bearer "+p.token); a.status != 200 ||
		p.provider.lastRequest(t).target != "/v1/models/mine" {
		t.Errorf("one model: got %d, the provider got %s", a.status, p.provider.lastRequest(t).target)
	}
	p.changeProject(`"routing":{"aliases":{"fast":"gpt-4.1"}}`)
	if a := send(body); a.errorCode() != "model_not_allowed" {
		t.Errorf("an alias of a model that is not allowed: got %d %s", a.status, a.body)
	}
}

// TestAliasOfSeveral: of the models of an alias, the first is asked that the token may use and that an upstream serves
// and is ready for; the others are its fallback models, in order, whatever the project's fallbacks say.
func TestAliasOfSeveral(t *testing.T) {
	t.Parallel()
	body := strings.Replace(chatBody(), `"gpt-4o-mini"`, `"smart"`, 1)
	for _, c := range []struct {
		name, policy, models string
		failing              []string
		status               int
		sent                 []string
	}{
		{name: "the first", status: 200, sent: []string{"gpt-9"}},
		{name: "served", models: `["gpt-4*"]`, status: 200, sent: []string{"gpt-4.1"}},
		{name: "allowed", policy: `"models":["gpt-4o"]`, status: 200, sent: []string{"gpt-4o"}},
		{name: "fails", failing: []string{"gpt-9"}, status: 200, sent: []string{"gpt-9", "gpt-4.1"}},
		{name: "two fail", failing: []string{"gpt-9", "gpt-4.1"}, status: 200,
			sent: []string{"gpt-9", "gpt-4.1", "gpt-4o"}},
		{name: "all fail", failing: []string{"gpt-9", "gpt-4.1", "gpt-4o"}, status: 404,
			sent: []string{"gpt-9", "gpt-4.1", "gpt-4o"}},
		{name: "none is served", models: `["llama"]`, status: 404},
		{name: "none is allowed", policy: `"models":["llama"]`, status: 403},
	} {
		p := newTest(t, nil)
		p.changeProject(`"routing":{` + aliases + `,"fallbacks":[{"model":"*","to":"x"}]},"policy":{` + c.policy + `}`)
		if c.models != "" {
			p.changeUpstream(p.upstream, `"models":`+c.models)
		}
		p.provider.setScript(func(conn *providerConn, r recordedRequest) bool {
			if slices.Contains(c.failing, between(r.body, `"model":"`, `"`)) {
				return conn.reply(404, `{"error":{"message":"The model does not exist","code":"model_not_found"}}`)
			}
			return conn.reply(200, chatResponseBody)
		})
		a := p.do("POST", "/v1/chat/completions", body, "Authorization", "Bearer "+p.token,
			"Content-Type", "application/json")
		if got := sentModels(p.provider); a.status != c.status || !slices.Equal(got, c.sent) {
			t.Errorf("%s: got %d %s; the provider got %v, want %v", c.name, a.status, a.body, got, c.sent)
		}
		if len(c.failing) != 1 {
			continue
		}
		// The model that failed is paused: the next call begins with another one.
		p.do("POST", "/v1/chat/completions", body, "Authorization", "Bearer "+p.token,
			"Content-Type", "application/json")
		if got := sentModels(p.provider)[len(c.sent):]; !slices.Equal(got, []string{"gpt-4.1"}) {
			t.Errorf("%s: the next call asked for %v", c.name, got)
		}
		var v routeView
		p.manage("GET", "/manage/projects/"+p.project+"/route?model=smart", "", 200, &v)
		if v.Model != "smart" || v.ResolvedModel == "" || v.FallbackModel == "" || v.Upstreams[0].Share != 1 {
			t.Errorf("the route is %+v", v)
		}
	}
}

// TestAliasesAreListed: GET /v1/models has the aliases of models that the token may use, in the shape of the list.
func TestAliasesAreListed(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.addUpstreamAt(&fakeProvider{url: p.provider.url + "/claude/v1", key: p.provider.key}, providerAnthropic,
		`"models":["claude*"]`)
	p.changeUpstream(p.upstream, `"models":["gpt*"]`)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.HasPrefix(r.target, "/claude") {
			return c.reply(200, `{"data":[{"type":"model","id":"claude-a","display_name":"A"}],"has_more":false}`)
		}
		return c.reply(200, `{"object":"list","data":[{"id":"gpt-a","object":"model","x":1},{"id":"gpt-b"}]}`,
			`ETag: "e"`)
	})
	list := func(headers ...string) string {
		a := p.do("GET", "/v1/models", "", append(headers, "Authorization", "Bearer "+p.token)...)
		if a.status != 200 || a.header["Etag"] != nil {
			t.Errorf("got %d %v %s", a.status, a.header, a.body)
		}
		return a.body
	}
	p.changeProject(`"routing":{"aliases":{"z":["claude-a","gpt-a"],"b":"gpt-b","gpt-a":"gpt-b","new":"gpt-new",` +
		`"none":"o1","cnew":"claude-new"}}`)
	want := `{"data":[{"id":"gpt-a","object":"model","x":1},{"id":"gpt-b"},{"id":"b"},` +
		`{"created":0,"id":"new","object":"model","owned_by":"llm-proxy"},` +
		`{"id":"z","object":"model","x":1}],"object":"list"}`
	if got := list(); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	want = `{"data":[{"type":"model","id":"claude-a","display_name":"A"},` +
		`{"created_at":"1970-01-01T00:00:00Z","display_name":"cnew","id":"cnew","type":"model"},` +
		`{"display_name":"A","id":"z","type":"model"}],"first_id":"claude-a","has_more":false,"last_id":"z"}`
	if got := list("Anthropic-Version", "2023-06-01"); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	p.changeProject(`"policy":{"models":["gpt-b"]}`)
	if got, want := list(), `{"data":[{"id":"gpt-b"},{"id":"b"},{"id":"gpt-a"}],"object":"list"}`; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

// TestShortRetryAfterAlone: a project with one upstream does not send the same request again after a short Retry-After,
// whether or not the model has a fallback model: the client's own library does. The fallback model is another request.
func TestShortRetryAfterAlone(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.changeProject(`"routing":{"fallbacks":[{"model":"gpt-4o-mini","to":"gpt-4.1"}]}`)
	for _, c := range []struct {
		status int
		models []string // in the order in which the provider gets them
	}{{429, []string{"gpt-4o-mini"}}, {503, []string{"gpt-4o-mini", "gpt-4.1"}}} {
		before := len(p.provider.received())
		p.provider.setScript(replyScript(c.status, `{"error":{"message":"later"}}`, "Retry-After: 1"))
		if res := p.chat(); res.status != c.status {
			t.Errorf("%d: got %d %s", c.status, res.status, res.body)
		}
		var models []string
		for _, r := range p.provider.received()[before:] {
			models = append(models, between(r.body, `"model":"`, `"`))
		}
		if !slices.Equal(models, c.models) {
			t.Errorf("%d: the provider got requests for %v, want %v", c.status, models, c.models)
		}
		p.instance.health.reset(1, time.Now().UnixMilli())
	}
}

// TestRetryBudgetGivesBack: an upstream that gets no attempt, because its host's retry budget is spent, has its own
// limits per minute as before.
func TestRetryBudgetGivesBack(t *testing.T) {
	t.Parallel()
	p := testPool(&upstream{id: "a", host: "h", provider: providerOpenAI, weight: 1},
		&upstream{id: "b", host: "h", provider: providerOpenAI, weight: 1,
			settings: upstreamSettings{RequestsPerMinute: 5, TokensPerMinute: 100}})
	failed, other := p.upstreams[0], p.upstreams[1]
	const now = 1_000_000
	failed.retryBudget.refilledAt.Store(now)
	failed.retryBudget.credit.Store(0)
	c := criteria{api: apiOpenAI, tokens: 40, now: now, tried: []*upstream{failed}, healthyOnly: true}
	if next := p.pickAfter(&c, &failedAttempt{upstream: failed, fault: true}); next != nil {
		t.Fatalf("%s gets the call without a retry budget", next.id)
	}
	if h := other.health; h.requests != 0 || h.tokens != 0 {
		t.Errorf("%d requests and %d tokens are still reserved", h.requests, h.tokens)
	}
}
