// This file bounds what clients can cause: lines in the log, entries in the audit trail, attempts to
// guess a key, and the memory of request bodies. Nothing in it grows with the number of clients.
// Plain code: the time is an argument.
package main

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// A throttle allows so many events per window and counts those that it omits. It may have several
// windows; an event must fit into each of them.
type throttle struct {
	mu      sync.Mutex
	windows []throttleWindow
	omitted int64
}

// A throttleWindow allows limit events in the given time. It starts with its first event.
type throttleWindow struct {
	limit int
	time  time.Duration
	count int
	ends  time.Time
}

const (
	logLinesPerSecond           = 50 // of lines that anyone can cause, with or without a token
	maxAuthFailures             = 20 // wrong management keys per minute, from the addresses of one slot
	maxFailuresAuditedPerMinute = 10 // failed sign-ins with an audit entry of their own: entries are kept forever
	maxFailuresAuditedPerDay    = 500
	refusalLogInterval          = time.Second // a token's refused calls get at most one ledger row in this time
)

// newThrottle returns a throttle with one window.
func newThrottle(limit int, window time.Duration) *throttle {
	return &throttle{windows: []throttleWindow{{limit: limit, time: window}}}
}

// newSignInThrottle limits the failed sign-ins that get an audit entry of their own.
func newSignInThrottle() *throttle {
	return &throttle{windows: []throttleWindow{
		{limit: maxFailuresAuditedPerMinute, time: time.Minute},
		{limit: maxFailuresAuditedPerDay, time: 24 * time.Hour},
	}}
}

// allow returns a wait of 0 if an event may pass now, and how many were omitted since the last one
// that passed. Otherwise it counts the event as omitted and returns how long no event can pass.
func (t *throttle) allow(now time.Time) (wait time.Duration, omitted int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if wait = t.count(now); wait > 0 {
		t.omitted++
		return wait, 0
	}
	omitted, t.omitted = t.omitted, 0
	return 0, omitted
}

// addOmitted counts n more events as omitted.
func (t *throttle) addOmitted(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.omitted += n
}

// takeOmitted returns the number of omitted events and resets it. If there are any, reporting them is
// an event itself: unless force is set, takeOmitted returns 0 until that event may pass.
func (t *throttle) takeOmitted(now time.Time, force bool) (omitted int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.omitted > 0 && (force || t.count(now) == 0) {
		omitted, t.omitted = t.omitted, 0
	}
	return omitted
}

// count adds an event to every window and returns 0; if a window is full, it adds none and returns
// how long that window lasts. The caller holds t.mu.
func (t *throttle) count(now time.Time) (wait time.Duration) {
	for i := range t.windows {
		w := &t.windows[i]
		if !now.Before(w.ends) {
			w.count, w.ends = 0, now.Add(w.time)
		}
		if w.count >= w.limit {
			wait = max(wait, w.ends.Sub(now))
		}
	}
	if wait == 0 {
		for i := range t.windows {
			t.windows[i].count++
		}
	}
	return wait
}

// An addressThrottle is a fixed number of throttles that addresses share by hash, so it cannot grow.
type addressThrottle [1024]*throttle

// newAuthThrottle limits wrong management keys per address. It only slows guessing down: guessing 256
// bits is hopeless in any case.
func newAuthThrottle() *addressThrottle {
	var a addressThrottle
	for i := range a {
		a[i] = newThrottle(maxAuthFailures, time.Minute)
	}
	return &a
}

// of returns the throttle of an address.
func (a *addressThrottle) of(address string) *throttle {
	if ip, err := netip.ParseAddr(address); err == nil && ip.Is6() && !ip.Is4In6() {
		if p, err := ip.Prefix(64); err == nil { // one customer has a whole /64
			address = p.String()
		}
	}
	var h uint32 = 2166136261 // FNV-1a
	for i := range len(address) {
		h = (h ^ uint32(address[i])) * 16777619
	}
	return a[h%uint32(len(a))]
}

// bodyMemory limits the memory of all request bodies that are held at one time.
type bodyMemory struct {
	limit int64
	used  atomic.Int64
}

// reserve reports whether n more bytes fit, and counts them if so.
func (b *bodyMemory) reserve(n int64) bool {
	if b.used.Add(n) > b.limit {
		b.used.Add(-n)
		return false
	}
	return true
}

func (b *bodyMemory) release(n int64) { b.used.Add(-n) }
