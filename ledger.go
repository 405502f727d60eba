// This room is the durable record of calls: begin, settle, group commit,
// recovery, retention. One goroutine writes; it takes whatever is queued and
// commits it as one transaction. It never drops what it was given: when the
// database fails it keeps the rows, tries again, and says so (healthy), so that
// calls are refused until it works.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// settleDelay is how long settled rows may wait for company. Nobody waits
	// for them; a crash in between makes them lost ones, with an estimate.
	settleDelay     = 100 * time.Millisecond
	settleBatchSize = 512
	// So many calls that begin together are a crowd, for which a commit waits a
	// moment.
	largeBatchSize   = 8
	largeBatchDelay  = 200 * time.Microsecond
	ledgerRetryDelay = 250 * time.Millisecond
)

// A ledgerEntry is one call on its way into the ledger.
type ledgerEntry struct {
	row   requestRow // of the caller until it is settled; from then on nobody writes it
	batch *pendingBatch
}

type ledger struct {
	store  *store
	writer *ledgerWriter // of run's goroutine
	log    *slog.Logger

	mu              sync.Mutex
	pending         *pendingBatch // nil: none
	lastBatchBytes  int           // bytes that the last one's calls took
	settledEntries  []*ledgerEntry
	sumOnlyRows     []*requestRow
	oldestSettledAt time.Time // when the oldest of settles and sums came
	queuedCount     uint64    // rows that were ever queued
	committedCount  uint64    // so many of them, in the order of queueing, are surely written
	flushing        bool      // someone waits for committed
	closing         bool

	wake            chan struct{}
	done            chan struct{}
	failing         atomic.Bool
	commitDurations histogram    // of the time batches took
	committedRows   atomic.Int64 // that were committed
}

// openLedger recovers what a dead process left open, then starts the writer.
// price fills in the cost of a lost row.
func openLedger(ctx context.Context, st *store, log *slog.Logger, price func(*requestRow)) (*ledger, error) {
	writer := st.newLedgerWriter()
	lost, err := recoverLost(ctx, st, writer, price)
	if err != nil {
		return nil, err
	}
	if lost > 0 {
		log.Warn("calls were running when the program died; their rows are now lost ones, with estimates", "rows", lost)
	}
	l := &ledger{store: st, writer: writer, log: log, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go l.run()
	return l, nil
}

// begin queues a call and returns at once; wait on begun. The note is written in
// parallel with the call to the provider.
func (l *ledger) begin(row requestRow) *ledgerEntry {
	e := &ledgerEntry{row: row}
	var space [512]byte
	note := row.appendPendingRecord(space[:0])
	l.mu.Lock()
	first := l.pending == nil
	if first {
		l.pending = &pendingBatch{done: make(chan struct{}), recordsJSON: make([]byte, 0, l.lastBatchBytes+l.lastBatchBytes/2)}
	}
	e.batch = l.pending
	e.batch.add(row.id, note)
	l.queuedCount++
	l.mu.Unlock()
	if first {
		l.kick()
	}
	return e
}

// committed is closed when it is settled whether the call's note is committed: fate
// says so then.
func (e *ledgerEntry) committed() <-chan struct{} { return e.batch.done }

// commitErr is nil if the note is committed, or says why it is not.
func (e *ledgerEntry) commitErr() error { return e.batch.err }

// settle queues how a begun call ended, as its row says. The row is read from now
// on, and no more written.
func (l *ledger) settle(e *ledgerEntry) {
	l.mu.Lock()
	l.queuedCount++
	if len(l.settledEntries)+len(l.sumOnlyRows) == 0 {
		l.oldestSettledAt = time.Now()
	}
	l.settledEntries = append(l.settledEntries, e)
	full := len(l.settledEntries) >= settleBatchSize
	first := len(l.settledEntries) == 1
	l.mu.Unlock()
	if full || first {
		l.kick() // the first sets the writer's timer
	}
}

// recordRefused queues a call that was never begun: a refused one. With row false it
// counts in the sums only.
func (l *ledger) recordRefused(r *requestRow, row bool) {
	l.mu.Lock()
	l.queuedCount++
	if len(l.settledEntries)+len(l.sumOnlyRows) == 0 {
		l.oldestSettledAt = time.Now()
	}
	if row {
		l.settledEntries = append(l.settledEntries, &ledgerEntry{row: *r})
	} else {
		l.sumOnlyRows = append(l.sumOnlyRows, new(*r))
	}
	l.mu.Unlock()
	l.kick()
}

func (l *ledger) kick() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// backlog says how many rows wait: calls that begin, and calls that have ended.
func (l *ledger) backlog() (begins, settles int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pending != nil {
		begins = int64(l.pending.size)
	}
	return begins, int64(len(l.settledEntries) + len(l.sumOnlyRows))
}

// healthy reports whether the last write succeeded. While it did not, no call
// may be admitted: it could not be put on record.
func (l *ledger) healthy() bool { return !l.failing.Load() }

// flush returns when all that was queued before is committed, whatever is queued
// meanwhile, or when ctx is over.
func (l *ledger) flush(ctx context.Context) error { return l.awaitCommitted(ctx, l.queuedSoFar()) }

// queuedSoFar says how many rows the ledger was ever given.
func (l *ledger) queuedSoFar() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.queuedCount
}

// awaitCommitted returns when the first want rows that the ledger was given are committed,
// or when ctx is over.
func (l *ledger) awaitCommitted(ctx context.Context, want uint64) error {
	for {
		l.mu.Lock()
		done := l.committedCount >= want
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

// awaitIfHealthy is await for who must not wait long, as anyone may cause it: not at all
// while the ledger cannot be written.
func (l *ledger) awaitIfHealthy(ctx context.Context, want uint64) error {
	l.mu.Lock()
	owed := l.committedCount < want
	l.mu.Unlock()
	if owed && l.failing.Load() {
		return errors.New("the ledger cannot be written")
	}
	ctx, cancel := context.WithTimeout(ctx, limitLoadTimeout)
	defer cancel()
	return l.awaitCommitted(ctx, want)
}

// close writes what is queued and ends the writer. It gives up at the end of
// ctx; what is then unwritten becomes lost rows at the next start.
func (l *ledger) close(ctx context.Context) error {
	err := l.flush(ctx)
	l.mu.Lock()
	l.closing = true
	l.mu.Unlock()
	l.kick()
	<-l.done
	l.writer.close()
	return err
}

// run is the writer. Its owner is close.
func (l *ledger) run() {
	defer close(l.done)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		q := l.dequeue()
		if q.pending != nil || len(q.settledEntries)+len(q.sumOnlyRows) > 0 {
			l.write(q.pending, q.settledEntries, q.sumOnlyRows)
			if q.pending != nil {
				close(q.pending.done)
			}
			l.markCommitted(q)
			if l.failing.Load() && !l.pause(ledgerRetryDelay) {
				return
			}
			// Much of a transaction's cost is the same for one call and for fifty.
			// Where many begin at one time the next batch is made larger by a
			// wait, which is over long before a provider answers.
			if q.pending != nil && q.pending.size >= largeBatchSize {
				time.Sleep(largeBatchDelay)
			} else {
				runtime.Gosched()
			}
			continue
		}
		l.markCommitted(q)
		if q.closing {
			return
		}
		if l.failing.Load() { // nothing to try with: probe
			if err := l.store.checkWritable(context.Background()); err == nil {
				l.markRecovered()
			} else if !l.pause(ledgerRetryDelay) {
				return
			}
			continue
		}
		timer.Reset(q.wait)
		select {
		case <-l.wake:
		case <-timer.C:
		}
	}
}

// pause waits, and reports false when the ledger is being closed.
func (l *ledger) pause(d time.Duration) bool {
	time.Sleep(d)
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.closing
}

// A ledgerWork is what the writer took from the queues at one time.
type ledgerWork struct {
	pending        *pendingBatch
	settledEntries []*ledgerEntry
	sumOnlyRows    []*requestRow
	drained        bool          // nothing was left
	queuedCount    uint64        // queued then
	wait           time.Duration // until what was left should be written
	closing        bool
}

// dequeue empties the queues: all begins, and the settled rows when they have
// waited long enough or are many.
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
		} else {
			q.wait = settleDelay - age
		}
	}
	return q
}

// markCommitted notes what a take has brought into the database. After a failure that
// is nothing new: the rows are back in the queue.
func (l *ledger) markCommitted(q ledgerWork) {
	if !q.drained || l.failing.Load() {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.committedCount, l.flushing = q.queuedCount, false
}

// write commits one batch. If it cannot, those whose calls begin are told so,
// since they wait, and the rest goes back into the queue.
func (l *ledger) write(begins *pendingBatch, settles []*ledgerEntry, sums []*requestRow) {
	start := time.Now()
	batch, undo := buildLedgerBatch(begins, settles, sums)
	err := l.writer.write(context.Background(), batch)
	l.commitDurations.observe(time.Since(start).Microseconds(), &fastBounds)
	rows := len(settles) + len(sums)
	if begins != nil {
		begins.err = err
		rows += begins.size
	}
	if err == nil {
		if begins != nil {
			begins.recordsJSON = nil // else for as long as the longest of them runs
		}
		l.committedRows.Add(int64(rows))
		l.markRecovered()
		return
	}
	undo()
	switch {
	case !isRejectedRow(err):
		if !l.failing.Swap(true) {
			l.log.Error("the ledger cannot be written; calls are refused until it can", "error", err)
		}
		l.mu.Lock()
		l.settledEntries = append(settles, l.settledEntries...)
		l.sumOnlyRows = append(sums, l.sumOnlyRows...)
		l.mu.Unlock()
	case rows > 1 && len(settles)+len(sums) > 0:
		if begins != nil {
			l.write(begins, nil, nil)
		}
		for _, e := range settles {
			l.write(nil, []*ledgerEntry{e}, nil)
		}
		for _, r := range sums {
			l.write(nil, nil, []*requestRow{r})
		}
	default:
		// One row that the database will never take must not hold up all
		// others for ever. It is logged whole instead: nothing is lost silently.
		for _, e := range settles {
			sums = append(sums, &e.row)
			l.abandon(e.batch)
		}
		for _, r := range sums {
			l.log.Error("the database refuses a ledger row; it stands in this line instead", "error", err,
				"id", formatRequestID(r.id), "token", r.token, "outcome", string(r.outcome),
				"input_tokens", r.counts.input, "output_tokens", r.counts.output)
		}
	}
}

func (l *ledger) markRecovered() {
	if l.failing.Swap(false) {
		l.log.Info("the ledger can be written again")
	}
}

// A pendingBatch is the calls that begin together, a row of begun. Until the writer
// takes it, it is guarded by the ledger's mu; then it is the writer's.
type pendingBatch struct {
	id          int64  // the least of its calls'
	recordsJSON []byte // as in begun, but for the last bracket
	size        int
	unsettled   int           // of its calls, those that have not ended
	written     bool          // it is in the database
	err         error         // why it is not; readable once done
	done        chan struct{} // closed when that is settled
}

func (b *pendingBatch) add(id int64, note []byte) {
	if b.size == 0 {
		b.id, b.recordsJSON = id, append(b.recordsJSON, '[')
	} else {
		b.id, b.recordsJSON = min(b.id, id), append(b.recordsJSON, ',')
	}
	b.recordsJSON = append(b.recordsJSON, note...)
	b.size++
	b.unsettled++
}

// buildLedgerBatch makes a batch of what was queued. It takes for granted that the batch
// will be written; undo takes that back.
func buildLedgerBatch(begins *pendingBatch, settles []*ledgerEntry, sums []*requestRow) (b ledgerBatch, undo func()) {
	b.sumOnlyRows = sums
	if begins != nil {
		begins.written = true
		b.pendingBatchID, b.pendingRecordsJSON = begins.id, append(begins.recordsJSON, ']')
	}
	for _, e := range settles {
		b.records = append(b.records, &e.row)
		if at := e.batch; at != nil && at.written { // else it was refused, or its note could not be written
			if at.unsettled--; at.unsettled == 0 {
				b.endedBatchIDs = append(b.endedBatchIDs, at.id)
			}
		}
	}
	return b, func() {
		for _, e := range settles {
			if e.batch != nil && e.batch.written {
				e.batch.unsettled++
			}
		}
		if begins != nil {
			begins.written = false
		}
	}
}

// abandon counts a call as ended that will have no row. If the last note of its
// batch cannot be taken back now, the next start makes a lost call of it.
func (l *ledger) abandon(b *pendingBatch) {
	if b == nil || !b.written {
		return
	}
	if b.unsettled--; b.unsettled == 0 {
		_ = l.writer.write(context.Background(), ledgerBatch{endedBatchIDs: []int64{b.id}})
	}
}

// recoverLost records calls that a dead process has noted as begun and not as
// ended, with the estimates they began with, and returns how many.
func recoverLost(ctx context.Context, st *store, w *ledgerWriter, price func(*requestRow)) (total int, err error) {
	for {
		rows, err := st.pendingRecords(ctx, 1000)
		if err != nil {
			return 0, err
		}
		if len(rows) == 0 {
			return total, st.deletePending(ctx)
		}
		records := make([]*requestRow, len(rows))
		for i := range rows {
			r := &rows[i]
			records[i] = r
			r.outcome, r.errorCode, r.source, r.firstByteUS, r.attempts = outcomeLost, "process_died", usageEstimated, -1, 1
			r.requestedModel = r.model // nobody knows which one would have answered
			price(r)
		}
		if err := w.write(ctx, ledgerBatch{records: records}); err != nil {
			return 0, fmt.Errorf("recording lost calls: %w", err)
		}
		total += len(rows)
	}
}

// A retention is how long and how much is kept.
type retention struct {
	maxAge   time.Duration // of single calls
	maxBytes int64         // that the database may have in use; 0: no limit
}

// runRetention runs until ctx is over, and lets what is too old or too much go, in
// small steps between which calls are written.
func (l *ledger) runRetention(ctx context.Context, keep retention, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	var sumsForgotten, told time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		l.prune(ctx, func() (int64, error) { return l.store.deleteExpiredContents(ctx, now.UnixMilli(), 20) })
		l.prune(ctx, func() (int64, error) { return l.store.deleteOldRequests(ctx, minIDAt(now.Add(-keep.maxAge)), 200) })
		if over := l.pruneToSize(ctx, keep.maxBytes, minIDAt(now.Add(-minCallRetention))); over > 0 && now.Sub(told) >= time.Hour {
			told = now
			l.log.Warn("the database is larger than MAX_DATABASE_BYTES without any single calls that could go: sums, tokens and the audit trail stay",
				"bytes_over", over)
		}
		if now.Sub(sumsForgotten) >= time.Hour &&
			l.prune(ctx, func() (int64, error) {
				return l.store.deleteOldSums(ctx, now.Add(-hourlySumsRetention).UnixMilli(), 20)
			}) &&
			l.prune(ctx, func() (int64, error) {
				return l.store.deleteOldHours(ctx, now.Add(-projectHoursRetention).UnixMilli(), 20)
			}) {
			sumsForgotten = now // no hour ends before the next one
		}
	}
}

// hourlySumsRetention is how long sums by hour and token are kept; those by day, and
// those of whole projects, stay.
const hourlySumsRetention = 100 * 24 * time.Hour

// projectHoursRetention is how long the hours of projects are kept: the dashboard's longest
// period, and the one before it.
const projectHoursRetention = 190 * 24 * time.Hour

// prune lets rows go in steps until step says that none are left, or for so
// many steps that the next tick should go on. It reports whether none are left.
func (l *ledger) prune(ctx context.Context, step func() (int64, error)) bool {
	for range 200 {
		n, err := step()
		if err != nil {
			if ctx.Err() == nil {
				l.log.Error("letting old rows go", "error", err)
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

// minCallRetention is how long calls are kept whatever they take.
const minCallRetention = time.Hour

// pruneToSize lets what is kept of calls' content go, then the oldest calls, those
// with an id below before, while the
// database has more than most bytes in use, until it is a twentieth below that,
// so that it does not begin again at once. Freed pages stay in the file, which
// does not shrink, and take the rows to come. It returns how much is too much
// with no call left to let go; 0 most is no limit.
func (l *ledger) pruneToSize(ctx context.Context, most, before int64) (over int64) {
	used := func() (int64, error) {
		all, free, err := l.store.size(ctx)
		return all - free, err
	}
	if n, err := used(); most == 0 || err != nil || n <= most {
		return 0
	}
	none := l.prune(ctx, func() (int64, error) {
		if n, err := used(); err != nil || n <= most-most/20 {
			return 0, err
		}
		if n, err := l.store.deleteOldestContents(ctx, 20); n > 0 || err != nil {
			return n, err
		}
		return l.store.deleteOldRequests(ctx, before, 200)
	})
	n, err := used()
	if !none || err != nil {
		return 0
	}
	return max(n-most, 0)
}
