// These tests check what administrators see and change of prices: prices of all kinds, prices that begin later, the
// breakdown of a cost, multipliers and simulations.
package main

import (
	"encoding/json"
	"math/big"
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
