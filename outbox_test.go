// Tests of the file that keeps the rows of ended calls while the database takes none.
package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
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
	waitFor(t, "their pending records", func() bool { n, _ := p.instance.ledger.backlog(); return n == 0 })
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
		if text, err = o.appendLine(text, r, int64(i+1), i >= 2); err != nil {
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
	p := newTest(t, nil)
	st, dir := p.instance.store, t.TempDir()
	key := newEncryptionKey()
	foreign, err := deriveAuditChain(key)
	if err != nil {
		t.Fatal(err)
	}
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
	if info, err := os.Stat(o.name); err == nil && info.Size() != 0 || l.outbox.lines != 0 {
		t.Errorf("on the full disk: %v %v, %d lines", info, err, o.lines)
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
