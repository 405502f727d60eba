// This room holds the demo provider's conversations: chat completions, completions and responses as OpenAI answers them,
// messages as Anthropic does, whole or as a stream of events. The words come from demo_answers.go; here they get the
// shapes and the order that the official SDKs expect.
package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"slices"
	"time"
)

// A demoUsage is the token count of one call, whatever the dialect calls it.
type demoUsage struct{ prompt, cached, output, reasoning int }

func (c *demoCall) usage(answers ...demoCompletion) demoUsage {
	u := demoUsage{prompt: demoTokenCount(len(c.body.prompt)), cached: c.p.cachedTokens(c.body.Model, c.body.prompt)}
	for _, a := range answers {
		u.output += a.outputTokens
		u.reasoning += a.reasoningTokens
	}
	return u
}

func (u demoUsage) chat() demoJSON {
	return demoJSON{"prompt_tokens", u.prompt, "completion_tokens", u.output, "total_tokens", u.prompt + u.output,
		"prompt_tokens_details", demoJSON{"cached_tokens", u.cached, "audio_tokens", 0},
		"completion_tokens_details", demoJSON{"reasoning_tokens", u.reasoning, "audio_tokens", 0,
			"accepted_prediction_tokens", 0, "rejected_prediction_tokens", 0}}
}

func (u demoUsage) responses() demoJSON {
	return demoJSON{"input_tokens", u.prompt, "input_tokens_details", demoJSON{"cached_tokens", u.cached},
		"output_tokens", u.output, "output_tokens_details", demoJSON{"reasoning_tokens", u.reasoning},
		"total_tokens", u.prompt + u.output}
}

// chat answers POST /v1/chat/completions.
func (c *demoCall) chat() {
	if len(c.body.Messages) == 0 {
		c.fail(http.StatusBadRequest, "", "Missing required parameter: 'messages'.")
		return
	}
	answers := c.body.completions(max(c.body.N, 1))
	usage := c.usage(answers...).chat()
	head := func(object string) demoJSON {
		return demoJSON{"id", c.p.newID("chatcmpl-"), "object", object, "created", time.Now().Unix(), "model", c.body.Model}
	}
	if c.body.Stream {
		c.streamChat(head("chat.completion.chunk"), answers, usage)
		return
	}
	choices, words := []any{}, 0
	for i, a := range answers {
		message := demoJSON{"role", "assistant", "content", a.text, "refusal", nil, "annotations", []any{}}
		if a.toolName != "" {
			message = demoJSON{"role", "assistant", "content", nil, "tool_calls", []any{c.toolCall(a, a.toolArgs)}, "refusal", nil}
		}
		choices = append(choices, demoJSON{"index", i, "message", message, "logprobs", nil, "finish_reason", a.finishReason()})
		words += a.outputTokens
	}
	c.replyJSON(words, append(head("chat.completion"), "choices", choices, "usage", usage, "service_tier", "default",
		"system_fingerprint", "fp_demo"))
}

// finishReason is OpenAI's finish_reason.
func (a demoCompletion) finishReason() string {
	switch {
	case a.toolName != "":
		return "tool_calls"
	case a.truncated:
		return "length"
	}
	return "stop"
}

func (c *demoCall) toolCall(a demoCompletion, args string) demoJSON {
	return demoJSON{"id", c.p.newID("call_"), "type", "function", "function", demoJSON{"name", a.toolName, "arguments", args}}
}

// streamChat sends the chunks of each choice: the role, the content or arguments, the finish; then usage if it was asked
// for, and [DONE].
func (c *demoCall) streamChat(head demoJSON, answers []demoCompletion, usage demoJSON) {
	include := c.body.StreamOptions.IncludeUsage
	chunk := func(choices []any, usage any) {
		v := append(slices.Clone(head), "service_tier", "default", "system_fingerprint", "fp_demo", "choices", choices)
		if include {
			v = append(v, "usage", usage)
		}
		c.sendEvent("", v)
	}
	c.beginStream()
	for i, a := range answers {
		send := func(delta demoJSON, finish any) {
			chunk([]any{demoJSON{"index", i, "delta", delta, "logprobs", nil, "finish_reason", finish}}, nil)
		}
		if a.toolName != "" {
			call := append(demoJSON{"index", 0}, c.toolCall(a, "")...)
			send(demoJSON{"role", "assistant", "content", nil, "tool_calls", []any{call}, "refusal", nil}, nil)
			c.sendPaced(splitToolArgs(a.toolArgs), func(bit string) {
				send(demoJSON{"tool_calls", []any{demoJSON{"index", 0, "function", demoJSON{"arguments", bit}}}}, nil)
			})
		} else {
			send(demoJSON{"role", "assistant", "content", "", "refusal", nil}, nil)
			c.sendPaced(demoWords(a.text), func(word string) { send(demoJSON{"content", word}, nil) })
		}
		send(demoJSON{}, a.finishReason())
	}
	if include {
		chunk([]any{}, usage)
	}
	c.sendEvent("", json.RawMessage("[DONE]"))
}

// completions answers POST /v1/completions: n choices for each prompt.
func (c *demoCall) completions() {
	c.body.Tools = nil
	var answers []demoCompletion
	for _, prompt := range demoInputs(c.body.Prompt) {
		b := c.body
		b.Prompt, b.prompt = prompt, demoText(prompt)
		answers = append(answers, b.completions(max(b.N, 1))...)
		if len(answers) > 128 {
			c.fail(http.StatusBadRequest, "", "'n' times the number of prompts must be at most 128")
			return
		}
	}
	if len(answers) == 0 {
		c.fail(http.StatusBadRequest, "", "Missing required parameter: 'prompt'.")
		return
	}
	u := c.usage(answers...)
	usage := demoJSON{"prompt_tokens", u.prompt, "completion_tokens", u.output, "total_tokens", u.prompt + u.output}
	head := demoJSON{"id", c.p.newID("cmpl-"), "object", "text_completion", "created", time.Now().Unix(), "model", c.body.Model}
	choice := func(i int, text string, finish any) demoJSON {
		return demoJSON{"text", text, "index", i, "logprobs", nil, "finish_reason", finish}
	}
	if !c.body.Stream {
		choices := []any{}
		for i, a := range answers {
			choices = append(choices, choice(i, a.text, a.finishReason()))
		}
		c.replyJSON(u.output, append(head, "choices", choices, "usage", usage))
		return
	}
	chunk := func(choices []any, usage any) {
		v := append(slices.Clone(head), "choices", choices)
		if c.body.StreamOptions.IncludeUsage {
			v = append(v, "usage", usage)
		}
		c.sendEvent("", v)
	}
	c.beginStream()
	for i, a := range answers {
		c.sendPaced(demoWords(a.text), func(word string) { chunk([]any{choice(i, word, nil)}, nil) })
		chunk([]any{choice(i, "", a.finishReason())}, nil)
	}
	if c.body.StreamOptions.IncludeUsage {
		chunk([]any{}, usage)
	}
	c.sendEvent("", json.RawMessage("[DONE]"))
}

// responses answers POST /v1/responses.
func (c *demoCall) responses() {
	a := c.body.completion(0)
	usage := c.usage(a).responses()
	object := c.responseObject()
	var done any
	status := "completed"
	if a.truncated {
		status, done = "incomplete", demoJSON{"reason", "max_output_tokens"}
	}
	whole := func(output []any) demoJSON {
		return object(status, done, output, usage)
	}
	output := []any{}
	if a.reasoningTokens > 0 {
		output = append(output, demoJSON{"id", c.p.newID("rs_"), "type", "reasoning", "summary", []any{}})
	}
	item := c.responseItem(a, status)
	output = append(output, item(true))
	if !c.body.Stream {
		c.replyJSON(a.outputTokens, whole(output))
		return
	}
	seq := 0
	send := func(kind string, fields ...any) {
		c.sendEvent(kind, append(demoJSON{"type", kind, "sequence_number", seq}, fields...))
		seq++
	}
	c.beginStream()
	started := object("in_progress", nil, []any{}, nil)
	send("response.created", "response", started)
	send("response.in_progress", "response", started)
	at := len(output) - 1
	if at > 0 { // the thinking before the answer
		send("response.output_item.added", "output_index", 0, "item", output[0])
		send("response.output_item.done", "output_index", 0, "item", output[0])
	}
	send("response.output_item.added", "output_index", at, "item", item(false))
	c.streamResponseItem(a, item(true)[1], at, send)
	send("response.output_item.done", "output_index", at, "item", item(true))
	send("response."+status, "response", whole(output))
}

// streamResponseItem sends the events between an item's added and done.
func (c *demoCall) streamResponseItem(a demoCompletion, id any, at int, send func(kind string, fields ...any)) {
	if a.toolName != "" {
		c.sendPaced(splitToolArgs(a.toolArgs), func(bit string) {
			send("response.function_call_arguments.delta", "item_id", id, "output_index", at, "delta", bit)
		})
		send("response.function_call_arguments.done", "item_id", id, "output_index", at, "name", a.toolName, "arguments", a.toolArgs)
		return
	}
	place := []any{"item_id", id, "output_index", at, "content_index", 0}
	send("response.content_part.added", append(slices.Clone(place), "part", demoTextPart(""))...)
	c.sendPaced(demoWords(a.text), func(word string) {
		send("response.output_text.delta", append(slices.Clone(place), "delta", word, "logprobs", []any{})...)
	})
	send("response.output_text.done", append(slices.Clone(place), "text", a.text, "logprobs", []any{})...)
	send("response.content_part.done", append(slices.Clone(place), "part", demoTextPart(a.text))...)
}

func demoTextPart(text string) demoJSON {
	return demoJSON{"type", "output_text", "annotations", []any{}, "logprobs", []any{}, "text", text}
}

// responseItem returns what makes the output item of a: empty and in progress, or done. Its first field is the id.
func (c *demoCall) responseItem(a demoCompletion, status string) func(done bool) demoJSON {
	id, callID := c.p.newID("msg_"), c.p.newID("call_")
	if a.toolName != "" {
		id = c.p.newID("fc_")
	}
	return func(done bool) demoJSON {
		state, args, content := "in_progress", "", []any{}
		if done {
			state, args, content = status, a.toolArgs, []any{demoTextPart(a.text)}
		}
		if a.toolName != "" {
			return demoJSON{"id", id, "type", "function_call", "status", state, "arguments", args, "call_id", callID,
				"name", a.toolName}
		}
		return demoJSON{"id", id, "type", "message", "status", state, "role", "assistant", "content", content}
	}
}

// responseObject returns what makes the response object of this call, always with the same id and time.
func (c *demoCall) responseObject() func(status string, incomplete any, output []any, usage any) demoJSON {
	id, created := c.p.newID("resp_"), time.Now().Unix()
	var limit, instructions any
	if c.body.MaxOutputTokens > 0 {
		limit = c.body.MaxOutputTokens
	}
	if text := demoText(c.body.Instructions); text != "" {
		instructions = text
	}
	format, metadata, tools, choice := c.body.Text.Format, c.body.Metadata, c.body.Tools, c.body.ToolChoice
	if format == nil {
		format = map[string]any{"type": "text"}
	}
	if metadata == nil {
		metadata = map[string]any{}
	}
	if tools == nil {
		tools = []map[string]any{}
	}
	if choice == nil {
		choice = "auto"
	}
	return func(status string, incomplete any, output []any, usage any) demoJSON {
		return demoJSON{"id", id, "object", "response", "created_at", created, "status", status, "background", false,
			"error", nil, "incomplete_details", incomplete, "instructions", instructions, "max_output_tokens", limit,
			"model", c.body.Model, "output", output, "parallel_tool_calls", true, "previous_response_id", nil,
			"reasoning", demoJSON{"effort", nil, "summary", nil}, "service_tier", "default", "store", true,
			"temperature", 1.0, "text", demoJSON{"format", format}, "tool_choice", choice, "tools", tools, "top_p", 1.0,
			"truncation", "disabled", "usage", usage, "user", nil, "metadata", metadata}
	}
}

// responsesInputTokens answers POST /v1/responses/input_tokens.
func (c *demoCall) responsesInputTokens() {
	c.replyJSON(0, demoJSON{"object", "response.input_tokens", "input_tokens", demoTokenCount(len(c.body.prompt))})
}

// responsesCompact answers POST /v1/responses/compact: the last turn stays, the rest becomes one opaque item.
func (c *demoCall) responsesCompact() {
	last, _ := c.body.lastTurn()
	a := c.body.completion(0)
	c.replyJSON(a.outputTokens, demoJSON{"id", c.p.newID("resp_"), "object", "response.compaction", "created_at", time.Now().Unix(),
		"output", []any{
			demoJSON{"id", c.p.newID("msg_"), "type", "message", "status", "completed", "role", "user",
				"content", []any{demoJSON{"type", "input_text", "text", last}}},
			demoJSON{"id", c.p.newID("cmp_"), "type", "compaction", "encrypted_content", "ZGVtbw=="},
		},
		"usage", c.usage(a).responses()})
}

// messages answers Anthropic's POST /v1/messages.
func (c *demoCall) messages() {
	switch {
	case c.body.MaxTokens <= 0:
		c.fail(http.StatusBadRequest, "", "max_tokens: Field required")
		return
	case len(c.body.Messages) == 0:
		c.fail(http.StatusBadRequest, "", "messages: at least one message is required")
		return
	}
	a := c.body.completion(0)
	u := c.usage(a)
	block, empty, stop := demoJSON{"type", "text", "text", a.text}, demoJSON{"type", "text", "text", ""}, "end_turn"
	switch {
	case a.toolName != "":
		call := demoJSON{"type", "tool_use", "id", c.p.newID("toolu_"), "name", a.toolName}
		block = append(slices.Clone(call), "input", json.RawMessage(a.toolArgs))
		empty, stop = append(slices.Clone(call), "input", demoJSON{}), "tool_use"
	case a.truncated:
		stop = "max_tokens"
	}
	id := c.p.newID("msg_")
	message := func(content []any, stop any, output int) demoJSON {
		return demoJSON{"id", id, "type", "message", "role", "assistant", "model", c.body.Model, "content", content,
			"stop_reason", stop, "stop_sequence", nil,
			"usage", append(c.anthropicInput(u), "output_tokens", output, "service_tier", "standard")}
	}
	if !c.body.Stream {
		c.replyJSON(a.outputTokens, message([]any{block}, stop, u.output))
		return
	}
	send := func(kind string, fields ...any) { c.sendEvent(kind, append(demoJSON{"type", kind}, fields...)) }
	c.beginStream()
	send("message_start", "message", message([]any{}, nil, 1))
	send("content_block_start", "index", 0, "content_block", empty)
	send("ping")
	delta := func(kind, name string) func(string) {
		return func(s string) { send("content_block_delta", "index", 0, "delta", demoJSON{"type", kind, name, s}) }
	}
	if a.toolName != "" {
		c.sendPaced(splitToolArgs(a.toolArgs), delta("input_json_delta", "partial_json"))
	} else {
		c.sendPaced(demoWords(a.text), delta("text_delta", "text"))
	}
	send("content_block_stop", "index", 0)
	send("message_delta", "delta", demoJSON{"stop_reason", stop, "stop_sequence", nil},
		"usage", append(c.anthropicInput(u), "output_tokens", u.output))
	send("message_stop")
}

// anthropicInput is the input side of Anthropic's usage, whose input_tokens are those neither read from the cache nor
// written to it. Only prompts with a cache_control use the cache.
func (c *demoCall) anthropicInput(u demoUsage) demoJSON {
	read, written := 0, 0
	if bytes.Contains(c.rawBody, []byte(`"cache_control"`)) {
		read = u.cached
		written = u.prompt/demoCacheStep*demoCacheStep - read
	}
	return demoJSON{"input_tokens", u.prompt - read - written, "cache_creation_input_tokens", written,
		"cache_read_input_tokens", read,
		"cache_creation", demoJSON{"ephemeral_5m_input_tokens", written, "ephemeral_1h_input_tokens", 0}}
}

// messagesCountTokens answers POST /v1/messages/count_tokens.
func (c *demoCall) messagesCountTokens() {
	c.replyJSON(0, demoJSON{"input_tokens", demoTokenCount(len(c.body.prompt))})
}
