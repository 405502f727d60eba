// Tests of the notes of calls that begin: what they keep of a call until it has
// its row, and what a program makes of them that finds some at its start.
package main

import (
	"fmt"
	"log/slog"
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
		batch, undo := batchOf(begins, settles, nil)
		undo() // a batch that fails is made again
		batch, _ = batchOf(begins, settles, nil)
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
