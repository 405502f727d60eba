// This room is `llm-proxy demo`: the whole program, against the stand-in
// provider, in a directory that goes away at the end. A newcomer needs no key
// and no setting; what was set applies all the same, except where data is kept
// and where calls go.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

const demoPace = 20 * time.Millisecond // between the chunks of a stream

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
	provider := &http.Server{Handler: newDemoProvider(key(), demoPace), ReadHeaderTimeout: 10 * time.Second}
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
		q.invite(in, d, addr)
		if p.ready != nil {
			p.ready(addr)
		}
	}
	return q.serveAfter(ctx, func(ctx context.Context, opened *instance) (err error) {
		in = opened
		d, err = in.fillDemo(ctx, time.Now(), key)
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

// invite prints what to try. Secrets go to stdout only, and only those that
// were made just now.
func (p *program) invite(in *instance, d *demoData, addr net.Addr) {
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
