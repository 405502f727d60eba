// These tests compare the documents with the program: docs/settings.md has the settings
// table of config.go, and the files, tests and settings that documents and deployments name exist.
package main

import (
	"encoding/xml"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestSettingsDoc: docs/settings.md has exactly the settings of the program, in order, with default and help; if
// not, the test prints the correct table. README, which stays short, names only settings that exist.
func TestSettingsDoc(t *testing.T) {
	t.Parallel()
	var table strings.Builder
	table.WriteString("| setting | default | |\n| --- | --- | --- |\n")
	names := map[string]string{}
	for _, s := range settings(&config{}) {
		def := "-"
		if s.def != "" {
			def = "`" + s.def + "`"
		}
		names[s.name] = def
		table.WriteString("| `" + s.name + "` | " + def + " | " + s.help + " |\n")
	}
	if !strings.HasSuffix(mustReadFile(t, "docs/settings.md"), "\n\n"+table.String()) {
		t.Errorf("docs/settings.md does not end with this table of settings:\n%s", table.String())
	}
	readme := mustReadFile(t, "README.md")
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\| (\\S+) \\|").FindAllStringSubmatch(readme, -1) {
		if names[m[1]] != m[2] {
			t.Errorf("README.md has %s with default %s; it is %q", m[1], m[2], names[m[1]])
		}
	}
	if n := strings.Count(readme, "\n"); n > 200 {
		t.Errorf("README.md has %d lines; move longer texts to docs/", n)
	}
}

// TestSecurityNamesTests: each test that SECURITY.md names exists, so that every threat is really
// tested.
func TestSecurityNamesTests(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				have[fn.Name.Name] = true
			}
		}
	}
	for _, name := range regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9]+)`").FindAllStringSubmatch(string(text), -1) {
		if !have[name[1]] {
			t.Errorf("SECURITY.md names %s, which does not exist", name[1])
		}
	}
}

// TestUseDocNamesErrors: docs/use.md has the code of every error that clients of /v1 can get.
func TestUseDocNamesErrors(t *testing.T) {
	t.Parallel()
	doc := mustReadFile(t, "docs/use.md")
	_, catalogue, _ := strings.Cut(mustReadFile(t, "errors.go"), "// The catalogue:")
	catalogue, _, found := strings.Cut(catalogue, "// Errors that only /manage and /admin have.")
	codes := regexp.MustCompile(`(?:newError\(\d+, |badRequest\(|errUnavailable\(|code: )"([a-z_]+)"`)
	all := codes.FindAllStringSubmatch(catalogue, -1)
	for _, m := range all {
		if m[1] != "client_gone" && !strings.Contains(doc, "`"+m[1]+"`") { // which no client gets
			t.Errorf("docs/use.md does not have the code %s", m[1])
		}
	}
	if !found || len(all) < 45 {
		t.Errorf("only %d errors were found", len(all))
	}
}

// TestDocsTroubleshooting: docs/troubleshooting.md has each error code of the program exactly once, with its status,
// and no other code. Each message of a failed start that it quotes is in the sources.
func TestDocsTroubleshooting(t *testing.T) {
	t.Parallel()
	doc := mustReadFile(t, "docs/troubleshooting.md")
	listed := map[string]string{} // a code's statuses
	codeName := regexp.MustCompile("`([a-z_]+)`")
	for _, row := range regexp.MustCompile(`(?m)^\| ([0-9x, ]+) \| ([^|]+) \|`).FindAllStringSubmatch(doc, -1) {
		for _, code := range codeName.FindAllStringSubmatch(row[2], -1) {
			if listed[code[1]] != "" {
				t.Errorf("the code %s is there twice", code[1])
			}
			listed[code[1]] = row[1]
		}
	}
	var sources strings.Builder
	for name := range parseSources(t, token.NewFileSet(), 0, allBuilds) {
		if !strings.HasPrefix(name, "admin") { // pages show texts, not codes
			sources.WriteString(mustReadFile(t, name))
		}
	}
	used := map[string]bool{}
	failure := regexp.MustCompile(`(?:newError\((\d+)|(badRequest)\(|(errUnavailable)\(|` +
		`status: (\d+|status), code: )[, ]*"([a-z_]+)"`)
	for _, m := range failure.FindAllStringSubmatch(sources.String(), -1) {
		status, code := m[1]+m[4], m[5]
		switch {
		case code == "client_gone": // which no client gets
			continue
		case m[2] != "":
			status = "400"
		case m[3] != "":
			status = "503"
		case status == "status":
			status = "4xx"
		}
		used[code] = true
		if !strings.Contains(listed[code], status) {
			t.Errorf("the code %s with status %s is missing; it is listed with %q", code, status, listed[code])
		}
	}
	for code := range listed {
		if !used[code] {
			t.Errorf("there is no code %s", code)
		}
	}
	if len(used) < 50 {
		t.Errorf("only %d codes were found", len(used))
	}
	_, start, _ := strings.Cut(doc, "## The program does not start\n")
	start, _, _ = strings.Cut(start, "\n## ")
	messages := regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(start, -1)
	plain := strings.ReplaceAll(sources.String(), "\" +\n\t\t\t\"", "")
	for _, m := range messages {
		if !strings.Contains(plain, m[1]) {
			t.Errorf("no message has %q", m[1])
		}
	}
	if len(messages) < 10 {
		t.Errorf("only %d messages were found", len(messages))
	}
}

// TestAuditDocNamesActions: docs/audit.md and openapi.yaml have every action of audit events.
func TestAuditDocNamesActions(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	spec := readSpec(t)
	described, _ := spec.at(spec.root, "components", "schemas", "AuditEntry", "properties",
		"action")["description"].(string)
	actions := []string{actionAuditBegin, actionBind,
		actionRestore, actionRekey, actionSignIn, actionSignInFailed, actionSignOut,
		actionExport, actionReveal}
	for _, m := range mutations(nil) {
		actions = append(actions, m.action)
	}
	for _, a := range actions {
		if !strings.Contains(string(doc), "`"+a+"`") {
			t.Errorf("docs/audit.md does not have the action %s", a)
		}
		thing, verb, _ := strings.Cut(a, ".")
		if _, list, ok := strings.Cut(described, " "+thing); !ok ||
			!strings.Contains(strings.SplitN(list, ";", 2)[0], verb) {
			t.Errorf("openapi.yaml does not have the action %s", a)
		}
	}
}

// TestReviewTables: the files in docs/security-review.md exist and have about as many lines as
// it says.
func TestReviewTables(t *testing.T) {
	t.Parallel()
	rows := 0
	for line := range strings.SplitSeq(mustReadFile(t, "docs/security-review.md"), "\n") {
		cells := strings.Split(line, " | ")
		if len(cells) < 3 || !strings.Contains(cells[0], ".go`") {
			continue
		}
		documented, err := strconv.Atoi(strings.TrimSpace(cells[1]))
		if err != nil {
			t.Errorf("%s: %v", line, err)
		}
		rows++
		lines := 0
		for _, name := range regexp.MustCompile("`([a-z_]+\\.go)`").FindAllStringSubmatch(cells[0], -1) {
			lines += strings.Count(mustReadFile(t, name[1]), "\n")
		}
		if documented < lines*3/4 || documented > lines*4/3 {
			t.Errorf("%s: they have %d lines", line, lines)
		}
	}
	if rows < 20 {
		t.Errorf("only %d rows were found", rows)
	}
}

// TestDocumentsNameFiles: every source file and test that a document names exists.
func TestDocumentsNameFiles(t *testing.T) {
	t.Parallel()
	documents, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	var tests strings.Builder
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("e2e/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, more...)
	for _, name := range files {
		tests.WriteString(mustReadFile(t, name))
	}
	for _, name := range append(documents, "README.md", "SECURITY.md", "CONTRIBUTING.md") {
		text := mustReadFile(t, name)
		for _, m := range regexp.MustCompile("`([a-z_]+\\.go|[a-z]+/[a-z/._-]+)`").FindAllStringSubmatch(text, -1) {
			if _, err := os.Stat(m[1]); err != nil &&
				!strings.HasPrefix(m[1], "text/") && !strings.HasPrefix(m[1], "application/") {
				t.Errorf("%s names %s: %v", name, m[1], err)
			}
		}
		for _, m := range regexp.MustCompile("`(Test[A-Z][A-Za-z0-9]+)`").FindAllStringSubmatch(text, -1) {
			if !strings.Contains(tests.String(), "func "+m[1]+"(") {
				t.Errorf("%s names %s, which does not exist", name, m[1])
			}
		}
	}
}

// TestDocsLinks: each relative link of a document, and each picture, leads to an existing file, and to a heading of
// that file if it names one.
func TestDocsLinks(t *testing.T) {
	t.Parallel()
	documents, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("*/*.md")
	if err != nil {
		t.Fatal(err)
	}
	documents = append(documents, more...)
	slices.Sort(documents)
	links := 0
	for _, name := range documents {
		text := withoutBlocks(mustReadFile(t, name))
		link := regexp.MustCompile(`\]\(([^)\s]*)\)|<img src="([^"]*)"|^ *\[[^\]]+\]: (\S+)`)
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			target := m[1] + m[2] + m[3]
			if strings.HasPrefix(target, "https://") || strings.HasPrefix(target, "http://") {
				continue
			}
			links++
			path, heading, _ := strings.Cut(target, "#")
			file := filepath.Join(filepath.Dir(name), path)
			if path == "" {
				file = name
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s: the link %s: %v", name, target, err)
				continue
			}
			if heading != "" && !slices.Contains(headingAnchors(mustReadFile(t, file)), heading) {
				t.Errorf("%s: the link %s: %s has no such heading", name, target, file)
			}
		}
	}
	if links < 180 {
		t.Errorf("only %d links were found", links)
	}
}

// TestDocsPicture: docs/concepts.svg is well-formed, has a title and a description, and loads and runs nothing.
func TestDocsPicture(t *testing.T) {
	t.Parallel()
	text := mustReadFile(t, "docs/concepts.svg")
	names := map[string]int{}
	for d := xml.NewDecoder(strings.NewReader(text)); ; {
		token, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := token.(xml.StartElement); ok {
			names[e.Name.Local]++
		}
	}
	if names["title"] != 1 || names["desc"] != 1 || names["text"] < 20 ||
		names["script"]+names["image"]+names["a"] > 0 ||
		!strings.Contains(text, `role="img" aria-labelledby="title desc"`) ||
		strings.Contains(strings.Replace(text, `xmlns="http://www.w3.org/2000/svg"`, "", 1), "http") {
		t.Errorf("its elements are %v", names)
	}
}

// withoutBlocks returns a document without its fenced and indented blocks and its `code`.
func withoutBlocks(text string) string {
	text = regexp.MustCompile("(?ms)^```.*?^```$").ReplaceAllString(text, "")
	text = regexp.MustCompile("(?m)^    .*$").ReplaceAllString(text, "")
	return regexp.MustCompile("`[^`\n]*`").ReplaceAllString(text, "code")
}

// headingAnchors returns the anchors that GitHub gives to the headings of a document.
func headingAnchors(text string) (anchors []string) {
	text = regexp.MustCompile("(?ms)^```.*?^```$").ReplaceAllString(text, "")
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
		anchor := strings.ReplaceAll(strings.ToLower(m[1]), " ", "-")
		anchor = regexp.MustCompile(`[^\p{L}\p{N}_-]`).ReplaceAllString(anchor, "")
		for n, base := 1, anchor; slices.Contains(anchors, anchor); n++ {
			anchor = base + "-" + strconv.Itoa(n)
		}
		anchors = append(anchors, anchor)
	}
	return anchors
}

// TestDocsCompose: the compose file of docs/quickstart.md can be read, and names its base URL with /v1.
func TestDocsCompose(t *testing.T) {
	t.Parallel()
	_, block, _ := strings.Cut(mustReadFile(t, "docs/quickstart.md"), "\n```yaml\n")
	block, _, _ = strings.Cut(block, "```")
	root, err := readYAML(block)
	if err != nil {
		t.Fatal(err)
	}
	service := root.(map[string]any)["services"].(map[string]any)["open-webui"].(map[string]any)
	environment := service["environment"].(map[string]any)
	if !strings.HasSuffix(environment["OPENAI_API_BASE_URL"].(string), "/v1") || environment["OPENAI_API_KEY"] == nil {
		t.Errorf("the environment is %v", environment)
	}
}

func mustReadFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func settingNames() (names []string) {
	for _, s := range settings(&config{}) {
		names = append(names, s.name)
	}
	return names
}

// TestCompose: the services of compose.yaml and compose.cluster.yaml listen on loopback only, have only the privileges
// they need, and mount existing files.
func TestCompose(t *testing.T) {
	t.Parallel()
	for file, proxy := range map[string]string{"compose.yaml": "llm-proxy", "compose.cluster.yaml": "llm-proxy-a"} {
		t.Run(file, func(t *testing.T) { testCompose(t, file, proxy) })
	}
}

func testCompose(t *testing.T, file, proxyName string) {
	root, err := readYAML(mustReadFile(t, file))
	if err != nil {
		t.Fatal(err)
	}
	services := root.(map[string]any)["services"].(map[string]any)
	for name, v := range services {
		s := v.(map[string]any)
		for _, port := range collectStrings(s["ports"]) {
			if !strings.HasPrefix(port, "127.0.0.1:") {
				t.Errorf("%s is published on %s", name, port)
			}
		}
		if !slices.Equal(collectStrings(s["cap_drop"]), []string{"ALL"}) ||
			!slices.Equal(collectStrings(s["security_opt"]), []string{"no-new-privileges:true"}) {
			t.Errorf("%s has unneeded privileges", name)
		}
		for _, volume := range collectStrings(s["volumes"]) {
			file, _, _ := strings.Cut(volume, ":")
			if strings.HasPrefix(file, "./") {
				if _, err := os.Stat(file); err != nil || !strings.HasSuffix(volume, ":ro") {
					t.Errorf("%s mounts %s: %v", name, volume, err)
				}
			} else if root.(map[string]any)["volumes"].(map[string]any)[file] == nil {
				t.Errorf("%s: no volume %s", name, file)
			}
		}
	}
	proxy := services[proxyName].(map[string]any)
	for name, v := range proxy["environment"].(map[string]any) {
		if !slices.Contains(settingNames(), name) {
			t.Errorf("there is no setting %s", name)
		}
		if strings.HasSuffix(name, "_FILE") {
			secret, ok := strings.CutPrefix(v.(string), "/run/secrets/")
			declared := root.(map[string]any)["secrets"].(map[string]any)
			if !ok || !slices.Contains(collectStrings(proxy["secrets"]), secret) || declared[secret] == nil {
				t.Errorf("%s: no such secret", v)
			}
		}
	}
	if proxy["read_only"] != true {
		t.Error("the file system is not read-only")
	}
	if !strings.Contains(mustReadFile(t, ".gitignore"), "/secrets/\n") {
		t.Error("git does not ignore the secrets")
	}
}

func collectStrings(v any) (out []string) {
	items, _ := v.([]any)
	for _, i := range items {
		out = append(out, i.(string))
	}
	return out
}

// TestSettingsInDeploy: every setting in the systemd unit and the Dockerfile exists.
func TestSettingsInDeploy(t *testing.T) {
	t.Parallel()
	known := append(settingNames(), "TMPDIR")
	for file, lines := range map[string]string{
		"deploy/llm-proxy.service": `(?m)^Environment=(.*)`,
		"Dockerfile":               `(?m)^ENV (.*)`,
	} {
		found := 0
		for _, line := range regexp.MustCompile(lines).FindAllStringSubmatch(mustReadFile(t, file), -1) {
			for word := range strings.FieldsSeq(line[1]) {
				name, _, _ := strings.Cut(word, "=")
				if found++; !slices.Contains(known, name) {
					t.Errorf("%s: there is no setting %s", file, name)
				}
			}
		}
		if found < 2 {
			t.Errorf("%s: only %d settings were found", file, found)
		}
	}
}

// TestDockerignore: the image's build gets every file that the program embeds.
func TestDockerignore(t *testing.T) {
	t.Parallel()
	kept := strings.Split(mustReadFile(t, ".dockerignore"), "\n")
	for name := range parseSources(t, token.NewFileSet(), 0, allBuilds) {
		for _, m := range regexp.MustCompile(`(?m)^//go:embed (.*)$`).FindAllStringSubmatch(mustReadFile(t, name), -1) {
			for pattern := range strings.FieldsSeq(m[1]) {
				top, _, _ := strings.Cut(pattern, "/")
				if !slices.Contains(kept, "!"+top) {
					t.Errorf("%s embeds %s, which .dockerignore leaves out", name, pattern)
				}
			}
		}
	}
	version := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(mustReadFile(t, "go.mod"))[1]
	if !strings.Contains(mustReadFile(t, "Dockerfile"), "ARG GO_IMAGE=golang:"+version) {
		t.Errorf("the Dockerfile is not built with Go %s", version)
	}
}

// TestWorkflow: actions in the hosted workflow are pinned by digest and get a read-only token.
func TestWorkflow(t *testing.T) {
	t.Parallel()
	text := mustReadFile(t, ".github/workflows/ci.yml")
	uses := regexp.MustCompile(`uses: (.*)`).FindAllStringSubmatch(text, -1)
	for _, u := range uses {
		if !regexp.MustCompile(`^[a-z-]+/[a-z-]+@[0-9a-f]{40} # v[0-9.]+$`).MatchString(u[1]) {
			t.Errorf("not pinned: %s", u[1])
		}
	}
	if len(uses) == 0 ||
		!strings.Contains(text, "\npermissions:\n  contents: read\n") || strings.Count(text, "permissions:") != 1 ||
		strings.Contains(text, "secrets.") || strings.Contains(text, "pull_request_target") {
		t.Error("the workflow has unneeded permissions")
	}
}
