// This file answers Gemini's own API: content, as one body, as a stream of events or as a list, counts
// of tokens, embeddings, and the list of models. A request is translated into the fields that the
// other APIs have; the content comes from answers.go.
package demo

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

const geminiPrefix = "/v1beta/models"

// geminiModels are the models that the provider lists. Others are answered, too.
var geminiModels = []string{"gemini-3.5-flash", "gemini-3-pro-preview", "gemini-2.5-pro", "gemini-2.5-flash",
	"gemini-2.5-flash-lite", "gemini-embedding-001"}

// A geminiRequest has the fields that the provider reads, for every method of Gemini's API.
type geminiRequest struct {
	Contents          []geminiContent `json:"contents"`
	SystemInstruction geminiContent   `json:"systemInstruction"`
	Tools             []struct {
		FunctionDeclarations []geminiFunction `json:"functionDeclarations"`
		GoogleSearch         any              `json:"googleSearch"`
	} `json:"tools"`
	ToolConfig struct {
		FunctionCallingConfig struct {
			Mode                 string   `json:"mode"`
			AllowedFunctionNames []string `json:"allowedFunctionNames"`
		} `json:"functionCallingConfig"`
	} `json:"toolConfig"`
	GenerationConfig struct {
		MaxOutputTokens    int    `json:"maxOutputTokens"`
		CandidateCount     int    `json:"candidateCount"`
		Seed               int64  `json:"seed"`
		ResponseMimeType   string `json:"responseMimeType"`
		ResponseSchema     any    `json:"responseSchema"`
		ResponseJSONSchema any    `json:"responseJsonSchema"`
	} `json:"generationConfig"`
	GenerateContentRequest *geminiRequest  `json:"generateContentRequest"` // what countTokens counts
	Content                geminiContent   `json:"content"`                // what embedContent embeds
	OutputDimensionality   int             `json:"outputDimensionality"`
	Requests               []geminiRequest `json:"requests"` // of batchEmbedContents
}

type geminiContent struct {
	Role  string `json:"role"`
	Parts []struct {
		Text             string `json:"text"`
		FunctionCall     any    `json:"functionCall"`
		FunctionResponse any    `json:"functionResponse"`
	} `json:"parts"`
}

type geminiFunction struct {
	Name                 string `json:"name"`
	Parameters           any    `json:"parameters"`
	ParametersJSONSchema any    `json:"parametersJsonSchema"`
}

// UnmarshalJSON reads a request whose fields are in camelCase or snake_case, as each of them may be: Google's SDK for
// Python mixes both.
func (g *geminiRequest) UnmarshalJSON(text []byte) error {
	type fields geminiRequest
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return err
	}
	b, err := json.Marshal(camelCase(v))
	if err != nil {
		return err
	}
	return json.Unmarshal(b, (*fields)(g))
}

// camelCase returns a JSON value whose names of fields are in camelCase. Schemas and the arguments and results of tools
// have names of their own, and keep them.
func camelCase(value any) any {
	switch v := value.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for name, member := range v {
			words := strings.Split(name, "_")
			for i, word := range words[1:] {
				if word != "" {
					words[i+1] = strings.ToUpper(word[:1]) + word[1:]
				}
			}
			switch name = strings.Join(words, ""); name {
			case "parameters", "parametersJsonSchema", "responseSchema", "responseJsonSchema", "args", "response":
				out[name] = member
			default:
				out[name] = camelCase(member)
			}
		}
		return out
	case []any:
		for i := range v {
			v[i] = camelCase(v[i])
		}
	}
	return value
}

// message returns the content as a message of the other APIs.
func (g *geminiContent) message() map[string]any {
	m, text := map[string]any{"role": g.Role}, ""
	for _, p := range g.Parts {
		text += p.Text
		for _, v := range []any{p.FunctionCall, p.FunctionResponse} {
			if v != nil {
				b, _ := json.Marshal(v) // it comes from JSON
				text += string(b)
			}
		}
		if p.FunctionResponse != nil {
			m["role"] = "tool"
		}
	}
	m["content"] = text
	return m
}

// translate returns the request in the fields of the other APIs.
func (g *geminiRequest) translate(model string) request {
	if g.GenerateContentRequest != nil {
		return g.GenerateContentRequest.translate(model)
	}
	config, calling := &g.GenerationConfig, &g.ToolConfig.FunctionCallingConfig
	r := request{Model: model, MaxOutputTokens: config.MaxOutputTokens, N: config.CandidateCount, Seed: config.Seed}
	r.System = g.SystemInstruction.message()
	for _, c := range append(slices.Clone(g.Contents), g.Content) {
		if len(c.Parts) > 0 {
			r.Messages = append(r.Messages, c.message())
		}
	}
	for _, q := range g.Requests {
		r.Messages = append(r.Messages, q.Content.message())
	}
	for _, t := range g.Tools {
		r.grounded = r.grounded || t.GoogleSearch != nil
		for _, f := range t.FunctionDeclarations {
			schema := f.ParametersJSONSchema
			if schema == nil {
				schema = lowerTypes(f.Parameters)
			}
			r.Tools = append(r.Tools, map[string]any{"type": "function", "name": f.Name, "parameters": schema})
		}
	}
	switch names := calling.AllowedFunctionNames; {
	case calling.Mode == "NONE":
		r.ToolChoice = "none"
	case calling.Mode == "ANY" && len(names) > 0:
		r.ToolChoice = map[string]any{"type": "function", "name": names[0]}
	case calling.Mode == "ANY":
		r.ToolChoice = "required"
	}
	if config.ResponseMimeType == "application/json" {
		format, schema := map[string]any{"type": "json_object"}, config.ResponseJSONSchema
		if schema == nil {
			schema = lowerTypes(config.ResponseSchema)
		}
		if schema != nil {
			format = map[string]any{"type": "json_schema", "schema": schema}
		}
		r.ResponseFormat = format
	}
	return r
}

// lowerTypes returns one of Gemini's own schemas, in which types are in capitals, as a JSON schema.
func lowerTypes(schema any) any {
	switch v := schema.(type) {
	case map[string]any:
		out := map[string]any{}
		for name, member := range v {
			out[name] = lowerTypes(member)
			if kind, ok := member.(string); ok && name == "type" {
				out[name] = strings.ToLower(kind)
			}
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = lowerTypes(v[i])
		}
		return out
	}
	return schema
}

// geminiHandler is handler for Gemini's URLs. It reads the model from the path.
func (c *call) geminiHandler() func() {
	rest := strings.TrimPrefix(c.r.URL.Path, geminiPrefix)
	name, verb, _ := strings.Cut(strings.TrimPrefix(rest, "/"), ":")
	c.body.Model = name
	switch {
	case c.r.Method == http.MethodGet && rest == "":
		return c.geminiList
	case name == "" || rest == "":
		return nil
	case c.r.Method == http.MethodGet && verb == "":
		return c.geminiModel
	case c.r.Method != http.MethodPost:
		return nil
	}
	return map[string]func(){"generateContent": c.geminiContent, "streamGenerateContent": c.geminiStream,
		"countTokens": c.geminiCount, "embedContent": c.geminiEmbed, "batchEmbedContents": c.geminiEmbed}[verb]
}

// geminiList answers GET /v1beta/models, page by page.
func (c *call) geminiList() {
	size, err := strconv.Atoi(c.r.URL.Query().Get("pageSize"))
	if err != nil || size < 1 {
		size = 50
	}
	from := slices.Index(geminiModels, c.r.URL.Query().Get("pageToken")) + 1
	to := min(len(geminiModels), from+size)
	list := []any{}
	for _, name := range geminiModels[from:to] {
		list = append(list, geminiModelObject(name))
	}
	page := obj{"models", list}
	if to < len(geminiModels) {
		page = append(page, "nextPageToken", geminiModels[to-1])
	}
	c.replyJSON(0, page)
}

// geminiModel answers GET /v1beta/models/{model}. Every model exists except no-such-model.
func (c *call) geminiModel() {
	if c.body.Model == unknownModel {
		c.failUnknownModel()
		return
	}
	c.replyJSON(0, geminiModelObject(c.body.Model))
}

func geminiModelObject(name string) obj {
	methods, output := []string{"generateContent", "countTokens"}, 65536
	if strings.Contains(name, "embedding") {
		methods, output = []string{"embedContent"}, 1
	}
	return obj{"name", "models/" + name, "version", "001", "displayName", name, "description", "A model of the demo",
		"inputTokenLimit", 1048576, "outputTokenLimit", output, "supportedGenerationMethods", methods}
}

// geminiUsage returns the usageMetadata of an answer that has come so far.
func (c *call) geminiUsage(u usage, output int) obj {
	v := obj{"promptTokenCount", u.prompt, "candidatesTokenCount", output,
		"totalTokenCount", u.prompt + output + u.reasoning,
		"promptTokensDetails", []any{obj{"modality", "TEXT", "tokenCount", u.prompt}}}
	if u.cached > 0 {
		v = append(v, "cachedContentTokenCount", u.cached)
	}
	if u.reasoning > 0 {
		v = append(v, "thoughtsTokenCount", u.reasoning)
	}
	return v
}

// geminiPart returns the part of a candidate that an answer is, and why the answer ends.
func (c *call) geminiPart(a completion) (part obj, finish string) {
	switch {
	case a.toolName != "":
		call := obj{"id", c.p.newID(""), "name", a.toolName, "args", json.RawMessage(a.toolArgs)}
		return obj{"functionCall", call}, "STOP"
	case a.truncated:
		return obj{"text", a.text}, "MAX_TOKENS"
	}
	return obj{"text", a.text}, "STOP"
}

// geminiContent answers POST /v1beta/models/{model}:generateContent.
func (c *call) geminiContent() {
	answers := c.body.completions(max(1, c.body.N))
	u := c.usage(answers...)
	candidates := []any{}
	for i, a := range answers {
		part, finish := c.geminiPart(a)
		candidates = append(candidates, c.geminiCandidate(part, finish, i))
	}
	c.replyJSON(u.output, obj{"candidates", candidates, "usageMetadata", c.geminiUsage(u, u.output-u.reasoning),
		"modelVersion", c.body.Model, "responseId", c.p.newID("")})
}

// geminiCandidate returns a candidate, or a piece of one. The last piece has the finish, and the searches of the web
// that the answer rests on, if the request allows them.
func (c *call) geminiCandidate(part obj, finish string, index int) obj {
	v := obj{"content", obj{"parts", []any{part}, "role", "model"}, "index", index}
	if finish == "" {
		return v
	}
	if v = append(v, "finishReason", finish); c.body.grounded {
		question, _ := c.body.lastTurn()
		v = append(v, "groundingMetadata", obj{"webSearchQueries", []any{excerpt(question)}})
	}
	return v
}

// geminiStream answers POST /v1beta/models/{model}:streamGenerateContent: a stream of events with
// alt=sse, otherwise a list.
func (c *call) geminiStream() {
	a := c.body.completion(0)
	u := c.usage(a)
	events := c.r.URL.Query().Get("alt") == "sse"
	id, sent := c.p.newID(""), 0
	send := func(part obj, finish string) {
		output := min(countTokens(sent), u.output-u.reasoning)
		if finish != "" {
			output = u.output - u.reasoning
		}
		chunk := obj{"candidates", []any{c.geminiCandidate(part, finish, 0)}, "usageMetadata", c.geminiUsage(u, output),
			"modelVersion", c.body.Model, "responseId", id}
		if events {
			c.sendEvent("", chunk)
			return
		}
		b, err := json.Marshal(chunk)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		fmt.Fprintf(c.w, "%s%s", map[bool]string{true: "[", false: ",\r\n"}[sent == 0], b)
		_ = http.NewResponseController(c.w).Flush()
	}
	if events {
		c.beginStream()
	} else {
		c.sleep(c.firstTokenDelay())
		c.writeHeader(http.StatusOK, "application/json; charset=UTF-8")
	}
	part, finish := c.geminiPart(a)
	chunks := splitWords(a.text)
	if a.toolName != "" {
		chunks = []string{a.toolArgs}
	}
	c.sendPaced(chunks, func(chunk string) {
		last := sent+len(chunk) >= max(len(a.text), len(a.toolArgs))
		switch {
		case a.toolName != "":
			send(part, finish)
		case last:
			send(obj{"text", chunk}, finish)
		default:
			send(obj{"text", chunk}, "")
		}
		sent += len(chunk)
	})
	if !events {
		fmt.Fprint(c.w, "]\r\n")
	}
}

// geminiCount answers POST /v1beta/models/{model}:countTokens.
func (c *call) geminiCount() {
	n := countTokens(len(c.body.prompt))
	c.replyJSON(0, obj{"totalTokens", n, "promptTokensDetails", []any{obj{"modality", "TEXT", "tokenCount", n}}})
}

// geminiEmbed answers POST /v1beta/models/{model}:embedContent and :batchEmbedContents.
func (c *call) geminiEmbed() {
	var g geminiRequest
	_ = json.Unmarshal(c.rawBody, &g) // readBody has parsed it
	batch := strings.HasSuffix(c.r.URL.Path, ":batchEmbedContents")
	requests := g.Requests
	if !batch {
		requests = []geminiRequest{g}
	}
	if len(requests) == 0 || len(requests) > 100 {
		c.fail(http.StatusBadRequest, "", "requests: must have from 1 to 100 elements")
		return
	}
	list := []any{}
	for _, q := range requests {
		dims := q.OutputDimensionality
		if dims == 0 {
			dims = 3072
		}
		if dims < 1 || dims > 3072 {
			c.fail(http.StatusBadRequest, "", "outputDimensionality: must be from 1 to 3072")
			return
		}
		list = append(list, obj{"values", embeddingVector(c.body.Model, textOf(q.Content.message()), dims)})
	}
	if batch {
		c.replyJSON(0, obj{"embeddings", list})
		return
	}
	c.replyJSON(0, obj{"embedding", list[0]})
}

// geminiError returns an error in Google's shape.
func geminiError(status int, msg string) obj {
	name, ok := map[int]string{400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED",
		404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}[status]
	if !ok {
		name = "INTERNAL"
	}
	e := obj{"code", status, "message", msg, "status", name}
	if status == http.StatusTooManyRequests {
		e = append(e, "details", []any{obj{"@type", "type.googleapis.com/google.rpc.RetryInfo", "retryDelay", "1s"}})
	}
	return obj{"error", e}
}
