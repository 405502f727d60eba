// This file tests whole calls: what the client sends, what the provider gets, what comes back, and the row.
package main

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// TestStreamUsageAddedAndRemoved: the proxy asks for usage, and a client that
// did not ask gets the stream as if it had not.
func TestStreamUsageAddedAndRemoved(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	plain, with := strings.Join(chatEvents(false), ""), strings.Join(chatEvents(true), "")
	if res := p.chat(`"stream":true`); res.body != plain {
		t.Errorf("without asking for usage: %s", res.body)
	}
	if got := p.provider.lastRequest(t); !strings.Contains(got.body, `"include_usage":true`) {
		t.Errorf("the provider got %s", got.body)
	}
	if res := p.chat(`"stream":true`, `"stream_options":{"include_usage":true}`); res.body != with {
		t.Errorf("asking for usage: %s", res.body)
	}
	for _, row := range p.ledger() {
		if row.Outcome != "ok" || row.UsageSource != "exact" || row.OutputTokens != 3 || !row.Stream {
			t.Errorf("the ledger has %+v", row)
		}
	}
}

// TestUpHeaders: an allow-list, and nothing that the client did not send.
func TestUpHeaders(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.do("POST", "/v1/chat/completions", chatBody(), "Authorization", "Bearer "+p.token, "Content-Type", "application/json",
		"Cookie", "a=b", "OpenAI-Organization", "org", "OpenAI-Project", "proj", "OpenAI-Beta", "b", "X-Stainless-Lang", "js",
		"X-Forwarded-For", "1.2.3.4", "Via", "x", "Range", "bytes=0-1", "Idempotency-Key", "i", "Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "X-Custom", "no")
	var names []string
	for name := range p.provider.lastRequest(t).header {
		names = append(names, name)
	}
	slices.Sort(names)
	want := []string{"Authorization", "Content-Length", "Content-Type", "Host", "Idempotency-Key", "Openai-Beta", "Traceparent", "User-Agent", "X-Stainless-Lang"}
	if !slices.Equal(names, want) {
		t.Errorf("the provider got the headers %v, want %v", names, want)
	}
}

// TestHTTP2: over TLS the proxy speaks HTTP/2; calls, streams, cuts and
// revocation are as over HTTP/1.
func TestHTTP2(t *testing.T) {
	t.Parallel()
	cert, key := testCertificate(t, t.TempDir(), time.Hour)
	p := newTest(t, map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key})
	if res := p.chat(); res.status != 200 || res.body != chatResponseBody || res.header.Get("Connection") != "" {
		t.Errorf("unary: got %d %s", res.status, res.body)
	}
	if res := p.chat(`"stream":true`); res.err != nil || res.body != strings.Join(chatEvents(false), "") {
		t.Errorf("stream: got %v %s", res.err, res.body)
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(false)[0])
		return c.reset()
	})
	if res := p.chat(`"stream":true`); res.status == 200 && res.err == nil {
		t.Errorf("a cut stream ended cleanly: %s", res.body)
	}
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(false)[0])
		if res := p.manageAs(p.adminKey, "DELETE", "/manage/tokens/"+p.tokenID, ""); res.status != 200 {
			t.Errorf("revoking: got %d", res.status)
		}
		return !c.waitClosed(10 * time.Second)
	})
	if res := p.chat(`"stream":true`); res.status != 200 || res.err == nil {
		t.Errorf("a revoked token's stream: got %d %v %s", res.status, res.err, res.body)
	}
	if res := p.chat(); res.status != 401 {
		t.Errorf("after revocation: got %d", res.status)
	}
	var outcomes []string
	for _, row := range p.ledger() {
		outcomes = append(outcomes, row.Outcome)
	}
	if want := []string{"ok", "ok", "truncated", "truncated", "refused"}; !slices.Equal(outcomes, want) {
		t.Errorf("the ledger has %v, want %v", outcomes, want)
	}
}
