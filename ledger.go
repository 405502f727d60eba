// This file is the durable record of calls: their pending records, their rows when they have ended, group
// commit and retention. One goroutine writes: it takes whatever is queued and commits it as one
// transaction. It never drops a row: when the database fails it keeps the rows, retries and reports it
// (healthy), so that calls are refused until it works again.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// settleDelay is how long rows of ended calls may wait for others, to be committed together. Nobody
	// waits for them; a crash in between turns them into lost ones, with an estimate.
	settleDelay      = 100 * time.Millisecond
	settleBatchSize  = 512
	ledgerRetryDelay = 250 * time.Millisecond
	// After a batch in which this many calls begin, the next commit is delayed: much of a transaction's cost
	// is the same for one call and for fifty, and the delay is over long before a provider answers.
	largeBatchSize  = 8
	largeBatchDelay = 200 * time.Microsecond
	// maxCommitPause is how long a commit waits for more calls at most, with PostgreSQL; see commitPace.
	maxCommitPause = 6 * time.Millisecond
)

// A newCompleteFunc returns a function that fills in what a lost row costs, and what it counts in limits with for_each.
type newCompleteFunc func(context.Context) func(*requestRow) error

type ledger struct {
	newComplete newCompleteFunc
	store       *store
	log         *slog.Logger
	writer      *ledgerWriter // used by the goroutine of run only, as is refusalStored
	// refusalStored says that the setting ledgerRefusal has a text, which the next success is to delete.
	refusalStored bool

	mu              sync.Mutex
	pending         *pendingBatch // nil: none
	wakeSize        int           // of pending, with which the writer is woken
	lastBatchBytes  int           // size of the last batch's JSON
	settledEntries  []*ledgerEntry
	sumOnlyRows     []sumOnlyRow
	oldestSettledAt time.Time      // when the oldest of settledEntries and sumOnlyRows was queued
	queuedCount     uint64         // all rows ever queued
	committedCount  uint64         // how many of them, in the order of queueing, are certainly committed
	flushing        bool           // a caller waits for committedCount
	writing         []*ledgerEntry // those that the writer has taken from settledEntries
	writingSince    time.Time      // zero: it writes no rows
	outbox          *outbox        // keeps rows while the database does not work; nil: none does
	delivering      outboxMark     // of the writer: what is recorded once the present batch is
	closing         bool

	wake            chan struct{}
	done            chan struct{}
	outboxDone      chan struct{}
	failing         atomic.Bool
	commitDurations histogram
	committedRows   atomic.Int64
	refusedRows     atomic.Int64 // each attempt counts
}

// ledgerRefusal is the setting with the time and the error of a database that refuses rows, "" if it does not.
const ledgerRefusal = "ledger_refusal"

// openLedger recovers the calls that were running when the last process died, then starts the writer. box may be nil.
func openLedger(ctx context.Context, st *store, log *slog.Logger, box *outbox, newComplete newCompleteFunc,
) (*ledger, error) {
	l := &ledger{store: st, writer: st.newLedgerWriter(), log: log, newComplete: newComplete, outbox: box,
		wakeSize: 1, wake: make(chan struct{}, 1), done: make(chan struct{}), outboxDone: make(chan struct{})}
	if err := l.recoverCalls(ctx); err != nil {
		return nil, err
	}
	stored, err := st.setting(ctx, ledgerRefusal)
	if l.refusalStored = stored != ""; err != nil && !errors.Is(err, errNotFound) {
		return nil, err
	}
	go l.run()
	go l.runOutbox()
	return l, nil
}

// begin queues the pending record of a call and returns at once. The record is committed while the provider
// is being called; wait for committed.
func (l *ledger) begin(e *ledgerEntry) {
	var space [512]byte
	record := e.row.appendPendingRecord(space[:0])
	l.mu.Lock()
	if l.pending == nil {
		size := l.lastBatchBytes + l.lastBatchBytes/2
		l.pending = &pendingBatch{done: make(chan struct{}), recordsJSON: make([]byte, 0, size)}
	}
	e.batch = l.pending
	e.batch.add(e.row.id, record)
	l.queuedCount++
	wake := l.pending.size == l.wakeSize
	l.mu.Unlock()
	if wake {
		l.kick()
	}
}

// committed is closed once the pending record is committed or has failed; commitErr tells which.
func (e *ledgerEntry) committed() <-chan struct{} { return e.batch.done }

// commitErr is nil if the pending record is committed. Call it once committed is closed.
func (e *ledgerEntry) commitErr() error { return e.batch.err }

// settle queues the row of a call that has ended, and returns its position, which committedSoFar reaches. From now on
// the row is read, and must not be written.
func (l *ledger) settle(e *ledgerEntry) (position uint64) {
	l.mu.Lock()
	position = l.enqueueSettled()
	e.number = position
	l.settledEntries = append(l.settledEntries, e)
	n := len(l.settledEntries)
	l.mu.Unlock()
	if n == 1 || n >= settleBatchSize {
		l.kick() // the first sets the writer's timer
	}
	return position
}

// recordRefused queues a call that was refused, and so has no pending record. With withRow false it only
// counts in the sums.
func (l *ledger) recordRefused(r *requestRow, withRow bool) {
	l.mu.Lock()
	number := l.enqueueSettled()
	if withRow {
		l.settledEntries = append(l.settledEntries, &ledgerEntry{row: *r, number: number})
	} else {
		l.sumOnlyRows = append(l.sumOnlyRows, sumOnlyRow{requestRow: new(*r), number: number})
	}
	l.mu.Unlock()
	l.kick()
}

// recordUsage queues the usage of a call that has become known after its end, and what that adds to accounts. Once it
// is committed, counted says whether it was the first.
func (l *ledger) recordUsage(r *requestRow, late []lateLeaseUse) {
	l.mu.Lock()
	l.sumOnlyRows = append(l.sumOnlyRows, sumOnlyRow{r, l.enqueueSettled(), late})
	l.mu.Unlock()
	l.kick()
}

// enqueueSettled returns the number of a row that the caller is about to queue. The caller holds mu.
func (l *ledger) enqueueSettled() (number uint64) {
	l.queuedCount++
	if len(l.settledEntries)+len(l.sumOnlyRows) == 0 {
		l.oldestSettledAt = time.Now()
	}
	return l.queuedCount
}

// kick wakes the writer.
func (l *ledger) kick() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// backlog returns how many rows are queued: of calls that begin, and of calls that have ended.
func (l *ledger) backlog() (begins, settles int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pending != nil {
		begins = int64(l.pending.size)
	}
	return begins, int64(len(l.settledEntries) + len(l.sumOnlyRows))
}

// healthy reports whether the last write succeeded. While it did not, no call may be admitted, because it
// could not be recorded.
func (l *ledger) healthy() bool { return !l.failing.Load() }

// flush returns when all rows queued before are committed, or when ctx is over.
func (l *ledger) flush(ctx context.Context) error { return l.awaitCommitted(ctx, l.queuedSoFar()) }

// queuedSoFar returns how many rows were ever queued.
func (l *ledger) queuedSoFar() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.queuedCount
}

// committedSoFar returns how many of these are certainly committed.
func (l *ledger) committedSoFar() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.committedCount
}

// awaitCommitted returns when the first count rows that were queued are committed, or when ctx is over.
func (l *ledger) awaitCommitted(ctx context.Context, count uint64) error {
	for {
		l.mu.Lock()
		done := l.committedCount >= count
		l.flushing = l.flushing || !done
		l.mu.Unlock()
		if done {
			return nil
		}
		l.kick()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// awaitIfHealthy is awaitCommitted for waits that any client can cause: it does not wait while the ledger
// cannot be written, and never long.
func (l *ledger) awaitIfHealthy(ctx context.Context, count uint64) error {
	l.mu.Lock()
	behind := l.committedCount < count
	l.mu.Unlock()
	if behind && l.failing.Load() {
		return errors.New("the ledger cannot be written")
	}
	ctx, cancel := context.WithTimeout(ctx, limitLoadTimeout)
	defer cancel()
	return l.awaitCommitted(ctx, count)
}

// awaitWhileHealthy is awaitIfHealthy for waits that may take as long as ctx allows, while the ledger can be written.
func (l *ledger) awaitWhileHealthy(ctx context.Context, count uint64) error {
	for {
		err := l.awaitIfHealthy(ctx, count)
		if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			return err
		}
	}
}

// close writes what is queued and ends the writer. It gives up when ctx is over; keepRows then keeps what is left.
func (l *ledger) close(ctx context.Context) error {
	err := l.flush(ctx)
	l.mu.Lock()
	l.closing = true
	l.mu.Unlock()
	l.kick()
	<-l.done
	<-l.outboxDone
	l.dropOutbox()
	l.writer.close()
	return err
}

// run is the writer; close waits for its end.
func (l *ledger) run() {
	defer close(l.done)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var pace commitPace
	for {
		work := l.dequeue()
		if work.pending != nil || len(work.settledEntries)+len(work.sumOnlyRows) > 0 {
			began := time.Now()
			l.writeWork(&work)
			l.markCommitted(work)
			if l.failing.Load() && !l.pause(ledgerRetryDelay) {
				return
			}
			switch {
			case work.pending != nil && l.store.backend != nil:
				if goal := pace.batchGoal(began, work.pending.size); goal > 1 {
					l.awaitBatch(goal, began.Add(maxCommitPause), timer)
				}
			case work.pending != nil && work.pending.size >= largeBatchSize:
				time.Sleep(largeBatchDelay)
			default:
				runtime.Gosched()
			}
			continue
		}
		l.markCommitted(work)
		if work.closing {
			return
		}
		if l.failing.Load() { // nothing is queued that a retry could write
			if err := l.writer.probe(context.Background()); err == nil {
				l.markRecovered()
			} else if !l.pause(ledgerRetryDelay) {
				return
			}
			continue
		}
		timer.Reset(work.wait)
		select {
		case <-l.wake:
		case <-timer.C:
		}
	}
}

// writeWork commits what was dequeued. With PostgreSQL, pending records have a transaction of their own, so that calls
// do not wait for the rows of others.
func (l *ledger) writeWork(work *ledgerWork) {
	pending := work.pending
	if pending != nil && l.store.backend != nil {
		l.write(pending, nil, nil)
		close(pending.done)
		pending = nil
	}
	if l.delivering = work.mark; pending != nil || len(work.settledEntries)+len(work.sumOnlyRows) > 0 {
		l.write(pending, work.settledEntries, work.sumOnlyRows)
	}
	if l.delivering = (outboxMark{}); pending != nil {
		close(pending.done)
	}
}

// awaitBatch waits until as many calls begin as goal says, but not longer than until a time.
func (l *ledger) awaitBatch(goal int, until time.Time, timer *time.Timer) {
	timer.Reset(time.Until(until))
	for late := false; ; {
		l.mu.Lock()
		ready := late || l.flushing || l.closing || l.pending != nil && l.pending.size >= goal
		if l.wakeSize = goal; ready {
			l.wakeSize = 1
		}
		l.mu.Unlock()
		if ready {
			return
		}
		select {
		case <-l.wake:
		case <-timer.C:
			late = true
		}
	}
}

// pause waits, and returns false if the ledger is being closed.
func (l *ledger) pause(d time.Duration) bool {
	time.Sleep(d)
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.closing
}

// ledgerWork is what the writer takes from the queues at one time.
type ledgerWork struct {
	pending        *pendingBatch
	settledEntries []*ledgerEntry
	sumOnlyRows    []sumOnlyRow
	drained        bool          // nothing is left
	mark           outboxMark    // says that all of these are recorded
	queuedCount    uint64        // of the ledger at that time
	wait           time.Duration // until what is left should be written
	closing        bool
}

// dequeue empties the queues: all pending records, and the rows of ended calls if they have waited long
// enough or are many.
func (l *ledger) dequeue() ledgerWork {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := ledgerWork{pending: l.pending, drained: true, queuedCount: l.queuedCount, wait: time.Hour, closing: l.closing}
	if l.pending != nil {
		l.lastBatchBytes, l.pending = len(l.pending.recordsJSON), nil
	}
	if n := len(l.settledEntries) + len(l.sumOnlyRows); n > 0 {
		age := time.Since(l.oldestSettledAt)
		if q.drained = n >= settleBatchSize || age >= settleDelay || l.flushing || l.closing; q.drained {
			q.settledEntries, l.settledEntries = l.settledEntries, nil
			q.sumOnlyRows, l.sumOnlyRows = l.sumOnlyRows, nil
			l.writing, l.writingSince = q.settledEntries, time.Now()
			q.mark = l.markOf(l.queuedCount)
		} else {
			q.wait = settleDelay - age
		}
	}
	return q
}

// markCommitted counts what work has brought into the database. After a failure that is nothing: the rows
// are queued again.
func (l *ledger) markCommitted(work ledgerWork) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writing, l.writingSince = nil, time.Time{}
	empty := work.pending == nil && len(work.settledEntries)+len(work.sumOnlyRows) == 0
	if !work.drained || l.failing.Load() && !empty {
		return
	}
	l.committedCount, l.flushing = work.queuedCount, false
}

// write commits what was queued. A batch that the database refuses is written row by row: a row that it refuses by
// itself must not block the others. If a row cannot be written in any form, the database is at fault: that row and
// those after it are queued again. The calls that begin fail instead, because they wait for it.
func (l *ledger) write(pending *pendingBatch, settled []*ledgerEntry, sums []sumOnlyRow) {
	err := l.commit(pending, settled, sums)
	if isRejectedRow(err) && len(settled)+len(sums) > 0 {
		mark := l.delivering
		l.delivering = outboxMark{}
		if err = nil; pending != nil {
			err = l.commit(pending, nil, nil)
		}
		for err == nil && len(settled) > 0 {
			if err = l.commit(nil, settled[:1], nil); err == nil {
				settled = settled[1:]
			}
		}
		for err == nil && len(sums) > 0 {
			l.delivering = mark.upTo(sums[0].number) // every row above has its own record by now
			if err = l.commit(nil, nil, sums[:1]); err == nil {
				sums = sums[1:]
			}
		}
	}
	if err == nil {
		// A database that takes the rows of calls that have ended may still refuse the records of those that begin.
		if pending != nil || !l.failing.Load() || l.writer.probe(context.Background()) == nil {
			l.markRecovered()
		}
		return
	}
	l.markFailing(err)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writing = nil
	l.settledEntries = append(slices.Clip(settled), l.settledEntries...)
	l.sumOnlyRows = append(slices.Clip(sums), l.sumOnlyRows...)
}

// commit commits one batch: all of it, or nothing. A single row may be reduced.
func (l *ledger) commit(pending *pendingBatch, settled []*ledgerEntry, sums []sumOnlyRow) error {
	start := time.Now()
	batch, undo := buildLedgerBatch(pending, settled, sums)
	batch.delivered = l.delivering
	err := l.writer.write(context.Background(), batch)
	l.commitDurations.observe(time.Since(start).Microseconds(), &fastBounds)
	rows := len(settled) + len(sums)
	if isRejectedRow(err) {
		l.refusedRows.Add(1)
		if rows == 1 && pending == nil {
			err = l.writeReduced(batch, err)
		}
	}
	if pending != nil {
		pending.err = err
		rows += pending.size
	}
	if err != nil {
		undo()
		return err
	}
	if pending != nil {
		pending.recordsJSON = nil // otherwise kept for as long as the longest of the calls runs
	}
	l.committedRows.Add(int64(rows))
	return nil
}

// writeReduced writes the only row of a batch that the database refused with cause: without its texts, so that every
// limit still counts the call. A row that is there already needs nothing more.
func (l *ledger) writeReduced(batch ledgerBatch, cause error) error {
	ctx := context.Background()
	reduced, row := batch.reduced()
	err := l.writer.write(ctx, reduced)
	if isRejectedRow(err) && len(batch.records) > 0 {
		if recorded, _ := l.store.isRecorded(ctx, row.id); recorded {
			err = l.writer.write(ctx, ledgerBatch{endedBatchIDs: batch.endedBatchIDs})
		}
	}
	if err == nil {
		l.log.Error("the database refuses a row of the ledger; it is recorded without texts", "error", cause,
			"id", formatRequestID(row.id), "token", row.token, "model", clip(row.model, 256))
	}
	return err
}

// markFailing marks the ledger as failing. A database that refuses rows stays that way until someone repairs it, so
// this is stored, for the doctor.
func (l *ledger) markFailing(err error) {
	if l.failing.Swap(true) {
		return
	}
	l.log.Error("the ledger cannot be written; calls are refused until it can", "error", err)
	if isRejectedRow(err) {
		text := time.Now().UTC().Format(time.RFC3339) + ": " + clip(fmt.Sprint(err), 300)
		l.refusalStored = l.store.setSetting(context.Background(), ledgerRefusal, text) == nil
	}
}

func (l *ledger) markRecovered() {
	if l.failing.Swap(false) {
		l.log.Info("the ledger can be written again")
	}
	if l.refusalStored {
		l.refusalStored = l.store.setSetting(context.Background(), ledgerRefusal, "") != nil
	}
}

// retention is how long and how much is stored.
type retention struct {
	maxAge   time.Duration // of single calls
	maxBytes int64         // that the database may use; 0: no limit
}

// runRetention deletes what is too old or too much until ctx is over, in small steps between which calls are
// written.
func (l *ledger) runRetention(ctx context.Context, keep retention, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	var sumsPrunedAt, warnedAt time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !l.store.isLeader() {
			continue
		}
		now := time.Now()
		l.prune(ctx, func() (int64, error) { return l.store.deleteExpiredContents(ctx, now.UnixMilli(), 20) })
		if b := l.store.backend; b != nil {
			l.prune(ctx, func() (int64, error) { return b.mergeSlots(ctx, now.UnixMilli(), 500) })
		}
		before := minIDAt(now.Add(-keep.maxAge))
		l.prune(ctx, func() (int64, error) { return l.store.deleteOldRequests(ctx, before, 200) })
		l.prune(ctx, func() (int64, error) { return l.store.deleteOldBackground(ctx, before, 20) })
		l.prune(ctx, func() (int64, error) { return l.store.deleteOldBatches(ctx, maxKnownBatches, 200) })
		sessions := now.Add(-keep.maxAge)
		others := now.Add(-max(keep.maxAge, attributionRetention))
		l.prune(ctx, func() (int64, error) {
			return l.store.deleteOldAttributionSums(ctx, sessions.UnixMilli()-hourMS, others.UnixMilli()-hourMS, 20)
		})
		l.prune(ctx, func() (int64, error) { return l.store.deleteEndedValues(ctx, now.UnixMilli()-hourMS, 200) })
		over := l.pruneToSize(ctx, keep.maxBytes, minIDAt(now.Add(-minCallRetention)))
		if over > 0 && now.Sub(warnedAt) >= time.Hour {
			warnedAt = now
			l.log.Warn("the database is larger than MAX_DATABASE_BYTES, and has no calls left that may be deleted: "+
				"sums, tokens and the audit trail stay",
				"bytes_over", over)
		}
		if now.Sub(sumsPrunedAt) >= time.Hour &&
			l.prune(ctx, func() (int64, error) {
				return l.store.deleteOldSums(ctx, now.Add(-hourlySumsRetention).UnixMilli(), 20)
			}) &&
			l.prune(ctx, func() (int64, error) {
				return l.store.deleteOldHours(ctx, now.Add(-projectHoursRetention).UnixMilli(), 20)
			}) {
			sumsPrunedAt = now // no further hour ends before the next one
		}
	}
}

// hourlySumsRetention is how long sums by hour and token are kept; those by day and those of whole projects
// stay.
const hourlySumsRetention = 100 * 24 * time.Hour

// projectHoursRetention is how long the hours of projects are kept: the dashboard's longest period, and the
// one before it.
const projectHoursRetention = 190 * 24 * time.Hour

// attributionRetention is how long the sums of end users and tags are kept at least: limits by the month need them.
const attributionRetention = 62 * 24 * time.Hour

// prune calls step, which deletes some rows and returns how many, until none are left or the next tick
// should continue. It reports whether none are left.
func (l *ledger) prune(ctx context.Context, step func() (int64, error)) bool {
	for range 200 {
		n, err := step()
		if err != nil {
			if ctx.Err() == nil {
				l.log.Error("deleting old rows failed", "error", err)
			}
			return false
		}
		if n == 0 {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
	return false
}

// minCallRetention is how long calls are kept, however large the database is.
const minCallRetention = time.Hour

// pruneToSize deletes cached answers, stored content, then the oldest calls, those with an id below before, and sums of
// attributes that are older than any call, once the database uses more than limit bytes, until it is a twentieth below
// that, so that the next tick need not start again. Freed pages stay in the file, which does not shrink, and take later
// rows. It returns by how much the limit is exceeded when no call is left to delete; limit 0 is no limit.
func (l *ledger) pruneToSize(ctx context.Context, limit, before int64) (over int64) {
	used := func() (int64, error) {
		all, free, err := l.store.size(ctx)
		return all - free, err
	}
	if n, err := used(); limit == 0 || err != nil || n <= limit {
		return 0
	}
	done := l.prune(ctx, func() (int64, error) {
		if n, err := used(); err != nil || n <= limit-limit/20 {
			return 0, err
		}
		if cached, _, err := l.store.deleteOldestCached(ctx, 20); len(cached) > 0 || err != nil {
			return int64(len(cached)), err
		}
		if n, err := l.store.deleteOldestContents(ctx, 20); n > 0 || err != nil {
			return n, err
		}
		if oldest, err := l.store.oldestRequestHour(ctx); oldest > 0 && err == nil {
			if n, err := l.store.deleteOldAttributionSums(ctx, oldest, oldest, 20); n > 0 || err != nil {
				return n, err
			}
		}
		return l.store.deleteOldRequests(ctx, before, 200)
	})
	n, err := used()
	if !done || err != nil {
		return 0
	}
	return max(n-limit, 0)
}

// A storedBody is the start of a request body or of an answer, for projects whose policy asks to store them.
type storedBody struct {
	bytes []byte
	size  int64 // of the whole body
	full  bool  // nothing more is stored
}

// A storedContent is the content of a running call. It belongs to the call's goroutine. nil stores nothing.
type storedContent struct {
	memory            *bodyShare // of its call
	maxBytes          int64      // of each body
	expiresAt         int64      // unix milliseconds
	request, response storedBody
}

func (sc *storedContent) add(b *storedBody, p []byte) {
	b.size += int64(len(p))
	n := min(sc.maxBytes-int64(len(b.bytes)), int64(len(p)))
	if b.full || n == 0 {
		return
	}
	if have, need := int64(cap(b.bytes)), int64(len(b.bytes))+n; need > have {
		size := min(max(need, 2*have), sc.maxBytes)
		if sc.memory.reserve(size-have) != nil { // request bodies have precedence
			b.full = true
			return
		}
		b.bytes = append(make([]byte, 0, size), b.bytes...)
	}
	b.bytes = append(b.bytes, p[:n]...)
}

// addResponse stores bytes of the answer as they go to the client.
func (sc *storedContent) addResponse(p []byte) {
	if sc != nil {
		sc.add(&sc.response, p)
	}
}

// seal returns the row that stores sc.
func (k *contentKey) seal(callID, project int64, sc *storedContent) (*contentRow, error) {
	sl, err := k.sealerFor(contentPurpose(callID))
	if err != nil {
		return nil, err
	}
	return &contentRow{id: callID, project: project, expiresAt: sc.expiresAt,
		request: sl.seal(newSecret(string(sc.request.bytes)), requestPart), requestBytes: sc.request.size,
		response: sl.seal(newSecret(string(sc.response.bytes)), responsePart), responseBytes: sc.response.size}, nil
}
