// The filters between provider and client, as plain code: the mask over the
// provider's key, and the headers that go up. However the network cuts an
// answer, the mask gives the same bytes.
package main

import (
	"bytes"
	"net/http"
	"strings"
	"testing"
)

// masked passes chunks through a mask for key and returns all that comes out.
func masked(key string, chunks ...[]byte) (string, bool) {
	m := newKeyMask(key)
	var out []byte
	for _, c := range chunks {
		out = append(out, m.pass(bytes.Clone(c))...)
	}
	return string(append(out, m.end()...)), m.seen
}

func TestKeyMask(t *testing.T) {
	t.Parallel()
	const key = "sk-sksk-aab-sk"
	stars := strings.Repeat("*", len(key))
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{"nothing of it", "nothing of it"},
		{key, stars},
		{"a" + key + "b" + key, "a" + stars + "b" + stars},
		{key + key, stars + stars},
		{"sk-" + key, "sk-" + stars},
		{key[:13], key[:13]}, // all but its last byte: not the key
		{key[:13] + "x" + key, key[:13] + "x" + stars},
		{key[1:] + key[:5], key[1:] + key[:5]},
		{key + "-sksk-aab-sk", stars + "-sksk-aab-sk"},
	} {
		in := []byte(c.in)
		for i := range len(in) + 1 { // every way to cut it in three
			for j := i; j <= len(in); j++ {
				if got, seen := masked(key, in[:i], in[i:j], in[j:]); got != c.want || seen != (c.in != c.want) {
					t.Fatalf("%q cut at %d and %d: got %q, seen %v; want %q", c.in, i, j, got, seen, c.want)
				}
			}
		}
	}
	if got, _ := masked("", []byte("abc")); got != "abc" {
		t.Errorf("without a key: got %q", got)
	}
}

// FuzzKeyMask: the output never has the key, has all else unchanged, and does
// not depend on how the input is cut. cuts gives the lengths of the pieces.
func FuzzKeyMask(f *testing.F) {
	f.Add("secret-key-1", "x", []byte("secret-key-1 and secret-key-"), []byte{3, 9})
	f.Add("aabaabaa", "aab", []byte("aabaabaabaabaa"), []byte{1})
	f.Add("12345678", "\x00", bytes.Repeat([]byte("1234567812"), 9), []byte{8, 1, 0, 7})
	f.Fuzz(func(t *testing.T, key, between string, in, cuts []byte) {
		if checkProviderKey(key) != nil || len(in) > 1<<12 {
			t.Skip()
		}
		in = append(in, between+key+between+key[:len(key)-1]...)
		whole, seen := masked(key, in)
		if strings.Contains(whole, key) || !seen || len(whole) != len(in) {
			t.Fatalf("%q became %q", in, whole)
		}
		for i := range in {
			if whole[i] != in[i] && whole[i] != '*' {
				t.Fatalf("byte %d of %q became %q", i, in, whole)
			}
		}
		if want := strings.ReplaceAll(string(in), key, strings.Repeat("*", len(key))); whole != want {
			t.Fatalf("got %q, want %q", whole, want)
		}
		var chunks [][]byte
		rest := in
		for i := 0; len(rest) > 0 && len(cuts) > 0; i++ {
			n := min(int(cuts[i%len(cuts)]), len(rest))
			if n == 0 && i%len(cuts) == 0 {
				n = 1 // else it never ends
			}
			chunks, rest = append(chunks, rest[:n]), rest[n:]
		}
		if cut, _ := masked(key, append(chunks, rest)...); cut != whole {
			t.Fatalf("in pieces %q, whole %q", cut, whole)
		}
	})
}

// FuzzUpHeader: only names on the list go up, with the values the client sent,
// and never one that its Connection header names, but for Content-Type.
func FuzzUpHeader(f *testing.F) {
	f.Add("Authorization", "Bearer x", "authorization, close")
	f.Add("OpenAI-Beta", "a", "openai-beta")
	f.Add("content-type", "application/json", "Content-Type")
	f.Add("X-Forwarded-For", "1.2.3.4", "")
	f.Add("OpenAI-Organization", "org", "\t,,x")
	f.Fuzz(func(t *testing.T, name, value, connection string) {
		in := http.Header{"User-Agent": {"sdk"}, "Content-Type": {"application/json"}, "Cookie": {"a=b"}, "X-Api-Key": {"k"}}
		name = http.CanonicalHeaderKey(name)
		in[name] = []string{value}
		in["Connection"] = append(in["Connection"], connection)
		out := upHeader(in)
		for n, values := range out {
			if !goesUp(n) || strings.Join(values, "\n") != strings.Join(in[n], "\n") {
				t.Fatalf("%q: %q went up", n, values)
			}
			for listed := range strings.SplitSeq(connection, ",") {
				if n != "Content-Type" && strings.EqualFold(strings.TrimSpace(listed), n) {
					t.Fatalf("%q went up, though for this hop only (%q)", n, connection)
				}
			}
		}
		if out["Content-Type"] == nil {
			t.Fatal("Content-Type was taken away")
		}
		for _, n := range []string{"Authorization", "X-Api-Key", "Api-Key", "Cookie", "Host", "Connection", "Upgrade", "Content-Length",
			"Transfer-Encoding", "Te", "Trailer", "Expect", "Content-Encoding", "Openai-Organization", "Openai-Project", "X-Request-Id"} {
			if out[n] != nil {
				t.Fatalf("%s went up", n)
			}
		}
	})
}
