// This room says what a project or a token may do: which endpoints, which
// models, from where and how much. A call must pass both policies, so a token
// can only narrow what its project allows. Plain code: no HTTP, no store.
package main

import (
	"encoding/json"
	"net/netip"
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
	var endpoints, models, addresses opt[[]string]
	var limits opt[[]json.RawMessage]
	var stateful opt[bool]
	var keepDays opt[int64]
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
	p := policy{Stateful: stateful.v, KeepContentDays: keepDays.v}
	if p.KeepContentDays < 0 || p.KeepContentDays > 365 {
		return policy{}, &fieldError{"policy.keep_content_days", "must be from 0, which keeps nothing, to 365"}
	}
	for _, l := range []struct {
		name string
		in   opt[[]string]
		out  *[]string
	}{{"policy.endpoints", endpoints, &p.Endpoints}, {"policy.models", models, &p.Models}} {
		if !l.in.given() {
			continue
		}
		if err := checkPatterns(l.name, l.in.v); err != nil {
			return policy{}, err
		}
		*l.out = l.in.v
		if *l.out == nil {
			*l.out = []string{}
		}
	}
	var err error
	if addresses.given() {
		if p.Addresses, err = parseAddresses(addresses.v); err != nil {
			return policy{}, err
		}
	}
	if limits.given() {
		if p.Limits, err = parseLimits(limits.v); err != nil {
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
	return p.Models == nil || matchesAny(p.Models, model)
}

// allowsEndpoint takes an endpoint's name, METHOD and pattern, and its pattern.
func (p policy) allowsEndpoint(name, pattern string) bool {
	return p.Endpoints == nil || matchesAny(p.Endpoints, name) || matchesAny(p.Endpoints, pattern)
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

// matchesAny reports whether s is in list, whose entries may end in *.
func matchesAny(list []string, s string) bool {
	for _, p := range list {
		if matches(p, s) {
			return true
		}
	}
	return false
}

// matches reports whether s is what pattern says, which may end in *.
func matches(pattern, s string) bool {
	prefix, ok := strings.CutSuffix(pattern, "*")
	return pattern == s || ok && strings.HasPrefix(s, prefix)
}
