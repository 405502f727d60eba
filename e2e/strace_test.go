// This file watches the program's system calls with strace: it starts no other program, connects only to the provider, and
// writes only in its data directory.
package e2e

import (
	"net/http"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
)

// TestSystemCalls checks the system calls of a whole run.
func TestSystemCalls(t *testing.T) {
	tool(t, "strace")
	trace := filepath.Join(t.TempDir(), "trace")
	t.Setenv("LLM_PROXY_TRACE", trace)
	var dir, provider string
	t.Run("serve", func(t *testing.T) { // the end of the subtest stops the program
		p := newProxy(t)
		dir = filepath.Dir(p.data)
		u, err := url.Parse(p.provider.server.URL)
		if err != nil {
			t.Fatal(err)
		}
		provider = u.Port()
		client := p.client(p.token)
		ask := openai.ChatCompletionNewParams{Model: "gpt-4o-mini", Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(promptCanary)}}
		if _, err := client.Chat.Completions.New(t.Context(), ask); err != nil {
			t.Fatal(err)
		}
		for stream := client.Chat.Completions.NewStreaming(t.Context(), ask); stream.Next(); {
		}
		for _, path := range []string{"/admin/sign-in", "/admin/static/admin.css", "/readyz", "/metrics"} {
			if res, err := http.Get(p.url + path); err == nil {
				res.Body.Close()
			}
		}
	})
	var text string
	for range 100 { // strace writes its last lines after the program has ended
		if text = read(t, trace); strings.Contains(text, "+++ exited with 0 +++") {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if n := len(regexp.MustCompile(`(?m)^\d+ +exec`).FindAllString(text, -1)); n != 1 {
		t.Errorf("%d programs were started", n)
	}
	connected := 0
	for _, line := range regexp.MustCompile(`(?m)^.*\bconnect\(.*$`).FindAllString(text, -1) {
		if connected++; !strings.Contains(line, "sin_port=htons("+provider+"), sin_addr=inet_addr(\"127.0.0.1\")") {
			t.Errorf("unexpected connection: %s", line)
		}
	}
	if connected == 0 {
		t.Error("no connection to the provider was seen")
	}
	readable := regexp.MustCompile(`^/(sys|proc|dev/urandom|etc/localtime|usr/share/zoneinfo|etc/mime\.types|etc/apache2?/mime\.types|etc/httpd/conf/mime\.types|(usr/(local/)?)?share/mime)(/|$)?`)
	opened := 0
	for _, m := range regexp.MustCompile(`(?m)\b(?:open|openat|creat)\((?:AT_FDCWD, )?"([^"]*)", ([A-Z_|]*)`).FindAllStringSubmatch(text, -1) {
		opened++
		name, writes := m[1], strings.Contains(m[2], "O_WRONLY") || strings.Contains(m[2], "O_RDWR") || strings.Contains(m[2], "O_CREAT")
		if strings.HasPrefix(name, dir+"/") || !writes && readable.MatchString(name) {
			continue
		}
		t.Errorf("unexpected file opened: %s", m[0])
	}
	if opened < 5 {
		t.Errorf("only %d files were opened: is the trace readable?", opened)
	}
	for _, m := range regexp.MustCompile(`(?m)\b(?:unlink|unlinkat|rename|renameat2?)\((?:AT_FDCWD, )?"([^"]*)"`).FindAllStringSubmatch(text, -1) {
		if !strings.HasPrefix(m[1], dir+"/") {
			t.Errorf("unexpected file removed: %s", m[0])
		}
	}
	if strings.Contains(text, "ptrace(") || strings.Contains(text, "AF_UNIX") {
		t.Error("unexpected system calls")
	}
}
