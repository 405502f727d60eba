// These tests attack the server from both sides: floods of HTTP/2 frames by clients, providers that never come to an
// end or break the rules of the protocol, and guessers who measure time.
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Types and flags of HTTP/2 frames.
const (
	h2Data, h2Headers, h2Reset, h2Settings     = 0, 1, 3, 4
	h2Push, h2Ping, h2GoAway, h2Window, h2More = 5, 6, 7, 8, 9
	h2EndStream, h2EndHeaders                  = 1, 4

	h2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
)

// h2Frame returns one frame.
func h2Frame(kind, flags byte, stream uint32, payload string) string {
	head := []byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), kind, flags, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(head[5:], stream)
	return string(head) + payload
}

// h2Setting returns a SETTINGS frame with one setting.
func h2Setting(id uint16, value uint32) string {
	payload := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(nil, id), value)
	return h2Frame(h2Settings, 0, 0, string(payload))
}

// h2Field returns a header field that is not indexed; values of up to 126 bytes.
func h2Field(name, value string) string {
	return "\x00" + string([]byte{byte(len(name))}) + name + string([]byte{byte(len(value))}) + value
}

// h2Request returns the header block of a request for the list of models.
func (p *testProxy) h2Request() string {
	return h2Field(":method", "GET") + h2Field(":scheme", "https") + h2Field(":path", "/v1/models") +
		h2Field(":authority", "llm.example.test") + h2Field("authorization", "Bearer "+p.token)
}

// h2Attacks are the frames that an attacker sends, round by round, without an end.
func (p *testProxy) h2Attacks() map[string]func(round uint32) string {
	request := p.h2Request()
	open := func(stream uint32, flags byte) string { return h2Frame(h2Headers, flags, stream, request) }
	return map[string]func(round uint32) string{
		"rapid reset": func(i uint32) string {
			return open(2*i+1, h2EndStream|h2EndHeaders) + h2Frame(h2Reset, 0, 2*i+1, "\x00\x00\x00\x08")
		},
		"open streams": func(i uint32) string { return open(2*i+1, h2EndStream|h2EndHeaders) },
		"streams without an end": func(i uint32) string {
			return open(2*i+1, h2EndHeaders) + h2Frame(h2Data, 0, 2*i+1, "x")
		},
		"CONTINUATION": func(i uint32) string {
			if i == 0 {
				return open(1, 0)
			}
			return h2Frame(h2More, 0, 1, strings.Repeat(h2Field("a", "b"), 3000))
		},
		"a header that unpacks": func(i uint32) string { // one field of 3 KB in the table, and 12,000 references to it
			long := "\x40\x01a\x7f\x81\x16" + strings.Repeat("x", 2945)
			return h2Frame(h2Headers, h2EndStream|h2EndHeaders, 2*i+1, request+long+strings.Repeat("\xbe", 12_000))
		},
		"SETTINGS": func(uint32) string { return strings.Repeat(h2Setting(4, 65_536), 50) },
		"PING":     func(uint32) string { return strings.Repeat(h2Frame(h2Ping, 0, 0, "12345678"), 50) },
		"empty DATA": func(i uint32) string {
			if i == 0 {
				return open(1, h2EndHeaders)
			}
			return h2Frame(h2Data, 0, 1, "")
		},
		"window":    func(uint32) string { return h2Frame(h2Window, 0, 0, "\x7f\xff\xff\xff") },
		"no frames": func(uint32) string { return "GET / HTTP/1.1\r\n\r\n" },
	}
}

// TestHTTP2Floods (DO3): floods of frames over HTTP/2 (reset streams, streams without an end, header blocks without an
// end or that unpack, SETTINGS and PING whose answers nobody reads) do not keep other clients from being served, run
// no more calls than a connection may, and leave nothing behind.
func TestHTTP2Floods(t *testing.T) {
	t.Parallel()
	cert, key := testCertificate(t, t.TempDir(), time.Hour)
	p := newTest(t, map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "LOG_LEVEL": "error"})
	roots := p.http2(cert).TLSClientConfig.RootCAs
	var most atomic.Int64
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		if r.method == "POST" {
			return chatScript(c, r)
		}
		n := p.instance.running.count() // the provider may learn only later that calls were reset
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		c.waitClosed(hangTimeout)
		return false
	})
	for name, frames := range p.h2Attacks() {
		conn, err := tls.Dial("tcp", strings.TrimPrefix(p.url, "https://"), &tls.Config{RootCAs: roots,
			ServerName: "llm.example.test", NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
		reads := name != "PING" && name != "SETTINGS" // the answers to these are never read
		sent := make(chan int)
		go func() {
			total, _ := io.WriteString(conn, h2Preface+h2Frame(h2Settings, 0, 0, ""))
			for i := range uint32(2000) {
				n, err := io.WriteString(conn, frames(i))
				if total += n; err != nil {
					break
				}
			}
			sent <- total
		}()
		if reads {
			go func() { _, _ = io.Copy(io.Discard, conn) }()
		}
		elapsed := stopwatch(t)
		if res := p.chat(); res.status != 200 || elapsed() > 8*time.Second {
			t.Errorf("%s: another client got %d %v after %v", name, res.status, res.err, elapsed())
		}
		if n := <-sent; name == "CONTINUATION" && n > 16<<20 { // of 30 MB; some MB are buffers
			t.Errorf("%s: the proxy read %d bytes of one header", name, n)
		}
		conn.Close()
		waitFor(t, "the end of all calls after "+name, func() bool {
			return p.instance.running.count() == 0 && p.instance.metrics.openConnections.Load() == 0
		})
	}
	if n := most.Load(); n > 300 {
		t.Errorf("%d calls of one connection ran at a time", n)
	}
}

// A hastyWriter shortens deadlines for reading.
type hastyWriter struct{ http.ResponseWriter }

func (w hastyWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w hastyWriter) SetReadDeadline(at time.Time) error {
	if !at.IsZero() {
		at = time.Now().Add(100 * time.Millisecond)
	}
	return http.NewResponseController(w.ResponseWriter).SetReadDeadline(at)
}

// TestLongRequests: what limits the time for a request's body ends no report or download that takes longer.
func TestLongRequests(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	slow := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err != nil {
			w.WriteHeader(http.StatusRequestTimeout)
			return
		}
		select {
		case <-r.Context().Done():
			w.WriteHeader(http.StatusInternalServerError)
		case <-time.After(300 * time.Millisecond):
		}
	})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.instance.server.serveLogged(hastyWriter{w}, r, slow)
	}))
	t.Cleanup(srv.Close)
	for request, want := range map[string]string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n":                                                   "HTTP/1.1 200 ",
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}":                           "HTTP/1.1 200 ",
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n\r\n": "HTTP/1.1 200 ",
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{":                            "HTTP/1.1 408 ",
	} {
		conn, err := net.Dial("tcp", srv.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(hangTimeout))
		_, _ = io.WriteString(conn, request)
		head := make([]byte, len(want))
		if _, err := io.ReadFull(conn, head); err != nil || string(head) != want {
			t.Errorf("%q: got %q, %v", request, head, err)
		}
		conn.Close()
	}
}

// endless repeats a text until the proxy closes the connection, or a second after it no longer reads. It returns the
// bytes that went out.
func endless(conn net.Conn, text string) (n int) {
	text = strings.Repeat(text, 1+4096/len(text))
	for n < 64<<20 {
		if n > 16<<20 { // more than any limit: from here on it is slower, to spare the machine
			pace(time.Millisecond)
		}
		_ = conn.SetWriteDeadline(time.Now().Add(3 * time.Second))
		m, err := io.WriteString(conn, text)
		if n += m; err != nil {
			return n
		}
	}
	return n
}

// TestEndlessProviders (DO4): an answer over HTTP/1 that never comes to an end, before or after its head, ends the
// call by a limit, and no more of it is read than the limits say.
func TestEndlessProviders(t *testing.T) {
	t.Parallel()
	const head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
	for name, c := range map[string]struct {
		start, repeated string
		broken          bool // the head has left: the answer breaks off
	}{
		"headers":         {head, "X-A: b\r\n", false},
		"one header":      {head + "X-A: ", "b", false},
		"one status line": {"HTTP/1.1 200 ", "b", false},
		"interim answers": {"", "HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n", false},
		"continue":        {"", "HTTP/1.1 100 Continue\r\n\r\n", false},
		"chunk extension": {head + "Transfer-Encoding: chunked\r\n\r\n5;", "a", true},
		"chunk length":    {head + "Transfer-Encoding: chunked\r\n\r\n", "0", true},
		"trailers":        {head + "Transfer-Encoding: chunked\r\n\r\n0\r\n", "X-A: b\r\n", true},
		"empty lines":     {"", "\r\n", false},
		"a switch": {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", "x",
			false},
		"two content lengths": {head + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n", "x", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"UPSTREAM_TIMEOUT": "2s", "STREAM_IDLE_TIMEOUT": "2s",
				"LOG_LEVEL": "error"})
			sent := make(chan int, 8)
			p.provider.setScript(func(conn *providerConn, _ recordedRequest) bool {
				_, _ = io.WriteString(conn, c.start)
				sent <- endless(conn, c.repeated)
				return false
			})
			elapsed := stopwatch(t)
			a := p.chat()
			if a.status != 502 && a.status != 504 && !(c.broken && a.err != nil) || elapsed() > 10*time.Second {
				t.Errorf("got %d %.100s, %v after %v", a.status, a.body, a.err, elapsed())
			}
			if n := <-sent; n > 8<<20 {
				t.Errorf("the proxy read %d bytes", n)
			}
			if row := p.lastCall(); row.Outcome == "ok" {
				t.Errorf("the ledger has %+v", row)
			}
			p.provider.setScript(chatScript)
			if a := p.chat(); a.status != 200 {
				t.Errorf("afterwards: got %d %s", a.status, a.body)
			}
		})
	}
}

// TestHostileHTTP2Providers (DO4): a provider that speaks HTTP/2 against the rules, or within them without an end,
// ends the call by a limit, and the next call works.
func TestHostileHTTP2Providers(t *testing.T) {
	t.Parallel()
	settings := h2Frame(h2Settings, 0, 0, "")
	ok := "\x88" + h2Field("content-type", "application/json") // :status 200
	for name, c := range map[string]struct{ start, repeated string }{
		"no SETTINGS":                   {"", ""},
		"MAX_FRAME_SIZE of 0":           {h2Setting(5, 0), ""},
		"INITIAL_WINDOW_SIZE of 2^32-1": {h2Setting(4, 1<<32-1), ""},
		"window of 0":                   {h2Setting(4, 0), ""},
		"no streams":                    {h2Setting(3, 0), ""},
		"GOAWAY":                        {settings + h2Frame(h2GoAway, 0, 0, strings.Repeat("\x00", 8)), ""},
		"RST_STREAM":                    {settings + h2Frame(h2Reset, 0, 1, "\x00\x00\x00\x07"), ""},
		"not HTTP/2":                    {"HTTP/1.1 200 OK\r\n\r\n", ""},
		"endless SETTINGS":              {settings, h2Setting(4, 65_535)},
		"endless PING":                  {settings, h2Frame(h2Ping, 0, 0, "12345678")},
		"CONTINUATION": {settings + h2Frame(h2Headers, 0, 1, ok),
			h2Frame(h2More, 0, 1, h2Field("a", "b"))},
		"a header that unpacks": {settings + h2Frame(h2Headers, h2EndHeaders, 1, ok+"\x40\x01a\x7f\x81\x16"+
			strings.Repeat("x", 2945)+strings.Repeat("\xbe", 12_000)), ""},
		"interim answers": {settings,
			h2Frame(h2Headers, h2EndHeaders, 1, h2Field(":status", "103"))},
		"PUSH_PROMISE":          {settings + h2Frame(h2Push, h2EndHeaders, 1, "\x00\x00\x00\x02"+ok), ""},
		"DATA before the head":  {settings + h2Frame(h2Data, 0, 1, "x"), ""},
		"window that overflows": {settings, h2Frame(h2Window, 0, 0, "\x7f\xff\xff\xff")},
		"empty DATA": {settings + h2Frame(h2Headers, h2EndHeaders, 1, ok),
			h2Frame(h2Data, 0, 1, "")},
		"a frame that is larger than allowed": {settings + "\xff\xff\xff\x00\x00\x00\x00\x00\x01", "x"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"UPSTREAM_TIMEOUT": "2s", "STREAM_IDLE_TIMEOUT": "2s",
				"LOG_LEVEL": "error"})
			good := newHostileServer(t, p, c.start, c.repeated)
			elapsed := stopwatch(t)
			a := p.chat()
			if a.status != 502 && a.status != 504 && a.err == nil || elapsed() > 12*time.Second {
				t.Errorf("got %d %.100s, %v after %v", a.status, a.body, a.err, elapsed())
			}
			if row := p.lastCall(); row.Outcome == "ok" {
				t.Errorf("the ledger has %+v", row)
			}
			p.replaceBaseURL(good)
			p.provider.setScript(chatScript)
			if a := p.chat(); a.status != 200 {
				t.Errorf("afterwards: got %d %s", a.status, a.body)
			}
		})
	}
}

// newHostileServer starts a provider over TLS that negotiates HTTP/2, sends start, and then repeats a text, if any, or
// waits. It becomes the project's upstream. newHostileServer returns the base URL of the test's good provider.
func newHostileServer(t *testing.T, p *testProxy, start, repeated string) (good string) {
	t.Helper()
	source := httptest.NewTLSServer(nil) // for its certificate
	certificates, root := source.TLS.Certificates, source.Certificate()
	source.Close()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: certificates, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, conn)
			mu.Unlock()
			serving.Go(func() {
				r := bufio.NewReader(conn)
				if _, err := r.Peek(len(h2Preface) + 9); err != nil {
					return
				}
				serving.Go(func() { _, _ = io.Copy(io.Discard, r) })
				time.Sleep(20 * time.Millisecond) // the request is on its way
				_, _ = io.WriteString(conn, start)
				if repeated != "" {
					endless(conn, repeated)
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, conn := range open {
			conn.Close()
		}
		mu.Unlock()
		serving.Wait()
	})
	roots := x509.NewCertPool()
	roots.AddCert(root)
	p.instance.transport.TLSClientConfig = &tls.Config{RootCAs: roots}
	p.replaceBaseURL("https://" + l.Addr().String())
	return p.provider.url
}

// TestTimingOfKeys (AU21): how long the answer to a wrong management key takes does not depend on how much of it is
// right. The medians of interleaved samples must agree; the check itself takes the same steps for all.
func TestTimingOfKeys(t *testing.T) { // not parallel: it measures
	p := newTest(t, map[string]string{"MANAGEMENT_TOKEN": "0a1b2c3d4e5f60718293a4b5c6d7e8f9-test-only"})
	environment := p.env["MANAGEMENT_TOKEN"]
	p.secrets = append(p.secrets, environment)
	withChecksum := func(text string) string {
		sum := checksum([]byte(text[:len(text)-checksumLen]))
		return text[:len(text)-checksumLen] + string(sum[:])
	}
	change := func(text string, at int) string {
		return text[:at] + map[bool]string{true: "b", false: "a"}[text[at] == 'a'] + text[at+1:]
	}
	last := len(p.adminKey) - checksumLen - 1
	unknown, _ := mintCredential(manageKeyPrefix, "")
	for what, pair := range map[string][2]string{
		"MANAGEMENT_TOKEN": {change(environment, 0), change(environment, len(environment)-1)},
		"stored key":       {unknown(), withChecksum(change(p.adminKey, last))},
		"first and last": {withChecksum(change(p.adminKey, last-secretLen+1)),
			withChecksum(change(p.adminKey, last))},
	} {
		agree := false
		for range 5 { // other work on the machine
			var took [2][]time.Duration
			for i := range 2000 {
				start := time.Now()
				if _, err := p.instance.manage.auth.actorByKey(t.Context(), pair[i%2], start); err == nil {
					t.Fatal("a wrong key is accepted")
				}
				took[i%2] = append(took[i%2], time.Since(start))
			}
			slices.Sort(took[0])
			slices.Sort(took[1])
			a, b := took[0][500], took[1][500]
			if agree = (a - b).Abs() <= max(a, b)/5+2*time.Microsecond; agree {
				break
			}
		}
		if !agree {
			t.Errorf("%s: the times of two wrong keys differ", what)
		}
	}
}
