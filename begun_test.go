// Tests of the notes of calls that begin: what they keep of a call until it has
// its row, and what a program makes of them that finds some at its start.
package main

import (
	"fmt"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

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

func mustOpen(t *testing.T, file string) *store {
	t.Helper()
	st, err := openStore(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.close() })
	return st
}

// oneToken is a project with a token that has made so many calls.
func oneToken(calls int) []string {
	return []string{`INSERT INTO projects (seq, id, name, created_at, updated_at) VALUES (1, 'proj_a', 'a', 1, 1)`,
		fmt.Sprintf(`INSERT INTO tokens (seq, id, project, name, hash, request_count, created_at, updated_at)
			VALUES (7, 'tok_a', 1, 't', zeroblob(32), %d, 1, 1)`, calls)}
}

func (s *store) counted(t *testing.T) (requests, lost, begun, tokenCount, summed int64) {
	t.Helper()
	if err := s.read.QueryRow(`SELECT (SELECT count(*) FROM requests), (SELECT count(*) FROM requests WHERE outcome = 'lost'),
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
			st := mustOpen(t, oldDatabase(t, "schema/011_begun.sql", append(oneToken(3), noted,
				fmt.Sprintf(open, 600, "ok"), fmt.Sprintf(open, 601, "open"), fmt.Sprintf(open, 700, "open"))...))
			l, err := openLedger(t.Context(), st, slog.New(slog.DiscardHandler), func(r *requestRow) { r.cost, r.priced = 5, true })
			if err != nil {
				t.Fatal(err)
			}
			defer l.close(t.Context())
			if requests, lost, begun, count, _ := st.counted(t); requests != 3 || lost != 2 || begun != 0 || count != 3 {
				t.Errorf("%d rows, %d of them lost, %d notes, count %d", requests, lost, begun, count)
			}
			v, err := st.requestByID(t.Context(), 700)
			if err != nil || v.model != `say "hi"` || !v.stream || v.counts.input != 10 || v.counts.output != 20 || v.tokenID != "tok_a" || *v.costKnown != 5 {
				t.Errorf("the ledger has %+v, %v", v, err)
			}
		})
	}
}

// TestBegunTogether: of calls that began together some have ended and one has
// not. The rows of those stay, however old; that one is listed as running; and if
// the program dies it alone is lost.
func TestBegunTogether(t *testing.T) {
	t.Parallel()
	file := oldDatabase(t, "schema/011_begun.sql", oneToken(0)...)
	st := mustOpen(t, file)
	w := st.newLedgerWriter()
	begun := &begunBatch{}
	var entries []*ledgerEntry
	for id := int64(1000); id > 997; id-- { // not in order
		row := requestRow{id: id, project: 1, token: 7, endpoint: "POST /v1/chat/completions", model: "ä\x00\"\\\x1f\U0001f600", address: "2001:db8::1",
			outcome: outcomeOK, status: 200, source: usageExact, attempts: 1, counts: tokenCounts{input: 1, output: 2}}
		begun.add(id, row.note(nil))
		entries = append(entries, &ledgerEntry{row: row, batch: begun})
	}
	write := func(begins *begunBatch, settles []*ledgerEntry) {
		t.Helper()
		_, undo := batchOf(begins, settles, nil)
		undo() // a batch that fails is made again
		batch, _ := batchOf(begins, settles, nil)
		if err := w.write(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
	write(begun, nil)
	write(nil, entries[:2])
	if n, err := st.forgetRequests(t.Context(), math.MaxInt64, 100); n != 0 || err != nil {
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
	for id, want := range map[int64]outcome{998: outcomeOpen, 1000: outcomeOK} {
		if v, err := st.requestByID(t.Context(), id); err != nil || v.outcome != want {
			t.Errorf("%d: %+v, %v", id, v, err)
		}
	}
	if requests, _, begun, count, summed := st.counted(t); requests != 2 || begun != 1 || count != 2 || summed != 2 {
		t.Errorf("%d rows, %d notes, count %d, %d in the sums", requests, begun, count, summed)
	}

	w.close()
	if err := st.close(); err != nil { // the program dies, and starts anew
		t.Fatal(err)
	}
	st = mustOpen(t, file)
	l, err := openLedger(t.Context(), st, slog.New(slog.DiscardHandler), func(*requestRow) {})
	if err != nil {
		t.Fatal(err)
	}
	if requests, lost, begun, count, summed := st.counted(t); requests != 3 || lost != 1 || begun != 0 || count != 3 || summed != 3 {
		t.Errorf("after it died: %d rows, %d lost, %d notes, count %d, %d in the sums", requests, lost, begun, count, summed)
	}
	now := time.Now()
	e := l.begin(requestRow{id: firstID(now), started: now.UnixMilli(), project: 1, token: 7})
	<-e.begun()
	if err := e.fate(); err != nil {
		t.Fatal(err)
	}
	e.row.outcome, e.row.source = outcomeOK, usageNone
	l.settle(e)
	if err := l.close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if requests, _, begun, count, _ := st.counted(t); requests != 4 || begun != 0 || count != 4 {
		t.Errorf("after one more call: %d rows, %d notes, count %d", requests, begun, count)
	}
	if n, err := st.forgetRequests(t.Context(), math.MaxInt64, 100); n != 4 || err != nil {
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
			p.provider.answer(endless)
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
				p.settle()
			}
			var v struct {
				RequestCount int `json:"request_count"`
			}
			if p.manage("GET", "/manage/tokens/"+id, "", 200, &v); v.RequestCount != tt.most-tt.left {
				t.Fatalf("%d calls are counted", v.RequestCount)
			}
			if err := p.in.ledger.flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			env := maps.Clone(p.env)
			env["DATA_DIR"], env["LISTEN_ADDR"] = filepath.Join(t.TempDir(), "data"), "127.0.0.1:0"
			if err := os.CopyFS(env["DATA_DIR"], os.DirFS(p.env["DATA_DIR"])); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(filepath.Join(env["DATA_DIR"], keyName), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := runProgram(t, env, "restore", "--revoke=since", backup); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			p.provider.answer(modelsScript)
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
	p.provider.answer(endless)
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
	p.countsAgree()
}

// TestBrokenLedgerHoldsNobody: while the ledger cannot write what it had been
// given when a token was evicted, who presents one that is not live is told to
// come back, and waits no longer than that.
func TestBrokenLedgerHoldsNobody(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.allowErrors = true
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		p.pragma(`PRAGMA query_only = 1`) // after the note, before the row
		return c.reply(200, chatAnswer)
	})
	_, p.token = p.newToken(`"name":"l","max_requests":10`) // whose note is committed first
	if res := p.chat(); res.status != 200 {
		t.Fatalf("got %d", res.status)
	}
	waitFor(t, "the end of the call", func() bool { return p.in.running.oldest() == 0 })
	p.in.registry.evict(time.Now().Add(time.Hour).UnixMilli(), true)
	unknown, _ := mintCredential(tokenPrefix, "")
	for _, token := range []string{p.token, unknown()} {
		if res := p.chatAs(token); res.status != 503 || res.header.Get("Retry-After") == "" {
			t.Errorf("got %d %s", res.status, res.body)
		}
	}
	p.provider.answer(answerChat)
	p.pragma(`PRAGMA query_only = 0`)
	waitFor(t, "recovery", func() bool { return p.chatAs(p.token).status != 503 })
	p.countsAgree()
}
