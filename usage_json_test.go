// usage_json_test.go holds the JSON reader to encoding/json on generated documents, and to its speed.
package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// jsonDocument writes random JSON values made of what could fool a reader that looks for text.
type jsonDocument struct {
	*rand.Rand
	b strings.Builder
}

func (d *jsonDocument) space() { d.b.WriteString([]string{"", "", "", " ", "\n\t", "\r\n"}[d.IntN(6)]) }

func (d *jsonDocument) name() string {
	return []string{"usage", "model", "type", "error", "choices", "prompt_tokens", "input_tokens", "completion_tokens",
		"output_tokens", "prompt_tokens_details", "cached_tokens", "response", "message", "Usage", "MODEL", "x", "",
		`usage\\`, `\"usage\":{`, `mod\u0065l\n`, "seconds"}[d.IntN(21)]
}

func (d *jsonDocument) value(depth int) {
	d.space()
	defer d.space()
	switch n := d.IntN(10); {
	case n < 2 && depth > 0, depth > 4:
		d.object(depth, nil)
	case n < 3 && depth > 0:
		d.b.WriteByte('[')
		for i := range d.IntN(4) {
			if i > 0 {
				d.b.WriteByte(',')
			}
			d.value(depth - 1)
		}
		d.b.WriteByte(']')
	case n < 6:
		d.b.WriteString([]string{"0", "7", "-1", "1.5", "1e3", "null", "true", "false", "12345678901234567890"}[d.IntN(9)])
	default:
		d.b.WriteByte('"')
		for range d.IntN(4) {
			d.b.WriteString([]string{"a", `\\`, `\"`, `{`, `}`, `[`, `]`, `\"usage\":{\"prompt_tokens\":1}`, "é", `\u0041`,
				`\ud83c\udf89`, ",", ":", `\n\ndata: [DONE]\n\n`, `\/`}[d.IntN(15)])
		}
		d.b.WriteByte('"')
	}
}

// object writes an object whose names are all different.
func (d *jsonDocument) object(depth int, first []string) {
	d.b.WriteByte('{')
	used := map[string]bool{}
	names := first
	for range d.IntN(5) {
		names = append(names, d.name())
	}
	d.Shuffle(len(names), func(i, k int) { names[i], names[k] = names[k], names[i] })
	for _, name := range names {
		if used[name] {
			continue
		}
		if len(used) > 0 {
			d.b.WriteByte(',')
		}
		used[name] = true
		d.space()
		d.b.WriteString(`"` + name + `"`)
		d.space()
		d.b.WriteByte(':')
		if name == "usage" && depth > 1 && d.IntN(3) > 0 {
			d.space()
			d.object(depth-1, []string{"prompt_tokens", "completion_tokens"})
			continue
		}
		d.value(depth - 1)
	}
	d.space()
	d.b.WriteByte('}')
}

func TestScanAgreesWithEncodingJSON(t *testing.T) {
	t.Parallel()
	d := &jsonDocument{Rand: rand.New(rand.NewPCG(5, 6))}
	seen := 0
	for range 20_000 {
		d.b.Reset()
		d.object(4, []string{"usage", "model"})
		text := d.b.String()
		var top map[string]json.RawMessage
		if err := json.Unmarshal([]byte(text), &top); err != nil {
			t.Fatalf("%v in %s", err, text)
		}
		var s jsonScan
		s.reset(false)
		for p := []byte(text); len(p) > 0; {
			n := 1 + d.IntN(len(p))
			s.feed(p[:n])
			p = p[n:]
		}
		if s.state != scanClosed {
			t.Fatalf("not closed: %s", text)
		}
		var usage map[string]json.RawMessage
		isObject := strings.HasPrefix(string(top["usage"]), "{") && json.Unmarshal(top["usage"], &usage) == nil
		if s.usageSeen != isObject {
			t.Fatalf("usage seen: %v, want %v in %s", s.usageSeen, isObject, text)
		}
		var model string
		_ = json.Unmarshal(top["model"], &model) // a model that is no string is none
		if strings.ContainsAny(model, "\n") {
			model = ""
		}
		if s.model != model {
			t.Fatalf("model %q, want %q in %s", s.model, model, text)
		}
		if !isObject {
			continue
		}
		seen++
		for sl, names := range map[slot][]string{slotInput: {"prompt_tokens", "input_tokens"}, slotOutput: {"completion_tokens", "output_tokens"}} {
			want := int64(-1)
			for _, name := range names {
				var n uint64
				if json.Unmarshal(usage[name], &n) == nil && string(usage[name]) != "null" {
					want = max(want, int64(min(n, maxCount)))
				}
			}
			if got := max(s.usage.n[sl], -1); got != want {
				t.Fatalf("%v = %d, want %d in %s", names, got, want, text)
			}
		}
	}
	if seen < 5000 {
		t.Errorf("only %d documents had usage", seen)
	}
}

func TestModelNames(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ raw, want string }{
		{`gpt-4o`, "gpt-4o"},
		{`openai\/gpt-4o`, "openai/gpt-4o"},
		{`modèle`, "modèle"},
		{`mod\u00e8le`, "modèle"},
		{``, ""},
		{"a\nb", ""},
		{`a\nb`, ""},
		{`a\u0000b`, ""},
		{"a\x7fb", ""},
		{"a\u0085b", ""},
		{"a\xffb", ""},
		{`a\qb`, ""},
		{strings.Repeat("m", 256), strings.Repeat("m", 256)},
		{strings.Repeat("m", 257), ""},
		{strings.Repeat("m", 100_000), ""},
	} {
		for _, size := range []int{1, 5, 1 << 30} {
			m := newMeter(meterOpenAI, false, false, false)
			runMeter(m, []byte(`{"model":"`+c.raw+`"}`), func() int { return size })
			if m.model != c.want || !m.done {
				t.Errorf("%.40q in pieces of %d: model %.40q, done %v", c.raw, size, m.model, m.done)
			}
		}
	}
}

// TestMeterMemory: a unary call costs two allocations at most, and an answer of any size no more (BO10).
func TestMeterMemory(t *testing.T) {
	body := []byte(madeAnswer(700))
	if n := testing.AllocsPerRun(100, func() {
		m := newMeter(meterOpenAI, false, false, false)
		m.pass(body)
		m.end()
	}); n > 2 {
		t.Errorf("a unary call costs %v allocations", n)
	}
	event := []byte(chatEvent)
	m := newMeter(meterOpenAI, true, false, true)
	m.pass(event)
	if n := testing.AllocsPerRun(100, func() { m.pass(event) }); n > 0 {
		t.Errorf("an event costs %v allocations", n)
	}
	u := newMeter(meterOpenAI, false, false, false)
	big := []byte(strings.Repeat(`[0.0123,"text \" text",{"usage":{}}],`, 1000))
	u.pass([]byte(`{"data":[`))
	if n := testing.AllocsPerRun(100, func() { u.pass(big) }); n > 0 {
		t.Errorf("a piece of a large answer costs %v allocations", n)
	}
}

const chatEvent = `data: {"id":"chatcmpl-9lM","object":"chat.completion.chunk","created":1741570283,"model":"gpt-4o-2024-08-06","service_tier":"default","system_fingerprint":"fp_50cad350e4","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}],"usage":null}` + "\n\n"

func madeAnswer(text int) string {
	return fmt.Sprintf(`{"id":"chatcmpl-B9MBs8Cj","object":"chat.completion","created":1741569952,"model":"gpt-4o-2024-08-06","choices":[{"index":0,"message":{"role":"assistant","content":"%s","refusal":null,"annotations":[]},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}},"service_tier":"default","system_fingerprint":"fp_fc9f1d7035"}`,
		strings.Repeat(`words and \"words\",\n`, text/20))
}

func BenchmarkMeterUnary(b *testing.B) {
	numbers := strings.Repeat("0.0023064255,-0.009327292,", 768*20)
	for _, c := range []struct{ name, body string }{
		{"chat-1KB", madeAnswer(400)},
		{"chat-100KB", madeAnswer(100_000)},
		{"embeddings-400KB", `{"object":"list","data":[{"embedding":[` + numbers + `0]}],"model":"m","usage":{"prompt_tokens":8,"total_tokens":8}}`},
		{"base64-1MB", `{"data":[{"b64_json":"` + strings.Repeat("iVBORw0KGgo/", 87_000) + `"}],"usage":{"input_tokens":50,"output_tokens":50}}`},
	} {
		body := []byte(c.body)
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				m := newMeter(meterOpenAI, false, false, false)
				for p := body; len(p) > 0; {
					n := min(len(p), 32<<10)
					m.pass(p[:n])
					p = p[n:]
				}
				if m.source() != usageExact {
					b.Fatal(m.source())
				}
			}
		})
	}
}

func BenchmarkMeterEvent(b *testing.B) {
	for _, c := range []struct {
		name, event string
		kind        meterKind
		strip       bool
	}{
		{"chat", chatEvent, meterOpenAI, false},
		{"chat-strip", chatEvent, meterOpenAI, true},
		{"responses", "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"sequence_number\":4,\"item_id\":\"msg_67c9fdcf37fc8190ba82116e33fb28c507b8b0ad4e5eb654\",\"output_index\":0,\"content_index\":0,\"delta\":\" word\",\"logprobs\":[],\"obfuscation\":\"Yzk\"}\n\n", meterOpenAI, false},
		{"anthropic", "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\" word\"}}\n\n", meterAnthropic, false},
	} {
		event := []byte(c.event)
		b.Run(c.name, func(b *testing.B) {
			m := newMeter(c.kind, true, false, c.strip)
			m.pass([]byte("data: {\"model\":\"m\",\"message\":{\"model\":\"m\"}}\n\n"))
			b.SetBytes(int64(len(event)))
			b.ReportAllocs()
			for b.Loop() {
				m.pass(event)
			}
		})
	}
}
