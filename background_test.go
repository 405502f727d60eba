// Tests of background responses: their usage counts once, for the token that made them, when an answer shows it.
package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

const responseUsageJSON = `{"input_tokens":1200,"output_tokens":20000,"total_tokens":21200,` +
	`"output_tokens_details":{"reasoning_tokens":18000}}`

func responseJSON(id, status, usage string) string {
	return fmt.Sprintf(`{"id":%q,"object":"response","status":%q,"background":true,"model":"gpt-5","output":[],`+
		`"usage":%s}`, id, status, usage)
}

// A backgroundProvider is a provider with stored responses.
type backgroundProvider struct {
	mu     sync.Mutex
	answer string // of further GETs, and of a cancellation
	sse    bool   // it is a stream
	made   int
}

func (b *backgroundProvider) set(answer string, sse bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.answer, b.sse = answer, sse
}

func (b *backgroundProvider) script(c *providerConn, r recordedRequest) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case r.method == "DELETE":
		return c.reply(200, `{"id":"resp_1","object":"response","deleted":true}`)
	case r.method == "POST" && strings.Contains(r.body, `"stream":true`):
		b.made++
		c.beginSSE()
		_ = c.chunk("event: response.created\ndata: {\"type\":\"response.created\",\"response\":" +
			responseJSON("resp_1", "queued", "null") + "}\n\n")
		return false // the connection breaks
	case r.method == "POST" && !strings.HasSuffix(r.target, "/cancel"):
		b.made++
		return c.reply(200, responseJSON(fmt.Sprintf("resp_%d", b.made), "queued", "null"))
	case b.sse:
		c.beginSSE()
		_ = c.chunk(b.answer)
		return c.chunk("") == nil
	}
	return c.reply(200, b.answer)
}

func newBackgroundTest(t *testing.T) (*testProxy, *backgroundProvider) {
	t.Helper()
	p, b := newTest(t, map[string]string{"LOG_LEVEL": "error"}), &backgroundProvider{}
	p.changeProject(`"policy":{"stateful":true}`)
	p.provider.setScript(b.script)
	return p, b
}

// makeResponse makes a background response and checks that its usage is still unknown.
func (p *testProxy) makeResponse(token string, members ...string) {
	p.t.Helper()
	body := `{"model":"gpt-5","input":"hello","background":true` +
		strings.Join(append([]string{""}, members...), ",") + `}`
	if res := p.postAs(token, "/v1/responses", body); res.status != 200 {
		p.t.Fatalf("got %d %s", res.status, res.body)
	}
	if row := p.lastCall(); row.UsageSource != "none" || row.InputTokens+row.OutputTokens != 0 || row.Cost != nil {
		p.t.Errorf("before the usage is known, the ledger has %+v", row)
	}
}

func (p *testProxy) getResponse(token, path string) testResponse {
	p.t.Helper()
	return p.do("GET", "/v1/responses/"+path, "", "Authorization", "Bearer "+token)
}

// checkBackground checks the row of the only response, and that sums equal rows.
func (p *testProxy) checkBackground(source string, input, output int64) {
	p.t.Helper()
	p.waitSettled()
	var in, out int64
	for _, row := range p.ledger() {
		in, out = in+row.InputTokens, out+row.OutputTokens
		if row.Endpoint == "POST /v1/responses" && (row.UsageSource != source || row.InputTokens != input ||
			row.OutputTokens != output || (row.Cost == nil) != (source == "none")) {
			p.t.Errorf("the ledger has %+v, want %s %d/%d", row, source, input, output)
		}
	}
	if in != input || out != output {
		p.t.Errorf("all rows have %d/%d tokens, want %d/%d", in, out, input, output)
	}
	p.checkSums()
	p.checkCounts()
}

// TestBackgroundResponse: the usage counts once, for the token that made the response, whoever asks and how often, also
// at one time and after a restart; limits count it from then on.
func TestBackgroundResponse(t *testing.T) {
	t.Parallel()
	p, b := newBackgroundTest(t)
	id, maker := p.newToken(`"name":"maker","policy":{"limits":[{"count":"tokens","max":30000,"per":"day"}]}`)
	p.makeResponse(maker)
	b.set(responseJSON("resp_1", "in_progress", "null"), false)
	p.getResponse(p.token, "resp_1")
	p.checkBackground("none", 0, 0)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	b.set(responseJSON("resp_1", "completed", responseUsageJSON), false)
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			if res := p.getResponse([]string{p.token, maker}[i%2], "resp_1"); res.status != 200 {
				t.Errorf("got %d %s", res.status, res.body)
			}
		})
	}
	clients.Wait()
	p.checkBackground("exact", 1200, 20000)
	var token struct {
		Limits []struct{ Used float64 }
	}
	for range 2 {
		if p.manage("GET", "/manage/tokens/"+id, "", 200, &token); token.Limits[0].Used != 21200 {
			t.Errorf("the maker's limit has used %v", token.Limits)
		}
		if err := p.stop(); err != nil {
			t.Fatal(err)
		}
		p.start()
		p.getResponse(maker, "resp_1")
		p.checkBackground("exact", 1200, 20000)
	}
	for _, u := range p.usage("interval=total&group_by=token") {
		if (u.Output == 20000) != (*u.TokenID == id) {
			t.Errorf("usage: %+v", u)
		}
	}
}

// TestBackgroundReserves: until the usage of a background response is known, limits count what was reserved, through a
// restart, too. So many responses at one time do not exceed a budget.
func TestBackgroundReserves(t *testing.T) {
	t.Parallel()
	for _, limit := range []string{
		`{"count":"tokens","max":30000,"per":"day"}`,
		`{"count":"dollars","max":0.3,"per":"lifetime"}`, // gpt-5 costs $10 per million output tokens
	} {
		t.Run(limit, func(t *testing.T) {
			t.Parallel()
			p, b := newBackgroundTest(t)
			_, maker := p.newToken(`"name":"maker","policy":{"limits":[` + limit + `]}`)
			for range 3 {
				p.makeResponse(maker, `"max_output_tokens":9000`)
			}
			again := func(want int) {
				t.Helper()
				const body = `{"model":"gpt-5","input":"hello","background":true,"max_output_tokens":9000}`
				if res := p.postAs(maker, "/v1/responses", body); res.status != want {
					t.Errorf("got %d %s, want %d", res.status, res.body, want)
				}
			}
			again(429)
			if err := p.stop(); err != nil {
				t.Fatal(err)
			}
			p.start()
			again(429)
			b.set(responseJSON("resp_1", "completed", `{"input_tokens":9,"output_tokens":90,"total_tokens":99}`), false)
			p.getResponse(p.token, "resp_1") // this response gives back nearly all that it had reserved
			again(200)
			again(429)
		})
	}
}

// TestBackgroundEnds: every way in which the usage of a background response becomes known, or never does.
func TestBackgroundEnds(t *testing.T) {
	t.Parallel()
	stream := func(kind, status, usage string) string {
		return "event: " + kind + "\ndata: {\"type\":\"" + kind + "\",\"response\":" +
			responseJSON("resp_1", status, usage) + "}\n\n"
	}
	for name, tt := range map[string]struct {
		answer         string
		sse            bool
		method, path   string
		members        string // of the call that makes it
		source         string
		input, outputs int64
	}{
		"streamed": {answer: stream("response.completed", "completed", responseUsageJSON), sse: true,
			path: "resp_1?stream=true&starting_after=4", source: "exact", input: 1200, outputs: 20000},
		"still streaming": {answer: stream("response.in_progress", "in_progress", "null"), sse: true,
			path: "resp_1?stream=true", source: "none"},
		"failed": {answer: responseJSON("resp_1", "failed", "null"), path: "resp_1", source: "none"},
		"incomplete": {answer: responseJSON("resp_1", "incomplete", responseUsageJSON), path: "resp_1",
			source: "exact", input: 1200, outputs: 20000},
		"cancelled with usage": {answer: responseJSON("resp_1", "cancelled", responseUsageJSON), method: "POST",
			path: "resp_1/cancel", source: "exact", input: 1200, outputs: 20000},
		"deleted": {method: "DELETE", path: "resp_1", members: `"max_output_tokens":700`, source: "estimated",
			input: 19, outputs: 700},
		"made by a stream that broke": {answer: responseJSON("resp_1", "completed", responseUsageJSON),
			path: "resp_1", members: `"stream":true`, source: "exact", input: 1200, outputs: 20000},
		"another response": {answer: responseJSON("resp_2", "completed", responseUsageJSON), path: "resp_2",
			source: "none"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, b := newBackgroundTest(t)
			p.makeResponse(p.token, strings.Fields(tt.members)...)
			b.set(tt.answer, tt.sse)
			for range 2 {
				method := tt.method
				if method == "" {
					method = http.MethodGet
				}
				res := p.do(method, "/v1/responses/"+tt.path, "", "Authorization", "Bearer "+p.token)
				if res.status != 200 {
					t.Fatalf("got %d %s", res.status, res.body)
				}
				p.waitSettled()
				if row := p.lastCall(); row.Outcome != "ok" || row.UsageSource != "none" {
					t.Errorf("the call that asks: %+v", row)
				}
			}
			p.checkBackground(tt.source, tt.input, tt.outputs)
		})
	}
}

// TestBackgroundExpires: a background response of which nothing is heard counts what was reserved.
func TestBackgroundExpires(t *testing.T) {
	t.Parallel()
	p, b := newBackgroundTest(t)
	p.makeResponse(p.token, `"max_output_tokens":500`)
	expire := func(later time.Duration) {
		t.Helper()
		err := p.instance.proxy.limits.expireResponses(t.Context(), time.Now().Add(later), maxResponseAge,
			p.instance.prices.Load())
		if err != nil {
			t.Error(err)
		}
	}
	expire(maxResponseAge - time.Minute)
	p.checkBackground("none", 0, 0)
	expire(maxResponseAge + time.Minute)
	p.checkBackground("estimated", 19, 500)
	b.set(responseJSON("resp_1", "completed", responseUsageJSON), false)
	p.getResponse(p.token, "resp_1")
	p.checkBackground("estimated", 19, 500)
	for want := int64(1); want >= 0; want-- {
		n, err := p.instance.store.deleteOldBackground(t.Context(), minIDAt(time.Now().Add(time.Hour)), 10)
		if n != want || err != nil {
			t.Errorf("%d were deleted, %v", n, err)
		}
	}
}

// TestBackgroundCost: the cost of a background response has a breakdown, with the multipliers of project and upstream.
func TestBackgroundCost(t *testing.T) {
	t.Parallel()
	p, b := newBackgroundTest(t)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"cost_multiplier":0.5}`, 200, nil)
	p.changeUpstream(p.upstream, `"cost_multiplier":0.5`)
	p.makeResponse(p.token)
	b.set(responseJSON("resp_1", "completed", responseUsageJSON), false)
	p.getResponse(p.token, "resp_1")
	var row struct {
		Cost      json.Number
		Breakdown struct {
			Cost  json.Number
			Lines []struct{ Kind string }
		} `json:"cost_breakdown"`
	}
	p.manage("GET", "/manage/requests/"+p.ledger()[0].ID, "", 200, &row)
	lines := fmt.Sprint(row.Breakdown.Lines)
	// 1200 x 1.25 + 20000 x 10 = 201500 micro-dollars, and a quarter of that.
	if row.Cost != "0.050375" || row.Breakdown.Cost != row.Cost || lines != "[{input} {output} {reasoning_output} "+
		"{cost_multiplier}]" {
		t.Errorf("%+v", row)
	}
}

// TestInteractions: Gemini's Interactions API, for projects with stored objects: exact usage of answers and of streams,
// usage in the background when an answer shows it, rights by the body's model, and Google's errors.
func TestInteractions(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	google := newFakeProvider(t)
	p.addUpstreamAt(google, "google", `"weight":1`)
	const usage = `{"total_input_tokens":20,"input_tokens_by_modality":[{"modality":"text","tokens":20}],` +
		`"total_cached_tokens":5,"total_output_tokens":7,"total_thought_tokens":30,"total_tool_use_tokens":4,` +
		`"total_tokens":61}`
	interaction := func(id, status, usage string) string {
		return `{"id":"` + id + `","object":"interaction","model":"gemini-2.5-flash","status":"` + status + `",` +
			`"steps":[{"type":"model_output","content":[{"type":"text","text":"Hi"}]}],"usage":` + usage + `}`
	}
	event := func(name, members string) string {
		return "event: " + name + "\ndata: {" + members + `"event_type":"` + name + "\"}\n\n"
	}
	events := []string{
		event("interaction.created", `"interaction":{"id":"v1_s","status":"in_progress","model":"gemini-2.5-flash"},`),
		event("step.delta", `"index":0,"delta":{"type":"text","text":"Hi"},`),
		event("interaction.completed", `"interaction":{"id":"v1_s","status":"completed","usage":`+usage+`},`),
		"event: done\ndata: [DONE]\n\n",
	}
	call := func(method, path, body string) testResponse {
		return p.do(method, "/v1beta/interactions"+path, body, "X-Goog-Api-Key", p.token,
			"Content-Type", "application/json", "Api-Revision", "2026-05-20")
	}
	const ask = `{"model":"gemini-2.5-flash","input":"Hello","generation_config":{"max_output_tokens":100}`
	if res := call("POST", "", ask+"}"); res.status != 403 || !strings.Contains(res.body, `"ENDPOINT_NOT_ALLOWED"`) {
		t.Errorf("without stored objects: got %d %s", res.status, res.body)
	}
	p.changeProject(`"policy":{"stateful":true,"models":["gemini-*"]}`)

	check := func(what string, res testResponse, body, source string, input, output int64) {
		t.Helper()
		row := p.lastCall()
		if res.status != 200 || res.err != nil || res.body != body || row.Outcome != "ok" ||
			row.UsageSource != source || row.InputTokens != input || row.OutputTokens != output {
			t.Errorf("%s: got %d %q, %v; the ledger has %+v", what, res.status, res.body, res.err, row)
		}
	}
	whole := interaction("v1_u", "completed", usage)
	google.setScript(replyScript(200, whole))
	check("an answer", call("POST", "", ask+"}"), whole, "exact", 24, 37)
	if row := p.lastCall(); row.CachedTokens != 5 || row.ReasoningTokens != 30 || row.Model != "gemini-2.5-flash" {
		t.Errorf("an answer: the ledger has %+v", row)
	}
	got := google.lastRequest(t)
	if got.target != "/v1beta/interactions" || got.header.Get("X-Goog-Api-Key") != google.key || got.body != ask+"}" ||
		got.header.Get("Api-Revision") != "2026-05-20" {
		t.Errorf("the provider got %s %s", got.head, got.body)
	}
	google.setScript(streamScript(events, 4, endStream))
	check("a stream", call("POST", "", ask+`,"stream":true}`), strings.Join(events, ""), "exact", 24, 37)
	google.setScript(streamScript(events, 2, endStream))
	if call("POST", "", ask+`,"stream":true}`); p.lastCall().Outcome != "truncated" {
		t.Errorf("a stream without an end: the ledger has %+v", p.lastCall())
	}

	queued := interaction("v1_b", "in_progress", "null")
	google.setScript(replyScript(200, queued))
	before := p.totalTokens()
	check("in the background", call("POST", "", ask+`,"background":true}`), queued, "none", 0, 0)
	google.setScript(replyScript(200, interaction("v1_b", "completed", usage)))
	for range 2 {
		if res := call("GET", "/v1_b?stream=false", ""); res.status != 200 {
			t.Errorf("GET: got %d %s", res.status, res.body)
		}
	}
	if used := p.totalTokens() - before; used != 61 {
		t.Errorf("in the background, %d tokens count", used)
	}
	google.setScript(replyScript(200, "{}"))
	for _, c := range [][2]string{{"POST", "/v1_b/cancel"}, {"DELETE", "/v1_b"}} {
		res := call(c[0], c[1], "")
		if target := google.lastRequest(t).target; res.status != 200 || target != "/v1beta/interactions"+c[1] {
			t.Errorf("%v: got %d %s", c, res.status, res.body)
		}
	}
	for name, c := range map[string]struct{ method, path, body, want string }{
		"another model": {"POST", "", `{"model":"veo-3","input":"x"}`, "MODEL_NOT_ALLOWED"},
		"an agent":      {"POST", "", `{"agent":"deep-research","input":"x"}`, "MODEL_NOT_ALLOWED"},
		"two models":    {"POST", "", `{"model":"gemini-a","Model":"veo-3"}`, "INVALID_REQUEST"},
		"a list":        {"GET", "", "", "METHOD_NOT_ALLOWED"},
		"webhooks":      {"POST", "/../webhooks", "{}", "UNKNOWN_ENDPOINT"},
	} {
		if res := call(c.method, c.path, c.body); !strings.Contains(res.body, `"`+c.want+`"`) {
			t.Errorf("%s: got %d %s", name, res.status, res.body)
		}
	}
	p.checkSums()
	p.checkCounts()
}

// totalTokens returns the tokens of all rows of the ledger.
func (p *testProxy) totalTokens() (n int64) {
	p.t.Helper()
	for _, row := range p.ledger() {
		n += row.InputTokens + row.OutputTokens
	}
	return n
}

// countRows returns the number of rows that "SELECT count(*) FROM" finds with the rest of the query.
func (p *testProxy) countRows(rest string) int64 {
	p.t.Helper()
	n, err := queryValue[int64](p.t.Context(), p.instance.store.readDB, "counting", `SELECT count(*) FROM `+rest)
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}

// TestErasedBeforeLateUse: usage that becomes known while its end user is erased, or afterwards, counts without the
// name, and nothing of it is lost.
func TestErasedBeforeLateUse(t *testing.T) {
	t.Parallel()
	const responses, name = 40, "ann"
	p, _ := newBackgroundTest(t)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		id, status, usage := strings.TrimPrefix(r.target, "/v1/responses/"), "completed", responseUsageJSON
		if r.method == "POST" {
			id, status, usage = between(r.body, `"metadata":{"id":"`, `"`), "queued", "null"
		}
		return c.reply(200, responseJSON(id, status, usage))
	})
	tokenID, token := p.newToken(`"name":"maker","policy":{"limits":[{"count":"tokens","max":3000000,"per":"day",` +
		`"for_each":"end_user"}]}`)
	for i := range responses {
		p.makeResponse(token, `"user":"`+name+`"`, fmt.Sprintf(`"metadata":{"id":"resp_%d"}`, i))
	}
	erase := func() {
		p.manage("DELETE", "/manage/projects/"+p.project+"/end-users?end_user="+name, "", 200, nil)
	}
	var clients sync.WaitGroup
	for part := range 4 {
		clients.Go(func() {
			for i := part; i < responses-4; i += 4 {
				p.getResponse(p.token, fmt.Sprint("resp_", i))
			}
		})
	}
	waitFor(t, "some late usage", func() bool { return p.countRows(`background WHERE usage_source <> ''`) > 3 })
	erase()
	clients.Wait()
	for i := range 4 {
		p.getResponse(p.token, fmt.Sprint("resp_", responses-1-i))
	}
	p.waitSettled()
	values, _ := p.limitValues("/manage/tokens/"+tokenID, "?limit_values=9")
	_, counted := values[name]
	if n := p.countRows(`attribution_sums WHERE value = '` + name + `'`); n > 0 || counted {
		t.Errorf("%d sums have the name, and limits count %+v", n, values)
	}
	var input int64
	for _, row := range p.ledger() {
		if input += row.InputTokens; row.EndUser != "" {
			t.Errorf("the row of %s has the name", row.ID)
		}
	}
	if input != responses*1200 {
		t.Errorf("the calls have %d input tokens", input)
	}
	p.checkSums()
	p.checkCounts()

	// What is written between the calls and the sums is erased with these.
	st := p.instance.store
	project, err := st.projectByID(t.Context(), p.project)
	if err != nil {
		t.Fatal(err)
	}
	p.execSQL(`UPDATE requests SET end_user = '` + name + `' WHERE endpoint = 'POST /v1/responses'`)
	_, err = st.eraseEndUser(t.Context(), project.seq, name, func() error {
		p.execSQL(fmt.Sprintf(`
			INSERT INTO attribution_sums (project, attribute, at, value, token, model, endpoint, outcome, asked,
				calls, input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls,
				estimated_calls, would_refuse, total_us, cache_hits, saved, saved_us, prompt_saved)
			VALUES (%d, 'end_user', 0, '%s', 1, 'm', 'e', 'ok', '', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)`,
			project.seq, name))
		if n := p.countRows(`requests WHERE end_user = '` + name + `'`); n > 0 {
			t.Errorf("%d calls still have the name", n)
		}
		return nil
	})
	if n := p.countRows(`attribution_sums WHERE value = '` + name + `'`); n > 0 || err != nil {
		t.Errorf("%d sums have the name: %v", n, err)
	}

	// An erasure waits for usage of which the name was read before.
	limits, ops, done := p.instance.proxy.limits, p.instance.operations, make(chan error, 1)
	limits.lateUse.RLock()
	go func() { done <- ops.forgetEndUser(t.Context(), p.project, func(string) bool { return false }) }()
	waitFor(t, "a waiting erasure", func() bool {
		if limits.lateUse.TryRLock() {
			limits.lateUse.RUnlock()
			return false
		}
		return true
	})
	select {
	case err := <-done:
		t.Errorf("an erasure did not wait for late usage: %v", err)
	default:
	}
	limits.lateUse.RUnlock()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
