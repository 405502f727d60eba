// What a JSON request body says, and the one splice the proxy makes. (Syntax: request_json.go; forms: request_form.go.)
// Plain code: it sees bytes and returns values; it does no I/O, keeps no state and never copies the body.
// It decides which model a call is authorised for, so it must read a body exactly as every provider's parser
// would. Where two parsers could differ (twin keys, half surrogates) the body is refused, not interpreted.
package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	maxModelLen         = 256
	maxFieldValue       = math.MaxInt32 // counts saturate here, so that n × max_tokens cannot overflow
	maxProtectedNameLen = 32            // no protected name or case twin of one is longer (ſ has 2 bytes, K 3)
)

// protectedNames are the top-level fields that the proxy or its policies read. Each may occur once, in this spelling.
var protectedNames = [...]string{
	"model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of",
	"previous_response_id", "conversation", "background", "store", "models", "fallbacks",
}

// callFields is what a request body says that the proxy must know. Everything else passes unread.
type callFields struct {
	model               string // "" when the body names none
	stream              bool
	maxTokens           int64  // max_tokens; 0 when that is no positive integer, as the next two
	maxCompletionTokens int64  // max_completion_tokens
	maxOutputTokens     int64  // max_output_tokens
	n                   int64  // the larger of n and best_of; 1 unless one is a positive integer
	includeUsage        bool   // stream_options.include_usage is true
	statefulParam       string // first field that refers to objects kept at the provider and is neither null nor false; "" if none
	modelListParam      string // "models" or "fallbacks" if the body names models beside model, as routers of several providers take them
	usageSplice         splice // what withIncludeUsage does
	modelSplice         splice // where the model is: a JSON string, or with text "form" a form field's value; to is 0: nowhere
}

// splice replaces body[from:to] by text; "" means that nothing is to be done.
type splice struct {
	from, to int
	text     string
}

// bodyError says why a body is refused. msg is for the client; param is the field at fault, or "".
type bodyError struct{ param, msg string }

func (e *bodyError) Error() string { return e.msg }

// scanJSON reads body once and returns its fields. Every error is a *bodyError. It accepts what json.Valid
// accepts, but for these stricter rules: one object at the top, valid UTF-8 without a byte order mark, at most
// maxJSONDepth levels, and the rules for protectedNames.
func scanJSON(body []byte) (callFields, error) {
	f := callFields{n: 1}
	s := bodyScanner{b: body}
	s.skipSpace()
	switch {
	case bytes.HasPrefix(body, []byte("\xef\xbb\xbf")):
		s.fail("", "The request body starts with a byte order mark; send plain UTF-8 JSON.")
	case !utf8.Valid(body):
		s.fail("", fmt.Sprintf("The request body is not valid UTF-8 (byte %d).", invalidUTF8At(body)))
	case s.i == len(body):
		s.fail("", "The request body is empty; a JSON object is required.")
	case s.b[s.i] != '{':
		s.fail("", fmt.Sprintf("The request body must be a JSON object (byte %d).", s.i))
	default:
		s.readTopLevel(&f)
		s.skipSpace()
		if s.err == nil && s.i < len(body) {
			s.failSyntax("the end of the body")
		}
	}
	if s.err != nil {
		return callFields{}, s.err
	}
	return f, nil
}

// withIncludeUsage returns body with stream_options.include_usage set to true; every other byte, the order of keys
// and the white space stay. f must come from scanJSON of the same body. If nothing must change it returns body itself.
func withIncludeUsage(body []byte, f callFields) []byte {
	e := f.usageSplice
	if e.text == "" {
		return body
	}
	out := make([]byte, 0, len(body)+len(e.text))
	out = append(out, body[:e.from]...)
	out = append(out, e.text...)
	return append(out, body[e.to:]...)
}

// withModel returns a body with another model in the place of the client's; every
// other byte stays. f must come from the same body, which may have been through
// withIncludeUsage since: added says so. Where f found no model it returns body
// itself.
func withModel(body []byte, f callFields, added bool, model string) []byte {
	e := f.modelSplice
	if e.to == 0 {
		return body
	}
	if added && f.usageSplice.text != "" && f.usageSplice.from <= e.from {
		shift := len(f.usageSplice.text) - (f.usageSplice.to - f.usageSplice.from)
		e.from, e.to = e.from+shift, e.to+shift
	}
	name := []byte(model)
	if e.text == "" {
		var err error
		if name, err = json.Marshal(model); err != nil { // cannot be: a string
			return body
		}
	}
	out := make([]byte, 0, len(body)+len(name))
	out = append(out, body[:e.from]...)
	out = append(out, name...)
	return append(out, body[e.to:]...)
}

// setField takes one protected field; raw is its JSON value as sent, already checked for syntax.
func (f *callFields) setField(name string, raw []byte) *bodyError {
	switch name {
	case "model":
		if raw[0] != '"' {
			return &bodyError{name, "Invalid type for 'model': it must be a string."}
		}
		text := raw[1 : len(raw)-1]
		if bytes.IndexByte(text, '\\') >= 0 {
			text = unescape(text)
		}
		return f.setModel(text)
	case "stream":
		if string(raw) != "true" && string(raw) != "false" && string(raw) != "null" {
			return &bodyError{name, "Invalid type for 'stream': it must be a boolean."}
		}
		f.stream = string(raw) == "true"
	case "max_tokens":
		f.maxTokens = parsePositive(raw)
	case "max_completion_tokens":
		f.maxCompletionTokens = parsePositive(raw)
	case "max_output_tokens":
		f.maxOutputTokens = parsePositive(raw)
	case "n", "best_of":
		f.n = max(f.n, parsePositive(raw))
	case "previous_response_id", "conversation", "background":
		if f.statefulParam == "" && string(raw) != "null" && string(raw) != "false" {
			f.statefulParam = name
		}
	case "models", "fallbacks":
		if string(raw) != "null" {
			f.modelListParam = name
		}
	}
	return nil
}

func (f *callFields) setModel(text []byte) *bodyError {
	if len(text) == 0 || len(text) > maxModelLen {
		return &bodyError{"model", fmt.Sprintf("Invalid 'model': it must have 1 to %d bytes.", maxModelLen)}
	}
	// U+FFFD is what half a surrogate pair decodes to here; other parsers make something else of it.
	if bytes.ContainsFunc(text, func(r rune) bool { return unicode.IsControl(r) || r == utf8.RuneError }) {
		return &bodyError{"model", "Invalid 'model': it has a character that no model name has."}
	}
	f.model = string(text)
	return nil
}

// parsePositive is the value of a positive integer, at most maxFieldValue, or 0 for anything else. An integer may be written
// 4.0 or 4e0: providers take that for 4, so a budget must too.
func parsePositive(raw []byte) int64 {
	if len(raw) == 0 || raw[0] < '0' || raw[0] > '9' {
		return 0
	}
	v, err := strconv.ParseFloat(string(raw), 64)
	if math.IsInf(v, 1) {
		return maxFieldValue
	}
	if err != nil || v != math.Trunc(v) {
		return 0
	}
	return int64(min(v, maxFieldValue))
}

// protectedName returns the index of the protected name that key is, or folds to as encoding/json folds, and
// whether it is spelled exactly so; or -1.
func protectedName(key []byte) (i int, exact bool) {
	if len(key) > maxProtectedNameLen {
		return -1, false
	}
	for i, name := range protectedNames {
		// A twin is never shorter than the name, and starts with its letter in either case or with ſ.
		if len(key) < len(name) || (key[0]|0x20 != name[0] && key[0] < utf8.RuneSelf) {
			continue
		}
		if string(key) == name {
			return i, true
		}
		if strings.EqualFold(string(key), name) {
			return i, false
		}
	}
	return -1, false
}

// readTopLevel reads the outermost object into f.
func (s *bodyScanner) readTopLevel(f *callFields) {
	open, members := s.i+1, 0
	options := false
	var seen uint
	for more := s.enter('}'); more; more = s.next('}') {
		members++
		key := s.readDecodedKey()
		i, exact := protectedName(key)
		if i < 0 {
			s.skipValue()
			continue
		}
		name := protectedNames[i]
		switch {
		case !exact:
			s.fail(name, fmt.Sprintf("Ambiguous field name %q: it must be spelled %q.", key, name))
		case seen>>i&1 == 1:
			s.fail(name, fmt.Sprintf("Duplicate field %q: it may occur once only.", name))
		case name == "stream_options":
			options = true
			s.readStreamOptions(f)
		default:
			if raw := s.readValue(); s.err == nil {
				if name == "model" {
					f.modelSplice = splice{from: s.i - len(raw), to: s.i}
				}
				if err := f.setField(name, raw); err != nil {
					s.fail(err.param, err.msg)
				}
			}
		}
		seen |= 1 << i
	}
	if !options {
		f.usageSplice = splice{open, open, `"stream_options":{"include_usage":true},`}
		if members == 0 {
			f.usageSplice.text = strings.TrimSuffix(f.usageSplice.text, ",")
		}
	}
}

// readStreamOptions reads the value of stream_options: an object or null.
func (s *bodyScanner) readStreamOptions(f *callFields) {
	const name = "stream_options.include_usage"
	from := s.i
	if from < len(s.b) && s.b[from] != '{' {
		if raw := s.readValue(); s.err == nil && string(raw) != "null" {
			s.fail("stream_options", "Invalid type for 'stream_options': it must be an object.")
		}
		f.usageSplice = splice{from, s.i, `{"include_usage":true}`}
		return
	}
	members, found := 0, false
	for more := s.enter('}'); more; more = s.next('}') {
		members++
		key := s.readDecodedKey()
		twin := len(key) <= maxProtectedNameLen && strings.EqualFold(string(key), "include_usage")
		at := s.i
		raw := s.readValue()
		switch {
		case !twin || s.err != nil:
		case string(key) != "include_usage":
			s.fail(name, fmt.Sprintf("Ambiguous field name %q: it must be spelled \"include_usage\".", key))
		case found:
			s.fail(name, "Duplicate field \"include_usage\": it may occur once only.")
		case string(raw) == "true":
			found, f.includeUsage = true, true
		case string(raw) == "false" || string(raw) == "null":
			found, f.usageSplice = true, splice{at, s.i, "true"}
		default:
			s.fail(name, "Invalid type for 'stream_options.include_usage': it must be a boolean.")
		}
	}
	switch {
	case found:
	case members == 0:
		f.usageSplice = splice{from + 1, from + 1, `"include_usage":true`}
	default:
		f.usageSplice = splice{from + 1, from + 1, `"include_usage":true,`}
	}
}

const maxJSONDepth = 128

// bodyScanner is a position in a body. The first error stays and moves the position to the end, so that every
// method below simply finds nothing more to read.
type bodyScanner struct {
	b     []byte
	i     int
	depth int
	err   *bodyError
}

func (s *bodyScanner) fail(param, msg string) {
	if s.err == nil {
		s.err = &bodyError{param, msg}
	}
	s.i = len(s.b)
}

func (s *bodyScanner) failSyntax(want string) {
	got := "the body ends"
	if s.i < len(s.b) {
		got = strconv.QuoteRuneToASCII(rune(s.b[s.i])) + " found"
	}
	s.fail("", fmt.Sprintf("The request body is not valid JSON: %s at byte %d where %s was expected.", got, s.i, want))
}

// enter enters an object or array and says whether it has a member; next says whether another follows.
func (s *bodyScanner) enter(end byte) bool {
	if s.depth++; s.depth > maxJSONDepth {
		s.fail("", fmt.Sprintf("The request body is nested deeper than %d levels (byte %d).", maxJSONDepth, s.i))
		return false
	}
	s.i = min(s.i+1, len(s.b))
	if s.skipSpace(); s.i < len(s.b) && s.b[s.i] == end {
		s.i++
		s.depth--
		return false
	}
	return true
}

func (s *bodyScanner) next(end byte) bool {
	s.skipSpace()
	switch {
	case s.i < len(s.b) && s.b[s.i] == ',':
		s.i++
		s.skipSpace()
		return true
	case s.i < len(s.b) && s.b[s.i] == end:
		s.i++
		s.depth--
		return false
	}
	s.failSyntax("',' or '" + string(rune(end)) + "'")
	return false
}

// readKey reads a member's name and its colon, up to the value. The name is as sent; escaped says that it needs unescape.
func (s *bodyScanner) readKey() (raw []byte, escaped bool) {
	raw, escaped = s.readString("a field name in double quotes")
	if s.skipSpace(); s.i == len(s.b) || s.b[s.i] != ':' {
		s.failSyntax("':'")
		return nil, false
	}
	s.i++
	s.skipSpace()
	return raw, escaped
}

// readDecodedKey is key, decoded: "mo\u0064el" is model to every parser.
func (s *bodyScanner) readDecodedKey() []byte {
	raw, escaped := s.readKey()
	if escaped {
		return unescape(raw)
	}
	return raw
}

func (s *bodyScanner) readValue() []byte {
	from := s.i
	s.skipValue()
	return s.b[from:s.i]
}

func (s *bodyScanner) skipValue() {
	if s.i == len(s.b) {
		s.failSyntax("a value")
		return
	}
	switch s.b[s.i] {
	case '"':
		s.readString("a string")
	case '{':
		for more := s.enter('}'); more; more = s.next('}') {
			s.readKey()
			s.skipValue()
		}
	case '[':
		for more := s.enter(']'); more; more = s.next(']') {
			s.skipValue()
		}
	case 't':
		s.skipLiteral("true")
	case 'f':
		s.skipLiteral("false")
	case 'n':
		s.skipLiteral("null")
	default:
		s.skipNumber()
	}
}

func (s *bodyScanner) skipLiteral(word string) {
	if !bytes.HasPrefix(s.b[s.i:], []byte(word)) {
		s.failSyntax("a value")
		return
	}
	s.i += len(word)
}

func (s *bodyScanner) skipNumber() {
	if s.b[s.i] == '-' {
		s.i++
	}
	if s.i < len(s.b) && s.b[s.i] == '0' {
		s.i++
	} else if !s.skipDigits("a value") {
		return
	}
	if s.i < len(s.b) && s.b[s.i] == '.' {
		s.i++
		if !s.skipDigits("a digit") {
			return
		}
	}
	if s.i < len(s.b) && s.b[s.i]|0x20 == 'e' {
		s.i++
		if s.i < len(s.b) && (s.b[s.i] == '+' || s.b[s.i] == '-') {
			s.i++
		}
		s.skipDigits("a digit")
	}
}

func (s *bodyScanner) skipDigits(want string) bool {
	from := s.i
	for s.i < len(s.b) && s.b[s.i] >= '0' && s.b[s.i] <= '9' {
		s.i++
	}
	if s.i == from {
		s.failSyntax(want)
		return false
	}
	return true
}

func (s *bodyScanner) skipSpace() {
	const blanks = 1<<' ' | 1<<'\n' | 1<<'\r' | 1<<'\t'
	for s.i < len(s.b) && s.b[s.i] <= ' ' && blanks>>s.b[s.i]&1 == 1 {
		s.i++
	}
}

// readString reads a string and returns what is between the quotes, and whether that has escapes.
func (s *bodyScanner) readString(want string) (raw []byte, escaped bool) {
	if s.i == len(s.b) || s.b[s.i] != '"' {
		s.failSyntax(want)
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
				s.failSyntax("a valid escape sequence")
				return nil, false
			}
			s.i += n
			escaped = true
		default: // a control character, or the end
			s.failSyntax("the rest of a string")
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
	case len(b) >= 6 && b[1] == 'u' && parseHex4(b[2:]) >= 0:
		return 6
	}
	return 0
}

// parseHex4 is the value of four hexadecimal digits, or -1.
func parseHex4(b []byte) rune {
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
			r := parseHex4(raw[i+2:])
			i += 6
			if utf16.IsSurrogate(r) {
				low := rune(-1)
				if i+6 <= len(raw) && raw[i] == '\\' && raw[i+1] == 'u' {
					low = parseHex4(raw[i+2:])
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
