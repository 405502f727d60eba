// This room keeps the notes of calls that begin: a row of the table begun for
// those that begin together, from before the first byte of their answers until
// the last of them has its own row; and what a start makes of notes that are left.
package main

import (
	"context"
	"fmt"
)

// A begunBatch is the calls that begin together, a row of begun. Until the writer
// takes it, it is guarded by the ledger's mu; then it is the writer's.
type begunBatch struct {
	id      int64  // the least of its calls'
	calls   []byte // as in begun, but for the last bracket
	size    int
	running int           // of its calls, those that have not ended
	written bool          // it is in the database
	err     error         // why it is not; readable once done
	done    chan struct{} // closed when that is settled
}

func (b *begunBatch) add(id int64, note []byte) {
	if b.size == 0 {
		b.id, b.calls = id, append(b.calls, '[')
	} else {
		b.id, b.calls = min(b.id, id), append(b.calls, ',')
	}
	b.calls = append(b.calls, note...)
	b.size++
	b.running++
}

// batchOf makes a batch of what was queued. It takes for granted that the batch
// will be written; undo takes that back.
func batchOf(begins *begunBatch, settles []*ledgerEntry, sums []*requestRow) (b ledgerBatch, undo func()) {
	b.sums = sums
	if begins != nil {
		begins.written = true
		b.begun, b.calls = begins.id, append(begins.calls, ']')
	}
	for _, e := range settles {
		b.records = append(b.records, &e.row)
		if at := e.batch; at != nil && at.written { // else it was refused, or its note could not be written
			if at.running--; at.running == 0 {
				b.over = append(b.over, at.id)
			}
		}
	}
	return b, func() {
		for _, e := range settles {
			if e.batch != nil && e.batch.written {
				e.batch.running++
			}
		}
		if begins != nil {
			begins.written = false
		}
	}
}

// abandon counts a call as ended that will have no row. If the last note of its
// batch cannot be taken back now, the next start makes a lost call of it.
func (l *ledger) abandon(b *begunBatch) {
	if b == nil || !b.written {
		return
	}
	if b.running--; b.running == 0 {
		_ = l.writer.write(context.Background(), ledgerBatch{over: []int64{b.id}})
	}
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
