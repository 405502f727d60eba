// This file holds the default answers of the scripted provider.
package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"strings"
)

const (
	usageJSON = `{"prompt_tokens":11,"completion_tokens":3,"total_tokens":14}`
	toolCall  = `"id":"call_1","type":"function","function":{"name":"forecast","arguments":`
)

var (
	words  = []string{"Hello", ", ", "wörld"}
	speech = bytes.Repeat([]byte{0, 255, 10, 13, 128, 7}, 20000)
)

func faithful(w http.ResponseWriter, r *recorded) {
	if r.header.Get("Authorization") != "Bearer "+providerKey {
		reply(w, 401, `{"error":{"message":"Incorrect API key provided.","type":"invalid_request_error","param":null,"code":"invalid_api_key"}}`)
		return
	}
	switch path := strings.TrimPrefix(r.target, "/v1/"); {
	case path == "chat/completions":
		chat(w, r)
	case path == "responses":
		responsesStream(w)
	case path == "embeddings":
		reply(w, 200, `{"object":"list","model":"m","data":[{"object":"embedding","index":0,"embedding":[0.25,-0.5,1e-7]}],"usage":{"prompt_tokens":2,"total_tokens":2}}`)
	case path == "audio/speech":
		w.Header().Set("Content-Type", "audio/mpeg")
		_, _ = w.Write(speech)
	case path == "audio/transcriptions":
		transcription(w, r)
	case strings.HasPrefix(path, "models/"):
		reply(w, 200, fmt.Sprintf(`{"id":%q,"object":"model","created":1764000000,"owned_by":"provider"}`, strings.TrimPrefix(path, "models/")))
	default:
		reply(w, 404, `{"error":{"message":"Invalid URL","type":"invalid_request_error","param":null,"code":null}}`)
	}
}

func chunk(delta, finish string) string {
	return `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1764000000,"model":"gpt-4o-mini",` +
		`"choices":[{"index":0,"delta":` + delta + `,"finish_reason":` + finish + `}]}`
}

func chat(w http.ResponseWriter, r *recorded) {
	var body struct {
		Stream        bool
		Tools         []any
		StreamOptions struct {
			IncludeUsage bool `json:"include_usage"`
		} `json:"stream_options"`
	}
	if err := json.Unmarshal(r.body, &body); err != nil {
		reply(w, 400, `{"error":{"message":"not JSON","type":"invalid_request_error","param":null,"code":null}}`)
		return
	}
	if !body.Stream {
		message, finish := `"content":"`+strings.Join(words, "")+`"`, "stop"
		if body.Tools != nil {
			message, finish = `"content":null,"tool_calls":[{`+toolCall+`"{\"city\":\"Oslo\"}"}}]`, "tool_calls"
		}
		reply(w, 200, `{"id":"chatcmpl-1","object":"chat.completion","created":1764000000,"model":"gpt-4o-mini","choices":[{"index":0,"message":{"role":"assistant",`+
			message+`},"finish_reason":"`+finish+`"}],"usage":`+usageJSON+`}`)
		return
	}
	list := []string{chunk(`{"role":"assistant","content":""}`, "null")}
	if body.Tools != nil {
		list = append(list, chunk(`{"tool_calls":[{"index":0,`+toolCall+`""}}]}`, "null"))
		for _, piece := range []string{`{\"city\":`, `\"Oslo\"}`} {
			list = append(list, chunk(`{"tool_calls":[{"index":0,"function":{"arguments":"`+piece+`"}}]}`, "null"))
		}
		list = append(list, chunk(`{}`, `"tool_calls"`))
	} else {
		for _, word := range words {
			list = append(list, chunk(`{"content":"`+word+`"}`, "null"))
		}
		list = append(list, chunk(`{}`, `"stop"`))
	}
	if body.StreamOptions.IncludeUsage {
		list = append(list, `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1764000000,"model":"gpt-4o-mini","choices":[],"usage":`+usageJSON+`}`)
	}
	events(w, append(list, "data: [DONE]")...)
}

func responsesStream(w http.ResponseWriter) {
	event := func(kind, rest string) string {
		return "event: " + kind + "\ndata: {\"type\":\"" + kind + `",` + rest + "}"
	}
	response := func(status string) string {
		return `"response":{"id":"resp_1","object":"response","created_at":1764000000,"status":"` + status + `","model":"gpt-4o-mini","output":[],` +
			`"usage":{"input_tokens":11,"output_tokens":3,"total_tokens":14}}`
	}
	list := []string{event("response.created", response("in_progress"))}
	for _, word := range words {
		list = append(list, event("response.output_text.delta", `"item_id":"msg_1","output_index":0,"content_index":0,"delta":"`+word+`"`))
	}
	events(w, append(list, event("response.completed", response("completed")))...)
}

// transcription describes the upload that arrived, so that a test can check that it is complete.
func transcription(w http.ResponseWriter, r *recorded) {
	_, params, err := mime.ParseMediaType(r.header.Get("Content-Type"))
	if err != nil {
		reply(w, 400, `{"error":{"message":"not a form","type":"invalid_request_error","param":null,"code":null}}`)
		return
	}
	form := multipart.NewReader(bytes.NewReader(r.body), params["boundary"])
	got := map[string]string{}
	for part, err := form.NextPart(); err == nil; part, err = form.NextPart() {
		b, _ := io.ReadAll(part)
		if got[part.FormName()] = string(b); part.FormName() == "file" {
			got["file"] = fmt.Sprintf("%s %d %t", part.FileName(), len(b), bytes.Equal(b, speech))
		}
	}
	reply(w, 200, fmt.Sprintf(`{"text":%q}`, got["file"]+" "+got["model"]))
}
