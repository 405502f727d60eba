// Tests of what clients connect to: unix sockets, sockets handed down, a
// certificate that is renewed while the program runs; and of trace headers.
package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// overSocket makes a call through a unix socket and returns the status.
func overSocket(t *testing.T, path, url string, headers ...string) (int, error) {
	t.Helper()
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://localhost"+url, strings.NewReader(chatBody()))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := tr.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	res.Body.Close()
	return res.StatusCode, nil
}

// TestUnixSocket: calls come in by a socket with the mode that was asked for;
// who they are from is what the proxy in front says, if it is believed.
func TestUnixSocket(t *testing.T) {
	t.Parallel()
	for trusted, want := range map[string]string{"": "", "unix": "192.0.2.7"} {
		p := newTest(t, map[string]string{"TRUSTED_PROXIES": trusted})
		if err := p.stop(); err != nil {
			t.Fatal(err)
		}
		tcp := p.env["LISTEN_ADDR"]
		path := filepath.Join(p.dir, "s")
		p.env["LISTEN_ADDR"], p.env["SOCKET_MODE"] = "unix:"+path, "0600"
		p.start()
		info, err := os.Stat(path)
		if err != nil || info.Mode() != fs.ModeSocket|0o600 {
			t.Errorf("the socket: %v %v", info.Mode(), err)
		}
		status, err := overSocket(t, path, "/v1/chat/completions", "Authorization", "Bearer "+p.token, "Content-Type", "application/json", "X-Forwarded-For", "192.0.2.7")
		if status != 200 {
			t.Errorf("got %d %v", status, err)
		}
		if status, err := overSocket(t, path, "/v1/chat/completions", "Authorization", "Bearer "+p.token, "Content-Type", "application/json"); status != 200 {
			t.Errorf("without X-Forwarded-For: got %d %v", status, err)
		}
		health := &program{getenv: func(name string) string { return p.env[name] }}
		if err := health.run(t.Context(), []string{"healthcheck"}); err != nil {
			t.Error(err)
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); err == nil {
			t.Error("the socket is left behind")
		}
		p.env["LISTEN_ADDR"] = tcp
		p.start()
		if rows := p.ledger(); len(rows) != 2 || rows[0].Address != want || rows[1].Address != "" {
			t.Errorf("TRUSTED_PROXIES=%q: %+v", trusted, rows)
		}
	}
}

// TestUnixSocketTaken: a socket that a dead process left is replaced; one that
// answers, and any other file, is not.
func TestUnixSocketTaken(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	open := func() (net.Listener, error) { return openListener("unix:"+path, 0o660) }
	l, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(); err == nil || !strings.Contains(err.Error(), "another program answers there") {
		t.Errorf("a socket in use: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as if it had been killed
	l.Close()
	if l, err = open(); err != nil {
		t.Errorf("a dead socket: %v", err)
	}
	l.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := open(); err == nil || !strings.Contains(err.Error(), "a file of another kind") {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Error("the file is gone")
	}
	if _, err := openListener("unix:"+filepath.Join(dir, "none", "s"), 0o660); err == nil {
		t.Error("a socket in no directory")
	}
}

// TestSocketActivation: the program serves on a socket that it was handed, and
// refuses to start where it was handed none.
func TestSocketActivation(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	start := func(env string, files ...*os.File) *exec.Cmd {
		// The shell's own process becomes the program, so it knows its number.
		cmd := exec.Command("/bin/sh", "-c", env+` exec "$0"`, os.Args[0])
		cmd.Env = []string{"LLM_PROXY_TEST_PROGRAM=1", "LISTEN_ADDR=systemd", "DATA_DIR=" + filepath.Join(t.TempDir(), "data")}
		cmd.ExtraFiles = files
		return cmd
	}
	cmd := start("LISTEN_FDS=1 LISTEN_PID=$$", f)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	res, err := http.Get("http://" + l.Addr().String() + "/healthz") // waits in the socket until the program takes it
	if err != nil || res.StatusCode != 200 {
		t.Errorf("got %v %v", res, err)
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	for _, env := range []string{"", "LISTEN_FDS=1 LISTEN_PID=1", "LISTEN_FDS=0 LISTEN_PID=$$", "LISTEN_FDS=1 LISTEN_PID=$$"} {
		if out, err := start(env).CombinedOutput(); err == nil || !strings.Contains(string(out), "handed down") {
			t.Errorf("%q: %v %s", env, err, out)
		}
	}
}

// TestCertificateRenewed: new connections get the new certificate, after SIGHUP
// or without; a broken file changes nothing.
func TestCertificateRenewed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cert, key := testCertificate(t, dir, 24*time.Hour)
	p := newTest(t, map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key})
	p.allowErrors = true // the broken file's
	days := func() int {
		conn, err := tls.Dial("tcp", strings.TrimPrefix(p.url, "https://"), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if conn.ConnectionState().NegotiatedProtocol != "h2" {
			t.Error("no HTTP/2")
		}
		return int(time.Until(conn.ConnectionState().PeerCertificates[0].NotAfter).Hours()/24 + 0.5)
	}
	if n := days(); n != 1 {
		t.Fatalf("the certificate has %d days", n)
	}
	ctx, stop := context.WithCancel(t.Context())
	told, done := make(chan os.Signal), make(chan bool)
	go func() { p.in.certificate.watch(ctx, time.Hour, told, p.in.log.Logger); close(done) }()
	told <- syscall.SIGHUP
	testCertificate(t, dir, 48*time.Hour)
	told <- syscall.SIGHUP
	waitFor(t, "the new certificate", func() bool { return days() == 2 })
	if err := os.WriteFile(cert, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	told <- syscall.SIGHUP
	waitFor(t, "the error", func() bool { return strings.Contains(string(p.log.bytes()), "stays in use") })
	if n := days(); n != 2 {
		t.Errorf("after a broken file the certificate has %d days", n)
	}
	stop()
	<-done
	go func() { p.in.certificate.watch(t.Context(), time.Millisecond, nil, p.in.log.Logger) }()
	testCertificate(t, dir, 72*time.Hour)
	waitFor(t, "the newest certificate", func() bool { return days() == 3 })
}

// TestHangup: SIGHUP does not end a server, with a certificate or without.
func TestHangup(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	c := p.startChild()
	for range 3 {
		_ = c.cmd.Process.Signal(syscall.SIGHUP)
	}
	if status := c.chat(p); status != 200 {
		t.Errorf("got %d", status)
	}
}

// TestTraceparent: a well-formed trace goes on as it is and is in the log; any
// other does not go on, nor does what belongs to it.
func TestTraceparent(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	const trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	good := fmt.Sprintf("00-%s-%s-01", trace, span)
	for _, c := range []struct {
		values []string
		ok     bool
	}{
		{[]string{good}, true},
		{[]string{"cc" + good[2:] + "-what-comes-later"}, true},
		{nil, false},
		{[]string{good, good}, false},
		{[]string{good + "-x"}, false},
		{[]string{"cc" + good[2:] + "x"}, false},
		{[]string{"ff" + good[2:]}, false},
		{[]string{strings.ToUpper(good)}, false},
		{[]string{"00-" + strings.Repeat("0", 32) + "-" + span + "-01"}, false},
		{[]string{"00-" + trace + "-" + strings.Repeat("0", 16) + "-01"}, false},
		{[]string{good[:54]}, false},
		{[]string{"00_" + good[3:]}, false},
		{[]string{""}, false},
		{[]string{`00-","level":"error"`}, false},
		{[]string{"cc" + good[2:] + "-" + strings.Repeat("x", 300)}, false},
	} {
		before := strings.Count(string(p.log.bytes()), `"trace_id":"`+trace+`","span_id":"`+span+`"`)
		headers := []string{"Authorization", "Bearer " + p.token, "Content-Type", "application/json", "Tracestate", "a=b"}
		for _, v := range c.values {
			headers = append(headers, "Traceparent", v)
		}
		if res := p.do("POST", "/v1/chat/completions", chatBody(), headers...); res.status != 200 {
			t.Errorf("%q: got %d", c.values, res.status)
		}
		p.settle()
		got := p.provider.last(t).header
		logged := strings.Count(string(p.log.bytes()), `"trace_id":"`+trace+`","span_id":"`+span+`"`) - before
		if c.ok && (got.Get("Traceparent") != c.values[0] || got.Get("Tracestate") != "a=b" || logged != 1) ||
			!c.ok && (got["Traceparent"] != nil || got["Tracestate"] != nil || logged != 0) {
			t.Errorf("%q: the provider got %q and %q, %d lines", c.values, got["Traceparent"], got["Tracestate"], logged)
		}
	}
}
