// Package cluster tests several replicas as an operator runs them: real processes, a PostgreSQL server that the tests
// start, and a provider that counts what it gets. Without PostgreSQL's programs the tests are skipped. This file is the
// harness.
//
// LLM_PROXY_CLUSTER_BINARY is a binary with the build tag postgres; without it one is built. LLM_PROXY_CLUSTER_ROUNDS is
// how often the limits are tried, 1 unless it is set; from 10 on, outages are as long as in production.
package cluster

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	managementToken = "cluster-0b5f8d1c9a7e4f36-management-2c4a6e8f"
	encryptionKey   = "5d4f1c0e9b8a7f6e5d4c3b2a190807f6e5d4c3b2a1908f7e6d5c4b3a29180706"
)

// rounds returns how often the limits are tried.
func rounds() int {
	n, err := strconv.Atoi(os.Getenv("LLM_PROXY_CLUSTER_ROUNDS"))
	if err != nil || n < 1 {
		return 1
	}
	return n
}

// hangTimeout is how long a test waits for what must happen, however busy the machine is.
const hangTimeout = 2 * time.Minute

// shortReplicaTimeout is REPLICA_TIMEOUT unless outages are long.
const shortReplicaTimeout = 4 * time.Second

// isLong reports whether outages take as long as in production.
func isLong() bool { return rounds() >= 10 }

var binary = sync.OnceValues(func() (string, error) {
	if file := os.Getenv("LLM_PROXY_CLUSTER_BINARY"); file != "" {
		return file, nil
	}
	dir, err := os.MkdirTemp("", "llm-proxy-cluster-")
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "llm-proxy")
	build := exec.Command("go", "build", "-tags", "postgres", "-o", file, ".")
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return file, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if os.Getenv("LLM_PROXY_CLUSTER_BINARY") == "" {
		if file, err := binary(); err == nil {
			_ = os.RemoveAll(filepath.Dir(file))
		}
	}
	os.Exit(code)
}

// A cluster is a database, a provider, and the replicas.
type cluster struct {
	t        *testing.T
	dir      string // of the database
	bin      string // PostgreSQL's programs
	provider *provider
	env      []string
	replicas []*replica
	project  string

	mu       sync.Mutex
	answered map[string]int // the ids of calls that clients saw answered with 200
}

// A replica is a process. Its address and its data directory stay the same when it is started again.
type replica struct {
	c    *cluster
	name string
	url  string
	data string
	cmd  *exec.Cmd
	done chan struct{}

	mu  sync.Mutex
	log bytes.Buffer
}

// newCluster starts n replicas, or skips the test.
func newCluster(t *testing.T, n int) *cluster {
	t.Helper()
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(dirs) == 0 {
		t.Skip("there is no PostgreSQL here")
	}
	file, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "llm-proxy-pg-")
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(dirs)
	c := &cluster{t: t, dir: dir, bin: dirs[len(dirs)-1], provider: newProvider(t), answered: map[string]int{}}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if os.Getuid() == 0 { // the server does not run as root
		if out, err := exec.Command("chown", "nobody", dir).CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		if exec.Command("runuser", "-u", "nobody", "--", "sh", "-c", ": >/dev/null").Run() != nil {
			t.Skip("another user than root cannot write to /dev/null here")
		}
	}
	c.pg("initdb", "-D", dir+"/data", "-A", "trust", "-U", "postgres", "--locale=C", "-E", "UTF8")
	c.startDatabase()
	t.Cleanup(func() { _ = c.command("pg_ctl", "-D", dir+"/data", "-m", "immediate", "stop").Run() })
	c.sql(`CREATE DATABASE proxy`)
	c.env = []string{"DATABASE_URL=postgres://postgres@/proxy?host=" + dir, "MANAGEMENT_TOKEN=" + managementToken,
		"ENCRYPTION_KEY=" + encryptionKey, "OPENAI_API_URL=" + c.provider.server.URL, "ALLOW_PRIVATE_UPSTREAMS=true",
		"DRAIN_TIMEOUT=5s", "DRAIN_DELAY=0s", "LISTEN_ADDR=127.0.0.1:0", "DATABASE_TIMEOUT=5s"}
	if !isLong() {
		c.env = append(c.env, "REPLICA_TIMEOUT="+shortReplicaTimeout.String(), "STALE_LIMIT=2s")
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, r := range c.replicas {
			r.mu.Lock()
			text := r.log.String()
			t.Logf("%s: %s", r.name, text[max(0, len(text)-3000):])
			r.mu.Unlock()
		}
	})
	for i := range n {
		r := &replica{c: c, name: string(rune('A' + i)), data: filepath.Join(t.TempDir(), "data")}
		c.replicas = append(c.replicas, r)
		r.start(file)
		t.Cleanup(r.kill)
	}
	var made struct{ ID string }
	c.manage(0, "POST", "/manage/projects", map[string]any{"name": "cluster", "openai_api_key": "sk-provider-5Hq2ZtVb8N"}, &made)
	c.project = made.ID
	return c
}

// command returns a command of PostgreSQL, as the user of the server.
func (c *cluster) command(name string, args ...string) *exec.Cmd {
	if os.Getuid() == 0 {
		return exec.Command("runuser", append([]string{"-u", "nobody", "--", filepath.Join(c.bin, name)}, args...)...)
	}
	return exec.Command(filepath.Join(c.bin, name), args...)
}

func (c *cluster) pg(name string, args ...string) {
	c.t.Helper()
	cmd := c.command(name, args...)
	out, err := os.CreateTemp(c.t.TempDir(), "out") // a server keeps a pipe open
	if err != nil {
		c.t.Fatal(err)
	}
	defer out.Close()
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", out, out
	if err := cmd.Run(); err != nil {
		text, _ := os.ReadFile(out.Name())
		c.t.Fatalf("%s: %v %s", name, err, text)
	}
}

func (c *cluster) startDatabase() {
	c.t.Helper()
	c.pg("pg_ctl", "-D", c.dir+"/data", "-w", "-l", c.dir+"/log", "-o",
		"-k "+c.dir+" -c listen_addresses= -c max_connections=200 -c fsync=off", "start")
}

func (c *cluster) stopDatabase() {
	c.t.Helper()
	c.pg("pg_ctl", "-D", c.dir+"/data", "-w", "-m", "fast", "stop")
}

// sql runs a statement and returns what it prints.
func (c *cluster) sql(text string) string {
	c.t.Helper()
	database := "proxy"
	if strings.HasPrefix(text, "CREATE DATABASE") {
		database = "postgres"
	}
	out, err := exec.Command(filepath.Join(c.bin, "psql"), "-h", c.dir, "-U", "postgres", "-At", "-c", text, database).CombinedOutput()
	if err != nil {
		c.t.Fatalf("%s: %v %s", text, err, out)
	}
	return strings.TrimSpace(string(out))
}

// start starts the process and waits until it listens.
func (r *replica) start(file string) {
	r.c.t.Helper()
	r.cmd = exec.Command(file)
	r.cmd.Env = append(slices.Clone(r.c.env), "DATA_DIR="+r.data)
	if r.url != "" {
		r.cmd.Env = append(r.cmd.Env, "LISTEN_ADDR="+strings.TrimPrefix(r.url, "http://"))
	}
	stderr, err := r.cmd.StderrPipe()
	if err == nil {
		err = r.cmd.Start()
	}
	if err != nil {
		r.c.t.Fatal(err)
	}
	listening, done := make(chan string, 1), make(chan struct{})
	r.done = done
	go func() {
		defer close(done)
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			r.mu.Lock()
			r.log.Write(append(lines.Bytes(), '\n'))
			r.mu.Unlock()
			var line struct{ Msg, Address string }
			if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "listening" {
				listening <- "http://" + line.Address
			}
		}
	}()
	select {
	case r.url = <-listening:
	case <-done:
		r.mu.Lock()
		defer r.mu.Unlock()
		r.c.t.Fatalf("replica %s did not start: %s", r.name, r.log.String())
	case <-time.After(hangTimeout):
		r.c.t.Fatalf("replica %s does not listen", r.name)
	}
}

// kill ends the process at once.
func (r *replica) kill() {
	_ = r.cmd.Process.Signal(syscall.SIGCONT)
	_ = r.cmd.Process.Kill()
	<-r.done
	_ = r.cmd.Wait()
}

// hasEnded reports whether the process has ended by itself.
func (r *replica) hasEnded() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// restart starts the process again.
func (r *replica) restart() {
	r.c.t.Helper()
	file, _ := binary()
	r.start(file)
}

// manage calls the management API of a replica.
func (c *cluster) manage(replica int, method, path string, body, to any) {
	c.t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		c.t.Fatal(err)
	}
	req, err := http.NewRequest(method, c.replicas[replica].url+path, bytes.NewReader(text))
	if err != nil {
		c.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+managementToken)
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode >= 300 {
		c.t.Fatalf("%s %s: %d %s %v", method, path, res.StatusCode, answer, err)
	}
	if to != nil {
		if err := json.Unmarshal(answer, to); err != nil {
			c.t.Fatal(err)
		}
	}
}

// newToken makes a token with these fields and returns its id and itself.
func (c *cluster) newToken(fields string) (id, token string) {
	c.t.Helper()
	body := map[string]any{"project_id": c.project, "name": "cluster"}
	if err := json.Unmarshal([]byte("{"+fields+"}"), &body); err != nil {
		c.t.Fatal(err)
	}
	var made struct{ ID, Token string }
	c.manage(0, "POST", "/manage/tokens", body, &made)
	return made.ID, made.Token
}

// call makes a unary call and returns its status, 0 if the connection broke. user names who counts at the provider.
func (c *cluster) call(r *replica, token, user string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	res, err := send(ctx, r.url, token, fmt.Sprintf(
		`{"model":"gpt-4o-mini","user":%q,"max_tokens":10,"messages":[{"role":"user","content":"hi"}]}`, user))
	if err != nil {
		return 0
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return 0
	}
	if res.StatusCode == 200 {
		c.mu.Lock()
		c.answered[res.Header.Get("X-Llm-Proxy-Request-Id")]++
		c.mu.Unlock()
	}
	return res.StatusCode
}

// client has enough connections for all callers.
var client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 300}}

func send(ctx context.Context, url, token, body string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, "POST", url+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	return client.Do(req)
}

// waitFor waits until ok returns true.
func waitFor(t *testing.T, what string, limit time.Duration, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > limit {
			t.Fatalf("after %v there is still not: %s", limit, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(start)
}

// isReady reports whether a replica admits calls.
func (r *replica) isReady() bool {
	res, err := client.Get(r.url + "/readyz")
	if err != nil {
		return false
	}
	_ = res.Body.Close()
	return res.StatusCode == 200
}

// awaitAll waits until all replicas admit calls, and starts those that have ended.
func (c *cluster) awaitAll() {
	c.t.Helper()
	for _, r := range c.replicas {
		r.await()
	}
}

// await waits until the replica admits calls, and starts it if it has ended.
func (r *replica) await() {
	r.c.t.Helper()
	waitFor(r.c.t, "replica "+r.name+" to be ready", hangTimeout, func() bool {
		if r.hasEnded() {
			_ = r.cmd.Wait()
			r.restart()
		}
		return r.isReady()
	})
}

// A provider answers calls and counts them by their user.
type provider struct {
	server *httptest.Server

	mu      sync.Mutex
	delay   time.Duration
	calls   map[string]int
	running map[string]int
	most    map[string]int
}

func newProvider(t *testing.T) *provider {
	p := &provider{calls: map[string]int{}, running: map[string]int{}, most: map[string]int{}, delay: 20 * time.Millisecond}
	p.server = httptest.NewServer(p)
	t.Cleanup(func() {
		p.server.CloseClientConnections()
		p.server.Close()
	})
	return p
}

func (p *provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body struct {
		User   string
		Stream bool
	}
	if json.NewDecoder(r.Body).Decode(&body) != nil {
		return
	}
	p.mu.Lock()
	p.calls[body.User]++
	p.running[body.User]++
	p.most[body.User] = max(p.most[body.User], p.running[body.User])
	delay := p.delay
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.running[body.User]--
		p.mu.Unlock()
	}()
	if body.Stream {
		p.stream(w, r)
		return
	}
	time.Sleep(delay)
	w.Header().Set("Content-Type", "application/json")
	_, _ = io.WriteString(w, `{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"gpt-4o-mini","choices":[{"index":0,
		"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],
		"usage":{"prompt_tokens":5,"completion_tokens":5,"total_tokens":10}}`)
}

// stream writes events until the proxy closes the connection.
func (p *provider) stream(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	for r.Context().Err() == nil {
		_, _ = io.WriteString(w, `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"gpt-4o-mini",`+
			`"choices":[{"index":0,"delta":{"content":"x"}}]}`+"\n\n")
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// counted returns how many calls of a user the provider got, and how many at the same time.
func (p *provider) counted(user string) (calls, most int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls[user], p.most[user]
}

// A stream is a running stream of a client.
type stream struct {
	id     string
	ended  chan struct{} // closed when the proxy ends it
	cancel context.CancelFunc
	events func() int
}

// stream begins a stream and waits for its first event.
func (c *cluster) stream(r *replica, token string) *stream {
	c.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	res, err := send(ctx, r.url, token, `{"model":"gpt-4o-mini","stream":true,"user":"stream","messages":[{"role":"user","content":"hi"}]}`)
	if err != nil || res.StatusCode != 200 {
		c.t.Fatalf("a stream of %s: %v %v", r.name, res, err)
	}
	var mu sync.Mutex
	count := 0
	s := &stream{id: res.Header.Get("X-Llm-Proxy-Request-Id"), ended: make(chan struct{}), cancel: cancel, events: func() int { mu.Lock(); defer mu.Unlock(); return count }}
	c.t.Cleanup(cancel)
	go func() {
		defer close(s.ended)
		defer res.Body.Close()
		lines := bufio.NewScanner(res.Body)
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "data: {\"id\"") {
				mu.Lock()
				count++
				mu.Unlock()
			}
		}
	}()
	waitFor(c.t, "a stream's first event", hangTimeout, func() bool { return s.events() > 0 })
	return s
}
