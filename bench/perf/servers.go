// The servers of a measurement: a provider with fixed answers, the bare proxy,
// and the real program with a project and a token.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	providerKey   = "sk-provider-key-of-the-benchmark"
	managementKey = "benchmark-0a9s8d7f6g5h4j3k2l1qwertyuiop"
)

// provide is the provider's handler.
func provide(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil || r.Header.Get("Authorization") != "Bearer "+providerKey {
		http.Error(w, "no", http.StatusUnauthorized)
		return
	}
	if !bytes.Contains(body, []byte(`"stream":true`)) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, answer)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	c := http.NewResponseController(w)
	send := func(rest string) error {
		_, err := io.WriteString(w, `data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1764000000,"model":"gpt-4o-mini",`+rest+"}\n\n")
		return errors.Join(err, c.Flush())
	}
	if bytes.Contains(body, []byte(`"user":"idle"`)) {
		_ = send(`"choices":[{"index":0,"delta":{"content":"..."},"finish_reason":null}]`)
		<-r.Context().Done()
		return
	}
	for range 64 {
		if send(`"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]`) != nil {
			return
		}
	}
	if bytes.Contains(body, []byte("include_usage")) {
		_ = send(`"choices":[],"usage":{"prompt_tokens":200,"completion_tokens":64,"total_tokens":264}`)
	}
	_, _ = io.WriteString(w, "data: [DONE]\n\n")
}

var answer = `{"id":"chatcmpl-bench","object":"chat.completion","created":1764000000,"model":"gpt-4o-mini","choices":[{"index":0,"message":` +
	`{"role":"assistant","content":"` + strings.Repeat("The band plays on. ", 35) + `"},"finish_reason":"stop"}],` +
	`"usage":{"prompt_tokens":200,"completion_tokens":150,"total_tokens":350}}`

// bareProxy is the floor: what a reverse proxy on net/http costs that reads the
// body first and sets another key, and does nothing else.
func bareProxy(upstream string) (http.Handler, error) {
	to, err := url.Parse(upstream)
	if err != nil {
		return nil, err
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.Out.Header["Authorization"] = []string{"Bearer " + providerKey}
			r.Out.Body = r.In.Body // in memory, and known to be
		},
		Transport:  &http.Transport{MaxIdleConns: 4096, MaxIdleConnsPerHost: 4096, DisableCompression: true},
		BufferPool: &buffers{sync.Pool{New: func() any { return new(make([]byte, 32<<10)) }}},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body bytes.Buffer
		body.Grow(int(max(0, r.ContentLength)) + bytes.MinRead)
		if _, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, 32<<20)); err != nil {
			http.Error(w, "cannot read the body", http.StatusBadRequest)
			return
		}
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body.Bytes())), int64(body.Len())
		proxy.ServeHTTP(w, r)
	}), nil
}

type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte  { return *b.pool.Get().(*[]byte) }
func (b *buffers) Put(p []byte) { b.pool.Put(&p) }

// serve serves on a free port of loopback, whose URL it prints first.
func serve(h http.Handler) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println("http://" + l.Addr().String())
	return http.Serve(l, h)
}

func build(ctx context.Context, to string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", to, "llm-proxy")
	cmd.Stderr = os.Stderr
	return cmd.Run()
}

// start starts all processes and returns what is to be measured, the bare proxy
// first.
func start(ctx context.Context, bin, dir string) (_ []target, stop func(), err error) {
	var running []*exec.Cmd
	stop = func() {
		for _, c := range running {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, stop, err
	}
	spawn := func(path string, env ...string) (*exec.Cmd, *bufio.Reader, error) {
		c := exec.CommandContext(ctx, path)
		c.Env = append(os.Environ(), env...)
		out, err := c.StdoutPipe()
		if err != nil {
			return nil, nil, err
		}
		if err := c.Start(); err != nil {
			return nil, nil, err
		}
		running = append(running, c)
		return c, bufio.NewReader(out), nil
	}
	_, out, err := spawn(self, "PERF_ROLE=provider")
	if err != nil {
		return nil, stop, err
	}
	provider, err := out.ReadString('\n')
	if err != nil {
		return nil, stop, err
	}
	provider = strings.TrimSpace(provider)
	bare, out, err := spawn(self, "PERF_ROLE=bare", "PERF_UPSTREAM="+provider)
	if err != nil {
		return nil, stop, err
	}
	bareURL, err := out.ReadString('\n')
	if err != nil {
		return nil, stop, err
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, stop, err
	}
	addr := free.Addr().String()
	free.Close()
	proxy, _, err := spawn(bin, "LISTEN_ADDR="+addr, "DATA_DIR="+filepath.Join(dir, "data"), "MANAGEMENT_TOKEN="+managementKey,
		"ALLOW_PRIVATE_UPSTREAMS=true", "OPENAI_API_URL="+provider)
	if err != nil {
		return nil, stop, err
	}
	token, err := setUp(ctx, "http://"+addr)
	return []target{
		{"bare", strings.TrimPrefix(strings.TrimSpace(bareURL), "http://"), "any", bare.Process.Pid},
		{"llm-proxy", addr, token, proxy.Process.Pid},
	}, stop, err
}

// setUp makes a project and a token once the program answers.
func setUp(ctx context.Context, base string) (string, error) {
	var err error
	for range 100 {
		var res *http.Response
		if res, err = http.Get(base + "/readyz"); err == nil {
			res.Body.Close()
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		return "", fmt.Errorf("llm-proxy did not start: %w", err)
	}
	var made struct{ ID, Token string }
	if err := post(ctx, base+"/manage/projects", `{"name":"bench","openai_api_key":"`+providerKey+`"}`, &made); err != nil {
		return "", err
	}
	err = post(ctx, base+"/manage/tokens", `{"name":"bench","project_id":"`+made.ID+`"}`, &made)
	return made.Token, err
}

func post(ctx context.Context, to, body string, answer any) error {
	req, err := http.NewRequestWithContext(ctx, "POST", to, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+managementKey)
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusCreated {
		return fmt.Errorf("POST %s: %s", to, res.Status)
	}
	return json.NewDecoder(res.Body).Decode(answer)
}
