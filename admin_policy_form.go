// This file has the part of the forms of projects and tokens that is about their policy: the lists of what is allowed,
// the rows of limits, and presets that fill in both for common uses. It also fills the forms of projects and tokens
// that start like existing ones. What a policy may say is decided by policy.go; a field has the name of its errors.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// A policyForm is the data of the templates "policy" and "policy-advanced".
type policyForm struct {
	Presets          []presetButton
	OffersPresets    bool   // they are open from the start
	Filled           string // the title of the preset that has filled in the form
	Models           policyListField
	Lists            []policyListField // of endpoints and client addresses
	Settings, Cache  []*formField      // of a project's policy only
	Attribution      []*formField
	Limits           []*limitFormRow
	NewLimit         *limitFormRow // what the script copies to add a row
	Metrics, Periods []option
	MaxLimits        int
	FocusAdd         bool   // the button that adds a limit gets the focus
	Problem          string // with the limits as a whole
	stored           json.RawMessage
	addsLimit        bool     // an empty row is added, which gets the focus
	unreadable       []string // names of fields for whole numbers with other text
}

// newLimitIndex stands for the index in the row that the script copies.
const newLimitIndex = "NEW"

// A policyListField is a list, and whether an empty list allows nothing instead of everything.
type policyListField struct{ List, None *formField }

// A limitFormRow is one limit. Index is part of the names of its fields.
type limitFormRow struct {
	Index                            string
	Number                           int
	Count, Max, Per, Endpoint, Model string
	ForEach, MaxValues               string
	Shadow                           bool
	Error, ErrorField                string
	Focus                            bool // it is the first input with an error
	IsAdded                          bool // it was added just now: its first input gets the focus
}

// inputID returns the HTML id of the input of a limit's field.
func (row *limitFormRow) inputID(field string) string { return "limit-" + row.Index + "-" + field }

func (row *limitFormRow) isBlank() bool {
	return row.Max == "" && row.Endpoint == "" && row.Model == "" && row.ForEach == "" && row.MaxValues == ""
}

// maxFormLimits is how many rows of limits are read from a form: more than a policy can have, so that nothing is
// left out without an error.
const maxFormLimits = 4 * maxLimits

// newPolicyForm returns the form of a stored policy.
func newPolicyForm(ofProject bool, stored json.RawMessage) *policyForm {
	list := func(name, label, placeholder string) policyListField {
		return policyListField{
			&formField{Name: "policy." + name, Label: label, Kind: "lines", Placeholder: placeholder, Help: name},
			&formField{Name: "policy." + name + ".none", Kind: "checkbox",
				Label: "If no " + strings.ToLower(label) + " are listed, allow none instead of all"},
		}
	}
	p := &policyForm{MaxLimits: maxLimits, stored: stored, Presets: presetButtons(), OffersPresets: stored == nil,
		NewLimit: newLimitRow(newLimitIndex),
		Metrics: options(metricRequests.String(), "requests", metricTokens.String(), "tokens",
			metricDollars.String(), "dollars", metricConcurrent.String(), "concurrent calls"),
		Models: list("models", "Models", "gpt-4o-mini\nclaude-*"),
		Lists: []policyListField{
			list("endpoints", "Endpoints", "/v1/chat/completions\n/v1/audio/*"),
			list("addresses", "Client addresses", "10.0.0.0/8\n2001:db8::/32"),
		}}
	p.Periods = options("", "at one time")
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
	for _, field := range p.fields() {
		field.Advanced = field != p.Models.List
	}
	return p
}

// fields returns all fields except those of the limits.
func (p *policyForm) fields() (fields []*formField) {
	for _, l := range p.lists() {
		fields = append(fields, l.List, l.None)
	}
	return slices.Concat(fields, p.Settings, p.Cache, p.Attribution)
}

func (p *policyForm) lists() []policyListField {
	return append([]policyListField{p.Models}, p.Lists...)
}

// fill puts in what was sent, otherwise the stored policy. A new policy begins with an empty row for a limit.
func (p *policyForm) fill(sent url.Values) {
	values := sent
	if sent == nil {
		values = p.storedValues(p.stored)
	}
	(&pageForm{Fields: p.fields()}).fill(values, nil)
	for _, index := range limitIndexes(values) {
		value := func(name string) string { return strings.TrimSpace(values.Get(limitFieldName(index, name))) }
		p.addRow(&limitFormRow{Count: value("count"), Max: value("max"), Per: value("per"),
			Endpoint: value("endpoint"), Model: value("model"), Shadow: value("shadow") != "",
			ForEach: value("for_each"), MaxValues: value("max_values")})
	}
	switch {
	case p.addsLimit && len(p.Limits) < maxLimits:
		row := newLimitRow("")
		row.IsAdded = true
		p.addRow(row)
	case sent == nil && len(p.Limits) == 0: // a budget is what most need
		p.addRow(&limitFormRow{Count: metricDollars.String(), Per: perMonth.String()})
	}
}

// newLimitRow returns an empty row.
func newLimitRow(index string) *limitFormRow {
	return &limitFormRow{Index: index, Count: metricRequests.String(), Per: perMinute.String()}
}

func (p *policyForm) addRow(row *limitFormRow) {
	row.Index, row.Number = strconv.Itoa(len(p.Limits)), len(p.Limits)+1
	p.Limits = append(p.Limits, row)
}

// givenRows returns the rows that are not empty: the limits of the policy, in their order.
func (p *policyForm) givenRows() []*limitFormRow {
	return slices.DeleteFunc(slices.Clone(p.Limits), (*limitFormRow).isBlank)
}

const limitsPrefix = "policy.limits["

func limitFieldName(index int, name string) string {
	return limitsPrefix + strconv.Itoa(index) + "]." + name
}

// limitIndexes returns the indexes of the limits in a form, in order. The script leaves gaps where it removes rows.
func limitIndexes(values url.Values) (indexes []int) {
	for name := range values {
		rest, isLimit := strings.CutPrefix(name, limitsPrefix)
		text, _, _ := strings.Cut(rest, "]")
		if index, err := strconv.Atoi(text); isLimit && err == nil && index >= 0 {
			indexes = append(indexes, index)
		}
	}
	slices.Sort(indexes)
	indexes = slices.Compact(indexes)
	return indexes[:min(len(indexes), maxFormLimits)]
}

// removeLimits removes the limits for which remove returns true from a form.
func removeLimits(values url.Values, remove func(index string) bool) {
	for name := range values {
		rest, isLimit := strings.CutPrefix(name, limitsPrefix)
		if index, _, _ := strings.Cut(rest, "]"); isLimit && remove(index) {
			delete(values, name)
		}
	}
}

// edit changes a form that was sent with a button other than its own: one that adds or removes a limit, or fills in a
// preset. It reports whether there was such a button: then the form is shown again, and nothing is done with it.
func (p *policyForm) edit(form url.Values) bool {
	switch {
	case form.Has("preset"):
		p.applyPreset(form.Get("preset"), form)
	case form.Has("remove_limit"):
		removeLimits(form, func(index string) bool { return index == form.Get("remove_limit") })
		p.FocusAdd = true
	case form.Has("add_limit"):
		p.addsLimit = true
	default:
		return false
	}
	return true
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

// storedValues returns a policy as the values of the form.
func (p *policyForm) storedValues(stored json.RawMessage) url.Values {
	policy := map[string]json.RawMessage{}
	for name, raw := range jsonFields(stored) {
		policy["policy."+name] = raw
	}
	for _, object := range [...]string{"policy.cache", "policy.attribution"} {
		for name, raw := range jsonFields(policy[object]) {
			policy[object+"."+name] = raw
		}
	}
	values := storedValues(policy, p.fields())
	for _, l := range p.lists() {
		if string(policy[l.List.Name]) == "[]" {
			values.Set(l.None.Name, "on")
		}
	}
	var limits []map[string]json.RawMessage
	_ = json.Unmarshal(policy["policy.limits"], &limits) // there may be none
	for i, limit := range limits {
		for name, raw := range limit {
			values.Set(limitFieldName(i, name), displayJSON(raw))
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
	set("keep_content_days", p.wholeNumber("policy.keep_content_days", days),
		p.Settings != nil && days != "" && days != "0")
	set("stateful", true, p.Settings != nil && sent.Get("policy.stateful") != "")
	if p.Cache != nil {
		cache := p.encodeCache(sent)
		set("cache", cache, cache != nil)
	}
	attribution := p.encodeAttribution(sent)
	set("attribution", attribution, len(attribution) > 0)
	limits := []limitJSON{}
	for _, row := range p.givenRows() {
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

// wholeNumber returns a typed number; -1, which the operations refuse, for other text.
func (p *policyForm) wholeNumber(name, text string) int64 {
	n, err := strconv.ParseInt(ungroupDigits(text), 10, 64)
	if err != nil {
		p.unreadable, n = append(p.unreadable, name), -1
	}
	return n
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
			cache[name] = p.wholeNumber(field.Name, text)
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
	if slices.Contains(p.unreadable, fe.param) {
		fe = &fieldError{fe.param, "must be a whole number"}
	}
	rest, ok := strings.CutPrefix(fe.param, "policy.limits")
	if !ok {
		return f.showFieldError(p.fields(), fe)
	}
	msg, rows := limitWords().Replace(strings.TrimSuffix(fe.msg, ".")+"."), p.givenRows()
	for i, row := range rows { // in a message about two limits
		msg = strings.ReplaceAll(msg, fmt.Sprintf("%s%d]", limitsPrefix, i), fmt.Sprintf("limit %d", row.Number))
	}
	n, name, _ := strings.Cut(strings.TrimPrefix(rest, "["), "]")
	if i, err := strconv.Atoi(n); err == nil && i < len(rows) {
		row := rows[i]
		row.ErrorField = cmp.Or(strings.TrimPrefix(name, "."), "max")
		row.Error = limitFieldLabel(row.ErrorField) + " " + msg
		if name == "" {
			row.Error = "This limit " + msg
		}
		f.Mistakes = append(f.Mistakes, formMistake{row.inputID(row.ErrorField),
			fmt.Sprintf("Limit %d: %s", row.Number, row.Error)})
		return true
	}
	p.Problem = "The limits " + msg
	f.Mistakes = append(f.Mistakes, formMistake{"limits", p.Problem})
	return true
}

// A policyPreset is a policy for a common use. It sets the models, the endpoints, the limits, whether objects may be
// stored at the provider and, of a new token, when it expires.
type policyPreset struct {
	name, title, about string
	policy             string // as /manage takes it; a token leaves out what only a project can have
	lifetime           string // hours, of a new token
}

// policyPresets returns the presets. Their sums are for list prices of late 2026: a developer with an agent uses 5 to
// 25 dollars a day.
func policyPresets() []policyPreset {
	return []policyPreset{
		{name: "coding-assistant", title: "Coding assistant", lifetime: "2160",
			about: "For one developer: the models of coding agents, large and small.",
			policy: `{"models":["claude-opus-*","claude-sonnet-*","claude-haiku-*","gpt-5*","gpt-6*","codex-*",
				"gemini-2.5-pro*","gemini-2.5-flash*","gemini-3*"],
				"limits":[{"count":"dollars","max":25,"per":"day"},{"count":"dollars","max":300,"per":"month"},
				{"count":"requests","max":120,"per":"minute"},{"count":"concurrent","max":8}]}`},
		{name: "batch-job", title: "Batch job", lifetime: "168",
			about: "For a program that works through a lot of data. Files and batches need a project that allows " +
				"stored objects.",
			policy: `{"endpoints":["/v1/chat/completions","/v1/responses","/v1/messages*","/v1/embeddings",
				"/v1/batches*","/v1/files*","/v1/models*","/v1beta/models*"],"stateful":true,
				"limits":[{"count":"dollars","max":100,"per":"lifetime"},{"count":"requests","max":3000,"per":"minute"},
				{"count":"concurrent","max":64}]}`},
		{name: "public-demo", title: "Public demo", lifetime: "168",
			about: "For strangers: small models, and little for each end user that the program names.",
			policy: `{"models":["gpt-4o-mini","gpt-4.1-mini","gpt-4.1-nano","gpt-5-mini","gpt-5-nano","claude-haiku-*",
				"gemini-2.5-flash","gemini-2.5-flash-lite"],
				"endpoints":["/v1/chat/completions","/v1/responses","/v1/messages","/v1beta/models*"],
				"limits":[{"count":"dollars","max":5,"per":"day"},
				{"count":"requests","max":10,"per":"minute","for_each":"end_user"},
				{"count":"requests","max":100,"per":"day","for_each":"end_user"},{"count":"concurrent","max":16}]}`},
		{name: "evaluation", title: "Evaluation", lifetime: "168",
			about: "For comparing models: any model, but nothing is stored at the provider.",
			policy: `{"endpoints":["/v1/chat/completions","/v1/responses","/v1/messages","/v1/embeddings",
				"/v1/moderations","/v1/models*","/v1beta/models*"],
				"limits":[{"count":"dollars","max":20,"per":"lifetime"},{"count":"requests","max":300,"per":"minute"},
				{"count":"concurrent","max":8}]}`},
	}
}

// A presetButton is a preset as forms show it.
type presetButton struct{ Name, Title, About string }

func presetButtons() (buttons []presetButton) {
	for _, preset := range policyPresets() {
		limits := strings.Join(describeLimits(json.RawMessage(preset.policy)), ", ")
		buttons = append(buttons, presetButton{preset.name, preset.title, preset.about + " " + limits + "."})
	}
	return buttons
}

// applyPreset sets the values of a form that a preset has, and leaves the others as they are.
func (p *policyForm) applyPreset(name string, values url.Values) {
	all := policyPresets()
	i := slices.IndexFunc(all, func(preset policyPreset) bool { return preset.name == name })
	if i < 0 {
		p.Problem = "There is no preset with this name."
		return
	}
	removeLimits(values, func(string) bool { return true })
	for _, name := range []string{"models", "endpoints", "stateful"} {
		delete(values, "policy."+name)
		delete(values, "policy."+name+".none")
	}
	maps.Copy(values, p.storedValues(json.RawMessage(all[i].policy)))
	if values.Has("lifetime") {
		values.Set("lifetime", all[i].lifetime)
		values.Del("expires_at") // a date would override it
	}
	p.Filled = all[i].title
}

// describePolicy describes a stored policy: its members by name, its limits as sentences.
func describePolicy(stored json.RawMessage) string {
	members := jsonFields(stored)
	if len(members) == 0 {
		return displayJSON(stored)
	}
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(members)) {
		var list []string
		text := string(members[name])
		switch {
		case name == "limits":
			text = strings.Join(describeLimits(stored), ", ")
		case json.Unmarshal(members[name], &list) == nil:
			text = cmp.Or(strings.Join(list, ", "), "none")
		}
		parts = append(parts, name+": "+text)
	}
	return strings.Join(parts, "; ")
}

// describeLimits returns the limits of a stored policy, each as a sentence.
func describeLimits(stored json.RawMessage) (sentences []string) {
	var p struct{ Limits []json.RawMessage }
	if json.Unmarshal(stored, &p) != nil {
		return nil
	}
	for _, raw := range p.Limits {
		l, err := parseLimit(raw)
		if err != nil { // of another version of the program
			sentences = append(sentences, string(raw))
			continue
		}
		text := l.String()
		if l.monitorOnly {
			text += " (monitor only)"
		}
		sentences = append(sentences, text)
	}
	return sentences
}

// fillLikeProject fills the form of a new project in with what the project has that the address names: its policy, its
// routing and its upstreams, each of which needs a key. It returns the title of the page and the values of the form.
// The form of a project without such a model offers the others.
func (ui *adminUI) fillLikeProject(r *pageRequest, v *formView) (title string, values url.Values, err error) {
	v.Like = r.query.Get("like")
	projects, err := ui.projectOptions(r, v.Like)
	if err != nil {
		return "", nil, err
	}
	if len(projects) > 1 {
		projects[0].Label = "None"
		v.Likes = projects
	}
	if v.Like == "" {
		return "New project", nil, nil
	}
	model, err := ui.ops.getProject(r.ctx, v.Like, valueQuery{}, r.now)
	if err != nil {
		return "", nil, err
	}
	v.Policy, v.likes = newPolicyForm(true, model.Policy), model.Upstreams
	if len(v.likes) > 0 {
		v.Form.Fields = v.Form.Fields[:1]
	}
	names, areFolded := make([]string, len(v.likes)), len(v.likes) > maxUnfoldedKeys
	for i, u := range v.likes {
		field := &formField{Name: likeKeyField(i), Label: "API key of " + u.Name, Kind: "password",
			Note: "For " + u.BaseURL + ".", Folded: areFolded}
		if !areFolded { // otherwise it is said once for all
			field.Note += " Leave it empty to create the project without this upstream."
		}
		v.Form.Fields, names[i] = append(v.Form.Fields, field), u.Name
	}
	if areFolded {
		v.Form.Folded = fmt.Sprintf("API keys of %d upstreams", len(v.likes))
		v.Form.FoldedAbout = strings.Join(names[:min(len(names), maxFoldedNames)], ", ")
		if n := len(names) - maxFoldedNames; n > 0 {
			v.Form.FoldedAbout += fmt.Sprintf(" and %d more", n)
		}
	}
	values = routingValues(&model)
	values.Del("name")
	return "New project like " + model.Name, values, nil
}

const maxUnfoldedKeys, maxFoldedNames = 3, 8 // more keys are folded away, below the names of the first

func likeKeyField(i int) string { return fmt.Sprintf("upstreams[%d].api_key", i) }

// addLikeUpstreams adds the upstreams whose keys were entered to the input, as those of the model are except for whom
// they are shared with. It returns the names of the fields with their keys.
func (ui *adminUI) addLikeUpstreams(r *pageRequest, v *formView, in *projectInput) (keyFields []string, err error) {
	for i, u := range v.likes {
		key := strings.TrimSpace(r.form.Get(likeKeyField(i)))
		if key == "" {
			continue
		}
		members := jsonFields(mustMarshal(u))
		copied := map[string]json.RawMessage{}
		for _, f := range ui.ops.fields.upstream {
			if members[f.name] != nil && f.name != "shared_with" {
				copied[f.name] = members[f.name]
			}
		}
		var up upstreamInput
		if err := decodeFields(mustMarshal(copied), &up, ui.ops.fields.upstream, true); err != nil {
			return nil, err
		}
		up.key = given(newSecret(key))
		in.upstreams, keyFields = append(in.upstreams, up), append(keyFields, likeKeyField(i))
	}
	return keyFields, nil
}

// qualifyLikeErrors makes each mistake in an upstream that was copied one of the field with its key.
func qualifyLikeErrors(keyFields []string, err error) error {
	mistakes := splitMistakes(err)
	for k, mistake := range mistakes {
		fe, ok := errors.AsType[*fieldError](mistake)
		for i, name := range keyFields {
			if !ok {
				break
			}
			member, isOf := strings.CutPrefix(fe.param, fmt.Sprintf("upstreams[%d].", i))
			if isOf && member == "api_key" {
				mistakes[k] = &fieldError{name, fe.msg}
			} else if isOf {
				mistakes[k] = &fieldError{name, "cannot be stored, because " + member + " " + fe.msg}
			}
		}
	}
	return errors.Join(mistakes...)
}

// fillLikeToken fills the form of a new token in with what the token has that the address names.
func (ui *adminUI) fillLikeToken(r *pageRequest, v *formView, id string) (values url.Values, err error) {
	t, err := ui.ops.getToken(r.ctx, id, valueQuery{}, r.now)
	if err != nil {
		return nil, err
	}
	v.Policy = newPolicyForm(false, t.Policy)
	values = storedValues(t, v.Form.Fields)
	values.Del("name")
	values.Del("expires_at")
	values.Set("lifetime", "never")
	if t.ExpiresAt != nil {
		values.Set("lifetime", "720")
		hours := formatInt((int64(*t.ExpiresAt) - int64(t.CreatedAt) + hourMS/2) / hourMS)
		for _, field := range v.Form.Fields {
			isOffered := slices.ContainsFunc(field.Options, func(o option) bool { return o.Value == hours })
			if field.Name == "lifetime" && isOffered {
				values.Set("lifetime", hours)
			}
		}
	}
	return values, nil
}

// sortMistakes puts the mistakes in the order of their inputs on the page, and gives the focus to the first input.
func (f *pageForm) sortMistakes(policy *policyForm) {
	var ids []string
	add := func(fields []*formField, areAdvanced bool) {
		for _, field := range fields {
			if field.Advanced == areAdvanced {
				ids = append(ids, fieldID(field.Name))
			}
		}
	}
	fields := f.Fields
	if add(fields, false); policy != nil {
		add(policy.fields(), false)
		ids = append(ids, "limits")
		for _, row := range policy.Limits {
			ids = append(ids, row.inputID(row.ErrorField))
		}
		fields = slices.Concat(fields, policy.fields())
	}
	add(fields, true)
	slices.SortStableFunc(f.Mistakes, func(a, b formMistake) int {
		return slices.Index(ids, a.InputID) - slices.Index(ids, b.InputID)
	})
	if len(f.Mistakes) == 0 {
		return
	}
	first := f.Mistakes[0].InputID
	for _, field := range fields {
		field.Focus = fieldID(field.Name) == first
	}
	if policy == nil {
		return
	}
	for _, row := range policy.Limits {
		row.Focus = row.Error != "" && row.inputID(row.ErrorField) == first
	}
}

// limitFieldLabel returns the label of a limit's field.
func limitFieldLabel(name string) string {
	labels := map[string]string{"count": "Metric", "max": "Maximum", "per": "Period", "shadow": "Monitor only",
		"for_each": "For each", "max_values": "Values"}
	return cmp.Or(labels[name], capitalize(name))
}

// limitWords replaces the words of the API in a message about a limit by those of the form.
func limitWords() *strings.Replacer {
	return strings.NewReplacer("lifetime", "in total", "or concurrent", "or concurrent calls",
		"with concurrent,", "with concurrent calls:", "limits with for_each", "limits for each value",
		"for no limit leave the entry out", "for no limit leave it empty")
}
