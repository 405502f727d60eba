// This file is the harness of the Go tests: the built binary on a free loopback port, a project and tokens created through
// /manage, and a scripted provider that records what it receives.
package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
)

const (
	managementToken = "e2e-0b5f8d1c9a7e4f36-management-2c4a6e8f"
	providerKey     = "sk-provider-openai-5Hq2ZtVb8Nw1"
	promptCanary    = "prompt-canary-8Rw3mD"
)

// A testProxy is a running llm-proxy and the provider behind it.
type testProxy struct {
	t        *testing.T
	url      string
	project  string
	token    string
	provider *provider
	data     string // its DATA_DIR

	mu  sync.Mutex
	log bytes.Buffer
}

// binary returns the program: LLM_PROXY_BINARY, or one built for this run.
var binary = sync.OnceValues(func() (string, error) {
	if file := os.Getenv("LLM_PROXY_BINARY"); file != "" {
		return file, nil
	}
	dir, err := os.MkdirTemp("", "llm-proxy-e2e-")
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "llm-proxy")
	build := exec.Command("go", "build", "-trimpath", "-o", file, ".")
	build.Dir, build.Env = "..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return file, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if file, err := binary(); err == nil && os.Getenv("LLM_PROXY_BINARY") == "" {
		_ = os.RemoveAll(filepath.Dir(file))
	}
	os.Exit(code)
}

func newProxy(t *testing.T) *testProxy {
	t.Helper()
	file, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	p := &testProxy{t: t, provider: newProvider(t)}
	cmd := exec.Command(file)
	if trace := os.Getenv("LLM_PROXY_TRACE"); trace != "" { // -D: the program stays a child of this process
		cmd = exec.Command("strace", "-D", "-f", "-qq", "-s", "300", "-o", trace,
			"-e", "trace=execve,execveat,connect,open,openat,creat,unlink,unlinkat,rename,renameat,renameat2,ptrace,socket", "-e", "signal=none", file)
	}
	p.data = filepath.Join(t.TempDir(), "data")
	cmd.Env = []string{"LISTEN_ADDR=127.0.0.1:0", "DATA_DIR=" + p.data, "MANAGEMENT_TOKEN=" + managementToken,
		"OPENAI_API_URL=" + p.provider.server.URL, "ALLOW_PRIVATE_UPSTREAMS=true", "LOG_LEVEL=debug", "DRAIN_TIMEOUT=5s", "DRAIN_DELAY=0s",
		"METRICS_ADDR=" + os.Getenv("METRICS_ADDR")}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	listening := make(chan string, 1)
	logged := make(chan struct{})
	go func() {
		defer close(logged)
		p.readLog(stderr, listening)
	}()
	t.Cleanup(func() { p.stop(cmd, logged) })
	select {
	case p.url = <-listening:
	case <-time.After(30 * time.Second):
		t.Fatal("the proxy did not start to listen")
	}
	var made struct{ ID, Token string }
	p.manage("/manage/projects", map[string]any{"name": "e2e", "openai_api_key": providerKey}, &made)
	p.project = made.ID
	p.token = p.newToken(nil)
	return p
}

func (p *testProxy) readLog(r io.Reader, listening chan<- string) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		p.mu.Lock()
		p.log.Write(append(lines.Bytes(), '\n'))
		p.mu.Unlock()
		var line struct{ Msg, Address string }
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "listening" {
			listening <- "http://" + line.Address
		}
	}
}

// stop ends the proxy as an operator would. It must end cleanly, and its log must contain no secret and no prompt.
func (p *testProxy) stop(cmd *exec.Cmd, logged <-chan struct{}) {
	_ = cmd.Process.Signal(syscall.SIGTERM)
	<-logged
	err := cmd.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		p.t.Errorf("the proxy ended with %v: %s", err, p.log.String())
	}
	for _, secret := range []string{managementToken, providerKey, promptCanary, p.token} {
		if secret != "" && strings.Contains(p.log.String(), secret) {
			p.t.Error("the log contains a secret or a prompt")
		}
	}
}

func (p *testProxy) manage(path string, body, to any) {
	p.t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		p.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(p.t.Context(), "POST", p.url+path, bytes.NewReader(b))
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+managementToken)
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusCreated {
		p.t.Fatalf("%s: %d %s %v", path, res.StatusCode, answer, err)
	}
	if err := json.Unmarshal(answer, to); err != nil {
		p.t.Fatal(err)
	}
}

func (p *testProxy) newToken(fields map[string]any) string {
	p.t.Helper()
	body := map[string]any{"project_id": p.project, "name": "e2e"}
	maps.Copy(body, fields)
	var made struct{ Token string }
	p.manage("/manage/tokens", body, &made)
	return made.Token
}

// client returns the SDK's client, changed only in base URL and key.
func (p *testProxy) client(token string, opts ...option.RequestOption) openai.Client {
	return openai.NewClient(append([]option.RequestOption{option.WithBaseURL(p.url + "/v1"), option.WithAPIKey(token)}, opts...)...)
}

// A recorded request is one that the provider received.
type recorded struct {
	method, target string
	header         http.Header
	body           []byte
	at             time.Time
	ctx            context.Context // ends with its connection
}

// A provider answers each request with its next script, or with the default answer if none is left.
type provider struct {
	server *httptest.Server

	mu      sync.Mutex
	scripts []func(w http.ResponseWriter, r *recorded)
	calls   []*recorded
}

func newProvider(t *testing.T) *provider {
	p := &provider{}
	p.server = httptest.NewServer(p)
	t.Cleanup(func() {
		p.server.CloseClientConnections()
		p.server.Close()
	})
	return p
}

func (p *provider) script(fns ...func(w http.ResponseWriter, r *recorded)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.scripts = append(p.scripts, fns...)
}

// got returns all requests received so far.
func (p *provider) got() []*recorded {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.calls)
}

func (p *provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	call := &recorded{method: r.Method, target: r.RequestURI, header: r.Header, body: body, at: time.Now(), ctx: r.Context()}
	p.mu.Lock()
	p.calls = append(p.calls, call)
	answer := faithful
	if len(p.scripts) > 0 {
		answer, p.scripts = p.scripts[0], p.scripts[1:]
	}
	p.mu.Unlock()
	w.Header().Set("X-Request-Id", "req_of_provider")
	answer(w, call)
}

// reply writes a complete JSON answer.
func reply(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, body)
}

// events writes a stream and flushes each event.
func events(w http.ResponseWriter, list ...string) {
	w.Header().Set("Content-Type", "text/event-stream")
	for _, e := range list {
		_, _ = io.WriteString(w, e+"\n\n")
		_ = http.NewResponseController(w).Flush()
	}
}
