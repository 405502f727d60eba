// This room holds what the demo provider says: plain code from a request to words and tool arguments. The same request
// gives the same answer. It knows no HTTP, no clock and no provider's answer shapes.
package main

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
)

// The sentences that answers are made of, one subject a line of thought.
const (
	demoRivers = `A river rarely takes the straight way: it gives up slope for length and ends in meanders.
The outer bank of a bend is cut away while the inner bank grows, so the whole bend wanders downstream.
Most of the water in a dry summer comes from the ground beside the river and not from rain.
Where a river meets the sea it slows, drops its silt and builds the land it then has to cross.
A flood plain is part of the river; it is only dry for most of the year.
Cold mountain streams hold more oxygen than warm ones, which is why trout live there.
Gravel moves in a few days of high water and then lies still for months.`
	demoBread = `Good bread needs four things: flour, water, salt and time, and time is the one most often left out.
A long, cool rise gives the flour's own enzymes the hours they need, and the crumb tastes of it.
Salt tightens the gluten and slows the yeast, so it is weighed and never guessed.
The crust forms best in steam, because a damp surface stays soft while the loaf still grows.
A loaf is done when it sounds hollow underneath, at about 96 degrees inside.
Wet dough is hard to shape and easy to love: it bakes into large, shining holes.
Rye holds its water for days, which is why rye bread keeps and wheat bread does not.`
	demoRailways = `A railway saves its energy in the contact of steel on steel, a patch no larger than a coin.
Gradients decide where a line can go; curves decide how fast.
Signals divide the track into blocks, and one rule keeps everyone safe: one train to a block.
Most delays are small and come from doors, and they grow where lines share a junction.
A timetable that repeats every hour is easy to remember and connects in both directions.
Electric trains give back much of what they took when they brake into a station.
Before railways each town kept its own noon; the timetable made them agree on one.`
)

// A demoJSON is an object in writing order: name, value, name, value.
type demoJSON []any

func (o demoJSON) MarshalJSON() ([]byte, error) {
	b := []byte{'{'}
	for i := 0; i+1 < len(o); i += 2 {
		if i > 0 {
			b = append(b, ',')
		}
		for j, end := range []string{":", ""} {
			v, err := json.Marshal(o[i+j])
			if err != nil {
				return nil, err
			}
			b = append(append(b, v...), end...)
		}
	}
	return append(b, '}'), nil
}

// nullIfEmpty is s, or null if it is empty.
func nullIfEmpty(s string) any {
	if s == "" {
		return nil
	}
	return s
}

// A demoBody is what the provider reads from a request, of any endpoint and dialect.
type demoBody struct {
	Model               string           `json:"model"`
	Stream              bool             `json:"stream"`
	Messages            []map[string]any `json:"messages"`
	System              any              `json:"system"`
	Input               any              `json:"input"`
	Instructions        any              `json:"instructions"`
	Prompt              any              `json:"prompt"`
	N                   int              `json:"n"`
	Seed                int64            `json:"seed"`
	MaxTokens           int              `json:"max_tokens"`
	MaxCompletionTokens int              `json:"max_completion_tokens"`
	MaxOutputTokens     int              `json:"max_output_tokens"`
	Tools               []map[string]any `json:"tools"`
	ToolChoice          any              `json:"tool_choice"`
	ResponseFormat      any              `json:"response_format"` // an object for chat, a name for audio
	StreamFormat        string           `json:"stream_format"`
	EncodingFormat      string           `json:"encoding_format"`
	Dimensions          int              `json:"dimensions"`
	Metadata            map[string]any   `json:"metadata"`
	Text                struct {
		Format map[string]any `json:"format"`
	} `json:"text"`
	StreamOptions struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`

	prompt string // promptText, computed once
}

// A demoCompletion is one answer: words or a tool call.
type demoCompletion struct {
	text               string
	toolName, toolArgs string // a call of the tool with JSON arguments; "" if there is none
	reasoningTokens    int    // tokens thought before the answer
	outputTokens       int    // output tokens, reasoning included
	truncated          bool   // cut at the limit of tokens
}

// demoTokenCount is how many tokens n bytes of text are said to be.
func demoTokenCount(n int) int { return (n + 3) / 4 }

// demoWords splits text as a stream would.
func demoWords(text string) []string { return strings.SplitAfter(text, " ") }

// splitToolArgs splits JSON as the deltas of tool arguments are.
func splitToolArgs(args string) (bits []string) {
	for bit := range slices.Chunk([]rune(args), 8) {
		bits = append(bits, string(bit))
	}
	return bits
}

func demoHash(parts ...string) uint64 {
	h := fnv.New64a()
	for _, part := range parts {
		h.Write([]byte(part))
		h.Write([]byte{0})
	}
	return h.Sum64()
}

// demoTrigger finds [[name arg]] in a prompt.
func demoTrigger(prompt, name string) (arg string, ok bool) {
	_, rest, ok := strings.Cut(prompt, "[["+name)
	if !ok {
		return "", false
	}
	arg, _, ok = strings.Cut(rest, "]]")
	return strings.TrimSpace(arg), ok
}

// demoText is the text in a prompt, a message or a list of either. A list of token numbers gives four bytes for each.
func demoText(v any) string {
	var b strings.Builder
	switch v := v.(type) {
	case string:
		return v
	case float64:
		return fmt.Sprintf("%4.4s", strconv.FormatInt(int64(v), 36))
	case []any:
		for _, e := range v {
			b.WriteString(demoText(e))
		}
	case map[string]any:
		for _, name := range []string{"text", "content", "output", "arguments"} {
			if e, ok := v[name]; ok && e != nil {
				b.WriteString(demoText(e))
			}
		}
	}
	return b.String()
}

// promptText is all the text of the prompt, joined by nothing; its tokens are demoTokenCount of its length.
func (b *demoBody) promptText() string {
	var t strings.Builder
	for _, v := range []any{b.System, b.Instructions, b.Prompt, b.Input} {
		t.WriteString(demoText(v))
	}
	for _, m := range b.Messages {
		t.WriteString(demoText(m))
	}
	return t.String()
}

// lastTurn is the text of the last message, and whether that is the result of a tool.
func (b *demoBody) lastTurn() (text string, toolResult bool) {
	last := any(b.Prompt)
	if list, ok := b.Input.([]any); ok && len(list) > 0 {
		last = list[len(list)-1]
	} else if b.Input != nil {
		last = b.Input
	}
	if n := len(b.Messages); n > 0 {
		last = b.Messages[n-1]
	}
	if m, ok := last.(map[string]any); ok {
		toolResult = m["role"] == "tool" || m["type"] == "function_call_output"
		parts, _ := m["content"].([]any)
		toolResult = toolResult || slices.ContainsFunc(parts, func(p any) bool {
			part, _ := p.(map[string]any)
			return part["type"] == "tool_result"
		})
	}
	return demoText(last), toolResult
}

// tokenLimit is the most tokens the answer may have; 0 = any number.
func (b *demoBody) tokenLimit() int {
	return max(b.MaxTokens, b.MaxCompletionTokens, b.MaxOutputTokens, 0)
}

// completions gives n different answers to the request.
func (b *demoBody) completions(n int) []demoCompletion {
	list := make([]demoCompletion, n)
	for i := range list {
		list[i] = b.completion(i)
	}
	return list
}

// completion gives the answer number i to the request: a tool call if one was asked for, else text within the limit.
func (b *demoBody) completion(i int) (a demoCompletion) {
	rng := rand.New(rand.NewPCG(demoHash(b.Model, b.prompt), uint64(b.Seed)*131+uint64(i)))
	question, toolResult := b.lastTurn()
	limit := b.tokenLimit()
	if b.isReasoningModel() {
		a.reasoningTokens = 64 * (1 + rng.IntN(8))
		if limit > 0 {
			a.reasoningTokens = min(a.reasoningTokens, limit/2)
		}
	}
	name, schema := b.chosenTool(question, toolResult)
	if name != "" {
		a.toolName, a.toolArgs = name, demoSample(schema, question, rng)
		a.outputTokens = demoTokenCount(len(a.toolName)+len(a.toolArgs)) + a.reasoningTokens
		return a
	}
	a.text = b.composeText(question, toolResult, rng)
	if limit > 0 && demoTokenCount(len(a.text)) > limit-a.reasoningTokens {
		a.text = strings.ToValidUTF8(a.text[:4*(limit-a.reasoningTokens)], "")
		a.truncated = true
	}
	a.outputTokens = demoTokenCount(len(a.text)) + a.reasoningTokens
	return a
}

// isReasoningModel reports whether the model is one that thinks first.
func (b *demoBody) isReasoningModel() bool {
	return slices.ContainsFunc([]string{"o1", "o3", "o4", "gpt-5"}, func(family string) bool {
		return strings.HasPrefix(b.Model, family)
	})
}

// composeText writes the answer: JSON if the request wants that, else sentences on a subject near the question.
func (b *demoBody) composeText(question string, toolResult bool, rng *rand.Rand) string {
	format, _ := b.ResponseFormat.(map[string]any)
	if format == nil {
		format = b.Text.Format
	}
	if format["type"] == "json_schema" {
		if inner, ok := format["json_schema"].(map[string]any); ok {
			format = inner
		}
		return demoSample(format["schema"], question, rng)
	}
	subjects := []string{demoRivers, demoBread, demoRailways}
	subject := subjects[rng.IntN(len(subjects))]
	for i, word := range []string{"river", "bread", "rail"} {
		if strings.Contains(strings.ToLower(question), word) {
			subject = subjects[i]
		}
	}
	sentences := strings.Split(subject, "\n")
	from, count := rng.IntN(len(sentences)), 3+rng.IntN(3)
	opening := "You asked: “" + demoExcerpt(question) + "”"
	if toolResult {
		opening = "The tool says: “" + demoExcerpt(question) + "”"
	}
	text := []string{opening + ". Here is what the demo provider knows."}
	for i := range count {
		text = append(text, sentences[(from+i)%len(sentences)])
	}
	said := strings.Join(text, " ")
	if format["type"] == "json_object" {
		object, _ := json.Marshal(demoJSON{"answer", said}) // a string
		return string(object)
	}
	return said
}

// demoExcerpt is the beginning of s on one line.
func demoExcerpt(s string) string {
	r := []rune(s[:min(len(s), 400)])
	if len(r) > 80 || len(s) > 400 {
		r = append(r[:min(len(r), 80)], '…')
	}
	return strings.TrimSpace(strings.Join(strings.Fields(strings.ToValidUTF8(string(r), "")), " "))
}

// chosenTool returns the tool to call and the schema of its arguments, "" for none: the one that tool_choice names or
// requires, else one that the last message mentions by name or by "weather" or "tool". A tool's own result calls none.
func (b *demoBody) chosenTool(question string, toolResult bool) (name string, schema any) {
	choice, _ := b.ToolChoice.(string)
	wanted := ""
	if m, ok := b.ToolChoice.(map[string]any); ok {
		choice, _ = m["type"].(string)
		wanted, _ = m["name"].(string)
		if f, ok := m["function"].(map[string]any); ok {
			wanted, _ = f["name"].(string)
		}
	}
	if choice == "none" {
		return "", nil
	}
	question = strings.ToLower(question)
	required := choice == "required" || choice == "any"
	mentioned := strings.Contains(question, "weather") || strings.Contains(question, "tool")
	first, firstSchema := "", any(nil)
	for _, tool := range b.Tools {
		n, s := demoTool(tool)
		if n == "" {
			continue
		}
		if n == wanted || wanted == "" && !toolResult && strings.Contains(question, strings.ToLower(n)) {
			return n, s
		}
		if first == "" {
			first, firstSchema = n, s
		}
	}
	if wanted == "" && (required || mentioned && !toolResult) {
		return first, firstSchema
	}
	return "", nil
}

// demoTool is the name and schema of a function tool in any dialect; "" for tools that a provider runs itself.
func demoTool(tool map[string]any) (name string, schema any) {
	if f, ok := tool["function"].(map[string]any); ok {
		tool = f
	} else if tool["type"] != "function" && tool["input_schema"] == nil {
		return "", nil
	}
	name, _ = tool["name"].(string)
	if s := tool["input_schema"]; s != nil {
		return name, s
	}
	return name, tool["parameters"]
}

// demoSample is a plausible JSON value for a JSON schema, an object if the schema says nothing.
func demoSample(schema any, question string, rng *rand.Rand) string {
	root, _ := schema.(map[string]any)
	if root == nil {
		return "{}"
	}
	s := demoSampler{root: root, question: question, rng: rng, valuesLeft: 500}
	b, _ := json.Marshal(s.value("", root)) // values that came from JSON
	return string(b)
}

// A demoSampler fills in one schema; left bounds its work, whatever the schema refers to.
type demoSampler struct {
	root       map[string]any
	question   string
	rng        *rand.Rand
	valuesLeft int // values
}

func (s *demoSampler) value(name string, schema any) any {
	m, _ := schema.(map[string]any)
	if s.valuesLeft--; s.valuesLeft < 0 {
		return nil
	}
	if ref, ok := m["$ref"].(string); ok {
		defs, _ := m["$defs"].(map[string]any)
		if defs == nil {
			defs, _ = s.root["$defs"].(map[string]any)
		}
		return s.value(name, defs[strings.TrimPrefix(ref, "#/$defs/")])
	}
	for _, union := range []string{"anyOf", "oneOf", "allOf"} {
		if list, ok := m[union].([]any); ok && len(list) > 0 {
			return s.value(name, list[0])
		}
	}
	if v, ok := m["const"]; ok {
		return v
	}
	if list, ok := m["enum"].([]any); ok && len(list) > 0 {
		return list[s.rng.IntN(len(list))]
	}
	props, _ := m["properties"].(map[string]any)
	kind, _ := m["type"].(string)
	if list, ok := m["type"].([]any); ok && len(list) > 0 {
		kind, _ = list[0].(string)
	}
	switch {
	case kind == "object" || props != nil:
		object := map[string]any{}
		for _, prop := range slices.Sorted(maps.Keys(props)) {
			object[prop] = s.value(prop, props[prop])
		}
		return object
	case kind == "array":
		return []any{s.value(name, m["items"])}
	case kind == "integer" || kind == "number":
		if least, ok := m["minimum"].(float64); ok {
			return least
		}
		return 1 + s.rng.IntN(9)
	case kind == "boolean":
		return true
	case kind == "null":
		return nil
	}
	return s.stringFor(strings.ToLower(name))
}

// stringFor is a plausible string for a property of that name.
func (s *demoSampler) stringFor(name string) string {
	for _, guess := range [][2]string{
		{"city", "Lisbon"}, {"location", "Lisbon"}, {"place", "Lisbon"}, {"country", "Portugal"}, {"date", "2025-06-01"},
		{"time", "09:30"}, {"unit", "celsius"}, {"mail", "ada@example.com"}, {"url", "https://example.com/"},
		{"name", "Ada"}, {"lang", "en"}, {"query", demoExcerpt(s.question)}, {"question", demoExcerpt(s.question)},
	} {
		if strings.Contains(name, guess[0]) {
			return guess[1]
		}
	}
	return "example"
}
