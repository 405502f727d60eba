//go:build postgres

// This file keeps a process among the replicas that share one PostgreSQL database: its heartbeat, the choice of the
// one that leads, and the offset between this machine's clock and the database's. It compares no clocks of two
// machines, has no SQL (store_postgres_replicas.go has it) and admits no call.
package main

import (
	"context"
	"database/sql"
	"errors"
	"sync/atomic"
	"time"
)

const (
	beatInterval = time.Second
	// leadershipTerm is how long after a heartbeat began this process may act as the leader.
	leadershipTerm = 3 * time.Second
	maxClockSample = 2 * time.Second // a round trip that takes longer says nothing about a clock
)

// A cluster is the part of a postgres that runs beside the calls. Times are since began, by the monotonic clock.
type cluster struct {
	db     *postgres
	began  time.Time
	now    func() time.Time // the machine's clock
	conn   *sql.Conn        // of db.lockDB, with the advisory locks; nil: they are not taken
	locked bool             // with that of the leader among them

	trouble  atomic.Pointer[string] // why no call may be admitted; nil: none
	leads    atomic.Int64           // nanoseconds until which this process leads
	offset   atomic.Int64           // milliseconds from this machine's clock to the database's
	roundMS  int64                  // of the round trip that offset was measured in
	offsetAt time.Duration          // when it was measured
}

// uptime returns the time since began.
func (c *cluster) uptime() time.Duration { return time.Since(c.began) }

// problem returns why no call may be admitted, "" if one may.
func (c *cluster) problem() string {
	if text := c.trouble.Load(); text != nil {
		return *text
	}
	return ""
}

// isLeader reports whether this process does what only one replica does. A process that works alone leads.
func (c *cluster) isLeader() bool {
	return !c.db.config.replicated || int64(c.uptime()) < c.leads.Load()
}

// limitNow returns the database's time in unix milliseconds, as far as it is known.
func (c *cluster) limitNow() int64 { return c.now().UnixMilli() + c.offset.Load() }

// watch sends heartbeats until ctx is done, and calls report when problem changes. The locks are lost with their
// connection. They are taken again, unless another process that works alone has them, or had them meanwhile: then the
// state in memory is out of date.
func (c *cluster) watch(ctx context.Context, report func(problem string)) {
	tick := time.NewTicker(beatInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var problem *string
		if err := c.beat(ctx); ctx.Err() != nil {
			return
		} else if err != nil {
			problem = new("the database is not available")
			if errors.Is(err, errFenced) {
				problem = new(errFenced.Error())
			}
		}
		if old := c.trouble.Swap(problem); (old == nil) != (problem == nil) {
			report(c.problem())
		}
	}
}

// beat sends a heartbeat. It returns an error if this process does not have its locks and cannot take them, and
// errFenced if it may not write any more.
func (c *cluster) beat(ctx context.Context) error {
	if c.conn == nil {
		if err := c.takeLock(ctx); err != nil {
			return err
		}
	}
	sent, before := c.uptime(), c.now()
	b, err := c.sendBeat(ctx)
	if err != nil {
		c.dropLocks()
		return err
	}
	if !b.open {
		c.leads.Store(0)
		return errFenced
	}
	c.compareClocks(before, c.uptime()-sent, b.at)
	if c.locked = b.leads; c.locked {
		c.leads.Store(int64(sent + leadershipTerm))
	}
	return nil
}

// dropLocks closes the connection with the locks.
func (c *cluster) dropLocks() {
	c.leads.Store(0)
	c.locked = false
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}

// compareClocks compares this machine's clock with the database's, which was at when half of a round trip that began
// at before was over. Of the measurements of a minute, the one with the shortest round trip counts, unless a clock
// was set since.
func (c *cluster) compareClocks(before time.Time, round time.Duration, at int64) {
	if round > maxClockSample {
		return
	}
	ms, up, offset := round.Milliseconds(), c.uptime(), at-before.Add(round/2).UnixMilli()
	drift := max(offset, c.offset.Load()) - min(offset, c.offset.Load())
	if ms > c.roundMS && c.offsetAt > 0 && up-c.offsetAt < time.Minute && drift <= ms+c.roundMS {
		return
	}
	c.roundMS, c.offsetAt = ms, up
	c.offset.Store(offset)
}
