// A reader for the part of YAML in which openapi.yaml is written: block maps and
// lists, [a, b] lists, plain and "quoted" scalars on one line. Whatever else YAML
// has is an error here, so that the file means the same to every other reader.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

type yamlLine struct {
	number, indent int
	text           string
}

type yamlReader struct{ lines []yamlLine }

func (r *yamlReader) fail(format string, args ...any) error {
	number := 0
	if len(r.lines) > 0 {
		number = r.lines[0].number
	}
	return fmt.Errorf("line %d: %s", number, fmt.Sprintf(format, args...))
}

func readYAML(text string) (any, error) {
	r := &yamlReader{}
	number := 0
	for line := range strings.SplitSeq(text, "\n") {
		number++
		body := strings.TrimLeft(line, " ")
		if body == "" || body[0] == '#' {
			continue
		}
		r.lines = append(r.lines, yamlLine{number, len(line) - len(body), body})
		if strings.ContainsRune(line, '\t') || strings.TrimRight(line, " \r") != line {
			return nil, fmt.Errorf("line %d: has a tab, or ends in white space", number)
		}
	}
	v, err := r.block(0)
	if err == nil && len(r.lines) > 0 {
		err = r.fail("odd indent")
	}
	return v, err
}

// block reads the map or list whose lines have this indent.
func (r *yamlReader) block(indent int) (any, error) {
	if len(r.lines) == 0 || r.lines[0].indent != indent {
		return nil, r.fail("a block of indent %d is missing", indent)
	}
	if strings.HasPrefix(r.lines[0].text, "- ") {
		return r.list(indent)
	}
	out := map[string]any{}
	for len(r.lines) > 0 && r.lines[0].indent == indent {
		key, rest, err := r.key(r.lines[0].text)
		if err != nil {
			return nil, err
		}
		if _, twice := out[key]; twice {
			return nil, r.fail("%s is there twice", key)
		}
		if rest != "" {
			if out[key], err = r.scalar(rest); err != nil {
				return nil, err
			}
			r.lines = r.lines[1:]
			continue
		}
		r.lines = r.lines[1:]
		if out[key], err = r.block(indent + 2); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (r *yamlReader) list(indent int) (any, error) {
	out := []any{}
	for len(r.lines) > 0 && r.lines[0].indent == indent {
		item, ok := strings.CutPrefix(r.lines[0].text, "- ")
		if !ok {
			return nil, r.fail("a list goes on with - ")
		}
		var v any
		var err error
		if _, _, isMap := r.key(item); isMap == nil {
			r.lines[0].indent, r.lines[0].text = indent+2, item
			v, err = r.block(indent + 2)
		} else {
			v, err = r.scalar(item)
			r.lines = r.lines[1:]
		}
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// key splits `key: rest` or `key:`.
func (r *yamlReader) key(text string) (key, rest string, err error) {
	if text[0] == '"' {
		quoted, err := strconv.QuotedPrefix(text)
		if err != nil {
			return "", "", r.fail("odd quotes")
		}
		key, rest = quoted[1:len(quoted)-1], text[len(quoted):]
	} else {
		i := strings.IndexByte(text, ':')
		if i < 1 || strings.Trim(text[:i], "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-$/{}") != "" || text[0] == '{' || text[0] == '-' {
			return "", "", r.fail("no key in %q", text)
		}
		key, rest = text[:i], text[i:]
	}
	if rest == ":" {
		return key, "", nil
	}
	rest, ok := strings.CutPrefix(rest, ": ")
	if !ok || rest == "" || rest[0] == ' ' {
		return "", "", r.fail("no value after %q", key)
	}
	return key, rest, nil
}

func (r *yamlReader) scalar(text string) (any, error) {
	switch text[0] {
	case '"':
		var s string
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			return nil, r.fail("%v", err)
		}
		return s, nil
	case '[':
		if text == "[]" {
			return []any{}, nil
		}
		inner, ok := strings.CutSuffix(text[1:], "]")
		if !ok || inner == "" {
			return nil, r.fail("odd list")
		}
		var out []any
		for part := range strings.SplitSeq(inner, ", ") {
			if part == "" || strings.ContainsAny(part, "[],") {
				return nil, r.fail("odd list")
			}
			v, err := r.scalar(part)
			if err != nil {
				return nil, err
			}
			out = append(out, v)
		}
		return out, nil
	}
	switch strings.ToLower(text) {
	case "true", "false":
		return text == "true", nil
	case "yes", "no", "on", "off", "y", "n", "null", "~": // some readers take them for something else
		return nil, r.fail("quote %q", text)
	}
	if n, err := strconv.ParseFloat(text, 64); err == nil {
		return n, nil
	}
	if strings.ContainsAny(text[:1], "&*!|>%@`'{}],?:-#") || strings.Contains(text, ": ") || strings.Contains(text, " #") || strings.HasSuffix(text, ":") {
		return nil, r.fail("quote %q", text)
	}
	return text, nil
}

// TestReadYAML: what it reads, and that it refuses what it does not.
func TestReadYAML(t *testing.T) {
	t.Parallel()
	got, err := readYAML("# c\na:\n  \"200\": \"x: #\\n\"\n  b: [p, \"null\", 1]\nl:\n  - k: v\n    m: true\n  - s\n")
	want := map[string]any{"a": map[string]any{"200": "x: #\n", "b": []any{"p", "null", 1.0}},
		"l": []any{map[string]any{"k": "v", "m": true}, "s"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v %v", got, err)
	}
	for _, bad := range []string{"a: b: c", "a: |\n  x", "a: {b: c}", "a: *x", "a: &x y", "a:\n - b", "a:\n   b: c", "a: b\na: c", "a: 'b'", "a: yes",
		"a: b # c", "a:\tb", "a: b ", "a", "- a\nb: c", "a: [b", "a: >-\n  b", "a: [[b]]", "a: \"b", "a:\nb: c", "--- a", "? a"} {
		if v, err := readYAML(bad); err == nil {
			t.Error(errors.New("accepted"), bad, v)
		}
	}
}
