// This room tells the garbage collector how much room it has: about a fixed amount
// beside what is in use. Go's own rule, as much again as is in use, has a small
// heap collected a hundred times a second under load, and a fixed multiple of that
// would let a large one grow until the machine has no memory left.
package main

import (
	"context"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"time"
)

const (
	heapRoom    = 32 << 20 // bytes of garbage that a collection may wait for
	leastUsed   = 4 << 20  // what is in use counts as so much at least
	leastExtra  = 100      // per cent: Go's own rule, where that is more than heapRoom
	heapLookout = 100 * time.Millisecond
)

// keepHeap sets the collector's target as the heap grows and shrinks, until ctx
// is over.
func keepHeap(ctx context.Context) {
	live := []runtimemetrics.Sample{{Name: "/gc/heap/live:bytes"}} // that the last collection left
	set := heapPercent(0)
	debug.SetGCPercent(set)
	tick := time.NewTicker(heapLookout)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		runtimemetrics.Read(live)
		if want := heapPercent(live[0].Value.Uint64()); want < set-set/8 || want > set+set/8 { // each change stops the world
			debug.SetGCPercent(want)
			set = want
		}
	}
}

// heapPercent is how much garbage may come, in per cent of what is in use.
func heapPercent(used uint64) int {
	return max(leastExtra, int(heapRoom*100/max(used, leastUsed)))
}
