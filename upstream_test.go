// Tests of the choice among a project's upstreams.
package main

import "testing"

// TestUpstreamShares: calls go to the first priority that serves them, in shares
// by weight; weight 0 gets none.
func TestUpstreamShares(t *testing.T) {
	t.Parallel()
	p := &projectState{upstreams: []*upstream{
		{id: "a", provider: providerOpenAI, weight: 1}, {id: "claude", provider: providerAnthropic, weight: 9},
		{id: "b", provider: providerCompatible, weight: 3, models: []string{"gpt*"}}, {id: "out", provider: providerOpenAI, weight: 0},
		{id: "spare", provider: providerOpenAI, weight: 5, priority: 1},
	}}
	const calls = 40_000
	for _, c := range []struct {
		model string
		want  map[string]float64
	}{{"gpt-4o", map[string]float64{"a": 0.25, "b": 0.75}}, {"llama", map[string]float64{"a": 1}}} {
		got := map[string]int{}
		for range calls {
			got[p.pick(apiOpenAI, c.model).id]++
		}
		if len(got) != len(c.want) {
			t.Errorf("%s: %v", c.model, got)
		}
		for id, share := range c.want { // ±2 % of the calls is 9 standard deviations
			if d := float64(got[id])/calls - share; d > 0.02 || d < -0.02 {
				t.Errorf("%s: %s got %d of %d calls, want a share of %.2f", c.model, id, got[id], calls, share)
			}
		}
	}
	if u := (&projectState{upstreams: p.upstreams[3:4]}).pick(apiOpenAI, ""); u != nil {
		t.Errorf("weight 0: %s was chosen", u.id)
	}
}
