// This file has the price list: the embedded list prices, the operator's own prices, and the search for the price of
// a model. Names of the list match exactly, but for dates; only the operator's prices may be patterns. What a price
// makes of a call is in prices_cost.go. Plain code: it does no I/O but reading the operator's prices.
package main

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// effectivePrices returns the list prices with the operator's own prices.
func effectivePrices(ctx context.Context, st *store) (*priceTable, error) {
	listed, err := loadPrices()
	if err != nil {
		return nil, err
	}
	rows, err := st.listPrices(ctx)
	if err != nil {
		return nil, err
	}
	own := make([]ownPrice, 0, len(rows))
	for i := range rows {
		o, err := rows[i].ownPrice()
		if err != nil {
			return nil, err
		}
		own = append(own, o)
	}
	return listed.withOwnPrices(own), nil
}

// ownPrice returns the price that an administrator set.
func (r *priceRow) ownPrice() (ownPrice, error) {
	var m priceMembers
	if err := json.Unmarshal([]byte(r.price), &m); err != nil {
		return ownPrice{}, fmt.Errorf("reading the price of %s: %w", r.match, err)
	}
	p, err := newPrice(m, priceOrigin{Name: r.match, OwnID: r.id})
	if err != nil {
		return ownPrice{}, fmt.Errorf("reading the price of %s: %w", r.match, err)
	}
	return ownPrice{match: r.match, validFrom: r.validFrom, price: p}, nil
}

// pricesJSON is the price list; its member "about" describes it. deploy/prices makes it.
//
//go:embed prices.json
var pricesJSON string

// A priceTable finds the price of a model. It is immutable and safe for concurrent use.
type priceTable struct {
	date   string              // of the list
	listed map[priceKey]*price // by provider and name
	sized  map[string]bool     // models whose pictures have prices by quality and size
	any    map[string]*price   // by name: that of the first provider in the order of priceProviders
	free   *price

	ownExact    map[string][]ownPrice // of one name, the latest validFrom first
	ownPatterns []ownPrice            // longest first, then the latest validFrom
}

type priceKey struct{ provider, model string }

// An ownPrice is the operator's price of the models that match, where `*` stands for any text.
type ownPrice struct {
	match     string
	validFrom int64 // unix milliseconds; 0: always
	price     *price
}

// priceProviders are the providers in the list, in the order of the search where the provider is not known. A price
// of the company that made the model comes before one of a host.
func priceProviders() []string {
	return []string{"openai", "anthropic", "google", "mistral", "deepseek", "x-ai", "cohere", "moonshotai", "zhipuai",
		"voyageai", "perplexity", "groq", "cerebras", "azure"}
}

// loadPrices returns the embedded list, which is read once.
var loadPrices = sync.OnceValues(func() (*priceTable, error) {
	t, err := parsePrices(pricesJSON)
	if err != nil {
		return nil, fmt.Errorf("reading the embedded prices: %w", err)
	}
	return t, nil
})

// parsePrices reads a price list such as prices.json.
func parsePrices(text string) (*priceTable, error) {
	var list struct {
		Currency string                  `json:"currency"`
		Per      int64                   `json:"per_tokens"`
		Date     string                  `json:"as_of"`
		Tools    map[string]priceMembers `json:"tools"`
		Models   []priceMembers          `json:"models"`
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return nil, err
	}
	if list.Currency != "USD" || list.Per != 1_000_000 {
		return nil, errors.New("prices are not in US dollars per million tokens")
	}
	t := &priceTable{date: list.Date, listed: make(map[priceKey]*price, 2*len(list.Models)),
		any: make(map[string]*price, 2*len(list.Models)), sized: map[string]bool{}, free: freePrice()}
	for _, m := range list.Models {
		if err := t.addListed(m, list.Tools); err != nil {
			return nil, err
		}
	}
	rank := priceProviders()
	best := make(map[string]int, len(t.listed))
	for k, p := range t.listed {
		r := slices.Index(rank, k.provider)
		if r < 0 {
			return nil, fmt.Errorf("%s is not a provider that prices are known of", k.provider)
		}
		if old, found := best[k.model]; !found || r < old {
			best[k.model], t.any[k.model] = r, p
		}
	}
	return t, nil
}

// freePrice returns the price of models that are free by their names.
func freePrice() *price {
	free := make(priceMembers, numPriceKinds)
	for _, info := range priceKinds {
		free[info.name] = json.RawMessage("0")
	}
	p, err := newPrice(free, priceOrigin{Name: "*:free"})
	if err != nil { // cannot happen: each kind may cost 0
		return nil
	}
	p.allTiers = true
	return p
}

// priceMembers are the members of a price in JSON, or of a part of it.
type priceMembers map[string]json.RawMessage

// addListed adds one entry of the list, under all names of the model. tools are the prices of tools that hold for all
// models of a provider.
func (t *priceTable) addListed(m priceMembers, tools map[string]priceMembers) error {
	var provider, model string
	var names []string
	date := t.date
	for _, f := range []struct {
		name   string
		target any
	}{{"provider", &provider}, {"model", &model}, {"names", &names}, {"as_of", &date}} {
		if text, ok := m[f.name]; ok {
			if err := json.Unmarshal(text, f.target); err != nil {
				return fmt.Errorf("%s %s: %s: %w", provider, model, f.name, err)
			}
			delete(m, f.name)
		}
	}
	for name, text := range tools[provider] {
		if _, ok := m[name]; !ok {
			m[name] = text
		}
	}
	p, err := newPrice(m, priceOrigin{Name: model, Provider: provider, Date: date})
	if err != nil {
		return fmt.Errorf("%s %s: %w", provider, model, err)
	}
	for _, name := range append(names, model) {
		key := priceKey{provider, name}
		if _, exists := t.listed[key]; exists || name == "" || strings.Contains(name, "*") {
			return fmt.Errorf("%s %s: the name %q is listed twice, empty, or a pattern", provider, model, name)
		}
		t.listed[key] = p
		if parts := strings.Split(name, "/"); len(parts) == 3 && strings.Contains(parts[1], "-x-") {
			t.sized[parts[2]] = true
		}
	}
	return nil
}

// parsePrice reads the price of one model: its rates by the names of priceKinds, and above_input_tokens,
// service_tier, multiplier and unknown_above_input_tokens.
func parsePrice(m priceMembers) (*price, error) {
	p := &price{}
	var err error
	if p.tierPrice, err = parseTierPrice(m, "above_input_tokens", nil); err != nil {
		return nil, err
	}
	if text, ok := m["service_tier"]; ok {
		var tiers map[string]priceMembers
		if err := json.Unmarshal(text, &tiers); err != nil {
			return nil, fmt.Errorf("service_tier: %w", err)
		}
		for name, members := range tiers {
			tier := serviceTierOf([]byte(name))
			if tier == tierStandard || tier == tierOther {
				return nil, fmt.Errorf("service_tier: %q is not a tier", name)
			}
			t, err := parseTierPrice(members, "above", &p.tierPrice)
			if err != nil {
				return nil, fmt.Errorf("service_tier %s: %w", name, err)
			}
			p.tiers[tier] = &t
		}
	}
	if err := p.parseMultipliers(m["multiplier"]); err != nil {
		return nil, err
	}
	if text, ok := m["unknown_above_input_tokens"]; ok {
		if p.hiddenAbove, err = strconv.ParseInt(string(text), 10, 64); err != nil || p.hiddenAbove <= 0 {
			return nil, errors.New("unknown_above_input_tokens is not a number of tokens")
		}
	}
	return p, nil
}

// parseTierPrice reads the price in one tier. standard is that of the standard tier, nil for itself.
func parseTierPrice(m priceMembers, aboveName string, standard *tierPrice) (t tierPrice, err error) {
	if t.rates, err = parseRates(m, aboveName); err != nil {
		return t, err
	}
	if standard != nil {
		t.hideUnlisted(&standard.rates, true)
	}
	text, ok := m[aboveName]
	if !ok {
		return t, nil
	}
	var above map[string]priceMembers
	if err := json.Unmarshal(text, &above); err != nil {
		return t, fmt.Errorf("%s: %w", aboveName, err)
	}
	for threshold, members := range above {
		l := longContextPrice{}
		if l.threshold, err = strconv.ParseInt(threshold, 10, 64); err != nil || l.threshold <= 0 {
			return t, fmt.Errorf("%s: %q is not a number of tokens", aboveName, threshold)
		}
		if l.rates, err = parseRates(members, ""); err != nil {
			return t, fmt.Errorf("%s: %w", aboveName, err)
		}
		l.hideUnlisted(&t.rates, false)
		t.above = append(t.above, l)
	}
	slices.SortFunc(t.above, func(a, b longContextPrice) int { return cmp.Compare(b.threshold, a.threshold) })
	return t, nil
}

// hideUnlisted marks the kinds that have prices of their own in the rates that r replaces, and none in r: what they
// cost is not known. A kind that costs as much as another one there does so here. A tier that lists no price for
// cached tokens gives no discount on them.
func (r *rates) hideUnlisted(base *rates, tier bool) {
	for k := range numPriceKinds {
		next := base.fallbackKind(k)
		follows := next != k && base[k] == base[next] || tier && k == kindCachedInput
		if r[k] == noPrice && base[k] != noPrice && !k.isTool() && !follows {
			r[k] = hiddenPrice
		}
	}
}

// parseRates reads the members that are named after priceKinds, and refuses all but these and those that parsePrice
// reads.
func parseRates(m priceMembers, aboveName string) (rates, error) {
	r := noRates()
	known := 0
	for k, info := range priceKinds {
		text, ok := m[info.name]
		if !ok {
			continue
		}
		known++
		var err error
		if r[k], err = info.unit.parse(string(text)); err != nil {
			return r, fmt.Errorf("%s: %w", info.name, err)
		}
	}
	if known == len(m) {
		return r, nil
	}
	for name := range m {
		isKind := slices.ContainsFunc(priceKinds[:], func(info priceKindInfo) bool { return info.name == name })
		isPart := name == aboveName || aboveName == "above_input_tokens" &&
			(name == "service_tier" || name == "multiplier" || name == "unknown_above_input_tokens")
		if !isKind && !isPart {
			return r, fmt.Errorf("%q is not a member of a price", name)
		}
	}
	return r, nil
}

func (p *price) parseMultipliers(text json.RawMessage) error {
	if text == nil {
		return nil
	}
	var multipliers map[string]json.Number
	if err := json.Unmarshal(text, &multipliers); err != nil {
		return fmt.Errorf("multiplier: %w", err)
	}
	for name, value := range multipliers {
		target := map[string]*int64{"us": &p.us, "eu": &p.eu, "fast": &p.fast}[name]
		n, err := parseDecimal(value.String(), 2, 1_000)
		if target == nil || err != nil || n == 0 {
			return fmt.Errorf("multiplier: %q is not one of us, eu and fast with at most two decimals", name)
		}
		*target = n * (multiplierOne / 100)
	}
	return nil
}

// A billedPrice is the form in which the ledger keeps a price.
type billedPrice struct {
	priceOrigin
	Price priceMembers `json:"price"`
}

// newPrice reads the price of one model, and completes it with where it is from, its text and its id.
func newPrice(m priceMembers, from priceOrigin) (*price, error) {
	p, err := parsePrice(m)
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(billedPrice{from, m})
	if err != nil {
		return nil, err
	}
	h := fnv.New64a()
	h.Write(text)
	p.from, p.text, p.id, p.allTiers = from, string(text), int64(h.Sum64()>>1), from.OwnID != "" && p.isFlat()
	return p, nil
}

// isFlat reports whether nothing but the kind of usage makes a difference.
func (p *price) isFlat() bool {
	return p.tiers == [numServiceTiers]*tierPrice{} && p.us == 0 && p.eu == 0 && p.fast == 0
}

// parseBilledPrice reads a price that the ledger keeps.
func parseBilledPrice(text string) (*price, error) {
	var b billedPrice
	if err := json.Unmarshal([]byte(text), &b); err != nil {
		return nil, err
	}
	return newPrice(b.Price, b.priceOrigin)
}

// withOwnPrices returns a table with these prices of the operator instead of any earlier ones. A model that matches
// one of them has only its prices, none from the list. Of two with the same match and time the later one counts.
func (t *priceTable) withOwnPrices(own []ownPrice) *priceTable {
	changed := *t
	changed.ownExact, changed.ownPatterns = make(map[string][]ownPrice), nil
	latestFirst := func(a, b ownPrice) int { return cmp.Compare(b.validFrom, a.validFrom) }
	for _, o := range slices.Backward(own) {
		if strings.Contains(o.match, "*") {
			changed.ownPatterns = append(changed.ownPatterns, o)
		} else {
			changed.ownExact[o.match] = append(changed.ownExact[o.match], o)
		}
	}
	for _, versions := range changed.ownExact {
		slices.SortStableFunc(versions, latestFirst)
	}
	slices.SortStableFunc(changed.ownPatterns, func(a, b ownPrice) int {
		return cmp.Or(cmp.Compare(len(b.match), len(a.match)), latestFirst(a, b))
	})
	return &changed
}

// lookup returns the price of a model at a time in unix milliseconds, or nil if there is none. vendor is that of
// priceVendor. The operator's prices come first. Then the vendor's own entries in the list count, and for azure also
// openai's. Where the vendor is not known, every provider's entries count: a name like "openai/gpt-4o" prefers
// openai, and is also looked up without that part.
func (t *priceTable) lookup(vendor, model string, at int64) *price {
	anyVendor := vendor == "compatible" || vendor == ""
	preferred, short := "", model
	if i := strings.LastIndexByte(model, '/'); i >= 0 {
		preferred, short = model[:i], model[i+1:]
	}
	if p := t.lookupOwn(model, short, at); p != nil {
		return p
	}
	switch {
	case vendor == "openai" || vendor == "anthropic":
		return t.lookupListed(vendor, model)
	case vendor == "azure":
		return cmp.Or(t.lookupListed("azure", model), t.lookupListed("openai", model))
	case !anyVendor:
		return cmp.Or(t.lookupListed(vendor, model), t.lookupListed(vendor, short))
	case strings.HasSuffix(model, ":free"):
		return t.free
	}
	if preferred != "" {
		if p := t.lookupListed(prefixProvider(preferred), short); p != nil {
			return p
		}
	}
	return cmp.Or(t.lookupAny(model), t.lookupAny(short))
}

// priceRow fills in what the usage in a row costs, by the first of models that has a price for it. The first model is
// the one that answered; priceRow reports whether it has a price.
func (t *priceTable) priceRow(r *requestRow, vendor string, models ...string) (listed bool) {
	r.cost, r.priced, r.price, r.promptSaved = 0, false, nil, 0
	try := func(vendor, model string) (found bool) {
		if p := t.lookupPicture(vendor, model, r); p != nil {
			if r.cost, r.priced = p.cost(&r.counts, &r.details, nil); r.priced {
				r.price, r.promptSaved = p, p.promptSaved(r)
			} else if r.price == nil {
				r.price = p // it says which prices are missing
			}
			return true
		}
		return false
	}
	for i, model := range models {
		if model != "" && !r.priced && try(vendor, model) && i == 0 {
			listed = true
		}
	}
	if !r.priced && len(models) > 1 { // the call may have been admitted at another provider
		try("", models[len(models)-1])
	}
	return listed
}

// lookupPicture is lookup for a row. Pictures may have prices of their own by quality and size, under names such as
// low/1024-x-1024/MODEL. If there are some and the row lacks these, its cost is an estimate.
func (t *priceTable) lookupPicture(vendor, model string, r *requestRow) *price {
	size := strings.Replace(r.pictureSize, "x", "-x-", 1)
	if r.details.outputPictures > 0 && t.sized[model[strings.LastIndexByte(model, '/')+1:]] {
		if size == "" || size == "auto" || r.pictureQuality == "" || r.pictureQuality == "auto" {
			r.source = usageEstimated
		}
		if p := t.lookup(vendor, r.pictureQuality+"/"+size+"/"+model, r.started); p != nil {
			return p
		}
	}
	return t.lookup(vendor, model, r.started)
}

// promptSaved returns by how much more the row would have cost if its cached input had been read anew.
func (p *price) promptSaved(r *requestRow) int64 {
	if r.counts.cached == 0 {
		return 0
	}
	counts, details := r.counts, r.details
	counts.cached, details.cachedAudio, details.cachedImage = 0, 0, 0
	cost, _ := p.cost(&counts, &details, nil)
	return max(cost-r.cost, 0)
}

// priceVendor returns whose prices hold at an upstream: its provider or, for one that is compatible, the company
// that the host belongs to, if the list has it.
func priceVendor(provider, host string) string {
	if provider != "compatible" {
		return provider
	}
	switch host {
	case "api.openai.com", "us.api.openai.com", "eu.api.openai.com":
		return "openai"
	case "api.anthropic.com":
		return "anthropic"
	case "generativelanguage.googleapis.com":
		return "google"
	case "api.mistral.ai":
		return "mistral"
	case "api.deepseek.com":
		return "deepseek"
	case "api.x.ai":
		return "x-ai"
	case "api.cohere.com", "api.cohere.ai":
		return "cohere"
	case "api.moonshot.ai", "api.moonshot.cn":
		return "moonshotai"
	case "api.z.ai", "open.bigmodel.cn":
		return "zhipuai"
	case "api.voyageai.com":
		return "voyageai"
	case "api.perplexity.ai":
		return "perplexity"
	case "api.groq.com":
		return "groq"
	case "api.cerebras.ai":
		return "cerebras"
	}
	return provider
}

// hostRegion returns the region in which an upstream's host processes calls.
func hostRegion(host string) inferenceRegion {
	region, rest, _ := strings.Cut(host, ".")
	if rest != "api.openai.com" {
		return regionAny
	}
	return inferenceRegionOf([]byte(region))
}

// prefixProvider returns the provider that the part of a name before the last slash means. Aggregators have other
// names for some providers.
func prefixProvider(prefix string) string {
	prefix = prefix[strings.LastIndexByte(prefix, '/')+1:]
	switch prefix {
	case "xai":
		return "x-ai"
	case "mistralai":
		return "mistral"
	case "gemini", "models": // Google's own names are models/gemini-2.5-pro
		return "google"
	case "z-ai", "zai", "zai-org", "thudm":
		return "zhipuai"
	case "moonshot":
		return "moonshotai"
	case "voyage":
		return "voyageai"
	}
	return prefix
}

// lookupOwn looks up the operator's prices, for the full name before the short one.
func (t *priceTable) lookupOwn(model, short string, at int64) *price {
	for _, name := range [...]string{model, short} {
		for _, o := range t.ownExact[name] {
			if o.validFrom <= at {
				return o.price
			}
		}
	}
	for _, o := range t.ownPatterns {
		if o.validFrom <= at && (matchName(o.match, model) || matchName(o.match, short)) {
			return o.price
		}
	}
	return nil
}

// lookupListed looks up the list prices of one provider.
func (t *priceTable) lookupListed(provider, model string) *price {
	for _, name := range listedNames(model) {
		if p := t.listed[priceKey{provider, name}]; p != nil && name != "" {
			return p
		}
	}
	return nil
}

// lookupAny looks up the list prices of all providers.
func (t *priceTable) lookupAny(model string) *price {
	for _, name := range listedNames(model) {
		if p := t.any[name]; p != nil {
			return p
		}
	}
	return nil
}

// listedNames returns the names under which the list may have a model: its own, without a date, and of a fine-tuned
// model that of its base, with ft: before it. "" is none.
func listedNames(model string) (names [4]string) {
	names[0], names[1] = model, withoutDate(model)
	if base, ok := strings.CutPrefix(model, "ft:"); ok {
		base, _, _ = strings.Cut(base, ":")
		names[2], names[3] = model[:len("ft:")+len(base)], withoutDate(model[:len("ft:")+len(base)])
	}
	return names
}

// withoutDate returns a model's name without the date or "-latest" at its end, "" if it has none.
func withoutDate(name string) string {
	if base, ok := strings.CutSuffix(name, "-latest"); ok {
		return base
	}
	for _, form := range [...]string{"-0000-00-00", "-00000000", "@00000000"} {
		i := len(name) - len(form)
		if i <= 0 {
			continue
		}
		matches := true
		for j := range len(form) {
			c := name[i+j]
			matches = matches && (c == form[j] && c != '0' || form[j] == '0' && c >= '0' && c <= '9')
		}
		if matches {
			return name[:i]
		}
	}
	return ""
}

// metricLabel returns a model's name for metrics: a name in the table, or the operator's pattern that the name
// matches, or "other". So clients cannot create labels by making up names.
func (t *priceTable) metricLabel(model string) string {
	short := model[strings.LastIndexByte(model, '/')+1:]
	for _, name := range [...]string{model, short} {
		if _, ok := t.ownExact[name]; ok {
			return name
		}
		for _, n := range listedNames(name) {
			if t.any[n] != nil {
				return n
			}
		}
	}
	for _, o := range t.ownPatterns {
		if matchName(o.match, model) || matchName(o.match, short) {
			return o.match
		}
	}
	return otherLabel
}

// matchName reports whether pattern, where each `*` stands for any text, matches the whole name. The leftmost
// place of each part always suffices, so there is no backtracking that a client could exploit.
func matchName(pattern, name string) bool {
	head, rest, star := strings.Cut(pattern, "*")
	if !star || !strings.HasPrefix(name, head) {
		return pattern == name
	}
	name = name[len(head):]
	for {
		part, after, more := strings.Cut(rest, "*")
		if !more {
			return strings.HasSuffix(name, part)
		}
		i := strings.Index(name, part)
		if i < 0 {
			return false
		}
		name, rest = name[i+len(part):], after
	}
}

// parse reads a price of one unit in dollars: of a million tokens or characters, of a minute, or of a piece. It
// returns pico-dollars for one token or character, for a minute, or for a piece.
func (u priceUnit) parse(text string) (pico int64, err error) {
	if u == perToken || u == perCharacter {
		return parseDollars(text)
	}
	return parseDecimal(text, 12, 1_000)
}

// format writes pico-dollars as parse reads them; "" for what is no price.
func (u priceUnit) format(pico int64) string {
	if u == perToken || u == perCharacter || pico < 0 {
		return formatDollars(pico)
	}
	return formatDecimal(pico, 12)
}

// formatDollars writes a price as parseDollars reads it: dollars per million tokens. noPrice gives "".
func formatDollars(pico int64) string {
	if pico < 0 {
		return ""
	}
	return formatDecimal(pico, 6)
}

// parseDollars reads a price in dollars per million tokens, such as "2.5", and returns pico-dollars per token.
// It accepts digits with at most one point between them, at most six decimals, and at most a million dollars.
func parseDollars(s string) (pico int64, err error) { return parseDecimal(s, 6, 1_000_000) }

// parseDecimal reads a decimal number such as "2.5" and returns it times 10^places. It accepts digits with at most
// one point between them.
func parseDecimal(s string, places int, highest int64) (int64, error) {
	whole, decimals, point := strings.Cut(s, ".")
	if !allDigits(whole) || point && !allDigits(decimals) {
		return 0, fmt.Errorf("%q is not a decimal number", s)
	}
	if len(decimals) > places {
		return 0, fmt.Errorf("%q has more than %d decimals", s, places)
	}
	n, err := strconv.ParseInt(whole+decimals+strings.Repeat("0", places-len(decimals)), 10, 64)
	for range places {
		highest *= 10
	}
	if err != nil || n > highest {
		return 0, fmt.Errorf("%q is too large", s)
	}
	return n, nil
}

// allDigits reports whether s is one or more ASCII digits.
func allDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}
