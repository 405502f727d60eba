// This file is the skeleton of every form of /admin: a GET shows it, a POST decodes it into the
// input of an operation, runs the operation, and either redirects or shows the mistake beside its
// field. What a field may hold is decided by the operations; a field has the JSON name that they
// use.
package main

import (
	"cmp"
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
}

// A formField is one input with its label. Kind is text, password, number, lines (a list, one entry per
// line), pairs (a map, one "key = value" per line), json, select, checkbox or datetime-local.
type formField struct {
	Name, Label, Kind, Value, Placeholder, Error string

	Help                     string // names a text of templates/parts/help.html
	Options                  []option
	Required, Checked, Short bool
	Advanced                 bool // it is hidden until someone opens the advanced fields
	Focus                    bool // it is the first with an error
	Empty                    emptyField
	stored                   string
}

// formFields returns the form fields of the named fields of an input, in this order.
func formFields[I, R any](fields []field[I, R], names ...string) []*formField {
	var form []*formField
	for _, name := range names {
		f := fields[slices.IndexFunc(fields, func(f field[I, R]) bool { return f.name == name })]
		form = append(form, &formField{Name: name, Label: f.label, Kind: f.kind, Placeholder: f.placeholder,
			Help: f.help, Required: f.required, Empty: f.empty, Options: fieldOptions(name),
			Short: name == "provider" || name == "overlap_minutes"})
	}
	return form
}

// fieldOptions returns the choices of a field that has the same on every page.
func fieldOptions(name string) []option {
	switch name {
	case "provider":
		return providerOptions()
	case "role":
		return options(
			string(roleViewer), "Viewer: can see everything except keys, the audit trail and settings",
			string(roleOperator), "Operator: can also create, change and revoke tokens",
			string(roleAdmin), "Admin: can do everything")
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
		case "checkbox":
			field.Checked = values.Get(field.Name) != ""
		default:
			field.Value = strings.ReplaceAll(values.Get(field.Name), "\r\n", "\n")
		}
	}
}

// decode puts the form into the fields of an operation's input, by name. Fields that the input does not
// have are left to the page. The error has the mistakes of all fields.
func (f *pageForm) decode(form url.Values, input map[string]any) error {
	var mistakes []error
	for _, field := range f.Fields {
		to := input[field.Name]
		if to == nil {
			continue
		}
		mistakes = append(mistakes, field.decode(strings.ToValidUTF8(form.Get(field.Name), "\ufffd"), to))
	}
	return errors.Join(mistakes...)
}

func (field *formField) decode(text string, to any) error {
	if text == "" && field.Empty == emptyOmitted {
		return nil
	}
	null := text == "" && field.Empty == emptyNull
	switch to := to.(type) {
	case *optional[string]:
		if field.Kind == "datetime-local" {
			if text != "" && text == field.stored {
				return nil // stays as it is, to the millisecond, even in the past
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
		n, err := strconv.ParseInt(strings.ReplaceAll(strings.TrimSpace(text), ",", ""), 10, 64)
		if err != nil && text != "" {
			return &fieldError{field.Name, "must be a whole number"}
		}
		*to = optional[int64]{set: true, null: null, value: n}
	case *optional[[]string]:
		*to = given(splitLines(text))
	case *optional[json.RawMessage]:
		if field.Kind == "json" {
			if !json.Valid([]byte(text)) {
				return &fieldError{field.Name, "must be JSON such as " + field.Placeholder}
			}
			*to = given(json.RawMessage(strings.TrimSpace(text)))
			return nil
		}
		if field.Kind != "pairs" {
			*to = optional[json.RawMessage]{set: true, null: null, value: jsonNumber(text)}
			return nil
		}
		pairs := map[string]string{}
		for _, line := range splitLines(text) {
			key, value, ok := strings.Cut(line, "=")
			if !ok {
				return &fieldError{field.Name, "must have lines such as " + field.Placeholder}
			}
			pairs[strings.TrimSpace(key)] = strings.TrimSpace(value)
		}
		*to = given(mustMarshal(pairs))
	}
	return nil
}

// mustMarshal returns the JSON of a value that cannot fail to have one.
func mustMarshal(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		return json.RawMessage("null")
	}
	return b
}

// A formView is the data of templates/form.html.
type formView struct {
	Crumb  option // the page above this one: its address and title
	Intro  string // names a text of the template, "" for none
	Form   *pageForm
	Policy *policyForm // nil: the form has none
}

// submit handles a page with a form. A GET shows it with what is stored. A POST decodes it into the
// input, whose fields are given by name, and runs the operation, which returns the page that follows.
func (ui *adminUI) submit(r *pageRequest, title string, v *formView, stored url.Values, input map[string]any,
	run func() (*pageResponse, error)) (*pageResponse, error) {
	v.Form.Action = r.http.URL.Path
	if v.Form.Creates != "" {
		v.Form.Once = randomBase62(16)
	}
	sent := r.form
	if !r.isPost() {
		if sent = ui.keptForms.take(r.session.hash, r.http.URL.Path, r.now); sent != nil {
			v.Form.Restored = true
			if n, err := strconv.ParseInt(sent.Get("version"), 10, 64); err == nil && v.Form.Version != 0 {
				v.Form.Version = n // a change in between is noticed
			}
		}
	}
	v.Form.fill(sent, stored)
	if v.Policy != nil {
		v.Policy.fill(sent)
	}
	page := showPage("form", title, v)
	if !r.isPost() {
		return page, nil
	}
	v.Form.Version = r.ifMatchVersion
	if v.Form.Once != "" && !ui.sentForms.claim(r.form.Get("once")) {
		page.template, page.title, page.status = "sent", "Form already submitted", http.StatusConflict
		return page, nil
	}
	err := v.decode(r, input)
	if err == nil {
		var next *pageResponse
		if next, err = run(); err == nil {
			return next, nil
		}
	}
	page.status, err = v.Form.showErrors(err, v.Policy)
	return page, err
}

// decode puts the form into an operation's input, by name.
func (v *formView) decode(r *pageRequest, input map[string]any) error {
	err := v.Form.decode(r.form, input)
	if to, ok := input["policy"].(*optional[json.RawMessage]); ok && v.Policy != nil {
		*to = given(v.Policy.encode(r.form))
	}
	return err
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

// jsonNumber returns a typed number as JSON; commas and a dollar sign are allowed. Other text
// becomes a JSON string, for the operation to refuse.
func jsonNumber(text string) json.RawMessage {
	number := strings.TrimPrefix(strings.ReplaceAll(strings.TrimSpace(text), ",", ""), "$")
	if number != "" && strings.Trim(number, "0123456789.") == "" && json.Valid([]byte(number)) {
		return json.RawMessage(number)
	}
	return mustMarshal(text)
}

// A policyForm is the data of the template "policy".
type policyForm struct {
	Lists            []policyListField
	Settings, Cache  []*formField // of a project's policy only
	Attribution      []*formField
	Limits           []*limitFormRow
	Metrics, Periods []option
	MaxLimits        int
	Problem          string // with the limits as a whole
	stored           json.RawMessage
}

// A policyListField is a list, and whether an empty list allows nothing instead of everything.
type policyListField struct{ List, None *formField }

// A limitFormRow is one limit. Index is part of the names of its fields, which are the names in errors.
type limitFormRow struct {
	Index, Number                    int
	Count, Max, Per, Endpoint, Model string
	ForEach, MaxValues               string
	Shadow                           bool
	Error, ErrorField                string
	Focus                            bool // it is the first input with an error
}

func (row *limitFormRow) isBlank() bool {
	return row.Max == "" && row.Endpoint == "" && row.Model == "" && row.ForEach == "" && row.MaxValues == ""
}

const blankLimitRows = 2 // for new limits

// newPolicyForm returns the form of a stored policy.
func newPolicyForm(ofProject bool, stored json.RawMessage) *policyForm {
	list := func(name, label, placeholder string) policyListField {
		return policyListField{
			&formField{Name: "policy." + name, Label: label, Kind: "lines", Placeholder: placeholder, Help: name},
			&formField{Name: "policy." + name + ".none", Kind: "checkbox",
				Label: "If the list is empty, allow none instead of all"},
		}
	}
	p := &policyForm{MaxLimits: maxLimits, stored: stored,
		Metrics: options(metricRequests.String(), "requests", metricTokens.String(), "tokens",
			metricDollars.String(), "dollars", metricConcurrent.String(), "concurrent calls"),
		Lists: []policyListField{
			list("models", "Models", "gpt-4o-mini\nclaude-*"),
			list("endpoints", "Endpoints", "/v1/chat/completions\n/v1/audio/*"),
			list("addresses", "Client addresses", "10.0.0.0/8\n2001:db8::/32"),
		}}
	p.Periods = options("", "–")
	for period := perSecond; period < perLifetime; period++ {
		p.Periods = append(p.Periods, option{period.String(), "per " + period.String()})
	}
	p.Periods = append(p.Periods, option{perLifetime.String(), "in total"})
	required := &formField{Name: "policy.attribution.required", Label: "Required", Kind: "lines",
		Placeholder: "end_user\nsession\ntag:team", Help: "attribution-required"}
	p.Attribution = []*formField{required, {Name: "policy.attribution.fixed_tags", Label: "Tags of every call",
		Kind: "pairs", Placeholder: "team = search", Help: "attribution-fixed-tags"}}
	if ofProject {
		p.Attribution = []*formField{
			{Name: "policy.attribution.tags", Label: "Tags that clients may send", Kind: "lines",
				Placeholder: "team\ntask", Help: "attribution-tags"}, required,
			{Name: "policy.attribution.end_users", Label: "End users are recorded", Kind: "select", Required: true,
				Help: "attribution-end-users", Options: options(endUsersPlain, "As clients name them",
					endUsersHashed, "By a keyed hash", endUsersOff, "Not at all")},
		}
		p.Settings = []*formField{
			{Name: "policy.stateful", Label: "Allow endpoints that store objects at the provider", Kind: "checkbox",
				Help: "stateful"},
			{Name: "policy.keep_content_days", Label: "Keep request and response content (days)", Kind: "number",
				Placeholder: "0", Help: "keep-content"},
		}
		p.Cache = []*formField{
			{Name: "policy.cache.ttl_seconds", Label: "Use an answer for (seconds)", Kind: "number",
				Placeholder: "3600", Help: "cache-ttl"},
			{Name: "policy.cache.when", Label: "Calls", Kind: "select", Required: true, Help: "cache-when",
				Options: options("deterministic", "Deterministic calls only",
					"always", "All calls that can be cached")},
			{Name: "policy.cache.scope", Label: "Answers are shared by", Kind: "select", Required: true,
				Help: "cache-scope", Options: options("project", "All tokens of the project",
					"token", "No one: each token has its own")},
			{Name: "policy.cache.endpoints", Label: "Cached endpoints", Kind: "lines", Help: "cache-endpoints",
				Placeholder: "/v1/embeddings\n/v1/chat/*"},
			{Name: "policy.cache.max_entry_bytes", Label: "Largest answer (bytes)", Kind: "number",
				Placeholder: strconv.Itoa(defaultMaxEntryBytes), Help: "cache-max-entry"},
		}
	}
	return p
}

// fields returns all fields except those of the limits.
func (p *policyForm) fields() (fields []*formField) {
	for _, l := range p.Lists {
		fields = append(fields, l.List, l.None)
	}
	return slices.Concat(fields, p.Settings, p.Cache, p.Attribution)
}

// fill puts in what was sent, otherwise the stored policy.
func (p *policyForm) fill(sent url.Values) {
	values := sent
	if sent == nil {
		values = p.storedValues()
	}
	(&pageForm{Fields: p.fields()}).fill(values, nil)
	for i := range maxLimits + blankLimitRows {
		value := func(name string) string {
			return strings.TrimSpace(values.Get(fmt.Sprintf("policy.limits[%d].%s", i, name)))
		}
		row := limitFormRow{Count: value("count"), Max: value("max"), Per: value("per"), Endpoint: value("endpoint"),
			Model: value("model"), Shadow: value("shadow") != "", ForEach: value("for_each"),
			MaxValues: value("max_values")}
		if !row.isBlank() {
			p.addRow(row)
		}
	}
	for range blankLimitRows {
		if len(p.Limits) < maxLimits {
			p.addRow(limitFormRow{Count: metricRequests.String(), Per: perMinute.String()})
		}
	}
}

func (p *policyForm) addRow(row limitFormRow) {
	row.Index, row.Number = len(p.Limits), len(p.Limits)+1
	p.Limits = append(p.Limits, &row)
}

// A policyView is a stored policy. A list that is nil allows everything, an empty one nothing.
type policyView struct {
	Models, Endpoints, Addresses *[]string
	Stateful                     bool
	KeepContentDays              int64 `json:"keep_content_days"`
	Cache                        *cachePolicy
	Attribution                  *attributionPolicy
	FixedTags                    []string `json:"-"` // of Attribution, as texts such as team=search
	Limits                       []limitJSON
}

func newPolicyView(stored json.RawMessage) (p policyView) {
	if err := json.Unmarshal(stored, &p); err != nil {
		return policyView{} // a new object; what is stored was checked
	}
	if p.Attribution != nil {
		for _, t := range p.Attribution.FixedTags {
			p.FixedTags = append(p.FixedTags, t.key+"="+t.value)
		}
	}
	return p
}

// storedValues returns the stored policy as the values of the form.
func (p *policyForm) storedValues() url.Values {
	policy := map[string]json.RawMessage{}
	for name, raw := range jsonFields(p.stored) {
		policy["policy."+name] = raw
	}
	for _, object := range [...]string{"policy.cache", "policy.attribution"} {
		for name, raw := range jsonFields(policy[object]) {
			policy[object+"."+name] = raw
		}
	}
	values := storedValues(policy, p.fields())
	for _, l := range p.Lists {
		if string(policy[l.List.Name]) == "[]" {
			values.Set(l.None.Name, "on")
		}
	}
	var limits []map[string]json.RawMessage
	_ = json.Unmarshal(policy["policy.limits"], &limits) // there may be none
	for i, limit := range limits {
		for name, raw := range limit {
			values.Set(fmt.Sprintf("policy.limits[%d].%s", i, name), displayJSON(raw))
		}
	}
	return values
}

// encode returns the policy that was sent. What the form has no field for stays as it is stored.
func (p *policyForm) encode(sent url.Values) json.RawMessage {
	out := jsonFields(p.stored)
	set := func(name string, value any, isSet bool) {
		delete(out, name)
		if isSet {
			out[name] = mustMarshal(value)
		}
	}
	for _, name := range []string{"models", "endpoints", "addresses"} {
		list := splitLines(sent.Get("policy." + name))
		set(name, list, len(list) > 0 || sent.Get("policy."+name+".none") != "")
	}
	days := strings.TrimSpace(sent.Get("policy.keep_content_days"))
	set("keep_content_days", jsonNumber(days), p.Settings != nil && days != "" && days != "0")
	set("stateful", true, p.Settings != nil && sent.Get("policy.stateful") != "")
	if p.Cache != nil {
		cache := p.encodeCache(sent)
		set("cache", cache, cache != nil)
	}
	attribution := p.encodeAttribution(sent)
	set("attribution", attribution, len(attribution) > 0)
	limits := []limitJSON{}
	for _, row := range p.Limits {
		if row.isBlank() {
			continue
		}
		l := limitJSON{Count: row.Count, Max: jsonNumber(row.Max), Per: row.Per, Endpoint: row.Endpoint,
			Model: row.Model, Shadow: row.Shadow, ForEach: row.ForEach}
		if row.MaxValues != "" {
			l.MaxValues = jsonNumber(row.MaxValues)
		}
		if row.Count == metricConcurrent.String() {
			l.Per = "" // a blank row has a period, concurrent calls have none
		}
		limits = append(limits, l)
	}
	set("limits", limits, len(limits) > 0)
	return mustMarshal(out)
}

// encodeCache returns the cache policy that was sent, without what has its default; nil: no cache. A stored one is
// turned off by leaving its time empty. For a new one that is a mistake, if anything else is given.
func (p *policyForm) encodeCache(sent url.Values) map[string]any {
	cache, isStored := map[string]any{}, jsonFields(p.stored)["cache"] != nil
	isMeant := false
	for _, field := range p.Cache {
		text, name := strings.TrimSpace(sent.Get(field.Name)), strings.TrimPrefix(field.Name, "policy.cache.")
		if text == "" && name == "ttl_seconds" && isStored {
			return nil
		}
		isMeant = isMeant || text != "" && field.Kind != "select"
		switch {
		case text == "" || field.Kind == "select" && text == field.Options[0].Value:
		case field.Kind == "number":
			cache[name] = jsonNumber(text)
		case field.Kind == "lines":
			cache[name] = splitLines(text)
		default:
			cache[name] = text
		}
	}
	if !isMeant {
		return nil
	}
	return cache
}

// encodeAttribution returns the attribution policy that was sent, without what has its default, unless that is stored.
func (p *policyForm) encodeAttribution(sent url.Values) map[string]json.RawMessage {
	out := jsonFields(jsonFields(p.stored)["attribution"])
	for _, field := range p.Attribution {
		text, name := strings.TrimSpace(sent.Get(field.Name)), strings.TrimPrefix(field.Name, "policy.attribution.")
		if !sent.Has(field.Name) { // the page is older than the program
			continue
		}
		isDefault := field.Kind == "select" && text == field.Options[0].Value
		switch {
		case text == "" || isDefault && out[name] == nil:
			delete(out, name)
		case field.Kind == "lines":
			out[name] = mustMarshal(splitLines(text))
		case field.Kind == "pairs":
			pairs := map[string]string{}
			for _, line := range splitLines(text) {
				key, value, _ := strings.Cut(line, "=") // without a value, the operation refuses it
				pairs[strings.TrimSpace(key)] = strings.TrimSpace(value)
			}
			out[name] = mustMarshal(pairs)
		default:
			out[name] = mustMarshal(text)
		}
	}
	return out
}

// showError reports whether a mistake is about the policy, and shows it if so. f is the form that the policy is in.
func (p *policyForm) showError(f *pageForm, err error) bool {
	fe, ok := errors.AsType[*fieldError](err)
	if !ok {
		return false
	}
	rest, ok := strings.CutPrefix(fe.param, "policy.limits")
	if !ok {
		return f.showFieldError(p.fields(), fe)
	}
	msg := limitWords().Replace(strings.TrimSuffix(fe.msg, ".") + ".")
	n, name, _ := strings.Cut(strings.TrimPrefix(rest, "["), "]")
	if i, err := strconv.Atoi(n); err == nil && i < len(p.Limits) {
		row := p.Limits[i]
		row.ErrorField = cmp.Or(strings.TrimPrefix(name, "."), "max")
		row.Error = limitFieldLabel(row.ErrorField) + " " + msg
		if name == "" {
			row.Error = "This limit " + msg
		}
		f.Mistakes = append(f.Mistakes, formMistake{fmt.Sprintf("limit-%d-%s", i, row.ErrorField),
			fmt.Sprintf("Limit %d: %s", row.Number, row.Error)})
		return true
	}
	p.Problem = "The limits " + msg
	f.Mistakes = append(f.Mistakes, formMistake{"limits", p.Problem})
	return true
}
