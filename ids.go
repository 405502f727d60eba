// This room makes the ids of calls: numbers that grow with time, so that the
// ledger is in order of time, and the text that clients see of them. Plain code.
package main

import (
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"
)

// An idSource makes the ids of calls: 42 bits of unix milliseconds, 9 of a
// number that tells replicas apart, 12 that count. They grow all the time, even
// when the clock goes back.
type idSource struct {
	node int64
	last atomic.Int64
}

const idTimeShift = 21

// newIDSource makes ids above last, the highest there is.
func newIDSource(last int64) *idSource {
	s := &idSource{node: rand.Int64N(512) << 12}
	s.last.Store(last)
	return s
}

func (s *idSource) next(now time.Time) int64 {
	for {
		last, id := s.last.Load(), now.UnixMilli()<<idTimeShift|s.node
		if id <= last {
			id = last + 1
			if id&0xfff == 0 { // 4096 in a millisecond: borrow from the next
				id = (last>>idTimeShift+1)<<idTimeShift | s.node
			}
		}
		if s.last.CompareAndSwap(last, id) {
			return id
		}
	}
}

// firstID returns the least id that a call begun at t can have.
func firstID(t time.Time) int64 { return t.UnixMilli() << idTimeShift }

const crockford = "0123456789abcdefghjkmnpqrstvwxyz"

// requestID writes a call's id as clients see it; parseRequestID reads it back,
// 0 if it is none.
func requestID(id int64) string {
	out := []byte("req_0000000000000")
	for i := len(out) - 1; i >= 4; i-- {
		out[i] = crockford[id&31]
		id >>= 5
	}
	return string(out)
}

func parseRequestID(s string) int64 {
	digits, ok := strings.CutPrefix(s, "req_")
	if !ok || len(digits) != 13 || digits[0] > '7' {
		return 0
	}
	var id int64
	for _, r := range digits {
		i := strings.IndexRune(crockford, r)
		if i < 0 {
			return 0
		}
		id = id<<5 | int64(i)
	}
	return id
}
