// This room reads what admins say about routing: of a project, which model
// stands in for another and what clients are told; of an upstream, the names it
// knows models by, its own limits and patience. Plain code: no HTTP, no store.
package main

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

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
	var fallbacks opt[[]json.RawMessage]
	var verified, show opt[bool]
	if err := decodeObject(raw, map[string]any{"fallbacks": &fallbacks, "verified_streams": &verified, "show_upstream": &show}); err != nil {
		return routing{}, under("routing", err)
	}
	r.VerifiedStreams, r.ShowUpstream = verified.v, show.v
	if len(fallbacks.v) > 100 {
		return routing{}, &fieldError{"routing.fallbacks", "must have 100 entries or fewer"}
	}
	for i, raw := range fallbacks.v {
		param := "routing.fallbacks[" + strconv.Itoa(i) + "]"
		var model, to opt[string]
		if err := decodeObject(raw, map[string]any{"model": &model, "to": &to}); err != nil {
			return routing{}, under(param, err)
		}
		if err := checkPatterns(param+".model", []string{model.v}); err != nil {
			return routing{}, err
		}
		if err := checkModelName(param+".to", to.v); err != nil {
			return routing{}, err
		}
		r.Fallbacks = append(r.Fallbacks, fallback{model.v, to.v})
	}
	return r, nil
}

// under names the object that a field with a mistake is in.
func under(object string, err error) error {
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

// fallback returns the model that stands in for another, "" if none does.
func (r *routing) fallback(model string) string {
	for _, f := range r.Fallbacks {
		if matches(f.Model, model) && f.To != model {
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
