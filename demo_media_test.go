// These tests hold the demo provider's models, vectors, pictures and sounds to what they claim to be: lists in the caller's
// dialect, vectors of length 1, a PNG that decodes, a WAV of its size, usage on every answer that has it.
package main

import (
	"bytes"
	"encoding/base64"
	"image/png"
	"io"
	"mime/multipart"
	"net/http"
	"testing"
)

func TestDemoProviderModels(t *testing.T) {
	srv := demoServer(t)
	v := demoDecode(t, demoCallTo(t, srv, "GET", "/v1/models", "", ""), 200)
	if v["object"] != "list" || demoAt(v, "data.0.object") != "model" {
		t.Errorf("models: %v", v)
	}
	if v := demoDecode(t, demoCallTo(t, srv, "GET", "/v1/models/a/b", "", ""), 200); v["id"] != "a/b" {
		t.Errorf("model: %v", v)
	}
	demoDecode(t, demoCallTo(t, srv, "GET", "/v1/models/no-such-model", "", ""), 404)
	req, _ := http.NewRequestWithContext(t.Context(), "GET", srv.URL+"/v1/models", nil)
	req.Header.Set("X-Api-Key", demoTestKey)
	req.Header.Set("Anthropic-Version", "2023-06-01")
	res, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if v := demoDecode(t, res, 200); v["has_more"] != false || demoAt(v, "data.0.type") != "model" {
		t.Errorf("Anthropic models: %v", v)
	}
}

func TestDemoProviderMedia(t *testing.T) {
	srv := demoServer(t)
	floats := demoDecode(t, demoPost(t, srv, "/v1/embeddings", `{"model":"m","input":"a","dimensions":8}`), 200)
	coded := demoDecode(t, demoPost(t, srv, "/v1/embeddings",
		`{"model":"m","input":"a","dimensions":8,"encoding_format":"base64"}`), 200)
	b, err := base64.StdEncoding.DecodeString(demoAt(coded, "data.0.embedding").(string))
	if err != nil || len(b) != 8*4 {
		t.Errorf("base64 embedding of %d bytes: %v", len(b), err)
	}
	length := 0.0
	for _, x := range demoAt(floats, "data.0.embedding").([]any) {
		length += x.(float64) * x.(float64)
	}
	if length < 0.999 || length > 1.001 {
		t.Errorf("embedding of squared length %v, want 1", length)
	}
	v := demoDecode(t, demoPost(t, srv, "/v1/images/generations", `{"prompt":"a","n":2}`), 200)
	b, _ = base64.StdEncoding.DecodeString(demoAt(v, "data.1.b64_json").(string))
	if _, err := png.Decode(bytes.NewReader(b)); err != nil {
		t.Errorf("picture: %v", err)
	}
	res := demoPost(t, srv, "/v1/audio/speech", `{"model":"tts-1","input":"a","voice":"alloy"}`)
	b, _ = io.ReadAll(res.Body)
	if res.Header.Get("Content-Type") != "audio/wav" || !bytes.HasPrefix(b, []byte("RIFF")) || len(b) != 4044 {
		t.Errorf("speech: %s, %d bytes", res.Header.Get("Content-Type"), len(b))
	}
	for _, path := range []string{"/v1/audio/transcriptions", "/v1/audio/translations"} {
		var form bytes.Buffer
		w := multipart.NewWriter(&form)
		w.WriteField("model", "gpt-4o-mini-transcribe")
		part, _ := w.CreateFormFile("file", "a.wav")
		part.Write(b)
		w.Close()
		v := demoDecode(t, demoCallTo(t, srv, "POST", path, w.FormDataContentType(), form.String()), 200)
		if v["text"] == "" || demoAt(v, "usage.input_token_details.audio_tokens") != 10.0 {
			t.Errorf("%s: %v", path, v)
		}
	}
}
