// What a person pastes to use a new token: the same call with curl and in three
// languages, in the API that the token's project speaks.
package main

import "strings"

// fillIn puts the token, the base URL and a model into a text.
func (v onceView) fillIn(openai, anthropic string) string {
	text := openai
	if v.Anthropic {
		text = anthropic
	}
	return strings.NewReplacer("BASE", v.Base, "TOKEN", v.Value, "MODEL", v.Model).Replace(strings.TrimPrefix(text, "\n"))
}

func curlSnippet(v onceView) string {
	return v.fillIn(`
curl BASE/v1/chat/completions \
  -H "Authorization: Bearer TOKEN" \
  -H "Content-Type: application/json" \
  -d '{"model":"MODEL","messages":[{"role":"user","content":"Hello"}]}'
`, `
curl BASE/v1/messages \
  -H "x-api-key: TOKEN" -H "anthropic-version: 2023-06-01" \
  -H "Content-Type: application/json" \
  -d '{"model":"MODEL","max_tokens":200,"messages":[{"role":"user","content":"Hello"}]}'
`)
}

func pythonSnippet(v onceView) string {
	return v.fillIn(`
from openai import OpenAI

client = OpenAI(base_url="BASE/v1", api_key="TOKEN")
answer = client.chat.completions.create(
    model="MODEL", messages=[{"role": "user", "content": "Hello"}]
)
print(answer.choices[0].message.content)
`, `
from anthropic import Anthropic

client = Anthropic(base_url="BASE", api_key="TOKEN")
answer = client.messages.create(
    model="MODEL", max_tokens=200, messages=[{"role": "user", "content": "Hello"}]
)
print(answer.content[0].text)
`)
}

func nodeSnippet(v onceView) string {
	return v.fillIn(`
import OpenAI from "openai";

const client = new OpenAI({ baseURL: "BASE/v1", apiKey: "TOKEN" });
const answer = await client.chat.completions.create({
  model: "MODEL", messages: [{ role: "user", content: "Hello" }],
});
console.log(answer.choices[0].message.content);
`, `
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: "BASE", apiKey: "TOKEN" });
const answer = await client.messages.create({
  model: "MODEL", max_tokens: 200, messages: [{ role: "user", content: "Hello" }],
});
console.log(answer.content[0].text);
`)
}

func goSnippet(v onceView) string {
	return v.fillIn(`
client := openai.NewClient(option.WithBaseURL("BASE/v1"), option.WithAPIKey("TOKEN"))
answer, err := client.Chat.Completions.New(ctx, openai.ChatCompletionNewParams{
	Model:    "MODEL",
	Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Hello")},
})
`, `
client := anthropic.NewClient(option.WithBaseURL("BASE"), option.WithAPIKey("TOKEN"))
answer, err := client.Messages.New(ctx, anthropic.MessageNewParams{
	Model:     "MODEL",
	MaxTokens: 200,
	Messages:  []anthropic.MessageParam{anthropic.NewUserMessage(anthropic.NewTextBlock("Hello"))},
})
`)
}
