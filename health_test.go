// Tests of what is remembered of a key, under a time of their own.
package main

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestRetryHint: what providers say about waiting is understood in all its
// forms, and whatever they say is at most five minutes.
func TestRetryHint(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for headers, want := range map[string]int64{
		"":                                  0,
		"Retry-After: 7":                    7_000,
		"Retry-After: 0.25":                 250,
		"Retry-After: 0":                    0,
		"Retry-After: -5":                   0,
		"Retry-After: soon":                 0,
		"Retry-After: NaN":                  0,
		"Retry-After: Inf":                  coolMost,
		"Retry-After: 1000000000":           coolMost,
		"Retry-After: 1e300":                coolMost,
		"Retry-After: 99999999999999999999": coolMost,
		"Retry-After: 6m0s":                 coolMost,
		"Retry-After: 1m30s":                90_000,
		"Retry-After: Tue, 24 Nov 2026 12:00:20 GMT":                         20_000,
		"Retry-After: Tue, 24 Nov 2026 11:00:20 GMT":                         0,
		"Retry-After: Fri, 24 Nov 2028 12:00:20 GMT":                         coolMost,
		"Retry-After-Ms: 1500|Retry-After: 7":                                1_500,
		"Retry-After-Ms: x|Retry-After: 7":                                   7_000,
		"X-Ratelimit-Reset-Requests: 6m0s":                                   0, // whose count is not used up
		"X-Ratelimit-Remaining-Requests: 0|X-Ratelimit-Reset-Requests: 12ms": 12,
		"X-Ratelimit-Remaining-Tokens: 0|X-Ratelimit-Reset-Tokens: 6m0s":     coolMost,
		"X-Ratelimit-Remaining-Requests: 0|X-Ratelimit-Reset-Requests: 2s|X-Ratelimit-Remaining-Tokens: 9|X-Ratelimit-Reset-Tokens: 50s": 2_000,
		"X-Ratelimit-Remaining-Requests: 0|X-Ratelimit-Reset-Requests: -1":                                                               0,
		"X-Ratelimit-Remaining-Requests: 0|X-Ratelimit-Reset-Requests: 45":                                                               45_000,
		"Anthropic-Ratelimit-Tokens-Remaining: 0|Anthropic-Ratelimit-Tokens-Reset: 2026-11-24T12:00:30Z":                                 30_000,
		fmt.Sprintf("X-Ratelimit-Reset: %d", now.Unix()+40):                                                                              40_000,
		fmt.Sprintf("X-Ratelimit-Reset: %d", now.UnixMilli()+40):                                                                         40,
	} {
		get := func(name string) string {
			for line := range strings.SplitSeq(headers, "|") {
				if v, ok := strings.CutPrefix(line, name+": "); ok {
					return v
				}
			}
			return ""
		}
		if got := retryHint(get, now); got != want {
			t.Errorf("%q: %d ms, want %d", headers, got, want)
		}
	}
}

// TestHealthThroughOutage: a key whose provider is down for a minute, with a call
// each 100 ms, is asked a few times and has its calls again at the first probe
// after, half a minute later at most.
func TestHealthThroughOutage(t *testing.T) {
	t.Parallel()
	h := newHealthBook().of(1, "up_1")
	asked, back := 0, int64(0)
	const down = 60_000
	for now := int64(1); now < 3*down && back == 0; now += 100 {
		if !h.mayTry(now) || !h.take(now) {
			continue
		}
		if h.mayTry(now) != (h.state == keyReady) {
			t.Fatalf("at %d a second call may go there while the first probes it", now)
		}
		if now < down {
			asked++
			h.fault(now+1, now, false, "down")
			continue
		}
		h.good(now+1, now, false)
		back = now
	}
	if asked < faultsToOpen || asked > 10 {
		t.Errorf("a provider that is down for a minute was asked %d times", asked)
	}
	if back == 0 || back > down+openMost+100 {
		t.Errorf("the key has its calls again after %d ms", back)
	}
	if h.good(back+10, back+5, true); h.row(back+11).state != keyReady || h.strikes != 0 {
		t.Errorf("after a good answer: %+v", h.row(back+11))
	}
}

// TestHealthStates: what each kind of trouble makes of a key, and for how long.
func TestHealthStates(t *testing.T) {
	t.Parallel()
	const day = 20_000 * dayMS
	h, now := newHealthBook().of(1, "up_1"), int64(day+23*hourMS+30*60_000)
	expect := func(what string, s keyState, pause int64) {
		t.Helper()
		r := h.row(now)
		if until := now + pause; r.state != s || pause > 0 && r.until != until {
			t.Errorf("%s: %v for %d ms, want %v for %d", what, r.state, r.until-now, s, pause)
		}
	}
	pass := func(ms int64) { now += ms }
	h.fault(now, now, false, "x")
	h.fault(now, now, false, "x")
	expect("two failures", keyReady, 0)
	h.good(now, now, true)
	h.fault(now, now, false, "x")
	expect("an answer between", keyReady, 0)
	h.good(now, now, false) // begun, not complete
	h.fault(now, now, false, "x")
	h.fault(now, now, false, "x")
	expect("three in a row", keyOpen, openLeast)
	h.good(now+1, now, true) // of a call that began before
	expect("an old answer", keyOpen, openLeast)
	pass(openLeast)
	if !h.take(now) || h.take(now) || h.mayTry(now) {
		t.Error("not one probe")
	}
	h.fault(now, now, false, "x")
	expect("a probe that failed", keyOpen, 2*openLeast)
	pass(2 * openLeast)
	h.take(now)
	h.release()
	if !h.mayTry(now) {
		t.Error("a probe that told nothing blocks the next")
	}
	h.limited(now, now, 7_000, "x")
	expect("limited while it was open", keyCooling, 7_000)
	h.limited(now, now-1, 20_000, "x")
	expect("a longer wait", keyCooling, 20_000)
	h.limited(now, now, 0, "x")
	expect("a wait of nobody knows how long", keyCooling, 20_000)
	h.exhausted(now, now+1, "x")
	expect("exhausted: until the day begins", keyExhausted, day+dayMS-now)
	h.fault(now, now+1, true, "x")
	expect("lesser trouble", keyExhausted, day+dayMS-now)
	pass(hourMS)
	h.take(now)
	h.exhausted(now, now, "x")
	expect("again: an hour", keyExhausted, hourMS)
	pass(1)
	h.quarantined(now, now, "x")
	expect("refused", keyQuarantined, quarantineMost)
	pass(1)
	h.good(now, now, false) // asked because none was well
	expect("a good answer", keyReady, 0)
	pass(1)
	h.limited(now, now, 0, "x")
	expect("limited", keyCooling, coolLeast)
	pass(coolLeast)
	expect("it has cooled", keyReady, 0)
	h.take(now)
	pass(1)
	h.limited(now, now, 0, "x")
	expect("limited again", keyCooling, 2*coolLeast)
	pass(1)
	h.usable(now, false)
	if h.mayTry(now + 50*365*dayMS) {
		t.Error("a key that does not open is tried")
	}
	h.usable(now, true)
	expect("it opens", keyReady, 0)
	pass(1)
	h.quarantined(now, now, "x")
	h.book.forget(1, now)
	expect("an admin changed it", keyReady, 0)
	h.quarantined(now+1, now-1, "x")
	expect("an attempt with the key before", keyReady, 0)
	pass(10)
	h.book.forget(1, now)
	h.quarantined(now+1, now-1, "x")
	expect("an attempt with a key that was well before", keyReady, 0)
}

// TestRetryBudget: what is sent again is a fifth of the calls and one a second,
// after a reserve.
func TestRetryBudget(t *testing.T) {
	t.Parallel()
	b := newHealthBook().budget("host")
	spent := func(calls int, from, ms int64) (n int) {
		for i := range calls {
			b.earn()
			if b.spend(from + int64(i)*ms/int64(calls)) {
				n++
			}
		}
		return n
	}
	spent(1000, 1, 1000) // the reserve goes
	if n := spent(10_000, 2_000, 10_000); n < 1990 || n > 2030 {
		t.Errorf("%d of 10,000 calls in 10 s were sent again", n)
	}
	if n := spent(100, 13_000_000, 1); n != 50+20 && n != 50+19 && n != 50+18 {
		t.Errorf("after a pause %d of 100 were sent again", n)
	}
}
