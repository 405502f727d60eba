// This file is `llm-proxy demo`: the whole program with sample data, against the
// stand-in provider of package demo, in a directory that is removed at the end.
// The user needs no key and no setting. Settings from the environment apply, but
// not those that say where data is kept and where calls go.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"llm-proxy/demo"
)

const (
	demoChunkDelay = 20 * time.Millisecond // between the chunks of a stream
	demoBatchSize  = 2000                  // rows in one transaction
)

// demo serves with sample data until ctx is done.
func (p *program) demo(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp(p.getenv("TMPDIR"), "llm-proxy-demo-")
	if err != nil {
		return fmt.Errorf("making a directory for the demo: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	l, err := net.Listen("tcp", "127.0.0.1:0") // loopback only: the provider invents its answers
	if err != nil {
		return fmt.Errorf("listening for the stand-in provider: %w", err)
	}
	key := newSecret("sk-demo-" + randomBase62(40))
	provider := &http.Server{Handler: demo.NewProvider(key(), demoChunkDelay), ReadHeaderTimeout: 10 * time.Second}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = provider.Serve(l)
	}()
	defer func() { _ = provider.Close(); <-served }()

	q := *p
	q.getenv = demoEnvironment(p.getenv, dir, "http://"+l.Addr().String())
	var in *instance
	var sample *sampleData
	q.ready = func(addr net.Addr) {
		q.printDemoGuide(in, sample, addr)
		if p.ready != nil {
			p.ready(addr)
		}
	}
	return q.serveWithSetup(ctx, func(ctx context.Context, opened *instance) (err error) {
		in = opened
		sample, err = in.addSampleData(ctx, time.Now(), key)
		return err
	})
}

// demoEnvironment returns the environment with the settings that the demo decides itself.
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
		case "DRAIN_DELAY":
			return "0s" // no load balancer has to notice
		case "LOG_FORMAT":
			if getenv(name) == "" {
				return "text" // a person reads it in a terminal
			}
		}
		return getenv(name)
	}
}

// printDemoGuide prints what to try. Secrets go to stdout only, and only the ones
// that this run created.
func (p *program) printDemoGuide(in *instance, d *sampleData, addr net.Addr) {
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
	fmt.Fprintf(p.stdout, demoGuide, base, d.token(), key, export, d.projects, d.tokens, d.calls)
}

const demoGuide = `
llm-proxy demo: a stand-in provider answers. You need no key, nothing leaves this machine, and nothing is kept.
The sample data has %[5]d projects, %[6]d tokens and %[7]d calls of the last four weeks.

  base URL         %[1]s/v1
  token            %[2]s   (project "Support bot")
  management key   %[3]s
  pages            %[1]s/admin   (sign in with the management key)

Try it in another terminal:

  export URL=%[1]s TOKEN=%[2]s KEY="%[4]s" JSON="Content-Type: application/json"

An answer, a streamed answer, and a tool call:

  curl $URL/v1/chat/completions -H "Authorization: Bearer $TOKEN" -H "$JSON" \
    -d '{"model":"gpt-4o-mini","messages":[{"role":"user","content":"Hello"}]}'
  curl -N $URL/v1/chat/completions -H "Authorization: Bearer $TOKEN" -H "$JSON" \
    -d '{"model":"gpt-4o-mini","stream":true,"messages":[{"role":"user","content":"Tell me a story"}]}'
  curl $URL/v1/chat/completions -H "Authorization: Bearer $TOKEN" -H "$JSON" \
    -d '{"model":"gpt-4o","messages":[{"role":"user","content":"What is the weather in Berlin?"}],
      "tools":[{"type":"function","function":{"name":"get_weather",
        "parameters":{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}}}]}'

Anthropic's API, with the same token:

  curl $URL/v1/messages -H "x-api-key: $TOKEN" -H "anthropic-version: 2023-06-01" -H "$JSON" \
    -d '{"model":"claude-sonnet-5","max_tokens":100,"messages":[{"role":"user","content":"Hello"}]}'

Gemini's API:

  curl $URL/v1beta/models/gemini-2.5-flash:generateContent -H "x-goog-api-key: $TOKEN" -H "$JSON" \
    -d '{"contents":[{"parts":[{"text":"Hello"}]}]}'

Usage and cost, and the latest calls on record:

  curl "$URL/manage/usage?interval=total&group_by=project,model" -H "Authorization: Bearer $KEY"
  curl "$URL/manage/requests?limit=5" -H "Authorization: Bearer $KEY"
  curl $URL/manage/tokens -H "Authorization: Bearer $KEY"

If a prompt contains [[error 429]] or [[error 500]], the provider answers with that error; [[cut]] cuts the answer off
half-way, [[slow 3s]] delays it. The model no-such-model does not exist. Ctrl-C ends the demo.

`

// sampleData describes what addSampleData added, for the guide.
type sampleData struct {
	token                   secret
	key                     secret // nil: MANAGEMENT_TOKEN is set
	projects, tokens, calls int
}

// A sampleProject is a stored sample project. openai and anthropic are the seqs of
// its upstreams; 0: it has none.
type sampleProject struct {
	row               *projectRow
	openai, anthropic int64
}

// addSampleData stores the sample data. providerKey is the stand-in provider's key.
func (in *instance) addSampleData(ctx context.Context, now time.Time, providerKey secret) (*sampleData, error) {
	d := &sampleData{}
	if in.cfg.managementToken == nil {
		var err error
		if d.key, err = in.operations.createFirstKey(ctx); err != nil {
			return nil, err
		}
	}
	var projects []sampleProject
	for _, p := range demo.Projects() {
		stored, err := in.addSampleProject(ctx, now.AddDate(0, 0, -90), p, providerKey)
		if err != nil {
			return nil, err
		}
		projects = append(projects, stored)
	}
	samples := demo.Tokens()
	calls := demo.History(now, samples)
	admitted := make([]int64, len(samples)) // calls, by token
	for _, c := range calls {
		if !c.Refused() {
			admitted[c.Token]++
		}
	}
	tokens := make([]*tokenRow, len(samples))
	for i, s := range samples {
		t, value, err := in.addSampleToken(ctx, now, s, projects[s.Project].row, admitted[i])
		if err != nil {
			return nil, err
		}
		if tokens[i] = t; i == 0 {
			d.token = value
		}
	}
	rows := newSampleRows(calls)
	for i, r := range rows {
		sample := calls[i].Token
		in.completeSampleRow(r, projects[samples[sample].Project])
		r.token, r.project = tokens[sample].seq, tokens[sample].project
	}
	d.projects, d.tokens, d.calls = len(projects), len(tokens), len(rows)
	w := in.store.newLedgerWriter()
	defer w.close()
	for batch := range slices.Chunk(rows, demoBatchSize) {
		if err := w.write(ctx, ledgerBatch{records: batch}); err != nil {
			return nil, fmt.Errorf("writing the sample calls: %w", err)
		}
	}
	return d, nil
}

// addSampleProject stores a project with its upstreams, as if created at.
func (in *instance) addSampleProject(
	ctx context.Context, at time.Time, p demo.Project, providerKey secret,
) (stored sampleProject, err error) {
	project := projectInput{name: given(p.Name), policy: given(json.RawMessage(p.Policy)), key: given(providerKey)}
	var upstreams []*upstreamRow
	if stored.row, upstreams, err = in.operations.newProject(project, at.UnixMilli()); err != nil {
		return stored, err
	}
	if err := in.store.addProject(ctx, systemOrigin(time.Now()), stored.row, upstreams...); err != nil {
		return stored, err
	}
	stored.openai = upstreams[0].seq
	if !p.AllAPIs {
		return stored, nil
	}
	for _, provider := range []string{providerAnthropic, providerGoogle} {
		other := upstreamInput{
			name:     given(provider),
			key:      given(providerKey),
			provider: given(provider),
			baseURL:  given(in.cfg.openaiURL),
		}
		up, err := in.operations.newUpstream(stored.row, other, at.UnixMilli())
		if err != nil {
			return stored, err
		}
		if err = in.store.addUpstream(ctx, systemOrigin(time.Now()), up, at.UnixMilli()); err != nil {
			return stored, err
		}
		if provider == providerAnthropic {
			stored.anthropic = up.seq
		}
	}
	return stored, nil
}

// addSampleToken stores a token. admitted is the number of its calls that were not
// refused.
func (in *instance) addSampleToken(
	ctx context.Context, now time.Time, s demo.Token, p *projectRow, admitted int64,
) (*tokenRow, secret, error) {
	before := func(days float64) int64 { return now.UnixMilli() - int64(days*dayMS) }
	created := before(float64(s.CreatedDaysAgo))
	t := &tokenRow{projectID: p.id, name: s.Name, policy: "{}", createdAt: created, updatedAt: created}
	if s.Limits != "" {
		t.policy = `{"limits":[` + s.Limits + `]}`
	}
	if s.ExpiredDaysAgo != 0 {
		t.expiresAt = new(before(s.ExpiredDaysAgo))
	}
	if s.RequestsLeft != 0 {
		t.maxRequests = new(admitted + s.RequestsLeft)
	}
	if s.IdleExpiry != 0 {
		t.idleExpiry = new(s.IdleExpiry.Milliseconds())
	}
	origin := systemOrigin(time.Now())
	value, err := in.operations.mintToken(ctx, origin, t)
	if err != nil {
		return nil, nil, fmt.Errorf("storing a sample token: %w", err)
	}
	if s.RevokedDaysAgo != 0 {
		at := before(s.RevokedDaysAgo)
		revoke := func(t *tokenRow) error { t.revokedAt = &at; return nil }
		if _, err := in.store.changeToken(ctx, origin, t.id, 0, at, revoke); err != nil {
			return nil, nil, fmt.Errorf("revoking a sample token: %w", err)
		}
	}
	return t, value, nil
}

// newSampleRows returns the calls as rows of the ledger, with new ids. Token, project,
// upstream and cost are not set yet.
func newSampleRows(calls []demo.Call) []*requestRow {
	ids := &idSource{}
	rows := make([]*requestRow, len(calls))
	for i, c := range calls {
		id := ids.next(c.Started)
		rows[i] = &requestRow{
			id:          id,
			started:     id >> idTimeShift,
			endpoint:    c.Endpoint,
			model:       c.Model,
			stream:      c.Stream,
			address:     c.Address,
			status:      c.Status,
			outcome:     callOutcome(c.Outcome),
			errorCode:   c.ErrorCode,
			source:      usageSource(c.Source),
			counts:      tokenCounts{input: c.Input, cached: c.Cached, output: c.Output, reasoning: c.Reasoning},
			firstByteUS: c.FirstByteUS,
			totalUS:     c.TotalUS,
			attempts:    c.Attempts,
		}
	}
	return rows
}

// completeSampleRow fills in where a call went and what it cost.
func (in *instance) completeSampleRow(r *requestRow, p sampleProject) {
	if r.outcome == outcomeRefused {
		return
	}
	provider := providerOpenAI
	r.upstream = p.openai
	if r.endpoint == "POST /v1/messages" {
		provider, r.upstream = providerAnthropic, p.anthropic
	}
	r.modelTracked = in.prices.Load().priceRow(r, provider, r.model)
	if r.source == usageNone {
		r.cost, r.priced = 0, false
	}
	r.modelTracked = r.modelTracked || r.outcome == outcomeOK
	r.requestedModel, r.requestedModelTracked = r.model, r.modelTracked
}
