// These tests check the rule of every setting: valid values, invalid values with a helpful
// message, all problems at once, and never a secret in an error.
package main

import (
	"bytes"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"
)

const (
	goodKey   = "1f0c9a35d2be74886a01ff3479e2c5d0b39a4f6e1782cd5503be91f7a86d240c"
	goodToken = "m4nAg3-7Qz1xWk0VbR2sT9uYp5LcHd8Ej"
)

// loadTestConfig loads env on top of the settings that a start requires.
func loadTestConfig(t *testing.T, env map[string]string) (*config, error) {
	t.Helper()
	all := map[string]string{"DATA_DIR": t.TempDir()}
	maps.Copy(all, env)
	return loadConfig(func(name string) string { return all[name] })
}

func TestConfigDefaults(t *testing.T) {
	t.Parallel()
	c, err := loadTestConfig(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.listenAddr != "127.0.0.1:8080" || c.databaseFile != filepath.Join(c.dataDir, "llm-proxy.db") ||
		c.encryptionKey != nil ||
		c.managementToken != nil || c.openaiKey != nil || c.openaiURL != "https://api.openai.com" || c.allowPrivate ||
		c.publicURL != nil ||
		c.trustedProxies != nil || c.tlsCert != "" || c.tlsKey != "" || c.logLevel != slog.LevelInfo || c.logText ||
		c.maxBodyBytes != 32<<20 || c.maxUploadBytes != 512<<20 || c.bodyMemory != 512<<20 ||
		c.upstreamTimeout != 10*time.Minute ||
		c.streamIdleTimeout != 5*time.Minute || c.drainTimeout != 30*time.Second || c.retention != 90*24*time.Hour {
		t.Errorf("the defaults are %+v", c)
	}
}

// TestConfigValues has one value per row: if want is empty, the value is valid, otherwise
// the error contains want.
func TestConfigValues(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name, text string, mode fs.FileMode) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return name
	}
	for _, tt := range []struct{ name, value, want string }{
		{"CORS_ORIGINS", "https://a.example", ""},
		{"CORS_ORIGINS", "http://[::1]:80000", "a port"},
		{"CORS_ORIGINS", "https://a.example:8443, http://localhost:3000,app://obsidian.md,http://[::1]:8000", ""},
		{"CORS_ORIGINS", "*", `"*" has a wildcard`},
		{"CORS_ORIGINS", "https://*.example.com", "has a wildcard"},
		{"CORS_ORIGINS", "null", "is the origin of any file"},
		{"CORS_ORIGINS", "a.example", "is not a scheme and a host"},
		{"CORS_ORIGINS", "a.example:8080", "is not a scheme and a host"},
		{"CORS_ORIGINS", "https://a.example,", "is not a scheme and a host"},
		{"CORS_ORIGINS", "https://:8080", "is not a scheme and a host"},
		{"CORS_ORIGINS", "https://a.example/", "does not end with a slash"},
		{"CORS_ORIGINS", "https://a.example/chat", "more than a scheme"},
		{"CORS_ORIGINS", "https://a.example?x", "the value has more than a scheme"},
		{"CORS_ORIGINS", "https://user:secret@a.example", "the value has more than a scheme"},
		{"CORS_ORIGINS", "https://A.example", "lower case"},
		{"CORS_ORIGINS", "https://exämple.test", "ASCII"},
		{"CORS_ORIGINS", "https://a.example:443", "a port that browsers leave out"},
		{"CORS_ORIGINS", "http://a.example:80", "a port that browsers leave out"},
		{"CORS_ORIGINS", "http://a.example:", "a port"},
		{"CORS_ORIGINS", "http://a.example:080", "a port"},
		{"CORS_ORIGINS", "https://a.example/,https://ok.example,http://B.example", `slash; "http://B.example" must be`},
		{"LISTEN_ADDR", ":8080", ""},
		{"LISTEN_ADDR", "0.0.0.0:1", ""},
		{"LISTEN_ADDR", "[::]:65535", ""},
		{"LISTEN_ADDR", "localhost:0", ""},
		{"LISTEN_ADDR", "8080", "must be HOST:PORT"},
		{"LISTEN_ADDR", "unix:/run/llm-proxy/http.sock", ""},
		{"LISTEN_ADDR", "unix:http.sock", "followed by an absolute path"},
		{"LISTEN_ADDR", "unix:/" + strings.Repeat("x", 100), "at most 100 bytes"},
		{"LISTEN_ADDR", "systemd", ""},
		{"METRICS_ADDR", ":9090", ""},
		{"MAX_DATABASE_BYTES", "2GiB", ""},
		{"MAX_DATABASE_BYTES", "1MiB", "must be from 16MiB"},
		{"METRICS_ADDR", "systemd", "must be another address"},
		{"METRICS_ADDR", "9090", "must be HOST:PORT"},
		{"SOCKET_MODE", "0600", ""},
		{"SOCKET_MODE", "777", ""},
		{"SOCKET_MODE", "0440", "must be octal permissions"},
		{"SOCKET_MODE", "1660", "must be octal permissions"},
		{"SOCKET_MODE", "rw", "must be octal permissions"},
		{"TRUSTED_PROXIES", "unix", ""},
		{"TRUSTED_PROXIES", "unix, 10.0.0.0/8", ""},
		{"TRUSTED_PROXIES", "unix,socket", "must list addresses"},
		{"LISTEN_ADDR", "[::1", "must be HOST:PORT"},
		{"LISTEN_ADDR", "127.0.0.1:65536", "not a number from 0 to 65535"},
		{"LISTEN_ADDR", "127.0.0.1:http", "not a number"},
		{"LISTEN_ADDR", "127.0.0.1:", "not a number"},
		{"LISTEN_ADDR", "example.com:80", "must name an IP address"},
		{"LISTEN_ADDR", " :8080", "has white space around its value"},
		{"LISTEN_ADDR", "\n", "has white space around its value"},
		{"UPSTREAM_PROXY", "http://proxy.example.com:3128", ""},
		{"UPSTREAM_PROXY", "https://user:pw-canary-2@10.0.0.5:8443", ""},
		{"UPSTREAM_PROXY", "socks5://[fd12::1]:1080/", ""},
		{"UPSTREAM_PROXY", "http://127.0.0.1:3128", ""},
		{"UPSTREAM_PROXY", "proxy.example.com:3128", "must be a scheme, a host and a port"},
		{"UPSTREAM_PROXY", "http://proxy.example.com", "must be a scheme, a host and a port"},
		{"UPSTREAM_PROXY", "ftp://user:pw-canary-2@proxy.example.com:21", "must be a scheme, a host and a port"},
		{"UPSTREAM_PROXY", "http://proxy.example.com:3128/path", "must be a scheme, a host and a port"},
		{"UPSTREAM_PROXY", "http://169.254.169.254:80", "never allowed"},
		{"DATA_DIR", file("a-file", "x", 0o600), "is not a directory"},
		{"DATA_DIR", filepath.Join(dir, "new", "deep"), ""},
		{"DATA_DIR", filepath.Join(dir, "a-file", "below"), "not a directory"},
		{"DATABASE_URL", "sqlite:" + filepath.Join(dir, "x.db"), ""},
		{"DATABASE_URL", "sqlite://" + filepath.Join(dir, "x.db"), ""},
		{"DATABASE_URL", "sqlite:", "must be sqlite:FILE"},
		{"DATABASE_URL", dir + "/x.db", "must be sqlite:FILE"},
		{"DATABASE_URL", "mysql://x", "must be sqlite:FILE"},
		{"DATABASE_URL", "sqlite::memory:", "in memory"},
		{"DATABASE_URL", "sqlite://:memory:", "in memory"},
		{"DATABASE_URL", "sqlite:" + filepath.Join(dir, "x.db?mode=ro"), "parameters after ? are not supported"},
		{"DATABASE_URL", "postgres://u:pw-canary-1@host", "names"},
		{"DATABASE_URL", "sqlite:" + filepath.Join(dir, "none", "x.db"), "create the directory first"},
		{"DATABASE_URL", "sqlite:" + dir, "is a directory"},
		{"DATABASE_URL", "sqlite:/dev/null", "is not a regular file"},
		{"ENCRYPTION_KEY", goodKey, ""},
		{"ENCRYPTION_KEY", strings.ToUpper(goodKey), ""},
		{"ENCRYPTION_KEY", "Hwyaf9K+dIhqAf80eeLF0LOaT24Xgs1VA76R96htJAw=", ""},
		{"ENCRYPTION_KEY", goodKey[:62], "must be 32 random bytes"},
		{"ENCRYPTION_KEY", "correct horse battery staple", "must be 32 random bytes"},
		{"ENCRYPTION_KEY", strings.Repeat("ab", 32), "is a pattern"},
		{"ENCRYPTION_KEY", "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", "is a pattern"},
		{"ENCRYPTION_KEY_FILE", file("key", goodKey+"\n", 0o600), ""},
		{"ENCRYPTION_KEY_FILE", file("crlf", goodKey+"\r\n", 0o600), ""},
		{"ENCRYPTION_KEY_FILE", file("short", goodKey[:60], 0o600),
			"names a file whose content must be 32 random bytes"},
		{"ENCRYPTION_KEY_FILE", file("empty", "", 0o600), "must be 32 random bytes"},
		{"ENCRYPTION_KEY_FILE", file("huge", strings.Repeat(goodKey, 100), 0o600), "larger than 4 KiB"},
		{"ENCRYPTION_KEY_FILE", filepath.Join(dir, "missing"), "names a file that cannot be read: no such file"},
		{"ENCRYPTION_KEY_FILE", dir, "names a file that cannot be read: is a directory"},
		// the key itself, which must not be quoted
		{"ENCRYPTION_KEY_FILE", goodKey, "names a file that cannot be read"},
		{"ENCRYPTION_KEY_FILE", "/dev/zero", "larger than 4 KiB"},
		{"MANAGEMENT_TOKEN", goodToken, ""},
		{"MANAGEMENT_TOKEN", goodToken[:31], "at least 32 characters"},
		{"MANAGEMENT_TOKEN", strings.Repeat("abcdefgh", 5), "too few different characters"},
		{"MANAGEMENT_TOKEN", "changeme-0123456789-abcdefghijklmn", "sample from documentation"},
		{"MANAGEMENT_TOKEN", "Your-Management-Token-Goes-Here-123456", "sample from documentation"},
		{"MANAGEMENT_TOKEN", "with a space 0123456789 abcdefghijk", "without spaces"},
		{"MANAGEMENT_TOKEN", "tökén-0123456789-abcdefghijklmnopqr", "printable ASCII"},
		{"MANAGEMENT_TOKEN", goodToken + "\n", "has white space around its value"},
		{"MANAGEMENT_TOKEN_FILE", file("token", goodToken+"\n", 0o600), ""},
		{"MANAGEMENT_TOKEN_FILE", file("weak", "password", 0o600), "at least 32 characters"},
		{"MANAGEMENT_TOKEN_FILE", goodToken, "names a file that cannot be read"},
		{"OPENAI_API_KEY", "sk-proj-0123456789", ""},
		{"OPENAI_API_KEY", "sk-1234", "must have 8 to 4096 characters"},
		{"OPENAI_API_KEY", "sk-...abcd1234", "looks masked or truncated"},
		{"OPENAI_API_KEY", "sk-********1234", "looks masked or truncated"},
		{"OPENAI_API_KEY", "sk proj 0123", "without spaces"},
		{"OPENAI_API_URL", "https://eu.api.openai.com/v1", ""},
		{"OPENAI_API_URL", "http://api.openai.com", "must be https"},
		{"OPENAI_API_URL", "https://user:pw-canary-2@api.openai.com", "must not contain a user name"},
		{"OPENAI_API_URL", "https://api.openai.com?key=pw-canary-3", "must not have a query"},
		{"OPENAI_API_URL", "https://127.0.0.1", "loopback or private"},
		{"OPENAI_API_URL", "api.openai.com", "must be an absolute URL"},
		{"ALLOW_PRIVATE_UPSTREAMS", "true", ""},
		{"ALLOW_PRIVATE_UPSTREAMS", "yes", "must be one of: true, false"},
		{"PUBLIC_URL", "https://llm.example.com", ""},
		{"PUBLIC_URL", "https://llm.example.com/", ""},
		{"PUBLIC_URL", "https://llm.example.com/x", "must be a scheme and a host"},
		{"PUBLIC_URL", "llm.example.com", "must be a scheme and a host"},
		{"PUBLIC_URL", "https://u:pw-canary-4@llm.example.com", "must be a scheme and a host"},
		{"TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.1,2001:db8::/32", ""},
		{"TRUSTED_PROXIES", "10.0.0.1/8", "is neither"},
		{"TRUSTED_PROXIES", "10.0.0.0/8,", "is neither"},
		{"TRUSTED_PROXIES", "all", "is neither"},
		{"TLS_CERT_FILE", filepath.Join(dir, "missing"), "without TLS_KEY_FILE"},
		{"TLS_KEY_FILE", filepath.Join(dir, "missing"), "without TLS_CERT_FILE"},
		{"LOG_LEVEL", "warn", ""},
		{"LOG_LEVEL", "WARN", "must be one of: debug, info, warn, error"},
		{"LOG_FORMAT", "text", ""},
		{"LOG_FORMAT", "xml", "must be one of: json, text"},
		{"MAX_BODY_BYTES", "1024", ""},
		{"MAX_BODY_BYTES", "64KiB", ""},
		{"MAX_BODY_BYTES", "32MB", "must be a whole number of bytes, KiB, MiB or GiB"},
		{"MAX_BODY_BYTES", "1.5MiB", "must be a whole number"},
		{"MAX_BODY_BYTES", "-1", "must be from 1KiB to 1GiB"},
		{"MAX_BODY_BYTES", "1023", "must be from 1KiB to 1GiB"},
		{"MAX_BODY_BYTES", "2GiB", "must be from 1KiB to 1GiB"},
		{"MAX_BODY_BYTES", "9223372036854775807GiB", "must be from"},
		{"MAX_BODY_BYTES", "99999999999999999999", "must be a whole number"},
		{"MAX_UPLOAD_BYTES", "1GiB", ""},
		{"MAX_UPLOAD_BYTES", "2TiB", "must be a whole number"},
		{"BODY_MEMORY", "64MiB", ""},
		{"BODY_MEMORY", "16MiB", "must be at least MAX_BODY_BYTES"},
		{"BODY_MEMORY", "lots", "must be a whole number"},
		{"MAX_CONNECTIONS", "1", ""},
		{"MAX_CONNECTIONS", "0", "must be a whole number from 1"},
		{"MAX_CONNECTIONS", "1k", "must be a whole number"},
		{"UPSTREAM_TIMEOUT", "90s", ""},
		{"UPSTREAM_TIMEOUT", "90", "must be a duration with a unit"},
		{"UPSTREAM_TIMEOUT", "3h", "must be from 100ms to 2h"},
		{"UPSTREAM_TIMEOUT", "0s", "must be from"},
		{"UPSTREAM_TIMEOUT", "-1m", "must be from"},
		{"STREAM_IDLE_TIMEOUT", "1m30s", ""},
		{"STREAM_IDLE_TIMEOUT", "5 m", "must be a duration"},
		{"STREAM_PING_INTERVAL", "1m", ""},
		{"STREAM_PING_INTERVAL", "5m", "must be from 10ms to 4m"},
		{"STREAM_PING_INTERVAL", "0s", "must be from"},
		{"DRAIN_TIMEOUT", "0s", ""},
		{"DRAIN_TIMEOUT", "2h", "must be from"},
		{"DRAIN_DELAY", "0s", ""},
		{"DRAIN_DELAY", "11m", "must be from"},
		{"RETENTION", "30d", ""},
		{"RETENTION", "12h", ""},
		{"RETENTION", "30days", "must be a duration"},
		{"RETENTION", "5m", "must be from"},
		{"RETENTION", "99999d", "must be a duration"},
	} {
		_, err := loadTestConfig(t, map[string]string{tt.name: tt.value})
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s=%q: %v", tt.name, tt.value, err)
		case tt.want != "" && err == nil:
			t.Errorf("%s=%q is accepted", tt.name, tt.value)
		case tt.want != "" && (!strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), tt.name) ||
			strings.Contains(err.Error(), "\n")):
			t.Errorf("%s=%q: the error is %q, want one line with %q", tt.name, tt.value, err, tt.want)
		case tt.want != "" && (isSecretSetting(tt.name) && strings.Contains(err.Error(), strings.TrimSpace(tt.value)) ||
			strings.Contains(err.Error(), "pw-canary")):
			t.Errorf("%s: its value is in the error: %v", tt.name, err)
		}
	}
}

func isSecretSetting(name string) bool {
	return slices.ContainsFunc(settings(&config{}), func(s setting) bool { return s.name == name && s.secret })
}

// TestConfigPairs checks the rules about two settings.
func TestConfigPairs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cert, key := testCertificate(t, dir, time.Hour)
	for _, tt := range []struct {
		env  map[string]string
		want string
	}{
		{map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key}, ""},
		{map[string]string{"TLS_CERT_FILE": key, "TLS_KEY_FILE": cert}, "not a usable pair"},
		{map[string]string{"TLS_CERT_FILE": cert, "TLS_KEY_FILE": "-----BEGIN PRIVATE KEY-----pw-canary-5"},
			"not a usable pair"},
		{map[string]string{"ENCRYPTION_KEY": goodKey, "ENCRYPTION_KEY_FILE": cert}, "cannot be combined"},
		{map[string]string{"MANAGEMENT_TOKEN": goodToken, "MANAGEMENT_TOKEN_FILE": cert}, "cannot be combined"},
		{map[string]string{"OPENAI_API_URL": "http://127.0.0.1:9", "ALLOW_PRIVATE_UPSTREAMS": "true"}, ""},
		{map[string]string{"BODY_MEMORY": "8MiB", "MAX_BODY_BYTES": "8MiB"}, ""},
	} {
		_, err := loadTestConfig(t, tt.env)
		if (err == nil) != (tt.want == "") || err != nil &&
			(!strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "pw-canary")) {
			t.Errorf("%v: %v, want %q", tt.env, err, tt.want)
		}
	}
}

// TestSettingNotices: names that are almost those of settings, and proxies that are ignored, are noticed; other
// names are not.
func TestSettingNotices(t *testing.T) {
	t.Parallel()
	c := &config{}
	for line, want := range map[string]string{
		"RETENTON=1d": "did you mean RETENTION?", "OPENAI_APIKEY=sk-canary": "did you mean OPENAI_API_KEY?",
		"RETENTOIN=1d": "RETENTION?", "retention=1d": "RETENTION?", "LLM_PROXY_LOG_LEVEL=debug": "LOG_LEVEL?",
		"LISTEN_ADDRESS=:1": "", "LISTENADDR=:1": "LISTEN_ADDR?", "MAX_BODY_BYTE=1": "MAX_BODY_BYTES?",
		"DATABASE_URI=x": "DATABASE_URL?", "ENCRYPTION_KEYFILE=x": "ENCRYPTION_KEY_FILE?", "DATADIR=x": "DATA_DIR?",
		"TRUSTED_PROXY=x": "", "OPENAI_BASE_URL=x": "", "LISTEN_FDS=1": "", "LISTEN_PID=7": "", "RETENTION=1d": "",
		"PATH=/bin": "", "HOME=/": "", "LANG=C": "", "TMPDIR=/tmp": "", "GOMEMLIMIT=1GiB": "", "NO_PROXY=*": "", "": "",
		"HTTPS_PROXY=http://u:pw-canary@p:1": "set UPSTREAM_PROXY", "http_proxy=x": "set UPSTREAM_PROXY",
		"ALL_PROXY=x": "set UPSTREAM_PROXY", "HTTP_PROXY=": "", "HOSTNAME=x": "", "LOG_LEVELS=x": "LOG_LEVEL?",
	} {
		notices := c.settingNotices([]string{line})
		text := fmt.Sprint(notices)
		if len(notices) > 1 || (want == "") != (len(notices) == 0) || !strings.Contains(text, want) ||
			strings.Contains(text, "canary") {
			t.Errorf("%s: %s, want %q", line, text, want)
		}
	}
	c.upstreamProxy = &url.URL{}
	if notices := c.settingNotices([]string{"HTTPS_PROXY=x"}); len(notices) > 0 {
		t.Errorf("with UPSTREAM_PROXY: %v", notices)
	}
}

// TestConfigUnwritable: a directory that cannot be written to is an error.
func TestConfigUnwritable(t *testing.T) {
	t.Parallel()
	if os.Geteuid() == 0 {
		t.Log("running as root: /proc takes the place of a directory that is not writable")
		if _, err := loadTestConfig(t, map[string]string{"DATA_DIR": "/proc"}); err == nil ||
			!strings.Contains(err.Error(), "cannot be written to") {
			t.Errorf("the error is %v", err)
		}
		return
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	if _, err := loadTestConfig(t, map[string]string{"DATA_DIR": filepath.Join(dir, "data")}); err == nil ||
		!strings.Contains(err.Error(), "cannot be written to") {
		t.Errorf("the error is %v", err)
	}
}

// TestConfigAllProblemsAtOnce: each invalid setting has its own line in the error, and the
// check leaves nothing behind.
func TestConfigAllProblemsAtOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	env := map[string]string{
		"DATA_DIR": dir, "LISTEN_ADDR": "8080", "DATABASE_URL": "x", "LOG_LEVEL": "loud",
		"ENCRYPTION_KEY": "secret-canary-aaaa", "MANAGEMENT_TOKEN": "secret-canary-bbbb",
		"OPENAI_API_KEY": "secret-canary-cccc…",
		"MAX_BODY_BYTES": "1TB", "BODY_MEMORY": "x", "UPSTREAM_TIMEOUT": "10", "RETENTION": " 9d",
		"PUBLIC_URL": "ftp://x", "TLS_KEY_FILE": "x", "TRUSTED_PROXIES": "?", "ALLOW_PRIVATE_UPSTREAMS": "1",
	}
	_, err := loadConfig(func(name string) string { return env[name] })
	if err == nil {
		t.Fatal("no error")
	}
	lines := strings.Split(err.Error(), "\n")
	for name := range env {
		n := 0
		for _, l := range lines {
			if strings.HasPrefix(l, name+":") {
				n++
			}
		}
		if name != "DATA_DIR" && n != 1 {
			t.Errorf("%s has %d lines", name, n)
		}
	}
	if len(lines) != len(env)-1 {
		t.Errorf("%d lines for %d problems:\n%v", len(lines), len(env)-1, err)
	}
	if strings.Contains(err.Error(), "secret-canary") {
		t.Errorf("a secret is in %v", err)
	}
	if files, _ := os.ReadDir(dir); len(files) > 0 {
		t.Errorf("the check left %v behind", files)
	}
}

// TestConfigTable: --help lists exactly the settings that are read.
func TestConfigTable(t *testing.T) {
	t.Parallel()
	read := map[string]bool{}
	if _, err := loadConfig(func(name string) string { read[name] = true; return "" }); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	writeSettings(tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0))
	for _, s := range settings(&config{}) {
		if !read[s.name] || !strings.Contains(b.String(), "  "+s.name+"  ") || s.help == "" {
			t.Errorf("%s: read: %v", s.name, read[s.name])
		}
		delete(read, s.name)
	}
	if len(read) > 0 {
		t.Errorf("these settings have no row: %v", read)
	}
}

// FuzzConfig: any environment gives an error or a config within its bounds, and no error
// contains a secret.
func FuzzConfig(f *testing.F) {
	names := make([]string, 0, 32)
	for _, s := range settings(&config{}) {
		// these touch files
		if !strings.HasSuffix(s.name, "_FILE") && s.name != "DATA_DIR" && s.name != "DATABASE_URL" {
			names = append(names, s.name)
			f.Add(uint(len(names)-1), s.def, uint(0), "")
		}
	}
	for _, v := range []string{":1", "1h", "-1s", "1KiB", "0x10", "10.0.0.0/8", "https://[::1]:0", "\x00", "sk-…",
		goodKey, goodToken, "9223372036854775808d", "1e3"} {
		for i := range names {
			f.Add(uint(i), v, uint(i+1), v)
		}
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, a uint, v string, b uint, w string) {
		env := map[string]string{"DATA_DIR": dir, names[a%uint(len(names))]: v}
		env[names[b%uint(len(names))]] = w
		c, err := loadConfig(func(name string) string { return env[name] })
		if err != nil {
			for name, value := range env {
				if isSecretSetting(name) && len(value) > 12 && v != w && strings.Contains(err.Error(), value) {
					t.Errorf("the error holds the value of %s: %v", name, err)
				}
			}
			return
		}
		if c.maxBodyBytes < 1<<10 || c.maxBodyBytes > c.bodyMemory || c.maxUploadBytes < 1<<10 ||
			c.upstreamTimeout < 100*time.Millisecond ||
			c.upstreamTimeout > 2*time.Hour || c.streamIdleTimeout < 100*time.Millisecond || c.drainTimeout < 0 ||
			c.retention < time.Hour {
			t.Errorf("out of bounds: %+v", c)
		}
		if c.encryptionKey != nil {
			if _, err := sealerFromKey(c.encryptionKey); err != nil {
				t.Error(err)
			}
		}
		if c.managementToken != nil && len(c.managementToken()) < 32 {
			t.Error("a short MANAGEMENT_TOKEN is accepted")
		}
		if _, err := parseBaseURL(c.openaiURL, c.allowPrivate); err != nil {
			t.Error(err)
		}
	})
}
