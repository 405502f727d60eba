// This file tests how openai-go reacts to the limits of the proxy.
package e2e

import (
	"errors"
	"net/http"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
)

// TestLimits: the SDK waits once for a limit that refills soon, and then succeeds; a used-up quota is an error immediately.
func TestLimits(t *testing.T) {
	p := newProxy(t)
	for _, tt := range []struct {
		name     string
		limit    map[string]any
		before   int // calls within the limit
		ok       bool
		requests int // that the SDK sends for the call after them
	}{
		{"a minute", map[string]any{"count": "requests", "max": 10, "per": "minute"}, 10, true, 2},
		{"a month", map[string]any{"count": "requests", "max": 1, "per": "month"}, 1, false, 1},
		{"a lifetime's dollars", map[string]any{"count": "dollars", "max": 0, "per": "lifetime"}, 0, false, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			requests := 0
			token := p.newToken(map[string]any{"policy": map[string]any{"limits": []any{tt.limit}}})
			client := p.client(token, option.WithMiddleware(func(r *http.Request, next option.MiddlewareNext) (*http.Response, error) {
				requests++
				return next(r)
			}))
			for range tt.before {
				if _, err := client.Chat.Completions.New(t.Context(), ask()); err != nil {
					t.Fatal(err)
				}
			}
			hits := len(p.provider.got())
			requests = 0
			_, err := client.Chat.Completions.New(t.Context(), ask())
			if (err == nil) != tt.ok || requests != tt.requests || tt.ok != (len(p.provider.got()) > hits) {
				t.Errorf("after %d requests: %v", requests, err)
			}
			if e, ok := errors.AsType[*openai.Error](err); !tt.ok && (!ok || e.StatusCode != 429 || e.Code != "project_spend_limit_exceeded" || e.Type != "insufficient_quota") {
				t.Errorf("the error is %T %v", err, err)
			}
		})
	}
}
