// Tests of the file that keeps the rows of ended calls while the database takes none.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"math"
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

// TestOutboxKilled: calls that ended while the database took no rows are recorded exactly once, with their usage, when
// the program is killed before it takes them, and when it is not.
func TestOutboxKilled(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "a pragma keeps the database from being written; e2e/cluster has the same for PostgreSQL")
	p := newTest(t, map[string]string{"LOG_LEVEL": "info"})
	p.allowErrors = true
	proceed, end := make(chan struct{}), make(chan struct{})
	endLast := sync.OnceFunc(func() { close(end) })
	t.Cleanup(endLast)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.Contains(r.body, `"seed":9`) {
			<-end
		}
		<-proceed
		return chatScript(c, r)
	})
	const calls = 5
	var clients, last sync.WaitGroup
	for range calls {
		clients.Go(func() {
			if _, status := p.sendChat(context.Background(), p.token, `"n":1`); status != 200 {
				t.Errorf("a call got %d", status)
			}
		})
	}
	last.Go(func() { _, _ = p.sendChat(context.Background(), p.token, `"seed":9`) })
	waitFor(t, "the calls to reach the provider", func() bool { return len(p.provider.received()) == calls+1 })
	if err := p.instance.ledger.flush(t.Context()); err != nil { // their pending records
		t.Fatal(err)
	}
	p.setPragma(`PRAGMA query_only = 1`)
	close(proceed)
	clients.Wait()
	name := p.instance.cfg.unwrittenFile()
	waitFor(t, "the rows to be kept", func() bool {
		text, _ := os.ReadFile(name)
		return bytes.Count(text, []byte("\n")) == calls
	})
	if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v %v", info, err)
	}
	check := func(q *testProxy, last callOutcome) {
		t.Helper()
		rows := q.allRequests()
		outcomes := map[callOutcome]int{}
		for _, v := range rows {
			if outcomes[v.outcome]++; v.outcome == outcomeOK && (v.source != usageExact || v.counts.output != 3) {
				t.Errorf("the ledger has %+v", v.requestRow)
			}
		}
		outcomes[last]--
		if len(rows) != calls+1 || outcomes[outcomeOK] != calls || outcomes[last]%calls != 0 {
			t.Errorf("recorded are %v, and one %s", outcomes, last)
		}
		if _, err := os.Stat(q.instance.cfg.unwrittenFile()); err == nil {
			t.Error("the file is still there")
		}
		q.checkSums()
		q.checkCounts()
	}
	check(p.crashedCopy(), outcomeLost)
	if text, _ := os.ReadFile(name); bytes.Count(text, []byte("\n")) != calls {
		t.Errorf("the file has grown: %q", text)
	}
	endLast()
	last.Wait()
	p.setPragma(`PRAGMA query_only = 0`)
	waitFor(t, "the file to go", func() bool { _, err := os.Stat(name); return err != nil })
	check(p, outcomeOK)
	waitFor(t, "the setting to go", func() bool {
		n, err := queryValue[int](t.Context(), p.instance.store.readDB, "counting settings",
			`SELECT count(*) FROM settings WHERE name LIKE 'outbox %'`)
		return n == 0 && err == nil
	})
}

// testOutboxRows returns rows of calls that ended and, from the third on, of refused calls that only count.
func testOutboxRows(n int) (rows []*requestRow) {
	now := time.Now().UnixMilli()
	first := now<<idTimeShift + rand.Int64N(1<<20)
	for i := range n {
		rows = append(rows, &requestRow{id: first + int64(i), started: now, project: 1, token: 1,
			endpoint: "POST /v1/chat/completions", outcome: outcomeOK, status: 200, source: usageNone, firstByteUS: -1})
	}
	return rows
}

// outboxText returns the content of a file with these rows.
func outboxText(t *testing.T, o *outbox, rows []*requestRow) (text []byte) {
	t.Helper()
	for i, r := range rows {
		var err error
		if text, err = o.appendLine(text, r, uint64(i+1), i >= 2); err != nil {
			t.Fatal(err)
		}
	}
	return text
}

// TestOutboxOnce: a start that dies after it recorded a file, and before it removed it, leads to no double count, of
// rows and of what only counts in sums.
func TestOutboxOnce(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	st, name := p.instance.store, filepath.Join(p.dir, "rows")
	o := newOutbox(name, st.chain, slog.New(slog.DiscardHandler))
	text := outboxText(t, o, testOutboxRows(4))
	sum := func() (calls int64) {
		t.Helper()
		rows, err := st.usage(t.Context(), usageQuery{interval: "total", to: math.MaxInt64, limit: 9})
		if err != nil || len(rows) > 1 {
			t.Fatal(rows, err)
		}
		for _, r := range rows {
			calls = r.calls
		}
		return calls
	}
	mustOverwrite(t, name, string(text)+string(text))
	if rows, torn, err := recordOutbox(t.Context(), st, name); rows != 4 || torn || err != nil || sum() != 4 {
		t.Fatalf("%d rows, torn %v, %v; %d in the sums", rows, torn, err, sum())
	}
	if err := st.setSetting(t.Context(), outboxSetting+o.id, "4"); err != nil { // as before the file was removed
		t.Fatal(err)
	}
	more, err := o.appendLine(text, testOutboxRows(6)[5], 5, false)
	if err != nil {
		t.Fatal(err)
	}
	mustOverwrite(t, name, string(more))
	if rows, _, err := recordOutbox(t.Context(), st, name); rows != 1 || err != nil || sum() != 5 {
		t.Errorf("the second time: %d rows, %v; %d in the sums", rows, err, sum())
	}
	if _, err := st.setting(t.Context(), outboxSetting+o.id); !errors.Is(err, errNotFound) {
		t.Errorf("the setting is still there: %v", err)
	}
}

// TestOutboxFiles: a file that is torn at its end is read as far as it goes. One that is foreign, damaged, or no file
// is refused, and nothing of it is recorded.
func TestOutboxFiles(t *testing.T) {
	t.Parallel()
	env := map[string]string{"ENCRYPTION_KEY": goodKey}
	p, other := newTest(t, maps.Clone(env)), newTest(t, env)
	st, dir := p.instance.store, t.TempDir()
	foreign := other.instance.store.chain // of a database with the same key
	discard := slog.New(slog.DiscardHandler)
	write := func(text string) func(string) error {
		return func(name string) error { return os.WriteFile(name, []byte(text), 0o600) }
	}
	line := func(chain *auditChain) string {
		return string(outboxText(t, newOutbox("", chain, discard), testOutboxRows(1)))
	}
	changed := strings.Replace(line(st.chain), `"ok"`, `"no"`, 1)
	for name, tt := range map[string]struct {
		make func(name string) error
		rows int
		torn bool
		err  string
	}{
		"empty":          {make: write("")},
		"torn":           {make: write(line(st.chain) + line(st.chain)[:200]), rows: 1, torn: true},
		"torn signature": {make: write(line(st.chain)[:20]), torn: true},
		"no line break":  {make: write(strings.TrimSuffix(line(st.chain), "\n")), rows: 1},
		"torn inside":    {make: write(line(st.chain)[:200] + "\n" + line(st.chain)), err: "damaged"},
		"foreign":        {make: write(line(foreign)), err: "another database"},
		"changed":        {make: write(changed), err: "damaged"},
		"unsigned":       {make: write(`{"SumOnly":false,"Fields":[1]}`), err: "another version"},
		"other":          {make: write("hello\n"), err: "another version"},
		"zero bytes":     {make: write(strings.Repeat("\x00", 4096) + "\n"), err: "damaged"},
		"too large": {err: "too large", make: func(name string) error {
			return errors.Join(write("")(name), os.Truncate(name, 1<<30))
		}},
		"pipe":      {err: "not a regular file", make: func(name string) error { return syscall.Mkfifo(name, 0o600) }},
		"directory": {err: "not a regular file", make: func(name string) error { return os.Mkdir(name, 0o700) }},
		"link":      {err: "symbolic links", make: func(name string) error { return os.Symlink("/dev/zero", name) }},
		"link to nothing": {err: "symbolic links",
			make: func(name string) error { return os.Symlink("nothing", name) }},
	} {
		file := filepath.Join(dir, name)
		if err := tt.make(file); err != nil {
			t.Fatal(err)
		}
		before := len(p.allRequests())
		rows, torn, err := recordOutbox(t.Context(), st, file)
		text := ""
		if err != nil {
			text = err.Error()
		}
		if rows != tt.rows || torn != tt.torn || (err == nil) != (tt.err == "") || !strings.Contains(text, tt.err) {
			t.Errorf("%s: %d rows, torn %v, %q", name, rows, torn, text)
		}
		if n := len(p.allRequests()) - before; n != tt.rows {
			t.Errorf("%s: %d rows were recorded", name, n)
		}
		if _, err := os.Lstat(file); (err == nil) != (tt.err != "") {
			t.Errorf("%s: afterwards the file is %v", name, err)
		}
	}
	if _, _, err := recordOutbox(t.Context(), st, filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	file := p.instance.cfg.unwrittenFile()
	mustOverwrite(t, file, line(foreign))
	if p.checkRefusedStartError(file, "put it beside that database"); mustReadFile(t, file) == "" {
		t.Error("the file of another database is gone")
	}
	mustRemove(t, file)
}

// TestOutboxDiskFull: when the disk is full, no part of a line stays, the rows are kept once there is space, and both
// are reported once. A file that is moved away is made anew.
func TestOutboxDiskFull(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	dir := mountSmallDisk(t)
	log := &syncBuffer{}
	o := newOutbox(filepath.Join(dir, "rows"), p.instance.store.chain, slog.New(slog.NewTextHandler(log, nil)))
	rows := testOutboxRows(20)
	l := &ledger{outbox: o}
	for _, r := range rows {
		l.settledEntries = append(l.settledEntries, &ledgerEntry{row: *r})
	}
	filler := filepath.Join(dir, "filler")
	f, err := os.Create(filler)
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	f.Close()
	for range 3 {
		o.report(l.keepRows(true))
	}
	if info, err := os.Stat(o.name); err == nil && info.Size() != 0 || len(o.kept) != 0 {
		t.Errorf("on the full disk: %v %v, %d lines", info, err, len(o.kept))
	}
	mustRemove(t, filler)
	kept := func() int { text, _ := os.ReadFile(o.name); return bytes.Count(text, []byte("\n")) }
	for range 3 {
		if o.report(l.keepRows(true)); kept() != len(rows) {
			t.Errorf("with space again, %d rows are kept", kept())
		}
	}
	if err := os.Rename(o.name, o.name+".away"); err != nil {
		t.Fatal(err)
	}
	l.settledEntries = append(l.settledEntries, &ledgerEntry{row: *testOutboxRows(21)[20]})
	if o.report(l.keepRows(true)); kept() != len(rows)+1 {
		t.Errorf("after the file was moved away, %d rows are kept", kept())
	}
	o.size = maxOutboxBytes - 1
	l.settledEntries = append(l.settledEntries, &ledgerEntry{row: *testOutboxRows(22)[21]})
	if err := l.keepRows(true); err == nil || !strings.Contains(err.Error(), "larger than 64 MiB") {
		t.Errorf("beyond its bound: %v", err)
	}
	text := string(log.bytes())
	if n := []int{strings.Count(text, "level=ERROR"), strings.Count(text, "kept in a file again"),
		strings.Count(text, "no space left")}; !slices.Equal(n, []int{1, 1, 1}) {
		t.Errorf("%v reports: %s", n, text)
	}
}

// A killedLedger is a ledger whose writer and outbox the test runs, step by step, as their goroutines do.
type killedLedger struct {
	*ledger
	t     *testing.T
	lines []byte
	rows  []*requestRow
	work  ledgerWork
}

// step makes a step of ledger.keepRows, ledger.run, or the world around them.
func (l *killedLedger) step(name string) (err error) {
	switch name {
	case "fail":
		l.failing.Store(true)
	case "take":
		l.lines, l.rows, err = l.unkeptRows(false)
	case "keep":
		err = l.outbox.append(l.lines)
	case "kept":
		for _, r := range l.rows {
			l.outbox.kept[r] = true
		}
	case "drop":
		l.dropOutbox()
	case "dequeue":
		l.flushing = true
		l.work = l.dequeue()
	case "commit":
		l.writeWork(&l.work)
	case "commit unseen": // the connection is lost before the answer comes, as can happen with PostgreSQL
		write := l.writer.writeAll
		l.writer.writeAll = func(ctx context.Context, w *ledgerWriter, b ledgerBatch) error {
			return cmp.Or(write(ctx, w, b), errors.New("the connection was lost"))
		}
		l.writeWork(&l.work)
		l.writer.writeAll = write
	case "count":
		l.markCommitted(l.work)
	case "refuse":
		statement := `CREATE TRIGGER refusal BEFORE INSERT ON usage_sums WHEN NEW.token = 902
			BEGIN SELECT RAISE(ABORT, 'no'); END`
		if l.store.backend != nil {
			statement = `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
				AS 'BEGIN RAISE check_violation; END'; CREATE TRIGGER refusal BEFORE INSERT ON usage_sums FOR EACH ROW
				WHEN (NEW.token = 902) EXECUTE FUNCTION refuse()`
		}
		_, err = l.store.writeDB.Exec(statement)
	case "accept":
		statement := `DROP TRIGGER IF EXISTS refusal`
		if l.store.backend != nil {
			statement = `DROP FUNCTION IF EXISTS refuse CASCADE`
		}
		_, err = l.store.writeDB.Exec(statement)
	}
	return err
}

// TestOutboxKilledAtEachStep: whenever the program is killed between two steps of the writer and of the outbox, and
// whichever comes first, the next start leads to one record of each row that was kept: of calls, of refused calls, and
// of refused calls that only count in sums. So does one after a start that was killed itself.
func TestOutboxKilledAtEachStep(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	st, discard := p.instance.store, slog.New(slog.DiscardHandler)
	const ok, withRow = 900, 901 // tokens; 902 has refused calls without a row
	counts := func() (n [5]int64) {
		t.Helper()
		for i, query := range []string{`usage_sums WHERE grain = 'hour' AND token = 900`,
			`usage_sums WHERE grain = 'hour' AND token = 901`, `usage_sums WHERE grain = 'hour' AND token = 902`,
			`(SELECT 1 AS calls FROM requests WHERE token = 900) r`,
			`(SELECT 1 AS calls FROM requests WHERE token = 901) r`} {
			var err error
			if n[i], err = queryValue[int64](t.Context(), st.readDB, "counting",
				`SELECT coalesce(sum(calls), 0) FROM `+query); err != nil {
				t.Fatal(err)
			}
		}
		return n
	}
	scenarios := []string{
		"fail, take, keep, kept, dequeue, commit, count, drop",
		"fail, take, dequeue, commit, keep, count, kept, drop",
		"fail, take, dequeue, keep, commit, kept, count, drop",
		"dequeue, fail, take, keep, kept, commit, count, drop",
		"fail, take, keep, take, keep, kept, dequeue, commit, count, drop",
		"refuse, fail, take, keep, kept, dequeue, commit, count, accept, dequeue, commit, count, drop",
		"refuse, dequeue, commit, count, take, keep, kept, accept, dequeue, commit, count, drop",
	}
	if st.backend != nil {
		scenarios = append(scenarios, "dequeue, commit unseen, count, take, keep, kept")
	}
	for _, scenario := range scenarios {
		steps := strings.Split(scenario, ", ")
		for killed := 1; killed <= len(steps); killed++ {
			file := filepath.Join(p.dir, "rows")
			l := &killedLedger{t: t, ledger: &ledger{store: st, log: discard, writer: st.newLedgerWriter(),
				outbox: newOutbox(file, st.chain, discard), wake: make(chan struct{}, 1)}}
			for i, r := range testOutboxRows(6) {
				if r.token = ok + int64(i%3); r.token == ok {
					l.settle(&ledgerEntry{row: *r})
					continue
				}
				r.outcome = outcomeRefused
				l.recordRefused(r, r.token == withRow)
			}
			before := counts()
			for _, name := range steps[:killed] {
				if err := l.step(name); err != nil {
					t.Fatal(name, err)
				}
			}
			l.outbox.close()
			l.writer.close()
			if err := l.step("accept"); err != nil {
				t.Fatal(err)
			}
			var kept [5]bool
			if _, err := os.Stat(file); err == nil {
				all, _, err := readOutbox(st.chain, file)
				writer := st.newLedgerWriter()
				if err == nil { // a start that is killed before it removes the file
					_, err = recordRows(t.Context(), st, writer, all)
				}
				if writer.close(); err != nil {
					t.Fatal(err)
				}
				if _, _, err := recordOutbox(t.Context(), st, file); err != nil {
					t.Fatal(err)
				}
				for _, u := range all {
					kept[u.row.token-ok] = true
					kept[3], kept[4] = kept[0], kept[1] // their rows
				}
			}
			after := counts()
			for i := range after { // what was neither kept nor written may be lost
				if n := after[i] - before[i]; n != 2 && (n != 0 || kept[i] || killed == len(steps)) {
					t.Errorf("%s, killed after %d steps: %v became %v", scenario, killed, before, after)
					break
				}
			}
		}
	}
}
