// This file is the skeleton of every form of /admin: a GET shows it, a POST decodes it into the
// input of an operation, runs the operation, and either redirects or shows the mistake beside its
// field, in the words of the form. What a field may hold is decided by the operations; a field has the
// JSON name that they use.
package main

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A pageForm is the data of the template "form".
type pageForm struct {
	Action, Submit, Cancel string
	Danger                 bool
	Problem                string // with the form as a whole
	Mistakes               []formMistake
	Restored               bool   // it has the input of a session that had ended
	Version                int64  // of the object that it changes; 0: none
	Creates                string // "token", "key" or "value": a secret that is shown once; "" otherwise
	Once                   string // names this copy of a form that creates a secret: it is carried out once
	Hidden                 []labeledValue
	Fields                 []*formField
	Folded, FoldedAbout    string // the title of fields that are folded away, and what they are about; "": none
	FoldedOpen             bool   // they are shown at once
	HasAdvanced, IsOpen    bool   // it has advanced fields; they are shown at once
	Advanced               string // what these are about
}

// A formField is one input with its label. Kind is text, password, number, lines (a list, one entry per
// line), pairs (a map, one "key = value" per line), json, select, checkbox or datetime-local.
type formField struct {
	Name, Label, Kind, Value, Placeholder, Error string

	Help                     string // names a text of templates/parts/help.html
	Options                  []option
	Required, Checked, Short bool
	Advanced, Folded         bool   // it is hidden until someone opens the advanced fields, or the folded ones
	Default                  string // the value, besides an empty one, with which they stay closed
	Note                     string // is shown below the field
	Heading, HeadingHelp     string // of the fields that begin with it, and the name of a text about them
	Focus                    bool   // it is the first with an error
	Empty                    emptyField
	stored                   string
}

// isDefault reports whether the field has nothing that someone who opens the form has to see.
func (field *formField) isDefault() bool {
	switch {
	case field.Error != "":
		return false
	case field.Kind == "checkbox":
		return !field.Checked
	case field.Kind == "select" && field.Default == "" && len(field.Options) > 0:
		return field.Value == "" || field.Value == field.Options[0].Value
	}
	return strings.TrimSpace(field.Value) == "" || field.Value == field.Default
}

// setAdvanced puts the named fields of a form among the advanced ones.
func (f *pageForm) setAdvanced(about string, names ...string) {
	f.Advanced = about
	for _, field := range f.Fields {
		field.Advanced = field.Advanced || slices.Contains(names, field.Name)
	}
}

// enterAgain is the note of a password that was sent.
const enterAgain = "Enter it again: it does not come back to the browser."

// openAdvanced opens the advanced fields if one of them is not as it is by default, or has a mistake, and the folded
// ones if one of them was sent, or has a mistake.
func (v *formView) openAdvanced() {
	f := v.Form
	fields := f.Fields
	if v.Policy != nil {
		fields = slices.Concat(fields, v.Policy.fields())
	}
	for _, field := range fields {
		f.HasAdvanced = f.HasAdvanced || field.Advanced
		f.IsOpen = f.IsOpen || field.Advanced && !field.isDefault()
		f.FoldedOpen = f.FoldedOpen || field.Folded && (field.Error != "" || field.Note == enterAgain)
	}
}

// formFields returns the form fields of the named fields of an input, in this order.
func formFields[I, R any](fields []field[I, R], names ...string) []*formField {
	var form []*formField
	for _, name := range names {
		f := fields[slices.IndexFunc(fields, func(f field[I, R]) bool { return f.name == name })]
		form = append(form, &formField{Name: name, Label: f.label, Kind: f.kind, Placeholder: f.placeholder,
			Help: f.help, Required: f.required, Empty: f.empty, Options: fieldOptions(name),
			Short: name == "provider" || name == "overlap_minutes" || name == "role"})
	}
	return form
}

// fieldOptions returns the choices of a field that has the same on every page.
func fieldOptions(name string) []option {
	switch name {
	case "provider":
		return providerOptions()
	case "role":
		return options(string(roleViewer), "Viewer", string(roleOperator), "Operator", string(roleAdmin), "Admin")
	case "overlap_minutes":
		return options("0", "Revoke it now (leaked)", "60", "1 hour", "1440", "1 day", "10080", "7 days",
			"43200", "30 days")
	}
	return nil
}

func providerOptions() []option {
	return options(providerOpenAI, "OpenAI", providerAnthropic, "Anthropic", providerAzure, "Azure OpenAI",
		providerGoogle, "Google (Gemini)", providerCompatible, "Other, OpenAI-compatible")
}

// storedValues returns what the fields of a form start with, from an object as operations return it.
// It is the reverse of decode.
func storedValues(object any, fields []*formField) url.Values {
	stored, values := jsonFields(mustMarshal(object)), url.Values{}
	for _, field := range fields {
		if raw, ok := stored[field.Name]; ok && string(raw) != "null" {
			values.Set(field.Name, field.encode(raw))
		}
	}
	return values
}

// jsonFields returns the fields of an object, none of a new one.
func jsonFields(object json.RawMessage) map[string]json.RawMessage {
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(object, &fields); err != nil || fields == nil {
		return map[string]json.RawMessage{}
	}
	return fields
}

// encode returns a stored value as the field shows it.
func (field *formField) encode(raw json.RawMessage) string {
	var lines []string
	text := displayJSON(raw)
	switch field.Kind {
	case "lines":
		_ = json.Unmarshal(raw, &lines) // cannot fail: the operations return a list
	case "pairs":
		var pairs map[string]string
		_ = json.Unmarshal(raw, &pairs) // the same
		for _, key := range slices.Sorted(maps.Keys(pairs)) {
			lines = append(lines, key+" = "+pairs[key])
		}
	case "checkbox":
		return map[string]string{"true": "on"}[text]
	case "datetime-local":
		if t, err := time.Parse(time.RFC3339, text); err == nil {
			return timestamp(t.UnixMilli()).datetimeLocal()
		}
	case "number":
		if text == "0" && field.Empty == emptyValue {
			return ""
		}
		return text
	default:
		return text
	}
	return strings.Join(lines, "\n")
}

// A labeledValue is a value with its name.
type labeledValue struct{ Label, Value string }

// fieldID returns the HTML id of a field.
func fieldID(name string) string {
	return "f-" + strings.NewReplacer(".", "-", "[", "-", "]", "").Replace(name)
}

// fill puts in the values that were sent, otherwise those that are stored. Passwords never come back.
func (f *pageForm) fill(sent, stored url.Values) {
	values := stored
	if sent != nil {
		values = sent
	}
	for _, field := range f.Fields {
		field.stored = stored.Get(field.Name)
		switch field.Kind {
		case "password":
			if sent.Get(field.Name) != "" {
				field.Note = enterAgain
			}
		case "checkbox":
			field.Checked = values.Get(field.Name) != ""
		default:
			field.Value = strings.ReplaceAll(values.Get(field.Name), "\r\n", "\n")
		}
	}
}

// decode puts the form into the fields of an operation's input, by name. Fields that the input does not
// have are left to the page.
func (f *pageForm) decode(form url.Values, input map[string]any) {
	for _, field := range f.Fields {
		if to := input[field.Name]; to != nil {
			field.decode(strings.ToValidUTF8(form.Get(field.Name), "\ufffd"), to)
		}
	}
}

// decode puts the text of the field into an optional. Text that cannot be read is a mistake of the optional, so that
// the operation refuses it together with the mistakes of other fields.
func (field *formField) decode(text string, to any) {
	if text == "" && field.Empty == emptyOmitted {
		return
	}
	mistake := func(msg string) error { return &fieldError{field.Name, msg} }
	null := text == "" && field.Empty == emptyNull
	switch to := to.(type) {
	case *optional[string]:
		if field.Kind == "datetime-local" {
			if text != "" && text == field.stored {
				return // stays as it is, to the millisecond, even in the past
			}
			text = formTimeToRFC3339(text)
		}
		if field.Name != "name" { // a name with spaces around it is refused
			text = strings.TrimSpace(text)
		}
		*to = optional[string]{set: true, null: null, value: text}
	case *optional[timestampText]:
		*to = given(timestampText(formTimeToRFC3339(text)))
	case *optional[secret]:
		*to = given(newSecret(text))
	case *optional[bool]:
		*to = given(text != "")
	case *optional[int64]:
		n, err := strconv.ParseInt(ungroupDigits(text), 10, 64)
		*to = optional[int64]{set: true, null: null, value: n}
		if err != nil && text != "" {
			to.mistake = mistake("must be a whole number")
		}
	case *optional[[]string]:
		*to = given(splitLines(text))
	case *optional[json.RawMessage]:
		if field.Kind == "json" {
			*to = given(json.RawMessage(strings.TrimSpace(text)))
			if !json.Valid(to.value) {
				to.mistake = mistake("must be JSON such as " + field.Placeholder)
			}
			return
		}
		if field.Kind != "pairs" {
			*to = optional[json.RawMessage]{set: true, null: null, value: jsonNumber(text)}
			return
		}
		pairs := map[string]string{}
		for _, line := range splitLines(text) {
			key, value, ok := strings.Cut(line, "=")
			if !ok {
				to.set, to.mistake = true, mistake("must have lines such as "+field.Placeholder)
				return
			}
			pairs[strings.TrimSpace(key)] = strings.TrimSpace(value)
		}
		*to = given(mustMarshal(pairs))
	}
}

// A formView is the data of templates/form.html.
type formView struct {
	Crumb  option   // the page above this one: its address and title
	Crumbs []option // all pages above this one
	Intro  string   // names a text of the template, "" for none
	Form   *pageForm
	Policy *policyForm // nil: the form has none
	Likes  []option    // projects that a new one can start like
	Like   string      // the chosen one
	likes  []upstreamView
}

// submit handles a page with a form. A GET shows it with what is stored. A POST decodes it into the
// input, whose fields are given by name, and runs the operation, which returns the page that follows.
func (ui *adminUI) submit(r *pageRequest, title string, v *formView, stored url.Values, input map[string]any,
	run func() (*pageResponse, error)) (*pageResponse, error) {
	v.Form.Action, v.Crumbs = r.http.URL.Path, crumbsTo(v.Crumb)
	if like := r.query.Get("like"); like != "" {
		v.Form.Action += "?like=" + url.QueryEscape(like)
	}
	if v.Form.Creates != "" {
		v.Form.Once = randomBase62(16)
	}
	sent, isEdited := ui.sentValues(r, v, stored)
	v.Form.fill(sent, stored)
	if v.Policy != nil {
		v.Policy.fill(sent)
	}
	page := showPage("form", title, v)
	defer v.openAdvanced() // when the mistakes are known
	if r.isPost() {
		v.Form.Version = r.ifMatchVersion
	}
	if !r.isPost() || isEdited {
		return page, nil
	}
	if v.Form.Once != "" && !ui.sentForms.claim(r.form.Get("once")) {
		page.template, page.title, page.status = "sent", "Form already submitted", http.StatusConflict
		return page, nil
	}
	v.decode(r, input)
	next, err := run()
	if err == nil {
		return next, nil
	}
	page.status, err = v.Form.showErrors(err, v.Policy)
	return page, err
}

// sentValues returns the values that a form shows instead of what is stored: those of a POST, those that were sent
// before the session had ended, or those with a preset; nil if there are none. isEdited means that the POST only
// changes the form.
func (ui *adminUI) sentValues(r *pageRequest, v *formView, stored url.Values) (sent url.Values, isEdited bool) {
	if r.isPost() {
		return r.form, v.Policy != nil && v.Policy.edit(r.form)
	}
	if sent = ui.keptForms.take(r.session.hash, r.http.URL.RequestURI(), r.now); sent != nil {
		v.Form.Restored = true
		if n, err := strconv.ParseInt(sent.Get("version"), 10, 64); err == nil && v.Form.Version != 0 {
			v.Form.Version = n // a change in between is noticed
		}
		return sent, false
	}
	if r.query.Has("preset") && v.Policy != nil {
		sent = v.Policy.storedValues(v.Policy.stored)
		maps.Copy(sent, stored)
		v.Policy.applyPreset(r.query.Get("preset"), sent)
	}
	return sent, false
}

// decode puts the form into an operation's input, by name.
func (v *formView) decode(r *pageRequest, input map[string]any) {
	v.Form.decode(r.form, input)
	if to, ok := input["policy"].(*optional[json.RawMessage]); ok && v.Policy != nil {
		*to = given(v.Policy.encode(r.form))
	}
}

// A confirmView is the data of templates/confirm.html: a page that asks before it does something.
type confirmView struct {
	Ask   string // names the question
	Items []string
	Form  *pageForm
}

// confirm asks on a GET. On a POST it runs the operation and goes to then.
func (r *pageRequest) confirm(title string, v *confirmView, then *pageResponse,
	run func() error) (*pageResponse, error) {
	if !r.isPost() {
		v.Form.Action, v.Form.Danger = r.http.URL.Path, true
		return showPage("confirm", title, v), nil
	}
	if err := run(); err != nil {
		return nil, err
	}
	return then, nil
}

// splitLines returns the lines of a text area, without empty ones.
func splitLines(text string) []string {
	lines := []string{}
	for line := range strings.SplitSeq(text, "\n") {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return lines
}

// formTimeToRFC3339 converts the value of a datetime-local input. Other text is returned unchanged,
// for the operation to refuse.
func formTimeToRFC3339(text string) string {
	switch len(text) {
	case len("2006-01-02T15:04"):
		return text + ":00Z"
	case len("2006-01-02T15:04:05"):
		return text + "Z"
	}
	return text
}

// displayJSON returns a value as text: a string without its quotes.
func displayJSON(raw json.RawMessage) string {
	var text string
	if json.Unmarshal(raw, &text) == nil && len(raw) > 0 && raw[0] == '"' {
		return text
	}
	if string(raw) == "null" {
		return "–"
	}
	return string(raw)
}

// jsonNumber returns a typed number as JSON; a dollar sign and commas between thousands are allowed. Other text
// becomes a JSON string, for the operation to refuse.
func jsonNumber(text string) json.RawMessage {
	number := ungroupDigits(strings.TrimPrefix(strings.TrimSpace(text), "$"))
	if number != "" && strings.Trim(number, "0123456789.") == "" && json.Valid([]byte(number)) {
		return json.RawMessage(number)
	}
	return mustMarshal(text)
}

// A notice says what a form did, on the page that follows. It travels in a cookie, so that a reload or a
// saved address does not repeat it. Its text is in templates/parts/layout.html: the cookie only names it.
type notice struct {
	Name  string
	Count int64 // of the objects that the form changed
	Keys  []keyNotice
	tests []namedKeyTest // of the providers' keys that were entered
}

// A namedKeyTest is the test of an upstream's key.
type namedKeyTest struct {
	keyTest
	upstream string // its name, as far as the cookie has room for it
}

// maxShownTests bounds the tests in a notice, and so the size of its cookie.
const maxShownTests = 20

// A keyNotice describes the test of a key.
type keyNotice struct {
	Text  string
	Works bool
}

// describeTests fills in what the page says about the keys. One needs no name, because the form was about that key.
func (n *notice) describeTests() {
	for _, t := range n.tests {
		line := keyNotice{t.summary(), t.result == keyTestAccepted}
		if !line.Works && n.Name != "key-tested" {
			line.Text += " It was saved anyway."
		}
		if len(n.tests) > 1 {
			line.Text = t.upstream + ": " + line.Text
		}
		n.Keys = append(n.Keys, line)
	}
}

const noticeCookieSeconds = 60 // for the browser to load the page

func noticeCookieName(secure bool) string { return sessionCookieName(secure) + "-notice" }

// cookie returns the cookie with the notice. An empty notice removes it from the browser.
func (n notice) cookie(secure bool) *http.Cookie {
	c := sessionCookie(secure, n.Name)
	c.Name = noticeCookieName(secure)
	if n.Name != "" {
		c.Value, c.MaxAge = n.Name+"."+formatInt(n.Count), noticeCookieSeconds
		for _, t := range n.tests {
			c.Value += fmt.Sprintf("/%s.%d.%d.%t.%s.%s", t.result, t.status, t.models, t.more, t.code,
				base64.RawURLEncoding.EncodeToString([]byte(clip(t.upstream, 40))))
		}
	}
	return c
}

// parseKeyTest reads the test of a key from the cookie with a notice.
func parseKeyTest(text string) (t namedKeyTest, ok bool) {
	parts := strings.Split(text, ".")
	if len(parts) != 6 {
		return t, false
	}
	t.result, t.more, t.code = keyTestResult(parts[0]), parts[3] == "true", parts[4]
	name, nameErr := base64.RawURLEncoding.DecodeString(parts[5])
	var statusErr, modelsErr error
	t.status, statusErr = strconv.Atoi(parts[1])
	t.models, modelsErr = strconv.Atoi(parts[2])
	t.upstream = strings.ToValidUTF8(string(name), "")
	return t, errors.Join(statusErr, modelsErr, nameErr) == nil && slices.Contains(keyTestResults(), t.result) &&
		(t.code == "" || isCode(t.code))
}

// notice returns the notice of the request, an empty one if there is none. A page that refreshes a part of
// itself leaves it to the page that the browser loads.
func (r *pageRequest) notice() notice {
	cookies := r.http.CookiesNamed(noticeCookieName(r.secure))
	if len(cookies) == 0 || r.http.Header.Get("X-Auto-Refresh") != "" {
		return notice{}
	}
	name, rest, _ := strings.Cut(cookies[0].Value, ".")
	parts := strings.Split(rest, "/")
	n, err := strconv.ParseInt(parts[0], 10, 64)
	v := notice{Name: name, Count: n}
	if err != nil || n < 0 || len(parts) > 1+maxShownTests {
		return notice{}
	}
	for _, part := range parts[1:] {
		t, ok := parseKeyTest(part)
		if !ok {
			return notice{}
		}
		v.tests = append(v.tests, t)
	}
	v.describeTests()
	return v
}

// addRouting adds the routing of a project and its cost multiplier to the advanced fields of a form.
func (f *pageForm) addRouting(fields []field[projectInput, projectRow]) {
	routing := []*formField{
		{Name: "routing.fallbacks", Label: "Fallback models", Kind: "pairs", Help: "fallbacks",
			Placeholder: "gpt-4o* = gpt-4o-mini"},
		{Name: "routing.aliases", Label: "Aliases", Kind: "pairs", Help: "aliases",
			Placeholder: "smart = claude-opus-5-5, gpt-6-sol"},
		{Name: "routing.verified_streams", Label: "Hold streams until they are complete", Kind: "checkbox",
			Help: "verified-streams"},
		{Name: "routing.show_upstream", Label: "Show clients which upstream responded", Kind: "checkbox"},
		{Name: "routing.affinity", Label: "Keep sessions at one upstream", Kind: "select", Required: true,
			Help: "affinity", Options: options(affinityBySession, "Yes", affinityOff, "No: share single calls")},
	}
	for _, field := range append(routing, formFields(fields, "cost_multiplier")...) {
		field.Advanced = true
		if field.Name == "cost_multiplier" {
			field.Default = "1"
		}
		f.Fields = append(f.Fields, field)
	}
	f.Advanced = "fallbacks, aliases, endpoints, client addresses, content, cache, attribution, cost"
}

// routingValues returns a project's name, multiplier and routing as the values of the form.
func routingValues(p *projectView) url.Values {
	values := url.Values{"name": {p.Name}, "cost_multiplier": {p.CostMultiplier.String()}}
	routing, err := parseRouting(p.Routing)
	if err != nil {
		return values // cannot happen: it was checked when it was stored
	}
	values.Set("routing.affinity", cmp.Or(routing.Affinity, affinityBySession))
	for _, f := range routing.Fallbacks {
		values.Set("routing.fallbacks", values.Get("routing.fallbacks")+f.Model+" = "+f.To+"\n")
	}
	for _, name := range slices.Sorted(maps.Keys(routing.Aliases)) {
		models := strings.Join(routing.Aliases[name], ", ")
		values.Set("routing.aliases", values.Get("routing.aliases")+name+" = "+models+"\n")
	}
	if routing.VerifiedStreams {
		values.Set("routing.verified_streams", "on")
	}
	if routing.ShowUpstream {
		values.Set("routing.show_upstream", "on")
	}
	return values
}

// encodeRouting returns the routing that was sent. Fallbacks are a list: their order counts.
func encodeRouting(form url.Values) (to optional[json.RawMessage]) {
	fallbacks, aliases, mistakes := []map[string]string{}, map[string][]string{}, []error(nil)
	for _, line := range splitLines(form.Get("routing.fallbacks")) {
		model, to, ok := strings.Cut(line, "=")
		if !ok {
			mistakes = append(mistakes, &fieldError{"routing.fallbacks",
				"must have lines such as gpt-4o* = gpt-4o-mini"})
			break
		}
		fallbacks = append(fallbacks, map[string]string{"model": strings.TrimSpace(model), "to": strings.TrimSpace(to)})
	}
	for _, line := range splitLines(form.Get("routing.aliases")) {
		name, list, ok := strings.Cut(line, "=")
		if name = strings.TrimSpace(name); !ok || aliases[name] != nil {
			mistakes = append(mistakes, &fieldError{"routing.aliases",
				"must have lines such as fast = gpt-5-mini, and no name twice"})
			break
		}
		for model := range strings.SplitSeq(list, ",") {
			aliases[name] = append(aliases[name], strings.TrimSpace(model))
		}
	}
	routing := map[string]any{
		"fallbacks":        fallbacks,
		"aliases":          aliases,
		"verified_streams": form.Get("routing.verified_streams") != "",
		"show_upstream":    form.Get("routing.show_upstream") != "",
	}
	if affinity := form.Get("routing.affinity"); affinity != "" && affinity != affinityBySession { // the default
		routing["affinity"] = affinity
	}
	return optional[json.RawMessage]{set: true, value: mustMarshal(routing), mistake: errors.Join(mistakes...)}
}

// A formMistake is a line of the summary above a form, and the HTML id of the input that it links to.
type formMistake struct{ InputID, Text string }

// showErrors puts each mistake of err beside its field and into the summary above the form, and returns the status
// of the page. Other errors come back.
func (f *pageForm) showErrors(err error, policy *policyForm) (status int, other error) {
	for _, err := range splitMistakes(err) {
		if policy != nil && policy.showError(f, err) {
			status = max(status, http.StatusBadRequest)
			continue
		}
		s, err := f.showError(err)
		if err != nil {
			return 0, err
		}
		status = max(status, s)
	}
	f.sortMistakes(policy)
	return status, nil
}

// splitMistakes returns the mistakes that are joined in an error; the error itself if it has anything else.
func splitMistakes(err error) (mistakes []error) {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	for _, part := range joined.Unwrap() {
		for _, mistake := range splitMistakes(part) {
			if _, ok := errors.AsType[*fieldError](mistake); !ok {
				return []error{err}
			}
			mistakes = append(mistakes, mistake)
		}
	}
	return mistakes
}

// showError shows one mistake.
func (f *pageForm) showError(err error) (int, error) {
	if errors.Is(err, errTaken) {
		err = &fieldError{"name", "is already taken"}
	}
	if errors.Is(err, errStale) {
		f.Problem = "Someone else changed this while you had the form open. Open it again to see the change. " +
			"Your input is still here."
		return http.StatusConflict, nil
	}
	fe, ok := errors.AsType[*fieldError](err)
	if !ok {
		if e, ok := errors.AsType[*apiError](err); ok && e.status == http.StatusBadRequest {
			f.Problem = f.inWords(e.msg)
			return http.StatusBadRequest, nil
		}
		return 0, err
	}
	name, msg, _ := strings.Cut(fe.msg, " ") // of a mistake in an object that the form has fields for
	if !f.showFieldError(f.Fields, fe) && !f.showFieldError(f.Fields, &fieldError{name, msg}) {
		f.Problem = capitalize(f.inWords(fieldErrorMessage(fe)))
	}
	return http.StatusBadRequest, nil
}

// showFieldError shows a mistake beside its field, if that is one of fields, and reports whether it is.
func (f *pageForm) showFieldError(fields []*formField, fe *fieldError) bool {
	i := slices.IndexFunc(fields, func(field *formField) bool {
		return field.Name == fe.param || strings.HasPrefix(fe.param, field.Name+"[") // an entry of a list
	})
	if i < 0 {
		return false
	}
	field := fields[i]
	field.Error = field.Label + " " + f.inWords(strings.TrimSuffix(fe.msg, ".")) + "."
	isText := field.Kind == "" || field.Kind == "text" || field.Kind == "password"
	if isText && field.Required && field.Value == "" && field.Note == "" { // the note says that a password was sent
		field.Error = field.Label + " is required."
	}
	f.Mistakes = append(f.Mistakes, formMistake{fieldID(field.Name), field.Error})
	return true
}

// inWords replaces the words of the API in a message by those of the form: the labels of its fields, and an empty
// field for null.
func (f *pageForm) inWords(msg string) string {
	words := []string{"or null", "or empty", "not null", "not empty", "leave cache out", "leave it empty"}
	for _, field := range f.Fields {
		if strings.Contains(field.Name, "_") {
			words = append(words, field.Name, "“"+field.Label+"”")
		}
	}
	return strings.NewReplacer(words...).Replace(msg)
}
