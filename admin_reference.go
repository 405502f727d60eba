// This file serves the static files of the pages, openapi.yaml, and a page that shows that in readable form.
// It has a reader for the part of YAML that openapi.yaml uses, and refuses everything else. It reads only embedded
// files, never a request.
package main

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

//go:embed openapi.yaml
var openAPIFile []byte

// serveOpenAPI returns the handler of openapi.yaml. Clients may store the file, but ask each time whether it has
// changed.
func serveOpenAPI() http.HandlerFunc {
	sum := sha256.Sum256(openAPIFile)
	etag := `"` + hex.EncodeToString(sum[:8]) + `"`
	return func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Type", "application/yaml")
		h.Set("ETag", etag)
		h.Set("Cache-Control", "public, no-cache")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(openAPIFile))
	}
}

// referenceBody returns a function that renders the page's content, on its first call.
func referenceBody(pages *pageSet) func() ([]byte, error) {
	return sync.OnceValues(func() ([]byte, error) {
		root, err := parseYAML(string(openAPIFile))
		if err != nil {
			return nil, fmt.Errorf("reading openapi.yaml: %w", err)
		}
		v, err := newReference(root)
		if err != nil {
			return nil, fmt.Errorf("reading openapi.yaml: %w", err)
		}
		templates, err := pages.templates()
		if err != nil {
			return nil, err
		}
		var b bytes.Buffer
		if err := templates["api"].ExecuteTemplate(&b, "reference", v); err != nil {
			return nil, fmt.Errorf("the reference: %w", err)
		}
		return b.Bytes(), nil
	})
}

func (ui *adminUI) referencePage(*pageRequest) (*pageResponse, error) {
	body, err := ui.reference()
	p := showPage("api", "API reference", nil)
	p.rendered = body
	return p, err
}

// A reference is what the page shows of openapi.yaml.
type reference struct {
	Intro   []string // paragraphs
	Groups  []referenceGroup
	Objects []referenceObject
	Errors  []referenceResponse
}

// A referenceGroup has the operations with one tag, in the order of the file.
type referenceGroup struct {
	Name, Description string
	Operations        []referenceOperation
}

type referenceOperation struct {
	ID, Method, Path, Summary, Description, Role string
	BodyDescription, Curl                        string
	Parameters, Body                             []referenceField
	Responses                                    []referenceResponse // that are not in reference.Errors
	Errors                                       []referenceResponse // their names and status codes
}

// A referenceField is a parameter, or a field of an object. The name of a field within another field has both names:
// policy.limits[].count.
type referenceField struct {
	Name, In, Type, Rules, Description string
	Object                             string // the component that the type names, "" if none
	Required                           bool
}

type referenceResponse struct {
	Name, Status, Description, Type string
	Object                          string // as in referenceField
	Fields                          []referenceField
}

type referenceObject struct {
	Name, Description string
	Fields            []referenceField
}

// A referenceReader turns openapi.yaml into a reference. It keeps its first mistake.
type referenceReader struct {
	root    *yamlNode
	objects []string // the components that something refers to, in the order of reading
	err     error
}

// newReference returns the reference for openapi.yaml.
func newReference(root *yamlNode) (*reference, error) {
	r := &referenceReader{root: root}
	v := &reference{Intro: strings.Split(root.at("info", "description").text(), "\n\n")}
	for _, tag := range root.at("tags").list() {
		g := referenceGroup{Name: tag.at("name").text(), Description: tag.at("description").text()}
		v.Groups = append(v.Groups, g)
	}
	for _, path := range root.at("paths").list() {
		for _, op := range path.list() {
			tag := op.at("tags").list()[0].text()
			i := slices.IndexFunc(v.Groups, func(g referenceGroup) bool { return g.Name == tag })
			if i < 0 {
				return nil, fmt.Errorf("%s %s has an unknown tag", op.key, path.key)
			}
			v.Groups[i].Operations = append(v.Groups[i].Operations, r.operation(path.key, op))
		}
	}
	for _, res := range root.at("components", "responses").list() {
		e := referenceResponse{Name: res.key, Status: v.statusOf(res.key), Description: res.at("description").text()}
		e.Type, e.Object = r.typeOf(res.at("content", "application/json", "schema"))
		v.Errors = append(v.Errors, e)
	}
	for i := 0; i < len(r.objects); i++ { // fields refer to further objects
		schema := root.at("components", "schemas", r.objects[i])
		v.Objects = append(v.Objects, referenceObject{r.objects[i], r.description(schema), r.fields("", schema)})
	}
	slices.SortFunc(v.Objects, func(a, b referenceObject) int { return strings.Compare(a.Name, b.Name) })
	return v, r.err
}

// statusOf returns the status code that operations have for a response of the components.
func (v *reference) statusOf(response string) string {
	for _, g := range v.Groups {
		for _, op := range g.Operations {
			for _, e := range op.Errors {
				if e.Name == response {
					return e.Status
				}
			}
		}
	}
	return ""
}

func (r *referenceReader) operation(path string, op *yamlNode) referenceOperation {
	o := referenceOperation{
		ID: op.at("operationId").text(), Method: strings.ToUpper(op.key), Path: path, Summary: op.at("summary").text(),
		Description: op.at("description").text(), Role: op.at("x-role").text(),
	}
	for _, p := range op.at("parameters").list() {
		p = r.resolve(p)
		f := r.field(p.at("name").text(), p.at("schema"), p.at("required").text() == "true")
		f.In, f.Description = p.at("in").text(), r.description(p)
		o.Parameters = append(o.Parameters, f)
	}
	body := op.at("requestBody", "content", "application/json")
	o.Body, o.BodyDescription = r.fields("", body.at("schema")), r.description(body.at("schema"))
	o.Curl = r.curl(&o, op, body.at("example"))
	for _, res := range op.at("responses").list() {
		if name, ok := strings.CutPrefix(res.at("$ref").text(), "#/components/responses/"); ok {
			o.Errors = append(o.Errors, referenceResponse{Name: name, Status: res.key})
			continue
		}
		v := referenceResponse{Status: res.key, Description: res.at("description").text()}
		for _, content := range res.at("content").list() {
			schema := content.at("schema")
			f := r.field("", schema, true)
			if v.Type, v.Object = f.Type, f.Object; content.key != "application/json" {
				v.Type = content.key
			}
			if v.Object == "" {
				v.Fields = r.fields("", schema)
			}
		}
		o.Responses = append(o.Responses, v)
	}
	return o
}

// curl returns an example of an operation, for a shell with the variables URL and KEY.
func (r *referenceReader) curl(o *referenceOperation, op, example *yamlNode) string {
	url, query := o.Path, ""
	for _, p := range op.at("parameters").list() {
		p = r.resolve(p)
		name, value := p.at("name").text(), p.at("example").text()
		switch in := p.at("in").text(); {
		case in == "path":
			url = strings.Replace(url, "{"+name+"}", value, 1)
		case in == "query" && p.at("required").text() == "true":
			query += "&" + name + "=" + value
		default:
			continue
		}
		if value == "" {
			r.fail("%s: the parameter %s has no example", o.ID, name)
		}
	}
	url = "$URL" + url
	if query != "" {
		url = `"` + url + "?" + query[1:] + `"`
	}
	if o.Method != http.MethodGet {
		url = "-X " + o.Method + " " + url
	}
	if op.at("security") == nil {
		url += ` -H "Authorization: Bearer $KEY"`
	}
	switch {
	case example != nil:
		url += " -H \"Content-Type: application/json\" \\\n  -d '" + example.json() + "'"
	case o.Body != nil:
		r.fail("%s: the body has no example", o.ID)
	}
	return "curl " + url
}

// fields returns the fields of an object, with those of its parts and of objects within.
func (r *referenceReader) fields(prefix string, schema *yamlNode) (list []referenceField) {
	schema = r.resolve(schema)
	for _, part := range schema.at("allOf").list() {
		list = append(list, r.fields(prefix, part)...)
	}
	required := schema.at("required").texts()
	for _, p := range schema.at("properties").list() {
		f := r.field(prefix+p.key, p, slices.Contains(required, p.key))
		list = append(list, f)
		if f.Object != "" {
			continue
		}
		list = append(list, r.fields(f.Name+".", p)...)
		list = append(list, r.fields(f.Name+"[].", p.at("items"))...)
	}
	return list
}

// field describes a value: its type in words, the object that it refers to, and what it may be.
func (r *referenceReader) field(name string, schema *yamlNode, required bool) referenceField {
	f := referenceField{Name: name, Required: required, Description: r.description(schema)}
	f.Type, f.Object = r.typeOf(schema)
	if schema = r.resolve(schema); f.Object == "" {
		f.Description = strings.TrimSpace(f.Description + " " + r.description(schema.at("items")))
	}
	var rules []string
	if values := schema.at("enum").texts(); values != nil {
		rules = append(rules, strings.Join(values, ", "))
	}
	for _, rule := range [...][2]string{{"const", "always %s"}, {"minimum", "at least %s"}, {"maximum", "at most %s"},
		{"minLength", "at least %s characters"}, {"maxLength", "at most %s characters"},
		{"maxItems", "at most %s entries"}, {"maxProperties", "at most %s entries"}, {"default", "default: %s"}} {
		switch v := schema.at(rule[0]); {
		case v == nil:
		case rule[0] == "minLength" && v.text() == "1":
			rules = append(rules, "not empty")
		default:
			rules = append(rules, fmt.Sprintf(rule[1], strings.TrimSpace(v.text())))
		}
	}
	f.Rules = strings.Join(rules, "; ")
	return f
}

// typeOf returns the type of a value in words, and the name of the component that it refers to, "" if none.
func (r *referenceReader) typeOf(schema *yamlNode) (words, object string) {
	if name, ok := strings.CutPrefix(schema.at("$ref").text(), "#/components/schemas/"); ok {
		target := r.resolve(schema)
		if target.at("properties") == nil && target.at("allOf") == nil {
			return r.typeOf(target)
		}
		if !slices.Contains(r.objects, name) {
			r.objects = append(r.objects, name)
		}
		return name, name
	}
	var types []string
	for _, t := range schema.at("type").texts() {
		if t == "string" && schema.at("format").text() == "date-time" {
			t = "time"
		}
		if items := schema.at("items"); t == "array" && items != nil {
			t, object = r.typeOf(items)
			t = "list of " + t
		} else if extra := schema.at("additionalProperties"); t == "object" && extra.list() != nil {
			t, object = r.typeOf(extra)
			t = "object of " + t
		}
		types = append(types, t)
	}
	for _, part := range schema.at("oneOf").list() {
		t, o := r.typeOf(part)
		if types = append(types, t); o != "" {
			object = o
		}
	}
	return strings.Join(types, " or "), object
}

// description returns the description of a node, or of the component that it refers to.
func (r *referenceReader) description(n *yamlNode) string {
	if own := n.at("description"); own != nil {
		return own.text()
	}
	return r.resolve(n).at("description").text()
}

// resolve follows references.
func (r *referenceReader) resolve(n *yamlNode) *yamlNode {
	for range 10 {
		ref, ok := strings.CutPrefix(n.at("$ref").text(), "#/")
		if !ok {
			return n
		}
		if n = r.root.at(strings.Split(ref, "/")...); n == nil {
			r.fail("there is nothing at %s", ref)
		}
	}
	r.fail("too many references")
	return nil
}

func (r *referenceReader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
}

// A textPart is a part of a description: text, or a name or value in `backticks`.
type textPart struct {
	Text   string
	IsCode bool
}

// textParts splits a description at its backticks.
func textParts(description string) (parts []textPart) {
	for i, text := range strings.Split(description, "`") {
		if text != "" {
			parts = append(parts, textPart{text, i%2 == 1})
		}
	}
	return parts
}

// A yamlNode is a value of a YAML document. Maps keep the order of the document.
type yamlNode struct {
	key   string      // of a member of a map
	value any         // a string, float64 or bool; nil for a map or a list
	items []*yamlNode // of a map or a list
	isMap bool
}

// at follows keys down maps. It returns nil if there is nothing.
func (n *yamlNode) at(keys ...string) *yamlNode {
	for _, key := range keys {
		if n == nil || !n.isMap {
			return nil
		}
		i := slices.IndexFunc(n.items, func(m *yamlNode) bool { return m.key == key })
		if i < 0 {
			return nil
		}
		n = n.items[i]
	}
	return n
}

// list returns the members of a map or a list; nil if there are none.
func (n *yamlNode) list() []*yamlNode {
	if n == nil {
		return nil
	}
	return n.items
}

// text returns a scalar as text, "" for anything else.
func (n *yamlNode) text() string {
	if n == nil || n.value == nil {
		return ""
	}
	if f, ok := n.value.(float64); ok {
		return strconv.FormatFloat(f, 'f', -1, 64)
	}
	return fmt.Sprint(n.value)
}

// texts returns a list of scalars, or a single one, as texts.
func (n *yamlNode) texts() (out []string) {
	if text := n.text(); text != "" {
		return []string{text}
	}
	for _, item := range n.list() {
		out = append(out, item.text())
	}
	return out
}

// json returns the value as JSON.
func (n *yamlNode) json() string {
	if n.value != nil {
		b, _ := json.Marshal(n.value) // a scalar: it cannot fail
		return string(b)
	}
	var parts []string
	for _, item := range n.items {
		if n.isMap {
			parts = append(parts, strconv.Quote(item.key)+":"+item.json())
		} else {
			parts = append(parts, item.json())
		}
	}
	if n.isMap {
		return "{" + strings.Join(parts, ",") + "}"
	}
	return "[" + strings.Join(parts, ",") + "]"
}

type yamlLine struct {
	number, indent int
	text           string
}

// A yamlReader has the lines that are still to be read.
type yamlReader struct{ lines []yamlLine }

func (r *yamlReader) fail(format string, args ...any) error {
	number := 0
	if len(r.lines) > 0 {
		number = r.lines[0].number
	}
	return fmt.Errorf("line %d: %s", number, fmt.Sprintf(format, args...))
}

// parseYAML reads block maps and lists, [a, b] lists, and plain and "quoted" scalars on one line. It refuses the rest
// of YAML, and whatever two readers could read in two ways.
func parseYAML(text string) (*yamlNode, error) {
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
	n, err := r.block(0)
	if err == nil && len(r.lines) > 0 {
		err = r.fail("wrong indent")
	}
	return n, err
}

// block reads the map or list whose lines have this indent.
func (r *yamlReader) block(indent int) (*yamlNode, error) {
	if len(r.lines) == 0 || r.lines[0].indent != indent {
		return nil, r.fail("a block of indent %d is missing", indent)
	}
	if strings.HasPrefix(r.lines[0].text, "- ") {
		return r.list(indent)
	}
	out := &yamlNode{isMap: true}
	for len(r.lines) > 0 && r.lines[0].indent == indent {
		key, rest, err := r.key(r.lines[0].text)
		if err != nil {
			return nil, err
		}
		if out.at(key) != nil {
			return nil, r.fail("%s is given twice", key)
		}
		var member *yamlNode
		if rest != "" {
			member, err = r.scalar(rest)
			r.lines = r.lines[1:]
		} else {
			r.lines = r.lines[1:]
			member, err = r.block(indent + 2)
		}
		if err != nil {
			return nil, err
		}
		member.key = key
		out.items = append(out.items, member)
	}
	return out, nil
}

func (r *yamlReader) list(indent int) (*yamlNode, error) {
	out := &yamlNode{}
	for len(r.lines) > 0 && r.lines[0].indent == indent {
		item, ok := strings.CutPrefix(r.lines[0].text, "- ")
		if !ok {
			return nil, r.fail("an item of a list starts with - ")
		}
		var n *yamlNode
		var err error
		if _, _, isMap := r.key(item); isMap == nil {
			r.lines[0].indent, r.lines[0].text = indent+2, item
			n, err = r.block(indent + 2)
		} else {
			n, err = r.scalar(item)
			r.lines = r.lines[1:]
		}
		if err != nil {
			return nil, err
		}
		out.items = append(out.items, n)
	}
	return out, nil
}

// plainKeyCharacters are those of keys without quotes.
const plainKeyCharacters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-$/{}."

// key splits `key: rest` or `key:`.
func (r *yamlReader) key(text string) (key, rest string, err error) {
	if text[0] == '"' {
		quoted, err := strconv.QuotedPrefix(text)
		if err != nil {
			return "", "", r.fail("invalid quotes")
		}
		key, rest = quoted[1:len(quoted)-1], text[len(quoted):]
	} else {
		i := strings.IndexByte(text, ':')
		if i < 1 || strings.Trim(text[:i], plainKeyCharacters) != "" || text[0] == '{' || text[0] == '-' {
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

func (r *yamlReader) scalar(text string) (*yamlNode, error) {
	switch text[0] {
	case '"':
		var s string
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			return nil, r.fail("%v", err)
		}
		return &yamlNode{value: s}, nil
	case '[':
		return r.flowList(text)
	}
	switch strings.ToLower(text) {
	case "true", "false":
		return &yamlNode{value: text == "true"}, nil
	case "yes", "no", "on", "off", "y", "n", "null", "~": // some readers take them for something else
		return nil, r.fail("quote %q", text)
	}
	if n, err := strconv.ParseFloat(text, 64); err == nil {
		return &yamlNode{value: n}, nil
	}
	if strings.ContainsAny(text[:1], "&*!|>%@`'{}],?:-#") || strings.Contains(text, ": ") ||
		strings.Contains(text, " #") || strings.HasSuffix(text, ":") {
		return nil, r.fail("quote %q", text)
	}
	return &yamlNode{value: text}, nil
}

// flowList reads [a, b].
func (r *yamlReader) flowList(text string) (*yamlNode, error) {
	out := &yamlNode{}
	if text == "[]" {
		return out, nil
	}
	inner, ok := strings.CutSuffix(text[1:], "]")
	if !ok || inner == "" {
		return nil, r.fail("invalid list")
	}
	for part := range strings.SplitSeq(inner, ", ") {
		if part == "" || strings.ContainsAny(part, "[],") {
			return nil, r.fail("invalid list")
		}
		item, err := r.scalar(part)
		if err != nil {
			return nil, err
		}
		out.items = append(out.items, item)
	}
	return out, nil
}

// handleStatic serves a file by its hashed name, whose content never changes.
func (ui *adminUI) handleStatic(w http.ResponseWriter, r *http.Request) {
	f, ok := ui.pages.files[r.PathValue("name")]
	if !ok {
		ui.writeErrorPage(w, r, manageError(errNotFound))
		return
	}
	h := w.Header()
	h.Set("Content-Type", f.contentType)
	h.Set("Content-Length", strconv.Itoa(len(f.body)))
	h.Set("Cache-Control", "public, max-age=31536000, immutable")
	_, _ = w.Write(f.body)
}
