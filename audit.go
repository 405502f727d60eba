// This room says what the audit trail is: what an entry holds, and how each is
// bound to the one before it, so that a changed, removed or added entry is
// found. Plain code: store_audit.go has the table, manage_usage.go the URL.
package main

import (
	"context"
	"sync"
	"time"
)

// A signInAuditor puts failed sign-ins on the audit trail, and tells the log where
// the trail ends.
type signInAuditor struct {
	log     *logger
	store   *store
	limiter signInAuditLimiter
}

// signInAuditLimiter decides which wrong management keys get an entry of their own.
// Anyone can present one, and entries are kept for ever: so a few a minute, not
// too many a day, and the number of those left out.
type signInAuditLimiter struct {
	mu              sync.Mutex
	minute, day     int64
	inMinute, inDay int
	omitted         int64
}

const (
	maxFailuresAuditedPerMinute = 10
	maxFailuresAuditedPerDay    = 500
)

// allow reports whether an entry may be made now.
func (f *signInAuditLimiter) allow(now time.Time) bool {
	if m := now.Unix() / 60; m != f.minute {
		f.minute, f.inMinute = m, 0
	}
	if d := now.Unix() / 86_400; d != f.day {
		f.day, f.inDay = d, 0
	}
	if f.inMinute >= maxFailuresAuditedPerMinute || f.inDay >= maxFailuresAuditedPerDay {
		return false
	}
	f.inMinute++
	f.inDay++
	return true
}

// record reports whether a failure gets an entry, and how many before it got none.
func (f *signInAuditLimiter) record(now time.Time) (ok bool, left int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.allow(now) {
		f.omitted++
		return false, 0
	}
	left, f.omitted = f.omitted, 0
	return true, left
}

// addOmitted counts n more that got no entry.
func (f *signInAuditLimiter) addOmitted(n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.omitted += n
}

// takeOmitted returns how many got no entry, for one that tells only that; 0: none, or
// it must wait. At the end it does not wait.
func (f *signInAuditLimiter) takeOmitted(now time.Time, end bool) (left int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.omitted > 0 && (end || f.allow(now)) {
		left, f.omitted = f.omitted, 0
	}
	return left
}

// auditFailedSignIn puts a wrong management key on the trail. by.actor is the key's
// id if it is one that was valid once. Whoever presented it is refused in any
// case, so trouble with the trail is for the log alone.
func (a *signInAuditor) auditFailedSignIn(ctx context.Context, by auditOrigin, door string, now time.Time) {
	ok, left := a.limiter.record(now)
	if !ok {
		return
	}
	a.writeFailedSignIns(ctx, by, door, left, 1)
}

// writeFailedSignIns adds an entry that tells of failed sign-ins: of so many that were
// left out before, and of one more or none. It waits no longer than a few seconds, but for as long as it needs:
// who presents a key must not be able to keep it off the trail by leaving.
func (a *signInAuditor) writeFailedSignIns(ctx context.Context, by auditOrigin, door string, left, more int64) {
	event := auditEvent{action: actionSignInFailed, object: door}
	if left > 0 {
		event.detail = []auditField{{"left_out", left}}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := a.store.recordAuditEvent(ctx, by, event); err != nil {
		a.limiter.addOmitted(left + more)
		a.log.Error("a failed sign-in could not be put on the audit trail", "request_id", by.requestID, "address", by.address, "error", err)
	}
}

// runAuditCheckpoints notes, every so often and at the end, how many failed sign-ins were
// left out, and logs where the trail ends, if that is not where it was logged
// last: a log that is kept elsewhere shows later that nothing up to there was
// removed.
func (a *signInAuditor) runAuditCheckpoints(ctx context.Context, every time.Duration, logged int64) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for end := false; !end; {
		var now time.Time
		select {
		case <-ctx.Done():
			now, end = time.Now(), true
		case now = <-tick.C:
		}
		if left := a.limiter.takeOmitted(now, end); left > 0 {
			a.writeFailedSignIns(ctx, systemOrigin(now), "", left, 0)
		}
		if h, ok, _, err := a.store.loadAuditHead(context.WithoutCancel(ctx), a.store.chain); err == nil && ok && h.seq != logged {
			logged = h.seq
			a.log.Info("the audit trail ends here", "head", h.String())
		}
	}
}
