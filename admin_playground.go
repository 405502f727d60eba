// This file is the playground of /admin: operators send a message to a model of a project, and see the answer as it
// arrives, its usage, its cost and its route. A message is a call to /v1 like any other: a token admits it, limits
// count it, the ledger records it. The page stores neither messages nor answers, reaches no provider and opens no
// secret: main.go gives it a function that presents its token.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	playgroundTokenName     = "playground: " // and the name of the management key
	playgroundPolicy        = `{"attribution":{"fixed_tags":{"source":"playground"}}}`
	playgroundTokenLifetime = 15 * time.Minute
	playgroundMinLifetime   = 10 * time.Minute // that a call's token has left: the call ends with it
	playgroundTokenCalls    = 100              // between two renewals of a token
	maxPlaygroundTokens     = 256              // values in memory
	maxPlaygroundTokenIDs   = 100              // of one key and project: each but the last was revoked

	maxPlaygroundCalls        = 32 // running at the same time
	maxPlaygroundSessionCalls = 3  // of those, of one session
	maxPlaygroundTurns        = 100
	maxPlaygroundMessage      = 256 << 10 // bytes
	maxPlaygroundAnswer       = 8 << 20   // bytes that are read of an answer that is no stream
	maxPlaygroundEvent        = 1 << 20   // bytes of an event
	playgroundStreamType      = "application/x-ndjson"
)

// A playground has the tokens and the running calls of the page.
type playground struct {
	mu      sync.Mutex
	values  map[playgroundOwner]secret // of tokens; a token whose value is missing is renewed
	running map[string]int             // calls, by the hash of their session
	total   int                        // of running
}

// A playgroundOwner identifies a token of the playground: each management key has one in each project.
type playgroundOwner struct{ actor, project string }

// publicPart returns the public part of the owner's token. The token is found by it, so that there is one however often
// it is renewed. n counts the owner's tokens that were revoked.
func (o playgroundOwner) publicPart(n int) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "llm-proxy playground v1|%s|%s|%d", o.actor, o.project, n))
	text := make([]byte, publicLen)
	for i := range text {
		text[i] = base62[sum[i]%62]
	}
	return string(text)
}

// playgroundToken returns the value of the actor's token for the project. It creates or renews the token if its value
// is not in memory, or if it is nearly expired or used up.
func (ui *adminUI) playgroundToken(r *pageRequest, projectID string) (secret, error) {
	pg, owner := &ui.playground, playgroundOwner{r.actor.id, projectID}
	pg.mu.Lock()
	defer pg.mu.Unlock()
	for n := range maxPlaygroundTokenIDs {
		public := owner.publicPart(n)
		row, err := ui.store.tokenByID(r.ctx, "tok_"+public)
		isNew := errors.Is(err, errNotFound)
		if err != nil && !isNew {
			return nil, err
		}
		if row.revokedAt != nil {
			continue
		}
		used := ui.limits.withLiveUsage(&row, r.now.UnixMilli()).requestCount
		if value := pg.values[owner]; value != nil && row.isUsable(hashMinted(value), used, r.now) {
			return value, nil
		}
		value, _ := mintCredential(tokenPrefix, public)
		renew := func(t *tokenRow) error {
			t.name = strings.TrimSpace(clip(playgroundTokenName+r.actor.name, 100))
			t.oldHash, t.oldHashUntil = t.hash, t.expiresAt // another process may have a call that begins
			t.hash, t.maxRequests = hashMinted(value), new(used+playgroundTokenCalls)
			t.expiresAt = new(r.now.Add(playgroundTokenLifetime).UnixMilli())
			return nil
		}
		if isNew {
			row = tokenRow{id: "tok_" + public, projectID: projectID, policy: playgroundPolicy, createdAt: r.origin.at,
				updatedAt: r.origin.at}
			err = errors.Join(renew(&row), ui.store.addToken(r.ctx, r.origin, &row))
		} else {
			_, err = ui.ops.changeToken(r.ctx, r.origin, row.id, row.version, renew)
		}
		if err != nil {
			return nil, asProjectFieldError(err)
		}
		if len(pg.values) >= maxPlaygroundTokens {
			clear(pg.values)
		}
		pg.values[owner] = value
		return value, nil
	}
	return nil, errors.New("no token of the playground is left: each was revoked")
}

// isUsable reports whether the token has this hash, and is good for a call that begins now.
func (t *tokenRow) isUsable(hash []byte, used int64, now time.Time) bool {
	until := deref(t.expiresAt)
	if bytes.Equal(t.oldHash, hash) {
		until = min(until, deref(t.oldHashUntil))
	} else if !bytes.Equal(t.hash, hash) {
		return false
	}
	return now.Add(playgroundMinLifetime).UnixMilli() < until && t.maxRequests != nil && used < *t.maxRequests
}

// begin counts a call of a session, until the function that it returns is called.
func (pg *playground) begin(session string) (end func(), err error) {
	pg.mu.Lock()
	defer pg.mu.Unlock()
	if pg.running[session] >= maxPlaygroundSessionCalls || pg.total >= maxPlaygroundCalls {
		return nil, badRequest("too_many_calls", "",
			"Too many calls of the playground are running. Stop one, or wait until it has ended.")
	}
	pg.running[session]++
	pg.total++
	return func() {
		pg.mu.Lock()
		defer pg.mu.Unlock()
		pg.total--
		if pg.running[session]--; pg.running[session] == 0 {
			delete(pg.running, session)
		}
	}, nil
}

// A playgroundView is the data of templates/playground.html.
type playgroundView struct {
	playgroundInput
	Projects, APIs []option
	Models         []string // that are offered
	NoUpstream     bool     // the project has no active upstream
	Restored       bool     // the form has the input of a session that had ended
	Problem        string
	Once           string // names this copy of the form: without a script, it makes one call
	Answer         *playgroundAnswer
	Call           *requestListItem // the last call, if it is on record
	Curl           *tokenValueView
}

// A playgroundInput is what the form sends.
type playgroundInput struct {
	ProjectID, Model, API, System, Temperature, MaxTokens, Message string

	Session string           // of the conversation
	Turns   []playgroundTurn // of the conversation so far

	project     *projectState
	kind        exampleKind
	provider    string // of the upstream that the kind suits
	temperature *float64
	maxTokens   int64 // 0: the provider's default
}

// A playgroundTurn is a message of a conversation.
type playgroundTurn struct{ Role, Text string }

// playgroundPage shows the form, and does what its buttons say: "send" makes the call, "models" asks the providers for
// their models, "curl" shows the call as a command.
func (ui *adminUI) playgroundPage(r *pageRequest) (*pageResponse, error) {
	v := &playgroundView{Once: randomBase62(16), APIs: options("", "Chosen by model",
		"chat", "Chat Completions (OpenAI)", "responses", "Responses (OpenAI)", "messages", "Messages (Anthropic)",
		"gemini", "generateContent (Google)")}
	page, form := showPage("playground", "Playground", v), r.form
	if !r.isPost() {
		form = ui.keptForms.take(r.session.hash, r.http.URL.Path, r.now)
		if v.Restored = form != nil; !v.Restored {
			form = r.query
		}
	}
	v.read(form)
	if err := ui.findPlaygroundProject(r, v); err != nil {
		return nil, err
	}
	if len(v.Projects) == 0 {
		return &pageResponse{template: "no-project", title: "Playground"}, nil
	}
	if v.Model == "" && !r.isPost() {
		v.Model = ui.chooseExample(v.project, policy{}).Model
	}
	err := v.check(ui)
	if err == nil && r.isPost() {
		var stream *pageResponse
		if stream, err = ui.runPlayground(r, v); stream != nil {
			return stream, nil
		}
	}
	if v.Problem, err = problemOf(err); v.Problem != "" {
		page.status = http.StatusBadRequest
	}
	if err == nil && v.Call == nil {
		v.Call, err = ui.recordedCall(r, r.query.Get("call"))
	}
	return page, err
}

// runPlayground does what the button says. It returns a response only for a stream.
func (ui *adminUI) runPlayground(r *pageRequest, v *playgroundView) (stream *pageResponse, err error) {
	switch do := r.form.Get("do"); {
	case do == "models":
		return nil, ui.listPlaygroundModels(r, v)
	case do == "curl":
		v.Curl = v.curl(ui.publicBase(r))
		return nil, nil
	case strings.TrimSpace(v.Message) == "" || v.Model == "":
		return nil, badRequest("invalid_value", "message", "Enter a model and a message.")
	}
	isStream := r.http.Header.Get("Accept") == playgroundStreamType
	if !isStream && !ui.sentForms.claim(r.form.Get("once")) {
		return nil, badRequest("invalid_value", "", "This form was sent already. Send it again for another call.")
	}
	call, err := ui.newPlaygroundCall(r, &v.playgroundInput)
	if err != nil {
		return nil, err
	}
	if isStream {
		return &pageResponse{write: call.stream}, nil
	}
	_ = r.connection.SetWriteDeadline(time.Time{}) // the call has its own time limits
	a := call.ask(false, func(playgroundAnswer) error { return nil })
	_ = r.connection.SetWriteDeadline(time.Now().Add(writeTimeout))
	if v.Answer = &a; a.Error == "" {
		v.Turns = append(v.Turns, playgroundTurn{"user", v.Message}, playgroundTurn{"assistant", a.Text})
		v.Message = ""
	}
	v.Call, err = ui.recordedCall(r, a.ID)
	return nil, err
}

// read takes the input from a form, or from the parameters of the address.
func (in *playgroundInput) read(form url.Values) {
	clean := func(s string) string { return strings.ToValidUTF8(strings.ReplaceAll(s, "\r\n", "\n"), "\ufffd") }
	line := func(name string) string { return clean(strings.TrimSpace(form.Get(name))) }
	in.ProjectID, in.Model, in.API, in.Session = line("project_id"), line("model"), line("api"), line("session")
	in.System, in.Message = clean(form.Get("system")), clean(form.Get("message"))
	in.Temperature, in.MaxTokens = line("temperature"), line("max_tokens")
	if id, ok := strings.CutPrefix(in.Session, "playground-"); !ok || len(id) != 16 || !isAlphanumericOr(id, "") {
		in.Session = "playground-" + randomBase62(16)
	}
	for i, text := range form["turn"] {
		in.Turns = append(in.Turns, playgroundTurn{[...]string{"user", "assistant"}[i%2], clean(text)})
	}
}

// findPlaygroundProject reads the projects, and the one that is chosen: the first if none is.
func (ui *adminUI) findPlaygroundProject(r *pageRequest, v *playgroundView) error {
	all, err := ui.projectOptions(r, v.ProjectID)
	if err != nil || len(all) == 1 {
		return err
	}
	v.Projects, v.ProjectID = all[1:], cmp.Or(v.ProjectID, all[1].Value)
	row, err := ui.store.projectByID(r.ctx, v.ProjectID)
	if err == nil {
		v.project, err = ui.registry.readProject(r.ctx, row.seq)
	}
	v.NoUpstream = err == nil && len(v.project.upstreams) == 0
	return err
}

// check checks the input, and chooses the API.
func (in *playgroundInput) check(ui *adminUI) (err error) {
	size := len(in.System) + len(in.Message)
	for _, turn := range in.Turns {
		size += len(turn.Text)
	}
	if in.Temperature != "" {
		t, err := strconv.ParseFloat(in.Temperature, 64)
		if in.temperature = &t; err != nil || !(t >= 0 && t <= 2) {
			return badRequest("invalid_value", "temperature", "The temperature must be a number from 0 to 2.")
		}
	}
	if in.MaxTokens != "" {
		in.maxTokens, err = strconv.ParseInt(in.MaxTokens, 10, 64)
		if err != nil || in.maxTokens < 1 || in.maxTokens > 1_000_000 {
			return badRequest("invalid_value", "max_tokens",
				"The maximum of output tokens must be a whole number from 1 to 1,000,000.")
		}
	}
	if size > maxPlaygroundMessage || len(in.Turns) > maxPlaygroundTurns {
		return badRequest("invalid_value", "message", "The conversation is too long. Start a new one.")
	}
	in.chooseKind(ui)
	return nil
}

// chooseKind chooses how the model is called: by the API that was chosen, or by one that the project's policy allows
// and that an upstream has for the model.
func (in *playgroundInput) chooseKind(ui *adminUI) {
	best := 0
	consider := func(u *upstream, provider string) {
		for _, kind := range exampleKinds(provider) {
			_, pattern, _ := strings.Cut(kind.endpoint, " ")
			fit := 1
			switch {
			case kind.name == "embeddings" || in.API != "" && in.API != kind.name:
				continue
			case u == nil || !in.project.policy.allowsEndpoint(kind.endpoint, pattern):
			case !kind.suits(in.project, policy{}, in.Model):
				fit = 2
			case ui.isOfOtherProvider(u, in.Model):
				fit = 3
			default:
				fit = 4
			}
			if fit > best {
				best, in.kind, in.provider = fit, kind, provider
			}
		}
	}
	for _, u := range in.project.upstreams {
		if u.weight > 0 {
			consider(u, u.provider)
		}
	}
	for _, provider := range [...]string{providerOpenAI, providerAnthropic, providerGoogle} {
		consider(nil, provider)
	}
	if best == 0 { // there is no such API
		in.API = ""
		in.chooseKind(ui)
	}
}

// listPlaygroundModels asks the project's providers for the models that the project may use. Each API is asked once.
func (ui *adminUI) listPlaygroundModels(r *pageRequest, v *playgroundView) error {
	asked, problem := map[apiFamily]bool{}, "The providers list no model that the project may use."
	for _, u := range v.project.upstreams {
		if asked[u.family()] {
			continue
		}
		asked[u.family()] = true
		in := v.playgroundInput
		in.kind = exampleKinds(u.provider)[0]
		call, err := ui.newPlaygroundCall(r, &in)
		if err != nil {
			return err
		}
		models, text := call.listModels()
		v.Models, problem = append(v.Models, models...), cmp.Or(text, problem)
	}
	slices.Sort(v.Models)
	if v.Models = slices.Compact(v.Models); len(v.Models) == 0 {
		return badRequest("no_models", "model", problem)
	}
	return nil
}

// recordedCall returns a call on record, nil if there is none.
func (ui *adminUI) recordedCall(r *pageRequest, id string) (*requestListItem, error) {
	n := parseRequestID(id)
	if n == 0 {
		return nil, nil
	}
	ui.awaitRecorded(r)
	row, err := ui.store.requestByID(r.ctx, n)
	if errors.Is(err, errNotFound) {
		return nil, nil
	}
	return new(newRequestListItem(&row)), err
}

// messages returns the messages to send: the turns and the new one. Without a new one, they are those of the last call.
func (in *playgroundInput) messages() []playgroundTurn {
	if in.Message != "" {
		return append(slices.Clip(in.Turns), playgroundTurn{"user", in.Message})
	}
	return in.Turns[:max(0, len(in.Turns)-1)]
}

// request returns the path and the body of the call.
func (in *playgroundInput) request(stream bool) (path string, body map[string]any) {
	if in.kind.name == "gemini" {
		return in.geminiRequest(stream)
	}
	_, path, _ = strings.Cut(in.kind.endpoint, " ")
	messages := []map[string]any{}
	for _, turn := range in.messages() {
		messages = append(messages, map[string]any{"role": turn.Role, "content": turn.Text})
	}
	system, limit := "system", "max_tokens"
	switch body = map[string]any{"model": in.Model}; in.kind.name {
	case "responses":
		body["input"], body["store"] = messages, false
		system, limit = "instructions", "max_output_tokens"
	case "messages":
		body["messages"], body["max_tokens"] = messages, 4096 // the API requires a maximum
	default:
		if in.provider == providerOpenAI || in.provider == providerAzure {
			limit = "max_completion_tokens"
		}
		if system = ""; in.System != "" {
			messages = slices.Insert(messages, 0, map[string]any{"role": "system", "content": in.System})
		}
		body["messages"] = messages
	}
	if system != "" && in.System != "" {
		body[system] = in.System
	}
	if in.maxTokens != 0 {
		body[limit] = in.maxTokens
	}
	if in.temperature != nil {
		body["temperature"] = *in.temperature
	}
	if stream {
		body["stream"] = true
	}
	return path, body
}

// geminiRequest is request for Google's API, where the path names the model, and whether the answer is a stream.
func (in *playgroundInput) geminiRequest(stream bool) (path string, body map[string]any) {
	text := func(s string) []map[string]string { return []map[string]string{{"text": s}} }
	contents := []map[string]any{}
	for _, turn := range in.messages() {
		role := map[string]string{"user": "user", "assistant": "model"}[turn.Role]
		contents = append(contents, map[string]any{"role": role, "parts": text(turn.Text)})
	}
	body = map[string]any{"contents": contents}
	if in.System != "" {
		body["systemInstruction"] = map[string]any{"parts": text(in.System)}
	}
	settings := map[string]any{}
	if in.maxTokens != 0 {
		settings["maxOutputTokens"] = in.maxTokens
	}
	if in.temperature != nil {
		settings["temperature"] = *in.temperature
	}
	if len(settings) > 0 {
		body["generationConfig"] = settings
	}
	path = geminiModelPrefix + url.PathEscape(in.Model)
	if stream {
		return path + ":streamGenerateContent?alt=sse", body
	}
	return path + ":generateContent", body
}

// curl returns the call as the data of the template "curl", with a variable of the shell in place of a token.
func (in *playgroundInput) curl(base string) *tokenValueView {
	_, body := in.request(false)
	v := &tokenValueView{Base: base, tokenView: tokenView{Token: "$LLM_PROXY_TOKEN"}, exampleCall: exampleCall{
		Kind: in.kind.name, Headers: requiredHeaders("example", in.project.policy.Attribution),
		Body: strings.ReplaceAll(string(mustMarshal(body)), "'", `'\''`)}}
	if isShellSafe(in.Model) {
		v.Model = in.Model
	}
	return v
}

// A playgroundCall is a call that is about to be made.
type playgroundCall struct {
	ui    *adminUI
	r     *pageRequest
	in    *playgroundInput
	token secret
	end   func() // to be called when the call has ended
}

func (ui *adminUI) newPlaygroundCall(r *pageRequest, in *playgroundInput) (*playgroundCall, error) {
	end, err := ui.playground.begin(string(r.session.hash))
	if err != nil {
		return nil, err
	}
	c := &playgroundCall{ui: ui, r: r, in: in, end: end}
	if c.token, err = ui.playgroundToken(r, in.ProjectID); err != nil {
		end()
	}
	return c, err
}

// A playgroundAnswer is the result of a call. Streams are sent to the page's script as lines of JSON: the first has the
// head of the answer, the last has Done, and those between have the text.
type playgroundAnswer struct {
	ID      string         `json:"id,omitempty"` // of the call; "": it did not begin
	Status  int            `json:"status,omitempty"`
	Headers []labeledValue `json:"headers,omitempty"`
	Text    string         `json:"text,omitempty"`
	Error   string         `json:"error,omitempty"`
	Done    bool           `json:"done,omitempty"`
}

// stream makes the call and writes its answer to the browser.
func (c *playgroundCall) stream(w http.ResponseWriter) error {
	w.Header().Set("Content-Type", playgroundStreamType)
	w.Header().Set("X-Accel-Buffering", "no")
	show := func(line playgroundAnswer) error {
		_ = c.r.connection.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, err := w.Write(append(mustMarshal(line), '\n'))
		return cmp.Or(err, c.r.connection.Flush())
	}
	a := c.ask(true, show)
	_ = show(playgroundAnswer{Done: true, Error: a.Error}) // the browser may have left
	return nil
}

// ask makes the call and returns its answer. show gets the head of the answer, and each piece of text; an error of it
// ends the call.
func (c *playgroundCall) ask(stream bool, show func(playgroundAnswer) error) (a playgroundAnswer) {
	defer c.end()
	path, body := c.in.request(stream)
	res, done, err := c.send(http.MethodPost, path, mustMarshal(body))
	if err != nil {
		return playgroundAnswer{Error: "The call ended before its answer began."}
	}
	defer done()
	a.Status, a.ID = res.StatusCode, res.Header.Get("X-Llm-Proxy-Request-Id")
	for _, name := range slices.Sorted(maps.Keys(res.Header)) {
		a.Headers = append(a.Headers, labeledValue{name, strings.Join(res.Header[name], ", ")})
	}
	hasText := false
	read := func(data []byte) error {
		text, problem := answerText(data)
		a.Error = cmp.Or(a.Error, problem)
		if hasText = hasText || text != ""; text == "" {
			return nil
		}
		if !stream {
			a.Text += text
		}
		return show(playgroundAnswer{Text: text})
	}
	if err = show(a); err == nil && isEventStream(res) {
		err = eachEvent(res.Body, read)
	} else if err == nil {
		whole, cut := io.ReadAll(io.LimitReader(res.Body, maxPlaygroundAnswer))
		err = cmp.Or(cut, read(whole))
	}
	switch {
	case a.Status >= 400:
		a.Error = fmt.Sprintf("%d %s. %s", a.Status, http.StatusText(a.Status), a.Error)
	case a.Error == "" && err != nil:
		a.Error = "The answer broke off."
	case a.Error == "" && !hasText:
		a.Error = "The answer has no text."
	}
	return a
}

// listModels returns the models of the API that the project may use, or what went wrong.
func (c *playgroundCall) listModels() (models []string, problem string) {
	defer c.end()
	res, done, err := c.send(http.MethodGet, map[apiFamily]string{apiOpenAI: "/v1/models",
		apiAnthropic: "/v1/models?limit=1000", apiGemini: "/v1beta/models?pageSize=1000"}[c.in.kind.api], nil)
	if err != nil {
		return nil, "The call for the list of models was cut off."
	}
	defer done()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxPlaygroundAnswer))
	if _, problem = answerText(body); err != nil || res.StatusCode != http.StatusOK {
		return nil, "The list of models could not be read. " + problem
	}
	var list struct {
		Data   []struct{ ID string }
		Models []struct{ Name string }
	}
	_ = json.Unmarshal(body, &list) // what cannot be read is left out
	for _, m := range list.Models {
		list.Data = append(list.Data, struct{ ID string }{strings.TrimPrefix(m.Name, googleModelName)})
	}
	for _, m := range list.Data {
		if c.in.kind.suits(c.in.project, policy{}, m.ID) {
			models = append(models, m.ID)
		}
	}
	return models, ""
}

// answerText returns the text of an answer or of an event of a stream, of any of the APIs, and the message of an error.
func answerText(data []byte) (text, problem string) {
	var v map[string]any
	_ = json.Unmarshal(data, &v) // what cannot be read has no text
	kind, _ := v["type"].(string)
	if kind == "error" || strings.HasPrefix(kind, "response.") && kind != "response.output_text.delta" {
		return "", cmp.Or(textAt(v, "error", "message"), textAt(v, "message"),
			textAt(v, "response", "error", "message"))
	}
	for _, path := range [...][]string{{"choices", "delta", "content"}, {"choices", "delta", "refusal"},
		{"choices", "message", "content"}, {"choices", "message", "refusal"}, {"delta"}, {"delta", "text"},
		{"output", "content", "text"}, {"content", "text"}, {"candidates", "content", "parts", "text"}} {
		text += textAt(v, path...)
	}
	return text, textAt(v, "error", "message")
}

// textAt returns the text at a path of names in a JSON value. It follows all entries of a list.
func textAt(v any, path ...string) (text string) {
	switch v := v.(type) {
	case string:
		if len(path) == 0 {
			return v
		}
	case map[string]any:
		if len(path) > 0 {
			return textAt(v[path[0]], path[1:]...)
		}
	case []any:
		for _, entry := range v {
			text += textAt(entry, path...)
		}
	}
	return text
}

// eachEvent calls do with the data of each event of a stream. The APIs write it on one line.
func eachEvent(stream io.Reader, do func(data []byte) error) error {
	lines := bufio.NewScanner(stream)
	lines.Buffer(nil, maxPlaygroundEvent)
	for lines.Scan() {
		if data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data:")); ok {
			if err := do(data); err != nil {
				return err
			}
		}
	}
	return lines.Err()
}

// send sends a request to /v1 over a connection within the process, and returns the head of its answer. The proxy
// treats it like a client's in every way, also where it breaks an answer off. The call ends when the browser leaves,
// and when the session ends. done ends it too, and returns when it is settled.
func (c *playgroundCall) send(method, path string, body []byte) (res *http.Response, done func(), err error) {
	ctx, cancel := context.WithCancel(c.r.http.Context())
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, bytes.NewReader(body))
	if err != nil {
		cancel()
		return nil, nil, err
	}
	for _, h := range requiredHeaders("playground", c.in.project.policy.Attribution) {
		req.Header.Set(h.Label, h.Value)
	}
	req.Header.Set(sessionHeader, c.in.Session)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.in.kind.name == "messages" {
		req.Header.Set("Anthropic-Version", "2023-06-01")
	}
	ours, theirs := net.Pipe()
	ended := make(chan struct{})
	server := &http.Server{ReadHeaderTimeout: writeTimeout, ErrorLog: newHTTPErrorLog(c.ui.log)}
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.RemoteAddr = net.JoinHostPort(c.r.origin.address, "0") // the browser's, for policies and the ledger
		c.ui.callAPI(w, r, c.token)
	})
	server.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed { // after the handler has returned
			close(ended)
		}
	}
	listener := connListener(make(chan net.Conn, 1))
	listener <- theirs
	var work sync.WaitGroup
	work.Go(func() { _ = server.Serve(listener) })
	work.Go(func() { _ = req.Write(ours) })
	work.Go(func() { c.ui.watchSession(ctx, c.r, cancel) })
	stop := context.AfterFunc(ctx, func() { _ = ours.Close() })
	done = func() {
		stop()
		cancel()
		_ = ours.Close()
		<-ended
		_ = server.Close()
		work.Wait()
	}
	if res, err = http.ReadResponse(bufio.NewReader(ours), req); err != nil {
		done()
	}
	return res, done, err
}
