// This file has the policy of a project or a token: the endpoints, models and client addresses that it allows,
// and its limits. A call must pass both policies, so a token can only narrow what its project allows. Plain
// code: no HTTP, no store.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
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
}

// maxPolicyEntries bounds each list of a policy, because a call is compared with every entry.
const maxPolicyEntries = 500

// parsePolicy reads a policy from JSON, strictly. Only a project's policy may have the fields stateful and
// keep_content_days.
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
		} else if ok { // raw is part of a body that is valid JSON, so this is its only possible mistake
			fe.param, fe.msg = "policy", "must be an object"
		}
		return policy{}, err
	}
	p := policy{Endpoints: endpoints.value, Models: models.value, Stateful: stateful.value,
		KeepContentDays: keepDays.value}
	if p.KeepContentDays < 0 || p.KeepContentDays > 365 {
		return policy{}, &fieldError{"policy.keep_content_days", "must be from 0 (nothing is stored) to 365"}
	}
	err := cmp.Or(checkPatterns("policy.endpoints", p.Endpoints), checkPatterns("policy.models", p.Models))
	if err != nil {
		return policy{}, err
	}
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
		if (param == "policy.endpoints" || param == "endpoint") && !strings.Contains(s, "/v1/") && s != "*" {
			return &fieldError{param,
				"must name endpoints such as /v1/chat/completions, POST /v1/responses or /v1/audio/*"}
		}
	}
	return nil
}

func (p policy) String() string {
	b, err := json.Marshal(p)
	if err != nil { // cannot happen: strings, numbers and a bool
		return "{}"
	}
	return string(b)
}

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

func matchesAnyPattern(patterns []string, s string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matchesPattern(p, s) })
}

// matchesPattern reports whether s equals the pattern, or starts with it if the pattern ends in *.
func matchesPattern(pattern, s string) bool {
	prefix, ok := strings.CutSuffix(pattern, "*")
	return pattern == s || ok && strings.HasPrefix(s, prefix)
}

// A limit is one limit of a policy, and immutable. A call counts in it if both patterns match.
type limit struct {
	metric      limitMetric
	period      limitPeriod // 0 for metricConcurrent
	monitorOnly bool        // refuses nothing, but counts what it would have refused
	max         int64       // requests, tokens, running calls or nano-dollars
	endpoint    string      // a pattern; "" for every endpoint
	model       string      // a pattern for the requested model; "" for every model
}

// A limitKey is what a limit counts. Limits with equal keys count the same calls: if only max changes, the
// count is kept.
type limitKey struct {
	metric          limitMetric
	period          limitPeriod
	monitorOnly     bool
	endpoint, model string
}

func (l *limit) key() limitKey {
	return limitKey{l.metric, l.period, l.monitorOnly, l.endpoint, l.model}
}

// applies reports whether a call counts in l, by the endpoint's name ("METHOD pattern") and pattern and the
// requested model.
func (l *limit) applies(name, pattern, model string) bool {
	return (l.endpoint == "" || matchesPattern(l.endpoint, name) || matchesPattern(l.endpoint, pattern)) &&
		(l.model == "" || matchesPattern(l.model, model))
}

// isQuota reports whether l, once it is used up, stays used up for too long to retry automatically.
func (l *limit) isQuota() bool { return l.period >= perDay }

// String describes the limit: "60 requests per minute for models gpt-4o*".
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
	return b.String()
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
}

func (l limit) MarshalJSON() ([]byte, error) {
	return json.Marshal(limitJSON{Count: l.metric.String(), Max: l.valueJSON(l.max), Per: l.period.String(),
		Endpoint: l.endpoint, Model: l.model, Shadow: l.monitorOnly})
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
	seen := map[limitKey]int{}
	for i, r := range raw {
		l, err := parseLimit(r)
		if err != nil {
			fe, ok := errors.AsType[*fieldError](err)
			if !ok {
				return nil, err
			}
			entry := fmt.Sprintf("policy.limits[%d]", i)
			if fe.param == "" {
				return nil, &fieldError{entry, `must be an object such as {"count":"requests","max":60,"per":"minute"}`}
			}
			return nil, &fieldError{entry + "." + fe.param, fe.msg}
		}
		if first, exists := seen[l.key()]; exists {
			return nil, &fieldError{fmt.Sprintf("policy.limits[%d]", i),
				fmt.Sprintf("counts the same as policy.limits[%d]; keep one of them", first)}
		}
		seen[l.key()] = i
		out = append(out, l)
	}
	return out, nil
}

func parseLimit(raw []byte) (limit, error) {
	var count, per, endpoint, model optional[string]
	var maximum optional[json.RawMessage]
	var shadow optional[bool]
	if err := decodeObject(raw, map[string]any{"count": &count, "max": &maximum, "per": &per,
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
