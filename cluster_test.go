//go:build postgres

// These tests run several replicas on one PostgreSQL database, in one process.
package main

import "testing"

// TestClusterStarts: replicas answer calls with one database, each has a slot of its own, and exactly one leads.
func TestClusterStarts(t *testing.T) {
	requirePostgres(t)
	all := newReplicas(t, 3, nil)
	slots := map[int64]bool{}
	for _, p := range all {
		if res := p.chat(); res.status != 200 {
			t.Errorf("got %d %s", res.status, res.body)
		}
		slots[p.instance.store.backend.slot()] = true
	}
	if len(slots) != len(all) {
		t.Errorf("slots: %v", slots)
	}
	waitFor(t, "one leader", func() bool { return countLeaders(all) == 1 })
	if err := all[0].stop(); err != nil { // it leads
		t.Fatal(err)
	}
	waitFor(t, "another leader", func() bool { return countLeaders(all[1:]) == 1 })
}

func countLeaders(all []*testProxy) (n int) {
	for _, p := range all {
		if p.instance.store.isLeader() {
			n++
		}
	}
	return n
}
