// This file runs what the user documents show, against `llm-proxy demo`: every command in a fenced sh block, in order, and
// the programs of the quick starts.
package e2e

import (
	"bufio"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	_ "github.com/anthropics/anthropic-sdk-go" // a program of docs/quickstart.md uses it
)

// A demo is a running `llm-proxy demo`, with the URL and the credentials that it printed.
type demo struct{ url, token, key string }

func newDemo(t *testing.T) *demo {
	t.Helper()
	file, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(file, "demo")
	cmd.Env = []string{"LISTEN_ADDR=127.0.0.1:0", "TMPDIR=" + t.TempDir(), "LOG_LEVEL=warn"}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the demo ended with %v", err)
		}
	})
	d, done := &demo{}, make(chan bool, 1)
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			line := lines.Text()
			for to, pattern := range map[*string]string{&d.url: `base URL +(http://\S+)/v1`, &d.token: `(sk-llmp_\w+)`, &d.key: `(llmpm_\w+)`} {
				if m := regexp.MustCompile(pattern).FindStringSubmatch(line); m != nil && *to == "" {
					*to = m[1]
				}
			}
			if strings.Contains(line, "Ctrl-C ends the demo") {
				done <- true
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(60 * time.Second):
		t.Fatal("the demo did not print its URL and credentials")
	}
	return d
}

// ids returns a project and one of its tokens, for the placeholders.
func (d *demo) ids(t *testing.T) (project, token string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", d.url+"/manage/tokens?limit=1", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+d.key)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var l struct {
		Data []struct {
			ID      string
			Project string `json:"project_id"`
		}
	}
	if err := json.NewDecoder(res.Body).Decode(&l); err != nil || len(l.Data) != 1 {
		t.Fatalf("%v %v", l, err)
	}
	return l.Data[0].Project, l.Data[0].ID
}

// TestDocuments runs the blocks. Placeholders are replaced by the demo's values; curl fails on any status of 400 or more.
func TestDocuments(t *testing.T) {
	tool(t, "curl")
	tool(t, "bash")
	block := regexp.MustCompile("(?s)\n```sh\n(.*?)\n```\n")
	for _, name := range []string{"../README.md", "../docs/use.md", "../docs/quickstart.md"} {
		t.Run(name, func(t *testing.T) {
			d := newDemo(t)
			project, token := d.ids(t)
			fill := strings.NewReplacer("http://127.0.0.1:8080", d.url, "sk-llmp_...", d.token, "llmpm_...", d.key, "proj_...", project, "tok_...", token,
				"sk-...", "sk-0123456789abcdef0123")
			blocks := block.FindAllStringSubmatch(read(t, name), -1)
			if len(blocks) == 0 {
				t.Fatal("the document has no sh block")
			}
			var script strings.Builder
			script.WriteString("set -euo pipefail\ncurl() { command curl -sS --fail-with-body \"$@\" || { echo; echo \"FAILED: curl $*\"; return 1; }; }\n" +
				"export KEY=" + d.key + "\n")
			for _, b := range blocks {
				script.WriteString(fill.Replace(b[1]) + "\n")
			}
			if n := strings.Count(script.String(), "\ncurl "); n < 5 {
				t.Errorf("only %d commands were found", n)
			}
			cmd := exec.Command("bash")
			cmd.Stdin = strings.NewReader(script.String())
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// TestQuickstart runs each program of docs/quickstart.md with its library, and skips those whose library is not installed.
// LLM_PROXY_PYTHON names a Python that has those of requirements.txt.
func TestQuickstart(t *testing.T) {
	d := newDemo(t)
	heading := ""
	ran := map[string]int{}
	part := regexp.MustCompile("(?ms)^## (.*?)$|^```(\\w+)\n(.*?)\n```$")
	for _, m := range part.FindAllStringSubmatch(read(t, "../docs/quickstart.md"), -1) {
		if m[1] != "" {
			heading = m[1]
			continue
		}
		t.Run(heading, func(t *testing.T) {
			var command []string
			switch m[2] {
			case "sh", "yaml": // TestDocuments runs the one; TestDocsCompose of the program reads the other
				return
			case "python":
				if command = []string{os.Getenv("LLM_PROXY_PYTHON"), "-"}; command[0] == "" {
					t.Skip("LLM_PROXY_PYTHON is not set")
				}
			case "js":
				if _, err := os.Stat("node_modules/ai"); err != nil {
					t.Skip("npm ci has not been run")
				}
				command = []string{"node", "--input-type=module", "-"}
			case "go":
				file := filepath.Join(t.TempDir(), "main.go")
				if err := os.WriteFile(file, []byte(m[3]), 0o600); err != nil {
					t.Fatal(err)
				}
				command = []string{"go", "run", file}
			default:
				t.Fatalf("no test runs a block of %s", m[2])
			}
			tool(t, command[0])
			cmd := exec.Command(command[0], command[1:]...)
			cmd.Env = append(os.Environ(), "URL="+d.url, "TOKEN="+d.token)
			cmd.Stdin = strings.NewReader(m[3])
			out, err := cmd.CombinedOutput()
			ran[m[2]]++
			if err != nil || !strings.Contains(string(out), "demo") {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	t.Logf("programs that ran: %v", ran)
}
