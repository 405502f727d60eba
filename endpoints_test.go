// These tests are about endpoints.go: which requests are forwarded, to which path, with which query.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// parseTarget parses a request target as net/http does.
func parseTarget(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.ParseRequestURI(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// TestMatch: what is forwarded, and where. An id in a path is kept as it is; a model is decoded.
func TestMatch(t *testing.T) {
	t.Parallel()
	const permissions = "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions"
	const model, file = "/v1/models/{model}", "/v1/files/{file_id}/content"
	table := newEndpointTable()
	for _, c := range []struct {
		method, target string
		path           string // "" for target
		pattern        string // "" for path
		model          string
	}{
		{method: "POST", target: "/v1/chat/completions"},
		{method: "POST", target: "/v1/chat/completions?", path: "/v1/chat/completions"},
		{method: "GET", target: "/v1/chat/completions?limit=1", path: "/v1/chat/completions"},
		{method: "POST", target: "http://evil/v1/messages", path: "/v1/messages"},
		{method: "POST", target: "/v1/responses/compact"},
		{method: "GET", target: "/v1/responses/resp_1", pattern: "/v1/responses/{response_id}"},
		{method: "POST", target: "/v1/videos/edits"},
		{method: "GET", target: "/v1/videos/characters/content", pattern: "/v1/videos/characters/{character_id}"},
		{method: "GET", target: "/v1/files/file-a.b_C9/content", pattern: file},
		{method: "POST", target: "/v1/threads/runs"},
		{method: "GET", target: "/v1/fine_tuning/checkpoints/ft:gpt-4o:org::id/permissions", pattern: permissions},
		{method: "GET", target: "/v1/models"},
		{method: "GET", target: "/v1/models/gpt-4o_x.1", pattern: model, model: "gpt-4o_x.1"},
		{method: "GET", target: "/v1/models/ft%3Agpt-4o%3aorg::id", pattern: model, model: "ft:gpt-4o:org::id"},
		{method: "GET", target: "/v1/models/claude-opus-4-6%5B1m%5D", pattern: model, model: "claude-opus-4-6[1m]"},
		{method: "GET", target: "/v1/models/claude-opus-4-6[1m]", pattern: model, model: "claude-opus-4-6[1m]"},
		{method: "GET", target: "/v1/models/a%20b+c(d)%22%3f%23,", pattern: model, model: `a b+c(d)"?#,`},
		{method: "DELETE", target: "/v1/models/%C3%A9%3b", pattern: model, model: "é;"},
		{method: "GET", target: "/v1/models/é", path: "/v1/models/%C3%A9", pattern: model, model: "é"},
		{method: "GET", target: "/v1/models/meta/llama@1+x", pattern: model, model: "meta/llama@1+x"},
		{method: "GET", target: "/v1/models/meta%2fllama", pattern: model, model: "meta/llama"},
		{method: "DELETE", target: "/v1/models/ft:a", pattern: model, model: "ft:a"},
	} {
		path := cmp.Or(c.path, c.target)
		name := c.method + " " + cmp.Or(c.pattern, path)
		m, err := table.match(c.method, parseTarget(t, c.target))
		if err != nil || m.endpoint.name() != name || m.path != path || m.model != c.model {
			t.Errorf("%s %s: got %+v, %v; want %s at %s, model %q", c.method, c.target, m, err, name, path, c.model)
		}
	}
}

// unknownTargets are paths that no endpoint has: misspelled, encoded, with dots, slashes or control characters,
// too long, or not on the proxy's list.
func unknownTargets() []string {
	return append(strings.Fields(`
		/v1/chat/completionsX /v1/chat/completions/ //v1/chat/completions /V1/chat/completions /v1/Chat/completions
		/v1/chat//completions /v1/chat/completions;x=1 /v1/chat/completions. /v1/chat/completions%20 /v1/chat
		/v1 /v1/ / * /v1/chat%2fcompletions /v1%2Fchat/completions /v1/chat%5ccompletions /v1/chat\completions
		/v1/%63hat/completions /v1/chat/completion%73 /v1/x/../chat/completions /v1/chat/./completions
		/v1/..%2fchat/completions /v1/%2e%2e/manage/tokens /v1/../manage/tokens /v1/..;/admin /v1/chat/completions%00
		/v1/chat/completions%252f /v1/chat/completions%c0%af /v1/chat／completions /v1/chat/completions%EF%BC%8F
		/v1/files/. /v1/files/.. /v1/files/.x /v1/files/a..b /v1/files/%2e%2e /v1/files/a%2fb /v1/files/a%3fb
		/v1/files/a%23b /v1/files/a#b /v1/files/é /v1/files/%C3%A9 /v1/files/a%62 /v1/files/a:b /v1/files/a;b
		/v1/files/a%00 /v1/files/a%0d%0aX:1 /v1/files/ /v1/files//content /v1/files/a/content/ /v1/files/a/b
		/v1/files/a/content/b /v1/responses/compact/input_items
		/v1/models/ /v1/models// /v1/models/a/ /v1/models/a//b /v1/models/. /v1/models/.. /v1/models/a/../b
		/v1/models/a%2f..%2fb /v1/models/a%2f%2fb /v1/models/%2fa /v1/models/a%2f /v1/models/%2e%2e /v1/models/%252e
		/v1/models/a%25 /v1/models/..%3b /v1/models/a;b /v1/models/a\b /v1/models/a%5Cb /v1/models/a%00
		/v1/models/%C3 /v1/models/a%0d%0a /v1/models/%C2%85
		/v1/engines/davinci/completions /openai/deployments/gpt-4/chat/completions /v1/realtime
		/v1/prompts /v1/messages/batches/
		/v1/messages/batches/a/b /v1/agents/sessions /v1/agents/sessions/s /v1/agents/sessions/s/events
		/v1/live/sessions /v1/live/sessions/s /v1/webhooks /v1/webhook_endpoints /v1/webhook_endpoints/w
		/v1/projects/p/webhook_endpoints
		/manage/tokens /admin/ /metrics`),
		"/v1/files/"+strings.Repeat("x", 129), "/v1/files/"+strings.Repeat("x", 1024),
		"/v1/models/"+strings.Repeat("x", 257), "/v1/models/"+strings.Repeat("%41", 257),
		"/v1/models/"+strings.Repeat("a/", 100_000)+"a")
}

// TestMatchRefuses: unknown paths are refused with any method, and known ones with other methods.
func TestMatchRefuses(t *testing.T) {
	t.Parallel()
	table := newEndpointTable()
	for _, target := range unknownTargets() {
		u := parseTarget(t, target)
		for _, method := range []string{"GET", "POST", "DELETE"} {
			if m, err := table.match(method, u); err != errNoEndpoint {
				t.Errorf("%s %.100s: got %+v, %v", method, target, m, err)
			}
		}
	}
	if m, err := table.match("GET", &url.URL{Path: "/v1/models /x\n"}); err != errNoEndpoint {
		t.Errorf("got %+v, %v", m, err)
	}
	for _, c := range []struct{ method, target, allow string }{
		{"GET", "/v1/embeddings", "POST"},
		{"HEAD", "/v1/embeddings", "POST"},
		{"PUT", "/v1/models", "GET, HEAD"},
		{"get", "/v1/models", "GET, HEAD"},
		{"head", "/v1/models", "GET, HEAD"},
		{"", "/v1/models", "GET, HEAD"},
		{"CONNECT", "/v1/messages", "POST"},
		{"PATCH", "/v1/models/a", "GET, HEAD, DELETE"},
		{"PATCH", "/v1/files/a", "DELETE, GET, HEAD"},
		{"GET", "/v1/responses/compact", "POST"},
		{"GET", "/v1/videos/edits", "POST"},
		{"TRACE", "/v1/chat/completions", "POST, GET, HEAD"},
	} {
		m, err := table.match(c.method, parseTarget(t, c.target))
		if err != errWrongMethod || m.allow != c.allow || m.endpoint != nil {
			t.Errorf("%s %s: got %+v, %v; want only %s", c.method, c.target, m, err, c.allow)
		}
	}
}

// TestEndpointsAreTheDocumentedOnes: of all operations in OpenAI's specification and all methods, exactly the
// listed ones are forwarded, in the listed class.
func TestEndpointsAreTheDocumentedOnes(t *testing.T) {
	t.Parallel()
	var operations [][3]string // method, path, class
	data := mustReadFile(t, "testdata/openai-endpoints.json")
	if err := json.Unmarshal([]byte(data), &operations); err != nil || len(operations) < 250 {
		t.Fatal(len(operations), err)
	}
	const batch = "/v1/messages/batches/{message_batch_id}"
	operations = append(operations, [3]string{"POST", "/v1/messages", "inference"},
		[3]string{"POST", "/v1/messages/count_tokens", "inference"},
		[3]string{"GET", "/v1/messages/batches", "stateful"}, [3]string{"POST", "/v1/messages/batches", "stateful"},
		[3]string{"GET", batch, "stateful"}, [3]string{"DELETE", batch, "stateful"},
		[3]string{"POST", batch + "/cancel", "stateful"}, [3]string{"GET", batch + "/results", "stateful"})
	operations = append(operations, [3]string{"GET", "/v1beta/models", "inference"},
		[3]string{"GET", "/v1beta/models/{model}", "inference"})
	const interaction = "/v1beta/interactions/{interaction_id}"
	operations = append(operations, [3]string{"POST", "/v1beta/interactions", "stateful"},
		[3]string{"GET", interaction, "stateful"}, [3]string{"DELETE", interaction, "stateful"},
		[3]string{"POST", interaction + "/cancel", "stateful"})
	for _, verb := range []string{"batchEmbedContents", "countTokens", "embedContent", "generateContent",
		"streamGenerateContent"} {
		operations = append(operations, [3]string{"POST", "/v1beta/models/{model}:" + verb, "inference"})
	}
	want, paths := map[string]string{}, map[string]bool{}
	for _, o := range operations {
		paths[o[1]] = true
		if o[2] == "inference" || o[2] == "stateful" {
			want[o[0]+" "+o[1]] = o[2]
		}
	}
	table := newEndpointTable()
	id := regexp.MustCompile(`\{[^}]*\}`)
	found := 0
	for path := range paths {
		u := parseTarget(t, id.ReplaceAllString(path, "abc-123"))
		for method := range strings.FieldsSeq("GET HEAD POST PUT PATCH DELETE OPTIONS CONNECT TRACE") {
			m, err := table.match(method, u)
			operation := method + " " + path
			class := want[operation]
			if method == "HEAD" { // a HEAD is the GET of the same path
				operation = "GET " + path
				class = want[operation]
			}
			switch {
			case class == "" && err == nil:
				t.Errorf("%s %s is forwarded as %s", method, path, m.endpoint.name())
			case class == "":
			case err != nil || m.endpoint.name() != operation || m.path != u.Path:
				t.Errorf("%s %s: got %+v, %v", method, path, m, err)
			case (class == "stateful") != (m.endpoint.class == classStateful):
				t.Errorf("%s %s is not %s", method, path, class)
			case method != "HEAD":
				found++
			}
		}
	}
	if found != len(want) || found != len(table.all()) {
		t.Errorf("%d of %d operations found; the table has %d", found, len(want), len(table.all()))
	}
}

// TestEndpointTable: the rows are consistent in themselves.
func TestEndpointTable(t *testing.T) {
	t.Parallel()
	wellFormed := regexp.MustCompile(`^(/v1(/[a-z_]+|/\{[a-z_]+\})+|/v1beta/models(/\{model\}(:[a-zA-Z]+)?)?|` +
		`/v1beta/interactions(/\{interaction_id\}(/cancel)?)?)$`)
	isOfBoth := regexp.MustCompile(`^/v1/(files|skills)(/|$)`) // objects that both OpenAI and Anthropic have
	seen := map[string]bool{}
	for _, e := range newEndpointTable().all() {
		name := e.name()
		isPost, isForm := e.method == "POST", e.body == bodyForm || e.body == bodyJSONOrForm
		for problem, found := range map[string]bool{
			"listed twice":      seen[name],
			"malformed pattern": !wellFormed.MatchString(e.pattern),
			"unknown method":    !isPost && e.method != "GET" && e.method != "DELETE",
			"only a POST has a body, a meter or traits": !isPost &&
				(e.body != bodyNone || e.meter != meterNone || e.needsModel || e.addUsage || e.upload),
			"every inference POST needs a model": e.class == classInference && isPost != e.needsModel,
			"wrong modelInPath":                  strings.Contains(e.pattern, "{model}") != e.modelInPath,
			"wrong upload":                       e.upload && (e.class != classStateful || !isForm),
			"wrong addUsage": e.addUsage !=
				(name == "POST /v1/chat/completions" || name == "POST /v1/completions"),
			"wrong API family": (e.api == apiAnthropic) != strings.HasPrefix(e.pattern, "/v1/messages") ||
				(e.api == apiGemini) != strings.HasPrefix(e.pattern, "/v1beta/") ||
				(e.api == apiAny) != (e.method == "GET" && strings.HasPrefix(e.pattern, "/v1/models") ||
					isOfBoth.MatchString(e.pattern)),
		} {
			if found {
				t.Errorf("%s: %s", name, problem)
			}
		}
		seen[name] = true
	}
}

// TestMatchGemini: the model and the method are read in one way only, and another model is put into the same path.
func TestMatchGemini(t *testing.T) {
	t.Parallel()
	table := newEndpointTable()
	for target, model := range map[string]string{
		"/v1beta/models/gemini-2.5-flash:generateContent":        "gemini-2.5-flash",
		"/v1beta/models/gemini-2.5-flash:streamGenerateContent":  "gemini-2.5-flash",
		"/v1beta/models/gemini%20x:countTokens":                  "gemini x",
		"/v1beta/models/text-embedding-004:embedContent":         "text-embedding-004",
		"/v1beta/models/gemini-embedding-001:batchEmbedContents": "gemini-embedding-001",
	} {
		m, err := table.match("POST", parseTarget(t, target))
		if err != nil || m.model != model || m.path != target || m.endpoint.api != apiGemini || !m.endpoint.needsModel {
			t.Errorf("%s: got %+v, %v", target, m, err)
			continue
		}
		verb := target[strings.IndexByte(target, ':'):]
		for name, want := range map[string]string{"gemini-3": "gemini-3", "a/b:c d": "a%2Fb%3Ac%20d", "..": ".."} {
			if got := m.endpoint.pathForModel(name, m.path); got != "/v1beta/models/"+want+verb {
				t.Errorf("%s as %s: got %s", target, name, got)
			}
		}
		if _, err := table.match("GET", parseTarget(t, target)); err != errWrongMethod {
			t.Errorf("GET %s: got %v", target, err)
		}
	}
	for _, target := range []string{
		"/v1beta/models/:generateContent", "/v1beta/", "/v1beta/models/a:", "/v1beta/models/", "/v1beta/models/a/b",
		"/v1beta/models/a:generatecontent", "/v1beta/models/a:generateContent:countTokens",
		"/v1beta/models/a:generateContent/", "/v1beta/models/a%3AgenerateContent",
		"/v1beta/models/b%3Ax:generateContent", "/v1beta/models/a:generate%43ontent",
		"/v1beta/models/a/b:generateContent", "/v1beta/models/a%2Fb:generateContent",
		"/v1beta/models/../models/a:generateContent", "/v1beta/models/..:generateContent",
		"/v1beta//models/a:countTokens", "/v1beta/models/a;b:generateContent", "/v1beta/models/a%00:generateContent",
		"/v1beta/models/%25:generateContent", "/v1/models/a:generateContent/x/..",
		"/v1beta/tunedModels/a:generateContent", "/v1beta/files", "/v1alpha/models/a:countTokens",
		"/v1beta/cachedContents", "/v1beta/models/a:batchGenerateContent", "/v1beta/chat/completions",
		"/v1betas/models/a:countTokens",
	} {
		if m, err := table.match("POST", parseTarget(t, target)); err != errNoEndpoint {
			t.Errorf("%s: got %+v, %v", target, m, err)
		}
	}
}

// TestCheckQuery: a query with known parameters goes up as it is; see TestQueryOverTheWire for the bytes.
func TestCheckQuery(t *testing.T) {
	t.Parallel()
	table := newEndpointTable()
	list, err := table.match("GET", parseTarget(t, "/v1/chat/completions"))
	if err != nil {
		t.Fatal(err)
	}
	files, err := table.match("GET", parseTarget(t, "/v1/files"))
	if err != nil {
		t.Fatal(err)
	}
	for _, query := range []string{
		"", "&&", "limit=20&after=file-1&order=desc", "order=asc&limit=1", "beta=true&stream", "l%69mit=%31",
		"include[]=a&include%5B%5D=b&include=c&include=d", "after=a%26b%3Dc%23%20+%c3%a9%25", "metadata=null",
		"metadata[user]=x&metadata%5Bteam-1%5D=y",
	} {
		if model, err := checkQuery(query, files.endpoint); err != nil || model != "" {
			t.Errorf("%q: got model %q, %v", query, model, err)
		}
	}
	model, err := checkQuery("limit=1&model=gpt%2D4o&metadata[key]=value", list.endpoint)
	if err != nil || model != "gpt-4o" {
		t.Errorf("stored completions: got model %q, %v", model, err)
	}
	if _, err := checkQuery("page=MjAyNQ&limit=20&beta=true", list.endpoint); err != nil { // of Anthropic's API
		t.Errorf("a page: %v", err)
	}
	if _, err := checkQuery("model=a&mod%65l=b", list.endpoint); err == nil {
		t.Error("two models pass")
	}
	for _, c := range []struct{ query, param, msg string }{
		{"model=gpt-4", "model", "Unknown"},
		{"Limit=1", "Limit", "Unknown"},
		{"=1", "", "Unknown"},
		{"api-version=1&api-version=2", "api-version", "Repeated"},
		{"metadata=1", "metadata", "Unknown"},
		{"metadata[]=1", "metadata[]", "Unknown"},
		{"metadata[a][b]=1", "metadata[a][b]", "Unknown"},
		{"metadata[a=1", "metadata[a", "Unknown"},
		{"include[0]=1", "include[0]", "Unknown"},
		{"limit=1&limit=2", "limit", "Repeated"},
		{"limit=1&l%69mit=2", "limit", "Repeated"},
		{"metadata[a]=1&metadata[a]=2", "metadata[a]", "Repeated"},
		{"limit=1;model=x", "", "';'"},
		{"after=%zz", "", "bad escape"},
		{"%zz=1", "", "bad escape"},
		{"after=%", "", "bad escape"},
		{"after=a%00", "after", "invalid character"},
		{"after=a%0d%0a", "after", "invalid character"},
		{"after=%ff", "after", "invalid character"},
		{"after=%C2%85", "after", "invalid character"},
		{"x\x00y=1", "x\x00y", `"x\x00y"`},
		{strings.Repeat("&", 2049), "", "longer"},
		{"after=" + strings.Repeat("x", 100<<10), "", "longer"},
		{strings.Repeat("include=x&", 10_000) + "model=x", "", "longer"},
	} {
		got, err := checkQuery(c.query, files.endpoint)
		e, ok := errors.AsType[*bodyError](err)
		if !ok || got != "" || e.param != c.param || !strings.Contains(e.msg, c.msg) {
			t.Errorf("%.80q: got %q, %v; want %s for %q", c.query, got, err, c.msg, c.param)
		}
	}
}

// publishedQueries are the query parameters of all operations that have any, by OpenAI's specification and SDKs, and
// Anthropic's. include is a list, and metadata an object.
const publishedQueries = `
	GET /v1/assistants                                                      limit order after before
	GET /v1/audio/voice_consents                                            after limit
	GET /v1/batches                                                         after limit
	GET /v1/chat/completions                                                model metadata after limit order
	GET /v1/chat/completions/{completion_id}/messages                       after limit order
	GET /v1/chatkit/threads                                                 limit order after before user
	GET /v1/chatkit/threads/{thread_id}/items                               limit order after before
	GET /v1/containers                                                      limit order after name
	GET /v1/containers/{container_id}/files                                 limit order after
	GET /v1/conversations/{conversation_id}/items                           limit order after include
	POST /v1/conversations/{conversation_id}/items                          include
	GET /v1/conversations/{conversation_id}/items/{item_id}                 include
	GET /v1/evals                                                           after limit order order_by
	GET /v1/evals/{eval_id}/runs                                            after limit order status
	GET /v1/evals/{eval_id}/runs/{run_id}/output_items                      after limit order status
	GET /v1/files                                                  purpose limit order after beta before_id after_id
	GET /v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions project_id after limit order
	GET /v1/fine_tuning/jobs                                                after limit metadata
	GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints               after limit
	GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/events                    after limit
	POST /v1/messages                                                       beta
	POST /v1/messages/count_tokens                                          beta
	GET /v1/messages/batches                                                before_id after_id limit
	GET /v1/models                                                          before_id after_id limit beta
	GET /v1/models/{model}                                                  beta
	GET /v1/responses/{response_id}                           include stream starting_after include_obfuscation beta
	GET /v1/responses/{response_id}/input_items                             limit order after include beta
	GET /v1/skills                                                          limit order after page source beta
	GET /v1/skills/{skill_id}/versions                                      limit order after page beta
	GET /v1/threads/{thread_id}/messages                                    limit order after before run_id
	GET /v1/threads/{thread_id}/runs                                        limit order after before
	POST /v1/threads/{thread_id}/runs                                       include
	GET /v1/threads/{thread_id}/runs/{run_id}/steps                         limit order after before include
	GET /v1/threads/{thread_id}/runs/{run_id}/steps/{step_id}               include
	GET /v1/vector_stores                                                   limit order after before
	GET /v1/vector_stores/{vector_store_id}/file_batches/{batch_id}/files   limit order after before filter
	GET /v1/vector_stores/{vector_store_id}/files                           limit order after before filter
	GET /v1/videos                                                          limit order after
	GET /v1/videos/{video_id}/content                                       variant`

// TestPublishedQueries: every published query parameter of every operation goes up, one by one and together, as the
// SDKs write them; HEAD takes what GET takes. The model of the list of stored completions is subject to the policy.
func TestPublishedQueries(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	p.addUpstreamAt(p.provider, providerAnthropic, `"weight":1`)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(200, `{"data":[]}`) })
	id := regexp.MustCompile(`\{[^}]*\}`)
	sample := map[string]string{"include": "include[]=a.b&include%5B%5D=c",
		"metadata": "metadata[key]=value&metadata%5Bk2%5D=a%20b",
		"model":    "model=gpt-4o", "limit": "limit=1", "beta": "beta=true", "stream": "stream=true"}
	operations := 0
	for line := range strings.Lines(strings.TrimSpace(publishedQueries)) {
		words := strings.Fields(line)
		method, path := words[0], id.ReplaceAllString(words[1], "x-1")
		var all []string
		for _, name := range words[2:] {
			all = append(all, cmp.Or(sample[name], name+"=x%2By"))
		}
		queries := append(slices.Clone(all), strings.Join(all, "&"))
		merged := path == "/v1/models" // of several providers: the proxy pages itself
		if merged {
			queries = []string{"beta=true", "limit=5"}
		}
		for _, query := range queries {
			methods, body := []string{method}, ""
			if method == "POST" {
				body = `{"model":"claude-sonnet-5","max_tokens":1}`
			} else {
				methods = []string{"GET", "HEAD"}
			}
			for _, method := range methods {
				a := p.do(method, path+"?"+query, body, "Authorization", "Bearer "+p.token,
					"Content-Type", "application/json")
				if got := p.provider.lastRequest(t).target; a.status != 200 || got != path+"?"+query && !merged {
					t.Errorf("%s %s?%s: got %d %s, the provider got %s", method, path, query, a.status, a.body, got)
				}
			}
		}
		operations++
	}
	if operations < 38 {
		t.Errorf("%d operations", operations)
	}
	p.manage("PATCH", "/manage/tokens/"+p.tokenID, `{"policy":{"models":["gpt-4o"]}}`, 200, nil)
	for query, status := range map[string]int{"model=gpt-4o": 200, "model=o1": 403, "limit=1": 200} {
		if a := p.do("GET", chatPattern+"?"+query, "", "Authorization", "Bearer "+p.token); a.status != status {
			t.Errorf("%s: got %d %s, want %d", query, a.status, a.body, status)
		}
	}
}

// FuzzMatch: an outbound path is safe, matches again as the same, and is the endpoint's pattern with ids.
func FuzzMatch(f *testing.F) {
	for s := range strings.FieldsSeq(`/v1/chat/completions /v1/files/file-1/content /v1/models/a%2Fb/c
		/v1/models/ft%3Aa /v1/../v1/models //v1/models /v1/vector_stores/vs_1/files/f_1/content?limit=1
		/v1/fine_tuning/checkpoints/ft:a:b/permissions /v1/models/..%2f http://h/v1/models`) {
		f.Add("GET", s)
	}
	f.Add("DELETE", "/v1/models/x")
	table := newEndpointTable()
	safe := regexp.MustCompile(`^/v1(/([A-Za-z0-9._~!$&'()*+,=:@\[\]-]|%[0-9A-Fa-f]{2})+)+$`)
	f.Fuzz(func(t *testing.T, method, s string) {
		u, err := url.ParseRequestURI(s)
		if err != nil {
			u = &url.URL{Path: s}
		}
		m, err := table.match(method, u)
		if err != nil {
			if m.endpoint != nil || (err == errWrongMethod) != (m.allow != "") {
				t.Fatalf("%+v with %v", m, err)
			}
			return
		}
		if strings.Contains(m.path, "..") || strings.Contains(m.path, "//") || !safe.MatchString(m.path) {
			t.Fatalf("outbound path %q", m.path)
		}
		out, err := url.ParseRequestURI(m.path)
		if err != nil || out.EscapedPath() != m.path {
			t.Fatalf("outbound path %q: %v", m.path, err)
		}
		again, err := table.match(method, out)
		if err != nil || again != m {
			t.Fatalf("%q: %+v, then %+v, %v", s, m, again, err)
		}
		checkMatch(t, m)
	})
}

// checkMatch checks that m.path is m's pattern with an id for each parameter.
func checkMatch(t *testing.T, m endpointMatch) {
	t.Helper()
	if m.endpoint.modelInPath {
		before, after, _ := strings.Cut(m.endpoint.pattern, "{model}")
		got, err := url.PathUnescape(strings.TrimSuffix(strings.TrimPrefix(m.path, before), after))
		if err != nil || got != m.model || m.model == "" {
			t.Fatalf("%q has model %q, %v; got %q", m.path, got, err, m.model)
		}
		return
	}
	pattern, path := strings.Split(m.endpoint.pattern, "/"), strings.Split(m.path, "/")
	if len(pattern) != len(path) {
		t.Fatalf("%q does not fit %q", m.path, m.endpoint.pattern)
	}
	for i, p := range pattern {
		if p != path[i] && (p == "" || p[0] != '{' || !isValidID(path[i], true)) {
			t.Fatalf("%q does not fit %q", m.path, m.endpoint.pattern)
		}
	}
}

func BenchmarkMatch(b *testing.B) {
	table := newEndpointTable()
	for _, path := range []string{"/v1/chat/completions", "/v1/files/file-abc123/content", "/v1/models/gpt-4o"} {
		b.Run(path, func(b *testing.B) {
			u, err := url.ParseRequestURI(path)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := table.match("GET", u); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
