// This file has what administrators see and change of prices: the fields of a price, the list, the breakdown of a
// call's cost, and simulations of what usage would cost. It prices nothing itself: billing.go and prices.go do.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A priceInput is what can be sent about a price.
type priceInput struct {
	match     optional[string]
	validFrom optional[timestampText]
	amounts   [numPriceKinds]optional[json.RawMessage]
	parts     [len(pricePartNames)]optional[json.RawMessage]
}

// A timestampText is a time as administrators write it.
type timestampText string

// pricePartNames are the members of a price beside amounts. They are objects, or a number.
var pricePartNames = [...]string{"above_input_tokens", "service_tier", "multiplier", "unknown_above_input_tokens"}

// pricePartLabels are what pages call these members.
var pricePartLabels = [...]string{"Prices of long inputs (JSON)", "Prices of service tiers (JSON)",
	"Multipliers of region and speed (JSON)", "No price above (input tokens)"}

// pricePartRules say what these members must be.
var pricePartRules = [...]string{
	`must have numbers of input tokens, each with prices: {"200000":{"input":4,"output":18}}`,
	`must have batch, flex, priority or ultrafast, each with prices: {"flex":{"input":1,"output":4}}`,
	`must have us, eu or fast, each with a number of at most two decimals: {"us":1.1}`,
	`must be a number of tokens`,
}

func priceFields() []field[priceInput, priceRow] {
	type f = field[priceInput, priceRow]
	fields := []f{
		{name: "match", label: "Model", required: true, placeholder: "gpt-4o-mini or my-model-*",
			help: "match", target: func(in *priceInput) inputField { return &in.match },
			apply: (*priceInput).applyMatch},
		{name: "valid_from", label: "Valid from (UTC)", nullable: true, kind: "datetime-local", help: "valid-from",
			empty: emptyOmitted, target: func(in *priceInput) inputField { return &in.validFrom },
			apply: (*priceInput).applyValidFrom},
	}
	for k, info := range priceKinds {
		fields = append(fields, f{
			name: info.name, nullable: true, label: capitalizeKind(info.label), kind: "number", empty: emptyOmitted,
			help: priceKindHelp(priceKind(k)), target: func(in *priceInput) inputField { return &in.amounts[k] },
			apply: func(in *priceInput, p *priceRow) error {
				return checkAmount(in.amounts[k], info)
			},
		})
	}
	for i, name := range pricePartNames {
		kind := "json"
		if name == "unknown_above_input_tokens" {
			kind = "number"
		}
		_, example, _ := strings.Cut(pricePartRules[i], ": ")
		fields = append(fields, f{
			name: name, nullable: true, empty: emptyOmitted, kind: kind, label: pricePartLabels[i],
			placeholder: example,
			target:      func(in *priceInput) inputField { return &in.parts[i] },
			apply: func(in *priceInput, p *priceRow) error {
				if !in.parts[i].hasValue() {
					return nil
				}
				if _, err := parsePrice(priceMembers{name: in.parts[i].value}); err != nil {
					return &fieldError{name, pricePartRules[i]}
				}
				return nil
			},
		})
	}
	return fields
}

func capitalizeKind(label string) string { return strings.ToUpper(label[:1]) + label[1:] }

// priceKindHelp names the text that has the unit of a kind's price, and tells what a kind without a price costs.
func priceKindHelp(k priceKind) string {
	none := noRates()
	switch fallback := none.fallbackKind(k); {
	case fallback == kindInput && k != kindInput:
		return "as-input"
	case fallback == kindOutput && k != kindOutput:
		return "as-output"
	}
	return [...]string{perToken: "per-token", perCharacter: "per-character", perMinuteOfMedia: "per-minute",
		perPiece: "per-piece"}[priceKinds[k].unit]
}

func (in *priceInput) applyMatch(p *priceRow) error {
	p.match = in.match.value
	isControl := func(c rune) bool { return c <= ' ' || c == 0x7f }
	if p.match == "" || len(p.match) > 256 || strings.ContainsFunc(p.match, isControl) {
		return &fieldError{"match", "must be a model's name, or a pattern with *, of 1 to 256 bytes"}
	}
	return nil
}

func (in *priceInput) applyValidFrom(p *priceRow) error {
	if !in.validFrom.hasValue() {
		return nil
	}
	t, err := time.Parse(time.RFC3339, string(in.validFrom.value))
	if err != nil || t.UnixMilli() <= 0 || t.Year() > 9999 {
		return &fieldError{"valid_from", "must be a time such as 2027-01-01T00:00:00Z, or null for always"}
	}
	p.validFrom = t.UnixMilli()
	return nil
}

// amountText returns a price as it was sent, a JSON number or a string.
func amountText(in optional[json.RawMessage]) string { return strings.Trim(string(in.value), `"`) }

// checkAmount checks a price that was sent.
func checkAmount(in optional[json.RawMessage], info priceKindInfo) error {
	if !in.hasValue() {
		return nil
	}
	if _, err := info.unit.parse(amountText(in)); err != nil {
		return &fieldError{info.name, info.unit.rule()}
	}
	return nil
}

// rule says what a price of the unit must be.
func (u priceUnit) rule() string {
	switch u {
	case perToken:
		return "must be dollars per million tokens: 0 to 1000000, with at most 6 decimals"
	case perCharacter:
		return "must be dollars per million characters: 0 to 1000000, with at most 6 decimals"
	case perMinuteOfMedia:
		return "must be dollars per minute: 0 to 1000, with at most 12 decimals"
	}
	return "must be dollars for one: 0 to 1000, with at most 12 decimals"
}

// apply checks the input and stores it in the row.
func (in *priceInput) apply(tables *fieldTables, p *priceRow) error {
	if err := applyFields(in, p, tables.price); err != nil {
		return err
	}
	members := priceMembers{}
	for k, amount := range in.amounts {
		if amount.hasValue() {
			unit := priceKinds[k].unit
			pico, _ := unit.parse(amountText(amount)) // it was checked
			members[priceKinds[k].name] = json.RawMessage(unit.format(pico))
		}
	}
	if !hasBasePrice(members) {
		return &fieldError{"input", "or output is required, or the price of something that is not a token"}
	}
	for i, part := range in.parts {
		if part.hasValue() {
			if _, err := parsePrice(priceMembers{pricePartNames[i]: slices.Clone(part.value)}); err != nil {
				return &fieldError{pricePartNames[i], pricePartRules[i]}
			}
			members[pricePartNames[i]] = part.value
		}
	}
	text, err := json.Marshal(members)
	if err != nil {
		return fmt.Errorf("writing a price: %w", err)
	}
	if len(text) > maxPriceBytes {
		return &fieldError{"", fmt.Sprintf("A price must have at most %d bytes.", maxPriceBytes)}
	}
	p.price = string(text)
	return nil
}

const maxPriceBytes = 8 << 10

// hasBasePrice reports whether a price is more than a discount or a surcharge.
func hasBasePrice(m priceMembers) bool {
	for k, info := range priceKinds {
		_, ok := m[info.name]
		if ok && (priceKind(k) == kindInput || priceKind(k) == kindOutput || priceKind(k) >= numTokenKinds) {
			return true
		}
	}
	return false
}

// A priceView is a price as the management API shows it: an object that has every kind of usage and every other part of
// a price, too, null where this price has none of its own.
type priceView struct {
	ID        string // "": a list price
	Match     string
	ValidFrom *timestamp   // null: always
	Members   priceMembers // the kinds and other parts that it has
	Provider  string       // of a list price
	AsOf      string       // the date of the list that a list price is from
	UpdatedAt *timestamp   // null: a list price
}

func (v priceView) MarshalJSON() ([]byte, error) {
	object := map[string]any{"id": v.ID, "match": v.Match, "valid_from": v.ValidFrom, "provider": v.Provider,
		"as_of": v.AsOf, "updated_at": v.UpdatedAt}
	for _, info := range priceKinds {
		object[info.name] = v.Members[info.name]
	}
	for _, name := range pricePartNames {
		object[name] = v.Members[name]
	}
	return json.Marshal(object)
}

// newPriceView shows a price of the operator.
func newPriceView(p *priceRow) priceView {
	v := priceView{ID: p.id, Match: p.match, UpdatedAt: new(timestamp(p.updatedAt))}
	if p.validFrom != 0 {
		v.ValidFrom = new(timestamp(p.validFrom))
	}
	_ = json.Unmarshal([]byte(p.price), &v.Members) // the program wrote it
	return v
}

// newEffectivePriceView shows the price that holds for a model.
func newEffectivePriceView(model string, p *price) priceView {
	var b billedPrice
	_ = json.Unmarshal([]byte(p.text), &b) // the program wrote it
	return priceView{Match: model, Provider: p.from.Provider, AsOf: p.from.Date, Members: b.Price}
}

// effectivePrice returns the price that holds for a model now, nil if there is none.
func (ops *operations) effectivePrice(provider, model string, now time.Time) *price {
	return ops.prices.Load().lookup(provider, model, now.UnixMilli())
}

// listPrices returns the operator's own prices or, with ?model=, the effective price of that model.
func (api *manageAPI) listPrices(r *manageRequest) (any, error) {
	out := listPage[priceView]{Data: []priceView{}}
	if model := r.query.Get("model"); model != "" {
		if p := api.ops.effectivePrice(r.query.Get("provider"), model, r.now); p != nil {
			out.Data = append(out.Data, newEffectivePriceView(model, p))
		}
		return out, nil
	}
	rows, err := api.store.listPrices(r.ctx)
	return newListPage(rows, len(rows), newPriceView, nil), err
}

func (api *manageAPI) listListPrices(r *manageRequest) (any, error) { return api.ops.listListPrices(r) }

// listListPrices returns a page of the built-in list: models with search in their names, in the order of the list.
func (ops *operations) listListPrices(r *manageRequest) (listPage[priceView], error) {
	page, err := r.parseListQuery()
	if err != nil {
		return listPage[priceView]{}, err
	}
	rows := ops.prices.Load().search(r.query.Get("search"), r.query.Get("provider"))
	rows = rows[min(int64(len(rows)), page.seq):]
	position := page.seq
	return newListPage(rows, page.limit, func(p **price) priceView {
		position++
		return newEffectivePriceView((*p).from.Name, *p)
	}, func(**price) string { return formatCursor(position, "") }), nil
}

func (api *manageAPI) setPrice(r *manageRequest, in priceInput) (any, error) {
	p, err := api.ops.setPrice(r.ctx, r.origin, in)
	return created{newPriceView(&p)}, err
}

func (api *manageAPI) deletePrice(r *manageRequest) (any, error) {
	return r.deleted("id", api.ops.deletePrice(r.ctx, r.origin, r.pathValue("id")))
}

// A costBreakdown says what a cost is made of. The costs of its lines add up to its cost.
type costBreakdown struct {
	Cost  dollars         `json:"cost"`
	Lines []costLineReply `json:"lines"`
	Price priceSource     `json:"price"`
}

// A costLineReply is a quantity of one kind at a price, or what a multiplier adds to the lines before it.
type costLineReply struct {
	Kind       string           `json:"kind"`                 // of usage, or the name of the multiplier
	Quantity   *int64           `json:"quantity,omitempty"`   // of a multiplier: absent
	Unit       string           `json:"unit,omitempty"`       // of the quantity
	Price      *json.RawMessage `json:"price,omitempty"`      // dollars
	Per        string           `json:"per,omitempty"`        // what the price is for
	Multiplier *json.RawMessage `json:"multiplier,omitempty"` // absent in a quantity
	Cost       dollars          `json:"cost"`
}

// A priceSource names a price.
type priceSource struct {
	Source   string `json:"source"` // list or own
	Name     string `json:"name"`   // the listed model, or what the own price matches
	Provider string `json:"provider"`
	AsOf     string `json:"as_of"` // the date of the list
	ID       string `json:"id"`    // of the own price
}

func newPriceSource(p *price) priceSource {
	s := priceSource{Source: "list", Name: p.from.Name, Provider: p.from.Provider, AsOf: p.from.Date, ID: p.from.OwnID}
	if s.ID != "" {
		s.Source = "own"
	}
	return s
}

// unitNames returns the name of a quantity of the unit, and what its price is for.
func (u priceUnit) names() (quantity, per string) {
	switch u {
	case perToken:
		return "token", "million tokens"
	case perCharacter:
		return "character", "million characters"
	case perMinuteOfMedia:
		return "millisecond", "minute"
	}
	return "piece", "piece"
}

// newCostBreakdown returns the parts of a cost, nil if the cost is not known.
func newCostBreakdown(p *price, c *tokenCounts, d *usageDetails) *costBreakdown {
	lines := []costLine{}
	nanos, ok := p.cost(c, d, &lines)
	if !ok {
		return nil
	}
	b := &costBreakdown{Cost: dollars(nanos), Lines: []costLineReply{}, Price: newPriceSource(p)}
	for _, l := range lines {
		reply := costLineReply{Kind: l.name, Cost: dollars(l.nanos)}
		if l.multiplier != 0 {
			reply.Multiplier = new(json.RawMessage(formatDecimal(l.multiplier, 4)))
		} else {
			info := priceKinds[l.kind]
			reply.Kind, reply.Quantity = info.name, &l.quantity
			reply.Unit, reply.Per = info.unit.names()
			reply.Price = new(json.RawMessage(info.unit.format(l.rate)))
		}
		b.Lines = append(b.Lines, reply)
	}
	return b
}

// breakdownOf returns what the cost of a call is made of, at the price that held when it began; nil if it has no
// cost, if that is a sum of several costs, as with a batch, or if the call is from a time when prices were not kept.
// The list has the kinds of usage of which the price has none, if that is why there is no cost.
func (ops *operations) breakdownOf(ctx context.Context, v *requestView) (*costBreakdown, []string, error) {
	text, err := ops.store.billedPrice(ctx, v.billedPriceID)
	if errors.Is(err, errNotFound) {
		return nil, []string{}, nil
	}
	if err != nil {
		return nil, nil, err
	}
	p, err := parseBilledPrice(text)
	switch {
	case err != nil:
		return nil, nil, fmt.Errorf("reading the price of a call: %w", err)
	case v.nullCost == nil:
		return nil, p.unpricedKinds(&v.counts, &v.details), nil
	}
	if b := newCostBreakdown(p, &v.counts, &v.details); b != nil && b.Cost == dollars(*v.nullCost) {
		return b, []string{}, nil
	}
	return nil, []string{}, nil
}

// describe writes the price for people: where it is from, and a line for each part.
func (p *price) describe() string {
	var out strings.Builder
	source := newPriceSource(p)
	if source.Source == "own" {
		fmt.Fprintf(&out, "%s: your own price %s\n", source.Name, source.ID)
	} else {
		fmt.Fprintf(&out, "%s of %s, list price of %s\n", source.Name, cmp.Or(source.Provider, "any provider"),
			cmp.Or(source.AsOf, "no date"))
	}
	p.rates.describe(&out, "")
	for _, l := range p.above {
		l.describe(&out, fmt.Sprintf("above %s input tokens: ", strconv.FormatInt(l.threshold, 10)))
	}
	for tier, t := range p.tiers {
		if t != nil {
			t.describe(&out, serviceTierNames[tier]+": ")
			for _, l := range t.above {
				l.describe(&out, serviceTierNames[tier]+" above "+strconv.FormatInt(l.threshold, 10)+" input tokens: ")
			}
		}
	}
	for _, m := range []struct {
		name string
		ten4 int64
	}{{"us", p.us}, {"eu", p.eu}, {"fast", p.fast}} {
		if m.ten4 != 0 {
			fmt.Fprintf(&out, "  tokens, %s: x %s\n", m.name, formatDecimal(m.ten4, 4))
		}
	}
	return out.String()
}

func (r *rates) describe(out *strings.Builder, prefix string) {
	for k, info := range priceKinds {
		if r[k] >= 0 {
			_, per := info.unit.names()
			fmt.Fprintf(out, "  %s%s: $%s per %s\n", prefix, info.label, info.unit.format(r[k]), per)
		}
	}
}

// search returns the listed prices of a provider, "" for all, whose models have text in one of their names, ordered
// by provider and model.
func (t *priceTable) search(text, provider string) []*price {
	found := map[*price]bool{}
	for k, p := range t.listed {
		matches := strings.Contains(strings.ToLower(k.model), strings.ToLower(text))
		if matches && (provider == "" || k.provider == provider) {
			found[p] = true
		}
	}
	return slices.SortedFunc(maps.Keys(found), func(a, b *price) int {
		return cmp.Or(cmp.Compare(a.from.Provider, b.from.Provider), cmp.Compare(a.from.Name, b.from.Name))
	})
}

// listedProviders returns the providers of the built-in list, in order.
func (t *priceTable) listedProviders() []string {
	names := map[string]bool{}
	for k := range t.listed {
		names[k.provider] = true
	}
	return slices.Sorted(maps.Keys(names))
}

// A simulateInput asks what usage would cost with a model: usage of one call, or that of a time.
type simulateInput struct {
	model, provider, api, serviceTier, projectID, from, to optional[string]
	usage, counts                                          optional[json.RawMessage]
}

// A simulation is what usage of one call would cost.
type simulation struct {
	Model            string         `json:"model"`
	UsageSource      usageSource    `json:"usage_source"` // estimated: the usage object lacks counts
	InputTokens      int64          `json:"input_tokens"`
	CachedTokens     int64          `json:"cached_tokens"`
	CacheWriteTokens int64          `json:"cache_write_tokens"`
	OutputTokens     int64          `json:"output_tokens"`
	ReasoningTokens  int64          `json:"reasoning_tokens"`
	UsageDetails     usageDetails   `json:"usage_details"`
	Cost             *dollars       `json:"cost"` // null: there is no price for this usage
	CostBreakdown    *costBreakdown `json:"cost_breakdown"`
}

// simulate returns what usage would cost. It changes nothing.
func (api *manageAPI) simulate(r *manageRequest) (any, error) {
	var in simulateInput
	err := decodeObject(r.body, map[string]any{"model": &in.model, "provider": &in.provider, "api": &in.api,
		"service_tier": &in.serviceTier, "usage": &in.usage, "counts": &in.counts, "project_id": &in.projectID,
		"from": &in.from, "to": &in.to})
	if err != nil {
		return nil, err
	}
	return api.ops.simulate(r, &in)
}

// simulate returns a *simulation of the usage that is given, or a *periodSimulation if none is.
func (ops *operations) simulate(r *manageRequest, in *simulateInput) (any, error) {
	for _, f := range [...]struct {
		name string
		in   optional[json.RawMessage]
	}{{"usage", in.usage}, {"counts", in.counts}} {
		if f.in.hasValue() && f.in.value[0] != '{' {
			return nil, &fieldError{f.name, "must be an object"}
		}
	}
	if in.model.value == "" {
		return nil, &fieldError{"model", "is required"}
	}
	switch {
	case in.usage.hasValue() && in.counts.hasValue():
		return nil, &fieldError{"counts", "must not be given together with usage"}
	case in.usage.hasValue() || in.counts.hasValue():
		return ops.simulateCall(in, r.now)
	}
	return ops.simulatePeriod(r, in)
}

func (ops *operations) simulateCall(in *simulateInput, now time.Time) (*simulation, error) {
	out := &simulation{Model: in.model.value, UsageSource: usageExact}
	var counts tokenCounts
	var err error
	if in.usage.hasValue() {
		counts, out.UsageDetails, out.UsageSource, err = in.readUsage()
	} else {
		counts, err = in.readCounts(&out.UsageDetails)
	}
	if err != nil {
		return nil, err
	}
	if text := in.serviceTier.value; text != "" {
		out.UsageDetails.tier = serviceTierOf([]byte(text))
	}
	if p := ops.effectivePrice(in.provider.value, out.Model, now); p != nil {
		out.CostBreakdown = newCostBreakdown(p, &counts, &out.UsageDetails)
	}
	if out.CostBreakdown != nil {
		out.Cost = &out.CostBreakdown.Cost
	}
	out.InputTokens, out.CachedTokens, out.CacheWriteTokens = counts.input, counts.cached, counts.cacheWrite
	out.OutputTokens, out.ReasoningTokens = counts.output, counts.reasoning
	out.UsageDetails.audioInput, out.UsageDetails.audioOutput = counts.audioInput, counts.audioOutput
	return out, nil
}

// readUsage reads a provider's usage object, as a meter reads it in an answer.
func (in *simulateInput) readUsage() (tokenCounts, usageDetails, usageSource, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(in.usage.value, &members); err != nil {
		return tokenCounts{}, usageDetails{}, usageNone, &fieldError{"usage", "must be a usage object of a provider"}
	}
	kind, known := map[string]meterKind{"": meterOpenAI, "openai": meterOpenAI, "anthropic": meterAnthropic,
		"embeddings": meterEmbeddings, "gemini": meterGemini}[in.api.value]
	has := func(name string) bool { return members[name] != nil }
	switch {
	case !known:
		return tokenCounts{}, usageDetails{}, usageNone,
			&fieldError{"api", "must be openai, anthropic, gemini or embeddings"}
	case in.api.value != "":
	case has("cache_read_input_tokens") || has("cache_creation_input_tokens") || has("server_tool_use"):
		kind = meterAnthropic
	case has("promptTokenCount") || has("totalTokenCount") || has("total_input_tokens"):
		kind = meterGemini
	}
	m := newMeter(kind, false, false, false)
	m.process(mustMarshal(map[string]any{"model": in.model.value, "usage": in.usage.value}))
	m.finish()
	return m.counts, m.details, m.source(), nil
}

// readCounts reads counts by the names that the ledger has for them.
func (in *simulateInput) readCounts(d *usageDetails) (c tokenCounts, err error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(in.counts.value, &members); err != nil {
		return c, &fieldError{"counts", "must be an object of counts"}
	}
	for _, f := range [...]usageCount{{"input_tokens", &c.input}, {"cached_tokens", &c.cached},
		{"cache_write_tokens", &c.cacheWrite}, {"output_tokens", &c.output}, {"reasoning_tokens", &c.reasoning}} {
		text, ok := members[f.name]
		if !ok {
			continue
		}
		n := parseTokenCount(text)
		if n < 0 || text[0] == '"' {
			return c, &fieldError{"counts", f.name + " must be a whole number of 0 or more"}
		}
		*f.count = n
		delete(members, f.name)
	}
	rest, err := json.Marshal(members)
	if err != nil {
		return c, fmt.Errorf("reading counts: %w", err)
	}
	if err := d.UnmarshalJSON(rest); err != nil {
		return c, &fieldError{"counts", "must have counts and conditions by the names of a call, nothing else"}
	}
	c.audioInput, c.audioOutput = d.audioInput, d.audioOutput
	d.audioInput, d.audioOutput = 0, 0
	return c, nil
}

// A periodSimulation is what the usage of a time would have cost with one model.
type periodSimulation struct {
	Model      string              `json:"model"`
	From       timestamp           `json:"from"`
	To         timestamp           `json:"to"`
	ActualCost dollars             `json:"actual_cost"` // of the calls whose cost is known
	Cost       *dollars            `json:"cost"`        // null: the model has no price for this usage
	Data       []simulatedModelSum `json:"data"`
}

// A simulatedModelSum is the part of one model in a periodSimulation.
type simulatedModelSum struct {
	Model           string   `json:"model"`
	Calls           int64    `json:"calls"`
	InputTokens     int64    `json:"input_tokens"`
	CachedTokens    int64    `json:"cached_tokens"`
	OutputTokens    int64    `json:"output_tokens"`
	ReasoningTokens int64    `json:"reasoning_tokens"`
	ActualCost      dollars  `json:"actual_cost"`
	Cost            *dollars `json:"cost"`
}

// simulatePeriod prices the sums of a time, by default of the previous month. Sums have neither the length of single
// inputs nor tools, so the prices for short inputs hold, and tools are left out.
func (ops *operations) simulatePeriod(r *manageRequest, in *simulateInput) (*periodSimulation, error) {
	now := r.now.UTC()
	thisMonth := time.Date(now.Year(), now.Month(), 1, 0, 0, 0, 0, time.UTC)
	from, to := thisMonth.AddDate(0, -1, 0), thisMonth
	for _, f := range []struct {
		name   string
		text   optional[string]
		target *time.Time
	}{{"from", in.from, &from}, {"to", in.to, &to}} {
		if f.text.hasValue() {
			t, err := time.Parse(time.RFC3339, f.text.value)
			if err != nil {
				return nil, &fieldError{f.name, "must be a time such as 2026-11-01T00:00:00Z"}
			}
			*f.target = t.UTC().Truncate(24 * time.Hour)
		}
	}
	rows, err := ops.store.usage(r.ctx, usageQuery{interval: "total", project: in.projectID.value, byModel: true,
		from: from.UnixMilli(), to: to.UnixMilli(), limit: maxUsageRows})
	if err != nil {
		return nil, err
	}
	p := ops.effectivePrice(in.provider.value, in.model.value, r.now)
	out := &periodSimulation{Model: in.model.value, From: timestamp(from.UnixMilli()), To: timestamp(to.UnixMilli()),
		Data: []simulatedModelSum{}}
	var total int64
	known := p != nil
	for i := range rows {
		u := &rows[i]
		v := simulatedModelSum{Model: u.model, Calls: u.calls, InputTokens: u.input, CachedTokens: u.cached,
			OutputTokens: u.output, ReasoningTokens: u.reasoning, ActualCost: dollars(u.cost)}
		out.ActualCost = dollars(addSat(int64(out.ActualCost), u.cost))
		if p != nil {
			counts := tokenCounts{input: u.input, cached: u.cached, output: u.output, reasoning: u.reasoning}
			if nanos, ok := p.sumCost(&counts); ok {
				v.Cost, total = new(dollars(nanos)), addSat(total, nanos)
			} else {
				known = false
			}
		}
		out.Data = append(out.Data, v)
	}
	if known {
		out.Cost = new(dollars(total))
	}
	return out, nil
}
