// This room says what a project or a token may do: which endpoints, which
// models. A call must pass both policies, so a token can only narrow what its
// project allows. Plain code: no HTTP, no store.
package main

import (
	"encoding/json"
	"strings"
)

// A policy is what may be called. A nil list allows everything; a list that is
// there allows what it names and nothing else, so an empty one allows nothing.
type policy struct {
	Endpoints []string `json:"endpoints,omitzero"` // "POST /v1/audio/speech", "/v1/chat/completions" or "/v1/audio/*"
	Models    []string `json:"models,omitzero"`    // "gpt-4o" or "gpt-4o*"
	// Stateful turns on the endpoints that read or change objects kept at the
	// provider. Every project that shares the provider's key shares those.
	Stateful bool `json:"stateful,omitzero"`
}

// parsePolicy reads a policy from JSON, strictly. Only a project's policy may
// turn stateful endpoints on.
func parsePolicy(raw []byte, ofProject bool) (policy, error) {
	var endpoints, models opt[[]string]
	var stateful opt[bool]
	fields := map[string]any{"endpoints": &endpoints, "models": &models}
	if ofProject {
		fields["stateful"] = &stateful
	}
	if err := decodeObject(raw, fields); err != nil {
		if fe, ok := err.(*fieldError); ok && fe.param != "" {
			fe.param = "policy." + fe.param
		} else if ok { // it is JSON, as part of a body that was read
			fe.param, fe.msg = "policy", "must be an object"
		}
		return policy{}, err
	}
	p := policy{Stateful: stateful.v}
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
	return p, nil
}

// checkPatterns refuses patterns that could not mean what their author thinks.
func checkPatterns(param string, list []string) error {
	if len(list) > 500 {
		return &fieldError{param, "must have 500 entries or fewer"}
	}
	for _, s := range list {
		if s == "" || len(s) > 256 {
			return &fieldError{param, "must have entries of 1 to 256 bytes"}
		}
		if i := strings.IndexByte(s, '*'); i >= 0 && i != len(s)-1 {
			return &fieldError{param, "may have * only at the end of an entry"}
		}
		if param == "policy.endpoints" && !strings.Contains(s, "/v1/") && s != "*" {
			return &fieldError{param, "must have entries such as /v1/chat/completions, POST /v1/responses or /v1/audio/*"}
		}
	}
	return nil
}

func (p policy) String() string {
	b, err := json.Marshal(p)
	if err != nil { // cannot be: strings and a bool
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

// matchesAny reports whether s is in list, whose entries may end in *.
func matchesAny(list []string, s string) bool {
	for _, p := range list {
		if prefix, ok := strings.CutSuffix(p, "*"); p == s || ok && strings.HasPrefix(s, prefix) {
			return true
		}
	}
	return false
}
