// These tests check what administrators see and change of prices: prices of all kinds, prices that begin later, the
// breakdown of a cost, multipliers and simulations.
package main

import (
	"encoding/json"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// A breakdownEntry is a cost_breakdown.
type breakdownEntry struct {
	Cost  json.Number
	Lines []struct {
		Kind, Unit, Per         string
		Quantity                int64
		Price, Multiplier, Cost json.Number
	}
	Price struct{ Source, Name, Provider, AsOf, ID string }
}

// check checks that the lines of a breakdown add up to its cost, and that it is what is expected: each line as
// "KIND QUANTITY x PRICE = COST" or "NAME x MULTIPLIER = COST".
func (b *breakdownEntry) check(t *testing.T, cost string, lines ...string) {
	t.Helper()
	number := func(n json.Number) *big.Rat {
		r, ok := new(big.Rat).SetString(n.String())
		if !ok {
			t.Fatalf("%q is not a number", n)
		}
		return r
	}
	var got []string
	sum := new(big.Rat)
	for _, l := range b.Lines {
		sum.Add(sum, number(l.Cost))
		if l.Multiplier != "" {
			got = append(got, l.Kind+" x "+l.Multiplier.String()+" = "+l.Cost.String())
			continue
		}
		got = append(got, l.Kind+" "+formatInt(l.Quantity)+" x "+l.Price.String()+" = "+l.Cost.String())
	}
	if sum.Cmp(number(b.Cost)) != 0 || b.Cost.String() != cost {
		t.Errorf("the lines %v add up to %s; the cost is %s, want %s", got, sum.FloatString(12), b.Cost, cost)
	}
	if want := strings.Join(lines, "\n"); strings.Join(got, "\n") != want {
		t.Errorf("the lines are\n%s\nwant\n%s", strings.Join(got, "\n"), want)
	}
}

// TestCostBreakdown: a call says what its cost is made of, at the price that held when it began, whatever becomes of
// the price later.
func TestCostBreakdown(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	breakdown := func() *breakdownEntry {
		t.Helper()
		var row struct {
			CostBreakdown *breakdownEntry `json:"cost_breakdown"`
		}
		p.manage("GET", "/manage/requests/"+p.lastCall().ID, "", 200, &row)
		return row.CostBreakdown
	}
	p.chat()
	b := breakdown()
	b.check(t, "0.00000315", "input 9 x 0.15 = 0.00000135", "output 3 x 0.6 = 0.0000018")
	if b.Price.Source != "list" || b.Price.Name != "gpt-4o-mini-2024-07-18" || b.Price.Provider != "openai" {
		t.Errorf("the price is from %+v", b.Price)
	}
	var price struct{ ID string }
	p.manage("POST", "/manage/prices", `{"match":"gpt-4o-mini*","input":"0.0005","output":0.0005}`, 201, &price)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"cost_multiplier":0.8}`, 200, nil)
	p.chat()
	id := p.lastCall().ID
	b = breakdown() // 4.5 and 1.5 nano-dollars, times 0.8: rounded once, to 5
	b.check(t, "0.000000005", "input 9 x 0.0005 = 0.000000005", "output 3 x 0.0005 = 0.000000001",
		"cost_multiplier x 0.8 = -0.000000001")
	if b.Price.Source != "own" || b.Price.Name != "gpt-4o-mini*" || b.Price.ID != price.ID {
		t.Errorf("the price is from %+v", b.Price)
	}
	p.manage("DELETE", "/manage/prices/"+price.ID, "", 200, nil)
	if again := breakdown(); again == nil || again.Price != b.Price {
		t.Errorf("without the price, the breakdown of %s is %+v", id, again)
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(500, "{}") })
	p.chat()
	if b := breakdown(); b != nil {
		t.Errorf("a call without a cost has the breakdown %+v", b)
	}
}

// TestPriceValidFrom: a price in the future holds for calls that begin from then on.
func TestPriceValidFrom(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	set := func(validFrom string, input string) string {
		var price struct {
			ID        string
			ValidFrom *string `json:"valid_from"`
		}
		p.manage("POST", "/manage/prices",
			`{"match":"gpt-4o-mini*","input":`+input+`,"output":0,"valid_from":`+validFrom+`}`, 201, &price)
		if (price.ValidFrom == nil) != (validFrom == "null") {
			t.Errorf("valid_from %s became %v", validFrom, price.ValidFrom)
		}
		return price.ID
	}
	always := set("null", "1")
	next := set(`"`+time.Now().Add(time.Hour).UTC().Format(time.RFC3339)+`"`, "2")
	past := set(`"2020-01-01T00:00:00Z"`, "3")
	if always == next || next == past {
		t.Errorf("prices of different times have one id")
	}
	if got := p.chatCost(); got != "0.000027" { // 9 tokens at 3 dollars a million
		t.Errorf("the price since 2020 gives %s", got)
	}
	p.manage("DELETE", "/manage/prices/"+past, "", 200, nil)
	if got := p.chatCost(); got != "0.000009" {
		t.Errorf("the price for always gives %s", got)
	}
	for _, bad := range []string{`"tomorrow"`, `5`, `"2026-13-01T00:00:00Z"`, `"1969-01-01T00:00:00Z"`, `""`} {
		p.manageRefused("POST", "/manage/prices", `{"match":"m","input":1,"valid_from":`+bad+`}`, 400, "valid_from")
	}
}

// TestOwnPriceOfAllKinds: an own price may have every kind, tiers and multipliers; it is refused if a part is wrong.
func TestOwnPriceOfAllKinds(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("POST", "/manage/prices", `{"match":"mine","input":1,"cached_input":"0.1","cache_write_1h":2,"output":4,
		"input_minute":"0.006","output_picture":0.04,"web_search_call":0.01,"file_search_call":0.0025,
		"above_input_tokens":{"1000":{"input":10,"output":40}},
		"service_tier":{"flex":{"input":0.5,"output":2}},"multiplier":{"us":1.1,"fast":6}}`, 201, nil)
	for _, c := range []struct{ counts, cost string }{
		{`{"input_tokens":1000,"output_tokens":100}`, "0.0014"},
		// 1001 x 10 + 100 x 40
		{`{"input_tokens":1001,"output_tokens":100}`, "0.01401"},
		// half
		{`{"input_tokens":1000,"output_tokens":100,"service_tier":"flex"}`, "0.0007"},
		// not known
		{`{"input_tokens":1001,"output_tokens":100,"service_tier":"flex"}`, "null"},
		// likewise
		{`{"input_tokens":1000,"service_tier":"priority"}`, "null"},
		// x 1.1
		{`{"input_tokens":1000,"region":"us"}`, "0.0011"},
		// x 1.1 x 6
		{`{"input_tokens":1000,"region":"us","speed":"fast"}`, "0.0066"},
		{`{"input_tokens":1000,"region":"other"}`, "null"},
		// tools are not multiplied
		{`{"input_tokens":1000,"web_search_calls":2,"region":"us"}`, "0.0211"},
		// 1.5 minutes
		{`{"input_ms":90000}`, "0.009"},
		// 3 x 0.04 + 4 x 0.0025
		{`{"output_pictures":3,"file_search_calls":4}`, "0.13"},
		// no price
		{`{"output_pictures":3,"image_generation_calls":1}`, "null"},
		// 6 + 10 + 40 + 10
		{`{"input_tokens":100,"cached_tokens":60,"cache_write_tokens":30,"cache_write_1h_tokens":20}`, "0.000066"},
	} {
		var s struct {
			Cost      *json.Number
			Breakdown *breakdownEntry `json:"cost_breakdown"`
		}
		p.manage("POST", "/manage/prices/simulate", `{"model":"mine","counts":`+c.counts+`}`, 200, &s)
		got := "null"
		if s.Cost != nil {
			got = s.Cost.String()
		}
		if got != c.cost {
			t.Errorf("%s costs %s, want %s", c.counts, got, c.cost)
		}
	}
	for body, param := range map[string]string{
		`{"match":"m","cache_write_1h":1}`:                               "input",
		`{"match":"m","input":1,"input_minute":"1001"}`:                  "input_minute",
		`{"match":"m","input":1,"query":0.0000000000001}`:                "query",
		`{"match":"m","input":1,"service_tier":{"slow":{"input":1}}}`:    "service_tier",
		`{"match":"m","input":1,"service_tier":{"flex":{"colour":1}}}`:   "service_tier",
		`{"match":"m","input":1,"above_input_tokens":{"x":{"input":1}}}`: "above_input_tokens",
		`{"match":"m","input":1,"multiplier":{"us":0}}`:                  "multiplier",
		`{"match":"m","input":1,"unknown_above_input_tokens":0}`:         "unknown_above_input_tokens",
		`{"match":"m","input":1,"no_such":0}`:                            "no_such",
		`{"match":"m","output_picture":1,"output":-1}`:                   "output",
	} {
		p.manageRefused("POST", "/manage/prices", body, 400, param)
	}
	for body, param := range map[string]string{
		`{}`: "model", `{"model":"m","counts":{"input_tokens":-1}}`: "counts", `{"model":"m","usage":[]}`: "usage",
		`{"model":"m","counts":{"letters":1}}`: "counts", `{"model":"m","usage":{},"counts":{}}`: "counts",
		`{"model":"m","usage":{},"api":"x"}`: "api", `{"model":"m","from":"x"}`: "from",
	} {
		p.manageRefused("POST", "/manage/prices/simulate", body, 400, param)
	}
}

// TestSimulate: a usage object of a provider, and the usage of a time.
func TestSimulate(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	var s struct {
		Cost      json.Number
		Breakdown *breakdownEntry `json:"cost_breakdown"`
		Actual    json.Number     `json:"actual_cost"`
		Data      []struct {
			Model string
			Calls int64
			Cost  json.Number
		}
	}
	p.manage("POST", "/manage/prices/simulate", `{"model":"claude-sonnet-4-5","usage":{"input_tokens":1000,
		"cache_read_input_tokens":2000,"cache_creation_input_tokens":0,"output_tokens":100}}`, 200, &s)
	s.Breakdown.check(t, "0.0051", "input 1000 x 3 = 0.003", "cached_input 2000 x 0.3 = 0.0006",
		"output 100 x 15 = 0.0015")
	const gemini = `{"promptTokenCount":1000,"candidatesTokenCount":100,"thoughtsTokenCount":50,` +
		`"toolUsePromptTokenCount":10,"cachedContentTokenCount":200,"totalTokenCount":1160}`
	for _, members := range []string{`"model":"gemini-2.5-flash"`, `"model":"gemini-2.5-flash","api":"gemini"`,
		`"model":"models/gemini-2.5-flash"`, `"model":"gemini-2.5-flash","provider":"google"`} {
		p.manage("POST", "/manage/prices/simulate", `{`+members+`,"usage":`+gemini+`}`, 200, &s)
		s.Breakdown.check(t, "0.000624", "input 810 x 0.3 = 0.000243", "cached_input 200 x 0.03 = 0.000006",
			"output 100 x 2.5 = 0.00025", "reasoning_output 50 x 2.5 = 0.000125")
	}
	for _, c := range [][]string{
		{"gemini-2.5-flash", "0.03555", "input 1000 x 0.3 = 0.0003", "output 100 x 2.5 = 0.00025",
			"web_search_call 1 x 0.035 = 0.035"},
		{"gemini-3-flash-preview", "0.0288", "input 1000 x 0.5 = 0.0005", "output 100 x 3 = 0.0003",
			"web_search_call 2 x 0.014 = 0.028"},
	} {
		p.manage("POST", "/manage/prices/simulate", `{"model":"`+c[0]+`","usage":{"total_input_tokens":1000,`+
			`"total_output_tokens":100,"grounding_tool_count":[{"type":"google_search","count":2}]}}`, 200, &s)
		s.Breakdown.check(t, c[1], c[2:]...)
	}
	p.chat()
	p.chat()
	p.waitSettled()
	from := time.Now().UTC().Truncate(24 * time.Hour).Format(time.RFC3339)
	to := time.Now().UTC().Add(48 * time.Hour).Format(time.RFC3339)
	p.manage("POST", "/manage/prices/simulate", `{"model":"gpt-4o","from":"`+from+`","to":"`+to+`"}`, 200, &s)
	// 18 x 2.5 + 6 x 10 millionths of a dollar
	if s.Actual != "0.0000063" || s.Cost != "0.000105" || len(s.Data) != 1 || s.Data[0].Calls != 2 {
		t.Errorf("with gpt-4o: %+v", s)
	}
}

// TestCostMultiplier: discounts of a project and of an upstream multiply, in rows and in sums.
func TestCostMultiplier(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	path := "/manage/projects/" + p.project
	var project struct {
		Upstreams []struct{ ID string }
	}
	p.manage("PATCH", path, `{"cost_multiplier":"0.5"}`, 200, &project)
	if got := p.chatCost(); got != "0.000001575" {
		t.Errorf("half of the price is %s", got)
	}
	p.manage("PATCH", path+"/upstreams/"+project.Upstreams[0].ID, `{"cost_multiplier":0.9}`, 200, nil)
	if got := p.chatCost(); got != "0.000001418" { // 0.0000014175, half up
		t.Errorf("0.45 of the price is %s", got)
	}
	p.manage("PATCH", path, `{"cost_multiplier":null}`, 200, nil)
	if got := p.chatCost(); got != "0.000002835" {
		t.Errorf("0.9 of the price is %s", got)
	}
	for _, u := range p.usage("interval=total") {
		if u.Cost != "0.000005828" {
			t.Errorf("the sum is %s", u.Cost)
		}
	}
	for _, bad := range []string{`0`, `-1`, `101`, `0.00001`, `"x"`, `true`} {
		p.manageRefused("PATCH", path, `{"cost_multiplier":`+bad+`}`, 400, "cost_multiplier")
	}
}

// TestBrowseListPrices: the list can be searched and paged.
func TestBrowseListPrices(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	var l struct {
		Data []struct{ Match, Provider, AsOf string }
		Next string
	}
	seen := 0
	for query := "?limit=400"; query != ""; {
		l.Data, l.Next = nil, ""
		p.manage("GET", "/manage/prices/list"+query, "", 200, &l)
		seen += len(l.Data)
		if query = ""; l.Next != "" {
			query = "?limit=400&after=" + l.Next
		}
	}
	if seen < 800 {
		t.Errorf("the list has %d models", seen)
	}
	p.manage("GET", "/manage/prices/list?search=OPUS-5&provider=anthropic", "", 200, &l)
	if len(l.Data) != 2 || l.Data[0].Match != "claude-opus-5" || l.Data[1].Match != "claude-opus-5-5" {
		t.Errorf("a search finds %+v", l.Data)
	}
}

// TestCostsOverTheWire: calls of every kind, through the proxy, have the usage and the cost that their answers give.
func TestCostsOverTheWire(t *testing.T) {
	t.Parallel()
	chat := func(model, usage, more string) string {
		return `{"id":"c","object":"chat.completion","model":"` + model + `","choices":[{"index":0,"message":{"role":` +
			`"assistant","content":"hi"},"finish_reason":"stop"}]` + more + `,"usage":` + usage + `}`
	}
	message := func(model, usage string) string {
		return `{"id":"msg_1","type":"message","role":"assistant","model":"` + model + `","content":[],"usage":` +
			usage + `}`
	}
	response := func(model, item string) string { // 1000 x 2 + 100 x 8 a million with gpt-4.1
		return `{"id":"resp_1","object":"response","status":"completed","model":"` + model + `","output":[` + item +
			`],"usage":{"input_tokens":1000,"output_tokens":100,"total_tokens":1100}}`
	}
	for _, c := range []struct {
		name, provider, path, model, members, answer, source, cost, details string
	}{
		{"o3", "openai", chatPattern, "o3", "",
			chat("o3-2025-04-16", `{"prompt_tokens":1000,"completion_tokens":1000}`, ""),
			"exact", "0.01", `{}`},
		{"an older snapshot", "openai", chatPattern, "gpt-4o-2024-05-13", "",
			chat("gpt-4o-2024-05-13", `{"prompt_tokens":2000,"completion_tokens":100}`, ""), "exact", "0.0115", `{}`},
		{"fine-tuned and cached", "openai", chatPattern, "ft:gpt-4o-2024-08-06:org::abc", "",
			chat("ft:gpt-4o-2024-08-06:org::abc", `{"prompt_tokens":2000,"completion_tokens":100,`+
				`"prompt_tokens_details":{"cached_tokens":1920}}`, ""), "exact", "0.0054", `{}`},
		{"free", "compatible", chatPattern, "deepseek/deepseek-r1:free", "",
			chat("deepseek/deepseek-r1:free", `{"prompt_tokens":1000,"completion_tokens":1000}`, ""),
			"exact", "0", `{}`},
		{"sound", "openai", chatPattern, "gpt-4o-mini-audio-preview", "",
			chat("gpt-4o-mini-audio-preview", `{"prompt_tokens":1100,"completion_tokens":1200,"prompt_tokens_details":`+
				`{"audio_tokens":1000},"completion_tokens_details":{"audio_tokens":1000}}`, ""),
			"exact", "0.030135", `{"audio_input_tokens":1000,"audio_output_tokens":1000}`},
		{"tier", "openai", chatPattern, "gpt-4.1", `"service_tier":"priority"`,
			chat("gpt-4.1", `{"prompt_tokens":1000,"completion_tokens":100}`, `,"service_tier":"priority"`),
			"exact", "0.0049", `{"service_tier":"priority"}`},
		{"another tier than asked for", "openai", chatPattern, "gpt-4.1", `"service_tier":"priority"`,
			chat("gpt-4.1", `{"prompt_tokens":1000,"completion_tokens":100}`, `,"service_tier":"default"`),
			"exact", "0.0028", `{}`},
		{"a tier without a price", "openai", chatPattern, "gpt-4.1", "",
			chat("gpt-4.1", `{"prompt_tokens":1000,"completion_tokens":100}`, `,"service_tier":"scale"`),
			"exact", "null", `{"service_tier":"other"}`},
		{"a model that searches", "openai", chatPattern, "gpt-4o-mini-search-preview", "",
			chat("gpt-4o-mini-search-preview-2025-03-11", `{"prompt_tokens":1000,"completion_tokens":100}`, ""),
			"exact", "0.02521", `{"web_search_calls":1}`},
		{"pictures", "openai", "/v1/images/generations", "gpt-image-1.5", "",
			`{"created":1,"data":[{"b64_json":"aGk="}],"usage":{"total_tokens":1079,"input_tokens":23,` +
				`"output_tokens":1056,"input_tokens_details":{"text_tokens":23,"image_tokens":0}}}`,
			"exact", "0.033907", `{"image_output_tokens":1056}`},
		{"pictures by the piece", "compatible", "/v1/images/generations", "grok-imagine-image", `"n":2`,
			`{"created":1,"data":[{"b64_json":"aGk="},{"b64_json":"aGk="}]}`, "exact", "0.04", `{"output_pictures":2}`},
		{"fewer pictures than asked for", "compatible", "/v1/images/generations", "grok-imagine-image", `"n":4`,
			`{"created":1,"data":[{"url":"https://example.com/[1]"}],"size":"1024x1024"}`, "exact", "0.02",
			`{"output_pictures":1}`},
		{"pictures by quality and size", "compatible", "/v1/images/generations", "grok-imagine-image-2.0",
			`"quality":"high","size":"1024x1024"`, `{"data":[{"b64_json":"aGk="}],"quality":"low"}`, "exact", "0.04",
			`{"output_pictures":1}`},
		{"pictures of an unknown quality", "compatible", "/v1/images/generations", "grok-imagine-image-2.0", "",
			`{"data":[{"b64_json":"aGk="}]}`, "estimated", "0.06", `{"output_pictures":1}`},
		{"a tool without a price", "openai", "/v1/responses", "gpt-4o", `"tools":[{"type":"web_search"}]`,
			response("gpt-4o", `{"type":"web_search_call","action":{"type":"search"}}`), "exact", "null",
			`{"web_search_calls":1}`},
		{"another search than listed", "openai", "/v1/responses", "gpt-4.1", `"tools":[{"type":"web_search"}]`,
			response("gpt-4.1", `{"type":"web_search_call","action":{"type":"search"}}`), "estimated", "0.0278",
			`{"web_search_calls":1}`},
		{"a search as the list has it", "openai", "/v1/responses", "gpt-4.1",
			`"tools":[{"type":"web_search_preview"}]`,
			response("gpt-4.1", `{"type":"web_search_call","action":{"type":"search"}}`), "exact", "0.0278",
			`{"web_search_calls":1}`},
		{"a session", "openai", "/v1/responses", "gpt-4.1",
			`"tools":[{"type":"code_interpreter","container":{"type":"auto"}}]`,
			response("gpt-4.1", `{"type":"code_interpreter_call","container_id":"cntr_1"}`), "exact", "0.0328",
			`{"code_interpreter_sessions":1}`},
		{"a session of another size", "openai", "/v1/responses", "gpt-4.1",
			`"tools":[{"type":"code_interpreter","container":{"type":"auto","memory_limit":"4g"}}]`,
			response("gpt-4.1", `{"type":"code_interpreter_call","container_id":"cntr_1"}`), "estimated", "0.0328",
			`{"code_interpreter_sessions":1}`},
		{"speech by the character", "openai", "/v1/audio/speech", "tts-1", `"input":"h\u00e9llo"`, "ID3", "exact",
			"0.000075", `{"input_characters":5}`},
		{"cache writes for an hour", "anthropic", "/v1/messages", "claude-sonnet-4-5", `"max_tokens":5`,
			message("claude-sonnet-4-5", `{"input_tokens":0,"output_tokens":0,"cache_read_input_tokens":0,`+
				`"cache_creation_input_tokens":1000000,"cache_creation":{"ephemeral_5m_input_tokens":600000,`+
				`"ephemeral_1h_input_tokens":400000}}`), "exact", "4.65", `{"cache_write_1h_tokens":400000}`},
		{"fast, in the US, with a search", "anthropic", "/v1/messages", "claude-opus-5-5", `"max_tokens":5`,
			message("claude-opus-5-5", `{"input_tokens":1000,"output_tokens":100,"speed":"fast","inference_geo":"us",`+
				`"server_tool_use":{"web_search_requests":2}}`), "exact", "0.0332",
			`{"web_search_calls":2,"speed":"fast","region":"us"}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			provider := newFakeProvider(t)
			if c.provider != providerOpenAI {
				var project struct {
					Upstreams []struct{ ID string }
				}
				p.manage("GET", "/manage/projects/"+p.project, "", 200, &project)
				p.addUpstreamAt(provider, c.provider, `"weight":1`)
				p.changeUpstream(project.Upstreams[0].ID, `"is_active":false`)
			}
			p.provider.setScript(func(pc *providerConn, _ recordedRequest) bool { return pc.reply(200, c.answer) })
			provider.setScript(func(pc *providerConn, _ recordedRequest) bool { return pc.reply(200, c.answer) })
			members := `"model":"` + c.model + `"`
			if c.members != "" {
				members += "," + c.members
			}
			p.do("POST", c.path, "{"+members+"}", p.jsonHeaders()...)
			var row struct {
				UsageSource string          `json:"usage_source"`
				Cost        json.RawMessage `json:"cost"`
				Details     json.RawMessage `json:"usage_details"`
				Missing     []string        `json:"unpriced_kinds"`
			}
			p.manage("GET", "/manage/requests/"+p.lastCall().ID, "", 200, &row)
			if row.UsageSource != c.source || string(row.Cost) != c.cost || string(row.Details) != c.details {
				t.Errorf("usage %s, cost %s, details %s; want %s, %s, %s", row.UsageSource, row.Cost, row.Details,
					c.source, c.cost, c.details)
			}
			missing := c.cost == "null" && strings.Contains(c.details, "web_search_calls")
			if missing != slices.Equal(row.Missing, []string{"web_search_call"}) || !missing && len(row.Missing) > 0 {
				t.Errorf("kinds without a price: %v", row.Missing)
			}
		})
	}
}

// TestUsageByServiceTier: sums are kept apart by the tier that the answers name, and add up to the rows.
func TestUsageByServiceTier(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for i, tier := range []string{"default", "priority", "priority", "flex"} {
		p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
			return c.reply(200, `{"id":"c","object":"chat.completion","model":"gpt-5","service_tier":"`+tier+
				`","choices":[],"usage":{"prompt_tokens":`+formatInt(int64(1000+i))+
				`,"completion_tokens":10,"prompt_tokens_details":`+
				`{"cached_tokens":600}}}`)
		})
		p.chat()
	}
	p.waitSettled()
	var l struct {
		Data []struct {
			ServiceTier string `json:"service_tier"`
			Calls       int64
			Cost        json.Number
			Saved       json.Number `json:"prompt_cache_saved"`
		}
	}
	p.manage("GET", "/manage/usage?interval=total&group_by=service_tier", "", 200, &l)
	var got strings.Builder
	for _, u := range l.Data {
		fmt.Fprintf(&got, "%s %d %s %s\n", u.ServiceTier, u.Calls, u.Cost, u.Saved)
	}
	// gpt-5: 1.25, cached 0.125, output 10 a million; flex is half of that, priority twice.
	const want = " 1 0.000675 0.000675\nflex 1 0.000339375 0.0003375\npriority 2 0.0027075 0.0027\n"
	if got.String() != want {
		t.Errorf("by tier:\n%swant:\n%s", got.String(), want)
	}
	b := p.signIn(p.adminKey)
	for _, project := range []string{"", p.project} {
		path := "/admin/dashboard?by=service_tier&project=" + project
		page := b.get(path)
		text := pageText(t, page.body)
		if problems := checkHTML(page.body); page.status != 200 || len(problems) > 0 ||
			!strings.Contains(text, "Calls by service tier") || !strings.Contains(text, "Service tiers") {
			t.Errorf("%s: %d %v %s", path, page.status, problems, text)
		}
	}
	export := b.post("/admin/dashboard/export", url.Values{"period": {"7d"}, "by": {"service_tier"}}).body
	for _, line := range []string{"service_tier,,standard,,1,,,1010,0.000675,",
		"service_tier,,flex,,1,,,1013,0.000339375,", "service_tier,,priority,,2,,,2023,0.0027075,"} {
		if !strings.Contains(export, line) {
			t.Errorf("the export lacks %s:\n%s", line, export)
		}
	}
}

// TestPricesCommand: the command prints the list price of a model, or the operator's own.
func TestPricesCommand(t *testing.T) {
	t.Parallel()
	dir := map[string]string{"DATA_DIR": t.TempDir()}
	out, err := runProgram(t, dir, "prices", "gpt-5.5-2026-04-23", "openai")
	if err != nil || !strings.Contains(out, "gpt-5.5-2026-04-23 of openai, list price of 2026-11-29\n") ||
		!strings.Contains(out, "  input: $5 per million tokens\n") ||
		!strings.Contains(out, "  flex above 272000 input tokens: output: $22.5 per million tokens\n") {
		t.Errorf("%v:\n%s", err, out)
	}
	for _, args := range [][]string{{"prices"}, {"prices", "a", "b", "c"}, {"prices", "in-no-list"}} {
		if out, err := runProgram(t, dir, args...); err == nil || out != "" {
			t.Errorf("%v printed %q", args, out)
		}
	}
}

// TestUnpricedModels: what lacks a price can be listed.
func TestUnpricedModels(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.chat()
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(200, strings.ReplaceAll(chatResponseBody, "gpt-4o-mini-2024-07-18", "in-no-list"))
	})
	body := strings.Replace(chatBody(), "gpt-4o-mini", "in-no-list", 1)
	p.do("POST", chatPattern, body, p.jsonHeaders()...)
	p.waitSettled()
	var l struct {
		Data []struct {
			Model    string
			Unpriced int64 `json:"unpriced_calls"`
		}
	}
	p.manage("GET", "/manage/prices/unpriced", "", 200, &l)
	if len(l.Data) != 1 || l.Data[0].Model != "in-no-list" || l.Data[0].Unpriced != 1 {
		t.Errorf("the models without a price: %+v", l.Data)
	}
}
