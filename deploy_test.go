// What operators are given is held to the program: compose.yaml and deploy/
// name settings that exist and files that are there, and keep their promises of
// a small surface. e2e/ tries them with real tools.
package main

import (
	"go/token"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func fileText(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func settingNames() (names []string) {
	for _, s := range settings() {
		names = append(names, s.name)
	}
	return names
}

// TestCompose: the services of compose.yaml listen on loopback only, have no
// rights that they do not need, and mount what exists.
func TestCompose(t *testing.T) {
	t.Parallel()
	root, err := readYAML(fileText(t, "compose.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	services := root.(map[string]any)["services"].(map[string]any)
	for name, v := range services {
		s := v.(map[string]any)
		for _, port := range texts(s["ports"]) {
			if !strings.HasPrefix(port, "127.0.0.1:") {
				t.Errorf("%s is published on %s", name, port)
			}
		}
		if !slices.Equal(texts(s["cap_drop"]), []string{"ALL"}) || !slices.Equal(texts(s["security_opt"]), []string{"no-new-privileges:true"}) {
			t.Errorf("%s keeps rights", name)
		}
		for _, volume := range texts(s["volumes"]) {
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
	proxy := services["llm-proxy"].(map[string]any)
	for name, v := range proxy["environment"].(map[string]any) {
		if !slices.Contains(settingNames(), name) {
			t.Errorf("there is no setting %s", name)
		}
		if strings.HasSuffix(name, "_FILE") {
			secret, ok := strings.CutPrefix(v.(string), "/run/secrets/")
			if !ok || !slices.Contains(texts(proxy["secrets"]), secret) || root.(map[string]any)["secrets"].(map[string]any)[secret] == nil {
				t.Errorf("%s: no such secret", v)
			}
		}
	}
	if proxy["read_only"] != true {
		t.Error("the file system is not read-only")
	}
	if !strings.Contains(fileText(t, ".gitignore"), "/secrets/\n") {
		t.Error("git does not ignore the secrets")
	}
}

func texts(v any) (out []string) {
	items, _ := v.([]any)
	for _, i := range items {
		out = append(out, i.(string))
	}
	return out
}

// TestSettingsInDeploy: each setting that the unit and the Dockerfile name is one.
func TestSettingsInDeploy(t *testing.T) {
	t.Parallel()
	known := append(settingNames(), "TMPDIR")
	for file, lines := range map[string]string{"deploy/llm-proxy.service": `(?m)^Environment=(.*)`, "Dockerfile": `(?m)^ENV (.*)`} {
		found := 0
		for _, line := range regexp.MustCompile(lines).FindAllStringSubmatch(fileText(t, file), -1) {
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

// TestDockerignore: what the program embeds goes into the image's build.
func TestDockerignore(t *testing.T) {
	t.Parallel()
	kept := strings.Split(fileText(t, ".dockerignore"), "\n")
	for name := range sources(t, token.NewFileSet(), 0) {
		for _, m := range regexp.MustCompile(`(?m)^//go:embed (.*)$`).FindAllStringSubmatch(fileText(t, name), -1) {
			for pattern := range strings.FieldsSeq(m[1]) {
				top, _, _ := strings.Cut(pattern, "/")
				if !slices.Contains(kept, "!"+top) {
					t.Errorf("%s embeds %s, which .dockerignore leaves out", name, pattern)
				}
			}
		}
	}
	version := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(fileText(t, "go.mod"))[1]
	if !strings.Contains(fileText(t, "Dockerfile"), "ARG GO_IMAGE=golang:"+version) {
		t.Errorf("the Dockerfile is not built with Go %s", version)
	}
}

// TestWorkflow: what runs on somebody else's machines is pinned by digest, and
// gets a token that can read only.
func TestWorkflow(t *testing.T) {
	t.Parallel()
	text := fileText(t, ".github/workflows/ci.yml")
	uses := regexp.MustCompile(`uses: (.*)`).FindAllStringSubmatch(text, -1)
	for _, u := range uses {
		if !regexp.MustCompile(`^[a-z-]+/[a-z-]+@[0-9a-f]{40} # v[0-9.]+$`).MatchString(u[1]) {
			t.Errorf("not pinned: %s", u[1])
		}
	}
	if len(uses) == 0 || !strings.Contains(text, "\npermissions:\n  contents: read\n") || strings.Count(text, "permissions:") != 1 ||
		strings.Contains(text, "secrets.") || strings.Contains(text, "pull_request_target") {
		t.Error("the workflow has rights that it does not need")
	}
}
