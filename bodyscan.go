// A strict JSON reader (RFC 8259) that walks a body in place: it checks syntax and finds where values are.
// Plain code: no copies, no allocation unless a string that is asked for has escapes; callbody.go decides what to
// look at. encoding/json is not used: it keeps the last of two equal keys, folds case, and reads a large string at a tenth of the speed.
package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

const maxJSONDepth = 128

// bodyScan is a position in a body. The first error stays and moves the position to the end, so that every
// method below simply finds nothing more to read.
type bodyScan struct {
	b     []byte
	i     int
	depth int
	err   *bodyError
}

func (s *bodyScan) fail(param, msg string) {
	if s.err == nil {
		s.err = &bodyError{param, msg}
	}
	s.i = len(s.b)
}

func (s *bodyScan) syntax(want string) {
	got := "the body ends"
	if s.i < len(s.b) {
		got = strconv.QuoteRuneToASCII(rune(s.b[s.i])) + " found"
	}
	s.fail("", fmt.Sprintf("The request body is not valid JSON: %s at byte %d where %s was expected.", got, s.i, want))
}

// first enters an object or array and says whether it has a member; next says whether another follows.
func (s *bodyScan) first(end byte) bool {
	if s.depth++; s.depth > maxJSONDepth {
		s.fail("", fmt.Sprintf("The request body is nested deeper than %d levels (byte %d).", maxJSONDepth, s.i))
		return false
	}
	s.i = min(s.i+1, len(s.b))
	if s.space(); s.i < len(s.b) && s.b[s.i] == end {
		s.i++
		s.depth--
		return false
	}
	return true
}

func (s *bodyScan) next(end byte) bool {
	s.space()
	switch {
	case s.i < len(s.b) && s.b[s.i] == ',':
		s.i++
		s.space()
		return true
	case s.i < len(s.b) && s.b[s.i] == end:
		s.i++
		s.depth--
		return false
	}
	s.syntax("',' or '" + string(rune(end)) + "'")
	return false
}

// key reads a member's name and its colon, up to the value. The name is as sent; escaped says that it needs unescape.
func (s *bodyScan) key() (raw []byte, escaped bool) {
	raw, escaped = s.str("a field name in double quotes")
	if s.space(); s.i == len(s.b) || s.b[s.i] != ':' {
		s.syntax("':'")
		return nil, false
	}
	s.i++
	s.space()
	return raw, escaped
}

// plainKey is key, decoded: "mo\u0064el" is model to every parser.
func (s *bodyScan) plainKey() []byte {
	raw, escaped := s.key()
	if escaped {
		return unescape(raw)
	}
	return raw
}

func (s *bodyScan) rawValue() []byte {
	from := s.i
	s.value()
	return s.b[from:s.i]
}

func (s *bodyScan) value() {
	if s.i == len(s.b) {
		s.syntax("a value")
		return
	}
	switch s.b[s.i] {
	case '"':
		s.str("a string")
	case '{':
		for more := s.first('}'); more; more = s.next('}') {
			s.key()
			s.value()
		}
	case '[':
		for more := s.first(']'); more; more = s.next(']') {
			s.value()
		}
	case 't':
		s.literal("true")
	case 'f':
		s.literal("false")
	case 'n':
		s.literal("null")
	default:
		s.number()
	}
}

func (s *bodyScan) literal(word string) {
	if !bytes.HasPrefix(s.b[s.i:], []byte(word)) {
		s.syntax("a value")
		return
	}
	s.i += len(word)
}

func (s *bodyScan) number() {
	if s.b[s.i] == '-' {
		s.i++
	}
	if s.i < len(s.b) && s.b[s.i] == '0' {
		s.i++
	} else if !s.digits("a value") {
		return
	}
	if s.i < len(s.b) && s.b[s.i] == '.' {
		s.i++
		if !s.digits("a digit") {
			return
		}
	}
	if s.i < len(s.b) && s.b[s.i]|0x20 == 'e' {
		s.i++
		if s.i < len(s.b) && (s.b[s.i] == '+' || s.b[s.i] == '-') {
			s.i++
		}
		s.digits("a digit")
	}
}

func (s *bodyScan) digits(want string) bool {
	from := s.i
	for s.i < len(s.b) && s.b[s.i] >= '0' && s.b[s.i] <= '9' {
		s.i++
	}
	if s.i == from {
		s.syntax(want)
		return false
	}
	return true
}

func (s *bodyScan) space() {
	const blanks = 1<<' ' | 1<<'\n' | 1<<'\r' | 1<<'\t'
	for s.i < len(s.b) && s.b[s.i] <= ' ' && blanks>>s.b[s.i]&1 == 1 {
		s.i++
	}
}

// str reads a string and returns what is between the quotes, and whether that has escapes.
func (s *bodyScan) str(want string) (raw []byte, escaped bool) {
	if s.i == len(s.b) || s.b[s.i] != '"' {
		s.syntax(want)
		return nil, false
	}
	from := s.i + 1
	for s.i = from; ; {
		s.i += plainLen(s.b[s.i:])
		switch {
		case s.i < len(s.b) && s.b[s.i] == '"':
			s.i++
			return s.b[from : s.i-1], escaped
		case s.i < len(s.b) && s.b[s.i] == '\\':
			n := escapeLen(s.b[s.i:])
			if n == 0 {
				s.syntax("a valid escape sequence")
				return nil, false
			}
			s.i += n
			escaped = true
		default: // a control character, or the end
			s.syntax("the rest of a string")
			return nil, false
		}
	}
}

// plainLen counts the leading bytes that are neither quote, backslash nor control character, eight at a time:
// (x-k)&^x&high marks bytes below k, where the lowest mark is always right (borrows only spoil higher ones).
func plainLen(b []byte) int {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	i := 0
	for ; i+8 <= len(b); i += 8 {
		x := binary.LittleEndian.Uint64(b[i:])
		quote, slash := x^ones*'"', x^ones*'\\'
		if m := ((x-ones*0x20)&^x | (quote-ones)&^quote | (slash-ones)&^slash) & high; m != 0 {
			return i + bits.TrailingZeros64(m)/8
		}
	}
	for i < len(b) && b[i] >= 0x20 && b[i] != '"' && b[i] != '\\' {
		i++
	}
	return i
}

// escapeLen is the length of the escape sequence that b starts with, 0 if it is not a valid one.
func escapeLen(b []byte) int {
	switch {
	case len(b) >= 2 && strings.IndexByte(`"\/bfnrt`, b[1]) >= 0:
		return 2
	case len(b) >= 6 && b[1] == 'u' && hex4(b[2:]) >= 0:
		return 6
	}
	return 0
}

// hex4 is the value of four hexadecimal digits, or -1.
func hex4(b []byte) rune {
	var v rune
	for _, c := range b[:4] {
		d := strings.IndexByte("0123456789abcdef", c|0x20)
		if d < 0 || c < '0' {
			return -1
		}
		v = v<<4 | rune(d)
	}
	return v
}

// unescape decodes the inside of a string that str has checked. Half a surrogate pair becomes U+FFFD.
func unescape(raw []byte) []byte {
	out := make([]byte, 0, len(raw))
	for i := 0; i < len(raw); {
		switch {
		case raw[i] != '\\':
			out = append(out, raw[i])
			i++
		case raw[i+1] != 'u':
			out = append(out, "\"\\/\b\f\n\r\t"[strings.IndexByte(`"\/bfnrt`, raw[i+1])])
			i += 2
		default:
			r := hex4(raw[i+2:])
			i += 6
			if utf16.IsSurrogate(r) {
				low := rune(-1)
				if i+6 <= len(raw) && raw[i] == '\\' && raw[i+1] == 'u' {
					low = hex4(raw[i+2:])
				}
				if r = utf16.DecodeRune(r, low); r != utf8.RuneError {
					i += 6
				}
			}
			out = utf8.AppendRune(out, r)
		}
	}
	return out
}

func invalidUTF8At(b []byte) int {
	for i := 0; i < len(b); {
		r, n := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return len(b)
}
