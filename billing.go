// This file says what a call can use that costs money, and what that costs at given rates: the kinds that providers
// price, how many of each a call used, the conditions (service tier, speed, region) that change prices, and the
// arithmetic. All numbers are exact integers: a price is in pico-dollars, a cost in nano-dollars. There is no float,
// and a call is rounded only once. A kind that was used and has no price makes the cost unknown, unless a rule in
// fallbackKind says what it costs: unknown is not free. prices.go finds the price of a model. Plain code.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"
)

// A priceKind is something that providers price by itself. Its index is in rates.
type priceKind uint8

const (
	kindInput priceKind = iota // text, and all that has no price of its own
	kindCachedInput
	kindCacheWrite // kept for five minutes, or for as long as the provider likes
	kindCacheWrite1h
	kindAudioInput
	kindCachedAudioInput
	kindImageInput
	kindCachedImageInput
	kindOutput
	kindReasoningOutput
	kindAudioOutput
	kindImageOutput
	numTokenKinds // the kinds above are tokens
)

const (
	kindInputMinute  = numTokenKinds + iota // of sound
	kindOutputMinute                        // of sound or video
	kindInputCharacter
	kindInputPicture
	kindOutputPicture
	kindQuery
	kindWebSearch
	kindWebSearchLow // with a small, medium or large context of search results
	kindWebSearchMedium
	kindWebSearchHigh
	kindFileSearch
	kindCodeSession
	kindImageCall
	kindSearchSource // that a search of xAI used
	numPriceKinds
)

// A priceUnit is what a price is for.
type priceUnit uint8

const (
	perToken priceUnit = iota
	perCharacter
	perMinuteOfMedia // quantities are milliseconds
	perPiece
)

// A priceKindInfo describes a priceKind: its name in price lists and in the management API, its label on pages.
type priceKindInfo struct {
	name, label string
	unit        priceUnit
}

// priceKinds describes every kind. It never changes.
var priceKinds = [numPriceKinds]priceKindInfo{
	kindInput:            {"input", "input", perToken},
	kindCachedInput:      {"cached_input", "cached input", perToken},
	kindCacheWrite:       {"cache_write", "cache write", perToken},
	kindCacheWrite1h:     {"cache_write_1h", "cache write for 1 hour", perToken},
	kindAudioInput:       {"audio_input", "audio input", perToken},
	kindCachedAudioInput: {"cached_audio_input", "cached audio input", perToken},
	kindImageInput:       {"image_input", "image input", perToken},
	kindCachedImageInput: {"cached_image_input", "cached image input", perToken},
	kindOutput:           {"output", "output", perToken},
	kindReasoningOutput:  {"reasoning_output", "reasoning output", perToken},
	kindAudioOutput:      {"audio_output", "audio output", perToken},
	kindImageOutput:      {"image_output", "image output", perToken},
	kindInputMinute:      {"input_minute", "minutes of input", perMinuteOfMedia},
	kindOutputMinute:     {"output_minute", "minutes of output", perMinuteOfMedia},
	kindInputCharacter:   {"input_character", "input characters", perCharacter},
	kindInputPicture:     {"input_picture", "input pictures", perPiece},
	kindOutputPicture:    {"output_picture", "output pictures", perPiece},
	kindQuery:            {"query", "queries", perPiece},
	kindWebSearch:        {"web_search_call", "web searches", perPiece},
	kindWebSearchLow:     {"web_search_call_low", "web searches with small context", perPiece},
	kindWebSearchMedium:  {"web_search_call_medium", "web searches with medium context", perPiece},
	kindWebSearchHigh:    {"web_search_call_high", "web searches with large context", perPiece},
	kindFileSearch:       {"file_search_call", "file searches", perPiece},
	kindCodeSession:      {"code_interpreter_session", "code interpreter sessions", perPiece},
	kindImageCall:        {"image_generation_call", "image generation calls", perPiece},
	kindSearchSource:     {"search_source", "search sources", perPiece},
}

func (k priceKind) String() string { return priceKinds[k].name }

// isTool reports whether the kind is the use of a tool, whose price depends on no tier, region or speed.
func (k priceKind) isTool() bool { return k >= kindWebSearch }

// tokenCounts is normalized: input includes cached, cacheWrite and audioInput; output includes reasoning
// and audioOutput. No part exceeds its whole, and every count is from 0 to maxTokenCount.
type tokenCounts struct {
	input, cached, cacheWrite, output, reasoning, audioInput, audioOutput int64
}

// A serviceTier is how fast a provider promises to be, at what price. The zero value is the standard.
type serviceTier uint8

const (
	tierStandard serviceTier = iota
	tierBatch
	tierFlex
	tierPriority
	tierUltrafast
	tierOther // one that no price list has, such as capacity that was paid in advance
	numServiceTiers
)

var serviceTierNames = [numServiceTiers]string{"", "batch", "flex", "priority", "ultrafast", "other"}

func (t serviceTier) String() string { return serviceTierNames[t] }

// serviceTierOf returns the tier that an answer names.
func serviceTierOf(name []byte) serviceTier {
	switch string(name) {
	case "", "default", "standard", "auto", "on_demand", "standard_only":
		return tierStandard
	case "batch":
		return tierBatch
	case "flex":
		return tierFlex
	case "priority":
		return tierPriority
	case "ultrafast":
		return tierUltrafast
	}
	return tierOther
}

// An inferenceRegion is where a provider promises to process a call. The zero value is no promise.
type inferenceRegion uint8

const (
	regionAny inferenceRegion = iota
	regionUS
	regionEU
	regionOther // one that no price list has
	numInferenceRegions
)

var inferenceRegionNames = [numInferenceRegions]string{"", "us", "eu", "other"}

// inferenceRegionOf returns the region that an answer or a host names.
func inferenceRegionOf(name []byte) inferenceRegion {
	switch string(name) {
	case "", "global", "not_available":
		return regionAny
	case "us":
		return regionUS
	case "eu":
		return regionEU
	}
	return regionOther
}

// An inferenceSpeed is a mode in which a model answers faster at a higher price. The zero value is the standard.
type inferenceSpeed uint8

const (
	speedStandard inferenceSpeed = iota
	speedFast
	speedOther // one that no price list has
	numInferenceSpeeds
)

var inferenceSpeedNames = [numInferenceSpeeds]string{"", "fast", "other"}

// inferenceSpeedOf returns the speed that an answer names.
func inferenceSpeedOf(name []byte) inferenceSpeed {
	switch string(name) {
	case "", "standard":
		return speedStandard
	case "fast":
		return speedFast
	}
	return speedOther
}

// A searchContext is how much of the search results a model reads.
type searchContext uint8

const (
	searchContextUnknown searchContext = iota
	searchContextLow
	searchContextMedium
	searchContextHigh
	numSearchContexts
)

var searchContextNames = [numSearchContexts]string{"", "low", "medium", "high"}

func searchContextOf(name []byte) searchContext {
	for i, n := range searchContextNames {
		if n == string(name) {
			return searchContext(i)
		}
	}
	return searchContextUnknown
}

// usageDetails are what a call used beside the tokens in tokenCounts, or as parts of them, and the conditions of the
// call. Most calls have none: the zero value.
type usageDetails struct {
	cacheWrite1h                              int64 // part of cacheWrite
	cachedAudio, cachedImage                  int64 // parts of cached, and of audioInput or imageInput
	imageInput, imageOutput                   int64 // parts of input and output
	inputMS, outputMS                         int64 // milliseconds, where those are billed
	characters, inputPictures, outputPictures int64 // likewise
	queries                                   int64
	webSearches, fileSearches                 int64 // calls of tools
	codeSessions, imageCalls, searchSources   int64
	audioInput, audioOutput                   int64 // in JSON only; otherwise in tokenCounts
	multiplier                                int64 // the operator's, in ten-thousandths; 0: 1
	searchContext                             searchContext
	tier                                      serviceTier
	speed                                     inferenceSpeed
	region                                    inferenceRegion
}

// A usageCount is a count of usageDetails with its name in JSON.
type usageCount struct {
	name  string
	count *int64
}

// counts returns the counts of d in a fixed order.
func (d *usageDetails) counts() [19]usageCount {
	return [...]usageCount{
		{"cache_write_1h_tokens", &d.cacheWrite1h}, {"cached_audio_tokens", &d.cachedAudio},
		{"cached_image_tokens", &d.cachedImage}, {"image_input_tokens", &d.imageInput},
		{"image_output_tokens", &d.imageOutput}, {"input_ms", &d.inputMS}, {"output_ms", &d.outputMS},
		{"input_characters", &d.characters}, {"input_pictures", &d.inputPictures},
		{"output_pictures", &d.outputPictures}, {"queries", &d.queries}, {"web_search_calls", &d.webSearches},
		{"file_search_calls", &d.fileSearches}, {"code_interpreter_sessions", &d.codeSessions},
		{"image_generation_calls", &d.imageCalls}, {"search_sources", &d.searchSources},
		{"audio_input_tokens", &d.audioInput}, {"audio_output_tokens", &d.audioOutput},
		{"cost_multiplier_ten_thousandths", &d.multiplier},
	}
}

// A usageCondition is a condition of usageDetails with its name in JSON.
type usageCondition struct {
	name  string
	names []string // of its values; the zero value's is ""
	get   func(d *usageDetails) uint8
	set   func(d *usageDetails, v uint8)
}

func usageConditions() []usageCondition {
	return []usageCondition{
		{"service_tier", serviceTierNames[:], func(d *usageDetails) uint8 { return uint8(d.tier) },
			func(d *usageDetails, v uint8) { d.tier = serviceTier(v) }},
		{"speed", inferenceSpeedNames[:], func(d *usageDetails) uint8 { return uint8(d.speed) },
			func(d *usageDetails, v uint8) { d.speed = inferenceSpeed(v) }},
		{"region", inferenceRegionNames[:], func(d *usageDetails) uint8 { return uint8(d.region) },
			func(d *usageDetails, v uint8) { d.region = inferenceRegion(v) }},
		{"search_context_size", searchContextNames[:], func(d *usageDetails) uint8 { return uint8(d.searchContext) },
			func(d *usageDetails, v uint8) { d.searchContext = searchContext(v) }},
	}
}

// MarshalJSON writes what is not zero: {"cache_write_1h_tokens":400,"service_tier":"flex"}.
func (d usageDetails) MarshalJSON() ([]byte, error) { return d.appendJSON(nil), nil }

// appendJSON appends the JSON form of d to b.
func (d *usageDetails) appendJSON(b []byte) []byte {
	start := len(b)
	name := func(n string) {
		b = append(append(append(b, ','), '"'), n...)
		b = append(b, '"', ':')
	}
	b = append(b, '{')
	for _, c := range d.counts() {
		if *c.count != 0 {
			name(c.name)
			b = strconv.AppendInt(b, *c.count, 10)
		}
	}
	for _, c := range usageConditions() {
		if v := c.get(d); v != 0 {
			name(c.name)
			b = strconv.AppendQuote(b, c.names[v])
		}
	}
	if len(b) > start+1 {
		b = append(b[:start+1], b[start+2:]...) // without the first comma
	}
	return append(b, '}')
}

// UnmarshalJSON reads the form that MarshalJSON writes. It refuses other members, and counts that no call can have.
func (d *usageDetails) UnmarshalJSON(text []byte) error {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(text, &members); err != nil {
		return err
	}
	*d = usageDetails{}
	for _, c := range d.counts() {
		if value, ok := members[c.name]; ok {
			n, err := strconv.ParseInt(string(value), 10, 64)
			if err != nil || n < 0 || n > maxTokenCount {
				return errors.New(c.name + " is not a whole number of 0 or more")
			}
			*c.count = n
			delete(members, c.name)
		}
	}
	for _, c := range usageConditions() {
		if value, ok := members[c.name]; ok {
			i := slices.Index(c.names, strings.Trim(string(value), `"`))
			if i < 0 {
				return errors.New(c.name + " is not known")
			}
			c.set(d, uint8(i))
			delete(members, c.name)
		}
	}
	for name := range members {
		return errors.New(name + " is not a member of usage details")
	}
	return nil
}

// Values of a rate that is no price.
const (
	noPrice = -1 // the kind has no price of its own
	// The kind has a price of its own that the list does not tell, as where it tells the prices of a tier for some
	// kinds only.
	hiddenPrice = -2
)

// rates are the prices of all kinds in pico-dollars: of a token or character, which is micro-dollars per million and
// exact for every list price, of a minute, or of a piece.
type rates [numPriceKinds]int64

// noRates returns rates without a price.
func noRates() rates {
	var r rates
	for k := range r {
		r[k] = noPrice
	}
	return r
}

// A tierPrice is the price of a model in one service tier.
type tierPrice struct {
	rates
	above []longContextPrice // by falling threshold
}

// A longContextPrice is what the whole call costs if its input has more tokens than the threshold.
type longContextPrice struct {
	threshold int64
	rates
}

// multiplierOne is a multiplier of 1. Multipliers are in ten-thousandths.
const multiplierOne = 10_000

// A price is what the use of a model costs. It is immutable.
type price struct {
	tierPrice                               // of the standard tier
	tiers       [numServiceTiers]*tierPrice // of the others; nil: not known
	allTiers    bool                        // the prices hold in every tier, at any speed and in any region
	hiddenAbove int64                       // input tokens above which the price is not known; 0: none
	us, eu      int64                       // multipliers of regions; 0: none
	fast        int64                       // multiplier of fast answers; 0: not known

	from priceOrigin
	text string // the price in JSON, with its origin
	id   int64  // a hash of text, which names the price in the ledger
}

// A priceOrigin says where a price is from: the list, or the operator.
type priceOrigin struct {
	Name     string `json:"name"`               // the listed model, or what the operator's price matches
	Provider string `json:"provider,omitempty"` // of the listed model
	Date     string `json:"as_of,omitempty"`    // of the list
	OwnID    string `json:"own_id,omitempty"`   // of the operator's price; "" for a list price
}

// ratesFor returns the rates for a call, nil if they are not known.
func (p *price) ratesFor(input int64, tier serviceTier) *rates {
	t := &p.tierPrice
	if tier != tierStandard && !p.allTiers {
		if t = p.tiers[tier]; t == nil {
			return nil
		}
	}
	for i := range t.above {
		if input > t.above[i].threshold {
			return &t.above[i].rates
		}
	}
	if p.hiddenAbove > 0 && input > p.hiddenAbove || len(t.above) < len(p.above) && input > p.above[0].threshold {
		return nil
	}
	return &t.rates
}

// rate returns the price of a kind, or that of the kind that it costs as much as, or a negative number.
func (r *rates) rate(k priceKind) int64 {
	for r[k] == noPrice {
		next := r.fallbackKind(k)
		if next == k {
			return noPrice
		}
		k = next
	}
	return r[k]
}

// fallbackKind returns the kind whose price holds for a kind without a price of its own, k itself if there is none.
// Where a discount or a surcharge on one kind is known, the price of another kind is not derived from it.
func (r *rates) fallbackKind(k priceKind) priceKind {
	separate := func(k priceKind) bool { return r[k] != noPrice && r[k] != r[kindInput] }
	switch k {
	case kindCachedInput, kindCacheWrite, kindAudioInput, kindImageInput:
		return kindInput
	case kindCacheWrite1h:
		if !separate(kindCacheWrite) {
			return kindInput
		}
	case kindCachedAudioInput:
		if !separate(kindAudioInput) {
			return kindCachedInput
		}
	case kindCachedImageInput:
		if !separate(kindImageInput) {
			return kindCachedInput
		}
	case kindReasoningOutput, kindAudioOutput, kindImageOutput:
		return kindOutput
	case kindWebSearchLow, kindWebSearchMedium, kindWebSearchHigh:
		return kindWebSearch
	}
	return k
}

// quantities are how many of each kind a call is billed for.
type quantities [numPriceKinds]int64

// billedQuantities splits what a call used into kinds, so that nothing is in two of them. Tokens that may be cached
// and of sound or pictures count as cached first. The parts never exceed the whole, so sums cannot overflow.
func billedQuantities(c *tokenCounts, d *usageDetails) (q quantities) {
	rest := max(c.input, 0)
	split := func(n int64) int64 {
		n = min(max(n, 0), rest)
		rest -= n
		return n
	}
	q[kindCachedAudioInput] = split(min(d.cachedAudio, c.cached))
	q[kindCachedImageInput] = split(min(d.cachedImage, c.cached-q[kindCachedAudioInput]))
	q[kindCachedInput] = split(c.cached - q[kindCachedAudioInput] - q[kindCachedImageInput])
	q[kindCacheWrite1h] = split(min(d.cacheWrite1h, c.cacheWrite))
	q[kindCacheWrite] = split(c.cacheWrite - q[kindCacheWrite1h])
	q[kindAudioInput] = split(c.audioInput - q[kindCachedAudioInput])
	q[kindImageInput] = split(d.imageInput - q[kindCachedImageInput])
	q[kindInput] = rest
	rest = max(c.output, 0)
	q[kindAudioOutput] = split(c.audioOutput)
	q[kindImageOutput] = split(d.imageOutput)
	q[kindReasoningOutput] = split(c.reasoning)
	q[kindOutput] = rest
	if *d == (usageDetails{}) {
		return q
	}
	q[kindInputMinute], q[kindOutputMinute] = d.inputMS, d.outputMS
	q[kindInputCharacter], q[kindQuery] = d.characters, d.queries
	q[kindInputPicture], q[kindOutputPicture] = d.inputPictures, d.outputPictures
	q[kindWebSearch+priceKind(d.searchContext)] = d.webSearches
	q[kindFileSearch], q[kindCodeSession], q[kindImageCall] = d.fileSearches, d.codeSessions, d.imageCalls
	q[kindSearchSource] = d.searchSources
	for k := numTokenKinds; k < numPriceKinds; k++ {
		q[k] = min(max(q[k], 0), maxTokenCount)
	}
	return q
}

// sumCost returns the cost of the usage of many calls, none of which had a long input.
func (p *price) sumCost(c *tokenCounts) (nanos int64, ok bool) {
	short := &price{tierPrice: tierPrice{rates: p.rates}}
	return short.cost(c, &usageDetails{}, nil)
}

// A costLine is a part of a cost: a quantity of one kind at a price, or what a multiplier adds to the lines before.
type costLine struct {
	kind       priceKind
	quantity   int64
	rate       int64  // pico-dollars for one
	multiplier int64  // in ten-thousandths; 0: the line is a quantity
	name       string // of the multiplier
	nanos      int64
}

// cost returns the cost of a call in nano-dollars, rounded half up, or math.MaxInt64 if it is higher than that.
// cost returns false if something was used whose price is not known. If lines is not
// nil, the parts of the cost are appended to it; their sum is the cost.
func (p *price) cost(c *tokenCounts, d *usageDetails, lines *[]costLine) (nanos int64, ok bool) {
	r := p.ratesFor(c.input, d.tier)
	if r == nil {
		return 0, false
	}
	multiplier, ok := p.multiplier(d)
	if !ok {
		return 0, false
	}
	sum := costSum{scale: 1, lines: lines}
	q := billedQuantities(c, d)
	for k := range numPriceKinds {
		if q[k] == 0 {
			continue
		}
		if k.isTool() {
			r = &p.rates // the tiers have no prices for tools
			sum.multiply(&multiplier, "region_and_speed")
		}
		rate := r.rate(k)
		if rate < 0 {
			return 0, false
		}
		sum.add(k, q[k], rate)
	}
	sum.multiply(&multiplier, "region_and_speed")
	if discount := d.multiplier; discount != 0 {
		sum.multiply(&discount, "cost_multiplier")
	}
	return sum.nanos(), true
}

// unpricedKinds returns the names of the kinds that a call used and that have no price, which is why its cost is not
// known; none if the reason is its tier, its speed, its region or its long context.
func (p *price) unpricedKinds(c *tokenCounts, d *usageDetails) []string {
	r, kinds := p.ratesFor(c.input, d.tier), []string{}
	if r == nil {
		return kinds
	}
	for k, n := range billedQuantities(c, d) {
		kind := priceKind(k)
		if n > 0 && (kind.isTool() && p.rates.rate(kind) < 0 || !kind.isTool() && r.rate(kind) < 0) {
			kinds = append(kinds, kind.String())
		}
	}
	return kinds
}

// multiplier returns by how much tokens cost more because of the call's region and speed, and false if that is not
// known.
func (p *price) multiplier(d *usageDetails) (ten4 int64, ok bool) {
	ten4 = multiplierOne
	if p.allTiers {
		return ten4, true
	}
	switch region := d.region; {
	case region == regionUS && p.us > 0:
		ten4 = p.us
	case region == regionEU && p.eu > 0:
		ten4 = p.eu
	case region == regionOther && (p.us > 0 || p.eu > 0):
		return 0, false
	}
	if d.speed == speedStandard {
		return ten4, true
	}
	return ten4 * p.fast / multiplierOne, d.speed == speedFast && p.fast > 0
}

const msPerMinute = 60_000

// combinedMultiplier returns the product of two multipliers in ten-thousandths, of which 0 is 1; 0 if it is 1.
func combinedMultiplier(a, b int64) int64 {
	one := func(n int64) int64 { return cmp.Or(n, multiplierOne) }
	product := (one(a)*one(b) + multiplierOne/2) / multiplierOne
	if product == multiplierOne {
		return 0
	}
	return max(product, 1)
}

// A costSum adds up the parts of a cost. A minute is 60,000 of the milliseconds that it is billed by, so the sum is in
// sixty-thousandths of a pico-dollar, and each multiplier adds four decimals to it.
type costSum struct {
	total    uint128
	scale    uint64 // 1, or 10,000 for each multiplier
	lines    *[]costLine
	reported int64 // the sum of the lines
}

// add adds n of a kind.
func (s *costSum) add(k priceKind, n, rate int64) {
	var amount uint128
	amount.hi, amount.lo = bits.Mul64(uint64(n), uint64(rate))
	if priceKinds[k].unit != perMinuteOfMedia {
		amount = amount.times(msPerMinute)
	}
	if s.scale != 1 {
		amount = amount.times(s.scale)
	}
	s.total = s.total.plus(amount)
	if s.lines != nil {
		s.report(costLine{kind: k, quantity: n, rate: rate})
	}
}

// multiply multiplies what was added before, and sets the multiplier to 1.
func (s *costSum) multiply(ten4 *int64, name string) {
	if *ten4 == multiplierOne {
		return
	}
	s.total, s.scale = s.total.times(uint64(*ten4)), s.scale*multiplierOne
	if s.lines != nil {
		s.report(costLine{multiplier: *ten4, name: name})
	}
	*ten4 = multiplierOne
}

// report appends a line with what it added to the rounded sum, so that the lines add up exactly.
func (s *costSum) report(l costLine) {
	nanos := s.nanos()
	l.nanos, s.reported = nanos-s.reported, nanos
	*s.lines = append(*s.lines, l)
}

// nanos returns the sum in nano-dollars, rounded half up, at most math.MaxInt64.
func (s *costSum) nanos() int64 { return s.total.dividedBy(1000 * msPerMinute * s.scale) }

// A uint128 is a number that stays at its maximum when it would become larger.
type uint128 struct{ hi, lo uint64 }

func (w uint128) plus(v uint128) uint128 {
	lo, carry := bits.Add64(w.lo, v.lo, 0)
	hi, over := bits.Add64(w.hi, v.hi, carry)
	if over != 0 {
		return uint128{math.MaxUint64, math.MaxUint64}
	}
	return uint128{hi, lo}
}

func (w uint128) times(n uint64) uint128 {
	carry, lo := bits.Mul64(w.lo, n)
	over, hi := bits.Mul64(w.hi, n)
	hi, more := bits.Add64(hi, carry, 0)
	if over != 0 || more != 0 {
		return uint128{math.MaxUint64, math.MaxUint64}
	}
	return uint128{hi, lo}
}

// dividedBy returns w/n rounded half up, at most math.MaxInt64.
func (w uint128) dividedBy(n uint64) int64 {
	w = w.plus(uint128{0, n / 2})
	if w.hi >= n {
		return math.MaxInt64
	}
	q, _ := bits.Div64(w.hi, w.lo, n)
	return int64(min(q, math.MaxInt64))
}
