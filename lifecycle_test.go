// Tests of what begins and ends: tokens and projects that wither amid a call,
// a server that drains, dies, comes back, or loses its database.
package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// endless is a provider that sends one event and no more.
func endless(c *providerConn, _ recorded) bool {
	c.sse()
	_ = c.chunk(chatEvents(true)[1])
	c.gone(20 * time.Second)
	return false
}

// TestWitheringIsImmediate: what ends a token ends its running streams within a
// second, visibly, and refuses the next call.
func TestWitheringIsImmediate(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		method, path, body string
		status             int // of the next call
		code               string
	}{
		"revoked":             {"DELETE", "/manage/tokens/TOKEN", "", 401, "revoked"},
		"all revoked":         {"POST", "/manage/projects/PROJECT/tokens/revoke", "", 401, "revoked"},
		"project deactivated": {"PATCH", "/manage/projects/PROJECT", `{"is_active":false}`, 403, "project_inactive"},
		"project deleted":     {"DELETE", "/manage/projects/PROJECT", "", 401, "revoked"},
		"expired":             {"PATCH", "/manage/tokens/TOKEN", `{"expires_at":"SOON"}`, 401, "expired"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			cut := make(chan bool, 1)
			p.provider.answer(func(c *providerConn, r recorded) bool {
				if !strings.Contains(r.body, `"stream":true`) {
					c.gone(20 * time.Second) // no answer
					return false
				}
				c.sse()
				_ = c.chunk(chatEvents(true)[1])
				cut <- c.gone(20 * time.Second)
				return false
			})
			s := p.stream(p.token)
			if _, err := s.read(1); err != nil {
				t.Fatal(err)
			}
			waiting := make(chan answer, 1)
			go func() { waiting <- p.chat() }()
			waitFor(t, "the second call", func() bool { return len(p.provider.got()) == 2 })

			ends := time.Now().Add(200 * time.Millisecond)
			replace := strings.NewReplacer("TOKEN", p.tokenID, "PROJECT", p.project, "SOON", ends.UTC().Format(time.RFC3339Nano))
			p.manage(test.method, replace.Replace(test.path), replace.Replace(test.body), 200, nil)
			if name != "expired" {
				ends = time.Now()
			}
			if _, err := s.rest(); err == nil {
				t.Error("the stream ended as if it were complete")
			}
			if !<-cut {
				t.Error("the provider's call went on")
			}
			if res := <-waiting; res.status != test.status {
				t.Errorf("a call without an answer yet: got %d %s", res.status, res.body)
			}
			if d := time.Since(ends); d > time.Second {
				t.Errorf("the calls ended after %v", d)
			}
			if res := p.chat(); res.status != test.status {
				t.Errorf("the next call: got %d %s", res.status, res.body)
			}
			rows := p.ledger()
			if len(rows) != 3 || rows[0].Outcome != "truncated" || rows[1].Outcome != "truncated" || rows[2].Outcome != "refused" ||
				rows[0].Status != 200 || rows[1].Status != test.status {
				t.Errorf("the ledger has %+v", rows)
			}
			for i, row := range rows {
				if want := test.code; row.ErrorCode != want || i < 2 && (row.UsageSource != "estimated" || row.InputTokens == 0) {
					t.Errorf("row %d: the ledger has %+v", i, row)
				}
			}
		})
	}
}

// TestNoResurrection: a token or project that was just read for its first call
// does not stay as it was when an admin changes it at that moment.
func TestNoResurrection(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	for round := range 30 {
		var project struct{ ID string }
		p.manage("POST", "/manage/projects", fmt.Sprintf(`{"name":"r%d","openai_api_key":%q}`, round, p.provider.key), 201, &project)
		p.project = project.ID
		id, token := p.newToken(`"name":"r"`)
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() { p.callFree(context.Background(), token, `"n":1`) })
		}
		want := 401
		switch round % 4 {
		case 0:
			p.manage("DELETE", "/manage/tokens/"+id, "", 200, nil)
		case 1:
			p.manage("PATCH", "/manage/projects/"+p.project, `{"is_active":false}`, 200, nil)
			want = 403
		case 2:
			p.manage("POST", "/manage/projects/"+p.project+"/tokens/revoke", "", 200, nil)
		case 3:
			p.manage("DELETE", "/manage/projects/"+p.project, "", 200, nil)
		}
		if _, status := p.callFree(context.Background(), token, `"n":1`); status != want {
			t.Errorf("round %d: the next call got %d, want %d", round, status, want)
		}
		all.Wait()
		if _, status := p.callFree(context.Background(), token, `"n":1`); status != want {
			t.Errorf("round %d: a later call got %d, want %d", round, status, want)
		}
	}
}

// TestChangeThatCannotBeRead: a change is in the database but cannot be read
// back. What it concerned is out of use until it can.
func TestChangeThatCannotBeRead(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if res := p.chat(); res.status != 200 {
		t.Fatalf("got %d", res.status)
	}
	never, cancel := context.WithCancel(t.Context())
	cancel()
	g := p.in.registry
	token, state, err := g.lookup(t.Context(), hashOf(p.token), time.Now().UnixMilli())
	if err != nil {
		t.Fatal(err)
	}
	seq := token.project.state.Load().seq
	if err := g.projectChanged(never, seq, false); err == nil || token.project.state.Load().active {
		t.Errorf("the project is active though its change could not be read (%v)", err)
	}
	if res := p.chat(); res.status != 200 { // it can be read again
		t.Errorf("after that: got %d %s", res.status, res.body)
	}
	if _, err := p.in.store.revokeTokens(t.Context(), systemOrigin(time.Now()), p.project, time.Now().UnixMilli()); err != nil {
		t.Fatal(err)
	}
	if err := g.projectChanged(never, seq, true); err == nil || !token.state.Load().revoked || state.revoked {
		t.Errorf("the token is not revoked though the database says so (%v)", err)
	}
	if res := p.chat(); res.status != 401 {
		t.Errorf("after the tokens were revoked: got %d %s", res.status, res.body)
	}
}

// TestDrain: after SIGTERM what runs may finish, nothing new begins, and
// readyz says so to whom it can.
func TestDrain(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true // a call that is refused while draining is our doing
	hold := make(chan struct{})
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		c.sse()
		_ = c.chunk(chatEvents(true)[0])
		<-hold
		_ = c.chunk(strings.Join(chatEvents(true)[1:], ""))
		return c.chunk("") == nil
	})
	s := p.stream(p.token)
	if _, err := s.read(1); err != nil {
		t.Fatal(err)
	}
	probe, late := p.dial(), p.dial() // connected, but no request yet
	p.do("GET", "/healthz", "")       // connections are accepted in order: those two are by now
	stopped := make(chan error, 1)
	go func() { stopped <- p.stop() }()
	waitFor(t, "the drain", p.in.running.isDraining)
	_, _ = io.WriteString(probe, "GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	if b, _ := io.ReadAll(probe); !strings.HasPrefix(string(b), "HTTP/1.1 503 ") || !strings.HasSuffix(string(b), "draining\n") {
		t.Errorf("readyz: got %q", b)
	}
	_, _ = io.WriteString(late, p.rawChat("Connection: close\r\n", chatBody()))
	if b, _ := io.ReadAll(late); !strings.HasPrefix(string(b), "HTTP/1.1 503 ") || !strings.Contains(string(b), "Retry-After: 1\r\n") {
		t.Errorf("a new call: got %q", b)
	}
	close(hold)
	if rest, err := s.rest(); err != nil || !strings.HasSuffix(rest, "[DONE]\n\n") {
		t.Errorf("the running stream: %q, %v", rest, err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	p.provider.answer(answerChat)
	p.start()
	if row := p.ledger()[0]; row.Outcome != "ok" || row.UsageSource != "exact" {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestDrainCuts: what has not finished within DRAIN_TIMEOUT is cut, and on
// record with what it used so far, also where its client has stopped reading.
func TestDrainCuts(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"DRAIN_TIMEOUT": "300ms", "LOG_LEVEL": "error"})
	p.provider.answer(func(c *providerConn, r recorded) bool {
		switch {
		case strings.Contains(r.body, `"seed":1`): // finishes
			return answerChat(c, r)
		case strings.Contains(r.body, `"seed":2`): // floods
			c.sse()
			for c.chunk(strings.Repeat(chatEvents(true)[1], 1000)) == nil {
			}
			return false
		}
		return endless(c, r)
	})
	const n = 50
	var streams []*clientStream
	for i := range n {
		s := p.stream(p.token, fmt.Sprintf(`"seed":%d`, i%3))
		if _, err := s.read(1); err != nil {
			t.Fatal(err)
		}
		streams = append(streams, s)
	}
	waitFor(t, "the floods", func() bool { return p.running(phaseWriting) >= n/3 })
	if err := p.stop(); err != nil {
		t.Error(err)
	}
	for i, s := range streams {
		rest, err := s.rest()
		if complete := strings.HasSuffix(rest, "[DONE]\n\n"); complete != (err == nil) || complete != (i%3 == 1) {
			t.Errorf("stream %d: ended with %q, %v", i, rest[max(0, len(rest)-40):], err)
		}
	}
	p.start()
	for _, v := range p.rows() {
		if v.outcome != outcomeOK && (v.outcome != outcomeTruncated || v.errorCode != "draining" || v.source != usageEstimated || v.counts.output == 0) {
			t.Errorf("the ledger has %+v", v.requestRow)
		}
	}
	p.sumsAgree()
}

// asAfterCrash starts a second proxy on a copy of the data directory as it is
// now: what a crash would have left.
func (p *testProxy) asAfterCrash() *testProxy {
	p.t.Helper()
	q := &testProxy{t: p.t, dir: p.t.TempDir(), log: &syncBuffer{}, provider: p.provider, secrets: p.secrets, env: maps.Clone(p.env),
		adminKey: p.adminKey, project: p.project, upstream: p.upstream, tokenID: p.tokenID, token: p.token}
	q.env["DATA_DIR"] = filepath.Join(q.dir, "data")
	if err := os.CopyFS(q.env["DATA_DIR"], os.DirFS(p.env["DATA_DIR"])); err != nil {
		p.t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(q.env["DATA_DIR"], keyName), 0o600); err != nil {
		p.t.Fatal(err)
	}
	q.start()
	p.t.Cleanup(q.finish)
	return q
}

// TestLostCalls: calls that ran when the program died are lost ones with an
// estimate, in rows, sums and counts, and a limit goes on from there.
func TestLostCalls(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	id, token := p.newToken(`"name":"l","max_requests":5`)
	for range 2 {
		p.chatAs(token)
	}
	p.provider.answer(endless)
	for _, tok := range []string{p.token, token, token} {
		if _, err := p.stream(tok, `"max_tokens":50`).read(1); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.in.ledger.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	q := p.asAfterCrash()
	lost := 0
	for _, row := range q.ledger() {
		if row.Outcome == "ok" {
			continue
		}
		lost++
		if row.Outcome != "lost" || row.ErrorCode != "process_died" || row.UsageSource != "estimated" || row.InputTokens == 0 || row.OutputTokens != 50 || row.Cost == nil {
			t.Errorf("the ledger has %+v", row)
		}
	}
	if lost != 3 {
		t.Errorf("%d rows are lost, want 3", lost)
	}
	q.sumsAgree()
	p.provider.answer(answerChat)
	if got := q.burst(token, 20); got[200] != 1 || got[429] != 19 || q.count(id) != 5 {
		t.Errorf("the limit: %v, count %d", got, q.count(id))
	}
	q.countsAgree()
}

// TestIDsGrow: ids of calls grow, also when the clock is set back.
func TestIDsGrow(t *testing.T) {
	t.Parallel()
	ids := newIDSource(0)
	now := time.Now()
	before := ids.next(now)
	for range 10_000 {
		id := ids.next(now.Add(-time.Hour))
		if id <= before {
			t.Fatalf("id %d after %d", id, before)
		}
		before = id
	}
	if id := newIDSource(before).next(now.Add(-time.Hour)); id <= before {
		t.Errorf("after a restart with the clock set back: id %d after %d", id, before)
	}
}

// TestDatabaseFileGone: a database that is moved away while in use is noticed
// within ten seconds; nothing is then reported as done, until it is back.
func TestDatabaseFileGone(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	if res := p.do("GET", "/readyz", ""); res.status != http.StatusOK {
		t.Errorf("readyz: got %d %s", res.status, res.body)
	}
	file := p.in.cfg.databaseFile
	if err := os.Rename(file, file+".away"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "readyz to notice", func() bool { return p.do("GET", "/readyz", "").status == 503 })
	if res := p.chat(); res.status != 503 || res.header.Get("Retry-After") == "" {
		t.Errorf("a call: got %d %s", res.status, res.body)
	}
	p.manage("DELETE", "/manage/tokens/"+p.tokenID, "", 503, nil)
	if n := len(p.provider.got()); n != 0 {
		t.Errorf("the provider got %d calls", n)
	}
	if err := os.Rename(file+".away", file); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "readyz to recover", func() bool { return p.do("GET", "/readyz", "").status == 200 })
	if res := p.chat(); res.status != 200 {
		t.Errorf("with the file back: got %d %s", res.status, res.body)
	}
}

// TestDatabaseNotOurs: a database from a newer program, or one that is damaged,
// is left alone, with a word on what to do.
func TestDatabaseNotOurs(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		spoil func(p *testProxy) error
		want  string
	}{
		"newer": {func(p *testProxy) error {
			st, err := openStore(t.Context(), p.in.cfg.databaseFile)
			if err != nil {
				return err
			}
			defer st.close()
			_, err = st.write.Exec(`PRAGMA user_version = 99`)
			return err
		}, "newer llm-proxy"},
		"overwritten": {func(p *testProxy) error {
			f, err := os.OpenFile(p.in.cfg.databaseFile, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt(make([]byte, 100), 0)
			return err
		}, "not a database"},
		"empty": {func(p *testProxy) error { return os.Truncate(p.in.cfg.databaseFile, 0) }, "missing or empty"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			if err := p.stop(); err != nil {
				t.Fatal(err)
			}
			if err := test.spoil(p); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadFile(p.in.cfg.databaseFile)
			if err != nil {
				t.Fatal(err)
			}
			in, err := openInstance(t.Context(), p.in.cfg, p.in.log)
			if err == nil {
				in.close()
				t.Fatal("it was opened")
			}
			if text := err.Error(); !strings.Contains(text, test.want) || !strings.Contains(text, p.in.cfg.databaseFile) || !strings.Contains(text, "restore") {
				t.Errorf("the error is %q", text)
			}
			if after, err := os.ReadFile(p.in.cfg.databaseFile); err != nil || string(after) != string(before) {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
}
