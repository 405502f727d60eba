// This file answers the conversation endpoints: OpenAI's chat completions, completions and
// responses, and Anthropic's messages, as one body or as a stream of events. The content comes from
// answers.go; this file gives it the format and order that the official SDKs expect.
package demo

import (
	"bytes"
	"encoding/json"
	"net/http"
	"slices"
	"time"
)

// A usage is the token count of one call. Each API has its own names for the fields.
type usage struct{ prompt, cached, output, reasoning int }

func (c *call) usage(answers ...completion) usage {
	u := usage{prompt: countTokens(len(c.body.prompt)), cached: c.p.cachedTokens(c.body.Model, c.body.prompt)}
	for _, a := range answers {
		u.output += a.outputTokens
		u.reasoning += a.reasoningTokens
	}
	return u
}

func (u usage) chat() obj {
	return obj{"prompt_tokens", u.prompt, "completion_tokens", u.output, "total_tokens", u.prompt + u.output,
		"prompt_tokens_details", obj{"cached_tokens", u.cached, "audio_tokens", 0},
		"completion_tokens_details", obj{"reasoning_tokens", u.reasoning, "audio_tokens", 0,
			"accepted_prediction_tokens", 0, "rejected_prediction_tokens", 0}}
}

func (u usage) responses() obj {
	return obj{"input_tokens", u.prompt, "input_tokens_details", obj{"cached_tokens", u.cached},
		"output_tokens", u.output, "output_tokens_details", obj{"reasoning_tokens", u.reasoning},
		"total_tokens", u.prompt + u.output}
}

// chat answers POST /v1/chat/completions.
func (c *call) chat() {
	if len(c.body.Messages) == 0 {
		c.fail(http.StatusBadRequest, "", "Missing required parameter: 'messages'.")
		return
	}
	answers := c.body.completions(max(c.body.N, 1))
	usage := c.usage(answers...).chat()
	head := func(kind string) obj {
		return obj{"id", c.p.newID("chatcmpl-"), "object", kind, "created", time.Now().Unix(), "model", c.body.Model}
	}
	if c.body.Stream {
		c.streamChat(head("chat.completion.chunk"), answers, usage)
		return
	}
	choices, words := []any{}, 0
	for i, a := range answers {
		message := obj{"role", "assistant", "content", a.text, "refusal", nil, "annotations", []any{}}
		if a.toolName != "" {
			message = obj{"role", "assistant", "content", nil, "tool_calls", []any{c.toolCall(a, a.toolArgs)},
				"refusal", nil}
		}
		choices = append(choices, obj{"index", i, "message", message, "logprobs", nil, "finish_reason",
			a.finishReason()})
		words += a.outputTokens
	}
	c.replyJSON(words, append(head("chat.completion"), "choices", choices, "usage", usage, "service_tier", "default",
		"system_fingerprint", "fp_demo"))
}

// finishReason returns OpenAI's finish_reason.
func (a completion) finishReason() string {
	switch {
	case a.toolName != "":
		return "tool_calls"
	case a.truncated:
		return "length"
	}
	return "stop"
}

func (c *call) toolCall(a completion, args string) obj {
	return obj{"id", c.p.newID("call_"), "type", "function", "function", obj{"name", a.toolName, "arguments", args}}
}

// streamChat sends the chunks of each choice (the role, the content or arguments, the finish
// reason), then the usage if the request asks for it, and [DONE].
func (c *call) streamChat(head obj, answers []completion, usage obj) {
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
		send := func(delta obj, finish any) {
			chunk([]any{obj{"index", i, "delta", delta, "logprobs", nil, "finish_reason", finish}}, nil)
		}
		if a.toolName != "" {
			call := append(obj{"index", 0}, c.toolCall(a, "")...)
			send(obj{"role", "assistant", "content", nil, "tool_calls", []any{call}, "refusal", nil}, nil)
			c.sendPaced(splitToolArgs(a.toolArgs), func(delta string) {
				send(obj{"tool_calls", []any{obj{"index", 0, "function", obj{"arguments", delta}}}}, nil)
			})
		} else {
			send(obj{"role", "assistant", "content", "", "refusal", nil}, nil)
			c.sendPaced(splitWords(a.text), func(word string) { send(obj{"content", word}, nil) })
		}
		send(obj{}, a.finishReason())
	}
	if include {
		chunk([]any{}, usage)
	}
	c.sendEvent("", json.RawMessage("[DONE]"))
}

// completions answers POST /v1/completions: n choices for each prompt.
func (c *call) completions() {
	c.body.Tools = nil
	var answers []completion
	for _, prompt := range inputList(c.body.Prompt) {
		b := c.body
		b.Prompt, b.prompt = prompt, textOf(prompt)
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
	usage := obj{"prompt_tokens", u.prompt, "completion_tokens", u.output, "total_tokens", u.prompt + u.output}
	head := obj{"id", c.p.newID("cmpl-"), "object", "text_completion", "created", time.Now().Unix(), "model",
		c.body.Model}
	choice := func(i int, text string, finish any) obj {
		return obj{"text", text, "index", i, "logprobs", nil, "finish_reason", finish}
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
		c.sendPaced(splitWords(a.text), func(word string) { chunk([]any{choice(i, word, nil)}, nil) })
		chunk([]any{choice(i, "", a.finishReason())}, nil)
	}
	if c.body.StreamOptions.IncludeUsage {
		chunk([]any{}, usage)
	}
	c.sendEvent("", json.RawMessage("[DONE]"))
}

// responses answers POST /v1/responses.
func (c *call) responses() {
	a := c.body.completion(0)
	usage := c.usage(a).responses()
	object := c.responseObject()
	var incomplete any
	status := "completed"
	if a.truncated {
		status, incomplete = "incomplete", obj{"reason", "max_output_tokens"}
	}
	output := []any{}
	if a.reasoningTokens > 0 {
		output = append(output, obj{"id", c.p.newID("rs_"), "type", "reasoning", "summary", []any{}})
	}
	item := c.responseItem(a, status)
	output = append(output, item(true))
	if !c.body.Stream {
		c.replyJSON(a.outputTokens, object(status, incomplete, output, usage))
		return
	}
	seq := 0
	send := func(kind string, fields ...any) {
		c.sendEvent(kind, append(obj{"type", kind, "sequence_number", seq}, fields...))
		seq++
	}
	c.beginStream()
	started := object("in_progress", nil, []any{}, nil)
	send("response.created", "response", started)
	send("response.in_progress", "response", started)
	at := len(output) - 1
	if at > 0 { // the reasoning item comes first
		send("response.output_item.added", "output_index", 0, "item", output[0])
		send("response.output_item.done", "output_index", 0, "item", output[0])
	}
	send("response.output_item.added", "output_index", at, "item", item(false))
	c.streamResponseItem(a, item(true)[1], at, send)
	send("response.output_item.done", "output_index", at, "item", item(true))
	send("response."+status, "response", object(status, incomplete, output, usage))
}

// streamResponseItem sends the events between the item's added and done events.
func (c *call) streamResponseItem(a completion, id any, at int, send func(kind string, fields ...any)) {
	if a.toolName != "" {
		c.sendPaced(splitToolArgs(a.toolArgs), func(delta string) {
			send("response.function_call_arguments.delta", "item_id", id, "output_index", at, "delta", delta)
		})
		send("response.function_call_arguments.done", "item_id", id, "output_index", at, "name", a.toolName,
			"arguments", a.toolArgs)
		return
	}
	position := []any{"item_id", id, "output_index", at, "content_index", 0}
	send("response.content_part.added", append(slices.Clone(position), "part", textPart(""))...)
	c.sendPaced(splitWords(a.text), func(word string) {
		send("response.output_text.delta", append(slices.Clone(position), "delta", word, "logprobs", []any{})...)
	})
	send("response.output_text.done", append(slices.Clone(position), "text", a.text, "logprobs", []any{})...)
	send("response.content_part.done", append(slices.Clone(position), "part", textPart(a.text))...)
}

func textPart(text string) obj {
	return obj{"type", "output_text", "annotations", []any{}, "logprobs", []any{}, "text", text}
}

// responseItem returns a function that makes the output item of a: empty and in progress, or done.
// All its items have the same id, in the first field.
func (c *call) responseItem(a completion, status string) func(done bool) obj {
	id, callID := c.p.newID("msg_"), c.p.newID("call_")
	if a.toolName != "" {
		id = c.p.newID("fc_")
	}
	return func(done bool) obj {
		state, args, content := "in_progress", "", []any{}
		if done {
			state, args, content = status, a.toolArgs, []any{textPart(a.text)}
		}
		if a.toolName != "" {
			return obj{"id", id, "type", "function_call", "status", state, "arguments", args, "call_id", callID,
				"name", a.toolName}
		}
		return obj{"id", id, "type", "message", "status", state, "role", "assistant", "content", content}
	}
}

// responseObject returns a function that makes the response object of this call, always with the
// same id and time.
func (c *call) responseObject() func(status string, incomplete any, output []any, usage any) obj {
	id, created := c.p.newID("resp_"), time.Now().Unix()
	var limit, instructions any
	if c.body.MaxOutputTokens > 0 {
		limit = c.body.MaxOutputTokens
	}
	if text := textOf(c.body.Instructions); text != "" {
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
	return func(status string, incomplete any, output []any, usage any) obj {
		return obj{"id", id, "object", "response", "created_at", created, "status", status, "background", false,
			"error", nil, "incomplete_details", incomplete, "instructions", instructions, "max_output_tokens", limit,
			"model", c.body.Model, "output", output, "parallel_tool_calls", true, "previous_response_id", nil,
			"reasoning", obj{"effort", nil, "summary", nil}, "service_tier", "default", "store", true,
			"temperature", 1.0, "text", obj{"format", format}, "tool_choice", choice, "tools", tools, "top_p", 1.0,
			"truncation", "disabled", "usage", usage, "user", nil, "metadata", metadata}
	}
}

// responsesInputTokens answers POST /v1/responses/input_tokens.
func (c *call) responsesInputTokens() {
	c.replyJSON(0, obj{"object", "response.input_tokens", "input_tokens", countTokens(len(c.body.prompt))})
}

// responsesCompact answers POST /v1/responses/compact: it keeps the last turn and replaces the rest
// with one opaque item.
func (c *call) responsesCompact() {
	last, _ := c.body.lastTurn()
	a := c.body.completion(0)
	c.replyJSON(a.outputTokens, obj{"id", c.p.newID("resp_"), "object", "response.compaction", "created_at",
		time.Now().Unix(),
		"output", []any{
			obj{"id", c.p.newID("msg_"), "type", "message", "status", "completed", "role", "user",
				"content", []any{obj{"type", "input_text", "text", last}}},
			obj{"id", c.p.newID("cmp_"), "type", "compaction", "encrypted_content", "ZGVtbw=="},
		},
		"usage", c.usage(a).responses()})
}

// messages answers Anthropic's POST /v1/messages.
func (c *call) messages() {
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
	block, empty, stop := obj{"type", "text", "text", a.text}, obj{"type", "text", "text", ""}, "end_turn"
	switch {
	case a.toolName != "":
		call := obj{"type", "tool_use", "id", c.p.newID("toolu_"), "name", a.toolName}
		block = append(slices.Clone(call), "input", json.RawMessage(a.toolArgs))
		empty, stop = append(slices.Clone(call), "input", obj{}), "tool_use"
	case a.truncated:
		stop = "max_tokens"
	}
	id := c.p.newID("msg_")
	message := func(content []any, stop any, output int) obj {
		return obj{"id", id, "type", "message", "role", "assistant", "model", c.body.Model, "content", content,
			"stop_reason", stop, "stop_sequence", nil,
			"usage", append(c.anthropicInput(u), "output_tokens", output, "service_tier", "standard")}
	}
	if !c.body.Stream {
		c.replyJSON(a.outputTokens, message([]any{block}, stop, u.output))
		return
	}
	send := func(kind string, fields ...any) { c.sendEvent(kind, append(obj{"type", kind}, fields...)) }
	c.beginStream()
	send("message_start", "message", message([]any{}, nil, 1))
	send("content_block_start", "index", 0, "content_block", empty)
	send("ping")
	delta := func(kind, name string) func(string) {
		return func(s string) { send("content_block_delta", "index", 0, "delta", obj{"type", kind, name, s}) }
	}
	if a.toolName != "" {
		c.sendPaced(splitToolArgs(a.toolArgs), delta("input_json_delta", "partial_json"))
	} else {
		c.sendPaced(splitWords(a.text), delta("text_delta", "text"))
	}
	send("content_block_stop", "index", 0)
	send("message_delta", "delta", obj{"stop_reason", stop, "stop_sequence", nil},
		"usage", append(c.anthropicInput(u), "output_tokens", u.output))
	send("message_stop")
}

// anthropicInput returns the input fields of Anthropic's usage. Its input_tokens leave out the
// tokens read from the cache or written to it. Only prompts with a cache_control use the cache.
func (c *call) anthropicInput(u usage) obj {
	read, written := 0, 0
	if bytes.Contains(c.rawBody, []byte(`"cache_control"`)) {
		read = u.cached
		written = u.prompt/cacheStepTokens*cacheStepTokens - read
	}
	return obj{"input_tokens", u.prompt - read - written, "cache_creation_input_tokens", written,
		"cache_read_input_tokens", read,
		"cache_creation", obj{"ephemeral_5m_input_tokens", written, "ephemeral_1h_input_tokens", 0}}
}

// messagesCountTokens answers POST /v1/messages/count_tokens.
func (c *call) messagesCountTokens() {
	c.replyJSON(0, obj{"input_tokens", countTokens(len(c.body.prompt))})
}
