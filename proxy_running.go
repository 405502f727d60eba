// This room knows the calls that are running, and watches them: one goroutine
// ends those whose token has withered, whose provider or client has fallen
// silent, or which have outlived a drain. All time limits on a call are here.
package main

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// A phase is what a call waits for.
type phase int32

const (
	phaseReading  phase = iota // the client's body
	phaseLedger                // its note's commit
	phaseProvider              // the first byte of the answer
	phaseRelaying              // the next bytes of the answer
	phaseWriting               // the client, to take bytes
)

var phaseNames = [...]string{"reading", "ledger", "provider", "relaying", "writing"}

const (
	watchEvery       = 100 * time.Millisecond
	drainGracePeriod = 5 * time.Second // for calls to end after they were cut
	refusedBodyGrace = time.Second     // for the rest of a body that nobody will read
)

// callLimits are what the watchdog holds calls to.
type callLimits struct {
	calls             int64 // at one time, of all tokens
	upstreamTimeout   time.Duration
	streamIdleTimeout time.Duration
	readWindow        time.Duration // in each of which a request body must bring
	readRate          float64       // so many bytes a second, or end
	clientStall       time.Duration // a client that takes no byte for so long is cut off
	ledgerPatience    time.Duration // for a note's commit
}

// newCallLimits returns the limits for three settings and what no one sets.
func newCallLimits(calls int64, upstreamTimeout, streamIdleTimeout time.Duration) callLimits {
	return callLimits{calls, upstreamTimeout, streamIdleTimeout, 30 * time.Second, 1 << 10, 60 * time.Second, 5 * time.Second}
}

// A watch is what the watchdog sees of a call. The call's goroutine writes it,
// the watchdog reads it.
type watch struct {
	phase    atomic.Int32
	since    atomic.Int64 // tick at which the phase began or last made progress
	received atomic.Int64 // bytes of the request body so far
	answered atomic.Int64 // bytes of the answer so far
	output   atomic.Int64 // tokens of a streamed answer so far, as far as one can tell

	idle atomic.Int64 // nanoseconds that the answer may pause, if the upstream has a time of its own

	windowAt    time.Time // of the watchdog alone: when the window for reading began,
	windowBytes int64     // and what had come by then
}

// runningCalls is the set of running calls. The zero value is not ready: use
// newRunningCalls.
type runningCalls struct {
	limits callLimits
	ticks  atomic.Int64 // time in units of watchEvery, cheap to read

	mu       sync.Mutex
	calls    map[*call]struct{}
	draining *apiError // not nil: new calls are refused with it
	wait     sync.WaitGroup
}

func newRunningCalls(l callLimits) *runningCalls {
	return &runningCalls{limits: l, calls: map[*call]struct{}{}}
}

// add puts c in, unless the program is draining.
func (rc *runningCalls) add(c *call) error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if rc.draining != nil {
		return rc.draining
	}
	if int64(len(rc.calls)) >= rc.limits.calls {
		return errUnavailable("too_many_calls", errors.New("MAX_CONCURRENT_CALLS are running"))
	}
	rc.calls[c] = struct{}{}
	rc.wait.Add(1)
	return nil
}

func (rc *runningCalls) remove(c *call) {
	rc.mu.Lock()
	delete(rc.calls, c)
	rc.mu.Unlock()
	rc.wait.Done()
}

// oldest returns the id of the oldest running call, 0 if none runs.
func (rc *runningCalls) oldest() int64 {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	var id int64
	for c := range rc.calls {
		if id == 0 || c.id < id {
			id = c.id
		}
	}
	return id
}

// phases counts the running calls by what they wait for.
func (rc *runningCalls) phases() (n [len(phaseNames)]int64) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for c := range rc.calls {
		n[c.watch.phase.Load()]++
	}
	return n
}

// enter notes that c now waits for something else, or has made progress.
func (rc *runningCalls) enter(c *call, p phase) {
	c.watch.phase.Store(int32(p))
	c.watch.since.Store(rc.ticks.Load())
}

// run watches until ctx is over.
func (rc *runningCalls) run(ctx context.Context) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			rc.ticks.Add(1)
			rc.look(now)
		}
	}
}

// look ends the calls that must not go on.
func (rc *runningCalls) look(now time.Time) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	ms := now.UnixMilli()
	for c := range rc.calls {
		if err := rc.verdict(c, now, ms); err != nil {
			c.end(err)
		}
	}
}

// verdict says why a call must end now, or nil.
func (rc *runningCalls) verdict(c *call, now time.Time, ms int64) *apiError {
	if why := c.token.validity(c.token.state.Load(), ms); why != "" {
		return errBadToken(why)
	}
	if p := c.token.project.state.Load(); !p.active {
		return errInactiveProject()
	}
	if c.admitted.Load() {
		if l := c.hold.progress(ms, c.watch.output.Load()); l != nil {
			return errSpent(l)
		}
	}
	at := phase(c.watch.phase.Load())
	if (at == phaseReading || c.uploading.Load()) && c.watch.tooSlow(now, c.start, &rc.limits) {
		return &apiError{status: http.StatusBadRequest, code: "request_too_slow", msg: "The request body arrived too slowly."}
	}
	idle := time.Duration(rc.ticks.Load()-c.watch.since.Load()) * watchEvery
	switch at {
	case phaseLedger:
		if idle > rc.limits.ledgerPatience {
			return errUnavailable("ledger_unavailable", errors.New("the ledger did not commit in time"))
		}
	case phaseProvider:
		if idle > rc.limits.upstreamTimeout {
			return &apiError{status: http.StatusGatewayTimeout, code: "upstream_timeout", msg: "The provider did not answer in time."}
		}
	case phaseRelaying:
		if most := time.Duration(c.watch.idle.Load()); idle > cmp.Or(most, rc.limits.streamIdleTimeout) {
			return &apiError{status: http.StatusGatewayTimeout, code: "stream_idle", msg: "The provider's answer paused for too long."}
		}
	case phaseWriting:
		if idle > rc.limits.clientStall {
			return &apiError{status: http.StatusRequestTimeout, code: "client_stalled", msg: "The client took no more of the answer."}
		}
	}
	return nil
}

// tooSlow reports whether a body has brought too little in a whole window. Not
// on average: a body that comes fast and then stops must not hold its memory
// for as long as its first part has earned.
func (w *watch) tooSlow(now, start time.Time, l *callLimits) bool {
	if w.windowAt.IsZero() {
		w.windowAt = start
	}
	if now.Sub(w.windowAt) < l.readWindow {
		return false
	}
	received := w.received.Load()
	slow := float64(received-w.windowBytes) < l.readRate*l.readWindow.Seconds()
	w.windowAt, w.windowBytes = now, received
	return slow
}

// drain refuses new calls from now on and waits for the running ones. When ctx
// ends it cuts them, and waits a little for their rows to be settled.
func (rc *runningCalls) drain(ctx context.Context) {
	stop := errUnavailable("draining", errors.New("shutting down"))
	rc.mu.Lock()
	rc.draining = stop
	rc.mu.Unlock()
	done := make(chan struct{})
	go func() { rc.wait.Wait(); close(done) }() // ends with the last call; the program ends soon after in any case
	select {
	case <-done:
		return
	case <-ctx.Done():
	}
	again := time.NewTicker(watchEvery) // a call may have begun to wait for its client just after it was cut
	defer again.Stop()
	for giveUp := time.After(drainGracePeriod); ; {
		rc.mu.Lock()
		for c := range rc.calls {
			c.end(stop)
		}
		rc.mu.Unlock()
		select {
		case <-done:
			return
		case <-giveUp:
			return
		case <-again.C:
		}
	}
}

// isDraining reports whether new calls are refused.
func (rc *runningCalls) isDraining() bool {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	return rc.draining != nil
}

// errSpent ends a running call whose budget was passed.
func errSpent(l *limit) *apiError {
	return &apiError{status: http.StatusTooManyRequests, code: "project_spend_limit_exceeded", kind: "insufficient_quota", noRetry: true, limit: l.String(),
		msg: "The limit of " + l.String() + " is spent, and the call was ended."}
}

func errInactiveProject() *apiError {
	return &apiError{status: http.StatusForbidden, code: "project_inactive", msg: "This token's project is not active. Ask its administrator."}
}
