// Tests of how long a call waits for an upstream that has times of its own: for
// a connection, and for an answer in one piece.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A muteHost takes connections and never says a word on them: a TLS handshake
// with it hangs.
type muteHost struct {
	url   string
	calls atomic.Int64
}

func newMuteHost(t *testing.T) *muteHost {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &muteHost{url: "https://" + l.Addr().String()}
	var serving sync.WaitGroup
	serving.Go(func() {
		var open []net.Conn
		for {
			conn, err := l.Accept()
			if err != nil {
				break
			}
			h.calls.Add(1)
			open = append(open, conn)
		}
		for _, conn := range open {
			conn.Close()
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	return h
}

// addMute gives the project an upstream at a mute host, in front of its first.
func (p *testProxy) addMute(h *muteHost, fields string) string {
	p.t.Helper()
	var up struct{ ID string }
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams",
		fmt.Sprintf(`{"name":"mute","provider":"compatible","api_key":"sk-mute-0123456789","base_url":%q,%s}`, h.url, fields), 201, &up)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"priority":1}`, 200, nil)
	return up.ID
}

// TestConnectTimeout: an upstream that has no connection within its connect_ms is
// left for the next at once, and for all calls until it is tried again.
func TestConnectTimeout(t *testing.T) {
	t.Parallel()
	for _, stream := range []bool{false, true} {
		p, mute := newTest(t, nil), newMuteHost(t)
		id := p.addMute(mute, `"connect_ms":200`)
		begun := time.Now()
		if res := p.chat(fmt.Sprintf(`"stream":%v`, stream)); res.status != 200 || res.err != nil {
			t.Fatalf("got %d %s, %v", res.status, res.body, res.err)
		}
		if d := time.Since(begun); d < 200*time.Millisecond || d > connectTimeout {
			t.Errorf("it took %v", d)
		}
		row := p.lastCall()
		if row.UpstreamID != p.upstream || row.Attempts != 2 || row.AttemptLog[0].Upstream != id || row.AttemptLog[0].Error != "could not be reached in time" || row.OutputTokens != 3 {
			t.Errorf("the ledger has %+v", row)
		}
		if h := p.healthOf(id); h.State != "open" || !strings.Contains(h.Reason, "could not be reached in time") {
			t.Errorf("the key is %+v", h)
		}
		before := mute.calls.Load()
		p.in.health.of(2, "").until.Store(time.Now().Add(time.Hour).UnixMilli()) // a slow machine must not see the probe
		if res := p.chat(); res.status != 200 || mute.calls.Load() != before || p.lastCall().Attempts != 1 {
			t.Errorf("the next call: got %d, after %d attempts", res.status, p.lastCall().Attempts)
		}
	}
}

// TestConnectTimeoutAlone: without another upstream it is an error that says so,
// on record as a call that the provider has not had.
func TestConnectTimeoutAlone(t *testing.T) {
	t.Parallel()
	p, mute := newTest(t, nil), newMuteHost(t)
	id := p.addMute(mute, `"connect_ms":200`)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	p.manage("DELETE", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, "", 200, nil)
	form := "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nx\r\n--b--\r\n"
	auth := []string{"Authorization", "Bearer " + p.token, "Content-Type"}
	for what, call := range map[string]func() answer{
		"unary":  func() answer { return p.chat() },
		"stream": func() answer { return p.chat(`"stream":true`) },
		"verified": func() answer {
			return p.do("POST", "/v1/chat/completions", chatBody(`"stream":true`), append(auth, "application/json", "X-LLM-Proxy-Stream", "verified")...)
		},
		"upload": func() answer {
			return p.do("POST", "/v1/files", form, append(auth, "multipart/form-data; boundary=b")...)
		},
	} {
		begun := time.Now()
		p.refused(what, call(), 504, "upstream_timeout")
		if d := time.Since(begun); d > connectTimeout {
			t.Errorf("%s: it took %v", what, d)
		}
		if row := p.lastCall(); row.Outcome != "upstream_error" || row.Attempts != 1 || row.UsageSource != "none" || row.UpstreamID != id {
			t.Errorf("%s: the ledger has %+v", what, row)
		}
	}
	if h := p.healthOf(id); h.State != "open" {
		t.Errorf("the key is %+v", h)
	}
}

// TestConnectTimeoutIsNoMore: once there is a connection, new or one that stood,
// of HTTP/1.1 or shared by calls over HTTP/2, the answer may take its time.
func TestConnectTimeoutIsNoMore(t *testing.T) {
	t.Parallel()
	for _, http2 := range []bool{false, true} {
		var protocols sync.Map
		slow := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			protocols.Store(r.Proto, true)
			_, _ = io.Copy(io.Discard, r.Body)
			time.Sleep(300 * time.Millisecond)
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, chatAnswer[:20])
			_ = http.NewResponseController(w).Flush()
			time.Sleep(300 * time.Millisecond)
			_, _ = io.WriteString(w, chatAnswer[20:])
		}))
		slow.EnableHTTP2 = http2
		slow.StartTLS()
		t.Cleanup(slow.Close)
		p := newTest(t, nil)
		roots := x509.NewCertPool()
		roots.AddCert(slow.Certificate())
		p.in.transport.TLSClientConfig = &tls.Config{RootCAs: roots}
		p.newUpstream(slow.URL)
		p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"connect_ms":200}`, 200, nil)
		for range 2 { // the second time over connections that stand
			var calls sync.WaitGroup
			for range 3 {
				calls.Go(func() {
					if res := p.chat(); res.status != 200 || res.body != chatAnswer {
						t.Errorf("HTTP/2 %v: got %d %s, %v", http2, res.status, res.body, res.err)
					}
				})
			}
			calls.Wait()
		}
		if _, ok := protocols.Load("HTTP/2.0"); ok != http2 {
			t.Errorf("the provider was asked over HTTP/2: %v, want %v", ok, http2)
		}
	}
}

// TestConnectTimeoutAfterADeadConnection: a connection that stood and turns out
// to be dead is replaced, and the time holds for the new one.
func TestConnectTimeoutAfterADeadConnection(t *testing.T) {
	t.Parallel()
	made := httptest.NewUnstartedServer(nil) // for its certificate
	made.StartTLS()
	t.Cleanup(made.Close)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		raw, err := l.Accept()
		if err != nil {
			return
		}
		conn := tls.Server(raw, &tls.Config{Certificates: made.TLS.Certificates})
		first := &providerConn{Conn: conn}
		_, _ = conn.Read(make([]byte, 64<<10)) // a request without a body, in one piece
		first.reply(200, `{"id":"m","object":"model"}`)
		_, _ = conn.Read(make([]byte, 64<<10)) // the next has no answer
		raw.Close()
		if mute, err := l.Accept(); err == nil { // and the next connection no handshake
			_, _ = io.Copy(io.Discard, mute) // until the transport gives it up
			mute.Close()
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	p := newTest(t, nil)
	roots := x509.NewCertPool()
	roots.AddCert(made.Certificate())
	p.in.transport.TLSClientConfig = &tls.Config{RootCAs: roots}
	p.in.transport.TLSHandshakeTimeout = 3 * time.Second // or the test would wait for it
	p.newUpstream("https://" + l.Addr().String())
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"connect_ms":500}`, 200, nil)
	get := func() answer { return p.do("GET", "/v1/models/m", "", "Authorization", "Bearer "+p.token) }
	if res := get(); res.status != 200 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	begun := time.Now()
	p.refused("after the connection died", get(), 504, "upstream_timeout")
	if d := time.Since(begun); d < 500*time.Millisecond || d > 2500*time.Millisecond {
		t.Errorf("it took %v", d)
	}
}

// TestAnswerTimeout: an answer in one piece that has not begun within the
// upstream's answer_ms is another's; streams and uploads take their time.
func TestAnswerTimeout(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+p.upstream, `{"answer_ms":300}`, 200, nil)
	p.provider.answer(func(c *providerConn, _ recorded) bool { return stall(c) })

	begun := time.Now() // alone
	if res := p.chat(); res.status != 504 || res.code() != "upstream_timeout" {
		t.Errorf("alone: got %d %s", res.status, res.body)
	}
	if d := time.Since(begun); d < 300*time.Millisecond || d > 10*time.Second {
		t.Errorf("alone it took %v", d)
	}
	if row := p.lastCall(); row.Outcome != "upstream_error" || row.Attempts != 1 || row.UsageSource != "estimated" {
		t.Errorf("alone: the ledger has %+v", row)
	}

	second, id := p.addUpstream(`"priority":1`)
	if res := p.chat(); res.status != 200 || res.body != chatAnswer {
		t.Errorf("got %d %s", res.status, res.body)
	}
	row := p.lastCall()
	if row.UpstreamID != id || row.Attempts != 2 || row.AttemptLog[0].Error != "did not answer in time" || row.AttemptLog[0].MS < 300 || row.AttemptLog[0].MS > 10_000 {
		t.Errorf("the ledger has %+v", row)
	}
	if h := p.healthOf(p.upstream); h.State != "ready" { // once is no proof
		t.Errorf("the key is %+v", h)
	}

	// The last one's own time holds, too.
	p.manage("PATCH", "/manage/projects/"+p.project+"/upstreams/"+id, `{"answer_ms":300}`, 200, nil)
	second.answer(func(c *providerConn, _ recorded) bool { return stall(c) })
	if res := p.chat(); res.status != 504 || res.code() != "upstream_timeout" {
		t.Errorf("with two that hang: got %d %s", res.status, res.body)
	}
	p.manage("DELETE", "/manage/projects/"+p.project+"/upstreams/"+id, "", 200, nil)

	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"stateful":true}}`, 200, nil)
	later := func(script func(*providerConn, recorded) bool) func(*providerConn, recorded) bool {
		return func(c *providerConn, r recorded) bool { time.Sleep(600 * time.Millisecond); return script(c, r) }
	}
	p.provider.answer(later(answerChat))
	if res := p.chat(`"stream":true`); res.status != 200 || res.body != strings.Join(chatEvents(false), "") {
		t.Errorf("a stream that begins later: got %d %s", res.status, res.body)
	}
	p.provider.answer(later(always(200, `{"id":"file-1"}`)))
	form := "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nx\r\n--b--\r\n"
	if res := p.do("POST", "/v1/files", form, "Authorization", "Bearer "+p.token, "Content-Type", "multipart/form-data; boundary=b"); res.status != 200 {
		t.Errorf("an upload: got %d %s", res.status, res.body)
	}
	begunSlowly := func(c *providerConn, _ recorded) bool { // a head in time, and the rest later
		_, _ = fmt.Fprintf(c, "HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", len(chatAnswer))
		time.Sleep(600 * time.Millisecond)
		_, err := io.WriteString(c, chatAnswer)
		return err == nil
	}
	p.provider.answer(begunSlowly)
	if res := p.chat(); res.status != 200 || res.body != chatAnswer {
		t.Errorf("an answer that began in time: got %d %s", res.status, res.body)
	}
}
