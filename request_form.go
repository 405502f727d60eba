// This file reads the fields of request bodies in the other forms: multipart/form-data, and the JSON of Gemini's API.
// They are the same ones that request_json.go reads from the JSON of OpenAI's and Anthropic's. It also has the fields
// of a request on which prices depend, and refuses bodies where none is due. mime/multipart and other parsers of forms
// are lenient (preamble, bare LF, folded headers, padded boundaries), each in a different way. This reader accepts only
// what common clients send, so that every parser sees the same parts. Plain code: it gets bytes and returns values, and
// never copies a file's bytes.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	maxFormParts   = 1000
	maxPartHeader  = 4 << 10
	maxBoundaryLen = 70 // RFC 2046
)

// scanBody reads the fields of a body for the matched endpoint.
func (m *endpointMatch) scanBody(form bool, contentType string, body []byte) (callFields, error) {
	switch {
	case m.endpoint.body == bodyRaw:
		return callFields{}, nil
	case form:
		return scanForm(contentType, body)
	case m.endpoint.api == apiGemini && m.endpoint.modelInPath:
		f, err := scanGemini(body, m.model)
		f.stream = m.endpoint.streams()
		return f, err
	}
	return scanJSON(body)
}

// scanForm reads a multipart/form-data body and returns its fields. Every error is a *bodyError. A body that it
// accepts can be read in one way only: each "--boundary" in it is a delimiter, each part has one plain name, and no
// header of a part changes how its value is decoded.
func scanForm(contentType string, body []byte) (callFields, error) {
	f := callFields{n: 1}
	boundary, err := formBoundary(contentType)
	if err != nil {
		return callFields{}, err
	}
	delimiter := []byte("--" + boundary)
	rest, ok := bytes.CutPrefix(body, delimiter)
	if !ok {
		return callFields{}, formError("it does not start with its boundary")
	}
	var seen uint
	for parts := 0; ; parts++ {
		// rest follows a delimiter. It starts with a line end and a part, or with the end of the form.
		if end, ok := bytes.CutPrefix(rest, []byte("--")); ok && parts > 0 {
			if len(end) > 0 && !bytes.HasPrefix(end, []byte("\r\n")) || len(bytes.Trim(end, " \t\r\n")) > 0 {
				return callFields{}, formError("something follows its closing boundary")
			}
			return f, nil
		}
		i := bytes.Index(rest, delimiter)
		switch {
		case !bytes.HasPrefix(rest, []byte("\r\n")):
			return callFields{}, formError("a boundary is not on a line of its own")
		case i < 0:
			return callFields{}, formError("its closing boundary is missing")
		case parts == maxFormParts:
			return callFields{}, formError(fmt.Sprintf("it has more than %d parts", maxFormParts))
		}
		part, ok := bytes.CutSuffix(rest[2:max(i, 2)], []byte("\r\n"))
		if !ok {
			return callFields{}, formError("a boundary is not on a line of its own")
		}
		if err := f.addPart(part, &seen, len(body)-len(rest)+2); err != nil {
			return callFields{}, err
		}
		rest = rest[i+len(delimiter):]
	}
}

func formError(what string) *bodyError {
	return &bodyError{"", "The request body is not a valid multipart form: " + what + "."}
}

// formBoundary returns the boundary that a Content-Type names.
func formBoundary(contentType string) (string, error) {
	kind, params, ok := headerParams(contentType)
	boundary := params["boundary"]
	delete(params, "boundary")
	charset, hasCharset := params["charset"]
	delete(params, "charset")
	switch {
	case !ok || !strings.EqualFold(kind, "multipart/form-data") || len(params) > 0:
		return "", &bodyError{"", "The Content-Type must be multipart/form-data with a boundary and nothing else."}
	case hasCharset && !isUTF8(charset):
		return "", &bodyError{"", "The charset of a multipart form must be utf-8."}
	case boundary == "" || len(boundary) > maxBoundaryLen || !isAlphanumericOr(boundary, "'()+_,-./:=?"):
		return "", &bodyError{"", fmt.Sprintf("The multipart boundary must be 1 to %d letters, digits or "+
			"'()+_,-./:=? characters.", maxBoundaryLen)}
	}
	return boundary, nil
}

// addPart reads one part, headers and value, that starts at offset in the body. seen has a bit per protected name.
func (f *callFields) addPart(part []byte, seen *uint, offset int) error {
	head, value, ok := bytes.Cut(part, []byte("\r\n\r\n"))
	if !ok || len(head) > maxPartHeader {
		return formError(fmt.Sprintf("a part has no headers, or more than %d bytes of them", maxPartHeader))
	}
	headers, err := partHeaders(head)
	if err != nil {
		return err
	}
	kind, params, ok := headerParams(headers["content-disposition"])
	if !ok && strings.Contains(strings.ToLower(headers["content-disposition"]), "filename") {
		return formError("a Content-Disposition has several readings: a file's name may have no quote, no backslash " +
			"at its end, and no semicolon before name= or filename=")
	}
	name, file := params["name"], false
	for key := range params {
		switch key {
		case "name":
		case "filename", "filename*":
			file = true
		default: // above all name*, which some parsers prefer
			return formError("a Content-Disposition has a parameter other than name and filename")
		}
	}
	// Parsers differ in how they read a quoted name with a blank or an escape.
	if !ok || kind != "form-data" || name == "" || len(name) > 128 || !isAlphanumericOr(name, "_-[]") {
		return formError("a part lacks the header Content-Disposition: form-data with a plain name")
	}
	if name == "_charset_" {
		return formError("a _charset_ field would change how other fields are read")
	}
	if length, ok := headers["content-length"]; ok && length != strconv.Itoa(len(value)) {
		return formError("a part has a wrong Content-Length")
	}
	switch strings.ToLower(headers["content-transfer-encoding"]) {
	case "", "7bit", "8bit", "binary":
	default:
		return formError("a part has a Content-Transfer-Encoding other than 7bit, 8bit or binary")
	}
	// With a Content-Length, a replaced model would make the header wrong.
	if _, hasLength := headers["content-length"]; name == "model" && !hasLength {
		f.modelSplice = splice{offset + len(head) + 4, offset + len(part), "form"}
	}
	return f.addField(name, value, file, headers["content-type"], seen)
}

// addField stores one named part if its name is protected.
func (f *callFields) addField(name string, value []byte, file bool, contentType string, seen *uint) error {
	base, _, list := strings.Cut(name, "[") // some parsers read model[] as model
	i, exact := protectedName([]byte(base))
	if i < 0 {
		if field := f.identity.field([]byte(name)); field != nil && !file && len(value) <= maxIdentityLen {
			*field = string(value)
		}
		return nil
	}
	kind, params, ok := headerParams(contentType)
	charset := strings.ToLower(params["charset"])
	delete(params, "charset")
	switch {
	case !exact || list:
		return &bodyError{protectedNames[i],
			fmt.Sprintf("Ambiguous field name %q: it must be spelled %q.", name, protectedNames[i])}
	case *seen>>i&1 == 1:
		return &bodyError{name, fmt.Sprintf("Duplicate field %q: it may occur once only.", name)}
	case file:
		return &bodyError{name, fmt.Sprintf("Invalid field %q: it must be text, not a file.", name)}
	case contentType != "" && (!ok || !strings.EqualFold(kind, "text/plain") || len(params) > 0),
		!isUTF8(charset) && !slices.Contains([]string{"", "us-ascii", "iso-8859-1"}, charset):
		return &bodyError{name, fmt.Sprintf("Invalid field %q: its Content-Type must be text/plain.", name)}
	}
	*seen |= 1 << i
	return f.setText(name, value)
}

// setText stores a protected field's text. It accepts only ASCII, on which all permitted charsets agree.
func (f *callFields) setText(name string, value []byte) error {
	printable := func(r rune) bool { return r >= 0x20 && r < 0x7f }
	if len(value) > maxModelLen || len(bytes.TrimFunc(value, printable)) > 0 {
		return &bodyError{name,
			fmt.Sprintf("Invalid field %q: it must be at most %d plain ASCII characters.", name, maxModelLen)}
	}
	var err *bodyError
	switch text := string(value); {
	case name == "model":
		err = f.setModel(value)
	case name == "stream" && text != "true" && text != "false":
		err = &bodyError{name, "Invalid value for 'stream': it must be true or false."}
	case (name == "n" || name == "best_of" || strings.HasPrefix(name, "max_")) &&
		strings.Trim(text, "0123456789") != "": // "4_0" is 40 to Python
		err = &bodyError{name, fmt.Sprintf("Invalid value for %q: it must be an integer.", name)}
	case text != "": // an empty field is an absent one
		err = f.setField(name, value)
	}
	if err != nil {
		return err
	}
	return nil
}

// partHeaders returns the headers of one part by lower-case name. It accepts only the four that clients send:
// another one might be Content-Encoding, which some parsers obey.
func partHeaders(head []byte) (map[string]string, error) {
	headers := make(map[string]string, 4)
	for line := range strings.SplitSeq(string(head), "\r\n") {
		name, value, ok := strings.Cut(line, ":")
		name = strings.ToLower(name)
		known := name == "content-disposition" || name == "content-type" ||
			name == "content-transfer-encoding" || name == "content-length"
		// A control character here is a NUL, or a bare CR or LF, which some parsers treat as a line end.
		control := strings.ContainsFunc(value, func(r rune) bool { return r < 0x20 && r != '\t' || r == 0x7f })
		if _, repeated := headers[name]; !ok || !known || repeated || control {
			return nil, formError("a part has a malformed, unknown or repeated header")
		}
		headers[name] = strings.Trim(value, " \t")
	}
	return headers, nil
}

// headerParams splits `kind; name=token; name="text"` and returns the names in lower case. It refuses what parsers
// split in different ways: repeated names, and quotes, backslashes and semicolons inside quoted text. See hasOneReading
// for a file's name.
func headerParams(s string) (kind string, params map[string]string, ok bool) {
	kind, rest, more := strings.Cut(s, ";")
	kind, params = strings.Trim(kind, " \t"), make(map[string]string, 2)
	for more {
		var key, value string
		key, rest, ok = strings.Cut(rest, "=")
		key = strings.ToLower(strings.Trim(key, " \t"))
		if _, repeated := params[key]; !ok || repeated || !isHeaderToken(key) {
			return "", nil, false
		}
		if quoted, found := strings.CutPrefix(rest, `"`); found {
			value, rest, ok = strings.Cut(quoted, `"`)
			if !ok || !hasOneReading(key, value) {
				return "", nil, false
			}
			var gap string
			if gap, rest, more = strings.Cut(rest, ";"); strings.Trim(gap, " \t") != "" {
				return "", nil, false
			}
		} else {
			value, rest, more = strings.Cut(rest, ";")
			if value = strings.TrimRight(value, " \t"); !isHeaderToken(value) {
				return "", nil, false
			}
		}
		params[key] = value
	}
	return kind, params, true
}

// isUTF8 reports whether a charset is UTF-8, as clients spell it.
func isUTF8(charset string) bool {
	return strings.EqualFold(charset, "utf-8") || strings.EqualFold(charset, "utf8")
}

// hasOneReading reports whether all parsers find the same parameters in and after a quoted value. Browsers escape only
// quotes and line ends of a file's name, as %22, %0D and %0A. So a backslash is itself, but \" would end the value for
// some parsers only; and a parser that splits at each semicolon finds no other parameter unless a name follows one.
func hasOneReading(key, value string) bool {
	if key != "filename" {
		return !strings.ContainsAny(value, `\;`)
	}
	for _, part := range strings.Split(value, ";")[1:] {
		word := strings.ToLower(strings.TrimSpace(part))
		if strings.HasPrefix(word, "name") || strings.HasPrefix(word, "filename") {
			return false
		}
	}
	return !strings.HasSuffix(value, `\`)
}

func isHeaderToken(s string) bool { return s != "" && isAlphanumericOr(s, "!#$%&'*+-.^_`|~") }

// isAlphanumericOr reports whether s consists of ASCII letters, digits and the bytes of extra.
func isAlphanumericOr(s, extra string) bool {
	for i := range len(s) {
		c := s[i]
		if !(c|0x20 >= 'a' && c|0x20 <= 'z' || c >= '0' && c <= '9' || strings.IndexByte(extra, c) >= 0) {
			return false
		}
	}
	return true
}

// isForm reports whether the body is a form, not JSON; any other type is an error.
func isForm(e *endpoint, contentType string) (bool, error) {
	if e.body == bodyNone || e.body == bodyRaw {
		return false, nil
	}
	if contentType == "application/json" && e.body != bodyForm { // the usual case
		return false, nil
	}
	t, params, err := mime.ParseMediaType(contentType)
	switch {
	case err == nil && t == "application/json" && e.body != bodyForm:
		// In another charset the same bytes may be another text: in UTF-7 "+AG0-odel" is "model".
		if charset, ok := params["charset"]; ok && !isUTF8(charset) {
			return false, errCharset
		}
		return false, nil
	case err == nil && t == "multipart/form-data" && e.body != bodyJSON:
		return true, nil
	}
	want := "application/json"
	if e.body == bodyForm {
		want = "multipart/form-data"
	}
	return false, errContentType(want)
}

// billedFields are fields on which prices depend. Each may occur in any number and spelling: the dearest counts.
type billedFields struct {
	characters    int64                 // of input, if it is a string
	tiers         [numServiceTiers]bool // that service_tier asks for
	fast          bool                  // speed asks for fast answers
	size, quality string                // of pictures
	tools         [numBilledTools]bool  // that tools names
	// Of tools: a web search that is no preview, and a container that may have another size than the usual one.
	plainSearch, sizedContainer bool
}

// A billedTool is a tool that providers bill by the call.
type billedTool uint8

const (
	toolWebSearch billedTool = iota
	toolFileSearch
	toolCodeInterpreter
	toolImageGeneration
	toolLiveSearch // of xAI, which is no element of tools
	toolUncounted  // of Google: searches that answers do not count
	numBilledTools
)

var billedToolNames = [toolLiveSearch]string{"web_search", "file_search", "code_interpreter", "image_generation"}

// isBilledField reports whether billedFields have a field of this name.
func isBilledField(name []byte) bool {
	switch len(name) {
	case 4, 5, 7, 12, 17, 18:
		for _, n := range [...]string{"size", "input", "speed", "tools", "quality", "service_tier",
			"web_search_options", "search_parameters"} {
			if len(n) == len(name) && strings.EqualFold(string(name), n) {
				return true
			}
		}
	}
	return false
}

// set stores the value of a field, as sent.
func (f *billedFields) set(name, raw []byte) {
	is := func(n string) bool { return strings.EqualFold(string(name), n) }
	text := bytes.Trim(raw, `"`)
	switch {
	case is("input"):
		if raw[0] == '"' {
			f.characters = max(f.characters, countCharacters(raw[1:len(raw)-1]))
		}
	case is("service_tier"):
		tier := serviceTierOf(text)
		if string(text) == "auto" {
			tier = tierPriority // if the project's default at the provider is that
		}
		f.tiers[tier] = true
	case is("speed"):
		f.fast = f.fast || inferenceSpeedOf(text) != speedStandard
	case is("size") && len(text) <= maxPictureField:
		f.size = string(text)
	case is("quality") && len(text) <= maxPictureField:
		f.quality = string(text)
	case is("tools"):
		raw = unescapeASCII(raw)
		for tool, n := range billedToolNames {
			f.tools[tool] = f.tools[tool] || bytes.Contains(raw, []byte(n))
		}
		f.plainSearch = bytes.Count(raw, []byte("web_search")) > bytes.Count(raw, []byte("web_search_preview"))
		f.sizedContainer = bytes.Contains(raw, []byte("memory_limit")) || bytes.Contains(raw, []byte("cntr_"))
	case is("search_parameters"):
		f.tools[toolLiveSearch] = string(raw) != "null"
	case is("web_search_options"):
		f.tools[toolWebSearch] = f.tools[toolWebSearch] || string(raw) != "null"
	}
}

// unescapeASCII returns JSON text without the escapes of ASCII characters, so that no name can hide:
// "web\u005fsearch" is web_search. The result is for searching only. It is text itself, unless there are such escapes.
func unescapeASCII(text []byte) []byte {
	if !bytes.Contains(text, []byte(`\u00`)) {
		return text
	}
	out := make([]byte, 0, len(text))
	for i := 0; i < len(text); i++ {
		if c := text[i:]; len(c) >= 6 && string(c[:4]) == `\u00` && c[4] >= '2' && c[4] <= '7' {
			if b, err := strconv.ParseUint(string(c[4:6]), 16, 8); err == nil {
				out = append(out, byte(b))
				i += 5
				continue
			}
		}
		out = append(out, text[i])
	}
	return out
}

// countCharacters counts the characters of the inside of a JSON string. An escape is one, and so is a pair of
// surrogates.
func countCharacters(text []byte) (n int64) {
	for {
		i := bytes.IndexByte(text, '\\')
		if i < 0 {
			return n + int64(utf8.RuneCount(text))
		}
		n += int64(utf8.RuneCount(text[:i])) + 1
		size := 2
		if escape := text[i:]; len(escape) > 5 && escape[1] == 'u' {
			if size = 6; escape[2]|0x20 == 'd' && escape[3] >= '8' && escape[3]|0x20 <= 'b' {
				size = 12 // the other half follows, or the body is refused
			}
		}
		text = text[min(i+size, len(text)):]
	}
}

const maxPictureField = 32 // bytes of a size or quality

// dearestTier returns the dearest service tier that the request asks for.
func (f *billedFields) dearestTier() serviceTier {
	for _, tier := range [...]serviceTier{tierOther, tierUltrafast, tierPriority} {
		if f.tiers[tier] {
			return tier
		}
	}
	return tierStandard
}

// pictureTokens returns how many tokens one picture has at most, by its quality and size.
func (f *billedFields) pictureTokens() int64 {
	tokens := int64(maxPictureTokens)
	switch f.quality {
	case "low":
		tokens = lowPictureTokens
	case "medium":
		tokens = mediumPictureTokens
	}
	width, height, _ := strings.Cut(f.size, "x")
	w, errW := strconv.ParseInt(width, 10, 32)
	h, errH := strconv.ParseInt(height, 10, 32)
	if area := w * h; errW == nil && errH == nil && area > 1024*1536 {
		tokens = tokens * (area/(1024*1536) + 1)
	}
	return tokens
}

// A geminiField is a field of Gemini's API that the proxy reads. The API takes each in camelCase and in snake_case.
type geminiField uint8

const (
	geminiOther geminiField = iota
	geminiModel
	geminiConfig   // generationConfig
	geminiMaximum  // maxOutputTokens
	geminiCount    // candidateCount
	geminiCached   // cachedContent, a stored context
	geminiFile     // fileData, which may be a stored file
	geminiSearch   // fileSearch, a tool that reads a store of files
	geminiRequest  // generateContentRequest, in countTokens
	geminiRequests // in batchEmbedContents
	geminiData     // JSON of the client's tools and schemas, in which no name has a meaning
)

// geminiNames are the fields in camelCase.
var geminiNames = [...]struct {
	name  string
	field geminiField
}{
	{"model", geminiModel}, {"generationConfig", geminiConfig}, {"maxOutputTokens", geminiMaximum},
	{"candidateCount", geminiCount}, {"cachedContent", geminiCached}, {"fileData", geminiFile},
	{"fileSearch", geminiSearch}, {"generateContentRequest", geminiRequest}, {"requests", geminiRequests},
	{"args", geminiData}, {"response", geminiData}, {"parameters", geminiData}, {"parametersJsonSchema", geminiData},
	{"responseSchema", geminiData}, {"responseJsonSchema", geminiData},
}

// geminiFieldOf returns the field that a name means to any parser, and its name in camelCase. exact: the name is in one
// of the two spellings that the API takes.
func geminiFieldOf(key []byte) (field geminiField, name string, exact bool) {
	if len(key) > maxProtectedNameLen {
		return geminiOther, "", false
	}
	folded := string(bytes.ReplaceAll(key, []byte{'_'}, nil))
	for _, known := range geminiNames {
		if strings.EqualFold(folded, known.name) {
			return known.field, known.name, string(key) == known.name || string(key) == snakeCase(known.name)
		}
	}
	return geminiOther, "", false
}

// snakeCase returns a camelCase name in snake_case.
func snakeCase(name string) string {
	out := make([]byte, 0, len(name)+4)
	for _, c := range []byte(name) {
		if c >= 'A' && c <= 'Z' {
			out = append(out, '_')
			c |= 0x20
		}
		out = append(out, c)
	}
	return string(out)
}

// scanGemini is scanJSON for a body of Gemini's API, whose path names model. Every place where the body may name a
// model must name this one.
func scanGemini(body []byte, model string) (callFields, error) {
	f, s := callFields{n: 1}, bodyScanner{b: body}
	if s.beginBody() {
		s.readGemini(&f, func(raw []byte, _ int) {
			if name, ok := geminiModelName(raw); !ok || name != model {
				s.fail("model", "The field 'model' must name the model in the path, or be left out.")
			}
		})
	}
	f, err := s.endBody(f)
	f.model = model
	f.setGeminiBilled(unescapeASCII(body))
	return f, err
}

// setGeminiBilled sets what a body of Gemini's API may ask for that has a price of its own.
func (f *billedFields) setGeminiBilled(body []byte) {
	for _, tool := range [...]string{"googleMaps", "google_maps", "enterpriseWebSearch", "enterprise_web_search"} {
		f.tools[toolUncounted] = f.tools[toolUncounted] || bytes.Contains(body, []byte(tool))
	}
	f.tools[toolWebSearch] = f.tools[toolUncounted] || bytes.Contains(body, []byte("googleSearch")) ||
		bytes.Contains(body, []byte("google_search"))
	f.tiers[tierOther] = bytes.Contains(body, []byte("serviceTier")) || bytes.Contains(body, []byte("service_tier"))
}

// withGeminiModel returns a body that scanGemini has accepted with another model in each place that names one.
func withGeminiModel(body []byte, model string) []byte {
	name := mustMarshal("models/" + model)
	var out []byte
	from := 0
	s := bodyScanner{b: body}
	if s.beginBody() {
		s.readGemini(&callFields{}, func(raw []byte, end int) {
			out = append(append(out, body[from:end-len(raw)]...), name...)
			from = end
		})
	}
	return append(out, body[from:]...)
}

// geminiModelName returns the model that a JSON value names: "models/gemini-2.5-pro", or only the last part.
func geminiModelName(raw []byte) (name string, ok bool) {
	if len(raw) < 2 || raw[0] != '"' || bytes.IndexByte(raw, '\\') >= 0 {
		return "", false
	}
	return strings.TrimPrefix(string(raw[1:len(raw)-1]), "models/"), true
}

// readGemini reads a request of Gemini's API, or one that is in another. onModel gets each value that names a model,
// and where it ends. A field that the proxy reads may occur once in an object, in one of its two spellings.
func (s *bodyScanner) readGemini(f *callFields, onModel func(raw []byte, end int)) {
	var seen uint
	for more := s.enter('}'); more; more = s.next('}') {
		name, _, _ := bytes.Cut(s.b[min(s.i+1, len(s.b)):], []byte{'"'}) // as sent
		field := s.readGeminiKey(&seen)
		from := s.i
		switch {
		case field == geminiModel:
			if raw := s.readValue(); s.err == nil {
				onModel(raw, s.i)
			}
		case field == geminiConfig && s.startsWith('{'):
			s.readGeminiConfig(f)
		case field == geminiRequest && s.startsWith('{'):
			s.readGemini(f, onModel)
		case field == geminiRequests && s.startsWith('['):
			for more := s.enter(']'); more; more = s.next(']') {
				if s.startsWith('{') {
					s.readGemini(f, onModel)
				} else {
					s.skipValue()
				}
			}
		case field == geminiConfig || field == geminiRequest || field == geminiRequests:
			if raw := s.readValue(); s.err == nil && string(raw) != "null" {
				s.fail("", "A field of the request has the wrong type: generationConfig and generateContentRequest "+
					"are objects, requests is a list.")
			}
		default:
			s.walkGemini(f, field)
		}
		if s.depth == 1 {
			f.prompt.add(name, from, s.i)
		}
	}
}

// readGeminiKey reads a name, and refuses one that another parser could read as a field it is not.
func (s *bodyScanner) readGeminiKey(seen *uint) geminiField {
	key := s.readDecodedKey()
	field, name, exact := geminiFieldOf(key)
	if field == geminiOther || field == geminiData {
		return field
	}
	switch {
	case !exact:
		s.fail(name, fmt.Sprintf("Ambiguous field name %q: it must be spelled %q.", key, name))
	case *seen>>field&1 == 1:
		s.fail(name, fmt.Sprintf("Duplicate field %q: it may occur once only, in one spelling.", name))
	}
	*seen |= 1 << field
	return field
}

// readGeminiConfig reads a generationConfig.
func (s *bodyScanner) readGeminiConfig(f *callFields) {
	var seen uint
	for more := s.enter('}'); more; more = s.next('}') {
		field := s.readGeminiKey(&seen)
		if field != geminiMaximum && field != geminiCount {
			s.walkGemini(f, field)
			continue
		}
		raw := s.readValue()
		if s.err != nil {
			return
		}
		count, ok := parseWholeNumber(raw)
		switch {
		case !ok:
			s.fail("generationConfig", "maxOutputTokens and candidateCount must be whole numbers.")
		case field == geminiMaximum:
			f.maxOutputTokens = count
		default:
			f.n = max(f.n, count)
		}
	}
}

// walkGemini reads a value of which only references to objects at the provider matter. field is its name's.
func (s *bodyScanner) walkGemini(f *callFields, field geminiField) {
	switch {
	case field == geminiCached || field == geminiFile || field == geminiSearch:
		if raw := s.readValue(); string(raw) != "null" {
			f.setStateful([...]string{"cachedContent", "fileData", "fileSearch"}[field-geminiCached])
		}
	case field != geminiData && s.startsWith('{'):
		for more := s.enter('}'); more; more = s.next('}') {
			inner, _, _ := geminiFieldOf(s.readDecodedKey())
			s.walkGemini(f, inner)
		}
	case field != geminiData && s.startsWith('['):
		for more := s.enter(']'); more; more = s.next(']') {
			s.walkGemini(f, geminiOther)
		}
	default:
		s.skipValue()
	}
}

// startsWith reports whether the next value begins with c.
func (s *bodyScanner) startsWith(c byte) bool { return s.i < len(s.b) && s.b[s.i] == c }

// asClientError turns an error about the request itself into a 400.
func asClientError(err error) error {
	if e, ok := errors.AsType[*bodyError](err); ok {
		return badRequest("invalid_request", e.param, e.msg)
	}
	return asAPIError(err)
}

// rejectBody refuses a body that the endpoint would silently ignore. Some clients send an empty object.
func rejectBody(body io.Reader) error {
	const maxLen = 16
	b, err := io.ReadAll(io.LimitReader(body, maxLen))
	if text := strings.TrimSpace(string(b)); err != nil || len(b) == maxLen || text != "" && text != "{}" {
		return errUnexpectedBody
	}
	return nil
}
