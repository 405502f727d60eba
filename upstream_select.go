// This room chooses the upstream for a call, by priority, health and weight. It
// makes no call, and changes nothing but who probes a key. Plain code; time
// comes in as an argument.
package main

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A criteria is what a call asks of its project's upstreams.
type criteria struct {
	api         apiFamily
	model       string
	pinned      bool  // only the first that serves will do: it keeps the objects that the call may name
	tokens      int64 // an estimate of what it takes from an upstream's own limit
	now         int64
	tried       []*upstream // which have had their turn
	healthyOnly bool        // nil is better than one that is not well
}

// fits reports whether an upstream may take the call at all.
func (w *criteria) fits(u *upstream) bool {
	return u.weight > 0 && u.serves(w.api, w.model) && !slices.Contains(w.tried, u) && u.health.admits(w.now, w.tokens, &u.settings, false)
}

// reserve takes the call from the upstream's own limits, and its probe if it needs
// one. Both can fail, for other calls choose at the same time.
func (w *criteria) reserve(u *upstream) bool {
	if !u.health.tryAcquire(w.now) {
		return false
	}
	if !u.health.admits(w.now, w.tokens, &u.settings, true) {
		u.health.endProbe()
		return false
	}
	return true
}

// pickUpstream chooses the upstream for a call: among those of the first priority that
// has one which serves the call and is well, by chance and weight. Weight 0
// takes an upstream out of turn. If none is well, the least bad one is tried:
// what the provider then says is more use to the client than a guess of ours.
// It is nil where none serves the call, where those that do have no room left in
// their own limits, and, if the wish is strict, where none is well.
func (p *projectState) pickUpstream(w *criteria) *upstream {
	if w.pinned {
		return p.pinnedUpstream(w)
	}
	var space [64]*upstream
	for group := p.upstreams; len(group) > 0; { // in order of priority
		ready, rest := w.appendReady(group, space[:0])
		for len(ready) > 0 {
			i := weightedPick(ready)
			if w.reserve(ready[i]) {
				return ready[i]
			}
			ready = slices.Delete(ready, i, i+1) // another call probes it
		}
		group = rest
	}
	if w.healthyOnly {
		return nil
	}
	if u := p.soonestReady(w); u != nil && u.health.admits(w.now, w.tokens, &u.settings, true) {
		return u
	}
	return nil
}

// appendReady appends to found those of the first priority in list that may have the
// call now, and returns what of list is left.
func (w *criteria) appendReady(list, found []*upstream) (ready, rest []*upstream) {
	for i, u := range list {
		if u.priority != list[0].priority {
			return found, list[i:]
		}
		if w.fits(u) && u.health.available(w.now) {
			found = append(found, u)
		}
	}
	return found, nil
}

// weightedPick picks one by chance and weight. If that one has more running calls than
// its weight and chance explain (by two standard deviations), the least busy
// for its weight goes first: a key that hangs must not collect the calls until it
// is known to hang.
func weightedPick(list []*upstream) int {
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

// pinnedUpstream returns the first upstream that serves the call, well or not.
func (p *projectState) pinnedUpstream(w *criteria) *upstream {
	for _, u := range p.upstreams {
		if u.weight > 0 && u.serves(w.api, w.model) {
			if slices.Contains(w.tried, u) || !u.health.admits(w.now, w.tokens, &u.settings, true) {
				return nil
			}
			return u
		}
	}
	return nil
}

// atCapacity reports whether an upstream serves the call but has no room left.
func (p *projectState) atCapacity(w *criteria) bool {
	for _, u := range p.upstreams {
		if u.weight > 0 && u.serves(w.api, w.model) && !u.health.admits(w.now, w.tokens, &u.settings, false) {
			return true
		}
	}
	return false
}

// soonestReady returns the upstream that is to be well again soonest, of those that
// are in the least trouble.
func (p *projectState) soonestReady(w *criteria) (best *upstream) {
	var least healthRow
	for _, u := range p.upstreams {
		if !w.fits(u) {
			continue
		}
		if r := u.health.snapshot(w.now); best == nil || r.state < least.state || r.state == least.state && r.until < least.until {
			best, least = u, r
		}
	}
	return best
}

// hasAlternative reports whether pick would find another upstream.
func (p *projectState) hasAlternative(w *criteria) bool {
	if w.pinned {
		return false
	}
	for _, u := range p.upstreams {
		if w.fits(u) && u.health.available(w.now) {
			return true
		}
	}
	return false
}

// A routeExplanation is what choosing says of one upstream.
type routeExplanation struct {
	upstream *upstream
	share    float64 // of the calls, now
	reason   string
}

// explain says of each upstream of the project what it would get of calls like w.
func (p *projectState) explain(w *criteria) []routeExplanation {
	lines := make([]routeExplanation, 0, len(p.upstreams))
	var group []int // of lines
	for _, u := range p.upstreams {
		line := routeExplanation{upstream: u, reason: w.exclusionReason(u)}
		if line.reason == "" && len(group) > 0 && lines[group[0]].upstream.priority != u.priority {
			line.reason = "stands by: upstreams of a lower priority number go first"
		}
		if lines = append(lines, line); line.reason == "" {
			group = append(group, len(lines)-1)
		}
	}
	if len(group) == 0 {
		if u := p.soonestReady(w); u != nil {
			for i := range lines {
				if lines[i].upstream == u {
					lines[i].share, lines[i].reason = 1, "is asked because none is well: "+lines[i].reason
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
		lines[i].share, lines[i].reason = float64(lines[i].upstream.weight)/float64(total), "shares the calls by weight"
		if len(group) == 1 {
			lines[i].reason = "is the first that serves the model and is well"
		}
	}
	return lines
}

// exclusionReason says why an upstream cannot get a call now, "" if it can.
func (w *criteria) exclusionReason(u *upstream) string {
	switch {
	case u.weight == 0:
		return "has the weight 0"
	case !u.serves(w.api, ""):
		return "speaks another provider's API"
	case !u.serves(w.api, w.model):
		return "does not have the model in its list"
	case !u.health.admits(w.now, w.tokens, &u.settings, false):
		return "has no room left in its own limits for this minute"
	case !u.health.available(w.now):
		h := u.health.snapshot(w.now)
		return "is " + h.state.String() + ": " + h.reason
	}
	return ""
}

// A routing is a project's settings for its calls' way. The zero value is what
// holds where nothing is said.
type routing struct {
	Fallbacks []fallback `json:"fallbacks,omitzero"`
	// VerifiedStreams has every stream held until it is complete.
	VerifiedStreams bool `json:"verified_streams,omitzero"`
	// ShowUpstream has each answer say which upstream it comes from.
	ShowUpstream bool `json:"show_upstream,omitzero"`
}

// A fallback is the model that stands in for those of a pattern.
type fallback struct {
	Model string `json:"model"`
	To    string `json:"to"`
}

// parseRouting reads a project's routing from JSON, strictly.
func parseRouting(raw []byte) (r routing, err error) {
	var fallbacks optional[[]json.RawMessage]
	var verified, show optional[bool]
	if err := decodeObject(raw, map[string]any{"fallbacks": &fallbacks, "verified_streams": &verified, "show_upstream": &show}); err != nil {
		return routing{}, qualifyFieldError("routing", err)
	}
	r.VerifiedStreams, r.ShowUpstream = verified.value, show.value
	if len(fallbacks.value) > 100 {
		return routing{}, &fieldError{"routing.fallbacks", "must have 100 entries or fewer"}
	}
	for i, raw := range fallbacks.value {
		param := "routing.fallbacks[" + strconv.Itoa(i) + "]"
		var model, to optional[string]
		if err := decodeObject(raw, map[string]any{"model": &model, "to": &to}); err != nil {
			return routing{}, qualifyFieldError(param, err)
		}
		if err := checkPatterns(param+".model", []string{model.value}); err != nil {
			return routing{}, err
		}
		if err := checkModelName(param+".to", to.value); err != nil {
			return routing{}, err
		}
		r.Fallbacks = append(r.Fallbacks, fallback{model.value, to.value})
	}
	return r, nil
}

// qualifyFieldError names the object that a field with a mistake is in.
func qualifyFieldError(object string, err error) error {
	if e, ok := err.(*fieldError); ok && e.param != "" {
		return &fieldError{object + "." + e.param, e.msg}
	} else if ok { // it is JSON, as part of a body that was read
		return &fieldError{object, "must be an object"}
	}
	return err
}

func checkModelName(param, name string) error {
	if name == "" || len(name) > maxModelLen || strings.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c == 0x7f || c == '*' }) {
		return &fieldError{param, "must be a model's name: 1 to 256 bytes, without spaces and *"}
	}
	return nil
}

func (r routing) String() string {
	b, err := json.Marshal(r)
	if err != nil { // cannot be: strings and bools
		return "{}"
	}
	return string(b)
}

// fallbackFor returns the model that stands in for another, "" if none does.
func (r *routing) fallbackFor(model string) string {
	for _, f := range r.Fallbacks {
		if matchesPattern(f.Model, model) && f.To != model {
			return f.To
		}
	}
	return ""
}

// parseRewrite reads an upstream's own names for models: what clients ask for,
// and what is sent instead.
func parseRewrite(raw []byte) (map[string]string, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	wrong := &fieldError{"rewrite", `must be an object of strings, as in {"gpt-4o":"my-deployment"}`}
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, wrong
	}
	out := map[string]string{}
	for dec.More() {
		name, err := dec.Token()
		from, ok := name.(string)
		if err != nil || !ok {
			return nil, wrong
		}
		value, err := dec.Token()
		to, ok := value.(string)
		if err != nil || !ok {
			return nil, wrong
		}
		if _, twice := out[from]; twice {
			return nil, &fieldError{"rewrite", "names " + clip(from, 64) + " twice"}
		}
		for _, n := range [...]string{from, to} {
			if err := checkModelName("rewrite", n); err != nil {
				return nil, err
			}
		}
		out[from] = to
	}
	if len(out) > 500 {
		return nil, &fieldError{"rewrite", "must have 500 entries or fewer"}
	}
	return out, nil
}

// upstreamSettings are an upstream's own limits and patience; 0: none, or what
// the environment sets.
type upstreamSettings struct {
	ConnectMS         int64  `json:"connect_ms,omitzero"`
	AnswerMS          int64  `json:"answer_ms,omitzero"`
	FirstEventMS      int64  `json:"first_event_ms,omitzero"`
	IdleMS            int64  `json:"idle_ms,omitzero"`
	RequestsPerMinute int64  `json:"requests_per_minute,omitzero"`
	TokensPerMinute   int64  `json:"tokens_per_minute,omitzero"`
	Note              string `json:"note,omitzero"`
}

// check holds the settings to their rules.
func (u *upstreamSettings) check() error {
	longest, connect := (2 * time.Hour).Milliseconds(), connectTimeout.Milliseconds()
	for _, f := range []struct {
		name        string
		v, from, to int64
	}{
		{"connect_ms", u.ConnectMS, 100, connect}, {"answer_ms", u.AnswerMS, 100, longest},
		{"first_event_ms", u.FirstEventMS, 100, longest}, {"idle_ms", u.IdleMS, 100, longest},
		{"requests_per_minute", u.RequestsPerMinute, 1, 1_000_000_000}, {"tokens_per_minute", u.TokensPerMinute, 1, 1_000_000_000_000},
	} {
		if f.v != 0 && (f.v < f.from || f.v > f.to) {
			return &fieldError{f.name, "must be 0 or from " + strconv.FormatInt(f.from, 10) + " to " + strconv.FormatInt(f.to, 10)}
		}
	}
	if len(u.Note) > 500 || strings.ContainsFunc(u.Note, func(c rune) bool { return c < ' ' || c == 0x7f }) {
		return &fieldError{"note", "must have at most 500 bytes, without control characters"}
	}
	return nil
}

func (u *upstreamSettings) String() string {
	b, err := json.Marshal(u)
	if err != nil { // cannot be: numbers and a string
		return "{}"
	}
	return string(b)
}
