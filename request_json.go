// This file reads the fields of a JSON request body that the proxy needs, and makes the two changes that the proxy
// may make: adding include_usage and replacing the model. It decides which model a call is authorized for, so it
// must read a body exactly as every provider's parser does. If two parsers could differ (repeated names, names in
// another case, half surrogates), the body is refused, not interpreted. Plain code: no I/O, no state.
//
// How it works: scanJSON makes one pass over the body.
//
//	bodyScanner    a position in the body. Its methods mirror the JSON grammar (readKey, readValue, skipValue,
//	               skipNumber, …). The first error moves the position to the end, so all loops stop.
//	enter, next    step into an object or list and on to its next member, and count the depth.
//	readTopLevel   reads the members of the outermost object. A name is decoded and compared with protectedNames;
//	               the value of any other name is checked for syntax and skipped.
//	setField       stores the value of a protected field in callFields.
//	splice         marks the bytes to replace, so the rest of the body is forwarded unchanged.
package main

import (
	"bytes"
	"cmp"
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
	maxProtectedNameLen = 32            // the longest protected name, even if spelled with ſ (2 bytes) or K (3)
)

// protectedNames are the top-level fields that the proxy reads. Each may occur once, in exactly this spelling.
var protectedNames = [...]string{
	"model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of",
	"previous_response_id", "conversation", "background", "store", "models", "fallbacks",
	"context_window_fallbacks", "content_policy_fallbacks", "extra_body", "preset",
}

// callFields are the fields of a request body that the proxy needs. Everything else passes unread.
type callFields struct {
	model               string // "" if the body has none
	stream              bool
	maxTokens           int64 // max_tokens; like the next two, 0 unless it is positive
	maxCompletionTokens int64 // max_completion_tokens
	maxOutputTokens     int64 // max_output_tokens
	n                   int64 // the larger of n and best_of, at least 1
	prompts             int64 // in the list that prompt is; 0 if it is no list of prompts
	includeUsage        bool  // stream_options.include_usage is true
	billedFields
	// statefulParam is the first field that refers to objects kept at the provider and is neither null nor
	// false; "" if there is none.
	statefulParam string
	background    bool // background is true: the provider goes on without the client
	// modelListParam is the first field from which a provider that routes to others may take another model, or ""
	modelListParam string
	prompt         promptParts
	usageSplice    splice // adds include_usage
	usageBefore    string // what usageSplice replaces
	modelSplice    splice // of the model: a JSON string, or with text "form" a form field's value; to is 0: none
	identity       bodyIdentity
}

// A splice replaces body[from:to] by text. If text is "", nothing is replaced.
type splice struct {
	from, to int
	text     string
}

// scanJSON reads a body and returns its fields. Every error is a *bodyError. It accepts what json.Valid accepts,
// with stricter rules: one object at the top, valid UTF-8 without a byte order mark, at most maxJSONDepth levels,
// and the rules for protectedNames.
func scanJSON(body []byte) (callFields, error) {
	f, s := callFields{n: 1}, bodyScanner{b: body}
	if s.beginBody() {
		s.readTopLevel(&f)
	}
	return s.endBody(f)
}

// beginBody checks the start of a body, and reports whether an object follows, which is then to be read.
func (s *bodyScanner) beginBody() bool {
	s.skipSpace()
	switch {
	case bytes.HasPrefix(s.b, []byte("\xef\xbb\xbf")):
		s.fail("", "The request body starts with a byte order mark; send plain UTF-8 JSON.")
	case !utf8.Valid(s.b):
		s.fail("", fmt.Sprintf("The request body is not valid UTF-8 (byte %d).", invalidUTF8At(s.b)))
	case s.i == len(s.b):
		s.fail("", "The request body is empty; a JSON object is required.")
	case s.b[s.i] != '{':
		s.fail("", fmt.Sprintf("The request body must be a JSON object (byte %d).", s.i))
	}
	return s.err == nil
}

// endBody checks that nothing follows the object. It returns f, or what is wrong with the body.
func (s *bodyScanner) endBody(f callFields) (callFields, error) {
	if s.skipSpace(); s.err == nil && s.i < len(s.b) {
		s.failSyntax("the end of the body")
	}
	if s.err != nil {
		return callFields{}, s.err
	}
	return f, nil
}

// apply returns a copy of body with text in place of body[from:to].
func (s splice) apply(body []byte, text string) []byte {
	out := make([]byte, 0, len(body)+len(text))
	out = append(out, body[:s.from]...)
	out = append(out, text...)
	return append(out, body[s.to:]...)
}

// withIncludeUsage returns body with stream_options.include_usage set to true and every other byte unchanged. f
// must come from scanJSON of the same body. If nothing must change, it returns body itself.
func withIncludeUsage(body []byte, f callFields) []byte {
	if f.usageSplice.text == "" {
		return body
	}
	return f.usageSplice.apply(body, f.usageSplice.text)
}

// withoutIncludeUsage undoes withIncludeUsage: it returns the body as the client sent it. f is the same.
func withoutIncludeUsage(body []byte, f callFields) []byte {
	added := f.usageSplice
	return splice{from: added.from, to: added.from + len(added.text)}.apply(body, f.usageBefore)
}

// withModel returns body with another model and every other byte unchanged. f must come from the same body;
// usageAdded means that body was changed by withIncludeUsage since. If f has no model, it returns body itself.
func withModel(body []byte, f callFields, usageAdded bool, model string) []byte {
	s := f.modelSplice
	if s.to == 0 {
		return body
	}
	if usageAdded && f.usageSplice.text != "" && f.usageSplice.from <= s.from {
		shift := len(f.usageSplice.text) - (f.usageSplice.to - f.usageSplice.from)
		s.from, s.to = s.from+shift, s.to+shift
	}
	if s.text == "" {
		model = string(mustMarshal(model))
	}
	return s.apply(body, model)
}

// setField stores one protected field. raw is its JSON value as sent, with valid syntax.
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
	case "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of":
		count, ok := parseWholeNumber(raw)
		if !ok && (name != "max_output_tokens" || string(raw) != `"inf"`) { // realtime calls may say "inf"
			return &bodyError{name, fmt.Sprintf("Invalid type for '%s': it must be a whole number.", name)}
		}
		f.setCount(name, count)
	case "previous_response_id", "conversation", "background":
		f.background = f.background || name == "background" && string(raw) == "true"
		if string(raw) != "null" && string(raw) != "false" {
			f.setStateful(name)
		}
	case "models", "fallbacks", "context_window_fallbacks", "content_policy_fallbacks", "preset":
		if string(raw) != "null" {
			f.modelListParam = cmp.Or(f.modelListParam, name)
		}
	case "extra_body": // "google" has options of Google's OpenAI-compatible API, and no model
		var options map[string]json.RawMessage
		if json.Unmarshal(raw, &options) != nil || len(options) > 1 || len(options) == 1 && options["google"] == nil {
			f.modelListParam = cmp.Or(f.modelListParam, name)
		}
	}
	return nil
}

func (f *callFields) setCount(name string, count int64) {
	switch name {
	case "max_tokens":
		f.maxTokens = count
	case "max_completion_tokens":
		f.maxCompletionTokens = count
	case "max_output_tokens":
		f.maxOutputTokens = count
	default: // n, best_of
		f.n = max(f.n, count)
	}
}

func (f *callFields) setModel(text []byte) *bodyError {
	if len(text) == 0 || len(text) > maxModelLen {
		return &bodyError{"model", fmt.Sprintf("Invalid 'model': it must have 1 to %d bytes.", maxModelLen)}
	}
	// Half a surrogate pair decodes to U+FFFD here, and to other text in other parsers.
	if bytes.ContainsFunc(text, isOddCharacter) {
		return &bodyError{"model", "Invalid 'model': it has a character that no model name has."}
	}
	f.model = string(text)
	return nil
}

// parseWholeNumber returns the value of a whole number, from 0 to maxFieldValue. null and negative numbers, which
// mean no count, are 0. 4.0 and 4e0 are whole numbers, too: providers read them as 4, so a budget must do so as
// well. Anything else is refused, because some providers read "4" as 4 and others round 3.5.
func parseWholeNumber(raw []byte) (count int64, ok bool) {
	if string(raw) == "null" {
		return 0, true
	}
	v, err := strconv.ParseFloat(string(raw), 64)
	switch {
	case raw[0] != '-' && (raw[0] < '0' || raw[0] > '9'): // a string, a boolean, a list or an object
		return 0, false
	case math.IsInf(v, 0):
		return int64(min(max(v, 0), maxFieldValue)), true
	case err != nil || v != math.Trunc(v):
		return 0, false
	}
	return int64(min(max(v, 0), maxFieldValue)), true
}

// protectedName returns the index of the protected name that key equals under the case folding of encoding/json,
// and whether it is spelled exactly so. It returns -1 if there is none.
func protectedName(key []byte) (i int, exact bool) {
	if len(key) > maxProtectedNameLen {
		return -1, false
	}
	for i, name := range protectedNames {
		// A name that folds to this one is never shorter, and starts with its letter in either case or with ſ.
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
	hasOptions := false
	var seen uint
	for more := s.enter('}'); more; more = s.next('}') {
		members++
		key := s.readDecodedKey()
		i, exact := protectedName(key)
		if i < 0 {
			from := s.i
			s.readUnprotected(f, key)
			f.prompt.add(key, from, s.i)
			continue
		}
		name := protectedNames[i]
		switch {
		case !exact:
			s.fail(name, fmt.Sprintf("Ambiguous field name %q: it must be spelled %q.", key, name))
		case seen>>i&1 == 1:
			s.fail(name, fmt.Sprintf("Duplicate field %q: it may occur once only.", name))
		case name == "stream_options":
			hasOptions = true
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
	if !hasOptions {
		f.usageSplice = splice{open, open, `"stream_options":{"include_usage":true},`}
		if members == 0 {
			f.usageSplice.text = strings.TrimSuffix(f.usageSplice.text, ",")
		}
	}
}

// readUnprotected reads the value of a name that is not protected, because it means other things in other endpoints:
// it may occur in any number and spelling, and each counts. A prompt that is an object, and any container, are kept
// at the provider.
func (s *bodyScanner) readUnprotected(f *callFields, key []byte) {
	is := func(name string) bool { return len(key) == len(name) && strings.EqualFold(string(key), name) }
	switch {
	case is("prompt") && s.i < len(s.b) && s.b[s.i] == '{':
		f.setStateful("prompt")
		s.skipValue()
	case is("prompt"):
		s.countPrompts(f)
	case is("container"):
		if raw := s.readValue(); string(raw) != "null" {
			f.setStateful("container")
		}
	case isBilledField(key):
		if raw := s.readValue(); s.err == nil {
			f.billedFields.set(key, raw)
		}
	case string(key) == "metadata" && s.startsWith('{'):
		for more := s.enter('}'); more; more = s.next('}') {
			if field := s.readDecodedKey(); string(field) == "user_id" {
				f.identity.metadataUserID = identityText(s.readValue())
			} else {
				s.skipValue()
			}
		}
	default:
		if field := f.identity.field(key); field != nil {
			*field = identityText(s.readValue())
		} else {
			s.skipValue()
		}
	}
}

// setStateful records that a field refers to objects kept at the provider.
func (f *callFields) setStateful(name string) {
	if f.statefulParam == "" {
		f.statefulParam = name
	}
}

// countPrompts reads the value of prompt and counts its prompts: a list has one for each text and each list of
// tokens, and is one prompt if it has only tokens. prompt is not a protected name, as it means other things in other
// endpoints. Of several the largest counts: whichever the provider reads, it is not larger.
func (s *bodyScanner) countPrompts(f *callFields) {
	if s.i == len(s.b) || s.b[s.i] != '[' {
		s.skipValue()
		return
	}
	count := int64(0)
	for more := s.enter(']'); more; more = s.next(']') {
		if s.i < len(s.b) && (s.b[s.i] == '"' || s.b[s.i] == '[' || s.b[s.i] == '{') {
			count++
		}
		s.skipValue()
	}
	f.prompts = max(f.prompts, count)
}

// readStreamOptions reads the value of stream_options: an object or null.
func (s *bodyScanner) readStreamOptions(f *callFields) {
	const name = "stream_options.include_usage"
	from := s.i
	if from < len(s.b) && s.b[from] != '{' {
		if raw := s.readValue(); s.err == nil && string(raw) != "null" {
			s.fail("stream_options", "Invalid type for 'stream_options': it must be an object.")
		}
		f.usageSplice, f.usageBefore = splice{from, s.i, `{"include_usage":true}`}, "null"
		return
	}
	members, found := 0, false
	for more := s.enter('}'); more; more = s.next('}') {
		members++
		key := s.readDecodedKey()
		folds := len(key) <= maxProtectedNameLen && strings.EqualFold(string(key), "include_usage")
		start := s.i
		raw := s.readValue()
		switch {
		case !folds || s.err != nil:
		case string(key) != "include_usage":
			s.fail(name, fmt.Sprintf("Ambiguous field name %q: it must be spelled \"include_usage\".", key))
		case found:
			s.fail(name, "Duplicate field \"include_usage\": it may occur once only.")
		case string(raw) == "true":
			found, f.includeUsage = true, true
		case string(raw) == "false" || string(raw) == "null":
			found, f.usageSplice, f.usageBefore = true, splice{start, s.i, "true"}, string(raw)
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

// A bodyScanner is a position in a body. The first error is kept and moves the position to the end, so that the
// methods below find nothing more to read.
type bodyScanner struct {
	b        []byte
	accepted bool // by an earlier scan
	i        int
	depth    int
	err      *bodyError
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

// enter enters an object or array and reports whether it has a member; next reports whether another one follows.
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

// readKey reads a member's name and colon, up to the value. raw is the name as sent; if escaped, it needs unescape.
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

// readDecodedKey is readKey with the name decoded: "mo\u0064el" is model to every parser.
func (s *bodyScanner) readDecodedKey() []byte {
	raw, escaped := s.readKey()
	if !escaped {
		return raw
	}
	name := unescape(raw)
	if bytes.ContainsFunc(name, isOddCharacter) { // a parser that ends or drops there reads another name
		s.fail("", fmt.Sprintf("The field name %+q has a character that no field name has.", clip(string(name), 64)))
	}
	return name
}

// isOddCharacter reports whether r is a control character such as NUL, or what half a surrogate pair decodes to.
func isOddCharacter(r rune) bool { return unicode.IsControl(r) || r == utf8.RuneError }

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
		if s.accepted {
			s.skipAcceptedString()
			return
		}
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

// readString reads a string and returns the text between the quotes, and whether it has escapes.
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

// skipAcceptedString skips a string of a body that an earlier scan has accepted: only its end is of interest.
func (s *bodyScanner) skipAcceptedString() {
	text := s.b[s.i+1:]
	for n := 0; n < len(text); n++ {
		n += max(0, bytes.IndexByte(text[n:], '"'))
		if slashes := n - len(bytes.TrimRight(text[:n], `\`)); slashes%2 == 0 {
			s.i += 1 + n + 1
			return
		}
	}
}

// plainLen counts the leading bytes that are not a quote, backslash or control character, eight at a time:
// (x-k)&^x&high marks the bytes below k. The lowest mark is always right; borrows only affect higher ones.
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

// escapeLen returns the length of the escape sequence at the start of b, or 0 if it is not valid.
func escapeLen(b []byte) int {
	switch {
	case len(b) >= 2 && strings.IndexByte(`"\/bfnrt`, b[1]) >= 0:
		return 2
	case len(b) >= 6 && b[1] == 'u' && parseHex4(b[2:]) >= 0:
		return 6
	}
	return 0
}

// parseHex4 returns the value of four hexadecimal digits, or -1.
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

// unescape decodes the inside of a string that readString accepted. Half a surrogate pair becomes U+FFFD.
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
