// Tests of the ledger: what a client has seen is on record, once and for good,
// whatever happens to the database, and the sums agree with the rows.
package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"math/big"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// lockDatabase holds the database's write lock, as another program may, until
// release is called.
func (p *testProxy) lockDatabase() (release func()) {
	p.t.Helper()
	db, err := openSQLite(p.in.cfg.databaseFile, 1, "")
	if err != nil {
		p.t.Fatal(err)
	}
	conn, err := db.Conn(context.Background())
	if err == nil {
		_, err = conn.ExecContext(context.Background(), `BEGIN EXCLUSIVE`)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	release = sync.OnceFunc(func() { _, _ = conn.ExecContext(context.Background(), `ROLLBACK`); db.Close() })
	p.t.Cleanup(release)
	return release
}

// pragma sets something on the writing connection, of which there is one.
func (p *testProxy) pragma(text string) {
	p.t.Helper()
	if _, err := p.in.store.write.Exec(text); err != nil {
		p.t.Fatal(err)
	}
}

// TestOnRecord: no answer byte leaves before the call's row is committed.
func TestOnRecord(t *testing.T) {
	t.Parallel()
	for name, fields := range map[string]string{"unlimited": `"name":"a"`, "limited": `"name":"b","max_requests":10`} {
		for _, member := range []string{`"stream":true`, `"stream":false`} {
			t.Run(name+" "+member, func(t *testing.T) {
				t.Parallel()
				p := newTest(t, nil)
				_, p.token = p.newToken(fields)
				if res := p.chat(); res.status != 200 { // so that the token is live
					t.Fatalf("got %d", res.status)
				}
				release := p.lockDatabase()
				conn := p.dial()
				_, _ = io.WriteString(conn, p.rawChat("Connection: close\r\n", chatBody(member)))
				if name == "unlimited" { // a limited one is recorded before the provider is called
					waitFor(t, "the provider", func() bool { return len(p.provider.got()) == 2 })
				}
				_ = conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
				if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
					t.Error("a byte of the answer left while the database was locked")
				}
				if n := len(p.provider.got()); name == "limited" && n != 1 {
					t.Errorf("the provider got %d calls", n)
				}
				release()
				_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
				if b, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 200 ") {
					t.Errorf("after that: %q, %v", b, err)
				}
				p.sumsAgree()
				p.countsAgree()
			})
		}
	}
	p := newTest(t, nil)
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		c.sse()
		_ = c.chunk(chatEvents(true)[0])
		return !c.gone(10 * time.Second)
	})
	s := p.stream(p.token)
	if _, err := s.read(1); err != nil {
		t.Fatal(err)
	}
	rows, err := p.in.store.listRequests(t.Context(), requestFilter{before: math.MaxInt64, limit: 10})
	if err != nil || len(rows) != 1 || rows[0].outcome != outcomeOpen {
		t.Errorf("at the first byte, the ledger has %+v, %v", rows, err)
	}
	s.body.Close()
}

// TestDatabaseTrouble: while the database cannot be written calls get 503 and
// are told when to come back, what runs goes on and is settled once it can, and
// it recovers by itself.
func TestDatabaseTrouble(t *testing.T) {
	t.Parallel()
	troubles := map[string]func(p *testProxy) (end func()){
		"locked": func(p *testProxy) func() { p.pragma(`PRAGMA busy_timeout = 20`); return p.lockDatabase() },
		"read-only": func(p *testProxy) func() {
			p.pragma(`PRAGMA query_only = 1`)
			return func() { p.pragma(`PRAGMA query_only = 0`) }
		},
		"full": func(p *testProxy) func() {
			p.pragma(`PRAGMA max_page_count = 1`) // SQLite takes the least that it can: what it has
			return func() { p.pragma(`PRAGMA max_page_count = 1000000`) }
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
				env["DATA_DIR"] = smallDisk(t)
			}
			databaseTrouble(t, newTest(t, env), begin)
		})
	}
}

// smallDisk mounts one of 4 MiB, or skips the test where that is not allowed.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=4m,mode=0700"); err != nil {
		t.Skipf("mounting a small disk: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

func databaseTrouble(t *testing.T, p *testProxy, begin func(*testProxy) func()) {
	p.allowErrors = true
	hold := make(chan struct{})
	p.provider.answer(func(c *providerConn, r recorded) bool {
		if strings.Contains(r.body, `"stream":true`) {
			c.sse()
			_ = c.chunk(chatEvents(true)[0])
			<-hold
			_ = c.chunk(strings.Join(chatEvents(true)[1:], ""))
			return c.chunk("") == nil
		}
		return c.reply(200, chatAnswer)
	})
	s := p.stream(p.token)
	_, err := s.read(1)
	if err != nil {
		t.Fatal(err)
	}
	answered := 1 // the stream
	end := begin(p)
	var res answer
	for range 2000 { // on a full disk a few still find room
		if res = p.chat(); res.status != 200 {
			break
		}
		answered++
	}
	if res.status != 503 || res.code() != "ledger_unavailable" || res.header.Get("Retry-After") != "1" {
		t.Errorf("in trouble: got %d %v %s", res.status, res.header, res.body)
	}
	close(hold)
	if rest, err := s.rest(); err != nil || !strings.HasSuffix(rest, "[DONE]\n\n") {
		t.Errorf("the stream that was running: %q, %v", rest, err)
	}
	if res := p.do("GET", "/readyz", ""); res.status != 503 {
		t.Errorf("readyz: got %d %s", res.status, res.body)
	}
	hits := len(p.provider.got())
	for range 20 {
		if res := p.chat(); res.status != 503 || res.header.Get("Retry-After") == "" {
			t.Errorf("in trouble: got %d %s", res.status, res.body)
		}
	}
	if n := len(p.provider.got()) - hits; n > 0 {
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
	for _, v := range p.rows() {
		if v.outcome == outcomeOK {
			n++
		}
	}
	if n != answered {
		t.Errorf("%d calls were answered, %d are on record", answered, n)
	}
	p.sumsAgree()
	if bad, err := p.in.store.check(t.Context()); len(bad) > 0 || err != nil {
		t.Errorf("the database is damaged: %v, %v", bad, err)
	}
	if used := p.in.bodies.used.Load(); used != 0 {
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
			p.provider.answer(anyAnswer)
			tokens := p.trafficTokens()
			stop := make(chan struct{})
			var others sync.WaitGroup
			defer others.Wait()
			end := sync.OnceFunc(func() { close(stop) })
			defer end()
			if busy {
				p.pragma(`PRAGMA busy_timeout = 1`)
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
			waitFor(t, "the ledger", p.in.ledger.healthy)
			rows := map[string]requestView{}
			for _, v := range p.rows() {
				if _, twice := rows[requestID(v.id)]; twice {
					t.Errorf("%s is on record twice", requestID(v.id))
				}
				rows[requestID(v.id)] = v
			}
			for id, status := range seen {
				if v, ok := rows[id]; !ok && status != 503 && status != 403 {
					t.Errorf("a call that was answered with %d is not on record", status)
				} else if ok && v.status != status {
					t.Errorf("%s was answered with %d, but the ledger has %+v", id, status, v.requestRow)
				}
			}
			p.sumsAgree()
			p.countsAgree()
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
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		<-changed
		return c.reply(200, strings.ReplaceAll(chatAnswer, "gpt-4o-mini-2024-07-18", "mine"))
	})
	done := make(chan answer, 1)
	go func() { done <- p.chat() }()
	waitFor(t, "the call", func() bool { return len(p.provider.got()) == 1 })
	p.manage("POST", "/manage/prices", `{"match":"mine","input":1000,"output":1000}`, 201, nil)
	close(changed)
	<-done
	if row := p.lastCall(); row.Cost == nil || *row.Cost != 12e-6 {
		t.Errorf("the ledger has %+v, cost %v", row, row.Cost)
	}
	if p.chat(); *p.lastCall().Cost != 12e-3 {
		t.Errorf("the next call costs %v", *p.lastCall().Cost)
	}
	p.provider.answer(func(c *providerConn, _ recorded) bool {
		return c.reply(200, strings.ReplaceAll(chatAnswer, "gpt-4o-mini-2024-07-18", "unheard-of"))
	})
	if p.chat(); p.lastCall().Cost != nil {
		t.Errorf("a call without a price costs %v", *p.lastCall().Cost)
	}
	p.sumsAgree()
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
	w := p.in.store.newLedgerWriter()
	if err := w.write(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	w.close()
	for interval, want := range map[string]map[int64]int64{
		"hour": {midnight - hourMS: 200, midnight: 400, midnight + hourMS: 200, midnight - dayMS: 200},
		"day":  {midnight - dayMS: 400, midnight: 600},
	} {
		rows, err := p.in.store.usage(t.Context(), usageQuery{interval: interval, to: math.MaxInt64, limit: 100})
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
