// This room reads the JSON objects that admins send, strictly: unknown,
// repeated and differently-cased names are errors that name the field, because
// a name that is silently ignored is a limit that silently does not hold. It
// also writes text as JSON. Plain code: it knows no HTTP and no tables.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// A fieldError is a mistake in a request, told to who sent it: param names the
// field ("" for the body as a whole), msg completes the sentence.
type fieldError struct{ param, msg string }

func (e *fieldError) Error() string {
	if e.param == "" {
		return e.msg
	}
	return e.param + ": " + e.msg
}

// An optional is a field that may be absent, null or a value: three things that a
// PATCH must tell apart.
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

// decodeObject reads one JSON object into the pointers of fields, by exact
// name. null is for those in nullable only. Every error is a *fieldError.
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
			return syntaxError(dec, err)
		}
		to, known := fields[name]
		switch {
		case !known:
			return &fieldError{clip(name, 64), "is not a known field; known are: " + fieldNames(fields)}
		case seen[name]:
			return &fieldError{name, "is given twice"}
		}
		seen[name] = true
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return syntaxError(dec, err)
		}
		if string(raw) == "null" && !slices.Contains(nullable, name) {
			return &fieldError{name, "must be " + expectedType(to) + ", not null"}
		}
		if err := json.Unmarshal(raw, to); err != nil {
			if _, isType := errors.AsType[*json.UnmarshalTypeError](err); isType {
				return &fieldError{name, "must be " + expectedType(to)}
			}
			if fe, ok := errors.AsType[*fieldError](err); ok {
				return fe
			}
			return syntaxError(dec, err)
		}
	}
	if _, err := dec.Token(); err != nil {
		return syntaxError(dec, err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return &fieldError{"", "The body has data after its JSON object."}
	}
	return nil
}

func syntaxError(dec *json.Decoder, _ error) error {
	return &fieldError{"", fmt.Sprintf("The body is not valid JSON at byte %d.", dec.InputOffset())}
}

func fieldNames(fields map[string]any) string {
	names := make([]string, 0, len(fields))
	for n := range fields {
		names = append(names, n)
	}
	slices.Sort(names)
	return cmp.Or(strings.Join(names, ", "), "none")
}

// expectedType says in words what a field's pointer takes.
func expectedType(to any) string {
	switch to.(type) {
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

// validateName holds the rule for the names that admins give to things.
func validateName(s string) error {
	if s == "" || len(s) > 100 {
		return &fieldError{"name", "must have 1 to 100 bytes"}
	}
	for _, r := range s {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) || r == '\u2028' || r == '\u2029' || (r >= '\u202a' && r <= '\u202e') || (r >= '\u2066' && r <= '\u2069') {
			return &fieldError{"name", "must not have control characters"}
		}
	}
	if strings.TrimSpace(s) != s {
		return &fieldError{"name", "must not begin or end with white space"}
	}
	return nil
}
