// This file answers Gemini's own API: generateContent and streamGenerateContent. It may do what dialogs.go does.
package demo

import (
	"encoding/json"
	"net/http"
	"strings"
)

const geminiModels = "/v1beta/models/"

// geminiCall returns the model and the method of a path of Gemini's API, such as generateContent.
func geminiCall(path string) (model, method string, ok bool) {
	rest, ok := strings.CutPrefix(path, geminiModels)
	model, method, found := strings.Cut(rest, ":")
	return model, method, ok && found && model != ""
}

// A geminiRequest has the fields of Gemini's requests that the provider reads.
type geminiRequest struct {
	Contents          []geminiContent `json:"contents"`
	SystemInstruction geminiContent   `json:"systemInstruction"`
	GenerationConfig  struct {
		MaxOutputTokens int   `json:"maxOutputTokens"`
		Seed            int64 `json:"seed"`
	} `json:"generationConfig"`
	Tools []struct {
		FunctionDeclarations []map[string]any `json:"functionDeclarations"`
	} `json:"tools"`
}

type geminiContent struct {
	Role  string `json:"role"`
	Parts []struct {
		Text             string `json:"text"`
		FunctionResponse *struct {
			Response map[string]any `json:"response"`
		} `json:"functionResponse"`
	} `json:"parts"`
}

// message returns the content as a message of OpenAI's API.
func (g *geminiContent) message() map[string]any {
	var text []string
	role := map[string]string{"model": "assistant"}[g.Role]
	for _, part := range g.Parts {
		text = append(text, part.Text)
		if part.FunctionResponse != nil {
			result, _ := json.Marshal(part.FunctionResponse.Response) // it came from JSON
			role, text = "tool", append(text, string(result))
		}
	}
	if role == "" {
		role = "user"
	}
	return map[string]any{"role": role, "content": strings.Join(text, "")}
}

// readGemini reads the body of a call of Gemini's API into the fields that it has in common with OpenAI's.
func (b *request) readGemini(body []byte, model string) error {
	var g geminiRequest
	if err := json.Unmarshal(body, &g); err != nil {
		return err
	}
	b.Model, b.MaxTokens, b.Seed = model, g.GenerationConfig.MaxOutputTokens, g.GenerationConfig.Seed
	if system := g.SystemInstruction.message()["content"]; system != "" {
		b.System = system
	}
	for i := range g.Contents {
		b.Messages = append(b.Messages, g.Contents[i].message())
	}
	for _, tool := range g.Tools {
		for _, f := range tool.FunctionDeclarations {
			b.Tools = append(b.Tools, map[string]any{"type": "function", "function": f})
		}
	}
	return nil
}

// generateContent answers a call of Gemini's API.
func (c *call) generateContent(stream bool) {
	if len(c.body.Messages) == 0 {
		c.fail(http.StatusBadRequest, "", "GenerateContentRequest.contents: contents is not specified")
		return
	}
	a := c.body.completion(0)
	u := c.usage(a)
	counts := obj{"promptTokenCount", u.prompt, "candidatesTokenCount", u.output - u.reasoning,
		"totalTokenCount", u.prompt + u.output}
	if u.cached > 0 {
		counts = append(counts, "cachedContentTokenCount", u.cached)
	}
	if u.reasoning > 0 {
		counts = append(counts, "thoughtsTokenCount", u.reasoning)
	}
	id := c.p.newID("")
	answer := func(part obj, finish any) obj {
		candidate := obj{"content", obj{"parts", []any{part}, "role", "model"}, "index", 0}
		if finish != nil {
			candidate = append(candidate, "finishReason", finish)
		}
		return obj{"candidates", []any{candidate}, "usageMetadata", counts, "modelVersion", c.body.Model,
			"responseId", id}
	}
	finish, part := "STOP", obj{"text", a.text}
	switch {
	case a.toolName != "":
		part = obj{"functionCall", obj{"name", a.toolName, "args", json.RawMessage(a.toolArgs)}}
	case a.truncated:
		finish = "MAX_TOKENS"
	}
	if !stream {
		c.replyJSON(a.outputTokens, answer(part, finish))
		return
	}
	c.beginStream()
	if a.toolName == "" {
		c.sendPaced(splitWords(a.text), func(word string) { c.sendEvent("", answer(obj{"text", word}, nil)) })
		part = obj{"text", ""}
	}
	c.sendEvent("", answer(part, finish))
}

// geminiStatus returns the name that Gemini's API has for a status.
func geminiStatus(status int) string {
	switch {
	case status == http.StatusUnauthorized:
		return "UNAUTHENTICATED"
	case status == http.StatusForbidden:
		return "PERMISSION_DENIED"
	case status == http.StatusNotFound:
		return "NOT_FOUND"
	case status == http.StatusTooManyRequests:
		return "RESOURCE_EXHAUSTED"
	case status == http.StatusServiceUnavailable:
		return "UNAVAILABLE"
	case status >= 500:
		return "INTERNAL"
	}
	return "INVALID_ARGUMENT"
}
