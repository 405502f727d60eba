// This room makes the forms of /admin: fields with their labels and help, the
// input kept and the mistake beside its field when a form is refused. What a
// field may hold is not decided here: the handlers of /manage say, and a field
// has the name that they use for it.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"
)

// A pageForm is what template "form" shows.
type pageForm struct {
	Action, Submit, Cancel string
	Danger                 bool
	Problem                string // with the form as a whole
	Version                int64  // of what it changes; 0: nothing
	Once                   string // names this copy of the form: it is carried out once
	Hidden                 []formOption
	Fields                 []*formField
}

// A formField is one input with its label. Kind is text, password, number, textarea,
// select, checkbox, datetime-local, or heading for a line between fields.
type formField struct {
	Name, Label, Kind, Value, Help, Placeholder, Error string
	Options                                            []formOption
	Required, Checked, Short                           bool
}

type formOption struct{ Value, Label string }

// fieldID is what labels and help refer to a field by.
func fieldID(name string) string {
	return "f-" + strings.NewReplacer(".", "-", "[", "-", "]", "").Replace(name)
}

// fill puts in the values: those that were sent, or else those that are stored.
// Passwords never come back.
func (f *pageForm) fill(sent, stored url.Values) {
	values := stored
	if sent != nil {
		values = sent
	}
	for _, in := range f.Fields {
		switch in.Kind {
		case "heading", "password":
		case "checkbox":
			in.Checked = values.Get(in.Name) != ""
		default:
			in.Value = strings.ReplaceAll(values.Get(in.Name), "\r\n", "\n")
		}
	}
}

// showError puts a mistake beside the field that it is about, and returns the
// status of the answer. What is no mistake of the sender's comes back as error.
func (f *pageForm) showError(err error) (int, error) {
	if errors.Is(err, errTaken) {
		err = &fieldError{"name", "is taken by another one"}
	}
	if errors.Is(err, errStale) {
		f.Problem = "Somebody changed this while you had the form open. Open it again to see the change; what you typed is still here."
		return http.StatusConflict, nil
	}
	fe, ok := errors.AsType[*fieldError](err)
	if !ok {
		if e, ok := errors.AsType[*apiError](err); ok && e.status == http.StatusBadRequest {
			f.Problem = e.msg
			return http.StatusBadRequest, nil
		}
		return 0, err
	}
	for _, in := range f.Fields {
		if in.Name == fe.param || strings.HasPrefix(fe.param, in.Name+"[") { // an entry of a list
			in.Error = in.Label + " " + strings.TrimSuffix(fe.msg, ".") + "."
			return http.StatusBadRequest, nil
		}
	}
	f.Problem = capitalize(fieldErrorMessage(fe))
	return http.StatusBadRequest, nil
}

func capitalize(s string) string {
	r, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(r)) + s[n:]
}

// setText puts a form's text into the fields of a request. An empty one is left
// out, or null where that means "none".
func setText(to map[string]any, form url.Values, name string, emptyIsNull bool) {
	switch v := form.Get(name); {
	case v != "":
		to[name] = v
	case emptyIsNull:
		to[name] = nil
	}
}

// setNumber is setText for whole numbers. What is none goes on as text: the
// handler then says what the field must be.
func setNumber(to map[string]any, form url.Values, name string, emptyIsNull bool) {
	setText(to, form, name, emptyIsNull)
	if v, ok := to[name].(string); ok {
		if n, err := strconv.ParseInt(strings.ReplaceAll(strings.TrimSpace(v), ",", ""), 10, 64); err == nil {
			to[name] = n
		}
	}
}

// splitLines returns the lines of a text area, without empty ones.
func splitLines(text string) []string {
	out := []string{}
	for line := range strings.SplitSeq(text, "\n") {
		if line = strings.TrimSpace(line); line != "" {
			out = append(out, line)
		}
	}
	return out
}

// submittedForms remembers which forms were carried out of late, so that one which
// shows a secret once does not make another when its answer is reloaded. It
// forgets the oldest.
type submittedForms struct {
	mu   sync.Mutex
	ids  [512]string
	next int
}

// claim reports whether a form is seen for the first time.
func (s *submittedForms) claim(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.ids {
		if n == name {
			return false
		}
	}
	s.ids[s.next] = name
	s.next = (s.next + 1) % len(s.ids)
	return true
}

// A limitFormRow is one limit in the form. Index names its fields, which have the
// names that errors use.
type limitFormRow struct {
	Index                       int
	Count, Max, Per, Which, For string // Which: endpoint, For: model
	Shadow                      bool
	Error, ErrorField           string
}

// A policyListField is a list and what it means when it is empty.
type policyListField struct{ List, None *formField }

// A policyForm is the fields about a policy.
type policyForm struct {
	OfProject      bool
	Lists          []policyListField
	Limits         []*limitFormRow
	Counts, Spans  []formOption
	Problem        string
	StatefulInput  *formField
	KeepInput      *formField
	MostLimitsHere int
}

const blankLimitRows = 2 // empty ones for new limits

func newPolicyForm(ofProject bool) *policyForm {
	list := func(name, label, placeholder, help, none string) policyListField {
		return policyListField{&formField{Name: "policy." + name, Label: label, Kind: "textarea", Placeholder: placeholder, Help: help},
			&formField{Name: "policy." + name + ".none", Label: none, Kind: "checkbox"}}
	}
	who := "this token"
	if ofProject {
		who = "the project's tokens"
	}
	p := &policyForm{OfProject: ofProject, MostLimitsHere: maxLimits,
		Counts: []formOption{{metricRequests.String(), "requests"}, {metricTokens.String(), "tokens"}, {metricDollars.String(), "dollars"}, {metricConcurrent.String(), "calls at one time"}},
		Spans:  []formOption{{"", "–"}}}
	for s := perSecond; s <= perLifetime; s++ {
		p.Spans = append(p.Spans, formOption{s.String(), map[bool]string{true: "in all", false: "per " + s.String()}[s == perLifetime]})
	}
	p.Lists = []policyListField{
		list("models", "Models", "gpt-4o-mini\nclaude-*", "What "+who+" may ask for, one a line; * at the end stands for any rest. Empty: every model.",
			"If no model is listed, allow none instead of all"),
		list("endpoints", "Endpoints", "/v1/chat/completions\n/v1/audio/*", "What "+who+" may call, one a line, such as /v1/embeddings or POST /v1/responses. Empty: every endpoint that keeps nothing at the provider.",
			"If no endpoint is listed, allow none instead of all"),
		list("addresses", "Client addresses", "10.0.0.0/8\n2001:db8::/32", "From where "+who+" may be used, one network or address a line. Empty: from everywhere.",
			"If no address is listed, allow none instead of all")}
	if ofProject {
		p.KeepInput = &formField{Name: "policy.keep_content_days", Label: "Days to keep what calls say", Kind: "number", Placeholder: "0", Short: true,
			Help: "Request and answer of each call, sealed, for administrators to read. Empty or 0: nothing is kept. Tell the people whose words these are."}
		p.StatefulInput = &formField{Name: "policy.stateful", Label: "Allow endpoints that keep objects at the provider", Kind: "checkbox",
			Help: "Files, batches, assistants, stored responses. Everybody who shares the provider's key shares those objects."}
	}
	return p
}

// fields is all of the form's fields but the limits'.
func (p *policyForm) fields() (out []*formField) {
	for _, l := range p.Lists {
		out = append(out, l.List, l.None)
	}
	if p.StatefulInput != nil {
		out = append(out, p.StatefulInput, p.KeepInput)
	}
	return out
}

// fill puts in what was sent, or else a stored policy.
func (p *policyForm) fill(sent url.Values, stored json.RawMessage) {
	values := sent
	if sent == nil {
		values = policyValues(stored)
	}
	(&pageForm{Fields: p.fields()}).fill(values, nil)
	for _, i := range limitIndexes(values) {
		at := func(name string) string { return values.Get(fmt.Sprintf("policy.limits[%d].%s", i, name)) }
		if row := (&limitFormRow{len(p.Limits), at("count"), strings.TrimSpace(at("max")), at("per"), at("endpoint"), at("model"), at("shadow") != "", "", ""}); row.Max != "" || row.Which != "" || row.For != "" {
			p.Limits = append(p.Limits, row)
		}
	}
	for range blankLimitRows {
		if len(p.Limits) < maxLimits {
			p.Limits = append(p.Limits, &limitFormRow{Index: len(p.Limits), Count: metricRequests.String(), Per: perMinute.String()})
		}
	}
}

// limitIndexes returns the numbers of the rows that a form has, in order.
func limitIndexes(values url.Values) (out []int) {
	for i := range maxLimits + blankLimitRows {
		if values.Has(fmt.Sprintf("policy.limits[%d].max", i)) {
			out = append(out, i)
		}
	}
	return out
}

// policyValues writes a stored policy as the form has it.
func policyValues(stored json.RawMessage) url.Values {
	values := url.Values{}
	var p struct {
		Models, Endpoints, Addresses []string
		Stateful                     bool
		KeepContentDays              int64 `json:"keep_content_days"`
		Limits                       []limitJSON
	}
	if err := json.Unmarshal(stored, &p); err != nil { // cannot be: it was checked when it was stored
		return values
	}
	for name, l := range map[string][]string{"models": p.Models, "endpoints": p.Endpoints, "addresses": p.Addresses} {
		values.Set("policy."+name, strings.Join(l, "\n"))
		if l != nil && len(l) == 0 {
			values.Set("policy."+name+".none", "on")
		}
	}
	if p.Stateful {
		values.Set("policy.stateful", "on")
	}
	if p.KeepContentDays > 0 {
		values.Set("policy.keep_content_days", strconv.FormatInt(p.KeepContentDays, 10))
	}
	for i, l := range p.Limits {
		for name, v := range map[string]string{"count": l.Count, "max": string(l.Max), "per": l.Per, "endpoint": l.Endpoint, "model": l.Model, "shadow": map[bool]string{true: "on"}[l.Shadow]} {
			values.Set(fmt.Sprintf("policy.limits[%d].%s", i, name), v)
		}
	}
	return values
}

// parsePolicy reads a policy from a form that was sent. What the form has no field
// for stays as it is stored.
func (p *policyForm) parsePolicy(sent url.Values, stored json.RawMessage) map[string]any {
	out := map[string]any{}
	var kept map[string]json.RawMessage
	if err := json.Unmarshal(stored, &kept); err == nil {
		for name, v := range kept {
			out[name] = v
		}
	}
	for _, name := range []string{"models", "endpoints", "addresses"} {
		delete(out, name)
		if l := splitLines(sent.Get("policy." + name)); len(l) > 0 || sent.Get("policy."+name+".none") != "" {
			out[name] = l
		}
	}
	delete(out, "keep_content_days")
	if days := strings.TrimSpace(sent.Get("policy.keep_content_days")); p.OfProject && days != "" && days != "0" {
		out["keep_content_days"] = jsonNumber(days)
	}
	delete(out, "stateful")
	if p.OfProject && sent.Get("policy.stateful") != "" {
		out["stateful"] = true
	}
	delete(out, "limits")
	if limits := p.limitsJSON(); len(limits) > 0 {
		out["limits"] = limits
	}
	return out
}

// limitsJSON is the limits of the rows that say anything.
func (p *policyForm) limitsJSON() (out []map[string]any) {
	for _, row := range p.Limits {
		if row.Max == "" && row.Which == "" && row.For == "" {
			continue
		}
		l := map[string]any{"count": row.Count, "max": jsonNumber(row.Max)}
		for name, v := range map[string]string{"per": row.Per, "endpoint": strings.TrimSpace(row.Which), "model": strings.TrimSpace(row.For)} {
			if v != "" && (name != "per" || row.Count != metricConcurrent.String()) { // the row begins with a span, which that has not
				l[name] = v
			}
		}
		if row.Shadow {
			l["shadow"] = true
		}
		out = append(out, l)
	}
	return out
}

// jsonNumber is a typed number, commas allowed, as JSON has it. What is none
// goes on as text, for the rules to refuse.
func jsonNumber(text string) any {
	text = strings.TrimPrefix(strings.ReplaceAll(strings.TrimSpace(text), ",", ""), "$")
	if _, err := strconv.ParseFloat(text, 64); err == nil && strings.Trim(text, "0123456789.") == "" && json.Valid([]byte(text)) {
		return json.Number(text)
	}
	return text
}

// showError puts a mistake beside the field that it is about, if it is one here.
func (p *policyForm) showError(fe *fieldError) bool {
	rest, ok := strings.CutPrefix(fe.param, "policy.limits")
	if !ok {
		return false
	}
	n, name, _ := strings.Cut(strings.TrimPrefix(rest, "["), "]")
	name = strings.TrimPrefix(name, ".")
	if i, err := strconv.Atoi(n); err == nil && i < len(p.Limits) {
		p.Limits[i].ErrorField = name
		p.Limits[i].Error = capitalize(strings.TrimSpace(name + " " + strings.TrimSuffix(fe.msg, ".") + "."))
		return true
	}
	p.Problem = "The limits " + strings.TrimSuffix(fe.msg, ".") + "."
	return true
}

// A barView is use against a limit. Level is "", warn or bad.
type barView struct {
	Text, Label, Level string
	Percent            int
	Used, Max, Left    string
	Shadow             bool
	ResetsAt           *timestamp
	WouldRefuse        int64
}

// newBarViews shows how limits stand.
func newBarViews(limits []limitView) (out []barView) {
	for _, l := range limits {
		per := l.Per
		switch {
		case l.Count == metricConcurrent.String():
			per = "at one time"
		case l.Per == perLifetime.String():
			per = "in all"
		default:
			per = "per " + per
		}
		scope := ""
		if l.Endpoint != "" {
			scope += " on " + l.Endpoint
		}
		if l.Model != "" {
			scope += " for " + l.Model
		}
		amount := func(raw json.RawMessage) string {
			return formatQuantity(string(raw), l.Count == metricDollars.String())
		}
		used, most := quantityMicros(l.Used), quantityMicros(l.Max)
		b := newBarView(used, most)
		b.Used, b.Max, b.Left, b.Shadow, b.ResetsAt, b.WouldRefuse = amount(l.Used), amount(l.Max), amount(l.Left), l.Shadow, l.ResetsAt, l.WouldRefuse
		what := l.Count
		if what == metricConcurrent.String() {
			what = "calls"
		}
		b.Text = capitalize(strings.TrimSpace(map[bool]string{true: "", false: what}[what == metricDollars.String()]+" "+per)) + scope
		if what == metricDollars.String() {
			b.Text = "Dollars " + per + scope
		}
		b.Label = b.Text + ": " + b.Used + " of " + b.Max + " used"
		out = append(out, b)
	}
	return out
}

// newBarView is the part of a whole, as a bar.
func newBarView(used, most int64) barView {
	b := barView{}
	switch {
	case used <= 0:
	case most <= 0 || used >= most:
		b.Percent = 100
	default:
		b.Percent = max(1, int(float64(used)/float64(most)*100))
	}
	switch {
	case most <= 0 || used >= most:
		b.Level = "bad"
	case b.Percent >= 80:
		b.Level = "warn"
	}
	return b
}

// quantityMicros reads an amount of a limit, whole or decimal, in units that can be
// compared.
func quantityMicros(raw json.RawMessage) int64 {
	f, err := strconv.ParseFloat(string(raw), 64)
	if err != nil || f > 9e18/1e6 {
		return 0
	}
	return int64(f * 1e6)
}

// formatQuantity groups a number, or writes money.
func formatQuantity(raw string, money bool) string {
	whole, decimals, _ := strings.Cut(raw, ".")
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return raw
	}
	if !money {
		return groupDigits(n)
	}
	return "$" + groupDigits(n) + "." + (decimals + "00")[:max(2, min(len(decimals), 6))]
}
