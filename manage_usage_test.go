// This file tests /manage/usage, /manage/requests and /manage/prices: sums agree with the ledger for every interval
// and group, and a price is in force from the next call on.
package main

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// A usageEntry is a row of GET /manage/usage.
type usageEntry struct {
	At             *time.Time
	ProjectID      *string `json:"project_id"`
	ProjectName    *string `json:"project_name"`
	TokenID        *string `json:"token_id"`
	TokenName      *string `json:"token_name"`
	Model          *string
	Endpoint       *string
	Outcome        *string
	Calls          int64
	Input          int64       `json:"input_tokens"`
	Cached         int64       `json:"cached_tokens"`
	Output         int64       `json:"output_tokens"`
	Reasoning      int64       `json:"reasoning_tokens"`
	Cost           json.Number `json:"cost"`
	UnpricedCalls  int64       `json:"unpriced_calls"`
	EstimatedCalls int64       `json:"estimated_calls"`
}

// group names what the row is about, by what it is grouped by.
func (l *usageEntry) group() string {
	var parts []string
	if l.At != nil {
		parts = append(parts, l.At.UTC().Format(time.RFC3339))
	}
	for _, p := range []*string{l.ProjectID, l.TokenID, l.Model, l.Endpoint, l.Outcome} {
		if p != nil {
			parts = append(parts, *p)
		}
	}
	return strings.Join(parts, "|")
}

func (l *usageEntry) numbers() string {
	return fmt.Sprint(l.Calls, l.Input, l.Cached, l.Output, l.Reasoning, l.Cost, l.UnpricedCalls, l.EstimatedCalls)
}

func (p *testProxy) usage(query string) []usageEntry {
	p.t.Helper()
	var l struct{ Data []usageEntry }
	p.manage("GET", "/manage/usage?"+query, "", 200, &l)
	return l.Data
}

// A usageTest is a ledger with some months of calls.
type usageTest struct {
	*testProxy
	now      time.Time
	rows     []*requestRow
	projects map[int64]string // seq to id
	tokens   map[int64]string
}

// newUsageTest records calls of the last 70 days in the ledger.
func newUsageTest(t *testing.T) *usageTest {
	t.Helper()
	u := &usageTest{testProxy: newTest(t, nil), now: time.Now(), projects: map[int64]string{},
		tokens: map[int64]string{}}
	var second struct{ ID string }
	u.manage("POST", "/manage/projects", `{"name":"second"}`, 201, &second)
	var seqs [][2]int64
	for _, project := range []string{u.project, u.project, second.ID} {
		var token struct{ ID string }
		u.manage("POST", "/manage/tokens", `{"project_id":"`+project+`","name":"of `+project+`"}`, 201, &token)
		row, err := u.instance.store.tokenByID(t.Context(), token.ID)
		if err != nil {
			t.Fatal(err)
		}
		u.projects[row.project], u.tokens[row.seq] = project, token.ID
		seqs = append(seqs, [2]int64{row.project, row.seq})
	}
	random := rand.New(rand.NewPCG(1, 2))
	pick := func(of ...string) string { return of[random.IntN(len(of))] }
	for i := range 600 {
		at := u.now.Add(-time.Duration(random.Int64N(int64(70 * 24 * time.Hour))))
		if i%2 == 0 {
			at = u.now.Add(-time.Duration(random.Int64N(int64(30 * time.Hour))))
		}
		seq := seqs[random.IntN(len(seqs))]
		r := &requestRow{
			id:          minIDAt(at) + int64(i),
			started:     at.UnixMilli(),
			project:     seq[0],
			token:       seq[1],
			endpoint:    "POST /v1/" + pick("chat/completions", "embeddings"),
			address:     "192.0.2.1",
			model:       pick("gpt-4o", "gpt-5", "invented"),
			status:      200,
			outcome:     callOutcome(pick("ok", "refused", "client_gone", "upstream_error")),
			source:      usageSource(pick("exact", "estimated", "none")),
			counts:      randomCounts(random),
			firstByteUS: -1,
			totalUS:     1000,
			attempts:    1,
		}
		r.modelTracked = r.model != "invented" || r.outcome == outcomeOK
		if r.source == usageNone {
			r.counts = tokenCounts{}
		} else if r.model != "invented" {
			r.priced, r.cost = true, random.Int64N(1e9)
		}
		u.rows = append(u.rows, r)
		u.instance.ledger.recordRefused(r, true)
	}
	u.waitSettled()
	return u
}

func randomCounts(random *rand.Rand) tokenCounts {
	return tokenCounts{
		input:     random.Int64N(5000),
		cached:    random.Int64N(500),
		output:    random.Int64N(900),
		reasoning: random.Int64N(90),
	}
}

// entryOf returns the row of the response that a call is counted in, without its sums.
func (u *usageTest) entryOf(r *requestRow, interval string, by map[string]bool) (l usageEntry) {
	at := time.UnixMilli(r.started).UTC()
	switch interval {
	case "hour":
		l.At = new(at.Truncate(time.Hour))
	case "day":
		l.At = new(time.Date(at.Year(), at.Month(), at.Day(), 0, 0, 0, 0, time.UTC))
	case "month":
		l.At = new(time.Date(at.Year(), at.Month(), 1, 0, 0, 0, 0, time.UTC))
	}
	model := r.model
	if !r.modelTracked {
		model = ""
	}
	for name, f := range map[string]struct {
		to   **string
		text string
	}{
		"project":  {&l.ProjectID, u.projects[r.project]},
		"token":    {&l.TokenID, u.tokens[r.token]},
		"model":    {&l.Model, model},
		"endpoint": {&l.Endpoint, r.endpoint},
		"outcome":  {&l.Outcome, string(r.outcome)},
	} {
		if by[name] {
			*f.to = new(f.text)
		}
	}
	return l
}

// expect adds up the rows that keep selects.
func (u *usageTest) expect(interval string, by map[string]bool, keep func(*requestRow) bool) map[string]string {
	sums := map[string]*usageSum{}
	for _, r := range u.rows {
		if !keep(r) {
			continue
		}
		l := u.entryOf(r, interval, by)
		s := sums[l.group()]
		if s == nil {
			s = &usageSum{}
			sums[l.group()] = s
		}
		s.calls++
		s.input += r.counts.input
		s.cached += r.counts.cached
		s.output += r.counts.output
		s.reasoning += r.counts.reasoning
		switch {
		case r.priced:
			s.cost += r.cost
		case r.source != usageNone:
			s.unpriced++
		}
		if r.source == usageEstimated {
			s.estimated++
		}
	}
	out := map[string]string{}
	for k, s := range sums {
		out[k] = fmt.Sprint(s.calls, s.input, s.cached, s.output, s.reasoning, formatNanos(s.cost), s.unpriced,
			s.estimated)
	}
	return out
}

func (u *usageTest) compare(query string, want map[string]string) {
	u.t.Helper()
	got := map[string]string{}
	for _, l := range u.usage(query) {
		if _, twice := got[l.group()]; twice {
			u.t.Errorf("%s: %s is listed twice", query, l.group())
		}
		got[l.group()] = l.numbers()
	}
	for k, v := range want {
		if got[k] != v {
			u.t.Errorf("%s: %q is %s, want %s", query, k, got[k], v)
		}
	}
	if len(got) != len(want) {
		u.t.Errorf("%s: %d rows, want %d", query, len(got), len(want))
	}
}

// TestUsageSums: for every interval and every set of groups, with each filter, the sums are those of the rows.
func TestUsageSums(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	var rows struct{ Data []requestEntry }
	if u.manage("GET", "/manage/requests?limit=500", "", 200, &rows); len(rows.Data) != 500 {
		t.Fatalf("the ledger shows %d rows", len(rows.Data))
	}
	all := func(*requestRow) bool { return true }
	from := "&from=" + u.now.AddDate(0, 0, -80).UTC().Format(time.RFC3339)
	names := []string{"project", "token", "model", "endpoint", "outcome"}
	for _, interval := range []string{"hour", "day", "month", "total"} {
		for set := range 1 << len(names) {
			by := map[string]bool{}
			var list []string
			for i, name := range names {
				if set>>i&1 == 1 {
					by[name], list = true, append(list, name)
				}
			}
			query := "interval=" + interval + from
			if len(list) > 0 {
				query += "&group_by=" + strings.Join(list, ",")
			}
			u.compare(query, u.expect(interval, by, all))
		}
		byToken := map[string]bool{"token": true, "model": true}
		for project, id := range u.projects {
			u.compare("interval="+interval+from+"&project_id="+id+"&group_by=token,model",
				u.expect(interval, byToken, func(r *requestRow) bool { return r.project == project }))
			u.compare("interval="+interval+from+"&project_id="+id,
				u.expect(interval, nil, func(r *requestRow) bool { return r.project == project }))
		}
		for token, id := range u.tokens {
			mine := func(r *requestRow) bool { return r.token == token }
			u.compare("interval="+interval+from+"&token_id="+id, u.expect(interval, nil, mine))
			u.compare("interval="+interval+from+"&token_id="+id+"&group_by=model,token",
				u.expect(interval, byToken, mine))
			for project, projectID := range u.projects { // both filters together
				u.compare("interval="+interval+from+"&token_id="+id+"&project_id="+projectID,
					u.expect(interval, nil,
						func(r *requestRow) bool { return r.token == token && r.project == project }))
			}
		}
		for _, none := range []string{
			"&project_id=proj_none", "&token_id=tok_none", "&group_by=token&project_id=proj_none",
		} {
			u.compare("interval="+interval+from+none, nil)
		}
	}
}

// TestUsageRange: from and to are rounded down to a whole hour or day, an end that is not in the past is rounded up,
// both have defaults, and the rows are in order.
func TestUsageRange(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	for _, c := range []struct {
		interval string
		unit     time.Duration
		back     time.Duration // by default
	}{
		{"hour", time.Hour, 24 * time.Hour},
		{"day", 24 * time.Hour, 30 * 24 * time.Hour},
		{"total", 24 * time.Hour, 30 * 24 * time.Hour},
	} {
		within := func(from, to time.Time, unit time.Duration) func(*requestRow) bool {
			if to.Before(u.now) {
				to = to.Truncate(unit)
			}
			return func(r *requestRow) bool {
				at := time.UnixMilli(r.started).Truncate(unit)
				return !at.Before(from.Truncate(unit)) && at.Before(to)
			}
		}
		u.compare("interval="+c.interval,
			u.expect(c.interval, nil, within(u.now.Add(-c.back), u.now.Add(time.Minute), c.unit)))
		from, to := u.now.Add(-9*24*time.Hour-1234*time.Second), u.now.Add(-5*time.Hour-99*time.Second)
		query := url.Values{
			"interval": {c.interval},
			"from":     {from.In(time.FixedZone("", -3*3600)).Format(time.RFC3339Nano)},
			"to":       {to.UTC().Format(time.RFC3339Nano)},
		}
		unit := c.unit
		if c.interval == "total" { // the sums of all tokens together are read by the hour
			unit = time.Hour
		}
		u.compare(query.Encode(), u.expect(c.interval, nil, within(from, to, unit)))
	}
	if rows := u.usage("interval=month"); len(rows) < 3 {
		t.Errorf("a year by month: %d rows", len(rows))
	}
	rows := u.usage("group_by=project,model")
	if !slices.IsSortedFunc(rows, func(a, b usageEntry) int {
		return strings.Compare(a.At.Format(time.RFC3339)+*a.ProjectName+*a.Model,
			b.At.Format(time.RFC3339)+*b.ProjectName+*b.Model)
	}) {
		t.Error("the rows are not in order")
	}
	for query, param := range map[string]string{
		"interval=week": "interval", "group_by=": "group_by", "group_by=project,project": "group_by",
		"group_by=project,": "group_by", "group_by=user": "group_by",
		"group_by=project;token": "", "from=yesterday": "from", "to=1764000000": "to",
		"from=2026-02-30T00:00:00Z": "from", "from=0001-01-01T00:00:00Z": "from", "to=9999-01-01T00:00:00Z": "to",
		"from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z": "from",
		"from=2026-01-01T00:00:00Z&to=2026-01-01T00:00:00Z": "from", "limit=5": "limit", "model=x": "model",
	} {
		u.manageRefused("GET", "/manage/usage?"+query, "", 400, param)
	}
}

// TestUsageAdjoins: ranges that adjoin count each call once, wherever they meet, and each answer names its range.
func TestUsageAdjoins(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	for _, query := range []string{"interval=total", "interval=day", "interval=hour", "interval=month",
		"interval=total&group_by=token", "interval=total&group_by=model", "interval=day&group_by=project,outcome"} {
		for _, offset := range []time.Duration{0, 30 * time.Minute, 5*time.Hour + 30*time.Minute, -8 * time.Hour,
			1234567 * time.Millisecond} {
			u.checkAdjoining(query, offset)
		}
	}
}

// checkAdjoining asks for the usage of 40 days in ranges of some days that meet at an offset from midnight.
func (u *usageTest) checkAdjoining(query string, offset time.Duration) {
	const day = 24 * time.Hour
	var calls, want int64
	var first, end time.Time
	for from := u.now.Add(-40 * day).Truncate(day); from.Before(u.now); {
		to := from.Add(4 * day).Truncate(day).Add(day + offset)
		var list struct {
			From, To time.Time
			Data     []usageEntry
		}
		u.manage("GET", "/manage/usage?"+query+"&from="+from.Format(time.RFC3339Nano)+
			"&to="+to.Format(time.RFC3339Nano), "", 200, &list)
		for _, l := range list.Data {
			calls += l.Calls
		}
		if first.IsZero() {
			first = list.From
		} else if !list.From.Equal(end) {
			u.t.Errorf("%s, %v: a range begins at %v, the one before ends at %v", query, offset, list.From, end)
		}
		from, end = to, list.To
	}
	for _, r := range u.rows {
		if r.started >= first.UnixMilli() {
			want++
		}
	}
	if calls != want || want == 0 || end.Before(u.now) || first.After(u.now.Add(-40*day)) {
		u.t.Errorf("%s, %v: the ranges count %d calls from %v to %v, want %d", query, offset, calls, first, end, want)
	}
}

// TestUsageRetention: the hourly sums of single tokens are deleted after their time. Those of projects, and those by
// day, stay.
func TestUsageRetention(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	from := "&from=" + u.now.AddDate(0, 0, -80).UTC().Format(time.RFC3339)
	before := u.now.AddDate(0, 0, -10).UTC().Truncate(24 * time.Hour)
	for range 100 {
		n, err := u.instance.store.deleteOldSums(t.Context(), before.UnixMilli(), 2)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
	}
	all := func(*requestRow) bool { return true }
	token := map[string]bool{"token": true}
	u.compare("interval=hour&group_by=token"+from,
		u.expect("hour", token, func(r *requestRow) bool { return r.started >= before.UnixMilli() }))
	u.compare("interval=hour&group_by=project"+from, u.expect("hour", map[string]bool{"project": true}, all))
	u.compare("interval=day&group_by=token"+from, u.expect("day", token, all))
	u.compare("interval=total&group_by=token,model"+from,
		u.expect("total", map[string]bool{"token": true, "model": true}, all))
}

// TestRequestList: filters are combined, and the pages have all rows, newest first.
func TestRequestList(t *testing.T) {
	t.Parallel()
	u := newUsageTest(t)
	from, to := u.now.Add(-20*time.Hour), u.now.Add(-2*time.Hour)
	span := "&from=" + from.UTC().Format(time.RFC3339Nano) + "&to=" + to.UTC().Format(time.RFC3339Nano)
	inSpan := func(r *requestRow) bool { return r.started >= from.UnixMilli() && r.started < to.UnixMilli() }
	project, token := u.rows[0].project, u.rows[0].token
	var other int64
	for seq := range u.projects {
		if seq != project {
			other = seq
		}
	}
	none := func(*requestRow) bool { return false }
	byToken, byProject := "&token_id="+u.tokens[token], "&project_id="+u.projects[project]
	for _, c := range []struct {
		query string
		keep  func(*requestRow) bool
	}{
		{"", func(*requestRow) bool { return true }},
		{span, inSpan},
		{"&outcome=ok", func(r *requestRow) bool { return r.outcome == outcomeOK }},
		{byProject + span, func(r *requestRow) bool { return r.project == project && inSpan(r) }},
		{byToken + "&outcome=refused" + span,
			func(r *requestRow) bool { return r.token == token && r.outcome == outcomeRefused && inSpan(r) }},
		{byToken + byProject, func(r *requestRow) bool { return r.token == token }},
		{byToken + "&project_id=" + u.projects[other], none},
		{"&project_id=proj_none", none},
		{"&token_id=tok_none", none},
	} {
		var want []string
		for _, r := range u.rows {
			if c.keep(r) {
				want = append(want, formatRequestID(r.id))
			}
		}
		slices.Sort(want)
		slices.Reverse(want)
		got := u.listIDs("/manage/requests?limit=97"+c.query, func(int) {})
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %d rows, want %d", c.query, len(got), len(want))
		}
	}
	for query, param := range map[string]string{
		"outcome=OK": "outcome", "outcome=": "outcome", "from=x": "from", "limit=501": "limit", "status=200": "status",
	} {
		u.manageRefused("GET", "/manage/requests?"+query, "", 400, param)
	}
}

// chatCost returns what a chat completion costs, "null" if its price is unknown.
func (p *testProxy) chatCost() string {
	p.t.Helper()
	p.chat()
	if c := p.lastCall().Cost; c != nil {
		return formatNanos(int64(math.Round(*c * 1e9)))
	}
	return "null"
}

// TestPriceOverride: an operator's price is in force from the next call on, and the list price again when it is
// deleted. A call without a known price costs null, not 0.
func TestPriceOverride(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	listed := p.chatCost()
	if listed != "0.00000315" { // 9 tokens at 0.15 dollars a million, 3 at 0.60
		t.Errorf("the list price gives %s", listed)
	}
	var price, same struct{ ID string }
	p.manage("POST", "/manage/prices", `{"match":"gpt-4o-mini*","input":"1000000","output":0}`, 201, &price)
	if got := p.chatCost(); got != "9" {
		t.Errorf("the first own price gives %s", got)
	}
	p.manage("POST", "/manage/prices", `{"match":"gpt-4o-mini*","input":1.5,"output":2.000001}`, 201, &same)
	if got := p.chatCost(); same.ID != price.ID || got != "0.0000195" { // 13500 + 6000.003 nano-dollars, rounded
		t.Errorf("the price %s, set again, gives %s", same.ID, got)
	}
	p.manage("POST", "/manage/prices", `{"match":"gpt-4o-mini-2024-07-18","input":1000}`, 201, nil)
	if got := p.chatCost(); got != "0.0000195" { // it has no price for output: the price of the model that was sent
		t.Errorf("without a price for output: %s", got)
	}
	var l struct {
		Data []struct {
			ID, Match     string
			Input, Output *json.Number
		}
	}
	p.manage("GET", "/manage/prices", "", 200, &l)
	if len(l.Data) != 2 || l.Data[0].Match != "gpt-4o-mini*" || l.Data[0].Output.String() != "2.000001" ||
		l.Data[1].Output != nil {
		t.Errorf("the list: %+v", l)
	}
	p.manage("GET", "/manage/prices?model=gpt-4o-mini-x", "", 200, &l)
	if len(l.Data) != 1 || l.Data[0].Input.String() != "1.5" {
		t.Errorf("the effective price: %+v", l)
	}
	p.manage("DELETE", "/manage/prices/"+l.Data[0].ID, "", 404, nil) // an effective price has no ID
	var mine struct{ Data []struct{ ID string } }
	p.manage("GET", "/manage/prices", "", 200, &mine)
	for _, m := range mine.Data {
		p.manage("DELETE", "/manage/prices/"+m.ID, "", 200, nil)
	}
	if got := p.chatCost(); got != listed {
		t.Errorf("without own prices: %s, before %s", got, listed)
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(200, strings.ReplaceAll(chatResponseBody, "gpt-4o-mini-2024-07-18", "in-no-list-1"))
	})
	if got := p.chatCost(); got != listed {
		t.Errorf("an unknown name of a known model costs %s", got)
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(200, strings.ReplaceAll(chatResponseBody, "gpt-4o-mini-2024-07-18", "in-no-list-2"))
	})
	body := strings.Replace(chatBody(), "gpt-4o-mini", "in-no-list-2", 1)
	p.do("POST", "/v1/chat/completions", body, "Authorization", "Bearer "+p.token, "Content-Type", "application/json")
	if row := p.lastCall(); row.Cost != nil {
		t.Errorf("an unknown model costs %v", *row.Cost)
	}
	for _, u := range p.usage("interval=total&group_by=model") {
		want := map[bool]string{false: "0", true: "1"}[*u.Model == "in-no-list-2"]
		if fmt.Sprint(u.UnpricedCalls) != want || *u.Model == "in-no-list-2" && u.Cost != "0" {
			t.Errorf("%s: %d calls without a price, cost %s", *u.Model, u.UnpricedCalls, u.Cost)
		}
	}
	if p.manage("GET", "/manage/prices?model=in-no-list-1", "", 200, &l); len(l.Data) != 0 {
		t.Errorf("the price of an unknown model: %+v", l)
	}
}

// TestPriceInput: a refusal names its field.
func TestPriceInput(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for _, c := range [][2]string{
		{`{"input":1}`, "match"}, {`{"match":"","input":1}`, "match"}, {`{"match":"a b","input":1}`, "match"},
		{`{"match":"` + strings.Repeat("x", 257) + `","input":1}`, "match"},
		{`{"match":"m"}`, "input"}, {`{"match":"m","cached_input":1}`, "input"},
		{`{"match":"m","input":null,"output":null}`, "input"}, {`{"match":"m","input":-1}`, "input"},
		{`{"match":"m","input":1000000.1}`, "input"}, {`{"match":"m","output":0.0000001}`, "output"},
		{`{"match":"m","output":1e3}`, "output"}, {`{"match":"m","output":"1,5"}`, "output"},
		{`{"match":"m","output":""}`, "output"}, {`{"match":"m","output":true}`, "output"},
		{`{"match":"m","output":[1]}`, "output"}, {`{"match":"m","input":1,"audio_input":"free"}`, "audio_input"},
		{`{"match":"m","input":1,"cost":1}`, "cost"}, {`{"match":"m","input":1,"input":2}`, "input"},
		{`{"match":"m","input":"\"\"1\"\""}`, "input"},
	} {
		p.manageRefused("POST", "/manage/prices", c[0], 400, c[1])
	}
}

// TestUsageAsTable: as CSV, usage has a column for each field that JSON may have, and the same values.
func TestUsageAsTable(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.changeProject(`"name":"=cmd()","policy":{"attribution":{"tags":["team"]}}`)
	p.do("POST", "/v1/chat/completions", chatBody(`"user":"ann, \"A\""`),
		p.jsonHeaders("X-LLM-Proxy-Tags", "team=a")...)
	p.chat()
	p.waitSettled()
	table := func(query string, accept ...string) [][]string {
		res := p.do("GET", "/manage/usage"+query, "", append(accept, "Authorization", "Bearer "+p.adminKey)...)
		rows, err := csv.NewReader(strings.NewReader(res.body)).ReadAll()
		if err != nil || res.header.Get("Content-Type") != csvType || len(rows) < 2 {
			t.Fatalf("%s: %d %v %s, %v", query, res.status, res.header, res.body, err)
		}
		return rows
	}
	fields := map[string]bool{}
	for _, query := range []string{"?interval=day&group_by=project,token,model,endpoint,outcome,cache,service_tier",
		"?interval=total&group_by=end_user,project", "?group_by=tag:team", "?group_by=session"} {
		var list struct{ Data []map[string]json.RawMessage }
		p.manage("GET", "/manage/usage"+query, "", 200, &list)
		rows := table(query + "&format=csv")
		if len(rows) != len(list.Data)+1 {
			t.Errorf("%s: %d rows, %d in JSON", query, len(rows), len(list.Data))
		}
		for i, row := range list.Data {
			for name, raw := range row {
				fields[name] = true
				column, text := slices.Index(rows[0], name), string(raw)
				if column < 0 {
					t.Fatalf("%s: there is no column %s in %v", query, name, rows[0])
				}
				_ = json.Unmarshal(raw, &text) // a number stays as it is
				if got := rows[i+1][column]; got != text && got != "'"+text {
					t.Errorf("%s: %s is %q, want %q", query, name, got, text)
				}
			}
		}
	}
	rows := table("?group_by=project", "Accept", "text/csv;q=1, */*;q=0.1")
	if column := slices.Index(rows[0], "project_name"); rows[1][column] != "'=cmd()" {
		t.Errorf("a formula is %q", rows[1][column])
	}
	for _, name := range rows[0] {
		if !fields[name] && name != "session" && name != "would_refuse" && name != "client_retries" {
			t.Errorf("no answer has %s", name)
		}
	}
	p.manageRefused("GET", "/manage/usage?format=xml", "", 400, "format")
	res := p.do("GET", "/manage/usage?format=json", "", "Authorization", "Bearer "+p.adminKey, "Accept", "text/csv")
	if res.header.Get("Content-Type") != "application/json" {
		t.Errorf("format=json: %v", res.header)
	}
}
