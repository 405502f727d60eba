// This file is the response cache: the key of an answer, the answers in memory, and the writer that brings answers to
// the disk, those first that were asked for again. policy.go decides which calls it covers, proxy_cache.go asks it. It
// knows no HTTP and has no SQL, and secrets.go seals what it stores. A cache that fails is a miss, never an error.
package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The key.

// A cacheKey names an answer.
type cacheKey [sha256.Size]byte

// newCacheKey hashes everything that an answer depends on. Each part is preceded by its length, so that no other
// parts give the same bytes. salt is a secret of this database: without it, nobody who has the database can check
// whether some request was made.
func newCacheKey(salt []byte, parts []string, body []byte) (key cacheKey) {
	buf := make([]byte, 0, 1024)
	buf = append(buf, salt...)
	buf = binary.BigEndian.AppendUint64(buf, uint64(len(parts)))
	for _, p := range parts {
		buf = binary.BigEndian.AppendUint64(buf, uint64(len(p)))
		buf = append(buf, p...)
	}
	h := sha256.New()
	h.Write(buf)
	h.Write(body) // the last part: its length follows from the rest
	h.Sum(key[:0])
	return key
}

// id is the row of a key in the table cache.
func (k *cacheKey) id() int64 { return int64(binary.BigEndian.Uint64(k[:8])) }

// String is the key as clients see it.
func (k *cacheKey) String() string { return hex.EncodeToString(k[:8]) }

// context binds a sealed answer to its project and its key.
func (k *cacheKey) context(project int64) string {
	return strconv.FormatInt(project, 10) + "|" + hex.EncodeToString(k[:])
}

// Answers.

// A cachedAnswer is a complete answer. It never changes.
type cachedAnswer struct {
	key            cacheKey
	project, token int64  // token is 0 if the tokens of the project share the answer
	endpoint       string // its pattern
	cachedMeta
	data   []byte // a line for each name and each value of the header, in turn, and then the body
	bodyAt int    // where it begins
}

// cachedMeta is what is stored of an answer beside its header and its body.
type cachedMeta struct {
	Stream    bool
	Model     string // that answered
	Cost      int64  // of the call to the provider, in nano-dollars; 0 if it is not known
	TotalUS   int64  // how long that call took
	StoredAt  int64  // unix milliseconds
	ExpiresAt int64
}

// storedMeta is cachedMeta with the header.
type storedMeta struct {
	Header []string // names and values in turn
	*cachedMeta
}

const entryOverhead = 1 << 10 // bytes that an answer takes beside its body, on disk and in memory

func (a *cachedAnswer) body() []byte { return a.data[a.bodyAt:] }
func (a *cachedAnswer) size() int64  { return int64(len(a.data)-a.bodyAt) + entryOverhead }

// age returns the seconds since the answer came.
func (a *cachedAnswer) age(now int64) int64 { return max(0, now-a.StoredAt) / 1000 }

// appendHeaderLine appends the name or the value of a header, which contains no line break.
func appendHeaderLine(b []byte, text string) []byte { return append(append(b, text...), '\n') }

// header returns the names and values of the header in turn.
func (a *cachedAnswer) header() []string {
	if a.bodyAt == 0 {
		return nil
	}
	return strings.Split(string(a.data[:a.bodyAt-1]), "\n")
}

// row returns the answer's row, but for the answer itself.
func (a *cachedAnswer) row() cacheRow {
	return cacheRow{id: a.key.id(), project: a.project, token: a.token, model: a.Model, endpoint: a.endpoint,
		storedAt: a.StoredAt, expiresAt: a.ExpiresAt, size: a.size()}
}

// encode returns the answer in the form that is sealed: the length of the metadata, the metadata, the body.
func (a *cachedAnswer) encode() ([]byte, error) {
	meta, err := json.Marshal(storedMeta{a.header(), &a.cachedMeta})
	if err != nil {
		return nil, fmt.Errorf("encoding a cached answer: %w", err)
	}
	out := make([]byte, 0, 4+len(meta)+len(a.body()))
	out = binary.BigEndian.AppendUint32(out, uint32(len(meta)))
	return append(append(out, meta...), a.body()...), nil
}

// decode reads what encode has made.
func (a *cachedAnswer) decode(b []byte) bool {
	if len(b) < 4 || uint64(binary.BigEndian.Uint32(b)) > uint64(len(b)-4) {
		return false
	}
	n := 4 + int(binary.BigEndian.Uint32(b))
	meta := storedMeta{cachedMeta: &a.cachedMeta}
	if json.Unmarshal(b[4:n], &meta) != nil || len(meta.Header)%2 != 0 {
		return false
	}
	for _, text := range meta.Header {
		a.data = appendHeaderLine(a.data, text)
	}
	a.bodyAt = len(a.data)
	a.data = append(a.data, b[n:]...)
	return true
}

// A memoryEntry is an answer in memory. The cache's mu guards all but the answer.
type memoryEntry struct {
	cachedAnswer
	links       [2]entryLinks
	waits       *entryList // of answers to be written, in which it is; nil: it is written, or never will be
	recordedUse int64      // time of the last use that is on disk, or on its way there
}

type entryLinks struct{ before, after *memoryEntry }

// An entryList is a list of answers in memory. An answer is in two at most: one of each kind.
type entryList struct {
	kind        int // which links it uses
	first, last *memoryEntry
}

const (
	listOfUses   = iota
	listOfWrites // that are to be made
)

func (l *entryList) addFirst(e *memoryEntry) {
	if e.links[l.kind] = (entryLinks{nil, l.first}); l.first != nil {
		l.first.links[l.kind].before = e
	} else {
		l.last = e
	}
	l.first = e
}

func (l *entryList) remove(e *memoryEntry) {
	n := e.links[l.kind]
	if n.before != nil {
		n.before.links[l.kind].after = n.after
	} else {
		l.first = n.after
	}
	if n.after != nil {
		n.after.links[l.kind].before = n.before
	} else {
		l.last = n.before
	}
	e.links[l.kind] = entryLinks{}
}

// The cache.

const (
	memoryCacheBytes  = 32 << 20  // of answers in memory
	maxCacheEntries   = 1_000_000 // on disk; memory has the id of each
	cacheBatchBytes   = 256 << 10 // of one transaction: the ledger waits for it
	cacheBatchEntries = 64
	cacheWriteDelay   = 100 * time.Millisecond
	cacheRestFactor   = 30 // the writer rests that many times as long as it has worked
	cacheMaxRest      = 10 * time.Second
	cacheIdleWrites   = time.Second // between batches of answers that were asked for once
	cachePurgePage    = 1000        // entries that a purge reads at a time
	cacheSweepEvery   = 10 * time.Second
	cacheReadTimeout  = 250 * time.Millisecond
	cacheTouchEvery   = 60_000 // milliseconds after which another use of an answer is recorded
	maxCacheTouches   = 4096
)

// cacheCounters count since the start of the program.
type cacheCounters struct {
	hits, misses, collapsed           atomic.Int64
	bypasses                          [len(bypassReasons)]atomic.Int64
	stored, written, evicted, dropped atomic.Int64 // dropped: the disk should have got them
	savedNanos, savedUS               atomic.Int64
	waiting                           atomic.Int64 // now, for identical calls
}

// A responseCache has the cached answers of all projects; newResponseCache makes one.
type responseCache struct {
	store    *store
	sealing  *contentKey
	salt     []byte
	log      *slog.Logger
	maxBytes int64 // on disk
	cacheCounters

	mu          sync.Mutex
	memory      map[int64]*memoryEntry // by the id of the key
	recent      entryList              // the same, most recently used first
	again       entryList              // those to be written because they were asked for again, the newest first
	once        entryList              // those to be written when there is time
	memoryBytes int64
	onDisk      map[int64]struct{} // ids that the table may have; nil while they are not known
	diskBytes   int64              // about
	uses        map[int64]int64    // id -> time of use, to be written

	purges  atomic.Int64  // an answer to a call that began before the last purge is not stored
	writing sync.Mutex    // of the table; taken before mu
	wake    chan struct{} // again has one
	failing atomic.Bool   // the last write failed
}

func newResponseCache(st *store, sealing *contentKey, log *slog.Logger, maxBytes int64) (*responseCache, error) {
	salt, err := sealing.derive("cache salt v1")
	if err != nil {
		return nil, err
	}
	return &responseCache{store: st, sealing: sealing, salt: salt, log: log, maxBytes: maxBytes,
		memory: map[int64]*memoryEntry{}, uses: map[int64]int64{},
		again: entryList{kind: listOfWrites}, once: entryList{kind: listOfWrites}, wake: make(chan struct{}, 1)}, nil
}

// lookup returns the answer of a key, nil if there is none.
func (c *responseCache) lookup(ctx context.Context, key *cacheKey, project, now int64) *cachedAnswer {
	purges := c.purges.Load()
	c.mu.Lock()
	a := c.fromMemory(key, now)
	_, maybe := c.onDisk[key.id()]
	maybe = maybe || c.onDisk == nil
	c.mu.Unlock()
	if a != nil || !maybe {
		return a
	}
	e := c.read(ctx, key, project, now)
	if e == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.purges.Load() != purges {
		return nil
	}
	c.addToMemory(e)
	return c.fromMemory(key, now)
}

// fromMemory returns an answer that is in memory, nil if there is none. An answer that was not written so far is
// written soon: it was asked for again. The caller has mu locked.
func (c *responseCache) fromMemory(key *cacheKey, now int64) *cachedAnswer {
	e := c.memory[key.id()]
	if e == nil || e.key != *key {
		return nil
	}
	if now >= e.ExpiresAt {
		c.removeFromMemory(e)
		return nil
	}
	c.recent.remove(e)
	c.recent.addFirst(e)
	switch {
	case e.waits == &c.once:
		c.toBeWritten(e, &c.again)
	case e.waits == nil && now-e.recordedUse >= cacheTouchEvery && len(c.uses) < maxCacheTouches:
		e.recordedUse = now
		c.uses[key.id()] = now
	}
	return &e.cachedAnswer
}

// addToMemory puts an answer in the place of an earlier one, and removes those used longest ago. The caller has mu
// locked.
func (c *responseCache) addToMemory(e *memoryEntry) {
	id := e.key.id()
	if old := c.memory[id]; old != nil {
		c.removeFromMemory(old)
	}
	c.memory[id] = e
	c.recent.addFirst(e)
	c.memoryBytes += e.size()
	for c.memoryBytes > memoryCacheBytes {
		last := c.recent.last
		if last.waits == &c.again {
			c.dropped.Add(1)
		}
		c.removeFromMemory(last)
	}
}

// removeFromMemory removes an answer, also from those to be written. The caller has mu locked.
func (c *responseCache) removeFromMemory(e *memoryEntry) {
	c.recent.remove(e)
	c.toBeWritten(e, nil)
	delete(c.memory, e.key.id())
	c.memoryBytes -= e.size()
}

// toBeWritten moves an answer to a list of those to be written, or with nil to none. The caller has mu locked.
func (c *responseCache) toBeWritten(e *memoryEntry, list *entryList) {
	if e.waits != nil {
		e.waits.remove(e)
	}
	if e.waits = list; list != nil {
		list.addFirst(e)
	}
	if list == &c.again {
		select {
		case c.wake <- struct{}{}:
		default:
		}
	}
}

// read returns an answer from the disk, nil if there is none that can be used.
func (c *responseCache) read(ctx context.Context, key *cacheKey, project, now int64) *memoryEntry {
	ctx, cancel := context.WithTimeout(ctx, cacheReadTimeout)
	defer cancel()
	token, sealed, err := c.store.cachedAnswer(ctx, key.id(), project, now)
	if err != nil {
		return nil
	}
	e := &memoryEntry{cachedAnswer: cachedAnswer{key: *key, project: project, token: token}}
	plain, err := c.sealing.openCached(key.context(project), sealed)
	if err != nil || !e.decode(plain) || now >= e.ExpiresAt {
		return nil
	}
	return e
}

// put stores an answer in memory, unless something was purged since purges was read. It is written at once if it takes
// the place of another, and otherwise when it is asked for again, or there is time.
func (c *responseCache) put(e *memoryEntry, purges int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.purges.Load() != purges {
		return
	}
	c.stored.Add(1)
	_, replaces := c.onDisk[e.key.id()]
	replaces = replaces || c.memory[e.key.id()] != nil
	e.recordedUse = e.StoredAt
	switch c.addToMemory(e); {
	case e.size() > c.maxBytes:
		c.dropped.Add(1)
	case replaces:
		c.toBeWritten(e, &c.again)
	default:
		c.toBeWritten(e, &c.once)
	}
}

// The disk.

// run brings answers to the disk, and deletes there what has expired or is too much, until ctx is done. Then it
// writes what is only in memory, the newest first, as far as it gets.
func (c *responseCache) run(ctx context.Context) {
	c.loadIDs(ctx)
	idle, sweep := time.NewTicker(cacheIdleWrites), time.NewTicker(cacheSweepEvery)
	defer idle.Stop()
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			c.writeAll(last)
			return
		case <-c.wake:
			rest(ctx, cacheWriteDelay) // for others
			for took := time.Nanosecond; took > 0 && ctx.Err() == nil; {
				took = c.writeOne(ctx, &c.again, false)
				rest(ctx, min(cacheRestFactor*took, cacheMaxRest))
			}
		case <-idle.C:
			c.writeOne(ctx, &c.once, false)
		case now := <-sweep.C:
			c.sweep(ctx, now.UnixMilli())
		}
	}
}

// writeAll writes what is only in memory, until ctx is done.
func (c *responseCache) writeAll(ctx context.Context) {
	for _, list := range [...]*entryList{&c.again, &c.once} {
		for ctx.Err() == nil && c.writeOne(ctx, list, true) > 0 {
		}
	}
}

// loadIDs reads which answers the table has, so that a call that has none asks no database.
func (c *responseCache) loadIDs(ctx context.Context) {
	ids, bytes, err := c.store.cachedIDs(ctx, maxCacheEntries)
	if err != nil {
		return // every lookup asks the database
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.onDisk, c.diskBytes = make(map[int64]struct{}, len(ids)), bytes
	for _, id := range ids {
		c.onDisk[id] = struct{}{}
	}
}

// rest waits for d, or until ctx is done.
func rest(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// writeOne writes a batch of the answers in list, the oldest or the newest first, and returns how long that took; 0:
// there were none.
func (c *responseCache) writeOne(ctx context.Context, list *entryList, newestFirst bool) (took time.Duration) {
	c.writing.Lock()
	start := time.Now()
	n, err := c.writeBatch(ctx, list, newestFirst)
	if n > 0 {
		took = max(time.Since(start), 1)
	}
	c.writing.Unlock()
	if err != nil && !c.failing.Swap(true) {
		c.log.Warn("answers could not be cached on disk", "error", err)
	} else if err == nil && n > 0 {
		c.failing.Store(false)
	}
	c.mu.Lock()
	tooMuch := c.diskBytes > c.maxBytes || len(c.onDisk) > maxCacheEntries
	c.mu.Unlock()
	if tooMuch {
		c.evict(ctx)
	}
	return took
}

// takeBatch takes answers from list, which the caller writes in one transaction: it is short enough for the ledger to
// wait for it. Answers that have expired are not written.
func (c *responseCache) takeBatch(list *entryList, newestFirst bool) (batch []*memoryEntry, bytes int64) {
	now := time.Now().UnixMilli()
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(batch) < cacheBatchEntries {
		e := list.last
		if newestFirst {
			e = list.first
		}
		if e == nil || bytes > 0 && bytes+e.size() > cacheBatchBytes {
			break
		}
		if c.toBeWritten(e, nil); now < e.ExpiresAt {
			batch, bytes = append(batch, e), bytes+e.size()
			e.recordedUse = now
		}
	}
	return batch, bytes
}

// writeBatch writes answers of list in one transaction, and returns how many it took. The caller has writing locked.
func (c *responseCache) writeBatch(ctx context.Context, list *entryList, newestFirst bool) (taken int, err error) {
	batch, bytes := c.takeBatch(list, newestFirst)
	if len(batch) == 0 {
		return 0, nil
	}
	rows, err := c.seal(batch)
	if err == nil {
		err = c.store.addCached(ctx, rows)
	}
	if err != nil {
		c.dropped.Add(int64(len(batch)))
		return len(batch), err
	}
	c.written.Add(int64(len(rows)))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.diskBytes += bytes
	for i := 0; i < len(rows) && c.onDisk != nil; i++ {
		c.onDisk[rows[i].id] = struct{}{}
	}
	return len(batch), nil
}

// seal returns the rows of answers.
func (c *responseCache) seal(batch []*memoryEntry) (rows []cacheRow, err error) {
	for _, e := range batch {
		row, plain := e.row(), []byte(nil)
		if plain, err = e.encode(); err == nil {
			row.answer, err = c.sealing.sealCached(e.key.context(e.project), plain)
		}
		if row.usedAt = time.Now().UnixMilli(); err != nil {
			return nil, err
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// evict deletes the answers that were used longest ago until the table is a twentieth below its limits.
func (c *responseCache) evict(ctx context.Context) {
	c.writeUses(ctx)
	entries, bytes, err := c.store.cacheSize(ctx, 0)
	for err == nil && entries > 0 {
		tooMany := entries - (maxCacheEntries - maxCacheEntries/20)
		if over := bytes - (c.maxBytes - c.maxBytes/20); over > 0 {
			tooMany = max(tooMany, over/(bytes/entries), 1) // if they are of a middle size
		}
		if tooMany <= 0 {
			break
		}
		var ids []int64
		var freed int64
		if ids, freed, err = c.store.deleteOldestCached(ctx, int(min(tooMany, cacheBatchEntries))); len(ids) == 0 {
			break
		}
		entries, bytes = entries-int64(len(ids)), bytes-freed
		c.evicted.Add(int64(len(ids)))
		c.forget(ids)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		c.diskBytes = bytes
	}
}

// forget removes ids from those that the table may have.
func (c *responseCache) forget(ids []int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range ids {
		delete(c.onDisk, id)
	}
}

// sweep deletes what has expired, and records which answers were used.
func (c *responseCache) sweep(ctx context.Context, now int64) {
	c.writeUses(ctx)
	for range 100 {
		ids, bytes, err := c.store.deleteExpiredCached(ctx, now, cacheBatchEntries)
		if err != nil || len(ids) == 0 {
			return
		}
		c.forget(ids)
		c.mu.Lock()
		c.diskBytes -= bytes
		c.mu.Unlock()
	}
}

func (c *responseCache) writeUses(ctx context.Context) {
	c.mu.Lock()
	uses := c.uses
	c.uses = map[int64]int64{}
	c.mu.Unlock()
	if len(uses) > 0 {
		_ = c.store.touchCached(ctx, uses) // otherwise they are deleted earlier than others
	}
}

// purge deletes the answers that f describes, in memory and on disk, and returns how many. An answer that a running
// call gets is not stored. Also if the disk fails, memory has none of them afterwards.
func (c *responseCache) purge(ctx context.Context, f cacheFilter) (int64, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	deleted := map[int64]struct{}{}
	c.mu.Lock()
	c.purges.Add(1)
	for id, e := range c.memory {
		if row := e.row(); f.matches(&row) {
			deleted[id] = struct{}{}
			c.removeFromMemory(e)
		}
	}
	c.mu.Unlock()
	err := c.purgeDisk(ctx, f, deleted)
	return int64(len(deleted)), err
}

// purgeDisk deletes the answers that f describes on disk, and adds their ids to deleted. It looks for them where
// nobody waits, and deletes few at a time: calls can be recorded in between. The caller has writing locked.
func (c *responseCache) purgeDisk(ctx context.Context, f cacheFilter, deleted map[int64]struct{}) error {
	after := cachePosition{token: f.token, size: -1}
	if f.token == anyToken {
		after.token = 1
	}
	for {
		rows, err := c.store.cachedAfter(ctx, f.project, after, cachePurgePage)
		if err != nil {
			return err
		}
		var ids []int64
		for i := range rows {
			r := &rows[i]
			if after = (cachePosition{r.token, r.size, r.id}); f.matches(r) {
				ids = append(ids, r.id)
			}
		}
		for batch := range slices.Chunk(ids, cacheBatchEntries) {
			gone, bytes, err := c.store.deleteCached(ctx, batch)
			if err != nil {
				return err
			}
			for _, id := range gone {
				deleted[id] = struct{}{}
			}
			c.forget(gone)
			c.mu.Lock()
			c.diskBytes -= bytes
			c.mu.Unlock()
			time.Sleep(time.Millisecond)
		}
		if len(rows) < cachePurgePage || f.token > 0 && after.token > f.token {
			return nil
		}
	}
}

// purgeUnreachable purges answers that no call can get any more. What the disk keeps because of a failure expires.
func (c *responseCache) purgeUnreachable(ctx context.Context, f cacheFilter) {
	if _, err := c.purge(context.WithoutCancel(ctx), f); err != nil {
		c.log.Warn("cached answers could not be deleted", "error", err)
	}
}

// usage returns what is cached of a project, by model, the largest share first.
func (c *responseCache) usage(ctx context.Context, project, now int64) ([]*cacheUsage, error) {
	c.writing.Lock() // an answer that is being written is either in memory only or on disk
	defer c.writing.Unlock()
	onDisk, err := c.store.cacheUsage(ctx, project, now)
	models := c.memoryUsage(project, now)
	for _, u := range onDisk {
		if m := models[u.model]; m != nil {
			u.entries, u.bytes = u.entries+m.entries, u.bytes+m.bytes
			u.oldestStoredAt = min(u.oldestStoredAt, m.oldestStoredAt)
		}
		models[u.model] = &u
	}
	all := slices.SortedFunc(maps.Values(models), func(a, b *cacheUsage) int {
		return cmp.Or(cmp.Compare(b.bytes, a.bytes), cmp.Compare(a.model, b.model))
	})
	return all[:min(len(all), maxCacheModels)], err
}

// usageSum is usage without the models. It is faster.
func (c *responseCache) usageSum(ctx context.Context, project, now int64) (entries, bytes int64, err error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if entries, bytes, err = c.store.cacheSize(ctx, project); err != nil {
		return 0, 0, err
	}
	for _, u := range c.memoryUsage(project, now) {
		entries, bytes = entries+u.entries, bytes+u.bytes
	}
	return entries, bytes, nil
}

// memoryUsage returns what is only in memory of a project, by model.
func (c *responseCache) memoryUsage(project, now int64) map[string]*cacheUsage {
	models := map[string]*cacheUsage{}
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, e := range c.memory {
		_, onDisk := c.onDisk[id]
		if e.project != project || now >= e.ExpiresAt || onDisk || e.waits == nil && c.onDisk == nil {
			continue
		}
		u := getOrInsert(models, e.Model)
		if u.model = e.Model; u.entries == 0 || e.StoredAt < u.oldestStoredAt {
			u.oldestStoredAt = e.StoredAt
		}
		u.entries, u.bytes = u.entries+1, u.bytes+e.size()
	}
	return models
}
