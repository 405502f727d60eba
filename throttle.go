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

// A throttle allows a number of events per window and counts those that it omits. If it has several
// windows, an event must fit into each of them.
type throttle struct {
	mu      sync.Mutex
	windows []throttleWindow
	omitted int64
}

// A throttleWindow allows limit events. It starts with its first event.
type throttleWindow struct {
	limit  int
	length time.Duration
	count  int
	ends   time.Time
}

const (
	logLinesPerSecond           = 50 // for lines that anyone can cause, with or without a token
	maxAuthFailures             = 20 // wrong management keys per minute, from the addresses of one slot
	maxFailuresAuditedPerMinute = 10 // failed sign-ins with their own audit entry: entries are kept forever
	maxFailuresAuditedPerDay    = 500
	refusalLogInterval          = time.Second // a token's refused calls get at most one ledger row in this time
)

// newThrottle returns a throttle with one window.
func newThrottle(limit int, window time.Duration) *throttle {
	return &throttle{windows: []throttleWindow{{limit: limit, length: window}}}
}

// newSignInThrottle limits the failed sign-ins that get their own audit entry.
func newSignInThrottle() *throttle {
	return &throttle{windows: []throttleWindow{
		{limit: maxFailuresAuditedPerMinute, length: time.Minute},
		{limit: maxFailuresAuditedPerDay, length: 24 * time.Hour},
	}}
}

// allow returns a wait of 0 if an event is allowed now, and how many were omitted since the last allowed one.
// Otherwise it counts the event as omitted and returns how long no event will be allowed.
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

// drainOmitted returns the number of omitted events and resets it. Reporting them is an event itself: unless
// force is set, drainOmitted returns 0 until that event is allowed.
func (t *throttle) drainOmitted(now time.Time, force bool) (omitted int64) {
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
			w.count, w.ends = 0, now.Add(w.length)
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

// newAuthThrottle limits wrong management keys per address. It only slows down guessing: guessing 256 bits is
// hopeless in any case.
func newAuthThrottle() *addressThrottle {
	var a addressThrottle
	for i := range a {
		a[i] = newThrottle(maxAuthFailures, time.Minute)
	}
	return &a
}

// forAddress returns the throttle of an address.
func (a *addressThrottle) forAddress(address string) *throttle {
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

// bodyMemory limits the memory of all request bodies that are in memory at one time.
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

// A bodyShare is what one call has reserved of the memory for bodies, for its token and in the whole program:
// the body, its copies with another model's name, a buffered stream, stored content. All that goes in comes out
// again in releaseAll, so neither count can drift. It belongs to the call's goroutine.
type bodyShare struct {
	memory   *bodyMemory
	token    *atomic.Int64 // what the token's calls have reserved together
	max      int64         // of token, unless this call alone has all of it
	reserved int64
}

// reserve reserves n more bytes.
func (s *bodyShare) reserve(n int64) error {
	if used := s.token.Add(n); used > s.max && used > s.reserved+n {
		s.token.Add(-n)
		return errTokenBodyMemory()
	}
	if !s.memory.reserve(n) {
		s.token.Add(-n)
		return errBodyMemoryFull()
	}
	s.reserved += n
	return nil
}

func (s *bodyShare) release(n int64) {
	s.reserved -= n
	s.token.Add(-n)
	s.memory.release(n)
}

func (s *bodyShare) releaseAll() { s.release(s.reserved) }
