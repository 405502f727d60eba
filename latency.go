// Plain code: how long calls took, counted in buckets that fit in a row of the
// database, and the quantiles that are read from them. (/metrics has
// histograms of its own, which count for others to read.)
package main

import "math"

// buckets are steps of about 1.6, five in each power of ten: fine enough for a
// quantile to be off by less than a tenth, few enough to stand in one row.
const buckets = 22

// bucketBounds are the highest milliseconds of the buckets but the last, which
// has no end.
func bucketBounds() [buckets - 1]int64 {
	return [...]int64{10, 16, 25, 40, 63, 100, 160, 250, 400, 630, 1000, 1600, 2500, 4000, 6300, 10000, 16000, 25000, 40000, 63000, 100000}
}

// latencies counts times by bucket.
type latencies [buckets]int64

func (h *latencies) add(us int64) {
	for i, bound := range bucketBounds() {
		if us <= bound*1000 {
			h[i]++
			return
		}
	}
	h[buckets-1]++
}

func (h *latencies) count() (n int64) {
	for _, v := range h {
		n += v
	}
	return n
}

// quantile returns the time in milliseconds that part q of the counted times do
// not exceed, as if times lay evenly, in their logarithm, within a bucket; +Inf if
// that is in the last bucket, and -1 if nothing was counted.
func (h *latencies) quantile(q float64) float64 {
	total := h.count()
	if total == 0 {
		return -1
	}
	rank, below := q*float64(total), 0.0
	bounds := bucketBounds()
	for i, bound := range bounds {
		n := float64(h[i])
		if n > 0 && below+n >= rank {
			low := float64(bound) / 1.6
			if i > 0 {
				low = float64(bounds[i-1])
			}
			return low * math.Pow(float64(bound)/low, (rank-below)/n)
		}
		below += n
	}
	return math.Inf(1)
}
