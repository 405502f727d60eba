// Tests of the choice among a project's upstreams.
package main

import "testing"

// testPool is a project with these upstreams, all well.
func testPool(list ...*upstream) *projectState {
	book := newHealthBook()
	for i, u := range list {
		u.health, u.budget = book.of(int64(i+1), u.id), book.budget(u.host)
	}
	return &projectState{upstreams: list}
}

// TestUpstreamShares: calls go to the first priority that serves them, in shares
// by weight; weight 0 gets none. What is not well is passed over, one that is
// well again gets its share.
func TestUpstreamShares(t *testing.T) {
	t.Parallel()
	p := testPool(
		&upstream{id: "a", provider: providerOpenAI, weight: 1}, &upstream{id: "claude", provider: providerAnthropic, weight: 9},
		&upstream{id: "b", provider: providerCompatible, weight: 3, models: []string{"gpt*"}}, &upstream{id: "out", provider: providerOpenAI, weight: 0},
		&upstream{id: "c", provider: providerOpenAI, weight: 6, models: []string{"o*"}},
		&upstream{id: "d", provider: providerOpenAI, weight: 1, models: []string{"o*"}},
		&upstream{id: "e", provider: providerOpenAI, weight: 2, models: []string{"o*"}},
		&upstream{id: "spare", provider: providerOpenAI, weight: 5, priority: 1},
		&upstream{id: "last", provider: providerOpenAI, weight: 5, priority: 2},
	)
	health := map[string]*keyHealth{}
	for _, u := range p.upstreams {
		health[u.id] = u.health
	}
	const now, calls = 1_000_000, 40_000
	for _, c := range []struct {
		name, model string
		do          func()
		now         int64
		want        map[string]float64
	}{
		{"weights", "gpt-4o", nil, now, map[string]float64{"a": 0.25, "b": 0.75}},
		{"only one serves", "llama", nil, now, map[string]float64{"a": 1}},
		{"of four", "o3", nil, now, map[string]float64{"a": 0.1, "c": 0.6, "d": 0.1, "e": 0.2}},
		{"one is cooling", "o3", func() { health["c"].limited(now, now, 20_000, "") }, now + 1, map[string]float64{"a": 0.25, "d": 0.25, "e": 0.5}},
		{"it has cooled", "o3", nil, now + 20_000, map[string]float64{"a": 0.1, "c": 0.6, "d": 0.1, "e": 0.2}},
		{"two are dead", "o3", func() {
			health["a"].fault(now+20_001, now+20_000, true, "")
			health["c"].quarantined(now+20_001, now+20_000, "")
		}, now + 20_002, map[string]float64{"d": 0.33, "e": 0.67}},
		{"a group is down", "gpt-4o", func() { health["b"].exhausted(now+20_001, now+20_000, "") }, now + 20_002, map[string]float64{"spare": 1}},
		{"two groups are", "gpt-4o", func() { health["spare"].fault(now+20_001, now+20_000, true, "") }, now + 20_002, map[string]float64{"last": 1}},
		{"all are: the least bad", "gpt-4o", func() { health["last"].limited(now+20_001, now+20_000, 5000, "") }, now + 20_002, map[string]float64{"last": 1}},
		{"a probe goes out, once", "gpt-4o", nil, now + 20_001 + openLeast, map[string]float64{"last": 1}},
	} {
		if c.do != nil {
			c.do()
		}
		got := map[string]int{}
		for range calls {
			got[p.pick(&wish{api: apiOpenAI, model: c.model, now: c.now}).id]++
		}
		if c.name == "a probe goes out, once" { // one to each that is due, and all others to the least bad
			if got["a"] != 1 || got["spare"] != 1 {
				t.Errorf("%s: %v", c.name, got)
			}
			continue
		}
		if len(got) != len(c.want) {
			t.Errorf("%s: %v", c.name, got)
		}
		for id, share := range c.want { // ±2 % of the calls is 8 standard deviations and more
			if d := float64(got[id])/calls - share; d > 0.02 || d < -0.02 {
				t.Errorf("%s: %s got %d of %d calls, want a share of %.2f", c.name, id, got[id], calls, share)
			}
		}
	}
	if u := testPool(p.upstreams[3]).pick(&wish{api: apiOpenAI}); u != nil {
		t.Errorf("weight 0: %s was chosen", u.id)
	}
}
