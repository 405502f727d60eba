// Tests of the ledger: each call that a client saw answered is recorded exactly once and permanently, whatever
// happens to the database, and the sums equal the rows.
package main

import (
	"context"
	"database/sql/driver"
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

// TestDatabaseFailure: while the database cannot be written, new calls get 503 with Retry-After, and running
// calls continue. Once it can be written again, the program recovers by itself and settles them.
func TestDatabaseFailure(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it breaks the file; e2e/cluster stops and cuts off PostgreSQL")
	failures := map[string]func(p *testProxy) (end func()){
		"locked": func(p *testProxy) func() {
			p.setPragma(`PRAGMA busy_timeout = 20`)
			return p.lockDatabase()
		},
		"read-only": func(p *testProxy) func() {
			p.setPragma(`PRAGMA query_only = 1`)
			return func() { p.setPragma(`PRAGMA query_only = 0`) }
		},
		"full": func(p *testProxy) func() {
			p.setPragma(`PRAGMA max_page_count = 1`) // SQLite raises it to the present size
			return func() { p.setPragma(`PRAGMA max_page_count = 1000000`) }
		},
		"disk full": func(p *testProxy) func() {
			filler := filepath.Join(p.env["DATA_DIR"], "filler")
			f, err := os.Create(filler)
			for err == nil {
				_, err = f.Write(make([]byte, 4096))
			}
			f.Close()
			return func() { os.Remove(filler) }
		},
	}
	for name, breakDatabase := range failures {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := map[string]string{"LOG_LEVEL": "info"}
			if name == "disk full" {
				env["DATA_DIR"] = mountSmallDisk(t)
			}
			checkDatabaseFailure(t, newTest(t, env), breakDatabase)
		})
	}
}

// mountSmallDisk mounts a disk of 4 MiB, or skips the test where that is not allowed.
func mountSmallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=4m,mode=0700"); err != nil {
		t.Skipf("mounting a small disk: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

// checkDatabaseFailure makes calls while the database is broken, and after it was repaired. breakDatabase
// returns the function that repairs it.
func checkDatabaseFailure(t *testing.T, p *testProxy, breakDatabase func(*testProxy) (repair func())) {
	p.allowErrors = true
	release := make(chan struct{}) // lets the stream end
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.Contains(r.body, `"stream":true`) {
			c.beginSSE()
			_ = c.chunk(chatEvents(true)[0])
			<-release
			_ = c.chunk(strings.Join(chatEvents(true)[1:], ""))
			return c.chunk("") == nil
		}
		return c.reply(200, chatResponseBody)
	})
	s := p.stream(p.token)
	if _, err := s.read(1); err != nil {
		t.Fatal(err)
	}
	answered := 1 // the stream
	repair := breakDatabase(p)
	var res testResponse
	for range 2000 { // a full disk still has space for a few
		if res = p.chat(); res.status != 200 {
			break
		}
		answered++
	}
	if res.status != 503 || res.errorCode() != "ledger_unavailable" || res.header.Get("Retry-After") != "1" {
		t.Errorf("during the failure: got %d %v %s", res.status, res.header, res.body)
	}
	close(release)
	if rest, err := s.readAll(); err != nil || !strings.HasSuffix(rest, "[DONE]\n\n") {
		t.Errorf("the running stream: %q, %v", rest, err)
	}
	p.checkRefusals()
	repair()
	waitFor(t, "recovery", func() bool { return p.do("GET", "/readyz", "").status == 200 })
	if res := p.chat(); res.status != 200 {
		t.Errorf("after recovery: got %d %s", res.status, res.body)
	}
	answered++
	recorded := 0
	for _, v := range p.allRequests() {
		if v.outcome == outcomeOK {
			recorded++
		}
	}
	if recorded != answered {
		t.Errorf("%d calls were answered, %d are recorded", answered, recorded)
	}
	p.checkSums()
	if bad, err := p.instance.store.checkIntegrity(t.Context()); len(bad) > 0 || err != nil {
		t.Errorf("the database is damaged: %v, %v", bad, err)
	}
	if used := p.instance.proxy.bodies.used.Load(); used != 0 {
		t.Errorf("%d bytes of bodies are still reserved", used)
	}
}

// checkRefusals checks that a program whose database cannot be written is not ready, and refuses calls without
// sending them.
func (p *testProxy) checkRefusals() {
	t := p.t
	t.Helper()
	if res := p.do("GET", "/readyz", ""); res.status != 503 {
		t.Errorf("readyz: got %d %s", res.status, res.body)
	}
	sent := len(p.provider.received())
	for range 20 {
		if res := p.chat(); res.status != 503 || res.header.Get("Retry-After") == "" {
			t.Errorf("during the failure: got %d %s", res.status, res.body)
		}
	}
	if n := len(p.provider.received()) - sent; n > 0 {
		t.Errorf("%d refused calls reached the provider", n)
	}
	res := p.manageAs(p.adminKey, "POST", "/manage/projects", `{"name":"`+strings.Repeat("n", 100)+
		`","policy":{"models":["`+strings.Repeat("m", 200)+`"]}}`)
	if res.status != 503 && res.status != 201 {
		t.Errorf("an administrator's change: got %d %s", res.status, res.body)
	}
}

// TestSumsEqualRows: after any traffic, with clients that disconnect at any moment and a database that is
// sometimes busy, every answered call has one row, and sums and counts equal the rows.
func TestSumsEqualRows(t *testing.T) {
	t.Parallel()
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprintf("busy %v", busy), func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
			p.allowErrors = busy
			p.provider.setScript(seededScript)
			tokens := p.trafficTokens()
			stopLocking := func() {}
			if busy {
				stopLocking = p.lockAtTimes()
			}
			statuses := p.randomTraffic(tokens, 6, 60)
			stopLocking()
			waitFor(t, "the ledger", p.instance.ledger.healthy)
			rows := map[string]requestView{}
			for _, v := range p.allRequests() {
				if _, twice := rows[formatRequestID(v.id)]; twice {
					t.Errorf("%s is recorded twice", formatRequestID(v.id))
				}
				rows[formatRequestID(v.id)] = v
			}
			for id, status := range statuses {
				if v, ok := rows[id]; !ok && status != 503 && status != 403 {
					t.Errorf("a call that was answered with %d is not recorded", status)
				} else if ok && v.status != status {
					t.Errorf("%s was answered with %d, but the ledger has %+v", id, status, v.requestRow)
				}
			}
			p.checkSums()
			p.checkCounts()
		})
	}
}

// lockAtTimes locks the database again and again, for random times. They are the test itself: traffic must
// meet a database that is locked for longer and shorter than the program waits. stop ends that.
func (p *testProxy) lockAtTimes() (stop func()) {
	p.setPragma(`PRAGMA busy_timeout = 1`)
	end := make(chan struct{})
	var locker sync.WaitGroup
	locker.Go(func() {
		for {
			release := p.lockDatabase()
			time.Sleep(time.Duration(1+rand.IntN(20)) * time.Millisecond)
			release()
			select {
			case <-end:
				return
			case <-time.After(time.Duration(rand.IntN(100)) * time.Millisecond):
			}
		}
	})
	stop = sync.OnceFunc(func() {
		close(end)
		locker.Wait()
	})
	p.t.Cleanup(stop)
	return stop
}

// TestPriceAtTheBeginning: a call costs the price at the time when it began. The cost of a model without a price
// is null, not zero.
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
		return c.reply(200, strings.ReplaceAll(chatResponseBody, "gpt-4o-mini-2024-07-18", "unpriced"))
	})
	if p.chat(); p.lastCall().Cost == nil || *p.lastCall().Cost != 3.15e-6 { // the price of the model it asked for
		t.Errorf("an answer of a model without a price costs %v", p.lastCall().Cost)
	}
	p.checkSums()
	if res := p.manageAs(p.adminKey, "POST", "/manage/prices", `{"match":"mine","input":-1}`); res.status != 400 {
		t.Errorf("a negative price: got %d %s", res.status, res.body)
	}
}

// TestTimeBoundaries: a call counts in exactly one hour and one day, those in which it began, and sums of any
// size are exact.
func TestTimeBoundaries(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	midnight := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC).UnixMilli()
	var batch ledgerBatch
	exact := new(big.Int)
	rng := rand.New(rand.NewPCG(3, 4))
	for i, at := range []int64{midnight - 1, midnight, midnight + hourMS - 1, midnight + hourMS, midnight - dayMS} {
		for j := range 200 {
			r := &requestRow{id: at<<idTimeShift + int64(i*1000+j), started: at, project: 1, token: 1,
				endpoint: "e", outcome: outcomeOK, source: usageExact, cost: rng.Int64N(1 << 50), priced: true,
				firstByteUS: -1}
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

// oldDatabase makes a database with the schema from before a schema file, runs the statements on it, and
// returns its file.
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

// oneTokenSQL returns the statements that add a project with a token that has made a number of calls.
func oneTokenSQL(calls int) []string {
	return []string{`INSERT INTO projects (seq, id, name, created_at, updated_at) VALUES (1, 'proj_a', 'a', 1, 1)`,
		fmt.Sprintf(`INSERT INTO tokens (seq, id, project, name, hash, request_count, created_at, updated_at)
			VALUES (7, 'tok_a', 1, 't', zeroblob(32), %d, 1, 1)`, calls)}
}

// recordCounts is how often the calls of the token of oneTokenSQL are recorded.
type recordCounts struct{ requests, lost, pending, tokenCount, summed int64 }

func (s *store) recordCounts(t *testing.T) recordCounts {
	t.Helper()
	counts, err := queryRow(t.Context(), s.readDB, func(c *recordCounts) []any {
		return []any{&c.requests, &c.lost, &c.pending, &c.tokenCount, &c.summed}
	}, `SELECT (SELECT count(*) FROM requests), (SELECT count(*) FROM requests WHERE outcome = 'lost'),
		(SELECT count(*) FROM begun), (SELECT request_count FROM tokens WHERE seq = 7),
		(SELECT coalesce(sum(calls), 0) FROM usage_sums WHERE grain = 'day' AND token = 7)`)
	if err != nil {
		t.Fatal(err)
	}
	return counts
}

// TestOpenRowsOfOlderVersions: rows that an older program left open become lost calls, counted once.
func TestOpenRowsOfOlderVersions(t *testing.T) {
	t.Parallel()
	const open = `INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, outcome,
			usage_source, input_tokens, output_tokens)
		VALUES (%d, 1, 7, 1, 'POST /v1/chat/completions', 'say "hi"', 1, '192.0.2.1', '%s', 'estimated', 10, 20)`
	for name, setting := range map[string]string{
		"with the oldest open id":    `INSERT INTO settings (name, value) VALUES ('ledger_open_from', '500')`,
		"without the oldest open id": `DELETE FROM settings`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			st := mustOpenStore(t, oldDatabase(t, "schema/011_begun.sql", append(oneTokenSQL(3), setting,
				fmt.Sprintf(open, 600, "ok"), fmt.Sprintf(open, 601, "open"), fmt.Sprintf(open, 700, "open"))...))
			price := func(r *requestRow) error {
				r.cost, r.priced = 5, true
				return nil
			}
			l, err := openLedger(t.Context(), st, slog.New(slog.DiscardHandler), nil,
				func(context.Context) func(*requestRow) error { return price })
			if err != nil {
				t.Fatal(err)
			}
			defer l.close(t.Context())
			if c := st.recordCounts(t); c != (recordCounts{requests: 3, lost: 2, tokenCount: 3, summed: 2}) {
				t.Errorf("recorded are %+v", c)
			}
			v, err := st.requestByID(t.Context(), 700)
			if err != nil || v.model != `say "hi"` || !v.stream || v.counts.input != 10 || v.counts.output != 20 ||
				v.tokenID != "tok_a" || *v.nullCost != 5 {
				t.Errorf("the ledger has %+v, %v", v, err)
			}
		})
	}
}

// TestLedgerConnectionReplaced: database/sql has dropped the connection that the statements belong to, as it does
// after a failure. A write prepares them for the new connection, and closing them touches no closed one.
func TestLedgerConnectionReplaced(t *testing.T) {
	t.Parallel()
	st := mustOpenStore(t, filepath.Join(t.TempDir(), "llm-proxy.db"))
	w := st.newLedgerWriter()
	for id := range int64(2) {
		batch := ledgerBatch{pendingBatchID: id + 1, pendingRecordsJSON: []byte(`[]`)}
		if err := w.write(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
		conn, err := st.writeDB.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.Raw(func(any) error { return driver.ErrBadConn }) // closes it
	}
	w.close()
	if err := st.close(); err != nil {
		t.Error(err)
	}
}

// TestPendingTogether: of three calls that began together two have ended. Their rows stay, however old; the third
// is listed as running; and if the program dies, the third alone is lost.
func TestPendingTogether(t *testing.T) {
	t.Parallel()
	file := oldDatabase(t, "schema/011_begun.sql", oneTokenSQL(0)...)
	st := mustOpenStore(t, file)
	w := st.newLedgerWriter()
	pending := &pendingBatch{}
	var entries []*ledgerEntry
	for id := int64(1000); id > 997; id-- { // not in order
		row := requestRow{id: id, project: 1, token: 7, endpoint: "POST /v1/chat/completions",
			model: "ä\x00\"\\\x1f\U0001f600", address: "2001:db8::1", outcome: outcomeOK, status: 200,
			source: usageExact, attempts: 1, counts: tokenCounts{input: 1, output: 2}}
		pending.add(id, row.appendPendingRecord(nil))
		entries = append(entries, &ledgerEntry{row: row, batch: pending})
	}
	write := func(pending *pendingBatch, settled []*ledgerEntry) {
		t.Helper()
		_, undo := buildLedgerBatch(pending, settled, nil)
		undo() // as for a batch that failed and is built again
		batch, _ := buildLedgerBatch(pending, settled, nil)
		if err := w.write(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
	write(pending, nil)
	write(nil, entries[:2])
	if n, err := st.deleteOldRequests(t.Context(), math.MaxInt64, 100); n != 0 || err != nil {
		t.Errorf("%d rows were deleted, %v", n, err)
	}
	checkPendingLists(t, st, entries[0].row.model)
	for id, want := range map[int64]callOutcome{998: outcomeOpen, 1000: outcomeOK} {
		if v, err := st.requestByID(t.Context(), id); err != nil || v.outcome != want {
			t.Errorf("%d: %+v, %v", id, v, err)
		}
	}
	if c := st.recordCounts(t); c != (recordCounts{requests: 2, pending: 1, tokenCount: 2, summed: 2}) {
		t.Errorf("while one runs, recorded are %+v", c)
	}
	w.close()
	if err := st.close(); err != nil { // the program dies
		t.Fatal(err)
	}
	checkRestart(t, mustOpenStore(t, file))
}

// checkPendingLists checks that the call 998 is listed as running, and 999 and 1000 as ended.
func checkPendingLists(t *testing.T, st *store, model string) {
	t.Helper()
	for _, f := range []requestFilter{{}, {project: "proj_a"}, {token: "tok_a"},
		{token: "tok_a", project: "proj_a", endpoint: "POST /v1/chat/completions"}} {
		f.before, f.limit = math.MaxInt64, 10
		rows, err := st.listRequests(t.Context(), f)
		if err != nil || len(rows) != 3 || rows[0].id != 1000 || rows[2].id != 998 ||
			rows[2].outcome != outcomeOpen || rows[2].tokenName != "t" || rows[2].model != model {
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
}

// checkRestart opens the ledger after the program died while one of three calls ran, and makes one more call.
func checkRestart(t *testing.T, st *store) {
	t.Helper()
	newComplete := func(context.Context) func(*requestRow) error {
		return func(*requestRow) error { return nil }
	}
	l, err := openLedger(t.Context(), st, slog.New(slog.DiscardHandler), nil, newComplete)
	if err != nil {
		t.Fatal(err)
	}
	if c := st.recordCounts(t); c != (recordCounts{requests: 3, lost: 1, tokenCount: 3, summed: 3}) {
		t.Errorf("after the restart, recorded are %+v", c)
	}
	now := time.Now()
	e := &ledgerEntry{row: requestRow{id: minIDAt(now), started: now.UnixMilli(), project: 1, token: 7}}
	l.begin(e)
	<-e.committed()
	if err := e.commitErr(); err != nil {
		t.Fatal(err)
	}
	e.row.outcome, e.row.source = outcomeOK, usageNone
	l.settle(e)
	if err := l.close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c := st.recordCounts(t); c != (recordCounts{requests: 4, lost: 1, tokenCount: 4, summed: 4}) {
		t.Errorf("after one more call, recorded are %+v", c)
	}
	if n, err := st.deleteOldRequests(t.Context(), math.MaxInt64, 100); n != 4 || err != nil {
		t.Errorf("%d rows were deleted, %v", n, err)
	}
}

// TestRestoreAmidCalls: calls that run when the backup is made, or when the program dies after it, count once
// each for the tokens that --revoke=since restores.
func TestRestoreAmidCalls(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		maxRequests, left int
		duringBackup      bool // the calls run when the backup is made; otherwise when the program dies after it
	}{
		"program died":      {maxRequests: 5, left: 0},
		"backup amid calls": {maxRequests: 8, left: 5, duringBackup: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			id, token := p.newToken(fmt.Sprintf(`"name":"l","max_requests":%d`, c.maxRequests))
			file := filepath.Join(p.dir, "backup.db")
			backup := func() {
				if out, err := runProgram(t, p.env, "backup", file); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			if !c.duringBackup {
				backup()
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
			if c.duringBackup {
				backup()
				for _, s := range streams {
					s.body.Close()
				}
				p.waitSettled()
			}
			var v struct {
				RequestCount int `json:"request_count"`
			}
			if p.manage("GET", "/manage/tokens/"+id, "", 200, &v); v.RequestCount != c.maxRequests-c.left {
				t.Fatalf("%d calls are counted", v.RequestCount)
			}
			p.checkRestored(t, file, token, c.left)
		})
	}
}

// checkRestored restores a backup into a copy of the program's data as it is now, which is what a program that
// died leaves. The token must then have left further calls.
func (p *testProxy) checkRestored(t *testing.T, backup, token string, left int) {
	t.Helper()
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
	for i := range left + 1 {
		want := 200
		if i == left {
			want = 429
		}
		if got := s.status(t, "/v1/models", token); got != want {
			t.Errorf("call %d after the restore: %d, want %d", i+1, got, want)
		}
	}
}

// TestTokenInUse: a token is shown as used during its first call, which has no row yet.
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
	var single view
	p.manage("GET", "/manage/tokens/"+id, "", 200, &single)
	var list struct{ Data []view }
	p.manage("GET", "/manage/tokens?name=first", "", 200, &list)
	for _, v := range append(list.Data, single) {
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

// TestBrokenLedgerBlocksNobody: while the ledger cannot write rows that were queued when a token was evicted, a
// call with a token that is not in memory gets 503 with Retry-After at once.
func TestBrokenLedgerBlocksNobody(t *testing.T) {
	requireSQLite(t, "it sets a pragma")
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		p.setPragma(`PRAGMA query_only = 1`) // after the pending record, before the row
		return c.reply(200, chatResponseBody)
	})
	_, p.token = p.newToken(`"name":"l","max_requests":10`) // another token: its pending record is committed first
	if res := p.chat(); res.status != 200 {
		t.Fatalf("got %d", res.status)
	}
	waitFor(t, "the end of the call", func() bool { return p.instance.running.count() == 0 })
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

// record1000 writes batches of a thousand calls that have ended into the database. The first batch has the time
// at; each further one is a second later.
func (p *testProxy) record1000(at time.Time, batches int) {
	p.t.Helper()
	w := p.instance.store.newLedgerWriter()
	defer w.close()
	for range batches {
		var b ledgerBatch
		for i := range 1000 {
			b.records = append(b.records, &requestRow{id: minIDAt(at) + int64(i), started: at.UnixMilli(),
				project: 1, token: 1, endpoint: "POST /v1/chat/completions", model: "gpt-4o-mini",
				address: "192.0.2.1", outcome: outcomeOK, status: 200, source: usageExact, firstByteUS: 1,
				attempts: 1, errorCode: strings.Repeat("x", 400)})
		}
		if err := w.write(context.Background(), b); err != nil {
			p.t.Fatal(err)
		}
		at = at.Add(time.Second)
	}
}

// databaseSizes returns the bytes of the database file, those in use, and how many calls are stored.
func (p *testProxy) databaseSizes() (file, used, calls int64) {
	p.t.Helper()
	requireSQLite(p.t, "it reads the size of the file")
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

// TestShrink: beyond the size limit the oldest calls are deleted and the newest stay, freed pages are reused
// without the file growing, and what exceeds the limit but may not be deleted is reported.
func TestShrink(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	l := p.instance.ledger
	old := time.Now().Add(-48 * time.Hour)
	p.record1000(old, 12)
	file, used, _ := p.databaseSizes()
	limit := used / 2
	before := minIDAt(time.Now().Add(-minCallRetention))
	if over := l.pruneToSize(t.Context(), 0, before); over != 0 {
		t.Error("without a limit, something was deleted")
	}
	for range 20 { // it returns after some steps, so that calls are written in between
		if over := l.pruneToSize(t.Context(), limit, before); over != 0 {
			t.Errorf("%d bytes too many", over)
		}
	}
	after, used, calls := p.databaseSizes()
	if used > limit || used < limit*8/10 || calls == 0 || calls >= 12000 || after != file {
		t.Errorf("%d bytes of at most %d are in use, %d calls are left; the file had %d bytes and has %d",
			used, limit, calls, file, after)
	}
	newest := requestFilter{before: minIDAt(old.Add(time.Hour)), limit: 1}
	rows, err := p.instance.store.listRequests(t.Context(), newest)
	if err != nil || len(rows) != 1 || rows[0].id>>idTimeShift != old.Add(11*time.Second).UnixMilli() {
		t.Errorf("the newest call did not stay: %v %v", rows, err)
	}
	p.record1000(old.Add(time.Hour), 5)
	if again, _, _ := p.databaseSizes(); again != file {
		t.Errorf("the file grew from %d to %d bytes although it had free pages", file, again)
	}
	p.record1000(time.Now(), 1)
	for range 40 {
		if over := l.pruneToSize(t.Context(), 1, before); over > 0 {
			break
		}
	}
	if _, _, calls := p.databaseSizes(); calls != 1000 {
		t.Errorf("%d calls are left, want those of the last hour", calls)
	}
	if over := l.pruneToSize(t.Context(), 1, before); over <= 0 {
		t.Error("what may not be deleted is not reported")
	}
	p.chat()
	if len(p.ledger()) == 0 {
		t.Error("no call is recorded")
	}
}

// TestRetention: the loop deletes what is too old or too much, and warns once when it may not.
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
	waitFor(t, "old calls to be deleted", func() bool { _, _, calls := p.databaseSizes(); return calls == 1000 })
	waitFor(t, "the warning about what stays", func() bool {
		return strings.Count(string(p.log.bytes()), "larger than MAX_DATABASE_BYTES") == 1
	})
	stop()
	<-done
}

// TestCommitPace: with PostgreSQL, calls share commits of pending records when they are many, and only then.
func TestCommitPace(t *testing.T) {
	t.Parallel()
	now := time.Now()
	var pace commitPace
	for _, step := range []struct {
		name  string
		after time.Duration // between two commits
		calls int           // in each
		want  int
	}{
		{"300 a second", 10 * time.Millisecond, 3, 1},
		{"1000 a second", 5 * time.Millisecond, 5, 5},
		{"5000 a second", 5 * time.Millisecond, 25, 25},
		{"100 a second", 10 * time.Millisecond, 1, 1},
		{"bursts", time.Second, 400, 1},
	} {
		got := 0
		for range 40 {
			now = now.Add(step.after)
			got = pace.batchGoal(now, step.calls)
		}
		if got != step.want {
			t.Errorf("%s: a commit waits for %d calls, not for %d", step.name, got, step.want)
		}
	}
}
