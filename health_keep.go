// This room keeps the health of provider keys through a restart, and tells the
// log of each change. It decides nothing.
package main

import (
	"context"
	"log/slog"
	"time"
)

// openHealth returns what is known of the keys that were not well when the last
// process ended.
func openHealth(ctx context.Context, st *store) (*healthBook, error) {
	rows, err := st.allHealth(ctx)
	if err != nil {
		return nil, err
	}
	book := newHealthBook()
	for _, r := range rows {
		if now := time.Now().UnixMilli(); r.changedAt > now { // the clock was set back
			r.changedAt, r.until = now, now
		}
		if r.state != keyReady { // a name that this version does not know
			book.restore(r)
		}
	}
	return book, nil
}

// keepHealth stores changes as they come, until ctx is over. What cannot be
// stored holds in memory all the same, and is tried again.
func (s *server) keepHealth(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			s.storeHealth(context.WithoutCancel(ctx))
			return
		case <-s.health.wake:
		}
		if !s.storeHealth(context.WithoutCancel(ctx)) { // a statement that is cut short costs the connection
			select {
			case <-ctx.Done():
			case <-time.After(retryDelay):
			}
		}
	}
}

// storeHealth stores the changes there are, and reports whether all were.
func (s *server) storeHealth(ctx context.Context) bool {
	all := true
	for _, h := range s.health.changes() {
		now := time.Now().UnixMilli()
		row := h.row(now)
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := s.store.setHealth(ctx, now, &row, h.told)
		cancel()
		if err != nil {
			all = false
			s.health.note(h)
			s.log.Warn("the health of an upstream cannot be stored", "upstream", row.id, "error", err)
			continue
		}
		h.told = keyReady // or in a pause that ends by itself, which the trail has not
		if row.state.serious() {
			h.told = row.state
		}
		level := slog.LevelWarn // the provider's trouble, or the key's
		if row.state == keyReady {
			level = slog.LevelInfo
		}
		line := []any{"upstream", row.id, "state", row.state.String()}
		if row.state != keyReady {
			line = append(line, "reason", row.reason, "until", time.UnixMilli(row.until).UTC().Format(time.RFC3339))
		}
		s.log.Log(ctx, level, "the health of an upstream has changed", line...)
	}
	return all
}
