// This file reads the JSON objects that administrators send, strictly: an unknown, repeated or wrongly
// capitalized name is an error that names the field. If it were ignored, a misspelled limit would limit
// nothing. Plain code: it uses neither HTTP nor the store.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"
)

// A fieldError is a mistake in a request, reported to its sender. param is the field's name, and msg continues
// the sentence; if param is "", the mistake is in the body as a whole, and msg is a sentence.
type fieldError struct{ param, msg string }

func (e *fieldError) Error() string {
	if e.param == "" {
		return e.msg
	}
	return e.param + ": " + e.msg
}

// An optional is a field that may be absent, null or a value. A PATCH must tell the three apart.
type optional[T any] struct {
	set, null bool
	value     T
}

func (o *optional[T]) UnmarshalJSON(b []byte) error {
	o.set = true
	if string(b) == "null" {
		o.null = true
		return nil
	}
	return json.Unmarshal(b, &o.value)
}

// hasValue reports whether the field holds a value.
func (o optional[T]) hasValue() bool { return o.set && !o.null }

// decodeObject reads one JSON object into the pointers of fields, by exact name. Only the fields in
// nullable may be null. Every error is a *fieldError.
func decodeObject(body []byte, fields map[string]any, nullable ...string) error {
	if !utf8.Valid(body) {
		return &fieldError{"", "The body is not valid UTF-8."}
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return &fieldError{"", "The body must be one JSON object."}
	}
	seen := map[string]bool{}
	for dec.More() {
		t, err := dec.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return syntaxError(dec)
		}
		target, ok := fields[name]
		switch {
		case !ok:
			all := strings.Join(slices.Sorted(maps.Keys(fields)), ", ")
			return &fieldError{clip(name, 64), "is not a known field; known are: " + cmp.Or(all, "none")}
		case seen[name]:
			return &fieldError{name, "is given twice"}
		}
		seen[name] = true
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return syntaxError(dec)
		}
		if string(raw) == "null" && !slices.Contains(nullable, name) {
			return &fieldError{name, "must be " + expectedType(target) + ", not null"}
		}
		if err := json.Unmarshal(raw, target); err != nil {
			if _, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
				return &fieldError{name, "must be " + expectedType(target)}
			}
			if fe, ok := errors.AsType[*fieldError](err); ok {
				return fe
			}
			return syntaxError(dec)
		}
	}
	if _, err := dec.Token(); err != nil {
		return syntaxError(dec)
	}
	if _, err := dec.Token(); err != io.EOF {
		return &fieldError{"", "The body has data after its JSON object."}
	}
	return nil
}

func syntaxError(dec *json.Decoder) error {
	return &fieldError{"", fmt.Sprintf("The body is not valid JSON at byte %d.", dec.InputOffset())}
}

// expectedType describes the values that a field's pointer accepts.
func expectedType(target any) string {
	switch target.(type) {
	case *optional[string], *optional[secret], *string:
		return "a string"
	case *optional[int64], *int64:
		return "a whole number"
	case *optional[bool], *bool:
		return "true or false"
	case *optional[[]string], *[]string:
		return "a list of strings"
	case *optional[map[string]string]:
		return "an object of strings"
	case *optional[json.RawMessage]:
		return "a value"
	case *optional[[]json.RawMessage]:
		return "a list of objects"
	}
	return "of another type"
}

// validateName checks the name of a project, upstream, token or key. A name must not change how the text
// around it is displayed.
func validateName(s string) error {
	if s == "" || len(s) > 100 {
		return &fieldError{"name", "must have 1 to 100 bytes"}
	}
	invisible := func(r rune) bool { // control characters, line separators and changes of text direction
		return r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' ||
			r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069'
	}
	if strings.ContainsFunc(s, invisible) {
		return &fieldError{"name", "must not contain control characters"}
	}
	if strings.TrimSpace(s) != s {
		return &fieldError{"name", "must not begin or end with white space"}
	}
	return nil
}
