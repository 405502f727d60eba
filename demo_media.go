// This room holds the demo provider's answers that are no conversation: models, embeddings, moderations, pictures and
// speech, and the small deterministic inventions behind them. It reads nothing but the call, and keeps nothing.
package main

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

// models answers GET /v1/models in the dialect of the caller.
func (c *demoCall) models() {
	names, list := demoModelNames(c.anthropic), []any{}
	for _, name := range names {
		list = append(list, demoModel(name, c.anthropic))
	}
	if c.anthropic {
		c.replyJSON(0, demoJSON{"data", list, "has_more", false, "first_id", names[0], "last_id", names[len(names)-1]})
		return
	}
	c.replyJSON(0, demoJSON{"object", "list", "data", list})
}

// model answers GET /v1/models/{id}; every model exists but no-such-model.
func (c *demoCall) model(id string) {
	if id == demoUnknownModel {
		c.failUnknownModel()
		return
	}
	c.replyJSON(0, demoModel(id, c.anthropic))
}

func demoModelNames(anthropic bool) []string {
	if anthropic {
		return []string{"claude-opus-5", "claude-sonnet-5", "claude-haiku-4-5"}
	}
	return []string{"gpt-4o", "gpt-4o-mini", "gpt-4.1", "gpt-4.1-mini", "gpt-5", "gpt-5-mini", "o3", "o4-mini",
		"gpt-3.5-turbo-instruct", "text-embedding-3-small", "text-embedding-3-large", "omni-moderation-latest",
		"gpt-image-1", "gpt-4o-mini-tts", "gpt-4o-mini-transcribe", "whisper-1"}
}

func demoModel(name string, anthropic bool) demoJSON {
	if anthropic {
		return demoJSON{"type", "model", "id", name, "display_name", name, "created_at", "2025-09-29T00:00:00Z"}
	}
	return demoJSON{"id", name, "object", "model", "created", 1745000000, "owned_by", "system"}
}

// embeddings answers POST /v1/embeddings: a text, texts, token numbers or lists of them; as numbers or base64.
func (c *demoCall) embeddings() {
	inputs := demoInputs(c.body.Input)
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
		text := demoText(input)
		tokens += demoTokenCount(len(text))
		v := demoVector(c.body.Model, text, dims)
		embedding := any(v)
		if c.body.EncodingFormat == "base64" {
			b, _ := binary.Append(nil, binary.LittleEndian, v) // float32s of fixed size
			embedding = base64.StdEncoding.EncodeToString(b)
		}
		data = append(data, demoJSON{"object", "embedding", "index", i, "embedding", embedding})
	}
	c.replyJSON(0, demoJSON{"object", "list", "data", data, "model", c.body.Model,
		"usage", demoJSON{"prompt_tokens", tokens, "total_tokens", tokens}})
}

// demoInputs is a request's input as a list: a single text or list of token numbers is one input.
func demoInputs(v any) []any {
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

// moderations answers POST /v1/moderations: whatever mentions violence is flagged.
func (c *demoCall) moderations() {
	inputs := demoInputs(c.body.Input)
	if len(inputs) > 0 {
		if _, parts := inputs[0].(map[string]any); parts { // text and pictures of one input
			inputs = []any{inputs}
		}
	}
	results := []any{}
	for _, input := range inputs {
		violent := strings.Contains(strings.ToLower(demoText(input)), "violence")
		categories, scores, types := demoJSON{}, demoJSON{}, demoJSON{}
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
		results = append(results, demoJSON{"flagged", violent, "categories", categories, "category_scores", scores,
			"category_applied_input_types", types})
	}
	c.replyJSON(0, demoJSON{"id", c.p.newID("modr-"), "model", c.body.Model, "results", results})
}

// images answers POST /v1/images/generations with n small PNGs.
func (c *demoCall) images() {
	n := max(c.body.N, 1)
	data := []any{}
	for i := range n {
		picture, err := demoPicture(c.body.prompt, i)
		if err != nil {
			c.fail(http.StatusInternalServerError, "", "The demo provider could not draw.")
			return
		}
		data = append(data, demoJSON{"b64_json", base64.StdEncoding.EncodeToString(picture)})
	}
	in, out := demoTokenCount(len(c.body.prompt)), 272*n
	c.replyJSON(40, demoJSON{"created", time.Now().Unix(), "background", "opaque", "data", data, "output_format", "png",
		"quality", "low", "size", "1024x1024", "usage", demoJSON{"input_tokens", in,
			"input_tokens_details", demoJSON{"image_tokens", 0, "text_tokens", in}, "output_tokens", out,
			"output_tokens_details", demoJSON{"image_tokens", out, "text_tokens", 0}, "total_tokens", in + out}})
}

// speech answers POST /v1/audio/speech with a short WAV, or its pieces when stream_format is "sse".
func (c *demoCall) speech() {
	sound := demoSound(c.body.prompt)
	if c.body.StreamFormat != "sse" {
		c.replyBytes(10, "audio/wav", sound)
		return
	}
	var chunks []string
	for ; len(sound) > 0; sound = sound[min(900, len(sound)):] {
		chunks = append(chunks, string(sound[:min(900, len(sound))]))
	}
	in, out := demoTokenCount(len(c.body.prompt)), 10
	c.beginStream()
	c.sendPaced(chunks, func(chunk string) {
		c.sendEvent("", demoJSON{"type", "speech.audio.delta", "audio", base64.StdEncoding.EncodeToString([]byte(chunk))})
	})
	c.sendEvent("", demoJSON{"type", "speech.audio.done", "usage",
		demoJSON{"input_tokens", in, "output_tokens", out, "total_tokens", in + out}})
}

// transcriptions answers POST /v1/audio/transcriptions and /translations: what the upload "says" follows from its size.
func (c *demoCall) transcriptions() {
	if c.audioBytes == 0 {
		c.fail(http.StatusBadRequest, "", "Missing required parameter: 'file'.")
		return
	}
	lines := strings.Split(demoRailways, "\n")
	text := lines[c.audioBytes%int64(len(lines))]
	seconds := 1 + c.audioBytes/32000 // 16 kHz, 16 bit
	in, out := demoTokenCount(len(c.body.prompt)), demoTokenCount(len(text))
	heard := int(10 * seconds)
	usage := demoJSON{"type", "tokens", "input_tokens", in + heard,
		"input_token_details", demoJSON{"text_tokens", in, "audio_tokens", heard},
		"output_tokens", out, "total_tokens", in + heard + out}
	if c.body.Model == "whisper-1" {
		usage = demoJSON{"type", "duration", "seconds", seconds}
	}
	words := demoWords(text)
	switch {
	case c.body.Stream && c.body.Model != "whisper-1": // which ignores stream
		c.beginStream()
		c.sendPaced(words, func(word string) { c.sendEvent("", demoJSON{"type", "transcript.text.delta", "delta", word}) })
		c.sendEvent("", demoJSON{"type", "transcript.text.done", "text", text, "usage", usage})
	case c.body.ResponseFormat == "text":
		c.replyBytes(len(words), "text/plain; charset=utf-8", []byte(text+"\n"))
	case c.body.ResponseFormat == "verbose_json":
		c.replyJSON(len(words), demoJSON{"task", "transcribe", "language", "english", "duration", float64(seconds),
			"text", text, "segments", []any{}, "usage", usage})
	default:
		c.replyJSON(len(words), demoJSON{"text", text, "usage", usage})
	}
}

// demoVector is a text's embedding: of length 1, and with fewer dimensions the start of the longer one, scaled again.
func demoVector(model, text string, dims int) []float32 {
	rng := rand.New(rand.NewPCG(demoHash(model, text), 2))
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

// demoPicture is a small PNG whose colours follow from the prompt.
func demoPicture(prompt string, i int) ([]byte, error) {
	h := demoHash(prompt, strconv.Itoa(i))
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

// demoSound is a WAV file: half a second of a quiet tone, 8 kHz, 8 bit, mono.
func demoSound(text string) []byte {
	const rate, n = 8000, 4000
	hertz := 220 + float64(demoHash(text)%220)
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
