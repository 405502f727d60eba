// This room is the durable record of calls: begin, settle, group commit,
// recovery, retention. One goroutine writes; it takes whatever is queued and
// commits it as one transaction. It never drops what it was given: when the
// database fails it keeps the rows, tries again, and says so (healthy), so that
// calls are refused until it works.
package main

import (
	"context"
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
	settleDelay = 100 * time.Millisecond
	settleBatch = 512
	retryDelay  = 250 * time.Millisecond
)

// A ledgerEntry is one call on its way into the ledger.
type ledgerEntry struct {
	id    int64
	row   requestRow  // of the caller until it is settled; from then on nobody writes it
	note  []byte      // the call as it stands in begun
	begun chan error  // gets one value: nil when the note is committed
	batch *begunBatch // of the writer: where the note is; nil: it is not in the database
}

// A begunBatch is a row of begun. It belongs to the writer.
type begunBatch struct {
	id      int64
	running int // of its calls, those that have not ended
}

type ledger struct {
	store  *store
	writer *ledgerWriter // of run's goroutine
	log    *slog.Logger

	mu          sync.Mutex
	begins      []*ledgerEntry
	settles     []*ledgerEntry
	sums        []*requestRow
	firstSettle time.Time // when the oldest of settles and sums came
	queued      uint64    // rows that were ever queued
	committed   uint64    // so many of them, in the order of queueing, are surely written
	flushing    bool      // someone waits for committed
	closing     bool

	wake    chan struct{}
	done    chan struct{}
	failing atomic.Bool
	commits histogram    // of the time batches took
	rows    atomic.Int64 // that were committed
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

// recoverLost records calls that a dead process has noted as begun and not as
// ended, with the estimates they began with, and returns how many.
func recoverLost(ctx context.Context, st *store, w *ledgerWriter, price func(*requestRow)) (total int, err error) {
	for {
		rows, err := st.runningCalls(ctx, 1000)
		if err != nil {
			return 0, err
		}
		if len(rows) == 0 {
			return total, st.forgetBegun(ctx)
		}
		for _, r := range rows {
			r.outcome, r.errorCode, r.source, r.firstByteUS, r.attempts = outcomeLost, "process_died", usageEstimated, -1, 1
			r.asked = r.model // nobody knows which one would have answered
			price(r)
		}
		if err := w.write(ctx, ledgerBatch{records: rows}); err != nil {
			return 0, fmt.Errorf("recording lost calls: %w", err)
		}
		total += len(rows)
	}
}

// begin queues a call and returns at once; wait on begun of what it returns. The
// note is written in parallel with the call to the provider.
func (l *ledger) begin(row requestRow) *ledgerEntry {
	e := &ledgerEntry{id: row.id, row: row, note: row.note(), begun: make(chan error, 1)}
	l.mu.Lock()
	l.queued++
	l.begins = append(l.begins, e)
	l.mu.Unlock()
	l.kick()
	return e
}

// settle queues how a begun call ended, as its row says. The row is read from now
// on, and no more written.
func (l *ledger) settle(e *ledgerEntry) {
	l.mu.Lock()
	l.queued++
	if len(l.settles)+len(l.sums) == 0 {
		l.firstSettle = time.Now()
	}
	l.settles = append(l.settles, e)
	full := len(l.settles) >= settleBatch
	first := len(l.settles) == 1
	l.mu.Unlock()
	if full || first {
		l.kick() // the first sets the writer's timer
	}
}

// record queues a call that was never begun: a refused one. With row false it
// counts in the sums only.
func (l *ledger) record(r *requestRow, row bool) {
	l.mu.Lock()
	l.queued++
	if len(l.settles)+len(l.sums) == 0 {
		l.firstSettle = time.Now()
	}
	if row {
		l.settles = append(l.settles, &ledgerEntry{row: *r})
	} else {
		l.sums = append(l.sums, new(*r))
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
	return int64(len(l.begins)), int64(len(l.settles) + len(l.sums))
}

// healthy reports whether the last write succeeded. While it did not, no call
// may be admitted: it could not be put on record.
func (l *ledger) healthy() bool { return !l.failing.Load() }

// flush returns when all that was queued before is committed, whatever is queued
// meanwhile, or when ctx is over.
func (l *ledger) flush(ctx context.Context) error {
	l.mu.Lock()
	want := l.queued
	l.mu.Unlock()
	for {
		l.mu.Lock()
		done := l.committed >= want
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
		q := l.take()
		if len(q.begins)+len(q.settles)+len(q.sums) > 0 {
			l.write(q.begins, q.settles, q.sums)
			l.wrote(q)
			if l.failing.Load() && !l.pause(retryDelay) {
				return
			}
			// Where the processors are busy, all who are ready to run go first,
			// and what they begin makes a larger batch: much of a transaction's
			// cost is the same for one row and for fifty.
			runtime.Gosched()
			continue
		}
		l.wrote(q)
		if q.closing {
			return
		}
		if l.failing.Load() { // nothing to try with: probe
			if err := l.store.writable(context.Background()); err == nil {
				l.recovered()
			} else if !l.pause(retryDelay) {
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

// A ledgerTake is what the writer took from the queues at one time.
type ledgerTake struct {
	begins, settles []*ledgerEntry
	sums            []*requestRow
	all             bool          // nothing was left
	upTo            uint64        // queued then
	wait            time.Duration // until what was left should be written
	closing         bool
}

// take empties the queues: all begins, and the settled rows when they have
// waited long enough or are many.
func (l *ledger) take() ledgerTake {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := ledgerTake{begins: l.begins, all: true, upTo: l.queued, wait: time.Hour, closing: l.closing}
	l.begins = nil
	if n := len(l.settles) + len(l.sums); n > 0 {
		age := time.Since(l.firstSettle)
		if q.all = n >= settleBatch || age >= settleDelay || l.flushing || l.closing; q.all {
			q.settles, l.settles = l.settles, nil
			q.sums, l.sums = l.sums, nil
		} else {
			q.wait = settleDelay - age
		}
	}
	return q
}

// wrote notes what a take has brought into the database. After a failure that
// is nothing new: the rows are back in the queue.
func (l *ledger) wrote(q ledgerTake) {
	if !q.all || l.failing.Load() {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.committed, l.flushing = q.upTo, false
}

// write commits one batch. If it cannot, the begins are told so, since their
// callers wait, and the rest goes back into the queue.
func (l *ledger) write(begins, settles []*ledgerEntry, sums []*requestRow) {
	start := time.Now()
	batch, undo := batchOf(begins, settles, sums)
	err := l.writer.write(context.Background(), batch)
	l.commits.observe(time.Since(start).Microseconds(), &fastBounds)
	if err == nil {
		l.rows.Add(int64(len(begins) + len(settles) + len(sums)))
		l.recovered()
		answerAll(begins, nil)
		return
	}
	undo()
	switch {
	case !refusedRow(err):
		if !l.failing.Swap(true) {
			l.log.Error("the ledger cannot be written; calls are refused until it can", "error", err)
		}
		l.mu.Lock()
		l.settles = append(settles, l.settles...)
		l.sums = append(sums, l.sums...)
		l.mu.Unlock()
		answerAll(begins, err)
	case len(begins)+len(settles)+len(sums) > 1:
		for _, e := range begins {
			l.write([]*ledgerEntry{e}, nil, nil)
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
		}
		for _, r := range sums {
			l.log.Error("the database refuses a ledger row; it stands in this line instead", "error", err,
				"id", requestID(r.id), "token", r.token, "outcome", string(r.outcome),
				"input_tokens", r.counts.input, "output_tokens", r.counts.output)
		}
		answerAll(begins, err)
	}
}

// answerAll tells the callers that wait for begins.
func answerAll(begins []*ledgerEntry, err error) {
	for _, e := range begins {
		e.begun <- err
	}
}

// batchOf makes a batch of what was queued. It takes for granted that the batch
// will be written; undo takes that back.
func batchOf(begins, settles []*ledgerEntry, sums []*requestRow) (b ledgerBatch, undo func()) {
	b.sums = sums
	if len(begins) > 0 {
		at := &begunBatch{begins[0].id, len(begins)}
		for i, e := range begins {
			e.batch, at.id = at, min(at.id, e.id)
			b.calls = append(append(b.calls, "[,"[min(i, 1)]), e.note...)
		}
		b.begun, b.calls = at.id, append(b.calls, ']')
	}
	for _, e := range settles {
		b.records = append(b.records, &e.row)
		if e.batch == nil { // it was refused, or its note could not be written
			continue
		}
		if e.batch.running--; e.batch.running == 0 {
			b.over = append(b.over, e.batch.id)
		}
	}
	return b, func() {
		for _, e := range begins {
			e.batch = nil
		}
		for _, e := range settles {
			if e.batch != nil {
				e.batch.running++
			}
		}
	}
}

func (l *ledger) recovered() {
	if l.failing.Swap(false) {
		l.log.Info("the ledger can be written again")
	}
}
