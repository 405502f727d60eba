// These tests use the commands as an operator does: arguments and environment in, output and
// error out. demo has its own file.
package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// runProgram runs a command until it ends.
func runProgram(t testing.TB, env map[string]string, args ...string) (stdout string, err error) {
	t.Helper()
	if strings.HasPrefix(env["DATABASE_URL"], "postgres:") && (args[0] == "backup" || args[0] == "restore") {
		requireSQLite(t, "it copies the database's file")
	}
	var out, log bytes.Buffer
	p := &program{getenv: func(name string) string { return env[name] }, stdout: &out, stderr: &log}
	err = p.run(t.Context(), args)
	if log.Len() > 0 {
		t.Errorf("%v wrote to stderr: %s", args, log.String())
	}
	return out.String(), err
}

// A servedProgram is a program that serves until stop.
type servedProgram struct {
	addr     string
	out, log *syncBuffer
	stop     func() error
}

// serveProgram runs a command that serves, until stop or the end of the test.
func serveProgram(t *testing.T, env map[string]string, args ...string) *servedProgram {
	t.Helper()
	s := &servedProgram{out: &syncBuffer{}, log: &syncBuffer{}}
	ctx, cancel := context.WithCancel(context.Background())
	addr, done := make(chan net.Addr, 1), make(chan error, 1)
	p := &program{getenv: func(name string) string { return env[name] }, stdout: s.out, stderr: s.log,
		ready: func(a net.Addr) { addr <- a }}
	go func() { done <- p.run(ctx, args) }()
	select {
	case a := <-addr:
		s.addr = a.String()
	case err := <-done:
		cancel()
		t.Fatalf("%v: %v", args, err)
	}
	s.stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { _ = s.stop() })
	return s
}

// status makes a GET request with a bearer credential and returns the status.
func (s *servedProgram) status(t *testing.T, path, credential string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+s.addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+credential)
	res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	return res.StatusCode
}

func serveEnv(t *testing.T) map[string]string {
	return map[string]string{"LISTEN_ADDR": "127.0.0.1:0", "DATA_DIR": filepath.Join(t.TempDir(), "data"),
		"DRAIN_DELAY": "0s", "ALLOW_PRIVATE_UPSTREAMS": "true"}
}

// findCredential finds the one token or key in an output.
func findCredential(t *testing.T, prefix, out string) string {
	t.Helper()
	found := map[string]bool{}
	var last string
	for _, s := range regexp.MustCompile(prefix+`[0-9A-Za-z]{8}_[0-9A-Za-z]{49}`).FindAllString(out, -1) {
		last, found[s] = s, true
	}
	if len(found) != 1 {
		t.Fatalf("%d credentials with %s in %q", len(found), prefix, out)
	}
	return last
}

// TestFirstStart: with only DATA_DIR set, a server creates what it needs, readable by its owner
// only whatever the umask, and prints the first key once. The test is not parallel because the
// umask belongs to the process.
func TestFirstStart(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	env := serveEnv(t)
	s := serveProgram(t, env)
	key := findCredential(t, manageKeyPrefix, string(s.out.bytes()))
	if got := s.status(t, "/manage/projects", key); got != 200 {
		t.Errorf("the printed key: %d", got)
	}
	for name, want := range map[string]os.FileMode{"": 0o700, "llm-proxy.db": 0o600, "llm-proxy.db-wal": 0o600,
		"llm-proxy.db-shm": 0o600, keyFileName: 0o600, lockFileName: 0o600} {
		if info, err := os.Stat(filepath.Join(env["DATA_DIR"], name)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%q: %v %v, want %v", name, info, err, want)
		}
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	sealing, err := os.ReadFile(filepath.Join(env["DATA_DIR"], keyFileName))
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{key, strings.TrimSpace(string(sealing))} {
		if bytes.Contains(s.log.bytes(), []byte(secret)) {
			t.Error("a secret is in the log")
		}
	}
	if !bytes.Contains(s.log.bytes(), []byte("keep it apart from the database")) {
		t.Errorf("no warning about the key file: %s", s.log.bytes())
	}
	again := serveProgram(t, env, "serve")
	if out := again.out.bytes(); len(out) > 0 {
		t.Errorf("the second start prints %s", out)
	}
	if got := again.status(t, "/manage/projects", key); got != 200 {
		t.Errorf("the key after a restart: %d", got)
	}
}

// TestFirstStartWithProviderKey: OPENAI_API_KEY with an empty database creates a project and a
// token, and calls work at once.
func TestFirstStartWithProviderKey(t *testing.T) {
	t.Parallel()
	provider := newFakeProvider(t)
	env := serveEnv(t)
	env["OPENAI_API_KEY"], env["OPENAI_API_URL"], env["MANAGEMENT_TOKEN"] = provider.key, provider.url, goodToken
	s := serveProgram(t, env)
	out := string(s.out.bytes())
	token := findCredential(t, tokenPrefix, out)
	if strings.Contains(out, manageKeyPrefix) || strings.Contains(out, goodToken) ||
		strings.Contains(out, provider.key) {
		t.Errorf("printed: %s", out)
	}
	provider.setScript(func(c *providerConn,
		_ recordedRequest) bool {
		return c.reply(200, `{"object":"list","data":[]}`)
	})
	if got := s.status(t, "/v1/models", token); got != 200 ||
		provider.lastRequest(t).header.Get("Authorization") != "Bearer "+provider.key {
		t.Errorf("a call with the printed token: %d", got)
	}
	if got := s.status(t, "/manage/projects", goodToken); got != 200 {
		t.Errorf("MANAGEMENT_TOKEN: %d", got)
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	again := serveProgram(t, env)
	waitFor(t, "the message that OPENAI_API_KEY is ignored",
		func() bool { return bytes.Contains(again.log.bytes(), []byte("OPENAI_API_KEY is ignored")) })
	if len(again.out.bytes()) > 0 {
		t.Errorf("the second start prints %s", again.out.bytes())
	}
	for _, secret := range []string{token, goodToken, provider.key} {
		if bytes.Contains(s.log.bytes(), []byte(secret)) || bytes.Contains(again.log.bytes(), []byte(secret)) {
			t.Error("a secret is in the log")
		}
	}
}

// TestSecondProcess: only one process can use a data directory.
func TestSecondProcess(t *testing.T) {
	t.Parallel()
	env := serveEnv(t)
	serveProgram(t, env)
	if _, err := runProgram(t, env, "serve"); err == nil ||
		!strings.Contains(err.Error(), "another llm-proxy is using") {
		t.Errorf("the second process: %v", err)
	}
}

// TestSecondProcessOnDatabase: two processes cannot share a database file, by whatever names they
// reach it.
func TestSecondProcessOnDatabase(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(dir string, first, second map[string]string){
		"the same DATABASE_URL": func(dir string, first, second map[string]string) {
			first["DATABASE_URL"] = "sqlite:" + dir + "/x.db"
			second["DATABASE_URL"] = first["DATABASE_URL"]
		},
		"a path with dots": func(dir string, first, second map[string]string) {
			first["DATABASE_URL"] = "sqlite:" + dir + "/x.db"
			second["DATABASE_URL"] = "sqlite:" + dir + "/sub/../x.db"
		},
		"the other's DATA_DIR": func(dir string, first, second map[string]string) {
			second["DATABASE_URL"] = "sqlite:" + first["DATA_DIR"] + "/llm-proxy.db"
		},
		"a symbolic link": func(dir string, first, second map[string]string) {
			first["DATABASE_URL"] = "sqlite:" + dir + "/x.db"
			second["DATABASE_URL"] = "sqlite:" + dir + "/link.db"
			mustSymlink(t, dir+"/x.db", dir+"/link.db")
		},
		"a link in the second's DATA_DIR": func(dir string, first, second map[string]string) {
			mustSymlink(t, first["DATA_DIR"]+"/llm-proxy.db", second["DATA_DIR"]+"/llm-proxy.db")
		},
		"a link that waited for the database": func(dir string, first, second map[string]string) {
			mustSymlink(t, second["DATA_DIR"]+"/llm-proxy.db", first["DATA_DIR"]+"/llm-proxy.db")
		},
		"a link to DATA_DIR": func(dir string, first, second map[string]string) {
			mustSymlink(t, first["DATA_DIR"], dir+"/linked")
			second["DATA_DIR"] = dir + "/linked"
		},
		"DATA_DIR is the database's directory": func(dir string, first, second map[string]string) {
			first["DATABASE_URL"] = "sqlite:" + dir + "/x.db"
			second["DATA_DIR"], second["DATABASE_URL"] = dir, first["DATABASE_URL"]
		},
		"a hard link": func(dir string, first, second map[string]string) {
			first["DATABASE_URL"] = "sqlite:" + dir + "/x.db"
			second["DATABASE_URL"] = "sqlite:" + dir + "/hard.db"
			mustOverwrite(t, dir+"/x.db", "")
			if err := os.Link(dir+"/x.db", dir+"/hard.db"); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, first, second := t.TempDir(), serveEnv(t), serveEnv(t)
			for _, d := range []string{dir + "/sub", first["DATA_DIR"], second["DATA_DIR"]} {
				if err := os.MkdirAll(d, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			set(dir, first, second)
			first["ENCRYPTION_KEY"], second["ENCRYPTION_KEY"] = goodKey, goodKey
			live := serveProgram(t, first)
			for _, command := range []string{"serve", "restore"} {
				args := []string{command}
				if command == "restore" {
					args = []string{command, filepath.Join(dir, "none"), "--revoke=none"}
				}
				if _, err := runProgram(t, second, args...); err == nil ||
					!strings.Contains(err.Error(), "another llm-proxy is using") {
					t.Errorf("%s by the second process: %v", command, err)
				}
			}
			if err := live.stop(); err != nil {
				t.Fatal(err)
			}
			if err := serveProgram(t, second).stop(); err != nil {
				t.Errorf("the second process after the first: %v", err)
			}
		})
	}
}

func mustSymlink(t *testing.T, target, name string) {
	t.Helper()
	if err := os.Symlink(target, name); err != nil {
		t.Fatal(err)
	}
}

// TestPortTaken: a server that cannot listen prints no secret, because secrets are shown only
// once.
func TestPortTaken(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	env := serveEnv(t)
	env["LISTEN_ADDR"], env["MANAGEMENT_TOKEN"] = taken.Addr().String(), ""
	out, err := runProgram(t, env, "serve")
	if err == nil || !strings.Contains(err.Error(), "another program listens there") ||
		strings.Contains(out, manageKeyPrefix) {
		t.Errorf("got %v, printed %q", err, out)
	}
}

// TestListenErrors: each reason why an address cannot be listened on has its remedy.
func TestListenErrors(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		addr string
		err  error
		want string
	}{
		{"127.0.0.1:80", syscall.EADDRINUSE, "set another address"},
		{"192.0.2.1:80", syscall.EADDRNOTAVAIL, "listen on :80"},
		{"127.0.0.1:80", syscall.EACCES, "CAP_NET_BIND_SERVICE"},
		{"unix:/run/x/http.sock", syscall.ENOENT, "create the directory"},
		{"unix:/run/x/http.sock", syscall.EACCES, "chown"},
	} {
		cause := &net.OpError{Op: "listen", Err: os.NewSyscallError("bind", tt.err)}
		err := describeListenError("LISTEN_ADDR", tt.addr, cause)
		if text := err.Error(); !strings.Contains(text, tt.want) || !strings.Contains(text, "LISTEN_ADDR "+tt.addr) {
			t.Errorf("%s: %s", tt.addr, text)
		}
	}
}

// TestFileErrors: an error of the file system names the path and what to do. (The tests may run as root, who may
// read everything.)
func TestFileErrors(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]string{
		syscall.EACCES: "chown", syscall.EPERM: "chown", syscall.EROFS: "mount it writable",
		syscall.ENOSPC: "free some space", syscall.ENOENT: "check that the path",
	} {
		if got := fileRemedy(&fs.PathError{Op: "open", Path: "x", Err: err}); !strings.Contains(got, want) {
			t.Errorf("%v: %s", err, got)
		}
	}
	for name, spoil := range map[string]func(dir string) error{
		lockFileName:   func(dir string) error { return os.Mkdir(filepath.Join(dir, lockFileName), 0o700) },
		"llm-proxy.db": func(dir string) error { return os.Mkdir(filepath.Join(dir, "llm-proxy.db"), 0o700) },
		keyFileName:    func(dir string) error { return os.Mkdir(filepath.Join(dir, keyFileName), 0o700) },
	} {
		env := serveEnv(t)
		if err := errors.Join(os.MkdirAll(env["DATA_DIR"], 0o700), spoil(env["DATA_DIR"])); err != nil {
			t.Fatal(err)
		}
		if _, err := runProgram(t, env, "serve"); err == nil ||
			!strings.Contains(err.Error(), filepath.Join(env["DATA_DIR"], name)) ||
			!strings.Contains(err.Error(), "; ") {
			t.Errorf("%s is a directory: %v", name, err)
		}
	}
}

// TestNoticesAtStart: doctor and the log of a start show notices about the environment.
func TestNoticesAtStart(t *testing.T) {
	t.Parallel()
	env := serveEnv(t)
	var log, out syncBuffer
	p := &program{getenv: func(name string) string { return env[name] }, stdout: &out, stderr: &log,
		environment: []string{"RETENTON=1d", "HTTPS_PROXY=http://user:pw-canary@proxy:1"}}
	ctx, cancel := context.WithCancel(t.Context())
	p.ready = func(net.Addr) { cancel() }
	if err := p.run(ctx, []string{"serve"}); err != nil {
		t.Fatal(err)
	}
	if err := p.run(t.Context(), []string{"doctor"}); err != nil {
		t.Fatal(err)
	}
	for where, text := range map[string]string{"the log": string(log.bytes()), "doctor": string(out.bytes())} {
		if !strings.Contains(text, "did you mean RETENTION?") ||
			!strings.Contains(text, "set UPSTREAM_PROXY") ||
			strings.Contains(text, "canary") {
			t.Errorf("%s: %s", where, text)
		}
	}
}

// TestMissingDatabase: a database that has disappeared is an error, even if other databases were
// used in between.
func TestMissingDatabase(t *testing.T) {
	t.Parallel()
	env := serveEnv(t)
	other := map[string]string{"DATABASE_URL": "sqlite:" +
		filepath.Join(t.TempDir(), "a-rather-long-name-for-a-database.db")}
	maps.Copy(other, env)
	for _, e := range []map[string]string{other, env, other, env} {
		if err := serveProgram(t, e).stop(); err != nil {
			t.Fatal(err)
		}
	}
	for name, e := range map[string]map[string]string{filepath.Join(env["DATA_DIR"], "llm-proxy.db"): env,
		strings.TrimPrefix(other["DATABASE_URL"], "sqlite:"): other} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		if _, err := runProgram(t, e, "serve"); err == nil || !strings.Contains(err.Error(), "is missing or empty") {
			t.Errorf("without its database: %v", err)
		}
		if _, err := os.Stat(name); err == nil {
			t.Error("a new database was created silently")
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	t.Parallel()
	for _, arg := range []string{"--help", "-h", "help", "backup --help"} {
		out, err := runProgram(t, nil, strings.Fields(arg)...)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range settings(&config{}) {
			if !strings.Contains(out, "  "+s.name+" ") || !strings.Contains(out, s.help) {
				t.Errorf("%s does not mention %s", arg, s.name)
			}
		}
		for _, c := range []string{"serve", "demo", "doctor", "healthcheck", "backup FILE", "restore FILE", "version"} {
			if !strings.Contains(out, c) {
				t.Errorf("%s does not mention %s", arg, c)
			}
		}
	}
	if out, err := runProgram(t, nil, "version"); err != nil || !strings.HasPrefix(out, "llm-proxy ") ||
		strings.Count(out, "\n") != 1 {
		t.Errorf("version: %q %v", out, err)
	}
}

func TestWrongArguments(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ args, want string }{
		{"sevre", "unknown command \"sevre\""}, {"--listen", "unknown command"}, {"serve now",
			"unexpected argument"}, {"demo x", "unexpected argument"},
		{"healthcheck x", "unexpected argument"}, {"doctor --providers", "usage:"}, {"doctor --provider x",
			"usage:"}, {"backup", "usage:"},
		{"backup a b", "usage:"}, {"backup --x", "usage:"}, {"restore", "usage:"}, {"restore a b",
			"usage:"}, {"restore a --revoke=some", "usage:"},
		{"restore a --revoke=all --revoke=none", "usage:"}, {"restore --revoke=all", "usage:"},
	} {
		out, err := runProgram(t, map[string]string{"DATA_DIR": t.TempDir()}, strings.Fields(tt.args)...)
		if err == nil || !strings.Contains(err.Error(), tt.want) || out != "" {
			t.Errorf("%s: %v, printed %q", tt.args, err, out)
		}
	}
	if _, err := runProgram(t, map[string]string{"LOG_LEVEL": "x", "LISTEN_ADDR": "x"}, "serve"); err == nil ||
		!strings.Contains(err.Error(), "LOG_LEVEL") || !strings.Contains(err.Error(), "LISTEN_ADDR") {
		t.Errorf("a wrong configuration: %v", err)
	}
}

// testCertificate writes a self-signed certificate and key for llm.example.test. The certificate
// is valid for the given time from now.
func testCertificate(t *testing.T, dir string, valid time.Duration) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"},
		DNSNames:  []string{"*.example.test"},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(valid)}
	der, err := x509.CreateCertificate(rand.Reader, leaf, leaf, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for name, b := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der},
		key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func TestHealthcheck(t *testing.T) {
	t.Parallel()
	live := serveProgram(t, serveEnv(t))
	_, port, err := net.SplitHostPort(live.addr)
	if err != nil {
		t.Fatal(err)
	}
	answers := func(status int) string {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "http://"+live.addr+"/healthz")
			w.WriteHeader(status)
		}))
		t.Cleanup(srv.Close)
		return strings.TrimPrefix(srv.URL, "http://")
	}
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	for _, tt := range []struct{ addr, want string }{
		{live.addr, ""}, {":" + port, ""}, {"0.0.0.0:" + port, ""}, {"[::]:" + port, ""}, {"localhost:" + port, ""},
		{dead.Addr().String(), "no answer"}, {answers(503), "answers 503"}, {answers(307), "answers 307"}, {"nowhere",
			"LISTEN_ADDR: must be"},
	} {
		// The other settings are invalid, which healthcheck ignores.
		out, err := runProgram(t, map[string]string{"LISTEN_ADDR": tt.addr, "LOG_LEVEL": "wrong"}, "healthcheck")
		if out != "" || (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.addr, err, tt.want)
		}
	}
}

// TestHealthcheckTLS: healthcheck trusts only the server's own certificate.
func TestHealthcheckTLS(t *testing.T) {
	t.Parallel()
	env := serveEnv(t)
	env["TLS_CERT_FILE"], env["TLS_KEY_FILE"] = testCertificate(t, t.TempDir(), time.Hour)
	live := serveProgram(t, env)
	check := func(cert string) error {
		_, err := runProgram(t, map[string]string{"LISTEN_ADDR": live.addr, "TLS_CERT_FILE": cert}, "healthcheck")
		return err
	}
	if err := check(env["TLS_CERT_FILE"]); err != nil {
		t.Error(err)
	}
	other, otherKey := testCertificate(t, t.TempDir(), time.Hour)
	for _, cert := range []string{other, otherKey, "", filepath.Join(t.TempDir(), "none")} {
		if err := check(cert); err == nil {
			t.Errorf("TLS_CERT_FILE=%q: healthcheck succeeds", cert)
		}
	}
}

// runDoctor runs the doctor and checks what holds for every run.
func (p *testProxy) runDoctor(env map[string]string, args ...string) (lines []string, err error) {
	p.t.Helper()
	all := maps.Clone(p.env)
	maps.Copy(all, env)
	out, err := runProgram(p.t, all, append([]string{"doctor"}, args...)...)
	lines = strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	failed := false
	for _, l := range lines {
		level, rest, _ := strings.Cut(l, " ")
		failed = failed || level == "FAIL"
		if level != "ok" && level != "warn" && level != "FAIL" || !strings.Contains(rest, ": ") || level != "ok" &&
			!strings.Contains(rest, "; ") {
			p.t.Errorf("a line without level, finding or remedy: %q", l)
		}
	}
	if failed != (err != nil) {
		p.t.Errorf("the exit is %v after\n%s", err, out)
	}
	for _, s := range append([]string{goodKey, goodToken}, p.secrets...) {
		for _, form := range secretEncodings(s) {
			if strings.Contains(out, form) || err != nil && strings.Contains(err.Error(), form) {
				p.t.Errorf("a secret is in %s", out)
			}
		}
	}
	return lines, err
}

// hasFinding reports whether a line starts with the level and subject and contains text.
func hasFinding(lines []string, level, what, text string) bool {
	for _, l := range lines {
		l, ok := strings.CutPrefix(l, level)
		if ok && strings.HasPrefix(strings.TrimLeft(l, " "), what) && strings.Contains(l, text) {
			return true
		}
	}
	return false
}

// TestDoctorBesideServer: doctor finds no problem beside a running server and changes nothing.
func TestDoctorBesideServer(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"MANAGEMENT_TOKEN": goodToken})
	p.chat()
	p.waitSettled()
	lines, err := p.runDoctor(nil)
	if err != nil {
		t.Errorf("%v: %s", err, strings.Join(lines, "\n"))
	}
	for _, what := range []string{"configuration:", "clock:", "file modes:", "disk:", "database: intact",
		"open calls: 0", "encryption key:", "provider keys: 1, all can be decrypted"} {
		// the machine's own
		if !hasFinding(lines, "ok", what, "") && (what != "disk:" || !hasFinding(lines, "warn", what, "")) {
			t.Errorf("no line for %s in\n%s", what, strings.Join(lines, "\n"))
		}
	}
	if n := len(p.provider.received()); n != 1 {
		t.Errorf("the provider was called %d times", n-1)
	}
	if res := p.chat(); res.status != 200 {
		t.Errorf("a call after the doctor: %d", res.status)
	}
}

func TestDoctorProvider(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.manage("POST", "/manage/projects/"+p.project+"/upstreams",
		`{"name":"claude","provider":"anthropic","base_url":"`+p.provider.url+`",`+
			`"api_key":"`+p.provider.key+`"}`, 201, nil)
	status := func(code int) func(*providerConn, recordedRequest) bool {
		return func(c *providerConn, r recordedRequest) bool {
			return c.reply(code, r.header.Get("Authorization")+" is wrong")
		}
	}
	for _, tt := range []struct {
		script              func(*providerConn, recordedRequest) bool
		level, what, remedy string
	}{
		{status(200), "ok", "the provider accepts the key", ""},
		{status(401), "FAIL", "key refused", "set a valid key"},
		{status(403), "FAIL", "key refused", "set a valid key"},
		{status(307), "warn", "answers 307", ""},
		{status(500), "warn", "answers 500", ""},
		{func(c *providerConn, _ recordedRequest) bool { return c.reset() }, "FAIL", "unreachable",
			"check the base URL"},
	} {
		p.provider.setScript(tt.script)
		lines, _ := p.runDoctor(nil, "--provider")
		for _, name := range []string{"(primary)", "(claude)"} {
			found := false
			for _, l := range lines {
				found = found || strings.HasPrefix(l, tt.level) && strings.Contains(l, name) &&
					strings.Contains(l, tt.what) && strings.Contains(l, tt.remedy)
			}
			if !found {
				t.Errorf("no line %s %s %s in\n%s", tt.level, name, tt.what, strings.Join(lines, "\n"))
			}
		}
	}
	for _, r := range p.provider.received() {
		target := "/v1/models"
		if r.header.Get("Anthropic-Version") != "" {
			target += "?limit=1000"
		}
		if r.method != "GET" || r.target != target {
			t.Errorf("the provider got %s %s", r.method, r.target)
		}
	}
	if r := p.provider.lastRequest(t); r.header.Get("X-Api-Key") != p.provider.key ||
		r.header.Get("Anthropic-Version") == "" {
		t.Error("the anthropic upstream was not called with Anthropic's headers")
	}
}

// TestDoctorFindings: doctor finds each problem, on a separate stopped server.
func TestDoctorFindings(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it damages the database file")
	for _, tt := range []struct {
		name              string
		ill               func(t *testing.T, p *testProxy)
		env               map[string]string
		level, what, text string
	}{
		{"database readable by others", func(t *testing.T, p *testProxy) {
			mustChmod(t, p.instance.cfg.databaseFile, 0o644)
		}, nil,
			"FAIL", "file modes:", "chmod 600"},
		{"key file readable by others", func(t *testing.T, p *testProxy) {
			mustChmod(t, filepath.Join(p.env["DATA_DIR"], keyFileName), 0o640)
		}, nil,
			"FAIL", "file modes:", "0640"},
		{"directory open to others", func(t *testing.T, p *testProxy) { mustChmod(t, p.env["DATA_DIR"], 0o755) }, nil,
			"warn", "file modes:", "chmod 700"},
		{"key file missing", func(t *testing.T, p *testProxy) {
			mustRemove(t, filepath.Join(p.env["DATA_DIR"], keyFileName))
		}, nil,
			"FAIL", "encryption key:", "is missing"},
		{"another key", nil, map[string]string{"ENCRYPTION_KEY": goodKey},
			"FAIL", "encryption key:", "is not the one"},
		{"database damaged", func(t *testing.T, p *testProxy) { damageDatabase(t, p.instance.cfg.databaseFile) }, nil,
			"FAIL", "database:", "llm-proxy restore FILE"},
		{"database no database", func(t *testing.T, p *testProxy) {
			mustOverwrite(t, p.instance.cfg.databaseFile, "text")
		}, nil,
			"FAIL", "database:", "llm-proxy restore FILE"},
		{"database empty", func(t *testing.T, p *testProxy) { mustOverwrite(t, p.instance.cfg.databaseFile, "") }, nil,
			"warn", "database:", "missing or empty"},
		{"database newer", func(t *testing.T, p *testProxy) { execSQL(t, p, `PRAGMA user_version = 99`) }, nil,
			"FAIL", "database:", "newer than this program"},
		{"provider key moved", func(t *testing.T, p *testProxy) {
			execSQL(t, p, `UPDATE upstreams SET base_url = 'http://127.0.0.1:1/v1'`)
		}, nil, "FAIL", "upstream up_", "cannot be decrypted"},
		{"base URL no longer allowed", nil, map[string]string{"ALLOW_PRIVATE_UPSTREAMS": "false", "OPENAI_API_URL": ""},
			"FAIL", "upstream up_", "base URL"},
		{"rows open for long", func(t *testing.T, p *testProxy) {
			execSQL(t, p, `INSERT INTO begun (batch, calls) VALUES (1, '[[1,1,1,1,"x","",0,"",0,0]]')`)
		}, nil, "warn", "open calls:", "1 have been open"},
		{"database of before", func(t *testing.T, p *testProxy) {
			execSQL(t, p, `DROP VIEW running`)
			execSQL(t, p, `DROP TABLE begun`)
			execSQL(t, p, `PRAGMA user_version = 10`)
		}, nil, "ok", "open calls:", "not checked"},
		{"a call from the future", func(t *testing.T, p *testProxy) {
			execSQL(t, p, `INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address,
				outcome, usage_source, input_tokens, output_tokens)
				VALUES (9000000000000000000, 1, 1, 1, 'x', '', 0, '', 'ok', 'none', 0, 0)`)
		}, nil, "warn", "clock:", "behind the latest call"},
		{"no data directory", nil, map[string]string{"DATA_DIR": filepath.Join(t.TempDir(), "none")},
			"warn", "data directory:", "does not exist"},
		{"wrong settings", nil, map[string]string{"LOG_LEVEL": "loud", "MANAGEMENT_TOKEN": "short-canary"},
			"FAIL", "configuration:", "LOG_LEVEL"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			p.allowErrors = true
			if err := p.stop(); err != nil {
				t.Fatal(err)
			}
			if tt.ill != nil {
				tt.ill(t, p)
			}
			lines, _ := p.runDoctor(tt.env)
			if !hasFinding(lines, tt.level, tt.what, tt.text) {
				t.Errorf("no line %s %s … %s in\n%s", tt.level, tt.what, tt.text, strings.Join(lines, "\n"))
			}
			if strings.Contains(strings.Join(lines, "\n"), "short-canary") {
				t.Error("the value of a secret setting is shown")
			}
		})
	}
}

func mustChmod(t *testing.T, name string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(name, mode); err != nil {
		t.Fatal(err)
	}
}

func mustRemove(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
}

func mustOverwrite(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func execSQL(t *testing.T, p *testProxy, text string) {
	t.Helper()
	requireSQLite(t, "it changes the database's file")
	db, err := openSQLite(p.instance.cfg.databaseFile, 1, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.Exec(text)
	if err = errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestDoctorThresholds checks limits of the machine that a test cannot reach, with substitutes.
func TestDoctorThresholds(t *testing.T) {
	t.Parallel()
	now := time.Now()
	space := func(free uint64, err error) func(*diagnosis) {
		return func(d *diagnosis) { d.checkFreeSpace("/data", func(string) (uint64, error) { return free, err }) }
	}
	clock := func(year int) func(*diagnosis) {
		return func(d *diagnosis) { d.now = time.Date(year, 1, 2, 3, 4, 5, 0, time.UTC); d.checkClock() }
	}
	certificate := func(valid time.Duration, at time.Time) func(*diagnosis) {
		cfg := &config{}
		cfg.tlsCert, cfg.tlsKey = testCertificate(t, t.TempDir(), valid)
		return func(d *diagnosis) { d.cfg, d.now = cfg, at; d.checkCertificate() }
	}
	modes := func(mode os.FileMode) func(*diagnosis) {
		name := filepath.Join(t.TempDir(), "key")
		mustOverwrite(t, name, goodKey)
		mustChmod(t, name, mode)
		return func(d *diagnosis) {
			d.cfg, d.getenv = &config{dataDir: filepath.Join(name, "none")}, func(string) string { return name }
			d.checkFileModes()
		}
	}
	for _, tt := range []struct {
		do   func(*diagnosis)
		want string
	}{
		{space(1<<30, nil), "ok    disk"}, {space(1<<30-1, nil), "warn  disk"}, {space(100<<20, nil), "warn  disk"},
		{space(100<<20-1, nil), "FAIL  disk"}, {space(0, errors.New("x")), "warn  disk"},
		{clock(1970), "FAIL  clock"}, {clock(2024), "FAIL  clock"}, {clock(2026), "ok    clock"}, {clock(2101),
			"FAIL  clock"},
		{certificate(15*24*time.Hour, now), "ok    TLS"}, {certificate(13*24*time.Hour, now), "warn  TLS"},
		{certificate(-time.Hour, now), "FAIL  TLS"}, {certificate(time.Hour, now.Add(-72*time.Hour)), "FAIL  TLS"},
		{modes(0o604), "warn  file modes: ENCRYPTION_KEY_FILE"}, {modes(0o640), "ok    file modes"},
	} {
		var b bytes.Buffer
		d := &diagnosis{out: &b, now: now, cfg: &config{}}
		tt.do(d)
		if !strings.HasPrefix(b.String(), tt.want) || (d.failed > 0) != strings.HasPrefix(tt.want, "FAIL") {
			t.Errorf("got %q, want %q", b.String(), tt.want)
		}
	}
}

// TestBackupUnderLoad: a backup during calls is consistent, complete and readable by its owner
// only; when it is restored elsewhere with the key, its tokens work.
func TestBackupUnderLoad(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it makes a backup") // before its clients begin, which would call for ever
	p := newTest(t, nil)
	var clients sync.WaitGroup
	end := make(chan struct{})
	for range 3 {
		clients.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
					p.chat()
				}
			}
		})
	}
	file := filepath.Join(p.dir, "backup.db")
	waitFor(t, "some calls", func() bool { _, _, ended := p.databaseSizes(); return ended > 0 })
	out, err := runProgram(t, p.env, "backup", file)
	close(end)
	clients.Wait()
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the backup: %v %v", info, err)
	}
	st, err := openReadOnly(file, true)
	if err != nil {
		t.Fatal(err)
	}
	defer st.close()
	var calls, counted, settled, summed int64
	if err := st.readDB.QueryRow(`SELECT
		(SELECT count(*) FROM requests WHERE outcome <> 'refused'), (SELECT sum(request_count) FROM tokens),
		(SELECT count(*) FROM requests WHERE outcome <> 'open'),
		(SELECT coalesce(sum(calls), 0) FROM usage_sums WHERE grain = 'day' AND token <> 0)`).
		Scan(&calls, &counted, &settled, &summed); err != nil {
		t.Fatal(err)
	}
	if calls == 0 || calls != counted || settled != summed {
		t.Errorf("the copy is not consistent: %d calls, %d counted; %d settled, %d summed", calls, counted, settled,
			summed)
	}
	for _, want := range []string{file, "1 project", "1 token", pluralize(calls, "call", "calls"),
		p.instance.sealer.id()} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in %q", want, out)
		}
	}

	elsewhere := serveEnv(t)
	elsewhere["ENCRYPTION_KEY_FILE"] = filepath.Join(p.env["DATA_DIR"], keyFileName)
	if out, err = runProgram(t, elsewhere, "restore", file, "--revoke=none"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if info, err = os.Stat(filepath.Join(elsewhere["DATA_DIR"], "llm-proxy.db")); err != nil ||
		info.Mode().Perm() != 0o600 {
		t.Fatalf("the restored database: %v %v", info, err)
	}
	s := serveProgram(t, elsewhere)
	p.provider.setScript(modelsScript)
	if got := s.status(t, "/v1/models", p.token); got != 200 {
		t.Errorf("a token of the backup: %d", got)
	}
	if got := s.status(t, "/manage/projects", p.adminKey); got != 200 || len(s.out.bytes()) > 0 {
		t.Errorf("a management key of the backup: %d", got)
	}
}

func modelsScript(c *providerConn, _ recordedRequest) bool {
	return c.reply(200, `{"object":"list","data":[]}`)
}

// TestBackupRefused: backup overwrites no file, and a failed backup leaves none behind.
func TestBackupRefused(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it copies the file")
	p := newTest(t, nil)
	there := filepath.Join(p.dir, "there")
	if err := os.WriteFile(there, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(p.dir, "link")
	if err := os.Symlink(filepath.Join(p.dir, "target"), link); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{there, link, filepath.Join(p.dir, "none", "x"), p.dir} {
		if out, err := runProgram(t, p.env, "backup", file); err == nil {
			t.Errorf("backup %s: %s", file, out)
		}
	}
	if b, err := os.ReadFile(there); err != nil || string(b) != "precious" {
		t.Errorf("the existing file: %q %v", b, err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	damageDatabase(t, p.instance.cfg.databaseFile)
	fresh := filepath.Join(p.dir, "fresh.db")
	if out, err := runProgram(t, p.env, "backup", fresh); err == nil ||
		!strings.Contains(err.Error(), "no backup was made") {
		t.Errorf("backup of a damaged database: %v %s", err, out)
	}
	if err := os.Remove(p.instance.cfg.databaseFile); err != nil {
		t.Fatal(err)
	}
	if _, err := runProgram(t, p.env, "backup", fresh); err == nil ||
		!strings.Contains(err.Error(), "there is no database") {
		t.Errorf("backup of nothing: %v", err)
	}
	if left, _ := filepath.Glob(fresh + "*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// damageDatabase overwrites pages in the middle of a database file.
func damageDatabase(t *testing.T, file string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil || len(b) < 16<<10 {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	for i := 4096; i < len(b)-4096; i++ {
		b[i] ^= 0xa5
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// dirChecksums returns the names and checksums of the relevant files in a directory.
func dirChecksums(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(e.Name(), "-shm") || strings.HasSuffix(e.Name(), "-wal") && len(b) == 0 {
			continue // readers create these
		}
		files[e.Name()] = fmt.Sprintf("%x", sha256.Sum256(b))
	}
	return files
}

// A restoreTest is a stopped proxy whose backup is older than its revocations.
type restoreTest struct {
	*testProxy
	backup string
	tokens map[string]string // by what happened to them after the backup
	keys   map[string]string
}

func newRestoreTest(t *testing.T) *restoreTest {
	r := &restoreTest{testProxy: newTest(t, nil), tokens: map[string]string{}, keys: map[string]string{}}
	ids := map[string]string{}
	for _, name := range []string{"kept", "revoked", "rotated", "shortened", "used", "before"} {
		ids[name], r.tokens[name] = r.newToken(`"name":"` + name + `","max_requests":2`)
	}
	r.manage("DELETE", "/manage/tokens/"+ids["before"], "", 200, nil)
	for _, name := range []string{"kept", "revoked", "lowered"} {
		var v struct{ ID, Key string }
		r.manage("POST", "/manage/keys", `{"name":"`+name+`","role":"admin"}`, 201, &v)
		ids["key "+name], r.keys[name] = v.ID, v.Key
		r.secrets = append(r.secrets, v.Key)
	}
	r.backup = filepath.Join(r.dir, "backup.db")
	if out, err := runProgram(t, r.env, "backup", r.backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var rotated struct{ Token string }
	r.manage("DELETE", "/manage/tokens/"+ids["revoked"], "", 200, nil)
	r.manage("POST", "/manage/tokens/"+ids["rotated"]+"/rotate", `{"overlap_minutes":0}`, 200, &rotated)
	r.manage("PATCH", "/manage/tokens/"+ids["shortened"],
		`{"expires_at":"`+time.Now().Add(1500*time.Millisecond).UTC().Format(time.RFC3339Nano)+`"}`, 200, nil)
	r.manage("DELETE", "/manage/keys/"+ids["key revoked"], "", 200, nil)
	r.manage("PATCH", "/manage/keys/"+ids["key lowered"], `{"role":"viewer"}`, 200, nil)
	r.tokens["new value"] = rotated.Token
	_, r.tokens["made since"] = r.newToken(`"name":"made since"`)
	r.provider.setScript(modelsScript)
	for range 2 {
		r.do("GET", "/v1/models", "", "Authorization", "Bearer "+r.tokens["used"])
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	return r
}

// TestRestoreChoices (UP7): restoring a backup from before a revocation changes nothing until the
// operator chooses what happens to what was revoked since.
func TestRestoreChoices(t *testing.T) {
	t.Parallel()
	r := newRestoreTest(t)
	before := dirChecksums(t, r.env["DATA_DIR"])
	out, err := runProgram(t, r.env, "restore", r.backup)
	if err == nil || !strings.Contains(err.Error(), "nothing was changed") {
		t.Fatalf("without a choice: %v", err)
	}
	for _, want := range []string{"1 token valid, but revoked now", "1 token with the value from before",
		"1 token with a later expiry", "1 token with fewer counted requests", "2 management keys with rights",
		"1 valid token fewer", "become valid again", "--revoke=since", "--revoke=all", "--revoke=none"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in %s", want, out)
		}
	}
	if strings.Contains(out, "projects active") { // there is none, and lines with zero are left out
		t.Errorf("printed %s", out)
	}
	if after := dirChecksums(t, r.env["DATA_DIR"]); !maps.Equal(before, after) {
		t.Errorf("a refused restore left %v; before it there was %v", after, before)
	}
	for _, tt := range []struct {
		choice string
		tokens map[string]int
		keys   map[string]int // POST /manage/keys, for admins only
	}{
		{"none", map[string]int{"kept": 200, "revoked": 200, "rotated": 200, "shortened": 200, "used": 200,
			"before": 401, "new value": 401, "made since": 401},
			map[string]int{"kept": 200, "revoked": 200, "lowered": 200}},
		{"since", map[string]int{"kept": 200, "revoked": 401, "rotated": 401, "shortened": 401, "used": 429,
			"before": 401, "new value": 401, "made since": 401},
			map[string]int{"kept": 200, "revoked": 401, "lowered": 403}},
		{"all", map[string]int{"kept": 401, "revoked": 401, "rotated": 401, "shortened": 401, "used": 401,
			"before": 401, "new value": 401, "made since": 401},
			map[string]int{"kept": 401, "revoked": 401, "lowered": 401}},
	} {
		t.Run(tt.choice, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			if err := os.CopyFS(dir, os.DirFS(r.env["DATA_DIR"])); err != nil {
				t.Fatal(err)
			}
			// The lock file names the database by its path.
			env := maps.Clone(r.env)
			env["DATA_DIR"], env["LISTEN_ADDR"] = dir, "127.0.0.1:0"
			out, err := runProgram(t, env, "restore", "--revoke="+tt.choice, r.backup)
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			aside, _ := filepath.Glob(filepath.Join(dir, "llm-proxy.db.before-restore-*Z"))
			if len(aside) != 1 || !strings.Contains(out, aside[0]) {
				t.Fatalf("moved aside: %v; %s", aside, out)
			}
			if f, err := inspectDatabase(t.Context(), aside[0]); err != nil || f.tokens != 8 {
				t.Errorf("the previous database: %+v %v", f, err)
			}
			s := serveProgram(t, env)
			waitFor(t, "the shortened token's end", func() bool {
				return tt.choice != "since" || s.status(t, "/v1/models", r.tokens["shortened"]) == 401
			})
			for name, want := range tt.tokens {
				if got := s.status(t, "/v1/models", r.tokens[name]); got != want {
					t.Errorf("the token %q: %d, want %d", name, got, want)
				}
			}
			for name, want := range tt.keys {
				if got := s.status(t, "/manage/keys", r.keys[name]); got != want {
					t.Errorf("the key %q: %d, want %d", name, got, want)
				}
			}
			if tt.choice == "all" {
				if got := s.status(t, "/manage/keys", findCredential(t, manageKeyPrefix, out)); got != 200 {
					t.Errorf("the new key: %d", got)
				}
			} else if strings.Contains(out, manageKeyPrefix) {
				t.Errorf("a key is in %s", out)
			}
		})
	}
}

// TestRestoreRefused: restore finds every problem of a backup before it changes anything.
func TestRestoreRefused(t *testing.T) {
	t.Parallel()
	r := newRestoreTest(t)
	good, err := os.ReadFile(r.backup)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, b []byte) string {
		name = filepath.Join(r.dir, name)
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	damaged := file("damaged", good)
	damageDatabase(t, damaged)
	newer := append([]byte(nil), good...)
	newer[63] = 200 // user_version, big-endian at 60
	old := append([]byte(nil), good...)
	copy(old[60:64], []byte{0, 0, 0, 0})
	withLog := file("with-log", good)
	file("with-log-wal", []byte("x"))
	wrongKey := map[string]string{"ENCRYPTION_KEY": goodKey}
	before := dirChecksums(t, r.env["DATA_DIR"])
	for _, tt := range []struct {
		name, file, want string
		env              map[string]string
	}{
		{"missing", filepath.Join(r.dir, "none"), "no such file", nil},
		{"damaged", damaged, "cannot be used", nil},
		{"cut", file("cut", good[:len(good)/2]), "cannot be used", nil},
		{"text", file("text", []byte("not a database, not at all")), "cannot be used", nil},
		{"empty", file("empty", nil), "cannot be used", nil},
		{"newer", file("newer", newer), "newer llm-proxy", nil},
		{"not ours", file("not-ours", old), "not a database of llm-proxy", nil},
		{"a copy in use", withLog, "only llm-proxy backup makes complete copies", nil},
		{"itself", r.instance.cfg.databaseFile, "is the database itself", nil},
		{"a directory", r.dir, "is a directory", nil},
		{"wrong key", r.backup, "the encryption key is not the one", wrongKey},
	} {
		env := maps.Clone(r.env)
		maps.Copy(env, tt.env)
		out, err := runProgram(t, env, "restore", tt.file, "--revoke=none")
		if err == nil || !strings.Contains(err.Error(), tt.want) ||
			!strings.Contains(err.Error(), "nothing was changed") {
			t.Errorf("%s: %v %s", tt.name, err, out)
		}
		if after := dirChecksums(t, r.env["DATA_DIR"]); !maps.Equal(before, after) {
			t.Errorf("%s: left %v", tt.name, after)
		}
	}
	fresh := serveEnv(t)
	if _, err := runProgram(t, fresh, "restore", r.backup, "--revoke=none"); err == nil ||
		!strings.Contains(err.Error(), "the encryption key is missing") {
		t.Errorf("without a key: %v", err)
	}
	if after := dirChecksums(t, fresh["DATA_DIR"]); len(after) != 1 { // the lock file
		t.Errorf("without a key: left %v", after)
	}
	r.start()
	if _, err := runProgram(t, r.env, "restore", r.backup, "--revoke=none"); err == nil ||
		!strings.Contains(err.Error(), "another llm-proxy is using") {
		t.Errorf("with the server running: %v", err)
	}
}

// TestRestoreAfterFailure: restore works if the current database is damaged, missing, or left
// half-way by a restore that was killed.
func TestRestoreAfterFailure(t *testing.T) {
	t.Parallel()
	r := newRestoreTest(t)
	file := r.instance.cfg.databaseFile
	restore := func(choice string) (string, error) {
		return runProgram(t, r.env, "restore", r.backup, "--revoke="+choice)
	}
	damageDatabase(t, file)
	r.allowErrors = true
	if out, err := restore("since"); err == nil || !strings.Contains(out, "cannot be read") ||
		!strings.Contains(err.Error(), "needs a current database") {
		t.Errorf("since, beside a damaged database: %v %s", err, out)
	}
	if out, err := restore("none"); err != nil {
		t.Fatalf("none, beside a damaged database: %v %s", err, out)
	}
	// As if killed between the two renames: no database, a stale log, and the copy.
	for _, suffix := range []string{"-wal", "-shm", ".restoring", ".restoring-wal"} {
		if err := os.WriteFile(file+suffix, []byte("stale"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := runProgram(t, r.env, "serve"); err == nil || !strings.Contains(err.Error(), "is missing or empty") {
		t.Errorf("a start without the database: %v", err)
	}
	if out, err := restore("since"); err == nil || !strings.Contains(out, "There is no current database") {
		t.Errorf("since, without a database: %v %s", err, out)
	}
	if out, err := restore("none"); err != nil {
		t.Fatalf("none, without a database: %v %s", err, out)
	}
	if left, _ := filepath.Glob(file + ".restoring*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	r.start()
	var tokens struct{ Data []json.RawMessage }
	r.manage("GET", "/manage/tokens", "", 200, &tokens)
	if len(tokens.Data) != 7 {
		t.Errorf("%d tokens after the restore", len(tokens.Data))
	}
}

// keyFile returns the path of the key file of a proxy without a setting for the key.
func (p *testProxy) keyFile() string { return filepath.Join(p.env["DATA_DIR"], keyFileName) }

// countSealedWith counts the values encrypted with a key in the database file and its log.
func (p *testProxy) countSealedWith(kid [8]byte) (n int) {
	p.t.Helper()
	head := append([]byte{sealVersion}, kid[:]...)
	if p.instance.cfg.postgres != nil {
		text := string(dumpTestDatabase(p.t, p.env["DATABASE_URL"]))
		return strings.Count(text, hex.EncodeToString(head)) +
			strings.Count(text, base64.StdEncoding.EncodeToString(head))
	}
	files, err := filepath.Glob(p.instance.cfg.databaseFile + "*")
	if err != nil {
		p.t.Fatal(err)
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			p.t.Fatal(err)
		}
		n += bytes.Count(text, head) + bytes.Count(text, []byte(base64.StdEncoding.EncodeToString(head)))
	}
	return n
}

// TestRekey (KC13): provider keys, the audit trail and stored content open with the new key, and
// nothing encrypted with the old key is left in the file.
func TestRekey(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.enableContent()
	for range 20 {
		p.manage("POST", "/manage/projects/"+p.project+"/upstreams",
			`{"name":"u","priority":5,"api_key":"`+p.provider.key+`"}`, 201, nil)
	}
	p.chat()
	before := p.lastCall()
	old := p.instance.sealer
	if out, err := runProgram(t, p.env, "rekey"); err == nil ||
		!strings.Contains(err.Error(), "another llm-proxy is using") {
		t.Errorf("while serving: %v %s", err, out)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	was, err := os.ReadFile(p.keyFile())
	if err != nil || p.countSealedWith(old.kid) == 0 {
		t.Fatal("the test does not find encrypted values: ", err)
	}
	out, err := runProgram(t, p.env, "rekey")
	if err != nil || !strings.Contains(out, "21 provider keys") ||
		strings.Contains(out, strings.TrimSpace(string(was))) {
		t.Fatalf("%v %s", err, out)
	}
	if n := p.countSealedWith(old.kid); n != 0 {
		t.Errorf("%d values with the old key are left", n)
	}
	now, err := os.ReadFile(p.keyFile())
	if info, e := os.Stat(p.keyFile()); err != nil || e != nil || info.Mode().Perm() != 0o600 || bytes.Equal(now, was) {
		t.Errorf("the key file: %v %v", err, e)
	}
	if _, err := os.Stat(filepath.Join(p.env["DATA_DIR"], newKeyFileName)); err == nil {
		t.Error("the new key file is still there")
	}
	p.start()
	if res := p.chat(); res.status != 200 ||
		p.provider.lastRequest(t).header.Get("Authorization") != "Bearer "+p.provider.key {
		t.Errorf("got %d %s", res.status, res.body)
	}
	if v := p.getContent(before.ID); v.Request.Text == nil || !strings.Contains(*v.Request.Text, promptCanary) {
		t.Error("stored content is lost")
	}
	k := p.verifyAudit()
	entries, err := p.instance.store.auditPage(t.Context(), 0, 1<<60)
	if err != nil || !k.intact() || entries[len(entries)-1].action != actionReveal ||
		entries[len(entries)-2].action != actionRekey {
		t.Errorf("the trail: %v %v", k.problems, err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.keyFile(), was, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openInstance(t.Context(), p.instance.cfg, p.instance.log, nil); err == nil ||
		!strings.Contains(err.Error(), "not the one") {
		t.Errorf("the server starts with the old key: %v", err)
	}
}

// TestRekeyFile: a key from a setting is replaced by one in an operator's file, and the command
// refuses keys that do not fit.
func TestRekeyFile(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"ENCRYPTION_KEY": goodKey})
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	file := func(name, text string) string {
		name = filepath.Join(p.dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	next := file("next", strings.Repeat("0123456789abcdef", 3)+"fedcba9876543210\n")
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "is in a setting"},
		{[]string{"--force"}, rekeyUsage},
		{[]string{next, next}, rekeyUsage},
		{[]string{filepath.Join(p.dir, "none")}, "cannot be read"},
		{[]string{file("short", "abc")}, "must be 32 random bytes"},
		{[]string{file("same", goodKey)}, "is already in use"},
	} {
		if out, err := runProgram(t, p.env, append([]string{"rekey"}, c.args...)...); err == nil ||
			!strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v %s", c.args, err, out)
		}
	}
	wrong := file("wrong", strings.Repeat("7654a210fedcba98", 2)+strings.Repeat("13579bdf02468ace", 2))
	env := map[string]string{"ENCRYPTION_KEY": strings.Repeat("a1b2c3d4e5f60718", 2) +
		strings.Repeat("293a4b5c6d7e8f90", 2), "DATA_DIR": p.env["DATA_DIR"], "DATABASE_URL": p.env["DATABASE_URL"]}
	if _, err := runProgram(t, env, "rekey", wrong); err == nil || !strings.Contains(err.Error(), "not the one") {
		t.Errorf("with a key that opens nothing: %v", err)
	}
	for range 2 { // the second run has nothing to do
		if out, err := runProgram(t, p.env, "rekey", next); err != nil ||
			!strings.Contains(out, "ENCRYPTION_KEY_FILE="+next) {
			t.Errorf("%v %s", err, out)
		}
	}
	delete(p.env, "ENCRYPTION_KEY")
	p.env["ENCRYPTION_KEY_FILE"] = next
	p.start()
	if res := p.chat(); res.status != 200 {
		t.Errorf("got %d %s", res.status, res.body)
	}
}

// TestRekeyBroken: a row that cannot be decrypted stops the command before it changes anything,
// and the error names the row.
func TestRekeyBroken(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	const move = `UPDATE upstreams SET base_url = 'https://elsewhere.example.com/v1'`
	if _, err := p.instance.store.writeDB.Exec(move); err != nil {
		t.Fatal(err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := runProgram(t, p.env, "rekey"); err == nil || !strings.Contains(err.Error(), p.upstream) ||
		!strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("got %v", err)
	}
	// The unused new key does no harm, and nothing was changed half-way.
	p.start()
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if out, err := runProgram(t, map[string]string{"DATA_DIR": t.TempDir()}, "rekey"); err == nil ||
		!strings.Contains(err.Error(), "there is no database") {
		t.Errorf("without a database: %v %s", err, out)
	}
}

// TestRekeyKilled (KC13): if rekey is killed at any moment, the next run finishes the change, and
// there are never rows with both keys.
func TestRekeyKilled(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	for range 30 {
		p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"u","api_key":"`+p.provider.key+`"}`, 201,
			nil)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	command := func() *exec.Cmd {
		cmd := exec.Command(os.Args[0], "rekey")
		cmd.Env = []string{"LLM_PROXY_TEST_PROGRAM=with arguments", "DATA_DIR=" + p.env["DATA_DIR"],
			"DATABASE_URL=" + p.env["DATABASE_URL"]}
		return cmd
	}
	begin := time.Now()
	if out, err := command().CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	takes := time.Since(begin)
	for range 12 {
		cmd := command()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(mathrand.N(takes + takes/4))
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if out, err := command().CombinedOutput(); err != nil {
			t.Fatalf("after a kill: %v %s", err, out)
		}
		p.start()
		if res := p.chat(); res.status != 200 {
			t.Errorf("got %d %s", res.status, res.body)
		}
		if ups, err := p.instance.store.projectUpstreams(t.Context(),
			p.instance.registry.projects[1].state.Load().seq); err != nil || len(ups) != 31 {
			t.Errorf("%d upstreams: %v", len(ups), err)
		} else {
			for i := range ups {
				if u := newUpstream(&ups[i], p.instance.sealer, true, p.instance.registry.health); u.configErr != nil {
					t.Errorf("upstream %s: %v", u.id, u.configErr)
				}
			}
		}
		if err := p.stop(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRekeyInterrupted: a start during an unfinished rekey says what to do.
func TestRekeyInterrupted(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	was, err := os.ReadFile(p.keyFile())
	if err != nil {
		t.Fatal(err)
	}
	if out, err := runProgram(t, p.env, "rekey"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	next := filepath.Join(p.env["DATA_DIR"], newKeyFileName) // as if it had been killed before the last step
	if err := os.Rename(p.keyFile(), next); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.keyFile(), was, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openInstance(t.Context(), p.instance.cfg, p.instance.log, nil); err == nil ||
		!strings.Contains(err.Error(), "finish it with: llm-proxy rekey") {
		t.Errorf("the error of the start is %v", err)
	}
	if out, err := runProgram(t, p.env, "rekey"); err != nil || !strings.Contains(out, "1 provider key,") {
		t.Errorf("%v %s", err, out)
	}
	if err := os.WriteFile(next, nil, 0o600); err != nil { // as if it had been killed at its first step
		t.Fatal(err)
	}
	if out, err := runProgram(t, p.env, "rekey"); err != nil {
		t.Errorf("%v %s", err, out)
	}
	p.start()
	if res := p.chat(); res.status != 200 {
		t.Errorf("got %d %s", res.status, res.body)
	}
}
