// The part of a form that says what a project or a token may do: its lists and
// its limits. The rules are policy.go's and limits.go's; here are only the fields,
// and how limits stand as bars.
package main

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
	"strings"
)

// A limitRow is one limit in the form. Index names its fields, which have the
// names that errors use.
type limitRow struct {
	Index                       int
	Count, Max, Per, Which, For string // Which: endpoint, For: model
	Shadow                      bool
	Error, ErrorField           string
}

// A policyList is a list and what it means when it is empty.
type policyList struct{ List, None *field }

// A policyForm is the fields about a policy.
type policyForm struct {
	OfProject      bool
	Lists          []policyList
	Limits         []*limitRow
	Counts, Spans  []option
	Problem        string
	StatefulInput  *field
	KeepInput      *field
	MostLimitsHere int
}

const spareLimitRows = 2 // empty ones for new limits

func newPolicyForm(ofProject bool) *policyForm {
	list := func(name, label, placeholder, help, none string) policyList {
		return policyList{&field{Name: "policy." + name, Label: label, Kind: "textarea", Placeholder: placeholder, Help: help},
			&field{Name: "policy." + name + ".none", Label: none, Kind: "checkbox"}}
	}
	who := "this token"
	if ofProject {
		who = "the project's tokens"
	}
	p := &policyForm{OfProject: ofProject, MostLimitsHere: maxLimits,
		Counts: []option{{countRequests.String(), "requests"}, {countTokens.String(), "tokens"}, {countDollars.String(), "dollars"}, {countConcurrent.String(), "calls at one time"}},
		Spans:  []option{{"", "–"}}}
	for s := perSecond; s <= perLifetime; s++ {
		p.Spans = append(p.Spans, option{s.String(), map[bool]string{true: "in all", false: "per " + s.String()}[s == perLifetime]})
	}
	p.Lists = []policyList{
		list("models", "Models", "gpt-4o-mini\nclaude-*", "What "+who+" may ask for, one a line; * at the end stands for any rest. Empty: every model.",
			"If no model is listed, allow none instead of all"),
		list("endpoints", "Endpoints", "/v1/chat/completions\n/v1/audio/*", "What "+who+" may call, one a line, such as /v1/embeddings or POST /v1/responses. Empty: every endpoint that keeps nothing at the provider.",
			"If no endpoint is listed, allow none instead of all"),
		list("addresses", "Client addresses", "10.0.0.0/8\n2001:db8::/32", "From where "+who+" may be used, one network or address a line. Empty: from everywhere.",
			"If no address is listed, allow none instead of all")}
	if ofProject {
		p.KeepInput = &field{Name: "policy.keep_content_days", Label: "Days to keep what calls say", Kind: "number", Placeholder: "0", Short: true,
			Help: "Request and answer of each call, sealed, for administrators to read. Empty or 0: nothing is kept. Tell the people whose words these are."}
		p.StatefulInput = &field{Name: "policy.stateful", Label: "Allow endpoints that keep objects at the provider", Kind: "checkbox",
			Help: "Files, batches, assistants, stored responses. Everybody who shares the provider's key shares those objects."}
	}
	return p
}

// fields is all of the form's fields but the limits'.
func (p *policyForm) fields() (out []*field) {
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
		if row := (&limitRow{len(p.Limits), at("count"), strings.TrimSpace(at("max")), at("per"), at("endpoint"), at("model"), at("shadow") != "", "", ""}); row.Max != "" || row.Which != "" || row.For != "" {
			p.Limits = append(p.Limits, row)
		}
	}
	for range spareLimitRows {
		if len(p.Limits) < maxLimits {
			p.Limits = append(p.Limits, &limitRow{Index: len(p.Limits), Count: countRequests.String(), Per: perMinute.String()})
		}
	}
}

// limitIndexes returns the numbers of the rows that a form has, in order.
func limitIndexes(values url.Values) (out []int) {
	for i := range maxLimits + spareLimitRows {
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

// policyOf reads a policy from a form that was sent. What the form has no field
// for stays as it is stored.
func (p *policyForm) policyOf(sent url.Values, stored json.RawMessage) map[string]any {
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
	if limits := p.limitsOf(); len(limits) > 0 {
		out["limits"] = limits
	}
	return out
}

// limitsOf is the limits of the rows that say anything.
func (p *policyForm) limitsOf() (out []map[string]any) {
	for _, row := range p.Limits {
		if row.Max == "" && row.Which == "" && row.For == "" {
			continue
		}
		l := map[string]any{"count": row.Count, "max": jsonNumber(row.Max)}
		for name, v := range map[string]string{"per": row.Per, "endpoint": strings.TrimSpace(row.Which), "model": strings.TrimSpace(row.For)} {
			if v != "" && (name != "per" || row.Count != countConcurrent.String()) { // the row begins with a span, which that has not
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

// refused puts a mistake beside the field that it is about, if it is one here.
func (p *policyForm) refused(fe *fieldError) bool {
	rest, ok := strings.CutPrefix(fe.param, "policy.limits")
	if !ok {
		return false
	}
	n, name, _ := strings.Cut(strings.TrimPrefix(rest, "["), "]")
	name = strings.TrimPrefix(name, ".")
	if i, err := strconv.Atoi(n); err == nil && i < len(p.Limits) {
		p.Limits[i].ErrorField = name
		p.Limits[i].Error = capital(strings.TrimSpace(name + " " + strings.TrimSuffix(fe.msg, ".") + "."))
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
	ResetsAt           *stamp
	WouldRefuse        int64
}

// barsOf shows how limits stand.
func barsOf(limits []limitView) (out []barView) {
	for _, l := range limits {
		per := l.Per
		switch {
		case l.Count == countConcurrent.String():
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
		amount := func(raw json.RawMessage) string { return showAmount(string(raw), l.Count == countDollars.String()) }
		used, most := amountNanos(l.Used), amountNanos(l.Max)
		b := bar(used, most)
		b.Used, b.Max, b.Left, b.Shadow, b.ResetsAt, b.WouldRefuse = amount(l.Used), amount(l.Max), amount(l.Left), l.Shadow, l.ResetsAt, l.WouldRefuse
		what := l.Count
		if what == countConcurrent.String() {
			what = "calls"
		}
		b.Text = capital(strings.TrimSpace(map[bool]string{true: "", false: what}[what == countDollars.String()]+" "+per)) + scope
		if what == countDollars.String() {
			b.Text = "Dollars " + per + scope
		}
		b.Label = b.Text + ": " + b.Used + " of " + b.Max + " used"
		out = append(out, b)
	}
	return out
}

// bar is the part of a whole, as a bar.
func bar(used, most int64) barView {
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

// amountNanos reads an amount of a limit, whole or decimal, in units that can be
// compared.
func amountNanos(raw json.RawMessage) int64 {
	f, err := strconv.ParseFloat(string(raw), 64)
	if err != nil || f > 9e18/1e6 {
		return 0
	}
	return int64(f * 1e6)
}

// showAmount groups a number, or writes money.
func showAmount(raw string, money bool) string {
	whole, decimals, _ := strings.Cut(raw, ".")
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return raw
	}
	if !money {
		return group(n)
	}
	return "$" + group(n) + "." + (decimals + "00")[:max(2, min(len(decimals), 6))]
}
