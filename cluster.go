//go:build postgres

// This file keeps a process among the replicas that share one PostgreSQL database. It sends heartbeats, puts the
// changes of other replicas in force, answers their questions, compares this machine's clock with the database's, and
// on the one replica that leads, closes those that have died. It compares no clocks of two machines, has no SQL
// (store_postgres_replicas.go has it), and admits no call.
package main

import (
	"context"
	"database/sql"
	"errors"
	"maps"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	beatInterval   = time.Second
	changeInterval = 500 * time.Millisecond // between two looks for changes; a notification is faster
	// leadershipTerm is how long after a heartbeat began this process may act as the leader.
	leadershipTerm = 3 * time.Second
	maxClockSample = 2 * time.Second // a round trip that takes longer says nothing about a clock
	clockWarning   = time.Minute     // an offset that the log warns of
	changePage     = 500             // changes that are read at once
	healthLooks    = 10              // one of so many looks merges the health of upstreams even if all are healthy
	maxAnswering   = 8               // questions that are answered at the same time; others are not
)

// A cluster is the part of a postgres that runs beside the calls. Times are since began, by the monotonic clock.
type cluster struct {
	db    *postgres
	hooks *replicaHooks
	began time.Time
	now   func() time.Time // the machine's clock

	// Used by the goroutine of the heartbeats.
	conn        *sql.Conn // of db.lockDB, with the advisory locks; nil: they are not taken
	locked      bool      // with that of the leader among them
	roundMS     int64     // of the round trip in which offset was measured
	offsetAt    time.Duration
	clockWarned bool

	// Used by the goroutine of the changes.
	lastSeq   int64 // of the audit trail, up to which changes are in force
	looks     int64 // for changes
	unhealthy bool  // at the last look, the database had upstreams that are not healthy

	rank          atomic.Pointer[replicaRank]
	beatTrouble   atomic.Pointer[string] // why no call may be admitted; nil: none
	changeTrouble atomic.Pointer[string]
	heard         atomic.Int64 // nanoseconds: when the last successful look for changes began
	leads         atomic.Int64 // nanoseconds until which this process leads
	interrupted   atomic.Int64 // how many heartbeats have failed
	offset        atomic.Int64 // milliseconds from this machine's clock to the database's
	databaseBegan atomic.Int64 // the database's time at began, in unix milliseconds
	questions     atomic.Int64 // that this process has asked

	mu  sync.Mutex
	own map[int64]string // the MACs of audit entries that this process has written, by seq
}

func newCluster(p *postgres) *cluster {
	c := &cluster{db: p, began: time.Now(), now: p.config.clock, own: map[int64]string{}}
	if c.now == nil {
		c.now = time.Now
	}
	c.databaseBegan.Store(c.now().UnixMilli()) // until it is compared
	c.rank.Store(&replicaRank{0, 1})
	return c
}

// uptime returns the time since began.
func (c *cluster) uptime() time.Duration { return time.Since(c.began) }

// problem returns why no call may be admitted, "" if one may.
func (c *cluster) problem() string {
	for _, trouble := range [...]*atomic.Pointer[string]{&c.beatTrouble, &c.changeTrouble} {
		if text := trouble.Load(); text != nil {
			return *text
		}
	}
	if c.db.config.replicated && c.sinceHeard() > c.db.config.staleLimit {
		return "the database has not answered for longer than STALE_LIMIT"
	}
	return ""
}

// sinceHeard returns how old the changes may be that this process does not know.
func (c *cluster) sinceHeard() time.Duration { return c.uptime() - time.Duration(c.heard.Load()) }

// isLeader reports whether this process does what only one replica does. A process that works alone leads.
func (c *cluster) isLeader() bool {
	return !c.db.config.replicated || int64(c.uptime()) < c.leads.Load()
}

// status is backend.status.
func (c *cluster) status() replicaInfo {
	return replicaInfo{LagMS: c.sinceHeard().Milliseconds(), OffsetMS: c.offset.Load(), Leader: c.isLeader()}
}

// limitNow returns the database's time in unix milliseconds, as far as it is known. It does not change when this
// machine's clock is set.
func (c *cluster) limitNow() int64 { return c.databaseBegan.Load() + c.uptime().Milliseconds() }

// watch keeps this process among the replicas until ctx is done.
func (c *cluster) watch(ctx context.Context, hooks *replicaHooks) {
	c.hooks = hooks
	var parts sync.WaitGroup
	defer parts.Wait()
	if c.db.config.replicated {
		parts.Go(func() { c.follow(ctx) })
		parts.Go(func() { c.lead(ctx) })
	}
	c.sendBeats(ctx)
}

// sendBeats sends heartbeats until ctx is done, and reports when problem changes. The locks are lost with their
// connection. They are taken again, unless another process that works alone has them, or had them meanwhile: then the
// state in memory is out of date.
func (c *cluster) sendBeats(ctx context.Context) {
	tick := time.NewTicker(beatInterval)
	defer tick.Stop()
	reported := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := c.beat(ctx)
		if err != nil && !errors.Is(err, errFenced) && ctx.Err() == nil {
			err = c.beat(ctx) // perhaps only the connection was lost
		}
		if ctx.Err() != nil {
			return
		}
		c.beatTrouble.Store(describeTrouble(err))
		if problem := c.problem(); (problem == "") != (reported == "") {
			c.hooks.report(problem)
			reported = problem
		}
		if errors.Is(err, errFenced) && c.db.config.replicated {
			c.hooks.fenced()
			return
		}
	}
}

// describeTrouble says why no call may be admitted after err, nil if that is nil.
func describeTrouble(err error) *string {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errFenced):
		return new(errFenced.Error())
	}
	return new("the database is not available")
}

// beat sends a heartbeat. It returns an error if this process does not have its locks and cannot take them, and
// errFenced if it may not write any more.
func (c *cluster) beat(ctx context.Context) error {
	if c.conn == nil {
		if err := c.takeLock(ctx); err != nil {
			c.interrupted.Add(1)
			return err
		}
	}
	info := c.status()
	if c.hooks != nil {
		c.hooks.describe(&info)
	}
	sent, before := c.uptime(), c.now()
	b, err := c.sendBeat(ctx, &info)
	if err != nil {
		c.interrupted.Add(1)
		c.dropLocks()
		return err
	}
	if !b.open {
		c.dropLocks() // another one leads
		return errFenced
	}
	c.compareClocks(before, sent, c.uptime()-sent, b.at)
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
		discardConn(c.conn)
		c.conn = nil
	}
}

// compareClocks compares this machine's clocks with the database's, which was at when half of a round trip was over
// that began at before, or sent since began. Of the measurements of a minute, the one with the shortest round trip
// counts, unless a clock was set since.
func (c *cluster) compareClocks(before time.Time, sent, round time.Duration, at int64) {
	if round > maxClockSample {
		return
	}
	ms, up, offset := round.Milliseconds(), c.uptime(), at-before.Add(round/2).UnixMilli()
	databaseBegan := at - (sent + round/2).Milliseconds()
	drift := max(distance(offset, c.offset.Load()), distance(databaseBegan, c.databaseBegan.Load()))
	if ms > c.roundMS && c.offsetAt > 0 && up-c.offsetAt < time.Minute && drift <= ms+c.roundMS {
		return
	}
	c.roundMS, c.offsetAt = ms, up
	c.offset.Store(offset)
	c.databaseBegan.Store(databaseBegan)
	warn := max(offset, -offset) > clockWarning.Milliseconds()
	if warn && !c.clockWarned && c.hooks != nil {
		c.hooks.warn("this machine's clock differs from the database's; limits count by the database's",
			"milliseconds", offset)
		c.clockWarned = true
	}
	c.clockWarned = c.clockWarned && warn
}

func distance(a, b int64) int64 { return max(a, b) - min(a, b) }

// follow puts changes in force until ctx is done.
func (c *cluster) follow(ctx context.Context) {
	notifications, stop := c.db.listen(c.db.channel())
	defer stop()
	tick := time.NewTicker(changeInterval)
	defer tick.Stop()
	var answers sync.WaitGroup
	defer answers.Wait()
	busy := make(chan struct{}, maxAnswering)
	for {
		err := c.catchUp(ctx)
		if ctx.Err() != nil {
			return
		}
		c.changeTrouble.Store(describeTrouble(err))
		for wait := true; wait; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				wait = false
			case text := <-notifications:
				kind, rest, _ := strings.Cut(text, " ")
				switch kind {
				case "change", "": // "" after the connection was lost
					wait = false
				case "recall":
					c.hooks.recall(rest)
				case "question":
					select {
					case busy <- struct{}{}:
						answers.Go(func() { c.answerQuestion(ctx, rest); <-busy })
					default: // the one who asks sees that this replica did not answer
					}
				}
			}
		}
	}
}

// catchUp puts in force what has changed since the last time, and takes over the stored health of upstreams.
func (c *cluster) catchUp(ctx context.Context) error {
	began := c.uptime()
	mergeHealth := c.unhealthy || c.looks%healthLooks == 0
	c.looks++
	for more := true; more; {
		changes, anyUnhealthy, err := c.changesAfter(ctx, c.lastSeq, changePage)
		if err != nil {
			return err
		}
		mergeHealth, c.unhealthy = mergeHealth || anyUnhealthy, anyUnhealthy
		if more = len(changes) == changePage; len(changes) == 0 {
			break
		}
		if err := c.hooks.apply(ctx, changes); err != nil {
			return err
		}
		c.lastSeq = changes[len(changes)-1].seq
		c.forgetOwn(c.lastSeq)
	}
	if mergeHealth { // most of the time there is nothing to merge, and each look would cost another transaction
		rows, err := c.db.store.listUnhealthy(ctx)
		if err != nil {
			return err
		}
		c.hooks.mergeHealth(rows)
	}
	c.heard.Store(int64(began))
	return nil
}

// rememberOwn records the MAC of an entry of the audit trail that this process is about to commit. If the transaction
// fails, another process may write an entry with this seq, which has another MAC.
func (c *cluster) rememberOwn(seq int64, mac []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.own[seq] = string(mac)
}

// disown forgets an entry whose transaction has failed. If it is committed all the same, this process puts the change
// in force as one of another, which leaves nothing out.
func (c *cluster) disown(seq int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.own, seq)
}

// isOwn reports whether this process has written an entry of the audit trail.
func (c *cluster) isOwn(seq int64, mac []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.own[seq] == string(mac)
}

// forgetOwn forgets the MACs of entries up to seq.
func (c *cluster) forgetOwn(seq int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.own, func(s int64, _ string) bool { return s <= seq })
}

// answerQuestion answers the question in a notification: its id, the replica that asks, what is asked for, and an
// argument.
func (c *cluster) answerQuestion(ctx context.Context, text string) {
	id, rest, _ := strings.Cut(text, " ")
	asker, rest, _ := strings.Cut(rest, " ")
	if asker == strconv.FormatInt(c.db.replica, 10) {
		return
	}
	question, argument, _ := strings.Cut(rest, " ")
	ctx, cancel := context.WithTimeout(ctx, maxAnswerTime)
	defer cancel()
	answer, err := c.hooks.answer(ctx, question, argument)
	if err == nil {
		err = c.storeAnswer(ctx, id, answer)
	}
	if err != nil && ctx.Err() == nil {
		c.hooks.warn("a question of another replica could not be answered", "question", question, "error", err)
	}
}

// setRank finds this replica's rank among those that are open, of which others has the rest.
func (c *cluster) setRank(others map[int64]int64) {
	rank := &replicaRank{0, 1 + int64(len(others))}
	for id := range others {
		if id < c.db.replica {
			rank.index++
		}
	}
	c.rank.Store(rank)
}

// A peerWatch is what this process has seen of the other replicas.
type peerWatch struct {
	peers       map[int64]peer
	interrupted int64         // cluster.interrupted
	looked      time.Duration // when it looked last
}

// A peer is another replica: its last heartbeat, and for how long this process has seen no other.
type peer struct {
	beat   int64
	silent time.Duration
}

// maxSilence is how much of the time between two looks a replica can have been silent: if it was longer, this process
// was frozen, and perhaps the others on its machine with it.
const maxSilence = 3 * beatInterval / 2

// lead watches the other replicas until ctx is done. It closes those whose heartbeat has not changed for
// REPLICA_TIMEOUT, by this process's monotonic clock and while its own heartbeats succeeded. The leader does that; the
// others wait longer, for the leader itself may be frozen. The leader also recovers the calls of closed replicas. Each
// step can be repeated.
func (c *cluster) lead(ctx context.Context) {
	tick := time.NewTicker(beatInterval)
	defer tick.Stop()
	w := peerWatch{peers: map[int64]peer{}}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		timeout, leads := c.db.config.replicaTimeout, c.isLeader()
		if !leads {
			timeout += leadershipTerm
		}
		if err := c.closeDead(ctx, &w, timeout); err != nil && ctx.Err() == nil {
			clear(w.peers)
			c.hooks.warn("replicas that do not answer could not be looked for, or not be closed", "error", err)
			continue
		}
		if !leads {
			continue
		}
		if err := c.hooks.recoverCalls(ctx); err != nil && ctx.Err() == nil {
			c.hooks.warn("calls of a closed replica could not be recorded as lost", "error", err)
		}
	}
}

// closeDead looks at the heartbeats, and closes the replicas whose heartbeat has not changed for timeout.
func (c *cluster) closeDead(ctx context.Context, w *peerWatch, timeout time.Duration) error {
	if n := c.interrupted.Load(); n != w.interrupted {
		clear(w.peers) // what was not seen meanwhile says nothing
		w.interrupted = n
	}
	now := c.uptime()
	passed := min(now-w.looked, maxSilence)
	w.looked = now
	beats, err := c.readBeats(ctx)
	if err != nil {
		return err
	}
	c.setRank(beats)
	maps.DeleteFunc(w.peers, func(id int64, _ peer) bool { _, open := beats[id]; return !open })
	for id, beat := range beats {
		seen, known := w.peers[id]
		if !known || seen.beat != beat {
			w.peers[id] = peer{beat: beat}
			continue
		}
		seen.silent += passed
		if w.peers[id] = seen; seen.silent < timeout {
			continue
		}
		closed, err := c.closeReplica(ctx, id, beat)
		if err != nil {
			return err
		}
		if closed {
			c.hooks.warn("a replica has not sent a heartbeat for REPLICA_TIMEOUT: it is closed, and its calls are lost",
				"replica", id)
		}
	}
	return nil
}
