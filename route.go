// This room chooses the upstream for a call, by priority, health and weight. It
// makes no call, and changes nothing but who probes a key. Plain code; time
// comes in as an argument.
package main

import (
	"math/rand/v2"
	"slices"
)

// A wish is what a call asks of its project's upstreams.
type wish struct {
	api    apiFamily
	model  string
	pinned bool  // only the first that serves will do: it keeps the objects that the call may name
	tokens int64 // an estimate of what it takes from an upstream's own limit
	now    int64
	tried  []*upstream // which have had their turn
	strict bool        // nil is better than one that is not well
}

// fits reports whether an upstream may take the call at all.
func (w *wish) fits(u *upstream) bool {
	return u.weight > 0 && u.serves(w.api, w.model) && !slices.Contains(w.tried, u) && u.health.room(w.now, w.tokens, &u.settings, false)
}

// take takes the call from the upstream's own limits, and its probe if it needs
// one. Both can fail, for other calls choose at the same time.
func (w *wish) take(u *upstream) bool {
	if !u.health.take(w.now) {
		return false
	}
	if !u.health.room(w.now, w.tokens, &u.settings, true) {
		u.health.release()
		return false
	}
	return true
}

// pick chooses the upstream for a call: among those of the first priority that
// has one which serves the call and is well, by chance and weight. Weight 0
// takes an upstream out of turn. If none is well, the least bad one is tried:
// what the provider then says is more use to the client than a guess of ours.
// It is nil where none serves the call, where those that do have no room left in
// their own limits, and, if the wish is strict, where none is well.
func (p *projectState) pick(w *wish) *upstream {
	if w.pinned {
		return p.first(w)
	}
	var space [64]*upstream
	for group := p.upstreams; len(group) > 0; { // in order of priority
		ready, rest := w.ready(group, space[:0])
		for len(ready) > 0 {
			i := draw(ready)
			if w.take(ready[i]) {
				return ready[i]
			}
			ready = slices.Delete(ready, i, i+1) // another call probes it
		}
		group = rest
	}
	if w.strict {
		return nil
	}
	if u := p.leastBad(w); u != nil && u.health.room(w.now, w.tokens, &u.settings, true) {
		return u
	}
	return nil
}

// ready appends to found those of the first priority in list that may have the
// call now, and returns what of list is left.
func (w *wish) ready(list, found []*upstream) (ready, rest []*upstream) {
	for i, u := range list {
		if u.priority != list[0].priority {
			return found, list[i:]
		}
		if w.fits(u) && u.health.mayTry(w.now) {
			found = append(found, u)
		}
	}
	return found, nil
}

// draw picks one by chance and weight. If that one has more running calls than
// its weight and chance explain (by two standard deviations), the least busy
// for its weight goes first: a key that hangs must not collect the calls until it
// is known to hang.
func draw(list []*upstream) int {
	if len(list) == 1 {
		return 0
	}
	var weights int64
	for _, u := range list {
		weights += u.weight
	}
	at, drawn := rand.Int64N(weights), 0
	for at -= list[0].weight; at >= 0; at -= list[drawn].weight {
		drawn++
	}
	const isBusy = 4
	busy := list[drawn].health.running.Load()
	if busy < isBusy {
		return drawn
	}
	var all int64
	for _, u := range list {
		all += u.health.running.Load()
	}
	expected := float64(all) * float64(list[drawn].weight) / float64(weights)
	if more := float64(busy) - expected; more <= 0 || more*more <= 4*expected {
		return drawn
	}
	best, least := drawn, busy
	for i, u := range list {
		if n := u.health.running.Load(); n*list[best].weight < least*u.weight {
			best, least = i, n
		}
	}
	return best
}

// first returns the first upstream that serves the call, well or not.
func (p *projectState) first(w *wish) *upstream {
	for _, u := range p.upstreams {
		if u.weight > 0 && u.serves(w.api, w.model) {
			if slices.Contains(w.tried, u) || !u.health.room(w.now, w.tokens, &u.settings, true) {
				return nil
			}
			return u
		}
	}
	return nil
}

// full reports whether an upstream serves the call but has no room left.
func (p *projectState) full(w *wish) bool {
	for _, u := range p.upstreams {
		if u.weight > 0 && u.serves(w.api, w.model) && !u.health.room(w.now, w.tokens, &u.settings, false) {
			return true
		}
	}
	return false
}

// leastBad returns the upstream that is to be well again soonest, of those that
// are in the least trouble.
func (p *projectState) leastBad(w *wish) (best *upstream) {
	var least healthRow
	for _, u := range p.upstreams {
		if !w.fits(u) {
			continue
		}
		if r := u.health.row(w.now); best == nil || r.state < least.state || r.state == least.state && r.until < least.until {
			best, least = u, r
		}
	}
	return best
}

// spare reports whether pick would find another upstream.
func (p *projectState) spare(w *wish) bool {
	if w.pinned {
		return false
	}
	for _, u := range p.upstreams {
		if w.fits(u) && u.health.mayTry(w.now) {
			return true
		}
	}
	return false
}
