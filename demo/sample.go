// This file holds the sample data of `llm-proxy demo`: projects, tokens, and the calls that the
// tokens would have made in the four weeks before now. It is plain data and arithmetic; storing it,
// and what a call costs, is the program's part.
package demo

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

const historyLength = 28 * 24 * time.Hour

// A Project is a sample project.
type Project struct {
	Name, Policy string
	AllAPIs      bool // it has upstreams for Anthropic's and Google's API too
}

// Projects returns the sample projects.
func Projects() []Project {
	return []Project{
		{Name: "Search team", Policy: `{"limits":[{"count":"requests","max":300,"per":"minute"},` +
			`{"count":"tokens","max":3000000,"per":"month"}]}`},
		{Name: "Support bot", AllAPIs: true, Policy: `{"limits":[{"count":"concurrent","max":20},` +
			`{"count":"tokens","max":300000,"per":"day"}]}`},
		{Name: "Research", Policy: `{"models":["gpt-4.1*","gpt-5*","o4-mini*","text-embedding-3-large"],` +
			`"limits":[{"count":"dollars","max":6,"per":"month"}]}`},
	}
}

// A Token is a sample token and the way it is used.
type Token struct {
	Project        int // index into Projects
	Name           string
	CreatedDaysAgo int
	ExpiredDaysAgo float64 // negative: it expires in the future; 0: never
	RevokedDaysAgo float64 // 0: not revoked
	RequestsLeft   int64   // what its max_requests leaves; 0: it has no such limit
	IdleExpiry     time.Duration
	Limits         string // the limits of its policy, as a list in JSON without brackets

	callsPerDay    float64 // on a working day
	aroundTheClock bool    // not only in office hours
	tasks          []task
}

// A task is one kind of call that a token makes: what it calls, and how large the call is.
type task struct {
	weight                      int
	endpoint, model             string
	stream                      bool
	input, output               float64 // typical tokens
	cachedShare, reasoningShare float64
	refusalCode                 string // set if the proxy refuses the call
}

// Tokens returns the sample tokens. The first one is printed for the user to try.
func Tokens() []Token {
	t := sampleTasks()
	return []Token{
		{Project: 1, Name: "website chat", CreatedDaysAgo: 60, ExpiredDaysAgo: -60, callsPerDay: 65, tasks: t.bot,
			Limits: `{"count":"requests","max":60,"per":"minute"},{"count":"requests","max":2500,"per":"month"},` +
				`{"count":"tokens","max":100000,"per":"hour","shadow":true}`},
		{Project: 0, Name: "indexer", CreatedDaysAgo: 60, callsPerDay: 27, aroundTheClock: true, tasks: t.index},
		{Project: 0, Name: "search API", CreatedDaysAgo: 60, ExpiredDaysAgo: -90, callsPerDay: 48, tasks: t.search},
		{Project: 0, Name: "ranking experiments", CreatedDaysAgo: 20, ExpiredDaysAgo: -1.5, callsPerDay: 8,
			tasks: t.search},
		{Project: 0, Name: "old indexer", CreatedDaysAgo: 90, RevokedDaysAgo: 9,
			callsPerDay: 17, aroundTheClock: true, tasks: t.index},
		{Project: 1, Name: "mail triage", CreatedDaysAgo: 45, ExpiredDaysAgo: -20,
			callsPerDay: 19, aroundTheClock: true, tasks: t.mail},
		{Project: 1, Name: "voice trial", CreatedDaysAgo: 12, ExpiredDaysAgo: -18, RequestsLeft: 4, callsPerDay: 7,
			tasks: t.voice},
		{Project: 1, Name: "agency", CreatedDaysAgo: 40, ExpiredDaysAgo: 6, callsPerDay: 10, tasks: t.bot,
			Limits: `{"count":"requests","max":150,"per":"week"}`},
		{Project: 1, Name: "leaked in a notebook", CreatedDaysAgo: 15, ExpiredDaysAgo: -15, RevokedDaysAgo: 3,
			callsPerDay: 6, tasks: t.bot},
		{Project: 2, Name: "Ada", CreatedDaysAgo: 60, ExpiredDaysAgo: -120, IdleExpiry: 30 * 24 * time.Hour,
			callsPerDay: 12, tasks: t.notebook,
			Limits: `{"count":"dollars","max":2,"per":"month"},{"count":"concurrent","max":4},` +
				`{"count":"dollars","max":0.35,"per":"month","model":"gpt-5*"}`},
		{Project: 2, Name: "Grace", CreatedDaysAgo: 25, ExpiredDaysAgo: -2.5, callsPerDay: 10, tasks: t.notebook},
		{Project: 2, Name: "nightly evaluation", CreatedDaysAgo: 60, ExpiredDaysAgo: -200, RequestsLeft: 250,
			callsPerDay: 20, aroundTheClock: true, tasks: t.batch},
	}
}

type taskSets struct{ index, search, bot, mail, voice, notebook, batch []task }

func sampleTasks() taskSets {
	const (
		chat, messages   = "POST /v1/chat/completions", "POST /v1/messages"
		responses, embed = "POST /v1/responses", "POST /v1/embeddings"
	)
	return taskSets{
		index: []task{{weight: 1, endpoint: embed, model: "text-embedding-3-small", input: 1900}},
		search: []task{
			{weight: 6, endpoint: chat, model: "gpt-4o-mini-2024-07-18", input: 620, output: 90, cachedShare: 0.3},
			{weight: 3, endpoint: embed, model: "text-embedding-3-small", input: 24},
			{weight: 1, endpoint: chat, model: "gpt-4.1-mini-2025-04-14", input: 1500, output: 160},
		},
		bot: []task{
			{weight: 7, endpoint: chat, model: "gpt-4o-mini-2024-07-18", stream: true, input: 1400, output: 210,
				cachedShare: 0.6},
			{weight: 2, endpoint: messages, model: "claude-haiku-4-5", stream: true, input: 1600, output: 260,
				cachedShare: 0.5},
			{weight: 1, endpoint: "POST /v1/moderations", model: "omni-moderation-latest"},
		},
		mail: []task{
			{weight: 4, endpoint: messages, model: "claude-sonnet-5", input: 2300, output: 420, cachedShare: 0.4},
			{weight: 1, endpoint: chat, model: "mail-classifier-2", input: 800, output: 60},
		},
		voice: []task{
			{weight: 2, endpoint: "POST /v1/audio/transcriptions", model: "gpt-4o-mini-transcribe", input: 300,
				output: 120},
			{weight: 1, endpoint: "POST /v1/audio/speech", model: "gpt-4o-mini-tts"},
		},
		notebook: []task{
			{weight: 4, endpoint: responses, model: "gpt-5-mini-2025-08-07", stream: true,
				input: 2600, output: 1300, reasoningShare: 0.5},
			{weight: 2, endpoint: responses, model: "o4-mini-2025-04-16", input: 3200, output: 2400,
				reasoningShare: 0.7},
			{weight: 2, endpoint: chat, model: "gpt-4.1-2025-04-14", stream: true, input: 1800, output: 600},
			{weight: 1, endpoint: "GET /v1/models"},
			{weight: 1, endpoint: chat, model: "gpt-4o", refusalCode: "model_not_allowed"},
		},
		batch: []task{
			{weight: 5, endpoint: chat, model: "gpt-4.1-mini-2025-04-14", input: 900, output: 40, cachedShare: 0.7},
			{weight: 3, endpoint: embed, model: "text-embedding-3-large", input: 700},
		},
	}
}

// A Call is one sample call. Outcome, Source and ErrorCode are the words that the ledger uses.
type Call struct {
	Token                            int // index into Tokens
	Started                          time.Time
	Endpoint, Model                  string
	Stream                           bool
	Address                          string
	Outcome, ErrorCode               string
	Status, Attempts                 int
	Source                           string
	Input, Cached, Output, Reasoning int64 // tokens
	FirstByteUS, TotalUS             int64 // microseconds; FirstByteUS is -1 if no byte came
}

// Refused reports whether the proxy refused the call, so that it never reached a provider.
func (c *Call) Refused() bool { return c.Outcome == "refused" }

// History invents the calls of the tokens up to now, oldest first. The same now gives the same calls.
func History(now time.Time, tokens []Token) []Call {
	rng := rand.New(rand.NewPCG(28, 12))
	var calls []Call
	for hour := now.Add(-historyLength).Truncate(time.Hour); hour.Before(now); hour = hour.Add(time.Hour) {
		for i, t := range tokens {
			n := int(t.callsPerDay*hourShare(hour, t.aroundTheClock)*(0.8+0.4*rng.Float64()) + rng.Float64())
			for range n {
				at := hour.Add(time.Duration(rng.Int64N(int64(time.Hour))))
				if at.Add(2*time.Minute).After(now) || at.Before(now.AddDate(0, 0, -t.CreatedDaysAgo)) {
					continue
				}
				if c, ok := newSampleCall(rng, now, at, t); ok {
					c.Token = i
					calls = append(calls, c)
				}
			}
		}
	}
	slices.SortStableFunc(calls, func(a, b Call) int {
		return cmp.Compare(a.Started.UnixMilli(),
			b.Started.UnixMilli())
	})
	return calls
}

// hourShare returns the share of a working day's calls that falls into an hour.
func hourShare(hour time.Time, aroundTheClock bool) float64 {
	h, factor := float64(hour.Hour()), 1.0
	if d := hour.Weekday(); d == time.Saturday || d == time.Sunday {
		factor = 0.15
	}
	if aroundTheClock {
		return (1 + 0.6*math.Cos((h-3)*math.Pi/12)) / 24 * math.Sqrt(factor) // busiest at night
	}
	day := math.Exp(-(h-10.5)*(h-10.5)/6) + math.Exp(-(h-15)*(h-15)/7) // a morning, a lunch break, an afternoon
	return (day + 0.02) / 9.5 * factor
}

// newSampleCall invents one call; false: the token was no longer used at that time.
func newSampleCall(rng *rand.Rand, now, at time.Time, t Token) (Call, bool) {
	k, total := t.tasks[0], 0
	for _, other := range t.tasks {
		if total += other.weight; rng.IntN(total) < other.weight {
			k = other
		}
	}
	c := Call{Started: at, Endpoint: k.endpoint, Model: k.model, Stream: k.stream,
		Address: fmt.Sprintf("10.20.%d.%d", t.Project, 10+rng.IntN(40)),
		Status:  200, Outcome: "ok", Source: "none", FirstByteUS: -1, Attempts: 1}
	ago := now.Sub(at).Hours() / 24
	ended, reason := t.ExpiredDaysAgo, "expired"
	if t.RevokedDaysAgo > 0 {
		ended, reason = t.RevokedDaysAgo, "revoked"
	}
	if ago < ended {
		if k.refusalCode = reason; ago < ended-2 || rng.IntN(3) > 0 { // some clients keep trying for a while
			return Call{}, false
		}
	}
	if k.refusalCode != "" {
		c.Outcome, c.ErrorCode, c.Status, c.Attempts, c.TotalUS = "refused", k.refusalCode, 403, 0, 90+rng.Int64N(200)
		if k.refusalCode != "model_not_allowed" {
			c.Status = 401
		}
		return c, true
	}
	size := func(typical float64) int64 { return int64(typical * math.Exp(rng.NormFloat64()*0.5)) }
	if k.input > 0 {
		c.Source, c.Input, c.Output = "exact", max(size(k.input), 1), size(k.output)
		if rng.Float64() < k.cachedShare {
			c.Cached = c.Input * 3 / 4 / 128 * 128
		}
		c.Reasoning = int64(float64(c.Output) * k.reasoningShare * rng.Float64())
	}
	first := time.Duration(float64(180*time.Millisecond) * math.Exp(rng.NormFloat64()*0.4))
	c.FirstByteUS = first.Microseconds()
	c.TotalUS = c.FirstByteUS + c.Output*int64(9000+rng.IntN(9000))
	if !k.stream {
		c.FirstByteUS = c.TotalUS
	}
	c.injectFailure(rng)
	return c, true
}

// injectFailure lets a few calls fail.
func (c *Call) injectFailure(rng *rand.Rand) {
	cut := func() { // the stream ended early, so its usage is an estimate
		if c.Source == "exact" {
			c.Source, c.Output, c.Reasoning = "estimated", c.Output/3, 0
		}
		c.TotalUS = c.FirstByteUS + (c.TotalUS-c.FirstByteUS)/3
	}
	switch x := rng.Float64(); {
	case x < 0.012: // the provider's own errors pass through, and cost nothing
		c.Outcome, c.Status = "upstream_error", []int{429, 429, 500, 503}[rng.IntN(4)]
		c.Source, c.Input, c.Cached, c.Output, c.Reasoning, c.TotalUS = "none", 0, 0, 0, 0, c.FirstByteUS
	case x < 0.014 && c.Source == "exact":
		c.Outcome, c.Status, c.ErrorCode = "upstream_error", 504, "upstream_timeout"
		c.FirstByteUS, c.TotalUS = -1, time.Minute.Microseconds()
		c.Source, c.Cached, c.Output, c.Reasoning = "estimated", 0, 0, 0
	case x < 0.030 && c.Stream:
		c.Outcome, c.ErrorCode = "client_gone", "client_gone"
		cut()
	case x < 0.035 && c.Stream:
		c.Outcome, c.ErrorCode = "truncated", "upstream_cut"
		cut()
	}
}
