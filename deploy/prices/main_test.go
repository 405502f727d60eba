package main

import (
	"os"
	"strings"
	"testing"
)

// TestPricesCanonical: prices.json is what this command writes, so that the next update changes prices only.
func TestPricesCanonical(t *testing.T) {
	text, err := os.ReadFile("../../prices.json")
	if err != nil {
		t.Fatal(err)
	}
	again, err := merge(text, text)
	if err != nil {
		t.Fatal(err)
	}
	if string(again) != string(text) {
		t.Error("prices.json is not as the command writes it: go run ./deploy/prices prices.json")
	}
}

// TestMerge: what a newer list says counts, and what it lacks stays.
func TestMerge(t *testing.T) {
	const current = `{"as_of": "2026-08-21", "models": [
		{"provider": "a", "model": "gone", "names": ["gone-too"], "input": 1, "output": 2},
		{"provider": "a", "model": "older", "as_of": "2026-01-01", "input": 1},
		{"provider": "a", "model": "stays", "names": ["alias", "listed"], "input": 1, "output": 2}]}`
	const newer = `{"as_of": "2026-11-29", "models": [
		{"provider": "a", "model": "stays", "mode": "chat", "input": 3.50, "output": 4, "shut_down": "2027-01-01"},
		{"provider": "a", "model": "listed", "mode": "chat", "input": 5},
		{"provider": "a", "model": "m-2025-03-01", "mode": "chat", "input": 6},
		{"provider": "a", "model": "m-2025-06-01", "mode": "chat", "input": 7},
		{"provider": "a", "model": "free-of-prices", "mode": "ocr"},
		{"provider": "a", "model": "voice", "mode": "audio_transcription",
			"per_unit": {"input_second": 0.000283333333333, "output_second": 1e-4}},
		{"provider": "a", "model": "painter", "mode": "image_generation", "per_unit": {"input_image": 0.02}},
		{"provider": "a", "model": "speaker", "mode": "audio_speech", "per_unit": {"input_character": 1.5e-05}},
		{"provider": "a", "model": "seeker", "mode": "chat", "web_search_call": {"high": 0.012, "low": 0.005}},
		{"provider": "anthropic", "model": "c", "mode": "chat", "input": 3, "cache_write": 3.75,
			"service_tier": {"batch": {"input": 1.5, "cache_write": 1.875}}}]}`
	got, err := merge([]byte(newer), []byte(current))
	if err != nil {
		t.Fatal(err)
	}
	_, models, _ := strings.Cut(string(got), "\"models\": [\n")
	const want = `{"provider": "a", "model": "gone", "names": ["gone-too"], "as_of": "2026-08-21", "input": 1, "output": 2},
{"provider": "a", "model": "listed", "input": 5},
{"provider": "a", "model": "m-2025-03-01", "input": 6},
{"provider": "a", "model": "m-2025-06-01", "names": ["m"], "input": 7},
{"provider": "a", "model": "older", "as_of": "2026-01-01", "input": 1},
{"provider": "a", "model": "painter", "output_picture": 0.02},
{"provider": "a", "model": "seeker", "web_search_call_low": 0.005, "web_search_call_high": 0.012},
{"provider": "a", "model": "speaker", "input_character": 15},
{"provider": "a", "model": "stays", "names": ["alias"], "input": 3.5, "output": 4},
{"provider": "a", "model": "voice", "input_minute": 0.017},
{"provider": "anthropic", "model": "c", "input": 3, "cache_write": 3.75, "cache_write_1h": 6, "service_tier": ` +
		`{"batch": {"input": 1.5, "cache_write": 1.875, "cache_write_1h": 3}}}
]
}
`
	if models != want {
		t.Errorf("models:\n%s\nwant\n%s", models, want)
	}
	for _, bad := range []string{``, `{}`, `{"as_of": "2026-11-29", "models": []}`,
		`{"as_of": "2026-11-29", "models": [{"provider": "a", "model": "m", "per_unit": {"fortnight": 1}}]}`,
		`{"as_of": "2026-11-29", "models": [{"provider": "a", "model": "m", "input": 1}, {"provider": "a", "model": "m", "input": 2}]}`} {
		if _, err := merge([]byte(bad), []byte(current)); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
}
