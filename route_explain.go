// This room says which upstream would get a call now, and why the others would
// not: the same rules as route.go, without taking anything. Plain code.
package main

// A routeLine is what choosing says of one upstream.
type routeLine struct {
	upstream *upstream
	share    float64 // of the calls, now
	why      string
}

// explain says of each upstream of the project what it would get of calls like w.
func (p *projectState) explain(w *wish) []routeLine {
	lines := make([]routeLine, 0, len(p.upstreams))
	var group []int // of lines
	for _, u := range p.upstreams {
		line := routeLine{upstream: u, why: w.obstacle(u)}
		if line.why == "" && len(group) > 0 && lines[group[0]].upstream.priority != u.priority {
			line.why = "stands by: upstreams of a lower priority number go first"
		}
		if lines = append(lines, line); line.why == "" {
			group = append(group, len(lines)-1)
		}
	}
	if len(group) == 0 {
		if u := p.leastBad(w); u != nil {
			for i := range lines {
				if lines[i].upstream == u {
					lines[i].share, lines[i].why = 1, "is asked because none is well: "+lines[i].why
				}
			}
		}
		return lines
	}
	var total int64
	for _, i := range group {
		total += lines[i].upstream.weight
	}
	for _, i := range group {
		lines[i].share, lines[i].why = float64(lines[i].upstream.weight)/float64(total), "shares the calls by weight"
		if len(group) == 1 {
			lines[i].why = "is the first that serves the model and is well"
		}
	}
	return lines
}

// obstacle says why an upstream cannot get a call now, "" if it can.
func (w *wish) obstacle(u *upstream) string {
	switch {
	case u.weight == 0:
		return "has the weight 0"
	case !u.serves(w.api, ""):
		return "speaks another provider's API"
	case !u.serves(w.api, w.model):
		return "does not have the model in its list"
	case !u.health.room(w.now, w.tokens, &u.settings, false):
		return "has no room left in its own limits for this minute"
	case !u.health.mayTry(w.now):
		h := u.health.row(w.now)
		return "is " + h.state.String() + ": " + h.reason
	}
	return ""
}
