// Tests of the program as a process: what signals do to it, and that it does
// not depend on whoever reads its log.
package main

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A childProxy is the program as a process of its own, with a project and a
// token made from p's provider.
type childProxy struct {
	cmd   *exec.Cmd
	url   string
	token string
	log   *os.File // the reading end of its log
	exit  chan error
}

func (p *testProxy) startChild(env ...string) *childProxy {
	p.t.Helper()
	c := &childProxy{cmd: exec.Command(os.Args[0]), exit: make(chan error, 1)}
	c.cmd.Env = append([]string{"LLM_PROXY_TEST_PROGRAM=1", "LISTEN_ADDR=127.0.0.1:0", "DATA_DIR=" + filepath.Join(p.t.TempDir(), "data"),
		"ALLOW_PRIVATE_UPSTREAMS=true", "OPENAI_API_URL=" + p.provider.url, "OPENAI_API_KEY=" + p.provider.key}, env...)
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	var w *os.File
	if c.log, w, err = os.Pipe(); err != nil {
		p.t.Fatal(err)
	}
	c.cmd.Stderr = w
	if err := c.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	w.Close()
	for lines := bufio.NewScanner(out); c.token == "" && lines.Scan(); {
		c.token = regexp.MustCompile(`sk-llmp_\w+`).FindString(lines.Text())
	}
	for lines := bufio.NewReader(c.log); c.url == ""; {
		line, err := lines.ReadString('\n')
		if err != nil {
			p.t.Fatal("the program does not listen: ", err)
		}
		if m := regexp.MustCompile(`"address":"(127[^"]+)"`).FindStringSubmatch(line); m != nil && strings.Contains(line, `"listening"`) {
			c.url = "http://" + m[1]
		}
	}
	go func() { _, _ = io.Copy(io.Discard, out); c.exit <- c.cmd.Wait() }()
	p.t.Cleanup(func() { _ = c.cmd.Process.Kill(); c.log.Close() })
	return c
}

// chat makes a call and returns its status, 0 if it got none.
func (c *childProxy) chat(p *testProxy) int {
	q := &testProxy{t: p.t, url: c.url}
	return q.chatAs(c.token).status
}

// TestSecondSignal: the first SIGTERM drains, the second ends the program.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	c := p.startChild("DRAIN_TIMEOUT=60s")
	p.provider.answer(endless)
	q := &testProxy{t: t, url: c.url}
	s := q.stream(c.token)
	if _, err := s.read(1); err != nil {
		t.Fatal(err)
	}
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	waitFor(t, "it to stop listening", func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(c.url, "http://"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	select {
	case err := <-c.exit:
		t.Fatalf("it ended while a call was running: %v", err)
	default:
	}
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-c.exit:
		if err == nil {
			t.Error("a call was cut, but it ended as if all were well")
		}
	case <-time.After(time.Second):
		t.Error("it did not end at the second signal")
	}
	if _, err := s.rest(); err == nil {
		t.Error("the stream ended as if it were complete")
	}
}

// TestLogReaderGone: a log that nobody takes any more, as of a pager that was
// closed, takes nothing else with it.
func TestLogReaderGone(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	c := p.startChild("LOG_LEVEL=debug")
	c.log.Close()
	for range 20 {
		if status := c.chat(p); status != http.StatusOK {
			t.Fatalf("got %d", status)
		}
	}
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-c.exit:
		if err != nil {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it did not end")
	}
}
