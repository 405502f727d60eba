// This file has the bounded counters that keep strangers from filling a log, a
// disk or the memory. Nothing in it grows with the number of clients.
package main

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

func throttleSlot(address string) int {
	if a, err := netip.ParseAddr(address); err == nil && a.Is6() && !a.Is4In6() {
		if p, err := a.Prefix(64); err == nil { // one customer has a whole /64
			address = p.String()
		}
	}
	var h uint32 = 2166136261 // FNV-1a
	for i := range len(address) {
		h = (h ^ uint32(address[i])) * 16777619
	}
	return int(h % 1024)
}

// A logLimiter lets a few lines a second through and counts the rest. It is for
// lines that anyone can cause, token or not: they must not fill a disk.
type logLimiter struct {
	mu         sync.Mutex
	second     int64
	written    int
	suppressed int64
}

const logLinesPerSecond = 50 // a second

// allow reports whether a line may be written now, and how many were left out
// since the last one.
func (l *logLimiter) allow(now time.Time) (ok bool, left int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := now.Unix(); s != l.second {
		l.second, l.written = s, 0
	}
	if l.written++; l.written > logLinesPerSecond {
		l.suppressed++
		return false, 0
	}
	left, l.suppressed = l.suppressed, 0
	return true, left
}

// authThrottle counts wrong management keys, by address and minute, in a fixed number
// of slots that addresses share by hash: it cannot grow. Who has too many is told
// to wait; guessing 256 bits is in vain in any case.
type authThrottle struct {
	mu    sync.Mutex
	slots [1024]struct {
		count int
		until time.Time
	}
}

const (
	maxAuthFailures   = 20
	authFailureWindow = time.Minute
)

// blockedFor reports whether an address has guessed wrong too often of late, and
// for how long it stays so.
func (f *authThrottle) blockedFor(address string, now time.Time) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &f.slots[throttleSlot(address)]
	if now.After(s.until) || s.count < maxAuthFailures {
		return 0
	}
	return s.until.Sub(now)
}

func (f *authThrottle) recordFailure(address string, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &f.slots[throttleSlot(address)]
	if now.After(s.until) {
		s.count, s.until = 0, now.Add(authFailureWindow)
	}
	s.count++
}

// bodyMemory is the memory that all request bodies held at one time may take.
type bodyMemory struct {
	limit int64
	used  atomic.Int64
}

func (b *bodyMemory) reserve(n int64) bool {
	if b.used.Add(n) > b.limit {
		b.used.Add(-n)
		return false
	}
	return true
}

func (b *bodyMemory) release(n int64) { b.used.Add(-n) }
