// Tests of the edges of windows (LI4), and of calls that a token leaves behind
// when it ends (LI11).
package main

import (
	"testing"
	"time"
)

// TestWindowEdges (LI4): clients that hammer a limit across the edges of its
// window never get more than it says in any one window, and all of it in each.
func TestWindowEdges(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		per   string
		step  time.Duration
		whole int // windows that are hammered from end to end
	}{{"hour", 20 * time.Second, 5}, {"day", 7 * time.Minute, 5}, {"week", 53 * time.Minute, 5}, {"month", 4 * time.Hour, 5}} {
		l, s := newTestLimiter(t, ``, `{"count":"requests","max":10,"per":"`+test.per+`"}`, noon)
		per := s.counters[0].limit.per
		got := map[int64]int{}
		last := int64(0) // the window that has just begun
		for now := int64(noon); len(got) <= test.whole; now += test.step.Milliseconds() {
			from, to := per.window(now)
			last = from
			for range 3 {
				h, refused := l.try(s, chatAsk(1, 1), now)
				if refused == nil {
					got[from]++
					h.settle(now, spending{counted: true}, func() {})
				} else if refused.wait != to-now {
					t.Fatalf("%s: told to wait %d ms, %d before the edge", test.per, refused.wait, to-now)
				}
			}
		}
		for from, n := range got {
			if from != last && n != 10 {
				t.Errorf("%s from %s: %d calls", test.per, time.UnixMilli(from).UTC(), n)
			}
		}
	}
}

// TestCallsOutliveTheirToken (LI11): what a call used is put down to its token
// and project also when both ended while it ran.
func TestCallsOutliveTheirToken(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"limits":[{"count":"tokens","max":1000000,"per":"day"},{"count":"concurrent","max":100}]}}`, 200, nil)
	p.provider.answer(endless)
	const calls = 20
	for range calls {
		if _, err := p.stream(p.token, `"max_tokens":50`).read(1); err != nil {
			t.Fatal(err)
		}
	}
	p.manage("DELETE", "/manage/tokens/"+p.tokenID, "", 200, nil)
	p.manage("DELETE", "/manage/projects/"+p.project, "", 200, nil)
	rows := p.ledger()
	if len(rows) != calls {
		t.Fatalf("%d of %d calls are on record", len(rows), calls)
	}
	for _, row := range rows {
		if row.TokenID != p.tokenID || row.InputTokens == 0 || row.Outcome != string(outcomeTruncated) {
			t.Errorf("the ledger has %+v", row)
		}
	}
	if l := &p.in.registry.liveToken(p.tokenID).project.limiter; l.running != nil || l.project.counters[1].held != 0 || l.project.counters[0].held != 0 {
		t.Error("reservations are left behind")
	}
}
