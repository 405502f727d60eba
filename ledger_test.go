// Tests of the ledger: what a client has seen is on record, once and for good,
// whatever happens to the database, and the sums agree with the rows.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/big"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestDatabaseFailure: while the database cannot be written calls get 503 and
// are told when to come back, what runs goes on and is settled once it can, and
// it recovers by itself.
func TestDatabaseFailure(t *testing.T) {
	t.Parallel()
	troubles := map[string]func(p *testProxy) (end func()){
		"locked": func(p *testProxy) func() { p.setPragma(`PRAGMA busy_timeout = 20`); return p.lockDatabase() },
		"read-only": func(p *testProxy) func() {
			p.setPragma(`PRAGMA query_only = 1`)
			return func() { p.setPragma(`PRAGMA query_only = 0`) }
		},
		"full": func(p *testProxy) func() {
			p.setPragma(`PRAGMA max_page_count = 1`) // SQLite takes the least that it can: what it has
			return func() { p.setPragma(`PRAGMA max_page_count = 1000000`) }
		},
		"disk full": func(p *testProxy) func() {
			hog := filepath.Join(p.env["DATA_DIR"], "hog")
			f, err := os.Create(hog)
			for err == nil {
				_, err = f.Write(make([]byte, 4096))
			}
			f.Close()
			return func() { os.Remove(hog) }
		},
	}
	for name, begin := range troubles {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := map[string]string{"LOG_LEVEL": "info"}
			if name == "disk full" {
				env["DATA_DIR"] = mountSmallDisk(t)
			}
			checkDatabaseFailure(t, newTest(t, env), begin)
		})
	}
}

// mountSmallDisk mounts one of 4 MiB, or skips the test where that is not allowed.
func mountSmallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=4m,mode=0700"); err != nil {
		t.Skipf("mounting a small disk: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

func checkDatabaseFailure(t *testing.T, p *testProxy, begin func(*testProxy) func()) {
	p.allowErrors = true
	hold := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.Contains(r.body, `"stream":true`) {
			c.beginSSE()
			_ = c.chunk(chatEvents(true)[0])
			<-hold
			_ = c.chunk(strings.Join(chatEvents(true)[1:], ""))
			return c.chunk("") == nil
		}
		return c.reply(200, chatResponseBody)
	})
	s := p.stream(p.token)
	_, err := s.read(1)
	if err != nil {
		t.Fatal(err)
	}
	answered := 1 // the stream
	end := begin(p)
	var res testResponse
	for range 2000 { // on a full disk a few still find room
		if res = p.chat(); res.status != 200 {
			break
		}
		answered++
	}
	if res.status != 503 || res.errorCode() != "ledger_unavailable" || res.header.Get("Retry-After") != "1" {
		t.Errorf("in trouble: got %d %v %s", res.status, res.header, res.body)
	}
	close(hold)
	if rest, err := s.readAll(); err != nil || !strings.HasSuffix(rest, "[DONE]\n\n") {
		t.Errorf("the stream that was running: %q, %v", rest, err)
	}
	if res := p.do("GET", "/readyz", ""); res.status != 503 {
		t.Errorf("readyz: got %d %s", res.status, res.body)
	}
	hits := len(p.provider.received())
	for range 20 {
		if res := p.chat(); res.status != 503 || res.header.Get("Retry-After") == "" {
			t.Errorf("in trouble: got %d %s", res.status, res.body)
		}
	}
	if n := len(p.provider.received()) - hits; n > 0 {
		t.Errorf("%d calls that were refused were made", n)
	}
	if res := p.manageAs(p.adminKey, "POST", "/manage/projects", `{"name":"`+strings.Repeat("n", 100)+`","policy":{"models":["`+strings.Repeat("m", 200)+`"]}}`); res.status != 503 && res.status != 201 {
		t.Errorf("an admin's change: got %d %s", res.status, res.body)
	}
	end()
	waitFor(t, "recovery", func() bool { return p.do("GET", "/readyz", "").status == 200 })
	if res := p.chat(); res.status != 200 {
		t.Errorf("after it: got %d %s", res.status, res.body)
	}
	answered++
	n := 0
	for _, v := range p.allRequests() {
		if v.outcome == outcomeOK {
			n++
		}
	}
	if n != answered {
		t.Errorf("%d calls were answered, %d are on record", answered, n)
	}
	p.checkSums()
	if bad, err := p.instance.store.checkIntegrity(t.Context()); len(bad) > 0 || err != nil {
		t.Errorf("the database is damaged: %v, %v", bad, err)
	}
	if used := p.instance.proxy.bodies.used.Load(); used != 0 {
		t.Errorf("%d bytes of bodies are held", used)
	}
}

// TestSumsEqualRows: after any traffic, with clients that leave at any moment
// and a database that is busy now and then, every answered call has one row, and
// sums and counts equal the rows.
func TestSumsEqualRows(t *testing.T) {
	t.Parallel()
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprintf("busy %v", busy), func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
			p.allowErrors = busy
			p.provider.setScript(seededScript)
			tokens := p.trafficTokens()
			stop := make(chan struct{})
			var others sync.WaitGroup
			defer others.Wait()
			end := sync.OnceFunc(func() { close(stop) })
			defer end()
			if busy {
				p.setPragma(`PRAGMA busy_timeout = 1`)
				others.Go(func() {
					for {
						release := p.lockDatabase()
						time.Sleep(time.Duration(1+rand.IntN(20)) * time.Millisecond)
						release()
						select {
						case <-stop:
							return
						case <-time.After(time.Duration(rand.IntN(100)) * time.Millisecond):
						}
					}
				})
			}
			seen := p.randomTraffic(tokens, 6, 60)
			end()
			others.Wait()
			waitFor(t, "the ledger", p.instance.ledger.healthy)
			rows := map[string]requestView{}
			for _, v := range p.allRequests() {
				if _, twice := rows[formatRequestID(v.id)]; twice {
					t.Errorf("%s is on record twice", formatRequestID(v.id))
				}
				rows[formatRequestID(v.id)] = v
			}
			for id, status := range seen {
				if v, ok := rows[id]; !ok && status != 503 && status != 403 {
					t.Errorf("a call that was answered with %d is not on record", status)
				} else if ok && v.status != status {
					t.Errorf("%s was answered with %d, but the ledger has %+v", id, status, v.requestRow)
				}
			}
			p.checkSums()
			p.checkCounts()
		})
	}
}

// TestPriceAtTheBeginning: a call costs what was the price when it began; a model
// without one has no cost rather than none.
func TestPriceAtTheBeginning(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	changed := make(chan struct{})
	p.manage("POST", "/manage/prices", `{"match":"mine","input":1,"output":1}`, 201, nil)
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		<-changed
		return c.reply(200, strings.ReplaceAll(chatResponseBody, "gpt-4o-mini-2024-07-18", "mine"))
	})
	done := make(chan testResponse, 1)
	go func() { done <- p.chat() }()
	waitFor(t, "the call", func() bool { return len(p.provider.received()) == 1 })
	p.manage("POST", "/manage/prices", `{"match":"mine","input":1000,"output":1000}`, 201, nil)
	close(changed)
	<-done
	if row := p.lastCall(); row.Cost == nil || *row.Cost != 12e-6 {
		t.Errorf("the ledger has %+v, cost %v", row, row.Cost)
	}
	if p.chat(); *p.lastCall().Cost != 12e-3 {
		t.Errorf("the next call costs %v", *p.lastCall().Cost)
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(200, strings.ReplaceAll(chatResponseBody, "gpt-4o-mini-2024-07-18", "unheard-of"))
	})
	if p.chat(); p.lastCall().Cost != nil {
		t.Errorf("a call without a price costs %v", *p.lastCall().Cost)
	}
	p.checkSums()
	if res := p.manageAs(p.adminKey, "POST", "/manage/prices", `{"match":"mine","input":-1}`); res.status != 400 {
		t.Errorf("a negative price: got %d %s", res.status, res.body)
	}
}

// TestTimeBoundaries: a call is in exactly one hour and one day, that of its
// beginning, and sums of any size have no drift.
func TestTimeBoundaries(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	midnight := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC).UnixMilli()
	var batch ledgerBatch
	exact := new(big.Int)
	rng := rand.New(rand.NewPCG(3, 4))
	for i, at := range []int64{midnight - 1, midnight, midnight + hourMS - 1, midnight + hourMS, midnight - dayMS} {
		for j := range 200 {
			r := &requestRow{id: at<<idTimeShift + int64(i*1000+j), started: at, project: 1, token: 1, endpoint: "e", outcome: outcomeOK,
				source: usageExact, cost: rng.Int64N(1 << 50), priced: true, firstByteUS: -1}
			exact.Add(exact, big.NewInt(r.cost))
			batch.records = append(batch.records, r)
		}
	}
	w := p.instance.store.newLedgerWriter()
	if err := w.write(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	w.close()
	for interval, want := range map[string]map[int64]int64{
		"hour": {midnight - hourMS: 200, midnight: 400, midnight + hourMS: 200, midnight - dayMS: 200},
		"day":  {midnight - dayMS: 400, midnight: 600},
	} {
		rows, err := p.instance.store.usage(t.Context(), usageQuery{interval: interval, to: math.MaxInt64, limit: 100})
		if err != nil || len(rows) != len(want) {
			t.Fatalf("%s: %d rows, %v", interval, len(rows), err)
		}
		total := new(big.Int)
		for _, u := range rows {
			if u.calls != want[u.at] {
				t.Errorf("%s %v: %d calls, want %d", interval, time.UnixMilli(u.at).UTC(), u.calls, want[u.at])
			}
			total.Add(total, big.NewInt(u.cost))
		}
		if total.Cmp(exact) != 0 {
			t.Errorf("%s: the cost adds up to %v, want %v", interval, total, exact)
		}
	}
}

// oldDatabase makes a database as it was before a schema file came, changed by
// the statements, and returns its file.
func oldDatabase(t *testing.T, before string, statements ...string) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "old.db")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := openSQLite(file, 1, "")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	names, err := filepath.Glob("schema/*.sql")
	version := slices.Index(names, before)
	if err != nil || version < 0 {
		t.Fatalf("%s is not among %v: %v", before, names, err)
	}
	for _, name := range names[:version] {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := db.Exec(string(text)); err != nil {
			t.Fatal(err)
		}
	}
	for _, text := range append(statements, fmt.Sprintf(`PRAGMA user_version = %d`, version)) {
		if _, err := db.Exec(text); err != nil {
			t.Fatal(err)
		}
	}
	return file
}

func mustOpenStore(t *testing.T, file string) *store {
	t.Helper()
	st, err := openStore(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.close() })
	return st
}

// oneTokenSQL is a project with a token that has made so many calls.
func oneTokenSQL(calls int) []string {
	return []string{`INSERT INTO projects (seq, id, name, created_at, updated_at) VALUES (1, 'proj_a', 'a', 1, 1)`,
		fmt.Sprintf(`INSERT INTO tokens (seq, id, project, name, hash, request_count, created_at, updated_at)
			VALUES (7, 'tok_a', 1, 't', zeroblob(32), %d, 1, 1)`, calls)}
}

func (s *store) recordCounts(t *testing.T) (requests, lost, begun, tokenCount, summed int64) {
	t.Helper()
	if err := s.readDB.QueryRow(`SELECT (SELECT count(*) FROM requests), (SELECT count(*) FROM requests WHERE outcome = 'lost'),
		(SELECT count(*) FROM begun), (SELECT request_count FROM tokens WHERE seq = 7),
		(SELECT coalesce(sum(calls), 0) FROM usage_sums WHERE grain = 'day' AND token = 7)`).Scan(&requests, &lost, &begun, &tokenCount, &summed); err != nil {
		t.Fatal(err)
	}
	return
}

// TestOpenRowsOfOlderVersions: rows that an older program left open are lost
// calls, counted once.
func TestOpenRowsOfOlderVersions(t *testing.T) {
	t.Parallel()
	const open = `INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, outcome, usage_source, input_tokens, output_tokens)
		VALUES (%d, 1, 7, 1, 'POST /v1/chat/completions', 'say "hi"', 1, '192.0.2.1', '%s', 'estimated', 10, 20)`
	for name, noted := range map[string]string{
		"noted":     `INSERT INTO settings (name, value) VALUES ('ledger_open_from', '500')`,
		"not noted": `DELETE FROM settings`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			st := mustOpenStore(t, oldDatabase(t, "schema/011_begun.sql", append(oneTokenSQL(3), noted,
				fmt.Sprintf(open, 600, "ok"), fmt.Sprintf(open, 601, "open"), fmt.Sprintf(open, 700, "open"))...))
			l, err := openLedger(t.Context(), st, slog.New(slog.DiscardHandler), func(r *requestRow) { r.cost, r.priced = 5, true })
			if err != nil {
				t.Fatal(err)
			}
			defer l.close(t.Context())
			if requests, lost, begun, count, _ := st.recordCounts(t); requests != 3 || lost != 2 || begun != 0 || count != 3 {
				t.Errorf("%d rows, %d of them lost, %d notes, count %d", requests, lost, begun, count)
			}
			v, err := st.requestByID(t.Context(), 700)
			if err != nil || v.model != `say "hi"` || !v.stream || v.counts.input != 10 || v.counts.output != 20 || v.tokenID != "tok_a" || *v.nullCost != 5 {
				t.Errorf("the ledger has %+v, %v", v, err)
			}
		})
	}
}

// TestPendingTogether: of calls that began together some have ended and one has
// not. The rows of those stay, however old; that one is listed as running; and if
// the program dies it alone is lost.
func TestPendingTogether(t *testing.T) {
	t.Parallel()
	file := oldDatabase(t, "schema/011_begun.sql", oneTokenSQL(0)...)
	st := mustOpenStore(t, file)
	w := st.newLedgerWriter()
	begun := &pendingBatch{}
	var entries []*ledgerEntry
	for id := int64(1000); id > 997; id-- { // not in order
		row := requestRow{id: id, project: 1, token: 7, endpoint: "POST /v1/chat/completions", model: "ä\x00\"\\\x1f\U0001f600", address: "2001:db8::1",
			outcome: outcomeOK, status: 200, source: usageExact, attempts: 1, counts: tokenCounts{input: 1, output: 2}}
		begun.add(id, row.appendPendingRecord(nil))
		entries = append(entries, &ledgerEntry{row: row, batch: begun})
	}
	write := func(begins *pendingBatch, settles []*ledgerEntry) {
		t.Helper()
		_, undo := buildLedgerBatch(begins, settles, nil)
		undo() // a batch that fails is made again
		batch, _ := buildLedgerBatch(begins, settles, nil)
		if err := w.write(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
	write(begun, nil)
	write(nil, entries[:2])
	if n, err := st.deleteOldRequests(t.Context(), math.MaxInt64, 100); n != 0 || err != nil {
		t.Errorf("%d rows were let go, %v", n, err)
	}
	for _, f := range []requestFilter{{}, {project: "proj_a"}, {token: "tok_a"}, {token: "tok_a", project: "proj_a", endpoint: "POST /v1/chat/completions"}} {
		f.before, f.limit = math.MaxInt64, 10
		rows, err := st.listRequests(t.Context(), f)
		if err != nil || len(rows) != 3 || rows[0].id != 1000 || rows[2].id != 998 || rows[2].outcome != outcomeOpen || rows[2].tokenName != "t" || rows[2].model != entries[0].row.model {
			t.Errorf("%+v: %+v, %v", f, rows, err)
		}
		f.outcome, f.limit = "open", 1
		if rows, err := st.listRequests(t.Context(), f); err != nil || len(rows) != 1 || rows[0].id != 998 {
			t.Errorf("%+v: %+v, %v", f, rows, err)
		}
		f.before = 998
		if rows, err := st.listRequests(t.Context(), f); err != nil || len(rows) != 0 {
			t.Errorf("%+v: %+v, %v", f, rows, err)
		}
	}
	for id, want := range map[int64]callOutcome{998: outcomeOpen, 1000: outcomeOK} {
		if v, err := st.requestByID(t.Context(), id); err != nil || v.outcome != want {
			t.Errorf("%d: %+v, %v", id, v, err)
		}
	}
	if requests, _, begun, count, summed := st.recordCounts(t); requests != 2 || begun != 1 || count != 2 || summed != 2 {
		t.Errorf("%d rows, %d notes, count %d, %d in the sums", requests, begun, count, summed)
	}

	w.close()
	if err := st.close(); err != nil { // the program dies, and starts anew
		t.Fatal(err)
	}
	st = mustOpenStore(t, file)
	l, err := openLedger(t.Context(), st, slog.New(slog.DiscardHandler), func(*requestRow) {})
	if err != nil {
		t.Fatal(err)
	}
	if requests, lost, begun, count, summed := st.recordCounts(t); requests != 3 || lost != 1 || begun != 0 || count != 3 || summed != 3 {
		t.Errorf("after it died: %d rows, %d lost, %d notes, count %d, %d in the sums", requests, lost, begun, count, summed)
	}
	now := time.Now()
	e := l.begin(requestRow{id: minIDAt(now), started: now.UnixMilli(), project: 1, token: 7})
	<-e.committed()
	if err := e.commitErr(); err != nil {
		t.Fatal(err)
	}
	e.row.outcome, e.row.source = outcomeOK, usageNone
	l.settle(e)
	if err := l.close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if requests, _, begun, count, _ := st.recordCounts(t); requests != 4 || begun != 0 || count != 4 {
		t.Errorf("after one more call: %d rows, %d notes, count %d", requests, begun, count)
	}
	if n, err := st.deleteOldRequests(t.Context(), math.MaxInt64, 100); n != 4 || err != nil {
		t.Errorf("%d rows were let go, %v", n, err)
	}
}

// TestRestoreAmidCalls: calls that run when the backup is made, or when the
// program dies after it, count once each for tokens that --revoke=since restores.
func TestRestoreAmidCalls(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		most, left int
		before     bool // they run when the backup is made, and end; else they begin after it and the program dies
	}{"program died": {most: 5, left: 0}, "backup amid calls": {most: 8, left: 5, before: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			id, token := p.newToken(fmt.Sprintf(`"name":"l","max_requests":%d`, tt.most))
			backup := filepath.Join(p.dir, "backup.db")
			save := func() {
				if out, err := runProgram(t, p.env, "backup", backup); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			if !tt.before {
				save()
				for range 2 {
					p.chatAs(token)
				}
			}
			p.provider.setScript(endlessScript)
			var streams []*clientStream
			for range 3 {
				s := p.stream(token)
				if _, err := s.read(1); err != nil {
					t.Fatal(err)
				}
				streams = append(streams, s)
			}
			if tt.before {
				save()
				for _, s := range streams {
					s.body.Close()
				}
				p.waitSettled()
			}
			var v struct {
				RequestCount int `json:"request_count"`
			}
			if p.manage("GET", "/manage/tokens/"+id, "", 200, &v); v.RequestCount != tt.most-tt.left {
				t.Fatalf("%d calls are counted", v.RequestCount)
			}
			if err := p.instance.ledger.flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			env := maps.Clone(p.env)
			env["DATA_DIR"], env["LISTEN_ADDR"] = filepath.Join(t.TempDir(), "data"), "127.0.0.1:0"
			if err := os.CopyFS(env["DATA_DIR"], os.DirFS(p.env["DATA_DIR"])); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(filepath.Join(env["DATA_DIR"], keyFileName), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := runProgram(t, env, "restore", "--revoke=since", backup); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			p.provider.setScript(modelsScript)
			s := serveProgram(t, env)
			for i := range tt.left + 1 {
				if got, want := s.status(t, "/v1/models", token), map[bool]int{true: 200, false: 429}[i < tt.left]; got != want {
					t.Errorf("call %d after the restore: %d, want %d", i+1, got, want)
				}
			}
		})
	}
}

// TestTokenInUse: a token that its first call is using is shown as used, though no
// row knows of that call yet.
func TestTokenInUse(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	id, token := p.newToken(`"name":"first call","idle_expiry_minutes":1`)
	p.provider.setScript(endlessScript)
	s := p.stream(token)
	if _, err := s.read(1); err != nil {
		t.Fatal(err)
	}
	type view struct {
		RequestCount int     `json:"request_count"`
		LastUsedAt   *string `json:"last_used_at"`
		IsActive     bool    `json:"is_active"`
	}
	var one view
	p.manage("GET", "/manage/tokens/"+id, "", 200, &one)
	var list struct{ Data []view }
	p.manage("GET", "/manage/tokens?name=first", "", 200, &list)
	for _, v := range append(list.Data, one) {
		if v.RequestCount != 1 || v.LastUsedAt == nil || !v.IsActive {
			t.Errorf("while a stream runs: %+v", v)
		}
	}
	if len(list.Data) != 1 {
		t.Errorf("%d tokens are listed", len(list.Data))
	}
	s.body.Close()
	p.checkCounts()
}

// TestBrokenLedgerBlocksNobody: while the ledger cannot write what it had been
// given when a token was evicted, who presents one that is not live is told to
// come back, and waits no longer than that.
func TestBrokenLedgerBlocksNobody(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		p.setPragma(`PRAGMA query_only = 1`) // after the note, before the row
		return c.reply(200, chatResponseBody)
	})
	_, p.token = p.newToken(`"name":"l","max_requests":10`) // whose note is committed first
	if res := p.chat(); res.status != 200 {
		t.Fatalf("got %d", res.status)
	}
	waitFor(t, "the end of the call", func() bool { return p.instance.running.oldestID() == 0 })
	p.instance.registry.evict(time.Now().Add(time.Hour).UnixMilli(), true)
	unknown, _ := mintCredential(tokenPrefix, "")
	for _, token := range []string{p.token, unknown()} {
		if res := p.chatAs(token); res.status != 503 || res.header.Get("Retry-After") == "" {
			t.Errorf("got %d %s", res.status, res.body)
		}
	}
	p.provider.setScript(chatScript)
	p.setPragma(`PRAGMA query_only = 0`)
	waitFor(t, "recovery", func() bool { return p.chatAs(p.token).status != 503 })
	p.checkCounts()
}

// record1000 writes batches of a thousand settled calls straight into the ledger,
// a second apart, from at on.
func (p *testProxy) record1000(at time.Time, batches int) {
	p.t.Helper()
	w := p.instance.store.newLedgerWriter()
	defer w.close()
	for range batches {
		var b ledgerBatch
		for i := range 1000 {
			r := &requestRow{id: minIDAt(at) + int64(i), started: at.UnixMilli(), project: 1, token: 1, endpoint: "POST /v1/chat/completions",
				model: "gpt-4o-mini", address: "192.0.2.1", outcome: outcomeOK, status: 200, source: usageExact, firstByteUS: 1, attempts: 1, errorCode: strings.Repeat("x", 400)}
			b.records = append(b.records, r)
		}
		if err := w.write(context.Background(), b); err != nil {
			p.t.Fatal(err)
		}
		at = at.Add(time.Second)
	}
}

func (p *testProxy) databaseSizes() (file, used int64, calls int64) {
	p.t.Helper()
	all, free, err := p.instance.store.size(context.Background())
	if err != nil {
		p.t.Fatal(err)
	}
	c, err := p.instance.store.countRows(context.Background())
	if err != nil {
		p.t.Fatal(err)
	}
	return all, all - free, c.calls
}

// TestShrink: beyond a size the oldest calls go and the newest stay, the room is
// used again without the file growing, and what cannot go is told.
func TestShrink(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	old := time.Now().Add(-48 * time.Hour)
	p.record1000(old, 12)
	file, used, _ := p.databaseSizes()
	most := used / 2
	before := minIDAt(time.Now().Add(-minCallRetention))
	if over := p.instance.ledger.pruneToSize(t.Context(), 0, before); over != 0 {
		t.Error("no limit, but something was done")
	}
	for range 20 { // it stops after some steps, for calls to be written
		if over := p.instance.ledger.pruneToSize(t.Context(), most, before); over != 0 {
			t.Errorf("%d bytes too many", over)
		}
	}
	after, used, calls := p.databaseSizes()
	if used > most || used < most*8/10 || calls == 0 || calls >= 12000 || after != file {
		t.Errorf("%d bytes of at most %d are in use, %d calls left; the file had %d bytes and has %d", used, most, calls, file, after)
	}
	rows, err := p.instance.store.listRequests(t.Context(), requestFilter{before: minIDAt(old.Add(time.Hour)), limit: 1})
	if err != nil || len(rows) != 1 || rows[0].id>>idTimeShift != old.Add(11*time.Second).UnixMilli() {
		t.Errorf("the newest call did not stay: %v %v", rows, err)
	}
	p.record1000(old.Add(time.Hour), 5)
	if again, _, _ := p.databaseSizes(); again != file {
		t.Errorf("the file grew from %d to %d bytes though it had room", file, again)
	}
	p.record1000(time.Now(), 1)
	for range 40 {
		if over := p.instance.ledger.pruneToSize(t.Context(), 1, before); over > 0 {
			break
		}
	}
	if _, _, calls := p.databaseSizes(); calls != 1000 {
		t.Errorf("%d calls are left, want those of the last hour", calls)
	}
	if over := p.instance.ledger.pruneToSize(t.Context(), 1, before); over <= 0 {
		t.Error("nothing is said of what cannot go")
	}
	p.chat()
	if len(p.ledger()) == 0 {
		t.Error("no call on record")
	}
}

// TestRetention: the loop lets go of what is too old and too much, and says
// when it cannot.
func TestRetention(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.record1000(time.Now().Add(-48*time.Hour), 1)
	p.record1000(time.Now().Add(-30*time.Minute), 1)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan bool)
	go func() {
		p.instance.ledger.runRetention(ctx, retention{24 * time.Hour, 1}, time.Millisecond)
		close(done)
	}()
	waitFor(t, "old calls to go", func() bool { _, _, calls := p.databaseSizes(); return calls == 1000 })
	waitFor(t, "a word on what stays", func() bool {
		return strings.Count(string(p.log.bytes()), "larger than MAX_DATABASE_BYTES") == 1
	})
	stop()
	<-done
}
