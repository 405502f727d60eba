// These tests are about the throttles in ratelimit.go: what is allowed in a window, and that every omitted event
// is counted.
package main

import (
	"testing"
	"time"
)

// TestThrottle: a window allows its limit and starts with its first event; each allowed event reports what
// was omitted before it.
func TestThrottle(t *testing.T) {
	t.Parallel()
	type event struct {
		at      time.Duration
		wait    time.Duration
		omitted int64
	}
	second, minute := time.Second, time.Minute
	for name, c := range map[string]struct {
		windows []throttleWindow
		events  []event
	}{
		"one per second": {
			windows: []throttleWindow{{limit: 1, length: second}},
			events: []event{
				{at: 0}, {at: 1, wait: second - 1}, {at: second - 1, wait: 1}, {at: second, omitted: 2},
				{at: 2*second - 1, wait: 1}, {at: 5 * second, omitted: 1}, {at: 7 * second},
			},
		},
		"an event from before the window counts in it": {
			windows: []throttleWindow{{limit: 1, length: second}},
			events:  []event{{at: second}, {at: 0, wait: 2 * second}, {at: 2 * second, omitted: 1}},
		},
		"two per second and three per minute": {
			windows: []throttleWindow{{limit: 2, length: second}, {limit: 3, length: minute}},
			events: []event{
				{at: 0}, {at: 0}, {at: 0, wait: second}, {at: second, omitted: 1}, {at: second, wait: 59 * second},
				{at: 59 * second, wait: second}, {at: minute, omitted: 2}, {at: minute}, {at: minute, wait: second},
			},
		},
		"no limit set allows nothing": {
			windows: []throttleWindow{{length: second}},
			events:  []event{{at: 0, wait: second}, {at: second, wait: second}},
		},
	} {
		th, start := throttle{windows: c.windows}, time.Unix(1_800_000_000, 0)
		for i, e := range c.events {
			if wait, omitted := th.allow(start.Add(e.at)); wait != e.wait || omitted != e.omitted {
				t.Errorf("%s: event %d: wait %v with %d omitted, want %v with %d",
					name, i, wait, omitted, e.wait, e.omitted)
			}
		}
	}
}

// TestSignInThrottle: the audit trail gets a limited number of failed sign-ins per minute and per day, and the others
// are counted.
func TestSignInThrottle(t *testing.T) {
	t.Parallel()
	th := newSignInThrottle()
	start := time.Unix(1_800_000_000, 0).Truncate(24 * time.Hour)
	recorded, omitted := 0, int64(0)
	for m := range 24 * 60 {
		inMinute := 0
		for i := range 30 {
			wait, n := th.allow(start.Add(time.Duration(m)*time.Minute + time.Duration(i)*time.Second))
			if omitted += n; wait == 0 {
				recorded++
				inMinute++
			}
		}
		if inMinute > maxFailuresAuditedPerMinute {
			t.Fatalf("%d entries in a minute", inMinute)
		}
	}
	last := start.Add(24*time.Hour - time.Second)
	if recorded != maxFailuresAuditedPerDay || th.drainOmitted(last, false) != 0 {
		t.Errorf("%d entries in a day", recorded)
	}
	omitted += th.drainOmitted(start.Add(24*time.Hour), false)
	if omitted+int64(recorded) != 24*60*30 || th.drainOmitted(last, true) != 0 {
		t.Errorf("%d recorded, %d omitted", recorded, omitted)
	}
	if wait, n := th.allow(start.Add(25 * time.Hour)); wait != 0 || n != 0 {
		t.Error("the next day allows no entry")
	}
	th.addOmitted(3)
	if th.drainOmitted(last, true) != 3 {
		t.Error("added events are not counted")
	}
}

// TestAddressThrottle: addresses are spread over the slots, an IPv6 address by its /64.
func TestAddressThrottle(t *testing.T) {
	t.Parallel()
	a := newAuthThrottle()
	for _, c := range []struct {
		first, second string
		shared        bool
	}{
		{"192.0.2.7", "192.0.2.7", true},
		{"192.0.2.7", "192.0.2.8", false},
		{"2001:db8::1", "2001:db8::ffff:1:2:3", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
		{"no address", "no address", true},
	} {
		if shared := a.forAddress(c.first) == a.forAddress(c.second); shared != c.shared {
			t.Errorf("%s and %s: shared %v, want %v", c.first, c.second, shared, c.shared)
		}
	}
}
