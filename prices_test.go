// These tests check the price list against known models, and the arithmetic against math/big.
package main

import (
	"math"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

func listPrices(t testing.TB) *priceTable {
	t.Helper()
	table, err := loadPrices()
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestPriceLookup(t *testing.T) {
	t.Parallel()
	table := listPrices(t)
	for _, c := range []struct {
		provider, model string
		input, output   string // dollars per million; "" none, "?" model unknown
	}{
		{"openai", "gpt-4o", "2.5", "10"},
		{"openai", "gpt-4o-mini-2024-07-18", "0.15", "0.6"},
		{"openai", "o3", "2", "8"},
		{"openai", "text-embedding-3-small", "0.02", ""},
		{"openai", "ft:gpt-4o-2024-08-06:org::id", "3.75", "15"},
		{"openai", "ft:gpt-4o-mini-2024-07-18:org:name:id", "0.3", "1.2"},
		{"openai", "claude-sonnet-4-5", "?", ""},
		{"openai", "gpt-4o-2099-01-01", "2.5", "10"}, // a snapshot that is not listed
		{"openai", "gpt-4o-20990101", "2.5", "10"},
		{"openai", "gpt-4o-2099-1-1", "?", ""},
		{"openai", "gpt-4o-2024-05-13", "5", "15"}, // listed by itself
		{"openai", "gpt-4o-2099", "?", ""},
		{"openai", "gpt-4o-", "?", ""},
		{"openai", "-latest", "?", ""},
		{"openai", "gpt-4o-audio-preview", "2.5", "10"},
		{"openai", "gpt-4.1-latest", "2", "8"},
		{"openai", "gpt-5.4-mini-imagined", "?", ""},
		{"openai", "ft:gpt-4o-2024-08-06", "3.75", "15"},
		{"openai", "ft:gpt-3.5-turbo-0125:org::id", "3", "6"},
		{"openai", "ft:gpt-3.5-turbo-2099-01-01:org::id", "3", "6"},
		{"openai", "ft:gpt-5:org::id", "?", ""}, // what it costs is not what its base costs
		{"openai", "gpt-4o:free", "?", ""},
		{"openai", "", "?", ""},
		{"openai", "GPT-4o", "?", ""},
		{"openai", "openai/gpt-4o", "?", ""},
		{"anthropic", "claude-sonnet-4-5-20250929", "3", "15"},
		{"anthropic", "claude-sonnet-4-20250514", "3", "15"},
		{"anthropic", "claude-3-7-sonnet-latest", "3", "15"},
		{"anthropic", "claude-opus-4-1-20250805", "15", "75"},
		{"anthropic", "anthropic.claude-v2:1", "8", "24"},
		{"azure", "o3", "2", "8"},        // its own
		{"azure", "gpt-4o", "2.5", "10"}, // openai's
		{"azure", "my-o4-mini", "?", ""},
		{"anthropic", "claude-opus-5-5", "4", "20"},
		{"anthropic", "claude-opus-5-6", "?", ""},
		{"anthropic", "claude-opus-5-20990101", "5", "25"},
		{"anthropic", "claude-opus-4@20250514", "15", "75"},
		{"compatible", "openai/gpt-4o", "2.5", "10"},
		{"compatible", "anthropic/claude-sonnet-4.5", "3", "15"},
		{"compatible", "deep/er/openai/gpt-4o", "2.5", "10"},
		{"compatible", "azure/o3", "2", "8"},
		{"compatible", "o3", "2", "8"},
		{"compatible", "xai/grok-4.3", "1.25", "2.5"},
		{"compatible", "x-ai/grok-4.3-latest", "1.25", "2.5"},
		{"compatible", "models/gemini-2.5-pro", "1.25", "10"},
		{"compatible", "deepseek/deepseek-r1:free", "0", "0"},
		{"compatible", "deepseek/deepseek-r1", "0.55", "2.19"},
		{"compatible", "deepseek/deepseek-r1:nitro", "?", ""},
		{"compatible", "deepseek-v4-flash", "0.3", "1.2"},
		{"groq", "openai/gpt-oss-120b", "0.15", "0.6"},
		{"groq", "gpt-4o", "?", ""}, // it is known who serves it, and not for how much
		{"cerebras", "gpt-oss-120b", "0.35", "0.75"},
		{"compatible", "nobody/nothing", "?", ""},
		{"", "claude-sonnet-4-5", "3", "15"},
		{"elsewhere", "gpt-4o", "?", ""},
	} {
		p := table.lookup(c.provider, c.model, 0)
		if (p != nil) != (c.input != "?") {
			t.Errorf("%s %s: found %v", c.provider, c.model, p != nil)
		} else if p != nil {
			input, output := formatDollars(p.rates[kindInput]), formatDollars(p.rates[kindOutput])
			if input != c.input || output != c.output && (c.output != "" || output != "0") {
				t.Errorf("%s %s: %s/%s, want %s/%s", c.provider, c.model, input, output, c.input, c.output)
			}
		}
	}
}

// priceOf returns a price with the given rates, in pico-dollars a token; noPrice for none.
func priceOf(input, cachedInput, cacheWrite, output, audioInput, audioOutput int64) *price {
	p := &price{}
	p.rates = noRates()
	p.rates[kindInput], p.rates[kindCachedInput], p.rates[kindCacheWrite] = input, cachedInput, cacheWrite
	p.rates[kindOutput], p.rates[kindAudioInput], p.rates[kindAudioOutput] = output, audioInput, audioOutput
	return p
}

func TestOwnPrices(t *testing.T) {
	t.Parallel()
	list := listPrices(t)
	at := func(n int64) *price { return priceOf(n, noPrice, noPrice, n, noPrice, noPrice) }
	table := list.withOwnPrices([]ownPrice{
		{"gpt-*", 0, at(1)}, {"gpt-4o*", 0, at(2)}, {"gpt-4o-mini", 0, at(3)}, {"*", 0, at(4)}, {"twice", 0, at(5)},
		{"twice", 0, at(6)}, {"vendor/*", 0, at(7)}, {"later", 0, at(8)}, {"later", 2000, at(9)}, {"later", 1000, at(10)},
		{"only-later", 1000, at(11)}, {"pattern-later*", 1000, at(12)},
	})
	for _, c := range []struct {
		provider, model string
		at, want        int64
	}{
		{"openai", "gpt-4o-mini", 0, 3},
		{"openai", "gpt-4o", 0, 2}, // over an exact entry of the list
		{"azure", "gpt-5", 0, 1},
		{"anthropic", "claude-sonnet-4-5", 0, 4},
		{"openai", "twice", 0, 6},
		{"compatible", "openai/gpt-4o-mini", 0, 3},
		{"compatible", "vendor/gpt-4o", 0, 7},
		{"openai", "later", 999, 8}, {"openai", "later", 1000, 10}, {"openai", "later", 1999, 10},
		{"openai", "later", 5000, 9},
		{"openai", "only-later", 999, 4}, {"openai", "only-later", 1000, 11},
		{"openai", "pattern-later-x", 999, 4}, {"openai", "pattern-later-x", 1000, 12},
	} {
		if p := table.lookup(c.provider, c.model, c.at); p == nil || p.rates != at(c.want).rates {
			t.Errorf("%s %s: %+v, want %d", c.provider, c.model, p, c.want)
		}
	}
	if p := list.lookup("openai", "gpt-4o", 0); p.rates[kindInput] != 2_500_000 {
		t.Errorf("the list itself changed: %+v", p)
	}
	if p := table.withOwnPrices(nil).lookup("openai", "gpt-4o", 0); p.rates[kindInput] != 2_500_000 {
		t.Errorf("own prices outlived their replacement: %+v", p)
	}
}

func TestMatchName(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"a", "a", true}, {"a", "ab", false}, {"", "", true}, {"*", "", true}, {"*", "x", true}, {"a*", "a", true},
		{"a*a", "a", false}, {"a*a", "aa", true}, {"*b*", "abc", true}, {"*b*", "ac", false}, {"a*b*c", "aXbYc", true},
		{"a*b*c", "aXcYb", false}, {"*ab", "aab", true}, {"*ab*ab", "ab", false}, {"**", "x", true}, {"a**c", "abc", true},
		{"*a*a*a*a*a*b", strings.Repeat("a", 5000), false},
	} {
		if got := matchName(c.pattern, c.name); got != c.want {
			t.Errorf("%q matches %.20q: %v", c.pattern, c.name, got)
		}
	}
}

func TestCost(t *testing.T) {
	t.Parallel()
	gpt4o := priceOf(2_500_000, 1_250_000, noPrice, 10_000_000, noPrice, noPrice)
	all := priceOf(1000, 2000, 3000, 4000, 5000, 6000)
	free := &price{}
	for _, c := range []struct {
		name   string
		price  *price
		counts tokenCounts
		want   int64 // -1: unknown
	}{
		{"nothing", gpt4o, tokenCounts{}, 0},
		{"plain", gpt4o, tokenCounts{input: 1000, output: 500}, 7_500_000},
		{"cached", gpt4o, tokenCounts{input: 1000, cached: 600, output: 1, reasoning: 1}, 1_760_000},
		{"fallbacks", gpt4o, tokenCounts{input: 10, cacheWrite: 3, audioInput: 2, output: 4, audioOutput: 4}, 65_000},
		{"each kind", all, tokenCounts{input: 10, cached: 1, cacheWrite: 2, audioInput: 3, output: 10, audioOutput: 4}, 4 + 2 + 6 + 15 + 24 + 24},
		{"parts over the whole", all, tokenCounts{input: 10, cached: 8, cacheWrite: 8, audioInput: 8, output: 1, audioOutput: 9}, 16 + 6 + 6},
		{"below zero", all, tokenCounts{input: -10, cached: -1, output: -1}, 0},
		{"half up", priceOf(500, noPrice, noPrice, noPrice, noPrice, noPrice), tokenCounts{input: 1}, 1},
		{"just below half", priceOf(499, noPrice, noPrice, noPrice, noPrice, noPrice), tokenCounts{input: 1}, 0},
		{"rounded once", priceOf(300, noPrice, noPrice, 300, noPrice, noPrice), tokenCounts{input: 1, output: 1}, 1},
		{"no output price needed", priceOf(20_000, noPrice, noPrice, noPrice, noPrice, noPrice), tokenCounts{input: 8}, 160},
		{"no output price", priceOf(20_000, noPrice, noPrice, noPrice, noPrice, noPrice), tokenCounts{input: 8, output: 1}, -1},
		{"no price", priceOf(noPrice, noPrice, noPrice, noPrice, noPrice, noPrice), tokenCounts{input: 1}, -1},
		{"free", free, tokenCounts{input: 1, output: 1}, 0},
		{"beyond measure", priceOf(math.MaxInt64, 1, 1, math.MaxInt64, 1, 1), tokenCounts{input: math.MaxInt64, output: math.MaxInt64}, math.MaxInt64},
	} {
		got, ok := c.price.cost(&c.counts, &usageDetails{}, nil)
		if ok != (c.want >= 0) || ok && got != c.want {
			t.Errorf("%s: %d %v, want %d", c.name, got, ok, c.want)
		}
	}
}

// TestCostAgainstBig: costs are exact to the last digit for any counts and prices, and sums do not drift
// (AC18).
func TestCostAgainstBig(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(7, 8))
	upTo := func(n int64) int64 { return rnd.Int64N(1 + n>>rnd.IntN(40)) }
	for range 50_000 {
		p := priceOf(upTo(1e12), upTo(1e12), upTo(1e12), upTo(1e12), upTo(1e12), upTo(1e12))
		c := tokenCounts{input: upTo(maxTokenCount), output: upTo(maxTokenCount)}
		c.cached = rnd.Int64N(c.input + 1)
		c.cacheWrite = rnd.Int64N(c.input - c.cached + 1)
		c.audioInput = rnd.Int64N(c.input - c.cached - c.cacheWrite + 1)
		c.audioOutput = rnd.Int64N(c.output + 1)
		sum := big.NewInt(500)
		for _, part := range [][2]int64{
			{c.input - c.cached - c.cacheWrite - c.audioInput, p.rates[kindInput]}, {c.cached, p.rates[kindCachedInput]}, {c.cacheWrite, p.rates[kindCacheWrite]},
			{c.audioInput, p.rates[kindAudioInput]}, {c.output - c.audioOutput, p.rates[kindOutput]}, {c.audioOutput, p.rates[kindAudioOutput]},
		} {
			sum.Add(sum, new(big.Int).Mul(big.NewInt(part[0]), big.NewInt(part[1])))
		}
		want := int64(math.MaxInt64)
		if sum.Div(sum, big.NewInt(1000)); sum.IsInt64() {
			want = sum.Int64()
		}
		if got, ok := p.cost(&c, &usageDetails{}, nil); !ok || got != want {
			t.Fatalf("%+v at %+v: %d, want %d", c, p, got, want)
		}
	}
}

func TestCostSumHasNoDrift(t *testing.T) {
	t.Parallel()
	p := listPrices(t).lookup("openai", "gpt-4o-mini", 0)
	if p == nil {
		t.Fatal("no price")
	}
	var sum, tokens int64
	for i := range int64(1_000_000) {
		n := 20 * (1 + i%7) // 0.15 $ per million is 150 nano-dollars a token: no rounding at all
		nanos, _ := p.cost(&tokenCounts{input: n}, &usageDetails{}, nil)
		sum += nanos
		tokens += n
	}
	if sum != tokens*150 {
		t.Errorf("a million calls cost %s, want %s", formatNanos(sum), formatNanos(tokens*150))
	}
}

func TestDollars(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		text string
		pico int64 // -1: refused
		back string
	}{
		{"2.5", 2_500_000, "2.5"}, {"0.0375", 37_500, "0.0375"}, {"0", 0, "0"}, {"10", 10_000_000, "10"},
		{"0.000001", 1, "0.000001"}, {"1000000", 1e12, "1000000"}, {"007.50", 7_500_000, "7.5"},
		{"1000000.000001", -1, ""}, {"1000001", -1, ""}, {"99999999999999999999999", -1, ""}, {"0.0000001", -1, ""},
		{"-1", -1, ""}, {"+1", -1, ""}, {"1e3", -1, ""}, {"", -1, ""}, {".", -1, ""}, {".5", -1, ""}, {"5.", -1, ""},
		{"1.2.3", -1, ""}, {" 1", -1, ""}, {"1,5", -1, ""}, {"0x1", -1, ""}, {"NaN", -1, ""}, {"١", -1, ""}, {"1_0", -1, ""},
	} {
		pico, err := parseDollars(c.text)
		if (err != nil) != (c.pico < 0) {
			t.Errorf("%q: %d, %v", c.text, pico, err)
		} else if err == nil && (pico != c.pico || formatDollars(pico) != c.back) {
			t.Errorf("%q: %d, back %q", c.text, pico, formatDollars(pico))
		}
	}
	if s := formatDollars(noPrice); s != "" {
		t.Errorf("no price is written %q", s)
	}
	for nanos, want := range map[int64]string{
		0: "0", 1: "0.000000001", 1_500_000_000: "1.5", -20: "-0.00000002", math.MaxInt64: "9223372036.854775807", math.MinInt64: "-9223372036.854775808",
	} {
		if got := formatNanos(nanos); got != want {
			t.Errorf("formatNanos(%d) = %s, want %s", nanos, got, want)
		}
	}
}

// TestPriceListDate: users are told how old the list prices are.
func TestPriceListDate(t *testing.T) {
	t.Parallel()
	date := listPrices(t).date
	for _, name := range []string{"README.md", "CHANGELOG.md"} {
		if !strings.Contains(mustReadFile(t, name), date) {
			t.Errorf("%s does not have the date of prices.json, %s", name, date)
		}
	}
}

func TestPriceListRefused(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		``, `{}`, `{"currency":"EUR","per_tokens":1000000}`, `{"currency":"USD","per_tokens":1000}`,
		`{"provider":"openai","model":"a","input":-1}`, `{"provider":"openai","model":"a","input":1e3}`,
		`{"provider":"openai","model":"a","names":["a"],"input":1}`, `{"provider":"openai","model":"a*","input":1}`,
		`{"provider":"openai","model":"","input":1}`, `{"provider":"nobody","model":"a","input":1}`,
		`{"provider":"openai","model":"a","input":1,"colour":2}`,
		`{"provider":"openai","model":"a","above_input_tokens":{"0":{"input":1}}}`,
		`{"provider":"openai","model":"a","above_input_tokens":{"1":{"input":-1}}}`,
		`{"provider":"openai","model":"a","above_input_tokens":{"1":{"multiplier":{}}}}`,
		`{"provider":"openai","model":"a","service_tier":{"slow":{"input":1}}}`,
		`{"provider":"openai","model":"a","service_tier":{"standard":{"input":1}}}`,
		`{"provider":"openai","model":"a","multiplier":{"mars":1.5}}`,
		`{"provider":"openai","model":"a","multiplier":{"us":1.234}}`,
		`{"provider":"openai","model":"a","unknown_above_input_tokens":-1}`,
	} {
		if strings.HasPrefix(text, `{"provider"`) {
			text = `{"currency":"USD","per_tokens":1000000,"models":[` + text + `]}`
		}
		if _, err := parsePrices(text); err == nil {
			t.Errorf("%s was taken", text)
		}
	}
}

func BenchmarkPrice(b *testing.B) {
	table := listPrices(b)
	for _, model := range []string{"gpt-4o", "ft:gpt-4o-2024-08-06:org::id", "unknown"} {
		b.Run(model, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if p := table.lookup("openai", model, 0); p != nil {
					p.cost(&tokenCounts{input: 1117, cached: 1024, output: 46}, &usageDetails{}, nil)
				}
			}
		})
	}
}

// A costRow is a line of testdata/costs.txt.
type costRow struct{ provider, model, api, usage, nanos, arithmetic string }

func costRows(t *testing.T) (rows []costRow) {
	t.Helper()
	for line := range strings.Lines(mustReadFile(t, "testdata/costs.txt")) {
		if line[0] == '#' {
			continue
		}
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(f) != 6 {
			t.Fatalf("the line %q has %d fields", line, len(f))
		}
		rows = append(rows, costRow{f[0], f[1], f[2], f[3], f[4], f[5]})
	}
	if len(rows) < 400 {
		t.Fatalf("testdata/costs.txt has %d rows", len(rows))
	}
	return rows
}

// TestCostsOfProviders: what a provider's usage object costs is what its list price gives, to the nano-dollar. The
// amounts were computed from the public list, not from prices.json.
func TestCostsOfProviders(t *testing.T) {
	t.Parallel()
	table := listPrices(t)
	kinds := map[string]meterKind{"openai": meterOpenAI, "anthropic": meterAnthropic, "embeddings": meterEmbeddings,
		"transcripts": meterTranscripts, "media": meterMedia}
	for _, row := range costRows(t) {
		api, tier, _ := strings.Cut(row.api, " ")
		m := newMeter(kinds[api], false, false, false)
		runMeter(m, []byte(`{"model":"m","service_tier":"`+tier+`","usage":`+row.usage+`}`), allAtOnce)
		p := table.lookup(row.provider, row.model, 0)
		if p == nil {
			t.Errorf("%s %s has no price", row.provider, row.model)
			continue
		}
		var lines []costLine
		nanos, ok := p.cost(&m.counts, &m.details, &lines)
		if !ok || formatInt(nanos) != row.nanos || m.source() != usageExact {
			t.Errorf("%s %s %s %s: %d, known %v, usage %s; want %s = %s", row.provider, row.model, row.api, row.usage,
				nanos, ok, m.source(), row.nanos, row.arithmetic)
		}
		for _, l := range lines {
			nanos -= l.nanos
		}
		if nanos != 0 {
			t.Errorf("%s %s: the breakdown leaves out %d", row.provider, row.model, nanos)
		}
	}
}

// TestCostProperties: more of anything never costs less, a breakdown adds up, and both agree with math/big, for every
// list price and any usage.
func TestCostProperties(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(9, 10))
	upTo := func(n int64) int64 { return rnd.Int64N(1 + n>>rnd.IntN(30)) }
	known := 0
	for _, p := range listPrices(t).search("", "") {
		for range 20 {
			c := tokenCounts{input: upTo(400_000), output: upTo(100_000)}
			c.cached = upTo(c.input)
			c.cacheWrite = upTo(c.input - c.cached)
			c.audioInput, c.audioOutput, c.reasoning = upTo(c.input), upTo(c.output), upTo(c.output)
			d := usageDetails{tier: serviceTier(rnd.IntN(int(tierOther))), region: inferenceRegion(rnd.IntN(3)),
				multiplier: upTo(20_000), cacheWrite1h: upTo(c.cacheWrite), inputMS: upTo(1e6), characters: upTo(1e5)}
			if rnd.IntN(2) == 0 {
				d = usageDetails{}
			}
			var lines []costLine
			nanos, ok := p.cost(&c, &d, &lines)
			if !ok {
				continue
			}
			known++
			sum := int64(0)
			for _, l := range lines {
				sum += l.nanos
			}
			if sum != nanos || nanos < 0 {
				t.Fatalf("%s: %d, its lines %d: %+v %+v", p.from.Name, nanos, sum, c, d)
			}
			more, moreOutput := c, c
			more.input++
			moreOutput.output++
			for _, larger := range []tokenCounts{more, moreOutput} {
				if n, ok := p.cost(&larger, &d, nil); ok && n < nanos {
					t.Fatalf("%s: %+v costs %d, %+v costs %d", p.from.Name, c, nanos, larger, n)
				}
			}
		}
	}
	if known < 5000 {
		t.Errorf("only %d costs were known", known)
	}
}

// TestCostBound: what a call reserves in a budget is the most expensive thing that the request allows. What has no
// bound is named.
func TestCostBound(t *testing.T) {
	t.Parallel()
	table, endpoints := listPrices(t), newEndpointTable().all()
	for _, c := range []struct {
		pattern, model, body string
		input, output        int64  // tokens
		want                 string // dollars of input and output, or the field without a bound
	}{
		{chatPattern, "gpt-4o-mini", `{}`, 1000, 100, "0.00015 0.00006"},
		{chatPattern, "gpt-4.1", `{}`, 1000, 100, "0.002 0.0008"},
		{chatPattern, "gpt-4.1", `{"service_tier":"flex"}`, 1000, 100, "0.002 0.0008"}, // the provider may not have it
		{chatPattern, "gpt-4.1", `{"service_tier":"priority"}`, 1000, 100, "0.0035 0.0014"},
		{chatPattern, "gpt-4.1", `{"service_tier":"auto"}`, 1000, 100, "0.0035 0.0014"},
		{chatPattern, "gpt-4.1", `{"Service_Tier":"priority","service_tier":"default"}`, 1000, 100, "0.0035 0.0014"},
		{chatPattern, "gpt-4o-mini-search-preview", `{}`, 1000, 100, "0.02515 0.00006"},
		{chatPattern, "gpt-4o-audio-preview", `{"modalities":["text","audio"]}`, 1000, 100, "0.0025 0.008"},
		{chatPattern, "gpt-4o-audio-preview", `{"messages":[{"content":[{"type":"input_audio"}]}]}`, 1000, 100, "0.04 0.001"},
		{chatPattern, "gpt-5.6", `{}`, 1000, 100, "0.005 0.002"}, // it may be written to the cache
		{chatPattern, "gpt-5.6", `{}`, 300_000, 100, "3 0.003"},
		{"/v1/responses", "gpt-5.5", `{"tools":[{"type":"web_search"}]}`, 1000, 100, "0.105 0.003"},
		{"/v1/responses", "gpt-5.5", `{"tools":[{"type":"file_search"},{"type":"code_interpreter"}]}`, 0, 100, "0.055 0.003"},
		{"/v1/responses", "gpt-5.5", `{"tools":[{"type":"image_generation"}]}`, 1000, 100, "tools"},
		{"/v1/responses", "gpt-5.4", `{"tools":[{"type":"web_search"}]}`, 1000, 100, "tools"},
		{"/v1/responses", "gpt-5.5", `{"tools":[{"type":"web\u005fsearch","d":"\u00e9"}]}`, 1000, 100, "0.105 0.003"},
		{"/v1/messages", "claude-sonnet-4-5", `{"system":[{"cache\u005fcontrol":{"ttl":"\u0031h"}}]}`, 1000, 100, "0.006 0.0015"},
		{"/v1/responses", "gpt-4.1-nano", `{"service_tier":"ultrafast"}`, 1000, 100, "service_tier"},
		{"/v1/messages", "claude-sonnet-4-5", `{}`, 1000, 100, "0.003 0.0015"},
		{"/v1/messages", "claude-sonnet-4-5", `{"system":[{"cache_control":{"type":"ephemeral"}}]}`, 1000, 100, "0.00375 0.0015"},
		{"/v1/messages", "claude-sonnet-4-5", `{"system":[{"cache_control":{"ttl":"1h"}}]}`, 1000, 100, "0.006 0.0015"},
		{"/v1/messages", "claude-opus-5-5", `{"speed":"fast","inference_geo":"us"}`, 1000, 100, "0.0088 0.0044"},
		{"/v1/messages", "claude-sonnet-4-5", `{"speed":"fast"}`, 1000, 100, "speed"},
		{"/v1/messages", "claude-opus-5", `{"tools":[{"type":"web_search_20250305"}]}`, 1000, 100, "0.105 0.0025"},
		{"/v1/embeddings", "text-embedding-3-small", `{"input":["a","b"]}`, 1000, 0, "0.00002 0"},
		{"/v1/audio/speech", "tts-1", `{"input":"h\u00e9llo \ud83d\ude00"}`, 10, 0, "0.000105 0"}, // 7 characters
		{"/v1/audio/speech", "gpt-4o-mini-tts", `{"input":"hello"}`, 10, 0, "input"},
		{"/v1/images/generations", "gpt-image-1", `{"n":2,"quality":"low"}`, 10, 4096, "0.0001 0.03264"},
		{"/v1/images/generations", "gpt-image-1", `{"size":"1024x1024"}`, 10, 4096, "0.0001 0.2496"},
		{"/v1/images/generations", "gpt-image-2", `{"size":"3072x2048","quality":"medium"}`, 10, 4096, "0.00008 0.2376"},
		{"/v1/images/generations", "grok-imagine-image", `{"n":3}`, 10, 4096, "0.06 0"},
	} {
		i := slices.IndexFunc(endpoints, func(e *endpoint) bool { return e.pattern == c.pattern && e.method == "POST" })
		f, err := scanJSON([]byte(c.body))
		p := table.lookup("", c.model, 0)
		if i < 0 || err != nil || p == nil {
			t.Fatalf("%s %s: endpoint %d, %v, price %v", c.pattern, c.model, i, err, p)
		}
		est := &estimate{model: c.model, input: c.input, output: c.output}
		b, got := endpoints[i].costBound(p, &f, []byte(c.body), est, usageDetails{})
		if got == "" {
			got = formatNanos(b.input) + " " + formatNanos(b.output)
		}
		if got != c.want {
			t.Errorf("%s %s %s: %s, want %s", c.pattern, c.model, c.body, got, c.want)
		}
	}
}
