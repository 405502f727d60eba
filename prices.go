// This file has the prices of tokens: the embedded list prices, the operator's overrides, and the arithmetic
// from counts to money. All numbers are exact integers: pico-dollars per token and nano-dollars per call. There
// is no float, and a sum is rounded only once. Plain code: it does no I/O but reading the overrides.
package main

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"
)

// effectivePrices returns the list prices with the operator's overrides.
func effectivePrices(ctx context.Context, st *store) (*priceTable, error) {
	listed, err := loadPrices()
	if err != nil {
		return nil, err
	}
	rows, err := st.listPrices(ctx)
	if err != nil {
		return nil, err
	}
	value := func(p *int64) int64 {
		if p == nil {
			return noPrice
		}
		return *p
	}
	overrides := make([]priceOverride, 0, len(rows))
	for _, r := range rows {
		overrides = append(overrides, priceOverride{r.match, price{
			input: value(r.input), cachedInput: value(r.cachedInput), cacheWrite: value(r.cacheWrite),
			output: value(r.output), audioInput: value(r.audioInput), audioOutput: value(r.audioOutput),
		}})
	}
	return listed.withOverrides(overrides), nil
}

// pricesJSON is the price list; its member "about" describes it.
//
//go:embed prices.json
var pricesJSON string

const noPrice = -1

// A price is in pico-dollars per token, which is micro-dollars per million tokens and exact for every list
// price. A kind of token without a price has noPrice.
type price struct{ input, cachedInput, cacheWrite, output, audioInput, audioOutput int64 }

// cost returns the cost of c in nano-dollars, rounded half up, or math.MaxInt64 if it is higher than that. A
// kind of token without a price of its own costs what input or output costs. Tokens that are both cached and
// audio count as cached. cost returns false if tokens were used that have no price: unknown is not free.
func (p price) cost(c tokenCounts) (nanos int64, ok bool) {
	var sum uint128
	textInput := max(c.input, 0)
	split := func(n int64) int64 { // the parts never exceed the whole, so sum cannot overflow
		n = min(max(n, 0), textInput)
		textInput -= n
		return n
	}
	cached, cacheWrite, audioInput := split(c.cached), split(c.cacheWrite), split(c.audioInput)
	textOutput := max(c.output, 0)
	audioOutput := min(max(c.audioOutput, 0), textOutput)
	textOutput -= audioOutput
	ok = sum.addTokens(textInput, p.input, noPrice)
	ok = sum.addTokens(cached, p.cachedInput, p.input) && ok
	ok = sum.addTokens(cacheWrite, p.cacheWrite, p.input) && ok
	ok = sum.addTokens(audioInput, p.audioInput, p.input) && ok
	ok = sum.addTokens(textOutput, p.output, noPrice) && ok
	ok = sum.addTokens(audioOutput, p.audioOutput, p.output) && ok
	if !ok {
		return 0, false
	}
	return sum.roundedThousandth(), true
}

type uint128 struct{ hi, lo uint64 }

// addTokens adds the cost of n tokens at the given price, or at fallback if that is noPrice. It returns false
// if there are tokens and no price.
func (w *uint128) addTokens(n, price, fallback int64) bool {
	if price < 0 {
		price = fallback
	}
	if n == 0 || price < 0 {
		return n == 0
	}
	hi, lo := bits.Mul64(uint64(n), uint64(price))
	var carry uint64
	w.lo, carry = bits.Add64(w.lo, lo, 0)
	w.hi, _ = bits.Add64(w.hi, hi, carry)
	return true
}

// roundedThousandth returns w/1000 rounded half up, at most math.MaxInt64.
func (w uint128) roundedThousandth() int64 {
	lo, carry := bits.Add64(w.lo, 500, 0)
	hi := w.hi + carry
	if hi >= 1000 {
		return math.MaxInt64
	}
	q, _ := bits.Div64(hi, lo, 1000)
	return int64(min(q, math.MaxInt64))
}

// A priceTable finds the price of a model. It is immutable and safe for concurrent use.
type priceTable struct {
	exact     map[priceKey]price
	patterns  []pricePattern // longest first
	providers []string       // in the order of the search if the provider is not known

	overrideExact    map[string]price
	overridePatterns []pricePattern // longest first
}

type priceKey struct{ provider, model string }

type pricePattern struct {
	provider, match string
	price           price
}

// A priceOverride is the operator's price of the models that match, where `*` stands for any text.
type priceOverride struct {
	match string
	price price
}

// loadPrices reads the embedded list.
func loadPrices() (*priceTable, error) {
	t, err := parsePrices(pricesJSON)
	if err != nil {
		return nil, fmt.Errorf("reading the embedded prices: %w", err)
	}
	return t, nil
}

// parsePrices reads a price list such as prices.json.
func parsePrices(text string) (*priceTable, error) {
	var list struct {
		Currency string       `json:"currency"`
		Per      int64        `json:"per_tokens"`
		Models   []priceEntry `json:"models"`
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return nil, err
	}
	if list.Currency != "USD" || list.Per != 1_000_000 {
		return nil, errors.New("prices are not in US dollars per million tokens")
	}
	t := &priceTable{exact: make(map[priceKey]price), providers: []string{"openai", "anthropic"}}
	for _, m := range list.Models {
		p, err := m.price()
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", m.Provider, m.Model, err)
		}
		if !slices.Contains(t.providers, m.Provider) {
			t.providers = append(t.providers, m.Provider)
		}
		for _, match := range m.Match {
			key := priceKey{m.Provider, match}
			if _, exists := t.exact[key]; exists {
				return nil, fmt.Errorf("%s %s: %q is listed twice", m.Provider, m.Model, match)
			}
			if strings.Contains(match, "*") {
				t.patterns = append(t.patterns, pricePattern{m.Provider, match, p})
			} else {
				t.exact[key] = p
			}
		}
	}
	sortLongestFirst(t.patterns)
	return t, nil
}

// A priceEntry is one entry of the price list. A price that is not listed is "".
type priceEntry struct {
	Provider    string      `json:"provider"`
	Model       string      `json:"model"`
	Match       []string    `json:"match"`
	Input       json.Number `json:"input"`
	CachedInput json.Number `json:"cached_input"`
	CacheWrite  json.Number `json:"cache_write"`
	Output      json.Number `json:"output"`
	AudioInput  json.Number `json:"audio_input"`
	AudioOutput json.Number `json:"audio_output"`
}

func (m *priceEntry) price() (p price, err error) {
	for _, f := range []struct {
		target  *int64
		dollars json.Number
	}{
		{&p.input, m.Input}, {&p.cachedInput, m.CachedInput}, {&p.cacheWrite, m.CacheWrite},
		{&p.output, m.Output}, {&p.audioInput, m.AudioInput}, {&p.audioOutput, m.AudioOutput},
	} {
		if *f.target = noPrice; f.dollars != "" {
			if *f.target, err = parseDollars(f.dollars.String()); err != nil {
				return price{}, err
			}
		}
	}
	return p, nil
}

// sortLongestFirst puts the most specific pattern first; equally long ones stay in order.
func sortLongestFirst(patterns []pricePattern) {
	slices.SortStableFunc(patterns, func(a, b pricePattern) int { return cmp.Compare(len(b.match), len(a.match)) })
}

// withOverrides returns a table with these overrides instead of any earlier ones. A model that matches an
// override has only the override's prices, none from the list. Of two overrides with the same match the later
// one counts.
func (t *priceTable) withOverrides(overrides []priceOverride) *priceTable {
	changed := *t
	changed.overrideExact, changed.overridePatterns = make(map[string]price), nil
	for _, o := range slices.Backward(overrides) {
		if strings.Contains(o.match, "*") {
			changed.overridePatterns = append(changed.overridePatterns, pricePattern{match: o.match, price: o.price})
		} else if _, exists := changed.overrideExact[o.match]; !exists {
			changed.overrideExact[o.match] = o.price
		}
	}
	sortLongestFirst(changed.overridePatterns)
	return &changed
}

// lookup returns the price of a model, or false if there is none. Overrides come first. Then the provider's own
// list entries count, and for azure also openai's. For "compatible" and "" every provider's entries count: a
// name like "openai/gpt-4o" prefers openai, and is also looked up without that part.
func (t *priceTable) lookup(provider, model string) (price, bool) {
	anyProvider := provider == "compatible" || provider == ""
	preferred, short := "", model
	if i := strings.LastIndexByte(model, '/'); anyProvider && i >= 0 {
		preferred, short = model[:i], model[i+1:]
	}
	if p, ok := t.lookupOverride(model, short); ok {
		return p, true
	}
	switch {
	case anyProvider:
		if p, ok := t.lookupListed(preferred, short); ok {
			return p, true
		}
		return t.lookupAnyProvider(model, short)
	case provider == "azure":
		if p, ok := t.lookupListed("azure", model); ok {
			return p, true
		}
		provider = "openai"
	}
	return t.lookupListed(provider, model)
}

// metricLabel returns a model's name for metrics: a name in the table, or the pattern in it that the name
// matches, or "other". So clients cannot create labels by making up names.
func (t *priceTable) metricLabel(model string) string {
	short := model[strings.LastIndexByte(model, '/')+1:]
	for _, name := range [...]string{model, short} {
		if _, ok := t.overrideExact[name]; ok {
			return name
		}
		if _, ok := t.exactAnyProvider(name); ok {
			return name
		}
	}
	for _, patterns := range [...][]pricePattern{t.overridePatterns, t.patterns} {
		if p := findPattern(patterns, model, short); p != nil {
			return p.match
		}
	}
	return otherLabel
}

// lookupOverride looks up the operator's prices, for the full name before the short one.
func (t *priceTable) lookupOverride(model, short string) (price, bool) {
	for _, name := range [...]string{model, short} {
		if p, ok := t.overrideExact[name]; ok {
			return p, true
		}
	}
	return findPattern(t.overridePatterns, model, short).found()
}

// lookupListed looks up the list prices of one provider.
func (t *priceTable) lookupListed(provider, model string) (price, bool) {
	if p, ok := t.exact[priceKey{provider, model}]; ok {
		return p, true
	}
	for _, l := range t.patterns {
		if l.provider == provider && matchName(l.match, model) {
			return l.price, true
		}
	}
	return price{}, false
}

// lookupAnyProvider looks up the list prices of all providers.
func (t *priceTable) lookupAnyProvider(model, short string) (price, bool) {
	for _, name := range [...]string{model, short} {
		if p, ok := t.exactAnyProvider(name); ok {
			return p, true
		}
	}
	return findPattern(t.patterns, model, short).found()
}

func (t *priceTable) exactAnyProvider(name string) (price, bool) {
	for _, provider := range t.providers {
		if p, ok := t.exact[priceKey{provider, name}]; ok {
			return p, true
		}
	}
	return price{}, false
}

// findPattern returns the first pattern that matches one of the names, or nil.
func findPattern(patterns []pricePattern, model, short string) *pricePattern {
	for i, p := range patterns {
		if matchName(p.match, model) || matchName(p.match, short) {
			return &patterns[i]
		}
	}
	return nil
}

func (p *pricePattern) found() (price, bool) {
	if p == nil {
		return price{}, false
	}
	return p.price, true
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

// parseDollars reads a price in dollars per million tokens, such as "2.5", and returns pico-dollars per token.
// It accepts digits with at most one point between them, at most six decimals, and at most a million dollars.
func parseDollars(s string) (pico int64, err error) {
	whole, decimals, point := strings.Cut(s, ".")
	if !allDigits(whole) || point && !allDigits(decimals) {
		return 0, fmt.Errorf("%q is not a decimal number of dollars", s)
	}
	if len(decimals) > 6 {
		return 0, fmt.Errorf("%q has more than six decimals", s)
	}
	pico, err = strconv.ParseInt(whole+(decimals + "000000")[:6], 10, 64)
	if err != nil || pico > 1_000_000_000_000 {
		return 0, fmt.Errorf("%q is more than a million dollars", s)
	}
	return pico, nil
}

// allDigits reports whether s is one or more ASCII digits.
func allDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}
