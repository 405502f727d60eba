// This room is `llm-proxy demo`: the whole program, against the stand-in
// provider, in a directory that goes away at the end. A newcomer needs no key
// and no setting; what was set applies all the same, except where data is kept
// and where calls go.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"
)

const demoChunkDelay = 20 * time.Millisecond // between the chunks of a stream

// demo serves with sample data until ctx is over.
func (p *program) demo(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp(p.getenv("TMPDIR"), "llm-proxy-demo-")
	if err != nil {
		return fmt.Errorf("making a directory for the demo: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	l, err := net.Listen("tcp", "127.0.0.1:0") // never elsewhere: the provider invents answers
	if err != nil {
		return fmt.Errorf("listening for the stand-in provider: %w", err)
	}
	key := newSecret("sk-demo-" + randomBase62(40))
	provider := &http.Server{Handler: newDemoProvider(key(), demoChunkDelay), ReadHeaderTimeout: 10 * time.Second}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = provider.Serve(l)
	}()
	defer func() { _ = provider.Close(); <-served }()

	q := *p
	q.getenv = demoEnvironment(p.getenv, dir, "http://"+l.Addr().String())
	var in *instance
	var d *demoData
	q.ready = func(addr net.Addr) {
		q.printDemoGuide(in, d, addr)
		if p.ready != nil {
			p.ready(addr)
		}
	}
	return q.serveWithSetup(ctx, func(ctx context.Context, opened *instance) (err error) {
		in = opened
		d, err = in.seedDemoData(ctx, time.Now(), key)
		return err
	})
}

// demoEnvironment is the environment, but for what the demo decides itself.
func demoEnvironment(getenv func(string) string, dir, provider string) func(string) string {
	return func(name string) string {
		switch name {
		case "DATA_DIR":
			return dir
		case "OPENAI_API_URL":
			return provider
		case "ALLOW_PRIVATE_UPSTREAMS":
			return "true" // the provider is on loopback
		case "DATABASE_URL", "OPENAI_API_KEY":
			return ""
		case "LOG_FORMAT":
			if getenv(name) == "" {
				return "text" // somebody is looking at a terminal
			}
		}
		return getenv(name)
	}
}

// printDemoGuide prints what to try. Secrets go to stdout only, and only those that
// were made just now.
func (p *program) printDemoGuide(in *instance, d *demoData, addr net.Addr) {
	base := in.baseURL()
	if host, ok := strings.CutSuffix(base, ":0"); ok {
		base = host + addr.String()[strings.LastIndexByte(addr.String(), ':'):]
	}
	key := "(your MANAGEMENT_TOKEN)"
	export := "<your MANAGEMENT_TOKEN>"
	if d.key != nil {
		key = d.key() + "   (role admin)"
		export = d.key()
	}
	fmt.Fprintf(p.stdout, `
llm-proxy demo: a stand-in provider answers. No key is needed, nothing leaves this machine, nothing is kept.
%[5]d projects, %[6]d tokens and %[7]d calls of the last four weeks are there as samples.

  base URL         %[1]s/v1
  token            %[2]s   (project "Support bot")
  management key   %[3]s
  pages            %[1]s/admin   (sign in with the management key)

Try it in another terminal:

  export BASE=%[1]s TOKEN=%[2]s KEY="%[4]s" JSON="Content-Type: application/json"

An answer, the same as a stream, and a call of a tool:

  curl $BASE/v1/chat/completions -H "Authorization: Bearer $TOKEN" -H "$JSON" \
    -d '{"model":"gpt-4o-mini","messages":[{"role":"user","content":"Hello"}]}'
  curl -N $BASE/v1/chat/completions -H "Authorization: Bearer $TOKEN" -H "$JSON" \
    -d '{"model":"gpt-4o-mini","stream":true,"messages":[{"role":"user","content":"Tell me a story"}]}'
  curl $BASE/v1/chat/completions -H "Authorization: Bearer $TOKEN" -H "$JSON" \
    -d '{"model":"gpt-4o","messages":[{"role":"user","content":"What is the weather in Berlin?"}],"tools":[{"type":"function","function":{"name":"get_weather","parameters":{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}}}]}'

Anthropic's API, with the same token:

  curl $BASE/v1/messages -H "x-api-key: $TOKEN" -H "anthropic-version: 2023-06-01" -H "$JSON" \
    -d '{"model":"claude-sonnet-5","max_tokens":100,"messages":[{"role":"user","content":"Hello"}]}'

What was used and what it cost, and the last calls on record:

  curl "$BASE/manage/usage?interval=total&group_by=project,model" -H "Authorization: Bearer $KEY"
  curl "$BASE/manage/requests?limit=5" -H "Authorization: Bearer $KEY"
  curl $BASE/manage/tokens -H "Authorization: Bearer $KEY"

A prompt with [[error 429]] or [[error 500]] in it is refused by the provider in that way, [[cut]] breaks the answer off
half-way, [[slow 3s]] delays it; the model no-such-model does not exist. Ctrl-C ends the demo.

`, base, d.token(), key, export, d.projects, d.tokens, d.calls)
}

const (
	demoHistoryLength = 28 * 24 * time.Hour
	demoBatchSize     = 2000 // rows in one transaction
)

// demoData is what fillDemo made, for the newcomer to see.
type demoData struct {
	token                   secret
	key                     secret // nil: MANAGEMENT_TOKEN is set
	projects, tokens, calls int
}

// A demoProject is a sample project. Calls to Anthropic's API need anthropic.
type demoProject struct {
	name, policy string
	anthropic    bool
}

func demoProjects() []demoProject {
	return []demoProject{
		{name: "Search team", policy: `{"limits":[{"count":"requests","max":300,"per":"minute"},{"count":"tokens","max":3000000,"per":"month"}]}`},
		{name: "Support bot", policy: `{"limits":[{"count":"concurrent","max":20},{"count":"tokens","max":300000,"per":"day"}]}`, anthropic: true},
		{name: "Research", policy: `{"models":["gpt-4.1*","gpt-5*","o4-mini*","text-embedding-3-large"],"limits":[{"count":"dollars","max":6,"per":"month"}]}`},
	}
}

// A demoUser is a sample token and how it is used. Times are in days before now.
type demoUser struct {
	project                        int
	name                           string
	createdDaysAgo                 int
	expiredDaysAgo, revokedDaysAgo float64 // before now; expires < 0 is in the future, 0 never; revoked 0: it is not
	requestsLeft                   int64   // requests that max_requests leaves; 0: no such limit
	idleExpiry                     time.Duration
	limits                         string  // of its policy
	callsPerDay                    float64 // calls on a working day
	aroundTheClock                 bool    // round the clock, not in office hours
	tasks                          []demoTask
}

// A demoTask is a kind of call: what is called, and how large it is.
type demoTask struct {
	weight                      int
	endpoint, model             string
	stream                      bool
	input, output               float64 // typical tokens
	cachedShare, reasoningShare float64
	refusalCode                 string // the code of a refusal: the call never went out
}

func demoUsers() []demoUser {
	const chat, messages, responses, embed = "POST /v1/chat/completions", "POST /v1/messages", "POST /v1/responses", "POST /v1/embeddings"
	index := []demoTask{{weight: 1, endpoint: embed, model: "text-embedding-3-small", input: 1900}}
	search := []demoTask{
		{weight: 6, endpoint: chat, model: "gpt-4o-mini-2024-07-18", input: 620, output: 90, cachedShare: 0.3},
		{weight: 3, endpoint: embed, model: "text-embedding-3-small", input: 24},
		{weight: 1, endpoint: chat, model: "gpt-4.1-mini-2025-04-14", input: 1500, output: 160},
	}
	bot := []demoTask{
		{weight: 7, endpoint: chat, model: "gpt-4o-mini-2024-07-18", stream: true, input: 1400, output: 210, cachedShare: 0.6},
		{weight: 2, endpoint: messages, model: "claude-haiku-4-5", stream: true, input: 1600, output: 260, cachedShare: 0.5},
		{weight: 1, endpoint: "POST /v1/moderations", model: "omni-moderation-latest"},
	}
	mail := []demoTask{
		{weight: 4, endpoint: messages, model: "claude-sonnet-5", input: 2300, output: 420, cachedShare: 0.4},
		{weight: 1, endpoint: chat, model: "mail-classifier-2", input: 800, output: 60},
	}
	voice := []demoTask{
		{weight: 2, endpoint: "POST /v1/audio/transcriptions", model: "gpt-4o-mini-transcribe", input: 300, output: 120},
		{weight: 1, endpoint: "POST /v1/audio/speech", model: "gpt-4o-mini-tts"},
	}
	notebook := []demoTask{
		{weight: 4, endpoint: responses, model: "gpt-5-mini-2025-08-07", stream: true, input: 2600, output: 1300, reasoningShare: 0.5},
		{weight: 2, endpoint: responses, model: "o4-mini-2025-04-16", input: 3200, output: 2400, reasoningShare: 0.7},
		{weight: 2, endpoint: chat, model: "gpt-4.1-2025-04-14", stream: true, input: 1800, output: 600},
		{weight: 1, endpoint: "GET /v1/models"},
		{weight: 1, endpoint: chat, model: "gpt-4o", refusalCode: "model_not_allowed"},
	}
	batch := []demoTask{
		{weight: 5, endpoint: chat, model: "gpt-4.1-mini-2025-04-14", input: 900, output: 40, cachedShare: 0.7},
		{weight: 3, endpoint: embed, model: "text-embedding-3-large", input: 700},
	}
	return []demoUser{
		{project: 1, name: "website chat", createdDaysAgo: 60, expiredDaysAgo: -60, callsPerDay: 65, tasks: bot,
			limits: `{"count":"requests","max":60,"per":"minute"},{"count":"requests","max":2500,"per":"month"},{"count":"tokens","max":100000,"per":"hour","shadow":true}`}, // the newcomer's: see fillDemo
		{project: 0, name: "indexer", createdDaysAgo: 60, callsPerDay: 27, aroundTheClock: true, tasks: index},
		{project: 0, name: "search API", createdDaysAgo: 60, expiredDaysAgo: -90, callsPerDay: 48, tasks: search},
		{project: 0, name: "ranking experiments", createdDaysAgo: 20, expiredDaysAgo: -1.5, callsPerDay: 8, tasks: search},
		{project: 0, name: "old indexer", createdDaysAgo: 90, revokedDaysAgo: 9, callsPerDay: 17, aroundTheClock: true, tasks: index},
		{project: 1, name: "mail triage", createdDaysAgo: 45, expiredDaysAgo: -20, callsPerDay: 19, aroundTheClock: true, tasks: mail},
		{project: 1, name: "voice trial", createdDaysAgo: 12, expiredDaysAgo: -18, requestsLeft: 4, callsPerDay: 7, tasks: voice},
		{project: 1, name: "agency", createdDaysAgo: 40, expiredDaysAgo: 6, callsPerDay: 10, tasks: bot, limits: `{"count":"requests","max":150,"per":"week"}`},
		{project: 1, name: "leaked in a notebook", createdDaysAgo: 15, expiredDaysAgo: -15, revokedDaysAgo: 3, callsPerDay: 6, tasks: bot},
		{project: 2, name: "Ada", createdDaysAgo: 60, expiredDaysAgo: -120, idleExpiry: 30 * 24 * time.Hour, callsPerDay: 12, tasks: notebook,
			limits: `{"count":"dollars","max":2,"per":"month"},{"count":"dollars","max":0.35,"per":"month","model":"gpt-5*"},{"count":"concurrent","max":4}`},
		{project: 2, name: "Grace", createdDaysAgo: 25, expiredDaysAgo: -2.5, callsPerDay: 10, tasks: notebook},
		{project: 2, name: "nightly evaluation", createdDaysAgo: 60, expiredDaysAgo: -200, requestsLeft: 250, callsPerDay: 20, aroundTheClock: true, tasks: batch},
	}
}

// seedDemoData makes the sample data. key is the stand-in provider's.
func (in *instance) seedDemoData(ctx context.Context, now time.Time, key secret) (*demoData, error) {
	d := &demoData{}
	if in.cfg.managementToken == nil {
		var err error
		if d.key, err = in.manage.createFirstKey(ctx); err != nil {
			return nil, err
		}
	}
	var projects []*projectRow
	var openai, anthropic []int64 // seqs of upstreams, by project; 0: none
	for _, dp := range demoProjects() {
		at := now.AddDate(0, 0, -90)
		p, up, err := in.manage.addOpenAIProject(ctx, dp.name, dp.policy, key, at)
		if err != nil {
			return nil, err
		}
		projects, openai, anthropic = append(projects, p), append(openai, up.seq), append(anthropic, 0)
		if !dp.anthropic {
			continue
		}
		more := upstreamInput{name: optional[string]{set: true, value: "anthropic"}, key: optional[secret]{set: true, value: key},
			provider: optional[string]{set: true, value: providerAnthropic}, baseURL: optional[string]{set: true, value: in.cfg.openaiURL}}
		up = newUpstreamRow(p, at.UnixMilli())
		if err := more.apply(in.manage, up, true); err != nil {
			return nil, err
		}
		if err := in.store.addUpstream(ctx, systemOrigin(time.Now()), up, at.UnixMilli()); err != nil {
			return nil, err
		}
		anthropic[len(anthropic)-1] = up.seq
	}
	users := demoUsers()
	rows := demoHistory(now, users)
	made := make([]int64, len(users)) // calls, by user
	for _, r := range rows {
		if r.outcome != outcomeRefused {
			made[r.token]++
		}
	}
	tokens := make([]*tokenRow, len(users))
	for i, u := range users {
		t, value, err := in.createDemoToken(ctx, now, u, projects[u.project], made[i])
		if err != nil {
			return nil, err
		}
		if tokens[i] = t; i == 0 {
			d.token = value
		}
	}
	for _, r := range rows {
		u := users[r.token]
		in.completeDemoRow(r, openai[u.project], anthropic[u.project])
		r.token, r.project = tokens[r.token].seq, tokens[r.token].project
	}
	d.projects, d.tokens, d.calls = len(projects), len(tokens), len(rows)
	w := in.store.newLedgerWriter()
	defer w.close()
	for part := range slices.Chunk(rows, demoBatchSize) {
		if err := w.write(ctx, ledgerBatch{records: part}); err != nil {
			return nil, fmt.Errorf("writing the sample calls: %w", err)
		}
	}
	return d, nil
}

// createDemoToken makes a user's token. calls is how many calls it will have made.
func (in *instance) createDemoToken(ctx context.Context, now time.Time, u demoUser, p *projectRow, calls int64) (*tokenRow, secret, error) {
	before := func(days float64) int64 { return now.UnixMilli() - int64(days*dayMS) }
	t := &tokenRow{projectID: p.id, name: u.name, policy: "{}", createdAt: before(float64(u.createdDaysAgo)), updatedAt: before(float64(u.createdDaysAgo))}
	if u.limits != "" {
		t.policy = `{"limits":[` + u.limits + `]}`
	}
	if u.expiredDaysAgo != 0 {
		t.expiresAt = new(before(u.expiredDaysAgo))
	}
	if u.requestsLeft != 0 {
		t.maxRequests = new(calls + u.requestsLeft)
	}
	if u.idleExpiry != 0 {
		t.idleExpiry = new(u.idleExpiry.Milliseconds())
	}
	value, err := in.manage.mintToken(ctx, systemOrigin(time.Now()), t)
	if err != nil {
		return nil, nil, fmt.Errorf("storing a sample token: %w", err)
	}
	if u.revokedDaysAgo != 0 {
		at := before(u.revokedDaysAgo)
		if _, err := in.store.changeToken(ctx, systemOrigin(time.Now()), t.id, 0, at, func(t *tokenRow) error { t.revokedAt = &at; return nil }); err != nil {
			return nil, nil, fmt.Errorf("revoking a sample token: %w", err)
		}
	}
	return t, value, nil
}

// completeDemoRow fills in where a call went and what it cost.
func (in *instance) completeDemoRow(r *requestRow, openai, anthropic int64) {
	if r.outcome == outcomeRefused {
		return
	}
	provider := providerOpenAI
	r.upstream = openai
	if r.endpoint == "POST /v1/messages" {
		provider, r.upstream = providerAnthropic, anthropic
	}
	if r.cost, r.priced, r.modelTracked = in.prices.Load().price(provider, r.model, r.counts); r.source == usageNone {
		r.cost, r.priced = 0, false
	}
	r.modelTracked = r.modelTracked || r.outcome == outcomeOK
	r.requestedModel, r.requestedModelTracked = r.model, r.modelTracked
}

// demoHistory makes up the calls of the users up to now, oldest first; token is
// the user's index. The same now gives the same calls.
func demoHistory(now time.Time, users []demoUser) []*requestRow {
	rng := rand.New(rand.NewPCG(28, 12))
	var rows []*requestRow
	for hour := now.Add(-demoHistoryLength).Truncate(time.Hour); hour.Before(now); hour = hour.Add(time.Hour) {
		for i, u := range users {
			n := int(u.callsPerDay*demoHourShare(hour, u.aroundTheClock)*(0.8+0.4*rng.Float64()) + rng.Float64())
			for range n {
				at := hour.Add(time.Duration(rng.Int64N(int64(time.Hour))))
				if at.Add(2*time.Minute).After(now) || at.Before(now.AddDate(0, 0, -u.createdDaysAgo)) {
					continue
				}
				if r := newDemoRow(rng, now, at, u); r != nil {
					r.token = int64(i)
					rows = append(rows, r)
				}
			}
		}
	}
	slices.SortStableFunc(rows, func(a, b *requestRow) int { return cmp.Compare(a.started, b.started) })
	ids := &idSource{}
	for _, r := range rows {
		r.id = ids.next(time.UnixMilli(r.started))
		r.started = r.id >> idTimeShift
	}
	return rows
}

// demoHourShare is the part of a working day's calls that falls into an hour.
func demoHourShare(hour time.Time, allDay bool) float64 {
	h, quiet := float64(hour.Hour()), 1.0
	if d := hour.Weekday(); d == time.Saturday || d == time.Sunday {
		quiet = 0.15
	}
	if allDay {
		return (1 + 0.6*math.Cos((h-3)*math.Pi/12)) / 24 * math.Sqrt(quiet) // busiest at night
	}
	day := math.Exp(-(h-10.5)*(h-10.5)/6) + math.Exp(-(h-15)*(h-15)/7) // a morning, a lunch, an afternoon
	return (day + 0.02) / 9.5 * quiet
}

// newDemoRow makes up one call; nil: this user had stopped by then.
func newDemoRow(rng *rand.Rand, now, at time.Time, u demoUser) *requestRow {
	k := u.tasks[0]
	total := 0
	for _, c := range u.tasks {
		if total += c.weight; rng.IntN(total) < c.weight {
			k = c
		}
	}
	r := &requestRow{started: at.UnixMilli(), endpoint: k.endpoint, model: k.model, stream: k.stream,
		address: fmt.Sprintf("10.20.%d.%d", u.project, 10+rng.IntN(40)), status: 200, outcome: outcomeOK, source: usageNone, firstByteUS: -1, attempts: 1}
	ago := now.Sub(at).Hours() / 24
	ended, why := u.expiredDaysAgo, "expired"
	if u.revokedDaysAgo > 0 {
		ended, why = u.revokedDaysAgo, "revoked"
	}
	if ago < ended {
		if k.refusalCode = why; ago < ended-2 || rng.IntN(3) > 0 { // somebody goes on trying, for a while
			return nil
		}
	}
	if k.refusalCode != "" {
		r.outcome, r.errorCode, r.status, r.attempts, r.totalUS = outcomeRefused, k.refusalCode, 403, 0, 90+rng.Int64N(200)
		if k.refusalCode != "model_not_allowed" {
			r.status = 401
		}
		return r
	}
	size := func(typical float64) int64 { return int64(typical * math.Exp(rng.NormFloat64()*0.5)) }
	if k.input > 0 {
		r.source, r.counts = usageExact, tokenCounts{input: max(size(k.input), 1), output: size(k.output)}
		if rng.Float64() < k.cachedShare {
			r.counts.cached = r.counts.input * 3 / 4 / 128 * 128
		}
		r.counts.reasoning = int64(float64(r.counts.output) * k.reasoningShare * rng.Float64())
	}
	first := time.Duration(float64(180*time.Millisecond) * math.Exp(rng.NormFloat64()*0.4))
	r.firstByteUS = first.Microseconds()
	r.totalUS = r.firstByteUS + r.counts.output*int64(9000+rng.IntN(9000))
	if !k.stream {
		r.firstByteUS = r.totalUS
	}
	injectDemoFailure(rng, r)
	return r
}

// injectDemoFailure lets a few calls end badly.
func injectDemoFailure(rng *rand.Rand, r *requestRow) {
	cut := func() { // a stream that ended early: what it used is an estimate
		if r.source == usageExact {
			r.source, r.counts.output, r.counts.reasoning = usageEstimated, r.counts.output/3, 0
		}
		r.totalUS = r.firstByteUS + (r.totalUS-r.firstByteUS)/3
	}
	switch x := rng.Float64(); {
	case x < 0.012: // the provider's own errors pass through, and cost nothing
		r.outcome, r.status = outcomeUpstreamError, []int{429, 429, 500, 503}[rng.IntN(4)]
		r.source, r.counts, r.totalUS = usageNone, tokenCounts{}, r.firstByteUS
	case x < 0.014 && r.source == usageExact:
		r.outcome, r.status, r.errorCode, r.firstByteUS, r.totalUS = outcomeUpstreamError, 504, "upstream_timeout", -1, time.Minute.Microseconds()
		r.source, r.counts = usageEstimated, tokenCounts{input: r.counts.input}
	case x < 0.030 && r.stream:
		r.outcome, r.errorCode = outcomeClientGone, "client_gone"
		cut()
	case x < 0.035 && r.stream:
		r.outcome, r.errorCode = outcomeTruncated, "upstream_cut"
		cut()
	}
}
