// Tests of what the response cache stores: sealed and bound to its place, bounded, deleted when it must be, and never
// in the way of a call, whatever happens to the disk.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"iter"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// forgetMemory empties the cache's memory, so that the next call reads the disk.
func (p *testProxy) forgetMemory() {
	p.t.Helper()
	p.cacheSettled()
	c := p.instance.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	for m, e := range c.allInMemory() {
		c.removeFromMemory(m, e)
	}
	if c.memoryBytes != 0 || c.memory.count != 0 || c.countWaiting(writeOnce) != 0 || c.countWaiting(writeAgain) != 0 {
		p.t.Errorf("the empty memory has %d bytes and %d answers", c.memoryBytes, c.memory.count)
	}
}

// allInMemory returns the answers in memory, the oldest first. The caller has mu locked.
func (c *responseCache) allInMemory() iter.Seq2[*memoryChunk, *memoryEntry] {
	return func(yield func(*memoryChunk, *memoryEntry) bool) {
		for _, m := range c.chunks {
			for e := range m.all() {
				if !yield(m, e) {
					return
				}
			}
		}
	}
}

// countWaiting returns how many answers in memory are in a state, as their entries and as their chunks say, which must
// agree. -1: they do not. The caller has mu locked.
func (c *responseCache) countWaiting(state writeState) (n int) {
	inChunks := 0
	for _, m := range c.chunks {
		inChunks += m.waiting[state]
	}
	for _, e := range c.allInMemory() {
		if e.waits == state {
			n++
		}
	}
	if n != inChunks {
		return -1
	}
	return n
}

// TestCacheSealed: what is on disk cannot be read, changed or moved: such an entry is a miss.
func TestCacheSealed(t *testing.T) {
	t.Parallel()
	const canary = "answer-canary-1"
	p := newTest(t, nil)
	p.enableCache()
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		return c.reply(200, strings.Replace(chatResponseBody, "Hi", canary, 1), "OpenAI-Model: header-canary")
	})
	send := func() testResponse { return p.cachedChat(p.token, "") }
	other := func() testResponse { return p.cachedChat(p.token, `"user":"other"`) }
	first := p.expectFrom("the first", "provider", send)
	p.expectFrom("another", "provider", other)
	p.forgetMemory()
	if res := p.expectFrom("from the disk", "cache", send); res.body != first.body ||
		res.header.Get("OpenAI-Model") != "header-canary" {
		t.Errorf("got %v %s", res.header, res.body)
	}
	files, err := filepath.Glob(filepath.Join(p.env["DATA_DIR"], "*"))
	if err != nil || len(files) < 2 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		if b := mustReadFile(t, name); strings.Contains(b, canary) || strings.Contains(b, "header-canary") {
			t.Errorf("%s has the answer in clear", name)
		}
	}
	for _, c := range []struct{ what, sql string }{
		{"a changed byte", `UPDATE cache SET answer = CAST(substr(answer, 1, length(answer) - 1) || x'00' AS BLOB)`},
		{"cut", `UPDATE cache SET answer = substr(answer, 1, 40)`},
		{"empty", `UPDATE cache SET answer = x''`},
		{"in each other's place", `UPDATE cache SET answer = o.answer
			FROM (SELECT id, answer FROM cache) o WHERE o.id <> cache.id`},
		{"in another project", `UPDATE cache SET project = project + 1`},
		{"longer valid than sealed", ""},
	} {
		p.purgeCache(cacheFilter{})
		p.expectFrom("the first", "provider", send)
		p.expectFrom("another", "provider", other)
		if c.sql == "" {
			p.ageEntriesOnDisk()
		} else {
			p.forgetMemory()
			p.execSQL(c.sql)
		}
		p.expectFrom(c.what, "provider", send)
	}
}

// ageEntriesOnDisk replaces what is on disk by answers that have expired, in rows that say they have not.
func (p *testProxy) ageEntriesOnDisk() {
	p.t.Helper()
	p.cacheSettled()
	c := p.instance.cache
	c.mu.Lock()
	for m, e := range c.allInMemory() {
		expired := m.answer(e)
		expired.ExpiresAt = time.Now().UnixMilli()
		plain, err := expired.encode()
		if err != nil {
			p.t.Fatal(err)
		}
		sealed, err := c.sealing.sealCached(e.key.context(e.project), plain)
		if err != nil {
			p.t.Fatal(err)
		}
		if _, err := c.store.writeDB.Exec(`UPDATE cache SET answer = ? WHERE id = ?`, sealed, e.key.id()); err != nil {
			p.t.Fatal(err)
		}
	}
	c.mu.Unlock()
	p.forgetMemory()
}

// TestCacheRekey: entries survive a change of the encryption key, and are of no use without it.
func TestCacheRekey(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	send := func() testResponse { return p.cachedChat(p.token, "") }
	first := p.expectFrom("the first", "provider", send)
	p.cacheSettled()
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if out, err := runProgram(t, p.env, "rekey"); err != nil {
		t.Fatal(out, err)
	}
	p.start()
	if res := p.expectFrom("after rekey", "cache", send); res.body != first.body {
		t.Errorf("got %s", res.body)
	}
	p.forgetMemory()
	p.instance.cache.sealing = &contentKey{newEncryptionKey()}
	p.expectFrom("with another key", "provider", send)
}

// TestCacheBackup: a backup has no cached answers, not even in its free pages, and its size does not depend on them.
// A restored database starts with an empty cache.
func TestCacheBackup(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		return c.reply(200, strings.Replace(chatResponseBody, "Hi", strings.Repeat("x", 500_000), 1))
	})
	for i := range 4 {
		p.cachedChat(p.token, fmt.Sprintf(`"user":"%d"`, i))
	}
	p.cacheSettled()
	if n := p.cachedRows(); n != 4 {
		t.Fatalf("%d rows", n)
	}
	backup := filepath.Join(p.dir, "backup.db")
	if out, err := runProgram(t, p.env, "backup", backup); err != nil {
		t.Fatal(out, err)
	}
	info, err := os.Stat(backup)
	if err != nil || info.Size() > 1_000_000 {
		t.Fatal(info.Size(), err)
	}
	if extra, _ := filepath.Glob(backup + "-*"); len(extra) > 0 {
		t.Errorf("the backup left %v", extra)
	}
	if n := p.cachedRows(); n != 4 {
		t.Errorf("the backup changed the database: %d rows", n)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if out, err := runProgram(t, p.env, "restore", "--revoke=none", backup); err != nil {
		t.Fatal(out, err)
	}
	p.start()
	p.expectFrom("after the restore", "provider", func() testResponse { return p.cachedChat(p.token, `"user":"0"`) })
}

// TestCachePurge: a purge deletes what it names in memory, on disk and on the way there, and nothing else.
func TestCachePurge(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache(`"scope":"token"`)
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if strings.Contains(r.body, `"gpt-4o"`) {
			return c.reply(200, strings.Replace(chatResponseBody, "gpt-4o-mini-2024-07-18", "gpt-4o-2024-08-06", 1))
		}
		return chatScript(c, r)
	})
	secondID, second := p.newToken(`"name":"second"`)
	firstID := p.tokenID
	var other struct{ ID string }
	p.manage("POST", "/manage/projects", `{"name":"other","openai_api_key":"`+p.provider.key+
		`","policy":{"cache":{"ttl_seconds":3600}}}`, 201, &other)
	project := p.project
	p.project = other.ID
	_, foreign := p.newToken(`"name":"foreign"`)
	p.project = project
	large := strings.Replace(chatBody(`"temperature":0`), "gpt-4o-mini", "gpt-4o", 1)
	calls := map[string]func() testResponse{
		"first":   func() testResponse { return p.cachedChat(p.token, "") },
		"second":  func() testResponse { return p.cachedChat(second, "") },
		"foreign": func() testResponse { return p.cachedChat(foreign, "") },
		"model": func() testResponse {
			return p.do("POST", "/v1/chat/completions", large, "Authorization", "Bearer "+p.token,
				"Content-Type", "application/json")
		},
	}
	row, err := p.instance.store.tokenByID(context.Background(), secondID)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what   string
		purge  func() int64
		purged string
	}{
		{"nothing", func() int64 { return 0 }, ""},
		{"a token's", func() int64 { return p.purgeCache(cacheFilter{token: row.seq}) }, "second"},
		{"every token's", func() int64 { return p.purgeCache(cacheFilter{token: anyToken}) }, "first second model"},
		{"a model's", func() int64 { return p.purgeCache(cacheFilter{model: "gpt-4o-2024-08-06"}) }, "model"},
		{"old ones", func() int64 { return p.purgeCache(cacheFilter{storedBefore: 1}) }, ""},
		{"all up to now", func() int64 {
			return p.purgeCache(cacheFilter{storedBefore: time.Now().UnixMilli() + 1})
		}, "first second model"},
		{"all", func() int64 { return p.purgeCache(cacheFilter{}) }, "first second model"},
		{"with content", func() int64 {
			p.manage("DELETE", "/manage/projects/"+p.project+"/content", "", 200, nil)
			return 3
		}, "first second model"},
	} {
		for _, where := range []string{"in memory", "on disk", "in both"} {
			for _, call := range calls {
				if res := call(); res.status != 200 {
					t.Fatal(res.status, res.body)
				}
			}
			switch where {
			case "on disk":
				p.forgetMemory()
			case "in both":
				p.cacheSettled()
			}
			if n, want := c.purge(), int64(len(strings.Fields(c.purged))); n != want {
				t.Errorf("%s, %s: %d were purged, want %d", c.what, where, n, want)
			}
			for name, call := range calls {
				from := "cache"
				if strings.Contains(c.purged, name) {
					from = "provider"
				}
				p.expectFrom(fmt.Sprintf("%s, %s: %s", c.what, where, name), from, call)
			}
		}
	}
	p.manage("DELETE", "/manage/tokens/"+secondID, "", 200, nil)
	p.cacheSettled()
	if n := p.cachedRows(); n != 3 {
		t.Errorf("%d rows are left after the second token was revoked", n)
	}
	p.manage("DELETE", "/manage/tokens/"+firstID, "", 200, nil)
	if n := p.cachedRows(); n != 1 {
		t.Errorf("%d rows are left after the first token was revoked", n)
	}
	p.manage("DELETE", "/manage/projects/"+other.ID, "", 200, nil)
	if n := p.cachedRows(); n != 0 {
		t.Errorf("%d rows are left after the other project was deleted", n)
	}
	if n := p.instance.cache.memory.count; n != 0 {
		t.Errorf("%d answers are left in memory", n)
	}
}

// TestCachePurgeRunning: the answer to a call that is running during a purge is not stored. Those who wait get it.
func TestCachePurgeRunning(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	release := make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool { <-release; return chatScript(c, r) })
	statuses, wait := p.manyChats(context.Background(), 3, p.token, `"temperature":0`)
	waitFor(t, "the others to wait", func() bool { return p.waiting() == 2 })
	p.purgeCache(cacheFilter{})
	close(release)
	wait()
	for _, status := range statuses {
		if status != 200 {
			t.Errorf("got %d", status)
		}
	}
	if n := p.calls(); n != 1 {
		t.Errorf("the provider got %d calls", n)
	}
	p.cacheSettled()
	if n := p.cachedRows(); n != 0 {
		t.Errorf("%d rows", n)
	}
	p.expectFrom("afterwards", "provider", func() testResponse { return p.cachedChat(p.token, "") })
}

// TestCacheBounded: memory and disk have bounds, and what was used longest ago goes first.
func TestCacheBounded(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MAX_CACHE_BYTES": "1MiB"})
	p.enableCache()
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		return c.reply(200, strings.Replace(chatResponseBody, "Hi", strings.Repeat("x", 150_000), 1))
	})
	send := func(i int) func() testResponse {
		return func() testResponse { return p.cachedChat(p.token, fmt.Sprintf(`"user":"%d"`, i)) }
	}
	c := p.instance.cache
	for i := range 6 { // 0.9 MB
		p.expectFrom("new", "provider", send(i))
		p.cacheSettled()
		p.execSQL(fmt.Sprintf(`UPDATE cache SET used_at = %d WHERE used_at > 1000`, i+1))
	}
	p.forgetMemory()
	p.expectFrom("the first", "cache", send(0)) // and so it is used last
	p.forgetMemory()
	p.expectFrom("a further one", "provider", send(6))
	p.cacheSettled()
	waitFor(t, "entries to be deleted", func() bool { return c.evicted.Load() > 0 })
	if _, bytes, err := p.instance.store.cacheSize(context.Background(), 0); err != nil || bytes > 1<<20 {
		t.Errorf("%d bytes are on disk: %v", bytes, err)
	}
	p.forgetMemory()
	p.expectFrom("the first, used last", "cache", send(0))
	p.expectFrom("the second, used longest ago", "provider", send(1))

	for i := range 400 {
		c.put(testAnswer(i, 100_000), 0)
		c.checkMemory(t)
	}
}

// testAnswer returns an answer with n bytes, which differ from those of others, as does its key.
func testAnswer(i, n int) *cachedAnswer {
	data := bytes.Repeat([]byte{byte(i)}, n)
	return &cachedAnswer{answerHead: answerHead{key: sha256.Sum256(strconv.AppendInt(nil, int64(i), 10)), project: 1,
		cachedMeta: cachedMeta{ExpiresAt: time.Now().UnixMilli() + 60_000}}, model: "m", data: data}
}

// checkMemory checks that the cache's memory is within its bound, and what it counts.
func (c *responseCache) checkMemory(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	listed, bytes, capacity := 0, int64(0), int64(0)
	for m, e := range c.allInMemory() {
		if found, entry := c.inMemory(e.key.id()); found != m || entry != e {
			t.Errorf("an answer is not found where it is")
		}
		listed++
		bytes += e.size()
	}
	for i, m := range c.chunks {
		if capacity += m.charge; m.charge < int64(cap(m.bytes)) || m.number != c.chunks[0].number+uint32(i) {
			t.Errorf("chunk %d of %d has the number %d, %d bytes and the charge %d", i, len(c.chunks), m.number,
				cap(m.bytes), m.charge)
		}
	}
	if n := len(c.chunks); n > memoryCacheBytes/entryOverhead {
		t.Errorf("there are %d chunks", n)
	}
	if waiting := c.countWaiting(writeOnce); capacity > memoryCacheBytes || capacity != c.chunkBytes ||
		bytes != c.memoryBytes || listed != c.memory.count || waiting < 0 || waiting > listed {
		t.Fatalf("%d of %d bytes and %d answers are in memory, %d are listed, %d wait to be written, %d of %d bytes "+
			"are in chunks", c.memoryBytes, bytes, c.memory.count, listed, waiting, c.chunkBytes, capacity)
	}
}

// TestCacheMemory: memory keeps what is used, also if its chunks' numbers wrap, and nothing of what was purged. Whoever
// has got an answer keeps it as it was.
func TestCacheMemory(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	c := p.instance.cache
	c.writing.Lock() // nothing is written, so what lookup finds is in memory
	goOn := sync.OnceFunc(c.writing.Unlock)
	defer goOn()
	c.mu.Lock()
	c.addChunk(&memoryChunk{number: math.MaxUint32 - 20, charge: entryOverhead})
	c.mu.Unlock()
	find := func(i, n int) *cachedAnswer {
		want := testAnswer(i, n)
		a := c.lookup(context.Background(), &want.key, 1, time.Now().UnixMilli())
		if a != nil && (!bytes.Equal(a.data, want.data) || a.key != want.key || a.model != want.model) {
			t.Fatalf("answer %d is another one, of the model %q", i, a.model)
		}
		return a
	}
	const hot, hotLarge, small, large = 1, 2, 5_000, 300_000
	c.put(testAnswer(hot, small), 0)
	c.put(testAnswer(hotLarge, large), 0)
	first := find(hot, small)
	for i := 10; i < 15_000; i++ {
		if c.put(testAnswer(i, small), 0); i%1000 == 0 && (find(hot, small) == nil || find(hotLarge, large) == nil) {
			t.Fatalf("after %d others, answers that are in use are not in memory", i)
		}
	}
	c.checkMemory(t)
	if c.spare == nil {
		t.Errorf("the space of answers that nobody had asked for is not used again")
	}
	if find(10, small) != nil || find(14_999, small) == nil || c.chunks[0].number > math.MaxUint32/2 {
		t.Errorf("the oldest of 15,000 answers is in memory, or the newest is not")
	}
	renewed := testAnswer(3, 70_000)
	for range 40_000 { // each in the place of the last
		c.put(renewed, 0)
	}
	c.checkMemory(t)

	other := testAnswer(4, small)
	other.model = "other"
	c.put(testAnswer(5, small), 0)
	c.put(other, 0)
	erased := find(5, small)
	goOn()
	if _, err := c.purge(context.Background(), cacheFilter{project: 1, model: "m"}); err != nil {
		t.Fatal(err)
	}
	c.checkMemory(t)
	c.mu.Lock()
	for _, m := range c.chunks {
		if bytes.Contains(m.bytes, erased.data[:100]) {
			t.Errorf("memory has an answer that was purged")
		}
	}
	if c.spare != nil {
		t.Errorf("after a purge, memory keeps the space of other answers, which may be of the same project")
	}
	c.mu.Unlock()
	if a := c.lookup(context.Background(), &other.key, 1, time.Now().UnixMilli()); a == nil ||
		!bytes.Equal(a.data, other.data) || find(hot, small) != nil {
		t.Errorf("a purge of one model kept its answers, or not those of another")
	}
	if want := testAnswer(hot, small); !bytes.Equal(first.data, want.data) {
		t.Errorf("an answer has changed after it left memory")
	}
}

// TestMemoryIndex: the index finds what a map finds, also if many ids begin their search at one place, and at its end.
func TestMemoryIndex(t *testing.T) {
	t.Parallel()
	var x memoryIndex
	want := map[int64]memoryPlace{}
	find := func(id int64) int {
		return x.find(id, func(p memoryPlace) bool { return p == want[id] })
	}
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 100_000 {
		id := int64(random.IntN(300)*(memoryIndexSize/4) + memoryIndexSize - random.IntN(40))
		if p, found := want[id]; found {
			slot := find(id)
			if slot < 0 || x.places[slot] != p {
				t.Fatalf("step %d: %d is not found", i, id)
			}
			x.remove(slot)
			delete(want, id)
		} else if find(id) >= 0 {
			t.Fatalf("step %d: %d is found", i, id)
		} else {
			want[id] = memoryPlace{uint32(id), uint16(i), uint16(i>>16 + 1)}
			x.add(want[id])
		}
		if i%1000 == 0 {
			for id := range want {
				if find(id) < 0 {
					t.Fatalf("step %d: %d is lost", i, id)
				}
			}
		}
	}
	if x.count != len(want) {
		t.Errorf("the index counts %d places, there are %d", x.count, len(want))
	}
}

// TestCacheBroken: a database that cannot be read or written makes misses, never errors, and no call waits for it.
func TestCacheBroken(t *testing.T) {
	t.Parallel()
	for what, sql := range map[string]string{
		"writes fail":       `CREATE TRIGGER full BEFORE INSERT ON cache BEGIN SELECT RAISE(ABORT, 'disk full'); END`,
		"the table is gone": `DROP TABLE cache`,
	} {
		p := newTest(t, nil)
		p.enableCache()
		p.execSQL(sql)
		send := func() testResponse { return p.cachedChat(p.token, "") }
		p.expectFrom(what, "provider", send)
		p.expectFrom(what+", from memory", "cache", send)
		c := p.instance.cache
		waitFor(t, "the write to fail", func() bool { return c.dropped.Load() == 1 })
		p.forgetMemory()
		p.expectFrom(what+", without memory", "provider", send)
		if !c.failing.Load() || !bytes.Contains(p.log.bytes(), []byte("answers could not be cached on disk")) {
			t.Errorf("%s: the log does not say so", what)
		}
		_, err := c.purge(context.Background(), cacheFilter{project: 1})
		if (err != nil) != strings.Contains(sql, "DROP") {
			t.Errorf("%s: purging: %v", what, err)
		}
	}
}

// TestCacheDiskHangs: while the disk hangs, answers come from memory, no call waits, and memory stays within its bound.
// An answer that was asked for again, and had to leave before it was written, is counted.
func TestCacheDiskHangs(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	c := p.instance.cache
	c.writing.Lock()
	send := func() testResponse { return p.cachedChat(p.token, "") }
	p.expectFrom("the first", "provider", send)
	p.expectFrom("the second", "cache", send)
	for i := range 3 {
		c.put(testAnswer(i, 15<<20), 0)
	}
	c.mu.Lock()
	n, bytes := c.memory.count, c.memoryBytes
	c.mu.Unlock()
	if n != 2 || bytes > memoryCacheBytes || c.dropped.Load() != 1 {
		t.Errorf("%d answers of %d bytes are in memory, %d were dropped", n, bytes, c.dropped.Load())
	}
	p.expectFrom("the third", "provider", send)
	c.writing.Unlock()
}

// TestCacheCrash: whenever the program dies while it writes entries, the database it leaves is intact, and every
// entry in it is whole.
func TestCacheCrash(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it copies the file and its log")
	p := newTest(t, nil)
	p.enableCache()
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		return c.reply(200, strings.Replace(chatResponseBody, "Hi", strings.Repeat("y", 60_000), 1))
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 60 {
			p.cachedChat(p.token, fmt.Sprintf(`"user":"%d"`, i))
		}
	}()
	for copies := range 8 { // the first ones while entries are written
		if copies < 6 {
			waitFor(t, "more entries", func() bool { return p.instance.cache.stored.Load() >= int64(copies*9) })
		} else {
			<-done
		}
		// A copy of the write-ahead log, then of the file, is what a crash between two writes could leave: frames that
		// were not complete are not used. So few entries are not moved from the log to the file meanwhile.
		file := filepath.Join(p.dir, fmt.Sprintf("crash-%d.db", copies))
		wal := mustReadFile(t, p.instance.cfg.databaseFile+"-wal")
		for name, text := range map[string]string{file: mustReadFile(t, p.instance.cfg.databaseFile),
			file + "-wal": wal[:len(wal)-copies*7777%max(1, len(wal)/2)]} {
			if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		p.checkCrashedCopy(file)
	}
}

func (p *testProxy) checkCrashedCopy(file string) {
	p.t.Helper()
	ctx := context.Background()
	st, err := openStore(ctx, file)
	if err != nil {
		p.t.Fatal(err)
	}
	defer st.close()
	if problems, err := st.checkIntegrity(ctx); err != nil || len(problems) > 0 {
		p.t.Fatal(problems, err)
	}
	rows, err := collect(ctx, st.readDB, "reading", func(r *cacheRow) []any {
		return []any{&r.id, &r.project, &r.size, &r.answer}
	}, `SELECT id, project, size, answer FROM cache`)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, r := range rows {
		if int64(len(r.answer)) < r.size-entryOverhead {
			p.t.Errorf("an entry of %d bytes has %d", r.size, len(r.answer))
		}
	}
}

// TestCacheUsage: what is cached of a project, by model.
func TestCacheUsage(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		model := between(r.body, `"user":"`, `"`)
		return c.reply(200, strings.Replace(chatResponseBody, "gpt-4o-mini-2024-07-18", model, 1))
	})
	for _, members := range []string{`"user":"a"`, `"user":"a","n":1`, `"user":"b"`} {
		p.cachedChat(p.token, members)
	}
	p.cacheSettled()
	row, err := p.instance.store.projectByID(context.Background(), p.project)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().UnixMilli()
	usage, err := p.instance.store.cacheUsage(context.Background(), row.seq, now)
	if err != nil || len(usage) != 2 || usage[0].model != "a" || usage[0].entries != 2 || usage[1].entries != 1 ||
		usage[0].bytes < 2*entryOverhead || usage[0].oldestStoredAt > now {
		t.Errorf("got %+v %v", usage, err)
	}
	entries, bytes, err := p.instance.store.cacheSize(context.Background(), row.seq)
	if err != nil || entries != 3 || bytes != usage[0].bytes+usage[1].bytes {
		t.Errorf("got %d entries, %d bytes %v", entries, bytes, err)
	}
	usage, err = p.instance.store.cacheUsage(context.Background(), row.seq, now+3_700_000)
	if err != nil || len(usage) > 0 {
		t.Errorf("after their time: %+v %v", usage, err)
	}
}

// TestCacheAskedOnce: an answer that was asked for once is written when there is time, one that is asked for again, or
// takes the place of another, at once. Both are counted, listed and deleted while they are in memory only, and a
// program that is stopped writes them first.
func TestCacheAskedOnce(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	p.provider.setScript(replyAs)
	c := p.instance.cache
	call := func(text string, headers ...string) {
		t.Helper()
		if res := p.do("POST", "/v1/chat/completions", `{"model":"gpt-4o","temperature":0,"messages":[{"role":"user",`+
			`"content":"`+text+`"}]}`, append([]string{"Authorization", "Bearer " + p.token,
			"Content-Type", "application/json"}, headers...)...); res.status != 200 {
			t.Fatalf("%s: got %d %s", text, res.status, res.body)
		}
		p.waitSettled()
	}
	expect := func(what string, once, again int, rows int64) {
		t.Helper()
		c.mu.Lock()
		defer c.mu.Unlock()
		for state, want := range map[writeState]int{writeOnce: once, writeAgain: again} {
			if n := c.countWaiting(state); n != want {
				t.Errorf("%s: %d answers are in the state %d, want %d", what, n, state, want)
			}
		}
		if n := p.cachedRows(); n != rows {
			t.Errorf("%s: %d answers are on disk, want %d", what, n, rows)
		}
	}
	c.writing.Lock() // the writer waits
	call("a")
	call("b")
	expect("asked for once", 2, 0, 0)
	call("b")
	expect("one was asked for again", 1, 1, 0)
	call("b")
	expect("and again", 1, 1, 0)
	call("a", "Cache-Control", "no-cache")
	expect("the other was renewed", 0, 2, 0)
	call("c")
	expect("a third", 1, 2, 0)
	c.writing.Unlock()
	if r := p.memoryReport(); r.Entries != 3 || len(r.Models) != 1 || r.Models[0].Entries != 3 ||
		r.Models[0].Bytes != r.Bytes || r.Bytes < 3*entryOverhead {
		t.Errorf("got %+v", r)
	}
	waitFor(t, "all to be written", func() bool { return p.cachedRows() == 3 })
	expect("after a while", 0, 0, 3)
	if r := p.memoryReport(); r.Entries != 3 || r.Models[0].Entries != 3 {
		t.Errorf("written: got %+v", r)
	}
	call("d")
	var got struct{ Deleted int }
	p.manage("DELETE", "/manage/projects/"+p.project+"/cache", "", 200, &got)
	if r := p.memoryReport(); got.Deleted != 4 || r.Entries != 0 {
		t.Errorf("deleted %d, and left %+v", got.Deleted, r)
	}
	call("e")
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	p.start()
	p.expectFrom("after a restart", "cache", func() testResponse { return p.cachedModel(p.token, "gpt-4o", "e") })
}

// TestCacheStopWhileWriting: an answer that is being written when the program is stopped is not lost.
func TestCacheStopWhileWriting(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableCache()
	c := p.instance.cache
	send := func() testResponse { return p.cachedChat(p.token, "") }
	p.expectFrom("the first", "provider", send)
	p.waitSettled()
	release := p.lockDatabase()
	waitFor(t, "the writer", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.countWaiting(writeOnce) == 0
	})
	stopped := make(chan error, 1)
	go func() { stopped <- p.stop() }()
	waitFor(t, "the end", func() bool { return p.do("GET", "/readyz", "").err != nil })
	release()
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	p.start()
	p.expectFrom("after a restart", "cache", send)
}

// memoryReport is cacheReport without writing first.
func (p *testProxy) memoryReport() (r cacheReport) {
	p.t.Helper()
	p.manage("GET", "/manage/projects/"+p.project+"/cache", "", 200, &r)
	return r
}
