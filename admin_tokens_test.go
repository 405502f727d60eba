// Tests of the page that shows a token's value: its examples work as they are, under the policies of the token and its
// project, with every provider.
package main

import (
	"cmp"
	"fmt"
	"go/parser"
	"go/token"
	"html"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"llm-proxy/demo"
)

// A snippetCase is a project, a token, and the call that the examples are expected to make.
type snippetCase struct {
	provider, upstream string // the upstream's provider, and more of its fields
	project, token     string // policies
	model, endpoint    string // of the call
	says               string // also on the page
}

func snippetCases() []snippetCase {
	return []snippetCase{
		{provider: "openai", model: "gpt-4o-mini", endpoint: "POST /v1/chat/completions"},
		{provider: "openai", token: `{"models":["gpt-5*"]}`, model: "gpt-5-mini",
			endpoint: "POST /v1/chat/completions"},
		{provider: "openai", project: `{"models":["gpt-4*","o4-mini"]}`, token: `{"models":["gpt-4.1","gpt-5"]}`,
			model: "gpt-4.1", endpoint: "POST /v1/chat/completions"},
		{provider: "openai", token: `{"endpoints":["/v1/responses"],"models":["o3*"]}`, model: "o3",
			endpoint: "POST /v1/responses"},
		{provider: "openai", token: `{"models":["text-embedding-3-large"]}`, model: "text-embedding-3-large",
			endpoint: "POST /v1/embeddings"},
		{provider: "openai", project: `{"endpoints":["POST /v1/embeddings"]}`, model: "text-embedding-3-small",
			endpoint: "POST /v1/embeddings"},
		{provider: "openai", upstream: `"models":["gpt-4.1-nano"]`, model: "gpt-4.1-nano",
			endpoint: "POST /v1/chat/completions"},
		{provider: "anthropic", model: "claude-haiku-4-5", endpoint: "POST /v1/messages"},
		{provider: "anthropic", token: `{"models":["gpt-4o","claude-opus-*"]}`, model: "claude-opus-",
			endpoint: "POST /v1/messages"},
		{provider: "google", model: "gemini-2.5-flash", endpoint: "POST /v1beta/models/{model}:generateContent"},
		{provider: "google", token: `{"models":["gemini-2.5-pro"],"attribution":{"required":["session","end_user"]}}`,
			model: "gemini-2.5-pro", endpoint: "POST /v1beta/models/{model}:generateContent"},
		{provider: "compatible", upstream: `"rewrite":{"house-model":"llama-3"},"models":["house-model"]`,
			model: "house-model", endpoint: "POST /v1/chat/completions"},
		{provider: "compatible", model: "gpt-4o-mini", endpoint: "POST /v1/chat/completions",
			says: "Replace gpt-4o-mini by a model that your provider has."},
		{provider: "openai", project: `{"attribution":{"tags":["team"],"required":["tag:team","session"]}}`,
			model: "gpt-4o-mini", endpoint: "POST /v1/chat/completions"},
		{provider: "compatible", token: `{"models":["in-house-*"]}`, says: "Replace MODEL by a model"},
		{provider: "openai", token: `{"endpoints":["/v1/audio/*"]}`,
			says: "allows no endpoint that there is an example for"},
		{says: "has no active upstream"},
	}
}

// A snippetTest is a proxy with the demo provider behind it.
type snippetTest struct {
	*testProxy
	test *testing.T
	b    *browser
	demo *httptest.Server
	made int
}

func newSnippetTest(t *testing.T) *snippetTest {
	u := &snippetTest{testProxy: newTest(t, nil), test: t}
	u.demo = httptest.NewServer(demo.NewProvider("sk-demo-provider-key", 0))
	t.Cleanup(u.demo.Close)
	u.b = u.signIn(u.adminKey)
	return u
}

// newTokenPage creates the case's project and token, and returns the page with the token's value and the value.
func (u *snippetTest) newTokenPage(c *snippetCase) (page, value string) {
	u.t.Helper()
	u.made++
	var project projectReply
	u.manage("POST", "/manage/projects",
		fmt.Sprintf(`{"name":"snippets %d","policy":%s}`, u.made, cmp.Or(c.project, "{}")), 201, &project)
	if c.provider != "" {
		body := fmt.Sprintf(`{"name":"main","provider":%q,"api_key":"sk-demo-provider-key","base_url":%q`, c.provider,
			u.demo.URL)
		if c.upstream != "" {
			body += "," + c.upstream
		}
		u.manage("POST", "/manage/projects/"+project.ID+"/upstreams", body+"}", 201, nil)
	}
	var made struct{ ID, Token string }
	u.manage("POST", "/manage/tokens",
		fmt.Sprintf(`{"project_id":%q,"name":"app","policy":%s}`, project.ID, cmp.Or(c.token, "{}")), 201, &made)
	rotate := "/admin/tokens/" + made.ID + "/rotate"
	page = u.b.post(rotate, parseForm(u.test, u.b.get(rotate).body)).body
	value = regexp.MustCompile(`sk-llmp_\w{58}`).FindString(page)
	u.secrets = append(u.secrets, made.Token, value)
	if value == "" || len(checkHTML(page)) > 0 {
		u.t.Fatalf("%+v: %v %s", *c, checkHTML(page), page)
	}
	return page, value
}

// snippetOf returns an example of the page, "" if there is none.
func snippetOf(page, name string) string {
	_, rest, _ := strings.Cut(page, `<pre id="snippet-`+name+`" tabindex="0">`)
	text, _, _ := strings.Cut(rest, "</pre>")
	return html.UnescapeString(text)
}

// TestTokenSnippets: the curl example of each case works as it is; the Go example is a whole program, and all of them
// name the same model and have no token but the new one.
func TestTokenSnippets(t *testing.T) {
	t.Parallel()
	u := newSnippetTest(t)
	for _, c := range snippetCases() {
		page, value := u.newTokenPage(&c)
		curl := snippetOf(page, "curl")
		if !strings.Contains(html.UnescapeString(page), c.says) || c.endpoint+c.says == "" {
			t.Errorf("%+v: the page does not say %q", c, c.says)
		}
		if c.endpoint == "" {
			if c.provider == "compatible" == (curl == "") {
				t.Errorf("%+v: %s", c, curl)
			}
			continue
		}
		for _, name := range []string{"curl", "python", "node", "go"} {
			if text := snippetOf(page, name); !strings.Contains(text, c.model) || strings.Count(text, value) != 1 {
				t.Errorf("%+v: the %s example is %s", c, name, text)
			}
		}
		if _, err := parser.ParseFile(token.NewFileSet(), "main.go", snippetOf(page, "go"), 0); err != nil {
			t.Errorf("%+v: %v\n%s", c, err, snippetOf(page, "go"))
		}
		address := regexp.MustCompile(`^curl http://[^/]*(/\S+) `).FindStringSubmatch(curl)
		body := regexp.MustCompile(`(?s)-d '(.*)'$`).FindStringSubmatch(curl)
		if address == nil || body == nil {
			t.Errorf("%+v: the curl example is %s", c, curl)
			continue
		}
		var headers []string
		for _, h := range regexp.MustCompile(`-H "([^:]+): ([^"]*)"`).FindAllStringSubmatch(curl, -1) {
			headers = append(headers, h[1], h[2])
		}
		res := u.do("POST", address[1], body[1], headers...)
		u.waitSettled()
		if call := u.lastCall(); res.status != 200 || call.Endpoint != c.endpoint ||
			!strings.HasPrefix(call.Model, c.model) && c.upstream == "" || call.Outcome != "ok" {
			t.Errorf("%+v: %d %s\n%s", c, res.status, res.body, curl)
		}
	}
}

// TestTokenSnippetsRun runs every example of every case with its own library, if LLM_PROXY_SNIPPETS is set. The
// libraries for Node.js and Go are those of e2e, which lacks Google's for Go; LLM_PROXY_PYTHON names a Python that has
// the libraries.
func TestTokenSnippetsRun(t *testing.T) {
	t.Parallel()
	if os.Getenv("LLM_PROXY_SNIPPETS") == "" {
		t.Skip("LLM_PROXY_SNIPPETS is not set")
	}
	u := newSnippetTest(t)
	file := filepath.Join(t.TempDir(), "main.go")
	commands := map[string][]string{"curl": {"bash"}, "node": {"node", "--input-type=module", "-"},
		"go": {"go", "run", file}}
	if python := os.Getenv("LLM_PROXY_PYTHON"); python != "" {
		commands["python"] = []string{python, "-"}
	}
	ran, builds := 0, map[string]bool{} // a Go program takes long to build: one for each endpoint
	for _, c := range snippetCases() {
		page, _ := u.newTokenPage(&c)
		for name, command := range commands {
			text := snippetOf(page, name)
			if c.endpoint == "" || name == "go" && (builds[c.endpoint] || strings.Contains(text, "google.golang.org")) {
				continue
			}
			builds[c.endpoint] = builds[c.endpoint] || name == "go"
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(command[0], command[1:]...)
			cmd.Dir, cmd.Stdin = "e2e", strings.NewReader(text)
			out, err := cmd.CombinedOutput()
			u.waitSettled()
			ran++
			if call := u.lastCall(); err != nil || len(out) < 3 || call.Endpoint != c.endpoint || call.Outcome != "ok" {
				t.Errorf("%+v: %s: %v\n%s\n%s", c, name, err, out, text)
			}
		}
	}
	if ran < 2*14+3 {
		t.Errorf("only %d examples ran", ran)
	}
}
