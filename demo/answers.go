// This file makes the content of the answers: text and tool arguments. It is plain code: the same
// request gives the same answer. It uses no HTTP and no clock, and does not depend on any API's
// answer format.
package demo

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The sentences that answers are made of, by subject.
const (
	rivers = `A river rarely takes the straight way: it gives up slope for length and ends in meanders.
The outer bank of a bend is cut away while the inner bank grows, so the whole bend wanders downstream.
Most of the water in a dry summer comes from the ground beside the river and not from rain.
Where a river meets the sea it slows, drops its silt and builds the land it then has to cross.
A flood plain is part of the river; it is only dry for most of the year.
Cold mountain streams hold more oxygen than warm ones, which is why trout live there.
Gravel moves in a few days of high water and then lies still for months.`
	bread = `Good bread needs four things: flour, water, salt and time, and time is the one most often left out.
A long, cool rise gives the flour's own enzymes the hours they need, and the crumb tastes of it.
Salt tightens the gluten and slows the yeast, so it is weighed and never guessed.
The crust forms best in steam, because a damp surface stays soft while the loaf still grows.
A loaf is done when it sounds hollow underneath, at about 96 degrees inside.
Wet dough is hard to shape and easy to love: it bakes into large, shining holes.
Rye holds its water for days, which is why rye bread keeps and wheat bread does not.`
	railways = `A railway saves its energy in the contact of steel on steel, a patch no larger than a coin.
Gradients decide where a line can go; curves decide how fast.
Signals divide the track into blocks, and one rule keeps everyone safe: one train to a block.
Most delays are small and come from doors, and they grow where lines share a junction.
A timetable that repeats every hour is easy to remember and connects in both directions.
Electric trains give back much of what they took when they brake into a station.
Before railways each town kept its own noon; the timetable made them agree on one.`
)

// An obj is a JSON object whose fields keep their order: name, value, name, value.
type obj []any

func (o obj) MarshalJSON() ([]byte, error) {
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

// nullIfEmpty returns s, or null if it is empty.
func nullIfEmpty(s string) any {
	if s == "" {
		return nil
	}
	return s
}

// A request has the fields that the provider reads, for every endpoint of both APIs.
type request struct {
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

	prompt   string // promptText, computed once
	grounded bool   // Gemini's API may search the web
}

// A completion is one answer: text or a tool call.
type completion struct {
	text               string
	toolName, toolArgs string // a call of the tool with JSON arguments; "" if there is none
	reasoningTokens    int    // reasoning tokens before the answer
	outputTokens       int    // output tokens, reasoning included
	truncated          bool   // cut at the token limit
}

// countTokens returns the number of tokens that n bytes of text count as.
func countTokens(n int) int { return (n + 3) / 4 }

// splitWords splits text into the chunks of a stream.
func splitWords(text string) []string { return strings.SplitAfter(text, " ") }

// splitToolArgs splits the JSON of tool arguments into the deltas of a stream.
func splitToolArgs(args string) (deltas []string) {
	for delta := range slices.Chunk([]rune(args), 8) {
		deltas = append(deltas, string(delta))
	}
	return deltas
}

func hash(parts ...string) uint64 {
	h := fnv.New64a()
	for _, part := range parts {
		h.Write([]byte(part))
		h.Write([]byte{0})
	}
	return h.Sum64()
}

// findTrigger finds [[name arg]] in a prompt.
func findTrigger(prompt, name string) (arg string, ok bool) {
	_, rest, ok := strings.Cut(prompt, "[["+name)
	if !ok {
		return "", false
	}
	arg, _, ok = strings.Cut(rest, "]]")
	return strings.TrimSpace(arg), ok
}

// textOf returns the text in a prompt, a message or a list of either. Each number in a list of
// tokens gives four bytes.
func textOf(v any) string {
	var b strings.Builder
	switch v := v.(type) {
	case string:
		return v
	case float64:
		return fmt.Sprintf("%4.4s", strconv.FormatInt(int64(v), 36))
	case []any:
		for _, e := range v {
			b.WriteString(textOf(e))
		}
	case map[string]any:
		for _, name := range []string{"text", "content", "output", "arguments"} {
			if e, ok := v[name]; ok && e != nil {
				b.WriteString(textOf(e))
			}
		}
	}
	return b.String()
}

// promptText returns all the text of the prompt, joined without separators. countTokens of its
// length is its token count.
func (b *request) promptText() string {
	var t strings.Builder
	for _, v := range []any{b.System, b.Instructions, b.Prompt, b.Input} {
		t.WriteString(textOf(v))
	}
	for _, m := range b.Messages {
		t.WriteString(textOf(m))
	}
	return t.String()
}

// lastTurn returns the text of the last message, and whether that message is the result of a tool.
func (b *request) lastTurn() (text string, toolResult bool) {
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
	return textOf(last), toolResult
}

// tokenLimit returns how many tokens the answer may have; 0: no limit.
func (b *request) tokenLimit() int {
	return max(b.MaxTokens, b.MaxCompletionTokens, b.MaxOutputTokens, 0)
}

// completions returns n different answers to the request.
func (b *request) completions(n int) []completion {
	list := make([]completion, n)
	for i := range list {
		list[i] = b.completion(i)
	}
	return list
}

// completion returns answer number i to the request: a tool call if one was asked for, otherwise
// text within the limit.
func (b *request) completion(i int) (a completion) {
	rng := rand.New(rand.NewPCG(hash(b.Model, b.prompt), uint64(b.Seed)*131+uint64(i)))
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
		a.toolName, a.toolArgs = name, sampleJSON(schema, question, rng)
		a.outputTokens = countTokens(len(a.toolName)+len(a.toolArgs)) + a.reasoningTokens
		return a
	}
	a.text = b.composeText(question, toolResult, rng)
	if limit > 0 && countTokens(len(a.text)) > limit-a.reasoningTokens {
		a.text = strings.ToValidUTF8(a.text[:4*(limit-a.reasoningTokens)], "")
		a.truncated = true
	}
	a.outputTokens = countTokens(len(a.text)) + a.reasoningTokens
	return a
}

// isReasoningModel reports whether the model counts reasoning tokens.
func (b *request) isReasoningModel() bool {
	families := []string{"o1", "o3", "o4", "gpt-5", "gemini-3", "gemini-2.5-pro"}
	return slices.ContainsFunc(families, func(family string) bool { return strings.HasPrefix(b.Model, family) })
}

// composeText writes the answer: JSON if the request asks for it, otherwise sentences on a subject
// near the question.
func (b *request) composeText(question string, toolResult bool, rng *rand.Rand) string {
	format, _ := b.ResponseFormat.(map[string]any)
	if format == nil {
		format = b.Text.Format
	}
	if format["type"] == "json_schema" {
		if inner, ok := format["json_schema"].(map[string]any); ok {
			format = inner
		}
		return sampleJSON(format["schema"], question, rng)
	}
	subjects := []string{rivers, bread, railways}
	subject := subjects[rng.IntN(len(subjects))]
	for i, word := range []string{"river", "bread", "rail"} {
		if strings.Contains(strings.ToLower(question), word) {
			subject = subjects[i]
		}
	}
	sentences := strings.Split(subject, "\n")
	from, count := rng.IntN(len(sentences)), 3+rng.IntN(3)
	opening := "You asked: “" + excerpt(question) + "”"
	if toolResult {
		opening = "The tool says: “" + excerpt(question) + "”"
	}
	text := []string{opening + ". Here is what the demo provider knows."}
	for i := range count {
		text = append(text, sentences[(from+i)%len(sentences)])
	}
	answer := strings.Join(text, " ")
	if format["type"] == "json_object" {
		object, _ := json.Marshal(obj{"answer", answer}) // cannot fail for a string
		return string(object)
	}
	return answer
}

// excerpt returns the beginning of s, on one line.
func excerpt(s string) string {
	r := []rune(s[:min(len(s), 400)])
	if len(r) > 80 || len(s) > 400 {
		r = append(r[:min(len(r), 80)], '…')
	}
	return strings.TrimSpace(strings.Join(strings.Fields(strings.ToValidUTF8(string(r), "")), " "))
}

// chosenTool returns the tool to call and the schema of its arguments, or "". It chooses the tool
// that tool_choice names or requires, otherwise one that the last message mentions by name or by
// "weather" or "tool". After a tool's result it chooses none.
func (b *request) chosenTool(question string, toolResult bool) (name string, schema any) {
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
		n, s := functionTool(tool)
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

// functionTool returns the name and schema of a function tool of either API, or "" for tools that
// the provider runs itself.
func functionTool(tool map[string]any) (name string, schema any) {
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

// sampleJSON returns a plausible JSON value for a JSON schema, {} if there is no schema.
func sampleJSON(schema any, question string, rng *rand.Rand) string {
	root, _ := schema.(map[string]any)
	if root == nil {
		return "{}"
	}
	s := sampler{root: root, question: question, words: wordsOf(question), rng: rng, valuesLeft: 500}
	b, _ := json.Marshal(s.value("", root)) // cannot fail: the values came from JSON
	return string(b)
}

// A sampler fills in one schema, with what the question names where it can tell. valuesLeft bounds its work, even
// if the schema refers to itself.
type sampler struct {
	root       map[string]any
	question   string
	words      []string // of the question
	numbers    int      // how many numbers of the question were used
	rng        *rand.Rand
	valuesLeft int
}

func (s *sampler) value(name string, schema any) any {
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
	for _, keyword := range []string{"anyOf", "oneOf", "allOf"} {
		if list, ok := m[keyword].([]any); ok && len(list) > 0 {
			return s.value(name, list[0])
		}
	}
	if v, ok := m["const"]; ok {
		return v
	}
	if list, ok := m["enum"].([]any); ok && len(list) > 0 {
		for _, v := range list {
			if text, ok := v.(string); ok && slices.ContainsFunc(s.words, func(word string) bool {
				return strings.EqualFold(word, text)
			}) {
				return v
			}
		}
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
		if n, ok := s.numberAsked(kind, m); ok {
			return n
		}
		if minimum, ok := m["minimum"].(float64); ok {
			return minimum
		}
		return 1 + s.rng.IntN(9)
	case kind == "boolean":
		return true
	case kind == "null":
		return nil
	}
	return s.stringFor(strings.ToLower(name))
}

// stringFor returns a plausible string for a property of that name.
func (s *sampler) stringFor(name string) string {
	place := s.placeAsked()
	for _, example := range [][2]string{
		{"city", place}, {"location", place}, {"place", place}, {"country", "Portugal"},
		{"date", s.wordAsked(isDate, "2025-06-01")}, {"time", "09:30"}, {"unit", "celsius"},
		{"mail", s.wordAsked(func(w string) bool { return strings.Contains(w, "@") }, "ada@example.com")},
		{"url", s.wordAsked(func(w string) bool { return strings.Contains(w, "://") }, "https://example.com/")},
		{"name", "Ada"}, {"lang", "en"}, {"query", excerpt(s.question)}, {"question", excerpt(s.question)},
	} {
		if strings.Contains(name, example[0]) {
			return example[1]
		}
	}
	return "example"
}

// wordsOf returns the beginning of a text as words. Punctuation after a word is a word of its own.
func wordsOf(text string) (words []string) {
	for field := range strings.FieldsSeq(text[:min(len(text), 4000)]) {
		field = strings.TrimLeft(strings.ToValidUTF8(field, ""), `"'“‘([`)
		word := strings.TrimRight(field, `.,;:!?"'”’)]`)
		if word != "" {
			words = append(words, word)
		}
		if word != field {
			words = append(words, ".")
		}
	}
	return words
}

// wordAsked returns the first word of the question that is what is wanted, otherwise the example.
func (s *sampler) wordAsked(is func(string) bool, example string) string {
	if i := slices.IndexFunc(s.words, is); i >= 0 {
		return s.words[i]
	}
	return example
}

func isDate(word string) bool {
	_, err := time.Parse(time.DateOnly, word)
	return err == nil
}

// numberAsked returns the next number of the question, if the schema m allows it.
func (s *sampler) numberAsked(kind string, m map[string]any) (any, bool) {
	seen := 0
	for _, word := range s.words {
		n, err := strconv.ParseFloat(word, 64)
		if err != nil || math.IsNaN(n) || math.IsInf(n, 0) {
			continue
		}
		if seen++; seen <= s.numbers {
			continue
		}
		lowest, hasLowest := m["minimum"].(float64)
		highest, hasHighest := m["maximum"].(float64)
		if hasLowest && n < lowest || hasHighest && n > highest || kind == "integer" && n != math.Trunc(n) {
			return nil, false
		}
		s.numbers = seen
		return json.Number(word), strings.Trim(word, "-0123456789.") == "" && json.Valid([]byte(word))
	}
	return nil, false
}

// placeAsked returns the place that the question names: the capitalized words after a preposition, otherwise the word
// after “in”, otherwise a capitalized word inside a sentence.
func (s *sampler) placeAsked() string {
	isCapital := func(word string) bool {
		first := string([]rune(word)[:1])
		return strings.ToLower(first) != first && word != "I"
	}
	run := func(i int) string { // of capitalized words
		end := i
		for end < len(s.words) && isCapital(s.words[end]) {
			end++
		}
		return strings.Join(s.words[i:end], " ")
	}
	prepositions := []string{"in", "at", "for", "near", "around", "of", "to", "from"}
	for i := 1; i < len(s.words); i++ {
		if slices.Contains(prepositions, strings.ToLower(s.words[i-1])) && isCapital(s.words[i]) {
			return run(i)
		}
	}
	for i := 1; i < len(s.words); i++ {
		article := slices.Contains([]string{".", "a", "an", "the", "my", "our", "your", "this"}, s.words[i])
		if strings.EqualFold(s.words[i-1], "in") && !article {
			return s.words[i]
		}
	}
	for i := 1; i < len(s.words); i++ {
		if isCapital(s.words[i]) && s.words[i-1] != "." {
			return run(i)
		}
	}
	return "Lisbon"
}
