// Tests of the reference of the management API: it shows all of openapi.yaml, its links work, and its examples do.
package main

import (
	"fmt"
	"html"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestReferencePage: the page has every operation, parameter, field, error and description of openapi.yaml, all
// its links lead somewhere, and it needs a session of any role.
func TestReferencePage(t *testing.T) {
	t.Parallel()
	s, p := readSpec(t), newTest(t, nil)
	if res := p.do("GET", "/admin/api", ""); res.status != 303 {
		t.Errorf("without a session: %d", res.status)
	}
	_, key := p.newKey("reader", "viewer")
	res := p.signIn(key).get("/admin/api")
	if res.status != 200 || strings.Count(res.body, renderedElement) > 0 || !strings.Contains(res.body, ">reader</a>") {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	text := strings.NewReplacer("<code>", "`", "</code>", "`", "<strong>", "", "</strong>", "").Replace(res.body)
	text = html.UnescapeString(strings.ReplaceAll(text, "`", ""))
	expect := func(where, part string) {
		if !strings.Contains(text, strings.ReplaceAll(part, "`", "")) {
			t.Errorf("the page does not have %s: %q", where, part)
		}
	}
	for _, name := range s.operations() {
		op := s.operation(name)
		expect(name, op["summary"].(string))
		expect(name, `id="`+op["operationId"].(string)+`"`)
		for q := range s.parameters(op, "query") {
			expect(name, "<td>"+q)
		}
	}
	found := 0
	var walk func(where string, v any)
	walk = func(where string, v any) {
		switch v := v.(type) {
		case []any:
			for i, item := range v {
				walk(fmt.Sprintf("%s[%d]", where, i), item)
			}
		case map[string]any:
			for name, member := range v {
				description, ok := member.(string)
				if ok && name == "description" && !strings.Contains(where, "/headers/") {
					found++
					for paragraph := range strings.SplitSeq(description, "\n\n") {
						expect(where, paragraph)
					}
					continue
				}
				walk(where+"/"+name, member)
			}
			properties, _ := v["properties"].(map[string]any)
			for name := range properties {
				expect(where, name)
			}
		}
	}
	delete(s.root["components"].(map[string]any), "securitySchemes")
	walk("", s.root)
	if found < 400 {
		t.Errorf("only %d descriptions were found", found)
	}
	checkAnchors(t, res.body)
	labels := map[string]bool{}
	for _, m := range regexp.MustCompile(` aria-label="([^"]*)"`).FindAllStringSubmatch(res.body, -1) {
		if labels[m[1]] {
			t.Errorf("two parts of the page are named %s", m[1])
		}
		labels[m[1]] = true
	}
}

// checkAnchors checks that each link within a page leads to an element, and that no two elements have one ID.
func checkAnchors(t *testing.T, page string) {
	t.Helper()
	var ids []string
	for _, m := range regexp.MustCompile(` id="([^"]*)"`).FindAllStringSubmatch(page, -1) {
		if slices.Contains(ids, m[1]) {
			t.Errorf("two elements have the ID %s", m[1])
		}
		ids = append(ids, m[1])
	}
	for _, m := range regexp.MustCompile(`href="#([^"]*)"`).FindAllStringSubmatch(page, -1) {
		if !slices.Contains(ids, m[1]) {
			t.Errorf("nothing has the ID %s", m[1])
		}
	}
}

// TestReferenceExamples: the server accepts the body of each example, and each example names its operation.
func TestReferenceExamples(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	root, err := parseYAML(string(openAPIFile))
	if err != nil {
		t.Fatal(err)
	}
	v, err := newReference(root)
	if err != nil {
		t.Fatal(err)
	}
	key, _ := p.newKey("k", "viewer")
	var hook struct{ ID string }
	p.manage("POST", "/manage/webhooks", `{"name":"w","format":"standard","url":"`+p.provider.url+`"}`, 201, &hook)
	fill := strings.NewReplacer("proj_...", p.project, "up_...", p.upstream, "tok_...", p.tokenID, "key_...", key,
		"hook_...", hook.ID, "sk-...", p.provider.key, "https://hooks.slack.com/services/...", p.provider.url)
	example := regexp.MustCompile(`(?s)^curl (?:-X ([A-Z]+) )?"?\$URL(/[^ "]*)"?` +
		`( -H "Authorization: Bearer \$KEY")?(?: -H "Content-Type: application/json" \\\n  -d '([^']*)')?$`)
	bodies := 0
	for _, g := range v.Groups {
		for _, op := range g.Operations {
			m := example.FindStringSubmatch(op.Curl)
			if m == nil || (m[1] == "") != (op.Method == "GET") || m[1] != "" && m[1] != op.Method ||
				(m[3] == "") != slices.Contains([]string{"health", "ready", "openAPI"}, op.ID) {
				t.Errorf("%s: the example is %s", op.ID, op.Curl)
				continue
			}
			path, _, _ := strings.Cut(m[2], "?")
			if !regexp.MustCompile(`^` + regexp.MustCompile(`{\w+}`).ReplaceAllString(op.Path, `\w+\.\.\.`) + `$`).
				MatchString(path) {
				t.Errorf("%s: the example's path is %s", op.ID, path)
			}
			if m[4] == "" {
				continue
			}
			bodies++
			if res := p.manageAs(p.adminKey, op.Method, fill.Replace(m[2]), fill.Replace(m[4])); res.status >= 300 {
				t.Errorf("%s: %d %s", op.Curl, res.status, res.body)
			}
		}
	}
	if bodies < 14 {
		t.Errorf("only %d examples have bodies", bodies)
	}
}

// TestReferenceFile: GET /openapi.yaml returns the file without a key, and 304 to a client that has it.
func TestReferenceFile(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"ADMIN_PAGES": "false"})
	res := p.do("GET", "/openapi.yaml", "")
	if res.status != 200 || res.body != mustReadFile(t, "openapi.yaml") ||
		res.header.Get("Cache-Control") != "public, no-cache" {
		t.Errorf("got %d %v", res.status, res.header)
	}
	etag := res.header.Get("ETag")
	res = p.do("GET", "/openapi.yaml", "", "If-None-Match", etag)
	if etag == "" || res.status != 304 || res.body != "" {
		t.Errorf("with its ETag %s: got %d %s", etag, res.status, res.body)
	}
	if res := p.do("GET", "/openapi.yaml", "", "If-None-Match", `"other"`); res.status != 200 {
		t.Errorf("with another ETag: got %d", res.status)
	}
	if res := p.do("GET", "/openapi.yaml", "", "If-None-Match", `"other", W/`+etag); res.status != 304 {
		t.Errorf("with its ETag in a list: got %d", res.status)
	}
	if res := p.do("POST", "/openapi.yaml", "{}"); res.status != 405 || res.header.Get("Allow") == "" {
		t.Errorf("POST: got %d %v", res.status, res.header)
	}
}
