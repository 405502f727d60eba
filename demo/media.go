// This file answers the other endpoints: models, embeddings, moderations, images and speech. It
// makes their content from the call alone, so that the same call gets the same answer.
package demo

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"image"
	"image/color"
	"image/png"
	"math"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// models answers GET /v1/models in the format of the caller's API.
func (c *call) models() {
	names, list := modelNames(c.anthropic), []any{}
	for _, name := range names {
		list = append(list, modelObject(name, c.anthropic))
	}
	if c.anthropic {
		c.replyJSON(0, obj{"data", list, "has_more", false, "first_id", names[0], "last_id", names[len(names)-1]})
		return
	}
	c.replyJSON(0, obj{"object", "list", "data", list})
}

// model answers GET /v1/models/{id}. Every model exists except no-such-model.
func (c *call) model(id string) {
	if id == unknownModel {
		c.failUnknownModel()
		return
	}
	c.replyJSON(0, modelObject(id, c.anthropic))
}

func modelNames(anthropic bool) []string {
	if anthropic {
		return []string{"claude-opus-5", "claude-sonnet-5", "claude-haiku-4-5"}
	}
	return []string{"gpt-4o", "gpt-4o-mini", "gpt-4.1", "gpt-4.1-mini", "gpt-5", "gpt-5-mini", "o3", "o4-mini",
		"gpt-3.5-turbo-instruct", "text-embedding-3-small", "text-embedding-3-large", "omni-moderation-latest",
		"gpt-image-1", "gpt-4o-mini-tts", "gpt-4o-mini-transcribe", "whisper-1"}
}

func modelObject(name string, anthropic bool) obj {
	if anthropic {
		return obj{"type", "model", "id", name, "display_name", name, "created_at", "2025-09-29T00:00:00Z"}
	}
	return obj{"id", name, "object", "model", "created", 1745000000, "owned_by", "system"}
}

// embeddings answers POST /v1/embeddings. The input is a text, a list of texts, a list of tokens or
// a list of such lists; the answer has numbers or base64.
func (c *call) embeddings() {
	inputs := inputList(c.body.Input)
	native := 1536
	if strings.HasSuffix(c.body.Model, "-large") {
		native = 3072
	}
	dims := c.body.Dimensions
	if dims == 0 {
		dims = native
	}
	if dims < 1 || dims > native {
		c.fail(http.StatusBadRequest, "", "'dimensions' must be from 1 to "+strconv.Itoa(native))
		return
	}
	if len(inputs) == 0 || len(inputs) > 2048 {
		c.fail(http.StatusBadRequest, "", "'input' must be from 1 to 2048 texts or lists of tokens")
		return
	}
	data, tokens := []any{}, 0
	for i, input := range inputs {
		text := textOf(input)
		tokens += countTokens(len(text))
		v := embeddingVector(c.body.Model, text, dims)
		embedding := any(v)
		if c.body.EncodingFormat == "base64" {
			b, _ := binary.Append(nil, binary.LittleEndian, v) // float32s of fixed size
			embedding = base64.StdEncoding.EncodeToString(b)
		}
		data = append(data, obj{"object", "embedding", "index", i, "embedding", embedding})
	}
	c.replyJSON(0, obj{"object", "list", "data", data, "model", c.body.Model,
		"usage", obj{"prompt_tokens", tokens, "total_tokens", tokens}})
}

// inputList returns a request's input as a list: a single text or a list of tokens is one input.
func inputList(v any) []any {
	list, ok := v.([]any)
	if v == nil || ok && len(list) == 0 {
		return nil
	}
	if !ok {
		return []any{v}
	}
	if _, tokens := list[0].(float64); tokens {
		return []any{list}
	}
	return list
}

// moderations answers POST /v1/moderations: it flags every input that mentions violence.
func (c *call) moderations() {
	inputs := inputList(c.body.Input)
	if len(inputs) > 0 {
		if _, parts := inputs[0].(map[string]any); parts { // the text and images of one input
			inputs = []any{inputs}
		}
	}
	results := []any{}
	for _, input := range inputs {
		violent := strings.Contains(strings.ToLower(textOf(input)), "violence")
		categories, scores, types := obj{}, obj{}, obj{}
		for _, name := range []string{"harassment", "harassment/threatening", "hate", "hate/threatening", "illicit",
			"illicit/violent", "self-harm", "self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors",
			"violence", "violence/graphic"} {
			flag, score, kinds := name == "violence" && violent, 0.00002, []string{}
			if flag {
				score, kinds = 0.87, []string{"text"}
			}
			categories = append(categories, name, flag)
			scores = append(scores, name, score)
			types = append(types, name, kinds)
		}
		results = append(results, obj{"flagged", violent, "categories", categories, "category_scores", scores,
			"category_applied_input_types", types})
	}
	c.replyJSON(0, obj{"id", c.p.newID("modr-"), "model", c.body.Model, "results", results})
}

// images answers POST /v1/images/generations with n small PNGs.
func (c *call) images() {
	n := max(c.body.N, 1)
	data := []any{}
	for i := range n {
		image, err := imagePNG(c.body.prompt, i)
		if err != nil {
			c.fail(http.StatusInternalServerError, "", "The demo provider could not draw.")
			return
		}
		data = append(data, obj{"b64_json", base64.StdEncoding.EncodeToString(image)})
	}
	in, out := countTokens(len(c.body.prompt)), 272*n
	c.replyJSON(40, obj{"created", time.Now().Unix(), "background", "opaque", "data", data, "output_format", "png",
		"quality", "low", "size", "1024x1024", "usage", obj{"input_tokens", in,
			"input_tokens_details", obj{"image_tokens", 0, "text_tokens", in}, "output_tokens", out,
			"output_tokens_details", obj{"image_tokens", out, "text_tokens", 0}, "total_tokens", in + out}})
}

// speech answers POST /v1/audio/speech with a short WAV file, or with its chunks if stream_format
// is "sse".
func (c *call) speech() {
	sound := soundWAV(c.body.prompt)
	if c.body.StreamFormat != "sse" {
		c.replyBytes(10, "audio/wav", sound)
		return
	}
	var chunks []string
	for ; len(sound) > 0; sound = sound[min(900, len(sound)):] {
		chunks = append(chunks, string(sound[:min(900, len(sound))]))
	}
	in, out := countTokens(len(c.body.prompt)), 10
	c.beginStream()
	c.sendPaced(chunks, func(chunk string) {
		c.sendEvent("", obj{"type", "speech.audio.delta", "audio", base64.StdEncoding.EncodeToString([]byte(chunk))})
	})
	c.sendEvent("", obj{"type", "speech.audio.done", "usage",
		obj{"input_tokens", in, "output_tokens", out, "total_tokens", in + out}})
}

// transcriptions answers POST /v1/audio/transcriptions and /translations. The size of the upload
// determines the text.
func (c *call) transcriptions() {
	if c.audioBytes == 0 {
		c.fail(http.StatusBadRequest, "", "Missing required parameter: 'file'.")
		return
	}
	lines := strings.Split(railways, "\n")
	text := lines[c.audioBytes%int64(len(lines))]
	seconds := 1 + c.audioBytes/32000 // 16 kHz, 16 bit
	in, out := countTokens(len(c.body.prompt)), countTokens(len(text))
	audioTokens := int(10 * seconds)
	usage := obj{"type", "tokens", "input_tokens", in + audioTokens,
		"input_token_details", obj{"text_tokens", in, "audio_tokens", audioTokens},
		"output_tokens", out, "total_tokens", in + audioTokens + out}
	if c.body.Model == "whisper-1" {
		usage = obj{"type", "duration", "seconds", seconds}
	}
	words := splitWords(text)
	switch {
	case c.body.Stream && c.body.Model != "whisper-1": // whisper-1 ignores stream
		c.beginStream()
		c.sendPaced(words, func(word string) { c.sendEvent("", obj{"type", "transcript.text.delta", "delta", word}) })
		c.sendEvent("", obj{"type", "transcript.text.done", "text", text, "usage", usage})
	case c.body.ResponseFormat == "text":
		c.replyBytes(len(words), "text/plain; charset=utf-8", []byte(text+"\n"))
	case c.body.ResponseFormat == "verbose_json":
		c.replyJSON(len(words), obj{"task", "transcribe", "language", "english", "duration", float64(seconds),
			"text", text, "segments", []any{}, "usage", usage})
	default:
		c.replyJSON(len(words), obj{"text", text, "usage", usage})
	}
}

// embeddingVector returns a text's embedding, of length 1. With fewer dimensions it is the start of
// the longer one, rescaled.
func embeddingVector(model, text string, dims int) []float32 {
	rng := rand.New(rand.NewPCG(hash(model, text), 2))
	v := make([]float64, dims)
	sum := 0.0
	for i := range v {
		v[i] = rng.NormFloat64()
		sum += v[i] * v[i]
	}
	out := make([]float32, dims)
	for i := range v {
		out[i] = float32(v[i] / math.Sqrt(sum))
	}
	return out
}

// imagePNG returns a small PNG. The prompt determines its colours.
func imagePNG(prompt string, i int) ([]byte, error) {
	h := hash(prompt, strconv.Itoa(i))
	img := image.NewRGBA(image.Rect(0, 0, 64, 64))
	for y := range 64 {
		for x := range 64 {
			img.Set(x, y, color.RGBA{uint8(h) + uint8(3*x), uint8(h>>8) + uint8(3*y), uint8(h >> 16), 255})
		}
	}
	var b bytes.Buffer
	err := png.Encode(&b, img)
	return b.Bytes(), err
}

// soundWAV returns a WAV file: half a second of a quiet tone, 8 kHz, 8 bit, mono.
func soundWAV(text string) []byte {
	const rate, n = 8000, 4000
	hertz := 220 + float64(hash(text)%220)
	b := []byte("RIFF")
	b = binary.LittleEndian.AppendUint32(b, 36+n)
	b = append(b, "WAVEfmt "...)
	for _, v := range []uint32{16, 1 | 1<<16, rate, rate, 1 | 8<<16} { // PCM, one channel, a byte a sample
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	b = append(b, "data"...)
	b = binary.LittleEndian.AppendUint32(b, n)
	for i := range n {
		b = append(b, byte(128+40*math.Sin(2*math.Pi*hertz*float64(i)/rate)))
	}
	return b
}
