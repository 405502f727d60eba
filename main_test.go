// These tests start and stop the program: tokens and projects that are revoked during a call, a
// server that drains, crashes, restarts or loses its database, sockets, TLS and signals.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// endlessScript is a provider that sends one event and then nothing.
func endlessScript(c *providerConn, _ recordedRequest) bool {
	c.beginSSE()
	_ = c.chunk(chatEvents(true)[1])
	c.waitClosed(hangTimeout)
	return false
}

// TestChangeDuringFirstCall: if an admin changes a token or project while it is being read for its
// first call, the old state is not used afterwards.
func TestChangeDuringFirstCall(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	for round := range 30 {
		var project struct{ ID string }
		p.manage("POST", "/manage/projects", fmt.Sprintf(`{"name":"r%d","openai_api_key":%q}`, round, p.provider.key),
			201, &project)
		p.project = project.ID
		id, token := p.newToken(`"name":"r"`)
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() { p.sendChat(context.Background(), token, `"n":1`) })
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
		if _, status := p.sendChat(context.Background(), token, `"n":1`); status != want {
			t.Errorf("round %d: the next call got %d, want %d", round, status, want)
		}
		all.Wait()
		if _, status := p.sendChat(context.Background(), token, `"n":1`); status != want {
			t.Errorf("round %d: a later call got %d, want %d", round, status, want)
		}
	}
}

// TestChangeThatCannotBeRead: if a change is in the database but cannot be read back, what it
// concerns cannot be used until it can be read.
func TestChangeThatCannotBeRead(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if res := p.chat(); res.status != 200 {
		t.Fatalf("got %d", res.status)
	}
	never, cancel := context.WithCancel(t.Context())
	cancel()
	g := p.instance.registry
	token, state, err := g.lookup(t.Context(), tokenHash(p.token), time.Now().UnixMilli())
	if err != nil {
		t.Fatal(err)
	}
	seq := token.project.state.Load().seq
	if err := g.projectChanged(never, seq); err == nil || token.project.state.Load().active {
		t.Errorf("the project is active though its change could not be read (%v)", err)
	}
	if res := p.chat(); res.status != 200 { // it can be read again
		t.Errorf("after that: got %d %s", res.status, res.body)
	}
	if _, err := p.instance.store.revokeTokens(t.Context(), systemOrigin(time.Now()), p.project,
		time.Now().UnixMilli()); err != nil {
		t.Fatal(err)
	}
	if err := g.projectChanged(never, seq); err == nil || token.project.state.Load().active || state.revoked {
		t.Errorf("the token may be used though the database says so (%v)", err)
	}
	if res := p.chat(); res.status != 401 {
		t.Errorf("after the tokens were revoked: got %d %s", res.status, res.body)
	}
}

// TestDeletedProjectIsRevoked: as soon as a project is known to be deleted, its tokens are revoked, although their own
// rows are read again later.
func TestDeletedProjectIsRevoked(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	s := p.endlessStream()
	row, err := p.instance.store.deleteProject(t.Context(), systemOrigin(time.Now()), p.project, 0,
		time.Now().UnixMilli())
	if err == nil {
		err = p.instance.registry.projectChanged(t.Context(), row.seq)
	}
	if err != nil {
		t.Fatal(err)
	}
	if res := p.chat(); res.status != 401 {
		t.Errorf("the next call: got %d %s", res.status, res.body)
	}
	if _, err := s.readAll(); err == nil {
		t.Error("the stream ended as if it were complete")
	}
	for _, row := range p.ledger() {
		if row.ErrorCode != "revoked" {
			t.Errorf("the ledger has %+v", row)
		}
	}
}

// TestDrain: after SIGTERM running calls may finish, new ones are refused, and readyz reports
// that on open connections.
func TestDrain(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true // a call that is refused while draining is our doing
	proceed := make(chan struct{})
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(true)[0])
		<-proceed
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
	waitFor(t, "the drain", p.instance.running.isDraining)
	_, _ = io.WriteString(probe, "GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	if b, _ := io.ReadAll(probe); !strings.HasPrefix(string(b), "HTTP/1.1 503 ") ||
		!strings.HasSuffix(string(b), "draining\n") {
		t.Errorf("readyz: got %q", b)
	}
	_, _ = io.WriteString(late, p.rawChatRequest("Connection: close\r\n", chatBody()))
	if b, _ := io.ReadAll(late); !strings.HasPrefix(string(b), "HTTP/1.1 503 ") ||
		!strings.Contains(string(b), "Retry-After: 1\r\n") {
		t.Errorf("a new call: got %q", b)
	}
	close(proceed)
	if rest, err := s.readAll(); err != nil || !strings.HasSuffix(rest, "[DONE]\n\n") {
		t.Errorf("the running stream: %q, %v", rest, err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	p.provider.setScript(chatScript)
	p.start()
	if row := p.ledger()[0]; row.Outcome != "ok" || row.UsageSource != "exact" {
		t.Errorf("the ledger has %+v", row)
	}
}

// TestDrainAnswers: during the drain, and for DRAIN_DELAY after SIGTERM, clients that keep sending on open and on new
// connections get 503 and Connection: close, never a closed connection; a call that ends meanwhile tells its client to
// close too.
func TestDrainAnswers(t *testing.T) {
	t.Parallel()
	const delay = 300 * time.Millisecond
	p := newTest(t, map[string]string{"DRAIN_DELAY": delay.String(), "LOG_LEVEL": "error"})
	proceed := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.Contains(r.body, `"seed":1`) {
			<-proceed
		}
		return chatScript(c, r)
	})
	running := p.dial()
	_, _ = io.WriteString(running, p.rawChatRequest("", chatBody(`"seed":1`)))
	waitFor(t, "the call to reach the provider", func() bool { return len(p.provider.received()) == 1 })
	var clients sync.WaitGroup
	var refused, ready atomic.Int64
	var end atomic.Pointer[time.Time] // when the listener may close
	stop := make(chan struct{})
	for range 8 {
		clients.Go(func() {
			transport := &http.Transport{}
			defer transport.CloseIdleConnections()
			for {
				select {
				case <-stop:
					return
				default:
				}
				for _, path := range []string{"/v1/models", "/readyz"} {
					req, _ := http.NewRequestWithContext(t.Context(), "GET", p.url+path, nil)
					req.Header.Set("Authorization", "Bearer "+p.token)
					res, err := transport.RoundTrip(req)
					if err != nil {
						if at := end.Load(); at == nil || time.Now().Before(*at) {
							t.Errorf("%s: no answer: %v", path, err)
						}
						return
					}
					_, _ = io.Copy(io.Discard, res.Body)
					res.Body.Close()
					switch {
					case res.StatusCode == 503 && res.Close:
						refused.Add(1)
						if path == "/readyz" {
							ready.Add(1)
						}
					case res.StatusCode != 200 || res.Close && !p.instance.running.isDraining():
						t.Errorf("%s: %d, close %v", path, res.StatusCode, res.Close)
					}
				}
			}
		})
	}
	clients.Go(func() { p.instance.running.drain(t.Context()) }) // as SIGTERM does, until the running call has ended
	waitFor(t, "the drain", p.instance.running.isDraining)
	close(proceed)
	if b, _ := io.ReadAll(running); !strings.HasPrefix(string(b), "HTTP/1.1 200 ") ||
		!strings.Contains(string(b), "Connection: close\r\n") {
		t.Errorf("the running call: %q", b)
	}
	waitFor(t, "many refusals", func() bool { return refused.Load() > 500 && ready.Load() > 100 })
	begin := time.Now()
	at := begin.Add(delay)
	end.Store(&at)
	if err := p.stop(); err != nil || time.Since(begin) < delay {
		t.Errorf("stopped after %v: %v", time.Since(begin), err)
	}
	close(stop)
	clients.Wait()
}

// TestMemoryLimit: the limit is the lowest of the process's cgroups and of those above.
func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		groups string
		files  map[string]string
		want   int64
	}{
		"container, version 2": {"0::/\n", map[string]string{"memory.max": "2147483648\n", "memory.high": "max\n"},
			2 << 30},
		"unit": {"0::/system.slice/llm-proxy.service\n", map[string]string{"system.slice/memory.max": "max\n",
			"system.slice/llm-proxy.service/memory.max": "1073741824\n"}, 1 << 30},
		"slice": {"0::/a/b\n", map[string]string{"a/memory.high": "1000\n", "a/b/memory.max": "2000\n"}, 1000},
		"version 1": {"5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n", map[string]string{
			"memory/docker/1/memory.limit_in_bytes": "4096", "x/memory.max": "1"}, 4096},
		"version 1, the container's own view": {"4:memory:/docker/1\n", map[string]string{
			"memory/memory.limit_in_bytes": "8192"}, 8192},
		"no limit": {"4:memory:/\n0::/\n", map[string]string{
			"memory/memory.limit_in_bytes": "9223372036854771712"}, 0},
		"no cgroup":    {"", nil, 0},
		"odd contents": {"x\n::\n0::/../..\n0::\n", map[string]string{"memory.max": "-1"}, 0},
	} {
		got := cgroupMemoryLimit(tt.groups, func(name string) string {
			return tt.files[strings.TrimPrefix(name, "/sys/fs/cgroup/")]
		})
		if got != tt.want {
			t.Errorf("%s: %d, want %d", name, got, tt.want)
		}
	}
}

// TestGCPercent: garbage may be as much as there is live, but of request bodies only a quarter; a small heap is
// collected rarely.
func TestGCPercent(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for _, tt := range []struct{ live, bodies, garbage int64 }{
		{live: 0, garbage: 32 * mib},
		{live: 16 * mib, garbage: 32 * mib},
		{live: 300 * mib, garbage: 300 * mib},
		{live: 540 * mib, bodies: 512 * mib, garbage: 128 * mib},
		{live: 20 * mib, bodies: 512 * mib, garbage: 128 * mib}, // they have come since the last collection
		{live: 1000 * mib, bodies: 400 * mib, garbage: 600 * mib},
		{live: 0, bodies: 1 * mib, garbage: 32 * mib},
	} {
		heap := max(tt.live, tt.bodies, 4*mib)
		got := heap * int64(gcPercentFor(tt.live, tt.bodies)) / 100
		if got > tt.garbage || got < tt.garbage-heap/100 {
			t.Errorf("%+v: %d bytes", tt, got)
		}
	}
}

// TestIdleMemory: memory is given back once after each large peak, when the need has been low for a while.
func TestIdleMemory(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	var m idleMemory
	run := func(need int64, ticks int) (freed int) {
		for range ticks {
			if m.afterPeak(need) {
				freed++
			}
		}
		return freed
	}
	for i, step := range []struct {
		need         int64
		ticks, freed int
	}{
		{0, 1000, 0}, {20 * mib, 100, 0}, {0, 1000, 0}, // a small peak
		{400 * mib, 5, 0}, {120 * mib, 1000, 0}, // less, but not a quarter
		{0, idleTicks - 1, 0}, {400 * mib, 1, 0}, // a short pause
		{90 * mib, idleTicks - 1, 0}, {90 * mib, 1, 1}, {90 * mib, 1000, 0}, {0, 1000, 1}, {0, 1000, 0},
	} {
		if freed := run(step.need, step.ticks); freed != step.freed {
			t.Errorf("step %d: given back %d times", i, freed)
		}
	}
}

// TestStopWhileLocked: if another process has the database locked for longer than a stop waits, the calls that
// ended are kept in a file, and the next start records them exactly, once.
func TestStopWhileLocked(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"DRAIN_TIMEOUT": "1s"})
	p.allowErrors = true
	p.setPragma(`PRAGMA busy_timeout = 20`)
	proceed := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool { <-proceed; return chatScript(c, r) })
	const calls = 3
	var clients sync.WaitGroup
	for range calls {
		clients.Go(func() {
			if _, status := p.sendChat(context.Background(), p.token, `"n":1`); status != 200 {
				t.Errorf("a call got %d", status)
			}
		})
	}
	waitFor(t, "the calls to reach the provider", func() bool { return len(p.provider.received()) == calls })
	if err := p.instance.ledger.flush(t.Context()); err != nil { // their pending records
		t.Fatal(err)
	}
	unlock := p.lockDatabase()
	close(proceed)
	clients.Wait()
	if err := p.stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
	unlock()
	name := p.instance.cfg.unwrittenFile()
	kept, err := os.ReadFile(name)
	if err != nil || bytes.Count(kept, []byte("\n")) != calls || !strings.Contains(string(p.log.bytes()), name) ||
		!strings.Contains(string(p.log.bytes()), "database is locked") {
		t.Fatalf("%v: %q %s", err, kept, p.log.bytes())
	}
	for range 2 { // the second time as if the start had died before it removed the file
		p.start()
		if _, err := os.Stat(name); err == nil {
			t.Error("the file is still there")
		}
		rows := p.allRequests()
		if len(rows) != calls {
			t.Errorf("%d rows", len(rows))
		}
		for _, v := range rows {
			if v.outcome != outcomeOK || v.source != usageExact || v.counts.output != 3 {
				t.Errorf("the ledger has %+v", v.requestRow)
			}
		}
		p.checkSums()
		if err := p.stop(); err != nil {
			t.Fatal(err)
		}
		mustOverwrite(t, name, string(kept))
	}
	mustOverwrite(t, name, `{"SumOnly":false,"Fields":[1]}`)
	p.checkRefusedStartError(name, "move it away")
	mustRemove(t, name)
}

// TestDrainCuts: calls that have not finished within DRAIN_TIMEOUT are cut and recorded with
// their usage so far, even if the client has stopped reading.
func TestDrainCuts(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"DRAIN_TIMEOUT": "300ms", "LOG_LEVEL": "error"})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		switch {
		case strings.Contains(r.body, `"seed":1`): // finishes
			return chatScript(c, r)
		case strings.Contains(r.body, `"seed":2`): // floods
			c.beginSSE()
			for c.chunk(strings.Repeat(chatEvents(true)[1], 1000)) == nil {
			}
			return false
		}
		return endlessScript(c, r)
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
	waitFor(t, "the floods", func() bool { return p.countInPhase(phaseWriting) >= n/3 })
	if err := p.stop(); err != nil {
		t.Error(err)
	}
	for i, s := range streams {
		rest, err := s.readAll()
		if complete := strings.HasSuffix(rest, "[DONE]\n\n"); complete != (err == nil) || complete != (i%3 == 1) {
			t.Errorf("stream %d: ended with %q, %v", i, rest[max(0, len(rest)-40):], err)
		}
	}
	p.start()
	for _, v := range p.allRequests() {
		if v.outcome != outcomeOK && (v.outcome != outcomeTruncated || v.errorCode != "draining" ||
			v.source != usageEstimated || v.counts.output == 0) {
			t.Errorf("the ledger has %+v", v.requestRow)
		}
	}
	p.checkSums()
}

// crashedCopy starts a second proxy on a copy of the data directory in its current state, as a
// crash would have left it.
func (p *testProxy) crashedCopy() *testProxy {
	p.t.Helper()
	requireSQLite(p.t, "it copies the database's file")
	q := &testProxy{t: p.t, dir: p.t.TempDir(), log: &syncBuffer{}, provider: p.provider, secrets: p.secrets,
		env:      maps.Clone(p.env),
		adminKey: p.adminKey, project: p.project, upstream: p.upstream, tokenID: p.tokenID, token: p.token}
	q.env["DATA_DIR"] = filepath.Join(q.dir, "data")
	if err := os.CopyFS(q.env["DATA_DIR"], os.DirFS(p.env["DATA_DIR"])); err != nil {
		p.t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(q.env["DATA_DIR"], keyFileName), 0o600); err != nil {
		p.t.Fatal(err)
	}
	q.start()
	p.t.Cleanup(q.finish)
	return q
}

// TestLostCalls: calls that were running when the program crashed become lost ones with
// estimated usage, in rows, sums and counts, and limits continue from there.
func TestLostCalls(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	id, token := p.newToken(`"name":"l","max_requests":5`)
	for range 2 {
		p.chatAs(token)
	}
	p.provider.setScript(endlessScript)
	for _, tok := range []string{p.token, token, token} {
		if _, err := p.stream(tok, `"max_tokens":50`).read(1); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.instance.ledger.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	q := p.crashedCopy()
	lost := 0
	for _, row := range q.ledger() {
		if row.Outcome == "ok" {
			continue
		}
		lost++
		if row.Outcome != "lost" || row.ErrorCode != "process_died" || row.UsageSource != "estimated" ||
			row.InputTokens == 0 || row.OutputTokens != 50 || row.Cost == nil {
			t.Errorf("the ledger has %+v", row)
		}
	}
	if lost != 3 {
		t.Errorf("%d rows are lost, want 3", lost)
	}
	q.checkSums()
	p.provider.setScript(chatScript)
	if got := q.burst(token, 20); got[200] != 1 || got[429] != 19 || q.requestCount(id) != 5 {
		t.Errorf("the limit: %v, count %d", got, q.requestCount(id))
	}
	q.checkCounts()
}

// TestRequestIDsIncrease: ids of calls increase, even if the clock is set back or the slot changes. Those of replicas
// with different slots differ.
func TestRequestIDsIncrease(t *testing.T) {
	t.Parallel()
	slot := int64(replicaSlots - 1)
	ids := newIDSource(0, func() int64 { return slot })
	now := time.Now()
	before := ids.next(now)
	for i := range 20_000 {
		id := ids.next(now.Add(-time.Hour))
		if id <= before || idSlot(id) != slot {
			t.Fatalf("id %d with slot %d after %d, want slot %d", id, idSlot(id), before, slot)
		}
		before = id
		if i%5000 == 4999 {
			slot = int64(i/5000*1000) % replicaSlots
		}
	}
	if ahead := time.UnixMilli(before >> idTimeShift).Sub(now); ahead > 20*time.Millisecond {
		t.Errorf("20,000 ids of one moment are %v ahead of the clock", ahead)
	}
	after := newIDSource(before, nil)
	if id := after.next(now.Add(-time.Hour)); id <= before || idSlot(id) != 0 {
		t.Errorf("after a restart with the clock set back: id %d after %d", id, before)
	}
	seen := map[int64]bool{}
	for slot := range int64(3) {
		ids := newIDSource(0, func() int64 { return slot })
		for range 5000 {
			id := ids.next(now)
			if seen[id] {
				t.Fatalf("slot %d made %d, which another one made", slot, id)
			}
			seen[id] = true
		}
	}
}

// TestDatabaseFileGone: the program notices within ten seconds that the database was moved away
// while in use, and refuses calls until it is back.
func TestDatabaseFileGone(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it moves the file")
	p := newTest(t, nil)
	p.allowErrors = true
	if res := p.do("GET", "/readyz", ""); res.status != http.StatusOK {
		t.Errorf("readyz: got %d %s", res.status, res.body)
	}
	file := p.instance.cfg.databaseFile
	if err := os.Rename(file, file+".away"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "readyz to notice", func() bool { return p.do("GET", "/readyz", "").status == 503 })
	if res := p.chat(); res.status != 503 || res.header.Get("Retry-After") == "" {
		t.Errorf("a call: got %d %s", res.status, res.body)
	}
	p.manage("DELETE", "/manage/tokens/"+p.tokenID, "", 503, nil)
	if n := len(p.provider.received()); n != 0 {
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

// TestUnusableDatabaseIsNotTouched: a database from a newer program, or a damaged one, is not touched, and
// the error says what to do.
func TestUnusableDatabaseIsNotTouched(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it spoils the file; TestPostgresEditedSchema and TestClusterStarts change the schema")
	for name, test := range map[string]struct {
		spoil func(p *testProxy) error
		want  string
	}{
		"newer": {func(p *testProxy) error {
			st, err := openStore(t.Context(), p.instance.cfg.databaseFile)
			if err != nil {
				return err
			}
			defer st.close()
			_, err = st.writeDB.Exec(`PRAGMA user_version = 99`)
			return err
		}, "newer llm-proxy"},
		"overwritten": {func(p *testProxy) error {
			f, err := os.OpenFile(p.instance.cfg.databaseFile, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt(make([]byte, 100), 0)
			return err
		}, "not a database"},
		"empty": {func(p *testProxy) error { return os.Truncate(p.instance.cfg.databaseFile, 0) }, "missing or empty"},
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
			p.checkRefusedStart(test.want)
		})
	}
}

// TestForeignSchema: a database whose schema is not the one of its version is refused at the start,
// unchanged, and doctor finds it: such a database may reject the rows of calls, and then limits forget.
func TestForeignSchema(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ statement, want string }{
		"a trigger that refuses rows": {
			`CREATE TRIGGER no_rows BEFORE INSERT ON requests BEGIN SELECT RAISE(ABORT, 'no'); END`,
			"the trigger no_rows on requests was added"},
		"a unique index": {`CREATE UNIQUE INDEX once ON requests (token)`, "the index once on requests was added"},
		"a column":       {`ALTER TABLE tokens ADD COLUMN note TEXT`, "the table tokens is different"},
		"no view":        {`DROP VIEW running`, "the view running is missing"},
		"no index":       {`DROP INDEX upstreams_project`, "the index upstreams_project is missing"},
		"no trigger":     {`DROP TRIGGER audit_never_changed`, "the trigger audit_never_changed is missing"},
		"harmless":       {`CREATE TABLE mine (x); CREATE INDEX quick ON requests (model); ANALYZE`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			if err := p.stop(); err != nil {
				t.Fatal(err)
			}
			execSQL(t, p, tt.statement)
			lines, _ := p.runDoctor(nil)
			if tt.want == "" {
				p.start()
				if res := p.chat(); res.status != 200 || !hasFinding(lines, "ok", "database:", "intact") {
					t.Errorf("got %d %s, doctor %s", res.status, res.body, strings.Join(lines, "\n"))
				}
				return
			}
			if !hasFinding(lines, "FAIL", "database:", tt.want) || hasFinding(lines, "ok", "database:", "") {
				t.Errorf("doctor: %s", strings.Join(lines, "\n"))
			}
			p.checkRefusedStart(tt.want)
		})
	}
}

// checkRefusedStart checks that a start fails with an error that names the database, contains want and
// a remedy, and leaves the database as it is.
func (p *testProxy) checkRefusedStart(want string) {
	p.t.Helper()
	before, err := os.ReadFile(p.instance.cfg.databaseFile)
	if err != nil {
		p.t.Fatal(err)
	}
	in, err := openInstance(p.t.Context(), p.instance.cfg, p.instance.log, nil)
	if err == nil {
		in.close()
		p.t.Fatal("it was opened")
	}
	if text := err.Error(); !strings.Contains(text, want) || !strings.Contains(text, p.instance.cfg.databaseFile) ||
		!strings.Contains(text, "restore") {
		p.t.Errorf("the error is %q", text)
	}
	if after, err := os.ReadFile(p.instance.cfg.databaseFile); err != nil || string(after) != string(before) {
		p.t.Errorf("the file was changed (%v)", err)
	}
}

// checkRefusedStartError checks that a start fails with an error that has all texts.
func (p *testProxy) checkRefusedStartError(texts ...string) {
	p.t.Helper()
	in, err := openInstance(p.t.Context(), p.instance.cfg, p.instance.log, nil)
	if err == nil {
		in.close()
		p.t.Fatal("it was opened")
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			p.t.Errorf("the error is %q, without %q", err, text)
		}
	}
}

// TestFirstSchemas: databases of the first commits, which have the number of a schema that was changed
// afterwards, are refused.
func TestFirstSchemas(t *testing.T) {
	t.Parallel()
	text, err := schemaFiles.ReadFile("schema/001_init.sql")
	if err != nil {
		t.Fatal(err)
	}
	first := string(text)
	for now, then := range map[string]string{
		"(grain = 'hour' OR grain = 'day' OR grain = 'token')": "(grain IN ('hour', 'day'))",
		"KEY (grain, project, token, at, model":                "KEY (grain, token, at, project, model",
	} {
		if first = strings.Replace(first, now, then, 1); !strings.Contains(first, then) {
			t.Fatalf("the schema has no %s", now)
		}
	}
	env := serveEnv(t)
	if err := os.MkdirAll(env["DATA_DIR"], 0o700); err != nil {
		t.Fatal(err)
	}
	db, err := openSQLite(filepath.Join(env["DATA_DIR"], "llm-proxy.db"), 1, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, statement := range []string{first, `PRAGMA user_version = 1`} {
		if _, err := db.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"serve", "doctor"} {
		out, err := runProgram(t, env, command)
		if err == nil || !strings.Contains(out+err.Error(), "the table usage_sums is different") ||
			!strings.Contains(out+err.Error(), "move the file away to start with an empty database") {
			t.Errorf("%s: %v %s", command, err, out)
		}
	}
}

// TestOtherDatabase: a database of another program, whose version is 0, is refused, and nothing is added to it.
func TestOtherDatabase(t *testing.T) {
	t.Parallel()
	env := serveEnv(t)
	file := filepath.Join(t.TempDir(), "other.db")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := openSQLite(file, 1, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(`CREATE TABLE customers (name TEXT)`); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	env["DATABASE_URL"] = "sqlite:" + file
	before := dumpDatabase(t, file)
	for _, command := range []string{"serve", "doctor"} {
		out, err := runProgram(t, env, command)
		if err == nil || !strings.Contains(out+err.Error(), "of this program: it has the table customers") ||
			strings.Contains(out, "migrates") || strings.Contains(out, "no such table") {
			t.Errorf("%s: %v %s", command, err, out)
		}
	}
	if after := dumpDatabase(t, file); !slices.Equal(before, after) {
		t.Errorf("the database was %q, and is %q now", before, after)
	}
}

// TestMain lets a test run the program itself in another process. Most tests mostly wait, so three times as many run in
// parallel as go test would allow. They leave more garbage than they keep, so it is collected less often.
func TestMain(m *testing.M) {
	if os.Getenv("LLM_PROXY_TEST_PROGRAM") == "" {
		flag.Parse()
		said := false
		flag.Visit(func(f *flag.Flag) { said = said || f.Name == "test.parallel" || f.Name == "test.fuzz" })
		if !said {
			if err := flag.Set("test.parallel", strconv.Itoa(3*runtime.GOMAXPROCS(0))); err != nil {
				panic(err)
			}
		}
		// Many servers share this process, so none of them may tune the garbage collector; tuneGC leaves it alone then.
		if err := os.Setenv("GOGC", "200"); err != nil {
			panic(err)
		}
		debug.SetGCPercent(200)
		os.Exit(m.Run())
	}
	if os.Getenv("LLM_PROXY_TEST_PROGRAM") != "with arguments" {
		os.Args = os.Args[:1]
	}
	main()
}

// TestCrashDumpHasNoSecrets: the goroutine dump of a process that is killed during a call
// contains no key, token or prompt, nor does its command line.
func TestCrashDumpHasNoSecrets(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil) // for its provider, and its look at what was seen
	called := make(chan struct{}, 1)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		called <- struct{}{}
		return !c.waitClosed(hangTimeout)
	})
	management := "mgmt-" + randomBase62(40)
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = []string{"LLM_PROXY_TEST_PROGRAM=1", "LISTEN_ADDR=127.0.0.1:0", "DATA_DIR=" +
		filepath.Join(p.dir, "other"), "ALLOW_PRIVATE_UPSTREAMS=true",
		"OPENAI_API_URL=" + p.provider.url, "OPENAI_API_KEY=" + p.provider.key, "MANAGEMENT_TOKEN=" +
			management, "LOG_LEVEL=debug", "TZ=Asia/Kathmandu"}
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
	req, err := http.NewRequestWithContext(ctx, "POST", "http://"+address+"/v1/chat/completions",
		strings.NewReader(chatBody()))
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
	p.clientOutput.Write(seen.Bytes())
}

// TestPanicLogsNoSecrets: a panic ends only one call, is logged as an error without values, and
// leaves nothing reserved.
func TestPanicLogsNoSecrets(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	p.instance.transport.Proxy = func(r *http.Request) (*url.URL, error) { panic(errors.New("broken in two")) }
	if a := p.chat(); a.err == nil {
		t.Errorf("got %d %s", a.status, a.body)
	}
	waitFor(t, "the log", func() bool { return bytes.Contains(p.log.bytes(), []byte(`"level":"ERROR","msg":"panic"`)) })
	if !bytes.Contains(p.log.bytes(), []byte("broken in two")) || !bytes.Contains(p.log.bytes(), []byte("proxy.go")) {
		t.Error("the log does not have the panic and its place")
	}
	p.instance.transport.Proxy = nil
	if a := p.chat(); a.status != 200 {
		t.Errorf("the next call: %d %s", a.status, a.body)
	}
	if rows := p.ledger(); len(rows) != 2 || p.instance.proxy.bodies.used.Load() != 0 {
		t.Errorf("%d calls on record, %d bytes held", len(rows), p.instance.proxy.bodies.used.Load())
	}
}

// A childProxy is the program in another process, with a project and a token for p's
// provider.
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
	c.cmd.Env = append([]string{"LLM_PROXY_TEST_PROGRAM=1", "LISTEN_ADDR=127.0.0.1:0", "DATA_DIR=" +
		filepath.Join(p.t.TempDir(), "data"),
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
		if m := regexp.MustCompile(`"address":"(127[^"]+)"`).FindStringSubmatch(line); m != nil &&
			strings.Contains(line, `"listening"`) {
			c.url = "http://" + m[1]
		}
	}
	go func() { _, _ = io.Copy(io.Discard, out); c.exit <- c.cmd.Wait() }()
	p.t.Cleanup(func() { _ = c.cmd.Process.Kill(); c.log.Close() })
	return c
}

// chat makes a call and returns its status, or 0 if there was no answer.
func (c *childProxy) chat(p *testProxy) int {
	q := &testProxy{t: p.t, url: c.url}
	return q.chatAs(c.token).status
}

// TestSecondSignal: the first SIGTERM drains, the second ends the program.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	c := p.startChild("DRAIN_TIMEOUT=60s")
	p.provider.setScript(endlessScript)
	q := &testProxy{t: t, url: c.url}
	s := q.stream(c.token)
	if _, err := s.read(1); err != nil {
		t.Fatal(err)
	}
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	waitFor(t, "the drain", func() bool { return q.do("GET", "/readyz", "").status == 503 })
	select {
	case err := <-c.exit:
		t.Fatalf("it ended while a call was running: %v", err)
	default:
	}
	elapsed := stopwatch(t)
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-c.exit:
		if err == nil {
			t.Error("a call was cut, but the program ended without an error")
		}
		if took := elapsed(); took > time.Second {
			t.Errorf("the program ended %v after the second signal", took)
		}
	case <-time.After(hangTimeout):
		t.Error("the program did not end at the second signal")
	}
	if _, err := s.readAll(); err == nil {
		t.Error("the stream ended as if it were complete")
	}
}

// TestLogReaderExits: if the reader of the log exits, such as a pager, the program continues.
func TestLogReaderExits(t *testing.T) {
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
			t.Errorf("the program ended with %v", err)
		}
	case <-time.After(hangTimeout):
		t.Error("the program did not end")
	}
}

// getOverSocket makes a call through a unix socket and returns the status.
func getOverSocket(t *testing.T, path, url string, headers ...string) (int, error) {
	t.Helper()
	tr := &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}}
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://localhost"+url, strings.NewReader(chatBody()))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := tr.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	res.Body.Close()
	return res.StatusCode, nil
}

// TestUnixSocket: the program serves on a socket with the configured mode, and uses the client
// address from a proxy in front only if it trusts that proxy.
func TestUnixSocket(t *testing.T) {
	t.Parallel()
	for trusted, want := range map[string]string{"": "", "unix": "192.0.2.7"} {
		p := newTest(t, map[string]string{"TRUSTED_PROXIES": trusted})
		if err := p.stop(); err != nil {
			t.Fatal(err)
		}
		tcp := p.env["LISTEN_ADDR"]
		path := filepath.Join(p.dir, "s")
		p.env["LISTEN_ADDR"], p.env["SOCKET_MODE"] = "unix:"+path, "0600"
		p.start()
		info, err := os.Stat(path)
		if err != nil || info.Mode() != fs.ModeSocket|0o600 {
			t.Errorf("the socket: %v %v", info.Mode(), err)
		}
		status, err := getOverSocket(t, path, "/v1/chat/completions", "Authorization", "Bearer "+p.token,
			"Content-Type", "application/json", "X-Forwarded-For", "192.0.2.7")
		if status != 200 {
			t.Errorf("got %d %v", status, err)
		}
		if status, err := getOverSocket(t, path, "/v1/chat/completions", "Authorization", "Bearer "+p.token,
			"Content-Type", "application/json"); status != 200 {
			t.Errorf("without X-Forwarded-For: got %d %v", status, err)
		}
		health := &program{getenv: func(name string) string { return p.env[name] }}
		if err := health.run(t.Context(), []string{"healthcheck"}); err != nil {
			t.Error(err)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); err == nil {
			t.Error("the socket is left behind")
		}
		p.env["LISTEN_ADDR"] = tcp
		p.start()
		if rows := p.ledger(); len(rows) != 2 || rows[0].Address != want || rows[1].Address != "" {
			t.Errorf("TRUSTED_PROXIES=%q: %+v", trusted, rows)
		}
	}
}

// TestUnixSocketTaken: the socket of a dead process is replaced; a socket in use or any other
// file is not.
func TestUnixSocketTaken(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	open := func() (net.Listener, error) { return openListener("unix:"+path, 0o660) }
	l, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(); err == nil || !strings.Contains(err.Error(), "another program answers there") {
		t.Errorf("a socket in use: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as if it had been killed
	l.Close()
	if l, err = open(); err != nil {
		t.Errorf("a dead socket: %v", err)
	}
	l.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := open(); err == nil || !strings.Contains(err.Error(), "a file that is not a socket") {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Error("the file is gone")
	}
	if _, err := openListener("unix:"+filepath.Join(dir, "none", "s"), 0o660); err == nil {
		t.Error("a socket in no directory")
	}
}

// TestSocketActivation: the program serves on an inherited socket, and refuses to start
// without one.
func TestSocketActivation(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	start := func(env string, files ...*os.File) *exec.Cmd {
		// The shell's own process becomes the program, so it knows its number.
		cmd := exec.Command("/bin/sh", "-c", env+` exec "$0"`, os.Args[0])
		cmd.Env = []string{"LLM_PROXY_TEST_PROGRAM=1", "LISTEN_ADDR=systemd", "DATA_DIR=" +
			filepath.Join(t.TempDir(), "data")}
		cmd.ExtraFiles = files
		return cmd
	}
	cmd := start("LISTEN_FDS=1 LISTEN_PID=$$", f)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	res, err := http.Get("http://" + l.Addr().String() + "/healthz") // waits in the socket until the program takes it
	if err != nil || res.StatusCode != 200 {
		t.Errorf("got %v %v", res, err)
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	for _, env := range []string{"", "LISTEN_FDS=1 LISTEN_PID=1", "LISTEN_FDS=0 LISTEN_PID=$$",
		"LISTEN_FDS=1 LISTEN_PID=$$"} {
		if out, err := start(env).CombinedOutput(); err == nil || !strings.Contains(string(out), "inherited") {
			t.Errorf("%q: %v %s", env, err, out)
		}
	}
}

// TestCertificateRenewed: new connections get the new certificate, with or without SIGHUP; a
// broken file changes nothing.
func TestCertificateRenewed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cert, key := testCertificate(t, dir, 24*time.Hour)
	p := newTest(t, map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key})
	p.allowErrors = true // the broken file's
	days := func() int {
		conn, err := tls.Dial("tcp", strings.TrimPrefix(p.url, "https://"),
			&tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if conn.ConnectionState().NegotiatedProtocol != "h2" {
			t.Error("no HTTP/2")
		}
		return int(time.Until(conn.ConnectionState().PeerCertificates[0].NotAfter).Hours()/24 + 0.5)
	}
	if n := days(); n != 1 {
		t.Fatalf("the certificate has %d days", n)
	}
	ctx, stop := context.WithCancel(t.Context())
	hangups, done := make(chan os.Signal), make(chan bool)
	go func() { p.instance.certificate.watch(ctx, time.Hour, hangups, p.instance.log.Logger); close(done) }()
	hangups <- syscall.SIGHUP
	testCertificate(t, dir, 48*time.Hour)
	hangups <- syscall.SIGHUP
	waitFor(t, "the new certificate", func() bool { return days() == 2 })
	if err := os.WriteFile(cert, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	hangups <- syscall.SIGHUP
	waitFor(t, "the error", func() bool { return strings.Contains(string(p.log.bytes()), "stays in use") })
	if n := days(); n != 2 {
		t.Errorf("after a broken file the certificate has %d days", n)
	}
	stop()
	<-done
	go func() { p.instance.certificate.watch(t.Context(), time.Millisecond, nil, p.instance.log.Logger) }()
	testCertificate(t, dir, 72*time.Hour)
	waitFor(t, "the newest certificate", func() bool { return days() == 3 })
}

// TestHangup: SIGHUP does not end a server, with or without a certificate.
func TestHangup(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	c := p.startChild()
	for range 3 {
		_ = c.cmd.Process.Signal(syscall.SIGHUP)
	}
	if status := c.chat(p); status != 200 {
		t.Errorf("got %d", status)
	}
}

// TestTraceparent: a well-formed trace is forwarded unchanged and logged; a malformed one is not
// forwarded, nor is its tracestate.
func TestTraceparent(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	const trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	good := fmt.Sprintf("00-%s-%s-01", trace, span)
	for _, c := range []struct {
		values []string
		ok     bool
	}{
		{[]string{good}, true},
		{[]string{"cc" + good[2:] + "-what-comes-later"}, true},
		{nil, false},
		{[]string{good, good}, false},
		{[]string{good + "-x"}, false},
		{[]string{"cc" + good[2:] + "x"}, false},
		{[]string{"ff" + good[2:]}, false},
		{[]string{strings.ToUpper(good)}, false},
		{[]string{"00-" + strings.Repeat("0", 32) + "-" + span + "-01"}, false},
		{[]string{"00-" + trace + "-" + strings.Repeat("0", 16) + "-01"}, false},
		{[]string{good[:54]}, false},
		{[]string{"00_" + good[3:]}, false},
		{[]string{""}, false},
		{[]string{`00-","level":"error"`}, false},
		{[]string{"cc" + good[2:] + "-" + strings.Repeat("x", 300)}, false},
	} {
		before := strings.Count(string(p.log.bytes()), `"trace_id":"`+trace+`","span_id":"`+span+`"`)
		headers := []string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json", "Tracestate",
			"a=b"}
		for _, v := range c.values {
			headers = append(headers, "Traceparent", v)
		}
		if res := p.do("POST", "/v1/chat/completions", chatBody(), headers...); res.status != 200 {
			t.Errorf("%q: got %d", c.values, res.status)
		}
		p.waitSettled()
		got := p.provider.lastRequest(t).header
		logged := strings.Count(string(p.log.bytes()), `"trace_id":"`+trace+`","span_id":"`+span+`"`) - before
		if c.ok && (got.Get("Traceparent") != c.values[0] || got.Get("Tracestate") != "a=b" || logged != 1) ||
			!c.ok && (got["Traceparent"] != nil || got["Tracestate"] != nil || logged != 0) {
			t.Errorf("%q: the provider got %q and %q, %d lines", c.values, got["Traceparent"], got["Tracestate"],
				logged)
		}
	}
}
