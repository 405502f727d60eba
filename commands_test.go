// These tests use the program from outside, as an operator does: arguments and
// environment in, output and error out. First starts and the small commands are
// here; backup, restore, doctor and demo have files of their own.
package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// runProgram runs a command to its end.
func runProgram(t testing.TB, env map[string]string, args ...string) (stdout string, err error) {
	t.Helper()
	var out, log bytes.Buffer
	p := &program{getenv: func(name string) string { return env[name] }, stdout: &out, stderr: &log}
	err = p.run(t.Context(), args)
	if log.Len() > 0 {
		t.Errorf("%v wrote to stderr: %s", args, log.String())
	}
	return out.String(), err
}

// A served program is one that serves until stop.
type served struct {
	addr     string
	out, log *syncBuffer
	stop     func() error
}

// serveProgram runs a command that serves, until stop or the end of the test.
func serveProgram(t *testing.T, env map[string]string, args ...string) *served {
	t.Helper()
	s := &served{out: &syncBuffer{}, log: &syncBuffer{}}
	ctx, cancel := context.WithCancel(context.Background())
	addr, done := make(chan net.Addr, 1), make(chan error, 1)
	p := &program{getenv: func(name string) string { return env[name] }, stdout: s.out, stderr: s.log, ready: func(a net.Addr) { addr <- a }}
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

// status makes a GET with a bearer credential and returns the answer's status.
func (s *served) status(t *testing.T, path, credential string) int {
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
	return map[string]string{"LISTEN_ADDR": "127.0.0.1:0", "DATA_DIR": filepath.Join(t.TempDir(), "data"), "ALLOW_PRIVATE_UPSTREAMS": "true"}
}

// printed finds the one token or key in an output.
func printed(t *testing.T, prefix, out string) string {
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

// TestFirstStart: with no setting but where, a server makes what it needs, for
// its owner only whatever the umask, and prints the first key once. It is not
// parallel: the umask is the whole process's.
func TestFirstStart(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	env := serveEnv(t)
	s := serveProgram(t, env)
	key := printed(t, keyPrefix, string(s.out.bytes()))
	if got := s.status(t, "/manage/projects", key); got != 200 {
		t.Errorf("the printed key: %d", got)
	}
	for name, want := range map[string]os.FileMode{"": 0o700, "llm-proxy.db": 0o600, "llm-proxy.db-wal": 0o600, "llm-proxy.db-shm": 0o600, keyName: 0o600, lockName: 0o600} {
		if info, err := os.Stat(filepath.Join(env["DATA_DIR"], name)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%q: %v %v, want %v", name, info, err, want)
		}
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	sealing, err := os.ReadFile(filepath.Join(env["DATA_DIR"], keyName))
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

// TestFirstStartWithProviderKey: OPENAI_API_KEY on an empty database makes a
// project and a token; calls work at once.
func TestFirstStartWithProviderKey(t *testing.T) {
	t.Parallel()
	provider := newFakeProvider(t)
	env := serveEnv(t)
	env["OPENAI_API_KEY"], env["OPENAI_API_URL"], env["MANAGEMENT_TOKEN"] = provider.key, provider.url, goodToken
	s := serveProgram(t, env)
	out := string(s.out.bytes())
	token := printed(t, tokenPrefix, out)
	if strings.Contains(out, keyPrefix) || strings.Contains(out, goodToken) || strings.Contains(out, provider.key) {
		t.Errorf("printed: %s", out)
	}
	provider.answer(func(c *providerConn, _ recorded) bool { return c.reply(200, `{"object":"list","data":[]}`) })
	if got := s.status(t, "/v1/models", token); got != 200 || provider.last(t).header.Get("Authorization") != "Bearer "+provider.key {
		t.Errorf("a call with the printed token: %d", got)
	}
	if got := s.status(t, "/manage/projects", goodToken); got != 200 {
		t.Errorf("MANAGEMENT_TOKEN: %d", got)
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	again := serveProgram(t, env)
	waitFor(t, "the note that OPENAI_API_KEY is not used", func() bool { return bytes.Contains(again.log.bytes(), []byte("OPENAI_API_KEY is not used")) })
	if len(again.out.bytes()) > 0 {
		t.Errorf("the second start prints %s", again.out.bytes())
	}
	for _, secret := range []string{token, goodToken, provider.key} {
		if bytes.Contains(s.log.bytes(), []byte(secret)) || bytes.Contains(again.log.bytes(), []byte(secret)) {
			t.Error("a secret is in the log")
		}
	}
}

// TestSecondProcess: a data directory serves one process.
func TestSecondProcess(t *testing.T) {
	t.Parallel()
	env := serveEnv(t)
	serveProgram(t, env)
	if _, err := runProgram(t, env, "serve"); err == nil || !strings.Contains(err.Error(), "another llm-proxy is using") {
		t.Errorf("the second process: %v", err)
	}
}

// TestSecondProcessOnDatabase: two data directories cannot share a database.
func TestSecondProcessOnDatabase(t *testing.T) {
	t.Parallel()
	database := "sqlite:" + filepath.Join(t.TempDir(), "shared.db")
	first, second := serveEnv(t), serveEnv(t)
	first["DATABASE_URL"], second["DATABASE_URL"] = database, database
	live := serveProgram(t, first)
	if _, err := runProgram(t, second, "serve"); err == nil || !strings.Contains(err.Error(), "another llm-proxy is using") {
		t.Errorf("the second process: %v", err)
	}
	if err := live.stop(); err != nil {
		t.Fatal(err)
	}
}

// TestPortTaken: who cannot listen prints no secret, for nobody would see it
// again.
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
	if err == nil || !strings.Contains(err.Error(), "listening on") || strings.Contains(out, keyPrefix) {
		t.Errorf("got %v, printed %q", err, out)
	}
}

// TestMissingDatabase: a database that was there and is not any more is an
// error, also when others were used in between.
func TestMissingDatabase(t *testing.T) {
	t.Parallel()
	env := serveEnv(t)
	other := map[string]string{"DATABASE_URL": "sqlite:" + filepath.Join(t.TempDir(), "a-rather-long-name-for-a-database.db")}
	maps.Copy(other, env)
	for _, e := range []map[string]string{other, env, other, env} {
		if err := serveProgram(t, e).stop(); err != nil {
			t.Fatal(err)
		}
	}
	for name, e := range map[string]map[string]string{filepath.Join(env["DATA_DIR"], "llm-proxy.db"): env, strings.TrimPrefix(other["DATABASE_URL"], "sqlite:"): other} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		if _, err := runProgram(t, e, "serve"); err == nil || !strings.Contains(err.Error(), "is missing or empty") {
			t.Errorf("without its database: %v", err)
		}
		if _, err := os.Stat(name); err == nil {
			t.Error("a new database was begun in silence")
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
		for _, s := range settings() {
			if !strings.Contains(out, "  "+s.name+" ") || !strings.Contains(out, s.help) {
				t.Errorf("%s says nothing of %s", arg, s.name)
			}
		}
		for _, c := range []string{"serve", "demo", "doctor", "healthcheck", "backup FILE", "restore FILE", "version"} {
			if !strings.Contains(out, c) {
				t.Errorf("%s says nothing of %s", arg, c)
			}
		}
	}
	if out, err := runProgram(t, nil, "version"); err != nil || !strings.HasPrefix(out, "llm-proxy ") || strings.Count(out, "\n") != 1 {
		t.Errorf("version: %q %v", out, err)
	}
}

func TestWrongArguments(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ args, want string }{
		{"sevre", "unknown command \"sevre\""}, {"--listen", "unknown command"}, {"serve now", "unexpected argument"}, {"demo x", "unexpected argument"},
		{"healthcheck x", "unexpected argument"}, {"doctor --providers", "usage:"}, {"doctor --provider x", "usage:"}, {"backup", "usage:"},
		{"backup a b", "usage:"}, {"backup --x", "usage:"}, {"restore", "usage:"}, {"restore a b", "usage:"}, {"restore a --revoke=some", "usage:"},
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

// testCertificate writes a self-signed pair for llm.example.test that is valid
// for as long as given from now.
func testCertificate(t *testing.T, dir string, valid time.Duration) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, DNSNames: []string{"*.example.test"},
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
	for name, b := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret}} {
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
		{dead.Addr().String(), "no answer"}, {answers(503), "answers 503"}, {answers(307), "answers 307"}, {"nowhere", "LISTEN_ADDR: must be"},
	} {
		// The other settings are wrong, which is not what was asked.
		out, err := runProgram(t, map[string]string{"LISTEN_ADDR": tt.addr, "LOG_LEVEL": "wrong"}, "healthcheck")
		if out != "" || (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.addr, err, tt.want)
		}
	}
}

// TestHealthcheckTLS: the server's own certificate is believed, and no other.
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
			t.Errorf("TLS_CERT_FILE=%q: the server is called healthy", cert)
		}
	}
}
