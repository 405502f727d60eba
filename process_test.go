// What a process gives away when it breaks, or to its neighbours on the same
// machine: a panic, a stack dump, its command line.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain lets a test run the program itself, as a process of its own. Most tests
// wait most of the time, so twice as many run together as go test would let.
func TestMain(m *testing.M) {
	if os.Getenv("LLM_PROXY_TEST_PROGRAM") == "" {
		flag.Parse()
		said := false
		flag.Visit(func(f *flag.Flag) { said = said || f.Name == "test.parallel" || f.Name == "test.fuzz" })
		if !said {
			if err := flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0))); err != nil {
				panic(err)
			}
		}
		os.Exit(m.Run())
	}
	if os.Getenv("LLM_PROXY_TEST_PROGRAM") != "with arguments" {
		os.Args = os.Args[:1]
	}
	main()
}

// TestCrashDumpTellsNothing: the dump of all goroutines of a process that is
// killed amid a call has neither key nor token nor prompt, and its command line
// has none either.
func TestCrashDumpTellsNothing(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil) // for its provider, and its look at what was seen
	called := make(chan struct{}, 1)
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		called <- struct{}{}
		return !c.gone(20 * time.Second)
	})
	management := "mgmt-" + randomBase62(40)
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = []string{"LLM_PROXY_TEST_PROGRAM=1", "LISTEN_ADDR=127.0.0.1:0", "DATA_DIR=" + filepath.Join(p.dir, "other"), "ALLOW_PRIVATE_UPSTREAMS=true",
		"OPENAI_API_URL=" + p.provider.url, "OPENAI_API_KEY=" + p.provider.key, "MANAGEMENT_TOKEN=" + management, "LOG_LEVEL=debug", "TZ=Asia/Kathmandu"}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	logged, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var token string
	for lines := bufio.NewScanner(out); token == "" && lines.Scan(); {
		token = regexp.MustCompile(`sk-llmp_\w+`).FindString(lines.Text())
	}
	p.secrets = append(p.secrets, management, token)
	stderr := bufio.NewReader(logged)
	var seen bytes.Buffer
	var address string
	for address == "" {
		line, err := stderr.ReadString('\n')
		seen.WriteString(line)
		if err != nil {
			t.Fatalf("it did not listen: %s", &seen)
		}
		if m := regexp.MustCompile(`"listening","address":"([^"]+)"`).FindStringSubmatch(line); m != nil {
			address = m[1]
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	req, err := http.NewRequestWithContext(ctx, "POST", "http://"+address+"/v1/chat/completions", strings.NewReader(chatBody()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	client := &http.Transport{}
	go client.RoundTrip(req) // ends with ctx, or with the process
	<-called
	line, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/cmdline")
	if err == nil {
		seen.Write(line)
	}
	if err := cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	_, _ = stderr.WriteTo(&seen)
	_ = cmd.Wait() // says only that it was killed
	if !bytes.Contains(seen.Bytes(), []byte("SIGQUIT")) || !bytes.Contains(seen.Bytes(), []byte("handleV1")) {
		t.Errorf("there is no dump in %s", &seen)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen.Write(seen.Bytes())
}

// TestPanicTellsNothing: a mistake of ours ends one call, is logged as an error
// without what it held, and leaves nothing reserved.
func TestPanicTellsNothing(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	p.in.transport.Proxy = func(r *http.Request) (*url.URL, error) { panic(errors.New("broken in two")) }
	if a := p.chat(); a.err == nil {
		t.Errorf("got %d %s", a.status, a.body)
	}
	waitFor(t, "the log", func() bool { return bytes.Contains(p.log.bytes(), []byte(`"level":"ERROR","msg":"panic"`)) })
	if !bytes.Contains(p.log.bytes(), []byte("broken in two")) || !bytes.Contains(p.log.bytes(), []byte("proxy.go")) {
		t.Error("the log does not say what and where")
	}
	p.in.transport.Proxy = nil
	if a := p.chat(); a.status != 200 {
		t.Errorf("the next call: %d %s", a.status, a.body)
	}
	if rows := p.ledger(); len(rows) != 2 || p.in.bodies.used.Load() != 0 {
		t.Errorf("%d calls on record, %d bytes held", len(rows), p.in.bodies.used.Load())
	}
}
