// This room is the durable record of calls: begin, settle, group commit,
// recovery, retention. One goroutine writes; it takes whatever is queued and
// commits it as one transaction. It never drops what it was given: when the
// database fails it keeps the rows, tries again, and says so (healthy), so that
// calls are refused until it works.
package main

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"strconv"
	"strings"
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

// A ledgerEntry is one call's row on its way. begin is written by the caller
// before it is queued, final before it is settled, and neither after.
type ledgerEntry struct {
	begin, final requestRow
	begun        chan error // gets one value: nil when begin is committed
	written      bool       // of the writer: begin is in the database
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
	flushing    bool
	closing     bool

	wake    chan struct{}
	done    chan struct{}
	pending atomic.Int64 // queued or being written
	failing atomic.Bool
}

// openLedger recovers what a dead process left open, then starts the writer.
// price fills in the cost of a lost row.
func openLedger(ctx context.Context, st *store, log *slog.Logger, price func(*requestRow)) (*ledger, error) {
	var from int64
	if v, err := st.setting(ctx, "ledger_open_from"); err == nil {
		if from, err = strconv.ParseInt(v, 10, 64); err != nil {
			from = 0
		}
	} else if !errors.Is(err, errNotFound) {
		return nil, err
	}
	total := 0
	for {
		n, next, err := st.recoverLost(ctx, from, 1000, price)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		total, from = total+n, next
	}
	if total > 0 {
		log.Warn("calls were running when the program died; their rows are now lost ones, with estimates", "rows", total)
	}
	// What was noted may lie ahead, if the clock has been set back since: rows
	// that are opened from now on must not be missed by the next start.
	if err := st.setSetting(ctx, "ledger_open_from", strconv.FormatInt(openFrom(time.Now()), 10)); err != nil {
		return nil, err
	}
	l := &ledger{store: st, writer: st.newLedgerWriter(), log: log, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go l.run()
	return l, nil
}

// begin queues a row and returns at once; wait on e.begun. The row is written
// in parallel with the call to the provider.
func (l *ledger) begin(row *requestRow) *ledgerEntry {
	e := &ledgerEntry{begin: *row, begun: make(chan error, 1)}
	l.pending.Add(1)
	l.mu.Lock()
	l.begins = append(l.begins, e)
	l.mu.Unlock()
	l.kick()
	return e
}

// settle queues how a begun call ended.
func (l *ledger) settle(e *ledgerEntry, row *requestRow) {
	e.final = *row
	l.pending.Add(1)
	l.mu.Lock()
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
	l.pending.Add(1)
	l.mu.Lock()
	if len(l.settles)+len(l.sums) == 0 {
		l.firstSettle = time.Now()
	}
	if row {
		l.settles = append(l.settles, &ledgerEntry{final: *r})
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

// healthy reports whether the last write succeeded. While it did not, no call
// may be admitted: it could not be put on record.
func (l *ledger) healthy() bool { return !l.failing.Load() }

// settled reports whether everything the ledger was given is in the database.
func (l *ledger) settled() bool { return l.pending.Load() == 0 }

// flush returns when all that was queued before is committed, or ctx is over.
func (l *ledger) flush(ctx context.Context) error {
	for !l.settled() {
		l.mu.Lock()
		l.flushing = true
		l.mu.Unlock()
		l.kick()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
	return nil
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
		begins, settles, sums, wait, closing := l.take()
		if len(begins)+len(settles)+len(sums) > 0 {
			l.write(begins, settles, sums)
			if l.failing.Load() && !l.pause(retryDelay) {
				return
			}
			// Where the processors are busy, all who are ready to run go first,
			// and what they begin makes a larger batch: much of a transaction's
			// cost is the same for one row and for fifty.
			runtime.Gosched()
			continue
		}
		if closing {
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
		timer.Reset(wait)
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

// take empties the queues: all begins, and the settled rows when they have
// waited long enough or are many.
func (l *ledger) take() (begins, settles []*ledgerEntry, sums []*requestRow, wait time.Duration, closing bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	begins, l.begins = l.begins, nil
	wait = time.Hour
	if n := len(l.settles) + len(l.sums); n > 0 {
		age := time.Since(l.firstSettle)
		if n >= settleBatch || age >= settleDelay || l.flushing || l.closing {
			settles, l.settles = l.settles, nil
			sums, l.sums = l.sums, nil
			l.flushing = false
		} else {
			wait = settleDelay - age
		}
	}
	return begins, settles, sums, wait, l.closing
}

// write commits one batch. If it cannot, the begins are told so, since their
// callers wait, and the rest goes back into the queue.
func (l *ledger) write(begins, settles []*ledgerEntry, sums []*requestRow) {
	err := l.writer.write(context.Background(), batchOf(begins, settles, sums))
	if err == nil {
		l.recovered()
		l.finish(begins, nil, len(settles)+len(sums))
		return
	}
	for _, e := range begins {
		e.written = false
	}
	switch {
	case !refusedRow(err):
		if !l.failing.Swap(true) {
			l.log.Error("the ledger cannot be written; calls are refused until it can", "error", err)
		}
		l.mu.Lock()
		l.settles = append(settles, l.settles...)
		l.sums = append(sums, l.sums...)
		l.mu.Unlock()
		l.finish(begins, err, 0)
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
			l.log.Error("the database refuses a ledger row; it stands in this line instead", "error", err,
				"id", requestID(e.final.id), "token", e.final.token, "outcome", string(e.final.outcome),
				"input_tokens", e.final.counts.input, "output_tokens", e.final.counts.output)
		}
		l.finish(begins, err, len(settles)+len(sums))
	}
}

// finish answers the callers that wait for begins, and counts what is done.
func (l *ledger) finish(begins []*ledgerEntry, err error, others int) {
	for _, e := range begins {
		e.begun <- err
	}
	l.pending.Add(-int64(len(begins) + others))
}

// batchOf sorts what was queued. A settled row whose begin is not in the
// database is written whole.
func batchOf(begins, settles []*ledgerEntry, sums []*requestRow) ledgerBatch {
	b := ledgerBatch{sums: sums}
	for _, e := range begins {
		b.begins = append(b.begins, &e.begin)
		e.written = true // taken back if the batch fails
	}
	for _, e := range settles {
		if e.written {
			b.settles = append(b.settles, &e.final)
		} else {
			b.records = append(b.records, &e.final)
		}
	}
	return b
}

func (l *ledger) recovered() {
	if l.failing.Swap(false) {
		l.log.Info("the ledger can be written again")
	}
}

// keepHouse runs until ctx is over: it notes from where on rows may be open
// (oldest returns the id of the oldest running call, 0 if none runs), and lets
// rows older than retention go in small steps between which calls are written.
func (l *ledger) keepHouse(ctx context.Context, retention time.Duration, oldest func() int64, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	var sumsForgotten time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		from := openFrom(now)
		if id := oldest(); id != 0 && id < from {
			from = id
		}
		if l.settled() {
			if err := l.store.setSetting(ctx, "ledger_open_from", strconv.FormatInt(from, 10)); err != nil && ctx.Err() == nil {
				l.log.Error("noting the oldest open call", "error", err)
			}
		}
		l.forget(ctx, func() (int64, error) { return l.store.forgetRequests(ctx, firstID(now.Add(-retention)), 200) })
		if now.Sub(sumsForgotten) >= time.Hour &&
			l.forget(ctx, func() (int64, error) { return l.store.forgetSums(ctx, now.Add(-hourSumsKept).UnixMilli(), 20) }) {
			sumsForgotten = now // no hour ends before the next one
		}
	}
}

// hourSumsKept is how long sums by hour and token are kept; those by day, and
// those of whole projects, stay.
const hourSumsKept = 100 * 24 * time.Hour

// forget lets rows go in steps until step says that none are left, or for so
// many steps that the next tick should go on. It reports whether none are left.
func (l *ledger) forget(ctx context.Context, step func() (int64, error)) bool {
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

// An idSource makes the ids of calls: 42 bits of unix milliseconds, 9 of a
// number that tells replicas apart, 12 that count. They grow all the time, even
// when the clock goes back.
type idSource struct {
	mu   sync.Mutex
	node int64
	last int64
}

const idTimeShift = 21

// newIDSource makes ids above last, the highest there is.
func newIDSource(last int64) *idSource { return &idSource{node: rand.Int64N(512) << 12, last: last} }

func (s *idSource) next(now time.Time) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := now.UnixMilli()<<idTimeShift | s.node
	if id <= s.last {
		id = s.last + 1
		if id&0xfff == 0 { // 4096 in a millisecond: borrow from the next
			id = (s.last>>idTimeShift+1)<<idTimeShift | s.node
		}
	}
	s.last = id
	return id
}

// openFrom returns an id below those of calls that begin now: they are listed
// a moment after they have taken it.
func openFrom(now time.Time) int64 { return firstID(now.Add(-time.Minute)) }

// firstID returns the least id that a call begun at t can have.
func firstID(t time.Time) int64 { return t.UnixMilli() << idTimeShift }

const crockford = "0123456789abcdefghjkmnpqrstvwxyz"

// requestID writes a call's id as clients see it; parseRequestID reads it back,
// 0 if it is none.
func requestID(id int64) string {
	out := []byte("req_0000000000000")
	for i := len(out) - 1; i >= 4; i-- {
		out[i] = crockford[id&31]
		id >>= 5
	}
	return string(out)
}

func parseRequestID(s string) int64 {
	digits, ok := strings.CutPrefix(s, "req_")
	if !ok || len(digits) != 13 || digits[0] > '7' {
		return 0
	}
	var id int64
	for _, r := range digits {
		i := strings.IndexRune(crockford, r)
		if i < 0 {
			return 0
		}
		id = id<<5 | int64(i)
	}
	return id
}
