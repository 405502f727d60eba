// This file is the response cache: the answers in memory, and the writer that brings answers to the disk, those first
// that were asked for again. policy.go decides which calls it covers, upstream_affinity.go makes the key, and
// proxy_cache.go asks for answers and brings them. It knows no HTTP and has no SQL, and secrets.go seals what it
// stores. A cache that fails is a miss, never an error.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Answers.

// A cachedAnswer is a complete answer. It never changes.
type cachedAnswer struct {
	answerHead
	endpoint, model string // the endpoint's pattern, and the model that answered
	data            []byte // a line for each name and each value of the header, in turn, and then the body
}

// An answerHead is the part of an answer that has no pointers.
type answerHead struct {
	key            cacheKey
	project, token int64 // token is 0 if the tokens of the project share the answer
	cachedMeta
	bodyAt int // where in data the body begins
}

// cachedMeta is what is stored of an answer beside its header and its body.
type cachedMeta struct {
	Stream    bool
	Cost      int64 // of the call to the provider, in nano-dollars; 0 if it is not known
	TotalUS   int64 // how long that call took
	StoredAt  int64 // unix milliseconds
	ExpiresAt int64
}

// storedMeta is cachedMeta with the header and the model.
type storedMeta struct {
	Header []string // names and values in turn
	Model  string
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
	return cacheRow{id: a.key.id(), project: a.project, token: a.token, model: a.model, endpoint: a.endpoint,
		storedAt: a.StoredAt, expiresAt: a.ExpiresAt, size: a.size()}
}

// encode returns the answer in the form that is sealed: the length of the metadata, the metadata, the body.
func (a *cachedAnswer) encode() ([]byte, error) {
	meta, err := json.Marshal(storedMeta{a.header(), a.model, &a.cachedMeta})
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
	a.model = meta.Model
	for _, text := range meta.Header {
		a.data = appendHeaderLine(a.data, text)
	}
	a.bodyAt = len(a.data)
	a.data = append(a.data, b[n:]...)
	return true
}

// Answers in memory.

// A memoryEntry is what the cache knows of an answer in memory. It has no pointers: there are many, and the garbage
// collector would look at each of them. The cache's mu guards it.
type memoryEntry struct {
	answerHead
	at, end         int    // of its data in the chunk
	endpoint, model uint16 // their indexes in the names of the chunk
	waits           writeState
	gone            bool
	recordedUse     int64 // time of the last use that is on disk, or on its way there
}

// size returns the bytes that count of an answer.
func (e *memoryEntry) size() int64 { return int64(e.end-e.at-e.bodyAt) + entryOverhead }

// A writeState says whether an answer waits to be written.
type writeState uint8

const (
	notToWrite writeState = iota // it is written, or never will be
	writeAgain                   // soon, because it was asked for again
	writeOnce                    // when there is time, because it was asked for once
	writeStates
)

// A memoryChunk has answers that came one after the other. They leave memory together, so no free space has to be
// managed between them. Its bytes never change: an answer that was handed out stays what it is, even after it was
// removed. Only the space of a chunk of which no answer was handed out is used again.
type memoryChunk struct {
	number  uint32        // one more than that of the chunk before
	bytes   []byte        // the data of the answers
	entries []memoryEntry // never moves
	names   []string      // of endpoints and models
	live    int           // entries that are not gone
	lent    bool          // somebody outside may have the data of an answer
	waiting [writeStates]int
	charge  int64 // the bytes that it counts as
}

const (
	memoryChunkBytes   = 256 << 10
	memoryChunkEntries = memoryChunkBytes / entryOverhead
	memoryEntryBytes   = 128      // about
	largeAnswerBytes   = 64 << 10 // a larger answer has a chunk of its own
)

// newMemoryChunk returns a chunk with space for answers; if data is not nil, for the one answer that it is.
func newMemoryChunk(data []byte) *memoryChunk {
	m := &memoryChunk{bytes: data, entries: make([]memoryEntry, 0, 1)}
	if data == nil {
		m.bytes, m.entries = make([]byte, 0, memoryChunkBytes), make([]memoryEntry, 0, memoryChunkEntries)
	}
	m.charge = int64(cap(m.bytes) + cap(m.entries)*memoryEntryBytes)
	return m
}

// chunkOfOwn returns a chunk for a large answer, nil for a small one.
func (a *cachedAnswer) chunkOfOwn() *memoryChunk {
	switch n := len(a.data); {
	case n <= largeAnswerBytes:
		return nil
	case cap(a.data)-n > n/8: // it came without a length
		return newMemoryChunk(bytes.Clone(a.data))
	default:
		return newMemoryChunk(a.data)
	}
}

// add adds an answer, for which there is space. A chunk for a single answer has its bytes already.
func (m *memoryChunk) add(a *cachedAnswer) *memoryEntry {
	at := 0
	if cap(m.entries) > 1 {
		at = len(m.bytes)
		m.bytes = append(m.bytes, a.data...)
	}
	m.entries = append(m.entries, memoryEntry{answerHead: a.answerHead, at: at, end: at + len(a.data),
		endpoint: m.nameIndex(a.endpoint), model: m.nameIndex(a.model)})
	m.live++
	return &m.entries[len(m.entries)-1]
}

func (m *memoryChunk) nameIndex(name string) uint16 {
	i := slices.Index(m.names, name)
	if i < 0 {
		i = len(m.names)
		m.names = append(m.names, strings.Clone(name))
	}
	return uint16(i) // two for each entry at most
}

// answer returns an answer, which the caller may keep: the space of its chunk is not used again.
func (m *memoryChunk) answer(e *memoryEntry) cachedAnswer {
	m.lent = true
	return cachedAnswer{answerHead: e.answerHead, endpoint: m.names[e.endpoint], model: m.names[e.model],
		data: m.bytes[e.at:e.end:e.end]}
}

// all returns the entries of the answers that are not gone.
func (m *memoryChunk) all() iter.Seq[*memoryEntry] {
	entries := m.entries
	return func(yield func(*memoryEntry) bool) {
		for i := range entries {
			if e := &entries[i]; !e.gone && !yield(e) {
				return
			}
		}
	}
}

// setWaits says whether an answer waits to be written.
func (m *memoryChunk) setWaits(e *memoryEntry, state writeState) {
	m.waiting[e.waits]--
	m.waiting[state]++
	e.waits = state
}

// reused returns a chunk that has the space of one whose answers are no longer in memory, nil if somebody may have
// them. It saves that new memory is cleared and old memory collected.
func (m *memoryChunk) reused() *memoryChunk {
	if m.lent || cap(m.bytes) != memoryChunkBytes || cap(m.entries) != memoryChunkEntries {
		return nil
	}
	return &memoryChunk{bytes: m.bytes[:0], entries: m.entries[:0], charge: m.charge}
}

// erase frees what the chunk has of answers that are gone, and keeps the others.
func (m *memoryChunk) erase() {
	kept := make([]byte, 0, cap(m.bytes))
	for e := range m.all() {
		kept = append(kept, m.bytes[e.at:e.end]...)
		e.at, e.end = len(kept)-(e.end-e.at), len(kept)
	}
	m.bytes = kept
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

// A memoryIndex finds answers in memory by the ids of their keys, which are hashes already: an open hash table with
// linear probing. Its size is fixed, so no call pays for its growth, and a miss costs one access to memory outside the
// processor's caches; in a map it costs several.
type memoryIndex struct {
	places *[memoryIndexSize]memoryPlace // nil as long as there were no answers
	count  int
}

// A memoryPlace is where an answer in memory is. The zero value is no place.
type memoryPlace struct {
	id    uint32 // the low half of its id, which says where in the index the search for it begins
	chunk uint16 // the low half of the chunk's number
	entry uint16 // one more than the index of its entry there
}

// memoryIndexSize is more than twice as many answers as memory can have.
const memoryIndexSize = 1 << 16

// find returns the slot of an answer, -1 if there is none. matches tells it from others with the same low half.
func (x *memoryIndex) find(id int64, matches func(memoryPlace) bool) int {
	if x.count == 0 {
		return -1
	}
	for i := uint32(id) % memoryIndexSize; ; i = (i + 1) % memoryIndexSize {
		switch p := x.places[i]; {
		case p.entry == 0:
			return -1
		case p.id == uint32(id) && matches(p):
			return int(i)
		}
	}
}

// add adds an answer that the index does not have.
func (x *memoryIndex) add(p memoryPlace) {
	if x.places == nil {
		x.places = new([memoryIndexSize]memoryPlace)
	}
	i := p.id % memoryIndexSize
	for x.places[i].entry != 0 {
		i = (i + 1) % memoryIndexSize
	}
	x.places[i] = p
	x.count++
}

// remove empties a slot. Those behind it that would not be found any more move forward.
func (x *memoryIndex) remove(slot int) {
	free := uint32(slot)
	for i := (free + 1) % memoryIndexSize; x.places[i].entry != 0; i = (i + 1) % memoryIndexSize {
		if begin := x.places[i].id % memoryIndexSize; (i-begin)%memoryIndexSize >= (i-free)%memoryIndexSize {
			x.places[free] = x.places[i]
			free = i
		}
	}
	x.places[free] = memoryPlace{}
	x.count--
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
	memory      memoryIndex        // of what is in the chunks
	chunks      []*memoryChunk     // the oldest first; their numbers are consecutive, and may wrap
	open        *memoryChunk       // the one that takes answers; nil: none does
	spare       *memoryChunk       // to be used next; may be nil
	chunkBytes  int64              // what the chunks count as
	memoryBytes int64              // of the answers in memory
	onDisk      map[int64]struct{} // ids that the table may have; nil while they are not known
	diskBytes   int64              // about
	uses        map[int64]int64    // id -> time of use, to be written

	purges  atomic.Int64  // an answer to a call that began before the last purge is not stored
	writing sync.Mutex    // of the table; taken before mu
	wake    chan struct{} // an answer is to be written soon
	failing atomic.Bool   // the last write failed
}

func newResponseCache(st *store, sealing *contentKey, log *slog.Logger, maxBytes int64) (*responseCache, error) {
	salt, err := sealing.derive("cache salt v1")
	if err != nil {
		return nil, err
	}
	return &responseCache{store: st, sealing: sealing, salt: salt, log: log, maxBytes: maxBytes,
		uses: map[int64]int64{}, wake: make(chan struct{}, 1)}, nil
}

// inMemory returns the chunk and the entry of an answer, nil if it is not in memory. The caller has mu locked.
func (c *responseCache) inMemory(id int64) (*memoryChunk, *memoryEntry) {
	slot := c.memory.find(id, func(p memoryPlace) bool { return c.at(p).key.id() == id })
	if slot < 0 {
		return nil, nil
	}
	p := c.memory.places[slot]
	return c.chunkOf(p), c.at(p)
}

// chunkOf returns the chunk of a place. The caller has mu locked.
func (c *responseCache) chunkOf(p memoryPlace) *memoryChunk {
	return c.chunks[p.chunk-uint16(c.chunks[0].number)] // there are fewer than 1 << 16
}

func (c *responseCache) at(p memoryPlace) *memoryEntry { return &c.chunkOf(p).entries[p.entry-1] }

// fromMemory returns an answer that is in memory, nil if there is none. An answer that was not written so far is
// written soon: it was asked for again. The caller has mu locked.
func (c *responseCache) fromMemory(key *cacheKey, now int64) *cachedAnswer {
	m, e := c.inMemory(key.id())
	if e == nil || e.key != *key {
		return nil
	}
	if now >= e.ExpiresAt {
		c.removeFromMemory(m, e)
		return nil
	}
	switch {
	case e.waits == writeOnce:
		c.writeSoon(m, e)
	case e.waits == notToWrite && now-e.recordedUse >= cacheTouchEvery && len(c.uses) < maxCacheTouches:
		e.recordedUse = now
		c.uses[key.id()] = now
	}
	a := m.answer(e)
	if c.chunkBytes > memoryCacheBytes/2 && int(m.number-c.chunks[0].number) < len(c.chunks)/2 {
		old := *e // it would leave memory soon, although it is used
		m, e = c.addToMemory(&a, a.chunkOfOwn())
		m.setWaits(e, old.waits)
		e.recordedUse = old.recordedUse
	}
	return &a
}

// addToMemory puts an answer in the place of an earlier one, and removes those that came longest ago and were not used
// since. own is its chunkOfOwn. The caller has mu locked.
func (c *responseCache) addToMemory(a *cachedAnswer, own *memoryChunk) (*memoryChunk, *memoryEntry) {
	id := a.key.id()
	if m, old := c.inMemory(id); old != nil {
		c.removeFromMemory(m, old)
	}
	m := cmp.Or(own, c.open)
	if m == nil || own == nil && (len(m.entries) == cap(m.entries) || len(m.bytes)+len(a.data) > cap(m.bytes)) {
		if m, c.spare = c.spare, nil; m == nil {
			m = newMemoryChunk(nil)
		}
		c.open = m
	}
	if len(m.entries) == 0 {
		c.addChunk(m)
	}
	e := m.add(a)
	c.memory.add(memoryPlace{uint32(id), uint16(m.number), uint16(len(m.entries))})
	c.memoryBytes += e.size()
	return m, e
}

// addChunk adds a chunk, and removes the oldest ones as long as there are too many. The caller has mu locked.
func (c *responseCache) addChunk(m *memoryChunk) {
	if n := len(c.chunks); n > 0 {
		m.number = c.chunks[n-1].number + 1
	}
	c.chunks = append(c.chunks, m)
	for c.chunkBytes += m.charge; c.chunkBytes > memoryCacheBytes && len(c.chunks) > 1; {
		oldest := c.chunks[0]
		c.spare = cmp.Or(oldest.reused(), c.spare)
		for e := range oldest.all() {
			if e.waits == writeAgain {
				c.dropped.Add(1)
			}
			c.removeFromMemory(oldest, e)
		}
		if c.open == oldest {
			c.open = nil
		}
		c.chunks = slices.Delete(c.chunks, 0, 1)
		c.chunkBytes -= oldest.charge
	}
}

// removeFromMemory removes an answer, also from those to be written. The caller has mu locked.
func (c *responseCache) removeFromMemory(m *memoryChunk, e *memoryEntry) {
	m.setWaits(e, notToWrite)
	e.gone = true
	c.memory.remove(c.memory.find(e.key.id(), func(p memoryPlace) bool { return c.at(p) == e }))
	c.memoryBytes -= e.size()
	if m.live--; m.live == 0 && m != c.open {
		c.chunkBytes += entryOverhead - m.charge // its place remains, and so it counts something
		m.bytes, m.entries, m.names, m.charge = nil, nil, nil, entryOverhead
	}
}

// writeSoon has an answer written that was asked for again. The caller has mu locked.
func (c *responseCache) writeSoon(m *memoryChunk, e *memoryEntry) {
	m.setWaits(e, writeAgain)
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// The disk.

// run brings answers to the disk, and deletes there what has expired or is too much, until ctx is done. Then it ends
// the write that it has begun, and writes what is only in memory, the newest first, as far as it gets in two seconds.
func (c *responseCache) run(ctx context.Context) {
	writing, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(2*time.Second, stop) })()
	c.loadIDs(ctx)
	idle, sweep := time.NewTicker(cacheIdleWrites), time.NewTicker(cacheSweepEvery)
	defer idle.Stop()
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			c.writeAll(writing)
			return
		case <-c.wake:
			rest(ctx, cacheWriteDelay) // for others
			for took := time.Nanosecond; took > 0 && ctx.Err() == nil; {
				took = c.writeOne(writing, writeAgain, false)
				rest(ctx, min(cacheRestFactor*took, cacheMaxRest))
			}
		case <-idle.C:
			c.writeOne(writing, writeOnce, false)
		case now := <-sweep.C:
			c.sweep(ctx, now.UnixMilli())
		}
	}
}

// writeAll writes what is only in memory, until ctx is done.
func (c *responseCache) writeAll(ctx context.Context) {
	for _, state := range [...]writeState{writeAgain, writeOnce} {
		for ctx.Err() == nil && c.writeOne(ctx, state, true) > 0 {
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

// writeOne writes a batch of the answers in a state, the oldest or the newest first, and returns how long that took;
// 0: there were none.
func (c *responseCache) writeOne(ctx context.Context, state writeState, newestFirst bool) (took time.Duration) {
	c.writing.Lock()
	start := time.Now()
	n, err := c.writeBatch(ctx, state, newestFirst)
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

// takeBatch takes answers in a state, which the caller writes in one transaction: it is short enough for the ledger to
// wait for it. Answers that have expired are not written.
func (c *responseCache) takeBatch(state writeState, newestFirst bool) (batch []cachedAnswer, bytes int64) {
	now := time.Now().UnixMilli()
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.chunks {
		m := c.chunks[i]
		if newestFirst {
			m = c.chunks[len(c.chunks)-1-i]
		}
		for j := 0; j < len(m.entries) && m.waiting[state] > 0; j++ {
			e := &m.entries[j]
			if newestFirst {
				e = &m.entries[len(m.entries)-1-j]
			}
			if e.waits != state {
				continue
			}
			if len(batch) == cacheBatchEntries || bytes > 0 && bytes+e.size() > cacheBatchBytes {
				return batch, bytes
			}
			if m.setWaits(e, notToWrite); now < e.ExpiresAt {
				batch, bytes = append(batch, m.answer(e)), bytes+e.size()
				e.recordedUse = now
			}
		}
	}
	return batch, bytes
}

// writeBatch writes answers in a state in one transaction, and returns how many it took. The caller has writing locked.
func (c *responseCache) writeBatch(ctx context.Context, state writeState, newestFirst bool) (taken int, err error) {
	batch, bytes := c.takeBatch(state, newestFirst)
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
func (c *responseCache) seal(batch []cachedAnswer) (rows []cacheRow, err error) {
	for i := range batch {
		a := &batch[i]
		row, plain := a.row(), []byte(nil)
		if plain, err = a.encode(); err == nil {
			row.answer, err = c.sealing.sealCached(a.key.context(a.project), plain)
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
