// This program simulates replicas that lease from one limit of requests, by the rules of ratelimit_leases.go: a call
// takes from what its replica has leased, and asks the database when that is used up. It prints how often a call waits
// for a round trip, how often it is refused although another replica has something left that it does not use, and how
// much of the limit is lent out without being used.
package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"text/tabwriter"
)

const (
	interval = 500 // milliseconds between reports
	seconds  = 60  // of a window, which begins with the whole limit
	memory   = 75  // milliseconds for which a refusal is not asked again
	hot      = 500 // milliseconds after a recall, in which nothing is lent beyond what calls need
	spare    = 60_000
	part     = 10_000 // of the limit, that a replica keeps for spare milliseconds after a call
)

// A replica has leased idle, and knows how much it took in the last two intervals.
type replica struct {
	idle, taken, before float64
	lastCall, refused   float64
}

// A result is what calls of one run have met.
type result struct{ calls, admitted, trips, wrong, lent, samples float64 }

// simulate runs a window: calls per second over all replicas, and milliseconds of latency to the database.
func simulate(replicas int, limit, rate, latency float64) (r result) {
	random := rand.New(rand.NewPCG(1, uint64(replicas)))
	all := make([]replica, replicas)
	for i := range all {
		all[i].refused = -memory
	}
	free, recalled := limit, -float64(hot)
	idle := func() (n float64) {
		for i := range all {
			n += all[i].idle
		}
		return n
	}
	share := func() float64 { return float64(int(free / float64(2*replicas))) }
	tick := float64(interval)
	for now := 0.0; now < seconds*1000; now += random.ExpFloat64() * 1000 / rate {
		for ; tick <= now; tick += interval {
			for i := range all {
				c := &all[i]
				wanted := c.taken + c.before
				if now-c.lastCall < spare {
					wanted = max(wanted, min(16, float64(int(limit/part))))
				}
				if give := c.idle - wanted; give > 0 {
					c.idle, free = c.idle-give, free+give
				} else if now-recalled >= hot {
					add := max(0, min(-give, share()))
					c.idle, free = c.idle+add, free-add
				}
				c.before, c.taken = c.taken, 0
			}
			r.lent, r.samples = r.lent+idle()/limit, r.samples+1
		}
		r.calls++
		c := &all[random.IntN(replicas)]
		if c.idle < 1 && now-c.refused < memory {
			if free+idle() >= 1 {
				r.wrong++
			}
			continue
		}
		if c.idle < 1 {
			r.trips++
			if free < 1 { // the others return what they do not use, after one round trip more
				r.trips, recalled = r.trips+1, now+latency
				for i := range all {
					free, all[i].idle = free+all[i].idle, 0
				}
			}
			if free < 1 {
				c.refused = now
				continue
			}
			add := 1.0
			if now-recalled >= hot {
				add = max(1, min(max(16, 2*(c.taken+c.before)), share()))
			}
			c.idle, free = c.idle+add, free-add
		}
		c.idle, c.taken, c.lastCall = c.idle-1, c.taken+1, now
		r.admitted++
	}
	return r
}

func main() {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "replicas\tlatency\tlimit/min\tcalls/s\tadmitted\tround trips\tadded latency\trefused although free\t"+
		"lent unused\t")
	for _, replicas := range []int{1, 2, 3, 10, 50} {
		for _, latency := range []float64{1, 5, 50} {
			for _, c := range [][2]float64{{1_000_000, 1000}, {100_000, 1000}, {60_000, 1000}, {6_000, 200}, {600, 200}} {
				r := simulate(replicas, c[0], c[1], latency)
				fmt.Fprintf(w, "%d\t%.0f ms\t%.0f\t%.0f\t%.0f\t%.2f %%\t%.2f ms\t%.2f %%\t%.2f %%\t\n", replicas, latency,
					c[0], c[1], r.admitted, 100*r.trips/r.calls, latency*r.trips/r.calls, 100*r.wrong/r.calls,
					100*r.lent/r.samples)
			}
		}
	}
	_ = w.Flush()
}
