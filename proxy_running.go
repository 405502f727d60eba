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
	watchInterval    = 100 * time.Millisecond
	drainGracePeriod = 5 * time.Second // for calls to end after they were cut
	refusedBodyGrace = time.Second     // for the rest of a body that nobody will read
)

// callLimits are what the watchdog holds calls to.
type callLimits struct {
	maxCalls           int64 // at one time, of all tokens
	upstreamTimeout    time.Duration
	streamIdleTimeout  time.Duration
	readWindow         time.Duration // in each of which a request body must bring
	minReadRate        float64       // so many bytes a second, or end
	clientStallTimeout time.Duration // a client that takes no byte for so long is cut off
	commitTimeout      time.Duration // for a note's commit
}

// newCallLimits returns the limits for three settings and what no one sets.
func newCallLimits(calls int64, upstreamTimeout, streamIdleTimeout time.Duration) callLimits {
	return callLimits{calls, upstreamTimeout, streamIdleTimeout, 30 * time.Second, 1 << 10, 60 * time.Second, 5 * time.Second}
}

// A runningCall is the part of a call that other goroutines may use: the watchdog, /manage
// and a drain. The first group is set before the call is added to runningCalls.
type runningCall struct {
	ticks      *atomic.Int64 // of runningCalls
	id         int64
	start      time.Time
	token      *liveToken
	controller *http.ResponseController
	cancel     context.CancelCauseFunc

	progress callProgress
	info     atomic.Pointer[callInfo] // nil until the call is admitted
}

// A callInfo describes an admitted call. A published one never changes.
type callInfo struct {
	requestID   string
	address     string
	project     *projectState
	token       *tokenState
	endpoint    *endpoint
	model       string // as asked for
	stream      bool
	upstream    *upstream    // of the current attempt
	inputTokens int64        // an estimate
	reservation *reservation // guarded by its limiter
}

// callProgress says how far a call has come. The call's goroutine writes it, others
// read it.
type callProgress struct {
	phase         atomic.Int32
	since         atomic.Int64 // tick at which the phase began or last made progress
	uploading     atomic.Bool  // the request body is being streamed and has not ended
	bytesReceived atomic.Int64 // bytes of the request body so far
	bytesRelayed  atomic.Int64 // bytes of the answer so far
	outputTokens  atomic.Int64 // an estimate of the tokens of a streamed answer so far
	idleTimeout   atomic.Int64 // nanoseconds the answer may pause; 0: the setting for all upstreams

	windowStart time.Time // for the watchdog alone: when the current window for reading began,
	windowBytes int64     // and how many bytes had come by then
}

// setPhase records that the call waits for something else now, or has made progress.
func (c *runningCall) setPhase(p phase) {
	c.progress.phase.Store(int32(p))
	c.progress.since.Store(c.ticks.Load())
}

// abort makes the call stop with why, from another goroutine.
func (c *runningCall) abort(why *apiError) {
	c.cancel(why)
	at := phase(c.progress.phase.Load())
	// Reads and writes of the client's connection do not look at the context. While an
	// upload runs, the transport reads it, and waits for that read when it closes the body.
	if at == phaseReading || c.progress.uploading.Load() {
		_ = c.controller.SetReadDeadline(time.Unix(1, 0))
	}
	if at == phaseWriting {
		_ = c.controller.SetWriteDeadline(time.Unix(1, 0))
	}
}

// runningCalls is the set of running calls. The zero value is not ready: use
// newRunningCalls.
type runningCalls struct {
	limits callLimits
	ticks  atomic.Int64 // time in units of watchInterval, cheap to read

	mu       sync.Mutex
	calls    map[*runningCall]struct{}
	drainErr *apiError // not nil: new calls are refused with it
	wait     sync.WaitGroup
}

func newRunningCalls(l callLimits) *runningCalls {
	return &runningCalls{limits: l, calls: map[*runningCall]struct{}{}}
}

// add puts c in, unless the program is draining.
func (rc *runningCalls) add(c *runningCall) error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if rc.drainErr != nil {
		return rc.drainErr
	}
	if int64(len(rc.calls)) >= rc.limits.maxCalls {
		return errTooManyCalls()
	}
	rc.calls[c] = struct{}{}
	rc.wait.Add(1)
	return nil
}

func (rc *runningCalls) remove(c *runningCall) {
	rc.mu.Lock()
	delete(rc.calls, c)
	rc.mu.Unlock()
	rc.wait.Done()
}

// oldestID returns the id of the oldest running call, 0 if none runs.
func (rc *runningCalls) oldestID() int64 {
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

// snapshot counts the running calls by phase.
func (rc *runningCalls) snapshot() runningSnapshot {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	s := runningSnapshot{phases: make([]phaseCount, len(phaseNames)), draining: rc.drainErr != nil}
	for i, name := range phaseNames {
		s.phases[i].phase = name
	}
	for c := range rc.calls {
		s.phases[c.progress.phase.Load()].calls++
	}
	return s
}

// run watches until ctx is over.
func (rc *runningCalls) run(ctx context.Context) {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			rc.ticks.Add(1)
			rc.enforce(now)
		}
	}
}

// enforce ends the calls that must not go on.
func (rc *runningCalls) enforce(now time.Time) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	ms := now.UnixMilli()
	for c := range rc.calls {
		if err := rc.abortReason(c, now, ms); err != nil {
			c.abort(err)
		}
	}
}

// abortReason says why a call must end now, or nil.
func (rc *runningCalls) abortReason(c *runningCall, now time.Time, ms int64) *apiError {
	if why := c.token.validity(c.token.state.Load(), ms); why != "" {
		return errBadToken(why)
	}
	if p := c.token.project.state.Load(); !p.active {
		return errInactiveProject
	}
	if info := c.info.Load(); info != nil {
		if l := info.reservation.updateUsage(ms, c.progress.outputTokens.Load()); l != nil {
			return errQuotaSpent(l.String(), "The limit of "+l.String()+" is used up, so the proxy ended the call.")
		}
	}
	at := phase(c.progress.phase.Load())
	if (at == phaseReading || c.progress.uploading.Load()) && c.progress.tooSlow(now, c.start, &rc.limits) {
		return errRequestTooSlow
	}
	idle := time.Duration(rc.ticks.Load()-c.progress.since.Load()) * watchInterval
	switch at {
	case phaseLedger:
		if idle > rc.limits.commitTimeout {
			return errLedgerUnavailable(errors.New("the ledger did not commit in time"))
		}
	case phaseProvider:
		if idle > rc.limits.upstreamTimeout {
			return errUpstreamTimeout
		}
	case phaseRelaying:
		if most := time.Duration(c.progress.idleTimeout.Load()); idle > cmp.Or(most, rc.limits.streamIdleTimeout) {
			return errStreamIdle
		}
	case phaseWriting:
		if idle > rc.limits.clientStallTimeout {
			return errClientStalled
		}
	}
	return nil
}

// tooSlow reports whether a body has brought too little in a whole window. Not
// on average: a body that comes fast and then stops must not hold its memory
// for as long as its first part has earned.
func (w *callProgress) tooSlow(now, start time.Time, l *callLimits) bool {
	if w.windowStart.IsZero() {
		w.windowStart = start
	}
	if now.Sub(w.windowStart) < l.readWindow {
		return false
	}
	received := w.bytesReceived.Load()
	slow := float64(received-w.windowBytes) < l.minReadRate*l.readWindow.Seconds()
	w.windowStart, w.windowBytes = now, received
	return slow
}

// drain refuses new calls from now on and waits for the running ones. When ctx
// ends it cuts them, and waits a little for their rows to be settled.
func (rc *runningCalls) drain(ctx context.Context) {
	stop := errDraining()
	rc.mu.Lock()
	rc.drainErr = stop
	rc.mu.Unlock()
	done := make(chan struct{})
	go func() { rc.wait.Wait(); close(done) }() // ends with the last call; the program ends soon after in any case
	select {
	case <-done:
		return
	case <-ctx.Done():
	}
	again := time.NewTicker(watchInterval) // a call may have begun to wait for its client just after it was cut
	defer again.Stop()
	for giveUp := time.After(drainGracePeriod); ; {
		rc.mu.Lock()
		for c := range rc.calls {
			c.abort(stop)
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
	return rc.drainErr != nil
}
