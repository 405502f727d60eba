package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

func TestScanJSON(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		body string
		want callFields // usage is not compared
	}{
		{`{}`, callFields{n: 1}},
		{" \t\r\n{} \n", callFields{n: 1}},
		{`{"model":"gpt-4o","stream":true}`, callFields{model: "gpt-4o", stream: true, n: 1}},
		{`{"mo\u0064el":"\u0067pt-4o"}`, callFields{model: "gpt-4o", n: 1}},
		{`{"model":"\ud83d\ude00é\/\\"}`, callFields{model: "😀é/\\", n: 1}},
		{`{"stream":null,"n":3,"max_tokens":5,"max_completion_tokens":7,"max_output_tokens":6}`, callFields{n: 3, maxTokens: 5, maxComplete: 7, maxOutput: 6}},
		{`{"n":-1,"max_tokens":-5}`, callFields{n: 1}},
		{`{"best_of":5,"n":2}`, callFields{n: 5}},
		{`{"n":0,"max_tokens":1.5}`, callFields{n: 1}},
		{`{"n":"4","max_tokens":null}`, callFields{n: 1}},
		{`{"n":4.0,"max_tokens":1e3}`, callFields{n: 4, maxTokens: 1000}},
		{`{"n":1e400,"max_tokens":9223372036854775809}`, callFields{n: maxFieldCount, maxTokens: maxFieldCount}},
		{`{"x":[1e400,-0,9223372036854775809,"\u2028",{"model":1,"Model":2,"model":3}]}`, callFields{n: 1}},
		{`{"stream_options":{"include_usage":true}}`, callFields{n: 1, includeUsage: true}},
		{`{"stream_options":{"a":[],"include_us\u0061ge":true,"b":{}}}`, callFields{n: 1, includeUsage: true}},
		{`{"previous_response_id":null,"background":false,"store":false}`, callFields{n: 1}},
		{`{"background":true,"previous_response_id":"resp_1"}`, callFields{n: 1, stateRef: "background"}},
		{`{"conversation":{"id":"conv_1"}}`, callFields{n: 1, stateRef: "conversation"}},
		{`{"model":"a","models":["b"]}`, callFields{model: "a", n: 1, otherModels: "models"}},
		{`{"fallbacks":[],"models":null}`, callFields{n: 1, otherModels: "fallbacks"}},
		{`{"x":{"models":["b"]},"models":null,"fallbacks":null}`, callFields{n: 1}},
		{`{"user":1,"user":2,"model_s":["x"],"model_":0,"":0,"nn":0}`, callFields{n: 1}},
	} {
		got, err := scanJSON([]byte(c.body))
		got.usage, got.modelAt = bodySplice{}, bodySplice{}
		if err != nil || got != c.want {
			t.Errorf("%s: got %+v, %v; want %+v", c.body, got, err, c.want)
		}
	}
}

func TestScanJSONRefuses(t *testing.T) {
	t.Parallel()
	deep := strings.Repeat("[", 100_000)
	for _, c := range []struct{ body, param, msg string }{
		{``, "", "empty"},
		{strings.Repeat(" ", 10<<20), "", "empty"},
		{`null`, "", "object (byte 0)"},
		{`[]`, "", "object"},
		{` "x"`, "", "object (byte 1)"},
		{"\xef\xbb\xbf{}", "", "byte order mark"},
		{"\xff\xfe{\x00}\x00", "", "UTF-8 (byte 0)"},
		{"{\x00}\x00", "", `'\x00' found at byte 1`},
		{"\x00{}", "", "object (byte 0)"},
		{"{\"a\":\"é\xff\"}", "", "UTF-8 (byte 8)"},
		{"{\"a\":\"\xed\xa0\x80\"}", "", "UTF-8"},
		{`{}{}`, "", "byte 2"},
		{`{}]`, "", "byte 2"},
		{`{"a":1,}`, "", "byte 7"},
		{`{,}`, "", "byte 1"},
		{`{"a" 1}`, "", "':' was expected"},
		{`{'a':1}`, "", "double quotes"},
		{`{"a":1`, "", "the body ends at byte 6"},
		{`{"a":"b`, "", "the body ends"},
		{`{"a":[1,]}`, "", "byte 8"},
		{`{"a":[1 2]}`, "", "byte 8"},
		{`{"a":01}`, "", "byte 6"},
		{`{"a":1.}`, "", "digit"},
		{`{"a":1e}`, "", "digit"},
		{`{"a":-}`, "", "byte 6"},
		{`{"a":+1}`, "", "byte 5"},
		{`{"a":.5}`, "", "byte 5"},
		{`{"a":NaN}`, "", "byte 5"},
		{`{"a":nul}`, "", "byte 5"},
		{`{"a":truex}`, "", "byte 9"},
		{"{\"a\":\"\n\"}", "", `'\n' found at byte 6`},
		{`{"a":"\x"}`, "", "escape"},
		{`{"a":"\u00g0"}`, "", "escape"},
		{"{\"a\":\"\\u00\x110\"}", "", "escape"},
		{`{"a":"\u00`, "", "escape"},
		{`{"a":"\`, "", "escape"},
		{`{"a":1/* */}`, "", "byte 6"},
		{`{"a":1}//`, "", "byte 7"},
		{`{"a":` + deep, "", "deeper than 128"},
		{`{"a":` + strings.Repeat("[", 128) + strings.Repeat("]", 128) + "}", "", "deeper than 128"},
		{`{"model":"a","model":"b"}`, "model", "Duplicate"},
		{`{"model":"a","mo\u0064el":"b"}`, "model", "Duplicate"},
		{`{"model":"a","MODEL":"b"}`, "model", "Ambiguous"},
		{`{"Model":"b"}`, "model", "Ambiguous"},
		{`{"ſtream":true}`, "stream", "Ambiguous"},
		{`{"\u017ftream":true}`, "stream", "Ambiguous"},
		{`{"max_toKens":1}`, "max_tokens", "Ambiguous"},
		{`{"bac` + "\u212a" + `ground":1}`, "background", "Ambiguous"},
		{`{"N":1}`, "n", "Ambiguous"},
		{`{"Model\u0053":["b"]}`, "models", "Ambiguous"},
		{`{"models":null,"models":["b"]}`, "models", "Duplicate"},
		{`{"store":true,"store":false}`, "store", "Duplicate"},
		{`{"model":["a"]}`, "model", "string"},
		{`{"model":1}`, "model", "string"},
		{`{"model":null}`, "model", "string"},
		{`{"model":{}}`, "model", "string"},
		{`{"model":""}`, "model", "1 to 256"},
		{`{"model":"` + strings.Repeat("x", 257) + `"}`, "model", "1 to 256"},
		{`{"model":"` + strings.Repeat("x", 1<<20) + `"}`, "model", "1 to 256"},
		{`{"model":"a\u0000b"}`, "model", "character"},
		{`{"model":"a\nb"}`, "model", "character"},
		{`{"model":"a\u007f"}`, "model", "character"},
		{`{"model":"a\ud800"}`, "model", "character"},
		{`{"model":"a\ud800\u0041"}`, "model", "character"},
		{`{"stream":1}`, "stream", "boolean"},
		{`{"stream":"true"}`, "stream", "boolean"},
		{`{"stream_options":1}`, "stream_options", "object"},
		{`{"stream_options":[]}`, "stream_options", "object"},
		{`{"stream_options":`, "", "the body ends"},
		{`{"stream_options":{},"stream_options":null}`, "stream_options", "Duplicate"},
		{`{"stream_options":{"include_usage":1}}`, "stream_options.include_usage", "boolean"},
		{`{"stream_options":{"include_usage":true,"include_usage":false}}`, "stream_options.include_usage", "Duplicate"},
		{`{"stream_options":{"Include_usage":true}}`, "stream_options.include_usage", "Ambiguous"},
	} {
		_, err := scanJSON([]byte(c.body))
		e, ok := errors.AsType[*bodyError](err)
		if !ok || e.param != c.param || !strings.Contains(e.msg, c.msg) || len(e.msg) > 200 {
			t.Errorf("%.80q: got %v; want %q for parameter %q", c.body, err, c.msg, c.param)
		}
	}
	if _, err := scanJSON([]byte(`{"a":` + strings.Repeat("[", 127) + strings.Repeat("]", 127) + "}")); err != nil {
		t.Errorf("128 levels: %v", err)
	}
}

func TestWithIncludeUsage(t *testing.T) {
	t.Parallel()
	for _, c := range [][2]string{
		{`{}`, `{"stream_options":{"include_usage":true}}`},
		{"{ \n}", "{\"stream_options\":{\"include_usage\":true} \n}"},
		{` { "b":1e400 , "a":-0 } `, ` {"stream_options":{"include_usage":true}, "b":1e400 , "a":-0 } `},
		{`{"stream_options":null}`, `{"stream_options":{"include_usage":true}}`},
		{`{"a":1, "stream_options" : null ,"b":2}`, `{"a":1, "stream_options" : {"include_usage":true} ,"b":2}`},
		{`{"stream_options":{}}`, `{"stream_options":{"include_usage":true}}`},
		{`{"stream_options":{ "x":1}}`, `{"stream_options":{"include_usage":true, "x":1}}`},
		{`{"stream_options":{"include_usage":false}}`, `{"stream_options":{"include_usage":true}}`},
		{`{"stream_options":{"x":1,"include_usage": null }}`, `{"stream_options":{"x":1,"include_usage": true }}`},
		{`{"stream_options":{"x":1,"include_usage": true }}`, `{"stream_options":{"x":1,"include_usage": true }}`},
	} {
		f, err := scanJSON([]byte(c[0]))
		if got := withIncludeUsage([]byte(c[0]), f); err != nil || string(got) != c[1] {
			t.Errorf("%s: got %s, %v; want %s", c[0], got, err, c[1])
		}
	}
}

// TestStringBytes puts every byte at every place of a word and compares with encoding/json.
func TestStringBytes(t *testing.T) {
	t.Parallel()
	for c := range 0x80 {
		for i := range 20 {
			body := []byte(`{"a":"aaaaaaaaaaaaaaaaaaaa"}`)
			body[6+i] = byte(c)
			if _, err := scanJSON(body); (err == nil) != json.Valid(body) {
				t.Errorf("%q: %v", body, err)
			}
		}
	}
}

func TestUnescape(t *testing.T) {
	t.Parallel()
	for _, s := range []string{
		`plain é`, `\"\\\/\b\f\n\r\t`, `\u0041\u00e9\u20AC\uFFFF`, `\ud83d\ude00\uD83D\uDE00`, `\ud800`, `\udc00\ud800`,
		`\ud800\u0041`, `\ud800A`, `\ud800\n`, `\ud800\ud83d\ude00`, `\ud800\\u0041`,
	} {
		var want string
		if err := json.Unmarshal([]byte(`"`+s+`"`), &want); err != nil {
			t.Fatal(err)
		}
		if got := unescape([]byte(s)); string(got) != want {
			t.Errorf("%s: got %q, want %q", s, got, want)
		}
	}
}

// TestProtectedNames holds what protectedName's shortcuts rely on.
func TestProtectedNames(t *testing.T) {
	t.Parallel()
	for i, name := range protectedNames {
		twin := strings.NewReplacer("s", "ſ", "k", "\u212a").Replace(name)
		for _, s := range []string{name, strings.ToUpper(name), twin} {
			if got, exact := protectedName([]byte(s)); got != i || exact != (s == name) {
				t.Errorf("protectedName(%q) = %d, %v", s, got, exact)
			}
		}
		for _, s := range []string{"x" + name, name + "x", name + " ", name + "\x00"} {
			if got, _ := protectedName([]byte(s)); got >= 0 {
				t.Errorf("protectedName(%q) = %d", s, got)
			}
		}
	}
}

func FuzzScanJSON(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"model":"a","stream":true,"n":2}`, `{"stream_options":{"include_usage":false,"x":[1,2]}}`,
		`{"mo\u0064el":"\ud83d\ude00","stream_options":null}`, `{"a":{"b":[1.5e-3,null,true,"\\"]}} `, `{"ſtream":1}`,
		`{"stream_options":{},"model":"x"}`, `{"a":"\ud800","max_tokens":1e3}`, "{\"\\u0000\":1}", `{"model":"a","model":"b"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		before := bytes.Clone(body)
		got, err := scanJSON(body)
		if !bytes.Equal(before, body) {
			t.Fatal("the body was changed")
		}
		if err != nil {
			if e, ok := errors.AsType[*bodyError](err); !ok || e.msg == "" {
				t.Fatalf("error %#v", err)
			}
			if e := err.(*bodyError); json.Valid(body) && strings.Contains(e.msg, "not valid JSON") {
				t.Fatalf("valid JSON refused: %v", err)
			}
			return
		}
		checkFields(t, body, got)
		changed := withIncludeUsage(body, got)
		again, err := scanJSON(changed)
		if err != nil || again.model != got.model || again.stream != got.stream || again.n != got.n || !again.includeUsage || again.usage.text != "" {
			t.Fatalf("after the splice: %+v, %v", again, err)
		}
		for added, body := range map[bool][]byte{false: body, true: changed} { // the model is where it was said to be
			renamed, err := scanJSON(withModel(body, got, added, `m"<é>`))
			if err != nil || got.model != "" && renamed.model != `m"<é>` || renamed.stream != got.stream || renamed.n != got.n {
				t.Fatalf("with another model: %+v, %v", renamed, err)
			}
		}
		want, have := decode(t, body), decode(t, changed)
		options, _ := want["stream_options"].(map[string]any)
		if options == nil {
			options = map[string]any{}
		}
		options["include_usage"] = true
		want["stream_options"] = options
		if a, b := encode(t, want), encode(t, have); a != b {
			t.Fatalf("the splice made %s of %s", b, a)
		}
	})
}

// checkFields compares with what encoding/json reads.
func checkFields(t *testing.T, body []byte, got callFields) {
	t.Helper()
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); !json.Valid(body) || err != nil {
		t.Fatalf("accepted, but encoding/json says %v", err)
	}
	var model string
	var stream bool
	if raw, ok := members["model"]; ok {
		if err := json.Unmarshal(raw, &model); err != nil {
			t.Fatal(err)
		}
	}
	if raw, ok := members["stream"]; ok {
		if err := json.Unmarshal(raw, &stream); err != nil {
			t.Fatal(err)
		}
	}
	if model != got.model || stream != got.stream {
		t.Fatalf("encoding/json has %q, %v; got %+v", model, stream, got)
	}
	var folded struct { // a struct takes the last key in any case: there must be no other
		Model  string
		Stream bool
	}
	if err := json.Unmarshal(body, &folded); err != nil || folded.Model != model || folded.Stream != stream {
		t.Fatalf("a struct has %+v, %v; got %+v", folded, err, got)
	}
}

func decode(t *testing.T, body []byte) map[string]any {
	t.Helper()
	var v map[string]any
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

func encode(t *testing.T, v any) string {
	t.Helper()
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func BenchmarkScanJSON(b *testing.B) {
	text := strings.Repeat("The quick brown fox jumps over the lazy dog. ", 9)
	small := `{"model":"gpt-4o-mini","stream":true,"temperature":0.7,"max_tokens":256,"messages":[{"role":"system","content":"` +
		text + `"},{"role":"user","content":"` + text + `\n"}]}`
	for _, c := range []struct{ name, body string }{
		{"1KB", small},
		{"15MiB", `{"model":"gpt-4o","image":"` + strings.Repeat("QUJD", 15<<18) + `"}`},
		{"dense", `{"model":"text-embedding-3-small","input":[` + strings.Repeat(`{"a":[1,2.5]},`, 5000) + `0]}`},
	} {
		b.Run(c.name, func(b *testing.B) {
			body := []byte(c.body)
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := scanJSON(body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
