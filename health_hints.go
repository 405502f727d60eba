// This room reads what a provider says about waiting, in the many forms in which
// providers say it. Plain code; whatever they write, the result is bounded.
package main

import (
	"math"
	"strconv"
	"strings"
	"time"
)

// retryHint returns how many milliseconds a 429 asks to wait, at most coolMost,
// and 0 if it does not say or cannot be understood. get returns a header's value.
func retryHint(get func(string) string, now time.Time) int64 {
	if ms, err := strconv.ParseFloat(get("Retry-After-Ms"), 64); err == nil && ms > 0 {
		return boundedMS(ms)
	}
	if v := get("Retry-After"); v != "" {
		if ms := waitOf(v, now, false); ms > 0 {
			return ms
		}
	}
	var most int64
	for _, kind := range [...]string{"Requests", "Tokens"} {
		if get("X-Ratelimit-Remaining-"+kind) == "0" {
			most = max(most, waitOf(get("X-Ratelimit-Reset-"+kind), now, true))
		}
		if get("Anthropic-Ratelimit-"+kind+"-Remaining") == "0" {
			most = max(most, waitOf(get("Anthropic-Ratelimit-"+kind+"-Reset"), now, true))
		}
	}
	if most == 0 {
		most = waitOf(get("X-Ratelimit-Reset"), now, true)
	}
	return most
}

// waitOf reads one value: seconds, a duration such as 6m0s or 12ms, a date, or
// where epoch says so a large number that is a time of its own.
func waitOf(v string, now time.Time, epoch bool) int64 {
	v = strings.TrimSpace(v)
	if n, err := strconv.ParseFloat(v, 64); err == nil {
		switch ms := float64(now.UnixMilli()); {
		case epoch && n > 1e11:
			return boundedMS(n - ms)
		case epoch && n > 1e9:
			return boundedMS(n*1000 - ms)
		}
		return boundedMS(n * 1000)
	}
	if d, err := time.ParseDuration(v); err == nil {
		return boundedMS(float64(d.Milliseconds()))
	}
	for _, layout := range [...]string{time.RFC1123, time.RFC3339Nano} {
		if t, err := time.Parse(layout, v); err == nil {
			return boundedMS(float64(t.Sub(now).Milliseconds()))
		}
	}
	return 0
}

func boundedMS(ms float64) int64 {
	if math.IsNaN(ms) || ms <= 0 {
		return 0
	}
	return int64(math.Ceil(min(ms, coolMost)))
}
