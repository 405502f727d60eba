// prices.go knows what tokens cost: the embedded list prices, the operator's own prices over them, and the
// arithmetic from counts to money. Everything is an exact integer: pico-dollars for one token, nano-dollars
// for a call; there is no float and no rounding but one. Plain code: it reads no file but its own.
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

// effectivePrices returns the list prices with the operator's own over them.
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
			return -1
		}
		return *p
	}
	overrides := make([]priceOverride, 0, len(rows))
	for _, r := range rows {
		overrides = append(overrides, priceOverride{match: r.match, price: price{value(r.input), value(r.cachedInput), value(r.cacheWrite),
			value(r.output), value(r.audioInput), value(r.audioOutput)}})
	}
	return listed.withOverrides(overrides), nil
}

// pricesJSON is the list that loadPrices reads; its member "about" says what it is.
//
//go:embed prices.json
var pricesJSON string

const noPrice = -1

// price is in pico-dollars per token, which is micro-dollars per million tokens and exact for every list
// price. noPrice means that there is none for that kind of token.
type price struct{ input, cachedInput, cacheWrite, output, audioInput, audioOutput int64 }

// cost returns what c costs in nano-dollars, rounded half up once, and math.MaxInt64 when that is too
// small. It returns false when a kind of token that occurred has no price: unknown is not free.
// A kind without a price of its own costs what input or output costs. Tokens that are both cached and
// audio count as cached.
func (p price) cost(c tokenCounts) (nanos int64, ok bool) {
	var sum uint128
	text := max(c.input, 0)
	take := func(n int64) int64 { // the parts never exceed the whole, so wide cannot overflow
		n = min(max(n, 0), text)
		text -= n
		return n
	}
	cached, written, heard := take(c.cached), take(c.cacheWrite), take(c.audioInput)
	said := max(c.output, 0)
	spoken := min(max(c.audioOutput, 0), said)
	ok = sum.addTokens(text, p.input, noPrice)
	ok = sum.addTokens(cached, p.cachedInput, p.input) && ok
	ok = sum.addTokens(written, p.cacheWrite, p.input) && ok
	ok = sum.addTokens(heard, p.audioInput, p.input) && ok
	ok = sum.addTokens(said-spoken, p.output, noPrice) && ok
	ok = sum.addTokens(spoken, p.audioOutput, p.output) && ok
	if !ok {
		return 0, false
	}
	return sum.roundedThousandth(), true
}

// uint128 is an unsigned sum of 128 bits.
type uint128 struct{ hi, lo uint64 }

// addTokens adds n tokens at pico each, or at other when pico is noPrice. It returns false when n tokens have
// neither price.
func (w *uint128) addTokens(n, pico, other int64) bool {
	if pico < 0 {
		pico = other
	}
	if n == 0 || pico < 0 {
		return n == 0
	}
	hi, lo := bits.Mul64(uint64(n), uint64(pico))
	var carry uint64
	w.lo, carry = bits.Add64(w.lo, lo, 0)
	w.hi, _ = bits.Add64(w.hi, hi, carry)
	return true
}

// roundedThousandth returns w/1000 rounded half up, or math.MaxInt64 if that is less.
func (w uint128) roundedThousandth() int64 {
	lo, carry := bits.Add64(w.lo, 500, 0)
	hi := w.hi + carry
	if hi >= 1000 {
		return math.MaxInt64
	}
	q, _ := bits.Div64(hi, lo, 1000)
	return int64(min(q, math.MaxInt64))
}

// priceTable finds the price of a model. It is immutable, so any number of calls may share it.
type priceTable struct {
	exact     map[priceKey]price
	patterns  []pricePattern // longest first
	providers []string       // in the order a model of an unnamed provider is looked for

	overrideExact    map[string]price
	overridePatterns []pricePattern // longest first
}

type priceKey struct{ provider, model string }

type pricePattern struct {
	provider, match string
	price           price
}

// priceOverride is the operator's price for the models that match; `*` in match stands for anything.
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

// parsePrices reads a price list; see prices.json for its form.
func parsePrices(text string) (*priceTable, error) {
	var list struct {
		Currency string `json:"currency"`
		Per      int64  `json:"per_tokens"`
		Models   []struct {
			Provider    string      `json:"provider"`
			Model       string      `json:"model"`
			Match       []string    `json:"match"`
			Input       json.Number `json:"input"`
			CachedInput json.Number `json:"cached_input"`
			CacheWrite  json.Number `json:"cache_write"`
			Output      json.Number `json:"output"`
			AudioInput  json.Number `json:"audio_input"`
			AudioOutput json.Number `json:"audio_output"`
		} `json:"models"`
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return nil, err
	}
	if list.Currency != "USD" || list.Per != 1_000_000 {
		return nil, errors.New("prices are not in US dollars per million tokens")
	}
	t := &priceTable{exact: make(map[priceKey]price), providers: []string{"openai", "anthropic"}}
	for _, m := range list.Models {
		var p price
		for _, kind := range []struct {
			to   *int64
			from json.Number
		}{
			{&p.input, m.Input}, {&p.cachedInput, m.CachedInput}, {&p.cacheWrite, m.CacheWrite},
			{&p.output, m.Output}, {&p.audioInput, m.AudioInput}, {&p.audioOutput, m.AudioOutput},
		} {
			*kind.to = noPrice
			if kind.from != "" {
				pico, err := parseDollars(kind.from.String())
				if err != nil {
					return nil, fmt.Errorf("%s %s: %w", m.Provider, m.Model, err)
				}
				*kind.to = pico
			}
		}
		if !slices.Contains(t.providers, m.Provider) {
			t.providers = append(t.providers, m.Provider)
		}
		for _, match := range m.Match {
			key := priceKey{m.Provider, match}
			if _, twice := t.exact[key]; twice {
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

// sortLongestFirst sorts the pattern that says most to the front; equals stay in order.
func sortLongestFirst(patterns []pricePattern) {
	slices.SortStableFunc(patterns, func(a, b pricePattern) int { return cmp.Compare(len(b.match), len(a.match)) })
}

// withOverrides returns a table in which overrides stand over the list, in place of any earlier ones. What matches
// one has its price and nothing of the list's. Of two with the same match the later one counts.
func (t *priceTable) withOverrides(overrides []priceOverride) *priceTable {
	own := *t
	own.overrideExact, own.overridePatterns = make(map[string]price), nil
	for _, o := range slices.Backward(overrides) {
		if strings.Contains(o.match, "*") {
			own.overridePatterns = append(own.overridePatterns, pricePattern{match: o.match, price: o.price})
		} else if _, later := own.overrideExact[o.match]; !later {
			own.overrideExact[o.match] = o.price
		}
	}
	sortLongestFirst(own.overridePatterns)
	return &own
}

// lookup returns the price of a model, and false if nobody knows. Overrides come first. In the list,
// provider's own entries count, and for azure then openai's. For "compatible" and "" every provider's
// do; a name like "openai/gpt-4o" says whose to prefer and is also looked for without that part.
func (t *priceTable) lookup(provider, model string) (price, bool) {
	anyone := provider == "compatible" || provider == ""
	vendor, short := "", model
	if i := strings.LastIndexByte(model, '/'); anyone && i >= 0 {
		vendor, short = model[:i], model[i+1:]
	}
	if p, ok := t.lookupOverride(model, short); ok {
		return p, true
	}
	switch {
	case anyone:
		if p, ok := t.lookupListed(vendor, short); ok {
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

// metricLabel is a model's name for metrics: one that the table has, or the pattern in it that the name matches,
// else "other". What clients make up cannot become a name.
func (t *priceTable) metricLabel(model string) string {
	short := model[strings.LastIndexByte(model, '/')+1:]
	for _, name := range [...]string{model, short} {
		if _, ok := t.overrideExact[name]; ok {
			return name
		}
		for _, provider := range t.providers {
			if _, ok := t.exact[priceKey{provider, name}]; ok {
				return name
			}
		}
	}
	for _, list := range [...][]pricePattern{t.overridePatterns, t.patterns} {
		for _, p := range list {
			if matchName(p.match, model) || matchName(p.match, short) {
				return p.match
			}
		}
	}
	return otherLabel
}

// lookupOverride looks a model up in the operator's prices, under its full name before the short one.
func (t *priceTable) lookupOverride(model, short string) (price, bool) {
	for _, name := range []string{model, short} {
		if p, ok := t.overrideExact[name]; ok {
			return p, true
		}
	}
	for _, o := range t.overridePatterns {
		if matchName(o.match, model) || matchName(o.match, short) {
			return o.price, true
		}
	}
	return price{}, false
}

// lookupListed looks a model up among one provider's.
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

// lookupAnyProvider looks a model up among all providers'.
func (t *priceTable) lookupAnyProvider(model, short string) (price, bool) {
	for _, name := range []string{model, short} {
		for _, provider := range t.providers {
			if p, ok := t.exact[priceKey{provider, name}]; ok {
				return p, true
			}
		}
	}
	for _, l := range t.patterns {
		if matchName(l.match, model) || matchName(l.match, short) {
			return l.price, true
		}
	}
	return price{}, false
}

// matchName reports whether pattern, in which `*` stands for any bytes or none, matches all of name. The
// leftmost place for each part is always good enough, so there is no backtracking to exploit.
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

// parseDollars reads a price in dollars for a million tokens, like "2.5", as pico-dollars for one. It is
// strict: digits with at most one point between them, at most six decimals, at most a million dollars.
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
