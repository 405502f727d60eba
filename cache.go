// This file is the response cache: the key of an answer, the answers in memory, the flights on which identical calls
// wait, and the writer that brings answers to the disk. policy.go decides which calls it covers, proxy_cache.go asks
// it. It knows no HTTP and has no SQL, and content.go seals what it stores. A cache that fails is a miss, never an
// error.
package main

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
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
	project, token int64 // token is 0 if the tokens of the project share the answer
	cachedMeta
	body []byte
}

// cachedMeta is what is stored of an answer beside its body.
type cachedMeta struct {
	Header    []string // names and values in turn
	Stream    bool
	Model     string // that answered
	Cost      int64  // of the call to the provider, in nano-dollars; 0 if it is not known
	TotalUS   int64  // how long that call took
	StoredAt  int64  // unix milliseconds
	ExpiresAt int64
}

const entryOverhead = 1 << 10 // bytes that an answer takes beside its body, on disk and in memory

func (a *cachedAnswer) size() int64 { return int64(len(a.body)) + entryOverhead }

// age returns the seconds since the answer came.
func (a *cachedAnswer) age(now int64) int64 { return max(0, now-a.StoredAt) / 1000 }

// encode returns the answer in the form that is sealed: the length of the metadata, the metadata, the body.
func (a *cachedAnswer) encode() ([]byte, error) {
	meta, err := json.Marshal(&a.cachedMeta)
	if err != nil {
		return nil, fmt.Errorf("encoding a cached answer: %w", err)
	}
	out := make([]byte, 0, 4+len(meta)+len(a.body))
	out = binary.BigEndian.AppendUint32(out, uint32(len(meta)))
	return append(append(out, meta...), a.body...), nil
}

// decode reads what encode has made.
func (a *cachedAnswer) decode(b []byte) bool {
	if len(b) < 4 || uint64(binary.BigEndian.Uint32(b)) > uint64(len(b)-4) {
		return false
	}
	n := 4 + int(binary.BigEndian.Uint32(b))
	a.body = b[n:]
	return json.Unmarshal(b[4:n], &a.cachedMeta) == nil && len(a.Header)%2 == 0
}

// The cache.

const (
	memoryCacheBytes  = 32 << 20  // of answers in memory
	maxQueuedBytes    = 16 << 20  // of answers that wait to be written; what does not fit stays in memory only
	maxCacheEntries   = 1_000_000 // on disk; memory has the id of each
	cacheBatchBytes   = 256 << 10 // of one transaction: the ledger waits for it
	cacheBatchEntries = 64
	cacheWriteDelay   = 100 * time.Millisecond
	cacheRestFactor   = 30   // the writer rests that many times as long as it has worked
	cachePurgePage    = 1000 // entries that a purge reads at a time
	cacheSweepEvery   = 10 * time.Second
	cacheReadTimeout  = 250 * time.Millisecond
	cacheTouchEvery   = 60_000 // milliseconds after which another use of an answer is recorded
	maxCacheTouches   = 4096
	maxFlightWait     = 2 * time.Minute
	maxFlightWaiting  = 1000 // calls that wait for one flight
)

// cacheCounters count since the start of the program.
type cacheCounters struct {
	hits, misses, collapsed           atomic.Int64
	bypasses                          [len(bypassReasons)]atomic.Int64
	stored, written, evicted, dropped atomic.Int64 // dropped: not written, because the queue was full or a write failed
	savedNanos, savedUS               atomic.Int64
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
	memory      map[cacheKey]*list.Element // of *memoryEntry
	recent      list.List                  // the same, most recently used first
	memoryBytes int64
	onDisk      map[int64]struct{} // ids that the table may have; nil while they are not known
	diskBytes   int64              // about
	flights     map[cacheKey]*flight
	queue       []*cachedAnswer // to be written
	queueBytes  int64
	uses        map[int64]int64 // id -> time of use, to be written

	purges  atomic.Int64  // an answer to a call that began before the last purge is not stored
	writing sync.Mutex    // of the table; taken before mu
	wake    chan struct{} // something is queued
	failing atomic.Bool   // the last write failed
	closing bool          // the writer's own: it does not rest any more
}

func newResponseCache(st *store, sealing *contentKey, log *slog.Logger, maxBytes int64) (*responseCache, error) {
	salt, err := sealing.derive("cache salt v1")
	if err != nil {
		return nil, err
	}
	return &responseCache{store: st, sealing: sealing, salt: salt, log: log, maxBytes: maxBytes,
		memory: map[cacheKey]*list.Element{}, flights: map[cacheKey]*flight{}, uses: map[int64]int64{},
		wake: make(chan struct{}, 1)}, nil
}

// A memoryEntry is an answer in memory.
type memoryEntry struct {
	*cachedAnswer
	recordedUse int64 // time of the last use that is on disk, or on its way there
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
	if a = c.read(ctx, key, project, now); a == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.purges.Load() != purges {
		return nil
	}
	c.addToMemory(a, 0)
	return c.fromMemory(key, now)
}

// fromMemory returns an answer that is in memory, nil if there is none. The caller has mu locked.
func (c *responseCache) fromMemory(key *cacheKey, now int64) *cachedAnswer {
	e := c.memory[*key]
	if e == nil {
		return nil
	}
	m := e.Value.(*memoryEntry)
	if now >= m.ExpiresAt {
		c.removeFromMemory(e)
		return nil
	}
	c.recent.MoveToFront(e)
	if now-m.recordedUse >= cacheTouchEvery && len(c.uses) < maxCacheTouches {
		m.recordedUse = now
		c.uses[key.id()] = now
	}
	return m.cachedAnswer
}

// addToMemory puts an answer in the place of an earlier one, and removes those used longest ago. The caller has mu
// locked.
func (c *responseCache) addToMemory(a *cachedAnswer, recordedUse int64) {
	if e := c.memory[a.key]; e != nil {
		c.removeFromMemory(e)
	}
	c.memory[a.key] = c.recent.PushFront(&memoryEntry{a, recordedUse})
	c.memoryBytes += a.size()
	for c.memoryBytes > memoryCacheBytes {
		c.removeFromMemory(c.recent.Back())
	}
}

func (c *responseCache) removeFromMemory(e *list.Element) {
	a := c.recent.Remove(e).(*memoryEntry)
	delete(c.memory, a.key)
	c.memoryBytes -= a.size()
}

// read returns an answer from the disk, nil if there is none that can be used.
func (c *responseCache) read(ctx context.Context, key *cacheKey, project, now int64) *cachedAnswer {
	ctx, cancel := context.WithTimeout(ctx, cacheReadTimeout)
	defer cancel()
	token, sealed, err := c.store.cachedAnswer(ctx, key.id(), project, now)
	if err != nil {
		return nil
	}
	a := &cachedAnswer{key: *key, project: project, token: token}
	plain, err := c.sealing.openCached(key.context(project), sealed)
	if err != nil || !a.decode(plain) || now >= a.ExpiresAt {
		return nil
	}
	return a
}

// put stores an answer, unless something was purged since purges was read. The writer brings it to the disk.
func (c *responseCache) put(a *cachedAnswer, purges int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.purges.Load() != purges {
		return
	}
	c.stored.Add(1)
	c.addToMemory(a, a.StoredAt)
	if c.queueBytes+a.size() > maxQueuedBytes || a.size() > c.maxBytes {
		c.dropped.Add(1)
		return
	}
	c.queue = append(c.queue, a)
	c.queueBytes += a.size()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Flights.

// A flight is one call to a provider on which identical calls wait. The cache's mu guards it.
type flight struct {
	key     cacheKey
	done    chan struct{} // nil: nobody waits, or has waited
	answer  *cachedAnswer // once done is closed; nil: there is none to share
	ended   bool
	waiting int
	abandon func() // ends the leader's call when nobody waits any more; nil while its client is there
}

// A flightLead is a call's part in the flight that it leads. The cache's mu guards it.
type flightLead struct {
	flight     *flight // nil: the call leads none
	clientLeft bool
}

// join returns the answer of key, if it has come meanwhile; or else the flight to wait for, which the caller must
// leave; or neither, and then the caller leads a new flight and must end it. alone means that the flight has as many
// calls as it may have, and that the caller goes without one.
func (c *responseCache) join(key *cacheKey, lead *flightLead, now int64) (a *cachedAnswer, f *flight, alone bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.fromMemory(key, now); a != nil {
		return a, nil, false
	}
	if f := c.flights[*key]; f != nil {
		if f.waiting >= maxFlightWaiting {
			return nil, nil, true
		}
		if f.waiting++; f.done == nil {
			f.done = make(chan struct{})
		}
		return nil, f, false
	}
	lead.flight = &flight{key: *key}
	c.flights[*key] = lead.flight
	return nil, nil, false
}

// leave is called by a call that waits no longer.
func (c *responseCache) leave(f *flight) {
	c.mu.Lock()
	f.waiting--
	var abandon func()
	if f.waiting == 0 && !f.ended {
		if abandon = f.abandon; abandon != nil {
			c.removeFlight(f)
		}
	}
	c.mu.Unlock()
	if abandon != nil {
		abandon()
	}
}

// end ends the flight that lead leads, if any, and gives answer to those who wait; nil: they go on by themselves.
func (c *responseCache) end(lead *flightLead, answer *cachedAnswer) {
	c.mu.Lock()
	f := lead.flight
	lead.flight = nil
	if f == nil {
		c.mu.Unlock()
		return
	}
	f.ended, f.answer = true, answer
	c.removeFlight(f)
	abandon := f.abandon
	if f.done != nil {
		close(f.done)
	}
	c.mu.Unlock()
	if abandon != nil {
		abandon()
	}
}

// removeFlight lets the next call with the flight's key lead another. The caller has mu locked.
func (c *responseCache) removeFlight(f *flight) {
	if c.flights[f.key] == f {
		delete(c.flights, f.key)
	}
}

// clientLeft calls abandon, which ends a call whose client has left: at once, or when nobody waits for it any more.
func (c *responseCache) clientLeft(lead *flightLead, abandon func()) {
	c.mu.Lock()
	lead.clientLeft = true
	f := lead.flight
	if f != nil && f.waiting > 0 {
		f.abandon = abandon
		c.mu.Unlock()
		return
	}
	if f != nil {
		c.removeFlight(f)
	}
	c.mu.Unlock()
	abandon()
}

// isAwaited reports whether calls wait for the call that leads.
func (c *responseCache) isAwaited(lead *flightLead) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return lead.flight != nil && lead.flight.waiting > 0
}

// The disk.

// run brings answers to the disk, and deletes there what has expired or is too much, until ctx is done. Then it
// writes what is queued.
func (c *responseCache) run(ctx context.Context) {
	c.loadIDs(ctx)
	tick := time.NewTicker(cacheSweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			c.closing = true
			c.writeQueue(last)
			return
		case <-c.wake:
			rest(ctx, cacheWriteDelay) // for others
			c.writeQueue(ctx)
		case now := <-tick.C:
			c.sweep(ctx, now.UnixMilli())
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
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// writeQueue writes what is queued, in transactions that are short enough for the ledger to wait for. It rests in
// between: however many answers come, writing them takes little of the processor. What the queue cannot take stays in
// memory only.
func (c *responseCache) writeQueue(ctx context.Context) {
	for ctx.Err() == nil {
		start := time.Now()
		n, err := c.writeBatch(ctx)
		if err != nil && !c.failing.Swap(true) {
			c.log.Warn("answers could not be cached on disk", "error", err)
		} else if err == nil && n > 0 {
			c.failing.Store(false)
		}
		c.mu.Lock()
		tooMuch, left := c.diskBytes > c.maxBytes || len(c.onDisk) > maxCacheEntries, len(c.queue)
		c.mu.Unlock()
		if tooMuch {
			c.evict(ctx)
		}
		if left == 0 {
			return
		}
		if !c.closing {
			rest(ctx, cacheRestFactor*time.Since(start))
		}
	}
}

// writeBatch writes the first answers of the queue and returns how many it took from it.
func (c *responseCache) writeBatch(ctx context.Context) (taken int, err error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	var bytes int64
	c.mu.Lock()
	batch := c.queue
	for i, a := range batch {
		if i == cacheBatchEntries || i > 0 && bytes+a.size() > cacheBatchBytes {
			batch = batch[:i]
			break
		}
		bytes += a.size()
	}
	c.queue = c.queue[len(batch):]
	if len(c.queue) == 0 {
		c.queue = nil
	}
	c.queueBytes -= bytes
	c.mu.Unlock()
	if len(batch) == 0 {
		return 0, nil
	}
	rows := make([]cacheRow, 0, len(batch))
	for _, a := range batch {
		plain, err := a.encode()
		if err != nil {
			return len(batch), err
		}
		sealed, err := c.sealing.sealCached(a.key.context(a.project), plain)
		if err != nil {
			return len(batch), err
		}
		rows = append(rows, cacheRow{id: a.key.id(), project: a.project, token: a.token, model: a.Model,
			storedAt: a.StoredAt, expiresAt: a.ExpiresAt, size: a.size(), answer: sealed})
	}
	if err := c.store.addCached(ctx, rows); err != nil {
		c.dropped.Add(int64(len(rows)))
		return len(batch), err
	}
	c.written.Add(int64(len(rows)))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.diskBytes += bytes
	for i := range rows {
		if c.onDisk != nil {
			c.onDisk[rows[i].id] = struct{}{}
		}
	}
	return len(batch), nil
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
	if err == nil {
		c.mu.Lock()
		c.diskBytes = bytes
		c.mu.Unlock()
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
	for _, e := range c.memory {
		if a := e.Value.(*memoryEntry).cachedAnswer; f.matches(a.project, a.token, a.Model, a.StoredAt) {
			deleted[a.key.id()] = struct{}{}
			c.removeFromMemory(e)
		}
	}
	c.queueBytes = 0
	c.queue = slices.DeleteFunc(c.queue, func(a *cachedAnswer) bool {
		if f.matches(a.project, a.token, a.Model, a.StoredAt) {
			deleted[a.key.id()] = struct{}{}
			return true
		}
		c.queueBytes += a.size()
		return false
	})
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
			if after = (cachePosition{r.token, r.size, r.id}); f.matches(r.project, r.token, r.model, r.storedAt) {
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

// matches reports whether the filter describes an answer.
func (f *cacheFilter) matches(project, token int64, model string, storedAt int64) bool {
	return project == f.project && (f.token == 0 || f.token == token || f.token == anyToken && token != 0) &&
		(f.model == "" || f.model == model) && (f.storedBefore == 0 || storedAt < f.storedBefore)
}
