// This room says what a project or a token may do: which endpoints, which
// models, from where and how much. A call must pass both policies, so a token
// can only narrow what its project allows. Plain code: no HTTP, no store.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// A policy is what may be called. A nil list allows everything; a list that is
// there allows what it names and nothing else, so an empty one allows nothing.
type policy struct {
	Endpoints []string `json:"endpoints,omitzero"` // "POST /v1/audio/speech", "/v1/chat/completions" or "/v1/audio/*"
	Models    []string `json:"models,omitzero"`    // "gpt-4o" or "gpt-4o*"
	// Addresses are the clients' own, behind trusted proxies too.
	Addresses []netip.Prefix `json:"addresses,omitzero"`
	Limits    []limit        `json:"limits,omitzero"`
	// Stateful turns on the endpoints that read or change objects kept at the
	// provider. Every project that shares the provider's key shares those.
	Stateful bool `json:"stateful,omitzero"`
	// KeepContentDays is how long what calls say and are answered is kept; 0: it
	// is not kept at all.
	KeepContentDays int64 `json:"keep_content_days,omitzero"`
}

// parsePolicy reads a policy from JSON, strictly. Only a project's policy may
// turn stateful endpoints on.
func parsePolicy(raw []byte, ofProject bool) (policy, error) {
	var endpoints, models, addresses optional[[]string]
	var limits optional[[]json.RawMessage]
	var stateful optional[bool]
	var keepDays optional[int64]
	fields := map[string]any{"endpoints": &endpoints, "models": &models, "addresses": &addresses, "limits": &limits}
	if ofProject {
		fields["stateful"], fields["keep_content_days"] = &stateful, &keepDays
	}
	if err := decodeObject(raw, fields); err != nil {
		if fe, ok := err.(*fieldError); ok && fe.param != "" {
			fe.param = "policy." + fe.param
		} else if ok { // it is JSON, as part of a body that was read
			fe.param, fe.msg = "policy", "must be an object"
		}
		return policy{}, err
	}
	p := policy{Stateful: stateful.value, KeepContentDays: keepDays.value}
	if p.KeepContentDays < 0 || p.KeepContentDays > 365 {
		return policy{}, &fieldError{"policy.keep_content_days", "must be from 0, which keeps nothing, to 365"}
	}
	for _, l := range []struct {
		name string
		in   optional[[]string]
		out  *[]string
	}{{"policy.endpoints", endpoints, &p.Endpoints}, {"policy.models", models, &p.Models}} {
		if !l.in.hasValue() {
			continue
		}
		if err := checkPatterns(l.name, l.in.value); err != nil {
			return policy{}, err
		}
		*l.out = l.in.value
		if *l.out == nil {
			*l.out = []string{}
		}
	}
	var err error
	if addresses.hasValue() {
		if p.Addresses, err = parseAddresses(addresses.value); err != nil {
			return policy{}, err
		}
	}
	if limits.hasValue() {
		if p.Limits, err = parseLimits(limits.value); err != nil {
			return policy{}, err
		}
	}
	return p, nil
}

// parseAddresses reads networks, and single addresses as networks of one.
func parseAddresses(list []string) ([]netip.Prefix, error) {
	if len(list) > 500 {
		return nil, &fieldError{"policy.addresses", "must have 500 entries or fewer"}
	}
	out := make([]netip.Prefix, 0, len(list))
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if addr, e := netip.ParseAddr(s); e == nil && addr.Zone() == "" {
			p, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err == nil && p.Addr().Is4In6() && p.Bits() >= 96 { // the same network, as clients of it are seen
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		if err != nil || p != p.Masked() {
			return nil, &fieldError{"policy.addresses", "must have networks such as 10.0.0.0/8 or 2001:db8::/32, or single addresses; " + clip(s, 64) + " is none"}
		}
		out = append(out, p)
	}
	return out, nil
}

// checkPatterns refuses patterns that could not mean what their author thinks.
func checkPatterns(param string, list []string) error {
	if len(list) > 500 {
		return &fieldError{param, "must have 500 entries or fewer"}
	}
	for _, s := range list {
		if s == "" || len(s) > 256 {
			return &fieldError{param, "must have 1 to 256 bytes in an entry"}
		}
		if i := strings.IndexByte(s, '*'); i >= 0 && i != len(s)-1 {
			return &fieldError{param, "may have * only at the end of an entry"}
		}
		if (param == "policy.endpoints" || param == "endpoint") && !strings.Contains(s, "/v1/") && s != "*" {
			return &fieldError{param, "must name endpoints such as /v1/chat/completions, POST /v1/responses or /v1/audio/*"}
		}
	}
	return nil
}

func (p policy) String() string {
	b, err := json.Marshal(p)
	if err != nil { // cannot be: strings, numbers and a bool
		return "{}"
	}
	return string(b)
}

func (p policy) allowsModel(model string) bool {
	return p.Models == nil || matchesAnyPattern(p.Models, model)
}

// allowsEndpoint takes an endpoint's name, METHOD and pattern, and its pattern.
func (p policy) allowsEndpoint(name, pattern string) bool {
	return p.Endpoints == nil || matchesAnyPattern(p.Endpoints, name) || matchesAnyPattern(p.Endpoints, pattern)
}

// allowsAddress takes a client's address as text; what is none is not allowed
// where addresses are listed.
func (p policy) allowsAddress(address string) bool {
	if p.Addresses == nil {
		return true
	}
	addr, err := netip.ParseAddr(address)
	if err != nil {
		return false
	}
	addr = addr.Unmap().WithZone("")
	for _, network := range p.Addresses {
		if network.Contains(addr) {
			return true
		}
	}
	return false
}

// matchesAnyPattern reports whether s is in list, whose entries may end in *.
func matchesAnyPattern(list []string, s string) bool {
	for _, p := range list {
		if matchesPattern(p, s) {
			return true
		}
	}
	return false
}

// matchesPattern reports whether s is what pattern says, which may end in *.
func matchesPattern(pattern, s string) bool {
	prefix, ok := strings.CutSuffix(pattern, "*")
	return pattern == s || ok && strings.HasPrefix(s, prefix)
}

// A limit is one rule of a policy. A call counts in it if both patterns match.
// It is immutable.
type limit struct {
	metric      limitMetric
	period      limitPeriod // 0 for metricConcurrent
	monitorOnly bool        // refuses nothing, and counts what it would have refused
	max         int64       // requests, tokens, calls; for dollars nano-dollars
	endpoint    string      // "" for every endpoint
	model       string      // a pattern for the model asked for, "" for every model
}

// A limitKey says which limits count the same: a change of max alone keeps the
// count.
type limitKey struct {
	metric          limitMetric
	period          limitPeriod
	monitorOnly     bool
	endpoint, model string
}

func (l *limit) key() limitKey {
	return limitKey{l.metric, l.period, l.monitorOnly, l.endpoint, l.model}
}

// applies reports whether a call of an endpoint (its name, METHOD and pattern,
// and its pattern) and a model counts in l.
func (l *limit) applies(name, pattern, model string) bool {
	return (l.endpoint == "" || matchesPattern(l.endpoint, name) || matchesPattern(l.endpoint, pattern)) &&
		(l.model == "" || matchesPattern(l.model, model))
}

// isQuota reports whether l, once spent, is spent for so long that a client
// should not try again by itself.
func (l *limit) isQuota() bool { return l.period >= perDay }

// String is the limit in words: "60 requests per minute for models gpt-4o*".
func (l *limit) String() string {
	var b strings.Builder
	switch l.metric {
	case metricConcurrent:
		b.WriteString(strconv.FormatInt(l.max, 10) + " calls at one time")
	case metricDollars:
		b.WriteString("$" + formatNanos(l.max))
	default:
		b.WriteString(strconv.FormatInt(l.max, 10) + " " + l.metric.String())
	}
	switch l.period {
	case 0:
	case perLifetime:
		b.WriteString(" in all")
	default:
		b.WriteString(" per " + l.period.String())
	}
	if l.endpoint != "" {
		b.WriteString(" on " + l.endpoint)
	}
	if l.model != "" {
		b.WriteString(" for models " + l.model)
	}
	return b.String()
}

// valueJSON writes a count of l's kind as JSON has it.
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
}

func (l limit) MarshalJSON() ([]byte, error) {
	return json.Marshal(limitJSON{l.metric.String(), l.valueJSON(l.max), l.period.String(), l.endpoint, l.model, l.monitorOnly})
}

const (
	maxLimits          = 20 // of one policy: each call looks at all of them
	maxLimitCount      = 1_000_000_000_000
	maxLimitDollars    = 100_000_000
	maxLimitConcurrent = 1_000_000
)

// parseLimits reads a policy's list of limits. Errors name the entry and the
// field.
func parseLimits(raw []json.RawMessage) ([]limit, error) {
	if len(raw) > maxLimits {
		return nil, &fieldError{"policy.limits", fmt.Sprintf("must have %d entries or fewer", maxLimits)}
	}
	out := make([]limit, 0, len(raw))
	seen := map[limitKey]int{}
	for i, r := range raw {
		l, err := parseLimit(r)
		if err != nil {
			fe, ok := errors.AsType[*fieldError](err)
			if !ok {
				return nil, err
			}
			at := fmt.Sprintf("policy.limits[%d]", i)
			if fe.param == "" {
				return nil, &fieldError{at, "must be an object such as {\"count\":\"requests\",\"max\":60,\"per\":\"minute\"}"}
			}
			return nil, &fieldError{at + "." + fe.param, fe.msg}
		}
		if first, twice := seen[l.key()]; twice {
			return nil, &fieldError{fmt.Sprintf("policy.limits[%d]", i), fmt.Sprintf("counts the same as policy.limits[%d]; keep one of them", first)}
		}
		seen[l.key()] = i
		out = append(out, l)
	}
	return out, nil
}

func parseLimit(raw []byte) (limit, error) {
	var count, per, endpoint, model optional[string]
	var most optional[json.RawMessage]
	var shadow optional[bool]
	if err := decodeObject(raw, map[string]any{"count": &count, "max": &most, "per": &per,
		"endpoint": &endpoint, "model": &model, "shadow": &shadow}); err != nil {
		return limit{}, err
	}
	l := limit{monitorOnly: shadow.value, endpoint: endpoint.value, model: model.value}
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
		return l, &fieldError{"per", "is not for concurrent, which counts calls that run at one time"}
	case l.metric == metricDollars && l.period < perHour:
		return l, &fieldError{"per", "must be hour, day, week, month or lifetime"}
	case l.metric != metricConcurrent && l.period == 0:
		return l, &fieldError{"per", "must be second, minute, hour, day, week, month or lifetime"}
	}
	for name, v := range map[string]optional[string]{"endpoint": endpoint, "model": model} {
		if v.set {
			if err := checkPatterns(name, []string{v.value}); err != nil {
				return l, err
			}
		}
	}
	var err error
	l.max, err = parseMax(l.metric, string(most.value))
	return l, err
}

// parseMax reads max as JSON has it: a whole number, for dollars a decimal one.
func parseMax(m limitMetric, text string) (int64, error) {
	most := int64(maxLimitCount)
	switch m {
	case metricConcurrent:
		most = maxLimitConcurrent
	case metricDollars:
		whole, decimals, point := strings.Cut(text, ".")
		if n, err := strconv.ParseInt(whole+(decimals + "000000000")[:9], 10, 64); err == nil && allDigits(whole) &&
			(!point || allDigits(decimals) && len(decimals) <= 9) && n <= maxLimitDollars*1_000_000_000 {
			return n, nil
		}
		return 0, &fieldError{"max", "must be dollars from 0 to 100000000, as in 12.50"}
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || n > most {
		return 0, &fieldError{"max", fmt.Sprintf("must be a whole number from 0 (none) to %d; for no limit leave the entry out", most)}
	}
	return n, nil
}
