// This file has the policy of a project or a token: the endpoints, models and client addresses that it allows,
// and its limits. A call must pass both policies, so a token can only narrow what its project allows. Plain
// code: no HTTP, no store.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// A policy is what a project or token allows. A nil list allows everything; an empty list allows nothing.
type policy struct {
	Endpoints []string `json:"endpoints,omitzero"` // "POST /v1/audio/speech", "/v1/chat/completions" or "/v1/audio/*"
	Models    []string `json:"models,omitzero"`    // "gpt-4o" or "gpt-4o*"
	// Addresses are networks of clients. Behind trusted proxies, the address that these report counts.
	Addresses []netip.Prefix `json:"addresses,omitzero"`
	Limits    []limit        `json:"limits,omitzero"`
	// Stateful turns on the endpoints that read or change objects kept at the provider. All projects that
	// share a provider key share these objects.
	Stateful bool `json:"stateful,omitzero"`
	// KeepContentDays is how long requests and responses are stored. 0: they are not stored.
	KeepContentDays int64 `json:"keep_content_days,omitzero"`
	// Cache turns on the response cache. nil: the project has none.
	Cache *cachePolicy `json:"cache,omitzero"`
	// Attribution says what clients may and must say of their calls. nil: nothing.
	Attribution *attributionPolicy `json:"attribution,omitzero"`
}

// maxPolicyEntries bounds each list of a policy, because a call is compared with every entry.
const maxPolicyEntries = 500

// parsePolicy reads a policy from JSON, strictly. Only a project's policy may have the fields stateful,
// keep_content_days and cache.
func parsePolicy(raw []byte, ofProject bool) (policy, error) {
	var endpoints, models, addresses optional[[]string]
	var limits optional[[]json.RawMessage]
	var stateful optional[bool]
	var keepDays optional[int64]
	var cache, attribution optional[json.RawMessage]
	fields := map[string]any{"endpoints": &endpoints, "models": &models, "addresses": &addresses, "limits": &limits,
		"attribution": &attribution}
	if ofProject {
		fields["stateful"], fields["keep_content_days"], fields["cache"] = &stateful, &keepDays, &cache
	}
	if err := decodeObject(raw, fields); err != nil {
		if fe, ok := err.(*fieldError); ok && fe.param != "" {
			fe.param = "policy." + fe.param
		} else if ok { // raw is part of a body that is valid JSON, so this is its only possible mistake
			fe.param, fe.msg = "policy", "must be an object"
		}
		return policy{}, err
	}
	p := policy{Endpoints: endpoints.value, Models: models.value, Stateful: stateful.value,
		KeepContentDays: keepDays.value}
	var daysErr, addressesErr, limitsErr, cacheErr, attributionErr error
	if p.KeepContentDays < 0 || p.KeepContentDays > 365 {
		daysErr = &fieldError{"policy.keep_content_days", "must be from 0 (nothing is stored) to 365"}
	}
	if addresses.hasValue() {
		p.Addresses, addressesErr = parseAddresses(addresses.value)
	}
	if limits.hasValue() {
		p.Limits, limitsErr = parseLimits(limits.value)
	}
	if cache.hasValue() {
		p.Cache, cacheErr = parseCachePolicy(cache.value)
	}
	if attribution.hasValue() {
		p.Attribution, attributionErr = parseAttributionPolicy(attribution.value, ofProject)
	}
	if err := errors.Join(daysErr, checkPatterns("policy.endpoints", p.Endpoints),
		checkPatterns("policy.models", p.Models), addressesErr, limitsErr, cacheErr, attributionErr); err != nil {
		return policy{}, err
	}
	return p, nil
}

// parseAddresses reads networks and single addresses.
func parseAddresses(list []string) ([]netip.Prefix, error) {
	if len(list) > maxPolicyEntries {
		return nil, &fieldError{"policy.addresses", fmt.Sprintf("must have %d entries or fewer", maxPolicyEntries)}
	}
	out := make([]netip.Prefix, 0, len(list))
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if addr, e := netip.ParseAddr(s); e == nil && addr.Zone() == "" {
			p, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err == nil && p.Addr().Is4In6() && p.Bits() >= 96 { // allowsAddress unmaps the client's, too
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		if err != nil || p != p.Masked() {
			return nil, &fieldError{"policy.addresses", "must have networks such as 10.0.0.0/8 or 2001:db8::/32, " +
				"or single addresses; " + clip(s, 64) + " is neither"}
		}
		out = append(out, p)
	}
	return out, nil
}

// checkPatterns refuses patterns that cannot match, or match something else than their author expects.
func checkPatterns(param string, list []string) error {
	if len(list) > maxPolicyEntries {
		return &fieldError{param, fmt.Sprintf("must have %d entries or fewer", maxPolicyEntries)}
	}
	for _, s := range list {
		if s == "" || len(s) > 256 {
			return &fieldError{param, "must have 1 to 256 bytes in an entry"}
		}
		if i := strings.IndexByte(s, '*'); i >= 0 && i != len(s)-1 {
			return &fieldError{param, "may have * only at the end of an entry"}
		}
		if (param == "policy.endpoints" || param == "endpoint") && !namesAPI(s) && s != "*" {
			return &fieldError{param,
				"must name endpoints such as /v1/chat/completions, POST /v1/responses or /v1/audio/*"}
		}
	}
	return nil
}

// namesAPI reports whether a pattern of endpoints names one of the APIs.
func namesAPI(s string) bool { return strings.Contains(s, "/v1/") || strings.Contains(s, geminiPrefix) }

func (p policy) String() string { return string(mustMarshal(p)) }

func (p policy) allowsModel(model string) bool {
	return p.Models == nil || matchesAnyPattern(p.Models, model)
}

// allowsEndpoint reports whether the policy lists an endpoint's name ("METHOD pattern") or its pattern.
func (p policy) allowsEndpoint(name, pattern string) bool {
	return p.Endpoints == nil || matchesAnyPattern(p.Endpoints, name) || matchesAnyPattern(p.Endpoints, pattern)
}

// allowsAddress reports whether a client's address is in a listed network. If networks are listed, text that
// is not an address is not allowed.
func (p policy) allowsAddress(address string) bool {
	if p.Addresses == nil {
		return true
	}
	addr, err := netip.ParseAddr(address)
	if err != nil {
		return false
	}
	addr = addr.Unmap().WithZone("")
	return slices.ContainsFunc(p.Addresses, func(network netip.Prefix) bool { return network.Contains(addr) })
}

// A limit is one limit of a policy, and immutable. A call counts in it if both patterns match.
type limit struct {
	metric      limitMetric
	period      limitPeriod // 0 for metricConcurrent
	monitorOnly bool        // refuses nothing, but counts what it would have refused
	max         int64       // requests, tokens, running calls or nano-dollars
	endpoint    string      // a pattern; "" for every endpoint
	model       string      // a pattern for the requested model; "" for every model
	forEach     string      // an attribute, each value of which is counted by itself; "" for all calls together
	maxValues   int64       // how many values may count at one time
	rule        string      // with forEach: what is counted, as the store names it
}

// A limitKey is what a limit counts. Limits with equal keys count the same calls: if only max changes, the
// count is kept.
type limitKey struct {
	metric          limitMetric
	period          limitPeriod
	monitorOnly     bool
	endpoint, model string
	forEach         string
}

func (l *limit) key() limitKey {
	return limitKey{l.metric, l.period, l.monitorOnly, l.endpoint, l.model, l.forEach}
}

// applies reports whether a call counts in l, by the endpoint's name ("METHOD pattern") and pattern and the
// requested model.
func (l *limit) applies(name, pattern, model string) bool {
	return (l.endpoint == "" || matchesPattern(l.endpoint, name) || matchesPattern(l.endpoint, pattern)) &&
		(l.model == "" || matchesPattern(l.model, model))
}

// isWindow reports whether l counts in a calendar window or for ever, so that its use outlives the process. Buckets and
// concurrent calls begin with nothing.
func (l *limit) isWindow() bool { return l.period >= perHour }

// isQuota reports whether l, once it is used up, stays used up for too long to retry automatically.
func (l *limit) isQuota() bool { return l.period >= perDay }

// String describes the limit: "60 requests per minute for models gpt-4o*".
func (l *limit) String() string {
	var b strings.Builder
	b.WriteString(l.describe(l.max))
	switch l.period {
	case 0:
		b.WriteString(" at one time")
	case perLifetime:
		b.WriteString(" in total")
	default:
		b.WriteString(" per " + l.period.String())
	}
	if l.endpoint != "" {
		b.WriteString(" on " + l.endpoint)
	}
	if l.model != "" {
		b.WriteString(" for models " + l.model)
	}
	if l.forEach != "" {
		b.WriteString(" " + describeForEach(l.forEach))
	}
	return b.String()
}

// describe writes an amount of what l counts, for people: "3,000,000 tokens", "$0.0042".
func (l *limit) describe(n int64) string {
	switch l.metric {
	case metricConcurrent:
		return pluralize(n, "call", "calls")
	case metricDollars:
		return formatMoney(n)
	default:
		return pluralize(n, strings.TrimSuffix(l.metric.String(), "s"), l.metric.String())
	}
}

// valueJSON writes an amount in l's metric as a JSON number.
func (l *limit) valueJSON(n int64) json.RawMessage {
	if l.metric == metricDollars {
		return json.RawMessage(formatNanos(n))
	}
	return json.RawMessage(strconv.FormatInt(n, 10))
}

type limitJSON struct {
	Count    string          `json:"count"`
	Max      json.RawMessage `json:"max"`
	Per      string          `json:"per,omitzero"`
	Endpoint string          `json:"endpoint,omitzero"`
	Model    string          `json:"model,omitzero"`
	Shadow   bool            `json:"shadow,omitzero"`
	ForEach  string          `json:"for_each,omitzero"`
	// MaxValues is written where it is not the default.
	MaxValues json.RawMessage `json:"max_values,omitzero"`
}

func (l limit) MarshalJSON() ([]byte, error) {
	v := limitJSON{Count: l.metric.String(), Max: l.valueJSON(l.max), Per: l.period.String(), Endpoint: l.endpoint,
		Model: l.model, Shadow: l.monitorOnly, ForEach: l.forEach}
	if l.maxValues != 0 && l.maxValues != defaultMaxValues {
		v.MaxValues = strconv.AppendInt(nil, l.maxValues, 10)
	}
	return json.Marshal(v)
}

const (
	maxLimits          = 20 // per policy: each call checks all of them
	maxLimitCount      = 1_000_000_000_000
	maxLimitDollars    = 100_000_000
	maxLimitConcurrent = 1_000_000
)

// parseLimits reads a policy's list of limits. Errors name the entry and the field.
func parseLimits(raw []json.RawMessage) ([]limit, error) {
	if len(raw) > maxLimits {
		return nil, &fieldError{"policy.limits", fmt.Sprintf("must have %d entries or fewer", maxLimits)}
	}
	out := make([]limit, 0, len(raw))
	seen, mistakes := map[limitKey]int{}, []error(nil)
	for i, r := range raw {
		entry := fmt.Sprintf("policy.limits[%d]", i)
		l, err := parseLimit(r)
		first, exists := seen[l.key()]
		fe, ok := errors.AsType[*fieldError](err)
		switch {
		case ok && fe.param == "":
			err = &fieldError{entry, `must be an object such as {"count":"requests","max":60,"per":"minute"}`}
		case ok:
			err = &fieldError{entry + "." + fe.param, fe.msg}
		case err == nil && exists:
			err = &fieldError{entry, fmt.Sprintf("counts the same as policy.limits[%d]; keep one of them", first)}
		case err == nil:
			seen[l.key()] = i
			out = append(out, l)
		}
		mistakes = append(mistakes, err)
	}
	return out, errors.Join(mistakes...)
}

func parseLimit(raw []byte) (limit, error) {
	var count, per, endpoint, model, forEach optional[string]
	var maximum, maxValues optional[json.RawMessage]
	var shadow optional[bool]
	if err := decodeObject(raw, map[string]any{"count": &count, "max": &maximum, "per": &per, "endpoint": &endpoint,
		"model": &model, "shadow": &shadow, "for_each": &forEach, "max_values": &maxValues}); err != nil {
		return limit{}, err
	}
	l := limit{monitorOnly: shadow.value, endpoint: endpoint.value, model: model.value, forEach: forEach.value}
	for m := metricRequests; m <= metricConcurrent; m++ {
		if count.value == m.String() {
			l.metric = m
		}
	}
	if l.metric == 0 {
		return l, &fieldError{"count", "must be requests, tokens, dollars or concurrent"}
	}
	for p := perSecond; p <= perLifetime; p++ {
		if per.value == p.String() {
			l.period = p
		}
	}
	switch {
	case l.metric == metricConcurrent && per.set:
		return l, &fieldError{"per", "is not allowed with concurrent, which counts calls running at one time"}
	case l.metric == metricDollars && l.period < perHour:
		return l, &fieldError{"per", "must be hour, day, week, month or lifetime"}
	case l.metric != metricConcurrent && l.period == 0:
		return l, &fieldError{"per", "must be second, minute, hour, day, week, month or lifetime"}
	}
	var err error
	if endpoint.set {
		err = checkPatterns("endpoint", []string{l.endpoint})
	}
	if err == nil && model.set {
		err = checkPatterns("model", []string{l.model})
	}
	if err == nil {
		l.max, err = parseMax(l.metric, string(maximum.value))
	}
	if err == nil && (forEach.set || maxValues.set) {
		err = l.parseForEach(forEach.set, string(maxValues.value))
	}
	return l, err
}

// parseMax reads the JSON text of max: a whole number, or for dollars a decimal one.
func parseMax(m limitMetric, text string) (int64, error) {
	highest := int64(maxLimitCount)
	switch m {
	case metricConcurrent:
		highest = maxLimitConcurrent
	case metricDollars:
		whole, decimals, point := strings.Cut(text, ".")
		if n, err := strconv.ParseInt(whole+(decimals + "000000000")[:9], 10, 64); err == nil && allDigits(whole) &&
			(!point || allDigits(decimals) && len(decimals) <= 9) && n <= maxLimitDollars*1_000_000_000 {
			return n, nil
		}
		return 0, &fieldError{"max", "must be dollars from 0 to 100000000, such as 12.50"}
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || n > highest {
		return 0, &fieldError{"max", fmt.Sprintf("must be a whole number from 0 (nothing is allowed) to %d; "+
			"for no limit leave the entry out", highest)}
	}
	return n, nil
}

// A cachePolicy is a project's policy for its response cache. It is immutable.
type cachePolicy struct {
	TTLSeconds    int64    `json:"ttl_seconds"`
	Scope         string   `json:"scope,omitzero"`     // who shares answers: "project" (the default) or "token"
	Endpoints     []string `json:"endpoints,omitzero"` // patterns; nil: every one that can be cached, but not Gemini's
	When          string   `json:"when,omitzero"`      // "deterministic" (the default) or "always"
	MaxEntryBytes int64    `json:"max_entry_bytes,omitzero"`
}

const (
	maxCacheTTL          = 30 * 24 * 3600 // seconds
	minEntryBytes        = 1 << 10
	maxEntryBytes        = 16 << 20
	defaultMaxEntryBytes = 1 << 20
)

// cacheableEndpoints are the endpoints whose answers can be cached: the answer depends on the request alone and is
// JSON or a stream of events.
var cacheableEndpoints = [...]string{
	"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/messages/count_tokens",
	"/v1/moderations", "/v1/responses", "/v1/responses/input_tokens",
	"/v1beta/models/{model}:batchEmbedContents", "/v1beta/models/{model}:embedContent",
	"/v1beta/models/{model}:generateContent", "/v1beta/models/{model}:streamGenerateContent",
}

// parseCachePolicy reads a cache policy from JSON, strictly.
func parseCachePolicy(raw []byte) (*cachePolicy, error) {
	var ttl, size optional[int64]
	var scope, when optional[string]
	var endpoints optional[[]string]
	if err := decodeObject(raw, map[string]any{"ttl_seconds": &ttl, "scope": &scope, "endpoints": &endpoints,
		"when": &when, "max_entry_bytes": &size}); err != nil {
		return nil, qualifyFieldError("policy.cache", err)
	}
	p := &cachePolicy{TTLSeconds: ttl.value, Scope: scope.value, Endpoints: endpoints.value, When: when.value,
		MaxEntryBytes: size.value}
	var mistakes []error
	refuse := func(isWrong bool, field, msg string) {
		if isWrong {
			mistakes = append(mistakes, &fieldError{"policy.cache." + field, msg})
		}
	}
	refuse(p.TTLSeconds < 1 || p.TTLSeconds > maxCacheTTL, "ttl_seconds", fmt.Sprintf(
		"is required and must be from 1 to %d (30 days); to turn the cache off, leave cache out", maxCacheTTL))
	refuse(scope.set && p.Scope != "project" && p.Scope != "token", "scope", "must be project or token")
	refuse(when.set && p.When != "deterministic" && p.When != "always", "when", "must be deterministic or always")
	refuse(size.set && (p.MaxEntryBytes < minEntryBytes || p.MaxEntryBytes > maxEntryBytes), "max_entry_bytes",
		fmt.Sprintf("must be from %d to %d", minEntryBytes, maxEntryBytes))
	if len(p.Endpoints) > len(cacheableEndpoints) {
		refuse(true, "endpoints", fmt.Sprintf("must have %d entries or fewer", len(cacheableEndpoints)))
	} else if i := slices.IndexFunc(p.Endpoints, func(s string) bool { return !namesCacheable(s) }); i >= 0 {
		refuse(true, "endpoints", "must name endpoints that can be cached: "+
			strings.Join(cacheableEndpoints[:], ", ")+"; "+clip(p.Endpoints[i], 64)+" matches none of them")
	}
	return p, errors.Join(mistakes...)
}

// namesCacheable reports whether a pattern matches an endpoint whose answers can be cached.
func namesCacheable(pattern string) bool {
	return slices.ContainsFunc(cacheableEndpoints[:], func(e string) bool { return matchesEndpoint(pattern, e) })
}

// covers reports whether the policy lists an endpoint, and its answers can be cached. Those of Gemini's API have to be
// listed.
func (p *cachePolicy) covers(e *endpoint) bool {
	if e.method != "POST" || !slices.Contains(cacheableEndpoints[:], e.pattern) {
		return false
	}
	if p.Endpoints == nil {
		return !strings.HasPrefix(e.pattern, geminiPrefix)
	}
	return slices.ContainsFunc(p.Endpoints, func(s string) bool { return matchesEndpoint(s, e.pattern) })
}

// narrowed returns what both policies allow; nil: nothing.
func (p *cachePolicy) narrowed(o *cachePolicy) *cachePolicy {
	if p == nil || o == nil {
		return nil
	}
	if bytes.Equal(mustMarshal(p), mustMarshal(o)) {
		return p
	}
	n := cachePolicy{TTLSeconds: min(p.TTLSeconds, o.TTLSeconds), MaxEntryBytes: min(p.maxEntry(), o.maxEntry())}
	if p.Scope == "token" || o.Scope == "token" {
		n.Scope = "token"
	}
	if p.When == "always" && o.When == "always" {
		n.When = "always"
	}
	if p.Endpoints != nil || o.Endpoints != nil {
		n.Endpoints = []string{}
		for _, e := range cacheableEndpoints {
			if e := (&endpoint{method: "POST", pattern: e}); p.covers(e) && o.covers(e) {
				n.Endpoints = append(n.Endpoints, e.pattern)
			}
		}
	}
	return &n
}

func (p *cachePolicy) maxEntry() int64 {
	if p.MaxEntryBytes > 0 {
		return p.MaxEntryBytes
	}
	return defaultMaxEntryBytes
}

// bypassReasons are the reasons for which the cache takes no part in a call. Clients and metrics get these names.
var bypassReasons = [...]string{"endpoint", "stateful", "tools", "not-deterministic", "no-store"}

// bypassReason returns why the cache does not take part in a call, "" if it does. f comes from scanJSON of body.
func (p *cachePolicy) bypassReason(e *endpoint, f *callFields, body []byte) string {
	if !p.covers(e) {
		return "endpoint"
	}
	if f.statefulParam != "" {
		return "stateful"
	}
	scan := scanForCache(body, e.api == apiGemini)
	computed := e.meter == meterEmbeddings || e.pattern == "/v1/moderations" // the same answer each time
	searches := strings.Contains(f.model, "-search") || strings.Contains(f.model, ":online")
	switch {
	case scan.stateful || e.pattern == "/v1/responses" && !scan.storeOff: // this endpoint stores unless told not to
		return "stateful"
	case scan.tools || searches && !computed:
		return "tools"
	case p.When != "always" && !computed && (!scan.deterministic || scan.ambiguous):
		return "not-deterministic"
	}
	return ""
}

// A cacheScan is what a body says about whether its answer may be cached.
type cacheScan struct {
	stateful      bool // the provider stores something, or reads what it has stored
	storeOff      bool // store is false
	tools         bool // the provider may search, run code or call other servers: the answer depends on more
	deterministic bool // temperature is 0, or a seed is set
	ambiguous     bool // a field has another spelling, or occurs twice
}

// cacheFields are the top-level fields that scanForCache reads. In another spelling a field that forbids caching
// counts as well, because some providers ignore case.
var cacheFields = [...]string{
	"temperature", "seed", "store", "prompt", "container", "tools", "web_search_options", "search_parameters",
	"mcp_servers", "plugins", "data_sources", "enable_search", "code_interpreter", "generationConfig",
	"generation_config",
}

// cacheFieldIndex returns the index in cacheFields of a name in any spelling, or -1.
func cacheFieldIndex(key []byte) int {
	for i, name := range &cacheFields {
		if len(key) >= len(name) && (key[0]|0x20 == name[0] || key[0] >= utf8.RuneSelf) &&
			strings.EqualFold(string(key), name) {
			return i
		}
	}
	return -1
}

// scanForCache reads a body that scanJSON, or with gemini scanGemini, has accepted.
func scanForCache(body []byte, gemini bool) (scan cacheScan) {
	s := bodyScanner{b: body, accepted: true}
	s.skipSpace()
	seen := [len(cacheFields)]bool{}
	for more := s.enter('}'); more; more = s.next('}') {
		key := s.readDecodedKey()
		i := cacheFieldIndex(key)
		if i < 0 {
			s.skipValue()
			continue
		}
		name := cacheFields[i]
		exact := string(key) == name && !seen[i] // of two, a provider may read either
		seen[i] = true
		switch {
		case name == "tools" && s.startsWith('['):
			scan.tools = s.hasProviderTool(gemini) || scan.tools
		case !strings.HasPrefix(name, "generation"):
			if raw := string(s.readValue()); !gemini || name != "temperature" && name != "seed" {
				scan.setField(name, exact, raw)
			}
		case gemini && s.startsWith('{'):
			s.readCacheConfig(&scan)
		default:
			s.skipValue()
		}
	}
	return scan
}

// readCacheConfig reads the generationConfig of Gemini's API, where temperature and seed are.
func (s *bodyScanner) readCacheConfig(scan *cacheScan) {
	seen := map[string]bool{}
	for more := s.enter('}'); more; more = s.next('}') {
		key := string(s.readDecodedKey())
		name := strings.ToLower(key)
		if name != "temperature" && name != "seed" {
			s.skipValue()
			continue
		}
		scan.setField(name, key == name && !seen[name], string(s.readValue()))
		seen[name] = true
	}
}

// setField reads one of cacheFields. exact means that the name is spelled so, and has not occurred before.
func (scan *cacheScan) setField(name string, exact bool, raw string) {
	scan.ambiguous = scan.ambiguous || !exact
	unset := raw == "null" || raw == "false" || raw == "[]" || raw == ""
	switch name {
	case "temperature", "seed":
		n, err := strconv.ParseFloat(raw, 64)
		isSet := err == nil && (name == "seed" || n == 0)
		scan.deterministic = scan.deterministic || isSet
	case "store":
		scan.storeOff = exact && raw == "false"
		scan.stateful = scan.stateful || !unset
	case "prompt": // as an object, it is a template that the provider has stored
		scan.stateful = scan.stateful || strings.HasPrefix(raw, "{")
	case "container":
		scan.stateful = scan.stateful || !unset
	default:
		scan.tools = scan.tools || !unset
	}
}

// hasProviderTool reads a list of tools and reports whether one of them may act at the provider. Tools of the types
// function and custom, Anthropic's without a type, and Gemini's function declarations are the client's own.
func (s *bodyScanner) hasProviderTool(gemini bool) (found bool) {
	for more := s.enter(']'); more; more = s.next(']') {
		if s.i >= len(s.b) || s.b[s.i] != '{' {
			found = true
			s.skipValue()
			continue
		}
		for member := s.enter('}'); member; member = s.next('}') {
			key := string(s.readDecodedKey())
			raw := string(s.readValue())
			if gemini {
				found = found || key != "functionDeclarations" && key != "function_declarations"
			} else if strings.EqualFold(key, "type") && raw != `"function"` && raw != `"custom"` {
				found = true
			}
		}
	}
	return found
}

// requestsExhausted refuses a call of a token that has made all of its requests.
func requestsExhausted(maxRequests int64) *apiError {
	name := (&limit{metric: metricRequests, period: perLifetime, max: maxRequests}).String()
	return errQuotaSpent(name, "This token's limit of "+name+" is used up.")
}

// describeShortfall says what the call may need, and what is left of the limit.
func (v *limitViolation) describeShortfall() string {
	need, left, verb := v.limit.describe(v.need), v.limit.describe(v.remaining), "are"
	if v.limit.metric == metricDollars || v.remaining == 1 {
		verb = "is"
	}
	if need == left { // the same after rounding
		need, left = "$"+formatNanos(v.need), "$"+formatNanos(v.remaining)
	}
	return "it may need " + need + ", and only " + left + " " + verb + " left."
}

// violationError returns the error that names the limit without room, and when it has room again.
func violationError(v *limitViolation) *apiError {
	name, kind := v.limit.String(), ""
	msg := "This token's limit of " + name
	if v.ofProject {
		msg = "The project's limit of " + name
	}
	if v.limit.metric == metricRequests || v.limit.metric == metricTokens {
		kind = v.limit.metric.String()
	}
	wait := time.Duration(v.wait) * time.Millisecond
	switch {
	case v.noCounter:
		msg += v.describeNoCounter()
	case v.exceedsMax:
		return errNeverFits(name, kind, msg+" never allows as much output as this call asks for. Ask for less.")
	case v.remaining > 0 && v.limit.metric != metricRequests:
		msg += v.forValue() + " has no room for this call: " + v.describeShortfall()
	default:
		msg += " is used up" + v.forValue() + "."
	}
	switch {
	case v.permanent:
		return errQuotaSpent(name, msg)
	case v.limit.isQuota() && !v.memoryFull:
		return errQuotaSpent(name, msg+" It resets in "+describeDuration(wait)+".")
	}
	return errRateLimited(name, kind, msg, wait)
}
