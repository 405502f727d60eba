// This file chooses the upstreams of a call, the first and the next, and holds a project's routing and an
// upstream's settings. It does no I/O and takes the time as an argument. It changes nothing but the reservations
// and probes of keys.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// A criteria says what a call requires of its upstream.
type criteria struct {
	api         apiFamily
	endpoint    string // its pattern; "": any
	model       string
	pinned      bool        // only the first that serves the call: it has the objects that the call may name
	affinity    affinity    // which calls this one belongs to
	tokens      int64       // an estimate, for the upstream's own limits
	now         int64       // unix milliseconds
	tried       []*upstream // these are out: the call has tried them
	unreserved  bool        // nothing is reserved: the call may turn out to need no upstream
	overLimits  bool        // an upstream that has reached its own limits will do
	healthyOnly bool        // no unhealthy upstream, even if there is no other
	earlyProbe  bool        // only keys with an open breaker, before their pause is over: the call fails otherwise
}

// fits reports whether an upstream may serve the call, whatever its health.
func (c *criteria) fits(u *upstream) bool {
	return u.weight > 0 && u.serves(c.api, c.model) && !slices.Contains(c.tried, u) &&
		(c.overLimits || u.health.admits(c.now, c.tokens, &u.settings, false))
}

// admits reserves the call in the upstream's own limits, and reports whether they have room for it.
func (u *upstream) admits(c *criteria) bool {
	return c.unreserved || u.health.admits(c.now, c.tokens, &u.settings, true)
}

// isHealthy reports whether the upstream's key may have the call now.
func (c *criteria) isHealthy(u *upstream) bool {
	return u.health.available(c.now) && u.health.modelPause(c.now, c.endpoint, c.model) == nil
}

// reserve reserves the call in the upstream's own limits, and the probe of its key if one is due. Both can fail,
// because other calls choose at the same time.
func (c *criteria) reserve(u *upstream) bool {
	if c.unreserved {
		return true
	}
	if !u.health.tryAcquire(c.now) {
		return false
	}
	if !u.admits(c) {
		u.health.endProbe()
		return false
	}
	return true
}

// pickUpstream chooses the upstream for a call and reserves the call there. It picks by affinity or weight in the first
// priority that has a healthy upstream which serves the call; it never picks one of weight 0. If none is healthy,
// it returns the one in the least severe state, because a provider's answer helps the client more than the
// proxy's guess. It returns nil if no upstream serves the call, if those that do have no capacity left in their
// own limits, and with healthyOnly if none is healthy.
func (p *projectState) pickUpstream(c *criteria) *upstream {
	if c.pinned {
		return p.pinnedUpstream(c)
	}
	if c.earlyProbe {
		return p.probeEarly(c)
	}
	var space [64]*upstream                     // saves an allocation
	for group := p.upstreams; len(group) > 0; { // in order of priority
		ready, rest := c.appendReady(group, space[:0])
		for len(ready) > 0 {
			i := c.affinity.pick(ready)
			if c.reserve(ready[i]) {
				return ready[i]
			}
			ready = slices.Delete(ready, i, i+1) // another call has just taken its probe or its capacity
		}
		group = rest
	}
	if c.healthyOnly {
		return nil
	}
	if u := p.soonestReady(c); u != nil && u.admits(c) {
		return u
	}
	return nil
}

// probeEarly returns the first upstream whose breaker is open and was not tried in the last second.
func (p *projectState) probeEarly(c *criteria) *upstream {
	for _, u := range p.upstreams {
		if c.fits(u) && u.health.probeEarly(c.now) {
			if u.admits(c) {
				return u
			}
			u.health.endProbe()
		}
	}
	return nil
}

// appendReady appends to found the upstreams of the first priority in list that may have the call now, and
// returns the rest of list.
func (c *criteria) appendReady(list, found []*upstream) (ready, rest []*upstream) {
	for i, u := range list {
		if u.priority != list[0].priority {
			return found, list[i:]
		}
		if c.fits(u) && c.isHealthy(u) {
			found = append(found, u)
		}
	}
	return found, nil
}

// pinnedUpstream returns the first upstream that serves the call, healthy or not.
func (p *projectState) pinnedUpstream(c *criteria) *upstream {
	for _, u := range p.upstreams {
		if u.weight > 0 && u.serves(c.api, c.model) {
			if slices.Contains(c.tried, u) || !u.admits(c) {
				return nil
			}
			return u
		}
	}
	return nil
}

// atCapacity reports whether an upstream serves the call but has no capacity left in its own limits.
func (p *projectState) atCapacity(c *criteria) bool {
	return slices.ContainsFunc(p.upstreams, func(u *upstream) bool {
		return u.weight > 0 && u.serves(c.api, c.model) && !u.health.admits(c.now, c.tokens, &u.settings, false)
	})
}

// soonestReady returns the upstream in the least severe state and, of several, the one that is ready first.
func (p *projectState) soonestReady(c *criteria) (best *upstream) {
	var least healthRow
	for _, u := range p.upstreams {
		if !c.fits(u) {
			continue
		}
		r := u.health.snapshot(c.now)
		if pause := u.health.modelPause(c.now, c.endpoint, c.model); pause != nil {
			r.state, r.until = max(r.state, keyQuarantined), max(r.until, pause.until)
		}
		if best == nil || r.state < least.state || r.state == least.state && r.until < least.until {
			best, least = u, r
		}
	}
	return best
}

// hasCandidate reports whether an upstream other than u may have such calls, whatever its health.
func (p *projectState) hasCandidate(c *criteria, u *upstream) bool {
	return slices.ContainsFunc(p.upstreams, func(other *upstream) bool {
		return other != u && other.weight > 0 && other.serves(c.api, c.model)
	})
}

// hasAlternative reports whether pickUpstream would find another healthy upstream.
func (p *projectState) hasAlternative(c *criteria) bool {
	if c.pinned {
		return false
	}
	return slices.ContainsFunc(p.upstreams, func(u *upstream) bool { return c.fits(u) && c.isHealthy(u) })
}

// A route is the way of one call through a project's upstreams: where it was, and where it may still go.
type route struct {
	fallbackModel  string       // replaces the client's model; "": the client's own
	fallbacks      int          // how often the call has fallen back: once, or through the models of its alias
	skippedModel   string       // the client's model, if the call began with its fallback model; "" once it is asked
	tried          []*upstream  // upstreams that failed; they get no further attempt
	slow           slowUpstream // may still have the call, if no other upstream answers
	retriedSameKey bool         // a key has had its second attempt; a call makes only one such
}

// A slowUpstream had to give the call to a spare, because its stream's first event took too long. It would have had
// UPSTREAM_TIMEOUT if it were alone, and has that if all others fail.
type slowUpstream struct {
	upstream *upstream // nil: there is none
	model    string    // the fallback model that it was asked for, "" for the client's
}

// A failedAttempt is why a call needs another upstream.
type failedAttempt struct {
	upstream *upstream
	fault    bool   // the provider is in trouble, not this key alone: a retry at its host costs retry budget
	tooLong  bool   // the call is too long for the model: only a fallback model can help
	fallback string // the model that the call can fall back to, "" if there is none
}

// pickFirst chooses and reserves a call's first upstream, nil if there is none. If no upstream of its model is ready,
// one of the fallback model ("": none) goes before a key that is known to be in trouble.
func (r *route) pickFirst(p *projectState, c criteria, fallback string) *upstream {
	if fallback == "" {
		return p.pickUpstream(&c)
	}
	own := c.model
	c.healthyOnly = true
	if u := p.pickUpstream(&c); u != nil {
		return u
	}
	c.model = fallback
	if u := p.pickUpstream(&c); u != nil {
		r.fallbackModel, r.fallbacks, r.skippedModel = fallback, r.fallbacks+1, own
		return u
	}
	c.model, c.healthyOnly = own, false
	return p.pickUpstream(&c)
}

// pickNext chooses and reserves a healthy upstream for the next attempt, nil if there is none.
func (r *route) pickNext(p *projectState, c *criteria, f *failedAttempt) *upstream {
	if f.tooLong { // it would be so at every upstream
		return nil
	}
	return p.pickAfter(c, f)
}

// pickAfter is pickUpstream after a failed attempt. After a fault of the provider, an attempt at the same host costs
// retry budget; without any, only other hosts are left.
func (p *projectState) pickAfter(c *criteria, f *failedAttempt) *upstream {
	for {
		next := p.pickUpstream(c)
		if next == nil || !f.fault || next.host != f.upstream.host || next.retryBudget.spend(c.now) {
			return next
		}
		next.health.unreserve(c.now, c.tokens, &next.settings)
		c.tried = append(c.tried, next)
	}
}

// pickLast chooses and reserves what is left if no healthy upstream is: the fallback model, then a key that may be
// down, because the call fails otherwise. It returns nil if nothing is left, and the fallback model to ask for.
func (r *route) pickLast(p *projectState, c criteria, f *failedAttempt) (next *upstream, model string) {
	if f.fallback != "" {
		other := c
		other.model, other.tried = f.fallback, nil
		if next = p.pickAfter(&other, f); next != nil {
			r.fallbacks++
			return next, f.fallback
		}
	}
	if !f.tooLong {
		early := c
		early.earlyProbe = true
		if next = p.pickAfter(&early, f); next != nil {
			return next, r.fallbackModel
		}
		if u := r.slow.upstream; u != nil && u.retryBudget.spend(c.now) && u.admits(&c) {
			r.slow.upstream = nil
			return u, r.slow.model
		}
	}
	if r.skippedModel != "" {
		c.model, c.tried, c.healthyOnly = r.skippedModel, nil, false
		r.skippedModel = ""
		next = p.pickAfter(&c, f)
	}
	return next, ""
}

// moveOn notes that the call goes on after an attempt at failed, with a fallback model or "" for the client's.
func (r *route) moveOn(failed *upstream, model string) {
	r.tried = append(r.tried, failed)
	if model != r.fallbackModel { // an upstream may serve one model and not another
		r.fallbackModel, r.tried = model, nil
	}
}

// reserveSameKey reports whether the failed key gets the call a second time, and reserves that. A call makes only one
// such attempt, and only if another upstream might have the call: with one, the client's own library retries. costs
// means that the attempt costs retry budget.
func (r *route) reserveSameKey(p *projectState, c *criteria, f *failedAttempt, costs bool) bool {
	if r.retriedSameKey {
		return false
	}
	if !p.hasCandidate(c, f.upstream) {
		other := *c
		if other.model = f.fallback; other.model == "" || !p.hasCandidate(&other, f.upstream) {
			return false
		}
	}
	if !f.upstream.admits(c) {
		return false
	}
	if costs && !f.upstream.retryBudget.spend(c.now) {
		f.upstream.health.unreserve(c.now, c.tokens, &f.upstream.settings)
		return false
	}
	return true
}

// A routeQuery describes a call whose route is to be explained.
type routeQuery struct {
	model   string
	api     string // openai, which "" stands for, anthropic or gemini
	session string // "": none
}

// criteria returns what such a call requires of an upstream, without its affinity.
func (q *routeQuery) criteria(now int64) (criteria, error) {
	api, err := parseAPIFamily(cmp.Or(q.api, "openai"))
	if err == nil {
		err = checkModelName("model", q.model)
	}
	if err == nil && len(q.session) > maxSessionLen {
		err = &fieldError{"session", "must have " + strconv.Itoa(maxSessionLen) + " bytes or fewer"}
	}
	return criteria{api: api, model: q.model, now: now}, err
}

// A routeExplanation says why an upstream gets calls or does not.
type routeExplanation struct {
	upstream *upstream
	model    string  // as asked for there: the call's, or its fallback
	share    float64 // of the calls that are like this one, now
	reason   string
}

// explain returns, for each upstream of the project, which share of such calls it would get, and why.
func (p *projectState) explain(c *criteria) []routeExplanation {
	lines := make([]routeExplanation, 0, len(p.upstreams))
	var group []int // of lines
	for _, u := range p.upstreams {
		line := routeExplanation{upstream: u, model: c.model, reason: c.exclusionReason(u)}
		if line.reason == "" && len(group) > 0 && lines[group[0]].upstream.priority != u.priority {
			line.reason = "is on standby: upstreams with a lower priority number go first"
		}
		if lines = append(lines, line); line.reason == "" {
			group = append(group, len(lines)-1)
		}
	}
	if len(group) == 0 {
		if p.explainFallback(c, lines) {
			return lines
		}
		if u := p.soonestReady(c); u != nil {
			for i := range lines {
				if lines[i].upstream == u {
					lines[i].share, lines[i].reason = 1, "is tried because none is healthy: "+lines[i].reason
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
		switch {
		case len(group) == 1:
			lines[i].reason = "is the first that serves the model and is healthy"
		case p.routing.Affinity != affinityOff:
			lines[i].reason += "; those of a session stay together"
		}
	}
	c.affinity.explain(lines, group)
	return lines
}

// explainFallback fills in the lines of the upstreams that get such calls with their fallback model, because no
// upstream of their own is ready. It reports whether there are any.
func (p *projectState) explainFallback(c *criteria, lines []routeExplanation) bool {
	fallback := *c
	if fallback.model = p.routing.fallbackFor(c.model); fallback.model == "" || !p.hasAlternative(&fallback) {
		return false
	}
	for i, line := range p.explain(&fallback) {
		if line.share > 0 {
			line.reason += ", with the fallback model " + line.model + ": no upstream of " + c.model + " is ready"
			lines[i] = line
		}
	}
	return true
}

// exclusionReason returns why an upstream cannot get such a call now, "" if it can.
func (c *criteria) exclusionReason(u *upstream) string {
	switch {
	case u.weight == 0:
		return "has weight 0"
	case !u.serves(c.api, ""):
		return "speaks another provider's API"
	case !u.serves(c.api, c.model):
		return "does not have the model in its list"
	case !u.health.admits(c.now, c.tokens, &u.settings, false):
		return "has reached its own limits for this minute"
	case !u.health.available(c.now):
		h := u.health.snapshot(c.now)
		return "is " + h.state.String() + ": " + h.reason
	}
	if pause := u.health.modelPause(c.now, c.endpoint, c.model); pause != nil {
		return "does not get calls to " + pause.endpoint + " for this model: " + pause.reason
	}
	return ""
}

// A routing is a project's settings for routing its calls. The zero value is the default.
type routing struct {
	Fallbacks []fallback `json:"fallbacks,omitzero"`
	// Aliases are names that clients may use instead of models' own.
	Aliases map[string]aliasModels `json:"aliases,omitzero"`
	// VerifiedStreams buffers every stream until it is complete.
	VerifiedStreams bool `json:"verified_streams,omitzero"`
	// ShowUpstream names the upstream in a header of each answer.
	ShowUpstream bool `json:"show_upstream,omitzero"`
	// Affinity says whether the calls of a session go to one upstream: affinityBySession, also meant by "", or
	// affinityOff.
	Affinity string `json:"affinity,omitzero"`
}

// A fallback names the model that replaces the models of a pattern.
type fallback struct {
	Model string `json:"model"`
	To    string `json:"to"`
}

// aliasModels are the models that an alias stands for, the preferred one first. In JSON, one model is a string.
type aliasModels []string

func (m aliasModels) MarshalJSON() ([]byte, error) {
	if len(m) == 1 {
		return json.Marshal(m[0])
	}
	return json.Marshal([]string(m))
}

// parseRouting reads a project's routing from JSON, strictly.
func parseRouting(raw []byte) (r routing, err error) {
	var fallbacks optional[[]json.RawMessage]
	var aliases optional[json.RawMessage]
	var verified, show optional[bool]
	var affinity optional[string]
	fields := map[string]any{"fallbacks": &fallbacks, "aliases": &aliases, "verified_streams": &verified,
		"show_upstream": &show, "affinity": &affinity}
	if err := decodeObject(raw, fields); err != nil {
		return routing{}, qualifyFieldError("routing", err)
	}
	r.VerifiedStreams, r.ShowUpstream, r.Affinity = verified.value, show.value, affinity.value
	if affinity.set && r.Affinity != affinityBySession && r.Affinity != affinityOff {
		return routing{}, &fieldError{"routing.affinity", "must be session or none"}
	}
	if aliases.set {
		if r.Aliases, err = parseAliases(aliases.value); err != nil {
			return routing{}, err
		}
	}
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

const (
	maxAliases     = 100
	maxAliasModels = 8
)

// parseAliases reads a project's aliases: an object whose values are models or lists of models.
func parseAliases(raw []byte) (map[string]aliasModels, error) {
	const param = "routing.aliases"
	wrong := &fieldError{param, `must be an object of models or lists of models, as in {"fast":"gpt-5-mini"}`}
	dec := json.NewDecoder(bytes.NewReader(raw))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, wrong
	}
	var out map[string]aliasModels // nil for an empty object: it is then left out
	for dec.More() {
		t, _ := dec.Token()
		name, ok := t.(string)
		var value json.RawMessage
		if !ok || dec.Decode(&value) != nil {
			return nil, wrong
		}
		if err := checkModelName(param, name); err != nil {
			return nil, err
		}
		models, err := parseAliasModels(param+"["+clip(name, 64)+"]", value)
		if err != nil {
			return nil, err
		}
		if out[name] != nil {
			return nil, &fieldError{param, "names " + clip(name, 64) + " twice"}
		}
		if out == nil {
			out = map[string]aliasModels{}
		}
		if out[name] = models; len(out) > maxAliases {
			return nil, &fieldError{param, "must have " + strconv.Itoa(maxAliases) + " aliases or fewer"}
		}
	}
	return out, nil
}

func parseAliasModels(param string, raw []byte) (aliasModels, error) {
	var models []string
	if json.Unmarshal(raw, &models) != nil || models == nil {
		models = []string{""}
		if json.Unmarshal(raw, &models[0]) != nil {
			return nil, &fieldError{param, "must be a model or a list of models"}
		}
	}
	if len(models) == 0 || len(models) > maxAliasModels {
		return nil, &fieldError{param, "must have 1 to " + strconv.Itoa(maxAliasModels) + " models"}
	}
	for i, model := range models {
		if err := checkModelName(param, model); err != nil {
			return nil, err
		}
		if slices.Contains(models[:i], model) {
			return nil, &fieldError{param, "names " + clip(model, 64) + " twice"}
		}
	}
	return models, nil
}

// resolveAlias returns the models that a call with the criteria's model as an alias asks for, in this order; nil if
// the project has no such alias. Models come first that an upstream serves and is ready for. Those that allowed
// refuses, or that no upstream serves, are left out, unless all are: then the first remains, so that the call fails
// for the right reason.
func (p *projectState) resolveAlias(c criteria, allowed func(model string) bool) []string {
	var ready, others, unserved, refused []string
	for _, model := range p.routing.Aliases[c.model] {
		c.model = model
		switch {
		case !allowed(model):
			refused = append(refused, model)
		case !p.hasCandidate(&c, nil):
			unserved = append(unserved, model)
		case p.hasAlternative(&c):
			ready = append(ready, model)
		default:
			others = append(others, model)
		}
	}
	if models := append(ready, others...); models != nil {
		return models
	}
	models := append(unserved, refused...)
	return models[:min(1, len(models))]
}

// listAliases returns the project's aliases as entries of a list of models, in the order of their names. An alias
// has the entry of the first of its models that is in the list, as listed returns it (nil: it is not). An alias of
// models that no list has, but that the criteria's upstreams serve, has a short entry of its own.
func (p *projectState) listAliases(
	c criteria, listed func(model string) json.RawMessage, mayUse func(model string) bool,
) (names []string, entries []json.RawMessage) {
	for _, name := range slices.Sorted(maps.Keys(p.routing.Aliases)) {
		var entry json.RawMessage
		served := false
		for _, model := range p.routing.Aliases[name] {
			c.model = model
			if !mayUse(model) || !p.hasCandidate(&c, nil) {
				continue
			}
			if served = true; entry == nil {
				entry = listed(model)
			}
		}
		switch {
		case !served:
			continue
		case entry == nil && c.api == apiAnthropic:
			entry = json.RawMessage(`{"type":"model","display_name":"","created_at":"1970-01-01T00:00:00Z"}`)
		case entry == nil && c.api == apiGemini:
			entry = json.RawMessage(`{"displayName":""}`)
		case entry == nil:
			entry = json.RawMessage(`{"object":"model","created":0,"owned_by":"llm-proxy"}`)
		}
		names, entries = append(names, name), append(entries, entry)
	}
	return names, entries
}

// qualifyFieldError adds the object that a wrong field is in to its name. Of several mistakes it returns the first.
func qualifyFieldError(object string, err error) error {
	if e, ok := errors.AsType[*fieldError](err); ok && e.param != "" {
		return &fieldError{object + "." + e.param, e.msg}
	} else if ok { // JSON, but not an object
		return &fieldError{object, "must be an object"}
	}
	return err
}

func checkModelName(param, name string) error {
	if name == "" || len(name) > maxModelLen ||
		strings.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c == 0x7f || c == '*' }) {
		return &fieldError{param, "must be a model name: 1 to 256 bytes, without spaces and *"}
	}
	return nil
}

func (r routing) String() string { return string(mustMarshal(r)) }

// fallbackFor returns the model to fall back to from a model, "" if there is none.
func (r *routing) fallbackFor(model string) string {
	for _, f := range r.Fallbacks {
		if matchesPattern(f.Model, model) && f.To != model {
			return f.To
		}
	}
	return ""
}

// parseRewrite reads an upstream's model name mapping: from the clients' names to those that are sent.
func parseRewrite(raw []byte) (map[string]string, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	wrong := &fieldError{"rewrite", `must be an object of strings, as in {"gpt-4o":"my-deployment"}`}
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, wrong
	}
	nextString := func() (s string, ok bool) {
		t, _ := dec.Token() // nil after an error
		s, ok = t.(string)
		return s, ok
	}
	out := map[string]string{}
	for dec.More() {
		from, ok := nextString()
		if !ok {
			return nil, wrong
		}
		to, ok := nextString()
		if !ok {
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

// upstreamSettings are an upstream's own limits and timeouts. 0 means no limit, or the timeout that is set for
// the whole program.
type upstreamSettings struct {
	ConnectMS         int64  `json:"connect_ms,omitzero"`
	AnswerMS          int64  `json:"answer_ms,omitzero"`
	FirstEventMS      int64  `json:"first_event_ms,omitzero"`
	IdleMS            int64  `json:"idle_ms,omitzero"`
	RequestsPerMinute int64  `json:"requests_per_minute,omitzero"`
	TokensPerMinute   int64  `json:"tokens_per_minute,omitzero"`
	CostMultiplier    int64  `json:"cost_multiplier,omitzero"` // in ten-thousandths; 0: 1
	Note              string `json:"note,omitzero"`
}

func (u *upstreamSettings) String() string { return string(mustMarshal(u)) }
