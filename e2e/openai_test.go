// This file tests the official openai-go package through the proxy: everything works after changing only the base URL and
// the key.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/responses"
	"github.com/openai/openai-go/v3/shared"
)

func ask() openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{Model: "gpt-4o-mini", Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(promptCanary)}}
}

func askWithTool() openai.ChatCompletionNewParams {
	q := ask()
	q.Tools = []openai.ChatCompletionToolUnionParam{openai.ChatCompletionFunctionTool(shared.FunctionDefinitionParam{
		Name: "forecast", Parameters: shared.FunctionParameters{"type": "object"},
	})}
	return q
}

func TestChat(t *testing.T) {
	p := newProxy(t)
	client := p.client(p.token)
	var res *http.Response
	got, err := client.Chat.Completions.New(t.Context(), ask(), option.WithResponseInto(&res), option.WithHeader("Idempotency-Key", "idem-1"))
	if err != nil {
		t.Fatal(err)
	}
	if text := got.Choices[0].Message.Content; text != strings.Join(words, "") || got.Usage.TotalTokens != 14 {
		t.Errorf("got %q, %d tokens", text, got.Usage.TotalTokens)
	}
	if id := res.Header.Get("X-Request-Id"); id != "req_of_provider" {
		t.Errorf("request id %q", id)
	}
	up := p.provider.got()[0].header
	if up.Get("X-Stainless-Lang") != "go" || len(up.Get("Idempotency-Key")) != 64 || !strings.HasPrefix(up.Get("User-Agent"), "OpenAI/Go") {
		t.Errorf("of the SDK's headers the provider got %q, %q, %q", up.Get("X-Stainless-Lang"), up.Get("Idempotency-Key"), up.Get("User-Agent"))
	}
	got, err = client.Chat.Completions.New(t.Context(), askWithTool())
	if err != nil {
		t.Fatal(err)
	}
	if f := got.Choices[0].Message.ToolCalls[0].Function; f.Name != "forecast" || f.Arguments != `{"city":"Oslo"}` {
		t.Errorf("tool call %s(%s)", f.Name, f.Arguments)
	}
}

func TestChatStream(t *testing.T) {
	p := newProxy(t)
	client := p.client(p.token)
	withUsage := ask()
	withUsage.StreamOptions.IncludeUsage = openai.Bool(true)
	for _, tt := range []struct {
		name   string
		ask    openai.ChatCompletionNewParams
		chunks int
		tokens int64
		text   string
		tool   string
	}{
		{"plain", ask(), 5, 0, strings.Join(words, ""), ""},
		{"with usage", withUsage, 6, 14, strings.Join(words, ""), ""},
		{"tool", askWithTool(), 5, 0, "", `{"city":"Oslo"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stream := client.Chat.Completions.NewStreaming(t.Context(), tt.ask)
			all, chunks := openai.ChatCompletionAccumulator{}, 0
			for ; stream.Next(); chunks++ {
				if !all.AddChunk(stream.Current()) {
					t.Fatal("a chunk cannot be added")
				}
			}
			if err := stream.Err(); err != nil {
				t.Fatal(err)
			}
			message := all.Choices[0].Message
			if chunks != tt.chunks || all.Usage.TotalTokens != tt.tokens || message.Content != tt.text {
				t.Errorf("got %d chunks, %d tokens, %q", chunks, all.Usage.TotalTokens, message.Content)
			}
			if tt.tool != "" && message.ToolCalls[0].Function.Arguments != tt.tool {
				t.Errorf("tool arguments %q", message.ToolCalls[0].Function.Arguments)
			}
		})
	}
}

func TestResponsesStream(t *testing.T) {
	p := newProxy(t)
	client := p.client(p.token)
	stream := client.Responses.NewStreaming(t.Context(), responses.ResponseNewParams{
		Model: "gpt-4o-mini", Input: responses.ResponseNewParamsInputUnion{OfString: openai.String(promptCanary)},
	})
	var got []string
	for stream.Next() {
		got = append(got, stream.Current().Type+stream.Current().Delta)
	}
	want := []string{"response.created"}
	for _, word := range words {
		want = append(want, "response.output_text.delta"+word)
	}
	if want = append(want, "response.completed"); stream.Err() != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v", got, stream.Err())
	}
}

func TestOtherEndpoints(t *testing.T) {
	p := newProxy(t)
	client := p.client(p.token)
	vectors, err := client.Embeddings.New(t.Context(), openai.EmbeddingNewParams{Model: "text-embedding-3-small",
		Input: openai.EmbeddingNewParamsInputUnion{OfString: openai.String(promptCanary)}})
	if err != nil || !slices.Equal(vectors.Data[0].Embedding, []float64{0.25, -0.5, 1e-7}) {
		t.Errorf("embeddings: %v, %v", vectors, err)
	}
	text, err := client.Audio.Transcriptions.New(t.Context(), openai.AudioTranscriptionNewParams{Model: "gpt-4o-transcribe",
		File: openai.File(bytes.NewReader(speech), "speech.mp3", "audio/mpeg")})
	if err != nil || text.Text != "speech.mp3 120000 true gpt-4o-transcribe" {
		t.Errorf("transcription: %v, %v", text, err)
	}
	sound, err := client.Audio.Speech.New(t.Context(), openai.AudioSpeechNewParams{Model: "gpt-4o-mini-tts", Input: promptCanary,
		Voice: openai.AudioSpeechNewParamsVoiceUnion{OfString: openai.String("alloy")}})
	if err != nil {
		t.Fatal(err)
	}
	defer sound.Body.Close()
	if b, err := io.ReadAll(sound.Body); err != nil || !bytes.Equal(b, speech) {
		t.Errorf("speech: %d bytes, %v", len(b), err)
	}
	for _, id := range []string{"gpt-4o-mini", "meta/llama-3-70b", "ft:gpt-4o-mini:acme::9XyZ"} {
		if _, err := client.Models.Get(t.Context(), id); err != nil {
			t.Errorf("model %s: %v", id, err)
		}
		if got := p.provider.got(); !strings.HasSuffix(strings.ReplaceAll(got[len(got)-1].target, "%2F", "/"), "/v1/models/"+id) {
			t.Errorf("model %s: the provider got %s", id, got[len(got)-1].target)
		}
	}
}

// TestErrors: each failure is an openai.Error with all fields, and the SDK retries only where that helps.
func TestErrors(t *testing.T) {
	p := newProxy(t)
	fails := func(status int, body string, headers ...string) func(http.ResponseWriter, *recorded) {
		return func(w http.ResponseWriter, _ *recorded) {
			for i := 0; i+1 < len(headers); i += 2 {
				w.Header().Set(headers[i], headers[i+1])
			}
			reply(w, status, `{"error":{"message":"of the provider `+body+`","type":"some_type","param":"messages","code":"some_code"}}`)
		}
	}
	spent := p.newToken(map[string]any{"max_requests": 0})
	narrow := p.newToken(map[string]any{"policy": map[string]any{"models": []string{"gpt-4o"}}})
	for _, tt := range []struct {
		name   string
		token  string
		script func(http.ResponseWriter, *recorded)
		status int
		code   string
		hits   int // requests that reach the provider
	}{
		{"wrong token", "sk-nothing", nil, 401, "invalid_api_key", 0},
		{"model", narrow, nil, 403, "model_not_allowed", 0},
		{"spent token", spent, nil, 429, "project_spend_limit_exceeded", 0},
		{"provider's 400", p.token, fails(400, ""), 400, "some_code", 1},
		{"provider's 404", p.token, fails(404, ""), 404, "some_code", 1},
		{"provider's 429, not to be retried", p.token, fails(429, "", "X-Should-Retry", "false"), 429, "some_code", 1},
		{"provider's 401", p.token, fails(401, providerKey), 502, "upstream_auth_error", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before, requests := len(p.provider.got()), 0
			if tt.script != nil {
				p.provider.script(tt.script)
			}
			client := p.client(tt.token, option.WithMiddleware(func(r *http.Request, next option.MiddlewareNext) (*http.Response, error) {
				requests++
				return next(r)
			}))
			_, err := client.Chat.Completions.New(t.Context(), ask())
			e, ok := errors.AsType[*openai.Error](err)
			if !ok || e.StatusCode != tt.status || e.Code != tt.code {
				t.Fatalf("got %T %v", err, err)
			}
			if strings.Contains(e.RawJSON(), providerKey) || e.Message == "" {
				t.Errorf("the error is %s", e.RawJSON())
			}
			if hits := len(p.provider.got()) - before; hits != tt.hits || requests != 1 {
				t.Errorf("%d requests were sent, %d reached the provider", requests, hits)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	p := newProxy(t)
	client := p.client(p.token)
	p.provider.script(func(w http.ResponseWriter, _ *recorded) {
		w.Header().Set("Retry-After", "1")
		reply(w, 429, `{"error":{"message":"slow down","type":"requests","param":null,"code":"rate_limit_exceeded"}}`)
	})
	if _, err := client.Chat.Completions.New(t.Context(), ask()); err != nil {
		t.Fatal(err)
	}
	got := p.provider.got()
	if len(got) != 2 || got[1].header.Get("X-Stainless-Retry-Count") != "1" {
		t.Fatalf("%d requests reached the provider", len(got))
	}
	if wait := got[1].at.Sub(got[0].at); wait < 950*time.Millisecond { // without Retry-After the SDK waits at most half a second
		t.Errorf("retried after %v", wait)
	}
}

func TestCutStream(t *testing.T) {
	p := newProxy(t)
	client := p.client(p.token)
	p.provider.script(func(w http.ResponseWriter, _ *recorded) {
		events(w, chunk(`{"content":"first"}`, "null"))
		panic(http.ErrAbortHandler)
	})
	stream := client.Chat.Completions.NewStreaming(t.Context(), ask())
	chunks := 0
	for stream.Next() {
		chunks++
	}
	if stream.Err() == nil || chunks != 1 {
		t.Errorf("got %d chunks and the error %v", chunks, stream.Err())
	}
}

// TestAbort: when a client disconnects or its timeout ends, the call to the provider is canceled within a second.
func TestAbort(t *testing.T) {
	p := newProxy(t)
	client := p.client(p.token, option.WithMaxRetries(0))
	gone := func() {
		t.Helper()
		got := p.provider.got()
		select {
		case <-got[len(got)-1].ctx.Done():
		case <-time.After(time.Second):
			t.Error("the call to the provider continued")
		}
	}
	stall := func(w http.ResponseWriter, r *recorded) { <-r.ctx.Done() }

	p.provider.script(func(w http.ResponseWriter, r *recorded) {
		events(w, chunk(`{"content":"first"}`, "null"))
		stall(w, r)
	})
	ctx, cancel := context.WithCancel(t.Context())
	stream := client.Chat.Completions.NewStreaming(ctx, ask())
	if !stream.Next() {
		t.Fatal(stream.Err())
	}
	cancel()
	gone()
	if err := stream.Close(); err != nil {
		t.Error(err)
	}

	p.provider.script(stall)
	if _, err := client.Chat.Completions.New(t.Context(), ask(), option.WithRequestTimeout(150*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the timeout gives %v", err)
	}
	gone()
}
