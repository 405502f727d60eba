// This file starts and ends the program under test, and calls its /manage.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

const managementToken = "Zq3mV8xKp1Lw9Tn5Rb7Yc2Hd6Gf4Js0Ua"

// A proxy is a running llm-proxy.
type proxy struct {
	cmd    *exec.Cmd
	url    string
	client *http.Client
	ended  chan error
}

// startProxy returns when the program is ready for calls.
func startProxy(ctx context.Context, bin, dir, providerURL string) (*proxy, error) {
	p := &proxy{cmd: exec.CommandContext(ctx, bin), client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}, ended: make(chan error, 1)}
	p.cmd.Env = []string{"LISTEN_ADDR=127.0.0.1:0", "DATA_DIR=" + dir, "OPENAI_API_URL=" + providerURL,
		"ALLOW_PRIVATE_UPSTREAMS=true", "MANAGEMENT_TOKEN=" + managementToken, "LOG_LEVEL=info"}
	log, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	var last string
	lines := bufio.NewReader(log)
	for p.url == "" {
		line, err := lines.ReadString('\n')
		if err != nil {
			_ = p.cmd.Wait()
			return nil, fmt.Errorf("the program did not start to listen; its last output is %q", last+line)
		}
		last = line
		var entry struct{ Msg, Address string }
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Msg == "listening" {
			p.url = "http://" + entry.Address
		}
	}
	go func() {
		_, _ = io.Copy(io.Discard, lines)
		p.ended <- p.cmd.Wait()
	}()
	for {
		res, err := p.client.Get(p.url + "/readyz")
		if err != nil {
			return nil, fmt.Errorf("checking readiness: %w", err)
		}
		res.Body.Close()
		if res.StatusCode == http.StatusOK {
			return p, nil
		}
		time.Sleep(time.Millisecond)
	}
}

// kill ends the program as a crash would, and waits until it has ended.
func (p *proxy) kill() {
	_ = p.cmd.Process.Kill()
	p.ended <- <-p.ended
	p.client.CloseIdleConnections()
}

// stop ends the program cleanly.
func (p *proxy) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	err := <-p.ended
	p.ended <- err
	return err
}

// manage makes a call to /manage and decodes the answer.
func (p *proxy) manage(method, path, body string, to any) error {
	req, err := http.NewRequest(method, p.url+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+managementToken)
	req.Header.Set("Content-Type", "application/json")
	res, err := p.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s: %s", method, path, res.Status, bytes.TrimSpace(b))
	}
	return json.Unmarshal(b, to)
}

// A token is one of those that the clients use.
type token struct {
	id, value string
	limit     int // 0: none
	count     int // request_count at the last check
}

// makeTokens creates three plain tokens, and one that is used up about half way through the run.
func (t *trial) makeTokens() error {
	var project struct{ ID string }
	if err := t.proxy.manage("POST", "/manage/projects", `{"name":"crash","openai_api_key":"sk-crash-0123456789"}`, &project); err != nil {
		return err
	}
	for i := range 4 {
		tok, fields := &token{}, ""
		if i == 3 {
			tok.limit = 30 * max(1, t.loops/2)
			fields = fmt.Sprintf(`,"max_requests":%d`, tok.limit)
		}
		var made struct{ ID, Token string }
		if err := t.proxy.manage("POST", "/manage/tokens", fmt.Sprintf(`{"project_id":%q,"name":"t%d"%s}`, project.ID, i, fields), &made); err != nil {
			return err
		}
		if made.Token == "" {
			return errors.New("the answer has no token")
		}
		tok.id, tok.value = made.ID, made.Token
		t.tokens = append(t.tokens, tok)
	}
	t.limited = *t.tokens[3]
	return nil
}
