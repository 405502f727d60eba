// Tests of the strict reader of JSON objects and of policies, on text that
// nobody thought of.
package main

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

// FuzzDecodeObject: it never panics, each refusal is a *fieldError, and what it
// takes means to encoding/json the same.
func FuzzDecodeObject(f *testing.F) {
	for _, s := range []string{`{}`, `{"s":"x","n":1,"b":true,"l":["a"],"r":{"x":1}}`, `{"s":null}`, `{"r":null}`, `{"s":"a","s":"b"}`, `{"S":"a"}`, `{"n":1.0}`, `{"n":1e2}`, `{"n":9223372036854775808}`,
		`{"s":"\ud800"}`, `{"\u0073":"x"}`, `{"s":"x"} `, `{"s":"x"}{}`, `[]`, `{"s"`, "{\"s\":\"\xff\"}", `{"l":[null,"a"]}`, `{"r":[[[[1]]]]}`, `{"k":"secret"}`, ` {"b" : false } `, `{"n":-0}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var s opt[string]
		var k opt[secret]
		var n opt[int64]
		var b opt[bool]
		var l opt[[]string]
		var r opt[json.RawMessage]
		fields := map[string]any{"s": &s, "k": &k, "n": &n, "b": &b, "l": &l, "r": &r}
		if err := decodeObject(body, fields, "r", "n"); err != nil {
			if fe, ok := err.(*fieldError); !ok || fe.msg == "" || len(fe.param) > 70 {
				t.Fatalf("%T %v", err, err)
			}
			return
		}
		var all map[string]json.RawMessage
		if err := json.Unmarshal(body, &all); err != nil {
			t.Fatalf("accepted, but encoding/json says %v", err)
		}
		given := 0
		for name, got := range map[string]any{"s": s.v, "n": n.v, "b": b.v, "l": l.v} {
			want := reflect.New(reflect.TypeOf(got))
			raw, there := all[name]
			if there {
				given++
				if err := json.Unmarshal(raw, want.Interface()); err != nil {
					t.Fatalf("%s: accepted, but encoding/json says %v", name, err)
				}
			}
			if !reflect.DeepEqual(want.Elem().Interface(), got) {
				t.Errorf("%s is %v, encoding/json says %v", name, got, want.Elem())
			}
		}
		for name, set := range map[string]bool{"k": k.set, "r": r.set} {
			if _, there := all[name]; there != set {
				t.Errorf("%s: set is %v", name, set)
			} else if there {
				given++
			}
		}
		if given != len(all) {
			t.Errorf("encoding/json sees %d fields, %d are known", len(all), given)
		}
		if r.given() && !bytes.Equal(r.v, all["r"]) {
			t.Errorf("r is %s, encoding/json says %s", r.v, all["r"])
		}
	})
}

// FuzzParsePolicy: it never panics; a policy that it takes comes back from its
// own text the same, and allows what encoding/json's reading of it allows.
func FuzzParsePolicy(f *testing.F) {
	for _, s := range []string{`{}`, `{"models":[]}`, `{"models":["gpt-4o*","a"],"endpoints":["/v1/*"],"stateful":true}`, `{"models":["*"]}`, `{"models":["**"]}`, `{"models":null}`, `{"Models":[]}`,
		`{"endpoints":["POST /v1/responses"]}`, `{"models":["\u0000"]}`, `[]`, `{"stateful":1}`, `{"models":["a\ud800"]}`} {
		f.Add(s, "gpt-4o-mini")
	}
	f.Fuzz(func(t *testing.T, text, model string) {
		p, err := parsePolicy([]byte(text), true)
		if err != nil {
			if fe, ok := err.(*fieldError); !ok || !strings.HasPrefix(fe.param, "policy") {
				t.Fatalf("%T %v", err, err)
			}
			return
		}
		again, err := parsePolicy([]byte(p.String()), true)
		if err != nil || !reflect.DeepEqual(p, again) {
			t.Fatalf("%v became %s and then %v, %v", p, p.String(), again, err)
		}
		var plain policy
		if err := json.Unmarshal([]byte(text), &plain); err != nil {
			t.Fatal(err)
		}
		if plain.allowsModel(model) != p.allowsModel(model) || plain.Stateful != p.Stateful || plain.allowsEndpoint("GET "+model, model) != p.allowsEndpoint("GET "+model, model) {
			t.Errorf("%s: %v or %v", text, p, plain)
		}
		if _, err := parsePolicy([]byte(text), false); err == nil && p.Stateful {
			t.Error("a token's policy turns stateful endpoints on")
		}
		for _, m := range p.Models {
			if !p.allowsModel(strings.TrimSuffix(m, "*")) {
				t.Errorf("%s does not allow %q", text, m)
			}
		}
	})
}
