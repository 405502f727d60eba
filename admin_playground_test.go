// Tests of the playground of /admin: its calls are calls like any other, with a token of its own.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// playgroundForm returns the form of a message. pairs are further fields.
func (p *testProxy) playgroundForm(pairs ...string) url.Values {
	form := url.Values{"project_id": {p.project}, "model": {"gpt-4o-mini"}, "message": {"Hello"}, "do": {"send"},
		"once": {randomBase62(16)}}
	for i := 0; i < len(pairs); i += 2 {
		form.Set(pairs[i], pairs[i+1])
	}
	return form
}

// playgroundSecrets adds the values of the playground's tokens to what must not be seen.
func (p *testProxy) playgroundSecrets() {
	pg := &p.instance.server.admin.playground
	pg.mu.Lock()
	defer pg.mu.Unlock()
	for _, value := range pg.values {
		p.secrets = append(p.secrets, value())
	}
}

// A playgroundStream is an answer as the page's script reads it.
type playgroundStream struct {
	t     *testing.T
	p     *testProxy
	res   *http.Response
	lines *bufio.Reader
	leave context.CancelFunc
}

func (b *browser) openPlayground(t *testing.T, form url.Values) *playgroundStream {
	t.Helper()
	ctx, leave := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "POST", b.p.url+"/admin/playground", strings.NewReader(form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"Content-Type": {"application/x-www-form-urlencoded"}, "Cookie": {b.cookie},
		"Sec-Fetch-Site": {"same-origin"}, "Accept": {playgroundStreamType}}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { leave(); res.Body.Close() })
	return &playgroundStream{t, b.p, res, bufio.NewReader(res.Body), leave}
}

// next returns the next line.
func (s *playgroundStream) next() (line playgroundAnswer) {
	s.t.Helper()
	text, err := s.lines.ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(text), &line)
	}
	if err != nil {
		s.t.Fatalf("%q: %v", text, err)
	}
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.p.clientOutput.WriteString(text)
	return line
}

// playgroundTokens returns the ids of the tokens whose name begins with the playground's.
func (p *testProxy) playgroundTokens() (ids []string) {
	p.t.Helper()
	var l struct{ Data []struct{ ID string } }
	p.manage("GET", "/manage/tokens?name="+url.QueryEscape(playgroundTokenName), "", 200, &l)
	for _, t := range l.Data {
		ids = append(ids, t.ID)
	}
	return ids
}

// TestPlayground: without a script, an answer is a page. The call is on record as the playground's, with a token of its
// own that nobody sees; the next message continues the conversation.
func TestPlayground(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	keyID, key := p.newKey("Ada", "operator")
	b := p.signIn(key)
	if res := b.get("/admin/playground"); res.status != 200 || !strings.Contains(res.body, `value="gpt-4o-mini"`) ||
		len(p.playgroundTokens()) != 0 {
		t.Errorf("the page: %d %s", res.status, res.body)
	}
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		body := strings.Replace(chatResponseBody, `"Hi"`, `"<b>Hi</b>\n'x'"`, 1)
		return c.reply(200, body, "X-Request-Id: provider-1")
	})
	form := p.playgroundForm("system", "Be brief.", "temperature", "0.5", "max_tokens", "20")
	form["message"] = []string{"One\r\n<i>"}
	res := b.post("/admin/playground", form)
	p.playgroundSecrets()
	row := p.lastCall()
	for _, want := range []string{"&lt;b&gt;Hi&lt;/b&gt;\n&#39;x&#39;</div>", "One\n&lt;i&gt;</div>",
		"/admin/requests/" + row.ID, "X-Request-Id: provider-1", "<dd>9 / 3</dd>"} {
		if !strings.Contains(res.body, want) {
			t.Errorf("the page lacks %q: %s", want, res.body)
		}
	}
	if problems := checkHTML(res.body); res.status != 200 || len(problems) > 0 {
		t.Errorf("%d %v", res.status, problems)
	}
	sent := p.provider.lastRequest(t).body
	if want := `{"max_completion_tokens":20,"messages":[{"content":"Be brief.","role":"system"},` +
		`{"content":"One\n\u003ci\u003e","role":"user"}],"model":"gpt-4o-mini","temperature":0.5}`; sent != want {
		t.Errorf("the provider got %s", sent)
	}
	tokens := p.playgroundTokens()
	if row.Outcome != "ok" || row.Address != "127.0.0.1" || row.Tags.value("source") != "playground" ||
		!strings.HasPrefix(row.Session, "playground-") || len(tokens) != 1 || row.TokenID != tokens[0] {
		t.Errorf("on record: %+v, tokens %v", row, tokens)
	}
	var token tokenView
	p.manage("GET", "/manage/tokens/"+row.TokenID, "", 200, &token)
	if life := time.Until(time.UnixMilli(int64(*token.ExpiresAt))); token.Name != "playground: Ada" ||
		life > playgroundTokenLifetime || *token.MaxRequests != playgroundTokenCalls || token.ProjectID != p.project {
		t.Errorf("its token: %+v", token)
	}
	var trail struct {
		Data []struct{ Action, Actor string }
	}
	p.manage("GET", "/manage/audit?object="+row.TokenID, "", 200, &trail)
	if len(trail.Data) != 1 || trail.Data[0].Action != "token.create" || trail.Data[0].Actor != keyID {
		t.Errorf("the trail: %+v", trail)
	}
	calls := len(p.provider.received())
	if again := b.post("/admin/playground", form); again.status != 400 || len(p.provider.received()) != calls {
		t.Errorf("a form that is sent twice: %d", again.status)
	}
	next := p.playgroundForm("message", "Two", "session", row.Session)
	next["turn"] = []string{"One", "Hi"}
	res = b.post("/admin/playground", next)
	if sent := p.provider.lastRequest(t).body; !strings.Contains(sent, `[{"content":"One","role":"user"},`+
		`{"content":"Hi","role":"assistant"},{"content":"Two","role":"user"}]`) ||
		strings.Count(res.body, `name="turn"`) != 4 {
		t.Errorf("the second message: %s %s", sent, res.body)
	}
	if second := p.lastCall(); second.Session != row.Session || second.TokenID != row.TokenID ||
		len(p.playgroundTokens()) != 1 {
		t.Errorf("the second call: %+v", second)
	}
}

// TestPlaygroundToken: each key has one token in each project. It is renewed; only a revoked one is replaced.
func TestPlaygroundToken(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, key := p.newKey("Ada", "operator")
	b, admin := p.signIn(key), p.signIn(p.adminKey)
	use := func(b *browser, pairs ...string) string {
		t.Helper()
		if res := b.post("/admin/playground", p.playgroundForm(pairs...)); res.status != 200 {
			t.Fatalf("%d %s", res.status, res.body)
		}
		p.playgroundSecrets()
		return p.lastCall().TokenID
	}
	first, ofAdmin := use(b), use(admin)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	if again := use(b); again != first || ofAdmin == first {
		t.Errorf("after a restart: %s instead of %s", again, first)
	}
	var trail struct{ Data []struct{ Action string } }
	p.manage("GET", "/manage/audit?object="+first, "", 200, &trail)
	if len(trail.Data) != 2 || trail.Data[0].Action != "token.rotate" {
		t.Errorf("the trail: %+v", trail)
	}
	p.manage("PATCH", "/manage/tokens/"+first, `{"max_requests":2}`, 200, nil)
	if again := use(b); again != first { // it is used up: renewed
		t.Errorf("used up: %s instead of %s", again, first)
	}
	p.manage("DELETE", "/manage/tokens/"+first, "", 200, nil)
	second := use(b)
	if third := use(b); second == first || third != second {
		t.Errorf("after a revocation: %s, %s, %s", first, second, third)
	}
	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"other"}`, 201, &other)
	res := b.post("/admin/playground", p.playgroundForm("project_id", other.ID, "token", p.token))
	if row := p.lastCall(); !strings.Contains(res.body, `role="alert">`) || row.TokenID == second ||
		row.TokenID == p.tokenID || row.Outcome != "refused" {
		t.Errorf("another project: %+v %s", row, res.body)
	}
	if n := len(p.playgroundTokens()); n != 4 {
		t.Errorf("%d tokens", n)
	}
}

// TestPlaygroundStream: an answer is shown as it arrives. It ends with the browser, and says so if it breaks off; a
// session has a few calls at a time.
func TestPlaygroundStream(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	goOn, left := make(chan bool), make(chan bool, 1)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		c.beginSSE()
		events := chatEvents(true)
		_ = c.chunk(events[0] + events[1])
		switch {
		case strings.Contains(r.body, "leave"):
			left <- c.waitClosed(hangTimeout)
			return false
		case strings.Contains(r.body, "cut"):
			return c.reset()
		}
		<-goOn
		return c.chunk(strings.Join(events[2:], "")) == nil && c.chunk("") == nil
	})
	s := b.openPlayground(t, p.playgroundForm("message", promptCanary))
	head, text := s.next(), s.next()
	p.playgroundSecrets()
	hasType := slices.Contains(head.Headers, labeledValue{"Content-Type", "text/event-stream"})
	if s.res.StatusCode != 200 || parseRequestID(head.ID) == 0 || head.Status != 200 || !hasType || text.Text != "Hi" {
		t.Errorf("%+v %+v", head, text)
	}
	if page := b.get("/admin/streams").body; !strings.Contains(page, head.ID) {
		t.Errorf("it is not among the running calls: %s", page)
	}
	goOn <- true
	if last := s.next(); !last.Done || last.Error != "" || p.lastCall().Outcome != "ok" {
		t.Errorf("the end: %+v", last)
	}
	if page := b.get("/admin/playground?call=" + head.ID).body; !strings.Contains(page, "<dd>9 / 3</dd>") {
		t.Errorf("the result: %s", page)
	}
	cut := b.openPlayground(t, p.playgroundForm("message", "cut"))
	if _, text, last := cut.next(), cut.next(), cut.next(); text.Text != "Hi" || !last.Done ||
		last.Error != "The answer broke off." || p.lastCall().Outcome != "truncated" {
		t.Errorf("cut: %+v %+v", text, last)
	}
	leaving := b.openPlayground(t, p.playgroundForm("message", "leave"))
	leaving.next()
	leaving.next()
	if leaving.leave(); !<-left || p.lastCall().Outcome != "client_gone" {
		t.Errorf("the browser left: %+v", p.lastCall())
	}
	key, value := p.newKey("leaves", "operator")
	revoked := p.signIn(value).openPlayground(t, p.playgroundForm("message", "leave"))
	revoked.next()
	revoked.next()
	p.manage("DELETE", "/manage/keys/"+key, "", 200, nil)
	if gone, last := <-left, revoked.next(); !gone || !last.Done || p.lastCall().Outcome != "client_gone" {
		t.Errorf("the key was revoked: %+v %+v", last, p.lastCall())
	}
	for range maxPlaygroundSessionCalls {
		b.openPlayground(t, p.playgroundForm()).next()
	}
	if res := b.post("/admin/playground", p.playgroundForm()); res.status != 400 ||
		!strings.Contains(res.body, "Too many calls of the playground") {
		t.Errorf("too many: %d %s", res.status, res.body)
	}
	for range maxPlaygroundSessionCalls {
		goOn <- true
	}
	p.waitSettled()
	waitFor(t, "the calls to be counted no more", func() bool {
		pg := &p.instance.server.admin.playground
		pg.mu.Lock()
		defer pg.mu.Unlock()
		return pg.total == 0 && len(pg.running) == 0
	})
}

// TestPlaygroundRefused: the rules of the project hold, and the page says what is wrong. Only operators get so far, and
// no other site.
func TestPlaygroundRefused(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	_, viewer := p.newKey("v", "viewer")
	b := p.signIn(p.adminKey)
	if res := p.signIn(viewer).post("/admin/playground", p.playgroundForm()); res.status != 403 {
		t.Errorf("a viewer: %d", res.status)
	}
	if res := b.post("/admin/playground", p.playgroundForm(), "Sec-Fetch-Site", "cross-site"); res.status != 403 {
		t.Errorf("another site: %d", res.status)
	}
	for field, value := range map[string]string{"message": " ", "model": "", "temperature": "NaN", "max_tokens": "0",
		"system": strings.Repeat("x", maxPlaygroundMessage)} {
		if res := b.post("/admin/playground", p.playgroundForm(field, value)); res.status != 400 ||
			!strings.Contains(res.body, `role="alert"`) {
			t.Errorf("%s: %d", field, res.status)
		}
	}
	if res := b.post("/admin/playground", p.playgroundForm("project_id", "proj_none")); res.status != 404 {
		t.Errorf("an unknown project: %d", res.status)
	}
	if n := len(p.provider.received()) + len(p.playgroundTokens()); n != 0 {
		t.Errorf("%d calls or tokens", n)
	}
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"models":["gpt-4o*"],"attribution":{"tags":["team"],
		"required":["tag:team","end_user"]},"limits":[{"count":"requests","max":1,"per":"day"}]}}`, 200, nil)
	res := b.post("/admin/playground", p.playgroundForm("model", "o3"))
	p.playgroundSecrets()
	if !strings.Contains(res.body, "403 Forbidden. This token may not use this model") ||
		!strings.Contains(res.body, `<a href="/admin/requests/`+p.lastCall().ID+`">See the call</a>`) {
		t.Errorf("a model that is not allowed: %s", res.body)
	}
	if res = b.post("/admin/playground", p.playgroundForm()); !strings.Contains(res.body, ">Hi</div>") {
		t.Errorf("what the policy requires is sent: %s", res.body)
	}
	if row := p.lastCall(); row.EndUser != "playground-user" || row.Tags.value("team") != "playground" {
		t.Errorf("%+v", row)
	}
	s := b.openPlayground(t, p.playgroundForm())
	if head, last := s.next(), s.next(); head.Status != 429 || !last.Done ||
		!strings.HasPrefix(last.Error, "429 Too Many Requests. ") {
		t.Errorf("a limit: %+v %+v", head, last)
	}
	res = b.post("/admin/playground", p.playgroundForm("do", "curl", "message", "it's"))
	if !strings.Contains(res.body, `it&#39;\&#39;&#39;s`) || !strings.Contains(res.body, "$LLM_PROXY_TOKEN") ||
		!strings.Contains(res.body, "X-LLM-Proxy-Tags: team=example") {
		t.Errorf("curl: %s", res.body)
	}
}

// TestPlaygroundAPIs: the API follows from the model and the project's providers, or is chosen.
func TestPlaygroundAPIs(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	b := p.signIn(p.adminKey)
	for _, provider := range []string{"anthropic", "google"} {
		p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"`+provider+`","provider":"`+provider+
			`","base_url":"`+p.provider.url+`","api_key":"`+p.provider.key+`"}`, 201, nil)
	}
	answers := map[string]string{
		"/v1/chat/completions": `{"choices":[{"message":{"content":"Hi"}}]}`,
		"/v1/responses":        `{"output":[{"type":"reasoning"},{"content":[{"text":"Hi"}]}],"error":null}`,
		"/v1/messages":         `{"type":"message","content":[{"type":"text","text":"Hi"}]}`,
		"/v1beta/models/gemini-2.5-pro:generateContent": `{"candidates":[{"content":{"parts":[{"text":"Hi"}]}}]}`,
		"/v1/models":        `{"data":[{"id":"gpt-5"},{"id":"text-embedding-3-small"}]}`,
		"/v1/models?claude": `{"data":[{"id":"claude-opus-5-5"}],"has_more":false}`,
		"/v1beta/models":    `{"models":[{"name":"models/gemini-2.5-pro"}]}`,
	}
	events := map[string][]string{
		"/v1/responses": {`{"type":"response.created","response":{"error":null}}`,
			`{"type":"response.reasoning_text.delta","delta":"Hm"}`,
			`{"type":"response.output_text.delta","delta":"Hi"}`,
			`{"type":"response.completed","response":{"output":[{"content":[{"text":"Hi"}]}]}}`},
		"/v1/messages": {`{"type":"message_start","message":{"content":[]}}`,
			`{"type":"content_block_delta","delta":{"type":"thinking_delta","thinking":"Hm"}}`,
			`{"type":"content_block_delta","delta":{"type":"text_delta","text":"Hi"}}`, `{"type":"message_stop"}`},
		"/v1beta/models/gemini-2.5-pro:streamGenerateContent": {
			`{"candidates":[{"content":{"parts":[{"text":"Hi"}]}}]}`,
			`{"candidates":[{"content":{},"finishReason":"STOP"}]}`},
	}
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		path, _, _ := strings.Cut(r.target, "?")
		if path == "/v1/models" && r.header.Get("X-Api-Key") != "" {
			path += "?claude"
		}
		if list := events[path]; list != nil && (strings.Contains(r.body, `"stream":true`) || r.target != path) {
			c.beginSSE()
			for _, data := range list {
				event, _, _ := strings.Cut(strings.TrimPrefix(data, `{"type":"`), `"`)
				_ = c.chunk("event: " + event + "\ndata: " + data + "\n\n")
			}
			return c.chunk("") == nil
		}
		return c.reply(200, answers[path])
	})
	for _, c := range []struct{ model, api, path, body string }{
		{"gpt-5", "", "/v1/chat/completions", ""},
		{"gpt-5", "responses", "/v1/responses", `"input":[{"content":"Hello","role":"user"}]`},
		{"claude-opus-5-5", "", "/v1/messages", `"system":"Be brief."`},
		{"gemini-2.5-pro", "", "/v1beta/models/gemini-2.5-pro:generateContent",
			`"systemInstruction":{"parts":[{"text":"Be brief."}]}`},
	} {
		form := p.playgroundForm("model", c.model, "api", c.api, "system", "Be brief.")
		res := b.post("/admin/playground", form)
		p.playgroundSecrets()
		if sent := p.provider.lastRequest(t); sent.target != c.path || !strings.Contains(sent.body, c.body) ||
			!strings.Contains(res.body, ">Hi</div>") {
			t.Errorf("%s %s: %s %s %s", c.model, c.api, sent.target, sent.body, res.body)
		}
		if c.path == "/v1/chat/completions" {
			continue // TestPlaygroundStream has its stream
		}
		s, text := b.openPlayground(t, form), ""
		line := s.next()
		for ; !line.Done; line = s.next() {
			text += line.Text
		}
		if text != "Hi" || line.Error != "" {
			t.Errorf("the stream of %s: %q %+v", c.path, text, line)
		}
	}
	res := b.post("/admin/playground", p.playgroundForm("do", "models"))
	list := between(res.body, "<datalist", "</datalist>")
	if res.status != 200 || strings.Count(list, "<option") != 3 || strings.Contains(list, "embedding") {
		t.Errorf("the models: %d %s", res.status, list)
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(500, `{"error":{"message":"Out of <order>."}}`)
	})
	if res := b.post("/admin/playground", p.playgroundForm("do", "models")); res.status != 400 ||
		!strings.Contains(res.body, "The list of models could not be read. ") {
		t.Errorf("no models: %d %s", res.status, res.body)
	}
	for data, want := range map[string]string{
		`{"type":"error","message":"Responses"}`:                               "Responses",
		`{"type":"response.failed","response":{"error":{"message":"Failed"}}}`: "Failed",
		`{"type":"error","error":{"message":"Messages"}}`:                      "Messages",
		`{"error":{"message":"Chat"}}`:                                         "Chat",
		`{"error":null,"choices":[{"message":{"content":null}}]}`:              "",
		`[1`: "",
	} {
		if text, problem := answerText([]byte(data)); text != "" || problem != want {
			t.Errorf("%s: %q %q", data, text, problem)
		}
	}
	if res := b.post("/admin/playground", p.playgroundForm()); !strings.Contains(res.body,
		"500 Internal Server Error. Out of &lt;order&gt;.") {
		t.Errorf("an error of the provider: %s", res.body)
	}
}

// TestPlaygroundReplicas: the replicas share the token. Each renews it if it does not have its value.
func TestPlaygroundReplicas(t *testing.T) {
	t.Parallel()
	replicas := newReplicas(t, 3, nil)
	b := replicas[0].signIn(replicas[0].adminKey)
	for i := range 12 {
		p := replicas[i%3]
		res := (&browser{p, b.cookie}).post("/admin/playground", p.playgroundForm())
		p.playgroundSecrets()
		if !strings.Contains(res.body, ">Hi</div>") {
			t.Errorf("call %d: %d %s", i, res.status, res.body)
		}
	}
	if tokens := replicas[0].playgroundTokens(); len(tokens) != 1 {
		t.Errorf("%d tokens", len(tokens))
	}
}
