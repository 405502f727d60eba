// This room lets go of what the ledger need not keep: calls that are too old or
// too many for the disk, their content, sums by the hour. It works in small steps
// beside the calls.
package main

import (
	"context"
	"time"
)

// A retention is how long and how much is kept.
type retention struct {
	age   time.Duration // of single calls
	bytes int64         // that the database may have in use; 0: no limit
}

// keepHouse runs until ctx is over, and lets what is too old or too much go, in
// small steps between which calls are written.
func (l *ledger) keepHouse(ctx context.Context, keep retention, every time.Duration) {
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
		l.forget(ctx, func() (int64, error) { return l.store.forgetContents(ctx, now.UnixMilli(), 20) })
		l.forget(ctx, func() (int64, error) { return l.store.forgetRequests(ctx, firstID(now.Add(-keep.age)), 200) })
		if over := l.shrink(ctx, keep.bytes, firstID(now.Add(-sizeSpares))); over > 0 && now.Sub(told) >= time.Hour {
			told = now
			l.log.Warn("the database is larger than MAX_DATABASE_BYTES without any single calls that could go: sums, tokens and the audit trail stay",
				"bytes_over", over)
		}
		if now.Sub(sumsForgotten) >= time.Hour &&
			l.forget(ctx, func() (int64, error) { return l.store.forgetSums(ctx, now.Add(-hourSumsKept).UnixMilli(), 20) }) &&
			l.forget(ctx, func() (int64, error) { return l.store.forgetHours(ctx, now.Add(-hoursKept).UnixMilli(), 20) }) {
			sumsForgotten = now // no hour ends before the next one
		}
	}
}

// hourSumsKept is how long sums by hour and token are kept; those by day, and
// those of whole projects, stay.
const hourSumsKept = 100 * 24 * time.Hour

// hoursKept is how long the hours of projects are kept: the dashboard's longest
// period, and the one before it.
const hoursKept = 190 * 24 * time.Hour

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

// sizeSpares is how long calls are kept whatever they take.
const sizeSpares = time.Hour

// shrink lets what is kept of calls' content go, then the oldest calls, those
// with an id below before, while the
// database has more than most bytes in use, until it is a twentieth below that,
// so that it does not begin again at once. Freed pages stay in the file, which
// does not shrink, and take the rows to come. It returns how much is too much
// with no call left to let go; 0 most is no limit.
func (l *ledger) shrink(ctx context.Context, most, before int64) (over int64) {
	used := func() (int64, error) {
		all, free, err := l.store.size(ctx)
		return all - free, err
	}
	if n, err := used(); most == 0 || err != nil || n <= most {
		return 0
	}
	none := l.forget(ctx, func() (int64, error) {
		if n, err := used(); err != nil || n <= most-most/20 {
			return 0, err
		}
		if n, err := l.store.dropOldContents(ctx, 20); n > 0 || err != nil {
			return n, err
		}
		return l.store.forgetRequests(ctx, before, 200)
	})
	n, err := used()
	if !none || err != nil {
		return 0
	}
	return max(n-most, 0)
}
