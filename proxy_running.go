// This file has the set of running calls and its watchdog, one goroutine that ends calls whose token is no
// longer valid, whose budget is spent, whose provider or client is silent, or that outlive a drain. It holds
// all time limits of a call. It sees the runningCall of a call, never the call itself.
package main

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A phase is what a call waits for.
type phase int32

const (
	phaseReading  phase = iota // the request body
	phaseLedger                // the commit of its pending record
	phaseProvider              // the start of the answer
	phaseRelaying              // more of the answer
	phaseWriting               // the client, to accept bytes
)

var phaseNames = [...]string{"reading", "ledger", "provider", "relaying", "writing"}

const (
	watchInterval    = 100 * time.Millisecond
	attemptGrace     = 500 * time.Millisecond // an attempt with a timer of its own ends by that, and the call may go on
	drainGracePeriod = 5 * time.Second        // for calls to end after a drain aborted them
)

// callLimits are the limits that the watchdog enforces.
type callLimits struct {
	maxCalls           int64 // at the same time, over all tokens
	upstreamTimeout    time.Duration
	streamIdleTimeout  time.Duration
	readWindow         time.Duration // in each such window a request body must arrive
	minReadRate        float64       // at this many bytes a second or more
	clientStallTimeout time.Duration // how long a client may accept no byte of the answer
	commitTimeout      time.Duration // how long the commit of a pending record may take
}

// newCallLimits returns the limits for three settings, with fixed values for the others.
func newCallLimits(maxCalls int64, upstreamTimeout, streamIdleTimeout time.Duration) callLimits {
	return callLimits{maxCalls: maxCalls, upstreamTimeout: upstreamTimeout, streamIdleTimeout: streamIdleTimeout,
		readWindow: 30 * time.Second, minReadRate: 1 << 10,
		clientStallTimeout: time.Minute, commitTimeout: 5 * time.Second}
}

// A runningCall is the part of a call that other goroutines may use: the watchdog, /manage and a drain.
// The first group of fields is set before the call is added to runningCalls and never changes.
type runningCall struct {
	ticks      *atomic.Int64 // of runningCalls
	id         int64
	start      time.Time
	token      *liveToken
	controller *http.ResponseController
	cancel     context.CancelCauseFunc
	client     context.Context // of the client's request, if the call's own does not end with it; otherwise nil

	progress callProgress
	info     atomic.Pointer[callInfo]   // nil until the call is admitted
	unnamed  atomic.Bool                // its end user was erased
	settling atomic.Bool                // its row is being made, with or without the end user
	lead     atomic.Pointer[flightLead] // of the calls that wait for its answer; nil: none can

	ending sync.Mutex // held while a deadline is set for an abort
	ended  bool       // the handler is about to return: the connection may serve another call
}

// A callInfo describes an admitted call. A published one never changes.
type callInfo struct {
	requestID   string
	address     string
	project     *projectState
	token       *tokenState
	endpoint    *endpoint
	model       string // as asked for
	attribution *attribution
	stream      bool
	upstream    *upstream    // of the current attempt
	inputTokens int64        // an estimate
	reservation *reservation // guarded by its limiter
}

// callProgress says how far a call has come. The call's goroutine writes it, others read it.
type callProgress struct {
	phase         atomic.Int32
	since         atomic.Int64 // tick at which the phase began or last made progress
	uploading     atomic.Bool  // the request body is being streamed and has not ended
	uploaded      atomic.Bool  // it was streamed and has ended as it should
	bytesReceived atomic.Int64 // bytes of the request body so far
	bytesRelayed  atomic.Int64 // bytes of the answer so far
	outputTokens  atomic.Int64 // an estimate of the tokens of a streamed answer so far
	idleTimeout   atomic.Int64 // nanoseconds the answer may pause; 0: the setting for all upstreams

	windowStart time.Time // used by the watchdog alone: when the current read window began,
	windowBytes int64     // and how many bytes had arrived by then
}

// setPhase records what the call waits for, or that it has made progress.
func (c *runningCall) setPhase(p phase) {
	c.progress.phase.Store(int32(p))
	c.progress.since.Store(c.ticks.Load())
}

// abort ends the call with reason, from another goroutine. It does nothing if the call has ended.
func (c *runningCall) abort(reason *apiError) {
	c.cancel(reason)
	c.ending.Lock()
	defer c.ending.Unlock()
	at := phase(c.progress.phase.Load())
	// Reads and writes on the client's connection ignore the context. The transport reads an upload, and
	// waits for that read when it closes the body.
	if !c.ended && (at == phaseReading || c.progress.uploading.Load()) {
		_ = c.controller.SetReadDeadline(time.Unix(1, 0))
	}
	if !c.ended && at == phaseWriting {
		_ = c.controller.SetWriteDeadline(time.Unix(1, 0))
	}
}

// An endingCall is a call that has to end, and why.
type endingCall struct {
	call   *runningCall
	reason *apiError
}

// abortAll aborts calls, many at a time: when a token with thousands of streams is revoked, each of them ends as soon
// as it can. The lock of runningCalls must be free, because a call needs it to end.
func abortAll(calls []endingCall) {
	var parts sync.WaitGroup
	for part := range slices.Chunk(calls, 256) {
		parts.Go(func() {
			for _, e := range part {
				e.call.abort(e.reason)
			}
		})
	}
	parts.Wait()
}

// runningCalls is the set of running calls; newRunningCalls makes one.
type runningCalls struct {
	limits       callLimits
	ticks        atomic.Int64       // time in units of watchInterval, cheap to read
	endAbandoned func(*runningCall) // ends a call whose client has left; set before the first call

	mu       sync.Mutex
	calls    map[*runningCall]struct{}
	draining atomic.Bool // new calls are refused
	wait     sync.WaitGroup
}

func newRunningCalls(limits callLimits) *runningCalls {
	return &runningCalls{limits: limits, calls: map[*runningCall]struct{}{}}
}

// add adds c, unless the program is draining or has its maximum of calls.
func (rc *runningCalls) add(c *runningCall) error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if rc.draining.Load() {
		return errDraining
	}
	if int64(len(rc.calls)) >= rc.limits.maxCalls {
		return errTooManyCalls
	}
	rc.calls[c] = struct{}{}
	rc.wait.Add(1)
	return nil
}

func (rc *runningCalls) remove(c *runningCall) {
	c.ending.Lock()
	c.ended = true
	c.ending.Unlock()
	rc.mu.Lock()
	delete(rc.calls, c)
	rc.mu.Unlock()
	rc.wait.Done()
}

// count returns how many calls are running.
func (rc *runningCalls) count() int64 {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	return int64(len(rc.calls))
}

// snapshot counts the running calls by phase.
func (rc *runningCalls) snapshot() runningSnapshot {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	s := runningSnapshot{phases: make([]phaseCount, len(phaseNames)), draining: rc.draining.Load()}
	for i, name := range phaseNames {
		s.phases[i].phase = name
	}
	for c := range rc.calls {
		s.phases[c.progress.phase.Load()].calls++
	}
	return s
}

// run is the watchdog. It returns when ctx is done.
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

// enforce aborts the calls that have to end.
func (rc *runningCalls) enforce(now time.Time) {
	ms := now.UnixMilli()
	abortAll(rc.endingCalls(func(c *runningCall) *apiError { return rc.abortReason(c, now, ms) }))
}

// endingCalls returns the running calls for which reason is not nil.
func (rc *runningCalls) endingCalls(reason func(*runningCall) *apiError) (ending []endingCall) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for c := range rc.calls {
		if e := reason(c); e != nil {
			ending = append(ending, endingCall{c, e})
		}
	}
	return ending
}

// abortReason returns why a call has to end now, or nil.
func (rc *runningCalls) abortReason(c *runningCall, now time.Time, ms int64) *apiError {
	if c.client != nil && c.client.Err() != nil {
		rc.endAbandoned(c)
	}
	if reason := c.token.validity(c.token.state.Load(), ms); reason != "" {
		return errBadToken(reason)
	}
	if project := c.token.project.state.Load(); !project.active {
		return errProjectEnded(project.deleted)
	}
	if info := c.info.Load(); info != nil {
		if l := info.reservation.updateUsage(ms, c.progress.outputTokens.Load()); l != nil {
			return errQuotaSpent(l.String(), "The limit of "+l.String()+" is used up: the proxy ended the call.")
		}
	}
	at := phase(c.progress.phase.Load())
	if (at == phaseReading || c.progress.uploading.Load()) && c.progress.tooSlow(now, c.start, &rc.limits) {
		return errRequestTooSlow
	}
	idle := time.Duration(rc.ticks.Load()-c.progress.since.Load()) * watchInterval
	switch {
	case at == phaseLedger && idle > rc.limits.commitTimeout:
		return errLedgerUnavailable(errors.New("the ledger did not commit in time"))
	case at == phaseProvider && idle > rc.limits.upstreamTimeout+attemptGrace:
		return errUpstreamTimeout
	case at == phaseRelaying &&
		idle > cmp.Or(time.Duration(c.progress.idleTimeout.Load()), rc.limits.streamIdleTimeout):
		return errStreamIdle
	case at == phaseWriting && idle > rc.limits.clientStallTimeout:
		return errClientStalled
	}
	return nil
}

// tooSlow reports whether too little of a body arrived in a whole window. An average would be wrong: a body
// that starts fast and then stops could keep its memory for as long as its first part allows.
func (p *callProgress) tooSlow(now, start time.Time, limits *callLimits) bool {
	if p.windowStart.IsZero() {
		p.windowStart = start
	}
	if now.Sub(p.windowStart) < limits.readWindow {
		return false
	}
	received := p.bytesReceived.Load()
	slow := float64(received-p.windowBytes) < limits.minReadRate*limits.readWindow.Seconds()
	p.windowStart, p.windowBytes = now, received
	return slow
}

// drain refuses new calls from now on and waits for the running ones. When ctx ends it aborts them, and waits
// up to drainGracePeriod until they are settled.
func (rc *runningCalls) drain(ctx context.Context) {
	rc.mu.Lock() // no call is being added
	rc.draining.Store(true)
	rc.mu.Unlock()
	done := make(chan struct{})
	go func() { rc.wait.Wait(); close(done) }() // ends with the last call, or with the program
	select {
	case <-done:
		return
	case <-ctx.Done():
	}
	again := time.NewTicker(watchInterval) // a call may start to wait for its client just after it was aborted
	defer again.Stop()
	for giveUp := time.After(drainGracePeriod); ; {
		abortAll(rc.endingCalls(func(*runningCall) *apiError { return errDraining }))
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
func (rc *runningCalls) isDraining() bool { return rc.draining.Load() }
