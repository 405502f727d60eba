// These tests check the meter against golden transcripts of the real APIs (testdata/usage, one case per
// file), against answers that try to mislead it, and against one law: how an answer is cut into pieces
// changes nothing.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A usageCase is one file of testdata/usage: the arguments of newMeter and the expected result, a line with
// --, the answer.
type usageCase struct {
	name, kind, usage, model, end, events, cost string
	body                                        []byte
}

func usageCases(t testing.TB) []usageCase {
	t.Helper()
	files, err := filepath.Glob("testdata/usage/*.txt")
	if err != nil || len(files) < 20 {
		t.Fatalf("testdata/usage has %d files, %v", len(files), err)
	}
	var all []usageCase
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		head, body, found := bytes.Cut(raw, []byte("\n--\n"))
		if !found {
			t.Fatalf("%s has no line --", file)
		}
		g := usageCase{name: strings.TrimSuffix(filepath.Base(file), ".txt"), body: body}
		to := map[string]*string{"answer": &g.kind, "usage": &g.usage, "model": &g.model, "end": &g.end, "events": &g.events,
			"cost": &g.cost}
		for line := range strings.Lines(string(head)) {
			name, value, _ := strings.Cut(line, ":")
			if to[name] == nil {
				t.Fatalf("%s: unknown line %q", file, line)
			}
			*to[name] = strings.TrimSpace(value)
		}
		all = append(all, g)
	}
	return all
}

func (g usageCase) meter(strip bool) *meter {
	api, format, _ := strings.Cut(g.kind, " ")
	kind := map[string]meterKind{"openai": meterOpenAI, "anthropic": meterAnthropic, "embeddings": meterEmbeddings,
		"gemini": meterGemini, "transcripts": meterTranscripts, "media": meterMedia}[api]
	return newMeter(kind, format == "sse", false, strip)
}

// runMeter feeds body in pieces whose sizes next returns, and returns the bytes that a client gets. It
// overwrites each piece afterwards, so that a meter that keeps a reference is found out.
func runMeter(m *meter, body []byte, next func() int) []byte {
	var out []byte
	for len(body) > 0 {
		n := min(max(next(), 0), len(body))
		piece := bytes.Clone(body[:n])
		body = body[n:]
		out = append(out, m.process(piece)...)
		for i := range piece {
			piece[i] = '"'
		}
	}
	return append(out, m.finish()...)
}

func allAtOnce() int { return 1 << 30 }

// meterState is the whole visible state of a meter in one line.
func meterState(m *meter) string {
	return fmt.Sprintf("%s %+v %+v model=%q done=%v failed=%v bytes=%d events=%d", m.source(), m.counts, m.details, m.model, m.done, m.failed, m.bytes, m.events)
}

// meterCounts writes counts as the usage lines in testdata do.
func meterCounts(m *meter) string {
	c, parts := m.counts, []string{string(m.source())}
	for _, part := range []struct {
		name string
		n    int64
	}{
		{"input", c.input}, {"cached", c.cached}, {"cacheWrite", c.cacheWrite}, {"audioInput", c.audioInput},
		{"output", c.output}, {"reasoning", c.reasoning}, {"audioOutput", c.audioOutput},
	} {
		if part.n != 0 {
			parts = append(parts, fmt.Sprintf("%s=%d", part.name, part.n))
		}
	}
	if m.details != (usageDetails{}) {
		parts = append(parts, string(m.details.appendJSON(nil)))
	}
	return strings.Join(parts, " ")
}

// checkCost compares what the usage costs with the line "cost: VENDOR MODEL DOLLARS: how that was worked out".
func (g usageCase) checkCost(t *testing.T, m *meter) {
	t.Helper()
	head, _, _ := strings.Cut(g.cost, ":")
	f := strings.Fields(head)
	if len(f) != 3 {
		t.Fatalf("the line cost is %q", g.cost)
	}
	p := listPrices(t).lookup(f[0], f[1], 0)
	if p == nil {
		t.Fatalf("%s has no price", f[1])
	}
	if nanos, ok := p.cost(&m.counts, &m.details, nil); !ok || formatNanos(nanos) != f[2] {
		t.Errorf("the usage costs %s, known %v; want %s", formatNanos(nanos), ok, f[2])
	}
}

func TestMeterGolden(t *testing.T) {
	t.Parallel()
	for _, g := range usageCases(t) {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			m := g.meter(false)
			if out := runMeter(m, g.body, allAtOnce); !bytes.Equal(out, g.body) {
				t.Errorf("the client got %q", out)
			}
			end := "cut"
			switch {
			case m.done && m.failed:
				end = "done failed"
			case m.failed:
				end = "failed"
			case m.done:
				end = "done"
			}
			got := [...]string{meterCounts(m), m.model, end}
			if want := [...]string{g.usage, g.model, g.end}; got != want {
				t.Errorf("got  %q\nwant %q", got, want)
			}
			if g.events != "" && fmt.Sprint(m.events) != g.events {
				t.Errorf("events = %d, want %s", m.events, g.events)
			}
			if g.cost != "" {
				g.checkCost(t, m)
			}
			want := meterState(m)
			rnd := rand.New(rand.NewPCG(1, 2))
			for range 50 {
				m := g.meter(false)
				if out := runMeter(m, g.body, func() int { return rnd.IntN(40) }); !bytes.Equal(out, g.body) {
					t.Fatalf("in pieces the client got %q", out)
				}
				if got := meterState(m); got != want {
					t.Fatalf("in pieces\n got %s\nwant %s", got, want)
				}
			}
		})
	}
}

// TestMeterRenewed: a meter that was used for other answers is as a new one.
func TestMeterRenewed(t *testing.T) {
	t.Parallel()
	m, rnd := newMeter(meterOpenAI, true, false, true), rand.New(rand.NewPCG(1, 2))
	for range 3 {
		for _, g := range usageCases(t) {
			for _, strip := range []bool{true, false} {
				pieces := func() int { return 1 + rnd.IntN(200) }
				fresh, cut := g.meter(strip), len(g.body)-rnd.IntN(2)*rnd.IntN(len(g.body))
				want := runMeter(fresh, g.body[:cut], pieces)
				m.renew(fresh.kind, fresh.declaredSSE, false, strip)
				if out := runMeter(m, g.body[:cut], pieces); !bytes.Equal(out, want) {
					t.Fatalf("%s cut at %d: the client got %q, want %q", g.name, cut, out, want)
				}
				if got, want := meterState(m), meterState(fresh); got != want {
					t.Fatalf("%s cut at %d:\n got %s\nwant %s", g.name, cut, got, want)
				}
			}
		}
	}
}

// TestMeterEveryCut cuts streams at every byte: the client gets every byte and nothing more, except for the
// usage event if it is complete (ST2, ST6).
func TestMeterEveryCut(t *testing.T) {
	t.Parallel()
	for _, g := range usageCases(t) {
		for cut := range g.body {
			for _, strip := range []bool{false, true} {
				m := g.meter(strip)
				out := runMeter(m, g.body[:cut], allAtOnce)
				if !strip && !bytes.Equal(out, g.body[:cut]) {
					t.Fatalf("%s cut at %d: the client got %q", g.name, cut, out)
				}
				if lost := cut - len(out); lost != 0 && lost < 150 {
					t.Fatalf("%s cut at %d: the client lost %d bytes", g.name, cut, lost)
				}
				if c := m.counts; c.output < 0 || c.input < 0 {
					t.Fatalf("%s cut at %d: %+v", g.name, cut, c)
				}
			}
		}
	}
}

// TestMeterCurrent: after each piece of an answer the usage is what it would be if the answer ended there, although it
// is not found anew for each word of a stream.
func TestMeterCurrent(t *testing.T) {
	t.Parallel()
	const word = `data: {"choices":[{"delta":{"content":"word"}}]}` + "\n\n"
	cases := usageCases(t)
	for _, body := range []string{
		word + word + "event: error\ndata: {\"x\":1}\n\n" + word,
		"event: error\ndata: {\"x\":1}\n\n" + word + word,
		word + "event: response.failed\ndata: {\"x\":1}\n\n",
		word + `data: {"service_tier":"priority","usage":{"prompt_tokens":9,"completion_tokens":700}}` + "\n\n" + word + word,
		word + `data: {"padding":"` + strings.Repeat("x", maxEventBytes) + `","usage":{"prompt_tokens":9}}` + "\n\n" + word,
	} {
		cases = append(cases, usageCase{name: body[:60], kind: "openai sse", body: []byte(body)})
	}
	for _, g := range cases {
		for _, size := range []int{1, 7, 50, 200} {
			if size == 1 && len(g.body) > maxEventBytes {
				continue
			}
			m, at := g.meter(false), 0
			for piece := range slices.Chunk(g.body, size) {
				m.process(piece)
				at += len(piece)
				again := *m
				again.counts, again.currentSource = again.currentUsage()
				if m.counts != again.counts || m.details != again.details || m.source() != again.source() ||
					m.unmeasured != again.unmeasured || m.implausible != again.implausible {
					t.Fatalf("%s in pieces of %d, after %d bytes:\n got %s\nwant %s", g.name, size, at, meterState(m),
						meterState(&again))
				}
			}
		}
	}
}

// TestMeterStrip: exactly the usage event is left out, however it is cut into pieces.
func TestMeterStrip(t *testing.T) {
	t.Parallel()
	choices := regexp.MustCompile(`"choices":(\ndata:)? ?\[\],`)
	usage := regexp.MustCompile(`"usage": ?\{"`)
	usageChunks := 0
	for _, g := range usageCases(t) {
		if g.kind != "openai sse" && g.name != "undeclared_stream" {
			continue
		}
		end := "\n\n"
		switch g.name {
		case "chat_stream_crlf":
			end = "\r\n\r\n"
		case "chat_stream_cr":
			end = "\r\r"
		}
		var want []byte
		for e := range strings.SplitAfterSeq(string(g.body), end) {
			if choices.MatchString(e) && usage.MatchString(e) {
				usageChunks++
				continue
			}
			want = append(want, e...)
		}
		bare := g.meter(false)
		runMeter(bare, g.body, allAtOnce)
		rnd := rand.New(rand.NewPCG(3, 4))
		for round := range 60 {
			next := allAtOnce
			if round > 0 {
				next = func() int { return rnd.IntN(round * 4) }
			}
			m := g.meter(true)
			if got := runMeter(m, g.body, next); !bytes.Equal(got, want) {
				t.Fatalf("%s: the client got\n%q\nwant\n%q", g.name, got, want)
			}
			if got, want := meterState(m), meterState(bare); got != want {
				t.Fatalf("%s: with strip\n got %s\nwant %s", g.name, got, want)
			}
		}
	}
	if usageChunks != 14 {
		t.Errorf("only %d of the streams have a usage chunk", usageChunks)
	}
}

// TestMeterStripAtOnce: holding an event back delays neither the events before it nor a complete event.
func TestMeterStripAtOnce(t *testing.T) {
	t.Parallel()
	m := newMeter(meterOpenAI, true, false, true)
	steps := []struct{ in, out string }{
		{"data: {\"a\":1}\n\n", "data: {\"a\":1}\n\n"},
		{"data: {\"b\"", ""},
		{":1}\n\nda", "data: {\"b\":1}\n\n"},
		{"ta: {\"choices\":[],\"usage\":{\"prompt_tokens\":1}}\n", ""},
		{"\ndata: [DONE]\n\n", "data: [DONE]\n\n"},
		{"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":2}}\r\n\r", ""},
		{"\n: c\r\n\r", ": c\r\n\r"},
		{"\n", "\n"},
		{"data: " + strings.Repeat("x", maxEventBytes-6), ""},
		{"y", "data: " + strings.Repeat("x", maxEventBytes-6) + "y"},
		{"z", "z"},
		{"\n\n", "\n\n"},
		{"data: {\"choices\":[],", ""},
	}
	for i, s := range steps {
		if out := string(m.process([]byte(s.in))); out != s.out {
			t.Fatalf("step %d: got %.80q, want %.80q", i, out, s.out)
		}
	}
	if out := string(m.finish()); out != "data: {\"choices\":[]," {
		t.Errorf("end = %q", out)
	}
}

// TestMeterBadUsage: whatever a provider reports, counts are in range and never silently zero (ST8, ST10).
func TestMeterBadUsage(t *testing.T) {
	t.Parallel()
	const pad = `{"model":"m","x":"0123456789","usage":` // 38 bytes
	for _, c := range []struct {
		kind        meterKind
		usage, want string
	}{
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":5}`, "exact input=10 output=5"},
		{meterOpenAI, `{"prompt_tokens":0,"completion_tokens":0}`, "estimated output=20"},
		{meterOpenAI, `{"prompt_tokens":0,"completion_tokens":0},"content":"some text"`, "estimated output=26"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":0},"content":"some text"`, "estimated input=10 output=26"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":0},"content":""`, "exact input=10"},
		{meterOpenAI, `{"prompt_tokens":0,"completion_tokens":5}`, "estimated output=5"},
		{meterOpenAI, `{"prompt_tokens":0,"completion_tokens":5,"total_tokens":15}`, "exact input=10 output=5"},
		{meterOpenAI, `{"total_tokens":15}`, "estimated output=15"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":null}`, "exact input=10"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":-5}`, "estimated input=10 output=21"},
		{meterOpenAI, `{"prompt_tokens":-1,"completion_tokens":5}`, "estimated output=5"},
		{meterOpenAI, `{"prompt_tokens":1.5,"completion_tokens":5}`, "exact input=2 output=5"},
		{meterOpenAI, `{"prompt_tokens":1e3,"completion_tokens":5}`, "exact input=1000 output=5"},
		{meterOpenAI, `{"prompt_tokens":"7","completion_tokens":5}`, "exact input=7 output=5"},
		{meterOpenAI, `{"prompt_tokens":[7],"completion_tokens":{"a":1}}`, "estimated output=22"},
		{meterOpenAI, `{"completion_tokens":5}`, "estimated output=5"},
		{meterOpenAI, `{}`, "estimated output=11"},
		{meterOpenAI, `null`, "estimated output=11"},
		{meterOpenAI, `7`, "estimated output=10"},
		{meterOpenAI, `[{"prompt_tokens":1}]`, "estimated output=15"},
		{meterOpenAI, `{"prompt_tokens":9223372036854775808,"completion_tokens":99999999999999999999999999}`, "estimated output=31"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":11,"cache_write_tokens":3,"audio_tokens":12},"completion_tokens_details":{"reasoning_tokens":6,"audio_tokens":7}}`, "exact input=10 cached=10 audioInput=10 output=5 reasoning=5 audioOutput=5"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":-4},"completion_tokens_details":null}`, "exact input=10 output=5"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":5,"input_tokens":0,"output_tokens":0,"input_tokens_details":null}`, "exact input=10 output=5"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":5,"total_tokens":35,"completion_tokens_details":{"reasoning_tokens":20}}`, "exact input=10 output=25 reasoning=20"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":5,"prompt_cache_hit_tokens":4,"prompt_cache_miss_tokens":6}`, "exact input=10 cached=4 output=5"},
		{meterOpenAI, `{"type":"duration","seconds":1.5}`, `exact {"input_ms":1500}`},
		{meterOpenAI, `{"seconds":3,"input_tokens":1,"output_tokens":2}`, "exact input=1 output=2"},
		{meterOpenAI, `{"prompt_tokens":1,"completion_tokens":2},"usage":{"prompt_tokens":3,"completion_tokens":4}`, "exact input=3 output=4"},
		{meterOpenAI, `{"prompt_tokens":1,"completion_tokens":2},"usage":null`, "estimated output=24"},
		{meterAnthropic, `{"input_tokens":10,"output_tokens":5,"cache_read_input_tokens":100,"cache_creation_input_tokens":20}`, "exact input=130 cached=100 cacheWrite=20 output=5"},
		{meterAnthropic, `{"input_tokens":10,"output_tokens":5,"cache_read_input_tokens":null}`, "exact input=10 output=5"},
		{meterOpenAI, `{"prompt_tokens":"1e1","completion_tokens":" 5 "}`, "exact input=10 output=5"},
		{meterOpenAI, `{"prompt_tokens":"","completion_tokens":"five"}`, "estimated output=22"},
		{meterOpenAI, `{"prompt_tokens":true,"completion_tokens":NaN}`, "estimated output=22"},
		{meterOpenAI, `{"prompt_tokens":0x10,"completion_tokens":-1.5}`, "estimated output=22"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":1e999}`, "estimated input=10 output=22"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":100000000}`, "estimated output=23"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":99999990}`, "exact input=10 output=99999990"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":5,"total_tokens":1e12}`, "estimated input=10 output=5"},
		{meterOpenAI, `{"prompt_tokens":20,"completion_tokens":198,"total_tokens":623}`, "exact input=20 output=603"},
		{meterOpenAI, `{"prompt_tokens":20,"completion_tokens":198,"total_tokens":100}`, "exact input=20 output=198"},
		{meterOpenAI, `{"prompt_tokens":20,"total_tokens":30}`, "exact input=20 output=10"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":5,"cache_read_input_tokens":100,"total_tokens":115}`,
			"exact input=110 cached=100 output=5"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":5,"cache_read_input_tokens":100,` +
			`"cache_creation_input_tokens":7,"total_tokens":122}`, "exact input=117 cached=100 cacheWrite=7 output=5"},
		{meterOpenAI, `null,"choices":[{"usage":{"prompt_tokens":10,"completion_tokens":5}},{"usage":null},7]`,
			"exact input=10 output=5"},
		{meterOpenAI, `{"prompt_tokens":1,"completion_tokens":2},"choices":[{"usage":{"prompt_tokens":10}}]`,
			"exact input=1 output=2"},
		{meterOpenAI, `null,"x_groq":{"id":"x","usage":{"prompt_tokens":10,"completion_tokens":5}}`,
			"exact input=10 output=5"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":5},"x_groq":{"usage":{"prompt_tokens":1}}`,
			"exact input=10 output=5"},
		{meterEmbeddings, `{"prompt_tokens":10,"completion_tokens":0,"total_tokens":10}`, "exact input=10"},
		{meterOpenAI, `{"total_tokens":540}`, "estimated input=525 output=15"},
		{meterOpenAI, `{"prompt_tokens":0,"completion_tokens":0,"total_tokens":540}`, "estimated input=515 output=25"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":0,"completion_tokens_details":{"reasoning_tokens":448}}`,
			"exact input=10 output=448 reasoning=448"},
		{meterOpenAI, `{"prompt_tokens":10,"completion_tokens":5,"prompt_tokens_details":{"cache_creation_tokens":7}}`,
			"exact input=10 cacheWrite=7 output=5"},
		{meterOpenAI, `null,"result":{"usage":{"prompt_tokens":10,"completion_tokens":5}}`, "exact input=10 output=5"},
		{meterEmbeddings, `{"total_tokens":8}`, "exact input=8"},
		{meterEmbeddings, `{"prompt_tokens":8,"completion_tokens":8,"total_tokens":16}`, "exact input=8"},
		{meterEmbeddings, `{"prompt_tokens":0,"total_tokens":0}`, "estimated"},
		{meterEmbeddings, `null,"content":"some text"`, "estimated"},
		{meterAnthropic, `{"input_tokens":10,"output_tokens":5,"iterations":[]}`, "exact input=10 output=5"},
		{meterAnthropic, `{"input_tokens":10,"output_tokens":5,"iterations":[{"type":"message","input_tokens":10,` +
			`"output_tokens":5},{"input_tokens":100,"cache_read_input_tokens":4,"output_tokens":50,"type":"compaction"},` +
			`{"type":"fallback","input_tokens":9,"output_tokens":9}]}`, "exact input=114 cached=4 output=55"},
		{meterAnthropic, `{"iterations":[{"type":"compaction","input_tokens":1e12}],"input_tokens":10,"output_tokens":5}`,
			"estimated input=10 output=5"},
		{meterAnthropic, `{"input_tokens":0,"output_tokens":0,"cache_creation_input_tokens":9}`, "exact input=9 cacheWrite=9"},
		{meterAnthropic, `{"input_tokens":1000000000000,"output_tokens":5,"cache_read_input_tokens":1e12,"cache_creation_input_tokens":1000000000000}`, "estimated output=5"},
	} {
		m := newMeter(c.kind, false, false, false)
		runMeter(m, []byte(pad+c.usage+"}"), allAtOnce)
		if got := meterCounts(m); got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.usage, got, c.want)
		}
	}
}

func TestMeterStreamRules(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, body, want string }{
		{"nothing", "", "none"},
		{"only a comment", ": x\n\n", "estimated"},
		{"two usage chunks: the last one", `data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}` + "\n\n" + `data: {"usage":{"prompt_tokens":2,"completion_tokens":3}}` + "\n\n", "exact input=2 output=3"},
		{"then an unusable one", `data: {"usage":{"prompt_tokens":2,"completion_tokens":3}}` + "\n\n" + `data: {"usage":{}}` + "\n\n" + `data: {"usage":null}` + "\n\n", "exact input=2 output=3"},
		{"not in a string", `data: "{\"usage\":{\"prompt_tokens\":2,\"completion_tokens\":3}}"` + "\n\n", "estimated output=1"},
		{"not in an array", `data: [{"usage":{"prompt_tokens":2,"completion_tokens":3}}]` + "\n\n", "estimated output=1"},
		{"not in a comment", `: {"usage":{"prompt_tokens":2,"completion_tokens":3}}` + "\n\n", "estimated"},
		{"not in another field", `date: {"usage":{"prompt_tokens":2,"completion_tokens":3}}` + "\n\n", "estimated"},
		{"not after garbage", `data: x {"usage":{"prompt_tokens":2,"completion_tokens":3}}` + "\n\n", "estimated output=1"},
		{"not of a response in progress", `data: {"type":"response.in_progress","response":{"usage":{"input_tokens":2,"output_tokens":3}}}` + "\n\n", "estimated output=1"},
		{"type behind response", `data: {"response":{"usage":{"input_tokens":2,"output_tokens":3}},"type":"response.completed"}` + "\n\n", "exact input=2 output=3"},
		{"no empty line at the end", `data:{"usage":{"prompt_tokens":2,"completion_tokens":3}}`, "exact input=2 output=3"},
		{"spaces", "data:\t{ \"usage\" : { \"prompt_tokens\" : 2 , \"completion_tokens\" : 3 } } \n\n", "exact input=2 output=3"},
		{"big event", `data: {"type":"response.completed","response":{"output":"` + strings.Repeat(`a\"`, maxEventBytes) + `","usage":{"input_tokens":2,"output_tokens":3}}}` + "\n\n", "exact input=2 output=3"},
	} {
		var first string
		for _, size := range []int{1 << 30, 1, 2, 7, 4096} {
			m := newMeter(meterOpenAI, true, false, false)
			runMeter(m, []byte(c.body), func() int { return size })
			if got := meterCounts(m); got != c.want {
				t.Errorf("%s, in pieces of %d: got %s, want %s", c.name, size, got, c.want)
			}
			if first == "" {
				first = meterState(m)
			} else if meterState(m) != first {
				t.Errorf("%s, in pieces of %d: got %s, want %s", c.name, size, meterState(m), first)
			}
		}
	}
}

// TestMeterFormat: the first bytes of an answer say how it is read, not its type, in whatever pieces they come.
func TestMeterFormat(t *testing.T) {
	t.Parallel()
	const usage = `{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}`
	const event = "data: " + usage + "\n\n"
	for _, c := range []struct {
		name, body, want string
		kind             meterKind
		stripped         string // "": nothing
		unmeasured       bool
		declaredSSE      bool
	}{
		{name: "json", body: usage, want: "exact input=7 output=3"},
		{name: "json after blank lines", body: "\n\n \r\n\uFEFF" + usage, want: "exact input=7 output=3"},
		{name: "events", body: event + "data: [DONE]\n\n", want: "exact input=7 output=3", stripped: event},
		{name: "events after blank lines", body: "\r\n\n" + event, want: "exact input=7 output=3", stripped: event},
		{name: "events after a comment", body: ": hello\n\n" + event, want: "exact input=7 output=3", stripped: event},
		{name: "named events", body: "event: x\n" + event, want: "exact input=7 output=3", stripped: "event: x\n" + event},
		{name: "events with ids", body: "id: 7\n" + event, want: "exact input=7 output=3", stripped: "id: 7\n" + event},
		{name: "retry first", body: "retry: 7\n\n" + event, want: "exact input=7 output=3", stripped: event},
		{name: "json lines", body: `{"choices":[{"delta":{"content":"four word text"}}]}` + "\n" + usage + "\n",
			want: "exact input=7 output=3"},
		{name: "json lines without usage", body: strings.Repeat(`{"choices":[{"delta":{"content":"12345678"}}]}`+"\n", 9),
			want: "estimated output=18"},
		{name: "a list", body: "[" + usage + "]", want: "estimated output=17"},
		{name: "text", body: "date of birth", want: "estimated output=4"},
		{name: "the start of a field", body: "even", want: "estimated output=1"},
		{name: "white space", body: " \n\n", want: "none"},
		{name: "a page", body: "<html>sorry</html>", want: "none"},
		{name: "a page, declared as events", body: "<html>sorry</html>", declaredSSE: true, want: "none"},
		{name: "a transcript", body: "data and so on", kind: meterTranscripts, want: "estimated output=4", unmeasured: true},
		{name: "subtitles", body: "1\n00:00:00 --> 00:00:01\nHello\n", kind: meterTranscripts, want: "estimated output=8",
			unmeasured: true},
		{name: "sound", body: "ID3\x00\x01", kind: meterMedia, want: "estimated", unmeasured: true},
		{name: "a picture without usage", body: `{"data":[{"b64_json":"AAAA"}]}`, kind: meterMedia, want: "estimated",
			unmeasured: true},
		{name: "an error", body: `{"error":{"message":"no"}}`, want: "none"},
		{name: "half an answer", body: `{"model":"m","choices":[{"message":{"content":"Hel`, want: "none"},
	} {
		if c.kind == meterNone {
			c.kind = meterOpenAI
		}
		for _, strip := range []bool{false, true} {
			for _, size := range []int{1 << 30, 1, 2, 3, 5} {
				m := newMeter(c.kind, c.declaredSSE, false, strip)
				out := runMeter(m, []byte(c.body), func() int { return size })
				want := c.body
				if strip {
					want = strings.Replace(c.body, c.stripped, "", 1)
				}
				if string(out) != want {
					t.Errorf("%s, in pieces of %d: the client got %q, want %q", c.name, size, out, want)
				}
				if got := meterCounts(m); got != c.want || m.unmeasured != c.unmeasured {
					t.Errorf("%s, in pieces of %d: got %s, unmeasured %v", c.name, size, got, m.unmeasured)
				}
			}
		}
	}
	m := newMeter(meterOpenAI, false, false, false)
	m.process([]byte(`{"choices":[{"message":{"content":"Hel`)) // the client leaves: it is charged what it got
	if got := meterCounts(m); got != "estimated output=10" {
		t.Errorf("an answer that its client left: %s", got)
	}
	m = newMeter(meterOpenAI, true, false, true)
	if out := runMeter(m, []byte(usage), allAtOnce); string(out) != usage || meterCounts(m) != "exact input=7 output=3" {
		t.Errorf("JSON declared as events: %s, the client got %q", meterCounts(m), out)
	}
}

// TestMeterEmptyError: an error that is null, false, empty or made of nothing else says nothing.
func TestMeterEmptyError(t *testing.T) {
	t.Parallel()
	for value, says := range map[string]bool{
		`null`: false, `""`: false, `{}`: false, `false`: false, `0`: false, `[]`: false, `{"message":""}`: false,
		`{"message":"","code":null,"type":{},"param":[ "" , false]}`: false, `{ "a" : { "b" : 0 } }`: false,
		`"x"`: true, `"\""`: true, `true`: true, `502`: true, `["x"]`: true, `{"message":"no"}`: true, `{"code":502}`: true,
		`{"message":"","inner":{"list":["",{"text":" "}]}}`: true, `{"retry":true}`: true,
	} {
		for _, size := range []int{1 << 30, 1, 2, 7} {
			for _, sse := range []bool{false, true} {
				body := `{"error":` + value + `,"choices":[{"delta":{"content":"Hi"}}]}`
				if sse {
					body = "data: " + body + "\n\n"
				}
				m := newMeter(meterOpenAI, sse, false, false)
				if runMeter(m, []byte(body), func() int { return size }); m.failed != says {
					t.Errorf("%s, stream %v, in pieces of %d: failed %v", value, sse, size, m.failed)
				}
			}
		}
		if got := parseStreamEvent(nil, []byte(`{"error":`+value+`}`)).isError; got != says {
			t.Errorf("%s as the first event: %v", value, got)
		}
	}
}

// TestMeterOtherErrors: providers and gateways say in many ways that an answer with status 200 is an error.
func TestMeterOtherErrors(t *testing.T) {
	t.Parallel()
	const choices = `"choices":[{"delta":{"content":"Hi"}}]`
	for body, says := range map[string]bool{
		`{"object":"error","message":"Internal","type":"InternalServerError","code":500}`:          true, // vLLM
		`{"type":"error","message":"no"}`:                                                          true,
		`{"choices":[{"finish_reason":"error","error":{"code":502,"message":"no"}}],"object":"x"}`: true, // OpenRouter
		`{"choices":[{"delta":{},"finish_reason":"error"}]}`:                                       true,
		`{"choices":[{"error":null,"finish_reason":"stop"}]}`:                                      false,
		`{"choices":null,"base_resp":{"status_code":1008,"status_msg":"insufficient balance"}}`:    true, // MiniMax
		`{` + choices + `,"base_resp":{"status_code":0,"status_msg":"success"}}`:                   false,
		`{"code":500,"msg":"404 NOT_FOUND","success":false}`:                                       true, // Zhipu
		`{"result":null,"success":false,"errors":[{"code":7003}],"messages":[]}`:                   true, // Cloudflare
		`{"result":{"response":"Hi"},"success":true,"errors":[],"messages":[]}`:                    false,
		`{"error_code":336100,"error_msg":"try again later"}`:                                      true, // Baidu
		`{"error":null,"errors":["x"]}`:                                                            true,
		`{"errors":["x"],"error":null}`:                                                            true,
		`{"detail":"Internal Server Error"}`:                                                       true,
		`{"message":"no Route matched with those values","request_id":"x"}`:                        true,
		`{"message":"ok","code":0,` + choices + `}`:                                                false,
		`{"message":"ok","data":{` + choices + `}}`:                                                false,
		`{"message":{"content":"Hi"},"msg":""}`:                                                    false, // Ollama
		`{"message":"","object":"chat.completion"}`:                                                false,
	} {
		for _, size := range []int{1 << 30, 1, 2, 7} {
			for _, sse := range []bool{false, true} {
				text := body
				if sse {
					text = "data: " + body + "\n\n"
				}
				m := newMeter(meterOpenAI, sse, false, false)
				if runMeter(m, []byte(text), func() int { return size }); m.failed != says {
					t.Errorf("%s, stream %v, in pieces of %d: failed %v", body, sse, size, m.failed)
				}
			}
		}
		if got := parseStreamEvent(nil, []byte(body)).isError; got != says {
			t.Errorf("%s as the first event: %v", body, got)
		}
	}
}

// TestMeterTextOfDeltas: a stream without usage is estimated by its text, however large its envelopes are.
func TestMeterTextOfDeltas(t *testing.T) {
	t.Parallel()
	words := strings.Repeat("word ", 40) // 200 bytes
	for _, c := range []struct {
		name, event string
		want        int64 // of 200 events
	}{
		{"chat", `data: {"choices":[{"index":0,"delta":{"content":"W"},"logprobs":{"content":[{"token":"W"}]}}]}`, 10_000},
		{"reasoning under two names",
			`data: {"choices":[{"delta":{"reasoning":"W","reasoning_content":"W","reasoning_details":[{"text":"W"}]}}]}`, 10_000},
		{"tools", `data: {"choices":[{"delta":{"tool_calls":[{"type":"function","function":{"arguments":"W"}}]}}]}`, 10_000},
		{"completions", `data: {"choices":[{"text":"W"}]}`, 10_000},
		{"messages", "event: content_block_delta\n" +
			`data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"W"}}`, 10_000},
		{"messages without names", `data: {"type":"content_block_delta","delta":{"type":"thinking_delta","thinking":"W"}}`, 10_000},
		{"tool input", "event: content_block_delta\n" +
			`data: {"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"W"}}`, 10_000},
		{"responses", "event: response.output_text.delta\n" +
			`data: {"type":"response.output_text.delta","delta":"W","obfuscation":"W"}`, 10_000},
		{"responses, the whole text again", "event: response.output_text.done\n" +
			`data: {"type":"response.output_text.done","text":"W"}`, 0},
		{"the same without names", `data: {"type":"response.output_text.done","text":"W"}`, 200},
		{"threads", "event: thread.message.delta\n" +
			`data: {"delta":{"content":[{"type":"text","text":{"value":"W"}}]}}`, 10_000},
		{"two lines", "data: {\"choices\":[{\"delta\":\ndata: {\"content\":\"W\"}}]}", 10_000},
		{"no text", `data: {"choices":[{"delta":{"role":"assistant"}}],"id":"W"}`, 200},
	} {
		body := strings.Repeat(strings.ReplaceAll(c.event, "W", words)+"\n\n", 200)
		for _, size := range []int{1 << 30, 1, 100} {
			m := newMeter(meterOpenAI, true, false, false)
			if runMeter(m, []byte(body), func() int { return size }); m.counts.output != c.want {
				t.Errorf("%s, in pieces of %d: %d tokens, want %d", c.name, size, m.counts.output, c.want)
			}
		}
	}
}

// TestMeterReadsNoMoreInBigEvents: an event above 64 KiB is read in full, a small one only if it may matter.
// A comment that makes every event big changes no result.
func TestMeterReadsNoMoreInBigEvents(t *testing.T) {
	t.Parallel()
	comment := ":" + strings.Repeat(" ", maxEventBytes) + "\n"
	for _, g := range usageCases(t) {
		if !strings.HasSuffix(g.kind, "sse") || bytes.Contains(g.body, []byte("\r")) {
			continue
		}
		var big []byte
		for event := range bytes.SplitAfterSeq(g.body, []byte("\n\n")) {
			big = append(big, comment...)
			big = append(big, event...)
		}
		small, m := g.meter(false), g.meter(false)
		runMeter(small, g.body, allAtOnce)
		runMeter(m, big, func() int { return 10_000 })
		m.bytes = small.bytes
		if got, want := meterState(m), meterState(small); got != want {
			t.Errorf("%s\n got %s\nwant %s", g.name, got, want)
		}
	}
}

// TestMeterOpaque: the bytes of an unreadable answer are counted, and an answer that is not billed by tokens
// has usage none.
func TestMeterOpaque(t *testing.T) {
	t.Parallel()
	body := []byte(`{"model":"m","usage":{"prompt_tokens":1,"completion_tokens":1}}`)
	for _, c := range []struct {
		kind        meterKind
		sse, opaque bool
		want        string
	}{
		{meterNone, false, false, "none"},
		{meterNone, true, false, "none"},
		{meterNone, false, true, "none"},
		{meterOpenAI, false, true, "estimated output=48"},
		{meterOpenAI, true, true, "estimated output=16"},
	} {
		m := newMeter(c.kind, c.sse, c.opaque, true)
		out := runMeter(m, body, func() int { return 10 })
		if got := meterCounts(m); got != c.want || m.bytes != int64(len(body)) || m.model != "" || !bytes.Equal(out, body) {
			t.Errorf("%+v: got %s, %d bytes, model %q", c, got, m.bytes, m.model)
		}
	}
}

func FuzzMeter(f *testing.F) {
	for i, g := range usageCases(f) {
		f.Add(g.body, strings.HasPrefix(g.kind, "anthropic"), strings.HasSuffix(g.kind, "sse"), uint64(i))
	}
	f.Add([]byte("\xEF\xBB\xBFdata: {\"a\":\"\\"), false, true, uint64(1))
	f.Add([]byte("data: {\"choices\":[],\"usage\":{}}\r\r\n\rdata"), false, true, uint64(2))
	f.Fuzz(func(t *testing.T, body []byte, anthropic, sse bool, seed uint64) {
		kind := meterOpenAI
		if anthropic {
			kind = meterAnthropic
		} else if seed%4 == 3 {
			kind = meterTranscripts
		}
		rnd := rand.New(rand.NewPCG(seed, 0))
		for _, strip := range []bool{false, true} {
			ref := newMeter(kind, sse, false, strip)
			want := runMeter(ref, body, allAtOnce)
			if !ref.strip && !bytes.Equal(want, body) {
				t.Fatalf("the client got %q", want)
			}
			c := ref.counts
			if c.input < 0 || c.output < 0 || c.input+c.output > maxBilledTokens || c.cached < 0 ||
				c.cacheWrite < 0 || c.cached+c.cacheWrite > c.input || c.reasoning > c.output {
				t.Fatalf("insane counts %+v", c)
			}
			used := newMeter(kind, sse, false, strip)
			for _, top := range []int{1, 2, 20, 300} {
				runMeter(used.renew(kind, !sse, false, !strip), body[rnd.IntN(len(body)+1):], allAtOnce)
				for _, m := range []*meter{newMeter(kind, sse, false, strip), used.renew(kind, sse, false, strip)} {
					if got := runMeter(m, body, func() int { return 1 + rnd.IntN(top) }); !bytes.Equal(got, want) {
						t.Fatalf("in pieces the client got\n%q\nwant\n%q", got, want)
					}
					if got, want := meterState(m), meterState(ref); got != want {
						t.Fatalf("in pieces\n got %s\nwant %s", got, want)
					}
				}
			}
		}
	})
}

// cutEvents cuts a stream in pieces of the sizes that next gives and returns its events, one line each.
func cutEvents(stream []byte, next func() int) (events []string) {
	var cutter sseCutter
	var data []byte
	for len(stream) > 0 {
		n := min(max(next(), 0), len(stream))
		piece := bytes.Clone(stream[:n])
		stream = stream[n:]
		cutter.feed(piece)
		for token := cutter.next(); token != sseMore; token = cutter.next() {
			switch token {
			case sseData:
				data = append(data, cutter.text...)
			case sseJoin:
				data = append(data, '\n')
			case sseEnd:
				events = append(events, fmt.Sprintf("%q %v %q", cutter.eventName(), cutter.hasData, data))
				data = nil
			}
		}
		for i := range piece {
			piece[i] = '"'
		}
	}
	return events
}

// splitEvents is what cutEvents must return, written for a whole stream.
func splitEvents(stream string) (events []string) {
	stream = strings.ReplaceAll(strings.ReplaceAll(stream, "\r\n", "\n"), "\r", "\n")
	name, data := "", []string(nil)
	for line := range strings.Lines(stream) {
		text, complete := strings.CutSuffix(line, "\n")
		for events == nil && strings.HasPrefix(text, "\uFEFF") {
			text = strings.TrimPrefix(text, "\uFEFF")
		}
		switch field, value, colon := strings.Cut(text, ":"); {
		case line == "\n":
			events = append(events, fmt.Sprintf("%q %v %q", name, data != nil, strings.Join(data, "\n")))
			name, data = "", nil
		case complete && colon && field == "data":
			data = append(data, strings.TrimPrefix(value, " "))
		case complete && colon && field == "event":
			name = strings.TrimPrefix(value, " ")
			name = name[:min(len(name), 64)]
		}
	}
	return events
}

// FuzzSSECutter: a stream has the same events in whatever pieces it comes, and they are those of the standard.
func FuzzSSECutter(f *testing.F) {
	for i, g := range usageCases(f) {
		f.Add(g.body, uint64(i))
	}
	for _, stream := range []string{
		"\uFEFFdata: x\n\n", "\xEF\xBBdata: x\n\n", "data: a\rdata:\r\rdata: b\r\n\r\n\n", "data\n\ndatadata:x\n\n",
		"event: a\nevent:b\ndata:  x\nid: 7\n:data: c\n\n", "event: " + strings.Repeat("e", 70) + "\n\n", "data: cut", "\r\n\r\r\n",
	} {
		f.Add([]byte(stream), uint64(len(stream)))
	}
	f.Fuzz(func(t *testing.T, stream []byte, seed uint64) {
		want := splitEvents(string(stream))
		rnd := rand.New(rand.NewPCG(seed, 0))
		for _, most := range []int{1, 3, 40, 1 << 30} {
			if got := cutEvents(stream, func() int { return 1 + rnd.IntN(most) }); !slices.Equal(got, want) {
				t.Fatalf("in pieces of at most %d:\n got %q\nwant %q", most, got, want)
			}
		}
	})
}

// jsonDocument writes random JSON values made of text that could mislead a reader that searches for text.
type jsonDocument struct {
	*rand.Rand
	b strings.Builder
}

func (d *jsonDocument) space() { d.b.WriteString([]string{"", "", "", " ", "\n\t", "\r\n"}[d.IntN(6)]) }

func (d *jsonDocument) name() string {
	return []string{"usage", "model", "type", "error", "choices", "prompt_tokens", "input_tokens", "completion_tokens",
		"output_tokens", "prompt_tokens_details", "cached_tokens", "response", "message", "Usage", "MODEL", "x", "",
		`usage\\`, `\"usage\":{`, `mod\u0065l\n`, "seconds", "content", "text", "thinking", `\"content`, `content\\`,
		"arguments"}[d.IntN(27)]
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
				`\ud83c\udf89`, ",", ":", `\n\ndata: [DONE]\n\n`, `\/`, `\"content\":\"ab\"`, `content\" : `}[d.IntN(17)])
		}
		d.b.WriteByte('"')
	}
}

// object writes an object with unique names.
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
		var s usageScanner
		s.reset(false)
		for p := []byte(text); len(p) > 0; {
			n := 1 + d.IntN(len(p))
			s.feedAll(p[:n])
			p = p[n:]
		}
		if s.state != scanClosed {
			t.Fatalf("not closed: %s", text)
		}
		var usage map[string]json.RawMessage
		isObject := strings.HasPrefix(string(top["usage"]), "{") && json.Unmarshal(top["usage"], &usage) == nil
		if s.usageInner && !isObject { // of a choice
			continue
		}
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
				var n float64
				number := strings.Trim(string(usage[name]), `"`)
				if json.Unmarshal([]byte(number), &n) == nil && number != "null" && n >= 0 && n <= maxBilledTokens {
					want = max(want, int64(math.Ceil(n)))
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

// textOf returns the bytes of text in a JSON value: the strings that are members with a name of textNameOf.
func textOf(value json.RawMessage, sums *[numTextNames]int64) {
	var members map[string]json.RawMessage
	var list []json.RawMessage
	switch value = bytes.TrimSpace(value); value[0] {
	case '{':
		if err := json.Unmarshal(value, &members); err != nil {
			panic(err)
		}
	case '[':
		if err := json.Unmarshal(value, &list); err != nil {
			panic(err)
		}
	}
	for name, v := range members {
		if v = bytes.TrimSpace(v); v[0] == '"' {
			sums[textNameOf([]byte(name))] += int64(len(v) - 2)
		}
		textOf(v, sums)
	}
	for _, v := range list {
		textOf(v, sums)
	}
}

// TestTextAgreesWithEncodingJSON: the text of a document is the same whether it is read in pieces of any size, or
// member by member as in the events of a stream.
func TestTextAgreesWithEncodingJSON(t *testing.T) {
	t.Parallel()
	d := &jsonDocument{Rand: rand.New(rand.NewPCG(7, 8))}
	found := 0
	for range 20_000 {
		d.b.Reset()
		d.object(4, nil)
		text := d.b.String()
		var want, pieces textCounter
		textOf(json.RawMessage(text), &want.sums)
		want.sums[textNone] = 0
		for p := []byte(text); len(p) > 0; {
			n := 1 + d.IntN(min(len(p), 20))
			pieces.feed(p[:n])
			p = p[n:]
		}
		m := newMeter(meterOpenAI, true, false, false)
		m.reader = &eventReader{}
		m.readMembers([]byte(text))
		if pieces.sum() != want.sum() || m.text.sum() != want.sum() {
			t.Fatalf("in pieces %d, by member %d, want %d bytes in %s", pieces.sum(), m.text.sum(), want.sum(), text)
		}
		if want.sum() > 0 {
			found++
		}
	}
	if found < 2000 {
		t.Errorf("only %d documents had text", found)
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

// TestMeterMemory: a JSON answer costs at most two allocations, whatever its size (BO10).
func TestMeterMemory(t *testing.T) {
	body := []byte(syntheticResponse(700))
	if n := testing.AllocsPerRun(100, func() {
		m := newMeter(meterOpenAI, false, false, false)
		m.process(body)
		m.finish()
	}); n > 2 {
		t.Errorf("a unary call costs %v allocations", n)
	}
	event := []byte(chatEvent)
	m := newMeter(meterOpenAI, true, false, true)
	m.process(event)
	if n := testing.AllocsPerRun(100, func() { m.process(event) }); n > 0 {
		t.Errorf("an event costs %v allocations", n)
	}
	lines := []byte(strings.ReplaceAll(chatEvent, `,"choices"`, ",\r\ndata: \"choices\""))
	if n := testing.AllocsPerRun(100, func() { m.process(lines[:100]); m.process(lines[100:]) }); n > 0 {
		t.Errorf("an event of several lines in two pieces costs %v allocations", n)
	}
	u := newMeter(meterOpenAI, false, false, false)
	big := []byte(strings.Repeat(`[0.0123,"text \" text",{"usage":{}}],`, 1000))
	u.process([]byte(`{"data":[`))
	if n := testing.AllocsPerRun(100, func() { u.process(big) }); n > 0 {
		t.Errorf("a piece of a large answer costs %v allocations", n)
	}
}

const chatEvent = `data: {"id":"chatcmpl-9lM","object":"chat.completion.chunk","created":1741570283,"model":"gpt-4o-2024-08-06","service_tier":"default","system_fingerprint":"fp_50cad350e4","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}],"usage":null}` + "\n\n"

func syntheticResponse(text int) string {
	return fmt.Sprintf(`{"id":"chatcmpl-B9MBs8Cj","object":"chat.completion","created":1741569952,"model":"gpt-4o-2024-08-06","choices":[{"index":0,"message":{"role":"assistant","content":"%s","refusal":null,"annotations":[]},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}},"service_tier":"default","system_fingerprint":"fp_fc9f1d7035"}`,
		strings.Repeat(`words and \"words\",\n`, text/20))
}

func BenchmarkMeterUnary(b *testing.B) {
	numbers := strings.Repeat("0.0023064255,-0.009327292,", 768*20)
	for _, c := range []struct{ name, body string }{
		{"chat-1KB", syntheticResponse(400)},
		{"chat-100KB", syntheticResponse(100_000)},
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
					m.process(p[:n])
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
			m.process([]byte("data: {\"model\":\"m\",\"message\":{\"model\":\"m\"}}\n\n"))
			b.SetBytes(int64(len(event)))
			b.ReportAllocs()
			for b.Loop() {
				m.process(event)
			}
		})
	}
}
